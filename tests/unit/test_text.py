"""Documents out of files, sentences out of documents."""

import gzip
import json
import lzma
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_bert.data import reading
from megatron_bert.data.reading import Span, read_blocks, span_border
from megatron_bert.data.sentences import SentenceSplitter
from megatron_bert.data.text import expand_inputs, parse_block, read_texts
from megatron_bert.errors import UserError


def zstd(raw: bytes) -> bytes:
    """Two frames, as a parallel compressor writes them."""
    compressor = zstandard.ZstdCompressor()
    return compressor.compress(raw[: len(raw) // 2]) + compressor.compress(raw[len(raw) // 2 :])


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd
}  # fmt: skip


def texts(file: Path, key: str = "text", **options: bool) -> list[str]:
    return [text for text, _ in read_texts([file], key, **options)]


def documents(spans: list[Span], key: str = "text") -> list[str]:
    """The documents of the spans, those that go over several blocks put together."""
    found: list[str] = []
    inside = False
    for span in spans:
        for block in read_blocks(span, key):
            parsed = parse_block(block, key)
            for at, text in enumerate(parsed.texts):
                if at == 0 and inside and parsed.begins_inside:
                    found[-1] += text
                else:
                    found.append(text)
            inside = parsed.ends_inside
    return found


def test_plain_text_has_a_blank_line_between_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n\r\n  \t\n\nthree\n\u3000\nfour".encode())
    assert texts(tmp_path / "a.txt") == ["one\r\ntwo", "three", "four"]


def test_json_lines_have_a_document_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\n\\ntwo", "id": 1}\n\n{"text": ""}\n{"text": null}\n{"text": "\\ud83d!"}')
    assert texts(file) == ["one\n\ntwo", "", "\ufffd!"]
    file.write_text('{"body": "x"}\n')
    assert texts(file, "body") == ["x"]


def test_parquet_has_a_document_a_row(tmp_path: Path) -> None:
    rows = ["one\n\ntwo", None, "", *(f"document {number}" for number in range(100))]
    for name, kind in (("a", pa.string()), ("b", pa.large_string()), ("c", pa.dictionary(pa.int32(), pa.string()))):
        table = pa.table({"id": range(len(rows)), "body": pa.array(rows, pa.string()).cast(kind)})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=40)
        assert texts(tmp_path / f"{name}.parquet", "body") == [row for row in rows if row is not None]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"Parquet needs pyarrow; pip install 'megatron-bert\[parquet\]'"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", list(COMPRESSIONS))
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("block_bytes", [7, 64, 1 << 20])
def test_every_document_arrives_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kind: str, block_bytes: int
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", block_bytes)
    draw = random.Random(f"{kind}{block_bytes}")
    words = ["a", "wörd", "中文", "x" * 90, "\n", "\r\n", " \n", "end."]
    wanted = ["".join(draw.choices(words, k=draw.randint(1, 40))) for _ in range(60)]
    if kind == "txt":
        wanted = [part for text in wanted for part in _documents_of("".join(text.splitlines(keepends=True)))]
        raw = "".join(text + draw.choice(["\n\n", "\n \n", "\r\n\r\n\r\n", "\n\n\n\n"]) for text in wanted)
        wanted = _documents_of(raw)
    else:
        raw = "".join(json.dumps({"text": text}, ensure_ascii=draw.random() < 0.5) + "\n" for text in wanted)
    file = tmp_path / f"a.{kind}{suffix}"
    file.write_bytes(COMPRESSIONS[suffix](raw.encode()))
    found = documents([Span(file)])
    if kind == "txt":
        found, wanted = (["".join(text.split()) for text in side] for side in (found, wanted))
    assert found == wanted


def _documents_of(raw: str) -> list[str]:
    """Line by line: what a blank line ends."""
    found: list[list[str]] = [[]]
    for line in raw.split("\n"):
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_the_parts_of_a_file_are_the_file(tmp_path: Path, kind: str) -> None:
    raw = "ab\n\ncd\nef\r\n\r\ng\n\n\n\nh\n" if kind == "txt" else '{"text": "a"}\n{"text": "b"}\n\n{"text": "c"}'
    file = tmp_path / f"a.{kind}"
    file.write_bytes(raw.encode())
    whole = documents([Span(file)])
    for one in range(len(raw) + 1):
        for two in range(one, len(raw) + 1):
            borders = [0, span_border(file, one), span_border(file, two), len(raw)]
            spans = [Span(file, *pair) for pair in zip(borders, borders[1:], strict=False)]
            assert documents(spans) == whole


