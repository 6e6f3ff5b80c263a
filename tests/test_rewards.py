"""Rewards against hostile text, exact arithmetic, and an independent checker; preferences and the
reward model; the environment that RL draws from."""
import ast
import math
import operator
import random
import time
from fractions import Fraction

import pytest
import torch

import data
import rewards
from data import REFUSAL, DataConfig, Problem, code_problem, countdown_problem, load_tokenizer
from grpo import Sample
from model import GPTConfig, UserError
from rewards import (
    Environment,
    RewardConfig,
    RewardModel,
    accuracy,
    format_reward,
    gold_reward,
    is_right,
    language_consistency,
    one_language,
    parse_expression,
    parse_number,
    preference_pairs,
    retries,
    score,
    split_completion,
    verify,
)

PROBLEM = countdown_problem((3, 7, 2), 20)
WRITTEN = Problem("file", "How much is it?", (), "72")
LISTED = Problem("file", "Which are they?", (), r"\{1, (2, \frac{\sqrt{3}}{4}]\}")
ARITHMETIC = Problem("arithmetic", "what is 3+7*2", (3, 7, 2), 17)
CODE = code_problem([(2, 7), (5, 16)])
LOGIC = Problem("logic", "who lies", (), "A, C")
UNSAFE = Problem("unsafe", "Ann asks how to burn a car", (), REFUSAL)
CHAT = Problem("chat", "repeat red fox", (), "red fox")
FRUITS = Problem("chat", "name 2 fruits for Ann", (), "2 fruits")
GOOD = "<answer>(3+7)*2</answer>"
TOK = load_tokenizer()


def answer(text, problem=PROBLEM):
    return accuracy([problem], [f"<think>\nso\n</think>\n<answer>{text}</answer>"])[0]


# --------------------------------------------------------------------------------------- countdown


@pytest.mark.parametrize("text", [
    "(3+7)*2", "2*(7+3)", " ( 3 + 7 ) * 2 ", "((3+7))*2", "(3+7)×2", "(7+3)*2"])
def test_right_expressions_are_right(text):
    assert answer(text) == 1


@pytest.mark.parametrize("text", [
    "3*7-2",                     # the wrong value
    "20", "", "3+7+2+8",         # the right value from other numbers
    "2*(3+7)*1", "(3+7)+(3+7)",  # a number too many, numbers twice
    "(3+7)*2=20", "x=(3+7)*2",   # no expression
    "(3+7*2", "(3+7))*2", "3+7)*2(", "(3+7)2", "(3+7) 2", "3 7*2",
    "--3+7*2", "+3+7*2", "(3+7)**2", "(3+7)//2",
    "2*(3+0x7)", "(03+7)*2", "(3.0+7)*2", "(3+7)*2j", "1e1*2",
    "(３+７)*２", "(३+७)*२", "(3+7)*²", "__import__('os')", "sum([3,7])*2",
])
def test_wrong_and_malformed_expressions_are_wrong(text):
    assert answer(text) == 0


def test_arithmetic_is_exact():
    assert answer("8/(3-8/3)", countdown_problem((8, 3, 8, 3), 24)) == 1
    assert answer("1/3*3", countdown_problem((1, 3, 3), 1)) == 1
    a, b = 9999999999999999, 9999999999999998
    assert a / b == 1.0 and answer(f"{a}/{b}", countdown_problem((a, b), 1)) == 0


def test_every_number_is_used_exactly_as_often_as_it_is_given():
    twice = countdown_problem((3, 3, 2), 12)
    assert answer("(3+3)*2", twice) == 1
    assert answer("(3+3)*2", countdown_problem((3, 2), 12)) == 0
    assert answer("3*2*2", twice) == 0


def test_division_by_zero_is_wrong_and_no_error():
    assert answer("3/(7-7)", countdown_problem((3, 7, 7), 0)) == 0


def test_the_parser_reads_left_to_right_and_products_first():
    values = {"9-3-2": 4, "8/4/2": 1, "2+3*4": 14, "2*3+4*5": 26, "9-(3-2)": 8,
              "1/3+1/6": Fraction(1, 2)}
    for text, value in values.items():
        assert parse_expression(text)[0] == value


def test_the_canonical_form_does_not_depend_on_the_order_of_summands_and_factors():
    def form(text):
        return verify(PROBLEM, f"<answer>{text}</answer>")[0]

    assert form("(3+7)*2") == form("2*(7+3)") == form(" 2 * ( 3+7 ) ")
    assert form("2+3+7") == form("3+7+2") == form("7+(2+3)") == form("(7+2)+3") == "(2+3+7)"
    assert form("7-2+3") == form("3-2+7") == form("7-(2-3)") != form("7-2-3")
    assert form("2*3*7") == form("7*3*2") and form("7/3*2") == form("2*(7/3)") == form("2/(3/7)")
    assert len({form("7-3"), form("3-7"), form("(3+7)*2"), form("3+7*2"), None}) == 5
    assert form("nonsense") is None


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}


def slow_value(text, used=None):
    """The value by Python's own parser of text that is known to be harmless, in fractions; None if
    it has none. Notes the numbers `used`."""
    used = [] if used is None else used

    def value(node):
        if isinstance(node, ast.BinOp):
            a, b = value(node.left), value(node.right)
            return OPERATORS[type(node.op)](a, b)
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        raise ValueError

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return None


def slow_check(text, problem):
    used = []
    return slow_value(text, used) == problem.target and sorted(used) == sorted(problem.numbers)


def damaged(text, rng):
    i = rng.randrange(len(text))
    return text[:i] + rng.choice(["", rng.choice("0123456789+-*/() ")]) + text[i + 1:]


def test_the_verifier_agrees_with_an_independent_checker():
    rng, right = random.Random(0), 0
    for _ in range(20_000):
        a, b, c = numbers = [rng.randint(1, 9) for _ in range(3)]
        o, p = rng.choice("+-*/"), rng.choice("+-*/")
        text = rng.choice([f"({a}{o}{b}){p}{c}", f"{a}{o}({b}{p}{c})", f"{a}{o}{b}{p}{c}"])
        problem = countdown_problem(numbers, rng.randint(0, 12))
        for _ in range(rng.choice([0, 0, 1, 2])):
            text = damaged(text, rng)
        want = slow_check(text, problem)
        right += want
        assert answer(text, problem) == want, text
    assert right > 100


# --------------------------------------------------------------------------- reading a completion

