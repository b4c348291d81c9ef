"""Which training passes are recorded, what is put where for a replay, and what adds up. A GPU test has the graphs.

Here a replay computes the pass again, in the memory that was put aside for it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from megatron_bert.data.masking import IGNORED
from megatron_bert.training import loop
from megatron_bert.training.execution import pass_graphs
from megatron_bert.training.graphs import PassGraphs, _Recorded
from megatron_bert.training.objective import Objective
from megatron_bert.training.ranks import ALONE, Ranks
from megatron_bert.training.step import StepResult, train_step
from tests.unit.test_step import CPU, SGD, assert_same
from tests.unit.test_training_parts import batch, tiny_model


class Replayed(PassGraphs):
    """Without a GPU."""

    def __init__(self) -> None:
        super().__init__(CPU)
        streams = SimpleNamespace(watching=nullcontext, set=lambda: None)
        self._streams = defaultdict(lambda: streams)  # type: ignore[assignment]
        self.replays: list[bool] = []
        self.resets = 0

    def _record(self, objective: Any, batch: Any, numbers: Sequence[Any], around: Any, key: Any) -> _Recorded:
        static = replace(
            batch,
            inputs={name: value.clone() for name, value in batch.inputs.items()},
            **{name: value.clone() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)},
        )
        own_numbers = [number.clone() for number in numbers]
        losses = objective(static)
        losses = type(losses)(*(torch.full_like(one, float("nan")) for one in losses))
        if not self._gradients:
            self._gradients = {one: torch.full_like(one, float("nan")) for one in objective.model.parameters()}
        self._put_gradients()

        def compute() -> None:
            self.replays.append(key[0])
            found = self._pass(objective, static, own_numbers, around, is_first=key[0])
            for one, value in zip(losses, found, strict=True):
                one.copy_(value)

        def reset() -> None:
            self.resets += 1

        return _Recorded(compute, reset, static.tensors(), own_numbers, losses, self._streams[key])


def run(steps: list[list[Any]], graphs: PassGraphs | None, ranks: Ranks = ALONE) -> list[StepResult]:
    """Of pairs: a batch, and room for so many predictions."""
    torch.manual_seed(0)
    objective = Objective(tiny_model(), CPU, graphs=graphs)
    optimizer = SGD(objective.model.parameters())
    results = []
    for step in steps:
        micro_batches = []
        for one, more in step:
            micro = objective.micro_batch(one)
            targets = functional.pad(micro.targets, (0, more - len(micro.targets)), value=IGNORED)
            positions = functional.pad(micro.positions, (0, more - len(micro.positions)))
            micro_batches.append(replace(micro, positions=positions, targets=targets))
        results.append(train_step(objective, optimizer, micro_batches, clip_norm=1.0, ranks=ranks))
    return results


BATCHES = [batch(seed=seed, padded=False) for seed in range(4)]


@pytest.mark.parametrize(
    ("rooms", "replays"),
    [
        ([[60]] * 4, [True] * 2),
        ([[60, 60]] * 4, [True, False] * 2),
        ([[60]] * 3 + [[80]] * 3, [True] * 2),  # more room: seen twice again, into the same gradients
        ([[60, 80]] * 5 + [[80, 60]] * 3, [True, False] * 3 + [True, False]),
        ([[60, 80]] * 3 + [[99, 80]], [True, False]),  # the second adds to what no recording knows
        ([[60, 80]] * 2 + [[99, 80]], []),
    ],
)  # fmt: skip
def test_steps_are_those_without(rooms: list[list[int]], replays: list[bool]) -> None:
    steps = [[(BATCHES[(at + place) % 4], room) for place, room in enumerate(step)] for at, step in enumerate(rooms)]
    graphs = Replayed()
    assert_same(run(steps, None), run(steps, graphs), rel=1e-5)
    assert graphs.replays == replays


class Noted(Ranks):
    """Puts something around a step's last pass."""

    entered = left = 0

    def around_last_pass(self, model: Any) -> Any:
        return self.noted

    @contextmanager
    def noted(self) -> Iterator[None]:
        type(self).entered += 1
        yield
        type(self).left += 1


@pytest.mark.parametrize(
    ("passes", "replays"),
    [(1, [True] * 4), (2, [True, False] * 4), (3, [True] + [False] * 2 + [True, False, False] * 3)],
)
def test_what_is_around_a_last_pass_is_recorded_with_it(passes: int, replays: list[bool]) -> None:
    steps, graphs = [[(BATCHES[(at + place) % 4], 60) for place in range(passes)] for at in range(6)], Replayed()
    before = Noted.entered
    assert_same(run(steps, None), run(steps, graphs, Noted()), rel=1e-5)
    assert graphs.replays == replays
    assert Noted.entered == Noted.left == before + len(steps)


class Failing(Replayed):
    """Can record once."""

    def _record(self, objective: Any, *args: Any) -> _Recorded:
        if not self._recorded:
            return super()._record(objective, *args)
        for parameter in objective.model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        raise RuntimeError("no\n room")


def test_where_recording_fails_all_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    """Also in the middle of a step."""
    steps = [[(BATCHES[at % 4], 60), (BATCHES[at % 3], 80)] for at in range(6)]
    graphs = Failing()
    assert_same(run(steps, None), run(steps, graphs), rel=1e-5)
    assert graphs.replays == [True]
    assert [record.message.partition(": ")[2] for record in caplog.records] == ["no room"]


def test_the_last_used_recordings_are_kept_and_there_is_an_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("megatron_bert.training.graphs._KEPT", 2)
    monkeypatch.setattr("megatron_bert.training.graphs._MOST", 4)
    rooms = [60, 60, 60, 80, 80, 80, 60, 99, 99, 99, 60, 80, 80, 120, 120, 120, 80]
    graphs = Replayed()
    steps = [[(BATCHES[at % 4], room)] for at, room in enumerate(rooms)]
    assert_same(run(steps, None), run(steps, graphs), rel=1e-5)
    # Recorded: 60, 80, 99 in place of 80, 80 once more; and nothing after that.
    assert len(graphs.replays) == len([60, 80, 60, 99, 60, 80, 80, 80])
    assert [record.message.partition(":")[0] for record in caplog.records] == ["batches of ever new shapes"]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_recorded_outlives_the_run(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group cannot end before the graphs that send in it."""
    graphs = Replayed()
    run([[(BATCHES[0], 60), (BATCHES[1], 60)]] * 4, graphs)
    training: Any = SimpleNamespace(
        state=SimpleNamespace(step=0, model=tiny_model()),
        runtime=SimpleNamespace(stop_after_skipped_steps=1),
        objective=SimpleNamespace(graphs=graphs),
        is_done=not fails,
        stop_requested=lambda: False,
    )
    assert graphs.resets == 0
    monkeypatch.setattr(loop, "_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        loop.train(training, SimpleNamespace())  # type: ignore[arg-type]
    assert graphs.resets == 2  # the first pass of a step, and the others
    assert not graphs._recorded


@pytest.mark.parametrize(
    ("precision", "recompute", "recorded"),
    [
        ("bfloat16", "none", True),
        ("float8", "none", True),
        ("float32", "none", False),
        ("bfloat16", "full", False),
    ],
)
def test_which_runs_are_recorded(precision: str, recompute: Any, recorded: bool) -> None:
    assert (pass_graphs(torch.device("cuda"), precision, recompute) is not None) == recorded
    assert pass_graphs(CPU, precision, recompute) is None
