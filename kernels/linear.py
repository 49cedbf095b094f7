"""The linear family by matrix products: S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T, read as o_t = scale S_t^T q_t.

Forward: cumulative gates, scores inside chunks, states from chunk to chunk, then all chunks in parallel. Backward: the
same schedule turned around, on what the forward kept. See `chunk` for the kernels and for what makes them exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unify.kernels import chunk
from unify.kernels.operator import operator


@operator("linear")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s0: Tensor, offsets: Tensor, scale: float, before: bool
) -> list[Tensor]:
    """o, s_T, and what the gradient needs: gates, states at chunks' starts; with a decay per channel also scores, q and k decayed to
    chunks' borders."""
    q, k, v, g = (x.contiguous() for x in (q, k, v, g))
    at = chunk.layout(q, v, g, offsets)
    G = chunk.cumulate(at, g)
    A, _, near, _, far = chunk.pairs(at, q, None, k, G, before)
    S, last, _ = chunk.walk(at, G, s0, None, (chunk.either(far, k), v))
    o, met = torch.empty_like(v, dtype=q.dtype), (chunk.either(A, k), v)
    chunk.read(at, G, chunk.either(near, q), S, met, None, o, (scale, scale, 0.0), (before, before))
    return [o, last, G, S, *chunk.kept(A, near, far)]


@_forward.register_fake
def _(q, k, v, g, s0, offsets, scale, before):
    at = chunk.layout(q, v, g, offsets)
    A, _, near, _, far = chunk.like_pairs(at, q)
    o, last = q.new_empty(v.shape), s0.new_empty(s0.shape)
    return [o, last, at.gates_like(q), at.states_like(q), *chunk.kept(A, near, far)]


@operator("linear_backward")
def _backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, offsets: Tensor, kept: list[Tensor], do: Tensor, d_last: Tensor, scale: float, before: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, g and s0."""
    q, k, v, g, do = (x.contiguous() for x in (q, k, v, g, do))
    G, S, *pairs = kept
    A, near, far = pairs or (None, None, None)
    at = chunk.layout(q, v, g, offsets)
    D, d_start, _ = chunk.walk(at, G, d_last, None, (chunk.either(near, q), do), scale, reverse=True, before=before)
    dv, met = torch.empty_like(v), (chunk.either(A, q), do)
    chunk.read(at, G, chunk.either(far, k), D, met, None, dv, (1.0, scale, 0.0), (before, before), back=True)
    (dq,), (dk,), dg = chunk.grads(at, G, [(q, do)], [(k, v)], S, D, g, scale, before)
    return [dq, dk, dv, dg, d_start]


@_backward.register_fake
def _(q, k, v, g, offsets, kept, do, d_last, scale, before):
    return [x.new_empty(x.shape) for x in (q, k, v, g, d_last)]


def _keep(ctx, inputs, output):
    *given, _, offsets, ctx.scale, ctx.before = inputs
    ctx.last = output[1].shape, output[1].dtype
    ctx.save_for_backward(*given, offsets, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _back(ctx, do, d_last, *_):
    q, k, v, g, offsets, *kept = ctx.saved_tensors
    do = torch.zeros_like(v, dtype=q.dtype) if do is None else do
    d_last = chunk.zeros(q, *ctx.last) if d_last is None else d_last
    return *_backward(q, k, v, g, offsets, kept, do, d_last, ctx.scale, ctx.before), None, None, None


_forward.register_autograd(_back, _keep)


def linear(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s0: Tensor, offsets: Tensor, *, scale: float, before: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T ;  o_t = scale S_t^T q_t, or scale S_{t-1}^T q_t when `before` (not decayed).

    q, k: [B, T, H, K]; v: [B, T, H, V]; g: [B, T, H] or [B, T, H, K], natural log of the decay, <= 0
    s0: [N, H, K, V] float32; offsets: int64 [N + 1], where the N sequences begin and end in the flattened B T tokens
    Returns o [B, T, H, V] in q's type and s_T [N, H, K, V]. All floating inputs get gradients, through s_T too.
    Cost: T H (C (K + V) + 2 K V) multiply-adds in matrix products, C = 64 tokens a chunk. For the gradient, states are
    kept: H K V numbers in every chunk.
    """
    o, last, *_ = _forward(q, k, v, g, s0, offsets, float(scale), before)
    return o, last
