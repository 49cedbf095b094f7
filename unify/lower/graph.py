"""The torch backend inside a graph of torch.compile: one operator, which Inductor does not look into.

Traced tensor by tensor it became some hundred nodes that took 20 to 120 s to compile, ran no faster than by themselves for three
models of four, and some of which Inductor computed wrongly (kernels/NOTES.md). An operator has free lengths and may look at offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unify.op import Op, check_offsets, uncast

from .triton import content_key


def prepared(op: Op) -> tuple[str, list[str]]:
    """The op's key, under which the operator knows it from here on, and the order of its arguments, q first."""
    from unify.kernels.called import REGISTRY

    names = ["q", *(x.name for x in op.recurrence.inputs if x.name != "q")]

    def schedules(inputs: list[Tensor], state: list[Tensor], offsets: Tensor | None, variance: bool, scale: float):
        if offsets is not None:
            check_offsets(offsets.tolist(), inputs[0].shape[1])
        with uncast(inputs[0].device.type):
            o, var, final = op.schedules(dict(zip(names, inputs, strict=True)), tuple(state), offsets, variance, scale)
        return [o, *([var] if variance else []), *final]

    key = content_key(f"{op.backend} {op.triple!r}")
    REGISTRY[key] = schedules
    return key, names


def run(op: Op, inputs: dict[str, Tensor], state: tuple, offsets: Tensor | None, variance: bool, scale: float):
    """`op.schedules` as an operator: o [B, T, H, V], the variance or None, and the final states."""
    key, names = prepared(op)
    given = [inputs[name] for name in names]
    o, var, *final = torch.ops.unify.called(key, given, list(state), offsets, variance, scale, inputs["v"].shape[-1])
    return o, var if variance else None, tuple(final)
