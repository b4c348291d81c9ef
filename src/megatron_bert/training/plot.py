"""Curves of runs as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_bert.data.files import written_aside
from megatron_bert.errors import UserError
from megatron_bert.training.selection import SCORE

__all__ = ["NothingToPlot", "plot_runs"]

Records = Sequence[dict[str, Any]]

# A panel's title, its quantities with their names in the legend, and whether its axis is logarithmic.
Panels = tuple[tuple[str, dict[str, str], bool], ...]
_COMMON: Panels = (
    ("gradient norm, before clipping", {"gradient_norm": "norm"}, True),
    ("tokens per second", {"tokens_per_second": "tokens"}, False),
)
_PRETRAINING: Panels = (
    ("loss (nats)", {"masked_lm_loss": "token", "pair_loss": "pair"}, False),
    ("predicted right (share)", {"masked_lm_accuracy": "token", "pair_accuracy": "pair"}, False),
    *_COMMON,
)
_TASK: Panels = (
    ("loss", {"loss": "loss"}, False),
    ("score that chooses the best checkpoint", {SCORE: "score"}, False),
    *_COMMON,
)


class NothingToPlot(UserError):
    """A run has no training record yet."""


def plot_runs(runs: Sequence[Path], picture: Path | None = None) -> Path:
    """Draws the curves of each run's metrics.jsonl, of runs that are finished, stopped or still going.

    Args:
        runs: output folders; several are drawn into the same panels.
        picture: the PNG to write; default, of one run: its curves.png.

    Returns:
        the picture's path.

    Raises:
        NothingToPlot: a run has no training record yet.
        UserError: a folder has no metrics, or they are damaged; several runs and no picture.
        OSError: what the file system says.
    """
    if picture is None and len(runs) > 1:
        raise UserError("several runs need --output F.png: curves.png in a run's folder is of that run alone")
    records = [_read(run / "metrics.jsonl") for run in runs]
    for run, found in zip(runs, records, strict=True):
        if not any(record["kind"] == "training" for record in found):
            raise NothingToPlot(f"{run / 'metrics.jsonl'} has no training record yet: see runtime.log_every_steps")
    figure = Figure(figsize=(11, 7))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.08, top=0.88, wspace=0.18, hspace=0.36)
    is_task = any(SCORE in record for found in records for record in found if record["kind"] == "validation")
    names = _names(runs)
    for axes, (title, quantities, logarithmic) in zip(
        figure.subplots(2, 2).flat, _TASK if is_task else _PRETRAINING, strict=True
    ):
        for number, (name, found) in enumerate(zip(names, records, strict=True)):
            _draw(axes, quantities, found, name, number * len(quantities))
        _finish(axes, title, logarithmic)
    figure.suptitle(", ".join(map(str, runs)))
    target = picture or runs[0] / "curves.png"
    with written_aside(target) as aside:
        figure.savefig(aside, format="png", dpi=90)
    return target


def _names(runs: Sequence[Path]) -> list[str]:
    """What tells the runs apart in a legend: their folders' names, or where two have the same, their paths."""
    if len(runs) == 1:
        return [""]
    names = [run.resolve().name for run in runs]
    return [f"{name if names.count(name) == 1 else run}: " for name, run in zip(names, runs, strict=True)]


def _draw(axes: Axes, quantities: dict[str, str], records: Records, run: str, first_color: int) -> None:
    """Training as thin lines, validation as thick ones with a mark at each evaluation, in the same colour."""
    styles: dict[str, dict[str, Any]] = {"training": {"linewidth": 1.0, "alpha": 0.7}, "validation": {"marker": "o"}}
    for at, (name, label) in enumerate(quantities.items(), start=first_color):
        for kind, style in styles.items():
            found = [record for record in records if record["kind"] == kind and record.get(name) is not None]
            points = [(record["step"], record[name]) for record in found]
            if points:
                axes.plot(*zip(*points, strict=True), label=f"{run}{label}, {kind}", color=f"C{at % 10}", **style)


def _finish(axes: Axes, title: str, logarithmic: bool) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(visible=True, alpha=0.3)
    if logarithmic:
        axes.set_yscale("log")
    if axes.lines:
        axes.legend(fontsize="small")
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, alpha=0.5)


def _read(file: Path) -> Records:
    """The records of a metrics file; a last line that is being written just now is left out."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; give the output folder of a pretraining run")
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if not line.endswith(b"\n"):
                break
            raise UserError(f"{file}, line {number}, is not a JSON object") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
            raise UserError(f"{file}, line {number}, is not a record of a run")
        records.append(record)
    return records
