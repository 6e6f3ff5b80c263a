"""The transformer, its cache, sampling and log-probs: what RL silently relies on."""
import copy
import itertools
import math
import os
from dataclasses import asdict, dataclass

import pytest
import torch
import torch.nn.functional as F

import model as model_file
from model import (
    GPT,
    GPTConfig,
    KVCache,
    Linear,
    Muon,
    OneDNN,
    PrefillCache,
    UserError,
    add_lora,
    apply_gradients,
    apply_rope,
    generate,
    generators,
    load_checkpoint,
    load_model,
    make_optimizers,
    merged_state,
    onednn_pays,
    opt,
    rope_table,
    same_weights,
    sample_token,
    sampling_copy,
    save_checkpoint,
    set_lr,
    sync_weights,
    token_logps,
    validate,
)

RAGGED = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6]]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def shape(**changes):
    """A small config: two layers over 40 tokens."""
    small = dict(vocab_size=40, n_layer=2, n_embd=16, n_head=4, n_kv_head=2, mlp_dim=24, context=64)
    return GPTConfig(**{**small, **changes})


class Scripted(GPT):
    """Emits scripted tokens: script[i] is what row i says, whatever it reads."""

    def __init__(self, script):
        super().__init__(shape(n_layer=1))
        self.script, self.t = script, -1

    def head(self, h):
        self.t += 1
        wanted = torch.tensor([row[min(self.t, len(row) - 1)] for row in self.script])
        return F.one_hot(wanted, self.cfg.vocab_size).float() * 100


def say(script, **options):
    """One completion for each row of the script."""
    prompts = [[1, 2]] * len(script)
    return generate(Scripted(script), prompts, drop_rows=False, generator=seeded(), **options)


def same_samples(a, b):
    """Whether two lists of completions are the same, their log-probs up to rounding."""
    if [(c.prompt, c.ids, c.truncated) for c in a] != [(c.prompt, c.ids, c.truncated) for c in b]:
        return False
    return all(torch.allclose(x.logps, y.logps, atol=1e-4) for x, y in zip(a, b, strict=True))


def logps_again(model, c, temperature=1.0):
    """A completion's log-probs as training computes them: one forward pass, no cache."""
    tokens = torch.tensor([c.prompt + c.ids], device=model.cos.device)
    return token_logps(model, tokens, temperature)[0, len(c.prompt) - 1:].detach().cpu()


def same_logps(model, completions, temperature=1.0):
    """Whether sampling and training give the same log-probs."""
    pairs = [(c.logps, logps_again(model, c, temperature)) for c in completions]
    return all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


# ----------------------------------------------------------------------------------------- settings


def test_a_setting_out_of_its_bounds_is_refused_by_name():
    @dataclass
    class Config:
        count: int = opt(1, "", least=1, most=9)
        rate: float = opt(0.5, "", above=0)
        loss: float = opt(1.0, "", least=0)
        kind: str = opt("a", "", choices=("a", "b"))

    validate(Config(count=9, rate=1e-9, loss=0.0, kind="b"))
    nan, inf = float("nan"), float("inf")
    wrong = [("count", 0), ("count", 10), ("rate", 0.0), ("rate", nan), ("rate", inf),
             ("loss", -0.1), ("loss", nan), ("kind", "c")]
    for name, value in wrong:
        with pytest.raises(UserError, match=f"{name}=.*{value}") as e:
            validate(Config(**{name: value}))
        assert "\n" not in str(e.value)


def test_generators_follow_from_their_key_alone():
    def draws(*key):
        rng, generator = generators(*key)
        return rng.random(), torch.rand(1, generator=generator).item()

    assert draws(1, "zero", 5) == draws(1, "zero", 5)
    for other in ((2, "zero", 5), (1, "base", 5), (1, "zero", 6)):
        a, b = draws(1, "zero", 5), draws(*other)
        assert a[0] != b[0] and a[1] != b[1]


# -------------------------------------------------------------------------------------- transformer


def test_a_later_token_does_not_change_earlier_logits(tiny):
    a = torch.randint(0, 40, (2, 12), generator=seeded())
    b = a.clone()
    b[:, 7:] = (b[:, 7:] + 1) % 40
    assert torch.allclose(tiny(a)[:, :7], tiny(b)[:, :7], atol=1e-5)
    assert not torch.allclose(tiny(a)[:, 7:], tiny(b)[:, 7:], atol=1e-2)


