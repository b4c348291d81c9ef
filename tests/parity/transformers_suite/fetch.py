"""Fetches the test files of the installed Transformers version from its source distribution on PyPI, once."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers
from filelock import FileLock

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "transformers-tests"

NEEDED = ("test_modeling_common.py", "test_configuration_common.py", "test_pipeline_mixin.py")

# Source distributions that this suite was tried with. Another version is used as pip verified it.
KNOWN_SHA256 = {
    "5.17.0": "a153be279169b55b92d8000bf4af294aed684503d091cca7804da2dd8a9de000",
    "5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
}


class SuiteUnavailable(RuntimeError):
    """Transformers' test files could not be had: the tests fail, they are not skipped."""


def suite_root(version: str = transformers.__version__, cache: Path = CACHE) -> Path:
    """A folder whose `tests/` holds the test files of Transformers `version`; fetched on the first call.

    Safe to call from several processes. Raises SuiteUnavailable where PyPI cannot be reached or serves something else.
    """
    root = cache / version
    if root.is_dir():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{version}.lock"):
        if not root.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                archive = download(version, Path(scratch) / "download")
                unpacked = unpack(archive, version, Path(scratch) / "suite")
                os.replace(unpacked, root)
    return root


def download(version: str, directory: Path) -> Path:
    """The source distribution of Transformers `version`, downloaded and checked by pip, and by KNOWN_SHA256."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(directory), f"transformers=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = directory / f"transformers-{version}.tar.gz"
    if done.returncode or not archive.is_file():
        raise SuiteUnavailable(
            f"Transformers' own test suite (source distribution of transformers {version}) could not be downloaded "
            f"from PyPI; connect once and run the tests again. pip said:\n{done.stderr.strip()}"
        )
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != KNOWN_SHA256.get(version, found):
        raise SuiteUnavailable(f"{archive.name} from PyPI has sha256 {found}, expected {KNOWN_SHA256[version]}")
    return archive


def unpack(archive: Path, version: str, root: Path) -> Path:
    """Puts the `tests/*.py` of `archive` under `root`, and beside them the two packages that they look for.

    They look for Transformers in their own checkout; with empty packages there they get the installed one.
    """
    (root / "tests").mkdir(parents=True)
    (root / "src" / "transformers").mkdir(parents=True)
    (root / "tests" / "__init__.py").touch()
    (root / "src" / "transformers" / "__init__.py").touch()
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                source = tar.extractfile(member)
                assert source is not None
                with source, (root / "tests" / parts[2]).open("wb") as target:
                    shutil.copyfileobj(source, target)
    lacking = [name for name in NEEDED if not (root / "tests" / name).is_file()]
    if lacking:
        raise SuiteUnavailable(f"the source distribution of transformers {version} has no tests/{', '.join(lacking)}")
    return root
