"""The walk on operators of our own between products (`training/fused_layers.py`), in each process of a world.

The operators need a GPU and Triton, and their formulas stand in for them. Where Triton is told to interpret
(TRITON_INTERPRET=1), they run themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from megatron_bert.parallel.parallelize import parallelize
from megatron_bert.training import execution, fused_layers, layer_kernels
from megatron_bert.training.fused_layers import BFLOAT16, BFLOAT16_ON_RANKS, can_be_fused, walk_layers
from tests.distributed import cases
from tests.distributed.cases import assert_close, build, mesh_of, step_batches, whole
from tests.distributed.dropout_cases import ATTENTION_SHARE, HIDDEN_SHARE, IDS, of_all_ranks
from tests.distributed.layer_cases import TOKENS, hidden, twins

FORMULAS = os.environ.get("TRITON_INTERPRET") != "1"


def residual_norm(
    product: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor,
    *, eps: float, dropout: float, seed: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    states = product + bias
    if seed is not None:
        generator = torch.Generator().manual_seed(int(seed) + site)
        states = states * (torch.rand(states.shape, generator=generator) >= dropout) / (1 - dropout)
    total = (residual + states).to(residual.dtype)
    return total, functional.layer_norm(total.float(), weight.shape, weight, shift, eps).to(product.dtype)


def biased_gelu(product: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(product + bias).to(product.dtype)


@contextmanager
def operators() -> Iterator[None]:
    formulas = {"residual_norm": residual_norm, "biased_gelu": biased_gelu}
    with (
        patch.multiple(fused_layers, **(formulas if FORMULAS else {"_WIDEST": fused_layers._WIDEST})),
        patch.dict(layer_kernels._NORM_BACKWARD, programs=3),
        patch.dict(layer_kernels._GELU_BACKWARD, programs=3),
    ):
        yield


def walk(model: Any, together: int = 2, **options: Any) -> None:
    assert can_be_fused(model)
    walk_layers(model, together, BFLOAT16_ON_RANKS, **{"compiled": False, **options})


def equals_single_process(**layout: Any) -> None:
    """As the other layouts: losses, gradients and their norm, weights after two steps."""
    with operators():
        cases.equals_single_process(prepare=walk, **layout)


def compiled(*, sequence_parallel: bool) -> None:
    """Two layers, one at a time, are one graph, and the norm before them another. In bfloat16 they compute what the
    parallel layers do: both are off by roundings (2 ** -9), of several terms.
    """
    counter, results = CompileCounterWithBackend("aot_eager"), []
    with operators():
        for is_walked in (False, True):
            _, model, _ = twins(sequence_parallel)
            if is_walked:
                walk(model, together=1, compiled=True, backend=counter, fullgraph=True)
            states = hidden(TOKENS - 1)
            with torch.autocast("cpu", torch.bfloat16):
                output = model.bert.encoder(states.bfloat16())
            (output.float() * hidden(TOKENS - 1, seed=2).detach()).sum().backward()
            results.append([states.grad, *(one.grad for one in model.bert.encoder.parameters()), output.float()])
    assert output.dtype == torch.bfloat16
    for reference, ours in zip(*results, strict=True):
        assert float(whole(ours - reference).norm()) <= 3e-2 * max(float(whole(reference).norm()), 1.0)
    assert counter.frame_count == 2, f"{counter.frame_count} graphs"


def drops_as_single_process() -> None:
    """Every rank draws the masks that one process does from the same seed: losses and gradients are its own."""
    batches, found = step_batches(1, packed=True), []
    for mesh in (None, mesh_of(dist.get_world_size())):
        model = build(hidden_dropout_prob=HIDDEN_SHARE).train()
        if mesh is None:
            walk_layers(model, 2, BFLOAT16, compiled=False)
        else:
            parallelize(model, mesh, prepare_layers=walk)
        torch.manual_seed(11)
        with operators():
            found.append((cases.add_gradients(model, batches, mesh), model))
    (expected, reference), (loss, ours) = found
    assert abs(loss - expected) <= cases.TOLERANCE * expected
    scale = max(float(parameter.grad.norm()) for parameter in reference.parameters())
    for (name, parameter), twin in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert_close(parameter.grad, twin.grad, f"gradient of {name}", scale=1e-2 * scale)


def streams(*, sequence_parallel: bool) -> None:
    """What is kept is the same on every rank, or each one's own under sequence parallelism; layers and passes
    differ.
    """
    model = build(hidden_dropout_prob=HIDDEN_SHARE, attention_probs_dropout_prob=ATTENTION_SHARE).train()
    parallelize(model, mesh_of(dist.get_world_size(), sequence_parallel), prepare_layers=walk)
    kept: list[Tensor] = []
    torch.manual_seed(11)
    with operators():
        operator = fused_layers.residual_norm

        def watched(
            product: Tensor, bias: Tensor, residual: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            total, normed = operator(product, bias, residual, *args, **kwargs)
            kept.append(total != residual)
            return total, normed

        with patch.object(fused_layers, "residual_norm", watched):
            outputs = [model.bert(IDS).last_hidden_state for _ in range(2)]
    for output in outputs:
        first, *others = of_all_ranks(output.detach())
        assert all(torch.equal(first, other) for other in others), "replicated activations differ between ranks"
    assert len(kept) == 2 * 2 * 2
    for number, mask in enumerate(kept):
        ranks = of_all_ranks(mask.byte())
        same = [torch.equal(ranks[0], other) for other in ranks[1:]]
        assert not any(same) if sequence_parallel else all(same)
        assert not any(torch.equal(mask, other) for other in kept[:number])
        share = 1 - float(mask.float().mean())
        assert abs(share - HIDDEN_SHARE) < 4 * (HIDDEN_SHARE * (1 - HIDDEN_SHARE) / mask.numel()) ** 0.5 + 1 / 512


def chosen(*, precision: str = "bfloat16", recompute: str = "none", fused: bool = True, **layout: Any) -> str | None:
    """Which walk a model on GPUs of this layout gets, and how many layers at a time."""
    model, mesh = build(), mesh_of(**layout)
    with patch.object(execution, "walk_layers") as walked:
        execution.make_ready(
            model, torch.device("cuda"), precision=precision, recompute=recompute, compiled=True, mesh=mesh, fused=fused
        )
    if not walked.called:
        return None
    _, together, steps = walked.call_args.args
    return f"{'on ranks' if steps is BFLOAT16_ON_RANKS else 'whole'}, {together} together"
