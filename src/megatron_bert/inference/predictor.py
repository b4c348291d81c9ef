"""Predicts the masks of texts in numbers: in batches of similar length, without padding, the vocabulary projected at
masks only.

B batch, S sequence, M masks, D hidden, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from megatron_bert.errors import UserError
from megatron_bert.inference.device import default_batch_tokens, scores_are_no_numbers
from megatron_bert.inference.graphs import BatchGraphs, StaticBatch
from megatron_bert.inference.texts import MaskedText
from megatron_bert.inference.vocabulary import most_probable
from megatron_bert.model import MegatronBertForMaskedLM
from megatron_bert.model.attention import runs_packed
from megatron_bert.model.packing import PackedLayout, on_device
from megatron_bert.parallel.region import TensorRegion

__all__ = ["Candidates", "MaskPredictor"]

_PROJECTED_TOGETHER = 1024  # masks; bounds the logits to this many rows of the vocabulary


@dataclass(frozen=True)
class Candidates:
    """Of a text, by mask from left to right: K probabilities and token numbers, the most probable first."""

    scores: list[list[float]]
    tokens: list[list[int]]


class MaskPredictor:
    """A masked language model that predicts `top_k` candidates a mask, in batches of at most `batch_tokens` tokens
    (padding to the longest text included, one text at least).

    On a GPU the host never waits for a batch before the next one is queued, and small batches of 16-bit models come
    to be run as CUDA graphs (see `graphs`).

    Args:
        num_tokens: of the vocabulary; the rows beyond are padding and take no part.
        batch_tokens: default: as the device likes it.
        region: the ranks over which the model is spread. All of them are given the same texts, and give the same
            answers.
        graphs: whether to use them at all.
        is_compiled: whether `compile_layers` was called on the model: batches then look the same to the compiler, and
            there are no graphs.
    """

    def __init__(
        self,
        model: MegatronBertForMaskedLM,
        *,
        num_tokens: int,
        pad_id: int = 0,
        top_k: int = 5,
        batch_tokens: int | None = None,
        region: TensorRegion | None = None,
        graphs: bool = True,
        is_compiled: bool = False,
    ) -> None:
        self.model, self.device = model, model.device
        self.batch_tokens = batch_tokens or default_batch_tokens(self.device)
        self._num_tokens, self._pad_id, self._top_k, self._region = num_tokens, pad_id, top_k, region
        self._is_compiled = is_compiled
        has_graphs = graphs and not is_compiled and region is None and _can_be_captured(model)
        self._graphs = BatchGraphs(self._of_static, self.device, pad_id) if has_graphs else None

    def predict(self, texts: Sequence[MaskedText]) -> Iterator[tuple[list[int], list[Candidates]]]:
        """For each batch the indices of its texts, and their candidates.

        Raises:
            UserError: the scores are not numbers.
        """
        ahead = 1 if self.device.type == "cuda" else 0
        queued: deque[tuple[list[int], _Queued]] = deque()
        for indices in self._batches(texts):
            queued.append((indices, self._queue([texts[index] for index in indices])))
            if len(queued) > ahead:
                yield self._answered(*queued.popleft())
        for indices, results in queued:
            yield self._answered(indices, results)

    def _batches(self, texts: Sequence[MaskedText]) -> Iterator[list[int]]:
        """Indices of texts of similar length, the longest first, so that memory runs out at once or not at all."""
        batch: list[int] = []
        for index in sorted(range(len(texts)), key=lambda index: -len(texts[index].ids)):
            if batch and (len(batch) + 1) * len(texts[batch[0]].ids) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.inference_mode()
    def _queue(self, batch: Sequence[MaskedText]) -> _Queued:
        results = self._graphs.run(batch) if self._graphs else None
        scores_MK, tokens_MK = results or self._computed(batch)
        return _Queued(scores_MK, tokens_MK, [len(text.mask_positions) for text in batch])

    def _answered(self, indices: list[int], queued: _Queued) -> tuple[list[int], list[Candidates]]:
        scores, tokens = queued.fetched()
        if not scores.isfinite().all():
            raise UserError(scores_are_no_numbers(self.model.dtype))
        parts = zip(*(torch.split(result, queued.num_masks) for result in (scores, tokens)), strict=True)
        return indices, [Candidates(*(part.tolist() for part in both)) for both in parts]

    def _computed(self, batch: Sequence[MaskedText]) -> tuple[Tensor, Tensor]:
        states_MD = self._states_at_masks(batch)
        parts = [self._most_probable(block_MD) for block_MD in torch.split(states_MD, _PROJECTED_TOGETHER)]
        scores, tokens = zip(*parts, strict=True)
        return torch.cat(scores), torch.cat(tokens)

    def _states_at_masks(self, batch: Sequence[MaskedText]) -> Tensor:
        """(M, D): the last hidden state at each mask, text by text. The layout is known without asking the device."""
        lengths = torch.tensor([len(text.ids) for text in batch])
        is_real = torch.arange(int(lengths.max())) < lengths[:, None]
        input_ids = torch.full(is_real.shape, self._pad_id)
        input_ids[is_real] = torch.tensor(list(chain.from_iterable(text.ids for text in batch)))
        layout, mask = None, None
        if not bool(is_real.all()):
            layout = self.model.bert.layout_without_padding(is_real)
            mask = is_real.long() if layout is None else None
        elif self._is_compiled:
            layout = PackedLayout(tuple(lengths.tolist()), (is_real.shape[0], is_real.shape[1]), self.device)
        hidden = self.model.bert(
            on_device(input_ids, self.device),
            attention_mask=None if mask is None else on_device(mask, self.device),
            layout=None if layout is None else self._layout_here(layout),
            use_cache=False,
        ).last_hidden_state
        width = input_ids.shape[1]
        places = torch.tensor([row * width + at for row, text in enumerate(batch) for at in text.mask_positions])
        at_masks: Tensor = hidden.flatten(0, 1).index_select(0, on_device(places, self.device))
        return at_masks

    def _layout_here(self, layout: PackedLayout) -> PackedLayout | _OpenLayout:
        indices = None if layout.indices_T is None else on_device(layout.indices_T, self.device)
        here = replace(layout, device=self.device, indices_T=indices)
        return _OpenLayout(here, self.model.config.max_position_embeddings) if self._is_compiled else here

    def _of_static(self, static: StaticBatch) -> tuple[Tensor, Tensor]:
        """What a graph is captured of: the same in one row, its mask places included that are not there."""
        hidden = self.model.bert(
            static.ids, position_ids=static.positions, layout=static, use_cache=False
        ).last_hidden_state
        return self._most_probable(hidden[0].index_select(0, static.masks))

    def _most_probable(self, states_MD: Tensor) -> tuple[Tensor, Tensor]:
        return most_probable(self.model.cls(states_MD), self._top_k, num_tokens=self._num_tokens, region=self._region)


class _OpenLayout:
    """A `PackedLayout` of which a compiler sees nothing that differs from batch to batch but its boundaries' number.

    Not a dataclass: a compiler looks only at the attributes that are used, and so never at `lengths`.
    """

    def __init__(self, layout: PackedLayout, max_length: int) -> None:
        self.layout, self.cu_seq_lens, self.max_length = layout, layout.cu_seq_lens, max_length
        self.pack, self.unpack, self.batch_shape = layout.pack, layout.unpack, layout.batch_shape

    @property
    def lengths(self) -> tuple[int, ...]:
        """See `PackedLayout`."""
        return self.layout.lengths

    @property
    def side_by_side(self) -> PackedLayout:
        """See `PackedLayout`."""
        return self.layout.side_by_side

    @property
    def side_by_side_mask(self) -> Tensor:
        """See `PackedLayout`."""
        return self.layout.side_by_side_mask


class _Queued:
    """Results on their way to the host's memory.

    num_masks: of each text.
    """

    def __init__(self, scores_MK: Tensor, tokens_MK: Tensor, num_masks: list[int]) -> None:
        self.num_masks = num_masks
        self._results = scores_MK.to("cpu", non_blocking=True), tokens_MK.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if scores_MK.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived:
            self._arrived.record(torch.cuda.current_stream(scores_MK.device))

    def fetched(self) -> tuple[Tensor, Tensor]:
        """Scores and tokens (M, K); waits for them, and for nothing that was queued after them."""
        if self._arrived:
            self._arrived.synchronize()
        return self._results


def _can_be_captured(model: MegatronBertForMaskedLM) -> bool:
    """Whether attention runs in a kernel that takes the sequences' boundaries from the device."""
    is_packed = model.bert.unpad and runs_packed(model.config._attn_implementation)
    return model.device.type == "cuda" and is_packed and model.dtype in (torch.float16, torch.bfloat16)
