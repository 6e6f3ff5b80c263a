"""Ask a checkpoint: prints problems with the model's thinking, its answer and what the rewards make of it.

    python sample.py                                              # held-out problems, out/zero
    python sample.py --numbers=3,7,2 --target=20 --n=4            # your own problem, four tries
    python sample.py --ckpt=out/base/ckpt.pt --task=arithmetic
"""
import argparse
import sys

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
    parser.add_argument("--task", choices=["countdown", "arithmetic"], help="kind of held-out problems (default: what the checkpoint was trained on)")
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


def show(problem, completion):
    """One completion as a person would read it; what has no tags is shown as it is."""
    thinking, answer = rewards.split_completion(completion)
    print(f"--- {problem.question}")
    if thinking is None and answer is None:
        print(completion.strip() or "(nothing)")
    else:
        print("thinking\n    " + (thinking or "(none)").strip().replace("\n", "\n    "))
        print(f"answer\n    {answer if answer else '(none)'}")
    scores = {name: reward([problem], [completion])[0] for name, reward in rewards.REWARDS.items()}
    print("scores\n    " + "  ".join(f"{name} {value:g}" for name, value in scores.items()) + "\n")


def main(argv):
    args = parse(argv)
    own = own_problem(args.numbers, args.target) if args.numbers else None
    _, model, tok, cfg = open_checkpoint({"ckpt": args.ckpt, **({"task": args.task, "data": ""} if args.task else {})})
    max_new_tokens, cfg = args.max_new_tokens or cfg.grpo.max_new_tokens, cfg.data
    if own:
        problems, group_size = [own], args.n
    else:
        problems, group_size = data.eval_problems(cfg, args.n), 1
    out = model.generate([data.prompt_ids(p, tok, cfg) for p in problems], group_size, max_new_tokens=max_new_tokens, temperature=args.temperature,
                         stop_ids=tok.stop_ids, generator=torch.Generator().manual_seed(args.seed), pad_id=tok.pad_id)
    for i, ids in enumerate(out.completions()):
        show(problems[i // group_size], data.completion_text(ids, tok, cfg))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BadInput as e:
        print(f"sample.py: {e}", file=sys.stderr)
        sys.exit(2)
