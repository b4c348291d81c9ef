"""Rows to be written in float8, and what they have to be then."""

import torch
from torch import Tensor


def check_narrowed(values: Tensor, scales: Tensor, exact: Tensor) -> None:
    """Against e4m3's definition (arXiv 2209.05433, table 1): 448 at most, 3 bits of mantissa, exponents from -6 on; so
    off by half of the last bit, and a little, as the exact states are float64's: what is narrowed was float32, and off
    by some of its last bits of the row's largest, where that cancels. (The least last bit is 2 ^ -9, five times that.)
    """
    assert values.dtype == torch.float8_e4m3fn
    largest = exact.abs().amax(1)
    torch.testing.assert_close(scales.double(), largest.clamp(min=1e-30) / 448, rtol=1e-4, atol=0.0)
    assert (values.double().abs().amax(1)[largest > 0] == 448).all()
    scaled = exact / scales.double()[:, None]
    last_bit = 2.0 ** (scaled.abs().clamp(min=2.0**-6).log2().floor() - 3)
    assert ((values.double() - scaled).abs() <= 0.501 * last_bit + 1e-4 * scaled.abs() + 448 * 2.0**-20).all()


def check_sums(sums: Tensor, rows: Tensor) -> None:
    """Sums of columns: T terms in float32, in any order, are off by up to T 2 ^ -24 of their magnitudes' sum
    (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2).
    """
    exact = rows.double()
    assert ((sums.double() - exact.sum(0)).abs() <= len(rows) * 2.0**-24 * exact.abs().sum(0)).all()


def random_rows(tokens: int, width: int) -> Tensor:
    """Rows of very different sizes, one of zeros."""
    rng = torch.Generator().manual_seed(tokens)
    rows = torch.randn(tokens, width, generator=rng) * 10 ** torch.linspace(-20, 10, tokens)[:, None]
    rows[tokens // 2] = 0
    return rows
