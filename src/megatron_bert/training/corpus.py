"""A configuration's token files, checked against its tokenizer, as streams of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_bert.data.batches import (
    Batch,
    BatchLayout,
    BatchPlan,
    Position,
    StepBatches,
    evaluation_batches,
    training_steps,
)
from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.masking import Masker
from megatron_bert.data.samples import EpochIndex, IntArray, SampleBuilder, SampleRules, split_documents
from megatron_bert.data.vocabulary import fingerprint
from megatron_bert.errors import UserError
from megatron_bert.training.configuration import PretrainConfiguration

__all__ = ["Corpus", "Part", "open_corpus"]


@dataclass(frozen=True)
class Part:
    """Some documents of a token file, and what makes samples of them."""

    builder: SampleBuilder
    documents: IntArray

    def index(self, epoch: int) -> EpochIndex:
        """The samples of one epoch."""
        return EpochIndex(self.builder.reader, self.documents, self.builder.rules, epoch)


@dataclass(frozen=True)
class Corpus:
    """What a run reads. `validation` is None where nothing is held out."""

    training: Part
    validation: Part | None
    pad_id: int

    def steps(self, layout: BatchLayout, start: Position, *, num_workers: int, pin: bool) -> Iterator[StepBatches]:
        """This rank's training steps from `start` on, without end; the index of the current epoch is kept.

        Args:
            num_workers: processes that make samples; 0: this one.
            pin: put batches into page-locked memory.
        """
        plan = BatchPlan(lru_cache(maxsize=1)(self.training.index), layout, start)
        return training_steps(self.training.builder, plan, self.pad_id, num_workers=num_workers, pin_memory=pin)

    def validation_batches(self, samples: int) -> Callable[[], Iterator[Batch]] | None:
        """Makes a pass over the held-out samples, `samples` at a time."""
        if self.validation is None:
            return None
        part = self.validation
        return partial(evaluation_batches, part.builder, part.index(0), self.pad_id, samples)


def open_corpus(configuration: PretrainConfiguration, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Opens the token files.

    Raises:
        UserError: a file is missing or damaged, was made with another vocabulary, holds no pair although the objective
            wants pairs, or the split leaves nothing.
    """
    data, objective, seed = configuration.data, configuration.objective, configuration.training.seed
    rules = SampleRules(seed, data.row_tokens, data.short_share, objective.pair != "none")
    vocabulary = tokenizer.get_vocab()
    cls, sep, pad = (vocabulary[_token(tokenizer, name)] for name in ("cls_token", "sep_token", "pad_token"))
    masker = Masker.of_vocabulary(
        vocabulary,
        tokenizer.all_special_tokens,
        _token(tokenizer, "mask_token"),
        share=objective.mask_share,
        max_words=objective.max_masked_words,
    )

    def part(reader: IndexedReader, documents: IntArray) -> Part:
        return Part(SampleBuilder(reader, rules, masker, cls, sep), documents)

    reader = _open(data.tokens, tokenizer)
    held_apart = _open(data.validation, tokenizer) if data.validation else None
    training, validation = split_documents(reader, 0.0 if held_apart else data.validation_share, seed)
    corpus = Corpus(
        training=part(reader, training),
        validation=part(held_apart, np.arange(len(held_apart.documents) - 1)) if held_apart
        else part(reader, validation) if len(validation) else None,
        pad_id=pad,
    )  # fmt: skip
    first = corpus.training.index(0)
    if rules.pairs and not first.num_pairs:
        raise UserError(
            f"{data.tokens}: none of its {len(first):,} samples has two sentences, so there is no pair to learn from; "
            f"set objective.pair=none, or preprocess text whose documents have several sentences"
        )
    return corpus


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
    if not made_with and int(reader.tokens.max()) >= len(tokenizer):
        raise UserError(
            f"{prefix} has the token id {int(reader.tokens.max())}, which data.tokenizer {tokenizer.name_or_path} "
            f"({len(tokenizer):,} entries) does not have"
        )
    return reader


def _token(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    token = getattr(tokenizer, name)
    if token is None:
        raise UserError(f"data.tokenizer {tokenizer.name_or_path} has no {name}; a BERT vocabulary is wanted")
    return str(token)
