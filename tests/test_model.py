"""The transformer, its cache, sampling and log-probs: what RL silently relies on."""
import copy
import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F

import model as model_file
from model import (GPT, BadInput, GPTConfig, KVCache, PrefillCache, apply_rope, generate, load_checkpoint, load_model,
                   rope_table, sample_token, save_checkpoint, token_logps)

RAGGED = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Scripted(GPT):
    """Emits scripted tokens: script[i] is what row i says, whatever it reads."""

    def __init__(self, script, vocab_size=40):
        super().__init__(GPTConfig(vocab_size=vocab_size, n_layer=1, n_embd=8, n_head=2, n_kv_head=1, head_dim=4, mlp_dim=8, context=64))
        self.script, self.t = script, -1

    def head(self, h):
        self.t += 1
        wanted = torch.tensor([row[min(self.t, len(row) - 1)] for row in self.script])
        return F.one_hot(wanted, self.cfg.vocab_size).float() * 100


def say(script, **options):
    return generate(Scripted(script), [[1, 2]] * len(script), drop_rows=False, temperature=1.0, generator=seeded(), **options)


# ---------------------------------------------------------------------------------------- transformer


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
    outs = []
    for h in range(cfg.n_head):
        kv = h // (cfg.n_head // cfg.n_kv_head)
        part = lambda proj, i: (x @ proj.weight.T)[..., i * cfg.d_head:(i + 1) * cfg.d_head]
        q, k, v = apply_rope(part(attn.q_proj, h), cos[:6], sin[:6]), apply_rope(part(attn.k_proj, kv), cos[:6], sin[:6]), part(attn.v_proj, kv)
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
    assert torch.allclose(apply_rope(x, cos[:10], sin[:10]), torch.cat((want.real, want.imag), -1), atol=1e-5)


def test_only_the_distance_between_positions_matters(tiny):
    idx = torch.randint(0, 40, (1, 9), generator=seeded())
    at = lambda start: tiny.trunk(idx, torch.arange(start, start + 9)[None])
    assert torch.allclose(at(0), at(30), atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"tied": False}, {"n_kv_head": 1}, {"n_kv_head": 4, "head_dim": 6}])
def test_every_architecture_option_decodes_as_it_trains(options):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**dict(vocab_size=40, n_layer=2, n_embd=16, n_head=4, n_kv_head=2, mlp_dim=24, context=64), **options}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=seeded(3)))
    out = model.generate(RAGGED, 2, max_new_tokens=20, generator=seeded())
    assert torch.allclose(token_logps(model, out.tokens)[out.mask[:, 1:]], out.logp[:, 1:][out.mask[:, 1:]], atol=1e-4)


def test_impossible_shapes_are_refused_by_name():
    for wrong, word in [({"n_kv_head": 3}, "n_kv_head"), ({"head_dim": 5}, "odd"), ({"n_layer": 0}, "n_layer")]:
        with pytest.raises(BadInput, match=word):
            GPT(GPTConfig(**{**dict(n_head=4), **wrong}))


# ---------------------------------------------------------------------------------------- cache


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
        got = tiny.head(tiny.trunk(idx[rows, t:t + 1], torch.full((len(rows), 1), t), caches))
        assert torch.allclose(got[:, 0], tiny(idx[rows])[:, t], atol=1e-4)


def test_the_cache_is_written_in_place():
    cache = KVCache(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), columns=10)
    where = cache.k.data_ptr()
    k, _ = cache.append(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    assert cache.k.data_ptr() == where == k.data_ptr() and k.shape[2] == 4


# ---------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("share, drop", list(itertools.product([True, False], repeat=2)))
def test_sampling_log_probs_equal_recomputed_ones_for_ragged_prompts(tiny, share, drop):
    out = tiny.generate(RAGGED, 3, max_new_tokens=40, temperature=0.7, stop_ids=(1, 2), generator=seeded(), share_prefix=share, drop_rows=drop)
    assert len(set(out.mask.sum(1).tolist())) > 3  # uneven lengths, or rows were never dropped
    again = token_logps(tiny, out.tokens, temperature=0.7)
    assert torch.allclose(again[out.mask[:, 1:]], out.logp[:, 1:][out.mask[:, 1:]], atol=1e-4)


def test_sharing_prefixes_and_dropping_rows_change_no_sample(tiny):
    a, *others = [tiny.generate(RAGGED, 4, max_new_tokens=40, stop_ids=(1, 2), generator=seeded(5), share_prefix=s, drop_rows=d)
                  for s, d in itertools.product([True, False], repeat=2)]
    for b in others:
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.mask, b.mask)
        assert torch.allclose(a.logp, b.logp, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))])
