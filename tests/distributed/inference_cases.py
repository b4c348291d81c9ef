"""Filling masks, and Transformers' own tensor parallelism, as they run in each process of a world."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed import DistributedConfig

import megatron_bert
from megatron_bert.checkpoint import shards
from megatron_bert.errors import SharedError, UserError
from megatron_bert.inference.fill_mask import load_parallel_mask_filler
from megatron_bert.inference.ranks import InferenceRanks
from megatron_bert.inference.vocabulary import most_probable
from megatron_bert.model import MegatronBertForMaskedLM
from megatron_bert.parallel.region import local_part
from tests.distributed.cases import assert_close, mesh_of, whole

CPU = torch.device("cpu")


def fills(folder: Path, texts: list[str], **options: Any) -> list[list[list[dict[str, Any]]]]:
    """What this rank predicts: text, mask, candidate."""
    filler = load_parallel_mask_filler(folder, mesh_of(dist.get_world_size()), **options)
    filled = filler.fill(texts)
    assert [one.text for one in filled] == texts
    return [[[vars(candidate) for candidate in mask] for mask in one.predictions] for one in filled]


def refusal(folders: list[Path], dtypes: tuple[str, ...] = ("float32", "float32")) -> str:
    """What is said where each rank is given a folder and a number type of its own."""
    rank = dist.get_rank()
    try:
        load_parallel_mask_filler(folders[rank % 2], mesh_of(dist.get_world_size()), dtype=dtypes[rank % 2])
    except SharedError as error:
        return str(error)
    return "nothing"


def takes_its_part(folder: Path, small: Path) -> tuple[int, int, int]:
    """Bytes of weights that this rank held in the end, that it asked the file for, and by which its memory had grown
    at most, the file's mapped pages included. A small model comes first, for the code that is loaded when first used.
    """
    mesh = mesh_of(dist.get_world_size())
    options: dict[str, Any] = {"device": CPU, "dtype": torch.float32}
    shards.load_tensor_parallel(MegatronBertForMaskedLM, small, mesh, **options)
    read, source = [], shards._Source.read

    def counting(self: Any, key: str, slices: tuple[slice, ...]) -> Tensor:
        part = source(self, key, slices)
        read.append(part.nbytes)
        return part

    shards._Source.read = counting  # type: ignore[method-assign]
    try:
        gc.collect()
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        model = shards.load_tensor_parallel(MegatronBertForMaskedLM, folder, mesh, **options)
        grown = _memory("VmHWM") - before
    finally:
        shards._Source.read = source  # type: ignore[method-assign]
    assert not any(parameter.is_meta for parameter in model.parameters())
    return sum(local_part(parameter).nbytes for parameter in model.parameters()), sum(read), grown


def _memory(line: str) -> int:
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


class _Sent(TorchDispatchMode):
    """The most elements that one collective was given or gave."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self.most = max(self.most, result.numel() if isinstance(result, Tensor) else 0, args[0].numel())
        return result


def merges_the_best(num_tokens: int, num_candidates: int) -> int:
    """The most elements of a collective; the result is that of the softmax of all logits."""
    ranks = dist.get_world_size()
    logits_MV = torch.randn(6, 64 * ranks, generator=torch.Generator().manual_seed(2))
    expected = logits_MV[:, :num_tokens].softmax(-1).topk(num_candidates)
    part = logits_MV.chunk(ranks, dim=-1)[dist.get_rank()]
    with _Sent() as sent:
        scores, tokens = most_probable(
            part, num_candidates, num_tokens=num_tokens, region=mesh_of(dist.get_world_size()).region
        )
    assert torch.equal(tokens, expected.indices)
    torch.testing.assert_close(scores, expected.values, rtol=1e-5, atol=1e-8)
    return sent.most


def hears_the_first_rank() -> list[Any]:
    """What arrives of a stream that only the first rank may read, and of its errors."""
    ranks = InferenceRanks(mesh_of(dist.get_world_size()), dist.get_rank() == 0, dist.group.WORLD)

    def stream() -> Iterator[list[int]]:
        assert ranks.is_first
        yield [1]
        yield []  # an item like any other
        raise UserError("line 3 is not a text")

    heard: list[Any] = []
    try:
        heard += [*ranks.stream_from_first([[1, 2]])]
        for item in ranks.stream_from_first(stream()):
            heard.append(item)
    except SharedError as error:
        heard.append(str(error))
    try:
        ranks.from_first(Path("/nowhere/texts").read_text)
    except SharedError as error:
        heard.append(str(error))
    return heard


def transformers_plan_equals_its_own_class(folder: Path, name: str, *, as_configuration: bool) -> None:
    """Our class, split by Transformers as our plan says, against Transformers' class in one piece."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    plan = {"distributed_config": DistributedConfig(tp_plan="auto")} if as_configuration else {"tp_plan": "auto"}
    ours = getattr(megatron_bert, name).from_pretrained(folder, **plan).eval()
    reference = getattr(transformers, name).from_pretrained(folder).eval()
    split = [name for name, parameter in ours.named_parameters() if local_part(parameter).shape != parameter.shape]
    assert "bert.embeddings.word_embeddings.weight" in split
    assert "bert.encoder.layer.1.attention.output.dense.weight" in split
    assert ours.num_tokens is not None
    ids, mask = torch.arange(5, 31).view(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, 8:] = 0
    logits = "prediction_logits" if name.endswith("PreTraining") else "logits"
    for grads in (False, True):
        with torch.set_grad_enabled(grads):
            outputs = [model(ids, attention_mask=mask)[logits][mask.bool()] for model in (ours, reference)]
        assert_close(*(output[:, : ours.num_tokens] for output in outputs), "logits")
    outputs[0][:, : ours.num_tokens].sum().backward()
    outputs[1][:, : ours.num_tokens].sum().backward()
    weight = "bert.encoder.layer.0.intermediate.dense.weight"
    assert_close(*(whole(model.get_parameter(weight).grad) for model in (ours, reference)), "gradient")
