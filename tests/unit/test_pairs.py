"""Which sentences make a sample: each of them once, pairs as their definitions have them, and nothing hangs."""

from pathlib import Path

import numpy as np
import pytest

import megatron_bert.data.pairs
from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.masking import IGNORED
from megatron_bert.data.pairs import PairIndex
from megatron_bert.data.samples import IN_ORDER, OTHER_ORDER, SampleRules
from tests.unit.token_files import all_documents, many, write_token_file

ODD = [[3], [], [500, 1, 1], [1] * 300, [7, 900], [], [2, 2]]


def index_of(reader: IndexedReader, documents: np.ndarray | None = None, epoch: int = 0, **rules: object) -> PairIndex:
    chosen = all_documents(reader) if documents is None else documents
    return PairIndex(reader, chosen, SampleRules(**{"seed": 0, "row_tokens": 64, **rules}), epoch)  # type: ignore[arg-type]


def spans(index: PairIndex) -> list[tuple[tuple[int, int], ...]]:
    return [index.plan(at).spans for at in range(len(index))]


def straightforward(documents: list[list[int]], target: int, at_least: int) -> list[tuple[int, int]]:
    """The rule, sentence by sentence: take sentences until the target is reached; (first token, tokens) of each run."""
    runs, base = [], 0
    for lengths in documents:
        at = 0
        while at < len(lengths):
            stop = at
            while stop < len(lengths) and (sum(lengths[at:stop]) < target or stop - at < at_least):
                stop += 1
            runs.append((base + sum(lengths[:at]), sum(lengths[at:stop])))
            at = stop
        base += sum(lengths)
    return runs


@pytest.mark.parametrize("pair", ["sentence-order", "none"])
@pytest.mark.parametrize("text_tokens", [5, 20, 61, 10_000])
def test_runs_are_those_of_the_straightforward_loop(tmp_path: Path, text_tokens: int, pair: str) -> None:
    documents = [*many(), *ODD]
    reader = write_token_file(tmp_path / "text", documents)
    frame, at_least = (2, 1) if pair == "none" else (3, 2)
    index = index_of(reader, row_tokens=text_tokens + frame, short_share=0, pair=pair)
    runs = [(parts[0][0], sum(num for _, num in parts)) for parts in spans(index)]
    assert sorted(runs) == straightforward(documents, text_tokens, at_least)
    assert runs != sorted(runs)


@pytest.mark.parametrize("pair", ["sentence-order", "next-sentence", "none"])
def test_every_token_once_and_documents_apart(tmp_path: Path, pair: str) -> None:
    """Of a next-sentence pair from two documents, the second segment comes on top."""
    documents = many(200) + ODD
    reader = write_token_file(tmp_path / "text", documents)
    chosen = np.arange(1, len(documents), 3)
    index = index_of(reader, chosen, epoch=3, short_share=0.5, pair=pair)
    document_of = np.repeat(np.arange(len(documents)), [sum(document) for document in documents])
    used = []
    for at, parts in enumerate(spans(index)):
        owners = [set(document_of[start : start + num].tolist()) for start, num in parts]
        assert all(len(owner) == 1 for owner in owners)
        elsewhere = pair == "next-sentence" and index.plan(at).label == OTHER_ORDER
        if len(parts) == 2:
            assert (owners[0] != owners[1]) == elsewhere
            assert owners[1] <= set(chosen.tolist())
        for start, num in parts[:1] if elsewhere else parts:
            used += range(start, start + num)
    assert sorted(used) == np.flatnonzero(np.isin(document_of, chosen)).tolist()


@pytest.mark.parametrize("pair", ["sentence-order", "next-sentence"])
def test_labels_are_even_and_borders_lie_between_sentences(tmp_path: Path, pair: str) -> None:
    reader = write_token_file(tmp_path / "text", many(4000))
    index = index_of(reader, pair=pair)
    labels = index.labels[index.labels != IGNORED]
    assert len(labels) == index.num_pairs > 10_000
    assert (labels == OTHER_ORDER).mean() == pytest.approx(0.5, abs=4 * 0.5 / len(labels) ** 0.5)
    starts = set(reader.starts.tolist())
    for at in range(0, len(index), 10):
        parts = index.plan(at).spans
        assert all(start in starts for start, _ in parts)
        if index.labels[at] == IN_ORDER:
            assert parts[0][0] + parts[0][1] == parts[1][0]


