"""The pipeline and its command line, run for real with tiny settings."""
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import data
import rewards
import train
from model import GPT, BadInput, GPTConfig, load_checkpoint, load_model, save_pretrained

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--n_layer=1", "--n_embd=16", "--n_head=2", "--mlp_dim=16", "--head_dim=8", "--context=128", "--base_rows=2", "--base_length=100", "--base_steps=12",
        "--rl_steps=3", "--prompts_per_step=2", "--group_size=3", "--max_new_tokens=12", "--eval_problems=3", "--eval_samples=4",
        "--eval_every=0", "--save_every=1", "--threads=1", "--device=cpu"]


def run(out, *words, tiny=TINY):
    train.main([*words, *tiny, f"--out_dir={out}"])


def command(*argv, script="train.py"):
    return subprocess.run([sys.executable, script, *argv], cwd=HERE, capture_output=True, text=True, timeout=120)


def weights(folder):
    return torch.cat([p.flatten() for p in load_checkpoint(os.path.join(folder, "ckpt.pt"))["model"].values()])


def lines(folder, drop=("seconds", "sample_s", "update_s", "tokens_per_s")):
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in f]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run(out, "zero")
    return out


# ---------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_what_the_readme_promises(finished):
    for stage, steps in (("base", 12), ("zero", 3)):
        assert load_checkpoint(str(finished / stage / "ckpt.pt"))["step"] == steps
        assert [m["step"] for m in lines(finished / stage)] == list(range(1, steps + 1))
        result = json.loads((finished / stage / "eval.json").read_text())["countdown"]
        assert {"pass@1", "pass@1_greedy", "pass@1_ci", "pass@4", "cons@4", "format", "length", "problems"} <= set(result)
        assert result["problems"] == 3
        sample = json.loads((finished / stage / "samples.jsonl").read_text().splitlines()[0])
        assert sample["prompt"].startswith("User: make") and "completion" in sample
    for key in ("reward", "accuracy", "format", "length", "kl", "clip", "entropy", "grad_norm", "equal", "all_right", "all_wrong", "truncated", "tokens_per_s"):
        assert key in json.loads((finished / "zero" / "metrics.jsonl").read_text().splitlines()[0])


def test_a_finished_stage_is_not_run_again(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    run(finished, "zero")
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != "metrics.jsonl"} == \
           {p: t for p, t in before.items() if p.name != "metrics.jsonl"}
    assert "zero: done" in capsys.readouterr().out


def test_the_same_seed_makes_the_same_run_and_another_seed_another(finished, tmp_path):
    run(tmp_path / "same", "zero")
    assert torch.equal(weights(tmp_path / "same" / "zero"), weights(finished / "zero"))
    assert lines(tmp_path / "same" / "zero") == lines(finished / "zero")
    run(tmp_path / "other", "base", tiny=[*TINY, "--seed=2"])
    assert not torch.equal(weights(tmp_path / "other" / "base"), weights(finished / "base"))


class Cut(BaseException):
    pass


@pytest.mark.parametrize("stage, at", [("base", 10), ("zero", 1), ("zero", 2)])
def test_a_run_cut_short_ends_as_if_it_had_not_been(finished, tmp_path, monkeypatch, stage, at):
    log = train.Run.log

    def cut(self, metrics):
        log(self, metrics)
        if self.name == stage and metrics["step"] == at + 1:  # logged, but its checkpoint is not written
            raise Cut
    monkeypatch.setattr(train.Run, "log", cut)
    with pytest.raises(Cut):
        run(tmp_path, "zero")
    monkeypatch.undo()
    assert load_checkpoint(str(tmp_path / stage / "ckpt.pt"))["step"] == at
    run(tmp_path, "zero")
    for name in ("base", "zero"):
        assert torch.equal(weights(tmp_path / name), weights(finished / name))
        assert lines(tmp_path / name) == lines(finished / name)
        assert (tmp_path / name / "samples.jsonl").read_text() == (finished / name / "samples.jsonl").read_text()


