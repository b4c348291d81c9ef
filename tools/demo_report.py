"""Holds the demo's model against its own text: is its masked-LM loss below the unigram entropy?

`python tools/demo_report.py PREFIX RUN`. The unigram entropy H = -sum_v p(v) ln p(v), with p(v) the share of token v in
the token file PREFIX, is the least loss, in nats a token, of a model that ignores the context. Exit code 1 if the loss
over the held-out documents at the end of RUN is not below it.
"""

import json
import sys
from pathlib import Path

import numpy as np

from megatron_bert.data.indexed import IndexedReader


def unigram_entropy(prefix: Path) -> float:
    """H of the token file, in nats a token."""
    counts = np.bincount(IndexedReader(prefix).tokens)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def main() -> int:
    """Prints the curve, the entropy and the verdict."""
    prefix, run = map(Path, sys.argv[1:])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [(record["step"], record["masked_lm_loss"]) for record in records if record["kind"] == "validation"]
    entropy, final = unigram_entropy(prefix), curve[-1][1]
    for step, loss in curve:
        print(f"  step {step:>5}   masked-LM loss {loss:.3f}   {'#' * round(10 * loss)}")
    print(f"  unigram entropy of the text, -sum p ln p: {entropy:.3f} nats a token")
    print(f"  final masked-LM loss on held-out documents: {final:.3f}, which is {entropy - final:.3f} less")
    if final >= entropy:
        print("FAILED: the model has learnt no more than word frequencies", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
