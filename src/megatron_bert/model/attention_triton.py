"""Triton kernels of `attention_kernel`: attention of packed sequences, forward and backward, with dropout.

The online softmax and the recomputed probabilities of FlashAttention (Dao et al. 2022, arXiv 2205.14135; backward as in
its appendix B, in two kernels, so that nothing is added up between programs). A program has one tile of one sequence
and one head; programs beyond a sequence's end leave at once, so that lengths are known to the device alone.

Dropout: scores at (row, column), (row + 8, column), (row, column + 8) and (row + 8, column + 8) share one 32-bit random
number, a byte each. A thread of the tensor cores holds all four, and would in the transposed tile. The number is a hash
of both coordinates with two keys, which Philox makes from the seed, the sequence and the head: one wide
multiplication, one narrow, and nothing that depends on the size of tiles.

Scores are in units of log 2. Legend of tiles: M queries, N keys, H head dimension.
"""

# mypy: ignore-errors
# ruff: noqa: RET505  # a branch on a constant has to be a whole one

import triton
import triton.language as tl

SLOT = tl.constexpr(132)  # a sequence's reserve in the statistics: its last tile, of at most 128, and 4 for alignment
# Gradients of float16 scores are a probability times what comes from above: too small for the type, if not multiplied
# by about the number of keys. The gradients of queries and keys are divided by it in float32.
LIFT = tl.constexpr(64.0)


