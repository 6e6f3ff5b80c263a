"""Controls that a sceptic asks for, on any finished run of the toy: base, zero and, if there, r1.

    python tests/bench/evidence.py shuffle --out_dir=out1   # rewards shuffled within each group
    python tests/bench/evidence.py alone --out_dir=out1     # one reward alone; no division
    python tests/bench/evidence.py passk --out_dir=out1     # pass@k of base and zero
    python tests/bench/evidence.py budget --out_dir=out1    # thinking cut short; majority votes
    python tests/bench/evidence.py cooler --out_dir=out1    # base and zero at lower temperatures
    python tests/bench/evidence.py steps --out_dir=out1     # accuracy and length over the RL steps
    python tests/bench/evidence.py unread --out_dir=out-all # a small base without patient authors
    python tests/bench/evidence.py requests --out_dir=out-all  # dev3 and r1, many requests in chat
    python tests/bench/evidence.py draw --to=assets         # pictures of all of assets/results.json
    python tests/bench/evidence.py draw out1 out2 --to=.    # ... or of these runs
    python tests/bench/evidence.py rows out1 out2           # rows for the table of claims

Each writes OUT_DIR/evidence/COMMAND.json, and a picture beside it if matplotlib is installed. All
flags of train.py are understood; what is not given is as in the run's zero.
"""
import math
import os
import shutil
import sys
from dataclasses import dataclass, fields
from functools import partial
from unittest.mock import patch

import torch
from tqdm import tqdm

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from results import FILE, commit, evidence_rows, table  # noqa: E402

import data  # noqa: E402
import rewards  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from model import (  # noqa: E402
    UserError,
    any_terminal,
    generate,
    generators,
    load_checkpoint,
    load_model,
    opt,
    pick,
    read_json,
    validate,
)


@dataclass
class EvidenceConfig:
    to: str = opt("", "JSON file to write; none = out_dir/evidence/COMMAND.json. For draw a folder")
    problems: int = opt(200, "held-out problems of each task, for passk, budget, cooler, requests",
                        least=1)
    samples: int = opt(0, "samples of each; 0 = 256 for passk, else 16", least=0)
    every: int = opt(20, "RL steps between the evaluations of `steps`", least=1)


def told(given):
    """What RL from a run's base is told: the settings of its zero, and the flags given."""
    out_dir = given["out_dir"]
    then = load_checkpoint(os.path.join(out_dir, "zero", "ckpt.pt"))["settings"]
    base = then.get("base") or os.path.join(out_dir, "base", "ckpt.pt")
    return {**then, "device": "auto", "threads": 0, "eval_every": 0, "base": base,
            "export_dir": "", **given}


def tasks_of(settings):
    return list(pick(data.DataConfig, settings).tasks())


def results_of(folder, tasks):
    results = sample.read_results(folder)
    for found in results.values():
        found.pop("settings", None)
    return {task: results[task] for task in tasks}


def open_run(given, stages):
    """(tokenizer, settings, {stage: its model}) of a run; stages that it lacks are left out."""
    paths = {stage: os.path.join(given["out_dir"], stage, "ckpt.pt") for stage in stages}
    paths |= {"base": told(given)["base"]} if "base" in stages else {}
    _, _, tok, cfg = sample.open_checkpoint(given, paths["zero"])
    models = {stage: sample.for_sampling(load_model(path), cfg.sample)
              for stage, path in paths.items() if os.path.exists(path)}
    return tok, cfg, models


# ------------------------------------------------------------------------------------------------
# Other rewards, other losses

CONTROLS = {  # name: what it changes of zero's settings
    "shuffled": {}, "format_alone": {"w_accuracy": 0.0}, "accuracy_alone": {"w_format": 0.0},
    "undivided": {"adv_norm": "none", "loss_norm": "constant"}}


class Shuffled(rewards.Environment):
    """Rewards that say nothing: those of each group, dealt out anew among its samples."""

    def __init__(self, group_size, seed, *others):
        super().__init__(*others)
        self.group_size, self.seed = group_size, seed

    def reward(self, samples):
        totals, parts = super().reward(samples)
        # From the samples, so that a resumed run shuffles as an uninterrupted one would have.
        rng, _ = generators("shuffle", self.seed, *[s.ids for s in samples])
        order, G = [], self.group_size
        for i in range(0, len(samples), G):
            order += rng.sample(range(i, i + G), G)
        return [totals[i] for i in order], [parts[i] for i in order]


