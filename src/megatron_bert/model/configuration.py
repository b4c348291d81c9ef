"""The configuration of the `megatron-bert` model type: names, defaults and file format are Transformers'."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from megatron_bert.sharding import transformers_plan

__all__ = ["MegatronBertConfig"]


@strict
class MegatronBertConfig(PreTrainedConfig):
    """Shape and behaviour of a MegatronBERT; the defaults are the paper's 336M model (arXiv 1909.08053, section 5.3).

    They are also those of [nvidia/megatron-bert-uncased-345m](https://huggingface.co/nvidia/megatron-bert-uncased-345m).

    Files written by this class and by Transformers' class of the same name are interchangeable.

    Raises:
        ValueError: where the attention heads do not divide the hidden size, or cross-attention is asked of an encoder.
    """

    model_type = "megatron-bert"

    vocab_size: int = 29056
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = transformers_plan(head=False, cross_attention=self.add_cross_attention)

    def validate_architecture(self) -> None:
        """Refuses head counts that do not divide the hidden size (called by `PreTrainedConfig`'s validation)."""
        super().validate_architecture()
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
