"""Samples: each sentence once, pairs as sentence-order prediction defines them, and nothing but the key decides."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bert.data.batches import (
    BatchLayout,
    BatchPlan,
    Position,
    collate,
    evaluation_batches,
    training_batches,
)
from megatron_bert.data.indexed import IndexedReader, IndexedWriter, Provenance
from megatron_bert.data.masking import IGNORED
from megatron_bert.data.samples import (
    IN_ORDER,
    SWAPPED,
    EpochIndex,
    SampleBuilder,
    SampleKey,
    SampleRules,
    split_documents,
)
from megatron_bert.errors import UserError
from tests.unit.test_masking import CLS, SEP, masker

MakeReader = Callable[[list[list[int]]], IndexedReader]


@pytest.fixture
def make_reader(tmp_path: Path) -> MakeReader:
    """Writes documents given as the lengths of their sentences; token ids are drawn from the ordinary ones."""

    def make(documents: list[list[int]]) -> IndexedReader:
        lengths = np.array([length for document in documents for length in document], np.int32)
        tokens = np.random.default_rng(0).integers(5, 105, int(lengths.sum()))
        with IndexedWriter(tmp_path / "text", "uint16") as writer:
            writer.add(tokens, lengths, [len(document) for document in documents])
            writer.finish(
                Provenance(fingerprint="", vocabulary_size=105, tokenizer="", documents=0, sentences=0, tokens=0)
            )
        return IndexedReader(tmp_path / "text")

    return make


def many(num: int = 40) -> list[list[int]]:
    """Documents of 0 to 30 sentences of 1 to 40 tokens."""
    rng = np.random.default_rng(1)
    return [rng.integers(1, 41, rng.integers(0, 31)).tolist() for _ in range(num)]


def all_documents(reader: IndexedReader) -> np.ndarray:
    return np.arange(len(reader.documents) - 1)


def straightforward(documents: list[list[int]], targets: list[int]) -> list[tuple[int, int]]:
    """The rule, sentence by sentence: take sentences until the target is reached, but at least two."""
    runs, base = [], 0
    for lengths in documents:
        at = 0
        while at < len(lengths):
            stop, total = at, 0
            while stop < len(lengths) and (total < targets[base + at] or stop - at < 2):
                total += lengths[stop]
                stop += 1
            runs.append((base + at, base + stop))
            at = stop
        base += len(lengths)
    return runs


@pytest.mark.parametrize("text_tokens", [2, 20, 61, 10_000])
def test_runs_are_those_of_the_straightforward_loop(make_reader: MakeReader, text_tokens: int) -> None:
    documents = [*many(), [3], [], [500, 1, 1], [1] * 300, [7, 900]]
    reader = make_reader(documents)
    index = EpochIndex(reader, all_documents(reader), SampleRules(0, text_tokens + 3, short_share=0), epoch=0)
    wanted = straightforward(documents, [text_tokens] * len(reader))
    assert sorted(zip(index.firsts.tolist(), index.stops.tolist(), strict=True)) == wanted
    assert index.firsts.tolist() != sorted(index.firsts.tolist())


def test_every_sentence_once_and_documents_apart(make_reader: MakeReader) -> None:
    reader = make_reader(many(200))
    chosen = np.arange(1, 200, 3)
    index = EpochIndex(reader, chosen, SampleRules(0, 64, short_share=0.5), epoch=3)
    used = sorted(sentence for a, b in zip(index.firsts, index.stops, strict=True) for sentence in range(a, b))
    assert used == [s for document in chosen for s in range(*reader.documents[document : document + 2])]
    document_of = np.repeat(all_documents(reader), np.diff(reader.documents))
    assert (document_of[index.firsts] == document_of[index.stops - 1]).all()


def test_short_targets_and_epochs_change_the_runs(make_reader: MakeReader) -> None:
    reader = make_reader(many(200))

    def runs(short_share: float, epoch: int) -> set[tuple[int, int]]:
        index = EpochIndex(reader, all_documents(reader), SampleRules(0, 64, short_share), epoch)
        return set(zip(index.firsts.tolist(), index.stops.tolist(), strict=True))

    assert runs(0.0, 0) == runs(0.0, 1)
    assert runs(0.5, 0) != runs(0.5, 1)
    assert len(runs(0.5, 0)) > len(runs(0.0, 0))


def builder_for(reader: IndexedReader, **options: object) -> SampleBuilder:
    rules = SampleRules(**{"seed": 7, "row_tokens": 64, **options})  # type: ignore[arg-type]
    return SampleBuilder(reader, rules, masker(share=0.15), CLS, SEP)


def whole(sample_ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The row before masking."""
    return np.where(labels == IGNORED, sample_ids, labels)