def run_controls(names, args, given, path):
    """RL from the run's base that differs from its zero in the control alone, into evidence/NAME
    -> {base, zero or NAME: {task: its results}}."""
    settings, zero = told(given), os.path.join(given["out_dir"], "zero")
    found = {"tasks": tasks_of(settings), "seed": settings["seed"],
             "zero_steps": steps_of(zero), "zero": results_of(zero, tasks_of(settings))}
    for name in names:
        folder = os.path.join(given["out_dir"], "evidence", name)
        shuffled = partial(Shuffled, settings["group_size"], settings["seed"])
        env = shuffled if name == "shuffled" else rewards.Environment
        with patch.object(train, "Environment", env):
            train.run_command_line(["zero"], {**settings, **CONTROLS[name], "out_dir": folder})
        found["steps"] = min(found.get("steps", math.inf), steps_of(os.path.join(folder, "zero")))
        for key, stage in (("base", "base"), (name, "zero")):
            found[key] = results_of(os.path.join(folder, stage), found["tasks"])
    return found


def steps_of(folder):
    return load_checkpoint(os.path.join(folder, "ckpt.pt"))["step"]


DRAW_HABITS = data.draw_habits


def impatient(rng, task="countdown"):
    """An author's habits, drawn from those who do not count as patient."""
    while True:
        habits = DRAW_HABITS(rng, task)
        if habits.patience < data.ENOUGH.get(task, math.inf):
            return habits


def unread(args, given, path):
    """distill and small_zero once more, of a small base that has read no patient author: what RL
    cannot find there, the traces of the run's r1 still show. -> {stage: {task: its results}}"""
    settings = {**{key: told(given)[key] for key in ("task", "seed")}, **given}
    folder = settings["out_dir"] = os.path.join(given["out_dir"], "evidence", "unread")
    for stage in train.resolve_dependencies(["r1"]):
        os.makedirs(os.path.join(folder, stage), exist_ok=True)
        for file in ("ckpt.pt", "eval.json"):
            shutil.copy(os.path.join(given["out_dir"], stage, file), os.path.join(folder, stage))
    with patch.object(data, "draw_habits", impatient):
        train.run_command_line(["small_base"], settings)
    train.run_command_line(["distill", "small_zero"], settings)
    tasks = tasks_of(settings)
    return {"tasks": tasks, "seed": settings["seed"],
            **{stage: results_of(os.path.join(folder, stage), tasks)
               for stage in ("small_base", "distill", "small_zero")}}


# ------------------------------------------------------------------------------------------------
# Many samples


