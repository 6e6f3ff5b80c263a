"""Group Relative Policy Optimization (GRPO; DeepSeekMath, arXiv 2402.03300), the algorithm behind
DeepSeek-R1-Zero (arXiv 2501.12948).

The words:
    policy       the language model that is being trained
    completion   what it samples after a prompt, token by token, up to its end token
    rollout      sampling completions from the current policy; also the completions it yields
    group        the G completions of one problem's prompt
    reward       one number that says how good a completion is; rules compute it, or a trained model
    advantage    how much better a completion is than the average of its group
    reference    a frozen copy of the policy from before RL
    KL           how far the policy has moved away from the reference (Kullback-Leibler divergence);
                 its weight in the loss is beta
    ratio        a token's probability now, divided by that when it was sampled

Why it works. RL wants a higher expected reward. The reward itself has no gradient: it is computed
from sampled text, and sampling has none. But let pi(o) be the policy's probability of a completion
o, the product of its tokens' probabilities. Since grad pi = pi grad log pi, the gradient can be
estimated from samples:

    grad E[r] = grad sum_o pi(o) r(o) = sum_o pi(o) r(o) grad log pi(o) = E[r(o) grad log pi(o)]

So sample, and push each sample's log-probs up in proportion to its reward. Any baseline b that does
not depend on the sample may be subtracted from the reward: E[b grad log pi] = b grad sum_o pi(o) =
b grad 1 = 0, so the expected gradient stays, and choosing b near the mean reward lowers the
estimate's variance. PPO, the usual algorithm before GRPO, has a second network predict the reward
to come at each token, and takes that as b; GRPO takes the group's mean (it includes r: see below).

For every problem q sample o_1 ... o_G from the policy, and reward them with r_1 ... r_G. pi_old is
the policy that sampled, and stays as it was while pi is trained. All tokens o_t of a completion
have its advantage A (o_<t: the tokens before). Then

    A     = (r - mean(r)) / std(r)                                  over the group            (1)
    rho_t = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)               the ratio of a token      (2)
    L_t   = -min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A)                           (3)
    kl_t  = pi_ref/pi - log(pi_ref/pi) - 1, both at o_t             estimates the KL; >= 0    (4)
    loss  = mean over completions of the mean over their tokens of  L_t + beta kl_t           (5)

At the first optimiser step on a rollout pi = pi_old: rho_t is 1, nothing is clipped, and since the
gradient of rho_t is then that of log pi, that of -L_t is A grad log pi(o_t | q, o_<t). Summed over
a completion's tokens that is the identity above with A for r - b. Its expectation is not exactly
grad E[r]: the mean of the group includes r itself, which scales the expected gradient by
(G - 1) / G; dividing by the std weights problems unequally; taking the mean over a completion's own
tokens weights completions unequally (Dr. GRPO, arXiv 2503.20783, does without the last two).
The clip: a token has no gradient from L_t once its ratio is above 1 + eps_high and A > 0, or below
1 - eps_low and A < 0.
beta pulls the policy back to the reference while it chases the reward.

Read on in the order in which the code runs: settings, `train_grpo` (the loop), then what it calls:
`group_advantages` (1), `update_policy`, `optimiser_step`, `grpo_loss` (2)-(5). All of that works on
token ids: `env`, which train.py passes in, draws problems, turns ids into text, and rewards it.
"""
import math
import time
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import (
    Completion,
    UserError,
    apply_gradients,
    generate,
    generators,
    make_optimizers,
    opt,
    ramp,
    sampling_copy,
    set_lr,
    sync_weights,
    token_logps,
)


