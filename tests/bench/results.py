"""Makes every figure of the README's tables: runs the recipe for each seed, gathers what it wrote into assets/results.json, and writes the
tables into the README from there. tests/test_readme.py checks that they agree.

    python tests/bench/results.py --run              # hours: everything, in out1, out2, ...; what is finished is not run again
    python tests/bench/results.py                    # then: gather, and write the tables
"""
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.append(ROOT)
import data  # noqa: E402

FILE = os.path.join(ROOT, "assets", "results.json")
SEEDS = (1, 2, 3)
SIDE_BY_SIDE = "python sample.py --ckpt=out/base/ckpt.pt --vs=out/zero/ckpt.pt --numbers=4,9,6 --target=30 --n=1"
PIPELINE = ["base", "zero", "dev1", "dev2", "dev3", "r1"]
RUNS = {  # name: the commands that make it, the first of which ends with zero
    **{f"seed {s}": [f"python train.py --seed={s}{threads} --out_dir=out{s}", f"python train.py r1 distill small_zero dev2_free zero_emoji --seed={s}{threads} --out_dir=out{s}"]
       for s, threads in ((1, " --threads=1"), (2, " --threads=1"), (3, ""))},  # the last by itself, on all cores: --run --only="seed 3" --jobs=1
    **{f"{task}, seed {s}": [f"python train.py --task={task} --seed={s} --threads=1 --out_dir=out-{task}{s}"] for task in ("arithmetic", "logic", "code") for s in SEEDS},
}


# ------------------------------------------------------------------------------------------------
# Running and gathering


def folder(name):
    return os.path.join(ROOT, RUNS[name][0].split("--out_dir=")[1])


def carry_out(name):
    """Runs the commands of one run, and writes the minutes that each took beside what it made."""
    os.makedirs(folder(name), exist_ok=True)
    path, minutes = os.path.join(folder(name), "minutes.json"), {}
    if os.path.exists(path):
        with open(path) as f:
            minutes = json.load(f)
    for command in RUNS[name]:
        if command in minutes:
            continue
        with open(os.path.join(folder(name), "log.txt"), "a") as log:
            t0 = time.time()
            subprocess.run([sys.executable, *command.split()[1:]], cwd=ROOT, stdout=log, stderr=log, check=True)
        minutes[command] = (time.time() - t0) / 60
        with open(path, "w") as f:
            json.dump(minutes, f)


def gather():
    """What the runs wrote, as far as they were made, as {"about": ..., "runs": {name: {"minutes", "stages": {stage: eval.json}}}}."""
    import torch
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with open("/proc/cpuinfo") as f:
        cpu = re.search("model name\\s*: (.*)", f.read())
    runs = {}
    for name in RUNS:
        stages = {}
        for stage in sorted(os.listdir(folder(name))) if os.path.isdir(folder(name)) else []:
            path = os.path.join(folder(name), stage, "eval.json")
            if os.path.exists(path):
                with open(path) as f:
                    stages[stage] = round_all(json.load(f))
        if os.path.exists(os.path.join(folder(name), "minutes.json")):
            with open(os.path.join(folder(name), "minutes.json")) as f:
                runs[name] = {"minutes": round_all(json.load(f)), "stages": stages}
    with open(os.path.join(folder("seed 1"), "log.txt"), encoding="utf-8") as f:
        steps = {int(m[1]): m[0] for m in re.finditer(r"^zero +(\d+)/60 .*?clip \S+", f.read(), re.M)}
    shown = subprocess.run([sys.executable, *SIDE_BY_SIDE.replace("out/", "out1/").split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "120"}).stdout
    seen = {"log": "\n".join(steps[i] for i in (1, 3, 5, 7, 10, 15, 20, 30, 40, 50, 60)), "side_by_side": shown.replace("out1/", "out/").strip()}
    with open(FILE, encoding="utf-8") as f:
        earlier = json.load(f)["earlier"]  # measured by other commands, with the commit they were measured at: stays as it is
    return {"earlier": earlier, "seen": seen, "about": {"cpu": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
                      "commit": git("log", "-1", "--format=%h", "--", *[f"{file}.py" for file in ("model", "data", "grpo", "rewards", "train")])}, "runs": runs}


def round_all(x):
    return {k: round_all(v) for k, v in x.items()} if isinstance(x, dict) else [round_all(v) for v in x] if isinstance(x, list) else round(x, 5) if isinstance(x, float) else x


# ------------------------------------------------------------------------------------------------
# Tables


