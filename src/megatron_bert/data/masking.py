"""Which tokens a masked language model has to predict, and what stands in their place.

Whole words in runs of 1 to 3 words, a run of n words with probability proportional to 1/n; 15 % of the tokens; of the
chosen tokens 80 % become [MASK] (the task itself), 10 % another token and 10 % stay (so that the model cannot take an
unmasked token for right: at fine-tuning there is no [MASK]). These are the defaults. Sources: Devlin et al. 2018 (arXiv
1810.04805, section 3.1), the whole-word note of their repository, and for the runs Lan et al. 2019 (arXiv 1909.11942,
section 4.1).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["IGNORED", "Masked", "Masker", "WordSegmenter", "choose_spans"]

IGNORED = -100  # the label of a token that is not to be predicted (PyTorch's cross-entropy skips it)
_TRIES = 32  # to find room for a run before the row counts as full

IntArray = npt.NDArray[np.int64]


class Masked(NamedTuple):
    """A row to train on: what the model sees and what it should say; both int64 [S]."""

    input_ids: IntArray
    labels: IntArray


class WordSegmenter(Protocol):
    """Finds words of several tokens that the tokens' spelling does not show (see `data/segmentation.py`)."""

    def continuations(self, ids: IntArray) -> npt.NDArray[np.bool_]:
        """bool [S]: which tokens of the row continue the word of the token before."""


@dataclass(frozen=True)
class Masker:
    """Masks rows of token ids.

    Attributes:
        share: expected share of the row's ordinary tokens that are chosen.
        max_words: longest run of words.
        mask_id: the id of [MASK].
        continues: bool [V], which ids continue a word ("##ing").
        special: bool [V], which ids are special tokens: never chosen, never drawn.
        ordinary_ids: the ids that a chosen token may be replaced with.
        segmenter: for languages written without spaces.
        mask_replace_prob, random_replace_prob: of the chosen tokens, those that become [MASK] and those that become
            another token; the rest stays.
    """

    share: float
    max_words: int
    mask_id: int
    continues: npt.NDArray[np.bool_]
    special: npt.NDArray[np.bool_]
    ordinary_ids: IntArray
    segmenter: WordSegmenter | None = None
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1

    @classmethod
    def of_vocabulary(
        cls,
        vocabulary: dict[str, int],
        special_tokens: list[str],
        mask_token: str,
        *,
        share: float = 0.15,
        max_words: int = 3,
        whole_words: bool = True,
        segmenter: WordSegmenter | None = None,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
    ) -> Masker:
        """The masker for a WordPiece vocabulary (`token -> id`). Without `whole_words` every token is a word of its
        own, as in the first BERT (arXiv 1810.04805, section 3.1)."""
        size = max(vocabulary.values()) + 1
        continues, special = np.zeros(size, bool), np.ones(size, bool)
        for token, token_id in vocabulary.items():
            continues[token_id] = whole_words and token.startswith("##") and len(token) > 2
            special[token_id] = token in special_tokens
        return cls(
            share, max_words, vocabulary[mask_token], continues, special, np.flatnonzero(~special), segmenter,
            mask_replace_prob, random_replace_prob,
        )  # fmt: skip

    def mask(self, ids: npt.NDArray[Any], rng: np.random.Generator) -> Masked:
        """Masks one row; special tokens and the two sides of one stay apart."""
        ids = ids.astype(np.int64)
        blocked_token = self.special[ids]
        continues = self.continues[ids]
        if self.segmenter:
            continues |= self.segmenter.continuations(ids)
        starts_word = ~continues | blocked_token
        starts_word[1:] |= blocked_token[:-1]  # a continuation that truncation left first is a word of its own
        starts_word[:1] = True
        word_starts = np.flatnonzero(starts_word)
        word_lengths = np.concatenate((word_starts[1:], [len(ids)])) - word_starts
        spans = choose_spans(
            word_lengths,
            blocked_token[word_starts],
            self.share * (len(ids) - int(np.count_nonzero(blocked_token))),
            self.max_words,
            rng,
        )
        chosen = np.zeros(len(word_starts), bool)
        for start, words in spans:
            chosen[start : start + words] = True
        positions = np.flatnonzero(np.repeat(chosen, word_lengths))
        labels = np.full(len(ids), IGNORED, np.int64)
        labels[positions] = ids[positions]
        fate = rng.random(len(positions))
        ids[positions[fate < self.mask_replace_prob]] = self.mask_id
        random_positions = positions[fate >= 1 - self.random_replace_prob]
        ids[random_positions] = self.ordinary_ids[rng.integers(len(self.ordinary_ids), size=len(random_positions))]
        return Masked(ids, labels)