@dataclass
class GRPOConfig:
    rl_steps: int = opt(60, "GRPO steps", least=1)
    rl_lr: float = opt(3e-4, "learning rate of GRPO", above=0, most=1)
    rl_warmup: int = opt(5, "steps of linear warm-up to rl_lr", least=1)
    rl_decay: float = opt(0.6, "final share of the steps, over which rl_lr falls to 0", least=0,
                          most=1)
    rl_optimizer: str = opt("adamw", "adamw, or muon (Muon for matrices, AdamW for the rest)",
                            choices=("adamw", "muon"))
    eval_every: int = opt(20, "GRPO steps between short evaluations; 0: none", least=0)
    prompts_per_step: int = opt(16, "P, problems per step", least=1)
    group_size: int = opt(16, "G, completions sampled for each problem", least=2)
    max_new_tokens: int = opt(340, "longest completion, in tokens", least=1)
    temperature: float = opt(1.0, "of sampling, and of the log-probs in the loss", least=0.01)
    adv_norm: str = opt("std", "std: divide by the group's std (GRPO); none: do not (Dr. GRPO)",
                        choices=("std", "none"))
    clip_low: float = opt(0.2, "eps_low: the ratio is clipped below at 1 - this", above=0, most=1)
    clip_high: float = opt(0.2, "eps_high: ... and above at 1 + this (DAPO: 0.28)", above=0,
                           most=1e6)
    kl_coef: float = opt(0.001, "beta, weight of the KL to the reference; 0: no reference", least=0)
    kl_loss: str = opt("k3", "k3 (Schulman's name): equation (4) (GRPO); k3_ratio: k3 times the "
                       "ratio, whose gradient is that of KL(pi || pi_ref) (DeepSeek-V3.2)",
                       choices=("k3", "k3_ratio"))
    loss_norm: str = opt("sequence", "sequence: mean over completions of their tokens' mean "
                         "(GRPO); token: mean over all tokens (DAPO); constant: sum over tokens "
                         "/ (completions x max_new_tokens) (Dr. GRPO)",
                         choices=("sequence", "token", "constant"))
    inner_epochs: int = opt(1, "passes over a rollout", least=1)
    minibatches: int = opt(1, "optimiser steps per pass", least=1)
    mask_truncated: bool = opt(False, "truncated completions are left out of the loss, though they "
                               "count in their group's mean")
    dynamic_sampling: int = opt(0, "extra rounds, at most, that replace groups whose rewards are "
                                "all equal (DAPO)", least=0, most=1000)
    skip_equal: bool = opt(False, "leave completions with advantage 0 out of the update, as is "
                           "always done if kl_coef is 0: faster late in a run, but the KL then "
                           "does not act on them")
    ref_every: int = opt(0, "steps between copies of the policy into the reference; 0: none",
                         least=0)
    micro_tokens: int = opt(2048, "tokens per forward and backward pass, padding included; changes "
                            "memory, not gradients", least=1)
    max_grad_norm: float = opt(1.0, "gradients are clipped to this norm", above=0)

    def check(self):
        samples = self.prompts_per_step * self.group_size
        if self.minibatches > samples:
            raise UserError(f"minibatches={self.minibatches} is more than a step's completions, "
                            f"{samples}")


@dataclass
class Sample(Completion):
    """A completion (its prompt, ids, logps, truncated) with its reward and advantage."""
    problem: object = None  # what `env.draw` made; `env.reward` and the log read it
    text: str = ""       # what the reward reads
    reward: float = 0.0  # the weighted sum of its parts
    parts: dict = field(default_factory=dict)  # {name of a reward: its value}
    adv: float = 0.0     # equation (1)

    def __len__(self):  # of prompt and completion, as they go through the model
        return len(self.prompt) + len(self.ids)


# ------------------------------------------------------------------------------------------------
# The loop


