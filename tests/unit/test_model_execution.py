"""How the model is run never changes what it computes: unpadded and packed rows, kernels, compilation, export."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

from megatron_bert import model as family
from megatron_bert.auto import register
from megatron_bert.model.linear import _amx_linear, _widened_linear

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(autouse=True)
def flex_attention_uncompiled(request):
    """Transformers compiles it for each shape, half a minute on a CPU; what it computes is the same."""
    with torch.compiler.set_stance("force_eager" if "flex_attention" in request.node.name else "default"):
        yield


def make(name="MegatronBertForMaskedLM", **overrides):
    torch.manual_seed(0)
    config = family.MegatronBertConfig(**{**SHAPE, **overrides})
    return getattr(family, name)(config).eval()


def padded_batch(rows=4, columns=11):
    torch.manual_seed(1)
    mask = torch.ones(rows, columns, dtype=torch.long)
    mask[1, 4:], mask[2, :3], mask[3, 1:] = 0, 0, 0
    return {"input_ids": torch.randint(5, 99, (rows, columns)), "attention_mask": mask}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(expected, found):
    assert expected.keys() == found.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * largest.item(), msg=name)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_unpadded_execution_equals_padded_execution(is_decoder):
    model, batch = make(is_decoder=is_decoder), padded_batch()
    real = batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~real, -100)
    unpadded, padded = model(**batch, labels=labels), model(**batch, labels=labels, unpad=False)
    torch.testing.assert_close(unpadded.logits[real], padded.logits[real], rtol=1e-4, atol=1e-5)
    assert (unpadded.logits[~real] == 0).all()
    assert (padded.logits[~real] != 0).any()
    torch.testing.assert_close(unpadded.loss, padded.loss)
    assert_same_gradients(gradients(model, padded.loss), gradients(model, unpadded.loss))


def test_the_layers_see_the_real_tokens_only():
    model, batch = make(), padded_batch()
    seen = []
    model.bert.encoder.layer[0].intermediate.register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    model.cls.predictions.decoder.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        model(**batch)
    num_real = int(batch["attention_mask"].sum())
    assert seen == [(1, num_real, SHAPE["intermediate_size"]), (1, num_real, SHAPE["vocab_size"])]


def test_a_row_of_padding_alone_is_zeros():
    batch = padded_batch()
    batch["attention_mask"][3] = 0
    model = make()
    with torch.no_grad():
        found = model(**batch).logits
        alone = model(**{key: value[:3] for key, value in batch.items()}).logits
    assert (found[3] == 0).all()
    torch.testing.assert_close(found[:3], alone)


def test_wide_outputs_are_spread_in_blocks(monkeypatch):
    model, batch = make(), padded_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        monkeypatch.setattr("megatron_bert.model.heads._LOGITS_BLOCK_TOKENS", 3)
        torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize(
    "spelled", ["boundaries", "positions", "boundaries without positions", "eager", "flex_attention"]
)
def test_packed_rows_equal_their_sequences(is_decoder, spelled):
    implementation = spelled if spelled in ("eager", "flex_attention") else "sdpa"
    model = make("MegatronBertModel", is_decoder=is_decoder, use_cache=False, attn_implementation=implementation)
    sequences = [torch.randint(5, 99, (1, length)) for length in (5, 1, 9, 3)]
    packed = {"input_ids": torch.cat(sequences, dim=1)}
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in sequences])[None]
    boundaries = torch.tensor([0, 5, 6, 15, 18], dtype=torch.int32)
    if spelled != "boundaries without positions":
        packed["position_ids"] = positions
    if spelled.startswith("boundaries"):
        packed |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 9, "max_length_k": 9}
    with torch.no_grad():
        found = model(**packed)
        expected = [model(ids) for ids in sequences]
    states = torch.cat([outputs.last_hidden_state for outputs in expected], dim=1)
    torch.testing.assert_close(found.last_hidden_state, states, rtol=1e-4, atol=1e-5)
    pooled = torch.cat([outputs.pooler_output for outputs in expected])
    torch.testing.assert_close(found.pooler_output, pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_rows_of_a_decoder_with_a_cache_or_an_encoder(cross, use_cache):
    """A cache is every decoder's default; all sequences of a row see the row's encoder states."""
    model = make("MegatronBertForCausalLM", is_decoder=True, add_cross_attention=cross)
    sequences = [torch.randint(5, 99, (1, length)) for length in (5, 1, 9)]
    more = {"encoder_hidden_states": torch.randn(1, 7, 32)} if cross else {}
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in sequences])[None]
    with torch.no_grad():
        found = model(torch.cat(sequences, dim=1), position_ids=positions, use_cache=use_cache, **more).logits
        expected = [model(ids, **more).logits for ids in sequences]
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_several_rows_of_packed_sequences():
    model = make("MegatronBertModel")
    ids = torch.randint(5, 99, (2, 6))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]])
    with torch.no_grad():
        found = model(ids, position_ids=positions).last_hidden_state
        pieces = [model(piece).last_hidden_state for piece in (ids[:1, :4], ids[:1, 4:], ids[1:, :2], ids[1:, 2:])]
    rows = [torch.cat(pieces[:2], dim=1), torch.cat(pieces[2:], dim=1)]
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-4, atol=1e-5)


def test_positions_of_one_row_hold_for_all():
    model = make("MegatronBertModel")
    ids, positions = torch.randint(5, 99, (2, 6)), torch.tensor([[0, 1, 2, 3, 0, 1]])
    with torch.no_grad():
        found = model(ids, position_ids=positions).last_hidden_state
        expected = model(ids, position_ids=positions.expand(2, -1)).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_other_positions_are_not_taken_for_packed_rows():
    model = make("MegatronBertModel")
    ids = torch.randint(5, 99, (2, 6))
    with torch.no_grad():
        for positions in ([[3, 1, 2, 0, 5, 4]] * 2, [[7, 8, 9, 10, 11, 12]] * 2, [[0, 1, 2, 3, 4, 5]] * 2):
            positions = torch.tensor(positions)
            plain = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).last_hidden_state
            torch.testing.assert_close(model(ids, position_ids=positions).last_hidden_state, plain)


def test_boundaries_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cu_seq_lens must increase from 0 to the number of tokens, 6"):
        make("MegatronBertModel")(torch.ones(1, 6, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 4, 5]))


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_attention_implementations_agree(implementation, is_decoder):
    model, batch = make(is_decoder=is_decoder), padded_batch()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).logits[real]
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(**batch).logits[real], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_attentions_come_from_any_implementation(implementation, is_decoder):
    batch = padded_batch()
    model = make("MegatronBertModel", is_decoder=is_decoder, attn_implementation=implementation)
    eager = make("MegatronBertModel", is_decoder=is_decoder, attn_implementation="eager")
    with torch.no_grad():
        found, expected = (m(**batch, output_attentions=True, use_cache=False) for m in (model, eager))
    assert len(found.attentions) == SHAPE["num_hidden_layers"]
    real = batch["attention_mask"].bool()
    for theirs, ours in zip(expected.attentions, found.attentions, strict=True):
        torch.testing.assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real])


@pytest.mark.parametrize(
    "name", ["MegatronBertForMaskedLM", "MegatronBertForPreTraining", "MegatronBertForQuestionAnswering"]
)
def test_compiles_into_one_graph_with_padding(name):
    torch.compiler.reset()
    model, batch = make(name), padded_batch()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch)[0][real]
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch)[0][real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiles_packed_rows_into_one_graph():
    torch.compiler.reset()
    model = make("MegatronBertModel")
    packed = {
        "input_ids": torch.randint(5, 99, (1, 9)),
        "cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32),
    }
    with torch.no_grad():
        expected = model(**packed)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**packed)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_compiled_model_tells_packed_rows_by_their_positions(is_decoder):
    """One graph for packed and for plain positions, those of nothing but 0 included."""
    torch.compiler.reset()
    model = make("MegatronBertForCausalLM" if is_decoder else "MegatronBertForMaskedLM", is_decoder=is_decoder)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = torch.randint(5, 99, (2, 6))
    with torch.no_grad():
        for row in ([0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5], [0] * 6, [7, 8, 9, 10, 11, 12]):
            positions = torch.tensor([row, [0, 1, 0, 1, 2, 3] if row[4] == 0 and row[1] else row])
            expected = model(ids, position_ids=positions).logits
            torch.testing.assert_close(compiled(ids, position_ids=positions).logits, expected, rtol=1e-4, atol=1e-5)


def test_training_step_compiles_into_one_graph():
    torch.compiler.reset()
    model, batch = make("MegatronBertForPreTraining").train(), padded_batch()
    batch["attention_mask"][2] = 1  # the first token, which is pooled, is no padding
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    arguments = {**batch, "labels": labels, "next_sentence_label": torch.tensor([0, 1, 1, 0])}
    expected = gradients(model, model(**arguments).loss)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_gradients(expected, gradients(model, compiled(**arguments).loss))


def test_exports():
    model, batch = make("MegatronBertForMaskedLM"), padded_batch()
    real = batch["attention_mask"].bool()
    program = torch.export.export(model, (), batch)
    with torch.no_grad():
        found, expected = program.module()(**batch).logits[real], model(**batch).logits[real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder_length", [3, 11])
def test_encoder_decoder_model_of_any_lengths(encoder_length):
    """Generation with a cache gives what a model without one gives, for an encoder longer or shorter than the text."""
    register()
    encoder = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99
    )
    decoder = family.MegatronBertConfig(**SHAPE, is_decoder=True, add_cross_attention=True)
    torch.manual_seed(0)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)).eval()
    assert type(model.decoder) is family.MegatronBertForCausalLM
    inputs = {"input_ids": torch.randint(5, 99, (2, encoder_length)), "decoder_start_token_id": 1, "pad_token_id": 0}
    inputs["attention_mask"] = torch.ones(2, encoder_length, dtype=torch.long)
    inputs["attention_mask"][1, 2:] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": 2}
    with_cache = model.generate(**inputs, **options, use_cache=True)
    torch.testing.assert_close(with_cache, model.generate(**inputs, **options, use_cache=False))
    assert with_cache.shape == (2, 7)


def test_too_many_tokens_say_so():
    with pytest.raises(ValueError, match="65 tokens do not fit this model's 64 positions"):
        make()(torch.ones(1, 65, dtype=torch.long))


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(
        StrictDataclassClassValidationError, match="hidden_size 32 is not a multiple of num_attention_heads 5"
    ):
        family.MegatronBertConfig(**{**SHAPE, "num_attention_heads": 5})


@pytest.mark.parametrize("function", [_widened_linear, _amx_linear])
@pytest.mark.parametrize("reorder_from", [1, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_fast_products_equal_the_plain_one(function, reorder_from, bias, monkeypatch):
    """Against the product in double precision: no further from it than one rounding to bf16."""
    monkeypatch.setattr("megatron_bert.model.linear._BLOCK_ELEMENTS", 64 * 7)
    monkeypatch.setattr("megatron_bert.model.linear._REORDER_FROM_TOKENS", reorder_from)
    torch.manual_seed(0)
    input = torch.randn(3, 5, 64).bfloat16()
    layer = torch.nn.Linear(64, 50, bias=bias).bfloat16()
    with torch.no_grad():
        found = function(input, layer.weight, layer.bias)
        exact = torch.nn.functional.linear(
            input.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
        )
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-9)


def test_packed_rows_with_dropout_train():
    model = make("MegatronBertForMaskedLM", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
    batch = padded_batch()
    loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, loss).values())
