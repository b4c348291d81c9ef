"""The tokenizer: both spellings of the mask everywhere, casing from the files, folders Transformers alone loads."""

import json
import logging
import os
import socket
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_bert.data import tokenization
from megatron_bert.data.tokenization import (
    AutoTokenizer,
    MegatronBertTokenizer,
    MegatronBertTokenizersBackend,
    is_cased,
    load_tokenizer,
    lower_cases,
)
from megatron_bert.errors import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["paris", "is", "the", "capital", "of", "france", ".", "植", "物", "##s", "cafe"]
CASED_WORDS = ["Paris", "is", "The", "the", "capital", "café", "##S"]
REAL_VOCABULARIES = Path(os.environ.get("MEGATRON_BERT_DATA", "../shared/data")) / "vocab"


def vocabulary_folder(folder: Path, tokens: list[str], **tokenizer_config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


@pytest.fixture
def tokenizer() -> MegatronBertTokenizer:
    return MegatronBertTokenizer(vocab={token: n for n, token in enumerate(SPECIAL + WORDS)})


@pytest.fixture
def reference() -> transformers.BertTokenizer:
    return transformers.BertTokenizer(vocab={token: n for n, token in enumerate(SPECIAL + WORDS)})


def same(ours: object, theirs: object) -> bool:
    return dict(ours) == dict(theirs)  # type: ignore[call-overload]


class TestMaskSpelling:
    TEXT = "Paris is the {} of France."

    @pytest.mark.parametrize(
        ("arguments", "options"),
        [
            (("Paris is the {}.",), {}),
            (("{}",), {}),
            ((["Paris is the {}.", "the {} of {}"],), {"padding": True}),
            (("Paris is {}", "the {} of France"), {}),
            ((["Paris {}", "is"], ["the {}", "{}"]), {"padding": True}),
            (([("Paris {}", "the {}"), ("is", "{}")],), {"padding": True}),
            ((["Paris", "is", "{}", "x{}y"],), {"is_split_into_words": True}),
            (([["Paris", "{}"], ["{}", "is"]],), {"is_split_into_words": True}),
            (("植物{}物",), {"return_offsets_mapping": True}),
            (("Paris {} the {} of",), {"truncation": True, "max_length": 5}),
            (("Paris {}",), {"text_target": "the {}"}),
        ],
    )
    def test_a_call_gives_what_the_tokens_own_spelling_gives(self, tokenizer, reference, arguments, options):
        def spelled(value: object, mask: str) -> object:
            if isinstance(value, str):
                return value.replace("{}", mask)
            if isinstance(value, list | tuple):
                return type(value)(spelled(part, mask) for part in value)
            return value

        def encoded(which, mask):
            spelled_options = {key: spelled(value, mask) for key, value in options.items()}
            return which(*spelled(arguments, mask), **spelled_options)

        expected = encoded(reference, "[MASK]")
        assert any(reference.mask_token_id in ids for ids in _flat(expected["input_ids"]))
        assert same(encoded(tokenizer, "<mask>"), expected)
        assert same(encoded(tokenizer, "[MASK]"), expected)

    def test_encode_and_tokenize(self, tokenizer, reference):
        ours, theirs = self.TEXT.format("<mask>"), self.TEXT.format("[MASK]")
        assert tokenizer.encode(ours) == reference.encode(theirs)
        assert tokenizer.tokenize(ours) == reference.tokenize(theirs)
        assert tokenizer.encode(ours, ours) == reference.encode(theirs, theirs)

    def test_offsets_are_those_of_the_given_text(self, tokenizer):
        text = "paris <mask> the"
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        assert [text[start:end] for start, end in encoded["offset_mapping"]] == ["paris", "<mask>", "the"]

    def test_a_vocabulary_that_has_the_token_keeps_it(self):
        tokenizer = MegatronBertTokenizer(vocab={t: n for n, t in enumerate([*SPECIAL, "<mask>", "<", "mask", ">"])})
        assert tokenizer.mask_token_id not in tokenizer("<mask>")["input_ids"]

    def test_splitting_special_tokens_leaves_the_text_alone(self, tokenizer, reference):
        for text in ("the <mask>", "the [MASK]"):
            assert tokenizer.encode(text, split_special_tokens=True) == reference.encode(
                text, split_special_tokens=True
            )


def _flat(ids):
    return ids if ids and isinstance(ids[0], list) else [ids]


class TestCasing:
    def test_a_cased_vocabulary_alone_is_not_lower_cased_and_it_is_said_in_one_line(self, tmp_path, caplog):
        folder = vocabulary_folder(tmp_path, SPECIAL + CASED_WORDS)
        with caplog.at_level(logging.INFO, logger="megatron_bert"):
            tokenizer = load_tokenizer(folder)
        assert tokenizer.tokenize("Paris is The capital café") == ["Paris", "is", "The", "capital", "café"]
        assert tokenizer.do_lower_case is False
        assert [("not lower-cased" in line.message, "\n" in line.message) for line in caplog.records] == [(True, False)]

    def test_an_uncased_vocabulary_alone_is_lower_cased_and_nothing_is_said(self, tmp_path, caplog):
        folder = vocabulary_folder(tmp_path, SPECIAL + WORDS)
        assert load_tokenizer(folder).tokenize("PARIS Café") == ["paris", "cafe"]
        assert not caplog.records

    @pytest.mark.parametrize("lower_case", [True, False])
    def test_the_configuration_is_obeyed_whatever_the_vocabulary(self, tmp_path, lower_case, caplog):
        folder = vocabulary_folder(tmp_path, SPECIAL + CASED_WORDS + WORDS, do_lower_case=lower_case)
        assert load_tokenizer(folder).tokenize("Paris") == ["paris" if lower_case else "Paris"]
        assert not caplog.records

    def test_what_the_caller_asks_for_comes_first(self, tmp_path):
        folder = vocabulary_folder(tmp_path, SPECIAL + CASED_WORDS + WORDS, do_lower_case=False)
        assert MegatronBertTokenizer.from_pretrained(folder, do_lower_case=True).tokenize("Paris") == ["paris"]

    def test_a_configuration_that_is_silent_about_case_leaves_it_to_the_vocabulary(self, tmp_path):
        folder = vocabulary_folder(tmp_path, SPECIAL + CASED_WORDS, model_max_length=512)
        assert load_tokenizer(folder).tokenize("Paris") == ["Paris"]

    def test_tokenizer_json_settles_it_where_the_configuration_is_silent(self, tmp_path):
        transformers.BertTokenizer(
            vocab={t: n for n, t in enumerate(SPECIAL + CASED_WORDS)}, do_lower_case=False, tokenize_chinese_chars=False
        ).save_pretrained(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.tokenize("Paris") == ["Paris"]
        assert (tokenizer.do_lower_case, tokenizer.tokenize_chinese_chars) == (False, False)

    def test_without_a_normalizer_no_letters_are_made_small(self):
        tokenizer = transformers.BertTokenizer(vocab={t: n for n, t in enumerate(SPECIAL)}, do_lower_case=True)
        assert lower_cases(tokenizer)
        tokenizer.backend_tokenizer.normalizer = None
        assert not lower_cases(tokenizer)

    def test_strays_and_bracketed_tokens_do_not_make_a_vocabulary_cased(self):
        uncased = [f"word{n}" for n in range(500)]
        assert not is_cased([*SPECIAL, "<S>", "<T>", *uncased, "Stray", "AGE"])
        assert is_cased([*SPECIAL, *uncased, *(f"Word{n}" for n in range(10))])
        assert is_cased([*SPECIAL, *uncased * 10, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"])  # Chinese with Latin letters
        assert not is_cased([])

    @pytest.mark.parametrize(
        ("name", "cased"), [("bert-base-uncased", False), ("bert-large-cased", True), ("bert-base-chinese", False)]
    )
    def test_the_published_vocabularies(self, name, cased, tmp_path):
        file = REAL_VOCABULARIES / f"{name}-vocab.txt"
        if not file.is_file():
            pytest.skip("the published vocabularies are not on this machine")
        tokens = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        assert is_cased(tokens) is cased
        ours = load_tokenizer(vocabulary_folder(tmp_path, tokens))
        theirs = transformers.BertTokenizer.from_pretrained(tmp_path, do_lower_case=not cased)
        for text in ("Über die Straße, Dr. O'Neill!", "植物通过[MASK]合作用产生能量 ABC", "HbA1c 7.2% \t naïve"):
            assert same(ours(text), theirs(text))
        assert len(ours) == len(tokens)


class TestSaving:
    def test_transformers_alone_loads_what_is_saved(self, tmp_path, tokenizer, reference):
        tokenizer.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "BertTokenizer"
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert type(loaded) is transformers.BertTokenizer
        assert same(loaded("Paris is the [MASK]"), reference("Paris is the [MASK]"))

    def test_the_saved_files_equal_those_of_transformers(self, tmp_path, tokenizer, reference):
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        tokenizer.save_pretrained(ours)
        reference.save_pretrained(theirs)
        assert {f.name: f.read_text() for f in ours.iterdir()} == {f.name: f.read_text() for f in theirs.iterdir()}

    def test_a_cased_detection_survives_saving(self, tmp_path):
        load_tokenizer(vocabulary_folder(tmp_path / "a", SPECIAL + CASED_WORDS)).save_pretrained(tmp_path / "b")
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b").tokenize("Paris") == ["Paris"]


class TestAutoTokenizer:
    @pytest.mark.parametrize("declared", [None, "BertTokenizer", "BertTokenizerFast"])
    def test_ours_for_the_family(self, tmp_path, declared):
        vocabulary_folder(tmp_path, SPECIAL + WORDS, **({"tokenizer_class": declared} if declared else {}))
        (tmp_path / "config.json").write_text('{"model_type": "megatron-bert"}')
        assert type(AutoTokenizer.from_pretrained(tmp_path)) is MegatronBertTokenizer
        assert type(AutoTokenizer.from_pretrained(str(tmp_path), use_fast=True)) is MegatronBertTokenizer

    def test_ours_for_a_bert_tokenizer_without_a_model(self, tmp_path):
        vocabulary_folder(tmp_path, SPECIAL + WORDS, tokenizer_class="BertTokenizer")
        assert type(AutoTokenizer.from_pretrained(tmp_path)) is MegatronBertTokenizer

    def test_ours_for_a_configuration_that_is_passed(self, tmp_path):
        vocabulary_folder(tmp_path, SPECIAL + WORDS)
        config = transformers.MegatronBertConfig()
        assert type(AutoTokenizer.from_pretrained(tmp_path, config=config)) is MegatronBertTokenizer

    def test_weights_without_a_vocabulary_beside_them(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "megatron-bert"}')
        for load in (AutoTokenizer.from_pretrained, MegatronBertTokenizer.from_pretrained):
            with pytest.raises(OSError, match=r"has no tokenizer: neither vocab\.txt nor tokenizer\.json"):
                load(tmp_path)

    def test_another_model_gets_what_transformers_gives(self, tmp_path):
        vocabulary_folder(tmp_path, SPECIAL + WORDS, tokenizer_class="BertTokenizer")
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        assert type(AutoTokenizer.from_pretrained(tmp_path)) is transformers.BertTokenizer

    def test_a_tokenizer_json_of_no_bert_class_is_taken_as_it_stands(self, tmp_path):
        Tokenizer(WordLevel({"[UNK]": 0, "[MASK]": 1, "Paris": 2}, unk_token="[UNK]")).save(
            str(tmp_path / "tokenizer.json")
        )
        specials = {"mask_token": "[MASK]", "unk_token": "[UNK]"}
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **specials})
        )
        (tmp_path / "config.json").write_text('{"model_type": "megatron-bert"}')
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert type(tokenizer) is MegatronBertTokenizersBackend
        assert tokenizer("<mask>")["input_ids"] == [1]
        assert tokenizer("Paris")["input_ids"] == [2]

    def test_a_folder_never_asks_the_network(self, tmp_path, monkeypatch):
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the network was asked")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        vocabulary_folder(tmp_path, SPECIAL + WORDS)
        (tmp_path / "config.json").write_text('{"model_type": "megatron-bert"}')
        assert AutoTokenizer.from_pretrained(tmp_path)("<mask>")["input_ids"] == [2, 4, 3]
        assert load_tokenizer(tmp_path)("<mask>")["input_ids"] == [2, 4, 3]

    def test_a_model_of_the_hub_is_read_from_its_cache(self, tmp_path, monkeypatch):
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "models--someone--model"
        snapshot = vocabulary_folder(repository / "snapshots" / commit, SPECIAL + WORDS)
        (snapshot / "config.json").write_text('{"model_type": "megatron-bert"}')
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        tokenizer = AutoTokenizer.from_pretrained("someone/model", cache_dir=tmp_path, local_files_only=True)
        assert type(tokenizer) is MegatronBertTokenizer
        assert tokenizer("<mask>")["input_ids"] == [2, 4, 3]


class TestLoadTokenizer:
    def test_files_are_taken_too(self, tmp_path, tokenizer):
        vocabulary_folder(tmp_path, SPECIAL + WORDS)
        assert load_tokenizer(tmp_path / "vocab.txt")("<mask>")["input_ids"] == [2, 4, 3]
        tokenizer.save_pretrained(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved" / "tokenizer.json")("<mask>")["input_ids"] == [2, 4, 3]

    def test_the_hub_is_asked_once_where_it_does_not_answer(self, tmp_path, monkeypatch):
        asked = []

        def unanswered(address: str, **_: object) -> None:
            asked.append(address)
            raise ConnectionError("Name or service not known")

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the library was asked")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(tokenization, "get_hf_file_metadata", unanswered)
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
        with pytest.raises(UserError, match=r"^tokenizr: no such file or folder here, and no model of that name to be"):
            load_tokenizer("tokenizr")
        assert len(asked) == 1

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(UserError, match="nowhere: no such file or folder"):
            load_tokenizer(tmp_path / "nowhere")

    def test_a_folder_without_a_tokenizer(self, tmp_path):
        with pytest.raises(UserError, match=r"has no tokenizer: neither vocab\.txt nor tokenizer\.json"):
            load_tokenizer(tmp_path)

    def test_a_vocabulary_that_is_not_berts(self, tmp_path):
        vocabulary_folder(tmp_path, ["<s>", "</s>", "<unk>", "word"])
        with pytest.raises(UserError, match=r"lacks .*\[CLS\].*not a BERT vocabulary"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [("tokenizer.json", b"{"), ("tokenizer_config.json", b"not json"), ("vocab.txt", b"\xff\xfe\x00")],
    )
    def test_a_damaged_file(self, tmp_path, name, content):
        vocabulary_folder(tmp_path, SPECIAL + WORDS)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot read the tokenizer of"):
            load_tokenizer(tmp_path)

    def test_another_models_tokenizer(self, tmp_path, tokenizer):
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(UserError, match="not a BERT tokenizer of this model family"):
            load_tokenizer(tmp_path)