def test_rows_are_the_text_in_order_or_swapped(make_reader: MakeReader) -> None:
    reader = make_reader([[5, 6, 4, 7, 3] * 2] * 30)  # runs never need cutting: 50 tokens at most
    builder = builder_for(reader, short_share=0.3)
    labels = []
    for epoch in range(20):
        index = EpochIndex(reader, all_documents(reader), builder.rules, epoch)
        for at in range(len(index)):
            key = index.key(at)
            sample = builder.build(key)
            row = whole(sample.input_ids, sample.labels)
            first_sep = row.tolist().index(SEP)
            assert row[0] == CLS
            assert row[-1] == SEP
            a, b = row[1:first_sep], row[first_sep + 1 : -1]
            parts = [a, b] if sample.pair_label == IN_ORDER else [b, a]
            sentences = [reader[s] for s in range(key.first, key.stop)]
            assert np.concatenate(parts).tolist() == np.concatenate(sentences).tolist()
            borders = np.cumsum([len(s) for s in sentences])[:-1]
            if key.stop - key.first > 1:
                assert len(parts[0]) in borders
                labels.append(sample.pair_label)
            assert sample.token_type_ids.tolist() == [0] * (first_sep + 1) + [1] * (len(row) - first_sep - 1)
    assert set(labels) == {IN_ORDER, SWAPPED}
    assert np.mean(labels) == pytest.approx(0.5, abs=4 * 0.5 / len(labels) ** 0.5)


def test_one_sentence_documents_are_trained_on_without_a_pair(make_reader: MakeReader) -> None:
    reader = make_reader([[9], [], [200]])
    builder = builder_for(reader)
    index = EpochIndex(reader, all_documents(reader), builder.rules, 0)
    assert index.num_pairs == 0
    samples = [builder.build(index.key(at)) for at in range(len(index))]
    assert sorted(len(sample.input_ids) for sample in samples) == [11, 63]
    assert {sample.pair_label for sample in samples} == {IGNORED}
    assert all((sample.token_type_ids == 0).all() for sample in samples)


def test_without_pairs_rows_are_one_segment(make_reader: MakeReader) -> None:
    reader = make_reader([[10] * 20])
    builder = builder_for(reader, pairs=False)
    sample = builder.build(SampleKey(0, 0, 0, 6))
    row = whole(sample.input_ids, sample.labels)
    assert (row == SEP).sum() == 1
    assert sample.pair_label == IGNORED


@pytest.mark.parametrize(
    ("lengths", "kept"), [([80, 80], {30, 31}), ([5, 200], {5, 56}), ([200, 5], {5, 56}), ([40, 200], {30, 31})]
)
def test_the_longer_segment_gives_way_at_both_ends(make_reader: MakeReader, lengths: list[int], kept: set[int]) -> None:
    reader = make_reader([lengths])
    builder = builder_for(reader)
    starts = set()
    for number in range(60):
        sample = builder.build(SampleKey(0, number, 0, 2))
        row = whole(sample.input_ids, sample.labels).tolist()
        assert len(row) == 64
        at = row.index(SEP)
        assert {at - 1, len(row) - at - 2} == kept
        first = row[1:at] if sample.pair_label == IN_ORDER else row[at + 1 : -1]
        text = reader[0].tolist()
        starts.add(next(s for s in range(len(text)) if text[s : s + len(first)] == first))
    assert len(starts) > 5 or len(reader[0]) == 5


