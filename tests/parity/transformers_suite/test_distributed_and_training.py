"""Transformers' own training and tensor-parallel mixins over the decoder (they know causal language models only)."""

import unittest
from typing import Any

from .model_tester import ALL_CLASSES, DecoderTester, MegatronBertConfig
from .upstream import TENSOR_PARALLEL_IN_OUR_PROCESSES, TensorParallelTesterMixin, TrainingTesterMixin


class TrainingTest(TrainingTesterMixin, unittest.TestCase):
    """A tiny model learns one batch by heart."""

    all_model_classes = ALL_CLASSES
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = DecoderTester(self)


@unittest.skipUnless(TENSOR_PARALLEL_IN_OUR_PROCESSES, "starts its processes itself")
class TensorParallelTest(TensorParallelTesterMixin, unittest.TestCase):
    """Tensor parallel: 2 processes, forward, backward and generation equal to one process within 1e-5."""

    all_model_classes = ALL_CLASSES
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = DecoderTester(self)

    def _get_tp_config(self, *args: Any, **options: Any) -> MegatronBertConfig:
        """No dropout: in training, two processes draw other numbers than one."""
        config = super()._get_tp_config(*args, **options)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        return config
