"""A tiny megatron-bert folder, made by Transformers' own classes: what a published checkpoint is, in small."""

from pathlib import Path
from typing import Any

import torch
import transformers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'"
WORDS = "the of and is in a to paris london france england capital city river seine thames big old"
CHINESE = "植物通过光合作用产生能量"
VOCABULARY = list(dict.fromkeys([*SPECIAL, *LETTERS, *CHINESE, *(f"##{letter}" for letter in LETTERS), *WORDS.split()]))


def write_tiny_model(
    folder: Path,
    *,
    vocabulary: list[str] = VOCABULARY,
    model_class: Any = transformers.MegatronBertForMaskedLM,
    safe: bool = True,
    **config: Any,
) -> Any:
    """Writes weights, configuration and tokenizer to `folder`; returns the model (Transformers' class, evaluating).

    The weights are large enough that predictions differ clearly between texts. `safe`: as safetensors, else pickled.
    """
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    options = {
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        **shape,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(transformers.MegatronBertConfig(**options)).eval()
        torch.nn.init.normal_(model.get_parameter("cls.predictions.bias"))
    transformers.utils.logging.disable_progress_bar()  # tests read what comes on stderr after this
    model.save_pretrained(folder)
    if not safe:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    ids = {token: number for number, token in enumerate(vocabulary)}
    transformers.BertTokenizer(vocab=ids).save_pretrained(folder)
    return model
