"""Text files -> a token file: documents, sentences, tokens, and a closing report of what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_bert.data.files import refuse_to_overwrite
from megatron_bert.data.indexed import IndexedWriter, Provenance, files_of, token_type
from megatron_bert.data.sentences import SentenceSplitter
from megatron_bert.data.text import Document, read_documents
from megatron_bert.data.vocabulary import fingerprint
from megatron_bert.errors import UserError

__all__ = ["EncodedDocuments", "Report", "encode_documents", "preprocess"]

_BATCH_CHARACTERS = 1 << 20  # of documents that are tokenized together: enough to keep every core busy


class EncodedDocuments(NamedTuple):
    """Documents as the token file holds them; one with no token left has 0 sentences and is dropped by the writer.

    tokens: int32 [T] end to end; lengths: int32 [S] of each sentence; sentences: int64 [D] of each document.
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    sentences: npt.NDArray[np.int64]


@dataclass
class Report:
    """What became of the input. `dropped` counts documents by reason."""

    documents: int = 0
    sentences: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    one_sentence_documents: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def unknown_share(self) -> float:
        """Unknown tokens over all tokens."""
        return self.unknown_tokens / max(self.tokens, 1)

    def as_dict(self) -> dict[str, Any]:
        """The counts and the unknown share, ready for JSON."""
        return {**asdict(self), "unknown_share": self.unknown_share}

    def lines(self) -> list[str]:
        """The report for a person."""
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "none"
        return [
            f"documents  {self.documents:,} (of one sentence: {self.one_sentence_documents:,}; dropped: {dropped})",
            f"sentences  {self.sentences:,}",
            f"tokens     {self.tokens:,}",
            f"unknown    {self.unknown_tokens:,} tokens, {100 * self.unknown_share:.3f} %",
        ]


def preprocess(
    files: Iterable[Path],
    tokenizer: Tokenizer,
    tokenizer_name: str,
    prefix: Path,
    *,
    splitter: SentenceSplitter,
    json_key: str = "text",
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Writes the token file `prefix` (.bin, .json, .idx) from the documents of `files`; memory does not grow with them.

    Raises:
        UserError: the output exists, an input is bad (see `read_documents`), or nothing is left to write.
        OSError: what the file system says. In every case nothing that looks finished is left behind.
    """
    refuse_to_overwrite(list(files_of(prefix)), overwrite=overwrite)
    tokenizer = _for_raw_text(tokenizer)
    unknown = tokenizer.token_to_id("[UNK]")
    size = tokenizer.get_vocab_size()
    report = Report()
    bar = tqdm(unit=" documents", unit_scale=True, disable=None if progress else True, delay=2)
    with bar, IndexedWriter(prefix, token_type(size)) as writer:
        for batch in _batches(document for file in files for document in read_documents(file, json_key)):
            encoded = encode_documents(batch, tokenizer, splitter)
            _count(report, encoded, unknown)
            writer.add(encoded.tokens, encoded.lengths, encoded.sentences[encoded.sentences > 0].tolist())
            bar.update(len(batch))
            bar.set_postfix_str(f"{report.tokens:,} tokens")
        if not report.tokens:
            raise UserError("the input holds no text: " + (_dropped_all(report) or "every file is empty"))
        writer.finish(
            Provenance(
                fingerprint=fingerprint(tokenizer),
                vocabulary_size=size,
                tokenizer=tokenizer_name,
                documents=report.documents,
                sentences=report.sentences,
                tokens=report.tokens,
            )
        )
    return report


def encode_documents(documents: list[Document], tokenizer: Tokenizer, splitter: SentenceSplitter) -> EncodedDocuments:
    """The documents split into sentences and tokenized in one batch, without special tokens, nothing truncated.

    A sentence without any token (control characters only) vanishes. It depends on nothing but its arguments, so any
    worker may do any batch.
    """
    sentences = [splitter.split(document.text) for document in documents]
    flat = [sentence for of_document in sentences for sentence in of_document]
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(flat, add_special_tokens=False)]
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    tokens = np.fromiter((token for of_sentence in ids for token in of_sentence), np.int32, int(lengths.sum()))
    ends = np.cumsum([len(of_document) for of_document in sentences], dtype=np.int64)
    filled = np.concatenate([[0], np.cumsum(lengths > 0)])
    return EncodedDocuments(tokens, lengths[lengths > 0], np.diff(filled[ends], prepend=0))


def _for_raw_text(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that never cuts or pads, and for which a "[MASK]" that somebody wrote is text and not the mask."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    held: list[Document] = []
    characters = 0
    for document in documents:
        held.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield held
            held, characters = [], 0
    if held:
        yield held


def _count(report: Report, encoded: EncodedDocuments, unknown: int | None) -> None:
    empty = int((encoded.sentences == 0).sum())
    if empty:
        report.dropped["empty"] = report.dropped.get("empty", 0) + empty
    report.documents += len(encoded.sentences) - empty
    report.one_sentence_documents += int((encoded.sentences == 1).sum())
    report.sentences += len(encoded.lengths)
    report.tokens += len(encoded.tokens)
    report.unknown_tokens += int((encoded.tokens == unknown).sum()) if unknown is not None else 0


def _dropped_all(report: Report) -> str:
    return ", ".join(f"{count:,} documents are {reason}" for reason, count in report.dropped.items())
