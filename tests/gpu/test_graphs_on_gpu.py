"""Training passes as CUDA graphs: what they compute is what the same kernels compute without, dropout's draws too."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_bert.data.labelled import collate_labelled
from megatron_bert.data.masking import IGNORED
from megatron_bert.model import MegatronBertConfig
from megatron_bert.training.configuration import OptimizerSection
from megatron_bert.training.execution import build_objective, make_ready
from megatron_bert.training.graphs import PassGraphs
from megatron_bert.training.microbatch import FixedShapes
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.step import train_step
from megatron_bert.training.supervised import HEADS, SupervisedObjective, target_kind
from tests.gpu.test_training_on_gpu import CUDA, model
from tests.unit.test_step import packed
from tests.unit.test_supervised import CASES, SHAPE, rows, samples
from tests.unit.test_training_parts import batch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(objective: Any, steps: list[list[Any]]) -> tuple[list[tuple[float, float]], dict[str, Tensor], Tensor]:
    """Losses and gradients' norms, the weights afterwards, and where the random stream is."""
    torch.manual_seed(5)
    optimizer = build_optimizer(objective.model, OptimizerSection(learning_rate=1e-3))
    seen = []
    for step in steps:
        micro_batches = [objective.micro_batch(one) for one in step]
        result = train_step(objective, optimizer, micro_batches, clip_norm=1.0)
        seen.append((result.sums.means()["loss"], result.gradient_norm.item()))
    return seen, {name: one.detach() for name, one in objective.model.named_parameters()}, torch.cuda.get_rng_state()


def built(cuda_graphs: bool, precision: str = "bfloat16") -> Any:
    return build_objective(
        model(0.1), CUDA, precision=precision, rows=6, row_tokens=40, predicted_share=0.15, compiled=True,
        cuda_graphs=cuda_graphs,
    )  # fmt: skip


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_steps_are_those_without(is_packed: bool, passes: int) -> None:
    shaped = packed if is_packed else (lambda one: one)
    steps = [[shaped(batch(seed=passes * step + one)) for one in range(passes)] for step in range(6)]
    wanted, found = (trained(built(cuda_graphs), steps) for cuda_graphs in (False, True))
    for one, other in zip(wanted[0], found[0], strict=True):  # embeddings' gradients are added up in no fixed order
        assert other == pytest.approx(one, rel=1e-3)
    for name, weight in wanted[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0.0, atol=2e-4, msg=name)
    assert torch.equal(found[2], wanted[2])


def test_what_is_recorded() -> None:
    """From the third pass of its kind on; a first one and one that adds are two kinds."""
    objective = built(cuda_graphs=True)
    passes = objective.graphs
    assert isinstance(passes, PassGraphs)
    trained(objective, [[packed(batch(seed=seed))] * 2 for seed in range(2)])
    assert len(passes._recorded) == 0
    trained(objective, [[packed(batch(seed=seed))] * 2 for seed in range(4)])
    assert len(passes._recorded) == 2
    assert all(one.grad is None for one in objective.model.parameters())


def test_batches_that_need_more_room_are_recorded_anew() -> None:
    """Into the same gradients."""
    few, many = (packed(batch(seed=seed)) for seed in (1, 2))
    results = []
    for cuda_graphs in (False, True):
        objective = built(cuda_graphs)
        objective.micro_batch = partial(with_more_room, objective, many)
        results.append(trained(objective, [[few]] * 4 + [[many]] * 4 + [[few, many]] * 4))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert other == pytest.approx(one, rel=1e-3)


def with_more_room(objective: Any, wants: Any, one: Any) -> Any:
    """A micro-batch; that of one batch with more room for predictions."""
    micro, more = type(objective).micro_batch(objective, one), 128 if one is wants else 0
    targets = functional.pad(micro.targets, (0, more), value=IGNORED)
    return replace(micro, positions=functional.pad(micro.positions, (0, more)), targets=targets)


def test_where_nothing_can_be_recorded_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    steps = [[packed(batch(seed=seed))] for seed in range(5)]
    wanted = trained(built(cuda_graphs=False), steps)
    monkeypatch.setattr(PassGraphs, "_captured", refuse)
    found = trained(built(cuda_graphs=True), steps)
    for one, other in zip(wanted[0], found[0], strict=True):
        assert other == pytest.approx(one, rel=1e-3)
    assert [record.message for record in caplog.records if "CUDA graph" in record.message] == [
        "training passes are not recorded as CUDA graphs, so the host takes part in each: no room"
    ]


def test_attention_without_a_kernel_for_it_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """Of packed sequences in float32, which `pass_graphs` would not have recorded."""
    steps = [[packed(batch(seed=seed))] for seed in range(5)]
    wanted = trained(built(cuda_graphs=False, precision="float32"), steps)
    objective = built(cuda_graphs=False, precision="float32")
    objective.graphs = PassGraphs(CUDA)
    found = trained(objective, steps)
    for one, other in zip(wanted[0], found[0], strict=True):
        assert other == pytest.approx(one, rel=1e-3)
    assert "sequences of their own lengths" in caplog.text


def test_a_recording_that_breaks_off_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PassGraphs, *args: Any, **kwargs: Any) -> Any:
        whole(self, *args, **kwargs)
        raise RuntimeError("broken off")

    whole, steps = PassGraphs._pass, [[packed(batch(seed=seed))] * 2 for seed in range(5)]
    wanted = trained(built(cuda_graphs=False), steps)
    monkeypatch.setattr(PassGraphs, "_pass", broken)
    found = trained(built(cuda_graphs=True), steps)
    for one, other in zip(wanted[0], found[0], strict=True):
        assert other == pytest.approx(one, rel=1e-3)
    assert torch.equal(found[2], wanted[2])


@pytest.mark.parametrize(("head", "problem", "num_labels"), CASES)
def test_every_head(head: Any, problem: Any, num_labels: int) -> None:
    first, *others = samples(rows(head, problem))
    kind = target_kind(head, problem)
    batches = [collate_labelled([[first, *others]], kind, num_labels, 0, 64, 12),
               collate_labelled([others], kind, num_labels, 0, 64, 12)]  # fmt: skip
    shape, results = {**SHAPE, "hidden_size": 128, "num_attention_heads": 2}, []
    for cuda_graphs in (False, True):
        torch.manual_seed(0)
        network = HEADS[head](MegatronBertConfig(**shape, num_labels=num_labels, problem_type=problem)).train().to(CUDA)
        make_ready(network, CUDA, precision="bfloat16", compiled=True)
        objective = SupervisedObjective(
            network, CUDA, head, problem, "bfloat16", FixedShapes(1, 64, 0.0, 12),
            graphs=PassGraphs(CUDA) if cuda_graphs else None,
        )  # fmt: skip
        results.append(trained(objective, [[batches[step % 2]] for step in range(6)]))
        assert objective.graphs is None or len(objective.graphs._recorded) == 1
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
