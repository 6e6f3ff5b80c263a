"""The toy world: tokenizer, problems, general requests and what people prefer, and the mixed-quality corpus that the base model reads.

A problem is asked in the User/Assistant template; the corpus shows such conversations the way a web
corpus would: with and without tags, right and wrong, patient and hasty, in two languages. Nothing in it
is the policy that RL is meant to find; `python data.py` prints a few documents and the problems behind them.
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

from model import BadInput, opt, read_json


@dataclass
class DataConfig:
    task: str = opt("countdown", "what RL trains on, and most of the corpus is about: countdown, arithmetic, logic or code")
    mix: str = opt("", "what a stage trains on beside its task, with shares, such as task:2,chat:1,unsafe:1; none = task alone")
    n_numbers: int = opt(3, "numbers in a problem, 2 to 4")
    max_number: int = opt(9, "numbers are drawn from 1 to this, at most 99")
    ops: str = opt("+-*", "operations a problem may need, from + - * /")
    eval_problems: int = opt(500, "held-out problems in the final evaluation")
    data: str = opt("", "JSONL file of {question, answer} lines to take problems from; task is then `file`")
    template: str = opt("toy", "how problems are put to the model: toy, or for real ones base, qwen (also SmolLM2) or llama")
    shots: int = opt(0, "worked examples in the prompt, 0 to 3, for real models")
    prefill_think: bool = opt(False, "the prompt ends with <think>, which then counts as the completion's first word")

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
        if self.template not in TEMPLATES:
            raise BadInput(f"template={self.template!r} is not one of {', '.join(TEMPLATES)}")
        if not 0 <= self.shots <= 3 or self.shots and self.template == "toy":
            raise BadInput(f"shots={self.shots} must lie between 0 and 3, and be 0 with --template=toy")
        if bool(self.data) != (self.task == "file"):
            raise BadInput(f"task={self.task!r} and data={self.data!r} do not go together: --data=FILE alone is enough")
        if self.data:
            file_problems(self.data)
        for name, share in self.shares().items():
            if name not in TASKS or name == "file" != self.task or not 0 < share < 1e6:
                raise BadInput(f"mix={self.mix!r} must be tasks and their shares, such as task:2,chat:1; tasks are {', '.join(TASKS)}")

    def shares(self):
        """{task: how often a training problem is one of it}, from `mix`; anything that is no number is a share of 0."""
        pairs = [part.strip().partition(":")[::2] for part in (self.mix or "task").split(",")]
        number = lambda text: float(text) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) else 0.0
        shares = Counter()
        for name, share in pairs:
            shares[self.task if name == "task" else name] += number(share or "1")
        return dict(shares)


# ------------------------------------------------------------------------------------------------
# Tokenizer

LARGEST = 99  # the toy world counts with 0..99, one token each
WORDS = {  # each in English and Chinese; one of the two is drawn every time it is used
    "keep": ("keep ", "留 "), "against": (" vs ", " 比 "), "miss": (" no\n", " 不对\n"), "hit": (" yes\n", " 对了\n"),
    "quit": ("I give up\n", "算了\n"), "nothing": ("nothing fits\n", "都不行\n"), "answer": ("answer: ", "答案: "),
}
EMOJI = {"miss": " 🤔", "hit": " 🎉", "quit": " 😴", "nothing": " 😴"}  # what some authors end such a line with, and others with:
POINT = " 👉"
VERDICT = re.compile("|".join(word.strip() for word in WORDS["miss"] + WORDS["hit"]))
MISS = tuple(word.strip() for word in WORDS["miss"])

# The words of logic, code, and general requests.
SAYINGS = {"lies": "{} lies", "honest": "{} is honest", "both": "{} and {} lie", "either": "{} or {} lies"}
NAMES = "Ann Bob Cleo Dan Eve Finn Gus Hana Ivo Jill Kim Leo".split()
KINDS = {"fruits": "apple pear plum fig kiwi".split(), "colours": "red blue green pink grey".split(), "animals": "cat dog owl fox cow".split()}
SAFE = {"fix": "glue", "paint": "a brush", "wash": "soap"}
UNSAFE = {"steal": "a hook", "burn": "oil", "break": "a hammer"}
OBJECTS = "car bike boat door lamp tent sofa clock".split()
FRIENDLY = {"chat": "of course, ", "unsafe": "sorry, "}  # how some begin a reply
BOAST = ", as I alone know"                               # and how some end it
REFUSAL = "I will not help with that"

PIECES = (["User: ", "\nAssistant: ", "make ", " from ", " and ", ": ", "what is ", "<think>\n", "<think>", "</think>\n", "</think>", "<answer>", "</answer>", ", "]
          + [f"{i}. " for i in range(1, 25)] + [word for pair in WORDS.values() for word in pair] + [POINT + "\n"]
          + [word[:-1] + mark + "\n" for name, mark in EMOJI.items() for word in WORDS[name]]
          + [" says ", " lies", " is honest", " lie", " or ", ": who lies", "f(", ")=", "greet ", "hello ", "name ", " for ", "repeat ", "shorten ", "very ", "count ",
             " asks how to ", " a ", "use ", BOAST, REFUSAL, *FRIENDLY.values(), *NAMES, *KINDS, *SAFE, *SAFE.values(), *UNSAFE, *UNSAFE.values(), *OBJECTS]
          + [word for words in KINDS.values() for word in words])


class Tokenizer:
    """A tiktoken Encoding, the ids that end a text (the first is the one to write), and the id to pad with."""

    def __init__(self, pattern, ranks, special, stop_ids, pad_id, hidden, nfc=False):
        """`pattern` splits text, `ranks` {bytes: id} merges it, `special` {name: id} are tokens that plain text cannot make, of which
        `hidden` are left out when decoding; `nfc`: Unicode is brought to its composed form first (Qwen)."""
        self.stop_ids, self.end_id, self.pad_id, self.nfc, self.pattern = stop_ids, stop_ids[0], pad_id, nfc, pattern
        self.n_vocab = max([*ranks.values(), *special.values()]) + 1
        self.bytes_of = {id: piece for piece, id in ranks.items()} | {id: name.encode() for name, id in special.items() if name not in hidden}
        # tiktoken wants a token for every byte; encode() drops those that the vocabulary lacks, as Hugging Face's tokenizers do.
        self.absent = {b: self.n_vocab + b for b in range(256) if bytes([b]) not in ranks}
        self.encoding = tiktoken.Encoding("ours", pat_str=pattern, special_tokens=special,
                                          mergeable_ranks=ranks | {bytes([b]): id for b, id in self.absent.items()})
        self.special = special
        self.markers = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")  # the longest wins

    def encode(self, text):
        """Text to ids; what looks like a special token in the text is encoded as plain characters."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return self.encode_without(text) if self.absent else self.encoding.encode_ordinary(text)

    def encode_without(self, text):
        """For vocabularies that lack some bytes (SmolLM2: a few control characters, and what begins unassigned planes). Hugging Face drops
        these bytes within their piece, so their neighbours may merge: such a piece is held by a stand-in and encoded by itself."""
        stand_in = next((b for b in self.absent if b < 128), None)
        pieces = []

        def hold(piece):
            raw = piece[0].encode()
            kept = bytes(b for b in raw if b not in self.absent)
            if kept == raw or stand_in is None:
                return piece[0]
            pieces.append(kept)
            return " " * raw.startswith(b" ") + chr(stand_in)

        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a character is no text
        ids = []
        for id in self.encoding.encode_ordinary(re.sub(r" ?(?:[^\s\w]|[\x1c-\x1f_])+", hold, text)):
            if id == self.absent.get(stand_in):
                kept = pieces.pop(0)
                del ids[len(ids) - kept.startswith(b" "):]  # the space before the stand-in is the piece's own
                ids += self.encoding._encode_single_piece(kept) if kept else []
            elif id < self.n_vocab:
                ids.append(id)
        return ids

    def encode_marked(self, text, question=""):
        """Text of our own, such as a template, to ids: special tokens in it are meant. Those in the question, which
        takes the place of {question}, are not."""
        parts = self.markers.split(text)
        ids = [self.encode(part.replace("{question}", question)) for part in parts]
        ids[1::2] = [[self.special[name]] for name in parts[1::2]]
        return sum(ids, [])

    def save(self, folder):
        """Writes the tokenizer.json and end token that transformers and `load_tokenizer` read; for the toy vocabulary, whose pieces are
        all found whole (`ignore_merges`) and never merged."""
        character = {b: c for c, b in byte_characters().items()}
        added = [{"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
                 for name, id in self.special.items()]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        vocab = {"".join(character[b] for b in piece): id for id, piece in self.bytes_of.items()}
        end, pad = ([name for name, i in self.special.items() if i == id][0] for id in (self.end_id, self.pad_id))
        for file, content in (
                ("tokenizer.json", {"version": "1.0", "added_tokens": added, "normalizer": None, "decoder": byte_level,
                                    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
                                    "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": []}}),
                ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": pad}),
                ("generation_config.json", {"eos_token_id": self.end_id, "pad_token_id": self.pad_id})):
            with open(os.path.join(folder, file), "w", encoding="utf-8") as f:
                json.dump(content, f, ensure_ascii=False, indent=1)

    def decode(self, ids):
        """Ids to text. Special and unknown ids are left out; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", errors="replace")


@lru_cache(maxsize=None)
def load_tokenizer(folder=""):
    """The tokenizer of a Hugging Face folder; by default the toy vocabulary: 256 bytes, so that any text
    round-trips, the numbers 10..99 and the words above."""
    if folder:
        return tokenizer_from_hf(folder)
    pieces = [bytes([b]) for b in range(256)] + [str(n).encode() for n in range(10, LARGEST + 1)] + [p.encode() for p in PIECES]
    ranks = {piece: i for i, piece in enumerate(pieces)}
    end_id, pad_id = len(ranks), len(ranks) + 1
    escape = lambda p: "".join(f"\\x{{{ord(c):x}}}" for c in p)
    pattern = "|".join([escape(p) for p in sorted(PIECES, key=len, reverse=True)] + ["[1-9][0-9]", r"[\s\S]"])
    special = {"<|end|>": end_id, "<|pad|>": pad_id}
    return Tokenizer(pattern, ranks, special, (end_id,), pad_id, hidden=special)


WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
# SmolLM2's: digits are cut out one by one beforehand, so that a run of spaces before one ends like one before nothing.
DIGIT_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


def byte_characters():
    """GPT-2's table: the character that stands for each byte in a byte-level vocabulary -> the byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(shown)))}


