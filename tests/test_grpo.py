"""The mathematics of GRPO against hand-worked cases and a plain float64 restatement."""
import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch

import grpo
from grpo import GRPOConfig, Rollout, group_advantages, grpo_loss, grpo_step, resample_equal_groups, rollout, token_weights
from model import BadInput, token_logps


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand_with_the_population_std():
    adv = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # mean 1/4, std sqrt(3)/4 with ddof 0
    assert torch.allclose(adv, torch.tensor([[3.0, -1.0, -1.0, -1.0]]) / math.sqrt(3))


def test_the_readmes_group_by_hand():
    rewards = torch.tensor([[1.5, 0.5, 0, 1.5, 0.5, 0, 0, 0]])
    assert rewards.mean() == 0.5 and rewards.std(correction=0) == pytest.approx(0.612, abs=5e-4)
    assert [round(a, 2) for a in group_advantages(rewards)[0].tolist()] == [1.63, 0, -0.82, 1.63, 0, -0.82, -0.82, -0.82]


def test_each_group_is_its_own_baseline():
    adv = group_advantages(torch.tensor([[1.0, 0.0], [11.0, 10.0]]))
    assert torch.equal(adv, torch.tensor([[1.0, -1.0], [1.0, -1.0]]))


def test_without_std_advantages_are_centred_rewards():
    assert torch.allclose(group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), "none"), torch.tensor([[0.75, -0.25, -0.25, -0.25]]))


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
                lp, old, ref, a = float(logp[i, t]), float(logp_old[i, t]), float(logp_ref[i, t]), float(adv[i])
                rho = math.exp(lp - old)
                clipped = min(max(rho, 1 - cfg.clip_low), 1 + cfg.clip_high)
                k3 = math.exp(ref - lp) - (ref - lp) - 1
                terms.append(-min(rho * a, clipped * a) + cfg.kl_coef * k3)
        per_sequence.append(terms)
        n_tokens += len(terms)
    if cfg.loss_norm == "token":
        return sum(map(sum, per_sequence)) / n_tokens
    if cfg.loss_norm == "constant":
        return sum(map(sum, per_sequence)) / (len(adv) * cfg.max_new_tokens)
    return sum(sum(terms) / len(terms) for terms in per_sequence if terms) / len(adv)


def random_batch(seed, N=6, T=11, dtype=torch.float64):
    g = seeded(seed)
    logp = -3 * torch.rand(N, T, generator=g, dtype=dtype)
    old, ref = (logp + 0.4 * torch.randn(N, T, generator=g, dtype=dtype) for _ in range(2))
    lengths = torch.randint(1, T + 1, (N,), generator=g)
    mask = torch.arange(T) < lengths[:, None]
    return logp, old, ref, torch.randn(N, generator=g, dtype=dtype), mask


@pytest.mark.parametrize("norm, kl, high, seed", list(itertools.product(["sequence", "token", "constant"], [0.0, 0.04, 1.0], [0.2, 0.28], [0, 1])))
def test_the_loss_is_the_papers_formula(norm, kl, high, seed):
    cfg = GRPOConfig(loss_norm=norm, kl_coef=kl, clip_high=high, max_new_tokens=13)
    logp, old, ref, adv, mask = random_batch(seed)
    loss, metrics = grpo_loss(logp, old, ref, adv, mask, cfg)
    assert abs(loss.item() - plain_loss(logp, old, ref, adv, mask, cfg)) < 1e-6
    assert all(isinstance(v, float) for v in metrics.values())


def test_the_loss_of_large_float64_terms_is_exact_too():
    logp, old, ref, adv, mask = random_batch(5, N=64, T=300)
    for norm in ("sequence", "token", "constant"):
        cfg = GRPOConfig(loss_norm=norm, kl_coef=1.0)
        assert abs(grpo_loss(logp, old, ref, 1e4 * adv, mask, cfg)[0].item() - plain_loss(logp, old, ref, 1e4 * adv, mask, cfg)) < 1e-6


def test_a_sequence_with_nothing_to_learn_counts_as_zero():
    logp, old, ref, adv, mask = random_batch(0)
    mask[2] = False
    for norm in ("sequence", "token", "constant"):
        cfg = GRPOConfig(loss_norm=norm)
        assert abs(grpo_loss(logp, old, ref, adv, mask, cfg)[0].item() - plain_loss(logp, old, ref, adv, mask, cfg)) < 1e-6


