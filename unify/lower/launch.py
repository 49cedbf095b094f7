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

    @cached_property
    def stretched(self) -> Tensor:
        """Offsets in steps of the mean state."""
        return self.offsets * self.steps

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

    def decayed_sum(self, g, x, x0):
        """A small autonomous state at every token, and its last value."""
        from unify.kernels.scan import decayed_sum

        if x.ndim == 3:
            states, last = decayed_sum(g[..., None], x[..., None], x0[..., None], self.offsets)
            return states[..., 0], last[..., 0]
        return decayed_sum(g, x, x0, self.offsets)

    def previous(self, start, states):
        """The state each token finds."""
        shifted = torch.cat([states[:, :1], states[:, :-1]], 1)
        return shifted.index_copy(1, self.offsets[:-1], start[None])


FAMILIES = ("linear", "rank one", "elementwise")  # plan families with kernels of their own; the rest run recurrently


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
    if _parallel(structure, plan) and tokens >= SHORT * (len(offsets) - 1):
        from . import parallel

        per = {x.name: x.per for x in recurrence.inputs}
        flat = {name: x if per[name] == "static" else x.flatten(0, 1)[None] for name, x in inputs.items()}
        o, var, end = parallel.run(
            recurrence, structure, plan, flat, state, scale, variance, Kernels(offsets, plan.micro)
        )
        unpack = lambda x: x.to(q.dtype).view(*q.shape[:2], *x.shape[2:])  # noqa: E731
        return unpack(o), unpack(var) if variance else None, end
    return recurrent(recurrence, inputs, state, offsets, scale, variance)


def _parallel(structure: Structure, plan: Plan) -> bool:
    """Whether the plan's family has kernels, and its small states are scans (a nonlinear one goes token by token)."""
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
