"""Exact match and F1 of answers: SQuAD's official normalisation, 2.0's thresholds, and CMRC 2018's own variant."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from megatron_bert.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE_MARKS = set("-:_*^/\\~`+=,。：？！“”；’《》……·、「」（）－～『』")
_CHINESE = re.compile(r"[\u4e00-\u9fa5]")

Measure = Callable[[str, str], float]


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces (SQuAD's evaluate-v1.1 and v2.0 scripts)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 where the normalised texts are equal, else 0."""
    return float(normalize(prediction) == normalize(answer))


def f1(prediction: str, answer: str) -> float:
    """F1 over the bags of normalised words; two empty texts agree (SQuAD 2.0's script)."""
    predicted, expected = normalize(prediction).split(), normalize(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return _f1(shared, len(predicted), len(expected))


def cmrc_exact_match(prediction: str, answer: str) -> float:
    """1 where the texts are equal in lower case, without CMRC 2018's marks and white space around them."""
    return float(_without_marks(prediction) == _without_marks(answer))


def cmrc_f1(prediction: str, answer: str) -> float:
    """F1 of the longest common substring over mixed segments: Chinese characters and other words.

    Source: Cui et al. 2019, *A Span-Extraction Dataset for Chinese MRC*, section 4.1, and its evaluation script; words
    that are not Chinese are split at white space, where the script calls NLTK.
    """
    predicted, expected = mixed_segments(prediction), mixed_segments(answer)
    return _f1(_longest_common_run(predicted, expected), len(predicted), len(expected))


def mixed_segments(text: str) -> list[str]:
    """Lower-case text as Chinese characters and runs of others, split at white space; CMRC 2018's marks are removed."""
    spaced = "".join(
        f" {character} " if _CHINESE.match(character) else " " if character in _CHINESE_MARKS else character
        for character in text.lower().strip()
    )
    return spaced.split()


def best_over(measure: Measure, prediction: str, answers: Sequence[str]) -> float:
    """The best value of `measure` over the answers; an unanswerable question has the answer ''."""
    return max(measure(prediction, answer) for answer in answers or ("",))


def squad_scores(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Percentages over all questions of `answers`, by id: `exact`, `f1`, `total`; where some have no answer (2.0), also
    `HasAns_*` and `NoAns_*`, and answers that normalise to nothing are left out, as by 2.0's script and not by 1.1's.

    Raises:
        UserError: a question has no prediction, or there are no questions.
    """
    is_second = not all(answers.values())
    kept = {name: [text for text in texts if normalize(text) or not is_second] for name, texts in answers.items()}
    exact, overlap = (_by_question(measure, predictions, kept) for measure in (exact_match, f1))
    scores = _means(exact, overlap, list(answers), "")
    without = [name for name, texts in kept.items() if not texts]
    if without:
        having = [name for name, texts in kept.items() if texts]
        for prefix, names in (("HasAns_", having), ("NoAns_", without)):
            if names:
                scores |= _means(exact, overlap, names, prefix)
    return scores


def cmrc_scores(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Percentages by CMRC 2018's rules: `exact`, `f1`, their mean `average`, and `total`. Raises as `squad_scores`."""
    exact, overlap = (_by_question(measure, predictions, answers) for measure in (cmrc_exact_match, cmrc_f1))
    scores = _means(exact, overlap, list(answers), "")
    return {**scores, "average": (scores["exact"] + scores["f1"]) / 2}


def best_threshold(
    measure: Measure,
    predictions: Mapping[str, str],
    null_scores: Mapping[str, float],
    answers: Mapping[str, Sequence[str]],
) -> tuple[float, float]:
    """The best percentage, and the threshold of the null score that gives it: above it, a question has no answer.

    Questions are answered one by one in the order of their null scores (SQuAD 2.0's script, `find_best_thresh`).
    """
    kept = {name: [text for text in texts if normalize(text)] for name, texts in answers.items()}
    by_question = _by_question(measure, predictions, kept)
    score = best = float(sum(not texts for texts in kept.values()))
    threshold = 0.0
    for name in sorted(kept, key=lambda name: null_scores[name]):
        score += by_question[name] if kept[name] else -float(bool(predictions[name]))
        if score > best:
            best, threshold = score, null_scores[name]
    return 100 * best / len(kept), threshold


def _f1(shared: int, predicted: int, expected: int) -> float:
    if not shared:
        return 0.0
    precision, recall = shared / predicted, shared / expected
    return 2 * precision * recall / (precision + recall)


def _without_marks(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _CHINESE_MARKS)


def _longest_common_run(first: Sequence[str], second: Sequence[str]) -> int:
    longest, above = 0, [0] * (len(second) + 1)
    for one in first:
        row = [0] * (len(second) + 1)
        for column, other in enumerate(second, start=1):
            if one == other:
                row[column] = above[column - 1] + 1
        longest, above = max(longest, *row), row
    return longest


def _by_question(
    measure: Measure, predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    if not answers:
        raise UserError("there are no questions to score")
    missing = [name for name in answers if name not in predictions]
    if missing:
        raise UserError(f"{len(missing)} questions have no prediction, the first is {missing[0]!r}")
    return {name: best_over(measure, predictions[name], texts) for name, texts in answers.items()}


def _means(exact: Mapping[str, float], overlap: Mapping[str, float], names: list[str], prefix: str) -> dict[str, float]:
    share = 100 / len(names)
    return {
        f"{prefix}exact": share * sum(exact[name] for name in names),
        f"{prefix}f1": share * sum(overlap[name] for name in names),
        f"{prefix}total": float(len(names)),
    }
