"""WordPiece vocabularies: trained from text files, written as a folder that Transformers' `AutoTokenizer` reads."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from megatron_bert.data.files import written_aside
from megatron_bert.data.text import read_texts
from megatron_bert.errors import UserError

__all__ = ["SPECIAL_TOKENS", "VocabularyOptions", "fingerprint", "train_vocabulary", "write_tokenizer"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are 0 to 4
_CONTINUATION = "##"
_REPEATS = 1000
# Case, accents, Chinese characters, full-width letters, punctuation, a control character and odd white space.
_PROBE = "ÀÉß Straße\tnaïve中文字ＡＢ it's 3.14_x-y!\x01\u200b\u00a0end"


class VocabularyOptions(BaseModel):
    """What a vocabulary is like. The defaults are those of BERT's English uncased vocabulary, but for the size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(29056, gt=len(SPECIAL_TOKENS))  # entries, special tokens included
    cased: bool = False  # keep upper case and accents
    split_chinese: bool = True  # each Chinese character is a word of its own
    min_frequency: int = Field(2, ge=1)  # occurrences below which a piece is not made
    alphabet_limit: int | None = None  # single characters kept, the most frequent first; default: half the size


def train_vocabulary(
    files: Iterable[Path], options: VocabularyOptions, json_key: str = "text", *, progress: bool = False
) -> Tokenizer:
    """A WordPiece tokenizer trained on the documents of `files`, which are streamed: memory grows with the number of
    different words, not with the text. The same text and options give the same vocabulary.

    Left alone, the trainer numbers its characters in the order of a randomly seeded hash map, and its choice between
    equally frequent pairs follows these numbers. So it only counts words at first; then it gets the characters in a
    fixed order, and the counted words again.

    Returns:
        a tokenizer with `SPECIAL_TOKENS` at ids 0 to 4, which frames texts as [CLS] A [SEP] and [CLS] A [SEP] B [SEP].

    Raises:
        UserError: the files hold no text, or the single characters alone need more entries than `options.size`.
    """
    tokenizer = _empty(options)
    lines = tqdm(_lines(files, json_key), unit=" lines", unit_scale=True, disable=None if progress else True, delay=2)
    words = _count_words(tokenizer, lines)
    if not words:
        raise UserError("the --input files hold no text to train a vocabulary on")
    alphabet = _alphabet(words, options.alphabet_limit or max(options.size // 2, 1))
    first = [*SPECIAL_TOKENS, *alphabet]
    if len(first) > options.size:
        raise UserError(
            f"a vocabulary of {options.size:,} entries has no room for the {len(first):,} special tokens and single "
            f"characters of this text; raise --vocab-size or lower --alphabet-limit"
        )
    trainer = _trainer(
        options.size, first, min_frequency=options.min_frequency, show_progress=progress and sys.stderr.isatty()
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(_repeated(words), trainer=trainer)
    return _empty(options, tokenizer.get_vocab())


def write_tokenizer(tokenizer: Tokenizer, options: VocabularyOptions, folder: Path, *, overwrite: bool = False) -> None:
    """Writes vocab.txt, tokenizer.json and tokenizer_config.json to a new `folder`, whole or not at all.

    Raises:
        UserError: `folder` is there already and `overwrite` is not given, or it is not a tokenizer's.
    """
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} is already there; choose another --output or add --overwrite")
    if folder.exists() and not (folder / "vocab.txt").is_file():
        raise UserError(f"{folder} is not a tokenizer's folder, so it is not overwritten; choose another --output")
    vocabulary = tokenizer.get_vocab()
    with written_aside(folder, folder=True) as aside:
        lines = sorted(vocabulary, key=vocabulary.__getitem__)
        (aside / "vocab.txt").write_text("".join(f"{token}\n" for token in lines), encoding="utf-8")
        (aside / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        settings = json.dumps(_transformers_settings(options), indent=2, ensure_ascii=False)
        (aside / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")


def fingerprint(tokenizer: Tokenizer) -> str:
    """A SHA-256 (hexadecimal) over what decides which ids a text becomes: the entries with their ids, and how a probe
    text is normalised and cut into words. It holds across versions of `tokenizers`, whose files may spell one
    behaviour differently.
    """
    normalized = tokenizer.normalizer.normalize_str(_PROBE) if tokenizer.normalizer else _PROBE
    words = tokenizer.pre_tokenizer.pre_tokenize_str(normalized) if tokenizer.pre_tokenizer else [normalized]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(json.dumps([vocabulary, words], ensure_ascii=False).encode()).hexdigest()


def _lines(files: Iterable[Path], json_key: str) -> Iterator[str]:
    for text, _ in read_texts(files, json_key):
        yield from text.splitlines()


def _empty(options: VocabularyOptions, vocabulary: dict[str, int] | None = None) -> Tokenizer:
    """BERT's tokenizer with this vocabulary, or with none yet."""
    tokenizer = Tokenizer(
        models.WordPiece(vocabulary or {}, unk_token="[UNK]", continuing_subword_prefix=_CONTINUATION)
    )
    if vocabulary:
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=options.split_chinese,
        strip_accents=None,  # as Transformers writes it: accents go when letters are lower-cased
        lowercase=not options.cased,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUATION)
    tokenizer.post_processor = _framing()
    return tokenizer


def _trainer(size: int, first_entries: list[str], **settings: Any) -> trainers.WordPieceTrainer:
    # It keeps to the order of its "special tokens", so the characters travel as such; limit_alphabet keeps it from
    # adding any of its own.
    return trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=first_entries,
        limit_alphabet=0,
        continuing_subword_prefix=_CONTINUATION,
        **settings,
    )


def _count_words(tokenizer: Tokenizer, lines: Iterable[str]) -> dict[str, int]:
    """How often each word occurs after normalisation: counted by the trainer, read from its state."""
    counter = _trainer(0, [], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer=counter)
    words: dict[str, int] = json.loads(counter.__getstate__())["WordPieceTrainer"]["bpe_trainer"]["words"]
    return words


def _alphabet(words: Mapping[str, int], limit: int) -> list[str]:
    """The `limit` most frequent characters, then their forms inside a word ("##a") where they occur there."""
    count: Counter[str] = Counter()
    inside: set[str] = set()
    for word, times in words.items():
        for character in word:
            count[character] += times
        inside.update(word[1:])
    kept = sorted(sorted(count), key=count.__getitem__, reverse=True)[:limit]
    return [*sorted(kept), *(_CONTINUATION + character for character in sorted(inside.intersection(kept)))]


def _repeated(words: Mapping[str, int]) -> Iterator[str]:
    """Each word as often as it was counted."""
    for word, times in words.items():
        for _ in range(times // _REPEATS):
            yield f"{word} " * _REPEATS
        yield f"{word} " * (times % _REPEATS)


def _framing() -> processors.TemplateProcessing:
    cls, sep = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
    return processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )


def _transformers_settings(options: VocabularyOptions) -> dict[str, Any]:
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": not options.cased,
        "tokenize_chinese_chars": options.split_chinese,
        "strip_accents": None,
        **dict(zip(names, SPECIAL_TOKENS, strict=True)),
    }
