"""Rewards: rules and a reward model. A reward is a function (problems, texts) -> list[float].

Completions are untrusted input: limited in length, parsed by hand, never passed to eval(). Any text
gets a score, and quickly. Arithmetic is exact, without rounding: 8/(3-8/3) is 24.

    python -c "import data, rewards; p = data.countdown_problem((3, 7, 2), 20); \
               print(rewards.accuracy([p], ['<answer>(3+7)*2</answer>']))"
"""
import math
import operator
import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import BOAST, FRIENDLY, GENERAL, KINDS, WORDS
from model import GPT, UserError, opt

MAX_COMPLETION = 200_000  # characters; what is longer has neither thinking nor answer
MAX_ANSWER = 120  # characters; enough for any honest answer, and limits the parser's work


@dataclass
class RewardConfig:
    w_accuracy: float = opt(1.0, "weight of a right answer")
    w_format: float = opt(0.5, "weight of <think>...</think><answer>...</answer>")
    w_language: float = opt(0.0, "weight of the share of the thinking's words that are in the "
                            "question's language")
    w_length: float = opt(0.0, "weight of the soft overlong penalty")
    w_emoji: float = opt(0.0, "weight of the share of the thinking's lines that end with an emoji")
    w_preference: float = opt(0.0, "weight of the reward model's score, for general requests")
    w_harmless: float = opt(0.0, "weight of declining unsafe requests")


# ------------------------------------------------------------------------------------------------
# Reading a completion

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
TAG = re.compile(f"({'|'.join(TAGS)})")


def split_at_tags(text):
    """The tags of a text in order, and the parts between them, both lists. Stops after five tags:
    already wrong."""
    pieces = TAG.split(text, maxsplit=5) if len(text) <= MAX_COMPLETION else [text]
    return pieces[1::2], pieces[0::2]


def split_completion(text):
    """(thinking, answer) of a completion, each None where it is missing. Tags out of order, nested,
    doubled or left open make both None: an answer that could be read two ways is no answer."""
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


def has_format(text):
    """Whether it is <think>...</think><answer>...</answer>, with an answer and nothing around
    it."""
    tags, parts = split_at_tags(text)
    if tags != TAGS:
        return False
    before, _, between, answer, after = parts
    visible = any(c.isprintable() and not c.isspace() for c in answer)  # a zero-width space is not
    return visible and not (before + between + after).strip()


MISS = tuple(word.strip() for word in WORDS["miss"])
ANSWER = re.compile("|".join(word.strip() for word in WORDS["answer"]))
VERDICT = re.compile(rf"\b(?:{'|'.join(word.strip() for word in WORDS['miss'] + WORDS['hit'])})\b"
                     r"(?=\W*$)", re.M)  # at the end of a line, where our authors write it


def retries(text):
    """Whether a completion checks a result against the target, misses, and checks another. Only
    evaluations count this; nothing rewards it."""
    return any(verdict in MISS for verdict in VERDICT.findall(text)[:-1])


# ------------------------------------------------------------------------------------------------
# Verifiers: (problem, answer) -> (the answer in canonical form or None, whether it is right). The
# form is only for majority votes (cons@k in sample.py): equal answers must have one form


class Node(NamedTuple):
    """An expression, parsed."""
    value: Fraction
    ops: str     # "+-" for a sum, "*/" for a product, "" for a number or x
    terms: list  # texts: what is added, or the factors
    less: list   # what is subtracted, or divided by


APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def form_of(node):
    """The canonical text of an expression: neither the order of terms and factors nor needless
    brackets change it, so that (7+3)*2 and 2*(3+7) vote for the same answer."""
    if not node.ops:
        return node.terms[0]
    first, second = node.ops
    less = "".join(second + term for term in sorted(node.less))
    return f"({first.join(sorted(node.terms))}{less})"


def terms_of(node, ops):
    """(terms, less) of a node in a chain of `ops`, where a chain of other ops is one term."""
    return (node.terms, node.less) if node.ops in ("", ops) else ([form_of(node)], [])


