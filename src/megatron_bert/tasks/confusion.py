"""Which label is taken for which, as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megatron_bert.data.files import written_aside
from megatron_bert.errors import UserError

__all__ = ["draw_confusion"]

_MOST_LABELS = 50  # that a picture has room for


def draw_confusion(pairs: Sequence[tuple[str, str]], labels: Sequence[str], file: Path) -> None:
    """Draws a confusion matrix as a PNG: a row for each label, with the shares of what its examples were taken for, and
    their numbers.

    Args:
        pairs: label and predicted label of each example.

    Raises:
        UserError: there is no example with a label, or there are too many labels for a picture.
        OSError: what the file system says.
    """
    if not pairs or len(labels) > _MOST_LABELS:
        problem = f"{len(labels)} labels are too many" if pairs else "no example has a single label"
        raise UserError(f"{file}: no confusion matrix can be drawn: {problem}")
    counted = Counter(pairs)
    counts = np.array([[counted[expected, predicted] for predicted in labels] for expected in labels])
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = 2.5 + 0.6 * len(labels)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    for row, column in np.ndindex(counts.shape):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize="small")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    with written_aside(file) as aside:
        figure.savefig(aside, format="png", dpi=100)
