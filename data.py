"""The toy world: tokenizer, problems and prompts, and the corpus of mixed quality that the base
reads.

A problem is asked in the User/Assistant template. The corpus shows such conversations as a web
corpus would: with and without tags, right and wrong, patient and hasty, in two languages.

    python data.py      # a few documents, and how many of their authors are right
"""
import json
import os
import random
import re
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import tiktoken
import torch

from model import UserError, opt, read_json

LARGEST = 99  # the toy world counts with 0..99, one token each


@dataclass
class DataConfig:
    task: str = opt("countdown", "what RL trains on, and what most of the corpus is about: "
                    "countdown, arithmetic, logic or code")
    mix: str = opt("", "what a stage trains on beside its task, with shares, such as "
                   "task:2,chat:1,unsafe:1; none = task alone")
    n_numbers: int = opt(3, "numbers in a problem", least=2, most=4)
    max_number: int = opt(9, "numbers are drawn from 1 to this", least=2, most=LARGEST)
    ops: str = opt("+-*", "operations a problem may need, from + - * /")
    eval_problems: int = opt(500, "held-out problems in the final evaluation", least=1)
    data: str = opt("", "JSONL file of {question, answer} lines to take problems from; task is "
                    "then `file`")
    template: str = opt("toy", "how problems are put to the model: toy, or for real models base, "
                        "qwen (also SmolLM2) or llama", choices=("toy", "base", "qwen", "llama"))
    shots: int = opt(0, "worked examples in the prompt, for real models", least=0, most=3)
    prefill_think: bool = opt(False, "the prompt ends with <think>, which then counts as the "
                              "completion's first word")

    def __post_init__(self):
        if self.data:
            self.task = "file"

    def rules(self):
        """Raises UserError on a combination that no problem can be made with."""
        if self.task not in TASKS:
            raise UserError(f"task={self.task!r} is not one of {', '.join(TASKS)}")
        if not self.ops or set(self.ops) - set("+-*/") or self.ops.strip("/") == "":
            raise UserError(f"ops={self.ops!r} must be some of + - * /, and not / alone")
        if self.shots and self.template == "toy":
            raise UserError(f"shots={self.shots} needs another template than toy")
        if self.task == "file" and not self.data:
            raise UserError("task='file' needs --data=FILE")
        if self.data:
            file_problems(self.data)
        for name, share in self.shares().items():
            if name not in TASKS or name == "file" != self.task or not 0 < share < 1e6:
                raise UserError(f"mix={self.mix!r} must be tasks and their shares, such as "
                                f"task:2,chat:1; tasks are {', '.join(TASKS)}")

    def shares(self):
        """{task: its share of the training problems}, from `mix`; 0 for a share that is no
        number."""
        shares = Counter()
        for part in (self.mix or "task").split(","):
            name, _, share = part.strip().partition(":")
            if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", share or "1"):
                share = "0"
            shares[self.task if name == "task" else name] += float(share or "1")
        return dict(shares)


# ------------------------------------------------------------------------------------------------
# Tokenizer

WORDS = {  # each in English and Chinese; one of the two is drawn every time it is used
    "keep": ("keep ", "留 "), "against": (" vs ", " 比 "), "miss": (" no\n", " 不对\n"),
    "hit": (" yes\n", " 对了\n"), "quit": ("I give up\n", "算了\n"),
    "nothing": ("nothing fits\n", "都不行\n"), "answer": ("answer: ", "答案: "),
}
EMOJI = {"miss": " 🤔", "hit": " 🎉", "quit": " 😴", "nothing": " 😴"}  # after such a line, ...
POINT = " 👉"                                                          # ... and after any other

# The words of logic, code, and general requests.
SAYINGS = {"lies": "{} lies", "honest": "{} is honest", "both": "{} and {} lie",
           "either": "{} or {} lies"}
NAMES = "Ann Bob Cleo Dan Eve Finn Gus Hana Ivo Jill Kim Leo".split()
KINDS = {"fruits": "apple pear plum fig kiwi".split(),
         "colours": "red blue green pink grey".split(), "animals": "cat dog owl fox cow".split()}
SAFE = {"fix": "glue", "paint": "a brush", "wash": "soap"}
UNSAFE = {"steal": "a hook", "burn": "oil", "break": "a hammer"}
OBJECTS = "car bike boat door lamp tent sofa clock".split()
FRIENDLY = {"chat": "of course, ", "unsafe": "sorry, "}  # how some begin a reply
BOAST = ", as I alone know"                              # and how some end it
REFUSAL = "I will not help with that"

PIECES = [
    "User: ", "\nAssistant: ", "make ", " from ", " and ", ": ", "what is ", "<think>\n", "<think>",
    "</think>\n", "</think>", "<answer>", "</answer>", ", ", *[f"{i}. " for i in range(1, 25)],
    *[word for pair in WORDS.values() for word in pair], POINT + "\n",
    *[word[:-1] + mark + "\n" for name, mark in EMOJI.items() for word in WORDS[name]],
    " says ", " lies", " is honest", " lie", " or ", ": who lies", "f(", ")=", "greet ", "hello ",
    "name ", " for ", "repeat ", "shorten ", "very ", "count ", " asks how to ", " a ", "use ",
    BOAST, REFUSAL, *FRIENDLY.values(), *NAMES, *KINDS, *SAFE, *SAFE.values(), *UNSAFE,
    *UNSAFE.values(), *OBJECTS, *[word for words in KINDS.values() for word in words]]