def test_attention_equals_a_plain_loop_over_heads(tiny):
    attn, cfg = tiny.blocks[0].attn, tiny.cfg
    x = torch.randn(2, 6, cfg.n_embd, generator=seeded())
    cos, sin = rope_table(cfg)
    got = attn(x, cos[None, None, :6], sin[None, None, :6])

    def part(proj, i):  # one head's share of a projection
        return (x @ proj.weight.T)[..., i * cfg.d_head:(i + 1) * cfg.d_head]

    def turned(y, norm):
        y = y / (y.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * norm.weight
        return apply_rope(y, cos[:6], sin[:6])

    outs = []
    for h in range(cfg.n_head):
        kv = h // (cfg.n_head // cfg.n_kv_head)
        q, k, v = part(attn.q_proj, h), part(attn.k_proj, kv), part(attn.v_proj, kv)
        q, k = turned(q, attn.q_norm), turned(k, attn.k_norm)
        scores = (q @ k.transpose(1, 2)) / math.sqrt(cfg.d_head)
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        outs.append(scores.softmax(-1) @ v)
    assert torch.allclose(got, torch.cat(outs, -1) @ attn.o_proj.weight.T, atol=1e-5)


def test_rope_turns_each_half_split_pair_like_a_complex_number():
    cfg = GPTConfig(head_dim=8)
    cos, sin = rope_table(cfg)
    x = torch.randn(1, 1, 10, 8, generator=seeded())
    z = torch.complex(x[..., :4], x[..., 4:])
    angle = torch.arange(10)[:, None] * cfg.rope_theta ** (-torch.arange(4) / 4)
    want = z * torch.polar(torch.ones_like(angle), angle)
    got = apply_rope(x, cos[:10], sin[:10])
    assert torch.allclose(got, torch.cat((want.real, want.imag), -1), atol=1e-5)


def test_queries_and_keys_are_normed_in_fp32_also_under_autocast(tiny):
    normed = []
    tiny.blocks[0].attn.q_norm.register_forward_pre_hook(lambda _, x: normed.append(x[0].dtype))
    tiny.autocast = True
    tiny.hidden(torch.zeros(1, 5, dtype=torch.long))
    assert normed == [torch.float32]


def test_only_the_distance_between_positions_matters(tiny):
    idx = torch.randint(0, 40, (1, 9), generator=seeded())
    start, later = torch.arange(9)[None], torch.arange(30, 39)[None]
    assert torch.allclose(tiny.trunk(idx, start), tiny.trunk(idx, later), atol=1e-4)


OPTIONS = [{}, {"qkv_bias": True}, {"o_bias": True, "mlp_bias": True}, {"qk_norm": False},
           {"tied": False}, {"n_kv_head": 1}, {"n_kv_head": 4, "head_dim": 6}]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_architecture_option_decodes_as_it_trains(options):
    torch.manual_seed(1)
    model = GPT(shape(**options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=seeded(3)))
    assert same_logps(model, generate(model, RAGGED, 2, max_new_tokens=20, generator=seeded()))


def test_impossible_shapes_are_refused_by_name():
    wrong = [({"n_kv_head": 3}, "n_kv_head"), ({"head_dim": 5}, "odd"), ({"n_layer": 0}, "n_layer"),
             ({"n_embd": 18, "head_dim": 0}, "n_embd"), ({"rope_low": 4.0}, "rope_low"),
             ({"rope_low": 0.0}, "rope_low"), ({"rope_factor": 0.5}, "rope_factor")]
    for changes, word in wrong:
        with pytest.raises(UserError, match=word):
            GPT(shape(**changes))


# -------------------------------------------------------------------------------------------- cache


def test_cached_logits_equal_uncached_ones(tiny):
    idx = torch.randint(0, 40, (3, 20), generator=seeded())
    full = tiny(idx)
    prefill = [PrefillCache() for _ in tiny.blocks]
    logits = [tiny.head(tiny.trunk(idx[:, :8], caches=prefill))]
    caches = [c.share(1, 20) for c in prefill]
    for t in range(8, 20):
        logits.append(tiny.head(tiny.trunk(idx[:, t:t + 1], torch.full((3, 1), t), caches)))
    assert torch.allclose(torch.cat(logits, 1), full, atol=1e-4)


def test_a_cache_shared_with_a_group_and_cut_to_some_rows_gives_the_same_logits(tiny):
    idx = torch.randint(0, 40, (6, 12), generator=seeded())
    idx[:, :5] = idx[[0, 0, 0, 3, 3, 3], :5]  # two prompts, groups of three
    prefill = [PrefillCache() for _ in tiny.blocks]
    tiny.trunk(idx[[0, 3], :5], caches=prefill)
    caches, rows = [c.share(3, 12) for c in prefill], torch.arange(6)
    for t in range(5, 12):
        if t == 8:
            keep = torch.tensor([1, 3, 4])
            rows = rows[keep]
            for c in caches:
                c.keep(keep)
        position = torch.full((len(rows), 1), t)
        got = tiny.head(tiny.trunk(idx[rows, t:t + 1], position, caches))
        assert torch.allclose(got[:, 0], tiny(idx[rows])[:, t], atol=1e-4)


def test_the_cache_is_written_in_place():
    cache = KVCache(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), columns=10)
    where = cache.k.data_ptr()
    k, _ = cache.append(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    assert cache.k.data_ptr() == where == k.data_ptr() and k.shape[2] == 4


# ----------------------------------------------------------------------------------------- sampling


SAVINGS = list(itertools.product([True, False], repeat=2))  # share_prefix, drop_rows


@pytest.mark.parametrize("share, drop", SAVINGS)
def test_sampling_log_probs_equal_recomputed_ones_for_ragged_prompts(tiny, share, drop):
    out = generate(tiny, RAGGED, 3, max_new_tokens=40, temperature=0.7, stop_ids=(1, 2),
                   generator=seeded(), share_prefix=share, drop_rows=drop)
    assert len({len(c.ids) for c in out}) > 3  # uneven lengths, or rows were never dropped
    assert same_logps(tiny, out, 0.7)


def test_sharing_prefixes_and_dropping_rows_change_no_sample(tiny):
    def samples(share, drop):
        return generate(tiny, RAGGED, 4, max_new_tokens=40, stop_ids=(1, 2), generator=seeded(5),
                        share_prefix=share, drop_rows=drop)

    first, *others = [samples(*saving) for saving in SAVINGS]
    assert all(same_samples(first, other) for other in others)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_decoding_with_fixed_shapes_changes_no_sample(tiny, device):
    tiny = tiny.to(device)
    for prompts in (RAGGED, [[5, 6, 7], [8, 9, 10]]):
        options = {"group_size": 4, "max_new_tokens": 48, "stop_ids": (1, 2)}
        plain = generate(tiny, prompts, generator=seeded(5), static=False, **options)
        fixed = generate(tiny, prompts, generator=seeded(5), static=True, **options)
        assert same_samples(plain, fixed) and same_logps(tiny, fixed)


def test_a_fixed_shape_lasts_until_its_columns_or_rows_change(tiny, monkeypatch):
    shapes, capture = [], model_file.StaticDecoder.capture

    def recording(self):
        shapes.append(self.shape)
        capture(self)

    monkeypatch.setattr(model_file.StaticDecoder, "capture", recording)
    long = GPT(shape(n_layer=1, context=400))
    generate(long, [[1] * 100], 4, max_new_tokens=60, generator=seeded(), static=True)
    assert shapes == [(4, 128), (4, 160)]
    shapes.clear()
    generate(tiny, RAGGED, 8, max_new_tokens=48, stop_ids=(1, 2, 3, 4), generator=seeded(),
             static=True)
    rows = [n for n, _ in shapes]
    assert rows == sorted(set(rows), reverse=True) and rows[-1] <= 16  # halved at least, each time


@NO_GPU
def test_a_cuda_device_that_is_not_the_current_one_samples_the_same(tiny):
    device, plain = f"cuda:{torch.cuda.device_count() - 1}", copy.deepcopy(tiny)
    options = {"group_size": 4, "max_new_tokens": 48, "stop_ids": (1, 2)}
    for drop in (True, False):
        a = generate(plain, RAGGED, generator=seeded(5), drop_rows=drop, **options)
        b = generate(tiny.to(device), RAGGED, generator=seeded(5), drop_rows=drop, **options)
        assert same_samples(a, b)


@NO_GPU
def test_log_probs_and_their_gradients_on_cuda_are_the_cpus(tiny):
    tokens, found = torch.randint(0, 40, (3, 20), generator=seeded()), []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(tiny).to(device)
        logp = token_logps(model, tokens.to(device), 0.8, chunk_floats=200)
        logp.sum().backward()
        found.append([x.detach().cpu() for x in (logp, *(p.grad for p in model.parameters()))])
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(*found, strict=True))


