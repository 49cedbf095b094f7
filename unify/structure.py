"""Structure: facts read off a Recurrence's equations, never declared by a model.

The mean state X (the mean S, or the natural mean M) is written, observation by observation, as

    X' [j, i] = A X[j, i] - sum_m W_m[j] (R_m . X)[i] + x[j] y[i]

where A, W, R, x, y depend on inputs and on *autonomous* states only (states whose update does not read X).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import sympy as sp

from .energy import prior_mean
from .recurrence import Assign, Recurrence, hashed_once
from .symbols import SIZE, K, V, array, arrays, at_index, collapse, i, j, l, name_of, put


@dataclass(frozen=True)
class Step:
    """One observation's effect on the mean state: X' = decay X - write (read . X) + key value^T.

    decay: channels () or (j,) in a linear or rank-one step, (j, i) when every entry has its own.
    write, read: None when nothing is erased. key, value: the write's two factors, or None when it writes nothing.
    entry: the write as a whole where it does not factor.
    """

    decay: sp.Expr
    write: sp.Expr | None
    read: sp.Expr | None
    key: sp.Expr | None
    value: sp.Expr | None
    entry: sp.Expr | None = None


@dataclass(frozen=True)
class Autonomous:
    """A state that evolves on its own: state' = decay state + drive, or nonlinear when decay is None."""

    name: str
    dims: tuple[sp.Symbol, ...]
    decay: sp.Expr | None
    drive: sp.Expr | None


@hashed_once
@dataclass(frozen=True)
class Structure:
    """What decides a schedule.

    transition: "scalar", "diagonal" (per key channel), "entry" (per memory entry), "rank one" (diagonal plus rank one),
        "row-coupled" (a transition of its own for every value channel) or "dense".
    read: "linear", "rescaled query", "rescaled output", "elementwise" or "solve".
    mean: name of the mean state. steps: its coefficients for each observation, earlier additive ones merged.
    autonomous: the other states. weight: what the query is multiplied with to read the mean state.
    direct: the part of the read-out that does not pass through the state.
    """

    transition: str
    read: str
    mean: str
    steps: tuple[Step, ...]
    autonomous: tuple[Autonomous, ...]
    weight: sp.Expr | None
    direct: sp.Expr
    before: bool

    @property
    def linear_state(self) -> bool:
        """Whether the mean state is a decayed sum of outer products."""
        return self.transition in ("scalar", "diagonal")

    def __str__(self):
        words = {
            "scalar": "one decay per head", "diagonal": "a decay per key channel", "entry": "a decay per memory entry",
            "rank one": "diagonal plus rank one", "row-coupled": "a transition of its own for every value channel", "dense": "not affine",
        }  # fmt: skip
        auto = ", ".join(
            f"{x.name} ({'linear' if x.decay is not None else 'nonlinear'}, {sp.Mul(*(SIZE[d] for d in x.dims))} floats)"
            for x in self.autonomous
        )
        return "\n".join([
            f"transition   of {self.mean}: {self.transition}, {words[self.transition]}",
            f"autonomous   {auto or 'none'}",
            f"read         {self.read}{', before the update' if self.before else ''}",
        ])  # fmt: skip


@lru_cache(maxsize=1024)
def structure(recurrence: Recurrence) -> Structure:
    """Find the structure of a recurrence from its equations."""
    mean = "M" if recurrence.carries == "natural" else "S"
    tainted = depends_on(recurrence, mean)
    autonomous = tuple(_autonomous(recurrence, s) for s in recurrence.states if s.name != mean)
    steps, transition = _steps(recurrence, mean, tainted)
    read, weight, direct = _read(recurrence, mean, tainted)
    return Structure(
        transition, read, mean, steps, autonomous, weight, direct, recurrence.triple.architecture.read == "before"
    )


def depends_on(recurrence: Recurrence, state: str) -> set[str]:
    """Names whose value depends on a state, its own among them."""
    tainted = {state}
    for s in recurrence.steps:
        if tainted & {name_of(x) for x in arrays(s.expr)}:
            tainted.add(s.name)
    return tainted


def _definition(step: Assign):
    """The assignment as a function of its indices, for inlining."""

    def at(*where):
        out = step.expr
        for n, (old, new) in enumerate(zip(step.dims, where, strict=True)):
            if old != new:
                out = at_index(out, old, new) if n == 0 or new not in step.dims else out.subs(old, new)
        return out

    return at if step.dims else step.expr


