"""A step computes the same however it is run: packed, filled up, compiled, recomputed, fused; what is not finite is
skipped."""

import functools
import math

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from megatron_bert.data.batches import Batch
from megatron_bert.data.masking import IGNORED
from megatron_bert.model import MegatronBertConfig, MegatronBertForCausalLM, MegatronBertForPreTraining
from megatron_bert.planning.flops import training_flops
from megatron_bert.training.configuration import OptimizerSection
from megatron_bert.training.execution import build_objective, fuse_projections, should_compile
from megatron_bert.training.microbatch import FixedShapes, MicroBatch
from megatron_bert.training.objective import Objective, mean_loss
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.schedule import learning_rate_share
from megatron_bert.training.step import StepResult, Sums, train_step
from megatron_bert.training.throughput import Throughput, measured_flops_per_second
from tests.unit.test_training_parts import CPU, batch, tiny_model

SGD = functools.partial(torch.optim.SGD, lr=1.0, fused=True)


def packed(padded: Batch, row_tokens: int = 40) -> Batch:
    """The rows of a padded batch, two to a packed row; what is left of a row is a sequence of padding."""
    lengths = padded["attention_mask"].sum(-1).tolist()
    names = ("input_ids", "token_type_ids", "labels")
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in (*names, "position_ids")}
    boundaries, pairs = [0], []
    for first in range(0, len(lengths), 2):
        members = range(first, min(first + 2, len(lengths)))
        used = [lengths[at] for at in members]
        used.append(row_tokens - sum(used))
        for name in names:
            fill = torch.full((used[-1],), IGNORED if name == "labels" else 0)
            rows[name].append(torch.cat([*(padded[name][at, : lengths[at]] for at in members), fill]))
        rows["position_ids"].append(torch.cat([torch.arange(length) for length in used]))
        boundaries += [boundaries[-1] + sum(used[: at + 1]) for at in range(len(used))]
        pairs += [*(int(padded["next_sentence_label"][at]) for at in members), IGNORED]
    return {name: torch.stack(values) for name, values in rows.items()} | {
        "cu_seq_lens": torch.tensor(boundaries, dtype=torch.int32), "next_sentence_label": torch.tensor(pairs),
    }  # fmt: skip


def with_dropout() -> MegatronBertForPreTraining:
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return model


def steps_of(model: MegatronBertForPreTraining, objective: Objective, batches: list[Batch]) -> list[StepResult]:
    """Three SGD steps from a fixed random stream."""
    torch.manual_seed(5)
    optimizer = SGD(model.parameters())
    return [train_step(objective, optimizer, [objective.micro_batch(one)], clip_norm=1.0) for one in batches]


def assert_same(one: list[StepResult], other: list[StepResult], rel: float = 1e-5) -> None:
    for first, second in zip(one, other, strict=True):
        assert first.sums.means() == pytest.approx(second.sums.means(), rel=rel)
        assert first.gradient_norm.item() == pytest.approx(second.gradient_norm.item(), rel=rel)
        assert first.sums.num_tokens == second.sums.num_tokens
        assert first.sums.num_attended_pairs == second.sums.num_attended_pairs


def test_packed_rows_are_the_models_own_loss_on_padded_ones() -> None:
    model, inputs = tiny_model(), batch()
    wanted = model(**inputs).loss
    wanted.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    micro = MicroBatch.of(packed(inputs))
    lengths = inputs["attention_mask"].sum(-1)
    real = lengths[(inputs["labels"] != IGNORED).any(-1)]  # a sequence that predicts nothing passes for padding
    assert (micro.num_tokens, micro.num_attended_pairs) == (real.sum(), real.square().sum())
    loss = mean_loss(Objective(model, CPU)(micro), micro.num_masked, micro.num_pairs)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=2e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("filled_up", [False, True])
def test_causal_objective_is_the_models_own_loss(filled_up: bool) -> None:
    """Ours takes labels that are shifted already, the model's forward shifts them itself."""
    torch.manual_seed(0)
    model = MegatronBertForCausalLM(MegatronBertConfig(**{**tiny_model().config.to_dict(), "is_decoder": True})).train()
    ids = batch(padded=False)["input_ids"]
    wanted = model(input_ids=ids, labels=ids).loss
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    rows: Batch = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "labels": shifted}
    micro = MicroBatch.of(rows, FixedShapes(7, 24, 0.15) if filled_up else None)
    assert micro.num_masked == 6 * 19
    losses = Objective(model, CPU)(micro)
    assert mean_loss(losses, micro.num_masked, 0).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert losses.pair.item() == 0.0


