"""The forgetting-dominates edge as a theorem: how far Palimpsa is from Mamba-2, at any length.

What a token adds to an importance, b k^2, is weighed against what forgetting hands back to the prior, (1 - alpha) I_p.
Their ratio rho bounds how far the importance can ever be from the prior's, and with it the distance of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import sympy as sp

from unify.derivations.algebra import remainder
from unify.derivations.edge import aligned, tex
from unify.derivations.limit import program, told
from unify.derive import derive
from unify.errors import UnifyError
from unify.models.zoo import get
from unify.notation import plain
from unify.symbols import array, contract, j, put, symbol


@dataclass(frozen=True)
class Step:
    """One sentence of a proof, and what sympy has to find: left = right, or left >= 0 (right None)."""

    sentence: str
    left: sp.Expr
    right: sp.Expr | None = None

    def holds(self) -> bool:
        """Whether sympy finds it."""
        if self.right is None:
            return bool(sp.factor(self.left).is_nonnegative)
        return remainder(sp.expand(self.left), sp.expand(self.right)) == 0

    def __str__(self):
        return f"{self.sentence}\n      {plain(self.left)} {'>= 0' if self.right is None else '= ' + plain(self.right)}"

    def latex(self) -> str:
        """The identity or inequality as LaTeX."""
        return tex(self.left) + (r" &\ge 0" if self.right is None else f" &= {tex(self.right)}")


@dataclass(frozen=True)
class Theorem:
    """A statement, what it asks for, and a proof whose every step is an identity or a sign that sympy checks."""

    name: str
    hypotheses: tuple[str, ...]
    statement: str
    corollary: str
    steps: tuple[Step, ...]

    def prove(self) -> Theorem:
        """Check every step; returns the theorem. Raises UnifyError with the step that does not hold."""
        for step in self.steps:
            if not step.holds():
                raise UnifyError(f"theorem {self.name!r}", f"a step does not hold: {step}", "mend the step")
        return self

    def __str__(self):
        lines = [f"Theorem ({self.name})", *(f"  given     {x}" for x in self.hypotheses)]
        lines += [f"  then      {self.statement}", f"  hence     {self.corollary}", "  proof"]
        return "\n".join([*lines, *(f"  {n:>2}  {x}" for n, x in enumerate(self.steps, 1))])

    def latex(self) -> str:
        """The steps as an aligned LaTeX block."""
        return aligned([x.latex() for x in self.steps])


@cache
def forgetting_dominates() -> Theorem:
    """Palimpsa stays near Mamba-2 wherever forgetting dominates, entry by entry and at every length.

    |o_i - o'_i / I_p| <= scale sum_j |q_j M_ji| / I_p * rho_ji / (1 + rho_ji), o of Palimpsa and o' of Mamba-2 on the
    same q, k, evidence and g, with rho_ji = max over s <= t of b_si k_sj^2 / ((1 - alpha_s) I_p).
    """
    return Theorem(
        "forgetting dominates",
        (
            "q, k, v (the evidence) and g the same in Palimpsa and Mamba-2; M the memory that both then carry",
            "Ibar_0 = 0; 0 < alpha_s <= 1, b_si >= 0, I_p > 0",
            "c_ji with b_si k_sj^2 <= (1 - alpha_s) c_ji for s <= t: the least is max_s b_si k_sj^2 / (1 - alpha_s)",
        ),
        "|o_ti - o'_ti / I_p| <= scale sum_j |q_tj M_tji| / I_p * rho_ji / (1 + rho_ji), rho_ji = c_ji / I_p, all t, i",
        "if alpha_s <= alpha_max < 1 and b_si k_sj^2 <= c for all s, j, i, the same with one rho = N c / I_p, "
        "N = 1 / (1 - alpha_max) the memory's window",
        (*_induction(), *_reading(), *_window()),
    )


def _induction() -> tuple[Step, ...]:
    """0 <= Ibar <= c at every token."""
    new = told(program(derive(get("palimpsa").triple))["Ibar"])
    c, d, s, old, b = (sp.Symbol(x, nonnegative=True) for x in ("c", "d", "s", "Ibar", "b"))
    alpha, k = symbol("alpha"), symbol("k")
    entry = lambda held, added: put(  # noqa: E731
        new, Ibar=lambda *at: held, importance=lambda *at: added, k=lambda *at: sp.S.One
    )
    held = entry(c - d, (1 - alpha) * c - s)
    claim = "Induction: say Ibar = c - d and b k^2 = (1 - alpha) c - s with d, s >= 0. Then c - Ibar' is"
    return (
        Step("Start: Ibar_0 = 0 <= c,", c),
        Step(claim, c - held, alpha * d + s),
        Step("and that is not negative, so Ibar <= c at every token.", alpha * d + s),
        Step("Nor is Ibar' itself.", entry(old, b * k**2)),
    )


def _reading() -> tuple[Step, ...]:
    """The read-outs' difference, and its bound by Ibar <= c."""
    ours, theirs = (program(derive(get(name).triple)) for name in ("palimpsa", "mamba2"))
    I_p, scale, memory, weight = symbol("prior_precision"), symbol("scale"), told(ours["M"]), told(ours["Ibar"])
    gap = told(ours["o"]) - told(put(theirs["o"], S=lambda *at: array("M", at))) / I_p
    share = -scale * contract(array("q", (j,)) * memory / I_p * weight / (I_p + weight), j)
    x, y, c = (sp.Symbol(name, positive=True) for name in ("x", "y", "c"))
    rho, apart = c / I_p, (x + y) ** 2 - (x - y) ** 2
    return (
        Step("Read: the outputs differ by the share Ibar' / (I_p + Ibar') of every term.", gap, share),
        Step("x / (I_p + x) grows with x: its slope is", sp.diff(x / (I_p + x), x), I_p / (I_p + x) ** 2),
        Step("and that is not negative, so that Ibar' <= c bounds the share by c / (I_p + c).", I_p / (I_p + x) ** 2),
        Step("With rho = c / I_p that is rho / (1 + rho).", c / (I_p + c), rho / (1 + rho)),
        Step("Triangle inequality, for two terms and so for K: (|x| + |y|)^2 - (x - y)^2 is", apart, 4 * x * y),
        Step("and that is not negative: the sum's size is at most the sum of the terms' sizes.", 4 * x * y),
    )


