"""Questions with answers in a passage: SQuAD 1.1 and 2.0, CMRC 2018 and one's own; files, windows, predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.errors import UserError
from megatron_bert.tasks.reading import read_text, suffix_of


@dataclass(frozen=True)
class Answer:
    """A text and its first character in the passage."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question to a passage; without answers it cannot be answered from it. `where`: file and place."""

    name: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    where: str


@dataclass(frozen=True)
class WindowOptions:
    """How a question and its passage become rows. All in tokens."""

    max_length: int = 384
    stride: int | None = 128  # from one window's start to the next one's (BERT's doc_stride); None: a passage must fit
    max_question: int = 64


@dataclass(frozen=True)
class Window:
    """[CLS] question [SEP] a part of the passage [SEP]. `start` and `end` are the answer's tokens, or 0 ([CLS])."""

    example: int
    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...]
    start: int
    end: int
    passage_start: int  # the row's first token of the passage
    offsets: tuple[tuple[int, int], ...]  # first and last + 1 character of each token of the passage
    widest: tuple[bool, ...]  # no other window has this token with more context around it


@dataclass(frozen=True)
class Prediction:
    """The best answer of each question, its n best, and how much likelier no answer is (logits)."""

    text: str
    null_score: float
    n_best: tuple[tuple[str, float], ...]  # texts with the sum of their logits, best first


def read(path: Path) -> list[Question]:
    """The questions of a file in SQuAD's format, or of JSON lines {"question", "context", "answers", "id"}.

    Raises:
        UserError: the file is empty, not JSON, or an entry lacks a field; the message has the line or the entry.
    """
    text = read_text(path)
    questions = list(_of_lines(text, path) if suffix_of(path) == ".jsonl" else _of_tree(text, path))
    if not questions:
        raise UserError(f"{path} is empty: it holds no question")
    first: dict[str, str] = {}
    for question in questions:
        if question.name in first:
            raise UserError(f"{question.where}: id {question.name!r} is also that of {first[question.name]}")
        first[question.name] = question.where
    return questions


def misplaced(questions: Sequence[Question]) -> list[Question]:
    """The questions whose first answer is not where it says, white space aside: training skips them, as BERT's
    run_squad.py does. The caller lists their `where`."""
    return [question for question in questions if question.answers and not _is_in_place(question)]


def features(examples: Sequence[Question], tokenizer: Any, options: WindowOptions) -> list[Window]:
    """The windows of all questions, in order, each with the answer's tokens where it holds them whole.

    The windows are those of BERT's run_squad.py (Devlin et al. 2019); `tokenizer` is a fast one of Transformers.

    Raises:
        UserError: a passage does not fit and there is no stride, or the lengths leave no room for a passage.
    """
    if options.stride is not None and options.stride < 1:
        raise UserError(f"stride {options.stride}: at least 1 token is needed")
    windows: list[Window] = []
    for number, example in enumerate(examples):
        encode = {"add_special_tokens": False, "verbose": False}
        question = tokenizer(example.question, **encode)["input_ids"][: options.max_question]
        passage = tokenizer(example.context, return_offsets_mapping=True, **encode)
        room = options.max_length - len(question) - 3
        if room < 1:
            raise UserError(f"{example.where}: no room for the passage in max_length {options.max_length}")
        if len(passage["input_ids"]) > room and options.stride is None:
            raise UserError(
                f"{example.where}: the passage has {len(passage['input_ids'])} tokens and only {room} fit; set a stride"
            )
        windows += _windows(number, example, question, passage, room, options.stride or room, tokenizer)
    return windows


def decode(
    examples: Sequence[Question],
    windows: Sequence[Window],
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    *,
    n_best: int = 20,
    max_answer: int = 30,
    null_threshold: float | None = None,
) -> dict[str, Prediction]:
    """The predictions by question id, from the logits of each window (one a token of its row).

    The best span over all windows wins. With a `null_threshold` (SQuAD 2.0), the answer is '' where the null score,
    the smallest sum of the [CLS] logits less the best span's, is above it. `max_answer`: tokens.
    """
    found: list[list[tuple[float, int, int]]] = [[] for _ in examples]
    nulls = np.full(len(examples), np.inf)
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        nulls[window.example] = min(nulls[window.example], float(starts[0]) + float(ends[0]))
        found[window.example] += _best_spans(window, starts, ends, n_best, max_answer)
    predictions = {}
    for example, spans, null in zip(examples, found, nulls, strict=True):
        texts: dict[str, float] = {}
        for score, first, last in sorted(spans, reverse=True):
            texts.setdefault(example.context[first:last], score)
        best = tuple(texts.items())[:n_best]
        score = float(null) - best[0][1] if best else np.inf
        empty = not best or (null_threshold is not None and score > null_threshold)
        predictions[example.name] = Prediction("" if empty else best[0][0], score, best)
    return predictions


