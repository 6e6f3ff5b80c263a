"""Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300; DeepSeek-R1, arXiv 2501.12948).

For every prompt q sample a group of G completions o_1..o_G from the policy, reward each, and compare
each with its own group; there is no value network.

    A_i   = (r_i - mean(r)) / std(r)                                    over the group         (1)
    rho_t = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)                                          (2)
    L_t   = -min(rho_t * A_i, clip(rho_t, 1 - eps_low, 1 + eps_high) * A_i)                    (3)
    kl_t  = pi_ref/pi - log(pi_ref/pi) - 1        >= 0, unbiased for KL(pi || pi_ref)           (4)
    loss  = mean over sequences of the mean over tokens of  L_t + beta * kl_t                  (5)

One step, top to bottom in this file: `rollout` samples and rewards, `group_advantages` is (1), `grpo_loss` is
(2)-(5), `grpo_step` turns one rollout into optimiser steps. Token ids only: prompts come in as ids, and
what a completion is worth is the business of the `reward_fn` that train.py hands in.
"""
import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import BadInput, opt, token_logps


@dataclass
class GRPOConfig:
    prompts_per_step: int = opt(16, "P, problems in a rollout")
    group_size: int = opt(16, "G, completions sampled for each problem")
    max_new_tokens: int = opt(340, "longest completion, in tokens")
    temperature: float = opt(1.0, "for sampling and for every log-prob alike")
    adv_norm: str = opt("std", "std: divide by the group's standard deviation (GRPO); none: do not (Dr. GRPO)")
    clip_low: float = opt(0.2, "eps_low: the ratio's lower clip is 1 - clip_low")
    clip_high: float = opt(0.2, "eps_high: the upper clip is 1 + clip_high (DAPO: 0.28)")
    kl_coef: float = opt(0.001, "beta, weight of the KL penalty to the reference; 0 = no reference is held")
    loss_norm: str = opt("sequence", "sequence: mean of means (GRPO); token: all tokens alike (DAPO); constant: / max_new_tokens (Dr. GRPO)")
    inner_epochs: int = opt(1, "passes over a rollout")
    minibatches: int = opt(1, "optimiser steps a pass; more than 1 makes the later ones off-policy")
    mask_truncated: bool = opt(False, "completions cut at max_new_tokens count in the baseline but not in the loss")
    resample_equal: int = opt(0, "times to replace groups whose rewards are all equal (DAPO's dynamic sampling)")
    ref_every: int = opt(0, "steps between copies of the policy into the reference; 0 = never")
    micro_tokens: int = opt(2048, "tokens in a forward/backward pass, padding included; changes memory, not gradients")
    max_grad_norm: float = opt(1.0, "gradient norm is clipped to this")

    def check(self):
        """Raises BadInput, naming the field, on a value the loop cannot run with."""
        for name in ("prompts_per_step", "group_size", "max_new_tokens", "inner_epochs", "minibatches", "micro_tokens"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}={getattr(self, name)} must be at least 1")
        if not self.temperature > 0:
            raise BadInput(f"temperature={self.temperature} must be above 0: RL learns from differences between samples")
        for name, least, most in (("clip_low", 0, 1), ("clip_high", 0, 1e9), ("kl_coef", 0, 1e9), ("max_grad_norm", 1e-12, 1e12), ("resample_equal", 0, 1000), ("ref_every", 0, 1e9)):
            if not least <= getattr(self, name) <= most:
                raise BadInput(f"{name}={getattr(self, name)} must lie between {least:g} and {most:g}")
        if self.adv_norm not in ("std", "none"):
            raise BadInput(f"adv_norm={self.adv_norm!r} is not std or none")
        if self.loss_norm not in ("sequence", "token", "constant"):
            raise BadInput(f"loss_norm={self.loss_norm!r} is not sequence, token or constant")


# ------------------------------------------------------------------------------------------------
# Sampling and rewarding


@dataclass(frozen=True)
class Rollout:
    """N = P * G completions; row i belongs to problem i // G. The per-token tensors are (N, T-1), entry t
    speaking of tokens[:, t+1], the token that the model predicts from tokens[:, :t+1]."""
    tokens: torch.Tensor     # (N, T) prompt + completion, right-padded
    mask: torch.Tensor       # (N, T-1) True where a completion token, end token included, is predicted
    logp_old: torch.Tensor   # (N, T-1) log-prob it was sampled with
    truncated: torch.Tensor  # (N,) True where no end token came
    rewards: torch.Tensor    # (P, G)
    parts: dict              # {reward's name: (P, G)}


