"""Entity-level precision, recall and F1: a predicted entity counts where its type and both its ends are right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_bert.errors import UserError

Entity = tuple[str, int, int]  # type, first word, last word (included)


def entities(tags: Sequence[str], *, strict: bool = False) -> list[Entity]:
    """The entities of one sentence's BIO or BIOES tags, in order.

    Lenient: the rules of CoNLL's `conlleval` script; a type that changes, or an I- after O, begins an entity.
    Strict: BIOES; an entity is S-x, or B-x I-x ... E-x, and all else is none.
    """
    return _strict(tags) if strict else _lenient(tags)


def entity_scores(predicted: Iterable[Sequence[Entity]], expected: Iterable[Sequence[Entity]]) -> dict[str, float]:
    """Percentages over all sentences, each given by its entities: micro `precision`, `recall`, `f1`; the same for each
    type as `TYPE_f1` and so on; `macro_f1`, the mean over the types of their F1 (the official score of CLUENER).

    Raises:
        UserError: the two have different numbers of sentences.
    """
    found: set[tuple[int, Entity]] = set()
    true: set[tuple[int, Entity]] = set()
    try:
        for number, (some, others) in enumerate(zip(predicted, expected, strict=True)):
            found.update((number, entity) for entity in some)
            true.update((number, entity) for entity in others)
    except ValueError as error:
        raise UserError("there are not as many predicted sentences as expected ones") from error
    scores = _scores(found, true, "")
    types = sorted({entity[0] for _, entity in found | true})
    for kind in types:
        of_found, of_true = ({item for item in items if item[1][0] == kind} for items in (found, true))
        scores |= _scores(of_found, of_true, f"{kind}_")
    scores["macro_f1"] = sum(scores[f"{kind}_f1"] for kind in types) / len(types) if types else 0.0
    return scores


def _scores(found: set[tuple[int, Entity]], true: set[tuple[int, Entity]], prefix: str) -> dict[str, float]:
    right = len(found & true)
    precision = 100 * right / len(found) if found else 0.0
    recall = 100 * right / len(true) if true else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {f"{prefix}precision": precision, f"{prefix}recall": recall, f"{prefix}f1": f1}


def _split(tag: str) -> tuple[str, str]:
    mark, _, kind = tag.partition("-")
    return mark, kind


def _lenient(tags: Sequence[str]) -> list[Entity]:
    result: list[Entity] = []
    begin, last_mark, last_kind = 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        mark, kind = _split(tag)
        breaks = mark in "OBS" or last_mark in "OES" or kind != last_kind
        if breaks and last_mark != "O":
            result.append((last_kind, begin, place - 1))
        if breaks:
            begin = place
        last_mark, last_kind = mark, kind
    return result


def _strict(tags: Sequence[str]) -> list[Entity]:
    result: list[Entity] = []
    begin, open_kind = -1, ""
    for place, tag in enumerate(tags):
        mark, kind = _split(tag)
        if mark == "S":
            result.append((kind, place, place))
        continues = begin >= 0 and kind == open_kind
        if mark == "E" and continues:
            result.append((kind, begin, place))
        if mark == "B":
            begin, open_kind = place, kind
        elif not (mark == "I" and continues):
            begin = -1
    return result
