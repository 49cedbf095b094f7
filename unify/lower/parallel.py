"""Structure -> chunk-parallel execution: coefficients for all tokens at once, then one of the family's schedules.

Every name that does not depend on the mean state is evaluated for the whole sequence in one go (the printer never looks
at the leading dimensions); small autonomous states come first, as decayed sums. The schedules themselves come in two
makes with one signature: `Chunked` (torch matmuls) and, in `launch`, Triton kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

import sympy as sp
import torch

from unify.energy import prior_mean, prior_precision
from unify.plan import Plan
from unify.recurrence import Recurrence
from unify.structure import Autonomous, Step, Structure, channels, separate
from unify.symbols import array, arrays, at_index, collapse, i, j, l, name_of, put, symbol

from . import chunked
from .printer import assignment, code, precise
from .torch import per_token


@dataclass(frozen=True)
class Coefficient:
    """What a schedule asks for at every token: [B, T n, H, *dims] for the n steps of a token, one after the other.

    exprs: one for each of the steps (a single one for what a token has once). factor: it goes into a matmul, so in the
    caller's dtype; everything else is float32 (float64 for float64 arguments).
    """

    name: str
    exprs: tuple[sp.Expr, ...]
    dims: tuple[sp.Symbol, ...]
    factor: bool = False


@dataclass(frozen=True, eq=False)
class Request:
    """What the equations alone say about a run; one object for each plan, so that it is cheap to look up.

    asked: coefficients by name. arguments: a coefficient that is nothing but an argument -> that argument. scaled: whether
    the query still lacks the scale. shift: the prior mean that a mean state is carried without, or None. prior: its precision.
    """

    recurrence: Recurrence
    structure: Structure
    asked: dict[str, Coefficient]
    arguments: dict[str, str]
    scaled: bool
    shift: sp.Expr | None
    prior: sp.Expr | None


class Chunked:
    """The schedules on torch; every batch row is one sequence."""

    def coefficients(self, seq):
        """Coefficients and last small states that are computed together, ahead of the rest: none."""
        return {}, {}

    def linear(self, q, k, v, g, s0, *, scale, before):
        """Decayed sum of outer products, read linearly."""
        return chunked.linear(scale * q, k, v, g, s0, before=before)

    def rank_one(self, q, r, w, k, v, g, s0, *, scale, before):
        """Diagonal plus rank-one transitions."""
        return chunked.rank_one(scale * q, r, w, k, v, g, s0, before=before)

    def elementwise(self, q, k, v, b, g, prior, M0, I0, *, scale, **options):
        """Two decayed sums, divided entry by entry at the read."""
        return chunked.elementwise(scale * q, k, v, b, g, prior, M0, I0, **options)

    def solve(self, q, k, v, gain, g, prior, M0, P0, *, scale, **options):
        """Two decayed sums, the read a solve with one of them."""
        o, var, *last = chunked.solve(q, k, v, gain, g, prior, M0, P0, **options)
        return scale * o, None if var is None else scale**2 * var, *last

    def decayed_sum(self, g, x, x0):
        """A small autonomous state at every token, and its last value."""
        return chunked.decayed_sum(g, x, x0)

    def previous(self, start, states):
        """The state each token finds."""
        return torch.cat((start[:, None], states[:, :-1]), 1)


class Sequence:
    """All tokens of a call as a mapping name -> tensor [B, T, H, ...]: what is asked for is computed, once.

    Arguments come in the caller's dtype and are computed with in `wide` (float32, or float64 for float64 arguments).
    """

    def __init__(
        self,
        request: Request,
        inputs: Mapping[str, torch.Tensor],
        state: tuple,
        scale: float,
        schedule,
    ):
        self.request, self.schedule = request, schedule
        self.recurrence, self.structure = recurrence, structure = request.recurrence, request.structure
        q = inputs["q"]
        self.shape, self.width, self.dtype = q.shape, inputs["v"].shape[-1], q.dtype
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.raw = per_token(recurrence, inputs)
        if recurrence.triple.architecture.key == "tempered":
            self.raw["k_raw"] = self.raw.pop("k")
        self.state = {s.name: x for s, x in zip(recurrence.states, state, strict=True)}
        self.inputs = inputs
        self.known = {"scale": scale, "V": self.width}
        self.small = {x.name: x for x in structure.autonomous if len(x.dims) < 2}
        self.program = {s.name: s for s in recurrence.steps}
        self.ready, self.final = schedule.coefficients(self)

    def __getitem__(self, name: str) -> torch.Tensor | float:
        if name not in self.known:
            self.known[name] = self._make(name)
        return self.known[name]

    def _make(self, name: str) -> torch.Tensor | float:
        if name in self.raw:
            return self.raw[name].to(self.wide)
        if name in self.small:
            return self._scan(self.small[name])
        if (
            name == "K"
        ):  # a tensor, because a log decay may hold log(K); filled on the device: a copy would make it wait
            return torch.full((), self.shape[-1], dtype=self.wide, device=self.raw["q"].device)
        step = self.program[name]  # a KeyError sends eval on to its globals
        return self.value(step.expr, step.dims)

    def get(self, name: str) -> torch.Tensor | None:
        """An argument, or None where the triple has no such one."""
        return self[name] if name in self.raw else None

    def asks(self, name: str) -> bool:
        """Whether a coefficient of that name is asked for."""
        return name in self.request.asked

    def lay(self, name: str) -> torch.Tensor:
        """A coefficient that was asked for, [B, T n, H, *dims]."""
        x = self.request.asked[name]
        if name in self.ready:
            found = self.ready[name]
            if found.ndim == 3 + len(x.dims):
                return found
            return found[..., None].expand(-1, -1, -1, *self.sizes(x.dims))
        if name in self.request.arguments:
            whole = self.inputs[self.request.arguments[name]]
            # kernels widen rows and gates as they load them
            return whole if x.factor or x.dims or name == "g" else whole.to(self.wide)
        parts = [self.full(y, x.dims) for y in x.exprs]
        parts = [y.to(self.dtype) for y in parts] if x.factor else parts
        return parts[0] if len(parts) == 1 else torch.stack(parts, 2).flatten(1, 2)

    def sizes(self, dims: tuple) -> list[int | torch.SymInt]:
        """Channels as numbers; symbols where a graph of torch.compile leaves them free."""
        return [{j: self.shape[-1], l: self.shape[-1], i: self.width}[d] for d in dims]

    def value(self, expr: sp.Expr, dims: tuple) -> torch.Tensor:
        """An expression at every token, [B, T, H, ...] or broadcastable to it."""
        result = eval(_code(sp.sympify(expr), dims), {"torch": torch}, self)
        return result if torch.is_tensor(result) else self.raw["q"].new_full((), result, dtype=self.wide)

    def full(self, expr: sp.Expr, dims: tuple) -> torch.Tensor:
        """The same, expanded to [B, T, H, *channels]."""
        return self.value(expr, dims).expand(*self.shape[:3], *self.sizes(dims))

    def _scan(self, x: Autonomous) -> torch.Tensor:
        """A small autonomous state as each token finds it; its last value goes to `final`."""
        start = self.state[x.name]
        if x.decay is None:
            states, last = self._token_by_token(x, start)
        else:
            g = self.full(log_of(x.decay), x.dims if channels(x.decay) else ())
            g = g[..., None] if g.ndim == 3 and x.dims else g
            states, last = self.schedule.decayed_sum(g, self.full(x.drive, x.dims), start)
        self.final[x.name] = last
        return self.schedule.previous(start, states)

    def _token_by_token(self, x: Autonomous, state: torch.Tensor):
        """A nonlinear state has no closed form over tokens: its own few lines of the program, one token at a time."""
        chain = [s for s in self.recurrence.steps if s.name.startswith(x.name + "_")]
        program = compile("\n".join(assignment(s) for s in chain), f"<{x.name}>", "exec")
        used = {name_of(y) for s in chain for y in arrays(s.expr)} - {s.name for s in chain} - {x.name}
        whole = {n: self[n] for n in used}
        moving = {n for n, y in whole.items() if torch.is_tensor(y) and y.ndim > 2 and n not in self._static()}
        new, out = dict(self.recurrence.updates)[x.name], []
        for t in range(self.shape[1]):
            now = {n: y[:, t] if n in moving else y for n, y in whole.items()}
            env = {"torch": torch, "K": self["K"], x.name: state, **now}
            exec(program, env)
            state = env[new]
            out.append(state)
        return torch.stack(out, 1), state

    def _static(self) -> set[str]:
        names = {x.name for x in self.recurrence.inputs if x.per == "static"}
        return names | ({"alpha"} if "g" in names else set())


def _shares(recurrence: Recurrence) -> dict[tuple, str]:
    """What a token's arguments are in the program, all shares of one in order, and its channels -> its name."""
    tempered = recurrence.triple.architecture.key == "tempered"
    out = {}
    for x in recurrence.inputs:
        if x.per != "static":
            name = "k_raw" if tempered and x.name == "k" else x.name
            more = range(2, recurrence.triple.architecture.repeats + 1) if x.per == "observation" else ()
            out[tuple(array(y, x.dims) for y in (name, *(f"{name}_{n}" for n in more))), x.dims] = x.name
    return out


