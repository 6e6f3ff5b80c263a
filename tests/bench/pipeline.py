"""The pipeline as a picture: every stage of train.py's table with what it starts from (a solid arrow: its weights) and what it learns from
(a dashed one: samples or scores). The README's drawing.

    pip install matplotlib
    python tests/bench/pipeline.py --to=assets/pipeline.png
"""
import argparse
import os
import sys

import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from train import STAGES  # noqa: E402

WHERE = {  # column, row
    "base": (0, 1), "zero": (1, 2), "zero_emoji": (0, 2), "dev1": (2, 1), "dev2": (3, 1), "dev2_free": (3, 2), "dev3": (4, 1), "reward_model": (5, 2), "r1": (6, 1),
    "small_base": (4, 0), "small_zero": (5, -0.8), "distill": (6, 0)}
WHAT = {
    "base": "next token,\ntoy corpus", "zero": "GRPO: accuracy\n+ format", "zero_emoji": "the same\n+ emoji", "dev1": "SFT: zero's most\nreadable traces", "dev2": "GRPO: + one\nlanguage",
    "dev2_free": "the same\nwithout that", "dev3": "SFT: dev2's traces\n+ general replies", "reward_model": "Bradley–Terry\non preferences", "r1": "GRPO: rules,\npreference, harmless",
    "small_base": "next token,\n0.1 M parameters", "small_zero": "GRPO: accuracy\n+ format", "distill": "SFT: r1's\nsamples"}
COLOURS = {"train_base": "#dbe9f6", "train_rl": "#fbe3cf", "train_reward_model": "#e6dcf2"}
W, H = 1.34, 0.62


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default="assets/pipeline.png")
    args = parser.parse_args()
    figure, axis = pyplot.subplots(figsize=(13, 4.2))
    at = {name: (1.75 * x, 1.05 * y) for name, (x, y) in WHERE.items()}
    for name, stage in STAGES.items():
        x, y = at[name]
        axis.add_patch(pyplot.Rectangle((x - W / 2, y - H / 2), W, H, facecolor=COLOURS.get(stage.train.__name__, "#dff0da"), edgecolor="#444", linewidth=1))
        axis.text(x, y + 0.17, name, ha="center", va="center", fontsize=11, fontweight="bold", family="monospace")
        axis.text(x, y - 0.1, WHAT[name], ha="center", va="center", fontsize=8.5, linespacing=1.15)
        for other, dashes in ((stage.parent, "-"), (stage.source, (0, (4, 3)))):
            if other and not (other == stage.parent and dashes != "-"):
                a, b = at[other], (x, y)
                far = a[1] == b[1] > 0 and abs(b[0] - a[0]) > 2  # round what stands between
                across = abs(b[0] - a[0]) > abs(b[1] - a[1]) and not far
                side = lambda p, s: (p[0] + s * W / 2, p[1]) if across else (p[0], p[1] + s * H / 2)
                sign = -1 if far else 1 if (b > a if across else b[1] > a[1]) else -1
                start, end = side(a, sign), side(b, sign if far else -sign)
                bend = 0.12 if far else 0
                axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "linestyle": dashes, "color": "#555" if dashes == "-" else "#b5651d", "linewidth": 1.2,
                                                          "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0})
    axis.text(-0.7, 2.85, "solid: starts from its weights     dashed: learns from its samples or scores", fontsize=9, color="#444")
    axis.set_xlim(-0.8, 11.3)
    axis.set_ylim(-1.3, 3.0)
    axis.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(args.to, dpi=110)


if __name__ == "__main__":
    main()
