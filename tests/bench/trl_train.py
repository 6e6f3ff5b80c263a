"""Trains an exported model in TRL's GRPOTrainer, with our problems and our rewards.

    pip install trl
    python train.py export --ckpt=out/zero/ckpt.pt --export_dir=out-hf
    python tests/bench/trl_train.py out-hf --max_steps=2

Tried with trl 1.16.0 and transformers 5.24.0, which this project does not need. From here on
`accelerate launch` and use_vllm=True are TRL's, and not tried here.
"""
import argparse
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import rewards  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--max_steps", type=int, default=60)
parser.add_argument("--max_completion_length", type=int, default=340)
args = parser.parse_args()

cfg, rng = data.DataConfig(), random.Random(1)
problems = [data.draw_problem(cfg, rng) for _ in range(1000)]
rows = [{"problem": i, "prompt": [{"role": "system", "content": data.INSTRUCTION},
                                  {"role": "user", "content": data.in_words(problem, cfg)}]}
        for i, problem in enumerate(problems)]


def in_trl(reward):
    def judge(completions, problem, **others):  # `problem` is the column of that name
        return reward([problems[i] for i in problem], [said[0]["content"] for said in completions])

    judge.__name__ = reward.__name__
    return judge


trainer = GRPOTrainer(
    model=args.model, train_dataset=Dataset.from_list(rows),
    reward_funcs=[in_trl(rewards.accuracy), in_trl(rewards.format_reward)],
    args=GRPOConfig(
        output_dir="out-trl", max_steps=args.max_steps, learning_rate=3e-4, beta=0.001,
        loss_type="grpo", num_generations=16, per_device_train_batch_size=64,
        gradient_accumulation_steps=4, max_completion_length=args.max_completion_length,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
        logging_steps=1, report_to="none", save_strategy="no"))
trainer.train()
trainer.save_model("out-trl")