@NO_GPU
def test_bfloat16_sampling_on_cuda_stays_near_the_fp32_log_probs(tiny):
    half = copy.deepcopy(tiny).cuda().bfloat16()
    out = generate(half, RAGGED, 8, max_new_tokens=40, stop_ids=(1,), generator=seeded())
    again = torch.cat([logps_again(tiny.cuda(), c) for c in out])
    assert (again - torch.cat([c.logps for c in out])).abs().mean() < 0.05


def test_finished_rows_leave_the_batch(tiny, monkeypatch):
    sizes, trunk = [], tiny.trunk

    def counting(idx, *args, **options):
        sizes.append(len(idx))
        return trunk(idx, *args, **options)

    monkeypatch.setattr(tiny, "trunk", counting)
    generate(tiny, RAGGED, 8, max_new_tokens=48, stop_ids=(1, 2, 3, 4), generator=seeded())
    assert sizes[0] == 4 and sizes[1] == 32  # the prompts once, then their groups
    assert sizes[-1] < 16


def test_a_completion_comes_with_its_prompt_and_one_log_prob_per_token(tiny):
    out = generate(tiny, RAGGED, 2, max_new_tokens=30, stop_ids=(1,), generator=seeded())
    assert [c.prompt for c in out] == [prompt for prompt in RAGGED for _ in range(2)]
    for c in out:
        assert 1 <= len(c.ids) <= 30 and c.truncated == (1 not in c.ids)
        assert 1 not in c.ids[:-1]
        assert c.logps.shape == (len(c.ids),) and c.logps.dtype == torch.float32
        assert (c.logps <= 0).all()


