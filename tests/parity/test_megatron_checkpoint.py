"""Checkpoints of Megatron-LM's BERT, and NeMo's, with megatron-core as the peer: converted, they give its logits."""

from __future__ import annotations

import argparse
import copy
import enum
import errno
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import transformers
import yaml
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor

from megatron_bert import AutoTokenizer
from megatron_bert.checkpoint.megatron_files import read_rank
from megatron_bert.cli.main import main
from megatron_bert.model import (
    MegatronBertConfig,
    MegatronBertForCausalLM,
    MegatronBertForMaskedLM,
    MegatronBertForMultipleChoice,
    MegatronBertForPreTraining,
    MegatronBertForSequenceClassification,
    MegatronBertModel,
)
from tests.integration.tiny_megatron import WORDS

HIDDEN, LAYERS, HEADS, VOCABULARY, POSITIONS = 32, 4, 4, 128, 16
ARGUMENTS = {
    "num_layers": LAYERS, "num_attention_heads": HEADS, "layernorm_epsilon": 1e-5, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "init_method_std": 0.02, "bias_gelu_fusion": False, "position_embedding_type":
    "learned_absolute", "normalization": "LayerNorm", "swiglu": False, "group_query_attention": False,
}  # fmt: skip
Weights = dict[str, Tensor]


class Core(NamedTuple):
    """megatron-core's model, and in which dimension its tensor-parallel ranks split each weight."""

    weights: Weights
    split: dict[str, int]
    inputs: tuple[Tensor, Tensor, Tensor]
    logits: Tensor
    pair_logits: Tensor


@pytest.fixture(scope="module", params=[True], ids=["tied"])
def core(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Core]:
    from megatron.core import parallel_state, tensor_parallel  # seconds, which only these tests need
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    store = tmp_path_factory.mktemp("core") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        torch.manual_seed(3)
        config = TransformerConfig(
            num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, use_cpu_initialization=True,
            hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False, bias_dropout_fusion=False,
            bias_activation_fusion=False, masked_softmax_fusion=False, params_dtype=torch.float32,
            pipeline_dtype=torch.float32, layernorm_epsilon=1e-5,
        )  # fmt: skip
        model = BertModel(
            config, num_tokentypes=2, transformer_layer_spec=bert_layer_local_spec, vocab_size=VOCABULARY,
            max_sequence_length=POSITIONS, share_embeddings_and_output_weights=request.param,
        ).eval()  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms, too, so that each is seen to count
                parameter.add_(torch.randn_like(parameter) * 0.1)
        ids = torch.randint(5, VOCABULARY, (2, POSITIONS))
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        types_ = (torch.arange(POSITIONS) > 6).long().expand_as(ids)
        on_cpu = patch("torch.cuda.current_device", return_value="cpu")  # where it makes its buffers
        unforked = patch.object(tensor_parallel.get_cuda_rng_tracker(), "fork", lambda *_: nullcontext())
        with on_cpu, unforked, torch.no_grad():
            logits, pair_logits = model(ids, mask, tokentype_ids=types_)
        weights = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        split = {
            name: parameter.partition_dim
            for name, parameter in model.named_parameters()
            if getattr(parameter, "tensor_model_parallel", False)
        }
        yield Core(weights, split, (ids, mask, types_), logits, pair_logits)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def ranks_of(core: Core, degree: int) -> list[Weights]:
    """As tensor-parallel ranks hold them."""
    return [
        {
            name: weight.chunk(degree, core.split[name])[rank].clone() if name in core.split else weight
            for name, weight in core.weights.items()
        }
        for rank in range(degree)
    ]


