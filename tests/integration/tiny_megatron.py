"""A tiny checkpoint as NVIDIA's 345M is: one rank's file in a zip file, without arguments, and its vocabulary."""

import zipfile
from pathlib import Path
from typing import Any

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "fox", "crossed", "river", "."]


def write_tiny_megatron(folder: Path, hidden: int = 128, layers: int = 2, vocabulary: int = 128) -> None:
    """`megatron_bert_345m.zip` and `vocab.txt` in `folder`."""

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
