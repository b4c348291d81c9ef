"""The training kernel on a GPU against attention in float64; with dropout, against the same with the mask it drew."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_bert.model import attention_kernel
from megatron_bert.model.attention_kernel import applies, joined, packed_attention, realized_dropout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]
HEADS, SIZE = 2, 64
LENGTHS = [
    [1], [2], [15, 16, 17], [63, 64, 65], [127, 128, 129], [511, 512], [700], [1024], [2048],
    [512, 0, 0, 33, 1, 0, 200], [96, 512, 512, 7],
]  # fmt: skip


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def random_rows(lengths: list[int], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries, keys and values (T, 3, N, H), and a gradient (T, N, H)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, HEADS, SIZE, device="cuda", generator=generator).to(dtype)
    return qkv, torch.randn(sum(lengths), HEADS, SIZE, device="cuda", generator=generator).to(dtype)


def by_the_formula(qkv: Tensor, lengths: list[int], is_causal: bool, masks: list[Tensor] | None, keep: float) -> Tensor:
    """softmax(q k^T / 8) v in float64; masks (N, S, S) are of what is kept."""
    contexts = []
    for number, rows in enumerate(qkv.double().split(lengths)):
        query, key, value = (part.transpose(0, 1) for part in rows.unbind(1))
        scores = query @ key.transpose(1, 2) / 8
        if is_causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        probabilities = scores.softmax(-1)
        if masks is not None:
            probabilities = probabilities * masks[number] / keep
        contexts.append((probabilities @ value).transpose(0, 1))
    return torch.cat(contexts)


def drawn_masks(lengths: list[int], dropout: float, seed: int, heads: int = HEADS) -> list[Tensor]:
    """What the kernel keeps, (N, S, S) a sequence: with equal scores and one-hot values, its result is the mask."""
    tokens, masks = sum(lengths), [torch.zeros(heads, length, length, device="cuda") for length in lengths]
    for begin in range(0, max(lengths), SIZE):
        qkv = torch.zeros(tokens, 3, heads, SIZE, device="cuda", dtype=torch.bfloat16)
        at = torch.cat([torch.arange(length, device="cuda") for length in lengths]) - begin
        here = (at >= 0) & (at < SIZE)
        qkv[here.nonzero()[:, 0], 2, :, at[here]] = 1
        torch.manual_seed(seed)
        shown = packed_attention(qkv, boundaries(lengths), max(lengths), False, 0.125, dropout) > 0
        for mask, rows in zip(masks, shown.split(lengths), strict=True):
            width = max(0, min(SIZE, mask.shape[2] - begin))
            mask[:, :, begin : begin + width] = rows.transpose(0, 1)[:, :, :width]
    return masks


def run(qkv: Tensor, grad: Tensor, lengths: list[int], is_causal: bool, dropout: float) -> tuple[Tensor, Tensor]:
    """The context and the gradient of queries, keys and values."""
    leaf = qkv.detach().clone().requires_grad_()
    context = packed_attention(leaf, boundaries(lengths), max(lengths), is_causal, 0.125, dropout)
    context.backward(grad)
    assert leaf.grad is not None
    return context.detach(), leaf.grad


def check(lengths: list[int], is_causal: bool, dropout: float, dtype: torch.dtype) -> None:
    """Errors are those of rounding probabilities and their gradients to 16 bits, relative to the largest value."""
    qkv, grad = random_rows(lengths, dtype)
    masks = drawn_masks(lengths, dropout, seed=3) if dropout else None
    torch.manual_seed(3)
    context, grad_qkv = run(qkv, grad, lengths, is_causal, dropout)
    leaf = qkv.double().requires_grad_()
    wanted = by_the_formula(leaf, lengths, is_causal, masks, 1 - realized_dropout(dropout))
    wanted.backward(grad.double())
    assert leaf.grad is not None
    pairs = [(context, wanted), *zip(grad_qkv.unbind(1), leaf.grad.unbind(1), strict=True)]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
    for found, exact in pairs:
        assert (found.double() - exact).abs().max() <= tolerance * max(exact.abs().max().item(), 1e-3)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_without_dropout(lengths: list[int], is_causal: bool) -> None:
    check(lengths, is_causal, 0.0, torch.bfloat16)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dropout", [0.1, 0.5])
@pytest.mark.parametrize("lengths", [[1, 15, 17], [65, 128, 0, 511], [700]], ids=str)
def test_with_the_mask_that_it_drew(lengths: list[int], dropout: float, is_causal: bool) -> None:
    check(lengths, is_causal, dropout, torch.bfloat16)


def test_float16() -> None:
    check([511, 64, 200], False, 0.1, torch.float16)


def test_masks_are_random() -> None:
    """Kept as often as said; neighbours, rows, columns, heads, sequences and seeds are not correlated."""
    lengths, heads = [512, 512], 8
    kept = torch.stack([torch.stack(drawn_masks(lengths, 0.1, seed, heads)) for seed in (0, 1)])
    keep = 1 - realized_dropout(0.1)
    deviations = (kept - keep) / (keep * (1 - keep)) ** 0.5  # (seeds, sequences, N, S, S)
    size = deviations.numel()
    assert abs(deviations.mean()) * size**0.5 < 5
    shifts = [(0, 0, 0, rows, columns) for rows in (0, 1, 2, 7, 8, 9, 16, 64) for columns in (0, 1, 2, 7, 8, 9, 16, 64)]
    shifts += [(0, 0, 1, 0, 0), (0, 1, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 1, 1, 1)]
    for shift in shifts:
        if any(shift):
            correlation = (deviations * deviations.roll(shift, tuple(range(5)))).mean()
            assert abs(correlation) * size**0.5 < 5, shift
    for axis in (-1, -2):  # the sums of rows and of columns are spread as those of independent numbers
        sums = deviations.sum(axis) / 512**0.5
        assert sums.var().item() == pytest.approx(1, abs=0.05)
    positions = deviations.flatten(0, 2).mean(0) * 32**0.5  # no position is dropped more often than others
    assert positions.var().item() == pytest.approx(1, abs=0.02)


def test_the_generator_decides() -> None:
    lengths = [130, 40]
    qkv, grad = random_rows(lengths)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run(qkv, grad, lengths, False, 0.1))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    first, second = (run(qkv, grad, lengths, False, 0.1)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_recomputed_and_compiled_it_is_the_same() -> None:
    lengths = [130, 512, 40]
    qkv, grad = random_rows(lengths)
    cu_seq_lens = boundaries(lengths)

    def attend(states: Tensor) -> Tensor:
        return packed_attention(states * 1.0, cu_seq_lens, 512, False, 0.125, 0.1)

    gradients = []
    for call in (attend, lambda states: checkpoint(attend, states, use_reentrant=False)):
        torch.manual_seed(4)
        leaf = qkv.clone().requires_grad_()
        call(leaf).backward(grad)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)

    def dry(states: Tensor) -> Tensor:
        return packed_attention(states * 1.0, cu_seq_lens, 512, False, 0.125, 0.0)

    found, wanted = (qkv.clone().requires_grad_() for _ in range(2))
    torch.compile(dry, fullgraph=True)(found).backward(grad)
    dry(wanted).backward(grad)
    assert torch.equal(found.grad, wanted.grad)


def test_the_operators_are_registered_well() -> None:
    qkv, _ = random_rows([30, 70])
    seed = torch.tensor([5], device="cuda")
    arguments = (qkv.requires_grad_(), boundaries([30, 70]), seed, 70, False, 0.125, 0.1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attention_kernel._forward, arguments, test_utils=tests)


def test_what_it_takes() -> None:
    query = torch.zeros(1, 2, 8, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert applies(query, 512, 0.1)
    assert applies(query, 512, 0.0)
    assert not applies(query, 512, 0.001)  # would be none at all
    assert not applies(query.detach(), 512, 0.1)
    assert not applies(query.detach().float().requires_grad_(), 512, 0.1)
    assert not applies(query.detach()[..., :32].requires_grad_(), 512, 0.1)
    with torch.no_grad():
        assert not applies(query, 512, 0.1)


def test_a_fused_projection_gets_its_gradient_whole() -> None:
    """No copy in, and the gradient of the product's result is the very tensor that the kernel wrote."""
    product = torch.randn(20, 3 * HEADS * SIZE, device="cuda").bfloat16().requires_grad_() * 1
    parts = [part.view(20, HEADS, SIZE) for part in product.chunk(3, dim=-1)]
    whole = joined(*parts)
    assert whole.data_ptr() == product.data_ptr()
    assert torch.equal(whole, torch.stack(parts, dim=1))
