"""Index notation -> source text. Every tensor's last dimensions are its channels; whatever comes before broadcasts.

The printer never looks at the leading dimensions, so the same text serves one token ([B, H, ...]) and all tokens at once
([B, T, H, ...]). A dialect says how a tensor is laid out among other channels, contracted, and which functions exist.
"""

from __future__ import annotations

import sympy as sp
from sympy.codegen.cfunctions import expm1

from unify.notation import factor_order, term_order
from unify.recurrence import Assign
from unify.symbols import SIZE, V, array, i, j, l, name_of

ORDER = (j, l, i)
NUMBERS = ("scale", "K", "V")


def indices(expr: sp.Expr) -> tuple[sp.Symbol, ...]:
    """Free channel indices of an expression in the layout's order: key channels before value channels."""
    free = expr.free_symbols & SIZE.keys()
    return tuple(sorted(free, key=lambda s: (SIZE[s] == V, ORDER.index(s) if s in ORDER else 9, str(s))))


def precise(expr: sp.Expr) -> sp.Expr:
    """1 - alpha, where that is the whole expression, as -expm1(g): what a weak gate forgets, with all of its digits."""
    alpha = [x for x in sp.Add.make_args(1 - expr) if isinstance(x, sp.Indexed) and name_of(x) == "alpha"]
    return -expm1(array("g", alpha[0].indices)) if alpha == [1 - expr] else expr


def _rank(factor: sp.Expr) -> tuple:
    """A product's order: what has few channels first, so that little is computed often; then as it is read."""
    return len(indices(factor)), *factor_order(factor)


