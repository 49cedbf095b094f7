"""How mathematics is written: one reading order, three spellings (program text, Unicode for a terminal, LaTeX).

sympy sorts factors and terms by its own needs; a reader expects gates before keys, keys before states, and what was
there before what is added. The glyph of each name is given once, for Unicode and LaTeX together, so that the two agree:

    state X     X before the token, X~ after forgetting, X' after the token      (LaTeX: X_{t-1}, \\tilde X_t, X_t)
    input x     x_2 is the second observation's x                                (LaTeX: x^{(2)}_t)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy as sp

from .symbols import K, LogDet, V, array, arrays, i, j, l, name_of, put

__all__ = [
    "GLYPHS",
    "MEANING",
    "Latex",
    "energy_parts",
    "fold",
    "glossary",
    "grouped",
    "latex",
    "plain",
    "polynomial",
    "pretty",
    "solved",
    "static_names",
]


@dataclass(frozen=True)
class Glyph:
    """Unicode and LaTeX of a name; `sub` is a subscript that stays, such as the 0 of Lambda_0."""

    text: str
    latex: str
    sub: str = ""


GLYPHS = {
    "alpha": Glyph("α", r"\alpha"),
    "beta": Glyph("β", r"\beta"),
    "importance": Glyph("b", "b"),
    "b": Glyph("b\u030c", r"\check{b}"),  # a key, where b is the importance
    "prior_precision": Glyph("Λ₀", r"\Lambda", "0"),
    "prior_mean": Glyph("μ₀", r"\mu", "0"),
    "noise": Glyph("w", "w"),
    "Lambda": Glyph("Λ", r"\Lambda"),
    "Sigma": Glyph("Ψ", r"\Psi"),
    "mu": Glyph("μ", r"\mu"),
    "anchor": Glyph("s*", "s^{*}"),
    "temperature": Glyph("τ", r"\tau"),
    "bonus": Glyph("u", "u"),
    "erase": Glyph("η", r"\eta"),
    "eps": Glyph("ε", r"\varepsilon"),
    "write": Glyph("ω", r"\omega"),
    "mix": Glyph("γ", r"\gamma"),
    "scale": Glyph("scale", r"\mathrm{scale}"),
    "gain": Glyph("κ", r"\kappa"),
    "ridge": Glyph("ρ", r"\rho"),
    "g_importance": Glyph("gᴵ", "g^{I}"),
    "alpha_importance": Glyph("αᴵ", r"\alpha^{I}"),
    "k_raw": Glyph("k̂", r"\hat{k}"),
    "variance": Glyph("var", r"\mathrm{var}"),
    "K": Glyph("K", "K"),
    "V": Glyph("V", "V"),
}
_MARKED = {"Ibar": {"": Glyph("Ī", r"\bar{I}"), "p": Glyph("Ĩ", r"\tilde{I}"), "new": Glyph("Ī′", r"\bar{I}")}}
_STATES = ("S", "M", "Ibar", "P", "Lambda", "A", "mu")
_STATIC = frozenset({"prior_precision", "prior_mean", "bonus", "ridge", "gain"})
_TIMELESS = frozenset({"m", "Sigma", "anchor", "scale", "K", "V"})

MEANING = {
    "q": "query",
    "k": "key",
    "v": "value",
    "g": "log decay, at most 0: α = exp g is what is kept of the past",
    "beta": "precision of the observation (write strength)",
    "importance": "importance: the precision that enters the curvature",
    "prior_precision": "prior precision Λ₀",
    "prior_mean": "prior mean μ₀",
    "noise": "variance that a token's diffusion adds",
    "temperature": "temperature of the key",
    "bonus": "bonus for the token that is being read",
    "erase": "weight of the anchor (erase gate)",
    "write": "gate on the value (write gate)",
    "mix": "share of the solved query in the read",
    "gain": "factor on the information that is kept",
    "ridge": "prior precision, relative to the size of P",
    "g_importance": "log decay of the keys' second moment A",
    "S": "mean of the memory",
    "M": "natural mean Λ (μ − μ₀): a plain decayed sum",
    "Ibar": "excess importance Λ − Λ₀: a plain decayed sum",
    "P": "excess precision Λ − Λ₀, a matrix",
    "Lambda": "precision of the memory",
    "A": "second moment of the keys",
    "a": "key that reads what is erased",
    "b": "key along which is erased",
    "p": "key that reads the anchor",
    "scale": "factor on the query",
}


def glossary(names: Iterable[str] = MEANING) -> list[tuple[str, str, str]]:
    """(LaTeX, Unicode, meaning) of arguments and states by name, in the order of `MEANING`; of all of them by default."""
    wanted = set(names)
    return [(Latex()(array(x)).replace("_{t-1}", "").replace("_{t}", ""), _Pretty()(array(x)), said)
            for x, said in MEANING.items() if x in wanted]  # fmt: skip


def _split(name: str) -> tuple[str, str]:
    """A name as (stem, suffix): M_new is (M, new), prior_precision is itself; c1 is (c, _1)."""
    if name in GLYPHS:
        return name, ""
    if name[0] == "c" and name[1:].isdigit():
        return "c", f"_{name[1:]}"
    stem, _, suffix = name.rpartition("_")
    return (stem, suffix) if stem and (suffix in ("p", "new") or suffix.isdigit()) else (name, "")


# --- reading order ----------------------------------------------------------------------------------------------------

_FIRST = ("eps", "scale", "alpha", "beta", "importance", "gain", "ridge", "mix", "prior_precision", "noise")
_KEYS = ("q", "bonus", "erase", "k", "a", "b", "p", "x")


def factor_order(x: sp.Expr) -> tuple:
    """Where a factor stands in a product: numbers and gates, keys, values, states; contractions last."""
    base = x.base if isinstance(x, sp.Pow) else x
    names = {name_of(y) for y in x.atoms(sp.Indexed)}
    if isinstance(base, sp.Sum):
        return 9, "m" in names, str(x)
    if isinstance(base, sp.Add):  # gates such as 1 - alpha lead, and a precision stands before the mean it weighs
        if {name_of(y) for y in arrays(x)} <= {"alpha", "mix"}:
            return 0, 1.5, str(x)
        loose = {d for y in x.atoms(sp.Indexed) for d in y.indices}
        return (
            1 if not loose else 4 if base is x and len(loose - {i}) == len(loose) == 1 else 8,
            "m" in names,
            len(str(x)),
            str(x),
        )
    if not isinstance(base, (sp.Indexed, sp.Symbol)):
        return 7, str(x)
    stem = "eps" if name_of(base).startswith("eps") else _split(name_of(base))[0]
    for rank, names in (
        (0, _FIRST),
        (2, _KEYS),
        (3, ("write", "e", "v")),
        (5, ("P", "Lambda")),
        (6, (*_STATES, "m", "Sigma", "prior_mean")),
    ):
        if stem in names:
            return rank, names.index(stem), str(x)
    return 1, False, 0, str(x)


def term_order(x: sp.Expr) -> tuple:
    """What was there before what is added; numbers lead, but a negative one closes."""
    names = {_split(name_of(y))[0] for y in x.atoms(sp.Indexed)} - {"prior_precision"}
    minus = x.could_extract_minus_sign()
    bare = isinstance(x, (sp.Indexed, sp.Symbol))
    state = (1 - bare) if names & {*_STATES, "m"} and not x.has(sp.Sum) else 2
    number = (2 if minus else 0) if x.is_number else 1
    prior = bare and name_of(x) == "prior_precision"
    return minus, number, not prior, bool(names), isinstance(x, sp.log), state, len(names), str(x)


# --- the three spellings ----------------------------------------------------------------------------------------------


class _Writer:
    """Walks an expression in reading order; a spelling says how each piece looks."""

    minus, gap, half = "-", "*", ""

    def __call__(self, expr) -> str:
        return self.add(sp.sympify(expr))

    def terms(self, expr: sp.Expr) -> list[tuple[bool, str]]:
        """The terms of a sum in reading order: (whether it is taken away, the term without its sign)."""
        out = []
        for term in sorted(sp.Add.make_args(expr), key=term_order):
            negative = term.could_extract_minus_sign()
            out.append((negative, self.product(-term if negative else term)))
        return out

    def joined(self, terms: Iterable[tuple[bool, str]]) -> str:
        """Terms as one sum."""
        out = ""
        for n, (negative, text) in enumerate(terms):
            sign = ("" if not negative else self.minus) if n == 0 else f" {self.minus if negative else '+'} "
            out += sign + text
        return out

    def add(self, expr: sp.Expr) -> str:
        return self.joined(self.terms(expr))

    def product(self, expr: sp.Expr) -> str:
        number, rest = expr.as_coeff_Mul()
        if number < 0:
            return self.minus + self.product(-expr)
        top, bottom = [], []
        for x in sp.Mul.make_args(rest):
            under = isinstance(x, sp.Pow) and x.exp.is_number and x.exp.is_negative
            (bottom if under else top).append(1 / x if under else x)
        top = sorted((x for x in top if x != 1), key=factor_order)
        return self.quotient(number, top, sorted(bottom, key=factor_order))

    def quotient(self, number: sp.Expr, top: list, bottom: list) -> str:
        """number * top / bottom on one line."""
        parts = [self.number(number)] if number != 1 or not top else []
        parts += [self.factor(x, last=n == len(top) - 1 and not bottom) for n, x in enumerate(top)]
        text = self.gap.join(parts)
        if not bottom:
            return text
        below = self.gap.join(self.factor(x, last=n == len(bottom) - 1) for n, x in enumerate(bottom))
        alone = len(bottom) == 1 and not isinstance(bottom[0], sp.Sum)
        return f"{text}{self.over}{below if alone else self.group(below)}"

    over = "/"

    def factor(self, x: sp.Expr, last: bool = True) -> str:
        """A factor of a product: sums in parentheses, a contraction only where something follows it."""
        if isinstance(x, sp.Add) or (isinstance(x, sp.Sum) and not last):
            return self.group(self.atom(x))
        return self.atom(x)

    def atom(self, x: sp.Expr) -> str:
        if isinstance(x, sp.Add):
            return self.add(x)
        if isinstance(x, sp.Mul):
            return self.product(x)
        if isinstance(x, sp.Sum):
            return self.total([limit[0] for limit in reversed(x.limits)], self.body(x.function))
        if isinstance(x, sp.Pow):
            return self.power(x.base, x.exp)
        if isinstance(x, (sp.Indexed, sp.Symbol)):
            return self.name(name_of(x), tuple(x.indices) if isinstance(x, sp.Indexed) else ())
        if isinstance(x, sp.KroneckerDelta):
            return self.delta(*x.args)
        if isinstance(x, LogDet):
            return self.logdet(x.args[0])
        if isinstance(x, sp.Abs):
            return f"|{self.add(x.args[0])}|"
        if x.is_Number:
            return self.number(x)
        return self.function(x.func.__name__, x.args[0])

    def body(self, x: sp.Expr) -> str:
        """What is summed over."""
        return self.group(self.add(x)) if isinstance(x, sp.Add) else self.product(x)

    def group(self, text: str) -> str:
        return f"({text})"

    def base(self, x: sp.Expr) -> str:
        alone = isinstance(x, (sp.Indexed, sp.Symbol)) or (
            x.is_Rational and x >= 0 and "/" not in _Writer.number(self, x)
        )
        return self.atom(x) if alone else self.group(self.atom(x))

    def number(self, x: sp.Expr) -> str:
        """An integer, a short decimal where it is exact, or a fraction."""
        if x.is_Rational and not x.is_Integer and x != sp.Rational(1, 2) and 10**9 % x.q == 0:
            return f"{float(x):g}"
        return str(x)

    def function(self, name: str, x: sp.Expr) -> str:
        return f"{name}({self.add(x)})"


class _Plain(_Writer):
    """The program's own names, as its source has them."""

    def name(self, name: str, at: tuple) -> str:
        return f"{name}[{', '.join(map(str, at))}]" if at else name

    def total(self, over: list, body: str) -> str:
        return f"sum_{''.join(map(str, over))}({body.removeprefix('(').removesuffix(')') if _wrapped(body) else body})"

    def power(self, base: sp.Expr, exponent: sp.Expr) -> str:
        if exponent == sp.Rational(1, 2):
            return f"sqrt({self.add(base)})"
        return f"{self.base(base)}**{self.base(exponent)}"

    def delta(self, x, y) -> str:
        return f"delta[{x}, {y}]"

    def logdet(self, x) -> str:
        return f"log det {x}"


