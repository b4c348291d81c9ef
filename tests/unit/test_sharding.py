"""The sharding table: it covers every parameter of every class, and says what the paper says."""

import pytest
import torch

import megatron_bert.model as family
from megatron_bert.model import MegatronBertConfig
from megatron_bert.sharding import on_sequence_shards, sharding_of, split_dim

HEADS = [getattr(family, name) for name in family.__all__ if name.startswith(("MegatronBertFor", "MegatronBertModel"))]
HEADS.remove(family.MegatronBertForPreTrainingOutput)


def model_of(model_class, **changes):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    with torch.device("meta"):
        return model_class(MegatronBertConfig(vocab_size=64, **shape, **changes))


@pytest.mark.parametrize("model_class", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("decoder", [False, True])
def test_every_parameter_has_its_place(model_class, decoder):
    model = model_of(model_class, is_decoder=decoder, add_cross_attention=decoder)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        dim = split_dim(name)
        assert dim is None or parameter.shape[dim] in (16, 32, 64)


def test_what_is_split_is_most_of_the_model():
    """All matrices of a layer, and the vocabulary's: arXiv 1909.08053, section 3."""
    for name, parameter in model_of(family.MegatronBertForPreTraining).named_parameters():
        if parameter.ndim == 2 and (".layer." in name or "word_embeddings" in name):
            assert split_dim(name) is not None, name


def test_axes():
    """(out, in): heads and the MLP's width by columns of x W, back by rows; a row's bias is whole."""
    layer = "bert.encoder.layer.11"
    assert sharding_of(f"{layer}.attention.self.query") == "column"
    assert [split_dim(f"{layer}.intermediate.dense.{part}") for part in ("weight", "bias")] == [0, 0]
    assert [split_dim(f"{layer}.crossattention.output.dense.{part}") for part in ("weight", "bias")] == [1, None]
    assert [split_dim(f"cls.predictions.{part}") for part in ("decoder.weight", "bias")] == [0, 0]


def test_gradients_to_sum_under_sequence_parallelism():
    names = [name for name, _ in model_of(family.MegatronBertForPreTraining).named_parameters()]
    summed = {name.removeprefix("bert.encoder.").removeprefix("layer.0.") for name in names if on_sequence_shards(name)}
    norms = {"ln.weight", "ln.bias", "attention.ln.weight", "attention.ln.bias"}
    assert {name for name in summed if not name.startswith("layer.1")} == norms | {
        "attention.output.dense.bias",
        "output.dense.bias",
    }


def test_an_unknown_parameter_is_refused():
    with pytest.raises(KeyError, match="adapter"):
        split_dim("bert.encoder.layer.0.adapter.weight")


def test_transformers_plan():
    """Its words: every entry names a module or parameter of the class."""
    model = model_of(family.MegatronBertForCausalLM, is_decoder=True)
    plan = model.tp_plan
    assert plan["bert.encoder.layer.*.attention.self.query"] == "colwise"
    assert plan["bert.encoder.layer.*.output.dense"] == "rowwise"
    assert plan["bert.embeddings.word_embeddings"] == "embedding_rowwise"
    assert plan["cls.predictions.decoder"] == "colwise_gather_output"
    names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    assert {name.replace("*", "0") for name in plan} <= names
