"""The one place that wires a pretraining run together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig
from megatron_bert.parallel.launch import agreed, from_first
from megatron_bert.training.configuration import PretrainConfiguration
from megatron_bert.training.export import write_model_folder
from megatron_bert.training.lock import run_locked
from megatron_bert.training.loop import Run, mean_losses
from megatron_bert.training.objective import Objective
from megatron_bert.training.session import Session
from megatron_bert.training.setup import Setup, joined, set_up
from megatron_bert.training.state import TrainState
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
    session = Session(configuration, steps, ranks, setup.identity)
    checkpoint = None if overwrite else session.checkpoint(allow)
    state, objective = setup.begin(checkpoint)
    stopped_by = None
    if not agreed(lambda: session.is_finished(state, is_done=state.step >= steps)):
        from_first(lambda: session.make_room(overwrite=overwrite))
        log.info("%s parameters on %s", f"{state.model.num_parameters():,}", setup.summary())
        stopped_by = session.train(state, partial(_wire, setup, state, objective), progress=progress)
        if not stopped_by:
            write_model_folder(state.model, setup.tokenizer, folder / "model", ranks)
        from_first(session.plot)
    trained = None if stopped_by else folder / "model"
    return Outcome(state.step, steps, stopped_by, trained, folder / "metrics.jsonl", state.validation)


def _out_of_memory(setup: Setup) -> str:
    runtime, rows = setup.configuration.runtime, setup.layout.micro_samples
    ways = [] if rows == 1 else [f"runtime.micro_batch_samples (it is {rows})"]
    ways += [] if runtime.recompute == "full" else ["activations with runtime.recompute=full"]
    ways.append(f"data.row_tokens (it is {setup.configuration.data.row_tokens})")
    mesh = setup.ranks.mesh
    groups = 1 if mesh is None or mesh.is_sharded else mesh.data_degree
    shared = f", or share weights between GPUs with mesh.shard={groups}" if groups > 1 else ""
    return f"out of GPU memory: lower {', or '.join(ways)}{shared}; `megatron-bert plan` says what a size needs"


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
    held_out = corpus.validation_batches(setup.layout)
    return Run(
        training=configuration.training,
        optimizer=configuration.optimizer,
        runtime=configuration.runtime,
        evaluate_every_steps=configuration.runtime.evaluate_every_steps,
        objective=objective,
        throughput=Throughput(model_config, device, peak and peak * setup.ranks.size),
        state=state,
        steps=corpus.steps(
            setup.layout, state.position, num_workers=configuration.runtime.num_workers, pin=device.type == "cuda"
        ),
        evaluate=held_out and partial(mean_losses, state, objective, held_out, setup.ranks, at),
        save=save,
        stop_requested=stop,
        ranks=setup.ranks,
        at=at,
    )
