"""Kills a run with SIGKILL at random moments and starts it again each time. What it ends with must
be what a run left in peace ends with, to the bit: weights, optimisers, logs, samples.

    python tests/bench/kill.py --kills=20
    python tests/bench/kill.py --kills=20 --stages=r1,distill,small_zero
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.append(ROOT)
from train import resolve_dependencies  # noqa: E402

FLAGS = ["--n_layer=1", "--n_embd=16", "--n_head=2", "--n_kv_head=1", "--head_dim=8",
         "--mlp_dim=16", "--base_rows=2", "--base_length=200", "--context=400", "--base_steps=300",
         "--rl_steps=30", "--prompts_per_step=2", "--group_size=4", "--max_new_tokens=24",
         "--eval_problems=20", "--eval_samples=4", "--eval_every=0", "--save_every=2",
         "--threads=1", "--device=cpu", "--matmul=torch",  # else two runs may measure two things
         "--ref_every=3", "--kl_coef=0.01",
         "--w_length=1"]  # no other reward is earned, and equal rewards teach nothing
LATER = ["--source_problems=20", "--source_samples=4", "--general_replies=20", "--sft_steps=60",
         "--sft_rows=4"]
# For the later stages, all that such a model says passes the filters, what is long is preferred,
# and half of it is in format.
LENIENT = """
import sys, rewards, train
train.FILTERS = dict.fromkeys(train.FILTERS, lambda problem, text: True)
rewards.has_format = lambda text: len(text) % 2 == 0
rewards.split_completion = lambda text: (text, text)
rewards.gold_reward = lambda problem, answer: len(answer)
train.main(sys.argv[1:])
"""
LOGS = ["metrics.jsonl", "rollouts.jsonl", "samples.jsonl", "sft.jsonl", "pairs.jsonl"]


def start(out, stages):
    if set(resolve_dependencies(stages)) <= {"base", "zero"}:
        argv = ["train.py", *stages, *FLAGS]
    else:
        argv = ["-c", LENIENT, *stages, *FLAGS, *LATER]
    return subprocess.Popen([sys.executable, *argv, f"--out_dir={out}"], cwd=ROOT, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def what_is_left(out, stages):
    """{(stage, what): value} of all that must not depend on interruptions."""
    left = {}
    for stage in resolve_dependencies(stages):
        folder = os.path.join(out, stage)
        state = torch.load(os.path.join(folder, "ckpt.pt"), weights_only=True)
        left[stage, "weights"] = list(state["model"].values())
        left[stage, "optimisers"] = [
            tensor for optimizer in state["optimizers"]
            for kept in optimizer["state"].values() for tensor in kept.values()]
        left[stage, "reference"] = list((state["ref"] or {}).values())
        for file in LOGS:
            if os.path.exists(os.path.join(folder, file)):
                left[stage, file] = read_log(os.path.join(folder, file))
        with open(os.path.join(folder, "eval.json"), encoding="utf-8") as f:
            left[stage, "eval.json"] = json.load(f)
    return left


def read_log(path):
    """The lines of a log, without what a clock has measured."""
    with open(path, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    return [{key: value for key, value in line.items() if not key.endswith(("seconds", "_s"))}
            for line in lines]


def same(a, b):
    if isinstance(a, list) and any(map(torch.is_tensor, a)):
        return len(a) == len(b) and all(map(torch.equal, a, b))
    return a == b


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stages", default="zero", help="stages of train.py, as r1,distill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    rng, stages = random.Random(args.seed), args.stages.split(",")
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = os.path.join(folder, "whole"), os.path.join(folder, "killed")
        t0 = time.time()
        finish(start(whole, stages))
        took = time.time() - t0
        starts = kill_and_restart(killed, stages, args.kills, took, rng)
        a, b = what_is_left(whole, stages), what_is_left(killed, stages)
        differ = [" ".join(key) for key in a if key not in b or not same(a[key], b[key])]
        verdict = f"DIFFERENT: {', '.join(differ)}" if differ else "identical"
        print(f"{args.kills} kills in {starts} starts of a run of {took:.0f} s: {verdict}")
        return not differ


def finish(run, timeout=None):
    """Waits for a run. Raises SystemExit with what it said if it failed."""
    if run.wait(timeout):
        raise SystemExit(run.stderr.read())


def kill_and_restart(out, stages, kills, took, rng):
    """Starts the run until it was killed so often and has then finished -> the number of starts."""
    starts = 0
    while True:
        run = start(out, stages)
        starts += 1
        try:
            finish(run, rng.uniform(0.3, 1.0) * took if kills else 20 * took + 600)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills -= 1
            continue
        if kills <= 0:
            return starts
        done = resolve_dependencies(stages)  # too early: once more, from some stage on
        for stage in done[rng.randrange(len(done)):]:
            shutil.rmtree(os.path.join(out, stage))


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
