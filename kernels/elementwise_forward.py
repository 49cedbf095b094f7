"""Kernels of the elementwise-read family, forward: prepared rows, states at the chunks' starts, the read. See `elementwise`."""

from __future__ import annotations

import triton
import triton.language as tl

from unify.kernels.chunk import locate
from unify.kernels.direct import direct

RESET = tl.constexpr(-2.0)  # a log decay below this starts a new segment
NONE = tl.constexpr(-1000.0)  # exp of it is 0 in every type
# Triton gives a thread 16 neighbouring bytes of a load, then deals lanes out axis by axis, those without neighbours in the order
# 0, 1, ... (before 3.7) or ..., 1, 0. A tile's axes stand so that every load gets the layout of the arithmetic:
# [KL, VL, KH, VR, 4, 4] or [KH, 4, VR, KL, VL, 4].
LANES_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))
AHEAD = tl.constexpr(4)  # tokens between asking for a row and reading it


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x to one unit in the last place: one instruction where the hardware has it."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def key_index(k0, KH: tl.constexpr, KL: tl.constexpr, VL: tl.constexpr):
    """Key channels of a tile, the same for all VL lanes, so that a row is loaded where it is used."""
    if LANES_FIRST:
        lane = tl.arange(0, KL)[:, None, None, None, None, None] + tl.zeros([1, VL, 1, 1, 1, 1], tl.int32)
        high = tl.arange(0, KH)[None, None, :, None, None, None] * KL + lane
        return k0 + high * 4 + tl.arange(0, 4)[None, None, None, None, :, None]
    else:
        lane = tl.arange(0, KL)[None, None, None, :, None, None] + tl.zeros([1, 1, 1, 1, VL, 1], tl.int32)
        high = tl.arange(0, KH)[:, None, None, None, None, None] * KL + lane
        return k0 + high * 4 + tl.arange(0, 4)[None, :, None, None, None, None]


@triton.jit
def value_index(v0, VR: tl.constexpr, KL: tl.constexpr, VL: tl.constexpr):
    """Value channels of a tile, the same for all KL lanes."""
    if LANES_FIRST:
        lane = tl.arange(0, VL)[None, :, None, None, None, None] + tl.zeros([KL, 1, 1, 1, 1, 1], tl.int32)
        high = tl.arange(0, VR)[None, None, None, :, None, None] * VL + lane
    else:
        lane = tl.arange(0, VL)[None, None, None, None, :, None] + tl.zeros([1, 1, 1, KL, 1, 1], tl.int32)
        high = tl.arange(0, VR)[None, None, :, None, None, None] * VL + lane
    return v0 + high * 4 + tl.arange(0, 4)[None, None, None, None, None, :]


@triton.jit
def load_row(at, index, X, FULL: tl.constexpr):
    """Channels `index` of the row at `at`, zeros past the last."""
    if FULL:
        return tl.load(at + index)
    else:
        return tl.load(at + index, mask=index < X, other=0.0)


@triton.jit
def load_gate(at, t, H, K, j, WIDE: tl.constexpr):
    """What a token has once a head, or once a key channel; 1 in the padding."""
    if WIDE:
        return tl.load(at + t * H * K + j, mask=j < K, other=1.0)
    else:
        return tl.load(at + t * H)


@triton.jit
def put(at, index, x, X):
    """Store a row; lanes that hold the same channel hold the same number."""
    x, index = tl.broadcast(x, index)
    tl.store(at + index, x.to(at.dtype.element_ty), mask=index < X)


@triton.jit
def _over(x, first: tl.constexpr, second: tl.constexpr, third: tl.constexpr):
    return tl.sum(tl.sum(tl.sum(x, first, keep_dims=True), second, keep_dims=True), third, keep_dims=True)


@triton.jit
def over_keys(x):
    """Sum over keys: in a thread, then among its lanes."""
    return _over(x, 4, 2, 0) if LANES_FIRST else _over(x, 0, 1, 3)


@triton.jit
def over_values(x):
    """Sum over values: in a thread, then among its lanes."""
    return _over(x, 5, 3, 1) if LANES_FIRST else _over(x, 5, 2, 4)


@triton.jit
def load_prior(prior, h, j, i, K, V, PRIOR: tl.constexpr, ACC: tl.constexpr):
    """The prior precision of a tile: one number, one a key or one an element; 1 in the padding."""
    if PRIOR == 1:
        return tl.load(prior + h).to(ACC)
    elif PRIOR == 2:
        return tl.load(prior + h * K + j, mask=j < K, other=1.0).to(ACC)
    else:
        return tl.load(prior + (h * K + j) * V + i, mask=(j < K) & (i < V), other=1.0).to(ACC)


