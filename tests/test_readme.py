"""The README keeps its word: its figures are the results file's, its code and commands run."""
import copy
import importlib.util
import json
import os
import re
import shlex
import sys
import types

import pytest
import results
import torch
from test_train import HERE, PIPELINE, lenient, run  # noqa: F401  (lenient is a fixture)

import data
import rewards
import sample
import train
from grpo import GRPOConfig
from model import generators


def source(file):
    with open(os.path.join(HERE, file), encoding="utf-8") as f:
        return f.read()


README, RESULTS = source("README.md"), source("assets/results.md")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README + RESULTS, re.S | re.M)
PYTHON = [body for kind, body in FENCED if kind == "python"]


def commands():
    """Every command of the two pages, without its comment."""
    shell = [body.replace("\\\n", " ") for kind, body in FENCED if not kind]
    found = [line for body in shell for line in body.splitlines()]
    found += re.findall(r"`(python [^`]+)`", README + RESULTS)
    found = [shlex.join(shlex.split(line.split("#")[0])) for line in found if "python" in line]
    found = [re.sub(r"^taskset -c 0 ", "", line) for line in found]
    return sorted({line for line in found if re.match(r"python (\w+\.py|tests/)", line)})


COMMANDS = commands()


# ---------------------------------------------------------------------------------------- figures


def test_every_table_is_made_from_the_results_file():
    blocks = results.blocks(json.loads(source("assets/results.json")))
    found = {}
    for page in (README, RESULTS):
        for name, block in re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", page, re.S):
            assert block == blocks[name], name
            found[name] = block
    assert set(found) == set(blocks)


def test_the_results_file_says_on_what_and_with_which_code_it_was_made():
    found = json.loads(source("assets/results.json"))
    assert {"cpu", "python", "torch"} <= set(found["about"])
    for made in found["runs"].values():
        assert all(re.fullmatch("[0-9a-f]{7,}", done["commit"]) for done in made["made"].values())
    for name in found["runs"].keys() & results.RUNS.keys():
        stages, stage = found["runs"][name]["stages"], "zero_emoji" if "emoji" in name else "zero"
        assert {"base", stage} <= set(stages), name
        for task in data.REASONING if name.startswith("all tasks") else ["countdown"]:
            assert stages[stage][task]["samples"] == 16


def test_the_figures_in_the_readmes_first_lines_are_those_of_the_seeds():
    found = json.loads(source("assets/results.json"))
    runs = results.named(found["runs"], "seed").values()
    elsewhere = found["earlier"]["zen3"]["stages"].values()  # another CPU

    def span(stage, key, runs=runs):
        found = [100 * stages[stage]["countdown"][key] for stages in runs]
        return f"{min(found):.1f}–{max(found):.1f}"

    assert len(runs) == 5 and len(elsewhere) == 4
    prose = " ".join(README.split())
    for said in (f"from {span('base', 'pass@1')} % to {span('zero', 'pass@1')} % (5 seeds)",
                 f"with the tags ignored the base has {span('base', 'pass@1_untagged')} %",
                 f"which rounds differently, four of these seeds end at "
                 f"{span('zero', 'pass@1', elsewhere)} %"):
        assert said in prose


