"""What a GRPO step costs: seconds for sampling, log-probs and update, and peak memory; one JSON line a case.

    taskset -c 0 python tests/bench/step.py --threads=1

With transformers and trl installed, TRL's GRPOTrainer does the same work in turn with ours, and the ratio is printed.
"""
import copy
import statistics
import tempfile

import torch

from common import END, SHAPES, arguments, as_transformers, build, clock, end_after, peak, ratio, report, reset_peak, spread
import grpo

LR, KL = 1e-6, 0.04


def main():
    args = arguments(__doc__, 5, shape=("tiny", f"some of {', '.join(SHAPES)}"), prompts=(16, "prompts of 32 tokens"), group=(8, "samples of each"),
                     lengths=("even,uneven", "even: --new tokens each; uneven: geometric, mean 40, at most 256"), new=(64, "new tokens of the even case"),
                     micro_tokens=(grpo.GRPOConfig.micro_tokens, "tokens in a forward/backward pass"))
    for shape in args.shape.split(","):
        for lengths in args.lengths.split(","):
            run(args, shape, lengths)


def run(args, shape, lengths):
    new_tokens, mean = (args.new, None) if lengths == "even" else (256, 40)
    model = end_after(build(shape, device=args.device), mean)
    prompts = torch.randint(1, model.cfg.vocab_size, (args.prompts, 32), generator=torch.Generator().manual_seed(1)).tolist()
    theirs = None if args.alone else as_transformers(model)
    step, ours, trl = our_step(args, model, prompts, new_tokens), [], []
    if theirs is None or not trl_beside(args, theirs, prompts, new_tokens, trl, lambda: ours.append(measure(step, args.device))):
        ours = [measure(step, args.device) for _ in range(args.rounds + 1)]
    for name, rounds in (("ours", ours[1:]), ("trl", trl[1:])):
        if rounds:
            report(bench="step", shape=shape, lengths=lengths, who=name, device=args.device, threads=torch.get_num_threads(),
                   tokens=rounds[0]["work"], seconds=spread([r["seconds"] for r in rounds]),
                   tokens_per_s=spread([r["work"] / r["seconds"] for r in rounds]), peak_mib=round(max(r["peak"] for r in rounds)),
                   **{part: round(statistics.median(r[part] for r in rounds), 4) for part in ("sampling", "logprobs", "update") if part in rounds[0]})
    if trl:
        report(bench="step", shape=shape, lengths=lengths, ours_over_trl=ratio(ours[1:], trl[1:]))


def measure(step, device):
    before, t0 = reset_peak(device), clock(device)
    parts = step()
    return {"seconds": clock(device) - t0, "peak": peak(device) - before, **parts}


def reward(completions):
    """The share of even tokens: cheap, and not the same for a whole group."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completions]


def our_step(args, model, prompts, new_tokens):
    """A function that does one step and returns its tokens and the seconds of its parts."""
    cfg = grpo.GRPOConfig(prompts_per_step=args.prompts, group_size=args.group, max_new_tokens=new_tokens, kl_coef=KL,
                          micro_tokens=args.micro_tokens)
    ref = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    generator, seconds, token_logps = torch.Generator().manual_seed(2), {}, grpo.token_logps

    def timed(*a, **k):
        t0 = clock(args.device)
        out = token_logps(*a, **k)
        seconds["logprobs"] = seconds.get("logprobs", 0.0) + clock(args.device) - t0
        return out

    def step():
        seconds.clear()
        t0 = clock(args.device)
        batch = grpo.rollout(model, [None] * args.prompts, prompts, lambda _, ids: (reward(ids), {}), cfg, generator, (END,))
        t1 = clock(args.device)
        grpo.token_logps = timed
        grpo.grpo_step(model, ref, [optimizer], batch, cfg, generator)
        grpo.token_logps = token_logps
        update = clock(args.device) - t1 - seconds["logprobs"]
        return {"work": int(batch.mask.sum()), "sampling": t1 - t0, "logprobs": seconds["logprobs"], "update": update}

    return step


def trl_beside(args, theirs, prompts, new_tokens, results, between):
    """Runs TRL's trainer, calling `between` after each of its steps. False if trl is not installed."""
    try:
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return False
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(theirs.config.vocab_size)}, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{END}", pad_token=f"t{END}", padding_side="left")
    now = {}

    def reward_trl(completion_ids, **_):
        now["work"] = sum(map(len, completion_ids))
        return reward(completion_ids)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now.update(before=reset_peak(args.device), t0=clock(args.device))

        def on_step_end(self, *_, **__):
            results.append({"seconds": clock(args.device) - now["t0"], "peak": peak(args.device) - now["before"], "work": now["work"]})
            between()

    with tempfile.TemporaryDirectory() as folder:  # the trainer loads its reference from a folder
        theirs.save_pretrained(folder)
        theirs.config._name_or_path = folder
        trainer = GRPOTrainer(theirs, reward_trl, processing_class=tokenizer, callbacks=[Clock()],
            train_dataset=Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in p) for p in prompts]}),
            args=GRPOConfig(
                folder, per_device_train_batch_size=args.prompts * args.group, num_generations=args.group, steps_per_generation=1,
                max_completion_length=new_tokens, temperature=1.0, top_p=1.0, top_k=0, beta=KL, loss_type="grpo", learning_rate=LR,
                weight_decay=0.0, lr_scheduler_type="constant", max_steps=args.rounds + 1, use_cpu=args.device == "cpu", bf16=False,
                gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True))
        trainer.ref_model.lm_head.bias = theirs.lm_head.bias
        trainer.train()
    return True


if __name__ == "__main__":
    main()
