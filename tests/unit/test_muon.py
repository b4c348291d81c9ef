"""Muon against PyTorch's own, and what ours does beyond it."""

import copy

import pytest
import torch

from megatron_bert.training.configuration import OptimizerSection
from megatron_bert.training.microbatch import MicroBatch
from megatron_bert.training.muon import Muon, orthogonalized
from megatron_bert.training.objective import Objective
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.step import train_step
from tests.unit.test_training_parts import CPU, batch, tiny_model

SECTION = OptimizerSection(kind="muon", learning_rate=1e-2, weight_decay=0.1, momentum=0.9)


def is_for_muon(name: str, parameter: torch.Tensor) -> bool:
    return name.startswith("bert.encoder.layer.") and parameter.ndim == 2


def with_gradients(seed: int) -> torch.nn.Module:
    model = tiny_model()
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    return model


def test_the_steps_of_pytorchs() -> None:
    """On the layers' matrices; AdamW's on everything else."""
    ours = with_gradients(0)
    theirs = copy.deepcopy(ours)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.grad = mine.grad.clone()
    named = dict(theirs.named_parameters())
    matrices = [parameter for name, parameter in named.items() if is_for_muon(name, parameter)]
    assert len(matrices) == 12
    references = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [p for n, p in named.items() if not is_for_muon(n, p) and p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for n, p in named.items() if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=1e-2,
        ),
    ]
    optimizer = build_optimizer(ours, SECTION)
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    for _ in range(3):
        for one in (optimizer, *references):
            one.step()
    for name, parameter in ours.named_parameters():
        change, wanted = parameter - before[name], named[name] - before[name]
        # matrices one by one and stacked are multiplied by other kernels, in bfloat16
        tolerance = 1e-2 if is_for_muon(name, parameter) else 1e-6
        assert float((change - wanted).detach().norm()) <= tolerance * float(wanted.detach().norm()), name


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 80, 20), (2, 20, 80)])
def test_singular_values_go_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrices).float())
    assert float(values.max()) < 1.3
    assert float(values.median()) > 0.6


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, SECTION)
    objective = Objective(model, CPU)
    assert train_step(objective, optimizer, [MicroBatch.of(batch())], clip_norm=1.0).applied
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    poison = model.bert.encoder.layer[0].ln.register_forward_hook(lambda *args: args[2] * float("nan"))
    assert not train_step(objective, optimizer, [MicroBatch.of(batch(seed=1))], clip_norm=1.0).applied
    poison.remove()
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    assert train_step(objective, optimizer, [MicroBatch.of(batch(seed=2))], clip_norm=1.0).applied
    assert not torch.equal(model.state_dict()["cls.predictions.bias"], weights["cls.predictions.bias"])


def test_clipping_is_of_the_whole_gradient() -> None:
    """A gradient that is divided within the step is one that was divided before it."""
    divided, plain = with_gradients(3), with_gradients(3)
    for parameter in plain.parameters():
        parameter.grad /= 4
    optimizers = build_optimizer(divided, SECTION), build_optimizer(plain, SECTION)
    optimizers[0].grad_scale, optimizers[0].found_inf = torch.tensor(4.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    for optimizer in optimizers:
        assert isinstance(optimizer, Muon)
        optimizer.step()
    torch.testing.assert_close(divided.state_dict(), plain.state_dict())
