"""Every class against Transformers' class of the same name: outputs, losses and the gradient of every parameter.

Both run in fp32 on the same weights with dropout off; tensors agree within 2e-5 of their norm.
"""

import copy

import pytest
import torch
import transformers
from transformers.integrations.neftune import neftune_post_forward_hook

from megatron_bert import model as ours_module

BATCH, SEQUENCE, VOCABULARY = 4, 12, 99
TOLERANCE = 2e-5
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
    "initializer_range": 0.2,  # larger than life, so that attention is far from uniform
}
HEADS = {
    "MegatronBertModel": (),
    "MegatronBertForMaskedLM": ("labels",),
    "MegatronBertForCausalLM": ("labels",),
    "MegatronBertForNextSentencePrediction": ("labels",),
    "MegatronBertForPreTraining": ("labels", "next_sentence_label"),
    "MegatronBertForSequenceClassification": ("labels",),
    "MegatronBertForMultipleChoice": ("labels",),
    "MegatronBertForTokenClassification": ("labels",),
    "MegatronBertForQuestionAnswering": ("start_positions", "end_positions"),
}
PER_TOKEN = ("MaskedLM", "CausalLM", "PreTraining", "TokenClassification")

pytestmark = pytest.mark.filterwarnings("ignore")


def pair(name, **overrides):
    """Their model and ours with the same random weights."""
    torch.manual_seed(0)
    settings = {**SHAPE, **overrides}
    if name.endswith("QuestionAnswering"):
        settings["num_labels"] = 2
    if name.endswith("CausalLM"):
        settings.setdefault("is_decoder", True)
    theirs = getattr(transformers, name)(transformers.MegatronBertConfig(**settings)).eval()
    for parameter in theirs.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and bool((parameter == 1).all())), std=0.2)
    ours = getattr(ours_module, name)(ours_module.MegatronBertConfig(**settings)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs_for(name, padding=None):
    """Token ids, types and a mask; `padding` on the right or left in half the rows."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input_ids": torch.randint(5, VOCABULARY, (BATCH, SEQUENCE), generator=generator),
        "token_type_ids": torch.randint(0, 2, (BATCH, SEQUENCE), generator=generator),
    }
    if padding:
        mask = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
        mask[1, 7:], mask[2, 1:] = 0, 0
        inputs["attention_mask"] = mask if padding == "right" else mask.flip(-1)
    if name.endswith("MultipleChoice"):
        inputs = {key: value.unflatten(0, (2, 2)) for key, value in inputs.items()}
    return inputs


def labels_for(name, mask=None):
    generator = torch.Generator().manual_seed(2)
    labels = {}
    for key in HEADS[name]:
        if key == "labels" and name.endswith(PER_TOKEN):
            high = 3 if name.endswith("TokenClassification") else VOCABULARY
            value = torch.randint(0, high, (BATCH, SEQUENCE), generator=generator)
            value[torch.rand(value.shape, generator=generator) < 0.3] = -100
            if mask is not None:
                value[mask == 0] = -100
                value[:, 1:][mask[:, :-1] == 0] = -100  # a decoder predicts this one from padding
        else:
            rows = 2 if name.endswith("MultipleChoice") else BATCH
            value = torch.randint(0, SEQUENCE if "positions" in key else 2, (rows,), generator=generator)
        labels[key] = value
    return labels


def assert_close(expected, found, what, scale_of=None):
    scale = (expected if scale_of is None else scale_of).double().norm().clamp(min=1e-6)
    error = ((expected.double() - found.double()).norm() / scale).item()
    assert error < TOLERANCE, f"{what}: relative error {error:.2e}"


def assert_same_outputs(expected, found, real=None):
    """Every tensor of two outputs; with `real`, a (B, S) mask, at real positions only."""
    assert list(expected.keys()) == list(found.keys())
    for key, value in expected.items():
        tensors = zip(value, found[key], strict=True) if isinstance(value, tuple) else [(value, found[key])]
        for theirs, ours in tensors:
            if not isinstance(theirs, torch.Tensor):
                continue
            assert theirs.shape == ours.shape, key
            if real is not None and theirs.shape[:2] == real.shape:
                theirs, ours = theirs[real], ours[real]
            assert_close(theirs, ours, key)


def objective(outputs, mask=None):
    """The loss where there is one, else a weighted sum of what comes out at real positions."""
    if "loss" in outputs:
        return outputs.loss
    states = outputs.last_hidden_state
    weights = torch.linspace(-1, 1, states[0].numel()).view(states.shape[1:])
    kept = torch.ones(states.shape[:2]) if mask is None else mask
    return (states * weights * kept[..., None]).sum() + outputs.pooler_output.sum()


def assert_same_gradients(theirs, ours):
    """Relative to each parameter's own gradient, but for those that are zero.

    What a softmax ignores has no gradient but noise: key biases, and whatever adds one number to all of its inputs.
    """
    expected, found = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert list(expected) == list(found)  # names and order: optimizer states depend on both
    largest = max(parameter.grad.norm() for parameter in expected.values() if parameter.grad is not None)
    for key, parameter in expected.items():
        assert (parameter.grad is None) == (found[key].grad is None), key
        if parameter.grad is None:
            continue
        ignored = parameter.grad.norm() < 1e-6 * largest
        assert_close(parameter.grad, found[key].grad, f"gradient of {key}", largest if ignored else None)


def compare(name, inputs, labels=None, train=False, **overrides):
    theirs, ours = pair(name, **overrides)
    if train:
        theirs.train(), ours.train()
        theirs.gradient_checkpointing_enable(), ours.gradient_checkpointing_enable()
    mask = inputs.get("attention_mask")
    labels = labels_for(name, mask) if labels is None else labels
    expected, found = theirs(**inputs, **labels), ours(**inputs, **labels)
    real = mask.flatten(0, -2).bool() if mask is not None else None
    assert_same_outputs(expected, found, real)
    objective(expected, mask).backward()
    objective(found, mask).backward()
    assert_same_gradients(theirs, ours)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_outputs_losses_and_gradients(name, padding):
    compare(name, inputs_for(name, padding))


@pytest.mark.parametrize("name", HEADS)
def test_without_labels(name):
    theirs, ours = pair(name)
    inputs = inputs_for(name, "right")
    with torch.no_grad():
        expected, found = theirs(**inputs), ours(**inputs)
    if name.endswith("QuestionAnswering"):
        padding = inputs["attention_mask"] == 0
        assert (found.start_logits[padding] == torch.finfo(torch.float32).min).all()
    assert_same_outputs(expected, found, inputs["attention_mask"].flatten(0, -2).bool())


@pytest.mark.parametrize("name", [name for name in HEADS if name.endswith(PER_TOKEN)])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_labels_at_padding_count_as_they_do_there(name, padding):
    if padding == "left" and name.endswith("CausalLM"):
        pytest.skip("padding that attends to nothing has no defined state")
    inputs = inputs_for(name, padding)
    compare(name, inputs, labels=labels_for(name))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("padding", [None, "right"])
def test_inputs_embeds(name, padding):
    inputs = inputs_for(name, padding)
    shape = inputs.pop("input_ids").shape
    inputs["inputs_embeds"] = torch.randn(*shape, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(3))
    compare(name, inputs)


def test_noise_on_the_words_is_as_loud_as_there():
    """NEFTune's, a hook of Transformers that divides by the square root of the batch's length."""
    found = []
    for model in pair("MegatronBertForMaskedLM"):
        words = model.train().get_input_embeddings()
        words.neftune_noise_alpha = 5.0
        words.register_forward_hook(neftune_post_forward_hook)
        torch.manual_seed(9)
        found.append(model(**inputs_for("MegatronBertForMaskedLM", "right")).logits[0])
    assert_close(*found, "logits")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("padding", [None, "right"])
def test_chunked_feed_forward(name, padding):
    compare(name, inputs_for(name, padding), chunk_size_feed_forward=4)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("padding", [None, "right"])
def test_gradient_checkpointing(name, padding):
    compare(name, inputs_for(name, padding), train=True)


@pytest.mark.parametrize("name", HEADS)
def test_hidden_states_and_attentions(name):
    theirs, ours = pair(name)
    theirs.set_attn_implementation("eager")
    inputs = {**inputs_for(name, "right"), "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        assert_same_outputs(theirs(**inputs), ours(**inputs))  # padded, and so equal at padding too


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("in_config", [False, True])
def test_tuple_output(name, with_labels, in_config):
    theirs, ours = pair(name)
    inputs = {**inputs_for(name), "output_hidden_states": True, **({} if in_config else {"return_dict": False})}
    labels = labels_for(name) if with_labels else {}
    for model in (theirs, ours):
        model.config.return_dict = not in_config
    with torch.no_grad():
        expected, found = theirs(**inputs, **labels), ours(**inputs, **labels)
    assert isinstance(found, tuple)
    tensors = [value for value in expected if isinstance(value, (torch.Tensor, tuple))]
    for theirs_value, ours_value in zip(
        tensors, (value for value in found if isinstance(value, (torch.Tensor, tuple))), strict=True
    ):
        if isinstance(theirs_value, tuple):
            assert_close(torch.stack(theirs_value), torch.stack(ours_value), "tuple")
        else:
            assert_close(theirs_value, ours_value, "tensor")


def test_positions_of_nothing_but_0_pack_nothing():
    inputs = inputs_for("MegatronBertForSequenceClassification")
    inputs["position_ids"] = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    compare("MegatronBertForSequenceClassification", inputs)


def test_explicit_positions_and_no_token_types():
    inputs = inputs_for("MegatronBertModel")
    del inputs["token_type_ids"]
    inputs["position_ids"] = torch.randint(0, 40, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(4))
    compare("MegatronBertModel", inputs)


@pytest.mark.parametrize("types", [torch.arange(SEQUENCE) // 7, torch.tensor([[0], [1], [1], [0]])])
def test_token_types_of_fewer_dimensions(types):
    compare("MegatronBertModel", {**inputs_for("MegatronBertModel", "right"), "token_type_ids": types})


@pytest.mark.parametrize("shape", [(SEQUENCE,), (1, SEQUENCE), (BATCH, SEQUENCE)])
def test_types_and_positions_of_all_choices(shape):
    inputs = inputs_for("MegatronBertForMultipleChoice", "right")
    inputs["token_type_ids"] = (torch.arange(SEQUENCE) // 7).expand(shape)
    inputs["position_ids"] = torch.arange(3, SEQUENCE + 3).expand(shape)
    compare("MegatronBertForMultipleChoice", inputs)


def test_embeddings_by_themselves():
    ids = inputs_for("MegatronBertModel")["input_ids"]
    theirs, ours = (model.embeddings(ids) for model in pair("MegatronBertModel"))
    assert_close(theirs, ours, "embeddings")


def test_labels_of_one_dimension():
    name = "MegatronBertForTokenClassification"
    inputs = inputs_for(name, "right")
    compare(name, inputs, {"labels": labels_for(name, inputs["attention_mask"])["labels"].flatten()})


def test_a_mask_of_more_rows_counts_as_it_does_there():
    theirs, ours = pair("MegatronBertForMaskedLM")
    inputs = inputs_for("MegatronBertForMaskedLM", "right")
    mask = inputs["attention_mask"]
    inputs["attention_mask"] = torch.cat((mask, mask))
    with torch.no_grad():
        assert_same_outputs(theirs(**inputs), ours(**inputs), mask.bool())


@pytest.mark.parametrize(("rows", "columns"), [(1, SEQUENCE), (BATCH - 1, SEQUENCE), (BATCH, SEQUENCE - 1)])
@pytest.mark.parametrize("name", ["MegatronBertModel", "MegatronBertForMaskedLM"])
def test_a_mask_of_too_few_places_is_refused(name, rows, columns):
    inputs = inputs_for(name)
    inputs["attention_mask"] = torch.ones(rows, columns, dtype=torch.long)
    inputs["attention_mask"][-1, 4:] = 0
    for model in pair(name):
        with pytest.raises((IndexError, RuntimeError)):
            model(**inputs)


@pytest.mark.parametrize("kind", ["regression", "multi-label", "single-label"])
def test_problem_types(kind):
    name, num_labels = "MegatronBertForSequenceClassification", 1 if kind == "regression" else 3
    labels = {
        "regression": torch.linspace(-1, 1, BATCH),
        "multi-label": torch.eye(3)[[0, 1, 2, 0]],
        "single-label": torch.tensor([0, 2, 1, 1]),
    }[kind]
    theirs, ours = pair(name, num_labels=num_labels)
    expected, found = (model(**inputs_for(name), labels=labels) for model in (theirs, ours))
    assert_close(expected.loss, found.loss, "loss")
    assert theirs.config.problem_type == ours.config.problem_type


def test_logits_of_one_position():
    theirs, ours = pair("MegatronBertForCausalLM", is_decoder=False)
    inputs, place = inputs_for("MegatronBertForCausalLM"), torch.tensor(3)
    with torch.no_grad():
        expected, found = (model(**inputs, logits_to_keep=place).logits for model in (theirs, ours))
    assert expected.shape == found.shape
    assert_close(expected, found, "logits")


def test_another_classifier_is_put_in():
    """The usual two lines; the configuration still has the old number."""
    name = "MegatronBertForSequenceClassification"
    theirs, ours = pair(name)
    for model in (theirs, ours):
        torch.manual_seed(8)
        model.classifier, model.num_labels = torch.nn.Linear(SHAPE["hidden_size"], 7), 7
    inputs, labels = inputs_for(name, "right"), torch.tensor([0, 6, 5, 1])
    assert_same_outputs(theirs(**inputs, labels=labels), ours(**inputs, labels=labels))
    assert ours.config.to_dict() == theirs.config.to_dict()


def test_a_loss_of_ones_own_counts_padding_as_it_does_there():
    """Spans' logits in training, without positions given."""
    theirs, ours = (model.train() for model in pair("MegatronBertForQuestionAnswering"))
    inputs = inputs_for("MegatronBertForQuestionAnswering", "right")
    expected, found = (model(**inputs).start_logits.logsumexp(-1) for model in (theirs, ours))
    assert_close(expected, found, "normaliser of the loss")


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", ["MegatronBertModel", "MegatronBertForCausalLM", "MegatronBertForMaskedLM"])
def test_decoder(name, padding):
    if name == "MegatronBertModel" and padding == "left":
        pytest.skip("the first position, which is pooled, is padding here")
    compare(name, inputs_for(name, padding), is_decoder=True)


@pytest.mark.parametrize("encoder_padding", [False, True])
def test_cross_attention(encoder_padding):
    states = torch.randn(BATCH, SEQUENCE, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(5))
    inputs = {**inputs_for("MegatronBertForCausalLM"), "encoder_hidden_states": states}
    if encoder_padding:
        inputs["encoder_attention_mask"] = (torch.arange(SEQUENCE) < 7).long().expand(BATCH, -1)
    compare("MegatronBertForCausalLM", inputs, add_cross_attention=True)


@pytest.mark.parametrize("encoder_length", [1, 5, 11])
def test_cross_attention_of_another_length(encoder_length):
    """Theirs takes an encoder as long as the decoder only: its mask stands in for a shorter one."""
    theirs, ours = pair("MegatronBertForCausalLM", add_cross_attention=True)
    states = torch.randn(BATCH, SEQUENCE, SHAPE["hidden_size"])
    mask = (torch.arange(SEQUENCE) < encoder_length).long().expand(BATCH, -1)
    inputs = inputs_for("MegatronBertForCausalLM")
    with torch.no_grad():
        expected = theirs(**inputs, encoder_hidden_states=states, encoder_attention_mask=mask).logits
        assert_close(expected, ours(**inputs, encoder_hidden_states=states[:, :encoder_length]).logits, "shorter")
        # A shorter decoder sees the beginning of what a longer one sees.
        short = {key: value[:, :5] for key, value in inputs.items()}
        found = ours(**short, encoder_hidden_states=states, encoder_attention_mask=mask).logits
        assert_close(expected[:, :5], found, "longer")


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("padding", [None, "left"])
def test_cached_decoding(cross, padding):
    """Token by token through the cache: what the whole sequence gives at once, in both implementations."""
    theirs, ours = pair("MegatronBertForCausalLM", add_cross_attention=cross)
    inputs = inputs_for("MegatronBertForCausalLM", padding)
    del inputs["token_type_ids"]
    mask = inputs.get("attention_mask", torch.ones(BATCH, SEQUENCE, dtype=torch.long))
    extra = {"encoder_hidden_states": torch.randn(BATCH, SEQUENCE, SHAPE["hidden_size"])} if cross else {}
    with torch.no_grad():
        expected = theirs(**inputs, **extra, use_cache=False).logits
        if cross:
            extra["encoder_hidden_states"] = extra["encoder_hidden_states"].clone()
        cache, pieces = None, []
        for start, end in ((0, 5), (5, 6), (6, 7), (7, SEQUENCE)):
            outputs = ours(
                inputs["input_ids"][:, start:end], attention_mask=mask[:, :end], past_key_values=cache, **extra
            )
            cache = outputs.past_key_values
            pieces.append(outputs.logits)
    real = mask.bool()
    assert_close(expected[real], torch.cat(pieces, dim=1)[real], "cached")


@pytest.mark.parametrize("name", HEADS)
def test_files_load_in_the_other(name, tmp_path):
    theirs, ours = pair(name)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for source, reader, kind in (("theirs", type(ours), theirs), ("ours", type(theirs), ours)):
        loaded, info = reader.from_pretrained(tmp_path / source, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        expected, found = kind.state_dict(), loaded.state_dict()
        assert list(expected) == list(found)
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(
        path.name for path in (tmp_path / "theirs").iterdir()
    )


def test_configuration_files_are_the_same(tmp_path):
    settings = {**SHAPE, "is_decoder": True, "add_cross_attention": True, "pad_token_id": 3}
    ours, theirs = ours_module.MegatronBertConfig(**settings), transformers.MegatronBertConfig(**settings)
    assert ours.to_dict() == theirs.to_dict()
    assert ours_module.MegatronBertConfig().to_dict() == transformers.MegatronBertConfig().to_dict()
    ours.save_pretrained(tmp_path)
    assert transformers.MegatronBertConfig.from_pretrained(tmp_path).to_dict() == theirs.to_dict()


@pytest.mark.parametrize("name", HEADS)
def test_initialisation_is_theirs(name):
    """Same seed, same weights: the same values are drawn in the same order."""
    torch.manual_seed(7)
    theirs = getattr(transformers, name)(transformers.MegatronBertConfig(**SHAPE))
    torch.manual_seed(7)
    ours = getattr(ours_module, name)(ours_module.MegatronBertConfig(**SHAPE))
    expected, found = theirs.state_dict(), ours.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_one_kind_of_label_gives_its_loss():
    theirs, ours = pair("MegatronBertForPreTraining")
    inputs, labels = inputs_for("MegatronBertForPreTraining"), labels_for("MegatronBertForPreTraining")
    both = theirs(**inputs, **labels).loss
    apart = [ours(**inputs, **{key: value}).loss for key, value in labels.items()]
    assert_close(both, sum(apart), "sum of the two losses")
    logits = theirs(**inputs).prediction_logits
    alone = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels["labels"].flatten())
    assert_close(alone, apart[0], "masked-language-model loss alone")


def test_no_binary_head_is_honoured(tmp_path):
    theirs, _ = pair("MegatronBertForPreTraining")
    theirs.save_pretrained(tmp_path)
    ours = ours_module.MegatronBertForPreTraining.from_pretrained(tmp_path, add_binary_head=False).eval()
    assert not [name for name, _ in ours.named_parameters() if "seq_relationship" in name or "pooler" in name]
    inputs = inputs_for("MegatronBertForPreTraining")
    found = ours(**inputs)
    assert found.seq_relationship_logits is None
    assert_close(theirs(**inputs).prediction_logits, found.prediction_logits, "logits")
    with pytest.raises(ValueError, match="binary head"):
        ours(**inputs, next_sentence_label=torch.zeros(BATCH, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_outputs_are_as_near_to_fp32_as_theirs(dtype):
    theirs, ours = pair("MegatronBertForMaskedLM")
    inputs = inputs_for("MegatronBertForMaskedLM")
    with torch.no_grad():
        exact = theirs(**inputs).logits
        theirs_error = (copy.deepcopy(theirs).to(dtype)(**inputs).logits.float() - exact).norm()
        ours_error = (ours.to(dtype)(**inputs).logits.float() - exact).norm()
    assert ours_error <= 1.5 * theirs_error
