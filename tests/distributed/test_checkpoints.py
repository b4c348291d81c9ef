"""A checkpoint belongs to no layout."""

from tests.distributed import cases


def test_saved_at_one_layout_and_read_at_others(world, tmp_path):
    world(4).run(cases.goes_on_at_another_layout, tmp_path, saved_at=4, layouts=[2, 1])


def test_a_full_disk(world, tmp_path):
    world(2).run(cases.says_that_a_disk_is_full, tmp_path)


def test_parts_that_are_on_other_machines(world, tmp_path):
    """It is said, and there is no checkpoint that nobody can read; each process has its own files put onto its disk."""
    (said, _), (also_said, synced) = world(2).run(cases.saves_to_a_folder_that_is_not_shared, tmp_path)
    assert said == also_said
    assert "of another process, is not here: all nodes have to share the output folder" in said
    assert set(synced) == {"__1_0.distcp", "streams-00001.json"}
    assert not any((tmp_path / "checkpoints").iterdir())