def rollout(model, problems, prompts, reward_fn, cfg, generator, stop_ids, pad_id=0):
    """Samples G completions of each prompt (lists of ids) and rewards them -> Rollout.
    `reward_fn(problems, completions)` gets N problems and N lists of ids; it returns N rewards and their parts."""
    G = cfg.group_size
    out = model.generate(prompts, G, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                         stop_ids=stop_ids, generator=generator, pad_id=pad_id)
    rewards, parts = reward_fn([p for p in problems for _ in range(G)], out.completions())
    as_groups = lambda values: torch.tensor(values, dtype=torch.float64).view(-1, G)
    return Rollout(out.tokens, out.mask[:, 1:], out.logp[:, 1:], out.truncated,
                   as_groups(rewards), {name: as_groups(values) for name, values in parts.items()})


def resample_equal_groups(batch, sample, times):
    """DAPO's dynamic sampling: groups whose rewards are all equal give way, at most `times` times over, to
    new ones from `sample(n)` -> a Rollout of n problems. They have no advantage, so no gradient is lost."""
    for _ in range(times):
        useful = group_advantages(batch.rewards).any(dim=1)  # (P,)
        if useful.all():
            break
        batch = join(select(batch, useful), sample(int((~useful).sum())))
    return batch


def select(batch, groups):
    """The rollout of some problems only: `groups` (P,) is True for those to keep."""
    rows = groups.repeat_interleave(batch.rewards.shape[1]).to(batch.tokens.device)
    return Rollout(batch.tokens[rows], batch.mask[rows], batch.logp_old[rows], batch.truncated[rows],
                   batch.rewards[groups], {name: values[groups] for name, values in batch.parts.items()})


def join(a, b):
    """Two rollouts as one, padded to the longer; what is padded lies outside the mask."""
    T = max(a.tokens.shape[1], b.tokens.shape[1])
    stack = lambda x, y, T: torch.cat([F.pad(x, (0, T - x.shape[1])), F.pad(y, (0, T - y.shape[1]))])
    return Rollout(stack(a.tokens, b.tokens, T), stack(a.mask, b.mask, T - 1), stack(a.logp_old, b.logp_old, T - 1),
                   torch.cat([a.truncated, b.truncated]), torch.cat([a.rewards, b.rewards]),
                   {name: torch.cat([values, b.parts[name]]) for name, values in a.parts.items()})


# ------------------------------------------------------------------------------------------------
# The mathematics


def group_advantages(rewards, adv_norm="std"):
    """Equation (1): rewards (P, G) -> advantages (P, G), float32. The std is the population's (ddof 0).
    A group whose rewards are equal up to rounding teaches nothing: exactly 0, as for G = 1."""
    rewards = rewards.double()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True, correction=0)
    equal = std <= 1e-6 * rewards.abs().amax(dim=1, keepdim=True).clamp(min=1)
    adv = centred / std if adv_norm == "std" else centred
    return torch.where(equal, 0.0, adv).float()


def token_weights(mask, cfg):
    """Equation (5)'s averages as one weight a token, (N, T), so that the loss is a plain sum.
    Made once for the whole batch of an optimiser step: micro-batches then add up to the same gradient."""
    mask = mask.double()
    N = len(mask)
    if cfg.loss_norm == "token":
        return mask / mask.sum().clamp(min=1)
    if cfg.loss_norm == "constant":
        return mask / (N * cfg.max_new_tokens)
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / N


