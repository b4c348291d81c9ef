"""Token files of real text: CPython's language reference, which is always there, and Wikipedia where it lies ready."""

import json
import lzma
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
from tools.demo_text import documents

from megatron_bert.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MEGATRON_BERT_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class RealText:
    """A corpus: its files (none: the language reference), how many documents to take, and the vocabulary."""

    name: str
    file: str = ""
    documents: int = 0
    vocabulary: str = ""
    language: str = "en"
    segmenter: str = "none"

    def prepare(self, folder: Path) -> None:
        """Makes the token file folder/text and folder/tokenizer; skips the test where the text is not there."""
        words = ["preprocess", "--tokenizer", str(folder / "tokenizer"), "--output", str(folder / "text")]
        if not self.file:
            (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
            train = ["--input", str(folder / "text.jsonl"), "--output", str(folder / "tokenizer")]
            assert main(["tokenizer", "train", *train, "--vocab-size", "4000"]) == 0
            assert main([*words, "--input", str(folder / "text.jsonl")]) == 0
            return
        source, vocabulary = DATA / "corpus" / self.file, DATA / "vocab" / self.vocabulary
        if not source.is_file():
            pytest.skip(f"{source} is not here")
        with lzma.open(source, "rt", encoding="utf-8") as lines:
            (folder / "text.jsonl").write_text("".join(islice(lines, self.documents)), encoding="utf-8")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.txt").write_bytes(vocabulary.read_bytes())
        assert main([*words, "--input", str(folder / "text.jsonl"), "--language", self.language]) == 0


REFERENCE = RealText("language-reference")
ENGLISH = RealText("simplewiki", "simplewiki.jsonl.xz", 1500, "bert-base-uncased-vocab.txt")
CHINESE = RealText("zhwiki", "zhwiki.jsonl.xz", 500, "bert-base-chinese-vocab.txt", "zh", "jieba")
