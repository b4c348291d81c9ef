"""What files hold, as a short text: where it is the same, so is the data, wherever it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from megatron_bert.data.indexed import files_of

__all__ = ["GONE", "content_of", "content_of_model"]

GONE = "gone"

_WHOLE_BYTES = 256 << 20  # up to this a token file is read whole
_NUM_BLOCKS, _BLOCK_BYTES = 1024, 64 << 10  # of a larger one, evenly spaced


def content_of(prefix: Path) -> str:
    """A SHA-256 over PREFIX.idx whole (every sentence's length, every document's border), the size of PREFIX.bin, and
    its bytes: all of them up to 256 MiB, of a larger file 1024 evenly spaced blocks of 64 KiB, first and last included.

    Raises:
        OSError: what the file system says.
    """
    tokens, _, index = files_of(prefix)
    with index.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    size = tokens.stat().st_size
    digest.update(str(size).encode())
    with tokens.open("rb") as stream:
        if size <= _WHOLE_BYTES:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            _add_blocks(digest, stream, size)
    return digest.hexdigest()


def content_of_model(folder: Path) -> str:
    """A SHA-256 over the names, sizes and evenly spaced blocks of a model's configuration and weights; `GONE` where the
    folder is no longer there.

    Raises:
        OSError: what the file system says.
    """
    if not folder.is_dir():
        return GONE
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name == "config.json" or file.suffix in (".safetensors", ".bin"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                _add_blocks(digest, stream, size)
    return digest.hexdigest()


def _add_blocks(digest: hashlib._Hash, stream: BinaryIO, size: int) -> None:
    last = max(size - _BLOCK_BYTES, 0)
    for block in range(_NUM_BLOCKS if last else 1):
        stream.seek(last * block // (_NUM_BLOCKS - 1))
        digest.update(stream.read(_BLOCK_BYTES))
