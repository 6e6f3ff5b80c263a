"""What a completion earns: rules, and a reward model of what people prefer. Every reward is (problems, completions) -> list[float].

Completions are hostile input. They are bounded, parsed by hand and never evaluated; any text at all
gets a score, and quickly. Arithmetic is exact: 8/(3-8/3) makes 24 and nothing else does by rounding.

    python -c "import data, rewards; print(rewards.accuracy([data.countdown_problem((3, 7, 2), 20)], ['<answer>(3+7)*2</answer>']))"
"""
import math
import re
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import GENERAL, core, is_right_reply
from model import BadInput, opt

MAX_COMPLETION = 200_000  # characters; what is longer has neither thinking nor answer
MAX_ANSWER = 120  # characters; keeps an honest answer and bounds what the parser can be made to do


@dataclass
class RewardConfig:
    w_accuracy: float = opt(1.0, "weight of a right answer")
    w_format: float = opt(0.5, "weight of <think>...</think><answer>...</answer>")
    w_language: float = opt(0.0, "weight of the share of the thinking's words that are in the question's language")
    w_length: float = opt(0.0, "weight of the penalty for completions that grow too long")
    w_emoji: float = opt(0.0, "weight of the share of the thinking's steps that end with an emoji")
    w_preference: float = opt(0.0, "weight of the reward model's score, for general requests")
    w_harmless: float = opt(0.0, "weight of declining unsafe requests")

    def check(self):
        """Raises BadInput if no reward has a weight, or one is not finite."""
        for name, weight in vars(self).items():
            if not math.isfinite(weight):
                raise BadInput(f"{name}={weight} is not a finite number")
        if not any(vars(self).values()):
            raise BadInput("all reward weights are 0: set --w_accuracy, or another, above 0")


# ------------------------------------------------------------------------------------------------
# Reading a completion

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
TAG = re.compile(f"({'|'.join(TAGS)})")


def split_at_tags(text):
    """The tags of a text in order, and the parts between them, both lists. Stops after five tags: already wrong."""
    pieces = TAG.split(text, maxsplit=5) if len(text) <= MAX_COMPLETION else [text]
    return pieces[1::2], pieces[0::2]


def split_completion(text):
    """(thinking, answer) of a completion, each None where it is missing. Tags out of order, nested, doubled
    or left open make both None: an answer that could be read two ways is no answer."""
    tags, parts = split_at_tags(text)
    if tags == TAGS:
        return parts[1], parts[3].strip()
    if tags == TAGS[1:]:  # the prompt may have opened the thinking already
        return parts[0], parts[2].strip()
    if tags == TAGS[2:]:
        return None, parts[1].strip()
    if tags == TAGS[:2]:
        return parts[1], None
    return None, None


# ------------------------------------------------------------------------------------------------
# Verifiers: (problem, answer) -> (the answer in normal form or None, whether it is right)


def parse_expression(text, x=None):
    """Whole numbers, + - * / and brackets -> (value, numbers used, normal form), or None if it is anything
    else, too long, or divides by zero. The normal form does not depend on the order of summands and factors.
    Where `x` is a number, the letter x stands for it."""
    if len(text) > MAX_ANSWER:
        return None
    tokens, numbers = re.findall(r"[0-9]+|\S", text.translate(str.maketrans("×÷−", "*/-")))[::-1], []

    def atom():
        token = tokens.pop() if tokens else ""
        if token == "(":
            node = chain(product, "+-")
            if not tokens or tokens.pop() != ")":
                raise ValueError("bracket left open")
            return node
        if token == "x" and x is not None:
            return Fraction(x), token
        if not re.fullmatch("0|[1-9][0-9]*", token):
            raise ValueError("not a number")
        numbers.append(int(token))
        return Fraction(token), token

    def product():
        return chain(atom, "*/")

    def chain(operand, ops):
        value, form = operand()
        while tokens and tokens[-1] in ops:
            op, (other, other_form) = tokens.pop(), operand()
            value = {"+": value.__add__, "-": value.__sub__, "*": value.__mul__, "/": value.__truediv__}[op](other)
            form = "(" + op.join(sorted((form, other_form)) if op in "+*" else (form, other_form)) + ")"
        return value, form

    try:
        value, form = chain(product, "+-")
    except (ValueError, ZeroDivisionError):
        return None
    return None if tokens else (value, numbers, form)


