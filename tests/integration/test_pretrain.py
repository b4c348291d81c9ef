"""From a text file to a filled mask, by the command's own verbs, in small."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from megatron_bert.cli.main import main
from megatron_bert.data.indexed import IndexedReader
from megatron_bert.model import MegatronBertForPreTraining
from tests.integration.tiny_corpus import prepare, write_recipe


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    prepare(folder)
    return folder


def train(folder: Path, name: str, *overrides: str, seed: int = 1) -> Path:
    """Trains into folder/name and returns that."""
    words = [word for override in overrides for word in ("--set", override)]
    recipe = str(folder / "recipe.yaml")
    options = ["--set", f"output={folder / name}", "--set", f"training.seed={seed}"]
    assert main(["pretrain", recipe, "--json", *options, *words]) == 0
    return folder / name


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def losses(run: Path) -> list[float]:
    return [record["loss"] for kind in ("training", "validation") for record in records(run, kind)]


def test_the_chain_learns(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(
        prepared, "learn", "training.steps=200", "training.warmup_steps=10", "training.batch_samples=16",
        "optimizer.learning_rate=3e-3", "objective.max_masked_words=1", "model.num_hidden_layers=2",
        "runtime.evaluate_every_steps=200",
    )  # fmt: skip
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["model"] == str(run / "model")
    counts = np.bincount(IndexedReader(prepared / "text").tokens)
    shares = counts[counts > 0] / counts.sum()
    unigram_entropy = float(-(shares * np.log(shares)).sum())
    assert records(run, "training")[0]["masked_lm_loss"] > unigram_entropy
    assert outcome["validation"]["masked_lm_loss"] < 0.75 * unigram_entropy
    text = "[MASK] 2: the old king sees the river."
    assert main(["fill-mask", "--model", str(run / "model"), "--json", "--top-k", "1", "--dtype", "float32", text]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0][0]["token_str"] == "number"


def test_transformers_loads_the_model(prepared: Path) -> None:
    run = train(prepared, "plain")
    theirs, report = transformers.MegatronBertForPreTraining.from_pretrained(
        run / "model", output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    inputs = tokenizer("the red fox sees [MASK] river", return_tensors="pt")
    ours = MegatronBertForPreTraining.from_pretrained(run / "model").eval()
    with torch.no_grad():
        one, other = ours(**inputs), theirs.eval()(**inputs)
    tokens = len(tokenizer)  # the rows beyond are padding, which ours keeps from winning
    one_logits, other_logits = one.prediction_logits[..., :tokens], other.prediction_logits[..., :tokens]
    torch.testing.assert_close(one_logits, other_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.seq_relationship_logits, other.seq_relationship_logits, rtol=1e-4, atol=1e-5)
    assert theirs.config.vocab_size % 128 == 0
    assert theirs.config.vocab_size >= len(tokenizer)


def test_records_have_what_people_plot(prepared: Path) -> None:
    run = train(prepared, "records")
    assert [record["step"] for record in records(run, "training")] == [2, 4, 6]
    assert [record["step"] for record in records(run, "validation")] == [3, 6]
    numbers = {"loss", "masked_lm_loss", "masked_lm_accuracy", "pair_loss", "pair_accuracy"}
    extra = {"learning_rate", "gradient_norm", "tokens_per_second", "seconds", "data_waiting_share"}
    assert records(run, "training")[0].keys() == numbers | extra | {"kind", "step"}
    assert records(run, "validation")[0].keys() == numbers | {"kind", "step"}
    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved["optimizer"]["beta2"] == 0.999
    assert resolved["output"] == str(run)


def test_a_run_repeats_itself_and_the_seed_matters(prepared: Path) -> None:
    runs = [train(prepared, f"seed{number}", seed=seed) for number, seed in enumerate([1, 1, 2])]
    assert losses(runs[0]) == losses(runs[1])
    assert losses(runs[0]) != losses(runs[2])
    one, other = (load_file(run / "model" / "model.safetensors") for run in runs[:2])
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("setting", ["micro_batch_samples=3", "num_workers=2", "log_every_steps=5"])
def test_runtime_knobs_change_no_result(prepared: Path, setting: str) -> None:
    """With dropout off; the weights within rounding (AdamW's first steps divide by tiny second moments)."""
    plain = train(prepared, f"a-{setting}")
    changed = train(prepared, f"b-{setting}", f"runtime.{setting}")
    wanted = [record["loss"] for record in records(plain, "validation")]
    assert [record["loss"] for record in records(changed, "validation")] == pytest.approx(wanted, rel=1e-4)


def test_other_objectives_and_a_validation_file(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(
        prepared, "no-pairs", "objective.pair=none", "objective.max_masked_words=1",
        f"data.validation={prepared / 'text'}", "training.precision=bfloat16",
    )  # fmt: skip
    said = capsys.readouterr().err
    assert "samples an epoch" in said
    assert "without a pair" not in said  # none was wanted
    assert "pair_loss" not in records(run, "training")[0]
    assert "pair_loss" not in records(run, "validation")[0]


def test_no_validation(prepared: Path) -> None:
    run = train(prepared, "no-validation", "data.validation_share=0")
    assert not records(run, "validation")


def test_inspect_and_report_as_json(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "inspect", str(prepared / "tokenizer"), "--json", "--text", "the Fox"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["pieces"] == ["the", "fox"]
    assert shown["special_tokens"]["[MASK]"] == 4
    assert shown["lower_case"] is True
    out = str(prepared / "again")
    tokenizer = str(prepared / "tokenizer")
    assert (
        main(["preprocess", "--input", str(prepared / "*.jsonl"), "--tokenizer", tokenizer, "--output", out, "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == 40
    assert report["sentences"] == 200
    assert report["unknown_share"] == 0.0


def test_the_recipe_of_the_demo_runs_in_small(prepared: Path) -> None:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "demo_cpu.yaml"
    overrides = [f"data.tokens={prepared / 'text'}", f"data.tokenizer={prepared / 'tokenizer'}", "training.steps=2",
                 "training.warmup_steps=1", f"output={prepared / 'demo'}"]  # fmt: skip
    assert main(["pretrain", str(recipe), "--json", *(word for o in overrides for word in ("--set", o))]) == 0


def test_recipe_helper_writes_what_is_asked(tmp_path: Path) -> None:
    assert yaml.safe_load(write_recipe(tmp_path, training__steps=9).read_text())["training"]["steps"] == 9
