"""Transformers' common tests over our classes, as a decoder: causal, cached, with and without cross-attention."""

import unittest

from .model_tester import (
    ALL_CLASSES,
    CrossAttentionDecoderTester,
    DecoderTester,
    FamilyMixin,
    MegatronBertForCausalLM,
    MegatronBertModel,
)
from .upstream import GenerationTesterMixin, ModelTesterMixin


class DecoderModelTest(FamilyMixin, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = ALL_CLASSES
    export_classes = (MegatronBertModel, MegatronBertForCausalLM)  # the other heads are exported as encoders
    _torch_compile_train_cls = MegatronBertForCausalLM
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = DecoderTester(self)


class CrossAttentionDecoderModelTest(FamilyMixin, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (MegatronBertModel, MegatronBertForCausalLM)  # the two that take an encoder's output
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = CrossAttentionDecoderTester(self)
