"""Dropout on several ranks, in each process of a world."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.parallel.parallelize import parallelize
from megatron_bert.parallel.streams import own_stream
from tests.distributed.cases import build, mesh_of, recompute_layers

HIDDEN_SHARE, ATTENTION_SHARE = 0.3, 0.4
IDS = torch.arange(4 * 30).remainder(60).view(4, 30)


def dropping_model(sequence_parallel: bool) -> Any:
    model = build(hidden_dropout_prob=HIDDEN_SHARE, attention_probs_dropout_prob=ATTENTION_SHARE)
    model.set_attn_implementation("eager")  # whose probabilities can be looked at
    parallelize(model, mesh_of(dist.get_world_size(), sequence_parallel))
    return model.train()


def masks(model: Any, ids: Tensor = IDS) -> tuple[dict[str, Tensor], Tensor]:
    """What each dropout dropped (True) in a forward pass, by the module's name, and the last hidden states."""
    found: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        if isinstance(module, nn.Dropout) and not name.endswith(".self.dropout"):
            return module.register_forward_hook(lambda _, args, output: found.update({name: output == 0.0}))
        if name.endswith(".self"):
            return module.register_forward_hook(lambda _, args, output: found.update({name: output[1] == 0.0}))
        return None

    handles = [handle for name, module in model.named_modules() if (handle := watch(name, module))]
    output = model.bert(ids).last_hidden_state
    for handle in handles:
        handle.remove()
    return found, output


def of_all_ranks(values: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values.contiguous())
    return gathered


def streams(*, sequence_parallel: bool) -> None:
    """Bit-equal where it is the same value, different where it is not, and the right share everywhere."""
    model = dropping_model(sequence_parallel)
    torch.manual_seed(11)
    found, output = masks(model)
    first, *others = of_all_ranks(output.detach())
    assert all(torch.equal(first, other) for other in others), "replicated activations differ between ranks"
    assert len(found) == 1 + 2 * 3
    for name, dropped in found.items():
        own = name.endswith(".self") or (sequence_parallel and ".layer." in name)
        ranks = of_all_ranks(dropped.byte())
        same = [torch.equal(ranks[0], other) for other in ranks[1:]]
        assert not any(same) if own else all(same), name
        share = ATTENTION_SHARE if name.endswith(".self") else HIDDEN_SHARE
        seen, num = float(torch.cat(ranks).float().mean() if own else dropped.float().mean()), dropped.numel()
        num *= len(ranks) if own else 1
        assert abs(seen - share) < 4 * (share * (1 - share) / num) ** 0.5, f"{name}: {seen} dropped"
    attention = [dropped for name, dropped in found.items() if name.endswith(".self")]
    assert not torch.equal(*attention), "two layers drop the same"
    again, _ = masks(model)
    assert not any(torch.equal(found[name], again[name]) for name in found), "two passes drop the same"


def restored(*, sequence_parallel: bool) -> None:
    """The common stream's state is all there is to save."""
    model = dropping_model(sequence_parallel)
    torch.manual_seed(dist.get_rank())  # anything
    torch.manual_seed(12)
    masks(model)
    state = torch.get_rng_state()
    found, output = masks(model)
    torch.manual_seed(13)
    torch.set_rng_state(state)
    again, output_again = masks(model)
    assert torch.equal(output, output_again)
    assert all(torch.equal(found[name], again[name]) for name in found)


def recomputed(*, sequence_parallel: bool) -> None:
    """The backward pass's second forward pass drops what the first one did."""
    gradients = []
    for recompute in (False, True):
        model = dropping_model(sequence_parallel)
        if recompute:
            recompute_layers(model)
        torch.manual_seed(14)
        outputs = [model.bert(IDS + shift).last_hidden_state for shift in (0, 1)]  # two in flight
        sum(output.square().sum() for output in outputs).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.to_local(), reference.to_local(), rtol=1e-6, atol=1e-6)


def seeds(tensor: int) -> int:
    return mesh_of(tensor).stream_seed(1234)


def common_stream_moves_alike() -> tuple[float, float]:
    """A number drawn after a region in which the ranks drew different amounts, and one drawn within."""
    torch.manual_seed(15)
    with own_stream(dist.get_rank(), torch.device("cpu")):
        own = float(torch.rand(1 + dist.get_rank())[0])
    return float(torch.rand(())), own
