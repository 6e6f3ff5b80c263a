"""The toy world: any text round-trips, every problem has an answer, and nothing held out is ever
trained on."""
import gzip
import itertools
import json
import random
import re
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import permutations

import pytest

import data
from data import (
    DataConfig,
    Problem,
    corpus_batch,
    countdown_problem,
    document,
    draw_habits,
    draw_problem,
    load_tokenizer,
)
from model import UserError, validate
from rewards import has_format, is_right, parse_expression, verify_written

TOK, CFG = load_tokenizer(), DataConfig()
HITS = (" yes", " 对了")
CHECK = re.compile(  # a result compared with the target
    r"^(\d+)([-+*/])(\d+)=(\d+)(?: vs | 比 )(\d+)"
    r"( yes| 对了| no| 不对)(?: 🤔| 🎉)?$", re.M)
STEP = re.compile(  # a result, compared or not
    r"^(?:(?:[0-9]+\. )?(?:keep|留) [\d, ]+: )?(\d+)([-+*/])(\d+)=(\d+)", re.M)


def numbers_in(text):
    return tuple(map(int, re.findall("[0-9]+", text)))


def attempts_at_countdown(n, cfg=CFG):
    rng = random.Random(0)
    for _ in range(n):
        problem, habits = draw_problem(cfg, rng, "countdown"), draw_habits(rng)
        lines, answer = data.write_countdown(problem, cfg, habits, rng)
        yield problem, habits, lines, answer


def right(problem, answer):
    return is_right(problem, f"<answer>{answer}</answer>")


# --------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("text", [
    "", "hello", "世界 留 对了", "𝔘\x00\x7f\r\n\t", "1234567890", "07 100 99",
    "<think>\n</think>",
    "<|end|><|pad|>", "e\u0301", "".join(map(chr, range(0x3000)))])
def test_any_text_round_trips(text):
    assert TOK.decode(TOK.encode(text)) == text


def test_text_cannot_forge_special_tokens():
    ids = TOK.encode("<|end|> <|pad|>")
    assert TOK.end_id not in ids and TOK.pad_id not in ids and TOK.end_id != TOK.pad_id


def test_numbers_and_words_of_the_toy_world_are_single_tokens():
    for piece in [str(n) for n in range(100)] + data.PIECES:
        assert len(TOK.encode(piece)) == 1, piece


def test_unknown_ids_and_broken_utf8_decode_without_an_error():
    assert TOK.decode([TOK.end_id, 65, 10**6, TOK.pad_id]) == "A"
    assert TOK.decode([0xE4, 0xB8]) == "\ufffd"


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name, value", [
    ("task", "chess"), ("n_numbers", 5), ("n_numbers", 1), ("max_number", 100), ("max_number", 1),
    ("ops", "^"), ("ops", "/"), ("ops", ""), ("eval_problems", 0), ("template", "chatml"),
    ("shots", 4), ("shots", 1), ("task", "file")])
def test_wrong_settings_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=name):
        validate(DataConfig(**{name: value}))


def test_a_few_problems_are_found_wherever_many_are():
    cfg = DataConfig(ops="*", n_numbers=4, max_number=30)
    assert len(data.eval_problems(cfg, 100, "countdown")) > 1
    assert len(data.eval_problems(cfg, 1, "countdown")) == 1


@pytest.mark.parametrize("mix", [
    "chess:1", "task:0", "task:-1", "task:x", "task:1e9", ",", "file:1", "task:nan",
    "task:1,countdown:x"])
def test_a_mixture_that_makes_no_sense_is_refused(mix):
    with pytest.raises(UserError, match="mix"):
        validate(DataConfig(mix=mix))


