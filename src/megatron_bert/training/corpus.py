"""A configuration's token files, checked against its tokenizer, as streams of batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from tokenizers.models import WordLevel, WordPiece
from transformers import PreTrainedTokenizerBase

from megatron_bert.data.batches import (
    BatchLayout,
    StepBatches,
    StepPlanner,
    evaluation_batches,
    training_steps,
)
from megatron_bert.data.blending import Blend, Position
from megatron_bert.data.causal import CausalBuilder, CausalIndex
from megatron_bert.data.collation import Batch, Collate, collate_causal, collate_packed, collate_padded
from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.masking import Masker
from megatron_bert.data.pairs import PairIndex
from megatron_bert.data.samples import Builder, IntArray, MaskedBuilder, Pair, SampleRules, TokenFile
from megatron_bert.data.segmentation import ChineseWords
from megatron_bert.data.split import split_documents
from megatron_bert.data.tokenization import num_rows
from megatron_bert.data.vocabulary import fingerprint
from megatron_bert.errors import UserError
from megatron_bert.training.configuration import PretrainConfiguration

__all__ = ["Corpus", "Part", "open_corpus"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """What is trained on, or what is validated on: documents of each corpus, and what makes samples of them."""

    blend: Blend[PairIndex | CausalIndex]
    builders: tuple[Builder, ...]

    def indexes(self) -> list[PairIndex | CausalIndex]:
        """The first epoch of each corpus."""
        return [self.blend.index(corpus, 0) for corpus in range(len(self.builders))]


@dataclass(frozen=True)
class Corpus:
    """What a run reads. `validation` is None where nothing is held out."""

    training: Part
    validation: Part | None
    row_tokens: int
    pad_id: int
    causal: bool = False

    def best_layout(self, layout: BatchLayout) -> BatchLayout:
        """The layout; with packing, `micro_samples` is lowered to the rows that leave the least to padding.

        Raises:
            UserError: the samples of a step cannot be shared equally.
        """
        return self._planner(self.training, layout).best_layout()

    def steps(
        self, layout: BatchLayout, start: Position, *, num_workers: int, pin: bool
    ) -> Generator[StepBatches, None, None]:
        """This rank's training steps from `start` on, without end; `close` ends the workers.

        Args:
            num_workers: processes that make samples; 0: this one.
            pin: put batches into page-locked memory.

        Raises:
            UserError: the samples of a step cannot be shared equally, or `start` is of another number of corpora.
        """
        return training_steps(
            self._planner(self.training, layout), self.training.builders, self._collate(layout), start,
            num_workers=num_workers, pin_memory=pin,
        )  # fmt: skip

    def validation_batches(self, layout: BatchLayout) -> Callable[[], Iterator[Batch]] | None:
        """Makes a pass over this rank's part of the held-out samples: each once, with the same masks each time."""
        part = self.validation
        if part is None:
            return None
        num_samples = [len(index) for index in part.indexes()]
        return partial(
            evaluation_batches, self._planner(part, layout), part.builders, self._collate(layout), num_samples
        )

    def summary(self, layout: BatchLayout) -> str:
        """A line that says what an epoch holds, and what of the text it does not."""
        indexes = self.training.indexes()
        parts = [f"{sum(map(len, indexes)):,} samples an epoch"]
        pairs = [index for index in indexes if isinstance(index, PairIndex)]
        if pairs:
            if pairs[0].rules.pair != "none":
                alone = sum(len(index) - index.num_pairs for index in pairs)
                parts.append(f"{alone:,} of them without a pair")
            text, cut = np.sum([index.text_and_cut_tokens() for index in pairs], axis=0)
            parts.append(f"{cut / text:.1%} of the tokens cut off")
        if empty := sum(index.num_empty_documents for index in indexes):
            parts.append(f"{empty:,} empty documents")
        if layout.packing:
            used, computed = self._planner(self.training, layout).fill_rates()
            parts.append(f"rows packed {used:.1%} full, micro-batches of {layout.micro_samples} rows {computed:.1%}")
        held_out = sum(map(len, self.validation.indexes())) if self.validation else 0
        return ", ".join([*parts, f"{held_out:,} samples held out" if held_out else "none held out"])

    def _planner(self, part: Part, layout: BatchLayout) -> StepPlanner:
        return StepPlanner(part.blend, layout, self.row_tokens)

    def _collate(self, layout: BatchLayout) -> Collate:
        if self.causal:
            return collate_causal
        if layout.packing:
            return partial(collate_packed, pad_id=self.pad_id, row_tokens=self.row_tokens)
        return partial(collate_padded, pad_id=self.pad_id)


