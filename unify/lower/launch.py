"""Recurrence -> Triton kernels on packed sequences: the plan's family where it pays, the printed recurrent family otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from unify.errors import UnifyError
from unify.plan import Plan
from unify.recurrence import Recurrence
from unify.structure import Structure

from .triton import Module, module

SHORT = 32  # tokens a sequence: below this a chunk is mostly empty and the recurrent family decodes


class Kernels:
    """The schedules as Triton kernels over packed sequences; the signature is `parallel.Chunked`'s.

    offsets: int64 [N + 1]; steps: steps of the mean state per token, which lengthen what the mean state sees.
    """

    def __init__(self, offsets: Tensor, steps: int):
        self.offsets, self.steps = offsets, steps

    def coefficients(self, seq):
        """What one printed kernel computes of what is asked for, by name, and the last values of the small states it scans."""
        from unify.kernels.coefficients import REGISTRY

        from . import coefficients

        printed = coefficients.module(seq.request)
        if printed is None:
            return {}, {}
        if printed.key not in REGISTRY:
            REGISTRY[printed.key] = (printed.load(), printed)
        given = [seq.inputs[x.argument] for x in printed.inputs]
        states, sizes = [seq.state[x.name] for x in printed.states], [*seq.shape, seq.width]
        out = torch.ops.unify.coefficients(printed.key, given, states, self.offsets, seq["scale"], sizes, seq.dtype)
        ready = dict(zip((x.name for x in printed.outputs), out, strict=False))
        ends = out[len(printed.outputs) :]
        return ready, dict(zip((x.name for x in printed.states), ends, strict=False))

    @cached_property
    def stretched(self) -> Tensor:
        """Offsets in steps of the mean state."""
        return self.offsets * self.steps if self.steps > 1 else self.offsets

    def linear(self, q, k, v, g, s0, *, scale, before):
        """Decayed sum of outer products, read linearly."""
        from unify.kernels.linear import linear

        return linear(q, k, v, g, s0, self.stretched, scale=scale, before=before)

    def rank_one(self, q, r, w, k, v, g, s0, *, scale, before):
        """Diagonal plus rank-one transitions."""
        from unify.kernels.rank_one import rank_one

        return rank_one(q, r, w, k, v, g, s0, self.stretched, scale=scale, before=before)

    def elementwise(self, q, k, v, b, g, prior, M0, I0, **options):
        """Two decayed sums, divided entry by entry at the read."""
        from unify.kernels.elementwise import elementwise

        return elementwise(q, k, v, b, g, prior, M0, I0, self.stretched, **options)

    def solve(self, q, k, v, gain, g, prior, M0, P0, *, scale, before, variance, ridge, mix):
        """Two decayed sums, the read a solve with one of them."""
        from unify.kernels.linear import linear
        from unify.kernels.solve import solve

        if ridge is not None:  # a few percent of P: what it lets through nearly cancels, too fine for half precision
            q, k, v, g = (x.to(gain.dtype) for x in (q, k, v, g))
            prior = self._ridge(k, gain, g, P0, ridge)
        x, P = solve(q, k, gain, g, prior, P0, self.stretched, before=before)
        read = x if mix is None else (q + mix[..., None] * (x - q)).to(q.dtype)
        o, M = linear(read, k, v, g, M0, self.stretched, scale=scale, before=before)
        var = scale**2 * (q.to(gain.dtype) * x).sum(-1, keepdim=True).expand(v.shape) if variance else None
        return o, var, M, P

    def _ridge(self, k, gain, g, P0, ridge):
        """ridge ||P_t||_F, [B, T, H, 1], and 1 where P = 0.

        ||a P + b k k^T||^2 = a^2 ||P||^2 + 2 a b k^T P k + (b k^T k)^2: a decayed sum, driven by a read of the memory P.
        """
        from unify.kernels.linear import linear
        from unify.kernels.scan import decayed_sum

        written = gain[..., None] * k
        seen, _ = linear(k, k, written, g, P0, self.stretched, scale=1.0, before=True)
        drive = (
            2 * g.exp()[..., None] * (written * seen).sum(-1, keepdim=True) + (written * k).sum(-1, keepdim=True) ** 2
        )
        start = (P0 * P0).sum((-2, -1))[..., None]
        square, _ = decayed_sum(2 * g[..., None], drive, start, self.stretched)
        some = square > 0
        return torch.where(some, ridge[:, None] * torch.where(some, square, 1.0).sqrt(), 1.0)

    def decayed_sum(self, g, x, x0):
        """A small autonomous state at every token, and its last value."""
        from unify.kernels.scan import decayed_sum

        if x.ndim == 3:
            states, last = decayed_sum(g[..., None], x[..., None], x0[..., None], self.offsets)
            return states[..., 0], last[..., 0]
        return decayed_sum(g, x, x0, self.offsets)

    def previous(self, start, states):
        """The state each token finds."""
        flat = states.flatten(0, 1)
        shifted = torch.cat([flat[:1], flat[:-1]])
        return shifted.index_copy(0, self.offsets[:-1], start).view_as(states)


# plan families with kernels of their own; the rest run recurrently
FAMILIES = ("linear", "rank one", "elementwise", "solve")


def prepared(recurrence: Recurrence) -> Module:
    """The printed module, imported and known to the launcher. Raises UnifyError where Triton is missing."""
    try:
        from unify.kernels.recurrent import REGISTRY
    except ImportError as error:
        raise UnifyError(
            "backend='triton'",
            f"Triton cannot be imported ({error})",
            "install triton 3.6 or later, or use backend='torch'",
        ) from error
    printed = module(recurrence)
    if printed.key not in REGISTRY:
        REGISTRY[printed.key] = (printed.load(), printed)
    return printed


def run(
    recurrence: Recurrence,
    structure: Structure,
    plan: Plan,
    inputs: Mapping[str, Tensor],
    state: tuple,
    offsets: Tensor,
    scale: float,
    variance: bool,
):
    """Run packed sequences: o [B, T, H, V], the variance or None, and the final states [N, H, ...]."""
    q = inputs["q"]
    tokens = q.shape[0] * q.shape[1]
    if _parallel(structure, plan, q) and tokens >= SHORT * (offsets.shape[0] - 1):
        from . import parallel

        schedule = Kernels(offsets, plan.micro)
        o, var, end = parallel.run(recurrence, structure, plan, inputs, state, scale, variance, schedule)
        return o.to(q.dtype), var.to(q.dtype) if variance else None, end
    return recurrent(recurrence, inputs, state, offsets, scale, variance)


def _parallel(structure: Structure, plan: Plan, q: Tensor) -> bool:
    """Whether the plan's family has kernels, and its small states are scans (a nonlinear one goes token by token)."""
    if plan.family == "solve":
        from unify.kernels.solve import fits

        if not fits(q):
            return False
    return plan.family in FAMILIES and all(x.decay is not None for x in structure.autonomous)


def recurrent(
    recurrence: Recurrence, inputs: Mapping[str, Tensor], state: tuple, offsets: Tensor, scale: float, variance: bool
):
    """The printed kernels, token by token."""
    printed = prepared(recurrence)
    given = [inputs[name] for name in dict.fromkeys(x.argument for x in printed.inputs)]
    marks = torch.is_grad_enabled() and any(x.requires_grad for x in (*given, *state))
    out = torch.ops.unify.recurrent(printed.key, given, list(state), offsets, scale, variance, marks)
    return out[0], out[1] if variance else None, tuple(out[2 : 2 + len(state)])