class TorchPrinter:
    """The torch dialect: einsum contractions, None for a missing channel behind an ellipsis."""

    functions = {  # noqa: RUF012
        sp.exp: "torch.exp", expm1: "torch.expm1", sp.log: "torch.log", sp.Abs: "torch.abs", sp.sign: "torch.sign",
    }  # fmt: skip

    def code(self, expr: sp.Expr, dims: tuple) -> str:
        """Source of a tensor whose last dimensions are `dims` (singletons where the expression lacks one)."""
        expr = sp.sympify(expr)
        if expr.is_number:
            return str(expr) if expr.is_Integer else repr(float(expr))
        if isinstance(expr, sp.Sum):
            return self.contraction(expr, dims)
        if isinstance(expr, sp.KroneckerDelta):
            return self.layout("eye", tuple(expr.args), dims)
        if isinstance(expr, sp.Indexed):
            return self.layout(name_of(expr), expr.indices, dims)
        if isinstance(expr, sp.Symbol):
            return str(expr) if str(expr) in NUMBERS else self.layout(str(expr), (), dims)
        if isinstance(expr, sp.Add):
            return self._sum(expr, dims)
        if isinstance(expr, sp.Mul):
            return self._product(expr, dims)
        if isinstance(expr, sp.Pow):
            return self._power(expr, dims)
        return f"{self.functions[expr.func]}({self.code(expr.args[0], dims)})"

    def _sum(self, expr: sp.Add, dims: tuple) -> str:
        terms = sorted(expr.args, key=term_order)
        text = self.code(terms[0], dims)
        for term in terms[1:]:
            minus = term.could_extract_minus_sign()
            text += f" {'-' if minus else '+'} {self._group(-term if minus else term, dims)}"
        return text

    def _product(self, expr: sp.Mul, dims: tuple) -> str:
        coefficient, rest = expr.as_coeff_Mul()
        number, below = (coefficient.p, coefficient.q) if coefficient.is_Rational else (coefficient, 1)
        top, bottom = [], [sp.Integer(below)]
        for x in sp.Mul.make_args(rest):
            under = isinstance(x, sp.Pow) and x.exp.is_Rational and x.exp < 0
            (bottom if under else top).append(1 / x if under else x)
        parts = [self.code(abs(number), dims)] if abs(number) != 1 else []
        parts += [self._group(x, dims) for x in sorted(top, key=_rank) if x != 1]
        text = ("-" if number < 0 else "") + (" * ".join(parts) or "1")
        bottom = sorted((x for x in bottom if x != 1), key=_rank)
        if not bottom:
            return text
        below = " * ".join(self._group(x, dims) for x in bottom)
        return f"{text} / ({below})" if len(bottom) > 1 else f"{text} / {self._atom(bottom[0], dims)}"

    def _power(self, expr: sp.Pow, dims: tuple) -> str:
        base, power = expr.args
        if power == sp.Rational(1, 2):
            return self.root(self.code(base, dims))
        if power.is_Integer and power < 0:
            return f"1 / {self.whole(base, -power, dims)}"
        return self.whole(base, power, dims) if power.is_Integer else self.general(base, power, dims)

    def _group(self, expr: sp.Expr, dims: tuple) -> str:
        return f"({self.code(expr, dims)})" if isinstance(expr, sp.Add) else self.code(expr, dims)

    def _atom(self, expr: sp.Expr, dims: tuple) -> str:
        text = self.code(expr, dims)
        return text if isinstance(expr, sp.Symbol | sp.Indexed | sp.Integer) else f"({text})"

    # -- the dialect --------------------------------------------------------------------------------------------------

    def root(self, text: str) -> str:
        """Square root of a text."""
        return f"torch.sqrt({text})"

    def whole(self, base: sp.Expr, power: sp.Integer, dims: tuple) -> str:
        """A whole power."""
        return self._atom(base, dims) if power == 1 else f"{self._atom(base, dims)}**{power}"

    def general(self, base: sp.Expr, power: sp.Expr, dims: tuple) -> str:
        """Any other power."""
        return f"{self._atom(base, dims)} ** {self._atom(power, dims)}"

    def layout(self, name: str, own: tuple, dims: tuple) -> str:
        """Place a tensor's own channels among `dims`: permute where the order differs, None where it has none."""
        want = tuple(d for d in dims if d in own)
        if want != own:
            order = tuple(own.index(d) - len(own) for d in want)
            name = f"{name}.mT" if len(own) == 2 else f"torch.movedim({name}, {order}, {tuple(range(-len(own), 0))})"
        missing = [d not in own for d in dims]
        return f"{name}[..., {', '.join('None' if m else ':' for m in missing)}]" if any(missing) else name

    def contraction(self, total: sp.Sum, dims: tuple) -> str:
        """An einsum over groups of factors that share their channels; what depends on no channel stays outside."""
        groups: dict[tuple, list] = {}
        for factor in sp.Mul.make_args(total.function):
            groups.setdefault(indices(factor), []).append(factor)
        outside, free = groups.pop((), []), indices(total)
        lhs = ",".join("..." + "".join(map(str, g)) for g in groups)
        operands = ", ".join(self.code(sp.Mul(*factors), g) for g, factors in groups.items())
        text = self.layout(f'torch.einsum("{lhs}->...{"".join(map(str, free))}", {operands})', free, dims)
        return " * ".join([*(self._group(f, dims) for f in outside), text])

    def assignment(self, step: Assign) -> str:
        """Source of one assignment."""
        if step.solve is None:
            text = self.code(precise(step.expr), step.dims)
            if step.dims and step.expr.is_number:  # a tensor too, so that it can be given channels
                text = f"q.new_full({(1,) * len(step.dims)}, {text})"
            return f"{step.name} = {text}"
        batch = tuple(d for d in step.dims if d == i)  # the matrix [.., (i), j, l], the solution [.., (i), j]
        right = f"{self._atom(step.expr, (*batch, j))}.expand(matrix.shape[:-1])"
        solved = f"torch.linalg.solve(matrix, {right}[..., None])[..., 0]"
        return f"matrix = {self.code(step.solve, (*batch, j, l))}\n{step.name} = {solved}{'.mT' if batch else ''}"


_TORCH = TorchPrinter()
code, assignment = _TORCH.code, _TORCH.assignment
