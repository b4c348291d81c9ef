"""Products that overlap with communication, on two to eight GPUs: beside the same by NCCL, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional

from megatron_bert.parallel.overlap import gathered_product, scattered_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs"),
]

RANKS = next((ranks for ranks in (8, 4) if torch.cuda.device_count() >= ranks), 2)
# Of a norm, after a chain of products in bfloat16, whose roundings add up over ranks as their squares do. Another
# rank's tokens, or old ones, give 1.
ROUNDING = 0.02 * (RANKS / 2) ** 0.5


def joined(rank: int, case: Callable[..., None], store: str, arguments: tuple[Any, ...]) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=RANKS, device_id=device)
    case(init_device_mesh("cuda", (RANKS,)), *arguments)
    dist.destroy_process_group()


def spread(case: Callable[..., None], folder: Path, *arguments: Any) -> None:
    torch.multiprocessing.spawn(joined, (case, str(folder / "store"), arguments), nprocs=RANKS)


def gathered_by_nccl(states: Tensor, weight: Tensor, mesh: DeviceMesh) -> Tensor:
    return functional.linear(collectives.all_gather_tensor_autograd(states, 0, mesh), weight)


def scattered_by_nccl(states: Tensor, weight: Tensor, mesh: DeviceMesh) -> Tensor:
    return collectives.reduce_scatter_tensor_autograd(functional.linear(states, weight), "sum", 0, mesh)


def chain(states: Tensor, weights: list[Tensor], mesh: DeviceMesh, gather: Any, scatter: Any) -> Tensor:
    """As many layers as pairs of weights, of two halves each; values stay of one size."""
    for wide, narrow in zip(weights[::2], weights[1::2], strict=True):
        middle = torch.tanh(gather(states, wide, mesh))
        states = functional.layer_norm(states + scatter(middle, narrow, mesh), states.shape[-1:])
    return states


def inputs(mesh: DeviceMesh, tokens: int, width: int, inner: int, layers: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator("cuda").manual_seed(mesh.get_local_rank())

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device="cuda") / shape[-1] ** 0.5
        return values.bfloat16().requires_grad_()

    return drawn(tokens, width), [drawn(*shape) for _ in range(layers) for shape in ((inner, width), (width, inner))]


def assert_near(ours: Tensor, reference: Tensor, name: str) -> None:
    error = (ours.float() - reference.float()).norm() / reference.float().norm()
    assert error < ROUNDING, f"{name}: {float(error)}"


def equals_nccl(mesh: DeviceMesh, tokens: int, width: int, inner: int, layers: int, rounds: int) -> None:
    """Forward and backward, some rounds without a wait between them."""
    states, weights = inputs(mesh, tokens, width, inner, layers)
    gradient = torch.randn_like(states)
    ours = []
    for _ in range(rounds):
        output = chain(states, weights, mesh, gathered_product, scattered_product)
        ours.append((output, torch.autograd.grad(output, [states, *weights], gradient)))
    output = chain(states, weights, mesh, gathered_by_nccl, scattered_by_nccl)
    reference = torch.autograd.grad(output, [states, *weights], gradient)
    for found, gradients in ours:
        assert_near(found, output, "output")
        for number, (one, other) in enumerate(zip(gradients, reference, strict=True)):
            assert_near(one, other, f"gradient {number}")


@pytest.mark.parametrize("shape", [(24, 64, 48), (1000, 320, 640), (4096, 1920, 1440)], ids=str)
def test_equals_nccl(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    spread(equals_nccl, tmp_path, *shape, 6, 20)


def takes_turns(mesh: DeviceMesh) -> None:
    """Also where two of a kind follow each other, as in a recomputed layer, and ranks are not equally far."""
    states, weights = inputs(mesh, 512, 256, 256, 40)
    for round_ in range(20):
        if mesh.get_local_rank() == round_ % 2:
            torch.cuda._sleep(2_000_000)
        ours = [gathered_product(states, weight, mesh) for weight in weights]
        sums = [scattered_product(one, weight, mesh) for one, weight in zip(ours, weights, strict=True)]
    for one, total, weight in zip(ours, sums, weights, strict=True):
        assert_near(one, gathered_by_nccl(states, weight, mesh), "gathered")
        assert_near(total, scattered_by_nccl(one, weight, mesh), "scattered")


def test_takes_turns(tmp_path: Path) -> None:
    spread(takes_turns, tmp_path)


def replays(mesh: DeviceMesh) -> None:
    """A recorded pass computes what it computed when it was not."""
    states, weights = inputs(mesh, 512, 256, 512, 4)

    def run() -> tuple[Tensor, ...]:
        output = chain(states, weights, mesh, gathered_product, scattered_product)
        return output, *torch.autograd.grad(output.float().square().sum(), [states, *weights])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(50):
        graph.replay()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    graph.reset()


def test_replays(tmp_path: Path) -> None:
    spread(replays, tmp_path)
