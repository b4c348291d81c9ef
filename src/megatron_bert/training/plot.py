"""A run's curves as a picture."""

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

__all__ = ["NothingToPlot", "plot_run"]

Records = Sequence[dict[str, Any]]

_KINDS = ("training", "validation")

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


def plot_run(run: Path, picture: Path | None = None) -> Path:
    """Draws the curves of `run`/metrics.jsonl, of a run that is finished, stopped or still going.

    Args:
        picture: the PNG to write; default: `run`/curves.png.

    Returns:
        the picture's path.

    Raises:
        NothingToPlot: there is no training record yet.
        UserError: the folder has no metrics, or they are damaged.
        OSError: what the file system says.
    """
    records = _read(run / "metrics.jsonl")
    training, validation = ([record for record in records if record["kind"] == kind] for kind in _KINDS)
    if not training:
        raise NothingToPlot(f"{run / 'metrics.jsonl'} has no training record yet: see runtime.log_every_steps")
    figure = Figure(figsize=(11, 7))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.08, top=0.88, wspace=0.18, hspace=0.36)
    panels = _TASK if validation and SCORE in validation[0] else _PRETRAINING
    for axes, (title, names, logarithmic) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        _draw(axes, names, training, validation)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(visible=True, alpha=0.3)
        if logarithmic:
            axes.set_yscale("log")
    figure.suptitle(str(run))
    target = picture or run / "curves.png"
    with written_aside(target) as aside:
        figure.savefig(aside, format="png", dpi=90)
    return target


def _draw(axes: Axes, names: dict[str, str], training: Records, validation: Records) -> None:
    """Training as thin lines, validation as thick ones with a mark at each evaluation, in the same colour."""
    for at, (name, label) in enumerate(names.items()):
        for records, style in ((training, {"linewidth": 1.0, "alpha": 0.7}), (validation, {"marker": "o"})):
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                kind = records[0]["kind"]
                axes.plot(*zip(*points, strict=True), label=f"{label}, {kind}", color=f"C{at}", **style)
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