@pytest.mark.parametrize("adv, ratio, loss, gradient", [
    (+2.0, 1.5, -2.0 * 1.2, 0.0),         # good and already likelier than the clip: no further push
    (+2.0, 0.5, -2.0 * 0.5, -2.0 * 0.5),  # good but less likely than before: pushed up, unclipped
    (-2.0, 1.5, +2.0 * 1.5, +2.0 * 1.5),  # bad and likelier than before: pushed down, unclipped
    (-2.0, 0.5, +2.0 * 0.8, 0.0),         # bad and already rarer than the clip: no further push
])
def test_the_four_cases_of_the_clip(adv, ratio, loss, gradient):
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    got, metrics = grpo_loss(logp, torch.zeros(1, 1), None, torch.tensor([adv]), torch.ones(1, 1), GRPOConfig(kl_coef=0.0))
    got.backward()
    assert got.item() == pytest.approx(loss) and logp.grad.item() == pytest.approx(gradient)
    assert metrics["clip"] == (gradient == 0)


def test_the_upper_and_the_lower_clip_are_separate():
    cfg = GRPOConfig(clip_low=0.1, clip_high=0.5, kl_coef=0.0)
    loss = lambda ratio, adv: grpo_loss(torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1), None, torch.tensor([adv]), torch.ones(1, 1), cfg)[0].item()
    assert loss(2.0, 1.0) == pytest.approx(-1.5) and loss(0.2, -1.0) == pytest.approx(0.9)


def test_kl_is_zero_only_where_policy_and_reference_agree():
    one = torch.ones(1, 3)
    same, far = torch.full((1, 3), -1.0), torch.tensor([[-1.0, -2.0, -0.1]])
    assert grpo_loss(same, same, same, torch.zeros(1), one, GRPOConfig())[1]["kl"] == 0
    _, metrics = grpo_loss(same, same, far, torch.zeros(1), one, GRPOConfig())
    want = (0 + (math.exp(-1.0) + 1 - 1) + (math.exp(0.9) - 0.9 - 1)) / 3
    assert metrics["kl"] == pytest.approx(want, rel=1e-5)


def test_the_kl_estimate_averages_to_the_exact_kl():
    policy, ref = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    exact = (policy * (policy / ref).log()).sum().item()
    logp, logp_ref = policy.log()[None], ref.log()[None]
    # The expectation over the policy's own samples, taken exactly: each token once, weighted by its probability.
    _, metrics = grpo_loss(logp, logp, logp_ref, torch.zeros(1), torch.ones(1, 3), GRPOConfig(), weights=policy[None])
    assert metrics["kl"] == pytest.approx(exact, abs=1e-12)


def test_the_kl_gradient_depends_on_the_reference():
    gradients = []
    for ref in (-1.0, -2.0):
        logp = torch.full((1, 1), -1.5, requires_grad=True)
        grpo_loss(logp, logp.detach(), torch.full((1, 1), ref), torch.zeros(1), torch.ones(1, 1), GRPOConfig(kl_coef=1.0))[0].backward()
        gradients.append(logp.grad.item())
    assert gradients[0] < 0 < gradients[1]  # pulled up towards a likelier reference, down towards a rarer one


def test_what_lies_outside_the_mask_cannot_matter():
    logp, old, ref, adv, mask = random_batch(3)
    want, metrics = grpo_loss(logp, old, ref, adv, mask, GRPOConfig())
    for junk in (1e4, -1e4, torch.inf, torch.nan):
        dirty = [torch.where(mask, x, junk).requires_grad_() for x in (logp, old, ref)]
        loss, again = grpo_loss(*dirty, adv, mask, GRPOConfig())
        loss.backward()
        assert loss.item() == want.item() and again == metrics
        assert torch.isfinite(dirty[0].grad).all() and (dirty[0].grad[~mask] == 0).all()


def test_parts_of_a_batch_add_up_to_the_whole():
    logp, old, ref, adv, mask = random_batch(4)
    for norm in ("sequence", "token", "constant"):
        cfg = GRPOConfig(loss_norm=norm)
        whole, metrics = grpo_loss(logp, old, ref, adv, mask, cfg)
        weights = token_weights(mask, cfg)
        parts = [grpo_loss(logp[r], old[r], ref[r], adv[r], mask[r], cfg, weights[r]) for r in ([0, 3], [1], [2, 4, 5])]
        assert sum(p[0] for p in parts).item() == pytest.approx(whole.item(), abs=1e-6)
        assert {k: sum(p[1][k] for p in parts) for k in metrics} == pytest.approx(metrics, abs=1e-6)


# ---------------------------------------------------------------------------------------- rollouts and steps


def parity(problems, completions):
    """1 for completions with an even number of tokens: something to learn that needs no text."""
    even = [float(len(c) % 2 == 0) for c in completions]
    return even, {"accuracy": even}


def sample(model, cfg, seed=0, prompts=((5, 6, 7), (8,), (9, 10, 11, 12))):
    prompts = [list(p) for p in prompts]
    return rollout(model, list(range(len(prompts))), prompts, parity, cfg, seeded(seed), stop_ids=(1, 2))


