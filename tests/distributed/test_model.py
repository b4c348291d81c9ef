"""The whole model on many ranks equals the single process."""

import pytest

from tests.distributed import cases


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize(("tensor", "ranks"), [(2, 2), (4, 4), (2, 4), (8, 8), (4, 8)])
def test_tensor_times_data(world, ranks, tensor, sequence_parallel, packed):
    world(ranks).run(cases.equals_single_process, tensor=tensor, sequence_parallel=sequence_parallel, packed=packed)


@pytest.mark.parametrize("replicate", [1, 2])
def test_data_alone(world, replicate):
    world(4).run(cases.equals_single_process, replicate=replicate)


def test_tensor_times_hybrid_data(world):
    world(8).run(cases.equals_single_process, tensor=2, replicate=2, sequence_parallel=True)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_with_recomputation(world, sequence_parallel):
    world(4).run(cases.equals_single_process, tensor=2, sequence_parallel=sequence_parallel, recompute=True, steps=20)
