"""Output that is whole or absent: written aside in the same folder, then renamed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_bert.errors import UserError

__all__ = ["refuse_to_overwrite", "refuse_to_replace", "sync", "written_aside"]


@contextmanager
def written_aside(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """A path beside `target` to write to; it takes `target`'s place when the block ends without an exception.

    With `folder` it is a new, empty folder; a folder already at `target` is replaced. Whatever was written aside is
    removed when the block fails.

    Raises:
        OSError: what the file system says (no space, no permission).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    _remove(aside)
    try:
        if folder:
            aside.mkdir()
        yield aside
        if folder:
            for file in aside.iterdir():
                sync(file)
            _remove(target)
        else:
            sync(aside)
        os.replace(aside, target)
    except Exception as error:
        # Libraries written in Rust (safetensors, tokenizers) raise an exception of their own that ends so.
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None or isinstance(error, OSError):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(target)) from error
    finally:
        _remove(aside)


def refuse_to_overwrite(paths: list[Path], *, overwrite: bool) -> None:
    """Raises `UserError` for the first of `paths` that exists, unless `overwrite`."""
    for path in paths:
        if path.exists() and not overwrite:
            raise UserError(f"{path} is already there; choose another output or add --overwrite")


def refuse_to_replace(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raises `UserError` for the first of `outputs` that is one of `inputs`: what is read would be lost."""
    read = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in read:
            raise UserError(f"{path} is an input, and would be overwritten; choose another output")


def sync(file: Path) -> None:
    """Waits until the file's content is on the disk, so that a rename never outlives what it names."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
