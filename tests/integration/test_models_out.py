"""Adapting a checkpoint, converting a run, its curves and event files: what goes into a run and what comes out."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from matplotlib.axes import Axes
from safetensors.torch import load_file

from megatron_bert.cli.main import main
from megatron_bert.model import MegatronBertForMaskedLM, MegatronBertForPreTraining
from tests.integration.tiny_corpus import prepare

SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 256,
    "max_position_embeddings": 64, "initializer_range": 0.06,
}  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def run(prepared: Path) -> Path:
    """A short run that is finished."""
    assert train(prepared, "finished", "objective.pair=none") == 0
    return prepared / "finished"


def train(folder: Path, name: str, *overrides: str) -> int:
    """Trains into folder/name; the exit code."""
    words = [word for override in overrides for word in ("--set", override)]
    return main(["pretrain", str(folder / "recipe.yaml"), "--json", "--set", f"output={folder / name}", *words])


def start_from(checkpoint: Path) -> str:
    return f"model={{start_from: {checkpoint}, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}}"


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def published(folder: Path, model_class: str, tokenizer: Path, **changes: int) -> Path:
    """A checkpoint that Transformers' own class wrote, with the tokenizer beside it."""
    torch.manual_seed(0)
    config = transformers.MegatronBertConfig(**{"vocab_size": 256, **SHAPE, **changes})
    getattr(transformers, model_class)(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def assert_same_logits(folder: Path, model_class: Any = MegatronBertForPreTraining) -> None:
    """Transformers' own class loads the folder whole and predicts what ours does."""
    theirs, report = getattr(transformers, model_class.__name__).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["the red fox [MASK] the river", "a house"], padding=True, return_tensors="pt")
    ours = model_class.from_pretrained(folder).eval()
    with torch.no_grad():
        one, other = ours(**inputs), theirs.eval()(**inputs)
    real = inputs["attention_mask"].bool()
    one_logits, other_logits = (out[0][real][..., : len(tokenizer)] for out in (one, other))
    torch.testing.assert_close(one_logits, other_logits, rtol=1e-4, atol=1e-5)
    if "seq_relationship_logits" in other:
        torch.testing.assert_close(one.seq_relationship_logits, other.seq_relationship_logits, rtol=1e-4, atol=1e-5)


