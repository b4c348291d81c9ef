"""Checkpoints on disk: whole or absent, never of two steps, damage noticed, nothing run from a file."""

import errno
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem

from megatron_bert.checkpoint import manifest
from megatron_bert.checkpoint import writer as writer_module
from megatron_bert.checkpoint.native import list_checkpoints, load_model_weights, newest_good, read_state
from megatron_bert.checkpoint.tensors import read_all_tensors, read_tensors, tensor_shapes, write_tensors
from megatron_bert.checkpoint.writer import CheckpointWriter, Snapshot, remove_unfinished
from megatron_bert.errors import UserError


def tensors(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 30, generator=rng)
    return {
        "model.a.weight": weight,
        "model.b": torch.randn(7, generator=rng).bfloat16(),
        "optimizer.a.weight.step": torch.tensor(float(seed)),
        "optimizer.a.weight.exp_avg": torch.full((40, 30), float(seed)),
    }


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, tensors(step), {"step": step, "tied": {"c": "a.weight"}}, {})


def write(run: Path, *steps: int, keep: int = 5) -> list[Path]:
    """Checkpoints of these steps; returns what is there, the newest first."""
    with CheckpointWriter(run, keep) as writer:
        for step in steps:
            writer.save(snapshot(step))
    return list_checkpoints(run)


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    wanted = tensors() | {"model.empty": torch.empty(0), "model.int": torch.arange(5)}
    write_tensors(tmp_path, wanted)
    assert tensor_shapes(tmp_path)["model.b"] == (torch.Size([7]), torch.bfloat16)
    found = read_all_tensors(tmp_path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    targets = {"model.a.weight": torch.zeros(40, 30)}
    read_tensors(tmp_path, targets)
    assert torch.equal(targets["model.a.weight"], wanted["model.a.weight"])


def test_other_shapes_and_names_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path, tensors())
    with pytest.raises(UserError, match=r"model.b has the shape \[7\], but the model's is \[8\]"):
        read_tensors(tmp_path, {"model.b": torch.zeros(8)})
    with pytest.raises(UserError, match=r"has no tensor model\.z"):
        read_tensors(tmp_path, {"model.z": torch.zeros(8)})


def test_what_the_file_system_says_in_reading(tmp_path: Path) -> None:
    write_tensors(tmp_path, tensors())
    next(tmp_path.glob("*.distcp")).unlink()
    for read in (
        lambda: read_tensors(tmp_path, {"model.b": torch.zeros(7).bfloat16()}),
        lambda: read_all_tensors(tmp_path),
    ):
        with pytest.raises(FileNotFoundError):
            read()


class Mischief:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_the_index_runs_nothing(tmp_path: Path) -> None:
    write_tensors(tmp_path / "good", tensors())
    (tmp_path / "good" / ".metadata").write_bytes(pickle.dumps(Mischief(tmp_path / "made")))
    with pytest.raises(UserError, match=r"it names posix\.mkdir, which has no place there"):
        read_all_tensors(tmp_path / "good")
    assert not (tmp_path / "made").exists()


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    kept = write(tmp_path, 5, 10, 15, 20, keep=2)
    assert [path.name for path in kept] == ["step-00000020", "step-00000015"]
    assert newest_good(tmp_path) == kept[0]
    assert read_state(kept[0])["step"] == 20
    weights = load_model_weights(kept[0])
    assert weights.keys() == {"a.weight", "b", "c"}
    assert torch.equal(weights["a.weight"], tensors(20)["model.a.weight"])
    assert weights["c"] is weights["a.weight"]


