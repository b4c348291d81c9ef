"""Random streams that are functions of their key: what a sample draws depends on nothing but where it stands."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

__all__ = ["Purpose", "generator"]


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of the data order: never reuse or change one."""

    SPLIT = 0  # which documents are held out for validation
    RUNS = 1  # target length, border and pair of the sample that would begin at each sentence
    ORDER = 2  # the order of an epoch's samples
    SAMPLE = 3  # a sample's truncation and masks
    OTHER = 4  # the other document that a next-sentence pair takes its second segment from
    STREAM = 5  # the order in which documents are joined for causal rows


def generator(seed: int, purpose: Purpose, epoch: int = 0, index: int = 0, corpus: int = 0) -> np.random.Generator:
    """The stream of (seed, corpus, purpose, epoch, index); `corpus` tells the parts of a blend apart.

    Philox is counter-based (Salmon et al. 2011): seed and corpus are the key, and the counter starts at a place of its
    own for each (purpose, epoch, index), 2**64 draws away from any other.
    """
    counter = np.array([0, index, epoch, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, corpus], dtype=np.uint64), counter=counter))
