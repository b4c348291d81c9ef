"""WordPiece vocabularies: trained from text files, written as a folder that Transformers' `AutoTokenizer` reads."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_bert.data.encoding import piece_splitter
from megatron_bert.data.files import written_aside
from megatron_bert.data.progress import InputProgress
from megatron_bert.data.reading import Block, Span, read_blocks
from megatron_bert.data.text import parse_block
from megatron_bert.data.workers import ordered_map
from megatron_bert.errors import UserError

__all__ = ["SPECIAL_TOKENS", "VocabularyOptions", "WordCounter", "check_output", "fingerprint", "train_vocabulary",
           "write_tokenizer"]  # fmt: skip

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are 0 to 4
_TOKENIZER_FILES = {
    "vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
}  # fmt: skip
_CONTINUATION = "##"
_REPEATS = 1000
_FED_WORDS = 1 << 27  # given to the library's trainer; of more text, all counts are divided
_MOST_WORDS = 5_000_000  # different ones that are counted, some 150 bytes each
_KEPT_PIECES = 300_000
_LONGEST_WORD = 100  # characters; of more, WordPiece makes one [UNK] (max_input_chars_per_word)
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
    files: Sequence[Path],
    options: VocabularyOptions,
    json_key: str = "text",
    *,
    num_workers: int = 0,
    skip_bad: bool = False,
    progress: bool = False,
) -> Tokenizer:
    """A WordPiece tokenizer trained on the documents of `files`, which are streamed: memory grows with the number of
    different words up to some millions, then no more (the rarest are forgotten). The same text and options give the
    same vocabulary, whatever `num_workers` (processes that count words; 0: this one).

    Left alone, the library's trainer numbers its characters in the order of a randomly seeded hash map, and its choice
    between equally frequent pairs follows these numbers; and it normalises each word as often as it occurs. So words
    are counted here, and the trainer gets the characters in a fixed order, then the counted words.

    Returns:
        a tokenizer with `SPECIAL_TOKENS` at ids 0 to 4, which frames texts as [CLS] A [SEP] and [CLS] A [SEP] B [SEP].

    Raises:
        UserError: the files hold no text, or the single characters alone need more entries than `options.size`.
    """
    tokenizer = _empty(options)
    counter = partial(WordCounter, tokenizer, json_key, skip_bad=skip_bad)
    words = _count_words(counter, files, json_key, num_workers, progress=progress)
    if not words:
        raise UserError("the --input files hold no text to train a vocabulary on")
    alphabet = _alphabet(words, options.alphabet_limit or max(options.size // 2, 1))
    first = [*SPECIAL_TOKENS, *alphabet]
    if len(first) > options.size:
        raise UserError(
            f"a vocabulary of {options.size:,} entries has no room for the {len(first):,} special tokens and single "
            f"characters of this text; raise --vocab-size or lower --alphabet-limit"
        )
    scale = max(sum(words.values()) / _FED_WORDS, 1)
    tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=options.size,
        # It keeps to the order of its "special tokens", so the characters travel as such; limit_alphabet keeps it from
        # adding any of its own.
        special_tokens=first,
        limit_alphabet=0,
        min_frequency=max(round(options.min_frequency / scale), 1),
        continuing_subword_prefix=_CONTINUATION,
        show_progress=progress and sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_repeated(words, scale), trainer=trainer)
    return _empty(options, tokenizer.get_vocab())


class WordCounter:
    """Counts the words of a block of text, after normalisation, as `tokenizer` would cut it into words.

    Args:
        tokenizer: BERT's, with or without a vocabulary.
        json_key, skip_bad: see `parse_block`.
    """

    def __init__(self, tokenizer: Tokenizer, json_key: str, *, skip_bad: bool = False) -> None:
        split = piece_splitter(tokenizer)
        assert split is not None
        self._split = split
        self._words = _WordsOfPieces(tokenizer)
        self._json_key = json_key
        self._skip_bad = skip_bad

    def __call__(self, block: Block) -> tuple[Path, int, dict[str, int]]:
        """The block's file, how much of it is read (bytes), and how often each word occurs."""
        pieces: Counter[str] = Counter()
        for text in parse_block(block, self._json_key, skip_bad=self._skip_bad).texts:
            for line in text.split("\n"):
                pieces.update(self._split(line))
        words: Counter[str] = Counter()
        for piece, times in pieces.items():
            for word in self._words[piece]:
                words[word] += times
        if len(self._words) > _KEPT_PIECES:
            self._words.clear()
        return block.file, block.consumed_bytes, dict(words)


class _WordsOfPieces(dict[str, tuple[str, ...]]):
    """The words in a piece of text, found when it is looked up first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, piece: str) -> tuple[str, ...]:
        normalized = self._tokenizer.normalizer.normalize_str(piece)
        words = tuple(word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(normalized))
        self[piece] = words
        return words


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raises `UserError` where `folder` is there already, unless `overwrite` and it holds a tokenizer alone."""
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} is already there; choose another --output or add --overwrite")
    if folder.exists() and not (folder / "vocab.txt").is_file():
        raise UserError(f"{folder} is not a tokenizer's folder, so it is not overwritten; choose another --output")
    if folder.exists() and (others := sorted({file.name for file in folder.iterdir()} - _TOKENIZER_FILES)):
        raise UserError(f"{folder} holds more than a tokenizer ({others[0]}), so it is not overwritten; choose another "
                        f"--output")  # fmt: skip


def write_tokenizer(tokenizer: Tokenizer, options: VocabularyOptions, folder: Path, *, overwrite: bool = False) -> None:
    """Writes vocab.txt, tokenizer.json and tokenizer_config.json to a new `folder`, whole or not at all.

    Raises:
        UserError: see `check_output`.
    """
    check_output(folder, overwrite=overwrite)
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


def _count_words(
    counter: Callable[[], WordCounter], files: Sequence[Path], json_key: str, num_workers: int, *, progress: bool
) -> Counter[str]:
    spans = [Span(file) for file in files]
    blocks = (block for span in spans for block in read_blocks(span, json_key))
    words: Counter[str] = Counter()
    least = 1
    with InputProgress(spans, show=progress) as shown, closing(ordered_map(counter, blocks, num_workers)) as counted:
        for file, consumed_bytes, of_block in counted:
            words.update(of_block)
            while len(words) > _MOST_WORDS:
                least += 1
                words = Counter({word: times for word, times in words.items() if times >= least})
            shown.update(file, consumed_bytes, words=sum(of_block.values()))
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


def _repeated(words: Mapping[str, int], scale: float) -> Iterator[str]:
    """Each word as often as it was counted, divided by `scale`; those that WordPiece never looks into are left out
    (and the trainer takes time in the square of a word).
    """
    for word, counted in words.items():
        if len(word) > _LONGEST_WORD:
            continue
        times = round(counted / scale)
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