def parse_expression(text, x=None):
    """Whole numbers, + - * / and brackets -> (value, numbers used, canonical form), or None if it
    is anything else, too long, or divides by zero. Where `x` is a number, the letter x stands for
    it."""
    if len(text) > MAX_ANSWER:
        return None
    text = text.translate(str.maketrans("×÷−", "*/-"))
    tokens = re.findall(r"[0-9]+|\S", text)[::-1]  # a stack: pop() takes the next one
    numbers = []

    def atom():
        token = tokens.pop() if tokens else ""
        if token == "(":
            node = chain(product, "+-")
            if not tokens or tokens.pop() != ")":
                raise ValueError("bracket left open")
            return node
        if token == "x" and x is not None:
            return Node(Fraction(x), "", [token], [])
        if not re.fullmatch("0|[1-9][0-9]*", token):
            raise ValueError("not a number")
        numbers.append(int(token))
        return Node(Fraction(token), "", [token], [])

    def product():
        return chain(atom, "*/")

    def chain(operand, ops):
        node = operand()
        while tokens and tokens[-1] in ops:
            op, other = tokens.pop(), operand()
            (terms, less), (added, taken) = terms_of(node, ops), terms_of(other, ops)
            if op in "-/":
                added, taken = taken, added
            node = Node(APPLY[op](node.value, other.value), ops, terms + added, less + taken)
        return node

    try:
        node = chain(product, "+-")
    except (ValueError, ZeroDivisionError):
        return None
    return None if tokens else (node.value, numbers, form_of(node))


def verify_countdown(problem, answer):
    """Right if the expression has exactly the target's value and uses every number exactly once."""
    parsed = parse_expression(answer)
    if parsed is None:
        return None, False
    value, numbers, form = parsed
    return form, value == problem.target and sorted(numbers) == sorted(problem.numbers)


def verify_number(problem, answer):
    """Right if it is the target, written as a whole number; an expression is no answer."""
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
    """Right if the expression in x makes every output from its input. Our own parser runs it."""
    tests = zip(problem.numbers[::2], problem.numbers[1::2], strict=True)
    runs = [(parse_expression(answer, x), y) for x, y in tests]
    form = next((run[2] for run, _ in runs if run), None)  # it may divide by zero for some x
    return form, all(run is not None and run[0] == y for run, y in runs)


def verify_reply(problem, answer):
    """Right if a reply does what was asked (chat) or declines (unsafe); a friendly opening and a
    boast at the end change nothing."""
    if len(answer) > MAX_ANSWER:
        return None, False
    said = answer.removeprefix(FRIENDLY[problem.task]).removesuffix(BOAST)
    if not problem.question.startswith("name "):
        return said, said == problem.target
    n, kind = problem.target.split()
    items = said.split(", ")
    return said, len(items) == len(set(items)) == int(n) and set(items) <= set(KINDS[kind])


VERIFIERS = {"countdown": verify_countdown, "arithmetic": verify_number, "logic": verify_logic,
             "code": verify_code, "chat": verify_reply, "unsafe": verify_reply}  # and "file", below


def verify(problem, text):
    """(canonical form of the answer or None, whether it is right) for a whole completion."""
    answer = split_completion(text)[1]
    return VERIFIERS[problem.task](problem, answer) if answer else (None, False)


def is_right(problem, text):
    return verify(problem, text)[1]


def is_right_untagged(problem, text):
    """Whether the answer is right if tags are ignored: what follows "answer:" counts as well,
    and so does a text that is nothing but the answer."""
    answer = split_completion(text)[1] or ANSWER.split(text)[-1].strip()
    return VERIFIERS[problem.task](problem, answer)[1]


# ------------------------------------------------------------------------------------------------
# Rewards


def accuracy(problems, texts):
    """1 for a right answer between <answer> tags, else 0."""
    return [float(is_right(p, text)) for p, text in zip(problems, texts, strict=True)]


