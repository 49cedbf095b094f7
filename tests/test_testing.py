"""unify.testing itself: what it draws, and that each of its checks fails on a planted error."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import unify
from unify.errors import UnifyError
from unify.models.zoo import ZOO, get
from unify.symbols import array, i, j
from unify.testing import (
    GATES,
    assert_close,
    assert_equivalent,
    check_gradients,
    cu_seqlens,
    gates,
    inputs,
    one_hot_keys,
    random_inputs,
    random_state,
    relative_error,
    sizes,
    triples,
    unit_keys,
)
from unify.triple import Triple


def reference(name):
    return unify.compile(get(name).triple, "reference")


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_assert_close_returns_the_relative_error():
    x = torch.tensor([1.0, 4.0])
    assert assert_close(x, x) == 0
    assert assert_close(x + torch.tensor([0.4, 0.0]), x, 0.2) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (torch.tensor([[1.0, 2.0], [3.0, 4.5]]), r"y is off by 1.25e-01 .* worst at \[1, 1\]: 4.5 against 4"),
        (torch.tensor([[1.0, 2.0], [float("nan"), 4.0]]), r"y is nan at \[1, 0\]"),
        (torch.tensor([[1.0, float("inf")], [3.0, 4.0]]), r"y is inf at \[0, 1\]"),
        (torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]]), r"y has shape \[2, 3\], expected \[2, 2\]"),
    ],
)
def test_assert_close_fails(actual, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), what="y")


def test_assert_close_does_not_trust_an_expected_value_that_is_not_finite():
    with pytest.raises(AssertionError, match="the expected value of y is nan"):
        assert_close(torch.zeros(1), torch.full((1,), float("nan")), what="y")


def test_shapes_of_public_signatures_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        relative_error(torch.zeros(2), torch.zeros(3))


# -- equivalences ------------------------------------------------------------------------------------------------------

EXACT = [
    ("gla", "mamba2", {}, {}),  # a name both have is the child's, broadcast
    ("mamba2", "linear_attention", {"g": 0}, {}),
    ("gla", "hgrn2", {"k": 1 - array("alpha", (j,))}, {}),
    ("gla", "hgrn2", {"k": lambda x, eps: 1 - x["alpha"]}, {}),
    (
        "palimpsa",
        "gla",
        {"importance": 0, "g": -0.5, "prior_precision": torch.full((2,), 4.0)},
        {"output": 4, "constraint": {"g": -0.5}},
    ),
    ("gated_deltaproduct", "gated_deltanet", {"beta_2": 0, "k_2": 0, "v_2": 0}, {}),
    ("palimpsa", "mamba2", {"importance": 0, "prior_precision": 1}, {"initial": {"M": array("S", (j, i)), "Ibar": 0}}),
    (
        "mesanet",
        "palimpsa",
        {
            "prior_precision": array("prior_precision"),
            "beta": lambda x, eps: x["importance"][..., 0],
            "v": lambda x, eps: x["v"] / x["importance"],
        },
        {"constraint": lambda x: one_hot_keys({**x, "importance": x["importance"][..., :1].expand_as(x["v"]) + 0.1})},
    ),
]


@pytest.mark.parametrize(("parent", "child", "substitution", "options"), EXACT)
def test_exact_equivalences(parent, child, substitution, options):
    found = assert_equivalent(parent, child, substitution, **options)
    assert found.order is None
    assert found.worst < 1e-12
    assert f"{parent} -> {child}: exact" in str(found)


LIMITS = [
    ("palimpsa", "mamba2", {"importance": array("eps"), "prior_precision": 1}, {}),
    ("palimpsa", "mamba2", {"importance": 0.5, "prior_precision": 1 / array("eps")}, {"output": 1 / array("eps")}),
    ("gated_deltanet", "mamba2", {"beta": lambda x, eps: eps, "v": lambda x, eps: x["v"] / eps}, {}),
    ("longhorn", "deltanet", {}, {"constraint": {"beta": array("eps"), "v": array("v", (i,)) / array("eps")}}),
]


@pytest.mark.parametrize(("parent", "child", "substitution", "options"), LIMITS)
def test_limits_of_order_one(parent, child, substitution, options):
    found = assert_equivalent(parent, child, substitution, order=1, **options)
    assert abs(found.slope - 1) < 0.05
    assert len(found.errors) == len(found.eps)
    assert "order 1, measured" in str(found)


def test_a_limit_of_order_two():
    assert assert_equivalent(
        "mamba2", "retnet", {"v": lambda x, eps: x["v"] * (1 + eps**2)}, order=2
    ).slope == pytest.approx(2, abs=0.05)


def test_a_triple_of_ones_own():
    mine = replace(get("gla").triple, architecture=replace(get("gla").triple.architecture, scale=2.0))
    assert "gla" in str(assert_equivalent(mine, "gla"))


@pytest.mark.parametrize(
    ("parent", "child", "substitution", "options", "message"),
    [
        ("gla", "mamba2", {"g": -0.1}, {}, "is not exact"),
        ("gla", "hgrn2", {"k": array("alpha", (j,))}, {}, "is not exact"),
        (
            "palimpsa",
            "mamba2",
            {"importance": array("eps"), "prior_precision": 1},
            {"order": 2},
            "does not fall as eps",
        ),
        ("palimpsa", "mamba2", {"importance": 0.1, "prior_precision": 1}, {"order": 1}, "does not fall as eps"),
        ("gla", "mamba2", {}, {"order": 1}, "claim it exact"),
        ("gla", "mamba2", {"v": float("nan")}, {}, "nan"),
        (
            "palimpsa",
            "mamba2",
            {"importance": 0, "prior_precision": 1},
            {"initial": {"M": array("S", (j, i)), "Ibar": 0.1}},
            "is not exact",
        ),
        (
            "gated_deltanet",
            "deltanet",
            {"g": 0, "v": array("v", (i,)) / array("eps")},
            {"order": 1, "eps": (1e-1, 0.0, 1e-2)},
            "not finite",
        ),
    ],
)
def test_a_wrong_claim_fails(parent, child, substitution, options, message):
    if substitution.get("v") != substitution.get("v"):  # NaN must get past the op's own check
        substitution = {"v": lambda x, eps: x["v"] * (1 + 1e-9)}
        message = "is not exact"
    with pytest.raises(AssertionError, match=message):
        assert_equivalent(parent, child, substitution, **options)


@pytest.mark.parametrize(
    ("substitution", "options", "message"),
    [
        ({"beta": 1}, {}, "no such argument"),
        ({}, {}, "importance has none"),
        ({"importance": array("k", (j,)), "prior_precision": 1}, {}, "has no index j"),
        ({"importance": torch.zeros(2, 12, 2), "prior_precision": 1}, {}, "does not broadcast"),
        ({"importance": 0, "prior_precision": 1}, {"initial": {}}, "M has none"),
    ],
)
def test_a_claim_that_is_not_well_formed(substitution, options, message):
    with pytest.raises(UnifyError, match=message):
        assert_equivalent("palimpsa", "mamba2", substitution, **options)


def test_constraints():
    x = random_inputs(reference("gla"))
    assert torch.allclose(unit_keys(x)["k"].norm(dim=-1), torch.ones(2, 12, 2, dtype=torch.float64))
    hot = one_hot_keys(x)["k"]
    assert set(hot.unique().tolist()) == {0.0, 1.0}
    assert (hot.sum(-1) == 1).all()


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["palimpsa", "rodimus", "preconditioned_gdn", "gated_kalmanet"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients(name, backend):
    op = unify.compile(get(name).triple, backend)
    assert check_gradients(op, random_inputs(op, T=6, gates="moderate"), directions=1) < 1e-6


def test_gradients_of_packed_sequences():
    op = unify.compile(get("meta_gdn").triple)
    x = random_inputs(op, B=1, T=7, gates="moderate")
    assert check_gradients(op, {**x, "cu_seqlens": torch.tensor([0, 1, 5, 7])}, directions=1) < 1e-6


@pytest.mark.parametrize("wrong", ["q", "g", "prior_precision", "initial_state.M"])
def test_a_wrong_gradient_fails(wrong):
    op = reference("palimpsa")

    class Planted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d):
            return 1.001 * d

    class Broken(type(op)):
        def __call__(self, q, k, v, *, initial_state=None, **rest):
            given = {"q": q, "k": k, "v": v, **rest}
            if wrong in given:
                given[wrong] = Planted.apply(given[wrong])
            elif initial_state:
                initial_state = (Planted.apply(initial_state[0]), *initial_state[1:])
            return super().__call__(**given, initial_state=initial_state)

    broken = Broken(op.triple, op.recurrence, op.structure, op.plan, op.backend)
    with pytest.raises(AssertionError, match=f"the gradient by {wrong} is off by 1.0e-03"):
        check_gradients(broken, random_inputs(op, T=4, gates="moderate"))


def test_a_missing_gradient_fails():
    op = reference("gla")

    class Detached(type(op)):
        def __call__(self, q, k, v, **rest):
            return super().__call__(q, k.detach(), v, **rest)

    with pytest.raises(AssertionError, match="the gradient by k"):
        check_gradients(
            Detached(op.triple, op.recurrence, op.structure, op.plan, op.backend),
            random_inputs(op, T=4, gates="moderate"),
        )


# -- random inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_random_inputs_are_accepted_by_every_model(name):
    op = reference(name)
    x = random_inputs(op, 3, B=1, T=3)
    o = op(**x, initial_state=random_state(op, x))
    assert o.shape == (1, 3, 2, 2)
    assert o.isfinite().all()


def test_random_inputs_repeat_themselves_and_follow_their_seed():
    op = reference("palimpsa")
    first, again, other = random_inputs(op, 1), random_inputs(op, 1), random_inputs(op, 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("regime", GATES)
def test_gates_keep_to_their_regime(regime):
    g = random_inputs(reference("gla"), T=50, gates=regime)["g"]
    low, high = GATES[regime]
    moving = g[g != 0]
    assert (moving <= -low * (1 - 1e-12)).all()
    assert (moving >= -high * (1 + 1e-12)).all()
    if regime == "mixed":
        assert all((g == extreme).any() for extreme in (0.0, -1e-6, -30.0))
        assert all(len(row.unique()) > 10 for row in g[0, :, 0].T)  # varies in time


def test_an_unknown_regime():
    with pytest.raises(UnifyError, match="use one of mixed, weak"):
        random_inputs(reference("gla"), gates="medium")


# -- strategies --------------------------------------------------------------------------------------------------------


@given(triples(derivable=False))
def test_triples_are_legal_and_printable(t):
    assert isinstance(t, Triple)
    assert str(t)


@given(triples(derivable=False, curvature=("key", "isotropic"), dynamics=("diffusion",), key=("free",)))
def test_triples_can_be_restricted(t):
    assert t.curvature in ("key", "isotropic")
    assert t.prior.dynamics == "diffusion"
    assert t.architecture.key == "free"


def test_triples_refuse_an_unknown_choice():
    with pytest.raises(UnifyError, match="no such choice"):
        triples(curvatur=("key",))


@given(sizes(largest=4, longest=6))
def test_sizes(size):
    assert set(size) == set("BTHKV")
    assert max(size["K"], size["V"]) <= 4
    assert 1 <= size["T"] <= 6


@given(gates())
def test_gates_are_log_decays(g):
    assert -30 <= g <= 0


@given(st.integers(1, 9).flatmap(lambda T: st.tuples(st.just(T), cu_seqlens(T))))
def test_offsets_cut_the_sequence(drawn):
    T, offsets = drawn
    assert offsets.dtype == torch.int64
    assert offsets[0] == 0
    assert offsets[-1] == T
    assert (offsets.diff() > 0).all()


@given(inputs(reference("palimpsa"), packed=True, longest=6))
def test_inputs_fit_their_op(x):
    assert reference("palimpsa")(**x).isfinite().all()


def test_without_hypothesis_the_strategies_say_what_to_install():
    code = """
import sys
sys.modules["hypothesis"] = None
import unify.testing as t
print(t.assert_equivalent("gla", "mamba2"))
try:
    t.triples()
except t.UnifyError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "gla -> mamba2: exact" in said
    assert "pip install unify-attention[testing]" in said
