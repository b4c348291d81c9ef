"""Masks predicted on a GPU with CUDA graphs, fused projections and unpadded batches: as in double precision."""

import logging

import pytest
import torch

from megatron_bert.inference.fusion import fuse_projections
from megatron_bert.inference.predictor import MaskPredictor
from megatron_bert.inference.texts import MaskedText
from megatron_bert.model import MegatronBertConfig, MegatronBertForMaskedLM

pytestmark = pytest.mark.gpu

VOCABULARY = 300
# bfloat16 has 8 bits: three layers of roundings move a probability by some per cent.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-3}


def make(dtype):
    torch.manual_seed(0)
    config = MegatronBertConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256,
        max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    return MegatronBertForMaskedLM(config).eval().to("cuda", dtype)


def texts(lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    ids = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [MaskedText(numbers, sorted({0, len(numbers) // 2})) for numbers in ids]


def answers(predictor, of):
    found = {}
    for indices, candidates in predictor.predict(of):
        found |= zip(indices, candidates, strict=True)
    return [found[index] for index in range(len(of))]


def exact_probabilities(of):
    model = make(torch.float64).cpu()
    with torch.inference_mode():
        logits = [model(torch.tensor([text.ids])).logits[0, text.mask_positions] for text in of]
    return [rows.softmax(-1) for rows in logits]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("lengths", [(7,), (16,), (40, 3, 9), (300, 200), (500, 1, 64, 64, 130, 512, 400)])
def test_predictions(dtype, lengths, caplog):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make(dtype)
    fuse_projections(model)
    predictor, of = MaskPredictor(model, num_tokens=VOCABULARY), texts(lengths)
    with caplog.at_level(logging.WARNING, logger="megatron_bert"):
        rounds = [answers(predictor, of) for _ in range(6)]  # with graphs from the fourth on
    for found in (rounds[0], rounds[-1]):
        for candidates, exact in zip(found, exact_probabilities(of), strict=True):
            scores, tokens = torch.tensor(candidates.scores).double(), torch.tensor(candidates.tokens)
            assert torch.allclose(scores, exact.gather(1, tokens), rtol=TOLERANCE[dtype], atol=1e-3)
    assert not caplog.records  # no capture failed
    captured = predictor._graphs._captured if predictor._graphs else {}
    assert bool(captured) == (dtype != torch.float32 and sum(lengths) <= 1024)


def test_graphs_of_different_lengths_do_not_disturb_each_other():
    """They share memory: replayed in any order, each gives what it gave first."""
    predictor = MaskPredictor(make(torch.bfloat16), num_tokens=VOCABULARY)
    cases = [texts(lengths) for lengths in ((5,), (30,), (60, 2), (100,), (250, 1), (512,), (500, 500))]
    for case in cases:
        for _ in range(5):
            answers(predictor, case)
    assert len(predictor._graphs._captured) == 7
    first = [answers(predictor, case) for case in cases]
    for order in ((6, 0, 3, 1, 5, 2, 4), (0, 0, 6, 6, 2)):
        for index in order:
            assert answers(predictor, cases[index]) == first[index]


@pytest.mark.parametrize("lengths", [(40, 3, 9), (64, 64), (500, 1, 130, 512, 400)])
def test_a_batch_is_queued_without_waiting_for_the_device(lengths):
    predictor, batch = MaskPredictor(make(torch.bfloat16), num_tokens=VOCABULARY), texts(lengths)
    for _ in range(5):
        answers(predictor, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        queued = [predictor._queue(batch) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(queued[0].fetched()[1], queued[1].fetched()[1])
