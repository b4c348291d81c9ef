"""Weak scaling over the GPUs of one host, with the planner's prediction beside each figure.

    PYTHONPATH=src python benchmarks/scaling.py --gpus 8                            # the paper's shapes on 1, 2, 4, 8
    PYTHONPATH=src python benchmarks/scaling.py --gpus 8 --group bert               # 345m, 3.9b and 8.9b by layout
    PYTHONPATH=src python benchmarks/scaling.py --gpus 2 --group losses --steps 50  # beside those of one GPU
    PYTHONPATH=src python benchmarks/scaling.py --gpus 2 --device cpu               # a rehearsal on gloo, tiny shapes

The paper's weak scaling is arXiv 1909.08053, section 5.1, table 1: hidden 1536 / 1920 / 2304 / 3072 with 16 / 20 / 24 /
32 heads and 40 / 54 / 64 / 72 layers at tensor degree 1 / 2 / 4 / 8, 8 rows of 1,024 tokens, the next token predicted,
a full step. Efficiency: FLOPs a second and GPU over those of the first shape on one GPU (the paper on V100: 100, 95,
82, 77 %; on A100: 100, 91.7, 84.5, 74.7 %, github.com/NVIDIA/Megatron-LM).

Steps are the trainer's own: compiled layers, bfloat16 with float32 weights, fused AdamW, dropout 0.1. One `torchrun`
for all cases of as many GPUs. Communication: the share of a step in which its kernels run, and in which nothing else
does; idle: in which no kernel runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 4
LEARNING_RATE = 2e-5  # without warm-up: at 1e-4 the loss of any layout leaps, and leaps differ
PAPER = {1: 1.0, 2: 0.95, 4: 0.82, 8: 0.77}
ON_A100 = {1: 1.0, 2: 0.917, 4: 0.845, 8: 0.747}


@dataclass(frozen=True)
class Case:
    """A shape and its layout; `rows` are those of a step and of all GPUs, in so many passes."""

    name: str
    hidden: int
    layers: int
    heads: int
    gpus: int
    rows: int
    tensor: int = 1
    shard: int | None = None
    sequence_parallel: bool = False
    overlap: bool = False
    recompute: str = "none"
    row_tokens: int = 512
    causal: bool = False
    vocabulary: int = 29056
    keeps_layers: bool = False
    passes: int = 1


def paper_cases() -> list[Case]:
    """Table 1, and the same with sequence parallelism and overlap."""
    shapes = [
        ("1.2B", 1536, 40, 16, 1),
        ("2.5B", 1920, 54, 20, 2),
        ("4.2B", 2304, 64, 24, 4),
        ("8.3B", 3072, 72, 32, 8),
    ]
    cases = []
    for name, hidden, layers, heads, tensor in shapes:
        for sequence, overlap in [(False, False), (True, False), (True, True)] if tensor > 1 else [(False, False)]:
            cases.append(Case(name, hidden, layers, heads, tensor, 8, tensor, None, sequence, overlap, row_tokens=1024,
                              causal=True, vocabulary=51200))  # fmt: skip
    return cases


def bert_cases(gpus: int) -> list[Case]:
    """345m data-parallel, 3.9b tensor-parallel and sharded, 8.9b."""
    data = [Case("345m", 1024, 24, 16, n, 64 * n, shard=1) for n in (1, 2, 4, 8) if n <= gpus]
    tensor = [Case("3.9b", 2560, 48, 40, n, 8 * n, n, None, sequence, overlap)
              for n in (2, 4, 8) if n <= gpus
              for sequence, overlap in [(False, False), (True, False), (True, True)]]  # fmt: skip
    # In one pass, and in steps of as many rows a GPU as eight of them have of the paper's 1,024 (its section 5.3).
    one = [Case("3.9b", 2560, 48, 40, 1, 16 * passes, passes=passes) for passes in (1, 8)]
    one += [Case("3.9b", 2560, 48, 40, 1, 8, recompute="full")]  # for a GPU that does not hold the others
    spread = [Case("3.9b", 2560, 48, 40, gpus, 16 * passes * gpus, shard=shard, passes=passes)
               for passes in (1, 8) for shard in (None, 1) if gpus > 1]  # fmt: skip
    if gpus > 1:
        spread += [Case("3.9b", 2560, 48, 40, gpus, 16 * gpus, keeps_layers=True),
                   Case("345m", 1024, 24, 16, gpus, 64 * gpus)]  # fmt: skip
    if gpus >= 4 and gpus % 2 == 0:
        spread += [Case("345m", 1024, 24, 16, gpus, 64 * gpus, shard=2)]
    large = [Case("8.9b", 3584, 56, 56, 8, 32, 8, None, True, False, vocabulary=50176),
             Case("8.9b", 3584, 56, 56, 8, 64, recompute="full", vocabulary=50176)] if gpus >= 8 else []  # fmt: skip
    return data + one + tensor + spread + large


def loss_cases(gpus: int) -> list[Case]:
    """345m with one batch: one GPU, data-parallel, tensor-parallel with and without overlap."""
    alone = Case("345m", 1024, 24, 16, 1, 16)
    spread = [Case("345m", 1024, 24, 16, gpus, 16, tensor, None, sequence, overlap)
              for tensor, sequence, overlap in [(1, False, False), (gpus, False, False), (gpus, True, True)]
              ]  # fmt: skip
    return [alone, *(spread if gpus > 1 else [])]


def tiny(case: Case) -> Case:
    """The same layout of a shape that a CPU computes in no time."""
    return Case(**{**asdict(case), "hidden": 64, "layers": 2, "heads": 8, "rows": 8 * case.passes,
                   "row_tokens": 32, "vocabulary": 1024, "overlap": False})  # fmt: skip


def main() -> int:
    """Measures, prints the table and writes the picture."""
    args = _arguments()
    if args.worker:
        return _worker(args)
    cases = {"paper": paper_cases(), "bert": bert_cases(args.gpus), "losses": loss_cases(args.gpus)}[args.group]
    cases = [case for case in cases if case.gpus <= args.gpus and (not args.only or case.gpus in args.only)]
    cases = list(dict.fromkeys(map(tiny, cases))) if args.device == "cpu" else cases
    results: list[dict[str, Any]] = []
    for gpus in sorted({case.gpus for case in cases}):
        results += _launched([case for case in cases if case.gpus == gpus], args)
    if args.group == "losses":
        _print_losses(results)
    else:
        _print(results, is_paper=args.group == "paper")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        _draw(results, args.picture)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, help="of this host, at most")
    parser.add_argument("--group", choices=("paper", "bert", "losses"), default="paper")
    parser.add_argument("--only", type=int, action="append", help="cases of so many GPUs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: gloo ranks, tiny shapes")
    parser.add_argument("--gpu", help="whose numbers to predict with; left out: those of the one here, or an h100's")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, or whose losses are compared")
    parser.add_argument("--without-graphs", action="store_true", help="passes are not recorded as CUDA graphs")
    parser.add_argument("--compiled-alone", action="store_true", help="without our kernels between a layer's products")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="DIR",
        help="of each case, what the first process's host does in a step, and a trace",
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _launched(cases: list[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases' figures, from as many processes as they have GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.json"
        file.write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        words = ["--worker", str(file), "--group", args.group, "--device", args.device, "--steps", str(args.steps)]
        words += ["--gpu", args.gpu] if args.gpu else []
        if args.trace:
            words += ["--trace", str(args.trace.resolve())]
        words += ["--without-graphs"] * args.without_graphs + ["--compiled-alone"] * args.compiled_alone
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cases[0].gpus),
             __file__, *words], check=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        lines = file.with_suffix(".done").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- In each process


def _worker(args: argparse.Namespace) -> int:
    import torch

    from megatron_bert.errors import UserError
    from megatron_bert.parallel.launch import joined_processes, local_device
    from megatron_bert.training import execution

    execution._OWN_KERNELS = not args.compiled_alone
    device = local_device(args.device)
    cases = [Case(**case) for case in json.loads(args.worker.read_text(encoding="utf-8"))]
    with joined_processes(device, 300), args.worker.with_suffix(".done").open("a", encoding="utf-8") as done:
        for case in cases:
            before = time.perf_counter()
            try:
                figures = _measured(case, args, device)
            except (torch.OutOfMemoryError, UserError) as error:
                figures = {"failed": " ".join(str(error).split())[:150]}
            figures["wall_seconds"] = time.perf_counter() - before
            if int(os.environ["RANK"]) == 0:
                print(json.dumps({**asdict(case), **figures}), file=done, flush=True)
                shown = {**figures, "losses": None} if "losses" in figures else figures
                print(f"{case.name} {_layout_name(asdict(case))}: {json.dumps(shown)}", flush=True)
            torch._dynamo.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


def _measured(case: Case, args: argparse.Namespace, device: Any) -> dict[str, Any]:
    import torch

    from megatron_bert.model import MegatronBertConfig
    from megatron_bert.parallel.materialize import initialize, materialize
    from megatron_bert.planning.layout import Job, Layout
    from megatron_bert.training.configuration import MeshSection, ObjectiveSection, OptimizerSection
    from megatron_bert.training.execution import build_objective
    from megatron_bert.training.network import empty_network
    from megatron_bert.training.optimizer import build_optimizer
    from megatron_bert.training.ranks import Ranks
    from megatron_bert.training.step import train_step

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # not later: what a recorded pass takes up is counted once
    drops = 0.0 if args.group == "losses" else 0.1
    section = MeshSection(tensor=case.tensor, sequence_parallel=case.sequence_parallel, overlap=case.overlap,
                          shard=case.shard)  # fmt: skip
    ranks = Ranks.of(section, device)
    config = MegatronBertConfig(
        vocab_size=case.vocabulary, hidden_size=case.hidden, num_hidden_layers=case.layers,
        num_attention_heads=case.heads, intermediate_size=4 * case.hidden, max_position_embeddings=case.row_tokens,
        hidden_dropout_prob=drops, attention_probs_dropout_prob=drops,
    )  # fmt: skip
    job = Job(config, case.gpus, case.rows, case.row_tokens, predicted_share=1.0 if case.causal else 0.15)
    data = case.gpus // case.tensor
    shard = case.shard or data
    layout = Layout(
        case.tensor, shard, data // shard, case.sequence_parallel, case.recompute, case.rows // data // case.passes,
        case.overlap, case.keeps_layers,
    )  # fmt: skip
    network = empty_network(config, ObjectiveSection(kind="causal") if case.causal else ObjectiveSection())
    objective = build_objective(
        network, device, precision="bfloat16" if device.type == "cuda" else "float32", rows=layout.micro_rows,
        row_tokens=case.row_tokens, predicted_share=job.predicted_share, recompute=case.recompute,
        compiled=device.type == "cuda", mesh=ranks.mesh, keeps_layers=case.keeps_layers,
        cuda_graphs=not args.without_graphs,
    )  # fmt: skip
    torch.manual_seed(ranks.stream_seed(1))
    materialize(network, device)
    if args.group == "losses":
        initialize(network, seed=1)
    else:
        _fill(network)
    optimizer = build_optimizer(network, OptimizerSection(learning_rate=LEARNING_RATE))

    def steps(number: int) -> list[float]:
        losses = []
        for _ in range(number):
            result = train_step(objective, optimizer, [batch] * case.passes, clip_norm=1.0, ranks=ranks)
            losses.append(result.sums.masked_lm / result.sums.num_masked)
        return torch.stack(losses).tolist() if args.group == "losses" else []  # waits for the device

    batch = objective.micro_batch(_random_rows(replace(job, batch_rows=case.rows // case.passes), layout, ranks))
    if args.group == "losses":
        return {"losses": steps(args.steps)}
    steps(WARM_UP)
    figures = _figures(steps, args, job, layout, device)
    if args.trace:
        _trace(
            steps, args.trace / f"{case.name} {_layout_name(asdict(case))}.json.gz".replace(" ", "-").replace(",", "")
        )
    return figures


def _fill(network: Any) -> None:
    """Values that take no time: a speed does not depend on them."""
    import torch

    from megatron_bert.parallel.region import local_part

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            part = local_part(parameter)
            part.normal_(0.0, 0.01) if part.ndim > 1 else part.fill_(1.0 if "ln.weight" in name.lower() else 0.0)
        for name, buffer in network.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


def _random_rows(job: Any, layout: Any, ranks: Any) -> Any:
    """This rank's rows of the step: full, the same rows whatever the layout."""
    import torch

    from megatron_bert.training.dry_run import full_rows

    whole, own = full_rows(job, replace(layout, micro_rows=job.batch_rows)), full_rows(job, layout)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, job.config.vocab_size, (job.batch_rows, job.row_tokens), generator=generator)
    labels = ids.where(whole["labels"] >= 0, whole["labels"])
    ids, labels = (rows.chunk(ranks.data_degree)[ranks.data_rank] for rows in (ids, labels))
    return {**own, "input_ids": ids, "labels": labels}


