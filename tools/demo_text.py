"""Writes the language reference that CPython ships (`pydoc_data.topics`) as plain text for the demo.

A topic is a document (a blank line between them), a paragraph is a line; underlines of headings are left out.
"""

import pydoc_data.topics
import re
import sys
from pathlib import Path


def documents() -> list[str]:
    """Every topic as lines of paragraphs, in the order of their names."""
    texts = []
    for _, topic in sorted(pydoc_data.topics.topics.items()):
        paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", topic))
        lines = (re.sub(r"\s*([*=~^-])\1{3,}\s*$", "", paragraph) for paragraph in paragraphs)
        texts.append("\n".join(line for line in lines if line))
    return texts


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("\n\n".join(documents()) + "\n", encoding="utf-8")
