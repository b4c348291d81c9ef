"""Several samples in a row, so that little is computed for padding. Which, is known from their lengths alone.

First-fit decreasing: the longest first, each into the first row with room. It takes at most 11/9 of the fewest rows
possible, and 6/9 of one (Dosa 2007); with a step's worth of samples it leaves next to nothing empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["best_num_rows", "best_row_tokens", "pack"]

_MULTIPLE = 64  # tokens of a row that is as long as its micro-batch
_PASS_TOKENS = 1024  # which a pass costs besides: weights are converted once more, gradients added up


def pack(lengths: npt.NDArray[np.int64], row_tokens: int) -> list[list[int]]:
    """The samples of each row, for samples of `lengths` tokens, none longer than a row.

    Returns:
        lists of indices into `lengths`: each sample in one of them.
    """
    assert lengths.max(initial=0) <= row_tokens
    free = np.full(len(lengths), row_tokens)
    rows: list[list[int]] = []
    for sample in np.argsort(-lengths, kind="stable").tolist():
        row = int(np.argmax(free >= lengths[sample]))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        free[row] -= lengths[sample]
    return rows


def best_num_rows(rows_of_steps: Sequence[int], limit: int, world_size: int) -> int:
    """How many rows a micro-batch should have: between half the limit and the limit, the most of those that compute
    within 2 % of the least.

    A step's last micro-batch is filled up with rows of padding, so how well the number divides a step's rows matters;
    but larger micro-batches also fill a device better.

    Args:
        rows_of_steps: the rows that some steps take, over all ranks.
        limit: the most rows of one forward pass on one rank.
    """
    needed = np.asarray(rows_of_steps)

    def computed(rows: int) -> int:
        return int((-(-needed // (rows * world_size))).sum() * rows)

    choices = range(limit, (limit - 1) // 2, -1)
    least = min(map(computed, choices))
    return next(rows for rows in choices if computed(rows) <= 1.02 * least)


def best_row_tokens(
    lengths_of_steps: Sequence[npt.NDArray[np.int64]], longest: int, limit: int, world_size: int
) -> int:
    """How many tokens a micro-batch of a single row should have: samples that are nearly as long as a row leave much of
    it empty, and nothing where all rows are one.

    Tried are the sizes that deal the largest step out evenly to the fewest passes possible and up to twice as many,
    with something to spare, or less than it needs, so that it takes one more. The largest of those that cost within 2 %
    of the least is taken.

    Args:
        lengths_of_steps: of the samples of some steps, over all ranks, in tokens.
        longest: sample, which has to fit.
        limit: the most tokens of one forward pass on one rank, rounded up to a multiple of 64.
    """
    most = _rounded_up(limit)
    largest = max(int(lengths.sum()) for lengths in lengths_of_steps)
    fewest = -(-largest // (most * world_size))
    sizes = {
        min(max(_rounded_up(spare * largest / (parts * world_size)), _rounded_up(longest)), most)
        for parts in range(fewest, 2 * fewest + 1)
        for spare in (0.9, 0.95, 1.0, 1.02, 1.05, 1.1)
    }
    passes = {size: sum(-(-len(pack(lengths, size)) // world_size) for lengths in lengths_of_steps) for size in sizes}
    costs = {size: number * (size + _PASS_TOKENS) for size, number in passes.items()}
    return max(size for size in sizes if costs[size] <= 1.02 * min(costs.values()))


def _rounded_up(tokens: float) -> int:
    return -(-int(tokens) // _MULTIPLE) * _MULTIPLE
