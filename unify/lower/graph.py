"""The torch backend inside a graph of torch.compile: one operator, which Inductor does not look into.

Traced tensor by tensor it became some hundred nodes, compiled in 30 to 130 s, ran no faster than it does by itself, and Inductor
computed some of them wrongly (kernels/NOTES.md). As an operator it has free lengths and may look at the values of offsets.
Its backward runs the forward again: a graph cannot carry what autograd keeps.
"""

from __future__ import annotations

import torch
from torch import _C, Tensor

from unify.kernels.operator import operator
from unify.op import check_offsets, uncast

from .triton import content_key

REGISTRY: dict[str, object] = {}  # content key -> the op


def prepared(op) -> str:
    """The op's key, under which the operators know it from here on."""
    key = content_key(f"{op.backend} {op.triple!r}")
    REGISTRY[key] = op
    return key


def run(op, inputs: dict[str, Tensor], state: tuple, offsets: Tensor | None, variance: bool, scale: float):
    """`op.schedules` as an operator: o [B, T, H, V], the variance or None, and the final states."""
    given = [inputs[x.name] for x in op.recurrence.inputs]
    o, var, *final = torch.ops.unify.torch(prepared(op), given, list(state), offsets, variance, scale)
    return o, var if variance else None, tuple(final)


def _call(key: str, inputs: list[Tensor], state: list[Tensor], offsets: Tensor | None, variance: bool, scale: float):
    op, q = REGISTRY[key], inputs[0]
    if offsets is not None:
        check_offsets(offsets.tolist(), q.shape[1])
    with uncast(q.device.type):
        o, var, final = op.schedules(_named(op, inputs), tuple(state), offsets, variance, scale)
    return [o, *([var] if variance else []), *final]


def _named(op, inputs: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip((x.name for x in op.recurrence.inputs), inputs, strict=True))


@operator("torch")
def forward(
    key: str, inputs: list[Tensor], state: list[Tensor], offsets: Tensor | None, variance: bool, scale: float
) -> list[Tensor]:
    """inputs: the op's arguments in its recurrence's order; state: [N, H, ...]; offsets: int64 [N + 1] or None, N = B.

    Returns [o, variance (empty if not asked for), *final states].
    """
    with torch.no_grad():
        out = _call(key, inputs, state, offsets, variance, scale)
    out = [x.clone(memory_format=torch.contiguous_format) for x in out]  # laid out as said, and nobody else's
    return out if variance else [out[0], out[0].new_empty(0), *out[1:]]


@forward.register_fake
def _(key, inputs, state, offsets, variance, scale):
    named = _named(REGISTRY[key], inputs)
    o = named["q"].new_empty([*named["q"].shape[:3], named["v"].shape[-1]])
    return [o, torch.empty_like(o) if variance else o.new_empty(0), *(x.new_empty(x.shape) for x in state)]


@operator("torch_backward")
def backward(
    key: str,
    inputs: list[Tensor],
    state: list[Tensor],
    offsets: Tensor | None,
    variance: bool,
    scale: float,
    gradients: list[Tensor],
) -> list[Tensor]:
    """Gradients of the inputs, then of the initial states, zeros where there is none. gradients: of `forward`'s results."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, *state)]
    # the body of an operator stands below autograd, which is wanted here
    with _C._SetExcludeDispatchKeyGuard(_C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        out = _call(key, leaves[: len(inputs)], leaves[len(inputs) :], offsets, variance, scale)
        given = gradients if variance else [gradients[0], *gradients[2:]]
        outs, given = zip(*((x, y) for x, y in zip(out, given, strict=True) if x.requires_grad), strict=True)
        found = torch.autograd.grad(outs, leaves, given, materialize_grads=True)
    return [x.clone(memory_format=torch.contiguous_format) for x in found]


@backward.register_fake
def _(key, inputs, state, offsets, variance, scale, gradients):
    return [x.new_empty(x.shape) for x in (*inputs, *state)]


def _keep(ctx, arguments, results):
    ctx.key, inputs, state, offsets, ctx.variance, ctx.scale = arguments
    ctx.count, ctx.packed = len(inputs), offsets is not None
    ctx.save_for_backward(*inputs, *state, *([offsets] if ctx.packed else []))


def _back(ctx, *gradients):
    saved = list(ctx.saved_tensors)
    offsets = saved.pop() if ctx.packed else None
    inputs, state = saved[: ctx.count], saved[ctx.count :]
    found = backward(ctx.key, inputs, state, offsets, ctx.variance, ctx.scale, list(gradients))
    return None, *found, None, None, None


forward.register_autograd(_back, _keep)
