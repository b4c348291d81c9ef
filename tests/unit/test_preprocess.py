"""Preprocessing against a plain loop over Transformers' tokenizer, and what its report counts."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from megatron_bert.cli.main import main
from megatron_bert.data import preprocess as module
from megatron_bert.data import reading
from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.sentences import SentenceSplitter
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.data.vocabulary import VocabularyOptions, fingerprint, train_vocabulary, write_tokenizer
from megatron_bert.errors import UserError

DOCUMENTS = [
    "Paris is old. It is a city.\nThe Seine flows there.",
    "",
    "One sentence",
    " \n ",
    "\x01\x02",
    "Somebody wrote [MASK] and [SEP] here. Strange: \u4e2d. The end.",
]


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS).replace("\u4e2d", ""))
    options = VocabularyOptions(size=100, min_frequency=1)
    write_tokenizer(train_vocabulary([tmp_path / "text.txt"], options), options, tmp_path / "tok")
    return tmp_path / "tok"


def run(tmp_path: Path, folder: Path, documents: list[str], name: str = "out", **options: object) -> module.Report:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return preprocess(
        [file], load_tokenizer(folder).backend_tokenizer, "tok", tmp_path / name, splitter=SentenceSplitter(), **options
    )  # type: ignore[arg-type]


def by_a_plain_loop(folder: Path, documents: list[str]) -> list[list[list[int]]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = [
        [
            tokenizer.encode(s, add_special_tokens=False, split_special_tokens=True)
            for s in SentenceSplitter().split(text)
        ]
        for text in documents
    ]
    return [kept for document in encoded if (kept := [sentence for sentence in document if sentence])]


@pytest.mark.parametrize("block_bytes", [1, 60, 1 << 20])
def test_tokens_are_those_of_a_plain_loop(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", block_bytes)
    report = run(tmp_path, tokenizer_folder, DOCUMENTS)
    reader = IndexedReader(tmp_path / "out")
    ours = [[reader[s].tolist() for s in range(*reader.documents[d : d + 2])] for d in range(len(reader.documents) - 1)]
    wanted = by_a_plain_loop(tokenizer_folder, DOCUMENTS)
    assert ours == wanted
    assert report.documents == 3
    assert report.dropped == {"empty": 3}
    assert report.one_sentence_documents == 1
    assert report.sentences == sum(map(len, wanted)) == 7
    assert report.tokens == len(reader.tokens) == sum(len(s) for d in wanted for s in d)
    assert report.unknown_tokens == 1
    assert report.unknown_share == pytest.approx(1 / report.tokens)


def test_special_tokens_in_a_text_are_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    run(tmp_path, tokenizer_folder, DOCUMENTS)
    assert not np.isin(IndexedReader(tmp_path / "out").tokens, [0, 2, 3, 4]).any()


def test_provenance_names_the_vocabulary(tmp_path: Path, tokenizer_folder: Path) -> None:
    report = run(tmp_path, tokenizer_folder, DOCUMENTS)
    made_with = IndexedReader(tmp_path / "out").provenance
    assert made_with is not None
    tokenizer = load_tokenizer(tokenizer_folder)
    assert made_with.fingerprint == fingerprint(tokenizer.backend_tokenizer)
    assert (made_with.documents, made_with.sentences, made_with.tokens) == (3, 7, report.tokens)
    assert made_with.vocabulary_size == len(tokenizer)


def test_a_tokenizer_that_truncates_truncates_nothing_here(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder).backend_tokenizer
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    (tmp_path / "in.txt").write_text("one two three four five six seven eight nine ten")
    report = preprocess([tmp_path / "in.txt"], tokenizer, "tok", tmp_path / "out", splitter=SentenceSplitter())
    assert report.tokens == len(
        by_a_plain_loop(tokenizer_folder, ["one two three four five six seven eight nine ten"])[0][0]
    )


@pytest.mark.parametrize("documents", [[], ["", " "], ["\x01"]])
def test_nothing_to_write_is_refused_and_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, documents: list[str]
) -> None:
    with pytest.raises(UserError, match="the input holds no text"):
        run(tmp_path, tokenizer_folder, documents, "deep/out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_nothing_is_overwritten_by_accident(tmp_path: Path, tokenizer_folder: Path) -> None:
    run(tmp_path, tokenizer_folder, DOCUMENTS)
    with pytest.raises(UserError, match="is already there"):
        run(tmp_path, tokenizer_folder, DOCUMENTS[:1])
    assert run(tmp_path, tokenizer_folder, DOCUMENTS[:1], overwrite=True).documents == 1
    assert len(IndexedReader(tmp_path / "out").documents) == 2


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text('{"text": "One. Two."}')
    (tmp_path / "link").symlink_to(tmp_path)
    words = ["--input", str(tmp_path / "text.json"), "--tokenizer", "mini", "--workers", "0", "--overwrite"]
    assert main(["preprocess", *words, "--output", str(tmp_path / "link" / "text")]) == 2
    assert (tmp_path / "text.json").read_text() == '{"text": "One. Two."}'


def test_bad_input_in_the_middle_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 1)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine. fine."}\n{"text": "fine"}\nbroken\n')
    tokenizer = load_tokenizer(tokenizer_folder).backend_tokenizer
    (tmp_path / "deep").mkdir()
    with pytest.raises(UserError, match=r"bad\.jsonl line 3 is not JSON"):
        preprocess([tmp_path / "bad.jsonl"], tokenizer, "t", tmp_path / "deep" / "out", splitter=SentenceSplitter())
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_long_text_is_encoded_in_parts(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Paris is old.\n" * 30, "Paris is old. It is. " * 20, "Short."]
    run(tmp_path, tokenizer_folder, texts)
    monkeypatch.setattr(module, "_PART_CHARACTERS", 42)  # three lines, and twice the two sentences of the other text
    run(tmp_path, tokenizer_folder, texts, "parts")
    whole, parts = IndexedReader(tmp_path / "out"), IndexedReader(tmp_path / "parts")
    for name in ("tokens", "lengths", "documents"):
        assert getattr(whole, name).tolist() == getattr(parts, name).tolist()
    monkeypatch.setattr(module, "_PART_CHARACTERS", 5)  # within sentences: no token is lost
    run(tmp_path, tokenizer_folder, texts, "tiny")
    assert IndexedReader(tmp_path / "tiny").tokens.tolist() == whole.tokens.tolist()


def test_a_megabyte_without_a_space_or_full_stop_is_one_sentence_at_once() -> None:
    run = "a" * 1_000_000  # sought for a full stop from each of its characters, hours
    assert SentenceSplitter().split(f"One. {run} It ends.") == ["One.", f"{run} It ends."]
    assert SentenceSplitter().split("b" * 600 + "。" + "c" * 600) == ["b" * 600 + "。", "c" * 600]
