"""A Llama/Qwen-style decoder with KV-cached group sampling, in one file.

Top to bottom: the config, the transformer, the cache, `generate` (what RL samples with),
`token_logps` (what RL trains with), checkpoints, Hugging Face folders in and out. Token ids only: text
lives in data.py.

    python -c "import torch, model; print(model.GPT(model.GPTConfig())(torch.zeros(1, 8, dtype=torch.long)).shape)"
"""
import json
import math
import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class BadInput(ValueError):
    """Something the user can mend. The scripts print it as one line and exit with code 2."""


def opt(default, help):
    """A config field with its help text, which `python train.py --help` prints."""
    return field(default=default, metadata={"help": help})


@dataclass
class GPTConfig:
    vocab_size: int = opt(512, "token ids; train.py sets it to the tokenizer's")
    n_layer: int = opt(3, "transformer blocks")
    n_embd: int = opt(128, "width of the residual stream")
    n_head: int = opt(4, "query heads")
    n_kv_head: int = opt(2, "key/value heads, each shared by n_head / n_kv_head query heads")
    head_dim: int = opt(16, "width of a head; 0 = n_embd / n_head")
    mlp_dim: int = opt(256, "hidden width of the SwiGLU MLP")
    context: int = opt(512, "longest sequence, in tokens")
    rope_theta: float = opt(10000.0, "RoPE base")
    rope_factor: float = opt(1.0, "slows RoPE's long waves by this (Llama 3.1); 1 = as they are")
    rope_low: float = opt(1.0, "with rope_factor: waves that fit rope_original fewer times than this are slowed in full")
    rope_high: float = opt(4.0, "with rope_factor: waves that fit it more often than this stay as they are")
    rope_original: int = opt(8192, "with rope_factor: the context before it was stretched")
    norm_eps: float = opt(1e-6, "RMSNorm epsilon")
    qkv_bias: bool = opt(False, "bias on q, k, v (Qwen2)")
    o_bias: bool = opt(False, "bias on the attention's output (Llama's attention_bias, with qkv_bias)")
    mlp_bias: bool = opt(False, "bias on the MLP's matrices (Llama's mlp_bias)")
    qk_norm: bool = opt(False, "RMSNorm on each head's q and k before RoPE (Qwen3)")
    tied: bool = opt(True, "output head shares the embedding's weights")

    def check(self):
        """Raises BadInput, naming the fields, if no model of this shape can exist."""
        for name in ("vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head", "mlp_dim", "context"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_head % self.n_kv_head:
            raise BadInput(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise BadInput(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; set head_dim")
        if self.d_head % 2:
            raise BadInput(f"a head of width {self.d_head} is odd: RoPE rotates pairs, so choose an even one")
        if not 0 < self.rope_low < self.rope_high or self.rope_factor < 1:
            raise BadInput(f"rope_factor={self.rope_factor} must be at least 1, and rope_low={self.rope_low} less than rope_high={self.rope_high}")

    @property
    def d_head(self):
        return self.head_dim or self.n_embd // self.n_head


# ------------------------------------------------------------------------------------------------
# The transformer


def rope_table(cfg, device=None):
    """cos and sin of every position's rotation angles, each (context, head_dim), the sines of the first half with a minus.
    arXiv 2104.09864."""
    freq = cfg.rope_theta ** (-torch.arange(0, cfg.d_head, 2, device=device, dtype=torch.float32) / cfg.d_head)
    if cfg.rope_factor != 1:  # Llama 3.1: 1 = short waves, which keep their pace; 0 = long ones, which are slowed
        short = (cfg.rope_original * freq / (2 * math.pi) - cfg.rope_low) / (cfg.rope_high - cfg.rope_low)
        short = short.clamp(0, 1)
        freq = freq * (short + (1 - short) / cfg.rope_factor)
    angle = torch.outer(torch.arange(cfg.context, device=device, dtype=torch.float32), freq)
    return angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)


def apply_rope(x, cos, sin):
    """Rotates x (B, H, T, D), whose pairs are (i, i + D/2), by cos and sin (B or 1, 1, T, D): (a, b) becomes
    (a cos - b sin, b cos + a sin). The minus is in the table, so that it takes one pass less."""
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
            # Training and prefill: sequences are right-padded, so causality alone hides the padding.
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
    """A decoder-only transformer. `model(idx)` maps token ids (B, T) to fp32 logits (B, T, vocab)."""

    def __init__(self, cfg):
        super().__init__()
        cfg.check()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tied:
            self.lm_head.weight = self.embed.weight
        cos, sin = rope_table(cfg)
        self.checkpointing, self.compiled_trunk = False, None  # see train.py's flags
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Layers that write into the residual stream start smaller, as in GPT-2.
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if into_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def trunk(self, idx, positions=None, caches=None, mask=None):
        """Token ids (B, T) to the normed hidden states (B, T, C) that the head reads.
        `positions` (B, T) defaults to 0..T-1; a T past the context raises BadInput."""
        if idx.shape[1] > self.cfg.context:
            raise BadInput(f"{idx.shape[1]} tokens do not fit the context of {self.cfg.context}")
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

    def head(self, h):
        """Hidden states (..., C) to logits (..., vocab), fp32 whatever the weights are. Under autocast, too: rounded to
        bfloat16, logits near 20 would be off by 0.06."""
        with torch.autocast(h.device.type, enabled=False):
            return self.lm_head(h.to(self.embed.weight.dtype)).float()

    def forward(self, idx):
        return self.head(self.trunk(idx))

    def generate(self, prompts, group_size=1, **options):
        """Samples `group_size` completions of each prompt: see `generate` below."""
        return generate(self, prompts, group_size, **options)

    @staticmethod
    def from_pretrained(folder, context=0, dtype=torch.float32, device="cpu"):
        """The model in a Hugging Face folder: see `from_pretrained` below."""
        return from_pretrained(folder, context, dtype, device)


# ------------------------------------------------------------------------------------------------
# Sampling


class KVCache:
    """The keys and values of one layer, (N, K, columns, D) each, written in place."""

    def __init__(self, k, v, columns):
        N, K, T, D = k.shape
        self.k, self.v = k.new_empty(N, K, columns, D), v.new_empty(N, K, columns, D)
        self.used, self.static = 0, None
        self.append(k, v)

    def append(self, k, v):
        """Writes T more columns, returns views of all columns so far. With `static` = (column (1,), end) it writes one column,
        named by a tensor, and returns views of the first `end`: the same work every time, as a CUDA graph needs it."""
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
        """Drops every row that is not in `rows` (a long tensor): the others move up, in place, in the columns in use."""
        n, used = len(rows), self.used
        self.k[:n, :, :used], self.v[:n, :, :used] = self.k[rows, :, :used], self.v[rows, :, :used]
        self.k, self.v = self.k[:n], self.v[:n]


class PrefillCache:
    """Catches the keys and values of the prompts, to be copied out to each prompt's group."""

    def append(self, k, v):
        self.k, self.v = k, v
        return k, v

    def share(self, group_size, columns):
        return KVCache(self.k.repeat_interleave(group_size, 0), self.v.repeat_interleave(group_size, 0), columns)


class StaticDecoder:
    """Decoding steps as CUDA graphs: captured once, replayed for every token, so that the GPU need not wait for Python to launch some
    ten kernels a layer. A graph is bound to its shapes: attention reads a multiple of 128 columns, the unwritten ones hidden, and
    a graph is captured anew when these are used up or rows were dropped. On a CPU the same work runs without a graph."""

    def __init__(self, model, caches):
        self.model, self.caches, self.shape = model, caches, None
        for cache in caches:  # what is hidden is multiplied with 0, and must not be a NaN left in memory
            cache.k[:, :, cache.used:], cache.v[:, :, cache.used:] = 0, 0

    def __call__(self, token, position, visible, column):
        """token (n,), position (n, 1), visible (n, 1, 1, columns) or None, the column to write -> logits (n, V)."""
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
            stream = torch.cuda.Stream()  # a first run outside the graph, for what libraries set up on first use
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.run()
            self.replay = graph.replay

    def run(self):
        shown = (self.columns <= self.column)[None, None, None]
        for cache in self.caches:
            cache.static = self.column, self.shape[1]
        h = self.model.trunk(self.token, self.position, self.caches, shown if self.visible is None else shown & self.visible)
        self.logits = self.model.head(h[:, -1])


@dataclass
class Generation:
    """N = prompts x group_size rows, row i belongs to prompt i // group_size. T = longest row."""
    tokens: torch.Tensor       # (N, T) prompt + completion, right-padded
    prompt_lens: torch.Tensor  # (N,)
    mask: torch.Tensor         # (N, T) True on completion tokens, the end token included
    logp: torch.Tensor         # (N, T) log-prob each completion token was sampled with, 0 elsewhere
    truncated: torch.Tensor    # (N,) True where no end token came within max_new_tokens

    def completions(self):
        """The completions' token ids as a list of lists, end tokens included."""
        return [row[keep].tolist() for row, keep in zip(self.tokens.cpu(), self.mask.cpu())]


def sample_token(logits, temperature, u):
    """Draws one token a row of logits (n, V) by inverting the CDF at u (n,) in [0, 1); returns
    tokens (n,) and their log-probs (n,). Temperature 0 takes the likeliest token (log-prob at T = 1)."""
    p = F.softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = p.argmax(-1, keepdim=True)
    else:
        cdf = p.cumsum(-1)
        # right=True never picks a token of probability 0; the factor keeps rounding from reaching past the end.
        token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:] * (1 - 2**-22), right=True)
    return token[:, 0], p.gather(1, token)[:, 0].log()


