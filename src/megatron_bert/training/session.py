"""A run and its folder: where it goes on from, what is written there, and how it ends; the same for every kind."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_bert.checkpoint.native import checkpoints_folder, list_checkpoints, newest_good, read_state, state_file
from megatron_bert.checkpoint.writer import CheckpointWriter, remove_unfinished
from megatron_bert.data.files import written_aside
from megatron_bert.errors import SharedError, UserError
from megatron_bert.parallel.launch import agreed, from_first
from megatron_bert.training.configuration import ComputeSection, MeshSection
from megatron_bert.training.loop import Run, train
from megatron_bert.training.metrics import MetricsSink
from megatron_bert.training.plot import NothingToPlot, plot_runs
from megatron_bert.training.ranks import Ranks
from megatron_bert.training.resume import refuse_changes
from megatron_bert.training.skipped import NotFinite
from megatron_bert.training.state import TrainState, snapshot
from megatron_bert.training.stop import SharedStop, StopSignals

__all__ = ["Recipe", "Session", "Wire"]

log = logging.getLogger(__name__)

# From what saves the state, says whether to stop, and is told what comes next: what the loop drives.
Wire = Callable[[Callable[[], None], Callable[[], bool], Callable[[str], None]], Run]


class Recipe(Protocol):
    """What every kind of run's configuration has."""

    @property
    def output(self) -> Path:
        """The run's folder."""

    @property
    def runtime(self) -> ComputeSection:
        """How it is computed."""

    @property
    def mesh(self) -> MeshSection:
        """How processes share it."""

    def as_yaml(self) -> str:
        """With every value spelled out."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """As JSON."""


@dataclass(frozen=True)
class Session:
    """A run in its folder.

    Attributes:
        steps: of the whole run.
        identity: what decides its result, see `resume`.
        steps_key: the key of the recipe that decides how many steps there are.
        results: names of what else it leaves in the folder, beside the model.
    """

    recipe: Recipe
    steps: int
    ranks: Ranks
    identity: Mapping[str, Any]
    steps_key: str = "training.steps"
    results: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.recipe.output

    def checkpoint(self, allow: Sequence[str]) -> Path | None:
        """The checkpoint to go on from, if the folder has a run; what of its recipe was changed is said. All processes
        have to call it; the first one looks, and reads all of what may be a large checkpoint.

        Raises:
            UserError: all are damaged, or something was changed that may not.
        """
        with self.ranks.patient_group() as group:
            return from_first(lambda: self._checkpoint(allow), group)

    def _checkpoint(self, allow: Sequence[str]) -> Path | None:
        folder = self.folder
        if not list_checkpoints(folder):
            if (folder / "model").exists():
                raise UserError(f"{folder} has a model but no checkpoint to go on from; choose another output, "
                                f"or start over with --overwrite")  # fmt: skip
            return None
        checkpoint = newest_good(folder)
        changed = refuse_changes(read_state(checkpoint)["identity"], self.identity, allow, str(checkpoint))
        for key, difference in changed.items():
            log.warning("changed from here on: %s %s", key, difference)
        return checkpoint

    def is_finished(self, state: TrainState, *, is_done: bool) -> bool:
        """Whether nothing is left to do; says so. `is_done`: no step is."""
        if state.step > self.steps:
            said = "" if self.steps_key == "training.steps" else ", which makes"
            raise UserError(
                f"{self.folder} has done {state.step} steps already, more than {self.steps_key}{said} {self.steps}"
            )
        if not is_done or not self._has_its_model():
            return False
        why, key = f"all {state.step} steps are done", self.steps_key
        if state.step < self.steps:
            why, key = f"nothing got better for too long, after {state.step} of {self.steps} steps", "training.patience"
        log.info(
            "%s is finished: %s; --overwrite starts over, and --set %s=N with --allow %s goes on",
            self.folder,
            why,
            key,
            key,
        )
        return True

    def _has_its_model(self) -> bool:
        """Whether the model is there, and not that of an earlier end, before the run went on with more steps."""
        written, saved = self.folder / "model" / "config.json", state_file(list_checkpoints(self.folder)[0])
        return written.exists() and written.stat().st_mtime_ns >= saved.stat().st_mtime_ns

    def make_room(self, *, overwrite: bool) -> None:
        """Removes what a killed process left half-written, and with `overwrite` the run; writes the recipe."""
        folder = self.folder
        if overwrite:
            for left in (checkpoints_folder(folder), folder / "model", folder / "tensorboard"):
                shutil.rmtree(left, ignore_errors=True)
            for result in map(folder.joinpath, self.results):
                shutil.rmtree(result) if result.is_dir() else result.unlink(missing_ok=True)
        remove_unfinished(folder)
        with written_aside(folder / "recipe.yaml") as aside:
            aside.write_text(self.recipe.as_yaml(), encoding="utf-8")

    def plot(self) -> None:
        """Draws the run's curves, if it has any."""
        with suppress(NothingToPlot):
            plot_runs([self.folder])

    def train(self, state: TrainState, wire: Wire, *, progress: bool) -> str | None:
        """Trains until the run is done, or until a signal, whose name is returned.

        Raises:
            UserError: too many steps in a row were not finite, or the state at which a signal stopped could not be
                saved.
        """
        about = {
            "recipe": self.recipe.model_dump(mode="json"),
            "identity": self.identity,
            "config": state.model.config.to_dict(),
        }
        folder, ranks, timeout_seconds = self.folder, self.ranks, self.recipe.mesh.timeout_seconds
        with (
            StopSignals() as signals,
            agreed(lambda: self._sink(state, progress=progress)) as sink,
            ranks.patient_group() as group,
            CheckpointWriter(folder, self.recipe.runtime.keep_checkpoints, group) as writer,
        ):
            stop = SharedStop(signals, alone=ranks.mesh is None)
            with ranks.watched(timeout_seconds) as at:

                def save() -> None:
                    what = f"the checkpoint of step {state.step}"
                    at(what)
                    kept = snapshot(state, about, ranks.layout)  # waits for the device
                    at(what, is_slow=True)  # waits for the disk
                    writer.save(kept, first=sink.sync)

                run = wire(save, stop, at)
                try:
                    train(run, sink)
                except NotFinite as error:
                    raise SharedError(
                        f"{error}, so training stopped at step {state.step}: the weights before them are in the newest "
                        f"checkpoint in {checkpoints_folder(folder)}, their samples in {folder / 'metrics.jsonl'}. "
                        f"Lower optimizer.learning_rate (with --allow), or look at the samples"
                    ) from error
                at("the last checkpoint", is_slow=True)
                problem = writer.wait()
            if problem and not run.is_done:
                raise SharedError(
                    f"stopped after step {state.step}, which could not be saved ({problem.strerror or problem}); make "
                    f"room, and the same command goes on from the checkpoint before it"
                ) from problem
            return None if run.is_done else stop.received

    def _sink(self, state: TrainState, *, progress: bool) -> MetricsSink:
        return MetricsSink(
            self.folder / "metrics.jsonl" if self.ranks.is_first else None,
            self.steps,
            progress=progress,
            first_step=state.step,
            tensorboard=self.folder / "tensorboard" if self.recipe.runtime.tensorboard else None,
        )
