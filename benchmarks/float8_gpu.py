"""Products in float8 with a scale a row beside bfloat16's, and the kernels that write their operands, on one GPU.

    PYTHONPATH=src python benchmarks/float8_gpu.py [--sweep] [--tokens N]

The four products of a layer, forward and for the gradient of the input: PFLOP/s at T x K x N, float8 with sums in full
precision and fast ones, which `float8_products` has. Then the kernels with and without float8, milliseconds and the
rate in TB/s of bytes that have to move. Median of 20 calls. `--sweep` times the kernels with other tiles, the fastest
first.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from attention_gpu import milliseconds
from norm_gpu import sweep
from torch import Tensor

from megatron_bert.training import layer_kernels
from megatron_bert.training.float8_products import scaled_product
from megatron_bert.training.layer_kernels import (
    cast_rows,
    cast_weight,
    drawn_seed,
    gelu_backward,
    gelu_forward,
    norm_backward,
    norm_forward,
)

WIDTHS = {"345m": 1024, "1.3b": 2048, "3.9b": 2560}
DROPOUT = 0.1
# elements of a program, of a warp, and where it goes on to further rows how many there are
TILES = [(2048, 256), (4096, 256), (4096, 512), (8192, 512)]
ONE_ROW = [(2048, 256), (2048, 512), (2048, 1024)]  # of 8,192 elements: 32, 16 and 8 warps
WEIGHT_TILES = [(16, 256, 8), (16, 256, 4), (16, 128, 4), (32, 128, 8), (32, 256, 8)]  # outputs, inputs, warps
NORM_AGAIN = [(*tile, programs) for tile in [(1024, 256), (2048, 256), (2048, 512)] for programs in (264, 528, 792)]
AGAIN = [(*tile, programs) for tile in TILES[1:] for programs in (132, 264, 396, 528)]
ONE_ROW_AGAIN = [(*tile, programs) for tile in ONE_ROW for programs in (132, 264, 396, 528)]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try other tiles")
    parser.add_argument("--tokens", type=int, default=32768)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.tokens} tokens\n")
    print("| product | T x K x N | bfloat16 | float8 | float8, fast | fast / bfloat16 |\n|---|---|---|---|---|---|")
    for size, width in WIDTHS.items():
        _products(size, args.tokens, width)
    print("\n| kernel | without float8: ms (TB/s) | with it |\n|---|---|---|")
    for width in (1024, 2048):
        _norms(args.tokens, width)
        _activations(args.tokens, 4 * width)
        _casts(args.tokens, width)
    _weights(1024)
    if args.sweep:
        for width in (1024, 2048):
            _sweeps(args.tokens, width)


def _products(size: str, tokens: int, width: int) -> None:
    shapes = {"qkv": (1, 3), "attention": (1, 1), "up": (1, 4), "down": (4, 1)}
    for (name, shape), is_gradient in itertools.product(shapes.items(), (False, True)):
        inputs, outputs = (width * factor for factor in shape)
        inner, outer = (outputs, inputs) if is_gradient else (inputs, outputs)
        title = f"{size} {name} {'gradient' if is_gradient else 'forward'}"
        x, w = _random(tokens, inner), _random(outer, inner) if not is_gradient else _random(inner, outer).t()
        x8, scales, _ = cast_rows(x)
        w8 = w.contiguous().to(torch.float8_e4m3fn)
        w_scales = None if is_gradient else torch.rand(outer, device="cuda")
        bias = _random(outer) if name == "qkv" and not is_gradient else None
        calls: list[Callable[[], object]] = [lambda x=x, w=w: x @ w.t()]
        for fast in (False, True):
            calls.append(lambda fast=fast, a=(x8, scales, w8, w_scales, bias): scaled_product(*a, fast))
        times = [milliseconds(call) for call in calls]
        rates = " | ".join(f"{2 * tokens * inner * outer / time / 1e12:.3f}" for time in times)
        print(f"| {title} | {tokens} x {inner} x {outer} | {rates} | {times[0] / times[2]:.2f} |", flush=True)


def _norms(tokens: int, width: int) -> None:
    product, residual, grad, grad_total = (_random(tokens, width) for _ in range(4))
    bias, weight, shift, factor = (torch.rand(width, device="cuda") for _ in range(4))
    seed, size = drawn_seed(product.device), tokens * width / 1e9

    def forward(narrow: bool) -> tuple[Tensor, ...]:
        return norm_forward(product, bias, residual, weight, shift, seed, 0, DROPOUT, 1e-12, narrow)

    def backward(narrow: bool) -> Tensor:
        return norm_backward(grad_total, grad, *saved, weight, seed, 0, DROPOUT, factor if narrow else None)[2]

    total, _, mean, rstd, *_ = forward(False)
    saved = (total, mean, rstd)
    _row(f"norm forward, {width}", forward, 8 * size, 9 * size)
    _row(f"norm backward, {width}", backward, 10 * size, 11 * size)


def _activations(tokens: int, width: int) -> None:
    product, grad, size = _random(tokens, width), _random(tokens, width), tokens * width / 1e9
    bias, factor = (torch.rand(width, device="cuda") for _ in range(2))
    _row(f"GELU forward, {width}", lambda narrow: gelu_forward(product, bias, narrow), 4 * size, 5 * size)

    def backward(narrow: bool) -> Tensor:
        return gelu_backward(grad, product, bias, factor if narrow else None)[1]

    _row(f"GELU backward, {width}", backward, 6 * size, 7 * size)


def _casts(tokens: int, width: int) -> None:
    """Of the attention's result, and of its inputs' gradient, whose sum is needed without float8, too."""
    context, grad, factor = _random(tokens, width), _random(tokens, 3 * width), torch.rand(3 * width, device="cuda")
    size = tokens * width / 1e9
    _row(f"cast, {width}", lambda narrow: cast_rows(context) if narrow else None, 0.0, 3 * size)
    summed = torch.compile(lambda: grad.sum(0, dtype=torch.float32), dynamic=False)
    _row(f"cast of a gradient, {3 * width}",
         lambda narrow: cast_rows(grad, factor)[2] if narrow else summed(), 6 * size, 9 * size)  # fmt: skip


def _weights(width: int) -> None:
    """Of a layer, once a pass, where bfloat16's are by PyTorch's compiler."""
    groups = _layer_weights(width)
    rounded = torch.compile(lambda: [one.bfloat16() for group in groups for one in group], dynamic=False)
    size = 12 * width**2 / 1e9
    _row(f"casts of a layer's weights, {width}", lambda narrow: _cast_weights(groups) if narrow else rounded(),
         6 * size, 6 * size)  # fmt: skip


def _layer_weights(width: int) -> list[list[Tensor]]:
    shapes = [[(width, width)] * 3, [(width, width)], [(4 * width, width)], [(width, 4 * width)]]
    return [[torch.randn(shape, device="cuda") for shape in group] for group in shapes]


def _cast_weights(groups: list[list[Tensor]]) -> None:
    for group in groups:
        cast_weight(group)


def _row(title: str, call: Callable[[bool], object], plain: float, narrow: float) -> None:
    """A kernel without and with float8, and the gigabytes of each."""
    times = [milliseconds(lambda kind=kind: call(kind)) for kind in (False, True)]
    cells = [f"{time:.3f} ({size / time:.2f})" for time, size in zip(times, (plain, narrow), strict=True)]
    print(f"| {title} | {' | '.join(cells)} |", flush=True)


def _sweeps(tokens: int, width: int) -> None:
    product, wide, joined = _random(tokens, width), _random(tokens, 4 * width), _random(tokens, 3 * width)
    vectors = [torch.rand(4 * width, device="cuda") for _ in range(2)]
    narrow, third, size = vectors[0][:width], vectors[0][: 3 * width], tokens * width / 1e9
    seed = drawn_seed(product.device)
    arguments = (product, narrow, product, narrow, narrow, seed, 0, DROPOUT, 1e-12, True)
    total, normed, mean, rstd, *_ = norm_forward(*arguments)
    backward = (normed, normed, total, mean, rstd, narrow, seed, 0, DROPOUT, narrow)
    once, again = (TILES, AGAIN) if 4 * width <= 4096 else (ONE_ROW, ONE_ROW_AGAIN)
    tile, tile_again = ("elements", "warp_elements"), ("elements", "warp_elements", "programs")
    sweep(f"norm forward, {width}", layer_kernels._NORM_FORWARD_NARROW, tile, TILES, 9 * size,
          lambda: norm_forward(*arguments))  # fmt: skip
    sweep(f"norm backward, {width}", layer_kernels._NORM_BACKWARD_NARROW, tile_again, NORM_AGAIN, 11 * size,
          lambda: norm_backward(*backward)[2])  # fmt: skip
    sweep(f"GELU forward, {4 * width}", layer_kernels._GELU_FORWARD_NARROW, tile, once, 20 * size,
          lambda: gelu_forward(wide, vectors[0], True))  # fmt: skip
    sweep(f"GELU backward, {4 * width}", layer_kernels._GELU_BACKWARD_NARROW, tile_again, again, 28 * size,
          lambda: gelu_backward(wide, wide, *vectors)[1])  # fmt: skip
    sweep(f"cast, {width}", layer_kernels._CAST, tile, TILES, 3 * size, lambda: cast_rows(product))
    sweep(f"cast of a gradient, {3 * width}", layer_kernels._CAST, tile_again, again, 9 * size,
          lambda: cast_rows(joined, third)[2])  # fmt: skip
    groups = _layer_weights(width)
    sweep(f"casts of a layer's weights, {width}", layer_kernels._CAST_WEIGHT, ("ROWS", "COLUMNS", "num_warps"),
          WEIGHT_TILES, 72e-9 * width**2, lambda: _cast_weights(groups))  # fmt: skip


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
