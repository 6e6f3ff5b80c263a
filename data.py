"""The toy world: tokenizer, problems, and the mixed-quality corpus that the base model reads.

A problem is asked in the User/Assistant template; the corpus shows such conversations the way a web
corpus would: with and without tags, right and wrong, patient and hasty, in two languages. Nothing in it
is the policy that RL is meant to find; `python data.py` prints a few documents and the problems behind them.
"""
import random
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache

import tiktoken
import torch

from model import BadInput, opt


@dataclass
class DataConfig:
    task: str = opt("countdown", "what RL trains on, and most of the corpus is about: countdown or arithmetic")
    n_numbers: int = opt(3, "numbers in a problem, 2 to 4")
    max_number: int = opt(9, "numbers are drawn from 1 to this, at most 99")
    ops: str = opt("+-*", "operations a problem may need, from + - * /")
    eval_problems: int = opt(500, "held-out problems in the final evaluation")

    def check(self):
        """Raises BadInput, naming the field, on a value that no problem can be made with."""
        if self.task not in TASKS:
            raise BadInput(f"task={self.task!r} is not one of {', '.join(TASKS)}")
        if not 2 <= self.n_numbers <= 4:
            raise BadInput(f"n_numbers={self.n_numbers} must be 2, 3 or 4")
        if not 2 <= self.max_number <= LARGEST:
            raise BadInput(f"max_number={self.max_number} must lie between 2 and {LARGEST}")
        if not self.ops or set(self.ops) - set("+-*/") or not set(self.ops) & set("+-*"):
            raise BadInput(f"ops={self.ops!r} must be some of + - * /, and not / alone")
        if self.eval_problems < 1:
            raise BadInput(f"eval_problems={self.eval_problems} must be at least 1")


# ------------------------------------------------------------------------------------------------
# Tokenizer

LARGEST = 99  # the toy world counts with 0..99, one token each
WORDS = {  # each in English and Chinese; one of the two is drawn every time it is used
    "keep": ("keep ", "留 "), "against": (" vs ", " 比 "), "miss": (" no\n", " 不对\n"), "hit": (" yes\n", " 对了\n"),
    "quit": ("I give up\n", "算了\n"), "nothing": ("nothing fits\n", "都不行\n"), "answer": ("answer: ", "答案: "),
}
MISS = WORDS["miss"]
VERDICT = re.compile("|".join(WORDS["miss"] + WORDS["hit"]))
PIECES = ["User: ", "\nAssistant: ", "make ", " from ", " and ", ": ", "what is ", "<think>\n", "<think>", "</think>\n", "</think>",
          "<answer>", "</answer>", ", "] + [f"{i}. " for i in range(1, 25)] + [w for pair in WORDS.values() for w in pair]