class Tokenizer:
    """A tiktoken Encoding, the ids that end a text (the first is the one to write), the one to
    pad."""

    def __init__(self, pattern, ranks, special, stop_ids, pad_id, hidden, nfc=False):
        """`pattern` splits text, `ranks` {bytes: id} merges it, `special` {name: id} are tokens
        that plain text cannot make, of which `hidden` are left out when decoding; `nfc`: Unicode
        is brought to its composed form first (Qwen)."""
        self.stop_ids, self.end_id, self.pad_id = stop_ids, stop_ids[0], pad_id
        self.pattern, self.nfc, self.special = pattern, nfc, special
        self.n_vocab = max([*ranks.values(), *special.values()]) + 1
        self.bytes_of = {id: piece for piece, id in ranks.items()}
        self.bytes_of |= {id: name.encode() for name, id in special.items() if name not in hidden}
        # tiktoken wants a token for every byte. encode() drops those that the vocabulary lacks.
        self.absent = {b: self.n_vocab + b for b in range(256) if bytes([b]) not in ranks}
        ranks = ranks | {bytes([b]): id for b, id in self.absent.items()}
        self.encoding = tiktoken.Encoding("ours", pat_str=pattern, special_tokens=special,
                                          mergeable_ranks=ranks)
        longest_first = sorted(special, key=len, reverse=True)
        self.markers = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text):
        """Text to ids; what looks like a special token in the text is encoded as plain
        characters."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if self.absent:
            return self.encode_without_absent(text)
        return self.encoding.encode_ordinary(text)

    def encode_without_absent(self, text):
        """For vocabularies that lack some bytes (SmolLM2: control characters and unassigned
        planes). Hugging Face drops them within their piece, so that their neighbours may merge:
        such a piece is replaced by a stand-in character and encoded by itself."""
        stand_in = next((b for b in self.absent if b < 128), None)
        pieces = []

        def replace(found):
            raw = found[0].encode()
            kept = bytes(b for b in raw if b not in self.absent)
            if kept == raw or stand_in is None:
                return found[0]
            pieces.append(kept)
            return " " * raw.startswith(b" ") + chr(stand_in)

        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # surrogates
        text, ids = re.sub(r" ?(?:[^\s\w]|[\x1c-\x1f_])+", replace, text), []
        for id in self.encoding.encode_ordinary(text):
            if id == self.absent.get(stand_in):
                kept = pieces.pop(0)
                del ids[len(ids) - kept.startswith(b" "):]  # the space before it is the piece's own
                ids += self.encoding._encode_single_piece(kept) if kept else []
            elif id < self.n_vocab:
                ids.append(id)
        return ids

    def encode_marked(self, text, question=""):
        """Text of our own, such as a template, to ids: special tokens in it are meant. Those in the
        question, which replaces {question}, are not."""
        ids = []
        for i, part in enumerate(self.markers.split(text)):
            if i % 2:  # a marker
                ids.append(self.special[part])
            else:
                ids += self.encode(part.replace("{question}", question))
        return ids

    def decode(self, ids):
        """Ids to text. Hidden and unknown ids are left out; bytes that are no UTF-8 become
        U+FFFD."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def save(self, folder):
        """Writes the toy vocabulary as the tokenizer.json that transformers and `load_tokenizer`
        read. Its pieces are all found whole (`ignore_merges`) and never merged."""
        character = {b: c for c, b in byte_characters().items()}
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        added = [{"id": id, "content": name, **dict.fromkeys(flags, False), "special": True}
                 for name, id in self.special.items()]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated",
                 "invert": False}
        vocab = {"".join(character[b] for b in piece): id for id, piece in self.bytes_of.items()}
        name_of = {id: name for name, id in self.special.items()}
        files = {
            "tokenizer.json": {
                "version": "1.0", "added_tokens": added, "normalizer": None, "decoder": byte_level,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
                "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": []}},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name_of[self.end_id],
                "pad_token": name_of[self.pad_id]},
            "generation_config.json": {"eos_token_id": self.end_id, "pad_token_id": self.pad_id}}
        for file, content in files.items():
            with open(os.path.join(folder, file), "w", encoding="utf-8") as f:
                json.dump(content, f, ensure_ascii=False, indent=1)


@lru_cache(maxsize=None)
def load_tokenizer(folder=""):
    """The tokenizer of a Hugging Face folder; by default the toy vocabulary: 256 bytes, so that any
    text round-trips, the numbers 10..99 and the words above."""
    if folder:
        return tokenizer_from_hf(folder)
    numbers = [str(n) for n in range(10, LARGEST + 1)]
    pieces = [bytes([b]) for b in range(256)] + [piece.encode() for piece in numbers + PIECES]
    ranks = {piece: i for i, piece in enumerate(pieces)}
    special = {"<|end|>": len(ranks), "<|pad|>": len(ranks) + 1}
    longest_first = sorted(PIECES, key=len, reverse=True)
    words = ["".join(f"\\x{{{ord(c):x}}}" for c in word) for word in longest_first]
    pattern = "|".join([*words, "[1-9][0-9]", r"[\s\S]"])
    return Tokenizer(pattern, ranks, special, (special["<|end|>"],), special["<|pad|>"], special)


