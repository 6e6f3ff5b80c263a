"""Our GRPO loss and TRL's on the same random numbers: loss and gradient, a line an option, and what
they are unequal in. Exits with 1 if they differ where they should not.

    pip install trl transformers
    python tests/bench/trl_loss.py --batches=5

These are installed only to compare with: written against trl 1.16.0 and transformers 5.24.0. Their
side is a GRPOTrainer as it is, from the rewards to the loss: `rollout_func` hands it our
completions, and its log-probs are replaced by ours (not where the temperature is compared: there
both sides run a model). loss_norm=token is beside loss_type=dapo, whose denominator is the tokens
of the batch; bnpo's is the tokens of the micro-batch.

A difference is relative: a gradient's to its largest number, a loss's to itself, or to 0.1 where it
is smaller. In float64 up to 1e-10 is equal, in fp32 1e-5.
"""
import argparse
import copy
import importlib.util
import os
import sys
import tempfile
import warnings
from dataclasses import replace

import torch
from common import END, as_transformers, build

import grpo
from model import hf_name

P, G, T = 4, 6, 12  # problems, completions of each, longest completion
N = P * G
LOSS_TYPE = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}
SHAPE = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_kv_head=1, head_dim=16, mlp_dim=64)
BASE = grpo.GRPOConfig(kl_coef=0.04, clip_high=0.28, max_new_tokens=T)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
failed = []


class Batch:
    """Completions of ragged lengths, some truncated. Completion i has the prompt i + 1 (0 is END,
    whose embedding has no gradient in transformers: it pads, too), by which both sides find its row
    of the tables (N, T) of log-probs: the policy's, the sampler's, the reference's."""

    def __init__(self, seed, dtype):
        g = torch.Generator().manual_seed(seed)
        self.logp = (-3 * torch.rand(N, T, generator=g, dtype=dtype)).requires_grad_()
        noise = 0.4 * torch.randn(2, N, T, generator=g, dtype=dtype)
        self.old, self.ref = self.logp.detach() + noise[0], self.logp.detach() + noise[1]
        rewards = torch.randint(0, 16, (P, G), generator=g).double() / 10
        rewards[-1] = 0.7  # a group that teaches nothing
        self.rewards, self.samples = rewards, []
        adv = grpo.group_advantages(rewards).flatten().tolist()
        for i in range(N):
            n = int(torch.randint(1, T + 1, (), generator=g))
            ids = torch.randint(1, SHAPE["vocab_size"], (n,), generator=g).tolist()
            truncated = i % 5 == 0
            self.samples.append(grpo.Sample(
                [i + 1], ids if truncated else ids[:-1] + [END], self.old[i, :n].float(), truncated,
                reward=rewards.view(-1)[i].item(), adv=adv[i]))

    @property
    def mask(self):
        return torch.arange(T) < torch.tensor([len(s.ids) for s in self.samples])[:, None]

    @property
    def adv(self):
        return torch.tensor([s.adv for s in self.samples])


# ------------------------------------------------------------------------------------------------
# Ours


def our_loss(cfg, batch, adv=None, rows=slice(None)):
    """grpo_loss -> (loss, gradient with respect to logp)."""
    batch.logp.grad = None
    ref = batch.ref[rows] if cfg.kl_coef else None
    adv = batch.adv if adv is None else adv
    loss, _ = grpo.grpo_loss(batch.logp[rows], batch.old[rows], ref, adv[rows], batch.mask[rows],
                             cfg)
    loss.backward()
    return loss.item(), batch.logp.grad.clone()


class Table(torch.nn.Module):
    """In place of a model: a table of log-probs."""

    def __init__(self, logp):
        super().__init__()
        self.logp = torch.nn.Parameter(logp.detach().clone())


def our_update(cfg, batch, policy, ref, logps=None):
    """update_policy, so that it is update_policy who leaves out the truncated and cuts the batch
    into micro-batches -> (loss, {name: gradient})."""
    groups = [batch.samples[i:i + G] for i in range(0, N, G)]
    gradients, kept = {}, (grpo.token_logps, grpo.apply_gradients)

    def apply_gradients(policy, *_):
        gradients.update({name: p.grad.clone() for name, p in policy.named_parameters()})
        policy.zero_grad()
        return 0.0, 0

    grpo.token_logps, grpo.apply_gradients = logps or grpo.token_logps, apply_gradients
    try:
        metrics = grpo.update_policy(policy, ref, [], groups, cfg, torch.Generator())
    finally:
        grpo.token_logps, grpo.apply_gradients = kept
    return metrics["loss"], gradients


