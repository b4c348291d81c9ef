"""Megatron-LM's BERT as this family's, and NeMo's: configuration, and weights by our names.

Names and layouts are those of Megatron-LM from its first release to `megatron.core.models.bert` (the modules' own
names there), which calls the same things differently. NeMo's are the former or the latter. Ranks' parts are put
together by our sharding table, which is the same as theirs (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_bert.checkpoint.megatron_files import files_of_checkpoint, read_rank
from megatron_bert.checkpoint.nemo_files import NemoConfiguration
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.errors import UserError
from megatron_bert.model import (
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForMultipleChoice,
    MegatronBertForPreTraining,
    MegatronBertForSequenceClassification,
    MegatronBertModel,
    MegatronBertPreTrainedModel,
)
from megatron_bert.sharding import split_dim

__all__ = ["MegatronModel", "read_megatron"]

log = logging.getLogger(__name__)

_HEAD_DIMENSION = 64  # of all sizes of BERT in the paper (table 6), and of NVIDIA's 345M
_QKV = "attention.self.qkv"
_IN_LAYER = {
    "input_layernorm": "attention.ln",
    "attention.query_key_value": _QKV,
    "attention.dense": "attention.output.dense",
    "self_attention.query_key_value": _QKV,
    "self_attention.dense": "attention.output.dense",
    "post_attention_layernorm": "ln",
    "mlp.dense_h_to_4h": "intermediate.dense",
    "mlp.dense_4h_to_h": "output.dense",
    # megatron.core; with Transformer Engine the norms are parts of the products after them.
    "self_attention.linear_qkv": _QKV,
    "self_attention.linear_qkv.layer_norm": "attention.ln",
    "self_attention.linear_proj": "attention.output.dense",
    "pre_mlp_layernorm": "ln",
    "mlp.linear_fc1": "intermediate.dense",
    "mlp.linear_fc1.layer_norm": "ln",
    "mlp.linear_fc2": "output.dense",
}
_AROUND = {
    "embedding.word_embeddings": "bert.embeddings.word_embeddings",
    "embedding.position_embeddings": "bert.embeddings.position_embeddings",
    "embedding.tokentype_embeddings": "bert.embeddings.token_type_embeddings",
    "encoder.final_layernorm": "bert.encoder.ln",
    "pooler.dense": "bert.pooler.dense",
    "lm_head": "cls.predictions",  # its bias
    "output_layer": "cls.predictions.decoder",
    "word_embeddings_for_head": "cls.predictions.decoder",
    "word_embeddings": "cls.predictions.decoder",  # NeMo's name of the same
    "lm_head.dense": "cls.predictions.transform.dense",
    "lm_head.layernorm": "cls.predictions.transform.LayerNorm",
    "lm_head.layer_norm": "cls.predictions.transform.LayerNorm",
    "binary_head": "cls.seq_relationship",
    "classification_head": "classifier",
    "multichoice_head": "classifier",
}
_WORDS, _POSITIONS, _TOKEN_TYPES = (
    f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")
)
_DECODER = "cls.predictions.decoder.weight"
# What would make another architecture of it.
_ONLY: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": False,
    "swiglu": False,
    "group_query_attention": False,
    "multi_latent_attention": False,
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "num_experts": None,
    # NeMo's arguments.
    "transformer_block_type": "pre_ln",
    "activation": "gelu",
    "headscale": False,
}


@dataclass(frozen=True)
class MegatronModel:
    """A model of Megatron-LM's or NeMo's.

    Attributes:
        model_class: of the family, which has its heads.
        weights: by the names of that class; without those that are tied to others.
        steps: that it was trained for, where that is said.
        tokenizer: where the checkpoint has its vocabulary, as NeMo's do.
    """

    model_class: type[MegatronBertPreTrainedModel]
    config: MegatronBertConfig
    weights: dict[str, Tensor]
    steps: int | None
    tokenizer: PreTrainedTokenizerBase | None = None


def read_megatron(source: Path, *, heads: int | None = None) -> MegatronModel | None:
    """The model of a checkpoint of Megatron-LM's or NeMo's; None where `source` is none. See `files_of_checkpoint`.

    Args:
        heads: attention heads, where the checkpoint does not have Megatron-LM's arguments.

    Raises:
        UserError: it cannot be read, is of another architecture, or incomplete.
    """
    with files_of_checkpoint(source) as checkpoint:
        if checkpoint is None:
            return None
        weights: dict[str, Tensor] = {}
        first: dict[str, Any] = {}
        num_heads = 0
        try:
            for files in checkpoint.stages:
                ranks = [read_rank(file, checkpoint.nemo) for file in files]
                if not first:
                    first, num_heads = ranks[0], _num_heads(ranks[0], len(ranks), heads)
                weights |= _whole_weights(ranks, num_heads, first_layer=_num_layers(weights))
            _settle_decoder(weights)
            _settle_token_types(weights)
            config = _config(weights, num_heads, first["args"])
        except UserError as error:
            where = "" if str(source) in str(error) else f"{source}: "
            raise UserError(f"{where}{error}") from error
        tokenizer = _tokenizer(checkpoint.nemo)
    steps = first.get("iteration")
    trained = steps if isinstance(steps, int) and steps else None
    return MegatronModel(_model_class(weights), config, weights, trained, tokenizer)


# --- Weights


def _whole_weights(ranks: Sequence[Mapping[str, Any]], num_heads: int, first_layer: int) -> dict[str, Tensor]:
    """Those of a stage of the pipeline, whose layers are numbered from 0."""
    parts = [dict(_named(rank, num_heads // len(ranks), first_layer)) for rank in ranks]
    return {name: _joined(name, [part.get(name) for part in parts]) for name in parts[0]}


def _joined(name: str, parts: Sequence[Tensor | None]) -> Tensor:
    found = [part for part in parts if part is not None]
    if len(found) != len(parts):
        raise UserError(f"a tensor-parallel rank has no {name}")
    dim = split_dim(name)
    if dim is not None:
        return torch.cat(found, dim) if len(found) > 1 else found[0]
    for rank, part in enumerate(found[1:], start=1):
        if not torch.equal(part, found[0]):
            raise UserError(f"{name} on tensor-parallel rank {rank} is not rank 0's, though all hold it whole: the "
                            "ranks are not of one checkpoint")  # fmt: skip
    return found[0]


def _named(rank: Mapping[str, Any], rank_heads: int, first_layer: int) -> Iterator[tuple[str, Tensor]]:
    """This rank's weights, by our names."""
    for their_name, weight in _flat(rank["model"]):
        name = _our_name(their_name, first_layer)
        if not weight.ndim or not weight.is_floating_point():
            raise UserError(f"{their_name} is {list(weight.shape)} of {weight.dtype}, which no weight is")
        if f".{_QKV}." in name:
            # megatron.core has no versions: its layout is that of version 2.
            version = 2.0 if "linear_qkv" in their_name else float(rank.get("checkpoint_version", 0.0))
            for kind, part in zip(("query", "key", "value"), _split_qkv(weight, version, rank_heads), strict=True):
                yield name.replace(_QKV, f"attention.self.{kind}"), part
        else:
            yield name, weight


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors by dotted names, without the prefixes that all have in some versions."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, Tensor) and not name.endswith("_extra_state"):  # scales of products in float8
            name = re.sub(r"^(?:model\.)?(?:module\.)*(?:language_model\.)?", "", name)
            yield re.sub(r"^transformer\.", "encoder.", name), value