def test_decoding_with_fixed_shapes_changes_no_sample(tiny, device):
    tiny = tiny.to(device)
    for prompts in (RAGGED, [[5, 6, 7], [8, 9, 10]]):
        a, b = (tiny.generate(prompts, 4, max_new_tokens=48, stop_ids=(1, 2), generator=seeded(5), static=s) for s in (False, True))
        assert torch.equal(a.tokens, b.tokens) and torch.allclose(a.logp, b.logp, atol=1e-4)
        assert torch.allclose(token_logps(tiny, b.tokens)[b.mask[:, 1:]], b.logp[:, 1:][b.mask[:, 1:]], atol=1e-4)


def test_a_fixed_shape_lasts_until_its_columns_or_rows_change(tiny, monkeypatch):
    shapes, capture = [], model_file.StaticDecoder.capture
    monkeypatch.setattr(model_file.StaticDecoder, "capture", lambda self: shapes.append(self.shape) or capture(self))
    wide = GPT(GPTConfig(vocab_size=40, n_layer=1, n_embd=16, n_head=2, n_kv_head=1, head_dim=4, mlp_dim=16, context=400))
    wide.generate([[1] * 100], 4, max_new_tokens=60, generator=seeded(), static=True)
    assert shapes == [(4, 128), (4, 160)]
    shapes.clear()
    tiny.generate(RAGGED, 8, max_new_tokens=48, stop_ids=(1, 2, 3, 4), generator=seeded(), static=True)
    assert [n for n, _ in shapes] == sorted({n for n, _ in shapes}, reverse=True) and shapes[-1][0] <= 16  # halved at least, each time


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_bfloat16_sampling_on_cuda_stays_near_the_fp32_log_probs(tiny):
    half = copy.deepcopy(tiny).cuda().bfloat16()
    out = half.generate(RAGGED, 8, max_new_tokens=40, stop_ids=(1,), generator=seeded())
    gap = (token_logps(tiny.cuda(), out.tokens) - out.logp[:, 1:])[out.mask[:, 1:]]
    assert gap.abs().mean() < 0.05


def test_finished_rows_leave_the_batch(tiny, monkeypatch):
    sizes, trunk = [], tiny.trunk
    monkeypatch.setattr(tiny, "trunk", lambda idx, *a, **k: sizes.append(len(idx)) or trunk(idx, *a, **k))
    tiny.generate(RAGGED, 8, max_new_tokens=48, stop_ids=(1, 2, 3, 4), generator=seeded())
    assert sizes[0] == 4 and sizes[1] == 32 and sizes[-1] < 16  # prompts once, groups, then fewer and fewer


