"""Rewards against hostile text, exact arithmetic, and an independent checker."""
import ast
import math
import random
import time
from fractions import Fraction

import pytest

import rewards
from data import Problem, countdown_problem
from model import BadInput
from rewards import RewardConfig, accuracy, format_reward, language_consistency, parse_expression, parse_number, score, split_completion, verify

PROBLEM = countdown_problem((3, 7, 2), 20)
WRITTEN = Problem("file", "How much is it?", (), "72")
ARITHMETIC = Problem("arithmetic", "what is 3+7*2", (3, 7, 2), 17)


def answer(text, problem=PROBLEM):
    return accuracy([problem], [f"<think>\nso\n</think>\n<answer>{text}</answer>"])[0]


@pytest.mark.parametrize("text", ["(3+7)*2", "2*(7+3)", " ( 3 + 7 ) * 2 ", "((3+7))*2", "(3+7)×2", "(7+3)*2"])
def test_right_expressions_are_right(text):
    assert answer(text) == 1


@pytest.mark.parametrize("text", [
    "3*7-2",                    # the wrong value
    "20", "", "3+7+2+8",        # the right value from other numbers
    "2*(3+7)*1", "(3+7)+(3+7)",  # a number too many, numbers twice
    "(3+7)*2=20", "x=(3+7)*2",  # no expression
    "(3+7*2", "(3+7))*2", "3+7)*2(", "(3+7)2", "(3+7) 2", "3 7*2",
    "--3+7*2", "+3+7*2", "(3+7)**2", "(3+7)//2", "2*(3+0x7)", "(03+7)*2", "(3.0+7)*2", "(3+7)*2j", "1e1*2",
    "(３+７)*２", "(३+७)*२", "(3+7)*²", "__import__('os')", "sum([3,7])*2",
])
def test_wrong_and_malformed_expressions_are_wrong(text):
    assert answer(text) == 0


def test_arithmetic_is_exact():
    assert answer("8/(3-8/3)", countdown_problem((8, 3, 8, 3), 24)) == 1
    assert answer("1/3*3", countdown_problem((1, 3, 3), 1)) == 1
    assert answer("9999999999999999/9999999999999998", countdown_problem((9999999999999999, 9999999999999998), 1)) == 0  # in floats it is 1


def test_every_number_is_used_exactly_as_often_as_it_is_given():
    twice = countdown_problem((3, 3, 2), 12)
    assert answer("(3+3)*2", twice) == 1 and answer("(3+3)*2", countdown_problem((3, 2), 12)) == 0
    assert answer("3*2*2", twice) == 0


def test_division_by_zero_is_wrong_and_no_error():
    assert answer("3/(7-7)", countdown_problem((3, 7, 7), 0)) == 0


HOSTILE = [
    "", " ", "\0", "\0" * 1000, "9**9**9", "<answer>9**9**9</answer>", "<answer>" + "9" * 5000 + "</answer>",
    "<answer>" + "(" * 10_000 + "1" + ")" * 10_000 + "</answer>", "<answer>" + "(" * 60 + "1" + ")" * 60 + "</answer>",
    "x" * 1_000_000, "<think>" * 150_000, "<" * 1_000_000, "</think>" * 25_000, "<answer>" * 20_000, " " * 1_000_000,
    "<answer>" + " " * 190_000 + "</answer>", "<answer>1/0</answer>", "<answer>1</answer><answer>2</answer>", "<answer>", "</answer>",
    "<answer></answer>", "<think><think></think></think><answer>1</answer>", "<answer>١٢</answer>", "<answer>\ud800</answer>",
    "<answer>*" * 10, "<answer>()</answer>", "<answer>)(</answer>", "<answer>1+</answer>", "<answer>-</answer>",
    "<answer>" + "+".join("1" * 60) + "</answer>", "<answer>" + "*".join(["99999"] * 19) + "</answer>",
    "世界" * 90_000, "a世" * 90_000, "<think>" + "a 世 б " * 30_000 + "</think>", "a " * 99_000,
    "<think>\n</think>\n<answer>" + "1" * 199_000 + "</answer>",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_any_text_gets_a_score_within_ten_milliseconds(text):
    for problem in (PROBLEM, ARITHMETIC, WRITTEN):
        best, best_language = [], []
        for _ in range(3):  # the machine may be busy elsewhere: the fastest of three is what the code takes
            start = time.perf_counter()
            right, form = accuracy([problem], [text]), format_reward([problem], [text])
            best.append(time.perf_counter() - start)
            start = time.perf_counter()
            assert 0 <= language_consistency([problem], [text])[0] <= 1
            best_language.append(time.perf_counter() - start)
        assert min(best) < 0.010 and min(best_language) < 0.010
        assert right == [0.0] and form in ([0.0], [1.0])


def test_two_answers_are_no_answer():
    good = "<answer>(3+7)*2</answer>"
    for text in (good + good, "<answer>1</answer>" + good, "<think>" + good + "</think>" + good, "<answer>" + good + "</answer>",
                 "<think>" + good + "</think>", "<think>" + good, good + "<think></think>", "<think></think></think>" + good):
        assert accuracy([PROBLEM], [text]) == [0.0], text


def test_an_answer_counts_without_thinking_and_after_a_thinking_that_the_prompt_opened():
    assert accuracy([PROBLEM] * 2, ["<answer>(3+7)*2</answer>", "hm</think><answer>(3+7)*2</answer>"]) == [1.0, 1.0]


@pytest.mark.parametrize("text, right", [
    ("<think>a</think><answer>b</answer>", 1), ("<think>\na\n</think>\n<answer>b</answer>\n", 1), ("<think></think><answer>b</answer>", 1),
    ("a<think>a</think><answer>b</answer>", 0), ("<think>a</think>b<answer>b</answer>", 0), ("<think>a</think><answer>b</answer>c", 0),
    ("<think>a</think><answer> </answer>", 0), ("<answer>b</answer><think>a</think>", 0), ("<think>a<answer>b</answer></think>", 0),
    ("<think>a</think><answer>b", 0), ("<think>a<answer>b</answer>", 0), ("<Think>a</Think><answer>b</answer>", 0), ("b", 0),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0), ("<think>a<think>b</think></think><answer>b</answer>", 0),
])
def test_format_is_exactly_the_two_blocks(text, right):
    assert format_reward([PROBLEM], [text]) == [float(right)]


