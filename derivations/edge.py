"""What an edge of the map is: a parent, a child, a substitution of arguments and a relation between states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import sympy as sp

from unify.derivations.algebra import h, normal
from unify.derive import derive
from unify.errors import UnifyError
from unify.models.zoo import ZOO, get
from unify.models.zoo import name_of as zoo_name
from unify.notation import Latex, plain
from unify.symbols import array, arrays, contract, j, name_of, put, symbol
from unify.triple import Triple

Pairs = tuple[tuple[str, sp.Expr], ...]
ANYTHING = "E_"
"""Prefix of what a relation leaves open: E_X is any bounded quantity in the place of state X."""


def anything(name: str, dims: tuple = ()) -> sp.Expr:
    """E_X: any bounded quantity in the place of the parent's state X."""
    return array(ANYTHING + name, dims)


# --- what an edge may ask of the child's keys -------------------------------------------------------------------------


@dataclass(frozen=True)
class Assumption:
    """A property of the child's keys, used as a rewriting rule.

    rewrite: the rule. sample: keys that have the property, for a run at concrete sizes: (random numbers, K) -> k.
    """

    name: str
    rewrite: Callable[[sp.Expr], sp.Expr]
    sample: Callable[[Random, int], list]

    def __str__(self):
        return self.name


def _one_hot(expr: sp.Expr) -> sp.Expr:
    """k_j = hot delta_jh, h the key's only channel."""
    return put(expr, k=lambda x: symbol("hot") * sp.KroneckerDelta(x, h))


def _one_hot_keys(rng: Random, size: int) -> list:
    where = rng.randrange(size)
    return [sp.Integer(rng.choice((1, 2, 3))) if x == where else sp.S.Zero for x in range(size)]


def _unit(expr: sp.Expr) -> sp.Expr:
    """sum_l k_l^2 = 1."""
    return normal(expr).xreplace({normal(contract(array("k", (j,)) ** 2, j)): sp.S.One})


def _unit_keys(rng: Random, size: int) -> list:
    start = [sp.Rational(3, 5), sp.Rational(-4, 5)] if size > 1 else [sp.S.One]
    return [*start, *[sp.S.Zero] * (size - 2)]


ONE_HOT = Assumption("one-hot keys", _one_hot, _one_hot_keys)
UNIT = Assumption("unit keys: k.k = 1", _unit, _unit_keys)


