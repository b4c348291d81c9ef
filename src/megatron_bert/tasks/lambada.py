"""LAMBADA: whether a model predicts a passage's last word, all pieces of it (arXiv 1909.08053, appendix E.2: strict).

A causal model has to rank each piece first under teacher forcing; a masked one sees as many masks as the word has
pieces, and has to rank each piece first at its mask (so it is told the number of pieces: not the same measure).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_bert.errors import UserError
from megatron_bert.tasks.reading import read_text, suffix_of
from megatron_bert.tasks.scoring import Request, Score, TokenScorer

__all__ = ["Lambada"]


class Lambada:
    """The protocol on one file: the raw variant (one passage a line) or the detokenised one (JSON lines, `text`).

    Raises:
        UserError: an empty file, or a line that is not a passage of two words at least.
    """

    def __init__(self, file: Path, scorer: TokenScorer) -> None:
        self._scorer = scorer
        self.variant = "detokenised" if suffix_of(file) == ".jsonl" else "raw"
        self.settings = {"variant": self.variant}
        passages = _passages(file, self.variant)
        parted = [_context_and_word(passage, where) for passage, where in passages]
        if not parted:
            raise UserError(f"{file} is empty: one passage a line is expected")
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        self._words = [word for _, word in parted]
        self._contexts: list[list[int]] = scorer.tokenizer([context for context, _ in parted], **options)["input_ids"]
        self._pieces: list[list[int]] = scorer.tokenizer(self._words, **options)["input_ids"]
        for pieces, (_, word), (_, where) in zip(self._pieces, parted, passages, strict=True):
            if not 0 < len(pieces) <= scorer.max_tokens - 2:
                raise UserError(f"{where}: the last word {word!r} has {len(pieces)} pieces, which cannot be scored")

    def __len__(self) -> int:
        return len(self._words)

    def requests(self, item: int) -> list[Request]:
        """One row: the passage and its last word's pieces."""
        return [self._scorer.context(self._contexts[item], self._pieces[item])]

    def record(self, item: int, scores: Sequence[Score]) -> dict[str, Any]:
        """The line of a passage in the predictions file."""
        (score,) = scores
        predicted = self._scorer.tokenizer.decode(list(score.best))
        correct = list(score.best) == self._pieces[item]
        return {"word": self._words[item], "predicted": predicted, "correct": correct,
                "log_likelihood": score.log_likelihood}  # fmt: skip

    def result(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The figures of all passages' lines."""
        hits = sum(record["correct"] for record in records)
        protocol = "teacher_forced" if self._scorer.causal else "one_mask_a_piece"
        total = math.fsum(record["log_likelihood"] for record in records)
        return {"accuracy": hits / len(records), "correct": hits, "passages": len(records), "protocol": protocol,
                "variant": self.variant, "log_likelihood": total}  # fmt: skip


def _passages(file: Path, variant: str) -> list[tuple[str, str]]:
    lines = [(line, f"{file}, line {at}") for at, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
    return lines if variant == "raw" else [(_text(line, where), where) for line, where in lines]


def _text(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UserError(f'{where}: an object with a "text" is expected')
    return str(value["text"])


def _context_and_word(passage: str, where: str) -> tuple[str, str]:
    parts = passage.strip().rsplit(maxsplit=1)
    if len(parts) < 2:
        raise UserError(f"{where}: a passage of two words at least is expected")
    return parts[0], parts[1]
