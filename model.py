"""A Llama/Qwen-style decoder with KV-cached group sampling, in one file.

Top to bottom: settings, the transformer, the cache, `generate` (what RL samples with),
`token_logps` (what RL trains with), checkpoints. A first reader may skip the end: Hugging Face
folders, in and out. Token ids only: text lives in data.py.

    python -c "import model; print(model.GPT(model.GPTConfig()))"
"""
import copy
import json
import math
import os
import random
import shutil
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


def opt(default, help, least=None, most=None, above=None, choices=None):
    """A setting: a dataclass field with its help text and the values that it may have."""
    bounds = {"least": least, "most": most, "above": above, "choices": choices}
    return field(default=default, metadata={"help": help, **bounds})


def validate(cfg):
    """Raises UserError, naming the setting, if one of a settings dataclass is out of its bounds,
    or if two do not go together, which the dataclass's own `rules` say."""
    for f in fields(cfg):
        value, bounds = getattr(cfg, f.name), f.metadata
        if bounds["choices"] and value not in bounds["choices"]:
            raise UserError(f"{f.name}={value!r} is not one of {', '.join(bounds['choices'])}")
        if f.type is float and not math.isfinite(value):
            raise UserError(f"{f.name}={value} is not a finite number")
        if bounds["above"] is not None and not value > bounds["above"]:
            raise UserError(f"{f.name}={value} must be above {bounds['above']}")
        if bounds["least"] is not None and not value >= bounds["least"]:
            raise UserError(f"{f.name}={value} must be at least {bounds['least']}")
        if bounds["most"] is not None and not value <= bounds["most"]:
            raise UserError(f"{f.name}={value} must be at most {bounds['most']}")
    if hasattr(cfg, "rules"):
        cfg.rules()


def pick(cls, settings):
    """A settings dataclass with whatever of {name: value} it has a field for."""
    return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})


def generators(*key):
    """A Python and a torch generator that follow from `key` alone, such as (seed, stage, step): a
    resumed run draws what an uninterrupted one would have, with no generator state to save."""
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
    rope_factor: float = opt(1.0, "Llama 3.1 RoPE scaling: long waves slowed by this", least=1)
    rope_low: float = opt(1.0, "... up to this many turns within rope_original in full", above=0)
    rope_high: float = opt(4.0, "... and from this many turns on not at all", above=0)
    rope_original: int = opt(8192, "... the context before scaling", least=1)
    norm_eps: float = opt(1e-6, "RMSNorm epsilon", least=0)
    qkv_bias: bool = opt(False, "bias on q, k, v (Qwen2)")
    o_bias: bool = opt(False, "bias on the attention's output (Llama's attention_bias)")
    mlp_bias: bool = opt(False, "bias on the MLP's matrices (Llama's mlp_bias)")
    qk_norm: bool = opt(False, "RMSNorm on each head's q and k before RoPE (Qwen3)")
    tied: bool = opt(True, "output head shares the embedding's weights")

    def rules(self):
        """Raises UserError if no model of this shape can exist."""
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; "
                            f"set head_dim")
        if self.d_head % 2:
            raise UserError(f"head_dim={self.d_head} is odd, and RoPE rotates pairs")
        if not self.rope_low < self.rope_high:
            raise UserError(f"rope_low={self.rope_low} must be below rope_high={self.rope_high}")

    @property
    def d_head(self):
        return self.head_dim or self.n_embd // self.n_head


# ------------------------------------------------------------------------------------------------
# The transformer. B rows, T tokens, C = n_embd, H query heads and K key/value heads of width D


def rope_table(cfg, device=None):
    """cos and sin of each position's rotation angles, both (context, D); the first half of the
    sines is negated (see `apply_rope`). arXiv 2104.09864; scaling as in Llama 3.1."""
    half = torch.arange(0, cfg.d_head, 2, device=device, dtype=torch.float32)
    freq = cfg.rope_theta ** (-half / cfg.d_head)
    if cfg.rope_factor != 1:
        turns = cfg.rope_original * freq / (2 * math.pi)
        keep = ((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / cfg.rope_factor)
    angle = torch.outer(torch.arange(cfg.context, device=device, dtype=torch.float32), freq)
    return angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)