def _our_name(name: str, first_layer: int) -> str:
    name = name.replace("output_layer.bias", "lm_head.bias").replace(".layer_norm_", ".layer_norm.")
    module, _, kind = name.rpartition(".")
    if layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", module):
        ours = _IN_LAYER.get(layer[2])
        module = f"bert.encoder.layer.{int(layer[1]) + first_layer}.{ours}"
    else:
        ours = module = _AROUND.get(module, "")
    if not ours or kind not in ("weight", "bias"):
        raise UserError(f"{name} is no weight of a BERT of Megatron-LM's")
    return f"{module}.{kind}"


def _split_qkv(weight: Tensor, version: float, heads: int) -> tuple[Tensor, ...]:
    """Queries', keys' and values' rows of this rank's heads, which have been saved in three orders
    (`megatron/checkpointing.py`, `fix_query_key_value_ordering`): at first all of one kind together, in version 1 the
    three kinds row by row, and since version 2 head by head.
    """
    rows, *features = weight.shape
    if rows % (3 * heads):
        raise UserError(f"{rows} rows of queries, keys and values cannot be of {heads} heads (--heads)")
    if version < 1.0:
        parts = weight.view(3, rows // 3, *features).unbind(0)
    elif version < 2.0:
        parts = weight.view(rows // 3, 3, *features).unbind(1)
    else:
        parts = weight.view(heads, 3, rows // (3 * heads), *features).unbind(1)
    return tuple(part.reshape(rows // 3, *features) for part in parts)


def _settle_decoder(weights: dict[str, Tensor]) -> None:
    """The product with the vocabulary: tied to the word embeddings and saved again, as by a pipeline's last stage, or a
    weight of its own, with the bias that we call by two names.
    """
    words = weights.get(_WORDS)
    if _DECODER not in weights or words is None:
        return
    if torch.equal(weights[_DECODER], words):
        del weights[_DECODER]
    elif "cls.predictions.bias" in weights:
        weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]


def _settle_token_types(weights: dict[str, Tensor]) -> None:
    """Without a head for pairs, Megatron-LM trains no token types (`pretrain_bert.py`): both add nothing."""
    words = weights.get(_WORDS)
    if words is not None:
        weights.setdefault(_TOKEN_TYPES, words.new_zeros(2, words.shape[1]))


def _num_layers(weights: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[3] for name in weights if name.startswith("bert.encoder.layer.")})


def _model_class(weights: Mapping[str, Tensor]) -> type[MegatronBertPreTrainedModel]:
    if "cls.seq_relationship.weight" in weights:
        return MegatronBertForPreTraining
    if "cls.predictions.bias" in weights:
        return MegatronBertForMaskedLM
    if "classifier.weight" in weights:
        is_choice = len(weights["classifier.weight"]) == 1
        return MegatronBertForMultipleChoice if is_choice else MegatronBertForSequenceClassification
    return MegatronBertModel


# --- Configuration, tokenizer


def _tokenizer(nemo: NemoConfiguration | None) -> PreTrainedTokenizerBase | None:
    if nemo is None or nemo.vocabulary is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(nemo.vocabulary, Path(folder) / "vocab.txt")
        settings = json.dumps({"do_lower_case": nemo.lower_cases})
        (Path(folder) / "tokenizer_config.json").write_text(settings, encoding="utf-8")
        try:
            return load_tokenizer(folder)
        except UserError as error:
            log.warning("its vocabulary is left out (--tokenizer): %s", error)
            return None


def _num_heads(first: Mapping[str, Any], degree: int, heads: int | None) -> int:
    """Of all ranks together."""
    args = first["args"]
    for name, value in _ONLY.items():
        if name in args and args[name] != value and not (value is False and not args[name]):
            raise UserError(f"{name} {args[name]} is not MegatronBERT's architecture")
    saved = args.get("tensor_model_parallel_size", args.get("model_parallel_size", degree))
    if saved != degree:
        raise UserError(f"it was saved by {saved} tensor-parallel ranks, and {degree} are there")
    found = args.get("num_attention_heads")
    if found is not None and (type(found) is not int or found < 1):
        raise UserError(f"num_attention_heads {found!r} is no number above 0")
    if found and heads and heads != found:
        raise UserError(f"it has {found} attention heads, not {heads}")
    if not found and not heads:
        norms = [weight for name, weight in _flat(first["model"]) if name.endswith("layernorm.weight")]
        if not norms:
            raise UserError("it is no BERT of Megatron-LM's: it has no layer norm")
        found = norms[0].shape[-1] // _HEAD_DIMENSION
        log.warning("the checkpoint does not say how many heads it has: %d of %d features each are taken (--heads)",
                    found, _HEAD_DIMENSION)  # fmt: skip
    number = found or heads or 0
    if not number or number % degree:
        raise UserError(f"{number} attention heads cannot be split over {degree} ranks (--heads)")
    return number


def _config(weights: Mapping[str, Tensor], num_heads: int, args: Mapping[str, Any]) -> MegatronBertConfig:
    """Sizes are the weights'; the rest is Megatron-LM's arguments, or their defaults there (`arguments.py`). Where bias
    and activation were fused, GELU is its tanh approximation (`fused_bias_gelu.py`); without arguments, the exact one.
    """
    for name in (_WORDS, _POSITIONS, "bert.encoder.layer.0.intermediate.dense.weight"):
        if name not in weights:
            raise UserError(f"it is no BERT of Megatron-LM's: it has no {name}")
    shapes = {name.removeprefix("bert."): weight.shape for name, weight in weights.items()}
    vocabulary, hidden = shapes["embeddings.word_embeddings.weight"]
    activation = "gelu"
    if args.get("openai_gelu") or (args.get("bias_gelu_fusion") and not args.get("onnx_safe")):
        activation = "gelu_pytorch_tanh"
    config = MegatronBertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=_num_layers(weights),
        num_attention_heads=num_heads,
        intermediate_size=shapes["encoder.layer.0.intermediate.dense.weight"][0],
        hidden_act=activation,
        max_position_embeddings=shapes["embeddings.position_embeddings.weight"][0],
        type_vocab_size=shapes["embeddings.token_type_embeddings.weight"][0],
        hidden_dropout_prob=args.get("hidden_dropout", 0.1),
        attention_probs_dropout_prob=args.get("attention_dropout", 0.1),
        initializer_range=args.get("init_method_std", 0.02),
        layer_norm_eps=args.get("layernorm_epsilon", args.get("norm_epsilon", 1e-5)),
        tie_word_embeddings=_DECODER not in weights,
    )
    if "classifier.weight" in shapes:
        config.num_labels = shapes["classifier.weight"][0]
    return config
