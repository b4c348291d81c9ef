"""That a skip which hides a gap fails, in a test and in a subtest."""

from pathlib import Path

import pytest

from .skips import ACCEPTED, NEVER, objection

SUITE = Path(__file__).parent

# What Transformers' mixins say when a model lacks what these classes have.
GAPS = [
    "MegatronBertModel does not support SDPA",
    "This models' submodels does not support sdpa",
    "Model does not have a TP plan.",
    "Model does not have a tensor parallel plan (base_model_tp_plan)",
    "No usage of the `capture_outputs` decorator.",
]


@pytest.mark.parametrize("reason", GAPS)
def test_a_gap_that_these_classes_fill_is_never_a_reason_to_skip(reason: str) -> None:
    assert "never accepted" in str(objection(reason))


@pytest.mark.parametrize("reason", ["This model does not support setting its attention dynamically", "whatever"])
def test_a_reason_that_is_not_listed_is_not_accepted(reason: str) -> None:
    assert "does not list" in str(objection(reason))


def test_the_table_has_no_entry_for_a_gap_and_a_why_for_each() -> None:
    assert objection("test requires accelerator") is None
    assert not [pattern for pattern in ACCEPTED if NEVER.search(pattern)]
    assert all(why.strip() for why in ACCEPTED.values())


def test_pytest_fails_on_such_a_skip(pytester: pytest.Pytester) -> None:
    package = pytester.mkpydir("suite")
    for name in ("conftest.py", "skips.py"):
        (package / name).write_text((SUITE / name).read_text(encoding="utf-8"), encoding="utf-8")
    (package / "test_it.py").write_text(
        "import unittest\n"
        "class Case(unittest.TestCase):\n"
        "    def test_gap(self): self.skipTest('MegatronBertModel does not support SDPA')\n"
        "    def test_gap_in_a_subtest(self):\n"
        "        with self.subTest('one'): self.skipTest('Model does not have a TP plan.')\n"
        "    @unittest.skip('whatever')\n"
        "    def test_unlisted(self): pass\n"
        "    def test_accepted(self): self.skipTest('test requires MPS')\n"
        "    def test_passes(self): pass\n",
        encoding="utf-8",
    )
    done = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")
    done.stdout.fnmatch_lines(["*does not support SDPA*", "*does not have a TP plan.*", "*does not list: whatever*"])
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    outcomes = done.parseoutcomes()
    assert outcomes["failed"] == 3
    assert outcomes["skipped"] == 1