def old(weights: Weights, version: float, degree: int = 1) -> dict[str, Any]:
    """The same under the names that Megatron-LM gave before megatron-core (its `language_model.py`, `bert_model.py`),
    and queries, keys and values in that version's order (`checkpointing.py`): see there.
    """
    renamed = {
        "self_attention.linear_qkv": "attention.query_key_value", "self_attention.linear_proj": "attention.dense",
        "pre_mlp_layernorm": "post_attention_layernorm", "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h", "encoder.": "", "embedding.": "", "lm_head.layer_norm": "layernorm",
        "lm_head.": "", "binary_head.": "", "pooler.": "", "output_layer.": "",
    }  # fmt: skip
    language: dict[str, Any] = {"embedding": {}, "transformer": {}, "pooler": {}}
    model: dict[str, Any] = {"language_model": language, "lm_head": {}, "binary_head": {}}
    places = {"embedding": language["embedding"], "encoder": language["transformer"], "pooler": language["pooler"],
              "lm_head": model["lm_head"], "output_layer": model["lm_head"],
              "binary_head": model["binary_head"]}  # fmt: skip
    for name, weight in weights.items():
        if name == "output_layer.weight":  # tied
            continue
        if "linear_qkv" in name:
            heads = HEADS // degree
            grouped = weight.view(heads, 3, HIDDEN // HEADS, *weight.shape[1:])
            order = {0.0: (1, 0, 2), 1.0: (0, 2, 1), 2.0: (0, 1, 2)}[version]
            weight = grouped.permute(*order, *range(3, grouped.ndim)).reshape(weight.shape)
        place = places[name.partition(".")[0]]
        for theirs, earlier in renamed.items():
            name = name.replace(theirs, earlier)
        if place is language["embedding"]:
            place.setdefault(name.removesuffix(".weight"), {})["weight"] = weight
        else:
            place[name] = weight
    return model


def save(folder: Path, models: list[dict[str, Any]], *, stage: int | None = None, **more: Any) -> Path:
    for rank, model in enumerate(models):
        place = folder / (f"mp_rank_{rank:02d}" if stage is None else f"mp_rank_{rank:02d}_{stage:03d}")
        place.mkdir(parents=True)
        torch.save({"model": model, **more}, place / "model_optim_rng.pt")
    return folder


def arguments(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**ARGUMENTS, **changes})


def converted(source: Path, tmp_path: Path, *words: str) -> Path:
    assert main(["convert", str(source), str(tmp_path / "model"), *words]) == 0
    return tmp_path / "model"


