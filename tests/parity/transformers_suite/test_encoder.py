"""Transformers' common tests over our nine classes, as an encoder."""

import unittest

from . import tiny_models
from .model_tester import (
    ALL_CLASSES,
    EncoderTester,
    FamilyMixin,
    MegatronBertConfig,
    MegatronBertForCausalLM,
    MegatronBertForMaskedLM,
    MegatronBertForSequenceClassification,
    MegatronBertForTokenClassification,
    MegatronBertModel,
)
from .upstream import ConfigTester, ModelTesterMixin, PipelineTesterMixin


class EncoderModelTest(FamilyMixin, ModelTesterMixin, PipelineTesterMixin, unittest.TestCase):
    all_model_classes = ALL_CLASSES
    all_generative_model_classes = ()  # an encoder sees both sides; the decoder configurations generate
    pipeline_model_mapping = {  # noqa: RUF012  (the mixin's own attribute)
        "feature-extraction": MegatronBertModel,
        "fill-mask": MegatronBertForMaskedLM,
        "text-classification": MegatronBertForSequenceClassification,
        "text-generation": MegatronBertForCausalLM,
        "token-classification": MegatronBertForTokenClassification,
        "zero-shot": MegatronBertForSequenceClassification,
    }
    _torch_compile_train_cls = MegatronBertForMaskedLM
    test_can_init_all_missing_weights_before_2023 = True  # ask for the test that old models may leave out

    @classmethod
    def setUpClass(cls) -> None:
        tiny_models.save_models()

    def setUp(self) -> None:
        self.model_tester = EncoderTester(self)


class ConfigurationTest(unittest.TestCase):
    def test_config(self) -> None:
        for options in ({}, {"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}):
            with self.subTest(**options):
                tester = ConfigTester(
                    self, config_class=MegatronBertConfig, hidden_size=36, num_attention_heads=4, **options
                )
                tester.run_common_tests()
