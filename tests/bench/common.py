"""What the benchmarks share: model shapes, the same weights as a transformers model, clocks and
limits."""
import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.insert(0, ROOT)
import data  # noqa: E402
from model import GPT, GPTConfig, Linear, hf_name, onednn_pays, save_pretrained  # noqa: E402

SHAPES = {
    "tiny": dict(vocab_size=512, n_embd=128, n_layer=4, n_head=4, n_kv_head=2, head_dim=32,
                 mlp_dim=384, context=512, tied=False),
    "medium": dict(vocab_size=4096, n_embd=512, n_layer=8, n_head=8, n_kv_head=2, head_dim=64,
                   mlp_dim=1536, context=512, tied=False),
    "qwen0.5b": dict(vocab_size=151936, n_embd=896, n_layer=24, n_head=14, n_kv_head=2,
                     head_dim=64, mlp_dim=4864, context=1024, tied=True),
    "qwen1.5b": dict(vocab_size=151936, n_embd=1536, n_layer=28, n_head=12, n_kv_head=2,
                     head_dim=128, mlp_dim=8960, context=1024, tied=True),
}
END = 0  # the token that ends a sequence
PROMPT_LEN = 32


def arguments(doc, rounds, **options):
    """The command line of a benchmark: `options` are its own flags, {name: (default, help)};
    --rounds, --threads, --device and --alone are everybody's."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    everybodys = {"rounds": (rounds, "counted rounds, after one to warm up"),
                  "threads": (0, "CPU threads; 0 = one a core"), "device": ("cpu", "cpu or cuda")}
    options = everybodys | options
    for name, (default, help) in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            help=f"{help} (default %(default)s)")
    parser.add_argument("--alone", action="store_true", help="run nobody else's code beside")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    Linear.onednn = args.device == "cpu" and onednn_pays()  # as our scripts do by default
    return args


def build(shape, dtype=torch.float32, device="cpu", **changes):
    torch.manual_seed(0)
    shape = {"qk_norm": False, **SHAPES[shape], **changes}  # a Llama
    return GPT(GPTConfig(**shape)).to(device, dtype)


def random_prompts(n, cfg):
    """(n, PROMPT_LEN) token ids, none of them the end token."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, cfg.vocab_size, (n, PROMPT_LEN), generator=generator)


def end_after(model, mean):
    """Gives the head a bias with which a random model, whose logits are nearly level, ends a
    sequence with chance 1 / mean a token: geometric lengths. mean None: never."""
    V = model.cfg.vocab_size
    bias = torch.zeros(V, device=model.cos.device, dtype=model.embed.weight.dtype)
    bias[END] = -1e4 if mean is None else torch.log(torch.tensor((V - 1) / (mean - 1)))
    model.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    return model


def as_transformers(model):
    """The same weights in a transformers LlamaForCausalLM; None if that is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM, logging
    except ImportError:
        return None
    logging.set_verbosity_error()
    c = model.cfg
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.mlp_dim,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, head_dim=c.d_head, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.context, rope_theta=c.rope_theta, tie_word_embeddings=c.tied,
        bos_token_id=None, eos_token_id=END, pad_token_id=END))
    state = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    if "lm_head.bias" in state:
        bias = state["lm_head.bias"].clone()
        theirs.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    theirs.load_state_dict(state)
    return theirs.to(model.cos.device, model.embed.weight.dtype).eval()


def as_ctranslate2(model):
    """The same weights in a CTranslate2 generator, fp32 on a CPU, by way of our export, and its
    token of each id; None if that or transformers is not installed."""
    try:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
        from transformers import logging
    except ImportError:
        return None
    logging.set_verbosity_error()

    class Converter(TransformersConverter):
        def load_model(self, *args, **kwargs):
            theirs = super().load_model(*args, **kwargs)
            theirs.lm_head.bias = model.lm_head.bias  # no Llama has one: see `end_after`
            return theirs

        def load_tokenizer(self, *args, **kwargs):
            tokenizer = super().load_tokenizer(*args, **kwargs)
            tokenizer.bos_token = tokenizer.eos_token  # CTranslate2 wants one; it is not used
            return tokenizer

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        data.load_tokenizer().save(folder)  # its vocabulary is filled up to the model's size
        converted = Converter(folder).convert(os.path.join(folder, "converted"))
        with open(os.path.join(converted, "vocabulary.json"), encoding="utf-8") as f:
            tokens = json.load(f)
        return ctranslate2.Generator(converted, compute_type="float32", inter_threads=1,
                                     intra_threads=torch.get_num_threads()), tokens


# ------------------------------------------------------------------------------------------------
# Time and memory


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
        # Memory freed earlier is given back, or using it again would not be seen.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:  # not Linux: the peak is then that of the whole process
        return 0.0
    return status("VmRSS")


def peak(device):
    """Peak memory since `reset_peak`, in MiB."""
    if str(device) != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    if os.path.exists("/proc/self/status"):
        return status("VmHWM")
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def status(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field)) / 1024


def alternate(contestants, rounds, device):
    """Runs {name: function} in turn, `rounds` times after one warm-up; each function returns the
    work it did. -> {name: [{seconds, work, peak MiB above the start} a round]}"""
    results = {name: [] for name in contestants}
    for r in range(rounds + 1):
        for name, run in contestants.items():
            before, t0 = reset_peak(device), clock(device)
            work = run()
            seconds = clock(device) - t0
            used = peak(device) - before
            if r:
                results[name].append({"seconds": seconds, "work": work, "peak": used})
    return results


def spread(values):
    """Median, least and most."""
    return [float(f"{x:.4g}") for x in (statistics.median(values), min(values), max(values))]


def rates(rounds):
    """Work a second of each round."""
    return [r["work"] / r["seconds"] for r in rounds]


def ratio(ours, theirs):
    """Work a second, ours over theirs, round by round."""
    return spread([a / b for a, b in zip(rates(ours), rates(theirs), strict=True)])


# ------------------------------------------------------------------------------------------------
# What the machine can do at most


def matmul_rate(rows, cfg, dtype, device):
    """FLOP/s of the MLP's matrix product for `rows` rows, torch's own or oneDNN's: what this
    machine gives at best for such a shape."""
    a = torch.randn(rows, cfg.n_embd, device=device, dtype=dtype)
    w = torch.randn(cfg.mlp_dim, cfg.n_embd, device=device, dtype=dtype)
    flops, rates = 2 * rows * cfg.n_embd * cfg.mlp_dim, []
    for _ in range(5):
        for product in (F.linear, onednn):
            try:
                product(a, w)
            except (AttributeError, RuntimeError, NotImplementedError):  # see model.onednn_pays
                continue
            t0, n = clock(device), 0
            while clock(device) - t0 < 0.1:
                for _ in range(20):
                    product(a, w)
                n += 20
            rates.append(n * flops / (clock(device) - t0))
    return max(rates)


def onednn(a, w):
    return torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], "")


def copy_rate(device, floats=2**28):
    """Bytes read plus written a second by a large copy on the device."""
    a = torch.zeros(floats, device=device)
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
    mlp = 3 * cfg.n_embd * cfg.mlp_dim
    return cfg.n_layer * (attention + mlp) + cfg.n_embd * cfg.vocab_size


def report(**fields):
    print(json.dumps(fields), flush=True)