def format_reward(problems, texts):
    """1 for <think>...</think><answer>...</answer> with an answer and nothing around it, else 0."""
    return [float(has_format(text)) for text in texts]


SCRIPTS = {  # the letters of each script
    "latin": "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "han": "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
    "kana": "぀-ヿ", "hangul": "가-힯\u3130-\u318f", "cyrillic": "Ѐ-ԯ", "greek": "Ͱ-Ͽ",
    "arabic": "؀-ۿ", "hebrew": "א-ת",
    "devanagari": "ऀ-ॿ", "thai": "฀-๿"}
RUNS = {name: re.compile(f"[{letters}]+") for name, letters in SCRIPTS.items()}
RUNS["other"] = re.compile(r"[^\W\d_" + "".join(SCRIPTS.values()) + "]+")  # scripts not listed
UNSPACED = ("han", "kana", "thai")  # two letters count as one word
MAX_READ = 10_000  # characters of the thinking that are checked for language and emoji


LETTER = f"[{SCRIPTS['latin']}{SCRIPTS['greek']}]"
FORMULA = re.compile(rf"\\[a-zA-Z]+|(?<!{LETTER})[a-zA-Zα-ωΑ-Ω](?!{LETTER})")  # \frac, x


def count_words(text, formulas=False):
    """{script: number of words} in the first 10,000 characters, not counting tags or, with
    `formulas`, LaTeX commands and single-letter symbols."""
    text, words = TAG.sub(" ", text[:MAX_READ]), {}
    text = FORMULA.sub(" ", text) if formulas else text
    for name, run in RUNS.items():
        found = run.findall(text)
        words[name] = sum(-(-len(w) // 2) for w in found) if name in UNSPACED else len(found)
    return words


def one_language(problem, text):
    """The share of the thinking's words that are in the script of the question; 1 where there are
    no words. A completion without thinking tags is read as a whole."""
    thinking, formulas = split_completion(text)[0], problem.task == "file"
    asked = count_words(problem.question, formulas)
    words = count_words(text if thinking is None else thinking, formulas)
    if asked["kana"]:  # Japanese is written in both
        for found in (asked, words):
            found["han"] += found.pop("kana")
    total, script = sum(words.values()), max(asked, key=asked.get)
    return words[script] / total if total else 1.0


def language_consistency(problems, texts):
    """R1's reward against mixed languages: `one_language` of each; 0 without any thinking
    (otherwise leaving it out would pay). It tells scripts apart, not English from
    French."""
    scores = []
    for problem, text in zip(problems, texts, strict=True):
        thought = re.search(r"\w", (split_completion(text)[0] or "")[:MAX_READ])
        scores.append(one_language(problem, text) if thought else 0.0)
    return scores


def overlong_penalty(lengths, limit):
    """Soft overlong penalty: lengths in tokens and the most there may be -> 0 up to 80 % of that,
    then falling to -1 (DAPO, arXiv 2503.14476, eq. 13)."""
    start = 0.8 * limit
    return [min(0.0, max(-1.0, (start - length) / (limit - start))) for length in lengths]


ENDS_WITH_EMOJI = re.compile(
    "[\u231a-\u23ff\u2600-\u27bf\u2b00-\u2bff\U0001f1e6-\U0001faff]\ufe0f?\\s*$")


def emoji(problems, texts):
    """The share of the thinking's lines that end with an emoji; 0 without thinking."""
    scores = []
    for text in texts:
        thinking = (split_completion(text)[0] or "")[:MAX_READ]
        lines = [line[-20:] for line in thinking.split("\n") if line.strip()]
        hits = sum(bool(ENDS_WITH_EMOJI.search(line)) for line in lines)
        scores.append(hits / len(lines) if lines else 0.0)
    return scores


def harmless(problems, texts):
    """1 for declining an unsafe request; for others there is nothing to decline (see `applies`)."""
    return [float(p.task != "unsafe" or is_right(p, text))
            for p, text in zip(problems, texts, strict=True)]


REWARDS = {  # a new reward: a line here and a weight w_NAME above (`Environment` adds two more)
    "accuracy": accuracy, "format": format_reward, "language": language_consistency,
    "emoji": emoji, "harmless": harmless}


def applies(name, problem):
    """Whether a reward judges a problem. Accuracy, language: reasoning problems; preference: chat
    and unsafe requests; harmless: unsafe ones; any other: all."""
    if name in ("accuracy", "language"):
        return problem.task not in GENERAL
    if name == "preference":
        return problem.task in GENERAL
    if name == "harmless":
        return problem.task == "unsafe"
    return True


def score(problems, texts, cfg, **others):
    """Every reward with a weight -> (totals, parts): N floats, and N dicts {name: value}; nan
    where a reward does not apply, which then adds nothing. `others` are rewards {name: function}
    that need more than the text, such as preference."""
    totals, parts = [0.0] * len(texts), [{} for _ in texts]
    for name, reward in {**REWARDS, **others}.items():
        weight = getattr(cfg, f"w_{name}")
        if not weight:
            continue
        judged = [i for i, problem in enumerate(problems) if applies(name, problem)]
        values = checked(name, reward, [problems[i] for i in judged],
                         [texts[i] for i in judged]) if judged else []
        for part in parts:
            part[name] = math.nan
        for i, value in zip(judged, values, strict=True):
            parts[i][name] = value
            totals[i] += weight * value
    return totals, parts


def checked(name, reward, problems, texts):
    """A reward's values as floats. Raises UserError unless it gives a finite number for each."""
    values = list(reward(problems, texts))
    if len(values) != len(texts):
        raise UserError(f"reward {name!r} returned {len(values)} values for {len(texts)} "
                        f"completions")
    for problem, text, value in zip(problems, texts, values, strict=True):
        if isinstance(value, (str, bytes)) or value is None or not math.isfinite(value):
            raise UserError(f"reward {name!r} returned {value!r} for the problem "
                            f"{problem.question[:80]!r} and the completion {text[:200]!r}")
    return [float(value) for value in values]


class Environment:
    """The `env` of `train_grpo`: draws problems, and turns token ids into text and text into
    rewards."""

    def __init__(self, tok, data_cfg, reward_cfg, max_new_tokens, judge=None):
        """`judge` is a RewardModel, needed if w_preference is not 0."""
        self.tok, self.data_cfg, self.reward_cfg = tok, data_cfg, reward_cfg
        self.max_new_tokens, self.judge = max_new_tokens, judge
        self.stop_ids, self.find_end = data.stops(tok, data_cfg)

    def draw(self, rng):
        """A training problem and its prompt's ids."""
        problem = data.draw_problem(self.data_cfg, rng)
        return problem, data.prompt_ids(problem, self.tok, self.data_cfg)

    def decode(self, ids):
        return data.completion_text(ids, self.tok, self.data_cfg)

    def reward(self, samples):
        """N samples, of which it reads problem, text and ids -> (N totals, N dicts of parts)."""
        def length(problems, texts):  # a reward that applies to all, so these are all samples
            return overlong_penalty([len(s.ids) for s in samples], self.max_new_tokens)

        problems, texts = [s.problem for s in samples], [s.text for s in samples]
        return score(problems, texts, self.reward_cfg, length=length,
                     preference=self.preference)

    def preference(self, problems, texts):
        prompts = [data.prompt_text(problem, self.data_cfg) for problem in problems]
        return self.judge.score(self.tok, prompts, texts)


# ------------------------------------------------------------------------------------------------
# Preferences and the reward model


def gold_reward(problem, answer):
    """How the simulated annotators rate an answer (None or "": none) to a general request, from -2
    to 3: it should be right and friendly, and not boast. No model sees this rule: the reward model
    learns from pairs, and evaluation shows how well it has learnt the rule."""
    if not answer:
        return -2.0
    right = verify_reply(problem, answer)[1]
    return 2.0 * right + answer.startswith(FRIENDLY[problem.task]) - answer.endswith(BOAST)


def preference_pairs(problems, answers, rng, label_noise=0.1):
    """Simulated annotators compare neighbours in answers[i], a list for problems[i], that differ
    in gold reward -> [(i, index of the preferred, index of the other)]. The more two answers
    differ, the fewer are wrong (Bradley-Terry): `label_noise` of them if the difference is 1."""
    pairs = []
    for i, (problem, said) in enumerate(zip(problems, answers, strict=True)):
        for a in range(0, len(said) - 1, 2):
            gold_a, gold_b = gold_reward(problem, said[a]), gold_reward(problem, said[a + 1])
            if gold_a != gold_b:
                odds = (label_noise / (1 - label_noise)) ** abs(gold_a - gold_b)  # of an error
                prefers_a = (gold_a > gold_b) != (rng.random() < odds / (1 + odds))
                pairs.append((i, a, a + 1) if prefers_a else (i, a + 1, a))
    return pairs


class RewardModel(nn.Module):
    """A transformer whose head gives a number per token; a text's score is their sum. Trained on
    pairs (Bradley-Terry), so only differences mean anything: they are log-odds that one text is
    preferred to another.

    The head sees a token as the LM head does: through the products, of the hidden state before it
    and its embedding, that add up to its logit. It learns a weight for each (0 at first): how well
    a token fits what was asked, such as a name to be copied, is there to be read. The usual head,
    on the hidden state at the token, preferred names that are likelier in good answers."""

    def __init__(self, cfg, gpt=None):
        super().__init__()
        self.cfg, self.gpt = cfg, gpt or GPT(cfg)
        self.fit = nn.Linear(cfg.n_embd, 1, bias=False)
        nn.init.zeros_(self.fit.weight)

    def forward(self, tokens, lengths):
        """Right-padded ids (N, T), lengths (N,) -> scores (N,), fp32. Every token counts, so
        that a wrong word is penalised where it stands; a pair's prompt adds the same to both."""
        before = self.gpt.hidden(tokens[:, :-1]).float()  # (N, T - 1, C)
        own = self.gpt.lm_head.weight[tokens[:, 1:]]
        scores = (before * own * self.fit.weight).sum(dim=2)
        written = torch.arange(1, tokens.shape[1], device=tokens.device) < lengths[:, None]
        return (scores * written).sum(dim=1)

    @torch.no_grad()
    def score(self, tok, prompts, texts):
        """The score of each completion of a prompt, both texts -> list of floats."""
        scores, device = [], self.fit.weight.device
        for i in range(0, len(prompts), 256):
            pairs = zip(prompts[i:i + 256], texts[i:i + 256], strict=True)
            tokens, lengths = text_batch(tok, pairs, self.cfg.context)
            scores += self(tokens.to(device), lengths.to(device)).tolist()
        return scores


def text_batch(tok, pairs, context):
    """(prompt, completion) texts -> right-padded ids (N, T), at most `context` of each, and their
    lengths (N,)."""
    ids = [(tok.encode(prompt + text) + [tok.end_id])[:context] for prompt, text in pairs]
    tokens, mask = data.pad(ids, tok.pad_id)
    return tokens, mask.sum(dim=1)


def bradley_terry_loss(preferred, other):
    """-log of the chance that the preferred text of each pair wins: scores (N,), (N,) -> scalar.
    (Bradley and Terry 1952; arXiv 2203.02155, eq. 1)"""
    return -F.logsigmoid(preferred - other).mean()


# ------------------------------------------------------------------------------------------------
# To skip at first: answers as people write them, for --data

# What is divided by without brackets: 12, x, \pi, \sqrt(2), each with an index, power, factorial.
ATOM = (r"([0-9]+|[^\W\d_]|\\(?!sqrt)[a-z]+|\\sqrt\(\w+\))(_\w)?(\^([0-9]+|\w|\([^()]*\)))?!?")


def fraction(found):
    """\\frac{a}{b} -> a/b, in brackets where they are needed."""
    a, b, factor = (part.strip("{} ") for part in found.groups(""))
    if re.fullmatch("-[0-9]+", b) and re.fullmatch(r"-?\w+", a):
        a, b = a[1:] if a.startswith("-") else f"-{a}", b[1:]
    a = f"({a})" if re.search(r"([-+]|\\(pm|mp|c[au]p))(?![^(]*\))", a[1:]) else a
    b = b if re.fullmatch(ATOM, b) else f"({b})"
    if found.string[:found.start()].rstrip().endswith(("/", "^")):
        return f"({a}/{b})"
    return f" ({a}/{b})" if factor else f" {a}/{b}"


SIGNS = [  # (what is written, what it means), replaced in this order
    ("[¼½¾⅐-⅞]", lambda found: " " + unicodedata.normalize("NFKC", found[0])),
    ("[\u2044÷]", "/"),  # the fraction slash that NFKC leaves
    (r"^[ *]*(?:minus|negative) (?=[0-9])", "-"),
    (r"(?:\\left)?\\\{ *([-−]?[0-9]+(?: *, *[-−]?[0-9]+)+) *(?:\\right)?\\\}",  # a set
     lambda found: re.sub(" *, *", ", ", found[1])),
    (r"(?<=[\w}$])~|(?<=[0-9}$]) ~|~(?= ?[0-9])", " "),  # elsewhere it is a negation
    (r"(?<=[0-9])\\,(?=[0-9]{3})", ""), (">=|≥", r"\\ge "), ("<=|≤", r"\\le "),
    (r"\\begin\{[bp]matrix\}", "[["), (r"\\end\{[bp]matrix\}", "]]"), (r"\\\\", "],["), ("&", ","),
    ("[−–]", "-"), ("π", r"\\pi "), ("∞", r"\\infty"), ("±", r"\\pm "), ("∪", r"\\cup "),
    ("≠", r"\\ne "), ("²", "^2"), ("³", "^3"), (r"\+?\\infty", r"\\infty"),
    (r"(?:√|(?<!\\)sqrt) ?([0-9]+)", r"\\sqrt{\1}"), (r"\\?sqrt ?|√", r"\\sqrt"),
    (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-z]))|°", " degrees"),
    (r" *(?:\\cdot(?![a-z])|\\times|[×*]) *", "*"),
    (r"\\in(?![a-z])", "="), (r"\\(?:left|right)(?![a-z])|\\[!{}]", ""), (r"\{,\}", ","),
    (r"(?:^[ *]*|(?<=boxed\{))(-?)\\?\$(?=[^$]*$) ?([0-9](?:[0-9.,]*[0-9])?"
     r"(?: (?:hundred|thousand|[mbtr]+illion)s?)?)", r"\1\2 dollars"),
    (r"\\%", "%"), (r"\\([gln]e)q", r"\\\1"),
    (r"\\[()\[\],;: ]|\\?[$€£¥]", " "), (r" *\{", "{")]
