"""The one place that wires a pretraining run together."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bert.checkpoint.native import checkpoints_folder, list_checkpoints, newest_good, read_state
from megatron_bert.checkpoint.writer import CheckpointWriter, remove_unfinished
from megatron_bert.data.files import written_aside
from megatron_bert.errors import SharedError, UserError
from megatron_bert.model import MegatronBertConfig
from megatron_bert.parallel.launch import agreed, from_first
from megatron_bert.training.configuration import PretrainConfiguration
from megatron_bert.training.export import write_model_folder
from megatron_bert.training.lock import run_locked
from megatron_bert.training.loop import Run, train
from megatron_bert.training.metrics import MetricsSink
from megatron_bert.training.objective import Objective
from megatron_bert.training.plot import NothingToPlot, plot_run
from megatron_bert.training.resume import refuse_changes
from megatron_bert.training.setup import Setup, joined, set_up
from megatron_bert.training.skipped import NotFinite
from megatron_bert.training.state import TrainState, snapshot
from megatron_bert.training.stop import SharedStop, StopSignals
from megatron_bert.training.throughput import Throughput, measured_flops_per_second

__all__ = ["Outcome", "pretrain"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        step, steps: done, of how many.
        stopped_by: the signal that ended it before its last step; None where it is finished.
        model: the model's folder, where it is finished.
        validation: the last validation's means.
    """

    step: int
    steps: int
    stopped_by: str | None
    model: Path | None
    metrics: Path
    validation: dict[str, float]


def pretrain(
    configuration: PretrainConfiguration, *, overwrite: bool = False, allow: Sequence[str] = (), progress: bool = False
) -> Outcome:
    """Trains a model, or goes on with the run that is in the output folder, from its newest good checkpoint. Leaves
    `output`/model (for Transformers), metrics.jsonl, curves.png, checkpoints/ and the resolved recipe.yaml.

    Started by `torchrun`, all processes share the run as the recipe's `mesh` says. SIGTERM and SIGINT (to any of them)
    end it after the step at hand, which is saved.

    Args:
        overwrite: begin anew where there is a run.
        allow: dotted keys that may differ from the run's recipe, see `resume`.

    Raises:
        UserError: the data is missing, damaged or made with another vocabulary, nothing can be trained from it, the run
            was made with another recipe, all its checkpoints are damaged, another process is at it, too many steps
            in a row were not finite, or the processes do not fit the mesh.
        UserError: the device's memory is too small.
        LostProcess: another process of the run is gone or does not answer.
        OSError: what the file system says.
    """
    with joined(configuration) as device, ExitStack() as stack:
        setup = set_up(configuration, device)
        from_first(lambda: stack.enter_context(run_locked(configuration.output)))
        try:
            return _run(setup, overwrite=overwrite, allow=allow, progress=progress)
        except torch.OutOfMemoryError as error:
            raise UserError(_out_of_memory(setup)) from error


def _run(setup: Setup, *, overwrite: bool, allow: Sequence[str], progress: bool) -> Outcome:
    configuration, ranks = setup.configuration, setup.ranks
    folder, steps = configuration.output, configuration.training.steps
    checkpoint = None if overwrite else from_first(lambda: _checkpoint(folder, setup.identity, allow))
    state, objective = setup.begin(checkpoint)
    stopped_by = None
    if not agreed(lambda: _is_finished(state, folder, steps)):
        from_first(lambda: _make_room(configuration, overwrite=overwrite))
        log.info("%s parameters on %s", f"{state.model.num_parameters():,}", setup.summary())
        stopped_by = _train(setup, state, objective, progress=progress)
        if not stopped_by:
            write_model_folder(state.model, setup.tokenizer, folder / "model", ranks)
        from_first(lambda: _plot(folder))
    trained = None if stopped_by else folder / "model"
    return Outcome(state.step, steps, stopped_by, trained, folder / "metrics.jsonl", state.validation)


def _out_of_memory(setup: Setup) -> str:
    runtime, rows = setup.configuration.runtime, setup.layout.micro_samples
    ways = [] if rows == 1 else [f"runtime.micro_batch_samples (it is {rows})"]
    ways += [] if runtime.recompute == "full" else ["activations with runtime.recompute=full"]
    ways.append(f"data.row_tokens (it is {setup.configuration.data.row_tokens})")
    return f"out of GPU memory: lower {', or '.join(ways)}; `megatron-bert plan` says what a size needs"


