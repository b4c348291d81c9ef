"""Tiny files of fine-tuning tasks that can be learnt, and recipes for them; made of the words of `tiny_model`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.integration.tiny_model import VOCABULARY, write_tiny_model

PLACES = {"paris": "LOC", "london": "LOC", "france": "LAND", "england": "LAND"}
OTHERS = ["the", "of", "and", "is", "in", "to", "river", "seine", "thames", "big", "old", "city"]


def sentences(num: int, seed: int) -> list[list[str]]:
    """Sentences of 4 to 9 words, a place in each."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        words = [str(word) for word in random.choice(OTHERS, random.integers(3, 9))]
        words.insert(int(random.integers(len(words) + 1)), str(random.choice([*PLACES])))
        made.append(words)
    return made


def write_ner(file: Path, num: int, seed: int) -> Path:
    """CoNLL columns: places are entities of two types."""
    lines = ["".join(f"{word} {'B-' + PLACES[word] if word in PLACES else 'O'}\n" for word in words)
             for words in sentences(num, seed)]  # fmt: skip
    file.write_text("\n".join(lines))
    return file


def write_classes(file: Path, num: int, seed: int) -> Path:
    """CSV: whether the place is a city or a country."""
    rows = [" ".join(words) + "," + next(PLACES[word] for word in words if word in PLACES).lower()
            for words in sentences(num, seed)]  # fmt: skip
    file.write_text("\n".join(["text,label", *rows]) + "\n")
    return file


def write_qa(file: Path, num: int, seed: int, *, unanswerable: bool = False) -> Path:
    """JSON lines: where is the place?"""
    lines = []
    for number, words in enumerate(sentences(num, seed)):
        context, place = " ".join(words), next(word for word in words if word in PLACES)
        answers = [{"text": place, "answer_start": context.index(place)}]
        if unanswerable and number % 3 == 0:
            context, answers = context.replace(place, "old"), []
        lines.append({"id": str(number), "question": "the city is in ?", "context": context, "answers": answers})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_choices(file: Path, num: int, seed: int) -> Path:
    """RACE's format: which of four words is a place."""
    random = np.random.default_rng(seed)
    lines = []
    for number, words in enumerate(sentences(num, seed)):
        options = [str(word) for word in random.choice(OTHERS, 4, replace=False)]
        answer = int(random.integers(4))
        options[answer] = next(word for word in words if word in PLACES)
        lines.append({"id": str(number), "article": " ".join(words), "questions": ["the city is _ ?"],
                      "options": [options], "answers": ["ABCD"[answer]]})  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


WRITERS = {"ner": ("txt", write_ner), "classify": ("csv", write_classes), "squad": ("jsonl", write_qa),
           "race": ("jsonl", write_choices)}  # fmt: skip


def prepare_tasks(folder: Path, multiple: int = 1) -> None:
    """A tiny model, whose vocabulary is padded to this multiple, and for each task a file to train on and one to
    validate on."""
    size = -(-len(VOCABULARY) // multiple) * multiple
    write_tiny_model(folder / "start", vocab_size=size, max_position_embeddings=64, initializer_range=0.1)
    for task, (suffix, write) in WRITERS.items():
        write(folder / f"{task}-train.{suffix}", 96, 1)
        write(folder / f"{task}-dev.{suffix}", 33, 2)  # an odd one, for ranks


def write_task_recipe(folder: Path, task: str, name: str, **changes: Any) -> Path:
    """A recipe that writes to `folder`/`name`; `changes` override its values as `section__key=value`."""
    suffix = WRITERS[task][0]
    recipe: dict[str, Any] = {
        "output": str(folder / name),
        "model": {"start_from": str(folder / "start"), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "data": {
            "train": str(folder / f"{task}-train.{suffix}"), "validation": str(folder / f"{task}-dev.{suffix}"),
            "max_length": 48,
        },
        "optimizer": {"learning_rate": 3e-3},
        "training": {"epochs": 1, "batch_samples": 16},
        "runtime": {"device": "cpu", "log_every_steps": 1},
    }  # fmt: skip
    for path, value in changes.items():
        section, key = path.split("__")
        recipe.setdefault(section, {})[key] = value
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file
