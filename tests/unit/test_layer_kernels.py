"""The kernels between a layer's products, without a GPU: their own tests, in a process where Triton interprets."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def can_interpret() -> bool:
    """Triton before 3.7 does not, beside NumPy 2.4: a loop's bounds are arrays of one number to it."""
    try:
        triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    except PackageNotFoundError:
        return False
    return triton >= (3, 7) or numpy < (2, 4)


@pytest.mark.skipif(not can_interpret(), reason="needs Triton, 3.7 or later")
def test_interpreted_kernels() -> None:
    tests = sorted(map(str, Path(__file__).parent.glob("interpreted_*.py")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