SMALL = GRPOConfig(prompts_per_step=3, group_size=4, max_new_tokens=24, temperature=0.8, kl_coef=0.05, max_grad_norm=1e9)


def sgd(model):
    return [torch.optim.SGD(model.parameters(), lr=1.0)]


def change(model, ref, batch, cfg):
    """What one step does to the weights, as one vector, and its metrics."""
    model = copy.deepcopy(model)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    metrics = grpo_step(model, ref, sgd(model), batch, cfg, seeded())
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before, metrics


def shifted(model):
    """A reference that differs from the policy."""
    ref = copy.deepcopy(model)
    with torch.no_grad():
        for p in ref.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(7)))
    return ref


def test_a_rollout_keeps_problem_order_and_rewards_every_completion(tiny):
    seen = {}

    def reward_fn(problems, completions):
        seen.update(problems=problems, completions=completions)
        return list(range(12)), {"accuracy": [0.5] * 12}
    batch = rollout(tiny, ["a", "b", "c"], [[5], [6, 7], [8]], reward_fn, SMALL, seeded(), stop_ids=(1,))
    assert seen["problems"] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert batch.rewards.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [row[1:][m].tolist() for row, m in zip(batch.tokens, batch.mask)] == seen["completions"]


def test_at_the_first_step_the_ratio_is_one_and_nothing_is_clipped(tiny):
    batch = sample(tiny, SMALL)
    logp = token_logps(tiny, batch.tokens, SMALL.temperature)
    assert torch.allclose(logp[batch.mask], batch.logp_old[batch.mask], atol=1e-4)
    _, metrics = change(tiny, copy.deepcopy(tiny), batch, SMALL)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-4) and metrics["clip"] == 0
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)  # the reference was sampled and scored at the same temperature


def test_the_step_follows_the_gradient_of_the_whole_batch(tiny):
    ref, batch = shifted(tiny), sample(tiny, SMALL)
    model = copy.deepcopy(tiny)
    adv = group_advantages(batch.rewards).flatten()
    logp = token_logps(model, batch.tokens, 0.8)
    loss, _ = grpo_loss(logp, batch.logp_old, token_logps(ref, batch.tokens, 0.8).detach(), adv, batch.mask, SMALL)
    loss.backward()
    want = -torch.cat([p.grad.flatten() for p in model.parameters()])
    got, metrics = change(tiny, ref, batch, SMALL)
    assert want.norm() > 0.01 and torch.allclose(got, want, atol=1e-5 * want.norm().item())
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(want.norm().item(), rel=1e-4)


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_gradients_depend_neither_on_micro_batches_nor_on_padding(tiny, norm):
    cfg = replace(SMALL, loss_norm=norm)
    ref, batch = shifted(tiny), sample(tiny, cfg)
    want, metrics = change(tiny, ref, batch, cfg)
    padded = replace(batch, tokens=torch.nn.functional.pad(batch.tokens, (0, 9), value=3),
                     mask=torch.nn.functional.pad(batch.mask, (0, 9)), logp_old=torch.nn.functional.pad(batch.logp_old, (0, 9)))
    for b, micro in [(batch, 1), (batch, 40), (padded, 100), (padded, 10**6)]:
        got, again = change(tiny, ref, b, replace(cfg, micro_tokens=micro))
        assert torch.allclose(got, want, atol=1e-5 * want.norm().item())
        assert again == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_micro_batches_hold_every_row_once_within_the_budget_neighbours_in_length():
    lengths = torch.tensor([5, 40, 7, 33, 6, 39, 5, 8])
    parts = list(grpo.micro_batches(torch.arange(8), lengths, 80))
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    assert all(len(p) * int(lengths[p].max()) <= 80 for p in parts) and len(parts) < 6


def test_truncated_completions_leave_the_loss_but_stay_in_the_baseline(tiny):
    batch = sample(tiny, SMALL)
    batch = replace(batch, truncated=torch.tensor([True, False, False, True] * 3))
    kept = batch.mask & ~batch.truncated[:, None]
    model, ref = copy.deepcopy(tiny), shifted(tiny)
    adv = group_advantages(batch.rewards).flatten()  # of all four, not of the two that remain
    loss, _ = grpo_loss(token_logps(model, batch.tokens, 0.8), batch.logp_old, token_logps(ref, batch.tokens, 0.8).detach(), adv, kept, SMALL)
    loss.backward()
    want = -torch.cat([p.grad.flatten() for p in model.parameters()])
    got, _ = change(tiny, ref, batch, replace(SMALL, mask_truncated=True))
    assert torch.allclose(got, want, atol=1e-5 * want.norm().item())
    assert not torch.allclose(got, change(tiny, ref, batch, SMALL)[0], atol=1e-3 * want.norm().item())


