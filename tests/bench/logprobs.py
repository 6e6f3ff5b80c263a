"""What the log-probs of a large vocabulary cost: 8 x 512 tokens, 151,936 words, forward and backward; JSON lines.

    taskset -c 0 python tests/bench/logprobs.py --threads=1

With transformers and trl installed, TRL's fused head does the same in turn with ours, and the ratio is printed.
"""
import torch

from common import alternate, arguments, as_transformers, build, ratio, report, spread
from model import token_logps


def main():
    args = arguments(__doc__, 3, vocab=(151936, "words"), rows=(8, "sequences"), length=(512, "tokens of each"))
    model = build("tiny", vocab_size=args.vocab, device=args.device)
    tokens = torch.randint(0, args.vocab, (args.rows, args.length), device=args.device)
    theirs = None if args.alone else as_transformers(model)
    for m in (model, theirs):
        if m is not None:  # the model's own memory is weights and gradients: both are there before the clock starts
            for p in m.parameters():
                p.grad = torch.zeros_like(p)

    def backward(logp):
        logp.mean().backward()
        return tokens.numel()

    contestants = {"ours": lambda: backward(token_logps(model, tokens)),
                   "trunk alone": lambda: backward(model.trunk(tokens[:, :-1]))}
    if theirs is not None:
        try:
            from trl.trainer.utils import add_fused_lm_head, selective_log_softmax
            plain = theirs.forward
            contestants["trl, all logits"] = lambda: backward(selective_log_softmax(plain(tokens).logits[:, :-1], tokens[:, 1:]))
            add_fused_lm_head(theirs)
            contestants["trl, fused"] = lambda: backward(theirs(tokens, labels=tokens, fused_lm_head=True).log_probs)
        except ImportError:
            pass
    results = alternate(contestants, args.rounds, args.device)
    for name, rounds in results.items():
        report(bench="logprobs", who=name, vocab=args.vocab, device=args.device, threads=torch.get_num_threads(),
               seconds=spread([r["seconds"] for r in rounds]), peak_mib=round(max(r["peak"] for r in rounds)))
    if "trl, fused" in results:
        report(bench="logprobs", ours_over_trl_fused=ratio(results["ours"], results["trl, fused"]))


if __name__ == "__main__":
    main()
