"""Documents out of files, sentences out of documents."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from megatron_bert.data.sentences import SentenceSplitter
from megatron_bert.data.text import Document, expand_inputs, read_documents
from megatron_bert.errors import UserError


def test_plain_text_has_a_blank_line_between_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\ntwo\r\n\r\n  \t\n\nthree\n".encode())
    assert list(read_documents(file)) == [Document("one\ntwo", file, 1), Document("three", file, 6)]


def test_json_lines_have_a_document_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\n\\ntwo", "id": 1}\n\n{"text": ""}\n', encoding="utf-8")
    assert list(read_documents(file)) == [Document("one\n\ntwo", file, 1), Document("", file, 3)]
    assert [document.text for document in read_documents(write(file, [{"body": "x"}]), "body")] == ["x"]


def write(file: Path, records: list[object]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compressed_files(tmp_path: Path, suffix: str, compress: object, kind: str) -> None:
    plain = tmp_path / f"a.{kind}"
    plain.write_text("one\n\ntwo\n" if kind == "txt" else '{"text": "one"}\n{"text": "two"}\n')
    packed = tmp_path / f"b.{kind}.{suffix}"
    packed.write_bytes(compress(plain.read_bytes()))  # type: ignore[operator]
    assert [document.text for document in read_documents(packed)] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": }\n', r"a\.jsonl line 2 is not JSON: Expecting value at character 10"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"line 2: a JSON object is wanted, not list"),
        ("a.jsonl", b'{"body": "x", "id": 3}\n', r"line 1: there is no key 'text' \(its keys: 'body', 'id'\)"),
        ("a.jsonl", b'{"text": 5}\n', r"line 1: the value of 'text' is not a text but int"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: the value of 'text' is not a text but NoneType"),
        ("a.txt", b"fine\nbad \xff\n", r"a\.txt line 2 is not UTF-8 \(byte 5 of the line is 0xff\)"),
        ("a.txt.gz", gzip.compress(b"line\n" * 50_000, mtime=0)[:-40], r"a\.txt\.gz is damaged or incomplete"),
        ("a.txt.gz", b"not gzip", "is damaged or incomplete after line 0"),
        ("a.txt.gz", gzip.compress(b"x" * 100, mtime=0)[:12] + b"\xff" * 20, "is damaged or incomplete"),
        ("a.txt.xz", lzma.compress(b"line\n" * 50_000)[:-40], r"a\.txt\.xz is damaged or incomplete"),
        ("a.txt.xz", b"not xz", "is damaged or incomplete"),
    ],
)
def test_bad_input_is_named_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_documents(tmp_path / name))


def test_inputs_may_be_globs(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl", "odd[1].txt"):
        (tmp_path / name).touch()
    found = expand_inputs([f"{tmp_path}/c.jsonl", f"{tmp_path}/?.txt", f"{tmp_path}/odd[1].txt"])
    assert [path.name for path in found] == ["c.jsonl", "a.txt", "b.txt", "odd[1].txt"]


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\*: there is no such file"):
        expand_inputs([f"{tmp_path}/nothing*"])
    with pytest.raises(UserError, match="is a folder; name its files"):
        expand_inputs([str(tmp_path)])


def test_english_sentences() -> None:
    text = 'Dr. Smith went, e.g., to Paris. He said "Hi. There." Yes!\nA heading\nThe text.'
    assert SentenceSplitter("en").split(text) == [
        "Dr. Smith went, e.g., to Paris.", 'He said "Hi. There."', "Yes!", "A heading", "The text.",
    ]  # fmt: skip


def test_chinese_sentences() -> None:
    text = "赫斯特指数以英国水文学家命名。“真的吗？”他问！\n应用\n时域法。"
    assert "".join(SentenceSplitter("zh").split(text)) == text.replace("\n", "")
    assert SentenceSplitter("zh").split(text)[-2:] == ["应用", "时域法。"]
    assert SentenceSplitter("zh").split(text)[0] == "赫斯特指数以英国水文学家命名。"


def test_wrapped_lines() -> None:
    text = "A sentence that is\nwrapped. Another\none."
    assert SentenceSplitter("en", wrapped_lines=True).split(text) == ["A sentence that is wrapped.", "Another one."]


@pytest.mark.parametrize("text", ["", " \n\t\n ", "\u2028"])
def test_blank_text_has_no_sentences(text: str) -> None:
    assert SentenceSplitter().split(text) == []


def test_language_is_a_code() -> None:
    with pytest.raises(UserError, match="'English' is not a language code"):
        SentenceSplitter("English")
