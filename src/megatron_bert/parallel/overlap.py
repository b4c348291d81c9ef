"""Products that go on while their operands travel: what PyTorch calls asynchronous tensor parallelism.

Under sequence parallelism (arXiv 2205.05198, section 4.2.2) a column-parallel product follows an all-gather of tokens,
and a reduce-scatter follows a row-parallel one; in the backward pass it is the other way round. Here a rank writes what
another one needs into that one's memory (symmetric memory: each GPU of a host sees the others'), and multiplies
meanwhile. The copies take no multiprocessor. (PyTorch has such operators, too, `symm_mem.fused_all_gather_matmul` and
`fused_matmul_reduce_scatter`, with three barriers each, a copy more, and a sum apart from the products.)

T tokens of all ranks, one rank's after the other's; t = T / degree of one; K input and N output features.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.device_mesh import DeviceMesh

from megatron_bert.errors import UserError

__all__ = ["check_overlap", "forget_the_last", "gathered_product", "scattered_product", "summed"]


def check_overlap(mesh: DeviceMesh) -> None:
    """Raises `UserError` where a tensor-parallel group is not of GPUs of one host that reach each other's memory."""
    if mesh.device_type != "cuda":
        raise UserError("mesh.overlap copies from one GPU's memory to another's: leave it out on CPUs")
    here, devices = torch.cuda.current_device(), range(torch.cuda.device_count())
    of_host = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.size()))  # in order: groups that divide them are within it
    if (
        mesh.size() > len(devices)
        or of_host % mesh.size()
        or not all(torch.cuda.can_device_access_peer(here, other) for other in devices if other != here)
    ):
        raise UserError("mesh.overlap needs a tensor-parallel group within one host, whose GPUs reach each other's "
                        "memory (NVLink); leave it out here")  # fmt: skip


def gathered_product(states: Tensor, weight: Tensor, mesh: DeviceMesh) -> Tensor:
    """`states` (t, K), this rank's tokens, of all ranks times `weight` (N, K): (T, N)."""
    product: Tensor = gather_multiply(states, weight, mesh.get_group().group_name)[0]
    return product


def scattered_product(states: Tensor, weight: Tensor, mesh: DeviceMesh) -> Tensor:
    """`states` (T, K) times `weight` (N, K), summed over the ranks: (t, N), this rank's tokens."""
    product: Tensor = multiply_scatter(states, weight, mesh.get_group().group_name)
    return product


# --- what is sent


class _Mailbox:
    """Memory of each rank that the others write to.

    Attributes:
        slots: (degree, t, features), this rank's: the one at n is written by the rank n.
    """

    def __init__(self, group: dist.ProcessGroup, like: Tensor, shape: Sequence[int]) -> None:
        self.degree, self.rank = group.size(), group.rank()
        self.slots = symmetric_memory.empty(self.degree, *shape, dtype=like.dtype, device=like.device)
        self._memory = symmetric_memory.rendezvous(self.slots, group)
        self._side = torch.cuda.Stream(like.device)  # type: ignore[no-untyped-call]

    @property
    def after(self) -> list[int]:
        """The other ranks, to whom this one sends in this order."""
        return [(self.rank + n) % self.degree for n in range(1, self.degree)]

    @property
    def before(self) -> list[int]:
        """The other ranks, whose tokens arrive in this order."""
        return [(self.rank - n) % self.degree for n in range(1, self.degree)]

    @contextmanager
    def beside(self, event: torch.cuda.Event) -> Iterator[None]:
        """What is queued in here follows `event` only, and is waited for by `rejoin`. Where the event is also followed
        by a product, queue that first: a recorded graph begins it sooner, and it takes longer than a copy.
        """
        self._side.wait_event(event)
        with torch.cuda.stream(self._side):
            yield

    def send(self, states: Tensor, rank: int, event: torch.cuda.Event) -> torch.cuda.Event:
        """To a rank, following `event`; `states` have to be kept until all have `arrived`."""
        there = self._memory.get_buffer(rank, states.shape, states.dtype, self.rank * self.slots.stride(0))
        with self.beside(event):
            there.copy_(states)
            return _now()

    def arrived(self, sent: torch.cuda.Event | None = None) -> torch.cuda.Event:
        """What is queued after this finds what each rank has sent: all of it, or until its `sent`."""
        if sent is None:
            self.rejoin()
        else:
            torch.cuda.current_stream().wait_event(sent)
        self.barrier()
        return _now()

    def barrier(self) -> None:
        """The ranks' GPUs wait for each other here."""
        self._memory.barrier()

    def rejoin(self) -> None:
        """What is queued after this follows what was queued `beside`."""
        torch.cuda.current_stream().wait_stream(self._side)