def apply_rope(x, cos, sin):
    """Rotates x (B, H, T, D), whose pairs are (i, i + D/2), by cos and sin (B or 1, 1, T, D): (a,
    b) becomes (a cos - b sin, b cos + a sin). The minus is in the table, which saves one pass."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.n_kv_head, self.d_head = cfg.n_head, cfg.n_kv_head, cfg.d_head
        self.q_proj = nn.Linear(cfg.n_embd, cfg.n_head * cfg.d_head, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.d_head, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.d_head, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.n_head * cfg.d_head, cfg.n_embd, bias=cfg.o_bias)
        self.q_norm = nn.RMSNorm(cfg.d_head, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(cfg.d_head, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache=None, mask=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.d_head).transpose(1, 2)     # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.d_head).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.d_head).transpose(1, 2)
        q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)  # all columns so far
        if T == 1:
            # Decoding: the query heads that share a key head become the rows of one small matrix,
            # so the cache is read once and never repeated per head.
            q = q.view(B, self.n_kv_head, -1, self.d_head)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, 1, -1)
        else:
            # Training and prefill: rows are right-padded, so causality alone hides the padding.
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.mlp_dim, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.mlp_dim, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.mlp_dim, cfg.n_embd, bias=cfg.mlp_bias)

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
    """A decoder-only transformer. `model(idx)` maps token ids (B, T) to fp32 logits (B, T,
    vocab)."""

    def __init__(self, cfg):
        super().__init__()
        validate(cfg)
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tied:
            self.lm_head.weight = self.embed.weight
        cos, sin = rope_table(cfg)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # How `hidden` computes, set by train.py's flags of these names.
        self.autocast, self.checkpointing, self.compiled_trunk = False, False, None
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Layers that write into the residual stream start smaller, as in GPT-2.
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if into_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def trunk(self, idx, positions=None, caches=None, mask=None):
        """Token ids (B, T) to the normed hidden states (B, T, C) that the head reads.
        `positions` (B, T) defaults to 0..T-1; a T past the context raises UserError."""
        if idx.shape[1] > self.cfg.context:
            raise UserError(f"{idx.shape[1]} tokens do not fit the context of {self.cfg.context}")
        if positions is None:
            cos, sin = self.cos[None, None, :idx.shape[1]], self.sin[None, None, :idx.shape[1]]
        else:
            cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        x = self.embed(idx)
        for i, block in enumerate(self.blocks):
            if self.checkpointing and caches is None and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, caches[i] if caches else None, mask)
        return self.norm(x)

    def hidden(self, idx):
        """`trunk` as training runs it. Autocast covers this one forward pass and no more: torch
        keeps the bfloat16 copies of the weights for as long as the context lasts, across optimiser
        steps."""
        with torch.autocast(idx.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return (self.compiled_trunk or self.trunk)(idx)

    def head(self, h):
        """Hidden states (..., C) to logits (..., vocab), fp32 whatever the weights are. Under
        autocast, too: rounded to bfloat16, logits near 20 would be off by 0.06."""
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
        """Writes T more columns and returns views of all columns so far. With `static` = (column
        (1,), end) it writes the one column that a tensor names and returns views of the first
        `end`: the same work at every step, as a CUDA graph needs it."""
        if self.static:
            column, end = self.static
            self.k.index_copy_(2, column, k)
            self.v.index_copy_(2, column, v)
            return self.k[:, :, :end], self.v[:, :, :end]
        end = self.used + k.shape[2]
        self.k[:, :, self.used:end], self.v[:, :, self.used:end] = k, v
        self.used = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def keep(self, rows):
        """Drops every row that is not in `rows` (a long tensor); the others move up, in place."""
        n, used = len(rows), self.used
        self.k[:n, :, :used] = self.k[rows, :, :used]
        self.v[:n, :, :used] = self.v[rows, :, :used]
        self.k, self.v = self.k[:n], self.v[:n]


class PrefillCache:
    """Catches the keys and values of the prompts, to be copied out to each prompt's group."""

    def append(self, k, v):
        self.k, self.v = k, v
        return k, v

    def share(self, group_size, columns):
        k, v = (x.repeat_interleave(group_size, 0) for x in (self.k, self.v))
        return KVCache(k, v, columns)


