"""An edge of the map on tensors: both ends run in float64 on random inputs, the parent's arguments substituted.

    from unify.derivations import all_edges
    print(measure(all_edges()[11]))       # Gated DeltaNet -> Mamba-2: order 1, measured 1.000 (...)

A proof says that the error of a limit falls as eps ** p; this is the error itself, relative to the largest output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy as sp
import torch
from torch import Tensor

from . import testing
from .lower.printer import code
from .op import compile
from .symbols import SIZE, i, name_of

if TYPE_CHECKING:
    from .derivations import Edge

SIZES = {"B": 1, "T": 6, "H": 2, "K": 3, "V": 2}
EPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
FIT = 3  # the slope is that of the smallest eps: a limit says nothing of others

CONSTRAINTS: dict[str, dict[str, Callable]] = {
    "one-hot keys": {"k": lambda x, eps: testing.one_hot_keys(x)["k"]},
    "unit keys: k.k = 1": {"k": lambda x, eps: testing.unit_keys(x)["k"]},
    "importance > 0": {"importance": lambda x, eps: x["importance"].clamp_min(0.05)},
    "beta k.k < 1": {"beta": lambda x, eps: 0.9 * x["beta"]},
    "beta < 1": {"beta": lambda x, eps: 0.9 * x["beta"]},
    "the first key is not 0": {},
}
"""What an edge may ask of the child's arguments (`Edge.assumptions`, `Edge.domain`), as substitutions of random ones."""


def measure(
    edge: Edge, *, started: bool = False, seed: int = 0, eps: Sequence[float] = EPS, fit: int | None = FIT
) -> testing.Equivalence:
    """Run both ends of an edge on random inputs (`unify.testing.assert_equivalent`) and compare the outputs.

    edge: of the map, or your own. started: begin in a random state of the child and its relation, not at the start.
    eps, fit: where a limit is measured, and how many of the smallest decide its slope.
    Returns the relative errors. Raises AssertionError where they contradict the edge.
    """
    work = Measured(edge, seed, started)
    return testing.assert_equivalent(
        edge.parent_triple,
        edge.child_triple,
        work.substitution(),
        output=work.value(edge.output, (i,)) if edge.output != 1 else None,
        order=edge.order,
        constraint=work.constraint() or None,
        initial=work.initial() if started else None,
        eps=eps,
        fit=fit,
        seeds=(seed,),
        **SIZES,
    )


def evaluate(expr: sp.Expr, dims: tuple, names: Mapping[str, Tensor], eps: float) -> Tensor:
    """An index expression on tensors whose last dimensions are `dims`."""
    scope = {"torch": torch, "K": SIZES["K"], "V": SIZES["V"], "eye": torch.eye(SIZES["K"], dtype=torch.float64)}
    known = {**scope, **names, "eps": torch.tensor(eps, dtype=torch.float64)}
    return torch.as_tensor(eval(code(sp.sympify(expr), dims), known), dtype=torch.float64)


class Measured:
    """A claim in the form that `assert_equivalent` takes: callables of the child's arguments and eps.

    claim: an edge, or whatever has its fields (a path, with the triples of all its `parents`).
    """

    def __init__(self, claim: Any, seed: int, started: bool = False):
        self.claim, self.seed, self.started = claim, seed, started
        self.child = compile(claim.child_triple, "reference")
        self.parent = compile(claim.parent_triple, "reference")
        self.states = {s.name: s.dims for s in self.child.recurrence.states}

    def substitution(self) -> dict[str, Callable]:
        """The parent's arguments."""
        from .derivations.edge import signature

        wanted = signature(self.claim.parent_triple)
        return {name: self.value(expr, wanted[name][0]) for name, expr in self.claim.arguments().items()}

    def constraint(self) -> dict[str, Callable]:
        """What the claim asks for, as substitutions of the child's arguments."""
        from .derivations.edge import signature

        dims, out = signature(self.claim.child_triple), {}
        for condition in [*map(str, self.claim.assumptions), *self.claim.domain]:
            out |= CONSTRAINTS[condition]
        own = lambda expr, d: lambda x, eps: evaluate(expr, d, {**x, **self._free(x)}, eps)  # noqa: E731
        return out | {name: own(expr, dims[name][0]) for name, expr in self.claim.restrict}

    def initial(self) -> dict[str, Callable]:
        """The relation: the parent's states over the child's and its static arguments."""
        from .derivations import anything

        dims = {s.name: s.dims for s in self.parent.recurrence.states}
        return {
            name: self._held(expr.xreplace({anything(name, dims[name]): sp.S.Zero}), dims[name])
            for name, expr in self.claim.states().items()
        }

    def value(self, expr: sp.Expr, dims: tuple) -> Callable[[dict, float], Tensor]:
        """An expression of the claim as a function of the child's arguments and eps."""
        return lambda x, eps: evaluate(expr, dims, self._names(x), eps)

    def _names(self, x: dict) -> dict[str, Tensor]:
        """The child's arguments, the free parameters and, for computed gates, the child's states before each token."""
        known = {**x, **self._free(x)}
        said = set().union(*(e.atoms(sp.Indexed, sp.Symbol) for e in self.claim.arguments().values()))
        return known | self._before(x) if any(name_of(y) in self.states for y in said) else known

    def _free(self, x: dict) -> dict[str, Tensor]:
        """The free parameters: arguments of the parents, drawn away from 0 where something is divided by them."""
        drawn, out = {}, {}
        for triple in getattr(self.claim, "parents", [self.claim.parent_triple]):
            op = compile(triple, "reference")
            drawn |= testing.per_token(op.recurrence, testing.random_inputs(op, self.seed + 100, **SIZES))
        for name in self.claim.free():
            stem = name.removesuffix("_again")
            out[name] = drawn[stem].clamp_min(0.05) if stem in ("beta", "importance") else drawn[stem]
        return out

    def _before(self, x: dict) -> dict[str, Tensor]:
        """The child's states before each token, [B, T, H, ...]."""
        per = {a.name: a.per for a in self.child.recurrence.inputs}
        given = {name: x[name] for name in per}
        static = {name: y for name, y in given.items() if per[name] == "static"}
        state = [self._first(s, static) for s in self.child.recurrence.states]
        if self.started:
            state = testing.random_state(self.child, given, self.seed)
        out = {name: [] for name in self.states}
        for t in range(x["q"].shape[1]):
            now = {name: y if name in static else y[:, t : t + 1] for name, y in given.items()}
            for name, held in zip(self.states, state, strict=True):
                out[name].append(held)
            _, state = self.child(**now, scale=1.0, initial_state=tuple(state), output_final_state=True)
        return {name: torch.stack(y, 1) for name, y in out.items()}

    @staticmethod
    def _first(state: Any, static: dict) -> Tensor:
        shape = [SIZES[x] for x in ("B", "H", *(str(SIZE[d]) for d in state.dims))]
        return evaluate(state.initial, state.dims, static, 0.0).expand(shape)

    def _held(self, expr: sp.Expr, dims: tuple) -> Callable[[dict, float], Tensor]:
        from .derivations.edge import signature

        static = [name for name, (_, per) in signature(self.claim.child_triple).items() if per == "static"]

        def value(x: dict, eps: float) -> Tensor:
            free = {name: y for name, y in self._free(x).items() if self.claim.free()[name][1] == "static"}
            known = {name: x[name] for name in (*static, *self.states)}
            return evaluate(expr, dims, {**free, **known}, eps)

        return value
