"""What asks a model and takes no gradient: sampling, evaluation, rejection sampling. As a script it
prints problems with the model's thinking, its answer and what the rewards make of it.

    python sample.py                                                # held-out problems, out/zero
    python sample.py --numbers=3,7,2 --target=20 --n=4              # your own problem, four tries
    python sample.py --ckpt=out/base/ckpt.pt --vs=out/zero/ckpt.pt  # side by side: before, after RL
    python sample.py --ckpt=out/r1/ckpt.pt --task=chat              # or unsafe, arithmetic, ...
"""
import argparse
import json
import math
import os
import shutil
import sys
import unicodedata
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest

import torch
from tqdm import tqdm

import data
import rewards
from data import DataConfig
from grpo import GRPOConfig
from model import (
    UserError,
    atomic_write,
    generate,
    generators,
    load_checkpoint,
    load_model,
    model_of,
    opt,
    pick,
    read_json,
    sampling_copy,
    validate,
)
from rewards import RewardConfig, RewardModel

# ------------------------------------------------------------------------------------------------
# Settings, the command line, and opening a checkpoint


@dataclass
class SampleConfig:
    out_dir: str = opt("out", "folder that everything is written to")
    seed: int = opt(1, "every random choice follows from it", least=0, most=2**63 - 1)
    device: str = opt("auto", "cpu, cuda, cuda:1, or auto: cuda where there is one")
    threads: int = opt(0, "CPU threads; 0 = one per core", least=0)
    init_from: str = opt("", "Hugging Face folder whose model replaces the toy base")
    sample_dtype: str = opt("auto", "weights that sampling runs with; auto: bfloat16 on CUDA",
                            choices=("auto", "float32", "bfloat16"))
    eval_samples: int = opt(16, "completions per held-out problem in an evaluation", least=1)
    ckpt: str = opt("", "checkpoint for `eval` and `export`; none = out_dir/zero/ckpt.pt")

    def rules(self):
        """Raises UserError if there is no such device."""
        find_device(self.device)


