"""WikiText103: perplexity per original token, exp(-(1/T_o) sum log p) (arXiv 1909.08053, appendix E.1).

The tokenised file is detokenised (invertibly), encoded as one text, and read in windows that overlap; only a window's
new tokens count. Causal models give log-likelihoods, masked ones pseudo-log-likelihoods: each token masked alone
(Salazar et al. 2020, arXiv 1910.14659, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_bert.errors import UserError
from megatron_bert.tasks.detokenization import Detokenizer, num_original_tokens
from megatron_bert.tasks.reading import read_text
from megatron_bert.tasks.scoring import Request, Score, TokenScorer

__all__ = ["WikiText103", "windows"]


def windows(num_tokens: int, size: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first new, end) of windows of at most `size` tokens; each begins `overlap` before its first new token."""
    first = 0
    while first < num_tokens:
        begin = max(first - overlap, 0)
        end = min(begin + size, num_tokens)
        yield begin, first, end
        first = end


class WikiText103:
    """The protocol on one file of tokens.

    Args:
        window_tokens: tokens of text in a window; None: as many as the model takes.
        overlap_tokens: of them seen before; None: half.

    Raises:
        UserError: an empty file, a window that the model does not take, an overlap that leaves nothing new.
    """

    def __init__(self, file: Path, scorer: TokenScorer, window_tokens: int | None, overlap_tokens: int | None) -> None:
        text = read_text(file)
        self._scorer, most = scorer, scorer.max_tokens - (0 if scorer.causal else 2)
        size = most if window_tokens is None else window_tokens
        overlap = size // 2 if overlap_tokens is None else overlap_tokens
        if size > most:
            raise UserError(f"--window {size}: the model takes {most} tokens of text at a time")
        if overlap >= size:
            raise UserError(f"--overlap {overlap} leaves no new token in a window of {size}: use less")
        if not text.strip():
            raise UserError(f"{file} is empty: WikiText's tokens, parted by spaces, are expected")
        self.num_original = num_original_tokens(text)
        plain = Detokenizer(text).detokenize(text)
        self._ids: list[int] = scorer.tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]
        self._windows = list(windows(len(self._ids), size, overlap))
        self.settings = {"window": size, "overlap": overlap}

    def __len__(self) -> int:
        return len(self._windows)

    def requests(self, item: int) -> list[Request]:
        """Of one window: one row with all new tokens (causal), or one row for each of them (masked)."""
        begin, first, end = self._windows[item]
        ids = self._ids[begin:end]
        if self._scorer.causal:
            return [self._scorer.context(ids[: first - begin], ids[first - begin :])]
        tokenizer = self._scorer.tokenizer
        row = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
        masked = [
            (at, [*row[:at], tokenizer.mask_token_id, *row[at + 1 :]]) for at in range(first - begin + 1, len(row) - 1)
        ]
        return [Request(tuple(ids_), (at,), (row[at],)) for at, ids_ in masked]

    def record(self, item: int, scores: Sequence[Score]) -> dict[str, Any]:
        """The line of a window in the predictions file."""
        _, first, end = self._windows[item]
        return {"log_likelihood": math.fsum(score.log_likelihood for score in scores), "tokens": end - first}

    def result(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The figures of all windows' lines."""
        total = math.fsum(record["log_likelihood"] for record in records)
        kind = "perplexity" if self._scorer.causal else "pseudo_perplexity"
        likelihood = "log_likelihood" if self._scorer.causal else "pseudo_log_likelihood"
        mean = -total / self.num_original
        return {
            kind: math.exp(mean) if mean < 700 else math.inf,
            likelihood: total,
            "original_tokens": self.num_original,
            "model_tokens": len(self._ids),
        }
