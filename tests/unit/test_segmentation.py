"""Chinese whole words, from token ids alone."""

import pickle
import sys

import numpy as np
import pytest

from megatron_bert.data.masking import IGNORED, Masker
from megatron_bert.data.randomness import Purpose, generator
from megatron_bert.data.segmentation import ChineseWords
from megatron_bert.errors import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = "我来到北京清华大学中国人民天气很好他爱习𠀀"
VOCABULARY = {token: at for at, token in enumerate([*SPECIAL, *CHARACTERS, "bert", "##s", "。", "##学"])}


def ids_of(*tokens: str) -> np.ndarray:
    return np.array([VOCABULARY[token] for token in tokens])


def spelled(ids: np.ndarray, continues: np.ndarray) -> list[str]:
    names = list(VOCABULARY)
    words: list[str] = []
    for token, continued in zip(ids.tolist(), continues.tolist(), strict=True):
        if continued:
            words[-1] += names[token]
        else:
            words.append(names[token])
    return words


def test_the_words_of_jiebas_own_example() -> None:
    """The first example of jieba's documentation: 我 / 来到 / 北京 / 清华大学."""
    pytest.importorskip("rjieba")
    ids = ids_of(*"我来到北京清华大学")
    assert spelled(ids, ChineseWords(VOCABULARY).continuations(ids)) == ["我", "来到", "北京", "清华大学"]


def test_words_end_where_another_kind_of_token_stands() -> None:
    pytest.importorskip("rjieba")
    ids = ids_of("[CLS]", "北", "[SEP]", "京", "bert", "##s", "中", "国", "。", "人", "民", "𠀀", "[SEP]")
    continues = ChineseWords(VOCABULARY).continuations(ids)
    assert spelled(ids, continues) == (
        ["[CLS]", "北", "[SEP]", "京", "bert", "##s", "中国", "。", "人民", "𠀀", "[SEP]"]
    )
    assert not ChineseWords(VOCABULARY).continuations(ids_of("bert", "##s")).any()


def test_they_are_masked_whole() -> None:
    pytest.importorskip("rjieba")
    words = pickle.loads(pickle.dumps(ChineseWords(VOCABULARY)))  # as a worker gets it
    masker = Masker.of_vocabulary(VOCABULARY, SPECIAL, "[MASK]", share=0.3, segmenter=words)
    ids = ids_of("[CLS]", *"我来到北京清华大学天气很好", "[SEP]")
    continues = words.continuations(ids)
    chosen = 0
    for at in range(300):
        picked = masker.mask(ids, generator(1, Purpose.SAMPLE, 0, at)).labels != IGNORED
        assert (picked[1:][continues[1:]] == picked[:-1][continues[1:]]).all()
        chosen += int(picked.sum())
    assert chosen / (300 * 13) == pytest.approx(0.3, abs=0.02)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(UserError, match=r"needs the package rjieba: pip install 'megatron-bert\[chinese\]'"):
        ChineseWords(VOCABULARY)


def test_a_vocabulary_without_chinese() -> None:
    with pytest.raises(UserError, match="the tokenizer's vocabulary has no Chinese characters"):
        ChineseWords({"a": 0, "##字": 1, "。": 2})
