"""The DeepSeek-R1 pipeline on a laptop: this file turns the others into runs.

    base ──── GRPO: accuracy, format ─────────────────────► zero          DeepSeek-R1-Zero base
    ──── SFT: zero's most readable right traces ─────► dev1          cold start dev1 ──── GRPO: +
    one language ───────────────────────► dev2          reasoning RL base ──── SFT: dev2's right
    traces, general replies ──► dev3          rejection sampling dev3 ──── Bradley-Terry on pairs
    of its answers ──────► reward_model dev3 ──── GRPO: + preference, harmlessness ───────────► r1
    RL for all scenarios small_base ─ SFT: r1's samples ───────────────────────► distill
    distillation, and beside it small_base ─ GRPO: accuracy, format ──────────────────► small_zero
    the small model, RL alone

    python train.py                             # base, then zero, then a table that compares them
    python train.py r1 distill small_zero       # everything; what is finished is not run again
    python train.py table                       # the table again
    python train.py --task=logic --out_dir=out-logic          # or arithmetic, or code
    python train.py --init_from=FOLDER          # GRPO on a real model: a Hugging Face folder
    python train.py eval --ckpt=out/zero/ckpt.pt
    python train.py export --ckpt=out/zero/ckpt.pt --export_dir=FOLDER
    python train.py --help                      # every setting, its unit and its default

A run lies in --out_dir: STAGE/ckpt.pt, metrics.jsonl (a line per step), rollouts.jsonl, eval.json,
samples.jsonl. The same command again resumes a stage that was cut short and skips one that is done.
"""
import copy
import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import rewards
import sample
from data import DataConfig
from grpo import GRPOConfig, train_grpo
from model import (
    GPT,
    GPTConfig,
    UserError,
    apply_gradients,
    atomic_write,
    config_from_hf,
    from_pretrained,
    generators,
    load_checkpoint,
    load_model,
    make_optimizers,
    opt,
    read_json,
    sampling_copy,
    save_checkpoint,
    save_pretrained,
    set_lr,
)
from rewards import Environment, RewardConfig, RewardModel
from sample import read_lines, read_results, write_json, write_lines

# ------------------------------------------------------------------------------------------------
# Settings: default < task (or real weights) < stage < command line


@dataclass
class TrainConfig:
    base_steps: int = opt(1200, "optimiser steps of next-token training", least=1)
    base_lr: float = opt(5e-3, "its peak learning rate", above=0, most=1)
    base_rows: int = opt(12, "rows of packed documents per step", least=1)
    base_length: int = opt(352, "tokens per row", least=1)
    base_optimizer: str = opt("muon", "of all supervised training; muon: for matrices, AdamW for "
                              "the rest; adamw: for everything", choices=("muon", "adamw"))
    sft_steps: int = opt(60, "optimiser steps of fine-tuning, and of the reward model", least=1)
    sft_lr: float = opt(1e-3, "its peak learning rate", above=0, most=1)
    sft_rows: int = opt(24, "traces per step; pairs for the reward model", least=1)
    source_problems: int = opt(400, "problems that a stage asks the one it learns from", least=1)
    source_samples: int = opt(8, "samples of each", least=1)
    general_replies: int = opt(600, "scripted replies to general requests, for dev3", least=1)
    label_noise: float = opt(0.1, "share of preferences that are wrong", least=0, most=0.5)
    autocast: str = opt("auto", "training's matrix products in bfloat16, weights stay fp32; auto: "
                        "on CUDA", choices=("auto", "on", "off"))
    ref_dtype: str = opt("float32", "weights of the reference", choices=("float32", "bfloat16"))
    checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, a "
                              "third more time")
    compile: bool = opt(False, "torch.compile the transformer for training")
    save_every: int = opt(20, "GRPO steps between checkpoints; elsewhere ten times that", least=1)
    max_skipped: int = opt(5, "steps in a row with non-finite gradients that end a run", least=1)
    export_dir: str = opt("", "folder that `export` writes")
    export_dtype: str = opt("float32", "weights that `export` writes",
                            choices=("float32", "bfloat16", "float16"))


