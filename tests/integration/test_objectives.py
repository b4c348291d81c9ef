"""Every objective trains through the command; packed rows give the losses of padded ones; blends read every corpus."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_bert.cli.main import main
from megatron_bert.data.indexed import IndexedReader
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


def test_a_byte_pair_vocabulary_is_taken_as_it_stands(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a model beside it, too; its unknown tokens are counted, and that it marks no words is said."""
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=list(names.values()), show_progress=False)
    tokenizer.train_from_iterator(documents(40), trainer)
    folder = prepared / "bpe"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    text = write_jsonl(prepared / "unknown.jsonl", [*documents(40), "the ☃ sees."])
    words = ["--input", str(text), "--tokenizer", str(folder), "--output", str(prepared / "pairs"), "--json"]
    assert main(["preprocess", *words]) == 0
    assert json.loads(capsys.readouterr().out)["unknown_tokens"] == 1
    wanted = tokenizer.encode("the ☃ sees.").ids
    assert IndexedReader(prepared / "pairs").tokens[-len(wanted) :].tolist() == wanted
    assert main(["tokenizer", "inspect", str(folder)]) == 0
    losses(prepared, "bpe-run", f"data.tokens={prepared / 'pairs'}", f"data.tokenizer={folder}", "training.steps=3")
    assert "bpe does not mark what continues a word by ##" in capsys.readouterr().err


def test_a_vocabulary_with_lines_twice_has_rows_for_all_numbers(prepared: Path) -> None:
    lines = (prepared / "tokenizer" / "vocab.txt").read_text().splitlines()
    folder = prepared / "twice"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join([*lines, *lines[5:]]))
    words = ["--input", str(prepared / "other.jsonl"), "--tokenizer", str(folder), "--output", str(prepared / "late")]
    assert main(["preprocess", *words]) == 0
    data = [f"data.tokens={prepared / 'late'}", f"data.tokenizer={folder}"]
    losses(prepared, "late-run", *data, "model.vocabulary_multiple=1", "training.steps=3")
