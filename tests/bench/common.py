"""What the benchmarks share: two model shapes, the same weights as a transformers model, clocks and limits."""
import argparse
import ctypes
import json
import os
import resource
import statistics
import sys
import time

import torch
import torch.nn as nn

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from model import GPT, GPTConfig  # noqa: E402

SHAPES = {
    "tiny": dict(vocab_size=512, n_embd=128, n_layer=4, n_head=4, n_kv_head=2, head_dim=32, mlp_dim=384, context=512, tied=False),
    "medium": dict(vocab_size=4096, n_embd=512, n_layer=8, n_head=8, n_kv_head=2, head_dim=64, mlp_dim=1536, context=512, tied=False),
    "qwen1.5b": dict(vocab_size=151936, n_embd=1536, n_layer=28, n_head=12, n_kv_head=2, head_dim=128, mlp_dim=8960, context=1024, tied=True),
}
END = 0  # the token that ends a sequence


def arguments(doc, rounds, **options):
    """The command line of a benchmark: `options` are its own flags, {name: (default, help)}; --rounds, --threads, --device and --alone
    are everybody's."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    everybodys = {"rounds": (rounds, "counted rounds, after one to warm up"), "threads": (0, "CPU threads; 0 = one a core"), "device": ("cpu", "cpu or cuda")}
    for name, (default, help) in {**options, **everybodys}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{help} (default %(default)s)")
    parser.add_argument("--alone", action="store_true", help="run nobody else's code beside")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def build(shape, dtype=torch.float32, device="cpu", **changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SHAPES[shape], **changes})).to(device, dtype)


def end_after(model, mean):
    """Gives the head a bias with which a random model, whose logits are nearly level, ends a sequence with
    chance 1 / mean a token: geometric lengths. mean None: never."""
    V = model.cfg.vocab_size
    bias = torch.zeros(V, device=model.cos.device, dtype=model.embed.weight.dtype)
    bias[END] = -1e4 if mean is None else torch.log(torch.tensor((V - 1) / (mean - 1)))
    model.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    return model


def as_transformers(model):
    """The same weights in a transformers LlamaForCausalLM, or None if transformers is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM, logging
    except ImportError:
        return None
    logging.set_verbosity_error()
    c = model.cfg
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.mlp_dim, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.d_head, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.context, rope_theta=c.rope_theta, tie_word_embeddings=c.tied,
        bos_token_id=None, eos_token_id=END, pad_token_id=END))
    names = {"embed.": "model.embed_tokens.", "norm.": "model.norm.", "blocks.": "model.layers.",
             ".attn.": ".self_attn.", ".attn_norm.": ".input_layernorm.", ".mlp_norm.": ".post_attention_layernorm."}
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, other in names.items():
            if ours.startswith("."):
                name = name.replace(ours, other)
            elif name.startswith(ours):
                name = other + name[len(ours):]
        state[name] = tensor
    if "lm_head.bias" in state:
        theirs.lm_head.bias = nn.Parameter(state["lm_head.bias"].clone(), requires_grad=False)
    theirs.load_state_dict(state)
    return theirs.to(model.cos.device, model.embed.weight.dtype).eval()


def clock(device):
    """CPU seconds of this process, or wall seconds once the GPU has finished."""
    if str(device) == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(device):
    """Starts the measurement of peak memory anew and returns what is in use now, in MiB."""
    if str(device) != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed earlier is given back, or using it again would not be seen
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:  # not Linux: the peak is then that of the whole process
        return 0.0
    return status("VmRSS")


def peak(device):
    """Peak memory since `reset_peak`, in MiB."""
    if str(device) != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return status("VmHWM") if os.path.exists("/proc/self/status") else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def status(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field)) / 1024


def alternate(contestants, rounds, device):
    """Runs {name: function} in turn, `rounds` times after one warm-up; each function returns the work it did.
    -> {name: [{seconds, work, peak MiB above the start} a round]}"""
    results = {name: [] for name in contestants}
    for r in range(rounds + 1):
        for name, run in contestants.items():
            before = reset_peak(device)
            t0 = clock(device)
            work = run()
            seconds = clock(device) - t0
            if r:
                results[name].append({"seconds": seconds, "work": work, "peak": peak(device) - before})
    return results


def spread(values):
    """Median, least and most."""
    return [float(f"{x:.4g}") for x in (statistics.median(values), min(values), max(values))]


def ratio(ours, theirs):
    """Work a second, ours over theirs, round by round."""
    return spread([a["work"] / a["seconds"] / (b["work"] / b["seconds"]) for a, b in zip(ours, theirs)])


def matmul_rate(rows, cfg, dtype, device):
    """FLOP/s of the MLP's matrix product for `rows` rows: what this machine gives at best for such a shape."""
    a = torch.randn(rows, cfg.n_embd, device=device, dtype=dtype)
    w = torch.randn(cfg.mlp_dim, cfg.n_embd, device=device, dtype=dtype)
    rates = []
    for _ in range(5):
        t0, n = clock(device), 0
        while clock(device) - t0 < 0.1:
            for _ in range(20):
                torch.nn.functional.linear(a, w)
            n += 20
        rates.append(2 * n * rows * cfg.n_embd * cfg.mlp_dim / (clock(device) - t0))
    return max(rates)


def copy_rate(device):
    """Bytes read plus written a second by a large copy on the device."""
    a = torch.empty(2**28, device=device)
    b = torch.empty_like(a)
    for _ in range(3):
        b.copy_(a)
    t0 = clock(device)
    for _ in range(10):
        b.copy_(a)
    return 10 * 2 * a.numel() * 4 / (clock(device) - t0)


def matrix_params(cfg):
    """Weights that every token is multiplied with: all but the embedding's table and the norms."""
    attention = cfg.n_embd * cfg.d_head * 2 * (cfg.n_head + cfg.n_kv_head)
    return cfg.n_layer * (attention + 3 * cfg.n_embd * cfg.mlp_dim) + cfg.n_embd * cfg.vocab_size


def report(**fields):
    print(json.dumps(fields), flush=True)
