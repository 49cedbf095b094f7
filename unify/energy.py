"""The free energy F_t of a triple, in index notation, for one value channel i.

    F_t[q] = E_q[loss_t(S)] + alpha_t KL(q || q_{t-1}) + (1 - alpha_t) KL(q || p_0)        (theory: one filter, three choices)

q is Gaussian with mean m and covariance Sigma (a vector over key channels, or a matrix for a full posterior); the loss is
replaced by its second-order expansion at the anchor s*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy as sp

from .symbols import K, LogDet, a, array, at_index, c, collapse, contract, derivative, half, i, j, l, symbol
from .triple import Observation, Triple

GATE_DIMS = {"none": (), "one": (), "fixed": (), "head": (), "key": (j,), "value": (i,), "entry": (j, i)}


@dataclass(frozen=True)
class Stage:
    """One observation of a token as the free energy sees it: its key, anchor reading, value and two precisions."""

    key: sp.Expr
    read: sp.Expr
    value: sp.Expr
    beta: sp.Expr
    importance: sp.Expr
    curvature: str
    anchor: str
    evidence: bool

    def loss(self, s: str, anchor: sp.Expr) -> sp.Expr:
        """loss_t(s), its prediction linearised at the anchor where the anchor has a read key of its own."""
        s_j = array(s, (j, i))
        if self.evidence:  # beta v is given: the terms of the loss that depend on s
            return half * self.importance * contract(self.key * s_j, j) ** 2 - self.value * contract(self.key * s_j, j)
        predicted = contract(self.read * anchor, j) + contract(self.key * (s_j - anchor), j)
        return half * self.beta * (self.value - predicted) ** 2

    def expansion(self) -> tuple[sp.Expr, sp.Expr]:
        """Gradient [a] and projected Hessian C[importance k k^T] ([a], or [a, c] when full) at the anchor `anchor`[j, i]."""
        x = array("anchor", (j, i))
        slope = derivative(self.loss("s", x), array("s", (a, i)))
        bend = derivative(slope, array("s", (c, i)))
        gradient = collapse(
            slope.replace(
                lambda e: isinstance(e, sp.Indexed) and str(e.base) == "s", lambda e: array("anchor", e.indices)
            )
        )
        gradient = collapse(gradient)
        if not self.evidence:  # the precision of the curvature may be a gate of its own
            bend = (bend / self.beta * self.importance) if self.beta != 0 else bend
        return gradient, sp.expand(project(bend, self.curvature))


def project(hessian: sp.Expr, curvature: str) -> sp.Expr:
    """C[H]: the part of a Hessian H[a, c] that is kept: [a] for the diagonal families, [a, c] when full."""
    if curvature == "none":
        return sp.S.Zero
    if curvature == "full":
        return hessian
    diagonal = hessian.subs(c, a)
    if curvature == "isotropic":
        return collapse(contract(at_index(diagonal, a, l), l)) / K
    return diagonal


@dataclass(frozen=True)
class FreeEnergy:
    """F_t for one triple: `forget` (the weighted posterior), and for each observation its expected `losses`.

    full: whether the covariance is a matrix. dims: channels of the precision carried from token to token.
    """

    triple: Triple
    stages: tuple[Stage, ...]
    full: bool
    carried_full: bool
    forget: sp.Expr
    losses: tuple[sp.Expr, ...]

    def total(self, n: int = 0) -> sp.Expr:
        """F of the n-th observation: the first forgets, a later one starts from where the one before arrived."""
        return self.losses[n] + (self.forget if n == 0 and not self.apart else self.between)

    @property
    def apart(self) -> bool:
        """Whether forgetting is a minimum of its own, over factorised Gaussians: a full one has no KL per channel."""
        return (
            self.full and self.triple.prior.dynamics == "power" and GATE_DIMS[self.triple.architecture.forgetting] != ()
        )

    @property
    def between(self) -> sp.Expr:
        """KL(q || N(m~, Lambda~)): what holds a later observation of the same token."""
        return divergence("m_p", "Lambda_p", self)

    def __str__(self):
        from .notation import energy_parts, plain

        rows = [[plain(x) for _, x in energy_parts(self, n)] for n in range(len(self.losses))]
        return "\n".join(f"F_t{f',{n + 1}' if n else ''} = " + "\n    + ".join(parts) for n, parts in enumerate(rows))

    def latex(self) -> str:
        """F_t as an aligned LaTeX block, one term a line, the anchor put in; one F_t for each observation."""
        from .notation import energy_parts, latex, static_names

        static, many = static_names(self.triple), len(self.losses) > 1
        rows = []
        for n in range(len(self.losses)):
            first, *rest = (latex(x, static) for _, x in energy_parts(self, n))
            rows += [f"F_{{t{f',{n + 1}' if many else ''}}} &= {first}", *(rf"&\quad + {x}" for x in rest)]
        return "\\begin{aligned}\n" + " \\\\\n".join(rows) + "\n\\end{aligned}"


def divergence(mean: str, precision: str, energy, weight: sp.Expr = sp.S.One, prior: bool = False) -> sp.Expr:
    """weight * KL(N(m, Sigma) || N(mean, precision^-1)) of one value channel."""
    d = precision_dims(energy.triple, energy.full)
    at = (lambda x: prior_mean(energy.triple).subs(j, x)) if prior else (lambda x: array(mean, (x, i)))
    gap = lambda x: array("m", (x, i)) - at(x)  # noqa: E731
    if energy.full:
        rest = d[1:]
        sigma = array("Sigma", (j, *rest))
        lam = _full(prior_precision(energy.triple), energy) if prior else _carried(precision, energy)
        quadratic = contract(contract(lam * (sigma + gap(j) * gap(l)), l), j)
        return half * weight * (quadratic - LogDet(symbol("Sigma")) - K)
    lam = prior_precision(energy.triple) if prior else array(precision, d)
    each = lam * array("Sigma", d) + lam * gap(j) ** 2 - sp.log(lam * array("Sigma", d)) - 1
    return contract(half * weight * each, j) if j in _used(each, weight) else half * weight * each


def _used(*exprs: sp.Expr) -> set:
    return {d for x in exprs for y in sp.sympify(x).atoms(sp.Indexed) for d in y.indices}


def _full(diagonal: sp.Expr, energy) -> sp.Expr:
    return sp.KroneckerDelta(j, l) * diagonal


def _carried(name: str, energy) -> sp.Expr:
    """A precision as a matrix [j, l]: carried whole, or diagonal when the projection cut it down."""
    if energy.carried_full:
        return array(name, precision_dims(energy.triple, True))
    return _full(array(name, precision_dims(energy.triple, False)), energy)


def prior_precision(triple: Triple) -> sp.Expr:
    """Lambda_0: 1, or the argument prior_precision with its channels."""
    p = triple.prior
    if p.adaptive is not None:
        return array("prior_precision", () if type(p.adaptive).__name__ == "Ridge" else (j,))
    return sp.S.One if p.precision == "one" else array("prior_precision", GATE_DIMS[p.precision])


def prior_mean(triple: Triple) -> sp.Expr:
    """mu_0: 0, or the argument prior_mean[j, i]."""
    return sp.S.Zero if triple.prior.mean == "zero" else array("prior_mean", (j, i))


def precision_dims(triple: Triple, full: bool) -> tuple[sp.Symbol, ...]:
    """Channels of the precision: the union of what enters it."""
    arch, prior = triple.architecture, triple.prior
    dims: set = set(prior_precision(triple).free_symbols & {i, j}) | {j}
    kind = triple.curvature
    if kind == "diagonal" or (kind != "none" and triple.importance == "value"):
        dims.add(i)
    if kind != "none" or prior.dynamics == "diffusion":
        dims |= set(GATE_DIMS[arch.forgetting]) | set(GATE_DIMS[prior.noise])
    return tuple(d for d in ((j, l, i) if full else (j, i)) if d in dims or d == l)


def free_energy(triple: Triple) -> FreeEnergy:
    """Build F_t of a triple."""
    stages = tuple(_stage(triple, n, o) for n, o in enumerate(triple.architecture.stages))
    full = triple.curvature == "full"
    shell = FreeEnergy(triple, stages, full, full and triple.posterior.projection == "keep", sp.S.Zero, ())
    losses = tuple(_expected_loss(s, shell) for s in stages)
    alpha = (
        sp.S.One
        if triple.architecture.forgetting == "none"
        else array("alpha", GATE_DIMS[triple.architecture.forgetting])
    )
    if triple.prior.dynamics == "diffusion":
        forget = divergence("m_p", "Lambda_p", shell)
    else:
        family = replace(shell, full=False) if shell.apart else shell
        forget = divergence("mu", "Lambda", family, alpha)
        if alpha != 1:
            forget += divergence("mu", "Lambda", family, 1 - alpha, prior=True)
    return FreeEnergy(triple, stages, full, shell.carried_full, forget, losses)


def _expected_loss(stage: Stage, energy: FreeEnergy) -> sp.Expr:
    """E_q of the expanded loss: gradient . (m - s*) + 1/2 [(m - s*) C (m - s*) + tr(C Sigma)], constants dropped."""
    d = precision_dims(energy.triple, energy.full)
    gradient, bend = stage.expansion()
    gap = lambda x: array("m", (x, i)) - array("anchor", (x, i))  # noqa: E731
    linear = contract(at_index(gradient, a, j) * gap(j), j)
    if stage.curvature == "none":
        return linear
    if energy.full:
        kernel = bend.subs({a: j, c: l}, simultaneous=True)
        return linear + half * contract(contract(kernel * (gap(j) * gap(l) + array("Sigma", d)), l), j)
    return linear + half * contract(at_index(bend, a, j) * (gap(j) ** 2 + array("Sigma", d)), j)


def _stage(triple: Triple, n: int, o: Observation) -> Stage:
    arch = triple.architecture
    repeat = n // len(arch.observations)
    name = lambda x: x if repeat == 0 else f"{x}_{repeat + 1}"  # noqa: E731
    read = key = _signed(o.key, name)
    if not o.plain:
        read = _signed(o.read, name)
    value = sp.S.Zero
    beta = importance = sp.S.One
    if o.target:
        value = array(name("v"), (i,)) * (array(name("write"), (i,)) if arch.write_gate else 1)
        beta = sp.S.One if arch.precision == "one" else array(name("beta"), GATE_DIMS[arch.precision])
        importance = beta if arch.importance == "tied" else array(name("importance"), GATE_DIMS[arch.importance])
    if arch.value == "evidence" and triple.curvatures[n] == "none":
        importance = sp.S.Zero  # evidence r = beta v without a curvature says nothing of beta
    return Stage(key, read, value, beta, importance, triple.curvatures[n], triple.anchors[n], arch.value == "evidence")


def _signed(name: str, rename) -> sp.Expr:
    return -array(rename(name[1:]), (j,)) if name.startswith("-") else array(rename(name), (j,))
