"""The pipeline and its command line, run for real with tiny settings. What sample.py does is tested
in test_sample.py."""
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch.torch_version import TorchVersion

import data
import rewards
import sample
import train
from grpo import GRPOConfig, group_advantages
from model import (
    GPT,
    Completion,
    GPTConfig,
    UserError,
    add_lora,
    from_pretrained,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_pretrained,
)

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPE = ["--n_layer=1", "--n_embd=16", "--n_head=2", "--mlp_dim=16", "--head_dim=8"]
SHORT = ["--base_rows=2", "--base_length=100", "--base_steps=12", "--base_lr=0.05", "--rl_steps=3",
         "--prompts_per_step=2", "--group_size=3", "--max_new_tokens=12", "--eval_problems=3",
         "--eval_samples=4", "--eval_every=0", "--save_every=1", "--threads=1", "--device=cpu"]
TINY = [*SHAPE, "--context=128", *SHORT]
# No reward but that for length is earned, and equal ones teach nothing. The base's learning rate is
# so high that it ends its texts anywhere.
ZERO = [*TINY, "--w_length=1"]
PIPELINE = [*TINY, "--source_problems=6", "--source_samples=4", "--general_replies=5",
            "--sft_steps=12", "--sft_rows=3", "--label_noise=0.2"]
REAL = [*SHORT, "--context=400", "--rl_steps=2"]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signal, and has no bash")
CLOCK = ("seconds", "sample_s", "update_s", "tokens_per_s")  # no two runs agree on these


def run(out, *words, tiny=ZERO):
    train.main([*words, *tiny, f"--out_dir={out}"])


def command(*argv, script="train.py"):
    return subprocess.run([sys.executable, script, *argv], cwd=HERE, capture_output=True, text=True,
                          timeout=120)


