"""The library's own LaTeX as MathML, so that a browser sets it without a font or a script of ours.

The equations are converted from the LaTeX that `unify show --latex` prints, by latex2mathml: the reading order and the
names stay those of `unify.notation`, where sympy's own MathML printer would know neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from latex2mathml.converter import convert
from markupsafe import Markup

_LETTERS = re.compile(r'(?:<mi mathvariant="normal">\w</mi>){2,}')
_OUTER = re.compile(r"^<math[^>]*><mrow>(.*)</mrow></math>$", re.S)


@lru_cache(maxsize=8192)
def inner(latex: str) -> str:
    """LaTeX as the inside of a <math> element; a name in upright letters is one identifier, as it is read aloud."""
    text = _OUTER.match(convert(latex))[1]
    return _LETTERS.sub(lambda found: f"<mi>{re.sub('<[^>]*>', '', found[0])}</mi>", text)


def math(latex: str) -> Markup:
    """LaTeX as a <math> element in a line of text."""
    return _element(inner(latex))


def _element(body: str) -> Markup:
    return Markup(f'<math displaystyle="true">{body}</math>')


def prose(text: str) -> Markup:
    """Words with mathematics between dollar signs."""
    parts = text.split("$")
    return Markup("").join(math(x) if n % 2 else x for n, x in enumerate(parts))


@dataclass(frozen=True)
class Formula:
    """left = a sum, term by term: what two formulas are compared by.

    left: LaTeX, empty where only the sum is written. terms: (whether it is taken away, LaTeX) in reading order.
    """

    left: str
    terms: tuple[tuple[bool, str], ...]

    @property
    def latex(self) -> str:
        """The formula as one line of LaTeX."""
        first, *rest = self.terms
        out = ("-" if first[0] else "") + first[1]
        out += "".join(f" {'-' if negative else '+'} {text}" for negative, text in rest)
        return f"{self.left} = {out}" if self.left else out

    def mathml(self, same: Callable[[str], str] = str) -> Markup:
        """The formula as a <math> element; each term is an <mrow> that carries same(its LaTeX with its sign)."""
        body = f"{inner(self.left)}<mo>=</mo>" if self.left else ""
        for n, (negative, text) in enumerate(self.terms):
            sign = "−" if negative else "+" if n else ""
            body += f"<mo>{sign}</mo>" if sign else ""
            key = Markup.escape(same(f"{'-' if negative else '+'} {text}"))
            body += f'<mrow data-term="{key}">{inner(text)}</mrow>'
        return _element(body)


def formula(left: str, terms: Iterable[tuple[bool, str]]) -> Formula:
    """A formula of a writer's `terms` (`unify.notation`)."""
    return Formula(left, tuple(terms))


_GREEK = {"alpha": "α", "beta": "β", "eps": "ε", "rho": "ρ", "mu": "μ", "Lambda": "Λ", "lambda": "λ", "Ibar": "Ī"}
_SIGNS = (("&lt;=", "≤"), ("&gt;=", "≥"), (" - ", " − "), (" -&gt; ", " → "))


def words(text: str) -> Markup:
    """A sentence of the library with its mathematics as a reader expects it: b_si k^2 <= eps as b, sub si, k², ≤ ε."""
    out = str(Markup.escape(text)).replace("&#39;", "’")
    for plain, sign in _SIGNS:
        out = out.replace(plain, sign)
    out = re.sub(r"\^1\b", "", out)
    out = re.sub(r"\^([0-9])", r"<sup>\1</sup>", out)
    out = re.sub(
        r"(?<![A-Za-z])([A-Za-z]|sum|max|min|" + "|".join(_GREEK) + r")(’?)_([A-Za-z0-9]+)\b", r"\1\2<sub>\3</sub>", out
    )
    out = re.sub(r"\bsum<sub>", "∑<sub>", out)
    out = re.sub(r"(?<![A-Za-z])(" + "|".join(_GREEK) + r")(?![A-Za-z])", lambda found: _GREEK[found[1]], out)
    return Markup(out)


def number(x: float) -> Markup:
    """A number as 1.2 × 10 to a power, or 0."""
    digits, _, power = f"{x:.2e}".partition("e")
    return Markup("0") if x == 0 else Markup("{} × 10<sup>{}</sup>").format(digits, str(int(power)).replace("-", "−"))
