"""Text files -> a token file: documents, sentences, tokens, and a closing report of what became of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from megatron_bert.data.encoding import SentenceEncoder
from megatron_bert.data.files import refuse_to_overwrite, refuse_to_replace
from megatron_bert.data.indexed import IndexedWriter, Provenance, files_of, token_type
from megatron_bert.data.progress import InputProgress
from megatron_bert.data.reading import Block, read_blocks
from megatron_bert.data.sentences import SentenceSplitter
from megatron_bert.data.shards import WHOLE, Shard
from megatron_bert.data.text import parse_block
from megatron_bert.data.vocabulary import fingerprint
from megatron_bert.data.workers import ordered_map
from megatron_bert.errors import UserError

__all__ = ["BlockEncoder", "EncodedBlock", "Report", "preprocess"]


_PART_CHARACTERS = 1 << 20  # of a text that are split and tokenized at a time


class EncodedBlock(NamedTuple):
    """A block's documents as the token file holds them.

    tokens: [T] end to end; lengths: int32 [S] of each sentence; sentences: int64 [D] of each document, 0 for one
    without a token; begins_inside, ends_inside: see `Documents`; dropped: documents left out, by reason;
    consumed_bytes: see `Block`.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    sentences: npt.NDArray[np.int64]
    begins_inside: bool
    ends_inside: bool
    dropped: Counter[str]
    file: Path
    consumed_bytes: int


class BlockEncoder:
    """Parses, splits into sentences and tokenizes a block. It depends on nothing but its arguments, so that any
    worker may do any block.
    """

    def __init__(
        self, tokenizer: Tokenizer, splitter: SentenceSplitter, json_key: str = "text", *, skip_bad: bool = False
    ) -> None:
        self._encoder = SentenceEncoder(tokenizer, token_type(tokenizer.get_vocab_size()))
        self._splitter = splitter
        self._json_key = json_key
        self._skip_bad = skip_bad

    def __call__(self, block: Block) -> EncodedBlock:
        """The documents of `block`, without special tokens, nothing truncated. A sentence without any token (control
        characters only) vanishes.

        Raises:
            UserError: see `parse_block`.
        """
        documents = parse_block(block, self._json_key, skip_bad=self._skip_bad)
        tokens, lengths, sentences = self._encode(documents.texts)
        ends = np.cumsum(sentences, dtype=np.int64)
        filled = np.concatenate([[0], np.cumsum(lengths > 0)])
        return EncodedBlock(
            tokens, lengths[lengths > 0], np.diff(filled[ends], prepend=0), documents.begins_inside,
            documents.ends_inside, documents.dropped, block.file, block.consumed_bytes,
        )  # fmt: skip

    def _encode(self, texts: list[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], list[int]]:
        """The tokens end to end, the length of each sentence, the sentences of each text. What lies between text and
        tokens takes many times the text's memory, so of a long one it is held for a part at a time.
        """
        encoded, held, characters = [self._encoder.encode([])], [], 0
        sentences = []
        for text in texts:
            sentences.append(0)
            for part in _parts(text):
                found = self._splitter.split(part)
                held += found
                sentences[-1] += len(found)
                characters += len(part)
                if characters >= _PART_CHARACTERS:
                    encoded.append(self._encoder.encode(held))
                    held, characters = [], 0
        encoded.append(self._encoder.encode(held))
        tokens, lengths = zip(*encoded, strict=True)
        return np.concatenate(tokens), np.concatenate(lengths), sentences


def _parts(text: str) -> Iterator[str]:
    """A text in parts of bounded length, cut at line breaks, or at spaces where a line is longer than a part."""
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        stop = start + _PART_CHARACTERS
        end = next((at + 1 for mark in "\n " if (at := text.rfind(mark, start, stop)) >= 0), stop)
        yield text[start:end]
        start = end
    yield text[start:]


@dataclass
class Report:
    """What became of the input. `dropped` counts documents by reason."""

    documents: int = 0
    sentences: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    one_sentence_documents: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def unknown_share(self) -> float:
        """Unknown tokens over all tokens."""
        return self.unknown_tokens / max(self.tokens, 1)

    def as_dict(self) -> dict[str, Any]:
        """The counts and the unknown share, ready for JSON."""
        return {**vars(self), "dropped": dict(+self.dropped), "unknown_share": self.unknown_share}

    def lines(self) -> list[str]:
        """The report for a person."""
        return [
            f"documents  {self.documents:,} (of one sentence: {self.one_sentence_documents:,}; "
            f"dropped: {self.dropped_line() or 'none'})",
            f"sentences  {self.sentences:,}",
            f"tokens     {self.tokens:,}",
            f"unknown    {self.unknown_tokens:,} tokens, {100 * self.unknown_share:.3f} %",
        ]

    def dropped_line(self) -> str:
        """`3 empty, 1 null`, or nothing."""
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted((+self.dropped).items()))