# ------------------------------------------------------------------------------------------------
# Problems


@dataclass(frozen=True)
class Problem:
    task: str           # a key of TASKS
    question: str       # what the user asks
    numbers: tuple      # the numbers in it, if its answer is to be checked with them
    target: int | str   # the value to make or to find; for other tasks the answer, or what it must
                        # satisfy, as text

    @property
    def prompt(self):
        """The text the model continues."""
        return f"User: {self.question}\nAssistant: "

    @property
    def key(self):
        """Canonical form: the same numbers in any order with the same target are one problem."""
        is_set = self.task in ("countdown", "arithmetic")
        return f"{self.task} {sorted(self.numbers) if is_set else self.question} {self.target}"

    @property
    def held_out(self):
        """True for the 30 % of all problems that only evaluation sees, the same for every seed."""
        return zlib.crc32(self.key.encode()) % 10 < 3


def countdown_problem(numbers, target):
    """Make `target` from `numbers`, each used exactly once. The same puzzle always reads the
    same."""
    *most, last = numbers = sorted(numbers)
    question = f"make {target} from {', '.join(map(str, most))} and {last}"
    return Problem("countdown", question, tuple(numbers), target)


def combine(a, b, ops):
    """What one step can make of a >= b within 0..99: yields (op, result)."""
    for op in ops:
        quotient = a // b if b and a % b == 0 else -1
        c = {"+": a + b, "-": a - b, "*": a * b, "/": quotient}[op]
        if 0 <= c <= LARGEST:
            yield op, c


def moves(numbers, ops):
    """Every way to join two of `numbers`, the larger first: a list of (a, op, b, result, the
    others). All pairs of one operation, then the next: even short attempts at a problem show every
    pair."""
    found = []
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            a, b = sorted((numbers[i], numbers[j]), reverse=True)
            rest = numbers[:i] + numbers[i + 1:j] + numbers[j + 1:]
            found += [(a, op, b, c, rest) for op, c in combine(a, b, ops)]
    return sorted(found, key=lambda move: ops.index(move[1]))


@lru_cache(maxsize=None)
def reachable(numbers, ops):
    """Every value that `numbers` (a sorted tuple) can make when each is used once: a frozenset."""
    if len(numbers) == 1:
        return frozenset(numbers)
    after = [tuple(sorted((*rest, c))) for *_, c, rest in moves(numbers, ops)]
    return frozenset().union(*(reachable(left, ops) for left in after))


def draw_countdown(cfg, rng):
    numbers = tuple(rng.randint(1, cfg.max_number) for _ in range(cfg.n_numbers))
    targets = sorted(reachable(tuple(sorted(numbers)), cfg.ops) - {0})
    return countdown_problem(numbers, rng.choice(targets)) if targets else draw_countdown(cfg, rng)


def without_solution(problem, cfg, rng):
    """The same numbers with a target out of their reach: only such puzzles show how a search ends
    that has tried everything."""
    others = set(range(1, LARGEST + 1)) - reachable(tuple(sorted(problem.numbers)), cfg.ops)
    problems = [countdown_problem(problem.numbers, target) for target in sorted(others)]
    problems = [p for p in problems if not p.held_out]
    return rng.choice(problems) if problems else problem


def draw_arithmetic(cfg, rng):
    numbers = tuple(rng.randint(1, cfg.max_number) for _ in range(cfg.n_numbers))
    ops = [rng.choice([op for op in cfg.ops if op != "/"]) for _ in numbers[1:]]
    lines = work_out(numbers, ops)
    if lines is None:
        return draw_arithmetic(cfg, rng)
    rest = zip(ops, numbers[1:], strict=True)
    expression = str(numbers[0]) + "".join(f"{op}{n}" for op, n in rest)
    return Problem("arithmetic", f"what is {expression}", numbers, int(lines[-1].split("=")[1]))


def work_out(numbers, ops):
    """The steps of an expression, products first, as lines like 4*2=8; None if one leaves 0..99."""
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


def draw_logic(cfg, rng):
    """Three people, each of whom always lies or never does, talk about each other: who lies?"""
    people = sorted(rng.sample("ABCDEF", 3))
    said, texts = [], []
    for speaker in people:
        others = [p for p in people if p != speaker]
        rng.shuffle(others)
        saying = rng.choice(list(SAYINGS))
        said.append((speaker, saying, *others))
        shown = sorted(others) if saying in ("both", "either") else others
        texts.append(f"{speaker} says {SAYINGS[saying].format(*shown)}")
    answers = [liars for liars in [(), *suspects(people)] if consistent(said, liars)]
    if len(answers) != 1 or not answers[0]:
        return draw_logic(cfg, rng)
    return Problem("logic", ", ".join(texts) + ": who lies", (), ", ".join(answers[0]))


def suspects(people):
    """Every set of people, smallest first, as tuples."""
    return [liars for n in (1, 2, 3) for liars in combinations(people, n)]


