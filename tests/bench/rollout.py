"""How fast sampling is: new tokens a second, peak memory, share of the machine's limit; one JSON
line a case.

    taskset -c 0 python tests/bench/rollout.py --threads=1
    python tests/bench/rollout.py --shape=qwen1.5b --device=cuda --dtype=bfloat16

With transformers installed its `generate` does the same work in turn with ours, and so does
CTranslate2, a C++ engine, if it is installed, too; the ratios are printed.
"""
import torch
from common import (
    END,
    PROMPT_LEN,
    SHAPES,
    alternate,
    arguments,
    as_ctranslate2,
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
    case = {"bench": "rollout", "shape": shape, "lengths": lengths}

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
    if not args.alone and (args.device, dtype) == ("cpu", torch.float32):
        engine = as_ctranslate2(model)
        if engine is None:
            report(**case, skipped="ctranslate2 or transformers is not installed")
        else:
            contestants["ctranslate2"] = ctranslate2_run(*engine, lists, args.group, new_tokens)
    with torch.no_grad():
        results = alternate(contestants, args.rounds, args.device)
    most = limit(args, cfg, dtype, results["ours"][0]["work"], total)
    for name, rounds in results.items():
        speed = spread(rates(rounds))
        report(**case, who=name, dtype=args.dtype, device=args.device,
               threads=torch.get_num_threads(), tokens_per_s=speed,
               peak_mib=round(max(r["peak"] for r in rounds)),
               share_of_limit=[round(rate / most, 3) for rate in speed])
    for name in list(results)[1:]:
        report(**case, **{f"ours_over_{name}": ratio(results["ours"], results[name])})


def ctranslate2_run(generator, tokens, prompts, group, new_tokens):
    """A function that samples with CTranslate2. Lengths come about as for the others: its head has
    the same bias, and drops from its batch whatever has ended."""
    prompts = [[tokens[i] for i in ids] for ids in prompts]

    def run():
        out = generator.generate_batch(
            prompts, num_hypotheses=group, sampling_topk=0, sampling_topp=1,
            sampling_temperature=1, max_length=new_tokens, end_token=[END], return_end_token=True,
            include_prompt_in_result=False)
        return sum(len(ids) for result in out for ids in result.sequences_ids)

    return run


def useful(completions):
    """Tokens up to the first end token, it included."""
    is_end = (completions == END).int()
    return int((is_end.cumsum(1) - is_end == 0).sum())


def limit(args, cfg, dtype, work, rows):
    """Tokens a second that the machine could sample at most. CPU: the rate of a matrix product over
    the FLOPs of a token. GPU: the rate of a copy over the weights and cache that a step reads."""
    mean_columns = PROMPT_LEN + work / rows / 2
    if args.device == "cpu":
        attention = 4 * cfg.n_layer * cfg.n_head * cfg.d_head * mean_columns
        flops = 2 * matrix_params(cfg) + attention
        return matmul_rate(rows, cfg, dtype, args.device) / flops
    size = torch.finfo(dtype).bits // 8
    cache = rows * mean_columns * 2 * cfg.n_layer * cfg.n_kv_head * cfg.d_head
    return rows * copy_rate(args.device) / ((matrix_params(cfg) + cache) * size)


if __name__ == "__main__":
    main()
