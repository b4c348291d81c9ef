"""Texts in chunks: numbering, decoding, and lines that arrive in pieces."""

import io
import os

import pytest

from megatron_bert.errors import UserError
from megatron_bert.inference import lines
from megatron_bert.inference.lines import texts_of_arguments, texts_of_file, texts_of_stream

CONTENT = "\ufeffone\r\n\n  \ntwo 植\nthree".encode()
EXPECTED = [("one", "f, line 1"), ("two 植", "f, line 4"), ("three", "f, line 5")]


class Trickle(io.BytesIO):
    """Gives `num_bytes` at a time, as a slow pipe does."""

    def __init__(self, content: bytes, num_bytes: int) -> None:
        super().__init__(content)
        self.num_bytes = num_bytes

    def read1(self, size: int = -1) -> bytes:
        return super().read1(min(size, self.num_bytes))


@pytest.mark.parametrize("num_bytes", [1, 2, 5, 7, 1000])
def test_a_stream_may_be_cut_anywhere(num_bytes):
    chunks = list(texts_of_stream(Trickle(CONTENT, num_bytes), "f"))
    assert [tuple(text) for chunk in chunks for text in chunk] == EXPECTED
    assert all(chunks)


@pytest.mark.parametrize("chunk_texts", [1, 2, 1024])
def test_a_file_is_read_in_chunks(monkeypatch, chunk_texts):
    monkeypatch.setattr(lines, "CHUNK_TEXTS", chunk_texts)
    chunks = list(texts_of_file(io.BytesIO(CONTENT), "f"))
    assert [tuple(text) for chunk in chunks for text in chunk] == EXPECTED
    assert max(map(len, chunks)) <= chunk_texts


@pytest.mark.parametrize("content", [b"", b"\n", b"  \r\n\t\n", "\ufeff".encode()])
@pytest.mark.parametrize("read", [texts_of_file, texts_of_stream])
def test_no_text_at_all(read, content):
    with pytest.raises(UserError, match=r"^f is empty: one text a line is expected$"):
        list(read(io.BytesIO(content), "f"))


@pytest.mark.parametrize("read", [texts_of_file, texts_of_stream])
def test_a_byte_that_is_not_utf8_is_named(read):
    with pytest.raises(UserError, match=r"^f, line 2, byte 3: not UTF-8 \(0xff\)$"):
        list(read(io.BytesIO(b"one\nab\xffc\n"), "f"))


def test_arguments_are_numbered_and_must_be_utf8():
    assert [tuple(text) for text in texts_of_arguments(["a", "b"])] == [("a", "text 1"), ("b", "text 2")]
    with pytest.raises(UserError, match=r"^text 2, character 2: not UTF-8$"):
        texts_of_arguments(["fine", os.fsdecode(b"a\xff")])
