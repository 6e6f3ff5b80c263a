"""The DeepSeek-R1 pipeline on a laptop: the stages, and how they run.

    base ---- SFT: traces of any source, --traces=FILE --> sft           zero may start from it
    base ---- GRPO: accuracy, format --------------------> zero          DeepSeek-R1-Zero
    base ---- SFT: zero's most readable right traces ----> dev1          cold start
    dev1 ---- GRPO: + one language ----------------------> dev2          reasoning RL
    base ---- SFT: dev2's right traces, other replies ---> dev3          rejection sampling
    dev3 ---- Bradley-Terry on pairs of its answers -----> reward_model
    dev3 ---- GRPO: + preference, harmlessness ----------> r1            RL for all scenarios
    small_base - SFT: r1's samples ----------------------> distill       distillation, beside it
    small_base - GRPO: accuracy, format -----------------> small_zero    the small model, RL alone

    python train.py                         # base, then zero, then a table that compares them
    python train.py r1 distill small_zero --task=all --out_dir=out-all   # all of R1
    python train.py table                   # the table again
    python train.py --task=logic --out_dir=out-logic      # or arithmetic, or code
    python train.py --init_from=FOLDER      # GRPO on a real model: a Hugging Face folder
    python train.py sft zero --init_from=FOLDER --traces=FILE.jsonl --lora_rank=16
    python train.py eval --ckpt=out/zero/ckpt.pt
    python train.py export --ckpt=out/zero/ckpt.pt --export_dir=FOLDER

A stage writes ckpt.pt, metrics.jsonl, rollouts.jsonl, eval.json, samples.jsonl into out_dir/STAGE.
The same command again resumes a stage that was cut short; what is finished is not run again.
"""
import copy
import ctypes
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace

import torch
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
    add_lora,
    any_terminal,
    apply_gradients,
    config_from_hf,
    from_pretrained,
    generators,
    load_checkpoint,
    load_model,
    make_optimizers,
    merged_state,
    opt,
    ramp,
    read_json,
    reading,
    same_weights,
    save_checkpoint,
    save_pretrained,
    set_lr,
    token_logps,
    validate,
)
from rewards import Environment, RewardConfig, RewardModel
from sample import REAL_DEFAULTS, SampleConfig, read_lines, read_results, write_json, write_lines

# ------------------------------------------------------------------------------------------------
# Settings


@dataclass
class TrainConfig:
    base_steps: int = opt(1500, "optimiser steps of next-token training", least=1)
    base_lr: float = opt(5e-3, "its peak learning rate", above=0, most=1)
    base_rows: int = opt(12, "rows of packed documents per step", least=1)
    base_length: int = opt(352, "tokens per row", least=1)
    base_optimizer: str = opt("muon", "of supervised training: adamw, or muon (Muon for matrices, "
                              "AdamW for the rest)", choices=("muon", "adamw"))
    base: str = opt("", "checkpoint of a base to start from; none = out_dir/base/ckpt.pt, trained "
                    "if it is not there")
    sft_steps: int = opt(60, "optimiser steps of fine-tuning, and of the reward model", least=1)
    sft_lr: float = opt(1e-3, "its peak learning rate", above=0, most=1)
    sft_rows: int = opt(24, "traces per step; pairs for the reward model", least=1)
    source_problems: int = opt(400, "problems sampled from the stage it learns from", least=1)
    source_samples: int = opt(8, "samples of each", least=1)
    traces: str = opt("", "JSONL file of prompts and completions, or of chat messages, for `sft`; "
                      "zero then starts from sft")
    lora_rank: int = opt(0, "rank of LoRA adapters (all else is frozen); 0: train all weights",
                         least=0)
    lora_alpha: float = opt(32.0, "... scaled by lora_alpha / lora_rank", above=0, most=1e6)
    general_replies: int = opt(600, "scripted replies to general requests, for dev3", least=1)
    label_noise: float = opt(0.1, "share of preferences that are wrong where gold rewards "
                             "differ by 1; by more: fewer", least=0, most=0.5)
    autocast: str = opt("auto", "training's matrix products in bfloat16; auto: on GPUs that "
                        "compute in it", choices=("auto", "on", "off"))
    ref_dtype: str = opt("auto", "weights of the reference; auto: bfloat16 on GPUs that compute "
                         "in it", choices=("auto", "float32", "bfloat16"))
    checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory")
    compile: bool = opt(False, "torch.compile the transformer for training")
    save_every: int = opt(20, "GRPO steps between checkpoints; supervised: ten times that", least=1)
    max_skipped: int = opt(5, "steps in a row with non-finite gradients that end a run", least=1)
    export_dir: str = opt("", "folder that `export` writes")
    export_dtype: str = opt("auto", "dtype of exported weights; auto: the one for sampling",
                            choices=("auto", "float32", "bfloat16", "float16"))


