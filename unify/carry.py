"""Structure -> what a run of tokens does to the states it finds, where that is known without them.

A state X is carried *affinely* where  X' = a (X - rest) + rest + write, token by token, and neither a nor write depends
on a state. Then a run of tokens needs no start to say what it does: its log decays add up, its writes decay to its end.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import sympy as sp

from .energy import prior_mean
from .errors import UnifyError
from .lower.parallel import log_of
from .recurrence import Recurrence
from .structure import Structure, channels, depends_on
from .symbols import arrays, name_of

_POSITIVE = ("alpha", "prior_precision", "temperature", "gain", "ridge")
_NOT_NEGATIVE = ("beta", "importance", "noise", "erase")


@dataclass(frozen=True)
class Carry:
    """One token's effect on one state.

    decays: log decays by the channels they have, () or (j,) or (j, i) ...; the state's log decay is their sum.
    writes: products, each a factor without channels and one for every channel of the state, that add up to what is
        written; None where a write does not factor so or a decay has other channels than the state's first, and only a
        run from zero tells.
    rest: what the state decays to, or 0.
    """

    name: str
    dims: tuple[sp.Symbol, ...]
    decays: tuple[tuple[tuple[sp.Symbol, ...], sp.Expr], ...]
    writes: tuple[tuple[sp.Expr, ...], ...] | None
    rest: sp.Expr


@lru_cache(maxsize=512)
def carries(recurrence: Recurrence, structure: Structure) -> tuple[Carry, ...]:
    """How each state is carried, in the order of the recurrence's states.

    Raises UnifyError where a state is not carried affinely: its transition mixes keys, or a decay or a write depends on
    a state.
    """
    if structure.transition not in ("scalar", "diagonal", "entry"):
        raise _refusal(structure, structure.mean, f"its transition is {structure.transition}")
    found = {x.name: _autonomous(structure, x) for x in structure.autonomous}
    found[structure.mean] = _mean(recurrence, structure)
    moving = set().union(*(depends_on(recurrence, s.name) for s in recurrence.states))
    for name, (decay, terms, _) in found.items():
        met = sorted({name_of(x) for e in (decay, *terms) for x in arrays(e)} & moving)
        if met:
            raise _refusal(structure, name, f"its update reads {', '.join(met)}, which a state decides")
        if not _positive(decay):
            raise _refusal(structure, name, "its decay may be 0 or less, where it has no logarithm")
    return tuple(_carry(s.name, s.dims, *found[s.name]) for s in recurrence.states)


def _refusal(structure: Structure, name: str, why: str) -> UnifyError:
    return UnifyError(
        f"a sequence in pieces (transition {structure.transition}, read {structure.read})",
        f"what a piece does to {name} is not known before the state it starts from: {why}",
        "use states that only decay and are added to (anchor='prior', and a precision with curvature 'none', 'key', "
        "'diagonal' or 'full' that is kept), or pass each piece's final state on as the next one's initial_state",
    )


def _autonomous(structure: Structure, x) -> tuple:
    """Decay, terms of the write, rest."""
    if x.decay is None:
        raise _refusal(structure, x.name, "it evolves nonlinearly")
    return x.decay, sp.Add.make_args(sp.expand(x.drive)), sp.S.Zero


def _mean(recurrence: Recurrence, structure: Structure) -> tuple:
    """The same of the mean state: a token's observations one after the other."""
    decay, terms = sp.S.One, []
    for step in structure.steps:
        write = step.entry if step.entry is not None else (step.key or 0) * (step.value or 0)
        terms = [step.decay * x for x in terms] + ([write] if write != 0 else [])
        decay *= step.decay
    rest = prior_mean(recurrence.triple) if structure.mean == "S" else sp.S.Zero
    return decay, tuple(terms), rest


def _positive(decay: sp.Expr) -> bool:
    """Whether a decay is above 0 whatever the arguments are."""
    known = {"positive": _POSITIVE, "nonnegative": _NOT_NEGATIVE, "real": ("",)}
    sign = {x: next(s for s, names in known.items() if name_of(x).startswith(names)) for x in arrays(decay)}
    return decay.xreplace({x: sp.Dummy(**{s: True}) for x, s in sign.items()}).is_positive is True


def _carry(name: str, dims: tuple, decay: sp.Expr, terms: tuple, rest: sp.Expr) -> Carry:
    logs: dict[tuple, sp.Expr] = defaultdict(lambda: sp.S.Zero)
    for x in sp.Add.make_args(log_of(decay)):
        logs[channels(x)] += x
    writes = tuple(_factors(x, dims) for x in terms if x != 0)
    apart = len(dims) < 3 and None not in writes and all(where in ((), dims[:1]) for where in logs)
    return Carry(name, dims, tuple(logs.items()), writes if apart else None, rest)


def _factors(term: sp.Expr, dims: tuple) -> tuple[sp.Expr, ...] | None:
    """A product as a factor without channels and one for each channel, or None."""
    out = dict.fromkeys((None, *dims), sp.S.One)
    for x in sp.Mul.make_args(sp.factor(term)):
        where = channels(x)
        if len(where) > 1:
            return None
        out[where[0] if where else None] *= x
    return tuple(out.values())


__all__ = ["Carry", "carries"]
