"""What runs in each process of a world."""

from __future__ import annotations

import copy
import logging
import math
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_bert.checkpoint import writer
from megatron_bert.checkpoint.shards import load_shards
from megatron_bert.checkpoint.tensors import read_tensors, write_tensors
from megatron_bert.checkpoint.writer import CheckpointWriter, Snapshot
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig, MegatronBertForMaskedLM, MegatronBertForPreTraining
from megatron_bert.model.packing import PackedLayout, layout_of_boundaries, layout_of_padding
from megatron_bert.parallel import gradients, overlap
from megatron_bert.parallel.data import call_within
from megatron_bert.parallel.gradients import completed_gradients, gradient_norm
from megatron_bert.parallel.launch import check_agreement
from megatron_bert.parallel.loss import token_losses_on
from megatron_bert.parallel.materialize import initialize, materialize, whole_parameters
from megatron_bert.parallel.mesh import ParallelMesh
from megatron_bert.parallel.parallelize import parallelize
from megatron_bert.training.execution import build_objective

TOLERANCE = 1e-5  # of a tensor's norm; float32 rounds at 6e-8, and sums are in another order
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@cache
def mesh_of(tensor: int, sequence_parallel: bool = False, replicate: int = 1, overlap: bool = False) -> ParallelMesh:
    mesh = ParallelMesh.of(
        device_type="cpu", tensor=tensor, replicate=replicate, sequence_parallel=sequence_parallel, overlap=overlap
    )
    if overlap:
        overlap_on_cpus()
        with patch("megatron_bert.parallel.region.check_overlap"):
            assert mesh.region.overlaps
    return mesh


@cache
def overlap_on_cpus() -> None:
    """The overlapped operators do on CPUs what they do on GPUs, one thing after the other."""
    overlap._Mailbox, overlap._now = SharedMailbox, lambda: None
    overlap.summed = lambda slots: slots.float().sum(0).to(slots.dtype)
    for operator in (
        overlap.gather_multiply, overlap.gather_multiply_backward,
        overlap.multiply_scatter, overlap.multiply_scatter_backward,
    ):  # fmt: skip
        operator.register_kernel("cpu")(operator._init_fn)


class SharedMailbox(overlap._Mailbox):
    """In memory that processes share, in place of memory that GPUs reach. New memory is NaN: nobody reads it early."""

    def __init__(self, group: dist.ProcessGroup, like: Tensor, shape: Sequence[int]) -> None:
        self.degree, self.rank, self.group = group.size(), group.rank(), group
        names: list[Any] = [None] * self.degree
        with NamedTemporaryFile() as file:
            dist.all_gather_object(names, file.name, group=group)
            shape = (self.degree, *shape)
            self.everywhere = [
                torch.from_file(name, shared=True, size=math.prod(shape), dtype=like.dtype).view(shape)
                for name in names
            ]
            self.slots = self.everywhere[self.rank].fill_(torch.nan)
            self.barrier()

    @contextmanager
    def beside(self, event: None) -> Iterator[None]:
        yield

    def send(self, states: Tensor, rank: int, event: None) -> None:
        self.everywhere[rank][self.rank] = states

    def arrived(self, sent: None = None) -> None:
        self.barrier()

    def barrier(self) -> None:
        dist.barrier(self.group)

    def rejoin(self) -> None:
        pass