def _now() -> torch.cuda.Event:
    return torch.cuda.current_stream().record_event()  # type: ignore[no-any-return]


class _Mailboxes:
    """Those of a group of ranks, some for gathering and some for scattering, which are done in turn: a layer's passes
    begin with the one and end with the other. So between two uses of a mailbox there is a barrier in the other's, which
    nobody has passed before all have read. Where two of a kind follow each other, or it is not known what came before,
    there is a barrier between them.
    """

    def __init__(self) -> None:
        self._all: dict[Any, _Mailbox] = {}
        self.last: str | None = None

    def take(self, kind: str, group: dist.ProcessGroup, like: Tensor, shape: Sequence[int]) -> _Mailbox:
        key = (kind, like.dtype, like.device, *shape)
        if key not in self._all:
            self._all[key] = _Mailbox(group, like, shape)
        if self.last in (kind, None):
            self._all[key].barrier()
        self.last = kind
        return self._all[key]


_mailboxes: WeakKeyDictionary[dist.ProcessGroup, _Mailboxes] = WeakKeyDictionary()


def forget_the_last() -> None:
    """To be called by all ranks where some may have been further than others in a pass that was not done."""
    for boxes in _mailboxes.values():
        boxes.last = None


def _ranks(group: str) -> dist.ProcessGroup:
    return _resolve_process_group(dist.distributed_c10d.GroupName(group))


def _mailbox(kind: str, group: str, like: Tensor, shape: Sequence[int]) -> _Mailbox:
    ranks = _ranks(group)
    return _mailboxes.setdefault(ranks, _Mailboxes()).take(kind, ranks, like, shape)


# --- the operators; a tensor of all ranks' tokens is seen as (degree, t, features) within


