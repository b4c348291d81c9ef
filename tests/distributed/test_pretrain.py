"""The whole trainer on several processes: the same losses and weights as on one, whatever the layout."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_bert.cli.main import main
from tests.distributed import pretrain_cases
from tests.distributed.world import World
from tests.integration.tiny_corpus import prepare, write_recipe

TOLERANCE = 1e-5
ROUNDING = 1e-8  # of the biases of the keys, which nothing moves
STEPS = 20
SHAPE = {"model__hidden_size": 32, "model__num_hidden_layers": 2, "model__num_attention_heads": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    prepare(folder)
    write_recipe(
        folder, training={"steps": STEPS, "warmup_steps": 2, "batch_samples": 8, "seed": 5}, **SHAPE,
        runtime={"log_every_steps": 1, "evaluate_every_steps": 10, "checkpoint_every_steps": 10, "device": "cpu"},
    )  # fmt: skip
    # A large epsilon: the true gradient of the keys' biases is 0, and Adam would make steps of its rounding.
    text = (folder / "recipe.yaml").read_text().replace("learning_rate: 0.005", "learning_rate: 0.005\n  epsilon: 1e-3")
    (folder / "recipe.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The run on one process."""
    assert main(["pretrain", str(folder / "recipe.yaml"), "--json", "--set", f"output={folder / 'alone'}"]) == 0
    return folder / "alone"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(ours: Path, reference: Path) -> None:
    assert losses(ours) == pytest.approx(losses(reference), rel=TOLERANCE)
    found, wanted = (load_file(run / "model" / "model.safetensors") for run in (ours, reference))
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert float((found[name] - weight).norm()) <= TOLERANCE * float(weight.norm()) + ROUNDING, name
    for file in ("config.json", "tokenizer.json"):
        assert (ours / "model" / file).read_bytes() == (reference / "model" / file).read_bytes()


SEQUENCE = "mesh.sequence_parallel=true"
PACKED = "runtime.packing=true"


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (2, ["mesh.tensor=2"]),
        (2, ["runtime.micro_batch_samples=3"]),
        (4, ["mesh.tensor=2", "mesh.shard=1", PACKED]),
        (4, ["mesh.tensor=2", SEQUENCE, PACKED, "runtime.recompute=full"]),
        (4, ["mesh.shard=2", "mesh.keep_layers=true", PACKED, "runtime.micro_batch_samples=2"]),
    ],
)
def test_the_same_run(
    world: Callable[[int], World], folder: Path, alone: Path, processes: int, overrides: list[str]
) -> None:
    run = folder / f"{processes}-{'-'.join(overrides)}"
    assert world(processes).run(pretrain_cases.trains, folder / "recipe.yaml", f"output={run}", *overrides) == (
        processes * [STEPS]
    )
    assert_same_run(run, alone)


def test_weights_are_shared_where_they_have_to_be(world: Callable[[int], World]) -> None:
    """Replicas, shards, tensor-parallel degree, sequence parallelism."""
    assert world(4).run(pretrain_cases.layout, fits_whole=True) == 4 * [[4, 1, 1, 0]]
    assert world(4).run(pretrain_cases.layout) == 4 * [[1, 4, 1, 0]]


@pytest.mark.parametrize("replicate", [1, 2])
def test_a_step_that_one_rank_cannot_apply(world: Callable[[int], World], replicate: int) -> None:
    world(4).run(pretrain_cases.leaves_out_a_step, 3, replicate=replicate)


def test_a_disk_takes_its_time(world: Callable[[int], World], folder: Path, tmp_path: Path) -> None:
    """Nobody is ended for a checkpoint that is written or read for longer than processes wait for each other."""
    recipe, output = folder / "recipe.yaml", f"output={tmp_path / 'run'}"
    often = ("runtime.checkpoint_every_steps=1", "mesh.timeout_seconds=1")
    assert world(2).run(pretrain_cases.has_a_slow_disk, recipe, output, "training.steps=3", *often) == 2 * [[]]
    assert world(2).run(pretrain_cases.looks_for_its_checkpoint, recipe, output, "training.steps=3") == [3, 3]


def test_muon_on_a_mesh(world: Callable[[int], World], folder: Path) -> None:
    """Its iteration rounds to bfloat16: a rounding of float32 before it may come out as one of bfloat16."""
    recipe, muon = folder / "recipe.yaml", ["optimizer.kind=muon", "training.steps=10"]
    alone, spread = folder / "muon", folder / "muon-spread"
    sets = [word for override in (f"output={alone}", *muon) for word in ("--set", override)]
    assert main(["pretrain", str(recipe), "--json", *sets]) == 0
    world(4).run(pretrain_cases.trains, recipe, f"output={spread}", "mesh.tensor=2", *muon)
    assert losses(spread) == pytest.approx(losses(alone), rel=1e-3)