def build(model_class: Any = MegatronBertForPreTraining, **changes: Any) -> Any:
    """The same model in every process; biases and norms are drawn too, so that each is seen to count."""
    torch.manual_seed(7)
    model = model_class(MegatronBertConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close(ours: Tensor, reference: Tensor, name: str, scale: float = 0.0) -> None:
    """Within TOLERANCE of the reference's norm, or of `scale` where the reference is naught but rounding."""
    difference, size = float((whole(ours) - reference).norm()), float(reference.norm())
    assert difference <= TOLERANCE * max(size, scale), f"{name}: off by {difference:.3g} of {size:.3g}"


@dataclass
class Batch:
    """Samples of a step: masked tokens, pairs, and padding or packing."""

    ids: Tensor
    labels: Tensor
    pairs: Tensor | None
    layout: PackedLayout | None
    boundaries: Tensor | None = None


def step_batches(num: int, *, packed: bool, rows: int = 2, tokens: int = 13) -> list[Batch]:
    """`num` micro-batches, the same in every process, with different numbers of masked tokens in each."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for index in range(num):
        ids = torch.randint(5, SHAPE["vocab_size"], (rows, tokens), generator=generator)
        masked = torch.rand(rows, tokens, generator=generator) < 0.1 + 0.2 * (index % 2)
        masked[:, 0] = True
        if packed:
            boundaries = torch.tensor([0, 5, tokens, tokens + 9, 2 * tokens], dtype=torch.int32)
            pairs = torch.randint(0, 2, (4,), generator=generator)
            layout = layout_of_boundaries(boundaries, (rows, tokens))
        else:
            attention = torch.ones(rows, tokens)
            attention[1, tokens - 4 :] = 0
            masked &= attention.bool()
            pairs, boundaries = torch.randint(0, 2, (rows,), generator=generator), None
            layout = layout_of_padding(attention)
        batches.append(Batch(ids, ids.where(masked, -100), pairs, layout, boundaries))
    return batches


def losses(model: Any, batch: Batch, token_losses: Any = None) -> tuple[Tensor, Tensor]:
    """The sums of both losses, from the parts of a model as a trainer uses them."""
    packed = {} if batch.boundaries is None else {"cu_seq_lens_q": batch.boundaries}
    output = model.bert(batch.ids, layout=batch.layout, **packed)
    places = (batch.labels.flatten() != -100).nonzero()[:, 0]
    hidden_MD, targets_M = output.last_hidden_state.flatten(0, 1)[places], batch.labels.flatten()[places]
    if token_losses is None:
        masked = functional.cross_entropy(model.cls.predictions(hidden_MD), targets_M, reduction="sum")
    else:
        masked, _ = token_losses(model.cls.predictions, hidden_MD, targets_M)
    pair_logits = model.cls.seq_relationship(output.pooler_output)
    return masked, functional.cross_entropy(pair_logits, batch.pairs, reduction="sum")


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    # A large epsilon: the true gradient of the keys' biases is 0, and Adam would make steps of its rounding.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)


def recompute_layers(model: Any) -> None:
    for layer in model.bert.encoder.layer:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, **kwargs
        )


def compile_as_the_trainer(model: Any, mesh: ParallelMesh) -> None:
    """Spreads the model with its layers compiled."""
    build_objective(
        model, torch.device("cpu"), precision="float32", rows=2, row_tokens=13, predicted_share=0.15, compiled=True,
        mesh=mesh,
    )  # fmt: skip


@dataclass
class Run:
    """What a run of some steps saw: losses, the first gradients and their norm, and the weights at its end."""

    curve: list[float]
    gradients: list[Tensor]
    norm: Tensor
    weights: list[Tensor]


@cache
def single_process(packed: bool, steps: int, num_micro_batches: int) -> Run:
    model, curve = build(), []
    optimizer = optimizer_of(model)
    for step in range(steps):
        curve.append(add_gradients(model, step_batches(num_micro_batches, packed=packed)))
        if step == 0:
            gradients = [copy.deepcopy(parameter.grad) for parameter in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    weights = [parameter.detach() for parameter in model.parameters()]
    return Run(curve, gradients, torch.nn.utils.get_total_norm(gradients), weights)


def add_gradients(model: Any, batches: list[Batch], mesh: ParallelMesh | None = None) -> float:
    """The backward passes of one step on all samples, dealt to data-parallel ranks; its loss."""
    masked, pairs = sum(int((batch.labels != -100).sum()) for batch in batches), sum(len(b.pairs) for b in batches)
    token_losses = token_losses_on(mesh.region) if mesh and mesh.tensor_degree > 1 else None
    total = torch.zeros(())
    *before, last = batches[mesh.data_rank :: mesh.data_degree] if mesh else batches

    def add(batch: Batch) -> None:
        masked_loss, pair_loss = call_within(model, losses, model, batch, token_losses)
        loss = masked_loss / masked + pair_loss / pairs
        loss.backward()
        total.add_(loss.detach())

    for batch in before:
        add(batch)
    with completed_gradients(model, mesh) if mesh else nullcontext():
        add(last)
    if mesh:
        dist.all_reduce(total, group=mesh.data.get_group())
    return float(total)


def equals_single_process(
    *,
    tensor: int = 1,
    replicate: int = 1,
    sequence_parallel: bool = False,
    packed: bool = False,
    recompute: bool = False,
    compiled: bool = False,
    overlap: bool = False,
    prepare: Callable[[Any], None] | None = None,
    steps: int = 2,
    num_micro_batches: int = 2,
) -> None:
    """Losses, the first step's gradients and their norm, and the weights after the last step."""
    expected = single_process(packed, steps, num_micro_batches)
    mesh, model = mesh_of(tensor, sequence_parallel, replicate, overlap), build()
    if compiled:
        compile_as_the_trainer(model, mesh)
    else:
        parallelize(model, mesh, prepare_layers=recompute_layers if recompute else prepare)
    optimizer = optimizer_of(model)
    for step in range(steps):
        loss = add_gradients(model, step_batches(num_micro_batches, packed=packed), mesh)
        assert abs(loss - expected.curve[step]) <= TOLERANCE * expected.curve[step]
        if step == 0:
            for (name, parameter), reference in zip(model.named_parameters(), expected.gradients, strict=True):
                assert_close(parameter.grad, reference, f"gradient of {name}", scale=1e-2 * float(expected.norm))
            assert_close(gradient_norm(model.parameters()), expected.norm, "gradient norm")
        optimizer.step()
        optimizer.zero_grad()
    for (name, parameter), reference in zip(model.named_parameters(), expected.weights, strict=True):
        assert_close(parameter.detach(), reference, name)
    assert not compiled or torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"


def equals_with_buckets(bucket_bytes: int, **options: Any) -> None:
    with patch.object(gradients, "BUCKET_BYTES", bucket_bytes):
        equals_single_process(**options)


def sums_beside_the_backward_pass(bucket_bytes: int) -> None:
    """The same sums in the same order on every rank, whatever order gradients come in; the first before the last
    gradient is there. What has no gradient, or is not trained, is left alone.
    """
    mesh, model = mesh_of(1, replicate=4), build()
    unused, frozen = (layer.output.dense.weight for layer in model.bert.encoder.layer)
    frozen.requires_grad_(False)
    trained = [one for one in model.parameters() if one is not unused and one is not frozen]
    ordinary = mesh.data_rank % 2 == 0
    order = trained[::-1] if ordinary else trained  # that gradients come in
    sent: list[tuple[Any, bool]] = []
    plain = gradients.sum_in_place

    def sum_over(group: Any, tensors: list[Tensor]) -> Any:
        sent.append(([one.shape for one in tensors], order[-1].grad is not None))
        return plain(group, tensors)

    with (
        patch.object(gradients, "BUCKET_BYTES", bucket_bytes),
        patch.object(gradients, "sum_in_place", sum_over),
        completed_gradients(model, mesh),
    ):
        for parameter in order:
            (parameter.sum() * (mesh.data_rank + 1)).backward()
    assert unused.grad is frozen.grad is None
    for name, parameter in model.named_parameters():
        if parameter is not unused and parameter is not frozen:
            assert torch.equal(parameter.grad, torch.full_like(parameter, 1.0 + 2 + 3 + 4)), name
    assert len(sent) > 1
    assert not (ordinary and sent[0][1]), "nothing was sent before the last gradient was there"
    shapes: list[Any] = [None] * 4
    dist.all_gather_object(shapes, [shape for shape, _ in sent])
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]
    assert all(not one._post_accumulate_grad_hooks for one in model.parameters())


