"""A Llama/Qwen-style decoder with KV-cached group sampling, in one file.

Settings, the transformer, `generate` (what RL samples with), `token_logps` (what RL trains with),
checkpoints; last, and to skip at first, Hugging Face folders. Token ids only: text is in data.py.

    python -c "import model; print(model.GPT(model.GPTConfig()))"
"""
import copy
import json
import math
import operator
import os
import random
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------
# Settings and randomness, for all files


class UserError(ValueError):
    """An error the user can fix. The scripts print it as one line and exit with code 2."""


@contextmanager
def any_terminal(code=0):
    """For scripts: replaces what stdout cannot show (cp1252, ASCII), ends `... | head` quietly,
    with exit code `code`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush when Python exits
        sys.exit(code)


def opt(default, help, least=None, most=None, above=None, choices=None):
    """A setting: a dataclass field with its help text and the values that it may have."""
    return field(default=default, metadata={"help": help, "least": least, "most": most,
                                            "above": above, "choices": choices})


def validate(cfg):
    """Raises UserError naming a setting that is out of bounds, or whatever `cfg.check` does."""
    for f in fields(cfg):
        value, choices = getattr(cfg, f.name), f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"{f.name}={value} is not one of {', '.join(choices)}")
        if f.type is float and not math.isfinite(value):
            raise UserError(f"{f.name}={value} is not a finite number")
        if f.type is int and abs(value) >= 2**63:
            raise UserError(f"{f.name}={str(value)[:20]}... is out of bounds (64 bits)")
        for word, holds in (("above", operator.gt), ("least", operator.ge), ("most", operator.le)):
            bound = f.metadata[word]
            if bound is not None and not holds(value, bound):
                raise UserError(f"{f.name}={value} is out of bounds ({word} {bound})")
    if hasattr(cfg, "check"):
        cfg.check()


def pick(cls, settings):
    """A `cls` from {name: value}; names that are not among its fields are ignored."""
    return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})


def generators(*key):
    """A Python and a torch generator seeded with `key`, such as (seed, stage, step), so that a
    resumed run draws what an uninterrupted one would have drawn."""
    rng = random.Random("/".join(map(str, key)))
    return rng, torch.Generator().manual_seed(rng.getrandbits(60))


@dataclass
class GPTConfig:
    vocab_size: int = opt(512, "token ids; train.py sets it to the tokenizer's", least=1)
    n_layer: int = opt(3, "transformer blocks", least=1)
    n_embd: int = opt(128, "width of the residual stream", least=1)
    n_head: int = opt(4, "query heads", least=1)
    n_kv_head: int = opt(2, "key/value heads; each serves n_head / n_kv_head query heads", least=1)
    head_dim: int = opt(16, "width of a head; 0 = n_embd / n_head", least=0)
    mlp_dim: int = opt(256, "hidden width of the SwiGLU MLP", least=1)
    context: int = opt(512, "longest sequence, in tokens", least=1)
    rope_theta: float = opt(10000.0, "RoPE base", above=0)
    rope_factor: float = opt(1.0, "Llama 3.1 RoPE scaling: its factor", least=1)
    rope_low: float = opt(1.0, "... its low_freq_factor", above=0)
    rope_high: float = opt(4.0, "... its high_freq_factor", above=0)
    rope_original: int = opt(8192, "... its original context", least=1)
    norm_eps: float = opt(1e-6, "RMSNorm epsilon", least=0)
    qkv_bias: bool = opt(False, "bias on q, k, v (Qwen2)")
    o_bias: bool = opt(False, "bias on the attention's output (Llama's attention_bias)")
    mlp_bias: bool = opt(False, "bias on the MLP's matrices (Llama's mlp_bias)")
    qk_norm: bool = opt(True, "RMSNorm on each head's q and k before RoPE (Qwen3)")
    tied: bool = opt(True, "output head shares the embedding's weights")

    def check(self):
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.d_head % 2:
            raise UserError(f"head_dim={self.d_head} is odd, and RoPE rotates pairs")
        if not self.rope_low < self.rope_high:
            raise UserError(f"rope_low={self.rope_low} must be below rope_high={self.rope_high}")

    @property
    def d_head(self):
        return self.head_dim or self.n_embd // self.n_head


# cuDNN's attention would plan anew for every shape, and shapes change with every batch.
torch.backends.cuda.enable_cudnn_sdp(False)

# ------------------------------------------------------------------------------------------------
# The transformer. B rows, T tokens, C = n_embd, H query heads and K key/value heads of width D


def rope_table(cfg, device=None):
    """cos and sin of each position's angles, both (context, D), the first half of the sines
    negated. arXiv 2104.09864; scaling as in Llama 3.1."""
    half = torch.arange(0, cfg.d_head, 2, device=device, dtype=torch.float32)
    freq = cfg.rope_theta ** (-half / cfg.d_head)
    if cfg.rope_factor != 1:
        turns = cfg.rope_original * freq / (2 * math.pi)
        keep = ((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / cfg.rope_factor)
    angle = torch.outer(torch.arange(cfg.context, device=device, dtype=torch.float32), freq)
    return angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)


def apply_rope(x, cos, sin):
    """Rotates each pair (a, b) = (x[i], x[i + D/2]) of x (B, H, T, D) to (a cos - b sin, b cos +
    a sin). The minus is in the table, which saves one pass."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Linear(nn.Linear):
    """nn.Linear; with `onednn` large fp32 products go through oneDNN, on some CPUs the faster."""
    onednn = False

    def forward(self, x):
        large = self.onednn and x.numel() >= 128 * x.shape[-1]
        if large and x.is_cpu and x.dtype == torch.float32 and not (
                torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
            # Flattened here: LoRA could not add in place to a view that OneDNN itself returned.
            y = OneDNN.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
            return y if self.bias is None else y + self.bias
        return super().forward(x)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C, H, K, D = cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.d_head
        self.n_kv_head, self.d_head = K, D
        self.q_proj = Linear(C, H * D, bias=cfg.qkv_bias)
        self.k_proj = Linear(C, K * D, bias=cfg.qkv_bias)
        self.v_proj = Linear(C, K * D, bias=cfg.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=cfg.o_bias)
        norm = nn.RMSNorm if cfg.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(D, eps=cfg.norm_eps), norm(D, eps=cfg.norm_eps)

    def forward(self, x, cos, sin, cache=None, mask=None):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.d_head).transpose(1, 2)  # (B, H or K, T, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        # Norm and RoPE in the dtype of cos: fp32, also under autocast.
        q, k = (apply_rope(norm(y.to(cos.dtype)), cos, sin).to(v.dtype)
                for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        if cache is not None:
            k, v = cache.append(k, v)  # all columns so far
        if T == 1:
            # Decoding: query heads that share a key head become the rows of one small matrix, so
            # that the cache is read once and never repeated per head.
            q = q.view(B, self.n_kv_head, -1, self.d_head)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, 1, -1)
        else:
            # Training and prefill: rows are right-padded, so the causal mask hides the padding.
            if k.is_cuda and k.dtype == torch.float32:  # CUDA's fused kernel for it has no groups
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                               enable_gqa=True)
            y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = Linear(cfg.n_embd, cfg.mlp_dim, bias=cfg.mlp_bias)
        self.up_proj = Linear(cfg.n_embd, cfg.mlp_dim, bias=cfg.mlp_bias)
        self.down_proj = Linear(cfg.mlp_dim, cfg.n_embd, bias=cfg.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attn_norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.attn = Attention(cfg)
        self.mlp_norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, cos, sin, cache=None, mask=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, cache, mask)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A decoder-only transformer: token ids (B, T) -> fp32 logits (B, T, vocab)."""

    def __init__(self, cfg):
        super().__init__()
        validate(cfg)
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.lm_head = Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tied:
            self.lm_head.weight = self.embed.weight
        cos, sin = rope_table(cfg)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # How `hidden` computes; `Run.set_up` in train.py sets these.
        self.autocast, self.checkpointing, self.compiled_trunk = False, False, None
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Layers that write into the residual stream start smaller, as in GPT-2.
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if into_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def trunk(self, idx, positions=None, caches=None, mask=None):
        """Token ids (B, T), at positions (B, T) or 0..T-1 -> the normed hidden states (B, T, C)
        that the head reads. Raises UserError if T is past the context."""
        T = idx.shape[1]
        if T > self.cfg.context:
            raise UserError(f"{T} tokens do not fit the context of {self.cfg.context}")
        if positions is None:
            positions = torch.arange(T, device=idx.device)[None]
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (B or 1, 1, T, D)
        x = self.embed(idx)
        for i, block in enumerate(self.blocks):
            if self.checkpointing and caches is None and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, caches[i] if caches else None, mask)
        return self.norm(x)

    def hidden(self, idx):
        """`trunk` as training runs it, ids (B, T) -> (B, T, C). Autocast covers only this call:
        it caches bfloat16 copies of the weights, which an optimiser step makes stale."""
        with torch.autocast(idx.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            if not (self.compiled_trunk or self.checkpointing):
                return self.trunk_sharing_prefix(idx)
            return (self.compiled_trunk or self.trunk)(idx)

    def trunk_sharing_prefix(self, idx):
        """`trunk`, but a prefix that all rows share (instructions, worked examples) is computed
        once, if it is a quarter of a row or more. At least two columns are left for the rest, since
        `Attention` takes a single one for decoding."""
        (N, T), device = idx.shape, idx.device
        n = min(int((idx == idx[0]).all(dim=0).long().cumprod(0).sum()), T - 2)
        if N == 1 or 4 * n < T or T > self.cfg.context:
            return self.trunk(idx)
        # Imported only here: it brings torch's compiler along, which takes seconds.
        from torch.nn.attention.bias import causal_lower_right

        prefix = [PrefillCache() for _ in self.blocks]
        start = self.trunk(idx[:1, :n], caches=prefix)
        rest = self.trunk(idx[:, n:], torch.arange(n, T, device=device)[None],
                          [AfterPrefix(cache) for cache in prefix], causal_lower_right(T - n, T))
        return torch.cat([start.expand(N, -1, -1), rest], dim=1)

    def head(self, h):
        """Hidden states (..., C) -> logits (..., vocab), computed in the weights' dtype also under
        autocast: in bfloat16, logits near 20 would be off by 0.06."""
        with torch.autocast(h.device.type, enabled=False):
            return self.lm_head(h.to(self.embed.weight.dtype)).float()

    def forward(self, idx):
        return self.head(self.trunk(idx))


# ------------------------------------------------------------------------------------------------
# Sampling


class KVCache:
    """The keys and values of one layer, (N, K, columns, D) each, written in place."""

    def __init__(self, k, v, columns):
        N, K, _, D = k.shape
        self.k, self.v = k.new_empty(N, K, columns, D), v.new_empty(N, K, columns, D)
        self.used, self.static = 0, None
        self.append(k, v)

    def append(self, k, v):
        """Writes T more columns -> views of all so far. With `static` = (column (1,), end): writes
        that column -> views of the first `end`, the same work at every step."""
        if self.static:
            column, self.used = self.static
            self.k.index_copy_(2, column, k)
            self.v.index_copy_(2, column, v)
        else:
            start, self.used = self.used, self.used + k.shape[2]
            self.k[:, :, start:self.used], self.v[:, :, start:self.used] = k, v
        return self.k[:, :, :self.used], self.v[:, :, :self.used]

    def keep(self, rows):
        """Keeps only `rows` (a long tensor), moved to the front in place, which is faster than a
        copy of the whole."""
        n = len(rows)
        for x in (self.k, self.v):
            x[:n, :, :self.used] = x[rows, :, :self.used]
        self.k, self.v = self.k[:n], self.v[:n]


class PrefillCache:
    """Catches the keys and values of prompts, for each prompt's group, or of a common prefix."""

    def append(self, k, v):
        self.k, self.v = k, v
        return k, v

    def share(self, group_size, columns):
        k, v = (x.repeat_interleave(group_size, 0) for x in (self.k, self.v))
        return KVCache(k, v, columns)


