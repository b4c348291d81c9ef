"""Several corpora as one stream of samples, in proportion to their weights; and where one stands in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Generic, Self, TypeVar

import numpy as np

from megatron_bert.data.samples import SampleIndex, SampleKey
from megatron_bert.errors import UserError

__all__ = ["Blend", "Cursor", "Position"]

Index = TypeVar("Index", bound=SampleIndex)

_KEPT_EPOCHS = 2  # a step may reach over the end of an epoch


@dataclass(frozen=True)
class Cursor:
    """The next sample of one corpus: `offset` within `epoch`, after `used` samples in all."""

    epoch: int = 0
    offset: int = 0
    used: int = 0


@dataclass(frozen=True)
class Position:
    """Where the next step begins; opaque to everybody but this package. `Position()` is the start of the data."""

    cursors: tuple[Cursor, ...] = ()

    def as_dict(self) -> dict[str, int]:
        """For a checkpoint; `Position.of` reads it."""
        return {f"{name}_{at}": number for at, cursor in enumerate(self.cursors)
                for name, number in asdict(cursor).items()}  # fmt: skip

    @classmethod
    def of(cls, values: Mapping[str, int]) -> Self:
        """The position that `as_dict` gave."""
        num = sum(name.startswith("epoch_") for name in values)
        names = ("epoch", "offset", "used")
        return cls(tuple(Cursor(*(values[f"{name}_{at}"] for name in names)) for at in range(num)))


class Blend(Generic[Index]):
    """Samples of several corpora, each in its own order and through its own epochs, without end.

    After n samples in all, corpus c has given n * weight_c / sum of weights, within one or so: sample k of corpus c is
    due at (k + 1/2) / weight_c, and what is due first comes first (the apportionment of Webster and Sainte-Lague).

    Args:
        index_of: for each corpus, what makes the index of an epoch.
        weights: positive.
    """

    def __init__(self, index_of: Sequence[Callable[[int], Index]], weights: Sequence[float]) -> None:
        assert len(index_of) == len(weights) > 0
        self._index_of = [lru_cache(_KEPT_EPOCHS)(make) for make in index_of]
        self._weights = np.asarray(weights, float)

    def index(self, corpus: int, epoch: int) -> Index:
        """The index of an epoch of one corpus; the last two are kept."""
        return self._index_of[corpus](epoch)

    def take(self, start: Position, num: int) -> tuple[list[SampleKey], Position]:
        """The `num` samples from `start` on, and where the next ones begin.

        Raises:
            UserError: `start` is a position in another number of corpora.
        """
        cursors = start.cursors or (Cursor(),) * len(self._weights)
        if len(cursors) != len(self._weights):
            raise UserError(
                f"data.tokens has {len(self._weights)} corpora, and the run to go on with had {len(cursors)}"
            )
        order = self._corpora(cursors, num)
        streams, moved = [], []
        for corpus, cursor in enumerate(cursors):
            keys, after = self._advance(corpus, cursor, int((order == corpus).sum()))
            streams.append(iter(keys))
            moved.append(after)
        return [next(streams[corpus]) for corpus in order.tolist()], Position(tuple(moved))

    def _corpora(self, cursors: Sequence[Cursor], num: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """int64 [num]: which corpus each of the next samples is from."""
        if len(cursors) == 1:
            return np.zeros(num, np.int64)
        due = [(cursor.used + np.arange(num) + 0.5) / weight
               for cursor, weight in zip(cursors, self._weights, strict=True)]  # fmt: skip
        first = np.argsort(np.concatenate(due), kind="stable")[:num]
        return first // num

    def _advance(self, corpus: int, cursor: Cursor, num: int) -> tuple[list[SampleKey], Cursor]:
        keys: list[SampleKey] = []
        epoch, offset = cursor.epoch, cursor.offset
        while len(keys) < num:
            available = len(self.index(corpus, epoch))
            assert available
            stop = min(available, offset + num - len(keys))
            if offset >= stop:
                epoch, offset = epoch + 1, 0
                continue
            keys += [SampleKey(corpus, epoch, at) for at in range(offset, stop)]
            offset = stop
        return keys, Cursor(epoch, offset, cursor.used + num)
