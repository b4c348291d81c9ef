"""The tokenizer of the model family: BERT's WordPiece, with both spellings of the mask and no silent lower-casing.

Published ``megatron-bert`` checkpoints come with a BERT vocabulary, and some with nothing else: no ``tokenizer.json``,
no ``tokenizer_config.json``. Transformers then lower-cases every text, whatever the vocabulary; here the files are
asked first.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import transformers
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import BatchEncoding, BertTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, TokenizersBackend
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from megatron_bert.errors import UserError

logger = logging.getLogger(__name__)

MODEL_TYPE = "megatron-bert"
MASK_SPELLING = "<mask>"  # how RoBERTa and model cards write it; BERT's own is [MASK]
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


class _MaskSpelling(TokenizersBackend):
    """Takes ``<mask>`` in a text for the mask token, unless the vocabulary has a token of that name."""

    saved_as: str  # the class of Transformers that saved files name, so that Transformers alone loads them

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **options: Any) -> BatchEncoding[Any]:
        """Every way to encode a text ends here: calls, pairs, batches, pretokenized words, ``encode``, ``tokenize``.

        Offsets refer to the text after the replacement. They are those of the given text too where the mask token is
        as long as ``<mask>``, and ``[MASK]`` is.
        """
        split_specials = options.get("split_special_tokens")
        if not (self.split_special_tokens if split_specials is None else split_specials):
            text, text_pair = self.spell_mask(text), self.spell_mask(text_pair)
        return super()._encode_plus(text, text_pair, *args, **options)

    def spell_mask(self, text: Any) -> Any:
        """``text``, or the texts in nested lists and tuples, with ``<mask>`` written as the mask token."""
        if self.mask_token is None or self.backend_tokenizer.token_to_id(MASK_SPELLING) is not None:
            return text
        return _replace(text, MASK_SPELLING, str(self.mask_token))

    def _save_pretrained(self, save_directory: Any, file_names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        config_file = Path(file_names[0])  # written just before, naming the class of ``self``
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config["tokenizer_class"] = self.saved_as
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        config_file.write_text(text, encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)


class MegatronBertTokenizer(_MaskSpelling, BertTokenizer):
    """Transformers' ``BertTokenizer``, which also takes ``<mask>`` and asks the files whether to lower-case.

    ``from_pretrained`` decides about lower-casing by the first of these that says something: the ``do_lower_case``
    passed by the caller, that of ``tokenizer_config.json``, the normalizer in ``tokenizer.json``, the vocabulary
    (``is_cased``; said in one log line where it is cased). It saves itself as ``BertTokenizer``.
    """

    saved_as = "BertTokenizer"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Present so that Transformers treats this class as it does BertTokenizer, which has an __init__ of its own: it
        # then builds the normalizer from do_lower_case and its like and takes the vocabulary alone from tokenizer.json.
        super().__init__(*args, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The constructor's arguments from the files' (Transformers calls it), with the casing settled.

        Raises ``OSError`` where there is no vocabulary: Transformers would make every word an unknown one.
        """
        files = (kwargs.get("tokenizer_file"), kwargs.get("vocab_file"))
        if "vocab" not in kwargs and not any(file is not None and os.path.isfile(file) for file in files):
            where = kwargs.get("name_or_path")
            raise OSError(f"{where} has no tokenizer: neither vocab.txt nor tokenizer.json is there")
        if kwargs.get("do_lower_case") is None:
            kwargs.update(_normalization(kwargs))
        convert: Callable[..., dict[str, Any]] = super().convert_to_native_format
        return convert(trust_remote_code=trust_remote_code, **kwargs)


class MegatronBertTokenizersBackend(_MaskSpelling):
    """A ``tokenizer.json`` taken as it stands, for folders that name no BERT class; it also takes ``<mask>``."""

    saved_as = "TokenizersBackend"