def test_the_figures_in_the_readmes_prose_are_in_the_results_file():
    found, prose = json.loads(source("assets/results.json")), " ".join(README.split())
    stages = found["runs"]["all tasks, seed 1"]["stages"]
    base, zero = (stages[stage]["countdown"]["length"] for stage in ("base", "zero"))
    assert f"({base:.0f} → {zero:.0f} tokens)" in prose
    drift = results.span([stages["zero"]["countdown"]["one_language"] for stages
                          in results.named(found["runs"], "seed").values()])
    assert f"zero's is {drift} % over the seeds" in prose
    best = [of["passk"]["pass@k"]["countdown"]["base, tags ignored"]["16"]
            for of in found["evidence"].values() if "passk" in of]
    assert len(best) == 3 and f"with the tags ignored: {results.span(best)} %, 3 seeds" in prose
    cooler = [of["cooler"]["cooler"]["countdown"] for of in found["evidence"].values()
              if "cooler" in of]
    for curve, temperature in (("base, tags ignored", "1.0"), ("base, tags ignored", "0.05"),
                               ("base", "0.05"), ("zero", "1.0")):
        shares = [curves[curve][temperature] for curves in cooler]
        assert f"{results.span(shares)} %" in prose.split("Much of this is sharpening")[1][:600]
    longer = [of["shuffle"]["shuffled"]["countdown"]["length"]
              >= 2 * of["shuffle"]["base"]["countdown"]["length"]
              for of in found["evidence"].values() if "shuffle" in of]
    assert longer.count(True) == 1 and "In one seed completions double there, too" in prose
    closed = [of["budget"]["budget"]["countdown"]["zero"] for of in found["evidence"].values()
              if "budget" in of]
    mean = [results.pct(sum(of[limit] for of in closed) / len(closed))
            for limit in ("128", "256", "340")]
    said = "after 128 tokens, {} are right; after 256, {}; left open, {} (means of 3 seeds)"
    assert said.format(*mean) in prose
    shuffled = [of["shuffle"] for of in found["evidence"].values() if "shuffle" in of]
    spans = [results.span([of[stage]["countdown"]["pass@1_untagged"] for of in shuffled])
             for stage in ("base", "shuffled")]
    assert "(with the tags ignored accuracy falls from {} to {} %)".format(*spans) in prose
    habits = [results.span([run["stages"][stage]["countdown"]["all_habits"] for name, run
                            in found["runs"].items() if name.startswith("seed")])
              for stage in ("base", "zero")]
    assert f"but {habits[0]} % of the base's samples and {habits[1]} % of zero's do" in prose
    sums = {tuple(row[:2]): re.sub(r" \([^)]*\)", "", row[3])
            for row in found["earlier"]["sums"]["rows"]}
    as_it_came = sums["as it came", ""].removesuffix(".0 %")
    whole = sums["GRPO, all weights", "20 steps"]
    assert f"from {as_it_came} % right to {whole} (seeds 1 to 3, 100 sums" in prose
    greedy = [found["earlier"]["sums"]["rows"][i][5] for i in (1, 2)]
    assert f"greedily from {greedy[0].removesuffix('.0 %')} to {greedy[1].replace('.0', '')}" \
        in prose
    shown = found["earlier"]["smollm2"]["text"]
    sft, emoji = (re.search(f"\n{name} +([0-9.]+)%", shown)[1] for name in ("sft", "zero_emoji"))
    ends = f"{sft} % of answers are right; after 15 GRPO steps 82 % and {float(emoji):.0f} %"
    assert ends in prose


def test_what_the_readme_says_of_r1_and_of_distillation_is_in_the_results_file():
    found, prose = json.loads(source("assets/results.json")), " ".join(README.split())
    recipe = results.named(found["runs"], "all tasks").values()
    wins = results.span([stages["r1"]["win_rate"]["gold"] for stages in recipe])
    assert f"`gold_reward` prefers r1's answer in {wins} %" in prose
    asked = [of["requests"]["chat"] for of in found["evidence"].values() if "requests" in of]
    before, after = (results.span([of[stage] for of in asked]) for stage in ("dev3", "r1"))
    gains = sorted(100 * of["gain"] for of in asked)
    assert len(asked) == 5 and f"of 500 requests ({before} → {after} %" in prose
    assert f"by {gains[0]:.1f} to {gains[-1]:.1f} points in the five seeds" in prose
    hacked = [stages["r1_hacked"] for stages in recipe if "r1_hacked" in stages]
    shown = [results.by_seed([found[a][b] for found in hacked]) for a, b in (
        ("chat", "pass@1"), ("win_rate", "reward_model"), ("win_rate", "gold"))]
    said = ("Of r1_hacked's answers in chat {} % are right; of those that differ from dev3's, the "
            "reward model prefers {} %, `gold_reward` {} %")
    assert said.format(*shown) in prose
    pairs = [(stages["distill"][task], stages["small_zero"][task]) for stages in recipe
             if "distill" in stages for task in data.REASONING]
    ahead = [100 * (distill["pass@1"] - rl["pass@1"]) for distill, rl in pairs]
    assert f"by {min(ahead):.0f} to {max(ahead):.0f} points in each of twelve cases" in prose
    greedy = [distill["pass@1_greedy"] - rl["pass@1_greedy"] for distill, rl in pairs]
    assert sum(x < 0 for x in greedy) == 2 and "greedily RL wins two of the twelve" in prose
    mixing = [[stages[stage]["countdown"]["mixes"] for stages in recipe]
              for stage in ("zero", "dev2")]
    before, after = (f"{100 * min(xs):.0f}–{100 * max(xs):.0f}" for xs in mixing)
    assert f"cut mixing from {before} % of countdown completions to {after} %" in prose
    overlap = [distill["pass@1_ci"][0] <= rl["pass@1_ci"][1] for distill, rl in pairs]
    assert (overlap.count(True), len(pairs)) == (4, 12)
    assert "in four of them the 95 % intervals overlap" in prose
    held = [row[3] == "yes" for row in results.claims(found)[1:]]
    assert f"turns these into {len(held)} claims" in prose
    assert f"{held.count(True)} hold in each" in prose and "the other seven" in prose
    assert held.count(False) == 7


