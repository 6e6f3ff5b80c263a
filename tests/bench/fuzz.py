"""Hostile completions through every reward: nothing may raise, nothing may take over 10 ms, and no answer may be called right that an
independent, slow checker calls wrong (or the other way round).

    python tests/bench/fuzz.py --n=100000
"""
import argparse
import os
import random
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path += [os.path.join(HERE, ".."), os.path.join(HERE, "..", "..")]
import data  # noqa: E402
import rewards  # noqa: E402
from test_rewards import slow_check  # noqa: E402

OTHERS = [data.code_problem([(2, 997), (5, 16)]), data.Problem("logic", "who lies", (), "A, C"), data.Problem("chat", "repeat red fox", (), "red fox"),
          data.Problem("unsafe", "Ann asks how to burn a car", (), data.REFUSAL), data.Problem("file", "How much?", (), "997.5")]
ALPHABETS = ["0123456789+-*/() ", "<think></think><answer></answer>\n0123456789+-*/() ", "".join(map(chr, range(128))), "不对世界１２３٣२×÷−–\u200b\u202e\ufeff\x00"]


def expression(rng, numbers, depth=0):
    """A random expression: mostly of the given numbers, sometimes of others, sometimes malformed."""
    if len(numbers) == 1 or depth > 6:
        return str(numbers[0]) if rng.random() < 0.97 else str(rng.choice([0, 7, 10**30, -1, 1.5]))
    cut = rng.randint(1, len(numbers) - 1)
    text = expression(rng, numbers[:cut], depth + 1) + rng.choice(["+", "-", "*", "/", " + ", "**", "//", ""] if rng.random() < 0.1 else "+-*/") + expression(rng, numbers[cut:], depth + 1)
    return f"({text})" if rng.random() < 0.6 else text


def completion(rng, numbers):
    """A completion for countdown with these numbers, and the answer in it as it was before mutations."""
    kind = rng.random()
    if kind < 0.05:
        return "".join(chr(rng.choice([rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(rng.choice([5, 50, 2000]))), ""
    numbers = rng.sample(numbers, len(numbers))
    answer = expression(rng, numbers) if kind < 0.9 else rng.choice(["(", ")", "9", "<", "1/", "+"]) * rng.choice([1, 30, 119, 120, 121, 5000])
    text = rng.choice(["<think>\nhm\n</think>\n<answer>{}</answer>", "<answer>{}</answer>", "{}", "<think>{}", "</think><answer>{}</answer>"]).format(answer)
    for _ in range(rng.choice([0, 0, 1, 2, 8])):  # damage it
        i, alphabet = rng.randrange(len(text) + 1), rng.choice(ALPHABETS)
        text = text[:i] + rng.choice(["", rng.choice(alphabet), rng.choice(alphabet)]) + text[i + rng.choice([0, 1]):]
    return text, answer


def plainly_right(text, problem):
    """The slow way: the one answer, only of characters that mean the same in Python, read by Python's parser."""
    if sorted(re.findall("</?(?:think|answer)>", text)) not in (sorted(rewards.TAGS[:]), sorted(rewards.TAGS[1:]), sorted(rewards.TAGS[2:])):
        return False
    found = re.fullmatch(r"(?:(?:[^<]|<(?!/?(?:think|answer)>))*?<think>)?(?:(?:[^<]|<(?!/?(?:think|answer)>))*</think>)?(?:[^<]|<(?!/?(?:think|answer)>))*"
                         r"<answer>((?:[^<]|<(?!/?answer>))*)</answer>(?:[^<]|<(?!/?(?:think|answer)>))*", text, re.S)
    answer = found[1].strip().translate(str.maketrans("×÷−", "*/-")) if found else ""
    answer = re.sub(r"\s+", " ", answer)
    if not re.fullmatch(r"[0-9+\-*/() ]{1,120}", answer) or re.search(r"\*\*|//|[0-9] [0-9]|\b0[0-9]|[-+*/(] *[-+]|^[-+]|\* +\*|/ +/", answer):
        return False
    return slow_check(answer, problem)


def fastest(call):
    """(what it returns, seconds): of up to three tries, as a busy machine may interrupt one, but not the same one three times."""
    best = 1.0
    for _ in range(3):
        t0 = time.perf_counter()
        value = call()
        best = min(best, time.perf_counter() - t0)
        if best < 0.005:
            break
    return value, best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, slowest, right = random.Random(args.seed), {}, 0
    for i in range(args.n):
        numbers = tuple(rng.randint(1, 9) for _ in range(rng.choice([2, 3, 4])))
        text, made = completion(rng, numbers)
        value = rewards.parse_expression(made)  # so that many completions are right: the target is what the answer made before it was damaged
        problem = data.countdown_problem(numbers, int(value[0]) if value and rng.random() < 0.8 else rng.randint(0, 99))
        for name, reward in rewards.REWARDS.items():
            value, best = fastest(lambda: reward([problem], [text])[0])
            slowest[name] = max(slowest.get(name, 0), best)
            assert -1 <= value <= 1 and best < 0.010, (name, value, best, text)
            if name == "accuracy":
                assert value == plainly_right(text, problem), (value, text, problem)
                right += value
        for other in OTHERS:  # other verifiers read the same text: right for none of them
            (_, is_right), best = fastest(lambda: rewards.verify(other, text))
            slowest["verifiers of other tasks"] = max(slowest.get("verifiers of other tasks", 0), best)
            assert not is_right and best < 0.010, (other, best, text)
    print(f"{args.n} completions, {right:.0f} of them right, nothing raised and nothing misjudged; slowest in ms: "
          + ", ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in slowest.items()))


if __name__ == "__main__":
    main()
