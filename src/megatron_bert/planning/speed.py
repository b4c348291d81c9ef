"""How long a step takes, by formula: a sum of parts, each as fast as what limits it (the roofline model: Williams et
al. 2009, Communications of the ACM 52(4)).

T tokens and M predicted positions of a micro-batch, h hidden, F feed-forward, s row length, V vocabulary, t
tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from megatron_bert.planning.communication import (
    Collective,
    collectives_of_step,
    layer_collectives,
    replica_collectives,
    sharding_collectives,
)
from megatron_bert.planning.devices import Gpu
from megatron_bert.planning.flops import training_flops
from megatron_bert.planning.layout import Job, Layout
from megatron_bert.planning.parameters import layer_matrices, outer_matrices, rank_parameters

__all__ = ["StepTime", "step_flops", "step_time"]

_BF16 = 2
_HOST_LAYER_SECONDS = 9e-3  # forward and backward: 3.9b sharded over two H100 (benchmarks/RESULTS.md)
_HANDOVER_SECONDS = 10e-6  # until GPUs have waited for each other within a recorded pass: two H200 (RESULTS.md)
_TAKEN_BESIDE = 0.5  # of the time that bytes take over a node's links: two H200 (RESULTS.md)
_TILE = (128, 256)  # of a result, that one multiprocessor computes: what cuBLAS takes for large products on Hopper
_PART_TILES = (_TILE, (256, 128), (192, 192), (128, 192), (192, 128), (128, 128))  # for parts of products (traces)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, part by part; their sum is the step's.

    Attributes:
        products: of matrices, in the layers and the head.
        attention: the fused kernel.
        elementwise: activation, norms, dropout, residuals, sums of biases: bytes through memory.
        optimizer: AdamW, the gradient's norm and the weights' conversion to bfloat16.
        tensor_communication: what tensor-parallel ranks exchange, as far as the layer waits for it.
        data_communication: what data-parallel ranks exchange, as far as computation does not hide it.
        host: what a GPU waits for its host, which queues the kernels of sharded layers one by one where activations
            are recomputed; other passes are recorded (`training.graphs`).
    """

    products: float
    attention: float
    elementwise: float
    optimizer: float
    tensor_communication: float
    data_communication: float
    host: float

    @property
    def total(self) -> float:
        """Of the step."""
        return self.computation + self.tensor_communication + self.data_communication + self.host

    @property
    def computation(self) -> float:
        """Without communication."""
        return self.products + self.attention + self.elementwise + self.optimizer


def step_flops(job: Job) -> float:
    """Model FLOPs of the step over all GPUs; nothing that is computed twice counts twice."""
    predicted = round(job.tokens * job.predicted_share)
    return training_flops(job.config, job.tokens, job.batch_rows * job.row_tokens**2, predicted)


def step_time(job: Job, layout: Layout, gpu: Gpu) -> StepTime:
    """The prediction for a GPU of the layout."""
    passes = layout.micro_batches(job)
    parts = (product_seconds, attention_seconds, elementwise_seconds)
    products, attention, elementwise = (part(job, layout, gpu) for part in parts)
    computation = products + attention + elementwise
    exposed = passes * exposed_seconds(sharding_collectives(job, layout), layout, gpu, computation)
    # Replicas send in the last pass, beside its backward half: of three products as many as FLOPs say, two.
    exposed += exposed_seconds(replica_collectives(job, layout), layout, gpu, computation * 2 / 3)
    in_tensor = tensor_seconds(job, layout, gpu)
    busy = passes * computation + exposed + in_tensor
    is_queued = layout.fully_sharded and layout.recompute != "none"
    queued = passes * job.config.num_hidden_layers * _HOST_LAYER_SECONDS if is_queued else 0.0
    return StepTime(
        products=passes * products,
        attention=passes * attention,
        elementwise=passes * elementwise,
        optimizer=optimizer_seconds(job, layout, gpu),
        tensor_communication=in_tensor,
        data_communication=exposed,
        host=max(queued - busy, 0.0),
    )