def _figures(steps: Any, args: argparse.Namespace, job: Any, layout: Any, device: Any) -> dict[str, Any]:
    import torch

    from megatron_bert.planning.devices import GIB, gpu_named
    from megatron_bert.planning.ranking import plan_of
    from megatron_bert.planning.speed import step_flops
    from megatron_bert.training.throughput import measured_flops_per_second

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    seconds = []
    for _ in range(5):
        before = time.perf_counter()
        steps(max(args.steps // 5, 1))
        wait()
        seconds.append((time.perf_counter() - before) / max(args.steps // 5, 1))
    median = sorted(seconds)[len(seconds) // 2]
    plan, rate = plan_of(job, layout, gpu_named(args.gpu or _gpu_here())), step_flops(job) / median / job.gpus
    figures = {
        "ms": median * 1e3, "predicted_ms": plan.time.total * 1e3,
        "tokens_per_second_gpu": job.tokens / median / job.gpus,
        "flops_per_second_gpu": rate, "predicted_gib": plan.memory.total / GIB,
    }  # fmt: skip
    if device.type == "cuda":
        peak = measured_flops_per_second(device, "bfloat16")
        figures |= {"gib": torch.cuda.max_memory_allocated() / GIB, "mfu": rate / peak if peak else 0.0}
        figures |= _communication(steps)
    return figures


def _gpu_here() -> str:
    import torch

    from megatron_bert.planning.devices import GPUS

    words = torch.cuda.get_device_name().lower().split() if torch.cuda.is_available() else []
    return next((name for name in GPUS if name in words), "h100")


def _trace(steps: Any, file: Path) -> None:
    """The first process's step as a trace for chrome://tracing, and the operators that take the host's time."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        steps(1)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    if int(os.environ["RANK"]) == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(file))
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))


def _communication(steps: Any) -> dict[str, float]:
    """Of two profiled steps: shares of the time from the first kernel to the last."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps(2)
        torch.cuda.synchronize()
    sending, computing = [], []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            is_sent = "nccl" in event.name.lower() or "Memcpy PtoP" in event.name
            (sending if is_sent else computing).append((event.time_range.start, event.time_range.end))
    everything = covered([*sending, *computing])
    span = max(end for _, end in [*sending, *computing]) - min(start for start, _ in [*sending, *computing])
    return {"communication": covered(sending) / span, "exposed": (everything - covered(computing)) / span,
            "idle": 1 - everything / span}  # fmt: skip


def covered(intervals: list[tuple[float, float]]) -> float:
    """The length of their union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


# --- What is said of it


def _layout_name(row: dict[str, Any]) -> str:
    from megatron_bert.planning.layout import Layout

    parts = [f"tensor {row['tensor']}"] if row["tensor"] > 1 else []
    data = row["gpus"] // row["tensor"]
    shard = row["shard"] or data
    layout = Layout(row["tensor"], shard, data // shard, keep_layers=row["keeps_layers"])
    parts += [layout.data_parallelism()] if data > 1 else []
    parts += [name for key, name in (("sequence_parallel", "sequence"), ("overlap", "overlap")) if row[key]]
    parts += [f"{row['passes']} passes"] if row["passes"] > 1 else []
    parts += ["recomputed"] if row["recompute"] == "full" else []
    return ", ".join(parts) or "alone"


def _rows(results: list[dict[str, Any]], *, is_paper: bool) -> Iterator[str]:
    baselines: dict[tuple[str, int], float] = {}
    for row in results:
        name = f"| {row['name']} | {row['gpus']} | {_layout_name(row)} |"
        if "failed" in row:
            yield f"{name} {row['failed']} |"
            continue
        rate = row["flops_per_second_gpu"]
        key = "paper" if is_paper else row["name"], row["passes"]
        if row["gpus"] == 1:
            baselines.setdefault(key, rate)
        efficiency = f"{rate / baselines[key]:.1%}" if key in baselines else ""
        paper = f" {PAPER[row['gpus']]:.0%} |" if is_paper else ""
        yield (
            f"{name} {row['ms']:.1f} | {row['predicted_ms']:.1f} ({row['predicted_ms'] / row['ms'] - 1:+.0%}) | "
            f"{row['tokens_per_second_gpu']:,.0f} | {row.get('mfu', 0):.3f} | {efficiency} |{paper} "
            f"{row.get('gib', 0):.1f} ({row['predicted_gib']:.1f}) | {row.get('communication', 0):.1%} | "
            f"{row.get('exposed', 0):.1%} | {row.get('idle', 0):.1%} |"
        )


def _print(results: list[dict[str, Any]], *, is_paper: bool) -> None:
    print(f"\n{_versions()}\n")
    paper = " the paper's |" if is_paper else ""
    print(f"| shape | GPUs | layout | ms a step | predicted | tokens/s a GPU | MFU | efficiency |{paper} "
          "GiB (predicted) | communication | nothing else | idle |")  # fmt: skip
    print("|" + "---|" * (13 if is_paper else 12))
    for line in _rows(results, is_paper=is_paper):
        print(line)


def _print_losses(results: list[dict[str, Any]]) -> None:
    print(
        f"\n{_versions()}\n\n| layout | first loss | last loss | largest difference from one GPU's |\n|---|---|---|---|"
    )
    reference = results[0]["losses"]
    for row in results:
        if "failed" in row:
            print(f"| {_layout_name(row)}, {row['gpus']} | {row['failed']} | | |")
            continue
        furthest = max(abs(ours / theirs - 1) for ours, theirs in zip(row["losses"], reference, strict=True))
        first, last = row["losses"][0], row["losses"][-1]
        print(f"| {_layout_name(row)}, {row['gpus']} | {first:.5f} | {last:.5f} | {furthest:.2e} |")


def _versions() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device}; torch {torch.__version__}"


def _draw(results: list[dict[str, Any]], file: Path) -> None:
    """Bars of efficiency by case, beside the paper's and NVIDIA's own later ones."""
    import matplotlib.pyplot as plt

    rows = [row for row in results if "failed" not in row]
    base = rows[0]["flops_per_second_gpu"]
    figure, axes = plt.subplots(figsize=(9, 4))
    names = [f"{row['name']}\n{_layout_name(row)}" for row in rows]
    axes.bar(range(len(rows)), [row["flops_per_second_gpu"] / base for row in rows], 0.6, label="measured")
    for known, mark, label in ((PAPER, "k_", "paper (V100)"), (ON_A100, "C1_", "NVIDIA (A100)")):
        axes.plot(range(len(rows)), [known[row["gpus"]] for row in rows], mark, markersize=24, label=label)
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set_ylabel("efficiency a GPU")
    axes.set_ylim(0, 1.25)
    axes.legend(ncols=3, loc="upper right")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
