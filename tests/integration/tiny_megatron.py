"""A tiny checkpoint as NVIDIA's 345M is: one rank's file in a zip file, without arguments, and its vocabulary; and the
same in a file of NeMo's.
"""

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "fox", "crossed", "river", "."]


def write_tiny_megatron(folder: Path, hidden: int = 128, layers: int = 2, vocabulary: int = 128) -> None:
    """`megatron_bert_345m.zip`, `vocab.txt` and `gatortron_og.nemo` in `folder`."""

    def module(*shape: int, bias: bool = True) -> dict[str, Any]:
        return {"weight": torch.randn(*shape) * 0.05} | ({"bias": torch.zeros(shape[0])} if bias else {})

    parts = {
        "input_layernorm": (hidden,), "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden), "post_attention_layernorm": (hidden,),
        "mlp.dense_h_to_4h": (4 * hidden, hidden), "mlp.dense_4h_to_h": (hidden, 4 * hidden),
    }  # fmt: skip
    transformer = {
        f"layers.{number}.{name}": module(*shape) for number in range(layers) for name, shape in parts.items()
    }
    rows = {"word_embeddings": vocabulary, "position_embeddings": 64, "tokentype_embeddings": 2}
    embedding = {name: module(number, hidden, bias=False) for name, number in rows.items()}
    head = {"dense": module(hidden, hidden), "layernorm": module(hidden), "bias": torch.zeros(vocabulary)}
    language = {
        "embedding": embedding,
        "transformer": {**transformer, "final_layernorm": module(hidden)},
        "pooler": {"dense": module(hidden, hidden)},
    }
    file = folder / "model_optim_rng.pt"
    torch.save({"model": {"language_model": language, "lm_head": head, "binary_head": module(2, hidden)}}, file)
    with zipfile.ZipFile(folder / "megatron_bert_345m.zip", "w") as archive:
        archive.write(file, "release/mp_rank_00/model_optim_rng.pt")
    file.unlink()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    _write_nemo(folder, {"language_model": language, "lm_head": head, "binary_head": module(2, hidden)})


def _write_nemo(folder: Path, model: dict[str, Any]) -> None:
    def flat(tree: dict[str, Any], prefix: str) -> dict[str, torch.Tensor]:
        parts = (flat(value, f"{prefix}.{name}") if isinstance(value, dict) else {f"{prefix}.{name}": value}
                 for name, value in tree.items())  # fmt: skip
        return {name: value for part in parts for name, value in part.items()}

    settings = folder / "model_config.yaml"
    settings.write_text("num_attention_heads: 2\nmegatron_legacy: true\ntokenizer: {vocab_file: nemo:vocab.txt, "
                        "type: BertWordPieceLowerCase}\n")  # fmt: skip
    weights = folder / "model_weights.ckpt"
    torch.save(flat(model, "model"), weights)
    with tarfile.open(folder / "gatortron_og.nemo", "w") as archive:
        for file in (settings, weights, folder / "vocab.txt"):
            archive.add(file, arcname=f"./{file.name}")
    settings.unlink()
    weights.unlink()
