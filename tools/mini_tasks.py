"""Fine-tunes the small model on eight tasks with several seeds, many runs at once, and prints what came out as a table.

    python tools/mini_tasks.py DATA OUTPUT --gpus 2 --seconds 450

DATA is laid out as `TASKS` below says. A run is `megatron-bert finetune` with a recipe of recipes/finetune, in
OUTPUT/TASK/seed-N with its log beside it; the same command goes on with what was stopped and leaves alone what is done.
After --seconds, what runs is told to save and stop. OUTPUT/results.json gets every score, time and baseline. The exit
code is 1 where a run is missing.

--set section.key=value changes all recipes, --set TASK:section.key=value one.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mini_tasks_report import table, task_result

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 30  # to save, once told to stop


class MiniTask(NamedTuple):
    """How a task is run.

    Attributes:
        files: to train on, to validate on, and to test on where a published file has labels; A+B: put together.
        shown: scores in the table.
        cost: of a run, in about seconds of a GPU.
    """

    verb: str
    recipe: str
    files: str
    shown: tuple[str, ...]
    cost: int


def _schools(part: str) -> str:
    return f"race/{part}-high.jsonl.xz+race/{part}-middle.jsonl.xz"


_MRPC = "glue/MRPC/msr_paraphrase"
TASKS = {
    "race": MiniTask("race", "race_mini", f"{_schools('train')} {_schools('dev')} {_schools('test')}",
                     ("accuracy", "middle_accuracy", "high_accuracy"), 200),
    "cmrc2018": MiniTask("cmrc2018", "cmrc2018", "cmrc2018/train-pseudo-cmrc2018.json cmrc2018/cmrc2018_dev.json",
                         ("f1", "exact"), 60),
    "conll2003": MiniTask("ner", "ner", "ner/conll2003/train.txt ner/conll2003/dev.txt ner/conll2003/test.txt",
                          ("f1",), 50),
    "cluener": MiniTask("cluener", "cluener", "ner/cluener_zh/train.json ner/cluener_zh/dev.json",
                        ("macro_f1", "f1"), 40),
    "sst2": MiniTask("sst2", "sst2", "glue/SST-2/train_full.tsv glue/SST-2/dev.tsv glue/SST-2/test-labeled.tsv",
                     ("accuracy",), 35),
    "bc5cdr": MiniTask("ner", "ner_bc5cdr",
                       "ner/BC5CDR-IOB/train.tsv ner/BC5CDR-IOB/devel.tsv ner/BC5CDR-IOB/test.tsv", ("f1",), 30),
    "ocnli": MiniTask("ocnli", "ocnli", "ocnli/train.10k.json ocnli/dev.json", ("accuracy",), 20),
    "mrpc": MiniTask("mrpc", "mrpc", f"{_MRPC}_train.txt {_MRPC}_train.txt {_MRPC}_test.txt", ("accuracy", "f1"), 10),
}  # fmt: skip


@dataclass
class Job:
    """A run of one task and one seed."""

    task: str
    seed: int
    folder: Path
    files: dict[str, Path]
    gpu: int = 0
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    wall_seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)  # what the command says of the run

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """By file, where the run is finished."""
        return {} if self.report.get("stopped_by") else self.report.get("scores", {})

    @property
    def log(self) -> Path:
        """What the run says of how it goes; what it says at the end is beside it, as JSON."""
        return self.folder.with_suffix(".log")

    def found(self) -> dict[str, Any]:
        """What the report needs of a finished run."""
        records = map(json.loads, (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        seconds = sum(record["seconds"] for record in records if record["kind"] == "training")
        kept = {key: self.report[key] for key in ("scores", "best_step", "step", "steps")}
        return {**kept, "training_seconds": seconds, "wall_seconds": self.wall_seconds}

    def said(self) -> str:
        """Its last line."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.process else ["there was no time for it"]
        return lines[-1] if lines else "it said nothing"


