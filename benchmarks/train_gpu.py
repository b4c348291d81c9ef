"""Pretraining speed on one GPU, from a token file through the command to its metrics, beside Transformers' class.

    PYTHONPATH=src python benchmarks/train_gpu.py                      # text from CPython's own documentation
    PYTHONPATH=src python benchmarks/train_gpu.py --text corpus.jsonl  # JSON lines, or plain text
    PYTHONPATH=src python benchmarks/train_gpu.py --tokens PREFIX --tokenizer DIR

Ours is `megatron-bert pretrain recipes/pretrain_345m.yaml` with batches of 64 rows of 512, in a process of its own,
three times; the first records, in which compilation happens, are left out. Positions are all that rows have room for,
full or not; real tokens leave padding out. MFU, of real tokens: 72 B s l h^2 (1 + s / 6h) + 6 (masked) h (V + h) for
rows that are full (see `planning/flops.py`) over what a product of 8192 x 8192 bf16 matrices reaches in the same run.
Theirs: the rows of the same file, bf16 autocast, fused AdamW, clipping, the same dropout; every position projected,
which is what the class does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "megatron_bert")


def main() -> int:
    """Measures and prints the table."""
    args = _arguments()
    with contextlib.ExitStack() as stack:
        folder = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        tokens, tokenizer = (args.tokens, args.tokenizer) if args.tokens else _token_file(args.text, folder)
        overrides = _overrides(args, tokens, tokenizer)
        rows = [_ours(args, packed, overrides, folder) for packed in args.variants.split(",") if packed]
        rows += [_theirs(args, kind, overrides, folder) for kind in args.peers.split(",") if kind]
    _print(rows, args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "pretrain_345m.yaml")
    parser.add_argument("--text", type=Path, help="JSON lines or plain text to make the token file from")
    parser.add_argument("--tokens", type=Path, help="PREFIX of a token file that is there already")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer that made it")
    parser.add_argument("--work", type=Path, help="folder for what is made (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--skip-steps", type=int, default=20, help="of each run, not counted: compilation, warming up")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64, help="of a batch")
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument(
        "--samples", type=int, help="of a packed batch (default: as many as rows); a few more fill them"
    )
    parser.add_argument(
        "--variants",
        default="packed,padded",
        help="packed, padded, torchrun (packed, one process of a mesh), short (packed, twice the samples, of 2 to 512 "
        "tokens); default: packed,padded",
    )
    parser.add_argument("--peers", default="eager,compiled", help="of Transformers' class (default: eager,compiled)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for the recipe")
    parser.add_argument("--json", type=Path, help="write every number there too")
    args = parser.parse_args()
    if (args.tokens is None) != (args.tokenizer is None):
        parser.error("--tokens and --tokenizer go together")
    for name in ("recipe", "text", "tokens", "tokenizer", "work"):
        if path := getattr(args, name):
            setattr(args, name, path.resolve())
    return args


# --- The token file


def _token_file(text: Path | None, folder: Path) -> tuple[Path, Path]:
    """A token file and its tokenizer, made by the command's own verbs; a vocabulary of 29,000 as the paper's."""
    if text is None:
        text = folder / "topics.txt"
        _run("tools/demo_text.py", str(text))
    tokenizer, prefix = folder / "tokenizer", folder / "text"
    _verb("tokenizer", "train", "--input", str(text), "--output", str(tokenizer), "--vocab-size", "29000")
    _verb("preprocess", "--input", str(text), "--tokenizer", str(tokenizer), "--output", str(prefix))
    return prefix, tokenizer


def _overrides(args: argparse.Namespace, tokens: Path, tokenizer: Path) -> list[str]:
    """What makes the recipe a benchmark: batches of one pass, full rows where the text has them, no validation."""
    return [
        f"data.tokens={tokens}", f"data.tokenizer={tokenizer}", "data.validation_share=0.0", "data.short_share=0.0",
        f"data.row_tokens={args.row_tokens}", f"training.steps={args.steps}", "training.warmup_steps=10",
        f"runtime.micro_batch_samples={args.rows}",
        "runtime.log_every_steps=10", "runtime.keep_checkpoints=1", *args.set,
    ]  # fmt: skip


# --- Ours


def _ours(args: argparse.Namespace, variant: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """The median of `--runs` runs of the command."""
    runs = []
    settings = [*overrides, *_of_variant(args, variant)]
    configuration, network, corpus = _parts(args, settings, folder)
    del network
    steps = itertools.islice(_steps(corpus, configuration), 20)
    positions = statistics.mean(sum(batch["input_ids"].numel() for batch in step.micro_batches) for step in steps)
    for number in range(args.runs):
        output = folder / f"run-{variant}-{number}"
        words = [*settings, f"output={output}"]
        before = time.perf_counter()
        start = TORCHRUN if variant == "torchrun" else ("-m", "megatron_bert")
        _run(*start, "pretrain", str(args.recipe), "--json", "--overwrite", *_as_options(words))
        wall = time.perf_counter() - before
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if record["kind"] == "training"]
        kept = [record for record in records if record["step"] > args.skip_steps]
        for record in kept:
            record["positions_per_second"] = positions * configuration.runtime.log_every_steps / record["seconds"]
        runs.append({**_medians(kept), "wall_seconds": wall, "first_record_seconds": records[0]["seconds"]})
        print(f"{variant} {number}: {json.dumps(runs[-1])}", flush=True)
    return {"name": f"megatron-bert, {variant}", **_medians(runs), "runs": runs}


def _of_variant(args: argparse.Namespace, variant: str) -> list[str]:
    is_packed = variant != "padded"
    samples = args.samples if args.samples and is_packed else args.rows
    if variant == "short":
        return [f"training.batch_samples={2 * samples}", "runtime.packing=true", "data.short_share=1.0"]
    return [f"training.batch_samples={samples}", f"runtime.packing={str(is_packed).lower()}"]


def _medians(records: list[dict[str, Any]]) -> dict[str, float]:
    """The median of each number."""
    names = [name for name, value in records[0].items() if isinstance(value, int | float)]
    return {name: statistics.median(record[name] for record in records if name in record) for name in names}


# --- Theirs


def _theirs(args: argparse.Namespace, kind: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Transformers' class, on as many of the rows at a time as fit."""
    rows = args.rows
    while rows:
        with contextlib.suppress(torch.OutOfMemoryError):
            return _their_steps(args, kind, rows, overrides, folder)
        gc.collect()
        torch.cuda.empty_cache()
        rows //= 2
    return {"name": f"Transformers, {kind}: out of memory"}