def grpo_loss(logp, logp_old, logp_ref, adv, mask, cfg, weights=None):
    """Equations (2)-(5): log-probs and mask (N, T), advantages (N,) -> (loss, metrics as floats).
    `logp_ref` may be None if cfg.kl_coef is 0. `weights` (N, T) are the rows' share of a larger batch's
    `token_weights`; loss and metrics of the parts then sum to those of the whole."""
    mask, adv = mask.bool(), adv[:, None]
    weights = (token_weights(mask, cfg) if weights is None else weights).to(logp.dtype)

    # What lies outside the mask is padding or prompt: set to 0 before exp, or an inf there would survive as inf * 0.
    log_ratio = (logp - logp_old).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    policy_loss = -torch.min(ratio * adv, clipped * adv)

    if logp_ref is None:
        kl = torch.zeros_like(ratio)
    else:
        ref_log_ratio = (logp_ref - logp).masked_fill(~mask, 0.0)
        kl = ref_log_ratio.exp() - ref_log_ratio - 1

    loss = (weights * (policy_loss + cfg.kl_coef * kl)).sum()

    with torch.no_grad():
        was_clipped = clipped * adv < ratio * adv  # where the min chose the clip: no gradient from these tokens
        metrics = {
            "loss": loss.item(),
            "kl": (weights * kl).sum().item(),
            "clip": (weights * was_clipped).sum().item(),
            "ratio": (weights * ratio).sum().item(),
            "entropy": -(weights * logp_old.masked_fill(~mask, 0.0)).sum().item(),  # -log p of samples is unbiased for it
        }
    return loss, metrics


# ------------------------------------------------------------------------------------------------
# The step


def micro_batches(rows, lengths, budget):
    """Splits row indices into chunks of at most `budget` padded tokens, neighbours in length together."""
    rows = rows[lengths[rows].argsort(descending=True)]
    while len(rows):
        n = max(1, budget // int(lengths[rows[0]]))  # the first is the longest, and sets the padding
        yield rows[:n]
        rows = rows[n:]


def apply_gradients(model, optimizers, max_grad_norm):
    """Clips the gradients, takes one optimiser step and clears them -> (their norm, 0 or 1 for skipped). Gradients that are not
    finite are dropped: one such step would leave nothing but NaN."""
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    finite = math.isfinite(grad_norm)
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return grad_norm, int(not finite)


def grpo_step(model, ref, optimizers, batch, cfg, generator):
    """One rollout's optimiser steps; `ref` is None if cfg.kl_coef is 0. Returns the metrics as
    floats, averaged over the whole step and not its last micro-batch."""
    adv = group_advantages(batch.rewards, cfg.adv_norm).flatten().to(batch.tokens.device)  # of all, before any is left out
    mask = batch.mask & ~batch.truncated[:, None] if cfg.mask_truncated else batch.mask
    ends = torch.arange(2, batch.tokens.shape[1] + 1, device=mask.device)  # entry t of the mask is token t + 1, so it ends a row of t + 2
    lengths = (batch.mask.int() * ends).amax(dim=1)  # of prompt + completion, without padding
    N, n_steps, total = len(adv), 0, Counter()  # a Counter's update adds
    logp_ref = torch.zeros_like(batch.logp_old) if ref is not None else None

    for epoch in range(cfg.inner_epochs):
        order = torch.randperm(N, generator=generator).to(mask.device)
        for minibatch in order.chunk(cfg.minibatches):
            # Equation (5)'s averages are over all that this optimiser step learns from, so they are taken before it is cut into micro-batches.
            weights = torch.zeros_like(batch.logp_old, dtype=torch.float64)
            weights[minibatch] = token_weights(mask[minibatch], cfg)
            for rows in micro_batches(minibatch, lengths, cfg.micro_tokens):
                T = int(lengths[rows].max())
                cut = lambda x: x[rows, :T - 1]
                tokens = batch.tokens[rows, :T]
                logp = token_logps(model, tokens, cfg.temperature, cut(mask))
                if ref is not None and epoch == 0:  # the reference stands still: once a rollout is enough
                    with torch.no_grad():
                        logp_ref[rows, :T - 1] = token_logps(ref, tokens, cfg.temperature, cut(mask))
                loss, metrics = grpo_loss(logp, cut(batch.logp_old), cut(logp_ref) if ref is not None else None,
                                          adv[rows], cut(mask), cfg, cut(weights))
                loss.backward()
                total.update(metrics)
            grad_norm, skipped = apply_gradients(model, optimizers, cfg.max_grad_norm)
            total.update(grad_norm=grad_norm, skipped=skipped)
            n_steps += 1
    return {name: value / n_steps for name, value in total.items()}
