"""A model as a checkpoint that Megatron-LM loads (`pretrain_bert.py`, `--ckpt-format torch`).

Names are those of the modules of `megatron.core.models.bert.bert_model.BertModel` with `--transformer-impl local`; a
rank's parts are those of our sharding table, which is theirs (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from megatron_bert.checkpoint.megatron_files import RANK_FILE, TRACKER, UNNUMBERED
from megatron_bert.data.files import sync, written_aside
from megatron_bert.data.tokenization import lower_cases, num_rows
from megatron_bert.errors import UserError
from megatron_bert.model import (
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
    MegatronBertPreTrainedModel,
)
from megatron_bert.sharding import sharding_of, split_dim

__all__ = ["is_written_for_megatron", "write_for_megatron"]

log = logging.getLogger(__name__)

_VOCABULARY = "vocab.txt"
_VOCABULARY_MULTIPLE = 128  # Megatron-LM's --make-vocab-size-divisible-by, times the tensor-parallel ranks
_CHECKPOINT_VERSION = 3.0  # queries, keys and values head by head (`checkpointing.py`)
_NEVER_WINS = -1e4  # the bias of a row of the vocabulary that is only there to fill it up; float16 has it
_QKV = "self_attention.linear_qkv"
_IN_LAYER = {
    "attention.ln": "input_layernorm",
    "attention.self.query": _QKV,
    "attention.output.dense": "self_attention.linear_proj",
    "ln": "pre_mlp_layernorm",
    "intermediate.dense": "mlp.linear_fc1",
    "output.dense": "mlp.linear_fc2",
}
_AROUND = {
    "bert.embeddings.word_embeddings": "embedding.word_embeddings",
    "bert.embeddings.position_embeddings": "embedding.position_embeddings",
    "bert.embeddings.token_type_embeddings": "embedding.tokentype_embeddings",
    "bert.encoder.ln": "encoder.final_layernorm",
    "bert.pooler.dense": "pooler.dense",
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
    "cls.predictions": "output_layer",  # its bias
    "cls.predictions.decoder": "output_layer",  # its weight, where it is not tied
    "cls.seq_relationship": "binary_head",
}
_GELU_IS_FUSED = {"gelu": False, "gelu_pytorch_tanh": True, "gelu_new": True, "gelu_fast": True}
Weights = dict[str, Tensor]


def write_for_megatron(
    model: MegatronBertPreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, degree: int
) -> None:
    """Writes `release/mp_rank_00/model_optim_rng.pt` and so on to `folder`, whole or not at all: weights, without an
    optimizer's state, and the arguments that Megatron-LM compares or takes over (`--use-checkpoint-args`); and
    `vocab.txt`, where the tokenizer is WordPiece. The vocabulary is filled up to a multiple of 128 times `degree`, as
    Megatron-LM's; the rows that are added never win.

    Args:
        degree: tensor-parallel ranks.

    Raises:
        UserError: Megatron-LM has no such model, or it cannot be split over `degree` ranks.
        OSError: what the file system says.
    """
    config = model.config
    _check(model, degree)
    kind = type(tokenizer.backend_tokenizer.model).__name__ if tokenizer is not None else "WordPiece"
    if kind != "WordPiece":
        log.warning("%s is left out: the tokenizer is %s, and Megatron-LM's BERT has WordPiece", _VOCABULARY, kind)
        tokenizer = None
    weights = _filled_up(model, degree)
    with written_aside(folder, folder=True) as aside:
        for rank in range(degree):
            file = aside / UNNUMBERED / f"mp_rank_{rank:02d}" / RANK_FILE
            file.parent.mkdir(parents=True)
            state = {
                "model": dict(_part(weights, config.num_attention_heads // degree, rank, degree)),
                "args": _arguments(config, weights, tokenizer, degree),
                "checkpoint_version": _CHECKPOINT_VERSION,
                "iteration": 0,
            }
            torch.save(state, file)
            sync(file)
        if tokenizer is not None:
            tokens = {number: token for token, number in tokenizer.get_vocab().items()}
            lines = (tokens.get(number, f"[none{number}]") for number in range(num_rows(tokenizer)))
            (aside / _VOCABULARY).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (aside / TRACKER).write_text(f"{UNNUMBERED}\n", encoding="utf-8")


def is_written_for_megatron(folder: Path) -> bool:
    """Whether `folder` has what `write_for_megatron` writes, and nothing else: no step of a training run."""
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return {UNNUMBERED, TRACKER} <= there <= {UNNUMBERED, TRACKER, _VOCABULARY}


def _check(model: MegatronBertPreTrainedModel, degree: int) -> None:
    config, name = model.config, type(model).__name__
    if not isinstance(model, MegatronBertForPreTraining | MegatronBertForMaskedLM) or config.is_decoder:
        raise UserError(f"Megatron-LM has no counterpart of {'a decoder' if config.is_decoder else name}: its BERT has "
                        "the head for words, with or without that for pairs")  # fmt: skip
    if config.hidden_act not in _GELU_IS_FUSED:
        raise UserError(f"Megatron-LM's BERT has GELU, and this model hidden_act {config.hidden_act}")
    if config.num_attention_heads % degree or config.intermediate_size % degree:
        raise UserError(f"{config.num_attention_heads} attention heads and an MLP {config.intermediate_size} wide "
                        f"cannot be split over {degree} ranks (--tensor-parallel)")  # fmt: skip


def _filled_up(model: MegatronBertPreTrainedModel, degree: int) -> Weights:
    """The model's weights by our names, with as many rows of the vocabulary as Megatron-LM has."""
    weights = {name: weight for name, weight in model.state_dict().items() if not name.endswith("position_ids")}
    # One bias of two names; where embeddings are not tied they are two, of which this one counts.
    weights["cls.predictions.bias"] = weights.pop("cls.predictions.decoder.bias")
    if model.config.tie_word_embeddings:
        del weights["cls.predictions.decoder.weight"]
    rows = -model.config.vocab_size % (_VOCABULARY_MULTIPLE * degree)
    for name, weight in weights.items():
        if sharding_of(name.rpartition(".")[0]) == "vocabulary":
            padding, value = ((0, rows), _NEVER_WINS) if weight.ndim == 1 else ((0, 0, 0, rows), 0.0)
            weights[name] = functional.pad(weight, padding, value=value)
    if "cls.seq_relationship.weight" not in weights:
        # Megatron-LM has no token types without that head (--bert-no-binary-head): all tokens are of the first.
        first = weights.pop("bert.embeddings.token_type_embeddings.weight")[0]
        weights["bert.embeddings.position_embeddings.weight"] = (
            weights["bert.embeddings.position_embeddings.weight"] + first
        )
    return weights