def _their_steps(args: argparse.Namespace, kind: str, rows: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    from megatron_bert.planning.flops import training_flops
    from megatron_bert.training.microbatch import MicroBatch
    from megatron_bert.training.throughput import measured_flops_per_second

    device = _device()
    sizes = [f"training.batch_samples={rows}", f"runtime.micro_batch_samples={rows}", "runtime.packing=false"]
    configuration, network, corpus = _parts(args, [*overrides, *sizes], folder)
    peak = measured_flops_per_second(device, configuration.training.precision)
    model = transformers.MegatronBertForPreTraining(
        transformers.MegatronBertConfig(**network.config.to_diff_dict())
    ).to(device)
    model.train()
    del network
    if kind == "compiled":
        for layer in model.bert.encoder.layer:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step(batch: dict[str, torch.Tensor]) -> None:
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**moved).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    batches = itertools.islice(_padded_batches(corpus, configuration), 5 + 10)
    batches = [{name: _full_width(name, value, args.row_tokens) for name, value in batch.items()} for batch in batches]
    for batch in batches[:5]:
        step(batch)
    _wait(device)
    before = time.perf_counter()
    for batch in batches[5:]:
        step(batch)
    _wait(device)
    seconds = time.perf_counter() - before
    seen = [MicroBatch.of(batch) for batch in batches[5:]]
    real = sum(batch.num_tokens for batch in seen)
    flops = training_flops(
        model.config, real, sum(batch.num_attended_pairs for batch in seen), sum(batch.num_masked for batch in seen)
    )
    result = {"name": f"Transformers, {kind}, batch {rows}", "tokens_per_second": real / seconds}
    result["positions_per_second"] = sum(batch["input_ids"].numel() for batch in batches[5:]) / seconds
    if peak and device.type == "cuda":
        result |= {"mfu": flops / seconds / peak, "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    print(json.dumps(result), flush=True)
    torch._dynamo.reset()
    return result


def _full_width(name: str, value: torch.Tensor, row_tokens: int) -> torch.Tensor:
    """The batch's rows filled up to the full length, so that nothing is compiled twice."""
    if value.ndim != 2:
        return value
    fill = -100 if name == "labels" else 0
    return torch.nn.functional.pad(value, (0, row_tokens - value.shape[1]), value=fill)


# --- Shared


def _parts(args: argparse.Namespace, overrides: list[str], folder: Path) -> tuple[Any, Any, Any]:
    """The configuration, a fresh network and the corpus, as the trainer makes them."""
    from megatron_bert.data.tokenization import load_tokenizer
    from megatron_bert.parallel.materialize import materialize
    from megatron_bert.training.configuration import load_configuration
    from megatron_bert.training.corpus import open_corpus
    from megatron_bert.training.network import empty_network, fill_network, network_config

    configuration = load_configuration(args.recipe, [*overrides, f"output={folder / 'none'}"])
    tokenizer = load_tokenizer(configuration.data.tokenizer)
    network = empty_network(network_config(configuration, tokenizer), configuration.objective)
    materialize(network, torch.device("cpu"))
    fill_network(network, None, configuration.training.seed)
    return configuration, network, open_corpus(configuration, tokenizer)


def _padded_batches(corpus: Any, configuration: Any) -> Iterator[dict[str, torch.Tensor]]:
    for step in _steps(corpus, configuration):
        yield from step.micro_batches


def _steps(corpus: Any, configuration: Any) -> Iterator[Any]:
    """The trainer's steps, made in this process."""
    from megatron_bert.data.batches import BatchLayout, Position

    samples, runtime = configuration.training.batch_samples, configuration.runtime
    layout = corpus.best_layout(BatchLayout(samples, runtime.micro_batch_samples, packing=runtime.packing))
    return corpus.steps(layout, Position(), num_workers=0, pin=False)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _as_options(overrides: list[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def _verb(*words: str) -> None:
    _run("-m", "megatron_bert", *words)


def _run(*words: str) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT, env=environment)


def _print(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    batch = f"batches of {args.rows} x {args.row_tokens}"
    print(f"\n{device}; {versions}; {args.recipe.stem}, {batch}, median of {args.runs} runs of {args.steps} steps\n")
    print("| | positions/s | real tokens/s | MFU | waiting for data | peak memory, GiB |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["name"], _cell(row, "positions_per_second", ",.0f"),
                 _cell(row, "tokens_per_second", ",.0f"), _cell(row, "mfu", ".3f"),
                 _cell(row, "data_waiting_share", ".2%"), _cell(row, "peak_memory_gib", ".1f")]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


def _cell(row: dict[str, Any], name: str, form: str) -> str:
    return format(row[name], form) if name in row else ""


if __name__ == "__main__":
    sys.exit(main())