def test_shapes_that_are_filled_up_change_nothing_and_stay() -> None:
    batches = [batch(seed=seed, rows=rows) for seed, rows in ((0, 6), (1, 6), (2, 3))]
    plain, filled = tiny_model(), tiny_model()
    shapes = FixedShapes(rows=6, row_tokens=24, predicted_share=0.15)
    wanted = steps_of(plain, Objective(plain, CPU), batches)
    assert_same(wanted, steps_of(filled, Objective(filled, CPU, shapes=shapes), batches))
    micros = [MicroBatch.of(one, shapes) for one in (*batches, *map(packed, batches[:2]))]
    assert {tuple(micro.inputs["input_ids"].shape) for micro in micros[:3]} == {(6, 24)}
    assert len({micro.positions.shape for micro in micros}) == 1
    assert {micro.inputs["attention_mask"].shape for micro in micros[:3]} == {(6, 1, 1, 24)}
    assert len({micro.inputs["cu_seq_lens_q"].shape for micro in micros[3:]}) == 1


def test_compiled_steps_agree_and_nothing_is_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracing and its guards; a GPU test has the generated kernels."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    batches = [batch(seed=0), batch(seed=1), batch(seed=2, rows=4)]
    plain, compiled = tiny_model(3), tiny_model(3)
    objective = build_objective(
        compiled, CPU, precision="float32", rows=6, row_tokens=24, predicted_share=0.15, compiled=True
    )
    assert_same(steps_of(plain, Objective(plain, CPU), batches[:1]), steps_of(compiled, objective, batches[:1]))
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs < 10  # one set for all three layers
    plain, other = tiny_model(3), {name: value.clone() for name, value in tiny_model(3).state_dict().items()}
    compiled.load_state_dict(other)
    assert_same(steps_of(plain, Objective(plain, CPU), batches), steps_of(compiled, objective, batches))
    assert counters["stats"]["unique_graphs"] == graphs
    plain, rows = tiny_model(3), [packed(one) for one in batches[:2]]
    compiled.load_state_dict(plain.state_dict())
    found = steps_of(compiled, objective, rows)
    assert_same(steps_of(plain, Objective(plain, CPU), rows), found)
    graphs = counters["stats"]["unique_graphs"]
    steps_of(compiled, objective, [packed(batch(seed=3))])
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_draws_the_same_dropout(recompute: str) -> None:
    results, calls = [], []
    for kind in ("none", recompute):
        model, count = with_dropout(), []
        part = model.bert.encoder.layer[0].attention.self.value
        part.register_forward_hook(lambda *_, count=count: count.append(1))
        core = model.bert.encoder.layer[0].attention.self.dropout
        objective = build_objective(
            model, CPU, precision="float32", rows=6, row_tokens=20, predicted_share=0.15, recompute=kind
        )
        results.append(steps_of(model, objective, [batch(), batch(seed=1)]))
        calls.append(len(count))
        assert core.p == 0.2
    assert calls == [2, 4 if recompute == "full" else 2]  # the projections belong to no attention core
    for one, other in zip(*results, strict=True):
        assert one.sums.means() == other.sums.means()
        assert one.gradient_norm == other.gradient_norm


def test_selective_recomputation_keeps_no_attention_probabilities() -> None:
    """Korthikanti et al. 2022, section 5: what the core keeps grows with S^2, and is not kept."""
    kept = {}
    for kind in ("none", "selective"):
        model = tiny_model()
        model.set_attn_implementation("eager")
        objective = build_objective(
            model, CPU, precision="float32", rows=6, row_tokens=20, predicted_share=0.15, recompute=kind
        )
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, shapes=shapes: (shapes.append(tensor.shape), tensor)[1], lambda tensor: tensor
        ):
            objective(objective.micro_batch(batch(padded=False)))
        kept[kind] = sum(shape[-2:] == (20, 20) for shape in shapes)
    assert kept["none"] >= 2
    assert kept["selective"] == 0


