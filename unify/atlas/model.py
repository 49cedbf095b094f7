"""A model as its page and the comparison show it: rows of words and formulas, each with a key that pairs it with another's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

from markupsafe import Markup

from unify.notation import MEANING, Latex, energy_parts, latex, pretty, static_names
from unify.recurrence import PHASES
from unify.show import AT, Stages, belief, brief, energy_rows, facts, legend, printed_source, rounded, symbol_of, words
from unify.show import polynomial as count_of

from .mathml import Formula, formula, math

if TYPE_CHECKING:
    from unify.models.zoo import Model
    from unify.triple import Triple

LEGS = ("architecture", "posterior", "prior")
UNASKED = ("observations", "scale")  # fields of a leg that are no choice among a few
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_PRECISIONS = ("Ibar", "P", "Lambda")


@dataclass(frozen=True)
class Row:
    """A line of a model: `what` it says, its words or formula, and a `key` that the same line of another model has.

    mean: the letter of the model's mean, S or M; what is written the same but for it counts as the same.
    """

    section: str
    key: str
    what: str
    value: str | Formula
    mean: str = "S"

    @property
    def same(self) -> str:
        """The text by which two rows are compared."""
        return self._neutral(self.value.latex if isinstance(self.value, Formula) else self.value)

    @property
    def shown(self) -> Markup:
        """The value as HTML."""
        return self.value.mathml(self._neutral) if isinstance(self.value, Formula) else Markup.escape(self.value)

    def _neutral(self, text: str) -> str:
        return re.sub(rf"(?<![A-Za-z]){self.mean}(?![A-Za-z])", "S", text)


@dataclass(frozen=True)
class Page:
    """Everything about one model."""

    model: Model

    @cached_property
    def stages(self) -> Stages:
        """Triple, free energy, recurrence, structure and plan."""
        return Stages(self.model)

    @cached_property
    def write(self) -> Latex:
        """LaTeX in the model's own notation."""
        return Latex(static_names(self.model.triple))

    @property
    def mean(self) -> str:
        """The letter of the mean that is carried: S, or M where it is the natural one."""
        return self.stages.structure.mean

    @property
    def href(self) -> str:
        """The page, from the top of the site."""
        return f"models/{self.model.name}.html"

    @property
    def citation(self) -> Markup:
        """The citation, with a link for each arXiv number."""
        link = r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>'
        return Markup(_ARXIV.sub(link, str(Markup.escape(self.model.citation))))

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """leg.field -> what is chosen, one word each; a model of several observations may choose several."""
        return choices(self.model.triple)

    @property
    def brief(self) -> tuple[str, str, str]:
        """The triple in three cells."""
        return brief(self.model.triple)

    @property
    def state(self) -> tuple[str, str]:
        """Floats a head: as a polynomial, and at K = V = 64."""
        cost = self.stages.recurrence.cost()["state"]
        return count_of(cost), f"{rounded(cost)} at K = V = {AT}"

    @property
    def triple(self) -> list[tuple[str, list[Row]]]:
        """The legs, in words."""
        return [
            (leg, [Row(leg.capitalize(), f"{leg} {what}", what, said) for what, said in rows])
            for leg, rows in words(self.model.triple)
        ]

    @cached_property
    def energy(self) -> list[tuple[str, list[Row]]]:
        """(observation, or nothing where there is one, its terms of F)."""
        many, out = len(self.stages.energy.losses) > 1, []
        for n in range(len(self.stages.energy.losses)):
            parts, rows = energy_parts(self.stages.energy, n), energy_rows(self.stages, n)
            named = [
                Row("Free energy", f"energy {n} {kind}", lead, formula("", self.write.terms(expr)), self.mean)
                for (kind, expr), (lead, _) in zip(parts, rows, strict=True)
            ]
            out.append((f"observation {n + 1}" if many else "", named))
        return out

    @property
    def belief(self) -> list[Formula]:
        """The moments of the belief that stand in F, in the states."""
        return [formula(self.write(left), self.write.terms(right)) for left, right in belief(self.stages)]

    @cached_property
    def recurrence(self) -> list[tuple[str, list[Row]]]:
        """(phase, its assignments)."""
        return [(p, rows) for p in PHASES if (rows := list(self._assignments(p)))]

    def _assignments(self, phase: str) -> Iterator[Row]:
        for step in self.stages.recurrence.phase(phase):
            left, terms = step.sides(self.write)
            key = f"recurrence {phase} {self._role(step.name)}"
            yield Row("Recurrence", key, f"{phase} {step.pretty()[0]}", formula(left, terms), self.mean)

    def _role(self, name: str) -> str:
        """A name as another model's may be called that plays the same part: the mean, the precision, or itself."""
        stem, rest = re.fullmatch(r"(.+?)((?:_p|_new|_\d+|\d+)?)", name).groups()
        if stem == self.mean:
            return "mean" + rest
        return ("precision" if stem in _PRECISIONS else stem) + rest

    @property
    def symbols(self) -> list[tuple[Markup, str, str, str]]:
        """Arguments, then states: (symbol, name in the op, shape, meaning)."""
        r, static = self.stages.recurrence, static_names(self.model.triple)
        written = [math(latex(symbol_of(x, self.model.triple), static)) for x in (*r.inputs, *r.states)]
        return [(shown, *rest) for shown, (_, *rest) in zip(written, legend(r), strict=True)]

    @property
    def starts(self) -> list[Row]:
        """The states: shape, where they start, and what they are."""
        return [
            Row(
                "State",
                f"state {self._role(s.name)}",
                s.name,
                f"{s.shape}, starts at {pretty(s.initial)}: {MEANING[s.name]}",
            )
            for s in self.stages.recurrence.states
        ]

    @property
    def arguments(self) -> list[Row]:
        """The arguments and their shapes."""
        return [Row("Arguments", f"argument {x.name}", x.name, x.shape) for x in self.stages.recurrence.inputs]

    @property
    def facts(self) -> list[Row]:
        """Structure, plan and cost, in sentences."""
        found, rows = {}, []
        for name, sentence in facts(self.stages):
            found[name] = found.get(name, 0) + 1
            rows.append(Row("Structure and cost", f"fact {name} {found[name]}", name, sentence, self.mean))
        return rows

    @property
    def rows(self) -> list[Row]:
        """All that a comparison sets side by side."""
        groups = (*self.triple, *self.energy, *self.recurrence)
        return [*(row for _, rows in groups for row in rows), *self.arguments, *self.starts, *self.facts]

    def source(self, backend: str) -> str:
        """The printed source of one token's step."""
        return printed_source(self.model.triple, backend)


def choices(triple: Triple) -> dict[str, tuple[str, ...]]:
    """leg.field -> the words of what a triple chooses there."""
    out = {}
    for leg in LEGS:
        chosen = getattr(triple, leg)
        for field in fields(chosen):
            if field.name not in UNASKED:
                value = getattr(chosen, field.name)
                several = value if isinstance(value, tuple) else (value,)
                out[f"{leg}.{field.name}"] = tuple(dict.fromkeys(map(_word, several))) or ("none",)
    return out


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return str(value) if isinstance(value, str | int | float) else type(value).__name__.lower()
