"""A function of tensors as one operator: a graph of torch.compile calls it, and neither AOT autograd nor Inductor looks into it.

The backward runs the function again: a graph cannot carry what autograd keeps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import _C, Tensor

from unify.kernels.operator import operator

# key -> function(inputs, state, offsets, variance, scale) that returns [o, the variance if it is asked for, *final states]
REGISTRY: dict[str, Callable] = {}


@operator("called")
def called(
    key: str,
    inputs: list[Tensor],
    state: list[Tensor],
    offsets: Tensor | None,
    variance: bool,
    scale: float,
    width: int,
) -> list[Tensor]:
    """inputs: first q, [B, T, H, K]; state: [N, H, ...]; offsets: int64 [N + 1] or None, N = B; width: V.

    Returns [o [B, T, H, V] in q's type, the variance like it (empty if not asked for), *final states, each like its start].
    """
    with torch.no_grad():
        out = REGISTRY[key](inputs, state, offsets, variance, scale)
    out = [x.clone(memory_format=torch.contiguous_format) for x in out]  # laid out as said, and nobody else's
    return out if variance else [out[0], out[0].new_empty(0), *out[1:]]


@called.register_fake
def _(key, inputs, state, offsets, variance, scale, width):
    o = inputs[0].new_empty([*inputs[0].shape[:3], width])
    return [o, torch.empty_like(o) if variance else o.new_empty(0), *(x.new_empty(x.shape) for x in state)]


@operator("called_backward")
def backward(
    key: str,
    inputs: list[Tensor],
    state: list[Tensor],
    offsets: Tensor | None,
    variance: bool,
    scale: float,
    gradients: list[Tensor],
) -> list[Tensor]:
    """Gradients of the inputs, then of the initial states, zeros where there is none. gradients: of `called`'s results."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, *state)]
    # the body of an operator stands below autograd, which is wanted here
    with _C._SetExcludeDispatchKeyGuard(_C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        out = REGISTRY[key](leaves[: len(inputs)], leaves[len(inputs) :], offsets, variance, scale)
        given = gradients if variance else [gradients[0], *gradients[2:]]
        outs, given = zip(*((x, y) for x, y in zip(out, given, strict=True) if x.requires_grad), strict=True)
        found = torch.autograd.grad(outs, leaves, given, materialize_grads=True)
    return [x.clone(memory_format=torch.contiguous_format) for x in found]


@backward.register_fake
def _(key, inputs, state, offsets, variance, scale, gradients):
    return [x.new_empty(x.shape) for x in (*inputs, *state)]


def _keep(ctx, arguments, results):
    ctx.key, inputs, state, offsets, ctx.variance, ctx.scale, _ = arguments
    ctx.count, ctx.packed = len(inputs), offsets is not None
    ctx.save_for_backward(*inputs, *state, *([offsets] if ctx.packed else []))


def _back(ctx, *gradients):
    saved = list(ctx.saved_tensors)
    offsets = saved.pop() if ctx.packed else None
    inputs, state = saved[: ctx.count], saved[ctx.count :]
    found = backward(ctx.key, inputs, state, offsets, ctx.variance, ctx.scale, list(gradients))
    return None, *found, None, None, None, None


called.register_autograd(_back, _keep)
