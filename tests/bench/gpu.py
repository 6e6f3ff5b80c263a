"""One command for whoever has a GPU: is it right, and how fast is it? One JSON line a case, what is
right first; the exit code is 1 if something is not.

    python tests/bench/gpu.py                  # minutes; --toy=0 leaves out the toy's whole run
    python tests/bench/gpu.py --device=cpu     # the same with tiny shapes, to see that it works

Decoding has to read all weights and the cache at each step: its speed is told as a share of the
bandwidth that a large copy reaches. Peak memory stands beside what train.py's memory line foretold.
"""
import copy
import subprocess
import sys
import tempfile
import time

import torch
from common import (
    PROMPT_LEN,
    ROOT,
    arguments,
    build,
    clock,
    copy_rate,
    end_after,
    matrix_params,
    peak,
    random_prompts,
    report,
    reset_peak,
)
from step import our_step

from model import generate, token_logps
from train import Config, memory_plan

TOY = ["--n_layer=1", "--base_steps=20", "--base_rows=2", "--rl_steps=2", "--prompts_per_step=2",
       "--group_size=4", "--max_new_tokens=24", "--eval_problems=5", "--eval_samples=2"]


def main():
    args = arguments(__doc__, 3, device=("cuda", "cuda or cpu"), toy=(1, "1: run train.py as well"),
                     shapes=("", "of common.py; none = qwen0.5b,qwen1.5b, on a CPU tiny"),
                     prompts=(16, "prompts"), group=(8, "samples of each"),
                     new=(256, "tokens of each; on a CPU 32"),
                     micro_tokens=(4096, "as in train.py"))
    on_gpu = args.device != "cpu"
    if not on_gpu:
        args.new, args.group = min(args.new, 32), min(args.group, 2)
    name = torch.cuda.get_device_name(args.device) if on_gpu else "CPU"
    report(bench="gpu", device=name, torch=torch.__version__)
    right = is_right(args, on_gpu)
    bandwidth = copy_rate(args.device, 2**28 if on_gpu else 2**22)
    for shape in (args.shapes or ("qwen0.5b,qwen1.5b" if on_gpu else "tiny")).split(","):
        decode(args, shape, bandwidth, on_gpu)
        step(args, shape, on_gpu)
    if args.toy:
        toy(args, [] if on_gpu else TOY)
    return right


def is_right(args, on_gpu):
    """Whether graphs change no sample, and sampled log-probs are those of one forward pass."""
    model = end_after(build("tiny", device=args.device), 20)
    prompts = random_prompts(4, model.cfg).tolist()
    prompts = [prompts[0][:5], prompts[1], prompts[2][:1], prompts[3][:9]]

    def sampled(model, static):
        return generate(model, prompts, 8, 200, stop_ids=(0,), static=static,
                        generator=torch.Generator().manual_seed(2))

    def off(model, completions):
        """Largest and mean distance of sampled log-probs from recomputed ones in fp32."""
        gaps = []
        for c in completions:
            ids = torch.tensor([c.prompt + c.ids], device=args.device)
            with torch.no_grad():
                again = token_logps(model, ids)[0, len(c.prompt) - 1:]
            gaps.append((again.cpu() - c.logps).abs())
        return torch.cat(gaps).max().item(), torch.cat(gaps).mean().item()

    plain, static = sampled(model, False), sampled(model, True)
    same = sum(a.ids == b.ids for a, b in zip(plain, static, strict=True))
    largest, _ = off(model, static)
    _, mean16 = off(model, sampled(copy.deepcopy(model).bfloat16(), on_gpu))
    right = same == len(plain) and largest < 1e-3 and mean16 < 0.05
    report(case="right", ok=right, same_samples=f"{same}/{len(plain)}", logp_off=largest,
           logp_off_bfloat16=mean16)
    return right


def decode(args, shape, bandwidth, on_gpu):
    """Tokens a second with all rows to the end, in bfloat16, captures and prefill included."""
    model = end_after(build(shape, torch.bfloat16, args.device), None)
    cfg, rows = model.cfg, args.prompts * args.group
    prompts, generator = random_prompts(args.prompts, cfg).tolist(), torch.Generator()
    rates = []
    for _ in range(args.rounds + 1):
        t0 = clock(args.device)
        generate(model, prompts, args.group, args.new, generator=generator)
        rates.append(rows * args.new / (clock(args.device) - t0))
    cache = rows * (PROMPT_LEN + args.new / 2) * 2 * cfg.n_layer * cfg.n_kv_head * cfg.d_head
    best = max(rates[1:])
    share = best / rows * 2 * (matrix_params(cfg) + cache) / bandwidth
    report(case="decode", shape=shape, rows=rows, tokens_per_s=round(best),
           gb_per_s=round(bandwidth / 1e9), share_of_bandwidth=round(share, 3))


def step(args, shape, on_gpu):
    """A GRPO step's phases in seconds, and its peak memory beside what was foretold."""
    device = torch.device(args.device)
    before = reset_peak(args.device)
    model = build(shape, device=args.device)
    model.autocast = on_gpu
    prompts = random_prompts(args.prompts, model.cfg).tolist()
    ours = our_step(args, end_after(model, None), prompts, args.new)
    ours()  # to warm up
    t0 = clock(args.device)
    parts = ours()
    seconds = clock(args.device) - t0
    settings = {"prompts_per_step": args.prompts, "group_size": args.group, "eval_samples": 1,
                "max_new_tokens": args.new, "micro_tokens": args.micro_tokens, "device": "cpu",
                "sample_dtype": "float32", "rl_optimizer": "adamw"}
    always, moments = memory_plan(Config.of({**vars(model.cfg), **settings}), PROMPT_LEN, device)
    always.pop("torch")  # what the library itself takes is not among the tensors counted here
    report(case="step", shape=shape, tokens=parts.pop("work"), seconds=round(seconds, 3),
           **{name: round(value, 3) for name, value in parts.items()},
           peak_gib=round((peak(args.device) - before) / 1024, 2),
           foretold_gib=round((sum(always.values()) + max(moments.values())) / 2**30, 2))


def toy(args, flags):
    """`python train.py` from nothing to its table."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "train.py", f"--device={args.device}", f"--out_dir={folder}"]
        t0 = time.time()
        done = subprocess.run([*argv, *flags], cwd=ROOT, capture_output=True, encoding="utf-8",
                              errors="replace")
        rows = [line for line in done.stdout.splitlines() if line.startswith(("base ", "zero "))]
        report(case="toy", ok=not done.returncode, seconds=round(time.time() - t0), table=rows[:2],
               error=done.stderr[-300:] if done.returncode else "")


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
