"""Packing: every sample once, no row too full, few rows."""

import numpy as np
import pytest

from megatron_bert.data.packing import best_num_rows, best_row_tokens, pack


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


def test_a_row_that_is_a_micro_batch() -> None:
    step = np.full(32, 1000)
    assert best_row_tokens([step], 1000, 32 * 1000, 1) == 32_000
    assert best_row_tokens([step], 1000, 16 * 1000, 1) == 16_000
    assert best_row_tokens([step], 1000, 16 * 1000, 4) == 8_000
    assert best_row_tokens([step], 1000, 1000, 1) == 1024  # a sample a pass: nothing smaller holds one
    large = np.full(36, 1000)
    assert best_row_tokens([step] * 49 + [large], 1000, 36_000, 1) < 35_000  # the odd one takes two passes
    assert best_row_tokens([step, large] * 9, 1000, 36_000, 1) == 36_032


def test_long_samples_leave_little_of_such_a_row_empty() -> None:
    """Lengths like those of RACE's questions: rows of the longest one would be a third empty."""
    random = np.random.default_rng(0)
    steps = [np.clip(random.normal(1400, 400, 32), 300, 2048).astype(np.int64) for _ in range(64)]
    real = sum(int(step.sum()) for step in steps)
    row_tokens = best_row_tokens(steps, 2048, 16 * 2048, 1)
    computed = sum(len(pack(step, row_tokens)) for step in steps) * row_tokens
    rows = [len(pack(step, 2048)) for step in steps]
    assert row_tokens <= 16 * 2048
    assert real / computed > 0.85
    assert real / sum(-(-number // 16) * 16 * 2048 for number in rows) < 0.75
