"""Fills the masks of texts: words in, words out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_bert.checkpoint.folder import check_vocabulary
from megatron_bert.checkpoint.load import check_model, load_model
from megatron_bert.checkpoint.shards import load_tensor_parallel
from megatron_bert.data.tokenization import MASK_SPELLING, MegatronBertTokenizer, load_tokenizer, num_rows
from megatron_bert.errors import UserError
from megatron_bert.inference.device import choose_device, choose_dtype
from megatron_bert.inference.fusion import fuse_projections
from megatron_bert.inference.lines import Text, texts_of_arguments
from megatron_bert.inference.predictor import Candidates, MaskPredictor
from megatron_bert.inference.texts import MaskedText
from megatron_bert.model import MegatronBertForMaskedLM
from megatron_bert.parallel.launch import agreed, local_device
from megatron_bert.parallel.mesh import ParallelMesh
from megatron_bert.parallel.region import TensorRegion

_REQUIRED = ("cls.predictions.transform.",)  # weights without which no mask can be filled


@dataclass(frozen=True)
class Prediction:
    """One candidate for one mask; the fields are those of Transformers' fill-mask pipeline."""

    token_str: str
    token: int  # its number in the vocabulary
    score: float  # probability among the tokenizer's tokens
    sequence: str  # the text with it filled in; with several masks, the others and the special tokens are kept


@dataclass(frozen=True)
class Filled:
    """A text, and for each of its masks the candidates, the most probable first."""

    text: str
    predictions: list[list[Prediction]]


class MaskedTextEncoder:
    """Turns texts into token numbers, and refuses those that a model of ``max_tokens`` positions cannot fill.

    ``truncate`` cuts texts that are too long; they are refused otherwise.
    """

    def __init__(self, tokenizer: MegatronBertTokenizer, max_tokens: int, *, truncate: bool = False) -> None:
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token")
        self.tokenizer, self.max_tokens, self.truncate = tokenizer, max_tokens, truncate
        self.num_tokens = num_rows(tokenizer)
        self.mask_id, self.pad_id = tokenizer.mask_token_id, tokenizer.pad_token_id  # slow to ask for each time

    def encode(self, texts: Sequence[Text]) -> list[MaskedText]:
        """The texts in numbers. Raises ``UserError`` for one without a mask or with too many tokens, by its name."""
        if not texts:
            return []
        cut = {"truncation": True, "max_length": self.max_tokens} if self.truncate else {}
        all_ids = self.tokenizer(
            [text for text, _ in texts], return_attention_mask=False, return_token_type_ids=False, verbose=False, **cut
        )["input_ids"]
        return [self._checked(ids, where) for (_, where), ids in zip(texts, all_ids, strict=True)]

    def check(self, chunks: Iterable[Sequence[Text]]) -> int:
        """How many texts there are. Raises ``UserError`` as ``encode`` does."""
        return sum(len(self.encode(chunk)) for chunk in chunks)

    def _checked(self, ids: list[int], where: str) -> MaskedText:
        if len(ids) > self.max_tokens:
            raise UserError(f"{where}: {len(ids)} tokens, and the model takes {self.max_tokens}; --truncate cuts it")
        positions = [position for position, token in enumerate(ids) if token == self.mask_id]
        if not positions:
            within = f" within its first {self.max_tokens} tokens" if self.truncate else ""
            spellings = " or ".join(dict.fromkeys((str(self.tokenizer.mask_token), MASK_SPELLING)))
            raise UserError(f"{where}: no mask{within}; write {spellings} in it")
        return MaskedText(ids, positions)


