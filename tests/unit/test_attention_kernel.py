"""What of the training kernel can be seen without a GPU: fused states without a copy, its operator's shapes."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

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
