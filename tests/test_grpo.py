"""The mathematics of GRPO against hand-worked cases and a plain float64 restatement; the update and
the loop with a tiny model, problems that are numbers, and rewards that need no text."""
import copy
import itertools
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import grpo
from grpo import (
    GRPOConfig,
    Sample,
    collate,
    group_advantages,
    grpo_loss,
    token_weights,
    train_grpo,
    update_policy,
)
from model import (
    UserError,
    generate,
    make_optimizers,
    pick,
    sampling_copy,
    token_logps,
    validate,
)

NORMS = ("sequence", "token", "constant")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand_with_the_population_std():
    adv = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # mean 1/4, std sqrt(3)/4
    assert torch.allclose(adv, torch.tensor([[3.0, -1.0, -1.0, -1.0]]) / math.sqrt(3))


def test_the_readmes_group_by_hand():
    rewards = torch.tensor([[1.5, 0.5, 0, 1.5, 0.5, 0, 0, 0]])
    assert rewards.mean() == 0.5 and rewards.std(correction=0) == pytest.approx(0.612, abs=5e-4)
    adv = [round(a, 2) for a in group_advantages(rewards)[0].tolist()]
    assert adv == [1.63, 0, -0.82, 1.63, 0, -0.82, -0.82, -0.82]


def test_each_group_is_its_own_baseline():
    adv = group_advantages(torch.tensor([[1.0, 0.0], [11.0, 10.0]]))
    assert torch.equal(adv, torch.tensor([[1.0, -1.0], [1.0, -1.0]]))


def test_without_std_advantages_are_centred_rewards():
    adv = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), "none")
    assert torch.allclose(adv, torch.tensor([[0.75, -0.25, -0.25, -0.25]]))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_teach_nothing(value):
    for norm in ("std", "none"):
        assert (group_advantages(torch.full((2, 7), value), norm) == 0).all()


def test_a_group_of_one_teaches_nothing():
    assert group_advantages(torch.tensor([[0.3], [1.0]])).tolist() == [[0.0], [0.0]]


def test_nearly_equal_floats_are_not_blown_up():
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]], dtype=torch.float64)
    assert rewards[0, 0] != rewards[0, 1]
    assert (group_advantages(rewards) == 0).all()
    assert (group_advantages(torch.tensor([[0.3, 0.30000001, 0.3]])) == 0).all()


# ---------------------------------------------------------------------------------------- the loss


def plain_loss(logp, logp_old, logp_ref, adv, mask, cfg):
    """The papers' formula, written with loops in Python floats (which are float64)."""
    per_sequence, n_tokens = [], 0
    for i in range(len(adv)):
        terms = []
        for t in range(mask.shape[1]):
            if mask[i, t]:
                lp, old, ref = (float(x[i, t]) for x in (logp, logp_old, logp_ref))
                rho, a = math.exp(lp - old), float(adv[i])
                clipped = min(max(rho, 1 - cfg.clip_low), 1 + cfg.clip_high)
                k3 = math.exp(ref - lp) - (ref - lp) - 1
                kl = rho * k3 if cfg.kl_loss == "k3_ratio" else k3
                terms.append(-min(rho * a, clipped * a) + cfg.kl_coef * kl)
        per_sequence.append(terms)
        n_tokens += len(terms)
    if cfg.loss_norm == "token":
        return sum(map(sum, per_sequence)) / n_tokens
    if cfg.loss_norm == "constant":
        return sum(map(sum, per_sequence)) / (len(adv) * cfg.max_new_tokens)
    return sum(sum(terms) / len(terms) for terms in per_sequence if terms) / len(adv)


def random_batch(seed, N=6, T=11):
    """logp, logp_old, logp_ref (N, T), adv (N,), mask (N, T); float64."""
    g = seeded(seed)
    logp = -3 * torch.rand(N, T, generator=g, dtype=torch.float64)
    noise = 0.4 * torch.randn(2, N, T, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (N,), generator=g)
    adv = torch.randn(N, generator=g, dtype=torch.float64)
    return logp, logp + noise[0], logp + noise[1], adv, torch.arange(T) < lengths[:, None]


CASES = list(itertools.product(NORMS, [0.0, 0.04, 1.0], ["k3", "k3_ratio"], [0.2, 0.28]))