def test_adapting_a_checkpoint(tmp_path: Path, prepared: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A Transformers folder without a pair head in, a Transformers folder out, better at the new text than before."""
    checkpoint = published(tmp_path / "in", "MegatronBertForMaskedLM", prepared / "tokenizer")
    overrides = [start_from(checkpoint), f"data.tokenizer={checkpoint}", "training.batch_samples=16"]
    no_step = ["training.steps=1", "training.warmup_steps=0", "optimizer.learning_rate=1e-12"]
    assert train(prepared, "", *overrides, *no_step, f"output={tmp_path / 'before'}") == 0
    assert "newly initialized, so train before use: bert.pooler.dense.*, cls.seq_relationship.*" in caplog.text
    steps = ["training.steps=60", "training.warmup_steps=5", "runtime.evaluate_every_steps=60"]
    assert train(prepared, "", *overrides, *steps, f"output={tmp_path / 'run'}") == 0
    before, after = (records(tmp_path / name, "validation")[-1] for name in ("before", "run"))
    assert after["masked_lm_loss"] < 0.9 * before["masked_lm_loss"]
    assert_same_logits(tmp_path / "run" / "model")


def test_a_run_starts_with_the_checkpoints_weights(tmp_path: Path, prepared: Path) -> None:
    checkpoint = published(tmp_path / "in", "MegatronBertForPreTraining", prepared / "tokenizer")
    one_step = ["training.steps=1", "training.warmup_steps=0", "optimizer.learning_rate=1e-12"]
    assert train(prepared, "", start_from(checkpoint), *one_step, f"output={tmp_path / 'run'}") == 0
    one, other = (
        load_file(checkpoint / "model.safetensors"),
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
    )
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        ({}, ["model={start_from: nowhere}"], "model.start_from nowhere: no such folder"),
        ({"vocab_size": 50}, [], "the tokenizer has "),
        ({"max_position_embeddings": 32}, [], "data.row_tokens 48 is more than the 32 positions of model.start_from"),
    ],
)
def test_checkpoints_that_cannot_be_started_from(
    tmp_path: Path,
    prepared: Path,
    change: dict[str, int],
    overrides: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = published(tmp_path / "in", "MegatronBertForPreTraining", prepared / "tokenizer", **change)
    assert train(prepared, "", start_from(checkpoint), *overrides, f"output={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert "internal" not in error


def test_converting_a_finished_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(run), str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(tmp_path / "model"), "steps": 6}
    one, other = (load_file(folder / "model.safetensors") for folder in (run / "model", tmp_path / "model"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert_same_logits(tmp_path / "model", MegatronBertForMaskedLM)  # a run without pairs has no head for them


def test_converting_one_checkpoint(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of the same steps that ends there has the same weights."""
    rate = "optimizer={learning_rate: 1.0e-3, final_share: 1.0}"  # or the schedule would know where it ends
    assert train(prepared, "three", rate, "training.steps=3", "training.warmup_steps=0") == 0
    steps = ("training.steps=5", "training.warmup_steps=0", "runtime.checkpoint_every_steps=3")
    assert train(prepared, "five", rate, *steps) == 0
    checkpoint = prepared / "five" / "checkpoints" / "step-00000003"
    capsys.readouterr()
    assert main(["convert", str(checkpoint), str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    one, other = (load_file(path / "model.safetensors") for path in (prepared / "three" / "model", tmp_path / "model"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert main(["convert", str(checkpoint), str(prepared / "five"), "--overwrite"]) == 2
    (checkpoint / "streams-00000.json").write_text("{}")
    assert main(["convert", str(checkpoint), str(tmp_path / "damaged")]) == 2
    assert f"{checkpoint} is damaged" in capsys.readouterr().err


def test_converting_to_bfloat16(run: Path, tmp_path: Path) -> None:
    """Half the bytes, each weight the nearest bfloat16, the type in config.json; Transformers loads it as it is."""
    folder = tmp_path / "model"
    assert main(["convert", str(run), str(folder), "--dtype", "bfloat16"]) == 0
    exact, rounded = (load_file(path / "model.safetensors") for path in (run / "model", folder))
    assert exact.keys() == rounded.keys()
    for name, weight in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        # 8 significant bits: rounding to nearest errs by at most 2^-8 of the number (IEEE 754), cutting off by 2^-7
        torch.testing.assert_close(rounded[name].float(), weight, rtol=2**-8, atol=1e-38)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    theirs, report = transformers.MegatronBertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert theirs.dtype == torch.bfloat16
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_converting_a_causal_run(prepared: Path, tmp_path: Path) -> None:
    assert train(prepared, "causal", "objective={kind: causal}", "optimizer.schedule=cosine") == 0
    assert main(["convert", str(prepared / "causal"), str(tmp_path / "model")]) == 0
    model, report = transformers.MegatronBertForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert model.config.is_decoder
    assert not report["missing_keys"]


def test_what_cannot_be_converted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["convert", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "no such file or folder" in refused(str(tmp_path / "none"), str(tmp_path / "model"))
    assert "has no model" in refused(str(tmp_path), str(tmp_path / "model"))
    (tmp_path / "there").mkdir()
    assert "is there already" in refused(str(run), str(tmp_path / "there"))
    assert "would replace what is converted" in refused(str(run), str(run.parent), "--overwrite")
    checkpoints = sorted((run / "checkpoints").rglob("*"))
    for folder in (run / "checkpoints", checkpoints[0]):
        assert "would replace the run's checkpoints" in refused(str(run), str(folder), "--overwrite")
    assert sorted((run / "checkpoints").rglob("*")) == checkpoints
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for place in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        assert "is no model's folder" in refused(str(run), str(place), "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    other = published(tmp_path / "other", "MegatronBertForMaskedLM", run.parent / "tokenizer")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["zebra"] = len(vocabulary["model"]["vocab"])
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "is another tokenizer" in refused(str(run), str(tmp_path / "m"), "--tokenizer", str(other))
    assert "is not there any more" in refused(str(run), str(tmp_path / "m"), "--tokenizer", str(tmp_path / "gone"))
    assert not (tmp_path / "m").exists()
    assert main(["convert", str(run), str(tmp_path / "there"), "--overwrite"]) == 0


def test_curves_at_the_end_and_on_demand(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (run / "curves.png").read_bytes().startswith(PNG)
    picture = tmp_path / "mine.png"
    assert main(["plot", str(run), "--output", str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"picture": str(picture)}
    assert picture.read_bytes().startswith(PNG)
    half = tmp_path / "metrics.jsonl"
    half.write_text((run / "metrics.jsonl").read_text() + '{"kind": "training", "st')  # being written just now
    assert main(["plot", str(tmp_path)]) == 0
    alone = (tmp_path / "curves.png").read_bytes()
    assert alone.startswith(PNG)
    mine = picture.read_bytes()
    assert main(["plot", str(tmp_path), str(run), "--output", str(picture)]) == 0
    assert picture.read_bytes() not in (alone, mine)
    assert main(["plot", str(tmp_path), str(run)]) == 2
    assert "several runs need --output" in capsys.readouterr().err
    assert (tmp_path / "curves.png").read_bytes() == alone


def test_curves_of_folders_of_the_same_name_and_of_no_numbers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, legends = (run / "metrics.jsonl").read_text().splitlines(), []
    broken = {**json.loads(lines[0]), "gradient_norm": None}
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(broken), ""]))
    monkeypatch.setattr(Axes, "legend", lambda axes, **_: legends.append([line.get_label() for line in axes.lines]))
    assert main(["plot", str(tmp_path / "a/run"), str(tmp_path / "b/run"), "--output", str(tmp_path / "c.png")]) == 0
    assert [len(set(names)) for names in legends] == [len(names) for names in legends]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give the output folder of a pretraining run"),
        ("", "has no training record yet"),
        ('{"kind": "training"\n', "line 1, is not a JSON object"),
        ('["training"]\n', "line 1, is not a record of a run"),
    ],
)
def test_what_cannot_be_drawn(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["plot", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "curves.png").exists()


def test_tensorboard_reads_what_is_written(prepared: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(prepared, "events", "runtime.tensorboard=true") == 0
    events = EventAccumulator(str(prepared / "events" / "tensorboard"))
    events.Reload()
    for kind in ("training", "validation"):
        seen = [(event.step, event.value) for event in events.Scalars(f"{kind}/loss")]
        wanted = [(record["step"], record["loss"]) for record in records(prepared / "events", kind)]
        assert [step for step, _ in seen] == [step for step, _ in wanted]
        assert [value for _, value in seen] == pytest.approx([value for _, value in wanted], rel=1e-5)


def test_tensorboard_may_be_missing(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(prepared, "no-events", "runtime.tensorboard=true") == 2
    assert "TensorBoard is not installed; install megatron-bert[tensorboard]" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["packing=true", "recompute=full", "recompute=selective", "micro_batch_samples=3"])
def test_runtime_knobs_change_no_result(prepared: Path, run: Path, setting: str) -> None:
    name = setting.replace("=", "-")
    assert train(prepared, name, "objective.pair=none", f"runtime.{setting}") == 0
    for kind in ("training", "validation"):
        wanted = [record["loss"] for record in records(run, kind)]
        assert [record["loss"] for record in records(prepared / name, kind)] == pytest.approx(wanted, rel=1e-4)