def test_ctrl_c_saves_and_says_how_to_go_on(finished, tmp_path):
    flags = [*TINY, "--base_steps=100000", "--save_every=100000", f"--out_dir={tmp_path}"]
    run = subprocess.Popen([sys.executable, "train.py", "base", *flags], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "base" / "metrics.jsonl").exists() or (tmp_path / "base" / "metrics.jsonl").stat().st_size == 0:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err and "same command" in err
    step = load_checkpoint(str(tmp_path / "base" / "ckpt.pt"))["step"]
    assert f"saved at step {step} of 100000" in err and lines(tmp_path / "base")[-1]["step"] == step


def test_updates_that_are_not_finite_end_the_run_with_the_batch_saved(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(train.rewards, "score", lambda problems, completions, cfg: ([float("nan")] * len(completions), {"accuracy": [0.0] * len(completions)}))
    with pytest.raises(SystemExit) as e:
        run(tmp_path / "out", "zero", tiny=[*TINY, "--rl_steps=9", "--patience=2"])
    assert e.value.code == 2 and "2 updates in a row" in capsys.readouterr().err
    assert load_checkpoint(str(tmp_path / "out" / "zero" / "ckpt.pt"))["step"] == 4  # the first of the two was saved, with the weights as they were
    assert torch.equal(weights(tmp_path / "out" / "zero"), weights(finished / "zero"))
    assert "tokens" in torch.load(tmp_path / "out" / "zero" / "bad_batch.pt", weights_only=True)
    assert json.loads((tmp_path / "out" / "zero" / "metrics.jsonl").read_text().splitlines()[-1])["grad_norm"] is None


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_checkpoint(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "out")
    before = (tmp_path / "out" / "zero" / "ckpt.pt").read_bytes()

    def full(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as e:
        run(tmp_path / "out", "zero", tiny=[*TINY, "--rl_steps=9"])
    err = capsys.readouterr().err
    assert e.value.code == 2 and "No space left" in err and len(err.strip().splitlines()) == 1
    assert (tmp_path / "out" / "zero" / "ckpt.pt").read_bytes() == before and not list((tmp_path / "out" / "zero").glob("*.tmp"))


def test_a_process_killed_at_random_moments_ends_as_if_it_had_not_been():
    import kill
    assert kill.main(["--kills=2"])  # 20 in the long version: python tests/bench/kill.py


def test_more_rl_steps_go_on_from_a_finished_run(finished, tmp_path):
    run(tmp_path, "zero", tiny=[*TINY, "--rl_steps=2"])
    run(tmp_path, "zero")
    assert torch.equal(weights(tmp_path / "zero"), weights(finished / "zero"))


def test_a_refreshed_reference_survives_a_resume(tmp_path):
    flags = [*TINY, "--ref_every=1", "--kl_coef=0.1", "--rl_lr=0.01"]
    run(tmp_path / "whole", "zero", tiny=flags)
    run(tmp_path / "parts", "zero", tiny=[*flags, "--rl_steps=2"])
    run(tmp_path / "parts", "zero", tiny=flags)
    assert torch.equal(weights(tmp_path / "whole" / "zero"), weights(tmp_path / "parts" / "zero"))


def test_going_on_with_other_settings_is_refused_by_name(finished):
    before = weights(finished / "zero")
    for flag, name in (("--rl_lr=0.5", "rl_lr"), ("--n_layer=2", "n_layer"), ("--task=arithmetic", "task"), ("--w_format=1", "w_format")):
        with pytest.raises(SystemExit) as e:
            run(finished, "zero", tiny=[*TINY, flag])
        assert e.value.code == 2
    assert torch.equal(weights(finished / "zero"), before)


def test_a_task_has_defaults_between_the_general_ones_and_the_command_line(tmp_path):
    given = {"task": "arithmetic", "out_dir": str(tmp_path)}
    assert train.Run("zero", given).cfg.train.rl_steps == train.TASK_DEFAULTS["arithmetic"]["rl_steps"]
    assert train.Run("zero", {**given, "rl_steps": 999}).cfg.train.rl_steps == 999


def test_a_variant_is_a_preset_below_the_command_line(tmp_path):
    grpo = lambda **given: train.Run("zero", {"out_dir": str(tmp_path), **given}).cfg.grpo
    assert grpo() == train.GRPOConfig()
    assert (grpo(variant="dr_grpo").adv_norm, grpo(variant="dr_grpo").loss_norm) == ("none", "constant")
    assert grpo(variant="dapo").clip_high == 0.28 and grpo(variant="dapo", clip_high=0.3).clip_high == 0.3


@pytest.mark.parametrize("flags", [
    ["--adv_norm=none", "--loss_norm=constant"], ["--clip_high=0.28", "--loss_norm=token", "--mask_truncated=true", "--resample_equal=2"],
    ["--inner_epochs=2", "--minibatches=2", "--kl_coef=0"], ["--task=arithmetic"], ["--task=logic"], ["--task=code"], ["--mix=task:1,chat:1,unsafe:1", "--w_harmless=1", "--w_accuracy=0"], ["--n_numbers=4", "--max_number=12", "--ops=+-*/"], ["--n_numbers=2"]])
def test_every_variant_runs(tmp_path, flags):
    run(tmp_path, "zero", tiny=[*TINY, "--eval_every=1", "--rl_steps=2", *flags])
    assert len(lines(tmp_path / "zero")) == 2


def test_eval_writes_beside_the_checkpoint(finished, tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes((finished / "zero" / "ckpt.pt").read_bytes())
    train.main(["eval", f"--ckpt={tmp_path / 'ckpt.pt'}", "--eval_problems=2", "--eval_samples=2", "--max_new_tokens=12", "--task=arithmetic"])
    assert json.loads((tmp_path / "eval.json").read_text())["arithmetic"]["problems"] == 2
    assert "arithmetic: 2 held-out problems, 2 samples of each" in capsys.readouterr().out


def test_sample_shows_thinking_answer_and_score(finished):
    done = command(f"--ckpt={finished / 'zero' / 'ckpt.pt'}", "--numbers=3,7,2", "--target=20", "--max_new_tokens=12", "--n=2", script="sample.py")
    assert done.returncode == 0 and done.stdout.count("make 20 from 2, 3 and 7") == 2 and "accuracy 0" in done.stdout


def test_a_foreign_checkpoint_is_not_trained_on(finished, tmp_path, capsys):
    os.makedirs(tmp_path / "base")
    state = load_checkpoint(str(finished / "base" / "ckpt.pt"))
    torch.save({"model": state["model"], "model_config": state["model_config"]}, tmp_path / "base" / "ckpt.pt")
    with pytest.raises(SystemExit) as e:
        run(tmp_path, "base")
    assert e.value.code == 2 and "ckpt.pt is no checkpoint of a run" in capsys.readouterr().err


def test_two_checkpoints_are_shown_side_by_side(finished):
    done = command(f"--ckpt={finished / 'base' / 'ckpt.pt'}", f"--vs={finished / 'zero' / 'ckpt.pt'}", "--max_new_tokens=12", "--n=2", script="sample.py")
    assert done.returncode == 0 and done.stdout.count("--- make") == 2 and done.stdout.count("accuracy 0") == 4 and "\033" not in done.stdout
    assert "base" in done.stdout.splitlines()[0] and "zero" in done.stdout.splitlines()[0]


def test_what_a_model_says_cannot_control_the_terminal():
    import sample
    shown = "".join(line for _, line in sample.render(data.countdown_problem((3, 7), 10), "<think>\033[2J\r\x07</think><answer>3+7</answer>"))
    assert "\033" not in shown and "\r" not in shown and "\x07" not in shown and "3+7" in shown
    assert ("dim", "    (none)") in sample.render(data.countdown_problem((3, 7), 10), "<think>\n</think>\n<answer>3+7</answer>")
    assert sample.fit("不对 x", 5) == "不对 " and sample.fit("ab", 4) == "ab  " and sample.fit("不对", 3) == "不 "


def test_a_prompt_longer_than_the_context_is_refused_in_one_line(finished):
    done = command(f"--ckpt={finished / 'zero' / 'ckpt.pt'}", "--numbers=" + ",".join("7" * 100), "--target=20", script="sample.py")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "context" in done.stderr


# ---------------------------------------------------------------------------------------- the later stages

def test_supervised_batches_learn_the_completion_and_its_end_alone():
    tok, rng, cfg = data.load_tokenizer(), random.Random(0), data.DataConfig()
    rows = [(data.countdown_problem((3, 7, 2), 20), "<think>\nhm\n</think>\n<answer>(3+7)*2</answer>"), (data.countdown_problem((1, 2), 3), "1+2")]
    tokens, mask = data.sft_batch(rows, tok, cfg, rng, 6)
    for ids, learnt in zip(tokens, mask):
        text, prompt = tok.decode(ids[learnt].tolist()), tok.decode(ids[~learnt].tolist())
        assert (prompt, text) in {(p.prompt, t) for p, t in rows} and ids[learnt][-1] == tok.end_id


def harvested(tmp_path, monkeypatch, texts, filters, rank=None, more=None, step=0):
    """What `harvest` makes of a source that says texts[i % len(texts)] in sample i."""
    tok = data.load_tokenizer()

    class Source:
        def generate(self, prompts, k, **options):
            self.said = [tok.encode(texts[i % len(texts)]) + [tok.end_id] for i in range(len(prompts) * k)]
            self.truncated = [False] * len(self.said)
            return self

        def completions(self):
            return self.said
    monkeypatch.setattr(train, "load_model", lambda *a: Source())
    run = train.Run("dev1", {"out_dir": str(tmp_path), "harvest_problems": 40, "harvest_samples": 4})
    run.saved = {"step": step}
    return train.harvest(run, filters, rank, more), [json.loads(line) for line in open(tmp_path / "dev1" / "sft.jsonl", encoding="utf-8")]


def test_a_harvest_keeps_the_best_of_each_problem_and_the_better_half(tmp_path, monkeypatch, capsys):
    texts = ["a", "bb", "ccc", "x"] + ["a", "x", "x", "x"]  # every other problem has nothing better than a
    rows, lines = harvested(tmp_path, monkeypatch, texts, {"no x": lambda p, t: t != "x", "short": lambda p, t: len(t) < 3}, rank=lambda p, t: len(t))
    assert [text for _, text in rows] == ["bb"] * 20 == [line["completion"] for line in lines]
    assert all(line["prompt"] == problem.prompt and not problem.held_out for (problem, _), line in zip(rows, lines))
    assert "sampled 160 from zero, no x 80, short 60, kept 20 of 40 problems" in capsys.readouterr().out
    again, _ = harvested(tmp_path, monkeypatch, ["other"], {}, step=1)
    assert again == rows  # for a run that is resumed the file is what counts
    assert {text for _, text in harvested(tmp_path, monkeypatch, ["other"], {})[0]} == {"other"}  # one that begins anew harvests anew


def test_a_harvest_without_a_rank_takes_the_first_that_passes_and_may_be_mixed_with_other_rows(tmp_path, monkeypatch, capsys):
    more = lambda cfg, rng: [(data.draw_problem(cfg.data, rng, "chat"), "hello")] * 3
    rows, lines = harvested(tmp_path, monkeypatch, ["x", "a", "bb", "x"], {"no x": lambda p, t: t != "x"}, more=more)
    assert [text for _, text in rows] == ["a"] * 40 + ["hello"] * 3 and {p.task for p, _ in rows[40:]} == {"chat"}
    assert "and 3 written by people" in capsys.readouterr().out and lines[-1]["problem"]["task"] == "chat"


def test_a_harvest_of_nothing_is_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="dev1: nothing that zero says"):
        harvested(tmp_path, monkeypatch, ["a"], {"never": lambda p, t: False})


def test_rambling_is_saying_the_same_line_three_times():
    assert train.NOT_RAMBLING(None, "<think>\na\nb\na\n</think>") and not train.NOT_RAMBLING(None, "a\nb\na\nb\na")


LATER = ["dev1", "dev2", "dev3", "reward_model", "r1", "small_base", "distill", "small_zero", "dev2_free", "zero_emoji"]
PIPELINE = [*TINY, "--harvest_problems=6", "--harvest_samples=4", "--general_rows=5", "--sft_steps=4", "--sft_rows=3", "--noise=0.2"]


@pytest.fixture
def lenient(monkeypatch):
    """A model of this size says nothing right: let everything pass, and people like what is long."""
    for name in ("RIGHT", "IN_FORMAT", "ONE_LANGUAGE", "NOT_RAMBLING"):
        monkeypatch.setattr(train, name, lambda problem, text: True)
    monkeypatch.setattr(rewards, "split_completion", lambda text: (text, text))
    monkeypatch.setattr(data, "hidden_rule", lambda problem, answer: len(answer))


def test_the_whole_pipeline_runs_and_any_stage_of_it_resumes(finished, tmp_path, monkeypatch, lenient, capsys):
    whole, cut_short = tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(finished, whole)
    run(whole, "r1", "distill", "small_zero", "dev2_free", "zero_emoji", tiny=PIPELINE)
    out = capsys.readouterr().out
    assert "held-out pairs it agrees with people on" in out and "written by people" in out
    for name in ("base", "zero", *LATER):
        assert load_checkpoint(str(whole / name / "ckpt.pt"))["step"] > 0 and (whole / name / "eval.json").exists()
        assert name == "reward_model" or any(line.startswith(name) for line in out.split("held-out problems")[1].splitlines())
    assert "language" in lines(whole / "dev2")[0] and "language" not in lines(whole / "dev2_free")[0] and "emoji" in lines(whole / "zero_emoji")[0]
    assert {"preference", "harmless", "language"} <= set(lines(whole / "r1")[0])
    assert {"countdown", "arithmetic", "logic", "code", "chat", "unsafe", "against dev3"} == set(json.loads((whole / "r1" / "eval.json").read_text()))
    with pytest.raises(BadInput, match="reward model"):
        train.open_checkpoint({"ckpt": str(whole / "reward_model" / "ckpt.pt")})
    pair = json.loads((whole / "reward_model" / "pairs.jsonl").read_text().splitlines()[0])
    assert {"held_out", "prompt", "preferred", "other", "as_the_rule"} == set(pair)
    assert {json.loads(line)["problem"]["task"] for line in (whole / "dev3" / "sft.jsonl").read_text().splitlines()} == {"countdown", "chat", "unsafe"}

    log = train.Run.log
    for stage in LATER:
        shutil.copytree(whole, cut_short)
        shutil.rmtree(cut_short / stage)

        def cut(self, metrics):
            log(self, metrics)
            if self.name == stage and metrics["step"] == 2:
                raise Cut
        monkeypatch.setattr(train.Run, "log", cut)
        with pytest.raises(Cut):
            run(cut_short, stage, tiny=PIPELINE)
        monkeypatch.setattr(train.Run, "log", log)
        run(cut_short, stage, tiny=PIPELINE)
        assert torch.equal(weights(cut_short / stage), weights(whole / stage)), stage
        assert lines(cut_short / stage) == lines(whole / stage)
        results = [json.loads((out / stage / "eval.json").read_text()) for out in (whole, cut_short)]
        assert {k: v for k, v in results[0].items() if k != "against dev3"} == {k: v for k, v in results[1].items() if k != "against dev3"}  # dev1 had no dev3 yet
        shutil.rmtree(cut_short)


def test_the_table_is_printed_from_what_lies_in_the_folder_and_as_markdown(finished, capsys):
    run(finished, "table")
    text = capsys.readouterr().out
    result = json.loads((finished / "zero" / "eval.json").read_text())
    for title in ("countdown: 3 held-out problems, 4 samples of each", "pass@1 on other tasks"):
        assert text.count(title) == 2
    assert f"| zero | {result['countdown']['pass@1']:.1%} |" in text and "| --- |" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows[:4]}) == 1


