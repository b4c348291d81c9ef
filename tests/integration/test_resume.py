"""Runs that are killed, stopped, damaged or changed: nothing is lost, and nothing changes unseen."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tools.kill_and_resume import compare, records
from torch import Tensor

from megatron_bert.checkpoint import writer as writer_module
from megatron_bert.checkpoint.native import list_checkpoints, load_model_weights
from megatron_bert.cli.main import main
from megatron_bert.training import lock, metrics
from megatron_bert.training import objective as objective_module
from megatron_bert.training import pretrain as pretrain_module
from tests.integration.tiny_corpus import prepare, write_recipe

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    prepare(folder)
    write_recipe(
        folder, model__hidden_dropout_prob=0.1, training__steps=12, runtime__log_every_steps=5,
        runtime__evaluate_every_steps=4, runtime__checkpoint_every_steps=3,
    )  # fmt: skip
    return folder


def run(folder: Path, name: str, *words: str, code: int = 0) -> Path:
    """Runs the recipe into folder/name; `words` are options, or settings with an equals sign."""
    options = [part for word in words for part in ((word,) if word.startswith("--") else ("--set", word))]
    output = folder / name
    assert main(["pretrain", str(folder / "recipe.yaml"), "--json", "--set", f"output={output}", *options]) == code
    return output


@pytest.fixture(scope="module")
def whole(prepared: Path) -> Path:
    """The uninterrupted run."""
    return run(prepared, "whole")


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the process send itself a signal within the given steps."""
    done, step_done = [0], metrics.MetricsSink.step_done

    def arrange(*steps: int, number: signal.Signals = signal.SIGTERM) -> None:
        def counted(sink: metrics.MetricsSink) -> None:
            done[0] += 1
            if done[0] in steps:
                os.kill(os.getpid(), number)
            step_done(sink)

        monkeypatch.setattr(metrics.MetricsSink, "step_done", counted)

    return arrange


