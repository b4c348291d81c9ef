"""Entity scores against seqeval's, lenient (conlleval) and strict BIOES: on random tags and on CoNLL-2003's dev set."""

import random

import pytest

from megatron_bert.errors import UserError
from megatron_bert.tasks.tagging import read
from megatron_bert.tasks.tagging_metrics import entities, entity_scores
from tests.integration.real_text import DATA

TAGS = ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("PER", "LOC", "MISC"))]


def random_tags(seed):
    draw = random.Random(seed)
    return [draw.choices(TAGS, k=draw.randint(1, 12)) for _ in range(400)]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_as_seqeval(strict, seed):
    metrics = pytest.importorskip("seqeval.metrics")
    scheme = pytest.importorskip("seqeval.scheme").IOBES
    true = random_tags(seed)
    assert_equal(metrics, true, perturbed(true, TAGS, seed), {"mode": "strict", "scheme": scheme} if strict else {})


def test_conll_as_seqeval():
    metrics = pytest.importorskip("seqeval.metrics")
    sequences = pytest.importorskip("seqeval.metrics.sequence_labeling")
    file = DATA / "tasks" / "ner" / "conll2003" / "dev.txt"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    true = [list(sentence.tags) for sentence in read(file)]
    found = perturbed(true, sorted({tag for tags in true for tag in tags}), 0)
    for tags in (*true, *found):
        assert entities(tags) == sequences.get_entities(tags)
    scores = assert_equal(metrics, true, found, {})
    assert 30 < scores["f1"] < 90


def perturbed(true, tags, seed):
    draw = random.Random(seed)
    return [[draw.choice(tags) if draw.random() < 0.2 else tag for tag in sentence] for sentence in true]


def assert_equal(metrics, true, found, options):
    strict, options = bool(options), {**options, "zero_division": 0}
    report = metrics.classification_report(true, found, output_dict=True, **options)
    scores = entity_scores(*([entities(tags, strict=strict) for tags in side] for side in (found, true)))
    for prefix, row in {"": "micro avg", "PER_": "PER", "LOC_": "LOC", "MISC_": "MISC"}.items():
        for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert scores[prefix + ours] == pytest.approx(100 * report[row][theirs], abs=1e-9)
    assert scores["macro_f1"] == pytest.approx(100 * report["macro avg"]["f1-score"], abs=1e-9)
    return scores


def test_sentences_must_be_as_many():
    with pytest.raises(UserError, match="not as many"):
        entity_scores([[]], [])
