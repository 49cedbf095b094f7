"""Both ends of an edge, run side by side in exact arithmetic: what a proof is checked against.

Every number is rational, and eps, where there is one, stays a symbol. So an exact edge leaves no difference at all, and
the difference of a limit edge is a rational function of eps, whose lowest power is the order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
import sympy as sp

from unify.derivations.algebra import EPS, Laurent, expansion
from unify.derivations.edge import Edge, signature
from unify.derive import derive
from unify.errors import UnifyError
from unify.recurrence import Recurrence
from unify.symbols import SIZE, K, V, concrete

_POSITIVE = ("beta", "importance", "prior_precision", "noise", "gain", "ridge", "temperature", "mix", "erase")
TERMS = 6


@dataclass(frozen=True)
class Run:
    """A few tokens from the start, at random inputs. sizes: (K, V)."""

    edge: Edge
    sizes: tuple[int, int] = (2, 2)
    tokens: int = 2
    seed: int = 0

    def check(self) -> str:
        """The finding in words. Raises UnifyError where it contradicts the edge."""
        order, token = self.order()
        found = f"at token {token} the difference begins with eps^{order}"
        found = "the outputs are the same numbers" if order is None else found
        place = f"{self.tokens} tokens in exact arithmetic, K = {self.sizes[0]}, V = {self.sizes[1]}: {found}"
        if order == self.edge.order:
            return place
        claim = "no difference" if self.edge.order is None else f"a difference of order {self.edge.order}"
        works = "mend the substitution, the output factor, or the kind and order"
        raise UnifyError(f"{self.edge.name} ({self.edge.claim})", f"run: {place}; claimed is {claim}", works)

    def order(self) -> tuple[int | None, int]:
        """The lowest power of eps in the differences, and the first token that shows it; None where there are none."""
        found = [(_power(x), t) for t, token in enumerate(self.differences(), 1) for x in token]
        return min(((n, t) for n, t in found if n is not None), default=(None, 0))

    def differences(self) -> list[list[sp.Expr]]:
        """output * (the parent's o) - (the child's o), of every token and value channel."""
        edge, rng = self.edge, Random(self.seed)
        parent, child = (_Program(derive(x), self.sizes) for x in (edge.parent_triple, edge.child_triple))
        said, wanted = edge.arguments(), signature(edge.parent_triple)
        static, out = {"eps": EPS, "scale": sp.Integer(1), **self._draw(rng, "static")}, []
        for _ in range(self.tokens):
            env = self._restricted({**static, **self._draw(rng, "token")})
            here = child.values(env)
            scope = {**env, **here}
            there = {x: fill(said[x], dims, scope, self.sizes) for x, (dims, _) in wanted.items()}
            o = parent.token({**there, "scale": env["scale"]})
            factor = fill(edge.output, (), scope, self.sizes)
            out.append([factor * x - y for x, y in zip(o, child.token(env), strict=True)])
        return out

    def _restricted(self, env: dict) -> dict:
        """The child's arguments as the edge restricts them, and its alpha."""
        dims = signature(self.edge.child_triple)
        env |= {name: fill(x, dims[name][0], env, self.sizes) for name, x in self.edge.restrict}
        gates = {"g": "alpha", "g_importance": "alpha_importance"}
        return env | {alpha: _exp(env[g]) for g, alpha in gates.items() if g in env}

    def _draw(self, rng: Random, kind: str) -> dict:
        """Rational values of the child's arguments and of the free parameters, of one kind: token or static."""
        size, out = {K: self.sizes[0], V: self.sizes[1]}, {}
        for name, (dims, per) in {**self.edge.free(), **signature(self.edge.child_triple)}.items():
            if per != kind:
                continue
            value = np.empty([size[SIZE[d]] for d in dims], dtype=object)
            for at in np.ndindex(value.shape):
                value[at] = _number(name, rng)
            out[name] = value if dims else value.item()
        for assumption in self.edge.assumptions if kind == "token" else ():
            out["k"] = np.array(assumption.sample(rng, self.sizes[0]), dtype=object)
        return out


class _Program:
    """A recurrence that remembers its states."""

    def __init__(self, recurrence: Recurrence, sizes: tuple[int, int]):
        self.recurrence, self.sizes, self.held = recurrence, sizes, {}

    def values(self, given: Mapping) -> dict:
        """The states before the token; at the first one, where the model starts."""
        if not self.held:
            self.held = {s.name: fill(s.initial, s.dims, given, self.sizes) for s in self.recurrence.states}
        return self.held

    def token(self, given: Mapping) -> list:
        """The outputs of one token."""
        known = {x: y for x, y in given.items() if x not in ("alpha", "alpha_importance")} | self.values(given)
        if any(s.name == "k" for s in self.recurrence.steps):  # the program makes its key from the one that is given
            known["k_raw"] = known.pop("k", None)
        env = self.recurrence.run(known, self.sizes)
        self.held = {s: _tidy(env[new]) for s, new in self.recurrence.updates}
        return list(env["o"])


def fill(expr: sp.Expr, dims: tuple, env: Mapping, sizes: tuple[int, int]):
    """The value of an index expression over its indices: an object array, or a number when it has none."""
    size = {K: sizes[0], V: sizes[1]}
    out = np.empty([size[SIZE[d]] for d in dims], dtype=object)
    for at in np.ndindex(out.shape):
        out[at] = concrete(sp.sympify(expr), env, size, dict(zip(dims, at, strict=True)))
    return out if dims else out.item()


def _number(name: str, rng: Random) -> sp.Expr:
    if name in ("g", "g_importance"):
        return sp.log(sp.Rational(rng.randint(1, 3), 4))
    if name == "temperature":
        return sp.Integer(rng.randint(1, 2))
    value = sp.Rational(rng.choice((1, 2, 3, 5, 7)), rng.choice((1, 2, 3)))
    return value if name in _POSITIVE else value * rng.choice((-1, 1))


def _exp(x):
    return np.vectorize(sp.exp, otypes=[object])(x) if isinstance(x, np.ndarray) else sp.exp(x)


def _tidy(x):
    """The first terms of the expansion in eps, so that states stay small; far more terms than any order asks for."""
    one = lambda y: _sum(expansion(y, TERMS)) if y.has(EPS) else y  # noqa: E731
    return np.vectorize(one, otypes=[object])(x) if isinstance(x, np.ndarray) else one(x)


def _sum(series: Laurent) -> sp.Expr:
    return sp.Add(*(x * EPS ** (series.low + n) for n, x in enumerate(series.terms)))


def _power(x: sp.Expr) -> int | None:
    """The lowest power of eps in the expansion of a difference; None if it is zero."""
    series = expansion(x, TERMS)
    return next((series.low + n for n, y in enumerate(series.terms) if not _zero(y)), None)


def _zero(x: sp.Expr) -> bool:
    """Whether a number is zero: exactly, or to 40 digits where it holds logarithms."""
    return x == 0 if x.is_Rational else abs(sp.N(x, 60)) < sp.Float(10) ** -40
