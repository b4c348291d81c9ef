"""The network that a run trains: freshly initialised, or a published checkpoint with the heads that it lacks."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megatron_bert.checkpoint.folder import check_vocabulary
from megatron_bert.checkpoint.load import check_model, load_model
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig, MegatronBertForCausalLM, MegatronBertForPreTraining
from megatron_bert.training.configuration import ModelSection, PretrainConfiguration
from megatron_bert.training.initialization import scale_residual_projections

__all__ = ["Network", "build_network", "empty_network"]

log = logging.getLogger(__name__)

Network = MegatronBertForPreTraining | MegatronBertForCausalLM


def build_network(configuration: PretrainConfiguration, tokenizer: PreTrainedTokenizerBase) -> Network:
    """The model with its first weights, on the CPU, float32, in training mode. Draws from PyTorch's random stream.

    Raises:
        UserError: the checkpoint to start from is missing, damaged, of another family, has no room for the tokenizer's
            vocabulary or for rows of `data.row_tokens`.
    """
    section = configuration.model
    if section.start_from is not None:
        network = _started(configuration, section.start_from, tokenizer)
    else:
        network = empty_network(_fresh_config(section, tokenizer), causal=_is_causal(configuration))
        scale_residual_projections(network, network.config.num_hidden_layers)
    network.train()
    return network


def empty_network(config: MegatronBertConfig, *, causal: bool) -> Network:
    """A model of this shape, its weights drawn from the model's own N(0, initializer_range)."""
    if causal:
        config.is_decoder = True
        return MegatronBertForCausalLM(config)
    return MegatronBertForPreTraining(config)


def _fresh_config(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> MegatronBertConfig:
    multiple = section.vocabulary_multiple
    assert section.hidden_size
    assert section.num_hidden_layers
    assert section.num_attention_heads
    return MegatronBertConfig(
        vocab_size=-(-len(tokenizer) // multiple) * multiple,
        hidden_size=section.hidden_size,
        num_hidden_layers=section.num_hidden_layers,
        num_attention_heads=section.num_attention_heads,
        intermediate_size=section.intermediate_size or 4 * section.hidden_size,
        max_position_embeddings=section.max_position_embeddings,
        hidden_dropout_prob=section.hidden_dropout_prob,
        attention_probs_dropout_prob=section.attention_probs_dropout_prob,
        initializer_range=section.initializer_range,
        pad_token_id=tokenizer.pad_token_id,
    )


def _started(configuration: PretrainConfiguration, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Network:
    """The checkpoint's weights; dropout is the recipe's. What it lacks (a pair head, say) is initialised and said."""
    section = configuration.model
    if not folder.is_dir():
        raise UserError(f"model.start_from {folder}: no such folder")
    config = check_model(folder)
    check_vocabulary(config, len(tokenizer), f"model.start_from {folder} with data.tokenizer {tokenizer.name_or_path}")
    if configuration.data.row_tokens > config.max_position_embeddings:
        raise UserError(
            f"data.row_tokens {configuration.data.row_tokens} is more than the {config.max_position_embeddings} "
            f"positions of model.start_from {folder}"
        )
    causal = _is_causal(configuration)
    model_class: type[Network] = MegatronBertForCausalLM if causal else MegatronBertForPreTraining
    network: Network = load_model(
        model_class,
        folder,
        dtype=torch.float32,
        hidden_dropout_prob=section.hidden_dropout_prob,
        attention_probs_dropout_prob=section.attention_probs_dropout_prob,
        is_decoder=causal,
    )
    log.info("starts from %s", folder)
    return network


def _is_causal(configuration: PretrainConfiguration) -> bool:
    return configuration.objective.kind == "causal"