def product_seconds(job: Job, layout: Layout, gpu: Gpu) -> float:
    """Products of one micro-batch: of each, the forward pass's, and for the gradients of its two operands one each of
    the same size (arXiv 2104.04473, appendix); once more the forward pass's of layers that are computed again.
    """
    config, tensor = job.config, layout.tensor
    h = config.hidden_size
    layer = [shape for pair in _layer_products(job, layout) for shape in pair]
    predicted = layout.micro_predicted(job)
    head = [(predicted, h, h), (predicted, config.vocab_size // tensor, h)]
    forward_passes = 2 if layout.recompute == "full" else 1
    in_layers = sum(_product_and_gradients(m, n, k, gpu, forward_passes) for m, n, k in layer)
    return config.num_hidden_layers * in_layers + sum(_product_and_gradients(m, n, k, gpu, 1) for m, n, k in head)


def _layer_products(job: Job, layout: Layout) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """A layer's column-parallel and its row-parallel products: tokens, output and input features."""
    tokens, tensor = layout.micro_tokens(job), layout.tensor
    h, f = job.config.hidden_size, job.config.intermediate_size
    column = [(tokens, 3 * h // tensor, h), (tokens, f // tensor, h)]
    return column, [(tokens, h, h // tensor), (tokens, h, f // tensor)]


def _product_and_gradients(m: int, n: int, k: int, gpu: Gpu, forward_passes: int) -> float:
    gradients = _product_seconds(m, k, n, gpu) + _product_seconds(k, n, m, gpu)
    return forward_passes * _product_seconds(m, n, k, gpu) + gradients


def _product_seconds(m: int, n: int, k: int, gpu: Gpu) -> float:
    """(m, k) times (k, n) in bfloat16: limited by multiplying, or by reading and writing once. Tiles of the result are
    computed by all multiprocessors at once, and in the last round some of them have none (NVIDIA, Matrix Multiplication
    Background User's Guide, section 3.3: wave quantization).
    """
    num_bytes = _BF16 * (m * k + k * n + m * n)
    rounds = max(ceil(m / _TILE[0]) * ceil(n / _TILE[1]), 1) / gpu.multiprocessors
    multiplying = 2 * m * n * k / gpu.flops_per_second * ceil(rounds) / rounds
    return max(multiplying, num_bytes / gpu.memory_bytes_per_second)


def _lost_in_parts(m: int, n: int, k: int, parts: int, gpu: Gpu) -> float:
    """What (m, k) times (k, n) takes longer where it is computed in so many parts of its rows, one after the other:
    each has a last round of its own. By the tiles that are best for the whole, and for a part.
    """

    def computed(rows: int) -> int:
        rounds = ((ceil(ceil(rows / a) * ceil(n / b) / gpu.multiprocessors), a * b) for a, b in _PART_TILES)
        return min(number * tile for number, tile in rounds) * gpu.multiprocessors

    return 2 * k * (parts * computed(m // parts) - computed(m)) / gpu.flops_per_second


def attention_seconds(job: Job, layout: Layout, gpu: Gpu) -> float:
    """The fused kernel of one micro-batch: 4 h s FLOPs a token forward, twice that backward; a third more where the
    forward pass is taken twice.
    """
    forward = 4 * job.config.hidden_size * job.row_tokens * layout.micro_tokens(job) / layout.tensor
    passes = 3 if layout.recompute == "none" else 4
    return passes * job.config.num_hidden_layers * forward / gpu.attention_flops_per_second


def elementwise_bytes(job: Job, layout: Layout) -> float:
    """Read and written by what is no product in the layers of one micro-batch, in bfloat16, each kernel once.

    As compiled, forward, of width h: a norm 4, dropout + residual + norm 9, dropout + residual 7; of width F: the
    activation 4. Backward, of width h: two norms with sums for their weights 12 each, two dropouts 5, four sums for
    biases 2, the three projections put together 12 and summed 6; of width F: the activation 6, a sum for its bias 2.
    With `training.layer_kernels`, dropout + residual + norm of each half is 8 forward and 10 backward, with all sums.
    """
    config, tensor = job.config, layout.tensor
    on_shards = tensor if layout.sequence_parallel else 1
    has_kernels = not layout.fully_sharded and layout.recompute != "full"
    residual_forward, residual_backward, bias_sum = (16, 20, 0) if has_kernels else (20, 2 * 12 + 2 * 5 + 2 * 2, 2)
    forward = residual_forward * config.hidden_size / on_shards + 4 * config.intermediate_size / tensor
    split = (12 + 6) / tensor
    backward = (residual_backward / on_shards + split) * config.hidden_size
    backward += (6 + bias_sum) * config.intermediate_size / tensor
    passes = forward * (2 if layout.recompute == "full" else 1) + backward
    return config.num_hidden_layers * layout.micro_tokens(job) * passes


def elementwise_seconds(job: Job, layout: Layout, gpu: Gpu) -> float:
    """At the rate of kernels that draw random numbers or sum as they go: nine tenths of a plain copy's."""
    return elementwise_bytes(job, layout) / (0.87 * gpu.memory_bytes_per_second)


def optimizer_bytes_moved(job: Job, layout: Layout) -> float:
    """AdamW reads weights, gradients and two moments and writes all but gradients: 28 bytes a parameter; the norm reads
    gradients: 4; and each micro-batch reads weights in float32, writes them in bfloat16 and its gradients likewise: 12,
    and 6 more where layers are computed again. Fully sharded, it converts parts of weights and copies whole ones from
    the message twice, or once where layers are kept, widens whole gradients for theirs and adds a part to the last.
    """
    parameters = rank_parameters(job.config, layout.tensor)
    config, tensor = job.config, layout.tensor
    matrices = config.num_hidden_layers * layer_matrices(config, tensor) + outer_matrices(config, tensor)
    in_a_pass: float = 18 if layout.recompute == "full" else 12
    if layout.fully_sharded:
        in_a_pass = (1 if layout.keep_layers else 2) * (6 / layout.shard + 4) + 6 + 12 / layout.shard
    return 32 * parameters / layout.shard + in_a_pass * matrices * layout.micro_batches(job)


def optimizer_seconds(job: Job, layout: Layout, gpu: Gpu) -> float:
    """At three quarters of a plain copy's rate, which is what PyTorch's fused AdamW was seen to reach."""
    return optimizer_bytes_moved(job, layout) / (0.75 * gpu.memory_bytes_per_second)


def collective_seconds(one: Collective, layout: Layout, gpu: Gpu) -> float:
    """Of all that it counts, one after another, each a ring as `Collective.sent_bytes` counts it.

    Ranks of one group are `stride` GPUs apart. Within a node they send as fast as its links; beyond, each of a node's
    members of the group sends its part of what leaves the node through its own network card.
    """
    stride = {"tensor": 1, "shard": layout.tensor, "replicate": layout.tensor * layout.shard, "all": 1}[one.axis]
    in_node = max(gpu.node_gpus // stride, 1)
    rate = gpu.node_bytes_per_second
    if one.ranks > in_node:
        rate = min(rate, in_node * gpu.network_bytes_per_second)
    return one.sent_bytes / rate + one.count * gpu.latency_seconds


def tensor_seconds(job: Job, layout: Layout, gpu: Gpu) -> float:
    """Between tensor-parallel ranks, in one step: computation waits for each, or for what it does not hide."""
    found = [one for one in collectives_of_step(job, layout) if one.axis == "tensor"]
    seconds = sum(collective_seconds(one, layout, gpu) for one in found)
    if not layout.overlap:
        return seconds
    passes = layout.micro_batches(job)
    of_layers = sum(collective_seconds(one, layout, gpu) for one in layer_collectives(job, layout))
    return seconds + passes * (job.config.num_hidden_layers * overlapped_seconds(job, layout, gpu) - of_layers)


def overlapped_seconds(job: Job, layout: Layout, gpu: Gpu) -> float:
    """Of a layer's overlapped gatherings and scattering sums in one micro-batch, what is not hidden: see
    `parallel.overlap` for what each is done beside. Of a product's n parts, n - 1 are there to hide what is sent. Ranks
    wait for each other once in a sum and n - 1 times in a gathering; a sum reads n parts and writes one. Products but
    weights' gradients are in n parts.
    """
    ranks, h = layout.tensor, job.config.hidden_size
    part_bytes = layout.micro_tokens(job) // ranks * h * _BF16
    sent, share = (ranks - 1) * part_bytes / gpu.node_bytes_per_second, (ranks - 1) / ranks
    forward_passes = 2 if layout.recompute == "full" else 1
    gathering = (ranks - 1) * _HANDOVER_SECONDS
    summing = _HANDOVER_SECONDS + (ranks + 1) * part_bytes / gpu.memory_bytes_per_second

    def exposed(*beside: float) -> float:
        return max(sent - sum(beside), 0.0)

    seconds = 0.0
    column, row = _layer_products(job, layout)
    for m, n, k in column:
        of_states, of_weight = _product_seconds(m, k, n, gpu), _product_seconds(k, n, m, gpu)
        seconds += forward_passes * (gathering + exposed(share * _product_seconds(m, n, k, gpu)))
        seconds += summing + exposed(of_weight, share * of_states)
    for m, n, k in row:
        seconds += forward_passes * (summing + exposed(share * _product_seconds(m, n, k, gpu)))
        seconds += gathering + exposed(share * _product_seconds(m, k, n, gpu))
    for m, n, k in column + row:
        seconds += forward_passes * _lost_in_parts(m, n, k, ranks, gpu) + _lost_in_parts(m, k, n, ranks, gpu)
    return seconds


def exposed_seconds(collectives: Sequence[Collective], layout: Layout, gpu: Gpu, computation: float) -> float:
    """What a data-parallel exchange costs that runs beside `computation`, from layer to layer: what is longer than
    that; all of the first gathering and of the last sum, which nothing hides; and of the rest what its kernels take
    from computation, in which no slow network counts.
    """
    hidden = [one for one in collectives if one.count > 1]
    seconds, of_hidden = (sum(collective_seconds(one, layout, gpu) for one in some) for some in (collectives, hidden))
    beside = min(of_hidden, computation)
    if not beside:
        return seconds
    taken = _TAKEN_BESIDE * sum(one.sent_bytes for one in hidden) / gpu.node_bytes_per_second
    return seconds - beside + taken * beside / of_hidden
