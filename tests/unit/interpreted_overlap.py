"""The sum over ranks' slots of products that overlap, run by Triton's interpreter; see `test_layer_kernels`."""

import pytest
import torch

from megatron_bert.parallel.overlap import summed


@pytest.mark.parametrize(("ranks", "tokens", "width"), [(2, 3, 8), (3, 17, 130), (8, 64, 48)])
def test_summed(ranks: int, tokens: int, width: int) -> None:
    """In float32, for the interpreter cuts off where a GPU rounds to bfloat16; see `test_cast_rows` for the bound."""
    slots = torch.randn(ranks, tokens, width, generator=torch.Generator().manual_seed(0))
    exact = slots.double()
    assert ((summed(slots).double() - exact.sum(0)).abs() <= ranks * 2.0**-24 * exact.abs().sum(0)).all()
