"""The planner's formulas against hand-counted cases, PyTorch's own counters, and what was measured."""

import math
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.planning.communication import Collective, collectives_of_step, tensor_collectives
from megatron_bert.planning.counting import MemoryCounter
from megatron_bert.planning.devices import GIB, GPUS, Gpu, gpu_named
from megatron_bert.planning.layout import Job, Layout
from megatron_bert.planning.memory import layer_activation_bytes, memory_of_step, weight_bytes
from megatron_bert.planning.paper import paper_table
from megatron_bert.planning.parameters import rank_parameters, sequence_parameters
from megatron_bert.planning.ranking import Choice, _divisors, plan_of, rank
from megatron_bert.planning.speed import (
    _HANDOVER_SECONDS,
    _lost_in_parts,
    _product_seconds,
    attention_seconds,
    collective_seconds,
    product_seconds,
    step_flops,
    step_time,
    tensor_seconds,
)
from megatron_bert.sharding import on_sequence_shards, split_dim
from megatron_bert.training.configuration import SIZES

H100 = GPUS["h100"]


def config_of(
    hidden: int = 64, layers: int = 2, heads: int = 4, vocabulary: int = 256, **changes
) -> MegatronBertConfig:
    return MegatronBertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden,
        vocab_size=vocabulary, **changes,
    )  # fmt: skip


BERT_345M = config_of(1024, 24, 16, 30592)  # the vocabulary of the measured run


# --- Parameters


