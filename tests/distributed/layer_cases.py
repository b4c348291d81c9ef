"""Each parallel layer beside its unsharded twin, in each process of a world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bert.model import MegatronBertForCausalLM, MegatronBertForPreTraining
from megatron_bert.parallel.gradients import completed_gradients
from megatron_bert.parallel.loss import vocabulary_parallel_cross_entropy
from megatron_bert.parallel.mesh import ParallelMesh
from megatron_bert.parallel.region import local_part
from megatron_bert.parallel.tensor import apply_tensor_parallel
from tests.distributed.cases import SHAPE, assert_close, build, mesh_of, recompute_layers

DECODER = {"is_decoder": True, "add_cross_attention": True}
TOKENS = 8  # divisible by the degrees that parts of a sequence are looked at with


def twins(
    sequence_parallel: bool = False,
    model_class: Any = MegatronBertForPreTraining,
    overlap: bool = False,
    **changes: Any,
) -> Any:
    """The single-process model, the parallel one over all ranks, and the ranks."""
    region = mesh_of(dist.get_world_size(), sequence_parallel, overlap=overlap).region
    reference, parallel = build(model_class, **changes), build(model_class, **changes)
    apply_tensor_parallel(parallel, region, gathers_logits=model_class is not MegatronBertForPreTraining)
    return reference, parallel, region


def hidden(num_tokens: int = TOKENS, seed: int = 1, width: int = SHAPE["hidden_size"]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, num_tokens, width, generator=generator).requires_grad_()


def compare(
    ours: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor], Tensor],
    inputs: Tensor,
    modules: tuple[Any, Any],
    mesh: ParallelMesh | None = None,
) -> None:
    """Output, and after a backward pass from the same gradient the input's and every parameter's gradient."""
    copies = [inputs.detach().clone().requires_grad_(inputs.is_floating_point()) for _ in range(2)]
    outputs = [function(copy) for function, copy in zip((ours, reference), copies, strict=True)]
    assert_close(outputs[0], outputs[1], "output")
    gradient = torch.randn(outputs[1].shape, generator=torch.Generator().manual_seed(2))
    for output in outputs:
        output.backward(gradient)
    if mesh is not None:
        with completed_gradients(modules[0], mesh):
            pass
    if inputs.is_floating_point():
        assert_close(copies[0].grad, copies[1].grad, "gradient of the input")
    scale = max(float(parameter.grad.norm()) for parameter in modules[1].parameters() if parameter.grad is not None)
    for (name, parameter), twin in zip(modules[0].named_parameters(), modules[1].parameters(), strict=True):
        assert (parameter.grad is None) == (twin.grad is None), name
        if twin.grad is not None:
            assert_close(parameter.grad, twin.grad, f"gradient of {name}", scale=1e-2 * scale)


def linear_layers() -> None:
    """Column, row, and the vocabulary's projection."""
    reference, parallel, region = twins()
    layers = reference.bert.encoder.layer[0], parallel.bert.encoder.layer[0]
    column, row = ([layer.intermediate.dense for layer in layers], [layer.output.dense for layer in layers])
    compare(lambda x: region.gather_features(column[1](region.copy(x))), column[0], hidden(), (column[1], column[0]))

    def own_features(states: Tensor) -> Tensor:
        part = states.shape[-1] // region.degree
        return region.copy(states)[..., region.rank * part :][..., :part]

    wide = hidden(width=SHAPE["intermediate_size"])
    compare(lambda x: row[1](own_features(x)), row[0], wide, (row[1], row[0]))
    with torch.autocast("cpu", torch.bfloat16):  # what a layer's residual stream is carried in
        assert row[1](own_features(wide)).dtype == row[0](wide).dtype == torch.bfloat16
    heads = reference.cls.predictions, parallel.cls.predictions
    compare(lambda x: region.gather_features(heads[1](x)), heads[0], hidden(), (heads[1], heads[0]))