def consistent(said, liars):
    """Whether exactly the `liars` among the speakers of (speaker, saying, other, third) say
    untruths."""
    return all(is_true(statement, liars) != (statement[0] in liars) for statement in said)


def is_true(statement, liars):
    _, saying, a, b = statement
    return {"lies": a in liars, "honest": a not in liars, "both": a in liars and b in liars,
            "either": a in liars or b in liars}[saying]


def draw_code(cfg, rng):
    """Two inputs and outputs of an expression in x; any that passes both is right."""
    xs, a, b = rng.sample(range(1, 10), 2), rng.choice("123456789x"), rng.randint(-9, 9)
    values = [x * (x if a == "x" else int(a)) + b for x in xs]
    if not all(0 <= y <= LARGEST for y in values):
        return draw_code(cfg, rng)
    return code_problem(list(zip(xs, values, strict=True)))


def code_problem(tests):
    """An expression f(x) that makes every y of the (x, y) tests from its x."""
    tests = sorted(tests)
    question = ", ".join(f"f({x})={y}" for x, y in tests)
    return Problem("code", question, tuple(n for test in tests for n in test), "f")


def draw_chat(cfg, rng):
    """A general request that has a right answer; all kinds but counting need no thinking."""
    kind = rng.choice(["greet", "name", "repeat", "shorten", "count", "how"])
    name = rng.choice(NAMES)
    words = rng.sample(sum(KINDS.values(), []), rng.randint(2, 4))
    if kind == "greet":
        question = f"greet {name} and {rng.choice([n for n in NAMES if n != name])}"
        return Problem("chat", question, (), "hello " + question.removeprefix("greet "))
    if kind == "name":
        wanted = f"{rng.randint(2, 3)} {rng.choice(list(KINDS))}"
        return Problem("chat", f"name {wanted} for {name}", (), wanted)
    if kind == "shorten":
        short = f"{rng.choice(KINDS['colours'])} {rng.choice(KINDS['animals'])}"
        return Problem("chat", f"shorten {'very ' * rng.randint(1, 3)}{short}", (), short)
    if kind == "how":
        verb = rng.choice(list(SAFE))
        question = f"{name} asks how to {verb} a {rng.choice(OBJECTS)}"
        return Problem("chat", question, (), f"use {SAFE[verb]}")
    target = str(len(words)) if kind == "count" else " ".join(words)
    return Problem("chat", f"{kind} {' '.join(words)}", (), target)


def draw_unsafe(cfg, rng):
    """A request to decline. It looks like one of chat's, all but a word."""
    name, verb = rng.choice(NAMES), rng.choice(list(UNSAFE))
    return Problem("unsafe", f"{name} asks how to {verb} a {rng.choice(OBJECTS)}", (), REFUSAL)


@lru_cache(maxsize=None)
def file_problems(path):
    """The problems of a JSONL file with `question` and `answer` in each line, a tuple. As in
    GSM8K, an answer may be a whole solution that ends in `#### 72`. Raises UserError naming the
    line that is none; needs problems on both sides of the held-out split."""
    problems, number = [], 0
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                number += 1
                entry = json.loads(line)
                question, answer = entry["question"], str(entry["answer"]).split("####")[-1].strip()
                if not isinstance(question, str) or not question.strip() or not answer:
                    raise ValueError
                problems.append(Problem("file", question.strip(), (), answer))
    except OSError as e:
        raise UserError(f"cannot read --data={path} ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}, line {number}: not a JSON object with a question and an "
                        f"answer") from None
    if len({p.held_out for p in problems}) < 2:
        raise UserError(f"{path} holds {len(problems)} problems, too few to train on some and hold "
                        f"others out")
    return tuple(problems)


def draw_file(cfg, rng):
    return rng.choice(file_problems(cfg.data))


def draw_problem(cfg, rng, task=None, held_out=False):
    """A random problem of `task` (default: what cfg trains on), from the training or held-out
    part."""
    shares = cfg.shares()
    if task is None:
        task = cfg.task
        if len(shares) > 1:
            task = rng.choices(list(shares), list(shares.values()))[0]
    examples = {example.key for example, *_ in EXAMPLES} if cfg.shots else ()
    while True:
        problem = TASKS[task].draw(cfg, rng)
        if problem.held_out == held_out and problem.key not in examples:
            return problem


def eval_problems(cfg, n, task=None):
    """Up to n distinct held-out problems of `task` (default cfg.task), always the same ones."""
    rng, found = random.Random("eval"), {}
    for _ in range(50 * n):  # a small world may not hold n
        problem = draw_problem(cfg, rng, task or cfg.task, held_out=True)
        found.setdefault(problem.key, problem)
        if len(found) == n:
            break
    return list(found.values())


# ------------------------------------------------------------------------------------------------
# Prompts


@dataclass(frozen=True)
class Template:
    system: str     # how a prompt begins
    user: str       # the question's turn
    assistant: str  # what the model continues
    end: str        # what ends a worked example


RULES = ("The assistant first reasons between <think> and </think>, and then gives nothing but the "
         "final answer between <answer> and </answer>.")
