"""A whole encoder on the kernels between products, run by Triton's interpreter; see `test_layer_kernels`."""

import copy

import pytest
import torch

from megatron_bert.model import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.training import layer_kernels
from megatron_bert.training.fused_layers import BFLOAT16, can_be_fused, walk_layers
from megatron_bert.training.microbatch import FixedShapes, MicroBatch
from megatron_bert.training.objective import Objective
from tests.unit.test_training_parts import batch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layer_kernels._GELU_FORWARD, "ROWS", 32)
    monkeypatch.setitem(layer_kernels._NORM_BACKWARD, "programs", 3)
    monkeypatch.setitem(layer_kernels._GELU_BACKWARD, "programs", 3)


def model(dropout: float = 0.0, **settings: object) -> MegatronBertForPreTraining:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40, **settings}
    config = MegatronBertConfig(
        vocab_size=128, num_hidden_layers=3, max_position_embeddings=64, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0, initializer_range=0.2, **shape,
    )  # fmt: skip
    return MegatronBertForPreTraining(config).train()


def loss_of(network: MegatronBertForPreTraining, precision: str = "float32") -> torch.Tensor:
    shapes = FixedShapes(6, 20, 0.15)
    return Objective(network, CPU, precision, shapes=shapes)(MicroBatch.of(batch(), shapes)).masked_lm


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_is_the_ordinary_one(precision: str) -> None:
    """Three layers, two at a time, in one graph each. In bfloat16 both are off by roundings (2 ** -9)."""
    torch._dynamo.reset()
    ordinary = model()
    network = copy.deepcopy(ordinary)
    assert can_be_fused(network)
    walk_layers(network, 2, BFLOAT16, backend="aot_eager", fullgraph=True)
    losses = [loss_of(one, precision) for one in (ordinary, network)]
    for loss in losses:
        loss.backward()
    tolerance = 1e-5 if precision == "float32" else 3e-2
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0.0)
    for (name, one), other in zip(network.named_parameters(), ordinary.parameters(), strict=True):
        if other.grad is not None and not name.endswith("key.bias"):  # softmax does not see it: rounding alone
            error = (one.grad - other.grad).norm() / other.grad.norm().clamp(min=1e-3)
            assert error < tolerance, name


def test_dropout_is_that_of_the_generator_and_its_gradient_that_of_its_mask() -> None:
    """The gradient along a direction is the difference quotient, with the same mask drawn again."""
    torch._dynamo.reset()
    network = model(dropout=0.3)
    network.bert.embeddings.dropout.p = 0.0
    walk_layers(network, 2, BFLOAT16, backend="aot_eager", fullgraph=True)

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return loss_of(network)

    first = loss(1)
    assert torch.equal(first, loss(1))
    assert not torch.equal(first, loss(2))
    first.backward()
    parameters = list(network.bert.encoder.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum((parameter.grad * way).sum().item() for parameter, way in zip(parameters, directions, strict=True))
    moved, step = [], 1e-4
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, way in zip(parameters, directions, strict=True):
                parameter += sign * step * way
            moved.append(loss(1).double().item())
            for parameter, way in zip(parameters, directions, strict=True):
                parameter -= sign * step * way
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(slope, rel=2e-2)
    network.eval()
    assert torch.equal(loss(1), loss(2))


def test_what_is_not_walked() -> None:
    assert not can_be_fused(model(hidden_act="relu"))
    assert not can_be_fused(model(hidden_act="gelu_new"))
    assert not can_be_fused(model(chunk_size_feed_forward=4))
    assert not can_be_fused(model(is_decoder=True, add_cross_attention=True))
    assert not can_be_fused(model(dropout=0.9))
    assert not can_be_fused(model(dropout=0.001))