class Tokenizer:
    """A tiktoken Encoding plus its end and pad ids, which no text encodes to and no text is decoded from."""

    def __init__(self, encoding, end_id, pad_id):
        self.encoding, self.end_id, self.pad_id = encoding, end_id, pad_id
        self.stop_ids = (end_id,)
        self.n_vocab = encoding.n_vocab
        special = {encoding.encode_single_token(name) for name in encoding.special_tokens_set}
        self.bytes_of = {i: encoding.decode_single_token_bytes(i) for i in set(range(self.n_vocab)) - special}

    def encode(self, text):
        """Text to ids; what looks like a special token in the text is encoded as plain characters."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Ids to text. Special and unknown ids are left out; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", errors="replace")


@lru_cache(maxsize=None)
def load_tokenizer():
    """The toy vocabulary: 256 bytes, so that any text round-trips, the numbers 10..99 and the words above."""
    pieces = [bytes([b]) for b in range(256)] + [str(n).encode() for n in range(10, LARGEST + 1)] + [p.encode() for p in PIECES]
    ranks = {piece: i for i, piece in enumerate(pieces)}
    end_id, pad_id = len(ranks), len(ranks) + 1
    escape = lambda p: "".join(f"\\x{{{ord(c):x}}}" for c in p)
    pattern = "|".join([escape(p) for p in sorted(PIECES, key=len, reverse=True)] + ["[1-9][0-9]", r"[\s\S]"])
    encoding = tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|end|>": end_id, "<|pad|>": pad_id})
    return Tokenizer(encoding, end_id, pad_id)


# ------------------------------------------------------------------------------------------------
# Problems


@dataclass(frozen=True)
class Problem:
    task: str      # a key of TASKS
    question: str  # what the user asks
    numbers: tuple  # the numbers in it
    target: int    # countdown: the value to make; arithmetic: the value of the expression

    @property
    def prompt(self):
        """The text the model continues."""
        return f"User: {self.question}\nAssistant: "

    @property
    def key(self):
        """Canonical form: two problems with the same numbers in any order and the same target are one."""
        return f"{self.task} {sorted(self.numbers)} {self.target}"

    @property
    def held_out(self):
        """True for the 30 % of all problems that only evaluation sees, the same for every seed."""
        return zlib.crc32(self.key.encode()) % 10 < 3


def countdown_problem(numbers, target):
    """Make `target` from `numbers`, each used exactly once. In ascending order, whatever theirs: the same puzzle reads the same."""
    *most, last = numbers = sorted(numbers)
    return Problem("countdown", f"make {target} from {', '.join(map(str, most))} and {last}", tuple(numbers), target)


def combine(a, b, ops):
    """What one step can make of a >= b within 0..99: yields (op, result)."""
    for op in ops:
        c = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else -1}[op]
        if 0 <= c <= LARGEST:
            yield op, c


def steps(numbers, ops):
    """Every way to join two of `numbers`, the larger first: a list of (a, op, b, result, the others).
    All pairs of one operation, then the next: so even short attempts at a problem show every pair."""
    found = []
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            a, b = sorted((numbers[i], numbers[j]), reverse=True)
            rest = numbers[:i] + numbers[i + 1:j] + numbers[j + 1:]
            found += [(a, op, b, c, rest) for op, c in combine(a, b, ops)]
    return sorted(found, key=lambda step: ops.index(step[1]))


@lru_cache(maxsize=None)
def reachable(numbers, ops):
    """Every value that `numbers` (a sorted tuple) can make when each is used once: a frozenset."""
    if len(numbers) == 1:
        return frozenset(numbers)
    return frozenset().union(*(reachable(tuple(sorted(rest + (c,))), ops) for *_, c, rest in steps(numbers, ops)))


def draw_countdown(cfg, rng):
    numbers = tuple(rng.randint(1, cfg.max_number) for _ in range(cfg.n_numbers))
    targets = sorted(reachable(tuple(sorted(numbers)), cfg.ops) - {0})
    return countdown_problem(numbers, rng.choice(targets)) if targets else draw_countdown(cfg, rng)


def without_solution(problem, cfg, rng):
    """The same numbers with a target out of their reach. Nobody promises a reader of the corpus that a puzzle can
    be solved, and only these show how a search ends that has tried everything."""
    others = set(range(1, LARGEST + 1)) - reachable(tuple(sorted(problem.numbers)), cfg.ops)
    problems = [p for p in (countdown_problem(problem.numbers, target) for target in sorted(others)) if not p.held_out]
    return rng.choice(problems) if problems else problem


def draw_arithmetic(cfg, rng):
    numbers = tuple(rng.randint(1, cfg.max_number) for _ in range(cfg.n_numbers))
    ops = [rng.choice([op for op in cfg.ops if op != "/"]) for _ in numbers[1:]]
    lines = work_out(numbers, ops)
    if lines is None:
        return draw_arithmetic(cfg, rng)
    expression = str(numbers[0]) + "".join(f"{op}{n}" for op, n in zip(ops, numbers[1:]))
    return Problem("arithmetic", f"what is {expression}", numbers, int(lines[-1].split("=")[1]))


def work_out(numbers, ops):
    """The steps of an expression, products first, as lines like 4*2=8; None if a value leaves 0..99."""
    numbers, ops, lines = list(numbers), list(ops), []
    while ops:
        i = ops.index("*") if "*" in ops else 0
        a, b, op = numbers[i], numbers[i + 1], ops.pop(i)
        if op != "-":
            a, b = max(a, b), min(a, b)
        result = dict(combine(a, b, op)).get(op)
        if result is None:
            return None
        numbers[i:i + 2] = [result]
        lines.append(f"{a}{op}{b}={result}\n")
    return lines


def draw_problem(cfg, rng, task=None, held_out=False):
    """One random problem of `task` (default cfg.task), from the training or the held-out part."""
    while True:
        problem = TASKS[task or cfg.task].draw(cfg, rng)
        if problem.held_out == held_out:
            return problem


def eval_problems(cfg, n):
    """Up to n distinct held-out problems, always the same ones."""
    rng, found = random.Random("eval"), {}
    for _ in range(50 * n):  # a small world may not hold n
        problem = draw_problem(cfg, rng, held_out=True)
        found.setdefault(problem.key, problem)
        if len(found) == n:
            break
    return list(found.values())


# ------------------------------------------------------------------------------------------------
# The corpus


@dataclass
class Habits:
    """How the author of one document writes. RL will have to find out which habits pay."""
    chinese: float  # share of words in Chinese
    layout: str     # which tags are used: full, think, answer, none
    checks: bool    # compares results with the target, or just takes what comes
    patience: int   # misses before giving up


def draw_habits(rng):
    return Habits(
        chinese=rng.choice([0.1, 0.5, 0.9]),
        layout=rng.choices(["full", "think", "answer", "none"], [0.35, 0.1, 0.1, 0.45])[0],
        checks=rng.random() < 0.6,
        patience=rng.choices([3, 6, 9, 12, 18, 30], [66, 5, 5, 5, 7, 12])[0],  # most give up after a branch or two
    )


def say(word, habits, rng):
    return WORDS[word][rng.random() < habits.chinese]


def compare(value, target, habits, rng):
    return f"{say('against', habits, rng)}{target}{say('hit' if value == target else 'miss', habits, rng)}"


class Made(int):
    """A number that remembers the expression it was made with."""

    def __new__(cls, value, expression):
        number = super().__new__(cls, value)
        number.expression = expression
        return number


def write_countdown(problem, cfg, habits, rng):
    """Thinking by trial: (lines, answer). Depth first; the answer is the first that
    fits, or else the last one tried when patience or possibilities end."""
    lines, misses, tried = [], 0, ""

    def search(numbers):
        nonlocal misses, tried
        for i, (a, op, b, c, rest) in enumerate(steps(numbers, cfg.ops), start=1):
            expression = f"{a.expression}{op}{b.expression}"
            if rest:
                number = f"{i}. " if len(numbers) == cfg.n_numbers else ""
                lines.append(f"{number}{say('keep', habits, rng)}{', '.join(map(str, rest))}: {a}{op}{b}={c}\n")
                answer = search(rest + (Made(c, f"({expression})"),))
                if answer:
                    return answer
            elif not habits.checks:
                lines.append(f"{a}{op}{b}={c}\n")
                return expression
            else:
                hit = c == problem.target
                lines.append(f"{a}{op}{b}={c}{compare(c, problem.target, habits, rng)}")
                tried = expression
                misses += not hit
                if hit or misses == habits.patience:
                    return expression

    answer = search(tuple(Made(n, str(n)) for n in problem.numbers))
    if answer is None:
        lines.append(say("nothing", habits, rng))
    elif habits.checks and not lines[-1].endswith(WORDS["hit"]):
        lines.append(say("quit", habits, rng))  # not the same words: RL unlearns giving up, and must not unlearn to stop
    return lines, answer or tried


def write_arithmetic(problem, cfg, habits, rng):
    """Step by step and right, or a guess without thinking that is near: (lines, answer)."""
    if not habits.checks:
        return [], max(0, problem.target + rng.randint(-9, 9))
    expression = problem.question.removeprefix("what is ")
    ops = [c for c in expression if c in "+-*"]
    return work_out(problem.numbers, ops), problem.target


def goes_on_after_a_miss(text):
    """Whether a trace checks a result against the target, misses, and checks another."""
    verdicts = VERDICT.findall(text)
    return any(verdict.startswith(MISS) for verdict in verdicts[:-1])


def document(cfg, rng):
    """One document of the corpus, as (prompt, text): a table of sums, or somebody's attempt at a problem."""
    kind = rng.choices([cfg.task, rng.choice([task for task in TASKS if task != cfg.task]), "table"], [0.81, 0.04, 0.15])[0]
    habits = draw_habits(rng)
    if kind == "table":
        return "", "".join(table_line(cfg, habits, rng) for _ in range(20))
    problem = draw_problem(cfg, rng, kind)
    if kind == "countdown" and rng.random() < 0.3:
        problem = without_solution(problem, cfg, rng)
    lines, answer = TASKS[kind].write(problem, cfg, habits, rng)
    think, answer = "".join(lines), str(answer)
    if habits.layout in ("full", "think"):
        think = f"<think>\n{think}</think>\n"
    answer = f"<answer>{answer}</answer>" if habits.layout in ("full", "answer") else say("answer", habits, rng) + answer
    return problem.prompt, think + answer


