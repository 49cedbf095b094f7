"""The map of models with its proofs: which model is a special case, or a limit, of which.

from unify.derivations import prove
print(prove("palimpsa", "linear_attention"))

`all_edges()` is the map, `prove_edge` proves one edge and `prove` a path; `forgetting_dominates()` is a theorem.
Nothing is proved, or derived, before it is asked for.
"""

from unify.derivations.bound import THEOREMS, Theorem, forgetting_bound, forgetting_dominates, window_ratio
from unify.derivations.chain import Chain, Path, composed, prove
from unify.derivations.edges import SOURCES, all_edges, map_nodes_and_edges, metaplastic_edge
from unify.derivations.limit import ONE_HOT, UNIT, Assumption, Edge, Obligation, Proof, anything, prove_edge

__all__ = [
    "Edge",
    "Assumption",
    "ONE_HOT",
    "UNIT",
    "anything",
    "Proof",
    "Obligation",
    "prove_edge",
    "all_edges",
    "metaplastic_edge",
    "SOURCES",
    "map_nodes_and_edges",
    "Path",
    "Chain",
    "composed",
    "prove",
    "Theorem",
    "THEOREMS",
    "forgetting_dominates",
    "forgetting_bound",
    "window_ratio",
]
