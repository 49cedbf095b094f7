"""Confirm a derivation on concrete sizes it was not derived at, in exact arithmetic.

At random rational inputs and states the recurrence is executed; there the gradient of the *whole* F_t (with both KL terms,
before any simplification) must vanish exactly, and its Hessian must be positive definite.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import sympy as sp

from .derive import derive
from .energy import FreeEnergy, free_energy, precision_dims
from .errors import UnifyError
from .recurrence import Input, Recurrence, State
from .symbols import SIZE, K, V, array, concrete, i, j, l, put
from .triple import Triple

POSITIVE = {
    "importance",
    "beta",
    "prior_precision",
    "noise",
    "Ibar",
    "Lambda",
    "A",
    "gain",
    "ridge",
    "temperature",
    "scale",
    "alpha",
    "mix",
}


@dataclass(frozen=True)
class Confirmation:
    """What was checked: sizes (K, V), how many gradient entries vanished exactly, and the smallest Hessian minor."""

    sizes: tuple[tuple[int, int], ...]
    gradients: int
    smallest_minor: float

    def __str__(self):
        at = ", ".join(f"{k} x {v}" for k, v in self.sizes)
        return f"F_t stationary at {at} (K x V): {self.gradients} gradient entries exactly 0, Hessian positive definite"


def confirm(
    triple: Triple,
    sizes: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (3, 1)),
    seed: int = 0,
    recurrence: Recurrence | None = None,
) -> Confirmation:
    """Check that the recurrence minimises F_t at random rational points.

    recurrence: a program to test in place of the derived one. Raises UnifyError naming the stage that is not stationary.
    """
    recurrence, energy = recurrence or derive(triple), free_energy(triple)
    count, minors = 0, []
    for size in sizes:
        rng = random.Random(f"{seed} {size}")
        env = recurrence.run(random_values(recurrence, size, rng), size)
        for n in range(len(energy.stages)):
            for row in range(size[1]):
                done, minor = _stage(recurrence, energy, n, env, size, row, rng)
                count, minors = count + done, [*minors, minor]
    return Confirmation(tuple(sizes), count, float(min(minors)))


def random_values(recurrence: Recurrence, size: tuple[int, int], rng: random.Random) -> dict:
    """Rational values for every input and state; alpha (and what is not rational in its inputs) given directly."""
    of = {K: size[0], V: size[1]}
    values = {}
    for x in [*recurrence.inputs, *recurrence.states]:
        shape = [of[SIZE[d]] for d in x.dims]
        for name in _shares(x, recurrence):
            values[name] = _draw(name, shape, rng)
    for step in recurrence.steps:
        if (
            step.name in ("alpha", "alpha_importance")
            or (step.name == "k" and recurrence.triple.architecture.key == "tempered")
            or step.name == "prior_precision"
        ):
            values[step.name] = _draw(step.name, [of[SIZE[d]] for d in step.dims], rng)
    values["scale"] = sp.Rational(2, 3)
    return values


def _shares(x: Input | State, recurrence: Recurrence) -> list[str]:
    """A name in the program, or one for each repeated observation."""
    repeats = recurrence.triple.architecture.repeats if isinstance(x, Input) and x.per == "observation" else 1
    return [x.name, *(f"{x.name}_{n}" for n in range(2, repeats + 1))]


def _draw(name: str, shape: list[int], rng: random.Random):
    stem = name.split("_")[0] if name.rpartition("_")[2].isdigit() else name
    if stem == "P":  # a positive semi-definite excess
        root = np.array(
            [[sp.Rational(rng.randint(-4, 4), 3) for _ in range(shape[1])] for _ in range(shape[0])], dtype=object
        )
        full = root @ root.T
        return full if len(shape) == 2 else np.stack([full] * shape[2], axis=-1)

    def one():
        if stem.startswith(("alpha", "mix")):
            return sp.Rational(rng.randint(1, 8), 9)
        return (
            sp.Rational(rng.randint(1, 9), rng.randint(2, 5))
            if stem in POSITIVE
            else sp.Rational(rng.randint(-9, 9), 4)
        )

    out = np.empty(shape, dtype=object)
    for at in product(*map(range, shape)):
        out[at] = one()
    return out if shape else out.item()


def _stage(
    recurrence: Recurrence,
    energy: FreeEnergy,
    n: int,
    env: Mapping,
    size: tuple[int, int],
    row: int,
    rng: random.Random,
):
    """Gradient and Hessian of the n-th F_t at the program's own update, for one value channel."""
    sizes = {K: size[0], V: size[1]}
    values = dict(env)
    first = 0 if n == 0 else n + 1
    values["mu"], values["Lambda"] = _moments(recurrence, energy, 0, env, size)
    values["m_p"], values["Lambda_p"] = _moments(recurrence, energy, max(first, 1), env, size)
    mean, precision = _moments(recurrence, energy, n + 2, env, size)
    values["anchor"] = _anchor(energy, n, values, size, rng)
    m, sigma, unknown_m, unknown_sigma = _unknowns(energy, size, row)
    total = concrete(energy.total(n), {**values, "m": m, "Sigma": sigma}, sizes, {i: row})
    if total.has(sp.nan, sp.zoo):
        raise UnifyError(str(recurrence.triple), "the free energy is not finite at a random point", "report it")
    slope_sigma = sp.Matrix([sp.diff(total, x) for x in unknown_sigma])
    slope_m = sp.Matrix([sp.diff(total, x) for x in unknown_m])
    at_mean = dict(zip(unknown_m, [mean[x, row] for x in range(size[0])], strict=True))
    best = _best_covariance(energy, slope_sigma, unknown_sigma, sigma, row, at_mean)
    _check_projection(recurrence, energy, n, best, values, precision, sizes, row)
    point = {**at_mean, **best}
    slopes = [sp.nsimplify(x.subs(point)) for x in [*slope_m, *slope_sigma]]
    if any(x != 0 for x in slopes):
        raise UnifyError(
            str(recurrence.triple),
            f"F_t is not stationary at the update of observation {n + 1} (K x V = {size}): gradient {slopes}",
            "mend the recurrence",
        )
    hessian = sp.hessian(total, [*unknown_m, *unknown_sigma]).subs(point)
    minors = [hessian[:x, :x].det() for x in range(1, hessian.rows + 1)]
    if any(x <= 0 for x in minors):
        raise UnifyError(
            str(recurrence.triple),
            f"F_t is not convex at the update of observation {n + 1} (K x V = {size})",
            "mend the declaration",
        )
    return len(slopes), min(minors)


