"""Whatever the strides of its arguments, an operator computes the same, and its results are what a compiler was told they would be."""

import os

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from unify.kernels.convolution import convolution
from unify.models.zoo import get
from unify.op import compile
from unify.testing import random_inputs, random_state

MODELS = "mamba2 palimpsa_key gated_deltanet kda rwkv7 palimpsa mesanet kla".split()


class Told(TorchDispatchMode):
    """Compares the results of our operators with what their fakes say: shapes, types and strides."""

    def __init__(self):
        super().__init__()
        self.seen, self.wrong = set(), []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        if function.namespace == "unify":
            with FakeTensorMode() as fakes:
                told = function(*tree_map_only(torch.Tensor, fakes.from_tensor, arguments))
            self.compare(function.name(), results, told)
        return results

    def compare(self, name, results, told):
        self.seen.add(name)
        one = isinstance(results, torch.Tensor)
        for n, (x, y) in enumerate(zip([results] if one else results, [told] if one else told, strict=True)):
            real, fake = ((z.shape, z.dtype, z.stride() if z.numel() else ()) for z in (x, y))
            if real != fake:
                self.wrong.append(f"{name}, result {n}: {real}, a compiler was told {fake}")


def laid(x, how):
    """The same numbers with other strides: the last two axes exchanged, or tokens side by side as a convolution leaves them."""
    if how == "exchanged" and x.ndim > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "tokens inside" and x.ndim > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x


def results(op, given, state, weights):
    leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
    starts = tuple(x.detach().requires_grad_() for x in state)
    o, ends = op(**leaves, initial_state=starts, output_final_state=True)
    out = [o, *ends]
    grads = torch.autograd.grad(out, [*leaves.values(), *starts], weights, allow_unused=True)
    return [*out, *(x for x in grads if x is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_strides_change_nothing_and_fakes_know_them(name):
    op = compile(get(name).triple, "triton", checked=False)
    given = random_inputs(op, B=2, T=33, H=2, K=3, V=5, gates="moderate", dtype=torch.float32)
    state = random_state(op, given)
    ones = [torch.ones_like(x) for x in (op(**given), *state)]
    plain, told = results(op, given, state, ones), Told()
    with told:
        turned = {n: laid(x, "tokens inside") for n, x in given.items()}
        weights = [laid(ones[0], "tokens inside"), *(laid(x, "exchanged") for x in ones[1:])]
        found = results(op, turned, tuple(laid(x, "exchanged") for x in state), weights)
    assert all(map(torch.equal, plain, found))
    assert told.seen
    assert not told.wrong, "\n".join(sorted(set(told.wrong)))


def test_a_convolution_too():
    make = torch.Generator().manual_seed(0)
    x, weight, start = (torch.randn(s, generator=make) for s in ((2, 9, 6), (6, 4), (2, 3, 6)))

    def all_of(x, start, cotangent):
        leaves = [y.detach().requires_grad_() for y in (x, weight, start)]
        y = convolution(leaves[0], leaves[1], None, leaves[2], torch.tensor([0, 9, 18]))
        return [y, *torch.autograd.grad(y, leaves, cotangent)]

    plain, told = all_of(x, start, torch.ones_like(x)), Told()
    with told:
        turned = all_of(*(laid(y, "exchanged") for y in (x, start, torch.ones_like(x))))
    assert all(map(torch.equal, plain, turned))
    assert len(told.seen) == 2
    assert not told.wrong, "\n".join(told.wrong)


def test_what_a_compiler_was_told_wrongly_is_seen():
    told, x = Told(), torch.zeros(2, 3)
    told.compare("planted", x, x.T.contiguous().T)
    told.compare("planted", x, x.double())
    told.compare("right", x, x.clone())
    assert [w.split(",")[0] for w in told.wrong] == ["planted", "planted"]
