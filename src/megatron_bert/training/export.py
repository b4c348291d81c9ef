"""The trained model as a folder that Transformers loads."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_bert.data.files import written_aside

__all__ = ["write_model_folder"]


def write_model_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files to `folder`, whole or not at all; a folder that
    is there already is replaced.

    Raises:
        OSError: what the file system says.
    """
    with written_aside(folder, folder=True) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