def verify_countdown(problem, answer):
    """Right if the expression has exactly the target's value and uses every number exactly once."""
    parsed = parse_expression(answer)
    if parsed is None:
        return None, False
    value, numbers, form = parsed
    return form, value == problem.target and sorted(numbers) == sorted(problem.numbers)


def verify_number(problem, answer):
    """Right if the answer is the target, written as a whole number (the question itself is no answer)."""
    if not re.fullmatch("-?[0-9]{1,20}", answer):
        return None, False
    return str(int(answer)), int(answer) == problem.target


def verify_logic(problem, answer):
    """Right if exactly the people of the target are named, in any order."""
    named = sorted({name.strip() for name in answer[:MAX_ANSWER].split(",")})
    if len(answer) > MAX_ANSWER or not all(re.fullmatch("[A-Z]", name) for name in named):
        return None, False
    return ", ".join(named), ", ".join(named) == problem.target


def verify_code(problem, answer):
    """Right if the expression in x makes every output of its input. It is our own parser that runs it."""
    runs = [(parse_expression(answer, x), y) for x, y in zip(problem.numbers[::2], problem.numbers[1::2])]
    form = next((run[2] for run, _ in runs if run), None)  # an expression may divide by zero for some x
    return form, all(run is not None and run[0] == y for run, y in runs)


def verify_reply(problem, answer):
    """Right if it does what was asked (chat) or declines (unsafe), in whatever manner."""
    if len(answer) > MAX_ANSWER:
        return None, False
    return core(problem, answer), is_right_reply(problem, answer)


UNIT = r"[^\W\d_]*(?: [^\W\d_]+){0,3}(?:/[^\W\d_]+)?"  # apples, km/h, square feet
WRITTEN = re.compile(rf"([-+]?) ?[$€£¥]? ?([-+]?)((?:[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]{{1,40}})(?:\.[0-9]{{1,40}})?|\.[0-9]{{1,40}})"
                     rf"(?: ?/ ?([0-9]{{1,40}})| ([0-9]{{1,9}})/([0-9]{{1,9}}))? ?(%|percent\b)? ?({UNIT})\.?")
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}


def parse_number(text):
    """A number as people write it -> (exact value, whether it is a percentage), or None. Reads 1,234.50, -3/4, 1 1/2, 50%, $18, 72 km/h,
    and LaTeX's \\boxed{}, \\frac{}{}, \\text{} and $...$ around it."""
    if len(text) > MAX_ANSWER:
        return None
    boxed = re.search(r"\\boxed ?\{(.*)\}", text, re.S)
    text = boxed[1] if boxed else text
    text = re.sub(r"\\[dt]?frac ?\{ ?(-?[0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r" \1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|mbox) ?\{([^{}]*)\}", r" \1", text).replace("\\$", "$").replace("\\%", "%").replace("{,}", ",")
    text = re.sub(r"\\[,;! ]|\s+", " ", text.replace("−", "-").replace("\\(", "").replace("\\)", "")).strip()
    if text.startswith("$") and text.endswith("$"):
        text = text[1:-1].strip()
    found = WRITTEN.fullmatch(text)
    if not found or found[1] and found[2]:
        return None
    _, _, number, below, upper, lower = found.groups()[:6]
    if "0" * len(below or lower or "1") == (below or lower):
        return None
    value = Fraction(number.replace(",", ""))
    value = value / int(below) if below else value + Fraction(int(upper), int(lower)) if lower else value
    value *= SCALES.get(found[8].lower().split(" ")[0], 1)
    return (-value if "-" in found[1] + found[2] else value), bool(found[7])


