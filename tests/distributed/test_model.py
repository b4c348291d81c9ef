"""The whole model on many ranks equals the single process: losses, gradients, weights after some steps."""

import pytest

from tests.distributed import cases

packed = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
sequence_parallel = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])


@packed
@sequence_parallel
@pytest.mark.parametrize(("ranks", "tensor"), [(2, 2), (4, 4), (4, 2)], ids=["2x1", "4x1", "2x2"])
def test_tensor_times_data(world, ranks, tensor, sequence_parallel, packed):
    world(ranks).run(cases.equals_single_process, tensor=tensor, sequence_parallel=sequence_parallel, packed=packed)


def test_eight_tensor_parallel_ranks(world):
    world(8).run(cases.equals_single_process, tensor=8, sequence_parallel=True, packed=True)


@pytest.mark.parametrize("replicate", [1, 2, 4], ids=["sharded", "hybrid", "replicated"])
def test_data_alone(world, replicate):
    world(4).run(cases.equals_single_process, replicate=replicate, num_micro_batches=4)


@pytest.mark.parametrize("bucket_bytes", [1, 10000, 1 << 30])
def test_tensor_times_replicated_data(world, bucket_bytes):
    """Each gradient summed by itself, several together, and all."""
    world(4).run(
        cases.equals_with_buckets,
        bucket_bytes=bucket_bytes,
        tensor=2,
        replicate=2,
        sequence_parallel=True,
        num_micro_batches=4,
    )


@pytest.mark.parametrize("bucket_bytes", [1, 10000])
def test_sums_beside_the_backward_pass(world, bucket_bytes):
    world(4).run(cases.sums_beside_the_backward_pass, bucket_bytes=bucket_bytes)


def test_tensor_times_hybrid_data(world):
    world(8).run(
        cases.equals_single_process, tensor=2, replicate=2, sequence_parallel=True, steps=1, num_micro_batches=4
    )


@sequence_parallel
def test_recomputed_layers(world, sequence_parallel):
    world(4).run(cases.equals_single_process, tensor=2, sequence_parallel=sequence_parallel, recompute=True)


def test_compiled_layers(world):
    world(2).run(cases.equals_single_process, tensor=2, packed=True, compiled=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_overlapped(world, compiled):
    world(4).run(
        cases.equals_single_process, tensor=2, sequence_parallel=True, overlap=True, packed=True, compiled=compiled
    )


def test_twenty_steps(world):
    world(2).run(cases.equals_single_process, tensor=2, sequence_parallel=True, packed=True, steps=20)


@pytest.mark.parametrize("keeps_layers", [False, True])
def test_evaluation_after_a_recorded_step(world, keeps_layers):
    world(2).run(cases.evaluates_what_a_recorded_step_wrote, keeps_layers=keeps_layers)
