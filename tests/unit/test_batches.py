"""Steps: the same samples however they are dealt out, packed or not, by any number of workers, from any position."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bert.data.batches import (
    BatchLayout,
    Position,
    StepBatches,
    StepPlanner,
    evaluation_batches,
    training_steps,
)
from megatron_bert.data.blending import Blend
from megatron_bert.data.collation import collate_packed, collate_padded
from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.masking import IGNORED
from megatron_bert.data.pairs import PairIndex
from megatron_bert.data.samples import Sample, SampleKey, SamplePlan
from megatron_bert.errors import UserError
from tests.unit.test_samples import builder_for, rules_of
from tests.unit.token_files import all_documents, many, write_token_file

ROOT = Path(__file__).resolve().parents[2]
ROW_TOKENS = 64


class Collate:
    """Picklable, as a loader's workers may need."""

    def __init__(self, packing: bool) -> None:
        self.packing = packing

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        return collate_packed(rows, 0, ROW_TOKENS) if self.packing else collate_padded(rows, 0)


def blend_of(reader: IndexedReader) -> Blend[PairIndex]:
    return Blend([lambda epoch: PairIndex(reader, all_documents(reader), rules_of(), epoch)], [1.0])


def steps(
    reader: IndexedReader, layout: BatchLayout, num: int, start: Position | None = None, workers: int = 0
) -> list[StepBatches]:
    planner = StepPlanner(blend_of(reader), layout, ROW_TOKENS)
    made = training_steps(
        planner, [builder_for(reader)], Collate(layout.packing), start or Position(), num_workers=workers
    )
    return list(islice(made, num))


def sequences(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int], list[int], int]]:
    """The samples in a batch, padded or packed: ids, types, labels, pair label."""
    if "cu_seq_lens" in batch:
        bounds = batch["cu_seq_lens"].tolist()
        spans = list(zip(bounds, bounds[1:], strict=False))
    else:
        columns = batch["input_ids"].shape[1]
        lengths = batch["attention_mask"].sum(1).tolist()
        spans = [(row * columns, row * columns + length) for row, length in enumerate(lengths)]
    flat = [batch[name].flatten() for name in ("input_ids", "token_type_ids", "labels")]
    found = [
        (*(values[start:stop].tolist() for values in flat), label)
        for (start, stop), label in zip(spans, batch["next_sentence_label"].tolist(), strict=True)
    ]
    return [sample for sample in found if any(sample[0])]  # the padding id is 0


@pytest.fixture
def reader(tmp_path: Path) -> IndexedReader:
    return write_token_file(tmp_path / "text", many(20))


def test_steps_are_the_same_samples_however_they_are_dealt_out(reader: IndexedReader) -> None:
    whole = steps(reader, BatchLayout(8, 8), 30)
    keys = [key for step in whole for key in step.keys]
    assert {key.epoch for key in keys} >= {0, 1, 2}  # steps reach over the ends of epochs
    assert len(set(keys)) == 240
    samples = [sequences(step.micro_batches[0]) for step in whole]
    for layout in (BatchLayout(8, 3), BatchLayout(8, 1)):
        dealt = steps(reader, layout, 30)
        assert [step.keys for step in dealt] == [step.keys for step in whole]
        assert [[s for batch in step.micro_batches for s in sequences(batch)] for step in dealt] == samples
    ranks = [steps(reader, BatchLayout(8, 3, rank, 2), 30) for rank in range(2)]
    for step, (first, second) in enumerate(zip(*ranks, strict=True)):
        assert len(first.micro_batches) == len(second.micro_batches) == 2
        assert [s for part in (first, second) for b in part.micro_batches for s in sequences(b)] == samples[step]
        assert first.keys == second.keys == whole[step].keys
        assert first.next == second.next == whole[step].next


def test_packed_steps_have_the_same_samples(reader: IndexedReader) -> None:
    """Packing is a runtime knob: the same samples with the same masks and labels, in rows of one fixed shape."""
    plain = steps(reader, BatchLayout(24, 24), 12)
    for world_size in (1, 2):
        ranks = [steps(reader, BatchLayout(24, 3, rank, world_size, packing=True), 12) for rank in range(world_size)]
        for at, step in enumerate(plain):
            dealt = [rank[at] for rank in ranks]
            assert len({len(part.micro_batches) for part in dealt}) == 1
            batches = [batch for part in dealt for batch in part.micro_batches]
            assert {batch["input_ids"].shape for batch in batches} == {(3, ROW_TOKENS)}
            found = sorted(sample for batch in batches for sample in sequences(batch))
            assert found == sorted(sequences(step.micro_batches[0]))
            assert dealt[0].keys == step.keys
            assert dealt[0].next == step.next


def test_a_run_goes_on_from_any_step(reader: IndexedReader) -> None:
    for packing in (False, True):
        layout = BatchLayout(8, 4, packing=packing)
        whole = steps(reader, layout, 20)
        for done in (1, 7, 13):
            saved = json.loads(json.dumps(whole[done - 1].next.as_dict()))
            rest = steps(reader, layout, 20 - done, Position.of(saved))
            for one, other in zip(rest, whole[done:], strict=True):
                assert one.keys == other.keys
                assert one.next == other.next
                assert same(one, other)
    assert Position.of(Position().as_dict()) == Position()