BRACES = [  # the same for nested braces: replaced from the inside out, in several passes
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}", r" \1 "),
    (r"([\^_])\{([0-9]+|\w)\}(?=[0-9])", r"\1\2 "), (r"([\^_])\{([0-9]+|\w)\}", r"\1\2"),
    (r"\\sqrt([0-9a-z])", r"\\sqrt(\1)"),
    (r"([\^_\]]|\\(?!boxed|[dtc]?frac)[a-z]+)\{([^{}]*)\}", r"\1(\2)"),
    (r"\\[dtc]?frac ?(\{[^{}]*\}|\w) ?(\{[^{}]*\}|\w)"
     r"(?=([a-z^!]|(?<=\})[0-9]| *\\(?!pm|mp|[gln]e|c[au]p)| +[a-z](?<![mglsh])(?![a-z]))?)",
     fraction)]
NAME = re.compile(r"(^|, ?)(?:\\?[^\W\d]\w*|\w\(\w\)|\(\w(?:, ?\w)*\)) ?= ?")  # x =, f(x) =
MATHS = (  # words, but no units
    "(?:arc)?(?:sin|cos|tan)[xyzh]?|csc|cot|log|exp|sqrt|abs|sgn|arg|det|gcd|lcm|max|mod|modulo|"
    "plus|minus|over|divided|multiplied|added|subtracted|squared|cubed|root|radical|factorial|"
    "choose|integral|inverse|reciprocal|imaginary|infinity|point|negative|alpha|beta|gamma|delta|"
    "epsilon|zeta|eta|theta|kappa|lambda|rho|sigma|tau|phi|psi|omega|zero|two|three|five|eight|"
    "nine|twelve|(?:four|six|seven|eleven)(?:ths?)?|(?:fif|eigh|nin|twelf)ths?|"
    "(?:twen|thir|fou?r|fif|six|seven|eigh|nine)t(?:een(?:ths?)?|y|ieths?)|"
    "(?:ten|hundred|thousand)(?:s|ths?)?|[a-z]+illi(?:on|ard)(?:th)?s?|mil|mille|lakhs?|crores?|"
    "half|halves|thirds?|twice|double|hex|binary|octal|gross|score|not|and|without|except|wrong|"
    "under|below|repeating|recurring|percent|greater|raised to|(?:less|fewer|more) than|"
    "times (?!(?:per|an?|each|every) )\\w+")
