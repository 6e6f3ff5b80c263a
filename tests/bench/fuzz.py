"""Hostile completions through every reward: nothing may raise, nothing may take over 10 ms, and no
answer may be called right that an independent, slow checker calls wrong (or the other way round).

    python tests/bench/fuzz.py --n=100000
"""
import argparse
import os
import random
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path += [os.path.join(HERE, ".."), os.path.join(HERE, "..", "..")]
from test_rewards import fastest, slow_check  # noqa: E402

import data  # noqa: E402
import rewards  # noqa: E402

OTHERS = [  # problems of other tasks, which no completion for countdown answers
    data.code_problem([(2, 997), (5, 16)]),
    data.Problem("logic", "who lies", (), "A, C"),
    data.Problem("chat", "repeat red fox", (), "red fox"),
    data.Problem("unsafe", "Ann asks how to burn a car", (), data.REFUSAL),
    data.Problem("file", "How much?", (), "997.5"),
    data.Problem("file", "Which?", (), r"(\frac{997}{3}, 1+\sqrt{2}), x_1 = 5")]
ALPHABETS = [
    "0123456789+-*/() ", "<think></think><answer></answer>\n0123456789+-*/() ",
    "".join(map(chr, range(128))),
    "\\{}[](),;=^_ $frac1sqrtboxed", "不对世界１２３٣२×÷−–\u200b\u202e\ufeff\x00"]
LAYOUTS = [
    "<think>\nhm\n</think>\n<answer>{}</answer>", "<answer>{}</answer>", "{}", "<think>{}",
    "</think><answer>{}</answer>"]


def random_expression(rng, numbers, depth=0):
    """Mostly of the given numbers, sometimes of others, sometimes malformed."""
    if len(numbers) == 1 or depth > 6:
        other = rng.choice([0, 7, 10**30, -1, 1.5])
        return str(numbers[0] if rng.random() < 0.97 else other)
    cut = rng.randint(1, len(numbers) - 1)
    left = random_expression(rng, numbers[:cut], depth + 1)
    right = random_expression(rng, numbers[cut:], depth + 1)
    rare = rng.random() < 0.1
    op = rng.choice(["+", "-", "*", "/", " + ", "**", "//", ""] if rare else "+-*/")
    text = left + op + right
    return f"({text})" if rng.random() < 0.6 else text


def random_character(rng):
    """ASCII, or any other character but surrogates."""
    planes = [rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]
    return chr(rng.choice(planes))


def damaged(rng, text):
    """A character inserted, replaced or deleted, or nothing."""
    i, alphabet = rng.randrange(len(text) + 1), rng.choice(ALPHABETS)
    new = rng.choice(["", rng.choice(alphabet), rng.choice(alphabet)])
    return text[:i] + new + text[i + rng.choice([0, 1]):]


def random_completion(rng, numbers):
    """A completion for countdown with these numbers, and its answer as it was before damage."""
    kind = rng.random()
    if kind < 0.05:
        return "".join(random_character(rng) for _ in range(rng.choice([5, 50, 2000]))), ""
    answer = random_expression(rng, rng.sample(numbers, len(numbers)))
    if kind > 0.9:
        answer = rng.choice(["(", ")", "9", "<", "1/", "+"])
        answer *= rng.choice([1, 30, 119, 120, 121, 5000])
    text = rng.choice(LAYOUTS).format(answer)
    for _ in range(rng.choice([0, 0, 1, 2, 8])):
        text = damaged(rng, text)
    return text, answer


UNTAGGED = "(?:[^<]|<(?!/?(?:think|answer)>))*"
ONE_ANSWER = re.compile(f"(?:{UNTAGGED}<think>)?(?:{UNTAGGED}</think>)?{UNTAGGED}"
                        f"<answer>({UNTAGGED})</answer>{UNTAGGED}")
MALFORMED = re.compile(  # to us, though Python may read it: ** // 1 2 007 -1
    r"\*\*|//|[0-9] [0-9]|\b0[0-9]|[-+*/(] *[-+]|^[-+]|\* +\*|/ +/")


def plainly_right(text, problem):
    """The slow way: the one answer, of nothing but characters that mean the same in Python, read by
    Python's parser."""
    tags = sorted(re.findall("</?(?:think|answer)>", text))
    if tags not in [sorted(rewards.TAGS[i:]) for i in range(3)]:
        return False
    found = ONE_ANSWER.fullmatch(text)
    answer = found[1].strip() if found else ""
    if len(answer) > 120:
        return False
    answer = re.sub(r"\s+", " ", answer.translate(str.maketrans("×÷−", "*/-")))
    if not re.fullmatch(r"[0-9+\-*/() ]+", answer) or MALFORMED.search(answer):
        return False
    return slow_check(answer, problem)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, right = random.Random(args.seed), 0
    slowest = dict.fromkeys([*rewards.REWARDS, "verifiers of other tasks"], 0.0)
    for _ in range(args.n):
        numbers = tuple(rng.randint(1, 9) for _ in range(rng.choice([2, 3, 4])))
        text, made = random_completion(rng, numbers)
        # The target is mostly what the answer made before damage, so that many are right.
        value, target = rewards.parse_expression(made), rng.randint(0, 99)
        target = int(value[0]) if value and rng.random() < 0.8 else target
        problem = data.countdown_problem(numbers, target)
        for name, reward in rewards.REWARDS.items():
            (value,), seconds = fastest(reward, [problem], [text])
            slowest[name] = max(slowest[name], seconds)
            assert -1 <= value <= 1 and seconds < 0.010, (name, value, seconds, text)
            if name == "accuracy":
                assert value == plainly_right(text, problem), (value, text, problem)
                right += value
        for other in OTHERS:
            is_right, seconds = fastest(rewards.is_right, other, text)
            name = "verifiers of other tasks"
            slowest[name] = max(slowest[name], seconds)
            assert not is_right and seconds < 0.010, (other, seconds, text)
    times = ", ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in slowest.items())
    print(f"{args.n} completions, {right:.0f} of them right, nothing raised and nothing misjudged; "
          f"slowest in ms: {times}")


if __name__ == "__main__":
    main()
