"""How many parameters a tensor-parallel rank holds, by how it computes with them (see `megatron_bert.sharding`).

h hidden, F feed-forward, V vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from megatron_bert.model import MegatronBertConfig

__all__ = ["layer_matrices", "layer_parameters", "outer_matrices", "outer_parameters", "rank_parameters",
           "sequence_parameters", "word_embeddings"]  # fmt: skip


def layer_matrices(config: MegatronBertConfig, tensor: int = 1) -> int:
    """Of one layer: query, key, value and output (4 h^2), and the MLP's two (2 h F); all of them are split."""
    return (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size) // tensor


def layer_parameters(config: MegatronBertConfig, tensor: int = 1) -> int:
    """Of one layer: matrices, the column-parallel biases (split), two row-parallel ones and two norms (whole)."""
    split = 3 * config.hidden_size + config.intermediate_size
    return layer_matrices(config, tensor) + split // tensor + 6 * config.hidden_size


def word_embeddings(config: MegatronBertConfig, tensor: int = 1) -> int:
    """V h, split over the vocabulary, tied to the output projection."""
    return config.vocab_size * config.hidden_size // tensor


def outer_matrices(config: MegatronBertConfig, tensor: int = 1) -> int:
    """The matrices outside the layers that products are taken with: output projection, head, pooler, pair."""
    return word_embeddings(config, tensor) + 2 * config.hidden_size**2 + 2 * config.hidden_size


def outer_parameters(config: MegatronBertConfig, tensor: int = 1) -> int:
    """Outside the layers: embeddings, the last norm, pooler, and both heads with a bias a word."""
    embedded = (config.max_position_embeddings + config.type_vocab_size) * config.hidden_size
    vectors = config.vocab_size // tensor + 6 * config.hidden_size + 2
    return outer_matrices(config, tensor) + embedded + vectors


def rank_parameters(config: MegatronBertConfig, tensor: int = 1) -> int:
    """All that a tensor-parallel rank holds; with degree 1, the whole model's."""
    return config.num_hidden_layers * layer_parameters(config, tensor) + outer_parameters(config, tensor)


def sequence_parameters(config: MegatronBertConfig) -> int:
    """Those that sequence parallelism uses on a part of the tokens: row-parallel biases and norms of the encoder."""
    return 6 * config.hidden_size * config.num_hidden_layers + 2 * config.hidden_size
