"""Sentences encoded piece by piece against the tokenizer's own encoding of whole sentences."""

import json
import lzma
import os
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import BertWordPieceTokenizer, Tokenizer, normalizers, pre_tokenizers

from megatron_bert.data import encoding
from megatron_bert.data.encoding import SentenceEncoder, piece_splitter

DATA = Path(os.environ.get("MEGATRON_BERT_DATA", "../shared/data"))
# Marks that go to the letter before them, letters that change with their neighbours or grow in lower case, odd white
# space and control characters, Chinese of all blocks, Hangul that falls apart, pictures of several characters.
CHARACTERS = [
    *"abcABCxyzÅåéÉßẞıİΣσςﬁǅ .,;:!?'\"-_()[]{}<>#@`~^|\\/+=$%&*0123456789",
    *"\u0301\u0308\u0323\u3099\u093c \u00a0\u2003\u2028\u3000\u1680\t\r\n\x0b\x0c\x1c\x85\x00\x01\u200b\u200d\ufeff",
    *"中文語言模型㐀豈\U00020000\U0002a6df\U0002b820\uf900。，、！？「」“”—…·", *"한글ñ각", *"हिन्दी",
    *"🙂👩‍👩‍👧🇸🇪", "\ufffd",
]  # fmt: skip
_FORMS = [form for c in CHARACTERS for case in (c, c.lower(), c.upper()) for form in case if form.strip()]
_PIECES = {*_FORMS, *("##" + form for form in _FORMS), "ab", "##bc", "Abc", "ss", "##ss"}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(_PIECES)]


def tokenizer(*, lowercase: bool, chinese: bool, accents: bool | None = None) -> Tokenizer:
    made = BertWordPieceTokenizer(
        {token: at for at, token in enumerate(VOCABULARY)}, lowercase=lowercase, handle_chinese_chars=chinese,
        strip_accents=accents,
    )  # fmt: skip
    return made._tokenizer


def raw(made: Tokenizer) -> Tokenizer:
    copy = Tokenizer.from_str(made.to_str())
    copy.encode_special_tokens = True
    return copy


def check(made: Tokenizer, sentences: list[str]) -> None:
    tokens, lengths = SentenceEncoder(made, np.int32).encode(sentences)
    starts = np.cumsum(lengths) - lengths
    wanted = raw(made).encode_batch(sentences, add_special_tokens=False)
    for sentence, start, length, theirs in zip(sentences, starts, lengths, wanted, strict=True):
        assert tokens[start : start + length].tolist() == theirs.ids, repr(sentence)


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("accents", [None, False, True])
def test_ids_are_those_of_whole_sentences(lowercase: bool, chinese: bool, accents: bool | None) -> None:
    draw = random.Random(f"{lowercase}{chinese}{accents}")
    sentences = ["".join(draw.choices(CHARACTERS, k=draw.randint(0, 30))) for _ in range(1500)]
    sentences += ["[MASK] it [SEP]", "a" * 150 + " b", "ΑΣ ΑΣ.", "İİ I", "", " "]
    made = tokenizer(lowercase=lowercase, chinese=chinese, accents=accents)
    assert piece_splitter(made) is not None
    check(made, sentences)


def test_a_full_memory_of_pieces_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_KEPT_CHARACTERS", 20)
    made = tokenizer(lowercase=True, chinese=True)
    encoder = SentenceEncoder(made, np.uint16)
    for sentence in ["abc xyz", "abc", "xyz abc", "a b c x y z", "abc"]:
        assert encoder.encode([sentence])[0].tolist() == raw(made).encode(sentence, add_special_tokens=False).ids


def test_other_kinds_of_tokenizers_see_whole_sentences() -> None:
    replacing = tokenizer(lowercase=True, chinese=True)
    replacing.normalizer = normalizers.Sequence([normalizers.Replace("a b", "c"), normalizers.BertNormalizer()])
    splitting = tokenizer(lowercase=True, chinese=True)
    splitting.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    adding = tokenizer(lowercase=True, chinese=True)
    adding.add_tokens(["x, y"])
    for made in (replacing, splitting, adding):
        assert piece_splitter(made) is None
        check(made, ["a b a b", "x,y x, y x", "中文 [MASK] abc."])


def test_a_tokenizer_that_truncates_and_pads_does_neither_here() -> None:
    made = tokenizer(lowercase=True, chinese=True)
    made.enable_truncation(4)
    made.enable_padding(length=50)
    assert SentenceEncoder(made, np.uint16).encode(["a b c x y z", "a"])[1].tolist() == [6, 1]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the corpora")
@pytest.mark.parametrize(
    ("corpus", "vocabulary", "lowercase"),
    [
        ("enwiki2020", "bert-base-uncased", True),
        ("simplewiki", "bert-large-cased", False),
        ("zhwiki", "bert-base-chinese", True),
    ],
)
def test_real_text(corpus: str, vocabulary: str, lowercase: bool) -> None:
    made = BertWordPieceTokenizer(str(DATA / "vocab" / f"{vocabulary}-vocab.txt"), lowercase=lowercase)._tokenizer
    with lzma.open(DATA / "corpus" / f"{corpus}.jsonl.xz") as lines:
        check(made, [line for raw in islice(lines, 60) for line in json.loads(raw)["text"].splitlines()])
