"""What a GRPO step costs: seconds for sampling, log-probs and update, and peak memory; one JSON
line a case.

    taskset -c 0 python tests/bench/step.py --threads=1

With transformers and trl installed, TRL's GRPOTrainer does the same work in turn with ours, and the
ratio is printed.
"""
import copy
import statistics
import tempfile

import torch
from common import (
    END,
    PROMPT_LEN,
    SHAPES,
    arguments,
    as_transformers,
    build,
    clock,
    end_after,
    peak,
    random_prompts,
    rates,
    ratio,
    report,
    reset_peak,
    spread,
)

import grpo

LR, KL = 1e-6, 0.04


def main():
    args = arguments(
        __doc__, 5, shape=("tiny", f"some of {', '.join(SHAPES)}"),
        prompts=(16, f"prompts of {PROMPT_LEN} tokens"), group=(8, "samples of each"),
        lengths=("even,uneven", "even: --new tokens each; uneven: geometric, mean 40, at most "
                 "256"), new=(64, "new tokens of the even case"),
        micro_tokens=(grpo.GRPOConfig.micro_tokens, "tokens in a forward/backward pass"))
    for shape in args.shape.split(","):
        for lengths in args.lengths.split(","):
            run(args, shape, lengths)


def run(args, shape, lengths):
    new_tokens, mean = (args.new, None) if lengths == "even" else (256, 40)
    model = end_after(build(shape, device=args.device), mean)
    prompts = random_prompts(args.prompts, model.cfg).tolist()
    theirs = None if args.alone else as_transformers(model)
    step, ours, trl = our_step(args, model, prompts, new_tokens), [], []

    def run_ours():
        ours.append(measure(step, args.device))

    if theirs is None or not trl_beside(args, theirs, prompts, new_tokens, trl, run_ours):
        for _ in range(args.rounds + 1):
            run_ours()
    ours, trl = ours[1:], trl[1:]  # the first was to warm up
    case = {"bench": "step", "shape": shape, "lengths": lengths}
    for name, rounds in (("ours", ours), ("trl", trl)):
        if rounds:
            parts = [part for part in ("sampling", "logprobs", "update") if part in rounds[0]]
            medians = {part: statistics.median(r[part] for r in rounds) for part in parts}
            report(**case, who=name, device=args.device, threads=torch.get_num_threads(),
                   tokens=rounds[0]["work"], seconds=spread([r["seconds"] for r in rounds]),
                   tokens_per_s=spread(rates(rounds)),
                   peak_mib=round(max(r["peak"] for r in rounds)),
                   **{part: round(seconds, 4) for part, seconds in medians.items()})
    if trl:
        report(**case, ours_over_trl=ratio(ours, trl))


def measure(step, device):
    before, t0 = reset_peak(device), clock(device)
    parts = step()
    return {"seconds": clock(device) - t0, "peak": peak(device) - before, **parts}


def reward(ids):
    """The share of even tokens: cheap, and not the same for a whole group."""
    return sum(token % 2 == 0 for token in ids) / len(ids)


def our_step(args, model, prompts, new_tokens):
    """A function that does one step and returns its tokens and the seconds of its parts."""
    cfg = grpo.GRPOConfig(prompts_per_step=args.prompts, group_size=args.group, kl_coef=KL,
                          max_new_tokens=new_tokens, micro_tokens=args.micro_tokens)
    G = cfg.group_size
    ref = copy.deepcopy(model).requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)]
    generator, seconds, token_logps = torch.Generator().manual_seed(2), {}, grpo.token_logps

    def timed(*args_, **options):
        t0 = clock(args.device)
        logps = token_logps(*args_, **options)
        seconds["logprobs"] += clock(args.device) - t0
        return logps

    def rollout():
        completions = grpo.generate(model, prompts, G, new_tokens, cfg.temperature, (END,),
                                    generator)
        samples = [grpo.Sample(**vars(c), reward=reward(c.ids)) for c in completions]
        rewards = torch.tensor([s.reward for s in samples]).view(-1, G)
        adv = grpo.group_advantages(rewards, cfg.adv_norm).flatten().tolist()
        for sample, value in zip(samples, adv, strict=True):
            sample.adv = value
        return [samples[i:i + G] for i in range(0, len(samples), G)]

    def step():
        seconds["logprobs"] = 0.0
        t0 = clock(args.device)
        groups = rollout()
        t1 = clock(args.device)
        grpo.token_logps = timed
        grpo.update_policy(model, ref, optimizers, groups, cfg, generator)
        grpo.token_logps = token_logps
        update = clock(args.device) - t1 - seconds["logprobs"]
        work = sum(len(sample.ids) for group in groups for sample in group)
        return {"work": work, "sampling": t1 - t0, "update": update, **seconds}

    return step


def trl_beside(args, theirs, prompts, new_tokens, results, between):
    """Runs TRL's trainer, calling `between` after each of its steps. False if trl is not
    installed."""
    try:
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return False
    vocab = {f"t{i}": i for i in range(theirs.config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{END}",
                                        pad_token=f"t{END}", padding_side="left")
    now = {}

    def reward_trl(completion_ids, **_):
        now["work"] = sum(map(len, completion_ids))
        return [reward(ids) for ids in completion_ids]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now.update(before=reset_peak(args.device), t0=clock(args.device))

        def on_step_end(self, *_, **__):
            seconds = clock(args.device) - now["t0"]
            used = peak(args.device) - now["before"]
            results.append({"seconds": seconds, "peak": used, "work": now["work"]})
            between()

    texts = [" ".join(f"t{i}" for i in prompt) for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:  # the trainer loads its reference from a folder
        theirs.save_pretrained(folder)
        theirs.config._name_or_path = folder
        settings = GRPOConfig(
            folder, per_device_train_batch_size=args.prompts * args.group,
            num_generations=args.group, steps_per_generation=1, max_completion_length=new_tokens,
            temperature=1.0, top_p=1.0, top_k=0, beta=KL, loss_type="grpo", learning_rate=LR,
            weight_decay=0.0, lr_scheduler_type="constant", max_steps=args.rounds + 1,
            use_cpu=args.device == "cpu", bf16=False, gradient_checkpointing=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
        trainer = GRPOTrainer(theirs, reward_trl, processing_class=tokenizer, args=settings,
                              train_dataset=Dataset.from_dict({"prompt": texts}),
                              callbacks=[Clock()])
        trainer.ref_model.lm_head.bias = theirs.lm_head.bias
        trainer.train()
    return True


if __name__ == "__main__":
    main()
