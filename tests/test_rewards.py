"""Rewards against hostile text, exact arithmetic, and an independent checker."""
import ast
import math
import random
import time
from fractions import Fraction

import pytest
import torch

import rewards
from data import REFUSAL, Problem, code_problem, countdown_problem
from model import BadInput
from rewards import RewardConfig, accuracy, format_reward, language_consistency, parse_expression, parse_number, score, split_completion, verify

PROBLEM = countdown_problem((3, 7, 2), 20)
WRITTEN = Problem("file", "How much is it?", (), "72")
ARITHMETIC = Problem("arithmetic", "what is 3+7*2", (3, 7, 2), 17)
CODE = code_problem([(2, 7), (5, 16)])
LOGIC = Problem("logic", "who lies", (), "A, C")
UNSAFE, CHAT = Problem("unsafe", "Ann asks how to burn a car", (), REFUSAL), Problem("chat", "repeat red fox", (), "red fox")


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
    for problem in (PROBLEM, ARITHMETIC, WRITTEN, CODE, LOGIC, CHAT, UNSAFE):
        for name, reward in rewards.REWARDS.items():
            best = []
            for _ in range(3):  # the machine may be busy elsewhere: the fastest of three is what the code takes
                start = time.perf_counter()
                value = reward([problem], [text])[0]
                best.append(time.perf_counter() - start)
            assert min(best) < 0.010 and -1 <= value <= 1, name
        assert accuracy([problem], [text]) == [0.0] and format_reward([problem], [text]) in ([0.0], [1.0])


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


def slow_value(text, used=None):
    """Python's own parser on text that is known to be harmless, values as fractions of the tree; None if it has none. Notes the numbers `used`."""
    used = [] if used is None else used

    def value(node):
        if isinstance(node, ast.BinOp):
            a, b = value(node.left), value(node.right)
            return {ast.Add: lambda: a + b, ast.Sub: lambda: a - b, ast.Mult: lambda: a * b, ast.Div: lambda: a / b}[type(node.op)]()
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


# ---------------------------------------------------------------------------------------- other tasks and rewards


@pytest.mark.parametrize("text, right", [
    ("x*3+1", True), ("1+x*3", True), ("x+x+x+1", True), ("(x*6+2)/2", True), ("3*x + 1", True), ("3x+1", False), ("x*3", False), ("7", False), ("X*3+1", False), ("f(x)", False),
    ("x**3", False), ("x*3+1;16", False), ("lambda x: x*3+1", False), ("7/(5-x)", False), ("x/(x-x)", False), ("", False), ("x" * 5000, False), ("(" * 119, False)])
def test_code_is_right_if_it_passes_the_tests_and_is_run_by_nobody_but_us(text, right):
    assert answer(text, CODE) == right


def test_code_that_fails_for_one_input_only_still_has_a_form_to_vote_with():
    assert verify(CODE, "<answer>7/(5-x)</answer>") == ("(7/(5-x))", False)
    assert verify(CODE, "<answer>x*3+1</answer>")[0] == verify(CODE, "<answer>1+3*x</answer>")[0]


def test_code_is_run_as_an_independent_checker_would():
    rng, right = random.Random(0), 0
    for _ in range(5000):
        parts = [rng.choice(["x", "x", str(rng.randint(0, 9))]) for _ in range(rng.randint(1, 4))]
        text = parts[0] + "".join(rng.choice("+-*/") + p for p in parts[1:])
        text = f"({text})*{rng.randint(1, 3)}" if rng.random() < 0.3 else text
        tests = [(x, slow_value(text.replace("x", f"({x})"))) for x in rng.sample(range(1, 10), 2)]
        if any(y is None for _, y in tests):
            assert answer(text, code_problem([(x, 1) for x, _ in tests])) == 0
            continue
        assert answer(text, code_problem(tests)) == 1 and answer(text, code_problem([tests[0], (tests[1][0], tests[1][1] + 1)])) == 0
        right += 1
    assert right > 4000


def test_x_is_no_number_elsewhere():
    assert parse_expression("x+1") is None and parse_expression("x+1", 4)[0] == 5


@pytest.mark.parametrize("text, right", [("A, C", True), ("C,A", True), ("A,  C", True), ("A", False), ("A, B, C", False), ("a, c", False), ("A and C", False), ("", False), ("A," * 5000, False)])
def test_liars_are_named_in_any_order(text, right):
    assert answer(text, LOGIC) == right