def test_only_a_stage_that_was_not_run_leaves_a_claim_out():
    found = json.loads(source("assets/results.json"))
    rows = len(results.claims(found))
    for made in found["runs"].values():
        made["stages"].pop("small_zero", None)
    assert len(results.claims(found)) == rows - 1
    del found["runs"]["all tasks, seed 1"]["stages"]["zero"]["code"]["pass@1"]
    with pytest.raises(KeyError):
        results.claims(found)


def test_a_row_of_the_recipe_names_the_runs_that_have_its_stages_and_all_their_figures():
    found = json.loads(source("assets/results.json"))
    mine = {stage: copy.deepcopy(found["runs"]["all tasks, seed 1"]["stages"][stage])
            for stage in ("base", "zero")}
    mine["zero"]["code"]["pass@1"] = 0.123
    found["runs"] |= {"all tasks, seed 9": {"made": {}, "stages": mine}}
    claims = results.blocks(found)["claims"]
    row, = [row for row in claims.split("\n") if row.startswith("| one model learns")]
    assert "| all tasks, seed 1 / " in row and " / 9 | " in row and "12.3–" in row
    assert " / 9 |" not in claims.split("a cold start: ")[1].split("\n")[0]
    table = results.blocks(found)["recipe"].split("\n")
    assert sum(row.startswith("| `zero`") and " / 12.3 %" in row for row in table) == 1


def test_a_claim_that_fails_for_one_seed_says_no():
    found = json.loads(source("assets/results.json"))
    name = next(iter(found["runs"]))

    def verdict():
        return results.blocks(found)["claims"].split("a majority of 16")[1].split("\n")[0]

    assert "**no**" not in verdict()
    found["runs"][name]["stages"]["zero"]["countdown"]["cons@16"] = 0.9
    assert "**no**" in verdict()


def test_the_controls_that_the_readme_names_hold_in_every_run():
    rows = results.claims(json.loads(source("assets/results.json")))
    prose = " ".join(README[README.index("### What we learnt"):].split())
    for said, claim in (
            ("Rewards shuffled within each group", "rewards shuffled within each group"),
            ("The format reward alone", "format reward alone: tags"),
            ("ends within a point of the stage", "accuracy reward alone: within a point of zero"),
            ("without division by length and std", "without division by length and std"),
            ("closed by force", "the answer comes from the search"),
            ("RL on arithmetic, logic and code helps", "RL on arithmetic, logic and code helps")):
        assert said in prose and [row[3] for row in rows if row[0].startswith(claim)] == ["yes"]


def test_every_claim_that_does_not_hold_is_listed():
    rows = [["a", "seed 1", "1 %", "yes"],
            ["b", "seed 1 / 2", "2 %", "**no**: x (fails in 1 of 2)"],
            ["c", "seed 1", "3 %", "**no** (fails in 1 of 1)"]]
    text, _, *lines = results.missed(rows).split("\n")
    held = "1 of the 3 claims hold in each seed that they were run in, three or five"
    assert text == f"{held}. These do not:"
    assert lines[2:] == ["| b | 1 of 2 seeds: x |", "| c | 1 of 1 seeds |"]


