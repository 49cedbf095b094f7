"""The index notation every stage shares: indices, arrays, contractions, and evaluation at concrete sizes.

i, r, n run over value channels (the rows of the memory), j, l, a, c, h over key channels. All expressions are written for one
token of one head.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import sympy as sp
from sympy import Indexed, KroneckerDelta, Sum

i, r, n, j, l, a, c, h = (sp.Symbol(name, integer=True) for name in "i r n j l a c h".split())
K, V = sp.Symbol("K", integer=True, positive=True), sp.Symbol("V", integer=True, positive=True)
SIZE = {i: V, r: V, n: V, j: K, l: K, a: K, c: K, h: K}
half = sp.Rational(1, 2)

_POSITIVE = ("alpha", "prior_precision", "Lambda", "Sigma", "scale", "noise", "temperature", "ridge", "gain", "K", "V")


@cache
def symbol(name: str) -> sp.Symbol:
    """The symbol of that name, always with the same assumptions."""
    positive = name.split("_new")[0].split("_p")[0] in _POSITIVE or name.startswith(_POSITIVE)
    return sp.Symbol(name, positive=True) if positive else sp.Symbol(name, real=True)


def array(name: str, dims: tuple = ()) -> sp.Expr:
    """name[dims]: an Indexed over those indices, or a plain symbol when there are none."""
    return sp.IndexedBase(symbol(name))[dims] if dims else symbol(name)


def name_of(x: sp.Expr) -> str:
    """The name behind an Indexed or a symbol."""
    return str(x.base.label) if isinstance(x, Indexed) else str(x)


def arrays(expr: sp.Expr) -> set[sp.Expr]:
    """All Indexed and all plain symbols of an expression, without indices and sizes."""
    indexed = expr.atoms(Indexed)
    labels = {x.base.label for x in indexed}
    plain = {s for s in expr.atoms(sp.Symbol) if s not in labels and s not in SIZE and s not in (K, V)}
    return indexed | plain


def own_indices(where: tuple) -> tuple:
    """The indices of a reference as the array's own spelling: (j,), (i,), (j, i), (j, l) or (j, l, i)."""
    keys = [j, l]
    return tuple(i if SIZE[x] == V else keys.pop(0) for x in where)


def contract(expr: sp.Expr, index: sp.Symbol) -> sp.Expr:
    """sum over one index."""
    return Sum(expr, (index, 1, SIZE[index]))


class LogDet(sp.Function):
    """log det of a full covariance; its derivative by an entry is the precision's entry (Jacobi's formula)."""

    def _eval_derivative(self, x):
        if isinstance(x, Indexed) and x.base.label == self.args[0]:
            return array("Lambda_new", x.indices)
        return sp.S.Zero

    def _latex(self, printer):
        return rf"\log\det {printer.doprint(self.args[0])}"


def collapse(expr: sp.Expr) -> sp.Expr:
    """Expand, resolve Kronecker deltas under sums and pull what does not depend on the index out of them."""
    return _symmetric(_expand(sp.sympify(expr).replace(lambda e: isinstance(e, Sum), _collapse_sum)))


def _expand(expr: sp.Expr) -> sp.Expr:
    """Multiply products out, but leave powers of sums (denominators) as they are."""
    return sp.expand(expr, multinomial=False)


def _collapse_sum(total: Sum) -> sp.Expr:
    inner = total.function
    for limit in total.limits:  # innermost first; sympy keeps nested sums as one Sum with several limits
        inner = sp.Add(*(_collapse_term(t, limit) for t in sp.Add.make_args(_expand(inner))))
    return inner


