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

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["boundary_states", "decayed_sum", "elementwise", "linear", "rank_one", "solve"]

Halves = tuple[Tensor, Tensor]


# ---- layout ----------------------------------------------------------------------------------------------------------


def _fit(chunk: int, T: int) -> int:
    """The chunk length used: a power of two (the scores halve it again and again), no longer than T needs."""
    return 1 << (min(chunk, T) - 1).bit_length()


def _split(x: Tensor, C: int) -> Tensor:
    """[B, T, H, X] -> [N, B H, C, X], zeros after the last token."""
    N = -(-x.shape[1] // C)
    x = F.pad(x, (0, 0, 0, 0, 0, N * C - x.shape[1])).unflatten(1, (N, C))
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


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


# ---- decayed sums ----------------------------------------------------------------------------------------------------


def _scan(g: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    """y_t = exp(g_t) y_{t-1} + x_t in about 2 sqrt(T) vector operations: inside all blocks at once, then across them."""
    B, T = x.shape[:2]
    c = int(T**0.5 - 1e-9) + 1
    n = -(-T // c)
    pad = lambda y: torch.cat((y, y.new_zeros(B, n * c - T, *y.shape[2:])), 1).unflatten(1, (n, c))  # noqa: E731
    g, y = pad(g), pad(x)
    a, within = g.exp(), g.cumsum(2).exp_()
    y[:, 0, 0].addcmul_(a[:, 0, 0], x0)
    for i in range(1, c):
        y[:, :, i].addcmul_(a[:, :, i], y[:, :, i - 1])
    for j in range(1, n):
        y[:, j, -1].addcmul_(within[:, j, -1], y[:, j - 1, -1])
    y[:, 1:, :-1].addcmul_(within[:, 1:, :-1], y[:, :-1, -1:])
    return y.flatten(1, 2)[:, :T]


class _DecayedSum(torch.autograd.Function):
    """`_scan` with its adjoint D_t = dy_t + exp(g_{t+1}) D_{t+1}: the same sum, backwards in time."""

    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        y = _scan(g, x, x0)
        ctx.save_for_backward(g, y, x0)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        g, y, x0 = ctx.saved_tensors
        D = _scan(_next(g).flip(1), dy.flip(1), torch.zeros_like(x0)).flip(1)
        flow = D * g.exp()
        dg = (flow * torch.cat((x0[:, None], y[:, :-1]), 1)).sum_to_size(g.shape)
        return dg, D, flow[:, 0]


def decayed_sum(g: Tensor, x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = exp(g_t) y_{t-1} + x_t, elementwise.

    g: [B, T, H, ...] broadcastable to x (trailing ones stand for shared channels), natural log of the decay, <= 0
    x: [B, T, H, *D]; x0: [B, H, *D]
    Returns y [B, T, H, *D] and y_T [B, H, *D]. Cost: T H D multiply-adds, about 2 sqrt(T) steps deep.
    """
    y = _DecayedSum.apply(g.expand(*x.shape[:3], *g.shape[3:]), x, x0)
    return y, y[:, -1]


def _boundaries(k_out: Tensor, v: Tensor, total: Tensor, s0: Tensor) -> tuple[Tensor, Tensor]:
    """States at the chunks' starts [N, R, K, V] and after the last; k_out [N, R, C, K] decayed to the chunk's end."""
    ends = decayed_sum(total[None, ..., None], (k_out.mT @ v)[None], s0[None])[0][0]
    return torch.cat((s0[None], ends[:-1])), ends[-1]


def _to_end(g: Tensor) -> Tensor:
    """exp of what a token loses until its chunk's end: the sum over later tokens; g [..., C, X]."""
    later = torch.cat((g[..., 1:, :], torch.zeros_like(g[..., :1, :])), -2)
    return later.flip(-2).cumsum(-2).flip(-2).exp()


def boundary_states(g: Tensor, k: Tensor, v: Tensor, s0: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T at the start of every chunk, by matrix products.

    g: [B, T, H] or [B, T, H, K], log decay <= 0; k: [B, T, H, K]; v: [B, T, H, V]; s0: [B, H, K, V]
    Returns S [B, N, H, K, V], N = ceil(T / chunk), the state before tokens 0, chunk, 2 chunk, ..., and S_T [B, H, K, V].
    Cost: 2 T H K V operations and N H K V for the sum over chunks.
    """
    B, T, H = k.shape[:3]
    k, v, g = (_split(x, chunk) for x in (k, v, _wide(g)))
    starts, last = _boundaries(k * _to_end(g), v, g.sum(-2), s0.flatten(0, 1))
    return starts.unflatten(1, (B, H)).movedim(0, 1), last.unflatten(0, (B, H))


# ---- decayed scores inside a chunk -----------------------------------------------------------------------------------


def _halves(x: Tensor, m: int) -> Halves:
    """Views of the first and second blocks of every pair of blocks of m tokens: [..., C, X] -> [..., C / 2m, m, X] each."""
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
    write, exp(sum_{border<i<=t} g_i) on the read; both are sums, both exponents are <= 0. Yields m, the read's factor
    (second blocks) and the write's (first blocks); at last C, exp(sum_{i<=t}) and exp(sum_{i>s}) for the whole chunk.
    """
    C, m = g.shape[-2], 1
    read, write = g.clone(), torch.zeros_like(g)
    while m < C:
        (r0, r1), (w0, w1) = _halves(read, m), _halves(write, m)
        yield m, r1.exp(), w0.exp()
        w0 += r1[..., -1:, :]
        r1 += r0[..., -1:, :]
        m *= 2
    yield C, read.exp_(), write.exp_()


def _meet(rows: Tensor, cols: Tensor, read: Tensor, write: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Rows of the second blocks and columns of the first, both decayed to the border: [n, C / 2m, P m, K]."""
    x = _halves(rows, m)[1].transpose(1, 2) * read[:, :, None]
    y = _halves(cols, m)[0].transpose(1, 2) * write[:, :, None]
    return x.flatten(2, 3), y.flatten(2, 3)


class _ChannelScores(torch.autograd.Function):
    """`_scores` for a decay per key channel, and its adjoint, a few chunks at a time so that the work stays in cache."""

    @staticmethod
    def forward(ctx, rows: Tensor, cols: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        R, P, C, K = rows.shape
        Q = cols.shape[1]
        A, inside, outside = rows.new_zeros(R, P, C, Q, C), torch.empty_like(rows), torch.empty_like(cols)
        for s in _few(R, C * K):
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
        (R, P, C, K), Q = rows.shape, cols.shape[1]
        d_rows, d_cols, dg = torch.empty_like(rows), torch.empty_like(cols), torch.empty_like(g)
        for s in _few(R, C * K):
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


def _few(R: int, size: int, target: int = 1 << 18) -> list[slice]:
    """Slices of R rows of `size` numbers each, about `target` numbers a slice: small enough for the cache."""
    n = max(1, target // size)
    return [slice(i, i + n) for i in range(0, R, n)]


def _scores(rows: Tensor, cols: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A[p, t, q, s] = sum_j rows[p, t, j] exp(sum_{s < i <= t} g[i, j]) cols[q, s, j] for s <= t, and 0 above.

    rows: [N, R, P, C, K]; cols: [N, R, Q, C, K]; g: [N, R, C, 1 or K]
    Returns A [N, R, P, C, Q, C], the rows decayed from the chunk's start and the columns decayed to its end.
    """
    if g.shape[-1] > 1 or rows.shape[-1] == 1:
        out = _ChannelScores.apply(rows.flatten(0, 1), cols.flatten(0, 1), g.flatten(0, 1))
        return tuple(x.unflatten(0, rows.shape[:2]) for x in out)
    P, Q, C = rows.shape[2], cols.shape[2], g.shape[-2]
    below = torch.ones(C, C, dtype=g.dtype, device=g.device).tril_(-1)
    D = (g * below).cumsum(-2).exp().tril()  # [t, s]: exp of the sum over s < i <= t
    A = (rows.flatten(2, 3) @ cols.flatten(2, 3).mT).unflatten(2, (P, C)).unflatten(4, (Q, C))
    return A * D[:, :, None, :, None], rows * g.cumsum(-2).exp()[:, :, None], cols * D[:, :, None, -1, :, None]


# ---- linear state, linear read ---------------------------------------------------------------------------------------


def linear(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s0: Tensor, *, before: bool = False, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T ;  o_t = S_t^T q_t, or S_{t-1}^T q_t when `before` (not decayed).

    q, k: [B, T, H, K] (q scaled already); v: [B, T, H, V]; g: [B, T, H] or [B, T, H, K], log decay <= 0; s0: [B, H, K, V]
    Returns o [B, T, H, V] and S_T [B, H, K, V]. chunk: rounded up to a power of two.
    Cost: T H (C (K + V) + 2 K V) multiply-adds in matrix products; per channel log2(C) passes of T H K exponentials more.
    """
    if before:
        o, last = linear(_next(q), k, v, g, s0, chunk=chunk)
        return _after(torch.einsum("bhk,bhkv->bhv", q[:, 0], s0), o), last
    B, T, H, K = q.shape
    C = _fit(chunk, T)
    q, k, v, g = (_split(x, C) for x in (q, k, v, _wide(g)))
    A, q_in, k_out = _scores(q[:, :, None], k[:, :, None], g)
    starts, last = _boundaries(k_out[:, :, 0], v, g.sum(-2), s0.flatten(0, 1))
    o = A[:, :, 0, :, 0] @ v + q_in[:, :, 0] @ starts
    return _merge(o, B, T), last.unflatten(0, (B, H))
