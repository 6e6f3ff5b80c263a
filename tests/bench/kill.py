"""Kills a training run with SIGKILL at random moments, starts it again each time, and compares what it ends with to a run that
was left in peace: weights, metrics and samples must be the same to the bit.

    python tests/bench/kill.py --kills=20
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
FLAGS = ["--n_layer=1", "--n_embd=16", "--n_head=2", "--n_kv_head=1", "--head_dim=8", "--mlp_dim=16", "--base_rows=2", "--base_length=200", "--context=400",
         "--base_steps=300", "--rl_steps=30", "--prompts_per_step=2", "--group_size=4", "--max_new_tokens=24", "--eval_problems=20", "--eval_samples=4",
         "--eval_every=0", "--save_every=2", "--threads=1", "--device=cpu", "--ref_every=3", "--kl_coef=0.01"]


def start(out):
    return subprocess.Popen([sys.executable, "train.py", "zero", *FLAGS, f"--out_dir={out}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def what_is_left(out):
    """Everything of a run that must not depend on interruptions."""
    left = {}
    for stage in ("base", "zero"):
        ckpt = torch.load(os.path.join(out, stage, "ckpt.pt"), weights_only=True)
        left[stage, "weights"] = torch.cat([w.flatten() for w in ckpt["model"].values()])
        left[stage, "optimisers"] = torch.cat([s.flatten().float() for o in ckpt["optimizers"] for state in o["state"].values() for s in state.values()])
        with open(os.path.join(out, stage, "metrics.jsonl")) as f:
            left[stage, "metrics"] = [{k: v for k, v in json.loads(line).items() if not k.endswith(("seconds", "_s"))} for line in f]
        for file in ("samples.jsonl", "eval.json"):
            with open(os.path.join(out, stage, file)) as f:
                left[stage, file] = f.read()
    return left


def same(a, b):
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = os.path.join(folder, "whole"), os.path.join(folder, "killed")
        t0 = time.time()
        run = start(whole)
        if run.wait():
            raise SystemExit(run.stderr.read())
        took, kills, starts = time.time() - t0, 0, 0
        while True:
            run = start(killed)
            starts += 1
            try:
                run.wait(timeout=rng.uniform(0.3, 1.0) * took if kills < args.kills else 600)
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
                kills += 1
                continue
            if run.returncode:
                raise SystemExit(run.stderr.read())
            if kills >= args.kills:
                break
            for stage in ("zero", "base")[:rng.choice([1, 2])]:  # done before all kills were spent: once more from an earlier point
                for file in os.listdir(os.path.join(killed, stage)):
                    os.remove(os.path.join(killed, stage, file))
        a, b = what_is_left(whole), what_is_left(killed)
        differ = [" ".join(key) for key in a if not same(a[key], b[key])]
        print(f"{kills} kills in {starts} starts of a run of {took:.0f} s: {'identical' if not differ else 'DIFFERENT: ' + ', '.join(differ)}")
        return not differ


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