def _collapse_term(term: sp.Expr, limit: tuple) -> sp.Expr:
    index, _, size = limit
    for delta in sp.Mul.make_args(term):
        if isinstance(delta, KroneckerDelta) and index in delta.args:
            other = delta.args[1] if delta.args[0] == index else delta.args[0]
            return (term / delta).subs(index, other)
    outside, inside = term.as_independent(index, as_Add=False)
    if inside == 1:
        return outside * size
    if isinstance(inside, Sum) or inside.has(Sum):
        return outside * Sum(inside, limit)
    bound = next(
        x for x in _spellings(index) if x == index or x not in inside.free_symbols
    )  # one spelling a contraction
    return outside * contract(_symmetric(inside.subs(index, bound)), bound)


def _spellings(index: sp.Symbol) -> tuple[sp.Symbol, ...]:
    """Names for a bound index over the same channels."""
    return (l, c, j, a, h) if SIZE[index] == K else (i, r, n)


_SYMMETRIC = ("Lambda", "Lambda_p", "Sigma", "P", "P_p", "P_new")


def _symmetric(expr: sp.Expr) -> sp.Expr:
    """Precisions as matrices are symmetric: write their two key indices in order."""
    swap = {}
    for x in expr.atoms(Indexed):
        if (
            name_of(x) in _SYMMETRIC
            and len(x.indices) > 1
            and i not in x.indices[:2]
            and str(x.indices[0]) > str(x.indices[1])
        ):
            swap[x] = x.base[(x.indices[1], x.indices[0], *x.indices[2:])]
    return expr.xreplace(swap)


def derivative(expr: sp.Expr, x: sp.Expr) -> sp.Expr:
    """d expr / d x[...] in index notation."""
    return collapse(sp.diff(expr, x))


def put(expr: sp.Expr, **values) -> sp.Expr:
    """Replace arrays by name: each value is a function of the indices (or an expression, for a plain symbol)."""
    swap = {}
    for x in arrays(expr):
        if name_of(x) in values:
            value = values[name_of(x)]
            swap[x] = value(*x.indices) if callable(value) else value
    return expr.xreplace(swap)


def at_index(expr: sp.Expr, old: sp.Symbol, new: sp.Symbol) -> sp.Expr:
    """The expression read at another index; a bound index of that name is renamed first."""
    expr = sp.sympify(expr)
    bound = {limit[0] for s in expr.atoms(Sum) for limit in s.limits}
    if new in bound:
        spare = next(
            x
            for x in (c, l, j, a, h, n, r, i)
            if SIZE[x] == SIZE[new] and x not in bound | {old, new} | expr.free_symbols
        )
        expr = expr.replace(
            lambda e: isinstance(e, Sum),
            lambda s: Sum(s.function.subs(new, spare), *(limit.subs(new, spare) for limit in s.limits)),
        )
    return expr.subs(old, new)


def concrete(expr: sp.Expr, env: Mapping, sizes: Mapping, at: Mapping | None = None):
    """The value of an index expression: env maps names to values or object arrays, sizes maps K and V to integers."""
    at = at or {}
    if isinstance(expr, Sum):
        index, _, size = expr.limits[-1]
        inner = Sum(expr.function, *expr.limits[:-1]) if len(expr.limits) > 1 else expr.function
        return sp.Add(*(concrete(inner, env, sizes, {**at, index: x}) for x in range(sizes[size])))
    if isinstance(expr, Indexed):
        return sp.sympify(env[name_of(expr)][tuple(at[x] for x in expr.indices)])
    if isinstance(expr, LogDet):
        whole = env[str(expr.args[0])]
        return sp.log(sp.Matrix(whole if whole.ndim == 2 else whole[..., at[i]]).det())
    if isinstance(expr, KroneckerDelta):
        return sp.Integer(at[expr.args[0]] == at[expr.args[1]])
    if isinstance(expr, sp.Symbol):
        return sp.sympify(sizes[expr] if expr in sizes else env[str(expr)])
    if not expr.args:
        return expr
    return expr.func(*(concrete(x, env, sizes, at) for x in expr.args))


def latex(expr: sp.Expr) -> str:
    """LaTeX with the symbols of the theory: a state X is X_{t-1}, X_p is predicted, X_new is X_t."""
    from .notation import latex as write

    return write(sp.sympify(expr))
