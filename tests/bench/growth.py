"""How the cost of a GRPO step grows: twice the prompts, the group or the length, time and peak memory over those of the step
at its ordinary size, alternating; one JSON line a case.

    taskset -c 0 python tests/bench/growth.py --threads=1
"""
import argparse

import torch

from common import alternate, build, end_after, report, spread
from step import our_step

CASES = {"ordinary": {}, "twice the prompts": {"prompts": 32}, "twice the group": {"group": 16}, "twice the length": {"new": 128}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--micro_tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 = one a core")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
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
