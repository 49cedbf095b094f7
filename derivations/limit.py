"""What proves an edge: a simulation relation, checked as identities in sympy.

Parent P and child C are two recurrences. An edge gives the parent's arguments as expressions in the child's (the
*substitution*) and the parent's states as expressions in the child's (the *relation* R). It holds when

    initial    P starts in R(C's start)
    step       P's step from R(s) arrives in R(C's step from s), for every state s and every token
    read       output * P's read-out is C's

By induction the outputs then agree at every token. An *exact* edge holds identically. A *limit* edge has a parameter
eps -> 0. Its relation may leave room, X = A(s) + eps^m E_X with E_X anything bounded; a step has to keep that room,
which by induction bounds E_X at every token, uniformly in small eps; and the read-outs then differ by O(eps^p).

All of it is index notation, so a proof is for all K and V. One run in exact arithmetic stands beside it: of an exact
edge it finds no difference, of a limit edge a difference that begins with eps^p and not later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import sympy as sp

from unify.derivations.algebra import EPS, cases, expansion, leading, reduced, remainder
from unify.derivations.edge import ANYTHING, ONE_HOT, UNIT, Assumption, Edge, aligned, anything, signature, tex
from unify.derivations.run import Run
from unify.derive import derive
from unify.errors import UnifyError
from unify.notation import plain
from unify.recurrence import Recurrence
from unify.structure import inline
from unify.symbols import array, arrays, at_index, contract, j, l, name_of, put

__all__ = ["ONE_HOT", "UNIT", "Assumption", "Edge", "Obligation", "Proof", "anything", "prove_edge"]


@dataclass(frozen=True)
class Obligation:
    """left = right: identically (`upto` None), or in every coefficient of eps below eps ** upto, poles included.

    phase: initial, step, bounded, read, variance or lemma. about: what of. rest: the reduced difference, 0 if proved.
    """

    phase: str
    about: str
    left: sp.Expr
    right: sp.Expr
    upto: int | None
    rest: sp.Expr

    @property
    def room(self) -> str:
        """What an identity in eps leaves open."""
        return "" if self.upto is None else f" + O(eps^{self.upto})" if self.upto else " + O(1)"

    def __str__(self):
        left, right = plain(self.left), plain(self.right)
        both = f"{left} on both sides" if left == right else f"{left} = {right}"
        return f"{self.phase:<9} {self.about}: {both}{self.room};  difference reduced to {plain(self.rest)}"

    def latex(self) -> str:
        """The identity as LaTeX."""
        return f"{tex(self.left)} = {tex(self.right)}" + self.room.replace("^1)", ")").replace("eps", r"\varepsilon")


@dataclass(frozen=True)
class Proof:
    """Every obligation of an edge, each reduced to zero.

    scope: the sizes the obligations are proved for. run: what a run in exact arithmetic found.
    """

    edge: Edge
    obligations: tuple[Obligation, ...]
    scope: str
    run: str

    def __str__(self):
        lines = [str(self.edge), *(f"  {x}" for x in self.obligations)]
        return "\n".join([*lines, f"  run       {self.run}", f"  proved    {self.edge.claim}, for {self.scope}"])

    def latex(self) -> str:
        """The obligations as an aligned LaTeX block."""
        return aligned([rf"\text{{{x.phase}}}\; & {x.latex()}" for x in self.obligations])


@lru_cache(maxsize=512)
def prove_edge(edge: Edge) -> Proof:
    """Prove an edge, for all K and V.

    Raises UnifyError naming the obligation that fails and what is left of it.
    """
    work = _Simulation(edge)
    work.check_names()
    out = [work.lemma(*x) for x in edge.lemmas]
    out += [work.initial(s.name) for s in work.parent.states]
    out += [work.step(s.name) for s in work.parent.states]
    if any(x.has(EPS) for _, x in edge.restrict):
        out += [work.bounded(s.name) for s in work.child.states]
    out.append(work.read("read", "o", edge.output))
    if edge.variance is not None:
        out.append(work.read("variance", "variance", edge.variance))
    return Proof(edge, tuple(out), "all K, V", Run(edge).check())


# --- programs as functions of inputs and states -----------------------------------------------------------------------


@lru_cache(maxsize=512)
def program(recurrence: Recurrence) -> dict[str, sp.Expr]:
    """Each state's new value, o and variance, and each solve's two sides, in inputs and states alone."""
    solved = {s.name for s in recurrence.steps if s.solve is not None}
    raw = {"k_raw": lambda x: array("k", (x,))}  # the key as it is given is the argument k
    write = lambda expr: put(inline(expr, recurrence, solved), **raw)  # noqa: E731
    out = {s.name: write(array(dict(recurrence.updates)[s.name], s.dims)) for s in recurrence.states}
    for step in recurrence.steps:
        if step.name in ("o", "variance"):
            out[step.name] = write(step.expr)
        if step.solve is not None:
            out[f"{step.name} matrix"], out[f"{step.name} right"] = write(step.solve), write(step.expr)
    return out


def told(expr: sp.Expr) -> sp.Expr:
    """The same in alpha for exp(g)."""
    return _renamed(expr, {"g": "alpha", "g_importance": "alpha_importance"}, sp.log)


def untold(expr: sp.Expr) -> sp.Expr:
    """The same in exp(g) for alpha."""
    return _renamed(expr, {"alpha": "g", "alpha_importance": "g_importance"}, sp.exp)


def _renamed(expr: sp.Expr, names: Mapping[str, str], wrap: Callable) -> sp.Expr:
    swap = {x: x.indices if isinstance(x, sp.Indexed) else () for x in arrays(expr) if name_of(x) in names}
    return expr.xreplace({x: wrap(array(names[name_of(x)], tuple(dims))) for x, dims in swap.items()})


def at(expr: sp.Expr, dims: tuple):
    """An expression over `dims` as a function of its indices, or itself when it has none."""
    if not dims:
        return expr

    def value(*where):
        out = expr
        for old, new in zip(dims, where, strict=True):
            if old != new:
                out = at_index(out, old, new)
        return out

    return value


# --- the obligations --------------------------------------------------------------------------------------------------


class _Simulation:
    """The obligations of one edge. `theirs` is the parent's program with everything substituted, `mine` the child's."""

    def __init__(self, edge: Edge):
        self.edge = edge
        self.parent, self.child = derive(edge.parent_triple), derive(edge.child_triple)
        self.arguments, self.states = edge.arguments(), edge.states()
        self.dims = {s.name: s.dims for s in self.parent.states}
        self.values = {x: at(self.arguments[x], dims) for x, (dims, _) in signature(edge.parent_triple).items()}
        self.values |= {x: at(expr, self.dims[x]) for x, expr in self.states.items()}
        child = signature(edge.child_triple)
        self.limits = {x: at(expr, child[x][0]) for x, expr in edge.restrict}
        self.mine = {x: self.childs(expr) for x, expr in program(self.child).items()}
        self.theirs = {x: self.childs(put(expr, **self.values)) for x, expr in program(self.parent).items()}
        self._solve(self.theirs, self.parent, "parent", edge.order)
        self._solve(self.mine, self.child, "child", None)

    def childs(self, expr: sp.Expr) -> sp.Expr:
        """In the child's restricted arguments, with alpha for exp(g), the assumptions applied."""
        expr = told(put(untold(expr), **self.limits))
        for assumption in self.edge.assumptions:
            expr = assumption.rewrite(expr)
        return expr

    def check_names(self) -> None:
        """Static arguments stay static, and a relation mentions nothing that changes with the token."""
        childs = signature(self.edge.child_triple) | self.edge.free()
        per = {name: kind for name, (_, kind) in childs.items()} | {"eps": "static"}
        per["alpha"] = per.get("g", "token")
        moving = lambda expr: {x for x in map(name_of, arrays(expr)) if per.get(x, "token") != "static"}  # noqa: E731
        for name, (_, kind) in signature(self.edge.parent_triple).items():
            found = moving(self.arguments[name]) if kind == "static" else set()
            if found:
                self.fail("substitution", name, f"it is constant over tokens, {', '.join(sorted(found))} is not")
        for name, expr in self.states.items():
            found = moving(expr) - {s.name for s in self.child.states} - {ANYTHING + name}
            if found:
                self.fail(
                    "relation", name, f"{', '.join(sorted(found))} is no state, no constant and not {ANYTHING}{name}"
                )

    def initial(self, name: str) -> Obligation:
        """The parent starts where the relation puts the child's start."""
        start = next(s.initial for s in self.parent.states if s.name == name)
        begin = {s.name: at(self.childs(s.initial), s.dims) for s in self.child.states}
        return self._related("initial", name, self.childs(put(start, **self.values)), begin)

    def step(self, name: str) -> Obligation:
        """One token keeps the relation."""
        new = {s.name: at(self.mine[s.name], s.dims) for s in self.child.states}
        return self._related("step", name, self.theirs[name], new)

    def _related(self, phase: str, name: str, left: sp.Expr, states: dict) -> Obligation:
        """left = A(the child's states) + eps^m (anything bounded), with A and m read off the relation."""
        room, relation = anything(name, self.dims[name]), self.childs(self.states[name])
        width = sp.diff(relation, room)
        if width.has(room):
            self.fail("relation", name, f"it is not linear in {plain(room)}")
        right = put(relation.xreplace({room: sp.S.Zero}), **states)
        return self._claim(phase, name, left, right, None if width == 0 else expansion(width, 1).low)

    def bounded(self, name: str) -> Obligation:
        """Where the claim lets the child's own arguments go to a limit, its states have no pole there."""
        return self._claim("bounded", f"the child's {name}", self.mine[name], sp.S.Zero, 0)

    def read(self, phase: str, name: str, factor: sp.Expr) -> Obligation:
        """The parent's read-out, times the factor, is the child's."""
        return self._claim(phase, name, self.childs(factor) * self.theirs[name], self.mine[name], self.edge.order)

    def lemma(self, about: str, left: sp.Expr, right: sp.Expr) -> Obligation:
        """A side identity."""
        return self._claim("lemma", about, self.childs(left), self.childs(right), None)

    def _claim(self, phase: str, about: str, left: sp.Expr, right: sp.Expr, upto: int | None) -> Obligation:
        if upto is None:
            rest = remainder(left, right)
        else:
            power, found = leading(left - right, upto) or (0, sp.S.Zero)
            rest = found * EPS**power
        out = Obligation(phase, about, left, right, upto, rest)
        if rest != 0:
            both = f"{plain(left)} is not {plain(right)}{out.room}"
            self.fail(phase, about, f"{both}: the difference {'is' if upto is None else 'begins with'} {plain(rest)}")
        return out

    @staticmethod
    def _solve(side: dict, recurrence: Recurrence, whose: str, order: int | None) -> None:
        """Replace solved vectors by their closed form, or its expansion in eps; one without is a letter of its own."""
        for step in recurrence.steps:
            if step.solve is not None:
                found = solution(side.pop(f"{step.name} matrix"), side.pop(f"{step.name} right"), order)
                value = array(f"{step.name}_{whose}", step.dims) if found is None else found
                for read in ("o", "variance"):
                    side[read] = put(side[read], **{step.name: at(value, step.dims)})

    def fail(self, phase: str, about: str, what: str) -> None:
        """Say which obligation fails, and with what left over."""
        works = "mend the substitution, the relation, the factors, or the kind and order"
        raise UnifyError(f"{self.edge.name} ({self.edge.claim})", f"{phase} {about}: {what}", works)


