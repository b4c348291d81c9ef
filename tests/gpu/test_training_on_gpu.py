"""The trainer's step on a GPU: the same losses compiled, packed and fused as plain, and nothing compiled twice."""

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_bert.data.batches import Batch
from megatron_bert.model import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.training.configuration import OptimizerSection
from megatron_bert.training.execution import build_objective
from megatron_bert.training.objective import Objective
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.step import StepResult, train_step
from megatron_bert.training.throughput import measured_flops_per_second
from tests.unit.test_step import packed
from tests.unit.test_training_parts import batch

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def model(dropout: float = 0.0) -> MegatronBertForPreTraining:
    torch.manual_seed(0)
    config = MegatronBertConfig(
        vocab_size=128, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=512,
        max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        initializer_range=0.05,
    )  # fmt: skip
    return MegatronBertForPreTraining(config).train().to(CUDA)


def steps_of(network: MegatronBertForPreTraining, objective: Objective, batches: list[Batch]) -> list[StepResult]:
    torch.manual_seed(5)
    optimizer = build_optimizer(network, OptimizerSection(learning_rate=1e-3))
    return [train_step(objective, optimizer, [objective.micro_batch(one)], clip_norm=1.0) for one in batches]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_steps_agree_with_plain_float32(precision: str, compiled: bool, is_packed: bool, recompute: str) -> None:
    """The reference is float32, padded, not compiled, on the CPU."""
    torch._dynamo.reset()
    batches = [batch(seed=seed) for seed in range(3)]
    plain = model().cpu()
    wanted = steps_of(plain, Objective(plain, torch.device("cpu")), batches)
    network = model()
    objective = build_objective(
        network, CUDA, precision=precision, rows=6, row_tokens=40, predicted_share=0.15, recompute=recompute,
        compiled=compiled,
    )  # fmt: skip
    found = steps_of(network, objective, [packed(one) for one in batches] if is_packed else batches)
    tolerance = 1e-4 if precision == "float32" else 2e-2
    for one, other in zip(wanted, found, strict=True):
        assert other.sums.means()["loss"] == pytest.approx(one.sums.means()["loss"], rel=tolerance)
        assert other.gradient_norm.item() == pytest.approx(one.gradient_norm.item(), rel=10 * tolerance)


def test_dropout_leaves_the_loss_where_it_is_and_nothing_is_compiled_twice() -> None:
    """With dropout the compiled step's mean loss over many draws is the plain step's."""
    torch._dynamo.reset()
    means = {}
    for compiled in (False, True):
        network = model(dropout=0.2)
        objective = build_objective(
            network, CUDA, precision="bfloat16", rows=6, row_tokens=40, predicted_share=0.15, compiled=compiled
        )
        torch.manual_seed(1)
        micro = objective.micro_batch(packed(batch()))
        draws = torch.stack([objective(micro).masked_lm.detach() / micro.num_masked for _ in range(200)])
        assert draws.std() > 1e-4
        means[compiled] = draws.mean().item()
    assert means[True] == pytest.approx(means[False], rel=5e-3)


def test_batches_of_other_lengths_are_not_compiled_again() -> None:
    torch._dynamo.reset()
    network = model(dropout=0.1)
    objective = build_objective(
        network, CUDA, precision="bfloat16", rows=6, row_tokens=40, predicted_share=0.15, compiled=True
    )
    steps_of(network, objective, [packed(batch(seed=0))])
    graphs = counters["stats"]["unique_graphs"]
    steps_of(network, objective, [packed(batch(seed=seed)) for seed in range(1, 4)])
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_recomputed_layer_draws_the_same_dropout() -> None:
    """Otherwise the gradient would be that of another network; in float32 it is the same to rounding."""
    results = []
    for recompute in ("none", "full", "selective"):
        network = model(dropout=0.2)
        objective = build_objective(
            network, CUDA, precision="float32", rows=6, row_tokens=40, predicted_share=0.15, recompute=recompute
        )
        results.append(steps_of(network, objective, [batch(padded=False)])[0].gradient_norm.item())
    assert results[1:] == pytest.approx(results[:1] * 2, rel=1e-4)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    network = model()
    objective = build_objective(network, CUDA, precision="bfloat16", rows=6, row_tokens=40, predicted_share=0.15)
    optimizer = build_optimizer(network, OptimizerSection(learning_rate=1e-3))
    micro = objective.micro_batch(batch())
    train_step(objective, optimizer, [micro], clip_norm=1.0)
    weights = [parameter.detach().clone() for parameter in network.parameters()]
    hook = network.bert.encoder.ln.weight.register_hook(lambda gradient: gradient * float("nan"))
    assert not train_step(objective, optimizer, [micro], clip_norm=1.0).applied
    hook.remove()
    assert all(torch.equal(one, other) for one, other in zip(weights, network.parameters(), strict=True))
    assert train_step(objective, optimizer, [micro], clip_norm=1.0).applied


def test_a_step_never_waits_for_the_device() -> None:
    network = model(dropout=0.1)
    objective = build_objective(network, CUDA, precision="bfloat16", rows=6, row_tokens=40, predicted_share=0.15)
    optimizer = build_optimizer(network, OptimizerSection(learning_rate=1e-3))
    batches = [packed(batch(seed=seed)) for seed in range(3)]
    train_step(objective, optimizer, [objective.micro_batch(batches[0])], clip_norm=1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for one in batches:
            train_step(objective, optimizer, [objective.micro_batch(one)], clip_norm=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_ceiling_is_measured_without_touching_the_random_stream() -> None:
    state = torch.cuda.get_rng_state()
    peak = measured_flops_per_second(CUDA, "bfloat16")
    assert peak is not None
    assert peak > 1e12
    assert torch.equal(state, torch.cuda.get_rng_state())
