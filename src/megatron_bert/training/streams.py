"""The random streams of this process, as what JSON can hold: Python's, NumPy's, PyTorch's of the CPU and of the GPU."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["random_streams", "set_random_streams", "streams_kept"]


def random_streams(device: torch.device) -> dict[str, Any]:
    """Where every stream stands."""
    version, internal, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    streams: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), place, has_gauss, cached],
        "torch": _text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        streams["cuda"] = _text(torch.cuda.get_rng_state(device))
    return streams


def set_random_streams(streams: Mapping[str, Any], device: torch.device) -> None:
    """Puts every stream back to where `random_streams` found it. A stream that it did not have (a run that moved from
    a CPU to a GPU) is left alone.
    """
    version, internal, gauss = streams["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, place, has_gauss, cached = streams["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_tensor(streams["torch"]))
    if device.type == "cuda" and "cuda" in streams:
        torch.cuda.set_rng_state(_tensor(streams["cuda"]), device)


@contextmanager
def streams_kept(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the streams stand afterwards where they stood before."""
    before = random_streams(device)
    try:
        yield
    finally:
        set_random_streams(before, device)


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