def test_a_prompt_sits_before_its_completion_and_padding_behind(tiny):
    out = tiny.generate(RAGGED, 2, max_new_tokens=30, stop_ids=(1,), generator=seeded(), pad_id=39)
    for i, row in enumerate(out.tokens.tolist()):
        prompt, n = RAGGED[i // 2], int(out.mask[i].sum())
        assert row[:len(prompt)] == prompt and out.prompt_lens[i] == len(prompt)
        assert out.mask[i].nonzero()[:, 0].tolist() == list(range(len(prompt), len(prompt) + n))
        assert row[len(prompt) + n:] == [39] * (len(row) - len(prompt) - n)
        assert out.completions()[i] == row[len(prompt):len(prompt) + n]
    assert (out.logp[~out.mask] == 0).all()


def test_the_mask_ends_with_the_first_end_token():
    out = say([[7, 8, 9, 3, 7, 3], [7] * 6], max_new_tokens=6, stop_ids=(3,))
    assert out.completions() == [[7, 8, 9, 3], [7] * 6]
    assert out.truncated.tolist() == [False, True]


def test_the_mask_keeps_the_end_token_when_pad_and_end_share_an_id():
    out = say([[7, 3, 8], [3, 8, 8]], max_new_tokens=6, stop_ids=(3,), pad_id=3)
    assert out.completions() == [[7, 3], [3]]
    assert out.mask.sum(1).tolist() == [2, 1]


def test_any_of_several_end_tokens_ends_a_completion_also_at_once():
    out = say([[3, 7], [7, 4, 7], [5]], max_new_tokens=6, stop_ids=(3, 4, 5))
    assert out.completions() == [[3], [7, 4], [5]]
    assert not out.truncated.any()


def test_a_completion_that_ends_with_its_last_allowed_token_is_not_truncated():
    out = say([[7, 7, 3], [7, 7, 7]], max_new_tokens=3, stop_ids=(3,))
    assert out.truncated.tolist() == [False, True]


def test_samples_follow_the_whole_softmax_and_no_top_k():
    logits = torch.linspace(-1.5, 1.5, 100).repeat(40000, 1)
    token, logp = sample_token(logits, 2.0, torch.rand(40000, generator=seeded()))
    p = (logits[0] / 2.0).softmax(-1)
    share = token.bincount(minlength=100) / 40000
    assert ((share - p).abs() < 5 * (p / 40000).sqrt()).all()  # every one of the 100, within five sigma
    assert torch.allclose(logp, p.log()[token], atol=1e-5)


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.full((4, 6), -torch.inf)
    logits[:, 2:4] = 0.0
    token, _ = sample_token(logits, 1.0, torch.tensor([0.0, 0.4999, 0.5001, 1 - 2**-24]))
    assert token.tolist() == [2, 2, 3, 3]


def test_temperature_zero_takes_the_likeliest_token(tiny):
    out = tiny.generate([[5, 6]], 2, max_new_tokens=8, temperature=0, generator=seeded())
    assert out.tokens[0, 2] == tiny(torch.tensor([[5, 6]]))[0, -1].argmax()
    assert torch.equal(out.tokens[0], out.tokens[1])


def test_the_same_seed_gives_the_same_samples_and_another_others(tiny):
    a, b, c = (tiny.generate(RAGGED, 2, max_new_tokens=16, generator=seeded(s)).tokens for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_prompts_that_do_not_fit_are_refused_with_the_numbers(tiny):
    with pytest.raises(BadInput, match="60 tokens.*max_new_tokens=5.*64"):
        tiny.generate([[1] * 60], max_new_tokens=5)
    for empty in ([], [[]], [[1], []]):
        with pytest.raises(BadInput, match="at least one"):
            tiny.generate(empty, max_new_tokens=5)


# ---------------------------------------------------------------------------------------- log-probs


def test_checkpointing_changes_no_gradient(tiny):
    tokens = torch.randint(0, 40, (3, 15), generator=seeded())
    grads = []
    for tiny.checkpointing in (False, True):
        tiny.zero_grad()
        token_logps(tiny, tokens).sum().backward()
        grads.append([p.grad.clone() for p in tiny.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


def test_chunked_log_probs_and_gradients_equal_the_plain_ones(tiny):
    tokens = torch.randint(0, 40, (3, 15), generator=seeded())
    mask = torch.rand(3, 14, generator=seeded()) < 0.6
    plain = F.log_softmax(tiny(tokens[:, :-1]) / 0.8, -1).gather(-1, tokens[:, 1:, None])[..., 0] * mask
    plain.sum().backward()
    want = [p.grad.clone() for p in tiny.parameters()]
    for chunk_floats in (40 * 4, 2**24):  # four positions at a time; all at once
        tiny.zero_grad()
        got = token_logps(tiny, tokens, 0.8, mask, chunk_floats)
        got.sum().backward()
        assert torch.allclose(got, plain, atol=1e-5)
        for p, w in zip(tiny.parameters(), want):
            assert torch.allclose(p.grad, w, atol=1e-3, rtol=1e-4)


def test_the_head_runs_on_no_more_positions_than_asked_for(tiny, monkeypatch):
    seen, head = [], tiny.head
    monkeypatch.setattr(tiny, "head", lambda h: seen.append(len(h)) or head(h))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3:8] = True
    token_logps(tiny, torch.zeros(2, 10, dtype=torch.long), mask=mask, chunk_floats=40 * 2)
    assert sum(seen) == 5 and max(seen) == 2


def test_padding_changes_no_log_prob(tiny):
    tokens = torch.randint(0, 40, (2, 9), generator=seeded())
    padded = F.pad(tokens, (0, 6), value=39)
    assert torch.allclose(token_logps(tiny, padded)[:, :8], token_logps(tiny, tokens), atol=1e-5)


def test_logits_and_log_probs_are_fp32_whatever_the_weights_are(tiny):
    half = copy.deepcopy(tiny).bfloat16()
    assert half(torch.tensor([[1, 2]])).dtype == token_logps(half, torch.tensor([[1, 2, 3]])).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = token_logps(tiny, torch.tensor([[1, 2, 3]]))
        assert logps.dtype == tiny(torch.tensor([[1, 2]])).dtype == torch.float32
        h = torch.randn(5, 16, generator=seeded())
        logits = tiny.head(h)
    assert torch.allclose(logits, h @ tiny.embed.weight.T, atol=1e-5)  # not rounded to bfloat16 on the way
    assert all(p.dtype == torch.float32 for p in tiny.parameters())


# ---------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_gives_the_same_model_back(tiny, tmp_path):
    from dataclasses import asdict
    path = str(tmp_path / "deep" / "ckpt.pt")
    save_checkpoint(path, {"model_config": asdict(tiny.cfg), "model": tiny.state_dict()})
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_model(path)(idx), tiny(idx))
    assert os.listdir(tmp_path / "deep") == ["ckpt.pt"]


def test_a_checkpoint_that_fails_half_way_leaves_the_old_one(tiny, tmp_path, monkeypatch):
    path = str(tmp_path / "ckpt.pt")
    save_checkpoint(path, {"model_config": {}, "model": {"x": torch.ones(1)}})
    monkeypatch.setattr(model_file.torch, "save", lambda state, f: f.write(b"half") and (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(BadInput, match="ckpt.pt.*disk full.*untouched"):
        save_checkpoint(path, {"model_config": {}, "model": {"x": torch.zeros(1)}})
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    assert load_checkpoint(path)["model"]["x"] == 1


def test_missing_torn_and_foreign_checkpoints_are_named_in_one_line(tmp_path):
    with pytest.raises(BadInput, match="no checkpoint at .*gone.pt"):
        load_checkpoint(str(tmp_path / "gone.pt"))
    torch.save({"model_config": {}, "model": {"x": torch.ones(1000)}}, tmp_path / "torn.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "torn.pt").read_bytes()[:900])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("torn.pt", "text.pt", "list.pt"):
        with pytest.raises(BadInput, match=name) as e:
            load_checkpoint(str(tmp_path / name))
        assert "\n" not in str(e.value)


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tiny, tmp_path):
    from dataclasses import asdict
    good = {"model_config": asdict(tiny.cfg), "model": tiny.state_dict()}
    for name, wrong in (("unknown.pt", {"model_config": {**good["model_config"], "moe": 8}}), ("shape.pt", {"model_config": {**good["model_config"], "n_embd": 8}}),
                        ("config.pt", {"model_config": 5}), ("weights.pt", {"model": {"x": torch.ones(1)}}), ("negative.pt", {"model_config": {**good["model_config"], "n_layer": -1}})):
        torch.save({**good, **wrong}, tmp_path / name)
        with pytest.raises(BadInput) as e:
            load_model(str(tmp_path / name))
        assert "\n" not in str(e.value)


def test_loading_a_checkpoint_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))
    torch.save({"model_config": {}, "model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(BadInput):
        load_checkpoint(str(tmp_path / "trap.pt"))
    assert not (tmp_path / "sprung").exists()
