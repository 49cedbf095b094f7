"""Index expressions, reduced to a form in which equal ones look equal.

A recurrence is written with free indices (j over keys, i over values) and contractions over all K keys, so an identity
between two such expressions is an identity at every K and V. The reduction is by steps that are each an equality:
contractions are expanded, freed of what does not depend on their index and of Kronecker deltas, and what they sum is
brought to one fraction. Whatever is left of a difference is a rational function of contractions and entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce

import sympy as sp
from sympy import KroneckerDelta, Sum

from unify.symbols import SIZE, a, c, j, l

EPS = sp.Symbol("eps", positive=True)
h = sp.Symbol("h", integer=True)
_BOUND = (l, c, a, *(sp.Symbol(f"m{n}", integer=True) for n in range(1, 5)))


@lru_cache(maxsize=65536)
def normal(expr: sp.Expr) -> sp.Expr:
    """The same expression with every contraction in its normal form (see the module)."""
    expr = sp.sympify(expr)
    if not expr.has(Sum):
        return expr
    swap = {total: _contraction(total) for total in _outermost(expr)}
    return expr.xreplace(swap)


def _outermost(expr: sp.Expr) -> set[Sum]:
    """Contractions that do not stand inside another one."""
    if isinstance(expr, Sum):
        return {expr}
    return set().union(*map(_outermost, expr.args)) if expr.args else set()


def _contraction(total: Sum) -> sp.Expr:
    out = total.function
    for index, _, _ in total.limits:  # innermost first
        out = _sum_over(normal(out), index)
    return out


def _sum_over(expr: sp.Expr, index: sp.Symbol) -> sp.Expr:
    """sum over one index of an expression whose inner contractions are in normal form."""
    out = sp.S.Zero
    for delta, part in split(expr, index):
        if delta is not None:
            other = delta.args[1] if delta.args[0] == index else delta.args[0]
            out += part.subs(index, other)
            continue
        top, bottom = sp.fraction(rational(part))
        apart, inside = _apart(bottom, index)
        for term in sp.Add.make_args(sp.expand(top)):
            outer, inner = (term / inside).as_independent(index, as_Add=False)
            out += outer / apart * _one_sum(inner, index)
    return out


def split(expr: sp.Expr, index: sp.Symbol) -> list[tuple[KroneckerDelta | None, sp.Expr]]:
    """f = f(0) + delta (f(1) - f(0)) for a delta on `index`: the part without it, and its coefficient."""
    delta = next((d for d in sorted(expr.atoms(KroneckerDelta), key=str) if index in d.args), None)
    if delta is None:
        return [(None, expr)]
    off, on = expr.xreplace({delta: sp.S.Zero}), expr.xreplace({delta: sp.S.One})
    return [*split(off, index), (delta, on - off)]


def _apart(bottom: sp.Expr, index: sp.Symbol) -> tuple[sp.Expr, sp.Expr]:
    """Factors of a denominator without and with the index."""
    swap = {x: sp.Dummy() for x in _letters(bottom)}
    back = {x: y for y, x in swap.items()}
    number, factors = sp.factor_list(bottom.xreplace(swap))
    free, bound = sp.sympify(number), sp.S.One
    for x, power in ((x.xreplace(back), power) for x, power in factors):
        if x.has(index):
            bound *= x**power
        else:
            free *= x**power
    return free, bound


def _one_sum(inner: sp.Expr, index: sp.Symbol) -> sp.Expr:
    size = SIZE.get(index, SIZE[j])
    if inner == 1:
        return size
    taken = inner.free_symbols | {limit[0] for s in inner.atoms(Sum) for limit in s.limits}
    bound = next(x for x in _BOUND if x == index or x not in taken)
    return Sum(inner.subs(index, bound), (bound, 1, size))


def rational(expr: sp.Expr) -> sp.Expr:
    """One fraction in lowest terms; contractions and entries count as letters."""
    if expr.is_Atom or isinstance(expr, (sp.Indexed, Sum)):
        return expr
    swap = {x: sp.Dummy() for x in _letters(expr)}
    back = {x: y for y, x in swap.items()}
    return sp.cancel(sp.together(expr.xreplace(swap))).xreplace(back)


def _letters(expr: sp.Expr) -> set[sp.Expr]:
    """Outermost parts that a rational function treats as letters."""
    if isinstance(expr, (sp.Indexed, sp.Symbol)) or (expr.args and not isinstance(expr, (sp.Add, sp.Mul, sp.Pow))):
        return {expr}
    if isinstance(expr, sp.Pow) and not expr.exp.is_Integer:
        return {expr}
    return set().union(*map(_letters, expr.args)) if expr.args else set()


def remainder(left: sp.Expr, right: sp.Expr) -> sp.Expr:
    """left - right, reduced: 0 when they are equal."""
    if left == right:
        return sp.S.Zero
    return next((rest for rest in map(reduced, cases(normal(left) - normal(right))) if rest != 0), sp.S.Zero)


def reduced(expr: sp.Expr) -> sp.Expr:
    """One fraction in lowest terms, contractions in normal form; 0 too where they cancel under one sign."""
    rest = rational(normal(expr))
    return rest if rest == 0 else rational(_merged(normal(expr)))


def _merged(expr: sp.Expr) -> sp.Expr:
    """sum_l f + sum_l g = sum_l (f + g): what is linear in contractions goes under one sign, if it cancels there."""
    index, inside, rest = sp.Dummy("l", integer=True), sp.S.Zero, sp.S.Zero
    for term in sp.Add.make_args(sp.expand(expr)):
        sums = [x for x in sp.Mul.make_args(term) if isinstance(x, Sum) and len(x.limits) == 1]
        if len(sums) == 1:
            inside += term / sums[0] * sums[0].function.subs(sums[0].limits[0][0], index)
        else:
            rest += term
    return rest if rational(inside) == 0 else expr


def cases(expr: sp.Expr, apart: frozenset = frozenset()) -> list[sp.Expr]:
    """The expression in every case of its Kronecker deltas: two indices are equal, or they are not."""
    deltas = sorted((d for d in expr.atoms(KroneckerDelta) if not _inside(d, expr)), key=str)
    if not deltas:
        return [expr]
    delta = deltas[0]
    x, y = delta.args
    if frozenset((x, y)) in apart:
        return cases(expr.xreplace({delta: sp.S.Zero}), apart)
    old, new = (x, y) if y == h else (y, x)
    same = expr.subs(old, new) if expr.has(old) else expr.xreplace({delta: sp.S.One})
    moved = frozenset(frozenset(new if z == old else z for z in pair) for pair in apart)
    return [*cases(same, moved), *cases(expr.xreplace({delta: sp.S.Zero}), apart | {frozenset((x, y))})]


def _inside(delta: KroneckerDelta, expr: sp.Expr) -> bool:
    """Whether a delta's indices are bound by a contraction."""
    return not set(delta.args) <= expr.free_symbols


