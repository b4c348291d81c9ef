"""Masking against its definition: 15 % of the tokens, runs of n words with p(n) ~ 1/n, 80/10/10, whole words whole.

Sources of the numbers: Devlin et al. 2018, section 3.1; Lan et al. 2019, section 4.1: for n up to 3 the shares are
(1/n) / (1 + 1/2 + 1/3) = 6/11, 3/11, 2/11.
"""

from collections import Counter

import numpy as np
import pytest

from megatron_bert.data.masking import IGNORED, Masker, choose_spans
from megatron_bert.data.randomness import Purpose, generator

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [f"w{at}" for at in range(60)] + [f"##p{at}" for at in range(40)]
VOCABULARY = {token: at for at, token in enumerate([*SPECIAL, *PIECES])}
CLS, SEP, MASK = 2, 3, 4


def masker(**options: float | bool) -> Masker:
    return Masker.of_vocabulary(VOCABULARY, SPECIAL, "[MASK]", **options)  # type: ignore[arg-type]


def row(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """[CLS] A [SEP] B [SEP] with words of 1 to a few pieces."""
    body = np.where(rng.random(tokens) < 0.7, rng.integers(5, 65, tokens), rng.integers(65, 105, tokens))
    body[0] = body[tokens // 2] = 7
    return np.concatenate([[CLS], body[: tokens // 2], [SEP], body[tokens // 2 :], [SEP]])


@pytest.mark.parametrize("tokens", [61, 509])
def test_shares(tokens: int) -> None:
    """Over at least 100,000 masked positions: 15 % within 0.2, 80/10/10 within 0.5 points."""
    chosen = ordinary = 0
    fates: Counter[str] = Counter()
    mask = masker()
    for at in range(100_000 * 7 // tokens):
        rng = generator(1, Purpose.SAMPLE, 0, at)
        ids = row(rng, tokens)
        seen, labels = mask.mask(ids, rng)
        picked = labels != IGNORED
        assert (labels[picked] == ids[picked]).all()
        assert (seen[~picked] == ids[~picked]).all()
        assert not np.isin(ids[picked], range(5)).any()
        chosen, ordinary = chosen + int(picked.sum()), ordinary + tokens
        replaced = seen[picked]
        masked, kept = replaced == MASK, replaced == ids[picked]
        fates.update({"mask": int(masked.sum()), "keep": int(kept.sum()), "other": int((~masked & ~kept).sum())})
        assert (replaced[~masked] >= len(SPECIAL)).all()
    assert chosen >= 100_000
    assert chosen / ordinary == pytest.approx(0.15, abs=0.002)
    assert fates["mask"] / chosen == pytest.approx(0.8, abs=0.005)
    by_chance = 0.1 / len(PIECES)  # another token drawn at random may be the same one
    assert fates["keep"] / chosen == pytest.approx(0.1 + by_chance, abs=0.005)
    assert fates["other"] / chosen == pytest.approx(0.1 - by_chance, abs=0.005)


@pytest.mark.parametrize(("mask_prob", "random_prob"), [(1.0, 0.0), (0.5, 0.25)])
def test_other_fates(mask_prob: float, random_prob: float) -> None:
    fates: Counter[str] = Counter()
    mask = masker(mask_replace_prob=mask_prob, random_replace_prob=random_prob)
    for at in range(500):
        rng = generator(6, Purpose.SAMPLE, 0, at)
        ids = row(rng, 60)
        seen, labels = mask.mask(ids, rng)
        replaced, kept = seen[labels != IGNORED] == MASK, seen[labels != IGNORED] == ids[labels != IGNORED]
        fates.update({"mask": int(replaced.sum()), "keep": int(kept.sum()), "all": len(kept)})
    by_chance = random_prob / len(PIECES)
    assert fates["mask"] / fates["all"] == pytest.approx(mask_prob, abs=0.02)
    assert fates["keep"] / fates["all"] == pytest.approx(1 - mask_prob - random_prob + by_chance, abs=0.02)


@pytest.mark.parametrize("words", [40, 370])
@pytest.mark.parametrize("longest", [1, 3])
def test_runs_of_words(words: int, longest: int) -> None:
    """The shares of run lengths within 1 point, the expected number of tokens within 1 %, no word twice."""
    runs: Counter[int] = Counter()
    chosen = budget = 0.0
    for at in range(60_000 // words * 2):
        rng = generator(2, Purpose.SAMPLE, 0, at)
        lengths = rng.choice([1, 1, 1, 2, 3], words)
        blocked = np.zeros(words, bool)
        blocked[[0, words // 2, words - 1]] = True
        spans = choose_spans(lengths, blocked, 0.15 * lengths[~blocked].sum(), longest, rng)
        taken = [word for start, count in spans for word in range(start, start + count)]
        assert len(taken) == len(set(taken))
        assert not blocked[taken].any()
        runs.update(count for _, count in spans)
        chosen, budget = chosen + lengths[taken].sum(), budget + 0.15 * lengths[~blocked].sum()
    total = sum(1 / n for n in range(1, longest + 1))
    for n in range(1, longest + 1):
        assert runs[n] / runs.total() == pytest.approx(1 / n / total, abs=0.01)
    assert chosen / budget == pytest.approx(1, abs=0.01)


def test_whole_words_stay_whole() -> None:
    mask = masker()
    for at in range(500):
        rng = generator(3, Purpose.SAMPLE, 0, at)
        ids = row(rng, 60)
        picked = mask.mask(ids, rng).labels != IGNORED
        continues = np.isin(ids, range(65, 105))
        continues[1:] &= ~np.isin(ids[:-1], [CLS, SEP])
        assert (picked[1:][continues[1:]] == picked[:-1][continues[1:]]).all()


def test_single_tokens() -> None:
    """Without whole words, and one at a time, each token is masked 15 % of the time whatever stands beside it."""
    mask = masker(whole_words=False, max_words=1)
    chosen = both = pairs = 0
    for at in range(2000):
        rng = generator(5, Purpose.SAMPLE, 0, at)
        ids = row(rng, 60)
        picked = mask.mask(ids, rng).labels != IGNORED
        continues = np.isin(ids[1:], range(65, 105)) & ~np.isin(ids[:-1], [CLS, SEP])
        chosen, pairs = chosen + int(picked[1:][continues].sum()), pairs + int(continues.sum())
        both += int((picked[1:] & picked[:-1])[continues].sum())
    assert chosen / pairs == pytest.approx(0.15, abs=0.01)
    # two tokens drawn without replacement: 0.15 * (9 - 1) / (60 - 1) for 9 of 60
    assert both / pairs == pytest.approx(0.15 * 8 / 59, abs=0.003)


@pytest.mark.parametrize("ids", [[CLS, SEP], [CLS, 7, SEP], [CLS, SEP, 7, SEP], [CLS, 70, 71, SEP]])
def test_tiny_rows_end(ids: list[int]) -> None:
    for at in range(200):
        seen, labels = masker(share=0.9).mask(np.array(ids), generator(4, Purpose.SAMPLE, 0, at))
        assert len(seen) == len(labels) == len(ids)
        assert (labels[np.isin(ids, range(5))] == IGNORED).all()


def test_streams_depend_on_every_part_of_the_key() -> None:
    draws = {
        generator(seed, purpose, epoch, index).integers(2**63)
        for seed in (0, 1, 2**63 - 1)
        for purpose in Purpose
        for epoch in (0, 1, 1000)
        for index in (0, 1, 10**12)
    }
    assert len(draws) == 3 * len(Purpose) * 3 * 3
    assert generator(5, Purpose.ORDER, 6, 7).random() == generator(5, Purpose.ORDER, 6, 7).random()
