"""How a mixer's own code comes to call our operator: its methods are read, and only the operator's name is exchanged.

A library's mixer projects, convolves and normalises in ways of its own (grouped norms, interleaved projections, odd
epsilons) and hands the result to an operator, a function with a name such as `chunk_gla`. `graft` makes a subclass whose
methods are the mixer's, line by line, except that a call `operator(...)` is `self.operator(..., seen=x)`: a method of the
adapter, which is also told what the mixer's input projection read. Nothing of the library is patched; a mixer whose class
is set back is as it was.
"""

from __future__ import annotations
import __future__

import ast
import dis
import inspect
import textwrap
from collections.abc import Iterable
from functools import cache
from types import FunctionType

from unify.errors import UnifyError

SEEN = "_unify_seen"  # the local variable that holds what the input projection read


@cache
def calls(function: FunctionType) -> frozenset[str]:
    """Names of its module that a function uses."""
    return frozenset(x.argval for x in dis.get_instructions(inspect.unwrap(function)) if x.opname == "LOAD_GLOBAL")


def methods(cls: type) -> dict[str, FunctionType]:
    """The plain methods of a class and its bases, the nearest of each name."""
    found = {}
    for base in reversed(cls.__mro__):
        found |= {name: f for name, f in vars(base).items() if isinstance(f, FunctionType)}
    return found


class _Reroute(ast.NodeTransformer):
    """operator(a) -> self.operator(a, seen=x), self.projection(h) -> self.projection(x := h)."""

    def __init__(self, operators: Iterable[str], projections: Iterable[str]):
        self.operators, self.projections, self.seen = set(operators), set(projections), False

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        match node.func:
            case ast.Name(id=name) if name in self.operators:
                node.func = ast.Attribute(ast.Name("self", ast.Load()), name, ast.Load())
                node.keywords.append(ast.keyword("seen", ast.Name(SEEN, ast.Load())))
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in self.projections and node.args:
                node.args[0] = ast.NamedExpr(ast.Name(SEEN, ast.Store()), node.args[0])
                self.seen = True
        return node


def rerouted(function: FunctionType, operators: Iterable[str], projections: Iterable[str]) -> FunctionType:
    """The same function with its operator exchanged, in the same module: what it looks up there it still finds there.

    Raises UnifyError where the source is not at hand, or where no input projection is called.
    """
    plain = inspect.unwrap(function)
    where = f"{plain.__module__}.{plain.__qualname__}"
    try:
        lines, first = inspect.getsourcelines(plain)
    except OSError as error:
        raise UnifyError(
            where, f"its source cannot be read ({error})", "install the library with its sources"
        ) from error
    tree = ast.parse(textwrap.dedent("".join(lines)))
    change = _Reroute(operators, projections)
    tree = ast.increment_lineno(ast.fix_missing_locations(change.visit(tree)), first - 1)
    if not change.seen:
        raise UnifyError(
            where,
            f"it calls an operator and none of the projections {', '.join(projections)}",
            "a mixer that projects its input itself",
        )
    made: dict = {}
    flags = plain.__code__.co_flags & __future__.annotations.compiler_flag
    exec(compile(tree, inspect.getsourcefile(plain), "exec", flags, True), plain.__globals__, made)
    return made[plain.__name__]


def graft(cls: type, adapter: type, operators: tuple[str, ...], projections: tuple[str, ...], more: dict) -> type:
    """A subclass of a mixer's class that calls the adapter's operators. more: what else the class holds."""
    changed = {
        name: rerouted(f, operators, projections)
        for name, f in methods(cls).items()
        if name not in vars(adapter) and calls(f) & set(operators)
    }
    named = {"__module__": cls.__module__, "__qualname__": f"Metaplastic{cls.__qualname__}", "__doc__": cls.__doc__}
    return type(f"Metaplastic{cls.__name__}", (adapter, cls), {**changed, **named, **more})
