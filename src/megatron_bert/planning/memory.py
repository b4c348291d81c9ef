"""Bytes that a GPU needs, by formula.

Weights, gradients and optimizer states: Rajbhandari et al. 2019 (arXiv 1910.02054, section 3.1), with the weights
themselves in float32, computed with in bfloat16. Activations: Korthikanti et al. 2022 (arXiv 2205.05198, equations 1 to
6), counted again for what this implementation keeps: its fused attention keeps no scores, as their selective
recomputation does, and sequence parallelism keeps what it gathered.

T tokens and M predicted positions of a micro-batch, h hidden, F feed-forward, N heads, V vocabulary, L layers, t
tensor-parallel degree.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bert.planning.layout import Job, Layout
from megatron_bert.planning.parameters import (
    layer_matrices,
    layer_parameters,
    outer_matrices,
    outer_parameters,
    rank_parameters,
    word_embeddings,
)

__all__ = ["Memory", "activation_bytes", "layer_activation_bytes", "memory_of_step", "weight_bytes"]

_BF16, _FP32, _BOOL = 2, 4, 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the moment of the step when they are the most.

    Attributes:
        weights, gradients, optimizer: of float32 parameters: 4, 4 and 8 bytes each (none yet of a gradient that comes
            after that moment).
        activations: kept for the backward pass.
        working: weights in bfloat16, logits, gradients on their way, and what one layer needs while it is computed.
        moment: which it is.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    moment: str

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def weight_bytes(job: Job, layout: Layout) -> float:
    """4 bytes a parameter that the rank holds."""
    return _FP32 * rank_parameters(job.config, layout.tensor) / layout.shard


def gradient_bytes(job: Job, layout: Layout) -> float:
    """4 bytes a parameter, as the weights."""
    return weight_bytes(job, layout)


def optimizer_bytes(job: Job, layout: Layout) -> float:
    """AdamW's two moments (Loshchilov and Hutter 2019) in float32: 8 bytes a parameter."""
    return 2 * weight_bytes(job, layout)


def layer_activation_bytes(job: Job, layout: Layout) -> float:
    """What one layer keeps: T times 34 h with dropout on one GPU, and 4 N of the attention kernel.

    The inputs of two norms (4 h) and two dropout masks (2 h) are on sequence shards under sequence parallelism. The
    norms' outputs (4 h) are whole on every rank in either case: what was gathered is kept. Queries, keys, values and
    context (8 h), the MLP's hidden states before and after the activation (4 F) and a sum of exponentials a head are
    split. Full recomputation keeps the layer's input.
    """
    config, tokens = job.config, layout.micro_tokens(job)
    hidden, on_shards = config.hidden_size, layout.tensor if layout.sequence_parallel else 1
    if layout.recompute == "full":
        return tokens * _BF16 * hidden / on_shards
    masks = 2 * _BOOL * hidden if config.hidden_dropout_prob else 0
    split = _BF16 * (4 * hidden + 2 * config.intermediate_size)
    if layout.recompute == "none":
        split += _FP32 * config.num_attention_heads
    return tokens * ((2 * _BF16 * hidden + masks) / on_shards + 2 * _BF16 * hidden + split / layout.tensor)


def outer_activation_bytes(job: Job, layout: Layout) -> float:
    """What is kept outside the layers until the backward pass has come to their end: the embedding's mask, and the last
    norm's input.
    """
    on_shards = layout.tensor if layout.sequence_parallel else 1
    mask = _BOOL * bool(job.config.hidden_dropout_prob)
    return layout.micro_tokens(job) * job.config.hidden_size * (mask + _BF16 / on_shards)


def head_activation_bytes(job: Job, layout: Layout) -> float:
    """What lives until the loss is differentiated: the last norm's output, and four states of predicted positions."""
    states = layout.micro_tokens(job) + 4 * layout.micro_predicted(job)
    return _BF16 * job.config.hidden_size * states


def activation_bytes(job: Job, layout: Layout) -> float:
    """What the layers and the embedding keep."""
    return job.config.num_hidden_layers * layer_activation_bytes(job, layout) + outer_activation_bytes(job, layout)


