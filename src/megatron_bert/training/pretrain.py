"""The one place that wires a pretraining run together."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_bert.checkpoint.native import checkpoints_folder, list_checkpoints, newest_good, read_state
from megatron_bert.checkpoint.writer import CheckpointWriter, remove_unfinished
from megatron_bert.data.batches import BatchLayout
from megatron_bert.data.files import written_aside
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.data.vocabulary import fingerprint
from megatron_bert.errors import SharedError, UserError
from megatron_bert.model import MegatronBertConfig
from megatron_bert.parallel.launch import agreed, check_agreement, is_launched, joined_processes, local_device
from megatron_bert.parallel.materialize import initialize, materialize
from megatron_bert.training.configuration import PretrainConfiguration
from megatron_bert.training.corpus import Corpus, open_corpus
from megatron_bert.training.execution import build_objective, should_compile
from megatron_bert.training.export import write_model_folder
from megatron_bert.training.lock import run_locked
from megatron_bert.training.loop import Run, train
from megatron_bert.training.metrics import MetricsSink
from megatron_bert.training.network import Network, empty_network, fill_network, network_config
from megatron_bert.training.objective import Objective
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.plot import NothingToPlot, plot_run
from megatron_bert.training.ranks import Ranks
from megatron_bert.training.resume import refuse_changes, run_identity
from megatron_bert.training.skipped import NotFinite
from megatron_bert.training.state import TrainState, restore, snapshot
from megatron_bert.training.stop import SharedStop, StopSignals
from megatron_bert.training.throughput import Throughput, measured_flops_per_second

__all__ = ["Outcome", "pretrain"]

log = logging.getLogger(__name__)

_GRACE_SECONDS = 60  # that the library waits longer than we do, whose message says more


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
        LostProcess: another process of the run is gone or does not answer.
        OSError: what the file system says.
    """
    device = _device(configuration.runtime.device)
    with _joined(device, configuration.mesh.timeout_seconds):
        ranks = agreed(lambda: Ranks.of(configuration.mesh, device))
        check_agreement(_facts(configuration))
        tokenizer = agreed(lambda: load_tokenizer(configuration.data.tokenizer))
        corpus = agreed(lambda: open_corpus(configuration, tokenizer))
        layout = agreed(lambda: corpus.best_layout(_layout(configuration, ranks)))
        identity = agreed(lambda: run_identity(configuration, fingerprint(tokenizer.backend_tokenizer)))
        setup = _Setup(configuration, device, ranks, tokenizer, corpus, layout, identity)
        with ExitStack() as stack:
            ranks.from_first(lambda: stack.enter_context(run_locked(configuration.output)))
            return _run(setup, overwrite=overwrite, allow=allow, progress=progress)


@dataclass(frozen=True)
class _Setup:
    """What a run is made of before it has a state.

    identity: see `run_identity`.
    """

    configuration: PretrainConfiguration
    device: torch.device
    ranks: Ranks
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    layout: BatchLayout
    identity: Mapping[str, Any]


def _run(setup: _Setup, *, overwrite: bool, allow: Sequence[str], progress: bool) -> Outcome:
    configuration, ranks = setup.configuration, setup.ranks
    folder, steps = configuration.output, configuration.training.steps
    checkpoint = None if overwrite else ranks.from_first(lambda: _checkpoint(folder, setup.identity, allow))
    state, objective = _state(setup, checkpoint)
    stopped_by = None
    if not agreed(lambda: _is_finished(state, folder, steps)):
        ranks.from_first(lambda: _make_room(configuration, overwrite=overwrite))
        log.info("%s parameters on %s; %s", f"{state.model.num_parameters():,}", _place(setup),
                 setup.corpus.summary(setup.layout))  # fmt: skip
        stopped_by = _train(setup, state, objective, progress=progress)
        if not stopped_by:
            write_model_folder(state.model, setup.tokenizer, folder / "model", ranks)
        ranks.from_first(lambda: _plot(folder))
    trained = None if stopped_by else folder / "model"
    return Outcome(state.step, steps, stopped_by, trained, folder / "metrics.jsonl", state.validation)


