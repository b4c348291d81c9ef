"""SQuAD's scores against torchmetrics' on the same predictions; CMRC 2018's against its formula by hand."""

import pytest

from megatron_bert.errors import UserError
from megatron_bert.tasks.squad_metrics import (
    best_threshold,
    cmrc_f1,
    cmrc_scores,
    exact_match,
    mixed_segments,
    squad_scores,
)

ANSWERS = {"a": ["The Norman dukes", "Norman dukes of old"], "b": ["1,066"], "c": ["an apple"], "d": ["Rollo"]}
PREDICTIONS = {"a": "norman dukes!", "b": "in 1066", "c": "", "d": "Rollo the first Rollo"}


def test_as_torchmetrics():
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    target = [
        {"id": name, "answers": {"text": texts, "answer_start": [0] * len(texts)}} for name, texts in ANSWERS.items()
    ]
    reference = squad([{"id": name, "prediction_text": text} for name, text in PREDICTIONS.items()], target)
    scores = squad_scores(PREDICTIONS, ANSWERS)
    assert scores["exact"] == pytest.approx(float(reference["exact_match"]), abs=1e-4)
    assert scores["f1"] == pytest.approx(float(reference["f1"]), abs=1e-4)


def test_questions_without_answer_are_told_apart():
    scores = squad_scores({**PREDICTIONS, "e": "", "f": "no"}, {**ANSWERS, "e": [], "f": []})
    assert (scores["NoAns_exact"], scores["NoAns_total"], scores["HasAns_total"]) == (50, 2, 4)
    assert scores["HasAns_f1"] == squad_scores(PREDICTIONS, ANSWERS)["f1"]


def test_the_best_threshold_by_trying_all():
    answers, predictions = {"a": ["x"], "b": ["y"], "c": [], "d": []}, {"a": "x", "b": "z", "c": "u", "d": "v"}
    nulls = {"a": -3.0, "b": 1.0, "c": -1.0, "d": 4.0}

    def score(threshold):
        kept = {name: text if nulls[name] <= threshold else "" for name, text in predictions.items()}
        return squad_scores(kept, answers)["exact"]

    best, threshold = best_threshold(exact_match, predictions, nulls, answers)
    assert best == max(map(score, [-9.0, *nulls.values()])) == score(threshold) == 75


def test_cmrc_counts_the_longest_common_run():
    assert mixed_segments("《战国无双3》 and Z") == ["战", "国", "无", "双", "3", "and", "z"]
    assert cmrc_f1("光荣和公司", "光荣公司") == pytest.approx(2 * (2 / 5) * (2 / 4) / (2 / 5 + 2 / 4))
    assert cmrc_scores({"a": "光荣。"}, {"a": ["光荣"]}) == {"exact": 100, "f1": 100, "total": 1, "average": 100}


def test_a_question_without_prediction_is_named():
    with pytest.raises(UserError, match="1 questions have no prediction, the first is 'd'"):
        squad_scores(dict.fromkeys("abc", ""), ANSWERS)
