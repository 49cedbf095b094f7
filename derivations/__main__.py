"""Print the map, prove it, or prove one path through it.

python -m unify.derivations                                 the map
python -m unify.derivations --prove                         the map and a proof of every edge and theorem
python -m unify.derivations palimpsa linear_attention       one path, proved (--full: every obligation)
"""

from __future__ import annotations

import argparse
import sys
from time import perf_counter

from unify.derivations.bound import THEOREMS
from unify.derivations.chain import prove
from unify.derivations.edges import all_edges
from unify.derivations.limit import Edge, prove_edge
from unify.errors import UnifyError


def line(edge: Edge) -> str:
    """One edge on one line: what, how, under which conditions, why."""
    conditions = "".join(f" [{x}]" for x in edge.conditions())
    return f"{edge.name:<52} {edge.claim:<15} {'new' if edge.new else '':<4}{edge.why}{conditions}"


def prove_all(full: bool) -> None:
    """Prove every edge and theorem, one line each."""
    begin = perf_counter()
    for edge in all_edges():
        start = perf_counter()
        proof = prove_edge(edge)
        seconds = perf_counter() - start
        print(
            proof if full else f"{line(edge)}\n    {len(proof.obligations)} obligations, {proof.scope}, {seconds:.1f} s"
        )
    for theorem in THEOREMS.values():
        print(theorem().prove())
    print(f"{len(all_edges())} edges and {len(THEOREMS)} theorem proved in {perf_counter() - begin:.0f} s")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m unify.derivations", description="The map of models and its proofs."
    )
    parser.add_argument("parent", nargs="?", help="a model of the zoo")
    parser.add_argument("child", nargs="?", help="what it is to become")
    parser.add_argument("--prove", action="store_true", help="prove every edge of the map")
    parser.add_argument("--full", action="store_true", help="print every obligation")
    given = parser.parse_args(arguments)
    if given.parent and not given.child:
        parser.error("a path needs a parent and a child")
    try:
        if given.parent:
            chain = prove(given.parent, given.child)
            print("\n\n".join(map(str, (chain, *chain.proofs))) if given.full else chain)
        elif given.prove:
            prove_all(given.full)
        else:
            print("\n".join(map(line, all_edges())))
    except UnifyError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
