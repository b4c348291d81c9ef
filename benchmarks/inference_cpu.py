"""Inference on two CPU cores: this package's class beside Transformers' class of the same name, same weights.

    python benchmarks/inference_cpu.py              # the 345M shape, as in RESULTS.md
    python benchmarks/inference_cpu.py --layers 2 --rounds 1 --texts 8    # a quick look

Every implementation and type has a process of its own, and they take turns call by call, so that a machine whose speed
changes from minute to minute changes for all of them. The table shows medians over the calls and of the ratios of
neighbouring calls. Memory is the process's highest resident set during a case (VmHWM, reset before each call).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLASS = "MegatronBertForMaskedLM"
# Tokens of 64 real texts: every 100th article of Simple English Wikipedia (2022), the 321st to the 384th of them, in
# bert-base-uncased's vocabulary, cut at 512; those under 16 left out. The mean is 170.
TEXT_LENGTHS = [
    424,
    78,
    512,
    296,
    289,
    61,
    51,
    182,
    512,
    62,
    50,
    63,
    496,
    82,
    512,
    84,
    123,
    431,
    338,
    52,
    124,
    512,
    56,
    54,
    39,
    69,
    499,
    57,
    89,
    353,
    69,
    59,
    102,
    85,
    213,
    31,
    126,
    37,
    34,
    36,
    85,
    84,
    105,
    39,
    118,
    100,
    512,
    48,
    348,
    98,
    133,
    56,
    56,
    75,
    55,
    233,
    78,
    390,
    80,
    282,
    107,
    198,
    78,
    155,
]
TYPES = {"bf16": "bfloat16", "fp32": "float32"}
# What is compared: our type, theirs, and the cases. Their fp32 is what our bf16 replaces; it takes minutes: one call.
PAIRS = (("bf16", "bf16", "abc"), ("bf16", "fp32", "a"), ("fp32", "fp32", "c"))
CALLS = {"c": 20, "b": 3, "a": 1}  # of each process, a round


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="the mixed texts in fp32 run once")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--worker", nargs=3, metavar=("WHO", "TYPE", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(num_texts: int) -> dict[str, list[int]]:
    """Row lengths by case, smallest first, so that no case inherits memory that a larger one left behind."""
    return {"c 1 x 32": [32], "b 8 x 128": [128] * 8, "b 4 x 512": [512] * 4, "a texts": TEXT_LENGTHS[:num_texts]}


def batch(lengths: list[int]) -> dict:
    import torch

    columns = torch.arange(max(lengths))
    mask = (columns < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 29000, mask.shape, generator=torch.Generator().manual_seed(len(lengths))) * mask
    return {"input_ids": ids, "attention_mask": mask}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def work(who: str, kind: str, folder: str, arguments: argparse.Namespace) -> None:
    """Runs the case named by each line of standard input once, and answers with seconds and GiB as JSON."""
    import torch
    import transformers

    from megatron_bert import model as family

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    torch.set_num_threads(arguments.cores)
    transformers.logging.disable_progress_bar()
    source = transformers if who == "theirs" else family
    model = getattr(source, CLASS).from_pretrained(folder, dtype=getattr(torch, TYPES[kind])).eval()
    with torch.inference_mode():
        for line in sys.stdin:
            inputs = batch(cases(arguments.texts)[line.strip()])
            reset_peak()
            start = time.perf_counter()
            model(**inputs)
            print(json.dumps({"seconds": time.perf_counter() - start, "gib": peak_gib()}), flush=True)


class Worker:
    """A process that holds one implementation's model in one type."""

    def __init__(self, who: str, kind: str, folder: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--cores", str(arguments.cores), "--texts", str(arguments.texts)]
        self._process = subprocess.Popen(
            [*command, "--worker", who, kind, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def call(self, case: str) -> dict[str, float]:
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return json.loads(answer) if answer else sys.exit("a worker ended early; see above")

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def measure(mine: str, other: str, names: list[str], rounds: int, folder: str, arguments: argparse.Namespace) -> None:
    """Prints the rows of our type `mine` beside their type `other`."""
    ours, theirs = Worker("ours", mine, folder, arguments), Worker("theirs", other, folder, arguments)
    for name in names:
        calls = CALLS[name[0]] * (1 if other != mine else rounds)
        if name[0] != "a":  # a first call in a process is dearer; the mixed texts come last, long after the first
            ours.call(name), theirs.call(name)
        both = [(ours.call(name), theirs.call(name)) for _ in range(calls)]
        seconds = [statistics.median(pair[side]["seconds"] for pair in both) for side in (0, 1)]
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in both)
        gib = [max(pair[side]["gib"] for pair in both) for side in (0, 1)]
        print(
            f"| {name} | {mine} | {other} | {seconds[0]:.3f} | {seconds[1]:.3f} | {ratio:.2f} "
            f"| {gib[0]:.2f} | {gib[1]:.2f} |",
            flush=True,
        )
    ours.stop(), theirs.stop()


def describe_machine() -> str:
    import torch
    import transformers

    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    flags = Path("/proc/cpuinfo").read_text()
    special = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    processor = f"{model.split(':')[1].strip()} ({', '.join(special) or 'no 16-bit matrix instructions'})"
    return f"{processor}, torch {torch.__version__}, transformers {transformers.__version__}"


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        work(*arguments.worker, arguments)
        return
    import torch

    from megatron_bert import model as family

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = family.MegatronBertConfig(num_hidden_layers=arguments.layers)
        getattr(family, CLASS)(config).save_pretrained(folder)
        print(f"{CLASS}, {arguments.layers} layers, {arguments.cores} cores, {describe_machine()}\n")
        print("| case | ours | theirs | seconds, ours | seconds, theirs | ratio | GiB, ours | GiB, theirs |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for mine, other, letters in PAIRS:
            names = [name for name in cases(arguments.texts) if name[0] in letters]
            measure(mine, other, names, arguments.rounds, folder, arguments)


if __name__ == "__main__":
    main()