def test_a_completion_ends_with_its_first_end_token():
    out = say([[7, 8, 9, 3, 7, 3], [7] * 6], max_new_tokens=6, stop_ids=(3,))
    assert [c.ids for c in out] == [[7, 8, 9, 3], [7] * 6]
    assert [c.truncated for c in out] == [False, True]


def test_the_end_token_is_kept_when_pad_and_end_share_an_id():
    out = say([[7, 0, 8], [0, 8, 8]], max_new_tokens=6, stop_ids=(0,))
    assert [c.ids for c in out] == [[7, 0], [0]]
    assert [len(c.logps) for c in out] == [2, 1]


def test_any_of_several_end_tokens_ends_a_completion_also_at_once():
    out = say([[3, 7], [7, 4, 7], [5]], max_new_tokens=6, stop_ids=(3, 4, 5))
    assert [c.ids for c in out] == [[3], [7, 4], [5]]
    assert not any(c.truncated for c in out)


def test_a_completion_also_ends_where_a_function_of_its_ids_says_so():
    asked = []

    def after_two_nines(ids):
        asked.append(len(ids))
        return next((i + 2 for i in range(len(ids) - 1) if ids[i:i + 2] == [9, 9]), 0)

    texts = [[7, 9, 9, 7, 9, 9], [7, 3, 9, 9], [9, 7] * 20, [7] * 38 + [9, 9]]
    out = say([text + [7] * (40 - len(text)) for text in texts], max_new_tokens=40, stop_ids=(3,),
              find_end=after_two_nines)
    assert [c.ids for c in out] == [[7, 9, 9], [7, 3], [9, 7] * 20, [7] * 38 + [9, 9]]
    assert [c.truncated for c in out] == [False, False, True, False]
    assert [len(c.logps) for c in out] == [3, 2, 40, 40]
    asked.clear()
    say([[7, 9, 9] + [7] * 37], max_new_tokens=40, find_end=after_two_nines)
    assert len(asked) < 5  # and sampling stops there, too


def test_a_completion_that_ends_with_its_last_allowed_token_is_not_truncated():
    out = say([[7, 7, 3], [7, 7, 7]], max_new_tokens=3, stop_ids=(3,))
    assert [c.truncated for c in out] == [False, True]


def test_samples_follow_the_whole_softmax_and_no_top_k():
    logits = torch.linspace(-1.5, 1.5, 100).repeat(40000, 1)
    token, logp = sample_token(logits, 2.0, torch.rand(40000, generator=seeded()))
    p = (logits[0] / 2.0).softmax(-1)
    share = token.bincount(minlength=100) / 40000
    sigma = (p / 40000).sqrt()
    assert ((share - p).abs() < 5 * sigma).all()  # each of the 100 tokens
    assert torch.allclose(logp, p.log()[token], atol=1e-5)


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.full((4, 6), -torch.inf)
    logits[:, 2:4] = 0.0
    token, _ = sample_token(logits, 1.0, torch.tensor([0.0, 0.4999, 0.5001, 1 - 2**-24]))
    assert token.tolist() == [2, 2, 3, 3]


def test_a_model_with_broken_weights_is_refused(tiny):
    tiny.norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        generate(tiny, [[5, 6]], 2, max_new_tokens=8)


@pytest.mark.parametrize("static", [False, True])
def test_a_token_that_makes_the_logits_nan_while_sampling_is_reported_too(static):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=7, n_layer=1, n_embd=16, n_head=2, head_dim=8, tied=False))
    with torch.no_grad():
        model.embed.weight[5] = math.nan  # not in the prompt, but sampled soon
    with pytest.raises(UserError, match="not finite"):
        generate(model, [[1, 2]], 8, max_new_tokens=6, static=static)


