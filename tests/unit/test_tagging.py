"""Words to pieces and back, against the tokenizer's own word numbers; files read whole; bad files."""

import gzip
import json
import lzma

import pytest
import transformers

from megatron_bert.errors import UserError
from megatron_bert.tasks.tagging import IGNORED, decode, features, label_names, read
from tests.integration.real_text import DATA

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "##c", "台", "湾"]
TINY = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


def write(tmp_path, text, name="own.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("max_length", [6, 9, 64])
def test_every_word_comes_back(tmp_path, max_length):
    text = "-DOCSTART- O\n\nabc B-X\na O\n\u200b I-X\nabcb O\n\na O\n"
    sentences = read(write(tmp_path, text))
    labels = label_names(sentences)
    assert labels == ["O", "B-X", "I-X"]
    rows = features(sentences, TINY, labels, max_length)
    assert all(len(row.input_ids) <= max_length for row in rows)
    outputs = [[max(label, 0) for label in row.labels] for row in rows]
    assert decode(sentences, rows, outputs, labels) == [list(sentence.tags) for sentence in sentences]


def test_first_pieces_are_the_tokenizers(tmp_path):
    sentences = read(write(tmp_path, "abc B-X\na O\nabcb I-X\n"))
    [row] = features(sentences, TINY, label_names(sentences), 64)
    theirs = TINY(list(sentences[0].words), is_split_into_words=True)
    assert list(row.input_ids) == theirs["input_ids"]
    numbers = theirs.word_ids()
    firsts = [i for i, word in enumerate(numbers) if word is not None and word != numbers[i - 1]]
    assert [i for i, label in enumerate(row.labels) if label != IGNORED] == firsts


def test_cluener_spans(tmp_path):
    entry = {"text": "在台湾", "label": {"address": {"台湾": [[1, 2]]}}}
    [sentence] = read(write(tmp_path, json.dumps(entry, indent=1), "own.json"))
    assert sentence.tags == ("O", "B-address", "I-address")


@pytest.mark.parametrize(
    ("name", "sentences"),
    [("conll2003/train.txt", 14041), ("BC5CDR-IOB/devel.tsv", None), ("cluener_zh/dev.json", 1343)],
)
def test_real_files(name, sentences):
    path = DATA / "tasks" / "ner" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    found = read(path)
    assert sentences is None or len(found) == sentences


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "own.txt", "own.txt is empty"),
        ("a O\nword\n", "own.txt", "line 2: a word and its tag"),
        ("a O\nb PER\n", "own.txt", "line 2: tag 'PER'"),
        ('{"words": ["a"], "tags": []}', "own.jsonl", "line 1: 1 words and 0 tags"),
        ('\n{"words": ["a"]}', "own.jsonl", "line 2: .*needed"),
        ('{"text": "ab", "label": {"x": {"b": [[0, 0]]}}}', "own.json", "'b' is not at characters 0 to 0"),
    ],
)
def test_bad_files(tmp_path, text, name, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, text, name))


def test_compressed_files_and_carriage_returns(tmp_path):
    text = "\ufeffa O\nb B-X\n\nc O\n"
    wanted = [(one.words, one.tags) for one in read(write(tmp_path, text))]
    assert wanted == [(("a", "b"), ("O", "B-X")), (("c",), ("O",))]
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(text.replace("\n", "\r\n").encode()))
    assert [(one.words, one.tags) for one in read(tmp_path / "x.txt.gz")] == wanted
    (tmp_path / "x.json.xz").write_bytes(lzma.compress(b'{"words": ["c"], "tags": ["O"]}\r\n'))
    assert [(one.words, one.tags) for one in read(tmp_path / "x.json.xz")] == wanted[1:]


def test_an_unknown_label_is_named(tmp_path):
    with pytest.raises(UserError, match=r"own.txt, line 2: label 'B-Y' is not one of: O, B-X$"):
        features(read(write(tmp_path, "a O\na B-Y\n")), TINY, ["O", "B-X"], 64)