@pytest.mark.parametrize("norm, kl, kl_loss, high", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_the_papers_formula(norm, kl, kl_loss, high, seed):
    cfg = GRPOConfig(loss_norm=norm, kl_coef=kl, kl_loss=kl_loss, clip_high=high, max_new_tokens=13)
    batch = random_batch(seed)
    loss, metrics = grpo_loss(*batch, cfg)
    assert abs(loss.item() - plain_loss(*batch, cfg)) < 1e-6
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_loss_of_large_float64_terms_is_exact_too():
    logp, old, ref, adv, mask = random_batch(5, N=64, T=300)
    batch = logp, old, ref, 1e4 * adv, mask
    for norm in NORMS:
        cfg = GRPOConfig(loss_norm=norm, kl_coef=1.0)
        assert abs(grpo_loss(*batch, cfg)[0].item() - plain_loss(*batch, cfg)) < 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_a_sequence_with_nothing_to_learn_counts_as_zero(norm):
    batch, cfg = random_batch(0), GRPOConfig(loss_norm=norm)
    batch[-1][2] = False
    assert abs(grpo_loss(*batch, cfg)[0].item() - plain_loss(*batch, cfg)) < 1e-6


def loss_of_one_token(ratio, adv, cfg):
    """-> the loss, its gradient with respect to the log-prob, and the metrics."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1)
    loss, metrics = grpo_loss(logp, 0 * one, None, torch.tensor([adv]), one, cfg)
    loss.backward()
    return loss.item(), logp.grad.item(), metrics


@pytest.mark.parametrize("adv, ratio, loss, gradient", [
    (+2.0, 1.5, -2.0 * 1.2, 0.0),         # good, already above the clip: no further push
    (+2.0, 0.5, -2.0 * 0.5, -2.0 * 0.5),  # good, less likely than before: pushed up, unclipped
    (-2.0, 1.5, +2.0 * 1.5, +2.0 * 1.5),  # bad, more likely than before: pushed down, unclipped
    (-2.0, 0.5, +2.0 * 0.8, 0.0),         # bad, already below the clip: no further push
])
def test_the_four_cases_of_the_clip(adv, ratio, loss, gradient):
    got_loss, got_gradient, metrics = loss_of_one_token(ratio, adv, GRPOConfig(kl_coef=0.0))
    assert got_loss == pytest.approx(loss) and got_gradient == pytest.approx(gradient)
    assert metrics["clip"] == (gradient == 0) and metrics["ratio"] == pytest.approx(ratio)


def test_the_upper_and_the_lower_clip_are_separate():
    cfg = GRPOConfig(clip_low=0.1, clip_high=0.5, kl_coef=0.0)
    assert loss_of_one_token(2.0, 1.0, cfg)[0] == pytest.approx(-1.5)
    assert loss_of_one_token(0.2, -1.0, cfg)[0] == pytest.approx(0.9)


def test_kl_is_zero_only_where_policy_and_reference_agree():
    one, adv = torch.ones(1, 3), torch.zeros(1)
    same, far = torch.full((1, 3), -1.0), torch.tensor([[-1.0, -2.0, -0.1]])
    assert grpo_loss(same, same, same, adv, one, GRPOConfig())[1]["kl"] == 0
    _, metrics = grpo_loss(same, same, far, adv, one, GRPOConfig())
    want = (0 + (math.exp(-1.0) + 1 - 1) + (math.exp(0.9) - 0.9 - 1)) / 3
    assert metrics["kl"] == pytest.approx(want, rel=1e-5)


POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
EXACT_KL = (POLICY * (POLICY / REFERENCE).log()).sum().item()


def kl_term(kl_loss, logits, sampled_with):
    """The loss's KL term of one token, as the exact expectation over what `sampled_with` samples: a
    row for each token, weighted by that token's probability."""
    cfg, logp = pick(GRPOConfig, {"kl_loss": kl_loss, "kl_coef": 1.0}), logits.log_softmax(dim=0)
    columns = [x[:, None] for x in (logp, sampled_with.log(), REFERENCE.log())]
    return grpo_loss(*columns, torch.zeros(3), torch.ones(3, 1), cfg, weights=sampled_with)[0]


def exact_kl(a, b):
    return (a * (a.log() - b.log())).sum()


@pytest.mark.parametrize("kl_loss", ["k3", "k3_ratio"])
def test_the_kl_term_of_the_loss_averages_to_the_exact_kl(kl_loss):
    assert kl_term(kl_loss, POLICY.log(), POLICY).item() == pytest.approx(EXACT_KL, abs=1e-12)


def test_the_kl_gradient_is_exact_with_the_ratio_and_that_of_the_reverse_kl_without():
    logits = POLICY.log().requires_grad_()
    policy = logits.softmax(dim=0)
    exact = torch.autograd.grad(exact_kl(policy, REFERENCE), logits, retain_graph=True)[0]
    reverse = torch.autograd.grad(exact_kl(REFERENCE, policy), logits)[0]
    assert (exact - reverse).abs().max() > 0.01
    for kl_loss, want in (("k3", reverse), ("k3_ratio", exact)):
        got = torch.autograd.grad(kl_term(kl_loss, logits, POLICY), logits)[0]
        assert torch.allclose(got, want, rtol=0, atol=1e-12), kl_loss


def test_with_the_ratio_value_and_gradient_are_exact_for_an_older_policys_samples_too():
    logits = POLICY.log().requires_grad_()
    older = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    got, want = kl_term("k3_ratio", logits, older), exact_kl(logits.softmax(dim=0), REFERENCE)
    assert got.item() == pytest.approx(want.item(), abs=1e-12)
    got, want = (torch.autograd.grad(x, logits)[0] for x in (got, want))
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_the_kl_metric_averages_to_the_exact_kl_and_the_entropy_metric_to_the_entropy():
    token = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # each as often as its probability says
    logp, logp_ref = POLICY.log()[token][:, None], REFERENCE.log()[token][:, None]
    _, metrics = grpo_loss(logp, logp, logp_ref, torch.zeros(10), torch.ones(10, 1), GRPOConfig())
    assert metrics["kl"] == pytest.approx(EXACT_KL, abs=1e-12)
    assert metrics["entropy"] == pytest.approx(-(POLICY * POLICY.log()).sum().item(), abs=1e-12)


def test_the_sampler_kl_metric_averages_to_the_exact_kl_from_the_sampler_to_the_trainer():
    token = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # each as often as the sampler says
    logp_old, logp = POLICY.log()[token][:, None], REFERENCE.log()[token][:, None]
    _, metrics = grpo_loss(logp, logp_old, None, torch.zeros(10), torch.ones(10, 1), GRPOConfig())
    assert metrics["sampler_kl"] == pytest.approx(EXACT_KL, abs=1e-12)
    assert metrics["log_ratio"] == pytest.approx(-EXACT_KL, abs=1e-12)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-12)


def test_the_kl_gradient_depends_on_the_reference():
    one, adv, cfg = torch.ones(1, 1), torch.zeros(1), GRPOConfig(kl_coef=1.0)
    gradients = []
    for logp_ref in (-1.0, -2.0):
        logp = torch.full((1, 1), -1.5, requires_grad=True)
        grpo_loss(logp, logp.detach(), logp_ref * one, adv, one, cfg)[0].backward()
        gradients.append(logp.grad.item())
    assert gradients[0] < 0 < gradients[1]  # log-probs are pulled up to the reference, and down


