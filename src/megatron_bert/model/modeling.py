"""`MegatronBertModel`: embeddings, layers and pooler, run padded or on the real tokens only.

B batch, S sequence, T real tokens, D hidden.
"""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, packed_sequence_mask_function
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from megatron_bert.model.attention import runs_packed
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.layers import (
    MegatronBertEmbeddings,
    MegatronBertEncoder,
    MegatronBertLayer,
    MegatronBertLMPredictionHead,
    MegatronBertPooler,
    MegatronBertSelfAttention,
)
from megatron_bert.model.loading import LoadingMixin
from megatron_bert.model.packing import (
    PackedLayout,
    layout_of_boundaries,
    layout_of_padding,
    layout_of_positions,
    restarting_positions,
    sequence_ids,
    sequence_ids_of_positions,
    sequence_starts,
)

__all__ = ["MegatronBertModel", "MegatronBertPreTrainedModel"]

logger = logging.get_logger(__name__)


class MegatronBertPreTrainedModel(LoadingMixin, PreTrainedModel):
    """What the nine classes share: configuration, initialisation, loading and what they support."""

    config: MegatronBertConfig
    config_class = MegatronBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["MegatronBertEmbeddings", "MegatronBertLayer"]
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"position_ids$"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar = {
        "hidden_states": MegatronBertLayer,
        "attentions": OutputRecorder(MegatronBertSelfAttention, index=1, layer_name=".attention"),
        "cross_attentions": OutputRecorder(MegatronBertSelfAttention, index=1, layer_name=".crossattention"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, `initializer_range`) for weights, 0 for biases and the padding row, 1 for norms: Transformers' rules."""
        super()._init_weights(module)
        if isinstance(module, MegatronBertLMPredictionHead):
            init.zeros_(module.bias)
        elif isinstance(module, MegatronBertEmbeddings):
            positions = torch.arange(module.position_ids.shape[-1], device=module.position_ids.device)
            init.copy_(module.position_ids, positions.expand((1, -1)))


class MegatronBertModel(MegatronBertPreTrainedModel):
    """MegatronBERT without a head: hidden states, and the first token's pooled where there is a pooler.

    An encoder, or with `is_decoder` a decoder with causal attention and a cache, with `add_cross_attention` one that
    attends to an encoder's states too.

    `unpad`: where a batch has padding, run on its real tokens only. It changes no value at a real position; padding
    positions come back as zeros. Set it to False on a model to run padded always.
    """

    unpad: bool = True

    def __init__(self, config: MegatronBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.config = config
        self.embeddings = MegatronBertEmbeddings(config)
        self.encoder = MegatronBertEncoder(config)
        self.pooler = MegatronBertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Puts other word embeddings in."""
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | BaseModelOutputWithPoolingAndCrossAttentions:
        """Runs the model; arguments and outputs are Transformers'.

        Packed rows are given as Transformers spells them: `cu_seq_lens_q` (the sequences' boundaries, with
        `position_ids` that restart; computed where absent), or `position_ids` alone that restart from 0 within a row.
        Their `pooler_output` has one row a sequence, for which a compiled model needs the boundaries.

        Raises:
            ValueError: for both or neither of `input_ids` and `inputs_embeds`, or too many tokens for its positions.
        """
        config = self.config
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if use_cache is None:
            use_cache = config.use_cache
        outputs = self._recorded_forward(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            use_cache=use_cache and config.is_decoder,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        if output_attentions and not config.add_cross_attention:
            recorded = {name: value for name, value in outputs.items() if name != "cross_attentions"}
            outputs = BaseModelOutputWithPoolingAndCrossAttentions(**recorded)
        return outputs if (config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    @capture_outputs
    def _recorded_forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        past_key_values: Cache | None,
        *,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool | int | list[int],
        cu_seq_lens_q: Tensor | None = None,
        layout: PackedLayout | None = None,
        unpad: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        batch_shape = (tokens.shape[0], tokens.shape[1])
        packed_rows, packed_positions = None, None
        if layout is None and attention_mask is None and past_key_values is None:
            packed_rows = _layout_of_packed_rows(position_ids, cu_seq_lens_q, batch_shape)
            packed_positions = position_ids
        past_key_values = self._prepare_cache(past_key_values, use_cache, encoder_hidden_states)
        boundaries = cu_seq_lens_q if packed_rows is None else packed_rows.cu_seq_lens
        if position_ids is None:
            position_ids = self._positions(past_key_values, boundaries, batch_shape)

        plain = layout is None and encoder_hidden_states is None and past_key_values is None
        if plain and boundaries is None and unpad:
            layout = self.layout_without_padding(
                attention_mask, output_attentions, output_hidden_states, batch_shape=batch_shape
            )
        elif plain and packed_rows is not None and self._can_pack(output_attentions, output_hidden_states):
            layout = packed_rows

        if token_type_ids is not None:
            token_type_ids = token_type_ids.expand(batch_shape)
        words = self.embeddings.word_embeddings
        if layout is not None and input_ids is not None and words._forward_hooks:
            # Hooks on the words see the batch as it was given: the noise of Trainer's NEFTune goes by its length.
            input_ids, inputs_embeds = None, words(input_ids)
        embedded = (input_ids, token_type_ids, position_ids.expand(batch_shape), inputs_embeds)
        if layout is not None:
            embeddings = self.embeddings(*(None if states is None else layout.pack(states) for states in embedded))
            hidden_states = layout.unpack(self.encoder(embeddings, layout=layout))
        else:
            embeddings = self.embeddings(*embedded)
            sequences = _sequences_of_packed_rows(packed_positions, boundaries, batch_shape)
            hidden_states = self.encoder(
                embeddings,
                self._mask(embeddings, attention_mask, past_key_values, sequences, output_attentions),
                encoder_hidden_states,
                self._cross_mask(embeddings, encoder_attention_mask, encoder_hidden_states, output_attentions),
                past_key_values,
                output_attentions=output_attentions,
            )
        starts = hidden_states if boundaries is None else sequence_starts(hidden_states, boundaries)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states,
            pooler_output=None if self.pooler is None else self.pooler(starts),
            past_key_values=past_key_values if use_cache else None,
        )

    def layout_without_padding(
        self,
        attention_mask: Tensor | None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        *,
        batch_shape: tuple[int, ...] | None = None,
    ) -> PackedLayout | None:
        """The layout in which an encoder's batch with this (B, S) mask is run; None where it is run padded.

        Run padded as well are a mask that is not of `batch_shape`, of which Transformers says what it is good for, and
        texts padded on the left under a pooler, which reads the first place, padding or not.
        """
        if not self.unpad or not self._can_pack(output_attentions, output_hidden_states):
            return None
        if attention_mask is not None and batch_shape is not None and attention_mask.shape != batch_shape:
            return None
        return layout_of_padding(attention_mask, keeps_starts=self.pooler is not None)

    def _can_pack(self, output_attentions: bool | None, output_hidden_states: bool | int | list[int] | None) -> bool:
        """Whether nothing is asked for that only padded execution gives."""
        recorded = (
            (output_attentions, self.config.output_attentions),
            (output_hidden_states, self.config.output_hidden_states),
        )
        wanted = any(default if given is None else given is not False for given, default in recorded)
        return not wanted and runs_packed(self.config._attn_implementation)

    def _prepare_cache(
        self, past_key_values: Cache | None, use_cache: bool, encoder_hidden_states: Tensor | None
    ) -> Cache | None:
        """The caller's cache or a new one, with room for cross-attention where there is an encoder."""
        if self.encoder.gradient_checkpointing and self.training:
            use_cache = False
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is None or encoder_hidden_states is None or isinstance(past_key_values, EncoderDecoderCache):
            return past_key_values
        return EncoderDecoderCache(past_key_values, DynamicCache(config=self.config))

    def _positions(
        self, past_key_values: Cache | None, boundaries: Tensor | None, batch_shape: tuple[int, int]
    ) -> Tensor:
        """(1 or B, S): positions that go on from the cache, or restart with each sequence of packed rows."""
        if boundaries is not None:
            return restarting_positions(boundaries, batch_shape)
        past: int | Tensor = 0 if past_key_values is None else past_key_values.get_seq_length()
        available: Tensor = self.embeddings.position_ids
        if isinstance(past, Tensor):  # a static cache counts on the device
            return available[:, : batch_shape[1]] + past
        if past + batch_shape[1] > available.shape[1]:
            raise ValueError(
                f"{past + batch_shape[1]} tokens do not fit this model's {available.shape[1]} positions: "
                "truncate the text or split it"
            )
        return available[:, past : past + batch_shape[1]]

    def _mask(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        sequences_BS: Tensor | None,
        output_attentions: bool,
    ) -> Any:
        """The self-attention mask as the implementation takes it: causal for decoders, one block a sequence."""
        same_sequence = None if sequences_BS is None else packed_sequence_mask_function(sequences_BS)
        create_mask = create_causal_mask if self.config.is_decoder else create_bidirectional_mask
        return create_mask(
            config=self._mask_config(output_attentions),
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values if self.config.is_decoder else None,
            and_mask_function=same_sequence,
        )

    def _cross_mask(
        self,
        embeddings: Tensor,
        encoder_attention_mask: Tensor | None,
        encoder_hidden_states: Tensor | None,
        output_attentions: bool,
    ) -> Any:
        """The mask of the encoder's padding, for any length of encoder sequence."""
        if encoder_attention_mask is None or encoder_hidden_states is None:
            return None
        return create_bidirectional_mask(
            config=self._mask_config(output_attentions),
            inputs_embeds=embeddings,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )

    def _mask_config(self, output_attentions: bool) -> MegatronBertConfig:
        """The configuration that masks are made for: attention probabilities come from the eager kernel alone."""
        if not output_attentions or self.config._attn_implementation in ("eager", "sdpa"):
            return self.config
        eager = copy.copy(self.config)
        eager._attn_implementation_internal = "eager"
        return eager


def _layout_of_packed_rows(
    position_ids: Tensor | None, cu_seq_lens: Tensor | None, batch_shape: tuple[int, int]
) -> PackedLayout | None:
    """The layout of rows that came packed; None for plain rows, and while a graph is traced."""
    if cu_seq_lens is not None:
        return None if is_tracing(cu_seq_lens) else layout_of_boundaries(cu_seq_lens, batch_shape)
    if position_ids is None or position_ids.ndim != 2:
        return None
    return layout_of_positions(position_ids.expand(batch_shape))


def _sequences_of_packed_rows(
    position_ids: Tensor | None, cu_seq_lens: Tensor | None, batch_shape: tuple[int, int]
) -> Tensor | None:
    """(B, S): the numbers of the tokens' sequences; None for plain rows.

    Of a graph that is traced, positions alone give them too: its rows may be plain in one call and packed in the next.
    """
    if cu_seq_lens is not None:
        return sequence_ids(cu_seq_lens, batch_shape)
    if position_ids is None or position_ids.ndim != 2 or not is_tracing(position_ids):
        return None
    return sequence_ids_of_positions(position_ids.expand(batch_shape))
