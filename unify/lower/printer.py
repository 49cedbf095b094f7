"""Index notation -> torch source. Every tensor's last dimensions are its channels; whatever comes before broadcasts.

The printer never looks at the leading dimensions, so the same text serves one token ([B, H, ...]) and all tokens at once
([B, T, H, ...]).
"""

from __future__ import annotations

import sympy as sp

from ..recurrence import Assign
from ..symbols import K, V, i, j, l, name_of

ORDER = (j, l, i)
NUMBERS = ("scale", "K", "V")


def indices(expr: sp.Expr) -> tuple[sp.Symbol, ...]:
    """Free channel indices of an expression, in the layout's order; bound ones that are spelled otherwise come last."""
    bound = {limit[0] for s in expr.atoms(sp.Sum) for limit in s.limits}
    free = (expr.free_symbols - (bound - _outside(expr))) & {s for s in expr.free_symbols if s.is_integer and s not in (K, V)}
    return tuple(sorted(free, key=lambda s: (ORDER.index(s) if s in ORDER else 1.5, str(s))))


def _outside(expr: sp.Expr) -> set:
    """Indices used outside of every contraction."""
    return expr.replace(lambda e: isinstance(e, sp.Sum), lambda s: sp.Add(*(sp.Symbol(str(x), integer=True) for x in s.free_symbols if x.is_integer and x not in (K, V)))).free_symbols


def code(expr: sp.Expr, dims: tuple) -> str:
    """Source of a tensor whose last dimensions are `dims` (singletons where the expression does not depend on one)."""
    expr = sp.sympify(expr)
    if expr.is_Rational:
        return str(expr) if expr.is_Integer else repr(float(expr))
    if isinstance(expr, sp.Sum):
        return _contraction(expr, dims)
    if isinstance(expr, sp.KroneckerDelta):
        return _layout("eye", tuple(expr.args), dims)
    if isinstance(expr, sp.Indexed):
        return _layout(name_of(expr), expr.indices, dims)
    if isinstance(expr, sp.Symbol):
        return str(expr) if str(expr) in NUMBERS else _layout(str(expr), (), dims)
    if isinstance(expr, sp.Add):
        return _sum(expr, dims)
    if isinstance(expr, sp.Mul):
        return _product(expr, dims)
    if isinstance(expr, sp.Pow):
        return _power(expr, dims)
    function = {sp.exp: "torch.exp", sp.log: "torch.log", sp.Abs: "torch.abs"}[expr.func]
    return f"{function}({code(expr.args[0], dims)})"


def _layout(name: str, own: tuple, dims: tuple) -> str:
    """Place a tensor's own dimensions among `dims`: permute where the order differs, None where it has none."""
    want = tuple(d for d in dims if d in own)
    if want != own:
        if len(own) == 2:
            name = f"{name}.mT"
        else:
            name = f"torch.movedim({name}, {tuple(own.index(d) - len(own) for d in want)}, {tuple(range(-len(own), 0))})"
    missing = [d not in own for d in dims]
    if not any(missing):
        return name
    return f"{name}[..., {', '.join('None' if m else ':' for m in missing)}]"


def _group(text: str, expr: sp.Expr) -> str:
    return f"({text})" if isinstance(expr, sp.Add) else text


def _sum(expr: sp.Add, dims: tuple) -> str:
    terms = sorted(expr.args, key=lambda t: (t.could_extract_minus_sign(), -len(t.atoms(sp.Indexed)), str(t)))
    text = code(terms[0], dims)
    for term in terms[1:]:
        minus = term.could_extract_minus_sign()
        text += f" {'-' if minus else '+'} {_group(code(-term if minus else term, dims), -term if minus else term)}"
    return text


def _product(expr: sp.Mul, dims: tuple) -> str:
    top, bottom = expr.as_numer_denom() if not expr.is_Rational else (expr, sp.S.One)
    if bottom != 1 and sp.Mul(top, 1 / bottom) != expr:
        top, bottom = expr, sp.S.One
    coefficient, rest = top.as_coeff_Mul()
    factors = [f for f in sp.Mul.make_args(rest) if f != 1]
    sign = "-" if coefficient < 0 else ""
    parts = [code(abs(coefficient), dims)] if abs(coefficient) != 1 else []
    parts += [_group(code(f, dims), f) for f in sorted(factors, key=lambda f: (len(indices(f)), str(f)))]
    text = sign + (" * ".join(parts) or "1")
    if bottom == 1:
        return text
    below = code(bottom, dims)
    return f"{text} / {below if isinstance(bottom, (sp.Symbol, sp.Indexed, sp.Integer)) else f'({below})'}"


def _power(expr: sp.Pow, dims: tuple) -> str:
    base, power = expr.args
    inner = code(base, dims)
    wrapped = inner if isinstance(base, (sp.Symbol, sp.Indexed)) else f"({inner})"
    if power == sp.Rational(1, 2):
        return f"torch.sqrt({inner})"
    if power.is_Integer and power < 0:
        return f"1 / {wrapped}" if power == -1 else f"1 / {wrapped}**{-power}"
    return f"{wrapped}**{power}" if power.is_Integer else f"{wrapped} ** ({code(power, dims)})"


_LETTERS = {i: "i", j: "j", l: "l"}


def _contraction(total: sp.Sum, dims: tuple) -> str:
    """An einsum over groups of factors that share their channels; what depends on no channel stays outside."""
    bound = tuple(limit[0] for limit in total.limits)
    groups: dict[tuple, list] = {}
    for factor in sp.Mul.make_args(total.function):
        groups.setdefault(indices(factor), []).append(factor)
    outside = groups.pop((), [])
    free = tuple(d for d in ORDER if d in {d for g in groups for d in g} and d not in bound)
    lhs = ",".join("..." + "".join(map(str, g)) for g in groups)
    operands = ", ".join(code(sp.Mul(*factors), g) for g, factors in groups.items())
    text = f'torch.einsum("{lhs}->...{"".join(map(str, free))}", {operands})'
    text = _layout(text, free, dims)
    return " * ".join([*(_group(code(f, dims), f) for f in outside), text])


def assignment(step: Assign) -> str:
    """One line of source: name = ..."""
    if step.solve is None:
        return f"{step.name} = {code(step.expr, step.dims)}"
    batch = tuple(d for d in step.dims if d == i)  # the matrix [.., (i), j, l], the solution [.., (i), j]
    right = f"({code(step.expr, (*batch, j))}).expand(matrix.shape[:-1])"
    solved = f"torch.linalg.solve(matrix, {right}[..., None])[..., 0]"
    return f"matrix = {code(step.solve, (*batch, j, l))}\n{step.name} = {solved}{'.mT' if batch else ''}"
