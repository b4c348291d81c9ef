"""The package `transformers_tests`: the fetched test files, with stand-ins for the files that they import and lack."""

import sys
from collections.abc import Mapping
from types import ModuleType

from .fetch import suite_root

PACKAGE = "transformers_tests"


def install(stand_ins: Mapping[str, ModuleType]) -> None:
    """Makes `transformers_tests` importable; each of `stand_ins` answers to its dotted name below it."""
    if PACKAGE not in sys.modules:
        _package(PACKAGE, [str(suite_root() / "tests")])
    for name, module in stand_ins.items():
        full_name = f"{PACKAGE}.{name}"
        parent = full_name.rpartition(".")[0]
        if parent not in sys.modules:
            _package(parent, [])
        sys.modules[full_name] = module


def _package(name: str, path: list[str]) -> None:
    module = ModuleType(name)
    module.__path__ = path
    sys.modules[name] = module