def test_what_lies_outside_the_mask_cannot_matter():
    logp, old, ref, adv, mask = random_batch(3)
    want, metrics = grpo_loss(logp, old, ref, adv, mask, GRPOConfig())
    for junk in (1e4, -1e4, torch.inf, torch.nan):
        dirty = [torch.where(mask, x, junk).requires_grad_() for x in (logp, old, ref)]
        loss, again = grpo_loss(*dirty, adv, mask, GRPOConfig())
        loss.backward()
        assert loss.item() == want.item() and again == metrics
        gradient = dirty[0].grad
        assert torch.isfinite(gradient).all() and (gradient[~mask] == 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_parts_of_a_batch_add_up_to_the_whole(norm):
    logp, old, ref, adv, mask = random_batch(4)
    cfg = GRPOConfig(loss_norm=norm)
    whole, metrics = grpo_loss(logp, old, ref, adv, mask, cfg)
    n_tokens = mask.sum(dim=1)
    weights, total_loss, total = token_weights(n_tokens, 6, cfg), 0.0, dict.fromkeys(metrics, 0.0)
    for r in ([0, 3], [1], [2, 4, 5]):
        loss, means = grpo_loss(logp[r], old[r], ref[r], adv[r], mask[r], cfg, weights[r])
        total_loss += loss.item()
        for name, mean in means.items():  # a part's means count by its share of the tokens
            total[name] += mean * (n_tokens[r].sum() / n_tokens.sum()).item()
    assert total_loss == pytest.approx(whole.item(), abs=1e-6)
    assert total == pytest.approx(metrics, abs=1e-6)


def test_metrics_are_means_over_tokens_whatever_the_loss_weighs():
    batch = random_batch(4)
    first, *others = [grpo_loss(*batch, GRPOConfig(loss_norm=norm))[1] for norm in NORMS]
    assert all(other == first for other in others)
    logp, old, _, _, mask = batch
    assert first["ratio"] == pytest.approx((logp - old).exp()[mask].mean().item(), abs=1e-12)
    assert first["entropy"] == pytest.approx(-old[mask].mean().item(), abs=1e-12)


def test_token_weights_by_hand():
    def weights(norm, N=2):
        cfg = GRPOConfig(loss_norm=norm, max_new_tokens=10)
        return token_weights(torch.tensor([1, 4]), N, cfg).tolist()

    assert weights("sequence") == [1 / 2, 1 / 8]
    assert weights("token") == [1 / 5, 1 / 5]
    assert weights("constant") == [1 / 20, 1 / 20]
    # Two more completions were truncated and left out: they count as completions without tokens.
    assert weights("sequence", 4) == [1 / 4, 1 / 16]
    assert weights("token", 4) == [1 / 5, 1 / 5]
    assert weights("constant", 4) == [1 / 40, 1 / 40]


# -------------------------------------------------------------------------------------- the update

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
SMALL = GRPOConfig(prompts_per_step=3, group_size=4, max_new_tokens=24, temperature=0.8,
                   kl_coef=0.05, max_grad_norm=1e9)
NO_KL = replace(SMALL, kl_coef=0.0)


def set_rewards(groups, rewards, cfg=SMALL):
    """Gives the samples of all groups these rewards (P, G), and their advantages."""
    rewards = torch.tensor(rewards)
    adv = group_advantages(rewards, cfg.adv_norm)
    for i, group in enumerate(groups):
        for j, sample in enumerate(group):
            sample.reward, sample.adv = rewards[i, j].item(), adv[i, j].item()


def rollout(model, cfg=SMALL, prompts=PROMPTS):
    """Groups of samples. The reward is 1 for completions with an even number of tokens: something
    to learn that needs no text."""
    G = cfg.group_size
    completions = generate(model, prompts, G, cfg.max_new_tokens, cfg.temperature, (1, 2), seeded())
    samples = [Sample(**vars(c)) for c in completions]
    groups = [samples[i:i + G] for i in range(0, len(samples), G)]
    set_rewards(groups, [[float(len(s.ids) % 2 == 0) for s in group] for group in groups], cfg)
    return groups


def flat(groups):
    return [sample for group in groups for sample in group]


def sgd(model, lr=1.0):
    return [torch.optim.SGD(model.parameters(), lr=lr)]


def vector(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def change(model, ref, groups, cfg):
    """What one update does to the weights, as one vector, and its metrics."""
    model = copy.deepcopy(model)
    before = vector(model.parameters())
    metrics = update_policy(model, ref, sgd(model), groups, cfg, seeded())
    return vector(model.parameters()) - before, metrics


def whole_batch_gradient(model, ref, samples, n_completions, cfg):
    """The gradient of the loss of all samples at once, as one vector, and the loss. Padding takes
    part in every forward pass here, and `n_completions` may count some that were left out."""
    model = copy.deepcopy(model)
    tokens, mask, logp_old, adv = collate(samples, "cpu")
    logp, logp_ref = (token_logps(m, tokens, cfg.temperature) for m in (model, ref))
    weights = token_weights(mask.sum(dim=1), n_completions, cfg)
    loss, _ = grpo_loss(logp, logp_old, logp_ref.detach(), adv, mask, cfg, weights)
    loss.backward()
    return vector(p.grad for p in model.parameters()), loss.item()


def shifted(model):
    """A reference that differs from the policy."""
    ref, generator = copy.deepcopy(model), seeded(7)
    with torch.no_grad():
        for p in ref.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return ref


def near(a, b, tolerance=1e-5):
    return (a - b).norm() <= tolerance * b.norm()


def test_a_prompt_sits_before_its_completion_and_padding_behind():
    # The second ends with token 0, which is what rows are padded with: it is still learnt.
    samples = [Sample([5, 6, 7], [8, 9, 1], torch.tensor([-1.0, -2.0, -3.0]), False, adv=0.5),
               Sample([4], [3, 0], torch.tensor([-4.0, -5.0]), False, adv=-0.5),
               Sample([4, 4], [7, 7, 7, 7, 7], torch.full((5,), -6.0), True, adv=0.0)]
    tokens, mask, logp_old, adv = collate(samples, "cpu")
    assert tokens.tolist() == [[5, 6, 7, 8, 9, 1, 0], [4, 3, 0, 0, 0, 0, 0], [4, 4, 7, 7, 7, 7, 7]]
    assert mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert logp_old.tolist() == [[0, 0, -1, -2, -3, 0], [-4, -5, 0, 0, 0, 0], [0] + [-6] * 5]
    assert adv.tolist() == [0.5, -0.5, 0.0]
    for row, kept, sample in zip(tokens, mask, samples, strict=True):
        assert row[1:][kept].tolist() == sample.ids
        assert row[:len(sample)].tolist() == sample.prompt + sample.ids


def test_at_the_first_step_the_ratio_is_one_and_nothing_is_clipped(tiny):
    groups = rollout(tiny)
    tokens, mask, logp_old, _ = collate(flat(groups), "cpu")
    logp = token_logps(tiny, tokens, SMALL.temperature)
    assert torch.allclose(logp[mask], logp_old[mask], atol=1e-4)
    _, metrics = change(tiny, copy.deepcopy(tiny), groups, SMALL)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-4) and metrics["clip"] == 0
    assert metrics["log_ratio"] == pytest.approx(0, abs=1e-4)
    assert metrics["sampler_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)  # all at the same temperature
    assert metrics["entropy"] == pytest.approx(-logp_old[mask].mean().item(), rel=1e-4)


def test_a_sampler_in_bfloat16_shows_in_ratio_and_sampler_kl(tiny):
    for p in tiny.parameters():
        p.data /= 2  # not quite so far from uniform: bfloat16 has three digits
    _, exact = change(tiny, None, rollout(tiny), NO_KL)
    _, rounded = change(tiny, None, rollout(sampling_copy(tiny, torch.bfloat16)), NO_KL)
    assert exact["sampler_kl"] < 1e-6 and exact["log_ratio"] == pytest.approx(0, abs=1e-5)
    assert 1e-6 < rounded["sampler_kl"] < 0.01 and 1e-5 < abs(rounded["log_ratio"]) < 0.05
    assert rounded["ratio"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_at_the_first_step_the_mean_ratio_is_one_for_every_loss_norm(tiny, norm, mask_truncated):
    groups = rollout(tiny)
    for i, sample in enumerate(flat(groups)):
        sample.truncated = i % 2 == 0
    for micro_tokens in (40, 2048):
        cfg = replace(NO_KL, loss_norm=norm, mask_truncated=mask_truncated,
                      micro_tokens=micro_tokens)
        _, metrics = change(tiny, None, groups, cfg)
        assert metrics["ratio"] == pytest.approx(1, abs=1e-4) and metrics["clip"] == 0


@pytest.mark.parametrize("norm", NORMS)
def test_the_step_follows_the_gradient_of_the_whole_batch(tiny, norm):
    cfg, ref, groups = replace(SMALL, loss_norm=norm), shifted(tiny), rollout(tiny)
    gradient, loss = whole_batch_gradient(tiny, ref, flat(groups), 12, cfg)
    got, metrics = change(tiny, ref, groups, cfg)
    assert gradient.norm() > 0.01 and near(got, -gradient)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_depend_neither_on_micro_batches_nor_on_padding(tiny, norm, monkeypatch):
    cfg, ref, groups = replace(SMALL, loss_norm=norm), shifted(tiny), rollout(tiny)
    want, metrics = change(tiny, ref, groups, cfg)

    def padded(samples, device):  # nine more columns, which hold token 3
        tokens, mask, logp_old, adv = collate(samples, device)
        return F.pad(tokens, (0, 9), value=3), F.pad(mask, (0, 9)), F.pad(logp_old, (0, 9)), adv

    for how, micro_tokens in [(collate, 1), (collate, 40), (padded, 100), (padded, 10**6)]:
        monkeypatch.setattr(grpo, "collate", how)
        got, again = change(tiny, ref, groups, replace(cfg, micro_tokens=micro_tokens))
        assert near(got, want) and again == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_micro_batches_hold_every_row_once_within_the_budget_neighbours_in_length(
        tiny, monkeypatch):
    lengths = [5, 40, 7, 33, 6, 39, 5, 8]
    samples = [Sample([3], [4] * (n - 1), torch.zeros(n - 1), False, adv=1.0) for n in lengths]
    seen = []

    def recording(samples, device):
        seen.append([len(sample) for sample in samples])
        return collate(samples, device)

    monkeypatch.setattr(grpo, "collate", recording)
    change(tiny, None, [samples[:4], samples[4:]], replace(NO_KL, micro_tokens=80))
    assert sum(seen, []) == sorted(lengths, reverse=True)
    assert all(len(part) * max(part) <= 80 for part in seen) and len(seen) < 6


@pytest.mark.parametrize("norm", NORMS)
def test_truncated_completions_leave_the_loss_but_stay_in_the_baseline(tiny, norm):
    cfg, ref, groups = replace(SMALL, loss_norm=norm), shifted(tiny), rollout(tiny)
    for group in groups:  # the advantages are still of all four, not of the two that remain
        for sample, truncated in zip(group, (True, False, False, True), strict=True):
            sample.truncated = truncated
    kept = [sample for sample in flat(groups) if not sample.truncated]
    gradient, _ = whole_batch_gradient(tiny, ref, kept, 12, cfg)
    got, _ = change(tiny, ref, groups, replace(cfg, mask_truncated=True))
    assert near(got, -gradient)
    assert not near(got, change(tiny, ref, groups, cfg)[0], 1e-2)


def test_a_minibatch_of_nothing_but_truncated_completions_moves_nothing(tiny):
    groups = rollout(tiny)
    for sample in flat(groups):
        sample.truncated = True
    for norm in NORMS:
        cfg = replace(SMALL, loss_norm=norm, mask_truncated=True, minibatches=2)
        moved, metrics = change(tiny, shifted(tiny), groups, cfg)
        assert (moved == 0).all() and metrics["grad_norm"] == metrics["skipped"] == 0


def test_later_inner_epochs_are_measured_against_the_sampling_policy(tiny):
    groups, model = rollout(tiny), copy.deepcopy(tiny)
    once, twice = (update_policy(model, None, sgd(model, 0.05), groups, NO_KL, seeded())
                   for _ in range(2))
    assert abs(once["ratio"] - 1) < 1e-4 < abs(twice["ratio"] - 1)
    cfg = replace(NO_KL, inner_epochs=2)
    both = update_policy(tiny, None, sgd(tiny, 0.05), groups, cfg, seeded())
    assert both["ratio"] == pytest.approx((once["ratio"] + twice["ratio"]) / 2, abs=1e-4)


class Counting(torch.optim.SGD):
    steps = 0

    def step(self):
        self.steps += 1
        super().step()


def test_minibatches_split_the_rollout_into_that_many_optimiser_steps(tiny):
    optimizer = Counting(tiny.parameters(), lr=0.01)
    cfg, ref = replace(SMALL, inner_epochs=2, minibatches=3), copy.deepcopy(tiny)
    metrics = update_policy(tiny, ref, [optimizer], rollout(tiny), cfg, seeded())
    assert optimizer.steps == 6 and metrics["kl"] > 0


def test_eight_completions_make_five_minibatches_if_five_are_asked_for(tiny, monkeypatch):
    groups, seen = rollout(tiny, prompts=PROMPTS[:2]), []

    def recording(samples, device):
        seen.append(samples)
        return collate(samples, device)

    monkeypatch.setattr(grpo, "collate", recording)
    optimizer = Counting(tiny.parameters(), lr=0.01)
    update_policy(tiny, None, [optimizer], groups, replace(NO_KL, minibatches=5), seeded())
    assert optimizer.steps == 5 and sorted(map(len, seen)) == [1, 1, 2, 2, 2]
    assert sorted(map(id, sum(seen, []))) == sorted(map(id, flat(groups)))


def some_equal(tiny):
    groups = rollout(tiny)
    set_rewards(groups, [[1.0] * 4, [0.0, 1.0, 1.0, 0.0], [0.5] * 4])
    return groups


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_kl_leaving_out_what_has_no_advantage_changes_no_gradient(
        tiny, monkeypatch, norm):
    # The reference with a KL weight of 0 keeps every completion in the update.
    cfg, learnt, weights = replace(NO_KL, loss_norm=norm), [], []
    collated = grpo.collate

    def counting(samples, device):
        learnt[-1] += len(samples)
        return collated(samples, device)

    monkeypatch.setattr(grpo, "collate", counting)
    for ref in (None, copy.deepcopy(tiny)):
        learnt.append(0)
        policy = copy.deepcopy(tiny)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        update_policy(policy, ref, [optimizer], some_equal(tiny), cfg, seeded())
        weights.append(vector(policy.parameters()))
    assert learnt == [4, 12] and torch.allclose(*weights, atol=1e-6)


def test_with_a_kl_they_are_left_out_on_request_and_the_denominator_stays(tiny):
    groups, ref = some_equal(tiny), shifted(tiny)
    moved = []
    for skip, chosen in ((True, groups), (False, groups[1:2]), (False, groups)):
        policy, cfg = copy.deepcopy(tiny), replace(SMALL, kl_coef=0.1, skip_equal=skip)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        update_policy(policy, ref, [optimizer], chosen, replace(cfg, max_grad_norm=1e9), seeded())
        moved.append(vector(policy.parameters()) - vector(tiny.parameters()))
    skipped, alone, everything = moved
    assert torch.allclose(3 * skipped, alone, atol=1e-6)  # one group of three
    assert not torch.allclose(skipped, everything, atol=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_a_step_whose_rewards_are_all_equal_changes_no_weight(tiny, kind, kl_coef):
    # Neither optimiser looks at the size of a gradient: what momentum and a small KL leave of it
    # would make a step of full size.
    cfg, ref = replace(SMALL, kl_coef=kl_coef), shifted(tiny) if kl_coef else None
    optimizers, groups = make_optimizers(tiny, 1e-2, kind), rollout(tiny)
    equal = copy.deepcopy(groups)
    set_rewards(equal, [[1.0] * 4, [0.0] * 4, [0.5] * 4])
    for _ in range(3):  # before any other step, after one, and after two
        before = vector(tiny.parameters()).clone()
        metrics = update_policy(tiny, ref, optimizers, equal, cfg, seeded())
        assert torch.equal(vector(tiny.parameters()), before)
        assert all(p.grad is None for p in tiny.parameters()) and metrics["skipped"] == 0
        assert bool(metrics["grad_norm"]) == bool(kl_coef)  # it is the KL's
        update_policy(tiny, ref, optimizers, groups, cfg, seeded())
        assert not torch.equal(vector(tiny.parameters()), before)


def test_a_minibatch_without_any_advantage_takes_no_step(tiny):
    groups, ref = rollout(tiny), shifted(tiny)
    for sample in flat(groups):
        sample.adv = 0.0
    groups[1][2].adv = 1.0
    optimizer = Counting(tiny.parameters(), lr=0.01)
    cfg = replace(SMALL, inner_epochs=2, minibatches=4)
    update_policy(tiny, ref, [optimizer], groups, cfg, seeded())
    assert optimizer.steps == 2  # each epoch shuffles: one of its four holds that completion


def test_a_minibatch_that_takes_no_step_leaves_nothing_to_the_next(tiny, monkeypatch):
    groups, ref = rollout(tiny, prompts=PROMPTS[:2]), shifted(tiny)
    for sample in flat(groups[:1]):
        sample.adv = 0.0
    assert any(sample.adv for sample in groups[1])
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    both, _ = change(tiny, ref, groups, replace(SMALL, minibatches=2))
    alone, _ = change(tiny, ref, groups[1:], SMALL)
    assert near(both, alone)


def test_good_completions_become_more_likely_and_bad_ones_less_likely(tiny):
    groups, model = rollout(tiny), copy.deepcopy(tiny)
    update_policy(model, None, sgd(model, 1e-3), groups, NO_KL, seeded())
    tokens, mask, _, adv = collate(flat(groups), "cpu")
    gain = token_logps(model, tokens, 0.8, mask) - token_logps(tiny, tokens, 0.8, mask)
    gain = gain.sum(dim=1) / mask.sum(dim=1) * adv.abs()
    assert gain[adv > 0].sum() > 0 > gain[adv < 0].sum()


def test_a_step_is_no_longer_than_the_largest_gradient(tiny):
    groups = rollout(tiny)
    whole, metrics = change(tiny, None, groups, NO_KL)
    clipped, same = change(tiny, None, groups, replace(NO_KL, max_grad_norm=0.01))
    assert metrics["grad_norm"] == pytest.approx(same["grad_norm"]) and same["grad_norm"] > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(clipped / clipped.norm(), whole / whole.norm(), atol=1e-4)


def test_a_minibatch_without_a_step_does_not_hide_that_all_steps_are_skipped(tiny, monkeypatch):
    groups = rollout(tiny, prompts=PROMPTS[:2])
    for sample in groups[0]:
        sample.adv = 0.0
    for sample in groups[1]:
        sample.logps = torch.full_like(sample.logps, float("nan"))
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    step, metrics = change(tiny, shifted(tiny), groups, replace(SMALL, minibatches=2))
    assert metrics["skipped"] == 1 and not step.any()


def test_a_minibatch_that_diverged_shows_in_the_metrics(tiny):
    groups = rollout(tiny, prompts=PROMPTS[:2])
    groups[0][0].logps = torch.full_like(groups[0][0].logps, float("nan"))
    _, metrics = change(tiny, shifted(tiny), groups, replace(SMALL, minibatches=4))
    assert 0 < metrics["skipped"] < 1
    for name in ("loss", "ratio", "sampler_kl", "entropy", "grad_norm"):
        assert math.isnan(metrics[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_on_cuda_is_the_cpus(tiny, autocast):
    found = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(tiny).to(device)
        model.autocast = autocast and device == "cuda"
        groups = rollout(copy.deepcopy(tiny).to(device))
        step, metrics = change(model, shifted(tiny).to(device), groups, SMALL)
        found.append((step.cpu(), metrics))
    (a, m), (b, n) = found
    assert (a - b).norm() < (0.1 if autocast else 1e-3) * a.norm() > 0
    assert n["ratio"] == pytest.approx(m["ratio"], abs=0.1 if autocast else 1e-4)
    assert n["skipped"] == 0


def test_a_rollout_is_never_changed_by_a_step(tiny):
    groups = rollout(tiny)
    before = copy.deepcopy(groups)
    change(tiny, shifted(tiny), groups, replace(SMALL, inner_epochs=2, minibatches=2))
    assert [len(group) for group in groups] == [4, 4, 4]
    for sample, old in zip(flat(groups), flat(before), strict=True):
        assert torch.equal(sample.logps, old.logps)
        assert {**vars(sample), "logps": 0} == {**vars(old), "logps": 0}


def test_gradients_that_are_not_finite_change_nothing(tiny):
    groups, model = rollout(tiny), copy.deepcopy(tiny)
    for sample in flat(groups):
        sample.logps = torch.full_like(sample.logps, torch.nan)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1)]
    metrics = update_policy(model, None, optimizers, groups, NO_KL, seeded())
    assert metrics["skipped"] == 1 and all(p.grad is None for p in model.parameters())
    assert torch.equal(vector(model.parameters()), vector(tiny.parameters()))


def test_autocast_does_not_span_optimiser_steps(tiny):
    # As long as one autocast context lasts, torch keeps its first bfloat16 copies of the matrices.
    # If it lasted for all of these steps, the ratio would stay near 1 and little would be clipped.
    groups, cfg = rollout(tiny), replace(NO_KL, inner_epochs=2, minibatches=2)

    def update(autocast, context):
        policy = copy.deepcopy(tiny)
        policy.autocast = autocast
        with context:
            return update_policy(policy, None, sgd(policy, 0.09), groups, cfg, seeded())

    fp32, rounded = update(False, nullcontext()), update(True, nullcontext())
    assert fp32["clip"] > 0.2 and fp32["ratio"] > 1.05
    assert rounded["clip"] == pytest.approx(fp32["clip"], abs=0.03)
    assert rounded["ratio"] == pytest.approx(fp32["ratio"], abs=0.02)
    spanning = update(True, torch.autocast("cpu", dtype=torch.bfloat16))
    assert spanning["clip"] < 0.5 * fp32["clip"] and spanning["ratio"] < 1.03


# ---------------------------------------------------------------------------------------- the loop


class Env:
    """Problems are numbers. A completion's text is its ids, and it is right if their count is even,
    or else its rewards come from a script: a list of rewards for each call of `reward`."""
    stop_ids, find_end = (1, 2), None

    def __init__(self, script=None):
        self.script, self.drawn, self.texts = script, [], []

    def draw(self, rng):
        self.drawn.append(rng.randrange(3, 40))
        return self.drawn[-1], [self.drawn[-1], 5]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def reward(self, samples):
        self.texts.append([(sample.problem, sample.text) for sample in samples])
        rewards = [float(len(sample.ids) % 2 == 0) for sample in samples]
        if self.script:
            rewards = self.script[len(self.texts) - 1]
        return rewards, [{"accuracy": reward} for reward in rewards]


class Run:
    """Remembers all that the loop reports. What it has at the end of step `stop` is a checkpoint,
    from which another run goes on."""
    name, seed = "zero", 1

    def __init__(self, stop=0, checkpoint=None, sample_dtype=torch.float32):
        self.stop, self.checkpoint, self.sample_dtype = stop, checkpoint, sample_dtype
        self.seconds, self.metrics, self.table, self.lines = 0.0, [], [], []
        self.lr, self.weights, self.references, self.samplers = [], [], [], []

    def resume(self, policy, optimizers, ref):
        if self.checkpoint is None:
            return 0
        policy.load_state_dict(self.checkpoint["policy"])
        for optimizer, state in zip(optimizers, self.checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return self.checkpoint["step"]

    def log(self, metrics, row):
        self.metrics.append(metrics)
        self.table.append(row)

    def append(self, file, line):
        self.lines.append((file, line))

    def end_step(self, step, n_steps, policy, optimizers, ref):
        self.lr.append(optimizers[-1].param_groups[0]["lr"])
        self.weights.append(vector(policy.parameters()).clone())
        same = ref and torch.equal(vector(ref.parameters()), vector(policy.parameters()))
        self.references.append(same)
        if step == self.stop:
            state = {"step": step, "policy": policy.state_dict(),
                     "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            self.checkpoint = copy.deepcopy(state)

    def evaluate(self, sampler):
        self.samplers.append((len(self.metrics), copy.deepcopy(sampler)))


LOOP = replace(NO_KL, rl_steps=1, rl_lr=0.01, prompts_per_step=3, group_size=2, max_new_tokens=11)


@pytest.fixture
def learnt_from(monkeypatch):
    """The groups that each update learns from."""
    seen = []

    def recording(policy, ref, optimizers, groups, cfg, generator):
        seen.append(groups)
        return update_policy(policy, ref, optimizers, groups, cfg, generator)

    monkeypatch.setattr(grpo, "update_policy", recording)
    return seen


def test_the_loop_keeps_problem_order_and_rewards_every_completion(tiny, learnt_from):
    env, cfg = Env([list(range(12))]), replace(LOOP, group_size=4)
    train_grpo(tiny, None, env, Run(), cfg)
    groups = learnt_from[0]
    assert [[s.reward for s in group] for group in groups] == [[0, 1, 2, 3], [4, 5, 6, 7],
                                                               [8, 9, 10, 11]]
    problems = [problem for problem in env.drawn for _ in range(4)]
    assert env.texts == [[(p, s.text) for p, s in zip(problems, flat(groups), strict=True)]]
    for problem, sample in zip(problems, flat(groups), strict=True):
        assert sample.prompt == [problem, 5] and sample.text == env.decode(sample.ids)
        assert sample.parts == {"accuracy": sample.reward}
    want = group_advantages(torch.arange(12.0).view(3, 4))
    assert torch.equal(torch.tensor([[s.adv for s in group] for group in groups]), want)


def test_a_reward_of_the_loop_is_learnt(tiny):
    run = Run()
    train_grpo(tiny, None, Env(), run, replace(LOOP, rl_steps=16, rl_lr=0.02, group_size=8))
    rewards = [metrics["reward"] for metrics in run.metrics]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2


def test_groups_that_teach_nothing_are_replaced_until_none_is_left(tiny, learnt_from):
    # Two groups were equal, then one of the two new ones; after that none.
    env = Env([[1.0, 0.0, 0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [0.0, 1.0]])
    run, sampled_with = Run(), copy.deepcopy(tiny)
    train_grpo(tiny, None, env, run, replace(LOOP, dynamic_sampling=3))
    assert list(map(len, env.texts)) == [6, 4, 2]
    groups = learnt_from[0]
    assert [[s.reward for s in group] for group in groups] == [[1, 0], [1, 0], [0, 1]]
    kept = [env.drawn[i] for i in (0, 4, 5)]
    assert [s.prompt for s in flat(groups)] == [[p, 5] for p in kept for _ in range(2)]
    for s in flat(groups):
        again = token_logps(sampled_with, torch.tensor([s.prompt + s.ids]), 0.8)
        assert torch.allclose(again[0, 1:], s.logps, atol=1e-4)
    metrics = run.metrics[0]  # of all six groups that were sampled
    assert metrics["reward"] == pytest.approx(7 / 12)
    assert metrics["zero_variance"] == pytest.approx(3 / 6)
    assert metrics["all_right"] == pytest.approx(2 / 6)
    assert metrics["all_wrong"] == pytest.approx(1 / 6)


def test_a_group_that_is_never_right_counts_as_all_wrong_whatever_its_tags_earn():
    def group(right, tags):
        parts = [{"accuracy": a, "format": f} for a, f in zip(right, tags, strict=True)]
        rewards = [part["accuracy"] + part["format"] for part in parts]
        adv = group_advantages(torch.tensor([rewards])).flatten().tolist()
        return [Sample([1], [2], torch.zeros(1), False, text="", reward=r, parts=p, adv=a)
                for r, p, a in zip(rewards, parts, adv, strict=True)]

    update = dict.fromkeys(("kl", "entropy", "grad_norm", "skipped"), 0.0)
    groups = [group([0.0, 0.0], [1.0, 0.0]), group([1.0, 1.0], [1.0, 0.0]),
              group([1.0, 0.0], [1.0, 1.0]), group([0.0, 0.0], [1.0, 1.0])]
    run = Run()
    grpo.log_step(run, 2, groups, update, 1.0, 0.5, GRPOConfig())
    found = run.metrics[0]
    assert (found["all_wrong"], found["all_right"], found["zero_variance"]) == (0.5, 0.25, 0.25)
    for samples in groups:  # nothing rewards accuracy: unknown, not 0
        for sample in samples:
            sample.parts = {"format": 1.0}
    grpo.log_step(run, 2, groups, update, 1.0, 0.5, GRPOConfig())
    assert math.isnan(run.metrics[1]["all_wrong"]) and math.isnan(run.metrics[1]["all_right"])


def test_dynamic_sampling_tries_so_often_and_no_more(tiny, learnt_from):
    for times in (0, 2):
        env = Env([[0.0, 0.0]] * (1 + times))
        train_grpo(tiny, None, env, Run(),
                   replace(LOOP, prompts_per_step=1, dynamic_sampling=times))
        assert list(map(len, env.texts)) == [2] * (1 + times)
        assert [s.reward for s in flat(learnt_from[-1])] == [0, 0]
        assert learnt_from[-1][0][0].prompt == [env.drawn[-1], 5]


def test_every_step_is_logged_and_every_tenth_leaves_a_group_to_read(tiny, learnt_from):
    env, run = Env(), Run()
    train_grpo(tiny, None, env, run, replace(LOOP, rl_steps=11, minibatches=2))
    assert [metrics["step"] for metrics in run.metrics] == list(range(1, 12))
    assert [row["step"] for row in run.table] == [f"{step}/11" for step in range(1, 12)]
    for metrics, groups in zip(run.metrics, learnt_from, strict=True):
        samples, n = flat(groups), 6
        assert metrics["reward"] == pytest.approx(sum(s.reward for s in samples) / n)
        assert metrics["reward/accuracy"] == metrics["reward"]
        assert metrics["length"] == pytest.approx(sum(len(s.ids) for s in samples) / n)
        assert metrics["truncated"] == pytest.approx(sum(s.truncated for s in samples) / n)
        equal = sum(not any(s.adv for s in group) for group in groups)
        assert metrics["zero_variance"] == pytest.approx(equal / 3)
        assert metrics["sample_s"] > 0 and metrics["update_s"] > 0
        for name in ("loss", "ratio", "log_ratio", "sampler_kl", "kl", "clip", "entropy",
                     "grad_norm", "skipped"):
            unknown = equal == 3 and name in grpo.MEANS or name == "kl"  # there is no reference
            assert math.isfinite(metrics[name]) != unknown  # nan, not a misleading 0
    assert run.seconds == run.metrics[-1]["seconds"] > run.metrics[0]["seconds"] > 0
    assert {file for file, _ in run.lines} == {"rollouts.jsonl"}
    lines = [line for _, line in run.lines]
    assert [line["step"] for line in lines] == [1, 1, 11, 11]
    written = learnt_from[0][0] + learnt_from[10][0]
    for line, s in zip(lines, written, strict=True):
        assert line["text"] == s.text and line["reward"] == s.reward
        assert line["advantage"] == s.adv and line["problem"] == str(s.problem)
        assert line["rewards"] == s.parts


def test_a_reward_with_nothing_to_say_of_a_problem_is_left_out_of_its_mean(tiny):
    class Partial(Env):
        def reward(self, samples):
            rewards, _ = super().reward(samples)
            unknown = float("nan")
            return rewards, [{"a": 1.0 if i == 0 else unknown, "b": unknown} for i in range(6)]

    run = Run()
    train_grpo(tiny, None, Partial(), run, LOOP)
    assert run.metrics[0]["reward/a"] == 1 and math.isnan(run.metrics[0]["reward/b"])


def test_a_completion_ends_where_the_environment_says(tiny):
    class Ends(Env):
        stop_ids = ()

        @staticmethod
        def find_end(ids):
            return 3 if len(ids) >= 3 else 0

    run, env = Run(), Ends()
    train_grpo(tiny, None, env, run, LOOP)
    texts = [text for _, text in env.texts[0]]
    assert {len(text.split()) for text in texts} == {3} and run.metrics[0]["truncated"] == 0


def test_a_step_that_is_skipped_says_so_in_the_table(tiny):
    run, before = Run(), vector(tiny.parameters()).clone()
    train_grpo(tiny, None, Env([[float("nan")] * 6]), run, LOOP)
    assert run.metrics[0]["skipped"] == 1 and run.table[0]["grad"] == "SKIPPED"
    assert torch.equal(vector(tiny.parameters()), before)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_draws_and_learns_what_an_uninterrupted_one_would_have(tiny, optimizer):
    cfg = replace(LOOP, rl_steps=5, rl_optimizer=optimizer, dynamic_sampling=1, inner_epochs=2)
    policies, envs, runs = [], [], [Run(stop=2)]
    for i in range(2):
        policies.append(copy.deepcopy(tiny))
        envs.append(Env())
        train_grpo(policies[i], None, envs[i], runs[i], cfg)
        runs.append(Run(checkpoint=runs[0].checkpoint))
    whole, resumed = envs
    assert 0 < len(resumed.drawn) < len(whole.drawn)
    assert resumed.drawn == whole.drawn[-len(resumed.drawn):]
    assert resumed.texts == whole.texts[-len(resumed.texts):]
    timings = ("tokens_per_s", "sample_s", "update_s", "seconds")
    logs = [[{k: v for k, v in metrics.items() if k not in timings} for metrics in run.metrics]
            for run in runs[:2]]
    assert [metrics["step"] for metrics in logs[1]] == [3, 4, 5]
    assert str(logs[0][2:]) == str(logs[1])  # of nan too
    assert torch.equal(vector(policies[0].parameters()), vector(policies[1].parameters()))


def test_another_seed_and_another_stage_draw_otherwise(tiny):
    drawn = []
    for name, seed in (("zero", 1), ("zero", 2), ("r1", 1)):
        env, run = Env(), Run()
        run.name, run.seed = name, seed
        train_grpo(copy.deepcopy(tiny), None, env, run, LOOP)
        drawn.append(tuple(env.drawn))
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("decay, want", [
    (0.0, [0.5, 1, 1, 1, 1, 1, 1, 1]), (0.5, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    (1.0, [0.5, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])])
def test_the_learning_rate_rises_and_falls_at_the_end(tiny, decay, want):
    run, cfg = Run(), replace(LOOP, rl_steps=8, rl_lr=1e-6, rl_warmup=2, rl_decay=decay)
    train_grpo(tiny, None, Env(), run, cfg)
    assert run.lr == pytest.approx([1e-6 * factor for factor in want])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_steps_of_the_loop_whose_rewards_are_all_equal_leave_the_policy_where_it_was(tiny, kind):
    run, equal = Run(), [1.0] * 6
    env = Env([equal, [1.0, 0.0] * 3, equal, equal, [0.0, 1.0] * 3])
    cfg = replace(LOOP, rl_steps=5, rl_optimizer=kind, kl_coef=0.05)
    before, ref = vector(tiny.parameters()).clone(), shifted(tiny)
    train_grpo(tiny, ref, env, run, cfg)
    moved = [not torch.equal(a, b)
             for a, b in zip([before, *run.weights], run.weights, strict=False)]
    assert moved == [False, True, False, False, True]
    assert [metrics["zero_variance"] for metrics in run.metrics] == [1, 0, 1, 1, 0]


def test_the_reference_follows_the_policy_only_as_often_as_asked(tiny):
    cfg = replace(LOOP, rl_steps=4, group_size=8, kl_coef=0.1)
    for ref_every, want in ((2, [False, True, False, True]), (0, [None] * 4)):
        policy, ref, run = copy.deepcopy(tiny), copy.deepcopy(tiny), Run()
        train_grpo(policy, ref, Env(), run, replace(cfg, ref_every=ref_every))
        assert run.references == want  # None: it never changes, so no checkpoint need hold it
    assert torch.equal(vector(ref.parameters()), vector(tiny.parameters()))


def test_every_step_samples_with_the_policy_as_it_is_then(tiny, monkeypatch):
    # On a GPU the sampler is a copy in bfloat16, which each step has to bring up to date.
    weights = []

    def recording(sampler, *args):
        weights.append(vector(sampler.parameters()).clone())
        assert torch.equal(weights[-1], vector(tiny.parameters()).bfloat16())
        return generate(sampler, *args)

    monkeypatch.setattr(grpo, "generate", recording)
    cfg = replace(LOOP, rl_steps=3, group_size=8)
    train_grpo(tiny, None, Env(), Run(sample_dtype=torch.bfloat16), cfg)
    assert len(weights) == 3 and not torch.equal(weights[0], weights[2])


def test_evaluations_between_steps_see_the_policy_as_it_is_then(tiny):
    run, before = Run(stop=2, sample_dtype=torch.bfloat16), vector(tiny.parameters()).bfloat16()
    train_grpo(tiny, None, Env(), run, replace(LOOP, rl_steps=4, group_size=8, eval_every=2))
    (step, sampler), = run.samplers  # the last step is evaluated by whoever called
    assert step == 2 and not torch.equal(vector(sampler.parameters()), before)
    for name, weight in sampler.state_dict().items():
        assert torch.equal(weight, run.checkpoint["policy"][name].bfloat16())


# ---------------------------------------------------------------------------------------- settings


def test_wrong_settings_are_refused_by_name():
    nan, inf = float("nan"), float("inf")
    wrong = [("group_size", 0), ("prompts_per_step", 0), ("max_new_tokens", 0),
             ("inner_epochs", 0), ("minibatches", 0), ("micro_tokens", 0), ("temperature", 0.0),
             ("temperature", nan), ("loss_norm", "mean"), ("adv_norm", "max"), ("clip_low", -0.1),
             ("clip_low", 1.1), ("clip_low", 0.0), ("clip_high", 0.0), ("kl_coef", -1.0),
             ("kl_coef", nan),
             ("kl_coef", inf), ("max_grad_norm", 0.0), ("dynamic_sampling", -1),
             ("dynamic_sampling", 1001), ("ref_every", -1), ("rl_lr", 0.0), ("rl_lr", nan),
             ("rl_steps", 0), ("rl_optimizer", "sgd"), ("minibatches", 257), ("kl_loss", "k2")]
    for name, value in wrong:
        with pytest.raises(UserError, match=f"{name}=") as e:
            validate(GRPOConfig(**{name: value}))
        assert "\n" not in str(e.value)
    validate(GRPOConfig())
    validate(GRPOConfig(minibatches=256, clip_low=1e-9, clip_high=1e-9, kl_coef=0.0))