def table(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def pct(x, digits=1):
    return f"{100 * x:.{digits}f} %"


def spread(values, show=pct):
    """Mean of the seeds, and the least and the most of them."""
    values = list(values)
    least, most = (show(f(values)).removesuffix(" %") for f in (min, max))
    text = f"{show(sum(values) / len(values))} ({least}{'–' if min(values) >= 0 else ' to '}{most})"
    return text.replace("-", "−")


def blocks(results):
    """{name of a block in the README: its Markdown}."""
    runs = results["runs"]
    seeds = {name: run["stages"] for name, run in runs.items() if name.startswith("seed")}
    get = lambda stage, task, key: [stages[stage][task][key] for stages in seeds.values()]
    show = lambda stage, task, key, how=pct: spread(get(stage, task, key), how)
    number = lambda digits: lambda x: f"{x:.{digits}f}"
    about, minutes = results["about"], lambda run: list(run["minutes"].values())
    out = {"hardware": f"{about['cores']} cores of an {about['cpu']}, torch {about['torch']}, fp32, commit {about['commit']}"}

    out.update({name: f"```\n{text}\n```" for name, text in results["seen"].items()})

    out["speed"] = table(results["earlier"]["speed"]["rows"][0], results["earlier"]["speed"]["rows"][1:])
    out["smollm2"] = f"```\n{results['earlier']['smollm2']['text']}\n```"

    rows = []
    for name, run in runs.items():
        task = name.split(",")[0] if "," in name else "countdown"
        b, z = run["stages"]["base"][task], run["stages"]["zero"][task]
        rows.append([name, pct(b["pass@1"]), f"{pct(z['pass@1'])} ({100 * z['pass@1_ci'][0]:.1f}–{100 * z['pass@1_ci'][1]:.1f})", f"{pct(b['pass@1_greedy'])} → {pct(z['pass@1_greedy'])}",
                     pct(z["pass@16"]), pct(z["cons@16"]), f"{pct(b['format'])} → {pct(z['format'])}", f"{b['length']:.0f} → {z['length']:.0f}", pct(z["consistency"]), f"{minutes(run)[0]:.1f}"])
    out["zero"] = table(["run", "base pass@1", "zero pass@1", "greedy", "pass@16", "cons@16", "format", "length", "one language", "minutes"], rows)
    out["commands"] = "```\n" + "\n".join(command for run in runs for command in RUNS[run]) + "\n```"

    columns = [("pass@1", "countdown", "pass@1", pct), ("cons@16", "countdown", "cons@16", pct), ("format", "countdown", "format", pct), ("one language", "countdown", "consistency", pct),
               ("length", "countdown", "length", number(0)), ("arithmetic", "arithmetic", "pass@1", pct), ("logic", "logic", "pass@1", pct), ("code", "code", "pass@1", pct)]
    stages = PIPELINE + ["small_base", "small_zero", "distill"]
    out["pipeline"] = table(["", *[title for title, *_ in columns]], [[f"`{stage}`", *[show(stage, *c[1:]) for c in columns]] for stage in stages])

    general = [("chat right", "chat", "pass@1", pct), ("unsafe declined", "unsafe", "pass@1", pct), ("liked (−2 to 3)", "chat", "liking", number(2)),
               ("thinks: countdown", "countdown", "thinks", pct), ("thinks: chat", "chat", "thinks", pct), ("thinks: unsafe", "unsafe", "thinks", pct)]
    rows = [[f"`{stage}`", *[show(stage, *c[1:]) for c in general],
             *[spread([s[stage].get("against dev3", {}).get(key, 0) for s in seeds.values()]) if stage in ("r1", "distill") else "–" for key in ("preferred", "preferred by the reward model")]]
            for stage in stages if stage not in ("small_zero", "small_base")]
    out["general"] = table(["", *[title for title, *_ in general], "preferred to dev3", "so the reward model"], rows)
    out["claims"] = claims(seeds, runs, show, get)
    return out


def claims(seeds, runs, show, get):
    """The article's claims, what says so here, and whether it does for every seed."""
    pass1 = lambda stage: show(stage, "countdown", "pass@1")
    every = lambda *pairs: "yes" if all(pairs) else "**no**"
    at = lambda stage, key="pass@1", task="countdown": get(stage, task, key)
    each = lambda test, *lists: every(*[test(*values) for values in zip(*lists)])
    pairs = [s["reward_model"]["pairs"] for s in seeds.values()]
    low, high = [ci[0] for ci in at("distill", "pass@1_ci")], [ci[1] for ci in at("small_zero", "pass@1_ci")]
    asked = data.eval_problems(data.DataConfig(), 50, "chat")
    counting = sum(problem.question.startswith("count ") for problem in asked) / len(asked)
    rows = [
        ["RL alone makes a base reason, and its thinking longer", "zero", f"pass@1 {pass1('base')} → {pass1('zero')}; length {show('base', 'countdown', 'length', lambda x: f'{x:.0f}')} → {show('zero', 'countdown', 'length', lambda x: f'{x:.0f}')}",
         each(lambda b, z, m, n: z > b + 0.5 and n > m, at("base"), at("zero"), at("base", "length"), at("zero", "length"))],
        ["a majority vote beats single samples", "zero", f"zero: cons@16 {show('zero', 'countdown', 'cons@16')} against {pass1('zero')}", each(lambda a, b: a > b, at("zero", "cons@16"), at("zero"))],
        ["R1-Zero mixes languages (its prompts are all English)", "zero", f"one language: zero {show('zero', 'countdown', 'consistency')}", each(lambda c: c < 0.9, at("zero", "consistency"))],
        ["a language reward ends that, and costs a little accuracy", "dev2 dev2_free", f"one language: `dev2` {show('dev2', 'countdown', 'consistency')}, without the reward (`dev2_free`) {show('dev2_free', 'countdown', 'consistency')}; pass@1 {pass1('dev2')} against {pass1('dev2_free')}",
         each(lambda c: c >= 0.95, at("dev2", "consistency"))],
        ["a cold start makes text readable at once", "dev1", f"one language: zero {show('zero', 'countdown', 'consistency')} → `dev1` {show('dev1', 'countdown', 'consistency')}; format {show('dev1', 'countdown', 'format')}; RL then starts from {pass1('dev1')}, not {pass1('base')}",
         each(lambda a, b, c, d: b > a and c > d, at("zero", "consistency"), at("dev1", "consistency"), at("dev1"), at("base"))],
        ["rejection sampling keeps reasoning and adds general tasks", "dev3", f"pass@1 `dev2` {pass1('dev2')}, `dev3` {pass1('dev3')}; chat {show('dev2', 'chat', 'pass@1')} → {show('dev3', 'chat', 'pass@1')}, unsafe declined {show('dev2', 'unsafe', 'pass@1')} → {show('dev3', 'unsafe', 'pass@1')}",
         each(lambda a, b, c, d: b > a - 0.05 and c > 0.8 and d > 0.8, at("dev2"), at("dev3"), at("dev3", task="chat"), at("dev3", task="unsafe"))],
        ["RL for all scenarios: more helpful, more harmless, no less able", "r1", f"hidden rule (−2 to 3) {show('dev3', 'chat', 'liking', lambda x: f'{x:.2f}')} → {show('r1', 'chat', 'liking', lambda x: f'{x:.2f}')}; declined {show('dev3', 'unsafe', 'pass@1')} → {show('r1', 'unsafe', 'pass@1')}; "
         f"pass@1 {pass1('dev3')} → {pass1('r1')}; the reward model agrees with people on {spread(p['agrees with people'] for p in pairs)} of held-out pairs (people themselves err in 10 %)",
         each(lambda a, b, c, d, e, f: b > a and d > c and f > e - 0.03, at("dev3", "liking", "chat"), at("r1", "liking", "chat"), at("dev3", task="unsafe"), at("r1", task="unsafe"), at("dev3"), at("r1"))],
        ["distillation beats RL on the small model", "distill small_zero", f"pass@1 `distill` {pass1('distill')} against `small_zero` {pass1('small_zero')}", each(lambda a, b: a > b, low, high)],
        ["thinking is left out where it is not needed", "r1", f"`r1` thinks in {show('r1', 'countdown', 'thinks')} of countdown, {show('r1', 'chat', 'thinks')} of chat ({counting:.0%} of these requests are to count, which takes thinking) and {show('r1', 'unsafe', 'thinks')} of unsafe requests",
         each(lambda a, b, c: a > 0.95 and b < 0.3 and c < 0.05, at("r1", "thinks"), at("r1", "thinks", "chat"), at("r1", "thinks", "unsafe"))],
        ["an emoji reward is obeyed", "zero_emoji", f"steps that end with one: `zero` {show('zero', 'countdown', 'emoji')}, `zero_emoji` {show('zero_emoji', 'countdown', 'emoji')}; pass@1 {pass1('zero')} and {pass1('zero_emoji')}, by seed "
         + ", ".join(f"{100 * (b - a):+.1f}".replace("-", "−") for a, b in zip(at("zero"), at("zero_emoji"))) + " points (bar: −3)",
         each(lambda e, a, b: e >= 0.95 and b > a - 0.03, at("zero_emoji", "emoji"), at("zero"), at("zero_emoji"))]]
    rows = [[claim, f"`python train.py {stages}`", *found] for claim, stages, *found in rows]
    return (table(["claim", "run", "what says so here", "for every seed"], rows)
            + f"\n\nThe whole recipe took {sum(runs['seed 3']['minutes'].values()):.0f} minutes for seed 3, which had the two cores for itself; up to `zero` it was {next(iter(runs['seed 3']['minutes'].values())):.1f}.")


def write_readme(results):
    """Puts every block between its two comments in the README."""
    path = os.path.join(ROOT, "README.md")
    with open(path, encoding="utf-8") as f:
        text = f.read()
    for name, block in blocks(results).items():
        text = re.sub(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + block + "\n" + m[2], text, flags=re.S)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run what is not there yet")
    parser.add_argument("--only", default="", help="... of these runs alone: their names begin so, separated by semicolons")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a core each (default %(default)s)")
    args = parser.parse_args()
    if args.run:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(carry_out, [name for name in RUNS if name.startswith(tuple(args.only.split(";")))]))
        return
    found = gather()
    with open(FILE, "w", encoding="utf-8") as f:
        json.dump(found, f, indent=1, ensure_ascii=False)
    write_readme(found)


if __name__ == "__main__":
    main()