def inline(expr: sp.Expr, recurrence: Recurrence, keep: set[str], names: set[str] | None = None) -> sp.Expr:
    """Replace assigned names by their definitions, except those in `keep` (and only `names`, if given)."""
    for step in reversed(recurrence.steps):
        if step.name not in keep and (names is None or step.name in names) and step.solve is None:
            expr = put(expr, **{step.name: _definition(step)})
    return expr


def _autonomous(recurrence: Recurrence, state) -> Autonomous:
    new = dict(recurrence.updates)[state.name]
    chain = {s.name for s in recurrence.steps if s.name.startswith(state.name + "_")}
    expr = inline(array(new, state.dims), recurrence, set(), chain)
    own = array(state.name, state.dims)
    decay = sp.simplify(sp.diff(expr, own)) if not _deltas(expr) else None
    if decay is None or state.name in {name_of(x) for x in arrays(decay)}:
        return Autonomous(state.name, state.dims, None, None)
    drive = sp.expand(expr - decay * own)
    if state.name in {name_of(x) for x in arrays(drive)}:
        return Autonomous(state.name, state.dims, None, None)
    return Autonomous(state.name, state.dims, decay, sp.factor_terms(drive))


def _deltas(expr: sp.Expr) -> bool:
    return bool(expr.atoms(sp.KroneckerDelta))


def _steps(recurrence: Recurrence, mean: str, tainted: set[str]) -> tuple[tuple[Step, ...], str]:
    """Coefficients of every observation; predict belongs to the first."""
    trail = [mean]
    trail += [s.name for s in recurrence.steps if s.name.startswith(mean + "_") and s.phase == "observe"]
    if len(trail) == 1:  # nothing but forgetting happens
        trail.append(dict(recurrence.updates)[mean])
    shift = prior_mean(recurrence.triple) if mean == "S" else sp.S.Zero
    if shift != 0:  # a shift cancels only where the predicted precision is written out
        tainted = tainted | {x.name for x in recurrence.phase("predict")}
    steps, kinds = [], {"scalar"}
    for before, after in pairwise(trail):
        expr = inline(array(after, (j, i)), recurrence, {before, *trail[: trail.index(after)]}, tainted)
        expr = _shifted(expr, before, shift)
        step, one = _affine(expr, before)
        if step is None:
            return (), "dense"
        kinds.add(one)
        steps.append(step)
    if {"entry", "rank one"} <= kinds:  # what the rows do not share meets what mixes the keys
        kinds.add("row-coupled")
    return _merge(steps), max(kinds, key=_RANK.index)


_RANK = ("scalar", "diagonal", "entry", "rank one", "row-coupled", "dense")


def _shifted(expr: sp.Expr, name: str, shift: sp.Expr) -> sp.Expr:
    """The same step for X - mu_0, so that a prior mean costs no extra state."""
    if shift == 0:
        return collapse(expr)
    moved = put(expr, **{name: lambda x, y: array(name, (x, y)) + at_index(shift, j, x)})
    moved = collapse(moved - shift)
    own, constant = array(name, (j, i)), []
    sums = [s for s in moved.atoms(sp.Sum) if s.has(sp.IndexedBase(own.base.label))]
    flat = moved.subs(dict.fromkeys(sums, 0)).subs(own, 0)
    constant = sp.factor(sp.simplify(flat))
    return moved - flat + constant


def _affine(expr: sp.Expr, name: str) -> tuple[Step | None, str]:
    """Split X' into its coefficients; the second value is the kind of transition."""
    base = sp.IndexedBase(array(name, (j, i)).base.label)
    own, s = array(name, (j, i)), sp.Dummy("s")
    sums = sorted((x for x in expr.atoms(sp.Sum) if x.has(base)), key=str)
    dots = {x: sp.Dummy(f"t{n}") for n, x in enumerate(sums)}
    flat = expr.subs(dots).subs(own, s)
    decay = _unsigned(sp.factor(sp.simplify(sp.diff(flat, s))))
    slopes = {x: sp.diff(flat, t) for x, t in dots.items()}
    if flat.has(base) or any(e.has(s, *dots.values()) for e in (decay, *slopes.values())):
        return None, "dense"
    rest = flat.subs({s: 0, **dict.fromkeys(dots.values(), 0)})
    write = read = None
    kind = {(): "scalar", (j,): "diagonal"}.get(channels(decay), "entry")
    if sums:
        write, read = _erasure(slopes, name)
        if write is None:
            return None, "dense"
        kind = "row-coupled" if i in {*channels(write), *channels(read), *channels(decay)} else "rank one"
    key, value, entry = separate(rest)
    if write is not None and key is not None:
        ratio = sp.simplify(write / key)
        if not channels(ratio) and sp.denom(ratio).is_number:  # a gate below would divide by 0 where it closes
            write, read = key, sp.factor(ratio * read)  # one key for erasing and writing: schedules can share it
    if entry is not None and kind != "row-coupled":
        kind = "entry" if kind in ("scalar", "diagonal", "entry") else "row-coupled"
    return Step(decay, write, read, key, value, entry), kind


