"""Inference on two CPU cores: this package's class beside Transformers' class of the same name, same weights.

    python benchmarks/inference_cpu.py              # the 345M shape, as in RESULTS.md
    python benchmarks/inference_cpu.py --layers 2 --rounds 1 --texts 8    # a quick look

Every implementation and type runs in a process of its own, in turns, `--rounds` times; the table shows medians over the
rounds. Memory is the process's highest resident set during a case (VmHWM, reset before it).
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
# fp32 takes minutes, so it runs once, and only the cases whose figure is asked for: theirs is what our bf16 replaces.
WITH_FP32 = {"theirs": ("a", "c"), "ours": ("c",)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of bf16; fp32 has one")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--worker", nargs=3, metavar=("WHO", "TYPE", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(num_texts: int) -> dict[str, list[int]]:
    """Row lengths by case, smallest first, so that no case inherits a larger one's memory."""
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
    """Runs the cases with one implementation and prints seconds and GiB by case as JSON."""
    import torch
    import transformers

    from megatron_bert import model as family

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    torch.set_num_threads(arguments.cores)
    transformers.logging.disable_progress_bar()
    source = transformers if who == "theirs" else family
    model = getattr(source, CLASS).from_pretrained(folder, dtype=getattr(torch, TYPES[kind])).eval()
    results = {}
    with torch.inference_mode():
        for name, lengths in cases(arguments.texts).items():
            if kind == "fp32" and not name.startswith(WITH_FP32[who]):
                continue
            inputs = batch(lengths)
            large = len(lengths) > 8
            if not large:
                model(**inputs)
            reset_peak()
            seconds = []
            for _ in range(1 if large else 20 if len(lengths) == 1 else 3):
                start = time.perf_counter()
                model(**inputs)
                seconds.append(time.perf_counter() - start)
            results[name] = {"seconds": statistics.median(seconds), "gib": peak_gib()}
    print(json.dumps(results))


def run_worker(who: str, kind: str, folder: str, arguments: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--cores", str(arguments.cores), "--texts", str(arguments.texts)]
    done = subprocess.run([*command, "--worker", who, kind, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def medians(rounds: list[dict]) -> dict:
    return {
        case: {unit: statistics.median(one[case][unit] for one in rounds) for unit in ("seconds", "gib")}
        for case in rounds[0]
    }


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
        rounds: dict[tuple[str, str], list[dict]] = {}
        for number in range(arguments.rounds):
            for kind in ("bf16", "fp32") if number == 0 else ("bf16",):
                for who in ("theirs", "ours"):
                    rounds.setdefault((who, kind), []).append(run_worker(who, kind, folder, arguments))
                    print(who, kind, rounds[who, kind][-1], file=sys.stderr, flush=True)
    found = {key: medians(value) for key, value in rounds.items()}
    print(f"{CLASS}, {arguments.layers} layers, {arguments.cores} cores, {describe_machine()}\n")
    print("| case | ours | theirs | seconds, ours | seconds, theirs | ratio | GiB, ours | GiB, theirs |")
    print("|---|---|---|---|---|---|---|---|")
    for mine, other in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
        for case in sorted(found["ours", mine].keys() & found["theirs", other].keys()):
            ours, theirs = found["ours", mine][case], found["theirs", other][case]
            print(
                f"| {case} | {mine} | {other} | {ours['seconds']:.3f} | {theirs['seconds']:.3f} "
                f"| {theirs['seconds'] / ours['seconds']:.2f} | {ours['gib']:.2f} | {theirs['gib']:.2f} |"
            )


if __name__ == "__main__":
    main()