def _moments(recurrence: Recurrence, energy: FreeEnergy, n: int, env: Mapping, size: tuple[int, int]):
    """Mean [K, V] and precision [K, (K), (V)] of the program at one point of its trail, with the free energy's channels."""
    mean, precision = recurrence.moments[n]
    dims = precision_dims(recurrence.triple, energy.carried_full)
    sizes = {K: size[0], V: size[1]}
    fill = lambda expr, d: np.array(_table(expr, d, env, sizes), dtype=object)  # noqa: E731
    lam, held = fill(precision, dims), fill(mean, (j, i))
    if energy.carried_full:
        mu0 = fill(energy_prior(energy), (j, i))
        for row in range(size[1]):
            matrix = sp.Matrix(lam[..., row] if i in dims else lam)
            held[:, row] = np.array(matrix.LUsolve(sp.Matrix(held[:, row]))).ravel() + mu0[:, row]
    return held, lam


def energy_prior(energy: FreeEnergy) -> sp.Expr:
    """mu_0 of the free energy's triple."""
    from .energy import prior_mean

    return prior_mean(energy.triple)


def _table(expr: sp.Expr, dims: tuple, env: Mapping, sizes: Mapping, at: Mapping | None = None):
    at = at or {}
    if not dims:
        return concrete(expr, env, sizes, at)
    return [_table(expr, dims[1:], env, sizes, {**at, dims[0]: x}) for x in range(sizes[SIZE[dims[0]]])]


def _anchor(energy: FreeEnergy, n: int, values: Mapping, size: tuple[int, int], rng: random.Random) -> np.ndarray:
    """s*[K, V]; a random one for a full curvature, where it must not matter."""
    t, stage = energy.triple, energy.stages[n]
    out = np.empty(size, dtype=object)
    sizes = {K: size[0], V: size[1]}
    for x, y in product(range(size[0]), range(size[1])):
        if stage.curvature == "full" and stage.importance == stage.beta and not stage.evidence:
            out[x, y] = sp.Rational(rng.randint(-5, 5), 2)
        elif stage.anchor == "prior":
            out[x, y] = concrete(energy_prior(energy), values, sizes, {j: x, i: y})
        else:
            gate = 1
            if t.posterior.anchor_weight != "one":
                repeat = n // len(t.architecture.observations)
                erase = values["erase" if repeat == 0 else f"erase_{repeat + 1}"]
                gate = erase[x] if t.posterior.anchor_weight == "key" else erase
            out[x, y] = gate * values["m_p" if stage.anchor == "predicted" else "mu"][x, y]
    return out


