"""The one place that wires a pretraining run together."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_bert.checkpoint.native import checkpoints_folder, list_checkpoints, newest_good, read_state
from megatron_bert.checkpoint.writer import CheckpointWriter, remove_unfinished
from megatron_bert.data.batches import BatchLayout
from megatron_bert.data.files import written_aside
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.data.vocabulary import fingerprint
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig
from megatron_bert.training.configuration import PretrainConfiguration
from megatron_bert.training.corpus import Corpus, open_corpus
from megatron_bert.training.execution import build_objective, should_compile
from megatron_bert.training.export import write_model_folder
from megatron_bert.training.lock import run_locked
from megatron_bert.training.loop import Run, train
from megatron_bert.training.metrics import MetricsSink
from megatron_bert.training.network import build_network, empty_network
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.plot import NothingToPlot, plot_run
from megatron_bert.training.resume import refuse_changes, run_identity
from megatron_bert.training.skipped import NotFinite
from megatron_bert.training.state import TrainState, restore, snapshot
from megatron_bert.training.stop import StopSignals
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

    SIGTERM and SIGINT end it after the step at hand, which is saved.

    Args:
        overwrite: begin anew where there is a run.
        allow: dotted keys that may differ from the run's recipe, see `resume`.

    Raises:
        UserError: the data is missing, damaged or made with another vocabulary, nothing can be trained from it, the run
            was made with another recipe, all its checkpoints are damaged, another process is at it, or too many steps
            in a row were not finite.
        OSError: what the file system says.
    """
    folder, steps = configuration.output, configuration.training.steps
    device = _device(configuration.runtime.device)
    tokenizer = load_tokenizer(configuration.data.tokenizer)
    corpus = open_corpus(configuration, tokenizer)
    layout = corpus.best_layout(_layout(configuration))
    identity = run_identity(configuration, fingerprint(tokenizer.backend_tokenizer))
    with run_locked(folder):
        checkpoint = None if overwrite else _checkpoint(folder, identity, allow)
        state = _state(configuration, tokenizer, checkpoint, device)
        stopped_by = None
        if not _is_finished(state, folder, steps):
            _make_room(configuration, overwrite=overwrite)
            log.info("%s parameters on %s; %s", f"{state.model.num_parameters():,}", device, corpus.summary(layout))
            about = {
                "recipe": configuration.model_dump(mode="json"),
                "identity": identity,
                "config": state.model.config.to_dict(),
            }
            stopped_by = _train(state, configuration, corpus, layout, about, progress=progress)
            if not stopped_by:
                write_model_folder(state.model, tokenizer, folder / "model")
            with suppress(NothingToPlot):
                plot_run(folder)
    trained = None if stopped_by else folder / "model"
    return Outcome(state.step, steps, stopped_by, trained, folder / "metrics.jsonl", state.validation)


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


def _state(
    configuration: PretrainConfiguration,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    device: torch.device,
) -> TrainState:
    """A run at its beginning, or where the checkpoint left it."""
    torch.manual_seed(configuration.training.seed)
    if checkpoint:  # what the run once started from may be gone by now
        section = configuration.model
        config = MegatronBertConfig.from_dict(read_state(checkpoint)["config"])
        config.hidden_dropout_prob = section.hidden_dropout_prob
        config.attention_probs_dropout_prob = section.attention_probs_dropout_prob
        network = empty_network(config, causal=configuration.objective.kind == "causal")
    else:
        network = build_network(configuration, tokenizer)
    network.to(device)  # type: ignore[arg-type]  # its decorator hides the signature
    state = TrainState(network, build_optimizer(network, configuration.optimizer), device)
    if checkpoint:
        restore(state, checkpoint)
        log.info("going on from %s", checkpoint)
    return state


def _make_room(configuration: PretrainConfiguration, *, overwrite: bool) -> None:
    """Removes what a killed process left half-written, and with `overwrite` the run; writes the recipe."""
    folder = configuration.output
    if overwrite:
        for left in (checkpoints_folder(folder), folder / "model", folder / "tensorboard"):
            shutil.rmtree(left, ignore_errors=True)
    remove_unfinished(folder)
    with written_aside(folder / "recipe.yaml") as aside:
        aside.write_text(configuration.as_yaml(), encoding="utf-8")


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


def _train(
    state: TrainState,
    configuration: PretrainConfiguration,
    corpus: Corpus,
    layout: BatchLayout,
    about: Mapping[str, Any],
    *,
    progress: bool,
) -> str | None:
    """Trains until the last step, or until a signal, whose name is returned.

    Raises:
        UserError: too many steps in a row were not finite, or the state at which a signal stopped could not be saved.
    """
    folder, steps = configuration.output, configuration.training.steps
    with (
        StopSignals() as stop,
        MetricsSink(
            folder / "metrics.jsonl",
            steps,
            progress=progress,
            first_step=state.step,
            tensorboard=folder / "tensorboard" if configuration.runtime.tensorboard else None,
        ) as sink,
        CheckpointWriter(folder, configuration.runtime.keep_checkpoints) as writer,
    ):

        def save() -> None:
            writer.save(snapshot(state, about), first=sink.sync)

        try:
            train(_wire(configuration, state, corpus, layout, save, lambda: stop.received is not None), sink)
        except NotFinite as error:
            raise UserError(
                f"{error}, so training stopped at step {state.step}: the weights before them are in the newest "
                f"checkpoint in {checkpoints_folder(folder)}, their samples in {folder / 'metrics.jsonl'}. Lower "
                f"optimizer.learning_rate (with --allow), or look at the samples"
            ) from error
        problem = writer.wait()
        if problem and state.step < steps:
            raise UserError(
                f"stopped after step {state.step}, which could not be saved ({problem.strerror or problem}); make "
                f"room, and the same command goes on from the checkpoint before it"
            ) from problem
        return stop.received if state.step < steps else None


def _layout(configuration: PretrainConfiguration) -> BatchLayout:
    samples, runtime = configuration.training.batch_samples, configuration.runtime
    return BatchLayout(samples, min(runtime.micro_batch_samples or samples, samples), packing=runtime.packing)


def _wire(
    configuration: PretrainConfiguration,
    state: TrainState,
    corpus: Corpus,
    layout: BatchLayout,
    save: Callable[[], None],
    stop_requested: Callable[[], bool],
) -> Run:
    training, runtime, device = configuration.training, configuration.runtime, state.device
    model_config = state.model.config
    assert isinstance(model_config, MegatronBertConfig)
    objective = build_objective(
        state.model,
        device,
        precision=training.precision,
        rows=layout.micro_samples,
        row_tokens=configuration.data.row_tokens,
        predicted_share=configuration.objective.predicted_share,
        recompute=runtime.recompute,
        compiled=should_compile(runtime.compile, device),
    )
    if objective.shapes and state.shapes:
        objective.shapes = state.shapes
    state.shapes = objective.shapes
    return Run(
        configuration=configuration,
        objective=objective,
        throughput=Throughput(model_config, device, measured_flops_per_second(device, training.precision)),
        state=state,
        steps=corpus.steps(layout, state.position, num_workers=runtime.num_workers, pin=device.type == "cuda"),
        validation=corpus.validation_batches(layout),
        save=save,
        stop_requested=stop_requested,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"runtime.device {name!r} is not a device; write auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device cuda: PyTorch finds no CUDA device here; write auto or cpu")
    return device
