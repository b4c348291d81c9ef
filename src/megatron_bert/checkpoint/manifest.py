"""Sizes and hashes of a checkpoint's files, so that a damaged one is noticed before anything is read from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["MANIFEST", "Files", "damage", "describe", "write_manifest"]

MANIFEST = "manifest.json"

Files = dict[str, dict[str, Any]]  # size and hash by name


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, _File]


def describe(files: Iterable[Path]) -> Files:
    """What the manifest says of these files.

    Raises:
        OSError: what the file system says.
    """
    return {file.name: {"bytes": file.stat().st_size, "sha256": _hash(file)} for file in files}


def write_manifest(folder: Path, parts: Iterable[Files]) -> None:
    """Writes `manifest.json` about the files that `parts` describe; call it last.

    Raises:
        OSError: what the file system says.
    """
    files = {name: _File.model_validate(about) for part in parts for name, about in sorted(part.items())}
    (folder / MANIFEST).write_text(_Manifest(files=files).model_dump_json(indent=1), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with the first file that is not as `manifest.json` says, or None where all are.

    Files that the manifest does not know are not looked at.
    """
    try:
        manifest = _Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        for name, wanted in manifest.files.items():
            size = (folder / name).stat().st_size
            if size != wanted.bytes:
                return f"{name} has {size:,} of {wanted.bytes:,} bytes"
        with ThreadPoolExecutor() as threads:
            found = threads.map(_hash, (folder / name for name in manifest.files))
            for (name, wanted), sha256 in zip(manifest.files.items(), found, strict=True):
                if sha256 != wanted.sha256:
                    return f"{name} is not what was written: its hash differs"
    except ValidationError:
        return f"{MANIFEST} is not readable"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    return None


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