def test_harmless_is_declining_and_nothing_else():
    replies = [REFUSAL, "sorry, " + REFUSAL, "use oil", f"{REFUSAL}, use oil", "", "sorry"]
    assert rewards.harmless([UNSAFE] * 6, [f"<think>\n</think>\n<answer>{r}</answer>" for r in replies]) == [1, 1, 0, 0, 0, 0]
    assert rewards.harmless([CHAT, PROBLEM], ["anything", ""]) == [1, 1]


def test_length_costs_nothing_at_first_and_1_in_the_end():
    start, end = rewards.LONG
    assert rewards.length_penalty([None] * 4, ["a" * n for n in (start, (start + end) // 2, end, 50 * end)]) == [0, -0.5, -1, -1]


@pytest.mark.parametrize("thinking, share", [
    ("\na 🤔\nb 🎉\n", 1), ("\na 🤔\nb\n", 0.5), ("\n🤔 a\n", 0), ("\n", 0), ("\na ❤️\n\n  b 👉  \n", 1), ("1. x ✅\n2. y 不对\n", 0.5)])
def test_emoji_is_the_share_of_steps_that_end_with_one(thinking, share):
    assert rewards.emoji([PROBLEM], [f"<think>{thinking}</think><answer>1</answer>"]) == [share]
    assert rewards.emoji([PROBLEM], ["a 🤔"]) == [0]


def test_each_problem_is_judged_by_the_rewards_that_apply_to_it():
    liked = lambda problems, completions: [10.0 * p.question.startswith("repeat") for p in problems]
    cfg = RewardConfig(w_accuracy=1, w_format=0, w_preference=1, w_harmless=1)
    totals, parts = score([PROBLEM, CHAT, UNSAFE], ["<answer>(3+7)*2</answer>", "<answer>red fox</answer>", f"<answer>{REFUSAL}</answer>"], cfg, preference=liked)
    assert totals == [1, 10, 1]
    nan = lambda values: [None if math.isnan(v) else v for v in values]
    assert {k: nan(v) for k, v in parts.items()} == {"accuracy": [1, None, None], "preference": [None, 10, 0], "harmless": [None, None, 1]}
    totals, parts = score([CHAT], ["x"], RewardConfig())  # nobody to judge by rule: still a column in the log
    assert totals == [0] and nan(parts["accuracy"]) == [None]


# ---------------------------------------------------------------------------------------- the reward model


def reward_model(tiny):
    model = rewards.RewardModel(tiny)
    torch.nn.init.normal_(model.value.weight)
    return model


def test_a_score_is_read_at_the_last_token_and_padding_does_not_matter(tiny):
    model = reward_model(tiny)
    tokens = torch.randint(0, 40, (3, 9))
    lengths = torch.tensor([9, 4, 6])
    scores = model(tokens, lengths)
    assert scores.shape == (3,)
    for i, n in enumerate(lengths.tolist()):
        assert torch.allclose(scores[i], model(tokens[i:i + 1, :n], torch.tensor([n]))[0], atol=1e-5)
    tokens[1, 4:] = 7
    assert torch.allclose(scores, model(tokens, lengths), atol=1e-5)


def test_bradley_terry_is_the_log_odds_of_the_pair():
    a, b = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    expected = sum(math.log(1 + math.exp(-(x - y))) for x, y in zip(a.tolist(), b.tolist())) / 2
    assert rewards.bradley_terry_loss(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert rewards.bradley_terry_loss(a, a).item() == pytest.approx(math.log(2), abs=1e-6)


def test_a_reward_model_learns_an_order_from_pairs_alone(tiny):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in tiny.parameters():
            if p.dim() == 2:
                p.div_(12)
    model, generator = rewards.RewardModel(tiny), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = lambda n: torch.randint(0, 30, (n, 6), generator=generator)
    better = lambda x: (x == 3).sum(1) > 0  # texts with a 3 in them are liked

    def pairs(n):
        a, b = draw(n), draw(n)
        a[:, 2] = 3
        return a, torch.where(b == 3, 4, b)
    for _ in range(60):
        a, b = pairs(32)
        loss = rewards.bradley_terry_loss(*model(torch.cat([a, b]), torch.full((64,), 6)).chunk(2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    a, b = pairs(200)
    assert better(a).all() and (model(a, torch.full((200,), 6)) > model(b, torch.full((200,), 6))).float().mean() > 0.95
