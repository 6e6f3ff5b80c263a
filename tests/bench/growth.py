"""How the cost of a GRPO step grows: twice the prompts, the group or the length, time and peak memory over those of the step
at its ordinary size, alternating; one JSON line a case.

    taskset -c 0 python tests/bench/growth.py --threads=1
"""
import argparse

import torch

from common import alternate, arguments, build, end_after, report, spread
from step import our_step

CASES = {"ordinary": {}, "twice the prompts": {"prompts": 32}, "twice the group": {"group": 16}, "twice the length": {"new": 128}}


def main():
    args = arguments(__doc__, 5, shape=("tiny", "of the model"), micro_tokens=(2048, "tokens in a forward/backward pass"))
    contestants = {}
    for name, change in CASES.items():
        size = argparse.Namespace(**{**vars(args), "prompts": 16, "group": 8, "new": 64, **change})
        model = end_after(build(args.shape, device=args.device), None)
        prompts = torch.randint(1, model.cfg.vocab_size, (size.prompts, 32), generator=torch.Generator().manual_seed(1)).tolist()
        step = our_step(size, model, prompts, size.new)
        contestants[name] = lambda step=step: step()["work"]
    results = alternate(contestants, args.rounds, args.device)
    ordinary = results["ordinary"]
    for name, rounds in results.items():
        report(bench="growth", case=name, tokens=rounds[0]["work"], seconds=spread([r["seconds"] for r in rounds]),
               times_the_ordinary=spread([a["seconds"] / b["seconds"] for a, b in zip(rounds, ordinary)]),
               peak_mib=spread([r["peak"] for r in rounds]))


if __name__ == "__main__":
    main()
