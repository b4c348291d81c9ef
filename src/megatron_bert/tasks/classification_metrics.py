"""Scores of labels and numbers, in percent, with the conventions of scikit-learn and SciPy.

N examples, L labels. Labels are numbers: (N,) of one label each, or (N, L) of yes and no.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

__all__ = ["METRICS", "accuracy", "average", "confusion_matrix", "f1", "macro_f1", "matthews", "micro_f1", "pearson",
           "spearman"]  # fmt: skip

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predicted: np.ndarray, expected: np.ndarray) -> float:
    """The share of examples that are right; with several labels an example is right where all of them are."""
    right = predicted == expected
    return 100.0 * float((right.all(axis=1) if right.ndim == 2 else right).mean())


def f1(predicted: np.ndarray, expected: np.ndarray) -> float:
    """F1 of label 1 of two (GLUE's of MRPC and QQP); 0 where it is neither predicted nor expected."""
    return _f1(predicted == 1, expected == 1)


def micro_f1(predicted: np.ndarray, expected: np.ndarray) -> float:
    """F1 over all yes and no of all examples together."""
    return _f1(predicted.astype(bool), expected.astype(bool))


def macro_f1(predicted: np.ndarray, expected: np.ndarray) -> float:
    """The mean of the labels' F1; with one label each, over those that are predicted or expected."""
    if expected.ndim == 2:
        values = [_f1(predicted[:, at] == 1, expected[:, at] == 1) for at in range(expected.shape[1])]
    else:
        values = [_f1(predicted == label, expected == label) for label in np.union1d(predicted, expected)]
    return float(np.mean(values))


def matthews(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Matthews' correlation, of any number of labels; 0 where one side is constant.

    Source: Gorodkin 2004, *Comparing two K-category assignments by a K-category correlation coefficient*.
    """
    size = int(max(predicted.max(), expected.max())) + 1
    counts = confusion_matrix(predicted, expected, size).astype(np.float64)
    true, found, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    spread = (total**2 - found @ found) * (total**2 - true @ true)
    return 100.0 * float((np.trace(counts) * total - true @ found) / np.sqrt(spread)) if spread else 0.0


def pearson(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant (SciPy: not a number)."""
    one, other = (side.astype(np.float64) - side.mean(dtype=np.float64) for side in (predicted, expected))
    lengths = np.sqrt((one @ one) * (other @ other))
    return 100.0 * float(one @ other / lengths) if lengths else 0.0


def spearman(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks; 0 where one side is constant."""
    return pearson(_ranks(predicted), _ranks(expected))


def confusion_matrix(predicted: np.ndarray, expected: np.ndarray, num_labels: int) -> np.ndarray:
    """(L, L): how many examples of each expected label (row) were given each label (column)."""
    counts = np.zeros((num_labels, num_labels), dtype=np.int64)
    np.add.at(counts, (expected, predicted), 1)
    return counts


def average(scores: Mapping[str, float]) -> float:
    """The mean of a task's metrics, by which GLUE ranks a task that has two (arXiv 1804.07461, section 3)."""
    return sum(scores.values()) / len(scores)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "micro_f1": micro_f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def _f1(predicted: np.ndarray, expected: np.ndarray) -> float:
    shared = int((predicted & expected).sum())
    total = int(predicted.sum()) + int(expected.sum())
    return 200.0 * shared / total if total else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray = (last - (counts - 1) / 2)[place]
    return ranks