def same(one: StepBatches, other: StepBatches) -> bool:
    return len(one.micro_batches) == len(other.micro_batches) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True)
    )


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("packing", [False, True])
def test_workers_change_nothing(
    reader: IndexedReader, monkeypatch: pytest.MonkeyPatch, num_workers: int, packing: bool
) -> None:
    layout = BatchLayout(8, 3, packing=packing)
    ours = steps(reader, layout, 12)
    monkeypatch.setattr(torch.utils.data.DataLoader, "check_worker_number_rationality", lambda self: None)
    theirs = steps(reader, layout, 12, workers=num_workers)
    assert all(same(one, other) for one, other in zip(ours, theirs, strict=True))
    assert [step.keys for step in ours] == [step.keys for step in theirs]


def test_an_interpreter_that_ends_does_not_wait_for_its_workers(reader: IndexedReader) -> None:
    """They ignore signals; an iterator that nobody closed, say because of an exception, must not keep the process."""
    code = (
        "from tests.unit.test_batches import *\n"
        "import sys\n"
        "planner = StepPlanner(blend_of(IndexedReader(Path(sys.argv[1]))), BatchLayout(8, 2), ROW_TOKENS)\n"
        "made = training_steps(planner, [builder_for(IndexedReader(Path(sys.argv[1])))], Collate(False), Position(),\n"
        "                      num_workers=2)\n"
        "next(made)\n"
        "raise RuntimeError('somebody failed')\n"
    )
    command = [sys.executable, "-c", code, str(reader.prefix)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: somebody failed"


def sample(length: int, label: int) -> Sample:
    ids = np.arange(10, 10 + length)
    return Sample(ids, ids % 2, np.where(ids % 3 == 0, ids, IGNORED), label)


def test_collate_pads_at_the_right() -> None:
    batch = collate_padded([[sample(11, IGNORED)], [sample(53, 1)]], pad_id=0)
    assert batch["input_ids"].shape == (2, 53)
    assert batch["attention_mask"].sum(1).tolist() == [11, 53]
    assert batch["input_ids"][0, 11:].eq(0).all()
    assert batch["labels"][0, 11:].eq(IGNORED).all()
    assert batch["next_sentence_label"].tolist() == [IGNORED, 1]


def test_packed_rows_keep_sequences_apart() -> None:
    rows = [[sample(5, 0), sample(3, 1)], [sample(8, IGNORED)], [sample(2, 1)], []]
    batch = collate_packed(rows, pad_id=9, row_tokens=8)
    assert batch["cu_seq_lens"].tolist() == [0, 5, 8, 16, 18, 24, 32]
    assert batch["cu_seq_lens"].dtype == torch.int32
    assert batch["next_sentence_label"].tolist() == [0, 1, IGNORED, 1, IGNORED, IGNORED]
    restarting = [0, 1, 2, 3, 4, 0, 1, 2], list(range(8)), [0, 1, 0, 1, 2, 3, 4, 5], list(range(8))
    assert batch["position_ids"].tolist() == list(restarting)
    assert batch["input_ids"][0].tolist() == [10, 11, 12, 13, 14, 10, 11, 12]
    assert batch["input_ids"][2:].flatten()[2:].eq(9).all()
    assert batch["labels"][2:].flatten()[2:].eq(IGNORED).all()
    assert batch["token_type_ids"][0].tolist() == [0, 1, 0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_everything_once(reader: IndexedReader, packing: bool, world_size: int) -> None:
    num = len(blend_of(reader).index(0, 0))
    seen, counts = [], set()
    for rank in range(world_size):
        planner = StepPlanner(blend_of(reader), BatchLayout(9, 4, rank, world_size, packing), ROW_TOKENS)
        batches = list(evaluation_batches(planner, [builder_for(reader)], Collate(packing), [num]))
        counts.add(len(batches))
        seen += [sample for batch in batches for sample in sequences(batch) if len(sample[0]) > 2]
    assert len(counts) == 1  # every rank does as many forward passes
    index = blend_of(reader).index(0, 0)
    wanted = [builder_for(reader).build(index.plan(at)) for at in range(num)]
    assert sorted(s[0] for s in seen) == sorted(s.input_ids.tolist() for s in wanted)


def test_samples_that_cannot_be_shared(reader: IndexedReader) -> None:
    with pytest.raises(UserError, match=r"training\.batch_samples 8 is not a multiple of the 3 data-parallel ranks"):
        StepPlanner(blend_of(reader), BatchLayout(8, 8, 0, 3), ROW_TOKENS)


def test_an_empty_plan_is_a_row_without_anything_to_predict(reader: IndexedReader) -> None:
    made = builder_for(reader).build(SamplePlan(SampleKey(0, 0, 0), (), 0))
    assert len(made.input_ids) == 2
    assert (made.labels == IGNORED).all()
    assert made.pair_label == IGNORED