class AfterPrefix:
    """Puts the keys and values of a prefix, of one row, before those of each row's own tokens."""

    def __init__(self, prefix):
        self.prefix = prefix

    def append(self, k, v):
        pairs = (self.prefix.k, k), (self.prefix.v, v)
        return (torch.cat([first.expand(len(own), -1, -1, -1), own], 2) for first, own in pairs)


class StaticDecoder:
    """Decoding as a CUDA graph, so that the GPU need not wait for Python. Its shapes are fixed:
    attention reads a multiple of 128 columns, hiding the unwritten ones, and a new graph is
    captured when these are used up or rows were dropped. A CPU does the same without a graph."""

    def __init__(self, model, caches):
        self.model, self.caches, self.shape = model, caches, None
        for cache in caches:  # hidden columns are multiplied by 0 and must not hold a NaN
            cache.k[:, :, cache.used:], cache.v[:, :, cache.used:] = 0, 0

    def __call__(self, token, position, visible, column):
        """token (n,), position (n, 1), visible (n, 1, 1, columns), the column to write -> logits
        (n, vocab)."""
        end = min((column // 128 + 1) * 128, self.caches[0].k.shape[2])
        inputs = token[:, None], position, torch.full((1,), column, device=token.device)
        if self.shape != (len(token), end):
            self.shape, self.inputs = (len(token), end), [x.clone() for x in inputs]
            self.visible = visible[..., :end]
            self.capture()
        for fixed, x in zip(self.inputs, inputs, strict=True):  # a graph reads fixed addresses
            fixed.copy_(x)
        self.replay()
        return self.logits

    def capture(self):
        self.replay = self.run
        device = self.inputs[0].device
        if device.type == "cuda":
            with torch.cuda.device(device):  # graphs are the current device's
                self.run()  # once before: libraries set up on first use
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.run()
            self.replay = graph.replay

    def run(self):
        token, position, column = self.inputs
        mask = self.visible & (torch.arange(self.shape[1], device=token.device) <= column)
        for cache in self.caches:
            cache.static = column, self.shape[1]
        h = self.model.trunk(token, position, self.caches, mask)
        self.logits = self.model.head(h[:, -1])


def sample_token(logits, temperature, u):
    """Logits (n, vocab) -> tokens (n,) where the CDF passes u (n,) in [0, 1), log-probs (n,).
    Temperature 0 takes the likeliest token, with its log-prob at temperature 1."""
    p = F.softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = p.argmax(-1, keepdim=True)
    else:
        cdf = p.cumsum(-1)
        # right=True never picks a token of probability 0; the factor keeps rounding from reaching
        # past the last one.
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:] * (1 - 2**-22), right=True)
        token = token.clamp(max=p.shape[-1] - 1)  # past the last only if p is NaN
    return token[:, 0], p.gather(1, token)[:, 0].log()


