"""A batch on its way to the model: what is predicted where, what lies beside what, and shapes that a compiler can keep.

Legend: B batch, S sequence, M predicted positions of the batch, n sequences, k labelled samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from megatron_bert.data.batches import Batch
from megatron_bert.data.masking import IGNORED
from megatron_bert.model.packing import PackedLayout, layout_of_boundaries, layout_of_padding
from megatron_bert.parallel.launch import largest

__all__ = ["FixedShapes", "LabelledBatch", "LaidOut", "MicroBatch", "moved"]

_INPUTS = ("input_ids", "token_type_ids", "position_ids")
# What a padded batch has, and what its padding holds.
_PADDING = {
    "input_ids": 0,
    "token_type_ids": 0,
    "attention_mask": 0,
    "labels": IGNORED,
    "next_sentence_label": IGNORED,
}


class FixedLayout:
    """A `PackedLayout` for compiled layers: its boundaries and its longest sequence have the same size in every batch.

    Not a dataclass: a compiler looks only at the attributes that are used, and so never at `lengths`.
    """

    def __init__(self, layout: PackedLayout, cu_seq_lens: Tensor, max_length: int) -> None:
        self.layout, self.cu_seq_lens, self.max_length = layout, cu_seq_lens, max_length
        self.batch_shape, self.device = layout.batch_shape, cu_seq_lens.device

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the sequences that are not empty, in tokens."""
        return self.layout.lengths

    @property
    def side_by_side(self) -> PackedLayout:
        """See `PackedLayout`. Its shape is the batch's own.

        Raises:
            RuntimeError: a CUDA graph is being recorded, which cannot depend on it.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("attention has no kernel here for sequences of their own lengths")
        return replace(self.layout, device=self.device).side_by_side

    @property
    def side_by_side_mask(self) -> Tensor:
        """See `PackedLayout`."""
        return replace(self.layout, device=self.device).side_by_side_mask

    def pack(self, batch_BSx: Tensor) -> Tensor:
        """(B, S, ...) -> (1, B * S, ...)."""
        return batch_BSx.flatten(0, 1)[None]

    def unpack(self, packed_1Tx: Tensor) -> Tensor:
        """(1, B * S, ...) -> (B, S, ...)."""
        return packed_1Tx.view(*self.batch_shape, *packed_1Tx.shape[2:])


class Room(NamedTuple):
    """For predicted positions, sequences of a packed batch, labelled samples, and texts of each of these."""

    predicted: int
    sequences: int
    samples: int
    texts: int


@dataclass
class FixedShapes:
    """Shapes that every batch of a compiled step has, so that nothing is compiled twice.

    They are the same on all ranks: a pass in which ranks send to each other is recorded by all of them at once or by
    none (NCCL user guide, "Using NCCL with CUDA Graphs").

    A batch with fewer rows (the last of a pass) or shorter ones is filled up with padding. So are the predicted
    positions, to the expected number of a full batch and a reserve, and the sequences of a packed batch, to the largest
    number so far and a reserve: a batch that exceeds them, which is rare, is compiled once more. So are labelled
    samples. What is filled up never counts.

    Attributes:
        rows, row_tokens: of every batch.
        predicted_share: the expected share of tokens that are predicted.
        sequence_tokens: no sequence of a packed batch is longer; 0: than a row.
    """

    rows: int
    row_tokens: int
    predicted_share: float
    sequence_tokens: int = 0
    _predicted: int = 0
    _sequences: int = 0
    _samples: int = 0
    _texts: int = 0

    def room(self, *, predicted: int = 0, sequences: int = 0, samples: int = 0, texts: int = 0) -> Room:
        """For a batch of so many, and the batches that the other ranks ask for now: all of them have to."""
        predicted, sequences, samples, texts = largest([predicted, sequences, samples, texts])
        positions = self.rows * self.row_tokens
        expected = self.predicted_share * positions
        if predicted > self._predicted:
            self._predicted = min(_rounded_up(1.05 * max(predicted, expected), 128), max(positions, predicted))
        if sequences > self._sequences:
            self._sequences = _rounded_up(1.25 * sequences, 64)
        if samples > self._samples:
            self._samples = _rounded_up(1.25 * samples, 8)
        self._texts = max(self._texts, texts)
        return Room(self._predicted, self._sequences, self._samples, self._texts)

    def is_of_same_rows(self, other: FixedShapes) -> bool:
        """Whether the other one is for such batches, too, whatever it has room for by now."""
        return self._batches == other._batches

    @property
    def _batches(self) -> tuple[int, int, float, int]:
        return self.rows, self.row_tokens, self.predicted_share, self.sequence_tokens


@dataclass(frozen=True)
class LaidOut:
    """What the model reads; the numbers are known without asking the device.

    Attributes:
        inputs: arguments of `MegatronBertModel`: input_ids, token_type_ids; packed position_ids and cu_seq_lens_q;
            filled up attention_mask, bool [B, 1, 1, S].
        layout: where the real tokens lie; None where every row is run whole.
        num_attended_pairs: the sum of the squared lengths of real sequences: for counting FLOPs.
    """

    inputs: dict[str, Tensor]
    layout: PackedLayout | FixedLayout | None
    num_tokens: int
    num_attended_pairs: int

    def tensors(self) -> dict[str, Tensor]:
        """All that is computed with, by name."""
        return {**self.inputs, **{name: value for name, value in vars(self).items() if isinstance(value, Tensor)}}

    def to(self, device: torch.device) -> Self:
        """The same on `device`; the host does not wait for it."""
        inputs = {name: moved(value, device) for name, value in self.inputs.items()}
        layout = self.layout
        if isinstance(layout, FixedLayout):
            layout = FixedLayout(layout.layout, inputs["cu_seq_lens_q"], layout.max_length)
        elif layout is not None:
            indices = None if layout.indices_T is None else moved(layout.indices_T, device)
            layout = replace(layout, device=device, indices_T=indices)
        tensors: dict[str, Any] = {
            name: moved(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, inputs=inputs, layout=layout, **tensors)


@dataclass(frozen=True)
class MicroBatch(LaidOut):
    """A batch as the pretraining objective takes it.

    Attributes:
        positions: int64 [M], the predicted positions in the flattened [B * S].
        targets: int64 [M], the tokens there; IGNORED where M was filled up.
        pair_labels: int64 [B], packed [n]; IGNORED for a row without a pair; None where there are no pairs at all.
    """

    positions: Tensor
    targets: Tensor
    pair_labels: Tensor | None
    num_masked: int
    num_pairs: int

    @classmethod
    def of(cls, batch: Batch, shapes: FixedShapes | None = None) -> Self:
        """From a collated batch in the CPU's memory, padded or packed; with `shapes`, filled up to them."""
        lengths = _real_lengths(batch)
        if shapes is not None and "cu_seq_lens" not in batch:
            batch = _filled_up(batch, shapes)
        labels, pairs = batch["labels"].flatten(), batch.get("next_sentence_label")
        positions = (labels != IGNORED).nonzero(as_tuple=True)[0]
        targets, num_masked = labels[positions], len(positions)
        inputs: dict[str, Tensor] = {name: batch[name] for name in _INPUTS if name in batch}
        num_pairs = 0 if pairs is None else int((pairs != IGNORED).sum())
        room = None
        if shapes is not None:
            room = shapes.room(predicted=num_masked, sequences=len(batch.get("cu_seq_lens", [0])) - 1)
            positions = functional.pad(positions, (0, room.predicted - num_masked))
            targets = functional.pad(targets, (0, room.predicted - num_masked), value=IGNORED)
        layout: PackedLayout | FixedLayout | None = None
        mask = batch.get("attention_mask")
        if mask is not None and shapes is not None:
            inputs["attention_mask"] = mask.bool()[:, None, None, :]
        elif mask is not None:
            layout = layout_of_padding(mask)
        if "cu_seq_lens" in batch:
            layout, boundaries = _packed_layout(batch, shapes, room)
            inputs["cu_seq_lens_q"] = boundaries
            if pairs is not None:
                pairs = functional.pad(pairs, (0, len(boundaries) - 1 - len(pairs)), value=IGNORED)
        return cls(
            inputs=inputs,
            layout=layout,
            positions=positions,
            targets=targets,
            pair_labels=pairs,
            num_masked=num_masked,
            num_pairs=num_pairs,
            num_tokens=int(lengths.sum()),
            num_attended_pairs=int(lengths.square().sum()),
        )