def test_a_document_of_any_length_in_bounded_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 1000)
    long = "\n".join("a line of the document." for _ in range(1000)) + "\n" + "word " * 1000 + "中" * 2000
    (tmp_path / "a.txt").write_text(f"first\n\n{long}\n\nlast", encoding="utf-8")
    blocks = list(read_blocks(Span(tmp_path / "a.txt"), "text"))
    assert max(len(block.content) for block in blocks) <= 1000
    found = ["".join(text.split()) for text in documents([Span(tmp_path / "a.txt")])]
    assert found == ["first", "".join(long.split()), "last"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": }\n', r"a\.jsonl line 2 is not JSON: Expecting value at character 10"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"line 2: a JSON object is wanted, not list"),
        ("a.jsonl", b'{"body": "x", "id": 3}\n', r"line 1: there is no key 'text' \(its keys: 'body', 'id'\)"),
        ("a.jsonl", b'{"text": 5}\n', r"line 1: the value of 'text' is not a text but int"),
        ("a.jsonl", b"\n" + b"[" * 100_000, r"line 2 is not JSON that can be read"),
        ("a.jsonl", b"\n" + b"1" * 10_000, r"line 2 is not JSON that can be read"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\xff"}',
            r"a\.jsonl line 2 is not UTF-8 \(byte 11 of the line is 0xff\)",
        ),
        ("a.txt", b"fine\nbad \xff\n", r"a\.txt line 2 is not UTF-8 \(byte 5 of the line is 0xff\)"),
        ("a.txt.gz", gzip.compress(b"line\n" * 50_000, mtime=0)[:-40], r"a\.txt\.gz is damaged or incomplete"),
        ("a.txt.gz", b"not gzip", "is damaged or incomplete after line 0"),
        ("a.txt.gz", gzip.compress(b"x" * 100, mtime=0)[:12] + b"\xff" * 20, "is damaged or incomplete"),
        ("a.txt.xz", lzma.compress(b"line\n" * 50_000)[:-40], r"a\.txt\.xz is damaged or incomplete"),
        ("a.txt.xz", b"not xz", "is damaged or incomplete"),
        ("a.txt.zst", zstd(b"line\n" * 50_000)[:-4], r"a\.txt\.zst is damaged or incomplete"),
        ("a.txt.zst", b"not zstd", "is damaged or incomplete after line 0"),
        ("a.parquet", b"PAR1 half of a file", r"a\.parquet is damaged or incomplete after row 0"),
    ],
)
def test_bad_input_is_named_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / name)


def test_bad_columns_of_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"there is no column 'text' \(its columns: 'id', 'body'\)"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'id' does not hold texts but int64"):
        texts(tmp_path / "a.parquet", "id")


def test_a_damaged_page_of_parquet(tmp_path: Path) -> None:
    rows = [str(random.Random(number).random()) * 20 for number in range(500)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", compression="gzip", use_dictionary=False)
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    raw[len(raw) // 3 : len(raw) // 2] = bytes(len(raw) // 2 - len(raw) // 3)
    (tmp_path / "a.parquet").write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.parquet is damaged or incomplete after row"):
        texts(tmp_path / "a.parquet")


def test_bad_documents_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    lines = [b'{"text": "one"}', b"{", b"[]", b'{"t": 1}', b'{"text": 1}', b'{"text": "\xff"}', b'{"text": "two"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (block,) = read_blocks(Span(tmp_path / "a.jsonl"), "text")
    parsed = parse_block(block, skip_bad=True)
    assert parsed.texts == ["one", "two"]
    assert parsed.dropped == {
        "not JSON": 1, "not a JSON object": 1, "without 'text'": 1, "'text' not a text": 1, "not UTF-8": 1
    }  # fmt: skip
    (tmp_path / "a.txt").write_bytes(b"one\n\nt\xe9o\n\nthree")
    assert texts(tmp_path / "a.txt", skip_bad=True) == ["one", "three"]


def test_a_line_too_long_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(reading, "_LONGEST_JSON_LINE_BYTES", 1 << 20)
    lines = [json.dumps({"text": text}) for text in ("one", "x" * 1_000_000, "x" * 2_000_000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "bad"]))
    with pytest.raises(UserError, match=r"a\.jsonl line 3: the line is longer than 1 MiB"):
        texts(tmp_path / "a.jsonl")
    blocks = list(read_blocks(Span(tmp_path / "a.jsonl"), "text"))
    assert sum(parse_block(block, skip_bad=True).dropped["too long a line"] for block in blocks) == 1
    with pytest.raises(UserError, match="line 4 is not JSON"):
        parse_block(blocks[-1])


def test_the_line_of_an_error_in_a_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 9 + "bad\n")
    (block,) = read_blocks(Span(tmp_path / "a.jsonl", span_border(tmp_path / "a.jsonl", 60)), "text")
    with pytest.raises(UserError, match="line 10 is not JSON"):
        parse_block(block)


def test_inputs_may_be_globs(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "c.jsonl", "odd[1].txt", "deep/er/d.jsonl"):
        (tmp_path / name).touch()
    found = expand_inputs([f"{tmp_path}/c.jsonl", f"{tmp_path}/?.txt", f"{tmp_path}/odd[1].txt"])
    assert [path.name for path in found] == ["c.jsonl", "a.txt", "b.txt", "odd[1].txt"]
    assert [path.name for path in expand_inputs([f"{tmp_path}/**/*.jsonl"])] == ["c.jsonl", "d.jsonl"]


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\*: there is no such file"):
        expand_inputs([f"{tmp_path}/nothing*"])
    for name in ("a.jsonl.zst", "b.jsonl.zst", "README"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"is a folder; name its files, for example '.*/\*\.jsonl\.zst'"):
        expand_inputs([str(tmp_path)])
    with pytest.raises(UserError, match=r"names .*README 2 times"):
        expand_inputs([f"{tmp_path}/*", f"{tmp_path}/README"])


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


def test_a_chinese_line_as_long_as_a_book() -> None:
    sentence = "赫斯特指数以英国水文学家命名。"
    begun = time.process_time()
    assert SentenceSplitter("zh").split(sentence * 20_000) == [sentence] * 20_000
    assert time.process_time() - begun < 15  # the library alone takes a minute for it, and the square of the length


def test_wrapped_lines() -> None:
    text = "A sentence that is\nwrapped. Another\none."
    assert SentenceSplitter("en", wrapped_lines=True).split(text) == ["A sentence that is wrapped.", "Another one."]


@pytest.mark.parametrize("text", ["", " \n\t\n ", "\u2028"])
def test_blank_text_has_no_sentences(text: str) -> None:
    assert SentenceSplitter().split(text) == []


def test_language_is_a_code() -> None:
    with pytest.raises(UserError, match="'English' is not a language code"):
        SentenceSplitter("English")