def look_up(table, tokens, temperature, mask):
    return table.logp[tokens[:, 0] - 1, :tokens.shape[1] - 1]


# ------------------------------------------------------------------------------------------------
# TRL's


class TRL:
    """TRL's trainer with the settings that are ours by other names; `settings` are its own."""

    def __init__(self, cfg, models=None, **settings):
        from datasets import Dataset
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast
        from trl import GRPOConfig, GRPOTrainer

        policy, ref = models or (build("tiny", **SHAPE), build("tiny", **SHAPE))
        vocab = {f"t{i}": i for i in range(SHAPE["vocab_size"])}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="t1")), eos_token=f"t{END}",
            pad_token=f"t{END}")
        if has_ratio():
            settings.setdefault("use_bias_correction_kl", cfg.kl_loss == "k3_ratio")
        accumulate = settings.setdefault("gradient_accumulation_steps", 1)
        self.parts = settings.setdefault("steps_per_generation", accumulate)
        with tempfile.TemporaryDirectory() as folder:  # the trainer loads its reference from it
            theirs = as_transformers(policy)
            as_transformers(ref).save_pretrained(folder)
            theirs.config._name_or_path = folder
            settings = {
                "loss_type": LOSS_TYPE[cfg.loss_norm], "epsilon": cfg.clip_low, "num_iterations": 2,
                "epsilon_high": cfg.clip_high, "beta": cfg.kl_coef, "temperature": cfg.temperature,
                "mask_truncated_completions": cfg.mask_truncated,
                "scale_rewards": {"std": "group", "none": "none"}[cfg.adv_norm], **settings}
            args = GRPOConfig(
                folder, per_device_train_batch_size=N // self.parts, num_generations=G,
                max_completion_length=cfg.max_new_tokens, use_cpu=True, bf16=False,
                gradient_checkpointing=False, report_to="none", **settings)
            self.trainer = GRPOTrainer(
                theirs, lambda **_: self.batch.rewards.flatten().tolist(), args,
                Dataset.from_dict({"prompt": ["t1"] * N}), processing_class=tokenizer,
                rollout_func=self.rollout)
        self.trainer.current_gradient_accumulation_steps = accumulate
        self.trainer.model.train()
        if models is None:
            self.trainer._get_per_token_logps_and_entropies = self.look_up

    def rollout(self, prompts, trainer):
        samples = self.batch.samples
        return {"prompt_ids": [s.prompt for s in samples], "logprobs": None,
                "completion_ids": [s.ids for s in samples]}

    def look_up(self, model, input_ids, attention_mask, logits_to_keep, *_, **__):
        """In place of the trainer's log-probs. Without a gradient it asks for the sampler's."""
        batch = self.batch
        table = batch.logp if torch.is_grad_enabled() else batch.old
        if model is self.trainer.ref_model:
            table = batch.ref
        logps = table[input_ids[:, 0] - 1, :logits_to_keep]
        return logps, torch.zeros_like(logps), None

    def score(self, batch):
        """What the trainer makes of a rollout: its advantages, masks and counts."""
        self.batch = batch
        return self.trainer._generate_and_score_completions([{"prompt": "t1"}] * N)

    def loss(self, batch, adv=None, only=None):
        """-> (loss, gradient with respect to logp), summed over the micro-batches, or of the one
        minibatch `only`. `adv` None: as the trainer computed them."""
        inputs = self.score(batch)
        if adv is not None:
            inputs["advantages"] = adv
        return self.backward(inputs, only), batch.logp.grad.clone()

    def backward(self, inputs, only=None):
        from trl.trainer.utils import split_tensor_dict
        self.batch.logp.grad = None
        parts = split_tensor_dict(inputs, self.parts)
        total = 0.0
        for part in parts if only is None else [parts[only]]:
            loss = self.trainer.compute_loss(self.trainer.model, part)
            loss.backward()
            total += loss.item()
        return total


def has_ratio():
    """Whether this TRL can weigh the KL with the ratio."""
    from trl import GRPOConfig
    return "use_bias_correction_kl" in GRPOConfig.__dataclass_fields__


# ------------------------------------------------------------------------------------------------
# Option by option


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=5, help="random batches an option")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    args = parser.parse_args(argv)
    if not (importlib.util.find_spec("trl") and importlib.util.find_spec("transformers")):
        raise SystemExit("pip install trl transformers")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.simplefilter("ignore")
    import transformers
    import trl
    transformers.utils.logging.disable_progress_bar()
    seeds = range(args.seed, args.seed + args.batches)
    double, single = ([Batch(seed, t) for seed in seeds] for t in (torch.float64, torch.float32))
    print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch "
          f"{torch.__version__}; {args.batches} batches of {N} completions, 1 to {T} tokens")
    ratios_beyond_the_clip(double)
    compare_the_loss(double)
    compare_the_update(single)
    compare_advantages(double)
    compare_temperature(single)
    print(f"DIFFERENT: {'; '.join(failed)}" if failed else "equal where it should be")
    return not failed