def test_a_sample_depends_on_its_key_alone(make_reader: MakeReader) -> None:
    reader = make_reader(many())
    index = EpochIndex(reader, all_documents(reader), builder_for(reader).rules, 2)
    forwards = [builder_for(reader).build(index.key(at)) for at in range(len(index))]
    builder = builder_for(reader)
    backwards = [builder.build(index.key(at)) for at in reversed(range(len(index)))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    changed = builder_for(reader, seed=8).build(index.key(0))
    assert not np.array_equal(changed.labels, forwards[0].labels)


def test_split_holds_out_whole_documents(make_reader: MakeReader) -> None:
    reader = make_reader(many(300))
    training, validation = split_documents(reader, 0.1, seed=3)
    assert sorted([*training, *validation]) == list(range(300))
    lengths = np.add.reduceat(np.append(reader.lengths, 0), reader.documents[:-1])
    lengths[np.diff(reader.documents) == 0] = 0
    assert lengths[validation].sum() / lengths.sum() == pytest.approx(0.1, abs=0.01)
    assert not len(split_documents(reader, 0.0, seed=3)[1])


def test_split_that_leaves_nothing_is_refused(make_reader: MakeReader) -> None:
    with pytest.raises(UserError, match=r"validation_share 0\.5 takes all 1 documents"):
        split_documents(make_reader([[5, 5]]), 0.5, seed=0)


def plan_keys(reader: IndexedReader, layout: BatchLayout, steps: int, start: Position | None = None) -> list[SampleKey]:
    rules = builder_for(reader).rules
    plan = BatchPlan(lambda epoch: EpochIndex(reader, all_documents(reader), rules, epoch), layout, start or Position())
    return [key for keys in islice(plan, steps * layout.micro_batches) for key in keys]


def test_batches_are_the_same_samples_however_they_are_dealt_out(make_reader: MakeReader) -> None:
    reader = make_reader(many(20))
    whole_batch = plan_keys(reader, BatchLayout(8, 8), steps=30)
    assert {key.epoch for key in whole_batch} >= {0, 1, 2}  # steps reach over the ends of epochs
    assert len({(key.epoch, key.index) for key in whole_batch}) == 240
    assert plan_keys(reader, BatchLayout(8, 3), steps=30) == whole_batch
    ranks = [plan_keys(reader, BatchLayout(8, 2, rank, 2), steps=30) for rank in range(2)]
    rejoined = [key for at in range(0, 120, 4) for rank in range(2) for key in ranks[rank][at : at + 4]]
    assert rejoined == whole_batch
    later = plan_keys(reader, BatchLayout(8, 8), 29, Position(whole_batch[8].epoch, whole_batch[8].index))
    assert later == whole_batch[8:]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(make_reader: MakeReader, num_workers: int) -> None:
    reader = make_reader(many(20))
    builder = builder_for(reader)

    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        plan = BatchPlan(
            lambda epoch: EpochIndex(reader, all_documents(reader), builder.rules, epoch), BatchLayout(4, 4), Position()
        )
        return list(islice(training_batches(builder, plan, 0, num_workers=workers), 12))

    for one, other in zip(batches(0), batches(num_workers), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_collate_pads_at_the_right(make_reader: MakeReader) -> None:
    reader = make_reader([[9], [30, 20]])
    builder = builder_for(reader)
    samples = [builder.build(SampleKey(0, 0, 0, 1)), builder.build(SampleKey(0, 1, 1, 3))]
    batch = collate(samples, pad_id=0)
    assert batch["input_ids"].shape == (2, 53)
    assert batch["attention_mask"].sum(1).tolist() == [11, 53]
    assert batch["input_ids"][0, 11:].eq(0).all()
    assert batch["labels"][0, 11:].eq(IGNORED).all()
    assert batch["next_sentence_label"][0] == IGNORED


def test_evaluation_sees_everything_once(make_reader: MakeReader) -> None:
    reader = make_reader(many(10))
    builder = builder_for(reader)
    index = EpochIndex(reader, all_documents(reader), builder.rules, 0)
    rows = [len(batch["input_ids"]) for batch in evaluation_batches(builder, index, 0, 4)]
    assert sum(rows) == len(index)
    assert max(rows) == 4
