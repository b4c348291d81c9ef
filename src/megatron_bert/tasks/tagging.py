"""A label for each word: CoNLL columns, CLUENER's character spans and one's own JSON lines; rows, and words again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bert.errors import UserError
from megatron_bert.tasks.reading import read_text, suffix_of

IGNORED = -100  # the label of tokens that have none (torch's cross-entropy leaves them out)


_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Sentence:
    """Words with their tags; `wheres`: file and line of each word."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    wheres: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """[CLS] pieces [SEP]. A word's first piece has its label, all else `IGNORED`. `words`: the words with a label."""

    example: int
    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...]
    labels: tuple[int, ...]
    words: tuple[int, ...]


def read(path: Path) -> list[Sentence]:
    """The sentences of a file: CoNLL columns (word first, tag last, blank lines between), JSON lines {"words", "tags"},
    or CLUENER's {"text", "label": {type: {entity: [[first, last], ...]}}} as BIO tags of characters.

    Raises:
        UserError: the file is empty, or a line is not of its format.
    """
    text = read_text(path)
    is_json = suffix_of(path) in {".json", ".jsonl"}
    sentences = list(_of_json(text, path) if is_json else _of_columns(text, path))
    if not sentences:
        raise UserError(f"{path} is empty: it holds no sentence")
    return sentences


def label_names(training: Iterable[Sentence]) -> list[str]:
    """The labels of the training file: O first, then the others sorted."""
    seen = {tag for sentence in training for tag in sentence.tags}
    return ["O"] * ("O" in seen) + sorted(seen - {"O"})


def features(sentences: Sequence[Sentence], tokenizer: Any, labels: Sequence[str], max_length: int) -> list[Row]:
    """Rows of at most `max_length` tokens; a longer sentence is cut between words into several, nothing is dropped.
    A word that the tokenizer makes nothing of is [UNK]; pieces of one word beyond a whole row are left out.

    Raises:
        UserError: a tag is not in `labels`, with its file and line; `max_length` leaves no room for a piece.
    """
    if max_length < 3:
        raise UserError(f"max_length {max_length}: at least 3 tokens are needed, for [CLS], a piece and [SEP]")
    ids = {label: number for number, label in enumerate(labels)}
    rows: list[Row] = []
    for number, sentence in enumerate(sentences):
        for tag, where in zip(sentence.tags, sentence.wheres, strict=True):
            if tag not in ids:
                raise UserError(f"{where}: label {tag!r} is not one of: {', '.join(labels)}")
        encoded = tokenizer(list(sentence.words), add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [(word or [tokenizer.unk_token_id])[: max_length - 2] for word in encoded]
        for begin, end in _cuts([len(word) for word in pieces], max_length - 2):
            row, marks = [tokenizer.cls_token_id], [IGNORED]
            for word in range(begin, end):
                row += pieces[word]
                marks += [ids[sentence.tags[word]], *[IGNORED] * (len(pieces[word]) - 1)]
            row.append(tokenizer.sep_token_id)
            marks.append(IGNORED)
            rows.append(Row(number, tuple(row), (0,) * len(row), tuple(marks), tuple(range(begin, end))))
    return rows


def decode(
    sentences: Sequence[Sentence], rows: Sequence[Row], outputs: Sequence[Sequence[int]], labels: Sequence[str]
) -> list[list[str]]:
    """The predicted tag of every word, from the most likely label of each token of each row."""
    tags = [["O"] * len(sentence.words) for sentence in sentences]
    for row, output in zip(rows, outputs, strict=True):
        firsts = [place for place, label in enumerate(row.labels) if label != IGNORED]
        for word, place in zip(row.words, firsts, strict=True):
            tags[row.example][word] = labels[int(output[place])]
    return tags


def _cuts(lengths: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    begin, used = 0, 0
    for word, length in enumerate(lengths):
        if used + length > room:
            yield begin, word
            begin, used = word, 0
        used += length
    if begin < len(lengths):
        yield begin, len(lengths)


def _of_columns(text: str, path: Path) -> Iterator[Sentence]:
    words: list[tuple[str, str, str]] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        columns = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or columns[0] == "-DOCSTART-":
            if words:
                yield Sentence(*zip(*words, strict=True))
            words = []
            continue
        where = f"{path}, line {number}"
        if len(columns) < 2:
            raise UserError(f"{where}: a word and its tag are expected, in columns")
        words.append((columns[0], _checked(columns[-1].strip(), where), where))


def _of_json(text: str, path: Path) -> Iterator[Sentence]:
    decoder, place, line = json.JSONDecoder(), 0, 1
    while True:
        begin = place + len(_SPACE.match(text, place)[0])  # type: ignore[index]
        if begin == len(text):
            return
        line += text.count("\n", place, begin)
        where = f"{path}, line {line}"
        try:
            entry, place = decoder.raw_decode(text, begin)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
        line += text.count("\n", begin, place)
        for item in entry if isinstance(entry, list) else [entry]:
            yield _of_entry(item, where)


def _of_entry(entry: Any, where: str) -> Sentence:
    try:
        if "text" in entry:
            words, tags = list(entry["text"]), _tags_of_spans(entry["text"], entry.get("label", {}), where)
        else:
            words, tags = entry["words"], [_checked(tag, where) for tag in entry["tags"]]
        if len(words) != len(tags) or not words:
            raise UserError(f"{where}: {len(words)} words and {len(tags)} tags")
        return Sentence(tuple(words), tuple(tags), (where,) * len(words))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{where}: "words" and "tags", or "text" and "label" are needed: {error}') from error


def _tags_of_spans(text: str, spans: dict[str, dict[str, list[list[int]]]], where: str) -> list[str]:
    """BIO tags of characters. Of entities that overlap, the one that comes first in the file is kept."""
    tags = ["O"] * len(text)
    for kind, entities in spans.items():
        for entity, places in entities.items():
            for first, last in places:
                if text[first : last + 1] != entity:
                    raise UserError(f"{where}: {entity!r} is not at characters {first} to {last}")
                if set(tags[first : last + 1]) == {"O"}:
                    tags[first : last + 1] = [f"B-{kind}", *[f"I-{kind}"] * (last - first)]
    return tags


def _checked(tag: str, where: str) -> str:
    if tag != "O" and not (tag[:2] in {"B-", "I-", "E-", "S-"} and tag[2:]):
        raise UserError(f"{where}: tag {tag!r} is not O or one of B-, I-, E-, S- with a type")
    return tag
