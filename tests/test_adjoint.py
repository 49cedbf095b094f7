"""The adjoint program, differentiated in index notation, against autograd through the forward program."""

from dataclasses import replace

import pytest
import torch

from unify.adjoint import adjoint
from unify.derive import derive
from unify.lower.printer import assignment
from unify.lower.torch import argument_names, step_function
from unify.models.zoo import ZOO, get
from unify.triple import Architecture, Posterior, Prior, Triple

SIZE = {"i": 4, "j": 3, "l": 3}
EXTRA = {
    "isotropic": Triple(Architecture("key", importance="head"), Posterior("isotropic"), Prior("key")),
    "row coupled": get("gated_deltanet").triple.metaplastic("value"),
    "prior mean": Triple(Architecture("head", importance="value"), Posterior("diagonal"), Prior("head", mean="entry")),
    "full per row": Triple(
        Architecture("head", value="observation", precision="value"), Posterior("full"), Prior("key")
    ),
}


def positive(shape, make):
    return torch.rand(shape, generator=make, dtype=torch.float64) + 0.3


def leaf(name, dims, make):
    """A tensor for one name: decays negative, precisions positive, P symmetric positive semi-definite."""
    shape = (2, 2, *(SIZE[str(d)] for d in dims))
    if name == "P":
        root = torch.randn((2, 2, 4, 3, 3), generator=make, dtype=torch.float64)
        full = root @ root.mT
        return full[:, :, 0].clone() if len(dims) == 2 else full.movedim(2, -1).contiguous()
    if name.startswith("g") and name != "gain":
        return -positive(shape, make)
    if name.split("_")[0] in ("q", "k", "v", "p", "a", "b", "S", "M", "bonus") or name == "prior_mean":
        return torch.randn(shape, generator=make, dtype=torch.float64)
    return positive(shape, make)


def symmetric(name, x):
    """The part of a gradient of P that a symmetric P can see."""
    return (x + x.transpose(2, 3)) / 2 if name == "P" else x


def gradients(triple, program=None, seed=0):
    """(name, autograd gradient, gradient by the adjoint program) for everything a step reads."""
    recurrence, make = derive(triple), torch.Generator().manual_seed(seed)
    dims = {x.name: x.dims for x in (*recurrence.inputs, *recurrence.states)}
    names = [*argument_names(recurrence), *(s.name for s in recurrence.states)]
    own = {n: leaf(n, dims[n] if n in dims else dims[n.rpartition("_")[0]], make).requires_grad_() for n in names}
    o, variance, new = step_function(recurrence)(*own.values(), scale=0.7, return_variance=True)
    variance = variance.expand_as(o)
    weights = [torch.randn(x.shape, generator=make, dtype=torch.float64) for x in (o, variance, *new)]
    weights[2:] = [symmetric(n, w) for n, w in zip((n for n, _ in recurrence.updates), weights[2:], strict=True)]
    loss = sum((x * w).sum() for x, w in zip((o, variance, *new), weights, strict=True))
    expected = torch.autograd.grad(loss, list(own.values()), allow_unused=True)

    space = {
        "torch": torch,
        "scale": 0.7,
        "K": 3,
        "V": 4,
        "eye": torch.eye(3, dtype=torch.float64),
        **{n: x.detach() for n, x in own.items()},
    }
    if triple.architecture.key == "tempered":
        space["k_raw"] = space["k"]
    for step in recurrence.steps:
        exec(assignment(step), space)
    space |= dict(zip(["d_o", "d_variance", *(f"d_{n}" for _, n in recurrence.updates)], weights, strict=True))
    program = program or adjoint(recurrence, variance=True)
    for step in program.steps:
        exec(assignment(step), space)
    ends = dict(program.inputs)
    for n, want in zip(own, expected, strict=True):
        if want is not None:
            end = ends.get("k_raw", ends.get(n)) if n == "k" else ends.get(n)
            assert end is not None, f"no adjoint for {n}"
            yield n, symmetric(n, want), symmetric(n, space[end])


@pytest.mark.parametrize("name", [*ZOO, *EXTRA])
def test_adjoint_equals_autograd(name):
    for n, want, got in gradients(EXTRA.get(name) or get(name).triple):
        assert (got - want).abs().max() <= 1e-10 * (1 + want.abs().max()), n


@pytest.mark.parametrize("name", ["palimpsa", "gated_deltanet", "mesanet"])
def test_a_wrong_adjoint_is_seen(name):
    right = adjoint(derive(get(name).triple), variance=True)
    for at in range(len(right.steps)):
        wrong = tuple(replace(s, expr=s.expr * 2) if n == at else s for n, s in enumerate(right.steps))
        pairs = list(gradients(get(name).triple, replace(right, steps=wrong)))
        assert any((got - want).abs().max() > 1e-6 for _, want, got in pairs), right.steps[at]