@cache
def _code(expr: sp.Expr, dims: tuple):
    return compile(code(precise(expr), dims), "<coefficient>", "eval")


@cache
def log_of(decay: sp.Expr) -> sp.Expr:
    """The logarithm of a decay as a sum of logarithms."""
    names = {
        "alpha": lambda *d: sp.exp(array("g", d)) if d else sp.exp(array("g")),
        "alpha_importance": sp.exp(array("g_importance")),
    }
    if not any(isinstance(x, sp.Indexed) for x in arrays(decay) if name_of(x) == "alpha"):
        names["alpha"] = sp.exp(array("g"))
    return sp.expand_log(sp.log(put(sp.sympify(decay), **names)), force=True)


def run(
    recurrence: Recurrence,
    structure: Structure,
    plan: Plan,
    inputs: Mapping,
    state: tuple,
    scale: float,
    variance: bool = False,
    schedule=None,
):
    """Execute a sequence by the plan's schedule; arguments and results as `lower.torch.loop`.

    schedule: whose `coefficients`, `linear`, `rank_one`, `elementwise`, `solve`, `decayed_sum` and `previous` to use;
        default `Chunked()`.
    """
    seq = Sequence(request(recurrence, structure, plan.family, variance), inputs, state, scale, schedule or Chunked())
    o, var, final = {"linear": _matmul, "rank one": _matmul, "elementwise": _elementwise, "solve": _solve}[plan.family](
        seq, variance
    )
    if seq.asks("direct"):
        o = o + seq.lay("direct")
    if seq.asks("variance"):
        var = seq.lay("variance")
    for name in seq.small.keys() - seq.final.keys():
        seq[name]  # a small state that nothing read still has a last value
    final |= seq.final
    return o, var, tuple(final[s.name] for s in recurrence.states)