def _part(weights: Weights, rank_heads: int, rank: int, degree: int) -> Iterator[tuple[str, Tensor]]:
    """A rank's weights by Megatron-LM's names."""

    def own(name: str) -> Tensor:
        dim = split_dim(name)
        part = weights[name] if dim is None else weights[name].chunk(degree, dim)[rank]
        return part.clone()  # a view would be saved with the whole of it

    for name in weights:
        module, _, kind = name.rpartition(".")
        if not module.startswith("bert.encoder.layer."):
            yield f"{_AROUND[module]}.{kind}", own(name)
            continue
        number, inner = module.removeprefix("bert.encoder.layer.").split(".", 1)
        if inner in ("attention.self.key", "attention.self.value"):
            continue
        weight = own(name)
        if _IN_LAYER[inner] == _QKV:
            kinds = [weight, *(own(name.replace("self.query", f"self.{other}")) for other in ("key", "value"))]
            by_head = [part.view(rank_heads, -1, *part.shape[1:]) for part in kinds]
            weight = torch.stack(by_head, dim=1).reshape(-1, *weight.shape[1:])
        yield f"encoder.layers.{number}.{_IN_LAYER[inner]}.{kind}", weight


def _arguments(
    config: MegatronBertConfig, weights: Weights, tokenizer: PreTrainedTokenizerBase | None, degree: int
) -> argparse.Namespace:
    case = "LowerCase" if tokenizer is None or lower_cases(tokenizer) else "Case"
    return argparse.Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        kv_channels=config.hidden_size // config.num_attention_heads,
        group_query_attention=False,
        seq_length=config.max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        position_embedding_type="learned_absolute",
        add_position_embedding=True,
        add_bias_linear=True,
        swiglu=False,
        normalization="LayerNorm",
        norm_epsilon=config.layer_norm_eps,
        bias_gelu_fusion=_GELU_IS_FUSED[str(config.hidden_act)],
        hidden_dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        init_method_std=config.initializer_range,
        bert_binary_head="cls.seq_relationship.weight" in weights,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        tokenizer_type=f"BertWordPiece{case}",
        make_vocab_size_divisible_by=_VOCABULARY_MULTIPLE,
        padded_vocab_size=len(weights["bert.embeddings.word_embeddings.weight"]),
        tensor_model_parallel_size=degree,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
    )