def test_what_the_readme_says_of_the_corpus_is_what_data_py_prints(capsys):
    data.main()
    printed = capsys.readouterr().out
    habits, patience = printed.splitlines()[-2:]
    attempts, shares = habits.split(": ")
    names, figures = zip(*re.findall("([^,%]+) ([0-9.]+ %)", shares), strict=True)
    table = [" | ".join(map(str.strip, row)) for row in (names, figures)]
    prose = " ".join(README.split())
    assert len(names) == 7 and all(f"| {row} |" in README for row in table)
    assert attempts in prose and patience[1:] in prose  # a capital there
    example, = [body for _, body in FENCED if body.startswith("User: ")]
    assert example in printed


# ---------------------------------------------------------------------------------------- code


def test_the_code_in_the_readme_is_the_code():
    start, end = README.index("## GRPO, line by line"), README.index("Watch the reward")
    rows = re.findall(r"^\| [^|`]+ \| `([^`]+)` \|$", README[start:end], re.M)
    assert len(rows) == 7 and all(row in source("grpo.py") for row in rows)
    for stage in train.STAGES:
        assert f"`{stage}`" in README


@pytest.fixture
def as_module(tmp_path, monkeypatch):
    """Imports a text, such as code of the README, as a module."""
    def load(text):
        (tmp_path / "written.py").write_text(text, "utf-8")
        spec = importlib.util.spec_from_file_location("written", tmp_path / "written.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "written", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    return load


@pytest.fixture
def variant(as_module):
    """grpo.py with the README's line for a variant in place of the line that it names."""
    def load(name):
        row = next(line for line in README.splitlines() if line.startswith(f"| {name}"))
        old, new = re.findall("`([^`]+)`", row)
        assert source("grpo.py").count(old) == 1
        return as_module(source("grpo.py").replace(old, new))
    return load


def batch():
    """logp (with gradient), logp_old, adv and a ragged mask, in float64."""
    g = torch.Generator().manual_seed(0)
    logp = (-2 * torch.rand(4, 6, generator=g, dtype=torch.float64)).requires_grad_()
    logp_old = logp.detach() + 0.4 * torch.randn(4, 6, generator=g, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [4]])
    return logp, logp_old, torch.tensor([1.5, -1.0, 0.5, -0.2]).double(), mask


def test_the_variant_rloo_compares_with_the_mean_of_the_others(variant):
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.0]])
    others = [rewards[0, [j for j in range(4) if j != i]].mean() for i in range(4)]
    got = variant("RLOO").group_advantages(rewards)[0]
    assert torch.allclose(got, rewards[0] - torch.stack(others))


def test_the_variant_gspo_has_one_ratio_per_completion(variant):
    (logp, logp_old, adv, mask), cfg = batch(), GRPOConfig(kl_coef=0.0)
    loss, _ = variant("GSPO").grpo_loss(logp, logp_old, None, adv, mask, cfg)
    losses = []
    for i in range(4):
        s = (logp - logp_old)[i][mask[i]].mean().exp()
        losses.append(-torch.min(s * adv[i], s.clamp(0.8, 1.2) * adv[i]))
    want = torch.stack(losses).mean()
    assert loss.item() == pytest.approx(want.item(), abs=1e-12)
    got, wanted = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (loss, want))
    assert torch.allclose(got, wanted, atol=1e-12)


def test_the_variant_cispo_keeps_the_gradient_of_clipped_tokens(variant):
    (logp, logp_old, adv, mask), cfg = batch(), GRPOConfig(kl_coef=0.0, loss_norm="token")
    loss, _ = variant("CISPO").grpo_loss(logp, logp_old, None, adv, mask, cfg)
    weight = (logp - logp_old).detach().exp().clamp(max=1.2)
    want = -(weight * adv[:, None] * logp)[mask].mean()
    assert loss.item() == pytest.approx(want.item(), abs=1e-12)
    got, wanted = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (loss, want))
    assert torch.allclose(got, wanted, atol=1e-12) and (got[mask] != 0).all()


