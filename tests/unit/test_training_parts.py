"""The parts of training against formulas and against the model's own loss."""

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_bert.data.masking import IGNORED
from megatron_bert.model import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.training.configuration import OptimizerSection
from megatron_bert.training.execution import build_objective
from megatron_bert.training.initialization import scale_residual_projections
from megatron_bert.training.metrics import MetricsSink
from megatron_bert.training.microbatch import MicroBatch
from megatron_bert.training.objective import Objective, mean_loss
from megatron_bert.training.optimizer import build_optimizer, parameter_groups
from megatron_bert.training.schedule import learning_rate_share, set_learning_rate
from megatron_bert.training.step import evaluate_batch, train_step

CPU = torch.device("cpu")


def tiny_model(layers: int = 2) -> MegatronBertForPreTraining:
    torch.manual_seed(0)
    config = MegatronBertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    return MegatronBertForPreTraining(config).train()


def batch(rows: int = 6, padded: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random rows; where `padded`, their lengths differ; one row has no pair and one no masked token."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 128, (rows, 20), generator=rng)
    lengths = torch.randint(6, 21, (rows,), generator=rng) if padded else torch.full((rows,), 20)
    mask = (torch.arange(20) < lengths[:, None]).long()
    labels = torch.where((torch.rand(rows, 20, generator=rng) < 0.3) & mask.bool(), ids, IGNORED)
    labels[-1] = IGNORED
    pairs = torch.randint(0, 2, (rows,), generator=rng)
    pairs[0] = IGNORED
    types = (torch.arange(20) >= lengths[:, None] // 2).long() * mask
    return {
        "input_ids": ids * mask, "token_type_ids": types, "attention_mask": mask, "labels": labels,
        "next_sentence_label": pairs,
    }  # fmt: skip


@pytest.mark.parametrize("padded", [True, False])
def test_objective_is_the_models_own_loss(padded: bool) -> None:
    """The reference is the forward of the model with labels, which projects every position."""
    model, inputs = tiny_model(), batch(padded=padded)
    model(**inputs).loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    wanted_loss = model(**inputs).loss.item()
    model.zero_grad()
    micro = MicroBatch.of(inputs)
    assert (micro.layout is None) == (not padded)
    loss = mean_loss(Objective(model, CPU)(micro), micro.num_masked, micro.num_pairs)
    loss.backward()
    assert loss.item() == pytest.approx(wanted_loss, rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=2e-5, atol=1e-7, msg=name)


def test_correct_predictions_are_counted() -> None:
    model, inputs = tiny_model().eval(), batch()
    micro = MicroBatch.of(inputs)
    losses = Objective(model, CPU)(micro)
    output = model(**{name: inputs[name] for name in ("input_ids", "token_type_ids", "attention_mask")})
    hits = (output.prediction_logits.argmax(-1) == inputs["labels"]).sum()
    pair_hits = (output.seq_relationship_logits.argmax(-1) == inputs["next_sentence_label"]).sum()
    assert losses.masked_lm_correct == hits
    assert losses.pair_correct == pair_hits


def test_nothing_masked_is_no_loss_and_no_gradient_of_the_head() -> None:
    model, inputs = tiny_model(), batch()
    inputs["labels"][:] = IGNORED
    micro = MicroBatch.of(inputs)
    objective = Objective(model, CPU)
    losses = objective(micro)
    mean_loss(losses, 0, micro.num_pairs).backward()
    assert losses.masked_lm.item() == 0.0
    assert "masked_lm_loss" not in objective.sums(losses, micro).means()


@pytest.mark.parametrize("pieces", [2, 3, 6])
def test_micro_batches_do_not_change_the_update(pieces: int) -> None:
    """The step divides by the global numbers, so cutting the batch anywhere leaves the same weights (mean of means
    would not: the rows have different numbers of masked tokens)."""
    inputs = batch(rows=6)
    updated = []
    for cut in (1, pieces):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
        chunks = [{name: part.chunk(cut)[at] for name, part in inputs.items()} for at in range(cut)]
        sums, norm, _ = train_step(
            Objective(model, CPU), optimizer, [MicroBatch.of(chunk) for chunk in chunks], clip_norm=1e9
        )
        updated.append((sums.means(), norm, [parameter.detach().clone() for parameter in model.parameters()]))
    assert updated[0][0] == pytest.approx(updated[1][0], rel=1e-5)
    assert updated[0][1].item() == pytest.approx(updated[1][1].item(), rel=1e-5)
    for one, other in zip(updated[0][2], updated[1][2], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


def test_gradients_are_clipped_by_their_common_norm() -> None:
    model = tiny_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    _, norm, _ = train_step(Objective(model, CPU), optimizer, [MicroBatch.of(batch())], clip_norm=0.01)
    moved = sum((new - old).square().sum() for new, old in zip(model.parameters(), before, strict=True)).sqrt()
    assert norm > 0.01
    assert moved.item() == pytest.approx(0.01, rel=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_changes_nothing() -> None:
    model = tiny_model().eval()
    micro = MicroBatch.of(batch())
    means = evaluate_batch(Objective(model, CPU), micro).means()
    assert means == evaluate_batch(Objective(model, CPU), micro).means()
    assert means["loss"] == pytest.approx(means["masked_lm_loss"] + means["pair_loss"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_keeps_float32_weights_and_a_near_loss() -> None:
    model = tiny_model()
    micro = MicroBatch.of(batch())
    bfloat16 = build_objective(model, CPU, precision="bfloat16", rows=6, row_tokens=20, predicted_share=0.15)
    near = evaluate_batch(bfloat16, micro).means()["loss"]
    assert near == pytest.approx(evaluate_batch(Objective(model, CPU), micro).means()["loss"], rel=0.02)
    optimizer = build_optimizer(model, OptimizerSection(learning_rate=1e-3))
    train_step(bfloat16, optimizer, [micro], clip_norm=1.0)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {state.dtype for state in states} == {torch.float32}


def test_decay_spares_biases_and_layer_norms() -> None:
    model = tiny_model()
    decaying, spared = parameter_groups(model.parameters(), 0.01)
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in spared["params"]:
        assert (
            names[id(parameter)].endswith("bias") or "ln" in names[id(parameter)] or "LayerNorm" in names[id(parameter)]
        )
    for parameter in decaying["params"]:
        assert not names[id(parameter)].endswith("bias")
        assert "ln" not in names[id(parameter)].split(".")
    assert len(decaying["params"]) + len(spared["params"]) == len(names)


def test_decay_is_decoupled() -> None:
    """Loshchilov and Hutter 2019, algorithm 2: with a zero gradient a weight shrinks by the rate times the decay."""
    weight = torch.nn.Linear(4, 4)
    optimizer = build_optimizer(weight, OptimizerSection(learning_rate=0.1, weight_decay=0.5))
    before = weight.weight.detach().clone(), weight.bias.detach().clone()
    for parameter in weight.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(weight.weight, before[0] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(weight.bias, before[1])


def test_schedule() -> None:
    shares = [learning_rate_share(step, 10, 100) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 11)
    assert max(shares) == shares[10] == 1.0
    assert all(a < b for a, b in zip(shares[:10], shares[1:11], strict=True))
    falls = [a - b for a, b in zip(shares[10:100], shares[11:101], strict=True)]
    assert falls == pytest.approx([1 / 90] * 90)
    assert shares[100] == 0.0
    assert learning_rate_share(0, 0, 5) == 1.0


def test_every_group_gets_the_learning_rate() -> None:
    optimizer = build_optimizer(tiny_model(), OptimizerSection(learning_rate=1.0))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_residual_projections_are_scaled() -> None:
    """arXiv 1909.08053, section 5.1: 1/sqrt(2N) on the weights before the residual additions, and on no others."""
    layers = 3
    model, scaled = tiny_model(layers), tiny_model(layers)
    scale_residual_projections(scaled, layers)
    changed = set()
    for (name, before), after in zip(model.named_parameters(), scaled.parameters(), strict=True):
        if not torch.equal(before, after):
            changed.add(name)
            torch.testing.assert_close(after, before / math.sqrt(2 * layers))
    wanted = {f"bert.encoder.layer.{n}.{part}.weight" for n in range(layers)
              for part in ("attention.output.dense", "output.dense")}  # fmt: skip
    assert changed == wanted


def test_metrics_file_has_a_record_a_line(tmp_path: Path) -> None:
    with MetricsSink(tmp_path / "m.jsonl", 2, progress=False) as sink:
        sink.step_done()
        sink.training(1, {"loss": 1.0, "tokens_per_second": 2.0})
        assert (tmp_path / "m.jsonl").read_text().count("\n") == 1
        sink.validation(2, {"loss": 0.5})
        sink.validation(2, {"loss": float("inf"), "score": float("nan")})
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert len(lines) == 3
    # RFC 8259, section 6: numeric values such as Infinity and NaN are not permitted
    assert json.loads(lines[-1], parse_constant=pytest.fail) == {
        "kind": "validation", "step": 2, "loss": None, "score": None,
    }  # fmt: skip
