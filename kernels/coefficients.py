"""Launches the printed coefficient kernels: everything a schedule asks for at every token, in one pass, and its gradient.

A program walks over a block of R tokens of one head. Without small states tokens have nothing to do with each other. With
them, blocks do not cross sequences: they lie in slots as `chunk`'s do, sequence n owning those from offsets[n] // R + n on,
and a pass takes three launches: what each block makes of the states, a scan over blocks, the walk itself from there. The
gradient does the same backwards in time and recomputes every value; nothing is kept but what the states are at the blocks'
starts. Sums have a fixed order: results repeat bit for bit.
"""

from __future__ import annotations

from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from unify.kernels.chunk import blocks, power
from unify.kernels.direct import direct
from unify.kernels.operator import operator

STATEFUL, STATELESS = 32, 8  # tokens of a block
BLOCKS, CHANNELS = 128, 8  # blocks, at most, and channels that the scan over blocks takes at a time
REGISTERS = 64  # of a thread: 32 programs of one warp are all that a multiprocessor takes, and they fill its registers
REGISTRY: dict[str, tuple] = {}  # content key -> (imported module, printed Coefficients)


@triton.jit
def _join(g1, x1, g2, x2):
    """Two runs of blocks: how they decay a state and what they add."""
    return g1 + g2, tl.exp(g2) * x1 + x2


@triton.jit
def _block(total, gain, row, d, D, live, PER_CHANNEL: tl.constexpr):
    """How blocks decay a state and what they add; where none is live, nothing."""
    at = row * D + d if PER_CHANNEL else row + 0 * d
    return tl.load(total + at, mask=live, other=0.0), tl.load(gain + row * D + d, mask=live, other=0.0)