def answers_by_name(examples: Sequence[Question]) -> dict[str, list[str]]:
    """The texts of the answers by question id, as `squad_metrics` takes them."""
    return {example.name: [answer.text for answer in example.answers] for example in examples}


def _best_spans(
    window: Window, starts: np.ndarray, ends: np.ndarray, n_best: int, max_answer: int
) -> list[tuple[float, int, int]]:
    """Sum of logits, first and last + 1 character of the best spans that lie in the passage."""
    begin, size = window.passage_start, len(window.offsets)
    if not size:  # an empty passage
        return []
    first, last = (np.asarray(logits[begin : begin + size], dtype=np.float64) for logits in (starts, ends))
    first_best = np.argsort(-np.where(window.widest, first, -np.inf), kind="stable")[:n_best]
    first_best = first_best[np.asarray(window.widest)[first_best]]
    last_best = np.argsort(-last, kind="stable")[:n_best]
    length = last_best[None, :] - first_best[:, None]
    rows, columns = np.nonzero((length >= 0) & (length < max_answer))
    scores = first[first_best[rows]] + last[last_best[columns]]
    return [
        (float(scores[one]), window.offsets[first_best[rows[one]]][0], window.offsets[last_best[columns[one]]][1])
        for one in np.argsort(-scores, kind="stable")[:n_best]
    ]


def _windows(
    number: int,
    example: Question,
    question: list[int],
    passage: Mapping[str, Any],
    room: int,
    stride: int,
    tokenizer: Any,
) -> Iterator[Window]:
    ids, offsets = passage["input_ids"], passage["offset_mapping"]
    begins = [0]
    while begins[-1] + room < len(ids):
        begins.append(begins[-1] + min(stride, room))
    ranges = [(begin, min(begin + room, len(ids))) for begin in begins]
    answer = _answer_tokens(example, offsets)
    head = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id]
    for place, (begin, end) in enumerate(ranges):
        row = (*head, *ids[begin:end], tokenizer.sep_token_id)
        inside = answer is not None and begin <= answer[0] and answer[1] < end
        shift = len(head) - begin
        yield Window(
            number,
            row,
            (0,) * len(head) + (1,) * (len(row) - len(head)),
            answer[0] + shift if answer and inside else 0,
            answer[1] + shift if answer and inside else 0,
            len(head),
            tuple(tuple(pair) for pair in offsets[begin:end]),
            tuple(_widest(ranges, token) == place for token in range(begin, end)),
        )


def _widest(ranges: Sequence[tuple[int, int]], token: int) -> int:
    """The window with the most context around a token (run_squad.py's `_check_is_max_context`)."""
    scores = [
        min(token - begin, end - 1 - token) + 0.01 * (end - begin) if begin <= token < end else -1.0
        for begin, end in ranges
    ]
    return scores.index(max(scores))


def _answer_tokens(example: Question, offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """First and last token that touch the first answer; none where it has no token."""
    if not example.answers:
        return None
    begin = example.answers[0].start
    end = begin + len(example.answers[0].text)
    touched = [place for place, (first, last) in enumerate(offsets) if first < end and last > begin]
    return (touched[0], touched[-1]) if touched else None


def _is_in_place(question: Question) -> bool:
    answer = question.answers[0]
    there = question.context[answer.start : answer.start + len(answer.text)]
    return bool(answer.text.strip()) and "".join(there.split()) == "".join(answer.text.split())


def _of_tree(text: str, path: Path) -> Iterator[Question]:
    if not text.strip():
        return
    try:
        articles = json.loads(text)["data"]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f'{path}: not in SQuAD\'s format: an object with "data" is expected') from error
    number = 0
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    number += 1
                    yield _question({**entry, "context": paragraph["context"]}, f"{path}, question {number}", number)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}, after question {number}: not in SQuAD's format: {error}") from error


def _of_lines(text: str, path: Path) -> Iterator[Question]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error.msg}") from error
            yield _question(entry, f"{path}, line {number}", number)


def _question(entry: Any, where: str, number: int) -> Question:
    try:
        listed = [] if entry.get("is_impossible") else entry.get("answers", [])
        if isinstance(listed, dict):  # {"text": [...], "answer_start": [...]}
            pairs = zip(listed["text"], listed["answer_start"], strict=True)
        else:
            pairs = ((answer["text"], answer["answer_start"]) for answer in listed)  # type: ignore[assignment]
        answers = tuple(Answer(str(text), int(start)) for text, start in pairs)
        for key in ("question", "context"):
            if not isinstance(entry[key], str):
                raise TypeError(f"{key!r} is not a text")
        return Question(str(entry.get("id", number)), entry["question"], entry["context"], answers, where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f'{where}: "question", "context" and "answers" of "text" and "answer_start" are needed: {error}'
        ) from error
