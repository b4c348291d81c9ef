"""The kernels between a layer's products on a GPU: against their formulas in float64; a step against the ordinary."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional

from megatron_bert.model.attention_kernel import realized_dropout
from megatron_bert.training import execution
from megatron_bert.training.execution import build_objective
from megatron_bert.training.layer_kernels import biased_gelu, residual_norm
from tests.gpu.test_training_on_gpu import CUDA, model
from tests.unit.interpreted_layer_kernels import gelu_beside_its_formula
from tests.unit.test_step import packed
from tests.unit.test_training_parts import batch

pytestmark = pytest.mark.gpu


def random_inputs(tokens: int, width: int) -> list[Tensor]:
    """The product, its bias, the residual, the norm's weight and bias, and the gradients of both results."""
    rng = torch.Generator("cuda").manual_seed(tokens)
    wide, narrow = (tokens, width), (width,)
    inputs = [
        torch.randn(shape, generator=rng, device=CUDA) for shape in (wide, narrow, wide, narrow, narrow, wide, wide)
    ]
    return [states.bfloat16() if states.shape == wide else states for states in inputs]


def check(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Off by roundings to bfloat16, relative to the largest value: a row's or a column's terms are all alike."""
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).abs().max() <= 1e-2 * other.abs().max()


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("tokens", "width"), [(4099, 1024), (1003, 384), (517, 2560), (33, 8192), (3, 24)])
def test_residual_dropout_norm(tokens: int, width: int, dropout: float) -> None:
    inputs = random_inputs(tokens, width)
    seed = torch.tensor([7], device=CUDA) if dropout else None
    settings = {"eps": 1e-5, "dropout": dropout, "seed": seed, "site": 3}
    leaves = [states.clone().requires_grad_() for states in inputs[:5]]
    results = residual_norm(*leaves, **settings)
    torch.autograd.backward(results, inputs[5:])
    found = [*results, *(leaf.grad for leaf in leaves)]

    keep, mask = 1 - realized_dropout(dropout), torch.ones_like(inputs[0])
    if dropout:  # a product of ones shows it
        zeros = torch.zeros_like(inputs[1])
        shown, _ = residual_norm(mask, zeros, 0 * mask, zeros, zeros, **settings)
        mask = (shown > 0).to(mask.dtype)
        assert abs(mask.double().mean().item() - keep) < 5 * (keep * (1 - keep) / mask.numel()) ** 0.5
    leaves = [states.double().requires_grad_() for states in inputs[:5]]
    total = leaves[2] + (leaves[0] + leaves[1]) * mask / keep
    wanted = [total, functional.layer_norm(total, (width,), *leaves[3:], 1e-5)]
    torch.autograd.backward(wanted, [grad.double() for grad in inputs[5:]])
    check(found, [*wanted, *(leaf.grad for leaf in leaves)])


@pytest.mark.parametrize(("tokens", "width"), [(4099, 4096), (1003, 1536), (3, 40)])
def test_gelu(tokens: int, width: int) -> None:
    product, bias, _, _, _, grad, _ = random_inputs(tokens, width)
    check(*gelu_beside_its_formula(product, bias, grad))


def test_gelu_is_exact() -> None:
    product = torch.linspace(-6, 6, 4096, device=CUDA)[None].requires_grad_()
    activated = biased_gelu(product, torch.zeros(4096, device=CUDA))
    activated.sum().backward()
    exact = product.detach().double().requires_grad_()
    wanted = functional.gelu(exact)
    wanted.sum().backward()
    assert (activated.double() - wanted).abs().max() < 1e-6
    assert (product.grad.double() - exact.grad).abs().max() < 1e-6


def loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, fused: bool, dropout: float = 0.0, recompute: str = "none", is_packed: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a compiled step; with `fused`, on our kernels, which is looked for."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(execution, "_OWN_KERNELS", fused)
    network = model(dropout)
    objective = build_objective(
        network, CUDA, precision="bfloat16", rows=6, row_tokens=40, predicted_share=0.15, recompute=recompute,
        compiled=True,
    )  # fmt: skip
    micro = objective.micro_batch(packed(batch()) if is_packed else batch())
    objective(micro).masked_lm.backward()  # compiles
    network.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.manual_seed(3)
        loss = objective(micro).masked_lm
        loss.backward()
        torch.cuda.synchronize()
    names = {event.name for event in profile.events()}
    assert ({"norm_forward", "norm_backward", "gelu_forward", "gelu_backward"} <= names) == fused
    gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_step_is_the_ordinary_one_without_a_graph_break(is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout. Both are off from the exact by roundings to bfloat16 (2 ** -9), of several products."""
    wanted, exact = loss_and_gradients(monkeypatch, False, is_packed=is_packed)
    found, gradients = loss_and_gradients(monkeypatch, True, is_packed=is_packed)
    assert not counters["graph_break"]
    assert found.item() == pytest.approx(wanted.item(), rel=5e-3)
    assert gradients.keys() == exact.keys()
    for name, grad in gradients.items():
        if not name.endswith("key.bias"):  # softmax does not see it: rounding alone
            assert (grad - exact[name]).norm() <= 5e-2 * exact[name].norm(), name


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_the_generator_decides(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers from the same seed, also where attention is computed again in between."""
    one, other = (loss_and_gradients(monkeypatch, True, dropout=0.1, recompute=recompute) for _ in range(2))
    assert torch.equal(one[0], other[0])
    for name, grad in one[1].items():
        if ".layer." in name:  # embeddings' gradients are added up in no fixed order
            assert torch.equal(grad, other[1][name]), name
    dry, _ = loss_and_gradients(monkeypatch, True, recompute=recompute)
    assert one[0] != dry


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_with_dropout_is_that_of_the_drawn_masks(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope of the loss along its own gradient, from both sides with the same draws. In bfloat16, roughly."""
    torch._dynamo.reset()
    monkeypatch.setattr(execution, "_OWN_KERNELS", fused)
    network = model(0.1)
    objective = build_objective(
        network, CUDA, precision="bfloat16", rows=6, row_tokens=40, predicted_share=0.15, compiled=True
    )
    micro = objective.micro_batch(packed(batch()))

    def loss() -> Tensor:
        torch.manual_seed(3)
        return objective(micro).masked_lm / micro.num_masked

    loss().backward()
    moved = [one for one in network.bert.encoder.parameters() if one.grad is not None]
    norm = torch.stack([one.grad.norm() for one in moved]).norm()
    losses, step = [], 0.02
    for sign in (1, -2):
        with torch.no_grad():
            for one in moved:
                one += sign * step / norm * one.grad
        losses.append(loss().item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(norm.item(), rel=0.1)
