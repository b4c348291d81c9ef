"""Dropout: common masks for what every rank computes, own masks for what each computes a part of."""

import pytest
import torch

from megatron_bert.parallel.streams import own_stream
from tests.distributed import dropout_cases

both = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])


@both
def test_masks(world, sequence_parallel):
    world(2).run(dropout_cases.streams, sequence_parallel=sequence_parallel)


@both
def test_saved_and_restored(world, sequence_parallel):
    world(2).run(dropout_cases.restored, sequence_parallel=sequence_parallel)


@both
def test_recomputed(world, sequence_parallel):
    world(2).run(dropout_cases.recomputed, sequence_parallel=sequence_parallel)


def test_seeds_differ_between_data_parallel_ranks_only(world):
    seeds = world(4).run(dropout_cases.seeds, 2)
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


def test_the_common_stream_stays_common(world):
    after, own = zip(*world(4).run(dropout_cases.common_stream_moves_alike), strict=True)
    assert len(set(after)) == 1
    assert len(set(own)) == 4


@pytest.mark.gpu
def test_streams_of_a_gpu():
    """As on a CPU: own numbers within, common ones after, the same again from the same state."""
    device = torch.device("cuda")

    def drawn(rank: int) -> tuple[float, float]:
        with own_stream(rank, device):
            own = float(torch.rand(1 + rank, device=device)[0])
        return own, float(torch.rand((), device=device))

    results = []
    for rank in (0, 1, 0):
        torch.cuda.manual_seed(3)
        results.append(drawn(rank))
    assert results[0] == results[2]
    assert results[0][0] != results[1][0]
    assert results[0][1] == results[1][1]
    assert drawn(0)[0] != results[0][0]
