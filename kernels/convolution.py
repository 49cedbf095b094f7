"""The short convolution that layers put ahead of their memory, each channel by itself, and the silu behind it.

One program holds a block of channels of a slot's tokens (`chunk`) and loads a token again for each tap that reads it, from the cache.
The backward computes again what went into the silu, so only x is kept. Each slot's share of the taps' gradients is stored and added
up in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unify.kernels.chunk import sequence
from unify.kernels.direct import direct
from unify.kernels.operator import operator

C, CHANNELS = 64, 64  # tokens and channels of a program


@triton.jit
def _seen(x, start, s, begin, first, end, n, d, D, W: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """What the slot's tokens find s tokens back, [C, CHANNELS]: x, or what came before its sequence."""
    t = first - s + tl.arange(0, C)
    seen = tl.load(
        x + t[:, None] * D + d[None, :], mask=((t >= begin) & (t < end))[:, None] & (d < D)[None, :], other=0.0
    )
    seen = seen.to(ACC)
    if first == begin:
        back = t - begin + W - 1
        mask = ((back >= 0) & (t < begin))[:, None] & (d < D)[None, :]
        seen += tl.load(start + (n * (W - 1) + back)[:, None] * D + d[None, :], mask=mask, other=0.0).to(ACC)
    return seen


@triton.jit
def _tap(weight, s: tl.constexpr, d, D, W: tl.constexpr, ACC: tl.constexpr):
    """What every channel makes of s tokens back, [1, CHANNELS]."""
    return tl.load(weight + d * W + W - 1 - s, mask=d < D, other=0.0).to(ACC)[None, :]


