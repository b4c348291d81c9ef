"""How a model is run while it is trained: number type, fused projections, recomputation, compilation.

All of it is put onto a finished model from outside: `model/` knows nothing of it, names and weights stay what they are,
and so does what is computed, up to rounding.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_bert.errors import UserError
from megatron_bert.parallel.loss import token_losses_on
from megatron_bert.parallel.mesh import ParallelMesh
from megatron_bert.parallel.parallelize import parallelize
from megatron_bert.planning.layout import Recompute
from megatron_bert.training.float8 import check_layers
from megatron_bert.training.float8_layers import walk_layers_in_float8
from megatron_bert.training.fused_layers import BFLOAT16, BFLOAT16_ON_RANKS, can_be_fused, walk_layers
from megatron_bert.training.graphs import PassGraphs
from megatron_bert.training.microbatch import FixedShapes
from megatron_bert.training.objective import Objective, TokenLosses, token_losses

__all__ = [
    "build_objective",
    "fuse_projections",
    "make_ready",
    "pass_graphs",
    "recompute_activations",
    "should_compile",
]

log = logging.getLogger(__name__)

_OWN_KERNELS = True  # for what lies between products, where they can; benchmarks turn it off
_LAYERS_TOGETHER = 4  # on an H100, 345M: a step is 2 % shorter than with single layers, and no shorter with all 24


def build_objective(
    model: nn.Module,
    device: torch.device,
    *,
    precision: str,
    rows: int,
    row_tokens: int,
    predicted_share: float,
    recompute: Recompute = "none",
    compiled: bool = False,
    mesh: ParallelMesh | None = None,
    keeps_layers: bool = False,
    cuda_graphs: bool = False,
) -> Objective:
    """The objective of a model, ready to be trained: on `device` already, or on the meta device and given memory there
    afterwards (see `parallelize`).

    Args:
        rows, row_tokens: of the largest micro-batch; with `compiled`, every one is filled up to them.
        predicted_share: of the tokens, those that are expected to be predicted.
        mesh: spread the model over these ranks.
        keeps_layers: see `parallelize`.
        cuda_graphs: record passes, where `pass_graphs` has them recorded.

    Raises:
        UserError: the model's shape cannot be split so, or not be computed in this precision.
    """
    make_ready(
        model,
        device,
        precision=precision,
        recompute=recompute,
        compiled=compiled,
        mesh=mesh,
        keeps_layers=keeps_layers,
    )
    computes: TokenLosses = torch.compile(token_losses, dynamic=False) if compiled else token_losses
    if mesh is not None and mesh.tensor_degree > 1:
        computes = token_losses_on(mesh.region, compiled=compiled)
    return Objective(
        model,
        device,
        precision,
        token_losses=computes,
        shapes=FixedShapes(rows, row_tokens, predicted_share) if compiled else None,
        graphs=pass_graphs(device, precision, recompute) if cuda_graphs and compiled else None,
    )


def make_ready(
    model: nn.Module,
    device: torch.device,
    *,
    precision: str,
    recompute: Recompute = "none",
    compiled: bool = False,
    mesh: ParallelMesh | None = None,
    keeps_layers: bool = False,
    fused: bool = True,
) -> None:
    """Puts onto a model how it is run; see `build_objective`, whose arguments these are.

    Args:
        fused: may the projections be fused; not where something is put between them and their weights.

    Raises:
        UserError: the model's shape cannot be split so, or not be computed in this precision.
    """
    has_hooks = recompute == "full" or (mesh is not None and mesh.is_sharded)  # around each layer
    together = 1 if has_hooks else _LAYERS_TOGETHER
    is_free = fused and not has_hooks  # nothing is put around or into a layer
    on_ranks, overlaps = mesh is not None and mesh.tensor_degree > 1, mesh is not None and mesh.overlap
    # The ranks' own masks stop a compiler in attention, or under sequence parallelism are around all layers.
    stops = on_ranks and not (mesh and mesh.sequence_parallel)
    may_walk = _OWN_KERNELS and is_free and device.type == "cuda" and precision == "bfloat16"

    def prepare(model: Any) -> None:
        if precision != "float32":
            _residuals_in(torch.bfloat16, model)
        if precision == "float8":
            check_layers(model, is_whole=is_free and not on_ranks)
        elif device.type == "cuda" and fused and not overlaps:  # whose layers do so themselves
            fuse_projections(model)
        recompute_activations(model, "selective" if recompute == "selective" else "none")
        if precision == "float8":
            walk_layers_in_float8(model, together, compiled=compiled)
        elif compiled and may_walk and can_be_fused(model):
            walk_layers(model, 1 if stops else together, BFLOAT16_ON_RANKS if on_ranks else BFLOAT16)
        elif compiled:
            _compile_layers(model, together)
        recompute_activations(model, "full" if recompute == "full" else "none")  # around what is compiled

    if mesh is None:
        prepare(model)
    else:
        parameter_dtype = None if precision == "float32" else torch.bfloat16
        parallelize(model, mesh, prepare_layers=prepare, parameter_dtype=parameter_dtype, keeps_layers=keeps_layers)


def pass_graphs(device: torch.device, precision: str, recompute: Recompute) -> PassGraphs | None:
    """Where compiled passes are recorded: on a GPU, with no random stream wound back; not in float32, in which
    attention to packed sequences has no kernel of fixed shapes.
    """
    return PassGraphs(device) if device.type == "cuda" and recompute == "none" and precision != "float32" else None


def should_compile(wanted: bool | None, device: torch.device) -> bool:
    """What is wanted; where nothing is said, whether this device gains by it: a GPU with Triton.

    Raises:
        UserError: it is wanted on a GPU, and Triton is not there.
    """
    if wanted is False or device.type != "cuda" or importlib.util.find_spec("triton") is not None:
        return device.type == "cuda" if wanted is None else wanted
    if wanted:
        raise UserError("runtime.compile needs Triton on a GPU: pip install triton, or leave it out")
    log.warning("Triton is not installed: neither compiled layers nor its attention kernel, so training is slower")
    return False


def recompute_activations(model: nn.Module, what: Recompute) -> None:
    """Has the backward pass compute activations again instead of keeping them; dropout draws the same numbers twice.

    `selective` is the attention core of Korthikanti et al. 2022 (arXiv 2205.05198, section 5): scores, softmax, its
    dropout and the product with the values, which are large and cheap. A fused attention kernel does that on its own,
    and little is left to gain. `full` keeps each layer's input only.
    """
    for layer in _layers(model):
        if what == "selective":
            attention = layer.attention.self
            # Not traced: a compiler would have to replay the random numbers of a kernel that it does not know.
            attention.core = torch.compiler.disable(_recomputed(attention.core))  # type: ignore[no-untyped-call]
        elif what == "full":
            layer.forward = _recomputed(layer.forward)


def fuse_projections(model: nn.Module) -> None:
    """Computes queries, keys and values in one product, which fills a GPU better than three; the weights stay apart."""
    for layer in _layers(model):
        attention = layer.attention.self
        attention.projections = MethodType(_fused_projections, attention)


def _fused_projections(self: Any, hidden_states: Tensor) -> tuple[Tensor, ...]:
    parts = (self.query, self.key, self.value)
    weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    return functional.linear(hidden_states, weight, bias).chunk(3, dim=-1)


def _compile_layers(model: Any, together: int) -> None:
    """Compiles runs of layers, all by the same code: what ends a layer and what begins the next then share a kernel."""
    layers = _layers(model)
    if together == 1:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        return
    run = torch.compile(_run_layers, dynamic=False)
    groups = [layers[at : at + together] for at in range(0, len(layers), together)]
    encoder = model.bert.encoder

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for group in groups:
            hidden_states = run(group, hidden_states, *args, **kwargs)
        normed: Tensor = encoder.ln(hidden_states)
        return normed

    encoder.forward = forward


def _run_layers(layers: list[Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    for layer in layers:
        hidden_states = layer.forward(hidden_states, *args, **kwargs)
    return hidden_states


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return call


def _residuals_in(dtype: torch.dtype, model: Any) -> None:
    """Has the residual stream carried in `dtype` while autocast is on, as a network whose weights are of that type
    does. Autocast alone leaves it as wide as the embeddings' weights, and twice the bytes go through memory.
    """
    model.bert.embeddings.dropout.register_forward_pre_hook(partial(_narrowed, dtype))


def _narrowed(dtype: torch.dtype, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    states = args[0]
    return (states.to(dtype) if torch.is_autocast_enabled(states.device.type) else states,)


def _layers(model: Any) -> list[Any]:
    return list(model.bert.encoder.layer)
