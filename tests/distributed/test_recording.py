"""A pass in which ranks send to each other is recorded by all of them or by none."""

import pytest

from tests.distributed import recording_cases


def test_shapes_are_the_same_on_all_ranks(world):
    world(4).run(recording_cases.shapes_of_pretraining)


def test_shapes_of_labelled_batches_are_the_same_on_all_ranks(world):
    world(4).run(recording_cases.shapes_of_fine_tuning)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_recording_that_fails_on_one_rank(world, sharded):
    world(2).run(recording_cases.a_recording_that_fails_on_one_rank, sharded=sharded)


def test_mailboxes_after_such_a_recording(world):
    world(2).run(recording_cases.mailboxes_after_such_a_recording)


def test_sharded_regression_keeps_its_targets(world):
    world(2).run(recording_cases.targets_stay_what_they_are)