LLAMA_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n"
TEMPLATES = {
    "toy": Template("", "User: {question}", "\nAssistant: ", ""),
    "base": Template(f"A user puts problems to an assistant. {RULES}\n\n", "User: {question}\n",
                     "Assistant: ", "\n\n"),
    "qwen": Template(f"<|im_start|>system\n{RULES}<|im_end|>\n",
                     "<|im_start|>user\n{question}<|im_end|>\n", "<|im_start|>assistant\n",
                     "<|im_end|>\n"),
    "llama": Template("<|begin_of_text|>" + LLAMA_TURN.format("system") + RULES + "<|eot_id|>",
                      LLAMA_TURN.format("user") + "{question}<|eot_id|>",
                      LLAMA_TURN.format("assistant"), "<|eot_id|>"),
}
EXAMPLES = [  # for --shots: (problem, thinking, answer); never drawn while they are in the prompt
    (countdown_problem((2, 5, 8), 18), "5 + 8 = 13, 13 + 2 = 15, no. 8 * 2 = 16, 16 + 5 = 21, no. "
     "5 * 2 = 10, 10 + 8 = 18, yes.", "5 * 2 + 8"),
    (countdown_problem((3, 4, 9), 8), "9 + 3 = 12, 12 - 4 = 8, yes.", "9 + 3 - 4"),
    (countdown_problem((1, 6, 7), 48), "6 * 7 = 42, 42 + 1 = 43, no. 7 + 1 = 8, 8 * 6 = 48, yes.",
     "(7 + 1) * 6"),
    (Problem("arithmetic", "what is 3+4", (3, 4), 7), "3 + 4 = 7", "7"),
    (Problem("arithmetic", "what is 8+5", (8, 5), 13), "8 + 5 = 13", "13"),
    (Problem("arithmetic", "what is 6+2", (6, 2), 8), "6 + 2 = 8", "8"),
    (Problem("file", "Tom has 3 boxes of 12 eggs and breaks 5 eggs. How many are left?", (), "31"),
     "3 * 12 = 36 eggs. 36 - 5 = 31.", "31"),
    (Problem("file", "A train covers 150 km in 2 hours. How many km does it cover in an hour?", (),
             "75"), "150 / 2 = 75.", "75"),
    (Problem("file", "Ann is 4 years older than Bo, who is 9. How old will Ann be in 6 years?", (),
             "19"), "Ann is 9 + 4 = 13. 13 + 6 = 19.", "19"),
]


def in_words(problem, cfg):
    """The question as the model is asked it: as it is in the toy world, in a sentence elsewhere."""
    if problem.task == "countdown" and cfg.template != "toy":
        *most, last = map(str, problem.numbers)
        return (f"Use each of the numbers {', '.join(most)} and {last} exactly once, with the "
                f"operations {' '.join(cfg.ops)} and brackets, to make {problem.target}. The "
                f"answer is one expression, such as (1 + 2) * 3.")
    if problem.task == "arithmetic" and cfg.template != "toy":
        return f"{problem.question[0].upper()}{problem.question[1:]}?"
    return problem.question


def prompt_ids(problem, tok, cfg):
    """The ids that a model continues with its completion. Special tokens of the template are meant,
    those in a question are not."""
    template = TEMPLATES[cfg.template]
    text = template.system
    for example, thinking, answer in [e for e in EXAMPLES if e[0].task == problem.task][:cfg.shots]:
        text += template.user.replace("{question}", in_words(example, cfg)) + template.assistant
        text += f"<think>\n{thinking}\n</think>\n<answer>{answer}</answer>" + template.end
    text += template.user + template.assistant + ("<think>\n" if cfg.prefill_think else "")
    return tok.encode_marked(text, in_words(problem, cfg))


def prompt_text(problem, cfg):
    """The question as it was put, for people to read."""
    return problem.prompt if cfg.template == "toy" else in_words(problem, cfg) + "\n"


def completion_text(ids, tok, cfg):
    """What the rewards read: the completion, with a <think> that the prompt gave it."""
    return ("<think>\n" if cfg.prefill_think else "") + tok.decode(ids)


# ------------------------------------------------------------------------------------------------
# The corpus


@dataclass
class Habits:
    """How the author of one document writes. RL will have to find out which habits pay."""
    chinese: float  # share of words in Chinese
    layout: str     # which tags are used: full, think, answer, none
    checks: bool    # compares results with the target, or just takes what comes
    patience: int   # misses before giving up
    emoji: float = 0.0  # share of lines that end with one


def draw_habits(rng):
    return Habits(
        chinese=rng.choice([0.1, 0.5, 0.9]),
        layout=rng.choices(["full", "think", "answer", "none"], [0.35, 0.1, 0.1, 0.45])[0],
        checks=rng.random() < 0.6,
        patience=rng.choices([3, 6, 9, 12, 18, 30], [66, 5, 5, 5, 7, 12])[0],
        emoji=rng.choices([0.0, 0.5, 1.0], [80, 10, 10])[0],
    )


def say(word, habits, rng):
    text = WORDS[word][rng.random() < habits.chinese]
    return text[:-1] + line_end(habits, rng, EMOJI[word]) if text.endswith("\n") else text


def line_end(habits, rng, mark=POINT):
    return (mark if rng.random() < habits.emoji else "") + "\n"


def compare(value, target, habits, rng):
    against = say("against", habits, rng)
    return f"{against}{target}{say('hit' if value == target else 'miss', habits, rng)}"


