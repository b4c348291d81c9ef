"""A corpus divided into shards and merged again is the token file of one run, byte for byte."""

import gzip
import json
import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_bert.data import reading
from megatron_bert.data.indexed import IndexedReader, files_of
from megatron_bert.data.preprocess import Report, preprocess
from megatron_bert.data.sentences import SentenceSplitter
from megatron_bert.data.shards import WHOLE, Shard, merge
from megatron_bert.data.vocabulary import VocabularyOptions, train_vocabulary
from megatron_bert.errors import UserError
from tests.integration.tiny_corpus import documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files of four kinds, one of them a single long document, one empty."""
    made = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    texts = ["\n".join(draw.choices(documents(40), k=draw.randint(1, 3))) for _ in range(90)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (made / "a.jsonl").write_text("".join(lines[:30]))
    (made / "b.txt").write_text("\n\n".join(texts[30:50]) + "\n\n\n\n" + "\r\n\r\n".join(texts[50:60]))
    (made / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines[60:80]).encode(), mtime=0))
    (made / "d.txt.gz").write_bytes(gzip.compress("\n\n".join(texts[80:]).encode(), mtime=0))
    (made / "e.txt").touch()
    (made / "f.txt").write_text("\n".join(documents(60)))
    (made / "g.jsonl").write_text(lines[0])
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return train_vocabulary([folder / "a.jsonl"], VocabularyOptions(size=150))


def run(folder: Path, tokenizer: Tokenizer, prefix: Path, **options: object) -> Report:
    files = sorted(folder.iterdir())
    return preprocess(files, tokenizer, "tok", prefix, splitter=SentenceSplitter(), **options)  # type: ignore[arg-type]


def same(one: Path, other: Path) -> bool:
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(files_of(one), files_of(other), strict=True))


@pytest.mark.parametrize("block_bytes", [300, 1 << 20])
def test_shards_and_workers_make_the_file_of_one_run(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", block_bytes)
    whole = run(folder, tokenizer, tmp_path / "whole")
    assert whole.documents == 92
    run(folder, tokenizer, tmp_path / "workers", num_workers=2)
    assert same(tmp_path / "whole", tmp_path / "workers")
    for count in (2, 3, 8, 40):
        reports = [
            run(folder, tokenizer, tmp_path / f"{count}-{number}", shard=Shard(number, count))
            for number in range(1, count + 1)
        ]
        assert sum(report.tokens for report in reports) == whole.tokens
        prefixes = [tmp_path / f"{count}-{number}" for number in range(1, count + 1)]
        made = merge(prefixes[::-1], tmp_path / f"merged{count}")
        assert (made.documents, made.sentences, made.tokens) == (whole.documents, whole.sentences, whole.tokens)
        assert same(tmp_path / "whole", tmp_path / f"merged{count}")
        if count == 3:
            assert all(report.documents > 5 for report in reports)


def test_every_byte_is_in_one_shard(folder: Path) -> None:
    files = sorted(folder.iterdir())
    spans = [span for number in range(1, 6) for span in Shard(number, 5).spans(files)]
    by_file = {file: [span for span in spans if span.file == file] for file in files if file.stat().st_size}
    for file, of_file in by_file.items():
        assert of_file[0].start == 0
        assert all(one.end == other.start for one, other in pairwise(of_file))
        assert of_file[-1].end in (None, file.stat().st_size)
    assert WHOLE.spans(files) == [reading.Span(file) for file in files]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4"])
def test_shards_are_written_as_a_fraction(text: str) -> None:
    with pytest.raises(UserError, match="is not a part such as 1/8"):
        Shard.of(text)
    assert Shard.of("2/8") == Shard(2, 8)


def test_a_pipe_is_not_divided(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"--shard 1/2: .*pipe is no file on a disk"):
        Shard(1, 2).spans([tmp_path / "pipe"])
    assert WHOLE.spans([tmp_path / "pipe"]) == [reading.Span(tmp_path / "pipe")]


def test_token_files_of_one_vocabulary_can_be_joined(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    run(folder, tokenizer, tmp_path / "a")
    merge([tmp_path / "a", tmp_path / "a"], tmp_path / "twice")
    once, twice = IndexedReader(tmp_path / "a"), IndexedReader(tmp_path / "twice")
    assert twice.tokens.tolist() == once.tokens.tolist() * 2
    assert twice.lengths.tolist() == once.lengths.tolist() * 2
    assert len(twice.documents) == 2 * len(once.documents) - 1


def test_what_cannot_be_merged(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    run(folder, tokenizer, tmp_path / "whole")
    for number in (1, 3):
        run(folder, tokenizer, tmp_path / str(number), shard=Shard(number, 3))
    run(folder, tokenizer, tmp_path / "of4", shard=Shard(2, 4))
    other = train_vocabulary([folder / "f.txt"], VocabularyOptions(size=100))
    run(folder, other, tmp_path / "other")
    (tmp_path / "alien.bin").write_bytes((tmp_path / "whole.bin").read_bytes())
    (tmp_path / "alien.idx").write_bytes((tmp_path / "whole.idx").read_bytes())
    before = sorted(tmp_path.iterdir())
    for names, message in [
        (["1", "3"], "shard 2/3 is missing"),
        (["1", "3", "3"], "shard 2/3 is missing"),
        (["1", "1"], "shard 1/3 is there 2 times"),
        (["1", "of4"], r"not the shards of one run: .*1 \(1/3\), .*of4 \(2/4\)"),
        (["1", "whole"], r"not the shards of one run: .*whole \(no shard\)"),
        (["whole", "other"], "different vocabularies"),
        (["whole", "alien"], r"alien\.json is missing"),
        (["whole", "nowhere"], r"nowhere\.idx is missing"),
    ]:
        with pytest.raises(UserError, match=message):
            merge([tmp_path / name for name in names], tmp_path / "merged")
    with pytest.raises(UserError, match="is already there"):
        merge([tmp_path / "whole"], tmp_path / "whole")
    assert sorted(tmp_path.iterdir()) == before