@triton.jit
def load_state(at, j, i, K, V):
    """A tile of a matrix [K, V], zeros in the padding."""
    return tl.load(at + j * V + i, mask=(j < K) & (i < V), other=0.0)


@triton.jit
def store_state(at, x, j, i, K, V):
    """A tile of a matrix [K, V]."""
    tl.store(at + j * V + i, x, mask=(j < K) & (i < V))


# ---- prepared rows ---------------------------------------------------------------------------------------------------


@triton.jit
def _segment(r1, s1, r2, s2):
    return r1 | r2, tl.where(r2 != 0, s2, s1 + s2)


@triton.jit
def _gates(g, t, live, H, K, j, WIDE: tl.constexpr, ACC: tl.constexpr):
    """Log decays of tokens, [BLOCK] or [BLOCK, BK], and which of them start a segment for being strong, [BLOCK]."""
    if WIDE:
        x = tl.load(g + t[:, None] * (H * K) + j[None, :], mask=live[:, None] & (j < K)[None, :], other=0.0).to(ACC)
        x = tl.maximum(x, NONE)
        return x, tl.min(x, 1) < RESET
    else:
        x = tl.maximum(tl.load(g + t * H, mask=live, other=0.0).to(ACC), NONE)
        return x, x < RESET


@triton.jit
def _beside(x, like, WIDE: tl.constexpr):
    """A number a token, [BLOCK], among gates."""
    return x[:, None] + tl.zeros_like(like).to(x.dtype) if WIDE else x


@triton.jit
def _since(starts, x, WIDE: tl.constexpr):
    """Sums of gates since the first token of each segment, without its own."""
    starts = _beside(starts.to(tl.int32), x, WIDE)
    return tl.associative_scan((starts, tl.where(starts != 0, 0.0, x)), 0, _segment)[1]


