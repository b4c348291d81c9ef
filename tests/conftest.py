"""For every test: no hub, quiet tokenizers, the libraries' verbosity as it was, and the GPU marker; the command."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.forked_command import forked_command

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["pytester"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a CUDA device where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for PATH with the command and `torchrun`, forked."""
    with forked_command(tmp_path_factory.mktemp("command")) as folder:
        yield folder


@pytest.fixture(autouse=True)
def _verbosity_restored() -> Iterator[None]:
    """A command run in process quietens Transformers for good; Transformers' own tests read what it logs."""
    yield
    if "transformers" in sys.modules:
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        logging.set_verbosity_warning()
        hub_logging.set_verbosity_warning()
