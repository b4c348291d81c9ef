"""Transformers' mixins, imported. `tiny_models` writes the table that the pipeline mixin reads on import."""

import importlib
import os
from types import ModuleType

from . import tiny_models
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
        module = importlib.import_module(f"{PACKAGE}.test_pipeline_mixin")
    finally:
        if before is None:
            del os.environ["TRANSFORMERS_TINY_MODEL_PATH"]
        else:
            os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = before
    for task, check in pipelines.CHECKS.items():
        module.pipeline_test_mapping[task]["test"] = f"{check.__module__}.{check.__qualname__}"
    return module


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

TrainingTesterMixin = _training.TrainingTesterMixin
TensorParallelTesterMixin = _tensor_parallel.TensorParallelTesterMixin
