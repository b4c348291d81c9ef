"""Blends: shares by weight, each corpus through its own epochs, from any position."""

from dataclasses import dataclass

import pytest

from megatron_bert.data.blending import Blend, Position
from megatron_bert.data.samples import SampleKey, SamplePlan
from megatron_bert.errors import UserError


@dataclass
class Numbers:
    """An index of so many samples."""

    num: int

    def __len__(self) -> int:
        return self.num

    def plan(self, index: int) -> SamplePlan:
        raise NotImplementedError


def blend_of(sizes: list[int], weights: list[float]) -> Blend[Numbers]:
    return Blend([lambda epoch, size=size: Numbers(size + epoch) for size in sizes], weights)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [3.0, 1e-3], [5.0, 3.0, 2.0, 2.0]])
def test_shares_follow_the_weights_all_along(weights: list[float]) -> None:
    keys, _ = blend_of([1000] * len(weights), weights).take(Position(), 5000)
    counts = [0] * len(weights)
    for num, key in enumerate(keys, 1):
        counts[key.corpus] += 1
        if num % 50 == 0:
            for count, weight in zip(counts, weights, strict=True):
                assert abs(count - num * weight / sum(weights)) < len(weights)


def test_every_corpus_goes_through_its_epochs() -> None:
    keys, _ = blend_of([10, 700], [1.0, 4.0]).take(Position(), 1000)
    first = [key for key in keys if key.corpus == 0]
    wanted = [SampleKey(0, epoch, at) for epoch in range(15) for at in range(10 + epoch)]
    assert first == wanted[: len(first)]
    assert [key for key in keys if key.corpus == 1] == ([SampleKey(1, 0, at) for at in range(700)]
                                                        + [SampleKey(1, 1, at) for at in range(100)])  # fmt: skip


def test_steps_of_any_size_are_one_stream() -> None:
    blend = blend_of([10, 37, 5], [0.5, 0.3, 0.2])
    whole, end = blend.take(Position(), 300)
    for size in (1, 7, 100):
        position, keys = Position(), []
        while len(keys) < 300:
            taken, position = blend.take(Position.of(position.as_dict()), min(size, 300 - len(keys)))
            keys += taken
        assert keys == whole
        assert position == end


def test_a_position_in_other_corpora_is_refused() -> None:
    _, position = blend_of([10, 10], [1.0, 1.0]).take(Position(), 4)
    with pytest.raises(UserError, match=r"data\.tokens has 3 corpora, and the run to go on with had 2"):
        blend_of([10] * 3, [1.0] * 3).take(position, 4)
