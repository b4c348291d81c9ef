"""The family in Transformers' Auto classes, and the two entry points that know a tokenizer as well as a model."""

import os
from typing import Any

import transformers

from megatron_bert import model as family
from megatron_bert.bundled import resolved
from megatron_bert.data.tokenization import AutoTokenizer, MegatronBertTokenizer

__all__ = ["AutoTokenizer", "pipeline", "register"]

_CLASSES = {
    transformers.AutoModel: family.MegatronBertModel,
    transformers.AutoModelForCausalLM: family.MegatronBertForCausalLM,
    transformers.AutoModelForMaskedLM: family.MegatronBertForMaskedLM,
    transformers.AutoModelForMultipleChoice: family.MegatronBertForMultipleChoice,
    transformers.AutoModelForNextSentencePrediction: family.MegatronBertForNextSentencePrediction,
    transformers.AutoModelForPreTraining: family.MegatronBertForPreTraining,
    transformers.AutoModelForQuestionAnswering: family.MegatronBertForQuestionAnswering,
    transformers.AutoModelForSequenceClassification: family.MegatronBertForSequenceClassification,
    transformers.AutoModelForTokenClassification: family.MegatronBertForTokenClassification,
}


def register() -> None:
    """Makes Transformers' Auto classes, and so its `pipeline`, `Trainer` and PEFT, use this package's classes.

    Configurations made with Transformers' own `MegatronBertConfig` lead to them as well. Calling it again does nothing
    more.
    """
    transformers.AutoConfig.register(family.MegatronBertConfig.model_type, family.MegatronBertConfig, exist_ok=True)
    for config_class in (family.MegatronBertConfig, transformers.MegatronBertConfig):
        for auto_class, model_class in _CLASSES.items():
            auto_class.register(config_class, model_class, exist_ok=True)
        transformers.AutoTokenizer.register(config_class, tokenizer_class=MegatronBertTokenizer, exist_ok=True)


def pipeline(task: str | None = None, model: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Transformers' `pipeline` with this package's tokenizer for models of this family: `<mask>` is a mask too.

    Takes what Transformers' takes (`config`, `tokenizer`, ... in its order) and returns its pipelines; `mini` is the
    model in the box.
    """
    named = isinstance(model, str | os.PathLike)
    model = resolved(model) if named else model
    if named and kwargs.get("tokenizer") is None and len(args) < 2 and _is_of_family(model, kwargs):
        options = {name: kwargs[name] for name in ("revision", "token", "trust_remote_code") if name in kwargs}
        kwargs["tokenizer"] = AutoTokenizer.from_pretrained(model, **options)
    build: Any = transformers.pipeline  # overloaded by task name
    return build(task, model, *args, **kwargs)


def _is_of_family(name: str | os.PathLike[str], options: dict[str, Any]) -> bool:
    hub_options = {option: options[option] for option in ("revision", "token") if option in options}
    config, _ = transformers.PreTrainedConfig.get_config_dict(name, **hub_options)
    return config.get("model_type") == family.MegatronBertConfig.model_type
