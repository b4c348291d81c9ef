"""What tests of recorded passes run in each process of a world: what ranks have to agree on. Nothing is recorded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.data.labelled import collate_labelled
from megatron_bert.data.masking import IGNORED
from megatron_bert.errors import SharedError
from megatron_bert.model import MegatronBertConfig
from megatron_bert.parallel import overlap
from megatron_bert.parallel.data import call_within
from megatron_bert.parallel.parallelize import parallelize
from megatron_bert.training.configuration import OptimizerSection
from megatron_bert.training.graphs import _signature
from megatron_bert.training.microbatch import FixedShapes, LabelledBatch, MicroBatch
from megatron_bert.training.objective import Objective
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.ranks import Ranks
from megatron_bert.training.step import train_step
from megatron_bert.training.supervised import HEADS, SupervisedObjective, target_kind
from tests.distributed.cases import SharedMailbox, build, mesh_of, overlap_on_cpus
from tests.unit.test_graphs import Replayed
from tests.unit.test_step import packed
from tests.unit.test_supervised import CASES, SHAPE, rows, samples
from tests.unit.test_training_parts import batch, tiny_model

CPU = torch.device("cpu")


def everywhere(value: Any) -> list[Any]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def shapes_of_pretraining() -> None:
    """Of batches of which ever more is predicted, on one rank before the others; packed and padded."""
    shapes, seen, rank = FixedShapes(20, 40, 0.05), set(), dist.get_rank()
    for step in range(4):
        padded, whole = (batch(seed=10 * step + rank, rows=rows) for rows in (20 if rank else 5, 20))
        for one in (padded, whole):
            if step > rank:
                one["labels"] = one["input_ids"].where(one["attention_mask"] == 1, IGNORED)
        for one in (padded, packed(whole)):
            signature = _signature(MicroBatch.of(one, shapes))
            assert everywhere(signature) == [signature] * dist.get_world_size()
            seen.add(signature)
    assert len(seen) > 2


def shapes_of_fine_tuning() -> None:
    """Where ranks have no sample at all, and nothing to lose."""
    seen, has_samples = [], dist.get_rank() < 2
    for head, problem, num_labels in CASES:
        made = samples(rows(head, problem))[dist.get_rank() :] if has_samples else []
        collated = collate_labelled([made], target_kind(head, problem), num_labels, 0, 64, 12)
        one = LabelledBatch.of(collated, FixedShapes(1, 64, 0.0, 12), has_tags=head == "token")
        assert len(one.rows) == len(made)
        seen.append(one)
    signatures = [_signature(one) for one in seen]
    assert everywhere(signatures) == [signatures] * dist.get_world_size()
    for (head, problem, num_labels), one in zip(CASES, seen, strict=True):
        config = MegatronBertConfig(**SHAPE, num_labels=num_labels, problem_type=problem)
        losses, outputs = SupervisedObjective(HEADS[head](config).eval(), CPU, head, problem, "float32").predicted(one)
        assert len(outputs) == len(one.rows)
        assert (float(losses.task) > 0.0) == has_samples


class FailsOnOneRank(Replayed):
    """Cannot record on the last one."""

    def _record(self, *args: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise torch.OutOfMemoryError("no room")
        return SimpleNamespace()


def a_recording_that_fails_on_one_rank(*, sharded: bool) -> None:
    """All go on without, or where FSDP is in the middle of a pass, all end."""
    mesh, model = mesh_of(1, replicate=1 if sharded else 2), tiny_model()
    parallelize(model, mesh)
    graphs = FailsOnOneRank()
    objective = Objective(model, CPU, graphs=graphs)
    optimizer = build_optimizer(model, OptimizerSection(learning_rate=1e-2))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_bert").addHandler(handler)

    def step() -> None:
        micro = objective.micro_batch(batch(seed=dist.get_rank(), padded=False))
        train_step(objective, optimizer, [micro], clip_norm=1.0, ranks=Ranks(mesh))

    step()
    step()
    if sharded:
        with pytest.raises(SharedError, match=r"rank 1: a training pass cannot be recorded .* \(no room\)"):
            step()
    else:
        step()
        step()
    logging.getLogger("megatron_bert").removeHandler(handler)
    assert not graphs.replays
    assert ["not recorded" in one and "no room" in one for one in said] == ([] if sharded else [True])


def mailboxes_after_such_a_recording() -> None:
    """One rank was in a first product when it failed. All wait for each other before the next one, or none does."""
    overlap_on_cpus()
    plain, like, waits = FailsOnOneRank._record, torch.zeros(1), list[Any]()

    def use(kind: str) -> None:
        overlap._mailbox(kind, dist.group.WORLD.group_name, like, (1, 1))

    def record(self: Any, *args: Any) -> Any:
        if dist.get_rank() == 1:
            use("gather")
        return plain(self, *args)

    use("gather")
    use("scatter")
    with patch.object(FailsOnOneRank, "_record", record):
        a_recording_that_fails_on_one_rank(sharded=False)
    with patch.object(SharedMailbox, "barrier", lambda box: waits.append(box)):
        use("gather")
    assert everywhere(len(waits)) == [len(waits)] * dist.get_world_size()


@dataclass
class Targets:
    values: Tensor


def targets_stay_what_they_are() -> None:
    """Weights are put together in bfloat16; values that a model regresses to are not rounded to it."""
    model = build()
    parallelize(model, mesh_of(1), parameter_dtype=torch.bfloat16)
    given = Targets(torch.tensor([4.756, 1234.5]))
    assert torch.equal(call_within(model, lambda one: one.values, given), given.values)