def main() -> int:
    """Runs everything, and tells what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--model", default="mini", help="a folder, or mini")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of them, commas between")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--gpus", type=int, default=1, help="0: on the CPU")
    parser.add_argument("--per-gpu", type=int, default=5, metavar="N", help="runs at once on each")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="until what runs is stopped")
    parser.add_argument("--set", action="append", default=[], metavar="[TASK:]SECTION.KEY=VALUE")
    args = parser.parse_args()
    tasks, seeds = args.tasks.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := {*tasks, *map(owner, args.set)} - {"", *TASKS}:
        parser.error(f"unknown tasks: {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which stops the runs, too
    files = {name: prepared(TASKS[name].files, args.data, args.output / name) for name in tasks}
    jobs = [Job(name, seed, args.output / name / f"seed-{seed}", files[name]) for name in tasks for seed in seeds]
    run_all(jobs, args)
    results = {}
    for name in tasks:
        runs = {job.seed: job.found() for job in jobs if job.task == name and job.scores}
        results[name] = task_result(TASKS[name].verb, files[name], TASKS[name].shown, runs)
    content = {"model": args.model, "gpus": args.gpus, "per_gpu": args.per_gpu, "set": args.set, "tasks": results}
    (args.output / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))
    missing = [job for job in jobs if not job.scores]
    for job in missing:
        print(f"missing: {job.task}, seed {job.seed}: {job.said()}")
    return 1 if missing else 0


def prepared(files: str, data: Path, folder: Path) -> dict[str, Path]:
    """A file a part. Those that are put together (also compressed ones can be) are in `folder`; of one that stands for
    two parts, every tenth line is to validate on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for part, names in zip(("train", "validation", "test"), files.split(), strict=False):
        several = [data / name for name in names.split("+")]
        found[part] = several[0]
        if len(several) > 1:
            found[part] = folder / f"{part}{''.join(several[0].suffixes)}"
            found[part].write_bytes(b"".join(file.read_bytes() for file in several))
    if found["train"] == found["validation"]:
        head, *rows = found["train"].read_text(encoding="utf-8-sig").splitlines(keepends=True)
        for part, lines in (("train", [row for at, row in enumerate(rows) if at % 10]), ("validation", rows[::10])):
            found[part] = folder / f"{part}{found['test'].suffix}"
            found[part].write_text("".join([head, *lines]), encoding="utf-8")
    return found


def run_all(jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """The largest first, each on the GPU that has the least to compute; what is done already last."""
    until = time.monotonic() + args.seconds
    waiting = sorted(jobs, key=lambda job: ((job.folder / "scores.json").exists(), -TASKS[job.task].cost, job.seed))
    running: list[Job] = []
    try:
        while (waiting or running) and time.monotonic() < until:
            while waiting and (free := free_gpus(running, args)):
                job = waiting.pop(0)
                job.gpu = min(free, key=lambda gpu: sum(TASKS[one.task].cost for one in running if one.gpu == gpu))
                start(job, args)
                running.append(job)
            for job in [job for job in running if job.process and job.process.poll() is not None]:
                running.remove(job)
                end(job)
            time.sleep(0.2)
    finally:
        stop(running)


def stop(running: Sequence[Job]) -> None:
    """Tells all to save, and waits for it."""
    for job in running:
        assert job.process
        job.process.terminate()
    until = time.monotonic() + GRACE_SECONDS
    for job in running:
        assert job.process
        try:
            job.process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()
        end(job)


def free_gpus(running: Sequence[Job], args: argparse.Namespace) -> list[int]:
    """Those with a place."""
    return [gpu for gpu in range(max(args.gpus, 1)) if sum(job.gpu == gpu for job in running) < args.per_gpu]


def start(job: Job, args: argparse.Namespace) -> None:
    """Starts the run's process."""
    task = TASKS[job.task]
    small = [] if job.task == "race" else ["runtime.compile=false"]  # compiling takes longer than it saves
    settings = [
        f"output={job.folder}", f"model.start_from={args.model}", f"training.seeds=[{job.seed}]", "data.test=null",
        *(f"data.{part}={file}" for part, file in job.files.items()), "runtime.keep_checkpoints=1", *small,
        *(one.removeprefix(f"{job.task}:") for one in args.set if owner(one) in ("", job.task)),
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    recipe = ROOT / "recipes" / "finetune" / f"{task.recipe}.yaml"
    # Many processes share the host: none of them takes all of it.
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "4",
               "TORCHINDUCTOR_COMPILE_THREADS": "4"}  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **threads, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    environment["CUDA_VISIBLE_DEVICES"] = "" if not args.gpus else devices[job.gpu] if devices[0] else str(job.gpu)
    with job.log.open("wb") as log, job.log.with_suffix(".json").open("wb") as printed:
        command = [sys.executable, "-m", "megatron_bert", "finetune", task.verb, str(recipe), "--json", *words]
        job.process = subprocess.Popen(command, env=environment, stdout=printed, stderr=log)
    job.started = time.monotonic()


def owner(setting: str) -> str:
    """The task that a setting is for; nothing: all."""
    return setting.partition("=")[0].rpartition(":")[0]


def end(job: Job) -> None:
    """Takes what the run has printed."""
    assert job.process
    job.wall_seconds = time.monotonic() - job.started
    if job.process.returncode == 0:
        job.report = json.loads(job.log.with_suffix(".json").read_text(encoding="utf-8"))["runs"][0]
    print(f"{job.task}, seed {job.seed}: {'done' if job.scores else 'not done'}, {job.wall_seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
