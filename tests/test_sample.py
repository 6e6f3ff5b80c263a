"""What asks a model and takes no gradient: evaluation, rejection sampling, win rates, and the
command line of sample.py."""
import itertools
import json
import random
from dataclasses import asdict, fields

import pytest
import torch
from test_train import command, read, refusal, results, run

import data
import rewards
import sample
import train
from model import (
    GPT,
    Completion,
    GPTConfig,
    UserError,
    save_checkpoint,
    save_pretrained,
    validate,
)

ADD = data.countdown_problem((3, 7), 10)
TIMES = data.countdown_problem((9, 8), 72)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run(out, "zero")
    return out


def says(monkeypatch, texts, truncated=()):
    """The model will say these texts, one per sample, with no end token; those whose index is in
    `truncated` count as cut off."""
    tok, left = data.load_tokenizer(), list(enumerate(texts))

    def generate(model, prompts, k, *others):
        said = [left.pop(0) for _ in range(len(prompts) * k)]
        return [Completion(prompts[n // k], tok.encode(text), None, i in truncated)
                for n, (i, text) in enumerate(said)]

    monkeypatch.setattr(sample, "generate", generate)
    return tok


# --------------------------------------------------------------------------------------- evaluation


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 1), (7, 3, 7)]:
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        share = sum(map(any, subsets)) / len(subsets)
        assert sample.pass_at_k(n, c, k) == pytest.approx(share)


def test_right_answers_vote_together_however_they_are_written():
    puzzle, half = data.countdown_problem((2, 3, 7), 12), data.Problem("file", "q", (), "1/2")
    for problem, right, wrong in ((puzzle, ("2+3+7", "3+7+2", "7+2+3"), "2*7-3"),
                                  (half, ("50%", "0.5", "1/2"), "1/3")):
        texts = [f"<answer>{text}</answer>" for text in (wrong, wrong, *right)]
        assert sample.majority_vote([rewards.verify(problem, text) for text in texts])


def test_what_differs_from_the_right_answer_only_at_its_end_does_not_vote_for_it():
    words = "so " * 60
    problem = data.Problem("file", "q", (), words + "right")
    texts = [f"<answer>{words}{end}</answer>" for end in ("wrong", "right", "right", "wrong two")]
    # Nor do two that are wrong in different ways vote together: of a tie the first counts.
    for order, vote in (([0, 1, 2], True), ([1, 2, 0], True), ([1, 0, 3], True),
                        ([0, 1, 3], False)):
        said = [rewards.verify(problem, texts[i]) for i in order]
        assert sample.majority_vote(said) == vote


def test_a_majority_votes_over_answers_and_the_first_wins_a_tie():
    right, wrong, none = ("a", True), ("b", False), (None, False)
    vote = sample.majority_vote
    assert vote([wrong, right, right]) and not vote([wrong, right, wrong])
    assert vote([right, wrong]) and not vote([wrong, right])
    assert vote([none, none, none, right]) and not vote([none]) and not vote([])


def test_evaluation_counts_what_it_says(monkeypatch):
    """Four samples of each of two problems with known verdicts."""
    texts = ["<think>\n</think>\n<answer>3+7</answer>", "<answer>7+3</answer>",
             "<answer>7*3</answer>", "no",  # vote: 3+7, right
             "<answer>9-8</answer>", "<answer>9-8</answer>",
             "<answer>8*9</answer>", "不"]  # vote: 9-8, wrong
    tok, cfg = says(monkeypatch, texts, truncated=[7]), sample.Config()
    metrics, samples = sample.evaluate(None, tok, [ADD, TIMES], 4, cfg, 1.0)
    assert metrics["pass@1"] == 3 / 8 and metrics["pass@4"] == 1.0 and metrics["cons@4"] == 0.5
    half = 1.96 * torch.tensor([0.5, 0.25]).std().item() / 2 ** 0.5
    assert metrics["pass@1_ci"] == pytest.approx([3 / 8 - half, 3 / 8 + half])
    assert metrics["format"] == 1 / 8 and metrics["truncated"] == 1 / 8
    assert metrics["one_language"] == 7 / 8 and metrics["thinks"] == 0
    assert metrics["length"] == sum(len(tok.encode(text)) for text in texts) / 8
    assert (metrics["problems"], metrics["samples"], metrics["temperature"]) == (2, 4, 1.0)
    assert [s["completion"] for s in samples] == texts
    assert [s["right"] for s in samples] == [True, True, False, False, False, False, True, False]
    assert [s["prompt"] for s in samples] == [ADD.prompt] * 4 + [TIMES.prompt] * 4
    assert samples[0]["answer"] == samples[1]["answer"] and samples[3]["answer"] is None


