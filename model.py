"""A Llama/Qwen-style decoder with KV-cached group sampling, in one file.

Top to bottom: the config, the transformer, the cache, `generate` (what RL samples with),
`token_logps` (what RL trains with), checkpoints. Token ids only: text lives in data.py.

    python -c "import torch, model; print(model.GPT(model.GPTConfig())(torch.zeros(1, 8, dtype=torch.long)).shape)"
"""
import math
import os
from dataclasses import dataclass, field

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
    norm_eps: float = opt(1e-6, "RMSNorm epsilon")
    qkv_bias: bool = opt(False, "bias on q, k, v (Qwen2)")
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

    @property
    def d_head(self):
        return self.head_dim or self.n_embd // self.n_head


# ------------------------------------------------------------------------------------------------
# The transformer


def rope_table(cfg, device=None):
    """cos and sin of every position's rotation angles, each (context, head_dim). arXiv 2104.09864."""
    freq = cfg.rope_theta ** (-torch.arange(0, cfg.d_head, 2, device=device, dtype=torch.float32) / cfg.d_head)
    angle = torch.outer(torch.arange(cfg.context, device=device, dtype=torch.float32), freq).repeat(1, 2)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotates x (B, H, T, D), whose pairs are (i, i + D/2), by cos and sin (B or 1, 1, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.n_kv_head, self.d_head = cfg.n_head, cfg.n_kv_head, cfg.d_head
        self.q_proj = nn.Linear(cfg.n_embd, cfg.n_head * cfg.d_head, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.d_head, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.n_embd, cfg.n_kv_head * cfg.d_head, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.n_head * cfg.d_head, cfg.n_embd, bias=False)
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
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.mlp_dim, bias=False)
        self.up_proj = nn.Linear(cfg.n_embd, cfg.mlp_dim, bias=False)
        self.down_proj = nn.Linear(cfg.mlp_dim, cfg.n_embd, bias=False)

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
            x = block(x, cos, sin, caches[i] if caches else None, mask)
        return self.norm(x)

    def head(self, h):
        """Hidden states (..., C) to logits (..., vocab), fp32 whatever the weights are."""
        return self.lm_head(h).float()

    def forward(self, idx):
        return self.head(self.trunk(idx))

    def generate(self, prompts, group_size=1, **options):
        """Samples `group_size` completions of each prompt: see `generate` below."""
        return generate(self, prompts, group_size, **options)


# ------------------------------------------------------------------------------------------------
# Sampling


class KVCache:
    """The keys and values of one layer, (N, K, columns, D) each, written in place."""

    def __init__(self, k, v, columns):
        N, K, T, D = k.shape
        self.k, self.v = k.new_empty(N, K, columns, D), v.new_empty(N, K, columns, D)
        self.used = 0
        self.append(k, v)

    def append(self, k, v):
        """Writes T more columns, returns views of all columns so far."""
        end = self.used + k.shape[2]
        self.k[:, :, self.used:end], self.v[:, :, self.used:end] = k, v
        self.used = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def keep(self, rows):
        """Drops every row that is not in `rows` (a long tensor), copying only the columns in use."""
        columns, k, v = self.k.shape[2], self.k[:, :, :self.used], self.v[:, :, :self.used]
        self.__init__(k[rows], v[rows], columns)


class PrefillCache:
    """Catches the keys and values of the prompts, to be copied out to each prompt's group."""

    def append(self, k, v):
        self.k, self.v = k, v
        return k, v

    def share(self, group_size, columns):
        return KVCache(self.k.repeat_interleave(group_size, 0), self.v.repeat_interleave(group_size, 0), columns)


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
             pad_id=0, share_prefix=True, drop_rows=True):
    """Samples `group_size` completions of each prompt (lists of ids, any lengths) -> Generation.
    Raises BadInput on an empty prompt or one that leaves no room for max_new_tokens.

    Row i draws the same random numbers whatever the other rows do, so neither `share_prefix` nor
    `drop_rows` changes a sample: they only save time."""
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
            if drop_rows and len(alive) < 0.9 * len(rows):  # copying what is left costs about one step
                rows, token = rows[alive], token[alive]
                visible = visible[alive] if visible is not None else None
                for c in caches:
                    c.keep(alive)
        h = model.trunk(token[:, None], (prompt_lens[rows] + t)[:, None], caches,
                        visible[..., :L + t + 1] if visible is not None else None)
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
    h, target = model.trunk(tokens[:, :-1]), tokens[:, 1:]
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


def save_checkpoint(path, state):
    """Writes `state` whole or not at all: to a temporary file, flushed to disk, then renamed."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


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


def load_model(path, device="cpu"):
    """The model of a checkpoint, in its own shape. Raises BadInput as `load_checkpoint` does."""
    state = load_checkpoint(path, device)
    model = GPT(GPTConfig(**state["model_config"])).to(device)
    model.load_state_dict(state["model"])
    return model
