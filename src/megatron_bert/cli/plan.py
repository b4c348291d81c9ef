"""Predict memory, communication and speed of pretraining on any number of GPUs, layout by layout, before it is queued.

The formulas and their sources are in `megatron_bert.planning`. --dry-run checks the chosen layout with the real model.
"""

from __future__ import annotations

import argparse
import json
import logging
from typing import TYPE_CHECKING, Any

from megatron_bert.bundled import resolved
from megatron_bert.errors import UserError

if TYPE_CHECKING:
    from megatron_bert.model import MegatronBertConfig
    from megatron_bert.planning.devices import Gpu
    from megatron_bert.planning.layout import Job
    from megatron_bert.planning.ranking import Choice, Plan

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert plan`."""
    model = parser.add_argument_group("the model: a size, a folder, or numbers")
    model.add_argument("--size", metavar="NAME", help="345m, 1.3b, 3.9b or 8.9b")
    model.add_argument("--model", metavar="DIR", help="a folder with a config.json, or mini")
    for name in ("hidden-size", "layers", "heads"):
        model.add_argument(f"--{name}", type=_positive, metavar="N")
    model.add_argument("--vocab-size", type=_positive, metavar="N", help="default: 29056, or the folder's")
    job = parser.add_argument_group("the job")
    job.add_argument("--gpus", type=_positive, default=1, metavar="N", help="how many (default: 1)")
    job.add_argument("--batch", type=_positive, default=1024, metavar="ROWS", help="of one step (default: 1024)")
    job.add_argument("--row-tokens", type=_positive, default=512, metavar="N", help="default: 512")
    gpu = parser.add_argument_group("the GPU: a known one, any number of which may be replaced")
    gpu.add_argument("--gpu", default="h100", metavar="NAME", help="h100 (default), h200 or a100")
    gpu.add_argument("--gpu-teraflops", type=_amount, metavar="X", help="that a large bf16 product reaches")
    gpu.add_argument("--gpu-memory-gib", type=_amount, metavar="X")
    gpu.add_argument("--gpu-memory-gbps", type=_amount, metavar="X", help="GB/s that a large copy reads and writes")
    gpu.add_argument("--gpu-link-gbps", type=_amount, metavar="X", help="GB/s to the other GPUs of a node, one way")
    gpu.add_argument("--gpu-network-gbps", type=_amount, metavar="X", help="GB/s to other nodes, one way, for each GPU")
    gpu.add_argument("--node-gpus", type=_positive, metavar="N", help="GPUs of one node")
    layout = parser.add_argument_group("the layout: what is not given is searched")
    layout.add_argument("--tensor", type=_positive, metavar="N", help="tensor-parallel degree")
    layout.add_argument(
        "--shard", type=_positive, metavar="N", help="data-parallel ranks that share weights; 1: none do"
    )
    layout.add_argument("--sequence-parallel", action=argparse.BooleanOptionalAction, default=None)
    layout.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="mesh.overlap (default: within a node)",
    )
    layout.add_argument(
        "--keep-layers",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="mesh.keep_layers (default: where it is faster and fits)",
    )
    layout.add_argument("--recompute", choices=("none", "selective", "full"))
    layout.add_argument("--micro-batch", type=_positive, metavar="ROWS", help="rows of one forward pass")
    parser.add_argument(
        "--top", type=_positive, default=12, metavar="K", help="layouts to show of each kind (default: 12)"
    )
    parser.add_argument("--dry-run", action="store_true", help="run the best layout's step on fake ranks, and compare")
    parser.add_argument(
        "--table", choices=("paper",), help="the paper's weak scaling beside our prediction; nothing else"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a layout, a dry run or a table's row"
    )


def run(args: argparse.Namespace) -> int:
    """Plans and prints."""
    if args.table:
        _print_paper(as_json=args.json)
        return 0
    from megatron_bert.planning.ranking import rank
    from megatron_bert.planning.report import plan_lines, plan_record

    job, gpu = _job(args), _gpu(args)
    plans = rank(job, gpu, _choice(args))
    if args.json:
        for plan in plans[: args.top]:
            print(json.dumps(plan_record(job, plan)))
    else:
        print("\n".join(plan_lines(job, gpu, plans, args.top)))
    if args.dry_run:
        _dry_run(job, plans[0], as_json=args.json)
    return 0


def _print_paper(*, as_json: bool) -> None:
    from megatron_bert.planning.paper import paper_table
    from megatron_bert.planning.report import paper_lines

    rows = paper_table()
    print("\n".join(json.dumps(vars(row)) for row in rows) if as_json else "\n".join(paper_lines(rows)))


def _dry_run(job: Job, plan: Plan, *, as_json: bool) -> None:
    from megatron_bert.planning.report import dry_run_lines, dry_run_record
    from megatron_bert.training.dry_run import dry_run

    log.info("dry run of rank 0 of %d; a large model takes a minute or two", job.gpus)
    found = dry_run(job, plan.layout)
    if as_json:
        print(json.dumps(dry_run_record(plan, found)))
    else:
        print("\n".join(["", *dry_run_lines(plan, found)]))


def _job(args: argparse.Namespace) -> Job:
    from megatron_bert.planning.layout import Job

    config = _config(args)
    if args.row_tokens > config.max_position_embeddings:
        config.max_position_embeddings = args.row_tokens
    return Job(config, args.gpus, args.batch, args.row_tokens)


def _config(args: argparse.Namespace) -> MegatronBertConfig:
    from megatron_bert.checkpoint.load import check_model
    from megatron_bert.model import MegatronBertConfig
    from megatron_bert.training.configuration import SIZES

    numbers = (args.hidden_size, args.layers, args.heads)
    given = [args.size is not None, args.model is not None, any(numbers)]
    if sum(given) != 1:
        raise UserError("give one of --size, --model, or --hidden-size with --layers and --heads")
    if args.model:
        config = check_model(resolved(args.model))
        config.vocab_size = args.vocab_size or config.vocab_size
        return config
    if args.size:
        from megatron_bert.cli.main import nearest

        if args.size.lower() not in SIZES:
            raise UserError(
                f"size {args.size!r} is not known{nearest(args.size.lower(), SIZES)}; known: {', '.join(SIZES)}"
            )
        numbers = SIZES[args.size.lower()]
    elif not all(numbers):
        raise UserError("--hidden-size, --layers and --heads go together")
    hidden, layers, heads = numbers
    if hidden % heads:
        raise UserError(f"--hidden-size {hidden} is not a multiple of --heads {heads}")
    return MegatronBertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=args.vocab_size or 29056,
    )


def _gpu(args: argparse.Namespace) -> Gpu:
    from dataclasses import replace

    from megatron_bert.planning.devices import gpu_named

    gpu = gpu_named(args.gpu)
    changes: dict[str, Any] = {
        "flops_per_second": args.gpu_teraflops and args.gpu_teraflops * 1e12,
        "attention_flops_per_second": args.gpu_teraflops
        and args.gpu_teraflops * 1e12 * gpu.attention_flops_per_second / gpu.flops_per_second,
        "memory_gib": args.gpu_memory_gib,
        "memory_bytes_per_second": args.gpu_memory_gbps and args.gpu_memory_gbps * 1e9,
        "node_bytes_per_second": args.gpu_link_gbps and args.gpu_link_gbps * 1e9,
        "network_bytes_per_second": args.gpu_network_gbps and args.gpu_network_gbps * 1e9,
        "node_gpus": args.node_gpus,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(gpu, name=f"{gpu.name}, changed", **changes) if changes else gpu


def _choice(args: argparse.Namespace) -> Choice:
    from megatron_bert.planning.ranking import Choice

    return Choice(
        tensor=args.tensor,
        shard=args.shard,
        sequence_parallel=args.sequence_parallel,
        recompute=args.recompute,
        micro_rows=args.micro_batch,
        overlap=args.overlap,
        keep_layers=args.keep_layers,
    )


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