def test_temperature_zero_takes_the_likeliest_token(tiny):
    a, b = generate(tiny, [[5, 6]], 2, max_new_tokens=8, temperature=0, generator=seeded())
    assert a.ids[0] == tiny(torch.tensor([[5, 6]]))[0, -1].argmax()
    assert a.ids == b.ids


def test_the_same_seed_gives_the_same_samples_and_another_others(tiny):
    def samples(seed):
        out = generate(tiny, RAGGED, 2, max_new_tokens=16, generator=seeded(seed))
        return [c.ids for c in out]

    assert samples(1) == samples(1) != samples(2)


def test_prompts_that_do_not_fit_are_refused_with_the_numbers(tiny):
    with pytest.raises(UserError, match="60 tokens.*max_new_tokens=5.*64"):
        generate(tiny, [[1] * 60], max_new_tokens=5)
    for empty in ([], [[]], [[1], []]):
        with pytest.raises(UserError, match="at least one"):
            generate(tiny, empty, max_new_tokens=5)


def test_a_sampling_copy_is_the_model_itself_or_is_brought_up_to_date(tiny):
    assert sampling_copy(tiny, torch.float32) is tiny
    half = sampling_copy(tiny, torch.bfloat16)
    assert not any(p.requires_grad for p in half.parameters())
    with torch.no_grad():
        tiny.norm.weight.add_(1)
    assert (half.norm.weight == 1).all()
    sync_weights(half, tiny)
    for p, q in zip(half.parameters(), tiny.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q.bfloat16())


# ---------------------------------------------------------------------------------------- log-probs


def test_checkpointing_changes_no_gradient(tiny):
    tokens = torch.randint(0, 40, (3, 15), generator=seeded())
    grads = []
    for tiny.checkpointing in (False, True):
        tiny.zero_grad()
        token_logps(tiny, tokens).sum().backward()
        grads.append([p.grad.clone() for p in tiny.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_chunked_log_probs_and_gradients_equal_the_plain_ones(tiny):
    tokens = torch.randint(0, 40, (3, 15), generator=seeded())
    mask = torch.rand(3, 14, generator=seeded()) < 0.6
    plain = F.log_softmax(tiny(tokens[:, :-1]) / 0.8, -1)
    plain = plain.gather(-1, tokens[:, 1:, None])[..., 0] * mask
    plain.sum().backward()
    want = [p.grad.clone() for p in tiny.parameters()]
    for chunk_floats in (40 * 4, 2**24):  # four positions at a time; all at once
        tiny.zero_grad()
        got = token_logps(tiny, tokens, 0.8, mask, chunk_floats)
        got.sum().backward()
        assert torch.allclose(got, plain, atol=1e-5)
        for p, w in zip(tiny.parameters(), want, strict=True):
            assert torch.allclose(p.grad, w, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shared, widths", [
    (0, [39]), (9, [39]), (10, [10, 29]), (25, [25, 14]), (40, [33, 6])])
def test_what_all_rows_begin_with_is_computed_once_and_changes_nothing(
        tiny, monkeypatch, shared, widths):
    tokens = torch.randint(0, 40, (3, 40), generator=seeded())
    tokens[:, shared:shared + 1] = torch.arange(3)[:, None]  # here the rows part
    tokens[:, :shared] = tokens[0, :shared]
    tokens[1, 33:] = 39  # padding
    mask = torch.rand(3, 39, generator=seeded()) < 0.6
    weights, seen, trunk = torch.randn(3, 39, generator=seeded()), [], tiny.trunk
    want = torch.cat([token_logps(tiny, tokens[i:i + 1], 0.8, mask[i:i + 1]) for i in range(3)])
    (weights * want).sum().backward()
    grads = [p.grad.clone() for p in tiny.parameters()]

    def counting(idx, *args, **options):
        seen.append(idx.shape[1])
        return trunk(idx, *args, **options)

    monkeypatch.setattr(tiny, "trunk", counting)
    tiny.zero_grad()
    got = token_logps(tiny, tokens, 0.8, mask)
    (weights * got).sum().backward()
    assert seen == widths and torch.allclose(got, want, atol=1e-5)
    for p, grad in zip(tiny.parameters(), grads, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_what_all_rows_begin_with_is_computed_once_under_autocast_too(tiny, device):
    tokens, model = torch.randint(0, 40, (3, 40), generator=seeded()), tiny.to(device)
    tokens[:, :25] = tokens[0, :25]
    want = token_logps(model, tokens.to(device))
    model.autocast = True
    got = token_logps(model, tokens.to(device))
    assert 1e-4 < (got - want).abs().mean() < 0.1
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_row_past_the_context_is_refused_whatever_the_rows_share(tiny):
    with pytest.raises(UserError, match="65 tokens do not fit"):
        tiny.hidden(torch.zeros(2, 65, dtype=torch.long))


def test_the_head_runs_on_no_more_positions_than_asked_for(tiny, monkeypatch):
    seen, head = [], tiny.head

    def counting(h):
        seen.append(len(h))
        return head(h)

    monkeypatch.setattr(tiny, "head", counting)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3:8] = True
    token_logps(tiny, torch.zeros(2, 10, dtype=torch.long), mask=mask, chunk_floats=40 * 2)
    assert sum(seen) == 5 and max(seen) == 2


def test_padding_changes_no_log_prob(tiny):
    tokens = torch.randint(0, 40, (2, 9), generator=seeded())
    padded = F.pad(tokens, (0, 6), value=39)
    assert torch.allclose(token_logps(tiny, padded)[:, :8], token_logps(tiny, tokens), atol=1e-5)


def test_logits_and_log_probs_are_fp32_whatever_the_weights_are(tiny):
    idx, tokens = torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3]])
    half = copy.deepcopy(tiny).bfloat16()
    assert half(idx).dtype == token_logps(half, tokens).dtype == torch.float32
    h = torch.randn(5, 16, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert token_logps(tiny, tokens).dtype == tiny(idx).dtype == torch.float32
        logits = tiny.head(h)
    assert torch.allclose(logits, h @ tiny.embed.weight.T, atol=1e-5)  # not rounded to bfloat16
    assert all(p.dtype == torch.float32 for p in tiny.parameters())


def test_autocast_is_for_training_and_leaves_sampling_alone(tiny):
    tokens = torch.randint(0, 40, (3, 15), generator=seeded())
    logp, logits = token_logps(tiny, tokens), tiny(tokens)
    tiny.autocast = True
    rounded = token_logps(tiny, tokens)
    assert rounded.dtype == torch.float32 and torch.equal(tiny(tokens), logits)
    assert 1e-4 < (rounded - logp).abs().mean() < 0.1
    rounded.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in tiny.parameters())