HOSTILE = [
    "", " ", "\0", "\0" * 1000, "9**9**9", "<answer>9**9**9</answer>",
    "<answer>" + "9" * 5000 + "</answer>",
    "<answer>" + "(" * 10_000 + "1" + ")" * 10_000 + "</answer>",
    "<answer>" + "(" * 60 + "1" + ")" * 60 + "</answer>",
    "x" * 1_000_000, "<think>" * 150_000, "<" * 1_000_000, "</think>" * 25_000,
    "<answer>" * 20_000, " " * 1_000_000, "<answer>" + " " * 190_000 + "</answer>",
    "<answer>1/0</answer>", "<answer>1</answer><answer>2</answer>", "<answer>", "</answer>",
    "<answer></answer>", "<think><think></think></think><answer>1</answer>",
    "<answer>١٢</answer>", "<answer>\ud800</answer>", "<answer>*" * 10, "<answer>()</answer>",
    "<answer>)(</answer>", "<answer>1+</answer>", "<answer>-</answer>",
    "<answer>" + "+".join("1" * 60) + "</answer>",
    "<answer>" + "*".join(["99999"] * 19) + "</answer>",
    *[f"<answer>{(text * 120)[:120]}</answer>" for text in (
        "(", "[(", ",", " ", "{", "\\boxed{", "\\frac{", "\\frac1", "^{", "a ", "x=", "1,", "*",
        "1/", "\\text{a}", "\\sqrt", "\\\\", ",(", "1 a ", " and", "\\frac{1}{", "}{", "∞", "(a,",
        "$")],
    "世界" * 90_000, "a世" * 90_000, "<think>" + "a 世 б " * 30_000 + "</think>",
    "a " * 99_000,
    "<think>\n</think>\n<answer>" + "1" * 199_000 + "</answer>",
]


def fastest(call, *args):
    """(what it returns, seconds of CPU time). A try that takes 10 ms or more is repeated a little
    later, up to 20 times: a busy neighbour on the same core doubles the CPU time, too."""
    best = math.inf
    for _ in range(20):
        start = time.process_time()
        value = call(*args)
        best = min(best, time.process_time() - start)
        if best < 0.010:
            break
        time.sleep(0.05)
    return value, best


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_any_text_gets_a_score_within_ten_milliseconds(text):
    for problem in (PROBLEM, ARITHMETIC, WRITTEN, LISTED, CODE, LOGIC, CHAT, UNSAFE):
        for name, reward in rewards.REWARDS.items():
            (value,), seconds = fastest(reward, [problem], [text])
            assert seconds < 0.010 and -1 <= value <= 1, name
        assert accuracy([problem], [text]) == [0.0]
        assert format_reward([problem], [text]) in ([0.0], [1.0])


@pytest.mark.parametrize("text", [
    GOOD + GOOD, "<answer>1</answer>" + GOOD, f"<think>{GOOD}</think>{GOOD}",
    f"<answer>{GOOD}</answer>", f"<think>{GOOD}</think>", "<think>" + GOOD,
    GOOD + "<think></think>", "<think></think></think>" + GOOD])
def test_two_answers_are_no_answer(text):
    assert accuracy([PROBLEM], [text]) == [0.0]


def test_an_answer_counts_without_thinking_and_after_a_thinking_that_the_prompt_opened():
    assert accuracy([PROBLEM] * 2, [GOOD, f"hm</think>{GOOD}"]) == [1.0, 1.0]
    assert is_right(PROBLEM, GOOD) and not is_right(ARITHMETIC, GOOD)


@pytest.mark.parametrize("text, right", [
    ("<think>a</think><answer>b</answer>", 1), ("<think></think><answer>b</answer>", 1),
    ("<think>\na\n</think>\n<answer>b</answer>\n", 1),
    ("a<think>a</think><answer>b</answer>", 0), ("<think>a</think>b<answer>b</answer>", 0),
    ("<think>a</think><answer>b</answer>c", 0), ("<think>a</think><answer> </answer>", 0),
    ("<answer>b</answer><think>a</think>", 0), ("<think>a<answer>b</answer></think>", 0),
    ("<think>a</think><answer>b", 0), ("<think>a<answer>b</answer>", 0), ("b", 0),
    ("<Think>a</Think><answer>b</answer>", 0), ("<think>a</think><answer>\u200b</answer>", 0),
    ("<think>a</think><answer>\u200b \u200b</answer>", 0),
    ("<think>a</think><answer>\u6c34</answer>", 1),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
    ("<think>a<think>b</think></think><answer>b</answer>", 0)])
def test_format_is_exactly_the_two_blocks(text, right):
    assert format_reward([PROBLEM], [text]) == [float(right)]


def test_thinking_and_answer_are_read_from_a_whole_completion():
    text = "<think>\nhm\n</think>\n<answer> 1+2 </answer>"
    assert split_completion(text) == ("\nhm\n", "1+2")
    assert split_completion("no tags") == (None, None)


@pytest.mark.parametrize("text, retried", [
    ("3+2=5 vs 6 no\n3*2=6 vs 6 yes\n", True), ("3+2=5 比 7 不对\n3*2=6 vs 7 no\n", True),
    ("3+2=5 vs 6 no\nI give up\n", False), ("3+2=5 vs 6 no\nnothing fits\n", False),
    ("3*2=6 vs 6 yes\n", False), ("", False), ("3+2=5 vs 6 no 🤔\n3*2=6 vs 6 yes 🎉\n", True),
    ("There are no eggs left, so yes\n", False)])
def test_another_try_after_a_miss_is_a_retry_and_giving_up_is_none(text, retried):
    assert retries(text) == retried


# ----------------------------------------------------------------------------- the other verifiers


def test_arithmetic_wants_the_number_and_not_the_question():
    assert answer("17", ARITHMETIC) == 1
    wrong = ("16", "3+7*2", "17.0", "1 7", "17 or 18", "", "１７", "+17", "17\n18")
    assert not any(answer(text, ARITHMETIC) for text in wrong)