def refusal(main, argv, capsys):
    """The one line with which a script refuses its command line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main(argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and len(err.strip().splitlines()) == 1, err
    return err


def weights(folder):
    state = load_checkpoint(os.path.join(folder, "ckpt.pt"))
    return torch.cat([p.flatten() for p in state["model"].values()])


def read(folder, file):
    """A file of JSON lines without its clock times; no lines where there is no such file."""
    if not (folder / file).exists():
        return []
    def refuse(name):  # NaN and Infinity are no JSON
        raise AssertionError(f"{file} has {name}")

    found = [json.loads(line, parse_constant=refuse)
             for line in (folder / file).read_text("utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in found]


def lines(folder):
    return read(folder, "metrics.jsonl")


def results(folder):
    return json.loads((folder / "eval.json").read_text())


def assert_same(a, b):
    """Two folders of one stage hold the same weights, logs and samples."""
    assert torch.equal(weights(a), weights(b)), a.name
    for file in ("metrics.jsonl", "rollouts.jsonl", "samples.jsonl", "sft.jsonl", "pairs.jsonl"):
        assert read(a, file) == read(b, file), (a.name, file)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run(out, "zero")
    return out


# -------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_what_the_readme_promises(finished):
    for stage, steps in (("base", 12), ("zero", 3)):
        folder = finished / stage
        assert load_checkpoint(str(folder / "ckpt.pt"))["step"] == steps
        assert [m["step"] for m in lines(folder)] == list(range(1, steps + 1))
        result = results(folder)["countdown"]
        assert {"pass@1", "pass@1_T=0.6", "pass@1_greedy", "pass@1_untagged", "pass@1_ci",
                "pass@4", "cons@4", "format", "one_language", "retry_rate", "length", "truncated",
                "problems"} <= set(result)
        assert result["problems"] == 3
        first = read(folder, "samples.jsonl")[0]
        assert first["prompt"].startswith("User: make") and "completion" in first
    first = json.loads((finished / "zero" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"reward", "reward/accuracy", "reward/format", "length", "loss", "ratio", "log_ratio",
            "sampler_kl", "kl", "clip", "entropy", "grad_norm", "zero_variance", "all_right",
            "all_wrong", "truncated", *CLOCK} <= set(first)
    assert first["ratio"] == pytest.approx(1, abs=1e-5)  # the policy is the one that sampled
    assert first["log_ratio"] == pytest.approx(0, abs=1e-5) == first["sampler_kl"]
    assert not torch.equal(weights(finished / "zero"), weights(finished / "base"))


def test_a_stage_of_few_steps_reaches_its_learning_rate(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(train, "set_lr", lambda optimizers, lr: rates.append(lr))
    run(tmp_path, "base")
    assert len(rates) == 12 and max(rates) == pytest.approx(0.05) and rates[-1] < 0.01


def test_a_finished_stage_is_not_run_again(finished, capsys):
    def written():
        files = [p for p in finished.rglob("*") if p.is_file()]
        return {p: p.stat().st_mtime_ns for p in files if p.name != "metrics.jsonl"}

    before, logged = written(), lines(finished / "zero")
    run(finished, "zero")
    assert written() == before and lines(finished / "zero") == logged
    assert "zero: done" in capsys.readouterr().out


def test_the_same_seed_makes_the_same_run_and_another_seed_another(finished, tmp_path):
    run(tmp_path / "same", "zero")
    assert_same(tmp_path / "same" / "zero", finished / "zero")
    run(tmp_path / "other", "base", tiny=[*TINY, "--seed=2"])
    assert not torch.equal(weights(tmp_path / "other" / "base"), weights(finished / "base"))


class Cut(BaseException):
    """Ends a run as a power cut would: nothing handles it."""


def cut_at(monkeypatch, stage, step):
    """That step of the stage is logged, and then its checkpoint is not written."""
    end_step = train.Run.end_step

    def cut(self, now, *others):
        if (self.name, now) == (stage, step):
            raise Cut
        end_step(self, now, *others)

    monkeypatch.setattr(train.Run, "end_step", cut)


@pytest.mark.parametrize("stage, at", [("base", 10), ("zero", 0), ("zero", 1), ("zero", 2)])
def test_a_run_cut_short_ends_as_if_it_had_not_been(finished, tmp_path, monkeypatch, stage, at):
    cut_at(monkeypatch, stage, at + 1)
    with pytest.raises(Cut):
        run(tmp_path, "zero")
    monkeypatch.undo()
    assert lines(tmp_path / stage)[-1]["step"] == at + 1
    if at:
        assert load_checkpoint(str(tmp_path / stage / "ckpt.pt"))["step"] == at
    run(tmp_path, "zero")
    for name in ("base", "zero"):
        assert_same(tmp_path / name, finished / name)


def test_a_line_torn_by_a_power_cut_is_written_again(finished, tmp_path, monkeypatch):
    cut_at(monkeypatch, "zero", 3)
    with pytest.raises(Cut):
        run(tmp_path, "zero")
    monkeypatch.undo()
    for file in ("metrics.jsonl", "rollouts.jsonl"):
        with open(tmp_path / "zero" / file, "a", encoding="utf-8") as f:
            f.write('\0\0\n{"reward": 1}\n[3]\n{"step": 3, "rew')
    run(tmp_path, "zero")
    assert_same(tmp_path / "zero", finished / "zero")


def test_the_first_group_of_every_tenth_step_can_be_read_and_survives_a_resume(
        finished, tmp_path, monkeypatch):
    flags = [*ZERO, "--rl_steps=12", "--save_every=4"]
    for name in ("whole", "parts"):
        shutil.copytree(finished, tmp_path / name)
    run(tmp_path / "whole", "zero", tiny=flags)
    cut_at(monkeypatch, "zero", 11)  # after step 11 was written, with step 8 saved
    with pytest.raises(Cut):
        run(tmp_path / "parts", "zero", tiny=flags)
    monkeypatch.undo()
    assert len(read(tmp_path / "parts" / "zero", "rollouts.jsonl")) == 6
    run(tmp_path / "parts", "zero", tiny=flags)
    assert_same(tmp_path / "parts" / "zero", tmp_path / "whole" / "zero")

    found = read(tmp_path / "whole" / "zero", "rollouts.jsonl")
    assert [line["step"] for line in found] == [1] * 3 + [11] * 3  # three samples in a group
    for line in found:
        assert set(line) == {"step", "problem", "text", "reward", "rewards", "advantage"}
        found_in = line["rewards"]
        assert found_in["format"] == rewards.has_format(line["text"])
        parts = found_in["accuracy"] + 0.5 * found_in["format"] + found_in["length"]
        assert line["reward"] == pytest.approx(parts, abs=1e-5)
    given = torch.tensor([line["reward"] for line in found]).view(2, 3)
    adv = torch.tensor([line["advantage"] for line in found]).view(2, 3)
    assert torch.allclose(adv, group_advantages(given), atol=1e-4) and adv.any()


@POSIX
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    flags = [*TINY, "--base_steps=100000", "--save_every=100000", f"--out_dir={tmp_path}"]
    process = subprocess.Popen([sys.executable, "train.py", "base", *flags], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = tmp_path / "base" / "metrics.jsonl"
    while not log.exists() or log.stat().st_size == 0:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "same command" in err
    step = load_checkpoint(str(tmp_path / "base" / "ckpt.pt"))["step"]
    assert f"saved at step {step} of 100000" in err
    assert lines(tmp_path / "base")[-1]["step"] == step


def test_steps_that_are_not_finite_end_the_run_and_leave_the_weights_as_they_were(
        finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)

    def score(problems, texts, cfg, **others):
        return [float("nan")] * len(texts), [{"accuracy": 0.0} for _ in texts]

    monkeypatch.setattr(rewards, "score", score)
    flags = [*ZERO, "--rl_steps=9", "--max_skipped=2", f"--out_dir={out}"]
    err = refusal(train.main, ["zero", *flags], capsys)
    assert "2 steps in a row" in err and str(out / "zero" / "ckpt.pt") in err
    # The first of the two was saved, with the weights as they were.
    assert load_checkpoint(str(out / "zero" / "ckpt.pt"))["step"] == 4
    assert torch.equal(weights(out / "zero"), weights(finished / "zero"))
    last = lines(out / "zero")[-1]
    assert last["skipped"] == 1 and last["grad_norm"] is None and last["reward"] is None


def test_one_step_that_is_not_finite_is_skipped_and_the_run_goes_on(
        finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "out")
    true_score, calls = rewards.score, []

    def score(problems, texts, cfg, **others):
        totals, parts = true_score(problems, texts, cfg, **others)
        calls.append(1)
        return [float("nan")] * len(totals) if len(calls) % 2 else totals, parts

    monkeypatch.setattr(rewards, "score", score)
    run(tmp_path / "out", "zero", tiny=[*ZERO, "--rl_steps=7", "--max_skipped=2"])
    assert [m["skipped"] for m in lines(tmp_path / "out" / "zero")[3:]] == [1, 0, 1, 0]
    assert capsys.readouterr().out.count("SKIPPED") == 2


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device"), "No space left"),
    (RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos"), "disk full")])
def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_checkpoint(
        finished, tmp_path, monkeypatch, capsys, error, said):
    folder = tmp_path / "out" / "zero"
    shutil.copytree(finished, tmp_path / "out")
    before = (folder / "ckpt.pt").read_bytes()

    def full(state, f):
        f.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    err = refusal(train.main, ["zero", *ZERO, "--rl_steps=9", f"--out_dir={folder.parent}"], capsys)
    assert said in err and "it is unchanged" in err
    assert (folder / "ckpt.pt").read_bytes() == before and not list(folder.glob("*.tmp"))


def test_a_log_that_cannot_be_written_ends_the_run_in_one_line(
        finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "out")

    def full(self, file, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.Run, "append", full)
    argv = ["zero", *ZERO, "--rl_steps=9", f"--out_dir={tmp_path / 'out'}"]
    err = refusal(train.main, argv, capsys)
    assert "No space left" in err and str(tmp_path / "out") in err


def test_a_process_killed_at_random_moments_ends_as_if_it_had_not_been():
    import kill
    assert kill.main(["--kills=2"])  # 20 in the long version: python tests/bench/kill.py


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_the_bench_for_gpus_finds_nothing_wrong(device, capsys):
    import gpu
    args = SimpleNamespace(device=device, prompts=2, group=2, new=8, micro_tokens=512)
    assert gpu.is_right(args, device == "cuda")
    gpu.step(args, "tiny", device == "cuda")
    out = capsys.readouterr().out
    assert '"same_samples": "32/32"' in out and '"foretold_gib"' in out


def test_more_rl_steps_go_on_from_a_finished_run(finished, tmp_path):
    run(tmp_path, "zero", tiny=[*ZERO, "--rl_steps=2"])
    run(tmp_path, "zero")
    assert_same(tmp_path / "zero", finished / "zero")


def test_a_refreshed_reference_survives_a_resume(tmp_path):
    flags = [*ZERO, "--ref_every=1", "--kl_coef=0.1", "--rl_lr=0.01"]
    run(tmp_path / "whole", "zero", tiny=flags)
    run(tmp_path / "parts", "zero", tiny=[*flags, "--rl_steps=2"])
    run(tmp_path / "parts", "zero", tiny=flags)
    assert_same(tmp_path / "whole" / "zero", tmp_path / "parts" / "zero")


def test_a_reward_for_length_and_the_length_itself_are_logged_apart(tmp_path):
    run(tmp_path, "zero", tiny=[*TINY, "--w_length=0.5", "--rl_steps=6"])
    logged = lines(tmp_path / "zero")
    for m in logged:
        assert -1 <= m["reward/length"] <= 0 < 1 < m["length"] <= 12
        if m["truncated"] == 1:  # all have the 12 tokens that there may be
            assert m["length"] == 12 and m["reward/length"] == -1
        total = m["reward/accuracy"] + 0.5 * m["reward/format"] + 0.5 * m["reward/length"]
        assert m["reward"] == pytest.approx(total, abs=1e-5)
    assert {m["truncated"] == 1 for m in logged} == {True, False}


# ---------------------------------------------------------------------------------------- precision


@pytest.fixture(scope="module")
def rounded(finished, tmp_path_factory):
    """The run of `finished`, but sampled in bfloat16."""
    out = tmp_path_factory.mktemp("rounded")
    shutil.copytree(finished / "base", out / "base")
    run(out, "zero", tiny=[*ZERO, "--sample_dtype=bfloat16"])
    return out


@pytest.fixture
def sampled_in(monkeypatch):
    """The dtypes of the weights that sampled."""
    seen, generate = set(), sample.generate

    def recording(model, *args):
        seen.add(model.embed.weight.dtype)
        return generate(model, *args)

    monkeypatch.setattr(sample, "generate", recording)
    return seen


def test_a_checkpoint_says_what_its_run_sampled_in(finished, rounded):
    for folder, dtype in ((finished / "base", "float32"), (finished / "zero", "float32"),
                          (rounded / "zero", "bfloat16")):
        state = load_checkpoint(str(folder / "ckpt.pt"))
        assert state["settings"]["sample_dtype"] == dtype  # and not auto
        assert {p.dtype for p in state["model"].values()} == {torch.float32}


def test_the_log_says_how_far_the_sampler_is_from_the_policy(finished, rounded):
    for m in lines(finished / "zero"):
        assert m.get("log_ratio") == pytest.approx(0, abs=1e-5) == m.get("sampler_kl")
        assert m["ratio"] == pytest.approx(1, abs=1e-5)
    for m in lines(rounded / "zero"):
        assert 0 < abs(m["log_ratio"]) < 0.02 and 0 <= m["sampler_kl"] < 0.001
        assert m["ratio"] == pytest.approx(1, abs=0.02)


def test_whatever_asks_a_checkpoint_samples_in_the_dtype_of_its_run(
        finished, rounded, tmp_path, sampled_in, capsys):
    for out, dtype in ((finished, torch.float32), (rounded, torch.bfloat16)):
        ckpt = f"--ckpt={shutil.copy(out / 'zero' / 'ckpt.pt', tmp_path)}"
        for main, argv in ((train.main, ["eval", ckpt]), (sample.main, [ckpt, "--n=1"])):
            sampled_in.clear()
            main(argv)
            assert sampled_in == {dtype}
        assert results(tmp_path)["countdown"] == results(out / "zero")["countdown"]
        assert "in training" not in capsys.readouterr().out


def test_asking_for_another_dtype_than_that_of_the_run_is_allowed_and_said(
        rounded, tmp_path, sampled_in, capsys):
    ckpt = shutil.copy(rounded / "zero" / "ckpt.pt", tmp_path)
    train.main(["eval", f"--ckpt={ckpt}", "--sample_dtype=float32"])
    assert sampled_in == {torch.float32}
    said = [line for line in capsys.readouterr().out.splitlines() if "bfloat16" in line]
    assert len(said) == 1 and ckpt in said[0] and "float32" in said[0]


def test_an_export_holds_the_weights_that_sampled(finished, rounded, tmp_path):
    def exported(out, *flags):
        folder = tmp_path / f"{out.name} {len(flags)}"
        train.main(["export", f"--ckpt={out / 'zero' / 'ckpt.pt'}", f"--export_dir={folder}",
                    *flags])
        return set(re.findall(b'"dtype": ?"(.*?)"', (folder / "model.safetensors").read_bytes()))

    assert exported(finished) == {b"F32"} and exported(rounded) == {b"BF16"}
    assert exported(rounded, "--export_dtype=float32") == {b"F32"}


# ----------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("flag", ["--rl_lr=0.5", "--n_layer=2", "--task=arithmetic", "--w_format=1",
                                  "--base_optimizer=adamw", "--rl_optimizer=muon", "--seed=7",
                                  "--group_size=4", "--rl_warmup=3", "--mix=task:1,chat:1",
                                  "--kl_loss=k3_ratio"])
def test_going_on_with_other_settings_is_refused_by_name(finished, capsys, flag):
    before = weights(finished / "zero")
    name, value = flag[2:].split("=")
    err = refusal(train.main, ["zero", *ZERO, flag, f"--out_dir={finished}"], capsys)
    assert f" {name}=" in err and f"not {value}" in err and str(finished) in err
    assert torch.equal(weights(finished / "zero"), before)


def test_what_changes_no_sample_may_change_in_a_finished_run(finished, capsys):
    flags = ["--micro_tokens=64", "--eval_every=3", "--save_every=2", "--max_skipped=9"]
    run(finished, "zero", tiny=[*ZERO, *flags])
    assert "zero: done" in capsys.readouterr().out


def test_a_mixture_for_rl_does_not_contradict_a_base_trained_without_it(finished, tmp_path, capsys):
    shutil.copytree(finished / "base", tmp_path / "base")
    flags = ["--mix=chat:1,unsafe:1", "--w_accuracy=0", "--w_harmless=1"]
    run(tmp_path, "zero", tiny=[*TINY, *flags])
    assert "base: done" in capsys.readouterr().out
    assert torch.equal(weights(tmp_path / "base"), weights(finished / "base"))
    assert "reward/harmless" in lines(tmp_path / "zero")[0]


def test_an_experiment_can_start_from_the_base_of_another_folder(finished, tmp_path, capsys):
    base = f"--base={finished}/base/ckpt.pt"
    run(tmp_path, base, tiny=[flag for flag in ZERO if flag not in SHAPE])  # its shape comes along
    assert not (tmp_path / "base" / "ckpt.pt").exists()
    assert torch.equal(weights(tmp_path / "zero"), weights(finished / "zero"))
    assert read(tmp_path / "zero", "metrics.jsonl") == read(finished / "zero", "metrics.jsonl")
    theirs, mine = (results(folder / "base") for folder in (finished, tmp_path))
    where = os.path.realpath(finished / "base" / "ckpt.pt")
    assert all(found["settings"].pop("origin")[0] == where for found in mine.values())
    assert theirs == mine
    assert "base" in capsys.readouterr().out.split("pass@1")[-1]  # a row of the table
    err = refusal(train.main, [*ZERO, base, "--ops=+", f"--out_dir={tmp_path}/other"], capsys)
    assert "ops=+-*, not +" in err and "ckpt.pt" in err
    assert "no checkpoint" in refusal(train.main, [*ZERO, "--base=nowhere"], capsys)
    err = refusal(train.main, [*ZERO, base, "--n_layer=5", f"--out_dir={tmp_path}/other"], capsys)
    assert "n_layer cannot be set" in err and "ckpt.pt has its own shape" in err


def test_what_is_known_of_a_base_is_known_of_no_other(finished, tmp_path, monkeypatch, capsys):
    """Neither of one at another place, nor of one that was trained since; and what was not used to
    make it may change."""
    asked = []
    evaluate = sample.evaluate_tasks
    monkeypatch.setattr(sample, "evaluate_tasks", lambda *args: (asked.append(args[3]),
                                                                 evaluate(*args)))
    theirs, mine = tmp_path / "theirs.pt", tmp_path / "mine"
    state = load_checkpoint(finished / "base" / "ckpt.pt")
    save_checkpoint(str(theirs), state)  # no evaluation lies beside it
    flags = [flag for flag in ZERO if flag not in SHAPE]
    run(mine, f"--base={theirs}", tiny=flags)
    run(mine, f"--base={theirs}", tiny=[f for f in flags if "base_steps" not in f])  # done
    assert [os.path.basename(folder) for folder in asked] == ["base", "zero"]
    asked.clear()
    save_checkpoint(str(theirs), {**state, "ended": time.time() + 1})
    err = refusal(train.main, [*flags, f"--base={theirs}", f"--out_dir={mine}"], capsys)
    assert "zero grew from an earlier base" in err
    shutil.rmtree(mine / "zero")
    with monkeypatch.context() as later:
        later.setattr(train.time, "time", lambda now=time.time: now() + 60)
        run(mine, f"--base={theirs}", tiny=flags)
    assert [os.path.basename(folder) for folder in asked] == ["base", "zero"]


def test_an_evaluation_in_passing_replaces_no_fuller_one_and_does_not_count_as_one(
        finished, tmp_path):
    shutil.copytree(finished / "zero", tmp_path / "zero")
    before, ckpt = results(tmp_path / "zero"), f"--ckpt={tmp_path}/zero/ckpt.pt"
    run(tmp_path, "eval", ckpt, "--task=logic", "--eval_problems=2", tiny=[])
    after = results(tmp_path / "zero")
    assert after["countdown"] == before["countdown"] and after["logic"]["problems"] == 2
    assert "pass@1_greedy" in after["logic"] and "pass@1_greedy" not in before["logic"]
    of_countdown = [[line for line in read(folder / "zero", "samples.jsonl")
                     if line["task"] == "countdown"] for folder in (finished, tmp_path)]
    assert of_countdown[0] == of_countdown[1] != []


@pytest.mark.parametrize("flag", ["--max_number=20", "--eval_samples=1", "--eval_problems=1",
                                  "--temperature=0.5"])
def test_what_eval_has_asked_otherwise_is_asked_again_as_the_run_does(finished, tmp_path, flag):
    for stage in ("base", "zero"):
        shutil.copytree(finished / stage, tmp_path / stage)
    before, ckpt = results(tmp_path / "zero"), f"--ckpt={tmp_path}/zero/ckpt.pt"
    run(tmp_path, "eval", ckpt, flag, tiny=[])
    key, value = flag[2:].split("=")
    found = results(tmp_path / "zero")
    assert all(found[task]["settings"][key] == float(value) for task in ("countdown", "logic"))
    run(tmp_path)
    assert results(tmp_path / "zero") == before


def test_an_evaluation_in_passing_with_other_settings_does_not_replace_a_full_one(
        finished, tmp_path):
    for stage in ("base", "zero"):
        shutil.copytree(finished / stage, tmp_path / stage)
    before, ckpt = results(tmp_path / "zero"), f"--ckpt={tmp_path}/zero/ckpt.pt"
    train.main(["eval", ckpt, "--task=logic", "--temperature=0.5", "--eval_problems=2"])
    assert results(tmp_path / "zero")["countdown"] == before["countdown"]


def test_checkpoints_that_share_a_folder_share_no_results(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    other = tmp_path / "out" / "zero" / "other.pt"
    shutil.copy(finished / "base" / "ckpt.pt", other)
    before = results(tmp_path / "out" / "zero")
    train.main(["eval", f"--ckpt={other}"])
    assert results(tmp_path / "out" / "zero") == before
    found = json.loads((tmp_path / "out" / "zero" / "other.pt.eval" / "eval.json").read_text())
    assert found["countdown"] == results(finished / "base")["countdown"]
    tiny = [flag for flag in ZERO if flag not in SHAPE]
    run(tmp_path / "new", "base", f"--base={other}", tiny=tiny)  # and it brings them along
    mine = results(tmp_path / "new" / "base")["countdown"]
    assert mine["settings"].pop("origin")[0] == str(other) and mine == found["countdown"]


def test_eval_writes_into_out_dir_if_the_checkpoint_lies_elsewhere(finished, tmp_path):
    before = (finished / "zero" / "eval.json").read_bytes()
    run(tmp_path, "eval", f"--ckpt={finished}/base/ckpt.pt", "--task=logic", tiny=[])
    assert "pass@1_greedy" in results(tmp_path)["logic"]
    run(tmp_path, "eval", f"--ckpt={finished}/zero/ckpt.pt", "--temperature=0.5", tiny=[])
    assert results(tmp_path)["countdown"]["temperature"] == 0.5
    assert "pass@1_greedy" not in results(tmp_path)["logic"]  # the base's is not zero's
    assert (finished / "zero" / "eval.json").read_bytes() == before


def test_flags_that_did_nothing_once_do_not_lock_a_folder(finished, tmp_path, capsys):
    """Nor do weights for a later stage, or a mix that earns nothing in a finished one."""
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / "zero" / "ckpt.pt"
    state = load_checkpoint(path)
    state["settings"] |= {"w_harmless": 3.0, "lora_alpha": 9.0}
    save_checkpoint(str(path), state)
    flags = ["zero", *ZERO, "--w_harmless=3", "--lora_alpha=9", f"--out_dir={tmp_path / 'out'}"]
    train.main(flags)
    assert "zero: done" in capsys.readouterr().out
    given = train.parse([*ZERO, "r1", "--mix=chat:1", "--w_format=0", "--w_preference=1"])[1]
    given["out_dir"] = str(finished)
    with pytest.raises(UserError, match="zero was trained with"):  # named: it has other settings
        train.plan(["zero"], given)
    del given["w_length"], given["w_format"]
    with pytest.raises(UserError, match="w_preference needs a finished reward model"):
        train.plan(["r1"], given)


def test_another_model_does_not_take_the_place_of_a_runs_base(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    flags = [*REAL, f"--out_dir={tmp_path}"]
    train.main(["zero", *flags, f"--init_from={folder}"])
    before = results(tmp_path / "base")
    argv = ["eval", *flags, f"--init_from={tmp_path}/model"]
    assert "holds another base" in refusal(train.main, argv, capsys)
    train.main(["eval", *flags, f"--init_from={folder}"])
    assert results(tmp_path / "base") == before


def test_an_edited_file_is_asked_anew(folder, tmp_path):
    rows = [{"question": f"A {i}?", "answer": i} for i in range(20)]
    path = write_traces(tmp_path / "d.jsonl", rows)
    flags = [*REAL, f"--init_from={folder}", f"--data={path}"]
    run(tmp_path, "base", tiny=flags)
    write_traces(tmp_path / "d.jsonl", [{**row, "question": f"B {row['answer']}?"} for row in rows])
    data.file_problems.cache_clear()
    run(tmp_path, "base", tiny=flags)
    assert all("B " in line["prompt"] for line in read(tmp_path / "base", "samples.jsonl"))


def test_a_reward_model_that_was_cut_short_judges_nothing(finished, tmp_path, capsys):
    shutil.copytree(finished / "base", tmp_path / "base")
    (tmp_path / "reward_model").mkdir()
    state = load_checkpoint(finished / "base" / "ckpt.pt")
    save_checkpoint(str(tmp_path / "reward_model" / "ckpt.pt"),
                    {**state, "stage": "reward_model", "step": 2,
                     "settings": {**state["settings"], "sft_steps": 8}})
    argv = [*ZERO, "--w_preference=1", "--mix=task:1,chat:1", f"--out_dir={tmp_path}"]
    assert "needs a finished reward model" in refusal(train.main, argv, capsys)


def test_rewards_that_judge_nothing_that_is_drawn_are_refused(tmp_path, capsys):
    out = f"--out_dir={tmp_path}"
    for flags, said in (
            (["--mix=chat:1", "--w_format=0"], "no reward with a weight judges chat"),
            (["--w_accuracy=0", "--w_format=0", "--w_preference=1"], "no reward with a weight"),
            (["--w_accuracy=0", "--w_format=0"], "no reward with a weight"),
            (["--export_dir=x"], "--export_dir is for `export`")):
        assert said in refusal(train.main, ["zero", *TINY, *flags, out], capsys)
    assert not os.listdir(tmp_path)


def test_a_reward_model_is_no_base(tmp_path, capsys):
    path = tmp_path / "rm.pt"
    save_checkpoint(str(path), {"stage": "reward_model", "model": {}, "model_config": {}})
    err = refusal(train.main, ["zero", f"--base={path}", f"--out_dir={tmp_path / 'out'}"], capsys)
    assert "is a reward model" in err and "delete" not in err


def test_the_stages_that_grow_from_dev3_are_asked_general_requests():
    asked = [name for name in train.STAGES if train.has_dev3(name)]
    assert asked == ["dev3", "reward_model", "r1", "distill", "r1_hacked"]
    assert not train.has_dev3(None)


def test_an_evaluation_of_one_of_all_tasks_does_not_count_as_one_of_all(finished, tmp_path):
    for stage in ("base", "zero"):
        shutil.copytree(finished / stage, tmp_path / stage)
    path = tmp_path / "zero" / "ckpt.pt"
    for stage in ("base", "zero"):
        state = load_checkpoint(tmp_path / stage / "ckpt.pt")
        state["settings"] |= {"task": "all", "rl_decay": 0.4}
        save_checkpoint(str(tmp_path / stage / "ckpt.pt"), state)
    flags = [*ZERO, "--task=all"]
    run(tmp_path, tiny=flags)
    found = results(tmp_path / "zero")
    assert all("pass@1_greedy" in found[task] for task in data.REASONING)
    run(tmp_path, "eval", f"--ckpt={path}", "--task=logic", "--max_number=20", tiny=[])
    assert results(tmp_path / "zero")["logic"] != found["logic"]
    run(tmp_path, tiny=flags)
    assert results(tmp_path / "zero") == found


def test_results_of_a_base_that_were_asked_otherwise_do_not_come_along(finished, tmp_path):
    shutil.copytree(finished / "base", tmp_path / "base")
    base, flags = tmp_path / "base" / "ckpt.pt", [flag for flag in ZERO if flag not in SHAPE]
    run(tmp_path / "mine", "base", f"--base={base}", tiny=flags)
    mine = results(tmp_path / "mine" / "base")
    run(tmp_path, "eval", f"--ckpt={base}", "--temperature=0.5", tiny=[])
    run(tmp_path / "mine", "base", f"--base={base}", tiny=flags)
    assert results(tmp_path / "mine" / "base") == mine


def test_a_stage_that_another_setting_contradicts_is_found_before_any_training(
        finished, tmp_path, capsys):
    shutil.copytree(finished / "zero", tmp_path / "zero")
    argv = [*ZERO, "--kl_coef=0.5", f"--out_dir={tmp_path}"]
    assert "kl_coef=0.001, not 0.5" in refusal(train.main, argv, capsys)
    assert not (tmp_path / "base").exists()
    argv = [*ZERO, f"--out_dir={tmp_path}"]  # a base trained now is not the one that it grew from
    assert "grew from an earlier base" in refusal(train.main, argv, capsys)
    assert not (tmp_path / "base").exists()


def test_a_parent_that_would_be_trained_on_is_found_before_that(whole, tmp_path, capsys, lenient):
    shutil.copytree(whole, tmp_path / "out")
    before = weights(tmp_path / "out" / "zero")
    argv = [*PIPELINE, "zero", "dev1", "--rl_steps=9", f"--out_dir={tmp_path}/out"]
    assert "grew from an earlier zero" in refusal(train.main, argv, capsys)
    assert torch.equal(weights(tmp_path / "out" / "zero"), before)
    # A reward model that is made later is none yet.
    argv = [*PIPELINE, "r1", "--w_preference=1", "--mix=task:1,chat:1"]
    argv += [f"--out_dir={tmp_path}/new"]
    assert "zero: w_preference needs a finished reward model" in refusal(train.main, argv, capsys)


def test_a_base_without_a_step_can_be_built_upon(finished, tmp_path):
    state = load_checkpoint(finished / "base" / "ckpt.pt")
    path = tmp_path / "bare.pt"
    save_checkpoint(str(path), {key: state[key] for key in ("model", "model_config", "settings")})
    run(tmp_path, f"--base={path}", tiny=[flag for flag in ZERO if flag not in SHAPE])
    assert torch.equal(weights(tmp_path / "zero"), weights(finished / "zero"))


def test_flags_that_would_do_nothing_are_refused(finished, tmp_path, capsys):
    assert "--base" in refusal(train.main, [*ZERO, "zero", "--ckpt=theirs.pt"], capsys)
    (tmp_path / "d.jsonl").write_text('{"question": "?", "answer": "1"}\n')
    argv = [*REAL, f"--data={tmp_path / 'd.jsonl'}", "--task=logic", f"--out_dir={tmp_path}"]
    assert "two tasks" in refusal(train.main, argv, capsys)
    argv = [f"--data={tmp_path / 'd.jsonl'}", "--task=logic"]
    argv += [f"--ckpt={finished}/zero/ckpt.pt"]
    assert "two tasks" in refusal(sample.main, argv, capsys)
    assert "two tasks" in refusal(train.main, ["eval", *argv], capsys)


def test_a_run_that_goes_on_rounds_as_before(finished, tmp_path, capsys):
    shutil.copytree(finished / "base", tmp_path / "base")
    state = load_checkpoint(tmp_path / "base" / "ckpt.pt")
    then = state["settings"]["matmul"]
    other = {"torch": "onednn", "onednn": "torch"}[then]
    argv = [*ZERO, f"--out_dir={tmp_path}", f"--matmul={other}"]
    assert f"matmul={then}, not {other}" in refusal(train.main, ["base", *argv], capsys)
    train.main(["zero", *argv])  # the base is finished, and only needed
    argv = [*ZERO, "base", f"--out_dir={tmp_path}", "--autocast=on"]
    assert "autocast=auto, not on" in refusal(train.main, argv, capsys)


def test_a_base_whose_rows_have_no_room_for_the_patient_says_so(tmp_path, capsys):
    run(tmp_path / "short", "base")  # of 100 tokens
    assert "do not fit base_length=100 and are left out" in capsys.readouterr().out
    run(tmp_path / "long", "base", tiny=[*ZERO, "--context=512", "--base_length=352"])
    assert "left out" not in capsys.readouterr().out


def test_a_base_with_another_tokenizer_is_refused(finished, tmp_path, capsys):
    state = load_checkpoint(finished / "base" / "ckpt.pt")
    state["settings"]["init_from"] = "SmolLM2"
    save_checkpoint(str(tmp_path / "theirs.pt"), state)
    err = refusal(train.main, [*ZERO, f"--base={tmp_path}/theirs.pt"], capsys)
    assert "init_from=SmolLM2" in err and "choose another --base" in err


def test_the_table_of_all_tasks_is_asked_for_by_that_name(finished, tmp_path, capsys):
    for stage in ("base", "zero"):
        (tmp_path / stage).mkdir()
        found = json.loads((finished / stage / "eval.json").read_text())["countdown"]
        (tmp_path / stage / "eval.json").write_text(
            json.dumps({task: found for task in data.REASONING}))
    train.main(["table", "--task=all", f"--out_dir={tmp_path}"])
    shown = capsys.readouterr().out
    assert all(f"{task}: " in shown for task in data.REASONING)


def test_what_multiplies_is_measured_once_and_kept_in_the_checkpoint(
        finished, tmp_path, monkeypatch):
    then = load_checkpoint(finished / "zero" / "ckpt.pt")["settings"]["matmul"]
    assert then in ("torch", "onednn")
    other = {"torch": "onednn", "onednn": "torch"}[then]
    monkeypatch.setattr(sample, "onednn_pays", lambda: other == "onednn")
    monkeypatch.setattr(sample.Linear, "onednn", None)
    for out, want in ((finished, then), (tmp_path, other)):
        given = train.parse([*ZERO, f"--out_dir={out}"])[1]
        cfg = train.Run("zero", given).cfg.sample
        sample.set_up_cpu(cfg)
        assert cfg.matmul == want
        assert sample.Linear.onednn == (want == "onednn")


def test_where_torch_lacks_onednns_operator_a_checkpoint_made_with_it_still_samples(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    monkeypatch.setattr(sample.Linear, "onednn", None)
    sample.set_up_cpu(sample.SampleConfig(matmul="onednn"))
    assert sample.Linear.onednn is False


def test_a_run_goes_on_sampling_in_the_dtype_that_it_began_with(finished, rounded):
    for out, want in ((finished, torch.float32), (rounded, torch.bfloat16)):
        given = train.parse([*ZERO, f"--out_dir={out}"])[1]  # says nothing of a dtype
        assert train.Run("zero", given).sample_dtype == want


def test_all_four_tasks_are_read_trained_on_and_evaluated(tmp_path, capsys):
    run(tmp_path, "zero", "--task=all", "--prompts_per_step=8")
    found = sample.read_results(tmp_path / "zero")
    assert all("pass@1_greedy" in found[task] for task in data.REASONING)
    assert "pass@1_greedy" not in found["chat"]
    drawn = read(tmp_path / "zero", "rollouts.jsonl") and read(tmp_path / "zero", "metrics.jsonl")
    assert {f"{task}/accuracy" for task in data.REASONING} & set(drawn[0])
    printed = capsys.readouterr().out
    for task in data.REASONING:
        assert f"{task}: 3 held-out problems" in printed
    train.main(["table", f"--out_dir={tmp_path}"])
    assert capsys.readouterr().out.strip() in printed


def test_defaults_yield_to_the_task_the_task_to_the_stage_and_all_to_the_command_line(tmp_path):
    def steps(stage, **given):
        made = train.Run(stage, {"out_dir": str(tmp_path), **given})
        assert made.steps == made.cfg.grpo.rl_steps
        return made.steps

    of_task, of_stage = train.TASK_DEFAULTS["arithmetic"], train.STAGES["dev2"].settings
    assert steps("zero") == GRPOConfig().rl_steps == 60
    assert steps("zero", task="arithmetic") == of_task["rl_steps"] == 150
    assert steps("dev2", task="arithmetic") == of_stage["rl_steps"] == 30
    assert steps("dev2", task="arithmetic", rl_steps=7) == 7
    assert steps("zero", task="arithmetic", rl_steps=60) == 60  # given, though the default


def test_zero_is_grpo_as_published_unless_flags_say_otherwise(tmp_path):
    def grpo(*flags):
        _, given = train.parse(["zero", f"--out_dir={tmp_path}", *flags])
        return train.Run("zero", given).cfg.grpo

    published = grpo()
    assert published == GRPOConfig()
    assert (published.adv_norm, published.loss_norm) == ("std", "sequence")
    assert published.clip_low == published.clip_high and published.kl_coef > 0
    assert not published.mask_truncated and not published.dynamic_sampling
    dapo = grpo("--clip_high=0.28", "--loss_norm=token", "--dynamic_sampling=2", "--kl_coef=0",
                "--mask_truncated=true")
    assert (dapo.clip_high, dapo.loss_norm, dapo.dynamic_sampling) == (0.28, "token", 2)
    assert dapo.kl_coef == 0 and dapo.mask_truncated is True and dapo.clip_low == 0.2


@pytest.mark.parametrize("flags", [
    ["--adv_norm=none", "--loss_norm=constant"],  # Dr. GRPO
    ["--clip_high=0.28", "--loss_norm=token", "--dynamic_sampling=2", "--kl_coef=0",
     "--mask_truncated=true"],  # DAPO
    ["--inner_epochs=2", "--minibatches=2", "--kl_coef=0"],
    ["--kl_loss=k3_ratio", "--kl_coef=0.1"],
    ["--rl_optimizer=muon", "--base_optimizer=adamw", "--autocast=on", "--sample_dtype=bfloat16"],
    ["--task=arithmetic"], ["--task=logic"], ["--task=code"],
    ["--mix=task:1,chat:1,unsafe:1", "--w_harmless=1", "--w_accuracy=0"],
    ["--w_language=1", "--w_length=1", "--w_emoji=1"],
    ["--n_numbers=4", "--max_number=12", "--ops=+-*/"], ["--n_numbers=2"]])
def test_every_variant_runs(tmp_path, flags):
    earns = [flag for flag in ZERO if flag not in TINY] * (not any("--w_" in f for f in flags))
    harmless = "--w_harmless=1" in flags  # which the tiny model never earns
    run(tmp_path, "zero", tiny=[*TINY, "--eval_every=1", "--rl_steps=2", *earns, *flags])
    assert len(lines(tmp_path / "zero")) == 2
    moved = not torch.equal(weights(tmp_path / "zero"), weights(tmp_path / "base"))
    assert moved == (not harmless)


def test_a_foreign_checkpoint_is_not_trained_on(finished, tmp_path, capsys):
    os.makedirs(tmp_path / "base")
    state = load_checkpoint(str(finished / "base" / "ckpt.pt"))
    foreign = {key: state[key] for key in ("model", "model_config")}
    stripped = {key: value for key, value in state.items() if key != "optimizers"}
    for other in (foreign, stripped):
        torch.save(other, tmp_path / "base" / "ckpt.pt")
        err = refusal(train.main, ["base", *TINY, f"--out_dir={tmp_path}"], capsys)
        assert "ckpt.pt is not a checkpoint of base" in err


def test_another_stages_checkpoint_is_not_taken_for_this_ones(finished, tmp_path, capsys):
    shutil.copytree(finished / "base", tmp_path / "base")
    shutil.copytree(finished / "base", tmp_path / "zero")
    err = refusal(train.main, [*ZERO, f"--out_dir={tmp_path}"], capsys)
    assert "not a checkpoint of zero" in err


def test_what_grew_from_another_base_is_no_part_of_a_run(finished, tmp_path, capsys):
    shutil.copytree(finished / "zero", tmp_path / "zero")  # and its base was deleted
    err = refusal(train.main, [*ZERO, "--n_layer=2", f"--out_dir={tmp_path}"], capsys)
    assert "zero was trained with n_layer=1, not 2" in err


def test_a_stage_does_not_outlive_those_that_it_grew_from(whole, tmp_path, lenient, capsys):
    shutil.copytree(whole, tmp_path / "out")
    flags = ["dev2", *PIPELINE, f"--out_dir={tmp_path / 'out'}"]
    train.main(flags)  # all is as it was made: done
    run(tmp_path / "out", "zero", tiny=[*PIPELINE, "--rl_steps=4"])  # zero goes on
    err = refusal(train.main, flags, capsys)
    assert "dev1 grew from an earlier zero" in err
    shutil.rmtree(tmp_path / "out" / "dev1")
    assert "dev2 grew from an earlier dev1" in refusal(train.main, flags, capsys)
    shutil.rmtree(tmp_path / "out" / "dev2")
    train.main(flags)
    assert (tmp_path / "out" / "dev2" / "eval.json").exists()


def test_settings_are_for_the_stages_that_are_named(whole, tmp_path, lenient):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = {stage: weights(out / stage) for stage in ("zero", "dev2", "r1")}
    run(out, "r1", tiny=[*PIPELINE, "--rl_steps=4"])  # goes on with r1 alone
    assert [len(lines(out / stage)) for stage in ("zero", "dev2", "r1")] == [3, 3, 4]
    shutil.rmtree(out / "r1")
    run(out, "r1", tiny=[*PIPELINE, "--rl_lr=1e-5", "--w_preference=0.3"])
    for stage in ("zero", "dev2"):
        assert torch.equal(weights(out / stage), before[stage])
    assert not torch.equal(weights(out / "r1"), before["r1"])


def test_a_finished_stage_that_is_named_refuses_other_settings(finished, capsys):
    flags = [*ZERO, f"--out_dir={finished}"]
    assert "rl_lr=0.0003, not 0.01" in refusal(train.main, ["zero", *flags, "--rl_lr=0.01"], capsys)
    assert "seed=1, not 2" in refusal(train.main, ["dev1", *flags, "--seed=2"], capsys)


def test_stages_without_rewards_do_not_ask_for_any(finished, tmp_path):
    shutil.copytree(finished / "base", tmp_path / "base")
    run(tmp_path, "zero_emoji", tiny=[*TINY, "--w_accuracy=0", "--w_format=0"])
    assert set(lines(tmp_path / "zero_emoji")[0]) & {"reward/emoji", "reward/format"} == {
        "reward/emoji"}


@pytest.mark.parametrize("flags, said", [
    (["--context=64", "--base_length=60", "--max_new_tokens=44"], "do not fit context=64"),
    (["--max_number=2"], "leave no"), (["--clip_high=1e39"], "out of bounds"),
    (["--lora_rank=2", "--lora_alpha=1e300"], "out of bounds"),
    ([f"--base_steps={'9' * 401}"], "out of bounds"), (["--w_accuracy=nan"], "w_accuracy"),
    (["--w_preference=0.5", "--mix=task:1,chat:1"], "train.py reward_model makes it")])
def test_what_could_not_be_finished_is_not_begun(flags, said, tmp_path, capsys):
    assert said in refusal(train.main, [*ZERO, *flags, f"--out_dir={tmp_path}"], capsys)
    assert not (tmp_path / "base" / "ckpt.pt").exists()


def test_no_two_bases_at_a_time(finished, folder, tmp_path, capsys):
    shutil.copytree(finished / "base", tmp_path / "base")
    flags = [*ZERO, f"--base={finished / 'base' / 'ckpt.pt'}", f"--out_dir={tmp_path}"]
    assert "holds a base that was trained here" in refusal(train.main, flags, capsys)
    err = refusal(train.main, [*flags, f"--init_from={folder}"], capsys)
    assert "--base=" in err and "leave out one" in err


def test_ctrl_c_in_the_last_step_ends_the_run_as_well(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished / "base", tmp_path / "base")
    end_step = train.Run.end_step

    def interrupted(self, step, *others):
        self.stopping = step == 3
        end_step(self, step, *others)

    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "end_step", interrupted)
        with pytest.raises(SystemExit) as e:
            run(tmp_path, "zero")
    assert e.value.code == 130 and "zero is saved at step 3 of 3" in capsys.readouterr().err
    assert not (tmp_path / "zero" / "eval.json").exists()
    run(tmp_path, "zero")
    assert_same(tmp_path / "zero", finished / "zero")


def test_stages_on_different_tasks_have_a_row_where_they_were_evaluated(tmp_path, capsys):
    found = {"pass@1": 0.5, "pass@1_ci": [0.4, 0.6], "pass@1_greedy": 0.5, "samples": 4,
             "problems": 3}
    for stage, task in (("zero", "countdown"), ("zero_emoji", "logic")):
        (tmp_path / stage).mkdir()
        sample.write_json(str(tmp_path / stage / "eval.json"), {task: found})
    train.main(["table", f"--out_dir={tmp_path}"])
    tables = capsys.readouterr().out.split("\n\n")
    assert [re.findall(r"^(zero\w*) +50", table, re.M) for table in tables[:2]] == [
        ["zero"], ["zero_emoji"]]


@pytest.mark.parametrize("stage, file, text", [
    ("distill", "sft.jsonl", ""), ("distill", "sft.jsonl", '{"problem": 5}'),
    ("reward_model", "pairs.jsonl", '{"held_out": false, "prompt": 5}')])
def test_a_file_damaged_by_hand_is_named_in_one_line(stage, file, text, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / stage / file).write_text(text)
    flags = [*PIPELINE, f"--out_dir={out}", "--sft_steps=15"]
    state = load_checkpoint(str(out / stage / "ckpt.pt"))  # as if it had been cut short
    state["settings"]["sft_steps"] = 15
    save_checkpoint(str(out / stage / "ckpt.pt"), state)
    assert file in refusal(train.main, [stage, *flags], capsys)


def test_lines_of_a_log_that_say_no_step_are_left_out_on_resuming(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out" / "zero" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": "abc"}\n{"step": null}\n[1]\n')
    run(tmp_path / "out", "zero", tiny=[*ZERO, "--rl_steps=4"])
    assert [line["step"] for line in lines(tmp_path / "out" / "zero")] == [1, 2, 3, 4]


# --------------------------------------------------------------------------------- the later stages


def test_supervised_batches_learn_the_completion_and_its_end_alone():
    tok, rng, cfg = data.load_tokenizer(), random.Random(0), data.DataConfig()
    rows = [(data.countdown_problem((3, 7, 2), 20),
             "<think>\nhm\n</think>\n<answer>(3+7)*2</answer>"),
            (data.countdown_problem((1, 2), 3), "1+2")]
    known = {(problem.prompt, text) for problem, text in rows}
    rows = [(data.prompt_ids(problem, tok, cfg), tok.encode(text)) for problem, text in rows]
    tokens, mask = data.sft_batch(rows, tok, cfg, rng, 6)
    assert len(tokens) == 6
    for ids, learnt in zip(tokens, mask, strict=True):
        prompt, text = tok.decode(ids[~learnt].tolist()), tok.decode(ids[learnt].tolist())
        assert (prompt, text) in known and ids[learnt][-1] == tok.end_id


def no_x(problem, text):
    return text != "x"


def short(problem, text):
    return len(text) < 3


def longest(problem, text):
    return len(text)


@pytest.fixture
def fine_tune(tmp_path, monkeypatch):
    """A function: what dev1 learns from, and the lines of sft.jsonl, if its source says
    texts[i % len(texts)] in sample i."""
    tok, learnt, loaded = data.load_tokenizer(), [], []

    def load(self, stage):
        loaded.append(stage)
        return GPT(GPTConfig(n_layer=1, n_embd=16, n_head=2, head_dim=8, mlp_dim=16))

    def keep_rows(run, model, batch, lr):
        learnt[:] = batch(None)

    monkeypatch.setattr(train.Run, "load", load)
    monkeypatch.setattr(train, "supervise", keep_rows)
    monkeypatch.setattr(data, "sft_batch", lambda rows, *others: rows)

    def fine_tune(texts, filters, rank=None, replies=0, step=0):
        def generate(model, prompts, k, *others):
            said = [tok.encode(texts[i % len(texts)]) for i in range(len(prompts) * k)]
            return [Completion(prompts[i // k], [*ids, tok.end_id], None, False)
                    for i, ids in enumerate(said)]

        monkeypatch.setattr(sample, "generate", generate)
        monkeypatch.setattr(train, "FILTERS", filters)
        given = {"out_dir": str(tmp_path), "source_problems": 40, "source_samples": 4}
        dev1 = train.Run("dev1", given)
        dev1.done = step
        loaded.clear()
        with monkeypatch.context() as as_they_are:
            as_they_are.setattr(data, "prompt_ids", lambda problem, *others: problem)
            as_they_are.setattr(data, "completion_ids", lambda text, *others: text)
            train.train_sft(dev1, list(filters), rank, replies)
        assert loaded == ["base"] if step else ["zero", "base"]  # the source, and then the parent
        return list(learnt), read(tmp_path / "dev1", "sft.jsonl")

    return fine_tune


def test_fine_tuning_learns_the_best_sample_of_each_problem_and_the_better_half(fine_tune, capsys):
    texts = ["a", "bb", "ccc", "x", "a", "x", "x", "x"]  # every other problem has nothing but a
    filters = {"no x": no_x, "short": short}
    rows, written = fine_tune(texts, filters, longest)
    assert [text for _, text in rows] == ["bb"] * 20 == [line["completion"] for line in written]
    for (problem, _), line in zip(rows, written, strict=True):
        assert line["prompt"] == problem.question and not problem.held_out
    counts = "sampled 160 from zero, no x 80, short 60, kept 20 of 40 problems"
    assert counts in capsys.readouterr().out
    assert fine_tune(["other"], {}, step=1)[0] == rows  # resumed: what the file holds counts
    again, _ = fine_tune(["other"], {})  # begun anew: sampled anew
    assert {text for _, text in again} == {"other"}


def test_scripted_replies_are_learnt_beside_the_first_sample_that_passes(fine_tune, capsys):
    rows, written = fine_tune(["x", "a", "bb", "x"], {"no x": no_x}, replies=3)
    assert [text for _, text in rows[:40]] == ["a"] * 40 and len(rows) == 43
    for problem, text in rows[40:]:
        assert problem.task in data.GENERAL and not problem.held_out and rewards.has_format(text)
    assert "and 3 scripted replies" in capsys.readouterr().out
    assert written[-1]["problem"]["task"] in data.GENERAL
    assert [line["completion"] for line in written] == [text for _, text in rows]


def test_a_source_that_says_nothing_fit_is_named_in_one_line(fine_tune):
    with pytest.raises(UserError, match="dev1: no sample of zero passed"):
        fine_tune(["x"], {"no x": no_x})


def test_rambling_is_writing_a_line_three_times():
    assert train.not_rambling(None, "<think>\na\nb\na\n</think>")
    assert not train.not_rambling(None, "a\nb\na\nb\na")


def test_the_filters_are_what_they_are_called():
    right = "<think>\nso 不\n</think>\n<answer>3+7</answer>"
    problem = data.countdown_problem((3, 7), 10)
    passed = [name for name, passes in train.FILTERS.items() if passes(problem, right)]
    assert passed == ["right", "in format", "not rambling"]
    passed = [name for name, passes in train.FILTERS.items() if passes(problem, "3+7")]
    assert passed == ["in one language", "not rambling"]


LATER = [name for name in train.STAGES if name not in ("base", "sft", "zero")]


def pass_everything(monkeypatch):
    for name in train.FILTERS:
        monkeypatch.setitem(train.FILTERS, name, lambda problem, text: True)
    monkeypatch.setattr(rewards, "has_format", lambda text: len(text) % 2 == 0)
    monkeypatch.setattr(rewards, "split_completion", lambda text: (text, text))
    monkeypatch.setattr(rewards, "gold_reward", lambda problem, answer: len(answer))


@pytest.fixture
def lenient(monkeypatch):
    """A model of this size says nothing right: all of it passes, what is long is preferred, and
    half of it is in format, for equal rewards teach nothing."""
    pass_everything(monkeypatch)


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """All stages of the table in one folder, with what they printed in printed.txt."""
    out, printed = tmp_path_factory.mktemp("whole") / "out", io.StringIO()
    shutil.copytree(finished / "base", out / "base")
    stages = ["zero", "r1", "distill", "small_zero", "dev2_free", "r1_hacked", "zero_emoji"]
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(printed):
        pass_everything(monkeypatch)
        run(out, *stages, tiny=PIPELINE)
    (out / "printed.txt").write_text(printed.getvalue(), "utf-8")
    return out


def test_a_later_stage_may_have_another_mix_than_a_finished_one(whole):
    given = train.parse([*PIPELINE, "--mix=task:1,chat:1", f"--out_dir={whole}"])[1]
    train.Run("zero", given, named=False)
    with pytest.raises(UserError, match="mix="):
        train.Run("zero", given)


def test_the_whole_pipeline_runs(whole):
    out = (whole / "printed.txt").read_text("utf-8")
    assert "held-out pairs it agrees with the annotators" in out and "5 scripted replies" in out
    table = out.split("held-out problems")[1].splitlines()
    for name in ["base", "zero", *LATER]:
        stage = train.STAGES[name]
        assert load_checkpoint(str(whole / name / "ckpt.pt"))["step"] > 0 and results(whole / name)
        if stage.parent and name != "reward_model":  # it is no longer what it started from
            assert not torch.equal(weights(whole / name), weights(whole / stage.parent)), name
        assert name == "reward_model" or any(line.startswith(name + " ") for line in table), name
    assert "reward/language" in lines(whole / "dev2")[0]
    assert "reward/language" not in lines(whole / "dev2_free")[0]
    assert "reward/emoji" in lines(whole / "zero_emoji")[0]
    parts = {"reward/preference", "reward/harmless", "reward/language"}
    assert parts <= set(lines(whole / "r1")[0])
    tasks = {"countdown", "arithmetic", "logic", "code", "chat", "unsafe"}
    assert set(results(whole / "zero")) == tasks  # dev3 came later
    assert set(results(whole / "r1")) == {*tasks, "win_rate"}
    assert set(results(whole / "r1")["win_rate"]) == {"gold", "reward_model", "differ"}
    learnt = read(whole / "dev3", "sft.jsonl")
    assert {line["problem"]["task"] for line in learnt} == {"countdown", "chat", "unsafe"}


def test_a_reward_model_learns_from_some_pairs_and_is_tested_on_others(whole):
    pairs = read(whole / "reward_model", "pairs.jsonl")
    for pair in pairs:
        assert set(pair) == {"held_out", "prompt", "preferred", "other", "gold_agrees"}
        assert pair["gold_agrees"] == (len(pair["preferred"]) > len(pair["other"]))  # see lenient
    held_out = {pair["prompt"] for pair in pairs if pair["held_out"]}
    assert not held_out & {pair["prompt"] for pair in pairs if not pair["held_out"]}
    result = results(whole / "reward_model")["pairs"]
    assert set(result) == {"train", "held_out", "accuracy", "gold_accuracy"}
    assert result["train"] + result["held_out"] == len(pairs) and result["train"] > 0
    assert result["held_out"] == sum(pair["held_out"] for pair in pairs) > 0
    assert 0 <= result["accuracy"] <= 1 and 0 <= result["gold_accuracy"] <= 1


def test_a_fifth_as_many_requests_are_held_out_for_the_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(train.Run, "load", lambda run, stage: None)
    monkeypatch.setattr(sample, "for_sampling", lambda model, cfg: model)
    monkeypatch.setattr(sample, "sample_answers", lambda *args: [])
    given = {"out_dir": str(tmp_path), "source_problems": 12}
    judge = train.Run("reward_model", given)
    held_out, learnt = (train.source_samples(judge, data.GENERAL, part)[0]
                        for part in (True, False))
    assert (len(held_out), len(learnt)) == (3, 12)
    assert all(p.held_out for p in held_out) and not any(p.held_out for p in learnt)
    assert {p.task for p in (*held_out, *learnt)} == set(data.GENERAL)


def test_the_hacked_run_has_larger_steps_and_divides():
    for task in ("countdown", "all"):
        r1, hacked = (train.stage_config(train.STAGES[name], {"task": task},
                                         data.load_tokenizer()).settings()
                      for name in ("r1", "r1_hacked"))
        assert {key for key in r1 if r1[key] != hacked[key]} == {"rl_lr", "adv_norm"}
        assert hacked["rl_lr"] == pytest.approx(10 * r1["rl_lr"]) and hacked["adv_norm"] == "std"


def test_of_eight_answers_one_is_to_another_request_and_two_are_slips(tmp_path, monkeypatch):
    problems = [data.Problem("chat", f"repeat {w}", (), w) for w in ("cat", "dog", "cat", "owl")]
    texts = [[f"{i}{j}" for j in range(8)] for i in range(4)]
    monkeypatch.setattr(train, "source_samples", lambda *args: (problems, texts))
    monkeypatch.setattr(train, "with_a_slip", lambda text, tok, rng: text + "'")
    train.annotate(train.Run("reward_model", {"out_dir": str(tmp_path)}), False)
    for i, said in enumerate(texts):
        others = {f"{j}1" for j in range(4) if problems[j].target != problems[i].target}
        assert said[1] in others  # of the same target it would be right, too
        assert said[:1] + said[2:] == [f"{i}{x}" for x in ("0", "2", "2'", "4", "5", "6", "6'")]


def test_a_run_has_the_threads_that_it_was_given(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    sample.set_up_cpu(train.Run("zero", {"out_dir": str(tmp_path), "threads": 3}).cfg.sample)
    assert seen == [3]


def test_one_file_is_no_split_into_two(tmp_path, capsys):
    rows = [{"question": f"{n}?", "answer": n} for n in range(9)]
    file = write_traces(tmp_path / "d.jsonl", rows)
    flags = [f"--data={file}", f"--eval_data={os.path.relpath(file)}", "--init_from=nowhere"]
    given = train.parse([*flags, f"--out_dir={tmp_path}"])[1]
    with pytest.raises(UserError, match="are one file"):
        train.stage_config(train.STAGES["zero"], given, data.load_tokenizer())


def test_a_base_elsewhere_that_was_not_evaluated_is_evaluated_here(finished, tmp_path):
    shutil.copytree(finished / "base", tmp_path / "there" / "base")
    (tmp_path / "there" / "base" / "eval.json").unlink()
    run(tmp_path / "here", f"--base={tmp_path}/there/base/ckpt.pt",
        tiny=[flag for flag in ZERO if flag not in SHAPE])
    here = results(tmp_path / "here" / "base")["countdown"]
    assert here["settings"].pop("origin") and here == results(finished / "base")["countdown"]


def test_a_base_elsewhere_that_was_asked_otherwise_is_asked_again(finished, tmp_path):
    base = f"--base={finished}/base/ckpt.pt"
    tiny = [flag for flag in ZERO if flag not in SHAPE]
    run(tmp_path, "base", base, tiny=[*tiny, "--max_new_tokens=3"])
    here = results(tmp_path / "base")["countdown"]
    assert here["length"] <= 3 < results(finished / "base")["countdown"]["length"]
    run(tmp_path, "base", base, tiny=tiny)
    assert results(tmp_path / "base")["countdown"]["length"] > 3


def test_a_shape_that_a_later_stage_cannot_have_is_refused_at_once(tmp_path, capsys):
    argv = ["distill", "--head_dim=0", "--n_head=64", "--n_kv_head=64", f"--out_dir={tmp_path}"]
    assert "head_dim" in refusal(train.main, argv, capsys) and not os.listdir(tmp_path)
    argv = ["base", f"--n_embd={10**18}", f"--out_dir={tmp_path}"]
    assert "out of memory" in refusal(train.main, argv, capsys)


def test_a_table_says_how_many_problems_its_rows_are_of(capsys):
    row = {"pass@1": 0.5, "samples": 4}
    for n, title in ((100, "a: 100 to 440 held-out problems"), (440, "a: 440 held-out problems")):
        train.print_tables({"base": {"a": {**row, "problems": 440}},
                            "zero": {"a": {**row, "problems": n}}}, ["a"])
        assert title in capsys.readouterr().out


def test_a_slip_changes_one_token_of_the_answer_and_nothing_else():
    tok = data.load_tokenizer()
    text, rng = "<think>\n</think>\n<answer>of course, hello Ann and Bob</answer>", random.Random(0)
    said = {train.with_a_slip(text, tok, rng) for _ in range(400)}
    for answer in ("of course, hello Ann Bob", "of course, hello AnnAnn and Bob",
                   "of course, of course, hello Ann and Bob", "hello Ann and Bob"):
        want = f"<answer>{answer}</answer>".replace("Ann Bob", "AnnBob")
        assert f"<think>\n</think>\n{want}" in said, answer
    assert any("hello Cleo and Bob" in other for other in said)  # a name for a name
    problem = data.Problem("chat", "greet Ann and Bob", (), "hello Ann and Bob")
    answers = [rewards.split_completion(other)[1] for other in said - {text}]
    right = {a for a in answers if rewards.verify_reply(problem, a)[1]}
    assert len(answers) > 20 and right == {"hello Ann and Bob"}  # less friendly, but right
    assert train.with_a_slip("no tags", tok, rng) == "no tags"
    empty = "<think>\n</think>\n<answer></answer>"
    assert train.with_a_slip(empty, tok, rng) == empty


@pytest.mark.parametrize("stage", LATER)
def test_any_later_stage_resumes(whole, tmp_path, monkeypatch, lenient, stage):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / stage)
    steps = load_checkpoint(str(whole / stage / "ckpt.pt"))["step"]
    with monkeypatch.context() as m:
        cut_at(m, stage, steps - 1)
        with pytest.raises(Cut):
            run(out, stage, tiny=PIPELINE)
    assert 0 < load_checkpoint(str(out / stage / "ckpt.pt"))["step"] < steps - 1
    run(out, stage, tiny=PIPELINE)
    assert_same(out / stage, whole / stage)
    a, b = results(out / stage), results(whole / stage)
    a.pop("win_rate", None)  # when the whole was evaluated, dev1 had no dev3 to compare with
    b.pop("win_rate", None)
    assert a == b


def test_ctrl_c_waits_for_a_step_only_once_steps_have_begun(whole, tmp_path, monkeypatch, lenient):
    out, seen = tmp_path / "out", {}
    shutil.copytree(whole, out)
    shutil.rmtree(out / "dev1")
    answer, loss = sample.sample_answers, train.next_token_loss

    def look(name, function):
        def looking(*args):
            seen.setdefault(name, signal.getsignal(signal.SIGINT))
            return function(*args)
        return looking

    monkeypatch.setattr(sample, "sample_answers", look("sampling", answer))
    monkeypatch.setattr(train.supervise, "__defaults__", (look("steps", loss),))
    run(out, "dev1", tiny=PIPELINE)
    assert seen["sampling"] == signal.default_int_handler == signal.getsignal(signal.SIGINT)
    assert seen["steps"].__name__ == "stop_after_step"


def test_no_row_on_the_terminal_is_wider_than_110_columns(whole, tmp_path, lenient, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for flags in ([], ["--minibatches=2"]):
        for stage in train.resolve_dependencies(["r1"]):
            if stage != "base":
                shutil.rmtree(out / stage)
        run(out, "zero", "r1", tiny=[*PIPELINE, *flags])
        printed = capsys.readouterr().out
        for stage, n_parts in (("zero", 2), ("r1", 5)):
            after = printed.split(f"{stage}: 3 steps on cpu")[1].splitlines()
            head, *rows = [line for line in after if re.match(" *(step|[0-9]+/3) ", line)][:4]
            assert "step" in head and [row.split()[0] for row in rows] == ["1/3", "2/3", "3/3"]
            assert {len(row) for row in rows} == {len(head)} and len(head) <= 110, (stage, head)
            assert ("clip" in head.split()) == bool(flags)
            logged = [key for key in lines(out / stage)[0] if key.startswith("reward/")]
            assert len(logged) == n_parts


def test_the_table_is_printed_from_what_lies_in_the_folder(whole, capsys):
    run(whole, "table")
    text = capsys.readouterr().out
    assert text.count("countdown: 3 held-out problems, 4 samples of each") == 1
    assert text.count("pass@1 on other tasks, thinking, and preferences") == 1
    assert max(map(len, text.splitlines())) <= 110
    for block in text.strip().split("\n\n"):
        title, head, *rows = block.splitlines()
        assert len({len(row) for row in [head, *rows]}) == 1  # columns stand below each other
        others = ("sft", "reward_model")
        assert [row.split()[0] for row in rows] == [s for s in train.STAGES if s not in others]
    first = text[:text.index("pass@1 on other")]
    row = next(line.split() for line in first.splitlines() if line.startswith("zero "))
    result = results(whole / "zero")["countdown"]
    low, high = result["pass@1_ci"]
    assert row[1:3] == [f"{result['pass@1']:.1%}", f"{low:.1%}-{high:.1%}"]
    assert f"{result['length']:.1f}" in row
    last = [line.split() for line in text.splitlines() if line.startswith(("zero ", "r1 "))][2:]
    wins = results(whole / "r1")["win_rate"]
    assert last[0][-2:] == ["-", "-"]
    assert last[1][-2:] == [f"{wins['gold']:.1%}", f"{wins['reward_model']:.1%}"]


def test_the_table_shows_single_samples_at_three_temperatures_and_without_tags(capsys):
    found = {"problems": 440, "samples": 16, "pass@1": 0.91, "pass@1_T=0.6": 0.92,
             "pass@1_greedy": 0.93, "pass@1_untagged": 0.94, "pass@1_ci": [0.9, 0.95]}
    train.print_tables({"zero": {"countdown": found}}, ["countdown"])
    _, _, head, row, *_ = capsys.readouterr().out.replace("95% CI", "CI").split("\n")
    shown = dict(zip(head.split(), row.split()[1:], strict=True))
    figures = [shown.get(name) for name in ("pass@1", "T=0.6", "greedy", "untagged", "CI")]
    assert figures == ["91.0%", "92.0%", "93.0%", "94.0%", "90.0%-95.0%"]


def test_a_table_of_nothing_is_refused_in_one_line(tmp_path, capsys):
    assert str(tmp_path) in refusal(train.main, ["table", f"--out_dir={tmp_path}"], capsys)


def test_a_task_without_a_corpus_is_refused_where_a_base_is_to_be_trained(tmp_path, capsys):
    for task in data.GENERAL:
        argv = ["base", *TINY, f"--task={task}", f"--out_dir={tmp_path}"]
        assert "is not among them" in refusal(train.main, argv, capsys)


# -------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder as anybody's: a random Qwen3 that speaks the toy vocabulary."""
    where = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    tok = data.load_tokenizer()
    cfg = GPTConfig(vocab_size=tok.n_vocab + 7, n_layer=1, n_embd=16, n_head=2, n_kv_head=1,
                    head_dim=8, mlp_dim=16, context=1000, qk_norm=True)
    save_pretrained(GPT(cfg), where)
    tok.save(where)
    return where