class AutoTokenizer(transformers.AutoTokenizer):
    """Transformers' ``AutoTokenizer``, which gives a ``MegatronBertTokenizer`` to the models of this family."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *inputs: Any, **kwargs: Any) -> Any:
        """The tokenizer of a folder or a model of the hub.

        A ``MegatronBertTokenizer`` where the configuration says ``megatron-bert``, or where there is none and the
        tokenizer's own says BERT; where it names another kind of tokenizer, and for every other model, what
        Transformers gives. Takes what Transformers' takes and raises what it raises. A folder never asks the network.
        """
        if os.path.isdir(pretrained_model_name_or_path):
            kwargs["local_files_only"] = True
        family = _family_class(pretrained_model_name_or_path, kwargs)
        if family is None:
            return super().from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)
        for used in ("config", "use_fast", "trust_remote_code", "code_revision"):
            kwargs.pop(used, None)
        return family.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)


def load_tokenizer(path_or_name: str | os.PathLike[str]) -> MegatronBertTokenizer:
    """The tokenizer in a folder, of a ``vocab.txt`` or ``tokenizer.json``, or of a model of the hub.

    Raises ``UserError`` where there is none, where its files cannot be read, or where the vocabulary lacks a token
    that BERT needs (Transformers would append it, with a number that the model has no row for).
    """
    where = os.fspath(path_or_name)
    source = local_path(where)
    has_json = source is None or source.name == "tokenizer.json" or (source / "tokenizer.json").is_file()
    if source is not None and source.is_dir() and not has_json and not (source / "vocab.txt").is_file():
        raise UserError(f"{where} has no tokenizer: neither vocab.txt nor tokenizer.json is in it")
    try:
        tokenizer = _load(source, where)
    except Exception as error:  # the readers of these formats raise anything, bare Exception included
        raise UserError(f"cannot read the tokenizer of {where}: {type(error).__name__}: {error}") from error
    if not isinstance(tokenizer, _MaskSpelling):
        raise UserError(f"{where} has a {type(tokenizer).__name__}, which is not a BERT tokenizer of this model family")
    if not has_json:
        _check_special_tokens(tokenizer, where)
    return tokenizer  # type: ignore[return-value]


def num_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of embeddings that a vocabulary needs: more than it has entries where its numbers have gaps, as those of a
    vocab.txt with a line twice do.
    """
    return max(tokenizer.get_vocab().values()) + 1


def lower_cases(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it makes small letters of a text's capital ones."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("A") == "a"


def local_path(path_or_name: str | os.PathLike[str]) -> Path | None:
    """The folder or file called ``path_or_name``, or None where there is none but the hub has a model of the name.

    Raises ``UserError`` where it is neither, or where the hub cannot be asked and nothing of the model was fetched yet.
    """
    name = os.fspath(path_or_name)
    if os.path.exists(name):
        return Path(name)
    if os.path.isdir(os.path.dirname(name)):  # runs/dmo beside runs/demo is a typing mistake, not for the hub
        raise UserError(f"{name}: no such file or folder")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name}: no such file or folder, and not the name of a hub model") from error
    _ask_hub(name)
    return None


def _ask_hub(name: str) -> None:
    """One question, so that a typing mistake is told at once: the library asks for each file, six times without an
    answer, for two minutes in all.
    """
    files = ("config.json", "tokenizer_config.json", "tokenizer.json", "vocab.txt")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, files[0]))
    except Exception as error:  # of whichever library carries the question
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError):
            return  # there is such a model, without this file; or the hub is busy, and asking again helps
        raise UserError(
            f"{name}: no such file or folder here, and no model of that name to be had from the hub: {error}"
        ) from error


def is_cased(tokens: Iterable[str]) -> bool:
    """Whether a vocabulary was made from text with capital letters.

    An uncased one has none, apart from tokens in brackets ([CLS], <S>) and a few strays that its tokenizer never
    reaches. So it takes half of A to Z as tokens of their own, or capitals in one percent of the tokens that have
    letters. (bert-large-cased has 29 %; bert-base-uncased and bert-base-chinese none.)
    """
    plain = [token for token in tokens if not (token[:1] in "[<" and token[-1:] in "]>")]
    num_letters = sum(token.lower() != token.upper() for token in plain)
    num_capitals = sum(token.lower() != token for token in plain)
    num_alphabet = len(set(plain) & set(ascii_uppercase))
    return num_alphabet * 2 >= len(ascii_uppercase) or num_capitals * 100 >= max(num_letters, 1)


def _replace(text: Any, old: str, new: str) -> Any:
    if isinstance(text, str):
        return text.replace(old, new)
    if isinstance(text, list | tuple):
        parts = [_replace(part, old, new) for part in text]
        return tuple(parts) if isinstance(text, tuple) else parts
    return text  # None, or something that the tokenizer will refuse in its own words


