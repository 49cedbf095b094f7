"""Chunk-parallel schedules on plain torch: pure functions of a recurrence's coefficients at every token.

Tokens are cut into chunks. Inside a chunk every pair (read at t, write at s <= t) is weighed by the decay between them;
what happened before the chunk arrives through the state at its start. g is a natural-log decay, g <= 0, and every
weight is exp of a *sum* of such logs over consecutive tokens, never a difference of sums and never a quotient of
decays: a gate of -800 next to one of -1e-6 costs no accuracy, and nothing can overflow. Inputs are [B, T, H, ...];
inside, a tensor is [N, B H, C, ...] with N chunks of C tokens (zeros fill the last one up: a token with g = 0 and key 0
changes nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["boundary_states", "decayed_sum", "elementwise", "later", "linear", "rank_one", "solve"]

Keys, Values, Gate = Float[Tensor, "B T H K"], Float[Tensor, "B T H V"], Float[Tensor, "B T H"]
Decay = Gate | Keys
Memory, Square = Float[Tensor, "B H K V"], Float[Tensor, "B H K K"]

# ---- layout ----------------------------------------------------------------------------------------------------------


def _fit(chunk: int, T: int) -> int:
    """The chunk length used: a power of two (the scores halve it again and again), no longer than T needs."""
    return 1 << (min(chunk, T) - 1).bit_length()


def _split(x: Tensor, C: int, fill: float = 0.0) -> Tensor:
    """[B, T, H, X] -> [N, B H, C, X], filled up with zeros after the last token."""
    short = -x.shape[1] % C
    x = F.pad(x, (0, 0, 0, 0, 0, short), value=fill) if short else x
    return x.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


def _merge(x: Tensor, B: int, T: int) -> Tensor:
    """[N, B H, C, X] -> [B, T, H, X]."""
    return x.unflatten(1, (B, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]


def _wide(g: Tensor) -> Tensor:
    """One decay a head, [B, T, H], as one channel; per key channel as it is."""
    return g[..., None] if g.ndim == 3 else g


def _next(x: Tensor) -> Tensor:
    """The tensor one token ahead, zeros at the end: what is read before token t + 1 is what stands after token t."""
    return torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1)


def _after(first: Tensor, x: Tensor) -> Tensor:
    """Undo `_next` on a result: `first` [B, H, V] for token 0, then the rest one token later."""
    return torch.cat((first[:, None], x[:, :-1]), 1)


# Bytes of one tensor worked on at a time, and of one state walked token by token: large enough for a vector operation
# to be worth its call, small enough that temporaries stay in cache and their memory is used again. Measured (two Zen 3
# cores, T = 4096, H = 4, K = V = 64): a whole sequence at once spends a quarter of its time on fresh pages of memory.
# What lost elsewhere: pairwise differences [C, C, K] for a decay per channel (25 times slower than halving); forming
# M_t of a few tokens by one product (tall, thin matrix products run slower than two passes of in-place updates); an
# explicit inverse for the triangular solve; blocked elimination for the solve at the read, and Cholesky too (a fifth
# faster than LU on one core, but torch runs its batches on one core only).
_SLAB, _STATES = 1 << 20, 1 << 21


def _sweep(body: Callable, C: int, state, *xs: Tensor, slab: int | None = None):
    """`body(state, *some chunks of xs) -> (results, state)` along the sequence; results joined, and the last state."""
    chunk = max(x[:, :C].nbytes for x in xs)
    step, out = C * max(1, (slab or _SLAB) // chunk), []
    for part in zip(*(x.split(step, 1) for x in xs), strict=True):
        results, state = body(state, *part)
        out.append(results)
    return tuple(torch.cat(x, 1) for x in zip(*out, strict=True)), state


def _few(x: Tensor, target: int, dim: int = 0) -> list[slice]:
    """Slices of x along a dimension, of about `target` bytes each."""
    n = max(1, target * x.shape[dim] // max(1, x.nbytes))
    return [slice(i, min(i + n, x.shape[dim])) for i in range(0, x.shape[dim], n)]


# ---- decayed sums ----------------------------------------------------------------------------------------------------


def _scan(g: Tensor, x: Tensor, x0: Tensor | None) -> Tensor:
    """y_t = exp(g_t) y_{t-1} + x_t from y_0 = x0 (None: 0): y_1 .. y_T, [B, T, ...]. Inside all blocks at once, then across them.

    About 2 sqrt(T) vector operations; a short sequence is one block.
    """
    T = x.shape[1]
    c = T if T <= 32 else int(T**0.5) + 1
    n = -(-T // c)
    y, g = (F.pad(z, (0, 0) * (z.ndim - 2) + (0, n * c - T)).unflatten(1, (n, c)) for z in (x, g))  # copies
    a = g.exp()
    if x0 is not None:
        y[:, 0, 0].addcmul_(a[:, 0, 0], x0)
    for i in range(1, c):
        y[:, :, i].addcmul_(a[:, :, i], y[:, :, i - 1])
    if n > 1:
        a = g.cumsum(2).exp_()
        for j in range(1, n):
            y[:, j, -1].addcmul_(a[:, j, -1], y[:, j - 1, -1])
        y[:, 1:, :-1].addcmul_(a[:, 1:, :-1], y[:, :-1, -1:])
    return y.flatten(1, 2)[:, :T]


class _DecayedSum(torch.autograd.Function):
    """`_scan` with its adjoint D_t = dy_t + exp(g_{t+1}) D_{t+1}: the same sum, backwards in time."""

    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        y = _scan(g, x, x0)
        ctx.save_for_backward(g, x0, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        g, x0, y = ctx.saved_tensors
        later, before = torch.zeros_like(g), torch.empty_like(y)
        later[:, 1:] = g[:, 1:].flip(1)
        before[:, 0], before[:, 1:] = x0, y[:, :-1]
        D = _scan(later, dy.flip(1), None).flip(1)
        kept = g.exp()
        return (D * before * kept).sum_to_size(g.shape), D, (kept[:, 0] * D[:, 0]).sum_to_size(x0.shape)


def decayed_sum(
    g: Float[Tensor, "B T H ..."], x: Float[Tensor, "B T H *D"], x0: Float[Tensor, "B H *D"]
) -> tuple[Float[Tensor, "B T H *D"], Float[Tensor, "B H *D"]]:
    """y_t = exp(g_t) y_{t-1} + x_t, elementwise.

    g: [B, T, H, ...] broadcastable to x (trailing ones stand for shared channels), natural log of the decay, <= 0
    x: [B, T, H, *D]; x0: [B, H, *D]
    Returns y [B, T, H, *D] and y_T [B, H, *D]. Cost: T H D multiply-adds, about 2 sqrt(T) steps deep.
    """
    y = _DecayedSum.apply(g.expand(*x.shape[:3], *g.shape[3:]), x, x0)
    return y, y[:, -1]


def _boundaries(k_out: Tensor, v: Tensor, total: Tensor, s0: Tensor) -> tuple[Tensor, Tensor]:
    """States at the chunks' starts [N, R, K, V] and after the last; k_out [N, R, C, K] decayed to the chunk's end."""
    states = _DecayedSum.apply(total[None, ..., None], (k_out.mT @ v)[None], s0[None])[0]
    return torch.cat((s0[None], states[:-1]), 0), states[-1]


def to_end(g: Tensor) -> Tensor:
    """exp of what a token loses until its chunk's end: the sum over later tokens; g [..., C, X]."""
    later = torch.cat((g[..., 1:, :], torch.zeros_like(g[..., :1, :])), g.ndim - 2)
    return later.flip(-2).cumsum(-2).flip(-2).exp()


