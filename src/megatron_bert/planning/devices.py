"""What a GPU and its links reach: the numbers that predictions of time are made of.

`h100` was measured with this package's own step (see `benchmarks/plan_gpu.py`); the others are the maker's data sheets,
times the shares of them that the H100 reached. A prediction for another machine gets better with its own numbers.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from megatron_bert.errors import UserError

__all__ = ["GIB", "GPUS", "Gpu", "gpu_named", "of_data_sheet"]

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU of a cluster.

    Attributes:
        flops_per_second: of a large product of matrices in the number type of training, what is reached.
        memory_gib: what programs can use of it.
        memory_bytes_per_second: of a large copy, read and written bytes together, what is reached.
        node_gpus: GPUs of one node.
        node_bytes_per_second: a GPU to the others of its node, one direction, what is reached.
        network_bytes_per_second: a GPU to other nodes, one direction, what is reached.
        attention_flops_per_second: of the fused attention kernel, forward and backward together, with dropout.
        latency_seconds: of any collective, however small.
        multiprocessors: that compute tiles of a product side by side.
    """

    name: str
    flops_per_second: float
    memory_gib: float
    memory_bytes_per_second: float
    node_gpus: int
    node_bytes_per_second: float
    network_bytes_per_second: float
    attention_flops_per_second: float
    latency_seconds: float = 20e-6
    multiprocessors: int = 132

    @property
    def memory_bytes(self) -> float:
        """What programs can use."""
        return self.memory_gib * GIB


_MATMUL, _COPY, _LINK, _NETWORK, _ATTENTION, _ATTENTION_HOPPER = 0.76, 0.90, 0.80, 0.85, 0.126, 0.229
"""Shares of data sheets. The first two: 759 of 989 TFLOP/s and 3.0 of 3.35 TB/s on the H100. Attention with dropout:
flash-attention 2 and `model.attention_kernel` there. Links: what NCCL's own tests (github.com/NVIDIA/nccl-tests) reach
of NVLink and InfiniBand for messages of tens of MiB and more."""


def of_data_sheet(
    name: str,
    teraflops: float,
    memory_gib: float,
    memory_tb: float,
    node_gpus: int,
    node_gb: float,
    network_gb: float,
    multiprocessors: int,
    *,
    is_hopper: bool = False,
) -> Gpu:
    return Gpu(
        name=name,
        flops_per_second=_MATMUL * teraflops * 1e12,
        memory_gib=memory_gib,
        memory_bytes_per_second=_COPY * memory_tb * 1e12,
        node_gpus=node_gpus,
        node_bytes_per_second=_LINK * node_gb * 1e9,
        network_bytes_per_second=_NETWORK * network_gb * 1e9,
        attention_flops_per_second=(_ATTENTION_HOPPER if is_hopper else _ATTENTION) * teraflops * 1e12,
        multiprocessors=multiprocessors,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        # bf16 TFLOP/s, usable GiB, TB/s; GPUs a node; GB/s of NVLink and of the network, a GPU and a direction; SMs
        of_data_sheet("h100", 989, 79.2, 3.35, 8, 450, 50, 132, is_hopper=True),  # SXM5, 80 GB; 400 Gbit/s a GPU
        of_data_sheet("h200", 989, 139.8, 4.8, 8, 450, 50, 132, is_hopper=True),  # SXM5, 141 GB
        of_data_sheet("a100", 312, 79.2, 2.04, 8, 300, 25, 108),  # SXM4, 80 GB; NVLink 3, 200 Gbit/s a GPU
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    close = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(
        f"GPU {name!r} is not known{hint}; known: {', '.join(GPUS)}, or give its numbers with --gpu-* options"
    )