UNIT = (r"_[1-9][0-9]?|"  # base 9; or km/h, apples, ...
        r"(?: ?(?:[ackmp]m|[km]g|ml|ft|in|hr|oz|lb|sq|"
        r"(?![分成折割])"
        r"(?:(?![一二三四五六七八九十百千万亿萬億兆又点點半或])[㐀-鿿])+)|"
        r" (?-i:[mgLlsh])|"
        rf"(?: |(?=[^\W\d_]{{4}}))(?!(?:{MATHS})\b)[^\W\d_㐀-鿿]{{3,}})"
        rf"(?: (?!(?:{MATHS})\b)[^\W\d_]+(?<! (?-i:[nxyz]))){{0,3}}"
        r"(?:/[^\W\d_]+)?(?: ?\^[23])?")
SHORT = dict(pair.split(":") for pair in (  # units with two names
    "meter:m metre:m millimeter:mm millimetre:mm centimeter:cm centimetre:cm kilometer:km "
    "kilometre:km inch:in foot:ft feet:ft gram:g kilogram:kg pound:lb ounce:oz liter:l litre:l "
    "second:s sec:s minute:min hour:h hr:h usd:dollar").split())
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
          "trillion": 10**12}
SCIENTIFIC = re.compile(r"^([-+]?[0-9]{1,20}(?:\.[0-9]{1,20})?)\*10\^\(?([-+]?[0-9]{1,2})\)?(?!\S)")
WRITTEN = re.compile(
    r"([-+]?) ?((?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]{1,40})(?:\.[0-9]{1,40})?|\.[0-9]{1,40})"
    r"(?: ?/ ?(0*[1-9][0-9]*)| ([0-9]{1,9})/(0*[1-9][0-9]*))? ?(%|per ?cent\b)?"
    rf"((?: ?(?a:(?:{'|'.join(SCALES)})s?)\b){{0,3}})({UNIT})?", re.I)


