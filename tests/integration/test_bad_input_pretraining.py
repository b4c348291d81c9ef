"""Every mistake with tokenizer, preprocess and pretrain: one line, exit code 2, nothing half-written."""

import gzip
import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bert.cli.main import main
from megatron_bert.data.indexed import IndexedWriter, Provenance, files_of
from megatron_bert.errors import UserError
from megatron_bert.training.setup import _device
from tests.integration.tiny_corpus import documents, prepare, write_jsonl, write_recipe


@pytest.fixture
def folder(tmp_path: Path, prepared: Path) -> Path:
    """A fresh folder with links to a prepared corpus, tokenizer and token file, and a recipe for them."""
    for path in prepared.iterdir():
        if path.name != "recipe.yaml":
            (tmp_path / path.name).symlink_to(path)
    write_recipe(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("prepared")
    prepare(made)
    return made


def fails(capsys: pytest.CaptureFixture[str], words: list[object], message: str, verb: str) -> None:
    capsys.readouterr()
    code = main([verb, *map(str, words)])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert code == 2, captured.err
    assert lines[-1].startswith(f"megatron-bert {verb}: error: ")
    assert message in lines[-1]
    assert len(lines) == 1, captured.err
    assert not captured.out


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("none.txt", None, [], "none.txt: there is no such file"),
        ("a.txt", b"", [], "hold no text"),
        ("a.txt", b"caf\xe9\n", [], "a.txt line 1 is not UTF-8"),
        ("a.txt.gz", b"no", [], "a.txt.gz is damaged or incomplete"),
        ("a.jsonl", b'{"txt": "a"}', [], "line 1: there is no key 'text'"),
        ("a.txt", b"some text here", ["--vocab-size", "3"], "--vocab-size must be at least 6"),
        ("a.txt", b"some text here", ["--vocab-size", "12"], "has no room for the 16 special tokens"),
        ("a.txt", b"some text here", ["--vocab-size", "many"], "invalid int value: 'many'"),
    ],
)
def test_tokenizer_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: bytes | None, options: list[str], message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text)
    before = content(tmp_path)
    words = ["train", "--input", tmp_path / name, "--output", tmp_path / "tok", *options]
    fails(capsys, words, message, "tokenizer")
    assert content(tmp_path) == before


def test_tokenizer_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["inspect", tmp_path], "has no tokenizer", "tokenizer")


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.jsonl", b'{"text": "a. b."}\n{"text": "c"\n', [], "a.jsonl line 2 is not JSON"),
        (
            "a.jsonl",
            b'{"body": "a"}\n',
            [],
            "line 1: there is no key 'text' (its keys: 'body'); choose one with --json-key",
        ),
        ("a.jsonl", b'{"text": "a"}\n', ["--json-key", "body"], "there is no key 'body'"),
        ("a.txt", b"one\n\xe9t\xe9\n", [], "a.txt line 2 is not UTF-8"),
        ("a.txt", b"\n\n", [], "the input holds no text: every file is empty"),
        (
            "a.jsonl",
            b'{"text": ""}\n{"text": " "}\n',
            [],
            "the input holds no text: all documents were dropped (2 empty)",
        ),
        ("a.txt.gz", gzip.compress(b"a line\n" * 9999, mtime=0)[:-30], [], "a.txt.gz is damaged or incomplete"),
        ("a.txt", b"text", ["--language", "Klingon!"], "is not a language code"),
        ("a.txt", b"text", ["--lang", "en"], "unrecognized arguments: --lang"),
    ],
)
def test_preprocess(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, text: bytes, options: list[str], message: str
) -> None:
    (folder / name).write_bytes(text)
    (folder / "deep").mkdir()
    words = ["--input", folder / name, "--tokenizer", folder / "tokenizer", "--output", folder / "deep" / "out"]
    fails(capsys, [*words, *options], message, "preprocess")
    assert content(folder / "deep") == []


def test_preprocess_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    words = ["--input", tmp_path / "a.txt", "--tokenizer", tmp_path, "--output", tmp_path / "out"]
    fails(capsys, words, "has no tokenizer", "preprocess")


def test_preprocess_onto_a_token_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", folder / "corpus.jsonl", "--tokenizer", folder / "tokenizer", "--output", folder / "text"]
    fails(capsys, words, "text.bin is already there; choose another output or add --overwrite", "preprocess")
    fails(capsys, [*words[:-1], "."], ". is no PREFIX of a token file", "preprocess")


def replace(link: Path, raw: bytes) -> None:
    link.unlink()
    link.write_bytes(raw)


