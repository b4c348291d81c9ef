"""The files of a checkpoint of Megatron-LM's, or NeMo's: found, and read without running anything in them.

Megatron-LM (github.com/NVIDIA/Megatron-LM, `megatron/training/checkpointing.py` and what came before it) writes
`iter_0001000/mp_rank_01_002/model_optim_rng.pt`: a step, or `release` in place of it, tensor-parallel rank 1 and stage
2 of a pipeline, which older versions have not. NVIDIA's own BERT, of 345 million parameters, is that in a zip file.
NeMo, which grew out of it, has files of its own (`nemo_files.py`) with weights under the same names.
"""

from __future__ import annotations

import argparse
import lzma
import pickle
import re
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.serialization import safe_globals

from megatron_bert.checkpoint.folder import explaining_damage
from megatron_bert.checkpoint.nemo_files import (
    NEMO_WEIGHTS,
    NemoConfiguration,
    naming_where,
    read_nemo_configuration,
    unpacked_nemo,
)
from megatron_bert.errors import UserError

__all__ = ["RANK_FILE", "TRACKER", "UNNUMBERED", "CheckpointFiles", "files_of_checkpoint", "read_rank"]

RANK_FILE = "model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"  # names the newest step
UNNUMBERED = "release"  # a step
_FILES = (RANK_FILE, "model_rng.pt")
_RANK = re.compile(r"(?:mp|tp)_rank_(\d+)(?:_(?:pp_rank_)?(\d+))?")
_MOST_KINDS = 64  # of objects beside the weights: arguments, random states


@dataclass(frozen=True)
class CheckpointFiles:
    """Of one checkpoint.

    Attributes:
        stages: by stage of the pipeline and tensor-parallel rank.
        nemo: NeMo's configuration, of a checkpoint of NeMo's.
    """

    stages: list[list[Path]]
    nemo: NemoConfiguration | None = None


@contextmanager
def files_of_checkpoint(source: Path) -> Iterator[CheckpointFiles | None]:
    """The files of a checkpoint; None where `source` is none.

    Args:
        source: a file of one rank, a zip file, the folder of a step, or the one that it is in; a `.nemo` file, or the
            folder that it was unpacked to.

    Raises:
        UserError: it is one, but of another format, or files of it are missing.
    """
    with unpacked_nemo(source) as folder:
        if folder is not None:
            yield _nemo_files(folder, source)
            return
    if source.is_file() and zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            names = _of_one_step(archive, source)
            if names:
                with tempfile.TemporaryDirectory() as folder:
                    yield CheckpointFiles(_ranks(_extracted(archive, names, folder, source), source))
                return
    if source.is_file():
        yield CheckpointFiles([[source]]) if source.suffix == ".pt" else None
        return
    step = _step_folder(source)
    files = [file for name in _FILES for file in sorted(step.glob(f"mp_rank_*/{name}"))]
    if not files and any(step.glob("*.distcp")):
        raise UserError(f"{step} is a distributed checkpoint of Megatron-LM's: save it again with --ckpt-format torch")
    yield CheckpointFiles(_ranks(files, source)) if files else None


def _nemo_files(folder: Path, source: Path) -> CheckpointFiles:
    files = sorted(folder.glob(f"*_rank_*/{NEMO_WEIGHTS}"))
    alone = folder / NEMO_WEIGHTS
    if not files and not alone.is_file():
        raise UserError(f"{source} has no {NEMO_WEIGHTS}: it is a distributed checkpoint of NeMo's, or not whole")
    try:
        configuration = read_nemo_configuration(folder)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return CheckpointFiles(_ranks(files, source) if files else [[alone]], configuration)


def _step_folder(source: Path) -> Path:
    """The folder of the newest step, where `source` has steps."""
    tracker = source / TRACKER
    if tracker.is_file():
        step = tracker.read_text(encoding="utf-8", errors="replace").strip()
        name = _step_name(step)
        if not (source / name).is_dir():
            raise UserError(f"{tracker} names {step!r}, and there is no {source / name}")
        return source / name
    return source / UNNUMBERED if (source / UNNUMBERED).is_dir() else source