def train_grpo(policy, ref, env, run, cfg):
    """Trains `policy` in place. `ref` is the reference, None if cfg.kl_coef is 0. `env` has
    draw(rng) -> (problem, its prompt's ids), decode(ids) -> text, reward(samples) -> (rewards, a
    dict of parts for each), and what ends a completion: stop_ids and find_end, as `generate` takes
    them. `run` resumes, logs, evaluates and saves."""
    P, G = cfg.prompts_per_step, cfg.group_size
    optimizers = make_optimizers(policy, cfg.rl_lr, cfg.rl_optimizer)
    start = run.resume(policy, optimizers, ref)
    sampler = sampling_copy(policy, run.sample_dtype)  # the policy itself, or a copy in bfloat16
    steps = range(start, cfg.rl_steps)
    for step in tqdm(steps, run.name, cfg.rl_steps, initial=start, disable=None):
        t0 = time.time()
        rng, generator = generators(run.seed, run.name, step)  # so a resumed run draws the same
        set_lr(optimizers, cfg.rl_lr * ramp(step, cfg.rl_steps, cfg.rl_warmup, cfg.rl_decay))
        sync_weights(sampler, policy)

        sampled, groups = [], []  # all groups of this step, and those kept for the update
        # By default one round, and all groups are kept. Dynamic sampling adds rounds, each of which
        # replaces the groups whose advantages are all 0 (after the last round such groups stay).
        for _ in range(1 + cfg.dynamic_sampling):
            groups = [group for group in groups if any(sample.adv for sample in group)]
            if len(groups) == P:
                break

            # ---- Sample: G completions of each problem, from the whole softmax: no top-k, no top-p
            drawn = [env.draw(rng) for _ in range(P - len(groups))]
            completions = generate(sampler, [prompt for _, prompt in drawn], G, cfg.max_new_tokens,
                                   cfg.temperature, env.stop_ids, generator, env.find_end)
            samples = [Sample(**vars(completion), text=env.decode(completion.ids),
                              problem=drawn[i // G][0])  # those of a prompt lie side by side
                       for i, completion in enumerate(completions)]

            # ---- Reward: rules read the text; what comes back are numbers without a gradient
            rewards, parts = env.reward(samples)

            # ---- Advantage: each completion against its own group, equation (1)
            by_group = torch.tensor(rewards, dtype=torch.float64).view(-1, G)
            adv = group_advantages(by_group, cfg.adv_norm).flatten().tolist()
            for sample, r, part, a in zip(samples, rewards, parts, adv, strict=True):
                sample.reward, sample.parts, sample.adv = r, part, a
            new = [samples[i:i + G] for i in range(0, len(samples), G)]
            sampled += new
            groups += new

        # ---- Update: raise the log-probs of what was better than its group, lower the others
        update_t0 = time.time()
        update = update_policy(policy, ref, optimizers, groups, cfg, generator)
        if ref is not None and cfg.ref_every and (step + 1) % cfg.ref_every == 0:
            ref.load_state_dict(policy.state_dict())

        # ---- Log, save, evaluate
        now = time.time()
        run.seconds += now - t0
        log_step(run, step + 1, sampled, update, now - t0, now - update_t0, cfg)
        # The reference is saved only if it changes: else a resumed run loads what RL began with.
        renewed = ref if cfg.ref_every else None
        run.end_step(step + 1, cfg.rl_steps, policy, optimizers, renewed)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.rl_steps:
            sync_weights(sampler, policy)
            run.evaluate(sampler)


def group_advantages(rewards, adv_norm="std"):
    """Equation (1): rewards (P, G) -> advantages (P, G), float32. The std is the population's
    (ddof 0). A group whose rewards are equal up to rounding gets exactly 0."""
    rewards = rewards.double()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True, correction=0)
    # A std that is nothing but rounding must not be divided by.
    equal = std <= 1e-6 * rewards.abs().amax(dim=1, keepdim=True).clamp(min=1)
    adv = centred / std if adv_norm == "std" else centred
    return torch.where(equal, 0.0, adv).float()


# ------------------------------------------------------------------------------------------------
# The update


MEANS = ("ratio", "log_ratio", "sampler_kl", "kl", "clip", "entropy")  # metrics of `grpo_loss`


def update_policy(policy, ref, optimizers, groups, cfg, generator):
    """Learns from a rollout: cfg.inner_epochs times cfg.minibatches optimiser steps -> metrics,
    each averaged over the steps that report it; where none does, nan (0 for "skipped")."""
    samples = [sample for group in groups for sample in group]
    steps = []  # the metrics of each
    for _ in range(cfg.inner_epochs):
        order = torch.randperm(len(samples), generator=generator)
        for rows in order.tensor_split(cfg.minibatches):
            batch = [samples[i] for i in rows]
            steps.append(optimiser_step(policy, ref, optimizers, batch, cfg))
    metrics = {"loss": 0.0, **dict.fromkeys(MEANS, math.nan), "grad_norm": 0.0, "skipped": 0.0}
    for name in metrics:
        found = [step[name] for step in steps if name in step]
        if found:
            metrics[name] = sum(found) / len(found)
    return metrics


def optimiser_step(policy, ref, optimizers, batch, cfg):
    """One step on a list of Samples -> its metrics, as floats. If all advantages are 0, no step is
    taken, and "skipped" (1: a step was due, but gradients were not finite) is missing; so are those
    in MEANS if no sample is left to measure."""
    N, device = len(batch), next(policy.parameters()).device
    batch = [sample for sample in batch if not (cfg.mask_truncated and sample.truncated)]
    batch.sort(key=len, reverse=True)  # rows of like length together: little padding
    n_tokens = torch.tensor([len(sample.ids) for sample in batch])
    # The weights of equation (5) come from the whole batch: the gradients of micro-batches then add
    # up to the batch's, and completions that the filter below drops still count in the mean.
    weights = token_weights(n_tokens, N, cfg)
    if cfg.skip_equal or ref is None:
        kept = [i for i, sample in enumerate(batch) if sample.adv]
        batch = [batch[i] for i in kept]
        n_tokens, weights = n_tokens[kept], weights[kept]
    metrics = {"loss": 0.0}
    for rows in micro_batches(batch, cfg.micro_tokens):
        tokens, mask, logp_old, adv = collate(batch[rows], device)
        logp = token_logps(policy, tokens, cfg.temperature, mask)
        logp_ref = None
        if ref is not None:
            with torch.no_grad():
                logp_ref = token_logps(ref, tokens, cfg.temperature, mask)
        loss, means = grpo_loss(logp, logp_old, logp_ref, adv, mask, cfg, weights[rows])
        loss.backward()
        metrics["loss"] += loss.item()
        share = (n_tokens[rows].sum() / n_tokens.sum()).item()  # of the batch's tokens
        for name, mean in means.items():
            metrics[name] = metrics.get(name, 0.0) + share * mean
    if any(sample.adv for sample in batch):
        metrics["grad_norm"], metrics["skipped"] = apply_gradients(policy, optimizers,
                                                                   cfg.max_grad_norm)
    else:
        # Only the KL has a gradient, and AdamW or Muon would scale it up to a full step: no step is
        # taken (published GRPO takes it). This just measures and clears the gradients.
        metrics["grad_norm"], _ = apply_gradients(policy, [], cfg.max_grad_norm)
    return metrics


def micro_batches(samples, micro_tokens):
    """Slices of `samples`, which are sorted, longest first: each of one sample, or of several with
    at most micro_tokens tokens, padding included."""
    i = 0
    while i < len(samples):
        n = max(1, micro_tokens // len(samples[i]))
        yield slice(i, i + n)
        i += n


def collate(samples, device):
    """N samples, right-padded -> tokens (N, T + 1); mask (N, T), True where tokens[:, 1:] belong
    to a completion (its end token included, so that stopping is learnt); the log-probs (N, T) that
    they were sampled with; advantages (N,)."""
    tokens = pad_sequence([torch.tensor(s.prompt + s.ids) for s in samples], batch_first=True)
    starts = torch.tensor([len(s.prompt) for s in samples])[:, None]
    ends = torch.tensor([len(s) for s in samples])[:, None]
    column = torch.arange(1, tokens.shape[1])  # of the predicted tokens
    mask = (column >= starts) & (column < ends)
    logp_old = torch.zeros(mask.shape).masked_scatter(mask, torch.cat([s.logps for s in samples]))
    adv = torch.tensor([s.adv for s in samples])
    return tokens.to(device), mask.to(device), logp_old.to(device), adv.to(device)


def token_weights(n_tokens, N, cfg):
    """The weight of each completion's tokens in the loss: lengths (n,) of the completions of an
    optimiser step -> (n,), float64. `N` also counts those that `mask_truncated` left out; "token"
    divides by the tokens that are left."""
    n_tokens = n_tokens.double()
    if cfg.loss_norm == "token":
        return torch.ones_like(n_tokens) / n_tokens.sum().clamp(min=1)
    if cfg.loss_norm == "constant":
        return torch.ones_like(n_tokens) / (N * cfg.max_new_tokens)
    return 1 / n_tokens.clamp(min=1) / N


def grpo_loss(logp, logp_old, logp_ref, adv, mask, cfg, weights=None):
    """Equations (2)-(5): log-probs and mask (N, T), advantages (N,) -> (loss, metrics as floats,
    means over the mask's tokens). `logp_ref` may be None if cfg.kl_coef is 0. `weights` (N,) are
    these rows' `token_weights` in the whole batch, so that the losses of its micro-batches sum to
    the batch's; None: these rows are the batch."""
    mask, adv = mask.bool(), adv[:, None]
    if weights is None:
        weights = token_weights(mask.sum(dim=1), len(mask), cfg)
    weights = (weights.to(mask.device)[:, None] * mask).to(logp.dtype)  # (N, T)

    # (2) With one optimiser step per rollout in fp32 the ratio is 1 up to rounding, nothing is
    # clipped, and only its gradient matters. It leaves 1 at later steps on the same rollout
    # (inner_epochs, minibatches), and where sampling and training round differently (bfloat16):
    # dividing by the probability that the sampler used corrects for that, token by token. Padding
    # may hold anything; it is set to 0 before exp, since inf * 0 would be NaN.
    log_ratio = (logp - logp_old).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()

    # (3) The min of the two gains: nothing is won by moving on beyond the clip, but a token that
    # has moved too far in the wrong direction is still pulled back.
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    policy_loss = -torch.min(ratio * adv, clipped * adv)

    # (4) "k3" (Schulman 2020). Averaged over tokens sampled from pi its value is KL(pi || pi_ref),
    # but its gradient is that of KL(pi_ref || pi), as in published GRPO: autograd does not see that
    # the tokens, too, depend on pi. Near pi_ref the two agree.
    kl = torch.zeros_like(ratio)
    if logp_ref is not None:
        ref_log_ratio = (logp_ref - logp).masked_fill(~mask, 0.0)
        kl = ref_log_ratio.exp() - ref_log_ratio - 1
    # k3 times the ratio has both the value and the gradient of KL(pi || pi_ref). (log_ratio.exp(),
    # not `ratio`: a variant that changes `ratio` must not change the KL.)
    kl_loss = log_ratio.exp() * kl if cfg.kl_loss == "k3_ratio" else kl

    # (5)
    loss = (weights * (policy_loss + cfg.kl_coef * kl_loss)).sum()

    with torch.no_grad():
        was_clipped = clipped * adv < ratio * adv  # only the KL still has a gradient there
        sampler_kl = log_ratio.exp() - log_ratio - 1  # k3 again: of sampler and trained policy
        if logp_ref is None:
            kl = torch.full_like(kl, math.nan)  # unknown, not 0
        # -log pi_old of what was sampled estimates the sampler's entropy per token.
        values = {"ratio": ratio, "log_ratio": log_ratio, "sampler_kl": sampler_kl, "kl": kl,
                  "clip": was_clipped.to(ratio), "entropy": -logp_old.to(ratio)}
        stacked = torch.stack([values[name] for name in MEANS]).masked_fill(~mask, 0.0)
        means = stacked.sum(dim=(1, 2)) / mask.sum().clamp(min=1)
    return loss, dict(zip(MEANS, means.tolist(), strict=True))


# ------------------------------------------------------------------------------------------------
# The log


def log_step(run, step, sampled, update, took, update_s, cfg):
    """A line of metrics.jsonl, with its most telling figures as a row on the terminal; every tenth
    step one group goes to rollouts.jsonl, for people to read."""
    samples = [sample for group in sampled for sample in group]
    lengths = [len(sample.ids) for sample in samples]
    same = [group for group in sampled if not any(sample.adv for sample in group)]
    outcomes = [{sample.parts.get("accuracy") for sample in group} for group in sampled]

    def share(outcome):  # of groups; nan without a reward for accuracy
        known = "accuracy" in samples[0].parts
        return outcomes.count(outcome) / len(sampled) if known else math.nan

    def mean(values):  # a part is nan where that reward does not judge that problem
        return torch.tensor(values, dtype=torch.float64).nanmean().item()

    parts = {name: mean([sample.parts[name] for sample in samples]) for name in samples[0].parts}
    metrics = {
        "step": step, "reward": mean([sample.reward for sample in samples]),
        **{f"reward/{name}": value for name, value in parts.items()}, "length": mean(lengths),
        "truncated": mean([sample.truncated for sample in samples]),
        # Shares of groups: that teach nothing; whose samples are all right; all wrong.
        "zero_variance": len(same) / len(sampled),
        "all_right": share({1}), "all_wrong": share({0}), **update,
        "tokens_per_s": sum(lengths) / took, "sample_s": took - update_s, "update_s": update_s,
        "seconds": run.seconds}
    tasks = {getattr(sample.problem, "task", "") for sample in samples}
    if len(tasks) > 1:
        for task in sorted(tasks):
            own = [sample for sample in samples if sample.problem.task == task]
            metrics[f"{task}/accuracy"] = mean([s.parts.get("accuracy", math.nan) for s in own])
            metrics[f"{task}/length"] = mean([len(sample.ids) for sample in own])
    row = {"step": f"{step}/{cfg.rl_steps}", "reward": f"{metrics['reward']:.2f}"}
    row |= {name[:4]: f"{value:.2f}" for name, value in parts.items()}  # accu, form, lang, ...
    row |= {"length": f"{metrics['length']:.1f}", "kl": f"{update['kl']:.3f}",
            "entropy": f"{update['entropy']:.2f}",
            "grad": "SKIPPED" if update["skipped"] == 1 else f"{update['grad_norm']:.2f}"}
    if cfg.inner_epochs * cfg.minibatches > 1:
        row["clip"] = f"{update['clip']:.3f}"
    row |= {"zero-var": f"{metrics['zero_variance']:.2f}", "cut": f"{metrics['truncated']:.2f}",
            "tok/s": f"{metrics['tokens_per_s']:.0f}", "sec": f"{took:.1f}"}
    run.log(metrics, row)
    if step % 10 == 1:
        for sample in sampled[0]:
            line = {"step": step, "problem": str(sample.problem), "text": sample.text}
            line |= {"rewards": sample.parts, "reward": sample.reward, "advantage": sample.adv}
            run.append("rollouts.jsonl", line)