def test_an_answer_without_tags_is_right_but_for_its_tags(monkeypatch):
    texts = ["answer: 3+7", "3*7=21 no\nI give up\n答案: 7+3",
             "<think>\nhm\n</think>\nanswer: 3+7",
             "answer: 3*7\nanswer: 3+7", "<think>\n</think>\n<answer>3+7</answer>",
             "answer: 3*7", "answer: 3+7=10", "<answer>3*7</answer>", "<answer>3+7", ""]
    tok = says(monkeypatch, texts)
    metrics, samples = sample.evaluate(None, tok, [ADD], 10, sample.Config(), 1.0)
    assert [s.get("pass@1_untagged") for s in samples] == [True] * 5 + [False] * 5
    assert metrics["pass@1_untagged"] == 0.5 and metrics["pass@1"] == 0.1


def test_the_main_task_is_sampled_at_both_temperatures_and_greedily_and_others_once(
        monkeypatch, tmp_path):
    asked = []
    (tmp_path / "all").mkdir()

    def evaluate(model, tok, problems, k, cfg, temperature):
        asked.append((problems[0].task, len(problems), k, temperature))
        return {"pass@1": len(asked), "temperature": temperature}, []

    monkeypatch.setattr(sample, "evaluate", evaluate)
    cfg = sample.Config.of({"eval_problems": 20, "eval_samples": 3, "temperature": 0.9,
                            "out_dir": str(tmp_path)})
    sample.evaluate_tasks(GPT(GPTConfig(n_layer=1, n_embd=16, n_head=2, head_dim=8)),
                          data.load_tokenizer(), cfg, str(tmp_path))
    main = [ask[1:] for ask in asked if ask[0] == "countdown"]
    assert main == [(20, 3, 0.9), (20, 4, 0.6), (20, 1, 0.0)]
    assert results(tmp_path)["countdown"] == {
        "pass@1": 1, "temperature": 0.9, "pass@1_T=0.6": 2, "pass@1_greedy": 3,
        "settings": {"eval_problems": 20, "eval_samples": 3, "temperature": 0.9}}
    others = [ask for ask in asked if ask[0] != "countdown"]
    assert {ask[0] for ask in others} == set(data.TASKS) - {"countdown", "file"}
    assert [ask[1:] for ask in others] == [(1, 3, 0.9)] * 5  # a twentieth as many

    # With all tasks general requests count; of many problems one sample at 0.6 is enough.
    asked.clear()
    cfg = sample.Config.of({"task": "all", "eval_problems": 200, "eval_samples": 3})
    sample.evaluate_tasks(GPT(GPTConfig(n_layer=1, n_embd=16, n_head=2, head_dim=8)),
                          data.load_tokenizer(), cfg, str(tmp_path / "all"))
    logic = [ask[1:] for ask in asked if ask[0] == "logic"]
    assert logic == [(200, 3, 1.0), (200, 2, 0.6), (200, 1, 0.0)]
    requests = {ask[0]: ask[1:] for ask in asked if ask[0] in data.GENERAL}
    assert requests == {"chat": (100, 3, 1.0), "unsafe": (84, 3, 1.0)}  # no more exist

    # And so they do for models that have learnt from such.
    asked.clear()
    (tmp_path / "r1").mkdir()
    cfg = sample.Config.of({"eval_problems": 200, "eval_samples": 3})
    sample.evaluate_tasks(GPT(GPTConfig(n_layer=1, n_embd=16, n_head=2, head_dim=8)),
                          data.load_tokenizer(), cfg, str(tmp_path / "r1"), requests=True)
    beside = {ask[0]: ask[1] for ask in asked if ask[0] != "countdown"}
    assert beside == {"arithmetic": 10, "logic": 10, "code": 10, "chat": 100, "unsafe": 84}


