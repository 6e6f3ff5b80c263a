"""The benchmarks whose figures the README gives as evidence, with tiny settings."""
import json
import shutil

import evidence
import pytest
import rollout
import torch
from results import evidence_rows
from test_train import read, refusal, results, run, weights

import data
import rewards
import sample
from grpo import Sample
from model import Completion, Linear, UserError, generators, load_checkpoint

TOK = data.load_tokenizer()
OTHERS = ["--problems=3", "--threads=1", "--device=cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run(out, "zero")
    return out


def found(out, command, *flags):
    evidence.main([command, f"--out_dir={out}", *OTHERS, *flags])
    return json.loads((out / "evidence" / f"{command}.json").read_text())


# ------------------------------------------------------------------------- other rewards and losses


def shuffled(monkeypatch, totals, ids):
    monkeypatch.setattr(rewards.Environment, "reward",
                        lambda self, samples: (totals, [{"accuracy": t} for t in totals]))
    env = evidence.Shuffled(8, 1, TOK, data.DataConfig(), None, 340)
    return env.reward([Sample([1], i, None, False) for i in ids])


def test_shuffling_keeps_the_rewards_of_each_group_and_changes_who_gets_them(monkeypatch):
    totals, ids = [float(i) for i in range(24)], [[i] for i in range(24)]
    dealt, parts = shuffled(monkeypatch, totals, ids)
    for i in range(0, 24, 8):
        assert sorted(dealt[i:i + 8]) == totals[i:i + 8] and dealt[i:i + 8] != totals[i:i + 8]
    assert [part["accuracy"] for part in parts] == dealt
    assert shuffled(monkeypatch, totals, ids)[0] == dealt  # a resumed run deals the same
    assert shuffled(monkeypatch, totals, ids[::-1])[0] != dealt


def test_a_shuffled_reward_says_nothing_about_its_sample(monkeypatch):
    totals = [1.0, *[0.0] * 7] * 500
    dealt, _ = shuffled(monkeypatch, totals, [[i] for i in range(4000)])
    kept = sum(a * b for a, b in zip(dealt, totals, strict=True)) / 500
    assert abs(kept - 1 / 8) < 0.05


def on_countdown(folder):
    """What eval.json says, but for how it was asked."""
    return {key: value for key, value in results(folder)["countdown"].items() if key != "settings"}


def test_controls_differ_from_zero_in_what_they_say_alone(finished, monkeypatch):
    monkeypatch.setitem(evidence.CONTROLS, "undivided", {})  # nothing: then it must be zero again
    report = found(finished, "alone")
    folder = finished / "evidence"
    assert torch.equal(weights(folder / "undivided" / "zero"), weights(finished / "zero"))
    then = load_checkpoint(str(finished / "zero" / "ckpt.pt"))["settings"]
    for name, setting in (("format_alone", "w_accuracy"), ("accuracy_alone", "w_format")):
        now = load_checkpoint(str(folder / name / "zero" / "ckpt.pt"))["settings"]
        assert {key for key in now if now[key] != then[key]} == {"out_dir", "base", setting}
        assert now[setting] == 0
        assert report[name]["countdown"] == on_countdown(folder / name / "zero")
    assert report["steps"] == report["zero_steps"] == 3
    assert report["base"]["countdown"] == on_countdown(finished / "base")


def test_shuffling_changes_what_is_learnt_and_nothing_before(finished):
    report = found(finished, "shuffle")
    folder = finished / "evidence" / "shuffled" / "zero"
    assert not torch.equal(weights(folder), weights(finished / "zero"))
    first, other = read(folder, "metrics.jsonl")[0], read(finished / "zero", "metrics.jsonl")[0]
    assert first["reward"] == pytest.approx(other["reward"]) and first["length"] == other["length"]
    assert report["shuffled"]["countdown"] == on_countdown(folder)
    [(_, _, figures, holds)] = evidence_rows([{"shuffle": report}])
    assert figures.startswith("0.0 → 0.0, tags ignored 0.0 → 0.0, length") and holds == "yes"


# ------------------------------------------------------------------------------------- many samples


def test_pass_at_k_rises_with_k_and_begins_with_the_mean(finished, monkeypatch):
    monkeypatch.setattr(rewards, "is_right", lambda problem, text: len(text) % 3 == 0)
    monkeypatch.setattr(rewards, "is_right_untagged", lambda problem, text: len(text) % 3 < 2)
    report = found(finished, "passk", "--samples=40")
    assert set(report["pass@k"]["countdown"]) == {"base", "base, tags ignored", "zero"}
    for name, curve in report["pass@k"]["countdown"].items():
        right = report["right"]["countdown"][name]
        assert list(curve) == ["1", "2", "4", "8", "16", "32"] and len(right) == 3
        assert list(curve.values()) == sorted(curve.values())
        assert 0 < curve["1"] < 1 and curve["1"] == pytest.approx(sum(right) / 120)
    points = {"base, tags ignored": {"1": 0.3, "2": 0.5, "4": 0.8, "8": 0.99, "16": 1.0},
              "zero": {"1": 0.9, "2": 0.95, "4": 0.99, "8": 1.0, "16": 1.0}}
    for base_at_4, k, verdict in ((0.8, "8", "yes"), (0.99, "4", "**no**: a (fails in 1 of 1)")):
        points["base, tags ignored"]["4"] = base_at_4
        few, best = evidence_rows([{"passk": {"tasks": ["a"], "pass@k": {"a": points}}}])
        assert few[2:] == [
            f"pass@4 of base {100 * base_at_4:.1f}, of zero 99.0 %; the base is within a point of "
            f"zero from k = {k} on, and ends at 100.0 % (k = 16)", verdict]
        assert best[2:] == ["pass@16 of base 100.0, pass@1 of zero 90.0 %",
                            "**no**: a (fails in 1 of 1)"]


def test_cooler_samples_are_those_of_an_evaluation_at_that_temperature(finished, monkeypatch):
    asked, evaluate = [], sample.evaluate

    def noted(model, tok, problems, k, cfg, temperature):
        asked.append(temperature)
        return evaluate(model, tok, problems, k, cfg, temperature)

    monkeypatch.setattr(sample, "evaluate", noted)
    report = found(finished, "cooler", "--samples=2")
    assert asked == 2 * [1.0, 0.6, 0.3, 0.1, 0.05]
    curves = report["cooler"]["countdown"]
    assert list(curves) == ["base", "base, tags ignored", "zero"]
    curves = {"base": {"1.0": 0.1, "0.05": 0.0}, "zero": {"1.0": 0.9, "0.05": 1.0},
              "base, tags ignored": {"1.0": 0.4, "0.05": 0.95}}
    likely, more = evidence_rows([{"cooler": {"tasks": ["a"], "cooler": {"a": curves}}}])
    assert likely[2:] == ["40.0 → 95.0, tags demanded 10.0 → 0.0", "yes"]
    assert more[2:] == ["zero 90.0, base 95.0 %", "**no**: a (fails in 1 of 1)"]


def test_requests_compares_two_stages_request_by_request(monkeypatch, tmp_path):
    right = {"dev3": [1, 1, 1, 0, 0, 0, 1, 1], "r1": [1, 1, 1, 1, 1, 0, 0, 1]}  # 4 requests x 2

    def evaluate(model, tok, problems, k, cfg, temperature):
        assert (len(problems), k) == (4, 2) and {p.task for p in problems} == {"chat"}
        return {"pass@1": sum(right[model]) / 8}, [{"right": bool(x)} for x in right[model]]

    monkeypatch.setattr(sample, "evaluate", evaluate)
    models = {"zero": "zero", "dev3": "dev3", "r1": "r1"}
    monkeypatch.setattr(evidence, "open_run", lambda *args: (TOK, sample.Config(), models))
    args = evidence.EvidenceConfig(problems=4, samples=2)
    report = evidence.requests(args, {"out_dir": str(tmp_path)}, "")
    chat = report["chat"]
    gains = [0.0, 0.5, 0.5, -0.5]  # by request: mean 1/8, variance 0.6875 / 3
    half = 1.96 * (sum((gain - 1 / 8) ** 2 for gain in gains) / 3 / 4) ** 0.5
    assert chat["gain"] == pytest.approx(1 / 8)
    assert chat["gain_ci"] == pytest.approx([1 / 8 - half, 1 / 8 + half])
    for problems, gain, verdict in ((500, 0.0, "yes"), (4, 0.1, "**no**"), (500, -0.01, "**no**")):
        of = {**chat, "gain": gain, "gain_ci": [gain - 0.02, gain + 0.02]}
        [row] = evidence_rows([{"requests": {**report, "problems": problems, "chat": of}}])
        points = f"{100 * gain - 2:+.1f} to {100 * gain + 2:+.1f}"
        assert row[2] == f"62.5 → 75.0 %, a gain of {points} points"
        assert row[3].startswith(verdict)
    del models["r1"]
    with pytest.raises(UserError, match="no r1"):
        evidence.requests(args, {"out_dir": str(tmp_path)}, "")


def answered(text, truncated=False):
    problem = data.countdown_problem((3, 7, 2), 20)
    prompt = data.prompt_ids(problem, TOK, data.DataConfig())
    return problem, text, Completion(prompt, TOK.encode(text), None, truncated)


def test_a_budget_closes_thinking_and_counts_its_tokens(finished):
    given = {"out_dir": str(finished), "device": "cpu", "threads": 1}
    tok, cfg, models = evidence.open_run(given, ("zero",))
    long = "<think>\n1. 3+7=10\n2. 3*7=21\n</think>\n<answer>(3+7)*2</answer>"
    short = "<think>\n</think>\n<answer>1</answer>"
    endless, silent = "<think>\n" + "7+7=14\n" * 20, "<answer>(3+7)*2</answer>"
    answers = [answered(long), answered(short), answered(endless, True), answered(silent)]
    for budget in (1, 8, 12):
        texts, thought, closed = evidence.think_within(
            models["zero"], tok, answers, budget, cfg, generators(1)[1])
        assert thought == [budget, 1, budget, 0] and closed == [True, False, True, False]
        assert texts[1] == short and texts[3] == silent
        for text, (_, said, completion) in zip(texts[::2], answers[::2], strict=True):
            head = tok.decode(completion.ids[:budget])
            assert said.startswith(head) and text.startswith(head)
            assert text[len(head):].lstrip("\n").startswith("</think>\n<answer>")
    texts, thought, closed = evidence.think_within(
        models["zero"], tok, answers, 200, cfg, generators(1)[1])
    assert texts == [said for _, said, _ in answers] and not any(closed[:2])


def test_budgets_and_votes_end_with_what_an_evaluation_finds(finished, monkeypatch):
    """With the whole budget all is thought that was thought, and one vote is a sample."""
    def verify(problem, text):
        length = len(text.split("</think>")[0].strip())
        return str(length), length % 3 == 0

    monkeypatch.setattr(rewards, "verify", verify)
    report = found(finished, "budget", "--samples=4")
    curve, votes = (report[key]["countdown"]["zero"] for key in ("budget", "cons@k"))
    assert list(curve) == ["8", "12"] and list(votes) == ["1", "2", "4"]
    assert set(report["budget"]["countdown"]) == {"zero"}  # there is no r1
    assert curve["12"] == votes["1"] > 0


def test_votes_are_counted_in_groups_of_one_problem():
    yes, no = ("a", True), ("b", False)
    verdicts = [no, yes, yes, yes, no, no, no, yes]  # four of each of two problems
    assert [evidence.cons(verdicts, 4, n) for n in (1, 2, 4)] == [1 / 2, 1 / 4, 1 / 2]


# ------------------------------------------------------------------------------------- the RL steps


def test_evaluating_on_the_way_changes_nothing(finished, capsys):
    report = found(finished, "steps", "--every=2")
    assert list(report["points"]) == ["0", "2", "3"]
    assert torch.equal(weights(finished / "evidence" / "steps" / "zero"),
                       weights(finished / "zero"))
    assert report["points"]["3"]["countdown"] == on_countdown(finished / "zero")
    for name, value in report["points"]["0"]["countdown"].items():  # on the same three problems
        assert value == pytest.approx(results(finished / "base")["countdown"][name])
    assert list(report["length"]["countdown"]["length"].values()) == [
        point["countdown"]["length"] for point in report["points"].values()]
    assert found(finished, "steps", "--every=2") == report  # all is there already
    shutil.rmtree(finished / "evidence" / "steps" / "2")  # as if a kill had come between
    assert "holds no evaluation" in refusal(
        evidence.main, ["steps", f"--out_dir={finished}", *OTHERS, "--every=2"], capsys)


def test_a_picture_of_two_runs_is_no_wider_than_a_readme(tmp_path):
    pytest.importorskip("matplotlib")
    tasks = ["countdown", "arithmetic", "logic", "code"]
    one = {"tasks": tasks, "pass@k": {task: {"base": {"1": 0.1, "2": 0.2}} for task in tasks}}
    evidence.draw("passk", [one, one], str(tmp_path / "passk.png"))
    assert int.from_bytes((tmp_path / "passk.png").read_bytes()[16:20], "big") <= 900


def test_a_row_says_no_where_one_seed_or_task_fails():
    runs = [{"budget": {"tasks": ["countdown"],
                        "budget": {"countdown": {"zero": {"8": low, "16": high}}}}}
            for low, high in ((0.1, 0.9), (0.5, 0.45))]
    (shown,) = evidence_rows(runs)
    assert shown[2:] == ["8: 30.0, 16: 67.5 %", "**no**: countdown (fails in 1 of 2)"]
    assert evidence_rows(runs[:1])[0][3] == "yes"


# -------------------------------------------------------------------------------------------- speed


def test_sampling_is_timed_beside_whatever_else_is_installed(monkeypatch, capsys):
    monkeypatch.setattr(Linear, "onednn", False)  # the bench sets it; afterwards it is as before
    flags = ["--rounds=1", "--shape=tiny", "--lengths=uneven", "--prompts=2", "--group=2"]
    monkeypatch.setattr("sys.argv", ["rollout.py", *flags])
    rollout.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {line["who"]: line for line in lines if "who" in line}
    assert all(0 < line["share_of_limit"][0] < 1 for line in found.values()) and "ours" in found
    assert ("ctranslate2" in found) != any("skipped" in line for line in lines)
    for name in found.keys() - {"ours"}:
        assert any(f"ours_over_{name}" in line for line in lines)


# ---------------------------------------------------------------- a small base that has read less


def test_impatient_authors_check_and_use_tags_but_give_up_early():
    rng, _ = generators("impatient")
    for task in data.REASONING:
        drawn = [evidence.impatient(rng, task) for _ in range(300)]
        assert max(habits.patience for habits in drawn) < data.ENOUGH[task]
        assert any(habits.checks for habits in drawn) and len({h.layout for h in drawn}) == 4
    assert isinstance(evidence.impatient(rng, "table"), data.Habits)  # nobody is patient there


def test_unread_trains_the_small_models_anew_from_the_runs_r1(monkeypatch, tmp_path):
    out, steps, read_by = tmp_path / "run", ["base", "zero", "dev1", "dev2", "dev3",
                                             "reward_model", "r1"], {}
    for stage in steps:
        (out / stage).mkdir(parents=True)
        for file in ("ckpt.pt", "eval.json"):
            (out / stage / file).write_text(stage)
    monkeypatch.setattr(evidence, "told", lambda given: {"task": "countdown", "seed": 3})
    monkeypatch.setattr(evidence, "results_of", lambda folder, tasks: {t: folder for t in tasks})

    def train(stages, settings):
        assert settings["out_dir"] == str(out / "evidence" / "unread") and settings["seed"] == 3
        copied = out / "evidence" / "unread" / "r1"
        assert (copied / "ckpt.pt").read_text() == (copied / "eval.json").read_text() == "r1"
        assert not (out / "evidence" / "unread" / "small_base").exists()  # not the run's own
        read_by.update(dict.fromkeys(stages, data.draw_habits))

    monkeypatch.setattr(evidence.train, "run_command_line", train)
    report = evidence.unread(None, {"out_dir": str(out)}, "")
    assert read_by["small_base"] is evidence.impatient
    assert read_by["distill"] is read_by["small_zero"] is data.draw_habits
    for stage in ("small_base", "distill", "small_zero"):
        assert report[stage]["countdown"] == str(out / "evidence" / "unread" / stage)


def test_unread_holds_only_where_the_intervals_are_apart():
    def report(distill, small_zero):
        return {"tasks": ["code"],
                "distill": {"code": {"pass@1": sum(distill) / 2, "pass@1_ci": distill}},
                "small_zero": {"code": {"pass@1": sum(small_zero) / 2, "pass@1_ci": small_zero}}}

    for of, holds in ((report((0.5, 0.6), (0.3, 0.4)), "yes"),
                      (report((0.5, 0.6), (0.3, 0.5)), "**no**: code (fails in 1 of 1)")):
        [(_, _, figures, held)] = evidence_rows([{"unread": of}])
        assert held == holds and figures.startswith("distill 55.0 (50.0–60.0), small_zero")