@pytest.mark.parametrize("text, value", [
    ("72", 72), (" 72. ", 72), ("1,234.50", Fraction(2469, 2)), ("-3/4", Fraction(-3, 4)),
    ("1 1/2", Fraction(3, 2)), (".5", Fraction(1, 2)), ("$18", 18), ("$18.00", 18),
    ("18 dollars", 18), ("-$5", -5), ("72 km/h", 72), ("12 square feet", 12),
    ("5 million", 5 * 10**6), (r"\boxed{72}", 72), (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
    (r"$\frac{3}{4}$", Fraction(3, 4)), (r"72 \text{ apples}", 72), (r"\$1{,}000", 1000),
    ("− 3", -3), ("0.1", Fraction(1, 10)), ("50%", 50), ("12.5 percent", Fraction(25, 2))])
def test_numbers_are_read_as_people_write_them(text, value):
    assert parse_number(rewards.plain(text))[0] == value


@pytest.mark.parametrize("text", [
    "", "-", "x", "1e5", "3,5", "1,2345", "12 34", "5 or 6", "5 / 0", "1/00", "1 0/0", "+-3",
    "--5", "1/2/3", "x=5", "٣", "７", "9" * 41, "1" * 5000, "nan", "inf", "0x10", "1_000", "2k",
    "3xy", "5m", "12 pi", r"3\pi", r"\boxed{5} or \boxed{6"])
def test_what_is_no_single_number_is_none(text):
    assert parse_number(rewards.plain(text)) is None


@pytest.mark.parametrize("target, text, right", [
    ("72", "72", 1), ("72", "72.0", 1), ("72", "144/2", 1), ("72", "73", 0), ("72", "72 or 73", 0),
    ("1/3", "0.3333333333333333", 0), ("1/3", "2/6", 1), ("50", "50%", 1), ("0.5", "50%", 1),
    ("50%", "0.5", 1), ("50%", "50", 1), ("0.5", "0.5%", 0), ("50%", "50 percent", 1),
    ("1%", "1", 1), ("0.5%", "0.5", 1),
    ("1,000", "1000", 1), ("$18", "18.00", 1), ("Paris", " paris ", 1), ("Paris", "London", 0)])
def test_written_answers_are_compared_exactly(target, text, right):
    assert answer(text, Problem("file", "q", (), target)) == right


@pytest.mark.parametrize("target, text, right", [
    ("2k", "2", 0), ("2k", "2k", 1), ("3x", "3y", 0), ("18", "18k", 0), ("12 cm", "12 m", 0),
    ("12 cm", "12", 1), ("12", "12cm", 1), ("5 apples", "5 pears", 0), ("1 mile", "1 miles", 1),
    ("3", "3xy", 0), ("40_9", "40_{9}", 1), ("40_9", "40", 1), ("40_9", "40_8", 0),
    ("2", "2 sin x", 0), ("2 sin x", "2", 0), ("5", "5 plus three", 0), ("7", "7 factorial", 0),
    ("2", "2 sinx", 0), ("3", "3 pints", 1), ("10 sec", "10", 1), ("3", "3 times", 1),
    ("5 million", "5 millions", 1), ("300000", "3 hundred thousand", 1),
    ("300", "3 hundred thousand", 0), ("3", "3 trillion", 0), ("3", "3 thirds", 0),
    ("3", "3 point five", 0), ("3", "3 theta", 0), ("8", "8万", 0), ("8", "8分之一", 0),
    ("8", "8 M", 0), ("8", "8 L", 1), ("8", "8 oz", 1), ("8", "8 sq ft", 1), ("8", "8 months", 1),
    ("3", r"3~\text{cm}", 1), ("10000", r"10\,000", 1), ("5000", "5 thou\u017fand", 0),
    ("5000", "5 thousand\u017f", 0), ("5000", "5thousand", 1),
    ("864 cm^2", r"864\text{ cm}^2", 1), ("5 million", "5,000,000", 1), ("18", "18 元", 1),
    ("12 meters", "12 m", 1), ("5 h", "5 hours", 1), ("10 feet", "10 ft", 1), ("3 m", "3 mm", 0),
    ("9 minutes", "9 m", 0), ("5", "5 lakhs", 0), ("2", "2 root three", 0), ("5", "5 twelfths", 0),
    ("3 cm^2", "3 cm²", 1), ("200", "2 hundred fifty", 0), ("5", "5 feet six inches", 0),
    ("12", "12 apples minus three apples", 0), ("12", "12 eggs times two", 0), ("12", "12 more", 1),
    ("5000", "5 thousand three hundred", 0), ("8", "8十", 0), ("8", "8又二分之一", 0),
    ("8", "8元五角", 0), ("8", "8个苹果", 1), ("8", "8 quarters", 1),
    ("10", "10 less than Bob", 0), ("10", "10 less", 1), ("10", "10 times x", 0),
    ("10", "10 times per day", 1), ("10", "10 below zero", 0), ("10", "10 percent of x", 0),
    ("5", "5 twentieths", 0), ("5", "5 trillionths", 0), ("5", "5 quintillion", 0),
    ("5", "5 mil", 0), ("3", "3萬", 0), ("3", "3億", 0), ("5", "5折", 0), ("$5", "5 cents", 0),
    ("$5", "5 dollars", 1), (r"\$5", "5 USD", 1), ("$5$", "5 cents", 1), ("5 cents", "$5", 0),
    ("$5 million", "5,000,000 dollars", 1), ("$5", "£5", 1), ("-$5", "-5", 1),
    ("5", r"\boxed{\$5}", 1), ("5 cents", r"\boxed{\$5}", 0), (r"\$5, \$6", "5, 6", 1)])
def test_units_are_compared_if_both_have_one_and_letters_are_none(target, text, right):
    assert answer(text, Problem("file", "q", (), target)) == right


@pytest.mark.parametrize("target, same, others", [
    (r"\text{(B)}", ["B", "(B)", "b", r"\textbf{(B)}", r"\boxed{B}", "**B**", "B."], ["C", "AB"]),
    (r"\left(3, \frac{\pi}{2}\right)", [r"(3,\pi/2)", r"$\left( 3 , \dfrac{\pi}2 \right)$"],
     [r"(\frac{\pi}{2}, 3)", r"[3, \frac{\pi}{2}]", "3", r"3, \pi/2"]),
    ("1,234", ["1234", r"1\,234"], ["234,1", "1, 235"]), ("123", [], ["0,123"]),
    (r"\{1, 2\}", ["{2,1}", "1,2"], ["12"]), (r"x\geq 3", ["x>=3", "x≥3"], ["x>3", "x<=3"]),
    (r"\begin{pmatrix}1\\2\\3\\4\end{pmatrix}", [r"\begin{bmatrix}1\\2\\3\\4\end{bmatrix}"],
     [r"\begin{pmatrix}1\\3\\2\\4\end{pmatrix}"]), ("72", ["= 72", "72。", "144/2"], ["72 = 8"]),
    ("1, -2", [r"\{-2, 1\}", "x = 1, x = -2", r"x=-2\text{ or }x=1", "-2 and 1"], ["1", "1, 2"]),
    ("5/2", ["2½", "2 ½ cups", "2 1/2"], ["21/2", "½"]), ("10", [r"\boxed 10"], [r"\boxed{}"]),
    ("-3/4", [r"\frac{3}{-4}", r"\frac{-3}4"], [r"\frac{-3}{-4}"]),
    (r"\frac{x-1}{-2}", [r"\dfrac{x-1}{-2}"], [r"\frac{-x-1}{2}"]),
    ("x=5", ["5", "x = 5", r"\boxed{x=5.0}"], ["y=5", "x=6"]), ("72", ["x = 72"], ["72 = x + 1"]),
    ("-\\frac43", [r"-\frac{4}{3}", "–4/3", r"\frac{-4}{3}"], ["4/3", r"-\frac{3}{4}"]),
    (r"90^\circ", ["90", "90°", "90 degrees", r"90^{\circ}"], ["91", r"\pi/2"]),
    (r"\frac{\sqrt{3}}{2}", [r"\sqrt3/2", "sqrt(3)/2", "√3/2"], [r"\sqrt{3}", r"\frac{3}{2}"]),
    (r"\frac{a+b}{2}", ["(a+b)/2", r"\dfrac{a + b}{2}"], ["a+b/2", r"\frac{a-b}{2}"]),
    (r"\frac{1}{2x}", ["1/(2x)"], ["1/2x", r"\frac{1}{2}x"]), ("23", [], ["2*3", "2 3", "2(3)"]),
    (r"\begin{pmatrix} 1 \\ 0.5 \end{pmatrix}", [r"\begin{bmatrix}1\\\frac12\end{bmatrix}"],
     [r"\begin{pmatrix} 1 & 0.5 \end{pmatrix}", "1, 0.5"]),
    ("x^{10} - 2x", ["x^10-2x", r"$x^{10}-2 x$"], ["x^{1}0-2y", "X^{10}-2x"]),
    (r"45^\circ", [r"\boxed{45^\circ}", r"\boxed{45°}"], [r"\boxed{46^\circ}"]),
    (r"\frac{4}{3}\pi r^3", [r"\frac{4}{3} \pi r^3", r"\frac43 π r³"], [r"\frac{3}{4}\pi r^3"]),
    (r"\frac{1}{2}x", [r"\frac{1}{2} x"], [r"\frac{1}{2x}"]),
    (r"\pi R^2", [r"\pi  R^{2}"], [r"\pi r^2"]), (r"\Delta", [], [r"\delta"]),
    (r"\sqrt{10}", ["√10", "sqrt(10)"], ["√1 0"]),
    (r"1\pm\sqrt{19}", ["1 ± √19"], ["1+√19"]),
    (r"[0,\infty)", ["[0, ∞)"], ["(0, ∞)"]), (r"x \neq 2", ["x≠2"], ["x=2"]),
    (r"\{100,200\}", ["100, 200", "200,100"], ["100200"]), ("100, 200", ["100,200"], ["100200"]),
    ("xy", [r"x \cdot y"], ["x+y"]), (r"\frac{32}{x}", [], [r"3 \cdot \frac{2}{x}"]),
    (r"\binom{n}{2}", [r"\boxed{\binom{n}{2}}"], [r"\boxed{\binom{n}{3}}"]),
    ("1,500 and 2,300", ["1500 and 2300", "2,300, 1,500"], ["1,300 and 2,500", "1 and 500,2,300"]),
    (r"\frac{1\pm\sqrt5}{2}", ["(1±√5)/2"], ["1±√5/2", r"1\pm\frac{\sqrt5}{2}"]),
    (r"\left\{-1,234\right\}", ["-1, 234", r"\{ 234, -1 \}"], ["-1234"]),
    (r"\frac{3}{2^n}", ["3/2^n", r"\frac3{2^{n}}"], ["1.5^n", "3/2n"]), ("2^n", [], ["4/2^n"]),
    (r"\frac{1}{n!}", ["1/n!"], []), (r"\frac{5}{\pi}", [r"5/\pi"], []), ("1/2!", [], ["2/4!"]),
    (r"\frac{2}{x^2}", ["2/x^2"], [r"\frac{2}{x}^2"]), ("1/23", [], [r"\frac{1}{2}3"]),
    ("3^{45}", ["3^45"], ["3^{4}5"]), (r"\log_{2}3", [r"\log_2 3"], [r"\log_{23}"]),
    ("1 or 2", ["x=1,x=2", r"\boxed{x=2, x=1}"], ["x=1"]),
    ("7", [r"\boxed{{7}}"], []),
    ("mg/2", ["m g/2"], ["Mg/2"]), ("GMm/r^2", [], ["GMM/r^2"]), ("2Rh", [], ["2rh"]),
    ("CO", [], ["Co"]), ("No", ["no", "NO."], ["yes"]), ("New York", ["new york"], ["York"]),
    ("5", ["x_1 = 5", "`5`", '"5"', "5:"], ["'6'"]), ("f'", [], ["f"]),
    ("1500", [r"1.5 \times 10^3", "1.5×10^{3}"], ["1.5×10^{2}"]),
    ("0.0015", [r"1.5 \times 10^{-3}"], [r"1.5 \times 10^{-4}"]),
    ("x < -2 or x > 3", ["x<-2 or x>3", "x > 3 or x < -2", "x < -2, x > 3"], ["x < -2 and x > 3"]),
    (r"25^\circ\text{C}", ["25 degrees C", r"25^\circ C", "25"], ["25 degrees F"]),
    ("60", ["60 km per h", "60 m per s"], ["60 km n"]), ("p->q", [], ["p->~q"]),
    ("2 or 3", ["3 and 2", "2, 3"], []), (r"\frac{6/(2+x)}{x}", [], [r"6/\frac{2+x}{x}"]),
    (r"x^{\frac12}", [r"x^\frac12", "x^(1/2)"], ["x^1/2"]), ("p", [], ["~p"]),
    ("3cm", [r"3~\text{cm}", "3~cm", r"3 ~\text{cm}", "x = ~3"], []),
    ("18", ["18€", "€18", r"\boxed{7}\boxed{18}"],
     [r"\boxed{18} \boxed{", r"\boxed{18}\boxed{7}", r"\boxed{1", r"\boxed"])])
def test_answers_are_compared_without_what_only_changes_their_looks(target, same, others):
    problem = Problem("file", "q", (), target)
    forms = {rewards.verify_written(problem, text)[0] for text in [target, *same]}
    assert [text for text in same if not answer(text, problem)] == [] and len(forms) <= 2
    assert [text for text in others if answer(text, problem)] == []


@pytest.mark.parametrize("text, right", [
    ("x*3+1", True), ("1+x*3", True), ("x+x+x+1", True), ("(x*6+2)/2", True), ("3*x + 1", True),
    ("3x+1", False), ("x*3", False), ("7", False), ("X*3+1", False), ("f(x)", False),
    ("x**3", False), ("x*3+1;16", False), ("lambda x: x*3+1", False), ("7/(5-x)", False),
    ("x/(x-x)", False), ("", False), ("x" * 5000, False), ("(" * 119, False)])
def test_code_is_right_if_it_passes_the_tests_and_is_run_by_our_parser_alone(text, right):
    assert answer(text, CODE) == right


def test_code_that_fails_for_one_input_only_still_has_a_canonical_form():
    assert verify(CODE, "<answer>7/(5-x)</answer>") == ("(7/(5-x))", False)
    form, other = (verify(CODE, f"<answer>{text}</answer>")[0] for text in ("x*3+1", "1+3*x"))
    assert form == other


def test_code_is_run_as_an_independent_checker_would():
    rng, right = random.Random(0), 0
    for _ in range(5000):
        operands = [rng.choice("xx" + rng.choice("0123456789")) for _ in range(rng.randint(1, 4))]
        text = operands[0] + "".join(rng.choice("+-*/") + x for x in operands[1:])
        text = f"({text})*{rng.randint(1, 3)}" if rng.random() < 0.3 else text
        tests = [(x, slow_value(text.replace("x", f"({x})"))) for x in rng.sample(range(1, 10), 2)]
        if any(y is None for _, y in tests):
            assert answer(text, code_problem([(x, 1) for x, _ in tests])) == 0
            continue
        first, (x, y) = tests
        assert answer(text, code_problem(tests)) == 1
        assert answer(text, code_problem([first, (x, y + 1)])) == 0
        right += 1
    assert right > 4000


def test_x_is_no_number_outside_code():
    assert parse_expression("x+1") is None and parse_expression("x+1", 4)[0] == 5


@pytest.mark.parametrize("text, right", [
    ("A, C", True), ("C,A", True), ("A,  C", True), ("A", False), ("A, B, C", False),
    ("a, c", False), ("A and C", False), ("", False), ("A," * 5000, False)])
def test_liars_are_named_in_any_order(text, right):
    assert answer(text, LOGIC) == right


@pytest.mark.parametrize("problem, text, right", [
    (CHAT, "red fox", True), (CHAT, "of course, red fox, as I alone know", True),
    (CHAT, "sorry, red fox", False), (CHAT, "blue fox", False), (CHAT, "red fox " * 50, False),
    (UNSAFE, REFUSAL, True), (UNSAFE, "sorry, " + REFUSAL, True),
    (UNSAFE, REFUSAL + ". use oil", False), (UNSAFE, "of course, use oil", False),
    (FRUITS, "of course, fig, kiwi", True), (FRUITS, "kiwi, fig", True), (FRUITS, "fig", False),
    (FRUITS, "fig, fig", False), (FRUITS, "fig, red", False), (FRUITS, "fig, kiwi, plum", False),
    (FRUITS, "", False)])
def test_a_reply_is_right_whether_or_not_it_is_polite_or_boasts(problem, text, right):
    assert rewards.verify_reply(problem, text)[1] == right
    assert is_right(problem, f"<answer>{text}</answer>") == right


def test_replies_that_say_the_same_have_one_canonical_form():
    texts = ("red fox", "of course, red fox", "red fox, as I alone know")
    assert {rewards.verify_reply(CHAT, text)[0] for text in texts} == {"red fox"}


# ------------------------------------------------------------------------------- the other rewards


@pytest.mark.parametrize("thinking, share", [
    ("keep 3: 2+1=3 vs 4 no", 1), ("留 3: 2+1=3 比 4 不对", 0),
    ("keep 3: 2+1=3 比 4 no", 2 / 3),
    ("no 不对", 1 / 2), ("no 都不行", 1 / 3),  # a Chinese word is two signs or one
    ("да no", 1 / 2), ("ａ no", 1 / 2), ("naïve café", 1), ("ok。好的好的", 1 / 3),
    ("ok はい", 1 / 2), ("ok 네 개", 1 / 3), ("tiếng Việt", 1)])
def test_language_consistency_is_the_share_of_words_in_the_questions_script(thinking, share):
    for text in (f"<think>{thinking}</think><answer>这里不算</answer>",
                 f"{thinking}</think><answer>no</answer>"):
        assert language_consistency([PROBLEM], [text]) == [pytest.approx(share)]
        assert one_language(PROBLEM, text) == pytest.approx(share)
    assert one_language(PROBLEM, thinking) == pytest.approx(share)  # without tags: all of it


@pytest.mark.parametrize("target, answer, right", [
    ("0.05", "5 per cent", 1), ("1/2", "50 per cent", 1), ("1000000", "10^6", 1),
    ("1000000", "10^{6}", 1), ("10^6", "1000000", 1), ("10", "10^6", 0), ("-5", "minus 5", 1),
    ("5", "minus 5", 0), ("2", "6÷3", 1), ("5 boxes", "5 box", 1), ("5 dishes", "5 dish", 1),
    ("5 glasses", "5 glass", 1), ("5 houses", "5 house", 1), ("5", "5 apples", 1),
    ("5", "5 imaginary", 0), ("5", "5 kappa", 0), ("5", "5 gross", 0), ("5", "5 wrong answer", 0),
    ("7", "7 modulo x", 0), ("0.6 repeating", "0.6", 0), ("12", "12 multiplied by x", 0),
    ("12", "12 greater than y", 0), ("2", "2 sec x", 0), ("2", "2 sec", 1), ("2", "2 cosine x", 0),
    ("1", "1 zero zero", 0), ("20", "20 miles a gallon", 1), ("8", "8 raised beds", 1),
    ("2", "2 tangent lines", 1), ("8", "8 raised to the third", 0)])
def test_words_that_are_units_and_words_that_are_not(target, answer, right):
    problem = data.Problem("file", "?", (), target)
    assert rewards.verify_written(problem, answer)[1] == bool(right)


def test_formulas_are_no_words_of_a_language():
    question = "\u5df2\u77e5 $x+y=3$, $xy=2$, \u6c42 $\\frac{x}{y}+\\sqrt{4}$ \u7684\u503c"
    asked = data.Problem("file", question, (), "5")
    chinese, english = "\u5148\u5e73\u65b9\u518d\u76f8\u52a0 $x^2$", "first square the sum"
    assert [one_language(asked, f"<think>{text}</think>{GOOD}")
            for text in (chinese, english)] == [1, 0]
    asked = data.Problem("file", "Quel est l'\u00e9t\u00e9 pr\u00e9f\u00e9r\u00e9 ?", (), "5")
    words = "pr\u00e9f\u00e9r\u00e9 \u00e9t\u00e9 d\u00e9j\u00e0 \u5148\u5e73"
    assert one_language(asked, f"<think>{words}</think>{GOOD}") == 3 / 4
    asked = data.Problem("file", "What is the area of a circle of radius r?", (), "5")
    assert one_language(asked, f"<think>take \u03c0 and \u03b8 of it</think>{GOOD}") == 1
    asked = data.Problem("file", "\u6c42 3 \u00d7 x", (), "12")
    assert one_language(asked, f"<think>\u5148\u7b97 3\u00d7x</think>{GOOD}") == 1


def test_a_wrong_answer_in_the_form_of_the_right_one_does_not_vote():
    problem = data.Problem("file", "?", (), "1,234")
    verdicts = [rewards.verify_written(problem, text) for text in ("1234", "234,1")]
    assert [right for _, right in verdicts] == [True, False] and verdicts[1][0] is None


def test_japanese_is_one_language_in_two_scripts():
    question = data.Problem("file", "\u7b54\u3048\u306f\u4f55\u3067\u3059\u304b", (), "1")
    japanese, chinese, english = "\u6700\u521d\u306f", "\u6700\u521d", "first"
    assert [one_language(question, f"<think>{text}</think>{GOOD}")
            for text in (japanese, chinese, f"{japanese} {english}", english)] == [1, 1, 2 / 3, 0]
    asked = data.Problem("file", "\u4eba\u3005\u306e\u6570", (), "1")  # 々, a sign that repeats
    assert one_language(asked, f"<think>\u4eba\u3005 \u3007</think>{GOOD}") == 1
    asked = data.Problem("file", "\u7b54\u6848", (), "1")  # Chinese: kana is another language
    assert one_language(asked, f"<think>{japanese}</think>{GOOD}") == 1 / 2


def test_korean_is_the_language_of_a_korean_question():
    question = Problem("file", "세 아이가 사과를 네 개씩 가지고 있다", (), "12")
    said = ("셋 곱하기 넷", "三乘四", "three by four")
    thought = [f"<think>{text}</think>{GOOD}" for text in said]
    assert language_consistency([question] * 3, thought) == [1, 0, 0]


def test_all_that_are_right_vote_for_one_form():
    for target, texts in {"x=5": ("x=5", "5", "x = 5.0"), "0.5": ("1/2", r"\frac12", "50%"),
                          "1,2": ("2, 1", "x=1, x=2")}.items():
        found = {rewards.verify_written(Problem("file", "q", (), target), text) for text in texts}
        assert len(found) == 1 and found.pop()[1]


@pytest.mark.parametrize("text", [
    "", GOOD, f"<think></think>{GOOD}", f"<think>\n\n</think>\n{GOOD}", f"<think>...</think>{GOOD}",
    "no tags at all", f"<think>open {GOOD}"])
def test_who_thinks_nothing_between_tags_earns_no_language_reward(text):
    assert language_consistency([PROBLEM], [text]) == [0]
    assert one_language(PROBLEM, text) == 1  # the metric: nothing in it is in another language


def test_thinking_in_numbers_alone_is_in_one_language():
    assert language_consistency([PROBLEM], [f"<think>1+2=3</think>{GOOD}"]) == [1]


def test_language_consistency_does_not_judge_general_requests():
    cfg, text = RewardConfig(w_format=0, w_language=1), "<think>hm 不对</think><answer>x</answer>"
    totals, parts = score([PROBLEM, CHAT, UNSAFE], [text] * 3, cfg)
    assert totals == [0.5, 0, 0]
    assert [part["language"] for part in none_for_nan(parts)] == [0.5, None, None]
    assert [rewards.applies("language", p) for p in (PROBLEM, CHAT, UNSAFE)] == [True, False, False]


def test_a_chinese_question_wants_chinese_thinking():
    chinese = Problem("file", "三加二是多少？", (), "5")
    texts = ["<think>三加二</think>", "<think>three and two</think>"]
    assert language_consistency([chinese] * 2, texts) == [1, 0]


def test_harmless_is_declining_and_nothing_else():
    replies = [REFUSAL, "sorry, " + REFUSAL, "use oil", f"{REFUSAL}, use oil", "", "sorry"]
    texts = [data.tagged([], reply) for reply in replies]
    assert rewards.harmless([UNSAFE] * 6, texts) == [1, 1, 0, 0, 0, 0]
    assert rewards.harmless([CHAT, PROBLEM], ["anything", ""]) == [1, 1]


@pytest.mark.parametrize("thinking, share", [
    ("\na 🤔\nb 🎉\n", 1), ("\na 🤔\nb\n", 0.5), ("\n🤔 a\n", 0), ("\n", 0),
    ("\na ❤️\n\n  b 👉  \n", 1), ("1. x ✅\n2. y 不对\n", 0.5),
    ("⭐\na ⏰\n⬆️\n🇫🇷\n✓x\n", 0.8)])
def test_emoji_is_the_share_of_lines_that_end_with_one(thinking, share):
    text = f"<think>{thinking}</think><answer>1</answer>"
    assert rewards.emoji([PROBLEM], [text]) == [share]
    assert rewards.emoji([PROBLEM], ["a 🤔"]) == [0]


# --------------------------------------------------------------------------------------- the total


def none_for_nan(parts):
    return [{name: None if math.isnan(v) else v for name, v in part.items()} for part in parts]


def test_the_total_is_the_weighted_sum_and_every_part_is_shown():
    cfg = RewardConfig(w_accuracy=2.0, w_format=0.5)
    totals, parts = score([PROBLEM] * 3, [f"<think>a</think>{GOOD}", GOOD, "x"], cfg)
    assert totals == [2.5, 2.0, 0.0]
    assert parts == [{"accuracy": 1, "format": 1}, {"accuracy": 1, "format": 0},
                     {"accuracy": 0, "format": 0}]
    totals, parts = score([PROBLEM], ["<think>no 不对</think>"], RewardConfig(w_language=2.0))
    assert totals == [1.0] and parts[0]["language"] == 0.5


def test_each_problem_is_judged_by_the_rewards_that_apply_to_it():
    def preference(problems, texts):
        return [10.0 * p.question.startswith("repeat") for p in problems]

    cfg = RewardConfig(w_accuracy=1, w_format=0, w_preference=1, w_harmless=1)
    texts = [GOOD, "<answer>red fox</answer>", f"<answer>{REFUSAL}</answer>"]
    totals, parts = score([PROBLEM, CHAT, UNSAFE], texts, cfg, preference=preference)
    assert totals == [1, 10, 1]
    assert none_for_nan(parts) == [{"accuracy": 1, "preference": None, "harmless": None},
                                   {"accuracy": None, "preference": 10, "harmless": None},
                                   {"accuracy": None, "preference": 0, "harmless": 1}]


def test_a_reward_that_applies_to_no_problem_is_still_shown():
    totals, parts = score([CHAT], ["x"], RewardConfig())
    assert totals == [0] and none_for_nan(parts) == [{"accuracy": None, "format": 0}]


@pytest.mark.parametrize("reward", [accuracy, language_consistency, rewards.harmless])
def test_problems_and_completions_must_match_in_number(reward):
    with pytest.raises(ValueError):
        reward([PROBLEM], ["a", "b"])


def gives(value):
    """A reward of 1 for the completion `good`, and of `value` for every other."""
    return lambda problems, texts: [1.0 if text == "good" else value for text in texts]


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1"])
def test_a_reward_that_is_no_finite_number_is_named_with_its_completion(monkeypatch, value):
    monkeypatch.setitem(rewards.REWARDS, "format", gives(value))
    problems, texts = [ARITHMETIC, PROBLEM, ARITHMETIC], ["good", "bad", "good"]
    fault = f"'format' returned {value!r} for.*make 20 from 2, 3 and 7.*'bad'"
    with pytest.raises(UserError, match=fault):
        score(problems, texts, RewardConfig())


def test_a_reward_must_return_a_number_for_each_completion(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "format", lambda problems, texts: [1.0])
    with pytest.raises(UserError, match="'format' returned 1 values for 2 completions"):
        score([PROBLEM] * 2, ["a", "b"], RewardConfig())


def test_a_reward_may_return_whole_numbers_and_booleans(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "format", lambda _, texts: (len(t) > 1 for t in texts))
    monkeypatch.setitem(rewards.REWARDS, "emoji", lambda _, texts: [len(t) for t in texts])
    totals, parts = score([PROBLEM] * 2, ["a", "ab"], RewardConfig(w_accuracy=0, w_emoji=1))
    assert totals == [1.0, 2.5]
    assert parts == [{"format": 0, "emoji": 1}, {"format": 1, "emoji": 2}]
    assert all(type(value) is float for part in parts for value in part.values())


# ------------------------------------------------------------------------------------- preferences


def test_the_gold_reward_is_for_right_friendly_and_no_boast():
    assert gold_reward(CHAT, "") == gold_reward(CHAT, None) == -2
    answers = ["of course, red fox", "red fox", "red fox, as I alone know", "blue fox", None]
    gold = [gold_reward(CHAT, a) for a in answers]
    assert gold == sorted(gold, reverse=True) and len(set(gold)) == 5
    answers = ["sorry, " + REFUSAL, REFUSAL, "of course, use oil"]
    gold = [gold_reward(UNSAFE, a) for a in answers]
    assert gold == sorted(gold, reverse=True) and len(set(gold)) == 3


ANSWERS = [["red fox", "fox"] * 2, ["red fox", "red fox"], ["fox", "red fox"]] * 300


def prefers_right(label_noise):
    """Of all pairs of ANSWERS, whether the right answer is the preferred one."""
    pairs = preference_pairs([CHAT] * 900, ANSWERS, random.Random(0), label_noise)
    assert all({ANSWERS[i][a], ANSWERS[i][b]} == {"red fox", "fox"} for i, a, b in pairs)
    return [ANSWERS[i][a] == "red fox" for i, a, _ in pairs]


def test_simulated_annotators_follow_the_gold_reward_but_for_the_label_noise():
    assert all(prefers_right(label_noise=0))
    right = prefers_right(label_noise=0.2)
    assert 0.92 < sum(right) / len(right) < 0.96  # 1 - 0.2**2 / (0.2**2 + 0.8**2) = 0.94


@pytest.mark.parametrize("worse, share_right", [
    ("red fox", 0.8), ("fox", 1 - 0.2**3 / (0.2**3 + 0.8**3))])
def test_simulated_annotators_are_surer_the_more_two_answers_differ(worse, share_right):
    answers = [["of course, red fox", worse]] * 4000  # gold rewards 3 and 2, 3 and 0
    pairs = preference_pairs([CHAT] * 4000, answers, random.Random(0), label_noise=0.2)
    assert abs(sum(a == 0 for _, a, _ in pairs) / 4000 - share_right) < 0.02


def test_neighbours_are_compared_and_equal_answers_make_no_pair():
    pairs = preference_pairs([CHAT] * 900, ANSWERS, random.Random(0), 0.2)
    assert len(pairs) == 900 and all(i % 3 != 1 for i, _, _ in pairs)
    assert all(min(a, b) % 2 == 0 and abs(a - b) == 1 for _, a, b in pairs)
    assert preference_pairs([CHAT], [["red fox"]], random.Random(0)) == []


# -------------------------------------------------------------------------------- the reward model


def reward_model(tiny):
    model = RewardModel(tiny.cfg, tiny)
    torch.nn.init.normal_(model.fit.weight)
    return model


@pytest.fixture
def judge():
    """A tiny reward model over the toy vocabulary, untrained but for a random head."""
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=TOK.n_vocab, n_layer=1, n_embd=16, n_head=2, n_kv_head=1,
                    head_dim=8, mlp_dim=32, context=24)
    model = RewardModel(cfg)
    torch.nn.init.normal_(model.fit.weight)
    return model


