"""Rows: the text of the plan, in order or exchanged, truncated at both ends; and nothing but the key decides."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.masking import IGNORED
from megatron_bert.data.pairs import PairIndex
from megatron_bert.data.samples import (
    IN_ORDER,
    OTHER_ORDER,
    MaskedBuilder,
    SampleKey,
    SamplePlan,
    SampleRules,
    TokenFile,
)
from megatron_bert.data.split import split_documents
from megatron_bert.errors import UserError
from tests.unit.test_masking import CLS, SEP, masker
from tests.unit.token_files import all_documents, many, write_token_file


def rules_of(**options: object) -> SampleRules:
    return SampleRules(**{"seed": 7, "row_tokens": 64, **options})  # type: ignore[arg-type]


def builder_for(reader: IndexedReader, **options: object) -> MaskedBuilder:
    return MaskedBuilder(TokenFile.of(reader), rules_of(**options), masker(share=0.15), CLS, SEP)


def whole(sample_ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The row before masking."""
    return np.where(labels == IGNORED, sample_ids, labels)


@pytest.mark.parametrize("pair", ["sentence-order", "next-sentence"])
def test_rows_are_the_text(tmp_path: Path, pair: str) -> None:
    reader = write_token_file(tmp_path / "text", [[5, 6, 4, 7, 3] * 2] * 30)  # never cut: 50 tokens at most
    rules = rules_of(short_share=0.3, pair=pair, row_tokens=128)
    builder = MaskedBuilder(TokenFile.of(reader), rules, masker(share=0.15), CLS, SEP)
    index = PairIndex(reader, all_documents(reader), rules, epoch=0)
    labels = set()
    for at in range(len(index)):
        plan = index.plan(at)
        sample = builder.build(plan)
        row = whole(sample.input_ids, sample.labels)
        segments = [reader.tokens[start : start + num].tolist() for start, num in plan.spans]
        if pair == "sentence-order" and plan.label == OTHER_ORDER:
            segments.reverse()
        assert row.tolist() == [CLS, *(token for segment in segments for token in [*segment, SEP])]
        types = [0] * (len(segments[0]) + 2) + [1] * (len(row) - len(segments[0]) - 2)
        assert sample.token_type_ids.tolist() == types
        assert sample.pair_label == plan.label
        assert len(row) == plan.row_tokens
        labels.add(plan.label)
    assert labels >= {IN_ORDER, OTHER_ORDER}


def test_one_segment(tmp_path: Path) -> None:
    """Without a pair there is room for one more token, and the label is not to be learnt."""
    reader = write_token_file(tmp_path / "text", [[100]])
    sample = builder_for(reader).build(SamplePlan(SampleKey(0, 0, 0), ((0, 100),), 64))
    row = whole(sample.input_ids, sample.labels)
    assert len(row) == 64
    assert (row == SEP).sum() == 1
    assert (sample.token_type_ids == 0).all()
    assert sample.pair_label == IGNORED


@pytest.mark.parametrize(
    ("lengths", "kept"), [([80, 80], {30, 31}), ([5, 200], {5, 56}), ([200, 5], {5, 56}), ([40, 200], {30, 31})]
)
def test_the_longer_segment_gives_way_at_both_ends(tmp_path: Path, lengths: list[int], kept: set[int]) -> None:
    reader = write_token_file(tmp_path / "text", [lengths], numbered=True)
    builder = MaskedBuilder(TokenFile.of(reader), rules_of(), masker(share=1e-9), 0, 1)
    builder_masks = np.zeros(400, bool)
    object.__setattr__(builder._masker, "special", builder_masks)
    object.__setattr__(builder._masker, "continues", builder_masks)
    spans = ((0, lengths[0]), (lengths[0], lengths[1]))
    starts = set()
    for number in range(60):
        sample = builder.build(SamplePlan(SampleKey(0, 0, number), spans, 64, IN_ORDER))
        row = whole(sample.input_ids, sample.labels).tolist()
        assert len(row) == 64
        border = row.index(1)
        assert {border - 1, len(row) - border - 2} == kept
        first, second = row[1:border], row[border + 1 : -1]
        assert first == list(range(first[0], first[0] + len(first)))
        assert second == list(range(second[0], second[0] + len(second)))
        starts.add((first[0], second[0]))
    assert len(starts) > 5


def test_truncation_takes_from_either_end_alike(tmp_path: Path) -> None:
    """Devlin et al.: each token too many goes from the front or the end with even odds: half of them on average."""
    reader = write_token_file(tmp_path / "text", [[162]], numbered=True)
    builder = builder_for(reader)
    object.__setattr__(builder._masker, "special", np.zeros(400, bool))
    object.__setattr__(builder._masker, "continues", np.zeros(400, bool))
    fronts = []
    for number in range(400):
        sample = builder.build(SamplePlan(SampleKey(0, 0, number), ((0, 162),), 64))
        fronts.append(whole(sample.input_ids, sample.labels)[1] - 5)
    assert np.mean(fronts) == pytest.approx(50, abs=1)
    assert np.std(fronts) == pytest.approx(5, abs=1)  # binomial: sqrt(100) / 2


def test_a_sample_depends_on_its_key_alone(tmp_path: Path) -> None:
    reader = write_token_file(tmp_path / "text", many())
    index = PairIndex(reader, all_documents(reader), rules_of(), 2)
    plans = [index.plan(at) for at in range(len(index))]
    forwards = [builder_for(reader).build(plan) for plan in plans]
    builder = builder_for(reader)
    backwards = [builder.build(plan) for plan in reversed(plans)][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    changed = builder_for(reader, seed=8).build(plans[0])
    assert not np.array_equal(changed.labels, forwards[0].labels)
    elsewhere = builder.build(plans[0]._replace(key=SampleKey(1, 2, 0)))
    assert not np.array_equal(elsewhere.labels, forwards[0].labels)


def test_no_worker_receives_the_text(tmp_path: Path) -> None:
    """What goes to a process that is started afresh is a path, and the tokens there are mapped from the disk."""
    reader = write_token_file(tmp_path / "text", [[1000] * 500])
    builder = builder_for(reader)
    sent = pickle.dumps(builder)
    assert len(sent) < 10_000 < reader.tokens.nbytes
    received = pickle.loads(sent)
    assert isinstance(received._tokens._tokens.base, np.memmap)
    assert isinstance(builder._tokens._tokens.base, np.memmap)
    plan = SamplePlan(SampleKey(0, 0, 0), ((70_000, 50),), 52)
    assert received.build(plan).input_ids.tolist() == builder.build(plan).input_ids.tolist()


def test_split_holds_out_whole_documents(tmp_path: Path) -> None:
    reader = write_token_file(tmp_path / "text", many(300))
    training, validation = split_documents(reader, 0.1, seed=3)
    assert sorted([*training, *validation]) == list(range(300))
    lengths = np.array([sum(document) for document in many(300)])
    assert lengths[validation].sum() / lengths.sum() == pytest.approx(0.1, abs=0.01)
    assert not len(split_documents(reader, 0.0, seed=3)[1])
    assert split_documents(reader, 0.1, 3, corpus=1)[1].tolist() != validation.tolist()


def test_split_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"validation_share 0\.5 takes all 1 documents"):
        split_documents(write_token_file(tmp_path / "text", [[5, 5]]), 0.5, seed=0)
