"""Triple -> Recurrence: the stationarity of the free energy, solved in index notation.

Predict is the minimum of the two KL terms alone, observe the minimum of F_t; both are found by differentiating and
solving, never typed in. The carried state is chosen by what keeps the recurrence linear: the natural mean
M = Lambda (mu - mu_0) when every anchor is the prior and the precision moves, the mean S otherwise; of a precision that
forgets by power only the excess over the prior is carried.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import sympy as sp

from .energy import GATE_DIMS, FreeEnergy, Stage, free_energy, precision_dims, prior_mean, prior_precision
from .errors import UnifyError
from .recurrence import Assign, Input, Recurrence, State
from .symbols import (
    LogDet,
    a,
    array,
    arrays,
    at_index,
    c,
    collapse,
    contract,
    derivative,
    i,
    j,
    l,
    name_of,
    own_indices,
    put,
    symbol,
)
from .triple import Ridge, Squash, Triple


@lru_cache(maxsize=1024)
def derive(triple: Triple) -> Recurrence:
    """The recurrence of a triple. Raises UnifyError where its stationarity has no closed form."""
    work = _Derivation(free_energy(triple))
    work.inputs()
    work.trail.append(work.moments())
    work.predict()
    work.trail.append(work.moments())
    for n, stage in enumerate(work.energy.stages):
        work.observe(n, stage)
        work.trail.append(work.moments())
    work.read()
    return work.finish()


@dataclass
class _Derivation:
    """The program under construction: `now` maps each state's name to the name that holds its current value."""

    energy: FreeEnergy
    steps: list[Assign] = field(default_factory=list)
    now: dict[str, str] = field(default_factory=dict)
    start: dict[str, State] = field(default_factory=dict)
    trail: list[tuple[sp.Expr, sp.Expr]] = field(default_factory=list)
    phase: str = "predict"

    def __post_init__(self):
        t = self.triple = self.energy.triple
        self.d = precision_dims(t, self.energy.carried_full)
        self.moving = (t.curvature != "none" or t.prior.dynamics == "diffusion") and t.posterior.projection != "reset"
        self.natural = self.moving and set(t.anchors) == {"prior"} and t.posterior.projection == "keep"
        self.mean = "M" if self.natural else "S"
        zero = sp.S.Zero
        self._state(self.mean, (j, i), zero if self.natural else prior_mean(t))
        self.excess = None
        if self.moving:
            diffusion = t.prior.dynamics == "diffusion"
            self.excess = "Lambda" if diffusion else "P" if self.energy.carried_full else "Ibar"
            self._state(self.excess, self._precision_state_dims(), prior_precision(t) if diffusion else zero)
        self.lam_prev = self.lam = self._precision_now()

    # -- states -------------------------------------------------------------------------------------------------------

    def _state(self, name: str, dims: tuple, initial: sp.Expr) -> None:
        self.start[name] = State(name, dims, sp.sympify(initial))
        self.now[name] = name

    def _precision_state_dims(self) -> tuple:
        """Channels that the moving part of the precision really has."""
        t = self.triple
        dims = {"isotropic": set(), "key": {j}, "diagonal": {j, i}, "full": {j}, "none": set()}[t.curvature]
        dims = (
            dims
            | ({i} if t.importance == "value" and t.curvature != "none" else set())
            | set(GATE_DIMS[t.architecture.forgetting])
        )
        if t.prior.dynamics == "diffusion":
            dims |= set(GATE_DIMS[t.prior.noise]) | set(GATE_DIMS[t.prior.precision])
        order = (j, l, i) if self.energy.carried_full else (j, i)
        return tuple(x for x in order if x in dims or x == l)

    def _precision_now(self):
        """The current precision as a function of its indices (x, or x and y when it is a matrix)."""
        t, lam0 = self.triple, prior_precision(self.triple)
        if not self.moving:
            return lambda x, *rest: at_index(lam0, j, x)
        name, dims = self.now[self.excess], self.start[self.excess].dims
        base = sp.S.Zero if t.prior.dynamics == "diffusion" else lam0
        if self.energy.carried_full:
            return lambda x, y, *rest: sp.KroneckerDelta(x, y) * at_index(base, j, x) + array(name, (x, y, *dims[2:]))
        return lambda x, *rest: at_index(base, j, x) + array(name, tuple(x if d == j else d for d in dims))

    def emit(self, phase: str, name: str, dims: tuple, expr: sp.Expr, solve: sp.Expr | None = None) -> None:
        self.steps.append(Assign(phase, name, dims, expr, solve))

    def _update(self, phase: str, state: str, suffix: str, expr: sp.Expr) -> None:
        """Assign a state's new value, unless it is unchanged."""
        dims = self.start[state].dims
        if sp.simplify(expr - array(self.now[state], dims)) != 0:
            name = f"{state}_{suffix}"
            self.emit(phase, name, dims, expr)
            self.now[state] = name

    # -- the four steps -----------------------------------------------------------------------------------------------

    def inputs(self) -> None:
        """Names made from the arguments: alpha, a key made from it, a prior precision made from the data."""
        t, arch = self.triple, self.triple.architecture
        gate = GATE_DIMS[arch.forgetting]
        if arch.forgetting != "none":
            self.emit("inputs", "alpha", gate, sp.exp(array("g", gate)))
        if arch.key == "complement":
            self.emit("inputs", "k", (j,), 1 - array("alpha", gate))
        if arch.key == "tempered":
            tau = array("temperature", (j,))
            self.emit("inputs", "k", (j,), array("k_raw", (j,)) * (-array("g", gate) / tau) ** tau)
        if isinstance(t.prior.adaptive, Squash):
            self._squash(t.prior.adaptive)

    def _squash(self, squash: Squash) -> None:
        """Second moment A of the keys: the excess importance of an auxiliary key-diagonal filter, then squashed."""
        arch = replace(self.triple.architecture, forgetting="head", key="free", read="after", bonus=False)
        auxiliary = derive(Triple(arch, replace(self.triple.posterior, curvature="key")))
        self._state("A", (j,), sp.S.Zero)
        self.emit("inputs", "alpha_importance", (), sp.exp(array("g_importance")))
        names = {
            name: name.replace("Ibar", "A")
            for name in ["Ibar", *(s.name for s in auxiliary.steps)]
            if name.startswith("Ibar")
        }
        for step in auxiliary.steps:
            if step.name in names:
                expr = put(
                    step.expr,
                    alpha=array("alpha_importance"),
                    **{x: (lambda *at, y=y: array(y, at)) for x, y in names.items()},
                )
                self.emit("predict", names[step.name], step.dims, expr)
                self.now["A"] = names[step.name]
        r = sp.log(array(self.now["A"], (j,)) + exact(squash.eps)) - exact(squash.centre)
        self.emit("predict", "prior_precision", (j,), exact(squash.base) ** (r / (1 + sp.Abs(r))))

    def predict(self) -> None:
        """Forget: the minimum of the two weighted KL terms, or the pushed-forward Gaussian of a diffusion."""
        t = self.triple
        lam_p, mean_p = self._diffuse() if t.prior.dynamics == "diffusion" else self._power()
        if not self.energy.carried_full:
            lam_p = self._diagonal(lam_p)
        if self.moving:
            new = self._in_state(lam_p)
            self._update("predict", self.excess, "p", new)
            self.lam = self._precision_now()
        elif t.prior.dynamics == "diffusion":
            fixed = self._in_state(lam_p)
            self.lam = lambda x, *rest: at_index(fixed, j, x)
        self._update("predict", self.mean, "p", self._in_state(mean_p))

    def _power(self):
        """Solve d/dSigma = 0 and d/dm = 0 of  alpha KL(q || q_{t-1}) + (1 - alpha) KL(q || p_0)."""
        forget = self.energy.forget
        lam_p = self._stationary_precision(forget)
        slope = derivative(forget, array("m", (a, i)))
        if self.natural:
            return lam_p, self._natural_mean(slope, "mu", self.now["M"])
        weight = sp.factor(slope.coeff(array("m", (a, i))))
        self._same(weight, at_index(lam_p, c, a), "the predicted precision")
        rest = sp.expand(slope - sp.expand(weight * array("m", (a, i))))
        bar = array("Lambda_p", tuple(a if x == j else x for x in self.d))
        return lam_p, -rest / bar

    def _diffuse(self):
        """s_t = mu_0 + a (s_{t-1} - mu_0) + noise: covariance a^2 / Lambda + w."""
        t = self.triple
        kept = (
            sp.S.One
            if t.architecture.forgetting == "none"
            else at_index(array("alpha", GATE_DIMS[t.architecture.forgetting]), j, a)
        )
        noise = at_index(array("noise", GATE_DIMS[t.prior.noise]), j, a)
        at = tuple(a if x == j else x for x in self.d)
        lam = array("Lambda", at)
        lam_p = sp.cancel(1 / (kept**2 / lam + noise))
        mu0 = at_index(prior_mean(t), j, a)
        if self.natural:
            return lam_p, sp.cancel(lam_p * kept / lam) * array("M", (a, i))
        return lam_p, mu0 + kept * (array("mu", (a, i)) - mu0)

    def observe(self, n: int, stage: Stage) -> None:
        """The minimum of F_t over the family, then the projection."""
        self.stage, self.phase = stage, "observe"
        suffix = "new" if n == len(self.energy.stages) - 1 else str(n + 1)
        energy = self.energy.losses[n] + self.energy.between
        held, mean_p, best = self.lam, self.now[self.mean], self.lam
        lam_new = self._stationary_precision(energy)
        keep = self.triple.posterior.projection == "keep"
        if not self.moving:
            inline = self._in_state(self._diagonal(lam_new))
            best = lambda x, *rest: at_index(inline, j, x)  # noqa: E731
        elif keep and stage.curvature != "none":
            self._update("observe", self.excess, suffix, self._in_state(lam_new))
            self.lam = best = self._precision_now()
        slope = derivative(energy, array("m", (a, i)))
        expr = self._natural_mean(self._anchored(slope), "m_p", mean_p) if self.natural else self._step(slope, lam_new)
        expr = put(
            expr,
            Lambda_p=held,
            Lambda_new=best,
            m_p=lambda x, y: array(mean_p, (x, y)),
            mu=lambda x, y: array(self.mean, (x, y)),
        )
        self._update("observe", self.mean, suffix, self._named(at_index(expr, a, j)))
        if not keep:
            self._carry_on(lam_new, suffix)

    def _carry_on(self, lam_new: sp.Expr, suffix: str) -> None:
        """Project: keep the diagonal (weighed by the gain), or fall back to the prior."""
        if self.moving:
            diagonal = self._diagonal(lam_new)
            if self.triple.posterior.gain:
                held = array("Lambda_p", tuple(a if x == j else x for x in self.d))
                diagonal = held + array("gain") * (diagonal - held)
            self._update("project", self.excess, suffix, self._in_state(diagonal))
        self.lam = self._precision_now()

    def read(self) -> None:
        """The posterior mean's read-out and its variance."""
        arch, scale, q = self.triple.architecture, symbol("scale"), array("q", (j,))
        lam, h = self._precision_now(), array(self.now[self.mean], (j, i))
        if arch.read == "before":
            lam, h = self.lam_prev, array(self.mean, (j, i))
        bonus = sp.S.Zero
        if arch.bonus:
            stage = self.energy.stages[-1]
            bonus = array("bonus", (j,)) * stage.key * stage.value * (1 if stage.evidence else stage.beta)
        if self.energy.carried_full:
            self._read_solved(lam, h + bonus, q, scale)
            return
        lam_j = lam(j)
        mean = h + bonus / lam_j if not self.natural else prior_mean(self.triple) + (h + bonus) / lam_j
        self.emit("read", "o", (i,), scale * contract(q * mean, j))
        self.emit("read", "variance", (i,), scale**2 * contract(q**2 / lam_j, j))

    def _read_solved(self, lam, h: sp.Expr, q: sp.Expr, scale: sp.Expr) -> None:
        """o = h . Lambda^-1 q: the solve is on the query, so it is shared by value channels that share a precision."""
        t = self.triple
        dims = tuple(x for x in self.start["P"].dims if x != l)
        if isinstance(t.prior.adaptive, Ridge):
            p = array(self.now["P"] if t.architecture.read == "after" else "P", self.start["P"].dims)
            self.emit("read", "prior_precision", (), array("ridge") * sp.sqrt(contract(contract(p**2, l), j)))
        self.emit("read", "x", dims, q, solve=lam(j, l))
        x = array("x", dims)
        y = x
        if t.architecture.mix:
            y = (1 - array("mix")) * q + array("mix") * x
        self.emit("read", "o", (i,), scale * contract(q * prior_mean(t) + y * h, j))
        self.emit("read", "variance", (i,), scale**2 * contract(q * x, j))

    def moments(self) -> tuple[sp.Expr, sp.Expr]:
        """Mean [j, i] and precision [j, ...] of the belief held now; the natural mean stands for the mean of a full one."""
        precision = self.lam
        if self.energy.carried_full:
            return array(self.now[self.mean], (j, i)), precision(j, l)
        held = array(self.now[self.mean], (j, i))
        return (prior_mean(self.triple) + held / precision(j) if self.natural else held), precision(j)

    def finish(self) -> Recurrence:
        """The finished, frozen program."""
        carries = "natural" if self.natural else "mean"
        updates = tuple(self.now.items())
        return Recurrence(
            self.triple,
            _signature(self.triple, self.steps, self.start),
            tuple(self.start.values()),
            tuple(self.steps),
            updates,
            carries,
            tuple(self.trail),
        )

    # -- solving ------------------------------------------------------------------------------------------------------

    def _stationary_precision(self, energy: sp.Expr) -> sp.Expr:
        """Solve d energy / d Sigma = 0 for the precision: [a], or [a, c] when full."""
        if energy.has(LogDet):  # over full Gaussians
            rest = tuple(x for x in precision_dims(self.triple, True) if x == i)
            unknown = array("Lambda_new", (a, c, *rest))
            slope = derivative(energy, array("Sigma", (a, c, *rest)))
            return sp.expand(_only(sp.solve(slope, unknown), self.triple, "precision"))
        at = tuple(a if x == j else x for x in precision_dims(self.triple, False))
        sigma = array("Sigma", at)
        return sp.factor(1 / _only(sp.solve(derivative(energy, sigma), sigma), self.triple, "precision"))

    def _natural_mean(self, slope: sp.Expr, held: str, name: str) -> sp.Expr:
        """Normal equations: slope(m) = Lambda (m - mu_0) - M, so M = -slope at m = mu_0; Lambda (held - mu_0) is M before."""
        mu0 = lambda x, y: at_index(prior_mean(self.triple), j, x)  # noqa: E731
        at_prior = put(slope, m=mu0, **{held: lambda x, y: mu0(x, y) + array("y", (x, y))})
        before = collapse(-at_prior)
        lam = "Lambda" if held == "mu" else "Lambda_p"
        at = tuple(a if x == j else x for x in self.d)
        if self.energy.carried_full:
            matrix = contract(array(lam, (a, l, *at[2:])) * array("y", (l, i)), l)
            return collapse(before.subs(collapse(matrix), array(name, (a, i))))
        return sp.expand(put(before, y=lambda x, y: array(name, (x, y)) / array(lam, at)))

    def _anchored(self, slope: sp.Expr) -> sp.Expr:
        """The slope with the anchor written out."""
        weight = self.triple.posterior.anchor_weight
        gate = (
            (lambda x: sp.S.One)
            if weight == "one"
            else (lambda x: at_index(array("erase" + self._repeat(), GATE_DIMS[weight]), j, x))
        )
        exact = self.stage.curvature == "full" and self.stage.importance == self.stage.beta  # the anchor drops out
        kind = "predicted" if exact and not self.natural else self.stage.anchor
        where = {
            "prior": lambda x, y: at_index(prior_mean(self.triple), j, x),
            "predicted": lambda x, y: gate(x) * array("m_p", (x, y)),
            "previous": lambda x, y: gate(x) * array("mu", (x, y)),
        }[kind]
        return collapse(put(slope, anchor=where))

    def _repeat(self) -> str:
        parts = name_of(next(iter(self.stage.key.atoms(sp.Indexed)))).split("_")
        return f"_{parts[1]}" if len(parts) > 1 and parts[1].isdigit() else ""

    def _step(self, slope: sp.Expr, lam_new: sp.Expr) -> sp.Expr:
        """Solve d F / d m = 0 for the mean, written as m~ plus a step; contractions of the unknown are solved for."""
        slope = self._innovation(self._anchored(slope))
        step = array("step", (a, i))
        slope = collapse(put(slope, m=lambda x, y: array("m_p", (x, y)) + array("step", (x, y))))
        sums = sorted((s for s in slope.atoms(sp.Sum) if s.has(sp.IndexedBase(symbol("step")))), key=str)
        weight = slope.coeff(step)
        if not sums:
            self._same(weight, self._diagonal(lam_new), "the updated precision")
            bar = array("Lambda_new", tuple(a if x == j else x for x in self.d))
            solved = -sp.expand(slope - weight * step) / bar
        elif len(sums) == 1:
            solved = self._contracted(slope, step, sums[0])
        else:
            raise UnifyError(
                str(self.triple),
                "posterior: its mean couples several contractions, which sympy does not close",
                "use one observation per token",
            )
        return array("m_p", (a, i)) + sp.factor_terms(sp.factor(solved))

    def _contracted(self, slope: sp.Expr, step: sp.Expr, total: sp.Sum) -> sp.Expr:
        """slope = w step + u C - r with C = sum_l k_l step_l unknown: solve for step given C, then for C."""
        dot = sp.Dummy("C")
        linear = sp.expand(slope.subs(total, dot))
        given = sp.expand(_only(sp.solve(linear, step), self.triple, "mean"))
        index = total.limits[0][0]
        inside = total.function / array("step", (index, i))
        free, per = given.subs(dot, 0), given.coeff(dot)
        resum = lambda e: collapse(contract(sp.expand(inside * at_index(e, a, index)), index))  # noqa: E731
        c_value = resum(free) / (1 - resum(per))
        return free + per * c_value

    def _innovation(self, slope: sp.Expr) -> sp.Expr:
        """Name e = v - read . s* (what the anchor does not predict) and write the slope with it."""
        stage = self.stage
        where = self._anchored(contract(stage.read * array("anchor", (j, i)), j))
        predicted = where * (stage.importance if stage.evidence else 1)
        if predicted == 0:
            return slope
        residual = stage.value - predicted
        strength = (1 if stage.evidence else stage.beta) * at_index(stage.key, j, a)
        n = sum(step.name.startswith("e") for step in self.steps)
        name = "e" if n == 0 else f"e_{n + 1}"
        named = collapse(slope + strength * (residual - array(name, (i,))))
        now = put(
            residual, m_p=lambda x, y: array(self.now[self.mean], (x, y)), mu=lambda x, y: array(self.mean, (x, y))
        )
        self.emit("observe", name, (i,), now)
        return named

    def _diagonal(self, lam: sp.Expr) -> sp.Expr:
        return sp.expand(lam.subs(c, a)) if self.energy.full else lam

    def _in_state(self, expr: sp.Expr) -> sp.Expr:
        """An expression at [a] (or [a, c]) in terms of the carried state, at [j] (or [j, l]).

        A new precision comes back as the moving part that is carried: its excess over the prior under a power prior.
        """
        is_mean = bool({"mu", "M"} & {name_of(x) for x in arrays(expr)}) or expr.has(
            sp.IndexedBase(symbol("prior_mean"))
        )
        out = put(expr, Lambda=self.lam_prev, Lambda_p=self.lam, mu=lambda x, y: array("S", (x, y)))
        if not is_mean and self.moving and self.triple.prior.dynamics == "power":
            lam0 = at_index(prior_precision(self.triple), j, a)
            out = sp.expand(out - (sp.KroneckerDelta(a, c) * lam0 if self.energy.carried_full else lam0))
        out = at_index(at_index(out, c, l), a, j)
        return self._named(_tidy(out))

    def _named(self, expr: sp.Expr) -> sp.Expr:
        """Give every contraction a name of its own: one assignment, computed once."""
        for total in sorted(expr.atoms(sp.Sum), key=str):
            free = {d for x in total.function.atoms(sp.Indexed) for d in x.indices} - {total.limits[0][0]}
            dims = tuple(d for d in (j, l, i) if d in free)
            known = next((s for s in self.steps if s.phase != "read" and s.expr == total), None)
            if known is None:
                known = Assign(
                    self.phase,
                    f"c{1 + sum(s.name.startswith('c') and s.name[1:].isdigit() for s in self.steps)}",
                    dims,
                    total,
                )
                self.steps.append(known)
            expr = expr.subs(total, array(known.name, known.dims))
        return expr

    def _same(self, x: sp.Expr, y: sp.Expr, what: str) -> None:
        """The Hessian by the mean must equal the precision found from the covariance."""
        if sp.simplify(x - y) != 0:
            raise UnifyError(
                str(self.triple),
                f"the derivation contradicts itself on {what}: {x} against {y}",
                "report it: this is a defect of the engine",
            )