@dataclass
class Completion:
    prompt: list         # token ids
    ids: list            # token ids, the end token included
    logps: torch.Tensor  # (len(ids),) the log-prob that each was sampled with, fp32, on the CPU
    truncated: bool      # True if no end came within max_new_tokens


@torch.no_grad()
def generate(model, prompts, group_size=1, max_new_tokens=128, temperature=1.0, stop_ids=(),
             generator=None, find_end=None, share_prefix=True, drop_rows=True, static=None):
    """Samples `group_size` completions of each prompt (a list of ids) from the whole softmax -> a
    list of Completions, those of a prompt side by side. Raises UserError if a prompt does not fit.
    A completion ends at a stop id, or after n tokens if find_end(its ids), which may look for an
    </answer>, returns an n above 0; while sampling, find_end sees only the last 16 ids.

    Row i draws the same random numbers whatever the other rows do: `share_prefix`, `drop_rows` and
    `static` (CUDA graphs; None = on CUDA) save time and change samples only by rounding."""
    if not share_prefix:
        prompts, group_size = [prompt for prompt in prompts for _ in range(group_size)], 1
    lens, context = [len(prompt) for prompt in prompts], model.cfg.context
    if min(lens, default=0) == 0:
        raise UserError("generate needs at least one prompt, and at least one token in each")
    if max(lens) + max_new_tokens > context:
        raise UserError(f"a prompt of {max(lens)} tokens + max_new_tokens={max_new_tokens} do not "
                        f"fit the context of {context}: lower --max_new_tokens")
    N, L, device = len(prompts) * group_size, max(lens), model.cos.device  # rows, longest prompt
    u = torch.rand(max_new_tokens, N, generator=generator).to(device)

    # ---- Prefill: each prompt once, right-padded; its cache is copied out to its group
    padded = torch.tensor([prompt + [0] * (L - len(prompt)) for prompt in prompts], device=device)
    last = torch.tensor(lens, device=device) - 1
    caches = [PrefillCache() for _ in model.blocks]
    h = model.trunk(padded, caches=caches)[torch.arange(len(prompts), device=device), last]
    logits = model.head(h).repeat_interleave(group_size, 0)
    caches = [cache.share(group_size, L + max_new_tokens) for cache in caches]
    prompt_lens = (last + 1).repeat_interleave(group_size)

    # ---- Decode: all rows write the same cache column L + t, while each row's position goes on
    # from its own prompt; the columns between a short prompt's end and L stay hidden
    use_graphs = device.type == "cuda" if static is None else static
    decoder = StaticDecoder(model, caches) if use_graphs else None
    visible = None  # all columns are
    if decoder or min(lens) < L:
        columns = torch.arange(L + max_new_tokens, device=device)
        visible = ((columns < prompt_lens[:, None]) | (columns >= L))[:, None, None]
    stop = torch.tensor(list(stop_ids), device=device, dtype=torch.long)
    new = torch.zeros(N, max_new_tokens, device=device, dtype=torch.long)
    new_logp = torch.zeros(N, max_new_tokens, device=device)
    rows = torch.arange(N, device=device)  # those still in the batch
    stopped = torch.zeros(N, device=device, dtype=torch.bool)  # which of these have ended
    for t in range(max_new_tokens):
        token, logp = sample_token(logits, temperature, u[t, rows])
        new[rows, t], new_logp[rows, t] = token, logp
        stopped |= torch.isin(token, stop)
        if t + 1 == max_new_tokens:
            break
        if t % 4 == 3:  # not at every token: to read `stopped` the CPU waits for the GPU
            if find_end:
                recent = new[rows, max(0, t - 15):t + 1].tolist()  # 4 new, room for an </answer>
                stopped |= torch.tensor([find_end(ids) > 0 for ids in recent], device=device)
            alive = (~stopped).nonzero()[:, 0]
            if len(alive) == 0:
                break
            # Finished rows go on sampling, to be cut off below, until there are enough of them to
            # drop: copying the cache costs about one step, capturing a graph several.
            if drop_rows and len(alive) < (0.5 if decoder else 0.9) * len(rows):
                rows, token, stopped = rows[alive], token[alive], stopped[alive]
                visible = visible[alive] if visible is not None else None
                for cache in caches:
                    cache.keep(alive)
        position = (prompt_lens[rows] + t)[:, None]
        if decoder:
            logits = decoder(token, position, visible, L + t)
        else:
            mask = visible[..., :L + t + 1] if visible is not None else None
            with torch.inference_mode():  # has less overhead, which matters for few rows
                logits = model.head(model.trunk(token[:, None], position, caches, mask)[:, -1])

    if new_logp.isnan().any():
        raise UserError("the model's logits are not finite: its weights are damaged, or diverged")

    # ---- Collect: each row up to and including its first end token
    is_end = torch.isin(new, stop)
    ends_before = is_end.cumsum(1) - is_end.int()  # of each token
    new_lens = (ends_before == 0).sum(1).tolist()
    ids, logps, truncated = new.tolist(), new_logp.cpu(), (~is_end.any(1)).tolist()
    if find_end:
        for i in range(N):
            if found := find_end(ids[i][:new_lens[i]]):
                new_lens[i], truncated[i] = found, False
    return [Completion(prompts[i // group_size], ids[i][:n], logps[i, :n], truncated[i])
            for i, n in enumerate(new_lens)]


def sampling_copy(model, dtype):
    """The model to sample from: `model` if its weights are of `dtype`, else a frozen copy in it."""
    if dtype == model.embed.weight.dtype:
        return model
    return copy.deepcopy(model).requires_grad_(False).to(dtype)


def sync_weights(sampler, model):
    """Brings a sampling copy up to date."""
    if sampler is not model:
        sampler.load_state_dict(model.state_dict())


# ------------------------------------------------------------------------------------------------
# Training: LoRA, log-probs and optimisers


def same_weights(model):
    """A second model around the same tensors: an adapter added to one is not in the other."""
    # deepcopy does not copy objects that are already in its memo dict.
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


class LoRA(Linear):
    """Another layer's weight W, frozen and shared, with a low-rank matrix learnt beside it (arXiv
    2106.09685): y = W x + alpha / rank B A x. The product is not added to W before training ends:
    in bfloat16, small updates would vanish in it."""

    def __init__(self, linear, rank, alpha, generator):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        device, (n_out, n_in) = self.weight.device, self.weight.shape
        self.A = nn.Parameter(torch.randn(rank, n_in, generator=generator).to(device) / n_in ** 0.5)
        self.B = nn.Parameter(torch.zeros(n_out, rank, device=device))  # at first nothing changes

    def forward(self, x):
        y = super().forward(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)  # fp32, also where W is in bfloat16
        return y.add_(F.linear(F.linear(x, self.A), self.B).to(y.dtype), alpha=self.scale)


def add_lora(model, rank, alpha, generator):
    """Freezes a GPT and puts an adapter beside every matrix of its blocks."""
    model.requires_grad_(False)
    for block in model.blocks:
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, Linear):
                    setattr(part, name, LoRA(layer, rank, alpha, generator))


@torch.no_grad()
def merged_state(model):
    """The state dict of an ordinary model that computes what this one, with adapters, does."""
    state = model.state_dict()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}
    if layers:
        copies = {t.data_ptr(): t.float().cpu() for t in state.values()}  # one of what is tied
        state = {name: copies[t.data_ptr()] for name, t in state.items()}
    for name, layer in layers.items():
        del state[f"{name}.A"], state[f"{name}.B"]
        state[f"{name}.weight"] = (layer.weight + layer.scale * layer.B @ layer.A).cpu()
    return state