def test_one_that_cannot_be_removed_does_not_undo_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where somebody reads it over NFS."""

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    write(tmp_path, 1)
    with CheckpointWriter(tmp_path, 1) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(writer_module.shutil, "rmtree", busy)
            writer.save(snapshot(2))
            assert writer.wait() is None
        assert "step-00000001 could not be removed (Device or resource busy)" in caplog.text
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000001"]
        writer.save(snapshot(3))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]


def test_a_checkpoint_is_of_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors change while they are being written."""
    changed, write_them = threading.Event(), writer_module.write_tensors

    def late(folder: Path, copied: dict[str, Tensor], group: object) -> None:
        assert changed.wait(10)
        write_them(folder, copied)

    monkeypatch.setattr(writer_module, "write_tensors", late)
    live = snapshot(1)
    with CheckpointWriter(tmp_path, 2) as writer:
        writer.save(live)
        for tensor in live.tensors.values():
            tensor.fill_(-1)
        changed.set()
    found = read_all_tensors(newest_good(tmp_path))
    assert all(torch.equal(found[name], value) for name, value in tensors(1).items())


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: os.truncate(folder / "__0_0.distcp", 1000),
    "bit": lambda folder: flip_a_bit(folder / "__0_0.distcp"),
    "state": lambda folder: flip_a_bit(folder / "state.json"),
    "index": lambda folder: flip_a_bit(folder / ".metadata"),
    "missing": lambda folder: (folder / "streams-00000.json").unlink(),
    "manifest": lambda folder: os.truncate(folder / "manifest.json", 20),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_noticed(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    newest, before = write(tmp_path, 1, 2)
    DAMAGE[how](newest)
    with caplog.at_level("WARNING", "megatron_bert"):
        assert newest_good(tmp_path) == before
    assert f"damaged: {newest.name} (" in caplog.text
    assert f"using {before.name}, the one before" in caplog.text
    DAMAGE["bit"](before)
    with pytest.raises(UserError, match=r"every checkpoint is damaged: step-00000002 .*; step-00000001 "):
        newest_good(tmp_path)


def test_files_are_hashed_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint,) = write(tmp_path, 1)
    plain, both = manifest._hash, threading.Barrier(2)

    def hashed(file: Path) -> str:
        if file.suffix == ".json":  # two of the four
            both.wait(5)
        return plain(file)

    monkeypatch.setattr(manifest, "_hash", hashed)
    assert newest_good(tmp_path) == checkpoint


def test_a_damaged_one_makes_room(tmp_path: Path) -> None:
    """A run that went on from the one before writes that step again, or an earlier one."""
    DAMAGE["bit"](write(tmp_path, 1, 2)[0])
    assert [path.name for path in write(tmp_path, 2)] == ["step-00000002", "step-00000001"]
    assert newest_good(tmp_path).name == "step-00000002"
    DAMAGE["bit"](write(tmp_path, 8)[0])
    assert write(tmp_path, 7)[0].name == "step-00000007"


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoint"):
        newest_good(tmp_path)


@pytest.mark.parametrize("where", ["write_tensors", "write_manifest", "written_aside", "sync"])
def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    write(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CheckpointWriter(tmp_path, 5) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(writer_module, where, full)
            writer.save(snapshot(2))
            problem = writer.wait()
        assert problem is not None
        assert problem.errno == errno.ENOSPC
        assert "the checkpoint of step 2 could not be written (No space left on device)" in caplog.text
        if where != "sync":
            assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
        writer.save(snapshot(3))
        assert writer.wait() is None
    assert newest_good(tmp_path).name == "step-00000003"


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("cause", "said"), [(None, RuntimeError), (OSError(errno.EIO, "no"), OSError)])
def test_what_the_library_says_comes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: OSError | None, said: type[Exception]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("enforce fail") from cause

    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", broken)
    with pytest.raises(said, match="enforce fail" if cause is None else "no"):
        write_tensors(tmp_path, tensors())


def test_what_must_come_first_decides(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CheckpointWriter(tmp_path, 5) as writer:
        writer.save(snapshot(1), first=full)
        assert isinstance(writer.wait(), OSError)
    assert not list_checkpoints(tmp_path)


def test_nothing_is_waited_for_where_another_process_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came, written = threading.Event(), list[bool]()
    monkeypatch.setattr(CheckpointWriter, "_write", lambda *_: written.append(came.wait(3)))
    with pytest.raises(RuntimeError, match="closed by peer"), CheckpointWriter(tmp_path, 5) as writer:
        writer.save(snapshot(1))
        raise RuntimeError("Connection closed by peer [127.0.0.1]:7")
    assert not written
    came.set()


def test_what_was_being_written_goes(tmp_path: Path) -> None:
    kept = write(tmp_path, 1)
    for left in ("checkpoints/.step-00000002.77.partial", ".model.77.partial"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == kept
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoints"]