@dataclass
class Config(sample.Config):
    model: GPTConfig = field(default_factory=GPTConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def names(cls, *left_out):
    return [f.name for f in fields(cls) if f.name not in left_out]


REAL_DEFAULTS = {  # with --init_from: the paper's settings, at a size that one GPU can carry
    "template": "base", "context": 2048, "max_new_tokens": 512, "rl_lr": 1e-6, "rl_steps": 200,
    "rl_hold": 10**6, "rl_optimizer": "adamw", "base_optimizer": "adamw", "eval_problems": 100,
    "eval_samples": 4,
}
TASK_DEFAULTS = {  # shorter documents and completions: more and smaller steps
    "arithmetic": {"base_steps": 2000, "base_rows": 8, "base_length": 256, "rl_steps": 150},
    "logic": {"base_steps": 2000, "base_rows": 8, "base_length": 256},
}
# What may not change once a stage has begun, by its kind.
CORPUS = ["task", "n_numbers", "max_number", "ops", "seed", "init_from"]
PROBLEMS = names(DataConfig, "eval_problems") + ["seed", "init_from"]
RESUME_KEYS = {
    "base": CORPUS + names(GPTConfig)
    + ["base_optimizer", "base_lr", "base_rows", "base_length", "base_steps"],
    "rl": PROBLEMS + names(RewardConfig)
    + names(GRPOConfig, "rl_steps", "eval_every", "micro_tokens"),
    "sft": PROBLEMS + ["source_problems", "source_samples", "general_replies", "base_optimizer",
                       "sft_steps", "sft_lr", "sft_rows", "max_new_tokens", "temperature"],
    "pairs": PROBLEMS + ["source_problems", "source_samples", "label_noise", "base_optimizer",
                         "sft_steps", "sft_lr", "sft_rows", "max_new_tokens", "temperature"],
}


# ------------------------------------------------------------------------------------------------
# A stage's folder


class Run:
    """One stage under way: its settings, its folder, and how it logs, saves, stops and resumes."""

    def __init__(self, name, given):
        self.name, self.stage = name, STAGES[name]
        folder = given.get("init_from", "")
        self.tok = data.load_tokenizer(folder)
        task = REAL_DEFAULTS if folder else TASK_DEFAULTS.get(given.get("task"), {})
        layers = {"vocab_size": self.tok.n_vocab} | task | self.stage.settings | given
        self.cfg = cfg = Config.of(layers)
        if folder:
            shape = [key for key in names(GPTConfig, "context") if key in given]
            if shape:
                raise UserError(f"{', '.join(shape)} cannot be set: {folder} has its own shape")
            model = config_from_hf(read_json(os.path.join(folder, "config.json")))
            cfg.model = replace(model, context=min(model.context, cfg.model.context))
        cfg.validate()
        self.prompt_len = longest_prompt(cfg, self.tok)
        if cfg.sample.threads:
            torch.set_num_threads(cfg.sample.threads)
        self.device = sample.find_device(cfg.sample.device)
        self.seed = cfg.sample.seed
        self.sample_dtype = sample.sampling_dtype(cfg.sample, self.device)
        self.save_every = cfg.train.save_every * (1 if self.stage.kind == "rl" else 10)
        self.steps = cfg.settings()[self.stage.steps]
        self.seconds, self.skipped, self.rows, self.stopping = 0.0, 0, 0, False
        self.dir = os.path.join(cfg.sample.out_dir, name)
        try:
            os.makedirs(self.dir, exist_ok=True)
            with open(self.path("metrics.jsonl"), "a"):
                pass
        except OSError as e:
            raise UserError(f"cannot write to {self.dir} ({e.strerror}): choose another "
                            f"--out_dir") from None
        self.saved = None
        if os.path.exists(self.path("ckpt.pt")):
            self.saved = load_checkpoint(self.path("ckpt.pt"))
            self.check_resume_config()

    def path(self, file):
        return os.path.join(self.dir, file)

    def check_resume_config(self):
        """Raises UserError naming the settings that are not those of the run in this folder."""
        if not {"step", "settings", "optimizers", "seconds"} <= set(self.saved):
            raise UserError(f"{self.path('ckpt.pt')} is no checkpoint of a run; move it away, or "
                            f"choose another --out_dir")
        now, then = self.cfg.settings(), {**Config().settings(), **self.saved["settings"]}
        other = [f"{key}={then[key]}, not {now[key]}" for key in RESUME_KEYS[self.stage.kind]
                 if now[key] != then[key]]
        if other:
            raise UserError(f"{self.dir} was trained with {'; '.join(other)}: choose another "
                            f"--out_dir, or delete {self.dir}")

    def steps_done(self):
        return self.saved["step"] if self.saved else 0

    def resume(self, model, optimizers, ref=None):
        """Restores everything and returns the step to go on from, 0 for a fresh start. Lines of the
        logs past the checkpoint are removed: they will be written again."""
        step = self.steps_done()
        if step:
            model.load_state_dict(self.saved["model"])
            for optimizer, state in zip(optimizers, self.saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            if ref is not None and self.saved["ref"]:
                ref.load_state_dict(self.saved["ref"])
            self.seconds = self.saved["seconds"]
            print(f"{self.name}: resuming at step {step}")
        for file in ("metrics.jsonl", "rollouts.jsonl"):
            if os.path.exists(self.path(file)):
                with open(self.path(file), encoding="utf-8") as f:
                    whole = [line for line in f if line.endswith("\n")]
                kept = [line for line in whole if json.loads(line)["step"] <= step]
                with atomic_write(self.path(file)) as f:
                    f.write("".join(kept).encode())
        self.saved = {"step": step}  # the rest is in use now, and large
        return step

    def append(self, file, values):
        """One JSON object as a line of a log; what is not finite becomes null."""
        for key, value in values.items():
            if isinstance(value, float):
                values[key] = round(value, 6) if math.isfinite(value) else None
        with open(self.path(file), "a", encoding="utf-8") as f:
            f.write(json.dumps(values, ensure_ascii=False) + "\n")

    def log(self, metrics, row=None):
        """A line of metrics.jsonl and, if there is a row {column: text}, one on the terminal.
        Raises UserError after max_skipped steps in a row whose gradients were not finite."""
        self.append("metrics.jsonl", metrics)
        if row:
            widths = {name: max(len(name), WIDTHS.get(name, 5)) for name in row}
            if self.rows % 20 == 0:
                tqdm.write(" ".join(name.rjust(width) for name, width in widths.items()))
            tqdm.write(" ".join(row[name].rjust(width) for name, width in widths.items()))
            self.rows += 1
        self.skipped = self.skipped + 1 if metrics["skipped"] == 1 else 0
        if self.skipped >= self.cfg.train.max_skipped:
            raise UserError(f"{self.name}: the gradients of {self.skipped} steps in a row were not "
                            f"finite, and none was taken. Lower the learning rate, and go on from "
                            f"{self.path('ckpt.pt')} with the same command")

    def end_step(self, step, steps, model, optimizers, ref=None):
        """Saves where it is time to, and stops where the user wants to."""
        if step % self.save_every == 0 or step == steps or self.stopping:
            save_checkpoint(self.path("ckpt.pt"), {
                "stage": self.name, "step": step, "seconds": self.seconds,
                "settings": self.cfg.settings(), "model_config": asdict(model.cfg),
                "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                "ref": ref.state_dict() if ref is not None else None})
        if self.stopping and step < steps:
            raise KeyboardInterrupt(f"{self.name} is saved at step {step} of {steps}")

    @contextmanager
    def until_interrupted(self):
        """Within it, a first Ctrl-C sets `stopping`: the step under way is finished and saved. A
        second one ends the run at once."""
        def on_interrupt(*_):
            signal.signal(signal.SIGINT, before)
            self.stopping = True
            tqdm.write("stopping after this step; Ctrl-C again stops at once")

        if threading.current_thread() is not threading.main_thread():  # Python allows no handlers
            yield
            return
        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def load(self, stage, cls=GPT):
        """The model of another stage of this run; of `base` with --init_from, the real one."""
        cfg = self.cfg
        if stage == "base" and cfg.sample.init_from:
            return from_pretrained(cfg.sample.init_from, cfg.model.context, device=self.device)
        return load_model(os.path.join(cfg.sample.out_dir, stage, "ckpt.pt"), self.device, cls)

    def set_up(self, model):
        """Applies --autocast, --checkpointing and --compile to a model's training passes."""
        model.autocast = sample.use_bf16(self.cfg.train.autocast, self.device)
        model.checkpointing = self.cfg.train.checkpointing
        if self.cfg.train.compile:
            model.compiled_trunk = torch.compile(model.trunk, dynamic=True)

    def evaluate(self, model):
        """A short evaluation on held-out problems, with one example to look at."""
        problems = data.eval_problems(self.cfg.data, 100)
        temperature = self.cfg.grpo.temperature
        metrics, samples = sample.evaluate(model, self.tok, problems, 4, self.cfg, temperature)
        tqdm.write(f"held out: pass@1 {metrics['pass@1']:.1%}, format {metrics['format']:.1%}, "
                   f"length {metrics['length']:.1f}; for example:\n")
        shown = samples[0]["prompt"] + samples[0]["completion"]
        tqdm.write("    " + shown.replace("\n", "\n    ") + "\n")
        self.rows = 0  # the header comes again


WIDTHS = {"step": 9, "length": 6, "kl": 6, "grad": 7, "tok/s": 6, "loss": 7}  # of columns; else 5


def longest_prompt(cfg, tok):
    """Its tokens. Raises UserError before any work if the model cannot hold what is to be done."""
    context, new = cfg.model.context, cfg.grpo.max_new_tokens
    if cfg.model.vocab_size < tok.n_vocab:
        raise UserError(f"vocab_size={cfg.model.vocab_size} is less than the tokenizer's "
                        f"{tok.n_vocab}: leave it out")
    if cfg.train.base_length > context and not cfg.sample.init_from:
        raise UserError(f"base_length={cfg.train.base_length} does not fit the context of "
                        f"{context}: lower it or raise --context")
    problems = data.eval_problems(cfg.data, 50)
    longest = max(len(data.prompt_ids(problem, tok, cfg.data)) for problem in problems)
    if longest + new > context:
        raise UserError(f"a prompt of {longest} tokens + max_new_tokens={new} do not fit the "
                        f"context of {context}: lower --max_new_tokens or raise --context")
    return longest


def memory_plan(cfg, prompt_len, device):
    """{what: bytes} of a GRPO step: exact for weights, optimiser and cache, a rule of thumb for
    activations."""
    m, g, t = cfg.model, cfg.grpo, cfg.train
    with torch.device("meta"):
        n = sum(p.numel() for p in GPT(m).parameters())
    half = sample.use_bf16(cfg.sample.sample_dtype, device)
    rows = max(g.prompts_per_step * g.group_size, 32 * cfg.sample.eval_samples)
    columns = prompt_len + g.max_new_tokens
    cache = rows * columns * m.n_layer * m.n_kv_head * m.d_head * 2
    # Numbers kept per token and block for the backward pass.
    block = 10 * m.n_embd + 5 * m.d_head * (m.n_head + m.n_kv_head) + 6 * m.mlp_dim
    kept = m.n_layer * m.n_embd + block if t.checkpointing else m.n_layer * block
    activations = max(g.micro_tokens, columns) * kept
    return {"weights": 4 * n, "gradients": 4 * n,
            "optimiser": (8 if g.rl_optimizer == "adamw" else 4) * n,
            "reference": (2 if t.ref_dtype == "bfloat16" else 4) * n if g.kl_coef else 0,
            "sampling": 2 * n * half + (2 if half else 4) * cache,
            "activations": (2 if sample.use_bf16(t.autocast, device) else 4) * activations
            + 3 * 4 * 2**24}


def print_memory(run):
    """One line before anything is loaded: what RL will take, and what there is. A toy needs
    none."""
    parts = memory_plan(run.cfg, run.prompt_len, run.device)
    need = sum(parts.values()) / 2**30
    if run.device.type == "cuda":
        have = torch.cuda.get_device_properties(run.device).total_memory / 2**30
    else:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if need < 1 and not run.cfg.sample.init_from:
        return
    shown = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    print(f"memory, GiB: {shown} = about {need:.1f} of {have:.1f}")
    if need > have:
        print("that is more than there is: lower --micro_tokens or --prompts_per_step, or set "
              "--checkpointing=true, --ref_dtype=bfloat16 or --kl_coef=0")


# ------------------------------------------------------------------------------------------------
# The supervised loop


def next_token_loss(model, tokens, mask):
    """Cross-entropy of the tokens of ids (N, T) that the mask (N, T) marks as to be learnt."""
    mask = mask[:, 1:]
    hidden = model.hidden(tokens[:, :-1])
    return F.cross_entropy(model.head(hidden[mask]), tokens[:, 1:][mask])


def pair_loss(model, tokens, lengths):
    """Bradley-Terry on ids (2N, T): the preferred texts first, then the others, in the same
    order."""
    return rewards.bradley_terry_loss(*model(tokens, lengths).chunk(2))


def supervise(run, model, batch_fn, lr, loss_fn=next_token_loss):
    """Minimises `loss_fn` of `batch_fn(rng)` -> (ids, the mask of those to learn, or their
    lengths)."""
    cfg, steps = run.cfg.train, run.steps
    optimizers = make_optimizers(model, lr, cfg.base_optimizer)
    run.set_up(getattr(model, "gpt", model))
    start, window = run.resume(model, optimizers), []
    for step in tqdm(range(start, steps), run.name, steps, initial=start, disable=None):
        t0 = time.time()
        warmup, decay = (step + 1) / 50, (steps - step) / (0.6 * steps)
        set_lr(optimizers, lr * min(warmup, decay, 1.0))
        rng, _ = generators(run.seed, run.name, step)
        tokens, counted = (x.to(run.device) for x in batch_fn(rng))
        loss = loss_fn(model, tokens, counted)
        loss.backward()
        grad_norm, skipped = apply_gradients(model, optimizers, 1.0)
        took = time.time() - t0
        run.seconds += took
        metrics = {"step": step + 1, "loss": loss.item(), "grad_norm": grad_norm,
                   "skipped": skipped, "tokens": int(counted.sum()), "seconds": run.seconds}
        window, row = [*window, {**metrics, "took": took}], None
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean = sum(m["loss"] for m in window) / len(window)
            rate = sum(m["tokens"] for m in window) / sum(m["took"] for m in window)
            row = {"step": f"{step + 1}/{steps}", "loss": f"{mean:.4f}", "grad": f"{grad_norm:.2f}",
                   "tok/s": f"{rate:.0f}", "sec": f"{run.seconds:.0f}"}
            window = []
        run.log(metrics, row)
        run.end_step(step + 1, steps, model, optimizers)


# ------------------------------------------------------------------------------------------------
# The stages, in the paper's order. Each is a function of a Run that returns the trained model


def train_base(run):
    """DeepSeek-V3-Base's part: read a corpus of mixed quality, token by token."""
    cfg = run.cfg
    if cfg.sample.init_from:
        raise UserError(f"{run.name} is trained from nothing on the toy corpus, so it does not go "
                        f"with --init_from={cfg.sample.init_from}")
    if not data.TASKS[cfg.data.task].in_corpus:
        known = ", ".join(name for name, task in data.TASKS.items() if task.in_corpus)
        raise UserError(f"the corpus of {run.name} is about {known}; {cfg.data.task} is not among "
                        f"them")
    torch.manual_seed(run.seed)
    model = GPT(cfg.model).to(run.device)

    def batch(rng):
        rows, length = cfg.train.base_rows, cfg.train.base_length + 1
        return data.corpus_batch(cfg.data, run.tok, rng, rows, length)

    supervise(run, model, batch, cfg.train.base_lr)
    return model


def train_rl(run):
    """GRPO on the parent's model. R1-Zero: on the base, with rules as rewards; later stages add
    some."""
    cfg = run.cfg
    print_memory(run)
    policy, ref, judge = run.load(run.stage.parent), None, None
    run.set_up(policy)
    if cfg.grpo.kl_coef:
        ref = copy.deepcopy(policy).requires_grad_(False).to(getattr(torch, cfg.train.ref_dtype))
    if cfg.rewards.w_preference:
        judge = run.load("reward_model", RewardModel)
    env = Environment(run.tok, cfg.data, cfg.rewards, judge)
    train_grpo(policy, ref, env, run, cfg.grpo)
    return policy


def in_format(problem, text):
    return rewards.has_format(text)


def in_one_language(problem, text):
    return rewards.one_language(problem, text) == 1


def not_rambling(problem, text):
    """Whether no line is written for the third time."""
    return max(Counter(text.split("\n")).values()) < 3


FILTERS = {"right": rewards.is_right, "in format": in_format, "in one language": in_one_language,
           "not rambling": not_rambling}


def train_dev1(run):
    """The cold start: the base learns from at most 200 of R1-Zero's right and well-formed traces,
    those that mix languages least."""
    return train_sft(run, ["right", "in format"], rank=rewards.one_language)


def train_dev3(run):
    """Rejection sampling: the base, not dev2, learns from dev2's readable right traces, and from
    scripted replies to general requests."""
    return train_sft(run, list(FILTERS), replies=run.cfg.train.general_replies)


def train_distill(run):
    """Distillation: a smaller base learns from R1's samples. Nothing but SFT, as in the paper."""
    return train_sft(run, ["right", "in format"])


def train_sft(run, filters, rank=None, replies=0):
    """Fine-tunes the parent's model on rejection-sampled completions of the source stage and on
    scripted replies. sft.jsonl holds both, for people to read and for a run that is resumed."""
    cfg, path = run.cfg, run.path("sft.jsonl")
    if not run.steps_done() or not os.path.exists(path):
        problems, texts = source_samples(run)
        chosen = {name: FILTERS[name] for name in filters}
        rows, passed = sample.rejection_sample(problems, texts, chosen, rank)
        if not rows:
            raise UserError(f"{run.name}: nothing that {run.stage.source} says is fit to learn "
                            f"from: train it longer, or raise --source_problems")
        counts = "".join(f", {name} {n}" for name, n in passed.items())
        scripted = scripted_replies(run, replies)
        more = f", and {replies} scripted replies" if replies else ""
        print(f"{run.name}: sampled {sum(map(len, texts))} from {run.stage.source}{counts}, kept "
              f"{len(rows)} of {len(problems)} problems{more}, in {path}")
        write_lines(path, [{"problem": asdict(p), "prompt": data.prompt_text(p, cfg.data),
                            "completion": text} for p, text in rows + scripted])
    rows = []
    for line in read_lines(path):
        problem = {**line["problem"], "numbers": tuple(line["problem"]["numbers"])}
        rows.append((data.Problem(**problem), line["completion"]))
    model = run.load(run.stage.parent)

    def batch(rng):
        return data.sft_batch(rows, run.tok, cfg.data, rng, cfg.train.sft_rows)

    supervise(run, model, batch, cfg.train.sft_lr)
    return model


def source_samples(run, tasks=None, held_out=False):
    """(problems, texts): what the source stage says to problems that this one draws, or to those
    of the given tasks; texts[i] are the samples of problems[i]."""
    cfg, k = run.cfg, run.cfg.train.source_samples
    rng, generator = generators(run.seed, run.name, "source", *["held out"] * held_out)
    problems = []
    for _ in range(cfg.train.source_problems):
        task = rng.choice(tasks) if tasks else None
        problems.append(data.draw_problem(cfg.data, rng, task, held_out))
    model = sampling_copy(run.load(run.stage.source), run.sample_dtype)
    answers = sample.sample_answers(model, run.tok, problems, k, cfg, cfg.grpo.temperature,
                                    generator, f"{run.name}: sampling {run.stage.source}")
    return problems, [[a.text for a in answers[i:i + k]] for i in range(0, len(answers), k)]


def scripted_replies(run, n):
    """Replies to n general requests: (problem, completion) rows."""
    (rng, _), cfg, rows = generators(run.seed, run.name, "replies"), run.cfg.data, []
    problems = [data.draw_problem(cfg, rng, rng.choice(data.GENERAL)) for _ in range(n)]
    for problem in problems:
        lines, answer = data.TASKS[problem.task].write(problem, cfg, None, rng)
        rows.append((problem, data.tagged(lines, answer)))
    return rows


def train_reward_model(run):
    """Learns which of two of dev3's answers the simulated annotators preferred, not why."""
    cfg, path = run.cfg, run.path("pairs.jsonl")
    if not run.steps_done() or not os.path.exists(path):
        write_lines(path, [*annotate(run, held_out=False), *annotate(run, held_out=True)])
    pairs = [pair for pair in read_lines(path) if not pair["held_out"]]
    if not pairs:
        raise UserError(f"{run.name}: {run.stage.source} gives no two answers that differ in gold "
                        f"reward: raise --source_problems")
    gpt = run.load(run.stage.parent)
    model = RewardModel(gpt.cfg, gpt).to(run.device)

    def batch(rng):
        chosen = [rng.choice(pairs) for _ in range(cfg.train.sft_rows)]
        texts = [(p["prompt"], p[side]) for side in ("preferred", "other") for p in chosen]
        return rewards.text_batch(run.tok, texts, cfg.model.context)

    supervise(run, model, batch, cfg.train.sft_lr, pair_loss)
    return model


def annotate(run, held_out):
    """Pairs of the source's answers to general requests, as the simulated annotators prefer
    them."""
    problems, texts = source_samples(run, data.GENERAL, held_out)
    order = sorted(range(len(problems)), key=lambda i: problems[i].question)
    own = [list(said) for said in texts]
    # Every fourth answer is one to a similar request: pairs must show what is off the point, too.
    for i, j in zip(order, order[1:] + order[:1], strict=True):
        texts[i][1::4] = own[j][1::4]
    answers = [[rewards.split_completion(text)[1] for text in said] for said in texts]
    rng, _ = generators(run.seed, run.name, "annotators", held_out)
    pairs = []
    for i, a, b in rewards.preference_pairs(problems, answers, rng, run.cfg.train.label_noise):
        gold = [rewards.gold_reward(problems[i], answers[i][j]) for j in (a, b)]
        pairs.append({"held_out": held_out, "prompt": data.prompt_text(problems[i], run.cfg.data),
                      "preferred": texts[i][a], "other": texts[i][b],
                      "gold_agrees": gold[0] > gold[1]})
    return pairs


def evaluate_reward_model(run, model):
    """How often it agrees, on held-out pairs, with the annotators and with gold reward:
    eval.json."""
    pairs = read_lines(run.path("pairs.jsonl"))
    held_out = [pair for pair in pairs if pair["held_out"]]
    prompts = [pair["prompt"] for pair in held_out]
    scores = [model.score(run.tok, prompts, [pair[side] for pair in held_out])
              for side in ("preferred", "other")]
    agrees = [a > b for a, b in zip(*scores, strict=True)]
    gold = [a == pair["gold_agrees"] for a, pair in zip(agrees, held_out, strict=True)]
    n = max(1, len(held_out))
    result = {"train": len(pairs) - len(held_out), "held_out": len(held_out),
              "accuracy": sum(agrees) / n, "gold_accuracy": sum(gold) / n}
    print(f"{run.name}: on {len(held_out)} held-out pairs it agrees with the annotators in "
          f"{result['accuracy']:.1%}, and with gold reward in {result['gold_accuracy']:.1%}")
    write_json(run.path("eval.json"), {"pairs": result})


@dataclass(frozen=True)
class Stage:
    train: callable  # (run) -> trained model
    kind: str        # base, rl, sft or pairs: a key of RESUME_KEYS
    parent: str      # the stage whose checkpoint it starts from
    source: str      # the stage whose samples, or whose scores, it learns from
    settings: dict   # its own defaults

    @property
    def steps(self):
        """The setting that says how long it is."""
        return {"base": "base_steps", "rl": "rl_steps"}.get(self.kind, "sft_steps")


SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "mlp_dim": 128}
SHORT_RL = {"rl_steps": 30, "rl_lr": 5e-4}
STAGES = {
    "base": Stage(train_base, "base", None, None, {}),
    "zero": Stage(train_rl, "rl", "base", None, {}),
    "dev1": Stage(train_dev1, "sft", "base", "zero", {}),
    "dev2": Stage(train_rl, "rl", "dev1", None, {"w_language": 0.5, **SHORT_RL}),
    "dev3": Stage(train_dev3, "sft", "base", "dev2", {
        "source_problems": 1600, "source_samples": 2, "general_replies": 3000, "sft_steps": 500,
        "sft_lr": 2e-3, "sft_rows": 32}),
    "reward_model": Stage(train_reward_model, "pairs", "dev3", "dev3", {
        "source_problems": 1500, "sft_steps": 300, "sft_rows": 32}),
    "r1": Stage(train_rl, "rl", "dev3", "reward_model", {
        "mix": "task:2,chat:1,unsafe:1", "w_language": 0.5, "w_preference": 0.5, "w_harmless": 1.0,
        **SHORT_RL}),
    "small_base": Stage(train_base, "base", None, None, SMALL),
    "distill": Stage(train_distill, "sft", "small_base", "r1", {
        **SMALL, "mix": "task:4,chat:1,unsafe:1", "source_problems": 2400, "source_samples": 1,
        "sft_steps": 600, "sft_lr": 2e-3, "sft_rows": 32}),
    "small_zero": Stage(train_rl, "rl", "small_base", None, SMALL),
    # Two experiments: dev2 without its language reward, and zero with an emoji at the end of each
    # line. The latter does not divide by the std: where all of a group are right, nothing but a
    # missing emoji tells samples apart, and would be blown up to the size of a wrong answer.
    "dev2_free": Stage(train_rl, "rl", "dev1", None, SHORT_RL),
    "zero_emoji": Stage(train_rl, "rl", "base", None, {
        "w_emoji": 0.2, "adv_norm": "none", "rl_steps": 80}),
}


def resolve_dependencies(stages):
    """The given stages and all that they need, in the order in which they run."""
    needed = set(stages)
    for name in reversed(STAGES):  # whatever a stage needs is above it in the table
        if name in needed:
            needed |= {other for other in (STAGES[name].parent, STAGES[name].source) if other}
    return [name for name in STAGES if name in needed]


def run_stage(name, given):
    """Runs a stage if it is not done, and evaluates it if it was not; returns its Run."""
    run, model = Run(name, given), None
    is_rm, is_real = name == "reward_model", name == "base" and run.cfg.sample.init_from
    evaluated = ("pairs" if is_rm else run.cfg.data.task) in read_results(run.dir)
    if is_real:  # somebody else has trained it
        print(f"base: {run.cfg.sample.init_from}")
    elif run.steps_done() >= run.steps:
        print(f"{name}: done ({run.path('ckpt.pt')}, {run.steps_done()} steps)")
    else:
        print(f"{name}: {run.steps} steps on {run.device}, into {run.dir}")
        with run.until_interrupted():
            model = run.stage.train(run)
        plot_curves(run.dir)
        evaluated = False
    if evaluated:
        return run
    if is_real:
        print_memory(run)
    model = model or run.load(name, RewardModel if is_rm else GPT)
    if is_rm:
        evaluate_reward_model(run, model)
    else:
        model = sampling_copy(model, run.sample_dtype)
        sample.evaluate_tasks(model, run.tok, run.cfg, run.dir)
    return run


# ------------------------------------------------------------------------------------------------
# Tables, pictures, commands


def results_so_far(out_dir, task):
    """{stage: results} of every stage in `out_dir` that was evaluated on `task`, in paper order."""
    found = {name: read_results(os.path.join(out_dir, name)) for name in STAGES}
    return {name: results for name, results in found.items() if task in results}


def print_tables(results, task):
    """{stage: results by task} -> what each stage does with its task, and with the others."""
    k, n = (max(r[task][key] for r in results.values()) for key in ("samples", "problems"))
    columns = {key: (task, key) for key in (
        "pass@1", "pass@1_ci", "pass@1_greedy", f"pass@{k}", f"cons@{k}", "format", "one_language",
        "length", "retry_rate", "truncated")}
    print_table(f"{task}: {n} held-out problems, {k} samples of each", columns, results)
    others = [t for t in data.TASKS if t != task and any(t in r for r in results.values())]
    columns = {t: (t, "pass@1") for t in others}
    columns |= {f"thinks: {t}": (t, "thinks") for t in (task, "chat", "unsafe")}
    columns |= {"gold reward": ("chat", "gold_reward"), "win rate": ("win_rate", "gold"),
                "win rate (RM)": ("win_rate", "reward_model")}
    if others:
        print_table("pass@1 on other tasks, thinking, and preferences", columns, results)
    print()


def print_table(title, columns, results):
    """One row per stage; `columns` are {heading: (task, key)}."""
    rows = [["", *columns]]
    for stage, result in results.items():
        cells = [show(key, result.get(task, {}).get(key)) for task, key in columns.values()]
        rows.append([stage, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print("\n" + title)
    for first, *cells in rows:
        shown = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *shown]))


def show(key, value):
    if value is None:
        return "-"
    if isinstance(value, list):
        return "{:.1%}-{:.1%}".format(*value)
    form = {"length": ".1f", "gold_reward": ".2f"}.get(key, ".1%")
    return format(value, form)


def plot_curves(folder):
    """curves.png beside metrics.jsonl, if matplotlib happens to be installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    lines = read_lines(os.path.join(folder, "metrics.jsonl"))
    keys = ["reward/accuracy", "reward/format", "length", "kl", "entropy"]
    keys = [key for key in keys if key in lines[0]] or ["loss"]
    figure, axes = pyplot.subplots(1, len(keys), figsize=(3.2 * len(keys), 2.6), squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        axis.plot([m["step"] for m in lines], [m[key] for m in lines], linewidth=1)
        axis.set(title=key, xlabel="step")
    figure.tight_layout()
    figure.savefig(os.path.join(folder, "curves.png"), dpi=120)
    pyplot.close(figure)


def run_table(given):
    """`table`: what lies in out_dir."""
    out_dir = given.get("out_dir", sample.SampleConfig.out_dir)
    evaluated = [task for name in STAGES for task in read_results(os.path.join(out_dir, name))]
    evaluated = [task for task in evaluated if task in data.TASKS]
    task = given.get("task") or (evaluated or [DataConfig.task])[0]  # a stage's own comes first
    results = results_so_far(out_dir, task)
    if not results:
        raise UserError(f"nothing in {out_dir} was evaluated on {task}: run a stage first, or set "
                        f"--out_dir or --task")
    print_tables(results, task)


def run_eval(given):
    """`eval`: the final evaluation of any checkpoint, into the folder it lies in."""
    path, model, tok, cfg = sample.open_checkpoint(given)
    sample.evaluate_tasks(model, tok, cfg, os.path.dirname(path))
    print_tables({path: read_results(os.path.dirname(path))}, cfg.data.task)


def run_export(given):
    """`export`: a checkpoint as a Hugging Face folder, which transformers, vLLM and TRL open."""
    path, model, tok, cfg = sample.open_checkpoint(given)
    folder, dtype, source = (Config.of(given).train.export_dir, Config.of(given).train.export_dtype,
                             cfg.sample.init_from)
    if not folder:
        raise UserError("export needs --export_dir=FOLDER to write to")
    try:
        save_pretrained(model, folder, source, getattr(torch, dtype))
        if not source:
            tok.save(folder)
    except OSError as e:
        raise UserError(f"cannot write to {folder} ({e.strerror}): choose another "
                        f"--export_dir") from None
    print(f"{path}: written to {folder} as {dtype}")


COMMANDS = {"eval": run_eval, "export": run_export, "table": run_table}


def parse(argv):
    """Command line -> (stages or a command, {setting: value} as given)."""
    own = [f"  {name}: " + ", ".join(f"{key}={value}" for key, value in stage.settings.items())
           for name, stage in STAGES.items() if stage.settings]
    parser = sample.Parser("train.py", __doc__, {f.name: f.default_factory for f in fields(Config)},
                           usage="python train.py [STAGE ...] [--setting=value ...]",
                           epilog="What stages set for themselves:\n" + "\n".join(own))
    parser.add_argument("words", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)} (default "
                        f"zero), or a command: {', '.join(COMMANDS)}")
    given = vars(parser.parse_args(argv))
    words = given.pop("words", None) or ["zero"]
    for word in words:
        if word not in STAGES and not (word in COMMANDS and len(words) == 1):
            parser.error(f"there is no stage {word!r}: choose from {', '.join(STAGES)}; or one of "
                         f"{', '.join(COMMANDS)} alone")
    return words, given


def print_next(run, results):
    """Where everything lies, and what a newcomer may want to do with it."""
    cfg, out_dir = run.cfg, run.cfg.sample.out_dir
    print(f"{run.dir} holds the checkpoint, the log (metrics.jsonl), rollouts (rollouts.jsonl), "
          f"the evaluation (eval.json) and its samples (samples.jsonl). Next:")
    base = os.path.join(out_dir, "base", "ckpt.pt")
    vs = f" --vs={base}" if "base" in results and run.name != "base" else ""
    print(f"    python sample.py --ckpt={run.path('ckpt.pt')}{vs}")
    if "r1" not in results and not cfg.sample.init_from:
        task = "" if cfg.data.task == DataConfig.task else f" --task={cfg.data.task}"
        print(f"    python train.py r1 distill small_zero{task} --seed={run.seed} "
              f"--out_dir={out_dir}")


def main(argv):
    words, given = parse(argv)
    with sample.one_line_errors("train.py", given.get("out_dir", sample.SampleConfig.out_dir)):
        if words[0] in COMMANDS:
            return COMMANDS[words[0]](given)
        for name in resolve_dependencies(words):
            run = run_stage(name, given)
        results = results_so_far(run.cfg.sample.out_dir, run.cfg.data.task)
        if results:
            print_tables(results, run.cfg.data.task)
        print_next(run, results)


if __name__ == "__main__":
    main(sys.argv[1:])
