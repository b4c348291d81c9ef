"""Sentence borders, by sentencex (Wikimedia's rules for some 300 languages, Chinese among them; MIT)."""

from __future__ import annotations

import re

import sentencex  # type: ignore[import-untyped]

from megatron_bert.errors import UserError

__all__ = ["SentenceSplitter"]

_LONG_RUN = 1024  # characters without white space
# Or the whole run: one without such a mark would be searched again from each of its characters.
_PART_OF_RUN = re.compile(r"(\S{512,}?[。！？｡.!?]+[」』”’）》)\]]*)|\S+")


class SentenceSplitter:
    """Splits documents into sentences.

    Args:
        language: an ISO 639 code, such as "en" or "zh"; for a language without rules of its own, sentencex falls
            back to a related one or to general rules.
        wrapped_lines: a line break inside a document is a space, as in text wrapped at 80 columns; otherwise it ends
            a sentence, as it ends a heading, a verse or a paragraph.

    Raises:
        UserError: `language` is not such a code.
    """

    def __init__(self, language: str = "en", *, wrapped_lines: bool = False) -> None:
        if not re.fullmatch(r"[a-z]{2,3}(-[a-z0-9]+)*", language):
            raise UserError(f"--language {language!r} is not a language code such as en, zh or sv")
        self.language = language
        self.wrapped_lines = wrapped_lines

    def split(self, text: str) -> list[str]:
        """The sentences of `text` in order, without the white space around them; none for blank text."""
        if self.wrapped_lines:
            text = text.replace("\n", " ")
        if max(map(len, text.split()), default=0) > _LONG_RUN:
            # sentencex takes time in the square of such a run: 20 s for a Chinese novel's page-long line.
            text = _PART_OF_RUN.sub(lambda part: f"{part[1]}\n" if part[1] else part[0], text)
        pieces = (line for sentence in sentencex.segment(self.language, text) for line in sentence.splitlines())
        return [stripped for piece in pieces if (stripped := piece.strip())]
