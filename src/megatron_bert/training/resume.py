"""Whether a run may go on from its checkpoint: what decides the result must be what it was, or be allowed to change."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from megatron_bert.data.content import GONE, content_of, content_of_model
from megatron_bert.errors import UserError
from megatron_bert.training.configuration import PretrainConfiguration

__all__ = ["refuse_changes", "run_identity"]

_FREE = ("output", "runtime", "mesh")  # where a run lies and how it is computed, not what comes out
_MAY_CHANGE_OF_MODEL = ("model.hidden_dropout_prob", "model.attention_probs_dropout_prob", "model.initializer_range")


def run_identity(configuration: PretrainConfiguration, tokenizer_fingerprint: str) -> dict[str, Any]:
    """What decides the result, by dotted key. Data and tokenizer stand there with their content instead of their paths,
    so that files may move.

    Raises:
        OSError: a token file cannot be read.
    """
    sections = configuration.model_dump(mode="json", exclude=set(_FREE))
    del sections["model"]["size"]  # a name for the numbers beside it
    start = configuration.model.start_from
    sections["model"]["start_from"] = content_of_model(start) if start else None
    sections["data"]["tokenizer"] = tokenizer_fingerprint
    contents = [(content_of(corpus.prefix), corpus.weight) for corpus in configuration.data.corpora]
    blend = isinstance(configuration.data.tokens, list)
    sections["data"]["tokens"] = [list(content) for content in contents] if blend else contents[0][0]
    if configuration.data.validation:
        sections["data"]["validation"] = content_of(configuration.data.validation)
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def refuse_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str], where: str
) -> dict[str, str]:
    """The differences that `allowed` names, as ``was X, is Y`` by key.

    Args:
        before, now: what `run_identity` said then and says now.
        allowed: dotted keys that may change.
        where: the checkpoint, for the message.

    Raises:
        UserError: something else differs, or something that never may: the shape of the model and the vocabulary, for
            which the saved weights are made; or `allowed` has an unknown key.
    """
    for key in allowed:
        if key not in now:
            raise UserError(f"--allow {key}: {_no_key(key, now)}")
    changed = {
        key: f"was {_shown(before.get(key))}, is {_shown(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and now.get(key) != GONE
    }
    fixed = [f"{key} {difference}" for key, difference in changed.items() if _never(key, before, now)]
    if fixed:
        raise UserError(
            f"{where} has other weights: {'; '.join(fixed)}. They cannot be changed in a run (--allow does not reach "
            f"them): put them back, choose another output, or start over with --overwrite"
        )
    refused = {key: difference for key, difference in changed.items() if key not in allowed}
    if refused:
        differences = "; ".join(f"{key} {difference}" for key, difference in refused.items())
        options = " ".join(f"--allow {key}" for key in refused)
        raise UserError(
            f"{where} was made with another recipe: {differences}. Put it back, go on with the change ({options}), "
            f"choose another output, or start over with --overwrite"
        )
    return changed


def _never(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if key == "objective.pair":  # with pairs there is a head for them
        return "none" in (before.get(key), now.get(key))
    if key in ("data.tokenizer", "objective.kind", "task.name", "lora.rank", "lora.targets"):
        return True
    return key.startswith("model.") and key not in _MAY_CHANGE_OF_MODEL


def _no_key(key: str, known: Collection[str]) -> str:
    if key.split(".")[0] in _FREE:
        return "it may always change, and needs no leave"
    near = difflib.get_close_matches(key, known, n=1)
    return f"there is no such key{f' (did you mean {near[0]}?)' if near else ''}; write section.key"


def _shown(value: Any) -> str:
    """A content's hash in short; anything else as in a recipe."""
    if isinstance(value, str) and len(value) == 64:
        return f"content {value[:8]}"
    return "absent" if value is None else str(value)
