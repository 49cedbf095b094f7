"""Chunk-parallel kernels shared by the linear and the rank-one families: gates, scores, states, reads and gradients.

Tokens of packed sequences are cut into chunks of C. Inside a chunk every pair (read at t, write at s <= t) is weighed by
the decay between them; what lies before the chunk arrives through the state at its start, what lies after it through
the state's adjoint at its end. A read is `before` if it sees the state ahead of its own token's update, not yet decayed.

Every exponent is <= 0. With one decay a head it is G_t - G_s, a difference of cumulative sums, s <= t. With a decay per
channel, pairs are taken level by level: for m = 1, 2, 4, ..., C / 2 a write from a block of m tokens and a read from the
next one meet at the border between them, exp(G_t - G_border) on the read and exp(G_border - G_s) on the write. In a level
every token is either read or written, so one exp a token and one matrix product serve all blocks of it, or where scores are made
all blocks of 16 tokens. For float32 inputs G is float64: gates of -30 and of -1e-6 in one chunk leave the difference exact.

With one decay a head nothing decayed is stored: the walk decays the values that it multiplies keys with, and the read forms its
scores itself. With a decay per channel scores and decayed rows are kept (`Pairs`). Where few long sequences would leave a walk to few
programs, they are cut into pieces that are walked at once: first from nothing, for what each leaves behind, then from their own starts.

A tile that a loop loads is either multiplied in it or worked on, never both: Triton (3.6.0 and 3.7.1 at least) gives a load
with both uses one buffer too few, and on Hopper refills it while the asynchronous product still reads.

Chunks live in slots: sequence n owns those from offsets[n] // C + n on. That is room enough for its chunks, needs no
look at the offsets from the host, and is found again by bisection; slots that no chunk fills are skipped.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unify.kernels.direct import direct

C = 64  # tokens of a chunk
FLOOR = tl.constexpr(-128.0)  # exp of it is nothing, and sums of it over a chunk stay small

# How a pair of tokens is weighed.
HEAD, CHANNEL = tl.constexpr(1), tl.constexpr(2)


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def sequence(slot, offsets, N, C: tl.constexpr):
    """A slot's sequence, that one's first token, the first of the slot's chunk, and the token after the sequence's last."""
    low = slot * 0
    high = low + N - 1
    while low < high:
        middle = (low + high + 1) // 2
        inside = tl.load(offsets + middle) // C + middle <= slot
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle - 1)
    begin = tl.load(offsets + low)
    return low, begin, begin + (slot - begin // C - low) * C, tl.load(offsets + low + 1)


@triton.jit
def locate(slot, offsets, N, C: tl.constexpr):
    """First token of a slot's chunk and the token after its last; an empty range if no chunk is there."""
    _, _, start, last = sequence(slot, offsets, N, C)
    return start, tl.minimum(start + C, last)


@triton.jit
def load(at, start, end, h, H, X, x0, C: tl.constexpr, BX: tl.constexpr, SHIFT: tl.constexpr = 0):
    """Rows [C, BX] of a chunk from [tokens, H, X], zeros outside; SHIFT = 1: one token late, zeros for the first."""
    i, x = tl.arange(0, C), x0 + tl.arange(0, BX)
    seen = (i >= SHIFT) & (i < end - start)
    base = at + ((start - SHIFT) * H + h) * X
    return tl.load(base + i[:, None] * (H * X) + x[None, :], mask=seen[:, None] & (x < X)[None, :], other=0.0)


@triton.jit
def store(at, tile, start, end, h, H, X, x0, C: tl.constexpr, BX: tl.constexpr):
    """Write rows [C, BX] of a chunk into [tokens, H, X]."""
    i, x = tl.arange(0, C), x0 + tl.arange(0, BX)
    base = at + (start * H + h) * X
    mask = (i < end - start)[:, None] & (x < X)[None, :]
    tl.store(base + i[:, None] * (H * X) + x[None, :], tile.to(at.dtype.element_ty), mask=mask)


@triton.jit
def load_row(at, t, h, H, X, x0, BX: tl.constexpr):
    """One token's channels [BX] from [tokens, H, X]."""
    x = x0 + tl.arange(0, BX)
    return tl.load(at + (t * H + h) * X + x, mask=x < X, other=0.0)


@triton.jit
def matrix_at(at, index, K, V, k0, v0, BK: tl.constexpr, BV: tl.constexpr):
    """Pointers and mask of a block [BK, BV] of matrix `index` of [..., K, V]."""
    k, v = k0 + tl.arange(0, BK), v0 + tl.arange(0, BV)
    return at + index.to(tl.int64) * K * V + k[:, None] * V + v[None, :], (k < K)[:, None] & (v < V)[None, :]


@triton.jit
def dot(a, b, DT: tl.constexpr, ACC: tl.constexpr):
    """a b with operands in DT and sums in ACC."""
    return tl.dot(a.to(DT), b.to(DT), input_precision="ieee", out_dtype=ACC)


@triton.jit
def split_dot(a, S, SPLIT: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr):
    """a S; SPLIT: S is wider than DT and enters as the sum of what DT holds and of the rest."""
    high = S.to(DT)
    out = dot(a, high, DT, ACC)
    if SPLIT:
        out += dot(a, S - high.to(S.dtype), DT, ACC)
    return out


@triton.jit
def wide_dot(a, b, SPLIT: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr):
    """a b; SPLIT: both are wider than DT, and enter as such sums; what is left out is the product of the two rests."""
    out = split_dot(a, b, SPLIT, DT, ACC)
    if SPLIT:
        out += dot(a - a.to(DT).to(a.dtype), b, DT, ACC)
    return out


@triton.jit
def weight(x, ACC: tl.constexpr):
    """exp of a sum of log decays; of padding rows, whose differences can be positive, something finite."""
    return tl.exp(tl.minimum(x, 0.0).to(ACC))


