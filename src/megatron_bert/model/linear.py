"""The linear layer: `torch.nn.Linear`, with fast paths for inference with 16-bit weights on a CPU.

- With AMX, oneDNN adds the bias within the product, which saves `torch.addmm`'s copy of it to every row: 3 to 10 %.
- It also multiplies by weights in its own blocked order a third faster than by weights in rows. Reordering them costs
  as much as several hundred rows of the product, so it is done for larger inputs, at each call: nothing is kept, and
  memory stays what it was.
- Without matrix instructions, oneDNN emulates a bf16 product at a quarter of the speed of an fp32 one. Both accumulate
  in fp32 and round once at the end, so the product is taken in fp32 instead, one block of widened weights at a time.

All give `torch.nn.functional.linear`'s result up to the order of a sum.
"""

import platform
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Linear", "cpu_multiplies", "linear"]

_BLOCK_ELEMENTS = 1 << 20  # weights widened to fp32 at a time: 4 MiB
_REORDER_FROM_TOKENS = 1536  # on two AMX cores, 1,024 tokens lose by it and 2,048 gain a quarter
_REORDER_TO_ELEMENTS = 1 << 24  # 32 MiB of weights; a vocabulary's would be the peak of memory for little gain


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for `dtype`; True as well where nothing is known (not x86-64)."""
    if dtype not in (torch.bfloat16, torch.float16) or platform.machine() not in ("x86_64", "AMD64"):
        return True
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


class Linear(nn.Linear):
    """`torch.nn.Linear` in every respect but the speed of 16-bit weights on a CPU, and that what looks for that very
    class does not find it: `torch.ao.quantization.quantize_dynamic`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, with the fast paths above."""
    if input.device.type == "cpu" and input.dtype == weight.dtype and not torch.compiler.is_compiling():
        if not cpu_multiplies(input.dtype):
            return _widened_linear(input, weight, bias)
        if _amx_infers(input):
            return _amx_linear(input, weight, bias)
    return F.linear(input, weight, bias)


def _amx_infers(input: Tensor) -> bool:
    is_inference = input.dtype == torch.bfloat16 and not torch.is_grad_enabled() and input.numel() > 0
    return is_inference and torch.cpu._is_amx_tile_supported()


def _amx_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of bf16 tensors through the oneDNN operators that `torch.compile` emits."""
    num_tokens = input.numel() // input.shape[-1]
    if num_tokens >= _REORDER_FROM_TOKENS and weight.numel() <= _REORDER_TO_ELEMENTS:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, num_tokens)
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def _widened_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