def choose_spans(
    word_lengths: IntArray, blocked: npt.NDArray[np.bool_], budget: float, max_words: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Runs of words that do not overlap: (first word, number of words) each.

    The number of words n is drawn first, with p(n) = (1/n) / (1 + 1/2 + 1/3); then a place where it fits. Before each
    run, one more is drawn with probability r / (r + o(r)), where r is what is left of the budget and o(r) the expected
    excess over r of a run's length in tokens. Then the expected number of chosen tokens equals the budget: with
    V(r) = E[chosen - r] to be 0 for every r > 0, stopping (worth -r) and drawing (worth o(r)) have to balance. And
    since no decision looks at the run that it decides about, the drawn n keep their distribution (Wald's identity).

    Args:
        word_lengths: int [W], tokens of each word.
        blocked: bool [W], words that may not be chosen (special tokens).
        budget: the expected number of tokens to choose.
    """
    ends = np.concatenate(([0], word_lengths.cumsum()))
    places = {n: place for n in range(1, max_words + 1) if len(place := _free_places(blocked, n))}
    if not places:
        return []
    odds = np.array([1 / n for n in places])
    odds /= odds.sum()
    chances = odds.cumsum().tolist()
    excess = _Excess(odds, [ends[place + n] - ends[place] for n, place in places.items()])
    kinds, ends_list = list(places), ends.tolist()
    taken = bytearray(blocked.tobytes())
    uniforms = _uniforms(rng, 8 + 2 * int(budget))
    spans: list[tuple[int, int]] = []
    left = budget
    while left > 0:
        if next(uniforms) * (left + excess.over(left)) >= left:
            break
        words = kinds[min(bisect_right(chances, next(uniforms)), len(kinds) - 1)]
        start = _place(places[words], words, taken, uniforms)
        if start is None:
            break
        taken[start : start + words] = b"\1" * words
        spans.append((start, words))
        left -= ends_list[start + words] - ends_list[start]
    return spans


def _uniforms(rng: np.random.Generator, num: int) -> Iterator[float]:
    """Draws from [0, 1), without end, `num` at a time: a call for each costs more than what is done with it."""
    while True:
        yield from rng.random(num).tolist()


class _Excess:
    """E[max(L - r, 0)] for the length L in tokens of a run drawn at random, any r >= 0.

    Between two whole numbers it is linear in r: E[L; L > r] - r P[L > r].
    """

    def __init__(self, odds: npt.NDArray[np.float64], lengths: Sequence[IntArray]) -> None:
        longest = max(int(length.max()) for length in lengths)
        share = np.zeros(longest + 1)
        for odd, length in zip(odds, lengths, strict=True):
            share += odd / len(length) * np.bincount(length, minlength=longest + 1)
        above = np.cumsum(share[::-1])[::-1]
        length_above = np.cumsum((share * np.arange(longest + 1))[::-1])[::-1]
        self._above, self._length_above = above[1:].tolist(), length_above[1:].tolist()

    def over(self, left: float) -> float:
        """The expected excess over `left` tokens."""
        whole = int(left)
        return self._length_above[whole] - left * self._above[whole] if whole < len(self._above) else 0.0


def _free_places(blocked: npt.NDArray[np.bool_], words: int) -> IntArray:
    """Where a run of `words` words may start without touching a blocked one."""
    free = ~blocked
    num = max(len(free) - words + 1, 0)
    together = free[:num].copy()
    for word in range(1, words):
        together &= free[word : word + num]
    return np.flatnonzero(together)


def _place(places: IntArray, words: int, taken: bytearray, uniforms: Iterator[float]) -> int | None:
    for _ in range(_TRIES):
        start = int(places[int(next(uniforms) * len(places))])
        if taken.find(1, start, start + words) < 0:
            return start
    return None
