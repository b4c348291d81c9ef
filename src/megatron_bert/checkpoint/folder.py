"""Looks at a folder in Transformers' format before a model is loaded from it, and says in one line what is wrong.

It reads the configuration and the tables of contents, not the weights: a fraction of a second whatever the size (but
for PyTorch files from before 2020, which have no table). Pickled weights are opened with ``weights_only=True``, here as
everywhere: nothing in a file is ever run.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig, MegatronBertModel

# What Transformers looks for, in its order; an index names the files that the weights are spread over.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_GIT_LFS_POINTER = b"version https://git-lfs.github.com/"

# The axes of some weights, as fields of the configuration. `cls.` lies outside the base model, the others may be in it.
_AXES = {
    "embeddings.word_embeddings.weight": ("vocab_size", "hidden_size"),
    "embeddings.position_embeddings.weight": ("max_position_embeddings", "hidden_size"),
    "embeddings.token_type_embeddings.weight": ("type_vocab_size", "hidden_size"),
    "encoder.layer.0.intermediate.dense.weight": ("intermediate_size", "hidden_size"),
    "cls.predictions.decoder.weight": ("vocab_size", "hidden_size"),
    "cls.predictions.bias": ("vocab_size",),
}

Shapes = dict[str, tuple[int, ...]]


def check_folder(folder: Path) -> Shapes:
    """The names and shapes of the weights in ``folder``, once nothing was found wrong with it.

    Raises ``UserError`` for a folder without a model, a configuration that is damaged, not of this family or not
    possible (``check_config``), a missing, truncated or damaged weight file, pickled weights with more in them than
    weights, and weights that do not fit the configuration or lack one of the embeddings or layers. Heads and pooler may
    be absent, and cross-attention, which a decoder of an encoder's weights is still to learn.
    """
    config = check_config(folder)
    shapes: Shapes = {}
    for file in weight_files(folder):
        shapes |= read_shapes(file)
    for problem in _misfits(shapes, config):
        raise UserError(f"{folder}: {problem}; its config.json belongs to other weights, or some are lost")
    return shapes


def check_config(folder: Path) -> MegatronBertConfig:
    """The configuration in ``folder``.

    Raises ``UserError`` where there is none, it is not JSON, it is another model's, or a model of it cannot be.
    """
    file = folder / "config.json"
    if not file.is_file():
        inside = sorted(folder.glob("*/config.json"))
        hint = f" (did you mean {inside[-1].parent}?)" if inside else ""
        raise UserError(f"{folder} has no model: no config.json in it{hint}")
    values = _read_json(file)
    model_type = values.get("model_type")
    if model_type != MegatronBertConfig.model_type:
        raise UserError(
            f"{file}: the model type is {model_type!r}, and only {MegatronBertConfig.model_type!r} loads here"
        )
    hidden, heads = (
        values.get(key, getattr(MegatronBertConfig(), key)) for key in ("hidden_size", "num_attention_heads")
    )
    if isinstance(hidden, int) and isinstance(heads, int) and (heads < 1 or hidden % heads):
        raise UserError(f"{file}: num_attention_heads {heads} does not divide hidden_size {hidden}")
    try:
        config = MegatronBertConfig.from_dict(values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{file}: {error}") from error
    for problem in _impossible(config, values):
        raise UserError(f"{file}: {problem}")
    return config


def check_vocabulary(config: MegatronBertConfig, num_tokens: int, where: str) -> None:
    """Raises ``UserError`` where the tokenizer knows ``num_tokens`` tokens and the model has rows for fewer."""
    if config.vocab_size < num_tokens:
        raise UserError(
            f"{where}: the tokenizer has {num_tokens} tokens and the model rows for {config.vocab_size} (vocab_size): "
            "the tokenizer belongs to another model, or the embeddings were not resized for it"
        )


def read_shapes(file: Path) -> Shapes:
    """The names and shapes of the weights in one file, ``.safetensors`` or pickled.

    Raises ``UserError`` where it is truncated, damaged, a git-lfs pointer, or a pickle with more in it than weights.
    """
    with file.open("rb") as opened:
        if opened.read(len(_GIT_LFS_POINTER)) == _GIT_LFS_POINTER:
            raise UserError(f"{file} is a git-lfs pointer and not the weights: fetch them with 'git lfs pull'")
    return _safetensors_shapes(file) if file.suffix == ".safetensors" else _pickle_shapes(file)


@contextmanager
def refusing_pickles(file: str) -> Iterator[None]:
    """Turns the refusal of PyTorch's ``weights_only`` reader into a ``UserError`` about ``file``."""
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        what = f"code or objects ({found[1]}) beside the weights" if found else "something other than weights"
        raise UserError(
            f"{file} holds {what}: refused, and nothing in it was run; ask its author for model.safetensors"
        ) from error


