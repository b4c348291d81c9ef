"""What the host spends on a step, by layout: its CPU time with ranks that are not there and next to nothing to compute.

    PYTHONPATH=src python benchmarks/host_time.py            # some minutes on a CPU; no GPU, no other process

One process is rank 0 of two on PyTorch's fake process group, which sends nothing; the model is 128 wide, the step has
32 tokens. A GPU that computes a layer in less time than the host needs for it waits. Compiled layers, AdamW; a layer's
share is the difference between 16 layers and 4, by 12. What a GPU's host does besides, launching kernels, is not in it.
"""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bert.model import MegatronBertConfig
from megatron_bert.parallel.materialize import initialize, materialize
from megatron_bert.training.configuration import MeshSection, ObjectiveSection, OptimizerSection
from megatron_bert.training.execution import build_objective
from megatron_bert.training.network import empty_network
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.ranks import ALONE, Ranks
from megatron_bert.training.step import train_step

LAYOUTS: dict[str, MeshSection | None] = {
    "one process": None,
    "replicated 2": MeshSection(shard=1),
    "sharded 2": MeshSection(keep_layers=True),
    "tensor 2": MeshSection(tensor=2),
    "tensor 2, sequence": MeshSection(tensor=2, sequence_parallel=True),
}
ROWS, TOKENS, HIDDEN, FEW, MANY = 2, 16, 128, 4, 16
WARM_UP, STEPS, ROUNDS = 3, 4, 7
CPU = torch.device("cpu")


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    print("| layout | ms a step, 4 layers | 16 layers | a layer |\n|---|---|---|---|")
    for name, section in LAYOUTS.items():
        if section is not None:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        few, many = (_milliseconds(section, layers) for layers in (FEW, MANY))
        print(f"| {name} | {few:.1f} | {many:.1f} | {(many - few) / (MANY - FEW):.2f} |", flush=True)
        if section is not None:
            dist.destroy_process_group()
    return 0


def _milliseconds(section: MeshSection | None, layers: int) -> float:
    """CPU time of a step; the median of some rounds."""
    ranks = ALONE if section is None else Ranks.of(section, CPU)
    config = MegatronBertConfig(
        vocab_size=256, hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=4 * HIDDEN, max_position_embeddings=TOKENS, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    network = empty_network(config, ObjectiveSection(pair="none"))
    objective = build_objective(
        network, CPU, precision="bfloat16", rows=ROWS, row_tokens=TOKENS, predicted_share=0.15, compiled=True,
        mesh=ranks.mesh, keeps_layers=section is not None and section.keep_layers,
    )  # fmt: skip
    materialize(network, CPU)
    initialize(network, seed=1)
    optimizer = build_optimizer(network, OptimizerSection(learning_rate=1e-4))
    batch = [objective.micro_batch(_rows())]

    def run(steps: int) -> None:
        for _ in range(steps):
            train_step(objective, optimizer, batch, clip_norm=1.0, ranks=ranks)

    run(WARM_UP)
    seconds = []
    for _ in range(ROUNDS):
        before = time.process_time()
        run(STEPS)
        seconds.append((time.process_time() - before) / STEPS)
    torch._dynamo.reset()
    gc.collect()
    return sorted(seconds)[ROUNDS // 2] * 1e3


def _rows() -> Any:
    ids = torch.arange(5, 5 + ROWS * TOKENS).view(ROWS, TOKENS)
    labels = torch.full_like(ids, -100)
    labels[:, ::7] = ids[:, ::7]
    return {
        "input_ids": ids, "labels": labels, "token_type_ids": torch.zeros_like(ids),
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