@torch.no_grad()
def generate(model, prompts, group_size=1, max_new_tokens=128, temperature=1.0, stop_ids=(), generator=None,
             pad_id=0, share_prefix=True, drop_rows=True, static=None):
    """Samples `group_size` completions of each prompt (lists of ids, any lengths) -> Generation.
    Raises BadInput on an empty prompt or one that leaves no room for max_new_tokens.

    Row i draws the same random numbers whatever the other rows do, so neither `share_prefix` nor
    `drop_rows` nor `static` (CUDA graphs; None = on CUDA) changes a sample: they only save time."""
    lens = [len(p) for p in prompts]
    if min(lens, default=0) == 0:
        raise BadInput("generate needs at least one prompt, and at least one token in each")
    if max(lens) + max_new_tokens > model.cfg.context:
        raise BadInput(f"a prompt of {max(lens)} tokens + max_new_tokens={max_new_tokens} do not fit the context of "
                         f"{model.cfg.context}: shorten the prompt, lower --max_new_tokens or raise --context")
    device = next(model.parameters()).device
    if not share_prefix:
        prompts, lens, group_size = [p for p in prompts for _ in range(group_size)], [n for n in lens for _ in range(group_size)], 1
    N, L = len(prompts) * group_size, max(lens)
    u = torch.rand(max_new_tokens, N, generator=generator).to(device)

    # Prefill: each prompt once, right-padded; its cache is copied out to its group.
    padded = torch.tensor([p + [pad_id] * (L - len(p)) for p in prompts], device=device)
    last = torch.tensor(lens, device=device) - 1
    caches = [PrefillCache() for _ in model.blocks]
    h = model.trunk(padded, caches=caches)[torch.arange(len(prompts), device=device), last]
    logits = model.head(h).repeat_interleave(group_size, 0)
    caches = [c.share(group_size, L + max_new_tokens) for c in caches]
    prompt_lens = (last + 1).repeat_interleave(group_size)

    # Decode: all rows write the same cache column L + t, while each row's position goes on from
    # its own prompt; the columns between a short prompt's end and L stay hidden.
    columns = torch.arange(L + max_new_tokens, device=device)
    visible = None if min(lens) == L else ((columns < prompt_lens[:, None]) | (columns >= L))[:, None, None]
    stop = torch.tensor(list(stop_ids), device=device, dtype=torch.long)
    new = torch.zeros(N, max_new_tokens, device=device, dtype=torch.long)
    new_logp = torch.zeros(N, max_new_tokens, device=device)
    new_lens = torch.zeros(N, device=device, dtype=torch.long)
    stopped = torch.zeros(N, device=device, dtype=torch.bool)
    rows = torch.arange(N, device=device)  # the rows still being decoded
    decoder = StaticDecoder(model, caches) if static or static is None and device.type == "cuda" else None
    for t in range(max_new_tokens):
        token, logp = sample_token(logits, temperature, u[t, rows])
        new[rows, t], new_logp[rows, t] = token, logp  # what a row says after its end is cut off below, by its length
        new_lens[rows] += ~stopped[rows]
        stopped[rows] |= torch.isin(token, stop)
        if t + 1 == max_new_tokens:
            break
        if t % 4 == 3:  # looking for finished rows makes the host wait for the device: not every token
            alive = (~stopped[rows]).nonzero()[:, 0]
            if len(alive) == 0:
                break
            # Copying what is left costs about one step; a graph costs several to capture.
            if drop_rows and len(alive) < (0.5 if decoder else 0.9) * len(rows):
                rows, token = rows[alive], token[alive]
                visible = visible[alive] if visible is not None else None
                for c in caches:
                    c.keep(alive)
        position = (prompt_lens[rows] + t)[:, None]
        if decoder:
            logits = decoder(token, position, visible, L + t)
        else:
            h = model.trunk(token[:, None], position, caches, visible[..., :L + t + 1] if visible is not None else None)
            logits = model.head(h[:, -1])

    # Lay each completion right behind its prompt.
    T = int((prompt_lens + new_lens).max())
    column = torch.arange(T, device=device).expand(N, T)
    mask = (column >= prompt_lens[:, None]) & (column < (prompt_lens + new_lens)[:, None])
    source = (column - prompt_lens[:, None]).clamp(0, max_new_tokens - 1)
    tokens = torch.full((N, T), pad_id, device=device)
    tokens[:, :min(L, T)] = padded.repeat_interleave(group_size, 0)[:, :T]
    tokens = torch.where(mask, new.gather(1, source), tokens)
    return Generation(tokens, prompt_lens, mask, torch.where(mask, new_logp.gather(1, source), 0.0), ~stopped)


