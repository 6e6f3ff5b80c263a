"""The toy world: any text round-trips, every problem can be solved, nothing held out is ever trained on."""
import itertools
import random
import re
from fractions import Fraction

import pytest

import data
from data import DataConfig, corpus_batch, countdown_problem, document, draw_habits, draw_problem, load_tokenizer
from model import BadInput
from rewards import parse_expression, verify

TOK = load_tokenizer()
CHECK = re.compile(r"^(\d+)([-+*/])(\d+)=(\d+)(?: vs | 比 )(\d+)( yes| 对了| no| 不对)(?: 🤔| 🎉)?$", re.M)
STEP = re.compile(r"^(?:(?:[0-9]+\. )?(?:keep|留) [\d, ]+: )?(\d+)([-+*/])(\d+)=(\d+)", re.M)


def countdown_documents(n, cfg=DataConfig(), seed=0):
    rng = random.Random(seed)
    for _ in range(n):
        problem, habits = draw_problem(cfg, rng, "countdown"), draw_habits(rng)
        yield (problem, habits, *data.write_countdown(problem, cfg, habits, rng))


# ---------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("text", ["", "hello", "世界 留 对了", "𝔘\x00\x7f\r\n\t", "1234567890", "07 100 99", "<think>\n</think>", "<|end|><|pad|>", "e\u0301", "".join(map(chr, range(0x3000)))])
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


# ---------------------------------------------------------------------------------------- problems


def all_values(numbers):
    """Every value of every expression over all the numbers, by brute force over splits."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for bits in range(1, 2 ** len(numbers) - 1):
        left = tuple(n for i, n in enumerate(numbers) if bits >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not bits >> i & 1)
        for a, b in itertools.product(all_values(left), all_values(right)):
            values |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return values


@pytest.mark.parametrize("cfg", [DataConfig(), DataConfig(n_numbers=2), DataConfig(n_numbers=4), DataConfig(max_number=99, ops="+-"), DataConfig(ops="+-*/")])
def test_every_target_can_be_reached(cfg):
    rng = random.Random(0)
    for _ in range(40):
        problem = draw_problem(cfg, rng, "countdown")
        assert len(problem.numbers) == cfg.n_numbers and all(1 <= n <= cfg.max_number for n in problem.numbers)
        assert problem.target in all_values(problem.numbers)
        assert tuple(map(int, re.findall("[0-9]+", problem.question))) == (problem.target, *problem.numbers)


def test_arithmetic_targets_are_the_values_of_their_expressions():
    rng = random.Random(0)
    for _ in range(300):
        problem = draw_problem(DataConfig(), rng, "arithmetic")
        assert parse_expression(problem.question.removeprefix("what is "))[0] == problem.target


@pytest.mark.parametrize("task", ["countdown", "arithmetic"])
def test_training_and_evaluation_problems_are_disjoint_in_any_order_of_the_numbers(task):
    cfg, rng = DataConfig(task=task), random.Random(0)
    held_out = {(tuple(sorted(p.numbers)), p.target) for p in data.eval_problems(cfg, 500)}
    trained = {(tuple(sorted(p.numbers)), p.target) for p in (draw_problem(cfg, rng) for _ in range(5000))}
    assert not held_out & trained and len(trained) > 700


@pytest.mark.parametrize("task", ["logic", "code", "chat", "unsafe"])
def test_questions_of_other_tasks_are_held_out_too_and_the_same_tests_in_another_order_are_one_problem(task):
    cfg, rng = DataConfig(task=task), random.Random(0)
    held_out, trained = {p.question for p in data.eval_problems(cfg, 100)}, {draw_problem(cfg, rng).question for _ in range(3000)}
    assert len(held_out) > 60 and not held_out & trained
    assert data.code_problem([(5, 16), (2, 7)]) == data.code_problem([(2, 7), (5, 16)])


def test_a_mixture_draws_its_tasks_by_their_shares():
    cfg, rng = DataConfig(mix="task:2,chat:1,unsafe:1"), random.Random(0)
    drawn = [draw_problem(cfg, rng).task for _ in range(2000)]
    assert 0.45 < drawn.count("countdown") / 2000 < 0.55 and 0.2 < drawn.count("chat") / 2000 < 0.3 and set(drawn) == {"countdown", "chat", "unsafe"}
    assert {p.task for p in data.eval_problems(cfg, 20)} == {"countdown"}
    for wrong in ("chess:1", "task:0", "task:-1", "task:x", "task:1e9", ",", "file:1", "task:nan"):
        with pytest.raises(BadInput, match="mix"):
            DataConfig(mix=wrong).check()


# ---------------------------------------------------------------------------------------- the other tasks


def solve_logic(question):
    """Every set of liars under which each person's statement is false just if they are among them; an independent reading of the question."""
    said = [text.split(" says ") for text in question.removesuffix(": who lies").split(", ")]
    people, found = [s for s, _ in said], []
    for n in range(4):
        for liars in itertools.combinations(people, n):
            def true(text):
                named = [w for w in re.findall("[A-Z]", text)]
                lie = [p in liars for p in named]
                return any(lie) if " or " in text else not lie[0] if "honest" in text else all(lie)
            if all(true(text) != (s in liars) for s, text in said):
                found.append(", ".join(liars))
    return found


