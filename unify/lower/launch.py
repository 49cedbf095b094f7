"""Recurrence -> a launch of its printed kernels, registered with torch.library."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UnifyError
from ..recurrence import Recurrence
from .triton import Module, module


def prepared(recurrence: Recurrence) -> Module:
    """The printed module, imported and known to the launcher. Raises UnifyError where Triton is missing."""
    try:
        from unify.kernels.recurrent import REGISTRY
    except ImportError as error:
        raise UnifyError("backend='triton'", f"Triton cannot be imported ({error})", "install triton 3.6 or later, or use backend='torch'") from error
    printed = module(recurrence)
    if printed.key not in REGISTRY:
        REGISTRY[printed.key] = (printed.load(), printed)
    return printed


def run(recurrence: Recurrence, inputs: Mapping[str, Tensor], state: tuple[Tensor, ...], offsets: Tensor, scale: float, variance: bool):
    """Run packed sequences: o, the variance or None, and the final states."""
    printed = prepared(recurrence)
    given = [inputs[name] for name in dict.fromkeys(x.argument for x in printed.inputs)]
    marks = torch.is_grad_enabled() and any(x.requires_grad for x in (*given, *state))
    out = torch.ops.unify.recurrent(printed.key, given, list(state), offsets, scale, variance, marks)
    return out[0], out[1] if variance else None, tuple(out[2 : 2 + len(state)])
