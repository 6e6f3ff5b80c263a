"""Whatever runs a model without gradients: sampling, evaluation, rejection sampling. As a script it
prints problems with the model's thinking, its answer and its rewards.

    python sample.py                                                # held-out problems, out/zero
    python sample.py --numbers=3,7,2 --target=20 --n=4              # your own problem, four tries
    python sample.py --ckpt=out/base/ckpt.pt --vs=out/zero/ckpt.pt  # side by side: before, after RL
    python sample.py --ckpt=out-all/r1/ckpt.pt --task=chat          # or unsafe, arithmetic, ...
    python sample.py --init_from=FOLDER --question="What is 7 * 8?" # any model, any question
    python sample.py --init_from=FOLDER --data=FILE --n=4 --only_right --to=traces.jsonl
"""
import argparse
import json
import math
import os
import shutil
import sys
import unicodedata
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import zip_longest

import torch
from tqdm import tqdm

import data
import rewards
from data import DataConfig
from grpo import GRPOConfig
from model import (
    Linear,
    UserError,
    any_terminal,
    atomic_write,
    from_pretrained,
    generate,
    generators,
    load_checkpoint,
    load_model,
    model_of,
    onednn_pays,
    opt,
    pick,
    read_json,
    sampling_copy,
    validate,
    write_json,
)
from rewards import RewardConfig, RewardModel

# ------------------------------------------------------------------------------------------------
# Settings, the command line, and opening a checkpoint


@dataclass
class SampleConfig:
    out_dir: str = opt("out", "folder that everything is written to")
    seed: int = opt(1, "seed of all random choices except those of evaluations, which are always "
                    "the same", least=0)
    device: str = opt("auto", "cpu, cuda, cuda:1, or auto: cuda where there is one")
    threads: int = opt(0, "CPU threads; 0 = one per core", least=0, most=1024)
    matmul: str = opt("auto", "library for matrix products on a CPU; auto: the faster one here",
                      choices=("auto", "torch", "onednn"))
    init_from: str = opt("", "Hugging Face folder whose model replaces the toy base")
    sample_dtype: str = opt("auto", "dtype of the weights in sampling; auto: bfloat16 on GPUs "
                            "that compute in it; float32 if adapters were merged into them",
                            choices=("auto", "float32", "bfloat16"))
    eval_samples: int = opt(16, "completions per held-out problem in an evaluation", least=1)
    ckpt: str = opt("", "checkpoint for `eval` and `export`; none = out_dir/zero/ckpt.pt")

    def check(self):
        find_device(self.device)


REAL_DEFAULTS = {  # with --init_from: near the papers' settings, at a size for one GPU
    "template": "base", "context": 2048, "max_new_tokens": 512,
    "rl_lr": 1e-6, "rl_decay": 0.0, "rl_steps": 200,
    "base_optimizer": "adamw", "sft_lr": 1e-5, "sft_rows": 8, "sft_steps": 150,
    "save_every": 5, "eval_problems": 100, "eval_samples": 4,
}