def table_line(cfg, habits, rng):
    """A sum compared with a number that it equals or nearly equals. In the attempts above hits are rare, and
    a base that overlooks one in twenty makes long thinking useless to RL."""
    while True:
        a, b = sorted((rng.randint(0, LARGEST), rng.randint(1, cfg.max_number)))[::-1]
        op, c = rng.choice(list(combine(a, b, cfg.ops)) or [(None, None)])
        if op:
            other = rng.choice([c, max(0, min(LARGEST, c + rng.randint(-9, 9)))])
            return f"{a}{op}{b}={c}{compare(c, other, habits, rng)}"


@dataclass(frozen=True)
class Task:
    draw: callable   # (cfg, rng) -> Problem
    write: callable  # (problem, cfg, habits, rng) -> (thinking lines, answer), as found in the corpus


TASKS = {
    "countdown": Task(draw_countdown, write_countdown),
    "arithmetic": Task(draw_arithmetic, write_arithmetic),
}


def corpus_batch(cfg, tokenizer, rng, rows, length):
    """Whole documents packed into rows: token ids (rows, length), padded, and a mask of the same shape that
    is False on the padding. A row starts with a document and none is split, because a trace without its
    prompt is noise. The longest are placed first, so that it is not the patient authors who find no room."""
    documents, total, drawn = [], 0, 0
    while total < 0.98 * rows * length:
        drawn += 1
        if drawn > 1000 and not documents:
            raise BadInput(f"base_length={length - 1} has no room for any document of the corpus: raise it")
        prompt, text = document(cfg, rng)
        ids = tokenizer.encode(prompt + text) + [tokenizer.end_id]
        if len(ids) <= length:
            documents.append(ids)
            total += len(ids)
    packed = [[] for _ in range(rows)]
    for ids in sorted(documents, key=len, reverse=True):
        row = next((row for row in packed if sum(map(len, row)) + len(ids) <= length), None)
        if row is not None:
            row.append(ids)
    for row in packed:
        rng.shuffle(row)
    return pad([sum(row, []) for row in packed], tokenizer.pad_id, length)


def pad(rows, pad_id, length=None):
    """Lists of ids -> right-padded ids and the mask of what is not padding, both (rows, length)."""
    length = length or max(map(len, rows))
    tokens = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    return tokens, torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]


if __name__ == "__main__":
    rng = random.Random(0)
    for _ in range(8):
        print(*document(DataConfig(), rng), sep="", end="\n\n")
