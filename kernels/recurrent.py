"""The recurrent family: runs any printed recurrence token by token, forward and backward.

One program holds all key channels and a block of value channels of one head, so the state never leaves the chip between
tokens. The backward replays segments from marks left every `EVERY` tokens; nothing is ever divided by a decay. Every
gradient is a sum in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from unify.kernels.operator import operator

EVERY = 64  # tokens between marks
TILE = 4096  # entries of a [K, V] tile that one program may hold
REGISTRY: dict[str, tuple] = {}  # content key -> (imported module, printed Module)


def blocks(K: int, V: int, square: bool = False, back: bool = False) -> tuple[int, int, int]:
    """Block sizes (BK, BV) and warps: all key channels, and as many value channels as a tile holds.

    square: a state is [K, K], which every block of value channels updates and solves anew. So forward there is one block
    (up to K channels) and many warps; the backward holds the square three times, and leaves the values little room.
    """
    BK = triton.next_power_of_2(K)
    room = BK if square and not back else TILE // (BK * (2 if square else 1))
    BV = max(min(triton.next_power_of_2(V), room), 1)
    if square:
        return BK, BV, min(max(BK * BK // 1024, 2), 16)
    return BK, BV, 4 if BK * BV >= 2048 else 2


def _acc(q: Tensor):
    return triton.language.float64 if q.dtype == torch.float64 else triton.language.float32


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _marks_at(offsets: Tensor) -> Tensor:
    """First mark of each sequence, [N]."""
    counts = (offsets[1:] - offsets[:-1] + EVERY - 1) // EVERY
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))[:-1].contiguous()


def _mark_count(tokens: int, sequences: int) -> int:
    """An upper bound on the number of marks that needs no look at the offsets."""
    return tokens // EVERY + sequences


def _shape(dims: tuple[str, ...], K: int, V: int) -> list[int]:
    return [V if d == "i" else K for d in dims]


class _Launch:
    """Sizes and grid that forward and backward share."""

    def __init__(self, key: str, inputs: list[Tensor], offsets: Tensor, back: bool = False):
        self.code, self.spec = REGISTRY[key]
        names = list(dict.fromkeys(x.argument for x in self.spec.inputs))
        self.inputs = dict(zip(names, (x.contiguous() for x in inputs), strict=True))
        q, v = self.inputs["q"], self.inputs["v"]
        self.q, self.H, self.K, self.V = q, q.shape[2], q.shape[3], v.shape[3]
        self.tokens, self.N = q.shape[0] * q.shape[1], offsets.shape[0] - 1
        square = any(s.dims == ("j", "l") for s in self.spec.states)
        self.BK, self.BV, warps = blocks(self.K, self.V, square, back)
        self.blocks = -(-self.V // self.BV)
        self.rows = self.N * self.H
        self.grid = (self.blocks, self.rows)
        self.options = {
            "BK": self.BK,
            "BV": self.BV,
            "ACC": _acc(q),
            "num_warps": warps,
        }

    def per_state(self, *lead: int) -> list[Tensor]:
        """One empty buffer a state, [*lead, channels]."""
        return [
            self.q.new_empty([*lead, *_shape(s.dims, self.K, self.V)], dtype=_wide(self.q)) for s in self.spec.states
        ]


@operator("recurrent")
def recurrent(
    key: str, inputs: list[Tensor], state: list[Tensor], offsets: Tensor, scale: float, variance: bool, marks: bool
) -> list[Tensor]:
    """Forward over packed sequences.

    inputs: the op's arguments in the printed module's order, [B, T, H, ...] or static [H, ...]; state: [N, H, ...];
    offsets: int64 [N + 1] into the flattened tokens B T.
    Returns [o, variance (empty if not asked for), *final states, *marks (empty if not asked for)].
    """
    at = _Launch(key, inputs, offsets)
    o = at.q.new_empty([*at.q.shape[:3], at.V])
    var = torch.empty_like(o) if variance else o.new_empty(0)
    ends = at.per_state(at.N, at.H)
    kept = at.per_state(_mark_count(at.tokens, at.N) if marks else 0, at.H)
    buffers = (*ends, *kept, o, var, offsets, _marks_at(offsets) if marks else offsets)  # decoding launches one kernel
    sizes = (scale, at.H, at.K, at.V, EVERY)
    start = (x.contiguous() for x in state)
    at.code.forward[at.grid](
        *at.inputs.values(), *start, *buffers, *sizes, VARIANCE=variance, MARKS=marks, **at.options
    )
    return [o, var, *ends, *kept]


@recurrent.register_fake
def _(key, inputs, state, offsets, scale, variance, marks):
    at = _Launch(key, inputs, offsets)
    o = at.q.new_empty([*at.q.shape[:3], at.V])
    kept = at.per_state(_mark_count(at.tokens, at.N) if marks else 0, at.H)
    return [o, torch.empty_like(o) if variance else o.new_empty(0), *at.per_state(at.N, at.H), *kept]


@operator("recurrent_backward")
def recurrent_backward(
    key: str,
    inputs: list[Tensor],
    marks: list[Tensor],
    offsets: Tensor,
    scale: float,
    d_o: Tensor,
    d_variance: Tensor,
    d_ends: list[Tensor],
) -> list[Tensor]:
    """Gradients of the inputs (in order, empty where there is none), then of the initial states."""
    at = _Launch(key, inputs, offsets, back=True)
    grads = _gradient_buffers(at)
    starts = _start_buffers(at)
    ends = (x.contiguous() for x in d_ends)
    buffers = (*marks, *at.per_state(at.blocks * at.rows, EVERY), *ends, *grads.values(), *starts)
    outside = (d_o.contiguous(), d_variance.contiguous(), offsets, _marks_at(offsets))
    sizes = (scale, at.H, at.K, at.V, at.tokens, at.rows, EVERY)
    at.code.backward[at.grid](
        *at.inputs.values(), *buffers, *outside, *sizes, VARIANCE=d_variance.numel() > 0, **at.options
    )
    slots = {x.argument: x for x in at.spec.inputs}
    out = []
    for name, x in at.inputs.items():
        out.append(_summed(grads[name], slots[name]).to(x.dtype) if name in grads else x.new_empty(0))
    return out + [x if "i" in s.dims else x.sum(0) for x, s in zip(starts, at.spec.states, strict=True)]


def _gradient_buffers(at: _Launch) -> dict[str, Tensor]:
    """One buffer for each argument with a gradient; without value channels, one share per block of them."""
    out = {}
    for x in at.spec.inputs:
        if x.name in at.spec.graded and x.argument not in out:
            shape = (
                [at.N, at.H, *_shape(x.dims, at.K, at.V)] if x.per == "static" else list(at.inputs[x.argument].shape)
            )
            out[x.argument] = at.q.new_empty(shape if "i" in x.dims else [at.blocks, *shape], dtype=_wide(at.q))
    return out


def _start_buffers(at: _Launch) -> list[Tensor]:
    """Gradients of the initial states; without value channels, one share per block of them."""
    out = []
    for s in at.spec.states:
        shares = [] if "i" in s.dims else [at.blocks]
        out.append(at.q.new_empty([*shares, at.N, at.H, *_shape(s.dims, at.K, at.V)], dtype=_wide(at.q)))
    return out


def _summed(grad: Tensor, slot) -> Tensor:
    """Add the shares of value blocks, and of sequences where the argument is shared by them."""
    grad = grad if "i" in slot.dims else grad.sum(0)
    return grad.sum(0) if slot.per == "static" else grad


@recurrent_backward.register_fake
def _(key, inputs, marks, offsets, scale, d_o, d_variance, d_ends):
    at = _Launch(key, inputs, offsets, back=True)
    graded = {x.argument for x in at.spec.inputs if x.name in at.spec.graded}
    inputs = [x.new_empty(x.shape if name in graded else 0) for name, x in at.inputs.items()]
    return [*inputs, *(x.new_empty(x.shape) for x in d_ends)]


def _keep(ctx, inputs, output):
    key, given, state, offsets, scale, variance, marks = inputs
    count = len(state)
    ctx.key, ctx.scale, ctx.variance, ctx.count, ctx.given = key, scale, variance, count, len(given)
    ctx.save_for_backward(*given, offsets, *output[2 + count :])


def _back(ctx, *grads):
    *rest, = ctx.saved_tensors  # fmt: skip
    given, offsets, marks = rest[: ctx.given], rest[ctx.given], rest[ctx.given + 1 :]
    d_o, d_variance, d_ends = grads[0], grads[1], list(grads[2 : 2 + ctx.count])
    if not ctx.variance:
        d_variance = d_o.new_empty(0)
    out = recurrent_backward(ctx.key, given, marks, offsets, ctx.scale, d_o, d_variance, d_ends)
    inputs = [g if g.numel() else torch.zeros_like(x) for g, x in zip(out[: ctx.given], given, strict=True)]
    return None, *inputs, *out[ctx.given :], None, None, None, None


recurrent.register_autograd(_back, _keep)