@dataclass
class Config:
    """All settings, by the file whose part they are."""
    data: DataConfig = field(default_factory=DataConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    @classmethod
    def of(cls, settings):
        """From {name: value}. Raises UserError naming a value that is out of bounds."""
        cfg = cls(**{f.name: pick(f.default_factory, settings) for f in fields(cls)})
        for group in vars(cfg).values():
            validate(group)
        return cfg

    def settings(self):
        """{name: value} of all groups."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}


def find_device(name):
    """The torch device that --device names. Raises UserError if there is none."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    known = ["cpu"] + (["cuda"] if gpus else []) + [f"cuda:{i}" for i in range(gpus)]
    if name not in known:
        raise UserError(f"device={name!r} is not one of auto, {', '.join(known)}: torch finds "
                        f"{gpus} GPUs")
    return torch.device(name)


def use_bf16(setting, device):
    """Whether --sample_dtype or --autocast means bfloat16 on this device; auto: on GPUs that
    compute in it, which those before Ampere emulate slowly."""
    if setting == "auto" and device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return setting in ("on", "bfloat16") or setting == "auto" and device.type == "cuda"


def sampling_dtype(cfg):
    return torch.bfloat16 if use_bf16(cfg.sample_dtype, find_device(cfg.device)) else torch.float32


def set_up_cpu(cfg):
    """Sets the number of CPU threads and the library for matrix products. "auto" is measured, and
    checkpoints keep the result: torch and oneDNN round differently, and a resumed run must not
    switch. If torch lacks oneDNN's operator, its own product is used."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.matmul == "auto":
        on_cpu = find_device(cfg.device).type == "cpu"
        cfg.matmul = "onednn" if on_cpu and onednn_pays() else "torch"
    has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    Linear.onednn = cfg.matmul == "onednn" and has_onednn


def for_sampling(model, cfg):
    """The model on the device and in the dtype that a SampleConfig names."""
    return sampling_copy(model.to(find_device(cfg.device)), sampling_dtype(cfg))


class Parser(argparse.ArgumentParser):
    """One flag per setting. Only flags that were given appear in what parse_args returns."""

    def __init__(self, prog, doc, groups, **options):
        formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=110)
        super().__init__(prog=prog, description=doc, allow_abbrev=False, formatter_class=formatter,
                         argument_default=argparse.SUPPRESS, **options)
        for title, group in groups.items():
            section = self.add_argument_group(title)
            for f in fields(group):
                read = {bool: boolean, str: os.path.expanduser}.get(f.type, f.type)  # ~ is a folder
                read = str if f.name == "question" else read
                bare = {"nargs": "?", "const": True} if f.type is bool else {}  # --flag is true
                section.add_argument(f"--{f.name}", type=read, metavar=f.type.__name__,
                                     help=describe(f), **bare)

    def error(self, message):
        """One line, without the usage that argparse would print first."""
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
    """Errors that a user can fix end the script with one line and exit code 2; Ctrl-C with 130."""
    code = 2
    try:
        if torch.__version__ < "2.9":  # which torch compares as versions, not as text
            raise UserError(f"torch {torch.__version__} is too old: it takes 2.9 or later")
        yield
        return
    except UserError as e:
        line = e
    except BrokenPipeError:
        raise
    except (MemoryError, RuntimeError) as e:
        # Of CUDA; of CPUs; of sizes that no 64 bits hold.
        words = ("out of memory", "allocate memory", "not enough memory", "size calculation")
        if not isinstance(e, MemoryError) and not any(said in str(e) for said in words):
            raise
        line = ("out of memory: a smaller model or --context; for RL lower --micro_tokens or "
                "--prompts_per_step, or set --checkpointing=true")
    except OSError as e:
        line = f"{e.filename or folder}: {e.strerror or e}; the last checkpoint is unchanged"
    except KeyboardInterrupt as e:
        line, code = f"stopped; {str(e) or 'what is saved stays'}. The same command resumes it", 130
    print(f"{prog}: {line}", file=sys.stderr)
    sys.exit(code)


# To ask a model without the problems it was trained on: their file may have been moved.
NO_FILE = {"task": "countdown", "mix": "", "data": "", "eval_data": ""}


def choose_problems(given, trained, files):
    """(given, trained), the settings of now and of training, changed so that the problems to ask
    follow from them. `files`: checksums of the files that training read."""
    if given.get("data"):
        is_known = (os.path.realpath(given["data"]) == os.path.realpath(trained.get("data", ""))
                    or checksum(given["data"]) == files.get("data", 0))
        # If it was trained on these problems, what was held out is in its eval_data.
        trained = {**trained, "eval_data": trained.get("eval_data", "") if is_known else ""}
    elif given.get("eval_data"):
        given = {"data": trained.get("data") or given["eval_data"], **given}
    elif given.get("task", "file") != "file":
        trained = {**trained, **NO_FILE}
    return given, trained


def open_checkpoint(given, path="", beside=None):
    """(path, model, tokenizer, Config) of a checkpoint, with the settings that it was trained with
    unless others are given; or of a Hugging Face folder, with the settings `beside`: those of the
    model that it is compared with."""
    data.refuse_two_tasks(given)
    out_dir = given.get("out_dir", SampleConfig.out_dir)
    path = path or given.get("ckpt") or given.get("init_from")
    path = path or os.path.join(out_dir, "zero", "ckpt.pt")
    files = {}
    if os.path.isdir(path):
        trained = {**REAL_DEFAULTS, **(beside or {})}
        given = {**given, "init_from": path}
    else:
        if path == given.get("init_from"):
            data.load_tokenizer(path)  # raises: a model's name is not a folder
        state = load_checkpoint(path)
        if state.get("stage") == "reward_model":
            raise UserError(f"{path} is a reward model: it judges answers and gives none")
        trained, files = state.get("settings", {}), state.get("files", {})
        if given.get("init_from") and not trained.get("init_from"):
            raise UserError(f"{path} was not trained from a folder: leave out --init_from")
    given, trained = choose_problems(given, trained, files)
    here = {"device": "auto", "threads": 0}  # of this machine, not of the one it was trained on
    then = sampling_dtype(pick(SampleConfig, {**trained, **here}))
    if trained.get("lora_rank"):  # merged: in bfloat16, small updates would vanish
        trained = {**trained, "sample_dtype": "float32"}
    cfg = Config.of({**trained, **here, **given})
    now = sampling_dtype(cfg.sample)
    if then != now and not os.path.isdir(path):
        print(f"{path} sampled in {then} in training, and now does in {now}")
    set_up_cpu(cfg.sample)
    tok = data.load_tokenizer(cfg.sample.init_from)
    if os.path.isdir(path):
        context = max(trained["context"], 512 + cfg.grpo.max_new_tokens)
        model = from_pretrained(path, given.get("context", context))
    else:
        model = model_of(state, path)
    if model.cfg.vocab_size < tok.n_vocab:
        raise UserError(f"{path}: its vocab_size is {model.cfg.vocab_size}, and the tokenizer has "
                        f"{tok.n_vocab} ids")
    data.leave_out(cfg.data, tok, model.cfg.context - cfg.grpo.max_new_tokens)
    return path, model, tok, cfg


# ------------------------------------------------------------------------------------------------
# Sampling, evaluation, rejection sampling, and the files they write


def sample_answers(model, tok, problems, k, cfg, temperature, generator, desc):
    """k completions of each problem, in order: (problem, text, Completion) each."""
    answers, (stop_ids, find_end) = [], data.stops(tok, cfg.data)
    # As many completions at a time as in a step of training, or k each for 32 problems if that is
    # more: `train.memory_plan` relies on it.
    size = max(32, cfg.grpo.prompts_per_step * cfg.grpo.group_size // k)
    for i in tqdm(range(0, len(problems), size), desc=desc, leave=False, disable=None):
        chunk = problems[i:i + size]
        prompts = [data.prompt_ids(problem, tok, cfg.data) for problem in chunk]
        out = generate(model, prompts, k, cfg.grpo.max_new_tokens, temperature, stop_ids,
                       generator, find_end)
        for j, completion in enumerate(out):
            text = data.completion_text(completion.ids, tok, cfg.data)
            answers.append((chunk[j // k], text, completion))
    return answers


def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them right, include a right one (arXiv 2107.03374)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(verdicts):
    """cons@k: is the most frequent answer right? `verdicts` are (canonical form or None, right) of
    k samples. Samples without an answer do not vote; of a tie the answer sampled first wins."""
    votes = Counter(form for form, _ in verdicts if form is not None)
    winner = max(votes, key=votes.get, default=None)
    return winner is not None and dict(verdicts)[winner]


def assess(problem, text, completion, cfg):
    """A line of samples.jsonl. Its numbers are averaged into eval.json."""
    form, right = rewards.verify(problem, text)
    thinking, answer = rewards.split_completion(text)
    line = {"task": problem.task, "prompt": data.prompt_text(problem, cfg.data),
            "completion": text, "answer": form, "right": right, "format": rewards.has_format(text),
            "one_language": rewards.one_language(problem, text),
            "emoji": rewards.emoji([problem], [text])[0], "length": len(completion.ids),
            "truncated": completion.truncated, "retry_rate": rewards.retries(text),
            "thinks": bool((thinking or "").strip()),
            "pass@1_untagged": rewards.is_right_untagged(problem, text)}
    if problem.task in data.GENERAL:
        line["gold_reward"] = rewards.gold_reward(problem, answer)
    return line


def evaluate(model, tok, problems, k, cfg, temperature):
    """k completions of each problem -> (metrics, the lines of samples.jsonl)."""
    _, generator = generators("evaluate")
    answers = sample_answers(model, tok, problems, k, cfg, temperature, generator, "evaluate")
    samples, n = [assess(*answer, cfg) for answer in answers], len(problems)
    verdicts = [(s["answer"], s["right"]) for s in samples]
    votes = [majority_vote(verdicts[i:i + k]) for i in range(0, n * k, k)]
    right = torch.tensor([right for _, right in verdicts]).double().view(n, k)
    mean = right.mean().item()
    metrics = {"pass@1": mean, "pass@1_ci": interval(problems, mean, right.mean(dim=1).tolist()),
               f"pass@{k}": sum(pass_at_k(k, int(c), k) for c in right.sum(dim=1)) / n,
               f"cons@{k}": sum(votes) / n}
    for key, value in samples[0].items():
        if isinstance(value, (int, float)) and key != "right":
            metrics[key] = sum(s[key] for s in samples) / len(samples)
    return {**metrics, "problems": n, "samples": k, "temperature": temperature}, samples


def interval(problems, mean, shares):
    """The 95 % interval of the `mean` of each problem's share of right samples. It is over
    problems, because the samples of one are not independent; neither are logic puzzles that differ
    only in names, which count as one."""
    n, clusters = len(problems), Counter()
    for problem, share in zip(problems, shares, strict=True):
        clusters[data.without_names(problem)] += share - mean
    m = len(clusters)
    var = sum(x * x for x in clusters.values()) * m / max(1, m - 1) / n ** 2  # of the mean
    half = 1.96 * var ** 0.5 if m > 1 else 1.0
    if mean in (0.0, 1.0):  # no spread to estimate it from: the exact (Clopper-Pearson) interval
        half = 1 - 0.025 ** (1 / m)
    elif half < 1e-9:  # all shares are equal: assume that each problem is all right or all wrong
        half = 1.96 * (mean * (1 - mean) / m) ** 0.5
    return [max(0.0, mean - half), min(1.0, mean + half)]


EVAL_SETTINGS = [*(f.name for f in fields(DataConfig) if f.name not in ("task", "mix")),
                 "max_new_tokens", "temperature", "eval_samples"]


def eval_settings(settings, origin=None):
    """The EVAL_SETTINGS that are not the defaults, and checksums of the files among them:
    evaluations with the same ones can be compared. `origin`: [path, time] of a model that was
    trained elsewhere."""
    default = Config().settings()
    own = {key: settings[key] for key in EVAL_SETTINGS if settings[key] != default[key]}
    files = {key: checksum(path) for key, path in own.items() if key in ("data", "eval_data")}
    return {**own, **({"files": files} if files else {}), **({"origin": origin} if origin else {})}


def checksum(path):
    """Of a file, None if there is none."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        return zlib.crc32(f.read())


def results_folder(ckpt):
    """The folder for a checkpoint's evaluation: the one it is in, or FILE.eval if it is not called
    ckpt.pt, since its folder may then hold several checkpoints."""
    folder, file = os.path.split(ckpt)
    return folder if file == "ckpt.pt" else f"{ckpt}.eval"


def tasks_to_ask(cfg, known, requests):
    """{task: how many held-out problems}: all of cfg.data.tasks(); of a toy model also a few of
    every other task, of which no more are `known`: 5 % as many, but up to 100 with --task=all, and
    of general ones if `requests` (the model has learnt from such)."""
    n, main = cfg.data.eval_problems, cfg.data.tasks()
    tasks = dict.fromkeys(main, n)
    for task in data.TASKS if not (cfg.sample.init_from or cfg.data.data) else ():
        fully = cfg.data.task == "all" or requests and task in data.GENERAL
        few = min(n, 100) if fully else max(1, n // 20)
        if task not in (*main, "file") and known.get(task, {"problems": 0})["problems"] <= few:
            tasks[task] = few
    return tasks


def evaluate_tasks(model, tok, cfg, folder, origin=None, requests=False):
    """Evaluates a model on `tasks_to_ask`: at the training temperature, on cfg.data.tasks() also at
    the paper's 0.6 and greedily. Metrics go to FOLDER/eval.json, samples to FOLDER/samples.jsonl.
    `origin`: see `eval_settings`."""
    k, samples, settings = cfg.sample.eval_samples, [], eval_settings(cfg.settings(), origin)
    results = {}  # what may stay: full evaluations of this model, others with the same settings
    for task, found in read_results(folder).items():
        then = found.get("settings", settings)
        fully = "pass@1_greedy" in found and then.get("origin") == origin
        if fully or {**then, "eval_problems": 0} == {**settings, "eval_problems": 0}:
            results[task] = found
    tasks = tasks_to_ask(cfg, results, requests)
    model = for_sampling(model, cfg.sample)
    for task, n in tasks.items():
        problems = data.eval_problems(cfg.data, n, task)
        results[task], found = evaluate(model, tok, problems, k, cfg, cfg.grpo.temperature)
        results[task]["settings"] = settings
        samples += found[:100 * k]
        if task in cfg.data.tasks():
            few = min(4, max(1, 400 // n))  # some 400 samples will do
            for name, samples_each, temperature in (("T=0.6", few, 0.6), ("greedy", 1, 0.0)):
                other, _ = evaluate(model, tok, problems, samples_each, cfg, temperature)
                results[task][f"pass@1_{name}"] = other["pass@1"]
    if "chat" in tasks:
        results.pop("win_rate", None)
        results |= win_rates(samples, tok, os.path.join(folder, os.pardir))
    path = os.path.join(folder, "samples.jsonl")
    earlier = read_lines(path) if os.path.exists(path) else []
    kept = set(results) - set(tasks)
    write_lines(path, samples + [line for line in earlier if line.get("task") in kept])
    write_json(os.path.join(folder, "eval.json"), results)  # last: it says that all is done


def win_rates(samples, tok, out_dir):
    """The share of chat answers that beat dev3's, among those that differ from them (`differ`: the
    share of these); ties count half. By gold reward, and by the reward model: if that rate is much
    higher, the reward model was exploited. {} if dev3 or the reward model is missing."""
    dev3 = os.path.join(out_dir, "dev3", "samples.jsonl")
    path = os.path.join(out_dir, "reward_model", "ckpt.pt")
    if not (os.path.exists(dev3) and os.path.exists(path)):
        return {}
    mine, theirs = ([s for s in lines if s.get("task") == "chat"]
                    for lines in (samples, read_lines(dev3)))
    if not mine or [s["prompt"] for s in mine] != [s.get("prompt") for s in theirs]:
        return {}
    # The same text twice would be a tie, were it not for rounding in the reward model.
    pairs = [pair for pair in zip(mine, theirs, strict=True)
             if pair[0]["completion"] != pair[1]["completion"]]
    model = load_model(path, cls=RewardModel)
    golds = [[s["gold_reward"] for s in group] for group in zip(*pairs, strict=True)]
    scores = [model.score(tok, [s["prompt"] for s in group], [s["completion"] for s in group])
              for group in zip(*pairs, strict=True)]

    def rate(ours=(), others=()):
        wins = [(a > b) + 0.5 * (a == b) for a, b in zip(ours, others, strict=True)]
        return sum(wins) / len(wins) if wins else 0.5

    return {"win_rate": {"gold": rate(*golds), "reward_model": rate(*scores),
                         "differ": len(pairs) / len(mine)}}


def rejection_sample(problems, texts, filters, rank=None):
    """Keeps one of the completions texts[i] of each problems[i]: the first that passes all filters
    {name: (problem, text) -> bool}. With `rank`, (problem, text) -> number, it keeps the one that
    ranks highest, and then only the better half of these in each task. Returns ((problem, text)
    rows, {filter: how many passed})."""
    passed, rows = Counter(), []
    for problem, said in zip(problems, texts, strict=True):
        for name, passes in filters.items():
            said = [text for text in said if passes(problem, text)]
            passed[name] += len(said)
        if said:
            rows.append((problem, max(said, key=partial(rank, problem)) if rank else said[0]))
    if not rank:
        return rows, passed
    best = []
    for task in dict.fromkeys(problem.task for problem, _ in rows):
        own = [row for row in rows if row[0].task == task]
        best += sorted(own, key=lambda row: -rank(*row))[:(len(own) + 1) // 2]
    return best, passed


def write_lines(path, lines):
    with atomic_write(path) as f:
        f.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def read_lines(path):
    """The objects in a file of JSON lines, but for a line that a crash cut off."""
    lines = []
    with open(path, "rb") as f:
        for line in f:
            with suppress(ValueError, TypeError):
                lines.append(dict(json.loads(line)))
    return lines


def read_results(folder):
    """{task: its results} of an evaluation, {} if there was none."""
    path = os.path.join(folder, "eval.json")
    return read_json(path) if os.path.exists(path) else {}


# ------------------------------------------------------------------------------------------------
# The script


@dataclass
class AskConfig:
    ckpt: str = opt("", "checkpoint, or a Hugging Face folder; none = out/zero/ckpt.pt")
    init_from: str = opt("", "a Hugging Face folder to ask in place of --ckpt")
    vs: str = opt("", "a second one, to show beside the first")
    question: str = opt("", "your own question, in words")
    numbers: str = opt("", "your own countdown problem: numbers, as 3,7,2")
    target: int = opt(-1, "what to make of --numbers")
    n: int = opt(4, "held-out problems to show; with your own problem or --to: samples of each",
                 least=1)
    to: str = opt("", "JSONL file to write prompts and complete answers to, for `train.py sft`")
    problems: int = opt(0, "training problems to sample with --to, at most; 0 = 400", least=0)
    only_right: bool = opt(False, "with --to: keep right samples only (rejection sampling)")
    temperature: float = opt(1.0, "0 takes the likeliest token", least=0)
    max_new_tokens: int = opt(0, "longest completion, in tokens; 0 = as in training", least=0)
    seed: int = opt(1, "of the samples", least=0)
    device: str = opt("auto", "cpu, cuda, cuda:1, or auto: cuda where there is one")

    def check(self):
        if 0 < self.temperature < 0.01:
            raise UserError(f"temperature={self.temperature} is neither 0 nor 0.01 or more")
        if bool(self.numbers) != (self.target >= 0):
            raise UserError("--numbers and --target, which is 0 or more, go together")
        if self.question and self.numbers:
            raise UserError("--question and --numbers are two problems: leave out one of them")
        if (self.only_right or self.problems) and not self.to:
            raise UserError("--only_right or --problems needs --to=FILE.jsonl")
        if self.to and (self.question or self.numbers or self.vs):
            raise UserError("--to writes answers to training problems: leave out --question, "
                            "--numbers and --vs")
        numbers = (self.numbers or "0,0").split(",")
        if len(numbers) < 2 or not all(n.strip().isdecimal() and len(n) < 10 for n in numbers):
            raise UserError(f"--numbers={self.numbers} is not a list of whole numbers, such as "
                            f"3,7,2")


def printable(text):
    """The text with U+FFFD for control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def render(problem, text, names=tuple(rewards.REWARDS)):
    """One completion and its scores as (style, line) pairs."""
    thinking, answer = rewards.split_completion(text)
    if thinking is None and answer is None:
        lines = [("plain", line) for line in (text.strip() or "(nothing)").split("\n")]
    else:
        thinking = ((thinking or "").strip() or "(none)").split("\n")
        style = "right" if rewards.is_right(problem, text) else "wrong"
        style = style if problem.target != "" else "plain"  # nobody knows the answer
        lines = [("plain", "thinking"), *[("dim", f"    {line}") for line in thinking],
                 ("plain", "answer"), (style, f"    {answer or '(none)'}")]
    # Accuracy is of interest for general requests, too, though nobody is rewarded for it there.
    names = [name for name in names if name == "accuracy" or rewards.applies(name, problem)]
    lines = [(style, printable(line)) for style, line in lines]
    scores = [f"{name} {rewards.checked(name, rewards.REWARDS[name], [problem], [text])[0]:.3g}"
              for name in names]
    return [*lines, ("plain", "scores"), ("plain", "    " + "  ".join(scores))]


STYLES = {"plain": "", "dim": "\033[2m", "right": "\033[1;32m", "wrong": "\033[1;31m"}


def paint(style, text):
    return f"{STYLES[style]}{text}\033[0m" if STYLES[style] and sys.stdout.isatty() else text


def fit(text, width):
    """The text cut or padded to so many columns of a terminal, where a Chinese sign takes two."""
    out, used = "", 0
    for c in text:
        wide = 2 if unicodedata.east_asian_width(c) in "WF" else 1
        if unicodedata.combining(c):
            wide = 0
        if used + wide > width:
            break
        out, used = out + c, used + wide
    return out + " " * (width - used)


def ask(args, given, path, beside=None):
    """Asks the checkpoint at `path` the problems that the flags name -> (problems, one completion
    of each as `render` shows it, the settings used)."""
    _, model, tok, cfg = open_checkpoint(given, path, beside)
    if args.question:
        problems = [data.Problem("file", args.question, (), "")] * args.n
    elif args.numbers:
        numbers = [int(n) for n in args.numbers.split(",")]
        problems = [data.countdown_problem(numbers, args.target)] * args.n
    else:
        problems = data.eval_problems(cfg.data, args.n)
    generator = torch.Generator().manual_seed(args.seed)
    answers = sample_answers(for_sampling(model, cfg.sample), tok, problems, 1, cfg,
                             args.temperature, generator, "sample")
    names = [name for name in rewards.REWARDS if getattr(cfg.rewards, f"w_{name}")
             and not (args.question and name == "accuracy")]
    shown = [render(problem, text, names) for problem, text, _ in answers]
    return problems, shown, cfg.settings()


def write_traces(args, given):
    """Writes completions of training problems as lines of `prompt` and `completion`, except blank
    and truncated ones: from these SFT would learn to stop there."""
    if os.path.isdir(args.to):
        raise UserError(f"--to={args.to} is a folder: name a file")
    path, model, tok, cfg = open_checkpoint(given)
    read = (path, cfg.data.data, cfg.data.eval_data)
    if os.path.realpath(args.to) in [os.path.realpath(file) for file in read if file]:
        raise UserError(f"--to={args.to} is what is read: name another file")
    rng, generator = generators(args.seed, "traces")
    n = args.problems or 400
    drawn = [data.draw_problem(cfg.data, rng) for _ in range(20 * n)]
    problems = list({problem.key: problem for problem in drawn}.values())[:n]
    answers = sample_answers(for_sampling(model, cfg.sample), tok, problems, args.n, cfg,
                             args.temperature, generator, "sample")
    kept = [(problem, text) for problem, text, completion in answers
            if text.strip() and not completion.truncated
            and (not args.only_right or rewards.is_right(problem, text))]
    if not kept:
        what = "right" if args.only_right else "complete"
        raise UserError(f"no sample of {path} was {what}: {args.to} is left as it is")
    write_lines(args.to, [{"prompt": data.in_words(problem, cfg.data), "completion": text}
                          for problem, text in kept])
    print(f"{args.to}: {len(kept)} of {len(answers)} completions by {path}, "
          f"{args.n} of each of {len(problems)} problems")


GROUPS = {"settings": AskConfig, "problems, by default those of training": DataConfig}


def main(argv):
    with any_terminal(), one_line_errors("sample.py"):
        show_answers(vars(Parser("sample.py", __doc__, GROUPS).parse_args(argv)))


def show_answers(given):
    args = pick(AskConfig, given)
    validate(args)
    own = ["seed", "temperature"] + ([] if args.max_new_tokens else ["max_new_tokens"])
    given = {name: value for name, value in given.items() if name not in own}
    if (args.numbers or args.question) and "data" not in given:
        given = {**NO_FILE, **given}
    if args.to:
        return write_traces(args, given)
    path = args.ckpt or args.init_from or os.path.join(SampleConfig.out_dir, "zero", "ckpt.pt")
    if args.init_from and not args.ckpt:  # then it is `path`: the other one keeps its tokenizer
        data.load_tokenizer(given.pop("init_from"))  # raises if there is no such folder
    paths, found, settings = [path] + [args.vs] * bool(args.vs), {}, None
    # A folder comes second: it is asked with the settings of the other.
    for which in sorted(paths, key=os.path.isdir):
        *found[which], settings = ask(args, given, which, settings)
    problems = found[path][0]
    if any(others != problems for others, _ in found.values()):
        raise UserError(f"{path} and {args.vs} were trained on different problems: "
                        f"set --task, or --numbers and --target")
    width = max(30, shutil.get_terminal_size((120, 0)).columns // 2 - 2)
    if args.vs:
        print(fit(path[-width:], width) + "  " + args.vs[-width:])
    for problem, *answers in zip(problems, *(found[which][1] for which in paths), strict=True):
        print(f"--- {printable(problem.question)}")
        for *left, (style, line) in zip_longest(*answers, fillvalue=("plain", "")):
            left = [paint(style, fit(line, width)) for style, line in left]
            print("  ".join([*left, paint(style, line)]).rstrip())
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
