"""Old and odd checkpoints, as they are published, load; what is absent or extra is said in one line."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_bert.checkpoint.folder import check_folder
from megatron_bert.checkpoint.load import load_model
from megatron_bert.checkpoint.shards import load_shards
from megatron_bert.cli.main import main
from megatron_bert.errors import UserError
from megatron_bert.model import (
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MegatronBertForPreTraining,
    MegatronBertModel,
)
from tests.integration.tiny_model import SPECIAL, VOCABULARY, write_tiny_model

IDS = torch.tensor([[2, 30, 4, 61, 3]])


@pytest.fixture
def said(caplog):
    """The lines logged by anyone, from now on."""
    caplog.set_level(logging.INFO, logger="megatron_bert")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def as_transformers_4(folder: Path, weights: dict[str, torch.Tensor], **options: object) -> None:
    """Rewrites a folder as Transformers 4 left them: a pickle, the position buffer, no tied copy of the bias."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    positions = weights["bert.embeddings.position_embeddings.weight"].shape[0]
    old = {name: value.clone() for name, value in weights.items() if name != "cls.predictions.decoder.bias"}
    old["bert.embeddings.position_ids"] = torch.arange(positions)[None]
    torch.save(old, folder / "pytorch_model.bin", **options)
    config = json.loads((folder / "config.json").read_text())
    for newer in ("dtype", "tie_word_embeddings", "is_decoder", "add_cross_attention"):
        config.pop(newer, None)
    config |= {"transformers_version": "4.10.0", "position_embedding_type": "absolute", "gradient_checkpointing": False}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_transformers_4(tmp_path, said, zipped):
    reference = write_tiny_model(tmp_path)
    as_transformers_4(tmp_path, reference.state_dict(), _use_new_zipfile_serialization=zipped)
    model = load_model(MegatronBertForMaskedLM, tmp_path, dtype="float32")
    torch.testing.assert_close(logits(model), logits(reference), rtol=2e-5, atol=2e-5)
    assert said() == []


def test_a_checkpoint_of_transformers_4_fills_masks(tmp_path, capsys):
    reference = write_tiny_model(tmp_path)
    as_transformers_4(tmp_path, reference.state_dict())
    capsys.readouterr()
    options = ["fill-mask", "--model", str(tmp_path), "--json", "--dtype", "float32"]
    assert main([*options, "paris is the [MASK]"]) == 0
    captured = capsys.readouterr()
    pipeline = transformers.FillMaskPipeline(
        model=reference, tokenizer=transformers.BertTokenizer.from_pretrained(tmp_path), device="cpu"
    )
    expected = [row["token"] for row in pipeline("paris is the [MASK]")]
    assert [row["token"] for row in json.loads(captured.out)["predictions"][0]] == expected
    assert captured.err == ""


@pytest.mark.parametrize("gone", ["cls.predictions.decoder.bias", "cls.predictions.bias"])
def test_either_copy_of_the_tied_bias_is_enough(tmp_path, said, gone):
    reference = write_tiny_model(tmp_path)
    weights = {name: value.clone() for name, value in reference.state_dict().items() if name != gone}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = MegatronBertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(reference), rtol=2e-5, atol=2e-5)
    assert said() == []


@pytest.mark.parametrize("gone", ["cls.predictions.decoder.bias", "cls.predictions.bias"])
def test_either_name_of_an_untied_projections_bias_is_enough(tmp_path, said, gone):
    """Transformers 4 had one parameter of both names there, too, and wrote it once."""
    reference = write_tiny_model(tmp_path, tie_word_embeddings=False)
    reference.cls.predictions.decoder.bias.data.copy_(reference.cls.predictions.bias)
    weights = {name: value.clone() for name, value in reference.state_dict().items() if name != gone}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = MegatronBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    torch.testing.assert_close(logits(model.eval()), logits(reference), rtol=2e-5, atol=2e-5)
    assert not info["missing_keys"]
    part = MegatronBertForMaskedLM(MegatronBertConfig.from_pretrained(tmp_path)).eval()
    load_shards(part, tmp_path)  # as a tensor-parallel rank does
    torch.testing.assert_close(logits(part), logits(reference), rtol=2e-5, atol=2e-5)
    assert said() == []


def test_an_untied_projection_that_was_resized_keeps_its_bias(tmp_path):
    write_tiny_model(tmp_path, tie_word_embeddings=False)
    model = MegatronBertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.nn.init.normal_(model.cls.predictions.decoder.bias)
    model.resize_token_embeddings(len(VOCABULARY) + 3, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    theirs = transformers.MegatronBertForMaskedLM.from_pretrained(tmp_path / "resized").eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=2e-5, atol=2e-5)


def test_an_extra_head_is_said_in_one_line(tmp_path, said, capfd):
    reference = write_tiny_model(tmp_path, model_class=transformers.MegatronBertForPreTraining)
    model = MegatronBertForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = reference(input_ids=IDS).prediction_logits
    torch.testing.assert_close(logits(model), expected, rtol=2e-5, atol=2e-5)
    (line,) = said()
    assert "cls.seq_relationship" in line
    assert "bert.pooler.dense" in line
    assert "\n" not in line
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_an_absent_head_is_said_in_one_line(tmp_path, said, capfd):
    reference = write_tiny_model(tmp_path)
    model = MegatronBertForPreTraining.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        predictions = model(input_ids=IDS).prediction_logits
    torch.testing.assert_close(predictions, logits(reference), rtol=2e-5, atol=2e-5)
    (line,) = said()
    assert "cls.seq_relationship" in line
    assert "newly initialized" in line
    assert "\n" not in line
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_what_another_thread_loads_meanwhile_is_said_as_ever(tmp_path, said, monkeypatch):
    write_tiny_model(tmp_path)
    read = transformers.PreTrainedModel.from_pretrained.__func__

    def read_both(cls, *args, **options):
        with ThreadPoolExecutor() as other:
            other.submit(read, transformers.MegatronBertForPreTraining, tmp_path).result()
        return read(cls, *args, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(read_both))
    MegatronBertForPreTraining.from_pretrained(tmp_path)
    theirs, ours = said()
    assert "LOAD REPORT" in theirs
    assert "LOAD REPORT" not in ours


