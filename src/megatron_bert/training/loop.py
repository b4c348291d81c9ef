"""The loop: steps, records, evaluations, checkpoints. It wires nothing and knows no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_bert.data.batches import Batch, StepBatches
from megatron_bert.training.configuration import ComputeSection, OptimizerSection, TrainingSection
from megatron_bert.training.metrics import MetricsSink
from megatron_bert.training.ranks import ALONE, Ranks
from megatron_bert.training.schedule import learning_rate, set_learning_rate
from megatron_bert.training.selection import Selection
from megatron_bert.training.skipped import NotFinite, SkippedSteps
from megatron_bert.training.state import TrainState, Window
from megatron_bert.training.step import Minimised, Sums, evaluate_batch, train_step
from megatron_bert.training.streams import streams_kept
from megatron_bert.training.throughput import Throughput

__all__ = ["Run", "mean_losses", "train"]


def _nowhere(what: str) -> None:
    pass


@dataclass
class Run:
    """What the loop drives.

    Attributes:
        state: where the run stands; the loop moves it on.
        objective: of the state's model.
        throughput: counts what it computes and waits.
        steps: from the state's position on, without end.
        evaluate: measures the state on what was held out, and moves nothing; None where nothing was.
        save: keeps the state as it is when called.
        stop_requested: whether somebody wants the run to stop.
        ranks: the processes that share it.
        at: is told what the loop goes on to.
        selection: of the best state and of when to stop early, by what `evaluate` measures.
    """

    training: TrainingSection
    optimizer: OptimizerSection
    runtime: ComputeSection
    evaluate_every_steps: int
    state: TrainState
    objective: Minimised[Any, Any]
    throughput: Throughput
    steps: Iterator[StepBatches]
    evaluate: Callable[[], dict[str, float]] | None
    save: Callable[[], None]
    stop_requested: Callable[[], bool]
    ranks: Ranks = ALONE
    at: Callable[[str], None] = _nowhere
    selection: Selection | None = None

    @property
    def is_done(self) -> bool:
        """Whether the last step is done, or nothing got better for too long."""
        return self.state.step >= self.training.steps or self.is_exhausted

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing got better for too long."""
        return self.selection is not None and self.selection.is_exhausted(self.state.best)


def train(run: Run, sink: MetricsSink) -> None:
    """Trains until the run is done or somebody wants to stop, and saves what was reached.

    What is recorded of a step is recorded before its checkpoint, so that a run that goes on from there lacks nothing.

    Raises:
        NotFinite: `runtime.stop_after_skipped_steps` steps in a row were not applied; the state is saved.
    """
    state, runtime = run.state, run.runtime
    skipped = SkippedSteps(state, sink, runtime.stop_after_skipped_steps)
    saved = state.step
    state.model.train()
    try:
        while not run.is_done and not run.stop_requested():
            rate, norm = _step(run, skipped)
            sink.step_done()
            final = state.step == run.training.steps
            is_recorded = state.step % runtime.log_every_steps == 0 or final
            if is_recorded:
                skipped.count()
                _record(run, sink, rate, norm)
            is_better = False
            if run.evaluate and (state.step % run.evaluate_every_steps == 0 or final):
                is_better = _evaluate(run, run.evaluate, sink)
            if run.is_exhausted and not is_recorded:
                skipped.count()
                _record(run, sink, rate, norm)
            if is_better or state.step % runtime.checkpoint_every_steps == 0:
                skipped.count()
                run.save()
                saved = state.step
        skipped.count()
    except NotFinite:
        run.save()
        raise
    finally:
        if run.objective.graphs is not None:
            run.objective.graphs.release()
    if state.step != saved:
        run.save()


def _step(run: Run, skipped: SkippedSteps) -> tuple[float, Tensor]:
    """One step; returns its learning rate and its gradient's norm before clipping."""
    state, optimizer = run.state, run.optimizer
    rate = learning_rate(state.step, optimizer, run.training)
    set_learning_rate(state.optimizer, rate)
    run.at(f"reading the samples of step {state.step + 1}")
    with run.throughput.waiting_for_data():
        batches = next(run.steps)
    micro_batches = [run.objective.micro_batch(batch) for batch in batches.micro_batches]
    run.at(f"computing step {state.step + 1}")
    sums, norm, applied = train_step(
        run.objective, state.optimizer, micro_batches, clip_norm=optimizer.clip_norm, ranks=run.ranks
    )
    state.step, state.position = state.step + 1, batches.next
    state.window.sums = state.window.sums.plus(sums)
    skipped.add(state.step, applied, batches.keys)
    return rate, norm


def _record(run: Run, sink: MetricsSink, rate: float, norm: Tensor) -> None:
    """Hands the window's numbers over and begins a new window."""
    state = run.state
    means = state.window.sums.means()  # waits for the device, so the time below is honest
    rates = run.throughput.rates(state.window.sums, state.window.seconds)
    if state.skipped:
        rates["skipped_steps"] = state.skipped
    if means:  # there are none where every step was skipped
        sink.training(state.step, {**means, "learning_rate": rate, "gradient_norm": float(norm), **rates})
    state.window = Window()


def _evaluate(run: Run, measure: Callable[[], dict[str, float]], sink: MetricsSink) -> bool:
    """Measures and records the state; whether it is the best so far, where the best is looked for."""
    state = run.state
    with state.window.paused():
        state.validation = measure()
    sink.validation(state.step, state.validation)
    if run.selection is None:
        return False
    before, state.best = state.best, run.selection.after(state.best, state.step, state.validation)
    return state.best.step != before.step


def mean_losses(
    state: TrainState,
    objective: Minimised[Any, Any],
    batches: Callable[[], Iterator[Batch]],
    ranks: Ranks = ALONE,
    at: Callable[[str], None] = _nowhere,
) -> dict[str, float]:
    """The means over all held-out samples, with the same masks each time; no random stream moves."""
    sums = Sums()
    state.model.train(False)
    with streams_kept(state.device):
        for batch in batches():
            at(f"validation after step {state.step}")
            sums = sums.plus(evaluate_batch(objective, objective.micro_batch(batch), ranks))
    state.model.train()
    return sums.means()
