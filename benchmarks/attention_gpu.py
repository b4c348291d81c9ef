"""Attention alone on one GPU, a layer's forward and backward pass in milliseconds: our training kernel and PyTorch's.

    PYTHONPATH=src python benchmarks/attention_gpu.py

Heads of 64, bfloat16; queries, keys and values are thirds of one product, as in the trainer. FLOPs: two products
forward, five backward, half of them where attention is causal. Median of 20 calls.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_bert.model.attention_kernel import packed_attention

SIZE = 64
# rows, tokens of a row, heads, causal
SHAPES = [
    (64, 512, 16, False),
    (32, 1024, 16, True),
    (16, 2048, 16, False),
    (16, 512, 40, False),
    (256, 128, 16, False),
]


def main() -> None:
    """Measures and prints the table."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: forward / backward, ms (TFLOP/s)\n")
    print("| rows x tokens, heads, dropout | ours | FlashAttention 2 | cuDNN, padded |\n|---|---|---|---|")
    for rows, tokens, heads, is_causal in SHAPES:
        for dropout in (0.0, 0.1):
            cells = [_cell(*call) for call in _calls(rows, tokens, heads, is_causal, dropout)]
            causal = ", causal" if is_causal else ""
            print(f"| {rows} x {tokens}, {heads}, {dropout}{causal} | {' | '.join(cells)} |", flush=True)


def _calls(
    rows: int, tokens: int, heads: int, is_causal: bool, dropout: float
) -> list[tuple[Callable[[Tensor], Tensor], Tensor, float]]:
    """Each contender as a function of the fused product, with that product and the forward pass's FLOPs."""
    product = torch.randn(rows * tokens, 3, heads, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    boundaries = torch.arange(0, rows * tokens + 1, tokens, device="cuda", dtype=torch.int32)
    flops = 4 * rows * heads * tokens**2 * SIZE * (0.5 if is_causal else 1)

    def ours(states: Tensor) -> Tensor:
        return packed_attention(states, boundaries, tokens, is_causal, SIZE**-0.5, dropout)

    def flash(states: Tensor) -> Tensor:
        arguments = (*states.unbind(1), boundaries, boundaries, tokens, tokens, dropout, is_causal, False)
        return torch.ops.aten._flash_attention_forward(*arguments, scale=SIZE**-0.5)[0]

    def cudnn(states: Tensor) -> Tensor:
        parts = (part.view(rows, tokens, heads, SIZE).transpose(1, 2) for part in states.unbind(1))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            context = functional.scaled_dot_product_attention(*parts, dropout_p=dropout, is_causal=is_causal)
        return context.transpose(1, 2).reshape(rows * tokens, heads, SIZE)

    return [(contender, product, flops) for contender in (ours, flash, cudnn)]


def _cell(call: Callable[[Tensor], Tensor], product: Tensor, flops: float) -> str:
    context = call(product)
    grad = torch.randn_like(context)
    forward = milliseconds(lambda: call(product))
    backward = milliseconds(lambda: torch.autograd.grad(context, product, grad, retain_graph=True))
    speeds = flops / forward / 1e9, 2.5 * flops / backward / 1e9
    return f"{forward:.3f} / {backward:.3f} ({speeds[0]:.0f} / {speeds[1]:.0f})"


def milliseconds(call: Callable[[], object]) -> float:
    """The median of 20 calls on the device."""
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(20)]
    torch.cuda._sleep(50_000_000)  # the device waits while the host queues: launches are not measured
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


if __name__ == "__main__":
    main()