@dataclass(frozen=True)
class LabelledBatch(LaidOut):
    """A packed batch of labelled samples (see `data.labelled`), as the objective of a task takes it.

    Attributes:
        sequences: int64, which of the n sequences are texts of samples, in their order; the others are padding.
        targets: of the k samples, as `data.labelled.collate_labelled` gives them.
        tokens: int64, where the texts' tokens are among the batch's, one text after the other.
        places: int64 [texts, longest], the same with a row a text, -1 beyond its end.
            All four may go on with what is filled up: the first sequence or token again, no places, no known targets.
        lengths: of the texts, in tokens.
        rows: the samples' numbers.
        num_terms: of the loss: targets that are known.
    """

    sequences: Tensor
    targets: Tensor
    tokens: Tensor
    places: Tensor
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    num_terms: int

    @classmethod
    def of(cls, batch: Batch, shapes: FixedShapes | None = None, *, has_tags: bool = False) -> Self:
        """From a collated batch in the CPU's memory; with `shapes`, filled up to them.

        Args:
            has_tags: targets are of tokens.
        """
        targets, bounds = batch["targets"], batch["cu_seq_lens"].long()
        sequences, positions = batch["sequences"], batch["input_ids"].numel()
        room, samples = None, len(batch["rows"])
        if shapes is not None:
            texts = len(sequences) // samples if samples else 0
            room = shapes.room(sequences=len(bounds) - 1, samples=samples, texts=texts)
        layout, boundaries = _packed_layout(batch, shapes, room)
        inputs = {name: batch[name] for name in _INPUTS}
        starts, lengths = bounds[sequences], bounds.diff()[sequences]
        longest = int(lengths.max()) if len(lengths) else 1
        if shapes is not None:
            longest = shapes.sequence_tokens or batch["input_ids"].shape[1]
        counting = torch.arange(longest)
        places = torch.where(counting < lengths[:, None], starts[:, None] + counting, -1)
        tokens = places[places >= 0]
        known = ~targets.isnan() if targets.is_floating_point() else targets != IGNORED
        terms = known.all(-1) if targets.ndim == 2 and not targets.is_floating_point() else known  # a span is one
        if room is not None:
            sequences = _longer(sequences, room.samples * room.texts, 0)
            places = _longer(places, room.samples * room.texts, -1)
            tokens = _longer(tokens, positions, 0)
            unknown = float("nan") if targets.is_floating_point() else IGNORED
            targets = _longer(targets, positions if has_tags else room.samples, unknown)
        return cls(
            inputs={**inputs, "cu_seq_lens_q": boundaries},
            layout=layout,
            sequences=sequences,
            targets=targets,
            tokens=tokens,
            places=places,
            lengths=tuple(lengths.tolist()),
            rows=tuple(batch["rows"].tolist()),
            num_terms=int(terms.sum()),
            num_tokens=int(lengths.sum()),
            num_attended_pairs=int(lengths.square().sum()),
        )


