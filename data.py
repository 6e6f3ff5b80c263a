"""The toy world: tokenizer, problems and prompts, and the corpus that the base reads.

The corpus shows problems and attempts at them as a web corpus would: with and without tags, right
and wrong, patient and hasty, in two languages.

    python data.py           # eight documents, and which habits the attempts in the corpus show
    python data.py logic     # eight documents of a corpus that is mostly about logic
"""
import json
import random
import re
import sys
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from itertools import combinations, permutations
from pathlib import Path

import tiktoken
import torch

from model import UserError, any_terminal, opt, read_json, reading

LARGEST = 99  # the toy world counts with 0..99, one token each


@dataclass
class DataConfig:
    task: str = opt("countdown", "what RL trains on and most of the corpus is about: countdown, "
                    "arithmetic, logic, code, or all of these together")
    mix: str = opt("", "training tasks and their shares, such as task:2,chat:1, where task stands "
                   "for what --task says; none = that alone")
    n_numbers: int = opt(3, "numbers in a problem", least=2, most=4)
    max_number: int = opt(9, "numbers are drawn from 1 to this", least=2, most=LARGEST)
    ops: str = opt("+-*", "operations a problem may need, from + - * /")
    eval_problems: int = opt(500, "held-out problems in the final evaluation", least=1)
    data: str = opt("", "JSONL file of {question, answer} to take problems from, as task `file`")
    eval_data: str = opt("", "a second such file to evaluate on; none = hold out a part of `data`")
    question_key: str = opt("question", "key of the question in these files")
    answer_key: str = opt("answer", "key of the answer in these files")
    template: str = opt("toy", "prompt template; SmolLM2 uses qwen",
                        choices=("toy", "base", "qwen", "llama"))
    shots: int = opt(0, "worked examples in the prompt, for real models", least=0, most=3)
    prefill_think: bool = opt(False, "end the prompt with <think>; rewards read it as part of the "
                               "completion")

    def __post_init__(self):
        if self.data:
            self.task = "file"

    def check(self):
        if self.task not in (*TASKS, "all"):
            raise UserError(f"task={self.task!r} is not one of {', '.join(TASKS)}, all")
        if set(self.ops) - set("+-*/") or not self.ops.strip("/"):
            raise UserError(f"ops={self.ops!r} must be some of + - * /, and not just /")
        if self.shots and self.template == "toy":
            raise UserError(f"shots={self.shots} needs another template than toy")
        if self.task == "file" and not self.data:
            raise UserError("task=file needs --data=FILE")
        if self.eval_data and not self.data:
            raise UserError("--eval_data needs --data=FILE to train on")
        for path, problems in self.files().items():
            if not self.eval_data and len({problem.held_out for problem in problems}) < 2:
                raise UserError(f"data={path}: {len(problems)} problems are too few to split")
        shown = dict.fromkeys(example.task for example, *_ in EXAMPLES)
        others = [task for task in self.shares() if task not in shown]
        if self.shots and others:
            raise UserError(f"shots={self.shots}: there are only worked examples of "
                            f"{', '.join(shown)}, not of {', '.join(others)}")

    def files(self):
        """{path: its problems} of the files that were given."""
        return {path: file_problems(path, self.question_key, self.answer_key)
                for path in (self.data, self.eval_data) if path}

    def tasks(self):
        """What is trained on, and evaluated in full."""
        return tuple(REASONING) if self.task == "all" else (self.task,)

    def shares(self):
        """{task: its share of the training problems}. Raises UserError if `mix` makes no sense."""
        shares = Counter()
        for part in (self.mix or "task").split(","):
            name, _, share = part.strip().partition(":")
            share, tasks = share or "1", self.tasks() if name == "task" else (name,)
            known = set(tasks) <= set(TASKS) and (self.data or "file" not in tasks)
            if not (known and re.fullmatch(r"\d{1,6}(\.\d{1,6})?", share) and float(share)):
                raise UserError(f"mix={self.mix!r} must be {', '.join(TASKS)} or task, with "
                                f"shares, such as task:2,chat:1")
            for task in tasks:
                shares[task] += float(share) / len(tasks)
        return dict(shares)


# ------------------------------------------------------------------------------------------------
# Tokenizer

WORDS = {  # in English and Chinese; one of the two is drawn at each use
    "keep": ("keep ", "留 "), "against": (" vs ", " 比 "), "miss": (" no\n", " 不对\n"),
    "hit": (" yes\n", " 对了\n"), "quit": ("I give up\n", "算了\n"),
    "nothing": ("nothing fits\n", "都不行\n"), "answer": ("answer: ", "答案: "),
}
EMOJI = {"miss": " 🤔", "hit": " 🎉", "quit": " 😴", "nothing": " 😴"}  # after such a line
POINT = " 👉"  # after any other
SAYINGS = {"lies": "{} lies", "honest": "{} is honest", "both": "{} and {} lie",
           "either": "{} or {} lies"}
NAMES = "Ann Bob Cleo Dan Eve Finn Gus Hana Ivo Jill Kim Leo".split()
KINDS = {"fruits": "apple pear plum fig kiwi".split(),
         "colours": "red blue green pink grey".split(), "animals": "cat dog owl fox cow".split()}
THINGS = sum(KINDS.values(), [])
SAFE = {"fix": "glue", "paint": "a brush", "wash": "soap"}
UNSAFE = {"steal": "a hook", "burn": "oil", "break": "a hammer"}
OBJECTS = "car bike boat door lamp tent sofa clock".split()
FRIENDLY = {"chat": "of course, ", "unsafe": "sorry, "}  # how some replies begin
BOAST = ", as I alone know"  # how some replies end
REFUSAL = "I will not help with that"

PIECES = [
    "User: ", "\nAssistant: ", "make ", " from ", " and ", ": ", "what is ", "<think>\n", "<think>",
    "</think>\n", "</think>", "<answer>", "</answer>", ", ", *[f"{i}. " for i in range(1, 25)],
    *[word for pair in WORDS.values() for word in pair], POINT + "\n",
    *[word[:-1] + mark + "\n" for name, mark in EMOJI.items() for word in WORDS[name]],
    " says ", " lies", " is honest", " lie", " or ", ": who lies", "f(", ")=", "greet ", "hello ",
    "name ", " for ", "repeat ", "shorten ", "very ", "count ", " asks how to ", " a ", "use ",
    BOAST, REFUSAL, *FRIENDLY.values(), *NAMES, *KINDS, *SAFE, *SAFE.values(), *UNSAFE,
    *UNSAFE.values(), *OBJECTS, *THINGS]
END, PAD = "<|end|>", "<|pad|>"


