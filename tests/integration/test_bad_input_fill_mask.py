"""Every mistake a person can make with fill-mask: one clear line on stderr, exit code 2, nothing on stdout."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_bert.cli.main import main
from megatron_bert.inference.predictor import MaskPredictor
from megatron_bert.model import MegatronBertForMaskedLM
from tests.integration.tiny_model import VOCABULARY, write_tiny_model

BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}
COMMAND = [sys.executable, "-m", "megatron_bert", "fill-mask"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    write_tiny_model(folder)
    return folder


@pytest.fixture
def model(tmp_path):
    """A model's folder for the test to spoil."""
    write_tiny_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refused(capsys):
    """Runs fill-mask, expects it to refuse in one line with exit code 2, and returns the line."""

    def run(*words: object) -> str:
        assert main(["fill-mask", *map(str, words)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("megatron-bert fill-mask: error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


class TestTexts:
    def test_no_mask(self, refused, good):
        error = refused("--model", good, "the [MASK]", "no mask in this")
        assert "text 2: no mask; write [MASK] or <mask> in it" in error

    def test_too_long_says_how_many_tokens_and_the_limit(self, refused, good):
        text = "the [MASK] " + "of " * 30
        assert "text 1: 34 tokens, and the model takes 32; --truncate" in refused("--model", good, text)

    def test_a_mask_that_truncation_would_cut_away(self, refused, good):
        error = refused("--model", good, "--truncate", "of " * 40 + "[MASK]")
        assert "text 1: no mask within its first 32 tokens" in error

    def test_empty_text(self, refused, good):
        assert "text 1: no mask" in refused("--model", good, "")

    def test_an_argument_that_is_not_utf8(self, refused, good):
        assert "text 1, character 8: not UTF-8" in refused("--model", good, os.fsdecode(b"[MASK] \xff"))

    def test_no_text_at_all(self, refused, good, monkeypatch):
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        assert "no text: give texts as arguments, in --file F, or on the standard input" in refused("--model", good)

    def test_texts_and_a_file(self, refused, good):
        assert "not both" in refused("--model", good, "--file", "x.txt", "a [MASK]")


class TestFiles:
    def test_missing(self, refused, good, tmp_path):
        assert f"--file {tmp_path}/no.txt: no such file" in refused("--model", good, "--file", tmp_path / "no.txt")

    def test_a_folder(self, refused, good, tmp_path):
        assert f"{tmp_path}: Is a directory" in refused("--model", good, "--file", tmp_path)

    def test_empty(self, refused, good, tmp_path):
        (tmp_path / "empty.txt").write_text("\n\n")
        assert "empty.txt is empty: one text a line" in refused("--model", good, "--file", tmp_path / "empty.txt")

    def test_not_utf8_names_line_and_byte(self, refused, good, tmp_path):
        (tmp_path / "latin.txt").write_bytes("the [MASK]\ncaf\xe9 [MASK]\n".encode("latin-1"))
        error = refused("--model", good, "--file", tmp_path / "latin.txt")
        assert "latin.txt, line 2, byte 4: not UTF-8 (0xe9)" in error

    @pytest.mark.parametrize(("line", "complaint"), [("no mask", "no mask"), ("the [MASK] " * 20, "42 tokens")])
    def test_a_bad_line_is_named_before_anything_is_predicted(self, refused, good, tmp_path, line, complaint):
        lines = ["the [MASK]"] * 2000
        lines[1500] = line
        (tmp_path / "texts.txt").write_text("\n".join(lines))
        error = refused("--model", good, "--file", tmp_path / "texts.txt")
        assert f"texts.txt, line 1501: {complaint}" in error

    def test_a_bad_line_on_standard_input(self, good, command):
        words = [command / "megatron-bert", "fill-mask", "--model", good]
        result = subprocess.run(words, input=b"the [MASK]\nno mask\n", capture_output=True, check=False)
        assert (result.returncode, result.stdout) == (2, b"")
        assert result.stderr.startswith(b"megatron-bert fill-mask: error: standard input, line 2: no mask;")


class TestFolders:
    def test_missing_path(self, refused, tmp_path):
        assert f"{tmp_path}/no: no such file or folder" in refused("--model", tmp_path / "no", "[MASK]")

    def test_a_mistyped_relative_path_never_asks_the_hub(self, refused, tmp_path, monkeypatch, good):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        assert "runs/dmo: no such file or folder" in refused("--model", "runs/dmo", "[MASK]")

    def test_a_name_that_the_hub_cannot_be_asked_for(self, refused):
        error = refused("--model", "nobody-has-this", "[MASK]")
        assert "nobody-has-this: no such file or folder here, and no model of that name to be had from the hub" in error

    def test_a_file(self, refused, good):
        error = refused("--model", good / "model.safetensors", "[MASK]")
        assert "model.safetensors is a file; a model is a folder" in error

    def test_a_directory_without_a_model(self, refused, tmp_path):
        assert f"{tmp_path} has no model: no config.json in it" in refused("--model", tmp_path, "[MASK]")

    def test_a_directory_above_the_model(self, refused, model):
        assert f"(did you mean {model}?)" in refused("--model", model.parent, "[MASK]")

    def test_a_configuration_without_weights(self, refused, model):
        (model / "model.safetensors").unlink()
        error = refused("--model", model, "[MASK]")
        assert "has no model: config.json, but no model.safetensors and no pytorch_model.bin" in error

    def test_no_tokenizer(self, refused, model):
        (model / "tokenizer.json").unlink()
        assert "has no tokenizer: neither vocab.txt nor tokenizer.json" in refused("--model", model, "[MASK]")

    def test_a_tokenizer_that_is_cut_short(self, refused, model):
        text = (model / "tokenizer.json").read_text()
        (model / "tokenizer.json").write_text(text[: len(text) // 2])
        assert f"cannot read the tokenizer of {model}" in refused("--model", model, "[MASK]")


class TestConfiguration:
    def change(self, model: Path, **values: object) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | values))

    def test_not_json(self, refused, model):
        (model / "config.json").write_text('{"model_type": ')
        assert "config.json is not JSON: Expecting value: line 1" in refused("--model", model, "[MASK]")

    def test_not_an_object(self, refused, model):
        (model / "config.json").write_text("[]")
        assert "config.json is not a JSON object" in refused("--model", model, "[MASK]")

    def test_another_models(self, refused, model):
        self.change(model, model_type="bert")
        error = refused("--model", model, "[MASK]")
        assert "config.json: the model type is 'bert', and only 'megatron-bert' loads here" in error

    def test_heads_that_do_not_divide_the_hidden_size(self, refused, model):
        self.change(model, num_attention_heads=5)
        assert "num_attention_heads 5 does not divide hidden_size 32" in refused("--model", model, "[MASK]")

    def test_no_heads(self, refused, model):
        self.change(model, num_attention_heads=0)
        assert "num_attention_heads 0 does not divide" in refused("--model", model, "[MASK]")

    def test_a_value_of_the_wrong_kind(self, refused, model):
        self.change(model, hidden_size="many")
        assert "config.json: " in refused("--model", model, "[MASK]")

    @pytest.mark.parametrize(
        ("name", "value", "complaint"),
        [
            ("intermediate_size", 65, "intermediate.dense.weight is 64 x 32 and the configuration says 65 x 32"),
            (
                "vocab_size",
                200,
                f"word_embeddings.weight is {len(VOCABULARY)} x 32 and the configuration says 200 x 32",
            ),
            ("num_hidden_layers", 3, "the weights have 2 layers and the configuration says 3"),
            ("hidden_act", "none", "hidden_act 'none' is no activation"),
            ("pad_token_id", 500, f"pad_token_id 500 is not below vocab_size {len(VOCABULARY)}"),
            ("add_cross_attention", True, "add_cross_attention needs is_decoder"),
            ("position_embedding_type", "relative_key", "'relative_key': this model's positions are absolute"),
        ],
    )
    def test_a_configuration_of_other_weights(self, refused, model, name, value, complaint):
        self.change(model, **{name: value})
        assert complaint in refused("--model", model, "[MASK]")

    @pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
    def test_quantized_weights_name_the_package_that_they_need(self, refused, model):
        self.change(model, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
        assert "requires bitsandbytes" in refused("--model", model, "[MASK]")

    def test_a_vocabulary_smaller_than_the_tokenizers(self, refused, tmp_path):
        write_tiny_model(tmp_path)
        larger = {token: number for number, token in enumerate([*VOCABULARY, "more", "words"])}
        transformers.BertTokenizer(vocab=larger).save_pretrained(tmp_path)
        error = refused("--model", tmp_path, "the [MASK]")
        assert f"the tokenizer has {len(larger)} tokens and the model rows for {len(VOCABULARY)}" in error


class TestWeights:
    @pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
    def test_truncated_safetensors(self, refused, model, kept):
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        assert "model.safetensors is truncated or damaged" in refused("--model", model, "[MASK]")

    @pytest.mark.parametrize("content", [b"\xff" * 100, b"\x10" + b"\0" * 7 + b"not json, at all" + b"\0" * 50])
    def test_corrupt_safetensors(self, refused, model, content):
        (model / "model.safetensors").write_bytes(content)
        assert "model.safetensors is truncated or damaged" in refused("--model", model, "[MASK]")

    def test_weights_that_are_not_numbers(self, refused, model):
        weights = load_file(model / "model.safetensors")
        weights["bert.encoder.ln.weight"].fill_(float("nan"))
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        error = refused("--model", model, "--dtype", "float32", "[MASK]")
        assert "the model's scores are not numbers in float32: the weights are damaged" in error

    @pytest.mark.parametrize(
        ("name", "rows", "complaint"),
        [
            ("embeddings.position_embeddings.weight", 0, "is not among the weights"),
            ("encoder.layer.1.attention.self.query.bias", 0, "is not among the weights"),
            ("encoder.layer.1.attention.self.query.weight", 16, "is 16 x 32 and the configuration says 32 x 32"),
        ],
    )
    def test_a_weight_that_is_lost_or_of_another_shape(self, refused, model, name, rows, complaint):
        """Initialised afresh, it would make predictions of chance."""
        weights = load_file(model / "model.safetensors")
        weight = weights.pop(f"bert.{name}")
        if rows:
            weights[f"bert.{name}"] = weight[:rows].clone()
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        assert f"{name} {complaint}" in refused("--model", model, "[MASK]")

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_a_git_lfs_pointer(self, refused, model, name):
        (model / "model.safetensors").unlink()
        (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1344997306\n")
        assert f"{name} is a git-lfs pointer and not the weights" in refused("--model", model, "[MASK]")

    def test_a_shard_is_missing(self, refused, model):
        (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
        weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        error = refused("--model", model, "[MASK]")
        assert "model-00002-of-00002.safetensors is missing, one of the 2 files" in error

    def test_no_masked_lm_head(self, refused, model):
        weights = load_file(model / "model.safetensors")
        save_file({name: value for name, value in weights.items() if name.startswith("bert.")},
                  model / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
        assert "has no cls.predictions.transform.* among its weights" in refused("--model", model, "[MASK]")

    def test_pickled_weights_that_are_cut_short(self, refused, tmp_path):
        write_tiny_model(tmp_path, safe=False)
        file = tmp_path / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:-2000])
        assert "pytorch_model.bin is truncated or damaged" in refused("--model", tmp_path, "[MASK]")

    def test_a_pickle_that_holds_no_weights(self, refused, tmp_path):
        write_tiny_model(tmp_path, safe=False)
        torch.save([1, 2], tmp_path / "pytorch_model.bin")
        assert "pytorch_model.bin holds a list and not weights by name" in refused("--model", tmp_path, "[MASK]")


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class TestCode:
    """Pickled weights that carry code are refused, and the code does not run."""

    def save(self, kind: str, contents: object, file: Path) -> None:
        if kind == "raw":
            file.write_bytes(pickle.dumps(contents))
        else:
            torch.save(contents, file, _use_new_zipfile_serialization=kind == "zip")

    @pytest.mark.parametrize("kind", ["zip", "legacy", "raw"])
    def test_refused(self, refused, tmp_path, kind):
        weights = write_tiny_model(tmp_path, safe=False).state_dict()
        file, trace = tmp_path / "pytorch_model.bin", tmp_path / "it-ran"
        contents = {**weights, "extra": Payload(f"touch '{trace}'")}
        self.save(kind, contents, file)
        error = refused("--model", tmp_path, "[MASK]")
        assert f"{file} holds " in error
        assert "refused, and nothing in it was run" in error
        assert not trace.exists()

    def test_the_payload_works(self, tmp_path):
        """So that the test above can fail."""
        trace = tmp_path / "it-ran"
        self.save("zip", Payload(f"touch '{trace}'"), tmp_path / "file.bin")
        torch.load(tmp_path / "file.bin", weights_only=False)
        assert trace.exists()

    def test_what_it_would_have_run_is_named(self, refused, tmp_path):
        write_tiny_model(tmp_path, safe=False)
        self.save("zip", {"weight": torch.ones(1), "extra": Payload("true")}, tmp_path / "pytorch_model.bin")
        assert "code or objects (posix.system) beside the weights" in refused("--model", tmp_path, "[MASK]")

    def test_in_a_shard(self, refused, tmp_path):
        write_tiny_model(tmp_path, safe=False)
        trace = tmp_path / "it-ran"
        (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00002.bin")
        self.save("zip", {"b": Payload(f"touch '{trace}'")}, tmp_path / "pytorch_model-00002-of-00002.bin")
        weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert "pytorch_model-00002-of-00002.bin holds code" in refused("--model", tmp_path, "[MASK]")
        assert not trace.exists()

    def test_code_that_a_configuration_names_is_not_imported(self, tmp_path, capsys):
        write_tiny_model(tmp_path)
        trace = tmp_path / "it-ran"
        (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
        config = json.loads((tmp_path / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForMaskedLM": "evil.Model"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert main(["fill-mask", "--model", str(tmp_path), "the [MASK]"]) == 0
        assert not trace.exists()
        assert "the [MASK]" in capsys.readouterr().out


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more")


class TestOptions:
    @pytest.mark.parametrize("option", ["--top-k", "--batch-tokens"])
    @pytest.mark.parametrize("value", ["0", "-3", "many", "1.5"])
    def test_numbers(self, refused, good, option, value):
        assert f"argument {option}: {value!r} is not a whole number" in refused(
            "--model", good, option, value, "[MASK]"
        )

    def test_more_candidates_than_tokens(self, refused, good):
        error = refused("--model", good, "--top-k", 100000, "the [MASK]")
        assert f"top-k 100000 is not between 1 and the vocabulary's {len(VOCABULARY)} tokens" in error

    def test_a_gpu_where_there_is_none(self, refused, good, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "device cuda is not there: PyTorch" in refused("--model", good, "--device", "cuda", "the [MASK]")

    def test_a_gpu_that_is_too_small_for_a_batch(self, refused, good, monkeypatch):
        monkeypatch.setattr(MaskPredictor, "_computed", out_of_memory)
        error = refused("--model", good, "--batch-tokens", "64", "the [MASK]")
        assert "out of GPU memory: use fewer --batch-tokens than 64" in error

    def test_a_gpu_that_is_too_small_for_the_weights(self, refused, good, monkeypatch):
        monkeypatch.setattr(MegatronBertForMaskedLM, "to", out_of_memory)
        error = refused("--model", good, "the [MASK]")
        assert f"out of GPU memory: the weights of {good} do not fit; use --dtype bfloat16, --device cpu" in error

    def test_an_unknown_device(self, refused, good):
        assert "unknown device 'tpu'" in refused("--model", good, "--device", "tpu", "the [MASK]")

    def test_an_unknown_type(self, refused, good):
        assert "argument --dtype: invalid choice: 'int8'" in refused("--model", good, "--dtype", "int8", "the [MASK]")


def test_no_disk_space_for_the_output(good):
    command = [*COMMAND, "--model", str(good), "the [MASK]"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED, check=False)
    assert result.returncode == 2
    assert result.stderr == "megatron-bert fill-mask: error: cannot write the output: No space left on device\n"
