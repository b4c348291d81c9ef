"""Sentences -> token ids, several times faster than one call of the tokenizer a sentence: each piece is encoded once.

BERT's tokenizer looks at nothing across a space, an ASCII punctuation mark or (where it splits them) a Chinese
character: its normalizer works character by character, its pre-tokenizer makes a word of each such mark and drops
white space, WordPiece sees one word at a time. So a sentence's ids are those of its pieces between these places, end
to end, and pieces repeat: the ids of each are kept. Any other kind of tokenizer is asked for whole sentences.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

__all__ = ["SentenceEncoder", "piece_splitter"]

_PUNCTUATION = r"!-/:-@\[-`{-~"
_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff"  # the two large blocks; what is missing here only makes longer pieces
_KEPT_CHARACTERS = 6 << 20  # of all pieces, each counted with 16 more: about 70 MB
_CODES = {2: "H", 4: "i"}  # array's codes, by bytes a token


class SentenceEncoder:
    """Gives what `tokenizer.encode(sentence, add_special_tokens=False)` gives, for many sentences.

    Nothing is truncated or padded, and the spelling of a special token in a text, such as "[MASK]", is text.

    Args:
        tokenizer: left as it is; a copy is used.
        dtype: the tokens' type, of 2 or 4 bytes.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._split = piece_splitter(tokenizer) or (lambda sentence: [sentence])
        self._ids_of = _IdsOfPieces(_for_raw_text(tokenizer), _CODES[self.dtype.itemsize])

    def encode(self, sentences: Iterable[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """The ids of all sentences end to end [T], and the length of each in tokens (0 where nothing is left)."""
        ids_of, split = self._ids_of.__getitem__, self._split
        encoded = [b"".join(map(ids_of, split(sentence))) for sentence in sentences]
        self._ids_of.forget_if_large()
        lengths = np.fromiter(map(len, encoded), np.int32, len(encoded)) // self.dtype.itemsize
        return np.frombuffer(b"".join(encoded), self.dtype), lengths


class _IdsOfPieces(dict[str, bytes]):
    """The ids of every piece seen so far, as bytes; one not seen yet is encoded when it is looked up."""

    def __init__(self, tokenizer: Tokenizer, code: str) -> None:
        self._tokenizer = tokenizer
        self._code = code
        self._characters = 0

    def __missing__(self, piece: str) -> bytes:
        ids = array(self._code, self._tokenizer.encode(piece, add_special_tokens=False).ids).tobytes()
        self[piece] = ids
        self._characters += len(piece) + 16
        return ids

    def forget_if_large(self) -> None:
        if self._characters > _KEPT_CHARACTERS:
            self.clear()
            self._characters = 0


class _Normalization(NamedTuple):
    lowercase: bool
    split_chinese: bool


def piece_splitter(tokenizer: Tokenizer) -> Callable[[str], list[str]] | None:
    """What cuts a text into the pieces that `tokenizer` treats one by one, or None where it is not BERT's.

    Pieces hold no space. For a tokenizer that lower-cases, an ASCII text's are in lower case already.
    """
    found = _bert_normalization(tokenizer)
    if found is None:
        return None
    single = _PUNCTUATION + (_CHINESE if found.split_chinese else "")
    pieces = re.compile(f"[{single}]|[^ {single}]+").findall
    if not found.lowercase:
        return pieces
    # In ASCII, Python's lower() is the tokenizer's; beyond it, it may look at neighbours (a final sigma).
    return lambda text: pieces(text.lower() if text.isascii() else text)


def _bert_normalization(tokenizer: Tokenizer) -> _Normalization | None:
    """What BERT's normalizer does here; None for another kind of tokenizer, or one with tokens that span words."""
    state = json.loads(tokenizer.to_str())
    kinds = [(state[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    if kinds != ["BertNormalizer", "BertPreTokenizer", "WordPiece"]:
        return None
    if not all(token["special"] for token in state["added_tokens"]):
        return None
    normalizer = state["normalizer"]
    return _Normalization(normalizer["lowercase"], normalizer["handle_chinese_chars"])


def _for_raw_text(tokenizer: Tokenizer) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy
