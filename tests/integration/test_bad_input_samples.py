"""Every mistake with what samples are made from: one line, exit code 2, no run left behind."""

from pathlib import Path

import pytest

from megatron_bert.cli.main import main
from tests.integration.test_bad_input_pretraining import fails
from tests.integration.tiny_corpus import documents, prepare, write_jsonl


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside a prepared corpus, and beside it the token file `other`, of other text with its vocabulary."""
    folder = tmp_path_factory.mktemp("samples")
    made = prepare(folder)
    elsewhere = write_jsonl(folder / "other.jsonl", ["entirely different words " * 5] * 3)
    tokenizer = ["--tokenizer", str(folder / "other-tokenizer")]
    train = ["--output", tokenizer[1], "--vocab-size", "60"]
    assert main(["tokenizer", "train", "--input", str(elsewhere), *train]) == 0
    assert main(["preprocess", "--input", str(elsewhere), *tokenizer, "--output", str(folder / "other")]) == 0
    one = write_jsonl(folder / "one.jsonl", [" ".join(documents(10))])
    tokenizer = ["--tokenizer", str(folder / "tokenizer")]
    assert main(["preprocess", "--input", str(one), *tokenizer, "--output", str(folder / "one")]) == 0
    return made


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.tokens=one", "data.validation_share=0", "objective.pair=next-sentence"],
            "samples has two sentences and another document beside it, so there is no pair to learn from; "
            "set objective.pair=none",
        ),
        (["data.tokens=one"], "one: data.validation_share 0.1 takes all 1 documents and leaves none to train on"),
        (["objective.chinese_segmenter=jieba"], "the tokenizer's vocabulary has no Chinese characters"),
        (["data.tokens=[{prefix: text, weight: 0}]"], "data.tokens.blend.0.weight: Input should be greater than 0"),
        (["data.tokens=[{prefix: text, weight: 1}, {prefix: nowhere, weight: 1}]"], "nowhere.idx is missing"),
        (
            ["data.tokens=[{prefix: text, weight: 1}, {prefix: other, weight: 1}]"],
            "other was made with another vocabulary",
        ),
        (["objective.kind=causal", "runtime.packing=true"], "rows of the causal objective are always full"),
    ],
)
def test_pretrain(
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(recipe.parent)
    fails(capsys, [recipe, *(word for o in overrides for word in ("--set", o))], message, "pretrain")
    assert not (recipe.parent / "run").exists()