@torch.library.custom_op("megatron_bert::gather_and_multiply", mutates_args=(), device_types="cuda")
def gather_multiply(states: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """All ranks' states times the weight (T, N), and the states (T, K)."""
    states = states.contiguous()
    box = _mailbox("gather", group, states, states.shape)
    # Before the products, on which the copy into it does not wait: it must be no memory that they let go of.
    gathered = torch.empty_like(box.slots)
    product, arrived = _gathered_product(box, states, weight.mT)
    with box.beside(arrived):
        gathered.copy_(box.slots)
    box.rejoin()
    return product, gathered.flatten(0, 1)


@gather_multiply.register_fake
def _gathered_results(states: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    tokens = _ranks(group).size() * len(states)
    return states.new_empty(tokens, len(weight)), states.new_empty(tokens, states.shape[1])


@torch.library.custom_op("megatron_bert::gather_multiply_backward", mutates_args=(), device_types="cuda")
def gather_multiply_backward(gradient: Tensor, gathered: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Of a gradient (T, N): that of this rank's states (t, K), summed over the ranks, and the weight's (N, K), which is
    computed while parts of the former travel.
    """
    box = _mailbox("scatter", group, gradient, (len(gathered) // _ranks(group).size(), gathered.shape[1]))
    gradient = gradient.contiguous()
    products = _products_for_others(box, gradient, weight)
    of_weight = gradient.mT @ gathered
    return _scattered_product(box, products, gradient, weight), of_weight


@gather_multiply_backward.register_fake
def _gathered_gradients(gradient: Tensor, gathered: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    own = len(gathered) // _ranks(group).size()
    return gathered.new_empty(own, gathered.shape[1]), weight.new_empty(weight.shape)


@torch.library.custom_op("megatron_bert::multiply_scatter", mutates_args=(), device_types="cuda")
def multiply_scatter(states: Tensor, weight: Tensor, group: str) -> Tensor:
    """This rank's tokens of the sum of all ranks' states (T, K) times weights: (t, N)."""
    box = _mailbox("scatter", group, states, (len(states) // _ranks(group).size(), len(weight)))
    states = states.contiguous()
    return _scattered_product(box, _products_for_others(box, states, weight.mT), states, weight.mT)


@multiply_scatter.register_fake
def _scattered_results(states: Tensor, weight: Tensor, group: str) -> Tensor:
    return states.new_empty(len(states) // _ranks(group).size(), len(weight))


@torch.library.custom_op("megatron_bert::multiply_scatter_backward", mutates_args=(), device_types="cuda")
def multiply_scatter_backward(gradient: Tensor, states: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Of a gradient (t, N) of this rank's tokens: that of its part of all tokens' states (T, K), and the weight's
    (N, K).
    """
    gradient = gradient.contiguous()
    box = _mailbox("gather", group, gradient, gradient.shape)
    of_states, _ = _gathered_product(box, gradient, weight)
    box.rejoin()
    of_weight = box.slots.flatten(0, 1).mT @ states
    return of_states, of_weight


@multiply_scatter_backward.register_fake
def _scattered_gradients(gradient: Tensor, states: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return states.new_empty(states.shape), weight.new_empty(weight.shape)


def _by_rank(box: _Mailbox, tokens: Tensor) -> Tensor:
    """(T, features) -> (degree, t, features)."""
    return tokens.view(box.degree, -1, tokens.shape[1])


def _gathered_product(box: _Mailbox, own: Tensor, matrix: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """All ranks' `own` (t, K) times `matrix` (K, N): (T, N), and when the last have arrived; they stay in the slots."""
    begun = _now()
    product = own.new_empty(box.degree, len(own), matrix.shape[1])
    torch.mm(own, matrix, out=product[box.rank])
    sent = [box.send(own, rank, begun) for rank in box.after]
    with box.beside(begun):
        box.slots[box.rank].copy_(own)
    for rank, event in zip(box.before, sent, strict=True):
        arrived = box.arrived(event)
        torch.mm(box.slots[rank], matrix, out=product[rank])
    return product.flatten(0, 1), arrived


def _products_for_others(box: _Mailbox, states: Tensor, matrix: Tensor) -> list[tuple[int, Tensor, torch.cuda.Event]]:
    """Each other rank, its part of (T, K) times `matrix` (K, N), and when that is computed."""
    parts = _by_rank(box, states)
    return [(rank, torch.mm(parts[rank], matrix), _now()) for rank in box.after]


def _scattered_product(
    box: _Mailbox, products: list[tuple[int, Tensor, torch.cuda.Event]], states: Tensor, matrix: Tensor
) -> Tensor:
    """Sends the others' products, multiplies this rank's part meanwhile, and sums up what is in its slots then."""
    torch.mm(_by_rank(box, states)[box.rank], matrix, out=box.slots[box.rank])
    for rank, product, computed in products:
        box.send(product, rank, computed)
    box.arrived()
    return summed(box.slots)


def summed(slots: Tensor) -> Tensor:
    """(degree, t, features) -> (t, features), in float32 and rounded once."""
    from megatron_bert.parallel import overlap_triton  # noqa: PLC0415

    total = torch.empty_like(slots[0])
    overlap_triton.sum_slots[(-(-total.numel() // 1024),)](slots, total, total.numel(), RANKS=len(slots), BLOCK=1024)
    return total


# --- their derivatives


def _save_gathered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, ctx.group = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.mark_non_differentiable(output[1])


def _differentiate_gathered(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, Tensor, None]:
    return *gather_multiply_backward(gradient, *ctx.saved_tensors, ctx.group), None


def _save_scattered(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    states, weight, ctx.group = inputs
    ctx.save_for_backward(states, weight)


def _differentiate_scattered(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return *multiply_scatter_backward(gradient, *ctx.saved_tensors, ctx.group), None


gather_multiply.register_autograd(_differentiate_gathered, setup_context=_save_gathered)
multiply_scatter.register_autograd(_differentiate_scattered, setup_context=_save_scattered)