def test_fused_projections_are_the_three() -> None:
    plain, fused = tiny_model(), tiny_model()
    fuse_projections(fused)
    names = list(fused.state_dict())
    assert_same(*(steps_of(model, Objective(model, CPU), [batch(), batch(seed=1)]) for model in (plain, fused)))
    assert names == list(plain.state_dict())
    for one, other in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_bfloat16_carries_the_residuals_narrow_and_the_weights_wide() -> None:
    model = tiny_model()
    objective = build_objective(model, CPU, precision="bfloat16", rows=6, row_tokens=20, predicted_share=0.15)
    seen = []
    model.bert.encoder.layer[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    train_step(objective, SGD(model.parameters()), [objective.micro_batch(batch())], clip_norm=1.0)
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(**batch()).loss.dtype == torch.float32  # outside of training it is a float32 model as before
    assert seen[-1] == torch.float32


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    objective, optimizer = Objective(model, CPU), build_optimizer(model, OptimizerSection(learning_rate=1e-2))
    micro = objective.micro_batch(batch())
    assert train_step(objective, optimizer, [micro], clip_norm=1.0).applied
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    states = [value.clone() for state in optimizer.state.values() for value in state.values()]
    with monkeypatch.context() as patched:
        if where == "gradient":
            hook = model.cls.predictions.transform.dense.weight.register_hook(lambda gradient: gradient * math.inf)
        else:
            hook = None
            patched.setattr(objective, "token_losses", lambda *_: (torch.tensor(math.inf), torch.tensor(0.0)))
        skipped = train_step(objective, optimizer, [micro], clip_norm=1.0)
        if hook:
            hook.remove()
    assert not skipped.applied
    assert skipped.sums.means() == {}
    assert skipped.sums.num_tokens > 0
    for before, after in zip(weights, model.parameters(), strict=True):
        assert torch.equal(before, after)
        assert after.grad is None
    for before, after in zip(states, (v for state in optimizer.state.values() for v in state.values()), strict=True):
        assert torch.equal(before, after)
    after = train_step(objective, optimizer, [micro], clip_norm=1.0)
    assert after.applied
    assert skipped.sums.plus(after.sums).means() == after.sums.means()


def test_clipping_and_update_are_pytorchs() -> None:
    """Beside `clip_grad_norm_` and AdamW's plain loop."""
    ours, theirs = tiny_model(), tiny_model()
    section = OptimizerSection(learning_rate=1e-2, weight_decay=0.1, epsilon=1e-4)  # more than a rounded zero
    optimizer = build_optimizer(ours, section)
    groups = [{"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    reference = torch.optim.AdamW(groups, lr=1e-2, eps=1e-4, foreach=False)
    for seed in range(3):
        inputs = batch(seed=seed)
        norm = train_step(Objective(ours, CPU), optimizer, [MicroBatch.of(inputs)], clip_norm=0.5).gradient_norm
        theirs(**inputs).loss.backward()
        wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        assert norm.item() == pytest.approx(wanted.item(), rel=1e-4)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5)


def test_cosine_is_pytorchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    for step in range(10, 100):
        share = learning_rate_share(step, 10, 100, schedule="cosine", final_share=0.1)
        assert share == pytest.approx(reference.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        reference.step()
    assert learning_rate_share(100, 10, 100, schedule="cosine", final_share=0.1) == pytest.approx(0.1)
    assert learning_rate_share(100, 10, 100, final_share=0.25) == 0.25


def test_flops_are_those_that_pytorch_counts() -> None:
    """Of the forward pass; on full rows also the issue's closed formula."""
    model = tiny_model().eval()
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused kernel
    micro = MicroBatch.of(batch(padded=False))
    with FlopCounterMode(display=False) as counter:
        Objective(model, CPU)(micro)
    config = model.config
    pooler = 2 * 6 * config.hidden_size * (config.hidden_size + 2)
    forward = training_flops(config, micro.num_tokens, micro.num_attended_pairs, micro.num_masked) / 3
    assert forward + pooler == counter.get_total_flops()
    big = MegatronBertConfig()
    rows, row, hidden, predicted = 64, 512, big.hidden_size, 4900
    closed = 72 * rows * row * 24 * hidden**2 * (1 + row / (6 * hidden)) + 6 * predicted * hidden * (29056 + hidden)
    assert training_flops(big, rows * row, rows * row**2, predicted) == pytest.approx(closed, rel=1e-12)


def test_compilation_is_for_gpus_unless_asked_for() -> None:
    assert not should_compile(None, CPU)
    assert should_compile(True, CPU)
    assert not should_compile(False, torch.device("cuda"))


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.5, 2.0, 2.25])
    monkeypatch.setattr("megatron_bert.training.throughput.time.perf_counter", lambda: next(clock))
    config = tiny_model().config
    throughput = Throughput(config, CPU, peak=1e6)
    for _ in range(2):
        with throughput.waiting_for_data():
            pass
    sums = Sums(num_tokens=300, num_attended_pairs=4000, num_predicted=45)
    rates = throughput.rates(sums, 3.0)
    assert rates == {
        "tokens_per_second": 100.0, "seconds": 3.0, "data_waiting_share": 0.25,
        "mfu": training_flops(config, 300, 4000, 45) / 3e6,
    }  # fmt: skip
    assert throughput.rates(sums, 3.0)["data_waiting_share"] == 0.0
    assert "mfu" not in Throughput(config, CPU, peak=None).rates(sums, 3.0)
    assert measured_flops_per_second(CPU, "bfloat16") is None
