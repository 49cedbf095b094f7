"""The rank-one family by matrix products: S_t = Diag(exp g_t) S_{t-1} - w_t (r_t^T S_{t-1}) + k_t v_t^T.

With u_t = -S_{t-1}^T r_t this is a linear memory that is written twice a token, (w, u) and (k, v). Unrolled inside a
chunk, r~ and w~ being decayed to its start and end, u solves a unit lower triangular system (WY form)

    u = -T (r~ S0 + A_rk v),   T = (1 + A_rw)^-1,

so T is found for all chunks at once, one walk over chunks finds u and the states, and the read is `chunk`'s. Where w and
k are one tensor, v + u is the unknown: one write a token, half of the scores.

The adjoint of u obeys du = T^T (w~ D + scale A_qw^T do), D the state's adjoint at the chunk's end: the same walk, with
reads and writes exchanged. Then `chunk`'s gradient sees two reads, q with do and r with -du, and the writes as above.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unify.kernels import chunk
from unify.kernels.chunk import dot, far, load, locate, near, split_dot, store, wide_dot
from unify.kernels.direct import direct
from unify.kernels.operator import operator


@direct
@triton.jit
def _invert(A, inverse, offsets, N, H, C: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr):
    """(1 + A)^-1 of strictly lower triangular scores, [tokens, H, C], C = 64.

    Block substitution: with the blocks of m tokens on the diagonal inverted, those of 2 m follow by filling in the corner
    below, [[P, 0], [B, Q]]^-1 = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]]. Up to m = 16 all corners of a level at once, in four
    squares of 16: X <- X - X B X; then two corners of 16, then one of 32. Scores in DT are multiplied as they are, all else as
    the sum of what DT holds and of the rest.
    """
    SPLIT: tl.constexpr = DT != ACC
    start, end = locate(tl.program_id(0), offsets, N, C)
    if start >= end:
        return
    h, n = tl.program_id(1), (end - start).to(tl.int32)
    four, i, j = tl.arange(0, 4)[:, None, None], tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    base = (start * H + h) * C
    row, column = four * 16 + i, four * 16 + j
    lower = tl.load(A + base + row * (H * C) + column, mask=row < n, other=0.0).to(ACC)
    X = tl.where(i == j, 1.0, tl.where((i ^ j) == 1, -lower, 0.0)).to(ACC)
    for level in range(1, 4):
        B = tl.where(((i >> level) ^ (j >> level)) == 1, lower, 0.0)
        X -= wide_dot(X, split_dot(B, X, SPLIT, DT, ACC), SPLIT, DT, ACC)

    two = tl.arange(0, 2)[:, None, None]
    row, column = two * 32 + 16 + i, two * 32 + j
    B = tl.load(A + base + row * (H * C) + column, mask=row < n, other=0.0).to(ACC)
    halves, which = tl.reshape(X, [2, 2, 16, 16]), tl.arange(0, 2)[None, :, None, None]
    P, Q = tl.sum(tl.where(which == 0, halves, 0.0), 1), tl.sum(tl.where(which == 1, halves, 0.0), 1)
    corner = -wide_dot(Q, split_dot(B, P, SPLIT, DT, ACC), SPLIT, DT, ACC)

    down, right = tl.arange(0, 2)[None, :, None, None, None], tl.arange(0, 2)[None, None, None, :, None]
    diagonal, left = tl.reshape(X, [2, 2, 16, 1, 16]), tl.reshape(corner, [2, 1, 16, 1, 16])
    X = tl.where(down == right, diagonal, tl.where(down > right, left, 0.0))
    X = tl.reshape(X, [2, 32, 32])
    P, Q = tl.sum(tl.where(two == 0, X, 0.0), 0), tl.sum(tl.where(two == 1, X, 0.0), 0)
    i, j = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    below = base + (32 + i) * (H * C) + j
    B = tl.load(A + below, mask=32 + i < n, other=0.0).to(ACC)
    corner = -wide_dot(Q, split_dot(B, P, SPLIT, DT, ACC), SPLIT, DT, ACC)

    out = inverse.dtype.element_ty
    row, column = two * 32 + i[None, :, :], two * 32 + j[None, :, :]
    tl.store(inverse + base + row * (H * C) + column, X.to(out), mask=row < n)
    tl.store(inverse + below, corner.to(out), mask=32 + i < n)
    above = base + i * (H * C) + 32 + j
    tl.store(inverse + above, tl.zeros([32, 32], out), mask=i < n)


NONE, NEAR, FAR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@direct
@triton.jit
def _mix(
    A, x, out, second, y, out2, G, offsets, c, N, H, X, Y,
    DECAY: tl.constexpr, BACK: tl.constexpr, TWO: tl.constexpr,
    C: tl.constexpr, BX: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = A x and out2 = c A y, or c A (second y) if TWO; A and second transposed if BACK; x: [tokens, H, X], y: [tokens, H, Y].

    DECAY: by one decay a head, x decays from its chunk's start (NEAR, reads before their token's update) or to its end (FAR).
    """
    start, end = locate(tl.program_id(0), offsets, N, C)
    if start >= end:
        return
    h = tl.program_id(1)
    outer = load(A, start, end, h, H, C, 0, C, C)
    outer = tl.trans(outer) if BACK else outer
    if DECAY == NEAR:
        decay = near(G, start, end, h, H, True, C, ACC)
    elif DECAY == FAR:
        decay = far(G, start, end, h, H, C, ACC)
    for x0 in range(0, X, BX):
        rows = load(x, start, end, h, H, X, x0, C, BX)
        if DECAY != NONE:
            rows = rows * decay
        store(out, dot(outer, rows, DT, ACC), start, end, h, H, X, x0, C, BX)
    if TWO:
        inner = load(second, start, end, h, H, C, 0, C, C)
        inner = tl.trans(inner) if BACK else inner
    for y0 in range(0, Y, BX):
        rows = load(y, start, end, h, H, Y, y0, C, BX)
        if TWO:
            rows = dot(inner, rows, DT, ACC)
        store(out2, c * dot(outer, rows, DT, ACC), start, end, h, H, Y, y0, C, BX)


