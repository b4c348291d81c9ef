"""Which device and number type a model predicts on."""

from __future__ import annotations

import re

import torch

from megatron_bert.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device called ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises ``UserError`` for another name and for a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}; it is auto, cpu, cuda or cuda:N")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name)
    if (device.index or 0) >= num_gpus:
        raise UserError(
            f"device {name} is not there: PyTorch {torch.__version__} finds {num_gpus} GPUs; use auto or cpu"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type called ``float32``, ``bfloat16`` or ``float16``, or the best one for ``device`` for ``auto``.

    That is bfloat16 on a GPU and on a CPU that multiplies it natively (AMX or AVX512-BF16), else float32. (The query
    that oneDNN offers says yes to every AVX512 machine, where bfloat16 is emulated and slower.)
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def scores_are_no_numbers(dtype: torch.dtype) -> str:
    """What is said of a model whose outputs are infinite or NaN."""
    kind = str(dtype).removeprefix("torch.")
    advice = "" if dtype == torch.float32 else "try --dtype float32; if it stays so, "
    return f"the model's scores are not numbers in {kind}: {advice}the weights are damaged"


def default_batch_tokens(device: torch.device) -> int:
    """Tokens to predict together: as many as keep the device busy while the host launches the next ones."""
    return 32768 if device.type == "cuda" else 8192
