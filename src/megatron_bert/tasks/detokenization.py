"""WikiText's tokens -> plain text, and back: two tokens are joined only where the split below gives them again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["Detokenizer", "num_original_tokens"]

_INFIXES = {"@-@": "-", "@,@": ",", "@.@": "."}  # WikiText's spelling of a mark within a word or number
_OPENING = ("(", "[", "$", "£")
_CLOSING = ("...", ".", ",", ":", ";", "!", "?", ")", "]", "%", "n't", "'s", "'re", "'ve", "'ll", "'d", "'m")
_QUOTE = '"'
_INFIX_IN_WORD = re.compile(r"(?<=\d)([.,])(?=\d)|(?<=\w)(-)(?=\w)")


def num_original_tokens(text: str) -> int:
    """T_o of a tokenised file: what single spaces part, line ends included (245,566 for WikiText103's test file)."""
    return len(text.strip().split(" "))


class Detokenizer:
    """Joins the tokens of a text to plain words, invertibly.

    Attributes:
        kept: the text's tokens that the rules would split ("Mr.", "U.S."); with them `tokenize` is exact.
    """

    def __init__(self, text: str) -> None:
        self.kept: frozenset[str] = frozenset()
        self.kept = frozenset(token for token in set(text.split()) if self._split(token) != [token])

    def detokenize(self, text: str) -> str:
        """The plain text, line by line."""
        return "\n".join(" ".join(self._words(line.split())) for line in text.split("\n"))

    def tokenize(self, text: str) -> str:
        """The tokens of a plain text that `detokenize` gave, parted by single spaces."""
        return "\n".join(" ".join(self._tokens(line.split())) for line in text.split("\n"))

    def _tokens(self, words: Iterable[str]) -> list[str]:
        return [token for word in words for token in self._split(word)]

    def _words(self, tokens: Sequence[str]) -> list[str]:
        words: list[str] = []
        for group in _groups(tokens):
            joined = "".join(_INFIXES.get(token, token) for token in group)
            words += [joined] if self._split(joined) == group else group
        return words

    def _split(self, word: str) -> list[str]:
        """The tokens of a word without spaces."""
        if word in self.kept or word in _INFIXES:
            return [word]
        if len(word) > 1 and word.startswith((*_OPENING, _QUOTE)):
            return [word[0], *self._split(word[1:])]
        for mark in (*_CLOSING, _QUOTE):
            if word.endswith(mark) and len(word) > len(mark):
                return [*self._split(word[: -len(mark)]), mark]
        parted = _INFIX_IN_WORD.sub(lambda found: f" @{found[0]}@ ", word)
        return parted.split()


def _groups(tokens: Sequence[str]) -> list[list[str]]:
    """The tokens of a line that stand together without spaces in plain text."""
    groups: list[list[str]] = []
    attach, quoted = False, False
    for token in tokens:
        closing = token in _CLOSING or token in _INFIXES or (token == _QUOTE and quoted)
        if groups and (attach or closing):
            groups[-1].append(token)
        else:
            groups.append([token])
        attach = token in _OPENING or token in _INFIXES or (token == _QUOTE and not quoted)
        quoted ^= token == _QUOTE
    return groups
