"""The model in the box: `mini`, small, English and Chinese; its card is README.md beside its weights."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["MINI", "NAME", "resolved"]

NAME = "mini"
MINI = str(Path(__file__).with_name(NAME))
"""Its folder, for `from_pretrained`."""


def resolved(path_or_name: str | os.PathLike[str]) -> str:
    """The folder of the model in the box where its name is meant: `mini`, and no folder of that name is here."""
    name = os.fspath(path_or_name)
    return MINI if name == NAME and not os.path.exists(name) else name