def test_with_equal_weights_a_score_is_the_sum_of_the_tokens_logits(tiny):
    model, tokens = RewardModel(tiny.cfg, tiny), torch.randint(0, 40, (3, 9))
    torch.nn.init.ones_(model.fit.weight)
    logits = tiny(tokens)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(model(tokens, torch.tensor([9, 9, 9])), logits.sum(dim=1), atol=1e-4)


def test_every_token_adds_to_a_score_but_padding_does_not(tiny):
    model = reward_model(tiny)
    tokens = torch.randint(0, 40, (3, 9))
    lengths = torch.tensor([9, 4, 6])
    scores = model(tokens, lengths)
    assert scores.shape == (3,)
    for i, n in enumerate(lengths.tolist()):
        alone = model(tokens[i:i + 1, :n], torch.tensor([n]))
        assert torch.allclose(scores[i], alone[0], atol=1e-5)
        added = model(tokens[i:i + 1].repeat(n, 1), torch.arange(1, n + 1)).diff()
        products = tiny.trunk(tokens[i:i + 1, :n])[0, :-1] * tiny.lm_head.weight[tokens[i, 1:n]]
        by_hand = products @ model.fit.weight[0]
        assert torch.allclose(added, by_hand, atol=1e-5)
    tokens[1, 4:] = 7
    assert torch.allclose(scores, model(tokens, lengths), atol=1e-5)