def token_logps(model, tokens, temperature=1.0, mask=None, chunk_floats=2**24):
    """log p(tokens[:, t+1] | tokens[:, :t+1]) at `temperature`: tokens (N, T + 1) -> (N, T), fp32;
    0 where `mask` (N, T) is False. At most `chunk_floats` logits exist at a time: the backward pass
    computes them again."""
    h, target = model.hidden(tokens[:, :-1]), tokens[:, 1:]
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.bool()

    def logp_of(h, target):
        # Dividing h also divides the logits, and is cheaper: it has far fewer numbers.
        logp = F.log_softmax(model.head(h.float() / temperature), dim=-1)
        return logp.gather(-1, target[:, None])[:, 0]

    h, target = h[mask], target[mask]  # (n, C), (n,)
    size = max(1, chunk_floats // model.cfg.vocab_size)
    chunks = zip(h.split(size), target.split(size), strict=True)
    if len(h) <= size or not torch.is_grad_enabled():
        parts = [logp_of(a, b) for a, b in chunks]
    else:
        parts = [checkpoint(logp_of, a, b, use_reentrant=False) for a, b in chunks]
    return torch.zeros(mask.shape, device=h.device).masked_scatter(mask, torch.cat(parts))


class Muon(torch.optim.Optimizer):
    """Momentum with nearly orthogonal steps: all singular values become about 1 (Jordan et al.
    2024), scaled to the size of AdamW's steps (arXiv 2502.16982). torch.optim.Muon does the same in
    bfloat16, which is thirty times slower on CPUs without bfloat16 instructions."""

    def __init__(self, matrices, lr):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95)
                x = x.T if x.shape[0] > x.shape[1] else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz: a polynomial that draws singular values to 1
                    a = x @ x.T
                    x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
                x = x.T if x.shape != p.shape else x
                p.add_(x, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def make_optimizers(model, lr, kind):
    """AdamW for all, or "muon": Muon for the blocks' matrices, AdamW for embedding and norms."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (matrices if p.dim() == 2 and "blocks." in name else others).append(p)
    adamw = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
    if kind == "adamw":
        return [torch.optim.AdamW(matrices + others, **adamw)]
    return [Muon(matrices, lr), *([torch.optim.AdamW(others, **adamw)] if others else [])]


def ramp(step, steps, warmup, decay):
    """The learning rate at `step` as a share of its peak: linear warm-up over `warmup` steps, and
    linear decay to 0 over the last share `decay` of the `steps`."""
    return min((step + 1) / warmup, (steps - step) / max(1, decay * steps), 1.0)


def set_lr(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def apply_gradients(model, optimizers, max_norm):
    """Clips the gradients, takes a step and clears them -> (their norm, 1 if the step was skipped,
    else 0). Gradients that are not finite would turn every weight into NaN: no step is taken."""
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    finite = math.isfinite(grad_norm)
    for optimizer in optimizers:
        if finite:
            optimizer.step()
    model.zero_grad()
    return grad_norm, int(not finite)


# ------------------------------------------------------------------------------------------------
# Checkpoints


@contextmanager
def atomic_write(path):
    """Opens `path` for writing bytes so that it ends up complete or unchanged: a temporary file,
    flushed to disk, then renamed. Raises UserError if it cannot be written."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".tmp", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        for wait in (0.1, 0.5, 2):  # on Windows it fails while a virus scanner, say, reads it
            with suppress(PermissionError):
                os.replace(path + ".tmp", path)
                break
            time.sleep(wait)
        else:
            os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:  # the latter is what torch.save makes of a full disk
        why = e.strerror if isinstance(e, OSError) else "is the disk full?"
        raise UserError(f"cannot write {path} ({why or e}); it is unchanged") from None
    finally:
        with suppress(OSError):  # there unless it was renamed
            os.remove(path + ".tmp")


@contextmanager
def reading(path, what):
    """Turns an error inside it into a UserError of one line: `path` is not `what`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror or e})") from None
    except Exception as e:  # a damaged file can raise almost anything
        why = " ".join(str(e).split())[:100]
        raise UserError(f"{path} is not {what} ({type(e).__name__}: {why})") from None


def save_checkpoint(path, state):
    with atomic_write(path) as f:
        torch.save(state, f)


def load_checkpoint(path):
    """Reads what `save_checkpoint` wrote, onto the CPU: tensors and plain values only, no code is
    run. Raises UserError if it is missing or incomplete."""
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint at {path}; python train.py makes one")
    with reading(path, "a complete checkpoint; if training made it, delete it to make it again"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["model_config"], state["model"], dict(state.get("settings", {}))  # raises if absent
    return state


def model_of(state, path, cls=GPT):
    """The model, a `cls`, in what `load_checkpoint` read from `path`. Raises UserError if its shape
    and weights do not fit."""
    with reading(path, "a model of this program; delete it to make it again"):
        model = cls(GPTConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
    return model


def load_model(path, device="cpu", cls=GPT):
    return model_of(load_checkpoint(path), path, cls).to(device)


# ------------------------------------------------------------------------------------------------
# To skip at first: oneDNN, for CPUs on which it is faster than torch's own matrix product


class OneDNN(torch.autograd.Function):
    """x (n, C) times weight (C', C) transposed, fp32, by oneDNN in place of torch's own MKL."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        frozen = not ctx.needs_input_grad[1]  # beside adapters
        return OneDNN.apply(grad, weight.T), None if frozen else OneDNN.apply(grad.T, x.T)


def onednn_pays():
    """Whether oneDNN is clearly faster than torch's own product, as on some AMD CPUs. Products
    are short, and the fastest of many counts, so other work on this machine hardly matters."""
    x, weight = (torch.ones(n, 128, requires_grad=True) for n in (512, 256))
    seconds = {}
    try:
        for product in 40 * [F.linear, OneDNN.apply]:
            start = time.perf_counter()
            product(x, weight).sum().backward()
            took = time.perf_counter() - start
            seconds[product] = min(took, seconds.get(product, took))
    except (AttributeError, RuntimeError, NotImplementedError):  # a private operator of torch
        return False
    plain, onednn = seconds.values()
    return plain > 1.4 * onednn


# ------------------------------------------------------------------------------------------------
# To skip at first: Hugging Face folders (config.json and safetensors; data.py reads tokenizers)

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FIELDS = {  # of GPTConfig: their names in config.json
    "vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_embd": "hidden_size",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
    "mlp_dim": "intermediate_size", "context": "max_position_embeddings",
    "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "o_bias": "attention_bias",
    "mlp_bias": "mlp_bias", "tied": "tie_word_embeddings",
}
LLAMA3_FIELDS = {"rope_factor": "factor", "rope_low": "low_freq_factor",
                 "rope_high": "high_freq_factor",
                 "rope_original": "original_max_position_embeddings"}
ALLOWED = {  # values that this transformer can deal with; None: not given
    "model_type": ("llama", "qwen2", "qwen3"), "hidden_act": (None, "silu"),
    "rope_type": (None, "default", "llama3"), "type": (None, "default", "llama3"),
    "partial_rotary_factor": (None, 1), "rope_interleaved": (None, False),
    "use_sliding_window": (None, False), "quantization_config": (None,), "num_experts": (None,),
}


def read_json(path):
    """The object in a JSON file. Raises UserError if there is none."""
    with reading(path, "a JSON object"), open(path, encoding="utf-8") as f:
        return dict(json.load(f))


def write_json(path, value):
    with atomic_write(path) as f:
        f.write(json.dumps(value, indent=1).encode())


def config_from_hf(hf):
    """config.json (a dict, as transformers 4 or 5 writes it) -> GPTConfig. Raises UserError naming
    the field that is malformed or asks for what this transformer does not have."""
    def require(condition, name, value):
        if not condition:
            raise UserError(f"config.json: {name}={str(value)[:60]} is not supported here")

    rope = [hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}]  # transformers 4; 5
    require(all(isinstance(part, dict) for part in rope), "rope_scaling", rope)
    hf = {**hf, **rope[0], **rope[1]}
    for name, values in ALLOWED.items():
        require(hf.get(name) in values, name, hf.get(name))
    family, is_llama3 = hf["model_type"], "llama3" in (hf.get("rope_type"), hf.get("type"))
    defaults = {"num_key_value_heads": hf.get("num_attention_heads"), "rope_theta": 10000,
                "head_dim": 128 if family == "qwen3" else 0, "rms_norm_eps": 1e-6,
                "max_position_embeddings": 2048}
    settings = {}
    for ours, name in (FIELDS | LLAMA3_FIELDS if is_llama3 else FIELDS).items():
        value, kind = hf.get(name), type(getattr(GPTConfig, ours))
        value = defaults.get(name) if value is None else value
        # The product of three sizes must fit an int64.
        most = 2**20 if ours.startswith("n_") or ours.endswith("_dim") else 10**12
        is_number = type(value) in (int, float) and 0 <= value < most and kind(value) == value
        require(kind is bool or is_number, name, value)
        settings[ours] = kind(value)
    cfg = GPTConfig(**settings, qk_norm=family == "qwen3")
    cfg.qkv_bias = family == "qwen2" or cfg.o_bias
    cfg.o_bias = family != "qwen2" and cfg.o_bias
    cfg.mlp_bias = family == "llama" and cfg.mlp_bias
    validate(cfg)
    cfg.head_dim = cfg.d_head
    layers = hf.get("layer_types")
    require(layers in (None, ["full_attention"] * cfg.n_layer), "layer_types", layers)
    return cfg


def config_to_hf(cfg):
    """The inverse. Raises UserError if no family that transformers knows has such a shape."""
    family = "Qwen2" if cfg.qkv_bias and not cfg.o_bias else "Llama"
    family = "Qwen3" if cfg.qk_norm else family
    hf = {name: getattr(cfg, ours) for ours, name in FIELDS.items()}
    hf |= {"model_type": family.lower(), "architectures": [family + "ForCausalLM"],
           "hidden_act": "silu", "head_dim": cfg.d_head}
    if cfg.rope_factor != 1:
        scaling = {name: getattr(cfg, ours) for ours, name in LLAMA3_FIELDS.items()}
        hf["rope_scaling"] = {"rope_type": "llama3", **scaling}
    again = config_from_hf(hf)
    if (again.qkv_bias, again.mlp_bias) != (cfg.qkv_bias, cfg.mlp_bias):
        raise UserError("no Llama, Qwen2 or Qwen3 has these qkv_bias, o_bias, mlp_bias and qk_norm")
    if family == "Llama" and cfg.n_embd % cfg.n_head:
        raise UserError(f"n_embd={cfg.n_embd} is not a multiple of n_head={cfg.n_head}, which it "
                        f"is in a Llama")
    return hf


def hf_name(name):
    """A parameter's name here -> its name in a Hugging Face checkpoint."""
    theirs = {"blocks": "layers", "attn": "self_attn", "attn_norm": "input_layernorm",
              "mlp_norm": "post_attention_layernorm", "embed": "embed_tokens"}
    name = ".".join(theirs.get(part, part) for part in name.split("."))
    return name if name.startswith("lm_head.") else "model." + name


def read_safetensors(path):
    """{name: tensor} of a safetensors file, each a view of the mapped file: nothing is read before
    it is used. Raises UserError on a damaged file and on types other than DTYPES."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    with reading(path, f"a complete safetensors file of {', '.join(DTYPES)} tensors"):
        data = np.memmap(path, np.uint8, "c")  # copy on write: the file stays as it is
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes(), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        tensors, end = {}, 0  # one tensor after the other, no gap
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            if offsets != [begin, end] or any(type(n) is not int or n < 0 for n in shape + offsets):
                raise ValueError(f"{name[:60]} is not at bytes {begin} to {end}")
            tensors[name] = torch.from_numpy(data[start:][begin:end]).view(dtype).view(shape)
        if start + end != len(data):
            raise ValueError(f"{len(data)} bytes, not {start + end}")
        return tensors


def read_folder(folder):
    """All tensors of a Hugging Face folder, in one file or in shards that an index lists."""
    path = os.path.join(folder, "model.safetensors")
    index = path + ".index.json"
    if not os.path.exists(index):
        return read_safetensors(path)
    with reading(index, "an index of the tensors in this folder"):
        weight_map = read_json(index)["weight_map"]
        files = set(weight_map.values()) & set(os.listdir(folder))  # plain names, no paths
        shards = {file: read_safetensors(os.path.join(folder, file)) for file in files}
        return {name: shards[file][name] for name, file in weight_map.items()}


@torch.no_grad()
def from_pretrained(folder, context=0, dtype=torch.float32, device="cpu"):
    """The model of a Hugging Face folder; `context` (0 = the config's) shortens its context. Raises
    UserError, before memory is taken, if config and weights do not fit."""
    cfg = config_from_hf(read_json(os.path.join(folder, "config.json")))
    cfg.context = min(context or cfg.context, cfg.context)
    tensors = read_folder(folder)
    if cfg.n_layer > len(tensors):
        raise UserError(f"{folder}: {cfg.n_layer} layers, but only {len(tensors)} tensors")
    with torch.device("meta"):  # shapes alone
        model = GPT(cfg)
    wanted = {hf_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    unused = ("rotary_emb.inv_freq", "lm_head.weight")  # older files hold these, too
    found = {name: tuple(t.shape) for name, t in tensors.items()
             if name in wanted or not name.endswith(unused)}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise UserError(f"{folder}: missing, unknown or misshapen tensor {name}: it is "
                            f"{found.get(name)}, but config.json needs {wanted.get(name)}")
    model = model.to(dtype).to_empty(device=device)
    model.cos, model.sin = (table.to(dtype) for table in rope_table(cfg, device))
    if cfg.tied:
        model.lm_head.weight = model.embed.weight
    for name, p in model.named_parameters():
        p.copy_(tensors[hf_name(name)])
    return model


def save_pretrained(model, folder, source="", dtype=None):
    """Writes model.safetensors in `dtype` (None = as the weights are) and config.json. From
    `source`, the folder that the weights came from, config and tokenizer files are copied."""
    dtype = dtype or model.embed.weight.dtype
    tensors = {hf_name(name): p.detach().to(dtype) for name, p in model.named_parameters()}
    hf = read_json(os.path.join(source, "config.json")) if source else config_to_hf(model.cfg)
    hf["torch_dtype"] = str(dtype).removeprefix("torch.")
    hf.pop("dtype", None)  # transformers 5's word for it
    os.makedirs(folder, exist_ok=True)
    for file in os.listdir(folder):  # an earlier export's, which readers would prefer
        if file in ("model.safetensors.index.json", "chat_template.jinja"):
            os.remove(os.path.join(folder, file))
    for file in os.listdir(source) if source else []:
        if file.endswith((".json", ".txt", ".jinja")) and not file.endswith(".index.json"):
            shutil.copyfile(os.path.join(source, file), os.path.join(folder, file))
    name_of = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.nbytes
        header[name] = {"dtype": name_of[dtype], "shape": t.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with atomic_write(os.path.join(folder, "model.safetensors")) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.cpu().contiguous().view(torch.uint8).numpy())
    write_json(os.path.join(folder, "config.json"), hf)
