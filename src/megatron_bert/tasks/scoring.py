"""Log-probabilities of given tokens, in batches of similar length; only where tokens are scored is the vocabulary
projected.

T scored tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bert.checkpoint.folder import check_vocabulary
from megatron_bert.checkpoint.load import check_model, load_model
from megatron_bert.data.tokenization import MegatronBertTokenizer, load_tokenizer, num_rows
from megatron_bert.errors import UserError
from megatron_bert.inference.device import choose_device, choose_dtype, scores_are_no_numbers
from megatron_bert.model import MegatronBertForCausalLM, MegatronBertForMaskedLM

__all__ = ["Request", "Score", "TokenScorer", "load_scorer"]

_REQUIRED = ("cls.predictions.transform.",)
_PROJECTED_TOGETHER = 1024  # tokens; bounds the logits to this many rows of the vocabulary


@dataclass(frozen=True)
class Request:
    """What the model reads, and the tokens to score.

    Attributes:
        ids: the row, without padding.
        positions: where in it the model predicts each target: one before it (causal), or its mask (masked).
        targets: the tokens whose log-probability is wanted.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Of one request: the sum of its targets' natural log-probabilities, and each position's most probable token."""

    log_likelihood: float
    best: tuple[int, ...]


class TokenScorer:
    """A language model that scores tokens, in batches of at most `batch_tokens` tokens (one row at least).

    The vocabulary's padding rows (beyond the tokenizer) have no share in the probabilities.

    Attributes:
        causal: whether the model predicts the next token; else it fills masks.
    """

    def __init__(
        self,
        model: MegatronBertForCausalLM | MegatronBertForMaskedLM,
        tokenizer: MegatronBertTokenizer,
        *,
        batch_tokens: int = 8192,
    ) -> None:
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.causal = isinstance(model, MegatronBertForCausalLM)
        self.max_tokens: int = model.config.max_position_embeddings
        self.num_tokens = max(tokenizer.get_vocab().values()) + 1
        self.pad_id = tokenizer.pad_token_id or 0

    def context(self, ids: Sequence[int], targets: Sequence[int]) -> Request:
        """The targets after `ids`: under teacher forcing, after a separator (causal, as rows begin in training), or as
        one mask a target between [CLS] and [SEP] (masked). What does not fit is cut from the left of `ids`.
        """
        cls, sep, mask = (getattr(self.tokenizer, f"{name}_token_id") for name in ("cls", "sep", "mask"))
        room = self.max_tokens - len(targets) - (0 if self.causal else 2)
        if self.causal:
            kept = [sep, *ids[max(len(ids) - room, 0) :]]
            row = [*kept, *targets][:-1]
            return Request(tuple(row), tuple(range(len(kept) - 1, len(row))), tuple(targets))
        kept = [cls, *ids[max(len(ids) - room, 0) :]]
        row = [*kept, *([mask] * len(targets)), sep]
        return Request(tuple(row), tuple(range(len(kept), len(row) - 1)), tuple(targets))

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """The requests' scores, in their order. Raises `UserError` for scores that are not numbers."""
        scores: dict[int, Score] = {}
        batch: list[int] = []
        for index in sorted(range(len(requests)), key=lambda index: -len(requests[index].ids)):
            if batch and (len(batch) + 1) * len(requests[batch[0]].ids) > self.batch_tokens:
                scores |= zip(batch, self._score([requests[at] for at in batch]), strict=True)
                batch = []
            batch.append(index)
        if batch:
            scores |= zip(batch, self._score([requests[at] for at in batch]), strict=True)
        return [scores[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _score(self, batch: Sequence[Request]) -> list[Score]:
        states_TD = self._states(batch)
        targets_T = torch.tensor([token for request in batch for token in request.targets], device=states_TD.device)
        values: list[float] = []
        best: list[int] = []
        blocks = zip(*(torch.split(rows, _PROJECTED_TOGETHER) for rows in (states_TD, targets_T)), strict=True)
        for block_TD, of_block_T in blocks:
            log_probs_TV = self.model.cls(block_TD)[:, : self.num_tokens].float().log_softmax(dim=-1)
            values += log_probs_TV.gather(1, of_block_T[:, None])[:, 0].double().tolist()
            best += log_probs_TV.argmax(dim=-1).tolist()
        scores, at = [], 0
        for request in batch:
            end = at + len(request.targets)
            total = sum(values[at:end])
            if not abs(total) < float("inf"):
                raise UserError(scores_are_no_numbers(self.model.dtype))
            scores.append(Score(total, tuple(best[at:end])))
            at = end
        return scores

    def _states(self, batch: Sequence[Request]) -> Tensor:
        """(T, D): the last hidden states that predict the targets, request by request."""
        longest = max(len(request.ids) for request in batch)
        input_ids = torch.full((len(batch), longest), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, request in enumerate(batch):
            input_ids[row, : len(request.ids)] = torch.tensor(request.ids)
            attention_mask[row, : len(request.ids)] = 1
        device = self.model.device
        mask = None if bool(attention_mask.all()) else attention_mask.to(device)
        hidden = self.model.bert(input_ids.to(device), attention_mask=mask, use_cache=False).last_hidden_state
        rows = [row for row, request in enumerate(batch) for _ in request.positions]
        columns = [position for request in batch for position in request.positions]
        states: Tensor = hidden[torch.tensor(rows, device=device), torch.tensor(columns, device=device)]
        return states


def load_scorer(
    path_or_name: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto", batch_tokens: int = 8192
) -> TokenScorer:
    """The model in a folder or on the hub: causal where its configuration says so (`is_decoder`, or the class in
    `architectures`), else masked.

    Raises `UserError` for whatever is wrong with it, before the weights are read where that can be seen before.
    """
    on = choose_device(device)
    config = check_model(path_or_name)
    tokenizer = load_tokenizer(path_or_name)
    check_vocabulary(config, num_rows(tokenizer), os.fspath(path_or_name))
    number_type = choose_dtype(dtype, on)
    model: MegatronBertForCausalLM | MegatronBertForMaskedLM
    if config.is_decoder or "MegatronBertForCausalLM" in (config.architectures or []):
        model = load_model(
            MegatronBertForCausalLM, path_or_name, dtype=number_type, required=_REQUIRED, is_decoder=True
        )
    else:
        model = load_model(MegatronBertForMaskedLM, path_or_name, dtype=number_type, required=_REQUIRED)
    model.to(on)  # type: ignore[arg-type]
    return TokenScorer(model, tokenizer, batch_tokens=batch_tokens)