def another_vocabulary(folder: Path) -> None:
    corpus = write_jsonl(folder / "other.jsonl", ["entirely different words " * 5] * 3)
    (folder / "tokenizer").unlink()
    main(["tokenizer", "train", "--input", str(corpus), "--output", str(folder / "tokenizer"), "--vocab-size", "60"])


def foreign_with_large_ids(folder: Path) -> None:
    with IndexedWriter(folder / "foreign", "int32") as writer:
        writer.add(np.array([7, 9000]), np.array([1, 1], np.int32), [2])
        writer.finish(Provenance(fingerprint="", vocabulary_size=0, tokenizer="", documents=1, sentences=2, tokens=2))
    files_of(folder / "foreign")[1].unlink()


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (None, ["optimizer.learning_rat=1"], "did you mean optimizer.learning_rate?"),
        (None, ["data.row_tokens=65"], "data.row_tokens 65 is more than the model's model.max_position_embeddings 64"),
        (None, ["data.tokens=nowhere"], "nowhere.idx is missing"),
        (None, ["data.validation=nowhere"], "nowhere.idx is missing"),
        (None, ["data.tokenizer=nowhere"], "nowhere"),
        (None, ["data.validation_share=0.999"], "takes all 40 documents and leaves none to train on"),
        (None, ["runtime.device=gpu"], "runtime.device 'gpu': training is on a CPU or a CUDA GPU"),
        (None, ["runtime.device=meta"], "runtime.device 'meta': training is on a CPU or a CUDA GPU"),
        (None, ["runtime.device=cuda:x"], "runtime.device 'cuda:x' is not a device"),
        (None, ["training.precision=float8", "runtime.device=cpu"], "float8 needs a GPU of compute capability 9.0"),
        (lambda f: replace(f / "text.idx", b"x" * 99), [], "text.idx is not an index in Megatron-LM's"),
        (lambda f: replace(f / "text.bin", (f / "text.bin").read_bytes()[:100]), [], "text.bin is truncated"),
        (lambda f: replace(f / "text.idx", (f / "text.idx").read_bytes()[:100]), [], "text.idx is truncated"),
        (another_vocabulary, [], "was made with another vocabulary"),
        (foreign_with_large_ids, ["data.tokens=foreign"], "has the token id 9000, which data.tokenizer"),
        (lambda f: (f / "recipe.yaml").write_text("model: ["), [], "recipe.yaml is not YAML"),
        (lambda f: (f / "recipe.yaml").unlink(), [], "recipe.yaml: No such file or directory"),
    ],
)
def test_pretrain(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object] | None,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    if change:
        change(folder)
    fails(capsys, ["recipe.yaml", *(word for o in overrides for word in ("--set", o))], message, "pretrain")
    assert not (folder / "run").exists()


def test_a_corpus_without_any_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = prepare(tmp_path, ["the red fox sees a house"] * 30)
    fails(capsys, [recipe], "none of its 27 samples has two sentences", "pretrain")
    assert main(["pretrain", str(recipe), "--json", "--set", "objective.pair=none"]) == 0


def run_with_little_room(words: list[str | Path], file_bytes: int, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Runs `words` where no file may grow beyond `file_bytes`: what a full disk is to a writer."""
    return subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
    )  # fmt: skip


@pytest.mark.parametrize("verb", ["tokenizer", "preprocess", "pretrain"])
def test_no_room_for_the_output(folder: Path, verb: str, command: Path) -> None:
    write_jsonl(folder / "long.jsonl", documents(400))
    words, room = {
        "tokenizer": (["train", "--input", "corpus.jsonl", "--output", "deep/out", "--vocab-size", "200"], 2000),
        "preprocess": (["--input", "long.jsonl", "--tokenizer", "tokenizer", "--output", "deep/out"], 20_000),
        "pretrain": (["recipe.yaml", "--set", "output=deep/out", "--set", "training.steps=3"], 100_000),
    }[verb]
    done = run_with_little_room([command / "megatron-bert", verb, *words], room, folder)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"megatron-bert {verb}: error: ")
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    left = content(folder / "deep")
    assert left == ([".lock", "checkpoints", "metrics.jsonl", "out", "recipe.yaml"] if verb == "pretrain" else [])
    if verb == "pretrain":
        assert [json.loads(line)["step"] for line in (folder / "deep/out/metrics.jsonl").read_text().splitlines()]


def test_out_of_gpu_memory_says_what_to_lower(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("megatron_bert.training.loop.train_step", refuse)
    assert main(["pretrain", str(folder / "recipe.yaml"), "--json"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: out of GPU memory: lower runtime.micro_batch_samples (it is " in line
    assert "runtime.recompute=full" in line
    assert "megatron-bert plan" in line


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"runtime.device cuda:2: the last CUDA device here is cuda:1"):
        _device("cuda:2")