def _only(solutions: list, triple: Triple, what: str) -> sp.Expr:
    if len(solutions) != 1:
        raise UnifyError(
            str(triple),
            f"posterior: the stationarity in the {what} has {len(solutions)} closed solutions",
            "simplify the curvature or the projection",
        )
    return solutions[0]


def _tidy(expr: sp.Expr) -> sp.Expr:
    """The shorter of the expanded and the factored form."""
    return min((sp.expand(expr), sp.factor(expr)), key=lambda e: (sp.count_ops(e), len(str(e))))


def exact(x: float) -> sp.Rational:
    """A hyperparameter as the decimal number a person wrote."""
    return sp.Rational(str(x))


_PER_OBSERVATION = ("k", "v", "beta", "importance", "write", "erase")


def _signature(triple: Triple, steps: list[Assign], start: dict[str, State]) -> tuple[Input, ...]:
    """The op's arguments: every name that is read before it is assigned, states and scale aside."""
    made = {s.name for s in steps}
    raw: dict[str, tuple] = {}
    read = (
        [s.expr for s in steps] + [s.solve for s in steps if s.solve is not None] + [s.initial for s in start.values()]
    )
    for expr in read:
        for x in sorted(arrays(expr), key=str):
            raw.setdefault(name_of(x), tuple(x.indices) if isinstance(x, sp.Indexed) else ())
    states = {"S", "M", "Ibar", "P", "Lambda", "A", "scale"}
    repeats = triple.architecture.repeats
    out = []
    for name, dims in raw.items():
        if name in states or (name in made and name != "k"):
            continue
        stem = name.replace("_raw", "")
        if repeats > 1 and stem.rpartition("_")[2].isdigit():
            continue  # a later observation's share of an argument already listed
        if name in made and triple.architecture.key == "complement":
            continue
        out.append(Input(stem, own_indices(dims), _given(stem, triple)))
    order = ("q", "k", "v", "g")
    unique = {x.name: x for x in sorted(out, key=lambda x: (order.index(x.name) if x.name in order else 9, x.name))}
    return tuple(unique.values())


def _given(name: str, triple: Triple) -> str:
    arch = triple.architecture
    static = {"prior_precision", "prior_mean", "bonus", "ridge", "gain"}
    if arch.forgetting in ("fixed", "entry"):
        static.add("g")
    if triple.prior.noise in ("fixed", "entry"):
        static.add("noise")
    keys = {x.strip("-") for o in arch.observations for x in (o.key, o.read)} | set(_PER_OBSERVATION)
    return "static" if name in static else "observation" if name in keys and arch.repeats > 1 else "token"
