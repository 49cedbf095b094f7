"""The edges between two models as their page shows them: substitution, proof, measured error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from markupsafe import Markup

from unify.notation import pretty
from unify.views import claim

from .mathml import math, number, words
from .plot import Plot, plot

if TYPE_CHECKING:
    from unify.derivations import Edge, Obligation, Proof, Theorem
    from unify.testing import Equivalence


@dataclass(frozen=True)
class Link:
    """One edge, proved and measured."""

    edge: Edge
    proof: Proof
    measured: Equivalence

    @property
    def title(self) -> str:
        """exact, or the order of the limit."""
        return "exact" if self.edge.kind == "exact" else f"limit, error of order {claim(self.edge)}"

    @property
    def short(self) -> str:
        """exact, or ε."""
        return claim(self.edge)

    @property
    def why(self) -> Markup:
        """The reason as a sentence."""
        return words(sentence(self.edge.why))

    @cached_property
    def substitution(self) -> list[tuple[str, Markup]]:
        """(argument or state, equation) of everything that is not just handed on."""
        from unify.derivations.edge import tex

        return [(kind, math(f"{tex(left)} = {tex(right)}")) for kind, left, right in self.edge.rows() if left != right]

    @property
    def output(self) -> Markup | None:
        """What the parent's output is multiplied with, if with anything."""
        from unify.derivations.edge import tex

        return None if self.edge.output == 1 else math(tex(self.edge.output))

    @cached_property
    def obligations(self) -> list[tuple[str, str, Markup, str]]:
        """(phase, what of, the identity, "both sides" where they are written the same)."""
        return [(x.phase, x.about, math(self._identity(x)), _remark(x)) for x in self.proof.obligations]

    @staticmethod
    def _identity(x: Obligation) -> str:
        from unify.derivations.edge import tex

        return tex(x.left) if tex(x.left) == tex(x.right) and x.upto is None else x.latex()

    @cached_property
    def theorem(self) -> Theorem | None:
        """The theorem that goes with the edge."""
        from unify.derivations import THEOREMS

        return THEOREMS[self.edge.theorem]().prove() if self.edge.theorem else None

    @cached_property
    def steps(self) -> list[tuple[str, Markup]]:
        """The theorem's steps: (sentence, identity or inequality)."""
        return [(x.sentence, math(x.latex().replace("&", ""))) for x in self.theorem.steps] if self.theorem else []

    @cached_property
    def points(self) -> list[tuple[float, Markup]]:
        """(eps, relative error) of a limit."""
        return [(e, number(error)) for e, error in zip(self.measured.eps, self.measured.errors, strict=True)]

    @cached_property
    def plot(self) -> Plot | None:
        """The error against eps, for a limit."""
        return plot(self.measured.eps, self.measured.errors, self.edge.order) if self.measured.eps else None


def _remark(x: Obligation) -> str:
    if x.upto == 0:
        return "up to anything bounded"
    return "on both sides" if x.upto is None and pretty(x.left) == pretty(x.right) else ""


@dataclass(frozen=True)
class Pair:
    """All edges from one model to another: a page."""

    parent: str
    child: str
    parent_label: str
    child_label: str
    links: tuple[Link, ...]

    @property
    def href(self) -> str:
        """The page, from the top of the site."""
        return f"edges/{slug(self.parent)}--{slug(self.child)}.html"

    @property
    def name(self) -> str:
        """parent → child, as people write them."""
        return f"{self.parent_label} → {self.child_label}"

    @property
    def claims(self) -> str:
        """The claims in brief: exact, ε."""
        return ", ".join(dict.fromkeys(x.short for x in self.links))


def sentence(text: str) -> str:
    """Words with a capital and a full stop; a symbol at the start, such as the b of "b shared", keeps its case."""
    symbol = re.match(r"(?:[b-zA-Z]|alpha|beta|eps)(?![A-Za-z-])", text)
    return (text[:1] if symbol else text[:1].upper()) + text[1:] + "."


def slug(name: str) -> str:
    """A name as a file may be called."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


def label(name: str) -> str:
    """A model's name as people write it; a triple without a name in the zoo keeps the one of its edge."""
    from unify.models.zoo import ZOO

    return ZOO[name].label if name in ZOO else name


def pairs(edges: tuple[Edge, ...], tick) -> list[Pair]:
    """Prove and measure every edge; those between the same two models share a page."""
    from unify.derivations import prove_edge
    from unify.measured import measure

    found: dict[tuple[str, str], list[Link]] = {}
    for n, edge in enumerate(edges):
        tick(f"{edge.parent_name} → {edge.child_name}", n, len(edges))
        link = Link(edge, prove_edge(edge), measure(edge))
        found.setdefault((edge.parent_name, edge.child_name), []).append(link)
    return [Pair(a, b, label(a), label(b), tuple(links)) for (a, b), links in found.items()]