class StaticDecoder:
    """Decoding steps as CUDA graphs: captured once, replayed for every token, so that the GPU need
    not wait for Python to launch some ten kernels a layer. A graph is bound to its shapes:
    attention reads a multiple of 128 columns, the unwritten ones hidden, and a graph is captured
    anew when these are used up or rows were dropped. On a CPU the same work runs without a
    graph."""

    def __init__(self, model, caches):
        self.model, self.caches, self.shape = model, caches, None
        for cache in caches:  # hidden columns are multiplied by 0 and must not hold a NaN
            cache.k[:, :, cache.used:], cache.v[:, :, cache.used:] = 0, 0

    def __call__(self, token, position, visible, column):
        """token (n,), position (n, 1), visible (n, 1, 1, columns) or None, the column to write ->
        logits (n, vocab)."""
        end = min(-(-(column + 1) // 128) * 128, self.caches[0].k.shape[2])
        if self.shape != (len(token), end):
            self.shape = len(token), end
            self.token, self.position = token[:, None].clone(), position.clone()
            self.column = torch.full((1,), column, device=token.device)
            self.columns = torch.arange(end, device=token.device)
            self.visible = visible[..., :end].contiguous() if visible is not None else None
            self.capture()
        self.token.copy_(token[:, None])
        self.position.copy_(position)
        self.column.fill_(column)
        for cache in self.caches:
            cache.used = column + 1
        self.replay()
        return self.logits

    def capture(self):
        self.replay = self.run
        if self.token.is_cuda:
            stream = torch.cuda.Stream()  # once outside the graph: libraries set up on first use
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.run()
            self.replay = graph.replay

    def run(self):
        mask = (self.columns <= self.column)[None, None, None]
        if self.visible is not None:
            mask = mask & self.visible
        for cache in self.caches:
            cache.static = self.column, self.shape[1]
        h = self.model.trunk(self.token, self.position, self.caches, mask)
        self.logits = self.model.head(h[:, -1])


def sample_token(logits, temperature, u):
    """Draws one token per row of logits (n, vocab) by inverting the CDF at u (n,) in [0, 1);
    returns tokens (n,) and their log-probs (n,). Temperature 0 takes the likeliest (log-prob at T
    = 1)."""
    p = F.softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = p.argmax(-1, keepdim=True)
    else:
        cdf = p.cumsum(-1)
        # right=True never picks a token of probability 0; the factor keeps rounding from reaching
        # past the end.
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:] * (1 - 2**-22), right=True)
    return token[:, 0], p.gather(1, token)[:, 0].log()


@dataclass
class Completion:
    """One completion of a prompt, as `generate` returns it."""
    prompt: list         # token ids
    ids: list            # token ids, the end token included
    logps: torch.Tensor  # (len(ids),) the log-prob that each was sampled with, fp32, on the CPU
    truncated: bool      # True if no end token came within max_new_tokens


