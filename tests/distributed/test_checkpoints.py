"""A checkpoint belongs to no layout."""

from tests.distributed import cases


def test_saved_at_one_layout_and_read_at_others(world, tmp_path):
    world(4).run(cases.goes_on_at_another_layout, tmp_path, saved_at=4, layouts=[2, 1])


def test_a_full_disk(world, tmp_path):
    world(2).run(cases.says_that_a_disk_is_full, tmp_path)