@direct
@triton.jit
def _carry(
    total, gain, start, edges, end, offsets, H, D,
    PER_CHANNEL: tl.constexpr, REVERSE: tl.constexpr, R: tl.constexpr,
    BLOCKS: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What each block finds of a state, edges [slots, H, D], in order of time or against it; and what the last leaves."""
    row = tl.program_id(0).to(tl.int64)
    n, h = row // H, row % H
    first, last = tl.load(offsets + n), tl.load(offsets + n + 1)
    slot, count = first // R + n, tl.cdiv(last - first, R)
    d, at = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, BLOCKS)
    state = tl.load(start + row * D + d, mask=d < D, other=0.0).to(ACC)
    first, step = ((slot + count - 1) * H + h, -H) if REVERSE else (slot * H + h, H)
    for done in range(0, count, BLOCKS):
        here = (first + (done + at) * step)[:, None]
        before = (at > 0) & (done + at <= count)  # a row takes the block before its own, so the first takes none
        g, x = _block(total, gain, here - step, d[None, :], D, before[:, None] & (d < D)[None, :], PER_CHANNEL)
        final = done + BLOCKS - 1
        g_last, x_last = _block(total, gain, first + final * step, d, D, (final < count) & (d < D), PER_CHANNEL)
        g, x = tl.associative_scan((g, x), 0, _join)
        found = tl.exp(g) * state[None, :] + x
        tl.store(edges + here * D + d[None, :], found, mask=(done + at < count)[:, None] & (d < D)[None, :])
        # past the end nothing decays, so the last row is what the last block leaves
        state = tl.exp(g_last) * tl.sum(tl.where(at[:, None] == BLOCKS - 1, found, 0.0), 0) + x_last
    tl.store(end + row * D + d, state, mask=d < D)


class _Launch:
    """Sizes, grid and named buffers that forward and backward share."""

    def __init__(
        self, key: str, inputs: list[Tensor], offsets: Tensor, scale: float, sizes: list[int], dtype: torch.dtype
    ):
        self.code, self.spec = REGISTRY[key]
        self.batch, self.length, self.H, K, V = sizes
        self.size, self.N, tokens = {"j": K, "i": V}, offsets.shape[0] - 1, self.batch * self.length
        self.R = STATEFUL if self.spec.states else STATELESS
        self.slots = tokens // self.R + self.N if self.spec.states else blocks(tokens, self.R)
        self.factor = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.acc = tl.float64 if self.wide == torch.float64 else tl.float32
        self.like, self.offsets = inputs[0], offsets
        self.buffers = {f"{x.argument}_ptr": y.contiguous() for x, y in zip(self.spec.inputs, inputs, strict=True)}
        self.tail = (offsets, scale, self.N, tokens)
        self.pointers = dict(self.spec.kernels)

    @cached_property
    def options(self) -> dict:
        """Constants of the printed kernels and launch options; not for a graph, where sizes may be symbols."""
        BK, BV = map(power, self.size.values())
        sizes = {"H": self.H, "K": self.size["j"], "V": self.size["i"], "R": self.R}
        rows = {d for x in (*self.spec.inputs, *self.spec.outputs, *self.spec.states) for d in x.dims}
        capped = self.acc == tl.float32 and all(self.size[d] <= 128 for d in rows)  # wider rows would not fit
        limits = {"num_warps": max(1, max(BK, BV) // 256)} | ({"maxnreg": REGISTERS} if capped else {})
        return sizes | {"BK": BK, "BV": BV, "ACC": self.acc} | limits

    def new(self, dims: tuple, *lead: int, dtype: torch.dtype | None = None) -> Tensor:
        """An empty buffer [*lead, channels]."""
        return self.like.new_empty([*lead, *(self.size[d] for d in dims)], dtype=dtype or self.wide)

    def run(self, name: str) -> None:
        """Launch a kernel by name, if it was printed."""
        if name in self.pointers:
            pointers = [self.buffers[p] for p in self.pointers[name]]
            getattr(self.code, name)[self.slots * self.H,](*pointers, *self.tail, **self.options)

    def carry(self, x, edge: Tensor, back: bool) -> Tensor:
        """Scan a small state over blocks, or the adjoint of one back: it is next to every block then; returns the end."""
        prefix, near = ("d_", "end") if back else ("", "start")
        gain, edge = self.buffers[f"{prefix}{x.name}_gain_ptr"], edge.contiguous()
        self.buffers[f"{prefix}{x.name}_{near}_ptr"], end = torch.empty_like(gain), torch.empty_like(edge)
        D = self.size[x.dims[0]] if x.dims else 1
        together = min(BLOCKS, max(16, power((self.slots - self.N) // self.N)))
        _carry[self.N * self.H, blocks(D, CHANNELS)](
            self.buffers[f"{x.name}_total_ptr"], gain, edge, self.buffers[f"{prefix}{x.name}_{near}_ptr"], end,
            self.offsets, self.H, D,
            PER_CHANNEL=x.decay == x.dims, REVERSE=back, R=self.R, BLOCKS=together, CHANNELS=CHANNELS, ACC=self.acc,
            num_warps=max(1, together * CHANNELS // 128),
        )  # fmt: skip
        return end

    def outputs(self) -> list[Tensor]:
        """One empty buffer a coefficient."""
        return [
            self.new(x.dims, self.batch, self.length * x.steps, self.H, dtype=self.factor if x.factor else self.wide)
            for x in self.spec.outputs
        ]

    def small(self) -> list[Tensor]:
        """Last states, total log decays of blocks, states at blocks' starts."""
        states = self.spec.states
        ends = [self.new(x.dims, self.N, self.H) for x in states]
        return [
            *ends,
            *(self.new(x.decay, self.slots, self.H) for x in states),
            *(self.new(x.dims, self.slots, self.H) for x in states),
        ]


@operator("coefficients")
def coefficients(
    key: str,
    inputs: list[Tensor],
    states: list[Tensor],
    offsets: Tensor,
    scale: float,
    sizes: list[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Forward over packed sequences.

    inputs: the arguments the printed module reads, in its order, [B, T, H, ...] or static [H, ...]; states: the small
    linear ones, [N, H, ...]; offsets: int64 [N + 1] into the flattened tokens B T; sizes: [B, T, H, K, V]; dtype: of factors.
    Returns [*coefficients [B, T steps, H, ...], *last states, *log decays of blocks, *states at blocks' starts].
    """
    at = _Launch(key, inputs, offsets, scale, sizes, dtype)
    out, small = at.outputs(), at.spec.states
    at.buffers |= {f"c_{x.name}_ptr": y for x, y in zip(at.spec.outputs, out, strict=True)}
    for x in small:
        at.buffers[f"{x.name}_total_ptr"] = at.new(x.decay, at.slots, at.H)
        at.buffers[f"{x.name}_gain_ptr"] = at.new(x.dims, at.slots, at.H)
    at.run("deposit")
    ends = [at.carry(x, start, False) for x, start in zip(small, states, strict=True)]
    at.run("evaluate")
    return [*out, *ends, *(at.buffers[f"{x.name}_{what}_ptr"] for what in ("total", "start") for x in small)]


@coefficients.register_fake
def _(key, inputs, states, offsets, scale, sizes, dtype):
    at = _Launch(key, inputs, offsets, scale, sizes, dtype)
    return [*at.outputs(), *at.small()]


@operator("coefficients_backward")
def coefficients_backward(
    key: str, inputs: list[Tensor], kept: list[Tensor], offsets: Tensor, scale: float, sizes: list[int],
    dtype: torch.dtype, d_outputs: list[Tensor], d_ends: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the inputs that have one, in order, then of the initial states."""
    at = _Launch(key, inputs, offsets, scale, sizes, dtype)
    small = at.spec.states
    at.buffers |= {f"d_c_{x.name}_ptr": y.contiguous() for x, y in zip(at.spec.outputs, d_outputs, strict=True)}
    for x, total, starts in zip(small, kept[: len(small)], kept[len(small) :], strict=True):
        at.buffers |= {f"{x.name}_total_ptr": total, f"{x.name}_start_ptr": starts}
        at.buffers[f"{x.name}_found_ptr"] = at.new(x.dims, at.batch * at.length, at.H, dtype=dtype)
        at.buffers[f"d_{x.name}_gain_ptr"] = torch.empty_like(starts)
    at.run("contribute")
    d_starts = [at.carry(x, d_end, True) for x, d_end in zip(small, d_ends, strict=True)]
    grads = []
    for x in at.spec.inputs:
        if x.argument in at.spec.graded:  # what all tokens share gets a share of its gradient from each block
            like = at.buffers[f"{x.argument}_ptr"]
            grads.append(at.new(x.dims, at.slots, at.H) if x.per == "static" else torch.empty_like(like))
            at.buffers[f"d_{x.argument}_ptr"] = grads[-1]
    at.run("backward")
    graded = [(x, y) for x, y in zip(at.spec.inputs, inputs, strict=True) if x.argument in at.spec.graded]
    shares = zip(graded, grads, strict=True)
    return [d.sum(0).to(y.dtype) if x.per == "static" else d for (x, y), d in shares] + d_starts


@coefficients_backward.register_fake
def _(key, inputs, kept, offsets, scale, sizes, dtype, d_outputs, d_ends):
    at = _Launch(key, inputs, offsets, scale, sizes, dtype)
    graded = [y for x, y in zip(at.spec.inputs, inputs, strict=True) if x.argument in at.spec.graded]
    return [x.new_empty(x.shape) for x in (*graded, *d_ends)]


def _keep(ctx, inputs, output):
    ctx.key, given, states, offsets, ctx.scale, ctx.sizes, ctx.dtype = inputs
    ctx.given, ctx.outputs = len(given), len(output) - 3 * len(states)
    ends = ctx.outputs + len(states)
    ctx.shapes = [(x.shape, x.dtype) for x in output[:ends]]
    ctx.save_for_backward(*given, offsets, *output[ends:])
    ctx.mark_non_differentiable(*output[ends:])
    ctx.set_materialize_grads(False)


def _back(ctx, *grads):
    given, (offsets, *kept) = ctx.saved_tensors[: ctx.given], ctx.saved_tensors[ctx.given :]
    d = [
        offsets.new_zeros(shape, dtype=dtype) if x is None else x
        for x, (shape, dtype) in zip(grads, ctx.shapes, strict=False)
    ]
    found = iter(
        coefficients_backward(
            ctx.key, given, kept, offsets, ctx.scale, ctx.sizes, ctx.dtype, d[: ctx.outputs], d[ctx.outputs :]
        )
    )
    spec = REGISTRY[ctx.key][1]
    inputs = [next(found) if x.argument in spec.graded else None for x in spec.inputs]
    return None, *inputs, *found, None, None, None, None


coefficients.register_autograd(_back, _keep)
