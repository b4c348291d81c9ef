"""Random streams that are functions of their key: what a sample draws depends on nothing but where it stands."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

__all__ = ["Purpose", "generator"]


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of the data order: never reuse or change one."""

    SPLIT = 0  # which documents are held out for validation
    LENGTHS = 1  # the target length that each sentence would start a sample with
    ORDER = 2  # the order of an epoch's samples
    SAMPLE = 3  # a sample's pair and masks


def generator(seed: int, purpose: Purpose, epoch: int = 0, index: int = 0) -> np.random.Generator:
    """The stream of (seed, purpose, epoch, index).

    Philox is counter-based (Salmon et al. 2011): the key is the seed and the counter starts at a place of its own for
    each (purpose, epoch, index), 2**64 draws away from any other.
    """
    counter = np.array([0, index, epoch, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter))