def logits_bytes(job: Job, layout: Layout) -> float:
    """While the loss is computed, M V / t logits in bfloat16, in float32, and their exponentials in float32."""
    return layout.micro_predicted(job) * job.config.vocab_size / layout.tensor * (_BF16 + 2 * _FP32)


def layer_working_bytes(job: Job, layout: Layout) -> float:
    """What the backward pass of a layer adds to what was kept, at its most, in the MLP: gradients of the layer's output
    and of the dropout, of the hidden states before and after the activation, whose states go meanwhile; and of one of
    its weights, in bfloat16 and, where they are not fully sharded, in float32.
    """
    config, tokens = job.config, layout.micro_tokens(job)
    gradients = _BF16 * (2 * config.hidden_size + config.intermediate_size / layout.tensor)
    weight_type = _BF16 if layout.fully_sharded else _BF16 + _FP32
    weight = weight_type * config.hidden_size * config.intermediate_size / layout.tensor
    again = 0.0
    if layout.recompute == "full":
        kept_all = Layout(layout.tensor, sequence_parallel=layout.sequence_parallel, micro_rows=layout.micro_rows)
        again = layer_activation_bytes(job, kept_all)
    return tokens * gradients + weight + again


def computed_weight_bytes(job: Job, layout: Layout) -> float:
    """Weights in bfloat16 that live as long as activations do.

    One GPU alone, or tensor-parallel ones: the matrices of every layer, or with full recomputation of one, and those
    outside. Fully sharded: what is put together, all outside the layers and two layers, of which one is ahead of its
    time, or every layer where they are kept; and of every layer that is not recomputed the query, key and value
    weights, which were put side by side.
    """
    config, tensor = job.config, layout.tensor
    recomputes = layout.recompute == "full"
    if layout.fully_sharded:
        beside = 0 if recomputes else config.num_hidden_layers * 3 * config.hidden_size**2 // tensor
        together = config.num_hidden_layers if layout.keep_layers else 2
        return _BF16 * (outer_parameters(config, tensor) + together * layer_parameters(config, tensor) + beside)
    layers = 1 if recomputes else config.num_hidden_layers
    return _BF16 * (outer_matrices(config, tensor) + layers * layer_matrices(config, tensor))


def memory_of_step(job: Job, layout: Layout) -> Memory:
    """At the most demanding of some moments: the loss; the backward pass of the last layer, which is the first to be
    taken; and that of the word embeddings, the last.
    """
    config, tensor = job.config, layout.tensor
    weights, optimizer, gradients = (f(job, layout) for f in (weight_bytes, optimizer_bytes, gradient_bytes))
    before = gradients if layout.micro_batches(job) > 1 else 0.0
    kept, computed = activation_bytes(job, layout), computed_weight_bytes(job, layout)
    words, outer = word_embeddings(config, tensor), outer_parameters(config, tensor)
    layer = layer_parameters(config, tensor)
    if layout.fully_sharded:  # gradients in bfloat16 until they are summed, then in float32
        in_backward = _BF16 * outer + max(_FP32 * layer - layer_activation_bytes(job, layout), 0.0)
        # Two more gradients of the word embeddings while they are added up, before there is a sum over ranks; then,
        # with the weights gone, that sum, beside the one that it is added to.
        part = _FP32 * outer / layout.shard
        adding, summing = 2 * _BF16 * (outer + words), (_BF16 + _FP32) * outer
        at_end = _FP32 * layer + (max(adding, summing + part) if before else max(adding - part, summing))
        if before and layout.replicate > 1:  # each layer's all-reduced sum stays until all of them are there
            at_end += _FP32 * config.num_hidden_layers * layer / layout.shard
    else:
        in_backward = 0.0 if before else float(_FP32 * words)
        at_end = computed + _FP32 * words
    at_loss = head_activation_bytes(job, layout) + logits_bytes(job, layout)
    moments = [
        Memory(weights, before, optimizer, kept, computed + at_loss, "loss"),
        Memory(weights, before, optimizer, kept, computed + in_backward + layer_working_bytes(job, layout), "layers"),
        Memory(weights, gradients, optimizer, 0.0, at_end, "embeddings"),
    ]
    return max(moments, key=lambda memory: memory.total)
