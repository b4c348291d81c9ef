"""The planner's prediction beside one GPU: memory and step time of 345m, 1.3b and 3.9b with full rows.

    PYTHONPATH=src python benchmarks/plan_gpu.py                        # the cases below, some four minutes
    PYTHONPATH=src python benchmarks/plan_gpu.py --case 345m,64,none,1  # size, rows, recompute, micro-batches

The step is the trainer's, compiled, in bfloat16 with dropout 0.1; rows of 512 tokens, each one sequence, with as many
predicted positions as the planner assumes. Memory: the most that PyTorch had allocated in the measured steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from typing import Any

import torch

from megatron_bert.model import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.planning.devices import GIB, gpu_named
from megatron_bert.planning.layout import Job, Layout
from megatron_bert.planning.ranking import plan_of
from megatron_bert.training.configuration import SIZES, OptimizerSection
from megatron_bert.training.dry_run import full_rows
from megatron_bert.training.execution import build_objective
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.step import train_step

CASES = ("345m,44,none,1", "345m,64,none,1", "345m,64,full,2", "1.3b,32,none,1", "1.3b,32,full,2", "3.9b,8,full,1",
         "3.9b,8,full,4")  # fmt: skip
WARM_UP, STEPS = 4, 10


def main() -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="SIZE,ROWS,RECOMPUTE,MICRO_BATCHES")
    parser.add_argument("--gpu", default="h100", help="whose numbers to predict with (default: h100)")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}\n")
    print("| case | GiB | predicted | | ms | predicted | |\n|---|---|---|---|---|---|---|")
    for case in args.case or CASES:
        size, rows, recompute, micro_batches = case.split(",")
        row = measure(size, int(rows), recompute, int(micro_batches), args.gpu)
        print(
            f"| {case} | {row['gib']:.1f} | {row['predicted_gib']:.1f} | {row['predicted_gib'] / row['gib'] - 1:+.1%} "
            f"| {row['ms']:.1f} | {row['predicted_ms']:.1f} | {row['predicted_ms'] / row['ms'] - 1:+.1%} |", flush=True,
        )  # fmt: skip
        print(json.dumps({"case": case, **row}), file=sys.stderr, flush=True)
    return 0


def measure(size: str, rows: int, recompute: Any, micro_batches: int, gpu_name: str) -> dict[str, float]:
    """One case, on the GPU and by formula."""
    device, (hidden, layers, heads) = torch.device("cuda"), SIZES[size]
    with torch.device(device):
        model = MegatronBertForPreTraining(
            MegatronBertConfig(
                hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden
            )
        ).train()
    job, layout = Job(model.config, 1, rows * micro_batches), Layout(recompute=recompute, micro_rows=rows)
    objective = build_objective(
        model, device, precision="bfloat16", rows=rows, row_tokens=512, predicted_share=job.predicted_share,
        recompute=recompute, compiled=True,
    )  # fmt: skip
    optimizer = build_optimizer(model, OptimizerSection(learning_rate=1e-4))
    batches = [objective.micro_batch(full_rows(job, layout)) for _ in range(micro_batches)]
    for _ in range(WARM_UP):
        train_step(objective, optimizer, batches, clip_norm=1.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = time.perf_counter()
    for _ in range(STEPS):
        train_step(objective, optimizer, batches, clip_norm=1.0)
    torch.cuda.synchronize()
    seconds, peak = (time.perf_counter() - before) / STEPS, torch.cuda.max_memory_allocated()
    plan = plan_of(job, layout, gpu_named(gpu_name))
    del model, objective, optimizer, batches
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "gib": peak / GIB, "predicted_gib": plan.memory.total / GIB,
        "ms": seconds * 1e3, "predicted_ms": plan.time.total * 1e3,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