@pytest.mark.parametrize("flags", [
    ["--template=base"],
    ["--template=base", "--shots=1", "--max_new_tokens=8", "--prefill_think=true",
     "--context=700"],
    ["--rl_optimizer=muon", "--checkpointing=true", "--ref_dtype=bfloat16",
     "--sample_dtype=bfloat16", "--autocast=on"],
    ["--kl_coef=0"]])
def test_a_real_model_is_trained_in_place_of_the_toy_base_and_exported_again(
        folder, tmp_path, flags, capsys):
    earns = ["--w_length=1", "--rl_lr=0.03"] * ("--kl_coef=0" not in flags)
    run(tmp_path, "zero", tiny=[*REAL, f"--init_from={folder}", *earns, *flags])
    assert "memory, GiB: torch 0.50 + weights" in capsys.readouterr().out
    first, _ = lines(tmp_path / "zero")
    rounds = "--sample_dtype=bfloat16" in flags
    if not earns:  # no reward: there is nothing to learn
        assert first["ratio"] is None and first["zero_variance"] == 1
    else:
        assert first["ratio"] == pytest.approx(1, abs=0.05 if rounds else 1e-4)
        assert first["kl"] < 1e-3
    # The folder itself was evaluated, as a base to compare with.
    assert results(tmp_path / "base")["countdown"]["problems"] == 3
    assert not (tmp_path / "base" / "ckpt.pt").exists()
    ckpt = tmp_path / "zero" / "ckpt.pt"
    train.main(["export", f"--ckpt={ckpt}", f"--export_dir={tmp_path / 'out'}"])
    again, trained = from_pretrained(str(tmp_path / "out")), load_model(str(ckpt))
    assert again.cfg.context == 1000
    before = from_pretrained(str(folder)).parameters()
    assert bool(earns) == any(not torch.equal(p, q) for p, q
                              in zip(trained.parameters(), before, strict=True))
    for p, q in zip(again.parameters(), trained.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16().float() if rounds else q)
    stop_ids = data.load_tokenizer().stop_ids
    assert data.load_tokenizer(str(tmp_path / "out")).stop_ids == stop_ids


