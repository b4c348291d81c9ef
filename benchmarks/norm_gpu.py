"""What lies between a layer's products, alone on one GPU: our kernels, and what PyTorch's compiler makes of the same.

    PYTHONPATH=src python benchmarks/norm_gpu.py [--sweep]

Forward and backward pass in milliseconds, with the sums that biases and norms get, and the rate in TB/s: bytes that
have to move, states of bfloat16 read and written once, a second. Both are compiled; median of 20 calls. `--sweep` times
our kernels alone with other tiles, warps and programs, the fastest first.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from attention_gpu import milliseconds
from torch import Tensor
from torch.nn import functional

from megatron_bert.training import layer_kernels
from megatron_bert.training.layer_kernels import biased_gelu, drawn_seed, residual_norm

NORMS = [  # tokens, width; the last are a rank's of a group that shares a batch's tokens
    (32768, 1024), (23040, 1024), (137000, 384), (8192, 1536), (16384, 2560), (2048, 2304), (1024, 3072),
]  # fmt: skip
ACTIVATIONS = [(32768, 4096), (23040, 4096), (137000, 1536)]
DROPOUT = 0.1
# elements of a program, of a warp: rows and warps follow
NORM_FORWARD = [(512, 128), (1024, 256), (1024, 512), (1024, 1024), (2048, 256), (2048, 512), (2048, 1024), (4096, 512)]
NORM_BACKWARD = [  # ..., programs, stages
    (1024, 256, 528, 1), (1024, 256, 792, 1), (1024, 256, 924, 1), (1024, 512, 1056, 1), (1024, 256, 528, 2),
    (1024, 256, 528, 3), (2048, 512, 528, 1), (2048, 512, 660, 1), (2048, 256, 264, 1), (2048, 256, 264, 2),
    (2048, 512, 264, 1), (2048, 1024, 264, 1), (2048, 1024, 528, 1), (2048, 1024, 132, 1),
]  # fmt: skip
GELU_FORWARD = [(4, 256, 4), (8, 256, 4), (16, 256, 8), (4, 512, 4), (4, 512, 8), (2, 1024, 4), (4, 1024, 8)]
GELU_BACKWARD = [
    (4, 256, 4, 1056, 1), (4, 256, 4, 2112, 1), (8, 256, 4, 1056, 1), (8, 256, 4, 2112, 1), (8, 256, 4, 1056, 2),
    (8, 256, 4, 1056, 3), (2, 512, 4, 1056, 1), (4, 512, 4, 1056, 1), (8, 512, 8, 528, 1), (16, 256, 8, 528, 1),
    (2, 1024, 4, 1056, 1), (4, 1024, 4, 528, 1),
]  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try other tiles")
    sweeps = parser.parse_args().sweep
    torch._functorch.config.donated_buffer = False  # a graph is run backward more than once
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: forward / backward, ms (TB/s)\n")
    print("| | ours | PyTorch, compiled |\n|---|---|---|")
    for (tokens, width), dropout in itertools.product(NORMS, (0.0, DROPOUT)):
        cells = [_cell(call, _norm_inputs(tokens, width), 4, 5) for call in (_our_norm(dropout), _their_norm(dropout))]
        print(f"| residual, dropout {dropout}, norm: {tokens} x {width} | {' | '.join(cells)} |", flush=True)
    for tokens, width in ACTIVATIONS:
        inputs = [_random(tokens, width), _random(width, dtype=torch.float32)]
        cells = [_cell(call, inputs, 2, 3) for call in (biased_gelu, _their_gelu)]
        print(f"| bias, GELU: {tokens} x {width} | {' | '.join(cells)} |", flush=True)
    if sweeps:
        for tokens, width in NORMS:
            _sweep_norm(tokens, width)
        for tokens, width in ACTIVATIONS:
            _sweep_gelu(tokens, width)


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def _norm_inputs(tokens: int, width: int) -> list[Tensor]:
    """The product, its bias, the residual, the norm's weight and bias."""
    wide, narrow = (tokens, width), (width,)
    return [_random(*wide), _random(*narrow, dtype=torch.float32), _random(*wide),
            *(_random(*narrow, dtype=torch.float32) for _ in range(2))]  # fmt: skip


