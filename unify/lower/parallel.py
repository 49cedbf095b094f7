"""Structure -> chunk-parallel execution: coefficients for all tokens at once, then one of the family's schedules.

Every name that does not depend on the mean state is evaluated for the whole sequence in one go (the printer never looks
at the leading dimensions); small autonomous states come first, as decayed sums. The schedules themselves come in two
makes with one signature: `Chunked` (torch matmuls) and, in `launch`, Triton kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import sympy as sp
import torch

from unify.energy import prior_mean, prior_precision
from unify.plan import Plan
from unify.recurrence import Recurrence
from unify.structure import Autonomous, Step, Structure, channels, separate
from unify.symbols import array, arrays, at_index, collapse, i, j, l, name_of, put, symbol

from . import chunked
from .printer import assignment, code
from .torch import per_token


class Chunked:
    """The schedules on torch; every batch row is one sequence."""

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
        return torch.cat([start[:, None], states[:, :-1]], 1)


class Sequence:
    """All tokens of a call as a mapping name -> tensor [B, T, H, ...]: what is asked for is computed, once.

    Arguments come in the caller's dtype and are computed with in `wide` (float32, or float64 for float64 arguments).
    """

    def __init__(
        self,
        recurrence: Recurrence,
        structure: Structure,
        inputs: Mapping[str, torch.Tensor],
        state: tuple,
        scale: float,
        schedule,
    ):
        self.recurrence, self.structure, self.schedule = recurrence, structure, schedule
        q = inputs["q"]
        self.shape, self.width, self.dtype = q.shape, inputs["v"].shape[-1], q.dtype
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.raw = per_token(recurrence, inputs)
        if recurrence.triple.architecture.key == "tempered":
            self.raw["k_raw"] = self.raw.pop("k")
        self.state = {s.name: x for s, x in zip(recurrence.states, state, strict=True)}
        self.final: dict[str, torch.Tensor] = {}
        # a tensor, because a log decay may hold log(K); filled on the device, because a copy to it would wait
        size = torch.full((), q.shape[-1], dtype=self.wide, device=q.device)
        self.known = {"scale": scale, "K": size, "V": self.width}
        self.small = {x.name: x for x in structure.autonomous if len(x.dims) < 2}
        self.program = {s.name: s for s in recurrence.steps}

    def __getitem__(self, name: str) -> torch.Tensor | float:
        if name not in self.known:
            self.known[name] = self._make(name)
        return self.known[name]

    def _make(self, name: str) -> torch.Tensor | float:
        if name in self.raw:
            return self.raw[name].to(self.wide)
        if name in self.small:
            return self._scan(self.small[name])
        step = self.program[name]  # a KeyError sends eval on to its globals
        return self.value(step.expr, step.dims)

    def get(self, name: str) -> torch.Tensor | None:
        """An argument, or None where the triple has no such one."""
        return self[name] if name in self.raw else None

    def value(self, expr: sp.Expr, dims: tuple) -> torch.Tensor:
        """An expression at every token, [B, T, H, ...] or broadcastable to it."""
        result = eval(_code(sp.sympify(expr), dims), {"torch": torch}, self)
        return result if torch.is_tensor(result) else self.raw["q"].new_full((), result, dtype=self.wide)

    def full(self, expr: sp.Expr, dims: tuple) -> torch.Tensor:
        """The same, expanded to [B, T, H, *channels]."""
        size = [{j: self.shape[-1], l: self.shape[-1], i: self.width}[d] for d in dims]
        return self.value(expr, dims).expand(*self.shape[:3], *size)

    def factor(self, expr: sp.Expr, dims: tuple) -> torch.Tensor:
        """A factor of a matmul, in the caller's dtype; a bare argument is handed on as it is."""
        if isinstance(expr, sp.Indexed) and expr.indices == dims and name_of(expr) in self.raw:
            return self.raw[name_of(expr)]
        return self.full(expr, dims).to(self.dtype)

    def log_decay(self, decay: sp.Expr, dims: tuple) -> torch.Tensor:
        """log of a decay, from sums of logarithms: never exp and log again."""
        return self.full(_log(decay), dims)

    def _scan(self, x: Autonomous) -> torch.Tensor:
        """A small autonomous state as each token finds it; its last value goes to `final`."""
        start = self.state[x.name]
        if x.decay is None:
            states, last = self._token_by_token(x, start)
        else:
            g = self.log_decay(x.decay, () if not channels(x.decay) else x.dims)
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


