"""Unpadded execution: which positions of a padded batch hold real tokens, and moving between the two layouts.

B batch, S padded sequence, T real tokens of the whole batch, D hidden or any feature size.
A packed tensor keeps a leading batch of one, `hidden_1TD`, so that every module runs on it unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import numpy as np
import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

__all__ = [
    "PackedLayout",
    "layout_of_boundaries",
    "layout_of_padding",
    "layout_of_positions",
    "on_device",
    "restarting_positions",
    "sequence_ids",
    "sequence_ids_of_positions",
    "sequence_starts",
]


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a packed row of T tokens lie, and their places in the (B, S) batch they came from.

    `lengths` are the sequences' lengths in tokens; their sum is T. `indices_T` are the tokens' places among the B x S,
    None where every place holds a token (rows that came packed).
    """

    lengths: tuple[int, ...]
    batch_shape: tuple[int, int]
    device: torch.device
    indices_T: Tensor | None = None

    @cached_property
    def cu_seq_lens(self) -> Tensor:
        """The sequences' boundaries, int32, of shape (number of sequences + 1,), as the varlen kernels take them."""
        boundaries = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return on_device(boundaries, self.device)

    @cached_property
    def max_length(self) -> int:
        """The longest sequence, in tokens."""
        return max(self.lengths, default=0)

    @cached_property
    def side_by_side(self) -> "PackedLayout":
        """The same tokens with one sequence a row, padded to the longest."""
        shape = (len(self.lengths), self.max_length)
        return PackedLayout(self.lengths, shape, self.device, self.side_by_side_mask.flatten().nonzero()[:, 0])

    @cached_property
    def side_by_side_mask(self) -> Tensor:
        """(number of sequences, 1, 1, longest) bool: the real tokens of `side_by_side`."""
        real = torch.arange(self.max_length, device=self.device) < self.cu_seq_lens.diff()[:, None]
        return real[:, None, None, :]

    def pack(self, batch_BSx: Tensor) -> Tensor:
        """(B, S, ...) -> (1, T, ...): the real tokens in order."""
        flat = batch_BSx.flatten(0, 1)
        return (flat if self.indices_T is None else flat.index_select(0, self.indices_T))[None]

    def unpack(self, packed_1Tx: Tensor) -> Tensor:
        """(1, T, ...) -> (B, S, ...), with zeros at padding."""
        if self.indices_T is None:
            return packed_1Tx.view(*self.batch_shape, *packed_1Tx.shape[2:])
        flat = packed_1Tx.new_zeros(self.batch_shape[0] * self.batch_shape[1], *packed_1Tx.shape[2:])
        return flat.index_copy_(0, self.indices_T, packed_1Tx[0]).view(*self.batch_shape, *packed_1Tx.shape[2:])

    def unpack_in_blocks(self, function: Callable[[Tensor], Tensor], packed_1TD: Tensor, block_tokens: int) -> Tensor:
        """`unpack(function(packed))` without holding the packed result: for outputs as wide as a vocabulary."""
        num_tokens = packed_1TD.shape[1]
        if self.indices_T is None or torch.is_grad_enabled() or num_tokens <= block_tokens:
            return self.unpack(function(packed_1TD))
        flat: Tensor | None = None
        for start in range(0, num_tokens, block_tokens):
            block = function(packed_1TD[:, start : start + block_tokens])[0]
            if flat is None:
                flat = _untouched_zeros(block, (self.batch_shape[0] * self.batch_shape[1], *block.shape[1:]))
            flat.index_copy_(0, self.indices_T[start : start + block_tokens], block)
        assert flat is not None
        return flat.view(*self.batch_shape, *flat.shape[1:])


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`, through page-locked memory where the device has its own, so that the host need not wait."""
    if device.type == "cuda" and value.device.type == "cpu" and not is_tracing(value):
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def _untouched_zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of the type and device of `like`; on a CPU, pages that nothing is written to take no memory and no time."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    num_bytes = prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(like.dtype).view(shape)


def layout_of_padding(attention_mask: Tensor | None, *, keeps_starts: bool = False) -> PackedLayout | None:
    """The layout that leaves out the padding of a (B, S) mask; None where there is none to leave out.

    None as well while a graph is traced, which cannot depend on the mask's values, and with `keeps_starts` where the
    padding is on the left of a text. Reads the mask back from a GPU.
    """
    if attention_mask is None or attention_mask.ndim != 2 or is_tracing(attention_mask):
        return None
    rows, columns = attention_mask.shape
    real = attention_mask.ne(0)
    counts, starts = torch.stack((real.sum(-1), real[:, :1].sum(-1))).tolist()
    lengths = tuple(length for length in counts if length > 0)
    if sum(lengths) in (0, rows * columns) or (keeps_starts and sum(starts) < len(lengths)):
        return None
    indices_T = attention_mask.flatten().nonzero()[:, 0]
    return PackedLayout(lengths, (rows, columns), attention_mask.device, indices_T)


def layout_of_boundaries(cu_seq_lens: Tensor, batch_shape: tuple[int, int]) -> PackedLayout:
    """The layout of rows that came packed, given by the boundaries of their sequences among the B x S tokens.

    Raises:
        ValueError: where the boundaries do not run from 0 to the number of tokens without decreasing.
    """
    boundaries = cu_seq_lens.tolist()
    lengths = tuple(end - start for start, end in pairwise(boundaries) if end != start)
    num_tokens = batch_shape[0] * batch_shape[1]
    if not boundaries or boundaries[0] != 0 or boundaries[-1] != num_tokens or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seq_lens must increase from 0 to the number of tokens, {num_tokens}, not {boundaries}")
    return PackedLayout(lengths, batch_shape, cu_seq_lens.device)


def layout_of_positions(position_ids: Tensor | None) -> PackedLayout | None:
    """The layout of rows that came packed, seen from (B, S) positions that count up and restart from 0 within a row.

    None for any other positions, such as nothing but 0, and while a graph is traced: give the boundaries there.
    """
    if position_ids is None or position_ids.ndim != 2 or is_tracing(position_ids):
        return None
    starts_BS, counts_up = _restarts(position_ids)
    rows, columns = position_ids.shape
    starts = starts_BS.flatten().nonzero()[:, 0].tolist()
    if not bool(counts_up) or len(starts) in (rows, rows * columns):
        return None
    lengths = tuple(end - start for start, end in pairwise([*starts, rows * columns]))
    return PackedLayout(lengths, (rows, columns), position_ids.device)


def sequence_ids(cu_seq_lens: Tensor, batch_shape: tuple[int, int]) -> Tensor:
    """(B, S): the number of the sequence that each token of packed rows belongs to. Traceable."""
    tokens = torch.arange(batch_shape[0] * batch_shape[1], device=cu_seq_lens.device)
    return torch.searchsorted(cu_seq_lens[1:].to(tokens.dtype), tokens, right=True).view(batch_shape)


def sequence_ids_of_positions(position_ids: Tensor) -> Tensor:
    """(B, S): the same within each row, of (B, S) positions as `layout_of_positions` takes them; 0 for any others.
    Traceable.
    """
    starts_BS, counts_up = _restarts(position_ids)
    return starts_BS.cumsum(-1) * (counts_up & ~starts_BS.all())


def _restarts(position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S) where positions are 0, and whether all others follow the one before, and rows begin with 0."""
    starts_BS = position_ids == 0
    return starts_BS, starts_BS[:, 0].all() & (starts_BS[:, 1:] | (position_ids.diff(dim=-1) == 1)).all()


def restarting_positions(cu_seq_lens: Tensor, batch_shape: tuple[int, int]) -> Tensor:
    """(B, S): each token's place in its own sequence, from 0. Traceable."""
    sequences_BS = sequence_ids(cu_seq_lens, batch_shape)
    tokens = torch.arange(batch_shape[0] * batch_shape[1], device=cu_seq_lens.device).view(batch_shape)
    return tokens - cu_seq_lens.long()[sequences_BS]


def sequence_starts(hidden_BSD: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """(B, S, D) packed rows -> (number of sequences, 1, D): the state of each sequence's first token. Traceable."""
    flat = hidden_BSD.flatten(0, 1)
    return flat.index_select(0, cu_seq_lens[:-1].long().clamp(max=flat.shape[0] - 1))[:, None]
