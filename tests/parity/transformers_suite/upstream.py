"""Makes Transformers' test files importable, as the package `transformers_tests`.

The mixins import a few files that the source distribution lacks; our stand-ins take their names. The pipeline mixin
reads a table of tiny models from a folder, on import: `tiny_models` writes it.
"""

import importlib
import os
import sys
from types import ModuleType

from . import tiny_models
from .fetch import suite_root
from .stand_ins import configuration, distributed, export, generation, pipelines

PACKAGE = "transformers_tests"

STAND_INS = {
    "distributed_testing_utils": distributed,
    "exporters.test_export": export,
    "generation.test_utils": generation,
    "utils.test_configuration_utils": configuration,
}


def _package(name: str, path: list[str]) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = path
    sys.modules[name] = module
    return module


def _install() -> None:
    _package(PACKAGE, [str(suite_root() / "tests")])
    for name, module in STAND_INS.items():
        full_name = f"{PACKAGE}.{name}"
        parent = full_name.rpartition(".")[0]
        if parent not in sys.modules:
            _package(parent, [])
        sys.modules[full_name] = module


def _import_pipeline_mixin() -> ModuleType:
    """The pipeline mixin, told to take its tiny models and its checks of a pipeline from us."""
    before = os.environ.get("TRANSFORMERS_TINY_MODEL_PATH")
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(tiny_models.directory())
    try:
        module = importlib.import_module(f"{PACKAGE}.test_pipeline_mixin")
    finally:
        if before is None:
            del os.environ["TRANSFORMERS_TINY_MODEL_PATH"]
        else:
            os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = before
    for task, check in pipelines.CHECKS.items():
        module.pipeline_test_mapping[task]["test"] = f"{check.__module__}.{check.__qualname__}"
    return module


_install()
_modeling = importlib.import_module(f"{PACKAGE}.test_modeling_common")
_configuration = importlib.import_module(f"{PACKAGE}.test_configuration_common")
_pipeline = _import_pipeline_mixin()

ModelTesterMixin = _modeling.ModelTesterMixin
ConfigTester = _configuration.ConfigTester
PipelineTesterMixin = _pipeline.PipelineTesterMixin
GenerationTesterMixin = generation.GenerationTesterMixin
EAGER_AND_SDPA_CASES = _modeling.TEST_EAGER_MATCHES_SDPA_INFERENCE_PARAMETERIZATION
