"""The linear layer: `torch.nn.Linear`, with a fast path where a CPU has no 16-bit matrix instructions.

Without AVX512-BF16 or AMX, oneDNN emulates a bf16 product at a quarter of the speed of an fp32 one. Both accumulate in
fp32 and round once at the end, so the product of the same 16-bit weights can be taken in fp32 instead: the same result
up to the order of a sum, four times faster, with only one block of the weights widened at a time.
"""

import platform
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Linear", "cpu_multiplies"]

_BLOCK_ELEMENTS = 1 << 22  # weights widened to fp32 at a time: 16 MiB


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for `dtype`; True as well where nothing is known (not x86-64)."""
    if dtype not in (torch.bfloat16, torch.float16) or platform.machine() not in ("x86_64", "AMD64"):
        return True
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


class Linear(nn.Linear):
    """`torch.nn.Linear` in every respect but the speed of 16-bit weights on a CPU without 16-bit instructions."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu" or cpu_multiplies(input.dtype) or input.dtype != self.weight.dtype:
            return F.linear(input, self.weight, self.bias)
        return _widened_linear(input, self.weight, self.bias)


def _widened_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` of 16-bit tensors, computed in fp32 block by block of output features and rounded once."""
    wide_input = input.float()
    rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    if weight.shape[0] <= rows or torch.is_grad_enabled():
        return F.linear(wide_input, weight.float(), None if bias is None else bias.float()).to(input.dtype)
    output = input.new_empty(*input.shape[:-1], weight.shape[0])
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        wide_bias = None if bias is None else bias[block].float()
        output[..., block] = F.linear(wide_input, weight[block].float(), wide_bias)
    return output