@torch.no_grad()
def generate(model, prompts, group_size=1, max_new_tokens=128, temperature=1.0, stop_ids=(),
             generator=None, share_prefix=True, drop_rows=True, static=None):
    """Samples `group_size` completions of each prompt (lists of ids, of any lengths) from the
    whole softmax -> Completions, number i of prompt i // group_size. Raises UserError on an empty
    prompt or one that leaves no room for max_new_tokens.

    Row i draws the same random numbers whatever the other rows do, so neither `share_prefix` nor
    `drop_rows` nor `static` (CUDA graphs; None = on CUDA) changes a sample: they only save time."""
    lens, context = [len(prompt) for prompt in prompts], model.cfg.context
    if min(lens, default=0) == 0:
        raise UserError("generate needs at least one prompt, and at least one token in each")
    if max(lens) + max_new_tokens > context:
        raise UserError(f"a prompt of {max(lens)} tokens + max_new_tokens={max_new_tokens} do not "
                        f"fit the context of {context}: lower --max_new_tokens or raise --context")
    if not share_prefix:
        prompts = [prompt for prompt in prompts for _ in range(group_size)]
        lens, group_size = [len(prompt) for prompt in prompts], 1
    device = next(model.parameters()).device
    N, L = len(prompts) * group_size, max(lens)  # rows, longest prompt
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
    visible = None
    if min(lens) < L:
        columns = torch.arange(L + max_new_tokens, device=device)
        visible = ((columns < prompt_lens[:, None]) | (columns >= L))[:, None, None]
    stop = torch.tensor(list(stop_ids), device=device, dtype=torch.long)
    new = torch.zeros(N, max_new_tokens, device=device, dtype=torch.long)
    new_logp = torch.zeros(N, max_new_tokens, device=device)
    new_lens = torch.zeros(N, device=device, dtype=torch.long)
    stopped = torch.zeros(N, device=device, dtype=torch.bool)
    rows = torch.arange(N, device=device)  # the rows still being decoded
    use_graphs = device.type == "cuda" if static is None else static
    decoder = StaticDecoder(model, caches) if use_graphs else None
    for t in range(max_new_tokens):
        token, logp = sample_token(logits, temperature, u[t, rows])
        new[rows, t], new_logp[rows, t] = token, logp  # what follows a row's end is cut off below
        new_lens[rows] += ~stopped[rows]
        stopped[rows] |= torch.isin(token, stop)
        if t + 1 == max_new_tokens:
            break
        if t % 4 == 3:  # to look for finished rows, the host waits for the device: not every token
            alive = (~stopped[rows]).nonzero()[:, 0]
            if len(alive) == 0:
                break
            # Copying what is left costs about one step; a graph costs several to capture.
            if drop_rows and len(alive) < (0.5 if decoder else 0.9) * len(rows):
                rows, token = rows[alive], token[alive]
                visible = visible[alive] if visible is not None else None
                for cache in caches:
                    cache.keep(alive)
        position = (prompt_lens[rows] + t)[:, None]
        if decoder:
            logits = decoder(token, position, visible, L + t)
        else:
            mask = visible[..., :L + t + 1] if visible is not None else None
            logits = model.head(model.trunk(token[:, None], position, caches, mask)[:, -1])

    # ---- Collect: what each row said up to its first end token
    ids, logps, truncated = new.tolist(), new_logp.cpu(), (~stopped).tolist()
    return [Completion(prompts[i // group_size], ids[i][:n], logps[i, :n], truncated[i])
            for i, n in enumerate(new_lens.tolist())]


def sampling_copy(model, dtype):
    """What samples in the model's place: the model itself, or a frozen copy with weights of
    `dtype`."""
    if dtype == model.embed.weight.dtype:
        return model
    return copy.deepcopy(model).requires_grad_(False).to(dtype)


@torch.no_grad()
def sync_weights(sampler, model):
    """Brings a sampling copy up to date."""
    if sampler is not model:
        for a, b in zip(sampler.parameters(), model.parameters(), strict=True):
            a.copy_(b)


# ------------------------------------------------------------------------------------------------
# Training: log-probs and optimisers


def token_logps(model, tokens, temperature=1.0, mask=None, chunk_floats=2**24):
    """log p(tokens[:, t+1] | tokens[:, :t+1]) at `temperature`: tokens (N, T) -> (N, T-1), fp32.
    Where `mask` (N, T-1) is False the head is not run and the result is 0. At most `chunk_floats`
    logits exist at a time; the backward pass computes them again."""
    h, target = model.hidden(tokens[:, :-1]), tokens[:, 1:]
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.bool()

    def logp_of(h, target):
        logp = F.log_softmax(model.head(h) / temperature, dim=-1)
        return logp.gather(-1, target[:, None])[:, 0]

    h, target = h[mask], target[mask]  # (n, C), (n,)
    size = max(1, chunk_floats // model.cfg.vocab_size)
    chunks = zip(h.split(size), target.split(size), strict=True)
    if len(h) <= size or not torch.is_grad_enabled():
        parts = [logp_of(a, b) for a, b in chunks]
    else:
        parts = [checkpoint(logp_of, a, b, use_reentrant=False) for a, b in chunks]
    return torch.zeros(mask.shape, device=h.device).masked_scatter(mask, torch.cat(parts))


def make_optimizers(model, lr, kind):
    """AdamW for everything, or "muon": Muon for the blocks' matrices, AdamW for embedding and
    norms."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.dim() == 2 and "blocks." in name else others).append(p)
    adamw = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
    if kind == "adamw":
        return [torch.optim.AdamW(matrices + others, **adamw)]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, **adamw)]


def set_lr(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def apply_gradients(model, optimizers, max_norm):
    """Clips the gradients, takes one optimiser step and clears them -> (their norm, 1 if the step
    was skipped, else 0). It is skipped if they are not finite: such a step would leave nothing but
    NaN."""
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    finite = math.isfinite(grad_norm)
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return grad_norm, int(not finite)


# ------------------------------------------------------------------------------------------------
# Checkpoints


@contextmanager
def atomic_write(path):
    """Opens `path` for writing bytes so that it ends up complete or unchanged: a temporary file,
    flushed to disk, then renamed. Raises UserError if it cannot be written."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(path + ".tmp", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except OSError as e:
        with suppress(OSError):
            os.remove(path + ".tmp")
        raise UserError(f"cannot write {path} ({e.strerror or e}): what was there is unchanged; "
                        f"make room and run the same command again") from None


def save_checkpoint(path, state):
    """Writes `state` atomically."""
    with atomic_write(path) as f:
        torch.save(state, f)


def load_checkpoint(path, device="cpu"):
    """Reads what `save_checkpoint` wrote: tensors and plain values only, no code is run. Raises
    UserError naming the file if it is missing or no complete checkpoint."""
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint at {path}; python train.py makes one")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        state["model_config"], state["model"]
    except Exception as e:  # a torn zip, a pickle of something else, no dict: all the same
        raise UserError(f"{path} is no complete checkpoint of this program ({type(e).__name__}); "
                        f"delete it to make it again") from None
    return state


def model_of(state, path, device="cpu", cls=GPT):
    """The model in what `load_checkpoint` read from `path`. Raises UserError if shape and weights
    do not fit. `cls` is made from a GPTConfig."""
    try:
        model = cls(GPTConfig(**state["model_config"])).to(device)
        model.load_state_dict(state["model"])
    except (TypeError, RuntimeError, AttributeError) as e:
        why = str(e).strip().splitlines()[0][:120]
        raise UserError(f"{path} holds no model of this program ({why}); delete it to make it "
                        f"again") from None
    return model


def load_model(path, device="cpu", cls=GPT):
    """The model of a checkpoint. Raises UserError as `load_checkpoint` and `model_of` do."""
    return model_of(load_checkpoint(path, device), path, device, cls)


# ------------------------------------------------------------------------------------------------
# To skip at first: Hugging Face folders, that is config.json, safetensors files, and the
# tokenizer's files, which data.py reads

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST = 2**20  # of anything a config counts; keeps the product of any three within an int64
NEUTRAL = {  # what a config may say of features that this transformer does not have
    "hidden_act": ("silu",), "pretraining_tp": (1,), "rope_interleaved": (False,),
    "partial_rotary_factor": (1,), "use_sliding_window": (False,), "quantization_config": (),
    "num_experts": (), "num_local_experts": (), "is_decoder": (False,),
    "add_cross_attention": (False,), "logits_scaling": (1,), "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
}
FOLDER_FILES = ["generation_config.json", "tokenizer.json", "tokenizer_config.json",
                "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                "chat_template.jinja"]
NAMES = [(".attn.", ".self_attn."), (".attn_norm.", ".input_layernorm."), ("blocks.", "layers."),
         (".mlp_norm.", ".post_attention_layernorm."), ("embed.", "embed_tokens.")]


def read_json(path):
    """The object in a JSON file. Raises UserError naming the file if there is none."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def config_from_hf(hf):
    """A config.json (a dict, as transformers 4 or 5 writes it) -> GPTConfig. Raises UserError
    naming the field that is malformed or asks for what this transformer does not implement."""
    def refuse(name, value, why="is not implemented here"):
        raise UserError(f"config.json: {name}={str(value)[:60]} {why}")

    def number(name, default=None, source=hf, most=MOST, kind=int):
        value = default if source.get(name) is None else source[name]
        if type(value) not in (int, float) or not 0 < value <= most or kind(value) != value:
            refuse(name, value, f"is not a number between 0 and {most}")
        return kind(value)

    family = hf.get("model_type")
    if family not in ("llama", "qwen2", "qwen3"):
        refuse("model_type", repr(family), "is not one of llama, qwen2, qwen3")
    for name, values in NEUTRAL.items():
        if hf.get(name) is not None and hf[name] not in values:
            refuse(name, hf[name])
    layers = hf.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        refuse("layer_types", layers)  # a sliding window, say
    rope, scaling = {}, {}
    for name in ("rope_scaling", "rope_parameters"):  # as transformers 4 and 5 write it
        part = hf.get(name) or {}
        if not isinstance(part, dict) or part.get("partial_rotary_factor") not in (None, 1):
            refuse(name, part)
        kind = part.get("rope_type") or part.get("type") or "default"
        if kind not in ("default", "llama3"):
            refuse(name, kind, "is not implemented here, only default and llama3")
        rope |= part
        if kind == "llama3":
            scaling = {"rope_factor": number("factor", 1, rope, kind=float),
                       "rope_low": number("low_freq_factor", 1, rope, kind=float),
                       "rope_high": number("high_freq_factor", 4, rope, kind=float),
                       "rope_original": number("original_max_position_embeddings", 8192, rope,
                                               2**30)}
    n_head, n_embd = number("num_attention_heads"), number("hidden_size")
    attention_bias = bool(hf.get("attention_bias"))
    theta = number("rope_theta", 10000, most=1e12, kind=float)
    cfg = GPTConfig(
        vocab_size=number("vocab_size", most=2**24), n_layer=number("num_hidden_layers"),
        n_embd=n_embd, n_head=n_head, n_kv_head=number("num_key_value_heads", n_head),
        head_dim=number("head_dim", 128 if family == "qwen3" else n_embd // n_head),
        mlp_dim=number("intermediate_size"),
        context=number("max_position_embeddings", 2048, most=2**30),
        rope_theta=number("rope_theta", theta, rope, most=1e12, kind=float), **scaling,
        norm_eps=number("rms_norm_eps", 1e-6, kind=float),
        qkv_bias=family == "qwen2" or attention_bias, o_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and bool(hf.get("mlp_bias")), qk_norm=family == "qwen3",
        tied=bool(hf.get("tie_word_embeddings")))
    validate(cfg)
    return cfg


def config_to_hf(cfg):
    """The inverse. Raises UserError if no family that transformers knows has such a shape."""
    shape = (cfg.qk_norm, cfg.qkv_bias, cfg.o_bias, cfg.mlp_bias)
    families = {(True, False, False, False): "Qwen3", (True, True, True, False): "Qwen3",
                (False, True, False, False): "Qwen2"}
    is_llama = not cfg.qk_norm and cfg.qkv_bias == cfg.o_bias
    family = families.get(shape, "Llama" if is_llama else None)
    if family is None:
        raise UserError("no Llama, Qwen2 or Qwen3 has this combination of qkv_bias, o_bias, "
                        "mlp_bias and qk_norm: it cannot be exported")
    scaling = {} if cfg.rope_factor == 1 else {"rope_scaling": {
        "rope_type": "llama3", "factor": cfg.rope_factor, "low_freq_factor": cfg.rope_low,
        "high_freq_factor": cfg.rope_high, "original_max_position_embeddings": cfg.rope_original}}
    return {"model_type": family.lower(), "architectures": [f"{family}ForCausalLM"],
            "vocab_size": cfg.vocab_size, "num_hidden_layers": cfg.n_layer,
            "hidden_size": cfg.n_embd, "num_attention_heads": cfg.n_head,
            "num_key_value_heads": cfg.n_kv_head, "head_dim": cfg.d_head,
            "intermediate_size": cfg.mlp_dim, "max_position_embeddings": cfg.context,
            "rope_theta": cfg.rope_theta, **scaling, "rms_norm_eps": cfg.norm_eps,
            "hidden_act": "silu", "attention_bias": cfg.o_bias, "mlp_bias": cfg.mlp_bias,
            "tie_word_embeddings": cfg.tied}


def hf_name(name):
    """A parameter's name here -> its name in a Hugging Face checkpoint."""
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head.") else "model." + name


def read_safetensors(path):
    """{name: tensor} of a safetensors file, each a view of the mapped file: nothing is read before
    it is used. Raises UserError on anything but a complete file of fp32, fp16 and bf16 tensors."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    tensors = {}
    try:
        data = np.memmap(path, np.uint8, "c")  # copy on write: the file stays as it is
        start = end = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes(), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (a, b) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            size = math.prod(shape) * dtype.itemsize
            if start + a != end or b - a != size or any(type(n) is not int or n < 0 for n in shape):
                raise ValueError(f"{name[:60]}, {str(shape)[:40]}, is not at bytes {a} to {b}")
            tensors[name] = torch.from_numpy(data[start + a:start + b]).view(dtype).view(shape)
            end = start + b
        if end != len(data):
            raise ValueError(f"its tensors end at byte {end} of {len(data)}")
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as e:
        raise UserError(f"{path} is damaged or no safetensors file of {', '.join(DTYPES)} tensors "
                        f"({type(e).__name__}: {str(e)[:120]}); fetch it again") from None
    return tensors


def read_folder(folder):
    """All tensors of a Hugging Face folder, in one file or in shards that an index lists."""
    single = os.path.join(folder, "model.safetensors")
    index = single + ".index.json"
    if not os.path.exists(index):
        if not os.path.exists(single):
            raise UserError(f"there is no model.safetensors in {folder}: give a Hugging Face model "
                            f"folder with safetensors weights")
        return read_safetensors(single)
    weight_map = read_json(index).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(file, str) and file == os.path.basename(file) for file in files):
        raise UserError(f"{index} has no weight_map from tensors to files of this folder")
    shards = {file: read_safetensors(os.path.join(folder, file)) for file in sorted(set(files))}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise UserError(f"{index} promises {name[:80]} in {file}, which does not hold it")
    return {name: shards[file][name] for name, file in weight_map.items()}


@torch.no_grad()
def from_pretrained(folder, context=0, dtype=torch.float32, device="cpu"):
    """A Qwen2, Qwen3 or Llama model from a Hugging Face folder; `context` (0 = the config's)
    shortens its context. Raises UserError, before memory is taken, on a config or weights that do
    not fit."""
    cfg = config_from_hf(read_json(os.path.join(folder, "config.json")))
    tensors = read_folder(folder)
    cfg.context = min(context or cfg.context, cfg.context)
    if cfg.n_layer > len(tensors):
        raise UserError(f"{folder}: config.json says {cfg.n_layer} layers, and there are only "
                        f"{len(tensors)} tensors")
    with torch.device("meta"):  # shapes alone
        model = GPT(cfg)
    shapes = {hf_name(name): p.shape for name, p in model.named_parameters()}
    harmless = ("rotary_emb.inv_freq", "lm_head.weight" if cfg.tied else "rotary_emb.inv_freq")
    wrong = {
        "missing": [name for name in shapes if name not in tensors],
        "misshapen": [f"{name} {tuple(tensors[name].shape)}, not {tuple(shape)}"
                      for name, shape in shapes.items()
                      if name in tensors and tensors[name].shape != shape],
        "unknown": [name for name in tensors if name not in shapes and not name.endswith(harmless)]}
    found = [f"{what} {', '.join(names[:4])}{' and more' if len(names) > 4 else ''}"
             for what, names in wrong.items() if names]
    if found:
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(found)}")
    model = model.to_empty(device=device).to(dtype)
    if cfg.tied:
        model.lm_head.weight = model.embed.weight
    model.cos, model.sin = (table.to(dtype) for table in rope_table(cfg, device))
    for name, p in model.named_parameters():
        p.copy_(tensors[hf_name(name)])
    return model


def save_pretrained(model, folder, source="", dtype=None):
    """Writes what `from_pretrained`, transformers and vLLM read: model.safetensors in `dtype`
    (None = as the weights are) and config.json. With `source`, the folder that the weights came
    from, its config and tokenizer files come along."""
    dtype = dtype or model.embed.weight.dtype
    tensors = {hf_name(name): p.detach().to(dtype) for name, p in model.named_parameters()}
    hf = read_json(os.path.join(source, "config.json")) if source else config_to_hf(model.cfg)
    hf = {**hf, "torch_dtype": str(dtype).removeprefix("torch.")}
    hf.pop("dtype", None)  # transformers 5's word for it
    os.makedirs(folder, exist_ok=True)
    for file in FOLDER_FILES:
        if source and os.path.exists(os.path.join(source, file)):
            shutil.copyfile(os.path.join(source, file), os.path.join(folder, file))
    name_of = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        offsets = [end, end + t.nbytes]
        header[name] = {"dtype": name_of[dtype], "shape": list(t.shape), "data_offsets": offsets}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with atomic_write(os.path.join(folder, "model.safetensors")) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.cpu().contiguous().view(torch.uint8).numpy())
    with atomic_write(os.path.join(folder, "config.json")) as f:
        f.write(json.dumps(hf, indent=2).encode())