def _inverse(at: chunk.Layout, A: Tensor) -> Tensor:
    out = torch.empty_like(A)
    types = chunk.TYPES[at.work], chunk.TYPES[at.wide]
    # On tensor cores one warp a chunk, and 16 of them on a multiprocessor.
    options = {"num_warps": 1, "maxnreg": chunk.REGISTERS["inverse"]} if at.work == torch.bfloat16 else {"num_warps": 2}
    _invert[at.slots, at.H](A, out, at.offsets, at.N, at.H, chunk.C, *types, **options)
    return out


def _scored(kept: Tensor | None, at: chunk.Layout, read: Tensor, written: Tensor, G: Tensor, before: bool) -> Tensor:
    """Scores that were kept of `chunk.Pairs`, or with one decay a head made where they are needed."""
    return chunk.scores(at, read, written, G, before) if kept is None else kept


def _mixed(
    at: chunk.Layout, G: Tensor, A: Tensor, x: Tensor, decay: tl.constexpr, y: Tensor, second: Tensor | None = None, c: float = 1.0,
    back: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A x and c A y, or c A (second y); decay: of x, done here with one decay a head, already done with one per channel."""
    X, Y = x.shape[-1], y.shape[-1]
    out, out2 = at.empty(x, *x.shape), at.empty(y, *y.shape)
    BX, _, launch = at.tile("mix" if max(X, Y) > 64 else "mix of a block", max(X, Y), Y)
    decay = decay.value if at.gate == chunk.HEAD.value else NONE.value
    _mix[at.slots, at.H](
        A, x, out, A if second is None else second, y, out2, G, at.offsets, c, at.N, at.H, X, Y, decay, back, second is not None,
        BX=BX, **launch,
    )  # fmt: skip
    return out, out2


@operator("rank_one")
def _forward(
    q: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, g: Tensor, s0: Tensor, offsets: Tensor, scale: float, before: bool, shared: bool,
) -> list[Tensor]:  # fmt: skip
    """o, s_T, and what the gradient needs: gates, states at chunks' starts, T and u; then, with a decay per channel, scores of q
    with w and k and of r with k, decayed q, r, w and k."""
    q, r, w, k, v, g = (x.contiguous() for x in (q, r, w, k, v, g))
    at = chunk.layout(q, v, g, offsets)
    G, o = chunk.cumulate(at, g), torch.empty_like(v, dtype=q.dtype)
    qw, rw, q_near, r_near, w_far = chunk.pairs(at, q, r, w, G, before)
    T = _inverse(at, _scored(rw, at, r, w, G, True))
    reads = T, chunk.either(r_near, r), NEAR
    written, met = chunk.either(w_far, w), chunk.either(qw, w)
    if shared:
        S, last, u = chunk.walk(at, G, s0, (*_mixed(at, G, *reads, v), written), None)
        pairs, (qk, rk, k_far) = ((met, u), None), (None, None, None)
    else:
        qk, rk, _, _, k_far = chunk.pairs(at, q, r, k, G, before, near=False)
        rank = (*_mixed(at, G, *reads, v, _scored(rk, at, r, k, G, True), -1.0), written)
        S, last, u = chunk.walk(at, G, s0, rank, (chunk.either(k_far, k), v))
        pairs = (met, u), (chunk.either(qk, k), v)
    chunk.read(at, G, chunk.either(q_near, q), S, *pairs, o, (scale, scale, scale), (before, before))
    return [o, last, G, S, T, u, *chunk.kept(qw, q_near, r_near, w_far, qk, rk, k_far)]


@_forward.register_fake
def _(q, r, w, k, v, g, s0, offsets, scale, before, shared):
    at = chunk.layout(q, v, g, offsets)
    qw, _, q_near, r_near, w_far = chunk.like_pairs(at, q, two=True)
    qk, rk, _, _, k_far = chunk.Pairs() if shared else chunk.like_pairs(at, q, two=True, near=False)
    o, last = q.new_empty(v.shape), s0.new_empty(s0.shape)
    kept = at.gates_like(q), at.states_like(q), at.scores_like(q), at.empty(v, *v.shape)
    return [o, last, *kept, *chunk.kept(qw, q_near, r_near, w_far, qk, rk, k_far)]


@operator("rank_one_backward")
def _backward(
    q: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, g: Tensor, offsets: Tensor, kept: list[Tensor], do: Tensor, d_last: Tensor,
    scale: float, before: bool, shared: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, r, w, v, g, s0 and, if it is not w, of k."""
    q, r, w, k, v, g, do = (x.contiguous() for x in (q, r, w, k, v, g, do))
    G, S, T, u, *pairs = kept
    qw, q_near, r_near, w_far, qk, rk, k_far = *pairs, *(None,) * (7 - len(pairs))
    at = chunk.layout(q, v, g, offsets)
    mixed = _mixed(at, G, T, chunk.either(w_far, w), FAR, do, _scored(qw, at, q, w, G, before), scale, back=True)
    rank, added = (*mixed, chunk.either(r_near, r)), (chunk.either(q_near, q), do)
    D, d_start, du = chunk.walk(at, G, d_last, rank, added, scale, reverse=True, before=before)
    reads, writes = [(q, do), (r, du)], [(w, u)]
    if shared:
        (dq, dr), (dw,), dg = chunk.grads(at, G, reads, writes, S, D, g, scale, before)
        return [dq, dr, dw, du.to(v.dtype), dg, d_start]
    (dq, dr), (dk, dw), dg = chunk.grads(at, G, reads, [(k, v), *writes], S, D, g, scale, before)
    dv, met = torch.empty_like(v), ((chunk.either(qk, q), do), (chunk.either(rk, r), du))
    chunk.read(at, G, chunk.either(k_far, k), D, *met, dv, (1.0, scale, -1.0), (before, True), back=True)
    return [dq, dr, dw, dv, dg, d_start, dk]


@_backward.register_fake
def _(q, r, w, k, v, g, offsets, kept, do, d_last, scale, before, shared):
    given = (q, r, w, v, g, d_last) if shared else (q, r, w, v, g, d_last, k)
    return [x.new_empty(x.shape) for x in given]


def _keep(ctx, inputs, output):
    *given, _, offsets, ctx.scale, ctx.before, ctx.shared = inputs
    ctx.last = output[1].shape, output[1].dtype
    ctx.save_for_backward(*given, offsets, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _back(ctx, do, d_last, *_):
    q, r, w, k, v, g, offsets, *kept = ctx.saved_tensors
    do = torch.zeros_like(v, dtype=q.dtype) if do is None else do
    d_last = chunk.zeros(q, *ctx.last) if d_last is None else d_last
    dq, dr, dw, dv, dg, d_start, *dk = _backward(
        q, r, w, k, v, g, offsets, kept, do, d_last, ctx.scale, ctx.before, ctx.shared
    )
    return dq, dr, dw, dk[0] if dk else None, dv, dg, d_start, None, None, None, None


_forward.register_autograd(_back, _keep)


def rank_one(
    q: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, g: Tensor, s0: Tensor, offsets: Tensor, *, scale: float, before: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S_t = Diag(exp g_t) S_{t-1} - w_t (r_t^T S_{t-1}) + k_t v_t^T ;  o_t = scale S_t^T q_t, or scale S_{t-1}^T q_t when `before`.

    r reads the state *before* it decays: the gated delta rule is r = exp(g) k, w = k = beta k. Pass one tensor as both w
    and k where they are equal: it is faster.
    q, r, w, k: [B, T, H, K]; v: [B, T, H, V]; g: [B, T, H] or [B, T, H, K], natural log of the decay, <= 0
    s0: [N, H, K, V] float32; offsets: int64 [N + 1], where the N sequences begin and end in the flattened B T tokens
    Returns o [B, T, H, V] in q's type and s_T [N, H, K, V]. All floating inputs get gradients, through s_T too.
    """
    o, last, *_ = _forward(q, r, w, k, v, g, s0, offsets, float(scale), before, w is k)
    return o, last