def test_a_table_of_nothing_is_refused_in_one_line(tmp_path):
    done = command("table", f"--out_dir={tmp_path}")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and str(tmp_path) in done.stderr


def test_an_answer_is_compared_with_dev3s_to_the_same_request(finished, tmp_path, monkeypatch):
    said = lambda liking: [{"task": "chat", "prompt": f"q{i}", "completion": str(x), "liking": x} for i, x in enumerate(liking)]
    (tmp_path / "dev3").mkdir()
    (tmp_path / "reward_model").mkdir()
    (tmp_path / "reward_model" / "ckpt.pt").write_text("")
    (tmp_path / "dev3" / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in [{"task": "countdown", "prompt": "make"}, *said([1, 2, 3, 4])]))
    monkeypatch.setattr(train, "load_model", lambda path, **k: None)
    monkeypatch.setattr(train, "score_texts", lambda model, tok, prompts, completions: [-float(c) for c in completions])
    cfg = train.Config().with_settings({"out_dir": str(tmp_path)})
    assert train.compare(said([2, 2, 4, 3]), None, cfg) == {"against dev3": {"preferred": 2.5 / 4, "preferred by the reward model": 1.5 / 4}}
    assert train.compare(said([1, 2]), None, cfg) == {} == train.compare([], None, cfg)  # other requests


