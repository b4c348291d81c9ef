"""The sharding table: which axis of which weight a tensor-parallel run splits (arXiv 1909.08053, section 3).

Pure data, which imports nothing: the network's configuration makes Transformers' plan of it, `parallel/` applies it,
and whoever converts or plans reads it.
"""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["TABLE", "Sharding", "on_sequence_shards", "sharding_of", "split_dim", "transformers_plan"]

Sharding = Literal["column", "row", "vocabulary", "replicated"]
"""How a module's weight (out, in) and bias (out) are split over the tensor-parallel ranks.

column: both by output features, so that each rank computes whole heads, or its part of the MLP's width.
row: the weight by input features; the bias is whole, and is added once, after the reduction.
vocabulary: both by rows of the vocabulary.
replicated: neither.
"""

_ATTENTION: dict[str, Sharding] = {
    "ln": "replicated",
    "self.query": "column",
    "self.key": "column",
    "self.value": "column",
    "output.dense": "row",
}
_LAYER: dict[str, Sharding] = {
    **{f"attention.{name}": sharding for name, sharding in _ATTENTION.items()},
    **{f"crossattention.{name}": sharding for name, sharding in _ATTENTION.items()},
    "ln": "replicated",
    "intermediate.dense": "column",
    "output.dense": "row",
}

TABLE: dict[str, Sharding] = {
    "embeddings.word_embeddings": "vocabulary",
    "embeddings.position_embeddings": "replicated",
    "embeddings.token_type_embeddings": "replicated",
    **{f"encoder.layer.*.{name}": sharding for name, sharding in _LAYER.items()},
    "encoder.ln": "replicated",
    "pooler.dense": "replicated",
    "cls.predictions.transform.dense": "replicated",
    "cls.predictions.transform.LayerNorm": "replicated",
    "cls.predictions.decoder": "vocabulary",  # tied to the word embeddings
    "cls.predictions": "vocabulary",  # its bias, tied to the decoder's
    "cls.seq_relationship": "replicated",
    "classifier": "replicated",
    "qa_outputs": "replicated",
}
"""By the names of modules that have parameters of their own, of every class of the family, without the prefix `bert.`;
`*` is a layer's number."""

_TRANSFORMERS_STYLES = {
    "column": "colwise",
    "row": "rowwise",
    "embeddings.word_embeddings": "embedding_rowwise",
    "cls.predictions.decoder": "colwise_gather_output",
    "cls.predictions": "colwise",
}


def sharding_of(module: str) -> Sharding:
    """How the parameters of the module of this name are split.

    Raises:
        KeyError: the family has no such module.
    """
    return TABLE[re.sub(r"\.\d+\.", ".*.", module.removeprefix("bert."))]


def split_dim(parameter: str) -> int | None:
    """The dimension in which the parameter of this name is split, None for one that every rank holds whole.

    Raises:
        KeyError: the family has no such parameter.
    """
    module, _, kind = parameter.rpartition(".")
    sharding = sharding_of(module)
    if sharding == "row":
        return 1 if kind == "weight" else None
    return None if sharding == "replicated" else 0


def on_sequence_shards(parameter: str) -> bool:
    """Whether sequence parallelism has each rank use this parameter, which it holds whole, on its part of the sequence
    only: the norms and the row-parallel biases. Their gradients are then to be summed over the tensor-parallel ranks
    (arXiv 2205.05198, section 4.2.2).
    """
    return parameter.removeprefix("bert.").startswith("encoder.") and split_dim(parameter) is None


def transformers_plan(*, head: bool, cross_attention: bool = True) -> dict[str, str]:
    """The table in the words of Transformers' `tp_plan`: the base model's part, or the language-model head's."""
    plan = {}
    for name, sharding in TABLE.items():
        if sharding == "replicated" or name.startswith("cls.") != head:
            continue
        if not cross_attention and ".crossattention." in name:
            continue
        plan["cls.predictions.bias" if name == "cls.predictions" else name] = _TRANSFORMERS_STYLES[
            name if sharding == "vocabulary" else sharding
        ]
    return plan