@pytest.mark.parametrize("capability, bf16", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_auto_is_bfloat16_on_gpus_that_compute_in_it(monkeypatch, capability, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert sample.use_bf16("auto", gpu) == bf16 and not sample.use_bf16("auto", cpu)
    assert sample.use_bf16("bfloat16", gpu) and not sample.use_bf16("float32", gpu)


def test_thinking_and_second_attempts_are_counted(monkeypatch):
    misses = "<think>\n3-7=4 vs 10 no\n3+7=10 vs 10 yes\n</think>\n<answer>3+7</answer>"
    gives_up = "<think>\n3*7=21 vs 10 no\nI give up\n</think>\n<answer>3*7</answer>"
    tok = says(monkeypatch, [misses, gives_up])
    metrics, samples = sample.evaluate(None, tok, [ADD], 2, sample.Config(), 1.0)
    assert metrics["thinks"] == 1 and metrics["retry_rate"] == 0.5 and metrics["pass@1"] == 0.5
    assert [s["retry_rate"] for s in samples] == [True, False]
    assert metrics["pass@1_ci"] == [0, 1]  # one problem says nothing about others


@pytest.mark.parametrize("text, sure", [("<answer>3+7</answer>", 1), ("<answer>3</answer>", 0)])
def test_what_is_always_right_or_always_wrong_still_leaves_doubt(monkeypatch, text, sure):
    problems = [data.countdown_problem((3, 7), 10) for _ in range(20)]
    monkeypatch.setattr(data, "without_names", id)  # 20 problems, not one
    tok = says(monkeypatch, [text] * 40)
    metrics, _ = sample.evaluate(None, tok, problems, 2, sample.Config(), 1.0)
    # With a chance of 1 - x, 20 are all alike with probability x ** 20 = 2.5 %.
    assert metrics["pass@1"] == sure
    doubt = 1 - 0.025 ** (1 / 20)
    assert metrics["pass@1_ci"] == pytest.approx([1 - doubt, 1] if sure else [0, doubt])


def test_problems_that_are_all_half_right_still_leave_doubt(monkeypatch):
    problems = [data.countdown_problem((3, 7), 10) for _ in range(20)]
    monkeypatch.setattr(data, "without_names", id)  # 20 problems, not one
    tok = says(monkeypatch, ["<answer>3+7</answer>", "<answer>3</answer>"] * 20)
    metrics, _ = sample.evaluate(None, tok, problems, 2, sample.Config(), 1.0)
    half = 1.96 * (0.25 / 20) ** 0.5
    assert metrics["pass@1_ci"] == pytest.approx([0.5 - half, 0.5 + half])


def test_logic_puzzles_that_differ_in_names_alone_count_as_one(monkeypatch):
    told = [data.Problem("logic", question, (), "A") for question in (
        "A says B lies, B says A and C lie, C says B is honest: who lies",
        "B says F is honest, D says F lies, F says B and D lie: who lies",  # the same one
        "A says B lies, B says A or C lies, C says B is honest: who lies")]
    texts = ["<answer>A</answer>", "<answer>A</answer>", "<answer>B</answer>"]
    tok, cfg = says(monkeypatch, texts), sample.Config()
    metrics, _ = sample.evaluate(None, tok, told, 1, cfg, 1.0)
    # Of the deviations 1/3, 1/3 and -2/3 from the mean the first two are one puzzle's.
    half = 1.96 * ((4 / 9 + 4 / 9) * 2) ** 0.5 / 3
    assert metrics["pass@1_ci"] == pytest.approx([max(0, 2 / 3 - half), min(1, 2 / 3 + half)])
    assert data.without_names(told[0]) == data.without_names(told[1])
    assert data.without_names(told[0]) != data.without_names(told[2])
    held_out = data.eval_problems(data.DataConfig(task="logic"), 100, "logic")
    assert len({data.without_names(problem) for problem in held_out}) == 14
    assert data.without_names(ADD) == ADD.question


def test_general_requests_are_judged_by_gold_reward(monkeypatch):
    problem = data.Problem("chat", "repeat dog cat", (), "dog cat")
    tok = says(monkeypatch, ["<answer>of course, dog cat</answer>", "dog cat"])
    metrics, samples = sample.evaluate(None, tok, [problem], 2, sample.Config(), 1.0)
    assert [s["gold_reward"] for s in samples] == [3, -2] and metrics["gold_reward"] == 0.5
    says(monkeypatch, ["7"])
    metrics, _ = sample.evaluate(None, tok, [ADD], 1, sample.Config(), 1.0)
    assert "gold_reward" not in metrics


def test_evaluation_draws_the_same_samples_every_time():
    torch.manual_seed(0)
    tok = data.load_tokenizer()
    model = GPT(GPTConfig(vocab_size=tok.n_vocab, n_layer=1, n_embd=16, n_head=2, head_dim=8))
    cfg = sample.Config.of({"max_new_tokens": 8})
    problems = data.eval_problems(cfg.data, 40)  # more than go into one batch

    def texts(temperature):
        _, samples = sample.evaluate(model, tok, problems, 2, cfg, temperature)
        return [s["completion"] for s in samples]

    assert texts(1.0) == texts(1.0) != texts(0.5)
    greedy = texts(0.0)
    assert greedy[0::2] == greedy[1::2]


def test_eval_writes_beside_the_checkpoint(finished, tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes((finished / "zero" / "ckpt.pt").read_bytes())
    flags = ["--eval_problems=2", "--eval_samples=2", "--max_new_tokens=12"]
    train.main(["eval", f"--ckpt={tmp_path / 'ckpt.pt'}", "--task=arithmetic", *flags])
    assert results(tmp_path)["arithmetic"]["problems"] == 2
    assert "arithmetic: 2 held-out problems, 2 samples of each" in capsys.readouterr().out
    tasks = [line["task"] for line in read(tmp_path, "samples.jsonl")]
    assert tasks[:4] == ["arithmetic"] * 4 and set(tasks) == set(data.TASKS) - {"file"}


def test_what_was_evaluated_before_stays_in_the_results(finished, tmp_path):
    before = {"pass@1": 0.5, "samples": 1, "problems": 2}
    (tmp_path / "eval.json").write_text(json.dumps({"file": before}))
    _, model, tok, cfg = sample.open_checkpoint({}, str(finished / "zero" / "ckpt.pt"))
    sample.evaluate_tasks(model, tok, cfg, str(tmp_path))
    assert results(tmp_path)["file"] == before
    assert results(tmp_path)["countdown"] == results(finished / "zero")["countdown"]


def test_another_file_or_task_is_evaluated_in_place_of_that_of_training(finished, tmp_path):
    def written(name):
        rows = [{"question": f"{name} {i}", "answer": i} for i in range(40)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    state = torch.load(finished / "zero" / "ckpt.pt", weights_only=True)
    state["settings"] |= {"task": "file", "data": written("a"), "eval_data": written("b")}
    torch.save(state, tmp_path / "ckpt.pt")
    flags = ["--eval_samples=1", "--max_new_tokens=4", f"--ckpt={tmp_path / 'ckpt.pt'}"]
    for argv, asked in (([], "b"), ([f"--data={written('c')}"], "c"),
                        ([f"--eval_data={written('d')}"], "d"), (["--task=logic"], "A says")):
        train.main(["eval", *flags, "--eval_problems=3", *argv])
        found = read(tmp_path, "samples.jsonl")
        assert found[0]["prompt"].startswith((f"User: {asked}", asked, "User: B says")), asked
    assert "file" in {line["task"] for line in found}  # what was asked before is kept


def test_a_folder_is_not_evaluated_over_a_base_that_was_trained(finished, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "ckpt.pt").write_bytes((finished / "base" / "ckpt.pt").read_bytes())
    train.main(["export", f"--ckpt={finished / 'zero' / 'ckpt.pt'}", f"--export_dir={tmp_path}/hf"])
    argv = ["eval", f"--init_from={tmp_path}/hf", "--template=toy", f"--out_dir={tmp_path}"]
    assert "another --out_dir" in refusal(train.main, argv, capsys)
    assert not (tmp_path / "base" / "eval.json").exists()


# ------------------------------------------------------------------------------- rejection sampling


def no_x(problem, text):
    return "x" not in text


def short(problem, text):
    return len(text) < 3


def length(problem, text):
    return len(text)


def test_rejection_sampling_keeps_the_first_that_passes_every_filter():
    filters = {"no x": no_x, "short": short}
    texts = [["x", "aaa", "a", "b"], ["xx", "x", "x", "aaa"], ["b", "a", "x", "x"]]
    rows, passed = sample.rejection_sample([1, 2, 3], texts, filters)
    assert rows == [(1, "a"), (3, "b")]
    assert list(passed.items()) == [("no x", 3 + 1 + 2), ("short", 2 + 0 + 2)]


def of_task(*tasks):
    return [data.Problem(task, f"number {i}", (), "") for i, task in enumerate(tasks)]


def test_with_a_rank_it_keeps_the_highest_and_then_the_better_half():
    texts = [["a", "bb"], ["c", "d"], ["ee", "fff"], ["g"], ["x"]]
    asked = of_task(*5 * ["code"])
    rows, passed = sample.rejection_sample(asked, texts, {"no x": no_x}, length)
    assert rows == [(asked[2], "fff"), (asked[0], "bb")] and passed["no x"] == 7  # of four, two


def test_the_better_half_is_taken_of_each_task_by_itself():
    asked = of_task("logic", "code", "logic", "code")
    rows, _ = sample.rejection_sample(asked, [["aaaa"], ["b"], ["ccc"], ["dd"]], {}, length)
    assert rows == [(asked[0], "aaaa"), (asked[3], "dd")]


def test_of_equal_ranks_the_earlier_sample_and_problem_are_kept():
    asked = of_task(*3 * ["code"])
    rows, _ = sample.rejection_sample(asked, [["a", "b"], ["c", "d"], ["e", "f"]], {}, length)
    assert rows == [(asked[0], "a"), (asked[1], "c")]  # half of three is two


def test_if_nothing_passes_there_are_no_rows():
    nothing = of_task("code"), [["x"]], {"no x": no_x}
    assert sample.rejection_sample(*nothing) == ([], {"no x": 0})
    assert sample.rejection_sample(*nothing, length)[0] == []


# ---------------------------------------------------------------------------------------- win rates


def chats(golds):
    return [{"task": "chat", "prompt": f"q{i}", "completion": str(gold), "gold_reward": gold}
            for i, gold in enumerate(golds)]


def test_an_answer_is_compared_with_dev3s_to_the_same_request(tmp_path, monkeypatch):
    class Judge:
        """Prefers what gold reward does not."""
        def score(self, tok, prompts, texts):  # and rounds, so that the same text never ties
            return [1e-6 * random.random() - float(text) for text in texts]

    (tmp_path / "reward_model").mkdir()
    (tmp_path / "reward_model" / "ckpt.pt").write_text("")
    theirs = [{"task": "countdown", "prompt": "make"}, *chats([1, 2, 3, 4])]
    sample.write_lines(str(tmp_path / "dev3" / "samples.jsonl"), theirs)
    monkeypatch.setattr(sample, "load_model", lambda path, **others: Judge())

    def win_rates(samples, folder=tmp_path):
        return sample.win_rates(samples, None, str(folder))

    mine = [{"task": "countdown", "prompt": "make"}, *chats([2, 2, 4, 3])]
    rates = {"gold": 2 / 3, "reward_model": 1 / 3, "differ": 3 / 4}
    assert win_rates(mine) == {"win_rate": rates}
    mine[1] |= {"gold_reward": 1}  # other words, as good
    assert win_rates(mine)["win_rate"]["gold"] == 1.5 / 3
    same = {"gold": 0.5, "reward_model": 0.5, "differ": 0.0}
    assert win_rates(theirs) == {"win_rate": same}
    assert win_rates(chats([1, 2])) == {} == win_rates([])  # other requests, or none
    assert win_rates(mine, tmp_path / "elsewhere") == {}  # no dev3 there
    (tmp_path / "reward_model" / "ckpt.pt").unlink()
    assert win_rates(mine) == {}


# ------------------------------------------------------------------------- settings and checkpoints


def test_settings_reach_their_group_and_others_are_left_out():
    cfg = sample.Config.of({"task": "logic", "w_format": 2.0, "group_size": 3, "seed": 7, "x": 1})
    assert (cfg.data.task, cfg.rewards.w_format) == ("logic", 2.0)
    assert (cfg.grpo.group_size, cfg.sample.seed) == (3, 7)
    assert sample.Config.of(cfg.settings()) == cfg and "x" not in cfg.settings()


def test_no_two_groups_have_a_setting_of_the_same_name():
    names = [name for group in asdict(train.Config()).values() for name in group]
    assert len(set(names)) == len(names)


def test_every_setting_that_is_out_of_bounds_is_refused_by_name():
    for group in fields(train.Config):
        cls = group.default_factory
        validate(cls())
        for f in fields(cls):
            for word, step in (("least", -1), ("most", 1), ("above", 0)):
                bound = f.metadata[word]
                if bound is not None:
                    with pytest.raises(UserError, match=f.name):
                        validate(cls(**{f.name: bound + step}))
            if f.metadata["choices"]:
                with pytest.raises(UserError, match=f.name):
                    validate(cls(**{f.name: "nonsense"}))


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch):
    assert sample.find_device("cpu").type == "cpu"
    for name in ("abacus", "cuda:x", "cpu:1", "cuda:99", ""):
        with pytest.raises(UserError, match=f"device='{name}'"):
            sample.find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert sample.find_device("auto") == torch.device("cuda")
    assert sample.find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="cuda:2.*finds 2 GPUs"):
        sample.find_device("cuda:2")


def test_bfloat16_is_automatic_on_a_gpu_alone():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [sample.use_bf16("auto", device) for device in (cpu, cuda)] == [False, True]
    for setting in ("on", "bfloat16"):
        assert sample.use_bf16(setting, cpu)
    for setting in ("off", "float32"):
        assert not sample.use_bf16(setting, cuda)


def test_a_checkpoint_opens_with_its_own_settings_unless_others_are_given(finished):
    path = str(finished / "zero" / "ckpt.pt")
    for given, where in (({"ckpt": path}, ""), ({}, path), ({"out_dir": str(finished)}, "")):
        opened, _, _, cfg = sample.open_checkpoint(given, where)
        assert opened == path and cfg.grpo.max_new_tokens == 12
    given = {"ckpt": path, "max_new_tokens": 5}
    assert sample.open_checkpoint(given)[3].grpo.max_new_tokens == 5
    with pytest.raises(UserError, match="max_new_tokens"):
        sample.open_checkpoint({**given, "max_new_tokens": 0})


def test_a_checkpoint_trained_on_another_machine_opens_on_this_one(finished, tmp_path):
    state = torch.load(finished / "zero" / "ckpt.pt", weights_only=True)
    state["settings"] |= {"device": "cuda:7", "threads": 64}
    torch.save(state, tmp_path / "ckpt.pt")
    cfg = sample.open_checkpoint({}, str(tmp_path / "ckpt.pt"))[3]
    assert (cfg.sample.device, cfg.sample.threads) == ("auto", 0)


def test_a_reward_model_gives_no_answers(tmp_path):
    model = rewards.RewardModel(GPTConfig(n_layer=1, n_embd=16, n_head=2, head_dim=8))
    path = str(tmp_path / "ckpt.pt")
    save_checkpoint(path, {"stage": "reward_model", "model": model.state_dict(),
                           "model_config": asdict(model.cfg)})
    with pytest.raises(UserError, match="reward model"):
        sample.open_checkpoint({}, path)


# --------------------------------------------------------------------------------- the command line


def ask(finished, capsys, *argv):
    """What sample.py prints about the checkpoint of zero."""
    capsys.readouterr()
    sample.main([f"--ckpt={finished / 'zero' / 'ckpt.pt'}", "--max_new_tokens=12", *argv])
    return capsys.readouterr().out


def test_sample_shows_thinking_answer_and_score(finished):
    done = command(f"--ckpt={finished / 'zero' / 'ckpt.pt'}", "--numbers=3,7,2", "--target=20",
                   "--max_new_tokens=12", "--n=2", script="sample.py")
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.count("make 20 from 2, 3 and 7") == 2
    assert done.stdout.count("accuracy 0") == done.stdout.count("scores") == 2


def test_the_same_seed_shows_the_same_samples(finished, capsys):
    assert ask(finished, capsys) == ask(finished, capsys) != ask(finished, capsys, "--seed=2")
    assert ask(finished, capsys).count("--- make") == 4


def test_another_task_can_be_asked(finished, capsys):
    shown = ask(finished, capsys, "--task=arithmetic", "--n=2", "--temperature=0")
    assert shown.count("--- what is") == 2


def test_what_needs_no_problems_of_a_file_works_without_it(finished, tmp_path, capsys):
    state = torch.load(finished / "zero" / "ckpt.pt", weights_only=True)
    state["settings"] |= {"task": "file", "data": str(tmp_path / "moved.jsonl"), "mix": "file:1",
                          "eval_data": str(tmp_path / "moved too.jsonl")}
    ckpt = f"--ckpt={tmp_path / 'ckpt.pt'}"
    torch.save(state, tmp_path / "ckpt.pt")
    for argv in (["--numbers=3,7", "--target=10"], ["--task=logic"]):
        sample.main([ckpt, *argv, "--n=1", "--max_new_tokens=4"])
    train.main(["export", ckpt, f"--export_dir={tmp_path / 'hf'}"])
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert "moved.jsonl" in refusal(sample.main, [ckpt], capsys)


def test_two_checkpoints_are_shown_side_by_side(finished, capsys):
    shown = ask(finished, capsys, f"--vs={finished / 'base' / 'ckpt.pt'}", "--n=2")
    assert shown.count("--- make") == 2 and shown.count("accuracy 0") == 4
    assert "\033" not in shown  # no colours where nobody looks
    first = shown.splitlines()[0].split()
    assert first[0].endswith("zero/ckpt.pt") and first[1].endswith("base/ckpt.pt")


def test_checkpoints_of_different_tasks_are_not_shown_side_by_side(finished, tmp_path, capsys):
    state = torch.load(finished / "zero" / "ckpt.pt", weights_only=True)
    state["settings"]["task"] = "logic"
    torch.save(state, tmp_path / "ckpt.pt")
    argv = [f"--ckpt={finished / 'zero' / 'ckpt.pt'}", f"--vs={tmp_path / 'ckpt.pt'}"]
    assert "trained on different problems" in refusal(sample.main, argv, capsys)
    sample.main([*argv, "--task=logic", "--max_new_tokens=4"])


def test_a_question_can_be_asked(finished, capsys):
    shown = ask(finished, capsys, "--question=what is 1+2", "--n=2")
    assert shown.count("--- what is 1+2") == 2 and "format 0" in shown and "accuracy" not in shown


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("hf"))
    train.main(["export", f"--ckpt={finished / 'zero' / 'ckpt.pt'}", f"--export_dir={folder}"])
    return folder


def test_a_folder_is_asked_like_a_checkpoint_and_shown_beside_one(finished, exported, capsys):
    asked = ask(finished, capsys, "--n=2", "--temperature=0", f"--vs={exported}")
    assert asked.count("--- make") == 2 and asked.count("accuracy 0") == 4  # two beside two
    sample.main([f"--init_from={exported}", "--template=toy", "--question=make 3 from 1 and 2",
                 "--max_new_tokens=5"])
    assert capsys.readouterr().out.count("--- make 3") == 4


def test_beside_a_folder_a_checkpoint_keeps_its_own_tokenizer(finished, exported, monkeypatch):
    opened, asked, own = [], [], data.load_tokenizer
    monkeypatch.setattr(data, "load_tokenizer", lambda name="": opened.append(name) or own(name))
    answer = sample.sample_answers
    monkeypatch.setattr(sample, "sample_answers", lambda *args: asked.append(args[4]) or
                        answer(*args))
    sample.main([f"--init_from={exported}", f"--vs={finished / 'zero' / 'ckpt.pt'}", "--n=1"])
    assert opened == [exported, "", exported]  # first to see whether it is there
    ours, folders = asked  # the folder is put the same question, as the checkpoint was
    assert ours.data == folders.data and ours.data.template == "toy"
    assert ours.grpo.max_new_tokens == folders.grpo.max_new_tokens
    asked.clear()
    sample.main([f"--ckpt={finished / 'zero' / 'ckpt.pt'}", f"--vs={exported}", "--n=1"])
    assert [cfg.sample.init_from for cfg in asked] == ["", exported]


def test_a_toy_checkpoint_is_not_read_with_the_tokenizer_of_a_folder(finished, exported, tmp_path,
                                                                     capsys):
    both = [f"--ckpt={finished / 'zero' / 'ckpt.pt'}", f"--init_from={exported}"]
    for main, argv in ((sample.main, both), (train.main, ["eval", *both]),
                       (train.main, ["export", *both, f"--export_dir={tmp_path / 'x'}"])):
        assert "was not trained from a folder" in refusal(main, argv, capsys)
    assert not (tmp_path / "x").exists()


def test_a_folder_has_room_for_what_is_asked_and_an_embedding_for_every_token(tmp_path, capsys):
    tok, shape = data.load_tokenizer(), {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_kv_head": 1,
                                         "head_dim": 8, "mlp_dim": 16, "context": 4096}
    for name, size in (("whole", tok.n_vocab), ("small", tok.n_vocab - 3)):
        save_pretrained(GPT(GPTConfig(vocab_size=size, **shape)), str(tmp_path / name))
        tok.save(str(tmp_path / name))
    given = {"init_from": str(tmp_path / "whole")}
    for flags, context in (({}, 2048), ({"max_new_tokens": 2100}, 2612), ({"context": 3000}, 3000)):
        assert sample.open_checkpoint({**given, **flags})[1].cfg.context == context
    err = refusal(sample.main, [f"--init_from={tmp_path / 'small'}", "--question=hi"], capsys)
    assert f"the tokenizer has {tok.n_vocab} ids" in err


def test_the_name_of_a_model_is_no_folder(capsys):
    named = "--init_from=Qwen/Qwen2.5-0.5B-Instruct"
    for main, argv in ((sample.main, [named]), (train.main, ["eval", named])):
        err = refusal(main, argv, capsys)
        assert "no such local folder" in err and "hf download Qwen/Qwen2.5-0.5B-Instruct" in err


def test_a_model_with_merged_adapters_is_asked_in_fp32_unless_told_otherwise(finished, tmp_path):
    state = torch.load(finished / "zero" / "ckpt.pt", weights_only=True)
    state["settings"] |= {"lora_rank": 4, "sample_dtype": "bfloat16"}
    torch.save(state, tmp_path / "ckpt.pt")
    for given, want in (({}, torch.float32), ({"sample_dtype": "bfloat16"}, torch.bfloat16)):
        *_, cfg = sample.open_checkpoint(given, str(tmp_path / "ckpt.pt"))
        assert sample.sampling_dtype(cfg.sample) == want


def test_right_completions_become_traces(finished, tmp_path, monkeypatch, capsys):
    path, right = tmp_path / "traces.jsonl", []

    def answers(model, tok, problems, k, cfg, *others):
        assert not any(p.held_out for p in problems) and (len(problems), k) == (5, 4)
        assert len({p.key for p in problems}) == 5
        texts = "<answer>{0}</answer>", "<answer>{1}</answer>", "<answer>{0}</answer>", "\n"
        return [(p, text.format(p.target, p.target + 1), Completion([], [], None, i == 2))
                for p in problems for i, text in enumerate(texts)]  # right, wrong, cut, blank

    monkeypatch.setattr(sample, "sample_answers", answers)
    flags = ["--task=arithmetic", "--n=4", "--problems=5", f"--to={path}"]
    assert "10 of 20" in ask(finished, capsys, *flags)
    assert "5 of 20" in ask(finished, capsys, *flags, "--only_right")
    tok, cfg = data.load_tokenizer(), data.DataConfig(task="arithmetic")
    for prompt, said in data.read_traces(str(path), tok, cfg):
        question, answer = tok.decode(prompt), tok.decode(said)
        asked = question.split("what is ")[1].split("\n")[0]
        right.append(rewards.parse_expression(asked)[0] == int(answer[8:-9]))
    assert right == [True] * 5
    kept = path.read_bytes()
    monkeypatch.setattr(rewards, "is_right", lambda problem, text: False)
    ckpt = f"--ckpt={finished / 'zero' / 'ckpt.pt'}"
    assert "left as it is" in refusal(sample.main, [ckpt, *flags, "--only_right"], capsys)
    assert path.read_bytes() == kept
    assert "--to" in refusal(sample.main, [ckpt, "--only_right"], capsys)
    assert "--problems needs --to" in refusal(sample.main, [ckpt, "--problems=9"], capsys)
    argv = ["--question=why?", "--numbers=3,7,2", "--target=20"]
    assert "two problems" in refusal(sample.main, argv, capsys)


def test_a_question_cannot_control_the_terminal(finished, capsys):
    ckpt = f"--ckpt={finished / 'zero' / 'ckpt.pt'}"
    sample.main([ckpt, "--question=why\x1b[2J", "--n=1", "--max_new_tokens=3"])
    out = capsys.readouterr().out
    assert "--- why\ufffd[2J" in out and "\x1b" not in out


def test_an_interrupt_without_words_says_what_is_left(capsys):
    with pytest.raises(SystemExit) as e, sample.one_line_errors("sample.py"):
        raise KeyboardInterrupt
    assert e.value.code == 130 and "what is saved stays" in capsys.readouterr().err


def test_a_win_rate_that_cannot_be_had_again_goes(finished, tmp_path):
    zero = finished / "zero"
    (tmp_path / "ckpt.pt").write_bytes((zero / "ckpt.pt").read_bytes())
    of_a_file = {"pass@1": 0.5, "samples": 1, "problems": 2}
    before = {"win_rate": {"gold": 0.9}, "file": of_a_file}
    sample.write_json(str(tmp_path / "eval.json"), before)
    flags = ["--eval_problems=2", "--eval_samples=2", "--max_new_tokens=12"]
    train.main(["eval", f"--ckpt={tmp_path / 'ckpt.pt'}", f"--out_dir={tmp_path}", *flags])
    assert "win_rate" not in results(tmp_path) and "file" in results(tmp_path)


def test_a_question_is_taken_as_it_stands():
    given = sample.Parser("sample.py", "", sample.GROUPS).parse_args(["--question=~/notes"])
    assert given.question == "~/notes"


def test_what_a_model_says_cannot_control_the_terminal():
    text = "<think>\033[2J\r\x07</think><answer>3+7</answer>"
    shown = "".join(line for _, line in sample.render(ADD, text))
    assert "\033" not in shown and "\r" not in shown and "\x07" not in shown and "3+7" in shown
    spaced = "<think>a</think><answer>3\t+\u00a07</answer>"  # is judged as RL judged it
    assert sample.render(ADD, spaced, ["accuracy"])[-1][1].strip() == "accuracy 1"


def test_thinking_is_dim_and_an_answer_green_or_red():
    for answer, style in (("3+7", "right"), ("3*7", "wrong")):
        text = f"<think>\nhm\n</think>\n<answer>{answer}</answer>"
        assert sample.render(ADD, text, ["accuracy", "format"]) == [
            ("plain", "thinking"), ("dim", "    hm"), ("plain", "answer"), (style, f"    {answer}"),
            ("plain", "scores"), ("plain", f"    accuracy {int(style == 'right')}  format 1")]
    assert ("dim", "    (none)") in sample.render(ADD, "<think>\n</think>\n<answer>3+7</answer>")
    assert sample.render(ADD, "a\nb")[:2] == [("plain", "a"), ("plain", "b")]
    assert sample.render(ADD, "")[0] == ("plain", "(nothing)")


def test_only_rewards_that_judge_a_problem_are_shown_beside_whether_it_is_right():
    text = "<think>\n</think>\n<answer>red fox</answer>"
    judged = {"chat": [], "unsafe": ["harmless"], "countdown": ["language"]}
    for task, own in judged.items():
        problem = data.Problem(task, "shorten very red fox", (), "red fox")
        names = ["accuracy", "format", "language", "harmless"]
        *_, (_, scores) = sample.render(problem, text, names)
        assert scores.split()[::2] == ["accuracy", "format", *own]


def test_colours_are_for_terminals(monkeypatch):
    assert sample.paint("right", "x") == "x"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert sample.paint("right", "x") == "\033[1;32mx\033[0m" and sample.paint("plain", "x") == "x"


def test_text_is_fitted_to_columns_of_which_a_chinese_sign_takes_two():
    assert sample.fit("不对 x", 5) == "不对 " and sample.fit("不对", 3) == "不 "
    assert sample.fit("ab", 4) == "ab  " and sample.fit("abc", 2) == "ab"
    assert sample.fit("e\u0301x", 2) == "e\u0301x"


def test_a_prompt_longer_than_the_context_is_refused_in_one_line(finished, capsys):
    argv = [f"--ckpt={finished / 'zero' / 'ckpt.pt'}", f"--numbers={','.join('7' * 100)}",
            "--target=20"]
    assert "context" in refusal(sample.main, argv, capsys)


@pytest.mark.parametrize("argv, words", [
    (["--ckpt=/nowhere/ckpt.pt"], ["/nowhere/ckpt.pt"]),
    (["--numbers=3,x", "--target=3"], ["numbers"]),
    (["--numbers=3,7"], ["target"]),
    (["--numbers=7", "--target=7"], ["numbers=7"]),
    ([f"--numbers=3,{'7' * 5000}", "--target=7"], ["numbers"]),
    (["--target=3"], ["numbers"]),
    (["--n=0"], ["n=0"]),
    (["--to=a.jsonl", "--question=why"], ["--to", "--question"]),
    (["--to=a.jsonl", "--numbers=3,7", "--target=10"], ["--to", "--numbers"]),
    (["--vs=Qwen/Qwen2.5-0.5B"], ["no checkpoint at Qwen/Qwen2.5-0.5B"]),
    (["--max_new_tokens=-1"], ["max_new_tokens=-1"]),
    (["--temperature=-1"], ["temperature=-1"]),
    (["--temperature=hot"], ["temperature", "hot"]),
    (["--temperature=1e-40"], ["temperature=1e-40"]), (["--to=/"], ["--to=/ is a folder"]),
    (["--numbers=1,2", "--target=-1"], ["--target", "0 or more"]),
    (["--numbers=1,2", "--target=-5"], ["--target", "0 or more"]),
    (["--task=chess"], ["chess", "countdown"]),
    (["--device=abacus"], ["abacus"]),
    (["--what"], ["--what"])])
def test_bad_input_to_sample_is_one_line_and_exit_code_2(finished, argv, words, capsys):
    argv = [f"--ckpt={finished / 'zero' / 'ckpt.pt'}", *argv]
    err = refusal(sample.main, argv, capsys)
    assert err.startswith("sample.py: ") and all(word in err for word in words), err


def test_the_script_ends_with_that_code_and_that_line():
    done = command("--ckpt=/nowhere/ckpt.pt", script="sample.py")
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        sample.main(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0
    assert all(f"--{f.name} " in text for f in fields(sample.AskConfig))
