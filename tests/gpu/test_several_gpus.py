"""The real command under torchrun on two or four GPUs: layouts train alike, a killed process takes nothing with it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.distributed.test_faults import PATIENCE_SECONDS, children, last_step, losses, started, wait_for
from tests.integration.tiny_corpus import prepare, write_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs"),
]

STEPS = 30
PROCESSES = 4 if torch.cuda.device_count() >= 4 else 2
TENSOR = [f"mesh.tensor={PROCESSES}"]
SEQUENCE = [*TENSOR, "mesh.sequence_parallel=true"]
OVERLAP = [*SEQUENCE, "mesh.overlap=true"]
REPLICATED: list[str] = []  # where a GPU has the memory
SHARDED = [f"mesh.shard={PROCESSES}"]
LAYOUTS = {"sharded": SHARDED, "tensor": TENSOR, "sequence": SEQUENCE, "overlap": OVERLAP}
if PROCESSES == 4:
    LAYOUTS |= {
        "hybrid": ["mesh.shard=2"],
        "both": ["mesh.tensor=2", "mesh.sequence_parallel=true", "mesh.overlap=true"],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of layers that the kernels of large models take: heads of 64, several in a compiled run."""
    folder = tmp_path_factory.mktemp("gpus")
    prepare(folder)
    write_recipe(
        folder,
        model__hidden_size=256, model__num_hidden_layers=5, model__num_attention_heads=4, data__row_tokens=64,
        optimizer={"learning_rate": 1e-3},
        training={"steps": STEPS, "warmup_steps": 10, "batch_samples": 32, "precision": "bfloat16"},
        runtime={
            "log_every_steps": 1, "evaluate_every_steps": 10, "checkpoint_every_steps": 10, "keep_checkpoints": 99,
            "packing": True, "micro_batch_samples": 8, "device": "cuda",
        },
    )  # fmt: skip
    return folder


def options(layout: list[str]) -> list[str]:
    return [word for override in layout for word in ("--set", override)]


def finished(folder: Path, output: Path, layout: list[str]) -> dict[int, float]:
    """The losses of a run that ends by itself."""
    with started(folder, output, *options(layout), processes=PROCESSES) as process:
        said = process.communicate(timeout=PATIENCE_SECONDS)[1]
        assert process.returncode == 0, said
    assert (output / "model" / "model.safetensors").exists()
    return losses(output)


@pytest.fixture(scope="module")
def replicated(folder: Path) -> Path:
    finished(folder, folder / "replicated", REPLICATED)
    return folder / "replicated"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_train_alike(folder: Path, tmp_path: Path, replicated: Path, layout: list[str]) -> None:
    """Within what bfloat16 rounds, which grows from step to step."""
    reference, found = losses(replicated), finished(folder, tmp_path / "run", layout)
    assert found.keys() == reference.keys() == set(range(1, STEPS + 1))
    assert [found[step] for step in range(1, 6)] == pytest.approx([reference[step] for step in range(1, 6)], rel=2e-3)
    assert found == pytest.approx(reference, rel=3e-2)
    validation = losses(replicated, "validation")
    assert validation.keys() == {10, 20, 30}
    assert losses(tmp_path / "run", "validation") == pytest.approx(validation, rel=1e-2)


def test_going_on_at_another_layout(folder: Path, tmp_path: Path, replicated: Path) -> None:
    shutil.copytree(replicated, tmp_path / "run", ignore=shutil.ignore_patterns("step-000000[23]0", "model"))
    found = finished(folder, tmp_path / "run", OVERLAP)
    reference = losses(replicated)
    assert {step: found[step] for step in range(1, 11)} == {step: reference[step] for step in range(1, 11)}
    assert found == pytest.approx(reference, rel=3e-2)


def test_a_killed_process(folder: Path, tmp_path: Path) -> None:
    """torchrun starts all again, and they go on from the last checkpoint."""
    output = tmp_path / "run"
    longer = [*OVERLAP, "training.steps=400"]
    with started(folder, output, *options(longer), restarts=1, processes=PROCESSES) as process:
        wait_for(process, lambda: last_step(output) >= 25 and any((output / "checkpoints").glob("step-*")))
        before = losses(output)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        said = process.communicate(timeout=2 * PATIENCE_SECONDS)[1]
        assert process.returncode == 0, said
    assert "going on from" in said
    after = losses(output)
    assert after.keys() == set(range(1, 401))
    assert {step: after[step] for step in before} == before
