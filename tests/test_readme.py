"""The README keeps its word: its figures are those of the results file, its code is the code, and its commands run."""
import json
import os
import re
import shlex

import data
import results
import rewards
import sample
import train
from test_train import HERE, PIPELINE, lenient, run  # noqa: F401  (lenient is a fixture)

with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
    README = f.read()
BLOCKS = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", README, re.S))
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
COMMANDS = [line for kind, body in FENCED if not kind for line in body.replace("\\\n", " ").splitlines()] + re.findall(r"`(python [^`]+)`", README)
COMMANDS = [" ".join(shlex.split(re.sub(r"^for \w+ in [^;]+; do |; done$", "", c.split("#")[0].strip()).replace("$s", "3").replace("$d", "float32"))) for c in COMMANDS]
COMMANDS = sorted({re.sub(r"^taskset -c 0 ", "", c) for c in COMMANDS if re.match(r"(taskset -c 0 )?python (\w+\.py|tests/)", c)})


def source(file):
    with open(os.path.join(HERE, file), encoding="utf-8") as f:
        return f.read()


# ---------------------------------------------------------------------------------------- figures


def test_every_table_is_made_from_the_results_file():
    with open(results.FILE, encoding="utf-8") as f:
        blocks = results.blocks(json.load(f))
    assert set(BLOCKS) == set(blocks)
    for name, block in blocks.items():
        assert BLOCKS[name] == block, name


def test_the_results_file_says_on_what_and_with_which_code_it_was_made():
    with open(results.FILE, encoding="utf-8") as f:
        found = json.load(f)
    assert {"cpu", "cores", "python", "torch", "commit"} <= set(found["about"])
    for seed in results.SEEDS:
        stages = found["runs"][f"seed {seed}"]["stages"]
        assert set(stages) == set(train.STAGES)
        for stage in set(stages) - {"reward_model"}:
            assert stages[stage]["countdown"]["problems"] == train.Config().data.eval_problems


# ---------------------------------------------------------------------------------------- code


def test_the_code_in_the_readme_is_the_code():
    rows = re.findall(r"^\| [^|`]+ \| `([^`]+)` \|$", README[README.index("## GRPO, line by line"):README.index("### One group by hand")], re.M)
    assert len(rows) == 7 and all(row in source("grpo.py") for row in rows)
    python = [body for kind, body in FENCED if kind == "python"]
    assert len(python) == 4
    assert python[2] in source("rewards.py")
    assert all(line in source("grpo.py") for line in python[3].splitlines())
    for stage in train.STAGES:
        assert f"`{stage}`" in README


def test_the_new_task_of_the_readme_works_as_written(tmp_path, monkeypatch):
    definition, registration = [body for kind, body in FENCED if kind == "python"][:2]
    monkeypatch.setattr(data, "TASKS", dict(data.TASKS))
    monkeypatch.setattr(rewards, "VERIFIERS", dict(rewards.VERIFIERS))
    names = {**vars(rewards), **vars(data)}
    exec(definition + registration, names)  # the README's own code, nothing that a model said
    problem = data.draw_problem(data.DataConfig(task="largest"), train.rng(1)[0])
    assert rewards.verify(problem, f"<answer>{max(problem.numbers)}</answer>")[1] and not rewards.verify(problem, f"<answer>{min(problem.numbers)}</answer>")[1]
    run(tmp_path, "zero", tiny=[*PIPELINE, "--task=largest"])
    assert json.loads((tmp_path / "zero" / "eval.json").read_text())["largest"]["problems"] == 3


# ---------------------------------------------------------------------------------------- commands


def test_every_command_of_the_readme_is_one_that_there_is():
    assert len(COMMANDS) > 25
    for command in COMMANDS:
        script, *argv = command.split()[1:]
        if script == "train.py" and "--help" not in argv:
            train.parse(argv)
        elif script == "sample.py":
            sample.parse(argv)
        else:
            assert os.path.exists(os.path.join(HERE, script)), command
            for flag in re.findall(r"--[\w-]+", command):
                assert flag == "--help" or flag[2:] in source(script) + source("tests/bench/common.py"), (command, flag)


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, lenient):  # noqa: F811
    """In the README's order, in one folder, with tiny settings in place of the defaults."""
    monkeypatch.chdir(tmp_path)
    tiny = [flag for flag in PIPELINE if not flag.startswith("--rl_steps")]
    fenced = [c for c in COMMANDS if c.startswith(("python train.py", "python sample.py")) and not any(word in c for word in ("--help", "SmolLM2", "out-smol", "=FOLDER", "--task=largest"))]
    order = lambda c: (c != "python train.py r1 distill small_zero", "--rl_steps=180" in c, c.startswith("python train.py table"), "eval" in c or "export" in c or "sample.py" in c)
    for command in sorted(fenced, key=order):
        script, *argv = command.split()[1:]
        if script == "sample.py":
            sample.main([*argv, "--max_new_tokens=8"])
        elif any(word in argv for word in ("eval", "export", "table")):
            train.main([*argv, "--eval_problems=3", "--eval_samples=2"] if "eval" in argv else argv)
        else:
            train.main([*argv, *tiny, "--rl_steps=3" if "--rl_steps=180" in command else "--rl_steps=2"])
    assert os.path.exists("out/r1/eval.json") and os.path.exists("out-hf/model.safetensors") and os.path.exists("out3/zero_emoji/ckpt.pt")
