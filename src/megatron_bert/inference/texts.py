"""Texts with masks, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MaskedText"]


@dataclass(frozen=True)
class MaskedText:
    """A text's token numbers, and which of them are masks."""

    ids: list[int]
    mask_positions: list[int]