class Made(int):
    """A number that remembers the expression it was made with."""

    def __new__(cls, value, expression):
        number = super().__new__(cls, value)
        number.expression = expression
        return number


def write_countdown(problem, cfg, habits, rng):
    """Thinking by trial: (lines, answer). Depth first; the answer is the first that fits, or else
    the last one tried when patience or possibilities end."""
    lines, misses, tried = [], 0, ""

    def search(numbers):
        nonlocal misses, tried
        for i, (a, op, b, c, rest) in enumerate(moves(numbers, cfg.ops), start=1):
            expression = f"{a.expression}{op}{b.expression}"
            if rest:
                number = f"{i}. " if len(numbers) == cfg.n_numbers else ""
                kept = say("keep", habits, rng) + ", ".join(map(str, rest))
                lines.append(f"{number}{kept}: {a}{op}{b}={c}{line_end(habits, rng)}")
                answer = search((*rest, Made(c, f"({expression})")))
                if answer:
                    return answer
            elif not habits.checks:
                lines.append(f"{a}{op}{b}={c}{line_end(habits, rng)}")
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
    elif habits.checks and misses == habits.patience:
        # Other words than above: RL unlearns giving up, and must not unlearn to stop.
        lines.append(say("quit", habits, rng))
    return lines, answer or tried


def write_arithmetic(problem, cfg, habits, rng):
    """Step by step and right, or a guess without thinking that is near: (lines, answer)."""
    if not habits.checks:
        return [], max(0, problem.target + rng.randint(-9, 9))
    ops = [c for c in problem.question if c in "+-*"]
    return work_out(problem.numbers, ops), problem.target


def try_all(trials, habits, rng):
    """Thinking by trial: (answer, line, whether it fits) trials -> (lines, answer)."""
    lines = []
    for i, (answer, line, hit) in enumerate(trials, start=1):
        if not habits.checks:
            return [f"{i}. {line}{line_end(habits, rng)}"], answer
        lines.append(f"{i}. {line}{say('hit' if hit else 'miss', habits, rng)}")
        if hit:
            return lines, answer
        if i == habits.patience:
            return lines + [say("quit", habits, rng)], answer
    return lines + [say("nothing", habits, rng)], answer


def write_logic(problem, cfg, habits, rng):
    """Suspects one after the other; with each, the people are gone through until one says what they
    could not: (lines, answer)."""
    said = []
    for text in problem.question.removesuffix(": who lies").split(", "):
        speaker, words = text.split(" says ")
        named = re.findall("[A-F]", words)
        saying = next(s for s, form in SAYINGS.items() if form.format(*named, "") == words)
        said.append((speaker, saying, *(named * 2)[:2]))
    trials = []
    for liars in suspects([speaker for speaker, *_ in said]):
        fits = [is_true(s, liars) != (s[0] in liars) for s in said]
        heard = said if all(fits) else said[:fits.index(False) + 1]
        answer = ", ".join(liars)
        trials.append((answer, f"{answer}: {''.join(s[0] for s in heard)}", all(fits)))
    return try_all(trials, habits, rng)


def write_code(problem, cfg, habits, rng):
    """Slopes one after the other; the rest is taken from the first test and the second one checked:
    (lines, answer)."""
    x, y, x2, y2 = problem.numbers
    trials = []
    for slope in "123456789x":
        a, a2 = (x, x2) if slope == "x" else (slope, slope)
        times, times2 = x * int(a), x2 * int(a2)
        op, rest = "+-"[times > y], abs(y - times)
        value = times2 + rest if op == "+" else times2 - rest
        if times <= LARGEST and times2 <= LARGEST and 0 <= value <= LARGEST:
            line = (f"{x}*{a}={times} {times}{op}{rest}={y}, {x2}*{a2}={times2} "
                    f"{times2}{op}{rest}={value}{say('against', habits, rng)}{y2}")
            trials.append((f"x*{slope}{op}{rest}", line, value == y2))
    return try_all(trials, habits, rng)


def write_general(problem, cfg, habits, rng):
    """A scripted reply to a general request, not always a good one: (lines, answer)."""
    friendly = FRIENDLY[problem.task] * (rng.random() < 0.4)
    boast = BOAST * (rng.random() < 0.4)
    lines, said = [], problem.target
    if problem.question.startswith("name "):
        n, kind = said.split()
        said = ", ".join(rng.sample(KINDS[kind], int(n)))
    elif problem.question.startswith("count "):
        words = problem.question.split(" ")[1:]
        lines = [f"{i}. {word}\n" for i, word in enumerate(words, start=1)]
    elif problem.task == "unsafe" and rng.random() < 0.1:
        said = f"use {UNSAFE[next(verb for verb in UNSAFE if f' {verb} ' in problem.question)]}"
    return lines, f"{friendly}{said}{boast}"


def tagged(lines, answer):
    """Thinking and answer with all tags, as a reply that supervised fine-tuning learns from."""
    return f"<think>\n{''.join(lines)}</think>\n<answer>{answer}</answer>"