def test_the_new_task_of_the_readme_works_as_written(tmp_path, monkeypatch, as_module):
    definition, registration = PYTHON[:2]
    monkeypatch.setattr(data, "TASKS", dict(data.TASKS))
    monkeypatch.setattr(rewards, "VERIFIERS", dict(rewards.VERIFIERS))
    as_module("from rewards import *\nfrom data import *\n" + definition + registration)
    problem = data.draw_problem(data.DataConfig(task="largest"), generators(1)[0])
    assert rewards.is_right(problem, f"<answer>{max(problem.numbers)}</answer>")
    assert not rewards.is_right(problem, f"<answer>{min(problem.numbers)}</answer>")
    run(tmp_path, "zero", tiny=[*PIPELINE, "--task=largest"])
    found = json.loads((tmp_path / "zero" / "eval.json").read_text(encoding="utf-8"))
    assert found["largest"]["problems"] == 3


def test_the_reward_of_the_readme_works_as_written(monkeypatch, as_module):
    parser = types.SimpleNamespace(parse=str, verify=str.__eq__)  # stands in for math-verify
    monkeypatch.setitem(sys.modules, "math_verify", parser)
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    as_module("from rewards import *\n" + PYTHON[2])
    problem = data.Problem("file", "?", (), "7")
    texts = ["<answer>7</answer>", "<answer>8</answer>", ""]
    assert rewards.REWARDS["algebra"]([problem] * 3, texts) == [1, 0, 0]


# ---------------------------------------------------------------------------------------- commands


def test_every_command_of_the_readme_is_one_that_there_is():
    assert len(COMMANDS) > 25
    for command in COMMANDS:
        script, *argv = shlex.split(command)[1:]
        if script == "train.py" and "--help" not in argv:
            train.parse(argv)
        elif script == "sample.py":
            sample.Parser("sample.py", "", sample.GROUPS).parse_args(argv)
        else:
            text = source(script) + source("tests/bench/common.py")
            for flag in re.findall(r"--[\w-]+", command):
                assert flag == "--help" or flag[2:] in text, (command, flag)


def test_the_adapters_of_the_readme_judge_as_our_rewards_do(as_module):
    code = source("tests/bench/trl_train.py")
    in_trl = re.search(r"^def in_trl.*?return judge\n", code, re.S | re.M)
    ours = as_module("import data\nimport rewards\n" + in_trl[0] + PYTHON[3])
    ours.problems = [data.Problem("arithmetic", "what is 1+2", (1, 2), 3)]
    texts = ["<think>1</think><answer>3</answer>", "<answer>4</answer>"]
    said = [[{"role": "assistant", "content": text}] for text in texts]
    assert ours.in_trl(rewards.accuracy)(said, problem=[0, 0], prompts=said) == [1, 0]
    extra = {"question": "what is 1+2", "numbers": [1, 2]}
    scores = [ours.compute_score("arithmetic", text, 3, extra) for text in texts]
    assert scores == rewards.score(ours.problems * 2, texts, rewards.RewardConfig())[0]


def in_order(command):
    """What makes checkpoints comes before what reads them."""
    reads = any(word in command for word in ("table", " eval ", "export", "sample.py"))
    exported = "--init_from=out-hf" in command
    return reads, exported or "--base=" in command or "--rl_steps=120" in command


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, lenient):  # noqa: F811
    """In one folder, with tiny settings in place of the defaults."""
    monkeypatch.chdir(tmp_path)
    tiny = [flag for flag in PIPELINE if not flag.startswith("--rl_steps")]
    others = ("--help", "SmolLM2", "out-smol", "largest", "tests/", "data.py")
    chosen = [c for c in COMMANDS if not any(word in c for word in others)]
    for command in sorted(chosen, key=in_order):
        script, *argv = shlex.split(command)[1:]
        if script == "sample.py":
            sample.main([*argv, "--max_new_tokens=8"])
        elif "eval" in argv:
            train.main([*argv, "--eval_problems=3", "--eval_samples=2"])
        elif "export" in argv or "table" in argv:
            train.main(argv)
        else:
            steps = 3 if "--rl_steps=120" in command else 2
            train.main([*argv, *tiny, f"--rl_steps={steps}"])
    for path in ("out-all/r1/eval.json", "out-hf/model.safetensors", "out/zero_emoji/ckpt.pt"):
        assert os.path.exists(path)