def _unsigned(decay: sp.Expr) -> sp.Expr:
    """The same product without a leading minus, so that its logarithm is a sum of logarithms: a sum takes the sign."""
    number, rest = decay.as_coeff_Mul()
    total = next((x for x in sp.Mul.make_args(rest) if isinstance(x, sp.Add)), None)
    return decay if number >= 0 or total is None else -number * (rest / total) * sp.expand(-total)


def _erasure(slopes: dict, name: str) -> tuple[sp.Expr | None, sp.Expr | None]:
    """sum_m slope_m (r_m . X) as -write (read . X): the slopes must agree up to a factor without channels."""
    first = -next(iter(slopes.values()))
    read = sp.S.Zero
    for total, slope in slopes.items():
        index = total.limits[0][0]
        ratio = sp.simplify(-slope / first)
        if channels(ratio):
            return None, None
        read += ratio * at_index(sp.simplify(total.function / array(name, (index, i))), index, j)
    return sp.factor(first), sp.factor(sp.simplify(read))


def channels(expr: sp.Expr) -> tuple[sp.Symbol, ...]:
    """Channel indices an expression depends on, bound ones aside."""
    if expr is None:
        return ()
    outside = sp.sympify(expr).replace(
        lambda e: isinstance(e, sp.Sum), lambda s: sp.Add(sp.Dummy(), *(x for x in s.free_symbols if x in (i, j, l)))
    )
    used = {x for x in outside.free_symbols if x in (i, j, l)}
    return tuple(x for x in (j, l, i) if x in used)


def separate(expr: sp.Expr) -> tuple[sp.Expr | None, sp.Expr | None, sp.Expr | None]:
    """Factor an expression into (a function of j, a function of i), or return it whole as the third value."""
    if expr == 0:
        return None, None, None
    key = value = sp.S.One
    for factor in sp.Mul.make_args(sp.factor(expr)):
        own = channels(factor)
        if i in own and (j in own or l in own):
            return None, None, expr
        if i in own:
            value *= factor
        else:
            key *= factor
    return key, value, None


def _merge(steps: list[Step]) -> tuple[Step, ...]:
    """A purely additive observation after one that only erases is one step."""
    out = [steps[0]]
    for s in steps[1:]:
        if s.decay == 1 and s.write is None and out[-1].key is None and out[-1].entry is None:
            out[-1] = Step(out[-1].decay, out[-1].write, out[-1].read, s.key, s.value, s.entry)
        else:
            out.append(s)
    return tuple(out)


def _read(recurrence: Recurrence, mean: str, tainted: set[str]) -> tuple[str, sp.Expr | None, sp.Expr]:
    """How the output reads the mean state: kind, the query's weight [j] or [j, i], and what bypasses the state."""
    step = next(s for s in recurrence.steps if s.name == "o")
    held = next(
        name for name in [mean, *dict(recurrence.updates).values()] if name in {name_of(x) for x in arrays(step.expr)}
    )
    expr = collapse(step.expr)
    sums = [s for s in expr.atoms(sp.Sum) if s.has(sp.IndexedBase(array(held, (j, i)).base.label))]
    dot, weight = sp.Dummy("dot"), sp.S.Zero
    for total in sums:
        index = total.limits[0][0]
        weight += at_index(sp.factor(total.function / array(held, (index, i))), index, j) * sp.diff(
            expr.subs(total, dot), dot
        )
    weight = sp.factor(weight)
    direct = expr.subs(dict.fromkeys(sums, 0))
    if mean == "S" and prior_mean(recurrence.triple) != 0:
        direct = direct + sp.Sum(weight * prior_mean(recurrence.triple), (j, 1, K))
    if any(s.solve is not None for s in recurrence.steps):
        return "solve", weight, direct
    states = {s.name for s in recurrence.states} | set(dict(recurrence.updates).values())
    moving = {name_of(x) for x in arrays(weight)} & states
    if i not in channels(weight):
        return ("rescaled query" if moving else "linear"), weight, direct
    return ("rescaled output" if separate(weight)[2] is None else "elementwise"), weight, direct


__all__ = ["V", "Autonomous", "Step", "Structure", "channels", "depends_on", "inline", "separate", "structure"]
