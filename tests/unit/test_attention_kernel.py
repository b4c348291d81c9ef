"""What of the training kernel can be seen without a GPU: fused states without a copy, its operator's shapes."""

import logging

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from megatron_bert.model import attention
from megatron_bert.model.attention_kernel import applies, joined, packed_attention, realized_dropout

TOKENS, HEADS, SIZE = 6, 2, 64


def thirds(product: torch.Tensor) -> list[torch.Tensor]:
    """As the network makes them: (1, T, 3 N H) -> three of (1, N, T, H) -> three of (T, N, H)."""
    parts = [part.view(1, TOKENS, HEADS, SIZE).transpose(1, 2) for part in product.chunk(3, dim=-1)]
    return [part[0].transpose(0, 1) for part in parts]


def test_thirds_of_one_product_are_joined_without_a_copy() -> None:
    product = torch.randn(1, TOKENS, 3 * HEADS * SIZE)
    parts = thirds(product)
    whole = joined(*parts)
    assert whole.data_ptr() == product.data_ptr()
    assert torch.equal(whole, torch.stack(parts, dim=1))


@pytest.mark.parametrize("order", [(0, 0, 0), (2, 1, 0), (1, 1, 2)])
def test_other_views_are_copied(order: tuple[int, int, int]) -> None:
    product = torch.randn(1, TOKENS, 3 * HEADS * SIZE)
    parts = [thirds(product)[place] for place in order]
    assert torch.equal(joined(*parts), torch.stack(parts, dim=1))


def test_separate_states_are_copied() -> None:
    parts = [torch.randn(TOKENS, HEADS, SIZE) for _ in range(3)]
    assert torch.equal(joined(*parts), torch.stack(parts, dim=1))


def test_the_gradient_of_joined_thirds_is_that_of_the_product() -> None:
    product = torch.randn(1, TOKENS, 3 * HEADS * SIZE, requires_grad=True)
    weights = torch.randn(TOKENS, 3, HEADS, SIZE)
    (found,) = torch.autograd.grad((joined(*thirds(product * 1)) * weights).sum(), product)
    assert torch.equal(found.view_as(weights), weights)


def test_a_compiled_graph_joins_without_a_copy() -> None:
    """Nor with one in its backward pass."""
    targets: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def weigh(product: torch.Tensor) -> torch.Tensor:
        return joined(*thirds(product * 1)) * weights

    product = torch.randn(1, TOKENS, 3 * HEADS * SIZE, requires_grad=True)
    weights = torch.randn(TOKENS, 3, HEADS, SIZE)
    torch.compile(weigh, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(product).sum().backward()
    assert product.grad is not None
    assert torch.equal(product.grad.view_as(weights), weights)
    assert "aten.mul.Tensor" in targets
    assert not any(name in target for target in targets for name in ("stack", "cat", "slice", "copy"))


def test_shapes_forward_and_backward_without_a_device() -> None:
    qkv = torch.empty(TOKENS, 3, HEADS, SIZE, device="meta", dtype=torch.bfloat16, requires_grad=True)
    boundaries = torch.empty(3, dtype=torch.int32, device="meta")
    context = packed_attention(qkv, boundaries, 4, False, 0.125, 0.1)
    assert (context.shape, context.dtype) == ((TOKENS, HEADS, SIZE), torch.bfloat16)
    context.sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.shape == qkv.shape


def test_dropout_is_rounded_to_what_is_drawn() -> None:
    assert realized_dropout(0.1) == 26 / 256
    assert realized_dropout(0.5) == 0.5


def test_a_cpu_never_takes_it() -> None:
    assert not applies(torch.zeros(1, 2, 3, SIZE, dtype=torch.bfloat16, requires_grad=True), 3, 0.1)


@pytest.mark.parametrize(
    ("capability", "head_size", "is_built", "reason"),
    [
        ((9, 0), 64, True, None),
        ((8, 0), 256, True, None),
        ((7, 5), 64, True, "needs compute capability 8.0, and this GPU has 7.5"),
        ((9, 0), 264, True, "heads of 264"),
        ((9, 0), 60, True, "heads of 60"),
        ((9, 0), 64, False, "built without FlashAttention"),
    ],
)
def test_why_the_variable_length_kernel_is_not_used(capability, head_size, is_built, reason):
    """What FlashAttention 2 asks for: https://github.com/Dao-AILab/flash-attention, README, "NVIDIA CUDA Support"."""
    found = attention.varlen_refusal(capability, head_size, is_built=is_built)
    assert (found is None) if reason is None else (reason in found)


def test_that_it_is_not_used_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    attention._asked_for_varlen.cache_clear()

    def chooses(states):
        return states + 1 if attention._has_varlen(0, states.shape[-1]) else states - 1

    compiled = torch.compile(chooses, backend="eager", fullgraph=True, dynamic=False)
    with caplog.at_level(logging.WARNING, logger="megatron_bert"):
        results = [function(torch.zeros(length, 64)) for function in (compiled, chooses) for length in (2, 3)]
    attention._asked_for_varlen.cache_clear()
    assert all((states == -1).all() for states in results)
    (record,) = caplog.records
    assert "attention runs padded" in record.message