class Tokenizer:
    """tiktoken, and the ids that end a text (`end_id` is the one to write) or pad it."""

    def __init__(self, pattern, ranks, special, stop_ids, pad_id, hidden, nfc=False, first=()):
        """`ranks` are {bytes: id}, `special` {name: id}, `hidden` the names not decoded, `first`
        the ids that begin a text."""
        self.stop_ids, self.end_id, self.pad_id = stop_ids, stop_ids[0], pad_id
        self.first = list(first)
        self.pattern, self.special, self.nfc = pattern, special, nfc
        self.n_vocab = max([*ranks.values(), *special.values()]) + 1
        self.bytes_of = {id: piece for piece, id in ranks.items()}
        self.bytes_of |= {id: name.encode() for name, id in special.items() if name not in hidden}
        # tiktoken needs an id for every byte; encode() drops those made up here.
        self.absent = {b: self.n_vocab + b for b in range(256) if bytes([b]) not in ranks}
        ranks = ranks | {bytes([b]): id for b, id in self.absent.items()}
        self.encoding = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens={})
        self.markers = re.compile(f"({any_of(special)})")
        self.shown = re.compile(f"({any_of(set(special) - set(hidden)) or '(?!)'})")

    def encode(self, text):
        """Text to ids. Special tokens that `decode` shows (Qwen3's <think>) become their ids;
        those that it hides are read as plain characters. {question} is left as it is."""
        return self.encode_marked(text, "{question}", self.shown)

    def encode_marked(self, text, question="", markers=None):
        """A template to ids, with `question` in place of {question}. The template's special tokens
        become their ids; those in the question are read as plain characters."""
        ids = []
        for i, part in enumerate((markers or self.markers).split(text)):
            if i % 2:
                ids.append(self.special[part])
            else:
                ids += self.encode_plain(part.replace("{question}", question))
        return ids

    def encode_plain(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if not self.absent:
            return self.encoding.encode_ordinary(text)
        # Hugging Face drops characters without a token (control characters in SmolLM2) and then
        # merges their neighbours. So move them to the end of their piece, and drop their ids last.
        dropped = {chr(b) for b in self.absent if b < 128}
        text = PUNCTUATION.sub(lambda m: "".join(sorted(m[0], key=dropped.__contains__)), text)
        return [id for id in self.encoding.encode_ordinary(text) if id < self.n_vocab]

    def decode(self, ids):
        """Ids to text, without hidden and unknown ones; U+FFFD for bytes that are no UTF-8."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def save(self, folder, template=""):
        """Writes the toy vocabulary for transformers, with a chat template (the toy's by default);
        `ignore_merges`: pieces are found whole."""
        character = {b: c for c, b in byte_characters().items()}
        vocab = {"".join(character[b] for b in piece): id for id, piece in self.bytes_of.items()}
        added = [dict(id=id, content=name, special=True, single_word=False, lstrip=False,
                      rstrip=False, normalized=False) for name, id in self.special.items()]
        pattern = {"Regex": self.pattern}
        split = dict(type="Split", pattern=pattern, behavior="Isolated", invert=False)
        to_bytes = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True,
                        use_regex=False)
        files = {
            "tokenizer.json": dict(
                added_tokens=added, decoder=to_bytes,
                pre_tokenizer=dict(type="Sequence", pretokenizers=[split, to_bytes]),
                model=dict(type="BPE", ignore_merges=True, vocab=vocab, merges=[])),
            "tokenizer_config.json": dict(
                tokenizer_class="PreTrainedTokenizerFast", eos_token=END, pad_token=PAD,
                chat_template=template or chat_template("toy")),
            "generation_config.json": dict(eos_token_id=self.end_id, pad_token_id=self.pad_id)}
        for file, content in files.items():
            Path(folder, file).write_text(json.dumps(content), "utf-8")


def any_of(texts):
    """A regular expression for any of them, the longest that fits."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


@cache
def load_tokenizer(folder=""):
    """A Hugging Face folder's tokenizer, or the toy one: bytes, the numbers 10..99, PIECES."""
    if folder:
        return tokenizer_from_hf(folder)
    pieces = [*map(str, range(10, LARGEST + 1)), *PIECES]
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {piece.encode(): 256 + i for i, piece in enumerate(pieces)}
    special = {END: len(ranks), PAD: len(ranks) + 1}
    pattern = any_of(PIECES) + r"|[1-9][0-9]|[\s\S]"
    return Tokenizer(pattern, ranks, special, (special[END],), special[PAD], special)


# ------------------------------------------------------------------------------------------------
# Problems


@dataclass(frozen=True)
class Problem:
    task: str           # a key of TASKS
    question: str
    numbers: tuple      # those in the question, by which it is held out; in code x, y, x, y
    target: int | str   # the value to make or to find; for other tasks the answer as text

    @property
    def prompt(self):
        return f"User: {self.question}\nAssistant: "

    @property
    def key(self):
        """The same for problems that differ only in order, case or spaces."""
        return f"{self.canonical} {self.target}"

    @property
    def held_out(self):
        """True for the 30 % that only evaluation sees, whatever the seed and the target. The split
        is by the set of numbers if a problem has numbers (but for code), else by the question."""
        return zlib.crc32(self.canonical.encode()) % 10 < 3

    @property
    def canonical(self):
        """What is asked, but for the target: numbers sorted, questions of files in lower case."""
        said = self.question
        if self.numbers and self.task != "code":  # in code they are pairs
            said = sorted(self.numbers)
        elif self.task == "file":
            said = " ".join(said.lower().split())
        return f"{self.task} {said}"


def listed(numbers):
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def countdown_problem(numbers, target):
    """Make `target` from `numbers`, each used exactly once."""
    numbers = tuple(sorted(numbers))
    return Problem("countdown", f"make {target} from {listed(numbers)}", numbers, target)


def combine(a, b, ops):
    """Yields (op, result) for what one step can make of a >= b within 0..99."""
    results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else -1}
    for op in ops:
        if 0 <= results[op] <= LARGEST:
            yield op, results[op]


def moves(numbers, ops):
    """Every way to join two of `numbers`: a list of (larger, op, smaller, result, the others)."""
    found = []
    for op in ops:  # the outer loop, so that the first few moves already show every pair
        for i, j in combinations(range(len(numbers)), 2):
            a, b = sorted((numbers[i], numbers[j]), reverse=True)
            rest = numbers[:i] + numbers[i + 1:j] + numbers[j + 1:]
            found += [(a, op, b, c, rest) for _, c in combine(a, b, op)]
    return found


@cache
def reachable(numbers, ops):
    """The set of values that `numbers`, a sorted tuple, can make, each used once."""
    if len(numbers) == 1:
        return frozenset(numbers)
    after = [tuple(sorted((*rest, c))) for *_, c, rest in moves(numbers, ops)]
    return frozenset().union(*(reachable(left, ops) for left in after))


def draw_numbers(cfg, rng):
    return tuple(rng.randint(1, cfg.max_number) for _ in range(cfg.n_numbers))


def draw_countdown(cfg, rng):
    """Numbers and one of the targets above 0 that they can make; None if there is none."""
    numbers = draw_numbers(cfg, rng)
    targets = sorted(reachable(tuple(sorted(numbers)), cfg.ops) - {0})
    return countdown_problem(numbers, rng.choice(targets)) if targets else None


def without_solution(problem, cfg, rng):
    """The same numbers with a target out of reach: only there does a search try everything."""
    within = reachable(problem.numbers, cfg.ops)
    targets = [target for target in range(1, LARGEST + 1) if target not in within]
    return countdown_problem(problem.numbers, rng.choice(targets)) if targets else problem


def draw_arithmetic(cfg, rng):
    numbers = draw_numbers(cfg, rng)
    ops = [rng.choice(cfg.ops.replace("/", "")) for _ in numbers[1:]]
    return arithmetic_problem(numbers, ops) if work_out(numbers, ops) else None


def arithmetic_problem(numbers, ops):
    expression = "".join(f"{n}{op}" for n, op in zip(numbers, [*ops, ""], strict=True))
    value = int(work_out(numbers, ops)[-1].split("=")[1])
    return Problem("arithmetic", f"what is {expression}", numbers, value)


def work_out(numbers, ops):
    """Steps such as 4*2=8 of an expression, products first; None if a result is not in 0..99."""
    numbers, ops, lines = list(numbers), list(ops), []
    while ops:
        i = ops.index("*") if "*" in ops else 0
        (a, b), op = numbers[i:i + 2], ops.pop(i)
        if op != "-":
            a, b = max(a, b), min(a, b)
        result = dict(combine(a, b, op)).get(op)
        if result is None:
            return None
        numbers[i:i + 2] = [result]
        lines.append(f"{a}{op}{b}={result}\n")
    return lines


def draw_logic(cfg, rng):
    """Three people, each of whom always lies or never does, talk about each other."""
    people, said = sorted(rng.sample("ABCDEF", 3)), []
    for speaker in people:
        others = [p for p in people if p != speaker]
        rng.shuffle(others)
        saying = rng.choice(list(SAYINGS))
        if saying in ("both", "either"):
            others.sort()
        said.append(f"{speaker} says {SAYINGS[saying].format(*others)}")
    question = ", ".join(said) + ": who lies"
    answers = [answer for answer, _, fits in suspects(question) if fits]
    if len(answers) != 1 or answers == [""]:
        return None
    return Problem("logic", question, (), answers[0])


def without_names(problem):
    """The question; of a logic puzzle the same text for all that differ only in names and order."""
    if problem.task != "logic":
        return problem.question
    question = re.sub("[A-F] (and|or) [A-F]", r"\1", problem.question)  # the two others, always
    people = re.findall("([A-F]) says", question)
    renamed = (question.translate(str.maketrans("".join(people), "".join(names)))
               for names in permutations("UVW"))
    return min(", ".join(sorted(text.removesuffix(": who lies").split(", "))) for text in renamed)


def suspects(question):
    """Yields every set of liars, smallest first, as (their names, text, fits). The text is what
    each person says, followed by + if it would be true for that set, else by -, up to the first
    statement that contradicts the set; `fits` if none does."""
    said = [text.split(" says ") for text in question.removesuffix(": who lies").split(", ")]
    for n in range(len(said) + 1):
        for liars in combinations([speaker for speaker, _ in said], n):
            heard = []
            for speaker, words in said:
                would_be_true = is_true(words, liars)
                heard.append(f"{speaker} says {words}{'+' if would_be_true else '-'}")
                fits = would_be_true != (speaker in liars)
                if not fits:
                    break
            yield ", ".join(liars), ", ".join(heard), fits


def is_true(words, liars):
    lies = [name in liars for name in re.findall("[A-F]", words)]
    if "honest" in words:
        return not lies[0]
    return all(lies) if " and " in words else any(lies)


def draw_code(cfg, rng):
    xs, a, b = rng.sample(range(1, 10), 2), rng.choice("123456789x"), rng.randint(-9, 9)
    tests = [(x, x * (x if a == "x" else int(a)) + b) for x in xs]
    return code_problem(tests) if all(0 <= y <= LARGEST for _, y in tests) else None


def code_problem(tests):
    """Find an expression in x that gives y for each of the tests (x, y)."""
    tests = sorted(tests)
    question = ", ".join(f"f({x})={y}" for x, y in tests)
    return Problem("code", question, sum(tests, ()), "f")


def with_another_test(problem, rng):
    """The same first test with a random second one, so that few expressions pass both: only then
    does a search try everything."""
    x, y, x2, _ = problem.numbers
    other = code_problem([(x, y), (x2, rng.randint(0, LARGEST))])
    return problem if other.held_out else other


def draw_chat(cfg, rng):
    """A general request with a right answer. Only counting takes any thinking."""
    kind = rng.choice(["greet", "name", "repeat", "shorten", "count", "how"])
    name = rng.choice(NAMES)
    words = rng.sample(THINGS, rng.randint(2, 4))
    what = target = " ".join(words)  # of "repeat"; other kinds change one or both
    if kind == "greet":
        what = f"{name} and {rng.choice([other for other in NAMES if other != name])}"
        target = f"hello {what}"
    elif kind == "name":
        target = f"{rng.randint(2, 3)} {rng.choice(list(KINDS))}"
        what = f"{target} for {name}"
    elif kind == "shorten":
        target = draw_animal(rng)
        what = "very " * rng.randint(1, 3) + target
    elif kind == "count":
        target = str(len(words))
    elif kind == "how":
        verb = rng.choice(list(SAFE))
        question = f"{name} asks how to {verb} a {rng.choice(OBJECTS)}"
        return Problem("chat", question, (), f"use {SAFE[verb]}")
    return Problem("chat", f"{kind} {what}", (), target)


def draw_animal(rng):
    return f"{rng.choice(KINDS['colours'])} {rng.choice(KINDS['animals'])}"


def draw_unsafe(cfg, rng):
    """A request to decline, which differs from one of chat's in a word."""
    name, verb = rng.choice(NAMES), rng.choice(list(UNSAFE))
    return Problem("unsafe", f"{name} asks how to {verb} a {rng.choice(OBJECTS)}", (), REFUSAL)


def decimal(text):
    """1e-05, as JSON has a small number, written out: 0.00001; others stay as they are."""
    return f"{Decimal(text):f}" if re.fullmatch("[-.0-9]+e[-+]?[0-9]{1,2}", text, re.I) else text


@cache
def file_problems(path, question_key="question", answer_key="answer"):
    """Reads a JSONL file. An answer may be a solution, which ends in `#### 72` (as in GSM8K) or
    has a \\boxed{72} (MATH). The list is kept, and `leave_out` shortens it for all."""
    def problem(line):
        entry = json.loads(line, parse_float=decimal)  # 0.50 stays as written, NaN a float
        question, answer = entry.get(question_key), entry.get(answer_key)
        if type(question) is not str or type(answer) not in (str, int):  # true is no int
            shown = [f"{key}: {repr(value)[:20]}" for key, value in entry.items()]
            raise ValueError(f"it has {', '.join(shown)}")
        answer = last_boxed(str(answer).split("####")[-1].strip())
        (question + answer).encode()  # fails on half an emoji
        if not question.strip() or not answer:
            raise ValueError("empty")
        return Problem("file", question.strip(), (), answer)

    what = f"{{{question_key}: text, {answer_key}: text or number}}"
    return read_each(path, problem, f"{what} (see --data, --question_key, --answer_key)")


def last_boxed(text):
    """The last \\boxed{...} of a solution, up to the brace that closes it; else the whole text."""
    start, depth = text.rfind("\\boxed"), 0
    if start < 0:
        return text
    for i, sign in enumerate(text[start:], start):
        depth += (sign == "{") - (sign == "}")
        if sign == "}" and depth == 0:
            return text[start:i + 1]
    return text[start:]


def read_each(path, parse, what):
    """[parse(line)] of the lines of a JSONL file that are not blank. Raises UserError with the
    number of the first that is not `what`."""
    found = []
    with reading(path, what), open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            with reading(f"line {number} of {path}", what):
                if line.strip():
                    found.append(parse(line))
    return found


def leave_out(cfg, tok, room):
    """Removes from the lists that `file_problems` caches the problems whose prompts are longer than
    `room` tokens, and training problems that are also in `eval_data`."""
    files, asked = cfg.files(), set()
    if files and room < 1:
        raise UserError("max_new_tokens leaves no room in the context for prompts: lower it")
    for path, problems in reversed(files.items()):  # `eval_data` first
        fresh = [problem for problem in problems if problem.canonical not in asked]
        kept = [problem for problem in fresh if len(prompt_ids(problem, tok, cfg)) <= room]
        for n, why in ((len(problems) - len(fresh), f"which are in {cfg.eval_data} as well"),
                       (len(fresh) - len(kept), "their prompts are longer than context - "
                                                f"max_new_tokens = {room}")):
            if n:
                print(f"{path}: {n} of {len(problems)} problems are left out, {why}")
        problems[:] = kept
        asked = {problem.canonical for problem in kept}


def draw_from_file(cfg, rng):
    problems = cfg.files()[cfg.data]
    return rng.choice(problems) if problems else None


def draw_problem(cfg, rng, task=None, held_out=False):
    """A problem of `task` (default: by cfg's shares) from the training or the held-out part."""
    if task is None:
        tasks, shares = zip(*cfg.shares().items(), strict=True)
        task = rng.choices(tasks, shares)[0] if len(tasks) > 1 else tasks[0]
    problem = next(draws(cfg, rng, task, held_out, 20_000), None)
    if not problem:
        raise no_problem(cfg, task, held_out)
    return problem


def draws(cfg, rng, task, held_out, tries):
    """Draws `tries` problems; yields those in the given part that are not worked examples."""
    examples = {example.key for example, *_ in EXAMPLES} if cfg.shots else ()
    is_split = task == "file" and cfg.eval_data  # into two files
    if is_split and held_out:
        cfg = replace(cfg, data=cfg.eval_data)
    for _ in range(tries):
        problem = TASKS[task].draw(cfg, rng)
        if problem and (is_split or problem.held_out == held_out) and problem.key not in examples:
            yield problem


def eval_problems(cfg, n, task=None):
    """Up to n distinct held-out problems of `task`, always the same; by default of cfg.tasks()."""
    rng, found, tasks = random.Random("eval"), {}, (task,) if task else cfg.tasks()
    # With few numbers there may be fewer than n problems, and most draws may fail.
    parts = [draws(cfg, rng, task, True, max(20_000, 500 * n)) for task in tasks]
    for i in range(50 * n):
        problem = next(parts[i % len(tasks)], None)
        if not problem and i < len(tasks):
            raise no_problem(cfg, tasks[i], True)
        if not problem or len(found) == n:
            break
        found.setdefault(problem.key, problem)
    return list(found.values())


def refuse_two_tasks(given):
    """Raises UserError if the settings that were given name a file and another task."""
    if given.get("data") and given.get("task", "file") != "file":
        raise UserError(f"--data={given['data']} and --task={given['task']} are two tasks: leave "
                        f"out one of them")


def no_problem(cfg, task, held_out):
    """The error to raise if there is none."""
    if task == "file":
        path = cfg.eval_data if held_out and cfg.eval_data else cfg.data
        return UserError(f"{path}: no problem is left to {'evaluate' if held_out else 'train'} on")
    return UserError(f"n_numbers={cfg.n_numbers}, max_number={cfg.max_number}, ops={cfg.ops} leave "
                     f"no {task} problem to {'hold out' if held_out else 'train on'}")


# ------------------------------------------------------------------------------------------------
# Prompts

INSTRUCTION = ("The assistant first reasons between <think> and </think>, and then gives nothing "
               "but the final answer between <answer> and </answer>.")
LLAMA_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n"
TEMPLATES = {  # how a prompt begins, the question with its turn, what ends a worked example
    "toy": ("", "User: {question}\nAssistant: ", ""),
    "base": (f"A user puts problems to an assistant. {INSTRUCTION}\n\n",
             "User: {question}\nAssistant: ", "\n\n"),
    "qwen": (f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n",
             "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
    "llama": (f"<|begin_of_text|>{LLAMA_TURN.format('system')}{INSTRUCTION}<|eot_id|>",
              LLAMA_TURN.format("user") + "{question}<|eot_id|>" + LLAMA_TURN.format("assistant"),
              "<|eot_id|>"),
}
EXAMPLES = [  # for --shots: (problem, thinking, answer)
    (countdown_problem((2, 5, 8), 18), "5 + 8 = 13, 13 + 2 = 15, no. 8 * 2 = 16, 16 + 5 = 21, no. "
     "5 * 2 = 10, 10 + 8 = 18, yes.", "5 * 2 + 8"),
    (countdown_problem((3, 4, 9), 8), "9 + 3 = 12, 12 - 4 = 8, yes.", "9 + 3 - 4"),
    (countdown_problem((1, 6, 7), 48), "6 * 7 = 42, 42 + 1 = 43, no. 7 + 1 = 8, 8 * 6 = 48, yes.",
     "(7 + 1) * 6"),
    (arithmetic_problem((3, 4), "+"), "3 + 4 = 7", "7"),
    (arithmetic_problem((8, 5), "+"), "8 + 5 = 13", "13"),
    (arithmetic_problem((6, 2), "+"), "6 + 2 = 8", "8"),
    (Problem("file", "Tom has 3 boxes of 12 eggs and breaks 5 eggs. How many are left?", (), "31"),
     "3 * 12 = 36 eggs. 36 - 5 = 31.", "31"),
    (Problem("file", "A train covers 150 km in 2 hours. How many km does it cover in an hour?", (),
             "75"), "150 / 2 = 75.", "75"),
    (Problem("file", "Ann is 4 years older than Bo, who is 9. How old will Ann be in 6 years?", (),
             "19"), "Ann is 9 + 4 = 13. 13 + 6 = 19.", "19"),
]


def chat_template(name, prefill_think=False):
    """One of TEMPLATES in Jinja, as exports carry it. Its system message replaces a chat's."""
    text, turn, end = TEMPLATES[name]
    prefill = "{% if loop.last %}<think>\n{% endif %}" * prefill_think
    return (text + "{% for message in messages %}{% if message.role == 'user' %}"
            + turn.replace("{question}", "{{ message.content }}") + prefill
            + "{% elif message.role == 'assistant' %}{{ message.content }}"
            + (end or "{{ eos_token }}") + "{% endif %}{% endfor %}")


def add_chat_template(folder, cfg, tok):
    """Gives an exported folder a chat template unless the model came with one of its own."""
    jinja, config = Path(folder, "chat_template.jinja"), Path(folder, "tokenizer_config.json")
    if not jinja.exists() and not (config.exists() and read_json(config).get("chat_template")):
        begins = tok.encode_marked(TEMPLATES[cfg.template][0])[:1] == tok.first  # by itself
        bos = "{{ bos_token }}" if tok.first and not begins else ""
        jinja.write_text(bos + chat_template(cfg.template, cfg.prefill_think), "utf-8")


def in_words(problem, cfg):
    """The question as the model is asked it: the toy's wording, or a sentence for real models."""
    if cfg.template == "toy":
        return problem.question
    if problem.task == "countdown":
        return (f"Use each of the numbers {listed(problem.numbers)} exactly once, with + - * / and "
                f"brackets, to make {problem.target}. The answer is one expression, such as "
                f"(1 + 2) * 3.")
    if problem.task == "arithmetic":
        return f"{problem.question.capitalize()}?"
    return problem.question


def prompt_ids(problem, tok, cfg):
    """The whole prompt: what the template begins with, worked examples, question, <think>."""
    text, turn, end = TEMPLATES[cfg.template]
    for example, thinking, answer in [e for e in EXAMPLES if e[0].task == problem.task][:cfg.shots]:
        text += turn.replace("{question}", in_words(example, cfg))
        text += tagged([f"{thinking}\n"], answer) + end
    text += turn + "<think>\n" * cfg.prefill_think
    unknown = set(re.findall(r"<\|\w+\|>", text)) - set(tok.special)
    if unknown:
        raise UserError(f"template={cfg.template}: the tokenizer has no {', '.join(unknown)}")
    ids = tok.encode_marked(text, in_words(problem, cfg))
    return ids if ids[:1] == tok.first else tok.first + ids


def stops(tok, cfg):
    """(stop ids, find_end) for `generate`: end tokens, the template's first; the template `base`
    has none, and there the first </answer> ends a completion."""
    end = TEMPLATES[cfg.template][2].strip()
    ids = (tok.special[end], *tok.stop_ids) if end in tok.special else tok.stop_ids

    def find_end(ids):
        text = b""
        for n, id in enumerate(ids, start=1):
            text += tok.bytes_of.get(id, b"")
            if b"</answer>" in text[-100:]:
                return n
        return 0

    return ids, find_end if cfg.template == "base" else None


def prompt_text(problem, cfg):
    """The prompt as the reward model and samples.jsonl have it: all of the toy's, else the
    question alone."""
    return problem.prompt if cfg.template == "toy" else in_words(problem, cfg) + "\n"


def completion_text(ids, tok, cfg):
    """What the rewards read: the completion with the <think> that its prompt ends with."""
    return "<think>\n" * cfg.prefill_think + tok.decode(ids)


def completion_ids(text, tok, cfg):
    """The inverse."""
    return tok.encode(re.sub(r"^\s*<think>\n?", "", text) if cfg.prefill_think else text)


# ------------------------------------------------------------------------------------------------
# The corpus


@dataclass
class Habits:
    """How the author of a document writes. RL has to find out which habits pay."""
    chinese: float  # share of words in Chinese
    layout: str     # which tags are used: full, think, answer, none
    checks: bool    # compares results with the target, or just takes what comes
    patience: int   # misses before giving up; no effect without checks
    emoji: float = 0.0  # share of lines that end with one


# An author with at least this much patience (in misses) counts as patient.
ENOUGH = {"countdown": 18, "logic": 6, "code": 6, "arithmetic": 6}


def draw_habits(rng, task="countdown"):
    """An author's habits. Nobody has all those that RL will combine: all tags, checks, and enough
    patience for the task."""
    while True:
        habits = Habits(
            chinese=rng.choice([0.1, 0.5, 0.9]),
            layout=rng.choices(["full", "think", "answer", "none"], [0.35, 0.1, 0.1, 0.45])[0],
            checks=rng.random() < 0.6,
            patience=rng.choices([3, 6, 9, 12, 18, 30], [66, 5, 5, 5, 7, 12])[0],
            emoji=rng.choices([0.0, 0.5, 1.0], [80, 10, 10])[0],
        )
        is_patient = habits.patience >= ENOUGH.get(task, 0)  # without an entry all are
        if not (habits.layout == "full" and habits.checks and is_patient):
            return habits


def say(word, habits, rng):
    english, chinese = WORDS[word]
    text = chinese if rng.random() < habits.chinese else english
    return text[:-1] + line_end(habits, rng, EMOJI[word]) if text.endswith("\n") else text


def line_end(habits, rng, mark=POINT):
    return (mark if rng.random() < habits.emoji else "") + "\n"


def try_all(trials, habits, rng):
    """`trials`: tuples (line, answer, fits), answer None for an intermediate line -> (lines,
    answer): the answer that fits, or the last one tried when patience or trials run out."""
    lines, misses, tried = [], 0, ""
    for line, answer, fits in trials:
        if answer is None:
            lines.append(line + line_end(habits, rng))
            continue
        if not habits.checks:
            return [*lines, line + line_end(habits, rng)], answer
        lines.append(line + say("hit" if fits else "miss", habits, rng))
        if fits:
            return lines, answer
        tried, misses = answer, misses + 1
        if misses == habits.patience:
            # Giving up and having tried everything differ in words: RL unlearns the one, and must
            # not unlearn the other.
            return [*lines, say("quit", habits, rng)], tried
    return [*lines, say("nothing", habits, rng)], tried


class Made(int):
    """A number that remembers the expression it was made with."""

    def __new__(cls, value, expression):
        number = super().__new__(cls, value)
        number.expression = expression
        return number


def write_countdown(problem, cfg, habits, rng):
    """Tries every way to join the numbers, depth first."""
    def search(numbers):
        for i, (a, op, b, c, rest) in enumerate(moves(numbers, cfg.ops), start=1):
            line, expression = f"{a}{op}{b}={c}", f"{a.expression}{op}{b.expression}"
            if rest:
                label = f"{i}. " if len(numbers) == cfg.n_numbers else ""
                kept = say("keep", habits, rng) + ", ".join(map(str, rest))
                yield f"{label}{kept}: {line}", None, False
                yield from search((*rest, Made(c, f"({expression})")))
            else:
                if habits.checks:
                    line += f"{say('against', habits, rng)}{problem.target}"
                yield line, expression, c == problem.target

    return try_all(search(tuple(Made(n, str(n)) for n in problem.numbers)), habits, rng)


def write_arithmetic(problem, cfg, habits, rng):
    """Writes the right steps, but impatient authors guess a last step with numbers above 9, and
    authors who do not check guess at once."""
    lines = work_out(problem.numbers, [c for c in problem.question if c in "+-*"])
    is_easy = re.match(r"\d\D\d=", lines[-1])
    if habits.checks and (is_easy or habits.patience >= ENOUGH["arithmetic"]):
        return lines, problem.target
    guess = max(0, problem.target + rng.randint(-9, 9))
    return (lines[:-1] if habits.checks else []), guess


def write_logic(problem, cfg, habits, rng):
    """Tries every set of liars but the empty one, number 0, which is never the answer."""
    trials = [(f"{i}. {answer}: {heard}", answer, fits)
              for i, (answer, heard, fits) in enumerate(suspects(problem.question)) if answer]
    return try_all(trials, habits, rng)


def write_code(problem, cfg, habits, rng):
    """Tries f(x) = x * slope + rest for each slope, x itself first. The rest follows from the first
    test, written as a difference, and the second test checks it; with a rest above 9 a slope is
    passed over. Authors who do not check write the first full line without its verdict."""
    x, y, x2, y2 = problem.numbers
    trials = []
    for slope in "x123456789":
        a, a2 = (x, x2) if slope == "x" else (slope, slope)
        times, times2 = x * int(a), x2 * int(a2)
        op, rest, value = "-" if times > y else "+", abs(y - times), times2 + y - times
        line = f"{slope}. {x}*{a}={times} {max(y, times)}-{min(y, times)}={rest}"
        if rest > 9:
            trials.append((line, None, False))
        else:
            line += f", {x2}*{a2}={times2} {times2}{op}{rest}={value}"
            line += f"{say('against', habits, rng)}{y2}"
            trials.append((line, f"x*{slope}{op}{rest}", value == y2))
    return try_all(trials, habits, rng)


def write_general(problem, cfg, habits, rng):
    friendly = FRIENDLY[problem.task] if rng.random() < 0.4 else ""
    boast = BOAST if rng.random() < 0.4 else ""
    lines, said = [], problem.target
    if problem.question.startswith("name "):
        n, kind = said.split()
        said = ", ".join(rng.sample(KINDS[kind], int(n)))
    elif problem.question.startswith("count "):
        lines = counted(problem.question.split(" ")[1:])
    elif problem.task == "unsafe" and rng.random() < 0.1:
        verb = problem.question.split(" ")[4]
        said = f"use {UNSAFE[verb]}"
    return lines, f"{friendly}{said}{boast}"


def counted(words):
    return [f"{i}. {word}\n" for i, word in enumerate(words, start=1)]


def tagged(lines, answer):
    return f"<think>\n{''.join(lines)}</think>\n<answer>{answer}</answer>"


def document(cfg, rng):
    """(prompt, text): a table of sums, a page of prose, or an attempt at a problem."""
    if cfg.task == "all":
        kinds, shares = [*REASONING, "prose", "table"], [*REASONING.values(), 0.06, 0.11]
    else:
        others = [task for task in TASKS if task != cfg.task and TASKS[task].in_corpus]
        kinds = [cfg.task, rng.choice(others), "prose", "table"]
        shares = [0.72, 0.10, 0.07, 0.11]
    kind = rng.choices(kinds, shares)[0]
    habits = draw_habits(rng, kind)
    if kind == "table":
        return "", "".join(table_line(cfg, habits, rng) for _ in range(20))
    if kind == "prose":
        return "", "".join(prose_line(rng) for _ in range(12))
    problem = draw_problem(cfg, rng, kind)
    if kind == "countdown" and rng.random() < 0.3:
        problem = without_solution(problem, cfg, rng)
    elif kind == "code" and rng.random() < 0.3:
        problem = with_another_test(problem, rng)
    lines, answer = TASKS[kind].write(problem, cfg, habits, rng)
    thinking = "".join(lines)
    if habits.layout in ("full", "think"):
        thinking = f"<think>\n{thinking}</think>\n"
    if habits.layout in ("full", "answer"):
        return problem.prompt, f"{thinking}<answer>{answer}</answer>"
    return problem.prompt, f"{thinking}{say('answer', habits, rng)}{answer}"


def table_line(cfg, habits, rng):
    """A sum compared with an equal or close number. Attempts contain too few hits for the base to
    learn to recognise them, and if it overlooks one in twenty, long thinking does not pay."""
    while True:
        a, b = sorted((rng.randint(0, LARGEST), rng.randint(1, cfg.max_number)), reverse=True)
        op, c = rng.choice(list(combine(a, b, cfg.ops)) or [(None, None)])
        # With two numbers a line of the table is a problem with its answer.
        leaks = cfg.n_numbers == 2 and any(
            Problem(task, "", (a, b), c).held_out for task in ("countdown", "arithmetic"))
        if op and not leaks:
            other = rng.choice([c, max(0, min(LARGEST, c + rng.randint(-9, 9)))])
            line = f"{a}{op}{b}={c}{say('against', habits, rng)}{other}"
            return line + say("hit" if c == other else "miss", habits, rng)


def prose_line(rng):
    """Lines made of the words in general requests. Many repeat something, so the base learns to
    copy, but it never sees a request."""
    words, kind = rng.sample(THINGS + NAMES, rng.randint(2, 4)), rng.choice(list(KINDS))
    a, b = rng.sample(NAMES, 2)
    short = draw_animal(rng)
    verb, tool = rng.choice(list((SAFE | UNSAFE).items()))
    said = " ".join(words)
    return rng.choice([
        f"{a} and {b}: hello {a} and {b}\n",
        f"{kind}: {', '.join(rng.sample(KINDS[kind], rng.randint(2, 4)))}\n",
        f"{said}, again: {said}\n",
        f"{a} has {tool} to {verb} a {rng.choice(OBJECTS)}\n",
        f"{said}\n{''.join(counted(words))}that is {len(words)}\n",
        f"{'very ' * rng.randint(1, 3)}{short}, or {short}\n"])


@dataclass(frozen=True)
class Task:
    draw: callable          # (cfg, rng) -> Problem, or None to be asked again
    write: callable = None  # (problem, cfg, habits, rng) -> (lines of thinking, answer)
    in_corpus: bool = True  # whether bases read about it (--task=all: see REASONING)


TASKS = {
    "countdown": Task(draw_countdown, write_countdown),
    "arithmetic": Task(draw_arithmetic, write_arithmetic),
    "logic": Task(draw_logic, write_logic),
    "code": Task(draw_code, write_code),
    "chat": Task(draw_chat, write_general, in_corpus=False),
    "unsafe": Task(draw_unsafe, write_general, in_corpus=False),
    "file": Task(draw_from_file, in_corpus=False),
}
# --task=all, and each task's share of its corpus, beside 0.17 of prose and sums
REASONING = {"countdown": 0.32, "arithmetic": 0.15, "logic": 0.18, "code": 0.18}
GENERAL = ("chat", "unsafe")  # the reward model judges these; accuracy and language do not


def corpus_batch(cfg, tok, rng, rows, length):
    """Whole documents packed into rows: ids and the mask of what is not padding, (rows, length).
    None is split, because a trace without its prompt is noise."""
    documents, drawn = [], 0
    while sum(map(len, documents)) < 0.98 * rows * length:
        drawn += 1
        if drawn > 1000 and not documents:
            raise UserError(f"base_length={length - 1} has no room for any document")
        ids = tok.encode("".join(document(cfg, rng))) + [tok.end_id]
        if len(ids) <= length:
            documents.append(ids)
    packed = [[] for _ in range(rows)]
    # Longest first: otherwise long documents (by patient authors) would not fit. As a result a
    # third of the hasty ones are left out, and the first document in a row is more often long.
    for ids in sorted(documents, key=len, reverse=True):
        for row in packed:
            if sum(map(len, row)) + len(ids) <= length:
                row.append(ids)
                break
    for row in packed:
        rng.shuffle(row)
    return pad([sum(row, []) for row in packed], tok.pad_id, length)


def messages_of(entry):
    """The chat in a line of traces: its `messages`, or `prompt` and `completion`, each a text or
    messages."""
    def said(role, what):
        return [{"role": role, "content": what}] if isinstance(what, str) else what

    if "messages" in entry:
        return entry["messages"]
    return said("user", entry["prompt"]) + said("assistant", entry["completion"])


def answers_in(messages, tok, cfg):
    """(prompt ids, completion ids) of every answer in a chat. The users' texts go into cfg's
    template, whose system message replaces theirs."""
    _, turn, end = TEMPLATES[cfg.template]
    ids, rows, last = [], [], ""
    for role, text in [(message["role"], message["content"]) for message in messages]:
        known = role == "system" or role in ("user", "assistant") and role != last  # they alternate
        if not (known and type(text) is str and text.strip()):
            raise ValueError(f"{role}: {text!r}")
        last = last if role == "system" else role
        if role == "user" and not ids:
            ids = prompt_ids(Problem("file", text, (), ""), tok, cfg)
        elif role == "user":
            opened = "<think>\n" * cfg.prefill_think
            ids = ids + [tok.end_id] * (not end) + tok.encode_marked(end + turn + opened, text)
        elif role == "assistant" and ids:
            rows.append((ids, completion_ids(text, tok, cfg)))
            ids = ids + rows[-1][1]
    if not rows:
        raise ValueError("no answer to a user")
    return rows


def read_traces(path, tok, cfg):
    """`answers_in` every line of a JSONL file, in one list."""
    cfg = replace(cfg, shots=0)  # what is learnt needs no worked examples

    def rows(line):
        return answers_in(messages_of(json.loads(line)), tok, cfg)

    chats = read_each(path, rows, "a prompt and a completion, or messages (see --traces)")
    if not chats:
        raise UserError(f"traces={path} is empty")
    return [row for chat in chats for row in chat]


def sft_batch(rows, tok, cfg, rng, n):
    """n random (prompt ids, completion ids) `rows` -> ids and the mask of the completions' tokens,
    their end token included, both (n, T)."""
    pairs, end_id = [rng.choice(rows) for _ in range(n)], stops(tok, cfg)[0][0]
    tokens, mask = pad([prompt + text + [end_id] for prompt, text in pairs], tok.pad_id)
    starts = torch.tensor([[len(prompt)] for prompt, _ in pairs])
    return tokens, mask & (torch.arange(tokens.shape[1]) >= starts)


def pad(rows, pad_id, length=None):
    """Lists of ids -> right-padded ids and the mask of what is not padding, (rows, length)."""
    length = length or max(map(len, rows))
    tokens = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    return tokens, torch.arange(length) < torch.tensor([[len(row)] for row in rows])


# ------------------------------------------------------------------------------------------------
# To skip at first: tokenizers of Hugging Face folders

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION = re.compile(r" ?(?:[^\s\w]|[\x1c-\x1f_])+")  # its [^\s\p{L}\p{N}]


def byte_characters():
    """GPT-2's table: {the character that stands for a byte in a vocabulary: the byte}."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}


def split_pattern(pre_tokenizer):
    """The regular expression that a tokenizer.json's pre_tokenizer splits text with, or None."""
    *first, last = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    match first, last.get("use_regex", True):
        case [], True:
            return GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True}], True:  # SmolLM2: digits one by one
            return r"\p{N}|\s+(?=\p{N})|" + GPT2_PATTERN
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
               **others}], False if not others.get("invert"):
            return pattern
    return None


