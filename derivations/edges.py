"""The map: one entry an edge. Which model is a special case, or a limit, of which, and by what substitution.

Nothing is proved here; `prove_edge` proves an entry, and `python -m unify.derivations --prove` proves them all.
The index j runs over key channels, i over value channels; alpha = exp(g) is what a token keeps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import sympy as sp

from unify.derivations.algebra import EPS
from unify.derivations.edge import ONE_HOT, UNIT, Edge, anything
from unify.draw import MapEdge, MapNode
from unify.energy import GATE_DIMS, prior_mean, prior_precision
from unify.errors import UnifyError
from unify.models.zoo import ZOO, get
from unify.models.zoo import name_of as zoo_name
from unify.symbols import array, contract, i, j, l, symbol
from unify.triple import Prior, Squash, Triple

alpha, beta, I_p, importance = (symbol(name) for name in ("alpha", "beta", "prior_precision", "importance"))
alpha_j, q, k, p, erase = (array(name, (j,)) for name in ("alpha", "q", "k", "p", "erase"))
v, write, b = (array(name, (i,)) for name in ("v", "write", "importance"))
S, M, Ibar = (array(name, (j, i)) for name in ("S", "M", "Ibar"))
Ibar_j = array("Ibar", (j,))
kk = contract(array("k", (l,)) ** 2, l)
WEAK = {"beta": EPS, "v": v / EPS}
NEAR = {"S": S + EPS * anything("S", (j, i))}
SHORT, INFORMED = "beta k.k < 1", "importance > 0"


def exact(parent: str | Triple, child: str | Triple, why: str, *, variance=sp.S.One, **rest) -> Edge:
    """An exact edge; the variances agree unless it says otherwise."""
    return Edge(parent, child, "exact", why, variance=variance, **rest)


def limit(parent: str | Triple, child: str | Triple, why: str, *, order: int = 1, **rest) -> Edge:
    """A limit edge, of order 1 unless it says otherwise."""
    return Edge(parent, child, "limit", why, order=order, **rest)


# --- fixed plasticity -------------------------------------------------------------------------------------------------


def _fixed() -> list[Edge]:
    """The same decayed sum with fewer gates."""
    tau = array("temperature", (j,))
    z, x = sp.Symbol("Z", positive=True), sp.Symbol("x", real=True)
    return [
        exact("mamba2", "retnet", "a decay fixed per head is a decay that does not look at the token"),
        exact("retnet", "linear_attention", "nothing is forgotten", substitution={"g": 0}),
        exact("retnet", "lightning", "Lightning is RetNet's recurrence; its keys are not rotated", new=True),
        exact("gla", "mamba2", "alpha shared by the key channels"),
        exact("gla", "hgrn2", "the key is what the decay leaves free", substitution={"k": 1 - alpha_j}),
        exact(
            "gla",
            "rodimus",
            "its selection is a reparametrisation of GLA's key, not a new recurrence",
            substitution={"k": k * (-sp.log(alpha_j) / tau) ** tau},
            new=True,
        ),
        exact(
            "hgrn2",
            "lightnet",
            "LightNet's running logsumexp z = log(Z + e^x) is HGRN2's tied gate: one recurrence, published twice",
            lemmas=(
                (
                    "with g = log Z - z, the key e^(x - z) is 1 - e^g",
                    sp.exp(x) / (z + sp.exp(x)),
                    1 - z / (z + sp.exp(x)),
                ),
            ),
            new=True,
        ),
        exact(
            "rwkv6",
            "linear_attention",
            "a bonus of 1 adds what reading before the update leaves out",
            substitution={"g": 0, "bonus": 1},
        ),
        exact(
            "rwkv6",
            "retnet",
            "a bonus 1 / alpha turns reading before into reading after: the order is no choice of its own",
            substitution={"q": alpha * q, "bonus": 1 / alpha},
            variance=None,
            new=True,
        ),
    ]


# --- delta rules ------------------------------------------------------------------------------------------------------


def _delta() -> list[Edge]:
    """Fewer gates, other read keys, and the way to additive memories."""
    fades = "a weak write of a large value has nothing left to erase: beta = eps with beta v fixed"
    weak = {"substitution": WEAK, "relation": NEAR, "variance": 1}
    return [
        exact("kda", "gated_deltanet", "alpha shared by the key channels"),
        exact("gated_deltanet", "deltanet", "nothing is forgotten", substitution={"g": 0}),
        limit("gated_deltanet", "mamba2", fades, **weak),
        limit("kda", "gla", f"{fades}; the decay's shape does not enter", **weak, new=True),
        limit("deltanet", "linear_attention", f"{fades}; nor does forgetting", **weak, new=True),
        exact(
            "gated_deltanet2",
            "kda",
            "erase and write gates that are both beta",
            substitution={"erase": beta, "write": beta},
        ),
        exact("gated_deltanet2", "gla", "no erasure, a full write", substitution={"erase": 0, "write": 1}),
        exact("comba", "gated_deltanet", "p = alpha k reads what forgetting leaves", substitution={"p": alpha * k}),
        exact("comba", "mamba2", "p = 0 reads nothing, so nothing is erased", substitution={"p": 0, "beta": 1}),
        exact(
            "comba",
            "comba_decayed",
            "Comba's two meanings in public code are one model, with read keys that differ by alpha",
            substitution={"p": alpha * p},
            new=True,
        ),
        exact(
            "comba_decayed",
            "gated_deltanet",
            "Comba is a Gated DeltaNet whose read and write keys have come apart",
            substitution={"p": k},
            new=True,
        ),
        exact(
            "comba_decayed",
            "mamba2",
            "a read key leads from Gated DeltaNet to Mamba-2 exactly, where beta does so only in a limit",
            substitution={"p": 0, "beta": 1},
            new=True,
        ),
        exact("gated_deltaproduct", "gated_deltanet", "one observation per token", instance=_once()),
        exact(
            "gated_deltaproduct",
            "gated_deltanet",
            "a key that is zero observes nothing: n observations hold every smaller number",
            substitution={"k_2": sp.S.Zero},
            new=True,
        ),
        *_preconditioned(),
        *_dplr(),
    ]


def _once() -> Triple:
    triple = get("gated_deltaproduct").triple
    return replace(triple, architecture=replace(triple.architecture, repeats=1))


def _preconditioned() -> list[Edge]:
    """A squash of base 1 is flat: the prior precision is 1, whatever the keys' second moment A."""
    flat = lambda name: replace(get(name).triple, prior=Prior(adaptive=Squash(base=1.0)))  # noqa: E731
    loose = {"A": anything("A", (j,))}
    why = "a squash of base 1 is flat, so the keys' second moment no longer matters"
    gdn, kda = "preconditioned_gdn", "preconditioned_kda"
    return [
        exact(gdn, "gated_deltanet", why, instance=flat(gdn), relation=loose),
        exact(kda, "kda", f"{why}: it is all that differs from KDA", instance=flat(kda), relation=loose, new=True),
        exact(kda, gdn, "preconditioning and the decay's shape are independent choices", new=True),
    ]