def test_thinking_and_answer_are_read_from_a_whole_completion():
    assert split_completion("<think>\nhm\n</think>\n<answer> 1+2 </answer>") == ("\nhm\n", "1+2")
    assert split_completion("no tags") == (None, None)


def test_arithmetic_wants_the_number_and_not_the_question():
    assert answer("17", ARITHMETIC) == 1
    for text in ("16", "3+7*2", "17.0", "1 7", "17 or 18", "", "１７", "+17", "17\n18"):
        assert answer(text, ARITHMETIC) == 0, text


def test_votes_do_not_depend_on_the_order_of_summands_and_factors():
    form = lambda text: verify(PROBLEM, f"<answer>{text}</answer>")[0]
    assert form("(3+7)*2") == form("2*(7+3)") == form(" 2 * ( 3+7 ) ")
    assert len({form("7-3"), form("3-7"), form("(3+7)*2"), form("3+7*2"), None}) == 5
    assert form("nonsense") is None


def slow_check(text, problem):
    """Python's own parser on text that is known to be harmless, values as fractions of the tree."""
    used = []

    def value(node):
        if isinstance(node, ast.BinOp):
            a, b = value(node.left), value(node.right)
            return {ast.Add: lambda: a + b, ast.Sub: lambda: a - b, ast.Mult: lambda: a * b, ast.Div: lambda: a / b}[type(node.op)]()
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        raise ValueError
    try:
        return value(ast.parse(text.strip(), mode="eval").body) == problem.target and sorted(used) == sorted(problem.numbers)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return False


def test_the_verifier_agrees_with_an_independent_checker():
    rng, right = random.Random(0), 0
    for _ in range(20_000):
        numbers = [rng.randint(1, 9) for _ in range(3)]
        rng.shuffle(numbers)
        a, b, c = numbers
        o, p = rng.choice("+-*/"), rng.choice("+-*/")
        text = rng.choice([f"({a}{o}{b}){p}{c}", f"{a}{o}({b}{p}{c})", f"{a}{o}{b}{p}{c}"])
        problem = countdown_problem(tuple(sorted(numbers)), rng.randint(0, 12))
        for _ in range(rng.choice([0, 0, 1, 2])):  # damage it a little
            i = rng.randrange(len(text))
            text = text[:i] + rng.choice(["", rng.choice("0123456789+-*/() ")]) + text[i + 1:]
        want = slow_check(text, problem)
        right += want
        assert answer(text, problem) == want, text
    assert right > 100


def test_the_parser_reads_left_to_right_and_products_first():
    for text, value in [("9-3-2", 4), ("8/4/2", 1), ("2+3*4", 14), ("2*3+4*5", 26), ("9-(3-2)", 8), ("1/3+1/6", Fraction(1, 2))]:
        assert parse_expression(text)[0] == value


def test_the_total_is_the_weighted_sum_and_every_part_is_shown():
    good, bare = "<think>a</think><answer>(3+7)*2</answer>", "<answer>(3+7)*2</answer>"
    totals, parts = score([PROBLEM] * 3, [good, bare, "x"], RewardConfig(w_accuracy=2.0, w_format=0.5))
    assert totals == [2.5, 2.0, 0.0] and parts == {"accuracy": [1, 1, 0], "format": [1, 0, 0]}
    with pytest.raises(BadInput):
        RewardConfig(w_accuracy=0, w_format=0).check()
    totals, parts = score([PROBLEM], ["<think>no 不对</think>"], RewardConfig(w_language=2.0))
    assert totals == [1.0] and parts["language"] == [0.5]


