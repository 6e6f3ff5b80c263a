"""Makes the figures of README.md and assets/results.md: runs the recipe for each seed, gathers
what it wrote into assets/results.json, and writes the tables from there. tests/test_readme.py
compares them.

    python tests/bench/results.py --run       # hours: everything, in out1, out2, ...; resumes
    python tests/bench/results.py --run --jobs=1 --only="seed 1;controls, seed 1"
    python tests/bench/results.py             # then: gather what lies here, write the tables
    python tests/bench/results.py --write     # write the tables from assets/results.json as it is
"""
import argparse
import io
import json
import operator
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.append(ROOT)
import data  # noqa: E402
import rewards  # noqa: E402
import train  # noqa: E402

FILE = os.path.join(ROOT, "assets", "results.json")
SEEDS = (1, 2, 3, 4, 5)  # of zero, and of the recipe up to r1
ABLATED, SMALL = (1, 2, 3), (1, 4, 5)  # three for everything else, so that each seed has its part
ASK = "python sample.py --numbers=3,7,2 --target=20 --n=1"
STAGES = ("base", "zero", "zero_emoji", "dev1", "dev2", "dev2_free", "dev3", "r1", "r1_hacked",
          "small_base", "small_zero", "distill")
SHOWN_STEPS = (1, 5, 10, 20, 60)
RUNS, OF_A_BASE, CONTROLS = {}, {}, {}  # name: the commands that make it; of what RUNS made
for seed in SEEDS:
    n, end = "" if seed == 1 else seed, f"--seed={seed} --threads=1 --out_dir="
    control = "python tests/bench/evidence.py {} --threads=1 --out_dir={}{}".format
    parts = ["zero", "r1"]
    CONTROLS[f"r1's controls, seed {seed}"] = [
        control(name, "out-all", n)
        for name in ["requests --problems=500"] + ["budget --problems=100"] * (seed in ABLATED)]
    RUNS[f"seed {seed}"] = [f"python train.py {end}out{seed}"]
    if seed in ABLATED:
        parts.append("dev2_free r1_hacked")
        OF_A_BASE[f"emoji, seed {seed}"] = [
            f"python train.py zero_emoji --base=out{seed}/base/ckpt.pt --eval_every=0 {end}"
            f"out-emoji{n}"]
        CONTROLS[f"controls, seed {seed}"] = [control(name, "out", seed) for name in (
            "shuffle", "alone", "passk --problems=100 --samples=128", "cooler --problems=100")]
    if seed in SMALL:
        parts.append("distill small_zero")
        OF_A_BASE[f"three tasks, seed {seed}"] = [  # RL on them; countdown is evaluated as well
            f"python train.py zero --task=all --mix=arithmetic,logic,code "
            f"--base=out-all{n}/base/ckpt.pt {end}out-three{n}"]
        CONTROLS[f"unread, seed {seed}"] = [control("unread", "out-all", n)]
        CONTROLS[f"steps, seed {seed}"] = [control("steps --problems=100", "out", seed)]
    RUNS[f"all tasks, seed {seed}"] = [
        f"python train.py {stages} --task=all {end}out-all{n}" for stages in parts]
RUNS |= OF_A_BASE
ALL_COMMANDS = RUNS | CONTROLS
FROM_A_BASE = (*OF_A_BASE, *CONTROLS)
FOLDERS = " ".join(f"out{seed}" for seed in SEEDS)
PICTURES = [f"python tests/bench/curves.py {FOLDERS} --to=assets/zero.png",  # want matplotlib
            "python tests/bench/curves.py out-all --to=assets/all.png",
            "python tests/bench/pipeline.py --to=assets/pipeline.png",
            "python tests/bench/evidence.py draw --to=assets"]


# ------------------------------------------------------------------------------------------------
# Running and gathering


def folder(name):
    return os.path.join(ROOT, ALL_COMMANDS[name][0].split("--out_dir=")[1])


