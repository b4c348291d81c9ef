"""Triton kernels of `layer_kernels`: what lies between a layer's products, each read and written once.

A program of the norms has whole rows, one of the activation a tile. Backward, a program goes on to further rows, and
sums what parameters get of all of its own in registers: one row of partial sums a program, which are added up outside.
Everything is computed in float32.

Dropout draws a byte an element, as the attention kernel does (`attention_triton`): four neighbours share a number, a
hash of their place with two keys, which Philox makes from the seed and the site, one of several that share a seed.

With NARROW, a program also has whole rows of what is a product's operand next, and writes them in float8: NARROWED, and
SCALES, one a row. Of gradients that is each column times its FACTOR first; see `float8_products`.

T tokens, D width, P programs.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from megatron_bert.model.attention_triton import _flags, _is_kept


@triton.jit(do_not_specialize=["site"])
def norm_forward(
    PRODUCT, BIAS, RESIDUAL, WEIGHT, SHIFT, SEED, SUM, NORMED, MEAN, RSTD, NARROWED, SCALES,
    tokens, site, addend, inverse_keep, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """SUM = RESIDUAL + dropout(PRODUCT + BIAS) and NORMED, its layer norm; WIDTH is the power of two that D fits in."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    ok = (rows < tokens)[:, None] & (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    states = tl.load(PRODUCT + at, mask=ok, other=0.0).to(tl.float32) + _of_columns(BIAS, columns, D)
    if DROP:
        states = tl.where(_kept(SEED, site, rows, columns, addend, D, PACKED), states * inverse_keep, 0.0)
    states += tl.load(RESIDUAL + at, mask=ok, other=0.0).to(tl.float32)
    rounded = states.to(SUM.dtype.element_ty)
    tl.store(SUM + at, rounded, mask=ok)
    states = rounded.to(tl.float32)  # what the backward pass will see
    mean = tl.sum(states, 1) / D
    centred = tl.where(ok, states - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    normed = centred * rstd[:, None] * _of_columns(WEIGHT, columns, D) + _of_columns(SHIFT, columns, D)
    tl.store(NORMED + at, normed.to(NORMED.dtype.element_ty), mask=ok)
    if NARROW:
        _store_narrowed(NARROWED, SCALES, normed, at, rows, ok, tokens)
    tl.store(MEAN + rows, mean, mask=rows < tokens)
    tl.store(RSTD + rows, rstd, mask=rows < tokens)


@triton.jit(do_not_specialize=["site"])
def norm_backward(
    GRAD_SUM, GRAD_NORMED, SUM, MEAN, RSTD, WEIGHT, SEED, FACTOR, GRAD_RESIDUAL, GRAD_PRODUCT, PARTS, NARROWED, SCALES,
    tokens, site, addend, inverse_keep,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, HAS_GRAD_SUM: tl.constexpr,
    DROP: tl.constexpr, PACKED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """The gradients of the residual and, if there is dropout, of the product; PARTS (P, 3, D): of weight, shift, bias.

    That of x in n = w (x - mean) / sigma + b is (g - sum(g) / D - h sum(g h) / D) / sigma, where g = w dn and
    h = (x - mean) / sigma (Ba et al. 2016, arXiv 1607.06450, differentiated); what comes from SUM's other use is added.
    """
    columns = tl.arange(0, WIDTH)
    weight = _of_columns(WEIGHT, columns, D)
    of_weight, of_shift, of_bias = (
        tl.zeros((WIDTH,), tl.float32),
        tl.zeros((WIDTH,), tl.float32),
        tl.zeros((WIDTH,), tl.float32),
    )
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        ok = (rows < tokens)[:, None] & (columns < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        grad = tl.load(GRAD_NORMED + at, mask=ok, other=0.0).to(tl.float32)
        states = tl.load(SUM + at, mask=ok, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + rows, mask=rows < tokens, other=0.0)
        rstd = tl.load(RSTD + rows, mask=rows < tokens, other=0.0)
        unit = tl.where(ok, (states - mean[:, None]) * rstd[:, None], 0.0)
        of_weight += tl.sum(grad * unit, 0)
        of_shift += tl.sum(grad, 0)
        grad *= weight
        along, level = tl.sum(grad * unit, 1) / D, tl.sum(grad, 1) / D
        grad = (grad - level[:, None] - unit * along[:, None]) * rstd[:, None]
        if HAS_GRAD_SUM:
            grad += tl.load(GRAD_SUM + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(GRAD_RESIDUAL + at, grad.to(GRAD_RESIDUAL.dtype.element_ty), mask=ok)
        if DROP:
            grad = tl.where(_kept(SEED, site, rows, columns, addend, D, PACKED), grad * inverse_keep, 0.0)
            tl.store(GRAD_PRODUCT + at, grad.to(GRAD_PRODUCT.dtype.element_ty), mask=ok)
        of_bias += tl.sum(tl.where(ok, grad, 0.0), 0)
        if NARROW:
            _store_narrowed(NARROWED, SCALES, grad * _of_columns(FACTOR, columns, D), at, rows, ok, tokens)
    PARTS += tl.program_id(0) * 3 * D + columns
    tl.store(PARTS, of_weight, mask=columns < D)
    tl.store(PARTS + D, of_shift, mask=columns < D)
    tl.store(PARTS + 2 * D, of_bias, mask=columns < D)


@triton.jit
def gelu_forward(
    PRODUCT, BIAS, ACTIVATED, NARROWED, SCALES, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """ACTIVATED = gelu(PRODUCT + BIAS), gelu(x) = x / 2 (1 + erf(x / sqrt(2))) (arXiv 1606.08415)."""
    strips: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    rows = tl.program_id(0) // strips * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    ok = (rows < tokens)[:, None] & (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    states = tl.load(PRODUCT + at, mask=ok, other=0.0).to(tl.float32) + _of_columns(BIAS, columns, D)
    distribution, _ = _normal(states, PACKED)
    activated = states * distribution
    tl.store(ACTIVATED + at, activated.to(ACTIVATED.dtype.element_ty), mask=ok)
    if NARROW:
        _store_narrowed(NARROWED, SCALES, activated, at, rows, ok, tokens)


@triton.jit
def gelu_backward(
    GRAD, PRODUCT, BIAS, FACTOR, GRAD_PRODUCT, PARTS, NARROWED, SCALES, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """The gradient of the product, and PARTS (P, D), of the bias."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    bias = _of_columns(BIAS, columns, D)
    of_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(tokens, ROWS), tl.num_programs(1), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        ok = (rows < tokens)[:, None] & (columns < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        states = tl.load(PRODUCT + at, mask=ok, other=0.0).to(tl.float32) + bias
        distribution, density = _normal(states, PACKED)
        grad = tl.load(GRAD + at, mask=ok, other=0.0).to(tl.float32) * (distribution + states * density)
        tl.store(GRAD_PRODUCT + at, grad.to(GRAD_PRODUCT.dtype.element_ty), mask=ok)
        of_bias += grad
        if NARROW:
            _store_narrowed(NARROWED, SCALES, grad * _of_columns(FACTOR, columns, D), at, rows, ok, tokens)
    tl.store(PARTS + tl.program_id(1) * D + columns, tl.sum(of_bias, 0), mask=columns < D)


@triton.jit
def cast_rows(
    STATES, FACTOR, PARTS, NARROWED, SCALES, tokens,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, IS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """What no kernel here wrote, in float8. Of a gradient: times FACTOR, and PARTS (P, D), its columns' sums before."""
    columns = tl.arange(0, WIDTH)
    sums = tl.zeros((WIDTH,), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        ok = (rows < tokens)[:, None] & (columns < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        states = tl.load(STATES + at, mask=ok, other=0.0).to(tl.float32)
        if IS_GRADIENT:
            sums += tl.sum(states, 0)
            states *= _of_columns(FACTOR, columns, D)
        _store_narrowed(NARROWED, SCALES, states, at, rows, ok, tokens)
    if IS_GRADIENT:
        tl.store(PARTS + tl.program_id(0) * D + columns, sums, mask=columns < D)


@triton.jit
def cast_weight(
    WEIGHT, VALUES, TRANSPOSED, SCALES, outputs, together,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A weight (outputs, D) in float8, and its transpose, whose rows are of `together` outputs. Where a program reads
    its rows again, they are still in a cache.

    What is transposed is read and converted once more. Of a conversion whose result is both stored in words and taken
    apart into bytes, as 8-bit numbers are on the way to another layout, ptxas 12.8 (Triton 3.6, sm_90) takes every
    second pair's upper byte from the turn of the loop before.
    """
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    largest = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, COLUMNS):
        ok = (rows < outputs)[:, None] & (start + columns < D)[None, :]
        largest = tl.maximum(largest, tl.abs(tl.load(WEIGHT + at + start, mask=ok, other=0.0).to(tl.float32)))
    scale = _scale_of(tl.max(largest, 1))
    tl.store(SCALES + rows, scale, mask=rows < outputs)
    inverse = 1.0 / scale
    for start in range(0, D, COLUMNS):
        inputs = start + columns
        ok = (rows < outputs)[:, None] & (inputs < D)[None, :]
        weight = tl.load(WEIGHT + at + start, mask=ok, other=0.0).to(tl.float32)
        tl.store(VALUES + at + start, (weight * inverse[:, None]).to(VALUES.dtype.element_ty), mask=ok)
        ok = (inputs < D)[:, None] & (rows < outputs)[None, :]
        turned = tl.load(WEIGHT + rows.to(tl.int64)[None, :] * D + inputs[:, None], mask=ok, other=0.0).to(tl.float32)
        across = inputs.to(tl.int64)[:, None] * together + rows[None, :]
        tl.store(TRANSPOSED + across, (turned * inverse[None, :]).to(TRANSPOSED.dtype.element_ty), mask=ok)


@triton.jit
def _store_narrowed(NARROWED, SCALES, states, at, rows, ok, tokens):
    """Rows in e4m3, and what they are to be multiplied by."""
    states = tl.where(ok, states, 0.0)
    scale = _scale_of(tl.max(tl.abs(states), 1))
    tl.store(NARROWED + at, (states * (1.0 / scale)[:, None]).to(NARROWED.dtype.element_ty), mask=ok)
    tl.store(SCALES + rows, scale, mask=rows < tokens)


@triton.jit
def _normal(states, PACKED: tl.constexpr):
    """The normal distribution (1 + erf(x / sqrt(2))) / 2 and its density, which share an exponential.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: erf to within 1.5e-7, as near as float32 has it
    at 1. CUDA's own takes twice the instructions, and they, not memory, would set the pace.
    """
    exponent = states * states * -0.7213475204444817  # exp(-x^2 / 2) is a power of two
    divisor = 1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(states)
    if PACKED:  # without care for tiny numbers
        falling = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], dtype=tl.float32, is_pure=True, pack=1
        )
        t = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        falling, t = tl.exp2(exponent), 1.0 / divisor
    tail = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    tail *= 0.5 * t * falling
    return tl.where(states > 0, 1.0 - tail, tail), 0.3989422804014327 * falling


@triton.jit
def _of_columns(X, columns, D: tl.constexpr):
    """A parameter, (1, columns)."""
    return tl.load(X + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _kept(SEED, site, rows, columns, addend, D: tl.constexpr, PACKED: tl.constexpr):
    """Which elements (rows, columns) dropout keeps; see `attention_triton._flags`."""
    zero = tl.program_id(0).to(tl.uint32) * 0
    first, second, _, _ = tl.philox(tl.load(SEED), zero + site.to(tl.uint32), zero, zero, zero)
    rows, columns = rows.to(tl.uint32), columns.to(tl.uint32)
    counter = (rows * ((D + 3) // 4))[:, None] + (columns >> 2)[None, :]
    flags = _flags(counter ^ first.to(tl.uint32), second.to(tl.uint32), addend, PACKED)
    return _is_kept(flags, ((columns & 3) << 3)[None, :])


@triton.jit
def _scale_of(largest):
    """Such that the largest magnitude becomes 448, e4m3's (arXiv 2209.05433, sections 3 and 4). A row of zeros has one,
    too: the least, which no gradient that counts gets near.
    """
    return tl.maximum(largest, 1e-30) * 0.002232142857142857