def embeddings() -> None:
    """Tokens of every rank's rows, the padding token among them, whose row has no gradient."""
    reference, parallel, _ = twins()
    ids = torch.arange(SHAPE["vocab_size"]).view(4, -1)
    words = [model.bert.embeddings.word_embeddings for model in (parallel, reference)]
    compare(words[0], words[1], ids, (words[0], words[1]))
    assert not words[0]._parameters["weight"].grad.full_tensor()[0].any()
    wholes = [model.bert.embeddings for model in (parallel, reference)]
    positions = torch.arange(16)[None].expand(4, -1)
    compare(lambda x: wholes[0](x, None, positions), lambda x: wholes[1](x, None, positions), ids, tuple(wholes))


def blocks(*, sequence_parallel: bool, num_tokens: int, overlap: bool = False) -> None:
    """Attention, cross-attention, the MLP, a layer and the encoder; under sequence parallelism on parts of a sequence,
    also of a length that the degree does not divide.
    """
    others = hidden(5, seed=4).detach()
    mask = torch.ones(2, 1, 1, num_tokens, dtype=torch.bool)
    mask[1, ..., -2:] = False

    def check(part: Callable[[Any], Any], *args: Any, model_class: Any = MegatronBertForPreTraining, **changes: Any):
        reference, parallel, region = twins(sequence_parallel, model_class, overlap, **changes)
        ours, theirs = part(parallel), part(reference)

        def on_parts(states: Tensor) -> Tensor:
            if not sequence_parallel:
                return ours(states, *args)
            options = {} if part is mlp else {"num_tokens": num_tokens}
            return region.gather_tokens(ours(region.split_tokens(states), *args, **options), num_tokens)

        modules = parallel, reference
        mesh = mesh_of(region.degree, sequence_parallel, overlap=overlap)
        compare(on_parts, lambda states: theirs(states, *args), hidden(num_tokens), modules, mesh)

    mlp = lambda model: model.bert.encoder.layer[0].feed_forward_chunk  # noqa: E731
    check(lambda model: model.bert.encoder.layer[0].attention, mask)
    check(mlp)
    check(lambda model: model.bert.encoder.layer[0], mask)
    check(lambda model: model.bert.encoder.layer[0].crossattention, None, others, model_class=MegatronBertForCausalLM,
          **DECODER)  # fmt: skip


def cross_entropy_equals_torch(*, compiled: bool = False, dtype: torch.dtype = torch.float32) -> None:
    """Losses, right predictions and gradients; ignored targets, targets on every rank, ties, and huge logits."""
    region = mesh_of(dist.get_world_size()).region
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(40, 64, generator=generator) * 5
    logits[3] = 0.0  # all tied: row 0 is the argmax
    logits[4, [10, 50]] = 90.0  # a tie across ranks
    logits[5] *= 1e4
    logits[6, 20:] = -torch.inf
    targets = torch.randint(0, 64, (40,), generator=generator)
    targets[[3, 4, 6]] = torch.tensor([0, 50, 7])
    targets[::5] = -100
    targets[5] = 63
    logits = logits.to(dtype)
    whole, weights = logits.float().clone().requires_grad_(), torch.rand(40, generator=generator)
    expected = functional.cross_entropy(whole, targets, reduction="none", ignore_index=-100)
    part = logits.chunk(region.degree, -1)[region.rank].clone().requires_grad_()
    losses, correct = vocabulary_parallel_cross_entropy(part, targets, region, compiled=compiled)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(correct, logits.argmax(-1) == targets)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    reference, rounding = whole.grad.chunk(region.degree, -1)[region.rank], max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(part.grad.float(), reference, rtol=rounding, atol=1e-7)