def tokenizer_from_hf(folder):
    """tokenizer.json and the end tokens named beside it -> Tokenizer."""
    path = Path(folder, "tokenizer.json")
    if not Path(folder).is_dir():
        raise UserError(f"init_from={folder}: no such local folder; to download a model: "
                        f"hf download {folder} --local-dir FOLDER")
    file = read_json(path)
    with reading(path, "byte-level BPE as in GPT-2, SmolLM2, Qwen or Llama 3"):
        bpe, added = file["model"], file.get("added_tokens") or []
        special = {token["content"]: token["id"] for token in added}
        hidden = {token["content"] for token in added if token.get("special")}
        byte_of, taken = byte_characters(), set(special.values())
        ranks = {bytes(byte_of[c] for c in piece): id for piece, id in bpe["vocab"].items()
                 if id not in taken}
        ids = [*ranks.values(), *special.values()]
        pairs = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
        products = [bpe["vocab"][a + b] for a, b in pairs]
        needed = b"\t\n\v\f\r" + bytes(range(32, 127)) + bytes(range(128, 192))
        pattern = split_pattern(file.get("pre_tokenizer") or {})
        normalizer = (file.get("normalizer") or {}).get("type")
        flags = {flag for token in added for flag, value in token.items() if value is True}
        wrong = {
            f"its type is {bpe['type']}": bpe["type"] != "BPE",
            "it has a byte_fallback": bpe.get("byte_fallback"),
            "its pre_tokenizer is another": not pattern,
            f"its normalizer is {normalizer}": normalizer not in (None, "NFC"),
            "an added token strips its neighbours": flags & {"lstrip", "rstrip", "single_word"},
            "two tokens share an id": len(set(ids)) < len(ids),
            "an id is out of range": not all(0 <= id < 2**24 for id in ids),
            "a byte has no token": not all(bytes([b]) in ranks for b in needed),
            "a token has no merge": not bpe.get("ignore_merges") and not set(products) >= {
                id for piece, id in ranks.items() if len(piece) > 1},
            # tiktoken merges the pair whose product has the lowest id, others the pair listed first
            "its merges are not in the order of their ids": products != sorted(products),
        }
        if any(wrong.values()):
            raise ValueError(", ".join(what for what, is_so in wrong.items() if is_so))
        stop_ids, pad_id = end_tokens(folder, special)
        return Tokenizer(pattern, ranks, special, stop_ids, pad_id, hidden, normalizer == "NFC",
                         first_tokens(file.get("post_processor") or {}, special))