def _dplr() -> list[Edge]:
    """Diagonal plus rank one: every delta rule is an erasure and a write."""
    before, decayed = I_p + Ibar_j, I_p + alpha_j * Ibar_j
    after, kept = decayed + importance * k**2, alpha_j * before / decayed
    certainty, noise = array("Lambda", (j,)), array("noise", (j,))
    spread = alpha_j**2 / certainty + noise
    gain = beta * spread * k / (1 + beta * contract((spread * k**2).subs(j, l), l))
    return [
        exact(
            "rwkv7",
            "kda",
            "erase along -beta k what alpha k reads",
            substitution={"a": alpha_j * k, "b": -beta * k, "v": beta * v},
        ),
        exact(
            "rwkv7", "comba", "erase along -beta k what p reads", substitution={"a": p, "b": -beta * k, "v": beta * v}
        ),
        exact("rwkv7", "gla", "b = 0 erases nothing", substitution={"b": 0}),
        exact(
            "rwkv7",
            "gated_deltanet2",
            "GDN-2's erase and write gates are DPLR's two vectors",
            substitution={"a": alpha_j * erase * k, "b": -k, "v": write * v},
            new=True,
        ),
        exact(
            "rwkv7",
            "meta_kda",
            "a metaplastic delta rule is DPLR with gates computed from an importance that never looks at the memory: "
            "its chunked form is DPLR's",
            substitution={"g": sp.log(kept), "a": kept * k, "b": -beta * k / after, "k": k / after, "v": beta * v},
            variance=None,
            new=True,
        ),
        exact(
            "rwkv7",
            "kdn",
            "so is a Kalman filter with a diagonal covariance: DPLR with a Kalman gain for its keys",
            substitution={"a": alpha_j * k, "b": -gain, "k": gain},
            variance=None,
            new=True,
        ),
    ]


