"""The model in the box: it is small, loads anywhere, and answers sensibly in both languages."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers

import megatron_bert
from megatron_bert.cli.main import main
from megatron_bert.inference.fill_mask import MaskFiller, load_mask_filler
from megatron_bert.training.configuration import DataSection
from tests.architecture.test_tools import ROOT

FOLDER = Path(megatron_bert.MINI)
CLOZE = ROOT / "tools" / "mini_cloze.tsv"
MOST_BYTES = 40_000_000
GRAMMAR_TOP1 = {"en": 0.9, "zh": 0.6}  # of both together 0.8


@pytest.fixture(scope="module")
def filler() -> MaskFiller:
    return load_mask_filler(FOLDER, dtype="float32")


def test_it_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["The capital of France is [MASK].", "他昨天去了图书<mask>看书。"]
    answers = []
    for options in ([], ["--model", "mini"]):
        assert main(["fill-mask", "--json", "--top-k", "1", *options, *texts]) == 0
        lines = capsys.readouterr().out.splitlines()
        answers.append([json.loads(line)["predictions"][0][0]["token_str"] for line in lines])
    assert answers[0] == answers[1]
    assert answers[0] == ["Paris", "馆"]


def test_its_tokenizer_goes_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "inspect", "mini", "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    (tmp_path / "text.txt").write_text("One sentence. Another one.\n")
    arguments = ["--input", str(tmp_path / "text.txt"), "--output", str(tmp_path / "tokens"), "--workers", "0"]
    assert main(["preprocess", "--tokenizer", "mini", *arguments]) == 0
    assert json.loads((tmp_path / "tokens.json").read_text())["fingerprint"] == inspected["fingerprint"]
    assert DataSection(tokens=tmp_path / "tokens", tokenizer="mini").tokenizer == FOLDER


def test_a_folder_of_its_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    assert main(["fill-mask", "--model", "mini", "a [MASK]"]) == 2
    assert "mini has no model" in capsys.readouterr().err


def test_it_fits_in_a_wheel() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= MOST_BYTES
    names = {file.name for file in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names


def test_transformers_own_class_loads_it(filler: MaskFiller) -> None:
    theirs, report = transformers.MegatronBertForMaskedLM.from_pretrained(
        FOLDER, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = transformers.AutoTokenizer.from_pretrained(FOLDER)(
        ["Paris is the [MASK] of France.", "北京是中国的首[MASK]。"], padding=True, return_tensors="pt"
    )
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        one, other = (model.eval()(**inputs).logits[real] for model in (filler.model, theirs))
    known = filler.encoder.num_tokens
    torch.testing.assert_close(one[:, :known], other[:, :known], rtol=1e-4, atol=1e-4)


def test_the_pipeline_knows_its_name() -> None:
    fill = megatron_bert.pipeline("fill-mask", model="mini", top_k=1)
    assert fill("他昨天去了图书<mask>看书。")[0]["token_str"] == "馆"


def test_it_knows_grammar_and_fixed_phrases(filler: MaskFiller) -> None:
    """Of the cloze set; what it scores on knowledge is in its card."""
    items = [line.split("\t") for line in CLOZE.read_text(encoding="utf-8").splitlines()]
    right: dict[str, list[bool]] = defaultdict(list)
    for (language, kind, _, answer), filled in zip(items, filler.fill([text for _, _, text, _ in items]), strict=True):
        if kind == "grammar":
            right[language].append(filled.predictions[0][0].token_str == answer)
    assert {language: len(found) for language, found in right.items()} == {"en": 50, "zh": 30}
    for language, found in right.items():
        assert sum(found) / len(found) >= GRAMMAR_TOP1[language], language
    assert sum(map(sum, right.values())) / 80 >= 0.8
