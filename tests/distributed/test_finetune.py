"""Fine-tuning on several processes: the same losses, scores and weights as on one, whatever the layout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_bert.cli.main import main
from tests.distributed import finetune_cases
from tests.distributed.world import World
from tests.integration.tiny_tasks import prepare_tasks, write_task_recipe

TOLERANCE = 1e-5
# Of what only rounding moves: six steps of 3e-3 by a gradient of some 1e-7 over Adam's epsilon. Softmax does not change
# with the biases of the keys, nor with that of all choices.
ROUNDING = 2e-6
UNMOVED = {"race": ("key.bias", "classifier.bias")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    prepare_tasks(folder, multiple=128)
    for task in ("ner", "squad", "race"):
        # A large epsilon: the true gradient of the keys' biases is 0, and Adam would make steps of its rounding.
        write_task_recipe(folder, task, task, optimizer__epsilon=1e-3, optimizer__learning_rate=3e-3)
    return folder


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("task", "processes", "overrides"),
    [
        ("ner", 2, ["mesh.tensor=2"]),
        ("squad", 4, ["mesh.tensor=2", "mesh.sequence_parallel=true", "runtime.micro_batch_samples=3"]),
        ("race", 2, ["runtime.micro_batch_samples=3", "mesh.shard=1"]),
        ("race", 4, ["mesh.tensor=4"]),
    ],
)
def test_the_same_run(
    world: Callable[[int], World], folder: Path, task: str, processes: int, overrides: list[str]
) -> None:
    recipe, alone = folder / f"{task}.yaml", folder / f"{task}-alone"
    assert main(["finetune", task, str(recipe), "--json", "--set", f"output={alone}"]) == 0
    run = folder / f"{task}-{processes}"
    found = world(processes).run(finetune_cases.finetunes, task, recipe, f"output={run}", *overrides)
    assert found == processes * found[:1]
    assert losses(run) == pytest.approx(losses(alone), rel=TOLERANCE)
    ours, wanted = (json.loads((one / "scores.json").read_text())["validation"] for one in (run, alone))
    assert ours == pytest.approx(wanted, rel=TOLERANCE)
    weights, reference = (load_file(one / "model" / "model.safetensors") for one in (run, alone))
    assert weights.keys() == reference.keys()
    for name, weight in reference.items():
        rounding = ROUNDING if name.endswith(UNMOVED.get(task, ("key.bias",))) else 1e-7
        assert float((weights[name] - weight).norm()) <= TOLERANCE * float(weight.norm()) + rounding, name
    assert (run / "model" / "config.json").read_text() == (alone / "model" / "config.json").read_text()


def test_adapters_on_data_parallel_ranks(world: Callable[[int], World], folder: Path) -> None:
    """Sharded ones, and replicas."""
    recipe, overrides = folder / "ner.yaml", ["lora.rank=4", "training.epochs=0.5"]
    sets = [word for one in (*overrides, f"output={folder / 'lora'}") for word in ("--set", one)]
    assert main(["finetune", "ner", str(recipe), "--json", *sets]) == 0
    for shard in (2, 1):
        run = folder / f"lora-{shard}"
        more = (f"output={run}", f"mesh.shard={shard}")
        world(2).run(finetune_cases.finetunes, "ner", recipe, *overrides, *more)
        assert losses(run) == pytest.approx(losses(folder / "lora"), rel=TOLERANCE)
        check_adapters(run, folder / "lora")


def check_adapters(ours: Path, reference: Path) -> None:
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        found, wanted = (load_file(run / file) for run in (ours, reference))
        assert all(float((found[name] - weight).norm()) <= 1e-4 * float(weight.norm()) + 1e-6
                   for name, weight in wanted.items())  # fmt: skip


def test_what_cannot_be_is_said_to_all(world: Callable[[int], World], folder: Path) -> None:
    for overrides, message in (
        (["mesh.tensor=2", "lora.rank=4"], "lora with mesh.tensor"),
        (["training.batch_samples=15"], "training.batch_samples 15 is not a multiple of the 2 data-parallel ranks"),
        (["data.train=nowhere"], "data.train nowhere: no such file"),
    ):
        said = world(2).run(finetune_cases.finetunes, "ner", folder / "ner.yaml", f"output={folder / 'no'}", *overrides)
        assert message in said[0]
        assert said == 2 * said[:1]


def test_an_evaluation_is_seen_to_move_on(world: Callable[[int], World], folder: Path) -> None:
    """With each batch: all of them may take longer than a process is waited for."""
    overrides = (f"output={folder / 'seen'}", "training.epochs=0.2", "runtime.micro_batch_samples=2")
    for said in world(2).run(finetune_cases.places_in, "ner", folder / "ner.yaml", *overrides):
        evaluations = [what for what in said if what.startswith("the evaluation after step")]
        assert len(evaluations) > len(set(evaluations)) > 0
