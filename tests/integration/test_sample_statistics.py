"""Masks and pairs over at least 100,000 masked positions of real text, against their definitions.

15 % of the tokens, and of those 80 % [MASK], 10 % another token, 10 % as they are (Devlin et al. 2018, section 3.1);
runs of n words with p(n) ~ 1/n (Lan et al. 2019, section 4.1): 6/11, 3/11, 2/11 for n up to 3; pairs half and half.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megatron_bert.data.masking
from megatron_bert.data.batches import BatchLayout, Position, StepPlanner
from megatron_bert.data.masking import IGNORED, choose_spans
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.training.configuration import PretrainConfiguration
from megatron_bert.training.corpus import Corpus, open_corpus
from tests.integration.real_text import CHINESE, ENGLISH, REFERENCE, RealText

ROW_TOKENS = 512


@dataclass(frozen=True)
class Prepared:
    """A text and where its token file lies."""

    text: RealText
    folder: Path

    def open(self, **objective: str) -> Corpus:
        """Its samples for an objective."""
        configuration = PretrainConfiguration.model_validate({
            "output": "unused",
            "model": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1},
            "data": {"tokens": self.folder / "text", "tokenizer": self.folder / "tokenizer", "validation_share": 0.0,
                     "row_tokens": ROW_TOKENS},
            "objective": {"chinese_segmenter": self.text.segmenter, **objective},
            "optimizer": {"learning_rate": 1.0},
            "training": {"steps": 1, "batch_samples": 1},
        })  # fmt: skip
        return open_corpus(configuration, load_tokenizer(self.folder / "tokenizer"))


@pytest.fixture(scope="module", params=[REFERENCE, ENGLISH, CHINESE], ids=lambda text: text.name)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    if request.param.segmenter == "jieba":
        pytest.importorskip("rjieba")
    folder = tmp_path_factory.mktemp(request.param.name)
    request.param.prepare(folder)
    return Prepared(request.param, folder)


def test_masks(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = prepared.open()
    tokenizer = load_tokenizer(prepared.folder / "tokenizer")
    spans: list[int] = []

    def recorded(*arguments: Any) -> list[tuple[int, int]]:
        chosen = choose_spans(*arguments)
        spans.extend(words for _, words in chosen)
        return chosen

    monkeypatch.setattr(megatron_bert.data.masking, "choose_spans", recorded)
    special = np.array(tokenizer.all_special_ids)
    masker = corpus.training.builders[0]._masker  # type: ignore[attr-defined]
    chosen = ordinary = epoch = 0
    fates: Counter[str] = Counter()
    while chosen < 100_000:
        index = corpus.training.blend.index(0, epoch)
        for at in range(len(index)):
            sample = corpus.training.builders[0].build(index.plan(at))
            picked = sample.labels != IGNORED
            row = np.where(picked, sample.labels, sample.input_ids)
            seen, truth = sample.input_ids[picked], sample.labels[picked]
            chosen, ordinary = chosen + int(picked.sum()), ordinary + int((~np.isin(row, special)).sum())
            masked, kept = seen == tokenizer.mask_token_id, seen == truth
            fates.update(mask=int(masked.sum()), keep=int(kept.sum()), other=int((~masked & ~kept).sum()))
            assert not np.isin(truth, special).any()
            assert_whole(row, picked, masker, special)
        epoch += 1
    assert chosen / ordinary == pytest.approx(0.15, abs=0.002)
    for fate, share in {"mask": 0.8, "keep": 0.1, "other": 0.1}.items():
        assert fates[fate] / chosen == pytest.approx(share, abs=0.005)
    runs = np.bincount(spans, minlength=4) / len(spans)
    assert runs[1:] == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.01)


def assert_whole(row: np.ndarray, picked: np.ndarray, masker: Any, special: np.ndarray) -> None:
    """Every word is masked as a whole or not at all; words as the vocabulary and the segmenter have them."""
    continues = masker.continues[row]
    if masker.segmenter:
        continues = continues | masker.segmenter.continuations(row)
    continues[1:] &= ~np.isin(row[:-1], special)  # truncation left the word's beginning outside
    assert (picked[1:] == picked[:-1])[continues[1:]].all()


@pytest.mark.parametrize("pair", ["sentence-order", "next-sentence"])
def test_pairs_are_half_and_half(prepared: Prepared, pair: str) -> None:
    corpus = prepared.open(pair=pair)
    labels = np.zeros(2, int)
    epoch = 0
    while labels.sum() < 100_000:
        index: Any = corpus.training.blend.index(0, epoch)
        labels += np.bincount(index.labels[index.labels != IGNORED], minlength=2)
        epoch += 1
    assert labels / labels.sum() == pytest.approx([0.5, 0.5], abs=0.005)


def test_packed_rows_are_full(prepared: Prepared) -> None:
    """At least 98 % of the tokens in the rows that steps take; all of it, counted by hand."""
    corpus = prepared.open()
    layout = BatchLayout(256, 8, packing=True)
    used, computed = StepPlanner(corpus.training.blend, layout, ROW_TOKENS).fill_rates()
    assert used >= 0.98
    real = padded = 0
    steps = corpus.steps(corpus.best_layout(layout), Position(), num_workers=0, pin=False)
    for _ in range(2):
        for batch in next(steps).micro_batches:
            real, padded = real + int((batch["input_ids"] != corpus.pad_id).sum()), padded + batch["input_ids"].numel()
    assert real / padded == pytest.approx(computed, abs=0.03)
    assert real / padded > 0.93
