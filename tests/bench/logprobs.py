"""What the log-probs of a large vocabulary cost: 8 x 512 tokens, 151,936 words, forward and
backward; JSON lines.

    taskset -c 0 python tests/bench/logprobs.py --threads=1

With transformers and trl installed, TRL does the same in turn with ours in both of its ways, from
all logits at once and by its fused head, and the ratios are printed.
"""
import torch
from common import alternate, arguments, as_transformers, build, ratio, report, spread

from model import token_logps


def main():
    args = arguments(__doc__, 3, vocab=(151936, "words"), rows=(8, "sequences"),
                     length=(512, "tokens of each"))
    model = build("tiny", vocab_size=args.vocab, device=args.device)
    tokens = torch.randint(0, args.vocab, (args.rows, args.length), device=args.device)
    theirs = None if args.alone else as_transformers(model)
    # A model's own memory is weights and gradients: both are there before the clock starts.
    for m in (model, theirs):
        for p in m.parameters() if m is not None else ():
            p.grad = torch.zeros_like(p)

    def backward(logp):
        logp.mean().backward()
        return tokens.numel()

    contestants = {"ours": lambda: backward(token_logps(model, tokens)),
                   "trunk alone": lambda: backward(model.hidden(tokens[:, :-1]))}
    if theirs is not None:
        contestants |= trl_contestants(theirs, tokens, backward)
    results = alternate(contestants, args.rounds, args.device)
    for name, rounds in results.items():
        report(bench="logprobs", who=name, vocab=args.vocab, device=args.device,
               threads=torch.get_num_threads(), seconds=spread([r["seconds"] for r in rounds]),
               peak_mib=round(max(r["peak"] for r in rounds)))
    for name in results:
        if name.startswith("trl"):
            report(bench="logprobs", ours_over=name, ratio=ratio(results["ours"], results[name]))


def trl_contestants(theirs, tokens, backward):
    """TRL's two ways to compute log-probs; none if trl is not installed."""
    try:
        from trl.trainer.utils import add_fused_lm_head, selective_log_softmax
    except ImportError:
        return {}
    forward = theirs.forward  # as it is before its head is replaced
    add_fused_lm_head(theirs)

    def all_logits():
        logits = forward(tokens).logits[:, :-1]
        return backward(selective_log_softmax(logits, tokens[:, 1:]))

    def fused():
        return backward(theirs(tokens, labels=tokens, fused_lm_head=True).log_probs)

    return {"trl, all logits": all_logits, "trl, fused": fused}


if __name__ == "__main__":
    main()
