"""Kernels of the elementwise-read family, backward: adjoints at the chunks' starts, the walk back, sums. See `elementwise`."""

from __future__ import annotations

import triton
import triton.language as tl

from unify.kernels.chunk import locate
from unify.kernels.direct import direct
from unify.kernels.elementwise_forward import (
    AHEAD,
    fetch,
    key_index,
    load_gate,
    load_prior,
    load_row,
    load_state,
    load_write,
    over_keys,
    over_values,
    put,
    reciprocal,
    store_state,
    value_index,
)


@direct
@triton.jit(do_not_specialize=["N", "h0"])
def adjoint(
    rows, k, v, b, f, c, flags, prior, bonus, d_o, d_var, M, I, offsets, CP, marks, N, h0,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, MARK: tl.constexpr,
    KH: tl.constexpr, VR: tl.constexpr, KL: tl.constexpr, VL: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr,
    KFULL: tl.constexpr, VFULL: tl.constexpr, WIDE: tl.constexpr, PRIOR: tl.constexpr, BEFORE: tl.constexpr,
    BONUS: tl.constexpr, VARIANCE: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Forward in time through a chunk: in place of the states at its start (M, I) its part of their adjoints; its part of the
    prior's gradient where that has values (CP); and at every MARK-th token the states before it, times the f of that time.
    The last mark is the chunk's end."""
    slot, tile = tl.program_id(0) // (NK * NV), tl.program_id(0) % (NK * NV)
    head, heads = tl.program_id(1), tl.num_programs(1)
    start, end = locate(slot, offsets, N, C)
    if start >= end:
        return
    h, n = h0 + head, (end - start).to(tl.int32)
    k0, v0 = tile // NV * (KH * 4 * KL), tile % NV * (VR * VL * 4)
    j, i = key_index(k0, KH, KL, VL), value_index(v0, VR, KL, VL)
    at = (slot.to(tl.int64) * heads + head) * K * V
    marks += at * (2 * (C // MARK + 1))
    p = load_prior(prior, h, j, i, K, V, PRIOR, ACC)
    A, S = load_state(M + at, j, i, K, V), load_state(I + at, j, i, K, V)
    to_M, to_I, to_P = A * 0.0, A * 0.0, A * 0.0
    token = start * H + h
    rows, k, v, b, flags = rows + token * (4 * K), k + token * K, v + token * V, b + token * V, flags + token
    d_o, d_var, gate = d_o + token * V, d_var + token * V, token * K if WIDE else token
    f, c = f + gate, c + gate
    u = load_row(bonus + h * K, j, K, KFULL).to(ACC) if BONUS else 0.0
    grown = load_gate(f, 0, H, K, j, WIDE) * 0.0 + 1.0
    for t in range(0, n):
        row, value = t * (H * 4 * K), t * (H * V)
        flag, ft = tl.load(flags + t * H), load_gate(f, t, H, K, j, WIDE)
        qt, wt = load_row(rows + row + 3 * K, j, K, KFULL), load_row(d_o + value, i, V, VFULL).to(ACC)
        kt, st, vt, bt = load_write(rows + row, v + value, b + value, j, i, K, V, KFULL, VFULL, ACC)
        if FAST:
            ahead = tl.minimum(t + AHEAD, n - 1)
            fetch(rows + ahead * (H * 4 * K), k0, KH * 4 * KL, K, 4)
            fetch(v + ahead * (H * V), v0, VR * VL * 4, V, 1)
            fetch(b + ahead * (H * V), v0, VR * VL * 4, V, 1)
            fetch(d_o + ahead * (H * V), v0, VR * VL * 4, V, 1)
        if BEFORE:
            A0, S0 = A, S
        if flag != 0:
            if t % MARK == 0:
                store_state(marks + t // MARK * (2 * K * V), A, j, i, K, V)
                store_state(marks + t // MARK * (2 * K * V) + K * V, S, j, i, K, V)
            kept = load_gate(c, t, H, K, j, WIDE)
            A, S = A * kept, S * kept
        A, S = A + kt * vt, S + st * bt
        if not BEFORE:
            A0, S0, grown = A, S, ft
        R = reciprocal(S0 + p * grown, FAST)
        mean = A0 * R
        if BONUS:
            mean += (u * grown * load_row(k + t * (H * K), j, K, KFULL).to(ACC)) * vt * R
        y = wt * R
        z = y * mean
        if VARIANCE or PRIOR == 3:
            plain = load_row(rows + row + 2 * K, j, K, KFULL) * grown
        if VARIANCE:
            z += plain * load_row(d_var + value, i, V, VFULL).to(ACC) * R * R
        if PRIOR == 3:
            to_P -= plain * z
        to_M += qt * y
        to_I -= qt * z
        if BEFORE:
            grown = ft
    store_state(marks + tl.cdiv(n, MARK) * (2 * K * V), A, j, i, K, V)
    store_state(marks + tl.cdiv(n, MARK) * (2 * K * V) + K * V, S, j, i, K, V)
    store_state(M + at, to_M, j, i, K, V)
    store_state(I + at, to_I, j, i, K, V)
    if PRIOR == 3:
        store_state(CP + at, to_P, j, i, K, V)


@triton.jit
def _replay(
    marks, rows, v, b, c, flags, t0, end, j, i, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KFULL: tl.constexpr, VFULL: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The states before token `end`, from the mark at t0."""
    A, S = load_state(marks, j, i, K, V), load_state(marks + K * V, j, i, K, V)
    for t in range(t0, end):
        if tl.load(flags + t * H) != 0:
            kept = load_gate(c, t, H, K, j, WIDE)
            A, S = A * kept, S * kept
        value = t * (H * V)
        kt, st, vt, bt = load_write(rows + t * (H * 4 * K), v + value, b + value, j, i, K, V, KFULL, VFULL, ACC)
        A, S = A + kt * vt, S + st * bt
    return A, S


@triton.jit
def _careful(I, S, c, f, flags, p, t0, last, j, i, H, K, V, LIMIT: tl.constexpr, WIDE: tl.constexpr):
    """Whether a block's states must be replayed: a segment starts inside it, or the precision grows by more than LIMIT in
    it, so that taking writes off again would cost as much accuracy."""
    begin = load_state(I, j, i, K, V) * load_gate(c, t0, H, K, j, WIDE) + p
    end = S + p * load_gate(f, last, H, K, j, WIDE)
    return (tl.load(flags + t0 * H) > 1) | (tl.max(tl.where((j < K) & (i < V), end - LIMIT * begin, 0.0)) > 0)


@direct
@triton.jit(do_not_specialize=["N", "h0", "tokens", "slots"])
def gradient(
    rows, k, v, b, f, c, flags, prior, bonus, d_o, d_var, DMs, DIs, offsets, marks, by_key, by_value, ends, N, tokens, slots, h0,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, MARK: tl.constexpr,
    LIMIT: tl.constexpr, SUMS: tl.constexpr, EXACT: tl.constexpr,
    KH: tl.constexpr, VR: tl.constexpr, KL: tl.constexpr, VL: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr,
    KFULL: tl.constexpr, VFULL: tl.constexpr, WIDE: tl.constexpr, PRIOR: tl.constexpr, BEFORE: tl.constexpr,
    BONUS: tl.constexpr, VARIANCE: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Backward in time through a chunk, from the adjoints at its end: sums over values for dq, the prior, dk and ds, then the
    variance and the bonus, by_key [value block, tokens, heads, SUMS, K]; sums over keys for dv and db, by_value [key block,
    tokens, heads, 2, V]; and <adjoint, state> at the chunk's end, ends [value block, slots, heads, K]. A and S are the states
    times f, DM and DI their adjoints divided by it. EXACT: the last of the sums is dg, <adjoint, decayed state> at every token."""
    slot, tile = tl.program_id(0) // (NK * NV), tl.program_id(0) % (NK * NV)
    head, heads = tl.program_id(1), tl.num_programs(1)
    start, end = locate(slot, offsets, N, C)
    if start >= end:
        return
    h, n = h0 + head, (end - start).to(tl.int32)
    k0, v0 = tile // NV * (KH * 4 * KL), tile % NV * (VR * VL * 4)
    j, i = key_index(k0, KH, KL, VL), value_index(v0, VR, KL, VL)
    at = (slot.to(tl.int64) * heads + head) * K * V
    marks += at * (2 * (C // MARK + 1))
    p = load_prior(prior, h, j, i, K, V, PRIOR, ACC)
    token = start * H + h
    rows, k, v, b, flags = rows + token * (4 * K), k + token * K, v + token * V, b + token * V, flags + token
    d_o, d_var, gate = d_o + token * V, d_var + token * V, token * K if WIDE else token
    f, c = f + gate, c + gate
    by_key += ((tile % NV * tokens + start) * heads + head) * (SUMS * K)
    by_value += ((tile // NV * tokens + start) * heads + head) * (2 * V)
    u = load_row(bonus + h * K, j, K, KFULL).to(ACC) if BONUS else 0.0
    blocks = tl.cdiv(n, MARK)
    grown = load_gate(f, n - 1, H, K, j, WIDE)
    DM, DI = load_state(DMs + at, j, i, K, V) / grown, load_state(DIs + at, j, i, K, V) / grown
    A, S = (
        load_state(marks + blocks * (2 * K * V), j, i, K, V),
        load_state(marks + blocks * (2 * K * V) + K * V, j, i, K, V),
    )
    put(ends + ((tile % NV * slots + slot).to(tl.int64) * heads + head) * K, j, over_values(DM * A + DI * S), K)
    for block in range(0, blocks):
        t0 = (blocks - 1 - block) * MARK
        mark = marks + t0 // MARK * (2 * K * V)
        count = tl.minimum(n - t0, MARK)
        careful = _careful(mark + K * V, S, c, f, flags, p, t0, t0 + count - 1, j, i, H, K, V, LIMIT, WIDE)
        for late in range(0, count):
            t = t0 + count - 1 - late
            row, value, to_k, to_v = (
                t * (H * 4 * K),
                t * (H * V),
                by_key + t * heads * (SUMS * K),
                by_value + t * heads * (2 * V),
            )
            flag = tl.load(flags + t * H)
            ft = load_gate(f, tl.maximum(t - 1, 0) if BEFORE else t, H, K, j, WIDE)
            qt, wt = load_row(rows + row + 2 * K, j, K, KFULL), load_row(d_o + value, i, V, VFULL).to(ACC)
            kt, st, vt, bt = load_write(rows + row, v + value, b + value, j, i, K, V, KFULL, VFULL, ACC)
            if FAST:
                ahead = tl.maximum(t - AHEAD, 0)
                fetch(rows + ahead * (H * 4 * K), k0, KH * 4 * KL, K, 4)
                fetch(v + ahead * (H * V), v0, VR * VL * 4, V, 1)
                fetch(b + ahead * (H * V), v0, VR * VL * 4, V, 1)
                fetch(d_o + ahead * (H * V), v0, VR * VL * 4, V, 1)
            if BEFORE:
                if careful | (t == t0):
                    A, S = _replay(mark, rows, v, b, c, flags, t0, t, j, i, H, K, V, KFULL, VFULL, WIDE, ACC)
                else:
                    A, S = A - kt * vt, S - st * bt
                put(to_k + 2 * K, j, over_values(DM * vt), K)
                put(to_k + 3 * K, j, over_values(DI * bt), K)
                by_M, by_I = over_keys(DM * kt), over_keys(DI * st)
                grown = tl.where(t == 0, 1.0, ft)  # the states at the chunk's start are themselves
                if flag != 0:
                    kept = load_gate(c, t, H, K, j, WIDE)
                    DM, DI = DM * kept, DI * kept
                if EXACT:
                    put(to_k + (SUMS - 1) * K, j, over_values(DM * A + DI * S), K)
            else:
                if careful:
                    A, S = _replay(mark, rows, v, b, c, flags, t0, t + 1, j, i, H, K, V, KFULL, VFULL, WIDE, ACC)
                grown = ft
            R = reciprocal(S + p * grown, FAST)
            mean, y = A * R, wt * R
            if BONUS:
                raw = u * grown * load_row(k + t * (H * K), j, K, KFULL).to(ACC)
                mean += raw * vt * R
                put(to_k + 5 * K, j, over_values(y * vt), K)
                by_M += over_keys(raw * qt * y)
            put(to_k, j, over_values(wt * mean), K)
            z = y * mean
            if VARIANCE:
                x = load_row(d_var + value, i, V, VFULL).to(ACC)
                z += qt * grown * x * R * R
                put(to_k + 4 * K, j, over_values(x * R), K)
            put(to_k + K, j, over_values(z * p if PRIOR == 3 else z), K)
            DM, DI = DM + qt * y, DI - qt * z
            if not BEFORE:
                put(to_k + 2 * K, j, over_values(DM * vt), K)
                put(to_k + 3 * K, j, over_values(DI * bt), K)
                by_M, by_I = over_keys(DM * kt), over_keys(DI * st)
                A, S = A - kt * vt, S - st * bt
                if EXACT:  # noqa: SIM102 - at compile time; a write may dwarf what it is added to, and does not leave it when taken off
                    if careful | (t == t0):
                        A, S = _replay(mark, rows, v, b, c, flags, t0, t, j, i, H, K, V, KFULL, VFULL, WIDE, ACC)
                if flag != 0:
                    kept = load_gate(c, t, H, K, j, WIDE)
                    DM, DI = DM * kept, DI * kept
                if EXACT:
                    put(to_k + (SUMS - 1) * K, j, over_values(DM * A + DI * S), K)
            put(to_v, i, by_M, V)
            put(to_v + V, i, by_I, V)
        A, S = load_state(mark, j, i, K, V), load_state(mark + K * V, j, i, K, V)


@triton.jit
def _sum_rows(parts, count: tl.constexpr, tokens, heads, K, rows, mask, ACC: tl.constexpr):
    """Sum over the blocks of parts [count, tokens, heads, K] at the elements `rows` of one of them."""
    out = tl.load(parts + rows, mask=mask, other=0.0).to(ACC)
    for _ in tl.static_range(1, count):
        parts += tokens.to(tl.int64) * heads * K
        out += tl.load(parts + rows, mask=mask, other=0.0)
    return out


@triton.jit
def _grown(f, start, t, n, h, H, K, j, LATE: tl.constexpr, WIDE: tl.constexpr):
    """f of a chunk's tokens, [C, BK or 1]; LATE = 1: of the token before, 1 for the first."""
    seen = (t >= LATE) & (t < n)
    if WIDE:
        at = ((start + t - LATE)[:, None] * H + h) * K + j[None, :]
        return tl.load(f + at, mask=seen[:, None] & (j < K)[None, :], other=1.0)
    else:
        return tl.load(f + (start + t - LATE) * H + h, mask=seen, other=1.0)[:, None]


@direct
@triton.jit(do_not_specialize=["N", "h0", "tokens", "slots"])
def finish(
    q, k, spread, f, prior, bonus, offsets, by_key, ends,
    dq, dk, d_spread, dg, d_prior, d_bonus, scale, N, tokens, slots, h0, H, K, blocks: tl.constexpr,
    C: tl.constexpr, SUMS: tl.constexpr, EXACT: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, PRIOR: tl.constexpr,
    GIVEN: tl.constexpr, BEFORE: tl.constexpr, BONUS: tl.constexpr, VARIANCE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add the value blocks up, with the factors f they lack: dq, dk, d_spread, and dg = <adjoint, state> at the chunk's end
    + reads - writes from t on. A token's read of its own write cancels there, and behind strong gates little else is left: in
    EXACT dg is summed by itself."""
    slot, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start, end = locate(slot, offsets, N, C)
    h, n, t = h0 + head, (end - start).to(tl.int32), tl.arange(0, C)
    change, reads, at_ends = tl.zeros([C], ACC), tl.zeros([C], ACC), tl.zeros([BK], ACC)
    for k0 in range(0, K, BK):
        j = k0 + tl.arange(0, BK)
        mask = (t < n)[:, None] & (j < K)[None, :]
        full = (start * H + h) * K + t[:, None] * (H * K) + j[None, :]
        rows = ((start * heads + head) + t[:, None] * heads) * (SUMS * K) + j[None, :]
        share = (slot.to(tl.int64) * H + h) * K + j  # of this chunk, in a gradient that all tokens share
        x, y = tl.load(q + full, mask=mask, other=0.0).to(ACC), tl.load(k + full, mask=mask, other=0.0).to(ACC)
        s = tl.load(spread + full, mask=mask, other=0.0).to(ACC) if GIVEN else y * y
        grown = _grown(f, start, t, n, h, H, K, j, 0, WIDE)
        seen = scale * (_grown(f, start, t, n, h, H, K, j, 1, WIDE) if BEFORE else grown)
        gq = scale * _sum_rows(by_key, blocks, tokens, heads, SUMS * K, rows, mask, ACC)
        read = x * seen * _sum_rows(by_key + K, blocks, tokens, heads, SUMS * K, rows, mask, ACC)
        gk = grown * _sum_rows(by_key + 2 * K, blocks, tokens, heads, SUMS * K, rows, mask, ACC)
        gs = grown * _sum_rows(by_key + 3 * K, blocks, tokens, heads, SUMS * K, rows, mask, ACC)
        written = y * gk + s * gs
        if PRIOR < 3:
            tl.store(d_prior + share, -tl.sum(read, 0), mask=j < K)
            if PRIOR == 1:
                read = read * tl.load(prior + h).to(ACC)
            else:
                read = read * tl.load(prior + h * K + j, mask=j < K, other=0.0).to(ACC)[None, :]
        if VARIANCE:
            spent = scale * seen * x * _sum_rows(by_key + 4 * K, blocks, tokens, heads, SUMS * K, rows, mask, ACC)
            gq += 2.0 * spent
            read -= x * spent
        if BONUS:
            w = seen * _sum_rows(by_key + 5 * K, blocks, tokens, heads, SUMS * K, rows, mask, ACC)
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
        if EXACT:
            out = _sum_rows(by_key + (SUMS - 1) * K, blocks, tokens, heads, SUMS * K, rows, mask, ACC)
            change += tl.sum(out, 1)
        else:
            at_end = (slot.to(tl.int64) * heads + head) * K + j
            at_end = _sum_rows(ends, blocks, slots, heads, K, at_end, (j < K) & (n > 0), ACC)
            out = tl.cumsum(read - written, 0, reverse=True) + at_end[None, :]
            out = out - read if BEFORE else out
            change += tl.sum(read - written, 1)
            reads += tl.sum(read, 1)
            at_ends += at_end
        if WIDE:
            tl.store(dg + full, out.to(dg.dtype.element_ty), mask=mask)
    if not WIDE:
        if not EXACT:
            change = tl.cumsum(change, 0, reverse=True) + tl.sum(at_ends, 0)
            change = change - reads if BEFORE else change
        tl.store(dg + (start + t) * H + h, change.to(dg.dtype.element_ty), mask=t < n)