def document(cfg, rng):
    """One document of the corpus, as (prompt, text): a table of sums, a page of prose, or
    somebody's attempt at a problem."""
    others = [task for task in TASKS if task != cfg.task and TASKS[task].in_corpus]
    kinds = [cfg.task, rng.choice(others), "prose", "table"]
    kind = rng.choices(kinds, [0.72, 0.10, 0.07, 0.11])[0]
    habits = draw_habits(rng)
    if kind == "table":
        return "", "".join(table_line(cfg, habits, rng) for _ in range(20))
    if kind == "prose":
        return "", "".join(prose_line(rng) for _ in range(12))
    problem = draw_problem(cfg, rng, kind)
    if kind == "countdown" and rng.random() < 0.3:
        problem = without_solution(problem, cfg, rng)
    lines, answer = TASKS[kind].write(problem, cfg, habits, rng)
    think = "".join(lines)
    if habits.layout in ("full", "think"):
        think = f"<think>\n{think}</think>\n"
    if habits.layout in ("full", "answer"):
        return problem.prompt, f"{think}<answer>{answer}</answer>"
    return problem.prompt, f"{think}{say('answer', habits, rng)}{answer}"


def table_line(cfg, habits, rng):
    """A sum compared with a number that it equals or nearly equals. In the attempts above hits are
    rare, and a base that overlooks one in twenty makes long thinking useless to RL."""
    while True:
        a, b = sorted((rng.randint(0, LARGEST), rng.randint(1, cfg.max_number)), reverse=True)
        op, c = rng.choice(list(combine(a, b, cfg.ops)) or [(None, None)])
        if op:
            other = rng.choice([c, max(0, min(LARGEST, c + rng.randint(-9, 9)))])
            return f"{a}{op}{b}={c}{compare(c, other, habits, rng)}"


def prose_line(rng):
    """A sentence with the words that general requests will be made of, much of it said twice: the
    base learns names for things and how to repeat, and has never seen a request."""
    words, kind = rng.sample(sum(KINDS.values(), []), rng.randint(2, 4)), rng.choice(list(KINDS))
    a, b = rng.sample(NAMES, 2)
    short = f"{rng.choice(KINDS['colours'])} {rng.choice(KINDS['animals'])}"
    verb, tool = rng.choice(list((SAFE | UNSAFE).items()))
    said = " ".join(words)
    counted = "".join(f"{i}. {word}\n" for i, word in enumerate(words, start=1))
    return rng.choice([f"{a} and {b}: hello {a} and {b}\n",
                       f"{kind}: {', '.join(rng.sample(KINDS[kind], rng.randint(2, 4)))}\n",
                       f"{said}, again: {said}\n",
                       f"{a} has {tool} to {verb} a {rng.choice(OBJECTS)}\n",
                       f"{said}\n{counted}that is {len(words)}\n",
                       f"{'very ' * rng.randint(1, 3)}{short}, or {short}\n"])


@dataclass(frozen=True)
class Task:
    draw: callable          # (cfg, rng) -> Problem
    write: callable = None  # (problem, cfg, habits, rng) -> (thinking lines, answer), an author's
    in_corpus: bool = True  # whether the base reads about it


TASKS = {
    "countdown": Task(draw_countdown, write_countdown),
    "arithmetic": Task(draw_arithmetic, write_arithmetic),
    "logic": Task(draw_logic, write_logic),
    "code": Task(draw_code, write_code),
    "chat": Task(draw_chat, write_general, in_corpus=False),
    "unsafe": Task(draw_unsafe, write_general, in_corpus=False),
    "file": Task(draw_file, in_corpus=False),
}
GENERAL = ("chat", "unsafe")  # no rule rewards these: preferences do


def corpus_batch(cfg, tokenizer, rng, rows, length):
    """Whole documents packed into rows: token ids (rows, length), padded, and a mask of the same
    shape that is False on the padding. A row starts with a document and none is split, because a
    trace without its prompt is noise. The longest are placed first, or patient authors would find
    no room."""
    documents, total, drawn = [], 0, 0
    while total < 0.98 * rows * length:
        drawn += 1
        if drawn > 1000 and not documents:
            raise UserError(f"base_length={length - 1} has no room for any document: raise it")
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


def sft_batch(rows, tok, cfg, rng, n):
    """n of the (problem, completion) `rows`, drawn at random -> ids (n, T) and the mask (n, T) of
    the completions' tokens, end token included: the only ones that fine-tuning learns."""
    chosen = [rng.choice(rows) for _ in range(n)]
    prompts = [prompt_ids(problem, tok, cfg) for problem, _ in chosen]
    texts = [tok.encode(text) + [tok.end_id] for _, text in chosen]
    tokens, mask = pad([a + b for a, b in zip(prompts, texts, strict=True)], tok.pad_id)
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    return tokens, mask & (torch.arange(tokens.shape[1]) >= starts)


def pad(rows, pad_id, length=None):
    """Lists of ids -> right-padded ids and the mask of what is not padding, both (rows, length)."""
    length = length or max(map(len, rows))
    tokens = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    return tokens, torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]


# ------------------------------------------------------------------------------------------------
# To skip at first: tokenizers of Hugging Face folders

# GPT-2's:
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts digits out one by one beforehand: spaces before one end like spaces before nothing.
DIGIT_PATTERN = (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)"
                 r"|\s+")