# --- exact solves -----------------------------------------------------------------------------------------------------


def _solve() -> list[Edge]:
    """Exact Bayes: where its matrix is diagonal, and where it does not matter."""
    return [
        exact(
            "longhorn",
            "deltanet",
            "the implicit step is DeltaNet's with beta / (1 + beta k.k), not only in a limit",
            substitution={"beta": beta / (1 - beta * kk)},
            domain=(SHORT,),
            new=True,
        ),
        limit(
            "longhorn",
            "deltanet",
            "at equal beta the relative step differs by beta k.k",
            restrict={"beta": EPS * beta, "v": v / EPS},
            relation=NEAR,
        ),
        *_one_hot(),
        limit(
            "mesanet",
            "mamba2",
            "a strong prior leaves nothing to solve: lambda = 1/eps, output times lambda",
            substitution={"prior_precision": 1 / EPS, "beta": 1},
            relation={"M": S, "P": anything("P", (j, l))},
            output=1 / EPS,
        ),
        limit(
            "mesanet",
            "mamba2",
            "little information leaves the prior's matrix, whatever lambda is; the query times lambda undoes it",
            substitution={**WEAK, "q": array("prior_precision", (j,)) * q},
            relation={"M": S, "P": EPS * anything("P", (j, l))},
            new=True,
        ),
        exact(
            "gated_kalmanet",
            "mamba2",
            "a read that mixes nothing in never solves: the gate is a dial from Mamba-2 to ridge regression",
            substitution={"mix": 0, "beta": 1},
            relation={"M": S, "P": anything("P", (j, l))},
            variance=None,
            domain=("the first key is not 0",),
            new=True,
        ),
    ]


def _one_hot() -> list[Edge]:
    """For one-hot keys the exact precision is diagonal."""
    diagonal = sp.KroneckerDelta(j, l) * Ibar_j
    return [
        exact(
            "mesanet",
            "palimpsa",
            "for one-hot keys Palimpsa is exact Bayes; b is shared, because MesaNet has one beta for all rows",
            substitution={"beta": beta, "v": v / beta},
            relation={"P": sp.KroneckerDelta(j, l) * Ibar},
            restrict={"importance": beta},
            assumptions=(ONE_HOT,),
            domain=(INFORMED,),
        ),
        exact(
            "mesanet",
            "palimpsa_key",
            "for one-hot keys Palimpsa-key is exact Bayes: all it gives up are products of two key channels",
            substitution={"beta": importance, "v": v / importance},
            relation={"P": diagonal},
            assumptions=(ONE_HOT,),
            domain=(INFORMED,),
            new=True,
        ),
        exact(
            "mesanet",
            "mean_field_delta",
            "for one-hot keys mean-field Bayes loses nothing either",
            relation={"M": (I_p + Ibar_j) * S, "P": diagonal},
            assumptions=(ONE_HOT,),
            new=True,
        ),
        exact(
            "meta_gdn",
            "mean_field_delta",
            "for one-hot keys, and one gate for writing and importance, the cheap update is true mean-field Bayes",
            substitution={"importance": beta},
            assumptions=(ONE_HOT,),
            new=True,
        ),
    ]