def test_the_other_document_is_any_other_and_begins_anywhere(tmp_path: Path) -> None:
    """With five documents, each of the other four in a quarter of the pairs, from each of its sentences alike."""
    documents = [[10] * 8 for _ in range(5)]
    reader = write_token_file(tmp_path / "text", documents)
    seen = np.zeros((5, 5), int)
    begins = np.zeros(8, int)
    for epoch in range(400):
        index = index_of(reader, epoch=epoch, pair="next-sentence", row_tokens=43, short_share=0)
        drawn = index.labels == OTHER_ORDER
        np.add.at(seen, (index.starts[drawn] // 80, index.second_starts[drawn] // 80), 1)  # type: ignore[index]
        np.add.at(begins, index.second_starts[drawn] % 80 // 10, 1)  # type: ignore[index]
    assert (seen.diagonal() == 0).all()
    shares = seen / seen.sum(1, keepdims=True)
    assert shares[~np.eye(5, dtype=bool)] == pytest.approx(0.25, abs=0.04)
    assert begins / begins.sum() == pytest.approx(1 / 8, abs=0.02)


def test_a_pair_from_two_documents_has_the_target_length(tmp_path: Path) -> None:
    """Devlin et al.: the second segment fills what the first one leaves of the target, with whole sentences."""
    reader = write_token_file(tmp_path / "text", [[10] * 50 for _ in range(20)])
    index = index_of(reader, pair="next-sentence", row_tokens=103, short_share=0)
    for at in np.flatnonzero(index.labels == OTHER_ORDER).tolist():
        (_, first), (start, second) = index.plan(at).spans
        left = (500 - start % 500) // 10 * 10  # of the other document
        assert second == min(100 - first, left)


def test_short_targets_and_epochs_change_the_runs(tmp_path: Path) -> None:
    reader = write_token_file(tmp_path / "text", many(200))

    def runs(short_share: float, epoch: int) -> set[tuple[int, int]]:
        index = index_of(reader, epoch=epoch, short_share=short_share, pair="none")
        return {parts[0] for parts in spans(index)}

    assert runs(0.0, 0) == runs(0.0, 1)
    assert runs(0.5, 0) != runs(0.5, 1)
    assert len(runs(0.5, 0)) > len(runs(0.0, 0))
    assert index_of(reader, corpus=1).starts.tolist() != index_of(reader, corpus=0).starts.tolist()


def test_short_targets_are_drawn_evenly(tmp_path: Path) -> None:
    """With sentences of one token a run is as long as its target: from 2 to the longest (Devlin et al.)."""
    reader = write_token_file(tmp_path / "text", [[1] * 100_000])
    index = index_of(reader, short_share=1.0, row_tokens=12, pair="none")
    counts = np.bincount(index.first_tokens[index.starts + index.first_tokens < 100_000], minlength=11)
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:] / counts.sum() == pytest.approx(1 / 9, abs=0.01)


@pytest.mark.parametrize("pair", ["sentence-order", "next-sentence"])
def test_one_sentence_and_empty_documents(tmp_path: Path, pair: str) -> None:
    reader = write_token_file(tmp_path / "text", [[9], [], [200], [0, 0], [0, 7]])
    index = index_of(reader, pair=pair)
    assert sorted(parts for parts in spans(index)) == [((0, 9),), ((9, 200),), ((209, 7),)]
    assert index.num_pairs == 0
    assert index.num_empty_documents == 2  # without a sentence, and without a token
    assert sorted(index.plan(at).row_tokens for at in range(3)) == [9, 11, 64]


def test_next_sentences_of_a_single_document_are_no_pairs(tmp_path: Path) -> None:
    index = index_of(write_token_file(tmp_path / "text", [[20] * 30, []]), pair="next-sentence")
    assert index.num_pairs == 0
    assert len(index) == 8 or len(index) > 8


def test_nothing_at_all(tmp_path: Path) -> None:
    assert len(index_of(write_token_file(tmp_path / "text", [[], [0]]))) == 0


@pytest.mark.parametrize("pair", ["sentence-order", "next-sentence"])
def test_the_size_of_a_block_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: str) -> None:
    reader = write_token_file(tmp_path / "text", many(100) + ODD)
    whole = index_of(reader, pair=pair)
    monkeypatch.setattr(megatron_bert.data.pairs, "_BLOCK_SENTENCES", 7)
    blocks = index_of(reader, pair=pair)
    assert spans(blocks) == spans(whole)
    assert blocks.labels.tolist() == whole.labels.tolist()
