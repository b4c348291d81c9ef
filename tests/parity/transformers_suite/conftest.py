"""Registers the marks that Transformers' mixins put on their tests, and fails on a skip that nobody has looked at."""

import os
from collections.abc import Generator

import pytest

from .skips import objection

os.environ.setdefault("RUN_SLOW", "1")  # their slow tests too: the ones that this machine can run

UPSTREAM_MARKS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "order",
    "slow",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for mark in UPSTREAM_MARKS:
        config.addinivalue_line("markers", f"{mark}: set by Transformers on its own tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turns a skip that `skips.py` does not accept into a failure; subtests come through here too."""
    report = yield
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else None
    if reason and (problem := objection(reason.removeprefix("Skipped: "))):
        report.outcome = "failed"
        report.longrepr = problem
    return report
