"""The DeepSeek-R1 pipeline on a laptop: this file turns the other four into runs.

    base ──── GRPO: accuracy, format ─────────────────────► zero          DeepSeek-R1-Zero
    base ──── SFT: zero's most readable right traces ─────► dev1          cold start
    dev1 ──── GRPO: + one language ───────────────────────► dev2          reasoning RL
    base ──── SFT: dev2's right traces, general replies ──► dev3          rejection sampling
    dev3 ──── Bradley-Terry: which answers people prefer ─► reward_model
    dev3 ──── GRPO: + preference, harmlessness ───────────► r1            RL for all scenarios: DeepSeek-R1
    small_base ─ SFT: r1's samples ───────────────────────► distill       distillation, and beside it
    small_base ─ GRPO: accuracy, format ──────────────────► small_zero    the small model with RL alone

    python train.py                             # base, then zero, then a table that compares them
    python train.py r1 distill small_zero       # everything: whatever a stage needs is run first, and nothing twice
    python train.py table                       # what came of it, as text and as Markdown
    python train.py --task=logic --out_dir=out-logic          # or arithmetic, or code
    python train.py --rl_steps=300              # goes on from where a finished run stopped
    python train.py --init_from=FOLDER          # GRPO on a real model: a Hugging Face folder in place of the toy base
    python train.py eval --ckpt=out/zero/ckpt.pt
    python train.py export --ckpt=out/zero/ckpt.pt --export_dir=FOLDER   # a Hugging Face folder again
    python train.py --help                      # every setting, its unit and its default

A run lies in --out_dir: STAGE/ckpt.pt, metrics.jsonl (a line a step), eval.json, samples.jsonl. The same
command again resumes a stage that was cut short and skips one that is done.
"""
import argparse
import copy
import json
import math
import os
import random
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
from data import DataConfig
from grpo import GRPOConfig, apply_gradients, group_advantages, grpo_step, resample_equal_groups, rollout
from model import (GPT, BadInput, GPTConfig, config_from_hf, load_checkpoint, load_model, model_of, opt, read_json, save_checkpoint,
                   save_pretrained, whole_file)
from rewards import RewardConfig, RewardModel

# ------------------------------------------------------------------------------------------------
# Configuration: default < task < variant < stage < command line


@dataclass
class TrainConfig:
    out_dir: str = opt("out", "folder that everything is written to")
    seed: int = opt(1, "every random choice follows from it")
    device: str = opt("auto", "cpu, cuda, or auto: cuda where there is one")
    threads: int = opt(0, "CPU threads; 0 = one a core")
    init_from: str = opt("", "Hugging Face folder whose model takes the toy base's place")
    optimizer: str = opt("muon", "muon: for the matrices, AdamW for the rest; adamw: for everything")
    autocast: str = opt("auto", "training's matrix products in bfloat16: on, off, or auto: on CUDA; weights stay fp32")
    sample_dtype: str = opt("auto", "weights that sampling runs with: float32, bfloat16, or auto: bfloat16 on CUDA")
    ref_dtype: str = opt("float32", "weights of the reference: float32 or bfloat16")
    checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, a third more time")
    compile: bool = opt(False, "torch.compile the transformer for training")
    base_steps: int = opt(1200, "optimiser steps of next-token training")
    base_lr: float = opt(5e-3, "its peak learning rate")
    base_rows: int = opt(12, "rows of packed documents a step")
    base_length: int = opt(352, "tokens a row")
    variant: str = opt("grpo", "grpo as published, dr_grpo or dapo: presets of the settings below that differ")
    rl_steps: int = opt(60, "GRPO steps")
    rl_lr: float = opt(1e-3, "learning rate of GRPO")
    rl_warmup: int = opt(5, "GRPO steps until the learning rate is reached")
    rl_hold: int = opt(15, "GRPO step after which it falls as 1/sqrt(step)")
    eval_every: int = opt(20, "GRPO steps between short evaluations; 0 = none")
    eval_samples: int = opt(16, "completions of each held-out problem in an evaluation")
    save_every: int = opt(20, "GRPO steps between checkpoints; next-token training saves every 10 times as many")
    harvest_problems: int = opt(400, "problems that a stage which learns from another's samples puts to it")
    harvest_samples: int = opt(8, "samples of each")
    general_rows: int = opt(600, "replies to general requests, written by people, that dev3 learns from beside its harvest")
    sft_steps: int = opt(60, "optimiser steps of supervised fine-tuning, and of the reward model")
    sft_lr: float = opt(1e-3, "its peak learning rate")
    sft_rows: int = opt(24, "traces a step; pairs for the reward model")
    noise: float = opt(0.1, "share of preferences that are the wrong way round")
    patience: int = opt(5, "updates in a row that may be dropped because their gradients are not finite")
    ckpt: str = opt("", "checkpoint for `eval` and `export`; none = out_dir/zero/ckpt.pt")
    export_dir: str = opt("", "folder that `export` writes")
    export_dtype: str = opt("float32", "weights that `export` writes: float32, bfloat16 or float16")

    def check(self):
        """Raises BadInput, naming the setting, on a value that cannot be run."""
        for name in ("base_steps", "base_rows", "base_length", "rl_steps", "rl_warmup", "rl_hold", "eval_samples", "save_every",
                     "harvest_problems", "harvest_samples", "general_rows", "sft_steps", "sft_rows", "patience"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("base_lr", "rl_lr", "sft_lr"):
            if not 0 < getattr(self, name) < 1:
                raise BadInput(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if not 0 <= self.noise <= 0.5:
            raise BadInput(f"noise={self.noise} must lie between 0 and 0.5")
        if self.threads < 0 or self.eval_every < 0:
            raise BadInput(f"threads={self.threads} and eval_every={self.eval_every} must not be negative")
        for name, values in (("optimizer", ["muon", "adamw"]), ("autocast", ["auto", "on", "off"]), ("sample_dtype", ["auto", "float32", "bfloat16"]), ("variant", ["grpo", *VARIANTS]),
                             ("ref_dtype", ["float32", "bfloat16"]), ("export_dtype", ["float32", "bfloat16", "float16"])):
            if getattr(self, name) not in values:
                raise BadInput(f"{name}={getattr(self, name)!r} is not one of {', '.join(values)}")
        if self.device not in ("auto", "cpu") and not self.device.startswith("cuda"):
            raise BadInput(f"device={self.device!r} is not auto, cpu or cuda")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise BadInput(f"device={self.device!r}, but torch finds no GPU; use --device=cpu")


@dataclass
class Config:
    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def with_settings(self, settings):
        """A copy with {field name: value} set wherever a field of that name is."""
        groups = {g.name: getattr(self, g.name) for g in fields(self)}
        return Config(**{name: replace(group, **{f.name: settings[f.name] for f in fields(group) if f.name in settings})
                         for name, group in groups.items()})

    def settings(self):
        return {name: value for group in asdict(self).values() for name, value in group.items()}


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """argparse would print all of the usage first; the one line that matters is enough."""
        self.exit(2, f"{self.prog}: {message} (python {self.prog} --help lists the settings)\n")


def parse(argv):
    """Command line -> (stages or commands, {setting: value} as given)."""
    parser = Parser(prog="train.py", usage="python train.py [STAGE ...] [--setting=value ...]", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, description=__doc__,
                    epilog="What stages set for themselves:\n" + "\n".join(f"  {name}: " + ", ".join(f"{k}={v}" for k, v in stage.overrides.items())
                                                                            for name, stage in STAGES.items() if stage.overrides),
                    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=150))
    parser.add_argument("words", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)} (default zero), or a command: {', '.join(COMMANDS)}")
    for group in fields(Config):
        section = parser.add_argument_group(group.name)
        for f in fields(group.default_factory):
            help = f"{f.metadata['help']} (default {f.default if f.default != '' else 'none'})".replace("%", "%%")
            section.add_argument(f"--{f.name}", type=boolean if f.type is bool else f.type, metavar=f.type.__name__, help=help)
    given = vars(parser.parse_args(argv))
    words = given.pop("words", None) or ["zero"]
    for word in words:
        if word not in STAGES and not (word in COMMANDS and len(words) == 1):
            parser.error(f"there is no stage {word!r}: choose from {', '.join(STAGES)}; or one of {', '.join(COMMANDS)} alone")
    return words, given


