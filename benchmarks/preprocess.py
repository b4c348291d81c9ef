"""Preprocessing beside what it is made of, on real text.

    python benchmarks/preprocess.py --corpus simplewiki.jsonl.xz --vocab vocab.txt

Four measurements on the same documents, each in a process of its own:

ours       `megatron-bert preprocess`, the whole command: start, reading, sentences, tokens, files
batch      `tokenizers.encode_batch` alone, on sentences that are already in memory
loop       a straightforward loop with Transformers: a document, its sentences, one call of the tokenizer
sentences  the sentence library alone, one core

Memory is the highest sum of the resident sets of the process and its children, seen every 50 ms; memory that they share
counts several times. All use `--workers` cores.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BATCH_SENTENCES = 10_000
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Runs what is asked for and prints a line for each, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines, .xz")
    parser.add_argument("--vocab", type=Path, required=True, help="a vocab.txt")
    parser.add_argument("--language", default="en")
    parser.add_argument("--megabytes", type=float, default=100, help="of text (default: 100)")
    parser.add_argument("--loop-megabytes", type=float, default=20, help="for the loop, which is slow (default: 20)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps({"batch": _batch, "loop": _loop, "sentences": _sentences}[args.child](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        _measure(args, Path(folder))


def _measure(args: argparse.Namespace, folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_bytes(args.vocab.read_bytes())
    size = _write_part(args.corpus, folder / "text.jsonl", args.megabytes)
    loop_size = _write_part(args.corpus, folder / "loop.jsonl", min(args.loop_megabytes, args.megabytes))
    print(f"{size / 1e6:.1f} MB of {args.corpus.name}, {args.workers} workers")
    best: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for _ in range(args.rounds):
        for name in ("ours", "batch", "loop", "sentences"):
            record = _run_ours(args, folder) if name == "ours" else _run_child(args, folder, name)
            rate = (loop_size if name == "loop" else size) / 1e6 / record["seconds"]
            best[name] = max(best.get(name, 0), rate)
            tokens[name] = record.get("tokens", 0)
            print(f"{name:<10} {record['seconds']:8.2f} s {rate:8.2f} MB/s {record['peak_mb']:8.0f} MB", flush=True)
    assert tokens["ours"] == tokens["batch"], tokens
    print(f"ours / encode_batch alone {best['ours'] / best['batch']:.2f} (asked: 0.80)")
    print(f"ours / Transformers loop  {best['ours'] / best['loop']:.2f} (asked: 3)")


def _write_part(corpus: Path, target: Path, megabytes: float) -> int:
    """Writes the first documents with so many megabytes of text; returns the bytes of text."""
    written = 0
    with lzma.open(corpus) as lines, target.open("wb") as out:
        for line in lines:
            out.write(line)
            written += len(json.loads(line)["text"].encode())
            if written >= megabytes * 1e6:
                break
    return written


def _run_ours(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    words = ["preprocess", "--input", "text.jsonl", "--tokenizer", "tokenizer", "--output", "out", "--overwrite"]
    words += ["--language", args.language, "--workers", str(args.workers), "--json"]
    begun = time.perf_counter()
    output, peak = _watch([sys.executable, "-m", "megatron_bert", *words], folder)
    return {**json.loads(output), "seconds": time.perf_counter() - begun, "peak_mb": peak}


def _run_child(args: argparse.Namespace, folder: Path, name: str) -> dict[str, float]:
    words = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--corpus", "x", "--vocab", "x"]
    output, peak = _watch([*words, "--language", args.language, "--workers", str(args.workers)], folder)
    return {**json.loads(output), "peak_mb": peak}


def _watch(words: list[str], folder: Path) -> tuple[str, float]:
    """Standard output of the command, run in `folder`, and the peak memory of its process tree in MB."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_resident_bytes(pid) for pid in _tree(process.pid)))
        time.sleep(0.05)
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    return process.stdout.read(), peak / 1e6


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _tree(int(child))


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except OSError:
        return 0


def _documents(name: str) -> Iterator[str]:
    with open(name, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _batch(args: argparse.Namespace) -> dict[str, float]:
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from megatron_bert.data.sentences import SentenceSplitter
    from megatron_bert.data.tokenization import load_tokenizer

    splitter = SentenceSplitter(args.language)
    tokenizer = load_tokenizer("tokenizer").backend_tokenizer
    sentences = [sentence for text in _documents("text.jsonl") for sentence in splitter.split(text)]
    tokens, seconds = 0, 0.0
    for at in range(0, len(sentences), BATCH_SENTENCES):
        begun = time.perf_counter()
        encoded = tokenizer.encode_batch(sentences[at : at + BATCH_SENTENCES], add_special_tokens=False)
        seconds += time.perf_counter() - begun
        tokens += sum(map(len, encoded))
    return {"seconds": seconds, "tokens": tokens}


def _loop(args: argparse.Namespace) -> dict[str, float]:
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import transformers

    from megatron_bert.data.sentences import SentenceSplitter

    splitter = SentenceSplitter(args.language)
    tokenizer = transformers.BertTokenizer.from_pretrained("tokenizer")
    begun, tokens = time.perf_counter(), 0
    for text in _documents("loop.jsonl"):
        if sentences := splitter.split(text):
            tokens += sum(map(len, tokenizer(sentences, add_special_tokens=False)["input_ids"]))
    return {"seconds": time.perf_counter() - begun}


def _sentences(args: argparse.Namespace) -> dict[str, float]:
    from megatron_bert.data.sentences import SentenceSplitter

    splitter, texts = SentenceSplitter(args.language), list(_documents("text.jsonl"))
    begun = time.perf_counter()
    for text in texts:
        splitter.split(text)
    return {"seconds": time.perf_counter() - begun}


if __name__ == "__main__":
    main()
