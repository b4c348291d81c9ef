"""Every objective trains through the command; packed rows give the losses of padded ones; blends read every corpus."""

import json
from pathlib import Path

import pytest

from megatron_bert.cli.main import main
from tests.integration.tiny_corpus import documents, prepare, write_jsonl


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe for its token file `text`, and `other`, a token file of the same tokenizer."""
    folder = tmp_path_factory.mktemp("objectives")
    prepare(folder)
    words = ["--input", str(write_jsonl(folder / "other.jsonl", documents(60)[40:]))]
    tokenizer = ["--tokenizer", str(folder / "tokenizer")]
    assert main(["preprocess", *words, *tokenizer, "--output", str(folder / "other")]) == 0
    return folder


def losses(folder: Path, name: str, *overrides: str) -> list[float]:
    """Of the training records and the last validation."""
    words = [f"output={folder / name}", *overrides]
    command = ["pretrain", str(folder / "recipe.yaml"), "--json"]
    assert main([*command, *(word for override in words for word in ("--set", override))]) == 0
    return [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("pair", ["sentence-order", "next-sentence", "none"])
def test_packing_changes_no_result(prepared: Path, pair: str) -> None:
    plain = losses(prepared, f"{pair}-padded", f"objective.pair={pair}")
    packed = losses(
        prepared, f"{pair}-packed", f"objective.pair={pair}", "runtime.packing=true", "runtime.micro_batch_samples=3"
    )
    assert packed == pytest.approx(plain, rel=1e-4)


def test_causal(prepared: Path) -> None:
    whole = losses(prepared, "causal", "objective.kind=causal")
    assert whole[-1] < whole[0]
    parts = losses(prepared, "causal-parts", "objective.kind=causal", "runtime.micro_batch_samples=3")
    assert parts == pytest.approx(whole, rel=1e-4)


def test_a_blend(prepared: Path) -> None:
    blend = f"data.tokens=[{{prefix: {prepared / 'text'}, weight: 3}}, {{prefix: {prepared / 'other'}, weight: 1}}]"
    assert losses(prepared, "blend", blend) != losses(prepared, "alone")
    again = losses(prepared, "blend-packed", blend, "runtime.packing=true", "runtime.num_workers=2")
    assert again == pytest.approx(losses(prepared, "blend-again", blend), rel=1e-4)
