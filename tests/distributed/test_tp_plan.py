"""Transformers' tensor parallelism takes our classes: the sharding table is their plan."""

import pytest
import transformers

from tests.distributed import inference_cases as cases
from tests.integration.tiny_model import write_tiny_model


@pytest.mark.parametrize(
    ("name", "as_configuration"),
    [("MegatronBertForMaskedLM", False), ("MegatronBertForPreTraining", True)],  # the first way is going away
)
def test_from_pretrained_with_a_plan(world, tmp_path, name, as_configuration):
    pytest.importorskip("accelerate")
    write_tiny_model(tmp_path, model_class=getattr(transformers, name), vocab_size=128)
    world(2).run(cases.transformers_plan_equals_its_own_class, tmp_path, name, as_configuration=as_configuration)
