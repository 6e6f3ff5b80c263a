"""The pipeline as a picture: every stage of train.py's table with what it starts from (a solid
arrow: its weights) and what it learns from (a dashed one: samples or scores). The README's drawing.

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

BOXES = {  # stage: (column, row, what it does)
    "base": (0, 1, "next token,\ntoy corpus"),
    "zero": (1, 2, "GRPO: accuracy\n+ format"),
    "zero_emoji": (0, 2, "GRPO: as zero,\n+ emoji"),
    "dev1": (2, 1, "SFT: zero's most\nreadable traces"),
    "dev2": (3, 1, "GRPO: + one\nlanguage"),
    "dev2_free": (3, 2, "GRPO: without the\nlanguage reward"),
    "dev3": (4, 1, "SFT: dev2's traces\n+ general replies"),
    "reward_model": (5, 2, "Bradley–Terry\non preferences"),
    "r1": (6, 1, "GRPO: rules,\npreference, harmless"),
    "small_base": (4, 0, "next token,\n0.1 M parameters"),
    "small_zero": (5, -0.8, "GRPO: accuracy\n+ format"),
    "distill": (6, 0, "SFT: r1's\nsamples"),
}
FILLS = {"base": "#dbe9f6", "rl": "#fbe3cf", "sft": "#dff0da",
         "reward_model": "#e6dcf2"}  # by name, or else by kind
W, H = 1.34, 0.62  # of a box


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default="assets/pipeline.png", help="(default %(default)s)")
    args = parser.parse_args()
    figure, axis = pyplot.subplots(figsize=(13, 4.2))
    for name, stage in STAGES.items():
        if name not in BOXES:  # `sft` and `r1_hacked`: other ways to train what is drawn
            continue
        draw_box(axis, name, FILLS.get(name, FILLS[stage.kind]))
        draw_arrow(axis, stage.parent, name, "#555", "-")
        if stage.source != stage.parent:
            draw_arrow(axis, stage.source, name, "#b5651d", (0, (4, 3)))
    legend = "solid: starts from its weights     dashed: learns from its samples or scores"
    axis.text(-0.7, 2.85, legend, fontsize=9, color="#444")
    axis.set_xlim(-0.8, 11.3)
    axis.set_ylim(-1.3, 3.0)
    axis.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(args.to, dpi=110)


def centre(name):
    column, row, _ = BOXES[name]
    return 1.75 * column, 1.05 * row


def draw_box(axis, name, fill):
    x, y = centre(name)
    middle = {"ha": "center", "va": "center"}
    axis.add_patch(pyplot.Rectangle((x - W / 2, y - H / 2), W, H, facecolor=fill, edgecolor="#444",
                                    linewidth=1))
    axis.text(x, y + 0.17, name, fontsize=11, fontweight="bold", family="monospace", **middle)
    axis.text(x, y - 0.1, BOXES[name][2], fontsize=8.5, linespacing=1.15, **middle)


def draw_arrow(axis, start, end, colour, dashes):
    """From the box of one stage, or of none, to that of another."""
    if start is None:
        return
    a, b = centre(start), centre(end)
    across = abs(b[0] - a[0]) > abs(b[1] - a[1])
    round_others = a[1] == b[1] > 0 and abs(b[0] - a[0]) > 2  # below the boxes between the two
    if round_others:
        tail, head, bend = (a[0], a[1] - H / 2), (b[0], b[1] - H / 2), 0.12
    elif across:
        sign, bend = (1 if b[0] > a[0] else -1), 0
        tail, head = (a[0] + sign * W / 2, a[1]), (b[0] - sign * W / 2, b[1])
    else:
        sign, bend = (1 if b[1] > a[1] else -1), 0
        tail, head = (a[0], a[1] + sign * H / 2), (b[0], b[1] - sign * H / 2)
    style = {"arrowstyle": "-|>", "linestyle": dashes, "color": colour, "linewidth": 1.2,
             "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", head, tail, arrowprops=style)


if __name__ == "__main__":
    main()