def _of_one_step(archive: zipfile.ZipFile, source: Path) -> list[str]:
    """The names of the ranks' files in a zip file; where it has several steps, of the newest."""
    files = {name: PurePosixPath(name) for name in archive.namelist()}
    step_of = {name: file.parent.parent for name, file in files.items() if file.name in _FILES}
    steps = {*step_of.values()}
    if len(steps) < 2:
        return list(step_of)
    newest = {
        file.parent / _step_name(archive.read(name).decode(errors="replace").strip())
        for name, file in files.items()
        if file.name == TRACKER
    }
    if len(newest) != 1 or not newest <= steps:
        there = ", ".join(sorted(map(str, steps)))
        raise UserError(f"{source} holds {there}, and no {TRACKER} that names one of them: unpack it, and name one")
    return [name for name, step in step_of.items() if step in newest]


def _extracted(archive: zipfile.ZipFile, names: list[str], folder: str, source: Path) -> list[Path]:
    try:
        with naming_where(Path(folder)):
            return [Path(archive.extract(name, folder)) for name in names]
    # RuntimeError: it is encrypted, or packed in a way that Python does not know.
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise UserError(f"{source} cannot be unpacked: {error}") from error


def _step_name(step: str) -> str:
    return f"iter_{int(step):07d}" if step.isdecimal() else step


def _ranks(files: list[Path], source: Path) -> list[list[Path]]:
    found: dict[tuple[int, int], Path] = {}
    for file in files:
        match = _RANK.fullmatch(file.parent.name)
        if match is None:
            raise UserError(f"{source}: {file.parent.name} is no tensor-parallel rank's folder (mp_rank_00)")
        found[int(match[2] or 0), int(match[1])] = file
    stages, degree = (max(key[axis] for key in found) + 1 for axis in (0, 1))
    for stage in range(stages):
        for rank in range(degree):
            if (stage, rank) not in found:
                where = f" of stage {stage}" if stages > 1 else ""
                raise UserError(f"{source}: tensor-parallel rank {rank}{where} is missing (mp_rank_{rank:02d})")
    return [[found[stage, rank] for rank in range(degree)] for stage in range(stages)]


class _Inert:
    """Stands for every object of a type that is not PyTorch's own: takes what it is given, and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def read_rank(file: Path, nemo: NemoConfiguration | None = None) -> dict[str, Any]:
    """What Megatron-LM saved of a rank, on the CPU. Objects of other types than tensors, numbers, text and containers
    of them are inert; `args` are a mapping of Megatron-LM's arguments, empty where there are none. NeMo's file has the
    model alone, and the rest is its configuration's.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    state = _load(file)
    if nemo is not None:
        state = {"model": state, "args": dict(nemo.arguments), "checkpoint_version": nemo.checkpoint_version}
    if not isinstance(state, dict) or not isinstance(state.get("model"), Mapping):
        names = ", ".join(map(str, list(state)[:3])) if isinstance(state, dict) else type(state).__name__
        more = "an interleaved pipeline's model0; " if isinstance(state, dict) and "model0" in state else ""
        raise UserError(f"{file} is no checkpoint of Megatron-LM's that can be converted: {more}it holds {names}")
    args = state.get("args")
    attributes = args.state if isinstance(args, _Inert) else args
    if isinstance(args, argparse.Namespace):  # megatron-core, where it is imported, has PyTorch take these
        attributes = vars(args)
    return {**state, "args": attributes if isinstance(attributes, Mapping) else {}}


def _load(file: Path) -> Any:
    """`weights_only` refuses types that it does not know, one by one; each is read as `_Inert` then."""
    inert: list[Any] = []
    while True:
        try:
            with safe_globals(inert), explaining_damage(file), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            name = (found[1] if "." in found[1] else f"builtins.{found[1]}") if found else ""
            if not name or len(inert) == _MOST_KINDS or any(name == other for _, other in inert):
                said = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
                reason = f": {said[1]}" if said else ""
                raise UserError(f"{file} cannot be read, and nothing in it was run{reason}") from error
            inert.append((_Inert, name))
