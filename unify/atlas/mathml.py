"""The library's own LaTeX as MathML, so that a browser sets it without a font or a script of ours.

The equations are converted from the LaTeX that `unify show --latex` prints, by latex2mathml: the reading order and the
names stay those of `unify.notation`, where sympy's own MathML printer would know neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from latex2mathml.converter import convert
from markupsafe import Markup

_LETTERS = re.compile(r'(?:<mi mathvariant="normal">\w</mi>){2,}')
_OUTER = re.compile(r"^<math[^>]*><mrow>(.*)</mrow></math>$", re.S)


def inner(latex: str) -> str:
    """LaTeX as the inside of a <math> element; a name in upright letters is one identifier, as it is read aloud."""
    text = _OUTER.match(convert(latex))[1]
    return _LETTERS.sub(lambda found: f"<mi>{re.sub('<[^>]*>', '', found[0])}</mi>", text)


def math(latex: str) -> Markup:
    """LaTeX as a <math> element in a line of text."""
    return _element(inner(latex))


def _element(body: str) -> Markup:
    return Markup(f'<math displaystyle="true">{body}</math>')  # noqa: S704 - made of converted LaTeX only


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

    @property
    def mathml(self) -> Markup:
        """The formula as a <math> element; each term is an <mrow> that carries its LaTeX with its sign."""
        body = f"{inner(self.left)}<mo>=</mo>" if self.left else ""
        for n, (negative, text) in enumerate(self.terms):
            sign = "−" if negative else "+" if n else ""
            body += f"<mo>{sign}</mo>" if sign else ""
            key = Markup.escape(f"{'-' if negative else '+'} {text}")
            body += f'<mrow data-term="{key}">{inner(text)}</mrow>'
        return _element(body)


def formula(left: str, terms: Iterable[tuple[bool, str]]) -> Formula:
    """A formula of a writer's `terms` (`unify.notation`)."""
    return Formula(left, tuple(terms))
