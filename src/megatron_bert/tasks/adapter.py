"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685), which `peft` puts into a network, and merged ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_bert.data.files import written_aside
from megatron_bert.errors import UserError
from megatron_bert.parallel.materialize import local_slices
from megatron_bert.parallel.region import local_part
from megatron_bert.parallel.streams import key
from megatron_bert.tasks.configuration import LoraSection

__all__ = ["fill_adapters", "merged", "put_adapters", "write_adapter"]

log = logging.getLogger(__name__)

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer.weight"
_HEADS = ("classifier", "qa_outputs")


def put_adapters(network: nn.Module, section: LoraSection) -> None:
    """Puts adapters around the modules of the targets' names; they, the head and nothing else will be trained.

    Raises:
        UserError: `peft` is not installed, or the network has no module of these names.
    """
    peft = _peft()
    try:
        peft.inject_adapter_in_model(_config(section), network)
    except ValueError as error:
        raise UserError(f"lora.targets {section.targets}: {str(error).splitlines()[0]}") from error
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(_HEADS))
    network.train()


@torch.no_grad()
def fill_adapters(network: nn.Module, seed: int) -> None:
    """First values as `peft` draws them (uniform, Kaiming's, and zeros), from `seed` and the adapter's name."""
    for name, parameter in network.named_parameters():
        if name.endswith(_B):
            local_part(parameter).zero_()
        elif name.endswith(_A):
            whole = torch.empty(parameter.shape)
            generator = torch.Generator().manual_seed(key(seed, name))
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            local_part(parameter).copy_(whole[local_slices(parameter)])


def merged(weights: Iterable[tuple[str, Tensor]], section: LoraSection) -> Iterator[tuple[str, Tensor]]:
    """Of a network with adapters, the weights of one without: W + alpha / rank * B A, under their names."""
    base: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    for name, weight in weights:
        if name.endswith(_BASE):
            base[name.removesuffix(_BASE)] = weight
        elif name.endswith(_A):
            first[name.removesuffix(_A)] = weight
        elif name.endswith(_B):
            module = name.removesuffix(_B)
            yield f"{module}.weight", base.pop(module) + section.alpha / section.rank * (weight @ first.pop(module))
        else:
            yield name.replace(".base_layer.", "."), weight


def write_adapter(weights: Iterable[tuple[str, Tensor]], section: LoraSection, start_from: Path, folder: Path) -> None:
    """The adapters and the head as `peft` loads them on top of the checkpoint that the run started from.

    Raises:
        OSError: what the file system says.
    """
    heads = set[str]()
    kept: dict[str, Tensor] = {}
    for name, weight in weights:
        if name.startswith(_HEADS):
            heads.add(name.partition(".")[0])
        elif ".lora_" not in name:
            continue
        kept[f"base_model.model.{name.replace('.default.', '.')}"] = weight.contiguous()
    config = _config(section)
    config.base_model_name_or_path, config.modules_to_save = str(start_from), sorted(heads)
    config.inference_mode = True
    with written_aside(folder, folder=True) as aside:
        save_file(kept, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(aside)


def _config(section: LoraSection) -> Any:
    return _peft().LoraConfig(
        r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=list(section.targets)
    )


def _peft() -> Any:
    try:
        import peft  # noqa: PLC0415  # optional, and slow to import
    except ImportError as error:
        raise UserError("lora: peft is not installed; install megatron-bert[lora], or leave the section out") from error
    return peft
