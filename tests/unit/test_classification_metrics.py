"""Scores against scikit-learn's and SciPy's, over the real labels of GLUE's dev sets and random ones."""

import numpy as np
import pytest

from megatron_bert.tasks.classification import Classification
from megatron_bert.tasks.classification_metrics import METRICS, confusion_matrix
from megatron_bert.tasks.glue import FORMATS
from megatron_bert.tasks.task import TaskSettings
from tests.integration.real_text import DATA

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

BY_NAME = {
    "accuracy": sklearn.accuracy_score,
    "f1": lambda true, found: sklearn.f1_score(true, found, zero_division=0),
    "micro_f1": lambda true, found: sklearn.f1_score(true, found, average="micro", zero_division=0),
    "macro_f1": lambda true, found: sklearn.f1_score(true, found, average="macro", zero_division=0),
    "matthews": sklearn.matthews_corrcoef,
    "pearson": lambda true, found: stats.pearsonr(true, found)[0],
    "spearman": lambda true, found: stats.spearmanr(true, found)[0],
}
REAL = {
    "sst2": "SST-2/dev.tsv", "cola": "CoLA/in_domain_dev.tsv", "mrpc": "MRPC/msr_paraphrase_test.txt",
    "rte": "RTE/dev.tsv", "mnli": "MNLI/dev_full_9815.jsonl", "qqp": "QQP/dev_subset.jsonl",
    "stsb": "STS-B/dev_subset.jsonl",
}  # fmt: skip


def assert_equal(names, predicted, expected):
    for name in names:
        assert METRICS[name](predicted, expected) == pytest.approx(100 * BY_NAME[name](expected, predicted), abs=1e-9)


@pytest.mark.parametrize("name", REAL)
def test_real_labels(name):
    file = DATA / "tasks" / "glue" / REAL[name]
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    task, draw = Classification(TaskSettings(), FORMATS[name]), np.random.default_rng(0)
    examples = task.read(file)
    if task.format.kind == "number":
        expected = np.array([example.label for example in examples])
        predicted = np.round(expected + draw.normal(size=len(expected)), 1)  # rounded: with ties
    else:
        expected = np.array([task.format.labels.index(example.label) for example in examples])
        wrong = draw.integers(len(task.format.labels), size=len(expected))
        predicted = np.where(draw.random(len(expected)) < 0.3, wrong, expected)
        counts = confusion_matrix(predicted, expected, len(task.format.labels))
        assert counts.tolist() == sklearn.confusion_matrix(expected, predicted).tolist()
    assert_equal(task.format.metrics, predicted, expected)


@pytest.mark.parametrize("seed", range(5))
def test_random_labels(seed):
    draw = np.random.default_rng(seed)
    expected, predicted = draw.integers(5, size=(2, 60))
    expected[expected == 4] = 1  # a label that is predicted and never right
    assert_equal(["accuracy", "macro_f1", "matthews"], predicted, expected)
    expected, predicted = draw.integers(2, size=(2, 60, 4))
    expected[:, 2] = predicted[:, 2] = 0  # a label that nothing has
    assert_equal(["accuracy", "micro_f1", "macro_f1"], predicted, expected)


def test_constant_predictions():
    expected, constant = np.array([0, 1, 1]), np.zeros(3, dtype=int)
    assert_equal(["accuracy", "f1", "macro_f1", "matthews"], constant, expected)
    assert METRICS["pearson"](constant, expected) == METRICS["spearman"](constant, expected) == 0