def names(run: Path) -> list[str]:
    return [path.name for path in reversed(list_checkpoints(run))]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_killed_ten_times(prepared: Path, tmp_path: Path) -> None:
    """By SIGKILL at random moments, every other one while a checkpoint is half-written."""
    settings = ["training.steps=100", "runtime.checkpoint_every_steps=4", "runtime.evaluate_every_steps=50"]
    done = subprocess.run(
        [
            sys.executable, REPOSITORY / "tools" / "kill_and_resume.py", prepared / "recipe.yaml", "--fork",
            "--folder", tmp_path / "runs", *(word for value in settings for word in ("--set", value)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 10 times" in done.stdout
    assert "metrics, model and last checkpoint are bit for bit the same" in done.stdout
    assert done.stdout.count("a checkpoint half-written") >= 3
    assert len(records(tmp_path / "runs" / "killed")) == 100 // 5 + 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_gone_on(
    prepared: Path,
    whole: Path,
    number: signal.Signals,
    stop_at: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Twice in the middle of a record's window, once at a checkpoint."""
    stop_at(2, 6, 7, number=number)
    for steps in (2, 6, 7):
        output = run(prepared, f"stopped-{number}")
        outcome = json.loads(capsys.readouterr().out)
        assert (outcome["step"], outcome["stopped_by"], outcome["model"]) == (steps, number.name, None)
        assert names(output)[-1] == f"step-{steps:08d}"
        assert not (output / "model").exists()
    run(prepared, f"stopped-{number}")
    assert json.loads(capsys.readouterr().out)["stopped_by"] is None
    assert not compare(whole, output)


def test_stopping_says_how_to_go_on(
    prepared: Path, stop_at: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(1)
    command = ["pretrain", str(prepared / "recipe.yaml"), "--set", f"output={prepared / 'said'}"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out == "stopped  by SIGTERM after step 1 of 12; the same command goes on from there\n"
    assert "SIGTERM: stopping after this step; once more after 10 s stops at once" in said.err


@pytest.mark.parametrize("setting", ["num_workers=2", "packing=true", "micro_batch_samples=3"])
def test_every_way_of_running_goes_on(prepared: Path, setting: str, stop_at: Callable[..., None]) -> None:
    """Batches that were made ahead are made again; what is left of an epoch is neither lost nor repeated."""
    uninterrupted = run(prepared, f"whole-{setting}", f"runtime.{setting}")
    stop_at(7)
    run(prepared, f"stopped-{setting}", f"runtime.{setting}")
    assert not compare(uninterrupted, run(prepared, f"stopped-{setting}", f"runtime.{setting}"))


def test_how_often_it_is_watched_changes_nothing(prepared: Path, whole: Path) -> None:
    other = run(
        prepared, "watched", "runtime.evaluate_every_steps=1", "runtime.log_every_steps=2",
        "runtime.checkpoint_every_steps=100",
    )  # fmt: skip
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (whole, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [record for record in records(other) if record["kind"] == "validation" and record["step"] in (4, 8, 12)] == [
        record for record in records(whole) if record["kind"] == "validation"
    ]


def test_the_folder_of_a_run(prepared: Path, whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == [
        ".lock", "checkpoints", "curves.png", "metrics.jsonl", "model", "recipe.yaml",
    ]  # fmt: skip
    assert names(whole) == ["step-00000006", "step-00000009", "step-00000012"]


def test_a_finished_run(prepared: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != ".lock"}
    run(prepared, "whole", "runtime.log_every_steps=1")
    said = capsys.readouterr()
    assert "is finished: all 12 steps are done" in said.err
    assert json.loads(said.out)["model"] == str(whole / "model")
    assert json.loads(said.out)["validation"] == {
        name: value for name, value in records(whole)[-1].items() if name not in ("kind", "step")
    }
    assert all(path.read_bytes() == content for path, content in before.items())


def test_more_steps_after_the_end(prepared: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, prepared / "longer", dirs_exist_ok=True)
    output = run(prepared, "longer", "training.steps=14", "--allow=training.steps")
    assert [record["step"] for record in records(output) if record["kind"] == "training"] == [5, 10, 12, 14]
    run(prepared, "longer", code=2)
    run(prepared, "longer", "--allow=training.steps", code=2)  # fewer steps than are done


def test_the_model_is_written_if_only_that_is_left(prepared: Path, whole: Path) -> None:
    output = prepared / "modelless"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "model")
    run(prepared, "modelless")
    assert not compare(whole, output)


def test_the_model_of_an_earlier_end_is_replaced(
    prepared: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk was full when the model of the added steps was to be written: the next call writes it."""
    output = prepared / "added"
    shutil.copytree(whole, output)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_module, "write_model_folder", no_room)
        run(prepared, "added", "training.steps=13", "--allow=training.steps", code=2)
    run(prepared, "added", "training.steps=13")
    assert "is finished" not in capsys.readouterr().err
    weights = load_model_weights(list_checkpoints(output)[0])
    written = load_file(output / "model" / "model.safetensors")
    assert all(torch.equal(written[name], weights[name]) for name in written)
    run(prepared, "added", "training.steps=13")
    assert "is finished" in capsys.readouterr().err


def test_overwriting(prepared: Path, whole: Path, stop_at: Callable[..., None]) -> None:
    output = run(prepared, "over", "training.seed=5")
    run(prepared, "over", code=2)
    run(prepared, "over", "--overwrite")
    assert not compare(whole, output)
    assert names(output) == names(whole)


def test_a_model_without_a_checkpoint(prepared: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole / "model", prepared / "foreign" / "model")
    run(prepared, "foreign", code=2)
    assert "has a model but no checkpoint to go on from" in last_line(capsys)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)


def test_damage(prepared: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = prepared / "damaged"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "model")
    newest, before, _ = list_checkpoints(output)
    os.truncate(newest / "__0_0.distcp", 5000)
    flip(before / "__0_0.distcp")
    run(prepared, "damaged")
    said = capsys.readouterr().err
    assert "damaged: step-00000012 (__0_0.distcp has 5,000 of " in said
    assert "step-00000009 (__0_0.distcp is not what was written: its hash differs)" in said
    assert "using step-00000006, the one before" in said
    assert not compare(whole, output)
    for checkpoint in list_checkpoints(output):
        flip(checkpoint / "state.json")
    run(prepared, "damaged", code=2)
    assert "every checkpoint is damaged: step-00000012 (state.json is not what was written" in last_line(capsys)


def test_what_a_run_started_from_may_go(
    prepared: Path, whole: Path, tmp_path: Path, stop_at: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "model", tmp_path / "start")
    adapting = yaml.safe_load((prepared / "recipe.yaml").read_text()) | {
        "model": {"start_from": str(tmp_path / "start")}
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(adapting))
    uninterrupted = run(tmp_path, "whole")
    stop_at(7)
    run(tmp_path, "stopped")
    weights = tmp_path / "start" / "model.safetensors"
    intact = weights.read_bytes()
    flip(weights)
    run(tmp_path, "stopped", code=2)
    assert "model.start_from was content " in last_line(capsys)
    weights.write_bytes(intact)
    (tmp_path / "start").rename(tmp_path / "elsewhere")
    assert not compare(uninterrupted, run(tmp_path, "stopped"))


@pytest.mark.parametrize(
    ("settings", "allowed", "message"),
    [
        (["optimizer.learning_rate=0.1"], [], "optimizer.learning_rate was 0.005, is 0.1. Put it back"),
        (["training.seed=2", "objective.mask_share=0.2"], ["training.seed"], "objective.mask_share was 0.15, is 0.2."),
        (["objective.pair=none"], ["objective.pair"], "is none. They cannot be changed"),
        (["model.hidden_size=128"], ["model.hidden_size"], "model.hidden_size was 64, is 128. They cannot be changed"),
        (["training.steps=3"], ["training.steps"], "has done 12 steps already, more than training.steps 3"),
        ([], ["optimizer.rate"], "--allow optimizer.rate: there is no such key"),
    ],
)
def test_a_changed_recipe(
    prepared: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    allowed: list[str],
    message: str,
) -> None:
    run(prepared, "whole", *settings, *(f"--allow={key}" for key in allowed), code=2)
    assert message in last_line(capsys)


def test_moved_data_are_the_same_and_changed_data_are_not(
    prepared: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(prepared / f"text{suffix}", tmp_path / f"moved{suffix}")
    shutil.copytree(prepared / "tokenizer", tmp_path / "moved_tokenizer")
    shutil.copytree(whole, prepared / "moved")
    moved = [f"data.tokens={tmp_path / 'moved'}", f"data.tokenizer={tmp_path / 'moved_tokenizer'}"]
    run(prepared, "moved", *moved, "training.steps=13", "--allow=training.steps")
    with (tmp_path / "moved.bin").open("r+b") as tokens:
        tokens.write((7).to_bytes(2, "little"))
    run(prepared, "moved", *moved, "training.steps=13", code=2)
    assert "data.tokens was content " in last_line(capsys)
    allowed = run(prepared, "moved", *moved, "training.steps=15", "--allow=training.steps", "--allow=data.tokens")
    assert "changed from here on: data.tokens was content " in capsys.readouterr().err
    assert names(allowed)[-1] == "step-00000015"


def test_two_processes(prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(lock.fcntl, "lockf", taken)
    run(prepared, "taken", code=2)
    assert "taken is in use by another process; wait for it, or choose another output" in last_line(capsys)


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_for_a_while(
    prepared: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, folders = writer_module.write_tensors, []

    def sometimes(folder: Path, tensors: dict[str, Tensor], group: object) -> None:
        folders.append(folder)
        (no_room if len(folders) in (2, 3) else write)(folder, tensors, group)

    monkeypatch.setattr(writer_module, "write_tensors", sometimes)
    output = run(prepared, "fuller")
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 could not be written (No space left on device)" in said
    assert "the checkpoint of step 9 could not be written" in said
    assert names(output) == ["step-00000003", "step-00000012"]
    assert not compare(whole, output)


def test_stopped_with_a_full_disk(
    prepared: Path, stop_at: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(5)
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_manifest", no_room)
        run(prepared, "full", code=2)
    assert "stopped after step 5, which could not be saved (No space left on device)" in last_line(capsys)
    assert not list((prepared / "full" / "checkpoints").iterdir())


def not_finite_in(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Has the loss of these steps be not a number."""
    mean, calls = objective_module.mean_loss, [0]

    def poisoned(*args: Any) -> Tensor:
        calls[0] += 1
        return mean(*args) * (float("nan") if calls[0] in steps else 1.0)

    monkeypatch.setattr(objective_module, "mean_loss", poisoned)


def test_steps_that_are_not_finite(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    not_finite_in(monkeypatch, 2, 8, 9)
    output = run(prepared, "skipping", "runtime.stop_after_skipped_steps=3")
    said = capsys.readouterr().err
    assert "step 2 skipped: loss or gradient not finite; samples (corpus:epoch:index) 0:0:8, 0:0:9" in said
    skipped = [record for record in records(output) if record["kind"] == "skipped"]
    assert [record["step"] for record in skipped] == [2, 8, 9]
    assert skipped[0]["samples"] == [[0, 0, at] for at in range(8, 16)]
    training = [record for record in records(output) if record["kind"] == "training"]
    assert [record["skipped_steps"] for record in training] == [1, 3, 3]
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in training)


def test_too_many_in_a_row(prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        not_finite_in(patch, 5, 6, 7)
        output = run(prepared, "diverged", "runtime.stop_after_skipped_steps=3", code=2)
    line = last_line(capsys)
    assert "the loss or the gradient of 3 steps in a row was not finite, so training stopped at step" in line
    assert str(output / "checkpoints") in line
    stopped = int(names(output)[-1].removeprefix("step-"))
    assert 7 <= stopped <= 9
    run(prepared, "diverged", "optimizer.learning_rate=0.001", "--allow=optimizer.learning_rate")
    assert names(output)[-1] == "step-00000012"