@lru_cache(maxsize=512)
def request(recurrence: Recurrence, structure: Structure, family: str, variance: bool) -> Request:
    """Everything a plan's family asks for: what its schedule takes, `direct` and `variance`."""
    wide = (j,) if any(channels(x.decay) for x in structure.steps) else ()
    out = [Coefficient("g", tuple(log_of(x.decay) for x in structure.steps), wide)]
    out += {"elementwise": _for_elementwise, "solve": _for_solve}.get(family, _for_matmul)(recurrence, structure)
    direct = _input_part(structure, recurrence)
    if direct != 0:
        out.append(Coefficient("direct", (direct,), (i,)))
    if variance and family in ("linear", "rank one"):
        step = next(s for s in recurrence.steps if s.name == "variance")
        out.append(Coefficient("variance", (step.expr,), (i,)))
    scaled = family in ("linear", "rank one") and _query(structure)[1]
    shift = prior_mean(recurrence.triple) if structure.mean == "S" else sp.S.Zero
    shares = _shares(recurrence)
    arguments = {x.name: shares[x.exprs, x.dims] for x in out if (x.exprs, x.dims) in shares}
    asked = {x.name: x for x in out}
    prior = prior_precision(recurrence.triple)
    return Request(recurrence, structure, asked, arguments, scaled, None if shift == 0 else shift, prior)


