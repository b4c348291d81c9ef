"""Divides documents into those to train on and those held out, by their titles.

`python tools/mini_split.py FOLDER/NAME CORPUS.jsonl.xz...` writes NAME.jsonl and NAME.held_out.jsonl. A document is
held out where the first 8 bytes of its title's SHA-256, as a big-endian number, are a multiple of 100: one in a
hundred, in every corpus the same titles.
"""

import hashlib
import json
import lzma
import os
import sys
from contextlib import ExitStack
from pathlib import Path

ONE_IN = 100


def is_held_out(title: str) -> bool:
    """Whether a document of this title is for measuring only."""
    return int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") % ONE_IN == 0


def main() -> None:
    """Reads the corpora in the order given; nothing half-written keeps its name."""
    target, *corpora = map(Path, sys.argv[1:])
    names = [target.with_name(f"{target.name}.jsonl"), target.with_name(f"{target.name}.held_out.jsonl")]
    aside = [name.with_name(f".{name.name}.partial") for name in names]
    counts = [0, 0]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in aside]
        for corpus in corpora:
            with lzma.open(corpus) as lines:
                for line in lines:
                    part = int(is_held_out(json.loads(line)["title"]))
                    files[part].write(line)
                    counts[part] += 1
    for name, path, count in zip(names, aside, counts, strict=True):
        os.replace(path, name)
        print(f"{name}: {count:,} documents, {name.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
