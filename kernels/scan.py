"""Decayed sums of small states: y_t = exp(g_t) y_{t-1} + x_t for every token, by an associative scan inside blocks of tokens.

One program holds a block of channels of one head and walks over blocks of tokens; only sums of logarithms of decays are
formed, so gates of any strength are exact to rounding. Sums have a fixed order: results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unify.kernels.direct import direct
from unify.kernels.operator import operator

TOKENS, CHANNELS = 64, 32


@triton.jit
def _join(g1, x1, g2, x2):
    return g1 + g2, tl.exp(g2) * x1 + x2


@direct
@triton.jit
def _forward(
    g_ptr,
    x_ptr,
    start_ptr,
    y_ptr,
    end_ptr,
    offsets,
    H,
    D,
    per_channel: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, h = row // H, row % H
    first, last = tl.load(offsets + n), tl.load(offsets + n + 1)
    d, rows = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, TOKENS)
    y = tl.load(start_ptr + row * D + d, mask=d < D, other=0.0).to(ACC)
    for begin in range(first, last, TOKENS):
        t = (begin + rows).to(tl.int64)
        live = (t < last)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + ((t * H + h) * D)[:, None] + d[None, :], mask=live, other=0.0).to(ACC)
        g = _decay(g_ptr, t, h, d, H, D, live, per_channel).to(ACC)
        total, own = tl.associative_scan((g, x), 0, _join)
        out = tl.exp(total) * y[None, :] + own
        tl.store(y_ptr + ((t * H + h) * D)[:, None] + d[None, :], out, mask=live)
        y = tl.sum(
            tl.where(rows[:, None] == TOKENS - 1, out, 0.0), 0
        )  # past the end nothing decays, so this is the last
    tl.store(end_ptr + row * D + d, y, mask=d < D)


@triton.jit
def _decay(g_ptr, t, h, d, H, D, live, per_channel: tl.constexpr):
    if per_channel:
        g = tl.load(g_ptr + ((t * H + h) * D)[:, None] + d[None, :], mask=live, other=0.0)
    else:
        g = tl.load(g_ptr + (t * H + h)[:, None] + 0 * d[None, :], mask=live, other=0.0)
    return g


@direct
@triton.jit
def _backward(
    g_ptr,
    dy_ptr,
    d_end_ptr,
    dx_ptr,
    d_start_ptr,
    offsets,
    H,
    D,
    per_channel: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx_t = dy_t + exp(g_{t+1}) dx_{t+1}, backwards over blocks; at the first token exp(g_1) dx_1 is the state's."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, h = row // H, row % H
    first, last = tl.load(offsets + n), tl.load(offsets + n + 1)
    d, rows = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, TOKENS)
    carry = tl.load(d_end_ptr + row * D + d, mask=d < D, other=0.0).to(ACC)
    steps = tl.cdiv(last - first, TOKENS)
    for back in range(0, steps):
        begin = first + (steps - 1 - back) * TOKENS
        t = (begin + rows).to(tl.int64)
        live = (t < last)[:, None] & (d < D)[None, :]
        dy = tl.load(dy_ptr + ((t * H + h) * D)[:, None] + d[None, :], mask=live, other=0.0).to(ACC)
        later = ((t + 1) < last)[:, None] & (d < D)[None, :]
        g = _decay(g_ptr, t + 1, h, d, H, D, later, per_channel).to(ACC)
        own_g = tl.where((t + 1 < tl.minimum(begin + TOKENS, last))[:, None], g, 0.0)
        carry_in = tl.where((t == tl.minimum(begin + TOKENS, last) - 1)[:, None], carry[None, :], 0.0)
        total, dx = tl.associative_scan((own_g, dy + carry_in), 0, _join, reverse=True)
        tl.store(dx_ptr + ((t * H + h) * D)[:, None] + d[None, :], dx, mask=live)
        first_g = _decay(g_ptr, begin.to(tl.int64) + 0 * rows, h, d, H, D, live, per_channel).to(ACC)
        carry = tl.sum(tl.where(rows[:, None] == 0, tl.exp(first_g) * dx, 0.0), 0)
    tl.store(d_start_ptr + row * D + d, carry, mask=d < D)


def _options(x: Tensor, g: Tensor) -> dict:
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    return {
        "per_channel": g.ndim == x.ndim and g.shape[-1] == x.shape[-1],
        "TOKENS": TOKENS,
        "CHANNELS": CHANNELS,
        "ACC": wide,
        "num_warps": 4,
    }


@operator("decayed_sum")
def _sum(g: Tensor, x: Tensor, x0: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    y, end = torch.empty_like(x), torch.empty_like(x0)
    D, H = x.shape[-1], x.shape[-2]
    grid = (triton.cdiv(D, CHANNELS), x0.shape[0] * H)
    _forward[grid](g, x, x0, y, end, offsets, H, D, **_options(x, g))
    return y, end


@_sum.register_fake
def _(g, x, x0, offsets):
    return torch.empty_like(x), torch.empty_like(x0)


@operator("decayed_sum_backward")
def _sum_backward(g: Tensor, dy: Tensor, d_end: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    dx, d_start = torch.empty_like(dy), torch.empty_like(d_end)
    D, H = dy.shape[-1], dy.shape[-2]
    _backward[(triton.cdiv(D, CHANNELS), d_end.shape[0] * H)](
        g, dy, d_end, dx, d_start, offsets, H, D, **_options(dy, g)
    )
    return dx, d_start


@_sum_backward.register_fake
def _(g, dy, d_end, offsets):
    return torch.empty_like(dy), torch.empty_like(d_end)


def _keep(ctx, inputs, output):
    g, x, _, offsets = inputs
    ctx.save_for_backward(g, x, output[0], offsets)


def _back(ctx, dy, d_end):
    g, x, y, offsets = ctx.saved_tensors
    dx, d_start = _sum_backward(g, dy.contiguous(), d_end.contiguous(), offsets)
    dg = dx * (y - x)  # exp(g_t) y_{t-1} dx_t
    return (dg if g.shape == x.shape else dg.sum(-1, keepdim=g.ndim == x.ndim)), dx, d_start, None


_sum.register_autograd(_back, _keep)


def decayed_sum(g: Tensor, x: Tensor, x0: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = exp(g_t) y_{t-1} + x_t over packed sequences.

    g: [B, T, H, 1] or [B, T, H, D], natural-log decays <= 0; x: [B, T, H, D]; x0: [N, H, D]; offsets: int64 [N + 1] over the
    flattened tokens. Returns y [B, T, H, D] and the last value of each sequence [N, H, D], in x's dtype (float32 or float64).
    """
    return torch.ops.unify.decayed_sum(g.contiguous(), x.contiguous(), x0.contiguous(), offsets)
