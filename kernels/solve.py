"""The solve family by conjugate gradients: x_t = (P_t + Lambda)^-1 q_t with P_t = exp(g_t) P_{t-1} + b_t k_t k_t^T.

P is a linear memory that is written with (k, b k), so `chunk` carries it to the chunks' starts. Inside a chunk P_t is
never formed: its product with a direction p is a read of that memory, and one program solves for many tokens at once,

    P_t p = exp(G_t) P p + sum over s <= t of exp(G_t - G_s) b_s k_s (k_s . p),

three matrix products a step. Steps are preconditioned by the diagonal of P_t + Lambda, a decayed sum of k^2: keys whose
channels differ in size cost no more than even ones (condition number 1234: 8 steps to 1e-3 instead of 104).

Products in half precision would lose too much of P, because a solution magnifies its rounding by the condition number:
P and its adjoint are kept in float32, and enter such products in two parts.

The gradient is implicit: y_t solves the same systems for dx_t, dq = y, and P_t's gradient -y_t x_t^T is what a linear
memory read with y and cotangent -x would leave, so `chunk` turns it into gradients of both factors, gates and start.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unify.kernels import chunk
from unify.kernels.chunk import dot, load, locate, matrix_at, split_dot, store, weight
from unify.kernels.direct import direct
from unify.kernels.operator import operator
from unify.kernels.tile import inner

STEPS = 256  # the worst system tried (condition number 1.6e5) took 105 steps in bfloat16, 188 in float32
# Residual at which a solve ends, relative to q, both measured by the preconditioner. Steps that takes, emulated in torch
# with the directions rounded, K = 128, priors of 0.5 to 1e-3: random keys and memories of 20 to 1000 tokens, bfloat16 4 to 9
# and float32 9 to 19; one channel 30 times the other, or all keys near one direction (silu), 4 to 13 and 9 to 24. The error
# of x was at most 6e-4 and 5e-7.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 1e-3}
WIDEST = 512  # bytes of a row of P, of which a program holds all


def fits(q: Tensor) -> bool:
    """Whether a program can hold P for keys like q [..., K]: up to K = 128, in float64 64."""
    return chunk.power(q.shape[-1]) * max(q.element_size(), 4) <= WIDEST


@direct
@triton.jit
def _solve(
    q, k, gain, prior, P, G, out, offsets, steps, N, H, K,
    BEFORE: tl.constexpr, TOKEN: tl.constexpr, SPLIT: tl.constexpr, TOLERANCE: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = (P_t + Lambda)^-1 q for R tokens of a chunk, or with P_{t-1} if BEFORE; P at the chunk's start.

    prior: Lambda's diagonal [H, K], or if TOKEN a number a token [tokens, H]. SPLIT: see `split_dot`.
    """
    blocks: tl.constexpr = C // R
    slot, row, h = tl.program_id(0) // blocks, tl.program_id(0) % blocks * R + tl.arange(0, R), tl.program_id(1)
    start, end = locate(slot, offsets, N, C)
    first = start + tl.program_id(0) % blocks * R
    if first >= end:
        return
    i, j = tl.arange(0, C), tl.arange(0, BK)
    keys = load(k, start, end, h, H, K, 0, C, BK).to(DT)
    at, inside = matrix_at(P, slot * H + h, K, K, 0, 0, BK, BK)
    past = tl.load(at, mask=inside, other=0.0)

    after = load(G, start, end, h, H, 1, 0, C, 1)
    shift: tl.constexpr = 1 if BEFORE else 0
    held = (row >= shift) & (row < end - start)
    seen = tl.load(G + (start + row - shift) * H + h, mask=held, other=0.0)[:, None]
    keep = weight(seen, ACC)
    pairs = tl.where(row[:, None] >= i[None, :] + shift, weight(seen - tl.trans(after), ACC), 0.0)
    pairs *= tl.trans(load(gain, start, end, h, H, 1, 0, C, 1).to(ACC))
    if TOKEN:
        level = tl.load(prior + (start + row) * H + h, mask=row < end - start, other=1.0).to(ACC)[:, None]
    else:
        level = tl.load(prior + h * K + j, mask=j < K, other=1.0).to(ACC)[None, :]
    corner = tl.load(P + (slot * H + h).to(tl.int64) * K * K + j * (K + 1), mask=j < K, other=0.0).to(ACC)[None, :]
    scaling = (1.0 / (level + keep * corner + dot(pairs, keys * keys, DT, ACC))).to(DT)

    r = load(q, first, end, h, H, K, 0, R, BK).to(ACC)
    size = tl.max(tl.abs(r), 1)[:, None]  # its square could underflow
    size = tl.where(size > 0, size, 1.0)
    r /= size
    x = 0.0 * r  # NaN where q is
    p = (scaling * r).to(DT)  # rounded before it is used: the residual then belongs to x, however coarse the products
    rho = inner(scaling * r, r, 1)
    goal = TOLERANCE * TOLERANCE * rho
    open = (rho > goal) | (rho != rho)
    count = 0
    while (count < steps) & (tl.max(open.to(tl.int32), 0) > 0):
        Ap = keep * split_dot(p, tl.trans(past), SPLIT, DT, ACC)
        Ap += dot(pairs * dot(p, tl.trans(keys), DT, ACC), keys, DT, ACC) + level * p
        length = (tl.where(open, rho, 0.0) / tl.where(open, inner(p, Ap, 1), 1.0))[:, None]
        x += length * p
        r -= length * Ap
        new = inner(scaling * r, r, 1)
        turn = (tl.where(open, new, 0.0) / tl.where(open, rho, 1.0))[:, None]
        p = (scaling * r + turn * p).to(DT)
        rho = new
        open = (rho > goal) | (rho != rho)
        count += 1
    store(out, size * x, first, end, h, H, K, 0, R, BK)


