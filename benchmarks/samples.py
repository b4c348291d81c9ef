"""How fast samples are planned and made, on this machine; real text, bert-base-uncased's vocabulary.

    python benchmarks/samples.py --input corpus.jsonl.xz --tokenizer DIR      # as in RESULTS.md
    python benchmarks/samples.py --input corpus.jsonl.xz --tokenizer DIR --sentences 100000 --seconds 2   # a quick look

The index of an epoch: sentences a second, and what it keeps and needs at most in memory, over the real text's sentence
lengths repeated up to `--sentences`. Building it is one thread's work.
The loader: real tokens a second that reach the process which trains, at 512 tokens a row, from `--workers` processes,
with padded and with packed rows; padding does not count. One process for each case.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROW_TOKENS, STEP_SAMPLES, MICRO_SAMPLES = 512, 256, 64
PAIRS = ("sentence-order", "next-sentence", "none")


def main() -> None:
    """Prepares the token file and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="text, as for megatron-bert preprocess")
    parser.add_argument("--tokenizer", required=True, help="its folder")
    parser.add_argument("--language", default="en")
    parser.add_argument("--sentences", type=int, default=10_000_000, help="of the index")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each case of the loader, after a warm-up")
    parser.add_argument(
        "--tokens", type=Path, help="PREFIX of a token file that is already there, instead of --input's"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = options.tokens or Path(folder) / "text"
        if not options.tokens:
            words = ["--input", options.input, "--tokenizer", options.tokenizer, "--language", options.language]
            command = [sys.executable, "-m", "megatron_bert", "preprocess", *words, "--output", str(prefix)]
            subprocess.run(command, check=True)
        repeated = Path(folder) / "repeated"
        num_sentences = repeat(prefix, repeated, options.sentences)
        for pair in PAIRS:
            report(in_a_process(index_case, repeated, pair, num_sentences))
        for segmenter in ["none", "jieba"] if options.language.startswith("zh") else ["none"]:
            for packing in (False, True):
                arguments = (prefix, options.tokenizer, segmenter, packing, options.workers, options.seconds)
                report(in_a_process(loader_case, *arguments))


def in_a_process(case, *arguments):
    """What `case` returns, from a process that has done nothing else."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, case, arguments))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def _send(sender, case, arguments) -> None:
    sender.send(case(*arguments))


def report(result) -> None:
    print(json.dumps(result), flush=True)


def repeat(source: Path, target: Path, num_sentences: int) -> int:
    """A token file's documents over and over, as an index of at least so many sentences; its tokens are a hole."""
    import numpy as np

    from megatron_bert.data.indexed import IndexedReader, files_of

    reader = IndexedReader(source)
    times = -(-num_sentences // len(reader))
    lengths = np.tile(reader.lengths, times)
    documents = np.concatenate([[0], *(reader.documents[1:] + at * len(reader) for at in range(times))])
    ends = np.cumsum(lengths, dtype=np.int64) * reader.tokens.itemsize
    with files_of(target)[2].open("wb") as index:
        index.write(b"MMIDIDX\x00\x00" + np.array(1, "<u8").tobytes())
        index.write(np.array({"uint16": 8, "int32": 4}[reader.tokens.dtype.name], "u1").tobytes())
        index.write(np.array([len(lengths), len(documents)], "<u8").tobytes())
        for part in (lengths.astype("<i4"), ends - lengths * reader.tokens.itemsize, documents.astype("<i8")):
            index.write(part.tobytes())
    with files_of(target)[0].open("wb") as tokens:
        tokens.truncate(int(ends[-1]))
    return len(lengths)


def _peak_mib() -> float:
    """The highest resident set so far (VmHWM); `getrusage` would count the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def index_case(prefix: Path, pair: str, num_sentences: int):
    """Seconds to build an epoch's index, and memory. What the token file's own reader keeps is told apart."""
    import numpy as np

    from megatron_bert.data.indexed import IndexedReader
    from megatron_bert.data.pairs import PairIndex
    from megatron_bert.data.samples import SampleRules

    reader = IndexedReader(prefix)
    documents = np.arange(len(reader.documents) - 1)
    before = _peak_mib()
    start = time.perf_counter()
    index = PairIndex(reader, documents, SampleRules(1, ROW_TOKENS, pair=pair), 0)
    seconds = time.perf_counter() - start
    arrays = (index.starts, index.first_tokens, index.second_tokens, index.second_starts, index.labels)
    kept = sum(array.nbytes for array in arrays if array is not None)
    return {
        "case": "index", "pair": pair, "sentences": num_sentences, "samples": len(index), "seconds": round(seconds, 2),
        "index_bytes_per_sentence": round(kept / num_sentences, 2),
        "reader_bytes_per_sentence": reader.starts.nbytes / num_sentences,
        "memory_mib": {"imports and mapped file": round(before), "peak": round(_peak_mib())},
    }  # fmt: skip


def loader_case(prefix: Path, tokenizer_folder: str, segmenter: str, packing: bool, workers: int, seconds: float):
    """Real tokens a second, after the workers have started and the first steps are through."""
    from megatron_bert.data.batches import BatchLayout, Position
    from megatron_bert.data.tokenization import load_tokenizer
    from megatron_bert.training.configuration import PretrainConfiguration
    from megatron_bert.training.corpus import open_corpus

    configuration = PretrainConfiguration.model_validate({
        "output": "unused", "model": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1},
        "data": {"tokens": prefix, "tokenizer": tokenizer_folder, "row_tokens": ROW_TOKENS},
        "objective": {"chinese_segmenter": segmenter}, "optimizer": {"learning_rate": 1.0},
        "training": {"steps": 1, "batch_samples": STEP_SAMPLES},
    })  # fmt: skip
    corpus = open_corpus(configuration, load_tokenizer(tokenizer_folder))
    layout = corpus.best_layout(BatchLayout(STEP_SAMPLES, MICRO_SAMPLES, packing=packing))
    steps = corpus.steps(layout, Position(), num_workers=workers, pin=False)
    for _ in range(3):
        next(steps)
    real = computed = samples = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        step = next(steps)
        samples += len(step.keys)
        for batch in step.micro_batches:
            real += int((batch["input_ids"] != corpus.pad_id).sum())
            computed += batch["input_ids"].numel()
    passed = time.perf_counter() - start
    steps.close()
    return {
        "case": "loader", "packing": packing, "chinese_segmenter": segmenter, "workers": workers,
        "tokens_per_second": round(real / passed), "samples_per_second": round(samples / passed),
        "fill": round(real / computed, 4), "rows": layout.micro_samples, "summary": corpus.summary(layout),
    }  # fmt: skip


if __name__ == "__main__":
    main()