# --- expansion in eps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Laurent:
    """eps^low (terms[0] + terms[1] eps + ...), known to len(terms) terms."""

    low: int
    terms: tuple[sp.Expr, ...]

    def coefficient(self, n: int) -> sp.Expr:
        """The coefficient of eps ** n."""
        if n >= self.low + len(self.terms):
            raise ArithmeticError(f"the expansion is known below eps^{self.low + len(self.terms)} only")
        return self.terms[n - self.low] if n >= self.low else sp.S.Zero

    def __add__(self, other: Laurent) -> Laurent:
        low = min(self.low, other.low)
        high = min(self.low + len(self.terms), other.low + len(other.terms))
        return Laurent(low, tuple(self.coefficient(n) + other.coefficient(n) for n in range(low, high)))

    def __mul__(self, other: Laurent) -> Laurent:
        size = min(len(self.terms), len(other.terms))
        return Laurent(
            self.low + other.low,
            tuple(sp.Add(*(self.terms[m] * other.terms[n - m] for m in range(n + 1))) for n in range(size)),
        )

    def inverse(self) -> Laurent:
        """1 / self: b_0 = 1 / a_0, b_n = - sum_m a_m b_(n-m) / a_0."""
        first = next((n for n, x in enumerate(self.terms) if x != 0 and rational(normal(x)) != 0), None)
        if first is None:
            raise ArithmeticError("division by what vanishes to every known order of eps")
        a = self.terms[first:]
        b = [1 / a[0]]
        for n in range(1, len(a)):
            b.append(-sp.Add(*(a[m] * b[n - m] for m in range(1, n + 1))) / a[0])
        return Laurent(-self.low - first, tuple(b))


def expansion(expr: sp.Expr, terms: int) -> Laurent:
    """The Laurent expansion at eps = 0 of a rational function of eps, contractions term by term."""
    if not expr.has(EPS):
        return Laurent(0, (expr, *[sp.S.Zero] * (terms - 1)))
    if expr == EPS:
        return Laurent(1, (sp.S.One, *[sp.S.Zero] * (terms - 1)))
    if isinstance(expr, sp.Add):
        return reduce(Laurent.__add__, (expansion(x, terms) for x in expr.args))
    if isinstance(expr, sp.Mul):
        return reduce(Laurent.__mul__, (expansion(x, terms) for x in expr.args))
    if isinstance(expr, Sum):
        inner = expansion(expr.function, terms)
        return Laurent(inner.low, tuple(Sum(x, *expr.limits) if x != 0 else x for x in inner.terms))
    if isinstance(expr, sp.Pow) and expr.exp.is_Integer:
        base = expansion(expr.base, terms)
        return reduce(Laurent.__mul__, [base if expr.exp > 0 else base.inverse()] * abs(int(expr.exp)))
    raise ArithmeticError(f"no expansion of {expr.func.__name__} in eps")


def leading(expr: sp.Expr, below: int) -> tuple[int, sp.Expr] | None:
    """The first power of eps below `below` with a coefficient that does not vanish, and that; None if all do."""
    found = expansion(expr, below + 4)
    for n in range(found.low, below):
        rest = remainder(found.coefficient(n), sp.S.Zero)
        if rest != 0:
            return n, rest
    return None