def _real_lengths(batch: Batch) -> Tensor:
    """int64: the lengths of the sequences that are no padding: of a packed row's, those that predict something."""
    if "cu_seq_lens" not in batch:
        if "attention_mask" in batch:
            return batch["attention_mask"].sum(-1)
        rows, columns = batch["input_ids"].shape
        return torch.full((rows,), columns)
    boundaries = batch["cu_seq_lens"].long()
    predicted = functional.pad((batch["labels"].flatten() != IGNORED).cumsum(0), (1, 0))
    return boundaries.diff() * (predicted[boundaries].diff() > 0)


def _packed_layout(
    batch: Batch, shapes: FixedShapes | None, room: Room | None
) -> tuple[PackedLayout | FixedLayout, Tensor]:
    """The layout of a packed batch, and its boundaries (with `shapes`, empty sequences fill them up)."""
    boundaries, (rows, columns) = batch["cu_seq_lens"], batch["input_ids"].shape
    layout = layout_of_boundaries(boundaries, (rows, columns))
    if shapes is None or room is None:
        return layout, boundaries
    filled = torch.cat([boundaries, boundaries[-1:].expand(room.sequences + 1 - len(boundaries))])
    return FixedLayout(layout, filled, shapes.sequence_tokens or columns), filled


def _filled_up(batch: Batch, shapes: FixedShapes) -> Batch:
    """A padded batch with rows and columns of padding, as many as the fixed shape wants."""
    rows, columns = batch["input_ids"].shape
    margins = (0, max(shapes.row_tokens - columns, 0), 0, max(shapes.rows - rows, 0))
    filled = {
        name: functional.pad(batch[name], margins if batch[name].ndim == 2 else margins[2:], value=value)
        for name, value in _PADDING.items()
        if name in batch
    }
    if "attention_mask" in filled:
        filled["attention_mask"][rows:, 0] = 1  # attention to nothing is not a number
    return filled


def _longer(values: Tensor, length: int, value: float) -> Tensor:
    """With as many rows."""
    return torch.cat([values, values.new_full((length - len(values), *values.shape[1:]), value)])


def moved(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`, through page-locked memory where the device has its own, so that the host need not wait."""
    if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def _rounded_up(value: float, multiple: int) -> int:
    return -(-int(value + 0.999) // multiple) * multiple