def test_training_uses_the_compiled_trunk_and_sampling_does_not(tiny):
    tokens, calls = torch.randint(0, 40, (3, 15), generator=seeded()), []
    want = token_logps(tiny, tokens)

    def compiled(idx):
        calls.append(idx.shape)
        return tiny.trunk(idx)

    tiny.compiled_trunk = compiled
    assert torch.equal(token_logps(tiny, tokens), want) and calls == [(3, 14)]
    generate(tiny, RAGGED, max_new_tokens=4, generator=seeded())
    assert len(calls) == 1


# ------------------------------------------------------------------------------------ fast products


def graph(node):
    """The names of what autograd has recorded, in one text."""
    return repr(node) + "".join(graph(other) for other, _ in node.next_functions if other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 50, 8), (150, 8), (2, 8)])
def test_onednn_multiplies_as_torch_does_forwards_and_backwards(monkeypatch, shape, bias):
    layer, found = Linear(8, 12, bias=bias), []
    x = torch.randn(shape, generator=seeded(), requires_grad=True)
    weights = torch.randn(*shape[:-1], 12, generator=seeded(1))
    for onednn in (False, True):
        monkeypatch.setattr(Linear, "onednn", onednn)
        y = layer(x)
        assert ("OneDNN" in graph(y.grad_fn)) == (onednn and x.numel() >= 128 * 8)
        found.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], weights)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_adapters_learn_the_same_with_onednn(tiny, monkeypatch):
    add_lora(tiny, 2, 4.0, seeded())
    tokens, found = torch.randint(0, 20, (8, 30), generator=seeded(1)), []
    for onednn in (False, True):
        monkeypatch.setattr(Linear, "onednn", onednn)
        tiny.zero_grad()
        token_logps(tiny, tokens).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in tiny.parameters() if p.requires_grad]))
    one, other = found
    largest = one.abs().max()  # sums that cancel are off by rounding of their terms
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * largest) and largest > 0.1
    assert (one - other).norm() < 1e-5 * one.norm()