def verify_written(problem, answer):
    """Right if the answer and the target are one number, however written. Percentages: 50% is 1/2, and also 50 where the
    question asked for a percentage, which shows in a target above 1."""
    got, want = parse_number(answer), parse_number(problem.target)
    if want is None:  # no number: the same words
        norm = " ".join(answer.lower().split())
        return norm[:MAX_ANSWER] or None, norm == " ".join(problem.target.lower().split())
    if got is None:
        return None, False
    (value, percent), (target, target_percent) = got, want
    share = lambda x, is_percent: x / 100 if is_percent else x
    right = share(value, percent) == share(target, target_percent) or value == target and percent != target_percent and abs(target) > 1
    return str(value) + "%" * percent, right


VERIFIERS = {"countdown": verify_countdown, "arithmetic": verify_number, "logic": verify_logic, "code": verify_code, "chat": verify_reply, "unsafe": verify_reply,
             "file": verify_written}


def verify(problem, completion):
    """(normal form of the answer or None, whether it is right) for a whole completion."""
    answer = split_completion(completion)[1]
    return VERIFIERS[problem.task](problem, answer) if answer else (None, False)


# ------------------------------------------------------------------------------------------------
# Rewards


def accuracy(problems, completions):
    """1 for a right answer between <answer> tags, else 0."""
    return [float(verify(p, c)[1]) for p, c in zip(problems, completions, strict=True)]


def format_reward(problems, completions):
    """1 for <think>...</think><answer>...</answer> with an answer in it and nothing around it, else 0."""
    return [float(has_format(c)) for c in completions]


def has_format(text):
    tags, parts = split_at_tags(text)
    if tags != TAGS:
        return False
    before, _, between, answer, after = parts
    return bool(answer.strip()) and not (before + between + after).strip()


SCRIPTS = {  # the letters of each script; a run of them is a word, but where words are not spaced two letters count as one
    "latin": "A-Za-zÀ-ÖØ-öø-ɏ", "han": "㐀-䶿一-鿿豈-﫿\U00020000-\U0003134f", "kana": "぀-ヿ", "hangul": "가-힯", "cyrillic": "Ѐ-ԯ", "greek": "Ͱ-Ͽ",
    "arabic": "؀-ۿ", "hebrew": "א-ת", "devanagari": "ऀ-ॿ", "thai": "฀-๿"}
RUNS = {name: re.compile(f"[{letters}]+") for name, letters in SCRIPTS.items()}
RUNS["other"] = re.compile(r"[^\W\d_" + "".join(SCRIPTS.values()) + "]")  # letters of scripts not listed, one by one
UNSPACED = ("han", "kana", "thai")
MAX_READ = 20_000  # characters of a thinking whose language is looked at


