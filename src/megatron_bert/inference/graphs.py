"""CUDA graphs of small batches: a few texts are predicted with one launch instead of several hundred.

A batch of a few hundred tokens keeps a GPU busy for less time than the host needs to launch its kernels. A graph is
captured once for each of a few total lengths, and replayed with other numbers in the same places: the texts lie one
after the other in a row of T tokens, and what is left of the row is a sequence of its own, to which no text attends.

T tokens of the row, N texts at most, M masks at most, K candidates.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_bert.inference.texts import MaskedText

__all__ = ["BUCKETS", "BatchGraphs", "StaticBatch", "bucket_of", "filled_row"]

log = logging.getLogger(__name__)

BUCKETS = (16, 32, 64, 128, 256, 512, 1024)  # T; from about 2,000 tokens on an H100 is busy longer than its host
_TEXTS = 8  # N
_MASKS = 16  # M
_WARM_UP = 3  # batches of a bucket; a capture takes as long as some ten, which one-off use should not pay

Compute = Callable[["StaticBatch"], tuple[Tensor, Tensor]]


def bucket_of(batch: Sequence[MaskedText]) -> int | None:
    """The smallest T that has room for the texts; None where there is none, or there are too many texts or masks."""
    if len(batch) > _TEXTS or sum(len(text.mask_positions) for text in batch) > _MASKS:
        return None
    num_tokens = sum(len(text.ids) for text in batch)
    return next((bucket for bucket in BUCKETS if num_tokens <= bucket), None)


def filled_row(batch: Sequence[MaskedText], bucket: int, pad_id: int) -> np.ndarray:
    """int32 [2 T + M + N + 2]: ids [T], positions [T], the masks' places in the row [M], boundaries of sequences
    [N + 2].

    What is left of the row is one more sequence, of padding; sequences that are not there are empty; places of masks
    that are not there are 0.
    """
    lengths = [len(text.ids) for text in batch]
    starts = [0, *accumulate(lengths)]
    num_tokens = starts[-1]
    row = np.zeros(2 * bucket + _MASKS + _TEXTS + 2, dtype=np.int32)
    ids, positions, masks, boundaries = np.split(row, np.cumsum([bucket, bucket, _MASKS]))
    ids[:num_tokens] = np.fromiter(chain.from_iterable(text.ids for text in batch), np.int32, num_tokens)
    ids[num_tokens:] = pad_id
    positions[:num_tokens] = np.concatenate([np.arange(length) for length in lengths])
    places = [start + at for start, text in zip(starts, batch, strict=False) for at in text.mask_positions]
    masks[: len(places)] = places
    boundaries[: len(starts)] = starts
    boundaries[len(starts) :] = bucket
    return row


@dataclass(frozen=True)
class StaticBatch:
    """A row whose numbers are replaced in place; it is its own layout (see `model.packing.PackedLayout`).

    Attributes:
        row: see `filled_row`, on the model's device.
        max_length: T, which no sequence exceeds.
    """

    row: Tensor
    max_length: int

    @property
    def ids(self) -> Tensor:
        """(1, T)"""
        return self.row[None, : self.max_length]

    @property
    def positions(self) -> Tensor:
        """(1, T): each token's place in its own text."""
        return self.row[None, self.max_length : 2 * self.max_length]

    @property
    def masks(self) -> Tensor:
        """(M,): the masks' places in the row."""
        return self.row[2 * self.max_length : 2 * self.max_length + _MASKS]

    @property
    def cu_seq_lens(self) -> Tensor:
        """(N + 2,): the boundaries of the sequences."""
        return self.row[2 * self.max_length + _MASKS :]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the sequences that are not empty. Asks the device, which a graph cannot; its kernels do not need it."""
        return tuple(length for length in self.cu_seq_lens.diff().tolist() if length)

    @property
    def batch_shape(self) -> tuple[int, int]:
        """(1, T)"""
        return 1, self.max_length

    def pack(self, batch_1Tx: Tensor) -> Tensor:
        """The row itself."""
        return batch_1Tx

    def unpack(self, packed_1Tx: Tensor) -> Tensor:
        """The row itself."""
        return packed_1Tx


class BatchGraphs:
    """The graphs of `compute`, which gives scores and tokens (M, K) of a `StaticBatch`, and what decides on their use.

    Where a capture fails, that is said once, and no graph is used from there on.
    """

    def __init__(self, compute: Compute, device: torch.device, pad_id: int) -> None:
        self._compute, self._device, self._pad_id = compute, device, pad_id
        self._seen: Counter[int] = Counter()
        self._captured: dict[int, tuple[StaticBatch, Callable[[], tuple[Tensor, Tensor]]]] = {}
        self._pool: Any = None  # memory that the graphs share: they never run at the same time
        self._beside: Any = None  # the stream that they are captured on
        self._works = True

    def run(self, batch: Sequence[MaskedText]) -> tuple[Tensor, Tensor] | None:
        """Scores and tokens (masks of the batch, K), which the next call may overwrite; None: compute it as usual.

        The copy and the launch are queued on the current stream.
        """
        bucket = bucket_of(batch) if self._works else None
        if bucket is None:
            return None
        row = torch.from_numpy(filled_row(batch, bucket, self._pad_id))
        if bucket not in self._captured:
            self._seen[bucket] += 1
            if self._seen[bucket] <= _WARM_UP or not self._try_to_capture(row, bucket):
                return None
        static, replay = self._captured[bucket]
        static.row.copy_(_pinned(row, self._device), non_blocking=True)
        num_masks = sum(len(text.mask_positions) for text in batch)
        scores_MK, tokens_MK = replay()
        return scores_MK[:num_masks], tokens_MK[:num_masks]

    def _try_to_capture(self, row: Tensor, bucket: int) -> bool:
        static = StaticBatch(row.to(self._device), bucket)
        try:
            with torch.cuda.device(self._device if self._device.type == "cuda" else -1):
                self._captured[bucket] = static, self._capture(static)
        except (RuntimeError, NotImplementedError) as error:
            self._works = False
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("no CUDA graphs for short texts, which take longer without: %s", reason)
        return self._works

    def _capture(self, static: StaticBatch) -> Callable[[], tuple[Tensor, Tensor]]:
        """A function that computes the static batch as it then is, into the same tensors each time."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        here, beside = torch.cuda.current_stream(self._device), self._beside
        beside.wait_stream(here)
        with torch.cuda.stream(beside):  # libraries are loaded and kernels chosen before, never while it is captured
            for _ in range(2):
                self._compute(static)
        here.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"):
            results = self._compute(static)

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return results

        return replay


def _pinned(row: Tensor, device: torch.device) -> Tensor:
    return row.pin_memory() if device.type == "cuda" else row