def test_where_torch_lacks_the_operator_onednn_does_not_pay(monkeypatch):
    def missing(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(OneDNN, "apply", missing)
    assert onednn_pays() is False


# --------------------------------------------------------------------------------------- optimisers


def test_each_weight_has_one_optimiser_and_muon_only_the_blocks_matrices(tiny):
    named = dict(tiny.named_parameters())
    for kind, n_optimizers in (("muon", 2), ("adamw", 1)):
        optimizers = make_optimizers(tiny, 0.1, kind)
        assert len(optimizers) == n_optimizers
        owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        assert sorted(map(id, owned)) == sorted(map(id, named.values()))
    muon = make_optimizers(tiny, 0.1, "muon")[0]
    matrices = [p for name, p in named.items() if "blocks" in name and p.dim() == 2]
    assert list(map(id, muon.param_groups[0]["params"])) == list(map(id, matrices))
    optimizers = make_optimizers(tiny, 0.1, "muon")
    set_lr(optimizers, 0.025)
    assert [group["lr"] for o in optimizers for group in o.param_groups] == [0.025, 0.025]


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_muon_is_torchs_but_for_the_rounding_of_bfloat16(shape):
    mine, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    ours = Muon([mine], 0.1)
    torchs = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(5):  # whatever the gradients' size
        mine.grad = torch.randn(shape, generator=seeded(step)) * 10.0 ** (step - 3)
        theirs.grad = mine.grad.clone()
        ours.step()
        torchs.step()
    assert (mine - theirs).norm() < 0.03 * theirs.norm()


def test_gradients_are_clipped_and_cleared_and_skipped_if_not_finite(tiny):
    before = [p.detach().clone() for p in tiny.parameters()]
    optimizers = [torch.optim.SGD(tiny.parameters(), lr=1.0)]

    def step(value):
        for p in tiny.parameters():
            p.grad = torch.full_like(p, value)
        result = apply_gradients(tiny, optimizers, 0.5)
        assert all(p.grad is None for p in tiny.parameters())
        return result

    assert step(float("nan"))[1] == step(float("inf"))[1] == 1
    assert all(torch.equal(p, q) for p, q in zip(tiny.parameters(), before, strict=True))
    n = sum(p.numel() for p in tiny.parameters())
    assert step(2.0) == (pytest.approx(2 * math.sqrt(n), rel=1e-4), 0)
    moved = [(p - q).flatten() for p, q in zip(tiny.parameters(), before, strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(0.5, rel=1e-3)


# -------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_gives_the_same_model_back(tiny, tmp_path):
    path = str(tmp_path / "deep" / "ckpt.pt")
    save_checkpoint(path, {"model_config": asdict(tiny.cfg), "model": tiny.state_dict()})
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_model(path)(idx), tiny(idx))
    assert os.listdir(tmp_path / "deep") == ["ckpt.pt"]


def test_a_checkpoint_that_fails_half_way_leaves_the_old_one(tiny, tmp_path, monkeypatch):
    path = str(tmp_path / "ckpt.pt")
    save_checkpoint(path, {"model_config": {}, "model": {"x": torch.ones(1)}})

    def save(state, f):
        f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(model_file.torch, "save", save)
    with pytest.raises(UserError, match="ckpt.pt.*disk full.*unchanged"):
        save_checkpoint(path, {"model_config": {}, "model": {"x": torch.zeros(1)}})
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    assert load_checkpoint(path)["model"]["x"] == 1


@pytest.mark.parametrize("busy, there", [(3, True), (4, False)])
def test_a_file_that_another_program_reads_is_waited_for(tmp_path, monkeypatch, busy, there):
    replace, tried, slept = os.replace, [], []

    def on_windows(*paths):
        tried.append(paths)
        if len(tried) <= busy:
            raise PermissionError(13, "used by another process")
        replace(*paths)

    monkeypatch.setattr(os, "replace", on_windows)
    monkeypatch.setattr(model_file.time, "sleep", slept.append)
    path = tmp_path / "x.json"
    try:
        with model_file.atomic_write(str(path)) as f:
            f.write(b"new")
    except UserError as e:
        assert "used by another process" in str(e)
    assert path.exists() == there and len(tried) == 4 and slept == [0.1, 0.5, 2]
    assert not (tmp_path / "x.json.tmp").exists()


def test_missing_torn_and_foreign_checkpoints_are_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at .*gone.pt"):
        load_checkpoint(str(tmp_path / "gone.pt"))
    torch.save({"model_config": {}, "model": {"x": torch.ones(1000)}}, tmp_path / "torn.pt")
    whole = (tmp_path / "torn.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(whole[:900])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model_config": {}, "model": {}, "settings": 5}, tmp_path / "settings.pt")
    for name in ("torn.pt", "text.pt", "list.pt", "settings.pt"):
        with pytest.raises(UserError, match=name) as e:
            load_checkpoint(str(tmp_path / name))
        assert "\n" not in str(e.value)


def test_no_memory_is_no_damage(monkeypatch, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"whole")
    for error in (MemoryError, torch.OutOfMemoryError):
        def fails(*args, error=error, **kwargs):
            raise error("CUDA out of memory")

        monkeypatch.setattr(torch, "load", fails)
        with pytest.raises(error):
            load_checkpoint(str(tmp_path / "ckpt.pt"))


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tiny, tmp_path):
    cfg, weights = asdict(tiny.cfg), tiny.state_dict()
    configs = {"unknown.pt": {**cfg, "moe": 8}, "shape.pt": {**cfg, "n_embd": 8}, "config.pt": 5,
               "negative.pt": {**cfg, "n_layer": -1}}
    files = {name: {"model_config": wrong, "model": weights} for name, wrong in configs.items()}
    files["weights.pt"] = {"model_config": cfg, "model": {"x": torch.ones(1)}}
    for name, state in files.items():
        torch.save(state, tmp_path / name)
        with pytest.raises(UserError) as e:
            load_model(str(tmp_path / name))
        assert "\n" not in str(e.value)