def test_a_bare_encoder_under_a_head(tmp_path, said):
    reference = write_tiny_model(tmp_path).bert
    reference.save_pretrained(tmp_path)  # no prefix `bert.` and no head
    check_folder(tmp_path)
    model = MegatronBertForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours, theirs = (encoder(IDS).last_hidden_state for encoder in (model.bert, reference))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    (line,) = said()
    assert "cls.predictions" in line


def test_an_encoder_from_under_a_head(tmp_path, said):
    reference = write_tiny_model(tmp_path).bert
    model = MegatronBertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad():
        ours, theirs = (encoder(IDS).last_hidden_state for encoder in (model, reference))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert len(said()) <= 1


def test_a_padded_vocabulary_never_predicts_its_padding(tmp_path):
    reference = write_tiny_model(tmp_path, vocab_size=128)
    with torch.no_grad():
        reference.get_parameter("cls.predictions.bias")[len(VOCABULARY) :] = 50.0
    reference.save_pretrained(tmp_path)
    assert logits(reference).argmax(-1).min() >= len(VOCABULARY)
    model = MegatronBertForMaskedLM.from_pretrained(tmp_path).eval()
    assert logits(model).argmax(-1).max() < len(VOCABULARY)
    real = slice(0, len(VOCABULARY))
    torch.testing.assert_close(logits(model)[..., real], logits(reference)[..., real], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("content", ["version https://git-lfs.github.com/spec/v1", '{"model": null}', "[]", "\ufeff{}"])
def test_a_tokenizer_that_cannot_be_read_is_no_harm_to_the_weights(tmp_path, said, content):
    reference = write_tiny_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    model = MegatronBertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(reference), rtol=2e-5, atol=2e-5)
    (line,) = said()
    assert "the tokenizer beside the weights cannot be read" in line


def test_a_cased_vocabulary_and_nothing_else_beside_the_weights(tmp_path, capsys):
    """As GatorTron's folders: vocab.txt, config.json, pytorch_model.bin."""
    vocabulary = [*VOCABULARY, "Paris", "The", "MRI", "CT"]
    reference = write_tiny_model(tmp_path, vocabulary=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    as_transformers_4(tmp_path, reference.state_dict())
    assert main(["fill-mask", "--model", str(tmp_path), "--json", "--top-k", "1", "The MRI of Paris [MASK]"]) == 0
    captured = capsys.readouterr()
    (mask,) = json.loads(captured.out)["predictions"]
    assert mask[0]["sequence"].startswith("The MRI of Paris")
    (line,) = captured.err.splitlines()
    assert "vocab.txt has tokens with capital letters" in line


def test_weights_in_half_precision(tmp_path):
    reference = write_tiny_model(tmp_path).half()
    reference.save_pretrained(tmp_path)
    model = load_model(MegatronBertForMaskedLM, tmp_path, dtype="float32")
    torch.testing.assert_close(logits(model), logits(reference.float()), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("safe", [True, False])
def test_weights_in_several_files(tmp_path, said, safe):
    reference = write_tiny_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    base, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    weight_map = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        file = f"{base}-{number:05}-of-00002.{suffix}"
        part = {name: weights[name] for name in names}
        if safe:
            save_file(part, tmp_path / file, metadata={"format": "pt"})
        else:
            torch.save(part, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / f"{base}.{suffix}.index.json").write_text(json.dumps(index))
    model = load_model(MegatronBertForMaskedLM, tmp_path)
    torch.testing.assert_close(logits(model), logits(reference), rtol=2e-5, atol=2e-5)
    assert said() == []


@pytest.mark.parametrize("safe", [True, False])
def test_a_model_of_the_hub_is_looked_at_too(tmp_path, monkeypatch, safe):
    """From the hub's own cache, as after a first download."""
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--someone--model"
    folder = cache / "snapshots" / commit
    reference = write_tiny_model(folder, safe=safe)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_model(MegatronBertForMaskedLM, "someone/model", dtype="float32")
    torch.testing.assert_close(logits(loaded), logits(reference), rtol=2e-5, atol=2e-5)

    weights = {name: value for name, value in reference.state_dict().items() if "layer.1.output" not in name}
    if safe:
        weights.pop("cls.predictions.decoder.weight"), weights.pop("cls.predictions.decoder.bias")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"layer\.1\.output\.dense\.weight is not among the weights"):
        load_model(MegatronBertForMaskedLM, "someone/model")


def test_a_smaller_tokenizer_is_no_mistake(tmp_path, capsys):
    write_tiny_model(tmp_path, vocab_size=256)
    assert VOCABULARY[: len(SPECIAL)] == SPECIAL
    assert main(["fill-mask", "--model", str(tmp_path), "the [MASK]"]) == 0
    assert capsys.readouterr().err == ""