def solution(matrix: sp.Expr, right: sp.Expr, order: int | None) -> sp.Expr | None:
    """x[j] with sum_l matrix[j, l] x[l] = right[j], where the matrix is diagonal, or becomes so as eps -> 0.

    In a limit, matrix = eps^-s (D + eps B_1 + eps^2 B_2 ...) with D diagonal; then x = eps^s (y_0 + eps y_1 + ...),
    D y_0 = right and D y_n = - sum_m B_m y_(n-m); the rest is bounded, because D is invertible. None where it is
    neither.
    """
    if order is None:
        return right / matrix.subs(l, j) if _diagonal(matrix) else None
    series = expansion(matrix, order + 4)
    if not _diagonal(series.terms[0]):
        return None
    pivot, y = series.terms[0].subs(l, j), []
    for n in range(order + 1):
        pushed = (contract(series.terms[m] * at_index(y[n - m], j, l), l) for m in range(1, n + 1))
        y.append(((right if n == 0 else 0) - sp.Add(*pushed)) / pivot)
    tail = EPS ** (order + 1) * anything("x", (j,))
    return EPS**-series.low * sp.Add(*(EPS**n * x for n, x in enumerate(y)), tail)


def _diagonal(matrix: sp.Expr) -> bool:
    """Whether the entries with j != l vanish."""
    return all(reduced(x) == 0 for x in cases(matrix, frozenset({frozenset((j, l))})))
