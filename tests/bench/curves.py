"""Learning curves of several runs as one picture, thin lines for the runs and a thick one for their mean.

    pip install matplotlib
    python tests/bench/curves.py out1 out2 out3 --stage=zero --to=assets/zero.png
"""
import argparse
import json
import os

import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

PANELS = [("accuracy", "accuracy of samples"), ("length", "tokens a completion"), ("format", "share with the tags"), ("kl", "KL to the base, a token")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="out_dirs of the runs")
    parser.add_argument("--stage", default="zero")
    parser.add_argument("--to", default="assets/zero.png")
    args = parser.parse_args()
    runs = []
    for folder in args.folders:
        with open(os.path.join(folder, args.stage, "metrics.jsonl")) as f:
            runs.append([json.loads(line) for line in f])
    steps = range(1, min(map(len, runs)) + 1)
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(3.1 * len(PANELS), 2.7))
    for axis, (key, title) in zip(axes, PANELS):
        curves = [[m[key] for m in run[:len(steps)]] for run in runs]
        for curve in curves:
            axis.plot(steps, curve, color="tab:blue", linewidth=0.7, alpha=0.5)
        axis.plot(steps, [sum(values) / len(values) for values in zip(*curves)], color="tab:blue", linewidth=2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("GRPO step", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(args.to, dpi=110)


if __name__ == "__main__":
    main()
