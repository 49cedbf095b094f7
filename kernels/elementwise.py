"""The elementwise-read family: a memory and its diagonal importance, divided element by element at every token.

    M_t = a_t M_{t-1} + k_t v_t^T        I_t = a_t I_{t-1} + s_t b_t^T        (a = exp g; s = k^2 unless given)
    o_t = scale * sum_j q_tj M_tji / (prior_ji + I_tji)       variance_t = scale^2 * sum_j q_tj^2 / (prior_ji + I_tji)

Both states are linear in the tokens, so matrix products give them at the start of every chunk; then all chunks walk
through their tokens at once, one warp to a tile of [keys, values] that never leaves its registers.

Backward, with R = 1 / (prior + I), mu = M R and w = scale do: what a read adds to the adjoints of M and I is
gM = w q R and gI = - gM mu. (1) forward in time: dq and, for the decay, sums over values; each chunk's contribution to
the adjoints at its start; the states every `MARK` tokens. (2) a scan over chunks gives the adjoints at every chunk's
end. (3) backward in time, four tokens of R and mu held at once: dk, ds, dv, db. The decay's gradient is a sum over the
later tokens of the chunk (<adjoint, state> of a chunk's end, plus what is read, less what is written), so it needs no
state of its own. No state is ever recovered by a division or a subtraction, and every sum has a fixed order.

A tile has shape [KR, VR, KL, VL, 4]: a thread of a warp of KL x VL holds KR keys by VR times 4 neighbouring values, so
that loads of 16 bytes have the layout of the arithmetic. A sum over keys costs shuffles among KL lanes only, one over
values among VL.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # tokens between states in memory, forward: half the states of 64 (scan 0.17 against 0.41 ms)
CHUNK_BACK = 64  # and backward: twice the programs (adjoint 4.2 against 4.8 ms, gradient 5.5 against 6.0, scan + 0.5)
STEP = 2  # tokens unrolled: half the compile time of 4, no slower
MARK = 8  # tokens between states that the backward keeps for a while (16: adjoint 0.5 ms faster, gradient 0.6 slower)
SLAB = 3 << 27  # bytes of buffers in use at a time: heads are handled in groups that fit
WIDTH = tl.constexpr(4)  # neighbouring values of a thread


class Tile(NamedTuple):
    """Elements [keys, values / 4] of a thread, then threads [keys, values] of a warp."""

    KR: int
    VR: int
    KL: int
    VL: int

    @property
    def BK(self) -> int:
        return self.KR * self.KL

    @property
    def BV(self) -> int:
        return self.VR * self.VL * 4

    def fit(self, K: int, V: int) -> Tile:
        """The same threads with fewer elements each where the channels do not fill them."""
        room = lambda n, lanes: triton.next_power_of_2(triton.cdiv(n, lanes))  # noqa: E731
        return Tile(min(self.KR, room(K, self.KL)), min(self.VR, room(V, 4 * self.VL)), self.KL, self.VL)


# Milliseconds on an H200, bf16, B 2, T 4096, H 16, K 96, V 192, Triton 3.6.0, tokens unrolled by STEP:
#   read       (16, 1, 2, 16) 1.07   (8, 2, 4, 8) 1.15   (8, 1, 4, 16) 1.16
#   adjoint    (4, 1, 4, 8) 3.0      (4, 2, 8, 4) 4.2    (4, 2, 4, 8) 4.2: 16 elements a thread leave room for more warps
#   gradient   (4, 1, 4, 8) 5.5      (4, 1, 8, 4) 5.7
READ, ADJOINT, GRADIENT = Tile(16, 1, 2, 16), Tile(4, 1, 4, 8), Tile(4, 1, 4, 8)


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    """1 / x to one unit in the last place: one instruction where the hardware has it."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _keys(k0, KR: tl.constexpr, KL: tl.constexpr, VL: tl.constexpr):
    """Key channels of a tile, [KR, 1, KL, VL, 1]: the same for all VL lanes, so that a row is loaded where it is used. With
    more keys a thread, [KR, 1, KL, 1, 1]: one thread loads and converts a key, and the others get it from there."""
    if KR > 4:
        return k0 + tl.arange(0, KR)[:, None, None, None, None] * KL + tl.arange(0, KL)[None, None, :, None, None]
    else:
        j = k0 + tl.arange(0, KL)[None, None, :, None, None] * KR + tl.arange(0, KR)[:, None, None, None, None]
        return j + tl.zeros([1, 1, 1, VL, 1], tl.int32)


@triton.jit
def _values(v0, VR: tl.constexpr, KL: tl.constexpr, VL: tl.constexpr):
    """Value channels of a tile, [1, VR, KL, VL, 4]; the same for all KL lanes."""
    lanes = tl.arange(0, VR)[None, :, None, None, None] * VL + tl.arange(0, VL)[None, None, None, :, None]
    return v0 + lanes * WIDTH + tl.arange(0, WIDTH)[None, None, None, None, :] + tl.zeros([1, 1, KL, 1, 1], tl.int32)


@triton.jit
def _load(at, index, X, FULL: tl.constexpr):
    """Channels `index` of the row at `at`, zeros past the last."""
    if FULL:
        return tl.load(at + index)
    else:
        return tl.load(at + index, mask=index < X, other=0.0)


