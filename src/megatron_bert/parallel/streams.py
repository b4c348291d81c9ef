"""Random numbers of sharded and of replicated regions.

Tensor-parallel ranks start from one seed and draw the same numbers wherever they compute the same values. Where each
computes its own part (attention heads, tokens under sequence parallelism), their masks have to differ: for the time of
such a region, the stream is replaced by one that follows from the common stream's state and the rank.

So the common stream is all the state there is. Whoever saves and restores it, a checkpoint or the recomputation of
activations (`torch.utils.checkpoint`), gets the ranks' own streams with it, for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch

__all__ = ["key", "own_stream"]


@contextmanager
def own_stream(rank: int, device: torch.device) -> Iterator[None]:
    """Within the block, `device` draws from this rank's own stream; the common one moves on by one number."""
    generator = _default_generator(device)
    state = generator.get_state()
    torch.rand((), device=device)
    common = generator.get_state()
    generator.manual_seed(key(state.numpy().tobytes(), rank))
    try:
        yield
    finally:
        generator.set_state(common)


def key(*parts: bytes | int | str) -> int:
    """A seed of 63 bits that follows from all of `parts`; any other parts give, for all purposes, another seed."""
    digest = blake2b(digest_size=8)
    for part in parts:
        encoded = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little") >> 1


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator
