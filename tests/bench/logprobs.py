"""What the log-probs of a large vocabulary cost: 8 x 512 tokens, 151,936 words, forward and backward; JSON lines.

    taskset -c 0 python tests/bench/logprobs.py --threads=1

With transformers and trl installed, TRL's fused head does the same in turn with ours, and the ratio is printed.
"""
import argparse

import torch

from common import alternate, as_transformers, build, ratio, report, spread
from model import token_logps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0 = one a core")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", action="store_true", help="do not run TRL beside")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
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