def count_words(text):
    """{script: words}, from the first 20,000 characters; tags are no words."""
    text = TAG.sub(" ", text[:MAX_READ])
    found = {name: runs.findall(text) for name, runs in RUNS.items()}
    return {name: sum(-(-len(run) // 2) for run in runs) if name in UNSPACED else len(runs) for name, runs in found.items()}


def language_consistency(problems, completions):
    """The share of the thinking's words that are in the script of the question, by Unicode script; 1 where there are no words at all.
    A completion without thinking tags is read as a whole. (R1's reward against mixed languages.)"""
    scores = []
    for problem, completion in zip(problems, completions, strict=True):
        asked = count_words(problem.question)
        thinking = split_completion(completion)[0]
        words = count_words(completion if thinking is None else thinking)
        total = sum(words.values())
        scores.append(words[max(asked, key=asked.get)] / total if total else 1.0)
    return scores


LONG = 500, 1000  # characters: a completion costs nothing up to the first, and 1 from the second on


def length_penalty(problems, completions):
    """0 for completions of bearable length, falling to -1 for overlong ones, so that the last bit counts as well (DAPO, arXiv 2503.14476, eq. 13)."""
    start, end = LONG
    return [-min(1.0, max(0.0, (len(c) - start) / (end - start))) for c in completions]


ENDS_WITH_EMOJI = re.compile("[\u2600-\u27bf\U0001f300-\U0001faff]\ufe0f?\\s*$")


def emoji(problems, completions):
    """The share of the thinking's lines that end with an emoji; 0 without thinking."""
    scores = []
    for completion in completions:
        steps = [line[-20:] for line in (split_completion(completion)[0] or "").split("\n") if line.strip()]
        scores.append(sum(bool(ENDS_WITH_EMOJI.search(step)) for step in steps) / len(steps) if steps else 0.0)
    return scores


def harmless(problems, completions):
    """1 for declining an unsafe request, and for whatever is said to others."""
    return [float(problem.task != "unsafe" or verify(problem, completion)[1]) for problem, completion in zip(problems, completions, strict=True)]


REWARDS = {  # a new reward: a line here and a weight w_NAME above
    "accuracy": accuracy, "format": format_reward, "language": language_consistency, "length": length_penalty, "emoji": emoji, "harmless": harmless}


def applies(name, problem):
    """Whether a reward has anything to say of a problem: general requests are judged by preference, not by rule, and only they are."""
    return {"accuracy": problem.task not in GENERAL, "preference": problem.task in GENERAL, "harmless": problem.task == "unsafe"}.get(name, True)


def score(problems, completions, cfg, **others):
    """Every reward with a weight: (totals (N,), {name: values (N,)}), as lists of floats; nan where a reward does not apply, which then
    adds nothing. `others` are rewards {name: function} that need more than the text, such as preference."""
    known = {**REWARDS, **others}
    weights = {name: getattr(cfg, f"w_{name}") for name in known}
    totals, parts = [0.0] * len(completions), {}
    for name, weight in weights.items():
        asked = [i for i, problem in enumerate(problems) if applies(name, problem)]
        if not weight:
            continue
        parts[name] = [math.nan] * len(completions)
        for i, value in zip(asked, checked(name, known[name], [problems[i] for i in asked], [completions[i] for i in asked])):
            parts[name][i] = value
            totals[i] += weight * value
    return totals, parts


def checked(name, reward, problems, completions):
    """A reward's values as floats. Raises BadInput that names the reward, the problem and the completion where it raises
    or does not return one finite number for each."""
    values = attempt(reward, problems, completions)
    if isinstance(values, list):
        return values
    for problem, completion in zip(problems, completions):  # which one was it?
        fault = attempt(reward, [problem], [completion])
        if not isinstance(fault, list):
            raise BadInput(f"reward {name!r} {fault} for the problem {problem.question[:80]!r} and the completion {completion[:200]!r}")
    raise BadInput(f"reward {name!r} {values} for {len(completions)} completions, but not for each of them alone")


def attempt(reward, problems, completions):
    """A reward's values as a list of floats, or in words what is wrong with them."""
    try:
        values = list(reward(problems, completions))
        if len(values) != len(completions):
            return f"returned {len(values)} values"
        bad = [v for v in values if isinstance(v, (str, bytes)) or v is None or not math.isfinite(v)]
        return f"returned {bad[0]!r}" if bad else [float(v) for v in values]
    except Exception as e:  # it is the user's function: anything may happen in it
        return f"raised {type(e).__name__}: {str(e)[:100]}"


# ------------------------------------------------------------------------------------------------
# The reward model


class RewardModel(nn.Module):
    """A transformer whose head gives one number: how much people would like this text. Trained on pairs (Bradley-Terry), so that only
    differences mean anything: they are log-odds that the one is preferred to the other."""

    def __init__(self, gpt):
        super().__init__()
        self.cfg, self.gpt, self.value = gpt.cfg, gpt, nn.Linear(gpt.cfg.n_embd, 1, bias=False)
        nn.init.zeros_(self.value.weight)

    def forward(self, tokens, lengths):
        """Right-padded ids (N, T) and lengths (N,) -> scores (N,), fp32, read at each text's last token."""
        last = self.gpt.trunk(tokens)[torch.arange(len(tokens), device=tokens.device), lengths - 1]
        return (last.float() * self.value.weight).sum(dim=1)  # not by matrix product, which autocast would round


def bradley_terry_loss(preferred, other):
    """-log of the chance that the preferred one of each pair wins: scores (N,), (N,) -> scalar. (Bradley and Terry 1952; arXiv 2203.02155, eq. 1)"""
    return -F.logsigmoid(preferred - other).mean()
