"""`megatron-bert plan`: the dry run against the formulas and PyTorch's own counters, and what the command prints."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from megatron_bert.cli.main import main
from megatron_bert.model import MegatronBertConfig
from megatron_bert.planning.communication import collectives_of_step
from megatron_bert.planning.layout import Job, Layout
from megatron_bert.planning.memory import memory_of_step, optimizer_bytes, weight_bytes
from megatron_bert.planning.report import sent_by_kind
from megatron_bert.training.configuration import load_configuration
from megatron_bert.training.dry_run import dry_run
from tests.integration.tiny_model import write_tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"


def job_of(layout: Layout, micro_batches: int = 1, hidden: int = 1024, layers: int = 3) -> Job:
    config = MegatronBertConfig(
        vocab_size=29056, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )  # fmt: skip
    return Job(config, layout.gpus, layout.micro_rows * micro_batches * layout.data)


@pytest.mark.parametrize(
    ("layout", "micro_batches"),
    [
        (Layout(micro_rows=16), 1),
        (Layout(micro_rows=8, recompute="selective"), 3),
        (Layout(micro_rows=16, recompute="full"), 1),
        (Layout(tensor=2, micro_rows=16), 1),
        (Layout(tensor=4, sequence_parallel=True, recompute="full", micro_rows=16), 1),
        (Layout(shard=8, micro_rows=8), 1),
        (Layout(shard=8, micro_rows=8, keep_layers=True), 2),
        (Layout(replicate=4, micro_rows=4), 1),
        (Layout(tensor=2, shard=4, replicate=2, sequence_parallel=True, recompute="full", micro_rows=1), 3),
        (Layout(tensor=8, shard=64, sequence_parallel=True, micro_rows=8), 1),
    ],
    ids=str,
)
def test_formulas_agree_with_the_real_step_on_fake_ranks(layout, micro_batches):
    job = job_of(layout, micro_batches)
    found, memory = dry_run(job, layout), memory_of_step(job, layout)
    assert memory.total == pytest.approx(found.peak_bytes, rel=0.05)
    # The first rank has a little more where FSDP's parts do not come out even.
    assert weight_bytes(job, layout) + optimizer_bytes(job, layout) == pytest.approx(found.state_bytes, rel=0.02)
    seen, predicted = sent_by_kind(found.collectives), sent_by_kind(collectives_of_step(job, layout))
    for kind, axis in {key for key, sent in (seen | predicted).items() if sent > 1024}:
        assert seen[kind, axis] == pytest.approx(predicted[kind, axis], rel=0.02), (kind, axis)


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2, micro_rows=2), Layout(tensor=2, sequence_parallel=True, micro_rows=2), Layout(shard=4)]
)
def test_collectives_are_those_that_pytorch_counts(layout):
    """The dry run takes two steps, of which it tells one."""
    with CommDebugMode() as comm:
        comm.advanced_module_tracker.parent_list += ["Global"] * 1000  # it loses count of the modules it is in
        found = dry_run(job_of(layout, layers=2, hidden=128), layout)
    counted = {str(operator).split(".")[-1]: count for operator, count in comm.get_comm_counts().items()}
    told = {"all-reduce": 0, "all-gather": 0, "reduce-scatter": 0}
    for one in found.collectives:
        told[one.kind] += one.count
    assert sum(counted.values()) == 2 * sum(told.values())
    gathers = sum(count for name, count in counted.items() if "gather" in name)
    assert gathers == 2 * told["all-gather"]
    assert not dist.is_initialized()


def test_a_shape_that_cannot_be_split_is_refused_before_anything_starts(capsys):
    words = ["--hidden-size", "128", "--layers", "1", "--heads", "2", "--gpus", "4", "--batch", "4", "--tensor", "4"]
    assert main(["plan", *words, "--dry-run"]) == 2
    assert "num_attention_heads 2 is not divisible by the tensor-parallel degree 4" in capsys.readouterr().err


def test_the_command_prints_a_table_and_the_best_layouts_parts(capsys):
    assert main(["plan", "--size", "345m", "--gpus", "8", "--top", "3"]) == 0
    output = capsys.readouterr().out
    assert "334,723,458 parameters" in output
    assert "MFU" in output
    assert "slower" in output
    for line in ("memory", "time", "sent"):
        assert f"\n{line} " in output


def test_the_best_layout_as_a_recipes_settings(capsys):
    words = ["--size", "3.9b", "--gpus", "16", "--tensor", "2", "--sequence-parallel", "--shard", "2"]
    assert main(["plan", *words, "--recompute", "selective", "--micro-batch", "4"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    overrides = line.removeprefix("recipe  --set ").split(" --set ")
    recipe = load_configuration(RECIPES / "pretrain_3.9b.yaml", overrides)
    assert recipe.mesh.model_dump(include={"tensor", "sequence_parallel", "overlap", "shard"}) == {
        "tensor": 2, "sequence_parallel": True, "overlap": True, "shard": 2
    }  # fmt: skip
    assert (recipe.runtime.recompute, recipe.runtime.micro_batch_samples) == ("selective", 4)
    assert main(["plan", "--size", "3.9b", "--gpus", "1", "--gpu-memory-gib", "8"]) == 0
    output = capsys.readouterr().out
    assert "no layout fits" in output
    assert "recipe" not in output


def test_json_has_one_object_a_layout_and_the_dry_run(capsys):
    words = ["--hidden-size", "64", "--layers", "1", "--heads", "2", "--vocab-size", "256", "--row-tokens", "32"]
    assert main(["plan", *words, "--gpus", "2", "--batch", "4", "--top", "2", "--json", "--dry-run"]) == 0
    first, second, found = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["against"] is None
    assert second["against"]
    assert first["memory_bytes"]["total"] > 0
    assert found["dry_run"]["tensor"] == first["tensor"]
    assert found["peak_bytes"] > found["state_bytes"] > 0


def test_the_papers_table(capsys):
    assert main(["plan", "--table", "paper", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["paper"] for row in rows] == [1.0, 0.95, 0.82, 0.77, 0.96, 0.83, 0.79, 0.74]


def test_the_model_in_the_box(capsys):
    assert main(["plan", "--model", "mini", "--batch", "8"]) == 0
    assert "parameters; 8 rows" in capsys.readouterr().out


def test_a_folder_and_a_gpus_own_numbers(tmp_path, capsys):
    write_tiny_model(tmp_path)
    numbers = ["--gpu-teraflops", "100", "--gpu-memory-gib", "16", "--gpu-memory-gbps", "1000", "--gpu-link-gbps", "50"]
    assert main(["plan", "--model", str(tmp_path), "--batch", "8", "--row-tokens", "32", *numbers, "--json"]) == 0
    slow = json.loads(capsys.readouterr().out.splitlines()[0])
    assert main(["plan", "--model", str(tmp_path), "--batch", "8", "--row-tokens", "32", "--json"]) == 0
    assert slow["step_seconds"]["total"] > json.loads(capsys.readouterr().out.splitlines()[0])["step_seconds"]["total"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give one of --size, --model"),
        (["--size", "3.9g"], "did you mean '3.9b'?"),
        (["--size", "345m", "--model", "x"], "give one of"),
        (["--size", "345m", "--gpu", "h1000"], "did you mean h100?"),
        (["--size", "345m", "--gpus", "0"], "'0' is not a whole number above 0"),
        (["--size", "345m", "--gpu-teraflops", "-1"], "'-1' is not a number above 0"),
        (["--size", "345m", "--gpus", "8", "--batch", "7", "--tensor", "1"], "7 rows is not divisible by 8"),
        (["--size", "345m", "--gpus", "8", "--tensor", "16"], "8 GPUs cannot be split"),
        (["--size", "345m", "--gpus", "3", "--batch", "6", "--tensor", "3"], "num_attention_heads 16 is not divisible"),
        (["--size", "345m", "--vocab-size", "30001", "--gpus", "2", "--tensor", "2"], "pad the vocabulary"),
        (["--size", "345m", "--micro-batch", "7"], "not divisible by micro-batches of 7"),
        (["--size", "345m", "--sequence-parallel"], "sequence parallelism needs"),
        (["--size", "345m", "--gpus", "8", "--shard", "3"], "cannot be split"),
        (["--size", "345m", "--gpus", "1021", "--batch", "1"], "not divisible by 1021"),
        (["--hidden-size", "100", "--layers", "2", "--heads", "3"], "not a multiple of --heads 3"),
        (["--hidden-size", "128"], "go together"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--size", "345m", "--tabel", "paper"], "did you mean '--table'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(words, said, capsys):
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert said in captured.err
    assert captured.err.count("\n") == 1
