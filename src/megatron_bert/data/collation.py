"""Samples put together to tensors: padded rows, packed rows, rows of the causal objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_bert.data.masking import IGNORED
from megatron_bert.data.samples import Sample

__all__ = ["Batch", "Collate", "collate_causal", "collate_packed", "collate_padded"]

Batch = dict[str, torch.Tensor]
Collate = Callable[[Sequence[Sequence[Sample]]], Batch]


def collate_padded(rows: Sequence[Sequence[Sample]], pad_id: int) -> Batch:
    """Rows of one sample each, padded at the right to the longest.

    Returns:
        `input_ids`, `token_type_ids`, `attention_mask` (1 at real tokens) and `labels`, int64 [B, S], and
        `next_sentence_label`, int64 [B]: the names of `MegatronBertForPreTraining.forward`.
    """
    samples = [row[0] for row in rows]
    shape = (len(samples), max(len(sample.input_ids) for sample in samples))
    ids, types = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    mask, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for row, sample in enumerate(samples):
        stop = len(sample.input_ids)
        ids[row, :stop], types[row, :stop] = sample.input_ids, sample.token_type_ids
        mask[row, :stop], labels[row, :stop] = 1, sample.labels
    return {
        "input_ids": torch.from_numpy(ids),
        "token_type_ids": torch.from_numpy(types),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
        "next_sentence_label": torch.tensor([sample.pair_label for sample in samples]),
    }


def collate_packed(rows: Sequence[Sequence[Sample]], pad_id: int, row_tokens: int) -> Batch:
    """Rows of several samples each; what is left of a row is a sequence of its own, of padding.

    Returns:
        `input_ids`, `token_type_ids`, `position_ids` (from 0 in each sequence) and `labels`, int64 [B, row_tokens];
        `cu_seq_lens`, int32 [n + 1], where each of the n sequences starts in the B * row_tokens tokens, and the end;
        `next_sentence_label`, int64 [n], IGNORED for padding.
    """
    shape = (len(rows), row_tokens)
    ids, types = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    positions, labels = np.empty(shape, np.int64), np.full(shape, IGNORED, np.int64)
    counting = np.arange(row_tokens)
    bounds, pair_labels = [0], []
    for row, samples in enumerate(rows):
        at = 0
        for sample in samples:
            stop = at + len(sample.input_ids)
            ids[row, at:stop], types[row, at:stop] = sample.input_ids, sample.token_type_ids
            labels[row, at:stop], positions[row, at:stop] = sample.labels, counting[: stop - at]
            at = stop
            bounds.append(row * row_tokens + at)
            pair_labels.append(sample.pair_label)
        if at < row_tokens:
            positions[row, at:] = counting[: row_tokens - at]
            bounds.append((row + 1) * row_tokens)
            pair_labels.append(IGNORED)
    return {
        "input_ids": torch.from_numpy(ids),
        "token_type_ids": torch.from_numpy(types),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
        "cu_seq_lens": torch.tensor(bounds, dtype=torch.int32),
        "next_sentence_label": torch.tensor(pair_labels),
    }


def collate_causal(rows: Sequence[Sequence[Sample]]) -> Batch:
    """Rows of the causal objective: `input_ids`, `token_type_ids` (0) and `labels`, what follows each token; [B, S]."""
    samples = [row[0] for row in rows]
    return {name: torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))
            for name in ("input_ids", "token_type_ids", "labels")}  # fmt: skip