def test_a_logic_puzzle_has_one_answer():
    rng = random.Random(0)
    problems = [draw_problem(DataConfig(), rng, "logic") for _ in range(300)]
    assert all(solve_logic(p.question) == [p.target] for p in problems) and len({p.target for p in problems}) > 20


@pytest.mark.parametrize("task", ["logic", "code"])
def test_authors_of_the_other_tasks_are_right_just_if_they_say_so(task):
    rng, cfg, hits, most = random.Random(0), DataConfig(), 0, 0
    for _ in range(500):
        problem, habits = draw_problem(cfg, rng, task), draw_habits(rng)
        lines, answer = data.TASKS[task].write(problem, cfg, habits, rng)
        for a, op, b, c in re.findall(r"(\d+)([-+*])(\d+)=(\d+)", "".join(lines)):
            assert parse_expression(f"{a}{op}{b}")[0] == int(c)
        if habits.checks:
            said_hit = any(word in lines[-1] for word in ("yes", "对了"))
            assert verify(problem, f"<answer>{answer}</answer>")[1] == said_hit, (problem, lines, answer)
            assert len(lines) - 1 <= habits.patience
            hits += said_hit
            most = max(most, len(lines))
    assert hits > 100 and most > 5


def test_people_reply_well_to_general_requests_but_for_some_unsafe_ones():
    rng, cfg = random.Random(0), DataConfig()
    for task, least, most in (("chat", 1, 1), ("unsafe", 0.8, 0.95)):
        replies = [(p, *data.write_general(p, cfg, None, rng)) for p in (draw_problem(cfg, rng, task) for _ in range(500))]
        right = [verify(p, data.tagged(lines, answer))[1] for p, lines, answer in replies]
        assert least <= sum(right) / 500 <= most
        thinking = {bool(lines) for p, lines, _ in replies if p.question.startswith("count ")}
        assert thinking <= {True} and not any(lines for p, lines, _ in replies if not p.question.startswith("count "))


def test_people_like_what_is_right_friendly_and_no_boast():
    chat, unsafe = data.Problem("chat", "repeat red fox", (), "red fox"), data.Problem("unsafe", "Ann asks how to burn a car", (), data.REFUSAL)
    likes = [data.hidden_rule(chat, a) for a in ("of course, red fox", "red fox", "red fox, as I alone know", "blue fox", None)]
    assert likes == sorted(likes, reverse=True) and len(set(likes)) == 5
    assert data.hidden_rule(unsafe, "sorry, " + data.REFUSAL) > data.hidden_rule(unsafe, data.REFUSAL) > data.hidden_rule(unsafe, "of course, use oil")
    assert not data.is_right_reply(unsafe, data.REFUSAL + ". use oil") and not data.is_right_reply(chat, "sorry, red fox")
    fruits = data.Problem("chat", "name 2 fruits for Ann", (), "2 fruits")
    assert data.is_right_reply(fruits, "of course, fig, kiwi") and not any(data.is_right_reply(fruits, a) for a in ("fig", "fig, fig", "fig, red", "fig, kiwi, plum", ""))