def _input_part(structure: Structure, recurrence: Recurrence) -> sp.Expr:
    """What reaches the output without passing through the state."""
    if structure.read == "elementwise":  # the bonus is divided by the state's precision, so the schedule adds it
        return collapse(put(structure.direct, bonus=lambda *_: sp.S.Zero))
    return structure.direct


class _Micro:
    """The steps of a token laid one after the other along time, n of them."""

    def __init__(self, seq: Sequence):
        self.n, self.before = len(seq.structure.steps), seq.structure.before

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        """One tensor a token, seen by all its steps."""
        return x if self.n == 1 else x.repeat_interleave(self.n, 1)

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """The step of each token at which the memory is read."""
        return x if self.n == 1 else x[:, (0 if self.before else self.n - 1) :: self.n]


def _for_matmul(recurrence: Recurrence, s: Structure) -> list[Coefficient]:
    """Linear states and rank-one transitions: factors of every step's write and erasure, the query, what scales the output."""
    every = lambda name, part, dims: Coefficient(name, tuple(part(x) or sp.S.Zero for x in s.steps), dims, True)  # noqa: E731
    query, _, after = _query(s)
    out = [every("key", lambda x: x.key, (j,)), every("value", lambda x: x.value, (i,))]
    out.append(Coefficient("query", (query,), (j,), True))
    if s.transition == "rank one":
        out.append(every("read", lambda x: x.read, (j,)))
        if any(x.write != x.key for x in s.steps):
            out.append(every("write", lambda x: x.write, (j,)))
    return out if after is None else [*out, Coefficient("after", (after,), (i,))]


def _matmul(seq: Sequence, variance: bool):
    s, m, start = seq.structure, _Micro(seq), seq.state[seq.structure.mean]
    shift = None if seq.request.shift is None else seq.value(seq.request.shift, (j, i))
    start = start if shift is None else start - shift
    scale = seq["scale"] if seq.request.scaled else 1.0
    q, key, value, g = m.repeat(seq.lay("query")), *map(seq.lay, ("key", "value", "g"))
    if s.transition == "rank one":
        write = seq.lay("write") if seq.asks("write") else key
        o, last = seq.schedule.rank_one(q, seq.lay("read"), write, key, value, g, start, scale=scale, before=s.before)
    else:
        o, last = seq.schedule.linear(q, key, value, g, start, scale=scale, before=s.before)
    o = m.pick(o)
    o = o * seq.lay("after") if seq.asks("after") else o
    return o, None, {s.mean: last if shift is None else last + shift}


def _query(s: Structure) -> tuple[sp.Expr, bool, sp.Expr | None]:
    """What reads the state, whether the scale is still to come, and what multiplies the output."""
    weight, after = s.weight, None
    if i in channels(weight):
        weight, after, _ = separate(weight)
    bare = _unscaled(weight)
    return (weight, False, after) if bare is None else (bare, True, after)


@cache
def _unscaled(weight: sp.Expr) -> sp.Expr | None:
    """weight / scale, if the scale is a factor of it."""
    bare = sp.simplify(weight / symbol("scale"))
    return None if symbol("scale") in bare.free_symbols else bare


@cache
def _bare(step: Step) -> tuple[sp.Expr, sp.Expr]:
    """The write as (key without factors of its own, everything else on the value)."""
    factor, key = sp.S.One, sp.S.One
    for x in sp.Mul.make_args(step.key):
        if channels(x):
            key *= x
        else:
            factor *= x
    return key, factor * step.value