# What a byte too few, or another one, makes of the reader's steps.
_DAMAGE = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
)  # fmt: skip


@contextmanager
def explaining_damage(file: Path) -> Iterator[None]:
    """Turns what PyTorch's reader says of a file that is not whole into a ``UserError`` about ``file``."""
    try:
        yield
    except _DAMAGE as error:
        size = file.stat().st_size
        raise UserError(f"{file} is truncated or damaged ({size:,} bytes); fetch or copy it again") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that the weights in ``folder`` are spread over.

    Raises ``UserError`` where there are none, or one that the index names is missing.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no model: config.json, but no {WEIGHT_FILES[0]} and no {WEIGHT_FILES[2]}")
    if found.suffix != ".json":
        return [found]
    files = [folder / name for name in read_index(found)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, one of the {len(files)} files that {found.name} names")
    return files


def read_index(file: Path) -> list[str]:
    """The weight files that an index, ``*.index.json``, names. Raises ``UserError`` where it names none."""
    weight_map = _read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file} names no weight files (weight_map)")
    return [os.path.basename(str(name)) for name in sorted(set(weight_map.values()))]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object")
    return values


def _safetensors_shapes(file: Path) -> Shapes:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = file.stat().st_size
        raise UserError(f"{file} is truncated or damaged ({size:,} bytes): {error}; fetch or copy it again") from error


def _pickle_shapes(file: Path) -> Shapes:
    with refusing_pickles(str(file)), explaining_damage(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = torch.load(file, map_location="meta", weights_only=True)
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} holds a {type(state).__name__} and not weights by name")
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}


def _impossible(config: MegatronBertConfig, values: dict[str, Any]) -> Iterator[str]:
    """Why there can be no model of a configuration whose values are each of the right kind, in words."""
    if config.hidden_act not in ACT2FN:
        yield f"hidden_act {config.hidden_act!r} is no activation that Transformers knows"
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        yield f"pad_token_id {config.pad_token_id} is not below vocab_size {config.vocab_size}"
    if config.add_cross_attention and not config.is_decoder:
        yield "add_cross_attention needs is_decoder"
    kind = values.get("position_embedding_type", "absolute")  # old releases of Transformers had others
    if kind != "absolute":
        yield f"position_embedding_type {kind!r}: this model's positions are absolute, and its scores would be wrong"


def _misfits(shapes: Shapes, config: MegatronBertConfig) -> Iterator[str]:
    """What does not fit between the weights and the configuration, in words."""
    for name, fields in _AXES.items():
        expected = tuple(getattr(config, field) for field in fields)
        found = shapes.get(name, shapes.get(f"bert.{name}", expected))
        if found != expected:
            yield f"{name} is {_times(found)} and the configuration says {_times(expected)} ({' x '.join(fields)})"
    layers = [int(match[1]) for name in shapes if (match := re.match(r"(?:bert\.)?encoder\.layer\.(\d+)\.", name))]
    if not layers:
        yield "no encoder layer is among the weights"
    elif max(layers) + 1 != config.num_hidden_layers:
        yield f"the weights have {max(layers) + 1} layers and the configuration says {config.num_hidden_layers}"
    for name, expected in _base_shapes(config).items():
        found = shapes.get(f"bert.{name}", shapes.get(name, ()))
        if not found:
            yield f"{name} is not among the weights"
        elif found != expected:
            yield f"{name} is {_times(found)} and the configuration says {_times(expected)}"


def _base_shapes(config: MegatronBertConfig) -> Shapes:
    """The weights that a model of this configuration cannot do without, whatever its head."""
    with torch.device("meta"), no_init_weights():
        base = MegatronBertModel(config, add_pooling_layer=False)
    return {name: tuple(value.shape) for name, value in base.named_parameters() if ".crossattention." not in name}


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
