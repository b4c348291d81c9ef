"""Steps in float8 on a GPU that multiplies it: near those of float32, compiled or not, packed or not."""

import importlib.util

import pytest
import torch

from megatron_bert.errors import UserError
from megatron_bert.training.execution import build_objective
from megatron_bert.training.float8 import check_float8
from megatron_bert.training.objective import Objective
from tests.gpu.test_training_on_gpu import CUDA, model, steps_of
from tests.unit.test_step import packed
from tests.unit.test_training_parts import batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao"),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_steps_are_near_those_of_float32(compiled: bool, is_packed: bool) -> None:
    """A product is off by some 5 % (see tests/unit/test_float8.py); a loss, which averages many, by far less."""
    try:
        check_float8(CUDA)
    except UserError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()
    batches = [batch(seed=seed) for seed in range(3)]
    plain = model().cpu()
    wanted = steps_of(plain, Objective(plain, torch.device("cpu")), batches)
    network, row_tokens = model(), 48 if compiled else 40  # compiled, a batch has the tokens that it was said to have
    objective = build_objective(
        network, CUDA, precision="float8", rows=6, row_tokens=row_tokens, predicted_share=0.15,
        compiled=compiled,
    )  # fmt: skip
    found = steps_of(network, objective, [packed(one, row_tokens) for one in batches] if is_packed else batches)
    for one, other in zip(wanted, found, strict=True):
        assert other.sums.means()["loss"] == pytest.approx(one.sums.means()["loss"], rel=3e-2)
        assert other.gradient_norm.item() == pytest.approx(one.gradient_norm.item(), rel=0.3)
