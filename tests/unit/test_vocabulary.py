"""Vocabularies: the files are what Transformers reads, special tokens stand first, and training repeats itself."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import transformers
from tokenizers import trainers

from megatron_bert.data import reading, vocabulary
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.data.vocabulary import (
    SPECIAL_TOKENS,
    VocabularyOptions,
    fingerprint,
    train_vocabulary,
    write_tokenizer,
)
from megatron_bert.errors import UserError

TEXT = "The Cafés of Paris were unbelievably Old. 語言模型 are models of language; modelling 語言 is old.\n" * 5
SAMPLE = "Unbelievable cafés! 語言模型 [MASK] modelled,\tthe Olds"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.mark.parametrize("cased", [False, True])
@pytest.mark.parametrize("split_chinese", [False, True])
def test_transformers_reads_the_folder(tmp_path: Path, corpus: Path, cased: bool, split_chinese: bool) -> None:
    options = VocabularyOptions(size=150, cased=cased, split_chinese=split_chinese)
    trained = train_vocabulary([corpus], options)
    write_tokenizer(trained, options, tmp_path / "tok")
    wanted = trained.encode(SAMPLE, "and more").ids
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tok")
    for tokenizer in (theirs, load_tokenizer(tmp_path / "tok")):
        assert tokenizer(SAMPLE, "and more")["input_ids"] == wanted
        assert fingerprint(tokenizer.backend_tokenizer) == fingerprint(trained)
    assert type(theirs).__name__ == "BertTokenizer"
    assert [theirs.convert_ids_to_tokens(number) for number in range(5)] == list(SPECIAL_TOKENS)
    assert (theirs.pad_token_id, theirs.cls_token_id, theirs.mask_token_id) == (0, 2, 4)
    pieces = theirs.tokenize("Old 語言模型")
    assert ("Old" in pieces) is cased
    assert ("語" in pieces) is split_chinese
    lines = (tmp_path / "tok" / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert lines == [theirs.convert_ids_to_tokens(number) for number in range(len(theirs))]


def test_a_folder_with_the_vocabulary_alone_is_the_same_tokenizer(tmp_path: Path, corpus: Path) -> None:
    options = VocabularyOptions(size=150, cased=True)
    write_tokenizer(train_vocabulary([corpus], options), options, tmp_path / "tok")
    whole = load_tokenizer(tmp_path / "tok")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tok" / name).unlink()
    alone = load_tokenizer(tmp_path / "tok")
    assert fingerprint(alone.backend_tokenizer) == fingerprint(whole.backend_tokenizer)


def test_fingerprint_tells_tokenizers_apart(corpus: Path) -> None:
    prints = set()
    for options in (
        VocabularyOptions(size=150),
        VocabularyOptions(size=80),
        VocabularyOptions(size=150, cased=True),
        VocabularyOptions(size=150, split_chinese=False),
    ):
        prints.add(fingerprint(train_vocabulary([corpus], options)))
    assert len(prints) == 4


def test_training_gives_the_same_files_in_every_process(tmp_path: Path, corpus: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "megatron_bert",
        "tokenizer",
        "train",
        "--vocab-size",
        "200",
        "--input",
        str(corpus),
    ]
    for name in ("one", "two"):
        subprocess.run([*command, "--output", str(tmp_path / name)], check=True, capture_output=True)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_json_lines_train_the_same_vocabulary(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": TEXT}) + "\n")
    options = VocabularyOptions(size=150)
    assert fingerprint(train_vocabulary([tmp_path / "a.jsonl"], options, "body")) == fingerprint(
        train_vocabulary([corpus], options)
    )


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_no_text_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(UserError, match="hold no text"):
        train_vocabulary([tmp_path / "empty.txt"], VocabularyOptions(size=100))


def test_nothing_is_overwritten_by_accident(tmp_path: Path, corpus: Path) -> None:
    options = VocabularyOptions(size=100)
    trained = train_vocabulary([corpus], options)
    write_tokenizer(trained, options, tmp_path / "tok")
    with pytest.raises(UserError, match="is already there"):
        write_tokenizer(trained, options, tmp_path / "tok")
    write_tokenizer(trained, options, tmp_path / "tok", overwrite=True)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="not a tokenizer's folder"):
        write_tokenizer(trained, options, tmp_path / "photos", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "text.txt", "tok"]
    (tmp_path / "tok" / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"tok holds more than a tokenizer \(model.safetensors\)"):
        write_tokenizer(trained, options, tmp_path / "tok", overwrite=True)


@pytest.mark.parametrize("cased", [False, True])
@pytest.mark.parametrize("split_chinese", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_words_are_counted_as_the_library_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cased: bool, split_chinese: bool, num_workers: int
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 400)
    monkeypatch.setattr(vocabulary, "_KEPT_PIECES", 20)
    (tmp_path / "a.txt").write_text(TEXT + "Ünïted, e\u0301tat; 中。文X ΑΣ\tΑΣ-Σ. \u3000x\u00a0y\u0001z " * 20)
    options = VocabularyOptions(size=150, cased=cased, split_chinese=split_chinese)
    tokenizer = vocabulary._empty(options)
    counter = partial(vocabulary.WordCounter, tokenizer, "text")
    ours = vocabulary._count_words(counter, [tmp_path / "a.txt"], "text", num_workers, progress=False)
    trainer = trainers.WordPieceTrainer(show_progress=False)
    tokenizer.train_from_iterator((tmp_path / "a.txt").read_text().split("\n"), trainer=trainer)
    assert ours == json.loads(trainer.__getstate__())["WordPieceTrainer"]["bpe_trainer"]["words"]


def test_memory_stays_bounded_however_many_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_MOST_WORDS", 100)
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 2000)
    (tmp_path / "a.txt").write_text("\n\n".join(f"common words and {number}x" for number in range(2000)))
    counter = partial(vocabulary.WordCounter, vocabulary._empty(VocabularyOptions()), "text")
    words = vocabulary._count_words(counter, [tmp_path / "a.txt"], "text", 0, progress=False)
    assert len(words) <= 100
    assert words["common"] == words["words"] == words["and"] == 2000


def test_counts_of_a_huge_corpus_are_scaled(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.write_text(TEXT * 40, encoding="utf-8")
    options = VocabularyOptions(size=120)
    whole = train_vocabulary([corpus], options)
    counter = partial(vocabulary.WordCounter, vocabulary._empty(options), "text")
    words = vocabulary._count_words(counter, [corpus], "text", 0, progress=False)
    monkeypatch.setattr(vocabulary, "_FED_WORDS", sum(words.values()) // 4)
    fed = " ".join(vocabulary._repeated(words, 4)).split()
    assert len(fed) == sum(words.values()) // 4
    assert fingerprint(train_vocabulary([corpus], options)) == fingerprint(whole)


def test_words_that_always_become_unknown_give_no_pieces(corpus: Path) -> None:
    def longest_piece(word: str) -> int:
        corpus.write_text(TEXT + f"\n{word} {word}\n", encoding="utf-8")
        tokenizer = train_vocabulary([corpus], VocabularyOptions(size=300))
        assert (tokenizer.encode(word, add_special_tokens=False).tokens == ["[UNK]"]) == (len(word) > 100)
        return max(piece.count("tete") for piece in tokenizer.get_vocab())

    assert longest_piece("te" * 50) > 0
    assert longest_piece("te" * 51) == 0
    assert longest_piece("te" * 200_000) == 0  # at once; the library's trainer would take a minute