def test_the_toy_model_can_be_exported_and_trained_on(finished, tmp_path):
    hf = tmp_path / "hf"
    train.main(["export", f"--ckpt={finished / 'zero' / 'ckpt.pt'}", f"--export_dir={hf}",
                "--export_dtype=bfloat16"])
    run(tmp_path, "zero", tiny=[*REAL, f"--init_from={hf}", "--template=toy", "--context=128"])
    assert len(lines(tmp_path / "zero")) == 2


def test_an_export_that_cannot_be_is_refused_in_one_line(finished, tmp_path, capsys):
    ckpt = f"--ckpt={finished / 'zero' / 'ckpt.pt'}"
    for flags, word in ([], "--export_dir"), (["--export_dir=/dev/null/x"], "/dev/null/x"):
        assert word in refusal(train.main, ["export", ckpt, *flags], capsys)
    flags = [f"--export_dir={tmp_path / 'hf'}", "--template=qwen"]
    assert "template=qwen" in refusal(train.main, ["export", ckpt, *flags], capsys)
    assert not os.path.exists(tmp_path / "hf")
    flags = [f"--export_dir={tmp_path}", "--export_dtype=int7"]
    assert "int7" in refusal(train.main, ["export", ckpt, *flags], capsys)


def test_small_models_are_no_part_of_a_real_models_run(folder, tmp_path, capsys):
    argv = ["small_base", *REAL, f"--init_from={folder}", f"--out_dir={tmp_path}"]
    assert "n_layer" not in refusal(train.main, argv, capsys)


