"""Structure -> Plan: which schedule runs a recurrence, and why, in words."""

from __future__ import annotations

import re
from dataclasses import dataclass

import sympy as sp

from .structure import Structure, channels
from .symbols import arrays, name_of, put


@dataclass(frozen=True)
class Plan:
    """A schedule: family "linear", "rank one", "elementwise", "solve" or "recurrent", and the reason.

    micro: steps of the mean state per token (observations that could not be merged).
    """

    family: str
    why: str
    micro: int = 1

    @property
    def chunked(self) -> bool:
        """Whether the family has a chunk-parallel form."""
        return self.family != "recurrent"

    def __str__(self):
        return f"{self.family}{'' if self.micro == 1 else f', {self.micro} steps a token'}: {self.why}"


WHY = {
    "rank one": "the transition is diagonal plus rank one and known before the state is: "
    "a WY transform turns a chunk into matmuls",
    "elementwise": "both states are decayed sums, so chunk boundaries come from matmuls; "
    "the read divides entry by entry inside each chunk",
    "solve": "both states are decayed sums, so chunk boundaries come from matmuls; "
    "every read solves with its own precision, batched over tokens",
    "linear": "the state is a decayed sum and is read linearly: chunked matmuls",
    "rescaled query": "the state is a decayed sum and only the query meets the precision: chunked matmuls with q / Lambda",
    "rescaled output": "the state is a decayed sum and the precision divides the output: chunked matmuls, then a division",
}


def plan(structure: Structure) -> Plan:
    """Name the schedule of a structure and say why."""
    micro = len(structure.steps)
    blocked = _blocked(structure)
    if blocked:
        return Plan("recurrent", blocked, micro)
    if structure.transition == "rank one":
        return Plan("rank one", WHY["rank one"], micro)
    family = structure.read if structure.read in ("elementwise", "solve") else "linear"
    return Plan(family, WHY[structure.read], micro)


def _blocked(s: Structure) -> str:
    """Why there is no chunk-parallel form, or nothing."""
    reasons = {
        "dense": "the mean state's update does not split into a diagonal and a rank-one part",
        "row-coupled": "every value channel has a transition of its own, so nothing is shared by the rows",
        "entry": "every memory entry decays (or is written) by itself, so no matmul covers the rows",
    }
    if s.transition in reasons:
        return reasons[s.transition]
    if any(_may_vanish(x.decay) for x in s.steps):
        return "the decay is a sum of gates: where all of them close, its logarithm loses the gradient"
    if any(x.decay is None and len(x.dims) > 1 for x in s.autonomous):
        return "a matrix state evolves nonlinearly, so its chunk boundaries are not sums"
    if s.read in ("elementwise", "solve"):
        return _boundary(s)
    if any(len(x.dims) > 1 for x in s.autonomous):
        return "a matrix state is needed at every token"
    return ""


def _may_vanish(decay: sp.Expr) -> bool:
    """Whether a factor is a sum that is 0 where keys and gates are (a product's logarithm is as exact as theirs)."""
    shut = {name_of(x): sp.S.Zero for x in arrays(decay) if _GATE.fullmatch(name_of(x))}
    sums = [x for x in sp.Mul.make_args(decay) if isinstance(x, sp.Add)]
    return any(sp.expand(put(x, **shut)) == 0 for x in sums)


_GATE = re.compile(r"(alpha|beta|importance|[kpab])(_\d+)?|c\d+")  # c1, c2: a contraction of keys


def _boundary(s: Structure) -> str:
    """Conditions of the families whose precision is a matrix state carried by boundary sums."""
    if s.transition == "rank one":
        return "a matrix precision next to a rank-one transition"
    beside = {name_of(x) for x in arrays(s.direct)}
    if "bonus" in beside and (s.read == "solve" or len(s.steps) > 1 or "prior_mean" in beside):
        return "the bonus meets the precision too, apart from the state"
    big = [x for x in s.autonomous if len(x.dims) > 1]
    if len(big) != 1 or len(s.autonomous) != 1:
        return "" if len(s.autonomous) == 1 and s.read == "elementwise" else "the precision is not one decayed sum"
    if s.read == "solve" and len(big[0].dims) != 2:
        return "every value channel has a full precision of its own"
    if any(channels(step.decay) not in ((), *([(_key(),)] if s.read == "elementwise" else [])) for step in s.steps):
        return "the decay is not shared by the precision's entries"
    return ""


def _key():
    from .symbols import j

    return j