def compare(name, pairs, dtype=torch.float64, known=""):
    """Prints a line of the largest differences. `pairs`: ((loss, gradients), the same of TRL) a
    batch. `known`: why they must differ."""
    losses, gradients = [], []
    for (a, ours), (b, theirs) in pairs:
        losses.append(abs(a - b) / max(abs(b), 0.1))
        scale = max(x.abs().max() for x in theirs)
        gradients += [(x - y).abs().max() / scale for x, y in zip(ours, theirs, strict=True)]
    loss, gradient = (torch.tensor(x).max().item() for x in (losses, gradients))  # NaN if one is
    equal = loss <= TOLERANCE[dtype] and gradient <= TOLERANCE[dtype]
    if equal == bool(known):
        failed.append(name)
    print(f"{name:<58} loss {loss:.1e}  gradient {gradient:.1e}  "
          f"{'equal' if equal else 'DIFFERENT'}{known and ', as known: ' + known}", flush=True)


def ratios_beyond_the_clip(batches):
    """Says how many tokens try the four cases of the clip."""
    counts = dict.fromkeys(("above, adv > 0", "above, adv < 0", "below, adv > 0",
                            "below, adv < 0"), 0)
    for batch in batches:
        ratio, adv = (batch.logp - batch.old).exp(), batch.adv[:, None]
        for name in counts:
            far = ratio > 1 + BASE.clip_high if "above" in name else ratio < 1 - BASE.clip_low
            sign = adv > 0 if ">" in name else adv < 0
            counts[name] += int((far & sign & batch.mask).sum())
    print(f"tokens beyond the clip: {counts}")
    assert all(counts.values())


def compare_the_loss(batches):
    """grpo_loss in float64, both sides with our advantages."""
    def line(name, changes, known="", **settings):
        cfg = replace(BASE, **changes)
        trl = TRL(cfg, **settings)
        compare(name, [(our_loss(cfg, b), trl.loss(b, b.adv)) for b in batches], known=known)

    for norm, theirs in LOSS_TYPE.items():
        line(f"loss_norm={norm} (loss_type={theirs})", {"loss_norm": norm})
    line("loss_norm=token (loss_type=bnpo)", {"loss_norm": "token"}, loss_type="bnpo")
    for low, high in ((0.2, 0.2), (0.1, 0.5), (0.0, 0.0), (1.0, 3.0)):
        line(f"clip_low={low}, clip_high={high} (epsilon, epsilon_high)",
             {"clip_low": low, "clip_high": high})
    for beta in (0.0, 0.001, 1.0):
        line(f"kl_coef={beta} (beta)", {"kl_coef": beta})
    if has_ratio():
        for norm in LOSS_TYPE:
            line(f"kl_loss=k3_ratio (use_bias_correction_kl), {norm}",
                 {"kl_loss": "k3_ratio", "kl_coef": 0.5, "loss_norm": norm})
    else:
        print("kl_loss=k3_ratio: this TRL has no use_bias_correction_kl")
    compare_on_policy(batches)
    compare_minibatches(batches)


def compare_on_policy(batches):
    """The first step on a rollout: TRL then takes the policy's own log-probs for the sampler's."""
    for kl_loss in ("k3", "k3_ratio") if has_ratio() else ("k3",):
        cfg, pairs = replace(BASE, kl_loss=kl_loss), []
        trl = TRL(cfg, num_iterations=1)
        for batch in batches:
            old, batch.old = batch.old, batch.logp.detach()
            pairs.append((our_loss(cfg, batch), trl.loss(batch, batch.adv)))
            batch.old = old
        compare(f"the first step, every ratio 1, {kl_loss}", pairs)