def _normalization(files: dict[str, Any]) -> dict[str, Any]:
    """The normalizer's arguments that ``tokenizer.json``, else ``vocab.txt``, asks for; empty without either."""
    json_file, vocabulary_file = files.get("tokenizer_file"), files.get("vocab_file")
    if json_file is not None and os.path.isfile(json_file):
        with open(json_file, encoding="utf-8") as lines:
            normalizer = json.load(lines).get("normalizer") or {}
        asked = {"do_lower_case": _lower_cases(normalizer)}
        names = {"strip_accents": "strip_accents", "handle_chinese_chars": "tokenize_chinese_chars"}
        return asked | {ours: normalizer[theirs] for theirs, ours in names.items() if theirs in normalizer}
    if vocabulary_file is not None and os.path.isfile(vocabulary_file):
        with open(vocabulary_file, encoding="utf-8") as lines:
            if is_cased(line.rstrip("\n") for line in lines):
                logger.warning(
                    "%s has tokens with capital letters and no tokenizer configuration beside it says otherwise: "
                    "texts are not lower-cased (do_lower_case=true in tokenizer_config.json would)", vocabulary_file
                )  # fmt: skip
                return {"do_lower_case": False}
        return {"do_lower_case": True}
    return {}


def _lower_cases(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer as ``tokenizer.json`` spells it, or one in its sequence, lower-cases."""
    parts = normalizer.get("normalizers", [normalizer])
    return any(part.get("type") == "Lowercase" or bool(part.get("lowercase")) for part in parts)


def _family_class(name: str | os.PathLike[str], options: dict[str, Any]) -> type[_MaskSpelling] | None:
    """The class of ours for the tokenizer called ``name``, or None where it is for Transformers to decide."""
    if os.path.isfile(name) or options.get("tokenizer_type") or options.get("gguf_file"):
        return None
    hub = {option: options[option] for option in HUB_OPTIONS if option in options}
    config = options.get("config")
    if config is not None:
        model_type, declared = config.model_type, getattr(config, "tokenizer_class", None)
    else:
        try:
            found, _ = PreTrainedConfig.get_config_dict(name, **hub)
        except OSError:  # no config.json
            found = {}
        model_type, declared = found.get("model_type"), found.get("tokenizer_class")
    if model_type not in (MODEL_TYPE, None, ""):
        return None
    tokenizer_config = get_tokenizer_config(name, **hub)
    if "auto_map" in tokenizer_config:  # code of the hub's: Transformers asks whether it is trusted
        return None
    declared = tokenizer_config.get("tokenizer_class") or declared or ("BertTokenizer" if model_type else "")
    return {
        "BertTokenizer": MegatronBertTokenizer,
        "MegatronBertTokenizer": MegatronBertTokenizer,
        "PreTrainedTokenizer": MegatronBertTokenizersBackend if model_type else None,
        "TokenizersBackend": MegatronBertTokenizersBackend if model_type else None,
    }.get(declared.removesuffix("Fast"))


def _load(source: Path | None, name: str) -> Any:
    if source is None:
        return AutoTokenizer.from_pretrained(name)
    if source.is_dir() and (source / "config.json").is_file():
        return AutoTokenizer.from_pretrained(source)
    kind = MegatronBertTokenizersBackend if _is_of_another_kind(source) else MegatronBertTokenizer
    return kind.from_pretrained(str(source), local_files_only=True)


def _is_of_another_kind(source: Path) -> bool:
    """Whether a ``tokenizer.json`` is of another model than WordPiece, which would make other tokens of a text."""
    file = source / "tokenizer.json" if source.is_dir() else source
    if file.name != "tokenizer.json" or not file.is_file():
        return False
    model = json.loads(file.read_text(encoding="utf-8")).get("model") or {}
    return str(model.get("type", "WordPiece")) != "WordPiece"


def _check_special_tokens(tokenizer: Any, where: str) -> None:
    appended = [
        token
        for token in tokenizer.special_tokens_map.values()
        if isinstance(token, str) and tokenizer.convert_tokens_to_ids(token) >= tokenizer.vocab_size
    ]
    if appended:
        raise UserError(f"the vocabulary of {where} lacks {', '.join(appended)}: it is not a BERT vocabulary")
