"""MegatronBERT: the model family, its trainer, its data pipeline and its converters.

Importing a name from here loads it and registers the family with Transformers' Auto classes; `import megatron_bert` by
itself loads nothing and has no effect.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "megatron_bert.model": (
        "MegatronBertConfig",
        "MegatronBertForCausalLM",
        "MegatronBertForMaskedLM",
        "MegatronBertForMultipleChoice",
        "MegatronBertForNextSentencePrediction",
        "MegatronBertForPreTraining",
        "MegatronBertForPreTrainingOutput",
        "MegatronBertForQuestionAnswering",
        "MegatronBertForSequenceClassification",
        "MegatronBertForTokenClassification",
        "MegatronBertModel",
        "MegatronBertPreTrainedModel",
    ),
    "megatron_bert.bundled": ("MINI",),
    "megatron_bert.auto": ("AutoTokenizer", "pipeline", "register"),
    "megatron_bert.data.tokenization": ("MegatronBertTokenizer",),
    "transformers": (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForMultipleChoice",
        "AutoModelForNextSentencePrediction",
        "AutoModelForPreTraining",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("megatron_bert.auto").register()
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