def evaluates_what_a_recorded_step_wrote(*, keeps_layers: bool) -> None:
    """Such a step changes a rank's parts of the weights, and runs none of the code that puts them together."""
    mesh, model = mesh_of(1), build()
    parallelize(model, mesh, keeps_layers=keeps_layers)
    batch = step_batches(1, packed=False)[0]

    def evaluated() -> float:
        with torch.no_grad():
            return float(call_within(model, losses, model, batch, None)[0])

    parts = list(model.parameters())
    before = evaluated()
    for parameter in parts:
        parameter.detach().to_local().mul_(0.5)
    after = evaluated()
    reference = build()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.5)
        expected = float(losses(reference, batch, None)[0])
    assert abs(after - expected) <= TOLERANCE * expected < abs(before - expected)
    assert all(one is other for one, other in zip(parts, model.parameters(), strict=True))


def goes_on_at_another_layout(folder: Path, *, saved_at: int, layouts: list[int]) -> None:
    """Weights and optimizer states are saved at one tensor degree and read at others, to the bit, and go on alike."""
    model, mesh = build(), mesh_of(saved_at)
    parallelize(model, mesh)
    optimizer = optimizer_of(model)
    for _ in range(2):
        add_gradients(model, step_batches(4, packed=False), mesh)
        optimizer.step()
        optimizer.zero_grad()
    saved = state_of(model, optimizer)
    write_tensors(folder, saved)
    saved = {name: whole(value) for name, value in saved.items()}
    loss = add_gradients(model, step_batches(4, packed=False), mesh)
    for tensor in layouts:
        model, mesh = build(), mesh_of(tensor)
        parallelize(model, mesh)
        optimizer = optimizer_of(model)
        get_optimizer_state_dict(model, optimizer)  # begins the states
        read_tensors(folder, state_of(model, optimizer))
        for name, value in state_of(model, optimizer).items():
            assert torch.equal(whole(value), saved[name]), f"{name} at tensor degree {tensor}"
        assert abs(add_gradients(model, step_batches(4, packed=False), mesh) - loss) <= TOLERANCE * loss


