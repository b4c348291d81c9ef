"""The one place that wires a fine-tuning run together."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from megatron_bert.checkpoint.manifest import damage
from megatron_bert.checkpoint.native import checkpoint_of
from megatron_bert.data.files import written_aside
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig
from megatron_bert.parallel.launch import agreed, from_first
from megatron_bert.parallel.materialize import materialize, whole_parameters
from megatron_bert.tasks.adapter import merged, write_adapter
from megatron_bert.tasks.configuration import FinetuneConfiguration
from megatron_bert.tasks.network import empty_task_network
from megatron_bert.tasks.setup import Inputs, RunSetup, open_inputs
from megatron_bert.tasks.splits import Split, outputs_of
from megatron_bert.tasks.task import Outputs, Task
from megatron_bert.training.export import write_model_folder, write_whole_model
from megatron_bert.training.lock import run_locked
from megatron_bert.training.loop import Run
from megatron_bert.training.selection import SCORE, Selection
from megatron_bert.training.session import Session
from megatron_bert.training.setup import joined
from megatron_bert.training.state import TrainState, restore_weights
from megatron_bert.training.streams import streams_kept
from megatron_bert.training.supervised import SupervisedObjective
from megatron_bert.training.throughput import Throughput, measured_flops_per_second

__all__ = ["TASK_FILE", "Outcome", "Report", "finetune"]

log = logging.getLogger(__name__)

TASK_FILE = "task.json"  # in a model's folder: which task it was trained for, and how
_ADAPTER, _SCORES = "adapter", "scores.json"
_PREDICTIONS = {split: f"predictions-{split}.jsonl" for split in ("validation", "test")}
_RESULTS = (_ADAPTER, _SCORES, *_PREDICTIONS.values())


@dataclass(frozen=True)
class Outcome:
    """What a run of one seed left.

    Attributes:
        step, steps: done, of how many at most.
        stopped_by: the signal that ended it before it was done; None where it is finished.
        best_step: the step of the checkpoint that was chosen.
        model: its folder, where the run is finished.
        scores: by file ("validation", "test"), of that checkpoint.
    """

    seed: int
    step: int
    steps: int
    stopped_by: str | None
    best_step: int
    model: Path | None
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Report:
    """All runs, and where they are all finished the median of each score over them."""

    task: str
    selects_by: str
    runs: list[Outcome]
    median: dict[str, dict[str, float]]


def finetune(
    name: str,
    configuration: FinetuneConfiguration,
    *,
    overwrite: bool = False,
    allow: Sequence[str] = (),
    progress: bool = False,
) -> Report:
    """Fine-tunes for the task of this name, or goes on with the run in the output folder. Leaves there model/ (for
    Transformers), metrics.jsonl, curves.png, scores.json, predictions-*.jsonl, checkpoints/ and the resolved
    recipe.yaml; with several seeds, in a folder each.

    Args:
        overwrite, allow, progress: see `pretrain`.

    Raises:
        UserError: what `pretrain` and `open_inputs` say.
        LostProcess: another process of the run is gone or does not answer.
        OSError: what the file system says.
    """
    with joined(configuration) as device:
        inputs = open_inputs(name, configuration, device)
        outcomes: list[Outcome] = []
        for one in configuration.runs():
            if len(configuration.training.seeds) > 1:
                log.info("seed %d, in %s", one.seed, one.output)
            with ExitStack() as stack:
                from_first(lambda folder=one.output: stack.enter_context(run_locked(folder)))  # type: ignore[misc]
                try:
                    outcomes.append(_run(RunSetup.of(one, inputs), overwrite=overwrite, allow=allow, progress=progress))
                except torch.OutOfMemoryError as error:
                    raise UserError(_out_of_memory(one)) from error
            if outcomes[-1].stopped_by:
                break
        finished = all(outcome.model for outcome in outcomes)
        report = Report(name, inputs.task.selects_by, outcomes, _median(outcomes) if finished else {})
        if finished and len(outcomes) > 1:
            from_first(lambda: _write_json(configuration.output / _SCORES, _as_json(report)))
        return report


def _run(setup: RunSetup, *, overwrite: bool, allow: Sequence[str], progress: bool) -> Outcome:
    configuration, ranks, steps = setup.configuration, setup.inputs.ranks, setup.training.steps
    folder = configuration.output
    identity = agreed(lambda: setup.identity)
    session = Session(configuration, steps, ranks, identity, steps_key="training.epochs", results=_RESULTS)
    checkpoint = None if overwrite else session.checkpoint(allow)
    state, objective = setup.begin(checkpoint)
    selection = Selection(setup.configuration.training.patience)
    is_done = state.step >= steps or selection.is_exhausted(state.best)
    stopped_by = None
    if not agreed(lambda: session.is_finished(state, is_done=is_done)):
        from_first(lambda: session.make_room(overwrite=overwrite))
        log.info("%s on %s", _size(state.model), setup.summary())
        stopped_by = session.train(state, partial(_wire, setup, state, objective, selection), progress=progress)
        if not stopped_by:
            _finish(setup, state, objective)
        from_first(session.plot)
    scores = {} if stopped_by else from_first(lambda: json.loads((folder / _SCORES).read_text(encoding="utf-8")))
    return Outcome(
        configuration.seed, state.step, steps, stopped_by, state.best.step, None if stopped_by else folder / "model",
        scores,
    )  # fmt: skip


def _size(model: PreTrainedModel) -> str:
    """How many parameters the model has, and of them are trained."""
    whole, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    return f"{whole:,} parameters" + (f" ({trained:,} of them trained)" if trained < whole else "")


def _wire(
    setup: RunSetup,
    state: TrainState,
    objective: SupervisedObjective,
    selection: Selection,
    save: Callable[[], None],
    stop: Callable[[], bool],
    at: Callable[[str], None],
) -> Run:
    configuration, inputs = setup.configuration, setup.inputs
    device, ranks = inputs.device, inputs.ranks
    peak = measured_flops_per_second(device, setup.training.precision)

    def measured() -> dict[str, float]:
        here = partial(at, f"the evaluation after step {state.step}")
        outputs, means = _outputs(setup, state, objective, inputs.validation, here)
        scores = from_first(lambda: _scored(inputs.task, inputs, inputs.validation, outputs)[1])
        return {"loss": means["loss"], SCORE: scores[inputs.task.selects_by], **scores}

    return Run(
        training=setup.training,
        optimizer=configuration.optimizer,
        runtime=configuration.runtime,
        evaluate_every_steps=setup.evaluate_every_steps,
        objective=objective,
        throughput=Throughput(inputs.config, device, peak and peak * ranks.size),
        state=state,
        steps=setup.batches.steps(
            inputs.training,
            setup.training.seed,
            state.position,
            num_workers=configuration.runtime.num_workers,
            pin=device.type == "cuda",
        ),
        evaluate=measured,
        save=save,
        stop_requested=stop,
        ranks=ranks,
        at=at,
        selection=selection,
    )


def _outputs(
    setup: RunSetup,
    state: TrainState,
    objective: SupervisedObjective,
    split: Split,
    at: Callable[[], None] = lambda: None,
) -> tuple[Outputs, dict[str, float]]:
    """Of every row of the split; no random stream moves. `at` is called before each batch."""
    state.model.train(False)
    with streams_kept(state.device):
        outputs, means = outputs_of(objective, setup.batches.once(split), setup.inputs.ranks, at)
    state.model.train()
    return outputs, means


def _scored(
    task: Task[Any, Any], inputs: Inputs, split: Split, outputs: Outputs, *, tune: bool = True
) -> tuple[list[Any], dict[str, float], Task[Any, Any]]:
    """Predictions, scores, and the task with the settings that they were made with; `tune`: chosen on this split."""
    if tune and (chosen := task.tuned(split.examples, split.rows, outputs)):
        task = _with_settings(task, chosen)
    predictions = task.predictions(split.examples, split.rows, outputs, inputs.making)
    return predictions, task.scores(split.examples, predictions), task


def _with_settings(task: Task[Any, Any], chosen: dict[str, Any]) -> Task[Any, Any]:
    """The task with settings that the recipe left to be chosen."""
    left = {name: value for name, value in chosen.items() if getattr(task.settings, name) is None}
    return task.with_settings(task.settings.model_copy(update=left))


def _finish(setup: RunSetup, state: TrainState, objective: SupervisedObjective) -> None:
    """Puts the best weights back, predicts both files with them, and writes what the run leaves."""
    inputs, folder, task = setup.inputs, setup.configuration.output, setup.inputs.task
    if state.best.step and state.best.step != state.step:
        best = checkpoint_of(folder, state.best.step)
        with inputs.ranks.patient_group() as group:
            problem = from_first(lambda: damage(best), group)
        if problem:
            log.warning("%s, the best checkpoint, is damaged (%s): the last step's weights are used", best, problem)
            state.best = replace(state.best, step=state.step)
        else:
            restore_weights(state.model, best)
    scores: dict[str, dict[str, float]] = {}
    for name, split in (("validation", inputs.validation), ("test", inputs.test)):
        if split is None:
            continue
        outputs, means = _outputs(setup, state, objective, split)
        written = partial(_predicted, task, inputs, split, outputs, folder / _PREDICTIONS[name])
        found, settings = from_first(partial(written, tune=name == "validation"))
        task = task.with_settings(settings)
        scores[name] = {**({"loss": means["loss"]} if means else {}), **found}
    from_first(lambda: _write_json(folder / _SCORES, scores))
    kept = task.settings.model_dump(mode="json")
    about = {"task": inputs.name, "max_length": inputs.making.max_length, "settings": kept}
    _write_model(setup, state.model, {TASK_FILE: json.dumps(about, indent=2) + "\n"})


def _predicted(
    task: Task[Any, Any], inputs: Inputs, split: Split, outputs: Outputs, file: Path, *, tune: bool
) -> tuple[dict[str, float], Any]:
    """Writes the predictions; returns the scores, and the settings that they were made with."""
    predictions, scores, tuned = _scored(task, inputs, split, outputs, tune=tune)
    with written_aside(file) as aside, aside.open("w", encoding="utf-8") as stream:
        for example, prediction in zip(split.examples, predictions, strict=True):
            stream.write(json.dumps(tuned.record(example, prediction), ensure_ascii=False) + "\n")
    return scores, tuned.settings


def _write_model(setup: RunSetup, model: PreTrainedModel, files: dict[str, str]) -> None:
    """The folder for Transformers; adapters are merged, and kept beside it."""
    configuration, inputs = setup.configuration, setup.inputs
    lora, folder = configuration.lora, configuration.output
    if lora is None:
        write_model_folder(model, inputs.tokenizer, folder / "model", inputs.ranks, files)
        return
    weights = dict(whole_parameters(model))  # small enough for one process, or it would be tensor-parallel

    def write() -> None:
        write_adapter(weights.items(), lora, configuration.model.start_from, folder / _ADAPTER)
        plain = empty_task_network(MegatronBertConfig.from_dict(model.config.to_dict()), inputs.task.head)
        materialize(plain, torch.device("cpu"))
        plain.load_state_dict(dict(merged(weights.items(), lora)), strict=False)
        write_whole_model(plain, inputs.tokenizer, folder / "model", files)

    from_first(write)


def _write_json(file: Path, content: Any) -> None:
    with written_aside(file) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _median(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Of each score over the runs (the paper's way, arXiv 1909.08053, section 5.3)."""
    return {
        name: {key: statistics.median(one.scores[name][key] for one in outcomes) for key in scores}
        for name, scores in outcomes[0].scores.items()
    }


def _as_json(report: Report) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(report), default=str))  # type: ignore[no-any-return]


def _out_of_memory(configuration: FinetuneConfiguration) -> str:
    ways = ["runtime.micro_batch_samples"]
    ways += [] if configuration.runtime.recompute == "full" else ["activations with runtime.recompute=full"]
    ways.append(f"data.max_length (it is {configuration.data.max_length})")
    return f"out of GPU memory: lower {', or '.join(ways)}"