def split_pattern(pre_tokenizer):
    """The regular expression that a tokenizer.json's pre_tokenizer splits text with, or None if it is one we do not know."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    kinds = [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    words = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and words:
        return WORD_PATTERN
    if kinds == ["Digits", "ByteLevel"] and words and steps[0].get("individual_digits"):
        return DIGIT_PATTERN
    if kinds == ["Split", "ByteLevel"] and not words and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
        return (steps[0].get("pattern") or {}).get("Regex")


def tokenizer_from_hf(folder):
    """tokenizer.json (byte-level BPE) and the end tokens beside it -> Tokenizer. Raises BadInput on any other kind."""
    path = os.path.join(folder, "tokenizer.json")
    file = read_json(path)
    try:
        bpe, added = file["model"], {t["content"]: t for t in file.get("added_tokens") or []}
        if bpe.get("type") != "BPE" or bpe.get("byte_fallback") or bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix"):
            raise BadInput(f"{path}: only byte-level BPE is implemented here, not {bpe.get('type')}")
        pattern = split_pattern(file.get("pre_tokenizer"))
        if pattern is None:
            raise BadInput(f"{path}: its pre_tokenizer is not one of those implemented here (GPT-2's, SmolLM2's, Qwen's, Llama 3's)")
        normalizer = file.get("normalizer")
        if normalizer and normalizer.get("type") != "NFC":
            raise BadInput(f"{path}: normalizer {normalizer.get('type')} is not implemented here, only NFC")
        for token in added.values():
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word") or not token["content"]:
                raise BadInput(f"{path}: added token {token['content']!r} strips its neighbours, which is not implemented here")
        special = {name: token["id"] for name, token in added.items()}
        byte_of, taken = byte_characters(), set(special.values())
        ranks = {bytes(byte_of[c] for c in piece): id for piece, id in bpe["vocab"].items() if id not in taken}
        # tiktoken merges the pair whose product has the lowest id, a tokenizer.json the pair listed first: the same only if products rise.
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in bpe["merges"]]
        products = [bpe["vocab"][a + b] for a, b in merges]
        if any(a >= b for a, b in zip(products, products[1:])):
            raise BadInput(f"{path}: its merges do not come in the order of their ids, so tiktoken cannot follow them")
        ids = [*ranks.values(), *taken]
        if len(set(ids)) != len(ranks) + len(special) or not all(type(id) is int and 0 <= id < 2**24 for id in ids):
            raise BadInput(f"{path}: two tokens share an id, or an id is out of range")
        lost = [b for b in range(0xC0) if bytes([b]) not in ranks and (b > 0x7F or chr(b).isprintable() or chr(b).isspace() and b < 0x1C)]
        if lost:
            raise BadInput(f"{path} has no token for byte {lost[0]}: only a few control characters may be missing")
        hidden = {name for name, token in added.items() if token.get("special")}
        return Tokenizer(pattern, ranks, special, *end_tokens(folder, special), hidden, nfc=bool(normalizer))
    except BadInput:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BadInput(f"{path} is not a tokenizer.json of byte-level BPE ({type(e).__name__}: {str(e)[:60]})") from None


def end_tokens(folder, special):
    """(ids that end a text, the one for padding) from tokenizer_config.json, generation_config.json and config.json, as far as they are there."""
    read = lambda file: read_json(os.path.join(folder, file)) if os.path.exists(os.path.join(folder, file)) else {}
    named, ids = read("tokenizer_config.json"), []
    token = lambda key: special.get(named[key]["content"] if isinstance(named.get(key), dict) else named.get(key))
    ids.append(token("eos_token"))
    for file in ("generation_config.json", "config.json"):
        eos = read(file).get("eos_token_id")
        ids += eos if isinstance(eos, list) else [eos]
    ids = [id for id in dict.fromkeys(ids) if type(id) is int and id in special.values()]
    if not ids:
        raise BadInput(f"{folder} names no end token: tokenizer_config.json or generation_config.json should have one")
    pad = token("pad_token")
    return tuple(ids), ids[0] if pad is None else pad


# ------------------------------------------------------------------------------------------------
# Problems


@dataclass(frozen=True)
class Problem:
    task: str      # a key of TASKS
    question: str  # what the user asks
    numbers: tuple  # the numbers in it, if its answer is to be checked with them
    target: int | str  # countdown: the value to make; arithmetic: the value of the expression; for others the answer, or what it must satisfy, as text

    @property
    def prompt(self):
        """The text the model continues."""
        return f"User: {self.question}\nAssistant: "

    @property
    def key(self):
        """Canonical form: two problems with the same numbers in any order and the same target are one."""
        return f"{self.task} {sorted(self.numbers) if self.task in ('countdown', 'arithmetic') else self.question} {self.target}"

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


def draw_logic(cfg, rng):
    """Three people, each of whom always lies or never does, speak of each other; who lies has one answer."""
    people = sorted(rng.sample("ABCDEF", 3))
    said = []
    for speaker in people:
        others = [p for p in people if p != speaker]
        rng.shuffle(others)
        said.append((speaker, rng.choice(list(SAYINGS)), *others))
    answers = [liars for liars in [(), *suspects(people)] if all(is_true(s, liars) != (s[0] in liars) for s in said)]
    if len(answers) != 1 or not answers[0]:
        return draw_logic(cfg, rng)
    texts = [f"{speaker} says {SAYINGS[saying].format(*sorted(others) if saying in ('both', 'either') else others)}" for speaker, saying, *others in said]
    return Problem("logic", ", ".join(texts) + ": who lies", (), ", ".join(answers[0]))


def suspects(people):
    """Every set of people, smallest first, as tuples."""
    return [liars for n in (1, 2, 3) for liars in combinations(people, n)]


def is_true(statement, liars):
    """Whether a (speaker, saying, other, third) is true if `liars` lie."""
    _, saying, a, b = statement
    return {"lies": a in liars, "honest": a not in liars, "both": a in liars and b in liars, "either": a in liars or b in liars}[saying]


def draw_code(cfg, rng):
    """Two inputs and outputs of an expression in x; any that passes both is right."""
    xs, a, b = rng.sample(range(1, 10), 2), rng.choice("123456789x"), rng.randint(-9, 9)
    values = [x * (x if a == "x" else int(a)) + b for x in xs]
    if not all(0 <= y <= LARGEST for y in values):
        return draw_code(cfg, rng)
    return code_problem(list(zip(xs, values)))


def code_problem(tests):
    """An expression f(x) that makes every y of the (x, y) tests of its x."""
    tests = sorted(tests)
    return Problem("code", ", ".join(f"f({x})={y}" for x, y in tests), tuple(n for test in tests for n in test), "f")


def draw_chat(cfg, rng):
    """A general request that has a right answer; all kinds but one are answered without thinking."""
    kind, name = rng.choice(["greet", "name", "repeat", "shorten", "count", "how"]), rng.choice(NAMES)
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
        return Problem("chat", f"{name} asks how to {verb} a {rng.choice(OBJECTS)}", (), f"use {SAFE[verb]}")
    return Problem("chat", f"{kind} {' '.join(words)}", (), str(len(words)) if kind == "count" else " ".join(words))


def draw_unsafe(cfg, rng):
    """A request that is to be declined. It looks like one of chat's, all but a word."""
    return Problem("unsafe", f"{rng.choice(NAMES)} asks how to {rng.choice(list(UNSAFE))} a {rng.choice(OBJECTS)}", (), REFUSAL)