# --- Kalman filters ---------------------------------------------------------------------------------------------------


def _kalman() -> list[Edge]:
    """A drift that stands for a power prior, and information that fades."""
    before, decayed = I_p + Ibar_j, I_p + alpha * Ibar_j
    return [
        exact(
            "kla",
            "meta_linear_attention",
            "neither decay nor diffusion is Palimpsa at alpha = 1; KLA starts at 1, so b and M count in units of I_p",
            substitution={"g": 0, "noise": 0, "beta": b / I_p, "v": v / b},
            relation={"M": M / I_p, "Lambda": 1 + Ibar / I_p},
            variance=1 / I_p,
            domain=(INFORMED,),
        ),
        limit(
            "kla",
            "retnet",
            "a stationary prior, w = 1 - a^2, and little information: a Kalman filter then forgets as RetNet does",
            substitution={**WEAK, "noise": 1 - alpha**2},
            relation={"M": S + EPS * anything("M", (j, i)), "Lambda": 1 + EPS * anything("Lambda", (j, i))},
            variance=1,
            new=True,
        ),
        *_pinned(),
        exact(
            "kdn",
            "mean_field_delta",
            "a power prior is a diffusion whose decay and noise follow the certainty: two ways to forget, one filter "
            "(at alpha = 1 they are a = 1, w = 0)",
            substitution={
                "g": sp.log(alpha * before / decayed),
                "noise": (1 - alpha) * (alpha * before + I_p) / decayed**2,
                "gain": 1,
            },
            relation={"Lambda": before},
            new=True,
        ),
        limit(
            "mean_field_delta",
            "mamba2",
            "little information leaves the prior's precision",
            substitution=WEAK,
            relation={"S": S / I_p + EPS * anything("S", (j, i)), "Ibar": EPS * anything("Ibar", (j,))},
            output=I_p,
            variance=I_p,
            new=True,
        ),
    ]


def _pinned() -> list[Edge]:
    """KDN with its covariance held at the prior's: w = (1 - a^2) / I_p, and no information kept."""
    stationary = (1 - alpha_j**2) / I_p
    pinned = {"noise": stationary, "gain": 0}
    r = (1 - beta) / beta
    return [
        exact(
            "kdn",
            "kda",
            "the covariance pinned at the prior's, no information kept, unit keys",
            substitution={**pinned, "beta": I_p * beta / (1 - beta)},
            relation={"Lambda": I_p},
            variance=I_p,
            assumptions=(UNIT,),
            domain=("beta < 1",),
            lemmas=(("at I_p = 1 KDA's beta is 1 / (1 + r), r = 1 / KDN's beta", beta, 1 / (1 + r)),),
        ),
        exact(
            "kdn",
            "kda",
            "the same for keys of any length: KDA is a Kalman filter in its steady state",
            substitution={**pinned, "beta": I_p * beta / (1 - beta * kk)},
            relation={"Lambda": I_p},
            variance=I_p,
            domain=(SHORT,),
            new=True,
        ),
        exact(
            "kdn",
            "longhorn",
            "Longhorn is the Kalman filter that forgets how certain it has become, and nothing else",
            substitution={"g": 0, "noise": 0, "gain": 0, "prior_precision": 1},
            relation={"Lambda": 1},
            new=True,
        ),
        limit(
            "kdn",
            "gla",
            "little information and a stationary prior: the Kalman filter fades into GLA as KDA does",
            substitution={**WEAK, "noise": stationary},
            relation={
                "S": S / I_p + EPS * anything("S", (j, i)),
                "Lambda": I_p + EPS * anything("Lambda", (j,)),
            },
            output=I_p,
            variance=I_p,
            new=True,
        ),
    ]