def check(folder: Path, core: Core) -> None:
    model = MegatronBertForPreTraining.from_pretrained(folder)
    ids, mask, types_ = core.inputs
    with torch.no_grad():
        output = model(ids, attention_mask=mask, token_type_ids=types_)
    real = mask.bool()
    torch.testing.assert_close(output.prediction_logits[real], core.logits[real], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(output.seq_relationship_logits, core.pair_logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("degree", [1, 2])
def test_megatron_core(core: Core, tmp_path: Path, degree: int, capsys: pytest.CaptureFixture[str]) -> None:
    step = tmp_path / "run" / "iter_0001200"
    save(step, ranks_of(core, degree), args=arguments(tensor_model_parallel_size=degree), checkpoint_version=3.0,
         iteration=1200)  # fmt: skip
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("1200\n")
    check(converted(tmp_path / "run", tmp_path, "--json"), core)
    assert json.loads(capsys.readouterr().out)["steps"] == 1200


@pytest.mark.parametrize(("version", "degree"), [(0.0, 1), (0.0, 2), (1.0, 2), (2.0, 2)])
def test_earlier_names_and_orders(core: Core, tmp_path: Path, version: float, degree: int) -> None:
    models = [old(weights, version, degree) for weights in ranks_of(core, degree)]
    said = {"checkpoint_version": version} if version else {}
    check(converted(save(tmp_path / "old", models, args=arguments(), **said), tmp_path), core)


def test_nvidias_zip_file_says_no_heads(core: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A release of one rank, whose file is of PyTorch before 1.6, without arguments."""
    (file := tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt").parent.mkdir(parents=True)
    torch.save({"model": old(core.weights, 0.0)}, file, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "bert.zip", "w") as archive:
        archive.write(file, "release/mp_rank_00/model_optim_rng.pt")
    assert main(["convert", str(tmp_path / "bert.zip"), str(tmp_path / "model")]) == 2
    assert "0 attention heads cannot be" in capsys.readouterr().err
    check(converted(tmp_path / "bert.zip", tmp_path, "--heads", str(HEADS)), core)
    check(converted(tmp_path, tmp_path / "again", "--heads", str(HEADS)), core)
    check(converted(file, tmp_path / "file", "--heads", str(HEADS)), core)


def test_of_several_steps_in_a_zip_file_it_is_the_newest(
    core: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the folder with `latest_checkpointed_iteration.txt` has it, which need not be the last one in the file."""
    other = {**core.weights, "pooler.dense.bias": core.weights["pooler.dense.bias"] + 1}
    with zipfile.ZipFile(tmp_path / "bert.zip", "w") as archive:
        for step, weights in ((500, core.weights), (1000, other)):
            save(tmp_path / "run" / f"iter_{step:07d}", [weights], args=arguments(), iteration=step)
            name = f"iter_{step:07d}/mp_rank_00/model_optim_rng.pt"
            archive.write(tmp_path / "run" / name, f"./bert/{name}")
    assert main(["convert", str(tmp_path / "bert.zip"), str(tmp_path / "model")]) == 2
    assert "holds bert/iter_0000500, bert/iter_0001000, and no latest_" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "bert.zip", "a") as archive:
        archive.writestr("./bert/latest_checkpointed_iteration.txt", "500\n")
    check(converted(tmp_path / "bert.zip", tmp_path), core)


def test_stages_of_a_pipeline(core: Core, tmp_path: Path) -> None:
    """The first has the embeddings, the last the heads and the tied weight again; each numbers its layers from 0."""
    stages: list[Weights] = [{}, {}]
    for name, weight in core.weights.items():
        if name.startswith("encoder.layers."):
            number = int(name.split(".")[2])
            stages[number // 2][name.replace(f"layers.{number}", f"layers.{number % 2}")] = weight
        else:
            stages[0 if name.startswith("embedding") else 1][name] = weight
    for number, weights in enumerate(stages):
        save(tmp_path / "run", [weights], stage=number, args=arguments(), checkpoint_version=3.0)
    check(converted(tmp_path / "run", tmp_path), core)


def test_fused_norms_and_other_types(core: Core, tmp_path: Path) -> None:
    """Transformer Engine's names; float16; no head for pairs; tanh GELU; objects of types that are not here, made by
    a class, or as Python 3.11.0 to 3.11.3 pickle enumerations, by `getattr`.
    """
    renamed = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_",
               "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}  # fmt: skip
    weights: dict[str, Any] = {"encoder.layers.0.mlp.linear_fc1._extra_state": None}
    for name, weight in core.weights.items():
        if not name.startswith(("binary_head", "pooler")):
            for theirs, fused in renamed.items():
                name = name.replace(theirs, fused)
            weights[name] = weight.half()
    module = types.ModuleType("megatron.elsewhere")
    module.Kind = enum.Enum("Kind", ["bert"], module="megatron.elsewhere")
    with patch.dict(sys.modules, {"megatron.elsewhere": module}):
        made = Evil(getattr, (module.Kind, "bert"))
        save(tmp_path / "run", [weights], args=arguments(kind=module.Kind.bert, made=made, bias_gelu_fusion=True))
    assert read_rank(tmp_path / "run" / "mp_rank_00" / "model_optim_rng.pt")["args"]["num_layers"] == LAYERS
    model = MegatronBertForMaskedLM.from_pretrained(converted(tmp_path / "run", tmp_path))
    assert (model.dtype, model.config.hidden_act) == (torch.float16, "gelu_pytorch_tanh")
    assert torch.equal(
        model.bert.encoder.layer[1].ln.weight, core.weights["encoder.layers.1.pre_mlp_layernorm.weight"].half()
    )
    assert model.config.layer_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("head", "model_class"),
    [
        ({"classification_head.weight": (3, HIDDEN), "classification_head.bias": (3,)},
         MegatronBertForSequenceClassification),
        ({"multichoice_head.weight": (1, HIDDEN), "multichoice_head.bias": (1,)}, MegatronBertForMultipleChoice),
        ({}, MegatronBertModel),
    ],
    ids=["classification", "multichoice", "none"],
)  # fmt: skip
def test_other_heads(core: Core, tmp_path: Path, head: dict[str, tuple[int, ...]], model_class: Any) -> None:
    body = {name: one for name, one in core.weights.items() if not name.startswith(("lm_head", "output", "binary"))}
    weights = {name: torch.randn(shape) for name, shape in head.items()}
    folder = converted(save(tmp_path / "run", [{**body, **weights}], args=arguments()), tmp_path)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [model_class.__name__]
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs = getattr(transformers, model_class.__name__).from_pretrained(folder).eval()
    ids, mask, types_ = core.inputs
    if model_class is MegatronBertForMultipleChoice:
        ids, mask, types_ = ids[None], mask[None], types_[None]
    with torch.no_grad():
        ours, expected = (one.eval()(ids, attention_mask=mask, token_type_ids=types_) for one in (model, theirs))
    seen: Any = ... if head else mask.bool()
    torch.testing.assert_close(ours[0][seen], expected[0][seen], atol=2e-5, rtol=1e-5)
    if head:
        weight, bias = weights.values()
        assert torch.equal(model.classifier.weight, weight)
        assert torch.equal(model.classifier.bias, bias)


class Evil:
    def __init__(self, *what: Any) -> None:
        self.what = what

    def __reduce__(self) -> Any:
        return self.what


def bad_sources(core: Core, folder: Path) -> Iterator[tuple[Path, str]]:
    two = ranks_of(core, 2)
    yield save(folder / "lost", two, args=arguments(tensor_model_parallel_size=4)), "4 tensor-parallel ranks, and 2"
    missing = save(folder / "missing", [*two, two[0]])
    (missing / "mp_rank_01" / "model_optim_rng.pt").unlink()
    yield missing, "tensor-parallel rank 1 is missing"
    yield save(folder / "mixed", [two[0], {**two[1], "pooler.dense.bias": torch.ones(HIDDEN)}], args=arguments()), \
        "pooler.dense.bias on tensor-parallel rank 1 is not rank 0's"  # fmt: skip
    yield save(folder / "post", [core.weights], args=arguments(apply_residual_connection_post_layernorm=True)), \
        "apply_residual_connection_post_layernorm True"  # fmt: skip
    yield save(folder / "gpt", [{**core.weights, "decoder.layers.0.x.weight": torch.ones(1)}], args=arguments()), \
        "decoder.layers.0.x.weight is no weight of a BERT"  # fmt: skip
    yield save(folder / "less", [{k: v for k, v in core.weights.items() if "layers.2.mlp.linear_fc2" not in k}],
               args=arguments()), "bert.encoder.layer.2.output.dense.weight is missing"  # fmt: skip
    yield save(folder / "headless", [{k: v for k, v in core.weights.items() if "lm_head.dense" not in k}],
               args=arguments()), "cls.predictions.transform.dense.weight is missing"  # fmt: skip
    yield save(folder / "fairseq", [{"encoder.sentence_encoder.layer_norm.weight": torch.ones(HIDDEN)}]), \
        "no BERT of Megatron-LM's"  # fmt: skip
    whole = {**core.weights, "pooler.dense.bias": torch.ones(HIDDEN, dtype=torch.int8)}
    yield save(folder / "int8", [whole], args=arguments()), "pooler.dense.bias is [32] of torch.int8"
    with zipfile.ZipFile(folder / "damaged.zip", "w") as archive:
        archive.write(__file__, "mp_rank_00/model_optim_rng.pt")
    damaged = bytearray((folder / "damaged.zip").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (folder / "damaged.zip").write_bytes(damaged)
    yield folder / "damaged.zip", "damaged.zip cannot be unpacked: Bad CRC-32"
    (folder / "tracker").mkdir()
    (folder / "tracker" / "latest_checkpointed_iteration.txt").write_bytes(b"\xff")
    yield folder / "tracker", "latest_checkpointed_iteration.txt names"
    cut = save(folder / "cut", [core.weights], args=arguments()) / "mp_rank_00" / "model_optim_rng.pt"
    cut.write_bytes(cut.read_bytes()[:3000])
    yield cut, "truncated or damaged"
    evil = [("evil", print, "is no checkpoint of Megatron-LM's"), ("worse", os.system, "nothing in it was run")]
    for name, function, said in evil:
        (folder / name).mkdir()
        file = folder / name / "model_optim_rng.pt"
        torch.save({"model": Evil(function, (f"touch {folder / 'run'}",))}, file)
        yield file, said
        assert not (folder / "run").exists()
    yield save(folder / "one", two[:1], args=arguments()), "a whole model's would be"
    yield save(folder / "bare", [{}]), "it has no layer norm"
    (folder / "dist").mkdir()
    (folder / "dist" / "__0_0.distcp").touch()
    yield folder / "dist", "--ckpt-format torch"
    yield folder / "nothing", "no such file or folder"
    for seed in range(40):
        (folder / "noise.pt").write_bytes(random.Random(seed).randbytes(seed * 8))
        yield folder / "noise.pt", "noise.pt "
    (folder / "text.txt").write_text("text")
    yield folder / "text.txt", "has no model"


def nemo(folder: Path, ranks: dict[str, Weights], prefix: str = "model.", mode: str = "w:", **changes: Any) -> Path:
    """A `.nemo` file, as NeMo's `SaveRestoreConnector` writes it: OmegaConf's YAML has 1e-05 as a number without a
    point, which others read as a text, and references to other settings.
    """
    (folder / "files").mkdir(parents=True)
    vocabulary = [*(f"[unused{number}]" for number in range(VOCABULARY - len(WORDS))), *WORDS]
    (folder / "files" / "1f2e_vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    settings = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "encoder_seq_length": POSITIONS,
        "max_position_embeddings": "${.encoder_seq_length}", "hidden_dropout": 0.0, "attention_dropout": "${.x}",
        "layernorm_epsilon": "1e-05", "bias_gelu_fusion": False, "tensor_model_parallel_size":
        len({rank.partition("_pp")[0] for rank in ranks}), "tokenizer": {"library": "megatron", "type":
        "BertWordPieceCase", "vocab_file": "nemo:1f2e_vocab.txt"}, **changes,
    }  # fmt: skip
    (folder / "files" / "model_config.yaml").write_text(yaml.safe_dump(settings).replace("'1e-05'", "1e-05"))
    for rank, weights in ranks.items():
        file = folder / "files" / rank / "model_weights.ckpt"
        file.parent.mkdir(exist_ok=True)
        torch.save({prefix + name: weight for name, weight in weights.items()}, file)
    with tarfile.open(folder / "bert.nemo", mode) as archive:  # type: ignore[call-overload]
        archive.add(folder / "files", arcname=".")
    return folder / "bert.nemo"


def flat(tree: dict[str, Any], prefix: str = "") -> Weights:
    """Old Megatron-LM's nested names as NeMo has them: dotted, with `encoder` and `self_attention`."""
    found: Weights = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            name = f"{prefix}{name}".replace("transformer.", "encoder.")
            found[name.replace(".attention.", ".self_attention.")] = value
    return found


def test_nemo(core: Core, tmp_path: Path) -> None:
    """With the vocabulary in it; of two ranks of a model that was Megatron-LM's first, gzipped; as megatron-core names
    it, in two stages, unpacked.
    """
    folder = converted(nemo(tmp_path / "one", {"": flat(old(core.weights, 2.0))}), tmp_path)
    check(folder, core)
    config = json.loads((folder / "config.json").read_text())
    assert (config["layer_norm_eps"], config["hidden_dropout_prob"]) == (1e-5, 0.0)
    assert (config["attention_probs_dropout_prob"], config["hidden_act"]) == (0.1, "gelu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("The red fox") == ["[UNK]", "red", "fox"]  # not lower-cased
    ranks = {f"mp_rank_{rank:02d}": flat(old(part, 0.0, 2)) for rank, part in enumerate(ranks_of(core, 2))}
    two = nemo(tmp_path / "two", ranks, "model.module.", "w:gz", megatron_legacy=True)
    check(converted(two, tmp_path / "2"), core)
    stages: dict[str, Weights] = {"tp_rank_00_pp_rank_000": {}, "tp_rank_00_pp_rank_001": {}}
    for name, weight in core.weights.items():
        number = int(name.split(".")[2]) if name.startswith("encoder.layers.") else -1
        stage = number // 2 if number >= 0 else int(not name.startswith("embedding"))
        stages[f"tp_rank_00_pp_rank_{stage:03d}"][name.replace(f"layers.{number}", f"layers.{number % 2}")] = weight
    stages["tp_rank_00_pp_rank_001"]["word_embeddings.weight"] = core.weights["embedding.word_embeddings.weight"]
    check(converted(nemo(tmp_path / "stages", stages).parent / "files", tmp_path / "3"), core)


def test_a_full_disk_is_the_one_that_it_is_unpacked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (source := nemo(tmp_path, {"": {}})).rename(tmp_path / "a.nemo")
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("mp_rank_00/model_optim_rng.pt", "")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source.rename(tmp_path / "a.zip")
    for name in ("a.nemo", "a.zip"):
        assert main(["convert", str(tmp_path / name), str(tmp_path / "model")]) == 2
        assert f"error: {tmp_path}/tmp" in capsys.readouterr().err


def test_nemo_tells_megatron_core_of_the_fusion_by_another_name(core: Core, tmp_path: Path) -> None:
    for fused, activation in ((False, "gelu"), (True, "gelu_pytorch_tanh")):
        source = nemo(tmp_path / str(fused), {"": core.weights}, mcore_bert=True, bias_activation_fusion=fused,
                      bias_gelu_fusion=not fused)  # fmt: skip
        folder = converted(source, tmp_path / f"to{fused}")
        assert json.loads((folder / "config.json").read_text())["hidden_act"] == activation


def test_without_a_head_for_pairs_there_are_no_token_types(
    core: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bert_binary_head: False`, or `--bert-no-binary-head`. They add nothing, whatever a tokenizer says."""
    weights = {name: weight for name, weight in core.weights.items()
               if not name.startswith(("binary_head", "pooler", "embedding.tokentype"))}  # fmt: skip
    elsewhere = {"type": "BertWordPieceLowerCase", "vocab_file": "/home/them/vocab.txt"}
    folder = converted(nemo(tmp_path, {"": flat(old(weights, 2.0))}, tokenizer=elsewhere), tmp_path)
    assert "the vocabulary vocab.txt is not in it" in capsys.readouterr().err
    model = MegatronBertForMaskedLM.from_pretrained(folder)
    ids, mask, types_ = core.inputs
    with torch.no_grad():
        one, other = (model(ids, attention_mask=mask, token_type_ids=kinds).logits for kinds in (None, types_))
    assert torch.equal(one, other)


def bad_nemo_files(core: Core, folder: Path) -> Iterator[tuple[Path, str]]:
    weights = {"": flat(old(core.weights, 2.0))}
    yield nemo(folder / "post", weights, transformer_block_type="post_ln"), "transformer_block_type post_ln is not"
    yield nemo(folder / "norm", weights, normalization="layernorm1p"), "normalization layernorm1p is not"
    yield nemo(folder / "ranks", weights, tensor_model_parallel_size=2), "2 tensor-parallel ranks, and 1 are there"
    yield nemo(folder / "less", {}), "has no model_weights.ckpt"
    for name, value, said in [
        ("num_attention_heads", "${.x}", "num_attention_heads '${.x}' is no number above 0"),
        ("num_attention_heads", -4, "num_attention_heads -4 is no number above 0"),
        ("layernorm_epsilon", "${.x}", "has layernorm_epsilon '${.x}', which is no number"),
        ("layernorm_epsilon", True, "has layernorm_epsilon True, which is no number"),
        ("openai_gelu", "False", "has openai_gelu 'False', which is neither true nor false"),
        ("hidden_dropout", 5, "dropout probability has to be between 0 and 1"),
    ]:
        yield nemo(folder / f"{name}{value}", weights, **{name: value}), said
    yield (
        nemo(folder / "list", {"": {}}, model=[1]),
        "no configuration of NeMo's: it holds list",
    )
    cut = nemo(folder / "cut", weights)
    cut.write_bytes(cut.read_bytes()[:20000])
    yield cut, "cut/bert.nemo is truncated or damaged"
    zipped = nemo(folder / "zipped", weights, mode="w:gz")
    zipped.write_bytes(zipped.read_bytes()[:20000])
    yield zipped, "zipped/bert.nemo is truncated or damaged"
    (folder / "noise.nemo").write_bytes(random.Random(1).randbytes(2000))
    yield folder / "noise.nemo", "noise.nemo is truncated or damaged"
    with tarfile.open(folder / "out.nemo", "w") as archive:
        archive.add(folder / "noise.nemo", arcname="../outside")
    yield folder / "out.nemo", "../outside would be written elsewhere"
    xz = bytearray(nemo(folder / "xz", weights, mode="w:xz").read_bytes())
    xz[len(xz) // 2] ^= 255
    (folder / "xz.nemo").write_bytes(xz)
    yield folder / "xz.nemo", "xz.nemo is truncated or damaged"


def written_for_megatron(source: Path, folder: Path, *words: str) -> list[dict[str, Any]]:
    """What each rank's file holds."""
    assert main(["convert", str(source), str(folder), "--to", "megatron", *words]) == 0
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    return [torch.load(file, weights_only=False) for file in sorted((folder / "release").glob("*/model_optim_rng.pt"))]


def same(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_back_to_megatron_core(core: Core, tmp_path: Path) -> None:
    """What `BertModel.load_state_dict` takes, to the bit; of two ranks, as they split it, the vocabulary filled up to
    128 rows for each (`vocab_size_with_padding`).
    """
    folder = converted(nemo(tmp_path / "nemo", {"": flat(old(core.weights, 2.0))}), tmp_path)
    (whole,) = written_for_megatron(folder, tmp_path / "one")
    same(whole["model"], core.weights)
    said = whole["args"]
    assert (said.num_layers, said.num_attention_heads, said.padded_vocab_size) == (LAYERS, HEADS, VOCABULARY)
    assert (said.tokenizer_type, said.norm_epsilon, said.bias_gelu_fusion) == ("BertWordPieceCase", 1e-5, False)
    assert (tmp_path / "one" / "vocab.txt").read_text().splitlines()[-len(WORDS) :] == WORDS
    padded = {**core.weights}
    for name in ("embedding.word_embeddings.weight", "output_layer.bias", "output_layer.weight"):
        if name in padded:
            rows = padded[name].new_full((VOCABULARY, *padded[name].shape[1:]), 0.0 if "weight" in name else -1e4)
            padded[name] = torch.cat([padded[name], rows])
    two = written_for_megatron(folder, tmp_path / "two", "--tensor-parallel", "2")
    for rank, state in enumerate(two):
        same(state["model"], ranks_of(core._replace(weights=padded), 2)[rank])
        assert (state["args"].tensor_model_parallel_size, state["args"].padded_vocab_size) == (2, 2 * VOCABULARY)
    back = MegatronBertForPreTraining.from_pretrained(converted(tmp_path / "two", tmp_path / "back"))
    ids, mask, types_ = core.inputs
    with torch.no_grad():
        logits = back(ids, attention_mask=mask, token_type_ids=types_).prediction_logits
    real = mask.bool()
    torch.testing.assert_close(logits[real][:, :VOCABULARY], core.logits[real], rtol=1e-5, atol=2e-5)
    assert logits[real][:, VOCABULARY:].max() < -9e3
    assert main(["convert", str(folder), str(tmp_path / "two"), "--to", "megatron", "--overwrite"]) == 0
    (tmp_path / "two" / "iter_0000100").mkdir()  # a run of Megatron-LM's went on in it
    assert main(["convert", str(folder), str(tmp_path / "two"), "--to", "megatron", "--overwrite"]) == 2


def test_back_without_a_head_for_pairs(core: Core, tmp_path: Path) -> None:
    """`--bert-no-binary-head`: no pooler, no token types (`pretrain_bert.py`), so that all tokens are of the first."""
    source = tmp_path / "masked"
    MegatronBertForMaskedLM.from_pretrained(
        converted(save(tmp_path / "run", [core.weights], args=arguments()), tmp_path)
    ).save_pretrained(source)
    (state,) = written_for_megatron(source, tmp_path / "back")
    expected = {name: weight for name, weight in core.weights.items()
                if not name.startswith(("binary_head", "pooler", "embedding.tokentype"))}  # fmt: skip
    expected["embedding.position_embeddings.weight"] = (
        core.weights["embedding.position_embeddings.weight"] + core.weights["embedding.tokentype_embeddings.weight"][0]
    )
    same(state["model"], expected)
    assert not state["args"].bert_binary_head


def test_another_tokenizer_than_wordpiece_has_no_vocabulary_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MegatronBertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                intermediate_size=64)  # fmt: skip
    MegatronBertForMaskedLM(config).save_pretrained(tmp_path / "model")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}
    Tokenizer(BPE(vocabulary, [], unk_token="[UNK]")).save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    written_for_megatron(tmp_path / "model", tmp_path / "out")
    assert "vocab.txt is left out: the tokenizer is BPE" in capsys.readouterr().err
    assert not (tmp_path / "out" / "vocab.txt").exists()


def test_a_folder_names_its_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for architectures in ({"a": 1}, 5, None, ["MegatronBertPreTrainedModel"], ["BertModel"]):
        config = {"model_type": "megatron-bert", "architectures": architectures}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert main(["convert", str(tmp_path), str(tmp_path / "model")]) == 2
        assert "config.json names no class of this family" in capsys.readouterr().err


def test_the_weights_of_a_folder_are_not_rounded_to_what_its_configuration_says(tmp_path: Path) -> None:
    config = MegatronBertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                intermediate_size=64)  # fmt: skip
    (model := MegatronBertForMaskedLM(config)).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    back = MegatronBertForMaskedLM.from_pretrained(converted(tmp_path / "source", tmp_path))
    same(back.state_dict(), model.state_dict())


def test_what_megatron_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MegatronBertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                intermediate_size=64)  # fmt: skip
    relu, decoder = copy.deepcopy(config), copy.deepcopy(config)
    relu.hidden_act, decoder.is_decoder = "relu", True
    cases: list[tuple[Any, list[str], str]] = [
        (MegatronBertForSequenceClassification(config), [], "no counterpart of MegatronBertForSequenceClassification"),
        (MegatronBertForCausalLM(decoder), [], "no counterpart of a decoder"),
        (MegatronBertForMaskedLM(relu), [], "has GELU, and this model hidden_act relu"),
        (MegatronBertForMaskedLM(config), ["--tensor-parallel", "3"], "cannot be split over 3 ranks"),
        (MegatronBertForMaskedLM(config), ["--tensor-parallel", "0"], "--tensor-parallel 0 is not a number above 0"),
        (MegatronBertForMaskedLM(config), ["--heads", "2"], "says itself how many heads it has"),
        (MegatronBertForMaskedLM(config), ["--to", "transformers", "--tensor-parallel", "2"], "is for --to megatron"),
    ]
    for number, (model, words, said) in enumerate(cases):
        model.save_pretrained(source := tmp_path / str(number))
        assert main(["convert", str(source), str(tmp_path / "out"), "--to", "megatron", *words]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("core", [False], indirect=True, ids=["untied"])
def test_an_output_layer_of_its_own(core: Core, tmp_path: Path) -> None:
    check(folder := converted(save(tmp_path / "run", ranks_of(core, 2), args=arguments()), tmp_path), core)
    (state,) = written_for_megatron(folder, tmp_path / "back")
    same(state["model"], core.weights)
    model = MegatronBertForPreTraining.from_pretrained(folder)
    torch.nn.init.ones_(model.cls.predictions.bias)  # which is not the decoder's, and counts for nothing
    model.save_pretrained(tmp_path / "two")
    (state,) = written_for_megatron(tmp_path / "two", tmp_path / "again")
    same(state["model"], core.weights)


@pytest.mark.parametrize("heads", ["0", "-4"])
def test_heads_are_a_number_above_0(tmp_path: Path, heads: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path), str(tmp_path / "model"), "--heads", heads]) == 2
    assert f"--heads {heads} is not a number above 0" in capsys.readouterr().err


def test_bad_input_is_one_line(core: Core, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, said in chain(bad_sources(core, tmp_path), bad_nemo_files(core, tmp_path / "nemo")):
        assert main(["convert", str(source), str(tmp_path / "model")]) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert not captured.out, "something in a file was run"
        assert captured.err.count("\n") == 1
        assert not (tmp_path / "model").exists()