@triton.jit
def _sum(
    x, weight, bias, start, begin, first, end, n, d, D, BIAS: tl.constexpr, W: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """What goes into the silu."""
    total = tl.zeros([C, d.shape[0]], ACC)
    for s in tl.static_range(W):
        total += _seen(x, start, s, begin, first, end, n, d, D, W, C, ACC) * _tap(weight, s, d, D, W, ACC)
    if BIAS:
        total += tl.load(bias + d, mask=d < D, other=0.0).to(ACC)[None, :]
    return total


@direct
@triton.jit
def _forward(
    x, weight, bias, start, y, offsets, N, D,
    BIAS: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n, begin, first, end = sequence(tl.program_id(0).to(tl.int64), offsets, N, C)
    total = _sum(x, weight, bias, start, begin, first, end, n, d, D, BIAS, W, C, ACC)
    t, out = first + tl.arange(0, C), total / (1.0 + tl.exp(-total))
    tl.store(y + t[:, None] * D + d[None, :], out.to(y.dtype.element_ty), mask=(t < end)[:, None] & (d < D)[None, :])


@direct
@triton.jit
def _slopes(
    dy, x, weight, bias, start, slopes, shares, offsets, N, D,
    BIAS: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of what goes into the silu; shares [slots, W + 1, D]: of the gradients of the taps, s tokens back, and of the bias."""
    slot, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n, begin, first, end = sequence(slot, offsets, N, C)
    total = _sum(x, weight, bias, start, begin, first, end, n, d, D, BIAS, W, C, ACC)
    part, t = 1.0 / (1.0 + tl.exp(-total)), first + tl.arange(0, C)
    at, mask = t[:, None] * D + d[None, :], (t < end)[:, None] & (d < D)[None, :]
    slope = tl.load(dy + at, mask=mask, other=0.0).to(ACC) * part * (1.0 + total * (1.0 - part))
    tl.store(slopes + at, slope, mask=mask)
    share = shares + slot * (W + 1) * D + d
    for s in tl.static_range(W):
        seen = _seen(x, start, s, begin, first, end, n, d, D, W, C, ACC)
        tl.store(share + s * D, tl.sum(slope * seen, 0), mask=d < D)
    tl.store(share + W * D, tl.sum(slope, 0), mask=d < D)


@triton.jit
def _handed(slopes, weight, t, begin, end, d, D, W: tl.constexpr, ACC: tl.constexpr):
    """What tokens t get back from themselves and the W - 1 after them."""
    total = tl.zeros([t.shape[0], d.shape[0]], ACC)
    for s in tl.static_range(W):
        at, mask = (t + s)[:, None] * D + d[None, :], ((t + s >= begin) & (t + s < end))[:, None] & (d < D)[None, :]
        total += tl.load(slopes + at, mask=mask, other=0.0).to(ACC) * _tap(weight, s, d, D, W, ACC)
    return total


@direct
@triton.jit
def _hand_back(
    slopes, weight, dx, d_start, offsets, N, D, W: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """dx_t = sum_s weight_{W-1-s} slope_{t+s}, and the same for what came before the sequence."""
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n, begin, first, end = sequence(tl.program_id(0).to(tl.int64), offsets, N, C)
    t = first + tl.arange(0, C)
    total = _handed(slopes, weight, t, begin, end, d, D, W, ACC)
    tl.store(
        dx + t[:, None] * D + d[None, :], total.to(dx.dtype.element_ty), mask=(t < end)[:, None] & (d < D)[None, :]
    )
    if W > 1 and first == begin:
        r = tl.arange(0, triton.next_power_of_2(W - 1))
        before = _handed(slopes, weight, begin - (W - 1) + r, begin, end, d, D, W, ACC)
        at, mask = d_start + (n * (W - 1) + r)[:, None] * D + d[None, :], (r < W - 1)[:, None] & (d < D)[None, :]
        tl.store(at, before.to(d_start.dtype.element_ty), mask=mask)


def _sizes(x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[tuple[int, int], dict]:
    """The grid, its slots first, and the constants."""
    tokens, D = x.shape[0] * x.shape[1], x.shape[2]
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    grid = tokens // C + offsets.shape[0] - 1, triton.cdiv(D, CHANNELS)
    return grid, {"W": weight.shape[1], "C": C, "CHANNELS": CHANNELS, "ACC": wide, "num_warps": 8}


def _wide(x: Tensor, *shape: int) -> Tensor:
    """An empty tensor of sums."""
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@operator("convolution")
def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, offsets: Tensor) -> Tensor:
    y, (grid, options) = torch.empty_like(x), _sizes(x, weight, offsets)
    given = x, weight, weight if bias is None else bias, start
    _forward[grid](*given, y, offsets, offsets.shape[0] - 1, x.shape[2], BIAS=bias is not None, **options)
    return y


@_convolution.register_fake
def _(x, weight, bias, start, offsets):
    return torch.empty_like(x)


@operator("convolution_backward")
def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of what came before, and [W + 1, D] of the taps, the token's own first, and of the bias."""
    grid, options = _sizes(x, weight, offsets)
    dx, d_start = torch.empty_like(x), torch.empty_like(start)
    slopes, shares = _wide(x, *x.shape), _wide(x, grid[0], weight.shape[1] + 1, x.shape[2])
    given = dy, x, weight, weight if bias is None else bias, start
    sizes = offsets, offsets.shape[0] - 1, x.shape[2]
    _slopes[grid](*given, slopes, shares, *sizes, BIAS=bias is not None, **options)
    _hand_back[grid](slopes, weight, dx, d_start, *sizes, **options)
    return dx, d_start, shares.sum(0)


@_convolution_backward.register_fake
def _(dy, x, weight, bias, start, offsets):
    return torch.empty_like(x), torch.empty_like(start), _wide(x, weight.shape[1] + 1, x.shape[2])


def _keep(ctx, inputs, output):
    x, weight, bias, start, offsets = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight, start, offsets, *([bias] if ctx.biased else []))


def _back(ctx, dy):
    x, weight, start, offsets, *bias = ctx.saved_tensors
    dx, d_start, shares = _convolution_backward(dy.contiguous(), x, weight, *bias or [None], start, offsets)
    taps, last = shares[:-1].flip(0).T.to(weight.dtype), shares[-1]
    return dx, taps, last.to(bias[0].dtype) if ctx.biased else None, d_start, None


_convolution.register_autograd(_back, _keep)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, offsets: Tensor) -> Tensor:
    """silu(bias + sum_w weight_w x_{t - (W - 1) + w}), each channel by itself and never across sequences.

    x: [B, T, D]; weight: [D, W], W <= 65; bias: [D] or None; start: [N, W - 1, D], what came before each sequence; offsets: int64
    [N + 1], where the N sequences begin and end in the flattened B T tokens. Sums are float32 (float64 for float64). Returns
    [B, T, D] in x's type. All but the offsets get gradients.
    """
    given = x.contiguous(), weight.contiguous(), bias, start.to(x.dtype).contiguous()
    return torch.ops.unify.convolution(*given, offsets.to(device=x.device, dtype=torch.int64))
