"""The one output class that Transformers has no general name for."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput

__all__ = ["MegatronBertForPreTrainingOutput"]


@dataclass
class MegatronBertForPreTrainingOutput(ModelOutput):
    """What `MegatronBertForPreTraining` returns.

    `loss`: scalar, the sum of the losses whose labels were given. `prediction_logits`: (B, S, vocabulary).
    `seq_relationship_logits`: (B, 2), None without a binary head. `hidden_states`, `attentions`: one tensor a layer.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
