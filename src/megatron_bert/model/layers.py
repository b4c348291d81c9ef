"""The paper's figure 7b: a BERT layer with the layer norms moved to the input of its two halves.

    x -> x + attention(norm(x)) -> + mlp(norm(.)) -> ...  and one norm after the last layer

There is no norm after the embeddings. Modules and weights have the names of Transformers' `megatron-bert`.

B batch, S sequence (or 1 and T packed tokens), D hidden, N heads, H head dimension, F feed-forward, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from megatron_bert.model.attention import attention_function, packed_attention
from megatron_bert.model.configuration import MegatronBertConfig
from megatron_bert.model.linear import Linear
from megatron_bert.model.packing import PackedLayout


class MegatronBertEmbeddings(nn.Module):
    """The sum of word, position and token-type embeddings, with dropout and without a norm."""

    position_ids: Tensor

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        positions = torch.arange(config.max_position_embeddings).expand((1, -1))
        self.register_buffer("position_ids", positions, persistent=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """(B, S) token ids or (B, S, D) embeddings -> (B, S, D); types are 0 and positions count up where absent."""
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if token_type_ids is None:
            # Type 0 everywhere. A lookup keeps the gradient's rows those of Transformers.
            token_type_ids = torch.zeros(inputs_embeds.shape[:-1], dtype=torch.long, device=inputs_embeds.device)
        if position_ids is None:
            position_ids = self.position_ids[:, : inputs_embeds.shape[1]]
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids)
        return self.dropout(embeddings + self.position_embeddings(position_ids))


class MegatronBertSelfAttention(nn.Module):
    """Multi-head attention of hidden states with themselves, or with an encoder's (cross-attention)."""

    def __init__(self, config: MegatronBertConfig, layer_idx: int = 0, is_cross_attention: bool = False) -> None:
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.scaling = self.attention_head_size**-0.5
        self.query = Linear(config.hidden_size, self.all_head_size)
        self.key = Linear(config.hidden_size, self.all_head_size)
        self.value = Linear(config.hidden_size, self.all_head_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.is_cross_attention = is_cross_attention
        self.is_causal = config.is_decoder and not is_cross_attention
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        output_attentions: bool = False,
        layout: PackedLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) -> (B, S, D), and the attention probabilities (B, N, S, S) where the kernel has them."""
        # The number of heads is left open: a tensor-parallel rank holds only its own.
        if self.is_cross_attention:
            assert encoder_hidden_states is not None
            query = self._split_heads(self.query(hidden_states))
            key, value = self._cross_keys_values(encoder_hidden_states, past_key_values)
        else:
            query, key, value = map(self._split_heads, self.projections(hidden_states))
            if past_key_values is not None:
                if isinstance(past_key_values, EncoderDecoderCache):
                    past_key_values = past_key_values.self_attention_cache
                key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = "eager" if output_attentions else self.config._attn_implementation
        context, probabilities = self.core(query, key, value, attention_mask, implementation, layout, **kwargs)
        return context.flatten(2), probabilities

    def projections(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same states, (B, S, D) -> (B, S, N * H) each."""
        return self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)

    def core(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        implementation: str,
        layout: PackedLayout | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The part without weights: scores, softmax, dropout, and their product with the values."""
        dropout = self.dropout.p if self.training else 0.0
        if layout is None:
            function = attention_function(implementation)
            return function(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        context = packed_attention(
            self,
            query,
            key,
            value,
            layout,
            implementation=implementation,
            is_causal=self.is_causal,
            scaling=self.scaling,
            dropout=dropout,
        )
        return context, None

    def _split_heads(self, states: Tensor) -> Tensor:
        """(B, S, N * H) -> (B, N, S, H)."""
        return states.view(*states.shape[:-1], -1, self.attention_head_size).transpose(1, 2)

    def _cross_keys_values(self, encoder_hidden_states: Tensor, past_key_values: Cache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's states, of any length: computed once a generation where there is a cache."""
        cache = past_key_values if isinstance(past_key_values, EncoderDecoderCache) else None
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer: Any = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key = self._split_heads(self.key(encoder_hidden_states))
        value = self._split_heads(self.value(encoder_hidden_states))
        if cache is not None:
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key, value


class MegatronBertSelfOutput(nn.Module):
    """The attention's output projection, dropout and residual."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return residual + self.dropout(self.dense(hidden_states))


class MegatronBertAttention(nn.Module):
    """x + attention(norm(x)): the first half of a layer, or its cross-attention."""

    def __init__(self, config: MegatronBertConfig, layer_idx: int = 0, is_cross_attention: bool = False) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self = MegatronBertSelfAttention(config, layer_idx, is_cross_attention)
        self.output = MegatronBertSelfOutput(config)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        context, _ = self.self(self.ln(hidden_states), *args, **kwargs)
        return self.output(context, hidden_states)


class MegatronBertIntermediate(nn.Module):
    """D -> F and the activation."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = _activation(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class MegatronBertOutput(nn.Module):
    """F -> D, dropout and residual."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return input_tensor + self.dropout(self.dense(hidden_states))


class MegatronBertLayer(GradientCheckpointingLayer):
    """One layer: self-attention, cross-attention where the configuration asks for it, and the MLP, each pre-norm."""

    def __init__(self, config: MegatronBertConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = MegatronBertAttention(config, layer_idx)
        self.is_decoder = config.is_decoder
        self.add_cross_attention = config.add_cross_attention
        if self.add_cross_attention:
            if not self.is_decoder:
                raise TypeError("cross-attention needs a decoder: set is_decoder=True with add_cross_attention=True")
            self.crossattention = MegatronBertAttention(config, layer_idx, is_cross_attention=True)
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = MegatronBertIntermediate(config)
        self.output = MegatronBertOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        hidden_states = self.attention(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        if self.is_decoder and encoder_hidden_states is not None:
            if not self.add_cross_attention:
                raise ValueError(
                    "encoder_hidden_states need a model with cross-attention: set add_cross_attention=True"
                )
            hidden_states = self.crossattention(
                hidden_states, encoder_attention_mask, encoder_hidden_states, past_key_values, **kwargs
            )
        if self.chunk_size_feed_forward == 0:
            return self.feed_forward_chunk(hidden_states)
        parts = hidden_states.split(self.chunk_size_feed_forward, dim=-2)
        return torch.cat([self.feed_forward_chunk(part) for part in parts], dim=-2)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        """x + mlp(norm(x)): the second half of the layer."""
        return self.output(self.intermediate(self.ln(attention_output)), attention_output)


class MegatronBertEncoder(nn.Module):
    """The layers and the final norm."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(
            MegatronBertLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, *args, **kwargs)
        return self.ln(hidden_states)


