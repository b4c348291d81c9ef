"""The paper's network, single device: it knows nothing of parallelism, data or training."""

from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.heads import (
    MegatronBertForCausalLM,
    MegatronBertForMaskedLM,
    MegatronBertForMultipleChoice,
    MegatronBertForNextSentencePrediction,
    MegatronBertForPreTraining,
    MegatronBertForQuestionAnswering,
    MegatronBertForSequenceClassification,
    MegatronBertForTokenClassification,
)
from megatron_bert.model.modeling import MegatronBertModel, MegatronBertPreTrainedModel
from megatron_bert.model.outputs import MegatronBertForPreTrainingOutput

__all__ = [
    "MegatronBertConfig",
    "MegatronBertForCausalLM",
    "MegatronBertForMaskedLM",
    "MegatronBertForMultipleChoice",
    "MegatronBertForNextSentencePrediction",
    "MegatronBertForPreTraining",
    "MegatronBertForPreTrainingOutput",
    "MegatronBertForQuestionAnswering",
    "MegatronBertForSequenceClassification",
    "MegatronBertForTokenClassification",
    "MegatronBertModel",
    "MegatronBertPreTrainedModel",
]