@triton.jit
def near(G, start, end, h, H, BEFORE: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """One decay a head, from the chunk's start to what each token reads, [C, 1]."""
    if BEFORE:
        return weight(load(G, start, end, h, H, 1, 0, C, 1, 1), ACC)
    else:
        return weight(load(G, start, end, h, H, 1, 0, C, 1), ACC)


@triton.jit
def far(G, start, end, h, H, C: tl.constexpr, ACC: tl.constexpr):
    """One decay a head, from what each token writes to the chunk's end, [C, 1]."""
    total = load_row(G, end - 1, h, H, 1, 0, 1)[None, :]
    return weight(total - load(G, start, end, h, H, 1, 0, C, 1), ACC)


# ---- pairs of tokens -------------------------------------------------------------------------------------------------


@triton.jit
def causal(C: tl.constexpr, BEFORE: tl.constexpr):
    """[C, C]: which writes s a read at t sees."""
    i = tl.arange(0, C)
    if BEFORE:
        return i[:, None] > i[None, :]
    else:
        return i[:, None] >= i[None, :]


@triton.jit
def between(G, start, end, h, H, BEFORE: tl.constexpr, BACK: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """One decay a head, from each token's write to each token's read, [reads, writes]; 0 where it is not seen. BACK: transposed."""
    after = load(G, start, end, h, H, 1, 0, C, 1)
    seen = load(G, start, end, h, H, 1, 0, C, 1, 1) if BEFORE else after
    if BACK:
        return tl.where(tl.trans(causal(C, BEFORE)), weight(tl.trans(seen) - after, ACC), 0.0)
    else:
        return tl.where(causal(C, BEFORE), weight(seen - tl.trans(after), ACC), 0.0)


@triton.jit
def border(G, level, start, end, h, H, X, x0, C: tl.constexpr, BX: tl.constexpr):
    """G at the last of the first m = 2^level tokens of every 2 m, for each token of those 2 m."""
    i, x = tl.arange(0, C), x0 + tl.arange(0, BX)
    row = tl.minimum((i >> (level + 1) << (level + 1)) + (1 << level) - 1, (end - start - 1).to(tl.int32))
    return tl.load(G + (start * H + h) * X + row[:, None] * (H * X) + x[None, :], mask=(x < X)[None, :], other=0.0)


@triton.jit
def facing(level, C: tl.constexpr):
    """Which tokens are in the second m of every 2 m, the reads, [C, 1]; and which pairs face across the border, [C, C]."""
    block = tl.arange(0, C) >> level
    return (block & 1 == 1)[:, None], (block[:, None] ^ block[None, :]) == 1


@triton.jit
def meet(
    both, read, written, d_read, d_write, slope, decay, level, c,
    LATE: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the reads and writes of a level: a token is one or the other there, so one product gives both.

    both: the scores' gradient plus its transpose; decay: from each token to the border. slope: the sum of read . d read -
    write . d write, of rows as they are multiplied, so that what its sums hold twice cancels however coarse they are; EXACT: the
    gate's gradient itself, from the reads of a block of m tokens that it decays (LATE: only tokens after it), or the writes.
    """
    second, faces = facing(level, C)
    rows = (tl.where(second, read, written) * decay).to(DT)
    flow = c * dot(tl.where(faces, both, 0.0), rows, DT, ACC)
    if EXACT:
        i = tl.arange(0, C)
        u, x = i[:, None], i[None, :]
        seen = tl.where(second, x >= u + LATE, x < u) & ((u >> level) == (x >> level))
        slope += dot(tl.where(seen, 1.0, 0.0), flow * rows, DT, ACC)
    else:
        slope += tl.where(second, flow, -flow) * rows.to(ACC)
    flow *= decay
    return d_read + tl.where(second, flow, 0.0), d_write + tl.where(second, 0.0, flow), slope


@triton.jit
def pair(
    dA, read, written, d_read, d_write, slope, c,
    LATE: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of reads and writes from that of their decayed scores, c dA. slope: the sum of -write . d write, [C]; EXACT: the
    gate's gradient itself, from the pairs that it decays, reads at it or later (LATE: only later) of writes before it."""
    to_write = c * dot(tl.trans(dA), read, DT, ACC)
    if EXACT:
        i = tl.arange(0, C)
        reads = dot(
            tl.where(i[None, :] >= i[:, None] + LATE, 1.0, 0.0), c * dA * dot(read, tl.trans(written), DT, ACC), DT, ACC
        )
        slope += tl.sum(tl.where(i[None, :] < i[:, None], reads, 0.0), 1)
    else:
        slope -= tl.sum(written * to_write, 1)
    return d_read + c * dot(dA, written, DT, ACC), d_write + to_write, slope


@triton.jit
def diagonal(A, C: tl.constexpr):
    """Each token's read of its own write, [C, 1]."""
    i = tl.arange(0, C)
    return tl.sum(tl.where(i[:, None] == i[None, :], A, 0.0), 1)[:, None]


# ---- kernels ---------------------------------------------------------------------------------------------------------


@direct
@triton.jit
def _cumulate(g, G, offsets, N, L, C: tl.constexpr, BL: tl.constexpr):
    """G_t = sum of g from the chunk's first token to t; [tokens, L]."""
    start, end = locate(tl.program_id(0), offsets, N, C)
    if start >= end:
        return
    x0 = tl.program_id(1) * BL
    tile = load(g, start, end, 0, 1, L, x0, C, BL).to(G.dtype.element_ty)
    store(G, tl.cumsum(tl.maximum(tile, FLOOR), 0), start, end, 0, 1, L, x0, C, BL)


@triton.jit
def meeting(
    keys, read, written, G, start, end, h, H, K, BEFORE: tl.constexpr, BACK: tl.constexpr, WHOLE: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Decayed products of a chunk's pairs, one decay a head, [C, C]; BACK: transposed, `read` being what is written.

    WHOLE: BK channels are all, and `keys` are the rows of `read`; the others and the gates are asked for before anything is multiplied.
    """
    if WHOLE:
        met = load(written, start, end, h, H, K, 0, C, BK)
        return between(G, start, end, h, H, BEFORE, BACK, C, ACC) * dot(keys, tl.trans(met), DT, ACC)
    else:
        acc = tl.zeros([C, C], ACC)
        for k0 in range(0, K, BK):
            x = load(read, start, end, h, H, K, k0, C, BK)
            acc += dot(x, tl.trans(load(written, start, end, h, H, K, k0, C, BK)), DT, ACC)
        return acc * between(G, start, end, h, H, BEFORE, BACK, C, ACC)


@direct
@triton.jit
def _scores(
    read, written, A, G, offsets, N, H, K,
    BEFORE: tl.constexpr, WHOLE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A[t, s] = exp(sum of g over s < i <= t, or < t if BEFORE) read_t . written_s; [tokens, H, C]. One decay a head."""
    start, end = locate(tl.program_id(0), offsets, N, C)
    if start >= end:
        return
    h = tl.program_id(1)
    keys = load(read, start, end, h, H, K, 0, C, BK) if WHOLE else 0.0
    acc = meeting(keys, read, written, G, start, end, h, H, K, BEFORE, False, WHOLE, C, BK, DT, ACC)
    store(A, tl.where(causal(C, BEFORE), acc, 0.0), start, end, h, H, C, 0, C, C)


@triton.jit
def rows(at, row, H, X, x0, EVEN: tl.constexpr, BX: tl.constexpr):
    """Rows [R, BX] of a chunk, tokens `row` [R, 1] of it; at: its first one's in [tokens, H, X]. EVEN: BX divides X.

    A quarter of a row is said to be as many neighbours as there are, so that a thread gets what `dealt` wants it to have.
    """
    x = x0 + tl.max_contiguous(tl.arange(0, BX), BX // 4)[None, :]
    if EVEN:
        return tl.load(at + (row * (H * X) + x))
    else:
        return tl.load(at + (row * (H * X) + x), mask=x < X, other=0.0)


@triton.jit
def put(at, tile, row, n, H, X, x0, BX: tl.constexpr):
    """Write such rows, of the chunk's n tokens."""
    x = x0 + tl.max_contiguous(tl.arange(0, BX), BX // 4)[None, :]
    tl.store(at + (row * (H * X) + x), tile.to(at.dtype.element_ty), mask=(row < n) & (x < X))


@triton.jit
def fade(x, ACC: tl.constexpr):
    """exp(-|x|), x a sum of log decays or its negative; as a power of two, because tl.exp takes three more instructions to keep
    what is as good as 0."""
    return tl.exp2(tl.abs(x.to(ACC)) * -1.4426950408889634)


@triton.jit
def dealt(z, BK: tl.constexpr):
    """[R, BK] with its columns in another order. A thread that loads a quarter of a row then holds just what a matrix product of
    [16, 16] by [16, 8] wants from it, as its first operand or, transposed, its second: nothing moves between threads."""
    if BK == 32:
        z = tl.reshape(tl.permute(tl.reshape(z, [z.shape[0], 4, 2, 2, 2]), [0, 2, 3, 1, 4]), z.shape)
    elif BK == 16:
        z = tl.reshape(tl.permute(tl.reshape(z, [z.shape[0], 4, 2, 2]), [0, 2, 1, 3]), z.shape)
    return z


@triton.jit
def products(x, y, acc, BK: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr):
    """acc + x y^T over a block of channels."""
    x, y = dealt(x.to(DT), BK), dealt(y.to(DT), BK)
    return tl.dot(x, tl.trans(y), acc, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _beside(
    read, second, written, A, A2, reads, reads2, writes, G, row, n, H, K,
    BEFORE: tl.constexpr, TWO: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, EVEN: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores among the 16 tokens from `row` on, zeros to the right of them, and these tokens decayed to their chunk's borders."""
    acc, acc2 = tl.zeros([16, 16], ACC), tl.zeros([16, 16], ACC)
    t, s = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    own, end = row + t, t * 0 + n - 1
    here, ahead = tl.minimum(own, n - 1), tl.minimum(tl.maximum(own - 1, 0), n - 1)
    for k0 in range(0, K, BK):
        x, y = rows(read, here, H, K, k0, EVEN, BK), rows(written, here, H, K, k0, EVEN, BK)
        after = rows(G, here, H, K, k0, EVEN, BK)
        before = tl.where(own > 0, rows(G, ahead, H, K, k0, EVEN, BK), 0.0)
        if TWO:
            x2 = rows(second, here, H, K, k0, EVEN, BK).to(ACC)
        x, y, plain = x.to(ACC), y.to(ACC), x
        if not BEFORE:  # decayed by its token's gate, a read is one before the update
            x *= fade(after - before, ACC)
        if NEAR:
            from_start = fade(before, ACC)
            put(reads, x * from_start, own, n, H, K, k0, BK)
            if TWO:
                put(reads2, x2 * from_start, own, n, H, K, k0, BK)
        if FAR:
            put(writes, y * fade(rows(G, end, H, K, k0, EVEN, BK) - after, ACC), own, n, H, K, k0, BK)
        if not BEFORE:
            acc = tl.where(t == s, products(plain, y, acc, BK, DT, ACC), acc)
        for level in tl.static_range(4):
            later, faces = ((t >> level) & 1) == 1, ((t >> level) ^ (s >> level)) == 1
            z = tl.where(later, x, y)
            if TWO:
                z2 = tl.where(later, x2, y)
            if level > 0:  # at level 0 the border is the write's own token, and the one before the read
                edge = tl.minimum(row + (t >> (level + 1) << (level + 1)) + (1 << level) - 1, n - 1)
                decay = fade(tl.where(later, before, after) - rows(G, edge, H, K, k0, EVEN, BK), ACC)
                z *= decay
                if TWO:
                    z2 *= decay
            acc = tl.where(faces, products(z, z, acc, BK, DT, ACC), acc)
            if TWO:
                acc2 = tl.where(faces, products(z2, z2, acc2, BK, DT, ACC), acc2)
    put(A, tl.where(t - s >= BEFORE, acc, 0.0), own, n, H, C, row, 16)
    clear(A, row, n, H, C)
    if TWO:
        put(A2, tl.where(t > s, acc2, 0.0), own, n, H, C, row, 16)
        clear(A2, row, n, H, C)


@triton.jit
def clear(A, row, n, H, C: tl.constexpr):
    """Zeros to the right of what the 16 tokens from `row` on read of each other."""
    t, s = row + tl.arange(0, 16)[:, None], tl.arange(0, C)[None, :]
    tl.store(A + (t * (H * C) + s), tl.zeros([16, C], A.dtype.element_ty), mask=(t < n) & (s >= row + 16))


@triton.jit
def _across(
    read, second, written, A, A2, G, column, n, H, K,
    BEFORE: tl.constexpr, TWO: tl.constexpr, EVEN: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores of W reads with the W writes before them, from `column` on: the last of these is the border where they meet."""
    acc, acc2 = tl.zeros([W, W], ACC), tl.zeros([W, W], ACC)
    there = column + tl.arange(0, W)[:, None]
    own, edge = there + W, there * 0 + column + W - 1
    here, ahead = tl.minimum(own, n - 1), tl.minimum(own, n) - 1
    for k0 in range(0, K, BK):
        middle = rows(G, edge, H, K, k0, EVEN, BK)
        y = rows(written, there, H, K, k0, EVEN, BK).to(ACC) * fade(rows(G, there, H, K, k0, EVEN, BK) - middle, ACC)
        before = fade(rows(G, ahead, H, K, k0, EVEN, BK) - middle, ACC) if BEFORE or TWO else middle
        decay = before if BEFORE else fade(rows(G, here, H, K, k0, EVEN, BK) - middle, ACC)
        acc = products(rows(read, here, H, K, k0, EVEN, BK).to(ACC) * decay, y, acc, BK, DT, ACC)
        if TWO:
            acc2 = products(rows(second, here, H, K, k0, EVEN, BK).to(ACC) * before, y, acc2, BK, DT, ACC)
    put(A, acc, own, n, H, C, column, W)
    if TWO:
        put(A2, acc2, own, n, H, C, column, W)


PARTS = 7  # programs that share a chunk's scores with a decay per channel


@direct
@triton.jit
def _channel_scores(
    read, second, written, A, A2, reads, reads2, writes, G, offsets, N, H, K,
    BEFORE: tl.constexpr, TWO: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A[t, s] = sum_j read_tj exp(sum of g_j over s < i <= t, or < t if BEFORE) written_sj; [tokens, H, C].

    TWO: A2 too, of second, a read before its token's update. NEAR: the reads decayed from the chunk's start, and FAR: the writes
    decayed to its end, [tokens, H, K]. EVEN: BK divides K. Seven programs share a chunk of 64: four see to 16 tokens among
    themselves, two to pairs of such blocks, one to the two halves. Those of a chunk's heads, neighbours in memory, run side by side.
    """
    part, item = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    h = item % H
    start, end = locate(item // H, offsets, N, C)
    row = tl.where(part < 4, part * 16, tl.where(part < 6, part * 32 - 112, 32))
    n = (end - start).to(tl.int32)
    if row >= n:
        return
    base = (start * H + h) * K
    read, second, written, G = read + base, second + base, written + base, G + base
    A, A2 = A + (start * H + h) * C, A2 + (start * H + h) * C
    if part < 4:
        _beside(
            read, second, written, A, A2, reads + base, reads2 + base, writes + base, G, row, n, H, K,
            BEFORE, TWO, NEAR, FAR, EVEN, C, BK, DT, ACC,
        )  # fmt: skip
    elif part < 6:
        _across(read, second, written, A, A2, G, row - 16, n, H, K, BEFORE, TWO, EVEN, 16, C, BK, DT, ACC)
    else:
        _across(read, second, written, A, A2, G, 0, n, H, K, BEFORE, TWO, EVEN, 32, C, BK, DT, ACC)


@triton.jit
def deposit(
    b, v, gain, G, start, end, c, h, H, K, V, k0, v0, REVERSE: tl.constexpr, GAIN: tl.constexpr, BEFORE: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BX: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """c b^T v, what a chunk adds to the state at its end or, in REVERSE, to the adjoint at its start; see `_walk`."""
    keys, values = load(b, start, end, h, H, K, k0, C, BK), load(v, start, end, h, H, V, v0, C, BV)
    if BX == 1:
        share = near(G, start, end, h, H, BEFORE, C, ACC) if REVERSE else far(G, start, end, h, H, C, ACC)
        if GAIN:
            share *= load(gain, start, end, h, H, 1, 0, C, 1).to(ACC)
        return c * dot(tl.trans(keys), values * share, DT, ACC)
    else:
        return c * dot(tl.trans(keys), values, DT, ACC)


@direct
@triton.jit
def _walk(
    x, z, u, a, b, v, gain, G, s0, s0_n, s0_h, starts, last, sums, offsets, c, pieces, H, K, V, X,
    REVERSE: tl.constexpr, RANK: tl.constexpr, ADDED: tl.constexpr, GAIN: tl.constexpr, BEFORE: tl.constexpr, BORDERS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BX: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """S from chunk to chunk, kept at each one's border: S <- decay S + a^T u + c b^T v with u = z - x S.

    Forward in time, a and b are writes decayed to their chunk's end, and S is kept at chunks' starts. In REVERSE they are
    reads decayed from its start, S is an adjoint kept at chunks' ends, and u = z + x S is subtracted. RANK: there is a u;
    ADDED: there is a v; GAIN: a factor of it, [tokens, H].
    With one decay a head (BX = 1) a and b come as they are, and here what they are multiplied with decays instead; in REVERSE
    a is read before its token's update, b if BEFORE.
    Every sequence is walked in pieces, a program each, from their starts in s0 [N, H, pieces, K, V]. Not BORDERS: for `_pass` to
    find these. Then last [N, H, pieces, K, V] gets, in each piece's place, what the piece before it makes of nothing (in the first
    one's, s0 [N, H, K, V]), and sums [N, H, pieces, X] the logs of all gates on the way there.
    """
    blocks = tl.cdiv(V, BV)
    tiles = tl.cdiv(K, BK) * blocks
    part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, piece, k0, v0 = part // pieces, part % pieces, tile // blocks * BK, tile % blocks * BV
    n, h, x0 = row // H, row % H, k0 if BX > 1 else 0
    begin, finish = tl.load(offsets + n), tl.load(offsets + n + 1)
    first, chunks = begin // C + n, (finish - begin + C - 1) // C
    walked = piece if BORDERS else piece - 1
    source, inside = matrix_at(s0 + n.to(tl.int64) * s0_n + h * s0_h, piece, K, V, k0, v0, BK, BV)
    S = tl.load(source, mask=inside if BORDERS else inside & (piece == 0), other=0.0).to(ACC)
    if not BORDERS:
        passed = tl.zeros([BX], G.dtype.element_ty)
    begun = tl.maximum(walked, 0) * chunks // pieces
    for count in range(0, (walked + 1) * chunks // pieces - begun):
        chunk = chunks - 1 - begun - count if REVERSE else begun + count
        start = begin + chunk * C
        end = tl.minimum(start + C, finish)
        if BORDERS:
            at, _ = matrix_at(starts, (first + chunk) * H + h, K, V, k0, v0, BK, BV)
            tl.store(at, S.to(starts.dtype.element_ty), mask=inside)
        if RANK:
            y = dot(load(x, start, end, h, H, K, k0, C, BK), S, DT, ACC)
            base = load(z, start, end, h, H, V, v0, C, BV)
            unknown = base + y if REVERSE else base - y
            store(u, unknown, start, end, h, H, V, v0, C, BV)
        loss = load_row(G, end - 1, h, H, X, x0, BX)
        S *= weight(loss, ACC)[:, None]
        if not BORDERS:
            passed += loss
        if RANK:
            if BX == 1:
                unknown *= near(G, start, end, h, H, True, C, ACC) if REVERSE else far(G, start, end, h, H, C, ACC)
            change = dot(tl.trans(load(a, start, end, h, H, K, k0, C, BK)), unknown, DT, ACC)
            S = S - change if REVERSE else S + change
        if ADDED:
            S += deposit(
                b, v, gain, G, start, end, c, h, H, K, V, k0, v0, REVERSE, GAIN, BEFORE, C, BK, BV, BX, DT, ACC
            )
    if BORDERS:
        target, inside = matrix_at(last, row, K, V, k0, v0, BK, BV)
        tl.store(target, S, mask=inside & (piece == pieces - 1))
    else:
        target, inside = matrix_at(last, part, K, V, k0, v0, BK, BV)
        tl.store(target, S, mask=inside)
        j = x0 + tl.arange(0, BX)
        tl.store(sums + part.to(tl.int64) * X + j, passed, mask=j < X)  # programs that share gates write the same


@triton.jit
def _join(a1, x1, a2, x2):
    return a1 * a2, a2 * x1 + x2


@direct
@triton.jit
def _pass(S, sums, pieces, K, V, X, STEP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """In place, S[piece] += exp(sums[piece]) S[piece - 1], the state each piece starts with; STEP of them at once."""
    blocks = tl.cdiv(K * V, BLOCK)
    row, e = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    order, state = tl.arange(0, STEP), tl.zeros([BLOCK], ACC)
    for first in range(0, pieces, STEP):
        part = (row.to(tl.int64) * pieces + first + order)[:, None]
        live = (first + order < pieces)[:, None] & (e < K * V)[None, :]
        at = S + part * (K * V) + e[None, :]
        decay = weight(tl.load(sums + part * X + (e // V % X)[None, :], mask=live, other=0.0), ACC)
        kept, added = tl.associative_scan((decay, tl.load(at, mask=live, other=0.0)), 0, _join)
        states = kept * state[None, :] + added
        tl.store(at, states, mask=live)
        state = tl.sum(tl.where((order == STEP - 1)[:, None], states, 0.0), 0)


@direct
@triton.jit
def _read(
    key, S, A1, x1, A2, x2, G, out, offsets, c0, c1, c2, N, H, K, V, span,
    GATE: tl.constexpr, BACK: tl.constexpr, TWO: tl.constexpr, BEFORE: tl.constexpr, BEFORE2: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, ONE: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = c0 key S + c1 A1 x1 (+ c2 A2 x2): decayed reads of the state at the chunk's start and of the chunk's own writes.

    BACK: key is a decayed write, S the adjoint at the chunk's end, and the scores A are transposed.
    With one decay a head key comes as it is, and in place of the scores what it meets, writes or if BACK reads [tokens, H, K].
    A program reads `span` value channels. SPLIT: see `split_dot`. WHOLE: BK holds all keys. ONE: BV all values as well.
    """
    blocks = tl.cdiv(V, span)
    slot, v0, h = tl.program_id(0) // blocks, tl.program_id(0) % blocks * span, tl.program_id(1)
    start, end = locate(slot, offsets, N, C)
    if start >= end:
        return
    keys = 0.0
    if ONE:  # asked for before anything is multiplied, so that a program waits for memory once
        keys = load(key, start, end, h, H, K, 0, C, BK)
        at, inside = matrix_at(S, slot * H + h, K, V, 0, v0, BK, BV)
        state, x = tl.load(at, mask=inside, other=0.0), load(x1, start, end, h, H, V, v0, C, BV)
        y = load(x2, start, end, h, H, V, v0, C, BV) if TWO else x
    if GATE == HEAD:
        decay = far(G, start, end, h, H, C, ACC) if BACK else near(G, start, end, h, H, BEFORE, C, ACC)
        first = meeting(keys, key, A1, G, start, end, h, H, K, BEFORE, BACK, ONE, C, BK, DT, ACC)
        if TWO:
            second = meeting(keys, key, A2, G, start, end, h, H, K, BEFORE2, BACK, ONE, C, BK, DT, ACC)
    else:
        first = load(A1, start, end, h, H, C, 0, C, C)
        first = tl.trans(first) if BACK else first
        if TWO:
            second = load(A2, start, end, h, H, C, 0, C, C)
            second = tl.trans(second) if BACK else second
    if WHOLE and not ONE:
        keys = load(key, start, end, h, H, K, 0, C, BK)
    for v in range(v0, tl.minimum(v0 + span, V), BV):
        if WHOLE:
            if not ONE:
                at, inside = matrix_at(S, slot * H + h, K, V, 0, v, BK, BV)
                state = tl.load(at, mask=inside, other=0.0)
            acc = split_dot(keys, state, SPLIT, DT, ACC)
        else:
            acc = tl.zeros([C, BV], ACC)
            for k0 in range(0, K, BK):
                at, inside = matrix_at(S, slot * H + h, K, V, k0, v, BK, BV)
                rows = load(key, start, end, h, H, K, k0, C, BK)
                acc += split_dot(rows, tl.load(at, mask=inside, other=0.0), SPLIT, DT, ACC)
        if GATE == HEAD:
            acc *= decay
        if not ONE:
            x = load(x1, start, end, h, H, V, v, C, BV)
        acc = c0 * acc + c1 * dot(first, x, DT, ACC)
        if TWO:
            if not ONE:
                y = load(x2, start, end, h, H, V, v, C, BV)
            acc += c2 * dot(second, y, DT, ACC)
        store(out, acc, start, end, h, H, V, v, C, BV)


@triton.jit
def outside(
    do, du, v, u, S, D, slot, k0, start, end, h, H, K, V,
    READS: tl.constexpr, WRITES: tl.constexpr, SPLIT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What reads get from the state at a chunk's start and writes from the adjoint at its end, undecayed; sum_v S D, [BK]; and the
    products of pairs, do v^T, do u^T, du v^T, du u^T."""
    d_q, d_r, d_k, d_w = tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC)
    qk, qw, rk, rw = tl.zeros([C, C], ACC), tl.zeros([C, C], ACC), tl.zeros([C, C], ACC), tl.zeros([C, C], ACC)
    both = tl.zeros([BK], ACC)
    for v0 in range(0, V, BV):
        at, inside = matrix_at(S, slot * H + h, K, V, k0, v0, BK, BV)
        state = tl.load(at, mask=inside, other=0.0).to(ACC)
        at, inside = matrix_at(D, slot * H + h, K, V, k0, v0, BK, BV)
        both += tl.sum(state * tl.load(at, mask=inside, other=0.0).to(ACC), 1)
    for v0 in range(0, V, BV):
        at, inside = matrix_at(S, slot * H + h, K, V, k0, v0, BK, BV)
        state = tl.load(at, mask=inside, other=0.0)
        at, inside = matrix_at(D, slot * H + h, K, V, k0, v0, BK, BV)
        adjoint = tl.load(at, mask=inside, other=0.0)
        to_q, to_k = load(do, start, end, h, H, V, v0, C, BV), load(v, start, end, h, H, V, v0, C, BV)
        d_q += split_dot(to_q, tl.trans(state), SPLIT, DT, ACC)
        d_k += split_dot(to_k, tl.trans(adjoint), SPLIT, DT, ACC)
        qk += dot(to_q, tl.trans(to_k), DT, ACC)
        if READS == 2:
            to_r = load(du, start, end, h, H, V, v0, C, BV)
            d_r += split_dot(to_r, tl.trans(state), SPLIT, DT, ACC)
            rk += dot(to_r, tl.trans(to_k), DT, ACC)
        if WRITES == 2:
            to_w = load(u, start, end, h, H, V, v0, C, BV)
            d_w += split_dot(to_w, tl.trans(adjoint), SPLIT, DT, ACC)
            qw += dot(to_q, tl.trans(to_w), DT, ACC)
            if READS == 2:
                rw += dot(to_r, tl.trans(to_w), DT, ACC)
    return d_q, d_r, d_k, d_w, both, qk, qw, rk, rw


@direct
@triton.jit
def _grads(
    q, r, k, w, do, du, v, u, S, D, G, dq, dr, dk, dw, dg, offsets, c, N, H, K, V, X, tokens,
    READS: tl.constexpr, WRITES: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, SPLIT: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BX: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of reads and writes and of the gates, for a block of key channels of a chunk.

    Reads: q with cotangent c do, and r (before its token's update) with cotangent -du. Writes: k with v, and w with u.
    S is the state at the chunk's start and D the adjoint at its end. A gate decays what is read later of what was written
    earlier: dg_t is sum_v S D decayed over the chunk, the reads of S from t on, the writes before t that D sees, and the
    pairs inside the chunk with a read from t on and a write before it. EXACT (operands as precise as sums) adds up just
    these; otherwise they are the sum from t on of read . d read - write . d write, less `late`, what is read at t ahead of
    its gate: fewer products, in which what no gate decays cancels. SPLIT: see `split_dot`.
    """
    blocks = tl.cdiv(K, BK)
    slot, k0, h = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BK, tl.program_id(1)
    start, end = locate(slot, offsets, N, C)
    if start >= end:
        return
    x0 = k0 if BX > 1 else 0
    EXACT: tl.constexpr = DT == ACC
    d_q, d_r, d_k, d_w, tail, d_qk, d_qw, d_rk, d_rw = outside(
        do, du, v, u, S, D, slot, k0, start, end, h, H, K, V, READS, WRITES, SPLIT, C, BK, BV, DT, ACC
    )
    after = load(G, start, end, h, H, X, x0, C, BX)
    before = load(G, start, end, h, H, X, x0, C, BX, 1)
    total = load_row(G, end - 1, h, H, X, x0, BX)
    seen = before if BEFORE else after
    # rows as they are multiplied, float16 as bfloat16: what cancels in the sums below must be equal on both sides
    q_ = load(q, start, end, h, H, K, k0, C, BK).to(DT).to(ACC)
    k_ = load(k, start, end, h, H, K, k0, C, BK).to(DT).to(ACC)
    to_end = weight(total[None, :] - after, ACC)
    d_q *= c * weight(seen, ACC)
    d_k *= to_end
    reads, passed = q_ * d_q, k_ * d_k
    late = reads if BEFORE else tl.zeros([C, BK], ACC)
    if READS == 2:
        r_ = load(r, start, end, h, H, K, k0, C, BK).to(DT).to(ACC)
        d_r *= -weight(before, ACC)
        reads, late = reads + r_ * d_r, late + r_ * d_r
    if WRITES == 2:
        w_ = load(w, start, end, h, H, K, k0, C, BK).to(DT).to(ACC)
        d_w *= to_end
        passed += w_ * d_w
    tail *= weight(total, ACC)

    d_qk, d_rk = tl.where(causal(C, BEFORE), d_qk, 0.0), tl.where(causal(C, True), d_rk, 0.0)
    d_qw, d_rw = tl.where(causal(C, BEFORE), d_qw, 0.0), tl.where(causal(C, True), d_rw, 0.0)
    if GATE == HEAD:
        passed, slope = tl.sum(passed, 1), tl.zeros([C], ACC)
        if EXACT:
            reads = tl.sum(reads, 1)
            slope = tl.sum(tail, 0) + tl.sum(reads, 0) - tl.cumsum(reads - passed, 0) + reads - passed - tl.sum(late, 1)
        decay = weight(seen - tl.trans(after), ACC)
        d_q, d_k, slope = pair(d_qk * decay, q_, k_, d_q, d_k, slope, c, BEFORE, EXACT, C, DT, ACC)
        if WRITES == 2:
            d_q, d_w, slope = pair(d_qw * decay, q_, w_, d_q, d_w, slope, c, BEFORE, EXACT, C, DT, ACC)
        if READS == 2:
            decay = weight(before - tl.trans(after), ACC)
            d_r, d_k, slope = pair(d_rk * decay, r_, k_, d_r, d_k, slope, -1.0, True, EXACT, C, DT, ACC)
            if WRITES == 2:
                d_r, d_w, slope = pair(d_rw * decay, r_, w_, d_r, d_w, slope, -1.0, True, EXACT, C, DT, ACC)
    else:
        slope = reads - passed
        if EXACT:
            slope = (tail + tl.sum(reads, 0))[None, :] - tl.cumsum(slope, 0) + slope - late
        else:
            tail += tl.sum(passed, 0)
        if not BEFORE:
            own = c * diagonal(d_qk, C)
            d_q, d_k = d_q + own * k_, d_k + own * q_
            if WRITES == 2:
                own = c * diagonal(d_qw, C)
                d_q, d_w = d_q + own * w_, d_w + own * q_
        d_qk += tl.trans(d_qk)
        if READS == 2:
            d_rk += tl.trans(d_rk)
        if WRITES == 2:
            d_qw += tl.trans(d_qw)
            d_rw += tl.trans(d_rw)
        ahead = border(G, 0, start, end, h, H, X, x0, C, BX)
        for level in range(LEVELS):
            middle, ahead = ahead, border(G, level + 1, start, end, h, H, X, x0, C, BX)  # under way early
            second, _ = facing(level, C)
            decay = weight(tl.where(second, seen - middle, middle - after), ACC)
            d_q, d_k, slope = meet(d_qk, q_, k_, d_q, d_k, slope, decay, level, c, BEFORE, EXACT, C, DT, ACC)
            if WRITES == 2:
                d_q, d_w, slope = meet(d_qw, q_, w_, d_q, d_w, slope, decay, level, c, BEFORE, EXACT, C, DT, ACC)
            if READS == 2:
                decay = weight(tl.where(second, before - middle, middle - after), ACC)
                d_r, d_k, slope = meet(d_rk, r_, k_, d_r, d_k, slope, decay, level, -1.0, True, EXACT, C, DT, ACC)
                if WRITES == 2:
                    d_r, d_w, slope = meet(d_rw, r_, w_, d_r, d_w, slope, decay, level, -1.0, True, EXACT, C, DT, ACC)
    if not EXACT:
        late = q_ * d_q if BEFORE else tl.zeros([C, BK], ACC)
        late = late + r_ * d_r if READS == 2 else late
    if GATE == HEAD:
        if not EXACT:
            slope += tl.sum(late if BEFORE else late + q_ * d_q, 1)
            slope = tl.sum(tail, 0) + tl.sum(slope, 0) - tl.cumsum(slope - passed, 0) + slope - passed - tl.sum(late, 1)
        share = dg + (k0 // BK).to(tl.int64) * tokens * H  # of this block of channels; they are added up later
        store(share, slope[:, None], start, end, h, H, 1, 0, C, 1)
    else:
        if not EXACT:
            slope = (tail + tl.sum(slope, 0))[None, :] - tl.cumsum(slope, 0) + slope - late
        store(dg, slope, start, end, h, H, X, x0, C, BX)
    store(dq, d_q, start, end, h, H, K, k0, C, BK)
    store(dk, d_k, start, end, h, H, K, k0, C, BK)
    if READS == 2:
        store(dr, d_r, start, end, h, H, K, k0, C, BK)
    if WRITES == 2:
        store(dw, d_w, start, end, h, H, K, k0, C, BK)


# ---- launches --------------------------------------------------------------------------------------------------------

TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
LEVELS = C.bit_length() - 1

# Blocks of key and value channels, warps and pipeline stages, for bfloat16; the rank-one walk holds all key channels.
# Microseconds of one launch on an H200 (torch 2.11, Triton 3.6 or 3.7) at B=2, T=4096, H=16, K=96, V=192 / B=1, T=32768, H=8,
# K=V=128, and what else was tried, as blocks x warps:
TILES = {
    "head scores": (64, 64, 4, 2),  # 27 / 52, of many short sequences 36; 8 warps, 3 stages 28 / 49, 43
    # 112 registers 119, 144 112; 32 channels and 168 registers 125 / 303, of one read and 128 73 / 174, but at V = 48 104 for 82
    "channel scores of two": (16, 64, 1, 1),  # 104 / 254
    "channel scores": (16, 64, 1, 1),  # 77 / 186
    "linear walk": (64, 32, 4, 3),  # 72 / 420; 64x64x4 84 / 540, 32x32x4 92 / 488, 64x16x4 119
    "rank walk": (0, 32, 4, 2),  # 143 / 540, backward 211 / 1060 (few); 64x8 backward 237, 16x4 157, 32x8 260
    "rank walk few": (0, 16, 4, 3),  # 201 / 593, backward 415 / 1007; of many short sequences, V = 48, 52, 32x4 61
    "rank walk back": (0, 64, 8, 2),  # with a decay per channel, backward: 231, as 32x4 381
    "rank walk tall": (0, 16, 8, 1),  # K > 128, for want of shared memory
    "read": (128, 64, 4, 2),  # 70 / 108; 64x64 91 / 145, 128x32 99 / 138, 3 stages 77 / 120, 128 registers 71 / 112
    "head grads": (64, 64, 4, 2),  # 188 / 329; 32x64x4 172 / 365, 32x64x8 234 / 521
    "channel grads": (32, 128, 4, 2),  # 434 / 1026; 32x64x4 477 / 1172, 64x64x8 556 / 1016
    "channel grads of two": (16, 64, 4, 3),  # 797 / 1820; 2 stages 835 / 1860, 64x64x8 1314 / 2429, 32x64x8 979 / 2355
    "mix": (64, 64, 4, 3),  # 50 / 84; 128x64 56 / 92, 1 stage 54 / 89, 32x64 54 / 100, 16x64 71 / 117
    "mix of a block": (64, 64, 4, 1),  # of many short sequences 47; 3 stages 50
    "solve": (0, 32, 4, 1),  # all key channels, and tokens: - / 893; 64x8 1007, 16x4 1031, 32x8 1057, 64x4 1951
    "solve exact": (0, 32, 8, 1),  # float32: 16 tokens, for want of registers
}
# A thread's at most, for bfloat16: a multiprocessor holds 16 and 21 programs of the scores, three of the read, 16 of the inverse.
REGISTERS = {"channel scores of two": 128, "channel scores": 96, "read": 168, "inverse": 128}
BUSY = 128  # programs of a walk below which much of the chip idles: there sequences are walked in pieces,
FULL = 640  # at most so many programs: five fit on each of 132 multiprocessors, and more would wait for these
SHORTEST = 8  # chunks of a piece, on average
PASS = 16, 64  # pieces and elements at once


def power(n: int) -> int:
    """The power of two from n on."""
    return 1 << (n - 1).bit_length()


def blocks(n: int, block: int) -> int:
    """How many blocks hold n."""
    return -(-n // block)


class Layout(NamedTuple):
    """Sizes, types and tables that all launches of one call share."""

    offsets: Tensor
    tokens: int
    N: int
    H: int
    K: int
    V: int
    X: int  # decays of a head: 1 or K
    work: torch.dtype  # of operands of matrix products and of what is kept between kernels
    wide: torch.dtype  # of sums

    @property
    def slots(self) -> int:
        return self.tokens // C + self.N

    @property
    def half(self) -> bool:
        return self.work == torch.bfloat16

    @property
    def gate(self) -> int:
        return HEAD.value if self.X == 1 else CHANNEL.value

    def wide_gate(self, block: int) -> int:
        """Gates beside a block of key channels."""
        return 1 if self.X == 1 else block

    def tile(self, name: str, K: int, V: int) -> tuple[int, int, dict]:
        """Blocks of K and V channels, powers of two that a matrix product takes, and the launch's options; float32 gets less."""
        return _tile(name, K, V, self.work, self.wide)

    def gates_like(self, like: Tensor) -> Tensor:
        """A buffer for cumulative gates; in double precision where the inputs deserve it."""
        return self.empty(like, self.tokens, self.H, self.X, dtype=torch.float32 if self.half else torch.float64)

    def states_like(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer for the states at chunks' borders."""
        return self.empty(like, self.slots, self.H, self.K, self.V, dtype=dtype)

    def scores_like(self, like: Tensor) -> Tensor:
        """A buffer for scores."""
        return self.empty(like, self.tokens, self.H, C)

    def empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return like.new_empty(shape, dtype=dtype or self.work)


@cache
def _tile(name: str, K: int, V: int, work: torch.dtype, wide: torch.dtype) -> tuple[int, int, dict]:
    BK, BV, warps, stages = TILES[name]
    if work != torch.bfloat16:
        BK, BV, warps, stages = BK // 2, BV // 2, 8 if warps > 1 else 1, 1
    BK, BV = (max(16, min(power(n), most)) for n, most in ((K, BK or power(K)), (V, BV)))
    launch = {"C": C, "DT": TYPES[work], "ACC": TYPES[wide], "num_warps": warps, "num_stages": stages}
    return BK, BV, launch | ({"maxnreg": REGISTERS[name]} if name in REGISTERS and work == torch.bfloat16 else {})


def layout(q: Tensor, v: Tensor, g: Tensor, offsets: Tensor) -> Layout:
    """Half-precision inputs are multiplied as bfloat16; sums are float32, of float64 inputs float64."""
    B, T, H, K = q.shape
    exact = q.dtype in (torch.float32, torch.float64)
    half = torch.float32 if triton.knobs.runtime.interpret else torch.bfloat16  # the interpreter multiplies no bfloat16
    work, wide = (q.dtype if exact else half), (torch.float64 if q.dtype == torch.float64 else torch.float32)
    # Padding of a single channel to blocks would be a column of its own; K = 1 per channel is one decay a head.
    return Layout(
        offsets, B * T, offsets.shape[0] - 1, H, K, v.shape[-1], 1 if g.ndim == 3 or K == 1 else K, work, wide
    )


def cumulate(at: Layout, g: Tensor) -> Tensor:
    """Cumulative log decays inside chunks, [tokens, H, X]."""
    G = at.gates_like(g)
    L = at.H * at.X
    BL = max(16, min(power(L), 64))
    _cumulate[at.slots, blocks(L, BL)](g, G, at.offsets, at.N, L, C, BL, num_warps=4)
    return G


def scores(at: Layout, read: Tensor, written: Tensor, G: Tensor, before: bool) -> Tensor:
    """Decayed products of reads and writes inside chunks, [tokens, H, C]."""
    return _launch_scores(at, (read, None), written, G, before)[0]


class Pairs(NamedTuple):
    """What goes on inside chunks with a decay per channel: scores of reads and writes [tokens, H, C], and both decayed to their
    chunk's borders, [tokens, H, K]. None where that is not asked for, or where kernels see to it: one decay a head."""

    scores: Tensor | None = None
    second: Tensor | None = None
    near: Tensor | None = None
    near2: Tensor | None = None
    far: Tensor | None = None


def pairs(
    at: Layout, read: Tensor, second: Tensor | None, written: Tensor, G: Tensor, before: bool, near: bool = True
) -> Pairs:
    """All pairs of one or two reads, the second before its token's update, with the writes; near: keep decayed reads."""
    if at.gate == HEAD.value:
        return Pairs()
    return _launch_scores(at, (read, second), written, G, before, near, True)


def _empty_pairs(at: Layout, read: Tensor, two: bool, near: bool, far: bool) -> Pairs:
    """Buffers for the scores and rows of `Pairs`."""
    rows = [at.empty(read, *read.shape) if wanted else None for wanted in (near, near and two, far)]
    return Pairs(at.scores_like(read), at.scores_like(read) if two else None, *rows)


def like_pairs(at: Layout, read: Tensor, two: bool = False, near: bool = True) -> Pairs:
    """Empty tensors of the shapes that `pairs` returns."""
    return Pairs() if at.gate == HEAD.value else _empty_pairs(at, read, two, near, True)


def _launch_scores(at, reads, written, G, before, near=False, far=False) -> Pairs:
    read, second = reads
    two, K = second is not None, read.shape[-1]
    out = _empty_pairs(at, read, two, near, far)
    name = "head scores" if at.gate == HEAD.value else "channel scores of two" if two else "channel scores"
    BK, _, launch = at.tile(name, K, K)
    if at.gate == CHANNEL.value:
        given = (out.scores if x is None else x for x in out)
        _channel_scores[at.slots * at.H * PARTS,](
            read, second if two else read, written, *given, G, at.offsets, at.N, at.H, K, before, two, near, far, K % BK == 0,
            PARTS=PARTS, BK=BK, **launch,
        )  # fmt: skip
    else:
        given = read, written, out.scores, G, at.offsets, at.N, at.H, K
        _scores[at.slots, at.H](*given, before, K <= BK, BK=BK, **launch)
    return out


def either(kept: Tensor | None, given: Tensor) -> Tensor:
    """What was kept of `Pairs`, or where kernels do without, the argument it is made of."""
    return given if kept is None else kept


def kept(*pairs: Tensor | None) -> list[Tensor]:
    """All of `Pairs` that there is, for the gradient; none with one decay a head."""
    return [x for x in pairs if x is not None]


def cut(at: Layout, programs: int) -> int:
    """Pieces to walk each sequence in, where one makes so many programs. They are walked twice, so two of them gain nothing."""
    if not 0 < programs < BUSY:
        return 1
    pieces = min(FULL // programs, at.tokens // (C * SHORTEST * at.N))
    return pieces if pieces > 2 else 1


def walk(
    at: Layout, G: Tensor, s0: Tensor, rank: tuple[Tensor, Tensor, Tensor] | None, added: tuple[Tensor, Tensor] | None,
    c: float = 1.0, reverse: bool = False, before: bool = False, gain: Tensor | None = None, keep: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """States at chunks' borders [slots, H, K, V], the last state and u; rank: (x, z, a), added: (b, v) of `_walk`.

    keep: type of the states at chunks' borders, if not that of the operands.
    """
    states, last = at.states_like(s0, keep), s0.new_empty(s0.shape)
    x, z, a = rank or (G, G, G)
    b, v = added or (G, G)
    u = torch.empty_like(z) if rank else None
    name = "linear walk"
    if rank:  # a program holds all key channels; where much of the chip would idle or work on padding, it takes fewer value channels
        few, back = at.N * at.H * blocks(at.V, 32) < 100, reverse and at.gate == CHANNEL.value
        narrow = few or (0 < at.V % 32 <= 16 and not reverse)
        name = "rank walk" + (" tall" if at.K > 128 else " few" if narrow else " back" if back else "")
    BK, BV, launch = at.tile(name, at.K, at.V)
    programs = at.N * at.H * blocks(at.K, BK) * blocks(at.V, BV)
    pieces = 1 if rank else cut(at, programs)

    def over(begun: Tensor, ends: Tensor, sums: Tensor, borders: bool) -> None:
        _walk[programs * pieces,](
            x, z, u if rank else G, a, b, v, G if gain is None else gain, G, *strided(begun), states, ends, sums, at.offsets, c, pieces,
            at.H, at.K, at.V, at.X, reverse, rank is not None, added is not None, gain is not None, before, borders,
            BK=BK, BV=BV, BX=at.wide_gate(BK), **launch,
        )  # fmt: skip

    if pieces > 1:
        begun = at.empty(s0, at.N, at.H, pieces, at.K, at.V, dtype=at.wide)
        sums = at.empty(G, at.N, at.H, pieces, at.X, dtype=G.dtype)
        over(s0, begun, sums, False)
        step, block = PASS
        _pass[at.N * at.H * blocks(at.K * at.V, block),](
            begun, sums, pieces, at.K, at.V, at.X, step, block, TYPES[at.wide], num_warps=1
        )
        s0 = begun[:, :, 0]
    over(s0, last, G, True)
    return states, last, u


def zeros(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The adjoint [N, H, K, V] of last states that nobody used, as `strided` takes it: one matrix, shared by all."""
    return like.new_zeros(shape[2:], dtype=dtype).expand(shape)


def strided(*states: Tensor) -> tuple[Tensor | int, ...]:
    """States [N, H, K, V] of the same strides, their matrices without gaps, then their first two strides: what all sequences or
    heads share stays shared."""
    strides = states[0].stride()
    if strides[2:] != (states[0].shape[3], 1) or any(x.stride() != strides for x in states[1:]):
        states = tuple(x.contiguous() for x in states)
        strides = states[0].stride()
    return *states, *strides[:2]


def width(at: Layout, BV: int) -> int:
    """Value channels of a program that reads: all, so that scores are made once, where chunks and heads alone fill the chip."""
    return at.V if at.slots * at.H >= FULL else BV


def read(
    at: Layout, G: Tensor, key: Tensor, S: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None, out: Tensor,
    factors: tuple[float, float, float], before: tuple[bool, bool], back: bool = False,
) -> Tensor:  # fmt: skip
    """out = c0 key S + c1 A1 x1 (+ c2 A2 x2), scores transposed if `back`; first, second: (A, x); before: of the reads of each."""
    BK, BV, launch = at.tile("read", at.K, at.V)
    span = width(at, BV)
    one = at.K <= BK <= 64 and at.V <= BV  # 128 key channels were not tried
    _read[at.slots * blocks(at.V, span), at.H](
        key, S, *first, *(second or first), G, out, at.offsets, *factors, at.N, at.H, at.K, at.V, span,
        at.gate, back, second is not None, *before, S.dtype != at.work, at.K <= BK, one, BK=BK, BV=BV, **launch,
    )  # fmt: skip
    return out


def grads(
    at: Layout, G: Tensor, reads: list[tuple[Tensor, Tensor]], writes: list[tuple[Tensor, Tensor]], S: Tensor, D: Tensor, g: Tensor,
    c: float, before: bool = False,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """Gradients of reads, of writes and of g; reads: (q, do) and perhaps (r, du), writes: (k, v) and perhaps (w, u)."""
    d_reads, d_writes = ([torch.empty_like(x) for x, _ in side] for side in (reads, writes))
    name = "head grads" if at.X == 1 else "channel grads" if len(reads) + len(writes) == 2 else "channel grads of two"
    BK, BV, launch = at.tile(name, at.K, at.V)
    shares = blocks(at.K, BK) if at.X == 1 else 1
    dg = at.empty(q := reads[0][0], shares, at.tokens, at.H, at.X, dtype=at.wide)
    (q, do), (r, du), (k, v), (w, u) = reads[0], reads[-1], writes[0], writes[-1]
    _grads[at.slots * blocks(at.K, BK), at.H](
        q, r, k, w, do, du, v, u, S, D, G,
        d_reads[0], d_reads[-1], d_writes[0], d_writes[-1], dg, at.offsets, c, at.N, at.H, at.K, at.V, at.X, at.tokens,
        len(reads), len(writes), at.gate, before, S.dtype != at.work,
        LEVELS=LEVELS, BK=BK, BV=BV, BX=at.wide_gate(BK), **launch,
    )  # fmt: skip
    return d_reads, d_writes, (dg.sum(0) if shares > 1 else dg).view(g.shape).to(g.dtype)