# --- the edge ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edge:
    """`child` is a special case, or a limit, of `parent`.

    parent, child: names in the zoo, or triples.
    kind: "exact" or "limit"; order: p of a limit's O(eps ** p). why: one sentence for a reader.
    substitution: the parent's argument -> its value, in the child's arguments, `alpha`, eps and free parameters. It may
        use the child's states before the token: a gate that is computed. A name that both have defaults to the child's;
        what the child does not know and the edge does not set is a free parameter under its own name.
    relation: the parent's state -> its value in the child's states, static arguments, eps and E_X (`anything`), for every
        value of an index that the parent's state does not have; a name that both have defaults to the child's.
    output, variance: what the parent's output, and its variance, is multiplied with to be the child's; variance None
        where the two mean different things.
    instance: the parent's triple with a hyperparameter set, where that is what the edge sets.
    restrict: the child's arguments -> what the claim restricts them to. assumptions: properties of its keys.
    domain: what must hold for the substituted arguments to be arguments, in words.
    lemmas: (sentence, left, right): side identities that are proved with the edge.
    theorem: name of the bound that goes with the edge (`bound.THEOREMS`). new: not in the theory's table.
    drawn: False for the way back of an equivalence, which a map without circles leaves out.
    """

    parent: str | Triple
    child: str | Triple
    kind: str
    why: str
    substitution: Mapping | Pairs = ()
    relation: Mapping | Pairs = ()
    order: int | None = None
    output: sp.Expr = sp.S.One
    variance: sp.Expr | None = None
    instance: Triple | None = None
    restrict: Mapping | Pairs = ()
    assumptions: tuple[Assumption, ...] = ()
    domain: tuple[str, ...] = ()
    lemmas: tuple[tuple[str, sp.Expr, sp.Expr], ...] = ()
    theorem: str = ""
    new: bool = False
    drawn: bool = True
    title: str = field(default="", compare=False)

    def __post_init__(self):
        if self.kind not in ("exact", "limit"):
            raise UnifyError(self.name, f"kind={self.kind!r}", "use 'exact' or 'limit'")
        if (self.order is not None) != (self.kind == "limit") or (self.order is not None and self.order < 1):
            works = "a limit has an order of 1 or more, an exact edge has None"
            raise UnifyError(self.name, f"kind={self.kind!r} with order={self.order!r}", works)
        for name in ("substitution", "relation", "restrict"):
            pairs = tuple((x, sp.sympify(y)) for x, y in dict(getattr(self, name)).items())
            object.__setattr__(self, name, pairs)
        object.__setattr__(self, "output", sp.sympify(self.output))
        object.__setattr__(self, "variance", None if self.variance is None else sp.sympify(self.variance))

    # -- names ---------------------------------------------------------------------------------------------------------

    @property
    def parent_triple(self) -> Triple:
        """The parent as it is used: with its hyperparameters set."""
        return self.instance or _triple(self.parent)

    @property
    def child_triple(self) -> Triple:
        """The child's triple."""
        return _triple(self.child)

    @property
    def parent_name(self) -> str:
        """The parent's name in the zoo, or the one its title gives it."""
        return _name(self.parent, self.title.partition(" -> ")[0])

    @property
    def child_name(self) -> str:
        """The child's name in the zoo, or the one its title gives it."""
        return _name(self.child, self.title.partition(" -> ")[2])

    @property
    def name(self) -> str:
        """parent -> child, as people write them."""
        return " -> ".join(ZOO[x].label if x in ZOO else x for x in (self.parent_name, self.child_name))

    @property
    def claim(self) -> str:
        """exact, or the order of the limit."""
        return "exact" if self.kind == "exact" else f"limit, order {self.order}"

    # -- everything the edge says, with its defaults -------------------------------------------------------------------

    def arguments(self) -> dict[str, sp.Expr]:
        """Every argument of the parent (each share of a repeated one by itself), in the child's."""
        child = {name: dims for name, (dims, _) in signature(self.child_triple).items()}
        given, out = dict(self.substitution), {}
        for name, (dims, _) in signature(self.parent_triple).items():
            default = child.get(name, dims)  # what the child does not know is free
            if name in given:
                out[name] = given.pop(name)
            elif set(default) <= set(dims):
                out[name] = array(name, default)
            else:
                fails = (
                    f"argument {plain(array(name, dims))} has no value: the child's is {plain(array(name, default))}"
                )
                raise UnifyError(self.name, fails, f"substitute {name}")
        if given:
            fails = f"{self.parent_name} has no argument {', '.join(given)}"
            raise UnifyError(self.name, fails, f"it takes {', '.join(out)}")
        return out

    def states(self) -> dict[str, sp.Expr]:
        """Every state of the parent, in the child's."""
        child = {s.name: s.dims for s in derive(self.child_triple).states}
        given, out = dict(self.relation), {}
        for s in derive(self.parent_triple).states:
            if s.name not in given and child.get(s.name) != s.dims:
                raise UnifyError(self.name, f"state {s.name} has no value", f"relate it to {', '.join(child)}")
            out[s.name] = given.pop(s.name) if s.name in given else array(s.name, s.dims)
        if given:
            fails = f"{self.parent_name} has no state {', '.join(given)}"
            raise UnifyError(self.name, fails, f"it has {', '.join(out)}")
        return out

    def free(self) -> dict[str, tuple[tuple, str]]:
        """Free parameters, whose value does not matter: name -> (indices, "token" or "static")."""
        known = {*signature(self.child_triple), *(s.name for s in derive(self.child_triple).states)}
        known |= {"alpha", "alpha_importance", "g", "eps", "scale"}
        mine, out = signature(self.parent_triple), {}
        said = [*self.arguments().values(), *dict(self.restrict).values(), self.output, self.variance or sp.S.One]
        for x in sorted(set().union(*map(arrays, said)), key=str):
            if name_of(x) not in known:
                dims = tuple(x.indices) if isinstance(x, sp.Indexed) else ()
                out[name_of(x)] = mine.get(name_of(x), (dims, "token"))
        return out

    # -- printing ------------------------------------------------------------------------------------------------------

    def conditions(self) -> list[str]:
        """What the edge asks for: a hyperparameter, restricted arguments, properties of the keys, a domain."""
        said = [] if self.instance is None else [_changed(self.instance, _triple(self.parent))]
        child = signature(self.child_triple)
        said += [f"the child's {plain(array(name, child[name][0]))} = {plain(x)}" for name, x in self.restrict]
        return [*said, *map(str, self.assumptions), *self.domain]

    def rows(self) -> list[tuple[str, sp.Expr, sp.Expr]]:
        """(argument or state, left, right) of everything but identities of arguments."""
        mine = {name: array(name, dims) for name, (dims, _) in signature(self.parent_triple).items()}
        held = {s.name: array(s.name, s.dims) for s in derive(self.parent_triple).states}
        rows = [("argument", mine[name], x) for name, x in self.arguments().items() if x != mine[name]]
        return rows + [("state", held[name], x) for name, x in self.states().items()]

    def __str__(self):
        lines = [f"{self.name} ({self.claim}){'  new' if self.new else ''}", f"  {self.why}"]
        lines += [f"  {'with':<10}{x}" for x in self.conditions()]
        lines += [f"  {kind:<10}{plain(left)} = {plain(right)}" for kind, left, right in self.rows()]
        lines += [f"  {'output':<10}times {plain(self.output)}"] if self.output != 1 else []
        lines += [f"  {'bound':<10}theorem: {self.theorem}"] if self.theorem else []
        return "\n".join(lines)

    def latex(self) -> str:
        """The substitution, the relation and the output factor as an aligned LaTeX block."""
        rows = [f"{tex(left)} &= {tex(right)}" for _, left, right in self.rows()]
        rows += [rf"o_{{\text{{child}}}} &= {tex(self.output)} \, o_{{\text{{parent}}}}"] if self.output != 1 else []
        return aligned(rows)


