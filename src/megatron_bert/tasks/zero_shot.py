"""Runs a zero-shot protocol: items of similar length together, each one's line kept at once, so that a run goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from megatron_bert.checkpoint.load import model_folder
from megatron_bert.data.files import written_aside
from megatron_bert.errors import UserError
from megatron_bert.tasks.scoring import Request, Score, TokenScorer

__all__ = ["ZeroShotTask", "fingerprint", "predict"]

logger = logging.getLogger(__name__)


class ZeroShotTask(Protocol):
    """What a protocol says of its items; `settings` are what else their lines depend on."""

    settings: dict[str, Any]

    def __len__(self) -> int: ...

    def requests(self, item: int) -> list[Request]:
        """What is scored for an item."""

    def record(self, item: int, scores: Sequence[Score]) -> dict[str, Any]:
        """The item's line."""

    def result(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The figures of all items' lines."""


def fingerprint(model: str | os.PathLike[str], data: Path, **settings: Any) -> dict[str, Any]:
    """What a predictions file belongs to: SHA-256 of the model's files and of the data, and the settings."""
    folder = model_folder(model)
    kept = (".safetensors", ".bin", ".json", ".txt")
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in kept]
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name} {_sha256(file)}\n".encode())
    return {"model_sha256": total.hexdigest(), "data_sha256": _sha256(data), **settings}


def predict(
    task: ZeroShotTask, scorer: TokenScorer, output: Path | None = None, belongs_to: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The lines of all items, in order; with `output` they are written there when all are made.

    Until then they are kept in `output`.partial, from which the same command goes on.

    Raises:
        UserError: a partial file that is damaged, or of another model, data or settings.
    """
    partial = None if output is None else output.with_name(f"{output.name}.partial")
    header = {"belongs_to": belongs_to}
    records = {} if partial is None else _resumed(partial, header, len(task))
    left = [item for item in range(len(task)) if item not in records]
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="evaluating", total=len(task), initial=len(records), delay=2, leave=False,
                                       disable=not sys.stderr.isatty()))  # fmt: skip
        file = None if partial is None else stack.enter_context(partial.open("a", encoding="utf-8"))
        if file is not None and not file.tell():
            file.write(json.dumps(header) + "\n")
        for group in _groups(task, left, scorer.batch_tokens):
            scores = iter(scorer.score([request for _, requests in group for request in requests]))
            for item, requests in group:
                records[item] = task.record(item, [next(scores) for _ in requests])
                if file is not None:
                    file.write(json.dumps({"item": item, **records[item]}, ensure_ascii=False) + "\n")
            if file is not None:
                file.flush()
            bar.update(len(group))
    ordered = [{"item": item, **records[item]} for item in range(len(task))]
    if output is not None and partial is not None:
        with written_aside(output) as aside:
            lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *ordered))
            aside.write_text("".join(lines), encoding="utf-8")
        partial.unlink()
    return ordered


def _groups(task: ZeroShotTask, items: Sequence[int], batch_tokens: int) -> Any:
    """Items with their requests, as many as fill several batches, so that lengths can be matched among them."""
    group: list[tuple[int, list[Request]]] = []
    tokens = 0
    for item in items:
        requests = task.requests(item)
        group.append((item, requests))
        tokens += sum(len(request.ids) for request in requests)
        if tokens >= 16 * batch_tokens:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _resumed(partial: Path, header: dict[str, Any], num_items: int) -> dict[int, dict[str, Any]]:
    """The lines that a run which did not end has left; one that was cut short is taken off."""
    if not partial.is_file():
        return {}
    contents = partial.read_bytes()
    whole = contents[: contents.rfind(b"\n") + 1]
    if len(whole) < len(contents):
        with partial.open("r+b") as file:
            file.truncate(len(whole))
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        value = _parsed(line, f"{partial}, line {number}")
        if number == 1:
            if value != header:
                raise UserError(f"{partial} is of another model, data or settings: remove it, or use another --output")
            continue
        item = value.pop("item", None)
        if not isinstance(item, int) or not 0 <= item < num_items or item in records or "log_likelihood" not in value:
            raise UserError(f"{partial}, line {number}: damaged (not a line of this run); remove the file")
        records[item] = value
    if records:
        logger.info("going on after %d of %d in %s", len(records), num_items, partial)
    return records


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: damaged (not JSON); remove the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: damaged (not a JSON object); remove the file")
    return value


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
