"""The elementwise-read family: a memory and its diagonal importance, divided element by element at every token.

    M_t = a_t M_{t-1} + k_t v_t^T        I_t = a_t I_{t-1} + s_t b_t^T        (a = exp g; s = k^2 unless given)
    o_t = scale * sum_j q_tj M_tji / (prior_ji + I_tji)       variance_t = scale^2 * sum_j q_tj^2 / (prior_ji + I_tji)

Both states are linear in the tokens, so matrix products give them at the start of every chunk; then all chunks walk
through their tokens at once, one warp to a tile of [keys, values] that never leaves its registers.

The walks keep the states divided by the decay since a token not long ago, A = f M and S = f I with f = exp(-sum of g) >= 1:
then a write is one multiply-add, A += (f k) v, the read divides by S + f prior, and the factor cancels in A / (S + f prior).
A new segment, f = 1 again, starts every `MARK` tokens and at every strong gate, where the states are multiplied with the
decay they were spared; so f stays below exp(2 MARK), and gates of any strength are exact. `prepare` lays out f k and f s.

Backward, with R = 1 / (S + f prior), mu = A R and w = scale do: a read adds w q R to the adjoint of A, and - w q R mu to that
of S. (1) forward in time: each chunk's contribution to the adjoints at its start, and the states at every segment's end.
(2) a scan over chunks gives the adjoints at every chunk's end. (3) backward in time, all other sums. There the states before a
token are those after it less what it wrote. That is a subtraction: it is done only in a segment in which the precision grows
by less than `LIMIT`, so that it costs less than LIMIT roundings; other segments are replayed from their start for every
token. The decay's gradient is a sum over the later tokens of the chunk (<adjoint, state> of a chunk's end, plus what is read,
less what is written), so it needs no state of its own. No state is ever divided by a decay, and every sum has a fixed order.

A thread of a warp of KL x VL lanes holds KH times 4 neighbouring keys by VR times 4 neighbouring values. A sum over keys costs
shuffles among KL lanes only, one over values among VL.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unify.kernels import elementwise_backward as backward
from unify.kernels import elementwise_forward as forward
from unify.kernels.chunk import blocks, power, strided
from unify.kernels.operator import operator

CHUNK = 128  # tokens between states in memory, forward
CHUNK_BACK = 64  # and backward: twice the programs
MARK = 16  # tokens of a segment, between states that the backward keeps for a while
LIMIT = {torch.float64: 64.0, torch.float32: 8.0}  # growth of a precision over which writes may be taken off again
LIMIT_HALF = 4096.0  # 12 bits of a float32 lost at worst: half-precision inputs and outputs have no more than 11
SLAB = 7 << 27  # bytes of buffers in use at a time: heads are handled in groups that fit


class Tile(NamedTuple):
    """Elements [keys / 4, values / 4] of a thread, then threads [keys, values] of a warp."""

    KH: int
    VR: int
    KL: int
    VL: int

    @property
    def BK(self) -> int:
        return self.KH * 4 * self.KL

    @property
    def BV(self) -> int:
        return self.VR * self.VL * 4

    def fit(self, K: int, V: int) -> Tile:
        """The same threads with fewer elements each where the channels do not fill them."""
        room = lambda n, lanes: power(blocks(n, 4 * lanes))  # noqa: E731
        return Tile(min(self.KH, room(K, self.KL)), min(self.VR, room(V, self.VL)), self.KL, self.VL)


# Blocks and tiles. Numbers are milliseconds on an H200 at B 2, T 4096, H 16, K 96, V 192, bfloat16, torch 2.11, Triton 3.6.0.
DEPOSITS = 64, 32, 64  # tokens of 2-byte numbers (32 of 4), key and value channels, also of the walk
WALK = 2  # programs for each token of a chunk from which on a walk over the chunks beats deposits and a scan: it takes about
# 1 us for 64 tokens of a sequence however many programs run, they move the states at all chunks' starts three times more
SCAN = 16, 64  # chunks and channels; (8, 64) 0.64, (4, 128) 0.75, (4, 64) 0.91, (2, 256) 1.36
READ = Tile(2, 1, 4, 8)  # 0.99; (2, 1, 2, 16) 0.98, (1, 1, 4, 8) 1.06, (1, 2, 4, 8) 1.07, (4, 1, 2, 16) 1.5
ADJOINT = Tile(1, 1, 4, 8)  # 1.71; (1, 1, 2, 16) 1.72, (2, 1, 4, 8) 1.89
SUMMED = 2048  # elements of a program that adds up shares; a warp a row took 1.6 times as long as its bytes, or 7
REGISTERS = 128  # of a thread of the adjoint: four warps a scheduler; left alone it takes 141, and 2.14 instead of 1.81 on an H100
GRADIENT = Tile(1, 2, 4, 8)  # 3.29; (1, 2, 8, 4) 3.45, (1, 1, 4, 8) 3.53


# ---- launches --------------------------------------------------------------------------------------------------------


class _Launch:
    """Sizes, chunks, prepared rows and options that forward and backward share."""

    def __init__(self, q, k, v, b, g, prior, bonus, spread, M0, I0, offsets, scale, before, variance, back):
        self.chunk = CHUNK_BACK if back else CHUNK
        self.q, self.k, self.v, self.b, self.g = (x.contiguous() for x in (q, k, v, b, g))
        self.M0, self.I0, self.offsets = M0, I0, offsets
        self.prior = prior.contiguous()
        self.spread = self.k if spread is None else spread.contiguous()
        self.bonus = self.prior if bonus is None else bonus.contiguous()
        self.H, self.K, self.V, self.N = q.shape[2], q.shape[3], v.shape[3], offsets.shape[0] - 1
        self.tokens, self.scale = q.shape[0] * q.shape[1], scale
        self.slots = self.tokens // self.chunk + self.N
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        # a block's share of sums over keys is rounded once more where they end as bfloat16: shares are most of what is moved
        half = q.dtype == v.dtype == b.dtype == torch.bfloat16
        self.share = torch.bfloat16 if half else self.wide
        self.gate = {"WIDE": g.ndim == 4, "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32}
        self.given, self.before = {"GIVEN": spread is not None}, {"BEFORE": before}
        self.read = {"PRIOR": prior.ndim, "BONUS": bonus is not None, "VARIANCE": variance} | self.before
        self.products = self._products()
        self._prepare(back)

    def _products(self) -> dict:
        """How writes are multiplied. bfloat16 values are exact as they are, and the keys' factors are split in two of them (an
        interpreted product of bfloat16 is wrong: float32 there); otherwise tf32 for half precision, which float16 overflows."""
        if self.v.dtype == self.b.dtype == torch.bfloat16 and not triton.knobs.runtime.interpret:
            return {"DT": tl.bfloat16, "PRECISION": "ieee"}
        half = self.q.dtype in (torch.bfloat16, torch.float16)
        return {"DT": self.gate["ACC"], "PRECISION": "tf32" if half else "ieee"}

    def _prepare(self, back: bool) -> None:
        """Rows of keys and queries with the factors of `forward.prepare`, and gates of segments."""
        sizes = self.tokens, self.H, self.K
        self.rows = self.new(*sizes[:2], 4 if back else 3, self.K)
        self.f, self.c = (self.new(*sizes[: self.g.ndim - 1]) for _ in range(2))
        self.flags = self.new(*sizes[:2], dtype=torch.int32)
        forward.prepare[(self.slots, self.H)](
            self.q, self.k, self.spread, self.g, self.offsets, self.rows, self.f, self.c, self.flags, self.scale, self.N, self.H, self.K,
            C=self.chunk, BLOCK=MARK, BK=power(self.K), BACK=back, **self.given, **self.before, **self.gate, num_warps=4,
        )  # fmt: skip

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.q.new_empty(shape, dtype=dtype or self.wide)

    def groups(self, bytes_per_head: int) -> list[tuple[int, int]]:
        """(first head, heads) of groups whose buffers fit a slab."""
        at_once = max(1, SLAB // bytes_per_head)
        at_once = -(-self.H // -(-self.H // at_once))  # groups of about the same size
        return [(h, min(at_once, self.H - h)) for h in range(0, self.H, at_once)]

    def tile(self, tile: Tile) -> tuple[dict, int, int]:
        """Options of a tile that fits, and the number of key and value blocks."""
        tile = tile.fit(self.K, self.V)
        NK, NV = blocks(self.K, tile.BK), blocks(self.V, tile.BV)
        options = {
            **tile._asdict(),
            "NK": NK,
            "NV": NV,
            "KFULL": self.K % tile.BK == 0,
            "VFULL": self.V % tile.BV == 0,
        }
        options |= {**self.gate, **self.read, "FAST": self.q.is_cuda, "num_warps": 1}
        return options, NK, NV

    def scan(self, X: tuple, total: Tensor, starts: tuple, lasts: tuple, h0: int, heads: int, back: bool) -> None:
        step, block = SCAN
        grid = (blocks(self.K * self.V, block) * self.N, heads)
        forward.scan[grid](
            *X, total, self.offsets, *strided(*starts), *lasts, h0, self.H, self.K, self.V,
            C=self.chunk, STEP=step, BLOCK=block, BACK=back, **self.gate, num_warps=1,
        )  # fmt: skip

    def boundaries(self, h0: int, heads: int, M_T: Tensor, I_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States at the chunks' starts, [slots, heads, K, V], and the chunks' log decays."""
        M, I = (self.new(self.slots, heads, self.K, self.V) for _ in range(2))
        total = self.new(self.slots, heads, *self.g.shape[3:])
        BK, BV = (max(16, min(n, power(x))) for n, x in zip(DEPOSITS[1:], (self.K, self.V), strict=True))
        tiles = blocks(self.K, BK) * blocks(self.V, BV)
        writes = self.k, self.spread, self.v, self.b, self.g, self.offsets, M, I, total
        BT = min(2 * DEPOSITS[0] // self.q.element_size(), self.chunk)
        options = {"C": self.chunk, "BT": BT, "BK": BK, "BV": BV, "num_warps": 4}
        options |= {**self.products, **self.given, **self.gate}
        if self.N * heads * tiles >= WALK * self.chunk:
            forward.walk[(self.N * tiles, heads)](
                *writes, *strided(self.M0, self.I0), M_T, I_T, h0, self.H, self.K, self.V, **options
            )  # fmt: skip
        else:
            forward.deposits[(self.slots * tiles, heads)](*writes, self.N, h0, self.H, self.K, self.V, **options)
            self.scan((M, I), total, (self.M0, self.I0), (M_T, I_T), h0, heads, False)
        return M, I, total

    def add(self, parts: Tensor, outs: tuple[Tensor, ...], h0: int) -> None:
        """out[:, h0 : h0 + heads] = the sum of the blocks in `parts` [blocks, tokens, heads, outs, V], for each of one or two."""
        heads, count, V = parts.shape[2:]
        rows = max(1, SUMMED // power(V))
        forward.total[(blocks(self.tokens * heads, rows),)](
            parts, outs[0], outs[-1], len(parts), self.tokens, heads, h0, self.H, V,
            TWO=count == 2, ROWS=rows, BLOCK=power(V), ACC=self.gate["ACC"], num_warps=4,
        )  # fmt: skip


def _forward(at: _Launch, variance: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o = at.q.new_empty(*at.q.shape[:3], at.V)
    var = torch.empty_like(o) if variance else o.new_empty(0)
    M_T, I_T = at.new(*at.M0.shape), at.new(*at.M0.shape)
    options, NK, NV = at.tile(READ)
    for h0, heads in at.groups(8 * at.slots * at.K * at.V + at.share.itemsize * NK * at.tokens * at.V * (1 + variance)):
        M, I, _ = at.boundaries(h0, heads, M_T, I_T)
        parts = at.new(NK, at.tokens, heads, 1 + variance, at.V, dtype=at.share)
        forward.read[(at.slots * NK * NV, heads)](
            at.rows, at.k, at.v, at.b, at.f, at.c, at.flags, at.prior, at.bonus, M, I, at.offsets, parts,
            at.N, at.tokens, h0, H=at.H, K=at.K, V=at.V, C=at.chunk, **options,
        )  # fmt: skip
        at.add(parts, (o, var) if variance else (o,), h0)
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
        self.marks = at.chunk // MARK + 1
        self.exact = at.q.element_size() > 2  # half precision needs no gradient of a gate as fine as float32's sums
        self.sums = (6 if at.read["BONUS"] else 5 if at.read["VARIANCE"] else 4) + self.exact

    def bytes_per_head(self) -> int:
        at = self.at
        _, NK, NV = at.tile(GRADIENT)
        state, keys, values = at.slots * at.K * at.V, at.tokens * at.K * NV, at.tokens * at.V * NK
        return 4 * (state * (2 + 2 * self.marks) + self.sums * keys) + 2 * at.share.itemsize * values

    def run(self, h0: int, heads: int) -> None:
        at = self.at
        M, I, total = at.boundaries(h0, heads, torch.empty_like(self.dM0), torch.empty_like(self.dM0))
        marks = self._adjoint(h0, heads, M, I)
        at.scan((M, I), total, (self.dM_T, self.dI_T), (self.dM0, self.dI0), h0, heads, True)
        self._finish(h0, heads, *self._gradient(h0, heads, M, I, marks))

    def _adjoint(self, h0, heads, M, I):
        at = self.at
        options, NK, NV = at.tile(ADJOINT)
        full = torch.zeros_like(M) if at.prior.ndim == 3 else M
        marks = at.new(at.slots, heads, self.marks, 2, at.K, at.V)
        backward.adjoint[(at.slots * NK * NV, heads)](
            at.rows, at.k, at.v, at.b, at.f, at.c, at.flags, at.prior, at.bonus, self.d_o, self.d_var, M, I,
            at.offsets, full, marks, at.N, h0, H=at.H, K=at.K, V=at.V, C=at.chunk, MARK=MARK, maxnreg=REGISTERS, **options,
        )  # fmt: skip
        if at.prior.ndim == 3:
            self.d_full[h0 : h0 + heads] = full.sum(0)
        return marks

    def _gradient(self, h0, heads, DM, DI, marks) -> tuple[Tensor, Tensor]:
        """Sums over values, a share for each block of them [value block, tokens, heads, sums, K]; and at chunks' ends."""
        at = self.at
        options, NK, NV = at.tile(GRADIENT)
        by_key = at.new(NV, at.tokens, heads, self.sums, at.K)
        by_value = at.new(NK, at.tokens, heads, 2, at.V, dtype=at.share)
        ends = at.new(NV, at.slots, heads, at.K)
        backward.gradient[(at.slots * NK * NV, heads)](
            at.rows, at.k, at.v, at.b, at.f, at.c, at.flags, at.prior, at.bonus, self.d_o, self.d_var, DM, DI, at.offsets,
            marks, by_key, by_value, ends, at.N, at.tokens, at.slots, h0, H=at.H, K=at.K, V=at.V,
            C=at.chunk, MARK=MARK, LIMIT=LIMIT.get(at.q.dtype, LIMIT_HALF), SUMS=self.sums,
            EXACT=self.exact, **options,
        )  # fmt: skip
        at.add(by_value, (self.dv, self.db), h0)
        return by_key, ends

    def _finish(self, h0, heads, by_key, ends):
        at = self.at
        backward.finish[(at.slots, heads)](
            at.q, at.k, at.spread, at.f, at.prior, at.bonus, at.offsets, by_key, ends, self.dq, self.dk, self.d_spread, self.dg,
            self.d_prior, self.d_bonus, at.scale, at.N, at.tokens, at.slots, h0, at.H, at.K, len(ends),
            C=at.chunk, SUMS=self.sums, EXACT=self.exact, BK=32, **at.gate, **at.given, **at.read, num_warps=8,
        )  # fmt: skip

    def prior(self) -> Tensor:
        if self.at.prior.ndim == 3:
            return self.d_full
        return self.d_prior.sum((0, 2) if self.at.prior.ndim == 1 else 0)


# ---- operators -------------------------------------------------------------------------------------------------------


@operator("elementwise")
def _op(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor, prior: Tensor, bonus: Tensor | None, spread: Tensor | None,
    M0: Tensor, I0: Tensor, offsets: Tensor, scale: float, before: bool, variance: bool,
) -> list[Tensor]:  # fmt: skip
    at = _Launch(q, k, v, b, g, prior, bonus, spread, M0, I0, offsets, scale, before, variance, False)
    return list(_forward(at, variance))


@_op.register_fake
def _(q, k, v, b, g, prior, bonus, spread, M0, I0, offsets, scale, before, variance):
    o = q.new_empty(*q.shape[:3], v.shape[3])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    last = [M0.new_empty(M0.shape, dtype=wide) for _ in range(2)]
    return [o, torch.empty_like(o) if variance else o.new_empty(0), *last]


@operator("elementwise_backward")
def _op_backward(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor, prior: Tensor, bonus: Tensor | None, spread: Tensor | None,
    M0: Tensor, I0: Tensor, offsets: Tensor, scale: float, before: bool, variance: bool,
    d_o: Tensor, d_variance: Tensor, dM_T: Tensor, dI_T: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, b, g, prior, bonus, spread, M0, I0; empty where an argument is missing."""
    at = _Launch(q, k, v, b, g, prior, bonus, spread, M0, I0, offsets, scale, before, variance, True)
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


def _gradients(ctx, d_o, d_variance, dM_T, dI_T):
    args = ctx.saved_tensors
    out = _op_backward(*args, ctx.scale, ctx.before, ctx.variance, d_o, d_variance, dM_T, dI_T)
    out = [None if x is None else y for x, y in zip(args[:10], out, strict=True)]
    return *out, None, None, None, None


_op.register_autograd(_gradients, _keep)


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
