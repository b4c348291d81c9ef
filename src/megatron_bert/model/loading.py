"""Loading published checkpoints: what is absent or extra is said in one line, and padding rows are recognised."""

import json
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from transformers.utils.hub import cached_file

__all__ = ["PROJECTION_BIASES", "LoadingMixin", "num_tokens_beside", "report_differences"]

logger = logging.getLogger(__name__)

_REPORTING_LOGGER = logging.getLogger("transformers.modeling_utils")
# How Transformers' messages about absent and extra weights are told: its table, and an absent tied head.
_REPORT_SIGNS = ("LOAD REPORT", "tied weights mapping")
# Where embeddings are not tied these are two parameters, of which the second one counts.
PROJECTION_BIASES = ("cls.predictions.bias", "cls.predictions.decoder.bias")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class LoadingMixin:
    """`from_pretrained` for checkpoints as they are found."""

    num_tokens: int | None = None
    """Tokens of the checkpoint's own tokenizer; the vocabulary's rows beyond are padding and are never predicted.

    None where no tokenizer lies beside the weights. Not part of the configuration: it is looked up at each load.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Transformers' `from_pretrained`: same arguments, result and errors.

        Weights of absent and extra heads are reported in one line each. The vocabulary's padding rows are recognised by
        the tokenizer beside the weights. The projection's bias may have either of its two names, tied or not.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        records: list[logging.LogRecord] = []
        try:
            with _held_back_report(records):
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
                )
        except Exception:
            _replay(records)
            raise
        _complete_bias(model, info["missing_keys"])
        if info.get("mismatched_keys") or info.get("error_msgs"):
            _replay(records)
        else:
            report_differences(cls.__name__, info.get("missing_keys"), info.get("unexpected_keys"))
        if pretrained_model_name_or_path is not None:
            num_tokens = num_tokens_beside(pretrained_model_name_or_path, **hub_arguments)
            if num_tokens is not None and num_tokens < model.config.vocab_size:
                model.num_tokens = num_tokens
        return (model, info) if wants_info else model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' `resize_token_embeddings`; all rows count as tokens from then on."""
        self.num_tokens = None
        return super().resize_token_embeddings(*args, **kwargs)


def num_tokens_beside(path_or_name: str | os.PathLike[str], **hub_arguments: Any) -> int | None:
    """One more than the highest id of the tokenizer files beside a checkpoint; None where there are none, or none that
    can be read, which is said in one line: the weights are as good without.
    """
    arguments = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    files = {
        name: cached_file(path_or_name, name, **arguments, **hub_arguments)
        for name in ("tokenizer.json", "vocab.txt", "added_tokens.json", "tokenizer_config.json")
    }
    try:
        return _num_tokens(files)
    except (ValueError, TypeError, AttributeError) as error:  # not JSON, or not of a tokenizer
        logger.warning(
            "%s: the tokenizer beside the weights cannot be read (%s); rows that are padding may be predicted",
            path_or_name,
            error,
        )
        return None


def _num_tokens(files: dict[str, Any]) -> int | None:
    """The same of the files by name, None for those that are not there."""
    highest = -1
    if files["tokenizer.json"]:
        with open(files["tokenizer.json"], encoding="utf-8") as file:
            tokenizer = json.load(file)
        vocabulary = tokenizer.get("model", {}).get("vocab", {})
        numbers = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))  # Unigram has a list
        highest = max([*numbers, *(token["id"] for token in tokenizer.get("added_tokens", []))], default=-1)
    elif files["vocab.txt"]:
        with open(files["vocab.txt"], "rb") as file:
            highest = sum(1 for _ in file) - 1
        if files["added_tokens.json"]:
            with open(files["added_tokens.json"], encoding="utf-8") as file:
                highest = max([highest, *json.load(file).values()])
    if highest >= 0 and files["tokenizer_config.json"]:
        with open(files["tokenizer_config.json"], encoding="utf-8") as file:
            highest = max([highest, *map(int, json.load(file).get("added_tokens_decoder", {}))])
    return highest + 1 if highest >= 0 else None


@torch.no_grad()
def _complete_bias(model: nn.Module, missing: set[str]) -> None:
    """Fills the one of the two names of the projection's bias that is `missing`, and takes it out there.

    Transformers 4 had one parameter of both names, embeddings tied or not, and wrote it once.
    """
    absent = missing.intersection(PROJECTION_BIASES)
    if len(absent) != 1:
        return
    (gone,), (found,) = absent, {*PROJECTION_BIASES} - absent
    bias, source = model.get_parameter(gone), model.get_parameter(found)
    if not bias.is_meta and not source.is_meta:
        bias.copy_(source)
        missing.remove(gone)


@contextmanager
def _held_back_report(records: list[logging.LogRecord]) -> Iterator[None]:
    """Holds back Transformers' table of missing and unexpected weights, into `records`; not that of what another
    thread loads meanwhile.
    """
    thread = get_ident()

    def hold_back(record: logging.LogRecord) -> bool:
        if record.thread != thread or not any(sign in record.getMessage() for sign in _REPORT_SIGNS):
            return True
        records.append(record)
        return False

    _REPORTING_LOGGER.addFilter(hold_back)
    try:
        yield
    finally:
        _REPORTING_LOGGER.removeFilter(hold_back)


def _replay(records: list[logging.LogRecord]) -> None:
    for record in records:
        _REPORTING_LOGGER.handle(record)


def report_differences(class_name: str, missing: Collection[str] | None, unexpected: Collection[str] | None) -> None:
    """Says in a line each which weights a checkpoint lacks, and which it has too many."""
    if missing:
        logger.warning(
            "%s: not in the checkpoint and newly initialized, so train before use: %s", class_name, _names(missing)
        )
    if unexpected:
        logger.warning("%s: in the checkpoint and not used by this class: %s", class_name, _names(unexpected))


def _names(keys: Any) -> str:
    """Module names with `.*` instead of every weight: `bert.pooler.dense.*, cls.seq_relationship.*`."""
    modules = sorted({key.rsplit(".", 1)[0] + ".*" if "." in key else key for key in keys})
    shown = ", ".join(modules[:6])
    return shown if len(modules) <= 6 else f"{shown} and {len(modules) - 6} more"