def test_later_inner_epochs_are_measured_against_the_sampling_policy(tiny):
    batch = sample(tiny, SMALL)
    model = copy.deepcopy(tiny)
    optimizer = [torch.optim.SGD(model.parameters(), lr=0.05)]
    once = grpo_step(model, None, optimizer, batch, replace(SMALL, kl_coef=0.0), seeded())
    twice = grpo_step(model, None, optimizer, batch, replace(SMALL, kl_coef=0.0), seeded())
    assert abs(once["ratio"] - 1) < 1e-4 < abs(twice["ratio"] - 1)


def test_minibatches_split_the_rollout_into_that_many_optimiser_steps(tiny):
    steps = []

    class Counting(torch.optim.SGD):
        def step(self):
            steps.append(1)
            super().step()
    cfg = replace(SMALL, inner_epochs=2, minibatches=3, kl_coef=0.05)
    metrics = grpo_step(tiny, copy.deepcopy(tiny), [Counting(tiny.parameters(), lr=0.01)], sample(tiny, cfg), cfg, seeded())
    assert len(steps) == 6 and metrics["kl"] > 0


def test_equal_rewards_and_no_kl_move_nothing(tiny):
    batch = sample(tiny, SMALL)
    batch = replace(batch, rewards=torch.ones_like(batch.rewards))
    moved, _ = change(tiny, None, batch, replace(SMALL, kl_coef=0.0))
    assert (moved == 0).all()


def test_good_completions_become_likelier_and_bad_ones_rarer(tiny):
    batch = sample(tiny, SMALL)
    model = copy.deepcopy(tiny)
    grpo_step(model, None, [torch.optim.SGD(model.parameters(), lr=1e-3)], batch, replace(SMALL, kl_coef=0.0), seeded())
    adv = group_advantages(batch.rewards).flatten()
    gain = ((token_logps(model, batch.tokens, 0.8) - token_logps(tiny, batch.tokens, 0.8)) * batch.mask).sum(1) / batch.mask.sum(1)
    assert (gain * adv).sum() > 0


def test_a_rollout_is_never_changed_by_a_step(tiny):
    batch = sample(tiny, SMALL)
    before = copy.deepcopy(batch)
    change(tiny, shifted(tiny), batch, replace(SMALL, inner_epochs=2, minibatches=2))
    assert all(torch.equal(getattr(batch, k), getattr(before, k)) for k in ("tokens", "mask", "logp_old", "rewards", "truncated"))


def test_gradients_that_are_not_finite_change_nothing(tiny):
    batch = sample(tiny, SMALL)
    batch = replace(batch, logp_old=torch.where(batch.mask, torch.nan, batch.logp_old))
    model = copy.deepcopy(tiny)
    metrics = grpo_step(model, None, [torch.optim.AdamW(model.parameters(), lr=0.1)], batch, replace(SMALL, kl_coef=0.0), seeded())
    assert metrics["skipped"] == 1 and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny.parameters()))


# ---------------------------------------------------------------------------------------- dynamic sampling


def fake(rewards, T):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    N = rewards.numel()
    return Rollout(torch.full((N, T), T), torch.ones(N, T - 1).bool(), torch.full((N, T - 1), -1.0 * T), torch.zeros(N).bool(), rewards, {"accuracy": rewards})


def test_groups_that_teach_nothing_are_replaced_until_the_cap():
    asked, supply = [], iter([fake([[1, 1], [1, 0]], 7), fake([[0, 1]], 5), fake([[0, 1]], 5)])

    def more(n):
        asked.append(n)
        return next(supply)
    batch = resample_equal_groups(fake([[1, 0], [0, 0], [1, 1]], 6), more, times=3)
    assert asked == [2, 1]  # two groups were equal, then one of the new ones; after that none
    assert batch.rewards.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert batch.tokens.shape == (6, 7) and batch.mask.sum(1).tolist() == [5, 5, 6, 6, 4, 4]
    assert batch.logp_old[batch.mask].tolist() == [-6.0] * 10 + [-7.0] * 12 + [-5.0] * 8
    tries = []
    capped = resample_equal_groups(fake([[0, 0]], 6), lambda n: tries.append(n) or fake([[0, 0]] * n, 6), times=2)
    assert capped.rewards.tolist() == [[0, 0]] and tries == [1, 1]


def test_wrong_settings_are_refused_by_name():
    for wrong in ({"group_size": 0}, {"temperature": 0.0}, {"loss_norm": "mean"}, {"adv_norm": "max"}, {"micro_tokens": 0}, {"clip_low": -0.1},
                  {"clip_high": -1.0}, {"kl_coef": -1.0}, {"kl_coef": float("nan")}, {"max_grad_norm": 0.0}, {"resample_equal": -1}, {"temperature": float("nan")}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            GRPOConfig(**wrong).check()