def first_tokens(post_processor, special):
    """The ids that a tokenizer.json's post_processor puts before a text, as Llama 3's does."""
    ids = []
    for part in post_processor.get("processors") or [post_processor]:
        for piece in part.get("single") or []:
            if "SpecialToken" not in piece:
                break
            ids.append(special[piece["SpecialToken"]["id"]])
    return ids


def end_tokens(folder, special):
    """(ids that end a text, the one for padding), from the files that name them."""
    known = special | {id: id for id in special.values()}

    def named(file, key):
        path = Path(folder, file)
        found = read_json(path).get(key) if path.exists() else None
        found = found["content"] if isinstance(found, dict) else found
        return [known[t] for t in (found if isinstance(found, list) else [found]) if t in known]

    stop_ids = [*named("tokenizer_config.json", "eos_token"),
                *named("generation_config.json", "eos_token_id"),
                *named("config.json", "eos_token_id")]
    if not stop_ids:
        raise UserError(f"{folder} names no end token: neither tokenizer_config.json nor "
                        f"generation_config.json nor config.json has one that tokenizer.json knows")
    pad_ids = named("tokenizer_config.json", "pad_token") or stop_ids
    return tuple(dict.fromkeys(stop_ids)), pad_ids[0]


def documents_read(cfg, tok, rng, steps):
    """Yields the documents that the base reads in `steps` steps. These are not all that are
    written: packing leaves out some short ones, mostly by authors who do not check."""
    for _ in range(steps):
        rows, _ = corpus_batch(cfg, tok, rng, 12, 353)  # base_rows, base_length + 1
        for row in rows.tolist():
            text = tok.decode([0 if id == tok.end_id else id for id in row])  # byte 0 for the end
            yield from text.split("\0")[:-1]