def test_problems_and_completions_must_match_in_number():
    with pytest.raises(ValueError):
        accuracy([PROBLEM], ["a", "b"])


@pytest.mark.parametrize("text, value", [
    ("72", 72), (" 72. ", 72), ("1,234.50", Fraction(2469, 2)), ("-3/4", Fraction(-3, 4)), ("1 1/2", Fraction(3, 2)), (".5", Fraction(1, 2)), ("$18", 18), ("$18.00", 18),
    ("18 dollars", 18), ("-$5", -5), ("72 km/h", 72), ("12 square feet", 12), ("5 million", 5 * 10**6), (r"\boxed{72}", 72), (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
    (r"$\frac{3}{4}$", Fraction(3, 4)), (r"72 \text{ apples}", 72), (r"\$1{,}000", 1000), ("− 3", -3), ("0.1", Fraction(1, 10)), ("50%", 50), ("12.5 percent", Fraction(25, 2))])
def test_numbers_are_read_as_people_write_them(text, value):
    assert parse_number(text)[0] == value


@pytest.mark.parametrize("text", ["", "-", "x", "1e5", "3,5", "1,2345", "12 34", "5 or 6", "5 / 0", "1/00", "1 0/0", "+-3", "--5", "1/2/3", "x=5", "٣", "７", "9" * 41, "1" * 5000, "nan", "inf", "0x10", "1_000"])
def test_what_is_no_single_number_is_none(text):
    assert parse_number(text) is None


@pytest.mark.parametrize("target, text, right", [
    ("72", "72", 1), ("72", "72.0", 1), ("72", "144/2", 1), ("72", "73", 0), ("72", "72 or 73", 0), ("1/3", "0.3333333333333333", 0), ("1/3", "2/6", 1), ("50", "50%", 1),
    ("0.5", "50%", 1), ("50%", "0.5", 1), ("50%", "50", 1), ("0.5", "0.5%", 0), ("50%", "50 percent", 1), ("1,000", "1000", 1), ("Paris", " paris ", 1), ("Paris", "London", 0), ("$18", "18.00", 1)])
def test_written_answers_are_compared_exactly(target, text, right):
    assert answer(text, Problem("file", "q", (), target)) == right


@pytest.mark.parametrize("thinking, share", [
    ("keep 3: 2+1=3 vs 4 no", 1), ("留 3: 2+1=3 比 4 不对", 0), ("keep 3: 2+1=3 比 4 no", 2 / 3), ("no 不对", 1 / 2), ("no 都不行", 1 / 3),  # a Chinese word is two signs or one
    ("", 1), ("1+2=3", 1), ("да no", 1 / 2), ("ａ no", 1 / 2), ("naïve café", 1), ("ok。好的好的", 1 / 3), ("ok はい", 1 / 2)])
def test_language_consistency_is_the_share_of_words_in_the_questions_script(thinking, share):
    for text in (f"<think>{thinking}</think><answer>这里不算</answer>", f"{thinking}</think><answer>no</answer>", thinking):
        assert language_consistency([PROBLEM], [text]) == [pytest.approx(share)]


def test_a_chinese_question_wants_chinese_thinking():
    chinese = Problem("file", "三加二是多少？", (), "5")
    assert language_consistency([chinese, chinese], ["<think>三加二</think>", "<think>three and two</think>"]) == [1, 0]


@pytest.mark.parametrize("reward, words", [
    (lambda p, c: [1.0 if x == "good" else 1 / 0 for x in c], "raised ZeroDivisionError"), (lambda p, c: [1.0 if x == "good" else math.nan for x in c], "returned nan"),
    (lambda p, c: [1.0 if x == "good" else None for x in c], "returned None"), (lambda p, c: [1.0 if x == "good" else "1" for x in c], "returned '1'"),
    (lambda p, c: [1.0 for x in c if x == "good"], "returned 0 values"), (lambda p, c: None if "bad" in c else [1.0], "raised TypeError"), (lambda p, c: [math.inf if x == "bad" else 0 for x in c], "returned inf")])
def test_a_faulty_reward_is_named_with_the_problem_and_the_completion(monkeypatch, reward, words):
    monkeypatch.setitem(rewards.REWARDS, "format", reward)
    with pytest.raises(BadInput, match=f"'format' {words}.*make 20 from 2, 3 and 7.*'bad'"):
        score([ARITHMETIC, PROBLEM, ARITHMETIC], ["good", "bad", "good"], RewardConfig())


def test_a_reward_may_return_whole_numbers_and_booleans(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "format", lambda p, c: (len(x) > 1 for x in c))
    assert score([PROBLEM] * 2, ["a", "ab"], RewardConfig(w_format=1))[1]["format"] == [0.0, 1.0]
