"""Causal rows against the plain definition: documents joined by a separator, cut into rows that overlap by one."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_bert.data.causal import CausalBuilder, CausalIndex
from megatron_bert.data.collation import collate_causal
from megatron_bert.data.masking import IGNORED
from megatron_bert.data.samples import Sample, SampleKey, SamplePlan, SampleRules, TokenFile
from tests.unit.token_files import all_documents, many, write_token_file

SEPARATOR, PAD = 3, 0
DOCUMENTS = [*many(30), [], [0], [1], [64], [63], [500], [16, 16, 16, 15]]


def rows_of(prefix: Path, documents: list[list[int]], row_tokens: int, *, chosen: np.ndarray | None = None,
            epoch: int = 0, seed: int = 5) -> tuple[CausalIndex, list[Sample]]:  # fmt: skip
    """The rows in training order."""
    reader = write_token_file(prefix, documents, numbered=True)
    rules = SampleRules(seed, row_tokens)
    index = CausalIndex(reader, all_documents(reader) if chosen is None else chosen, rules, epoch)
    builder = CausalBuilder(TokenFile.of(reader), rules, SEPARATOR, PAD)
    return index, [builder.build(index.plan(at)) for at in range(len(index))]


@pytest.mark.parametrize("row_tokens", [8, 64, 100_000])
def test_rows_are_the_stream_cut(tmp_path: Path, row_tokens: int) -> None:
    """In the order of the stream, what is seen is every document once and whole, with separators between them."""
    index, made = rows_of(tmp_path / "text", DOCUMENTS, row_tokens)
    in_stream = [made[at] for at in np.argsort(index._order)]
    assert all(len(sample.input_ids) == row_tokens for sample in made)
    seen = np.concatenate([sample.input_ids for sample in in_stream])
    following = np.concatenate([sample.labels for sample in in_stream])
    num = sum(sum(document) + 1 for document in DOCUMENTS if sum(document)) - 1
    assert len(seen) == -(-num // row_tokens) * row_tokens
    assert (seen[num:] == PAD).all()
    assert (following[num:] == IGNORED).all()
    stream = [*seen[:num].tolist(), SEPARATOR]
    assert following[:num].tolist() == stream[1:]
    starts = np.cumsum([0, *map(sum, DOCUMENTS)])[:-1] + 5
    wanted = {tuple(range(start, start + sum(document))) for start, document in zip(starts, DOCUMENTS, strict=True)}
    borders = [-1, *np.flatnonzero(np.array(stream) == SEPARATOR).tolist()]
    found = [tuple(stream[a + 1 : b]) for a, b in pairwise(borders)]
    assert len(found) == len(set(found))
    assert set(found) == wanted - {()}
    assert found != sorted(found)


def test_rows_are_shuffled_anew_each_epoch(tmp_path: Path) -> None:
    def starts(epoch: int, seed: int = 1) -> list[int]:
        chosen = np.arange(0, 50, 2)
        _, made = rows_of(tmp_path / "text", [[40]] * 50, 41, chosen=chosen, epoch=epoch, seed=seed)
        return [int(sample.input_ids[0]) for sample in made]

    first = starts(0)
    assert sorted(first) == [5 + 40 * document for document in range(0, 50, 2)]
    assert first != sorted(first)
    assert starts(0) == first
    assert starts(1) != first
    assert starts(0, seed=2) != first


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    reader = write_token_file(tmp_path / "text", DOCUMENTS)
    index = CausalIndex(reader, all_documents(reader), SampleRules(0, 64), 0)
    assert index.num_empty_documents == sum(not sum(document) for document in DOCUMENTS) > 2


def test_an_empty_plan_is_padding(tmp_path: Path) -> None:
    reader = write_token_file(tmp_path / "text", [[9]])
    sample = CausalBuilder(TokenFile.of(reader), SampleRules(0, 8), SEPARATOR, PAD).build(
        SamplePlan(SampleKey(0, 0, 0), (), 0)
    )
    batch = collate_causal([[sample]])
    assert batch["input_ids"].tolist() == [[PAD] * 8]
    assert batch["labels"].tolist() == [[IGNORED] * 8]
    assert set(batch) == {"input_ids", "token_type_ids", "labels"}