def says_that_a_disk_is_full(folder: Path) -> None:
    """Here a limit to the size of files, which the system enforces in the same place: in the middle of a tensor."""
    mesh = mesh_of(1).device_mesh["shard"]
    tensors = {str(number): distribute_tensor(torch.ones(64, 64), mesh, [Shard(0)]) for number in range(30)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(folder, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def saves_to_a_folder_that_is_not_shared(run: Path) -> tuple[str, list[str]]:
    """What becomes of a checkpoint whose parts lie on two machines, and the files that this process got onto its disk.
    Here the other one's parts go when they are written.
    """
    synced = list[str]()

    class Apart(CheckpointWriter):
        def _fill(self, aside: Path, snapshot: Snapshot) -> Any:
            files = super()._fill(aside, snapshot)
            for name in files if dist.get_rank() else ():
                (aside / name).unlink()
            return files

    value = distribute_tensor(torch.ones(4, 4), mesh_of(1).device_mesh["shard"], [Shard(0)])
    with (
        patch.object(writer, "sync", lambda file: synced.append(file.name)),
        Apart(run, 1, dist.group.WORLD) as saving,
    ):
        saving.save(Snapshot(1, {"model.one": value}, {}, {}))
        return str(saving.wait()), synced


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state[name] = parameter.detach()
        state |= {f"{name}.{key}": optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")}
    return state


def starts_as_single_process(*, tensor: int) -> None:
    """Built on the meta device, each rank draws the values that one process draws from the same seed."""
    reference = build()
    initialize(reference, seed=5)
    model = on_meta_device()
    parallelize(model, mesh_of(tensor))
    assert all(parameter.is_meta for parameter in model.parameters())
    materialize(model, torch.device("cpu"))
    initialize(model, seed=5)
    for (name, ours), (twin, value) in zip(whole_parameters(model), reference.named_parameters(), strict=True):
        assert name == twin
        assert torch.equal(ours, value), name
    assert model.cls.predictions.decoder._parameters["weight"] is model.get_input_embeddings()._parameters["weight"]
    assert torch.equal(model.bert.embeddings.position_ids, reference.bert.embeddings.position_ids)
    everything = sum(parameter.numel() for parameter in reference.parameters())
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert held < everything / 2, f"{held} of {everything} elements"


def loads_as_single_process(folder: Path, *, has_head: bool) -> list[str]:
    """Each rank reads its part of a folder; returns what was logged. The logits are those of the whole model."""
    model = on_meta_device(MegatronBertForMaskedLM)
    parallelize(model, mesh_of(2), gathers_logits=True)
    materialize(model, torch.device("cpu"))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_bert").addHandler(handler)
    load_shards(model, folder)
    logging.getLogger("megatron_bert").removeHandler(handler)
    reference = MegatronBertForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    for (name, parameter), value in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (not has_head and name.startswith("cls.")) or torch.equal(parameter.full_tensor(), value), name
    if has_head:
        ids = torch.arange(5, 18)[None]
        assert_close(model.eval()(ids).logits, reference.eval()(ids).logits, "logits")
    assert model.num_tokens == reference.num_tokens
    return said


def on_meta_device(model_class: Any = MegatronBertForPreTraining) -> Any:
    with torch.device("meta"):
        return model_class(MegatronBertConfig(**SHAPE))


def disagreement(facts_of_ranks: list[dict[str, str]]) -> str:
    try:
        check_agreement(facts_of_ranks[dist.get_rank()])
    except UserError as error:
        return str(error)
    return "nothing"


def refusal(**layout: Any) -> str:
    """What a person is told of this layout."""
    try:
        ParallelMesh.of(device_type="cpu", **layout)
    except UserError as error:
        return str(error)
    return "nothing"