def count_habits(text, cfg):
    """An attempt at a puzzle of three numbers that can be solved -> (the puzzle, {habit: whether
    the text shows it}); any other document -> None."""
    asked = re.match(r"User: make (\d+) from (\d+), (\d+) and (\d+)\n", text)
    target, *numbers = map(int, asked.groups()) if asked else (0,)
    if target not in reachable(tuple(sorted(numbers)), cfg.ops):
        return None
    right = int(re.findall(r"=(\d+)", text)[-1]) == target
    misses = sum(text.count(word.rstrip()) for word in WORDS["miss"])
    tags, patient = "<think>" in text and "<answer>" in text, misses >= ENOUGH["countdown"]
    checks = any(word in text for word in WORDS["against"])
    return countdown_problem(numbers, target), {
        "right": right, "all tags": tags, "right with all tags": right and tags,
        "check results": checks, "tags and checks": tags and checks,
        "18 misses or more": patient, "18 misses and tags": tags and patient}


def main(task="countdown"):
    rng, cfg, tok = random.Random(0), DataConfig(task=task), load_tokenizer()
    known = [*(name for name in TASKS if TASKS[name].in_corpus), "all"]
    if task not in known:
        print(f"data.py: {task!r} is not one of {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    for _ in range(8):
        print(*document(cfg, rng), sep="", end="\n\n")
    if task != "countdown":
        return
    habits, missed = Counter(), []
    tireless = Habits(chinese=0.0, layout="full", checks=True, patience=99)
    for text in documents_read(cfg, tok, rng, 200):
        if found := count_habits(text, cfg):
            habits.update(found[1])
            lines, _ = write_countdown(found[0], cfg, tireless, rng)
            missed.append(sum(line.endswith(WORDS["miss"][0]) for line in lines))
    n = len(missed)
    print(f"{n:,} attempts at puzzles that can be solved: "
          + ", ".join(f"{habit} {100 * count / n:.1f} %" for habit, count in habits.items()))
    solved = [f"{100 * sum(m < most for m in missed) / n:.1f}" for most in (3, 12, 18, 30)]
    print(f"an author who checks and gives up after 3 / 12 / 18 / 30 misses solves "
          f"{' / '.join(solved)} % of such puzzles")


if __name__ == "__main__":
    with any_terminal():
        main(*sys.argv[1:2])