def _unknowns(energy: FreeEnergy, size: tuple[int, int], row: int):
    """m and Sigma as arrays of fresh symbols; only the row's own are unknown, a full Sigma is symmetric."""
    dims = precision_dims(energy.triple, energy.full)
    m = np.array([[sp.Symbol(f"m{x}_{y}", real=True) for y in range(size[1])] for x in range(size[0])], dtype=object)
    shape = [size[0] if d in (j, l) else size[1] for d in dims]
    sigma = np.empty(shape, dtype=object)
    for at in np.ndindex(*shape):
        key = sorted(at[:2]) if energy.full else at[:1]
        sigma[at] = sp.Symbol("Sigma" + "_".join(map(str, (*key, *at[len(key) :]))), positive=True)
    mine = sigma[..., row] if i in dims else sigma
    return m, sigma, list(m[:, row]), sorted(set(np.ravel(mine)), key=str)


def _best_covariance(
    energy: FreeEnergy, slope: sp.Matrix, unknown: list, sigma: np.ndarray, row: int, at_mean: Mapping
) -> dict:
    """The covariance where dF/dSigma = 0: its inverse is read off the gradient at Sigma = 1 (the log det is known there)."""
    if not energy.full:
        found = {}
        for x, g in zip(unknown, slope, strict=True):
            found[x] = 1 / (2 * g.subs(at_mean).subs(x, 1) + 1)
        return found
    mine = sigma[..., row] if sigma.ndim == 3 else sigma
    n = mine.shape[0]
    one = {mine[x, y]: int(x == y) for x in range(n) for y in range(n)}
    slopes = dict(zip(unknown, slope, strict=True))
    at_one = lambda x, y: slopes[mine[x, y]].subs(at_mean).subs(one) / (1 if x == y else 2)  # noqa: E731
    inverse = sp.Matrix(n, n, lambda x, y: 2 * at_one(x, y) + int(x == y))
    best = inverse.inv()
    return {mine[x, y]: best[x, y] for x in range(n) for y in range(n)}


def _check_projection(
    recurrence: Recurrence,
    energy: FreeEnergy,
    n: int,
    best: Mapping,
    values: Mapping,
    precision: np.ndarray,
    sizes: Mapping,
    row: int,
) -> None:
    """The precision that the program carries on is the projection of the one that minimises F_t."""
    t, size = recurrence.triple, sizes[K]
    dims = precision_dims(t, energy.full)
    sigma = _unknowns(energy, (size, sizes[V]), row)[1]
    mine = sigma[..., row] if i in dims else sigma
    exact = (
        sp.Matrix(size, size, lambda x, y: best[mine[x, y]]).inv()
        if energy.full
        else sp.diag(*(1 / best[mine[x]] for x in range(size)))
    )
    carried = lambda lam, at: lam[(*at, row)] if lam.ndim > len(at) else lam[at]  # noqa: E731
    for x in range(size):
        held, new = (
            carried(values["Lambda_p"], (x, x) if energy.carried_full else (x,)),
            carried(precision, (x, x) if energy.carried_full else (x,)),
        )
        want = exact[x, x]
        if t.posterior.projection == "reset":
            want = concrete(put(energy_lambda0(energy)), values, sizes, {j: x, i: row})
        elif t.posterior.gain:
            want = held + values["gain"] * (want - held)
        if sp.nsimplify(new - want) != 0:
            raise UnifyError(
                str(t),
                f"the carried precision after observation {n + 1} is not the projection of the minimum: {new} against {want}",
                "mend the recurrence",
            )
    if energy.carried_full:
        off = [precision[(x, y, row) if i in dims else (x, y)] - exact[x, y] for x in range(size) for y in range(size)]
        if any(sp.nsimplify(x) != 0 for x in off):
            raise UnifyError(
                str(t), f"the full precision after observation {n + 1} is not the minimum of F_t", "mend the recurrence"
            )


def energy_lambda0(energy: FreeEnergy) -> sp.Expr:
    """Lambda_0 of the free energy's triple."""
    from .energy import prior_precision

    return prior_precision(energy.triple)


__all__ = ["Confirmation", "array", "confirm", "random_values"]