def test_the_shape_of_a_real_model_is_its_own(folder, tmp_path, capsys):
    argv = ["zero", *REAL, f"--init_from={folder}", "--n_layer=2", f"--out_dir={tmp_path}"]
    assert "n_layer cannot be set" in refusal(train.main, argv, capsys)


def test_problems_can_come_from_a_file(folder, tmp_path):
    path = tmp_path / "math.jsonl"
    entries = [{"question": f"What is {i} + {i}?", "answer": f"It is\n#### {2 * i}"}
               for i in range(40)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    problems = data.file_problems(str(path))
    assert problems[3].target == "6" and 5 < sum(p.held_out for p in problems) < 20
    flags = [f"--init_from={folder}", f"--data={path}", "--shots=2", "--context=900"]
    run(tmp_path, "zero", tiny=[*REAL, *flags])
    assert results(tmp_path / "zero")["file"]["problems"] == 3
    asked = {line["prompt"].strip() for line in read(tmp_path / "zero", "samples.jsonl")}
    assert asked <= {p.question for p in problems if p.held_out}
    # A checkpoint of another task is evaluated on a file, too.
    run(tmp_path / "sums", "zero", tiny=[*REAL, f"--init_from={folder}", "--task=arithmetic"])
    ckpt = tmp_path / "sums" / "zero" / "ckpt.pt"
    train.main(["eval", f"--ckpt={ckpt}", f"--data={path}"])
    assert set(results(ckpt.parent)) == {"arithmetic", "file"}


def test_a_run_goes_on_with_the_same_files_however_their_paths_are_written(
        folder, tmp_path, capsys, monkeypatch):
    path, flags = tmp_path / "sums.jsonl", [*REAL, "--shots=2", "--context=900"]
    rows = [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path, "zero", tiny=[*flags, f"--init_from={folder}", f"--data={path}"])
    monkeypatch.chdir(tmp_path)
    flags += [f"--init_from={folder}{os.sep}", "--data=sums.jsonl"]
    run(tmp_path, "zero", tiny=[*flags, "--rl_steps=3"])
    assert len(lines(tmp_path / "zero")) == 3
    path.write_text("".join(json.dumps({**row, "answer": 777}) + "\n" for row in rows))
    data.file_problems.cache_clear()
    err = refusal(train.main, ["zero", *flags, "--rl_steps=4", f"--out_dir={tmp_path}"], capsys)
    assert "has learnt from other contents of sums.jsonl" in err


def test_what_was_held_out_in_training_is_held_out_later(folder, tmp_path):
    files = {}
    for name in "AB":
        rows = [{"question": f"{name} {i}?", "answer": i} for i in range(9)]
        files[name] = write_traces(tmp_path / f"{name}.jsonl", rows)
    flags = [*REAL, f"--init_from={folder}", f"--data={files['A']}"]
    run(tmp_path, "zero", tiny=[*flags, f"--eval_data={files['B']}"])
    copy = shutil.copy(files["A"], tmp_path / "A2.jsonl")
    for known in (files["A"], copy):
        train.main(["eval", f"--ckpt={tmp_path}/zero/ckpt.pt", f"--data={known}"])
        assert {line["prompt"][0] for line in read(tmp_path / "zero", "samples.jsonl")} == {"B"}
    assert {line["prompt"][0] for line in read(tmp_path / "zero", "samples.jsonl")} == {"B"}


def test_a_run_goes_on_with_the_same_arithmetic_or_says_so(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    more = ["zero", *ZERO, "--rl_steps=4", f"--out_dir={tmp_path / 'out'}"]
    assert "autocast=auto, not on" in refusal(train.main, [*more, "--autocast=on"], capsys)
    assert "ref_dtype=auto, not bfloat16" in refusal(
        train.main, [*more, "--ref_dtype=bfloat16"], capsys)
    assert "sample_dtype=float32, not bfloat16" in refusal(
        train.main, [*more, "--sample_dtype=bfloat16"], capsys)


def test_the_toy_base_is_not_trained_on_a_file(tmp_path, capsys):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"question": "{i}?", "answer": {i}}}\n' for i in range(40)))
    argv = ["zero", *ZERO, f"--data={path}", f"--out_dir={tmp_path}"]
    assert "--data needs --init_from=FOLDER" in refusal(train.main, argv, capsys)