def test_a_file_of_problems_is_the_task_by_itself(tmp_path):
    path = tmp_path / "sums.jsonl"
    lines = [{"question": f"How much is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    cfg, rng = DataConfig(data=str(path), mix="task:2,chat:1"), random.Random(0)
    validate(cfg)
    assert cfg.task == "file"
    drawn = [draw_problem(cfg, rng) for _ in range(200)]
    assert {p.task for p in drawn} == {"file", "chat"}
    assert all(int(p.target) == 2 * numbers_in(p.question)[0] for p in drawn if p.task == "file")
    assert not set(data.eval_problems(cfg, 40)) & set(drawn)


def test_a_solution_is_read_for_its_last_box(tmp_path):
    path = tmp_path / "math.jsonl"
    text = "We know that the sum of the first ten is 55. " * 3
    answers = [rf"\boxed{{1}} is wrong. {text}So \boxed{{\frac{{{n}}}{{7}}}}." for n in range(40)]
    write_rows(path, [{**row, "answer": answer} for row, answer in zip(ROWS, answers, strict=True)])
    problem = data.file_problems(str(path))[9]
    assert verify_written(problem, "9/7")[1] and not verify_written(problem, "1")[1]


def write_rows(path, rows, encoding="utf-8"):
    path.write_bytes("".join(f"{json.dumps(row)}\n" for row in rows).encode(encoding))
    return str(path)


ROWS = [{"question": f"How much is {n} + {n}?", "answer": 2 * n} for n in range(40)]


def test_a_file_may_have_a_byte_order_mark_blank_lines_and_numbers_and_other_keys(tmp_path):
    file = tmp_path / "d.jsonl"
    path = write_rows(file, [{"problem": row["question"], "answer": 0, "solution": n / 2}
                             for n, row in enumerate(ROWS)], "utf-8-sig")
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n \n"))
    validate(DataConfig(data=path, question_key="problem", answer_key="solution"))
    problems = data.file_problems(path, "problem", "solution")
    assert [p.question for p in problems] == [row["question"] for row in ROWS]
    assert [p.target for p in problems] == [str(n / 2) for n in range(40)]


@pytest.mark.parametrize("row, words", [
    ('{"question": "q", "answer": null}', ["line 42", "None"]),
    ('{"question": "q", "answer": ["1"]}', ["line 42", "['1']"]),
    ('{"question": "q", "answer": true}', ["line 42", "True"]),
    ('{"question": "q", "answer": NaN}', ["line 42", "nan"]),
    (r'{"question": "half an emoji \ud83d", "answer": 1}', ["line 42"]),
    ('{"question": "q", "answer": "#### "}', ["line 42", "empty"]),
    ('{"question": 7, "answer": "1"}', ["line 42"]), ("[1]", ["line 42"]), ("{", ["line 42"]),
    (json.dumps({"problem": "how many?", "answer": "x" * 300}),
     ["problem: 'how many?'", "answer: 'xx"]),
    ('{"id": 1, "text": "q"}', ["line 42", "it has id: 1, text: 'q'",
                                "{question: text, answer: text or", "--question_key"]),
    ("é".encode("latin-1"), ["line 42"]), (b"\x1f\x8b\x08\x00", ["line 42"])])
def test_a_row_that_is_no_problem_is_refused_in_one_line_with_its_number(row, words, tmp_path):
    path = write_rows(tmp_path / "d.jsonl", ROWS)
    with open(path, "ab") as f:
        f.write(b"\n" + (row if isinstance(row, bytes) else row.encode()))
    with pytest.raises(UserError) as e:
        validate(DataConfig(data=path))
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


@pytest.mark.parametrize("content", [
    "".join(f"{json.dumps(row)}\n" for row in ROWS).encode("utf-16"),
    gzip.compress(json.dumps(ROWS).encode()),
    b"PAR1\x15\x04\x15\x10\n\xff"])
def test_files_of_other_kinds_are_refused_in_one_line(content, tmp_path):
    (tmp_path / "d").write_bytes(content)
    with pytest.raises(UserError, match="line [12] of .*d is not"):
        validate(DataConfig(data=str(tmp_path / "d")))


def test_an_official_test_split_is_what_is_evaluated_on_and_all_else_is_trained_on(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", ROWS)
    tests = [{"question": f"And {n}?", "answer": n} for n in range(20)]
    cfg = DataConfig(data=path, eval_data=write_rows(tmp_path / "test.jsonl", tests))
    validate(cfg)
    rng = random.Random(0)
    drawn = {draw_problem(cfg, rng).question for _ in range(1000)}
    assert drawn == {row["question"] for row in ROWS}
    assert {p.question for p in data.eval_problems(cfg, 50)} == {row["question"] for row in tests}
    with pytest.raises(UserError, match="--data"):
        validate(DataConfig(eval_data=cfg.eval_data))


def test_what_the_test_split_asks_is_not_trained_on(tmp_path, capsys):
    respelt = f" {ROWS[3]['question'].upper()}\r\n"
    tests = [{"question": "And 1?", "answer": 1}, ROWS[0], {"question": respelt, "answer": 1}]
    cfg = DataConfig(data=write_rows(tmp_path / "train.jsonl", ROWS),
                     eval_data=write_rows(tmp_path / "test.jsonl", tests))
    data.leave_out(cfg, TOK, 1000)
    drawn = {draw_problem(cfg, random.Random(n)).question for n in range(300)}
    assert drawn == {row["question"] for row in ROWS} - {ROWS[i]["question"] for i in (0, 3)}
    assert f"2 of {len(ROWS)} problems are left out" in capsys.readouterr().out


def test_numbers_with_an_exponent_are_written_out(tmp_path):
    (tmp_path / "d").write_text("".join(
        f'{{"question": "q{i}", "answer": {number}}}\n'
        for i, number in enumerate(["1e-05", "1e+16", "-2.5E3", "0.50", "1e999"])))
    targets = [problem.target for problem in data.file_problems(str(tmp_path / "d"))]
    assert targets == ["0.00001", "10000000000000000", "-2500", "0.50", "1e999"]


def test_problems_too_long_for_the_context_are_left_out_and_counted(tmp_path, capsys):
    rows = [*ROWS, {"question": "x" * 500, "answer": 1}, {"question": "y" * 80, "answer": 1}]
    cfg = DataConfig(data=write_rows(tmp_path / "d.jsonl", rows))
    problems = data.file_problems(cfg.data, "question", "answer")
    longest = len(data.prompt_ids(problems[-1], TOK, cfg))
    data.leave_out(cfg, TOK, longest)
    assert "1 of 42 problems are left out" in capsys.readouterr().out
    assert max(len(p.question) for p in problems) == 80
    data.leave_out(cfg, TOK, longest)
    assert capsys.readouterr().out == ""
    data.leave_out(cfg, TOK, 1)
    with pytest.raises(UserError, match="no problem is left to train on"):
        draw_problem(cfg, random.Random(0))


# ---------------------------------------------------------------------------------------- problems


OPS = ["".join(chosen) for n in (1, 2, 3, 4) for chosen in itertools.combinations("+-*/", n)]
WORLDS = [{"task": task, "n_numbers": n, "max_number": most, "ops": ops}
          for task in ("countdown", "arithmetic") for n in (2, 3, 4) for most in (2, 3, 4, 9, 99)
          for ops in OPS if ops != "/"]
SLOW = [  # few problems, or few draws that are one
    {"n_numbers": 3, "max_number": 99, "ops": "*"}, {"n_numbers": 4, "max_number": 99, "ops": "+*"},
    {"task": "arithmetic", "n_numbers": 4, "max_number": 4, "ops": "-"},
    {"task": "arithmetic", "n_numbers": 4, "max_number": 3, "ops": "+"},
    {"task": "arithmetic", "n_numbers": 4, "max_number": 99, "ops": "*"}]


def used_or_refused(world, n, documents):
    """Whether a world can be used: n held-out problems and some documents are drawn."""
    cfg, rng, start = DataConfig(**world), random.Random(0), time.process_time()
    try:
        validate(cfg)
        data.eval_problems(cfg, n)
        for _ in range(documents):
            data.document(cfg, rng)
        used = True
    except UserError as e:
        assert "leave no" in str(e)
        used = False
    assert time.process_time() - start < 1.5, world  # about a second, on a busy machine
    return used


def test_every_world_is_used_or_refused_at_once():
    used = [used_or_refused(world, 2, 2) for world in WORLDS]
    assert len(used) == 420 and 0.85 < sum(used) / len(used) < 1
    for world in SLOW:
        used_or_refused(world, 50, 20)


def all_values(numbers):
    """Every value of every expression over all the numbers, by brute force over splits."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for bits in range(1, 2 ** len(numbers) - 1):
        left = tuple(n for i, n in enumerate(numbers) if bits >> i & 1)
        rest = tuple(n for i, n in enumerate(numbers) if not bits >> i & 1)
        for a, b in itertools.product(all_values(left), all_values(rest)):
            values |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return values


@pytest.mark.parametrize("cfg", [
    CFG, DataConfig(n_numbers=2), DataConfig(n_numbers=4), DataConfig(max_number=99, ops="+-"),
    DataConfig(ops="+-*/")])
def test_every_target_can_be_reached(cfg):
    rng = random.Random(0)
    for _ in range(40):
        problem = draw_problem(cfg, rng, "countdown")
        assert len(problem.numbers) == cfg.n_numbers
        assert all(1 <= n <= cfg.max_number for n in problem.numbers)
        assert problem.target in all_values(problem.numbers)
        assert numbers_in(problem.question) == (problem.target, *problem.numbers)


def test_arithmetic_targets_are_the_values_of_their_expressions():
    rng = random.Random(0)
    for _ in range(300):
        problem = draw_problem(CFG, rng, "arithmetic")
        assert parse_expression(problem.question.removeprefix("what is "))[0] == problem.target


def number_set(problem):
    return tuple(sorted(problem.numbers))


@pytest.mark.parametrize("task", ["countdown", "arithmetic"])
def test_no_set_of_numbers_is_in_training_and_in_evaluation_whatever_the_target(task):
    cfg, rng = DataConfig(task=task), random.Random(0)
    held_out = {number_set(p) for p in data.eval_problems(cfg, 300)}
    trained = {number_set(draw_problem(cfg, rng)) for _ in range(3000)}
    assert not held_out & trained
    assert len(held_out | trained) > 160 and len(held_out) > 40  # of 165 sets there are


@pytest.mark.parametrize("task", ["countdown", "arithmetic"])
def test_a_set_of_numbers_is_on_one_side_of_the_split_in_any_order_and_with_any_target(task):
    for numbers in [(3, 7, 2), (1, 1, 9), (5, 5), (2, 4, 6, 8)]:
        problems = [data.Problem(task, f"order {i}", order, target)
                    for i, order in enumerate(itertools.permutations(numbers))
                    for target in range(20)]
        assert len({problem.held_out for problem in problems}) == 1
    assert countdown_problem((3, 7, 2), 20) == countdown_problem((2, 3, 7), 20)


def test_a_question_of_a_file_is_on_one_side_of_the_split_however_its_answer_is_spelt(tmp_path):
    path = tmp_path / "halves.jsonl"
    entries = [{"question": f"What is half of {n}?", "answer": answer}
               for n in range(1, 200, 2) for answer in (f"{n}/2", f"{n / 2}")]
    path.write_text("\n".join(map(json.dumps, entries)))
    problems = data.file_problems(str(path))
    held_out, trained = ({p.question for p in problems if p.held_out == side}
                         for side in (True, False))
    assert len(problems) == 200 and not held_out & trained
    assert len(held_out) + len(trained) == 100 and 15 < len(held_out) < 45


@pytest.mark.parametrize("task", ["logic", "code", "chat", "unsafe"])
def test_questions_of_other_tasks_are_held_out_too(task):
    cfg, rng = DataConfig(task=task), random.Random(0)
    held_out = {p.question for p in data.eval_problems(cfg, 100)}
    trained = {draw_problem(cfg, rng).question for _ in range(3000)}
    assert len(held_out) > 60 and not held_out & trained


def test_the_same_tests_in_another_order_are_one_problem():
    assert data.code_problem([(5, 16), (2, 7)]) == data.code_problem([(2, 7), (5, 16)])


def test_a_mixture_draws_its_tasks_by_their_shares():
    cfg, rng = DataConfig(mix="task:2,chat:1,unsafe:1"), random.Random(0)
    drawn = [draw_problem(cfg, rng).task for _ in range(2000)]
    assert set(drawn) == {"countdown", "chat", "unsafe"}
    assert 0.45 < drawn.count("countdown") / 2000 < 0.55
    assert 0.2 < drawn.count("chat") / 2000 < 0.3
    assert {p.task for p in data.eval_problems(cfg, 20)} == {"countdown"}


@pytest.mark.parametrize("task, n", [("countdown", 440), ("arithmetic", 373)])  # no more exist
def test_evaluation_problems_are_distinct_and_always_the_same(task, n):
    cfg = DataConfig(task=task)
    problems = data.eval_problems(cfg, 500)
    assert len({p.key for p in problems}) == len(problems) == n
    assert data.eval_problems(cfg, 200) == problems[:200]


# ----------------------------------------------------------------------------------- other tasks


def is_true(text, liars):
    """Whether a person's statement is true, read independently of data.py."""
    lie = [name in liars for name in re.findall("[A-Z]", text)]
    if " or " in text:
        return any(lie)
    return not lie[0] if "honest" in text else all(lie)


def solve_logic(question):
    """Every set of liars under which exactly the liars' statements are false."""
    said = [text.split(" says ") for text in question.removesuffix(": who lies").split(", ")]
    people, found = [speaker for speaker, _ in said], []
    for n in range(4):
        for liars in itertools.combinations(people, n):
            if all(is_true(text, liars) != (speaker in liars) for speaker, text in said):
                found.append(", ".join(liars))
    return found


def test_a_logic_puzzle_has_one_answer():
    rng = random.Random(0)
    problems = [draw_problem(CFG, rng, "logic") for _ in range(300)]
    assert all(solve_logic(p.question) == [p.target] for p in problems)
    assert len({p.target for p in problems}) > 20


@pytest.mark.parametrize("task", ["logic", "code"])
def test_authors_of_other_tasks_are_right_exactly_if_they_say_so(task):
    rng, hits, longest = random.Random(0), 0, 0
    for _ in range(500):
        problem, habits = draw_problem(CFG, rng, task), draw_habits(rng)
        lines, answer = data.TASKS[task].write(problem, CFG, habits, rng)
        for a, op, b, c in re.findall(r"(\d+)([-+*])(\d+)=(\d+)", "".join(lines)):
            assert parse_expression(f"{a}{op}{b}")[0] == int(c)
        if habits.checks:
            said_hit = any(word in lines[-1] for word in HITS)
            assert right(problem, answer) == said_hit, (problem, lines, answer)
            # A slope with too large a rest is passed over without a verdict.
            assert sum(" no" in line or " 不对" in line for line in lines) <= habits.patience
            hits += said_hit
            longest = max(longest, len(lines))
    assert hits > 100 and longest > 5


@pytest.mark.parametrize("task, least, most", [("chat", 1, 1), ("unsafe", 0.8, 0.95)])
def test_scripted_replies_are_right_but_for_some_to_unsafe_requests(task, least, most):
    rng, n_right = random.Random(0), 0
    for _ in range(500):
        problem = draw_problem(CFG, rng, task)
        lines, answer = data.write_general(problem, CFG, None, rng)
        n_right += is_right(problem, data.tagged(lines, answer))
        assert bool(lines) == problem.question.startswith("count ")  # the rest needs no thinking
    assert least <= n_right / 500 <= most


# --------------------------------------------------------------------------------------- the corpus


def countdown_asked(prompt):
    """The countdown problem in a document's prompt; None if it is about something else."""
    found = re.match(r"User: make (\d+) from (.*)\n", prompt)
    return found and countdown_problem(numbers_in(found[2]), int(found[1]))


def can_be_solved(problem):
    return problem.target in data.reachable(tuple(sorted(problem.numbers)), CFG.ops)


def test_no_document_of_the_corpus_is_about_the_numbers_of_a_held_out_problem():
    rng, seen = random.Random(0), 0
    held_out = {number_set(p) for p in data.eval_problems(CFG, 200)}
    for _ in range(5000):
        problem = countdown_asked(document(CFG, rng)[0])
        if problem:
            assert not problem.held_out and number_set(problem) not in held_out
            seen += 1
    assert seen > 3000


@pytest.mark.parametrize("cfg", [
    CFG, DataConfig(n_numbers=4, max_number=20, ops="+-*/"), DataConfig(n_numbers=2)])
def test_authors_calculate_and_check_correctly(cfg):
    hits = 0
    for problem, habits, lines, answer in attempts_at_countdown(600, cfg):
        text = "".join(lines)
        checks = CHECK.findall(text)
        for a, op, b, c in STEP.findall(text):
            assert parse_expression(f"{a}{op}{b}")[0] == int(c)
        for *_, c, target, verdict in checks:
            assert int(target) == problem.target
            assert (verdict in HITS) == (int(c) == problem.target)
        used = parse_expression(answer)[1]
        assert sorted(used) == sorted(problem.numbers)  # also wrong answers play by the rules
        if habits.checks:
            said_hit = any(verdict in HITS for *_, verdict in checks)
            assert right(problem, answer) == said_hit
            assert len(checks) - said_hit <= habits.patience
            hits += said_hit
    assert hits > 20


def test_most_code_with_another_test_has_no_solution_and_none_is_held_out():
    rng, solved = random.Random(0), 0
    for _ in range(300):
        problem = draw_problem(CFG, rng, "code")
        other = data.with_another_test(problem, rng)
        assert not other.held_out and set(problem.numbers[::2]) == set(other.numbers[::2])
        lines, answer = data.write_code(other, CFG, data.Habits(0.0, "full", True, 30), rng)
        solved += right(other, answer)
        assert right(other, answer) or lines[-1] == "nothing fits\n"
    assert 10 < solved < 150


def test_x_itself_is_the_first_slope_that_authors_try_and_large_rests_are_passed_over():
    habits = data.Habits(0.0, "full", True, 30)
    problem = data.code_problem([(2, 7), (5, 19)])
    lines, answer = data.write_code(problem, CFG, habits, random.Random(0))
    assert [line[:3] for line in lines] == [f"{slope}. " for slope in "x1234"]
    assert lines[0] == "x. 2*2=4 7-4=3, 5*5=25 25+3=28 vs 19 no\n"
    assert lines[-1] == "4. 2*4=8 8-7=1, 5*4=20 20-1=19 vs 19 yes\n"
    assert answer == "x*4-1" and right(problem, answer)
    far = data.code_problem([(5, 52), (6, 62)])  # x * 10 + 2: no rest of one digit will do
    lines, answer = data.write_code(far, CFG, replace(habits, patience=3), random.Random(0))
    assert lines[1:3] == ["1. 5*1=5 52-5=47\n", "2. 5*2=10 52-10=42\n"]  # and cost no patience
    assert [line for line in lines if " no" in line] == lines[-2:-1] and answer == "x*9+7"
    hasty = replace(habits, checks=False)
    problem = data.code_problem([(5, 7), (6, 9)])
    lines, answer = data.write_code(problem, CFG, hasty, random.Random(0))
    assert lines == ["x. 5*5=25 25-7=18\n", "1. 5*1=5 7-5=2, 6*1=6 6+2=8 vs 9\n"]
    assert answer == "x*1+2"


def test_few_authors_are_right_and_fewer_are_right_with_all_tags():
    n, n_right, wanted = 3000, 0, 0
    for problem, habits, _, answer in attempts_at_countdown(n):
        is_hit = right(problem, answer)
        n_right += is_hit
        wanted += is_hit and habits.layout == "full"
    assert 0.1 < n_right / n < 0.45 and 0.02 < wanted / n < 0.2


# The least patience, in misses, that counts as that of the policy. The impatient of arithmetic
# leave out a step that is not easy.
PATIENT = {"countdown": 18, "logic": 6, "code": 9, "arithmetic": 6}
LESS = {"countdown": 12, "logic": 3, "code": 6, "arithmetic": 0}  # misses, or steps, of the others


def test_no_author_of_countdown_has_all_habits_of_the_policy_and_every_two_occur_together():
    rng, found = random.Random(0), set()
    for _ in range(3000):
        habits = draw_habits(rng)
        found.add((habits.layout == "full", habits.checks, habits.patience >= 18))
    assert found == set(itertools.product([True, False], repeat=3)) - {(True, True, True)}


@pytest.mark.parametrize("task", PATIENT)
def test_no_author_of_any_task_has_all_habits_of_the_policy(task):
    rng, found = random.Random(0), set()
    for _ in range(3000):
        habits = draw_habits(rng, task)
        found.add((habits.layout == "full", habits.checks, habits.patience >= PATIENT[task]))
    assert (True, True, True) not in found
    assert {(True, False, True), (False, True, True), (True, True, False)} <= found


MISSES = re.compile("(?: no| 不对)(?: 🤔)?$", re.M)
ASKED = {"countdown": "User: make ", "logic": "User: [A-F] says ", "code": r"User: f\(",
         "arithmetic": "User: what is "}


@pytest.mark.parametrize("task, n", [("countdown", 3000), ("logic", 1500), ("code", 1500),
                                     ("arithmetic", 800)])
def test_no_document_has_all_tags_and_the_checks_and_misses_of_the_policy(task, n):
    rng, cfg = random.Random(0), DataConfig(task=task)
    tagged_misses, other_misses = [], []
    for _ in range(n):
        prompt, text = document(cfg, rng)
        thinking = text.split("</think>")[0].removeprefix("<think>\n")
        if re.match(ASKED[task], prompt) and thinking:
            if task == "arithmetic":  # or steps of its work that are not easy
                thinking = re.sub(r"^\d\d.*", " no", thinking, flags=re.M)
            misses = len(MISSES.findall(thinking))
            (tagged_misses if has_format(text) else other_misses).append(misses)
    assert max(tagged_misses) <= LESS[task] < max(other_misses)
    assert (max(tagged_misses) > 0) == (LESS[task] > 0)


def test_a_search_that_has_tried_everything_gives_up():
    rng, habits = random.Random(0), data.Habits(chinese=0, layout="none", checks=True, patience=99)
    for _ in range(50):
        problem = data.without_solution(draw_problem(CFG, rng, "countdown"), CFG, rng)
        assert not can_be_solved(problem) and not problem.held_out
        lines, answer = data.write_countdown(problem, CFG, habits, rng)
        numbered = [int(line.split(". ")[0]) for line in lines if ". " in line]
        n_moves = len(data.moves(problem.numbers, CFG.ops))
        assert numbered == list(range(1, n_moves + 1))
        assert lines[-1] == "nothing fits\n"
        assert sorted(parse_expression(answer)[1]) == sorted(problem.numbers)


def test_some_puzzles_of_the_corpus_have_no_solution():
    rng = random.Random(0)
    asked = [countdown_asked(document(CFG, rng)[0]) for _ in range(1000)]
    solvable = [can_be_solved(problem) for problem in asked if problem]
    assert 0.6 < sum(solvable) / len(solvable) < 0.9


def test_tables_compare_sums_and_hits_are_as_frequent_as_misses():
    rng, hits = random.Random(0), 0
    for _ in range(500):
        line = data.table_line(CFG, draw_habits(rng), rng)
        a, op, b, c, other, verdict = CHECK.match(line).groups()
        assert parse_expression(f"{a}{op}{b}")[0] == int(c)
        assert (verdict in HITS) == (c == other)
        hits += c == other
    assert 0.4 < hits / 500 < 0.65


def test_a_table_does_not_give_away_held_out_problems_of_two_numbers():
    cfg, rng, seen = DataConfig(n_numbers=2), random.Random(0), set()
    for _ in range(2000):
        a, _, b, *_ = CHECK.match(data.table_line(cfg, draw_habits(rng), rng)).groups()
        seen.add((int(a), int(b)))
    assert len(seen) > 200
    for task in ("countdown", "arithmetic"):
        assert not any(data.Problem(task, "", pair, 0).held_out for pair in seen)


@pytest.mark.parametrize("solution, target", [
    (r"We get $\boxed{5}$. Note that this agrees with all that was said before.", r"\boxed{5}"),
    (r"\boxed{1} is wrong: \boxed{\frac{1}{2}} (see above)", r"\boxed{\frac{1}{2}}"),
    (r"\boxed{\{1, 2\}}.", r"\boxed{\{1, 2\}}"), (r"so \boxed 5", r"\boxed 5"),
    (r"open: \boxed{3", r"\boxed{3"), ("no box {3}", "no box {3}")])
def test_of_a_solution_the_last_box_is_the_answer(solution, target):
    assert data.last_boxed(solution) == target


def test_one_question_in_two_spellings_is_on_one_side_of_the_split():
    for n in range(40):
        question = f"What  is {n} Plus\t{n}?"
        one, other = (data.Problem("file", q, (), "1")
                      for q in (question, " ".join(question.lower().split())))
        assert one.held_out == other.held_out and one.key == other.key
    logic = [data.Problem("logic", q, (), "Ann") for q in ("Ann lies", "ann lies")]
    assert logic[0].key != logic[1].key


def test_both_languages_are_mixed_within_documents():
    mixed = total = 0
    for _, _, lines, _ in attempts_at_countdown(500):
        text = "".join(lines)
        english, chinese = re.findall("[a-z]+", text), re.findall("[\u4e00-\u9fff]+", text)
        if len(english) + len(chinese) > 3:
            total += 1
            mixed += bool(english) and bool(chinese)
    assert mixed / total > 0.5


def test_some_authors_end_their_lines_with_an_emoji():
    texts = ["".join(lines) for _, _, lines, _ in attempts_at_countdown(1000)]
    with_emoji = [bool(re.search("[👉🤔🎉😴]", text)) for text in texts]
    assert 0.1 < sum(with_emoji) / 1000 < 0.3


# ------------------------------------------------------------------------------------------ batches

PROSE = re.compile(  # the first line of a page of prose
    r"\w+ and (\w+: hello \w+ and \w+)|\w+: \w+(, \w+)+|(?P<words>(\w+ )+\w+), again: (?P=words)|"
    r"\w+ has .+ to \w+ a \w+|(\w+ )+\w+|(very )+(?P<short>\w+ \w+), or (?P=short)")


def begins_a_document(text):
    first = text.split("\n")[0]
    return text.startswith("User: ") or STEP.match(text) or PROSE.fullmatch(first)


def test_rows_are_packed_with_whole_documents():
    tokens, mask = corpus_batch(CFG, TOK, random.Random(0), rows=8, length=200)
    assert tokens.shape == mask.shape == (8, 200) and mask.float().mean() > 0.85
    for row, kept in zip(tokens, mask, strict=True):
        ids = row[kept].tolist()
        assert kept.long().diff().max() <= 0 and (row[~kept] == TOK.pad_id).all()
        assert ids[-1] == TOK.end_id
        documents = TOK.decode([i if i != TOK.end_id else 0 for i in ids]).split("\0")[:-1]
        assert all(begins_a_document(text) for text in documents)


def test_a_corpus_batch_depends_on_its_generator_alone():
    a, b, c = (corpus_batch(CFG, TOK, random.Random(seed), 2, 150)[0] for seed in (1, 1, 2))
    assert a.equal(b) and not a.equal(c)


def test_a_world_too_small_to_hold_problems_out_is_refused():
    for tiny_world in ({"n_numbers": 2, "max_number": 2, "ops": "-"},
                       {"task": "arithmetic", "max_number": 99, "ops": "*", "n_numbers": 4}):
        cfg = DataConfig(**tiny_world)
        with pytest.raises(UserError, match="max_number"):
            draw_problem(cfg, random.Random(0))
            draw_problem(cfg, random.Random(0), held_out=True)


def test_all_stands_for_the_four_reasoning_tasks_in_the_corpus_the_mix_and_the_evaluation():
    cfg = DataConfig(task="all", mix="task:2,chat:1,unsafe:1")
    shares = cfg.shares()
    assert {task: shares[task] for task in data.REASONING} == dict.fromkeys(data.REASONING, 0.5)
    assert shares["chat"] == shares["unsafe"] == 1
    cfg = DataConfig(task="all")
    assert cfg.shares() == dict.fromkeys(data.REASONING, 0.25)
    asked = Counter(p.task for p in data.eval_problems(cfg, 40))
    assert set(asked) == set(data.REASONING) and all(9 <= n <= 11 for n in asked.values())
    rng, prompts = random.Random(0), Counter()
    for _ in range(2000):
        prompt, _ = data.document(cfg, rng)
        kind = prompt.split(" ")[1][:4] if prompt else "none"
        prompts[{"make": "countdown", "what": "arithmetic"}.get(kind, kind[:2])] += 1
    assert 0.28 < prompts["countdown"] / 2000 < 0.36
    assert 0.12 < prompts["arithmetic"] / 2000 < 0.18
    assert 0.14 < prompts["f("] / 2000 < 0.22 and 0.13 < prompts["no"] / 2000 < 0.21


def test_a_new_tasks_sets_of_numbers_are_held_out_in_every_order():
    problems = [Problem("largest", f"the largest of {a}, {b} and {c}", (a, b, c), 3)
                for a, b, c in permutations((1, 2, 3))]
    assert len({p.held_out for p in problems}) == len({p.key for p in problems}) == 1
    tests = [Problem("code", "f(1)=2, f(3)=4", (1, 2, 3, 4), "f"),
             Problem("code", "f(1)=4, f(3)=2", (1, 4, 3, 2), "f")]  # the same numbers
    assert tests[0].key != tests[1].key


def test_a_task_in_reasoning_is_one_of_all(monkeypatch):
    more = data.Task(data.draw_logic, data.write_logic)
    monkeypatch.setattr(data, "TASKS", {**data.TASKS, "more": more})
    monkeypatch.setattr(data, "REASONING", {**data.REASONING, "more": 0.1})
    cfg = DataConfig(task="all")
    assert cfg.shares()["more"] == pytest.approx(1 / 5)
    drawn, rng, draw = [], random.Random(0), draw_problem
    monkeypatch.setattr(data, "draw_problem", lambda cfg, rng, kind: drawn.append(kind) or
                        draw(cfg, rng, kind))
    for _ in range(100):
        document(cfg, rng)
    assert {"more", *data.REASONING} <= set(drawn)


def test_the_script_shows_the_corpus_of_a_task(capsys):
    data.main("code")
    assert capsys.readouterr().out.count("f(") > 4
    with pytest.raises(SystemExit) as e:
        data.main("chat")
    assert e.value.code == 2 and "'chat' is not one of" in capsys.readouterr().err


def test_no_room_for_a_prompt_is_said_in_those_words(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [json.dumps({"question": f"{i}?", "answer": i}) for i in range(9)]
    path.write_text("\n".join(lines))
    cfg = DataConfig(data=str(path), template="base")
    with pytest.raises(UserError, match="leaves no room in the context"):
        data.leave_out(cfg, TOK, -4)