@dataclass
class Config(sample.Config):
    model: GPTConfig = field(default_factory=GPTConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


LORA_DEFAULTS = {"rl_lr": 1e-5, "sft_lr": 1e-4}  # with --lora_rank: adapters need 10 times the rate
TASK_DEFAULTS = {  # what suits a task better; short documents: more and smaller steps
    "arithmetic": {"base_steps": 2000, "base_rows": 8, "base_length": 256, "rl_steps": 150},
    "logic": {"base_steps": 2000, "base_rows": 8, "base_length": 256},
    "all": {"base_steps": 2400, "rl_steps": 120, "rl_decay": 0.4, "prompts_per_step": 24,
            "source_problems": 800, "sft_steps": 100, "eval_problems": 100},
}


def stage_config(stage, given, tok):
    """A stage's Config: defaults < its task's, or a real model's < the stage's < the command line,
    `given`. Raises UserError on bad values."""
    folder = given.get("init_from", "")
    data.refuse_two_tasks(given)
    defaults = REAL_DEFAULTS if folder else TASK_DEFAULTS.get(given.get("task"), {})
    if folder and given.get("lora_rank"):
        defaults = REAL_DEFAULTS | LORA_DEFAULTS
    cfg = Config.of({"vocab_size": tok.n_vocab, **defaults, **stage.settings, **given})
    if cfg.train.lora_rank and cfg.grpo.ref_every:
        raise UserError(f"ref_every={cfg.grpo.ref_every}: with --lora_rank the reference is the "
                        f"model without its adapters, always")
    if folder and cfg.train.base:
        raise UserError(f"--init_from={folder} and --base={cfg.train.base}: leave out one of them")
    split = {os.path.realpath(path) for path in (cfg.data.data, cfg.data.eval_data)}
    if cfg.data.eval_data and len(split) == 1:
        raise UserError(f"--data and --eval_data={cfg.data.eval_data} are one file: leave out the "
                        f"latter, and a part of it is held out")
    if folder:
        model = config_from_hf(read_json(os.path.join(folder, "config.json")))
        cfg.model = replace(model, context=min(model.context, cfg.model.context))
        refuse_shape({**given, "context": cfg.model.context}, cfg.model, folder)
    elif cfg.data.data:
        raise UserError("--data needs --init_from=FOLDER: the toy base cannot read such questions")
    elif cfg.train.base_length > cfg.model.context:
        raise UserError(f"base_length={cfg.train.base_length} does not fit the context of "
                        f"{cfg.model.context}: lower it or raise --context")
    if cfg.train.base and "n_layer" not in stage.settings:  # small models have a base of their own
        state = load_checkpoint(cfg.train.base)
        if state.get("stage") == "reward_model":
            raise UserError(f"--base={cfg.train.base} is a reward model")
        keys = [*CORPUS, "init_from"]  # the same corpus, the same tokenizer
        refuse_other_settings(cfg, state, keys, cfg.train.base, "choose another --base")
        with reading(cfg.train.base, "a checkpoint of this program"):
            cfg.model = GPTConfig(**state["model_config"])
            validate(cfg.model)
        refuse_shape(given, cfg.model, cfg.train.base)
    if cfg.model.vocab_size < tok.n_vocab:
        raise UserError(f"vocab_size={cfg.model.vocab_size}: the tokenizer has {tok.n_vocab} ids")
    return cfg


def refuse_shape(given, model, path):
    """Raises UserError naming given settings that contradict the shape of the model at `path`."""
    shape = [key for key, value in vars(model).items() if given.get(key, value) != value]
    if shape:
        raise UserError(f"{', '.join(shape)} cannot be set: {path} has its own shape")


def refuse_other_settings(cfg, state, keys, path, advice):
    """Raises UserError naming those of `keys` whose values differ from a checkpoint's `state`. Two
    spellings of the same path do not differ."""
    now, then = cfg.settings(), {**Config().settings(), **state.get("settings", {})}
    other = [f"{key}={then[key]}, not {now[key]}" for key in keys if now[key] != then[key]
             and not (key in FILES and now[key] and then[key]
                      and os.path.realpath(now[key]) == os.path.realpath(then[key]))]
    if other:
        raise UserError(f"{path} was trained with {'; '.join(other)}: {advice}")


def longest_prompt(cfg, tok):
    """(length of the longest prompt, length of the prefix that all prompts share), in tokens.
    Raises UserError if a completion might not fit after a prompt."""
    rng, _ = generators("longest prompt")
    problems = [*data.eval_problems(cfg.data, 50),
                *(data.draw_problem(cfg.data, rng) for _ in range(200))]
    prompts = [data.prompt_ids(problem, tok, cfg.data) for problem in problems]
    others = () if cfg.sample.init_from else [task for task in data.TASKS if task != "file"]
    asked = [data.prompt_ids(problem, tok, cfg.data)  # in the final evaluation
             for task in others for problem in data.eval_problems(cfg.data, 50, task)]
    longest, new = max(map(len, prompts + asked)), cfg.grpo.max_new_tokens
    if longest + new > cfg.model.context:
        raise UserError(f"a prompt of {longest} tokens + max_new_tokens={new} do not fit "
                        f"context={cfg.model.context}")
    return longest, len(os.path.commonprefix(prompts))


def names(cls, *left_out):
    return [f.name for f in fields(cls) if f.name not in left_out]


# What a stage has learnt from. With another value of these it is not resumed: the result would be a
# mixture of two runs. A finished one is built upon if those in INHERITED and READING match.
CORPUS = ["task", "n_numbers", "max_number", "ops"]
READING = ["base_steps", "base_lr", "base_rows", "base_length"]
BASE = ["init_from", "seed", *CORPUS, "base_optimizer", *names(GPTConfig)]
INHERITED = [*BASE, *names(DataConfig, "eval_problems", "mix", *CORPUS), "base", "traces",
             "lora_rank", "lora_alpha"]  # with another base it is another run
ROUNDING = ["autocast", "sample_dtype", "matmul"]
RESUME_KEYS = {  # what may not change once a stage has begun, by its kind
    "base": [*BASE, *READING, "autocast", "matmul"],
    "rl": [*INHERITED, "mix", *names(RewardConfig),
           *names(GRPOConfig, "rl_steps", "eval_every", "micro_tokens"), *ROUNDING, "ref_dtype"],
    "sft": [*INHERITED, "mix", "source_problems", "source_samples", "max_new_tokens", "temperature",
            "sft_steps", "sft_lr", "sft_rows", "general_replies", "label_noise", *ROUNDING],
}
FILES = ("init_from", "base", "data", "eval_data", "traces")

# ------------------------------------------------------------------------------------------------
# A stage's folder

WIDTHS = {"cut": 4, "grad": 7, "loss": 7}  # of the log's columns, least ones; else 5


def handle_ctrl_c(handler):
    with suppress(ValueError):  # in the main thread; elsewhere Python allows no handlers
        signal.signal(signal.SIGINT, handler)


class Run:
    """One stage under way: its settings, its folder, and how it resumes, logs, saves and stops."""

    def __init__(self, name, given, named=True):
        """`named`: whether the command line names the stage, or only others need it. Raises
        UserError if what was trained here before contradicts the settings."""
        self.name, self.stage = name, stage_of(name, given)
        self.tok = data.load_tokenizer(given.get("init_from", ""))
        self.cfg = cfg = stage_config(self.stage, given, self.tok)
        self.seed, self.device = cfg.sample.seed, sample.find_device(cfg.sample.device)
        settings = cfg.settings()
        self.steps = settings[f"{self.stage.kind}_steps"]
        self.seconds, self.skipped, self.rows, self.stopping = 0.0, 0, 0, False
        self.files = {key: sample.checksum(settings[key]) for key in ("data", "eval_data", "traces")
                      if os.path.isfile(settings[key])}
        self.dir, saved = os.path.join(cfg.sample.out_dir, name), {}
        if os.path.exists(self.path("ckpt.pt")):
            saved = load_checkpoint(self.path("ckpt.pt"))
        # Of what was trained before: its steps, its settings; when it began, and ended.
        self.done, self.then = saved.get("step", 0), saved.get("settings", {})
        self.began, self.ended = saved.get("began", math.inf), saved.get("ended", 0.0)
        self.set_rounding()
        self.origin, elsewhere = None, cfg.sample.init_from or cfg.train.base
        if name == "base" and elsewhere:  # trained elsewhere: where, and when that ended
            if saved and not os.path.samefile(elsewhere, self.path("ckpt.pt")):
                raise UserError(f"{self.dir} holds a base that was trained here: leave out --base "
                                f"or --init_from, or choose another --out_dir")
            if cfg.train.base:
                self.ended = load_checkpoint(elsewhere).get("ended", 0.0)
            self.steps, self.origin = self.done, [os.path.realpath(elsewhere), self.ended]
        elif saved:
            self.check_saved(saved, named)

    def set_rounding(self):
        """What "auto" means for sampling's dtype. Checkpoints record that, and the library for
        matrix products: RL moves weights by less than bfloat16 can represent, so a resumed run and
        all later sampling keep both."""
        cfg = self.cfg.sample
        for key in ("sample_dtype", "matmul"):
            if getattr(cfg, key) == "auto":
                setattr(cfg, key, self.then.get(key, "auto"))
        on_folder = cfg.init_from and self.stage.parent in (None, "base")
        if self.cfg.train.lora_rank and not on_folder:
            cfg.sample_dtype = "float32"  # that of the frozen weights, see `load`
        self.sample_dtype = sample.sampling_dtype(cfg)
        cfg.sample_dtype = str(self.sample_dtype).removeprefix("torch.")

    def check_saved(self, saved, named):
        """Raises UserError if the checkpoint in this folder is from other settings or files."""
        if "optimizers" not in saved or saved.get("stage") != self.name:
            raise UserError(f"{self.path('ckpt.pt')} is not a checkpoint of {self.name}: move it "
                            f"away")
        kind, advice = self.stage.kind, "delete it or choose another --out_dir"
        keys = RESUME_KEYS[kind]
        if not named and self.done >= self.then.get(f"{kind}_steps", math.inf):
            # Finished, and needed only by others: --rl_lr, say, is meant for those.
            self.steps, keys = self.done, [key for key in keys if key in INHERITED + READING]
        refuse_other_settings(self.cfg, saved, keys, self.dir, advice)
        for key, checksum in self.files.items():
            if key in keys and saved.get("files", {}).get(key, checksum) != checksum:
                raise UserError(f"{self.dir} has learnt from other contents of "
                                f"{self.cfg.settings()[key]}: {advice}")

    def path(self, file):
        return os.path.join(self.dir, file)

    def resume(self, model, optimizers, ref=None):
        """Restores the checkpoint -> its step, 0 without one. Removes later steps from the logs,
        since they will be run again."""
        step = self.done
        if step:
            saved = load_checkpoint(self.path("ckpt.pt"))
            if saved["step"] != step:
                raise UserError(f"another run has trained {self.dir} meanwhile: start again")
            trained = saved.get("trained")  # with adapters: beside the weights of the parent
            model.load_state_dict(trained or saved["model"], strict=not trained)
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            if ref is not None and saved["ref"]:
                ref.load_state_dict(saved["ref"])
            self.seconds = saved["seconds"]
            print(f"{self.name}: resuming at step {step}")
        for path in self.path("metrics.jsonl"), self.path("rollouts.jsonl"):
            if os.path.exists(path):
                write_lines(path, [line for line in read_lines(path)
                                   if type(line.get("step")) is int and line["step"] <= step])
        with open(self.path("metrics.jsonl"), "ab") as f:
            self.log_size = f.tell()
        handle_ctrl_c(self.stop_after_step)  # until now Ctrl-C ended the run at once
        return step

    def load(self, stage, cls=GPT):
        """The model of a stage; for `base` with --init_from, the real model: in the dtype for
        sampling if --lora_rank freezes its weights, else in fp32. Weights with adapters merged in
        stay in fp32: in bfloat16, small updates would vanish."""
        real, out_dir = self.cfg.sample.init_from, self.cfg.sample.out_dir
        if stage == "base" and real:
            dtype = self.sample_dtype if self.cfg.train.lora_rank else torch.float32
            return from_pretrained(real, self.cfg.model.context, dtype, self.device)
        base = self.cfg.train.base if stage == "base" else ""
        return load_model(base or os.path.join(out_dir, stage, "ckpt.pt"), self.device, cls)

    def settings_for(self, stage):
        """The settings to sample from a finished stage with."""
        merged = self.cfg.train.lora_rank and stage != "base"
        changes = {"sample_dtype": "float32"} if merged else {}
        return replace(self.cfg, sample=replace(self.cfg.sample, **changes))

    def set_up(self, model, adapters=True):
        """How the GPT computes, and with --lora_rank what of it is trained."""
        train = self.cfg.train
        if train.lora_rank and adapters and self.stage.kind != "base":
            _, generator = generators(self.seed, self.name, "adapters")
            add_lora(model, train.lora_rank, train.lora_alpha, generator)
        model.autocast = sample.use_bf16(train.autocast, self.device)
        model.checkpointing = train.checkpointing
        if train.compile:
            model.compiled_trunk = torch.compile(model.trunk, dynamic=True)
            tokens = torch.zeros(2, 4, dtype=torch.long, device=self.device)
            trained = any(p.requires_grad for p in model.parameters())
            with reading("--compile=true", "possible here"), torch.set_grad_enabled(trained):
                model.hidden(tokens[:, :-1])  # it compiles when it is first called

    def append(self, file, values):
        """One JSON object as a line of a log; what is not finite becomes null."""
        def plain(x):
            if isinstance(x, dict):
                return {key: plain(value) for key, value in x.items()}
            if isinstance(x, float):
                return round(x, 6) if math.isfinite(x) else None
            return x

        with open(self.path(file), "a", encoding="utf-8") as f:
            f.write(json.dumps(plain(values), ensure_ascii=False) + "\n")

    def log(self, metrics, row=None):
        """A line of metrics.jsonl and, if there is a row {column: text}, one on the terminal.
        Raises UserError after max_skipped steps in a row without finite gradients."""
        path = self.path("metrics.jsonl")
        if os.path.getsize(path) != self.log_size:  # not as this run left it
            raise UserError(f"another run writes to {self.dir}, too: this one stops")
        self.append("metrics.jsonl", metrics)
        self.log_size = os.path.getsize(path)
        if row:
            widths = [max(len(name), WIDTHS.get(name, 5)) for name in row]
            widths[0] = 2 + 2 * len(str(self.steps))
            for line in [row.values()] if self.rows % 20 else [row, row.values()]:
                tqdm.write(" ".join(map(str.rjust, line, widths)))
            self.rows += 1
        self.skipped = self.skipped + 1 if metrics["skipped"] == 1 else 0
        if self.skipped >= self.cfg.train.max_skipped:
            kept = self.path("ckpt.pt")
            kept = f"{kept} is what was reached; to" if os.path.exists(kept) else "To"
            raise UserError(f"{self.name}: the gradients of {self.skipped} steps in a row were not "
                            f"finite. {kept} begin anew, lower the learning rate and choose "
                            f"another --out_dir")

    def end_step(self, step, steps, model, optimizers, ref=None):
        every = self.cfg.train.save_every * (1 if self.stage.kind == "rl" else 10)
        if step % every == 0 or step == steps or self.stopping:
            self.ended = time.time()
            save_checkpoint(self.path("ckpt.pt"), {
                "stage": self.name, "step": step, "seconds": self.seconds,
                "began": self.began, "ended": self.ended, "files": self.files,
                "settings": self.cfg.settings(), "model_config": asdict(model.cfg),
                "model": merged_state(model), "optimizers": [o.state_dict() for o in optimizers],
                "trained": self.cfg.train.lora_rank and {
                    name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
                "ref": ref.state_dict() if ref is not None else None})
        if self.stopping:
            raise KeyboardInterrupt(f"{self.name} is saved at step {step} of {steps}")

    def stop_after_step(self, *_):
        """What a first Ctrl-C does; a second one ends the run at once."""
        handle_ctrl_c(signal.default_int_handler)
        self.stopping = True
        tqdm.write("stopping after this step; Ctrl-C again stops at once")

    def evaluate(self, model):
        """A short evaluation on held-out problems, with one example to look at."""
        problems, temperature = data.eval_problems(self.cfg.data, 100), self.cfg.grpo.temperature
        found, samples = sample.evaluate(model, self.tok, problems, 4, self.cfg, temperature)
        tqdm.write(f"held out: pass@1 {found['pass@1']:.1%}, format {found['format']:.1%}, "
                   f"length {found['length']:.1f}; for example:\n")
        example = samples[0]["prompt"] + samples[0]["completion"]
        tqdm.write(textwrap.indent(sample.printable(example), "    ") + "\n")
        self.rows = 0  # the header comes again


# ------------------------------------------------------------------------------------------------
# The supervised loop


def next_token_loss(model, tokens, mask):
    """Cross-entropy of the tokens of ids (N, T) that the mask (N, T) marks as to be learnt."""
    return -token_logps(model, tokens, mask=mask[:, 1:]).sum() / mask[:, 1:].sum()


def pair_loss(model, tokens, lengths):
    """Bradley-Terry on ids (2N, T): N preferred texts, then the others in the same order."""
    return rewards.bradley_terry_loss(*model(tokens, lengths).chunk(2))


def supervise(run, model, batch_fn, lr, loss_fn=next_token_loss):
    """Minimises `loss_fn(model, *batch_fn(rng))` over the run's steps, and saves."""
    cfg, steps = run.cfg.train, run.steps
    run.set_up(getattr(model, "gpt", model))
    optimizers = make_optimizers(model, lr, cfg.base_optimizer)
    start, losses = run.resume(model, optimizers), []
    for step in tqdm(range(start, steps), run.name, steps, initial=start, disable=None):
        t0 = time.time()
        set_lr(optimizers, lr * ramp(step, steps, min(50, 0.4 * steps), 0.6))
        rng, _ = generators(run.seed, run.name, step)
        tokens, counted = (x.to(run.device) for x in batch_fn(rng))  # counted: mask or lengths
        loss = loss_fn(model, tokens, counted)
        loss.backward()
        grad_norm, skipped = apply_gradients(model, optimizers, 1.0)
        losses.append(loss.item())
        took, n_tokens, row = time.time() - t0, int(counted.sum()), None
        run.seconds += took
        if (step + 1) % 50 == 0 or step + 1 == steps:
            row = {"step": f"{step + 1}/{steps}", "loss": f"{sum(losses) / len(losses):.4f}",
                   "grad": f"{grad_norm:.2f}", "tok/s": f"{n_tokens / took:.0f}",
                   "sec": f"{run.seconds:.0f}"}
            losses.clear()
        run.log({"step": step + 1, "loss": loss.item(), "grad_norm": grad_norm, "skipped": skipped,
                 "tokens": n_tokens, "seconds": run.seconds}, row)
        run.end_step(step + 1, steps, model, optimizers)


# ------------------------------------------------------------------------------------------------
# The stages: functions of a Run, and their table


def train_base(run):
    """DeepSeek-V3-Base's part: read a corpus of mixed quality, token by token."""
    cfg = run.cfg
    known = [name for name, task in data.TASKS.items() if task.in_corpus]
    if not set(cfg.data.tasks()) <= set(known):
        raise UserError(f"the corpus is about {', '.join(known)}; {cfg.data.task} is not among "
                        f"them")
    rng, _ = generators(run.seed, run.name, "lengths")
    lengths = [len(run.tok.encode("".join(data.document(cfg.data, rng)))) for _ in range(300)]
    too_long = sum(length > cfg.train.base_length for length in lengths) / len(lengths)
    if too_long > 0.01:
        print(f"{run.name}: {too_long:.0%} of the documents, the longest, do not fit "
              f"base_length={cfg.train.base_length} and are left out")
    torch.manual_seed(run.seed)
    model = GPT(cfg.model).to(run.device)

    def batch(rng):
        rows, length = cfg.train.base_rows, cfg.train.base_length + 1
        return data.corpus_batch(cfg.data, run.tok, rng, rows, length)

    supervise(run, model, batch, cfg.train.base_lr)


def judged(cfg):
    """Whether a reward model scores answers: those to general requests."""
    return bool(cfg.rewards.w_preference and set(cfg.data.shares()) & set(data.GENERAL))


def train_rl(run):
    """GRPO on the parent's model. R1-Zero is that on the base, with only rules as rewards."""
    cfg, ref, judge = run.cfg, None, None
    print_memory(run)
    policy = run.load(run.stage.parent)
    if cfg.grpo.kl_coef:
        if cfg.train.lora_rank:
            ref = same_weights(policy)  # the policy but for its adapters
        else:
            bf16 = sample.use_bf16(cfg.train.ref_dtype, run.device)
            ref = copy.deepcopy(policy).to(torch.bfloat16 if bf16 else torch.float32)
        # Before the policy: a copy of a compiled model would still run the original's weights.
        run.set_up(ref.requires_grad_(False), adapters=False)
    run.set_up(policy)
    if judged(cfg):
        judge = run.load("reward_model", RewardModel)
    env = Environment(run.tok, cfg.data, cfg.rewards, cfg.grpo.max_new_tokens, judge)
    train_grpo(policy, ref, env, run, cfg.grpo)


def not_rambling(problem, text):
    """Whether no line is written for the third time."""
    return max(Counter(text.split("\n")).values()) < 3


FILTERS = {  # (problem, completion) -> whether it may be learnt from
    "right": rewards.is_right,
    "in format": lambda problem, text: rewards.has_format(text),
    "in one language": lambda problem, text: rewards.one_language(problem, text) == 1,
    "not rambling": not_rambling,
}


def train_dev1(run):
    """Cold start: the base learns from the traces of R1-Zero that mix languages least."""
    train_sft(run, rank=rewards.one_language)


def train_dev3(run):
    """Rejection sampling: the base, not dev2, learns from the traces of dev2 that pass all filters,
    and from scripted replies, as in the paper."""
    train_sft(run, list(FILTERS), replies=run.cfg.train.general_replies)


def train_sft(run, filters=("right", "in format"), rank=None, replies=0):
    """Fine-tunes the parent's model on rejection-sampled completions of the source stage and on
    scripted replies. sft.jsonl holds both, for people and for a run that is resumed."""
    cfg, source, path = run.cfg, run.stage.source, run.path("sft.jsonl")
    if not run.done or not os.path.exists(path):
        problems, texts = source_samples(run)
        chosen = {name: FILTERS[name] for name in filters}
        rows, passed = sample.rejection_sample(problems, texts, chosen, rank)
        if not rows:
            raise UserError(f"{run.name}: no sample of {source} passed the filters: train it "
                            f"longer, or raise --source_problems")
        counts = "".join(f", {name} {n}" for name, n in passed.items())
        more = f", and {replies} scripted replies" if replies else ""
        print(f"{run.name}: sampled {sum(map(len, texts))} from {source}{counts}, kept "
              f"{len(rows)} of {len(problems)} problems{more}, in {path}")
        rows += scripted_replies(run, replies)
        write_lines(path, [{"problem": asdict(p), "prompt": data.in_words(p, cfg.data),
                            "completion": text} for p, text in rows])
    with reading(path, f"what {run.name} writes; delete it to make it again"):
        rows = [(data.prompt_ids(data.Problem(**line["problem"]), run.tok, cfg.data),
                 data.completion_ids(line["completion"], run.tok, cfg.data))
                for line in read_lines(path)]
        if not rows:
            raise ValueError("it is empty")
    fine_tune(run, rows)


def train_traces(run):
    """Fine-tunes the base on a file of traces from any source."""
    path, context = run.cfg.train.traces, run.cfg.model.context
    traces = data.read_traces(path, run.tok, run.cfg.data)
    rows = [row for row in traces if len(row[0]) + len(row[1]) < context]
    n_long = len(traces) - len(rows)
    long = f", {n_long} of them longer than context={context}, left out" if n_long else ""
    print(f"{run.name}: {len(traces)} answers in {path}{long}")
    if not rows:
        raise UserError(f"traces={path} holds nothing that fits")
    fine_tune(run, rows)


def fine_tune(run, rows):
    """Trains the parent's model on the completions in rows of (prompt ids, completion ids)."""
    def batch(rng):
        return data.sft_batch(rows, run.tok, run.cfg.data, rng, run.cfg.train.sft_rows)

    supervise(run, run.load(run.stage.parent), batch, run.cfg.train.sft_lr)


def source_samples(run, tasks=None, held_out=False):
    """(problems, for each a list of the source stage's completions); the problems are of `tasks`,
    or as this stage draws them. With `held_out` a fifth as many, from the held-out part."""
    cfg, k, n = run.cfg, run.cfg.train.source_samples, run.cfg.train.source_problems
    key = [run.seed, run.name, "source"] + (["held out"] if held_out else [])
    rng, generator = generators(*key)
    problems = []
    for _ in range(math.ceil(n / 5) if held_out else n):
        task = rng.choice(tasks) if tasks else None
        problems.append(data.draw_problem(cfg.data, rng, task, held_out))
    model = sample.for_sampling(run.load(run.stage.source),
                                run.settings_for(run.stage.source).sample)
    answers = sample.sample_answers(model, run.tok, problems, k, cfg, cfg.grpo.temperature,
                                    generator, f"{run.name}: sampling {run.stage.source}")
    texts = [text for _, text, _ in answers]
    return problems, [texts[i:i + k] for i in range(0, len(texts), k)]


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
    if not run.done or not os.path.exists(path):
        write_lines(path, annotate(run, held_out=False) + annotate(run, held_out=True))
    with reading(path, f"what {run.name} writes; delete it to make it again"):
        pairs = [pair for pair in read_lines(path) if not pair["held_out"]]
        for pair in pairs:
            pair["prompt"] + pair["preferred"] + pair["other"]  # raises unless all are texts
    if not pairs:
        raise UserError(f"{run.name}: no two answers of {run.stage.source} differ in gold reward")
    gpt = run.load(run.stage.parent)

    def batch(rng):
        chosen = [rng.choice(pairs) for _ in range(cfg.train.sft_rows)]
        texts = [(p["prompt"], p[side]) for side in ("preferred", "other") for p in chosen]
        return rewards.text_batch(run.tok, texts, cfg.model.context)

    model = RewardModel(gpt.cfg, gpt).to(run.device)
    supervise(run, model, batch, cfg.train.sft_lr, pair_loss)


def with_a_slip(text, tok, rng):
    """The completion with one token of its answer doubled, left out or exchanged: a name for a
    name, one of 1 to 5 for another, anything else for a thing (sometimes it stays the same)."""
    answer = rewards.split_completion(text)[1]
    if not answer:
        return text
    ids = tok.encode(answer)
    i = rng.randrange(len(ids))
    piece = tok.decode(ids[i:i + 1])
    kind = next((kind for kind in (data.NAMES, [*"12345"]) if piece in kind), data.THINGS)
    other = tok.encode(rng.choice(kind))
    ids[i:i + 1] = rng.choice([other, other, 2 * ids[i:i + 1], []])
    return text.replace(f"<answer>{answer}<", f"<answer>{tok.decode(ids)}<")


def annotate(run, held_out):
    """Lines of pairs.jsonl: two answers to a request, the one that annotators prefer first."""
    problems, texts = source_samples(run, data.GENERAL, held_out)
    rng, _ = generators(run.seed, run.name, "annotators", held_out)
    # The reward model must see faults that dev3 rarely makes, but RL would find: of eight answers
    # one is to a request that ends with the same words but asks for something else, and two are
    # the answer before them with a slip.
    order = sorted(range(len(problems)), key=lambda i: problems[i].question.split()[::-1])
    strays = {}
    for place, i in enumerate(order):
        others = (j for j in order[place:] + order if problems[j].target != problems[i].target)
        strays[i] = texts[next(others, i)][1::8]
    for i, said in enumerate(texts):
        said[1::8] = strays[i]
        for a in range(3, len(said), 4):
            said[a] = with_a_slip(said[a - 1], run.tok, rng)
    answers = [[rewards.split_completion(text)[1] for text in said] for said in texts]
    pairs = []
    for i, a, b in rewards.preference_pairs(problems, answers, rng, run.cfg.train.label_noise):
        gold = [rewards.gold_reward(problems[i], answers[i][j]) for j in (a, b)]
        pairs.append({"held_out": held_out, "prompt": data.prompt_text(problems[i], run.cfg.data),
                      "preferred": texts[i][a], "other": texts[i][b],
                      "gold_agrees": gold[0] > gold[1]})
    return pairs


def evaluate_reward_model(run, model):
    """How often it agrees, on held-out pairs, with the annotators and with gold reward."""
    pairs = read_lines(run.path("pairs.jsonl"))
    held_out = [pair for pair in pairs if pair["held_out"]]
    prompts, preferred, other = ([pair[key] for pair in held_out]
                                 for key in ("prompt", "preferred", "other"))
    scores = model.score(run.tok, prompts, preferred), model.score(run.tok, prompts, other)
    agrees = [a > b for a, b in zip(*scores, strict=True)]
    gold = [a == pair["gold_agrees"] for a, pair in zip(agrees, held_out, strict=True)]
    n = len(held_out)
    accuracy, gold_accuracy = sum(agrees) / max(1, n), sum(gold) / max(1, n)
    print(f"{run.name}: on {n} held-out pairs it agrees with the annotators in {accuracy:.1%}, and "
          f"with gold reward in {gold_accuracy:.1%}")
    write_json(run.path("eval.json"), {"pairs": {
        "train": len(pairs) - n, "held_out": n, "accuracy": accuracy,
        "gold_accuracy": gold_accuracy}})


@dataclass(frozen=True)
class Stage:
    train: callable  # (run): trains, and saves as it goes
    kind: str        # base, rl or sft: a key of RESUME_KEYS
    parent: str      # the stage whose checkpoint it starts from
    source: str      # the stage whose samples it learns from; of r1, the reward model
    settings: dict   # its own defaults


SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "mlp_dim": 128}
SHORT_RL = {"rl_steps": 30}
ALL_SCENARIOS = {"mix": "task:1,chat:2,unsafe:1", "w_language": 0.5, "w_preference": 0.5,
                 "w_harmless": 10.0, "rl_steps": 70, "rl_decay": 0.3}
STAGES = {  # whatever a stage needs is above it; numbers were found by trial and error
    "base": Stage(train_base, "base", None, None, {}),
    "sft": Stage(train_traces, "sft", "base", None, {}),
    "zero": Stage(train_rl, "rl", "base", None, {}),  # RewardConfig's own: accuracy, format
    "dev1": Stage(train_dev1, "sft", "base", "zero", {}),
    "dev2": Stage(train_rl, "rl", "dev1", None, {"w_language": 0.5, **SHORT_RL}),
    "dev3": Stage(train_dev3, "sft", "base", "dev2", {
        "source_problems": 6400, "source_samples": 1, "general_replies": 3000, "sft_steps": 800,
        "sft_lr": 2e-3, "sft_rows": 32}),
    "reward_model": Stage(train_reward_model, "sft", "dev3", "dev3", {
        "source_problems": 3000, "sft_steps": 800, "sft_rows": 32}),
    # No division by the std: a reward model's scores never tie, and their noise would be blown up.
    # A small rate: with twice as much the policy unlearnt copying while it learnt to be friendly.
    "r1": Stage(train_rl, "rl", "dev3", "reward_model", {
        **ALL_SCENARIOS, "rl_lr": 5e-5, "adv_norm": "none"}),
    "small_base": Stage(train_base, "base", None, None, SMALL),
    "distill": Stage(train_sft, "sft", "small_base", "r1", {  # nothing but SFT, as in the paper
        **SMALL, "mix": "task:4,chat:1,unsafe:1", "source_problems": 7200, "source_samples": 1,
        "sft_steps": 1200, "sft_lr": 2e-3, "sft_rows": 32}),
    "small_zero": Stage(train_rl, "rl", "small_base", None, SMALL),
    # Experiments: dev2 without its language reward; r1 with division by the std and larger steps;
    # a reward for emoji, without that division: in a group whose answers are all right, a missing
    # emoji would count as much as a wrong answer elsewhere.
    "dev2_free": Stage(train_rl, "rl", "dev1", None, SHORT_RL),
    "r1_hacked": Stage(train_rl, "rl", "dev3", "reward_model", {**ALL_SCENARIOS, "rl_lr": 5e-4}),
    "zero_emoji": Stage(train_rl, "rl", "base", None, {
        "w_emoji": 0.2, "adv_norm": "none"}),
}


REAL_STAGES = ("base", "sft", "zero", "dev1", "dev2", "dev2_free", "zero_emoji")


def stage_of(name, given):
    """A stage of the table. With --traces, `sft` takes the base's place as a parent of RL."""
    stage = STAGES[name]
    if given.get("traces") and (stage.kind, stage.parent) == ("rl", "base"):
        return replace(stage, parent="sft")
    return stage


def resolve_dependencies(stages, given=None):
    """The given stages and all that they need, in the order in which they run."""
    needed, given = set(stages), given or {}
    for name in reversed(STAGES):  # what a stage needs is above it: one pass will do
        if name in needed:
            stage = stage_of(name, given)
            needed |= {stage.parent, stage.source}
    return [name for name in STAGES if name in needed]


def has_dev3(stage):
    """Whether a stage has learnt from general requests: all do that grow from dev3."""
    return stage in STAGES and "dev3" in resolve_dependencies([stage])


def plan(words, given):
    """{stage: its Run} of the stages that the command line names, `words`, and of all that these
    need, in the order in which they run. Raises UserError, before hours of training, if one of them
    will not run."""
    stages, runs, folder = resolve_dependencies(words, given), {}, given.get("init_from", "")
    toy = [name for name in stages if name not in REAL_STAGES]
    if folder and toy:
        raise UserError(f"--init_from is for {', '.join(REAL_STAGES)}; {', '.join(toy)} need the "
                        f"toy's small base or its general requests")
    if "sft" in stages and not given.get("traces"):
        raise UserError("sft needs --traces=FILE.jsonl")
    for name in stages:
        run = runs[name] = Run(name, given, name in words)
        if run.done < run.steps:
            run.ended = math.inf  # it will be trained
            if run.stage.kind == "rl":
                check_rewards(run, "reward_model" in runs)
        for other in (run.stage.parent, run.stage.source):
            if run.done and other in runs and runs[other].ended > run.began:
                raise UserError(f"{run.dir} grew from an earlier {other}: delete it and the stages "
                                f"after it, or choose another --out_dir")
    cfg, tok = run.cfg, run.tok
    data.leave_out(cfg.data, tok, cfg.model.context - cfg.grpo.max_new_tokens)
    lengths = longest_prompt(cfg, tok)  # all stages draw from the same problems
    for run in runs.values():
        run.prompt_lengths = lengths
    if "sft" in stages:
        data.read_traces(cfg.train.traces, tok, cfg.data)
    return runs


def check_rewards(run, has_judge):
    """Raises UserError if no reward judges what a stage will draw, or no reward model can."""
    drawn = [data.Problem(task, "", (), "") for task in run.cfg.data.shares()]
    if not any(weight and rewards.applies(key.removeprefix("w_"), problem)
               for key, weight in vars(run.cfg.rewards).items() for problem in drawn):
        raise UserError(f"{run.name}: no reward with a weight judges "
                        f"{', '.join(run.cfg.data.shares())}: see --w_accuracy, --w_format, --mix")
    if judged(run.cfg) and not has_judge:
        judge = os.path.join(run.cfg.sample.out_dir, "reward_model", "ckpt.pt")
        state = load_checkpoint(judge) if os.path.exists(judge) else {}
        if state.get("step", 0) < state.get("settings", {}).get("sft_steps", 1):
            raise UserError(f"{run.name}: w_preference needs a finished reward model, {judge}: "
                            f"train.py reward_model makes it")


def use_base(run):
    """Takes over a base that was trained elsewhere, with evaluations that apply."""
    base, settings = run.cfg.train.base, run.cfg.settings()
    print(f"base: {base or run.cfg.sample.init_from}")
    if base:
        known = {task: {**found, "settings": sample.eval_settings(settings, run.origin)}
                 for task, found in read_results(sample.results_folder(base)).items()
                 if task in data.TASKS and found.get("settings") == sample.eval_settings(settings)}
        write_json(run.path("eval.json"), {**read_results(run.dir), **known})


def is_evaluated(run):
    """Whether there is a full evaluation (only these have greedy answers) of all tasks, with the
    current settings or those of training."""
    found, now = read_results(run.dir), run.cfg.settings()
    same = [sample.eval_settings(settings, run.origin)
            for settings in (now, {**now, **run.then})]
    return all("pass@1_greedy" in found.get(task, {}) and found[task].get("settings") in same
               for task in run.cfg.data.tasks())


def run_stage(run):
    """Trains and evaluates a stage unless that is done."""
    name = run.name
    os.makedirs(run.dir, exist_ok=True)
    sample.set_up_cpu(run.cfg.sample)
    if run.origin:
        use_base(run)
    elif run.done >= run.steps:
        print(f"{name}: done ({run.path('ckpt.pt')}, {run.done} steps)")
    else:
        print(f"{name}: {run.steps} steps on {run.device}, into {run.dir}")
        if not run.done:
            run.began = time.time()
        for file in ("eval.json", "samples.jsonl"):  # left by a run of fewer steps
            with suppress(FileNotFoundError):
                os.remove(run.path(file))
        if run.cfg.train.compile:
            torch.compiler.reset()  # what earlier stages compiled counts against its limit
        try:
            run.stage.train(run)
        finally:
            handle_ctrl_c(signal.default_int_handler)
        plot_curves(run.dir)
    if name == "reward_model":
        if not read_results(run.dir):
            evaluate_reward_model(run, run.load(name, RewardModel))
    elif not is_evaluated(run):
        model = run.load(name)  # as saved: adapters are merged
        sample.evaluate_tasks(model, run.tok, run.settings_for(name), run.dir, run.origin,
                              has_dev3(name))


def memory_plan(cfg, prompt_len, device, shared_len=0):
    """The memory that GRPO always takes, {what: bytes}, and what its two peaks add; activations as
    autograd keeps them. `shared_len`: length of the prefix that all prompts share."""
    def size(dtype):  # of a number
        return 2 if sample.use_bf16(dtype, device) else 4

    m, g, t, sampler = cfg.model, cfg.grpo, cfg.train, size(cfg.sample.sample_dtype)
    with torch.device("meta"):
        model = GPT(m)
        n = sum(p.numel() for p in model.parameters())
        matrices = sum(p.numel() for p in model.blocks.parameters())
        if t.lora_rank:
            add_lora(model, t.lora_rank, t.lora_alpha, None)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weight = sampler if t.lora_rank else 4  # bytes
    product = min(weight, size(t.autocast))
    always = {"torch": 2**29, "weights": weight * n + 4 * trained * (t.lora_rank > 0),
              "optimiser": (8 if g.rl_optimizer == "adamw" else 4) * trained}
    if not t.lora_rank:
        always["reference"] = size(t.ref_dtype) * n if g.kl_coef else 0
        always["sampler"] = 2 * n if sampler == 2 else 0

    columns = prompt_len + g.max_new_tokens
    rows = max(g.prompts_per_step * g.group_size, 32 * cfg.sample.eval_samples)
    cache = 2 * rows * columns * m.n_layer * m.n_kv_head * m.d_head
    sampling = sampler * cache + 3 * 4 * rows * m.vocab_size  # logits, softmax, its sums

    tokens = max(g.micro_tokens, columns)
    heads = m.d_head * (m.n_head + m.n_kv_head)
    norms = m.n_embd * (4 if t.lora_rank else 6)  # per token
    norms += heads * (1.6 if t.lora_rank else 2.6) * m.qk_norm
    block = 4 * norms + product * (2 * heads + 4 * m.mlp_dim)
    copies = 2 * matrices if product < weight else 0  # autocast's, kept for the backward pass
    if t.checkpointing:
        block, copies = weight * m.n_embd + block / m.n_layer, copies / m.n_layer
    activations = m.n_layer * block * tokens + copies
    if 4 * shared_len >= columns and not (t.checkpointing or t.compile):  # trunk_sharing_prefix
        less = block - 2 * product * m.n_kv_head * m.d_head  # rows hold copies of keys and values
        activations -= m.n_layer * less * (tokens // columns - 1) * shared_len
    activations += 4 * 4 * min(2**24, tokens * m.vocab_size)  # logits and their gradients
    if tokens * m.vocab_size > 2**24 and not t.lora_rank:  # in chunks, which add up
        activations += 8 * m.n_embd * m.vocab_size  # the head's gradient so far, and a chunk's
    step = 4 * trained if device.type == "cuda" else 0  # AdamW works on all weights at a time
    return always, {"sampling": sampling, "update": 4 * trained + max(activations, step)}


def return_memory():
    """Makes glibc give back to the system what is freed. Otherwise large models' tensors leave gaps
    in its heap, which on a CPU cost half as much again as the activations."""
    with suppress(AttributeError, OSError, TypeError):  # other systems
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def print_memory(run):
    """What RL will take, and what there is. A toy needs no such line."""
    prompt_len, shared_len = run.prompt_lengths
    always, moments = memory_plan(run.cfg, prompt_len, run.device, shared_len)
    need = sum(always.values()) + max(moments.values())
    if need < 2**30 and not run.cfg.sample.init_from:
        return
    have = math.inf
    if run.device.type == "cuda":
        have = torch.cuda.get_device_properties(run.device).total_memory
    else:
        with suppress(AttributeError, ValueError, OSError):  # Windows and some Macs do not say
            have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    always, moments = ([f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size]
                       for parts in (always, moments))
    shown = f"{' + '.join(always)} + max({', '.join(moments)})"
    of = "" if have == math.inf else f" of {have / 2**30:.1f}"
    print(f"memory, GiB: {shown} = about {need / 2**30:.1f}{of}")
    if need > have:
        print("too much: lower --micro_tokens or --prompts_per_step, or set --checkpointing=true, "
              "--lora_rank=16, --ref_dtype=bfloat16 or --kl_coef=0")


# ------------------------------------------------------------------------------------------------
# Tables, pictures, commands


def all_results(out_dir):
    return {name: read_results(os.path.join(out_dir, name)) for name in STAGES}


HEADINGS = {  # shorter ones, since a table fits 110 columns
    "pass@1_ci": "95% CI", "pass@1_T=0.6": "T=0.6", "pass@1_greedy": "greedy",
    "pass@1_untagged": "untagged", "one_language": "language", "truncated": "cut"}


def print_tables(results, tasks):
    """Prints {stage: results by task}: a table for each of `tasks`, and one for all others."""
    results = {stage: found for stage, found in results.items() if any(t in found for t in tasks)}
    for task in tasks:
        rows = {stage: found for stage, found in results.items() if task in found}
        if not rows:
            continue
        evaluated = [found[task] for found in rows.values()]
        k, n = (max(found[key] for found in evaluated) for key in ("samples", "problems"))
        fewest = min(found["problems"] for found in evaluated)
        most = f"{fewest} to {n}" if fewest < n else f"{n}"
        keys = ["pass@1", "pass@1_ci", "pass@1_T=0.6", "pass@1_greedy", f"pass@{k}", f"cons@{k}",
                "pass@1_untagged", "format", "one_language", "length", "truncated"]
        print_table(f"{task}: {most} held-out problems, {k} samples of each", rows,
                    {HEADINGS.get(key, key): (task, key) for key in keys})
    others = {t: (t, "pass@1") for t in data.TASKS
              if t not in tasks and any(t in r for r in results.values())}
    if others:
        print_table("pass@1 on other tasks, thinking, and preferences", results, {
            **others, "thinks": (tasks[0], "thinks"), "in chat": ("chat", "thinks"),
            "in unsafe": ("unsafe", "thinks"), "gold": ("chat", "gold_reward"),
            "wins": ("win_rate", "gold"), "RM wins": ("win_rate", "reward_model")})
    print()


def print_table(title, results, columns):
    """One row per stage; `columns` are {heading: (task, key)}."""
    rows = [["", *columns]]
    for stage, found in results.items():
        cells = [show(key, found.get(task, {}).get(key)) for task, key in columns.values()]
        rows.append([stage, *cells])
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    print("\n" + title)
    for stage, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        print("  ".join([stage.ljust(first), *cells]))


def show(key, value):
    if value is None:
        return "-"
    if isinstance(value, list):
        return "{:.1%}-{:.1%}".format(*value)
    return format(value, {"length": ".1f", "gold_reward": ".2f"}.get(key, ".1%"))


def plot_curves(folder):
    """curves.png beside metrics.jsonl, if matplotlib happens to be installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = read_lines(os.path.join(folder, "metrics.jsonl"))
    keys = ["reward/accuracy", "reward/format", "length", "kl", "entropy"]
    known = dict.fromkeys(key for line in lines for key in line)
    keys = [key for key in keys if key in known] or ["loss"]
    figure = Figure(figsize=(3.2 * len(keys), 2.6), layout="tight")
    for i, key in enumerate(keys):
        axis = figure.add_subplot(1, len(keys), i + 1, title=key, xlabel="step")
        suffix = "/" + key.removeprefix("reward/")  # countdown/length: one curve per task
        curves = [name for name in known if name.endswith(suffix) and "reward" not in name]
        for name in curves or [key]:
            values = [m[name] if m.get(name) is not None else math.nan for m in lines]
            axis.plot([m["step"] for m in lines], values, linewidth=1, label=name.split("/")[0])
        if curves:
            axis.legend(fontsize="small")
    figure.savefig(os.path.join(folder, "curves.png"), dpi=120)


def run_table(given):
    out_dir = given.get("out_dir", SampleConfig.out_dir)
    results = all_results(out_dir)
    found = [task for task in data.TASKS if any(task in stage for stage in results.values())]
    # Those that were trained on were evaluated greedily, too.
    main = [task for task in found
            if any("pass@1_greedy" in stage.get(task, {}) for stage in results.values())]
    named = DataConfig(task=given["task"]).tasks() if "task" in given else ()
    tasks = list(named) or main or found[:1]
    if not found or not set(tasks) <= set(found):
        raise UserError(f"nothing in {out_dir} was evaluated on that: set --out_dir or --task")
    print_tables(results, tasks)


def run_eval(given):
    """`eval`: the final evaluation of a checkpoint, written beside it, or into --out_dir if that is
    elsewhere; with --init_from and no --ckpt, of the model in that folder."""
    path, model, tok, cfg = sample.open_checkpoint(given)
    origin, stage, out_dir = None, None, cfg.sample.out_dir
    if os.path.isdir(path):  # a model as it came is the base of what lies in out_dir
        origin, folder = [os.path.realpath(path), 0.0], os.path.join(out_dir, "base")
        known = [found.get("settings", {}).get("origin") for found in read_results(folder).values()]
        if os.path.exists(os.path.join(folder, "ckpt.pt")) or known != len(known) * [origin]:
            raise UserError(f"{folder} holds another base: choose another --out_dir")
    else:
        state, folder = load_checkpoint(path), sample.results_folder(path)
        stage, inside = state.get("stage"), os.path.join(os.path.realpath(out_dir), "")
        if "out_dir" in given and not os.path.realpath(path).startswith(inside):
            origin, folder = [os.path.realpath(path), state.get("ended", 0.0)], out_dir
    sample.evaluate_tasks(model, tok, cfg, folder, origin, has_dev3(stage))
    print_tables({folder or path: read_results(folder)}, cfg.data.tasks())


def run_export(given):
    """`export`: a checkpoint as a Hugging Face folder, which transformers and TRL open."""
    path, model, tok, cfg = sample.open_checkpoint({**given, **sample.NO_FILE})
    source, train = cfg.sample.init_from, Config.of(given).train
    if not train.export_dir:
        raise UserError("export needs --export_dir=FOLDER to write to")
    if source and os.path.realpath(source) == os.path.realpath(train.export_dir):
        raise UserError(f"export_dir={source} is where the model came from: choose another")
    dtype = sample.sampling_dtype(cfg.sample)
    if train.export_dtype != "auto":
        dtype = getattr(torch, train.export_dtype)
    ends = list(dict.fromkeys(data.stops(tok, cfg.data)[0]))  # what RL has learnt to end with
    data.prompt_ids(data.Problem("file", "?", (), ""), tok, cfg.data)  # checks the template
    save_pretrained(model, train.export_dir, source, dtype)
    if not source:
        tok.save(train.export_dir, data.chat_template(cfg.data.template, cfg.data.prefill_think))
    data.add_chat_template(train.export_dir, cfg.data, tok)
    theirs, ours = (os.path.join(folder, "generation_config.json")
                    for folder in (source or train.export_dir, train.export_dir))
    generation = read_json(theirs) if os.path.exists(theirs) else {}
    write_json(ours, {**generation, "eos_token_id": ends})
    print(f"{path}: written to {train.export_dir} as {str(dtype).removeprefix('torch.')}")


COMMANDS = {"eval": run_eval, "export": run_export, "table": run_table}


def parse(argv):
    """Command line -> (stages or a command, {setting: value} as given)."""
    own = {**{name: stage.settings for name, stage in STAGES.items()},
           **{f"--task={task}": settings for task, settings in TASK_DEFAULTS.items()},
           "--init_from": REAL_DEFAULTS, "--init_from with --lora_rank": LORA_DEFAULTS}
    lines = [textwrap.fill(", ".join(f"{key}={value}" for key, value in settings.items()), 110,
                           initial_indent=f"  {name}: ", subsequent_indent=6 * " ")
             for name, settings in own.items() if settings]
    parser = sample.Parser("train.py", __doc__, {f.name: f.default_factory for f in fields(Config)},
                           usage="python train.py [STAGE ...] [--setting=value ...]",
                           epilog="Stages, tasks and real models have defaults of their own:\n"
                           + "\n".join(lines))
    choices = f"{', '.join(STAGES)} (default zero), or a command: {', '.join(COMMANDS)}"
    parser.add_argument("words", nargs="*", metavar="STAGE", help=choices)
    given = vars(parser.parse_args(argv))
    words = given.pop("words", None) or ["zero"]
    for word in words:
        if word not in STAGES and not (word in COMMANDS and len(words) == 1):
            parser.error(f"{word!r} is not a stage: choose from {choices}, by itself")
    return words, given


def print_next(run, results, given):
    """Where everything lies, and what a newcomer may want to do with it."""
    print(f"{run.dir} holds the checkpoint, its log (metrics.jsonl), rollouts.jsonl, and the "
          f"evaluation (eval.json, samples.jsonl). Next:")
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join  # quotes what needs quotes
    ckpt, out_dir = run.path("ckpt.pt"), run.cfg.sample.out_dir
    base = run.cfg.train.base or os.path.join(out_dir, "base", "ckpt.pt")
    if os.path.exists(ckpt) and run.name != "reward_model":
        vs = [f"--vs={base}"] if ckpt != base and os.path.exists(base) else []
        print("    python " + join(["sample.py", f"--ckpt={ckpt}", *vs]))
    if not results["r1"] and not run.cfg.sample.init_from:
        flags = [f"--{key}={value}" for key, value in given.items()]
        print("    python " + join(["train.py", "r1", "distill", "small_zero", *flags]))


def main(argv):
    with any_terminal():
        words, given = parse(argv)
    with any_terminal(0 if words[0] in COMMANDS else 141):  # 128 + SIGPIPE: cut short
        run_command_line(words, given)


def run_command_line(words, given):
    with sample.one_line_errors("train.py", given.get("out_dir", SampleConfig.out_dir)):
        if words[0] in COMMANDS:
            return COMMANDS[words[0]](given)
        if given.get("ckpt"):
            raise UserError("--ckpt is for `eval` and `export`; to train on from a base: --base")
        if given.get("export_dir"):
            raise UserError("--export_dir is for `export`")
        runs = plan(words, given)
        if given.get("init_from"):
            return_memory()
        for run in runs.values():
            run_stage(run)
        results = all_results(run.cfg.sample.out_dir)
        print_tables(results, run.cfg.data.tasks())
        print_next(run, results, given)


if __name__ == "__main__":
    main(sys.argv[1:])
