"""The recurrence: a straight-line program of named, indexed assignments with explicit contractions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import sympy as sp

from .symbols import SIZE, K, V, array, arrays, concrete, j, l, name_of
from .triple import Triple

_KEYS = (j, l)
PHASES = ("inputs", "predict", "observe", "project", "read")


@dataclass(frozen=True)
class Input:
    """One argument: its channels per token and head, and how often it is given.

    dims: indices of its channels, for instance (j,) for [..., K].
    per: "token" [B, T, H, ...], "observation" [B, T * repeats, H, ...] or "static" [H, ...].
    """

    name: str
    dims: tuple[sp.Symbol, ...]
    per: str = "token"

    @property
    def shape(self) -> str:
        """The argument's shape in words, for instance [B, T, H, K]."""
        lead = {"token": "B, T, H", "observation": "B, n T, H", "static": "H"}[self.per]
        return f"[{', '.join([lead, *(str(SIZE[d]) for d in self.dims)])}]"


@dataclass(frozen=True)
class State:
    """One carried quantity and what it is before the first token."""

    name: str
    dims: tuple[sp.Symbol, ...]
    initial: sp.Expr

    @property
    def shape(self) -> str:
        """The state's shape in words, for instance [B, H, K, V]."""
        return f"[{', '.join(['B', 'H', *(str(SIZE[d]) for d in self.dims)])}]"


@dataclass(frozen=True)
class Assign:
    """name[dims] = expr. With `solve` set, name solves  sum_l solve[j, l] name[l] = expr[j]  instead."""

    phase: str
    name: str
    dims: tuple[sp.Symbol, ...]
    expr: sp.Expr
    solve: sp.Expr | None = None

    def __str__(self):
        target = f"{self.name}[{', '.join(map(str, self.dims))}]" if self.dims else self.name
        if self.solve is not None:
            return f"{target} = solve({show(self.solve)}, {show(self.expr)})"
        return f"{target} = {show(self.expr)}"

    def sides(self, write) -> tuple[str, list[tuple[bool, str]]]:
        """The left side, and the right side term by term (`terms` of the writer, one of `notation`'s)."""
        from .notation import grouped, solved

        left = write(array(self.name, tuple(d for d in self.dims if self.solve is None or d not in _KEYS)))
        if self.solve is not None:
            return left, [(False, solved(self.solve, self.expr, write))]
        return left, write.terms(grouped(self.expr))

    def pretty(self) -> tuple[str, str]:
        """Both sides in Unicode."""
        from .notation import pretty

        left, terms = self.sides(pretty)
        return left, pretty.joined(terms)

    def latex(self, static: frozenset[str] | None = None) -> str:
        """The assignment as LaTeX. static: names that carry no t (`notation.static_names`)."""
        from .notation import Latex

        write = Latex() if static is None else Latex(static)
        left, terms = self.sides(write)
        return f"{left} = {write.joined(terms)}"


def hashed_once(cls: type) -> type:
    """A frozen dataclass that remembers its hash: ops are looked up by it at every call, and expressions hash slowly."""
    slow = cls.__hash__

    def remembered(self) -> int:
        if "_hash" not in self.__dict__:
            self.__dict__["_hash"] = slow(self)
        return self.__dict__["_hash"]

    cls.__hash__ = remembered
    cls.__getstate__ = lambda self: {name: x for name, x in self.__dict__.items() if name != "_hash"}  # of this process
    return cls