def preprocess(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    tokenizer_name: str,
    prefix: Path,
    *,
    splitter: SentenceSplitter,
    json_key: str = "text",
    num_workers: int = 0,
    shard: Shard = WHOLE,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Writes the token file `prefix` (.bin, .json, .idx) from the documents of `files`; memory does not grow with them.

    Args:
        num_workers: processes that parse and tokenize; 0 does it in this one. The output is the same.
        shard: which part of the input; an empty part makes an empty token file.
        skip_bad: bad documents are dropped and counted, see `parse_block`.

    Raises:
        UserError: the output exists, is an input or is being written, an input is bad (see `read_blocks`,
            `parse_block`), or nothing is left to write.
        OSError: what the file system says. In every case nothing that looks finished is left behind.
    """
    refuse_to_replace(files, files_of(prefix))
    refuse_to_overwrite(list(files_of(prefix)), overwrite=overwrite)
    size = tokenizer.get_vocab_size()
    spans = shard.spans(files)
    report = Report()
    blocks = (block for span in spans for block in read_blocks(span, json_key))
    encoder = partial(BlockEncoder, tokenizer, splitter, json_key, skip_bad=skip_bad)
    with (
        IndexedWriter(prefix, token_type(size)) as writer,
        InputProgress(spans, show=progress) as shown,
        closing(ordered_map(encoder, blocks, num_workers)) as encoded_blocks,
    ):
        joiner = _Joiner(writer, report, _unknown_id(tokenizer))
        for encoded in encoded_blocks:
            joiner.add(encoded)
            shown.update(
                encoded.file, encoded.consumed_bytes, documents=len(encoded.sentences), tokens=len(encoded.tokens)
            )
        joiner.end()
        if not report.tokens and shard == WHOLE:
            dropped = report.dropped_line()
            why = f"all documents were dropped ({dropped})" if dropped else "every file is empty"
            raise UserError(f"the input holds no text: {why}")
        writer.finish(
            Provenance(
                fingerprint=fingerprint(tokenizer),
                vocabulary_size=size,
                tokenizer=tokenizer_name,
                documents=report.documents,
                sentences=report.sentences,
                tokens=report.tokens,
                shard=None if shard == WHOLE else str(shard),
            )
        )
    return report


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """What stands for a word that the vocabulary does not have; None where there is no such token."""
    model = json.loads(tokenizer.to_str())["model"]
    if "unk_id" in model:  # Unigram
        return cast("int | None", model["unk_id"])
    token = model.get("unk_token")
    return None if token is None else tokenizer.token_to_id(token)


class _Joiner:
    """Writes blocks, joins documents that span several, and counts."""

    def __init__(self, writer: IndexedWriter, report: Report, unknown: int | None) -> None:
        self._writer = writer
        self._report = report
        self._unknown = unknown
        self._open: int | None = None  # sentences so far of the document that goes on in the next block

    def add(self, encoded: EncodedBlock) -> None:
        report = self._report
        sentences = encoded.sentences.tolist()
        if self._open is not None:
            if encoded.begins_inside:
                sentences[0] += self._open
            else:
                sentences.insert(0, self._open)
        self._open = sentences.pop() if encoded.ends_inside else None
        self._writer.add_sentences(encoded.tokens, encoded.lengths)
        self._end_documents(sentences)
        report.sentences += len(encoded.lengths)
        report.tokens += len(encoded.tokens)
        report.dropped += encoded.dropped
        if self._unknown is not None:
            report.unknown_tokens += int(np.count_nonzero(encoded.tokens == self._unknown))

    def end(self) -> None:
        """Ends the document that no block went on with."""
        if self._open is not None:
            self._end_documents([self._open])

    def _end_documents(self, sentences: list[int]) -> None:
        kept = [number for number in sentences if number]
        self._writer.end_documents(kept)
        self._report.documents += len(kept)
        self._report.one_sentence_documents += kept.count(1)
        self._report.dropped += Counter(empty=len(sentences) - len(kept))
