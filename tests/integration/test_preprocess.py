"""`megatron-bert preprocess` as people run it: workers, shards, signals, a full disk, Chinese."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from megatron_bert.cli.main import main
from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.tokenization import load_tokenizer
from tests.integration.tiny_corpus import documents, prepare, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("prepared")
    prepare(made)
    return made


def words_for(folder: Path, source: Path, output: Path, *options: str) -> list[str]:
    return ["preprocess", "--input", str(source), "--tokenizer", str(folder / "tokenizer"), "--output", str(output),
            *options]  # fmt: skip


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never happened")


def children(pid: int) -> list[int]:
    """The processes that `pid` started, whichever of its threads did."""
    try:
        listed = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for text in listed for child in text.split()]


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has buried yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def in_the_middle(folder: Path, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A run with two workers that has written tokens and waits for more input, which comes through a pipe."""
    fifo = tmp_path / "endless.jsonl"
    os.mkfifo(fifo)
    words = words_for(folder, fifo, tmp_path / "out" / "text", "--workers", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_bert", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
        # A shell lets what it starts in the background ignore SIGINT; as the tests may be.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    text = "".join(json.dumps({"text": text}) + "\n" for text in documents(40) * 200)
    with fifo.open("w") as pipe:
        pipe.write(text * 5)
        pipe.flush()
        written = tmp_path / "out" / ".text.bin.partial"
        wait_for(lambda: written.exists() and written.stat().st_size)
        assert len(children(process.pid)) >= 2
        yield process


@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_stopped_run_leaves_nothing(folder: Path, tmp_path: Path, number: signal.Signals, to_group: bool) -> None:
    with in_the_middle(folder, tmp_path) as process:
        workers = children(process.pid)
        (os.killpg if to_group else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors == "megatron-bert preprocess: interrupted\n"
        assert list((tmp_path / "out").iterdir()) == []
        wait_for(lambda: not any(map(is_running, workers)))


def test_a_killed_run_leaves_nothing_that_looks_finished(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_the_middle(folder, tmp_path) as process:
        workers = children(process.pid)
        again = words_for(folder, folder / "corpus.jsonl", tmp_path / "out" / "text")
        assert main(again) == 2
        assert "another process is writing" in capsys.readouterr().err
        process.kill()
        process.communicate(timeout=60)
        wait_for(lambda: not any(map(is_running, workers)))
        assert all(path.name.startswith(".") for path in (tmp_path / "out").iterdir())
    assert main(again) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["text.bin", "text.idx", "text.json"]
    assert (tmp_path / "out" / "text.bin").read_bytes() == (folder / "text.bin").read_bytes()


def test_a_killed_worker_is_told(folder: Path, tmp_path: Path) -> None:
    with in_the_middle(folder, tmp_path) as process:
        for worker in children(process.pid):
            os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process was killed, perhaps because memory ran out; try fewer --workers" in errors
    assert list((tmp_path / "out").iterdir()) == []


def test_many_inputs_shards_and_merge(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for at in range(3):
        write_jsonl(tmp_path / f"{at}.jsonl", documents(30)[at * 10 : at * 10 + 10])
    write_jsonl(tmp_path / "last.jsonl", ["one sentence", "", "two sentences. Here."])
    inputs = ["--input", f"{tmp_path}/last.jsonl", "--json"]
    assert main([*words_for(folder, tmp_path / "[0-9].jsonl", tmp_path / "whole"), *inputs]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["documents"], report["dropped"], report["one_sentence_documents"]) == (32, {"empty": 1}, 1)
    for number in ("1", "2"):
        words = words_for(folder, tmp_path / "[0-9].jsonl", tmp_path / f"part{number}", "--shard", f"{number}/2")
        assert main([*words, *inputs]) == 0
    capsys.readouterr()
    merging = ["preprocess", "merge", f"{tmp_path}/part1", f"{tmp_path}/part2", "--output", f"{tmp_path}/merged"]
    assert main([*merging, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == report["tokens"]
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"merged.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "--output", "x"], "merge takes token files"),
        (["corpus.txt", "--output", "x"], "unexpected 'corpus.txt': files are named by --input"),
        (["--output", "x"], "--input is missing"),
        (["--input", "x.txt", "--output", "x"], "--tokenizer is missing"),
        (["--input", "x.txt", "--tokenizer", "t", "--output", "x", "--workers", "-1"], "--workers -1"),
        (["--input", "x.txt", "--tokenizer", "t", "--output", "x", "--shard", "3/2"], "--shard '3/2' is not a part"),
        (["--input", ".", "--tokenizer", "t", "--output", "x"], "is a folder; name its files"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["preprocess", *words]) == 2
    assert message in capsys.readouterr().err


def test_chinese_from_text_to_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        f"赫斯特指数以英国水文学家命名。他{year}年生于伦敦！“真的吗？”她问。\nABC公司" for year in range(1900, 1960)
    ]
    corpus = write_jsonl(tmp_path / "zh.jsonl", texts)
    assert (
        main(["tokenizer", "train", "--input", str(corpus), "--output", f"{tmp_path}/tokenizer", "--vocab-size", "150"])
        == 0
    )
    words = words_for(tmp_path, corpus, tmp_path / "zh", "--language", "zh", "--json")
    capsys.readouterr()
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    reader, tokenizer = IndexedReader(tmp_path / "zh"), load_tokenizer(tmp_path / "tokenizer")
    first = [tokenizer.convert_ids_to_tokens(reader[at].tolist()) for at in range(reader.documents[1])]
    assert "".join(first[0]) == "赫斯特指数以英国水文学家命名。"
    assert "".join(first[-1]).replace("##", "") == "abc公司"
    assert report["documents"] == 60
    assert report["unknown_tokens"] == 0