def later(g: Float[Tensor, "B T X"], chunk: int = 64) -> tuple[Float[Tensor, "B T X"], Float[Tensor, "B X"]]:
    """g summed over the tokens after each, and over all: by products with ones in chunks, and so on over the chunks' sums.

    A cumsum along T would leave a GPU with B X sums to do, each of them one token after another.
    """
    (B, T, X), C = g.shape, min(chunk, g.shape[1])
    g = (F.pad(g, (0, 0, 0, -T % C)) if T % C else g).view(B, -1, C, X)
    sums, ones = g.sum(2), torch.ones(C, C, dtype=g.dtype, device=g.device).triu_(1)
    after = torch.bmm(ones.expand(sums[..., 0].numel(), -1, -1), g.flatten(0, 1)).view_as(g)
    if T == C:
        return after[:, 0], sums[:, 0]
    beyond, total = later(sums, chunk)
    return (after + beyond[:, :, None]).flatten(1, 2)[:, :T], total


def boundary_states(g: Decay, k: Keys, v: Values, s0: Memory, chunk: int) -> tuple[Float[Tensor, "B N H K V"], Memory]:
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T at the start of every chunk, by matrix products.

    g: [B, T, H] or [B, T, H, K], log decay <= 0; k: [B, T, H, K]; v: [B, T, H, V]; s0: [B, H, K, V]
    Returns S [B, N, H, K, V], N = ceil(T / chunk), the states before tokens 0, chunk, 2 chunk, ..., and S_T [B, H, K, V]
    Cost: 2 T H K V operations and N H K V for the sum over chunks.
    """
    B, T, H = k.shape[:3]
    k, v, g = (_split(x, chunk) for x in (k, v, _wide(g)))
    starts, last = _boundaries(k * to_end(g), v, g.sum(-2), s0.flatten(0, 1))
    return starts.unflatten(1, (B, H)).movedim(0, 1), last.unflatten(0, (B, H))


# ---- decayed scores inside a chunk -----------------------------------------------------------------------------------


def _halves(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Views of the first and the second of every two blocks of m tokens: [..., C, X] -> twice [..., C / 2m, m, X]."""
    x = x.unflatten(-2, (-1, 2, m))
    return x[..., 0, :, :], x[..., 1, :, :]