@pytest.mark.skipif("ALL_LAYOUTS" not in os.environ, reason="half an hour: set ALL_LAYOUTS=1 to run every combination")
@pytest.mark.parametrize("micro", [8, 2])
@pytest.mark.parametrize("packing", ["false", "true"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence", ["false", "true"])
@pytest.mark.parametrize(("tensor", "data"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)])
def test_every_layout(
    world: Callable[[int], World], folder: Path, alone: Path, tmp_path: Path, tensor: int, data: int, sequence: str,
    recompute: str, packing: str, micro: int,
) -> None:  # fmt: skip
    if tensor == 1 and sequence == "true":
        pytest.skip("nobody to split a sequence with")
    overrides = [
        f"output={tmp_path}", f"mesh.tensor={tensor}", f"mesh.sequence_parallel={sequence}",
        f"runtime.recompute={recompute}", f"runtime.packing={packing}", f"runtime.micro_batch_samples={micro}",
    ]  # fmt: skip
    world(tensor * data).run(pretrain_cases.trains, folder / "recipe.yaml", *overrides)
    assert_same_run(tmp_path, alone)


def test_going_on_at_other_layouts(world: Callable[[int], World], folder: Path, alone: Path) -> None:
    """Saved by four tensor-parallel processes; the rest by 2 x 2, by four sharded ones, by two replicas, and by one."""
    whole, recipe = folder / "whole", folder / "recipe.yaml"
    world(4).run(pretrain_cases.trains, recipe, f"output={whole}", "mesh.tensor=4")
    layouts = [(4, ["mesh.tensor=2"]), (4, []), (2, ["mesh.shard=1"]), (1, [])]
    for number, (processes, overrides) in enumerate(layouts):
        run = folder / f"on-{number}"
        shutil.copytree(whole, run, ignore=shutil.ignore_patterns("step-00000020", "model"))
        if processes == 1:
            assert main(["pretrain", str(recipe), "--json", "--set", f"output={run}"]) == 0
        else:
            world(processes).run(pretrain_cases.trains, recipe, f"output={run}", *overrides)
        assert_same_run(run, alone)


def test_dropout_goes_on_where_it_was(world: Callable[[int], World], folder: Path) -> None:
    """At the same layout, a run that was interrupted is bit-equal to one that was not, dropout included."""
    options = ["mesh.tensor=2", "model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1"]
    whole, again, recipe = folder / "drops", folder / "drops-again", folder / "recipe.yaml"
    world(4).run(pretrain_cases.trains, recipe, f"output={whole}", *options)
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns("step-00000020", "model"))
    world(4).run(pretrain_cases.trains, recipe, f"output={again}", *options)
    assert losses(whole) == losses(again)
    found, wanted = (load_file(run / "model" / "model.safetensors") for run in (again, whole))
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mesh.tensor=3"], "mesh.tensor 3 with 4 processes: start a multiple of 3"),
        (["mesh.tensor=2", SEQUENCE, "mesh.overlap=true"], "mesh.overlap copies from one GPU's memory to another's"),
        (["mesh.shard=3"], "mesh.shard 3 with 4 data-parallel ranks"),
        (["mesh.tensor=4", "model.num_attention_heads=2"], "num_attention_heads 2 is not divisible by the tensor"),
        (["mesh.tensor=4", "model.vocabulary_multiple=1", "data.tokenizer=TOKENIZER"], "pad the vocabulary to a multi"),
        (["training.batch_samples=6"], "training.batch_samples 6 is not a multiple of the 4 data-parallel ranks"),
        (["data.tokens=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_said_once_to_all(
    world: Callable[[int], World], folder: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    overrides = [one.replace("TOKENIZER", str(folder / "tokenizer")) for one in overrides]
    said = world(4).run(pretrain_cases.trains, folder / "recipe.yaml", f"output={tmp_path / 'run'}", *overrides)
    assert message in said[0]
    assert said == 4 * said[:1]


def test_without_the_processes_that_the_mesh_wants(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(folder / "recipe.yaml"), "--set", "mesh.tensor=2"]) == 2
    assert "mesh.tensor 2 with 1 process: start a multiple of 2 (torchrun --nproc" in capsys.readouterr().err


def test_a_checkpoint_that_lacks_a_shard(
    world: Callable[[int], World], folder: Path, tmp_path: Path, alone: Path
) -> None:
    """The one before is used; where there is none, every process is told the same."""
    recipe, run = folder / "recipe.yaml", tmp_path / "run"
    world(2).run(pretrain_cases.trains, recipe, f"output={run}", "mesh.tensor=2")
    shutil.rmtree(run / "model")
    (run / "checkpoints" / "step-00000020" / "__1_0.distcp").unlink()
    assert world(2).run(pretrain_cases.trains, recipe, f"output={run}", "mesh.tensor=2") == [STEPS, STEPS]
    assert_same_run(run, alone)
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "__1_0.distcp").unlink()
    said = world(2).run(pretrain_cases.trains, recipe, f"output={run}", "mesh.tensor=2")
    assert "every checkpoint is damaged" in said[0]
    assert said[0] == said[1]
