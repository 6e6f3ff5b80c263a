"""How fast sampling is: new tokens a second, peak memory, share of the machine's limit; one JSON
line a case.

    taskset -c 0 python tests/bench/rollout.py --threads=1
    python tests/bench/rollout.py --shape=qwen1.5b --device=cuda --dtype=bfloat16

With transformers installed its `generate` does the same work in turn with ours, and the ratio is
printed.
"""
import torch
from common import (
    END,
    PROMPT_LEN,
    SHAPES,
    alternate,
    arguments,
    as_transformers,
    build,
    copy_rate,
    end_after,
    matmul_rate,
    matrix_params,
    random_prompts,
    rates,
    ratio,
    report,
    spread,
)

from model import generate


def main():
    args = arguments(
        __doc__, 5, shape=("tiny,medium", f"some of {', '.join(SHAPES)}"),
        prompts=(16, f"prompts of {PROMPT_LEN} tokens"), group=(8, "samples of each"),
        lengths=("even,uneven", "even: 128 new tokens each; uneven: geometric, mean 40, at most "
                 "256"), dtype=("float32", "or bfloat16"))
    for shape in args.shape.split(","):
        for lengths in args.lengths.split(","):
            run(args, shape, lengths)


def run(args, shape, lengths):
    dtype = getattr(torch, args.dtype)
    new_tokens, mean = (128, None) if lengths == "even" else (256, 40)
    model = end_after(build(shape, dtype, args.device), mean)
    cfg, total = model.cfg, args.prompts * args.group
    prompts, generator = random_prompts(args.prompts, model.cfg), torch.Generator().manual_seed(2)
    lists, inputs = prompts.tolist(), prompts.to(args.device)
    theirs = None if args.alone else as_transformers(model)

    def run_ours():
        out = generate(model, lists, args.group, new_tokens, stop_ids=(END,), generator=generator)
        return sum(len(completion.ids) for completion in out)

    def run_theirs():
        out = theirs.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, num_return_sequences=args.group, max_new_tokens=new_tokens,
            eos_token_id=END, pad_token_id=END)
        return useful(out[:, PROMPT_LEN:])

    contestants = {"ours": run_ours}
    if theirs is not None:
        contestants["transformers"] = run_theirs
    with torch.no_grad():
        results = alternate(contestants, args.rounds, args.device)
    case = {"bench": "rollout", "shape": shape, "lengths": lengths}
    for name, rounds in results.items():
        speed, work = spread(rates(rounds)), rounds[0]["work"]
        shares = [round(share(args, cfg, dtype, work, total, rate), 3) for rate in speed]
        report(**case, who=name, dtype=args.dtype, device=args.device,
               threads=torch.get_num_threads(), tokens_per_s=speed,
               peak_mib=round(max(r["peak"] for r in rounds)), share_of_limit=shares)
    if theirs is not None:
        report(**case, ours_over_transformers=ratio(results["ours"], results["transformers"]))


def useful(completions):
    """Tokens up to the first end token, it included."""
    is_end = (completions == END).int()
    return int((is_end.cumsum(1) - is_end == 0).sum())


def share(args, cfg, dtype, work, rows, rate):
    """What `rate` tokens/s are of what the machine could do at most. CPU: the FLOPs of useful
    tokens over the rate of a matrix product. GPU: weights and cache that each step has to read,
    over the rate of a copy."""
    mean_columns = PROMPT_LEN + work / rows / 2
    if args.device == "cpu":
        attention = 4 * cfg.n_layer * cfg.n_head * cfg.d_head * mean_columns
        flops = 2 * matrix_params(cfg) + attention
        return rate * flops / matmul_rate(rows, cfg, dtype, args.device)
    size = torch.finfo(dtype).bits // 8
    cache = rows * mean_columns * 2 * cfg.n_layer * cfg.n_kv_head * cfg.d_head
    return (rate / rows) * (matrix_params(cfg) + cache) * size / copy_rate(args.device)


if __name__ == "__main__":
    main()