@dataclass
class Config:
    """All settings, by the file whose part they are."""
    data: DataConfig = field(default_factory=DataConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    @classmethod
    def of(cls, settings):
        """From {name: value}; names that belong to no group are left out."""
        return cls(**{f.name: pick(f.default_factory, settings) for f in fields(cls)})

    def settings(self):
        """{name: value} of all groups."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}

    def validate(self):
        """Raises UserError naming the first setting that is out of bounds."""
        for f in fields(self):
            validate(getattr(self, f.name))


def find_device(name):
    """The torch device that --device names. Raises UserError if there is none."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or index and not (kind == "cuda" and index.isdecimal()):
        raise UserError(f"device={name!r} is not auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= cuda:
        raise UserError(f"device={name!r}, but torch finds {cuda} GPUs; --device=cpu always works")
    return torch.device(name)


def use_bf16(setting, device):
    """Whether --sample_dtype or --autocast means bfloat16 on this device."""
    return setting in ("on", "bfloat16") or setting == "auto" and device.type == "cuda"


def sampling_dtype(cfg, device):
    return torch.bfloat16 if use_bf16(cfg.sample_dtype, device) else torch.float32


class Parser(argparse.ArgumentParser):
    """One flag per setting. Only flags that were given appear in what parse_args returns."""

    def __init__(self, prog, doc, groups, **options):
        def formatter(prog):
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=110)
        super().__init__(prog=prog, description=doc, allow_abbrev=False, formatter_class=formatter,
                         argument_default=argparse.SUPPRESS, **options)
        for title, group in groups.items():
            section = self.add_argument_group(title)
            for f in fields(group):
                section.add_argument(f"--{f.name}", type=boolean if f.type is bool else f.type,
                                     metavar=f.type.__name__, help=describe(f))

    def error(self, message):
        """argparse would print all of the usage first; the one line that matters is enough."""
        self.exit(2, f"{self.prog}: {message} (python {self.prog} --help lists the settings)\n")


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1")


def describe(f):
    """A setting's help: what it is, its default, its bounds."""
    notes = [f"default {f.default if f.default != '' else 'none'}"]
    for name, word in (("least", "at least"), ("above", "above"), ("most", "at most")):
        if f.metadata[name] is not None:
            notes.append(f"{word} {f.metadata[name]}")
    if f.metadata["choices"]:
        notes.append("one of " + ", ".join(f.metadata["choices"]))
    return f"{f.metadata['help']} ({'; '.join(notes)})".replace("%", "%%")


@contextmanager
def one_line_errors(prog, folder=""):
    """What a user can fix ends the script in one line, with exit code 2; Ctrl-C with 130."""
    try:
        yield
    except UserError as e:
        line, code = e, 2
    except OSError as e:
        line = f"{e.filename or folder}: {e.strerror or e}; the last checkpoint is unchanged"
        code = 2
    except KeyboardInterrupt as e:
        line, code = f"stopped; {e or 'what is saved stays'}. The same command resumes it", 130
    else:
        return
    print(f"{prog}: {line}", file=sys.stderr)
    sys.exit(code)


def open_checkpoint(given, path=""):
    """(path, model for sampling, tokenizer, Config) of a checkpoint, by default given["ckpt"],
    with the settings that it was trained with unless others are given."""
    out_dir = given.get("out_dir", SampleConfig.out_dir)
    path = path or given.get("ckpt") or os.path.join(out_dir, "zero", "ckpt.pt")
    state = load_checkpoint(path)
    if state.get("stage") == "reward_model":
        raise UserError(f"{path} is a reward model: it judges answers and gives none")
    settings = {"device": "auto", "threads": 0}  # of this machine, not of the one it was trained on
    cfg = Config.of({**state.get("settings", {}), **settings, **given})
    cfg.validate()
    return path, model_of(state, path), data.load_tokenizer(cfg.sample.init_from), cfg


# ------------------------------------------------------------------------------------------------
# Sampling and evaluation


@dataclass
class Answer:
    """One completion as text."""
    problem: data.Problem
    text: str
    length: int      # in tokens
    truncated: bool


def sample_answers(model, tok, problems, k, cfg, temperature, generator, desc):
    """k completions of each problem -> Answers, in the problems' order."""
    found = []
    for i in tqdm(range(0, len(problems), 32), desc=desc, leave=False, disable=None):
        chunk = problems[i:i + 32]
        prompts = [data.prompt_ids(problem, tok, cfg.data) for problem in chunk]
        out = generate(model, prompts, k, cfg.grpo.max_new_tokens, temperature, tok.stop_ids,
                       generator)
        for j, completion in enumerate(out):
            text = data.completion_text(completion.ids, tok, cfg.data)
            found.append(Answer(chunk[j // k], text, len(completion.ids), completion.truncated))
    return found


def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them right, include a right one: unbiased (arXiv
    2107.03374). Needs k <= n."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(verdicts):
    """cons@k: is the most frequent answer right? `verdicts` are (canonical form or None, right) of
    k samples. Samples without an answer do not vote; of a tie the answer sampled first wins."""
    votes = Counter(form for form, _ in verdicts if form is not None)
    return bool(votes) and dict(verdicts)[max(votes, key=votes.get)]


def evaluate(model, tok, problems, k, cfg, temperature):
    """k completions of each problem -> (metrics, samples), samples being one dict per completion.
    The interval of pass@1 is the normal 95 % one over problems, whose k samples are not
    independent."""
    generator, samples = generators("evaluate")[1], []
    for a in sample_answers(model, tok, problems, k, cfg, temperature, generator, "evaluate"):
        form, right = rewards.verify(a.problem, a.text)
        thinking, answer = rewards.split_completion(a.text)
        samples.append({
            "task": a.problem.task, "prompt": data.prompt_text(a.problem, cfg.data),
            "completion": a.text, "answer": form, "right": right,
            "format": rewards.has_format(a.text),
            "one_language": rewards.one_language(a.problem, a.text),
            "emoji": rewards.emoji([a.problem], [a.text])[0], "length": a.length,
            "truncated": a.truncated, "retry_rate": rewards.retries(a.text),
            "thinks": bool((thinking or "").strip())})
        if a.problem.task in data.GENERAL:
            samples[-1]["gold_reward"] = rewards.gold_reward(a.problem, answer)
    groups = [samples[i:i + k] for i in range(0, len(samples), k)]
    right = torch.tensor([s["right"] for s in samples]).double().view(-1, k)  # (problems, k)
    mean, half = right.mean().item(), 1.0
    if len(groups) > 1:
        half = 1.96 * right.mean(dim=1).std().item() / len(groups) ** 0.5
    votes = [majority_vote([(s["answer"], s["right"]) for s in group]) for group in groups]
    chances = [pass_at_k(k, int(c), k) for c in right.sum(dim=1)]
    averaged = [key for key, value in samples[0].items()
                if isinstance(value, (bool, int, float)) and key != "right"]
    metrics = {
        "pass@1": mean, "pass@1_ci": [max(0.0, mean - half), min(1.0, mean + half)],
        f"pass@{k}": sum(chances) / len(groups), f"cons@{k}": sum(votes) / len(groups),
        **{key: sum(s[key] for s in samples) / len(samples) for key in averaged},
        "problems": len(problems), "samples": k, "temperature": temperature}
    return metrics, samples


def evaluate_tasks(model, tok, cfg, folder):
    """Sampled and greedy results on the held-out problems of cfg.data.task, into FOLDER/eval.json
    and samples.jsonl. A toy model is asked a tenth as many of every other task as well."""
    main, k = cfg.data.task, cfg.sample.eval_samples
    results, samples, others = read_results(folder), [], []
    if not (cfg.sample.init_from or cfg.data.data):
        others = [task for task in data.TASKS if task not in (main, "file")]
    for task in [main, *others]:
        n = cfg.data.eval_problems if task == main else max(1, cfg.data.eval_problems // 10)
        problems = data.eval_problems(cfg.data, n, task)
        results[task], found = evaluate(model, tok, problems, k, cfg, cfg.grpo.temperature)
        samples += found[:100 * k]
        if task == main:
            greedy, _ = evaluate(model, tok, problems, 1, cfg, 0.0)
            results[task]["pass@1_greedy"] = greedy["pass@1"]
    results |= win_rates(samples, tok, cfg.sample.out_dir)
    write_lines(os.path.join(folder, "samples.jsonl"), samples)
    write_json(os.path.join(folder, "eval.json"), results)  # last: it says that all is done
    return results[main]


def win_rates(samples, tok, out_dir):
    """How often an answer to a general request beats dev3's to the same one, ties counting half:
    by gold reward, and by the reward model, which may have been hacked where it says more. Nothing
    where one of the two is missing."""
    dev3 = os.path.join(out_dir, "dev3", "samples.jsonl")
    judge = os.path.join(out_dir, "reward_model", "ckpt.pt")
    mine = [s for s in samples if s["task"] in data.GENERAL]
    if not (mine and os.path.exists(dev3) and os.path.exists(judge)):
        return {}
    theirs = [s for s in read_lines(dev3) if s["task"] in data.GENERAL]
    if [s["prompt"] for s in mine] != [s["prompt"] for s in theirs]:
        return {}
    model = load_model(judge, cls=RewardModel)

    def rate(score):
        pairs = zip(score(mine), score(theirs), strict=True)
        return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(mine)

    def by_model(group):
        return model.score(tok, [s["prompt"] for s in group], [s["completion"] for s in group])

    def by_gold(group):
        return [s["gold_reward"] for s in group]

    return {"win_rate": {"gold": rate(by_gold), "reward_model": rate(by_model)}}


def rejection_sample(problems, texts, filters, rank=None):
    """Of the completions texts[i] of problems[i], keeps those that pass all `filters` {name:
    (problem, text) -> bool}, and one per problem: the first, or with a `rank` the highest, and
    then only the better half of the problems -> ((problem, text) rows, {filter: how many passed
    it})."""
    passed, best = Counter(), []
    for problem, said in zip(problems, texts, strict=True):
        for name, passes in filters.items():
            said = [text for text in said if passes(problem, text)]
            passed[name] += len(said)
        if said and rank:
            said = sorted(said, key=lambda text, problem=problem: -rank(problem, text))
        best += [(problem, text) for text in said[:1]]
    if rank:
        best = sorted(best, key=lambda row: -rank(*row))[:(len(best) + 1) // 2]
    return best, passed


# ------------------------------------------------------------------------------------------------
# Files


def write_lines(path, lines):
    with atomic_write(path) as f:
        f.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write_json(path, value):
    with atomic_write(path) as f:
        f.write(json.dumps(value, indent=1).encode())


def read_results(folder):
    """What `evaluate_tasks` wrote there, or nothing."""
    path = os.path.join(folder, "eval.json")
    return read_json(path) if os.path.exists(path) else {}


# ------------------------------------------------------------------------------------------------
# The command line


@dataclass
class AskConfig:
    ckpt: str = opt("out/zero/ckpt.pt", "checkpoint")
    vs: str = opt("", "a second checkpoint, to show beside the first")
    task: str = opt("", "kind of held-out problems; none = what the checkpoint was trained on",
                    choices=("", *[task for task in data.TASKS if task != "file"]))
    numbers: str = opt("", "your own countdown problem: numbers, as 3,7,2")
    target: int = opt(-1, "... and what to make of them")
    n: int = opt(4, "problems, or tries at your own one", least=1)
    temperature: float = opt(1.0, "0 takes the likeliest token", least=0)
    max_new_tokens: int = opt(0, "longest completion, in tokens; 0 = as in training", least=0)
    seed: int = opt(1, "of the samples", least=0, most=2**63 - 1)
    device: str = opt("auto", "cpu, cuda, cuda:1, or auto: cuda where there is one")

    def rules(self):
        """Raises UserError if half of a problem is given."""
        if bool(self.numbers) != (self.target != AskConfig.target):
            raise UserError("--numbers and --target go together")


def own_problem(numbers, target):
    try:
        numbers = tuple(int(n) for n in numbers.split(","))
    except ValueError:
        raise UserError(f"--numbers={numbers} is no list of whole numbers such as 3,7,2") from None
    return data.countdown_problem(numbers, target)


def render(problem, text, names=tuple(rewards.REWARDS)):
    """One completion as a person would read it, with the scores of the named rewards: (style,
    line) pairs. What has no tags is shown as it is; control characters, which a model may say and
    a terminal would obey, are shown as U+FFFD."""
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    thinking, answer = rewards.split_completion(text)
    if thinking is None and answer is None:
        lines = [("plain", line) for line in (text.strip() or "(nothing)").split("\n")]
    else:
        thinking = (thinking or "").strip() or "(none)"
        style = "right" if rewards.is_right(problem, text) else "wrong"
        lines = [("plain", "thinking")]
        lines += [("dim", "    " + line) for line in thinking.split("\n")]
        lines += [("plain", "answer"), (style, f"    {answer or '(none)'}")]
    scores = [f"{name} {rewards.REWARDS[name]([problem], [text])[0]:.3g}" for name in names]
    return [*lines, ("plain", "scores"), ("plain", "    " + "  ".join(scores))]


STYLES = {"plain": "", "dim": "\033[2m", "right": "\033[1;32m", "wrong": "\033[1;31m"}


def paint(style, text):
    return f"{STYLES[style]}{text}\033[0m" if STYLES[style] and sys.stdout.isatty() else text


def fit(text, width):
    """The text cut or padded to so many columns of a terminal, where a Chinese sign takes two."""
    out, used = "", 0
    for c in text:
        wide = 2 if unicodedata.east_asian_width(c) in "WF" else 1
        used += 0 if unicodedata.combining(c) else wide
        if used > width:
            used -= wide
            break
        out += c
    return out + " " * (width - used)


def ask(args, ckpt):
    """(problems, what `render` shows of a completion of each) for the problems that the flags
    name."""
    given = {"device": args.device}
    if args.task:
        given |= {"task": args.task, "data": ""}
    if args.max_new_tokens:
        given["max_new_tokens"] = args.max_new_tokens
    _, model, tok, cfg = open_checkpoint(given, ckpt)
    device = find_device(args.device)
    model = sampling_copy(model.to(device), sampling_dtype(cfg.sample, device))
    if args.numbers:
        problems = [own_problem(args.numbers, args.target)] * args.n
    else:
        problems = data.eval_problems(cfg.data, args.n)
    generator = torch.Generator().manual_seed(args.seed)
    answers = sample_answers(model, tok, problems, 1, cfg, args.temperature, generator, "sample")
    trained_with = [name for name in rewards.REWARDS if getattr(cfg.rewards, f"w_{name}")]
    return problems, [render(a.problem, a.text, trained_with) for a in answers]


def main(argv):
    parser = Parser("sample.py", __doc__, {"settings": AskConfig})
    given = vars(parser.parse_args(argv))
    with one_line_errors("sample.py"):
        args = AskConfig(**given)
        validate(args)
        problems, shown = ask(args, args.ckpt)
        if not args.vs:
            for problem, lines in zip(problems, shown, strict=True):
                print(f"--- {problem.question}", *[paint(*line) for line in lines], "", sep="\n")
            return
        others, shown_vs = ask(args, args.vs)
        if problems != others:
            raise UserError(f"{args.ckpt} and {args.vs} were trained on different problems: set "
                            f"--task, or --numbers and --target")
        width = max(30, shutil.get_terminal_size((120, 0)).columns // 2 - 2)
        print(fit(args.ckpt[-width:], width) + "  " + args.vs[-width:])
        for problem, left, right in zip(problems, shown, shown_vs, strict=True):
            print(f"--- {problem.question}")
            for a, b in zip_longest(left, right, fillvalue=("plain", "")):
                print((paint(a[0], fit(a[1], width)) + "  " + paint(*b)).rstrip())
            print()


if __name__ == "__main__":
    main(sys.argv[1:])