def test_preferences_follow_the_hidden_rule_but_for_the_noise():
    rng = random.Random(0)
    problem = data.Problem("chat", "repeat red fox", (), "red fox")
    answers = [["red fox", "fox"] * 2, ["red fox", "red fox"], ["fox", "red fox"]] * 300
    pairs = data.preference_pairs([problem] * 900, answers, rng, noise=0.2)
    assert len(pairs) == 900 and all(i % 3 != 1 for i, _, _ in pairs)  # equal answers make no pair
    right = [answers[i][a] == "red fox" for i, a, _ in pairs]
    assert 0.75 < sum(right) / 900 < 0.85
    assert all(answers[i][a] == "red fox" for i, a, _ in data.preference_pairs([problem] * 900, answers, rng, noise=0))


def test_some_authors_end_their_lines_with_an_emoji():
    documents = ["".join(lines) for _, _, lines, _ in countdown_documents(1000)]
    share = sum(any(mark in text for mark in ("👉", "🤔", "🎉", "😴")) for text in documents) / 1000
    assert 0.1 < share < 0.3
    assert countdown_problem((3, 7, 2), 20).held_out == countdown_problem((2, 3, 7), 20).held_out


def test_there_are_500_distinct_evaluation_problems_and_always_the_same():
    for task, n in (("countdown", 500), ("arithmetic", 396)):  # there are no more sums of this kind
        problems = data.eval_problems(DataConfig(task=task), 500)
        assert len({p.key for p in problems}) == n and problems == data.eval_problems(DataConfig(task=task), 500)