def _checkpoint(folder: Path, identity: Mapping[str, Any], allow: Sequence[str]) -> Path | None:
    """The checkpoint to go on from, if the folder has a run; what of its recipe was changed is said."""
    if not list_checkpoints(folder):
        if (folder / "model").exists():
            raise UserError(f"{folder} has a model but no checkpoint to go on from; choose another output, "
                            f"or start over with --overwrite")  # fmt: skip
        return None
    checkpoint = newest_good(folder)
    changed = refuse_changes(read_state(checkpoint)["identity"], identity, allow, str(checkpoint))
    for key, difference in changed.items():
        log.warning("changed from here on: %s %s", key, difference)
    return checkpoint


def _make_room(configuration: PretrainConfiguration, *, overwrite: bool) -> None:
    """Removes what a killed process left half-written, and with `overwrite` the run; writes the recipe."""
    folder = configuration.output
    if overwrite:
        for left in (checkpoints_folder(folder), folder / "model", folder / "tensorboard"):
            shutil.rmtree(left, ignore_errors=True)
    remove_unfinished(folder)
    with written_aside(folder / "recipe.yaml") as aside:
        aside.write_text(configuration.as_yaml(), encoding="utf-8")


def _plot(folder: Path) -> None:
    with suppress(NothingToPlot):
        plot_run(folder)


def _is_finished(state: TrainState, folder: Path, steps: int) -> bool:
    """Whether nothing is left to do; says so."""
    if state.step > steps:
        raise UserError(f"{folder} has done {state.step} steps already, more than training.steps {steps}")
    if state.step < steps or not (folder / "model").exists():
        return False
    log.info(
        "%s is finished: all %d steps are done; --overwrite starts over, and --set training.steps=N with --allow "
        "training.steps goes on",
        folder,
        steps,
    )
    return True


def _train(setup: Setup, state: TrainState, objective: Objective, *, progress: bool) -> str | None:
    """Trains until the last step, or until a signal, whose name is returned.

    Raises:
        UserError: too many steps in a row were not finite, or the state at which a signal stopped could not be saved.
    """
    configuration, ranks = setup.configuration, setup.ranks
    folder, steps = configuration.output, configuration.training.steps
    about = {
        "recipe": configuration.model_dump(mode="json"),
        "identity": setup.identity,
        "config": state.model.config.to_dict(),
    }
    with (
        StopSignals() as signals,
        agreed(lambda: _sink(setup, state, progress=progress)) as sink,
        ranks.group_for_writing(configuration.mesh.timeout_seconds) as group,
        CheckpointWriter(folder, configuration.runtime.keep_checkpoints, group) as writer,
        ranks.watched(configuration.mesh.timeout_seconds) as at,
    ):
        stop = SharedStop(signals, alone=ranks.mesh is None)

        def save() -> None:
            at(f"the checkpoint of step {state.step}")
            writer.save(snapshot(state, about, ranks.layout), first=sink.sync)

        try:
            train(_wire(setup, state, objective, save, stop, at), sink)
        except NotFinite as error:
            raise SharedError(
                f"{error}, so training stopped at step {state.step}: the weights before them are in the newest "
                f"checkpoint in {checkpoints_folder(folder)}, their samples in {folder / 'metrics.jsonl'}. Lower "
                f"optimizer.learning_rate (with --allow), or look at the samples"
            ) from error
        problem = writer.wait()
        if problem and state.step < steps:
            raise SharedError(
                f"stopped after step {state.step}, which could not be saved ({problem.strerror or problem}); make "
                f"room, and the same command goes on from the checkpoint before it"
            ) from problem
        return stop.received if state.step < steps else None


def _sink(setup: Setup, state: TrainState, *, progress: bool) -> MetricsSink:
    configuration = setup.configuration
    folder = configuration.output
    return MetricsSink(
        folder / "metrics.jsonl" if setup.ranks.is_first else None,
        configuration.training.steps,
        progress=progress,
        first_step=state.step,
        tensorboard=folder / "tensorboard" if configuration.runtime.tensorboard else None,
    )


def _wire(
    setup: Setup,
    state: TrainState,
    objective: Objective,
    save: Callable[[], None],
    stop: Callable[[], bool],
    at: Callable[[str], None],
) -> Run:
    configuration, device, corpus = setup.configuration, setup.device, setup.corpus
    model_config = state.model.config
    assert isinstance(model_config, MegatronBertConfig)
    peak = measured_flops_per_second(device, configuration.training.precision)
    return Run(
        configuration=configuration,
        objective=objective,
        throughput=Throughput(model_config, device, peak and peak * setup.ranks.size),
        state=state,
        steps=corpus.steps(
            setup.layout, state.position, num_workers=configuration.runtime.num_workers, pin=device.type == "cuda"
        ),
        validation=corpus.validation_batches(setup.layout),
        save=save,
        stop_requested=stop,
        ranks=setup.ranks,
        at=at,
    )
