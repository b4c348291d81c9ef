"""Every parallel layer equals its unsharded twin, forward and backward, and communicates as the papers say."""

import pytest
import torch

from tests.distributed import layer_cases

RANKS = [2, 4]


@pytest.mark.parametrize("ranks", RANKS)
def test_linear_layers(world, ranks):
    world(ranks).run(layer_cases.linear_layers)


@pytest.mark.parametrize("ranks", RANKS)
def test_embeddings(world, ranks):
    world(ranks).run(layer_cases.embeddings)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("sequence_parallel", "num_tokens"), [(False, 8), (True, 8), (True, 7), (True, 3)])
def test_attention_mlp_and_layer(world, ranks, sequence_parallel, num_tokens):
    world(ranks).run(layer_cases.blocks, sequence_parallel=sequence_parallel, num_tokens=num_tokens)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("num_tokens", [8, 7])
def test_products_that_overlap_with_communication(world, ranks, num_tokens):
    world(ranks).run(layer_cases.blocks, sequence_parallel=True, num_tokens=num_tokens, overlap=True)


@pytest.mark.parametrize(("ranks", "compiled"), [(2, False), (4, False), (2, True)])
def test_cross_entropy(world, ranks, compiled):
    world(ranks).run(layer_cases.cross_entropy_equals_torch, compiled=compiled)


def test_cross_entropy_of_narrow_logits(world):
    """Computed in float32, whatever the logits are."""
    world(2).run(layer_cases.cross_entropy_equals_torch, dtype=torch.bfloat16)


def test_a_layer_communicates_as_the_paper_says(world):
    """arXiv 1909.08053, section 3: two all-reduces in the forward pass, two in the backward pass."""
    counts = world(2).run(layer_cases.communication, sequence_parallel=False)
    assert counts == 2 * [{"forward": {"all_reduce": 2}, "backward": {"all_reduce": 2}}]


def test_a_layer_under_sequence_parallelism(world):
    """arXiv 2205.05198, section 4.2.2: the same bytes, as two all-gathers and two reduce-scatters a pass. Its gathered
    inputs are kept, not gathered again in the backward pass (which would be a third and fourth all-gather).
    """
    a_pass = {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}
    assert world(2).run(layer_cases.communication, sequence_parallel=True)[0] == {"forward": a_pass, "backward": a_pass}


def test_an_overlapped_layer_leaves_no_collective_alone(world):
    """Each of the eight is done together with the product beside it: queries, keys and values are one product."""
    assert world(2).run(layer_cases.overlapped_traffic)[0] == {
        "forward": 2 * ["gather_and_multiply", "multiply_scatter"],
        "backward": 2 * ["multiply_scatter_backward", "gather_multiply_backward"],
    }


def test_recomputation_sends_what_it_needs_once_more(world):
    """PyTorch stops recomputing at the last value that is needed: the second all-reduce's result is not."""
    hidden_elements = 2 * layer_cases.TOKENS * layer_cases.SHAPE["hidden_size"]
    assert world(2).run(layer_cases.recomputed_traffic)[0] == 3 * [("all_reduce", hidden_elements)]


def test_the_loss_sends_a_few_numbers_a_token(world):
    sent = world(2).run(layer_cases.loss_traffic, num_tokens=30)[0]
    assert sent == [("all_reduce", 30), ("all_reduce", 3 * 30)]


def test_compiled(world):
    """A compiler sees the collectives: it is not stopped by them."""
    world(2).run(layer_cases.compiled_layers, sequence_parallel=True)


def test_generation_and_the_causal_loss(world):
    world(2).run(layer_cases.generates_as_single_process)