def overlapped_traffic() -> dict[str, list[str]]:
    """The collectives of an overlapped layer's forward and backward pass, and the operators that do them."""
    _, model, region = twins(True, overlap=True)
    with Traffic("megatron_bert", "_c10d_functional") as forward:
        output = model.bert.encoder.layer[0](hidden(TOKENS // region.degree), num_tokens=TOKENS)
    with Traffic("megatron_bert", "_c10d_functional") as backward:
        output.sum().backward()
    return {"forward": [name for name, _ in forward.sent], "backward": [name for name, _ in backward.sent]}


def communication(*, sequence_parallel: bool) -> dict[str, dict[str, int]]:
    """The collectives of one layer's forward and backward pass, by kind."""
    _, model, region = twins(sequence_parallel)
    states = hidden(TOKENS // (region.degree if sequence_parallel else 1))
    with CommDebugMode() as forward:
        output = model.bert.encoder.layer[0](states, **({"num_tokens": TOKENS} if sequence_parallel else {}))
    with CommDebugMode() as backward:
        output.sum().backward()
    counts = {"forward": forward.get_comm_counts(), "backward": backward.get_comm_counts()}
    return {
        when: {str(kind).rpartition(".")[2]: number for kind, number in by_kind.items() if number}
        for when, by_kind in counts.items()
    }


class Traffic(TorchDispatchMode):
    """Which collectives are called, and with how many elements. (`CommDebugMode` cannot follow recomputation.)"""

    def __init__(self, *namespaces: str) -> None:
        super().__init__()
        self.namespaces = namespaces or ("_c10d_functional",)
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.partition(".")[0]
        if function.namespace in self.namespaces and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.sent.append((name, args[0].numel()))
        return function(*args, **(kwargs or {}))


def recomputed_traffic() -> list[tuple[str, int]]:
    """What the backward pass of a recomputed layer sends."""
    _, model, _ = twins()
    recompute_layers(model)
    output = model.bert.encoder.layer[0](hidden())
    with Traffic() as traffic:
        output.sum().backward()
    return traffic.sent


def loss_traffic(num_tokens: int) -> list[tuple[str, int]]:
    """What the loss sends, forward and backward."""
    region = mesh_of(dist.get_world_size()).region
    logits = torch.randn(num_tokens, 500, requires_grad=True)
    with Traffic() as traffic:
        losses, _ = vocabulary_parallel_cross_entropy(logits, torch.zeros(num_tokens, dtype=torch.int64), region)
        losses.sum().backward()
    return traffic.sent


def compiled_layers(*, sequence_parallel: bool) -> None:
    """Each layer is one graph, and both are the same one; the loss too. They compute what they do uncompiled."""
    _, model, region = twins(sequence_parallel)
    layers, losses, counter = (
        model.bert.encoder.layer,
        vocabulary_parallel_cross_entropy,
        CompileCounterWithBackend("aot_eager"),
    )
    states = hidden(TOKENS // (region.degree if sequence_parallel else 1))
    options = {"num_tokens": TOKENS} if sequence_parallel else {}
    logits, targets = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)), torch.arange(6) * 10
    results = []
    for compiled in (False, True):
        if compiled:
            losses = torch.compile(losses, backend=counter, fullgraph=True)
            for layer in layers:
                layer.forward = torch.compile(layer.forward, backend=counter, fullgraph=True)
        leaves = [states.detach().clone().requires_grad_(), logits.clone().requires_grad_()]
        model.zero_grad()
        layers[1](layers[0](leaves[0], **options), **options).square().sum().backward()
        losses(leaves[1], targets, region)[0].sum().backward()
        results.append([leaf.grad for leaf in leaves] + [parameter.grad for parameter in layers.parameters()])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(local_part(ours), local_part(reference))
    assert counter.frame_count == 2, f"{counter.frame_count} graphs"


def generates_as_single_process() -> None:
    """A decoder with a cache and an encoder's states; the language-model loss of the whole class."""
    reference, parallel, _ = twins(model_class=MegatronBertForCausalLM, **DECODER)
    ids, others = torch.arange(6, 16)[None], hidden(5, seed=4).detach()[:1]
    losses = [model(ids, labels=ids, encoder_hidden_states=others).loss for model in (parallel, reference)]
    assert_close(losses[0], losses[1], "loss")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "encoder_hidden_states": others}
    texts = [model.eval().generate(ids, **options) for model in (parallel, reference)]
    assert torch.equal(texts[0], texts[1])