def test_a_checkpoint_is_loaded_into_the_class_asked_for(tiny, tmp_path):
    class Other(GPT):
        pass

    path = str(tmp_path / "ckpt.pt")
    save_checkpoint(path, {"model_config": asdict(tiny.cfg), "model": tiny.state_dict()})
    assert type(load_model(path, cls=Other)) is Other and type(load_model(path)) is GPT


def test_loading_a_checkpoint_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))
    torch.save({"model_config": {}, "model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(UserError):
        load_checkpoint(str(tmp_path / "trap.pt"))
    assert not (tmp_path / "sprung").exists()


# -------------------------------------------------------------------------------------------- LoRA


def with_adapters(model, rank=2, alpha=4.0):
    """The model with adapters that already matter, and its view without them."""
    view = same_weights(model)
    add_lora(model, rank, alpha, torch.Generator().manual_seed(1))
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p, std=0.3)
    return model, view


def test_fresh_adapters_change_nothing_and_alone_are_trained(tiny):
    idx = torch.tensor([[1, 2, 3, 4]])
    before = tiny(idx)
    add_lora(tiny, 2, 4.0, torch.Generator())
    assert torch.equal(tiny(idx), before)
    trained = [name for name, p in tiny.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all(name.endswith((".A", ".B")) for name in trained)
    for kind in ("adamw", "muon"):
        optimizers = make_optimizers(tiny, 0.1, kind)
        assert sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(trained)


def test_a_view_shares_all_weights_and_has_no_adapters(tiny):
    idx, before = torch.tensor([[1, 2, 3, 4]]), tiny(torch.tensor([[1, 2, 3, 4]]))
    model, view = with_adapters(tiny)
    assert torch.equal(view(idx), before) and (model(idx) - before).abs().max() > 0.1
    assert view.embed.weight is model.embed.weight and view.cos is model.cos
    assert view.blocks[0].attn.q_proj.weight is model.blocks[0].attn.q_proj.weight


def test_a_merged_model_is_an_ordinary_one_that_computes_the_same(tiny):
    idx, cfg = torch.tensor([[1, 2, 3, 4]]), tiny.cfg
    plain = tiny.state_dict()
    assert all(torch.equal(plain[name], t) for name, t in merged_state(tiny).items())
    model, _ = with_adapters(tiny)
    merged = GPT(cfg)
    merged.load_state_dict(merged_state(model))
    assert (merged(idx) - model(idx)).abs().max() < 1e-4


def test_beside_bfloat16_weights_adapters_stay_in_fp32_and_small_updates_count(tiny):
    model = tiny.bfloat16()
    view = same_weights(model)
    add_lora(model, 2, 4.0, torch.Generator().manual_seed(1))
    layer, same = model.blocks[0].mlp.up_proj, view.blocks[0].mlp.up_proj
    assert layer.A.dtype == layer.B.dtype == torch.float32
    torch.nn.init.constant_(layer.B, 1e-7)
    state = merged_state(model)  # where weights are converted, a tied embedding's stay one tensor
    assert state["embed.weight"].data_ptr() == state["lm_head.weight"].data_ptr()
    merged = state["blocks.0.mlp.up_proj.weight"]
    assert torch.equal(merged.bfloat16(), same.weight) and not torch.equal(merged, same.weight)
    layer.weight.data.zero_()  # shared: what is left is the adapter's part
    x = torch.ones(1, layer.in_features, dtype=torch.bfloat16)
    assert same(x).abs().max() == 0 < layer(x).abs().max()
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.float32
