"""Entity scores against seqeval's, on random tags: lenient (conlleval) and strict BIOES."""

import random

import pytest

from megatron_bert.errors import UserError
from megatron_bert.tasks.tagging_metrics import entities, entity_scores

TAGS = ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("PER", "LOC", "MISC"))]


def random_tags(seed):
    draw = random.Random(seed)
    return [draw.choices(TAGS, k=draw.randint(1, 12)) for _ in range(400)]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_as_seqeval(strict, seed):
    metrics = pytest.importorskip("seqeval.metrics")
    scheme = pytest.importorskip("seqeval.scheme").IOBES
    true, draw = random_tags(seed), random.Random(seed)
    found = [[draw.choice(TAGS) if draw.random() < 0.2 else tag for tag in tags] for tags in true]
    options = {"mode": "strict", "scheme": scheme} if strict else {}
    options["zero_division"] = 0
    report = metrics.classification_report(true, found, output_dict=True, **options)
    scores = entity_scores(*([entities(tags, strict=strict) for tags in side] for side in (found, true)))
    for prefix, row in {"": "micro avg", "PER_": "PER", "LOC_": "LOC", "MISC_": "MISC"}.items():
        for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert scores[prefix + ours] == pytest.approx(100 * report[row][theirs], abs=1e-9)
    assert scores["macro_f1"] == pytest.approx(100 * report["macro avg"]["f1-score"], abs=1e-9)


def test_sentences_must_be_as_many():
    with pytest.raises(UserError, match="not as many"):
        entity_scores([[]], [])
