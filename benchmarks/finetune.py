"""Fine-tuning speed on one GPU: `megatron-bert finetune` beside `transformers.Trainer` with Transformers' own class.

    python benchmarks/finetune.py --data DIR --vocab bert-base-uncased-vocab.txt
    python benchmarks/finetune.py --data DIR --vocab ... --tasks race --profile    # only where ours' time goes
    python benchmarks/finetune.py --data DIR --vocab ... --shape tiny              # a rehearsal, seconds on a CPU

DIR has somewhere in it SST-2's train.tsv (or train_full.tsv) and RACE as *.jsonl.xz; where there are several of RACE's,
those called train-*. A slice does: of what is there, as many examples as the steps take are drawn, the same for both.

Both sides: the same model with random weights, the same token ids (max_length 128 and 512), batches of 32 examples (of
RACE, 32 questions of four rows), bf16, weights and moments in float32, fused AdamW, clipping, dropout 0.1, two worker
processes. Theirs is padded by the collator that its Trainer takes by itself where it is given a tokenizer, RACE's by
Transformers' own for multiple choice. A micro-batch is as large as --micro says; where theirs does not fit into the
memory, half of that, with gradient accumulation. Ours is the command with its recipe, in a process of its own, logging
and all, and gets a SIGTERM when enough steps are recorded. Examples/s are those of all steps after a warm-up, which has
compilation in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import lzma
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"345m": (1024, 24, 16), "tiny": (128, 2, 2)}
VALIDATED, WORKERS, ASKED = 64, 2, 3.0
END_SECONDS = 20  # what a run may take to load, or to save itself
RESERVE = 1.25  # examples by those of the steps that count, so that no epoch ends before them
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Measured:
    """What is measured of a task: of ours `steps` in all, of which records of `record` steps each after `skip` count;
    of theirs those after `their_skip`, as many as the time allows.
    """

    model: str  # Transformers' class
    labels: int
    max_length: int
    micro: int
    steps: int
    skip: int
    record: int
    their_skip: int
    batch: int = 32


TASKS = {
    "sst2": Measured("MegatronBertForSequenceClassification", 2, 128, 32, 240, 40, 20, 20),
    "race": Measured("MegatronBertForMultipleChoice", 1, 512, 16, 60, 10, 5, 4),
}


def main() -> int:
    """Measures and prints the table."""
    began = time.perf_counter()
    args = _arguments()
    environment = _environment()
    print(", ".join(f"{name} {value}" for name, value in environment.items()), flush=True)
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        _write_model(folder / "start", args)
        print(f"model ready after {time.perf_counter() - began:.1f} s", flush=True)
        results = []
        for task in args.tasks.split(","):
            _write_examples(task, args, folder)
            if args.profile:
                _profile(task, args, folder)
                continue
            left = args.limit_seconds - (time.perf_counter() - began)
            results.append(_measure(task, args, folder, left))
            print(f"{task} done after {time.perf_counter() - began:.1f} s\n", flush=True)
    if results:
        _print(results)
    if args.json:
        args.json.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n", "utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2's and RACE's files")
    parser.add_argument("--vocab", type=Path, required=True, help="vocabulary file, a token a line")
    parser.add_argument("--tasks", default="sst2,race", help="default: sst2,race")
    parser.add_argument("--shape", default="345m", choices=SHAPES, help="of the model (default: 345m)")
    parser.add_argument("--examples", type=int, help="draw at most this many (default: as many as the steps take)")
    parser.add_argument("--steps", type=int, help="of ours (default: 240 of SST-2, 60 of RACE)")
    parser.add_argument("--batch", type=int, default=32, help="examples of a step (default: 32)")
    parser.add_argument("--micro", type=int, help="examples of a micro-batch (default: 32 of SST-2, 16 of RACE)")
    parser.add_argument("--peer-seconds", type=float, default=20, help="of theirs that count, a task (default: 20)")
    parser.add_argument("--limit-seconds", type=float, default=300, help="what would end later is cut (default: 300)")
    parser.add_argument("--work", type=Path, help="folder for what is made, 7 GB (default: the system's temporary one)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for the recipes")
    parser.add_argument("--profile", action="store_true", help="only a table of ours by kernel")
    parser.add_argument("--json", type=Path, help="write every number there too")
    args = parser.parse_args()
    unknown = [task for task in args.tasks.split(",") if task not in TASKS]
    if unknown:
        parser.error(f"unknown task {unknown[0]}")
    return args


def _environment() -> dict[str, str]:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or "CPU"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__,
            "CUDA": str(torch.version.cuda), "Python": platform.python_version()}  # fmt: skip


# --- Model and examples


def _write_model(folder: Path, args: argparse.Namespace) -> None:
    """A folder that both sides start from: random weights and a tokenizer."""
    from megatron_bert.model import MegatronBertConfig, MegatronBertModel

    hidden, layers, heads = SHAPES[args.shape]
    tokens = args.vocab.read_text(encoding="utf-8").splitlines()
    config = MegatronBertConfig(
        vocab_size=-(-len(tokens) // 128) * 128, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * hidden, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    with DEVICE:
        model = MegatronBertModel(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
    del model
    _forget()


def _write_examples(task: str, args: argparse.Namespace, folder: Path) -> None:
    """Files to train and to validate on, drawn from what is there."""
    head, lines = _sst2(args.data) if task == "sst2" else ("", list(_race(args.data)))
    measured = _of_task(task, args)
    wanted = int(measured.steps * measured.batch * RESERVE)
    random.Random(0).shuffle(lines)
    number = min(wanted, args.examples or wanted, len(lines) - VALIDATED)
    _train_file(task, folder).write_text(head + "".join(lines[VALIDATED : VALIDATED + number]), encoding="utf-8")
    _validation_file(task, folder).write_text(head + "".join(lines[:VALIDATED]), encoding="utf-8")


def _sst2(data: Path) -> tuple[str, list[str]]:
    """The first line, and the others."""
    files = [file for file in sorted(data.rglob("train*.tsv")) if file.parent in (data, *data.rglob("SST-2"))]
    if not files:
        raise SystemExit(f"{data} has no SST-2: train.tsv, or SST-2/train.tsv, is needed")
    head, *lines = files[0].read_text(encoding="utf-8").splitlines(keepends=True)
    return head, lines


def _race(data: Path) -> Iterator[str]:
    """A line a question, where the files have one a passage."""
    files = [file for file in sorted(data.rglob("*.jsonl.xz")) if file.parent in (data, *data.rglob("race"))]
    files = [file for file in files if file.name.startswith("train")] or files
    if not files:
        raise SystemExit(f"{data} has no RACE: *.jsonl.xz is needed")
    for file in files:
        with lzma.open(file, "rt", encoding="utf-8") as stream:
            for passage in map(json.loads, stream):
                for at in range(len(passage["questions"])):
                    one = {key: [passage[key][at]] for key in ("questions", "options", "answers")}
                    yield json.dumps(passage | one) + "\n"


def _train_file(task: str, folder: Path) -> Path:
    return folder / f"{task}-train.{'tsv' if task == 'sst2' else 'jsonl'}"


def _validation_file(task: str, folder: Path) -> Path:
    return folder / f"{task}-validation.{'tsv' if task == 'sst2' else 'jsonl'}"


def _of_task(task: str, args: argparse.Namespace) -> Measured:
    """With what the command line says; of few steps the second half counts."""
    measured, steps = TASKS[task], args.steps or TASKS[task].steps
    micro = min(args.micro or measured.micro, args.batch)
    return replace(
        measured, steps=steps, batch=args.batch, micro=micro, skip=min(measured.skip, steps // 2),
        record=min(measured.record, max(steps // 4, 1)), their_skip=min(measured.their_skip, steps // 2),
    )  # fmt: skip


# --- The measurements


def _measure(task: str, args: argparse.Namespace, folder: Path, seconds: float) -> dict[str, Any]:
    """Ours, then theirs, within `seconds`."""
    until = time.perf_counter() + seconds
    ours = _ours(task, args, folder, seconds)
    features = _features(task, folder)
    micro, theirs = _of_task(task, args).micro, None
    while micro and theirs is None and time.perf_counter() + END_SECONDS < until:
        try:
            theirs = _theirs(task, args, folder, features, micro)
        except torch.OutOfMemoryError:
            print(f"theirs: {micro} examples do not fit", flush=True)
        _forget()
        micro = micro if theirs else micro // 2
    tokens = [len(ids) for one in features for ids in (one["input_ids"] if task == "race" else [one["input_ids"]])]
    ratio = ours["examples_per_second"] / theirs["examples_per_second"] if theirs else None
    return {"task": task, "rows": len(tokens), "mean_row_tokens": sum(tokens) / len(tokens), "ours": ours,
            "theirs": theirs, "ratio": ratio}  # fmt: skip


def _overrides(task: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """What makes the recipe a benchmark: these files, one seed, so many steps, no checkpoint before the end."""
    measured = _of_task(task, args)
    train, validation = _train_file(task, folder), _validation_file(task, folder)
    there = sum(1 for _ in train.open(encoding="utf-8")) - (task == "sst2")
    epochs = measured.steps * measured.batch * RESERVE / there
    return [
        f"output={folder / task}", f"model.start_from={folder / 'start'}", f"data.train={train}",
        f"data.validation={validation}", "data.test=null", f"data.max_length={measured.max_length}",
        f"training.epochs={epochs}", f"training.batch_samples={measured.batch}", "training.seeds=[1]",
        "training.patience=null", "training.precision=bfloat16",
        f"runtime.micro_batch_samples={measured.micro}", f"runtime.num_workers={WORKERS}",
        f"runtime.log_every_steps={measured.record}", "runtime.checkpoint_every_steps=1000000",
        "runtime.keep_checkpoints=1", *args.set,
    ]  # fmt: skip


def _ours(task: str, args: argparse.Namespace, folder: Path, seconds: float) -> dict[str, Any]:
    """The command, stopped when it has done its steps."""
    words = [word for override in _overrides(task, args, folder) for word in ("--set", override)]
    recipe = ROOT / "recipes" / "finetune" / f"{task}.yaml"
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "megatron_bert", "finetune", task, str(recipe), "--json", *words]
    measured, before = _of_task(task, args), time.perf_counter()
    records: list[dict[str, Any]] = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and time.perf_counter() - before < seconds:
            time.sleep(0.1)
            records = _records(folder / task / "metrics.jsonl")
            if records and records[-1]["step"] >= measured.steps:
                break
        process.terminate()
    wall = time.perf_counter() - before
    kept = [one for one in records if measured.skip <= one["step"] - measured.record < measured.steps]
    if not kept:
        raise SystemExit(f"ours has recorded {len(records)} times {measured.record} steps, which are too few")
    steps, took = len(kept) * measured.record, sum(record["seconds"] for record in kept)
    found = {"examples_per_second": steps * measured.batch / took, "ms_per_step": took / steps * 1e3, "steps": steps,
             "tokens_per_second": sum(one["tokens_per_second"] * one["seconds"] for one in kept) / took,
             "micro": measured.micro, "passes": measured.batch // measured.micro, "wall_seconds": wall,
             "records": records,
             "data_waiting_share": sum(one["data_waiting_share"] * one["seconds"] for one in kept) / took,
             "peak_memory_gib": kept[-1].get("peak_memory_gib"), "mfu": kept[-1].get("mfu")}  # fmt: skip
    print(f"ours: {found['examples_per_second']:,.1f} examples/s, {found['ms_per_step']:.1f} ms a step, "
          f"{wall:.1f} s in all, the first {measured.record}: {records[0]['seconds']:.1f} s", flush=True)  # fmt: skip
    return found


def _records(file: Path) -> list[dict[str, Any]]:
    """Of training, as far as they are written."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == "training"]


