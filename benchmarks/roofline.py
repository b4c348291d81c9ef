"""Where the time of a training step goes on one GPU, beside the least that it could take.

    PYTHONPATH=src python benchmarks/roofline.py --tokens PREFIX --tokenizer DIR                # 345m
    PYTHONPATH=src python benchmarks/roofline.py ... --case 345m,64,float8 --case 1.3b,32,bfloat16 --picture P

A case is SIZE,ROWS,PRECISION: recipes/pretrain_SIZE.yaml (or a recipe's path) with steps of so many packed rows of 512,
from a token file, as `pretrain` computes them, without its data workers and records. The step's time is the median of
windows of ten steps; the kernels' times are PyTorch's profiler's over three more, put into groups by their names. The
floor is the step's model FLOPs (`planning/flops.py`) over what a product of 8192 x 8192 bf16 matrices reaches here in
the same run: below it no kernel in bf16 can bring a step, whatever else it has for nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from scaling import covered

from megatron_bert.data.batches import Position
from megatron_bert.planning.flops import training_flops
from megatron_bert.training import execution
from megatron_bert.training.configuration import load_configuration
from megatron_bert.training.objective import Objective
from megatron_bert.training.setup import set_up
from megatron_bert.training.state import TrainState
from megatron_bert.training.step import train_step
from megatron_bert.training.throughput import measured_flops_per_second

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, WINDOWS, WINDOW_STEPS, PROFILED = 12, 5, 10, 3
# The first pattern that a kernel's name has says its group. Inductor names kernels after what it fused.
GROUPS = {
    "attention": r"^(forward|grad_query|grad_key_value)$|flash|fmha",
    "optimizer": r"multi_tensor|FusedAdam|foreach",
    "products": r"gemm|cutlass|nvjet|cublas|xmma|_mm_|splitK",
    "vocabulary's loss": r"log_softmax|nll_loss|argmax",
    "GELU": r"gelu|erf",
    "norms, dropout, residuals": r"^norm_(forward|backward)$|layer_norm|dropout|rand|philox",
    "float8's casts": r"^cast_(rows|weight)$|float8|amax|clamp",
    "copies": r"Memcpy|Memset|copy|cat|fill|zero",
}
REST, IDLE = "other kernels", "no kernel"


def main() -> int:
    """Measures the cases, prints a table of each."""
    args = _arguments()
    execution._OWN_KERNELS = not args.compiled_alone
    device = torch.device("cuda")
    ceiling = measured_flops_per_second(device, "bfloat16")
    assert ceiling is not None
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}: {ceiling / 1e12:.0f} TFLOP/s, {_copy_rate(device) / 1e12:.2f} TB/s")
    cases = [_measured(case, args, device, ceiling) for case in args.case or ["345m,64,bfloat16"]]
    if args.json:
        args.json.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        _draw(cases, args.picture)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="PREFIX of a token file")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer that made it")
    parser.add_argument("--case", action="append", metavar="SIZE,ROWS,PRECISION", help="default: 345m,64,bfloat16")
    parser.add_argument("--samples", type=int, help="of a step, packed into the rows (default: as many)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for the recipes")
    parser.add_argument("--compiled-alone", action="store_true", help="without our kernels between a layer's products")
    parser.add_argument("--kernels", type=int, default=0, help="name so many kernels, the longest first")
    parser.add_argument("--json", type=Path, help="write every number there too")
    parser.add_argument("--picture", type=Path, help="draw it")
    return parser.parse_args()


def _measured(case: str, args: argparse.Namespace, device: torch.device, ceiling: float) -> dict[str, Any]:
    state, objective, batches = _built(case, args, device)

    def run(number: int) -> float:
        """Seconds a step."""
        before = time.perf_counter()
        for at in range(number):
            train_step(objective, state.optimizer, batches[at % len(batches)], clip_norm=1.0)
        torch.cuda.synchronize()
        return (time.perf_counter() - before) / number

    first = run(1)
    run(WARM_UP)
    seconds = statistics.median(run(WINDOW_STEPS) for _ in range(WINDOWS))
    peak = torch.cuda.max_memory_allocated() / 2**30
    seen = list(itertools.chain.from_iterable(batches))
    positions = sum(micro.inputs["input_ids"].numel() for micro in seen) / len(batches)
    tokens, pairs, predicted = (
        sum(getattr(micro, name) for micro in seen) // len(batches)
        for name in ("num_tokens", "num_attended_pairs", "num_masked")
    )
    floor = training_flops(state.model.config, tokens, pairs, predicted) / ceiling
    kernels = _kernels(run)
    result = {
        "case": case, "seconds": seconds, "first_step_seconds": first, "positions": positions, "tokens": tokens,
        "floor_seconds": floor, "mfu": floor / seconds, "peak_memory_gib": peak, "groups_ms": _groups(kernels),
    }  # fmt: skip
    _print(result, kernels, args.kernels)
    torch._dynamo.reset()
    return result


def _built(case: str, args: argparse.Namespace, device: torch.device) -> tuple[TrainState, Objective, list[Any]]:
    """A case's model with its optimizer, what is minimised, and the micro-batches of some steps."""
    gc.collect()  # the case before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # not later: what a recorded pass takes up is counted once
    size, rows, precision = case.split(",")
    recipe = Path(size) if size.endswith(".yaml") else ROOT / "recipes" / f"pretrain_{size}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"output={folder}", f"data.tokens={args.tokens.resolve()}", f"data.tokenizer={args.tokenizer.resolve()}",
            "data.validation=null", "data.validation_share=0.0", "data.short_share=0.0", "runtime.packing=true",
            f"training.batch_samples={args.samples or rows}", f"runtime.micro_batch_samples={rows}",
            f"training.precision={precision}", *args.set,
        ]  # fmt: skip
        setup = set_up(load_configuration(recipe, settings), device)
        state, objective = setup.begin(None)
    steps = setup.corpus.steps(setup.layout, Position(), num_workers=0, pin=False)
    chosen = itertools.islice(steps, WINDOW_STEPS)
    return state, objective, [[objective.micro_batch(batch) for batch in step.micro_batches] for step in chosen]