class MaskFiller:
    """A masked language model that predicts ``top_k`` candidates a mask, in batches of at most ``batch_tokens`` tokens
    (padding included, one text at least; default: as the device likes it).

    Each mask is predicted with the text's other masks masked. The vocabulary's padding rows (beyond the tokenizer)
    take no part: they are never predicted and have no share in the probabilities.

    ``region``: the ranks over which the model is spread. All of them are given the same texts, and give the same
    answers.
    """

    def __init__(
        self,
        model: MegatronBertForMaskedLM,
        encoder: MaskedTextEncoder,
        *,
        top_k: int = 5,
        batch_tokens: int | None = None,
        region: TensorRegion | None = None,
    ) -> None:
        check_top_k(top_k, encoder)
        self.model, self.encoder, self.tokenizer = model, encoder, encoder.tokenizer
        self.predictor = MaskPredictor(
            model,
            num_tokens=encoder.num_tokens,
            pad_id=encoder.pad_id or 0,
            top_k=top_k,
            batch_tokens=batch_tokens,
            region=region,
        )
        self.batch_tokens = self.predictor.batch_tokens
        self._token_strs: dict[int, str] = {}

    def fill(self, texts: Iterable[str]) -> list[Filled]:
        """The texts (a string is one) with their predictions, in order.

        Raises ``UserError`` as ``stream`` does, and ``TypeError`` for what is no text.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise TypeError(f"a text is a str, not {type(wrong[0]).__name__}")
        return list(self.stream([texts_of_arguments(texts)]))

    def stream(
        self, chunks: Iterable[Sequence[Text]], predicted: Callable[[int], object] = lambda num_texts: None
    ) -> Iterator[Filled]:
        """The texts with their predictions, in order; those of a chunk are batched by length.

        ``predicted`` is called after each batch with the number of texts in it.

        Raises ``UserError`` for a text without a mask or too long for the model, before its chunk is predicted, and
        for scores that are not numbers.
        """
        for chunk in chunks:
            encoded = self.encoder.encode(chunk)
            answers: dict[int, list[list[Prediction]]] = {}
            for indices, candidates in self.predictor.predict(encoded):
                for index, found in zip(indices, candidates, strict=True):
                    answers[index] = self.named(encoded[index], found)
                predicted(len(indices))
            for index, text in enumerate(chunk):
                yield Filled(text.text, answers[index])

    def named(self, text: MaskedText, found: Candidates, top_k: int | None = None) -> list[list[Prediction]]:
        """What ``predictor`` found for a text, in words; of ``top_k`` candidates (default: all) for each mask."""
        by_mask = zip(text.mask_positions, found.scores, found.tokens, strict=True)
        return [self._name(text, position, scores[:top_k], tokens[:top_k]) for position, scores, tokens in by_mask]

    def _name(self, text: MaskedText, position: int, scores: list[float], tokens: list[int]) -> list[Prediction]:
        """The candidates for one mask in words, as Transformers' pipeline puts them."""
        only_mask = len(text.mask_positions) == 1
        predictions = []
        for score, token in zip(scores, tokens, strict=True):
            if token not in self._token_strs:
                self._token_strs[token] = str(self.tokenizer.decode([token]))
            filled = [*text.ids[:position], token, *text.ids[position + 1 :]]
            filled = [number for number in filled if number != self.encoder.pad_id]
            sequence = str(self.tokenizer.decode(filled, skip_special_tokens=only_mask))
            predictions.append(Prediction(self._token_strs[token], token, score, sequence))
        return predictions


def load_encoder(path_or_name: str | os.PathLike[str], *, truncate: bool = False) -> MaskedTextEncoder:
    """The tokenizer of the model in a folder or on the hub, for as many tokens as the model takes.

    Raises ``UserError`` for what is wrong with the configuration, the tokenizer, or the one for the other.
    """
    config = check_model(path_or_name)
    encoder = MaskedTextEncoder(load_tokenizer(path_or_name), config.max_position_embeddings, truncate=truncate)
    check_vocabulary(config, encoder.num_tokens, os.fspath(path_or_name))
    return encoder


def load_mask_filler(
    path_or_name: str | os.PathLike[str],
    encoder: MaskedTextEncoder | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    top_k: int = 5,
    batch_tokens: int | None = None,
) -> MaskFiller:
    """The model in a folder or on the hub, ready to fill masks; ``encoder`` is its own by default.

    Raises ``UserError`` for whatever is wrong with it, before the weights are read where that can be seen before.
    """
    on = choose_device(device)
    encoder = encoder or load_encoder(path_or_name)
    check_top_k(top_k, encoder)
    model = load_model(MegatronBertForMaskedLM, path_or_name, dtype=choose_dtype(dtype, on), required=_REQUIRED)
    model.to(on)  # type: ignore[arg-type]
    if on.type == "cuda":
        fuse_projections(model)
    return MaskFiller(model, encoder, top_k=top_k, batch_tokens=batch_tokens)


def load_parallel_mask_filler(
    path_or_name: str | os.PathLike[str],
    mesh: ParallelMesh,
    encoder: MaskedTextEncoder | None = None,
    *,
    dtype: str = "auto",
    top_k: int = 5,
    batch_tokens: int | None = None,
) -> MaskFiller:
    """As ``load_mask_filler``, on the tensor-parallel ranks of ``mesh``, all of which have to call it: each reads its
    own part of the weights, and none ever holds the others'.

    Raises ``SharedError`` on every rank, for what ``load_mask_filler`` finds on any, for a model that cannot be split
    over so many, and for ranks that have another model or number type than the first.
    """
    on = local_device(mesh.device_mesh.device_type)
    encoder = encoder or agreed(lambda: load_encoder(path_or_name))
    agreed(lambda: check_top_k(top_k, encoder))
    model = load_tensor_parallel(
        MegatronBertForMaskedLM, path_or_name, mesh, device=on, dtype=choose_dtype(dtype, on), required=_REQUIRED
    )
    return MaskFiller(model, encoder, top_k=top_k, batch_tokens=batch_tokens, region=mesh.region)


def check_top_k(top_k: int, encoder: MaskedTextEncoder) -> None:
    """Raises ``UserError`` where the vocabulary does not have ``top_k`` tokens."""
    if not 1 <= top_k <= encoder.num_tokens:
        raise UserError(f"top-k {top_k} is not between 1 and the vocabulary's {encoder.num_tokens} tokens")
