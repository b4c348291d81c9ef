"""How fast a run goes: tokens, model FLOPs, the share of the time that it waits for data, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedConfig

from megatron_bert.planning.flops import training_flops
from megatron_bert.training.step import Sums

__all__ = ["Throughput", "measured_flops_per_second"]

_SIDE = 8192  # of the square matrices whose product is the ceiling
_REPEATS = 10


class Throughput:
    """Turns what the loop saw into rates.

    Args:
        peak: FLOPs a second that all devices together reach, of which the model's share is told; None: not told.
    """

    def __init__(self, config: PreTrainedConfig, device: torch.device, peak: float | None) -> None:
        self._config, self._device, self._peak = config, device, peak
        self._waited_seconds = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The block's time is waiting. An upper bound of what the device waits: it may still be busy with old work."""
        before = time.perf_counter()
        yield
        self._waited_seconds += time.perf_counter() - before

    def rates(self, sums: Sums, seconds: float) -> dict[str, float]:
        """Of the steps that saw `sums` in `seconds`, since the last call.

        Returns:
            tokens_per_second (real tokens, no padding), seconds, data_waiting_share, and where it is known mfu (model
            FLOPs by `planning.flops` over what a large matrix product reaches on this device) and peak_memory_gib (the
            most that tensors took since the run began).
        """
        rates = {
            "tokens_per_second": float(sums.num_tokens) / seconds,
            "seconds": seconds,
            "data_waiting_share": min(self._waited_seconds / seconds, 1.0),
        }
        self._waited_seconds = 0.0
        if self._peak is not None:
            numbers = (int(sums.num_tokens), int(sums.num_attended_pairs), int(sums.num_predicted))
            rates["mfu"] = training_flops(self._config, *numbers) / seconds / self._peak
        if self._device.type == "cuda":
            rates["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return rates


def measured_flops_per_second(device: torch.device, precision: str) -> float | None:
    """What a product of two 8192 x 8192 matrices reaches on this GPU in `precision` (bfloat16 for float8): the best of
    ten, in 0.1 s.

    A data sheet's number is not reached by any program, and a table would lack the next device. None without a GPU:
    on a CPU the share says little. No random stream moves.
    """
    if device.type != "cuda":
        return None
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    left, right = (torch.randn(_SIDE, _SIDE, device=device, dtype=dtype, generator=generator) for _ in range(2))
    seconds = []
    for _ in range(_REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        torch.matmul(left, right)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return float(2 * _SIDE**3 / min(seconds[3:]))
