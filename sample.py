"""Ask a checkpoint: prints problems with the model's thinking, its answer and what the rewards make of it.

    python sample.py                                              # held-out problems, out/zero
    python sample.py --numbers=3,7,2 --target=20 --n=4            # your own problem, four tries
    python sample.py --ckpt=out/base/ckpt.pt --vs=out/zero/ckpt.pt # the same problems side by side, before and after RL
    python sample.py --ckpt=out/r1/ckpt.pt --task=chat            # or unsafe, arithmetic, logic, code
"""
import argparse
import shutil
import sys
import unicodedata
from itertools import zip_longest

import data
import rewards
import torch
from model import BadInput
from train import open_checkpoint


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (python {self.prog} --help lists the flags)\n")


def parse(argv):
    parser = Parser(prog="sample.py", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="out/zero/ckpt.pt", help="checkpoint (default %(default)s)")
    parser.add_argument("--vs", help="a second checkpoint, to show beside the first")
    parser.add_argument("--task", choices=[task for task in data.TASKS if task != "file"], help="kind of held-out problems (default: what the checkpoint was trained on)")
    parser.add_argument("--numbers", help="your own countdown problem: numbers, as 3,7,2")
    parser.add_argument("--target", type=int, help="... and what to make of them")
    parser.add_argument("--n", type=int, default=4, help="problems, or tries at your own one (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, help="longest completion, in tokens (default: as in training)")
    parser.add_argument("--seed", type=int, default=1, help="of the samples (default %(default)s)")
    args = parser.parse_args(argv)
    if (args.numbers is None) != (args.target is None):
        parser.error("--numbers and --target go together")
    if args.n < 1 or args.max_new_tokens is not None and args.max_new_tokens < 1 or args.temperature < 0:
        parser.error("--n and --max_new_tokens must be at least 1, --temperature at least 0")
    return args


def own_problem(numbers, target):
    try:
        numbers = tuple(int(n) for n in numbers.split(","))
    except ValueError:
        raise BadInput(f"--numbers={numbers} is not a list of whole numbers such as 3,7,2") from None
    return data.countdown_problem(numbers, target)


def render(problem, completion, names=tuple(rewards.REWARDS)):
    """One completion as a person would read it, with the scores of the named rewards: (style, line) pairs. What has no tags is shown as it is;
    control characters, which a model may say and a terminal would obey, are shown as U+FFFD."""
    completion = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in completion)
    thinking, answer = rewards.split_completion(completion)
    right = rewards.verify(problem, completion)[1]
    lines = []
    if thinking is None and answer is None:
        lines += [("plain", line) for line in (completion.strip() or "(nothing)").split("\n")]
    else:
        lines += [("plain", "thinking")] + [("dim", "    " + line) for line in ((thinking or "").strip() or "(none)").split("\n")]
        lines += [("plain", "answer"), ("right" if right else "wrong", f"    {answer or '(none)'}")]
    return lines + [("plain", "scores"), ("plain", "    " + "  ".join(f"{name} {rewards.REWARDS[name]([problem], [completion])[0]:.3g}" for name in names))]


STYLES = {"plain": "", "dim": "\033[2m", "right": "\033[1;32m", "wrong": "\033[1;31m"}


def paint(style, text):
    return f"{STYLES[style]}{text}\033[0m" if STYLES[style] and sys.stdout.isatty() else text


def fit(text, width):
    """The text cut or padded to so many columns of a terminal, where a Chinese sign takes two."""
    out, used = "", 0
    for c in text:
        wide = 0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        if used + wide > width:
            break
        out, used = out + c, used + wide
    return out + " " * (width - used)


def sample(args, ckpt):
    """(problems, what `render` shows of a completion of each) for the problems that the flags ask for."""
    own = own_problem(args.numbers, args.target) if args.numbers else None
    _, model, tok, cfg = open_checkpoint({"ckpt": ckpt, **({"task": args.task, "data": ""} if args.task else {})})
    problems = [own] * args.n if own else data.eval_problems(cfg.data, args.n)
    out = model.generate([data.prompt_ids(p, tok, cfg.data) for p in problems], max_new_tokens=args.max_new_tokens or cfg.grpo.max_new_tokens,
                         temperature=args.temperature, stop_ids=tok.stop_ids, generator=torch.Generator().manual_seed(args.seed), pad_id=tok.pad_id)
    names = [name for name in rewards.REWARDS if getattr(cfg.rewards, f"w_{name}")]  # those that it was trained with
    return problems, [render(p, data.completion_text(ids, tok, cfg.data), names) for p, ids in zip(problems, out.completions())]


def main(argv):
    args = parse(argv)
    problems, shown = sample(args, args.ckpt)
    if not args.vs:
        for problem, lines in zip(problems, shown):
            print("\n".join([f"--- {problem.question}"] + [paint(*line) for line in lines] + [""]))
        return
    others, shown_vs = sample(args, args.vs)
    if problems != others:
        raise BadInput(f"{args.ckpt} and {args.vs} were trained on different problems: set --task, or --numbers and --target")
    width = max(30, shutil.get_terminal_size((120, 0)).columns // 2 - 2)
    print(fit(args.ckpt[-width:], width) + "  " + args.vs[-width:])
    for problem, left, right in zip(problems, shown, shown_vs):
        print(f"--- {problem.question}")
        for a, b in zip_longest(left, right, fillvalue=("plain", "")):
            print((paint(a[0], fit(a[1], width)) + "  " + paint(*b)).rstrip())
        print()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BadInput as e:
        print(f"sample.py: {e}", file=sys.stderr)
        sys.exit(2)
