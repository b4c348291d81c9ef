"""The model's kernels on a GPU: the same numbers as on the CPU, unpadded or not, in each type."""

import pytest
import torch

from megatron_bert import model as family

pytestmark = pytest.mark.gpu

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make(dtype, name="MegatronBertForMaskedLM", **overrides):
    torch.manual_seed(0)
    config = family.MegatronBertConfig(**{**SHAPE, **overrides})
    return getattr(family, name)(config).eval().to("cuda", dtype)


def padded_batch(rows=6, columns=70):
    torch.manual_seed(1)
    lengths = torch.tensor([70, 3, 41, 1, 64, 17])
    mask = (torch.arange(columns) < lengths[:, None]).long()
    ids = torch.randint(5, 300, (rows, columns))
    labels = ids.masked_fill((mask == 0) | (torch.rand(rows, columns) < 0.5), -100)
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}, labels.cuda()


def relative_error(expected, found):
    return ((expected.double() - found.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(
    ("dtype", "tolerance", "of_gradients"),
    [(torch.float32, 2e-5, 6e-5), (torch.bfloat16, 2e-2, 6e-2), (torch.float16, 3e-3, 1.5e-2)],
)
@pytest.mark.parametrize("is_decoder", [False, True])
def test_unpadded_execution(dtype, tolerance, of_gradients, is_decoder):
    """Against the padded model in double precision on the CPU.

    In float16 a flash kernel's gradients are further off than its results: it takes each row's sum of probability times
    gradient from the rounded result, which alone changes the queries' gradient here by 1.4 % (computed in double
    precision from rounded values).
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    inputs, labels = padded_batch()
    model = make(dtype, is_decoder=is_decoder, use_cache=False)
    exact = make(torch.float64, is_decoder=is_decoder, use_cache=False).cpu()
    real = inputs["attention_mask"].bool()
    found = model(**inputs, labels=labels)
    expected = exact(**{key: value.cpu() for key, value in inputs.items()}, labels=labels.cpu(), unpad=False)
    assert (found.logits[~real] == 0).all()
    assert relative_error(expected.logits[real.cpu()], found.logits[real].cpu()) < tolerance
    found.loss.backward()
    expected.loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        if "key.bias" not in name:  # its gradient is zero but for noise
            assert relative_error(theirs.grad, ours.grad.cpu()) < of_gradients, name


@pytest.mark.parametrize("is_decoder", [False, True])
def test_packed_rows(is_decoder):
    model = make(torch.bfloat16, "MegatronBertModel", is_decoder=is_decoder, use_cache=False)
    sequences = [torch.randint(5, 300, (1, length), device="cuda") for length in (50, 1, 33)]
    positions = torch.cat([torch.arange(ids.shape[1], device="cuda") for ids in sequences])[None]
    with torch.no_grad():
        found = model(torch.cat(sequences, dim=1), position_ids=positions).last_hidden_state
        expected = torch.cat([model(ids).last_hidden_state for ids in sequences], dim=1)
    assert relative_error(expected, found) < 2e-2


def test_dropout_draws_anew_and_keeps_the_mean():
    model = make(torch.bfloat16, attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1).train()
    inputs, labels = padded_batch()
    losses = torch.stack([model(**inputs, labels=labels).loss for _ in range(20)])
    assert losses.std() > 0
    assert abs(losses.mean() - model.eval()(**inputs, labels=labels).loss) < 0.2


def test_compiles_into_one_graph_with_padding():
    model = make(torch.bfloat16)
    inputs, _ = padded_batch()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[real]
        found = torch.compile(model, fullgraph=True)(**inputs).logits[real]
    assert relative_error(expected, found) < 2e-2


def test_generates_with_a_static_cache():
    model = make(torch.float32, "MegatronBertForCausalLM", is_decoder=True)
    ids = torch.randint(5, 300, (2, 7), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(ids, **options)
    assert torch.equal(dynamic, model.generate(ids, **options, cache_implementation="static"))