def plain(text):
    """An answer without LaTeX; if there is a \\boxed{}, only the content of the last one, or "" if
    it is not closed."""
    for written, meant in SIGNS + BRACES * 4:
        text = re.sub(written, meant, text)
    *before, text = text.split("\\boxed")
    if before:
        boxed = re.match(r"\{((?:[^{}]|\{[^{}]*\})*)\}| ([^ {}]+)", text)
        text = boxed[1] or boxed[2] or "" if boxed else ""
    text = " ".join(text.split())
    has_relation = re.search(r"<|(?<!-)>|\\[gl]e(?![a-z])", text)  # "and" is not "or" there
    text = re.sub(r",? or " if has_relation else r",? (?:and|or) ", ", ", text)
    text = re.sub(r"^([\"'`])(.*)\1$", r"\2", text.lstrip(" *=").rstrip(" *.。:"))
    return re.sub(r"^\(([^(),]*)\)$|^\{([^{}]*)\}$", r"\1\2", text)  # (B) is B


def parse_number(text):
    """A number as people write it, 1,234.50, -3/4, 1 1/2, 50%, 5 million or 72 km/h -> (exact
    value, whether it is a percentage, its unit or ""). None for anything else, such as 2k or 3x."""
    text = re.sub(r"^([-+]?)10\^", r"\g<1>1*10^", text)
    text = SCIENTIFIC.sub(lambda m: f"{Decimal(f'{m[1]}e{m[2]}'):f}", text)
    found = WRITTEN.fullmatch(text)
    if not found:
        return None
    sign, number, below, upper, lower, percent, scales, unit = found.groups()
    value = Fraction(number.replace(",", "")) / int(below or 1)
    value += Fraction(int(upper or 0), int(lower or 1))
    for scale in scales.lower().split():
        value *= SCALES[scale.removesuffix("s")]
    plurals = r"(?<=[cs]h)es\b|(?<=x)es\b|(?<=ss)es\b|(?<=[^\Ws])s\b"
    unit = re.sub(rf"{plurals}|[ ^]", "", (unit or "").lower())
    return (-value if sign == "-" else value), bool(percent), SHORT.get(unit, unit)