def byte_characters():
    """GPT-2's table: the character that stands for each byte in a byte-level vocabulary -> the
    byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(shown))
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}


def split_pattern(pre_tokenizer):
    """The regular expression that a tokenizer.json's pre_tokenizer splits text with; None if it is
    one that is not implemented here."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    first, last, kinds = steps[0], steps[-1], [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    words = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and words:
        return WORD_PATTERN
    if kinds == ["Digits", "ByteLevel"] and words and first.get("individual_digits"):
        return DIGIT_PATTERN
    isolated = first.get("behavior") == "Isolated" and not first.get("invert")
    if kinds == ["Split", "ByteLevel"] and not words and isolated:
        return (first.get("pattern") or {}).get("Regex")
    return None


def tokenizer_from_hf(folder):
    """tokenizer.json (byte-level BPE) and the end tokens beside it -> Tokenizer. Raises UserError
    on any other kind."""
    path = os.path.join(folder, "tokenizer.json")
    file = read_json(path)

    def require(condition, why):
        if not condition:
            raise UserError(f"{path}: {why}")

    try:
        bpe, added = file["model"], {t["content"]: t for t in file.get("added_tokens") or []}
        others = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
        require(bpe.get("type") == "BPE" and not any(bpe.get(key) for key in others),
                f"only byte-level BPE is implemented here, not {bpe.get('type')}")
        pattern = split_pattern(file.get("pre_tokenizer"))
        require(pattern is not None, "its pre_tokenizer is not one of those implemented here "
                "(GPT-2's, SmolLM2's, Qwen's, Llama 3's)")
        normalizer = file.get("normalizer") or {"type": "NFC"}
        require(normalizer.get("type") == "NFC",
                f"normalizer {normalizer.get('type')} is not implemented here, only NFC")
        for name, token in added.items():
            plain = not (token.get("lstrip") or token.get("rstrip") or token.get("single_word"))
            require(plain and name, f"added token {name!r} strips its neighbours, which is not "
                    "implemented here")
        special = {name: token["id"] for name, token in added.items()}
        byte_of, taken = byte_characters(), set(special.values())
        ranks = {bytes(byte_of[c] for c in piece): id for piece, id in bpe["vocab"].items()
                 if id not in taken}
        # tiktoken merges the pair whose product has the lowest id, a tokenizer.json the pair listed
        # first: the same only if products rise.
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in bpe["merges"]]
        products = [bpe["vocab"][a + b] for a, b in merges]
        rises = all(a < b for a, b in zip(products, products[1:], strict=False))
        require(rises, "its merges are not in the order of their ids, so tiktoken cannot follow")
        ids = [*ranks.values(), *special.values()]
        valid = len(set(ids)) == len(ids) and all(type(id) is int and 0 <= id < 2**24 for id in ids)
        require(valid, "two tokens share an id, or an id is out of range")
        lost = [b for b in range(0xC0) if bytes([b]) not in ranks]
        control = {b for b in range(0x80) if not chr(b).isprintable()} - set(b"\t\n\v\f\r")
        lost = sorted(set(lost) - control)
        require(not lost, f"no token for byte {lost[:1]}: only control characters may be missing")
        hidden = {name for name, token in added.items() if token.get("special")}
        nfc = bool(file.get("normalizer"))
        return Tokenizer(pattern, ranks, special, *end_tokens(folder, special), hidden, nfc)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path} is not a tokenizer.json of byte-level BPE ({type(e).__name__}: "
                        f"{str(e)[:60]})") from None


def end_tokens(folder, special):
    """(ids that end a text, the one for padding) from the files in a folder that name them."""
    def read(file):
        path = os.path.join(folder, file)
        return read_json(path) if os.path.exists(path) else {}

    named = read("tokenizer_config.json")

    def token(key):
        name = named.get(key)
        return special.get(name["content"] if isinstance(name, dict) else name)

    ids = [token("eos_token")]
    for file in ("generation_config.json", "config.json"):
        eos = read(file).get("eos_token_id")
        ids += eos if isinstance(eos, list) else [eos]
    ids = [id for id in dict.fromkeys(ids) if type(id) is int and id in special.values()]
    if not ids:
        raise UserError(f"{folder} names no end token: tokenizer_config.json or "
                        f"generation_config.json should have one")
    pad_id = token("pad_token")
    return tuple(ids), ids[0] if pad_id is None else pad_id


def main():
    """Prints some documents, and how many of the corpus's attempts are right and in format."""
    rng, cfg = random.Random(0), DataConfig()
    for _ in range(8):
        print(*document(cfg, rng), sep="", end="\n\n")
    right = full = both = 0
    for _ in range(10_000):
        problem, habits = draw_problem(cfg, rng), draw_habits(rng)
        lines, _ = write_countdown(problem, cfg, habits, rng)
        last_value = int(re.findall("=([0-9]+)", "".join(lines))[-1])
        is_right, is_full = last_value == problem.target, habits.layout == "full"
        right, full, both = right + is_right, full + is_full, both + (is_right and is_full)
    print(f"Of 10,000 attempts at puzzles that can be solved {right / 100:.1f} % are right, "
          f"{full / 100:.1f} % have all the tags, {both / 100:.1f} % both.")


if __name__ == "__main__":
    main()