class MegatronBertPooler(nn.Module):
    """tanh of a projection of the first token's state."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, D) -> (B, D)."""
        return self.activation(self.dense(hidden_states[:, 0]))


class MegatronBertPredictionHeadTransform(nn.Module):
    """What comes before the projection onto the vocabulary: a projection, the activation and a norm."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = _activation(config)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class MegatronBertLMPredictionHead(nn.Module):
    """D -> V: the transform, then the word embeddings' transpose (tied) and a bias per word."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        self.transform = MegatronBertPredictionHeadTransform(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size, bias=True)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states))


class MegatronBertOnlyMLMHead(nn.Module):
    """The language-model head alone."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        self.predictions = MegatronBertLMPredictionHead(config)

    def forward(self, sequence_output: Tensor) -> Tensor:
        return self.predictions(sequence_output)


class MegatronBertOnlyNSPHead(nn.Module):
    """The sentence-pair head alone."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__()
        self.seq_relationship = Linear(config.hidden_size, 2)

    def forward(self, pooled_output: Tensor) -> Tensor:
        return self.seq_relationship(pooled_output)


class MegatronBertPreTrainingHeads(nn.Module):
    """Both heads of pretraining; without the binary head, the language-model head alone."""

    def __init__(self, config: MegatronBertConfig, add_binary_head: bool = True) -> None:
        super().__init__()
        self.predictions = MegatronBertLMPredictionHead(config)
        self.seq_relationship = Linear(config.hidden_size, 2) if add_binary_head else None

    def forward(self, sequence_output: Tensor, pooled_output: Tensor | None) -> tuple[Tensor, Tensor | None]:
        pair_logits = None if self.seq_relationship is None else self.seq_relationship(pooled_output)
        return self.predictions(sequence_output), pair_logits


def _activation(config: MegatronBertConfig) -> nn.Module:
    return ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
