"""What a test of the trainer runs in each process of a world."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.checkpoint.writer import CheckpointWriter
from megatron_bert.errors import UserError
from megatron_bert.parallel import watch
from megatron_bert.parallel.region import local_part
from megatron_bert.training import session
from megatron_bert.training.configuration import MeshSection, OptimizerSection, load_configuration
from megatron_bert.training.execution import build_objective
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.ranks import Ranks
from megatron_bert.training.step import train_step
from tests.distributed.cases import build, mesh_of
from tests.unit.test_training_parts import batch


def trains(recipe: Path, *overrides: str) -> Any:
    """The run as `torchrun` would do it, in processes that have joined; or what a person is told."""
    try:
        return pretrain(load_configuration(recipe, overrides)).step
    except UserError as error:
        return str(error)


def has_a_slow_disk(recipe: Path, *overrides: str) -> list[int]:
    """The exit codes that the watch ends such a run with: it takes the first rank 1.5 s to finish a checkpoint."""
    plain, codes = CheckpointWriter._finish, list[int]()

    def finish(writer: CheckpointWriter, *args: Any) -> None:
        if not dist.get_rank():
            time.sleep(1.5)
        plain(writer, *args)

    with (
        patch.object(CheckpointWriter, "_finish", finish),
        patch.object(watch, "_LOOK_SECONDS", 0.1),
        patch.object(watch.os, "_exit", codes.append),
    ):
        trains(recipe, *overrides)
    return codes


def looks_for_its_checkpoint(recipe: Path, *overrides: str) -> Any:
    """The run where the first rank needs longer for that than the processes wait for each other."""
    plain, waited = session.newest_good, dist.distributed_c10d._get_default_group()

    def newest_good(run: Path) -> Path:
        time.sleep(1)
        return plain(run)

    with patch.object(session, "newest_good", newest_good):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5), waited)
        try:
            return trains(recipe, *overrides)
        finally:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=240), waited)


def layout(**options: bool) -> list[int]:
    """Of processes where the recipe says nothing of it."""
    return Ranks.of(MeshSection(), torch.device("cpu"), **options).layout


def leaves_out_a_step(spoilt_rank: int, *, replicate: int = 1) -> None:
    """One rank's part of one gradient is infinite, and nobody else sees it: no rank moves, and all go on after it."""

    class Spoilt(Ranks):
        def gradient_norm(self, model: nn.Module) -> Tensor:
            if dist.get_rank() == spoilt_rank:
                gradient: Any = dict(model.named_parameters())["bert.encoder.layer.0.output.dense.weight"].grad
                local_part(gradient)[0, 0] = float("inf")
            return super().gradient_norm(model)

    mesh, model = mesh_of(2, replicate=replicate), build()
    objective = build_objective(
        model, torch.device("cpu"), precision="float32", rows=4, row_tokens=24, predicted_share=0.15, mesh=mesh
    )
    optimizer = build_optimizer(model, OptimizerSection(learning_rate=1e-2))

    def step(ranks: Ranks) -> list[Tensor]:
        micro = objective.micro_batch(batch(seed=mesh.data_rank))
        applied = train_step(objective, optimizer, [micro], clip_norm=1.0, ranks=ranks).applied
        assert bool(applied) == (type(ranks) is Ranks)
        counts = [state["step"].clone() for state in optimizer.state.values()]
        return [local_part(one).detach().clone() for one in model.parameters()] + counts

    before = step(Ranks(mesh))
    assert all(torch.equal(one, other) for one, other in zip(step(Spoilt(mesh)), before, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(step(Ranks(mesh)), before, strict=True))
