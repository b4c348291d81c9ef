"""The trained model as a folder that Transformers loads."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_bert.checkpoint.native import load_model_weights, newest_good, read_state, step_of
from megatron_bert.data.files import written_aside
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.data.vocabulary import fingerprint
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig
from megatron_bert.training.network import empty_network

__all__ = ["convert_run", "write_model_folder"]


def write_model_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files to `folder`, whole or not at all; a folder that
    is there already is replaced.

    Raises:
        OSError: what the file system says.
    """
    with written_aside(folder, folder=True) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def convert_run(run: Path, folder: Path, *, tokenizer: Path | None = None, overwrite: bool = False) -> int:
    """Writes the newest good checkpoint of a pretraining run as a model folder, finished or not; the run may go on
    meanwhile.

    Args:
        tokenizer: the run's, where it is no longer at its recipe's `data.tokenizer`.
        overwrite: replace `folder`.

    Returns:
        the number of steps that the model was trained for.

    Raises:
        UserError: `run` is none or has no good checkpoint, `folder` is there already, or the tokenizer is missing or
            another one.
        OSError: what the file system says.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give the output folder of a pretraining run")
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} is there already; choose another folder or add --overwrite")
    if folder.resolve() in (run.resolve(), *run.resolve().parents):
        raise UserError(f"{folder} would replace the run; choose another folder")
    checkpoint = newest_good(run)
    state = read_state(checkpoint)
    loaded = _tokenizer(tokenizer or Path(state["recipe"]["data"]["tokenizer"]), state["identity"]["data.tokenizer"])
    config = MegatronBertConfig.from_dict(state["config"])
    network = empty_network(config, causal=state["recipe"]["objective"]["kind"] == "causal")
    network.load_state_dict(load_model_weights(checkpoint))
    write_model_folder(network, loaded, folder)
    return step_of(checkpoint)


def _tokenizer(path: Path, wanted: str) -> PreTrainedTokenizerBase:
    if not path.exists():
        raise UserError(f"{path}, the run's data.tokenizer, is not there any more; name it with --tokenizer DIR")
    loaded = load_tokenizer(path)
    if fingerprint(loaded.backend_tokenizer) != wanted:
        raise UserError(f"{path} is another tokenizer than the run was trained with; name that with --tokenizer DIR")
    return loaded
