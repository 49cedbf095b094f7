"""Paths through the map: prove(parent, child) finds one, proves its edges and composes their substitutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import count

import sympy as sp

from unify.derivations.algebra import EPS
from unify.derivations.edge import ANYTHING, Edge, aligned, signature, tex
from unify.derivations.edges import all_edges
from unify.derivations.limit import Proof, at, prove_edge, untold
from unify.derive import derive
from unify.errors import UnifyError
from unify.models.zoo import ZOO, get
from unify.notation import plain
from unify.symbols import array, arrays, name_of, put


@dataclass(frozen=True)
class Path:
    """Edges one after the other, composed.

    arguments: the first parent's arguments in the last child's. output: what its output is multiplied with.
    free: free parameters in them, with their indices; one whose name comes up again is renamed.
    """

    edges: tuple[Edge, ...]
    arguments: tuple[tuple[str, sp.Expr], ...]
    output: sp.Expr
    free: tuple[tuple[str, tuple], ...]

    @property
    def limits(self) -> tuple[Edge, ...]:
        """The limit edges, in the order their limits are taken."""
        return tuple(e for e in self.edges if e.kind == "limit")

    @property
    def cost(self) -> tuple[int, int, int]:
        """What a shorter path has less of: edges that ask for special keys, limits, edges."""
        return sum(bool(e.assumptions or e.restrict) for e in self.edges), len(self.limits), len(self.edges)

    def extended(self, edge: Edge, eps: sp.Symbol = EPS) -> Path | None:
        """This path and one more edge; None where what is composed is not finite (it divides by what is set to 0)."""
        dims = {name: d for name, (d, _) in signature(edge.parent_triple).items()}
        dims |= {s.name: s.dims for s in derive(edge.parent_triple).states}
        said = {**edge.states(), **edge.arguments()}
        values = {name: at(expr.xreplace({EPS: eps}), dims[name]) for name, expr in said.items()}
        coming = edge.free()
        clash = {name: d for name, d in self.free if name in coming or name in signature(edge.child_triple)}
        apart = {name: at(array(name + "_again", d), d) for name, d in clash.items()}
        told = lambda expr: put(put(untold(expr), **apart), **values)  # noqa: E731
        arguments = tuple((name, told(expr)) for name, expr in self.arguments)
        output = told(self.output) * edge.output.xreplace({EPS: eps})
        if any(x.has(sp.zoo, sp.nan, sp.oo) for x in (output, *(expr for _, expr in arguments))):
            return None
        free = [(name + "_again" if name in clash else name, d) for name, d in self.free]
        free += [(name, d) for name, (d, _) in coming.items()]
        return Path((*self.edges, edge), arguments, output, tuple(free))


def whole(name: str) -> Path:
    """The path of no edges: a model's arguments are its own."""
    arguments = tuple((x, array(x, dims)) for x, (dims, _) in signature(get(name).triple).items())
    return Path((), arguments, sp.S.One, ())


def composed(edges: Sequence[Edge]) -> Path | None:
    """Edges that follow one another, as a path; each of several limits has a parameter of its own: eps_1, eps_2 ..."""
    path, n, many = whole(edges[0].parent_name), 0, sum(e.kind == "limit" for e in edges) > 1
    for edge in edges:
        n += edge.kind == "limit"
        path = path and path.extended(edge, sp.Symbol(f"eps_{n}", positive=True) if many else EPS)
    return path


