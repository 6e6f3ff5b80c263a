"""How the cost of a GRPO step grows: twice the prompts, the group or the length, time and peak
memory over those of the step at its ordinary size, alternating; one JSON line a case.

    taskset -c 0 python tests/bench/growth.py --threads=1
"""
import argparse

from common import alternate, arguments, build, end_after, random_prompts, report, spread
from step import our_step

ORDINARY = {"prompts": 16, "group": 8, "new": 64}
CASES = {"ordinary": {}, "twice the prompts": {"prompts": 32}, "twice the group": {"group": 16},
         "twice the length": {"new": 128}}


def contestant(args, change):
    """A function that does one step of the ordinary size with `change` and returns its tokens."""
    size = argparse.Namespace(**{**vars(args), **ORDINARY, **change})
    model = end_after(build(args.shape, device=args.device), None)
    step = our_step(size, model, random_prompts(size.prompts, model.cfg).tolist(), size.new)
    return lambda: step()["work"]


def main():
    args = arguments(__doc__, 5, shape=("tiny", "of the model"),
                     micro_tokens=(2048, "tokens in a forward/backward pass"))
    contestants = {name: contestant(args, change) for name, change in CASES.items()}
    results = alternate(contestants, args.rounds, args.device)
    for name, rounds in results.items():
        pairs = zip(rounds, results["ordinary"], strict=True)
        report(bench="growth", case=name, tokens=rounds[0]["work"],
               seconds=spread([r["seconds"] for r in rounds]),
               times_the_ordinary=spread([a["seconds"] / b["seconds"] for a, b in pairs]),
               peak_mib=spread([r["peak"] for r in rounds]))


if __name__ == "__main__":
    main()