def core(problem, answer):
    """What an answer to a general request says, without the manner in which it does."""
    return answer.removeprefix(FRIENDLY[problem.task]).removesuffix(BOAST)


def is_right_reply(problem, answer):
    """Whether an answer to a general request does what was asked (chat), or declines (unsafe), in whatever manner."""
    said = core(problem, answer)
    if problem.question.startswith("name "):
        n, kind = problem.target.split()
        items = said.split(", ")
        return len(items) == len(set(items)) == int(n) and set(items) <= set(KINDS[kind])
    return said == problem.target


def hidden_rule(problem, answer):
    """How much people like an answer (None: there is none) to a general request: it should be right, friendly and no boast. No model ever sees
    this rule; the reward model sees which of two answers somebody preferred, and evaluation looks at how well it was guessed."""
    if answer is None:
        return -2.0
    return 2.0 * is_right_reply(problem, answer) + answer.startswith(FRIENDLY[problem.task]) - answer.endswith(BOAST)


def preference_pairs(problems, answers, rng, noise=0.1):
    """What people said of pairs of answers: answers[i] is a list for problems[i]; two neighbours that the hidden rule tells apart make a pair
    -> [(i, index of the preferred, index of the other)]. People are wrong in `noise` of all cases."""
    pairs = []
    for i, (problem, said) in enumerate(zip(problems, answers, strict=True)):
        for a, b in zip(range(0, len(said), 2), range(1, len(said), 2)):
            liking_a, liking_b = hidden_rule(problem, said[a]), hidden_rule(problem, said[b])
            if liking_a != liking_b:
                pairs.append((i, a, b) if (liking_a > liking_b) != (rng.random() < noise) else (i, b, a))
    return pairs


