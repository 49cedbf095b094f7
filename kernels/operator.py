"""Functions of tensors as operators of torch: seen by torch.compile, differentiated by autograd, cheap to call.

What `torch.library.custom_op` and its `register_autograd` do is done here with the calls they are made of. They serve any signature,
which costs 20 us more at each call with a gradient and, where arguments or results are lists, twice that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import _C

LIBRARY = torch.library.Library("unify", "FRAGMENT")


class Operator:
    """`torch.ops.unify.NAME`, made of a function without side effects whose annotations are the operator's signature."""

    def __init__(self, name: str, function: Callable):
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=(_C.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")
        self.name, self.overload = name, getattr(torch.ops.unify, name).default
        self.keep, self.back = lambda *_: None, self._refuse
        LIBRARY.impl(name, self._autograd(), "Autograd", with_keyset=True)

    def __call__(self, *arguments):
        return self.overload(*arguments)

    def register_fake(self, fake: Callable) -> Callable:
        """What the results look like, from arguments without data."""
        return torch.library.register_fake(f"unify::{self.name}", fake, lib=LIBRARY)

    def register_autograd(self, back: Callable, keep: Callable) -> None:
        """keep(ctx, arguments, results): what to save, and which results have no gradient. back(ctx, *gradients of the results):
        gradients of the arguments, lists laid out. Without them a gradient through the operator is an error."""
        self.back, self.keep = back, keep

    def _refuse(self, *_):
        raise RuntimeError(f"unify::{self.name} has no gradient: ours can be taken once, not of a gradient again")

    def _autograd(self) -> Callable:
        """What runs ahead of the function where a gradient may be wanted."""
        overload, operator = self.overload, self
        lists = [n for n, x in enumerate(overload._schema.arguments) if str(x.type) == "List[Tensor]"]

        class Gradient(torch.autograd.Function):
            """Autograd sees tensors only that are arguments themselves, so lists come twice: whole, and laid out."""

            @staticmethod
            def forward(ctx, keyset, arguments, *laid_out):
                with _C._AutoDispatchBelowAutograd():
                    results = overload.redispatch(keyset & _C._after_autograd_keyset, *arguments)
                operator.keep(ctx, arguments, results)
                return results if isinstance(results, torch.Tensor) else tuple(results)

            @staticmethod
            def backward(ctx, *gradients):
                return None, None, *operator.back(ctx, *gradients)

        def call(keyset, *arguments):
            if _C.is_grad_enabled() and _C._any_requires_grad(*arguments):
                laid_out = list(arguments)
                for n in reversed(lists):
                    laid_out[n : n + 1] = arguments[n]
                return Gradient.apply(keyset, arguments, *laid_out)
            with _C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & _C._after_autograd_keyset, *arguments)

        return call


def operator(name: str) -> Callable[[Callable], Operator]:
    """Decorator: makes a function the operator `torch.ops.unify.NAME`."""
    return lambda function: Operator(name, function)
