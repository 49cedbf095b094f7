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
from unify.kernels.chunk import dot, facing, load, locate, store


@triton.jit
def _invert(
    A, inverse, offsets, N, H, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """(1 + A)^-1 of strictly lower triangular scores, [tokens, H, C].

    Block substitution: with the blocks of m tokens on the diagonal inverted, those of 2 m follow by filling in the corner
    below, [[P, 0], [B, Q]]^-1 = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]]. All corners of a level at once: X <- X - X B X.
    """
    start, end = locate(tl.program_id(0), offsets, N, C)
    if start >= end:
        return
    h, i = tl.program_id(1), tl.arange(0, C)
    lower = load(A, start, end, h, H, C, 0, C, C).to(ACC)
    one = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(ACC)
    X = one
    for level in range(LEVELS):
        _, faces = facing(level, C)
        B = tl.where(faces, lower, 0.0)
        BX = tl.dot(B, X, input_precision=PRECISION, out_dtype=ACC)
        X -= tl.dot(X, BX, input_precision=PRECISION, out_dtype=ACC)
    if PRECISION == "tf32":  # one Newton step from an inverse good to three digits: X <- X + X (1 - (1 + A) X)
        rest = one - X - tl.dot(lower, X, input_precision="tf32x3", out_dtype=ACC)
        X += tl.dot(X, rest, input_precision="tf32", out_dtype=ACC)
    store(inverse, X, start, end, h, H, C, 0, C, C)


@triton.jit
def _mix(
    A, second, x, out, offsets, c, N, H, X,
    BACK: tl.constexpr, TWO: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = c A x, or c A (second x) if TWO; A and second transposed if BACK; x: [tokens, H, X]."""
    blocks = tl.cdiv(X, BX)
    slot, x0, h = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BX, tl.program_id(1)
    start, end = locate(slot, offsets, N, C)
    if start >= end:
        return
    rows = load(x, start, end, h, H, X, x0, C, BX)
    if TWO:
        inner = load(second, start, end, h, H, C, 0, C, C)
        rows = dot(tl.trans(inner) if BACK else inner, rows, DT, ACC)
    outer = load(A, start, end, h, H, C, 0, C, C)
    store(out, c * dot(tl.trans(outer) if BACK else outer, rows, DT, ACC), start, end, h, H, X, x0, C, BX)


def _inverse(at: chunk.Layout, A: Tensor) -> Tensor:
    out = torch.empty_like(A)
    *_, launch = at.tile("invert", chunk.C, chunk.C)
    precision = "tf32" if at.half else "ieee"
    _invert[at.slots, at.H](
        A, out, at.offsets, at.N, at.H, chunk.C, chunk.LEVELS, precision, chunk.TYPES[at.wide], **launch
    )
    return out


def _mixed(
    at: chunk.Layout, x: Tensor, A: Tensor, second: Tensor | None = None, c: float = 1.0, back: bool = False
) -> Tensor:
    X = x.shape[-1]
    out = at.empty(x, *x.shape)
    BX, _, launch = at.tile("mix", X, X)
    _mix[at.slots * chunk.blocks(X, BX), at.H](
        A, A if second is None else second, x, out, at.offsets, c, at.N, at.H, X, back, second is not None,
        BX=BX, **launch, **at.options,
    )  # fmt: skip
    return out


@torch.library.custom_op("unify::rank_one", mutates_args=())
def _forward(
    q: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, g: Tensor, s0: Tensor, offsets: Tensor, scale: float, before: bool, shared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, s_T, and what the gradient needs: gates, scores of q and w, states at chunks' starts, T, u, decayed q, r and w;
    then k decayed and its scores with q and r, empty if w and k are shared."""
    q, r, w, k, v, g, s0 = (x.contiguous() for x in (q, r, w, k, v, g, s0))
    at = chunk.layout(q, v, g, offsets)
    G, o = chunk.cumulate(at, g), torch.empty_like(v, dtype=q.dtype)
    qw, q_near, w_far = chunk.scores(at, q, w, G, before, near=True, far=True)
    rw, r_near = chunk.scores(at, r, w, G, True, near=True)
    T = _inverse(at, rw)
    x = _mixed(at, r_near, T)
    if shared:
        S, last, u = chunk.walk(at, G, s0, (x, _mixed(at, v, T), w_far), None)
        chunk.read(at, q_near, S, (qw, u), None, o, (scale, scale, 0.0))
        none = (at.empty(q, 0) for _ in range(3))
        return o, last, G, qw, S, T, u, q_near, r_near, w_far, *none
    qk, k_far = chunk.scores(at, q, k, G, before, far=True)
    (rk,) = chunk.scores(at, r, k, G, True)
    S, last, u = chunk.walk(at, G, s0, (x, _mixed(at, v, T, rk, -1.0), w_far), (k_far, v))
    chunk.read(at, q_near, S, (qw, u), (qk, v), o, (scale, scale, scale))
    return o, last, G, qw, S, T, u, q_near, r_near, w_far, k_far, qk, rk


@_forward.register_fake
def _(q, r, w, k, v, g, s0, offsets, scale, before, shared):
    at = chunk.layout(q, v, g, offsets)
    G, A, S = chunk.kept(at, q)
    kept = [A, *(at.empty(x, *x.shape) for x in (v, q, q, q))]
    kept += [at.empty(q, 0)] * 3 if shared else [kept[-1], A, A]
    return torch.empty_like(v, dtype=q.dtype), torch.empty_like(s0), G, A, S, *(torch.empty_like(x) for x in kept)


@torch.library.custom_op("unify::rank_one_backward", mutates_args=())
def _backward(
    q: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, g: Tensor, offsets: Tensor, kept: list[Tensor], do: Tensor, d_last: Tensor,
    scale: float, before: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, r, w, v, g, s0 and, if it is not w, of k."""
    q, r, w, k, v, g, do, d_last = (x.contiguous() for x in (q, r, w, k, v, g, do, d_last))
    G, qw, S, T, u, q_near, r_near, w_far, k_far, qk, rk = kept
    at = chunk.layout(q, v, g, offsets)
    rank = _mixed(at, w_far, T, back=True), _mixed(at, do, T, qw, scale, back=True), r_near
    D, d_start, du = chunk.walk(at, G, d_last, rank, (q_near, do), scale, reverse=True)
    reads, writes = [(q, do), (r, du)], [(w, u)]
    if not qk.numel():
        (dq, dr), (dw,), dg = chunk.grads(at, G, reads, writes, S, D, g, scale, before)
        return [dq, dr, dw, du.to(v.dtype), dg, d_start]
    (dq, dr), (dk, dw), dg = chunk.grads(at, G, reads, [(k, v), *writes], S, D, g, scale, before)
    dv = chunk.read(at, k_far, D, (qk, do), (rk, du), torch.empty_like(v), (1.0, scale, -1.0), back=True)
    return [dq, dr, dw, dv, dg, d_start, dk]


@_backward.register_fake
def _(q, r, w, k, v, g, offsets, kept, do, d_last, scale, before):
    given = (q, r, w, v, g, d_last) if not kept[-1].numel() else (q, r, w, v, g, d_last, k)
    return [torch.empty_like(x) for x in given]


def _keep(ctx, inputs, output):
    *given, _, offsets, ctx.scale, ctx.before, _ = inputs
    ctx.save_for_backward(*given, offsets, *output[1:])
    ctx.set_materialize_grads(False)


def _back(ctx, do, d_last, *_):
    q, r, w, k, v, g, offsets, last, *kept = ctx.saved_tensors
    do = torch.zeros_like(v, dtype=q.dtype) if do is None else do
    d_last = torch.zeros_like(last) if d_last is None else d_last
    dq, dr, dw, dv, dg, d_start, *dk = _backward(q, r, w, k, v, g, offsets, kept, do, d_last, ctx.scale, ctx.before)
    return dq, dr, dw, dk[0] if dk else None, dv, dg, d_start, None, None, None, None


_forward.register_autograd(_back, setup_context=_keep)


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