def rng(*key):
    """A Python and a torch generator made from `key` and nothing else. Every step makes its own from (seed,
    stage, step): a resumed run draws what an uninterrupted one would have, with no state to save."""
    python = random.Random("/".join(map(str, key)))
    return python, torch.Generator().manual_seed(python.getrandbits(60))


# ------------------------------------------------------------------------------------------------
# A stage's folder


class Run:
    """One stage under way: its settings, its folder, and how it stops and goes on."""

    def __init__(self, name, given):
        self.name, self.stage = name, STAGES[name]
        folder = given.get("init_from", "")
        self.tok = data.load_tokenizer(folder)
        defaults = {**(REAL_DEFAULTS if folder else {"vocab_size": self.tok.n_vocab}), **({"task": "file"} if given.get("data") else {})}
        self.cfg = Config().with_settings({**defaults, **TASK_DEFAULTS.get(given.get("task"), {}), **VARIANTS.get(given.get("variant"), {}), **self.stage.overrides, **given})
        if folder:
            shape = [n for n in names(GPTConfig, "context") if n in given]
            if shape:
                raise BadInput(f"{', '.join(shape)} cannot be set: the model's shape comes from {folder}")
            model = config_from_hf(read_json(os.path.join(folder, "config.json")))
            self.cfg.model = replace(model, context=min(model.context, self.cfg.model.context))
        for group in fields(self.cfg):
            getattr(self.cfg, group.name).check()
        self.check_lengths()
        if self.cfg.train.threads:
            torch.set_num_threads(self.cfg.train.threads)
        self.device = torch.device("cuda" if self.cfg.train.device == "auto" and torch.cuda.is_available()
                                   else self.cfg.train.device.replace("auto", "cpu"))
        self.dir = os.path.join(self.cfg.train.out_dir, name)
        try:
            os.makedirs(self.dir, exist_ok=True)
            with open(self.path("metrics.jsonl"), "a"):
                pass
        except OSError as e:
            raise BadInput(f"cannot write to {self.dir} ({e.strerror}): choose another --out_dir") from None
        self.seconds, self.skipped, self.stopping = 0.0, 0, False
        self.saved = load_checkpoint(self.path("ckpt.pt")) if os.path.exists(self.path("ckpt.pt")) else None
        if self.saved:
            if not {"step", "settings", "optimizers", "seconds"} <= set(self.saved):
                raise BadInput(f"{self.path('ckpt.pt')} is no checkpoint of a run; move it away, or choose another --out_dir")
            self.refuse_contradictions()

    def check_lengths(self):
        """Raises BadInput before any work if the model cannot hold the tokens or the longest sequences."""
        cfg, context = self.cfg, self.cfg.model.context
        if cfg.model.vocab_size < self.tok.n_vocab:
            raise BadInput(f"vocab_size={cfg.model.vocab_size} is less than the tokenizer's {self.tok.n_vocab}: leave it out")
        self.prompt_len = prompt = max(len(data.prompt_ids(p, self.tok, cfg.data)) for p in data.eval_problems(cfg.data, 50))
        if cfg.train.base_length > context and not cfg.train.init_from:
            raise BadInput(f"base_length={cfg.train.base_length} does not fit the context of {context}: lower it or raise --context")
        if prompt + cfg.grpo.max_new_tokens > context:
            raise BadInput(f"a prompt of {prompt} tokens + max_new_tokens={cfg.grpo.max_new_tokens} do not fit the context of {context}: "
                           f"lower --max_new_tokens or raise --context")

    def path(self, file):
        return os.path.join(self.dir, file)

    def parent_model(self):
        """The model that this stage starts from."""
        cfg = self.cfg
        if self.stage.parent == "base" and cfg.train.init_from:
            return GPT.from_pretrained(cfg.train.init_from, cfg.model.context, device=self.device)
        return load_model(os.path.join(cfg.train.out_dir, self.stage.parent, "ckpt.pt"), self.device)

    def sampler_for(self, model):
        """What samples in the model's place: itself, or a copy in bfloat16 (see `refresh`)."""
        half = in_half(self.cfg.train.sample_dtype, self.device)
        return copy.deepcopy(model).requires_grad_(False).bfloat16() if half else model

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=in_half(self.cfg.train.autocast, self.device))

    def say_memory(self):
        """One line before anything is loaded: what RL with these settings will take, and what there is. A toy need not say it."""
        parts = memory_plan(self.cfg, self.prompt_len, self.device)
        need = sum(parts.values()) / 2**30
        have = (torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda"
                else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2**30
        if need < 1 and not self.cfg.train.init_from:
            return
        print("memory, GiB: " + " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items()) + f" = about {need:.1f} of {have:.1f}")
        if need > have:
            print("that is more than there is: lower --micro_tokens or --prompts_per_step, or set --checkpointing=true, --ref_dtype=bfloat16 or --kl_coef=0")

    def refuse_contradictions(self):
        """Going on with other settings would make one run out of two, so BadInput names them."""
        now, then = self.cfg.settings(), {**Config().settings(), **self.saved["settings"]}  # a setting newer than the checkpoint had its default
        other = [f"{k}={then.get(k)}, not {now[k]}" for k in self.stage.shaped_by if now[k] != then.get(k)]
        if other:
            raise BadInput(f"{self.dir} was trained with {'; '.join(other)}: choose another --out_dir, or delete {self.dir}")

    def steps_done(self):
        return self.saved["step"] if self.saved else 0

    def resume(self, model, optimizers, ref=None):
        """Puts everything back as it was and returns the step to go on from, 0 for a fresh start."""
        step = self.steps_done()
        if step:
            model.load_state_dict(self.saved["model"])
            for optimizer, state in zip(optimizers, self.saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            if ref is not None and self.saved["ref"]:
                ref.load_state_dict(self.saved["ref"])
            self.seconds = self.saved["seconds"]
            print(f"{self.name}: resuming at step {step}")
        with open(self.path("metrics.jsonl")) as f:  # lines past the checkpoint will be written again
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        with whole_file(self.path("metrics.jsonl")) as f:
            f.write("".join(lines).encode())
        self.saved = {"step": step}  # the rest is in use now, and large
        return step

    def save(self, step, model, optimizers, ref=None):
        save_checkpoint(self.path("ckpt.pt"), {
            "stage": self.name, "step": step, "seconds": self.seconds, "settings": self.cfg.settings(),
            "model_config": asdict(model.cfg), "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers], "ref": ref.state_dict() if ref is not None else None})

    def log(self, metrics):
        plain = lambda v: v if not isinstance(v, float) else round(v, 6) if math.isfinite(v) else None
        with open(self.path("metrics.jsonl"), "a") as f:
            f.write(json.dumps({k: plain(v) for k, v in metrics.items()}) + "\n")

    def count_skipped(self, metrics, batch):
        """Raises BadInput when `patience` updates in a row were not finite, with the last batch saved for a look."""
        self.skipped = self.skipped + 1 if metrics["skipped"] == 1 else 0
        if self.skipped >= self.cfg.train.patience:
            save_checkpoint(self.path("bad_batch.pt"), batch)
            raise BadInput(f"{self.name}: the gradients of {self.skipped} updates in a row were not finite, none of them was taken; the last batch lies in "
                           f"{self.path('bad_batch.pt')}. Lower the learning rate, and go on from {self.path('ckpt.pt')} with the same command")

    @contextmanager
    def until_interrupted(self):
        """Within it, a first Ctrl-C sets `stopping`: the step under way is finished and saved. A second one ends the run at once."""
        def on_interrupt(*_):
            signal.signal(signal.SIGINT, before)
            self.stopping = True
            tqdm.write("stopping after this step; Ctrl-C again stops at once")
        in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
        before = signal.signal(signal.SIGINT, on_interrupt) if in_main_thread else None
        try:
            yield
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, before)

    def end_step(self, step, steps, every, *state):
        """Saves where it is time to, and stops where the user wants to."""
        if step % every == 0 or step == steps or self.stopping:
            self.save(step, *state)
        if self.stopping and step < steps:
            raise KeyboardInterrupt(f"{self.name} is saved at step {step} of {steps}")


# ------------------------------------------------------------------------------------------------
# The mechanics: next-token training, and RL


def make_optimizers(model, lr, kind):
    """Muon for the matrices of the blocks and AdamW for embedding and norms, or AdamW for everything."""
    in_blocks = lambda name, p: p.dim() == 2 and "blocks." in name
    matrices = [p for name, p in model.named_parameters() if in_blocks(name, p)]
    others = [p for name, p in model.named_parameters() if not in_blocks(name, p)]
    if kind == "adamw":
        return [torch.optim.AdamW(matrices + others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def in_half(setting, device):
    """Whether --sample_dtype or --autocast means bfloat16 on this device."""
    return setting in ("on", "bfloat16") or setting == "auto" and device.type == "cuda"


def memory_plan(cfg, prompt_len, device):
    """{what: bytes} of a GRPO step: exact for weights, optimiser and cache, a rule of thumb for activations."""
    m, g, t = cfg.model, cfg.grpo, cfg.train
    with torch.device("meta"):
        n_params = sum(p.numel() for p in GPT(m).parameters())
    half_sampling, half_training = in_half(t.sample_dtype, device), in_half(t.autocast, device)
    rows = max(g.prompts_per_step * g.group_size, 32 * t.eval_samples)
    cache = rows * (prompt_len + g.max_new_tokens) * m.n_layer * m.n_kv_head * m.d_head * 2
    block = 10 * m.n_embd + 5 * m.d_head * (m.n_head + m.n_kv_head) + 6 * m.mlp_dim  # numbers kept a token for the backward pass
    tokens = max(g.micro_tokens, prompt_len + g.max_new_tokens)
    activations = tokens * (m.n_layer * m.n_embd + block if t.checkpointing else m.n_layer * block)
    return {"weights": 4 * n_params, "gradients": 4 * n_params, "optimiser": (8 if t.optimizer == "adamw" else 4) * n_params,
            "reference": (2 if t.ref_dtype == "bfloat16" else 4) * n_params if g.kl_coef else 0,
            "sampling": 2 * n_params * half_sampling + (2 if half_sampling else 4) * cache,
            "activations": (2 if half_training else 4) * activations + 3 * 4 * 2**24}


@torch.no_grad()
def refresh(sampler, model):
    """Brings a sampling copy up to date."""
    if sampler is not model:
        for a, b in zip(sampler.parameters(), model.parameters(), strict=True):
            a.copy_(b)


def set_up(model, cfg):
    """Applies --checkpointing and --compile to a model's training passes."""
    model.checkpointing = cfg.train.checkpointing
    if cfg.train.compile:
        model.compiled_trunk = torch.compile(model.trunk, dynamic=True)


def set_lr(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def next_token_loss(model, tokens, mask):
    """Cross-entropy of the tokens of ids (N, T) that the mask (N, T) marks as to be learnt."""
    mask = mask[:, 1:]
    hidden = (model.compiled_trunk or model.trunk)(tokens[:, :-1])
    return F.cross_entropy(model.head(hidden[mask]), tokens[:, 1:][mask])


def pair_loss(model, tokens, lengths):
    """Bradley-Terry on ids (2N, T) of given lengths: the preferred texts first, then the others in the same order."""
    return rewards.bradley_terry_loss(*model(tokens, lengths).chunk(2))


def sft_loop(run, model, batch_fn, steps, lr, loss_fn=next_token_loss):
    """Supervised training: `loss_fn` of `batch_fn(step)` -> ids, and the mask of those to learn or their lengths."""
    optimizers = make_optimizers(model, lr, run.cfg.train.optimizer)
    set_up(getattr(model, "gpt", model), run.cfg)
    start, window = run.resume(model, optimizers), []
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=run.name, disable=None):
        t0 = time.time()
        set_lr(optimizers, lr * min((step + 1) / 50, (steps - step) / (0.6 * steps), 1.0))  # warm up, hold, decay to 0
        tokens, counted = (x.to(run.device) for x in batch_fn(step))
        with run.autocast():
            loss = loss_fn(model, tokens, counted)
        loss.backward()
        grad_norm, skipped = apply_gradients(model, optimizers, 1.0)
        run.seconds += time.time() - t0
        window.append({"step": step + 1, "loss": loss.item(), "grad_norm": grad_norm, "skipped": skipped, "tokens": int(counted.sum()),
                       "seconds": run.seconds})
        run.log(window[-1])
        run.count_skipped(window[-1], {"tokens": tokens, "counted": counted})
        if (step + 1) % 50 == 0 or step + 1 == steps:
            loss = sum(m["loss"] for m in window) / len(window)
            took = window[-1]["seconds"] - window[0]["seconds"] + 1e-9
            tqdm.write(f"{run.name} {step + 1:4d}/{steps}  loss {loss:.4f}  grad {window[-1]['grad_norm']:.2f}  "
                       f"{sum(m['tokens'] for m in window[1:]) / took:,.0f} tok/s  {run.seconds:.0f} s")
            window = []
        run.end_step(step + 1, steps, 10 * run.cfg.train.save_every, model, optimizers)


def rl_loop(run, model, ref, draw, reward_fn, check):
    """GRPO on problems from `draw(rng)`; `check(model)` is called for a short evaluation now and then."""
    cfg, tok, steps = run.cfg, run.tok, run.cfg.train.rl_steps
    optimizers = make_optimizers(model, cfg.train.rl_lr, cfg.train.optimizer)
    start = run.resume(model, optimizers, ref)
    sampler = run.sampler_for(model)
    for m in (model, ref):
        if m is not None:
            set_up(m, cfg)
    for step in tqdm(range(start, steps), initial=start, total=steps, desc=run.name, disable=None):
        t0 = time.time()
        set_lr(optimizers, cfg.train.rl_lr * min((step + 1) / cfg.train.rl_warmup, 1.0, (cfg.train.rl_hold / (step + 1)) ** 0.5))
        python, generator = rng(cfg.train.seed, run.name, step)

        def sample(n):
            problems = [draw(python) for _ in range(n)]
            prompts = [data.prompt_ids(p, tok, cfg.data) for p in problems]
            return rollout(sampler, problems, prompts, reward_fn, cfg.grpo, generator, tok.stop_ids, tok.pad_id)

        refresh(sampler, model)
        first = sample(cfg.grpo.prompts_per_step)  # what the log speaks of, whatever is resampled
        batch = resample_equal_groups(first, sample, cfg.grpo.resample_equal)
        t1 = time.time()
        with run.autocast():
            metrics = grpo_step(model, ref, optimizers, batch, cfg.grpo, generator)
        if ref is not None and cfg.grpo.ref_every and (step + 1) % cfg.grpo.ref_every == 0:
            ref.load_state_dict(model.state_dict())

        n_tokens, took = int(batch.mask.sum()), time.time() - t0
        run.seconds += took
        equal = ~group_advantages(first.rewards).any(dim=1)
        right = first.parts.get("accuracy", torch.full_like(first.rewards, math.nan))  # nan: not judged by rule, so neither right nor wrong
        best, worst = right.amax(1), right.amin(1)
        share = lambda x: x.double().nanmean().item()
        metrics = {
            "step": step + 1, "reward": share(first.rewards), **{name: share(x) for name, x in first.parts.items()},
            "length": first.mask.sum().item() / len(first.mask), **metrics,
            "equal": share(equal), "all_right": share(equal & (worst == 1)), "all_wrong": share(equal & (best == 0)),
            "truncated": share(first.truncated), "tokens_per_s": n_tokens / took,
            "sample_s": t1 - t0, "update_s": took - (t1 - t0), "seconds": run.seconds}
        run.log(metrics)
        run.count_skipped(metrics, {k: v for k, v in vars(batch).items() if k != "parts"})
        parts = "  ".join(f"{name} {metrics[name]:.2f}" for name in first.parts)
        tqdm.write(f"{run.name} {step + 1:4d}/{steps}  reward {metrics['reward']:.2f}  {parts}  length {metrics['length']:5.1f}  "
                   f"kl {metrics['kl']:.3f}  clip {metrics['clip']:.3f}  entropy {metrics['entropy']:.2f}  grad {metrics['grad_norm']:.2f}  "
                   f"equal {metrics['equal']:.2f} (right {metrics['all_right']:.2f} wrong {metrics['all_wrong']:.2f})  "
                   f"truncated {metrics['truncated']:.2f}  {'SKIPPED  ' if metrics['skipped'] else ''}{metrics['tokens_per_s']:,.0f} tok/s  {took:.1f} s")
        run.end_step(step + 1, steps, cfg.train.save_every, model, optimizers, ref if cfg.grpo.ref_every else None)
        if cfg.train.eval_every and (step + 1) % cfg.train.eval_every == 0 and step + 1 < steps:
            refresh(sampler, model)
            check(sampler)


# ------------------------------------------------------------------------------------------------
# Evaluation


def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them right, hold a right one: unbiased (arXiv 2107.03374). Needs k <= n."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(verdicts):
    """cons@k: is the most frequent answer right? `verdicts` are (normal form or None, right) of k samples.
    Samples without an answer do not vote; of equally frequent answers the one sampled first wins."""
    votes = Counter(form for form, _ in verdicts if form is not None)
    return bool(votes) and dict(verdicts)[max(votes, key=votes.get)]


def sample_all(model, tok, problems, k, cfg, max_new_tokens, temperature, generator, desc):
    """k completions of each problem -> [(problem, text, tokens, whether it was cut)], in the problems' order."""
    found = []
    for i in tqdm(range(0, len(problems), 32), desc=desc, leave=False, disable=None):
        chunk = problems[i:i + 32]
        out = model.generate([data.prompt_ids(p, tok, cfg) for p in chunk], k, max_new_tokens=max_new_tokens,
                             temperature=temperature, stop_ids=tok.stop_ids, generator=generator, pad_id=tok.pad_id)
        found += [(chunk[j // k], data.completion_text(ids, tok, cfg), len(ids), bool(out.truncated[j])) for j, ids in enumerate(out.completions())]
    return found


def evaluate(model, tok, problems, k, max_new_tokens, temperature=1.0, cfg=DataConfig()):
    """k completions of each problem -> (metrics, samples), samples being one dict a completion.
    pass@1's interval is the normal 95 % one over problems, whose k samples are not independent."""
    samples = []
    for problem, text, length, cut in sample_all(model, tok, problems, k, cfg, max_new_tokens, temperature, rng("evaluate")[1], "evaluate"):
        form, right = rewards.verify(problem, text)
        thinking, answer = rewards.split_completion(text)
        samples.append({
            "task": problem.task, "prompt": data.prompt_text(problem, cfg), "completion": text, "answer": form, "right": right, "format": rewards.has_format(text),
            "consistency": rewards.language_consistency([problem], [text])[0], "emoji": rewards.emoji([problem], [text])[0], "length": length, "truncated": cut,
            "rechecks": data.goes_on_after_a_miss(text), "thinks": bool((thinking or "").strip())})
        if problem.task in data.GENERAL:
            samples[-1]["liking"] = data.hidden_rule(problem, answer)
    groups = [samples[i:i + k] for i in range(0, len(samples), k)]
    right = torch.tensor([[s["right"] for s in group] for group in groups]).double()  # (problems, k)
    mean, half = right.mean().item(), 1.96 * right.mean(dim=1).std().item() / len(groups) ** 0.5 if len(groups) > 1 else 1.0
    metrics = {
        "pass@1": mean, "pass@1_ci": [max(0.0, mean - half), min(1.0, mean + half)],
        f"pass@{k}": sum(pass_at_k(k, int(c), k) for c in right.sum(dim=1)) / len(groups),
        f"cons@{k}": sum(majority([(s["answer"], s["right"]) for s in group]) for group in groups) / len(groups),
        **{key: sum(s[key] for s in samples) / len(samples) for key in samples[0] if isinstance(samples[0][key], (bool, int, float)) and key != "right"},
        "problems": len(problems), "samples": k, "temperature": temperature}
    return metrics, samples


def final_evaluation(model, tok, cfg, folder):
    """Sampled and greedy results on the held-out problems of cfg.data.task, into FOLDER/eval.json. A toy model is put a tenth as many of
    every other task as well."""
    g, main, results, samples = cfg.grpo, cfg.data.task, read_results(folder), []
    others = [] if cfg.train.init_from or cfg.data.data else [task for task in data.TASKS if task not in (main, "file")]
    for task in [main, *others]:
        problems = data.eval_problems(cfg.data, cfg.data.eval_problems if task == main else max(1, cfg.data.eval_problems // 10), task)
        results[task], found = evaluate(model, tok, problems, cfg.train.eval_samples, g.max_new_tokens, g.temperature, cfg.data)
        samples += found[:100 * cfg.train.eval_samples]
        if task == main:
            results[task]["pass@1_greedy"] = evaluate(model, tok, problems, 1, g.max_new_tokens, 0.0, cfg.data)[0]["pass@1"]
    results.update(compare(samples, tok, cfg))
    with whole_file(os.path.join(folder, "samples.jsonl")) as f:
        f.write("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples).encode())
    with whole_file(os.path.join(folder, "eval.json")) as f:  # last: what it holds is not evaluated again
        f.write(json.dumps(results, indent=1).encode())
    return results[main]


def compare(samples, tok, cfg):
    """How often a general request's answer is preferred to what dev3 said to the same one, ties counting half: by the hidden rule, and by the
    reward model, which may have been talked round where it says more. Nothing where one of the two is missing."""
    dev3, judge = (os.path.join(cfg.train.out_dir, *names) for names in (("dev3", "samples.jsonl"), ("reward_model", "ckpt.pt")))
    mine = [s for s in samples if s["task"] in data.GENERAL]
    if not (mine and os.path.exists(dev3) and os.path.exists(judge)):
        return {}
    with open(dev3, encoding="utf-8") as f:
        theirs = [s for s in map(json.loads, f) if s["task"] in data.GENERAL]
    if [s["prompt"] for s in mine] != [s["prompt"] for s in theirs]:
        return {}
    model = load_model(judge, kind=RewardModel)
    score = lambda group: score_texts(model, tok, [s["prompt"] for s in group], [s["completion"] for s in group])
    wins = lambda mine, theirs: sum((a > b) + 0.5 * (a == b) for a, b in zip(mine, theirs)) / len(mine)
    return {"against dev3": {"preferred": wins([s["liking"] for s in mine], [s["liking"] for s in theirs]), "preferred by the reward model": wins(score(mine), score(theirs))}}


def read_results(folder):
    path = os.path.join(folder, "eval.json")
    if not os.path.exists(path):
        return {}
    return read_json(path)


def results_so_far(out_dir, task):
    """{stage: results} of every stage in `out_dir` that was evaluated on `task`, in the paper's order."""
    found = {name: read_results(os.path.join(out_dir, name)) for name in STAGES}
    return {name: results for name, results in found.items() if task in results}


def percent(key):
    return lambda m: f"{m[key]:.1%}" if key in m else "-"


def tables(results, task):
    """{stage: results by task} -> [(title, head, rows)], each row a list of texts: what a stage does with its task, and with the others."""
    k = max(r[task]["samples"] for r in results.values())
    columns = {
        "pass@1": percent("pass@1"), "95 % interval": lambda m: "{:.1%}-{:.1%}".format(*m["pass@1_ci"]), "greedy": percent("pass@1_greedy"),
        f"pass@{k}": percent(f"pass@{k}"), f"cons@{k}": percent(f"cons@{k}"), "format": percent("format"), "one language": percent("consistency"),
        "length": lambda m: f"{m['length']:.1f}", "rechecks": percent("rechecks"), "cut": percent("truncated")}
    first = [[stage] + [cell(r[task]) for cell in columns.values()] for stage, r in results.items()]
    n = next(iter(results.values()))[task]["problems"]
    out = [(f"{task}: {n} held-out problems, {k} samples of each", ["", *columns], first)]
    others = {t for r in results.values() for t in r if t in data.TASKS and t != task}
    if others:
        get = lambda t, key: lambda r: percent(key)(r.get(t, {}))
        columns = {t: get(t, "pass@1") for t in data.TASKS if t in others - {"chat", "unsafe"}}
        columns |= {"chat": get("chat", "pass@1"), "unsafe declined": get("unsafe", "pass@1"), f"thinks: {task}": get(task, "thinks"), "thinks: unsafe": get("unsafe", "thinks"),
                    "liking": lambda r: f"{r['chat']['liking']:.2f}" if "liking" in r.get("chat", {}) else "-",
                    "preferred to dev3": get("against dev3", "preferred"), "so the reward model": get("against dev3", "preferred by the reward model")}
        out.append(("pass@1 on other tasks, and what people would say", ["", *columns], [[stage] + [cell(r) for cell in columns.values()] for stage, r in results.items()]))
    return out


def print_tables(results, task):
    for title, head, rows in tables(results, task):
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        print("\n" + title)
        for row in (head, *rows):
            print(row[0].ljust(widths[0]) + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:])))
    print()


def run_table(given):
    """`table`: what lies in out_dir, as text and as Markdown."""
    out_dir = given.get("out_dir", TrainConfig.out_dir)
    evaluated = [task for name in STAGES for task in read_results(os.path.join(out_dir, name)) if task in data.TASKS]
    task = given.get("task") or (evaluated or [DataConfig.task])[0]  # a stage's own task comes first
    results = results_so_far(out_dir, task)
    if not results:
        raise BadInput(f"nothing in {out_dir} was evaluated on {task}: run a stage first, or set --out_dir or --task")
    print_tables(results, task)
    for title, head, rows in tables(results, task):
        print(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n")


def plot_curves(folder):
    """curves.png beside metrics.jsonl, if matplotlib happens to be installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    names = [n for n in ("loss", "accuracy", "format", "length", "kl", "entropy") if n in lines[0] and not (n == "loss" and "kl" in lines[0])]
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes[0], names):
        axis.plot([m["step"] for m in lines], [m[name] for m in lines], linewidth=1)
        axis.set(title=name, xlabel="step")
    figure.tight_layout()
    figure.savefig(os.path.join(folder, "curves.png"), dpi=120)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------
# The stages, in the paper's order


def train_base(run):
    """DeepSeek-V3-Base's part: read a corpus of mixed quality, token by token."""
    cfg = run.cfg
    if cfg.train.init_from:
        raise BadInput(f"{run.name} is trained from nothing on the toy corpus, so it does not go with --init_from={cfg.train.init_from}")
    if not data.TASKS[cfg.data.task].in_corpus:
        raise BadInput(f"{run.name} reads a corpus that speaks of {', '.join(t for t in data.TASKS if data.TASKS[t].in_corpus)}; {cfg.data.task} is not among them")
    torch.manual_seed(cfg.train.seed)
    model = GPT(cfg.model).to(run.device)

    def batch(step):
        return data.corpus_batch(cfg.data, run.tok, rng(cfg.train.seed, run.name, step)[0], cfg.train.base_rows, cfg.train.base_length + 1)

    sft_loop(run, model, batch, cfg.train.base_steps, cfg.train.base_lr)
    return model


def train_rl(run):
    """GRPO on the parent's model. R1-Zero: straight on the base, with nothing but rule-based rewards; later stages have more of them."""
    cfg, tok = run.cfg, run.tok
    run.say_memory()
    model = run.parent_model()
    ref = copy.deepcopy(model).requires_grad_(False).to(getattr(torch, cfg.train.ref_dtype)) if cfg.grpo.kl_coef else None
    held_out = data.eval_problems(cfg.data, 100)
    learnt = {"preference": preference(run)} if cfg.rewards.w_preference else {}

    def draw(python):
        return data.draw_problem(cfg.data, python)

    def reward_fn(problems, completions):
        return rewards.score(problems, [data.completion_text(ids, tok, cfg.data) for ids in completions], cfg.rewards, **learnt)

    def check(model):
        metrics, samples = evaluate(model, tok, held_out, 4, cfg.grpo.max_new_tokens, cfg.grpo.temperature, cfg.data)
        tqdm.write(f"held out: pass@1 {metrics['pass@1']:.1%}  format {metrics['format']:.1%}  length {metrics['length']:.1f}   for example:\n")
        tqdm.write("    " + (samples[0]["prompt"] + samples[0]["completion"]).replace("\n", "\n    ") + "\n")

    rl_loop(run, model, ref, draw, reward_fn, check)
    return model


def preference(run):
    """The reward that the reward model gives: (problems, completions) -> its scores."""
    model = load_model(os.path.join(run.cfg.train.out_dir, "reward_model", "ckpt.pt"), run.device, RewardModel)
    return lambda problems, completions: score_texts(model, run.tok, [data.prompt_text(p, run.cfg.data) for p in problems], completions) if problems else []


@torch.no_grad()
def score_texts(model, tok, prompts, completions):
    """The reward model's score of each completion of a prompt, both texts -> list of floats."""
    scores = []
    for i in range(0, len(prompts), 256):
        tokens, lengths = text_batch(tok, zip(prompts[i:i + 256], completions[i:i + 256]), model.cfg.context)
        scores += model(tokens.to(model.value.weight.device), lengths.to(model.value.weight.device)).tolist()
    return scores


def text_batch(tok, texts, context):
    """(prompt, completion) pairs -> right-padded ids (N, T), at most `context` of each, and their lengths (N,)."""
    tokens, mask = data.pad([(tok.encode(prompt + completion) + [tok.end_id])[:context] for prompt, completion in texts], tok.pad_id)
    return tokens, mask.sum(dim=1)


RIGHT = lambda problem, text: rewards.verify(problem, text)[1]
IN_FORMAT = lambda problem, text: rewards.has_format(text)
ONE_LANGUAGE = lambda problem, text: rewards.language_consistency([problem], [text])[0] == 1
NOT_RAMBLING = lambda problem, text: max(Counter(line for line in text.split("\n")).values()) < 3  # no line for the third time


def train_dev1(run):
    """The cold start: the base learns from a few hundred of R1-Zero's right and well-formed traces, those that mix languages least."""
    return train_sft(run, harvest(run, {"right": RIGHT, "in format": IN_FORMAT}, rank=lambda problem, text: rewards.language_consistency([problem], [text])[0]))


def train_dev3(run):
    """Rejection sampling: the base, not dev2, learns from dev2's readable right traces, and from people's replies to general requests."""
    return train_sft(run, harvest(run, {"right": RIGHT, "in format": IN_FORMAT, "in one language": ONE_LANGUAGE, "not rambling": NOT_RAMBLING}, more=general_rows))


def train_distill(run):
    """Distillation: a smaller base learns from R1's samples. Nothing but supervised fine-tuning, as in the paper."""
    return train_sft(run, harvest(run, {"right": RIGHT, "in format": IN_FORMAT}))


def general_rows(cfg, python):
    """People's replies to general requests: (problem, completion) rows."""
    problems = [data.draw_problem(cfg.data, python, python.choice(data.GENERAL)) for _ in range(cfg.train.general_rows)]
    return [(problem, data.tagged(*data.TASKS[problem.task].write(problem, cfg.data, None, python))) for problem in problems]


def train_sft(run, rows):
    """Supervised fine-tuning of the parent's model on (problem, completion) rows."""
    cfg, model = run.cfg, run.parent_model()

    def batch(step):
        return data.sft_batch(rows, run.tok, cfg.data, rng(cfg.train.seed, run.name, step)[0], cfg.train.sft_rows)

    sft_loop(run, model, batch, cfg.train.sft_steps, cfg.train.sft_lr)
    return model


def source_samples(run, tasks=None, held_out=False):
    """Samples of the stage's source on problems that it draws, or on those of the given tasks, for a harvest."""
    cfg = run.cfg
    python, generator = rng(cfg.train.seed, run.name, "harvest", *["held out"] * held_out)
    problems = [data.draw_problem(cfg.data, python, python.choice(tasks) if tasks else None, held_out) for _ in range(cfg.train.harvest_problems)]
    model = load_model(os.path.join(cfg.train.out_dir, run.stage.source, "ckpt.pt"), run.device)
    found = sample_all(model, run.tok, problems, cfg.train.harvest_samples, cfg.data, cfg.grpo.max_new_tokens, cfg.grpo.temperature, generator, f"{run.name} harvest")
    return problems, [[text for _, text, *_ in found[i:i + cfg.train.harvest_samples]] for i in range(0, len(found), cfg.train.harvest_samples)]


def harvest(run, filters, rank=None, more=None):
    """Samples the source stage's model on training problems. Of the completions that pass all `filters` {name: (problem, completion) -> bool}
    each problem gives one: the first, or with a `rank` the highest, and then only the better half of the problems. Returns (problem, completion) rows,
    with those of `more(cfg, rng)`; STAGE/sft.jsonl holds them for people to read, and for a run that is resumed."""
    path = run.path("sft.jsonl")
    if not run.steps_done() or not os.path.exists(path):
        problems, texts = source_samples(run)
        passed, best = Counter(), []
        for problem, said in zip(problems, texts):
            for name, passes in filters.items():
                said = [text for text in said if passes(problem, text)]
                passed[name] += len(said)
            if said:
                best.append((problem, max(said, key=lambda text: rank(problem, text)) if rank else said[0]))
        if not best:
            raise BadInput(f"{run.name}: nothing that {run.stage.source} says is fit to learn from: train it longer, or raise --harvest_problems")
        if rank:
            best = sorted(best, key=lambda row: rank(*row), reverse=True)[:(len(best) + 1) // 2]
        others = more(run.cfg, rng(run.cfg.train.seed, run.name, "more")[0]) if more else []
        counts = "".join(f", {name} {n}" for name, n in passed.items())
        print(f"{run.name}: sampled {sum(map(len, texts))} from {run.stage.source}{counts}, kept {len(best)} of {len(problems)} problems"
              f"{f', and {len(others)} written by people' if others else ''}, in {path}")
        write_lines(path, [{"problem": asdict(problem), "prompt": data.prompt_text(problem, run.cfg.data), "completion": text} for problem, text in best + others])
    return [(as_problem(line["problem"]), line["completion"]) for line in read_lines(path)]


def as_problem(fields):
    return data.Problem(**{**fields, "numbers": tuple(fields["numbers"])})


def write_lines(path, lines):
    with whole_file(path) as f:
        f.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def train_reward_model(run):
    """Learns what people like from which of two of dev3's answers they preferred. What they go by is hidden from it."""
    cfg, path = run.cfg, run.path("pairs.jsonl")
    if not run.steps_done() or not os.path.exists(path):
        write_lines(path, [pair for held_out in (False, True) for pair in ask_people(run, held_out)])
    pairs = [pair for pair in read_lines(path) if not pair["held_out"]]
    if not pairs:
        raise BadInput(f"{run.name}: {run.stage.source} gives no two answers that people would tell apart: raise --harvest_problems")
    model = RewardModel(run.parent_model()).to(run.device)

    def batch(step):
        python = rng(cfg.train.seed, run.name, step)[0]
        chosen = [python.choice(pairs) for _ in range(cfg.train.sft_rows)]
        return text_batch(run.tok, [(p["prompt"], p[side]) for side in ("preferred", "other") for p in chosen], cfg.model.context)

    sft_loop(run, model, batch, cfg.train.sft_steps, cfg.train.sft_lr, pair_loss)
    return model


def judge_pairs(run, model):
    """On how many held-out pairs the reward model agrees with people, and with the rule that they try to follow, into STAGE/eval.json."""
    pairs = read_lines(run.path("pairs.jsonl"))
    held_out = [pair for pair in pairs if pair["held_out"]]
    score = lambda side: score_texts(model, run.tok, [p["prompt"] for p in held_out], [p[side] for p in held_out])
    agrees = [a > b for a, b in zip(score("preferred"), score("other"))]
    people, rule = (sum(verdicts) / max(1, len(held_out)) for verdicts in (agrees, [a == p["as_the_rule"] for a, p in zip(agrees, held_out)]))
    print(f"{run.name}: of {len(held_out)} held-out pairs it agrees with people on {people:.1%}, and with the rule that they try to follow on {rule:.1%}")
    with whole_file(run.path("eval.json")) as f:
        f.write(json.dumps({"pairs": {"train": len(pairs) - len(held_out), "held out": len(held_out), "agrees with people": people,
                                      "agrees with the hidden rule": rule}}, indent=1).encode())


def ask_people(run, held_out):
    """Pairs of the source's answers to general requests, as people preferred them."""
    problems, texts = source_samples(run, data.GENERAL, held_out)
    order, own = sorted(range(len(problems)), key=lambda i: problems[i].question), [list(said) for said in texts]
    for i, j in zip(order, order[1:] + order[:1]):  # two answers to each are those of a similar request: there must be something off the point to dislike
        texts[i][1::4] = own[j][1::4]
    answers = [[rewards.split_completion(text)[1] for text in said] for said in texts]
    pairs = data.preference_pairs(problems, answers, rng(run.cfg.train.seed, run.name, "people", held_out)[0], run.cfg.train.noise)
    liking = lambda i, j: data.hidden_rule(problems[i], answers[i][j])
    return [{"held_out": held_out, "prompt": data.prompt_text(problems[i], run.cfg.data), "preferred": texts[i][a], "other": texts[i][b],
             "as_the_rule": liking(i, a) > liking(i, b)} for i, a, b in pairs]


@dataclass(frozen=True)
class Stage:
    train: callable   # (run) -> trained model
    parent: str       # the stage whose checkpoint it starts from
    source: str       # the stage whose samples, or whose scores, it learns from
    steps: str        # the setting that says how long it is
    overrides: dict   # its own defaults
    shaped_by: list   # the settings that may not change once it has begun


def names(cls, *left_out):
    return [f.name for f in fields(cls) if f.name not in left_out]


REAL_DEFAULTS = {  # with --init_from: the paper's kind of settings, and sizes that one GPU or a patient CPU can carry
    "template": "base", "context": 2048, "max_new_tokens": 512, "rl_lr": 1e-6, "optimizer": "adamw", "rl_steps": 200, "rl_hold": 10**6,
    "eval_problems": 100, "eval_samples": 4,
}
TASK_DEFAULTS = {  # shorter documents and completions: more and smaller steps
    "arithmetic": {"base_steps": 2000, "base_rows": 8, "base_length": 256, "rl_steps": 150},
    "logic": {"base_steps": 2000, "base_rows": 8, "base_length": 256},
}
VARIANTS = {  # arXiv 2503.20783 and 2503.14476
    "dr_grpo": {"adv_norm": "none", "loss_norm": "constant"},
    "dapo": {"clip_high": 0.28, "loss_norm": "token", "resample_equal": 2, "kl_coef": 0.0, "mask_truncated": True},
}
WORLD = names(DataConfig, "eval_problems") + ["seed"]
BASE = names(GPTConfig) + WORLD + ["init_from", "optimizer", "base_lr", "base_rows", "base_length", "base_steps"]
RL = WORLD + ["init_from", "optimizer", "rl_lr", "rl_warmup", "rl_hold"] + names(RewardConfig) + names(GRPOConfig, "micro_tokens")
SFT = WORLD + ["init_from", "optimizer", "harvest_problems", "harvest_samples", "general_rows", "sft_steps", "sft_lr", "sft_rows", "max_new_tokens", "temperature"]
SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "mlp_dim": 128}
SCENARIOS = "task:2,chat:1,unsafe:1"
STAGES = {
    "base": Stage(train_base, None, None, "base_steps", {}, BASE),
    "zero": Stage(train_rl, "base", None, "rl_steps", {}, RL),
    "dev1": Stage(train_dev1, "base", "zero", "sft_steps", {}, SFT),
    "dev2": Stage(train_rl, "dev1", None, "rl_steps", {"w_language": 0.5, "rl_steps": 30, "rl_lr": 5e-4}, RL),
    "dev3": Stage(train_dev3, "base", "dev2", "sft_steps", {"harvest_problems": 1600, "harvest_samples": 2, "general_rows": 3000, "sft_steps": 500, "sft_lr": 2e-3, "sft_rows": 32}, SFT),
    "reward_model": Stage(train_reward_model, "dev3", "dev3", "sft_steps", {"harvest_problems": 1500, "sft_steps": 300, "sft_rows": 32}, SFT + ["noise"]),
    "r1": Stage(train_rl, "dev3", "reward_model", "rl_steps", {"mix": SCENARIOS, "w_language": 0.5, "w_preference": 0.5, "w_harmless": 1.0, "rl_steps": 30, "rl_lr": 5e-4}, RL),
    "small_base": Stage(train_base, None, None, "base_steps", SMALL, BASE),
    "distill": Stage(train_distill, "small_base", "r1", "sft_steps",
                     {**SMALL, "mix": "task:4,chat:1,unsafe:1", "harvest_problems": 2400, "harvest_samples": 1, "sft_steps": 600, "sft_lr": 2e-3, "sft_rows": 32}, SFT),
    "small_zero": Stage(train_rl, "small_base", None, "rl_steps", SMALL, RL),
    # Two experiments beside the pipeline: what dev2 is without its language reward, and R1-Zero with an emoji at the end of each step. The latter does not divide
    # by the std: in groups that are right throughout nothing but a missing emoji tells samples apart, and would be blown up to the size of a wrong answer.
    "dev2_free": Stage(train_rl, "dev1", None, "rl_steps", {"rl_steps": 30, "rl_lr": 5e-4}, RL),
    "zero_emoji": Stage(train_rl, "base", None, "rl_steps", {"w_emoji": 0.2, "adv_norm": "none", "rl_steps": 80}, RL),
}


def with_what_they_need(stages):
    """The given stages and all that they need, in the order in which they run."""
    needed = set(stages)
    for name in reversed(STAGES):  # whatever a stage needs stands above it in the table
        if name in needed:
            needed |= {other for other in (STAGES[name].parent, STAGES[name].source) if other}
    return [name for name in STAGES if name in needed]


def run_stage(name, given):
    """Runs a stage if it is not done, and evaluates it if it was not; returns its Run."""
    stage, run = STAGES[name], Run(name, given)
    steps, model = getattr(run.cfg.train, stage.steps), None
    missing = ("pairs" if name == "reward_model" else run.cfg.data.task) not in read_results(run.dir)
    if name == "base" and run.cfg.train.init_from:  # somebody else has trained it
        print(f"base: {run.cfg.train.init_from}")
        if missing:
            run.say_memory()
            model = GPT.from_pretrained(run.cfg.train.init_from, run.cfg.model.context, device=run.device)
    elif run.steps_done() >= steps:
        print(f"{name}: done ({run.path('ckpt.pt')}, {run.steps_done()} steps)")
    else:
        print(f"{name}: {steps} steps on {run.device}, into {run.dir}")
        with run.until_interrupted():
            model = stage.train(run)
        plot_curves(run.dir)
    if name == "reward_model" and (model is not None or missing):
        judge_pairs(run, model or load_model(run.path("ckpt.pt"), run.device, RewardModel))
    elif model is not None or missing:
        final_evaluation(model or load_model(run.path("ckpt.pt"), run.device), run.tok, run.cfg, run.dir)
    return run


def run_eval(given):
    """`eval`: the final evaluation of any checkpoint, into the folder it lies in."""
    path, model, tok, cfg = open_checkpoint(given)
    final_evaluation(model, tok, cfg, os.path.dirname(path))
    print_tables({path: read_results(os.path.dirname(path))}, cfg.data.task)


def run_export(given):
    """`export`: a checkpoint as a Hugging Face folder, which transformers, vLLM and TRL open."""
    path, model, tok, cfg = open_checkpoint(given)
    if not cfg.train.export_dir:
        raise BadInput("export needs --export_dir=FOLDER to write to")
    try:
        save_pretrained(model, cfg.train.export_dir, cfg.train.init_from, getattr(torch, cfg.train.export_dtype))
        if not cfg.train.init_from:
            tok.save(cfg.train.export_dir)
    except OSError as e:
        raise BadInput(f"cannot write to {cfg.train.export_dir} ({e.strerror}): choose another --export_dir") from None
    print(f"{path}: written to {cfg.train.export_dir} as {cfg.train.export_dtype}")


def open_checkpoint(given):
    """(path, model, tokenizer, config) of --ckpt, with the settings that it was trained with unless others are given."""
    path = given.get("ckpt") or os.path.join(given.get("out_dir", TrainConfig.out_dir), "zero", "ckpt.pt")
    state = load_checkpoint(path)
    if state.get("stage") == "reward_model":
        raise BadInput(f"{path} is a reward model: it judges answers and gives none")
    cfg = Config().with_settings({**state.get("settings", {}), **given})
    for group in ("data", "rewards", "grpo", "train"):
        getattr(cfg, group).check()
    return path, model_of(state, path), data.load_tokenizer(cfg.train.init_from), cfg


def say_what_next(run, results):
    """Where everything lies, and what a newcomer may want to do with it."""
    out_dir, world = run.cfg.train.out_dir, "" if run.cfg.data.task == DataConfig.task else f" --task={run.cfg.data.task}"
    print(f"{run.dir} holds the checkpoint, the log (metrics.jsonl), the evaluation (eval.json) and what was said (samples.jsonl). Next:\n"
          f"    python sample.py --ckpt={run.path('ckpt.pt')}" + (f" --vs={os.path.join(out_dir, 'base', 'ckpt.pt')}" if "base" in results and run.name != "base" else ""))
    if "r1" not in results and not run.cfg.train.init_from:
        print(f"    python train.py r1 distill small_zero{world} --seed={run.cfg.train.seed} --out_dir={out_dir}")


COMMANDS = {"eval": run_eval, "export": run_export, "table": run_table}


def main(argv):
    words, given = parse(argv)
    try:
        if words[0] in COMMANDS:
            return COMMANDS[words[0]](given)
        for name in with_what_they_need(words):
            run = run_stage(name, given)
        results = results_so_far(run.cfg.train.out_dir, run.cfg.data.task)
        print_tables(results, run.cfg.data.task)
        say_what_next(run, results)
    except BadInput as e:
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        print(f"train.py: {e.filename or given.get('out_dir', TrainConfig.out_dir)}: {e.strerror or e}; the last checkpoint is as it was", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        print(f"train.py: stopped; {e or 'what is saved stays'}. The same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