@direct
@triton.jit(do_not_specialize=["N"])
def prepare(
    q, k, spread, g, offsets, rows, f, c, flags, scale, N, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, GIVEN: tl.constexpr, BEFORE: tl.constexpr,
    BACK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows as the walks over tokens want them, [tokens, H, 3 or 4, K]: k f, s f, scale q and, BACK, scale q E.

    Segments start at every BLOCK-th token of a chunk and at strong gates. f = exp(- sum of g since the segment's first
    token) >= 1; c, where a segment starts, is the decay from the last segment's first token to this one, else 1; E is the
    decay from the chunk's start to the first token of the segment of the state that is read. flags [tokens, H]: whether a
    segment starts; at the first token of a block, how many start in the block.
    """
    slot, h = tl.program_id(0), tl.program_id(1)
    start, end = locate(slot, offsets, N, C)
    if start >= end:
        return
    n, order, j = (end - start).to(tl.int32), tl.arange(0, BLOCK), tl.arange(0, BK)
    keys, gate = (start * H + h) * K, (start * H + h) * K if WIDE else start * H + h
    COUNT: tl.constexpr = 4 if BACK else 3
    q, k, spread, rows = q + keys, k + keys, spread + keys, rows + keys * COUNT
    g, f, c, flags = g + gate, f + gate, c + gate, flags + start * H + h
    if WIDE:  # sums since the last segment's start and since the chunk's, at the end of the block before
        last, base = tl.zeros([BK], ACC), tl.zeros([BK], ACC)
    else:
        last, base = tl.sum(tl.zeros([BK], ACC), 0), tl.sum(tl.zeros([BK], ACC), 0)
    for t0 in range(0, n, BLOCK):
        t = t0 + order
        live, at = t < n, t[:, None] * (H * K) + j[None, :]
        inside = live[:, None] & (j < K)[None, :]
        x, strong = _gates(g, t, live, H, K, j, WIDE, ACC)
        starts = strong | (order == 0)
        s = _since(starts, x, WIDE)
        ahead, strong = _gates(g, t - 1, live & (order > 0), H, K, j, WIDE, ACC)
        s_before = _since(
            strong | (order == 1), ahead, WIDE
        )  # of the block; its first token is alone before the second
        if WIDE:
            s_before = tl.where((order == 0)[:, None], last[None, :], s_before)
        else:
            s_before = tl.where(order == 0, last, s_before)
        grown, kept = tl.exp(-s), tl.where(_beside(starts, x, WIDE), tl.exp(s_before + x), 1.0)
        total = base + tl.cumsum(x, 0)
        reached = tl.exp(tl.minimum(total - x - s_before if BEFORE else total - s, 0.0))
        if WIDE:
            tl.store(f + at, grown, mask=inside)
            tl.store(c + at, kept, mask=inside)
        else:
            tl.store(f + t * H, grown, mask=live)
            tl.store(c + t * H, kept, mask=live)
            grown, reached = grown[:, None], reached[:, None]
        new = (starts & live).to(tl.int32)
        tl.store(flags + t * H, tl.where(order == 0, tl.sum(new, 0), new), mask=live)
        y = tl.load(k + at, mask=inside, other=0.0).to(ACC)
        z = tl.load(spread + at, mask=inside, other=0.0).to(ACC) if GIVEN else y * y
        w = tl.load(q + at, mask=inside, other=0.0).to(ACC) * scale
        out = rows + t[:, None] * (H * COUNT * K) + j[None, :]
        tl.store(out, y * grown, mask=inside)
        tl.store(out + K, z * grown, mask=inside)
        tl.store(out + 2 * K, w, mask=inside)
        if BACK:
            tl.store(out + 3 * K, w * reached, mask=inside)
        is_last = _beside(order == BLOCK - 1, x, WIDE)
        last, base = tl.sum(tl.where(is_last, s, 0.0), 0), base + tl.sum(x, 0)


# ---- states at the chunks' starts ------------------------------------------------------------------------------------


@triton.jit
def _write(S, x, y, DT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """S + y^T x. DT narrower than ACC: y is exact in it, and x enters as the sum of what DT holds and of the rest."""
    if DT == ACC:
        return tl.dot(tl.trans(y.to(ACC)), x, S, input_precision=PRECISION, out_dtype=ACC)
    else:
        high, y = x.to(DT), tl.trans(y.to(DT))
        return tl.dot(y, (x - high.to(ACC)).to(DT), tl.dot(y, high, S, out_dtype=ACC), out_dtype=ACC)


@triton.jit
def _keep_total(total, at, lost, j, K, tile, NV, WIDE: tl.constexpr):
    """Store a chunk's log decay, once: a number a head, or one a key channel."""
    if WIDE:
        tl.store(total + at * K + j, lost, mask=(j < K) & (tile % NV == 0))
    else:
        tl.store(total + at + j * 0, lost, mask=(j == 0) & (tile == 0))


@triton.jit
def _add(
    M, I, k, spread, v, b, g, first, n, h, H, K, V, j, i,
    BT: tl.constexpr, WIDE: tl.constexpr, GIVEN: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states [BV, BK] after the next BT of n > 0 tokens, and their log decay, a number or [BK]."""
    order = tl.arange(0, BT)
    behind = (order + 1 < n) & (order + 1 < BT)
    keys = (first * H + h) * K + order[:, None] * (H * K) + j[None, :]
    values = (first * H + h) * V + order[:, None] * (H * V) + i[None, :]
    key, value = (order < n)[:, None] & (j < K)[None, :], (order < n)[:, None] & (i < V)[None, :]
    if WIDE:
        later = tl.load(g + keys + H * K, mask=behind[:, None] & (j < K)[None, :], other=0.0).to(ACC)
        loss = tl.sum(later, 0) + tl.load(g + (first * H + h) * K + j, mask=j < K, other=0.0).to(ACC)
        keep, kept = tl.exp(tl.cumsum(later, 0, reverse=True)), tl.exp(loss)[None, :]
    else:
        later = tl.load(g + (first * H + h) + (order + 1) * H, mask=behind, other=0.0).to(ACC)
        loss = tl.sum(later, 0) + tl.load(g + first * H + h).to(ACC)
        keep, kept = tl.exp(tl.cumsum(later, 0, reverse=True))[:, None], tl.exp(loss)
    x = tl.load(k + keys, mask=key, other=0.0).to(ACC)
    s = tl.load(spread + keys, mask=key, other=0.0).to(ACC) if GIVEN else x * x
    y = tl.load(v + values, mask=value, other=0.0)
    z = tl.load(b + values, mask=value, other=0.0)
    return _write(M * kept, x * keep, y, DT, PRECISION, ACC), _write(I * kept, s * keep, z, DT, PRECISION, ACC), loss


@direct
@triton.jit(do_not_specialize=["N", "h0"])
def deposits(
    k, spread, v, b, g, offsets, M, I, total, N, h0, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr, GIVEN: tl.constexpr,
    ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the states at its end, and its log decay."""
    NK, NV = tl.cdiv(K, BK), tl.cdiv(V, BV)
    slot, tile = tl.program_id(0) // (NK * NV), tl.program_id(0) % (NK * NV)
    head, heads = tl.program_id(1), tl.num_programs(1)
    start, end = locate(slot, offsets, N, C)
    if start >= end:
        return
    h, n = h0 + head, (end - start).to(tl.int32)
    j, i = tile // NV * BK + tl.arange(0, BK), tile % NV * BV + tl.arange(0, BV)
    to_M, to_I, lost = tl.zeros([BV, BK], ACC), tl.zeros([BV, BK], ACC), tl.zeros([BK], ACC)
    for t in range(0, n, BT):
        to_M, to_I, loss = _add(
            to_M, to_I, k, spread, v, b, g, start + t, n - t, h, H, K, V, j, i, BT, WIDE, GIVEN, ACC, DT, PRECISION
        )  # fmt: skip
        lost += loss
    at = slot.to(tl.int64) * heads + head
    _keep_total(total, at, lost, j, K, tile, NV, WIDE)
    out, inside = at * K * V + j[None, :] * V + i[:, None], (j < K)[None, :] & (i < V)[:, None]
    tl.store(M + out, to_M, mask=inside)
    tl.store(I + out, to_I, mask=inside)


@direct
@triton.jit(do_not_specialize=["h0"])
def walk(
    k, spread, v, b, g, offsets, M, I, total, start_M, start_I, row, sheet, last_M, last_I, h0,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WIDE: tl.constexpr, GIVEN: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states at every chunk's start and the chunks' log decays, from chunk to chunk: `deposits` and `scan` in one, for
    when there are enough sequences, heads and tiles to fill the GPU. start_M and start_I as in `scan`."""
    NK, NV = tl.cdiv(K, BK), tl.cdiv(V, BV)
    sequence, tile = tl.program_id(0) // (NK * NV), tl.program_id(0) % (NK * NV)
    head, heads = tl.program_id(1), tl.num_programs(1)
    begin, finish, h = tl.load(offsets + sequence), tl.load(offsets + sequence + 1), h0 + head
    j, i = tile // NV * BK + tl.arange(0, BK), tile % NV * BV + tl.arange(0, BV)
    element, inside = j[None, :] * V + i[:, None], (j < K)[None, :] & (i < V)[:, None]
    given = sequence.to(tl.int64) * row + h * sheet
    S = tl.load(start_M + given + element, mask=inside, other=0.0).to(ACC)
    P = tl.load(start_I + given + element, mask=inside, other=0.0).to(ACC)
    at, n, lost = (begin // C + sequence) * heads + head, (finish - begin).to(tl.int32), tl.zeros([BK], ACC)
    for t in range(0, n, BT):
        if t % C == 0:
            tl.store(M + at * K * V + element, S, mask=inside)
            tl.store(I + at * K * V + element, P, mask=inside)
        S, P, loss = _add(
            S, P, k, spread, v, b, g, begin + t, n - t, h, H, K, V, j, i, BT, WIDE, GIVEN, ACC, DT, PRECISION
        )  # fmt: skip
        lost = tl.where(t % C == 0, 0.0, lost) + loss
        _keep_total(total, at, lost, j, K, tile, NV, WIDE)  # of the chunk as far as it has come; the last one stays
        at += tl.where((t + BT) % C == 0, heads, 0)
    ends = (sequence.to(tl.int64) * H + h) * K * V + element
    tl.store(last_M + ends, S, mask=inside)
    tl.store(last_I + ends, P, mask=inside)


@triton.jit
def _join(a1, x1, y1, a2, x2, y2):
    return a1 * a2, a2 * x1 + x2, a2 * y1 + y2


@triton.jit
def _chunks(X, Y, total, slot, rows, n, heads, head, e, K, V, WIDE: tl.constexpr, BACK: tl.constexpr):
    """Decays and deposits of some chunks, [STEP, BLOCK]; 1 and 0 past the last."""
    at = (slot + ((n - 1 - rows) if BACK else rows)).to(tl.int64)[:, None] * heads + head
    live = (rows < n)[:, None] & (e < K * V)[None, :]
    loss = tl.load(total + (at * K + (e // V)[None, :] if WIDE else at + (e * 0)[None, :]), mask=live, other=0.0)
    at = at * K * V + e[None, :]
    return tl.exp(loss), tl.load(X + at, mask=live, other=0.0), tl.load(Y + at, mask=live, other=0.0)


@direct
@triton.jit(do_not_specialize=["h0"])
def scan(
    X, Y, total, offsets, start_x, start_y, row, sheet, last_x, last_y, h0, H, K, V,
    C: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, BACK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In place, X[chunk] := the state before it came, state := exp(total) state + X, over a sequence's chunks, and so for Y;
    BACK: from the last chunk to the first. STEP chunks at once, and the next ones are loaded before these are stored.
    start_x and start_y are [N, H, K, V], `row` apart from sequence to sequence and `sheet` from head to head."""
    blocks = tl.cdiv(K * V, BLOCK)
    sequence, head, heads = tl.program_id(0) // blocks, tl.program_id(1), tl.num_programs(1)
    e, order = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STEP)
    inside = e < K * V
    begin = tl.load(offsets + sequence)
    slot, n = begin // C + sequence, tl.cdiv(tl.load(offsets + sequence + 1) - begin, C).to(tl.int32)
    given = sequence.to(tl.int64) * row + (h0 + head) * sheet + e
    ends = (sequence.to(tl.int64) * H + h0 + head) * K * V + e
    x = tl.load(start_x + given, mask=inside, other=0.0).to(ACC)
    y = tl.load(start_y + given, mask=inside, other=0.0).to(ACC)
    a1, x1, y1 = _chunks(X, Y, total, slot, order, n, heads, head, e, K, V, WIDE, BACK)
    zeroth = ((slot + (n - 1 if BACK else 0)) * heads + head) * K * V + e
    tl.store(X + zeroth, x, mask=inside & (n > 0))
    tl.store(Y + zeroth, y, mask=inside & (n > 0))
    for c in range(0, n, STEP):
        a, dx, dy = tl.associative_scan((a1, x1, y1), 0, _join)
        a1, x1, y1 = _chunks(X, Y, total, slot, c + STEP + order, n, heads, head, e, K, V, WIDE, BACK)
        after_x, after_y = a * x[None, :] + dx, a * y[None, :] + dy
        to = c + 1 + order
        at = ((slot + ((n - 1 - to) if BACK else to))[:, None] * heads + head) * K * V + e[None, :]
        tl.store(X + at, after_x, mask=(to < n)[:, None] & inside[None, :])
        tl.store(Y + at, after_y, mask=(to < n)[:, None] & inside[None, :])
        last = (order == STEP - 1)[:, None]
        x, y = tl.sum(tl.where(last, after_x, 0.0), 0), tl.sum(tl.where(last, after_y, 0.0), 0)
    tl.store(last_x + ends, x, mask=inside)
    tl.store(last_y + ends, y, mask=inside)


# ---- read ------------------------------------------------------------------------------------------------------------


@triton.jit
def fetch(at, x0, BX: tl.constexpr, X: tl.constexpr, ROWS: tl.constexpr):
    """Ask the second-level cache for a block of channels of ROWS neighbouring rows [ROWS, X]. All programs of a chunk walk through
    the same tokens at the same time: without this each of them would wait for memory at every token."""
    lane = tl.arange(0, 32)
    share: tl.constexpr = 32 // triton.next_power_of_2(ROWS)
    x = tl.minimum(x0 + (lane % share) * (BX // share), X - 1)
    row = tl.minimum(lane // share, ROWS - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at + row * X + x], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def load_write(rows, v, b, j, i, K, V, KFULL: tl.constexpr, VFULL: tl.constexpr, ACC: tl.constexpr):
    """What a token writes: k f, s f, v, b."""
    kt, st = load_row(rows, j, K, KFULL), load_row(rows + K, j, K, KFULL)
    return kt, st, load_row(v, i, V, VFULL).to(ACC), load_row(b, i, V, VFULL).to(ACC)


@direct
@triton.jit(do_not_specialize=["N", "h0", "tokens"])
def read(
    rows, k, v, b, f, c, flags, prior, bonus, M, I, offsets, o, N, tokens, h0,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    KH: tl.constexpr, VR: tl.constexpr, KL: tl.constexpr, VL: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr,
    KFULL: tl.constexpr, VFULL: tl.constexpr, WIDE: tl.constexpr, PRIOR: tl.constexpr, BEFORE: tl.constexpr,
    BONUS: tl.constexpr, VARIANCE: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A chunk's outputs from one tile: o and, VARIANCE, the variance [key block, tokens, heads, 1 or 2, V]. A and S are the
    states times f."""
    slot, tile = tl.program_id(0) // (NK * NV), tl.program_id(0) % (NK * NV)
    head, heads = tl.program_id(1), tl.num_programs(1)
    start, end = locate(slot, offsets, N, C)
    if start >= end:
        return
    h, n = h0 + head, (end - start).to(tl.int32)
    k0, v0 = tile // NV * (KH * 4 * KL), tile % NV * (VR * VL * 4)
    j, i = key_index(k0, KH, KL, VL), value_index(v0, VR, KL, VL)
    at = (slot.to(tl.int64) * heads + head) * K * V
    p = load_prior(prior, h, j, i, K, V, PRIOR, ACC)
    A, S = load_state(M + at, j, i, K, V), load_state(I + at, j, i, K, V)
    token = start * H + h
    rows, k, v, b, flags = rows + token * (3 * K), k + token * K, v + token * V, b + token * V, flags + token
    gate = token * K if WIDE else token
    f, c = f + gate, c + gate
    SUMS: tl.constexpr = 2 if VARIANCE else 1
    o += ((tile // NV * tokens + start) * heads + head) * (SUMS * V)
    u = load_row(bonus + h * K, j, K, KFULL).to(ACC) if BONUS else 0.0
    grown = load_gate(f, 0, H, K, j, WIDE) * 0.0 + 1.0
    for t in range(0, n):
        row = t * (H * 3 * K)
        qt = load_row(rows + row + 2 * K, j, K, KFULL)
        kt, st, vt, bt = load_write(rows + row, v + t * (H * V), b + t * (H * V), j, i, K, V, KFULL, VFULL, ACC)
        flag, ft = tl.load(flags + t * H), load_gate(f, t, H, K, j, WIDE)
        if FAST:
            ahead = tl.minimum(t + AHEAD, n - 1)
            fetch(rows + ahead * (H * 3 * K), k0, KH * 4 * KL, K, 3)
            fetch(v + ahead * (H * V), v0, VR * VL * 4, V, 1)
            fetch(b + ahead * (H * V), v0, VR * VL * 4, V, 1)
        if BEFORE:
            R = reciprocal(S + p * grown, FAST)
            mean = A * R
            if BONUS:
                mean += (u * grown * load_row(k + t * (H * K), j, K, KFULL).to(ACC)) * vt * R
            if VARIANCE:
                put(o + t * heads * (SUMS * V) + V, i, over_keys(qt * qt * grown * R), V)
            put(o + t * heads * (SUMS * V), i, over_keys(qt * mean), V)
        if flag != 0:
            kept = load_gate(c, t, H, K, j, WIDE)
            A, S = A * kept, S * kept
        A, S, grown = A + kt * vt, S + st * bt, ft
        if not BEFORE:
            R = reciprocal(S + p * grown, FAST)
            if VARIANCE:
                put(o + t * heads * (SUMS * V) + V, i, over_keys(qt * qt * grown * R), V)
            put(o + t * heads * (SUMS * V), i, over_keys(qt * (A * R)), V)


@direct
@triton.jit(do_not_specialize=["h0", "blocks", "tokens"])
def total(
    parts, out, second, blocks, tokens, heads, h0, H,
    V: tl.constexpr, TWO: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out, and TWO: second, [tokens, H, V] (some of its heads) = sums of parts [blocks, tokens, heads, 1 or 2, V]; ROWS rows of V."""
    row, x = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    live = (row < tokens * heads) & (x < V)
    COUNT: tl.constexpr = 2 if TWO else 1
    parts += row * (COUNT * V) + x
    one, two = tl.zeros([ROWS, BLOCK], ACC), tl.zeros([ROWS, BLOCK], ACC)
    for _ in range(0, blocks):
        one += tl.load(parts, mask=live, other=0.0)
        if TWO:
            two += tl.load(parts + V, mask=live, other=0.0)
        parts += tokens.to(tl.int64) * heads * (COUNT * V)
    at = (row // heads * H + h0 + row % heads) * V + x
    tl.store(out + at, one.to(out.dtype.element_ty), mask=live)
    if TWO:
        tl.store(second + at, two.to(second.dtype.element_ty), mask=live)