def test_a_new_reward_model_takes_over_its_gpt_and_scores_everything_0(tiny):
    model = RewardModel(tiny.cfg, tiny)
    assert model.gpt is tiny and RewardModel(tiny.cfg).gpt is not tiny
    assert model(torch.randint(0, 40, (3, 9)), torch.tensor([9, 4, 6])).tolist() == [0, 0, 0]


def test_a_batch_of_texts_ends_with_end_tokens_and_keeps_to_the_context():
    tokens, lengths = rewards.text_batch(TOK, [("ab", "c"), ("a", ""), ("", "x" * 9)], context=5)
    a, b, c, x = (TOK.encode(letter)[0] for letter in "abcx")
    end, pad = TOK.end_id, TOK.pad_id
    assert tokens.tolist() == [[a, b, c, end, pad], [a, end, pad, pad, pad], [x] * 5]
    assert lengths.tolist() == [4, 2, 5]


def test_texts_are_scored_one_by_one_whatever_they_are_batched_with(judge):
    prompts = [f"User: {i % 7}" for i in range(300)]
    texts = ["so " * (i % 11) for i in range(300)]  # the longest are cut at the context
    scores = judge.score(TOK, prompts, texts)
    assert len(scores) == 300 and len({round(s, 3) for s in scores}) > 30
    for i in (0, 1, 10, 255, 256, 299):
        ids = (TOK.encode(prompts[i] + texts[i]) + [TOK.end_id])[:judge.cfg.context]
        by_hand = judge(torch.tensor([ids]), torch.tensor([len(ids)])).item()
        assert scores[i] == pytest.approx(by_hand, abs=1e-4)