@lru_cache(maxsize=512)
def signature(triple: Triple) -> dict[str, tuple[tuple, str]]:
    """A triple's arguments as its program names them: name -> (indices, "token" or "static")."""
    out = {}
    for x in derive(triple).inputs:
        shares = range(2, triple.architecture.repeats + 1) if x.per == "observation" else ()
        for name in (x.name, *(f"{x.name}_{n}" for n in shares)):
            out[name] = (x.dims, "static" if x.per == "static" else "token")
    return out


def _triple(x: str | Triple) -> Triple:
    return x if isinstance(x, Triple) else get(x).triple


def _name(x: str | Triple, title: str) -> str:
    return x if isinstance(x, str) else zoo_name(x) or title or "a triple"


def _changed(new: Triple, old: Triple) -> str:
    """The fields in which two triples differ, in words."""
    legs = [(getattr(new, leg), getattr(old, leg)) for leg in ("architecture", "posterior", "prior")]
    pairs = [(name, value, vars(y)[name]) for x, y in legs for name, value in vars(x).items()]
    return ", ".join(f"{name} = {value}" for name, value, before in pairs if value != before)


# --- LaTeX of identities that hold at every token ---------------------------------------------------------------------


class _Timeless(frozenset):
    """Every name: none of them carries a time."""

    def __contains__(self, name):
        return True


class _Tex(Latex):
    """LaTeX without times, with eps and the E_X."""

    def name(self, name: str, at: tuple) -> str:
        where = "".join(map(str, at))
        if name.startswith(ANYTHING):
            return rf"E^{{{super().name(name.removeprefix(ANYTHING), ())}}}" + (f"_{{{where}}}" if at else "")
        if name.startswith("eps"):
            return r"\varepsilon" + (f"_{{{name[4:]}}}" if name[4:] else "")
        return super().name(name, at)


def tex(expr: sp.Expr) -> str:
    """LaTeX of an expression of an edge; a state is the one before the token."""
    return _Tex(_Timeless())(expr).replace("_{t-1}", "").replace("t-1,", "")


def aligned(rows: list[str]) -> str:
    """Rows with an & each as one LaTeX block."""
    return "\\begin{aligned}\n" + " \\\\\n".join(rows) + "\n\\end{aligned}"