def _kernels(run: Any) -> list[tuple[str, float, float]]:
    """Of PROFILED steps: each kernel's name, begin and end in microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(PROFILED)
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def _groups(kernels: list[tuple[str, float, float]]) -> dict[str, float]:
    """Milliseconds a step by group, and between the kernels."""
    groups: Counter[str] = Counter()
    for name, begin, end in kernels:
        group = next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), REST)
        groups[group] += (end - begin) / 1000 / PROFILED
    times = [(begin, end) for _, begin, end in kernels]
    span = max(end for _, end in times) - min(begin for begin, _ in times)
    return {**dict(groups.most_common()), IDLE: (span - covered(times)) / 1000 / PROFILED}


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_(255)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        before = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    return 2 * source.numel() / statistics.median(times)


def _print(result: dict[str, Any], kernels: list[tuple[str, float, float]], number: int) -> None:
    seconds, positions = result["seconds"], result["positions"]
    print(f"\n{result['case']}: {seconds * 1e3:.1f} ms a step, {positions / seconds:,.0f} positions/s, "
          f"{result['tokens'] / seconds:,.0f} real tokens/s, MFU {result['mfu']:.3f}, "
          f"{result['peak_memory_gib']:.1f} GiB; first step {result['first_step_seconds']:.0f} s\n")  # fmt: skip
    print("| | ms a step | share |\n|---|---|---|")
    total = sum(result["groups_ms"].values())
    for group, milliseconds in result["groups_ms"].items():
        print(f"| {group} | {milliseconds:.1f} | {milliseconds / total:.1%} |")
    print(f"| the floor: {result['mfu']:.3f} of the step | {result['floor_seconds'] * 1e3:.1f} | |", flush=True)
    times: Counter[str] = Counter()
    for name, begin, end in kernels:
        times[name] += (end - begin) / 1000 / PROFILED
    counts = Counter(name for name, _, _ in kernels)
    for name, milliseconds in times.most_common(number):
        print(f"{milliseconds:8.2f} ms {counts[name] // PROFILED:5d} x {name[:150]}", flush=True)


def _draw(cases: list[dict[str, Any]], path: Path) -> None:
    """A bar a case: the floor, and above it what the step is made of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.7 * len(cases)), layout="constrained")
    axes = figure.subplots()
    names = ["products", *(name for name in GROUPS if name != "products"), REST, IDLE]  # the floor is one of products
    for number, case in enumerate(cases):
        total, left = sum(case["groups_ms"].values()), 0.0
        for color, group in enumerate(names):
            share = case["groups_ms"].get(group, 0.0) / total
            axes.barh(number, share, left=left, color=f"C{color}", label=group if number == 0 else None)
            left += share
        axes.plot([case["mfu"]] * 2, [number - 0.4, number + 0.4], color="black", linewidth=2)
    axes.set_yticks(range(len(cases)), [case["case"].replace(",", ", ") for case in cases])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of a step; black: the floor (model FLOPs at the rate of a large product)")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