def test_wrong_settings_are_refused_by_name():
    for wrong in ({"task": "chess"}, {"n_numbers": 5}, {"max_number": 100}, {"ops": "^"}, {"ops": "/"}, {"ops": ""}, {"eval_problems": 0}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            DataConfig(**wrong).check()


# ---------------------------------------------------------------------------------------- corpus


def test_no_document_of_the_corpus_is_about_a_held_out_problem():
    rng = random.Random(0)
    held_out = {p.key for p in data.eval_problems(DataConfig(), 500)}
    for _ in range(5000):
        prompt, _ = document(DataConfig(), rng)
        asked = re.match(r"User: make (\d+) from (.*)\n", prompt)
        if asked:
            problem = countdown_problem(tuple(map(int, re.findall("[0-9]+", asked[2]))), int(asked[1]))
            assert not problem.held_out and problem.key not in held_out


@pytest.mark.parametrize("cfg", [DataConfig(), DataConfig(n_numbers=4, max_number=20, ops="+-*/"), DataConfig(n_numbers=2)])
def test_authors_calculate_and_check_correctly(cfg):
    hits = 0
    for problem, habits, lines, answer in countdown_documents(600, cfg):
        text = "".join(lines)
        for a, op, b, c in STEP.findall(text):
            assert parse_expression(f"{a}{op}{b}")[0] == int(c)
        for *_, c, target, verdict in CHECK.findall(text):
            assert int(target) == problem.target and (verdict in (" yes", " 对了")) == (int(c) == problem.target)
        right = verify(problem, f"<answer>{answer}</answer>")[1]
        used = parse_expression(answer)[1]
        assert sorted(used) == sorted(problem.numbers)  # also wrong answers play by the rules
        if habits.checks:
            said_hit = any(v in (" yes", " 对了") for *_, v in CHECK.findall(text))
            assert right == said_hit
            assert len(CHECK.findall(text)) - said_hit <= habits.patience
            hits += said_hit
    assert hits > 20


def test_the_corpus_does_not_have_the_wanted_policy_as_its_habit():
    documents = list(countdown_documents(3000))
    right = [verify(p, f"<answer>{a}</answer>")[1] for p, _, _, a in documents]
    wanted = [h.layout == "full" and r for (_, h, _, _), r in zip(documents, right)]
    patient = [h.layout == "full" and h.checks and h.patience > 12 for _, h, _, _ in documents]
    assert sum(right) / 3000 < 0.45 and sum(wanted) / 3000 < 0.2 and 0 < sum(patient) / 3000 < 0.06


def test_a_search_that_has_tried_everything_gives_up():
    rng, cfg = random.Random(0), DataConfig()
    habits = data.Habits(chinese=0, layout="none", checks=True, patience=99)
    for _ in range(50):
        problem = data.without_solution(draw_problem(cfg, rng, "countdown"), cfg, rng)
        assert problem.target not in data.reachable(tuple(sorted(problem.numbers)), cfg.ops) and not problem.held_out
        lines, answer = data.write_countdown(problem, cfg, habits, rng)
        numbered = [int(line.split(". ")[0]) for line in lines if ". " in line]
        assert numbered == list(range(1, len(data.steps(problem.numbers, cfg.ops)) + 1))
        assert lines[-1] == "nothing fits\n" and sorted(parse_expression(answer)[1]) == sorted(problem.numbers)


def test_some_puzzles_of_the_corpus_have_no_solution():
    rng, asked = random.Random(0), []
    for _ in range(1000):
        found = re.match(r"User: make (\d+) from (.*)\n", document(DataConfig(), rng)[0])
        if found:
            asked.append(int(found[1]) in data.reachable(tuple(sorted(map(int, re.findall("[0-9]+", found[2])))), DataConfig().ops))
    assert 0.6 < sum(asked) / len(asked) < 0.9


def test_tables_compare_sums_and_hits_are_as_frequent_as_misses():
    rng, cfg, verdicts = random.Random(0), DataConfig(), []
    for _ in range(500):
        a, op, b, c, other, verdict = CHECK.match(data.table_line(cfg, draw_habits(rng), rng)).groups()
        assert parse_expression(f"{a}{op}{b}")[0] == int(c) and (verdict in (" yes", " 对了")) == (c == other)
        verdicts.append(c == other)
    assert 0.4 < sum(verdicts) / 500 < 0.65


def test_both_languages_are_mixed_within_documents():
    mixed = total = 0
    for problem, _, lines, _ in countdown_documents(500):
        text = "".join(lines)
        english, chinese = re.findall("[a-z]+", text), re.findall("[\u4e00-\u9fff]+", text)
        if len(english) + len(chinese) > 3:
            total += 1
            mixed += bool(english) and bool(chinese)
    assert mixed / total > 0.5


def test_going_on_after_a_miss_is_told_from_giving_up():
    assert data.goes_on_after_a_miss("3+2=5 vs 6 no\n3*2=6 vs 6 yes\n")
    assert data.goes_on_after_a_miss("3+2=5 比 7 不对\n3*2=6 vs 7 no\n")
    assert not data.goes_on_after_a_miss("3+2=5 vs 6 no\nI give up\n")
    assert not data.goes_on_after_a_miss("3*2=6 vs 6 yes\n") and not data.goes_on_after_a_miss("")


class Prose:
    def __contains__(self, line):
        """Whether a page of prose may begin so: with a whole sentence."""
        return bool(re.fullmatch(r"\w+ and (\w+: hello \w+ and \w+)|\w+: \w+(, \w+)+|(?P<words>(\w+ )+\w+), again: (?P=words)|\w+ has .+ to \w+ a \w+|(\w+ )+\w+|(very )+(?P<short>\w+ \w+), or (?P=short)", line))


def test_rows_are_packed_with_whole_documents():
    prose = Prose()
    tokens, mask = corpus_batch(DataConfig(), TOK, random.Random(0), rows=8, length=200)
    assert tokens.shape == mask.shape == (8, 200) and mask.float().mean() > 0.85
    for row, kept in zip(tokens, mask):
        ids = row[kept].tolist()
        assert kept.long().diff().max() <= 0 and (row[~kept] == TOK.pad_id).all()
        assert ids[-1] == TOK.end_id
        for part in TOK.decode([i if i != TOK.end_id else 0 for i in ids]).split("\0")[:-1]:
            assert part.startswith("User: ") or STEP.match(part) or part.split("\n")[0] in prose


def test_a_corpus_batch_depends_on_its_generator_alone():
    a, b, c = (corpus_batch(DataConfig(), TOK, random.Random(s), 2, 150)[0] for s in (1, 1, 2))
    assert a.equal(b) and not a.equal(c)
