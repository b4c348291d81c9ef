"""Floating-point operations of training, by the shape of the model and the tokens that it saw."""

from __future__ import annotations

from transformers import PreTrainedConfig

__all__ = ["training_flops"]


def training_flops(config: PreTrainedConfig, tokens: int, attended_pairs: int, predicted: int) -> float:
    """Model FLOPs of forward and backward passes, multiplications and additions of matrix products counted.

    For rows of s tokens, 4h feed-forward units and V words this is 72 B s l h^2 (1 + s / 6h) + 6 M h (V + h): Narayanan
    et al. 2021 (arXiv 2104.04473, appendix) without recomputation (a backward pass is two forward passes), with the
    head, a D x D projection and one onto the vocabulary, at the M predicted positions only. Padding and recomputation
    are no useful work and not counted; causal attention is counted whole, as is usual.

    Args:
        config: a `MegatronBertConfig`.
        tokens: real tokens.
        attended_pairs: the sum of the squared lengths of the sequences, in tokens squared.
        predicted: positions that a token is predicted at.
    """
    layers, hidden, feed_forward = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    forward_per_token = 8 * hidden**2 + 4 * hidden * feed_forward  # query, key, value, output; and the MLP's two
    forward_per_pair = 4 * hidden  # a score, and its product with a value
    forward = layers * (forward_per_token * tokens + forward_per_pair * attended_pairs)
    return float(3 * (forward + 2 * hidden * (config.vocab_size + hidden) * predicted))
