"""How many data-parallel processes share weights where the recipe does not say."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_bert.model import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.planning.devices import GIB
from megatron_bert.training.configuration import MeshSection, ModelSection
from megatron_bert.training.network import num_layer_parameters
from megatron_bert.training.setup import _fits_whole


def fits_whole(monkeypatch: pytest.MonkeyPatch, model: ModelSection, device: str, gib: float, **mesh: Any) -> bool:
    """Of it, where each of several GPUs has so much memory."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * GIB))
    recipe: Any = SimpleNamespace(mesh=MeshSection(**mesh))
    return _fits_whole(recipe, model, torch.device(device))


@pytest.mark.parametrize(
    ("size", "device", "gib", "mesh", "found"),
    [
        ("345m", "cuda", 79, {}, True),
        ("345m", "cuda", 13, {}, False),  # 4.5 GiB of layers
        ("1.3b", "cuda", 79, {}, True),  # 18
        ("3.9b", "cuda", 79, {}, False),
        ("3.9b", "cuda", 139, {}, False),  # 56
        ("3.9b", "cuda", 139, {"tensor": 2}, True),
        ("345m", "cpu", 79, {}, False),
    ],
)
def test_a_third_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, size: str, device: str, gib: float, mesh: dict[str, Any], found: bool
) -> None:
    assert fits_whole(monkeypatch, ModelSection(size=size), device, gib, **mesh) == found


def test_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its layers are counted, and not where it is gone: a run goes on without it."""
    config = MegatronBertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48
    )
    model = MegatronBertForPreTraining(config)
    model.save_pretrained(tmp_path / "model")
    section = ModelSection(start_from=tmp_path / "model")
    assert num_layer_parameters(section) == sum(one.numel() for one in model.bert.encoder.layer.parameters())
    assert fits_whole(monkeypatch, section, "cuda", 1)
    assert not fits_whole(monkeypatch, ModelSection(start_from=tmp_path / "gone"), "cuda", 1)
