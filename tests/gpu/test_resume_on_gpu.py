"""A run on a GPU goes on from its checkpoint: page-locked copies, the GPU's random stream, fused optimizer states."""

import random
from pathlib import Path

import pytest
import torch

from megatron_bert.checkpoint.native import newest_good
from megatron_bert.checkpoint.tensors import read_all_tensors
from megatron_bert.checkpoint.writer import CheckpointWriter
from megatron_bert.training.configuration import OptimizerSection
from megatron_bert.training.objective import Objective
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.state import TrainState, restore, snapshot
from megatron_bert.training.step import train_step
from tests.unit.test_training_parts import batch, tiny_model

pytestmark = pytest.mark.gpu


def fresh_state() -> TrainState:
    model = tiny_model().cuda()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return TrainState(model, build_optimizer(model, OptimizerSection(learning_rate=1e-2)), torch.device("cuda", 0))


def step(state: TrainState) -> float:
    objective, inputs = Objective(state.model, state.device), batch(seed=state.step)
    result = train_step(objective, state.optimizer, [objective.micro_batch(inputs)], clip_norm=1.0)
    state.step += 1
    state.window.sums = state.window.sums.plus(result.sums)
    return result.gradient_norm.item()


def test_a_restored_run_goes_on(tmp_path: Path) -> None:
    whole = fresh_state()
    for _ in range(3):
        step(whole)
    held = {name: value.cpu().clone() for name, value in snapshot(whole, {}).tensors.items()}
    with CheckpointWriter(tmp_path, 2) as writer:
        for _ in range(2):  # the second uses the page-locked memory of the first again
            writer.save(snapshot(whole, {}))
        wanted = [step(whole) for _ in range(3)]  # while it is being written
    found = read_all_tensors(newest_good(tmp_path))
    assert found.keys() == held.keys()
    assert all(torch.equal(found[name], held[name]) for name in held)
    other = fresh_state()
    torch.manual_seed(random.randrange(1 << 30))
    restore(other, newest_good(tmp_path))
    again = snapshot(other, {}).tensors
    assert all(torch.equal(again[name].cpu(), held[name]) for name in held)
    assert all(parameter.is_cuda for parameter in other.model.parameters())
    assert [step(other) for _ in range(3)] == pytest.approx(wanted, rel=1e-4)  # other dropout would be far away