def read(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def carry_out(name):
    """Runs the commands of one run, and writes into made.json how long each took (of one that was
    resumed the last part) and with which commit."""
    os.makedirs(folder(name), exist_ok=True)
    path = os.path.join(folder(name), "made.json")
    made = read(path) if os.path.exists(path) else {}
    for command in ALL_COMMANDS[name]:
        if command in made:
            continue
        begun_with = commit()
        with open(os.path.join(folder(name), "log.txt"), "a", encoding="utf-8") as log:
            t0 = time.time()
            argv = [sys.executable, *command.split()[1:]]
            subprocess.run(argv, cwd=ROOT, stdout=log, stderr=log, check=True)
        made[command] = {"minutes": (time.time() - t0) / 60, "commit": begun_with,
                         "cpu": cpu_name(), "torch": torch.__version__}
        with open(path, "w", encoding="utf-8") as f:
            json.dump(made, f)


def gather(known):
    """`known`, what results.json holds, with what the runs wrote that lie here in place of what is
    known of them: {"about": where all was run that says nothing else, "seen", "runs": {name:
    {"made", "stages": {stage: eval.json}}}, "evidence": {name: {control: its JSON}}, "earlier":
    what other commands have measured}."""
    runs, evidence = {}, {}
    here = [name for name in RUNS if os.path.exists(os.path.join(folder(name), "made.json"))]
    for name in RUNS:
        where, stages = folder(name), {}
        if name not in here:
            if name in known["runs"]:
                runs[name], evidence[name] = known["runs"][name], known["evidence"][name]
            continue
        for stage in sorted(os.listdir(where)):
            path = os.path.join(where, stage, "eval.json")
            if os.path.exists(path):
                stages[stage] = round_all(read(path))
                for found in stages[stage].values():
                    for key in ("settings", "asked"):  # the latter until 3eede02
                        found.pop(key, None)
                if os.path.exists(os.path.join(where, stage, "samples.jsonl")) and (
                        "countdown" in stages[stage]):
                    stages[stage]["countdown"] |= round_all(in_samples(where, stage))
        made = round_all(read(os.path.join(where, "made.json")))
        runs[name] = {"made": made, "stages": stages}
        path = os.path.join(where, "evidence")
        found = [file for file in sorted(os.listdir(path)) if file.endswith(".json")] \
            if os.path.exists(path) else []
        shown = {file[:-5]: round_all(read(os.path.join(path, file))) for file in found}
        evidence[name] = {control: of for control, of in shown.items() if "commit" in of}  # done
    first = next(iter(RUNS))
    return {"earlier": known["earlier"], "runs": runs, "evidence": evidence,
            "seen": seen(folder(first)) if first in here else known["seen"],
            "about": known["about"]}


def seen(where):
    """What a person sees of a run: lines of zero's log (controls come after it), and one puzzle."""
    with open(os.path.join(where, "log.txt"), encoding="utf-8") as f:
        lines = f.read().splitlines()
    rows = {int(m[1]): line for line in reversed(lines) if (m := re.match(r" +(\d+)/60 ", line))}
    header = next(line for line in lines if re.match(" +step reward ", line))
    command = [sys.executable, *ASK.split()[1:], f"--ckpt={where}/zero/ckpt.pt"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {"log": "\n".join([header, *[rows[i] for i in SHOWN_STEPS]]), "solved": shown.strip()}


def last_table(stages):
    """What `python train.py` prints at its end: the first table."""
    with redirect_stdout(io.StringIO()) as printed:
        train.print_tables({stage: stages[stage] for stage in ("base", "zero")}, ["countdown"])
    return printed.getvalue().strip().split("\n\n")[0]


def samples_of(where, stage):
    """The countdown samples that its evaluation kept."""
    with open(os.path.join(where, stage, "samples.jsonl"), encoding="utf-8") as f:
        return [line for line in map(json.loads, f) if line["task"] == "countdown"]


def in_samples(where, stage):
    """Shares of the completions kept: not in one language throughout; in format with misses enough
    to count as patient, which no author of the corpus is (who hits earlier is not counted)."""
    lines = samples_of(where, stage)
    mixes = [line["one_language"] < 1 for line in lines]
    misses = [sum(verdict.startswith(rewards.MISS) for verdict in
                  rewards.VERDICT.findall(line["completion"])) for line in lines]
    habits = [line["format"] and n >= data.ENOUGH["countdown"]
              for line, n in zip(lines, misses, strict=True)]
    return {"mixes": sum(mixes) / len(mixes), "all_habits": sum(habits) / len(habits)}


def cpu_name():
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor()
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        found = re.search("model name\\s*: (.*)", f.read())
    return found[1] if found else platform.processor()


def commit():
    files = [f"{file}.py" for file in ("model", "data", "grpo", "rewards", "sample", "train")]
    command = ["git", "log", "-1", "--format=%h", "--", *files]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def round_all(x):
    if isinstance(x, dict):
        return {key: round_all(value) for key, value in x.items()}
    if isinstance(x, list):
        return [round_all(value) for value in x]
    return round(x, 5) if isinstance(x, float) else x


# ------------------------------------------------------------------------------------------------
# Tables


def table(head, rows):
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def pct(x):
    return f"{100 * x:.1f} %"


def whole(x):
    return f"{x:.0f}"


def by_seed(values, show=pct):
    return " / ".join(show(value).removesuffix(" %") for value in values).replace("-", "−")


def blocks(results):
    """{name of a block in README.md or assets/results.md: its Markdown}."""
    runs = results["runs"]
    head, *rows = claims(results)
    out = {"hardware": made_on(results), "claims": table(head, rows),
           "verdicts": missed(rows),
           "stages": stages_table(named(runs, "all tasks")),
           "now": now_table(named(runs, "seed")),
           "zen3": now_table(results["earlier"]["zen3"]["stages"]),
           "distillation": distillation_table(named(runs, "all tasks").values()),
           "recipe": recipe_table(named(runs, "all tasks").values())}
    seen = results["seen"] | {"ended": last_table(runs["seed 1"]["stages"])}
    out |= {name: f"```\n{text}\n```" for name, text in seen.items()}
    for name in ("speed", "speed_now", "rates", "sums"):
        head, *rows = results["earlier"][name]["rows"]
        out[name] = table(head, rows)
    out["smollm2"] = f"```\n{results['earlier']['smollm2']['text']}\n```"
    commands = [f"{command}   # {made['minutes']:.1f} minutes" for run in runs.values()
                for command, made in run["made"].items()]
    return out | {"commands": "```\n" + "\n".join(commands) + "\n```"}


def named(runs, kind):
    """{name: {stage: eval.json}} of the runs named "KIND, seed N", or "seed N" for "seed"."""
    start = f"{kind}, " if kind != "seed" else "seed "
    return {name: run["stages"] for name, run in runs.items() if name.startswith(start)}


def with_seeds(names):
    """"all tasks, seed 1", "all tasks, seed 2" -> "all tasks, seed 1 / 2"."""
    seeds = {}
    for name in names:
        kind, seed = name.rsplit(" ", 1)
        seeds.setdefault(kind, []).append(seed)
    return "; ".join(f"{kind} {' / '.join(found)}" for kind, found in seeds.items())


def made_on(results):
    """Which runs were made with which commit, on which CPU, with how many threads."""
    about, found = results["about"], {}
    for name, run in results["runs"].items():
        for command, made in run["made"].items():
            control = re.search(r"evidence.py (\w+)", command)
            label = f"{control[1]}, {name}" if control else name
            threads = re.search(r"--threads=(\d+)", command)
            key = made["commit"], *(made.get(key, about[key]) for key in ("cpu", "torch")), (
                threads[1] if threads else "one per core")
            found.setdefault(key, {})[label] = True
    rows = [[*key, with_seeds(labels)] for key, labels in found.items()]
    return "All in fp32.\n\n" + table(["commit", "CPU", "torch", "threads", "runs"], rows)


def stages_table(runs):
    """Of each stage of the recipe the least and the greatest figure of the seeds."""
    columns = [(task, task, "pass@1") for task in data.REASONING]
    columns += [("mix languages", "countdown", "mixes"), ("chat right", "chat", "pass@1"),
                ("unsafe declined", "unsafe", "pass@1")]
    rows = []
    for stage in STAGES:
        found = {int(name.split("seed ")[1]): stages[stage] for name, stages in runs.items()
                 if stage in stages}
        if found:
            seeds = sorted(found)
            in_a_row = seeds == list(range(seeds[0], seeds[-1] + 1))
            which = f"{seeds[0]}–{seeds[-1]}" if in_a_row else ", ".join(map(str, seeds))
            cells = [span([of[task][key] for of in found.values()]) for _, task, key in columns]
            rows.append([f"`{stage}`", which, *cells])
    return table(["%", "seeds", *[heading for heading, *_ in columns]], rows)


def span(xs):
    """The least and the greatest of shares, in per cent; one figure where these are the same."""
    return "–".join(dict.fromkeys(f"{100 * x:.1f}" for x in (min(xs), max(xs))))


def recipe_table(runs):
    """Each stage of the recipe on all four tasks, a figure per seed: single samples, and general
    requests."""
    columns = [(task, task, "pass@1", pct) for task in data.REASONING]
    columns += [("completions that mix languages", "countdown", "mixes", pct),
                ("length", "countdown", "length", whole), ("chat right", "chat", "pass@1", pct),
                ("unsafe declined", "unsafe", "pass@1", pct),
                ("chat thinks", "chat", "thinks", pct),
                ("in chat other answers than dev3's", "win_rate", "differ", pct),
                ("of these win (ties half)", "win_rate", "gold", pct),
                ("... says the judge", "win_rate", "reward_model", pct)]
    rows = []
    for stage in STAGES:
        found = [stages[stage] for stages in runs if stage in stages]
        cells = [by_seed([of[task][key] for of in found if key in of.get(task, {})], show)
                 + " %" * (show is pct) for _, task, key, show in columns]
        if found:
            rows.append([f"`{stage}`", *["–" if cell == " %" else cell for cell in cells]])
    return table(["", *[heading for heading, *_ in columns]], rows)


def distillation_table(runs):
    """The two small models of the recipe, task by task, however they are asked; a figure, and an
    interval, per seed."""
    keys = {"T = 1": "pass@1", "T = 0.6": "pass@1_T=0.6", "greedy": "pass@1_greedy",
            "majority of 16": "cons@16"}
    rows = []
    for task in data.REASONING:
        for stage in ("small_base", "small_zero", "distill"):
            found = [stages[stage][task] for stages in runs if stage in stages]
            if found:
                cells = [by_seed([of[key] for of in found]) + " %" for key in keys.values()]
                cells[0] += f" ({interval(found)})"
                rows.append([f"`{stage}`", task, *cells])
    return table(["", "task", *keys], rows)


def interval(found):
    """The 95 % intervals of pass@1."""
    return " / ".join("–".join(f"{100 * x:.1f}" for x in of["pass@1_ci"]) for of in found)


def now_table(runs):
    head = ["run", "base pass@1 (tags ignored), pass@16", "zero pass@1", "T = 0.6", "greedy",
            "pass@16", "cons@16", "length", "completions that mix languages"]
    rows = []
    for name, stages in runs.items():
        b, z = (stages[stage]["countdown"] for stage in ("base", "zero"))
        rows.append([name, f"{pct(b['pass@1'])} ({pct(b['pass@1_untagged'])}), {pct(b['pass@16'])}",
                     f"{pct(z['pass@1'])} ({interval([z])})", pct(z["pass@1_T=0.6"]),
                     pct(z["pass@1_greedy"]), pct(z["pass@16"]), pct(z["cons@16"]),
                     f"{b['length']:.0f} → {z['length']:.0f}", pct(z["mixes"])])
    return table(head, rows)


def verdict(holds):
    """Whether a claim holds in each run: a bool, or {task: bool}, of each."""
    runs = [of if isinstance(of, dict) else {"": of} for of in holds]
    missed = dict.fromkeys(task for of in runs for task, is_so in of.items() if not is_so)
    failed = sum(not all(of.values()) for of in runs)
    where = ", ".join(filter(None, missed))
    fails = f"**no**{': ' * bool(where)}{where} (fails in {failed} of {len(runs)})"
    return fails if missed else "yes"


def missed(rows):
    """How many claims hold in each of their runs, and a table of those that do not, without what
    their words go on to say after a colon."""
    others = []
    for claim, _, _, holds in rows:
        if holds != "yes":
            where, seeds = re.search(r"no\*\*(:.*)? \(fails in (.*)\)", holds).groups()
            others.append([claim.split(": ")[0], f"{seeds} seeds{where or ''}"])
    held = (f"{len(rows) - len(others)} of the {len(rows)} claims hold in each seed that they were "
            f"run in, three or five. These do not:")
    return f"{held}\n\n{table(['claim', 'fails in (tasks: in any of these)'], others)}"


def claims(results):
    """Rows, the heading first: a claim, the runs, what is measured there, and whether its check
    holds for each of them. The check is as strong as the words."""
    toy, recipe, three, emoji = (named(results["runs"], kind)
                                 for kind in ("seed", "all tasks", "three tasks", "emoji"))
    emoji = {name: {**stages, "zero": toy[seed]["zero"], "zero's base": toy[seed]["base"]}
             for name, stages in emoji.items() if (seed := name.split(", ")[1]) in toy}

    def get(of, stage, key="pass@1", task="countdown", show=pct):
        return by_seed([stages[stage][task][key] for stages in of.values()], show)

    def four(of, stage, key="pass@1"):  # of each task the least and the greatest figure
        return " / ".join(span([stages[stage][task][key] for stages in of.values()])
                          for task in data.REASONING)

    def gains(stages, task):
        base, zero = stages["base"][task], stages["zero"][task]
        return zero["pass@1_ci"][0] > max(base["pass@1_ci"][1], base["pass@1_untagged"])

    def gained(stages, stage):
        return stages[stage]["chat"]["pass@1"] - stages["dev3"]["chat"]["pass@1"]

    def happier(stages, stage):
        rates = stages[stage]["win_rate"]
        return rates["reward_model"] - rates["gold"]

    def after_dev3(of, stage):
        return (f"chat right {get(of, 'dev3', task='chat')} → {get(of, stage, task='chat')}, "
                f"declined {get(of, 'dev3', task='unsafe')} → {get(of, stage, task='unsafe')}; "
                f"chat answered otherwise than by dev3: {get(of, stage, 'differ', 'win_rate')}, "
                f"of these win {get(of, stage, 'gold', 'win_rate')}, says the reward model "
                f"{get(of, stage, 'reward_model', 'win_rate')} %")

    def more_gold(of, stage):
        golds = [get(of, s, "gold_reward", "chat", "{:.2f}".format) for s in ("dev3", stage, "r1")]
        return f"gold reward in chat {golds[0]} → {golds[1]} (r1 {golds[2]})"

    def judge_agrees(of, key):
        return by_seed([stages["reward_model"]["pairs"][key] for stages in of.values()])

    def main(stages, stage, key="pass@1"):
        return stages[stage]["countdown"][key]

    rows = [  # claim, runs, what was measured of those that have it, check of one run
        ["at most 1 % of the base's samples, but 30 % of zero's or more, have all tags and 18 "
         "misses or more, which no author of the corpus combines", toy,
         lambda of: f"{get(of, 'base', 'all_habits')} → {get(of, 'zero', 'all_habits')} %",
         lambda s: main(s, "base", "all_habits") <= 0.01 and main(s, "zero", "all_habits") >= 0.3],
        ["RL alone lifts pass@1 above the pass@16 of the base, tags demanded of both (without: see "
         "`passk`)", toy,
         lambda of: f"pass@16 of `base` {get(of, 'base', 'pass@16')}; pass@1 of `zero` "
         f"{get(of, 'zero')} %",
         lambda s: main(s, "zero") > main(s, "base", "pass@16")],
        ["completions grow to twice their length or more, and no reward counts tokens", toy,
         lambda of: f"{get(of, 'base', 'length', show=whole)} → "
         f"{get(of, 'zero', 'length', show=whole)} tokens",
         lambda s: main(s, "zero", "length") >= 2 * main(s, "base", "length")
         and rewards.RewardConfig().w_length == 0],
        ["a majority of 16 samples at T = 1 (cons@16) is right more often than single ones (above "
         "the 95 % interval of pass@1), and at most a point less often than greedy answers", toy,
         lambda of: f"cons@16 {get(of, 'zero', 'cons@16')}, interval up to "
         f"{by_seed([main(s, 'zero', 'pass@1_ci')[1] for s in of.values()])}, greedy "
         f"{get(of, 'zero', 'pass@1_greedy')} %",
         lambda s: main(s, "zero", "cons@16") > main(s, "zero", "pass@1_ci")[1]
         and main(s, "zero", "cons@16") >= main(s, "zero", "pass@1_greedy") - 0.01],
        ["R1-Zero mixes languages in half of its completions or more, and so does its base (longer "
         "ones are likelier to)", toy,
         lambda of: f"base {get(of, 'base', 'mixes')} → zero {get(of, 'zero', 'mixes')} %",
         lambda s: min(main(s, "base", "mixes"), main(s, "zero", "mixes")) >= 0.5],
        ["the share of words in the prompt's language stays within 10 points from the base to "
         "R1-Zero", toy,
         lambda of: f"{get(of, 'base', 'one_language')} → {get(of, 'zero', 'one_language')} %",
         lambda s: abs(main(s, "base", "one_language") - main(s, "zero", "one_language")) <= 0.1],
        ["with a reward for emoji (and no division by the std) the share of a completion's lines "
         "that end with one is 95 % or more, and pass@1 is at most 3 points below that of zero, "
         "from the same base", emoji,
         lambda of: f"lines {get(of, 'base', 'emoji')} → {get(of, 'zero_emoji', 'emoji')}, "
         f"right {get(of, 'zero_emoji')} against {get(of, 'zero')} %",
         lambda s: main(s, "zero_emoji", "emoji") >= 0.95
         and main(s, "zero_emoji") >= main(s, "zero") - 0.03
         and main(s, "base") == main(s, "zero's base")],
        ["one model learns countdown / arithmetic / logic / code by RL: in each its 95 % interval "
         "lies above that of the base, and above the base's pass@1 with tags ignored", recipe,
         lambda of: f"base {four(of, 'base')}, tags ignored "
         f"{four(of, 'base', 'pass@1_untagged')}, zero {four(of, 'zero')} %",
         lambda s: all(gains(s, task) for task in data.REASONING)],
        ["RL on arithmetic, logic and code helps countdown, which the base has read of and RL "
         "never draws (but sums of the same numbers): pass@1, tags ignored, is 1.5 times the "
         "base's or more", three,
         lambda of: f"{get(of, 'base', 'pass@1_untagged')} → "
         f"{get(of, 'zero', 'pass@1_untagged')} %",
         lambda s: main(s, "zero", "pass@1_untagged") >= 1.5 * main(s, "base", "pass@1_untagged")],
        ["a cold start: a completion's share of words in the prompt's language rises by 20 points "
         "or more in countdown and code (arithmetic and logic have few words that differ)", recipe,
         lambda of: f"zero {four(of, 'zero', 'one_language')}, dev1 "
         f"{four(of, 'dev1', 'one_language')} %",
         lambda s: all(s["dev1"][task]["one_language"] >= s["zero"][task]["one_language"] + 0.2
                       for task in ("countdown", "code"))],
        ["the language reward: after dev2 at least 10 points fewer completions in countdown mix "
         "languages than after dev2_free, the same RL without that reward", recipe,
         lambda of: f"dev1 {get(of, 'dev1', 'mixes')}, dev2_free {get(of, 'dev2_free', 'mixes')}, "
         f"dev2 {get(of, 'dev2', 'mixes')} % mix",
         lambda s: main(s, "dev2", "mixes") <= main(s, "dev2_free", "mixes") - 0.1],
        ["the reward model agrees with gold reward on 98 % or more of the held-out pairs, and more "
         "often than with the annotators, who err", recipe,
         lambda of: f"with gold reward {judge_agrees(of, 'gold_accuracy')}, with the annotators "
         f"{judge_agrees(of, 'accuracy')} %",
         lambda s: s["reward_model"]["pairs"]["gold_accuracy"]
         >= max(0.98, s["reward_model"]["pairs"]["accuracy"])],
        ["RL for all scenarios, in small steps: where r1 and dev3 answer a request in chat "
         "differently, r1's answer has the higher gold reward in 60 % of cases or more (ties count "
         "half), and the reward model's rate is within 5 points of that; r1 declines more unsafe "
         "requests, the intervals apart", recipe,
         lambda of: after_dev3(of, "r1"),
         lambda s: s["r1"]["win_rate"]["gold"] >= 0.6 and abs(happier(s, "r1")) < 0.05
         and s["r1"]["unsafe"]["pass@1_ci"][0] > s["dev3"]["unsafe"]["pass@1_ci"][1]],
        ["RL for all scenarios costs nothing (r1's pass@1 in chat and in each task is not below "
         "dev3's 95 % interval)", recipe,
         lambda of: f"chat {get(of, 'dev3', task='chat')} → {get(of, 'r1', task='chat')}; tasks "
         f"{four(of, 'dev3')} → {four(of, 'r1')} %",
         lambda s: {task: s["r1"][task]["pass@1"] >= s["dev3"][task]["pass@1_ci"][0]
                    for task in ("chat", *data.REASONING)}],
        ["larger steps, divided by the std, exploit the reward model: in chat its rate "
         "of wins is 5 points or more above gold's, and pass@1 falls by 5 points or more", recipe,
         lambda of: after_dev3(of, "r1_hacked"),
         lambda s: happier(s, "r1_hacked") >= 0.05 and gained(s, "r1_hacked") <= -0.05],
        ["where larger steps exploit the reward model, gold reward in chat, which counts friendly "
         "words as well, rises above dev3's", recipe,
         lambda of: more_gold(of, "r1_hacked"),
         lambda s: s["r1_hacked"]["chat"]["gold_reward"] > s["dev3"]["chat"]["gold_reward"]],
        ["distillation brings a model a quarter as large to within 10 points of r1 in each task",
         recipe, lambda of: f"small_base {four(of, 'small_base')} → distill "
         f"{four(of, 'distill')}; r1 {four(of, 'r1')} %",
         lambda s: {task: s["distill"][task]["pass@1"] > s["r1"][task]["pass@1"] - 0.1
                    for task in data.REASONING}],
        ["in each task distill's 95 % interval lies wholly above that of small_zero", recipe,
         lambda of: f"distill {four(of, 'distill')}, small_zero {four(of, 'small_zero')} %",
         lambda s: {task: s["distill"][task]["pass@1_ci"][0] > s["small_zero"][task]["pass@1_ci"][1]
                    for task in data.REASONING}],
    ]
    head, shown = ["claim", "runs", "measured", "holds in each"], []
    for claim, of, figures, check in rows:
        holds = {}
        for name, stages in of.items():
            try:
                holds[name] = check(stages)
            except KeyError as e:
                if e.args[0] not in train.STAGES:  # only of a stage not run there is no figure
                    raise
        if holds:
            shown.append([claim, with_seeds(holds), figures({name: of[name] for name in holds}),
                          verdict(holds.values())])
    evidence = results["evidence"]
    for claim, command, *others in evidence_rows(list(evidence.values())):
        names = [name for name in evidence if command.strip("`") in evidence[name]]
        shown.append([claim, f"{with_seeds(names)}, {command}", *others])
    return [head, *shown]


# ------------------------------------------------------------------------------------------------
# Rows for what evidence.py has written


def change(stage, key="pass@1", show=pct, start="base"):
    """Shows the runs' results for a task at `start` and after a control."""
    def figures(runs, task):
        at_start, end = (by_seed([run[s][task][key] for run in runs], show) for s in (start, stage))
        return f"{at_start} → {end}"
    return figures


def both(first, name, second):
    """Two figures of a row, the second with a name."""
    return lambda runs, task: f"{first(runs, task)}, {name} {second(runs, task)}"


def points_of(key, curve):
    """Shows all points of the runs' curves for a task, their means over the runs."""
    def figures(runs, task):
        found = [run[key][task][curve] for run in runs]
        return ", ".join(f"{x}: {pct(sum(points[x] for points in found) / len(found))}"
                         for x in found[0]).replace(" %", "") + " %"
    return figures


def gained_in_chat(runs, task):
    """Right answers of dev3 and r1, and the 95 % interval of what r1 gains, in points."""
    before, after = (by_seed([run[task][stage] for run in runs]) for stage in ("dev3", "r1"))
    gains = [" to ".join(f"{100 * x:+.1f}" for x in run[task]["gain_ci"]) for run in runs]
    return f"{before} → {after} %, a gain of {' / '.join(gains)} points"


def small_models(runs, task):
    """distill and small_zero of a base that has read less, with their intervals."""
    shown = [f"{stage} {by_seed([run[stage][task]['pass@1'] for run in runs])} "
             f"({interval([run[stage][task] for run in runs])})"
             for stage in ("distill", "small_zero")]
    return ", ".join(shown)


def one_and_best(run, task):
    """pass@1 of zero, and pass@16 of its base, tags ignored (with fewer samples that of all)."""
    curves = run["pass@k"][task]
    base = list(curves["base, tags ignored"].values())
    return curves["zero"]["1"], base[:5][-1]  # k = 1, 2, 4, 8, 16


def best_of(runs, task):
    zero, base = zip(*[one_and_best(run, task) for run in runs], strict=True)
    return f"pass@16 of base {by_seed(base)}, pass@1 of zero {by_seed(zero)} %"


def meeting(runs, task):
    """pass@4 of both, and from which k on the base is within a point of zero."""
    found, curves = [], [run["pass@k"][task] for run in runs]
    bases, zeros = ([of[name] for of in curves] for name in ("base, tags ignored", "zero"))
    for base, zero in zip(bases, zeros, strict=True):
        found.append(next((k for k in base if base[k] >= zero[k] - 0.01), "none"))
    base, zero = (by_seed([of["4"] for of in curve]) for curve in (bases, zeros))
    last = by_seed([list(of.values())[-1] for of in bases])
    return (f"pass@4 of base {base}, of zero {zero} %; the base is within a point of zero from k = "
            f"{' / '.join(found)} on, and ends at {last} % (k = {list(bases[0])[-1]})")


def ends(key, curve):
    """Shows the first and the last point of the runs' curves for a task."""
    def figures(runs, task):
        found = [list(run[key][task][curve].values()) for run in runs]
        show = whole if key == "length" else pct
        return " → ".join(by_seed([points[i] for points in found], show) for i in (0, -1))
    return figures


def at_its_best(run, task):
    """pass@1 of zero at T = 1, and of its base, tags ignored, at its best temperature."""
    curves = run["cooler"][task]
    return curves["zero"]["1.0"], max(curves["base, tags ignored"].values())


def beside_the_best(runs, task):
    zero, base = zip(*[at_its_best(run, task) for run in runs], strict=True)
    return f"zero {by_seed(zero)}, base {by_seed(base)} %"


EVIDENCE = [  # command, claim, its figures, its check of a run and task: as strong as the words
    ("shuffle", "rewards shuffled within each group, for as many steps: pass@1 does not rise above "
     "the base's, with tags or without",
     both(both(change("shuffled"), "tags ignored", change("shuffled", "pass@1_untagged")),
          "length, which shows nothing by itself,", change("shuffled", "length", whole)),
     lambda run, t: as_long(run) and all(run["shuffled"][t][key] <= run["base"][t][key]
                                         for key in ("pass@1", "pass@1_untagged"))),
    ("alone", "format reward alone: tags in 95 % or more, and right answers, tags ignored, fall "
     "by half or more",
     both(change("format_alone", "pass@1_untagged"), "tags", change("format_alone", "format")),
     lambda run, t: as_long(run) and run["format_alone"][t]["format"] >= 0.95
     and run["format_alone"][t]["pass@1_untagged"] <= 0.5 * run["base"][t]["pass@1_untagged"]),
    ("alone", "accuracy reward alone: within a point of zero",
     change("accuracy_alone", start="zero"),
     lambda run, t: as_long(run)
     and abs(run["accuracy_alone"][t]["pass@1"] - run["zero"][t]["pass@1"]) <= 0.01),
    ("alone", "without division by length and std completions also grow by a half or more",
     change("undivided", "length", whole),
     lambda run, t: as_long(run)
     and run["undivided"][t]["length"] >= 1.5 * run["base"][t]["length"]),
    ("passk", "pass@1, @2 and @4 of zero, tags demanded, are above those of its base, tags "
     "ignored", meeting,
     lambda run, t: all(run["pass@k"][t]["zero"][k] > run["pass@k"][t]["base, tags ignored"][k]
                        for k in "124")),
    ("passk", "pass@1 of zero, tags demanded, is above pass@16 of its base, tags ignored",
     best_of,
     lambda run, t: operator.gt(*one_and_best(run, t))),
    ("budget", "the answer comes from the search: closed by force after 8, 16, 32, ... 256 tokens, "
     "and at 340, the limit itself, pass@1 of zero (and r1, if there) rises from each limit to the "
     "next, or falls by a point at most; over all by 80 or more, in logic, where guesses are right "
     "now and then, by 70 (set after seeing it; the figures are zero's, means)",
     points_of("budget", "zero"),
     lambda run, t: all(rises(curve.values(), 0.01, 0.7 if t == "logic" else 0.8)
                        for curve in run["budget"][t].values())),
    ("cooler", "much of the skill is in the base's likeliest continuations (80 % right or more at "
     "T = 0.05, tags ignored; threshold set after seed 1)",
     both(ends("cooler", "base, tags ignored"), "tags demanded", ends("cooler", "base")),
     lambda run, t: run["cooler"][t]["base, tags ignored"]["0.05"] >= 0.8),
    ("cooler", "what RL adds is more than a lower temperature: at T = 1 zero, tags demanded, is "
     "right more often than the base at any of T = 1, 0.6, 0.3, 0.1, 0.05, tags ignored (0.05 "
     "is its best)",
     beside_the_best,
     lambda run, t: operator.gt(*at_its_best(run, t))),
    ("steps", "held-out pass@1, asked every 20 RL steps, rises by 75 points or more in all, and "
     "falls by at most 3 from one evaluation to the next",
     ends("accuracy", "pass@1"),
     lambda run, t: rises(run["accuracy"][t]["pass@1"].values(), 0.03, 0.75)),
    ("unread", "a small base that has read no patient author learns more from r1's traces than by "
     "RL (in each task distill's 95 % interval lies wholly above that of small_zero)",
     small_models,
     lambda run, t: run["distill"][t]["pass@1_ci"][0] > run["small_zero"][t]["pass@1_ci"][1]),
    ("requests", "of 500 requests in chat (the table's 100 among them) r1 has at least as many "
     "right as dev3",
     gained_in_chat,
     lambda run, t: run["problems"] >= 500 and run[t]["gain"] >= 0),
]


def as_long(run):
    return run["steps"] == run["zero_steps"]


def rises(values, slack, least):
    """Whether no value is more than `slack` below the one before, and the last is `least` above the
    first."""
    values = list(values)
    steady = all(b >= a - slack for a, b in zip(values, values[1:], strict=False))
    return steady and values[-1] - values[0] >= least


def evidence_rows(runs):
    """Rows of claims from what evidence.py wrote: [{command: its JSON}], a seed each."""
    rows = []
    for command, claim, figures, check in EVIDENCE:
        found = [run[command] for run in runs if command in run]
        if found:
            tasks = found[0]["tasks"]
            shown = "; ".join(f"{task} " * (len(tasks) > 1) + figures(found, task)
                              for task in tasks)
            holds = [{task: check(run, task) for task in tasks} for run in found]
            rows.append([claim, f"`{command}`", shown, verdict(holds)])
    return rows


# ------------------------------------------------------------------------------------------------
# The script


def write(results):
    """Puts every block between its two comments in README.md and assets/results.md."""
    found = blocks(results)
    for file in ("README.md", os.path.join("assets", "results.md")):
        path = os.path.join(ROOT, file)
        with open(path, encoding="utf-8") as f:
            text = f.read()
        for name, block in found.items():
            pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
            text = pattern.sub(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text)
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run what is not there yet")
    parser.add_argument("--write", action="store_true", help="write the tables and gather nothing")
    parser.add_argument("--only", default="",
                        help="with --run: runs whose names begin so, separated by semicolons")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a core each")
    args = parser.parse_args()
    if args.run:
        names = [name for name in ALL_COMMANDS if name.startswith(tuple(args.only.split(";")))]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(carry_out, [name for name in names if name not in FROM_A_BASE]))
            list(pool.map(carry_out, [name for name in names if name in FROM_A_BASE]))
        for command in PICTURES if names == list(ALL_COMMANDS) else ():
            subprocess.run([sys.executable, *command.split()[1:]], cwd=ROOT, check=True)
        return
    if not args.write:
        found = gather(read(FILE))
        with open(FILE, "w", encoding="utf-8") as f:
            json.dump(found, f, indent=1, ensure_ascii=False)
    write(read(FILE))


if __name__ == "__main__":
    main()