def test_a_task_without_a_corpus_is_refused_where_a_base_is_to_be_trained(tmp_path, capsys):
    for flags in (["--task=chat"], ["--task=unsafe"]):
        with pytest.raises(SystemExit):
            run(tmp_path, "base", tiny=[*TINY, *flags])
        assert "is not among them" in capsys.readouterr().err


def test_small_models_are_no_part_of_a_real_models_run(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "small_base", tiny=[*REAL, f"--init_from={folder}"])
    assert "trained from nothing" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- real models

REAL = [f for f in TINY if not f.startswith(("--n_layer", "--n_embd", "--n_head", "--mlp_dim", "--head_dim", "--context"))] + ["--context=400", "--rl_steps=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder as anybody's: a random Qwen3 that speaks the toy vocabulary."""
    where = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    tok = data.load_tokenizer()
    save_pretrained(GPT(GPTConfig(vocab_size=tok.n_vocab + 7, n_layer=1, n_embd=16, n_head=2, n_kv_head=1, head_dim=8, mlp_dim=16, context=1000, qk_norm=True)), where)
    tok.save(where)
    return where


@pytest.mark.parametrize("flags", [["--template=base"], ["--template=base", "--shots=1", "--max_new_tokens=8", "--prefill_think=true", "--context=700"],
                                   ["--optimizer=muon", "--checkpointing=true", "--ref_dtype=bfloat16", "--sample_dtype=bfloat16", "--autocast=on"], ["--kl_coef=0"]])
def test_a_real_model_is_trained_in_place_of_the_toy_base_and_exported_again(folder, tmp_path, flags, capsys):
    run(tmp_path, "zero", tiny=[*REAL, f"--init_from={folder}", *flags])
    assert "memory, GiB: weights" in capsys.readouterr().out
    first, last = lines(tmp_path / "zero")
    assert first["ratio"] == pytest.approx(1, abs=0.05 if "--sample_dtype=bfloat16" in flags else 1e-4) and first["kl"] < 1e-3
    assert json.loads((tmp_path / "base" / "eval.json").read_text())["countdown"]["problems"] == 3  # the folder itself, as a base to compare with
    assert not (tmp_path / "base" / "ckpt.pt").exists()
    train.main(["export", f"--ckpt={tmp_path / 'zero' / 'ckpt.pt'}", f"--export_dir={tmp_path / 'out'}"])
    again, trained = GPT.from_pretrained(str(tmp_path / "out")), load_model(str(tmp_path / "zero" / "ckpt.pt"))
    assert again.cfg.context == 1000 and all(torch.equal(p, q) for p, q in zip(again.parameters(), trained.parameters(), strict=True))
    assert data.load_tokenizer(str(tmp_path / "out")).stop_ids == data.load_tokenizer().stop_ids


def test_the_toy_model_can_be_exported_and_trained_on(finished, tmp_path):
    train.main(["export", f"--ckpt={finished / 'zero' / 'ckpt.pt'}", f"--export_dir={tmp_path / 'hf'}", "--export_dtype=bfloat16"])
    run(tmp_path, "zero", tiny=[*REAL, f"--init_from={tmp_path / 'hf'}", "--template=toy", "--context=128"])
    assert len(lines(tmp_path / "zero")) == 2


def test_problems_can_come_from_a_file(folder, tmp_path):
    (tmp_path / "math.jsonl").write_text("".join(json.dumps({"question": f"What is {i} + {i}?", "answer": f"It is\n#### {2 * i}"}) + "\n" for i in range(40)))
    problems = data.file_problems(str(tmp_path / "math.jsonl"))
    assert problems[3].target == "6" and 5 < sum(p.held_out for p in problems) < 20
    run(tmp_path, "zero", tiny=[*REAL, f"--init_from={folder}", f"--data={tmp_path / 'math.jsonl'}", "--shots=2", "--context=900"])
    assert json.loads((tmp_path / "zero" / "eval.json").read_text())["file"]["problems"] == 3
    asked = {json.loads(line)["prompt"].strip() for line in (tmp_path / "zero" / "samples.jsonl").read_text().splitlines()}
    assert asked <= {p.question for p in problems if p.held_out}


def test_a_worked_example_is_never_the_problem_itself():
    cfg, rng = data.DataConfig(task="arithmetic", n_numbers=2, ops="+", template="base", shots=3), random.Random(0)
    examples = {p.key for p, *_ in data.EXAMPLES}
    drawn = {data.draw_problem(cfg, rng).key for _ in range(1000)} | {p.key for p in data.eval_problems(cfg, 100)}
    assert not examples & drawn and len(drawn) > 30


def test_prompts_carry_the_template_the_examples_and_the_question():
    tok, problem = data.load_tokenizer(), data.countdown_problem((3, 7, 2), 20)
    text = lambda **k: tok.decode(data.prompt_ids(problem, tok, data.DataConfig(**k)))
    assert text() == problem.prompt
    for template in ("base", "qwen", "llama"):
        shown = text(template=template, shots=2, prefill_think=True)
        assert shown.count("<answer>") == 3 and shown.count("make") == 3 and "make 20" in shown and shown.endswith("<think>\n")
    assert data.completion_text(tok.encode("so</think><answer>1</answer>"), tok, data.DataConfig(template="base", prefill_think=True)).startswith("<think>")


def test_memory_is_planned_from_the_settings():
    plan = lambda **k: train.memory_plan(train.Config().with_settings({"vocab_size": 500, **k}), 20, torch.device("cpu"))
    n = sum(p.numel() for p in GPT(GPTConfig(vocab_size=500)).parameters())
    assert plan()["weights"] == 4 * n and plan(optimizer="adamw")["optimiser"] == 8 * n
    assert plan(kl_coef=0.0)["reference"] == 0 and plan(ref_dtype="bfloat16")["reference"] == 2 * n
    assert plan(checkpointing=True)["activations"] < plan()["activations"] > plan(micro_tokens=1024)["activations"]


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("argv, words", [
    (["--nonsense=3"], ["nonsense"]), (["flight"], ["flight", "zero"]), (["--rl_steps=many"], ["rl_steps", "many"]), (["--tied=maybe"], ["tied", "maybe"]),
    (["--rl_steps=0"], ["rl_steps"]), (["--group_size=-1"], ["group_size"]), (["--n_numbers=9"], ["n_numbers"]), (["--task=chess"], ["chess", "countdown"]),
    (["--n_kv_head=3"], ["n_kv_head"]), (["--w_accuracy=0", "--w_format=0"], ["w_accuracy"]), (["--device=abacus"], ["abacus"]),
    (["eval", "--ckpt=/nowhere/ckpt.pt"], ["/nowhere/ckpt.pt"]), (["--out_dir=/dev/null/out"], ["/dev/null/out"]), (["--rl_lr=nan"], ["rl_lr"]),
    (["--threads=-2"], ["threads"]), (["--w_format=nan"], ["w_format"]), (["--clip_low=2"], ["clip_low"]), (["--context=30", "--base_length=20"], ["context"]),
    (["--init_from=/nowhere"], ["/nowhere"]), (["--template=qwen2"], ["template", "qwen"]), (["--shots=2"], ["shots", "toy"]), (["--data=/nowhere.jsonl"], ["/nowhere.jsonl"]),
    (["--task=file"], ["--data"]), (["--optimizer=sgd"], ["optimizer", "adamw"]), (["--variant=ppo"], ["variant", "dapo"]), (["--mix=task:x"], ["mix", "chat"]), (["--noise=0.7"], ["noise"]), (["export", "--ckpt=/nowhere/ckpt.pt"], ["/nowhere/ckpt.pt"]), (["eval", "zero"], ["eval"]),
    (["--base_length=5"], ["base_length"]), (["--vocab_size=10"], ["vocab_size"])])
def test_bad_input_is_one_line_and_exit_code_2(argv, words, tmp_path):
    out = [] if any(a.startswith("--out_dir") for a in argv) else [f"--out_dir={tmp_path}"]
    done = command(*argv, *out)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("argv, words", [
    (["--ckpt=/nowhere/ckpt.pt"], ["/nowhere/ckpt.pt"]), (["--numbers=3,x", "--target=3"], ["numbers"]), (["--numbers=3,7"], ["target"]),
    (["--n=0"], ["--n"]), (["--what"], ["--what"])])
def test_bad_input_to_sample_is_one_line_and_exit_code_2(argv, words):
    done = command(*argv, script="sample.py")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_help_names_every_setting_with_its_default():
    text = command("--help").stdout
    for name, value in train.Config().settings().items():
        assert f"--{name} " in text
        assert "default" in text


# ---------------------------------------------------------------------------------------- figures


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 1), (7, 3, 7)]:
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert train.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_a_majority_votes_over_answers_and_the_first_wins_a_tie():
    right, wrong, none = ("a", True), ("b", False), (None, False)
    assert train.majority([wrong, right, right]) and not train.majority([wrong, right, wrong])
    assert train.majority([right, wrong]) and not train.majority([wrong, right])
    assert train.majority([none, none, none, right]) and not train.majority([none]) and not train.majority([])


