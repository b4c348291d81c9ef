"""The tiny checkpoints that Transformers' pipeline mixin works on, made here instead of taken from the hub.

Layout, as the mixin expects it: `reports/tiny_model_summary.json`, and `megatron-bert/CLASS/` with weights,
configuration and a WordPiece tokenizer.
"""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import BertTokenizer

from .model_tester import ALL_CLASSES, MegatronBertConfig, MegatronBertForCausalLM

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = """paris london rome berlin is the capital of france england italy germany . , ? it was a good day in city
this text about politics science sport health i like do not and or new york river museum"""
LETTERS = list("abcdefghijklmnopqrstuvwxyz")
VOCABULARY = [*SPECIAL_TOKENS, *WORDS.split(), *LETTERS, *(f"##{letter}" for letter in LETTERS)]


@functools.cache
def directory() -> Path:
    """A folder for this process, removed when it ends, with the summary that lists our classes."""
    root = Path(tempfile.mkdtemp(prefix="tiny-megatron-bert-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    classes = {cls.__name__: {"tokenizer_classes": ["BertTokenizer"], "processor_classes": []} for cls in ALL_CLASSES}
    (root / "reports").mkdir()
    (root / "reports" / "tiny_model_summary.json").write_text(json.dumps(classes), encoding="utf-8")
    return root


@functools.cache
def save_models() -> Path:
    """Writes one checkpoint with its tokenizer for every class; returns `directory()`."""
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(dict.fromkeys(VOCABULARY))})
    # Two labels for one meaning each: the zero-shot pipeline looks for "entailment" by name.
    labels = {0: "contradiction", 1: "neutral", 2: "entailment"}
    for cls in ALL_CLASSES:
        config = MegatronBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=128,
            is_decoder=cls is MegatronBertForCausalLM,
            id2label=labels,
            label2id={label: index for index, label in labels.items()},
        )
        torch.manual_seed(0)
        folder = directory() / config.model_type / cls.__name__
        cls(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return directory()
