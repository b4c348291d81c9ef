"""Layouts that cannot be are refused in one line."""

from types import SimpleNamespace

import pytest
import torch

from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig
from megatron_bert.parallel.overlap import check_overlap
from megatron_bert.parallel.tensor import check_degree
from tests.distributed import cases


def test_processes_that_do_not_fit_the_mesh(world):
    (message, *others) = world(4).run(cases.refusal, tensor=3)
    assert message == "4 processes cannot be split into tensor-parallel groups of 3: start a multiple of 3"
    assert others == 3 * [message]


def test_replicas_that_do_not_fit(world):
    message = world(4).run(cases.refusal, tensor=2, replicate=4)[0]
    assert (
        message == "4 processes cannot be split into tensor-parallel groups of 2 in 4 replicas: start a multiple of 8"
    )


def test_sequence_parallelism_over_nobody(world):
    assert "leave it out" in world(2).run(cases.refusal, tensor=1, sequence_parallel=True)[0]


def test_ranks_that_are_at_different_things(world):
    facts = [{"version": "1", "recipe": "ab"}, {"version": "1", "recipe": "cd"}]
    messages = world(2).run(cases.disagreement, facts)
    assert messages == 2 * ["recipe is ab on rank 0 and cd on rank 1: start all of them alike"]
    assert world(2).run(cases.disagreement, 2 * facts[:1]) == 2 * ["nothing"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads 4 is not divisible by the tensor-parallel degree 8"),
        ({"intermediate_size": 100}, "intermediate_size 100 is not divisible by the tensor-parallel degree 8"),
        ({"vocab_size": 30_522}, "vocab_size 30522 is not divisible by the tensor-parallel degree 8; pad the vocabulary"
                                 " to a multiple of 1024"),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be_split(changes, message):
    shape = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 256, "vocab_size": 1024}
    with pytest.raises(UserError, match=message):
        check_degree(MegatronBertConfig(**{**shape, **changes}), 8)


def test_overlap_of_several_hosts(monkeypatch):
    """A host may have as many GPUs as a group has ranks, and other ranks than those."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, other: True)
    mesh = SimpleNamespace(device_type="cuda", size=lambda: 4)
    for processes in ("2", "6"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        with pytest.raises(UserError, match="a tensor-parallel group within one host"):
            check_overlap(mesh)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    check_overlap(mesh)
