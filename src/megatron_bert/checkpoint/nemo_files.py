"""What NVIDIA's NeMo keeps of a Megatron BERT in a `.nemo` file: unpacked, and its configuration read.

NeMo (github.com/NVIDIA/NeMo, `nemo/core/connectors/save_restore_connector.py`) writes a tar file, gzipped before 1.7:
`model_config.yaml`; `model_weights.ckpt`, or `mp_rank_01/model_weights.ckpt` of tensor-parallel rank 1, or
`tp_rank_01_pp_rank_002/model_weights.ckpt` with a pipeline; and the vocabulary that the configuration names.
"""

from __future__ import annotations

import gzip
import logging
import lzma
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from megatron_bert.errors import UserError

__all__ = ["NEMO_WEIGHTS", "NemoConfiguration", "naming_where", "read_nemo_configuration", "unpacked_nemo"]

log = logging.getLogger(__name__)

NEMO_WEIGHTS = "model_weights.ckpt"
_CONFIGURATION = "model_config.yaml"
_IN_ARTIFACTS = "nemo:"  # before the name of a file that is in the archive, too
_NUMBERS = ("hidden_dropout", "attention_dropout", "init_method_std", "layernorm_epsilon")
_FLAGS = ("bias_gelu_fusion", "bias_activation_fusion", "mcore_bert", "megatron_legacy", "openai_gelu", "onnx_safe")
_AS_THEY_ARE = (
    "num_attention_heads", "tensor_model_parallel_size", "openai_gelu", "onnx_safe", "activation", "headscale",
    "position_embedding_type", "transformer_block_type",
)  # fmt: skip


@dataclass(frozen=True)
class NemoConfiguration:
    """Of a model that NeMo saved.

    Attributes:
        arguments: by Megatron-LM's names, with NeMo's defaults (`megatron_bert_model.py`).
        checkpoint_version: of Megatron-LM's, whose order of queries, keys and values this is.
        vocabulary: `vocab.txt`, where it is in the archive; texts are lower-cased for it, or not.
    """

    arguments: dict[str, Any]
    checkpoint_version: float
    vocabulary: Path | None
    lower_cases: bool


@contextmanager
def unpacked_nemo(source: Path) -> Iterator[Path | None]:
    """The folder with the files of a `.nemo` file, or of one that was unpacked; None where `source` is neither.

    Raises:
        UserError: it is damaged, or has what no `.nemo` file has.
    """
    if (source / _CONFIGURATION).is_file():
        yield source
    elif source.is_file() and (source.suffix == ".nemo" or tarfile.is_tarfile(source)):
        with tempfile.TemporaryDirectory() as folder:
            _unpack(source, Path(folder))
            yield Path(folder) if (Path(folder) / _CONFIGURATION).is_file() else None
    else:
        yield None


def _unpack(source: Path, folder: Path) -> None:
    """Regular files only, each below `folder`."""
    try:
        with naming_where(folder), tarfile.open(source) as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{source}: {member.name} would be written elsewhere; nothing is converted")
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    with (folder / name).open("wb") as file:
                        shutil.copyfileobj(content, file)
    # ValueError: a name with a null byte.
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
        raise UserError(f"{source} is truncated or damaged: {error}; fetch or copy it again") from error


@contextmanager
def naming_where(folder: Path) -> Iterator[None]:
    """A disk that is full while something is unpacked to `folder` is that one, which the error then names."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error


def read_nemo_configuration(folder: Path) -> NemoConfiguration:
    """What `model_config.yaml` says.

    Raises:
        UserError: it is damaged, or says what cannot be.
    """
    try:
        said = yaml.safe_load((folder / _CONFIGURATION).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"its {_CONFIGURATION} is damaged: {' '.join(str(error).split())}") from error
    said = said.get("model", said) if isinstance(said, Mapping) else said
    if not isinstance(said, Mapping):
        raise UserError(f"its {_CONFIGURATION} is no configuration of NeMo's: it holds {type(said).__name__}")
    for name in _FLAGS:
        if not isinstance(said.get(name), bool | None):
            raise UserError(f"its {_CONFIGURATION} has {name} {said[name]!r}, which is neither true nor false")
    arguments = {name: said[name] for name in _AS_THEY_ARE if said.get(name) is not None}
    # OmegaConf's references to other settings stay texts; so does 1e-5 in YAML 1.1.
    arguments |= {name: number for name in _NUMBERS if (number := _number(said.get(name))) is not None}
    if said.get("layernorm_epsilon") is not None and "layernorm_epsilon" not in arguments:
        raise UserError(f"its {_CONFIGURATION} has layernorm_epsilon {said['layernorm_epsilon']!r}, which is no number")
    # NeMo's own layers and megatron-core's are told of the fusion by two names.
    fusion = "bias_activation_fusion" if said.get("mcore_bert") else "bias_gelu_fusion"
    arguments["bias_gelu_fusion"] = said.get(fusion, True)
    if said.get("normalization", "layernorm") != "layernorm":
        arguments["normalization"] = said["normalization"]
    tokenizer = said.get("tokenizer")
    kind, vocabulary = "", None
    if isinstance(tokenizer, Mapping):
        kind, name = str(tokenizer.get("type")), PurePosixPath(str(tokenizer.get("vocab_file"))).name
        path = folder / name.removeprefix(_IN_ARTIFACTS)
        vocabulary = path if path.is_file() else None
        if vocabulary is None and tokenizer.get("vocab_file"):
            log.warning(
                "the vocabulary %s is not in it, and the model has no tokenizer: --tokenizer adds one", path.name
            )
    version = 0.0 if said.get("megatron_legacy") else 2.0
    return NemoConfiguration(arguments, version, vocabulary, lower_cases="LowerCase" in kind or "uncased" in kind)


def _number(value: object) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