@contextmanager
def _joined(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """The processes that torchrun started, unless whoever calls has joined them."""
    if not is_launched() or dist.is_initialized():
        yield
        return
    with joined_processes(device, timeout_seconds + _GRACE_SECONDS):
        yield


def _facts(configuration: PretrainConfiguration) -> dict[str, str]:
    """What has to be the same on all processes."""
    recipe = hashlib.sha256(configuration.as_yaml().encode()).hexdigest()[:12]
    return {"the recipe (its fingerprint)": recipe, "megatron-bert's code (its fingerprint)": _fingerprint_of_code(),
            "PyTorch's version": torch.__version__}  # fmt: skip


def _fingerprint_of_code() -> str:
    """Of all modules of this package."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


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


def _state(setup: _Setup, checkpoint: Path | None) -> tuple[TrainState, Objective]:
    """A run at its beginning, or where the checkpoint left it, and what it minimises. The order is that of
    `parallelize`: the model is spread while it has no values, then gets memory, then values, then its optimizer.
    """
    configuration, ranks, device = setup.configuration, setup.ranks, setup.device
    seed = configuration.training.seed
    torch.manual_seed(ranks.stream_seed(seed))
    config = agreed(lambda: _config(setup, checkpoint))
    network = empty_network(config, causal=configuration.objective.kind == "causal")
    objective = agreed(lambda: _spread(setup, network))
    materialize(network, device)
    if checkpoint is None:
        agreed(lambda: fill_network(network, configuration.model.start_from, seed))
    else:  # what the run once started from may be gone by now
        initialize(network, seed, only=set())
    state = TrainState(network, build_optimizer(network, configuration.optimizer), device)
    if checkpoint:
        restore(state, checkpoint, ranks)
        log.info("going on from %s", checkpoint)
    if objective.shapes and state.shapes:
        objective.shapes = state.shapes
    state.shapes = objective.shapes
    return state, objective


def _config(setup: _Setup, checkpoint: Path | None) -> MegatronBertConfig:
    if checkpoint is None:
        return network_config(setup.configuration, setup.tokenizer)
    section = setup.configuration.model
    config = MegatronBertConfig.from_dict(read_state(checkpoint)["config"])
    config.hidden_dropout_prob = section.hidden_dropout_prob
    config.attention_probs_dropout_prob = section.attention_probs_dropout_prob
    return config


def _spread(setup: _Setup, network: Network) -> Objective:
    """The objective of the network, which is spread over the processes for it, on the meta device."""
    configuration = setup.configuration
    training, runtime = configuration.training, configuration.runtime
    return build_objective(
        network,
        setup.device,
        precision=training.precision,
        rows=setup.layout.micro_samples,
        row_tokens=configuration.data.row_tokens,
        predicted_share=configuration.objective.predicted_share,
        recompute=runtime.recompute,
        compiled=should_compile(runtime.compile, setup.device),
        mesh=setup.ranks.mesh,
        keeps_layers=configuration.mesh.keep_layers,
    )


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


def _place(setup: _Setup) -> str:
    """Where the parameters are, in words."""
    if setup.ranks.mesh is None:
        return str(setup.device)
    replicas, shards, tensor, _ = setup.ranks.layout
    return (
        f"{replicas * shards * tensor} processes ({tensor} tensor-parallel x {shards} sharded x {replicas} replicated)"
    )


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


def _train(setup: _Setup, state: TrainState, objective: Objective, *, progress: bool) -> str | None:
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


def _sink(setup: _Setup, state: TrainState, *, progress: bool) -> MetricsSink:
    configuration = setup.configuration
    folder = configuration.output
    return MetricsSink(
        folder / "metrics.jsonl" if setup.ranks.is_first else None,
        configuration.training.steps,
        progress=progress,
        first_step=state.step,
        tensorboard=folder / "tensorboard" if configuration.runtime.tensorboard else None,
    )


def _layout(configuration: PretrainConfiguration, ranks: Ranks) -> BatchLayout:
    samples, runtime = configuration.training.batch_samples, configuration.runtime
    share = max(samples // ranks.data_degree, 1)
    micro_samples = min(runtime.micro_batch_samples or share, share)
    return BatchLayout(samples, micro_samples, ranks.data_rank, ranks.data_degree, packing=runtime.packing)


def _wire(
    setup: _Setup,
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


def _device(name: str) -> torch.device:
    """The device; with several processes, this one's."""
    if name == "auto":
        return local_device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"runtime.device {name!r} is not a device; write auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device cuda: PyTorch finds no CUDA device here; write auto or cpu")
    return local_device(device.type) if is_launched() else device