def count_right(model, tok, problems, n, cfg, name):
    """How many of n samples of each problem are right: with tags, and with tags ignored."""
    right, untagged = [0] * len(problems), [0] * len(problems)
    for start in range(0, n, 32):  # fewer at a time would be slower, and all take much memory
        k = min(32, n - start)
        _, generator = generators(cfg.sample.seed, "passk", name, start)
        for i, (problem, text, _) in enumerate(sample.sample_answers(
                model, tok, problems, k, cfg, cfg.grpo.temperature, generator,
                f"{name}, {start} of {n} samples")):
            right[i // k] += rewards.is_right(problem, text)
            untagged[i // k] += rewards.is_right_untagged(problem, text)
    return {name: right, f"{name}, tags ignored": untagged}


def doubling(n):
    return [2**i for i in range(n.bit_length())]


def passk(args, given, path):
    """pass@k of base, with tags and with tags ignored, and of zero."""
    (tok, cfg, models), n = open_run(given, ("base", "zero")), args.samples or 256
    found = {"tasks": list(cfg.data.tasks()), "samples": n, "pass@k": {}, "right": {}}
    for task in found["tasks"]:
        problems, counts = data.eval_problems(cfg.data, args.problems, task), {}
        for stage, model in models.items():
            counts |= count_right(model, tok, problems, n, cfg, stage)
        curves = {name: {k: sum(sample.pass_at_k(n, c, k) for c in right) / len(right)
                         for k in doubling(n)} for name, right in counts.items()}
        del curves["zero, tags ignored"]  # next to zero's own
        found["pass@k"][task], found["right"][task] = curves, counts
    return found


def cooler(args, given, path):
    """pass@1 of base and zero by the temperature of sampling: what do likelier answers bring that
    need no RL?"""
    (tok, cfg, models), k = open_run(given, ("base", "zero")), args.samples or 16
    found = {"tasks": list(cfg.data.tasks()), "samples": k, "cooler": {}}
    for task in found["tasks"]:
        problems, curves = data.eval_problems(cfg.data, args.problems, task), {}
        for stage, model in models.items():
            for temperature in (1.0, 0.6, 0.3, 0.1, 0.05):
                metrics, _ = sample.evaluate(model, tok, problems, k, cfg, temperature)
                curves.setdefault(stage, {})[temperature] = metrics["pass@1"]
                curves.setdefault(f"{stage}, tags ignored", {})[temperature] = metrics[
                    "pass@1_untagged"]
        del curves["zero, tags ignored"]  # next to zero's own
        found["cooler"][task] = curves
    return found


def think_within(model, tok, answers, budget, cfg, generator):
    """What `sample_answers` returned, had thinking been closed by force after `budget` tokens and
    the model then answered -> for each the text, the tokens of thinking, whether it was closed."""
    closers = {id for id, piece in tok.bytes_of.items() if b"</think>" in piece}
    texts, thought, prompts = [], [], {}
    for i, (_, text, completion) in enumerate(answers):
        ids = completion.ids
        n = next((t for t, id in enumerate(ids) if id in closers), len(ids) + completion.truncated)
        head = data.completion_text(ids[:budget], tok, cfg.data)
        thinks = "<think>" in head
        if thinks and n > budget:  # what was sampled up to here is what a shorter limit had given
            closing = "\n" * (not head.endswith("\n")) + "</think>\n<answer>"
            prompts[i] = completion.prompt + ids[:budget] + tok.encode(closing)
        texts.append(text)
        thought.append(min(n, budget) if thinks else 0)
    rows, (stop_ids, find_end) = list(prompts), data.stops(tok, cfg.data)
    for at in tqdm(range(0, len(rows), 256), f"budget {budget}", leave=False, disable=None):
        chunk = rows[at:at + 256]
        room = model.cfg.context - max(len(prompts[i]) for i in chunk)
        out = generate(model, [prompts[i] for i in chunk], 1, min(32, room), cfg.grpo.temperature,
                       stop_ids, generator, find_end)
        for i, completion in zip(chunk, out, strict=True):
            ids = completion.prompt[len(answers[i][2].prompt):] + completion.ids
            texts[i] = data.completion_text(ids, tok, cfg.data)
    return texts, thought, [i in prompts for i in range(len(answers))]


def budget(args, given, path):
    """Accuracy by the tokens of thinking allowed, and by the number of votes, of zero and r1."""
    (tok, cfg, models), k = open_run(given, ("zero", "r1")), args.samples or 16
    limit, tasks = cfg.grpo.max_new_tokens, list(cfg.data.tasks())
    found = {"tasks": tasks, "samples": k}
    found |= {key: {task: {stage: {} for stage in models} for task in tasks}
              for key in ("budget", "thinking", "closed", "cons@k")}
    for task in tasks:
        problems = data.eval_problems(cfg.data, args.problems, task)
        for stage, model in models.items():
            _, generator = generators(cfg.sample.seed, "budget", stage)
            answers = sample.sample_answers(model, tok, problems, k, cfg, cfg.grpo.temperature,
                                            generator, f"{stage}: {task}")
            for most in [b for b in doubling(limit - 1) if b >= 8] + [limit]:
                texts, *others = think_within(model, tok, answers, most, cfg, generator)
                right = [rewards.is_right(problem, text)
                         for (problem, *_), text in zip(answers, texts, strict=True)]
                for key, values in zip(("budget", "thinking", "closed"), (right, *others),
                                       strict=True):
                    found[key][task][stage][most] = sum(values) / len(values)
            verdicts = [rewards.verify(problem, text) for problem, text, _ in answers]
            found["cons@k"][task][stage] = {n: cons(verdicts, k, n) for n in doubling(k)}
    return found


def cons(verdicts, k, n):
    """How often the majority of n is right: `verdicts` of k samples each, cut into groups of n."""
    groups = [verdicts[i + j:i + j + n] for i in range(0, len(verdicts), k)
              for j in range(0, k - n + 1, n)]
    return sum(map(sample.majority_vote, groups)) / len(groups)


def requests(args, given, path):
    """dev3 and r1 asked the same requests in chat, more of them than in an evaluation -> pass@1 of
    both, and by how much r1 is right more often: mean over requests, 95 % interval of it."""
    (tok, cfg, models), k = open_run(given, ("zero", "dev3", "r1")), args.samples or 16
    if "r1" not in models:
        raise UserError(f"there is no r1 in {given['out_dir']}: python train.py r1 makes it")
    problems, found, shares = data.eval_problems(cfg.data, args.problems, "chat"), {}, {}
    for stage in ("dev3", "r1"):
        metrics, lines = sample.evaluate(models[stage], tok, problems, k, cfg, cfg.grpo.temperature)
        found[stage] = metrics["pass@1"]
        right = torch.tensor([line["right"] for line in lines]).double()
        shares[stage] = right.view(len(problems), k).mean(dim=1)
    gains = shares["r1"] - shares["dev3"]
    mean, half = gains.mean().item(), 1.96 * gains.std().item() / len(gains) ** 0.5
    return {"tasks": ["chat"], "problems": len(problems), "samples": k,
            "chat": {**found, "gain": mean, "gain_ci": [mean - half, mean + half]}}


def first_problems(ckpt, n, tasks):
    """pass@1, the majority vote and the length of a base in those n held-out problems of each task
    whose samples lie beside its checkpoint, as `sample.evaluate` counts them."""
    folder = sample.results_folder(ckpt)
    lines, found = sample.read_lines(os.path.join(folder, "samples.jsonl")), {}
    for task in tasks:
        k = sample.read_results(folder)[task]["samples"]
        own = [line for line in lines if line["task"] == task][:n * k]
        votes = [sample.majority_vote([(s["answer"], s["right"]) for s in own[i:i + k]])
                 for i in range(0, len(own), k)]
        found[task] = {"pass@1": sum(s["right"] for s in own) / len(own),
                       f"cons@{k}": sum(votes) / len(votes),
                       "length": sum(s["length"] for s in own) / len(own),
                       "problems": len(votes), "samples": k}
    return found


def steps(args, given, path):
    """RL from the run's base as in zero, evaluated in full every so many steps."""
    settings = told({"eval_problems": args.problems, **given})
    folder, tasks = os.path.join(given["out_dir"], "evidence", "steps"), tasks_of(settings)
    last = settings["rl_steps"]

    def evaluate(run, model):
        step = sample.read_lines(run.path("metrics.jsonl"))[-1]["step"]
        sample.evaluate_tasks(model, run.tok, run.cfg, os.path.join(folder, str(step)))

    with patch.object(train.Run, "evaluate", evaluate):
        train.run_command_line(["zero"], {**settings, "eval_every": args.every, "out_dir": folder})
    points = {"0": first_problems(settings["base"], settings["eval_problems"], tasks)}
    for step in [*range(args.every, last, args.every), last]:
        of = os.path.join(folder, str(step) if step < last else "zero")
        if not sample.read_results(of):
            raise UserError(f"{of} holds no evaluation, as after a kill: delete {folder}")
        points[str(step)] = results_of(of, tasks)
    vote = next(key for key in points["0"][tasks[0]] if key.startswith("cons@"))
    curves = {key: {task: {name: {at: point[task][name] for at, point in points.items()}
                           for name in names} for task in tasks}
              for key, names in {"accuracy": ("pass@1", vote), "length": ("length",)}.items()}
    return {"tasks": tasks, "seed": settings["seed"], **curves, "points": points}


# ------------------------------------------------------------------------------------------------
# Pictures, and the command line

PICTURES = {  # command: {what is drawn, a row each: (title, label of the x axis, whether log)}
    "passk": {"pass@k": ("pass@k, %", "samples k", True)},
    "budget": {"budget": ("right, %", "thinking tokens allowed", True),
               "cons@k": ("majority right, %", "votes k", True)},
    "cooler": {"cooler": ("right, %", "temperature of sampling", True)},
    "steps": {"accuracy": ("right, %", "GRPO step", False),
              "length": ("tokens", "GRPO step", False)}}


def draw(name, runs, path):
    """The figures of the same command for several runs: thin lines for these, a thick one for their
    mean. A row for each kind of figure, a column for each task."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no matplotlib, no picture")
    tasks, rows = runs[0]["tasks"], PICTURES[name]
    size = min(8.1, 1.2 + 3.6 * len(tasks)), 0.5 + 2.3 * len(rows)  # at most 900 pixels wide
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(len(rows), len(tasks), squeeze=False, sharey="row")
    for row, (key, (title, label, log)) in zip(axes, rows.items(), strict=True):
        for axis, task in zip(row, tasks, strict=True):
            for i, curve in enumerate(runs[0][key][task]):
                found = [run[key][task][curve] for run in runs if curve in run[key][task]]
                xs = [x for x in found[0] if all(x in points for points in found)]
                scale = 1 if key == "length" else 100
                ys = [[scale * points[x] for x in xs] for points in found]
                ticks = [float(x) for x in xs]
                for y in ys if len(ys) > 1 else ():
                    axis.plot(ticks, y, f"C{i}", linewidth=0.7, alpha=0.5)
                mean = [sum(y) / len(y) for y in zip(*ys, strict=True)]
                axis.plot(ticks, mean, f"C{i}.-", linewidth=1.8, label=curve)
            if log:
                axis.set_xscale("log", base=2)
                axis.set_xticks(ticks[::2], [f"{x:g}" for x in ticks[::2]])
            axis.tick_params(labelsize=9)
            axis.set_xlabel(label, fontsize=9)
            axis.set_ylim(0, None if key == "length" else 103)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(title, fontsize=9)
    for axis, task in zip(axes[0], tasks, strict=True):
        axis.set_title(task, fontsize=10)
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=110)


COMMANDS = {"shuffle": partial(run_controls, ["shuffled"]),
            "alone": partial(run_controls, ["format_alone", "accuracy_alone", "undivided"]),
            "passk": passk, "budget": budget, "cooler": cooler, "steps": steps, "unread": unread,
            "requests": requests}


def read_runs(folders):
    """[{command: its JSON}] of out_dirs; without any, of what results.py has gathered."""
    if not folders:
        return list(read_json(FILE)["evidence"].values())
    paths = [{name: os.path.join(folder, "evidence", f"{name}.json") for name in COMMANDS}
             for folder in folders]
    return [{name: read_json(path) for name, path in run.items() if os.path.exists(path)}
            for run in paths]


def print_rows(runs):
    print(table(["claim", "command", "measured, by seed", "every seed"], evidence_rows(runs)))


def main(argv):
    groups = {f.name: f.default_factory for f in fields(train.Config)}
    parser = sample.Parser("evidence.py", __doc__, {"evidence": EvidenceConfig, **groups},
                           usage="python tests/bench/evidence.py COMMAND [--setting=value ...]")
    parser.add_argument("command", choices=[*COMMANDS, "draw", "rows"])
    parser.add_argument("folders", nargs="*", help="out_dirs, for draw and rows")
    given = {"out_dir": "out", **vars(parser.parse_args(argv))}
    own = {f.name: given.pop(f.name) for f in fields(EvidenceConfig) if f.name in given}
    command, folders, args = given.pop("command"), given.pop("folders", []), EvidenceConfig(**own)
    with any_terminal(), sample.one_line_errors("evidence.py", given["out_dir"]):
        validate(args)
        if command == "rows":
            return print_rows(read_runs(folders))
        if command == "draw":
            runs = read_runs(folders)
            for name in PICTURES:
                if found := [run[name] for run in runs if name in run]:
                    draw(name, found, os.path.join(args.to or "assets", f"{name}.png"))
            return None
        path = args.to or os.path.join(given["out_dir"], "evidence", f"{command}.json")
        begun_with = commit()
        found = COMMANDS[command](args, given, path)
        sample.write_json(path, {**found, "commit": begun_with})
        found = read_json(path)  # JSON's keys are texts
        print_rows([{command: found}])
        print(f"{path} holds all figures")
        if command in PICTURES:
            draw(command, [found], f"{path.removesuffix('.json')}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
