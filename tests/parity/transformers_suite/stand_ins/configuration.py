"""Stands in for `tests/utils/test_configuration_utils.py`: the table of values that every configuration must take."""

from transformers import PreTrainedConfig

# Every constructor argument that all configurations share, with a value that is not its default.
config_common_kwargs = {
    "architectures": ["MegatronBertForMaskedLM"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "label"},
    "is_encoder_decoder": True,
    "label2id": {"label": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}

_default = PreTrainedConfig()
for _name, _value in config_common_kwargs.items():
    assert getattr(_default, _name) != _value, f"{_name}: {_value!r} is the default and would show nothing"