def test_a_worked_example_is_never_the_problem_itself():
    rng = random.Random(0)
    cfg = data.DataConfig(task="arithmetic", n_numbers=2, ops="+", template="base", shots=3)
    examples = {problem.key for problem, *_ in data.EXAMPLES}
    drawn = {data.draw_problem(cfg, rng).key for _ in range(1000)}
    drawn |= {problem.key for problem in data.eval_problems(cfg, 100)}
    assert not examples & drawn and len(drawn) > 30


def test_prompts_carry_the_template_the_examples_and_the_question():
    tok, problem = data.load_tokenizer(), data.countdown_problem((3, 7, 2), 20)

    def prompt(tok, **settings):
        return tok.decode(data.prompt_ids(problem, tok, data.DataConfig(**settings)))

    assert prompt(tok) == problem.prompt
    qwen = data.load_tokenizer(os.path.join(HERE, "tests", "fixtures", "tokenizer_qwen"))
    for template in ("base", "qwen"):
        shown = prompt(qwen, template=template, shots=2, prefill_think=True)
        assert shown.count("<answer>") == 3 and shown.count("make") == 3
        assert "make 20" in shown and shown.endswith("<think>\n")
    cfg = data.DataConfig(template="base", prefill_think=True)
    text = data.completion_text(tok.encode("so</think><answer>1</answer>"), tok, cfg)
    assert text.startswith("<think>")


def test_memory_is_planned_from_the_settings():
    def plan(**settings):
        cfg = train.Config.of({"vocab_size": 500, **settings})
        return train.memory_plan(cfg, 20, torch.device("cpu"))

    n = sum(p.numel() for p in GPT(GPTConfig(vocab_size=500)).parameters())
    default, moments = plan()
    assert default["weights"] == 4 * n and plan(rl_optimizer="adamw")[0]["optimiser"] == 8 * n
    assert plan(kl_coef=0.0)[0]["reference"] == 0
    assert plan(ref_dtype="bfloat16")[0]["reference"] == 2 * n
    for less in ({"checkpointing": True}, {"micro_tokens": 1024}):
        assert plan(**less)[1]["update"] < moments["update"]
    lora, less = plan(lora_rank=2, sample_dtype="bfloat16")
    assert "reference" not in lora and lora["optimiser"] < n and less["update"] < moments["update"]
    assert 2 * n < lora["weights"] < 2.5 * n


@pytest.mark.parametrize("settings", [
    {}, {"autocast": "on"}, {"lora_rank": 4}, {"checkpointing": True}, {"qk_norm": False},
    {"lora_rank": 4, "sample_dtype": "bfloat16", "autocast": "on"}, {"max_new_tokens": 30}])
def test_planned_activations_are_those_that_autograd_keeps(settings):
    shape = {"vocab_size": 50, "n_layer": 4, "n_embd": 128, "mlp_dim": 384, "n_head": 4}
    cfg = train.Config.of({**shape, "micro_tokens": 500, **settings})
    batch, shared = torch.ones(1, 500, dtype=torch.long), 0
    if "max_new_tokens" in settings:  # five rows of 100 tokens, the first 60 of which are the same
        batch, shared = torch.arange(500).view(5, 100) % 49, 60
        batch[:, :shared] = batch[0, :shared]
    always, moments = train.memory_plan(cfg, 70, torch.device("cpu"), shared)
    dtype = torch.bfloat16 if "sample_dtype" in settings else torch.float32
    model, kept = GPT(cfg.model).to(dtype), {}
    model.autocast, model.checkpointing = "autocast" in settings, cfg.train.checkpointing
    if cfg.train.lora_rank:
        add_lora(model, cfg.train.lora_rank, 1.0, None)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t  # held, so that no address is used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, torch.Tensor.detach):
        model.hidden(batch)
    taken = sum(t.untyped_storage().nbytes() for t in kept.values())
    planned = moments["update"] - 4 * trained - 16 * 500 * 50  # without gradients and logits
    if cfg.train.checkpointing:  # one block's are made again, and then the next one's
        assert planned / 10 < taken < planned
    else:
        assert planned == pytest.approx(taken, rel=0.1)