def canonical(text):
    """The canonical form of what `plain` returns: no needless spaces, fractions and decimals in
    lowest terms, items between commas outside brackets sorted (1,500, 2,300 are two numbers)."""
    if ", " in text:
        text = re.sub(r"(?<![\w.,])[1-9][0-9]{0,2}(,[0-9]{3})+(?=, |$)",
                      lambda m: m[0].replace(",", ""), text)
    is_words = re.fullmatch(r"(?:[\w.'!?]+[ ,]+)*(?:[^\W\d_]{3,}|no)[.!?]?|\w", text, re.I)
    text = re.sub(r"(?<![0-9]) | (?![0-9])|(?<=[0-9A-Za-z)])(?<!\\pm)\*(?! ?[0-9*])", "", text)
    if is_words:
        text = text.lower()
    text = re.sub(r"(?<![\w.^/])([0-9]+/0*[1-9][0-9]*|[0-9]*\.[0-9]+)(?![.0-9^!])",
                  lambda m: str(Fraction(m[0])), text)
    items, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign in ",;" and depth == 0:
            items.append("")
        else:
            items[-1] += sign
    return ", ".join(sorted(items))


def verify_written(problem, answer):
    """Right if answer and target are the same number, list or text, however written. Units count if
    both have one; the only currency sign that is a unit is $. 50% equals 1/2, and also 50 if the
    question asked for a percentage (we assume so if the target is above 1)."""
    if max(len(answer), len(problem.target)) > MAX_ANSWER:  # the same words
        words, wanted = (" ".join(text.lower().split()) for text in (answer, problem.target))
        return words, words == wanted
    if answer == problem.target:  # also where `plain` leaves nothing of it, as of a lone =
        return canonical(plain(answer)) or answer, True
    got, want = plain(answer), plain(problem.target)
    right_form = canonical(want)  # one form: all that are right vote for it
    if ("=" in got) != ("=" in want):  # x = 72 is 72
        got, want = NAME.sub(r"\1", got), NAME.sub(r"\1", want)
    number, goal = parse_number(got), parse_number(want)
    if not (number and goal) or number[2] and goal[2] and number[2] != goal[2]:
        form = canonical(got)
        # The list 234,1 is not the number 1,234, and must not vote for it either.
        if form and form == canonical(want) and (number or not goal):
            return right_form, True
        return None if form in ("", right_form) else form, False
    (value, percent, _), (target, target_percent, _) = number, goal
    same_share = value * 100**target_percent == target * 100**percent
    if same_share or value == target and (abs(target) > 1 or target_percent):
        return right_form, True
    return str(value) + "%" * percent, False


VERIFIERS["file"] = verify_written