@cache
def _code(expr: sp.Expr, dims: tuple):
    return compile(code(expr, dims), "<coefficient>", "eval")


@cache
def _log(decay: sp.Expr) -> sp.Expr:
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

    schedule: whose `linear`, `rank_one`, `elementwise`, `solve`, `decayed_sum` and `previous` to use; default `Chunked()`.
    """
    seq = Sequence(recurrence, structure, inputs, state, scale, schedule or Chunked())
    o, var, final = {"linear": _matmul, "rank one": _matmul, "elementwise": _elementwise, "solve": _solve}[plan.family](
        seq, variance
    )
    direct = _input_part(structure, recurrence)
    if direct != 0:
        o = o + seq.full(direct, (i,))
    if variance and var is None:
        step = next(s for s in recurrence.steps if s.name == "variance")
        var = seq.full(step.expr, (i,))
    for name in seq.small:
        seq[name]  # a small state that nothing read still has a last value
    final |= seq.final
    return o, var, tuple(final[s.name] for s in recurrence.states)


def _input_part(structure: Structure, recurrence: Recurrence) -> sp.Expr:
    """What reaches the output without passing through the state."""
    if structure.read == "elementwise":  # the bonus is divided by the state's precision, so the schedule adds it
        return collapse(put(structure.direct, bonus=lambda *_: sp.S.Zero))
    return structure.direct


class _Micro:
    """Coefficients of the mean state, the steps of a token laid one after the other along time."""

    def __init__(self, seq: Sequence):
        self.seq, s = seq, seq.structure
        self.n = len(s.steps)
        self.wide = any(channels(x.decay) for x in s.steps)
        decay = lambda x: seq.log_decay(x.decay, (j,) if self.wide else ())  # noqa: E731
        self.g = self.lay([decay(x) for x in s.steps])
        self.key = self.lay([seq.factor(x.key if x.key is not None else sp.S.Zero, (j,)) for x in s.steps])
        self.value = self.lay([seq.factor(x.value if x.value is not None else sp.S.Zero, (i,)) for x in s.steps])

    def lay(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """[B, T, H, ...] for each step -> [B, T n, H, ...]."""
        return parts[0] if self.n == 1 else torch.stack(parts, 2).flatten(1, 2)

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        """One tensor a token, seen by all its steps."""
        return x if self.n == 1 else x.repeat_interleave(self.n, 1)

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """The step of each token at which the memory is read."""
        return x if self.n == 1 else x[:, (0 if self.seq.structure.before else self.n - 1) :: self.n]


def _matmul(seq: Sequence, variance: bool):
    """Linear states and rank-one transitions."""
    s, m = seq.structure, _Micro(seq)
    shift = (
        seq.value(prior_mean(seq.recurrence.triple), (j, i))
        if s.mean == "S" and prior_mean(seq.recurrence.triple) != 0
        else 0
    )
    weight, after = s.weight, None
    if i in channels(weight):
        weight, after, _ = separate(weight)
    q, scale = _query(seq, weight)
    q = m.repeat(q)
    start = seq.state[s.mean] - shift
    if s.transition == "rank one":
        lay = lambda part: m.lay([seq.factor(part(x) if x.write is not None else sp.S.Zero, (j,)) for x in s.steps])  # noqa: E731
        read = lay(lambda x: x.read)
        write = m.key if all(x.write == x.key for x in s.steps) else lay(lambda x: x.write)
        o, last = seq.schedule.rank_one(q, read, write, m.key, m.value, m.g, start, scale=scale, before=s.before)
    else:
        o, last = seq.schedule.linear(q, m.key, m.value, m.g, start, scale=scale, before=s.before)
    o = m.pick(o)
    return (o if after is None else o * seq.full(after, (i,))), None, {s.mean: last + shift}


def _query(seq: Sequence, weight: sp.Expr) -> tuple[torch.Tensor, float]:
    """What reads the state: the query itself and its scale, or their product with a rescaling."""
    bare = _unscaled(weight)
    return (seq.factor(weight, (j,)), 1.0) if bare is None else (seq.factor(bare, (j,)), seq["scale"])


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


def _drives(seq: Sequence, name: str) -> list[sp.Expr]:
    """The drive of a matrix state, observation by observation: 0 where an observation has no curvature."""
    observed = {
        s.name.removeprefix(name + "_"): s.expr
        for s in seq.recurrence.steps
        if s.name.startswith(name + "_") and s.phase == "observe"
    }
    chain = [observed.get(at, sp.S.Zero) for at in [*(str(n) for n in range(1, len(seq.structure.steps))), "new"]]
    return [x.xreplace({y: sp.S.Zero for y in arrays(x) if name_of(y).split("_")[0] == name}) for x in chain]


def _elementwise(seq: Sequence, variance: bool):
    s, m, t = seq.structure, _Micro(seq), seq.recurrence.triple
    (precision,) = s.autonomous
    pairs = [_bare(x) for x in s.steps]
    drives = [separate(x) for x in _drives(seq, precision.name)]
    key = m.lay([seq.factor(k, (j,)) for k, _ in pairs])
    value = m.lay([seq.factor(v, (i,)) for _, v in pairs])
    spread = m.lay([seq.full(x or sp.S.Zero, (j,)) for x, _, _ in drives])
    b = m.lay([seq.full(y or sp.S.Zero, (i,)) for _, y, _ in drives])
    prior, start, held = seq.value(prior_precision(t), (j, i)), seq.state[s.mean], seq.state[precision.name]
    shared = j not in precision.dims  # by the key channels, and then scanned already
    o, var, last, excess = seq.schedule.elementwise(
        m.repeat(seq.raw["q"]), key, value, b, m.g, prior, start, held[..., None, :].expand_as(start) if shared else held,
        scale=seq["scale"], spread=spread, before=s.before, bonus=seq.get("bonus"), variance=variance,
    )  # fmt: skip
    return m.pick(o), m.pick(var) if variance else None, {s.mean: last} | ({} if shared else {precision.name: excess})


def _solve(seq: Sequence, variance: bool):
    s, m, t = seq.structure, _Micro(seq), seq.recurrence.triple
    (precision,) = s.autonomous
    pairs = [_bare(x) for x in s.steps]
    keys = [k for k, _ in pairs]
    gains = [_ratio(d, k * at_index(k, j, l)) for d, k in zip(_drives(seq, precision.name), keys, strict=True)]
    lay = lambda exprs, dims: m.lay([seq.factor(x, dims) for x in exprs])  # noqa: E731
    prior = seq.value(prior_precision(t), (j,)) if t.prior.adaptive is None else None
    if prior is not None:
        prior = prior.expand(seq.shape[2], seq.shape[3])
    o, var, last, excess = seq.schedule.solve(
        m.repeat(seq.raw["q"]), lay(keys, (j,)), lay([v for _, v in pairs], (i,)), m.lay([seq.full(x, ()) for x in gains]), m.g,
        prior, seq.state[s.mean], seq.state[precision.name], scale=seq["scale"], before=s.before, variance=variance,
        ridge=seq.get("ridge"), mix=m.repeat(seq["mix"]) if t.architecture.mix else None,
    )  # fmt: skip
    return m.pick(o), m.pick(var) if variance else None, {s.mean: last, precision.name: excess}