@direct
@triton.jit
def _finish(
    k, gain, x, y, d_written, dk, d_gain, d_prior, offsets, N, H, K,
    TOKEN: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients through gain k, that of k added to dk, and -x y, the prior's: of a token if TOKEN, else of the slot [slots, H, K]."""
    slot, h = tl.program_id(0), tl.program_id(1)
    start, end = locate(slot, offsets, N, C)
    if start >= end:
        return
    share = load(gain, start, end, h, H, 1, 0, C, 1).to(ACC)
    d_share, d_level = tl.zeros([C], ACC), tl.zeros([C], ACC)
    for k0 in range(0, K, BK):
        d = load(d_written, start, end, h, H, K, k0, C, BK).to(ACC)
        store(dk, load(dk, start, end, h, H, K, k0, C, BK) + share * d, start, end, h, H, K, k0, C, BK)
        d_share += tl.sum(d * load(k, start, end, h, H, K, k0, C, BK), 1)
        flow = -load(x, start, end, h, H, K, k0, C, BK).to(ACC) * load(y, start, end, h, H, K, k0, C, BK)
        if TOKEN:
            d_level += tl.sum(flow, 1)
        else:
            j = k0 + tl.arange(0, BK)
            tl.store(d_prior + (slot.to(tl.int64) * H + h) * K + j, tl.sum(flow, 0), mask=j < K)
    store(d_gain, d_share[:, None], start, end, h, H, 1, 0, C, 1)
    if TOKEN:
        store(d_prior, d_level[:, None], start, end, h, H, 1, 0, C, 1)


def _token(prior: Tensor) -> bool:
    """Whether a prior is one number a token."""
    return prior.ndim == 4


def _block(at: chunk.Layout) -> dict:
    """Launch options of what goes over a chunk's tokens channel by channel."""
    return {"C": chunk.C, "BK": max(16, min(chunk.power(at.K), 64)), "ACC": chunk.TYPES[at.wide]}


def _solved(
    at: chunk.Layout, b: Tensor, system: tuple[Tensor, ...], P: Tensor, G: Tensor, before: bool, steps: int
) -> Tensor:
    """(P_t + Lambda)^-1 b_t at every token; system: k, gain and prior."""
    out = torch.empty_like(b)
    BK, R, launch = at.tile("solve" if at.half else "solve exact", at.K, chunk.C)
    _solve[at.slots * chunk.blocks(chunk.C, R), at.H](
        b, *system, P, G, out, at.offsets, steps, at.N, at.H, at.K,
        before, _token(system[-1]), at.work != at.wide, TOLERANCE[at.work], R=R, BK=BK, **launch,
    )  # fmt: skip
    return out


@operator("solve")
def _forward(
    q: Tensor, k: Tensor, gain: Tensor, g: Tensor, prior: Tensor, p0: Tensor, offsets: Tensor, before: bool, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, P_T, and what the gradient needs besides: gates and P at chunks' starts."""
    q, k, gain, g, prior = (y.contiguous() for y in (q, k, gain, g, prior))
    at = chunk.layout(q, k, g, offsets)
    G = chunk.cumulate(at, g)
    P, last, _ = chunk.walk(at, G, p0, None, (k, k), gain=gain, keep=at.wide)
    return _solved(at, q, (k, gain, prior), P, G, before, steps), last, G, P


@_forward.register_fake
def _(q, k, gain, g, prior, p0, offsets, before, steps):
    at = chunk.layout(q, k, g, offsets)
    P = at.empty(q, at.slots, at.H, at.K, at.K, dtype=at.wide)
    return q.new_empty(q.shape), p0.new_empty(p0.shape), at.gates_like(q), P


@operator("solve_backward")
def _backward(
    k: Tensor, gain: Tensor, g: Tensor, prior: Tensor, offsets: Tensor, x: Tensor, G: Tensor, P: Tensor, dx: Tensor, d_last: Tensor,
    before: bool, steps: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, gain, g, prior and p0."""
    k, gain, g, prior, dx = (y.contiguous() for y in (k, gain, g, prior, dx))
    at = chunk.layout(x, k, g, offsets)
    y = _solved(at, dx, (k, gain, prior), P, G, before, steps)
    D, d_start, _ = chunk.walk(at, G, d_last, None, (y, x), -1.0, reverse=True, before=before, keep=at.wide)
    written = torch.mul(gain[..., None], k, out=torch.empty_like(k))
    d_written = torch.empty_like(k)
    chunk.read(at, G, k, D, (y, x), None, d_written, (1.0, -1.0, 0.0), (before, before), back=True)
    _, (dk,), dg = chunk.grads(at, G, [(y, x)], [(k, written)], P, D, g, -1.0, before)
    d_gain, token = torch.empty_like(gain), _token(prior)
    d_prior = torch.empty_like(prior) if token else prior.new_zeros(at.slots, at.H, at.K, dtype=at.wide)
    _finish[at.slots, at.H](
        k, gain, x, y, d_written, dk, d_gain, d_prior, offsets, at.N, at.H, at.K, TOKEN=token, **_block(at)
    )
    return [y, dk, d_gain, dg, d_prior if token else d_prior.sum(0).to(prior.dtype), d_start]


@_backward.register_fake
def _(k, gain, g, prior, offsets, x, G, P, dx, d_last, before, steps):
    return [y.new_empty(y.shape) for y in (x, k, gain, g, prior, d_last)]


def _keep(ctx, inputs, output):
    _, *given, _, offsets, ctx.before, ctx.steps = inputs
    x, last, G, P = output
    ctx.last = last.shape, last.dtype
    ctx.save_for_backward(*given, offsets, x, G, P)
    ctx.mark_non_differentiable(G, P)
    ctx.set_materialize_grads(False)


def _back(ctx, dx, d_last, *_):
    saved = ctx.saved_tensors
    dx = torch.zeros_like(saved[-3]) if dx is None else dx
    d_last = chunk.zeros(dx, *ctx.last) if d_last is None else d_last
    return *_backward(*saved, dx, d_last, ctx.before, ctx.steps), None, None, None


_forward.register_autograd(_back, _keep)


def solve(
    q: Tensor, k: Tensor, gain: Tensor, g: Tensor, prior: Tensor, p0: Tensor, offsets: Tensor, *, before: bool = False, steps: int = STEPS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """P_t = exp(g_t) P_{t-1} + gain_t k_t k_t^T ;  (P_t + Lambda) x_t = q_t, or with P_{t-1} when `before` (not decayed).

    q, k: [B, T, H, K]; gain, g: [B, T, H], gain >= 0, g the natural log of the decay, <= 0. One decay a head: with one a
    channel P_t would not stay symmetric, so no plan has it.
    prior: Lambda's diagonal, > 0: [H, K], or [B, T, H, 1] for a multiple of the identity at every token
    p0: [N, H, K, K] float32, symmetric and not negative; offsets: int64 [N + 1] into the flattened B T tokens
    steps: at most so many of conjugate gradients; a tile of tokens ends when all of them are solved to `TOLERANCE`
    Returns x [B, T, H, K] in q's type and P_T [N, H, K, K]. All floating inputs get gradients, through P_T too; p0's is that
    of a matrix whose entries are free.
    Cost: for every step T H (2 C K + K^2) multiply-adds in matrix products, C = 64 tokens a chunk.
    """
    x, last, *_ = _forward(q, k, gain, g, prior, p0, offsets, before, steps)
    return x, last
