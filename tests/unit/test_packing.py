"""Packing: every sample once, no row too full, few rows."""

import numpy as np
import pytest

from megatron_bert.data.packing import best_num_rows, pack


def straightforward(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing as textbooks have it."""
    rows: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        for row in rows:
            if sum(lengths[at] for at in row) + lengths[sample] <= row_tokens:
                row.append(sample)
                break
        else:
            rows.append([sample])
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_decreasing(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(3, 65, 200)
    rows = pack(lengths, 64)
    assert rows == straightforward(lengths.tolist(), 64)
    assert sorted(sample for row in rows for sample in row) == list(range(200))
    assert max(lengths[row].sum() for row in rows) <= 64


@pytest.mark.parametrize(("lengths", "rows"), [([], []), ([64], [[0]]), ([64, 64], [[0], [1]]), ([1, 64], [[1], [0]])])
def test_edges(lengths: list[int], rows: list[list[int]]) -> None:
    assert pack(np.array(lengths, np.int64), 64) == rows


def test_the_best_number_of_rows_computes_the_least() -> None:
    assert best_num_rows([40], 64, 1) == 40
    assert best_num_rows([40], 32, 1) == 20
    assert best_num_rows([40, 41], 32, 1) == 21  # 42 + 42 rows, and 20 would take 40 + 60
    assert best_num_rows([64], 16, 2) == 16
    assert best_num_rows([7], 1, 1) == 1
    assert best_num_rows([1], 8, 1) == 4  # half the limit at least, so that a few odd steps do not decide alone