@cache
def _ratio(x: sp.Expr, y: sp.Expr) -> sp.Expr:
    return sp.simplify(x / y)


def _drives(recurrence: Recurrence, structure: Structure) -> list[sp.Expr]:
    """The drive of the matrix precision, observation by observation: 0 where an observation has no curvature."""
    (precision,) = structure.autonomous
    name = precision.name
    observed = {
        s.name.removeprefix(name + "_"): s.expr
        for s in recurrence.steps
        if s.name.startswith(name + "_") and s.phase == "observe"
    }
    chain = [observed.get(at, sp.S.Zero) for at in [*(str(n) for n in range(1, len(structure.steps))), "new"]]
    return [x.xreplace({y: sp.S.Zero for y in arrays(x) if name_of(y).split("_")[0] == name}) for x in chain]


def _for_elementwise(recurrence: Recurrence, s: Structure) -> list[Coefficient]:
    """Factors of every step's write to the mean and of its drive of the precision."""
    keys, values = zip(*map(_bare, s.steps), strict=True)
    drives = [separate(x) for x in _drives(recurrence, s)]
    out = [
        Coefficient("key", keys, (j,), True),
        Coefficient("value", values, (i,), True),
        Coefficient("b", tuple(y or sp.S.Zero for _, y, _ in drives), (i,)),
    ]
    if all(x == k**2 for (x, _, _), k in zip(drives, keys, strict=True)):  # what the schedule takes if nothing is given
        return out
    return [*out, Coefficient("spread", tuple(x or sp.S.Zero for x, _, _ in drives), (j,))]


def _elementwise(seq: Sequence, variance: bool):
    s, m = seq.structure, _Micro(seq)
    (precision,) = s.autonomous
    key, value, b, g = map(seq.lay, ("key", "value", "b", "g"))
    prior, start, held = seq.value(seq.request.prior, (j, i)), seq.state[s.mean], seq.state[precision.name]
    shared = j not in precision.dims  # by the key channels, and then scanned already
    o, var, last, excess = seq.schedule.elementwise(
        m.repeat(seq.raw["q"]), key, value, b, g, prior, start, held[..., None, :].expand_as(start) if shared else held,
        scale=seq["scale"], spread=seq.lay("spread") if seq.asks("spread") else None, before=s.before,
        bonus=seq.get("bonus"), variance=variance,
    )  # fmt: skip
    return m.pick(o), m.pick(var) if variance else None, {s.mean: last} | ({} if shared else {precision.name: excess})


def _for_solve(recurrence: Recurrence, s: Structure) -> list[Coefficient]:
    """Every step's key, value, and gain of the precision."""
    keys, values = zip(*map(_bare, s.steps), strict=True)
    gains = (_ratio(d, k * at_index(k, j, l)) for d, k in zip(_drives(recurrence, s), keys, strict=True))
    return [
        Coefficient("key", keys, (j,), True),
        Coefficient("value", values, (i,), True),
        Coefficient("gain", tuple(gains), ()),
    ]


def _solve(seq: Sequence, variance: bool):
    s, m, t = seq.structure, _Micro(seq), seq.recurrence.triple
    (precision,) = s.autonomous
    prior = seq.value(seq.request.prior, (j,)) if t.prior.adaptive is None else None
    if prior is not None:
        prior = prior.expand(seq.shape[2], seq.shape[3])
    o, var, last, excess = seq.schedule.solve(
        m.repeat(seq.raw["q"]), seq.lay("key"), seq.lay("value"), seq.lay("gain"), seq.lay("g"), prior,
        seq.state[s.mean], seq.state[precision.name], scale=seq["scale"], before=s.before, variance=variance,
        ridge=seq.get("ridge"), mix=m.repeat(seq["mix"]) if t.architecture.mix else None,
    )  # fmt: skip
    return m.pick(o), m.pick(var) if variance else None, {s.mean: last, precision.name: excess}