@dataclass(frozen=True)
class Chain:
    """A proved path."""

    path: Path
    proofs: tuple[Proof, ...]

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The edges, from the parent to the child."""
        return self.path.edges

    @property
    def substitution(self) -> dict[str, sp.Expr]:
        """The parent's arguments in the child's; a limit's parameter is eps, or eps_1, eps_2 ... of several."""
        return dict(self.path.arguments)

    @property
    def output(self) -> sp.Expr:
        """What the parent's output is multiplied with to be the child's."""
        return self.path.output

    @property
    def orders(self) -> tuple[int, ...]:
        """The order of each limit, in the order in which the limits are taken; empty where the chain is exact."""
        return tuple(e.order for e in self.path.limits)

    @property
    def claim(self) -> str:
        """exact, or the order, in words."""
        if not self.orders:
            return "exact"
        if len(self.orders) == 1:
            return f"limit, order {self.orders[0]}"
        return "limits taken one after the other: " + ", then ".join(
            f"order {p} in eps_{n}" for n, p in enumerate(self.orders, 1)
        )

    @property
    def conditions(self) -> tuple[str, ...]:
        """What its edges ask for."""
        return tuple(f"{e.parent_name} -> {e.child_name}: {x}" for e in self.edges for x in e.conditions())

    def _rows(self) -> list[tuple[sp.Expr, sp.Expr]]:
        dims = {name: d for name, (d, _) in signature(self.edges[0].parent_triple).items()}
        return [(array(name, dims[name]), expr) for name, expr in self.path.arguments]

    def __str__(self):
        names = [self.edges[0].parent_name, *(e.child_name for e in self.edges)]
        lines = [f"{' -> '.join(names)} ({self.claim})"]
        lines += [f"  {e.parent_name} -> {e.child_name} ({e.claim}): {e.why}" for e in self.edges]
        lines += [f"  {'with':<10}{x}" for x in self.conditions]
        lines += [f"  {'argument':<10}{plain(left)} = {plain(right)}" for left, right in self._rows() if left != right]
        lines += [f"  {'output':<10}times {plain(self.output)}"] if self.output != 1 else []
        total = sum(len(x.obligations) for x in self.proofs)
        return "\n".join([*lines, f"  {'proved':<10}{total} obligations, each reduced to 0, for all K, V"])

    def latex(self) -> str:
        """The composed substitution as an aligned LaTeX block."""
        return aligned([f"{tex(left)} &= {tex(right)}" for left, right in self._rows()])


@lru_cache(maxsize=256)
def prove(parent: str, child: str) -> Chain:
    """Find a path parent -> ... -> child, prove each of its edges and compose them.

    Of all paths the one with the fewest edges that ask for special keys, then the fewest limits, then the fewest edges.
    Raises UnifyError where there is no path, naming what the parent does reach.
    """
    start, goal = get(parent).name, get(child).name
    reached, path = _search(start, goal)
    if path is None:
        fails = "a model is itself without a proof" if start == goal else "no path of edges leads from one to the other"
        near = ", ".join(reached[:6]) or "nothing"
        works = f"{start} reaches {near}; `python -m unify.derivations` prints the map"
        raise UnifyError(f"prove({parent!r}, {child!r})", fails, works)
    return Chain(path, tuple(prove_edge(e) for e in path.edges))


def _search(start: str, goal: str) -> tuple[list[str], Path | None]:
    """Dijkstra over the zoo: what is reached, nearest first, and the cheapest path to the goal."""
    tick, reached = count(), []
    queue = [((0, 0, 0), next(tick), start, whole(start))]
    while queue:
        _, _, node, path = heappop(queue)
        if node in reached:
            continue
        reached.append(node)
        if node == goal and path.edges:
            return reached[1:], composed(path.edges)
        for edge in (e for e in all_edges() if e.parent_name == node and e.child_name in ZOO and _joins(path, e)):
            longer = path.extended(edge)
            if longer is not None:
                heappush(queue, (longer.cost, next(tick), edge.child_name, longer))
    return reached[1:], None


def _joins(path: Path, edge: Edge) -> bool:
    """Whether an edge may come next.

    What an edge restricts its child to ends a path; a hyperparameter can be set on the first model only; and a gate
    that was computed from a state would see what a limit leaves open of it.
    """
    if not path.edges:
        return True
    if path.edges[-1].restrict or edge.instance is not None:
        return False
    names = {name_of(x) for _, expr in path.arguments for x in arrays(expr)}
    left_open = {name for name, expr in edge.relation if any(name_of(x).startswith(ANYTHING) for x in arrays(expr))}
    return not names & left_open
