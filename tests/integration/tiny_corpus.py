"""A tiny corpus, tokenizer, token file and recipe: the chain up to pretraining in a second or two."""

import json
from pathlib import Path

import yaml

from megatron_bert.cli.main import main

SUBJECTS = ["the red fox", "a small dog", "the old king", "my sister", "the doctor"]
VERBS = ["sees", "likes", "follows", "paints"]
OBJECTS = ["the river", "a house", "the moon", "an apple"]


def documents(num: int = 40) -> list[str]:
    """Documents of five sentences with much that can be learnt: a verb has its object, and the numbers count up."""
    texts = []
    for at in range(num):
        sentences = []
        for line in range(5):
            verb = (at + line) % len(VERBS)
            sentences.append(f"Number {line}: {SUBJECTS[(at * 3 + line) % 5]} {VERBS[verb]} {OBJECTS[verb]}.")
        texts.append(" ".join(sentences))
    return texts


def write_jsonl(file: Path, texts: list[str], key: str = "text") -> Path:
    file.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return file


def write_recipe(folder: Path, **changes: object) -> Path:
    """A recipe for `folder`, whose values `changes` override as `section__key=value`."""
    recipe = {
        "output": str(folder / "run"),
        "model": {
            "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64,
            "initializer_range": 0.06, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        "data": {
            "tokens": str(folder / "text"), "tokenizer": str(folder / "tokenizer"), "validation_share": 0.1,
            "row_tokens": 48,
        },
        "optimizer": {"learning_rate": 5e-3},
        "training": {"steps": 6, "warmup_steps": 2, "batch_samples": 8},
        "runtime": {"log_every_steps": 2, "evaluate_every_steps": 3, "device": "cpu"},
    }  # fmt: skip
    for name, value in changes.items():
        place, keys = recipe, name.split("__")
        for key in keys[:-1]:
            place = place[key]  # type: ignore[assignment]
        place[keys[-1]] = value  # type: ignore[index]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def prepare(folder: Path, texts: list[str] | None = None) -> Path:
    """Makes corpus.jsonl, tokenizer/, the token file text.* and recipe.yaml in `folder` by the command's own verbs."""
    corpus = write_jsonl(folder / "corpus.jsonl", documents() if texts is None else texts)
    tokenizer = str(folder / "tokenizer")
    assert main(["tokenizer", "train", "--input", str(corpus), "--output", tokenizer, "--vocab-size", "200"]) == 0
    assert main(["preprocess", "--input", str(corpus), "--tokenizer", tokenizer, "--output", str(folder / "text")]) == 0
    return write_recipe(folder)