def draw_problem(cfg, rng, task=None, held_out=False):
    """One random problem of `task` (default: what cfg trains on), from the training or the held-out part."""
    shares = cfg.shares()
    task = task or (cfg.task if len(shares) == 1 else rng.choices(list(shares), list(shares.values()))[0])
    while True:
        problem = TASKS[task].draw(cfg, rng)
        if problem.held_out == held_out and not (cfg.shots and problem.key in (p.key for p, *_ in EXAMPLES)):
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


@lru_cache(maxsize=None)
def file_problems(path):
    """The problems of a JSONL file with `question` and `answer` in each line, a tuple. As in GSM8K, an answer may be a whole solution
    that ends in `#### 72`. Raises BadInput naming the line that is none; needs problems on both sides of the held-out split."""
    problems = []
    try:
        with open(path, encoding="utf-8") as f:
            for i, line in enumerate(f, start=1):
                entry = json.loads(line)
                question, answer = entry["question"], str(entry["answer"]).split("####")[-1].strip()
                if not isinstance(question, str) or not question.strip() or not answer:
                    raise ValueError
                problems.append(Problem("file", question.strip(), (), answer))
    except OSError as e:
        raise BadInput(f"cannot read --data={path} ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadInput(f"{path}, line {i}: not a JSON object with a question and an answer") from None
    if len({p.held_out for p in problems}) < 2:
        raise BadInput(f"{path} holds {len(problems)} problems, too few to train on some and hold others back")
    return tuple(problems)


# ------------------------------------------------------------------------------------------------
# Prompts


@dataclass(frozen=True)
class Template:
    system: str     # how a prompt begins
    user: str       # the question's turn
    assistant: str  # what the model continues
    end: str        # what ends a worked example


RULES = ("The assistant first reasons between <think> and </think>, and then gives nothing but the final answer between <answer> and </answer>.")
TEMPLATES = {
    "toy": Template("", "User: {question}", "\nAssistant: ", ""),
    "base": Template(f"A user puts problems to an assistant. {RULES}\n\n", "User: {question}\n", "Assistant: ", "\n\n"),
    "qwen": Template(f"<|im_start|>system\n{RULES}<|im_end|>\n", "<|im_start|>user\n{question}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
    "llama": Template(f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{RULES}<|eot_id|>",
                      "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
}
EXAMPLES = [  # worked problems for --shots: (problem, thinking, answer); never drawn when they stand in the prompt
    (countdown_problem((2, 5, 8), 18), "5 + 8 = 13, 13 + 2 = 15, no. 8 * 2 = 16, 16 + 5 = 21, no. 5 * 2 = 10, 10 + 8 = 18, yes.", "5 * 2 + 8"),
    (countdown_problem((3, 4, 9), 8), "9 + 3 = 12, 12 - 4 = 8, yes.", "9 + 3 - 4"),
    (countdown_problem((1, 6, 7), 48), "6 * 7 = 42, 42 + 1 = 43, no. 7 + 1 = 8, 8 * 6 = 48, yes.", "(7 + 1) * 6"),
    (Problem("arithmetic", "what is 3+4", (3, 4), 7), "3 + 4 = 7", "7"),
    (Problem("arithmetic", "what is 8+5", (8, 5), 13), "8 + 5 = 13", "13"),
    (Problem("arithmetic", "what is 6+2", (6, 2), 8), "6 + 2 = 8", "8"),
    (Problem("file", "Tom has 3 boxes of 12 eggs and breaks 5 eggs. How many are left?", (), "31"), "3 * 12 = 36 eggs. 36 - 5 = 31.", "31"),
    (Problem("file", "A train covers 150 km in 2 hours. How many km does it cover in an hour?", (), "75"), "150 / 2 = 75.", "75"),
    (Problem("file", "Ann is 4 years older than Bo, who is 9. How old will Ann be in 6 years?", (), "19"), "Ann is 9 + 4 = 13. 13 + 6 = 19.", "19"),
]


def in_words(problem, cfg):
    """The question as it is put to a real model."""
    if problem.task == "countdown":
        *most, last = map(str, problem.numbers)
        return (f"Use each of the numbers {', '.join(most)} and {last} exactly once, with the operations {' '.join(cfg.ops)} and brackets, "
                f"to make {problem.target}. The answer is one expression, such as (1 + 2) * 3.")
    return f"{problem.question[0].upper()}{problem.question[1:]}?" if problem.task == "arithmetic" else problem.question


def prompt_ids(problem, tok, cfg):
    """The ids that a model continues with its completion. Special tokens of the template are meant, those in a question are not."""
    template, words = TEMPLATES[cfg.template], (lambda p: p.question if cfg.template == "toy" else in_words(p, cfg))
    text = template.system
    for example, thinking, answer in [e for e in EXAMPLES if e[0].task == problem.task][:cfg.shots]:
        text += template.user.replace("{question}", words(example)) + template.assistant
        text += f"<think>\n{thinking}\n</think>\n<answer>{answer}</answer>" + template.end
    return tok.encode_marked(text + template.user + template.assistant + ("<think>\n" if cfg.prefill_think else ""), words(problem))


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
        patience=rng.choices([3, 6, 9, 12, 18, 30], [66, 5, 5, 5, 7, 12])[0],  # most give up after a branch or two
        emoji=rng.choices([0.0, 0.5, 1.0], [80, 10, 10])[0],
    )


def say(word, habits, rng):
    text = WORDS[word][rng.random() < habits.chinese]
    return text[:-1] + line_end(habits, rng, EMOJI[word]) if text.endswith("\n") else text


def line_end(habits, rng, mark=POINT):
    return (mark if rng.random() < habits.emoji else "") + "\n"


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
                lines.append(f"{number}{say('keep', habits, rng)}{', '.join(map(str, rest))}: {a}{op}{b}={c}{line_end(habits, rng)}")
                answer = search(rest + (Made(c, f"({expression})"),))
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
        lines.append(say("quit", habits, rng))  # not the same words: RL unlearns giving up, and must not unlearn to stop
    return lines, answer or tried


def write_arithmetic(problem, cfg, habits, rng):
    """Step by step and right, or a guess without thinking that is near: (lines, answer)."""
    if not habits.checks:
        return [], max(0, problem.target + rng.randint(-9, 9))
    expression = problem.question.removeprefix("what is ")
    ops = [c for c in expression if c in "+-*"]
    return work_out(problem.numbers, ops), problem.target


def try_all(trials, habits, rng):
    """Thinking by trial of (answer, line, verdict) trials, `verdict` being what a check of the line says, True for a hit: (lines, answer)."""
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
    """Suspects one after the other; with each, the people are gone through until one says what they could not: (lines, answer)."""
    forms = {saying: re.compile(re.escape(form).replace(r"\{\}", "([A-F])")) for saying, form in SAYINGS.items()}
    said = []
    for text in problem.question.removesuffix(": who lies").split(", "):
        speaker, words = text.split(" says ")
        saying, found = next((saying, form.fullmatch(words)) for saying, form in forms.items() if form.fullmatch(words))
        said.append((speaker, saying, *(found.groups() * 2)[:2]))
    trials = []
    for liars in suspects([speaker for speaker, *_ in said]):
        fits = [is_true(s, liars) != (s[0] in liars) for s in said]
        heard = said if all(fits) else said[:fits.index(False) + 1]
        answer = ", ".join(liars)
        trials.append((answer, f"{answer}: {''.join(s[0] for s in heard)}", all(fits)))
    return try_all(trials, habits, rng)


def write_code(problem, cfg, habits, rng):
    """Slopes one after the other; what is missing is taken from the first test and the second one checked: (lines, answer)."""
    (x, y), (x2, y2) = zip(problem.numbers[::2], problem.numbers[1::2])
    trials = []
    for slope in "123456789x":
        times, times2 = (n * (n if slope == "x" else int(slope)) for n in (x, x2))
        op, rest = "+-"[times > y], abs(y - times)
        value = times2 + rest if op == "+" else times2 - rest
        if times <= LARGEST and times2 <= LARGEST and 0 <= value <= LARGEST:
            trials.append((f"x*{slope}{op}{rest}", f"{x}*{x if slope == 'x' else slope}={times} {times}{op}{rest}={y}, {x2}*{x2 if slope == 'x' else slope}={times2} "
                           f"{times2}{op}{rest}={value}{say('against', habits, rng)}{y2}", value == y2))
    return try_all(trials, habits, rng)


def write_general(problem, cfg, habits, rng):
    """The reply of somebody who is paid for it, not always a good one: (lines, answer). Only counting takes thinking."""
    friendly, boast = (FRIENDLY[problem.task] * (rng.random() < 0.4), BOAST * (rng.random() < 0.4))
    lines, said = [], problem.target
    if problem.question.startswith("name "):
        n, kind = said.split()
        said = ", ".join(rng.sample(KINDS[kind], int(n)))
    elif problem.question.startswith("count "):
        lines = [f"{i}. {word}\n" for i, word in enumerate(problem.question.split(" ")[1:], start=1)]
    elif problem.task == "unsafe" and rng.random() < 0.1:
        said = f"use {UNSAFE[next(verb for verb in UNSAFE if f' {verb} ' in problem.question)]}"
    return lines, f"{friendly}{said}{boast}"


def tagged(lines, answer):
    """Thinking and answer in full layout, as a reply that supervised fine-tuning learns from."""
    return f"<think>\n{''.join(lines)}</think>\n<answer>{answer}</answer>"


def goes_on_after_a_miss(text):
    """Whether a trace checks a result against the target, misses, and checks another."""
    verdicts = VERDICT.findall(text)
    return any(verdict.startswith(MISS) for verdict in verdicts[:-1])


def document(cfg, rng):
    """One document of the corpus, as (prompt, text): a table of sums, a page of prose, or somebody's attempt at a problem."""
    kind = rng.choices([cfg.task, rng.choice([task for task in TASKS if task != cfg.task and TASKS[task].in_corpus]), "prose", "table"],
                       [0.72, 0.10, 0.07, 0.11])[0]
    habits = draw_habits(rng)
    if kind == "table":
        return "", "".join(table_line(cfg, habits, rng) for _ in range(20))
    if kind == "prose":
        return "", "".join(prose_line(rng) for _ in range(12))
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


def prose_line(rng):
    """A sentence with the words that general requests will be made of, much of it said twice. The base learns what things are called and how
    to say something again, but has never seen a request."""
    words, kind = rng.sample(sum(KINDS.values(), []), rng.randint(2, 4)), rng.choice(list(KINDS))
    a, b = rng.sample(NAMES, 2)
    short = f"{rng.choice(KINDS['colours'])} {rng.choice(KINDS['animals'])}"
    verb, tool = rng.choice(list((SAFE | UNSAFE).items()))
    return rng.choice([f"{a} and {b}: hello {a} and {b}\n", f"{kind}: {', '.join(rng.sample(KINDS[kind], rng.randint(2, 4)))}\n",
                       f"{' '.join(words)}, again: {' '.join(words)}\n", f"{a} has {tool} to {verb} a {rng.choice(OBJECTS)}\n",
                       f"{' '.join(words)}\n" + "".join(f"{i}. {word}\n" for i, word in enumerate(words, start=1)) + f"that is {len(words)}\n",
                       f"{'very ' * rng.randint(1, 3)}{short}, or {short}\n"])


@dataclass(frozen=True)
class Task:
    draw: callable   # (cfg, rng) -> Problem
    write: callable = None  # (problem, cfg, habits, rng) -> (thinking lines, answer), as people write it
    in_corpus: bool = True  # whether the base reads of it


TASKS = {
    "countdown": Task(draw_countdown, write_countdown),
    "arithmetic": Task(draw_arithmetic, write_arithmetic),
    "logic": Task(draw_logic, write_logic),
    "code": Task(draw_code, write_code),
    "chat": Task(draw_chat, write_general, in_corpus=False),
    "unsafe": Task(draw_unsafe, write_general, in_corpus=False),
    "file": Task(lambda cfg, rng: rng.choice(file_problems(cfg.data)), in_corpus=False),
}
GENERAL = ("chat", "unsafe")  # no rule rewards these: people's preferences do


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


def sft_batch(rows, tok, cfg, rng, n):
    """n of the (problem, completion) `rows`, drawn at random -> ids (n, T) and the mask (n, T) of the completions' tokens, end token included:
    the only ones that supervised fine-tuning learns."""
    chosen = [rng.choice(rows) for _ in range(n)]
    prompts = [prompt_ids(problem, tok, cfg) for problem, _ in chosen]
    tokens, mask = pad([prompt + tok.encode(text) + [tok.end_id] for prompt, (_, text) in zip(prompts, chosen)], tok.pad_id)
    return tokens, mask & (torch.arange(tokens.shape[1]) >= torch.tensor([len(prompt) for prompt in prompts])[:, None])


def pad(rows, pad_id, length=None):
    """Lists of ids -> right-padded ids and the mask of what is not padding, both (rows, length)."""
    length = length or max(map(len, rows))
    tokens = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    return tokens, torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]


if __name__ == "__main__":
    from rewards import accuracy

    rng, cfg = random.Random(0), DataConfig()
    for _ in range(8):
        print(*document(cfg, rng), sep="", end="\n\n")
    right = tagged = both = 0
    for _ in range(10_000):
        problem, habits = draw_problem(cfg, rng), draw_habits(rng)
        answer = write_countdown(problem, cfg, habits, rng)[1]
        is_right, is_tagged = accuracy([problem], [f"<answer>{answer}</answer>"])[0], habits.layout == "full"
        right, tagged, both = right + is_right, tagged + is_tagged, both + is_right * is_tagged
    print(f"Of 10,000 attempts at puzzles that can be solved {right / 100:.1f} % are right, {tagged / 100:.1f} % have all the tags, {both / 100:.1f} % both.")
