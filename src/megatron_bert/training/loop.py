"""The loop: steps, records, evaluations. It wires nothing and knows no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megatron_bert.data.batches import Batch, StepBatches
from megatron_bert.training.configuration import PretrainConfiguration
from megatron_bert.training.metrics import MetricsSink
from megatron_bert.training.objective import MicroBatch
from megatron_bert.training.schedule import learning_rate_share, set_learning_rate
from megatron_bert.training.step import Sums, evaluate_batch, train_step

__all__ = ["Run", "evaluate", "train"]


@dataclass
class Run:
    """What the loop drives.

    Attributes:
        steps: this rank's batches, step after step, without end.
        validation: makes a fresh pass over the held-out samples, or None.
    """

    configuration: PretrainConfiguration
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    steps: Iterator[StepBatches]
    validation: Callable[[], Iterator[Batch]] | None


def train(run: Run, sink: MetricsSink) -> dict[str, float]:
    """Trains for the configured steps and returns the last validation's means (empty without validation)."""
    training, runtime = run.configuration.training, run.configuration.runtime
    run.model.train()
    seen, since, last = Sums(), time.perf_counter(), {}
    for step in range(training.steps):
        share = learning_rate_share(step, training.warmup_steps, training.steps)
        learning_rate = share * run.configuration.optimizer.learning_rate
        set_learning_rate(run.optimizer, learning_rate)
        batches = [MicroBatch.of(batch) for batch in next(run.steps).micro_batches]
        sums, norm = train_step(
            run.model, run.optimizer, batches, run.device,
            precision=training.precision, clip_norm=run.configuration.optimizer.clip_norm,
        )  # fmt: skip
        seen = seen.plus(sums)
        sink.step_done()
        done, final = step + 1, step + 1 == training.steps
        if done % runtime.log_every_steps == 0 or final:
            means = seen.means()  # waits for the device, so the time below is honest
            seconds = time.perf_counter() - since
            rates = {"tokens_per_second": seen.num_tokens / seconds, "seconds": seconds}
            sink.training(done, {**means, "learning_rate": learning_rate, "gradient_norm": float(norm), **rates})
            seen, since = Sums(), time.perf_counter()
        if run.validation and (done % runtime.evaluate_every_steps == 0 or final):
            before = time.perf_counter()
            last = evaluate(run)
            sink.validation(done, last)
            since += time.perf_counter() - before
    return last


def evaluate(run: Run) -> dict[str, float]:
    """The means over all held-out samples, with the same masks each time."""
    assert run.validation is not None
    run.model.eval()
    sums = Sums()
    for batch in run.validation():
        sums = sums.plus(
            evaluate_batch(run.model, MicroBatch.of(batch), run.device, precision=run.configuration.training.precision)
        )
    run.model.train()
    return sums.means()
