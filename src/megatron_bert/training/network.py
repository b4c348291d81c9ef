"""The network that a run trains: freshly initialised, or a published checkpoint with the heads that it lacks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from megatron_bert.checkpoint.folder import check_vocabulary
from megatron_bert.checkpoint.load import check_model
from megatron_bert.checkpoint.shards import load_shards
from megatron_bert.data.tokenization import num_rows
from megatron_bert.errors import UserError
from megatron_bert.model import (
    MegatronBertConfig,
    MegatronBertForCausalLM,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
)
from megatron_bert.parallel.materialize import initialize
from megatron_bert.planning.parameters import layer_parameters
from megatron_bert.training.configuration import ModelSection, ObjectiveSection, PretrainConfiguration
from megatron_bert.training.initialization import scale_residual_projections

__all__ = [
    "Network",
    "StartingSection",
    "config_to_start_from",
    "empty_network",
    "fill_network",
    "network_config",
    "num_layer_parameters",
]

log = logging.getLogger(__name__)


class StartingSection(Protocol):
    """What every recipe's `model` has."""

    @property
    def start_from(self) -> Path | None:
        """The checkpoint's folder."""

    @property
    def hidden_dropout_prob(self) -> float:
        """Of embeddings and layers."""

    @property
    def attention_probs_dropout_prob(self) -> float:
        """Of attention."""


Network = MegatronBertForPreTraining | MegatronBertForMaskedLM | MegatronBertForCausalLM


def network_config(configuration: PretrainConfiguration, tokenizer: PreTrainedTokenizerBase) -> MegatronBertConfig:
    """The shape that the recipe gives, or the checkpoint to start from.

    Raises:
        UserError: that checkpoint is missing, damaged, of another family, has no room for the tokenizer's vocabulary or
            for rows of `data.row_tokens`.
    """
    section = configuration.model
    if section.start_from is None:
        return _fresh_config(section, num_rows(tokenizer), tokenizer.pad_token_id)
    where = f"with data.tokenizer {tokenizer.name_or_path}"
    lengths = {"data.row_tokens": configuration.data.row_tokens}
    config = config_to_start_from(section, num_rows(tokenizer), where, lengths)
    config.is_decoder = configuration.objective.kind == "causal"
    return config


def num_layer_parameters(section: StartingSection) -> int | None:
    """Of all layers together, before the vocabulary is known; None where the checkpoint to start from is not there."""
    if section.start_from is None:
        assert isinstance(section, ModelSection)
        config = _fresh_config(section, num_tokens=1, pad_token_id=0)
    elif section.start_from.is_dir():
        config = check_model(section.start_from)
    else:
        return None
    return config.num_hidden_layers * layer_parameters(config)


def empty_network(config: MegatronBertConfig, objective: ObjectiveSection) -> Network:
    """A model of this shape with the objective's heads, in training mode, on the meta device: names and shapes, no
    values.
    """
    config.is_decoder = objective.kind == "causal"
    network: Network
    with torch.device("meta"):
        if config.is_decoder:
            network = MegatronBertForCausalLM(config)
        elif objective.pair == "none":
            network = MegatronBertForMaskedLM(config)
        else:
            network = MegatronBertForPreTraining(config)
    network.train()
    return network


def fill_network(network: Network, start_from: Path | None, seed: int) -> None:
    """Gives first values to a network that has memory: those of the checkpoint to start from, or drawn from `seed`.
    What a checkpoint lacks (a pair head, say) is drawn and said. The same values for any number of ranks.

    Raises:
        UserError: the checkpoint's weights have other shapes.
    """
    if start_from is not None:
        load_shards(network, start_from, seed=seed)
        log.info("starts from %s", start_from)
    else:
        initialize(network, seed)
        scale_residual_projections(network, network.config.num_hidden_layers)


def _fresh_config(section: ModelSection, num_tokens: int, pad_token_id: int | None) -> MegatronBertConfig:
    multiple = section.vocabulary_multiple
    assert section.hidden_size
    assert section.num_hidden_layers
    assert section.num_attention_heads
    return MegatronBertConfig(
        vocab_size=-(-num_tokens // multiple) * multiple,
        hidden_size=section.hidden_size,
        num_hidden_layers=section.num_hidden_layers,
        num_attention_heads=section.num_attention_heads,
        intermediate_size=section.intermediate_size or 4 * section.hidden_size,
        max_position_embeddings=section.max_position_embeddings,
        hidden_dropout_prob=section.hidden_dropout_prob,
        attention_probs_dropout_prob=section.attention_probs_dropout_prob,
        initializer_range=section.initializer_range,
        pad_token_id=pad_token_id,
    )


def config_to_start_from(
    section: StartingSection, num_tokens: int, with_tokenizer: str, lengths: Mapping[str, int]
) -> MegatronBertConfig:
    """The shape of the checkpoint to start from; dropout is the recipe's.

    Args:
        with_tokenizer: which one has the `num_tokens`, where it is not the checkpoint's own.
        lengths: by keys of the recipe, in tokens, that the checkpoint has to have positions for.

    Raises:
        UserError: it is missing, damaged, of another family, or too small.
    """
    folder = section.start_from
    assert folder is not None
    where = f"model.start_from {folder}"
    if not folder.is_dir():
        raise UserError(f"{where}: no such folder")
    config = check_model(folder)
    check_vocabulary(config, num_tokens, f"{where} {with_tokenizer}".rstrip())
    for name, length in lengths.items():
        if length > config.max_position_embeddings:
            raise UserError(f"{name} {length} is more than the {config.max_position_embeddings} positions of {where}")
    config.hidden_dropout_prob = section.hidden_dropout_prob
    config.attention_probs_dropout_prob = section.attention_probs_dropout_prob
    return config