# ---------------------------------------------------------------------- adapters, traces, questions

LORA = ["--lora_rank=2", "--lora_alpha=8", "--w_length=1", "--rl_lr=0.03", "--kl_coef=0.1"]


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted")
    run(out, "zero", tiny=[*REAL, f"--init_from={folder}", *LORA])
    return out


def test_adapters_train_and_leave_an_ordinary_checkpoint(adapted, folder):
    model, base = load_model(str(adapted / "zero" / "ckpt.pt")), from_pretrained(folder)
    moved = {name for (name, p), q in zip(model.named_parameters(), base.parameters(), strict=True)
             if not torch.equal(p, q)}
    assert moved == {name for name, p in model.named_parameters()
                     if "_proj" in name and p.dim() == 2}
    state = load_checkpoint(str(adapted / "zero" / "ckpt.pt"))
    assert all(name.endswith((".A", ".B")) for name in state["trained"])
    first, last = lines(adapted / "zero")
    assert first["kl"] == 0 < last["kl"] and first["ratio"] == pytest.approx(1, abs=1e-4)


def test_adapters_resume_as_if_they_had_not_been_cut(adapted, folder, tmp_path, monkeypatch):
    flags = [*REAL, f"--init_from={folder}", *LORA]
    with monkeypatch.context() as m:
        cut_at(m, "zero", 2)
        with pytest.raises(Cut):
            run(tmp_path, "zero", tiny=flags)
    run(tmp_path, "zero", tiny=flags)
    assert_same(tmp_path / "zero", adapted / "zero")


def test_adapters_leave_the_reference_as_it_is(folder, tmp_path, capsys):
    argv = [*REAL, f"--init_from={folder}", *LORA, "--ref_every=1", f"--out_dir={tmp_path}"]
    assert "ref_every" in refusal(train.main, argv, capsys)


def test_base_policy_reference_and_sampler_of_adapters_are_one_in_bfloat16(folder, tmp_path):
    flags = [*LORA, "--sample_dtype=bfloat16", "--autocast=on"]
    run(tmp_path, "zero", tiny=[*REAL, f"--init_from={folder}", *flags])
    state = load_checkpoint(str(tmp_path / "zero" / "ckpt.pt"))
    assert {t.dtype for t in [*state["model"].values(), *state["trained"].values()]} == {
        torch.float32}
    first = lines(tmp_path / "zero")[0]
    assert first["ratio"] == pytest.approx(1, abs=0.05) and first["sampler_kl"] < 1e-3


def test_what_is_not_finite_is_null_in_a_log(tmp_path):
    logging = train.Run("zero", {"out_dir": str(tmp_path)})
    os.makedirs(logging.dir)
    logging.append("a.jsonl", {"x": math.inf, "rewards": {"accuracy": math.nan, "format": 1 / 3}})
    assert read(tmp_path / "zero", "a.jsonl") == [
        {"x": None, "rewards": {"accuracy": None, "format": 0.333333}}]


def test_a_source_with_merged_adapters_is_asked_in_fp32(folder, tmp_path, monkeypatch):
    asked, for_sampling = [], sample.for_sampling
    monkeypatch.setattr(sample, "for_sampling", lambda model, cfg: (
        asked.append((model.embed.weight.dtype, cfg.sample_dtype)), for_sampling(model, cfg))[1])
    flags = [*REAL, f"--init_from={folder}", "--lora_rank=2", "--sample_dtype=bfloat16"]
    run(tmp_path, "zero", tiny=flags)
    asked.clear()
    dev1 = train.Run("dev1", train.parse([*flags, f"--out_dir={tmp_path}"])[1])
    train.source_samples(dev1)
    assert asked == [(torch.float32, "float32")] and dev1.sample_dtype == torch.bfloat16


def test_weights_with_merged_adapters_stay_in_fp32(folder, tmp_path, monkeypatch):
    asked, evaluate = [], sample.evaluate_tasks
    monkeypatch.setattr(sample, "evaluate_tasks", lambda model, tok, cfg, *others: (
        asked.append((model.embed.weight.dtype, cfg.sample.sample_dtype)),
        evaluate(model, tok, cfg, *others)))
    path = write_traces(tmp_path / "traces.jsonl", TRACES)
    flags = [*REAL, f"--init_from={folder}", f"--traces={path}", "--lora_rank=2", "--sft_steps=2",
             "--template=toy", "--sample_dtype=bfloat16"]
    run(tmp_path, "sft", "zero", tiny=flags)
    assert asked == [(torch.bfloat16, "bfloat16"), *[(torch.float32, "float32")] * 2]
    for stage, want in (("sft", torch.bfloat16), ("zero", torch.float32)):
        again = train.Run(stage, train.parse([*flags, f"--out_dir={tmp_path}"])[1])
        assert again.load(again.stage.parent).embed.weight.dtype == want
        assert again.sample_dtype == want


def test_only_stages_that_learn_from_traces_are_bound_to_their_contents(tmp_path, capsys):
    path = write_traces(tmp_path / "traces.jsonl", TRACES)
    flags = [*PIPELINE, f"--traces={path}"]
    run(tmp_path, "sft", tiny=flags)
    write_traces(tmp_path / "traces.jsonl", TRACES[:1])
    err = refusal(train.main, ["sft", *flags, f"--out_dir={tmp_path}"], capsys)
    assert f"{tmp_path / 'sft'} has learnt from other contents of {path}" in err
    shutil.rmtree(tmp_path / "sft")
    run(tmp_path, "sft", tiny=flags)  # on the same base
    assert "base: done" in capsys.readouterr().out


def test_a_compiled_policy_has_a_reference_of_its_own(folder, tmp_path, monkeypatch):
    def compiled(method, dynamic):
        return lambda *args: method(*args)  # which deepcopy leaves as it is

    monkeypatch.setattr(torch, "compile", compiled)
    for flags in (LORA, LORA[2:]):
        out = tmp_path / str(len(flags))
        run(out, "zero", tiny=[*REAL, f"--init_from={folder}", "--compile", *flags])
        assert lines(out / "zero")[-1]["kl"] > 0


CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 1+2"},
        {"role": "assistant", "content": "3"}, {"role": "user", "content": "what is 2+2"},
        {"role": "assistant", "content": "4"}]
TRACES = [{"prompt": "what is 1+2", "completion": "3"}, {"messages": CHAT},
          {"prompt": CHAT[1:2], "completion": CHAT[2:3]}]


def write_traces(path, entries):
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, entries)) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("template", ["toy", "base"])
def test_traces_are_answers_behind_what_came_before_them(tmp_path, template):
    tok, cfg = data.load_tokenizer(), data.DataConfig(template=template)
    rows = data.read_traces(write_traces(tmp_path / "traces.jsonl", TRACES), tok, cfg)
    begin, turn, end = (part for part in data.TEMPLATES[template])
    one = begin + turn.replace("{question}", "what is 1+2")
    two = one + "3" + end + turn.replace("{question}", "what is 2+2")
    assert [tuple(map(tok.decode, row)) for row in rows] == [
        (one, "3"), (one, "3"), (two, "4"), (one, "3")]
    assert rows[2][0].count(tok.end_id) == (not end)  # what ends an answer ends one within a chat


def test_traces_go_on_after_the_think_that_a_prompt_ends_with(tmp_path):
    tok, cfg = data.load_tokenizer(), data.DataConfig(template="base", prefill_think=True)
    for start in ("<think>\n", "<think>", "\n<think>\n", ""):
        entry = {"prompt": "why", "completion": f"{start}so</think>"}
        (prompt, said), = data.read_traces(write_traces(tmp_path / "a", [entry]), tok, cfg)
        assert tok.decode(prompt).endswith("<think>\n") and tok.decode(said) == "so</think>"
    _, (prompt, _) = data.read_traces(write_traces(tmp_path / "b", [{"messages": CHAT}]), tok, cfg)
    assert tok.decode(prompt).endswith("what is 2+2\nAssistant: <think>\n")


def test_zero_starts_from_anybodys_traces(folder, tmp_path, capsys):
    entries = [*TRACES, {"prompt": "long", "completion": "x" * 500}]
    path = write_traces(tmp_path / "traces.jsonl", entries)
    flags = [f"--init_from={folder}", f"--traces={path}", "--sft_steps=30", "--sft_lr=0.05",
             "--sft_rows=2", "--template=toy", "--lora_rank=1"]
    run(tmp_path, "sft", "zero", tiny=[*REAL, *flags])
    assert "5 answers in" in (said := capsys.readouterr().out) and "1 of them longer" in said
    losses = [line["loss"] for line in lines(tmp_path / "sft")]
    assert losses[-1] < losses[0] - 0.2
    sft = load_checkpoint(str(tmp_path / "sft" / "ckpt.pt"))["model"]["embed.weight"]
    zero = load_checkpoint(str(tmp_path / "zero" / "ckpt.pt"))["model"]
    assert torch.equal(sft, zero["embed.weight"])
    assert train.stage_of("zero", {"traces": path}).parent == "sft"
    assert train.stage_of("zero", {}).parent == train.stage_of("dev1", {"traces": path}).parent
    other = ["zero", *REAL, *flags[:1], f"--out_dir={tmp_path}", "--template=toy"]
    assert "traces" in refusal(train.main, other, capsys)


@pytest.mark.parametrize("line", [
    "{", "3", '{"prompt": "a"}', '{"prompt": "a", "completion": ""}', '{"messages": []}',
    '{"prompt": 3, "completion": "b"}', '{"messages": [{"role": "user", "content": "a"}]}',
    '{"messages": [{"role": "robot", "content": "a"}]}', '{"messages": [3]}',
    '{"messages": [{"role": "assistant", "content": null}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
    '{"role": "assistant", "content": "c"}]}'])
def test_a_bad_trace_is_named_by_its_line(folder, tmp_path, capsys, line):
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps(TRACES[0]) + "\n\n" + line + "\n")
    argv = ["sft", *REAL, f"--init_from={folder}", f"--traces={path}", f"--out_dir={tmp_path}"]
    assert "line 3" in refusal(train.main, argv, capsys)
    assert not (tmp_path / "base").exists()  # nothing has run


def test_what_cannot_run_is_refused_before_anything_runs(folder, tmp_path, capsys):
    for argv, words in ((["dev3"], ["dev3"]), (["zero", "r1"], ["r1", "reward_model"]),
                        (["distill"], ["small_base"]), (["sft"], ["--traces"])):
        argv = [*argv, *REAL, f"--init_from={folder}", f"--out_dir={tmp_path}"]
        err = refusal(train.main, argv, capsys)
        assert all(word in err for word in words) and not (tmp_path / "base").exists(), err


def test_settings_for_real_models_hold_in_every_stage(folder):
    for stage in map(train.STAGES.get, train.REAL_STAGES):
        for lora, rl_lr, sft_lr in ((0, 1e-6, 1e-5), (4, 1e-5, 1e-4)):
            given = {"init_from": folder, "lora_rank": lora}
            cfg = train.stage_config(stage, given, data.load_tokenizer(folder))
            assert (cfg.grpo.rl_lr, cfg.train.sft_lr, cfg.train.save_every) == (rl_lr, sft_lr, 5)
            assert cfg.train.base_optimizer == "adamw"


def test_a_model_as_it_came_is_evaluated(folder, tmp_path):
    flags = [*SHORT, "--max_new_tokens=5", "--context=400", f"--out_dir={tmp_path}"]
    flags = [flag for flag in flags if "base_" not in flag]
    train.main(["eval", f"--init_from={folder}", *flags])
    assert results(tmp_path / "base")["countdown"]["problems"] == 3


def test_an_export_leaves_nothing_of_an_earlier_one_and_not_the_source(folder, tmp_path, capsys):
    (tmp_path / "chat_template.jinja").write_text("another model's")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "page.jinja").write_text("no export wrote this")
    train.main(["export", f"--init_from={folder}", f"--export_dir={tmp_path}"])
    assert not list(tmp_path.glob("*.index.json"))
    assert [file.name for file in tmp_path.glob("*.jinja")] == ["page.jinja"]
    argv = ["export", f"--init_from={folder}", f"--export_dir={folder}/."]
    assert "choose another" in refusal(train.main, argv, capsys)