# --- metaplastic models -----------------------------------------------------------------------------------------------


def _metaplastic() -> list[Edge]:
    """Palimpsa, its relatives, and what they become."""
    return [
        limit(
            "palimpsa",
            "mamba2",
            "forgetting dominates: b k^2 is a share eps of what forgetting hands back to the prior, (1 - alpha) I_p, "
            "so the importance stays below eps I_p for any number of tokens",
            substitution={"importance": EPS * (1 - alpha) * I_p * b},
            relation={"M": S, "Ibar": EPS * I_p * anything("Ibar", (j, i))},
            output=I_p,
            variance=I_p,
            theorem="forgetting dominates",
        ),
        limit(
            "palimpsa",
            "mamba2",
            "a strong prior: I_p = 1/eps, output times I_p",
            substitution={"prior_precision": 1 / EPS},
            relation={"M": S, "Ibar": anything("Ibar", (j, i))},
            output=1 / EPS,
        ),
        exact(
            "palimpsa",
            "palimpsa_key",
            "b shared by the rows",
            substitution={"importance": importance},
            relation={"Ibar": Ibar_j},
        ),
        exact("meta_gla", "palimpsa", "alpha shared by the key channels"),
        *_gates(),
        *_gauges(),
        limit(
            "meta_gdn",
            "gated_deltanet",
            "a strong prior, with beta in its units: memories too rigid to differ all learn at one rate",
            substitution={"prior_precision": 1 / EPS, "beta": beta / EPS},
            relation={**NEAR, "Ibar": anything("Ibar", (j,))},
            new=True,
        ),
    ]


def _gates() -> list[Edge]:
    """The same gates fall away with importance as without: forgetting and metaplasticity are independent choices."""
    why = "forgetting and metaplasticity are independent choices:"
    return [
        exact("meta_gla", "meta_hgrn2", f"{why} k = 1 - alpha", substitution={"k": 1 - alpha_j}, new=True),
        exact("palimpsa", "meta_retnet", f"{why} a decay fixed per head", new=True),
        exact("meta_retnet", "meta_linear_attention", f"{why} no decay", substitution={"g": 0}, new=True),
        exact("meta_kda", "meta_gdn", f"{why} alpha shared by the key channels", new=True),
        exact("meta_gdn", "meta_deltanet", f"{why} no decay", substitution={"g": 0}, new=True),
    ]


def _gauges() -> list[Edge]:
    """Reparametrisations; the ways back close circles and are not drawn."""
    after = I_p + alpha * Ibar_j + importance * k**2
    return [
        exact(
            "palimpsa",
            "metamamba2",
            "I_p = 1: the prior is fixed, not learned",
            substitution={"prior_precision": 1},
            new=True,
        ),
        exact(
            "metamamba2",
            "palimpsa",
            "evidence and importance in units of I_p: a prior precision changes the variance's unit only",
            substitution={"v": v / I_p, "importance": b / I_p},
            relation={"M": M / I_p, "Ibar": Ibar / I_p},
            variance=1 / I_p,
            new=True,
            drawn=False,
        ),
        exact(
            "mamba2",
            "palimpsa_key",
            "the query divided by the importance: Palimpsa-key costs what Mamba-2 costs and a scan of K numbers",
            substitution={"q": q / after},
            relation={"S": M},
            variance=None,
            new=True,
            drawn=False,
        ),
    ]


# --- a metaplastic model and its source -------------------------------------------------------------------------------

SOURCES = {
    "palimpsa": "mamba2",
    "metamamba2": "mamba2",
    "palimpsa_key": "mamba2",
    "meta_linear_attention": "linear_attention",
    "meta_retnet": "retnet",
    "meta_gla": "gla",
    "meta_hgrn2": "hgrn2",
    "meta_deltanet": "deltanet",
    "meta_gdn": "gated_deltanet",
    "meta_kda": "kda",
}
"""The zoo's metaplastic models and what they are at importance 0."""