def _corners(A: Tensor, m: int) -> Tensor:
    """The blocks below the diagonal that pair the second m tokens (rows) with the first m (columns) of every 2 m.

    A: [n, P, C, Q, C] -> a view [n, C / 2m, P, m, Q, m].
    """
    A = A.unflatten(4, (-1, 2, m))[..., 0, :].unflatten(2, (-1, 2, m))[:, :, :, 1]
    return A.diagonal(dim1=2, dim2=5).movedim(-1, 1)


def _levels(g: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """m = 1, 2, 4, ..., C / 2: the decays that carry a write from a block of m tokens into the next one.

    A write at s in the first block and a read at t in the second meet at the border: exp(sum_{s<i<=border} g_i) on the
    write, exp(sum_{border<i<=t} g_i) on the read; both exponents are sums, both are <= 0. Yields m, the read's factor
    (second blocks) and the write's (first blocks); at last C, exp(sum_{i<=t}) and exp(sum_{i>s}) for the whole chunk.
    A factor grows by exp of the *summed* logs of a whole block at every level: log2(C) roundings, not C of them.
    """
    C, m, total = g.shape[-2], 1, g
    read, write = g.exp(), torch.ones_like(g)
    block = read  # exp of each block's sum of logs
    while m < C:
        after, before = _halves(read, m)[1], _halves(write, m)[0]
        yield m, after, before
        first, second = _halves(block, 1)
        before *= second
        after *= first
        total = torch.add(*_halves(total, 1)).squeeze(-2)
        block = total.exp()
        m *= 2
    yield C, read, write


def _meet(rows: Tensor, cols: Tensor, read: Tensor, write: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Rows of the second blocks and columns of the first, both decayed to the border: [n, C / 2m, P m, K]."""
    x = _halves(rows, m)[1].transpose(1, 2) * read[:, :, None]
    y = _halves(cols, m)[0].transpose(1, 2) * write[:, :, None]
    return x.flatten(2, 3), y.flatten(2, 3)


class _ChannelScores(torch.autograd.Function):
    """`_scores` for a decay per key channel, and its adjoint, as many chunks at a time as stay in cache."""

    @staticmethod
    def forward(ctx, rows: Tensor, cols: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        R, P, C, K = rows.shape
        Q = cols.shape[1]
        A, inside, outside = rows.new_zeros(R, P, C, Q, C), torch.empty_like(rows), torch.empty_like(cols)
        for s in _few(g, _SLAB):
            q, k = rows[s], cols[s]
            A[s].diagonal(dim1=2, dim2=4).copy_((q[:, :, None] * k[:, None]).sum(-1))
            for m, read, write in _levels(g[s]):
                if m == C:
                    torch.mul(q, read[:, None], out=inside[s])
                    torch.mul(k, write[:, None], out=outside[s])
                else:
                    x, y = _meet(q, k, read, write, m)
                    _corners(A[s], m).copy_((x @ y.mT).unflatten(2, (P, m)).unflatten(4, (Q, m)))
        ctx.save_for_backward(rows, cols, g)
        return A, inside, outside

    @staticmethod
    @once_differentiable
    def backward(ctx, dA: Tensor, d_inside: Tensor, d_outside: Tensor):
        rows, cols, g = ctx.saved_tensors
        P, C, Q = rows.shape[1], rows.shape[2], cols.shape[1]
        d_rows, d_cols, dg = torch.empty_like(rows), torch.empty_like(cols), torch.empty_like(g)
        for s in _few(g, _SLAB):
            q, k, dq, dk = rows[s], cols[s], d_rows[s], d_cols[s]
            same = dA[s].diagonal(dim1=2, dim2=4)[..., None]
            torch.sum(same * k[:, None], 2, out=dq)
            torch.sum(same * q[:, :, None], 1, out=dk)
            for m, read, write in _levels(g[s]):
                if m == C:
                    dq += d_inside[s] * read[:, None]
                    out = d_outside[s] * write[:, None]
                    dk += out
                else:
                    x, y = _meet(q, k, read, write, m)
                    d = _corners(dA[s], m).flatten(4, 5).flatten(2, 3)
                    _halves(dq, m)[1].add_((d @ y).unflatten(2, (P, m)).mul_(read[:, :, None]).transpose(1, 2))
                    _halves(dk, m)[0].add_((d.mT @ x).unflatten(2, (Q, m)).mul_(write[:, :, None]).transpose(1, 2))
            # g_i weighs the pairs s < i <= t: all reads at t >= i, less the writes at s >= i they would count twice.
            net = (q * dq).sum(1) - (k * dk).sum(1)
            dg[s] = net.flip(-2).cumsum(-2).flip(-2) + (k * out).sum((1, 2))[:, None]
        return d_rows, d_cols, dg


def _scores(rows: Tensor, cols: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A[p, t, q, s] = sum_j rows[p, t, j] exp(sum_{s < i <= t} g[i, j]) cols[q, s, j] for s <= t, and 0 above.

    rows: [N, R, P, C, K]; cols: [N, R, Q, C, K]; g: [N, R, C, 1 or K]
    Returns A [N, R, P, C, Q, C], the rows decayed from the chunk's start and the columns decayed to its end.
    """
    if g.shape[-1] > 1:
        out = _ChannelScores.apply(rows.flatten(0, 1), cols.flatten(0, 1), g.flatten(0, 1))
        return tuple(x.unflatten(0, rows.shape[:2]) for x in out)
    P, Q, C = rows.shape[2], cols.shape[2], g.shape[-2]
    below = torch.ones(C, C, dtype=g.dtype, device=g.device).tril_(-1)
    D = (g * below).cumsum(-2).exp().tril()  # [t, s]: exp of the sum over s < i <= t
    A = (rows.flatten(2, 3) @ cols.flatten(2, 3).mT).unflatten(2, (P, C)).unflatten(4, (Q, C))
    return A * D[:, :, None, :, None], rows * g.cumsum(-2).exp()[:, :, None], cols * D[:, :, None, -1, :, None]


def _add_product(o: Tensor, A: Tensor, v: Tensor) -> Tensor:
    """o += A v, in place and in one pass; all [N, R, ., .]."""
    o.flatten(0, 1).baddbmm_(A.flatten(0, 1), v.flatten(0, 1))
    return o


# ---- linear state, linear read ---------------------------------------------------------------------------------------


def linear(
    q: Keys, k: Keys, v: Values, g: Decay, s0: Memory, *, before: bool = False, chunk: int = 32
) -> tuple[Values, Memory]:
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T ;  o_t = S_t^T q_t, or S_{t-1}^T q_t when `before` (not decayed).

    q, k: [B, T, H, K] (q scaled already); v: [B, T, H, V]; g: [B, T, H] or [B, T, H, K], log decay <= 0
    s0: [B, H, K, V]. Returns o [B, T, H, V] and S_T [B, H, K, V]. chunk: rounded up to a power of two.
    Cost: T H (C (K + V) + 2 K V) multiply-adds in matrix products; with a decay per channel, log2(C) passes over the
    keys and queries more. (32 and 64 are the fastest chunks in both precisions; fewer scores against fewer states.)
    """
    if before:
        o, last = linear(_next(q), k, v, g, s0, chunk=chunk)
        return _after(torch.einsum("bhk,bhkv->bhv", q[:, 0], s0), o), last
    C = _fit(chunk, q.shape[1])
    (o,), last = _sweep(partial(_linear, C), C, s0, q, k, v, _wide(g))
    return o, last


def _linear(C: int, s0: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor):
    B, T, H, K = q.shape
    q, k, v, g = (_split(x, C) for x in (q, k, v, g))
    A, q_in, k_out = _scores(q[:, :, None], k[:, :, None], g)
    starts, last = _boundaries(k_out[:, :, 0], v, g.sum(-2), s0.flatten(0, 1))
    o = _add_product(q_in[:, :, 0] @ starts, A[:, :, 0, :, 0], v)
    return (_merge(o, B, T),), last.unflatten(0, (B, H))


# ---- linear state, rank-one transition -------------------------------------------------------------------------------


def rank_one(
    q: Keys, r: Keys, w: Keys, k: Keys, v: Values, g: Decay, s0: Memory, *,
    before: bool = False, chunk: int = 32,
) -> tuple[Values, Memory]:  # fmt: skip
    """S_t = Diag(exp g_t) S_{t-1} - w_t (r_t^T S_{t-1}) + k_t v_t^T ;  o_t = S_t^T q_t, or S_{t-1}^T q_t when `before`.

    r reads the state *before* it decays (the delta rule: r = exp(g) k, w = k = beta k, v). With y_t = S_{t-1}^T r_t and
    S0 the state at a chunk's start, unrolling the recurrence inside y_t gives a unit lower triangular system (WY form),
        (I + A_rw) Y = R S0 + A_rk V,   A_rw[t, s] = sum_j r_tj exp(sum_{s<i<t} g_ij) w_sj for s < t,
    solved for all chunks at once; only u = -Y and the state walk from chunk to chunk.
    If `w is k` (one tensor, passed twice) then v - y is the unknown, and half of the scores are not needed.

    q, r, w, k: [B, T, H, K] (q scaled already); v: [B, T, H, V]; g: [B, T, H] or [B, T, H, K], log decay <= 0
    s0: [B, H, K, V]. Returns o [B, T, H, V] and S_T [B, H, K, V]. chunk: rounded up to a power of two.
    Cost: about twice `linear` with w is k, three times otherwise, and T C H (K + V) for the triangular solve.
    """
    if before:
        o, last = rank_one(_next(q), r, w, k, v, g, s0, chunk=chunk)
        return _after(torch.einsum("bhk,bhkv->bhv", q[:, 0], s0), o), last
    C = _fit(chunk, q.shape[1])
    writes = (w, v) if w is k else (w, v, k)
    (o,), last = _sweep(partial(_rank_one, C), C, s0, q, r, _wide(g), *writes)
    return o, last


def _rank_one(C: int, s0: Tensor, q: Tensor, r: Tensor, g: Tensor, w: Tensor, v: Tensor, k: Tensor | None = None):
    B, T, H, K = q.shape
    q, r, g, w, v = (_split(x, C) for x in (q, r, g, w, v))
    cols = w[:, :, None] if k is None else torch.stack((w, _split(k, C)), 2)
    # A read before token t + 1 decays is a read after token t: shift r up, score it like q, shift the result down.
    ahead = torch.cat((r[..., 1:, :], torch.zeros_like(r[..., :1, :])), 2)
    A, inside, outside = _scores(torch.stack((q, ahead), 2), cols, g)
    A_r = F.pad(A[:, :, 1, :-1], (0, 0, 0, 0, 1, 0))
    r_in = torch.cat((r[..., :1, :], inside[:, :, 1, :-1]), 2)
    z = v if k is None else -A_r[..., 1, :] @ v
    x, z = (_unit_solve(A_r[..., 0, :], y) for y in (r_in, z))
    added = None if k is None else outside[:, :, 1].mT @ v
    starts, u, last = _walk(x, z, outside[:, :, 0], added, g.sum(-2).exp()[..., None], s0.flatten(0, 1))
    o = _add_product(inside[:, :, 0] @ starts, A[:, :, 0, :, 0], u)
    if k is not None:
        _add_product(o, A[:, :, 0, :, 1], v)
    return (_merge(o, B, T),), last.unflatten(0, (B, H))


def _unit_solve(A: Tensor, y: Tensor) -> Tensor:
    """(1 + A)^-1 y, A strictly lower triangular. Transposed, so that row-major memory is what the solver works on."""
    return torch.linalg.solve_triangular(A.mT, y.mT, upper=True, left=False, unitriangular=True).mT


def _walk(
    x: Tensor, z: Tensor, w: Tensor, added: Tensor | None, decay: Tensor, S: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk after chunk, u = z - x S and S <- decay S + w^T u + added: states at the starts, all u, the last state."""
    starts, us = [], []
    for n in range(len(x)):
        u = torch.baddbmm(z[n], x[n], S, alpha=-1)
        starts.append(S)
        us.append(u)
        S = decay[n] * S if added is None else torch.addcmul(added[n], decay[n], S)
        S.baddbmm_(w[n].mT, u)
    return torch.stack(starts), torch.stack(us), S


# ---- linear state, elementwise read ----------------------------------------------------------------------------------


def elementwise(
    q: Keys, k: Keys, v: Values, b: Values, g: Decay, prior: Float[Tensor, "*prior"], M0: Memory, I0: Memory, *,
    spread: Keys | None = None, before: bool = False, bonus: Float[Tensor, "H K"] | None = None, variance: bool = False,
    chunk: int = 64,
) -> tuple[Values, Values | None, Memory, Memory]:  # fmt: skip
    """M_t = a_t M_{t-1} + k_t v_t^T and I_t = a_t I_{t-1} + k_t^2 b_t^T (a = exp g), read by a division per element:

        o_t = sum_j q_tj M_tji / (prior_ji + I_tji),   var_t = sum_j q_tj^2 / (prior_ji + I_tji).
    `before`: both read at t - 1, with bonus_j k_tj v_ti added to M_{t-1}. Both states are linear, so they are known at
    every chunk's start by matrix products; then all chunks advance together, one token at a time.

    q, k: [B, T, H, K] (q scaled already); v, b: [B, T, H, V]; g: [B, T, H] or [B, T, H, K], log decay <= 0
    prior: [H, 1, 1], [H, K, 1] or [H, K, V], > 0; M0, I0: [B, H, K, V], I without the prior; bonus: [H, K]
    spread: [B, T, H, K], what takes the place of k^2
    Returns o, var [B, T, H, V] (None unless `variance`), M_T, I_T [B, H, K, V]. Cost: T H K V divisions, with 5
    multiply-adds each. Nothing of size T K V is kept for the gradient, only the states at the chunks' starts.
    """
    C, H = _fit(chunk, q.shape[1]), q.shape[2]
    spread = k * k if spread is None else spread
    weights = [q * q] if variance else []
    if before:
        first = _elementwise_read(q[:, :1], k[:, :1], v[:, :1], prior, M0, I0, bonus, variance)
        q, weights = _next(q), [_next(x) for x in weights]
        if bonus is not None:
            weights.append(q * bonus * _next(k))
    prior = prior.expand(H, *M0.shape[2:]).contiguous()
    w = torch.stack(weights, 3).flatten(3) if weights else q[..., :0]
    inputs = (q, k, v, b, _wide(g), spread, w)
    (o, z), (MT, IT) = _sweep(partial(_elementwise, C, prior), C, (M0, I0), *inputs, slab=_STATES)
    z = z.unflatten(-1, (len(weights), v.shape[-1])) if weights else z
    if before:
        if bonus is not None:
            o = o + z[:, :, :, -1] * _next(v)
        o = _after(first[0], o)
        return o, _after(first[1], z[:, :, :, 0]) if variance else None, MT, IT
    return o, z[:, :, :, 0] if variance else None, MT, IT


def _elementwise_read(q, k, v, prior, M0, I0, bonus, variance):
    """Token 0 read before anything is written: o and var [B, H, V]."""
    R = 1 / (prior + I0)
    M = M0 if bonus is None else M0 + (bonus * k[:, 0])[..., None] * v[:, 0, :, None]
    o = torch.einsum("bhk,bhkv->bhv", q[:, 0], M * R)
    return o, torch.einsum("bhk,bhkv->bhv", q[:, 0] ** 2, R) if variance else None


def _elementwise(C: int, prior: Tensor, states: tuple[Tensor, Tensor], q, k, v, b, g, spread, w):
    B, T, H, K = q.shape
    q, k, v, b, g, spread, w = (_split(x, C) for x in (q, k, v, b, g, spread, w))
    decayed, total = to_end(g), g.sum(-2)
    M, MT = _boundaries(k * decayed, v, total, states[0].flatten(0, 1))
    I, IT = _boundaries(spread * decayed, b, total, states[1].flatten(0, 1))
    rows = [x.unflatten(1, (B, H)).flatten(0, 1) for x in (q, w, k, v, spread, b, g, M, I)]
    o, z = _Quotient.apply(*rows, prior)
    back = lambda x: _merge(x.unflatten(0, (-1, B)).flatten(1, 2), B, T)  # noqa: E731
    return (back(o), back(z)), (MT.unflatten(0, (B, H)), IT.unflatten(0, (B, H)))


def _advance(k, v, s, b, g, p, M, J) -> Iterator[int]:
    """Walk M and J = prior + I, in place, through the tokens of k ... g [R, H, C, ...]; yields after each token."""
    keep, lost = g.exp(), -g.expm1()
    columns = [x[..., None].unbind(2) for x in (keep, lost, k, s)]
    rows = [x[..., None, :].unbind(2) for x in (v, b)]
    for t, (keep, lost, k, s, v, b) in enumerate(zip(*columns, *rows, strict=True)):
        M.mul_(keep).addcmul_(k, v)
        J.lerp_(p, lost).addcmul_(s, b)
        yield t


class _Quotient(torch.autograd.Function):
    """o_t = sum_j q_tj M_tji / J_tji and z_t = sum_j w_tj / J_tji inside chunks, from the states M, I at their starts.

    Rows are chunks (of all batches): q ... g [R, H, C, ...], w [R, H, C, n K] for n sums z, M and I [R, H, K, V].
    """

    @staticmethod
    def forward(ctx, q, w, k, v, s, b, g, M0, I0, prior):
        R, H, C, K = q.shape
        n, V = w.shape[-1] // K, v.shape[-1]
        o, z = torch.empty_like(v), v.new_empty(R, H, C, n, V)
        w_ = w.unflatten(-1, (n, K)) if n else w
        for i in _blocks(M0):
            M, p = M0[i].clone(), prior[i[1]]
            J, ratio = p + I0[i], torch.empty_like(M)
            qi, oi, wi, zi = q[i], o[i], w_[i], z[i]
            for t in _advance(k[i], v[i], s[i], b[i], g[i], p, M, J):
                if n:
                    torch.reciprocal(J, out=ratio)
                    zi[:, :, t] = wi[:, :, t] @ ratio
                    ratio.mul_(M)
                else:
                    torch.div(M, J, out=ratio)
                oi[:, :, t] = (qi[:, :, t, None] @ ratio)[:, :, 0]
        ctx.save_for_backward(q, w, k, v, s, b, g, M0, I0, prior)
        return o, z.flatten(3)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dz):
        q, w, k, v, s, b, g, M0, I0, prior = ctx.saved_tensors
        K = q.shape[-1]
        n = w.shape[-1] // K
        dq, dw, dk, dv, ds, db, dM, dI = (torch.empty_like(x) for x in (q, w, k, v, s, b, M0, I0))
        net, d_prior = torch.empty_like(q), torch.zeros_like(prior)
        for i in _blocks(M0):
            ins = [x[i] for x in (q, w, k, v, s, b, g, M0, I0)]
            outs = [x[i] for x in (dq, dw, dk, dv, ds, db, net, dM, dI)]
            _quotient_adjoint(ins, outs, do[i], dz[i], prior[i[1]], d_prior[i[1]], n)
        # g_t acts on all that is read at t or later, except what is only written then; so its gradient is a sum over
        # the later tokens of (state . its local gradient) - (write . its gradient), and no earlier state is needed.
        net = net if g.shape[-1] == K else net.sum(-1, keepdim=True)
        return dq, dw, dk, dv, ds, db, net.flip(2).cumsum(2).flip(2), dM, dI, d_prior


def _blocks(M: Tensor) -> list[tuple[slice, slice]]:
    """Slices (rows, heads) of the states M [R, H, K, V], few enough at a time for the cache."""
    return [(rows, heads) for heads in _few(M[:1], _STATES, 1) for rows in _few(M[:, heads], _STATES)]


def _quotient_adjoint(ins, outs, do, dz, p, d_prior, n, span: int = 8):
    """Gradients of one block: states every `span` tokens first, then the spans backwards, their states recomputed.

    With R = 1 / J and mu = M R, the local terms are gM = do q R and gI = - (gM mu + sum_n dz w R^2); the adjoints of M
    and I are their sums backwards in time, D_t = g_t + a_{t+1} D_{t+1}. No state is recovered by division.
    """
    q, w, k, v, s, b, g, M0, I0 = ins
    dq, dw, dk, dv, ds, db, net, dM, dI = outs
    C = g.shape[2]
    M, J, starts = M0.clone(), p + I0, []
    for t in range(0, C, span):
        starts.append((M.clone(), J.clone()))
        for _ in _advance(*(x[:, :, t : t + span] for x in (k, v, s, b, g)), p, M, J):
            pass
    keep = g.exp()[..., None]
    dM.zero_()
    dI.zero_()
    for t0 in reversed(range(0, C, span)):
        M, J = starts.pop()
        tokens = _advance(*(x[:, :, t0 : t0 + span] for x in (k, v, s, b, g)), p, M, J)
        history = [(M.clone(), J.clone()) for _ in tokens]
        for t in reversed(range(t0, t0 + len(history))):
            M, J = history.pop()
            at = [x[:, :, t] for x in (q, w, k, v, s, b, do, dz)]
            to = [x[:, :, t] for x in (dq, dw, dk, dv, ds, db, net)]
            _quotient_token(at, to, M, J, p, dM, dI, d_prior, n)
            dM.mul_(keep[:, :, t])
            dI.mul_(keep[:, :, t])


def _quotient_token(at, to, M, J, p, DM, DI, d_prior, n):
    """One token of `_quotient_adjoint`; M and J are used up."""
    q, w, k, v, s, b, do, dz = at
    dq, dw, dk, dv, ds, db, net = to
    R = J.reciprocal_()
    mu = M.mul_(R)
    flow = mu.mul_(do[:, :, None])
    torch.sum(flow, -1, out=dq)
    gI = flow.mul_(R).mul_(-q[..., None])
    DM.addcmul_(q[..., None], R * do[:, :, None])
    if n:
        w, dz = w.unflatten(-1, (n, -1)), dz.unflatten(-1, (n, -1))
        dw_ = dz @ R.mT
        dw.copy_(dw_.flatten(2))
        gI.addcmul_(w.mT @ dz, R.square_(), value=-1)
    DI.add_(gI)
    d_prior.add_(gI.sum(0))
    torch.sum(DM * v[:, :, None], -1, out=dk)
    torch.sum(DI * b[:, :, None], -1, out=ds)
    dv.copy_((k[:, :, None] @ DM)[:, :, 0])
    db.copy_((s[:, :, None] @ DI)[:, :, 0])
    torch.sum(gI.mul_(p), -1, out=net).neg_()
    net.addcmul_(k, dk, value=-1).addcmul_(s, ds, value=-1)
    if n:
        net.sub_((w * dw_).sum(2))


# ---- a linear solve at the read --------------------------------------------------------------------------------------


def solve(
    q: Keys, k: Keys, v: Values, b: Gate, g: Gate, prior: Float[Tensor, "*prior"] | None, M0: Memory, P0: Square, *,
    before: bool = False, variance: bool = False, ridge: Float[Tensor, " H"] | None = None, mix: Gate | None = None,
    chunk: int = 64,
) -> tuple[Values, Values | None, Memory, Square]:  # fmt: skip
    """P_t = a_t P_{t-1} + b_t k_t k_t^T, M_t = a_t M_{t-1} + k_t v_t^T (a = exp g), x_t = (P_t + Lambda)^-1 q_t:

        o_t = M_t^T x_t,  or M_t^T ((1 - mix_t) q_t + mix_t x_t);   var_t = q_t . x_t, the same for every value channel.
    Lambda = diag(prior), or ridge ||P_t||_F 1 if `ridge` is given (then `prior` is not used); where P_t = 0 that system
    is singular, and Lambda = 1, hence x = q, takes its place (a memory that saw nothing has M = 0 as well, so o = 0).
    `before` reads M_{t-1} and P_{t-1}.

    q, k: [B, T, H, K] (q scaled already); v: [B, T, H, V]; b, g, mix: [B, T, H], g the log decay <= 0, b >= 0
    prior: [H, K], > 0; ridge: [H], > 0; M0: [B, H, K, V]; P0: [B, H, K, K]
    Returns o, var [B, T, H, V] (None unless `variance`), M_T, P_T. Cost: T H K^3 / 3 multiply-adds for the solves, once
    more for a gradient; no matrix is kept for it.
    """
    if before:
        first, level = _solve_read(q[:, 0], M0, P0, prior, ridge, None if mix is None else mix[:, 0, :, None])
        later = {"ridge": ridge, "mix": None if mix is None else _next(mix), "variance": variance, "chunk": chunk}
        o, var, MT, PT = solve(_next(q), k, v, b, g, prior, M0, P0, **later)
        return _after(first, o), _after(level, var) if variance else None, MT, PT
    C = _fit(chunk, q.shape[1])
    bk, g = b[..., None] * k, _wide(g)
    if ridge is None:
        diagonal = prior.expand_as(q)
    else:
        (square,), _ = _sweep(partial(_square_norm, C), C, P0, k, bk, g)
        diagonal = _ridge(square, ridge[:, None]).expand_as(q)
    x, PT = _precision_solve(C, q, k, bk, g, diagonal, P0)
    read = x if mix is None else torch.lerp(q, x, mix[..., None])
    o, MT = linear(read, k, v, g[..., 0], M0, chunk=chunk)
    var = (q * x).sum(-1, keepdim=True).expand_as(o) if variance else None
    return o, var, MT, PT


def _ridge(square: Tensor, ridge: Tensor) -> Tensor:
    """ridge ||P||_F from its square, and 1 where P = 0; the gradient of the root stays finite there."""
    some = square > 0
    return torch.where(some, ridge * torch.where(some, square, 1.0).sqrt(), 1.0)


def _solve_read(q: Tensor, M: Tensor, P: Tensor, prior: Tensor | None, ridge: Tensor | None, mix: Tensor | None):
    """One token's o and var [B, H, V] from q [B, H, K] and its states."""
    diagonal = prior if ridge is None else _ridge((P * P).sum((-2, -1))[..., None], ridge[:, None])
    x = torch.linalg.solve(P + torch.diag_embed(diagonal.expand_as(q)), q)
    o = torch.einsum("bhk,bhkv->bhv", x if mix is None else torch.lerp(q, x, mix), M)
    return o, (q * x).sum(-1, keepdim=True).expand_as(o)


def _square_norm(C: int, P0: Tensor, k: Tensor, bk: Tensor, g: Tensor):
    """||P_t||_F^2 at every token without P_t: with P_t = e_t P + sum_s D_ts bk_s k_s^T, products of keys are enough."""
    B, T, H, K = k.shape
    k, bk, g = (_split(x, C) for x in (k, bk, g))
    gram = (k @ k.mT) * (bk @ bk.mT)
    one = torch.ones_like(k[:, :, None, :, :1])
    D, e, to_end = (x.squeeze(2) for x in _scores(one, one, g))
    D = D[..., 0, :]
    starts, last = _boundaries(k * to_end, bk, g.sum(-2), P0.flatten(0, 1))
    cross = ((k @ starts) * bk).sum(-1, keepdim=True)
    square = (e * e) * (starts * starts).sum((-2, -1))[..., None, None]
    square = square + 2 * e * (D @ cross) + ((D @ gram) * D).sum(-1, keepdim=True)
    return (_merge(square, B, T),), last.unflatten(0, (B, H))


def _precision_solve(C: int, q, k, bk, g, diagonal, P0) -> tuple[Tensor, Tensor]:
    """x_t = (P_t + diag)^-1 q_t and P_T. The gradient is that of one Newton step from the solution, which is exact."""
    with torch.no_grad():
        (x,), PT = _sweep(partial(_solve_tokens, C), C, P0, q, k, bk, g, diagonal)
    if not (torch.is_grad_enabled() and any(y.requires_grad for y in (q, k, bk, g, diagonal, P0))):
        return x, PT
    Px, PT = linear(x, k, bk, g[..., 0], P0.mT, chunk=C)
    return _Newton.apply(q - Px - diagonal * x, x, C, k, bk, g, diagonal, P0), PT.mT


class _Newton(torch.autograd.Function):
    """x + (P_t + diag)^-1 residual, where the residual is zero but its gradient is not."""

    @staticmethod
    def forward(ctx, residual, x, C, *system):
        ctx.C = C
        ctx.save_for_backward(*system)
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        k, bk, g, diagonal, P0 = ctx.saved_tensors
        (y,), _ = _sweep(partial(_solve_tokens, ctx.C), ctx.C, P0.mT, dx, k, bk, g, diagonal)
        return y, *(None,) * 7


def _solve_tokens(C: int, P0: Tensor, q, k, bk, g, diagonal):
    """(P_t + diag_t)^-1 q_t for all tokens: the matrices of many chunks at once, one token of each after another."""
    B, T, H, K = q.shape
    diagonal = _split(diagonal, C, fill=1.0)
    q, k, bk, g = (_split(x, C) for x in (q, k, bk, g))
    starts, last = _boundaries(k * to_end(g), bk, g.sum(-2), P0.flatten(0, 1))
    x, shape = torch.empty_like(q), q.shape
    q, k, bk, g, diagonal, starts, x = (y.flatten(0, 1) for y in (q, k, bk, g, diagonal, starts, x))
    for i in _few(starts, _STATES):
        P, keep = starts[i].clone(), g[i].exp()
        for t in range(C):
            P.mul_(keep[:, t, :, None]).addcmul_(k[i, t, :, None], bk[i, t, None])
            A = P.clone()
            A.diagonal(dim1=-2, dim2=-1).add_(diagonal[i, t])
            x[i, t] = torch.linalg.solve_ex(A, q[i, t])[0]
    return (_merge(x.view(shape), B, T),), last.unflatten(0, (B, H))