@triton.jit
def _writes(
    k, spread, v, b, g, t, n, j, i, H, K, V,
    KFULL: tl.constexpr, VFULL: tl.constexpr, WIDE: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """What token t of a chunk of n writes, as stored: k, spread (k if none), v, b, g. Pointers are at the chunk's first
    token. Past the last token: the last one's, with g = 0. Loaded ahead of the stores of the token before, which no
    compiler may do by itself: a store might change what is loaded."""
    last = tl.minimum(t, n - 1)
    kt = _load(k + last * H * K, j, K, KFULL)
    if GIVEN:
        st = _load(spread + last * H * K, j, K, KFULL)
    else:
        st = kt
    if WIDE:
        gt = tl.load(g + last * H * K + j, mask=(j < K) & (t < n), other=0.0)
    else:
        gt = tl.load(g + last * H, mask=t < n, other=0.0)
    return kt, st, _load(v + last * H * V, i, V, VFULL), _load(b + last * H * V, i, V, VFULL), gt


@triton.jit
def _reads(q, d_o, d_var, t, n, j, i, H, K, V, KFULL: tl.constexpr, VFULL: tl.constexpr, VARIANCE: tl.constexpr):
    """The query of a token and the gradients of what it read, as stored: q, d_o, d_var (d_o if none)."""
    last = tl.minimum(t, n - 1)
    w = _load(d_o + last * H * V, i, V, VFULL)
    if VARIANCE:
        x = _load(d_var + last * H * V, i, V, VFULL)
    else:
        x = w
    return _load(q + last * H * K, j, K, KFULL), w, x


@triton.jit
def _put(at, index, x, X, live):
    x, index = tl.broadcast(x, index)
    tl.store(at + index, x.to(at.dtype.element_ty), mask=(index < X) & live)


@triton.jit
def _over_keys(x):
    """Sum over keys, [1, VR, 1, VL, 4]."""
    return tl.sum(tl.sum(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _over_values(x):
    """Sum over values, [KR, 1, KL, 1, 1]."""
    return tl.sum(tl.sum(tl.sum(x, 4, keep_dims=True), 1, keep_dims=True), 3, keep_dims=True)


@triton.jit
def _prior(prior, h, j, i, K, V, PRIOR: tl.constexpr, ACC: tl.constexpr):
    """The prior precision of a tile: one number, one a key or one an element; 1 in the padding."""
    if PRIOR == 1:
        return tl.load(prior + h).to(ACC)
    elif PRIOR == 2:
        return tl.load(prior + h * K + j, mask=j < K, other=1.0).to(ACC)
    else:
        return tl.load(prior + (h * K + j) * V + i, mask=(j < K) & (i < V), other=1.0).to(ACC)


@triton.jit
def _spread(k, s, GIVEN: tl.constexpr, ACC: tl.constexpr):
    return s.to(ACC) if GIVEN else k * k


@triton.jit
def _advance(M, J, a, p, k, s, v, b):
    """One token. J = prior + I decays towards the prior: 1 - a is exact where a is near 1, so the prior stays put."""
    return a * M + k * v, a * J + (s * b + (1.0 - a) * p)


# ---- states at the chunks' starts ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["h0"])
def _deposits(
    k, spread, v, b, g, chunks, M, I, total, h0, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr, GIVEN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the states at its end, and its log decay."""
    NK, NV = tl.cdiv(K, BK), tl.cdiv(V, BV)
    slot, tile = tl.program_id(0) // (NK * NV), tl.program_id(0) % (NK * NV)
    head, heads = tl.program_id(1), tl.num_programs(1)
    start, end = tl.load(chunks + 2 * slot), tl.load(chunks + 2 * slot + 1)
    if start >= end:
        return
    h, n = h0 + head, (end - start).to(tl.int32)
    t, j, i = tl.arange(0, C), tile // NV * BK + tl.arange(0, BK), tile % NV * BV + tl.arange(0, BV)
    key, value = (t < n)[:, None] & (j < K)[None, :], (t < n)[:, None] & (i < V)[None, :]
    keys = (start * H + h) * K + t[:, None] * (H * K) + j[None, :]
    values = (start * H + h) * V + t[:, None] * (H * V) + i[None, :]
    at = slot.to(tl.int64) * heads + head
    if WIDE:
        later = tl.load(g + keys + H * K, mask=(t + 1 < n)[:, None] & (j < K)[None, :], other=0.0).to(ACC)
        keep = tl.exp(tl.cumsum(later, 0, reverse=True))
        tl.store(
            total + at * K + j,
            tl.sum(tl.load(g + keys, mask=key, other=0.0).to(ACC), 0),
            mask=(j < K) & (tile % NV == 0),
        )
    else:
        later = tl.load(g + (start + t + 1) * H + h, mask=t + 1 < n, other=0.0).to(ACC)
        keep = tl.exp(tl.cumsum(later, 0, reverse=True))[:, None]
        own = tl.sum(tl.load(g + (start + t) * H + h, mask=t < n, other=0.0).to(ACC), 0)
        tl.store(total + at, own, mask=tile == 0)
    x = tl.load(k + keys, mask=key, other=0.0).to(ACC)
    s = tl.load(spread + keys, mask=key, other=0.0).to(ACC) if GIVEN else x * x
    y = tl.load(v + values, mask=value, other=0.0).to(ACC)
    z = tl.load(b + values, mask=value, other=0.0).to(ACC)
    out = at * K * V + j[:, None] * V + i[None, :]
    inside = (j < K)[:, None] & (i < V)[None, :]
    tl.store(M + out, tl.dot(tl.trans(x * keep), y, input_precision=PRECISION, out_dtype=ACC), mask=inside)
    tl.store(I + out, tl.dot(tl.trans(s * keep), z, input_precision=PRECISION, out_dtype=ACC), mask=inside)


@triton.jit(do_not_specialize=["h0"])
def _scan(
    X, Y, total, first, count, start_x, start_y, last_x, last_y, h0, H, K, V,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, BACK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In place, X[chunk] := the state before it came, state := exp(total) state + X, over a sequence's chunks, and so for Y;
    BACK: from the last chunk to the first."""
    blocks = tl.cdiv(K * V, BLOCK)
    sequence, head, heads = tl.program_id(0) // blocks, tl.program_id(1), tl.num_programs(1)
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = e < K * V
    n = tl.load(count + sequence).to(tl.int32)
    slot = tl.load(first + sequence)
    slot = slot + (n - 1) if BACK else slot
    step = -heads if BACK else heads
    ends = (sequence.to(tl.int64) * H + h0 + head) * K * V + e
    x, y = (
        tl.load(start_x + ends, mask=inside, other=0.0).to(ACC),
        tl.load(start_y + ends, mask=inside, other=0.0).to(ACC),
    )
    for c in range(0, n, 4):
        # four chunks' loads under way at once, ahead of the stores
        at = slot * heads + head + c * step
        x0, y0, l0 = _scan_load(X, Y, total, at, e, inside, K, V, WIDE)
        x1, y1, l1 = _scan_load(X, Y, total, at + step, e, inside & (c + 1 < n), K, V, WIDE)
        x2, y2, l2 = _scan_load(X, Y, total, at + 2 * step, e, inside & (c + 2 < n), K, V, WIDE)
        x3, y3, l3 = _scan_load(X, Y, total, at + 3 * step, e, inside & (c + 3 < n), K, V, WIDE)
        x, y = _scan_store(X, Y, at, x0, y0, l0, x, y, e, inside, K, V)
        x, y = _scan_store(X, Y, at + step, x1, y1, l1, x, y, e, inside & (c + 1 < n), K, V)
        x, y = _scan_store(X, Y, at + 2 * step, x2, y2, l2, x, y, e, inside & (c + 2 < n), K, V)
        x, y = _scan_store(X, Y, at + 3 * step, x3, y3, l3, x, y, e, inside & (c + 3 < n), K, V)
    tl.store(last_x + ends, x, mask=inside)
    tl.store(last_y + ends, y, mask=inside)


@triton.jit
def _scan_load(X, Y, total, at, e, live, K, V, WIDE: tl.constexpr):
    loss = (
        tl.load(total + at * K + e // V, mask=live, other=0.0)
        if WIDE
        else tl.load(total + at + e * 0, mask=live, other=0.0)
    )
    return tl.load(X + at * K * V + e, mask=live, other=0.0), tl.load(Y + at * K * V + e, mask=live, other=0.0), loss


@triton.jit
def _scan_store(X, Y, at, dx, dy, loss, x, y, e, live, K, V):
    tl.store(X + at * K * V + e, x, mask=live)
    tl.store(Y + at * K * V + e, y, mask=live)
    return tl.exp(loss) * x + dx, tl.exp(loss) * y + dy


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["h0", "tokens"])
def _read(
    q, k, spread, v, b, g, prior, bonus, M, I, chunks, o, variance, scale, tokens, h0, H, K, V,
    KR: tl.constexpr, VR: tl.constexpr, KL: tl.constexpr, VL: tl.constexpr, KFULL: tl.constexpr, VFULL: tl.constexpr,
    WIDE: tl.constexpr, PRIOR: tl.constexpr, GIVEN: tl.constexpr, BEFORE: tl.constexpr, BONUS: tl.constexpr,
    VARIANCE: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A chunk's outputs from one tile: o and variance [key block, tokens, heads, V]."""
    NK, NV = tl.cdiv(K, KR * KL), tl.cdiv(V, VR * VL * WIDTH)
    slot, tile = tl.program_id(0) // (NK * NV), tl.program_id(0) % (NK * NV)
    head, heads = tl.program_id(1), tl.num_programs(1)
    start, end = tl.load(chunks + 2 * slot), tl.load(chunks + 2 * slot + 1)
    if start >= end:
        return
    h, n = h0 + head, (end - start).to(tl.int32)
    j, i = _keys(tile // NV * (KR * KL), KR, KL, VL), _values(tile % NV * (VR * VL * WIDTH), VR, KL, VL)
    inside = (j < K) & (i < V)
    at = (slot.to(tl.int64) * heads + head) * K * V
    p = _prior(prior, h, j, i, K, V, PRIOR, ACC)
    A = tl.load(M + at + j * V + i, mask=inside, other=0.0)
    J = p + tl.load(I + at + j * V + i, mask=inside, other=0.0)
    keys, values = (start * H + h) * K, (start * H + h) * V
    q, k, spread, v, b = q + keys, k + keys, spread + keys, v + values, b + values
    g = g + keys if WIDE else g + start * H + h
    out = ((tile // NV * tokens + start) * heads + head) * V
    u = _load(bonus + h * K, j, K, KFULL).to(ACC) if BONUS else 0.0
    q1 = _load(q, j, K, KFULL)
    k1, s1, v1, b1, g1 = _writes(k, spread, v, b, g, 0, n, j, i, H, K, V, KFULL, VFULL, WIDE, GIVEN)
    for first in range(0, n, STEP):
        for late in tl.static_range(STEP):
            t = first + late
            qt, kt, vt, bt, a = q1.to(ACC) * scale, k1.to(ACC), v1.to(ACC), b1.to(ACC), tl.exp(g1.to(ACC))
            st = _spread(kt, s1, GIVEN, ACC)
            q1 = _load(q + tl.minimum(t + 1, n - 1) * H * K, j, K, KFULL)
            k1, s1, v1, b1, g1 = _writes(k, spread, v, b, g, t + 1, n, j, i, H, K, V, KFULL, VFULL, WIDE, GIVEN)
            if not BEFORE:
                A, J = _advance(A, J, a, p, kt, st, vt, bt)
            R = _reciprocal(J, FAST)
            mean = (A + (u * kt) * vt) * R if BONUS else A * R
            row = out + t * heads * V
            _put(o + row, i, _over_keys(qt * mean), V, t < n)
            if VARIANCE:
                _put(variance + row, i, _over_keys(qt * qt * R), V, t < n)
            if BEFORE:
                A, J = _advance(A, J, a, p, kt, st, vt, bt)


@triton.jit(do_not_specialize=["h0", "count", "heads", "tokens"])
def _total(parts, out, count, tokens, h0, heads, H, V, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """out [tokens, H, V] (some of its heads) = sum of parts [count, tokens, heads, V]."""
    t = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, BLOCK)
    size = heads * V
    total = tl.zeros([BLOCK], ACC)
    for c in range(0, count):
        total += tl.load(parts + (c * tokens + t) * size + x, mask=x < size, other=0.0)
    tl.store(out + (t * H + h0) * V + x, total.to(out.dtype.element_ty), mask=x < size)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["h0", "tokens"])
def _adjoint(
    q, k, spread, v, b, g, prior, bonus, d_o, d_var, M, I, chunks, dq, de, df, dh, CM, CI, CP, marks, scale, tokens, h0, H, K, V,
    C: tl.constexpr, MARK: tl.constexpr,
    KR: tl.constexpr, VR: tl.constexpr, KL: tl.constexpr, VL: tl.constexpr, KFULL: tl.constexpr, VFULL: tl.constexpr,
    WIDE: tl.constexpr, PRIOR: tl.constexpr, GIVEN: tl.constexpr, BEFORE: tl.constexpr, BONUS: tl.constexpr,
    VARIANCE: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Forward in time through a chunk: sums over values for dq (dq, de, df, dh [value block, tokens, heads, K]), its part of
    the adjoints at its start (CM, CI), of the prior's gradient where that has values (CP), and the states at every mark."""
    NK, NV = tl.cdiv(K, KR * KL), tl.cdiv(V, VR * VL * WIDTH)
    slot, tile = tl.program_id(0) // (NK * NV), tl.program_id(0) % (NK * NV)
    head, heads = tl.program_id(1), tl.num_programs(1)
    start, end = tl.load(chunks + 2 * slot), tl.load(chunks + 2 * slot + 1)
    if start >= end:
        return
    h, n = h0 + head, (end - start).to(tl.int32)
    j, i = _keys(tile // NV * (KR * KL), KR, KL, VL), _values(tile % NV * (VR * VL * WIDTH), VR, KL, VL)
    inside = (j < K) & (i < V)
    at = (slot.to(tl.int64) * heads + head) * K * V
    p = _prior(prior, h, j, i, K, V, PRIOR, ACC)
    A = tl.load(M + at + j * V + i, mask=inside, other=0.0)
    J = p + tl.load(I + at + j * V + i, mask=inside, other=0.0)
    to_M, to_I, to_P = A * 0.0, A * 0.0, A * 0.0
    keys, values = (start * H + h) * K, (start * H + h) * V
    q, k, spread, v, b, d_o, d_var = (
        q + keys,
        k + keys,
        spread + keys,
        v + values,
        b + values,
        d_o + values,
        d_var + values,
    )
    g = g + keys if WIDE else g + start * H + h
    out = ((tile % NV * tokens + start) * heads + head) * K
    G = j.to(ACC) * 0.0 if WIDE else scale * 0.0
    u = _load(bonus + h * K, j, K, KFULL).to(ACC) if BONUS else 0.0
    q1, w1, x1 = _reads(q, d_o, d_var, 0, n, j, i, H, K, V, KFULL, VFULL, VARIANCE)
    k1, s1, v1, b1, g1 = _writes(k, spread, v, b, g, 0, n, j, i, H, K, V, KFULL, VFULL, WIDE, GIVEN)
    for first in range(0, n, STEP):
        if first % MARK == 0:
            mark = at * (2 * C // MARK) + first // MARK * (2 * K * V)
            tl.store(marks + mark + j * V + i, A, mask=inside)
            tl.store(marks + mark + K * V + j * V + i, J, mask=inside)
        for late in tl.static_range(STEP):
            t = first + late
            live = t < n
            qt, kt, vt, bt, gt = q1.to(ACC), k1.to(ACC), v1.to(ACC), b1.to(ACC), g1.to(ACC)
            w, x = w1.to(ACC) * (live.to(ACC) * scale), x1.to(ACC) * (live.to(ACC) * (scale * scale))
            st, a = _spread(kt, s1, GIVEN, ACC), tl.exp(gt)
            q1, w1, x1 = _reads(q, d_o, d_var, t + 1, n, j, i, H, K, V, KFULL, VFULL, VARIANCE)
            k1, s1, v1, b1, g1 = _writes(k, spread, v, b, g, t + 1, n, j, i, H, K, V, KFULL, VFULL, WIDE, GIVEN)
            if not BEFORE:
                A, J = _advance(A, J, a, p, kt, st, vt, bt)
                G += gt
            R = _reciprocal(J, FAST)
            y = w * R
            mean = (A + (u * kt) * vt) * R if BONUS else A * R
            z = y * mean
            row = out + t * heads * K
            if VARIANCE:
                z += qt * (x * R * R)
                _put(df + row, j, _over_values(x * R), K, live)
            if BONUS:
                _put(dh + row, j, _over_values(y * vt), K, live)
            _put(dq + row, j, _over_values(w * mean), K, live)
            _put(de + row, j, _over_values(z * p if PRIOR == 3 else z), K, live)
            kept = qt * tl.exp(G)
            to_M += kept * y
            to_I -= kept * z
            if PRIOR == 3:
                to_P -= qt * z
            if BEFORE:
                A, J = _advance(A, J, a, p, kt, st, vt, bt)
                G += gt
    tl.store(CM + at + j * V + i, to_M, mask=inside)
    tl.store(CI + at + j * V + i, to_I, mask=inside)
    if PRIOR == 3:
        tl.store(CP + at + j * V + i, to_P, mask=inside)


@triton.jit
def _replay(
    k, s, v, b, g, live, A, J, p, u,
    GIVEN: tl.constexpr, BEFORE: tl.constexpr, BONUS: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One token forward; and what its read needs on the way back, R and mu."""
    kt, vt, bt, a = k.to(ACC) * live.to(ACC), v.to(ACC), b.to(ACC), tl.exp(g.to(ACC))
    st = s.to(ACC) * live.to(ACC) if GIVEN else kt * kt
    if BEFORE:
        R = _reciprocal(J, FAST)
        mean = (A + (u * kt) * vt) * R if BONUS else A * R
        A, J = _advance(A, J, a, p, kt, st, vt, bt)
    else:
        A, J = _advance(A, J, a, p, kt, st, vt, bt)
        R = _reciprocal(J, FAST)
        mean = A * R
    return A, J, R, mean


@triton.jit
def _back(
    q, w, x, k, s, v, b, g, dk, ds, dv, db, live, R, mean, DM, DI, later, u, j, i, scale, K, V,
    GIVEN: tl.constexpr, BEFORE: tl.constexpr, BONUS: tl.constexpr, VARIANCE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One token backward. DM and DI are the adjoints of the states after it: where the read comes after the update, of the
    next token's and still to be decayed by `later`; where it comes before, of this one's."""
    qt, kt, vt, bt, a = q.to(ACC), k.to(ACC), v.to(ACC), b.to(ACC), tl.exp(g.to(ACC))
    st = _spread(kt, s, GIVEN, ACC)
    gM = (qt * (w.to(ACC) * (live.to(ACC) * scale))) * R
    gI = gM * mean
    if VARIANCE:
        gI += qt * qt * (x.to(ACC) * (live.to(ACC) * (scale * scale)) * R * R)
    if not BEFORE:
        DM, DI = later * DM + gM, later * DI - gI
    written = DM + u * gM if BONUS else DM
    _put(dk, j, _over_values(DM * vt), K, live)
    _put(ds, j, _over_values(DI * bt), K, live)
    _put(dv, i, _over_keys(written * kt), V, live)
    _put(db, i, _over_keys(DI * st), V, live)
    if BEFORE:
        DM, DI = a * DM + gM, a * DI - gI
    return DM, DI, a


@triton.jit(do_not_specialize=["h0", "tokens", "slots"])
def _gradient(
    q, k, spread, v, b, g, prior, bonus, d_o, d_var, DMs, DIs, chunks, marks, dk, ds, dv, db, ends, scale, tokens, slots, h0, H, K, V,
    C: tl.constexpr, MARK: tl.constexpr,
    KR: tl.constexpr, VR: tl.constexpr, KL: tl.constexpr, VL: tl.constexpr, KFULL: tl.constexpr, VFULL: tl.constexpr,
    WIDE: tl.constexpr, PRIOR: tl.constexpr, GIVEN: tl.constexpr, BEFORE: tl.constexpr, BONUS: tl.constexpr,
    VARIANCE: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Backward in time through a chunk, from the adjoints at its end: dk, ds [value block, tokens, heads, K], dv, db [key block,
    tokens, heads, V], and <adjoint, state> at the chunk's end for the decay's gradient, ends [value block, slots, heads, K]."""
    NK, NV = tl.cdiv(K, KR * KL), tl.cdiv(V, VR * VL * WIDTH)
    slot, tile = tl.program_id(0) // (NK * NV), tl.program_id(0) % (NK * NV)
    head, heads = tl.program_id(1), tl.num_programs(1)
    start, end = tl.load(chunks + 2 * slot), tl.load(chunks + 2 * slot + 1)
    if start >= end:
        return
    h, n = h0 + head, (end - start).to(tl.int32)
    j, i = _keys(tile // NV * (KR * KL), KR, KL, VL), _values(tile % NV * (VR * VL * WIDTH), VR, KL, VL)
    inside = (j < K) & (i < V)
    at = (slot.to(tl.int64) * heads + head) * K * V
    p = _prior(prior, h, j, i, K, V, PRIOR, ACC)
    DM = tl.load(DMs + at + j * V + i, mask=inside, other=0.0)
    DI = tl.load(DIs + at + j * V + i, mask=inside, other=0.0)
    keys, values = (start * H + h) * K, (start * H + h) * V
    q, k, spread, v, b, d_o, d_var = (
        q + keys,
        k + keys,
        spread + keys,
        v + values,
        b + values,
        d_o + values,
        d_var + values,
    )
    g = g + keys if WIDE else g + start * H + h
    by_key, by_value = (
        ((tile % NV * tokens + start) * heads + head) * K,
        ((tile // NV * tokens + start) * heads + head) * V,
    )
    dk, ds, dv, db = dk + by_key, ds + by_key, dv + by_value, db + by_value
    u = _load(bonus + h * K, j, K, KFULL).to(ACC) if BONUS else 0.0
    later = j.to(ACC) * 0.0 + 1.0 if WIDE else scale * 0.0 + 1.0
    blocks = (n + 3) // 4
    for block in range(0, blocks):
        t = (blocks - 1 - block) * 4
        mark = at * (2 * C // MARK) + t // MARK * (2 * K * V)
        A = tl.load(marks + mark + j * V + i, mask=inside, other=0.0)
        J = tl.load(marks + mark + K * V + j * V + i, mask=inside, other=1.0)
        q0, w0, x0 = _reads(q, d_o, d_var, t + 0, n, j, i, H, K, V, KFULL, VFULL, VARIANCE)
        k0, s0, v0, b0, g0 = _writes(k, spread, v, b, g, t + 0, n, j, i, H, K, V, KFULL, VFULL, WIDE, GIVEN)
        q1, w1, x1 = _reads(q, d_o, d_var, t + 1, n, j, i, H, K, V, KFULL, VFULL, VARIANCE)
        k1, s1, v1, b1, g1 = _writes(k, spread, v, b, g, t + 1, n, j, i, H, K, V, KFULL, VFULL, WIDE, GIVEN)
        q2, w2, x2 = _reads(q, d_o, d_var, t + 2, n, j, i, H, K, V, KFULL, VFULL, VARIANCE)
        k2, s2, v2, b2, g2 = _writes(k, spread, v, b, g, t + 2, n, j, i, H, K, V, KFULL, VFULL, WIDE, GIVEN)
        q3, w3, x3 = _reads(q, d_o, d_var, t + 3, n, j, i, H, K, V, KFULL, VFULL, VARIANCE)
        k3, s3, v3, b3, g3 = _writes(k, spread, v, b, g, t + 3, n, j, i, H, K, V, KFULL, VFULL, WIDE, GIVEN)
        for before in range(t // MARK * MARK, t, STEP):
            for late in tl.static_range(STEP):
                km, sm, vm, bm, gm = _writes(
                    k, spread, v, b, g, before + late, n, j, i, H, K, V, KFULL, VFULL, WIDE, GIVEN
                )
                km = km.to(ACC)
                sm = _spread(km, sm, GIVEN, ACC)
                A, J = _advance(A, J, tl.exp(gm.to(ACC)), p, km, sm, vm.to(ACC), bm.to(ACC))
        A, J, R0, m0 = _replay(k0, s0, v0, b0, g0, t + 0 < n, A, J, p, u, GIVEN, BEFORE, BONUS, FAST, ACC)
        A, J, R1, m1 = _replay(k1, s1, v1, b1, g1, t + 1 < n, A, J, p, u, GIVEN, BEFORE, BONUS, FAST, ACC)
        A, J, R2, m2 = _replay(k2, s2, v2, b2, g2, t + 2 < n, A, J, p, u, GIVEN, BEFORE, BONUS, FAST, ACC)
        A, J, R3, m3 = _replay(k3, s3, v3, b3, g3, t + 3 < n, A, J, p, u, GIVEN, BEFORE, BONUS, FAST, ACC)
        if block == 0:
            row = ((tile % NV * slots + slot).to(tl.int64) * heads + head) * K
            _put(ends + row, j, _over_values(DM * A + DI * (J - p)), K, n > 0)
        to_k, to_v = (t + 3) * heads * K, (t + 3) * heads * V
        DM, DI, later = _back(
            q3, w3, x3, k3, s3, v3, b3, g3, dk + to_k, ds + to_k, dv + to_v, db + to_v, t + 3 < n, R3, m3, DM, DI, later,
            u, j, i, scale, K, V, GIVEN, BEFORE, BONUS, VARIANCE, ACC,
        )  # fmt: skip
        to_k, to_v = (t + 2) * heads * K, (t + 2) * heads * V
        DM, DI, later = _back(
            q2, w2, x2, k2, s2, v2, b2, g2, dk + to_k, ds + to_k, dv + to_v, db + to_v, t + 2 < n, R2, m2, DM, DI, later,
            u, j, i, scale, K, V, GIVEN, BEFORE, BONUS, VARIANCE, ACC,
        )  # fmt: skip
        to_k, to_v = (t + 1) * heads * K, (t + 1) * heads * V
        DM, DI, later = _back(
            q1, w1, x1, k1, s1, v1, b1, g1, dk + to_k, ds + to_k, dv + to_v, db + to_v, t + 1 < n, R1, m1, DM, DI, later,
            u, j, i, scale, K, V, GIVEN, BEFORE, BONUS, VARIANCE, ACC,
        )  # fmt: skip
        to_k, to_v = (t + 0) * heads * K, (t + 0) * heads * V
        DM, DI, later = _back(
            q0, w0, x0, k0, s0, v0, b0, g0, dk + to_k, ds + to_k, dv + to_v, db + to_v, t + 0 < n, R0, m0, DM, DI, later,
            u, j, i, scale, K, V, GIVEN, BEFORE, BONUS, VARIANCE, ACC,
        )  # fmt: skip


@triton.jit
def _sum_rows(parts, count, tokens, heads, K, rows, mask, ACC: tl.constexpr):
    """Sum over the blocks of parts [count, tokens, heads, K] at the elements `rows` of one of them."""
    out = tl.load(parts + rows, mask=mask, other=0.0).to(ACC)
    for _ in range(1, count):
        parts += tokens.to(tl.int64) * heads * K
        out += tl.load(parts + rows, mask=mask, other=0.0)
    return out


@triton.jit(do_not_specialize=["h0", "q_blocks", "k_blocks", "tokens", "slots"])
def _finish(
    q, k, spread, prior, bonus, chunks, parts_q, parts_e, parts_f, parts_h, parts_k, parts_s, ends,
    dq, dk, d_spread, dg, d_prior, d_bonus, q_blocks, k_blocks, tokens, slots, h0, H, K,
    C: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, PRIOR: tl.constexpr, GIVEN: tl.constexpr, BEFORE: tl.constexpr,
    BONUS: tl.constexpr, VARIANCE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add the value blocks up: dq, dk, d_spread, and dg = <adjoint, state> at the chunk's end + reads - writes from t on."""
    slot, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start, end = tl.load(chunks + 2 * slot), tl.load(chunks + 2 * slot + 1)
    h, n, t = h0 + head, (end - start).to(tl.int32), tl.arange(0, C)
    change, reads, at_ends = tl.zeros([C], ACC), tl.zeros([C], ACC), tl.zeros([BK], ACC)
    for k0 in range(0, K, BK):
        j = k0 + tl.arange(0, BK)
        mask = (t < n)[:, None] & (j < K)[None, :]
        full = (start * H + h) * K + t[:, None] * (H * K) + j[None, :]
        rows = (start * heads + head) * K + t[:, None] * (heads * K) + j[None, :]
        share = (slot.to(tl.int64) * H + h) * K + j  # of this chunk, in a gradient that all tokens share
        x, y = tl.load(q + full, mask=mask, other=0.0).to(ACC), tl.load(k + full, mask=mask, other=0.0).to(ACC)
        s = tl.load(spread + full, mask=mask, other=0.0).to(ACC) if GIVEN else y * y
        gq = _sum_rows(parts_q, q_blocks, tokens, heads, K, rows, mask, ACC)
        read = x * _sum_rows(parts_e, q_blocks, tokens, heads, K, rows, mask, ACC)
        gk = _sum_rows(parts_k, k_blocks, tokens, heads, K, rows, mask, ACC)
        gs = _sum_rows(parts_s, k_blocks, tokens, heads, K, rows, mask, ACC)
        written = y * gk + s * gs
        if PRIOR < 3:
            tl.store(d_prior + share, -tl.sum(read, 0), mask=j < K)
            if PRIOR == 1:
                read = read * tl.load(prior + h).to(ACC)
            else:
                read = read * tl.load(prior + h * K + j, mask=j < K, other=0.0).to(ACC)[None, :]
        if VARIANCE:
            f = x * _sum_rows(parts_f, q_blocks, tokens, heads, K, rows, mask, ACC)
            gq += 2.0 * f
            read -= x * f
        if BONUS:
            w = _sum_rows(parts_h, q_blocks, tokens, heads, K, rows, mask, ACC)
            u = tl.load(bonus + h * K + j, mask=j < K, other=0.0).to(ACC)[None, :]
            tl.store(d_bonus + share, tl.sum(x * y * w, 0), mask=j < K)
            read -= x * y * w * u
            gk += u * x * w
        if GIVEN:
            tl.store(d_spread + full, gs.to(d_spread.dtype.element_ty), mask=mask)
        else:
            gk += 2.0 * y * gs
        tl.store(dq + full, gq.to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + full, gk.to(dk.dtype.element_ty), mask=mask)
        at_end = _sum_rows(
            ends, k_blocks, slots, heads, K, (slot.to(tl.int64) * heads + head) * K + j, (j < K) & (n > 0), ACC
        )
        if WIDE:
            out = tl.cumsum(read - written, 0, reverse=True) + at_end[None, :]
            out = out - read if BEFORE else out
            tl.store(dg + full, out.to(dg.dtype.element_ty), mask=mask)
        else:
            change += tl.sum(read - written, 1)
            reads += tl.sum(read, 1)
            at_ends += at_end
    if not WIDE:
        out = tl.cumsum(change, 0, reverse=True) + tl.sum(at_ends, 0)
        out = out - reads if BEFORE else out
        tl.store(dg + (start + t) * H + h, out.to(dg.dtype.element_ty), mask=t < n)


# ---- launches --------------------------------------------------------------------------------------------------------


class _Launch:
    """Sizes, chunks and options that forward and backward share."""

    def __init__(self, q, k, v, b, g, prior, bonus, spread, M0, I0, offsets, scale, before, variance, chunk):
        self.chunk = chunk
        self.q, self.k, self.v, self.b, self.g, self.M0, self.I0 = (x.contiguous() for x in (q, k, v, b, g, M0, I0))
        self.prior = prior.contiguous()
        self.spread = self.k if spread is None else spread.contiguous()
        self.bonus = self.prior if bonus is None else bonus.contiguous()
        self.H, self.K, self.V, self.N = q.shape[2], q.shape[3], v.shape[3], len(offsets) - 1
        self.tokens, self.scale = q.shape[0] * q.shape[1], scale
        self.slots = self.tokens // chunk + self.N
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.acc = tl.float64 if q.dtype == torch.float64 else tl.float32
        self.gate = {"WIDE": g.ndim == 4, "ACC": self.acc}
        self.given = {"GIVEN": spread is not None}
        self.read = {"PRIOR": prior.ndim, "BEFORE": before, "BONUS": bonus is not None, "VARIANCE": variance}
        self.exact = "tf32" if q.dtype in (torch.bfloat16, torch.float16) else "ieee"
        self._cut(offsets)

    def _cut(self, offsets: Tensor) -> None:
        """Chunks [slots, 2] of first token and end. Sequence n owns the slots from offsets[n] // chunk + n on: room enough,
        found without a look at the offsets from the host; slots left over are empty."""
        self.first = offsets[:-1] // self.chunk + torch.arange(self.N, device=offsets.device)
        self.count = (offsets.diff() + self.chunk - 1) // self.chunk
        slot = torch.arange(self.slots, device=offsets.device)
        owner = torch.searchsorted(self.first, slot, right=True) - 1
        start = offsets[owner] + (slot - self.first[owner]) * self.chunk
        self.chunks = torch.stack((start, torch.minimum(start + self.chunk, offsets[owner + 1])), 1)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype or self.wide)

    def groups(self, bytes_per_head: int) -> list[tuple[int, int]]:
        """(first head, heads) of groups whose buffers fit a slab."""
        at_once = -(-self.H // max(1, -(-self.H * bytes_per_head // SLAB)))
        return [(h, min(at_once, self.H - h)) for h in range(0, self.H, at_once)]

    def tile(self, tile: Tile) -> tuple[Tile, dict, int, int]:
        """A tile that fits, its options, and the number of key and value blocks."""
        tile = tile.fit(self.K, self.V)
        options = {**tile._asdict(), "KFULL": self.K % tile.BK == 0, "VFULL": self.V % tile.BV == 0}
        options |= {**self.gate, **self.given, **self.read, "FAST": self.q.is_cuda, "STEP": STEP, "num_warps": 1}
        return tile, options, triton.cdiv(self.K, tile.BK), triton.cdiv(self.V, tile.BV)

    def scan(self, X: tuple, total: Tensor, starts: tuple, lasts: tuple, h0: int, heads: int, back: bool) -> None:
        block = 64
        grid = (triton.cdiv(self.K * self.V, block) * self.N, heads)
        _scan[grid](
            *X, total, self.first, self.count, *starts, *lasts, h0, self.H, self.K, self.V, BLOCK=block, BACK=back, **self.gate, num_warps=1
        )  # fmt: skip

    def boundaries(self, h0: int, heads: int, M_T: Tensor, I_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States at the chunks' starts, [slots, heads, K, V], and the chunks' log decays."""
        M, I = (self.new(self.slots, heads, self.K, self.V) for _ in range(2))
        total = self.new(self.slots, heads, *self.g.shape[3:])
        BK, BV = (max(16, min(n, triton.next_power_of_2(x))) for n, x in ((32, self.K), (64, self.V)))
        grid = (self.slots * triton.cdiv(self.K, BK) * triton.cdiv(self.V, BV), heads)
        _deposits[grid](
            self.k, self.spread, self.v, self.b, self.g, self.chunks, M, I, total, h0, self.H, self.K, self.V,
            C=self.chunk, BK=BK, BV=BV, PRECISION=self.exact, **self.given, **self.gate, num_warps=4,
        )  # fmt: skip
        self.scan((M, I), total, (self.M0, self.I0), (M_T, I_T), h0, heads, False)
        return M, I, total

    def add(self, parts: Tensor, out: Tensor, h0: int) -> None:
        """out[:, h0 : h0 + heads] = the sum of the blocks in `parts`."""
        heads, V = parts.shape[2:]
        _total[(self.tokens,)](
            parts, out, len(parts), self.tokens, h0, heads, self.H, V,
            BLOCK=triton.next_power_of_2(heads * V), ACC=self.acc, num_warps=4,
        )  # fmt: skip


def _forward(at: _Launch, variance: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o = at.q.new_empty(*at.q.shape[:3], at.V)
    var = torch.empty_like(o) if variance else o.new_empty(0)
    M_T, I_T = at.new(*at.M0.shape), at.new(*at.M0.shape)
    tile, options, NK, NV = at.tile(READ)
    for h0, heads in at.groups(8 * at.slots * at.K * at.V + 4 * NK * at.tokens * at.V * (1 + variance)):
        M, I, _ = at.boundaries(h0, heads, M_T, I_T)
        parts = [at.new(NK, at.tokens, heads, at.V) for _ in range(1 + variance)]
        _read[(at.slots * NK * NV, heads)](
            at.q, at.k, at.spread, at.v, at.b, at.g, at.prior, at.bonus, M, I, at.chunks, parts[0], parts[-1], at.scale,
            at.tokens, h0, at.H, at.K, at.V, **options,
        )  # fmt: skip
        for part, out in zip(parts, (o, var), strict=False):
            at.add(part, out, h0)
    return o, var, M_T, I_T


class _Backward:
    """Gradient buffers of the whole call, and the three passes for a group of heads."""

    def __init__(self, at: _Launch, d_o: Tensor, d_var: Tensor, dM_T: Tensor, dI_T: Tensor):
        self.at = at
        self.d_o, self.d_var, self.dM_T, self.dI_T = (x.contiguous() for x in (d_o, d_var, dM_T, dI_T))
        self.d_var = self.d_var if self.d_var.numel() else self.d_o
        self.dq, self.dk, self.dv, self.db, self.dg = (torch.empty_like(x) for x in (at.q, at.k, at.v, at.b, at.g))
        self.d_spread = torch.empty_like(at.spread) if at.given["GIVEN"] else at.k.new_empty(0)
        self.dM0, self.dI0 = at.new(*at.M0.shape), at.new(*at.M0.shape)
        self.d_prior = at.new(at.slots, at.H, at.K)  # a share for every chunk
        self.d_bonus = at.new(at.slots, at.H, at.K) if at.read["BONUS"] else at.new(0)
        self.d_full = at.new(at.H, at.K, at.V) if at.prior.ndim == 3 else at.new(0)

    def bytes_per_head(self) -> int:
        at = self.at
        state, keys, values = at.K * at.V * 4, at.tokens * at.K * 4, at.tokens * at.V * 4
        NVs, (NK, NV) = at.tile(ADJOINT)[3], at.tile(GRADIENT)[2:]
        return at.slots * state * (4 + 2 * at.chunk // MARK) + keys * 2 * (NVs + NV) + values * 2 * NK

    def run(self, h0: int, heads: int) -> None:
        at = self.at
        M, I, total = at.boundaries(h0, heads, torch.empty_like(self.dM0), torch.empty_like(self.dM0))
        DM, DI, marks, reads = self._adjoint(h0, heads, M, I)
        del M, I
        at.scan((DM, DI), total, (self.dM_T, self.dI_T), (self.dM0, self.dI0), h0, heads, True)
        self._finish(h0, heads, reads, self._gradient(h0, heads, DM, DI, marks))

    def _adjoint(self, h0, heads, M, I):
        at = self.at
        tile, options, NK, NV = at.tile(ADJOINT)
        none = at.new(0)
        parts = [
            at.new(NV, at.tokens, heads, at.K) if used else none
            for used in (True, True, at.read["VARIANCE"], at.read["BONUS"])
        ]
        DM, DI = torch.empty_like(M), torch.empty_like(I)
        full = torch.zeros_like(M) if at.prior.ndim == 3 else none
        marks = at.new(at.slots, heads, at.chunk // MARK, 2, at.K, at.V)
        _adjoint[(at.slots * NK * NV, heads)](
            at.q, at.k, at.spread, at.v, at.b, at.g, at.prior, at.bonus, self.d_o, self.d_var, M, I, at.chunks, *parts, DM, DI, full,
            marks, at.scale, at.tokens, h0, at.H, at.K, at.V, C=at.chunk, MARK=MARK, **options,
        )  # fmt: skip
        if at.prior.ndim == 3:
            self.d_full[h0 : h0 + heads] = full.sum(0)
        return DM, DI, marks, parts

    def _gradient(self, h0, heads, DM, DI, marks):
        at = self.at
        tile, options, NK, NV = at.tile(GRADIENT)
        dk, ds = (at.new(NV, at.tokens, heads, at.K) for _ in range(2))
        dv, db = (at.new(NK, at.tokens, heads, at.V) for _ in range(2))
        ends = at.new(NV, at.slots, heads, at.K)
        _gradient[(at.slots * NK * NV, heads)](
            at.q, at.k, at.spread, at.v, at.b, at.g, at.prior, at.bonus, self.d_o, self.d_var, DM, DI, at.chunks, marks, dk, ds, dv, db,
            ends, at.scale, at.tokens, at.slots, h0, at.H, at.K, at.V, C=at.chunk, MARK=MARK, **options,
        )  # fmt: skip
        at.add(dv, self.dv, h0)
        at.add(db, self.db, h0)
        return dk, ds, ends

    def _finish(self, h0, heads, reads, writes):
        at = self.at
        _finish[(at.slots, heads)](
            at.q, at.k, at.spread, at.prior, at.bonus, at.chunks, *reads, *writes, self.dq, self.dk, self.d_spread, self.dg,
            self.d_prior, self.d_bonus, len(reads[0]), len(writes[0]), at.tokens, at.slots, h0, at.H, at.K,
            C=at.chunk, BK=32, **at.gate, **at.given, **at.read, num_warps=4,
        )  # fmt: skip

    def prior(self) -> Tensor:
        if self.at.prior.ndim == 3:
            return self.d_full
        return self.d_prior.sum((0, 2) if self.at.prior.ndim == 1 else 0)


# ---- operators -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("unify::elementwise", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor, prior: Tensor, bonus: Tensor | None, spread: Tensor | None,
    M0: Tensor, I0: Tensor, offsets: Tensor, scale: float, before: bool, variance: bool,
) -> list[Tensor]:  # fmt: skip
    at = _Launch(q, k, v, b, g, prior, bonus, spread, M0, I0, offsets, scale, before, variance, CHUNK)
    return list(_forward(at, variance))


@_op.register_fake
def _(q, k, v, b, g, prior, bonus, spread, M0, I0, offsets, scale, before, variance):
    o = q.new_empty(*q.shape[:3], v.shape[3])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    last = [M0.new_empty(M0.shape, dtype=wide) for _ in range(2)]
    return [o, torch.empty_like(o) if variance else o.new_empty(0), *last]


@torch.library.custom_op("unify::elementwise_backward", mutates_args=())
def _op_backward(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor, prior: Tensor, bonus: Tensor | None, spread: Tensor | None,
    M0: Tensor, I0: Tensor, offsets: Tensor, scale: float, before: bool, variance: bool,
    d_o: Tensor, d_variance: Tensor, dM_T: Tensor, dI_T: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, b, g, prior, bonus, spread, M0, I0; empty where an argument is missing."""
    at = _Launch(q, k, v, b, g, prior, bonus, spread, M0, I0, offsets, scale, before, variance, CHUNK_BACK)
    back = _Backward(at, d_o, d_variance, dM_T, dI_T)
    for h0, heads in at.groups(back.bytes_per_head()):
        back.run(h0, heads)
    d_bonus = back.d_bonus if bonus is None else back.d_bonus.sum(0).to(bonus.dtype)
    starts = [x.to(y.dtype) for x, y in ((back.dM0, M0), (back.dI0, I0))]
    return [back.dq, back.dk, back.dv, back.db, back.dg, back.prior().to(prior.dtype), d_bonus, back.d_spread, *starts]


@_op_backward.register_fake
def _(q, k, v, b, g, prior, bonus, spread, M0, I0, offsets, scale, before, variance, d_o, d_variance, dM_T, dI_T):
    maybe = [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (bonus, spread)]
    return [*(x.new_empty(x.shape) for x in (q, k, v, b, g, prior)), *maybe, *(x.new_empty(x.shape) for x in (M0, I0))]


def _keep(ctx, inputs, output):
    *tensors, ctx.scale, ctx.before, ctx.variance = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grads):
    d_o, d_variance, dM_T, dI_T = grads
    args = ctx.saved_tensors
    out = _op_backward(*args, ctx.scale, ctx.before, ctx.variance, d_o, d_variance, dM_T, dI_T)
    out = [None if x is None else y for x, y in zip(args[:10], out, strict=True)]
    return *out, None, None, None, None


_op.register_autograd(_gradients, setup_context=_keep)


def elementwise(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor, prior: Tensor, M0: Tensor, I0: Tensor, offsets: Tensor, *, scale: float,
    spread: Tensor | None = None, before: bool = False, bonus: Tensor | None = None, variance: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """The recurrence at the top of this file, over packed sequences.

    q, k: [B, T, H, K]; v, b: [B, T, H, V]; g: [B, T, H] or [B, T, H, K], natural log of the decay, <= 0
    prior: [H], [H, K] or [H, K, V] (dimensions of size 1 are shared), > 0; M0, I0: [N, H, K, V], I without the prior
    offsets: int64 [N + 1] into the flattened B T tokens; spread: [B, T, H, K], what takes the place of k^2
    before: both states are read at t - 1, with bonus_j k_tj v_ti, bonus [H, K], added to M_{t-1}
    Returns o and variance [B, T, H, V] (None unless asked for) in q's dtype, M_T and I_T [N, H, K, V] float32.
    Differentiable in every floating tensor. Cost: T H K V elements, one reciprocal and 6 multiply-adds each.
    """
    H, K = q.shape[2:]
    while prior.ndim > 1 and prior.shape[-1] == 1:
        prior = prior.squeeze(-1)
    prior = prior.expand(H, *((K,) if prior.ndim > 1 else ()), *((v.shape[3],) if prior.ndim > 2 else ()))
    if q.is_cuda and q.dtype == torch.float64:
        raise TypeError("float64 runs in Triton's interpreter only; on a GPU pass float32 or narrower")
    if bonus is not None and not before:
        raise ValueError("a bonus is for a read before the update: pass before=True")
    o, var, M_T, I_T = _op(q, k, v, b, g, prior, bonus, spread, M0, I0, offsets, float(scale), before, variance)
    return o, var if variance else None, M_T, I_T