def _window() -> tuple[Step, ...]:
    """N c, c = max b k^2, meets the hypothesis where alpha <= alpha_max."""
    c, u, s = (sp.Symbol(x, nonnegative=True) for x in ("c", "u", "s"))
    r = sp.Symbol("r", positive=True)
    spare = (r + u) * c / r - (c - s)
    claim = "Corollary: say 1 - alpha_max = r = 1 / N, 1 - alpha = r + u, b k^2 = c - s with u, s >= 0. Then"
    return (
        Step(f"{claim} (1 - alpha) N c - b k^2 is", spare, u * c / r + s),
        Step("and that is not negative: N c is a c_ji for every entry.", u * c / r + s),
    )


def forgetting_bound(q, k, v, alpha, importance, prior_precision: float, scale: float = 1.0) -> np.ndarray:
    """The theorem's bound on |o - o' / I_p|, o Palimpsa's and o' Mamba-2's output, for one head.

    bound_ti = scale sum_j |q_tj M_tji| / I_p * rho / (1 + rho), rho = max_(s <= t) b_si k_sj^2 / ((1 - alpha_s) I_p).
    q, k: [T, K]; v: [T, V], evidence; alpha: [T], in (0, 1]; importance: [T, V], >= 0; prior_precision: I_p > 0.
    Returns [T, V]. Where nothing is forgotten and something added, rho is infinite and the share 1.
    """
    q, k, v, alpha, importance = (np.asarray(x, dtype=float) for x in (q, k, v, alpha, importance))
    added = k[:, :, None] ** 2 * importance[:, None, :]
    room = np.broadcast_to(((1 - alpha) * prior_precision)[:, None, None], added.shape)
    rho = np.full(added.shape, np.inf)
    np.divide(added, room, out=rho, where=room > 0)
    rho = np.maximum.accumulate(np.where(added == 0, 0.0, rho), axis=0)
    share = np.divide(rho, 1 + rho, out=np.ones_like(rho), where=np.isfinite(rho))
    memory, out = np.zeros(added.shape[1:]), np.empty(v.shape)
    for t in range(len(q)):
        memory = alpha[t] * memory + np.outer(k[t], v[t])
        out[t] = scale * (np.abs(q[t])[:, None] * np.abs(memory) / prior_precision * share[t]).sum(0)
    return out


def window_ratio(k, alpha, importance, prior_precision: float) -> float:
    """The corollary's one number for a whole sequence: rho = N max(b k^2) / I_p, N = 1 / (1 - max alpha).

    k: [T, K]; alpha: [T]; importance: [T, V]; prior_precision: I_p > 0. Infinite where N is and b k^2 is not 0.
    """
    k, importance = np.asarray(k, dtype=float), np.asarray(importance, dtype=float)
    added, left = (k[:, :, None] ** 2 * importance[:, None, :]).max(), 1 - np.max(alpha)
    return float(added / (left * prior_precision)) if left > 0 else float("inf" if added else 0.0)


THEOREMS = {"forgetting dominates": forgetting_dominates}
"""Theorems by the name that an edge gives."""