def _features(task: str, folder: Path) -> list[dict[str, Any]]:
    """The same rows, as Transformers' collators take them."""
    from megatron_bert.data.tokenization import load_tokenizer
    from megatron_bert.tasks.table import task_class, task_of
    from megatron_bert.tasks.task import Making

    ours = task_of(task, task_class(task).settings_class())
    examples = ours.read(_train_file(task, folder))
    making = Making(load_tokenizer(folder / "start"), TASKS[task].max_length, ours.labels(examples))
    features = []
    for row in ours.rows(examples, making):
        parts: dict[str, Any] = {"input_ids": [list(text.input_ids) for text in row.texts],
                                 "token_type_ids": [list(text.token_type_ids) for text in row.texts],
                                 "attention_mask": [[1] * len(text.input_ids) for text in row.texts]}  # fmt: skip
        if task == "sst2":
            parts = {name: value[0] for name, value in parts.items()}
        features.append({**parts, "labels": row.target})
    return features


class Clock(transformers.TrainerCallback):
    """Times the steps after `skip`, until they took `seconds`."""

    def __init__(self, skip: int, seconds: float) -> None:
        self._skip, self._limit = skip, seconds
        self.steps, self.seconds, self._since = 0, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Waits for the device where the time begins and ends."""
        is_last = state.global_step == state.max_steps
        if state.global_step == self._skip:
            _wait()
            self._since = time.perf_counter()
        elif state.global_step > self._skip and (is_last or time.perf_counter() - self._since > self._limit):
            _wait()
            self.steps, self.seconds = state.global_step - self._skip, time.perf_counter() - self._since
            control.should_training_stop = True


def _theirs(
    task: str, args: argparse.Namespace, folder: Path, features: list[dict[str, Any]], micro: int
) -> dict[str, Any]:
    """`transformers.Trainer`, with what it does where nothing is said."""
    measured = _of_task(task, args)
    steps = measured.steps
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "start")
    kind = getattr(transformers, measured.model)
    labels = {"num_labels": measured.labels} if task == "sst2" else {}
    model = kind.from_pretrained(folder / "start", dtype=torch.float32, **labels)
    assert type(model).__module__.startswith("transformers.")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "theirs"), max_steps=steps, per_device_train_batch_size=micro,
        gradient_accumulation_steps=measured.batch // micro, learning_rate=2e-5, weight_decay=0.01,
        warmup_steps=steps // 10,
        bf16=True, optim="adamw_torch_fused", dataloader_num_workers=WORKERS, dataloader_drop_last=True,
        logging_steps=measured.record, save_strategy="no", report_to="none", disable_tqdm=True, seed=1,
        use_cpu=DEVICE.type == "cpu",
    )  # fmt: skip
    clock = Clock(measured.their_skip, args.peer_seconds)
    collator = transformers.DataCollatorForMultipleChoice(tokenizer) if task == "race" else None
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=features, processing_class=tokenizer, data_collator=collator,
        callbacks=[clock],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = time.perf_counter()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None
    found = {"examples_per_second": clock.steps * measured.batch / clock.seconds, "steps": clock.steps,
             "micro": micro, "passes": measured.batch // micro,
             "ms_per_step": clock.seconds / clock.steps * 1e3, "wall_seconds": time.perf_counter() - before,
             "peak_memory_gib": peak}  # fmt: skip
    print(f"theirs: {found['examples_per_second']:,.1f} examples/s, {found['ms_per_step']:.1f} ms a step, "
          f"{clock.steps} steps of {found['passes']} x {micro}", flush=True)  # fmt: skip
    return found


# --- Where the time goes


def _profile(task: str, args: argparse.Namespace, folder: Path) -> None:
    """Ours without its loop: what a step takes, what it waits for, what is compiled late, and kernels by their time."""
    from megatron_bert.data.batches import Position
    from megatron_bert.tasks.configuration import configuration_of
    from megatron_bert.tasks.setup import RunSetup, open_inputs
    from megatron_bert.tasks.table import task_class
    from megatron_bert.training.configuration import load_recipe
    from megatron_bert.training.step import train_step

    recipe = ROOT / "recipes" / "finetune" / f"{task}.yaml"
    configuration = load_recipe(recipe, _overrides(task, args, folder), configuration_of(task_class(task)))
    setup = RunSetup.of(configuration, open_inputs(task, configuration, DEVICE))
    state, objective = setup.begin(None)
    steps = setup.batches.steps(setup.inputs.training, 1, Position(), num_workers=0, pin=False)
    batches = [list(next(steps).micro_batches) for _ in range(10)]

    def run(number: int) -> float:
        before = time.perf_counter()
        for at in range(number):
            micro = [objective.micro_batch(batch) for batch in batches[at % len(batches)]]
            train_step(objective, state.optimizer, micro, clip_norm=1.0)
        _wait()
        return (time.perf_counter() - before) / number

    print(f"\n## {task}: micro-batches of {setup.batches.row_tokens} tokens; first 10 steps, {run(10) * 10:.1f} s")
    graphs = partial(torch._dynamo.utils.counters["stats"].__getitem__, "unique_graphs")
    before = graphs()
    print(f"then {run(20) * 1e3:.2f} ms a step, {graphs() - before} graphs compiled anew", flush=True)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")  # says on standard error where the host waits
        for at in range(2):
            train_step(objective, state.optimizer, [objective.micro_batch(one) for one in batches[at]], clip_norm=1.0)
        torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run(3)
    for order in ("self_cpu_time_total", *(["self_device_time_total"] if DEVICE.type == "cuda" else [])):
        print(profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70))


# --- Shared


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _forget() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def _print(results: list[dict[str, Any]]) -> None:
    print("| | examples/s | ms a step | passes x examples | steps | waits for data | GiB | ours is faster | asked |")
    print("|---|---|---|---|---|---|---|---|---|")
    for result in results:
        about = f"{result['task']}, rows of {result['mean_row_tokens']:.0f} tokens"
        for name, side in (("ours", result["ours"]), ("Transformers' Trainer", result["theirs"])):
            if side is None:
                print(f"| {about}, {name} | not measured: too little time, or memory |||||||")
                continue
            waits = f"{side['data_waiting_share']:.1%}" if "data_waiting_share" in side else ""
            memory = f"{side['peak_memory_gib']:.1f}" if side["peak_memory_gib"] else ""
            ratio = f"**{result['ratio']:.2f}** | {ASKED:g}" if side is result["ours"] and result["ratio"] else " | "
            passes = f"{side['passes']} x {side['micro']}"
            print(f"| {about}, {name} | {side['examples_per_second']:,.1f} | {side['ms_per_step']:.1f} | {passes} "
                  f"| {side['steps']} | {waits} | {memory} | {ratio} |")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