def test_evaluation_counts_what_it_says():
    """Four samples of each of two problems with known verdicts, through the real `evaluate`."""
    tok = data.load_tokenizer()
    texts = ["<think>\n</think>\n<answer>3+7</answer>", "<answer>7+3</answer>", "<answer>7*3</answer>", "no",   # vote: 3+7, right
             "<answer>9-8</answer>", "<answer>9-8</answer>", "<answer>8*9</answer>", "no"]                        # vote: 9-8, wrong
    problems = [data.countdown_problem((3, 7), 10), data.countdown_problem((9, 8), 72)]

    class Fake:
        truncated = torch.tensor([False] * 7 + [True])

        def completions(self):
            return [tok.encode(t) for t in texts]

        def generate(self, *args, **kwargs):
            return self
    metrics, samples = train.evaluate(Fake(), tok, problems, 4, 99)
    assert metrics["pass@1"] == 3 / 8 and metrics["pass@4"] == 1.0 and metrics["cons@4"] == 0.5
    assert metrics["format"] == 1 / 8 and metrics["truncated"] == 1 / 8 and metrics["length"] == sum(len(tok.encode(t)) for t in texts) / 8
    half = 1.96 * torch.tensor([0.5, 0.25]).std().item() / 2 ** 0.5
    assert metrics["pass@1_ci"] == pytest.approx([3 / 8 - half, 3 / 8 + half])


def test_generators_follow_from_their_key_alone():
    a, b = train.rng(1, "zero", 5), train.rng(1, "zero", 5)
    assert a[0].random() == b[0].random() and torch.equal(torch.rand(3, generator=a[1]), torch.rand(3, generator=b[1]))
    assert train.rng(1, "zero", 6)[0].random() != train.rng(1, "zero", 5)[0].random()
