"""The eight heads. They share one path, `HeadModel._run`; a head says what it predicts and what its loss is.

B batch, S sequence, D hidden, V vocabulary, L labels.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.layers import (
    MegatronBertOnlyMLMHead,
    MegatronBertOnlyNSPHead,
    MegatronBertPreTrainingHeads,
)
from megatron_bert.model.linear import Linear
from megatron_bert.model.modeling import MegatronBertModel, MegatronBertPreTrainedModel
from megatron_bert.model.outputs import MegatronBertForPreTrainingOutput
from megatron_bert.model.packing import PackedLayout
from megatron_bert.sharding import transformers_plan

__all__ = [
    "MegatronBertForCausalLM",
    "MegatronBertForMaskedLM",
    "MegatronBertForMultipleChoice",
    "MegatronBertForNextSentencePrediction",
    "MegatronBertForPreTraining",
    "MegatronBertForQuestionAnswering",
    "MegatronBertForSequenceClassification",
    "MegatronBertForTokenClassification",
]

logger = logging.get_logger(__name__)

_RECORDED = ("past_key_values", "hidden_states", "attentions", "cross_attentions")
_IGNORED = -100  # a label that does not count, PyTorch's and Transformers' convention
_LOGITS_BLOCK_TOKENS = 512  # logits are spread to the padded shape by this many tokens, to hold them once only


class HeadModel(MegatronBertPreTrainedModel):
    """A model under a head: runs it, asks the head for predictions and loss, and fills the head's output class."""

    output_class: ClassVar[type[ModelOutput]]
    labels_are_per_token: ClassVar[bool] = False
    accepts_loss_kwargs: ClassVar[bool] = False
    """Whether the loss is divided by `num_items_in_batch`; Transformers' Trainer divides the other losses itself."""

    bert: MegatronBertModel

    def _predictions(self, outputs: Any, layout: PackedLayout | None, for_loss: bool) -> dict[str, Tensor | None]:
        """The head's logits by field of its output class; `for_loss`: as they are, nothing taken out of the running."""
        raise NotImplementedError

    def _loss(self, predictions: dict[str, Any], labels: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """The loss of the labels that were given (none is missing here but those of optional parts)."""
        raise NotImplementedError

    def _run(
        self,
        inputs: dict[str, Any],
        labels: Mapping[str, Tensor | None],
        return_dict: bool | None,
        predict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`predict` are further arguments of this head's `_predictions`."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        given = {name: value for name, value in labels.items() if value is not None}
        layout = self._layout(inputs, given, **kwargs)
        arguments = {"use_cache": False, **kwargs, **inputs, "layout": layout, "unpad": layout is not None}
        outputs = self.bert(**arguments, return_dict=True)
        predictions = self._predictions(outputs, layout, self._is_for_loss(given, **kwargs), **(predict or {}))
        loss = self._loss(predictions, given, **kwargs) if given else None
        recorded = {name: outputs.get(name) for name in _RECORDED if hasattr(self.output_class, name)}
        result = self.output_class(loss=loss, **predictions, **recorded)
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def _layout(
        self, inputs: dict[str, Any], labels: dict[str, Tensor], unpad: bool = True, **kwargs: Any
    ) -> PackedLayout | None:
        """The layout without padding, unless that would change a loss: one with labels at padding is run padded."""
        elsewhere = ("encoder_hidden_states", "past_key_values", "cu_seq_lens_q")
        if not unpad or inputs.get("use_cache") or any(name in inputs or name in kwargs for name in elsewhere):
            return None
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        layout = self.bert.layout_without_padding(
            inputs.get("attention_mask"),
            inputs.get("output_attentions"),
            inputs.get("output_hidden_states"),
            batch_shape=None if tokens is None else tokens.shape[:2],
        )
        if layout is None or not self.labels_are_per_token or "labels" not in labels:
            return layout
        if labels["labels"].shape != layout.batch_shape:
            return None
        counted = (self._aligned(labels["labels"]) != _IGNORED) & (inputs["attention_mask"] == 0)
        return None if bool(counted.any()) else layout

    def _is_for_loss(
        self, labels: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None, **kwargs: Any
    ) -> bool:
        """Whether a loss is taken of the logits: here, or by who trains or gives a loss's divisor without labels."""
        trains = self.training and torch.is_grad_enabled()
        return len(labels) > 0 or trains or num_items_in_batch is not None

    def _aligned(self, labels: Tensor) -> Tensor:
        """(B, S): the labels at the positions that predict them."""
        return labels

    def _per_token(self, head: nn.Module, states: Tensor, layout: PackedLayout | None) -> Tensor:
        """A head of every token's state, at real tokens only: (B, S, D) -> (B, S, ...)."""
        if layout is None:
            return head(states)
        return layout.unpack_in_blocks(head, layout.pack(states), _LOGITS_BLOCK_TOKENS)

    def _without_padding_rows(self, logits: Tensor, for_loss: bool) -> Tensor:
        """Takes the vocabulary's padding rows, where they are known, out of the running for predictions."""
        if self.num_tokens is None or for_loss:
            return logits
        if logits.requires_grad and logits._is_view():  # put together from ranks' parts: autograd wants a copy of that
            logits = logits.clone()
        logits[..., self.num_tokens :] = torch.finfo(logits.dtype).min
        return logits


class _LanguageModel(HeadModel):
    """What the three classes with a projection onto the vocabulary share."""

    labels_are_per_token = True
    accepts_loss_kwargs = True
    cls: Any
    _tied_weights_keys: ClassVar = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    _tp_plan: ClassVar = transformers_plan(head=True)

    def get_output_embeddings(self) -> nn.Module:
        """The projection onto the vocabulary."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Puts another projection in, and its bias."""
        self.cls.predictions.decoder = new_embeddings
        bias: Any = new_embeddings.bias
        if bias is not None and not self.config.tie_word_embeddings:  # of one parameter, one name only would be saved
            bias = nn.Parameter(bias.detach().clone())
        self.cls.predictions.bias = bias


class MegatronBertForMaskedLM(_LanguageModel):
    """Predicts the tokens behind `[MASK]`: logits (B, S, V); the loss is the mean over labels other than -100."""

    output_class = MaskedLMOutput

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__(config)
        if config.is_decoder:
            logger.warning("MegatronBertForMaskedLM with is_decoder=True looks to the left only: set is_decoder=False.")
        self.bert = MegatronBertModel(config, add_pooling_layer=False)
        self.cls = MegatronBertOnlyMLMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | MaskedLMOutput:
        """Logits of every position and, with `labels` (B, S) of token ids or -100, the masked-language-model loss."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self._run(inputs, {"labels": labels}, return_dict, **kwargs)

    def _predictions(self, outputs: Any, layout: PackedLayout | None, for_loss: bool) -> dict[str, Tensor | None]:
        logits = self._per_token(self.cls, outputs.last_hidden_state, layout)
        return {"logits": self._without_padding_rows(logits, for_loss)}

    def _loss(self, predictions: dict[str, Any], labels: dict[str, Tensor], **kwargs: Any) -> Tensor:
        return _token_loss(predictions["logits"], labels["labels"], **kwargs)


class MegatronBertForCausalLM(_LanguageModel, GenerationMixin):
    """Predicts the next token: logits (B, S, V). A decoder, with a key/value cache and `generate`."""

    output_class = CausalLMOutputWithCrossAttentions

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__(config)
        if not config.is_decoder:
            logger.warning(
                "MegatronBertForCausalLM without is_decoder=True sees the tokens it predicts: set is_decoder=True."
            )
        self.bert = MegatronBertModel(config, add_pooling_layer=False)
        self.cls = MegatronBertOnlyMLMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> tuple[Any, ...] | CausalLMOutputWithCrossAttentions:
        """Logits of every position (or of `logits_to_keep`) and, with `labels` (B, S), their loss, shifted by one."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values,
            "use_cache": self._uses_cache(use_cache) and labels is None,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self._run(inputs, {"labels": labels}, return_dict, {"logits_to_keep": logits_to_keep}, **kwargs)

    def _uses_cache(self, use_cache: bool | None) -> bool:
        return self.config.is_decoder and (self.config.use_cache if use_cache is None else use_cache)

    def _aligned(self, labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=_IGNORED)

    def _predictions(
        self, outputs: Any, layout: PackedLayout | None, for_loss: bool, logits_to_keep: int | Tensor = 0
    ) -> dict[str, Tensor | None]:
        states = outputs.last_hidden_state
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            logits = self._per_token(self.cls, states, layout)
        else:
            logits = self.cls(_kept(states, logits_to_keep))
        return {"logits": self._without_padding_rows(logits, for_loss)}

    def _loss(self, predictions: dict[str, Any], labels: dict[str, Tensor], **kwargs: Any) -> Tensor:
        logits = predictions["logits"]
        return self.loss_function(logits=logits, labels=labels["labels"], vocab_size=self.config.vocab_size, **kwargs)


class MegatronBertForPreTraining(_LanguageModel):
    """Both objectives of pretraining: masked tokens (B, S, V) and the sentence pair (B, 2).

    `add_binary_head=False` leaves the pair's head and the pooler out: no weights, no `seq_relationship_logits`.
    """

    output_class = MegatronBertForPreTrainingOutput
    accepts_loss_kwargs = False  # the number of masked tokens says nothing of the pairs

    def __init__(self, config: MegatronBertConfig, add_binary_head: bool = True) -> None:
        super().__init__(config)
        self.bert = MegatronBertModel(config, add_pooling_layer=add_binary_head)
        self.cls = MegatronBertPreTrainingHeads(config, add_binary_head)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        next_sentence_label: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | MegatronBertForPreTrainingOutput:
        """Both logits, and the sum of the losses of `labels` (B, S) and `next_sentence_label` (B,), as given.

        Raises:
            ValueError: for `next_sentence_label` given to a model without a binary head.
        """
        if next_sentence_label is not None and self.cls.seq_relationship is None:
            raise ValueError("next_sentence_label needs the binary head, and this model has add_binary_head=False")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        labels_by_name = {"labels": labels, "next_sentence_label": next_sentence_label}
        return self._run(inputs, labels_by_name, return_dict, **kwargs)

    def _predictions(self, outputs: Any, layout: PackedLayout | None, for_loss: bool) -> dict[str, Tensor | None]:
        logits = self._per_token(self.cls.predictions, outputs.last_hidden_state, layout)
        pair_head = self.cls.seq_relationship
        return {
            "prediction_logits": self._without_padding_rows(logits, for_loss),
            "seq_relationship_logits": None if pair_head is None else pair_head(outputs.pooler_output),
        }

    def _loss(self, predictions: dict[str, Any], labels: dict[str, Tensor], **kwargs: Any) -> Tensor:
        losses = []
        if "labels" in labels:
            losses.append(_token_loss(predictions["prediction_logits"], labels["labels"], **kwargs))
        if "next_sentence_label" in labels:
            pair_logits = predictions["seq_relationship_logits"].view(-1, 2)
            losses.append(F.cross_entropy(pair_logits, labels["next_sentence_label"].view(-1)))
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


class _LabelledModel(HeadModel):
    """What the classes with Transformers' common signature share."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits and, with `labels`, their loss, in this class's output; a tuple with `return_dict=False`."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self._run(inputs, {"labels": labels}, return_dict, **kwargs)


class MegatronBertForNextSentencePrediction(_LabelledModel):
    """Whether the second sentence follows the first: logits (B, 2), label 0 where it does."""

    output_class = NextSentencePredictorOutput

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__(config)
        self.bert = MegatronBertModel(config)
        self.cls = MegatronBertOnlyNSPHead(config)
        self.post_init()

    def _predictions(self, outputs: Any, layout: PackedLayout | None, for_loss: bool) -> dict[str, Tensor | None]:
        return {"logits": self.cls(outputs.pooler_output)}

    def _loss(self, predictions: dict[str, Any], labels: dict[str, Tensor], **kwargs: Any) -> Tensor:
        return F.cross_entropy(predictions["logits"].view(-1, 2), labels["labels"].view(-1))


class MegatronBertForSequenceClassification(_LabelledModel):
    """Classifies or rates a text: logits (B, L). One label is a regression, float labels are multi-label."""

    output_class = SequenceClassifierOutput

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MegatronBertModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def _predictions(self, outputs: Any, layout: PackedLayout | None, for_loss: bool) -> dict[str, Tensor | None]:
        return {"logits": self.classifier(self.dropout(outputs.pooler_output))}

    def _loss(self, predictions: dict[str, Any], labels: dict[str, Tensor], **kwargs: Any) -> Tensor:
        given: dict[str, Any] = {"labels": labels["labels"], "pooled_logits": predictions["logits"]}
        if self.num_labels == self.config.num_labels:
            return self.loss_function(**given, config=self.config)
        config = copy.copy(self.config)  # another classifier was put in: the model's number is what counts
        config.num_labels = self.num_labels  # type: ignore[assignment]
        loss: Tensor = self.loss_function(**given, config=config)
        self.config.problem_type = config.problem_type
        return loss


class MegatronBertForMultipleChoice(_LabelledModel):
    """Chooses among C texts: inputs (B, C, S), logits (B, C)."""

    output_class = MultipleChoiceModelOutput

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__(config)
        self.bert = MegatronBertModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = Linear(config.hidden_size, 1)
        self.post_init()

    def _run(
        self,
        inputs: dict[str, Any],
        labels: Mapping[str, Tensor | None],
        return_dict: bool | None,
        predict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        texts = inputs["input_ids"] if inputs["input_ids"] is not None else inputs["inputs_embeds"]
        if texts is None:
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        # Of fewer dimensions are what holds for all texts, such as positions (S,).
        nested = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim > 2}
        flat = {name: value.flatten(0, 1) if name in nested else value for name, value in inputs.items()}
        return super()._run(flat, labels, return_dict, {"num_choices": texts.shape[1]}, **kwargs)

    def _predictions(
        self, outputs: Any, layout: PackedLayout | None, for_loss: bool, num_choices: int = 1
    ) -> dict[str, Tensor | None]:
        return {"logits": self.classifier(self.dropout(outputs.pooler_output)).view(-1, num_choices)}

    def _loss(self, predictions: dict[str, Any], labels: dict[str, Tensor], **kwargs: Any) -> Tensor:
        return F.cross_entropy(predictions["logits"], labels["labels"])


class MegatronBertForTokenClassification(_LabelledModel):
    """Labels every token: logits (B, S, L)."""

    output_class = TokenClassifierOutput
    labels_are_per_token = True
    accepts_loss_kwargs = True

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MegatronBertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def _predictions(self, outputs: Any, layout: PackedLayout | None, for_loss: bool) -> dict[str, Tensor | None]:
        return {"logits": self._per_token(self.classifier, self.dropout(outputs.last_hidden_state), layout)}

    def _loss(self, predictions: dict[str, Any], labels: dict[str, Tensor], **kwargs: Any) -> Tensor:
        return _token_loss(predictions["logits"], labels["labels"], **kwargs)


class MegatronBertForQuestionAnswering(HeadModel):
    """Finds an answer in a text: start and end logits, (B, S) each.

    Padding cannot be an answer's start or end: its logits are the smallest of their type. With labels, and in training,
    a batch is run padded, since Transformers' loss counts the logits at padding.
    """

    output_class = QuestionAnsweringModelOutput

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MegatronBertModel(config, add_pooling_layer=False)
        self.qa_outputs = Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | QuestionAnsweringModelOutput:
        """Both logits and, with both positions (B,), the mean of their losses; positions beyond S do not count."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        labels: Mapping[str, Tensor | None] = {}
        if start_positions is not None and end_positions is not None:
            labels = {"start_positions": start_positions, "end_positions": end_positions}
        return self._run(inputs, labels, return_dict, **kwargs)

    def _layout(
        self, inputs: dict[str, Any], labels: dict[str, Tensor], unpad: bool = True, **kwargs: Any
    ) -> PackedLayout | None:
        return super()._layout(inputs, labels, unpad and not self._is_for_loss(labels, **kwargs), **kwargs)

    def _predictions(self, outputs: Any, layout: PackedLayout | None, for_loss: bool) -> dict[str, Tensor | None]:
        logits = self._per_token(self.qa_outputs, outputs.last_hidden_state, layout)
        if layout is not None:
            real = layout.unpack(torch.ones_like(logits[:1, :1, :1]).expand(1, sum(layout.lengths), 1))
            logits = logits.masked_fill(real == 0, torch.finfo(logits.dtype).min)
        start_logits, end_logits = (part.squeeze(-1).contiguous() for part in logits.split(1, dim=-1))
        return {"start_logits": start_logits, "end_logits": end_logits}

    def _loss(self, predictions: dict[str, Any], labels: dict[str, Tensor], **kwargs: Any) -> Tensor:
        return self.loss_function(**predictions, **labels)


def _token_loss(
    logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
) -> Tensor:
    """Cross-entropy of the labels that count: the mean, or the sum over the global number that a trainer gives."""
    flat_logits, flat_labels = logits.flatten(0, -2), labels.flatten().to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(flat_logits, flat_labels, ignore_index=_IGNORED)
    return F.cross_entropy(flat_logits, flat_labels, ignore_index=_IGNORED, reduction="sum") / num_items_in_batch


def _kept(states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The states at the last positions, at a given position or positions, or under a boolean (B, S) mask."""
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:]
    if logits_to_keep.ndim < 2:
        return states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return states[logits_to_keep]
    return torch.take_along_dim(states, logits_to_keep[..., None], dim=1)