@hashed_once
@dataclass(frozen=True)
class Recurrence:
    """One token of one head: inputs and states in, states and read-out out.

    updates: each state's name and the name of its new value.
    carries: "mean" (S is the posterior mean) or "natural" (M = Lambda (mu - mu_0), plain decayed sums).
    moments: (mean, precision) of the belief before the token, after forgetting, and after each observation.
    """

    triple: Triple
    inputs: tuple[Input, ...]
    states: tuple[State, ...]
    steps: tuple[Assign, ...]
    updates: tuple[tuple[str, str], ...]
    carries: str
    moments: tuple[tuple[sp.Expr, sp.Expr], ...]

    def phase(self, name: str) -> tuple[Assign, ...]:
        """The assignments of one phase: inputs, predict, observe, project or read."""
        return tuple(s for s in self.steps if s.phase == name)

    def __str__(self):
        lines = []
        for phase in PHASES:
            for n, step in enumerate(self.phase(phase)):
                lines.append(f"{phase if n == 0 else '':<9}{step}")
        lines.append(
            f"{'state':<9}" + ", ".join(f"{s.name} {s.shape} (starts at {show(s.initial)})" for s in self.states)
        )
        lines.append(f"{'inputs':<9}" + ", ".join(f"{x.name} {x.shape}" for x in self.inputs))
        return "\n".join(lines)

    def latex(self) -> str:
        """The program as an aligned LaTeX block, in the order of execution."""
        from .notation import static_names

        static = static_names(self.triple)
        rows = [s.latex(static).replace(" = ", " &= ", 1) for p in PHASES for s in self.phase(p)]
        return "\\begin{aligned}\n" + " \\\\\n".join(rows) + "\n\\end{aligned}"

    def run(self, values: Mapping, sizes: tuple[int, int]) -> dict:
        """Execute one token on exact or symbolic values.

        values: names of inputs, states and `scale` -> a value or an object array over the channels.
        sizes: (K, V). Returns every name assigned, arrays as object arrays. A name given in `values` is not
        recomputed (alpha in place of g, say).
        """
        env, size = dict(values), {K: sizes[0], V: sizes[1]}
        for step in self.steps:
            if step.name in values:
                continue
            env[step.name] = (
                _solve(step, env, size) if step.solve is not None else _fill(step.dims, step.expr, env, size)
            )
        return env

    def cost(self) -> dict[str, sp.Expr]:
        """State floats per head and multiply-adds per token and head, as polynomials in K and V."""
        state = sum((sp.Mul(*(SIZE[d] for d in s.dims)) for s in self.states), sp.S.Zero)
        flops = sum((_flops(s) for s in self.steps), sp.S.Zero)
        return {"state": sp.expand(state), "flops": sp.expand(flops)}


def _fill(dims: tuple, expr: sp.Expr, env: Mapping, size: Mapping):
    if not dims:
        return concrete(expr, env, size)
    out = np.empty([size[SIZE[d]] for d in dims], dtype=object)
    for at in np.ndindex(out.shape):
        out[at] = concrete(expr, env, size, dict(zip(dims, at, strict=True)))
    return out


def _solve(step: Assign, env: Mapping, size: Mapping):
    from .symbols import i, j, l

    n = size[K]
    out = np.empty([size[SIZE[d]] for d in step.dims], dtype=object)
    for row in range(size[V]) if i in step.dims else [0]:
        matrix = sp.Matrix(n, n, lambda x, y: concrete(step.solve, env, size, {j: x, l: y, i: row}))  # noqa: B023
        right = sp.Matrix(n, 1, lambda x, _: concrete(step.expr, env, size, {j: x, i: row}))  # noqa: B023
        solution = matrix.LUsolve(right)
        for x in range(n):
            out[(x, row) if i in step.dims else (x,)] = solution[x]
    return out


def _flops(step: Assign) -> sp.Expr:
    """Multiply-adds of an assignment: each operation once per entry it is evaluated at."""
    per = sp.Mul(*(SIZE[d] for d in step.dims))
    if step.solve is not None:
        return per / K * (2 * K**3 / 3 + 2 * K**2)
    return _count(step.expr, set(step.dims))


def _count(expr: sp.Expr, dims: set) -> sp.Expr:
    if isinstance(expr, sp.Sum):
        index = expr.limits[0][0]
        inner = {d for x in expr.function.atoms(sp.Indexed) for d in x.indices}
        return _count(expr.function, inner | {index}) + sp.Mul(*(SIZE[d] for d in inner | {index}))
    if not expr.args or isinstance(expr, sp.Indexed):
        return sp.S.Zero
    per = sp.Mul(*(SIZE[d] for d in {d for x in expr.atoms(sp.Indexed) for d in x.indices} & dims))
    return (max(len(expr.args) - 1, 1)) * per + sum((_count(x, dims) for x in expr.args), sp.S.Zero)


def show(expr: sp.Expr) -> str:
    """Plain text of an index expression, in the program's own names: sum_j(...) for a contraction."""
    from .notation import plain

    return plain(expr)


def names(expr: sp.Expr) -> set[str]:
    """Names of all arrays an expression reads."""
    return {name_of(x) for x in arrays(expr)}