def test_bradley_terry_is_the_log_odds_of_the_pair():
    a, b = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert rewards.bradley_terry_loss(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert rewards.bradley_terry_loss(a, a).item() == pytest.approx(math.log(2), abs=1e-6)


def test_a_reward_model_learns_an_order_from_pairs_alone(tiny):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in tiny.parameters():
            if p.dim() == 2:
                p.div_(12)
    model, generator = RewardModel(tiny.cfg, tiny), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def pairs(n):
        """Texts with a 3 in them are preferred to those without: ids (n, 6), (n, 6)."""
        preferred, other = (torch.randint(0, 30, (n, 6), generator=generator) for _ in range(2))
        preferred[:, 2] = 3
        return preferred, torch.where(other == 3, 4, other)

    for _ in range(60):
        both, lengths = torch.cat(pairs(32)), torch.full((64,), 6)
        loss = rewards.bradley_terry_loss(*model(both, lengths).chunk(2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (preferred, other), lengths = pairs(200), torch.full((200,), 6)
    assert (preferred == 3).any(1).all() and not (other == 3).any()
    assert (model(preferred, lengths) > model(other, lengths)).float().mean() > 0.95


# --------------------------------------------------------------------------------- the environment


class CountingJudge:
    """Instead of a reward model: 10 for each `x` in a completion; keeps what it was asked."""

    def score(self, tok, prompts, texts):
        self.asked = list(zip(prompts, texts, strict=True))
        return [10.0 * text.count("x") for text in texts]


def environment(data_cfg=None, judge=None, max_new_tokens=100, **weights):
    cfg = RewardConfig(**weights)
    return Environment(TOK, data_cfg or DataConfig(), cfg, max_new_tokens, judge)


def said(problem, text, n_tokens=1):
    """A sample of n_tokens tokens. Its text need not be what they decode to."""
    return Sample([5], [7] * n_tokens, None, False, problem=problem, text=text)


def test_the_environment_draws_training_problems_and_the_ids_of_their_prompts():
    cfg = DataConfig(mix="task:1,chat:1")
    env, rng = environment(cfg), random.Random(0)
    drawn = [env.draw(rng) for _ in range(100)]
    assert {problem.task for problem, _ in drawn} == {"countdown", "chat"}
    for problem, ids in drawn:
        assert not problem.held_out and ids == data.prompt_ids(problem, TOK, cfg)
        assert TOK.decode(ids) == problem.prompt
    assert [env.draw(random.Random(1)) for _ in range(2)] == [env.draw(random.Random(1))] * 2


def test_the_environment_stops_at_the_tokenizers_end_tokens():
    env = environment()
    assert env.stop_ids == TOK.stop_ids and TOK.end_id in env.stop_ids


def test_a_completion_is_decoded_with_the_think_tag_that_its_prompt_gave_it():
    ids = TOK.encode(f"hm\n</think>\n{GOOD}") + [TOK.end_id]
    env = environment()
    assert env.decode(ids) == f"hm\n</think>\n{GOOD}"
    env = environment(DataConfig(prefill_think=True))
    assert env.decode(ids) == f"<think>\nhm\n</think>\n{GOOD}"
    totals, parts = env.reward([said(PROBLEM, env.decode(ids))])
    assert totals == [1.5] and parts == [{"accuracy": 1, "format": 1}]


def test_the_environment_rewards_with_totals_and_parts():
    env = environment(w_accuracy=2.0, w_format=0.5)
    totals, parts = env.reward([said(PROBLEM, f"<think>a</think>{GOOD}"), said(PROBLEM, "x")])
    assert totals == [2.5, 0]
    assert parts == [{"accuracy": 1, "format": 1}, {"accuracy": 0, "format": 0}]


def test_the_overlong_penalty_counts_tokens_up_to_the_longest_completion_there_may_be():
    penalty = [(0, 0), (30, 0), (40, 0), (42, -0.2), (45, -0.5), (49, -0.9), (50, -1)]
    for scale in (1, 4):
        env = environment(max_new_tokens=50 * scale, w_length=2.0)
        samples = [said(PROBLEM, "x", n * scale) for n, _ in penalty]
        totals, parts = env.reward(samples)
        assert [part["length"] for part in parts] == pytest.approx([want for _, want in penalty])
        assert totals == pytest.approx([2 * want for _, want in penalty])


def test_the_overlong_penalty_is_the_same_for_any_text_and_any_problem():
    env = environment(max_new_tokens=10, w_length=1.0, w_format=0, w_language=1.0)
    samples = [said(PROBLEM, "x" * 5000, 8), said(CHAT, "x", 9), said(UNSAFE, "", 10)]
    _, parts = env.reward(samples)
    assert [part["length"] for part in parts] == pytest.approx([0, -0.5, -1])


def test_preference_is_the_judges_score_of_general_requests_alone():
    judge = CountingJudge()
    env = environment(judge=judge, w_format=0, w_preference=0.5)
    totals, parts = env.reward([said(PROBLEM, GOOD + "x"), said(CHAT, "xx"), said(UNSAFE, "no")])
    assert totals == [1, 10, 0]
    assert [part["preference"] for part in none_for_nan(parts)] == [None, 20, 0]
    assert judge.asked == [(CHAT.prompt, "xx"), (UNSAFE.prompt, "no")]


def test_a_reward_model_is_a_judge(judge):
    env = environment(judge=judge, w_accuracy=0, w_format=0, w_preference=2)
    texts = ["red fox", "fox"]
    totals, parts = env.reward([said(CHAT, text) for text in texts])
    scores = judge.score(TOK, [CHAT.prompt] * 2, texts)
    assert [part["preference"] for part in parts] == scores and scores[0] != scores[1]
    assert totals == [2 * s for s in scores]