@triton.jit
def forward(
    Q, K, V, OUT, LSE, BOUNDARIES, SEED, stride_token, stride_head_lse, scale, addend, inverse_keep,
    M: tl.constexpr, N: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The attention of M queries, and the logarithm of their softmax's denominator, +inf beyond the sequence."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(BOUNDARIES + sequence)
    length = tl.load(BOUNDARIES + sequence + 1) - first
    begin = tile * M
    if begin >= length:
        return
    Q, K, V = (
        _at(Q, first, head, stride_token, H),
        _at(K, first, head, stride_token, H),
        _at(V, first, head, stride_token, H),
    )
    rows = begin + tl.arange(0, M)
    query = _tile(Q, begin, stride_token, length, M, H, True)
    row_keys, key = _row_keys(SEED, sequence, head, _groups(rows), DROP)
    context, total, highest = (
        tl.zeros((M, H), tl.float32),
        tl.zeros((M,), tl.float32),
        tl.full((M,), -float("inf"), tl.float32),
    )
    whole, end = _key_range(begin, length, M, N, CAUSAL)
    context, total, highest = _forward_tiles(
        context, total, highest, query, K, V, 0, whole, rows, length, stride_token, scale, row_keys, key, addend,
        N, H, CAUSAL, DROP, PACKED, False,
    )  # fmt: skip
    context, total, highest = _forward_tiles(
        context, total, highest, query, K, V, whole, end, rows, length, stride_token, scale, row_keys, key, addend,
        N, H, CAUSAL, DROP, PACKED, True,
    )  # fmt: skip
    OUT = _at(OUT, first, head, tl.num_programs(1) * H, H)
    _store(OUT, context * (inverse_keep / total)[:, None], rows, tl.num_programs(1) * H, length, H)
    statistics = _statistics(head, sequence, first, stride_head_lse)
    tl.store(LSE + statistics + rows, tl.where(rows < length, highest + tl.log2(total), float("inf")))


@triton.jit
def _forward_tiles(
    context, total, highest, query, K, V, begin, end, rows, length, stride_token, scale, row_keys, key, addend,
    N: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, N)
    column_keys = _groups(columns) << 16
    place = _byte(rows[:, None], columns[None, :])
    for at in tl.range(begin, end, N):
        keys = _tile(K, at, stride_token, length, N, H, MASK)
        scores = tl.dot(query, keys.T)
        if MASK:
            scores = tl.where(_attends(rows[:, None], (at + columns)[None, :], length, CAUSAL), scores, -float("inf"))
        now = tl.maximum(highest, tl.max(scores, 1) * scale)
        probabilities = tl.exp2(scores * scale - now[:, None])
        shrink = tl.exp2(highest - now)
        highest = now
        total = total * shrink + tl.sum(probabilities, 1)
        context = context * shrink[:, None]
        values = _tile(V, at, stride_token, length, N, H, MASK)
        kept = probabilities.to(values.dtype)
        if DROP:
            flags = _flags((row_keys ^ ((at // 2) << 16))[:, None] ^ column_keys[None, :], key, addend, PACKED)
            kept = _where_kept(kept, flags, place, PACKED)
        context = tl.dot(kept, values, context)
    return context, total, highest


@triton.jit
def grad_query(
    Q, K, V, OUT, GRAD, LSE, DELTA, DQ, BOUNDARIES, SEED, stride_token, stride_head_lse, scale, addend, keep, factor,
    M: tl.constexpr, N: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of M queries, and delta, the keep rate times each row of OUT with its row of GRAD."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(BOUNDARIES + sequence)
    length = tl.load(BOUNDARIES + sequence + 1) - first
    begin = tile * M
    if begin >= length:
        return
    width = tl.num_programs(1) * H
    Q, K, V = (
        _at(Q, first, head, stride_token, H),
        _at(K, first, head, stride_token, H),
        _at(V, first, head, stride_token, H),
    )
    rows = begin + tl.arange(0, M)
    out = _tile(_at(OUT, first, head, width, H), begin, width, length, M, H, True)
    grad = _tile(_at(GRAD, first, head, width, H), begin, width, length, M, H, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1) * keep
    statistics = _statistics(head, sequence, first, stride_head_lse)
    tl.store(DELTA + statistics + rows, delta)
    lse = tl.load(LSE + statistics + rows)
    query = _tile(Q, begin, stride_token, length, M, H, True)
    row_keys, key = _row_keys(SEED, sequence, head, _groups(rows), DROP)
    whole, end = _key_range(begin, length, M, N, CAUSAL)
    dq = tl.zeros((M, H), tl.float32)
    dq = _grad_query_tiles(
        dq, query, grad, lse, delta, K, V, 0, whole, rows, length, stride_token, scale, row_keys, key, addend,
        N, H, CAUSAL, DROP, PACKED, False,
    )  # fmt: skip
    dq = _grad_query_tiles(
        dq, query, grad, lse, delta, K, V, whole, end, rows, length, stride_token, scale, row_keys, key, addend,
        N, H, CAUSAL, DROP, PACKED, True,
    )  # fmt: skip
    _store(_at(DQ, first, head, 3 * width, H), dq * factor, rows, 3 * width, length, H)


@triton.jit
def _grad_query_tiles(
    dq, query, grad, lse, delta, K, V, begin, end, rows, length, stride_token, scale, row_keys, key, addend,
    N: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, N)
    column_keys = _groups(columns) << 16
    place = _byte(rows[:, None], columns[None, :])
    lift: tl.constexpr = LIFT if query.dtype == tl.float16 else 1.0
    for at in tl.range(begin, end, N):
        keys = _tile(K, at, stride_token, length, N, H, MASK)
        values = _tile(V, at, stride_token, length, N, H, MASK)
        scores = tl.dot(query, keys.T)
        products = tl.dot(grad, values.T)
        probabilities = tl.exp2(scores * scale - lse[:, None])
        if MASK:
            ok = _attends(rows[:, None], (at + columns)[None, :], length, CAUSAL)
            probabilities = tl.where(ok, probabilities, 0.0)
        kept = probabilities
        if DROP:
            flags = _flags((row_keys ^ ((at // 2) << 16))[:, None] ^ column_keys[None, :], key, addend, PACKED)
            kept = tl.where(_is_kept(flags, place), probabilities, 0.0)
        ds = (kept * products - probabilities * delta[:, None]) * lift
        dq = tl.dot(ds.to(keys.dtype), keys, dq)
    return dq


@triton.jit
def grad_key_value(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, BOUNDARIES, SEED, stride_token, stride_head_lse, scale, addend,
    inverse_keep, factor,
    M: tl.constexpr, N: tl.constexpr, H: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradients of N keys and values. Tiles of scores are transposed: keys by queries."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(BOUNDARIES + sequence)
    length = tl.load(BOUNDARIES + sequence + 1) - first
    begin = tile * N
    if begin >= length:
        return
    width = tl.num_programs(1) * H
    Q, K, V = (
        _at(Q, first, head, stride_token, H),
        _at(K, first, head, stride_token, H),
        _at(V, first, head, stride_token, H),
    )
    GRAD = _at(GRAD, first, head, width, H)
    statistics = _statistics(head, sequence, first, stride_head_lse)
    LSE, DELTA = LSE + statistics, DELTA + statistics
    columns = begin + tl.arange(0, N)
    keys = _tile(K, begin, stride_token, length, N, H, True)
    values = _tile(V, begin, stride_token, length, N, H, True)
    column_keys, key = _row_keys(SEED, sequence, head, _groups(columns) << 16, DROP)
    dk, dv = tl.zeros((N, H), tl.float32), tl.zeros((N, H), tl.float32)
    diagonal = 0
    if CAUSAL:
        diagonal = tl.minimum(tl.cdiv(begin + N, M), tl.cdiv(length, M)) * M
        dk, dv = _grad_key_value_tiles(
            dk, dv, keys, values, Q, GRAD, LSE, DELTA, begin // M * M, diagonal, columns, length, stride_token, width,
            scale, column_keys, key, addend, M, H, DROP, PACKED, True,
        )  # fmt: skip
    dk, dv = _grad_key_value_tiles(
        dk, dv, keys, values, Q, GRAD, LSE, DELTA, diagonal, length, columns, length, stride_token, width,
        scale, column_keys, key, addend, M, H, DROP, PACKED, False,
    )  # fmt: skip
    _store(_at(DK, first, head, 3 * width, H), dk * factor, columns, 3 * width, length, H)
    _store(_at(DV, first, head, 3 * width, H), dv * inverse_keep, columns, 3 * width, length, H)


@triton.jit
def _grad_key_value_tiles(
    dk, dv, keys, values, Q, GRAD, LSE, DELTA, begin, end, columns, length, stride_token, width,
    scale, column_keys, key, addend,
    M: tl.constexpr, H: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    lines = tl.arange(0, M)
    row_keys = _groups(lines)
    place = _byte(lines[None, :], columns[:, None])
    lift: tl.constexpr = LIFT if keys.dtype == tl.float16 else 1.0
    for at in tl.range(begin, end, M):
        rows = at + lines
        query = _tile(Q, at, stride_token, length, M, H, True)
        lse = tl.load(LSE + rows)  # +inf beyond the sequence: no probability there
        scores = tl.dot(keys, query.T)
        grad = _tile(GRAD, at, width, length, M, H, True)
        products = tl.dot(values, grad.T)
        probabilities = tl.exp2(scores * scale - lse[None, :])
        if CAUSAL:
            probabilities = tl.where(rows[None, :] >= columns[:, None], probabilities, 0.0)
        kept = probabilities
        if DROP:
            flags = _flags((column_keys ^ (at // 2))[:, None] ^ row_keys[None, :], key, addend, PACKED)
            kept = tl.where(_is_kept(flags, place), probabilities, 0.0)
        dv = tl.dot(kept.to(grad.dtype), grad, dv)
        delta = tl.load(DELTA + rows)
        ds = (kept * products - probabilities * delta[None, :]) * lift
        dk = tl.dot(ds.to(query.dtype), query, dk)
    return dk, dv


# --- Where things lie


@triton.jit
def _at(X, first, head, stride_token, H: tl.constexpr):
    """The sequence's first element of this head."""
    return X + first.to(tl.int64) * stride_token + head * H


@triton.jit
def _tile(X, begin, stride_token, length, ROWS: tl.constexpr, H: tl.constexpr, MASK: tl.constexpr):
    rows = begin + tl.arange(0, ROWS)
    pointers = X + rows[:, None] * stride_token + tl.arange(0, H)[None, :]
    if MASK:
        return tl.load(pointers, mask=rows[:, None] < length, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(X, values, rows, stride_token, length, H: tl.constexpr):
    pointers = X + rows[:, None] * stride_token + tl.arange(0, H)[None, :]
    tl.store(pointers, values.to(X.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def _statistics(head, sequence, first, stride_head_lse):
    """Where the statistics of a sequence's rows begin: apart, so that a last tile need not stop at the last row."""
    return head * stride_head_lse + (first & -4) + sequence * SLOT


@triton.jit
def _key_range(begin, length, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr):
    """Up to where every key is attended by every query from `begin` on, and up to where any is."""
    if CAUSAL:
        return begin // N * N, tl.minimum(begin + M, length)
    else:
        return length // N * N, length


@triton.jit
def _attends(row, column, length, CAUSAL: tl.constexpr):
    if CAUSAL:
        return (column < length) & (row >= column)
    else:
        return column < length


# --- Dropout


@triton.jit
def _groups(positions):
    """Two positions, 8 apart, share a number."""
    positions = positions.to(tl.uint32)
    return ((positions >> 4) << 3) | (positions & 7)


@triton.jit
def _byte(row, column):
    """Which byte of its number is a score's, in bits."""
    return ((row.to(tl.uint32) & 8) << 1) | (column.to(tl.uint32) & 8)


@triton.jit
def _row_keys(SEED, sequence, head, groups, DROP: tl.constexpr):
    """The numbers of the tile's fixed side with the first key in them, and the second key."""
    if DROP:
        zero = sequence.to(tl.uint32) * 0
        first, second, _, _ = tl.philox(tl.load(SEED), sequence.to(tl.uint32), head.to(tl.uint32), zero, zero)
        return groups ^ first.to(tl.uint32), second.to(tl.uint32)
    else:
        return groups, tl.full((), 0, tl.uint32)


@triton.jit
def _flags(counter, key, addend, PACKED: tl.constexpr):
    """In the highest bit of each byte, whether its score is kept: whether the random byte reaches the threshold.

    The addend has 128 less the threshold in each byte, so the sum of it and the lower seven bits carries into the
    eighth where these reach the threshold; where the eighth is set, they need not.
    """
    wide = counter.to(tl.uint64) * 0xD2511F53
    mixed = (wide >> 32).to(tl.uint32) ^ wide.to(tl.uint32) ^ key
    mixed = mixed * 0xCD9E8D57
    mixed = mixed ^ (mixed >> 16)
    if PACKED:  # opaque to the compiler, which would otherwise do this again for each byte
        return tl.inline_asm_elementwise(
            "{ .reg .b32 low; and.b32 low, $1, 0x7f7f7f7f; add.u32 low, low, $2; or.b32 $0, low, $1; }",
            "=r,r,r", [mixed, addend], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return ((mixed & 0x7F7F7F7F) + addend) | mixed


@triton.jit
def _is_kept(flags, place):
    return (flags & (tl.full((), 0x80, tl.uint32) << place)) != 0


@triton.jit
def _where_kept(values, flags, place, PACKED: tl.constexpr):
    """16-bit values, or zero. Two at a time: a byte permutation spreads their two flags over a mask of 32 bits."""
    if PACKED:
        selector = ((place >> 3) | 8) * 0x11 | ((place >> 3) | 12) * 0x1100
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; and.b32 a, $4, 0xff; and.b32 b, $5, 0xff00; or.b32 a, a, b;"
            " prmt.b32 b, $2, $3, a; and.b32 $0, $1, b; }",
            "=r,r,r,r,r,r", [values, flags, selector], dtype=values.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.where(_is_kept(flags, place), values, 0.0).to(values.dtype)