@pytest.mark.parametrize("shape", [(64, 2, 4, 256), (96, 3, 8, 512), (1024, 2, 16, 29056)])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_parameters_are_those_of_the_model_split_by_the_table(shape, degree):
    with torch.device("meta"):
        model = MegatronBertForPreTraining(config_of(*shape))
    held = sum(p.numel() // (1 if split_dim(name) is None else degree) for name, p in model.named_parameters())
    assert rank_parameters(model.config, degree) == held
    on_shards = sum(p.numel() for name, p in model.named_parameters() if on_sequence_shards(name))
    assert sequence_parameters(model.config) == on_shards


# --- Time


@pytest.mark.parametrize("feed_forward", [4, 3])
def test_products_and_attention_are_what_pytorch_counts(feed_forward):
    """On a GPU of one FLOP a second whose memory takes no time, seconds are FLOPs."""
    config = config_of(attn_implementation="eager")
    config.intermediate_size = feed_forward * config.hidden_size
    slow = Gpu("slow", 1.0, 1.0, math.inf, 8, 1.0, 1.0, 1.0, multiprocessors=1)
    job, layout = Job(config, 1, batch_rows=3, row_tokens=16, predicted_share=1.0), Layout(micro_rows=3)
    with torch.device("meta"):
        model = MegatronBertForPreTraining(config).train()
        with FlopCounterMode(display=False) as counter:
            output = model(torch.zeros(3, 16, dtype=torch.long))
            (output.prediction_logits.sum() + output.seq_relationship_logits.sum()).backward()
    pooler_and_pair = 3 * 3 * (2 * config.hidden_size**2 + 4 * config.hidden_size)
    seconds = product_seconds(job, layout, slow) + attention_seconds(job, layout, slow)
    assert seconds == counter.get_total_flops() - pooler_and_pair
    assert seconds == step_flops(job)


def test_recomputing_takes_a_third_more_products():
    job = Job(BERT_345M, 1, 64, predicted_share=0.0)
    gpu = replace(H100, multiprocessors=1)
    none, full = (product_seconds(job, Layout(recompute=what, micro_rows=64), gpu) for what in ("none", "full"))
    assert full == pytest.approx(none * 4 / 3, rel=1e-3)


def test_tensor_parallel_products_are_shares():
    job = Job(BERT_345M, 4, 64, predicted_share=0.0)
    gpu = replace(H100, memory_bytes_per_second=math.inf, multiprocessors=1)
    whole, part = (product_seconds(job, Layout(tensor=degree, micro_rows=64), gpu) for degree in (1, 4))
    assert part == pytest.approx(whole / 4)
    assert product_seconds(job, Layout(tensor=4, micro_rows=64), H100) > part  # thin ones wait for memory


def test_the_last_round_of_tiles_is_paid_whole():
    """133 tiles on 132 multiprocessors take as long as 264."""
    one, two = (Job(config_of(256, 1, 4, 256), 1, tiles, 128, predicted_share=0.0) for tiles in (132, 264))
    between = replace(one, batch_rows=133)
    gpu = replace(H100, memory_bytes_per_second=math.inf)
    forward = [_product_seconds(job.tokens, 256, 256, gpu) for job in (one, between, two)]
    assert forward == pytest.approx([forward[0], 2 * forward[0], 2 * forward[0]])


@pytest.mark.parametrize(
    ("size", "rows", "recompute", "seconds"),
    [("345m", 64, "none", 0.1569), ("1.3b", 32, "none", 0.2573), ("3.9b", 8, "full", 0.3642)],
)
def test_a_step_takes_what_an_h100_took(size, rows, recompute, seconds):
    """Full rows of 512, compiled, dropout 0.1: `benchmarks/plan_gpu.py`."""
    hidden, layers, heads = SIZES[size]
    job = Job(config_of(hidden, layers, heads, 29056), 1, rows)
    layout = Layout(micro_rows=rows, recompute=recompute)
    assert step_time(job, layout, H100).total == pytest.approx(seconds, rel=0.15)


@pytest.mark.parametrize(
    ("size", "rows", "layout", "seconds"),
    [
        ("345m", 128, Layout(replicate=2, micro_rows=64), 0.1517),
        ("3.9b", 16, Layout(tensor=2, sequence_parallel=True, micro_rows=16), 0.2506),
        ("3.9b", 16, Layout(tensor=2, sequence_parallel=True, micro_rows=16, overlap=True), 0.2365),
    ],
)
def test_a_step_takes_what_two_h100_took(size, rows, layout, seconds):
    """`benchmarks/scaling.py --gpus 2 --group bert`."""
    hidden, layers, heads = SIZES[size]
    job = Job(config_of(hidden, layers, heads, 29056), 2, rows)
    assert step_time(job, layout, H100).total == pytest.approx(seconds, rel=0.10)


@pytest.mark.parametrize(
    ("size", "gpus", "layout", "seconds"),
    [
        ("345m", 1, Layout(micro_rows=64), 0.1394),
        ("345m", 2, Layout(replicate=2, micro_rows=64), 0.1453),
        ("345m", 2, Layout(shard=2, micro_rows=64), 0.1574),
        ("3.9b", 1, Layout(micro_rows=16), 0.3777),
        ("3.9b", 2, Layout(replicate=2, micro_rows=16), 0.4115),
        ("3.9b", 2, Layout(shard=2, micro_rows=16), 0.4363),
        ("345m", 4, Layout(replicate=4, micro_rows=64), 0.1473),
        ("345m", 4, Layout(shard=2, replicate=2, micro_rows=64), 0.1593),
        ("3.9b", 4, Layout(tensor=4, sequence_parallel=True, micro_rows=32, overlap=True), 0.2324),
        ("3.9b", 4, Layout(replicate=4, micro_rows=16), 0.4253),
        ("3.9b", 4, Layout(shard=4, micro_rows=16), 0.4252),
        ("3.9b", 4, Layout(shard=4, micro_rows=16, keep_layers=True), 0.4123),
    ],
)
def test_a_step_takes_what_one_to_four_h200_took(size, gpus, layout, seconds):
    """`benchmarks/scaling.py --group bert`."""
    hidden, layers, heads = SIZES[size]
    job = Job(config_of(hidden, layers, heads, 29056), gpus, layout.data * layout.micro_rows)
    assert step_time(job, layout, GPUS["h200"]).total == pytest.approx(seconds, rel=0.10)


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "layout", "seconds"),
    [
        (1536, 40, 16, Layout(micro_rows=8), 0.1450),
        (1920, 54, 20, Layout(tensor=2, sequence_parallel=True, micro_rows=8, overlap=True), 0.1655),
        (2304, 64, 24, Layout(tensor=4, micro_rows=8), 0.1987),
        (2304, 64, 24, Layout(tensor=4, sequence_parallel=True, micro_rows=8), 0.1909),
        (2304, 64, 24, Layout(tensor=4, sequence_parallel=True, micro_rows=8, overlap=True), 0.1581),
    ],
)
def test_a_step_of_the_papers_shapes_takes_what_h200_took(hidden, layers, heads, layout, seconds):
    """`benchmarks/scaling.py`: the weak scaling of Shoeybi et al. 2019, table 1."""
    config = config_of(hidden, layers, heads, 50304, max_position_embeddings=1024)
    job = Job(config, layout.tensor, 8, 1024, predicted_share=1.0)
    assert step_time(job, layout, GPUS["h200"]).total == pytest.approx(seconds, rel=0.10)