def test_an_export_ends_where_training_ended(tmp_path, capsys):
    qwen = os.path.join(HERE, "tests", "fixtures", "tokenizer_qwen")
    shutil.copytree(qwen, tmp_path / "model")
    tok = data.load_tokenizer(qwen)
    save_pretrained(GPT(GPTConfig(vocab_size=tok.n_vocab, n_layer=1, n_embd=16, n_head=2,
                                  n_kv_head=1, head_dim=8, mlp_dim=16)), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(
        '{"eos_token_id": 0, "temperature": 0.7}')
    argv = [f"--init_from={tmp_path / 'model'}", "--template=qwen", f"--export_dir={tmp_path}"]
    train.main(["export", *argv])
    assert capsys.readouterr().out == f"{tmp_path / 'model'}: written to {tmp_path} as float32\n"
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found["eos_token_id"][0] == tok.special["<|im_end|>"] and 0 in found["eos_token_id"]
    assert found["temperature"] == 0.7
    (tmp_path / "model" / "generation_config.json").unlink()  # as of another model
    train.main(["export", *argv])
    again = json.loads((tmp_path / "generation_config.json").read_text())
    assert again == {"eos_token_id": found["eos_token_id"]}


def test_an_export_knows_how_to_chat(finished, tmp_path):
    jinja2 = pytest.importorskip("jinja2")
    ckpt = f"--ckpt={finished / 'zero' / 'ckpt.pt'}"
    train.main(["export", ckpt, f"--export_dir={tmp_path}"])
    template = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    assert not (tmp_path / "chat_template.jinja").exists()
    problem = data.countdown_problem((3, 7, 2), 20)
    chat = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": "no"}]
    shown = jinja2.Template(template).render(messages=chat, eos_token=data.END)
    assert shown == f"{problem.prompt}no{data.END}"
    train.main(["export", ckpt, f"--export_dir={tmp_path}", "--prefill_think", "--template=base"])
    template = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    assert template == data.chat_template("base", prefill_think=True)


@pytest.mark.parametrize("name", data.TEMPLATES)
def test_a_chat_template_asks_as_training_does(name, tmp_path):
    jinja2 = pytest.importorskip("jinja2")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    data.add_chat_template(tmp_path, data.DataConfig(template=name), data.load_tokenizer())
    template = (tmp_path / "chat_template.jinja").read_text("utf-8")
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2?"}]
    shown = jinja2.Template(template, trim_blocks=True, lstrip_blocks=True).render(
        messages=chat, eos_token=data.END)
    text, turn, end = data.TEMPLATES[name]
    turns = [turn.replace("{question}", question) for question in ("1+1?", "2+2?")]
    assert shown == f"{text}{turns[0]}2{end or data.END}{turns[1]}"
    opened = jinja2.Template(data.chat_template(name, True), trim_blocks=True, lstrip_blocks=True)
    assert opened.render(messages=chat, eos_token=data.END) == f"{shown}<think>\n"


def test_a_model_keeps_the_chat_template_that_it_came_with(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "mine"}')
    data.add_chat_template(tmp_path, data.DataConfig(template="qwen"), data.load_tokenizer())
    assert not (tmp_path / "chat_template.jinja").exists()


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("argv, words", [
    (["--nonsense=3"], ["nonsense"]),
    (["flight"], ["flight", "zero"]),
    (["--rl_steps=many"], ["rl_steps", "many"]),
    (["--tied=maybe"], ["tied", "maybe"]),
    (["--rl_steps=0"], ["rl_steps"]),
    (["--group_size=1"], ["group_size=1"]),
    ([f"--seed={'7' * 30}"], ["seed=777"]),
    (["--n_numbers=9"], ["n_numbers"]),
    (["--task=chess"], ["chess", "countdown"]),
    (["--n_kv_head=3"], ["n_kv_head"]),
    (["--w_accuracy=0", "--w_format=0"], ["w_accuracy"]),
    (["--device=abacus"], ["abacus"]),
    (["--device=cuda:99"], ["cuda:99"]),
    (["eval", "--ckpt=/nowhere/ckpt.pt"], ["/nowhere/ckpt.pt"]),
    (["--out_dir=/dev/null/out"], ["/dev/null/out"]),
    (["--rl_lr=nan"], ["rl_lr"]),
    (["--base_lr=2"], ["base_lr"]),
    (["--sft_lr=0"], ["sft_lr"]),
    (["--threads=-2"], ["threads"]), (["--threads=99999999999"], ["threads"]),
    (["--n_embd=1000000000"], ["out of memory"]), (["--temperature=1e-40"], ["temperature"]),
    (["--eval_every=-1"], ["eval_every"]),
    (["--w_format=nan"], ["w_format"]),
    (["--clip_low=2"], ["clip_low"]),
    (["--context=30", "--base_length=20"], ["context"]),
    (["--init_from=/nowhere"], ["/nowhere", "local folder"]),
    (["--template=qwen2"], ["template", "qwen"]),
    (["--shots=2"], ["shots", "toy"]),
    (["--shots=2", "--template=base", "--task=logic"], ["worked examples", "logic"]),
    (["--data=/nowhere.jsonl"], ["/nowhere.jsonl"]),
    (["--task=file"], ["--data"]),
    (["--base_optimizer=sgd"], ["base_optimizer", "adamw"]),
    (["--rl_optimizer=sgd"], ["rl_optimizer", "adamw"]),
    (["--autocast=maybe"], ["autocast", "auto"]),
    (["--sample_dtype=int8"], ["sample_dtype", "bfloat16"]),
    (["--ref_dtype=int8"], ["ref_dtype", "bfloat16"]),
    (["--mix=task:x"], ["mix", "chat"]),
    (["--label_noise=0.7"], ["label_noise"]),
    (["--max_skipped=0"], ["max_skipped"]),
    (["export", "--ckpt=/nowhere/ckpt.pt"], ["/nowhere/ckpt.pt"]),
    (["eval", "zero"], ["eval"]),
    (["--base_length=5"], ["base_length"]),
    (["--vocab_size=10"], ["vocab_size"]),
    (["--minibatches=99"], ["minibatches=99"])])
def test_bad_input_is_one_line_and_exit_code_2(argv, words, tmp_path, capsys):
    out = [] if any(a.startswith("--out_dir") for a in argv) else [f"--out_dir={tmp_path}"]
    given = [a for a in argv if not a.startswith("--")]
    flags = [a for a in argv if a.startswith("--")]
    err = refusal(train.main, [*given, *TINY, *out, *flags], capsys)
    assert err.startswith("train.py: ") and all(word in err for word in words), err
    assert not (tmp_path / "base" / "ckpt.pt").exists()


def test_the_script_ends_with_that_code_and_that_line():
    for argv in ["--rl_steps=0"], ["table", "--out_dir=/nowhere"]:
        done = command(*argv)
        assert done.returncode == 2 and not done.stdout, done.stdout
        assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_help_names_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0
    without_breaks = "".join(text.split())
    for group in fields(train.Config):
        for f in fields(group.default_factory):
            shown = sample.describe(f).replace("%%", "%")
            assert f"--{f.name} " in text and f.metadata["help"]
            assert "".join(shown.split()) in without_breaks, f.name
            assert f"default {f.default if f.default != '' else 'none'}" in shown
    for name in train.STAGES:
        assert name in text


# ---------------------------------------------------------------------------------------- machines


def test_of_two_runs_in_one_folder_one_stops_and_the_other_ends_as_if_alone(
        finished, tmp_path, monkeypatch, capsys):
    """The second begins and ends while the first is about to log its last step."""
    folder, log, beside = tmp_path / "zero", train.Run.log, []

    def second_beside_first(self, metrics, row=None):
        if self.name == "zero" and metrics["step"] == 3 and not beside:
            beside.append(1)
            run(tmp_path, "zero")
        log(self, metrics, row)

    monkeypatch.setattr(train.Run, "log", second_beside_first)
    flags = [*ZERO, "--save_every=2", f"--out_dir={tmp_path}"]
    assert "another run" in refusal(train.main, ["zero", *flags], capsys)
    assert_same(folder, finished / "zero")
    kept = {"ckpt.pt", "metrics.jsonl", "rollouts.jsonl", "eval.json", "samples.jsonl"}
    assert {path.name for path in folder.iterdir()} - {"curves.png"} == kept  # nothing to clean up


def printed_commands(out):
    return [shlex.split(line) for line in out.splitlines() if line.startswith("    python ")]


def test_the_commands_printed_at_the_end_work_as_they_stand(tmp_path, monkeypatch, lenient, capsys):
    out = tmp_path / "Ann's runs"
    run(out, "zero", tiny=[*PIPELINE, "--seed=7", "--ops=+-*/", "--w_emoji=0.5", "--tied=false"])
    show, go_on = printed_commands(capsys.readouterr().out)
    assert show[:2] == ["python", "sample.py"] and show[-1] == f"--vs={out / 'base' / 'ckpt.pt'}"
    sample.main([*show[2:], "--max_new_tokens=4"])
    assert go_on[:5] == ["python", "train.py", "r1", "distill", "small_zero"]
    before = weights(out / "zero")
    train.main(go_on[2:])
    assert torch.equal(weights(out / "zero"), before) and results(out / "small_zero")
    capsys.readouterr()
    train.main(["reward_model", *go_on[5:]])
    assert printed_commands(capsys.readouterr().out) == []  # it has no answers to show


def test_the_commands_printed_for_a_real_model_name_no_base(folder, tmp_path, capsys):
    run(tmp_path, "zero", tiny=[*REAL, f"--init_from={folder}", "--template=base"])
    (show,) = printed_commands(capsys.readouterr().out)
    assert show == ["python", "sample.py", f"--ckpt={tmp_path / 'zero' / 'ckpt.pt'}"]
    sample.main([*show[2:], "--max_new_tokens=4"])


def test_a_compiled_reference_keeps_its_own_weights(finished, tmp_path, monkeypatch):
    def compile(function, **options):  # as torch.compile: a function, which a copy shares
        return lambda *args: function(*args)

    monkeypatch.setattr(torch, "compile", compile)
    for out, flag in ((tmp_path / "plain", "false"), (tmp_path / "compiled", "true")):
        shutil.copytree(finished / "base", out / "base")
        run(out, "zero", tiny=[*ZERO, "--rl_lr=0.01", f"--compile={flag}"])
    assert_same(tmp_path / "compiled" / "zero", tmp_path / "plain" / "zero")


def test_no_compiler_and_an_older_torch_are_one_line(tmp_path, monkeypatch, capsys):
    def no_compiler(function, **options):
        def fail(*args):
            raise RuntimeError("No working C++ compiler found\nand more lines")
        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    argv = ["base", *TINY, "--compile=true", f"--out_dir={tmp_path}"]
    err = refusal(train.main, argv, capsys)
    assert "--compile=true" in err and "C++ compiler" in err
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.1+cu128"))
    assert "2.8.1" in refusal(train.main, ["base", *TINY, f"--out_dir={tmp_path}"], capsys)


@NO_GPU
def test_a_cuda_run_in_float32_ends_near_the_cpus_and_goes_on_there(finished, tmp_path):
    exact = [*ZERO, "--autocast=off", "--sample_dtype=float32"]
    run(tmp_path, "zero", tiny=[*exact, "--rl_steps=2", "--device=cuda"])
    run(tmp_path, "zero", tiny=exact)  # the third step, on the CPU
    near = {"atol": 5e-3, "rtol": 5e-3}
    assert torch.allclose(weights(tmp_path / "base"), weights(finished / "base"), **near)
    assert torch.allclose(weights(tmp_path / "zero"), weights(finished / "zero"), **near)
    run(tmp_path, "zero", tiny=[*exact, "--rl_steps=4", "--device=cuda"])
    assert [m["step"] for m in lines(tmp_path / "zero")] == [1, 2, 3, 4]


@NO_GPU
def test_a_cuda_run_with_a_gpus_defaults_is_evaluated_and_exported(tmp_path, capsys):
    device = "--device=cuda"
    run(tmp_path, "zero", tiny=[*ZERO, device, "--eval_every=1"])
    assert all(abs(m["ratio"] - 1) < 0.05 and not m["skipped"] for m in lines(tmp_path / "zero"))
    ckpt = tmp_path / "zero" / "ckpt.pt"
    os.remove(tmp_path / "zero" / "eval.json")
    train.main(["eval", f"--ckpt={ckpt}", device])
    assert results(tmp_path / "zero")["countdown"]["problems"] == 3
    train.main(["export", f"--ckpt={ckpt}", f"--export_dir={tmp_path / 'hf'}", device])
    for p, q in zip(from_pretrained(str(tmp_path / "hf")).parameters(),
                    load_model(str(ckpt)).parameters(), strict=True):
        assert torch.equal(p, q.bfloat16().float())  # the dtype that it sampled in


def test_a_run_ends_where_memory_is_unknown_and_stdout_knows_neither_chinese_nor_emoji(tmp_path):
    """As on Windows: no os.sysconf, and a code page in place of UTF-8."""
    script = ("import os, sys; sys.path.insert(0, '.'); del os.sysconf; import train; "
              "train.main(sys.argv[1:])")
    flags = [*TINY, "--eval_every=1", "--w_language=1", f"--out_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", script, "zero", *flags], cwd=HERE, timeout=120,
                          capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert "countdown: 3 held-out problems" in done.stdout.decode("cp1252")


def test_memory_is_planned_where_its_size_is_unknown(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    run(tmp_path, "zero", tiny=[*REAL, f"--init_from={folder}"])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("memory, GiB"))
    assert "= about" in line and " of " not in line


@POSIX
@pytest.mark.parametrize("script", ["train.py --help", "data.py", "sample.py --help"])
def test_output_can_be_cut_off_and_need_not_be_unicode(script):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = f"{sys.executable} {script} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=HERE, capture_output=True, timeout=120,
                          env=environment)
    assert done.stderr == b"" and done.stdout.splitlines()[-1] == b"0"


@POSIX
def test_training_whose_output_is_cut_off_does_not_end_as_if_it_were_done(tmp_path):
    flags = shlex.join([*ZERO, "--base_steps=400", f"--out_dir={tmp_path}"])
    command = f"{sys.executable} train.py {flags} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=HERE, capture_output=True, timeout=120)
    assert done.stdout.splitlines()[-1] == b"141" and b"Traceback" not in done.stderr


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert train.parse(["--out_dir=~/runs"])[1]["out_dir"] == os.path.join(str(tmp_path), "runs")
