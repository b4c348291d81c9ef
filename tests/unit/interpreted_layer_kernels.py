"""The kernels between a layer's products, run by Triton's interpreter on a CPU, against their formulas in float64.

Not collected by itself: `test_layer_kernels` runs it in a process of its own, where Triton is told to interpret.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_bert.model.attention_kernel import realized_dropout
from megatron_bert.training import layer_kernels
from megatron_bert.training.layer_kernels import biased_gelu, residual_norm

# tokens, width, elements of a program at once: rows that fill no program, widths that fill no tile, one row a program
SHAPES = [(37, 24, 128), (5, 64, 16), (9, 130, 1024)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes on to several tiles."""
    monkeypatch.setitem(layer_kernels._NORM_BACKWARD, "programs", 3)
    monkeypatch.setitem(layer_kernels._GELU_BACKWARD, "programs", 3)


def sized(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setitem(layer_kernels._NORM_FORWARD, "elements", elements)
    monkeypatch.setitem(layer_kernels._NORM_BACKWARD, "elements", elements)


def random_inputs(tokens: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """The product, its bias, the residual, the norm's weight and bias, and the gradients of both results."""
    rng = torch.Generator().manual_seed(tokens)
    wide, narrow = (tokens, width), (width,)
    inputs = [torch.randn(shape, generator=rng) for shape in (wide, narrow, wide, narrow, narrow, wide, wide)]
    return [states.to(dtype) if states.shape == wide else states for states in inputs]


def drawn_mask(tokens: int, width: int, dropout: float, seed: int, site: int = 0) -> Tensor:
    """What is kept: where a product of ones comes through."""
    zeros = torch.zeros(width)
    total, _ = residual_norm(
        torch.ones(tokens, width), zeros, torch.zeros(tokens, width), zeros, zeros,
        eps=1e-5, dropout=dropout, seed=torch.tensor([seed]), site=site,
    )  # fmt: skip
    keep = 1 - realized_dropout(dropout)
    assert torch.equal(total.unique(), torch.tensor([0.0, 1 / keep]))
    return total > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("tokens", "width", "elements"), SHAPES)
def test_residual_dropout_norm(
    tokens: int, width: int, elements: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized(monkeypatch, elements)
    inputs = random_inputs(tokens, width, torch.float32)
    leaves = [states.clone().requires_grad_() for states in inputs[:5]]
    seed = torch.tensor([7]) if dropout else None
    results = residual_norm(*leaves, eps=1e-5, dropout=dropout, seed=seed, site=3)
    torch.autograd.backward(results, inputs[5:])
    found = [leaf.grad for leaf in leaves]

    mask = drawn_mask(tokens, width, dropout, 7, 3) if dropout else torch.ones(tokens, width)
    product, bias, residual, weight, shift = leaves = [states.double().requires_grad_() for states in inputs[:5]]
    total = residual + (product + bias) * mask / (1 - realized_dropout(dropout))
    wanted = (total, functional.layer_norm(total, (width,), weight, shift, 1e-5))
    torch.autograd.backward(wanted, [grad.double() for grad in inputs[5:]])
    for one, other in zip((*results, *found), (*wanted, *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_bfloat16_states_and_an_unused_sum() -> None:
    """As after the last layer. Results are off by a rounding to bfloat16 (2 ** -9), of several terms."""
    *inputs, _, grad = random_inputs(33, 24, torch.bfloat16)
    product, bias, residual, weight, shift = (states.requires_grad_() for states in inputs)
    total, normed = residual_norm(
        product[None], bias, residual[None], weight, shift, eps=1e-5, dropout=0.0, seed=None, site=0
    )
    assert total.dtype == normed.dtype == torch.bfloat16
    assert total.shape == normed.shape == (1, 33, 24)
    normed.backward(grad[None])
    leaves = [states.detach().double().requires_grad_() for states in inputs]
    sums = leaves[2] + leaves[0] + leaves[1]
    functional.layer_norm(sums, (24,), *leaves[3:], 1e-5).backward(grad.double())
    found = [states.grad for states in inputs]
    assert [one.dtype for one in found] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    for one, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(one.double(), leaf.grad, rtol=2e-2, atol=2e-2 * leaf.grad.abs().max().item())


def test_masks_are_random() -> None:
    """Kept as often as said; neighbours, rows, sites and seeds are not correlated."""
    keep, shape = 1 - realized_dropout(0.1), (96, 256)
    kept = torch.stack([
        torch.stack([drawn_mask(*shape, 0.1, seed, site) for site in range(3)]) for seed in (1, 2)
    ])  # fmt: skip
    deviations = (kept.double() - keep) / (keep * (1 - keep)) ** 0.5  # (seeds, sites, T, D)
    size = deviations.numel()
    assert abs(deviations.mean()) * size**0.5 < 5
    shifts = [(0, 0, rows, columns) for rows in (0, 1, 2, 4, 16) for columns in (0, 1, 2, 3, 4, 8, 64)]
    for shift in [*shifts[1:], (0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0), (0, 1, 1, 0)]:
        correlation = (deviations * deviations.roll(shift, (0, 1, 2, 3))).mean()
        assert abs(correlation) * size**0.5 < 5, shift


def gelu_beside_its_formula(product: Tensor, bias: Tensor, grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The activated states and both gradients: as found, and in float64 by the formula."""
    leaves = [product.clone().requires_grad_(), bias.clone().requires_grad_()]
    activated = biased_gelu(*leaves)
    activated.backward(grad)
    exact = [product.double().requires_grad_(), bias.double().requires_grad_()]
    wanted = functional.gelu(exact[0] + exact[1])
    wanted.backward(grad.double())
    return [activated, *(leaf.grad for leaf in leaves)], [wanted, *(leaf.grad for leaf in exact)]


@pytest.mark.parametrize(("tokens", "width"), [(37, 24), (9, 300)])
def test_gelu(tokens: int, width: int) -> None:
    product, bias, _, _, _, grad, _ = random_inputs(tokens, width, torch.float32)
    for one, other in zip(*gelu_beside_its_formula(3 * product, bias, grad), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_operators_are_registered_well() -> None:
    product, bias, residual, weight, shift, _, _ = random_inputs(6, 24, torch.float32)
    arguments = [states.requires_grad_() for states in (product, bias, residual, weight, shift)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    seed = torch.tensor([5])
    torch.library.opcheck(layer_kernels.norm_forward, (*arguments, seed, 1, 0.1, 1e-5), test_utils=tests)
    torch.library.opcheck(layer_kernels.gelu_forward, (product, bias), test_utils=tests)