def _our_norm(dropout: float) -> Callable[..., Any]:
    def call(product: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor) -> Any:
        seed = drawn_seed(product.device) if dropout else None
        return residual_norm(product, bias, residual, weight, shift, eps=1e-12, dropout=dropout, seed=seed, site=0)

    return call


def _their_norm(dropout: float) -> Callable[..., Any]:
    def call(product: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor) -> Any:
        total = residual + functional.dropout(product + bias.to(product.dtype), dropout)
        return total, functional.layer_norm(total.float(), weight.shape, weight, shift, 1e-12).to(product.dtype)

    return call


def _their_gelu(product: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(product + bias.to(product.dtype))


def _cell(function: Callable[..., Any], inputs: list[Tensor], passes: int, passes_back: int) -> str:
    call = torch.compile(function, dynamic=False)
    results = call(*inputs)
    grads = [torch.randn_like(result) for result in (results if isinstance(results, tuple) else (results,))]
    forward = milliseconds(lambda: call(*inputs))
    backward = milliseconds(lambda: torch.autograd.grad(results, inputs, grads, retain_graph=True))
    gigabytes = inputs[0].nbytes / 1e9
    rates = passes * gigabytes / forward, passes_back * gigabytes / backward
    return f"{forward:.3f} / {backward:.3f} ({rates[0]:.2f} / {rates[1]:.2f})"


def _sweep_norm(tokens: int, width: int) -> None:
    product, bias, residual, weight, shift = (states.detach() for states in _norm_inputs(tokens, width))
    seed = drawn_seed(product.device)
    arguments = (product, bias, residual, weight, shift, seed, 0, DROPOUT, 1e-12)
    total, normed, mean, rstd, *_ = layer_kernels.norm_forward(*arguments)

    def backward() -> Tensor:
        return layer_kernels.norm_backward(residual, normed, total, mean, rstd, weight, seed, 0, DROPOUT)[2]

    names = ("elements", "warp_elements", "programs", "STAGES")
    title, size = f"{tokens} x {width}", product.nbytes / 1e9
    sweep(f"norm forward {title}", layer_kernels._NORM_FORWARD, names[:2], NORM_FORWARD, 4 * size,
           lambda: layer_kernels.norm_forward(*arguments))  # fmt: skip
    sweep(f"norm backward {title}", layer_kernels._NORM_BACKWARD, names, NORM_BACKWARD, 5 * size, backward)


def _sweep_gelu(tokens: int, width: int) -> None:
    product, bias = _random(tokens, width).detach(), _random(width, dtype=torch.float32).detach()
    grad = torch.randn_like(product)
    names = ("ROWS", "COLUMNS", "num_warps", "programs", "STAGES")
    title, size = f"{tokens} x {width}", product.nbytes / 1e9
    sweep(f"GELU forward {title}", layer_kernels._GELU_FORWARD, names[:3], GELU_FORWARD, 2 * size,
           lambda: layer_kernels.gelu_forward(product, bias))  # fmt: skip
    sweep(f"GELU backward {title}", layer_kernels._GELU_BACKWARD, names, GELU_BACKWARD, 3 * size,
           lambda: layer_kernels.gelu_backward(grad, product, bias)[1])  # fmt: skip


def sweep(
    title: str, limits: dict[str, int], names: tuple[str, ...], variants: list[Any], gigabytes: float,
    call: Callable[[], object],
) -> None:  # fmt: skip
    """Prints what a call takes with other values of a kernel's limits, the fastest first; nothing else bounds them."""
    kept, times = dict(limits), {}
    limits.update({name: value for name, value in (("warps", 1), ("columns", 2**40)) if name in limits})
    for variant in variants:
        limits.update(dict(zip(names, variant, strict=True)))
        times[variant] = milliseconds(call)
    limits.update(kept)
    print(f"\n{title}: {', '.join(names)}; now {tuple(kept[name] for name in names)}")
    for variant, taken in sorted(times.items(), key=lambda item: item[1]):
        print(f"  {variant}: {taken:.3f} ms, {gigabytes / taken:.2f} TB/s", flush=True)


if __name__ == "__main__":
    main()
