"""What a run remembers: its state, its random streams, its records, its lock, and what of its recipe may change."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from megatron_bert.checkpoint.native import newest_good, read_state
from megatron_bert.checkpoint.writer import CheckpointWriter
from megatron_bert.data.batches import Position
from megatron_bert.data.content import content_of, content_of_model
from megatron_bert.data.samples import SampleKey
from megatron_bert.errors import UserError
from megatron_bert.training.configuration import OptimizerSection
from megatron_bert.training.lock import run_locked
from megatron_bert.training.metrics import MetricsSink
from megatron_bert.training.microbatch import FixedShapes
from megatron_bert.training.objective import Objective
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.ranks import ALONE
from megatron_bert.training.records import RecordFile
from megatron_bert.training.resume import refuse_changes
from megatron_bert.training.setup import begun_state
from megatron_bert.training.skipped import NotFinite, SkippedSteps
from megatron_bert.training.state import TrainState, Window, restore, snapshot
from megatron_bert.training.step import train_step
from megatron_bert.training.stop import StopSignals
from megatron_bert.training.streams import random_streams, set_random_streams, streams_kept
from tests.unit.test_training_parts import CPU, batch, tiny_model


def fresh_state(dropout: float = 0.1, kind: Literal["adamw", "muon"] = "adamw") -> TrainState:
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return TrainState(model, build_optimizer(model, OptimizerSection(kind=kind, learning_rate=1e-2)), CPU)


def step(state: TrainState) -> float:
    objective, inputs = Objective(state.model, CPU), batch(seed=state.step)
    result = train_step(objective, state.optimizer, [objective.micro_batch(inputs)], clip_norm=1.0)
    state.step += 1
    state.window.sums = state.window.sums.plus(result.sums)
    return result.gradient_norm.item()


def saved(state: TrainState, run: Path) -> Path:
    with CheckpointWriter(run, 1) as writer:
        writer.save(snapshot(state, {"recipe": {"a": 1}}))
    return newest_good(run)


def assert_same(one: TrainState, other: TrainState) -> None:
    for (name, value), (_, theirs) in zip(
        one.model.state_dict().items(), other.model.state_dict().items(), strict=True
    ):
        assert torch.equal(value, theirs), name
    mine, yours = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert mine["param_groups"] == yours["param_groups"]
    assert mine["state"].keys() == yours["state"].keys()
    for parameter, moments in mine["state"].items():
        assert all(torch.equal(moments[name], yours["state"][parameter][name]) for name in moments)
    assert one.window.as_dict()["sums"] == other.window.as_dict()["sums"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_run_goes_on_bit_for_bit(kind: Literal["adamw", "muon"], tmp_path: Path) -> None:
    whole = fresh_state(kind=kind)
    for _ in range(3):
        step(whole)
    whole.position, whole.skipped, whole.validation = (
        Position.of({"epoch_0": 1, "offset_0": 2, "used_0": 3}),
        4,
        {"l": 0.1},
    )
    checkpoint = saved(whole, tmp_path)
    wanted = [step(whole) for _ in range(3)] + [random.random(), np.random.random(), torch.rand(1).item()]
    other = fresh_state(kind=kind)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    restore(other, checkpoint)
    assert (other.step, other.position, other.skipped, other.validation) == (3, whole.position, 4, {"l": 0.1})
    assert [step(other) for _ in range(3)] + [random.random(), np.random.random(), torch.rand(1).item()] == wanted
    assert_same(whole, other)
    assert read_state(checkpoint)["recipe"] == {"a": 1}


def test_the_recipe_decides_the_optimizers_settings(tmp_path: Path) -> None:
    whole = fresh_state()
    step(whole)
    checkpoint = saved(whole, tmp_path)
    other = fresh_state()
    other.optimizer = build_optimizer(other.model, OptimizerSection(learning_rate=0.5, weight_decay=0.25, beta1=0.1))
    restore(other, checkpoint)
    group = other.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.1, 0.999))


def test_before_the_first_update_and_without_a_gradient(tmp_path: Path) -> None:
    """Neither has a moment to save, and a restored one must not have begun with a counted step."""
    whole, other = fresh_state(dropout=0.0), fresh_state(dropout=0.0)
    restore(other, saved(whole, tmp_path / "begin"))
    assert [step(whole), step(whole)] == [step(other), step(other)]
    assert_same(whole, other)

    def without_pairs(state: TrainState) -> None:
        objective, inputs = Objective(state.model, CPU), batch()
        del inputs["next_sentence_label"]
        train_step(objective, state.optimizer, [objective.micro_batch(inputs)], clip_norm=1.0)

    whole, other = fresh_state(dropout=0.0), fresh_state(dropout=0.0)
    without_pairs(whole)
    restore(other, saved(whole, tmp_path / "part"))
    assert len(other.optimizer.state_dict()["state"]) == len(whole.optimizer.state_dict()["state"])
    assert len(whole.optimizer.state_dict()["state"]) < len(list(whole.model.parameters()))
    step(whole)
    step(other)
    assert_same(whole, other)


def test_compiled_shapes_are_remembered(tmp_path: Path) -> None:
    whole, other = fresh_state(), fresh_state()
    whole.shapes = FixedShapes(4, 32, 0.15)
    whole.shapes.room(predicted=77, sequences=5)
    checkpoint = saved(whole, tmp_path)
    restore(other, checkpoint)
    assert other.shapes == whole.shapes
    for rows in (4, 2):  # the same micro-batches; smaller ones, which four rows would double
        objective = Objective(other.model, CPU, shapes=FixedShapes(rows, 32, 0.15))
        state = begun_state(other.model, objective, OptimizerSection(learning_rate=1e-2), checkpoint, ALONE)
        assert objective.shapes is state.shapes
        assert state.shapes == (whole.shapes if rows == 4 else FixedShapes(2, 32, 0.15))


def test_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = saved(fresh_state(), tmp_path)
    larger = tiny_model(layers=3)
    with pytest.raises(UserError, match=r"has no tensor model\.bert\.encoder\.layer\.2"):
        restore(TrainState(larger, build_optimizer(larger, OptimizerSection(learning_rate=1e-2)), CPU), checkpoint)


def test_the_streams() -> None:
    def draws() -> list[float]:
        return [random.random(), random.gauss(), float(np.random.normal()), torch.randn(3).sum().item()]

    draws()  # an odd number of normal numbers: Python and NumPy keep the second of a pair
    streams = json.loads(json.dumps(random_streams(CPU)))
    wanted = draws()
    with streams_kept(CPU):
        assert draws() != wanted
    following = draws()
    set_random_streams(streams, CPU)
    assert draws() == wanted
    assert draws() == following


def test_a_window_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("megatron_bert.training.state.time.perf_counter", lambda: clock[0])
    window = Window()
    clock[0] += 5
    with window.paused():
        clock[0] += 50
    going_on = window.as_dict()
    clock[0] = 0.0
    window = Window.of(going_on)
    clock[0] += 2
    assert window.seconds == 7


def lines(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_records_are_cut_back(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    records = RecordFile(file)
    for number in (2, 4, 4, 6):
        records.append({"step": number})
    records.close()
    with file.open("a") as stream:
        stream.write('{"step": 8, "lo')  # killed within a line
    RecordFile(file, 4).close()
    assert lines(file) == [2, 4, 4]
    again = RecordFile(file, 4)
    again.append({"step": 5})
    again.close()
    assert lines(file) == [2, 4, 4, 5]
    RecordFile(file).close()
    assert file.read_bytes() == b""


def test_records_outlast_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, write = tmp_path / "m.jsonl", os.pwrite
    records = RecordFile(file)
    records.append({"step": 1})

    def half(descriptor: int, content: bytes, at: int) -> int:
        if len(content) < 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[: len(content) // 2], at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        records.append({"step": 2})
        records.append({"step": 3})
        assert lines(file) == [1]
        assert caplog.text.count("No space left") == 1
        with pytest.raises(OSError, match="No space left"):
            records.sync()
    records.append({"step": 4})
    records.close()
    assert lines(file) == [1, 2, 3, 4]


def test_one_process_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = (
        "import sys; from pathlib import Path; from megatron_bert.training.lock import run_locked\n"
        "with run_locked(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=rf"in use by process {other.pid} on "), run_locked(run):
            pass
        other.kill()
    with run_locked(run):
        (run / "something").touch()
    assert run.exists()
    with run_locked(tmp_path / "nothing"):
        pass
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("second", "after_seconds", "ended_by"),
    [(signal.SIGTERM, 10, signal.SIGTERM), (signal.SIGINT, 0, signal.SIGINT), (signal.SIGTERM, 0, None)],
)
def test_the_second_signal_stops_at_once(second: signal.Signals, after_seconds: int, ended_by: int | None) -> None:
    """But for a SIGTERM that was sent to torchrun, too, which hands it on."""
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
    child = os.fork()
    if not child:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            stop._since -= after_seconds
            os.kill(os.getpid(), second)
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == (ended_by or 0)


class Sink:
    def __init__(self) -> None:
        self.records: list[tuple[int, object]] = []

    def skipped(self, number: int, samples: object) -> None:
        self.records.append((number, samples))


def test_skipped_steps_are_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    state, sink = fresh_state(), Sink()
    skipped = SkippedSteps(state, sink, limit=3)  # type: ignore[arg-type]
    for number, applied in enumerate([True, False, False, True, False], start=1):
        skipped.add(number, torch.tensor(applied), [SampleKey(0, 1, number)] * 10)
    skipped.count()
    assert (state.skipped, state.skipped_in_a_row) == (3, 1)
    assert sink.records[0] == (2, [[0, 1, 2]] * 10)
    assert [number for number, _ in sink.records] == [2, 3, 5]
    assert "step 2 skipped" in caplog.text
    assert "0:1:2, 0:1:2" in caplog.text
    assert "and 2 more" in caplog.text
    skipped.add(6, torch.tensor(False), [])
    skipped.add(7, torch.tensor(False), [])
    with pytest.raises(NotFinite, match="3 steps in a row"):
        skipped.count()
    assert (state.skipped, state.skipped_in_a_row) == (5, 0)


BEFORE = {"model.hidden_size": 64, "data.tokens": "a" * 64, "data.tokenizer": "b" * 64, "training.seed": 1}


@pytest.mark.parametrize(
    ("change", "allowed", "message"),
    [
        ({"training.seed": 2}, [], r"training.seed was 1, is 2\. .*--allow training.seed"),
        ({"data.tokens": "c" * 64}, [], "data.tokens was content aaaaaaaa, is content cccccccc"),
        ({"model.hidden_size": 128}, ["model.hidden_size"], "model.hidden_size was 64, is 128. They cannot be changed"),
        ({"data.tokenizer": "c" * 64}, ["data.tokenizer"], "data.tokenizer was .* cannot be changed"),
        ({"training.new": 3}, [], "training.new was absent, is 3"),
        ({}, ["training.sed"], r"--allow training.sed: there is no such key \(did you mean training.seed\?\)"),
        ({}, ["runtime.num_workers"], "--allow runtime.num_workers: it may always change"),
    ],
)
def test_a_changed_recipe_is_refused(change: dict[str, object], allowed: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        refuse_changes(BEFORE, BEFORE | change, allowed, "run")


def test_a_change_that_is_allowed() -> None:
    assert refuse_changes(BEFORE, BEFORE | {"training.seed": 2}, ["training.seed"], "") == {
        "training.seed": "was 1, is 2"
    }
    assert not refuse_changes(BEFORE, BEFORE, ["training.seed"], "")


@pytest.mark.parametrize("flip", [None, "t.bin", "t.idx"])
def test_data_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: str | None) -> None:
    """Whole up to a size, by blocks beyond; the first and the last byte belong to a block."""
    for number, whole in enumerate((1 << 30, 1000)):
        monkeypatch.setattr("megatron_bert.data.content._WHOLE_BYTES", whole)
        contents = []
        for place in ("one", "other"):
            folder = tmp_path / place / str(number)
            folder.mkdir(parents=True)
            raw = bytearray(range(256)) * 1000
            for name in ("t.bin", "t.idx"):
                if place == "other" and name == flip:
                    raw = raw[:-1] + b"!"
                (folder / name).write_bytes(raw)
            contents.append(content_of(folder / "t"))
        assert (contents[0] == contents[1]) == (flip is None)


def test_a_model_is_known_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    assert content_of_model(folder) == "gone"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    before = content_of_model(folder)
    (folder / "README.md").write_text("said")
    assert content_of_model(folder) == before
    (folder / "model.safetensors").write_bytes(b"weightS")
    assert content_of_model(folder) != before


def test_a_sink_goes_on(tmp_path: Path) -> None:
    for first in (0, 1):
        with MetricsSink(tmp_path / "m", 2, progress=False, first_step=first) as sink:
            sink.training(first + 1, {"loss": 1.0, "tokens_per_second": 2.0})
            sink.sync()
    assert lines(tmp_path / "m") == [1, 2]
