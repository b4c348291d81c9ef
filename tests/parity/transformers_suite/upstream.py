"""Transformers' mixins, imported. `tiny_models` writes the table that the pipeline mixin reads on import."""

import importlib
import os
import re
from types import ModuleType

from . import tiny_models
from .fetch import suite_root
from .package import PACKAGE, install
from .stand_ins import configuration, distributed, export, generation, pipelines

STAND_INS = {
    "distributed_testing_utils": distributed,
    "exporters.test_export": export,
    "generation.test_utils": generation,
    "utils.test_configuration_utils": configuration,
}


def _import_pipeline_mixin() -> ModuleType:
    """The pipeline mixin, told to take its tiny models and its checks of a pipeline from us."""
    before = os.environ.get("TRANSFORMERS_TINY_MODEL_PATH")
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(tiny_models.directory())
    try:
        install(_named_pipeline_tests())
        module = importlib.import_module(f"{PACKAGE}.test_pipeline_mixin")
    finally:
        if before is None:
            del os.environ["TRANSFORMERS_TINY_MODEL_PATH"]
        else:
            os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = before
    for task, check in pipelines.CHECKS.items():
        by_name = isinstance(module.pipeline_test_mapping[task]["test"], str)
        module.pipeline_test_mapping[task]["test"] = f"{check.__module__}.{check.__qualname__}" if by_name else check
    return module


def _named_pipeline_tests() -> dict[str, ModuleType]:
    """Empty classes under the names that the pipeline mixin imports at its top (it does so in Transformers 5.17)."""
    source = (suite_root() / "tests" / "test_pipeline_mixin.py").read_text(encoding="utf-8")
    modules = {}
    for name, cls in re.findall(r"^from \.(pipelines\.\w+) import (\w+)$", source, re.MULTILINE):
        modules[name] = ModuleType(name)
        setattr(modules[name], cls, type(cls, (), {}))
    return modules


install(STAND_INS)
_modeling = importlib.import_module(f"{PACKAGE}.test_modeling_common")
_configuration = importlib.import_module(f"{PACKAGE}.test_configuration_common")
_pipeline = _import_pipeline_mixin()

ModelTesterMixin = _modeling.ModelTesterMixin
ConfigTester = _configuration.ConfigTester
PipelineTesterMixin = _pipeline.PipelineTesterMixin
GenerationTesterMixin = generation.GenerationTesterMixin
EAGER_AND_SDPA_CASES = _modeling.TEST_EAGER_MATCHES_SDPA_INFERENCE_PARAMETERIZATION

# Two more mixins of Transformers' own: a tiny model learns one batch by heart; its tensor-parallel plan really runs.
_training = importlib.import_module(f"{PACKAGE}.test_training_mixin")
_tensor_parallel = importlib.import_module(f"{PACKAGE}.test_tensor_parallel_mixin")
_tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None  # its list of model types that are worth the time: ours too

TENSOR_PARALLEL_IN_OUR_PROCESSES = hasattr(_tensor_parallel, "run_distributed")
TrainingTesterMixin = _training.TrainingTesterMixin
TensorParallelTesterMixin = _tensor_parallel.TensorParallelTesterMixin
