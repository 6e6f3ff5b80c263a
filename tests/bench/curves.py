"""Learning curves of several runs as one picture: thin lines for the runs, a thick one for their
mean. Of a run on several tasks, the curves of each task.

    pip install matplotlib
    python tests/bench/curves.py out1 out2 out3 --to=assets/zero.png
    python tests/bench/curves.py out-all --to=assets/all.png
"""
import argparse
import json
import os

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

PANELS = {"reward/accuracy": "accuracy of samples", "length": "tokens per completion",
          "reward/format": "share with the tags", "kl": "KL to the base, per token"}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="out_dirs of the runs")
    parser.add_argument("--stage", default="zero", help="an RL stage (default %(default)s)")
    parser.add_argument("--to", default="assets/zero.png", help="(default %(default)s)")
    args = parser.parse_args()
    runs = []
    for folder in args.folders:
        with open(os.path.join(folder, args.stage, "metrics.jsonl"), encoding="utf-8") as f:
            runs.append([json.loads(line) for line in f])
    tasks = sorted(key.split("/")[0] for key in runs[0][0] if key.endswith("/length"))
    figure = draw_tasks(runs[0], tasks) if tasks else draw_runs(runs)
    figure.tight_layout()
    figure.savefig(args.to, dpi=110)


def draw_runs(runs):
    n = min(map(len, runs))  # steps that all runs have
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(3.1 * len(PANELS), 2.7))
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        draw(axis, [[m[key] for m in run[:n]] for run in runs])
        axis.set_title(title, fontsize=10)
    return figure


def draw_tasks(run, tasks):
    """Accuracy and length of each task, over ten steps at a time: a step has few problems of it."""
    figure, axes = pyplot.subplots(1, 2, figsize=(8.5, 3))
    titles = {"accuracy": "accuracy of samples", "length": "tokens per completion"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for task in tasks:
            steps, means = [], []
            for i in range(10, len(run) + 1):
                found = [m.get(f"{task}/{key}") for m in run[i - 10:i]]
                found = [x for x in found if x is not None]  # no step need have all tasks
                steps.append(i)
                means.append(sum(found) / len(found) if found else float("nan"))
            axis.plot(steps, means, linewidth=2, label=task)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("GRPO step (mean of the last ten)", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=9, frameon=False)
    return figure


def draw(axis, curves):
    """Each curve, and the mean of all."""
    steps = range(1, len(curves[0]) + 1)
    for curve in curves:
        axis.plot(steps, curve, color="tab:blue", linewidth=0.7, alpha=0.5)
    mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    axis.plot(steps, mean, color="tab:blue", linewidth=2)
    axis.set_xlabel("GRPO step", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