def open_corpus(configuration: PretrainConfiguration, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Opens the token files.

    Raises:
        UserError: a file is missing or damaged, was made with another vocabulary, holds no pair although the objective
            wants pairs, or the split leaves nothing.
    """
    data, objective = configuration.data, configuration.objective
    causal = objective.kind == "causal"
    readers = [_open(corpus.prefix, tokenizer) for corpus in data.corpora]
    held_apart = _open(data.validation, tokenizer) if data.validation else None
    share, seed = 0.0 if held_apart else data.validation_share, configuration.training.seed
    split = [split_documents(reader, share, seed, corpus) for corpus, reader in enumerate(readers)]
    make = _Maker.of(configuration, tokenizer)
    weights = [corpus.weight for corpus in data.corpora]
    training = make.part([(reader, chosen) for reader, (chosen, _) in zip(readers, split, strict=True)], weights)
    held_out = [(reader, chosen) for reader, (_, chosen) in zip(readers, split, strict=True) if len(chosen)]
    if held_apart:
        held_out = [(held_apart, np.arange(len(held_apart.documents) - 1))]
    validation = make.part(held_out, [1.0] * len(held_out)) if held_out else None
    corpus = Corpus(training, validation, data.row_tokens, make.pad_id, causal)
    if not causal and objective.pair != "none":
        _refuse_without_pairs(corpus, [str(reader.prefix) for reader in readers], objective.pair)
    return corpus


@dataclass(frozen=True)
class _Maker:
    """Makes parts for one objective and tokenizer."""

    rules: SampleRules
    masker: Masker | None  # None: the causal objective
    cls_id: int
    sep_id: int
    pad_id: int

    @classmethod
    def of(cls, configuration: PretrainConfiguration, tokenizer: PreTrainedTokenizerBase) -> Self:
        data, objective = configuration.data, configuration.objective
        vocabulary = tokenizer.get_vocab()
        tokens = [_token(tokenizer, name) for name in ("cls_token", "sep_token", "pad_token", "mask_token")]
        masker = None
        if objective.kind == "masked":
            masker = Masker.of_vocabulary(
                vocabulary,
                tokenizer.all_special_tokens,
                tokens[3],
                share=objective.mask_share,
                max_words=objective.max_masked_words,
                whole_words=objective.whole_words and _tells_words_apart(tokenizer),
                segmenter=ChineseWords(vocabulary) if objective.chinese_segmenter == "jieba" else None,
                mask_replace_prob=objective.mask_replace_prob,
                random_replace_prob=objective.random_replace_prob,
            )
        rules = SampleRules(configuration.training.seed, data.row_tokens, data.short_share, objective.pair)
        return cls(rules, masker, *(vocabulary[token] for token in tokens[:3]))

    def part(self, documents: Sequence[tuple[IndexedReader, IntArray]], weights: Sequence[float]) -> Part:
        """The given documents of each token file."""
        index_type = CausalIndex if self.masker is None else PairIndex
        index_of: list[Callable[[int], PairIndex | CausalIndex]] = []
        builders: list[Builder] = []
        for corpus, (reader, chosen) in enumerate(documents):
            rules = replace(self.rules, corpus=corpus)
            index_of.append(partial(index_type, reader, chosen, rules))
            tokens = TokenFile.of(reader)
            builders.append(
                CausalBuilder(tokens, rules, self.sep_id, self.pad_id)
                if self.masker is None
                else MaskedBuilder(tokens, rules, self.masker, self.cls_id, self.sep_id)
            )
        return Part(Blend(index_of, weights), tuple(builders))


def _refuse_without_pairs(corpus: Corpus, names: Sequence[str], pair: Pair) -> None:
    indexes = corpus.training.indexes()
    if any(index.num_pairs for index in indexes if isinstance(index, PairIndex)):
        return
    lacks = "has two sentences" if pair == "sentence-order" else "has two sentences and another document beside it"
    raise UserError(
        f"{', '.join(names)}: none of its {sum(map(len, indexes)):,} samples {lacks}, so there is no pair to learn "
        f"from; set objective.pair=none, or preprocess text whose documents have several sentences"
    )


def _open(prefix: Path, tokenizer: PreTrainedTokenizerBase) -> IndexedReader:
    reader = IndexedReader(prefix)
    if not len(reader):
        raise UserError(f"{prefix}: the token file is empty")
    made_with = reader.provenance
    if made_with and made_with.fingerprint != fingerprint(tokenizer.backend_tokenizer):
        raise UserError(
            f"{prefix} was made with another vocabulary ({made_with.tokenizer}, {made_with.vocabulary_size:,} entries) "
            f"than data.tokenizer {tokenizer.name_or_path} ({len(tokenizer):,} entries)"
        )
    if not made_with and int(reader.tokens.max()) >= num_rows(tokenizer):
        raise UserError(
            f"{prefix} has the token id {int(reader.tokens.max())}, which data.tokenizer {tokenizer.name_or_path} "
            f"({len(tokenizer):,} entries) does not have"
        )
    return reader


def _tells_words_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens that continue a word begin with ##; says so where they do not."""
    model = tokenizer.backend_tokenizer.model
    told = isinstance(model, WordPiece | WordLevel) or getattr(model, "continuing_subword_prefix", None) == "##"
    if not told:
        logger.warning(
            "data.tokenizer %s does not mark what continues a word by ##: objective.whole_words takes each token for a "
            "word", tokenizer.name_or_path
        )  # fmt: skip
    return told


def _token(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    token = getattr(tokenizer, name)
    if token is None:
        raise UserError(f"data.tokenizer {tokenizer.name_or_path} has no {name}; a BERT vocabulary is wanted")
    return str(token)
