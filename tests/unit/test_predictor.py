"""Masks predicted from token numbers: batches, rows of fixed length, fused projections; against Transformers' class."""

import logging

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

from megatron_bert.inference import graphs, predictor
from megatron_bert.inference.device import default_batch_tokens
from megatron_bert.inference.fusion import compile_layers, fuse_projections
from megatron_bert.inference.graphs import BatchGraphs, bucket_of, filled_row
from megatron_bert.inference.predictor import MaskPredictor
from megatron_bert.inference.texts import MaskedText
from megatron_bert.model import MegatronBertForMaskedLM, attention

VOCABULARY, TOP_K, MASK = 96, 4, 4
LENGTHS = (3, 17, 9, 9, 30, 1, 12)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = transformers.MegatronBertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return transformers.MegatronBertForMaskedLM(config).eval()


@pytest.fixture
def ours(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    return MegatronBertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        ids, masks = rng.integers(5, VOCABULARY, length), sorted({0, int(rng.integers(length))})
        ids[masks] = MASK
        made.append(MaskedText(ids.tolist(), masks))
    return made


@pytest.fixture(scope="module")
def expected(theirs, texts):
    """By text, (masks, TOP_K): the probabilities and tokens that Transformers' class gives it by itself."""
    with torch.inference_mode():
        logits = [theirs(torch.tensor([text.ids])).logits[0, text.mask_positions] for text in texts]
    return [rows.softmax(-1).topk(TOP_K) for rows in logits]


def answers_of(model, texts, **options):
    options = {"num_tokens": VOCABULARY, "top_k": TOP_K, **options}
    found = {}
    for indices, candidates in MaskPredictor(model, **options).predict(texts):
        found |= zip(indices, candidates, strict=True)
    return [found[index] for index in range(len(texts))]


def assert_equal(found, expected):
    for candidates, best in zip(found, expected, strict=True):
        assert candidates.tokens == best.indices.tolist()
        assert np.allclose(candidates.scores, best.values, rtol=1e-4, atol=1e-6)


class Replayed(BatchGraphs):
    """As on a GPU, but that a replay computes anew."""

    captured = 0

    def _capture(self, static):
        Replayed.captured += 1
        return lambda: self._compute(static)


@pytest.fixture
def with_graphs(monkeypatch):
    monkeypatch.setattr(predictor, "_can_be_captured", lambda model: True)
    monkeypatch.setattr(predictor, "BatchGraphs", Replayed)
    monkeypatch.setattr(Replayed, "captured", 0)


@pytest.mark.parametrize("batch_tokens", [None, 20, 1])
def test_predictions_are_those_of_transformers(ours, texts, expected, batch_tokens):
    assert_equal(answers_of(ours, texts, batch_tokens=batch_tokens), expected)


def test_no_text_gives_no_batch(ours):
    assert list(MaskPredictor(ours, num_tokens=VOCABULARY).predict([])) == []


def test_the_smallest_row_with_room_is_taken():
    text = MaskedText([5] * 16, [1])
    assert bucket_of([text]) == 16
    assert bucket_of([text, MaskedText([5], [0])]) == 32
    assert bucket_of([MaskedText([5] * 1024, [0])]) == 1024
    assert bucket_of([MaskedText([5] * 1025, [0])]) is None
    assert bucket_of([text] * 9) is None  # texts
    assert bucket_of([MaskedText([5] * 17, list(range(17)))]) is None  # masks


def test_a_row_has_each_text_and_one_sequence_of_padding():
    row = filled_row([MaskedText([7, 4, 8], [1]), MaskedText([4, 9], [0])], 16, pad_id=3)
    ids, positions, masks, boundaries = np.split(row, np.cumsum([16, 16, graphs._MASKS]))
    assert ids.tolist() == [7, 4, 8, 4, 9, *[3] * 11]
    assert positions[:5].tolist() == [0, 1, 2, 0, 1]
    assert masks.tolist() == [1, 3, *[0] * 14]
    assert boundaries.tolist() == [0, 3, 5, *[16] * 7]
    assert filled_row([MaskedText([5] * 16, [0])], 16, 0)[-9:].tolist() == [16] * 9  # nothing is left


def test_rows_of_fixed_length_change_nothing(ours, texts, expected, with_graphs):
    """Each text by itself and two together; the fourth time a length is met, its row is in use."""
    options = {"num_tokens": VOCABULARY, "top_k": TOP_K, "batch_tokens": 30}
    lasting = MaskPredictor(ours, **options)
    for round_number in range(6):
        found = dict(pair for both in lasting.predict(texts) for pair in zip(*both, strict=True))
        assert_equal([found[index] for index in range(len(texts))], expected)
        if round_number == 0:
            assert Replayed.captured == 0
    assert Replayed.captured == 2  # of 16 and 32 tokens


def test_one_off_use_captures_nothing(ours, texts, with_graphs):
    answers_of(ours, texts[:1])
    assert Replayed.captured == 0


def test_a_capture_that_fails_is_said_once(ours, texts, expected, with_graphs, monkeypatch, caplog):
    def fail(self, static):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Replayed, "_capture", fail)
    with caplog.at_level(logging.WARNING, logger="megatron_bert"):
        lasting = MaskPredictor(ours, num_tokens=VOCABULARY, top_k=TOP_K, batch_tokens=1)
        for _ in range(6):
            found = dict(pair for both in lasting.predict(texts) for pair in zip(*both, strict=True))
            assert_equal([found[index] for index in range(len(texts))], expected)
    (record,) = caplog.records
    assert record.message.endswith("longer without: CUDA error: operation not permitted when stream is capturing")


def test_a_cpu_has_no_graphs(ours):
    assert MaskPredictor(ours, num_tokens=VOCABULARY)._graphs is None
    assert default_batch_tokens(torch.device("cpu")) < default_batch_tokens(torch.device("cuda"))


def test_fused_projections_change_neither_results_nor_names(ours, texts, expected, tmp_path):
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    fuse_projections(ours)
    after = ours.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    block = ours.bert.encoder.layer[0].attention.self
    assert block.key.weight.data_ptr() - block.query.weight.data_ptr() == 32 * 32 * 4  # side by side, no copies
    assert_equal(answers_of(ours, texts), expected)
    ours.save_pretrained(tmp_path / "saved")
    again = transformers.MegatronBertForMaskedLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], value) for name, value in before.items())


def test_compiled_layers_change_nothing_and_are_compiled_once(ours, texts, expected, monkeypatch):
    """With an attention that can be traced, as a GPU's."""

    def attention_by_blocks(query, key, value, layout, is_causal, scaling, dropout):
        tokens = torch.arange(query.shape[2])
        sequences = torch.searchsorted(layout.cu_seq_lens[1:].long(), tokens, right=True)
        assert layout.max_length == 32
        return scaled_dot_product_attention(
            query, key, value, attn_mask=sequences[:, None] == sequences, scale=scaling
        ).transpose(1, 2)

    monkeypatch.setattr(attention, "_attention_by_sequence", attention_by_blocks)
    torch._dynamo.reset()
    counters.clear()
    fuse_projections(ours)
    compile_layers(ours, backend="eager")
    for batch_tokens in (40, 20, 60, 500):
        assert_equal(answers_of(ours, texts, batch_tokens=batch_tokens, is_compiled=True), expected)
    assert counters["stats"]["unique_graphs"] <= 2  # one token in all, which the compiler takes for a case of its own
    torch._dynamo.reset()