def compare_minibatches(batches):
    """Two optimiser steps a rollout, each on a half."""
    halves = slice(0, N // 2), slice(N // 2, N)
    reason = "dapo divides by the mean of the minibatches' tokens"
    for norm, loss_type in (*LOSS_TYPE.items(), ("token", "bnpo")):
        cfg = replace(BASE, loss_norm=norm)
        trl = TRL(cfg, loss_type=loss_type, steps_per_generation=2)
        compare(f"minibatches=2, {norm} ({loss_type}, steps_per_generation=2)",
                [(our_loss(cfg, b, rows=rows), trl.loss(b, b.adv, i))
                 for b in batches for i, rows in enumerate(halves)],
                known=reason if loss_type == "dapo" else "")


def compare_the_update(batches):
    """What update_policy does before grpo_loss, in fp32."""
    def line(name, cfg, known="", **settings):
        trl, pairs = TRL(cfg, **settings), []
        for b in batches:
            loss, gradients = our_update(cfg, b, Table(b.logp), Table(b.ref), look_up)
            pairs.append(((loss, gradients.values()), trl.loss(b, b.adv)))
        compare(name, [(a, (loss, [gradient])) for a, (loss, gradient) in pairs], torch.float32,
                known)

    for norm in LOSS_TYPE:
        line(f"mask_truncated (mask_truncated_completions), {norm}",
             replace(BASE, mask_truncated=True, loss_norm=norm))
    for norm, loss_type in (*LOSS_TYPE.items(), ("token", "bnpo")):
        line(f"micro-batches, {norm} ({loss_type}, accumulation 2)",
             replace(BASE, micro_tokens=40, loss_norm=norm), loss_type=loss_type,
             gradient_accumulation_steps=2,
             known="bnpo: mean of the micro-batches' means" if loss_type == "bnpo" else "")


def compare_advantages(batches):
    """Both sides from the rewards on. TRL's rewards and advantages are fp32, as our advantages."""
    def line(name, cfg, ours_of, known=""):
        trl, pairs, adv_difference = TRL(cfg), [], 0.0
        for b in batches:
            ours = ours_of(b.rewards, cfg).flatten().float()
            theirs = trl.score(b)["advantages"]
            adv_difference = max(adv_difference, (ours - theirs).abs().max().item())
            pairs.append((our_loss(cfg, b, ours), trl.loss(b)))
        compare(name, pairs, torch.float32, known)
        print(f"    the advantages themselves: {adv_difference:.1e} apart at most")

    def advantages(rewards, cfg):
        return grpo.group_advantages(rewards, cfg.adv_norm)

    def rescaled(rewards, cfg):
        std, sample_std = (rewards.std(dim=1, keepdim=True, correction=c) for c in (0, 1))
        return advantages(rewards, cfg) * std / (sample_std + 1e-4)

    line("adv_norm=none (scale_rewards=none)", replace(BASE, adv_norm="none"), advantages)
    line("adv_norm=std (scale_rewards=group)", BASE, advantages,
         f"TRL divides by the std of ddof 1, plus 1e-4; ours has ddof 0: with G={G} its advantages "
         f"are {((G - 1) / G) ** 0.5:.3f} of ours")
    line("adv_norm=std times std_0 / (std_1 + 1e-4)", BASE, rescaled)
    same = copy.copy(batches[0])
    same.rewards = torch.full((P, G), 2.1)
    ours, theirs = advantages(same.rewards, BASE), TRL(BASE).score(same)["advantages"]
    print(f"    equal rewards of 2.1: our advantages are {ours.abs().max():.1e} at most, TRL's "
          f"{theirs.abs().max():.1e} (rounding, over 1e-4)")


def compare_temperature(batches):
    """Both sides with models of the same weights, policy and reference, in fp32; the gradients are
    those of the weights."""
    models = [build("tiny", **SHAPE) for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    for model in models:
        for p in model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.15, generator=g)
    policy, ref = models
    for temperature in (1.0, 0.6, 1.5):
        cfg, pairs = replace(BASE, temperature=temperature), []
        trl = TRL(cfg, models)
        theirs = dict(trl.trainer.model.named_parameters())
        for batch in batches:
            tokens, mask, *_ = grpo.collate(batch.samples, "cpu")
            with torch.no_grad():
                logp = grpo.token_logps(policy, tokens, temperature, mask)
            old = logp + (batch.old - batch.logp.detach())[:, :logp.shape[1]]
            sampled = copy.copy(batch)
            sampled.samples = [replace(sample, logps=old[i, :len(sample.ids)])
                               for i, sample in enumerate(batch.samples)]
            loss, gradients = our_update(cfg, sampled, policy, ref)
            inputs = trl.score(sampled)
            inputs.update(advantages=batch.adv, old_per_token_logps=old)
            trl.trainer.model.zero_grad()
            pairs.append(((loss, gradients.values()),
                          (trl.backward(inputs), [theirs[hf_name(x)].grad.clone()
                                                  for x in gradients])))
        compare(f"temperature={temperature}", pairs, torch.float32)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
