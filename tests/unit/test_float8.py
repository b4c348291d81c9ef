"""float8, without a GPU: what refuses it, and its product (its kernels: `interpreted_float8`)."""

import logging
from pathlib import Path

import pytest
import torch

from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.training import execution
from megatron_bert.training.configuration import load_configuration
from megatron_bert.training.execution import build_objective, should_compile
from megatron_bert.training.float8 import check_device, device_refusal
from megatron_bert.training.float8_products import scaled_product

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_345m.yaml"


@pytest.mark.parametrize(
    ("capability", "has_triton", "message"),
    [
        (None, True, "9.0 or more (H100), and this is a CPU: use bfloat16"),
        ((8, 9), True, "9.0 or more (H100), and this one has 8.9: use bfloat16"),
        ((9, 0), False, "needs Triton: pip install triton"),
        ((9, 0), True, None),
        ((10, 0), True, None),
    ],
)
def test_what_refuses_it(capability: tuple[int, int] | None, has_triton: bool, message: str | None) -> None:
    """cuBLAS has a scale a row from compute capability 9.0 on (its documentation, outer vector scaling)."""
    found = device_refusal(capability, has_triton=has_triton)
    assert (found is None) if message is None else (found is not None and message in found)


def test_this_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="this is a CPU"):
        check_device(torch.device("cpu"))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("mesh.tensor=2", "mesh.tensor: leave it out"),
        ("mesh.shard=2", "mesh.shard: set it to 1"),
        ("runtime.recompute=full", "recompute full: leave it out"),
    ],
)
def test_it_is_of_whole_layers(setting: str, named: str) -> None:
    with pytest.raises(UserError, match=f"float8 does not go with .*{named}, or use bfloat16"):
        load_configuration(RECIPE, ["training.precision=float8", setting])
    assert load_configuration(RECIPE, ["training.precision=float8", "mesh.shard=1"]).training.precision == "float8"


@pytest.mark.parametrize(
    ("changes", "recompute", "message"),
    [
        ({"intermediate_size": 120}, "none", "multiples of 16, .* here they are 64 and 120: use bfloat16"),
        ({"intermediate_size": 16400}, "none", "up to 16384"),
        ({"hidden_act": "relu"}, "none", "plain layers: hidden_act gelu"),
        ({"is_decoder": True, "add_cross_attention": True}, "none", "no cross-attention"),
        ({}, "full", "leave out runtime.recompute full"),
    ],
)
def test_models_that_it_is_not_for(changes: dict[str, object], recompute: str, message: str) -> None:
    config = MegatronBertConfig(
        vocab_size=128, num_hidden_layers=1,
        **{"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128, **changes},
    )  # fmt: skip
    with torch.device("meta"):
        network = MegatronBertForPreTraining(config)
    with pytest.raises(UserError, match=message):
        build_objective(
            network, torch.device("cuda"), precision="float8", rows=2, row_tokens=16, predicted_share=0.15,
            recompute=recompute,
        )  # fmt: skip


def test_the_product_is_that_of_scaled_operands() -> None:
    """Exactly representable operands: off by the rounding to bfloat16 alone (2 ^ -9)."""
    rng = torch.Generator().manual_seed(0)
    values, weight = (torch.randint(-8, 9, (rows, 32), generator=rng).double() for rows in (40, 48))
    scales, weight_scales = torch.rand(40, generator=rng), torch.rand(48, generator=rng)
    bias = torch.randn(48, generator=rng).bfloat16()
    rows, narrow = (states.to(torch.float8_e4m3fn) for states in (values, weight))
    try:
        found = scaled_product(rows, scales, narrow, weight_scales, bias, True)
    except (RuntimeError, NotImplementedError) as error:  # PyTorch 2.11
        pytest.skip(f"no product by rows on this CPU: {str(error)[:80]}")
    exact = (values * scales[:, None]) @ weight.t()
    torch.testing.assert_close(found.double(), exact * weight_scales + bias.double(), rtol=2.0**-8, atol=1e-2)
    unscaled = scaled_product(rows, scales, narrow, None, None, False)
    torch.testing.assert_close(unscaled.double(), exact, rtol=2.0**-8, atol=1e-2)


def test_without_triton_nothing_is_compiled_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(execution.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, logger="megatron_bert"):
        assert not should_compile(None, torch.device("cuda"))
    assert "Triton is not installed" in caplog.text
    with pytest.raises(UserError, match="needs Triton"):
        should_compile(True, torch.device("cuda"))