_SUBSCRIPT = dict(zip("aehijklmn0123456789", "ₐₑₕᵢⱼₖₗₘₙ₀₁₂₃₄₅₆₇₈₉", strict=True))
_SUPERSCRIPT = {"S": "ˢ", "M": "ᴹ", "Ibar": "ᴵ", "P": "ᴾ", "A": "ᴬ", "Lambda": "ᴸ", "x": "ˣ"}
_FRACTIONS = {sp.Rational(1, 2): "½", sp.Rational(2, 3): "⅔", sp.Rational(1, 3): "⅓"}
_UP, _DOWN = str.maketrans("0123456789-()", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁽⁾"), str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _low(*at) -> str:
    """Indices as subscripts."""
    return "".join(_SUBSCRIPT.get(x, x) for index in at for x in str(index))


class _Pretty(_Writer):
    """Unicode for a terminal."""

    minus, gap, over = "−", " ", " / "

    def name(self, name: str, at: tuple) -> str:
        stem, suffix = _split(name)
        if name.startswith("E_") and name[2:] in _SUPERSCRIPT:  # a proof's "anything bounded in the place of X"
            text = f"E{_SUPERSCRIPT[name[2:]]}"
        elif stem in _MARKED and suffix in _MARKED[stem]:
            text = _MARKED[stem][suffix].text
        else:
            text = (_MARKED[stem][""] if stem in _MARKED else GLYPHS.get(stem, Glyph(stem, stem))).text
            text += {"": "", "p": "\u0303", "new": "′"}.get(
                suffix, suffix[1:].translate(_DOWN) if suffix[:1] == "_" else f"({suffix})".translate(_UP)
            )
        return text + _low(*at)

    def number(self, x: sp.Expr) -> str:
        if x in _FRACTIONS:
            return _FRACTIONS[x]
        text = super().number(x)
        digits, e, power = text.partition("e")
        return text if not e else f"{'' if digits == '1' else digits + ' · '}10{str(int(power)).translate(_UP)}"

    def total(self, over: list, body: str) -> str:
        return f"∑{_low(*over)} {body}"

    def power(self, base: sp.Expr, exponent: sp.Expr) -> str:
        if exponent == sp.Rational(1, 2):
            return f"√({self.add(base)})"
        up = str(exponent).translate(_UP) if exponent.is_Integer else f"^{self.base(exponent)}"
        return f"{self.base(base)}{up}"

    def delta(self, x, y) -> str:
        return f"δ{_low(x, y)}"

    def logdet(self, x) -> str:
        return f"log det {self.name(str(x), ())}"


class Latex(_Writer):
    """LaTeX; plain enough that matplotlib's mathtext reads every row."""

    gap = " "

    def __init__(self, static: frozenset[str] = _STATIC):
        self.static = static

    def name(self, name: str, at: tuple) -> str:
        stem, suffix = _split(name)
        glyph = (
            _MARKED.get(stem, {}).get(suffix) or _MARKED.get(stem, {}).get("") or GLYPHS.get(stem) or Glyph(stem, stem)
        )
        text, sub = glyph.latex, [glyph.sub]
        if suffix == "p" and stem not in _MARKED:
            text = rf"\tilde{{{text}}}"
        elif suffix[:1] == "_":
            sub = [suffix[1:]]
        elif suffix.isdigit():
            text = rf"{text}^{{({suffix})}}"
        if (name not in self.static and stem not in _TIMELESS | self.static) or suffix == "p":
            sub.append("t-1" if stem in _STATES and not suffix else "t")
        where = ",".join(x for x in (*sub, "".join(map(str, at))) if x)
        return f"{text}_{{{where}}}" if where else text

    def number(self, x: sp.Expr) -> str:
        text = super().number(x)
        if "/" in text:
            return rf"\frac{{{x.p}}}{{{x.q}}}"
        digits, e, power = text.partition("e")
        return digits if not e else ("" if digits == "1" else digits + r" \cdot ") + f"10^{{{int(power)}}}"

    def quotient(self, number: sp.Expr, top: list, bottom: list) -> str:
        """A fraction; contractions stand beside it."""
        if not bottom:
            return super().quotient(number, top, bottom)
        beside = [x for x in top if x.has(sp.Sum)]
        above = super().quotient(number, [x for x in top if x not in beside], [])
        below = self.add(bottom[0]) if len(bottom) == 1 else super().quotient(sp.S.One, bottom, [])
        return self.gap.join(
            [rf"\frac{{{above}}}{{{below}}}", *(self.factor(x, n == len(beside) - 1) for n, x in enumerate(beside))]
        )

    def group(self, text: str) -> str:
        tall = any(x in text for x in (r"\frac", r"\sum"))
        return rf"\left( {text} \right)" if tall else f"({text})"

    def total(self, over: list, body: str) -> str:
        return rf"\sum_{{{','.join(map(str, over))}}} {body}"

    def power(self, base: sp.Expr, exponent: sp.Expr) -> str:
        if exponent == sp.Rational(1, 2):
            return rf"\sqrt{{{self.add(base)}}}"
        text = self.base(base)  # an exponent of a name that has one already needs braces
        return f"{{{text}}}^{{{self.add(exponent)}}}" if "^" in text else f"{text}^{{{self.add(exponent)}}}"

    def delta(self, x, y) -> str:
        return rf"\delta_{{{x}{y}}}"

    def logdet(self, x) -> str:
        return rf"\log\det {self.name(str(x), ())}"

    def function(self, name: str, x: sp.Expr) -> str:
        return f"e^{{{self.add(x)}}}" if name == "exp" else rf"\{name} {self.group(self.add(x))}"


def _wrapped(text: str) -> bool:
    """Whether one pair of parentheses encloses the whole text."""
    if not (text.startswith("(") and text.endswith(")")):
        return False
    depth = 0
    for n, x in enumerate(text):
        depth += (x == "(") - (x == ")")
        if depth == 0:
            return n == len(text) - 1
    return False


plain = _Plain()
pretty = _Pretty()


def latex(expr: sp.Expr, static: frozenset[str] = _STATIC) -> str:
    """LaTeX of an expression. static: names that are constant over tokens and carry no t (see `static_names`)."""
    return Latex(static)(expr)


def static_names(triple) -> frozenset[str]:
    """Names of a triple's program that are constant over tokens."""
    names = set(_STATIC) if triple.prior.adaptive is None else _STATIC - {"prior_precision"}
    if triple.architecture.forgetting in ("fixed", "entry"):
        names |= {"g", "alpha"}
    return frozenset(names | {"noise"} if triple.prior.noise in ("fixed", "entry") else names)


# --- equations --------------------------------------------------------------------------------------------------------


def solved(matrix: sp.Expr, right: sp.Expr, write) -> str:
    """The solution of  sum_l matrix[j, l] x[l] = right[j]  as (matrix)^-1 right, without the key indices."""
    tex = isinstance(write, Latex)
    parts = []
    for term in sorted(sp.Add.make_args(matrix), key=lambda x: not x.has(sp.KroneckerDelta)):
        delta = next((x for x in sp.Mul.make_args(term) if isinstance(x, sp.KroneckerDelta)), None)
        if delta is None:
            parts.append(write(_stripped(term)))
            continue
        rest = term / delta
        text = write(_stripped(rest))
        if rest.atoms(sp.Indexed):
            parts.append(rf"\mathrm{{diag}}({text})" if tex else f"diag({text})")
        else:
            times, identity = (r" \, ", r"\mathrm{Id}") if tex else (" ", "Id")
            parts.append(identity if rest == 1 else text + times + identity)
    inner = " + ".join(parts)
    return (rf"\left({inner}\right)^{{-1}} " if tex else f"({inner})⁻¹ ") + write(_stripped(right))


def _stripped(expr: sp.Expr) -> sp.Expr:
    """Names without their key indices: a whole vector or matrix."""
    return expr.xreplace({x: array(name_of(x), tuple(d for d in x.indices if d == i)) for x in expr.atoms(sp.Indexed)})


# --- the free energy, term by term ------------------------------------------------------------------------------------


def energy_parts(energy, n: int) -> list[tuple[str, sp.Expr]]:
    """The terms of the n-th F_t as (kind, expression), the anchor put in: kinds loss, old, prior, predicted."""
    from .energy import GATE_DIMS, divergence

    parts = [("loss", tidy(put(energy.losses[n], anchor=_anchor(energy, n))))]
    if n or energy.apart or energy.triple.prior.dynamics == "diffusion":
        return [*parts, ("predicted", tidy(divergence("m_p", "Lambda_p", energy)))]
    gate = energy.triple.architecture.forgetting
    if gate == "none":
        return [*parts, ("old", tidy(divergence("mu", "Lambda", energy)))]
    alpha = array("alpha", GATE_DIMS[gate])
    old, prior = divergence("mu", "Lambda", energy, alpha), divergence("mu", "Lambda", energy, 1 - alpha, prior=True)
    return [*parts, ("old", tidy(old)), ("prior", tidy(prior))]


def _anchor(energy, n: int):
    """s*[j, i] of the n-th observation; 0 for a full curvature, from which the anchor drops out."""
    from .energy import GATE_DIMS, prior_mean

    stage, weight = energy.stages[n], energy.triple.posterior.anchor_weight
    if stage.curvature == "full" and stage.importance == stage.beta:
        return lambda x, y: sp.S.Zero
    if stage.anchor == "prior":
        return lambda x, y: prior_mean(energy.triple).subs(j, x)
    repeat = n // len(energy.triple.architecture.observations)
    gate = sp.S.One if weight == "one" else array("erase" if repeat == 0 else f"erase_{repeat + 1}", GATE_DIMS[weight])
    held = "m_p" if stage.anchor == "predicted" else "mu"
    return lambda x, y: gate.subs(j, x) * array(held, (x, y))


def tidy(expr: sp.Expr) -> sp.Expr:
    """The same expression as a person would write it: common factors in front of sums, deltas resolved."""
    held: dict[sp.Expr, sp.Expr] = {}

    def hold(total: sp.Sum) -> sp.Expr:
        outside, inside = _pulled(total)
        return sp.S.Zero if outside == 0 else outside * held.setdefault(inside, sp.Dummy("sum", real=True))

    flat = expr.replace(lambda e: isinstance(e, sp.Sum), hold)
    back = {dummy: total for total, dummy in held.items()}
    flat = sp.factor_terms(flat)
    while flat.atoms(sp.Dummy) & back.keys():
        flat = flat.xreplace(back)
    return flat


def _pulled(total: sp.Sum) -> tuple[sp.Expr, sp.Expr]:
    """(what does not depend on the bound indices, the sum of the rest)."""
    body, limits = total.function, list(total.limits)
    deltas = body.atoms(sp.KroneckerDelta)
    if deltas and len(limits) > 1:
        x, y = deltas.pop().args
        gone = next(limit for limit in limits if limit[0] == l)
        body, limits = body.subs(l, x if y == l else y), [limit for limit in limits if limit is not gone]
    body = sp.factor_terms(body)
    if body == 0:
        return sp.S.Zero, sp.S.Zero
    outside, inside = body.as_independent(*(limit[0] for limit in limits), as_Add=False)
    factors = [_collected(x) for x in sp.Mul.make_args(inside)]
    return outside, sp.Sum(sp.Mul(*factors), *limits)


def _collected(expr: sp.Expr) -> sp.Expr:
    """Lambda x + Lambda y as Lambda (x + y)."""
    for x in sorted(arrays(expr), key=str):
        if isinstance(expr, sp.Add) and name_of(x) in ("Lambda", "Lambda_p", "prior_precision"):
            share = sp.Add(*(t / x for t in expr.args if x in sp.Mul.make_args(t)))
            expr = sp.Add(x * share, *(t for t in expr.args if x not in sp.Mul.make_args(t)), evaluate=False)
    return expr


def grouped(expr: sp.Expr) -> sp.Expr:
    """The terms of a numerator gathered by the mean they weigh: (a + b) S + (c + d) mu_0."""
    top, bottom = sp.fraction(expr)
    means = [x for x in arrays(top) if name_of(x) in ("S", "S_p", "prior_mean")]
    if len(means) < 2 or top.has(sp.Sum):
        return expr
    parts = sp.collect(sp.expand(top), means, evaluate=False)
    return sp.Mul(sp.Add(*(x * _upright(sp.factor(share)) for x, share in parts.items())), 1 / bottom)


def _upright(expr: sp.Expr) -> sp.Expr:
    """-(alpha - 1) as 1 - alpha."""
    flip = [x for x in sp.Mul.make_args(expr) if isinstance(x, sp.Add) and any(t.is_number and t < 0 for t in x.args)]
    rest = [x for x in sp.Mul.make_args(expr) if x not in flip]
    return sp.Mul(*rest, *(-x for x in flip), (-1) ** len(flip))


# --- small things -----------------------------------------------------------------------------------------------------


def polynomial(expr: sp.Expr) -> str:
    """A count as a polynomial in K and V, highest degree first: 2KV + K."""
    terms = []
    for (k, v), number in sp.Poly(expr, K, V).terms():
        power = "".join(f"{x}{str(n).translate(_UP) if n > 1 else ''}" for x, n in (("K", k), ("V", v)) if n)
        terms.append((k + v, ("" if number == 1 and power else pretty.number(number)) + power))
    return " + ".join(text for _, text in sorted(terms, key=lambda x: -x[0]))


def fold(text: str, width: int) -> list[str]:
    """Break a formula into lines of at most `width` cells, before a + or - inside as few parentheses as possible."""
    lines, indent = [], ""
    while len(indent + text) > width:
        spots, depth = [], 0
        for n, x in enumerate(text[: width - len(indent)]):
            depth += (x in "([") - (x in ")]")
            if n > width // 4 and x in "+−" and text[n - 1] == " " and text[n + 1 : n + 2] == " ":
                spots.append((depth, -n))
        if not spots:
            break
        cut = -min(spots)[1]
        lines.append(indent + text[:cut].rstrip())
        text, indent = text[cut:], "  "
    return [*lines, indent + text]
