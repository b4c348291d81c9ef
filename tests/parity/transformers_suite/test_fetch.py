"""Fetching Transformers' test files: what is taken from an archive, and what is said when there is none."""

import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import transformers

from . import fetch


def archive_with(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, BytesIO(b"x=1"))
    return path


NEEDED = [f"transformers-9/tests/{name}" for name in fetch.NEEDED]


def test_only_the_test_files_are_unpacked(tmp_path: Path) -> None:
    extra = ["transformers-9/setup.py", "transformers-9/tests/../../out.py", "transformers-9/tests/deeper/x.py"]
    root = fetch.unpack(archive_with(tmp_path / "a.tar.gz", *NEEDED, *extra), "9", tmp_path / "suite")
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    assert found == sorted([*(f"tests/{n}" for n in fetch.NEEDED), "tests/__init__.py", "src/transformers/__init__.py"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "suite"]


def test_an_archive_without_the_mixins_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fetch.SuiteUnavailable, match=r"transformers 9 has no tests/test_pipeline_mixin\.py"):
        fetch.unpack(archive_with(tmp_path / "a.tar.gz", *NEEDED[:2]), "9", tmp_path / "suite")


def test_without_an_index_the_message_says_what_to_do_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(fetch.SuiteUnavailable, match="could not be downloaded from PyPI; connect once"):
        fetch.suite_root(cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{transformers.__version__}.lock"]


def test_an_archive_with_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip_finds_another(command: list[str], **_options: object) -> object:
        directory = Path(command[command.index("--dest") + 1])
        directory.mkdir()
        archive_with(directory / "transformers-5.23.0.tar.gz", *NEEDED)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(fetch.subprocess, "run", pip_finds_another)
    with pytest.raises(fetch.SuiteUnavailable, match=r"has sha256 .* expected 19d647a4"):
        fetch.suite_root("5.23.0", cache=tmp_path)


def test_what_was_fetched_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "9").mkdir()
    monkeypatch.setattr(fetch, "download", lambda *_: pytest.fail("downloaded"))
    assert fetch.suite_root("9", cache=tmp_path) == tmp_path / "9"