# ------------------------------------------------------------------------------------------------
# Log-probs for training


def token_logps(model, tokens, temperature=1.0, mask=None, chunk_floats=2**24):
    """log p(tokens[:, t+1] | tokens[:, :t+1]) at `temperature`: tokens (N, T) -> (N, T-1), fp32.
    Where `mask` (N, T-1) is False the head is not run and the result is 0. The logits of at most
    `chunk_floats` numbers exist at a time; the backward pass computes them again."""
    h, target = (model.compiled_trunk or model.trunk)(tokens[:, :-1]), tokens[:, 1:]
    where = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.bool()

    def logp_of(h, target):
        logp = F.log_softmax(model.head(h) / temperature, dim=-1)
        return logp.gather(-1, target[:, None])[:, 0]

    h, target = h[where], target[where]
    size = max(1, chunk_floats // model.cfg.vocab_size)
    if len(h) <= size or not torch.is_grad_enabled():
        parts = [logp_of(a, b) for a, b in zip(h.split(size), target.split(size))]
    else:
        parts = [checkpoint(logp_of, a, b, use_reentrant=False) for a, b in zip(h.split(size), target.split(size))]
    return torch.zeros(where.shape, device=h.device).masked_scatter(where, torch.cat(parts))


# ------------------------------------------------------------------------------------------------
# Checkpoints


@contextmanager
def whole_file(path):
    """Opens `path` to be written whole or not at all: a temporary file, flushed to disk, then renamed."""
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
        raise BadInput(f"cannot write {path} ({e.strerror or e}): what was there before is untouched; make room and run the same command again") from None


def save_checkpoint(path, state):
    """Writes `state` whole or not at all."""
    with whole_file(path) as f:
        torch.save(state, f)


def load_checkpoint(path, device="cpu"):
    """Reads what `save_checkpoint` wrote: tensors and plain values only, no code is run.
    Raises BadInput naming the file if it is missing or no whole checkpoint."""
    if not os.path.isfile(path):
        raise BadInput(f"there is no checkpoint at {path}; python train.py makes one")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        state["model_config"], state["model"]
    except Exception as e:  # a torn zip, a pickle of something else, no dict: all mean the same to the caller
        raise BadInput(f"{path} is not a whole checkpoint of ours ({type(e).__name__}); delete it to make it again") from None
    return state


def model_of(state, path, device="cpu", kind=lambda gpt: gpt):
    """The model in what `load_checkpoint` read from `path`, in its own shape; `kind` makes it of a GPT where it is more than one.
    Raises BadInput if shape and weights do not fit."""
    try:
        model = kind(GPT(GPTConfig(**state["model_config"]))).to(device)
        model.load_state_dict(state["model"])
    except (TypeError, RuntimeError, AttributeError) as e:
        raise BadInput(f"{path} holds no model of ours ({str(e).strip().splitlines()[0][:120]}); delete it to make it again") from None
    return model


def load_model(path, device="cpu", kind=lambda gpt: gpt):
    """The model of a checkpoint. Raises BadInput as `load_checkpoint` does."""
    return model_of(load_checkpoint(path, device), path, device, kind)


# ------------------------------------------------------------------------------------------------
# Hugging Face folders: config.json, safetensors, and the tokenizer's files, which data.py reads

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST = 2**20  # of anything a config counts; keeps the product of any three below what an int64 holds
NEUTRAL = {  # what a config may say of features that this transformer does not have
    "hidden_act": ("silu",), "pretraining_tp": (1,), "rope_interleaved": (False,), "partial_rotary_factor": (1, 1.0),
    "use_sliding_window": (False,), "quantization_config": (), "num_experts": (), "num_local_experts": (), "is_decoder": (False,),
    "add_cross_attention": (False,), "logits_scaling": (1, 1.0), "embedding_multiplier": (1, 1.0), "residual_multiplier": (1, 1.0),
}
FOLDER_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"]


def read_json(path):
    """The object in a JSON file. Raises BadInput naming the file if there is none."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except OSError as e:
        raise BadInput(f"cannot read {path} ({e.strerror})") from None
    except (ValueError, RecursionError):
        raise BadInput(f"{path} is not JSON") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds no JSON object")
    return value


def config_from_hf(hf):
    """A config.json (a dict, as transformers 4 or 5 writes it) -> GPTConfig.
    Raises BadInput naming the field that is malformed or asks for what this transformer does not implement."""
    family = hf.get("model_type")
    if family not in ("llama", "qwen2", "qwen3"):
        raise BadInput(f"config.json: model_type {family!r} is not one of llama, qwen2, qwen3")
    for name, values in NEUTRAL.items():
        if hf.get(name) is not None and hf[name] not in values:
            raise BadInput(f"config.json: {name}={str(hf[name])[:60]} is not implemented here")

    def number(name, default=None, source=hf, most=MOST):
        value = source.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value <= most or (type(default) is not float and value != int(value)):
            raise BadInput(f"config.json: {name}={str(value)[:60]} is not a number between 0 and {most}")
        return value if type(default) is float else int(value)

    layers = hf.get("layer_types") or []
    if layers != ["full_attention"] * len(layers if isinstance(layers, list) else []):
        raise BadInput("config.json: layer_types other than full_attention (a sliding window, say) are not implemented here")
    rope, kinds = {}, []
    for name in ("rope_scaling", "rope_parameters"):  # as transformers 4 and 5 write it
        part = hf.get(name) or {}
        if not isinstance(part, dict) or part.get("partial_rotary_factor") not in (None, 1):
            raise BadInput(f"config.json: {name}={str(part)[:60]} is not implemented here")
        kinds.append(part.get("rope_type") or part.get("type") or "default")
        rope |= part
    if any(kind not in ("default", "llama3") for kind in kinds):
        raise BadInput(f"config.json: rope types {', '.join(str(kind)[:60] for kind in kinds)} are not implemented here, only default and llama3")
    scaling = {} if "llama3" not in kinds else {
        "rope_factor": number("factor", 1.0, rope), "rope_low": number("low_freq_factor", 1.0, rope),
        "rope_high": number("high_freq_factor", 4.0, rope), "rope_original": number("original_max_position_embeddings", 8192, rope, 2**30)}
    n_head, n_embd = number("num_attention_heads"), number("hidden_size")
    attention_bias = bool(hf.get("attention_bias"))
    cfg = GPTConfig(
        vocab_size=number("vocab_size", most=2**24), n_layer=number("num_hidden_layers"), n_embd=n_embd, n_head=n_head,
        n_kv_head=number("num_key_value_heads", n_head), head_dim=number("head_dim", 128 if family == "qwen3" else n_embd // n_head),
        mlp_dim=number("intermediate_size"), context=number("max_position_embeddings", 2048, most=2**30),
        rope_theta=number("rope_theta", float(number("rope_theta", 10000.0, most=1e12)), rope, most=1e12), **scaling,
        norm_eps=number("rms_norm_eps", 1e-6), qkv_bias=family == "qwen2" or attention_bias, o_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and bool(hf.get("mlp_bias")), qk_norm=family == "qwen3", tied=bool(hf.get("tie_word_embeddings")))
    cfg.check()
    return cfg


def config_to_hf(cfg):
    """The inverse. Raises BadInput if no family that transformers knows has such a shape."""
    if cfg.mlp_bias and cfg.qk_norm or cfg.qkv_bias != cfg.o_bias and (cfg.o_bias or cfg.qk_norm or cfg.mlp_bias):
        raise BadInput("no Llama, Qwen2 or Qwen3 has this combination of qkv_bias, o_bias, mlp_bias and qk_norm: it cannot be exported")
    family = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias and not cfg.o_bias else "llama"
    name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    scaling = {} if cfg.rope_factor == 1 else {"rope_scaling": {
        "rope_type": "llama3", "factor": cfg.rope_factor, "low_freq_factor": cfg.rope_low, "high_freq_factor": cfg.rope_high,
        "original_max_position_embeddings": cfg.rope_original}}
    return {"model_type": family, "architectures": [name], "vocab_size": cfg.vocab_size, "num_hidden_layers": cfg.n_layer,
            "hidden_size": cfg.n_embd, "num_attention_heads": cfg.n_head, "num_key_value_heads": cfg.n_kv_head, "head_dim": cfg.d_head,
            "intermediate_size": cfg.mlp_dim, "max_position_embeddings": cfg.context, "rope_theta": cfg.rope_theta, **scaling,
            "rms_norm_eps": cfg.norm_eps, "hidden_act": "silu", "attention_bias": cfg.o_bias, "mlp_bias": cfg.mlp_bias,
            "tie_word_embeddings": cfg.tied}


def hf_name(name):
    """A parameter's name here -> its name in a Hugging Face checkpoint."""
    for ours, theirs in ((".attn.", ".self_attn."), (".attn_norm.", ".input_layernorm."), (".mlp_norm.", ".post_attention_layernorm."),
                         ("blocks.", "layers."), ("embed.", "embed_tokens.")):
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head.") else "model." + name


def read_safetensors(path):
    """{name: tensor} of a safetensors file, each a view of the mapped file: nothing is read or allocated before it is used.
    Raises BadInput on anything but a whole, well-formed file of fp32, fp16 and bf16 tensors."""
    def refuse(why):
        raise BadInput(f"{path}: {why}; the file is damaged or not a safetensors file, fetch it again")

    def once(pairs):
        if len({name for name, _ in pairs}) < len(pairs):
            refuse("its header names a tensor twice")
        return dict(pairs)

    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            if size < 8 or start > size:
                refuse(f"its header is said to end at byte {start}, and the file has {size}")
            header = json.loads(f.read(start - 8), object_pairs_hook=once)
    except OSError as e:
        raise BadInput(f"cannot read {path} ({e.strerror})") from None
    except BadInput:
        raise
    except (ValueError, RecursionError):
        refuse("its header is not JSON")
    if not isinstance(header, dict):
        refuse("its header is no JSON object")
    header.pop("__metadata__", None)

    whole = lambda x: type(x) is int and 0 <= x <= size
    end, found = 0, {}
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if str(dtype) not in DTYPES:
            refuse(f"{name[:80]} has dtype {str(dtype)[:20]}, not one of {', '.join(DTYPES)}")
        if not isinstance(shape, list) or not all(map(whole, shape)):
            refuse(f"{name[:80]} has no shape that fits the file")
        if not isinstance(span, list) or len(span) != 2 or not all(map(whole, span)):
            refuse(f"{name[:80]} has no offsets that lie in the file")
        if span[1] - span[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            refuse(f"{name[:80]} of shape {shape} does not fill its {span[1] - span[0]} bytes")
        found[name] = (span, DTYPES[dtype], shape)
    for span, *_ in sorted(found.values(), key=lambda x: x[0]):
        if span[0] != end:
            refuse(f"its tensors overlap or leave a gap at byte {start + min(end, span[0])}")
        end = span[1]
    if start + end != size:
        refuse(f"its tensors end at byte {start + end}, and the file has {size}")
    if not end:
        return {}
    data = np.memmap(path, np.uint8, "c", offset=start)  # copy on write: torch wants writable memory, the file stays as it is
    return {name: torch.from_numpy(data[a:b]).view(dtype).view(shape) if b > a else torch.empty(shape, dtype=dtype)
            for name, ((a, b), dtype, shape) in found.items()}


def read_folder(folder):
    """All tensors of a Hugging Face folder, in one file or in shards that an index lists."""
    index, single = (os.path.join(folder, f"model.safetensors{ending}") for ending in (".index.json", ""))
    if not os.path.exists(index):
        if not os.path.exists(single):
            raise BadInput(f"there is no model.safetensors in {folder}: give a Hugging Face model folder with safetensors weights")
        return read_safetensors(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) and f == os.path.basename(f) for f in weight_map.values()):
        raise BadInput(f"{index} has no weight_map from tensors to files of this folder")
    shards = {file: read_safetensors(os.path.join(folder, file)) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise BadInput(f"{index} promises {name[:80]} in {file}, which does not hold it")
    return {name: shards[file][name] for name, file in weight_map.items()}


@torch.no_grad()
def from_pretrained(folder, context=0, dtype=torch.float32, device="cpu"):
    """A Qwen2, Qwen3 or Llama model from a Hugging Face folder; `context` (0 = the config's) shortens its context.
    Raises BadInput, before memory is taken, on a config or weights that do not fit."""
    cfg, tensors = config_from_hf(read_json(os.path.join(folder, "config.json"))), read_folder(folder)
    cfg.context = min(context or cfg.context, cfg.context)
    if cfg.n_layer > len(tensors):
        raise BadInput(f"{folder}: config.json says {cfg.n_layer} layers, and there are only {len(tensors)} tensors")
    with torch.device("meta"):  # shapes alone
        model = GPT(cfg)
    shapes = {hf_name(name): p.shape for name, p in model.named_parameters()}
    extra = [name for name in tensors if name not in shapes and not name.endswith("rotary_emb.inv_freq") and not (cfg.tied and name == "lm_head.weight")]
    missing = [name for name in shapes if name not in tensors]
    misshapen = [f"{name} {tuple(tensors[name].shape)}, not {tuple(shape)}" for name, shape in shapes.items()
                 if name in tensors and tensors[name].shape != shape]
    wrong = [f"{what} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
             for what, names in (("missing", missing), ("misshapen", misshapen), ("unknown", extra)) if names]
    if wrong:
        raise BadInput(f"{folder}: the weights do not fit config.json: {'; '.join(wrong)}")
    model = model.to_empty(device=device).to(dtype)
    if cfg.tied:
        model.lm_head.weight = model.embed.weight
    model.cos, model.sin = (table.to(dtype) for table in rope_table(cfg, device))
    for name, p in model.named_parameters():
        p.copy_(tensors[hf_name(name)])
    return model


def save_pretrained(model, folder, source="", dtype=None):
    """Writes what `from_pretrained`, transformers and vLLM read: model.safetensors in `dtype` (None = as the weights are) and
    config.json. With `source`, the folder that the weights once came from, its config and tokenizer files come along."""
    tensors = {hf_name(name): p.detach().to(dtype or p.dtype) for name, p in model.named_parameters()}
    hf = read_json(os.path.join(source, "config.json")) if source else config_to_hf(model.cfg)
    names = {dtype: name for name, dtype in DTYPES.items()}
    kind = next(iter(tensors.values())).dtype
    hf = {**{k: v for k, v in hf.items() if k != "dtype"}, "torch_dtype": str(kind).removeprefix("torch.")}
    os.makedirs(folder, exist_ok=True)
    for file in FOLDER_FILES[1:]:
        if source and os.path.exists(os.path.join(source, file)):
            shutil.copyfile(os.path.join(source, file), os.path.join(folder, file))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with whole_file(os.path.join(folder, "model.safetensors")) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.cpu().contiguous().view(torch.uint8).numpy())
    with whole_file(os.path.join(folder, "config.json")) as f:
        f.write(json.dumps(hf, indent=2).encode())
