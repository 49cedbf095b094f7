"""Recurrence -> its adjoint: the straight-line program differentiated assignment by assignment, in index notation.

For y = f(x): d_x += sum d_y df/dx, with the contraction over whatever channels x lacks found by the same index calculus
that solves the free energy. The result is again a list of assignments, so everything that prints a step prints its adjoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import sympy as sp

from .recurrence import Assign, Recurrence
from .symbols import a, array, arrays, at_index, collapse, contract, derivative, h, i, j, l, name_of, own_indices, r


@dataclass(frozen=True)
class Adjoint:
    """The backward of one token.

    reads: adjoints that come from outside: of the outputs and of the new states.
    steps: assignments, to be run after (and with the names of) the forward program.
    inputs: input or state name -> name of its adjoint (absent where it is zero).
    """

    reads: tuple[tuple[str, tuple[sp.Symbol, ...]], ...]
    steps: tuple[Assign, ...]
    inputs: tuple[tuple[str, str], ...]

    def __str__(self):
        return "\n".join(map(str, self.steps))


@lru_cache(maxsize=256)
def adjoint(recurrence: Recurrence, variance: bool = False) -> Adjoint:
    """Differentiate one token's program; with `variance`, through the predictive variance as well."""
    dims = shapes(recurrence)
    outputs = [("o", (i,)), *([("variance", (i,))] if variance else [])]
    carried = [(new, dims[new]) for _, new in recurrence.updates]
    total: dict[str, sp.Expr] = {name: array(f"d_{name}", d) for name, d in (*outputs, *carried)}
    steps = reverse(recurrence.steps, total)
    ends = []
    for name, expr in total.items():
        if name in dims:
            emit(steps, name, dims[name], expr)
            ends.append((name, f"d_{name}"))
    return Adjoint(tuple((f"d_{name}", d) for name, d in (*outputs, *carried)), tuple(steps), tuple(ends))


def reverse(program: Sequence[Assign], total: dict[str, sp.Expr]) -> list[Assign]:
    """Differentiate a straight line from its last assignment to its first.

    total: adjoints collected so far, by name; those of the program's own names are used up, those of what it reads added.
    """
    steps: list[Assign] = []
    for step in reversed(program):
        if step.name in total:
            bar = emit(steps, step.name, step.dims, total.pop(step.name))
            _back(step, bar, total, steps)
    return steps


def shapes(recurrence: Recurrence) -> dict[str, tuple]:
    """Channels of every name: assignments, states, arguments and their shares for repeated observations."""
    out = {s.name: s.dims for s in (*recurrence.steps, *recurrence.states)}
    for x in recurrence.inputs:
        out[x.name] = x.dims
        if x.per == "observation":
            out |= {f"{x.name}_{n}": x.dims for n in range(2, recurrence.triple.architecture.repeats + 1)}
    return out | {"k_raw": (j,)}


def emit(steps: list[Assign], name: str, dims: tuple, expr: sp.Expr) -> sp.Expr:
    """Name an adjoint, unless it is just what came from outside."""
    bar = array(f"d_{name}", dims)
    if expr != bar:
        steps.append(Assign("adjoint", f"d_{name}", dims, expr))
    return bar


def _back(step: Assign, bar: sp.Expr, total: dict, steps: list[Assign]) -> None:
    """Spread one assignment's adjoint over what it reads."""
    right = bar
    if step.solve is not None:  # A x = b: the adjoint of b is A^-1 d_x (A is symmetric), that of A is -(A^-1 d_x) x^T
        right = array(f"s_{step.name}", step.dims)
        steps.append(Assign("adjoint", f"s_{step.name}", step.dims, bar, step.solve))
        outer = -right * at_index(array(step.name, step.dims), j, l)
        _spread(
            _over(outer * step.solve, tuple(x for x in (j, l, i) if x in {*step.dims, l})), arrays(step.solve), total
        )
    _spread(_over(right * step.expr, step.dims), arrays(step.expr), total)


def _over(expr: sp.Expr, dims: tuple) -> sp.Expr:
    for d in reversed(dims):
        expr = contract(expr, d)
    return expr


_FRESH = {j: a, l: h, i: r}


def _spread(scalar: sp.Expr, read: set, total: dict) -> None:
    """Add d scalar / d x to the adjoint of every array x that is read."""
    shapes = {}
    for x in sorted(read, key=str):  # a set has another order in each process, and the printed file a name by content
        shapes.setdefault(name_of(x), x.indices if isinstance(x, sp.Indexed) else ())
    for name, where in shapes.items():
        if name == "scale":
            continue
        slope = (
            derivative(scalar, array(name, tuple(_FRESH[y] for y in own_indices(where))))
            if where
            else collapse(sp.diff(scalar, array(name)))
        )
        for old, new in zip((r, a, h), (i, j, l), strict=True):
            slope = at_index(slope, old, new)
        total[name] = collapse(total.get(name, sp.S.Zero) + slope)
