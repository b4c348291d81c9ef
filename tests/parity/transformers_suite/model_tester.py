"""What Transformers' common tests ask of a model's own test file: a tiny configuration and inputs for it.

B batch, S sequence, D hidden.
"""

import unittest
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.testing_utils import torch_device

from megatron_bert import (  # registers them with the Auto classes
    MegatronBertConfig,
    MegatronBertForCausalLM,
    MegatronBertForMaskedLM,
    MegatronBertForMultipleChoice,
    MegatronBertForNextSentencePrediction,
    MegatronBertForPreTraining,
    MegatronBertForQuestionAnswering,
    MegatronBertForSequenceClassification,
    MegatronBertForTokenClassification,
    MegatronBertModel,
)

ALL_CLASSES = (
    MegatronBertModel,
    MegatronBertForMaskedLM,
    MegatronBertForCausalLM,
    MegatronBertForMultipleChoice,
    MegatronBertForNextSentencePrediction,
    MegatronBertForPreTraining,
    MegatronBertForQuestionAnswering,
    MegatronBertForSequenceClassification,
    MegatronBertForTokenClassification,
)

Inputs = dict[str, torch.Tensor]


class EncoderTester:
    """Tiny encoder configuration and random inputs. The attributes' names are those that the mixins read."""

    base_model_class = MegatronBertModel
    causal_lm_class = MegatronBertForCausalLM
    configuration: ClassVar[dict[str, Any]] = {}

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.batch_size = 5
        self.seq_length = 7
        self.is_training = True
        self.vocab_size = 99
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.num_choices = 3
        self.num_labels = 3

    def get_config(self) -> MegatronBertConfig:
        return MegatronBertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=48,
            max_position_embeddings=64,
            type_vocab_size=3,
            **self.configuration,
        )

    def random_ids(self, *shape: int, below: int | None = None) -> torch.Tensor:
        return torch.randint(below or self.vocab_size, shape, device=torch_device)

    def random_mask(self, length: int) -> torch.Tensor:
        """A mask (B, length) of ones and zeros; the first column is all ones, so that every query sees something."""
        mask = self.random_ids(self.batch_size, length, below=2)
        mask[:, 0] = 1
        return mask

    def prepare_config_and_inputs_for_common(self) -> tuple[MegatronBertConfig, Inputs]:
        shape = (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": self.random_ids(*shape),
            "token_type_ids": self.random_ids(*shape, below=3),
            "attention_mask": self.random_mask(self.seq_length),
        }
        return self.get_config(), inputs


class DecoderTester(EncoderTester):
    """The same with the causal mask and the key/value cache."""

    configuration: ClassVar[dict[str, Any]] = {"is_decoder": True}


class CrossAttentionDecoderTester(EncoderTester):
    """A decoder that attends to an encoder's output of another length than its own."""

    configuration: ClassVar[dict[str, Any]] = {"is_decoder": True, "add_cross_attention": True}

    def __init__(self, parent: unittest.TestCase) -> None:
        super().__init__(parent)
        self.cross_length = 9

    def prepare_config_and_inputs_for_common(self) -> tuple[MegatronBertConfig, Inputs]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        encoder_hidden_BSD = torch.rand(self.batch_size, self.cross_length, self.hidden_size, device=torch_device)
        inputs["encoder_hidden_states"] = encoder_hidden_BSD
        inputs["encoder_attention_mask"] = self.random_mask(self.cross_length)
        return config, inputs


class FamilyMixin:
    """What the common tests do not know of this family; goes before ModelTesterMixin."""

    model_tester: EncoderTester

    def _prepare_for_class(self, inputs_dict: Inputs, model_class: type, return_labels: bool = False) -> Inputs:
        """The two kinds of label of MegatronBertForPreTraining are the one thing that the mixin does not add itself."""
        inputs: Inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is MegatronBertForPreTraining:
            shape = (self.model_tester.batch_size, self.model_tester.seq_length)
            inputs["labels"] = torch.zeros(shape, dtype=torch.long, device=torch_device)
            inputs["next_sentence_label"] = torch.zeros(shape[0], dtype=torch.long, device=torch_device)
        return inputs

    def test_sdpa_can_dispatch_composite_models(self) -> None:
        """The mixin skips this one for a model that is not composite, and says "does not support SDPA". So, instead:
        every part of every class is on SDPA by default, and there is one configuration.
        """
        for model_class in self.all_model_classes:
            config, _ = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config)
            parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
            self.assertTrue(all(part._supports_sdpa for part in parts))
            self.assertEqual({part.config._attn_implementation for part in parts}, {"sdpa"})
            self.assertEqual(config.sub_configs, {})