def metaplastic_edge(source: str | Triple, parent: str | Triple | None = None, kind: str = "exact") -> Edge:
    """The edge meta-X -> X of any model with a fixed precision: at importance 0 exact, at importance eps b of order 1.

    source: X, a name or a triple. parent: meta-X; default `Triple.metaplastic()` of the source. It may have a learned
        prior precision I_p where the source has 1: then I_p times the output (with evidence), or I_p beta (in a delta
        rule), is the source's.
    Raises UnifyError where X's precision moves already.
    """
    triple = get(source).triple if isinstance(source, str) else source
    meta = triple.metaplastic() if parent is None else get(parent).triple if isinstance(parent, str) else parent
    natural = set(meta.anchors) == {"prior"}
    learned = prior_precision(triple) != prior_precision(meta)
    if learned and (prior_precision(meta) != I_p or not (natural or triple.architecture.precision == "head")):
        raise UnifyError(
            f"a parent with {meta.prior}", "prior: nothing undoes its precision", "give both the same prior"
        )
    small, shares = kind == "limit", ["", *(f"_{n}" for n in range(2, meta.architecture.repeats + 1))]
    gate = GATE_DIMS[meta.importance]
    substitution = {f"importance{n}": EPS * array(f"importance{n}", gate) if small else sp.S.Zero for n in shares}
    if learned and not natural:
        substitution |= {f"beta{n}": I_p * symbol(f"beta{n}") for n in shares}
    label = get(source).label if isinstance(source, str) else zoo_name(source) or "source"
    return Edge(
        parent or meta,
        source,
        kind,
        f"importance {'eps b: a plasticity that hardly' if small else '0: a plasticity that never'} changes",
        substitution,
        _held(triple, meta, natural, small),
        order=1 if small else None,
        output=I_p if learned and natural else sp.S.One,
        variance=I_p if learned else sp.S.One,
        title=f"meta-{label} -> {label}",
    )


def _held(triple: Triple, meta: Triple, natural: bool, small: bool) -> dict[str, sp.Expr]:
    """Ibar is 0 (or small); the mean state is S, or the natural mean M = Lambda_0 (S - mu_0)."""
    entry = meta.curvature == "diagonal" or triple.architecture.forgetting == "entry"
    ibar = EPS * anything("Ibar", (j, i) if entry else (j,)) if small else sp.S.Zero
    if natural:
        moved = (
            EPS * anything("M", (j, i)) if small and prior_mean(triple) != 0 else 0
        )  # the evidence is weighed against mu_0
        return {"Ibar": ibar, "M": prior_precision(triple) * (S - prior_mean(triple)) + moved}
    return {"Ibar": ibar, **(NEAR if small else {})}


def _plastic() -> list[Edge]:
    """meta-X -> X, for the metaplastic models of the zoo and for every other model with a fixed precision."""
    named = [(source, parent) for parent, source in SOURCES.items()]
    fixed = [m for m in ZOO.values() if m.triple.curvature == "none" and m.triple.prior.adaptive is None]
    rest = [(m.name, None) for m in fixed if m.name not in SOURCES.values()]
    return [metaplastic_edge(source, parent, kind) for source, parent in (*named, *rest) for kind in ("exact", "limit")]


# --- all of it --------------------------------------------------------------------------------------------------------


@cache
def all_edges() -> tuple[Edge, ...]:
    """Every edge of the map."""
    return (*_fixed(), *_delta(), *_solve(), *_kalman(), *_metaplastic(), *_plastic())


def map_nodes_and_edges() -> tuple[list[MapNode], list[MapEdge]]:
    """The map for `unify.draw.draw_map`: the zoo's models, and the edges between them that make no circle."""
    nodes = [MapNode(m.name, m.label, m.family) for m in ZOO.values()]
    drawn = [e for e in all_edges() if e.drawn and e.parent_name in ZOO and e.child_name in ZOO]
    return nodes, [MapEdge(e.parent_name, e.child_name, e.kind, e.order, e.why) for e in drawn]
