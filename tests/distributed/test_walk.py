"""The walk along tensor-parallel layers equals the single process, and takes its dropout from the right streams."""

import pytest

from tests.distributed import walk_cases

sequence_parallel = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])


@sequence_parallel
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_is_that_of_one_process(world, ranks, sequence_parallel):
    world(ranks).run(
        walk_cases.equals_single_process, tensor=ranks, sequence_parallel=sequence_parallel, packed=ranks == 2
    )


def test_overlapped(world):
    world(2).run(walk_cases.equals_single_process, tensor=2, sequence_parallel=True, overlap=True, packed=True, steps=1)


def test_beside_replicas(world):
    world(4).run(walk_cases.equals_single_process, tensor=2, replicate=2, sequence_parallel=True)


@sequence_parallel
def test_compiled_without_a_graph_break(world, sequence_parallel):
    world(2).run(walk_cases.compiled, sequence_parallel=sequence_parallel)


def test_replicas_drop_what_one_process_does(world):
    world(2).run(walk_cases.drops_as_single_process)


@sequence_parallel
def test_masks(world, sequence_parallel):
    world(2).run(walk_cases.streams, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize(
    ("layout", "walk"),
    [
        ({"tensor": 1, "replicate": 4}, "whole, 4 together"),
        ({"tensor": 4}, "on ranks, 1 together"),
        ({"tensor": 2, "replicate": 2, "sequence_parallel": True}, "on ranks, 4 together"),
        ({"tensor": 4, "sequence_parallel": True, "overlap": True}, "on ranks, 4 together"),
        ({"tensor": 2}, None),  # sharded
        ({"tensor": 4, "recompute": "full"}, None),
        ({"tensor": 4, "precision": "float32"}, None),
        ({"tensor": 4, "fused": False}, None),
    ],
)
def test_where_layers_are_walked(world, layout, walk):
    assert world(4).run(walk_cases.chosen, **layout) == 4 * [walk]
