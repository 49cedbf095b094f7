"""The map: every edge proved in sympy and measured on tensors, and both seen to fail where an edge is wrong."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unify.testing as testing
from unify import Architecture, Observation, Posterior, Prior, Triple, UnifyError, compile
from unify.derivations import (
    ONE_HOT,
    SOURCES,
    UNIT,
    Edge,
    all_edges,
    anything,
    composed,
    forgetting_bound,
    forgetting_dominates,
    map_nodes_and_edges,
    metaplastic_edge,
    prove,
    prove_edge,
    window_ratio,
)
from unify.derivations.__main__ import main
from unify.derivations.algebra import EPS, cases, expansion, h, leading, normal, remainder
from unify.derivations.bound import Step
from unify.derivations.edge import signature, tex
from unify.derivations.limit import program, solution
from unify.derivations.run import Run, fill
from unify.derivations.run import _number as number
from unify.derive import derive
from unify.draw import layout
from unify.measured import SIZES, Measured, measure
from unify.models.zoo import ZOO, get
from unify.symbols import SIZE, array, contract, i, j, l, symbol

EDGES = all_edges()
NUMBERED = [
    pytest.param(e, id=f"{n}-{e.parent_name}-{e.child_name}-{e.kind}".replace(" ", "_")) for n, e in enumerate(EDGES)
]


def edges(parent, child, kind=None):
    return [e for e in EDGES if (e.parent_name, e.child_name) == (parent, child) and kind in (None, e.kind)]


def the(parent, child, kind=None, **fields):
    (edge,) = [e for e in edges(parent, child, kind) if all(getattr(e, x) == y for x, y in fields.items())]
    return edge


# ---- the map holds what it should ----------------------------------------------------------------------------------

TABLE = """
    palimpsa mamba2 limit|palimpsa palimpsa_key exact|meta_gla palimpsa exact|mamba2 retnet exact
    retnet linear_attention exact|gla mamba2 exact|gla hgrn2 exact|kda gated_deltanet exact
    gated_deltanet deltanet exact|gated_deltanet mamba2 limit|gated_deltanet2 kda exact|gated_deltanet2 gla exact
    comba gated_deltanet exact|comba mamba2 exact|rwkv7 kda exact|rwkv7 comba exact|rwkv7 gla exact
    gated_deltaproduct gated_deltanet exact|mesanet palimpsa exact|mesanet mamba2 limit|longhorn deltanet limit
    kla meta_linear_attention exact|kdn kda exact|rwkv6 linear_attention exact|preconditioned_gdn gated_deltanet exact
