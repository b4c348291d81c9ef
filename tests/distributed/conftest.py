"""Worlds of 2, 4 and 8 processes, each started when a test first asks for it."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(4)`: four ranks."""
    worlds: dict[int, World] = {}
    yield lambda size: worlds[size] if size in worlds else worlds.setdefault(size, World(size))
    for started in worlds.values():
        started.close()