@pytest.mark.parametrize(
    ("hidden", "ranks", "whole", "lost"),
    [(1920, 2, 1092e-6, 0.02), (2560, 4, 929e-6, 0.08), (2304, 4, 742e-6, 0.11), (3072, 8, 649e-6, 0.35)],
)
def test_products_in_parts_lose_what_they_lost(hidden, ranks, whole, lost):
    """A rank's eight products of 8,192 tokens, on one H200: benchmarks/RESULTS.md, "Four GPUs"."""
    matrices = [(3 * hidden // ranks, hidden), (hidden, hidden // ranks), (4 * hidden // ranks, hidden)]
    shapes = [shape for n, k in [*matrices, (hidden, 4 * hidden // ranks)] for shape in ((8192, n, k), (8192, k, n))]
    seconds = sum(_lost_in_parts(*shape, ranks, GPUS["h200"]) for shape in shapes)
    assert seconds / whole == pytest.approx(lost, abs=0.12)


def test_a_host_limits_small_passes_of_sharded_recomputed_layers_alone():
    """A quarter of the rows in each of four passes: the host's share is the same for each."""
    queued = Layout(shard=2, micro_rows=4, recompute="full")
    for recorded in (replace(queued, recompute="none"), replace(queued, shard=1, replicate=2)):
        assert step_time(Job(BERT_345M, 2, 8), recorded, H100).host == 0
    one, four = (step_time(Job(BERT_345M, 2, rows), queued, H100) for rows in (8, 32))
    assert four.host == pytest.approx(4 * one.host)
    assert one.host > one.computation
    assert step_time(Job(BERT_345M, 2, 512), replace(queued, micro_rows=256), H100).host == 0


# --- Communication


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_no_product_hides_is_waited_for(recompute):
    """Where products take no time, overlap changes nothing; where sending takes none, GPUs wait for each other."""
    job, layers = Job(BERT_345M, 2, 64), BERT_345M.num_hidden_layers
    plain = Layout(tensor=2, sequence_parallel=True, recompute=recompute, micro_rows=16)
    overlapped = replace(plain, overlap=True)
    gpu = replace(H100, memory_bytes_per_second=math.inf, latency_seconds=_HANDOVER_SECONDS)
    fast = replace(gpu, flops_per_second=math.inf)
    assert tensor_seconds(job, overlapped, fast) == pytest.approx(tensor_seconds(job, plain, fast))
    assert tensor_seconds(job, overlapped, gpu) < 0.7 * tensor_seconds(job, plain, gpu)
    linked = replace(gpu, node_bytes_per_second=math.inf, latency_seconds=0.0)
    handovers = 4 * layers * (4 + 4 + (4 if recompute == "full" else 0))
    assert tensor_seconds(job, overlapped, linked) == pytest.approx(handovers * _HANDOVER_SECONDS)


def test_overlap_within_a_node_only():
    job = Job(config_of(1024, 2, 16, 1024), 16, 64)
    assert {plan.layout.overlap for plan in rank(job, H100) if plan.layout.sequence_parallel} == {True}
    assert {plan.layout.overlap for plan in rank(job, H100, Choice(overlap=False))} == {False}
    assert {plan.layout.overlap for plan in rank(job, H100, Choice(tensor=16))} == {False}
    with pytest.raises(UserError, match="one node, which has 8"):
        rank(job, H100, Choice(tensor=16, overlap=True))
    with pytest.raises(UserError, match="overlap needs sequence parallelism"):
        rank(job, H100, Choice(sequence_parallel=False, overlap=True))


@pytest.mark.parametrize(("kind", "sent"), [("all-reduce", 12), ("all-gather", 6), ("reduce-scatter", 6)])
def test_a_ring_of_four_moves_eight_bytes(kind, sent):
    """By hand: in each of 3 rounds every rank sends a part of 2 bytes; an all-reduce scatters, then gathers."""
    assert Collective(kind, "tensor", 4, 8).sent_bytes == sent
    assert Collective(kind, "tensor", 1, 8).sent_bytes == 0


def test_a_layer_has_the_papers_two_all_reduces_a_direction():
    """arXiv 1909.08053, figure 4; with sequence parallelism as many all-gathers and reduce-scatters each."""
    job = Job(config_of(layers=1), 2, 4)
    states = 4 * 512 * 64 * 2
    plain = tensor_collectives(job, Layout(tensor=2, micro_rows=4))
    assert [one.count for one in plain if one.num_bytes == states] == [4]
    sequence = tensor_collectives(job, Layout(tensor=2, sequence_parallel=True, micro_rows=4))
    counts = [(one.kind, one.count) for one in sequence if one.num_bytes == states]
    # Two: into the first layer and out of the last.
    assert counts == [("all-gather", 4), ("reduce-scatter", 4), ("all-gather", 2)]
    logits = 0.15 * 4 * 512 * 256
    assert all(one.num_bytes < logits or one.num_bytes in (states, 2 * states) for one in plain)


def test_fully_sharded_traffic_is_three_times_the_parameters():
    """Rajbhandari et al. 2019, section 7.2.2: 3 psi, of which two gatherings are of 2 bytes here and a sum of 4."""
    job = Job(config_of(layers=50), 8, 8)
    sent = sum(one.sent_bytes for one in collectives_of_step(job, Layout(shard=8, micro_rows=1)))
    assert sent == pytest.approx((2 + 2 + 4) * rank_parameters(job.config) * 7 / 8, rel=0.01)


def test_a_group_beyond_the_node_goes_through_the_network():
    one, layout = Collective("all-gather", "shard", 8, 10**9), Layout(tensor=8, shard=8)
    across, within = collective_seconds(one, layout, H100), collective_seconds(one, Layout(shard=8), H100)
    assert across / within == pytest.approx(H100.node_bytes_per_second / H100.network_bytes_per_second, rel=0.05)


# --- Memory


def test_a_layer_keeps_34_bytes_a_hidden_value():
    """Korthikanti et al. 2022, equation 1 without the scores (5 a s / h), which a fused kernel does not keep."""
    job = Job(BERT_345M, 1, 4)
    tokens, hidden, heads = 4 * 512, 1024, 16
    assert layer_activation_bytes(job, Layout(micro_rows=4)) == tokens * (34 * hidden + 4 * heads)
    assert layer_activation_bytes(job, Layout(recompute="selective", micro_rows=4)) == tokens * 34 * hidden
    assert layer_activation_bytes(job, Layout(recompute="full", micro_rows=4)) == tokens * 2 * hidden
    # Equation 2: 10 + 24 / t; equation 4: 34 / t, and here the two gathered inputs, 4, whole.
    half = Layout(tensor=2, recompute="selective", micro_rows=4)
    assert layer_activation_bytes(job, half) == tokens * (10 + 24 / 2) * hidden
    half = Layout(tensor=2, recompute="selective", micro_rows=4, sequence_parallel=True)
    assert layer_activation_bytes(job, half) == tokens * ((34 - 4) / 2 + 4) * hidden


def test_states_take_16_bytes_a_parameter_by_the_number_of_shards():
    job = Job(BERT_345M, 8, 8)
    plan = memory_of_step(job, Layout(shard=4, replicate=2, micro_rows=1))
    parameters = rank_parameters(BERT_345M)
    assert weight_bytes(job, Layout(shard=4, replicate=2)) == parameters
    assert plan.weights + plan.optimizer == 3 * parameters


@pytest.mark.parametrize(("rows", "predicted", "gib"), [(44, 2944, 22.51), (64, 2944, 30.60)])
def test_memory_is_what_an_h100_reported(rows, predicted, gib):
    """The runs of the step's time, above: the most that PyTorch had allocated."""
    job = Job(BERT_345M, 1, rows, predicted_share=predicted / (rows * 512))
    assert memory_of_step(job, Layout(micro_rows=rows)).total / GIB == pytest.approx(gib, rel=0.10)


def test_the_counter_sees_what_lives():
    with MemoryCounter() as memory:
        first = torch.zeros(1000)
        second = first + 1
        assert memory.live_bytes == 8000
        view = second[10:]
        del first, second
        assert memory.live_bytes == 4000  # the view holds its storage
        del view
        storage = torch.empty(500).untyped_storage()
        storage.resize_(0)
        assert (memory.live_bytes, memory.peak_bytes) == (0, 8000)


# --- Ranking


def test_the_fastest_that_fits_is_first_and_each_other_has_one_reason():
    plans = rank(Job(config_of(2560, 48, 40, 29056), 64, 1024), H100)
    fitting = [plan for plan in plans if plan.fits]
    assert not plans[0].against
    assert all(plan.against for plan in plans[1:])
    assert fitting == plans[: len(fitting)]
    assert [plan.time.total for plan in fitting] == sorted(plan.time.total for plan in fitting)
    assert all(plan.layout.gpus == 64 for plan in plans)
    assert all(0 < plan.mfu < plan.scaling_efficiency <= 1.001 for plan in plans)


def test_any_number_of_gpus_is_answered_soon():
    """A prime, whose factors were looked for one by one, for the ranks and again for the rows of each."""
    before = time.process_time()
    rank(Job(config_of(), 1_000_000_007, 1_000_000_007), H100)
    assert time.process_time() - before < 5
    assert _divisors(360) == [number for number in range(1, 361) if 360 % number == 0]
    assert _divisors(360, 8) == [1, 2, 3, 4, 5, 6, 8]


def test_what_does_not_fit_says_how_much_it_needs():
    job = Job(config_of(3584, 56, 56, 50176), 8, 64)
    plan = next(plan for plan in rank(job, H100) if plan.layout.shard == plan.layout.tensor == 1)
    assert plan.memory.total > 16 * 8.8e9
    assert plan.against == f"needs {plan.memory.total / GIB:.0f} GiB of 79"


def test_norms_are_slower_where_every_rank_does_all_or_kernels_are_missing():
    """`elementwise_bytes`: `training.layer_kernels` are of layers that no data-parallel ranks share."""
    plans = rank(Job(BERT_345M, 4, 256), GPUS["h200"], Choice(tensor=1, recompute="none", micro_rows=64))
    assert [plan.layout.shard for plan in plans] == [1, 4, 4]
    assert all("norms and dropouts of sharded layers" in plan.against for plan in plans[1:])


def test_more_gpus_of_a_kind_never_predict_more_than_their_number():
    times = [rank(Job(BERT_345M, gpus, 1024), H100)[0].time.total for gpus in (1, 2, 4, 8, 16)]
    assert times == sorted(times, reverse=True)
    assert all(one / other <= 2.01 for one, other in zip(times, times[1:], strict=False))


def test_a_choice_is_kept():
    plans = rank(Job(BERT_345M, 8, 64), H100, Choice(tensor=2, shard=2, sequence_parallel=True, recompute="full"))
    assert {(p.layout.tensor, p.layout.shard, p.layout.replicate) for p in plans} == {(2, 2, 2)}
    assert all(p.layout.sequence_parallel and p.layout.recompute == "full" for p in plans)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(tensor=3), "8 GPUs cannot be split"),
        (Layout(tensor=32, shard=1), "8 GPUs cannot be split"),
        (Layout(shard=8, micro_rows=5), "micro-batches of 5"),
        (Layout(shard=8, sequence_parallel=True), "sequence parallelism needs"),
    ],
)
def test_impossible_layouts_are_refused(layout, said):
    with pytest.raises(UserError, match=said):
        plan_of(Job(BERT_345M, 8, 64), layout, H100)


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(UserError, match="did you mean h200"):
        gpu_named("h20")


# --- The paper


def test_the_papers_weak_scaling_comes_out():
    """arXiv 1909.08053, figure 5: our step on its servers, nothing fitted. Data parallelism loses less here than there:
    FSDP2 sums gradients beside the backward pass, which hides most of it; 2.5B lost 12 points to it.
    """
    rows = paper_table()
    assert [round(row.parameters / 1e9, 1) for row in rows[:4]] == [1.2, 2.5, 4.2, 8.3]
    assert [row.gpus for row in rows] == [1, 2, 4, 8, 64, 128, 256, 512]
    assert all(row.predicted == pytest.approx(row.paper, abs=0.08) for row in rows[:4])
    assert all(row.predicted == pytest.approx(row.paper, abs=0.16) for row in rows)
