"""float8: what refuses it, and torchao's emulated products against those of the model in float32."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.training import execution, float8
from megatron_bert.training.configuration import load_configuration
from megatron_bert.training.execution import build_objective, should_compile
from megatron_bert.training.float8 import check_float8, convert_layers, float8_refusal, fuse_float8_projections

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_345m.yaml"


def model(**changes: int) -> MegatronBertForPreTraining:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128, **changes}
    config = MegatronBertConfig(
        vocab_size=128, num_hidden_layers=2, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.1, **shape,
    )  # fmt: skip
    return MegatronBertForPreTraining(config).train()


def hidden_states_and_gradient(network: MegatronBertForPreTraining) -> tuple[torch.Tensor, torch.Tensor]:
    """Of 2 x 15 tokens: the states, and the gradient of their weighted sum by the first layer's queries' weight."""
    rng = torch.Generator().manual_seed(0)
    states = network.bert(torch.randint(5, 128, (2, 15), generator=rng)).last_hidden_state
    (states * torch.randn(states.shape, generator=rng)).sum().backward()
    weight = network.bert.encoder.layer[0].attention.self.query.weight
    assert weight.grad is not None
    return states.detach(), weight.grad


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((expected - found).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("capability", "has_torchao", "message"),
    [
        (None, True, "8.9 or more (H100, L40S), and this is a CPU: use bfloat16"),
        ((8, 0), True, "8.9 or more (H100, L40S), and this one has 8.0: use bfloat16"),
        ((9, 0), False, "needs torchao: pip install 'megatron-bert[fp8]'"),
        ((9, 0), True, None),
        ((8, 9), True, None),
    ],
)
def test_what_refuses_it(capability: tuple[int, int] | None, has_torchao: bool, message: str | None) -> None:
    """cuBLAS multiplies 8-bit numbers from compute capability 8.9 on (its documentation, cublasLtMatmul)."""
    found = float8_refusal(capability, has_torchao=has_torchao)
    assert (found is None) if message is None else (found is not None and message in found)


def test_this_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="this is a CPU"):
        check_float8(torch.device("cpu"))


def test_it_is_not_split_over_tensor_parallel_ranks() -> None:
    with pytest.raises(UserError, match=r"float8 does not go with mesh\.tensor"):
        load_configuration(RECIPE, ["training.precision=float8", "mesh.tensor=2"])
    assert load_configuration(RECIPE, ["training.precision=float8"]).training.precision == "float8"


def test_widths_have_to_be_multiples_of_16() -> None:
    with pytest.raises(UserError, match=r"multiples of 16, and layer 0\.intermediate\.dense is 64 x 120: use bfloat16"):
        convert_layers(model(intermediate_size=120), pads=True)


@needs_torchao
@pytest.mark.parametrize("fused", [False, True])
def test_results_are_those_of_float32_within_its_rounding(fused: bool) -> None:
    """e4m3 has 3 bits of mantissa and rounds by 2 ^ -4 at most, 3.6 % in the mean square, and e5m2 by twice that: a
    product is off by 5 or 8 %, and the longest way here has six of them.
    """
    expected, expected_gradient = hidden_states_and_gradient(model())
    network = model()
    names = list(network.state_dict())
    parameters = list(network.parameters())
    convert_layers(network, pads=True, emulate=True)
    if fused:
        fuse_float8_projections(network)
    assert list(network.state_dict()) == names
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    states, gradient = hidden_states_and_gradient(network)
    assert 1e-3 < relative_error(expected, states) < 0.15
    assert 1e-3 < relative_error(expected_gradient, gradient) < 0.3
    assert gradient.dtype == torch.float32


@needs_torchao
def test_the_objective_converts_layers_and_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = convert_layers
    monkeypatch.setattr(execution, "convert_layers", lambda model, pads: convert(model, pads=pads, emulate=True))
    network = model()
    build_objective(network, torch.device("cpu"), precision="float8", rows=2, row_tokens=16, predicted_share=0.15)
    kinds = {
        name: type(module).__name__ for name, module in network.named_modules() if "Linear" in type(module).__name__
    }
    assert {name for name, kind in kinds.items() if kind == "Float8Linear"} == {n for n in kinds if ".layer." in n}
    assert hidden_states_and_gradient(network)[0].isfinite().all()


@needs_torchao
def test_compiled_layers_are_one_graph() -> None:
    network = model()
    convert_layers(network, pads=False, emulate=True)
    fuse_float8_projections(network)
    layer, states = network.bert.encoder.layer[0], torch.randn(2, 16, 64)
    expected = layer(states)
    compiled = torch.compile(layer.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    assert relative_error(expected, compiled(states)) < 1e-5


def test_without_triton_nothing_is_compiled_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, logger="megatron_bert"):
        assert not should_compile(None, torch.device("cuda"))
    assert "Triton is not installed" in caplog.text
    with pytest.raises(UserError, match="needs Triton"):
        should_compile(True, torch.device("cuda"))