"""


@pytest.mark.parametrize("row", [x.split() for x in TABLE.replace("\n", "|").split("|") if x.strip()], ids=" ".join)
def test_the_table_is_on_the_map(row):
    assert [e for e in edges(*row) if not e.new]


def test_palimpsa_becomes_mamba2_in_three_limits_and_at_zero():
    assert len(edges("palimpsa", "mamba2", "limit")) == 3
    assert len(edges("palimpsa", "mamba2", "exact")) == 1


def test_every_fixed_model_has_its_metaplastic_parent():
    fixed = {m.name for m in ZOO.values() if m.triple.curvature == "none" and m.triple.prior.adaptive is None}
    for kind in ("exact", "limit"):
        plastic = [e for e in EDGES if e.kind == kind and any(x.startswith("importance") for x, _ in e.substitution)]
        assert fixed <= {e.child_name for e in plastic if e.why.startswith("importance")}
    assert {m.name for m in ZOO.values() if m.family == "metaplastic"} == set(SOURCES)


def test_new_edges_say_why_they_matter():
    new = [e for e in EDGES if e.new]
    assert len(new) >= 3
    assert all(len(e.why) > 10 for e in new)
    assert len(set(EDGES)) == len(EDGES)


def test_every_model_is_on_the_map_and_it_can_be_drawn():
    nodes, lines = map_nodes_and_edges()
    assert {x for e in lines for x in (e.parent, e.child)} == {n.name for n in nodes} == set(ZOO)
    assert {(e.kind, e.order is None) for e in lines} == {("exact", True), ("limit", False)}
    layout(nodes, lines)  # refuses circles


# ---- proofs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", NUMBERED)
def test_edge_is_proved(edge):
    proof = prove_edge(edge)
    assert all(x.rest == 0 for x in proof.obligations)
    states = derive(edge.parent_triple).states
    assert [x.phase for x in proof.obligations].count("step") == len(states)
    assert proof.scope == "all K, V"
    assert edge.name in str(proof)
    assert str(proof).count("reduced to 0") == len(proof.obligations)


@pytest.mark.parametrize("edge", NUMBERED)
def test_edge_prints_as_latex(edge):
    for text in (edge.latex(), prove_edge(edge).latex()):
        assert text.count("{") == text.count("}")
        assert not re.search(r"E_|eps(?!ilon)|\bt-1\b|alpha(?<!\\alpha)", text)


@pytest.mark.parametrize("name", ZOO)
def test_programs_in_one_expression_compute_what_the_steps_compute(name):
    # the proofs rest on this inlining: run the steps, and the closed expressions, on the same exact numbers
    recurrence, size, rng = derive(get(name).triple), (2, 2), random.Random(name)
    dims = {x: d for x, (d, _) in signature(get(name).triple).items()} | {s.name: s.dims for s in recurrence.states}
    numbers = np.vectorize(lambda x: number(x, rng), otypes=[object])
    known = {x: numbers(np.full([2] * len(d), x)) if d else number(x, rng) for x, d in dims.items()} | {
        "scale": sp.Integer(3)
    }
    made = any(s.name == "k" for s in recurrence.steps)
    env = recurrence.run({"k_raw" if made and x == "k" else x: y for x, y in known.items()}, size)
    dims |= {"o": (i,)}
    closed = {x: fill(e, dims[x], {**env, **known}, size) for x, e in program(recurrence).items() if x in dims}
    for state, new in (*recurrence.updates, ("o", "o")):
        assert np.all([sp.simplify(x) == 0 for x in np.ravel(closed[state] - env[new])])


def test_longer_runs_at_other_sizes_agree_too():
    for edge in (the("rwkv7", "meta_kda"), the("kdn", "mean_field_delta"), the("mesanet", "mean_field_delta")):
        assert Run(edge, sizes=(3, 1), tokens=3, seed=1).order()[0] is None
    assert Run(the("kla", "retnet"), sizes=(1, 3), tokens=4, seed=2).order()[0] == 1


def test_a_run_sees_a_rewriting_rule_that_is_not_true():
    # a rule is taken at its word by the proof; the run draws keys of its own, here keys that are not one-hot
    dense = replace(ONE_HOT, sample=lambda rng, size: [sp.Integer(rng.randint(1, 3)) for _ in range(size)])
    with pytest.raises(UnifyError, match="run: "):
        prove_edge(replace(the("mesanet", "mean_field_delta"), assumptions=(dense,)))


# ---- planted errors ------------------------------------------------------------------------------------------------

alpha, alpha_j = symbol("alpha"), array("alpha", (j,))
beta, k, S = symbol("beta"), array("k", (j,)), array("S", (j, i))


def planted():
    """(what is wrong, the edge, the phase that must object, whether a measurement sees it too)."""
    key = the("palimpsa", "palimpsa_key")
    weak = the("palimpsa", "mamba2", "limit", theorem="", output=symbol("prior_precision"))
    fades = the("gated_deltanet", "mamba2", "limit")
    exact = the("gated_deltaproduct", "gated_deltanet", new=True)
    hot = the("mesanet", "mean_field_delta")
    kla, kda = the("kla", "meta_linear_attention"), the("kdn", "kda", new=True)
    yield "substitution: the key is alpha", replace(the("gla", "hgrn2"), substitution={"k": alpha_j}), "step S", True
    yield "substitution: p = k", replace(the("comba", "gated_deltanet"), substitution={"p": k}), "step S", True
    yield "substitution: beta as it is", replace(the("longhorn", "deltanet", "exact"), substitution={}), "step S", True
    yield (
        "substitution: w = 1 - alpha",
        replace(kda, substitution={**dict(kda.substitution), "noise": 1 - alpha_j}),
        "step S",
        True,
    )
    yield (
        "substitution: the bonus is 1",
        replace(the("rwkv6", "retnet"), substitution={"q": alpha * array("q", (j,)), "bonus": 1}),
        "read o",
        True,
    )
    yield (
        "substitution: free importance",
        replace(the("palimpsa", "mamba2", "exact"), substitution={}),
        "step Ibar",
        True,
    )
    yield "substitution: v_2 for k_2", replace(exact, substitution={"v_2": 0}), "step S", True
    yield "assumption: any keys", replace(hot, assumptions=()), "step M", True
    yield "assumption: unit keys", replace(hot, assumptions=(UNIT,)), "step M", True
    yield "order: 2 of 1", replace(weak, order=2), "read o", True
    yield "order: 1 of 2", replace(weak, substitution={"importance": EPS**2 * array("importance", (i,))}), "run", True
    yield "kind: a limit, and no difference", replace(key, kind="limit", order=1), "run", True
    yield "kind: exact, and a difference", replace(weak, kind="exact", order=None, variance=None), "read o", False
    yield "relation: twice the importance", replace(key, relation={"Ibar": 2 * array("Ibar", (j,))}), "step Ibar", True
    yield (
        "relation: the memory in other units",
        replace(kla, relation={**dict(kla.relation), "M": array("M", (j, i))}),
        "step M",
        True,
    )
    yield (
        "relation: the precision without its prior",
        replace(kla, relation={**dict(kla.relation), "Lambda": array("Ibar", (j, i))}),
        "initial Lambda",
        True,
    )
    yield (
        "relation: room too small",
        replace(fades, relation={"S": S + EPS**2 * anything("S", (j, i))}),
        "step S",
        False,
    )
    yield "relation: room too large", replace(fades, relation={"S": S + anything("S", (j, i))}), "read o", False
    yield "relation: a pole", replace(fades, relation={"S": S + anything("S", (j, i)) / EPS}), "read o", False
    yield "relation: anything at all", replace(key, relation={"Ibar": anything("Ibar", (j, i))}), "read o", False
    yield "output: no factor", replace(the("palimpsa", "mamba2", "exact"), output=1), "read o", True
    yield "variance: no factor", replace(the("kdn", "kda", new=True), variance=1), "variance", False
    yield (
        "lemma: another key",
        replace(the("hgrn2", "lightnet"), lemmas=(("x", symbol("x"), symbol("x") + 1),)),
        "lemma",
        False,
    )
    yield "static: a bonus that changes", replace(the("rwkv6", "retnet"), child="mamba2"), "substitution bonus", False
    yield (
        "relation: an argument",
        replace(the("palimpsa", "palimpsa_key"), relation={"Ibar": symbol("importance")}),
        "relation Ibar",
        False,
    )
    yield (
        "relation: not linear",
        replace(fades, relation={"S": S + EPS * anything("S", (j, i)) ** 2}),
        "relation S",
        False,
    )


WRONG = {what: (edge, phase, seen) for what, edge, phase, seen in planted()}


@pytest.mark.parametrize("what", WRONG)
def test_planted_error_is_not_proved(what):
    edge, phase, _ = WRONG[what]
    with pytest.raises(UnifyError, match=re.escape(f": {phase}")):
        prove_edge(edge)


@pytest.mark.parametrize("what", [what for what, (_, _, seen) in WRONG.items() if seen])
def test_planted_error_is_measured(what):
    with pytest.raises(AssertionError):
        measure(WRONG[what][0], started=what.startswith("relation"))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kind": "about"}, "use 'exact' or 'limit'"),
        ({"order": 1}, "a limit has an order"),
        ({"kind": "limit"}, "a limit has an order"),
    ],
)
def test_a_claim_that_is_none_is_refused(fields, complaint):
    with pytest.raises(UnifyError, match=complaint):
        Edge(**{"parent": "kda", "child": "gated_deltanet", "kind": "exact", "why": "", **fields})


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"substitution": {"beta_2": 1}}, "no argument beta_2"),
        ({"relation": {"M": 1}}, "no state M"),
        ({"parent": "gated_deltanet", "child": "kda"}, r"g has no value: the child's is g\[j\]"),
        ({"parent": "palimpsa", "child": "palimpsa_key", "substitution": {"importance": 1}}, "state Ibar has no value"),
    ],
)
def test_an_edge_that_does_not_fit_is_refused(fields, complaint):
    with pytest.raises(UnifyError, match=complaint):
        prove_edge(Edge(**{"parent": "kda", "child": "gated_deltanet", "kind": "exact", "why": "", **fields}))


# ---- on tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", NUMBERED)
def test_edge_holds_on_tensors(edge):
    measure(edge)


def test_the_slope_is_that_of_the_smallest_eps():
    edge = metaplastic_edge(
        "rodimus", kind="limit"
    )  # its keys are large where gates are weak: at eps = 0.1 it is no limit yet
    with pytest.raises(AssertionError, match="does not fall"):
        measure(edge, fit=None)
    found = measure(edge)
    assert found.slope == pytest.approx(1, abs=0.02)
    assert len(found.errors) == len(found.eps) == 7


@pytest.mark.parametrize("edge", [x for x in NUMBERED if x.values[0].kind == "exact" and not x.values[0].restrict])
def test_relation_holds_on_tensors(edge):
    # from a random state of the child, with the parent in the state that the relation says
    measure(edge, started=True, seed=1)


@pytest.mark.parametrize(
    "edge", [x for x in NUMBERED if x.values[0].kind == "exact" and x.values[0].variance is not None]
)
def test_variance_holds_on_tensors(edge):
    work = Measured(edge, 3)
    x = testing.random_inputs(work.child, 3, **SIZES)
    known = lambda: testing.per_token(work.child.recurrence, x) | ({"alpha": x["g"].exp()} if "g" in x else {})  # noqa: E731
    for name, value in work.constraint().items():
        x[name] = value(known(), 0.0).expand(x[name].shape)
    x = {name: y.contiguous() for name, y in x.items()}
    wanted, parts = signature(edge.parent_triple), {}
    for name, value in work.substitution().items():
        lead = (SIZES["H"],) if wanted[name][1] == "static" else (SIZES["B"], SIZES["T"], SIZES["H"])
        parts[name] = value(known(), 0.0).expand(*lead, *(SIZES[str(SIZE[d])] for d in wanted[name][0]))
    given = {}
    for a in work.parent.recurrence.inputs:
        shares = [parts[name] for name in (a.name, f"{a.name}_2") if name in parts]
        given[a.name] = shares[0] if len(shares) == 1 else torch.stack(shares, 2).flatten(1, 2)
    _, theirs = work.parent(**given, scale=0.7, return_variance=True)
    _, mine = work.child(**x, scale=0.7, return_variance=True)
    testing.assert_close(theirs * work.value(edge.variance, (i,))(known(), 0.0), mine, 1e-12, "the variance")


# ---- paths ---------------------------------------------------------------------------------------------------------


def claimed(chain):
    """A path as a claim to be measured."""
    path = chain.path
    return SimpleNamespace(
        parent_triple=chain.edges[0].parent_triple,
        child_triple=chain.edges[-1].child_triple,
        parents=[e.parent_triple for e in chain.edges],
        arguments=lambda: chain.substitution,
        free=lambda: dict(path.free),
        assumptions=(),
        domain=(),
        restrict=(),
        output=path.output,
        order=chain.orders[0] if chain.orders else None,
        states=dict,
    )


PATHS = {
    ("palimpsa", "linear_attention"): (),
    ("kda", "linear_attention"): (1,),
    ("rwkv7", "linear_attention"): (),
    ("mesanet", "lightning"): (1,),
    ("kla", "linear_attention"): (1,),
    ("kdn", "linear_attention"): (1,),
    ("meta_kda", "linear_attention"): (1,),
    ("meta_gla", "retnet"): (),
    ("preconditioned_kda", "gated_deltanet"): (),
    ("gated_kalmanet", "retnet"): (),
    ("meta_hgrn2", "lightnet"): (),
    ("rwkv7", "deltanet"): (),
}


@pytest.mark.parametrize("ends", PATHS, ids=" ".join)
def test_path_is_proved_and_holds_on_tensors(ends):
    chain = prove(*ends)
    assert (chain.edges[0].parent_name, chain.edges[-1].child_name) == ends
    assert all(x.child_name == y.parent_name for x, y in pairwise(chain.edges))
    assert chain.orders == PATHS[ends]
    assert chain.claim == ("limit, order 1" if chain.orders else "exact")
    assert [x.edge for x in chain.proofs] == list(chain.edges)
    assert chain.claim in str(chain)
    assert chain.latex().count("&=") == len(chain.substitution)
    measure(claimed(chain))


def test_a_path_avoids_dividing_by_what_it_sets_to_zero():
    chain = prove("kla", "linear_attention")  # v = r / b, and then b = 0: only the limit b -> 0 is left
    assert [e.kind for e in chain.edges] == ["exact", "limit"]
    exact = [chain.edges[0], the("meta_linear_attention", "linear_attention", "exact")]
    assert composed(exact) is None


def test_a_hyperparameter_is_set_on_the_first_model_only():
    chain = prove("preconditioned_kda", "gated_deltanet")
    assert chain.edges[0].instance is not None
    assert [e.child_name for e in chain.edges] == ["kda", "gated_deltanet"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("meta_gla", "gla", "mamba2"), ("meta_gla", "palimpsa", "mamba2")),
        (("meta_kda", "kda", "gated_deltanet"), ("meta_kda", "meta_gdn", "gated_deltanet")),
        (("meta_retnet", "retnet", "linear_attention"), ("meta_retnet", "meta_linear_attention", "linear_attention")),
    ],
)
def test_squares_commute(one, other):
    def along(names):
        found = [[e for e in edges(a, b, "exact") if not e.instance] for a, b in pairwise(names) if a != b]
        path = composed([x[0] for x in found])
        return {name: sp.simplify(x) for name, x in path.arguments if name != "a"}, path.output

    assert along(one) == along(other)


def test_several_limits_are_taken_one_after_the_other():
    from unify.derivations.chain import Chain

    steps = [the("meta_gdn", "gated_deltanet", "limit", new=True), the("gated_deltanet", "mamba2", "limit")]
    chain = Chain(composed(steps), tuple(map(prove_edge, steps)))
    assert chain.claim == "limits taken one after the other: order 1 in eps_1, then order 1 in eps_2"
    first, second = (sp.Symbol(f"eps_{n}", positive=True) for n in (1, 2))
    assert chain.substitution["beta"] == second / first
    assert chain.substitution["prior_precision"] == 1 / first


def test_free_parameters_of_two_edges_stay_apart():
    path = composed([the("palimpsa", "mamba2", "exact"), the("mamba2", "palimpsa_key")])
    assert path.output == symbol("prior_precision_again")
    assert dict(path.free) == {"prior_precision_again": ()}


@pytest.mark.parametrize(("parent", "child"), [("linear_attention", "palimpsa"), ("kda", "kda"), ("kla", "kda")])
def test_no_path_says_what_is_reached(parent, child):
    with pytest.raises(UnifyError) as caught:
        prove(parent, child)
    assert caught.value.given == f"prove({parent!r}, {child!r})"
    assert parent in caught.value.works


# ---- metaplastic_edge for any triple ---------------------------------------------------------------------------------

FIXED = {
    "prior precision per key": Triple(Architecture(forgetting="key"), prior=Prior(precision="key")),
    "prior mean": Triple(Architecture(), prior=Prior(precision="head", mean="entry")),
    "decay per entry": Triple(Architecture(forgetting="entry")),
    "a delta rule with a decay per entry": Triple(Architecture(forgetting="entry", value="observation"), Posterior(anchor="predicted")),
    "three observations": Triple(Architecture(value="observation", precision="head", repeats=3), Posterior(anchor="predicted")),
    "a write gate and a read before": Triple(Architecture(write_gate=True, read="before", bonus=True)),
    "an erasure": Triple(
        Architecture(forgetting="none", value="observation", observations=(Observation("-b", "a", target=False), Observation())),
        Posterior(anchor=("previous", "predicted")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["exact", "limit"])
@pytest.mark.parametrize("what", FIXED)
def test_metaplastic_edge_of_any_fixed_precision(what, kind):
    edge = metaplastic_edge(FIXED[what], kind=kind)
    assert prove_edge(edge).scope == "all K, V"
    measure(edge)


def test_metaplastic_edge_refuses_a_moving_precision_and_a_prior_it_cannot_undo():
    with pytest.raises(UnifyError, match="precision already moves"):
        metaplastic_edge("palimpsa")
    with pytest.raises(UnifyError, match="nothing undoes its precision"):
        metaplastic_edge("rwkv7", replace(get("rwkv7").triple.metaplastic(), prior=Prior(precision="head")))


# ---- the theorem -----------------------------------------------------------------------------------------------------


def gap_and_bound(q, k, v, alpha, b, I_p):
    """|o_palimpsa - o_mamba2 / I_p| of the ops, the bound, and the size of the terms (whose rounding counts)."""
    tensor = lambda x: torch.as_tensor(x, dtype=torch.float64)[None, :, None]  # noqa: E731
    x = {"q": tensor(q), "k": tensor(k), "v": tensor(v), "g": tensor(alpha).log()}
    prior = torch.tensor([I_p], dtype=torch.float64)
    ours = compile(get("palimpsa").triple, "reference")(**x, importance=tensor(b), prior_precision=prior, scale=1.0)
    theirs = compile(get("mamba2").triple, "reference")(**x, scale=1.0)
    size = (
        compile(get("mamba2").triple, "reference")(**{n: y if n == "g" else y.abs() for n, y in x.items()}, scale=1.0)
        / I_p
    )
    return (ours - theirs / I_p).abs()[0, :, 0].numpy(), forgetting_bound(q, k, v, alpha, b, I_p), size[0, :, 0].numpy()


decades = st.floats(-6, 6).map(lambda x: 10.0**x)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    T=st.integers(1, 24),
    K=st.integers(1, 4),
    V=st.integers(1, 3),
    strength=decades,
    prior=decades,
    forget=st.floats(-8, 0).map(lambda x: 10.0**x),
    sometimes=st.floats(0, 1),
)
def test_forgetting_bound_cannot_be_broken(seed, T, K, V, strength, prior, forget, sometimes):
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((T, K)), rng.standard_normal((T, K)), rng.standard_normal((T, V))
    alpha = np.clip(1 - forget * rng.random(T) * (rng.random(T) < 0.8), 1e-12, 1)  # some tokens forget nothing
    b = strength * rng.exponential(size=(T, V)) * (rng.random((T, V)) < sometimes)
    gap, bound, size = gap_and_bound(q, k, v, alpha, b, prior)
    assert np.all(gap <= bound + 1e-12 * size)
    rho = window_ratio(k, alpha, b, prior)
    share = 1.0 if np.isinf(rho) else rho / (1 + rho)
    assert np.all(bound <= size * share * (1 + 1e-9) + 1e-300)


def test_forgetting_bound_is_attained():
    # a constant token: the importance climbs to c, and the bound is met
    T, one = 400, np.ones((400, 1))
    gap, bound, size = gap_and_bound(one, one, one, np.full(T, 0.9), 0.03 * one, 2.0)
    assert np.all(gap <= bound * (1 + 1e-12))
    assert gap[-1] > 0.9999 * bound[-1]
    assert bound[-1] == pytest.approx(size[-1] * 0.15 / 1.15)  # rho = N b k^2 / I_p = 10 * 0.03 / 2
    assert window_ratio(one, np.full(T, 0.9), 0.03 * one, 2.0) == pytest.approx(0.15)


def test_forgetting_bound_is_one_power_of_the_importance():
    rng = np.random.default_rng(0)
    q, k, v, b = (rng.standard_normal((20, n)) for n in (3, 3, 2, 2))
    alpha, bounds = rng.uniform(0.3, 0.95, 20), []
    for eps in (1e-5, 1e-6, 1e-7):
        gap, bound, _ = gap_and_bound(q, k, v, alpha, eps * b**2, 1.5)
        bounds.append([gap.max(), bound.max()])
    slopes = np.diff(np.log10(bounds), axis=0)
    assert np.all(np.abs(slopes + 1) < 0.02)


def test_the_theorem_is_proved_step_by_step():
    theorem = forgetting_dominates().prove()
    text = str(theorem)
    assert text.startswith("Theorem (forgetting dominates)")
    assert all(x.sentence in text for x in theorem.steps)
    assert theorem.latex().count("&") == len(theorem.steps)
    assert the("palimpsa", "mamba2", "limit", theorem=theorem.name)


@pytest.mark.parametrize("n", range(len(forgetting_dominates().steps)))
def test_a_wrong_step_of_the_theorem_is_seen(n):
    theorem = forgetting_dominates()
    step = theorem.steps[n]
    wrong = (
        Step(step.sentence, -step.left - 1)
        if step.right is None
        else replace(step, right=step.right * (1 + symbol("rho")))
    )
    with pytest.raises(UnifyError, match="a step does not hold"):
        replace(theorem, steps=(*theorem.steps[:n], wrong, *theorem.steps[n + 1 :])).prove()


# ---- the algebra ------------------------------------------------------------------------------------------------------

q, I_j = array("q", (j,)), array("Ibar", (j,))
kS = contract(array("k", (l,)) * array("S", (l, i)), l)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (contract(q * (S + k * kS), j), contract(q * S, j) + contract(q * k, j) * contract(k * S, j)),
        (contract(q * S / (1 + I_j), j) + contract(q * S * I_j / (1 + I_j), j), contract(q * S, j)),
        (contract(sp.KroneckerDelta(j, h) * q * S, j), (q * S).subs(j, h)),
        (contract(q / (1 + sp.KroneckerDelta(j, h)), j), contract(q, j) - q.subs(j, h) / 2),
        (sp.KroneckerDelta(j, h) * q, sp.KroneckerDelta(j, h) * q.subs(j, h)),
        (contract(k**2, j) * contract(k * S, j) / contract(2 * k**2, j), contract(k * S, j) / 2),
    ],
)
def test_equal_expressions_have_no_remainder(left, right):
    assert remainder(left, right) == 0
    assert remainder(left, right + symbol("beta")) != 0
    assert remainder(left * beta, right) != 0


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (contract(q * k, j), contract(q, j) * contract(k, j)),
        (contract(k, j) ** 2, contract(k**2, j)),
        (contract(q, j), q),
        (sp.KroneckerDelta(j, h), sp.S.One),
        (sp.KroneckerDelta(j, h), sp.S.Zero),
        (contract(q / (1 + I_j), j), contract(q, j) / (1 + contract(I_j, j))),
    ],
)
def test_different_expressions_leave_a_remainder(left, right):
    assert remainder(left, right) != 0


def test_cases_keep_indices_apart():
    both = sp.KroneckerDelta(j, l) * sp.KroneckerDelta(j, h)
    assert remainder(both, sp.KroneckerDelta(j, l) * sp.KroneckerDelta(l, h)) == 0
    assert all(x == 0 for x in cases(both, frozenset({frozenset((j, l))})))


rationals = st.fractions(-4, 4, max_denominator=5).map(lambda x: sp.Rational(x.numerator, x.denominator))


@settings(max_examples=60, deadline=None)
@given(st.lists(rationals, min_size=6, max_size=6), st.integers(-2, 2))
def test_expansion_agrees_up_to_where_it_ends(c, power):
    expr = EPS**power * (c[0] + c[1] * EPS) * (c[2] + c[3] * EPS**2) ** 2 / (1 + c[4] * EPS + c[5] * EPS**2)
    found = expansion(expr, 5)
    known = sp.Add(*(x * EPS ** (found.low + n) for n, x in enumerate(found.terms)))
    top, bottom = sp.fraction(sp.cancel(sp.together(expr - known)))
    low = lambda x: min(m[0] for m in sp.Poly(x, EPS).monoms())  # noqa: E731
    assert top == 0 or low(top) - low(bottom) >= found.low + len(found.terms)


def test_expansion_says_where_it_ends_and_what_it_cannot_do():
    with pytest.raises(ArithmeticError, match="known below"):
        expansion(1 / (1 + EPS), 3).coefficient(3)
    with pytest.raises(ArithmeticError, match="vanishes"):
        expansion(1 / (EPS * (1 + symbol("beta")) - EPS - EPS * symbol("beta")), 3)
    with pytest.raises(ArithmeticError, match="no expansion of exp"):
        expansion(sp.exp(EPS), 3)


def test_leading_finds_a_pole():
    assert leading(1 / EPS + 1, 0) == (-1, 1)
    assert leading(EPS * contract(k, j), 1) is None
    assert leading(EPS * contract(k, j), 2)[0] == 1


def test_a_solve_is_left_alone_where_no_limit_makes_it_diagonal():
    matrix = array("P", (j, l)) + sp.KroneckerDelta(j, l)
    assert solution(matrix, q, None) is None
    assert solution(matrix, q, 1) is None
    assert solution(sp.KroneckerDelta(j, l) * I_j, q, None) == q / I_j
    series = solution(sp.KroneckerDelta(j, l) / EPS + array("P", (j, l)), q, 1)
    wanted = EPS * q - EPS**2 * contract(array("P", (j, l)) * array("q", (l,)), l)
    assert leading(series - wanted, 3) is None


def test_normal_form_is_one_spelling():
    assert normal(contract(q * k, j)) == normal(contract((k * q).subs(j, l), l))


# ---- printing and the command line --------------------------------------------------------------------------------------


def test_an_edge_says_everything():
    text = str(the("kdn", "kda", new=False))
    for part in (
        "KDN -> KDA (exact)",
        "unit keys",
        "beta < 1",
        "noise[j] = (1 - alpha[j]**2)/prior_precision",
        "Lambda[j] = prior_precision",
    ):
        assert part in text
    assert "base=1.0" in str(the("preconditioned_gdn", "gated_deltanet"))
    assert "theorem: forgetting dominates" in str(the("palimpsa", "mamba2", "limit", theorem="forgetting dominates"))
    assert tex(EPS * anything("Ibar", (j, i))) in (r"E^{\bar{I}}_{ji} \varepsilon", r"\varepsilon E^{\bar{I}}_{ji}")


def test_the_command_prints_the_map(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.count("\n") == len(EDGES)


def test_the_command_proves_a_path(capsys):
    assert main(["palimpsa", "linear_attention", "--full"]) == 0
    out = capsys.readouterr().out
    assert "each reduced to 0" in out
    assert out.count("in exact arithmetic") == len(prove("palimpsa", "linear_attention").edges)
    assert main(["mamba2", "palimpsa_keys"]) == 1
    assert "palimpsa_key" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["mamba2"])


def test_importing_proves_nothing_and_leaves_torch_alone(tmp_path):
    program = """
import json, sys
from unify.derivations import all_edges, prove_edge
from unify.derive import derive
before = len(all_edges()), derive.cache_info().currsize, prove_edge.cache_info().currsize
prove_edge(all_edges()[0])
print(json.dumps([*before, 'torch' in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [len(EDGES), 0, 0, False]


@pytest.mark.slow
def test_all_proofs_fit_in_a_minute(tmp_path):
    program = """
import time
from unify.derivations.__main__ import main
main(['--prove'])
print(time.process_time())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert float(lines[-1]) < 60
    assert lines[-2].startswith(f"{len(EDGES)} edges")
    assert sum("obligations, all K, V" in x for x in lines) == len(EDGES)
