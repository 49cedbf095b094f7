"""Every bad input is refused with three facts, one case per rule, and a refusal leaves everything as it was."""

from dataclasses import replace

import pytest
import torch

import unify
from unify.errors import UnifyError
from unify.models.zoo import get
from unify.testing import random_inputs, random_state
from unify.triple import Architecture, Observation, Posterior, Prior, Ridge, Squash, Triple

A, P = Architecture, Posterior
SEEN = {"value": "observation"}
ERASE = Observation("-b", "a", target=False)
FULL = P(curvature="full")


def refused(call, *fragments):
    """The call raises UnifyError, its three facts are filled in and in the message, and so are the fragments."""
    with pytest.raises(UnifyError) as caught:
        call()
    error = caught.value
    for fact in (error.given, error.fails, error.works):
        assert isinstance(fact, str)
        assert fact.strip()
        assert fact in str(error)
    for fragment in fragments:
        assert fragment in str(error), f"{fragment!r} is not in {error}"
    assert "\n\n" not in str(error)


# -- triples: one case per rule ----------------------------------------------------------------------------------------

LEGS = {
    "no such forgetting": (lambda: A(forgetting="channel"), "forgetting='channel'", "head, key, entry"),
    "no such precision": (lambda: A(precision="key"), "precision='key'"),
    "no such importance": (lambda: A(importance="key"), "importance='key'"),
    "no such value": (lambda: A(value="v"), "value='v'", "evidence, observation"),
    "no such read": (lambda: A(read="during"), "read='during'"),
    "no such key": (lambda: A(key="rotary"), "key='rotary'"),
    "no such curvature": (lambda: P(curvature="dense"), "curvature='dense'"),
    "no such curvature in a tuple": (lambda: P(curvature=("key", "dense")), "curvature='dense'"),
    "no such anchor": (lambda: P(anchor="next"), "anchor='next'"),
    "no such anchor weight": (lambda: P(anchor_weight="value"), "anchor_weight='value'"),
    "no such projection": (lambda: P(projection="drop"), "projection='drop'"),
    "no such prior precision": (lambda: Prior(precision="value"), "precision='value'"),
    "no such mean": (lambda: Prior(mean="one"), "mean='one'"),
    "no such dynamics": (lambda: Prior(dynamics="drift"), "dynamics='drift'"),
    "no such noise": (lambda: Prior(dynamics="diffusion", noise="one"), "noise='one'"),
    "no such adaptive": (lambda: Prior(adaptive=Ridge), "Ridge()"),
    "no such observed key": (lambda: Observation("v"), "key='v'"),
    "no such read key": (lambda: Observation("k", "q"), "read='q'"),
    "a number for a choice": (lambda: A(forgetting=1), "forgetting=1"),
    "no observation": (lambda: A(observations=()), "must observe something"),
    "observations of another type": (lambda: A(observations=("k",)), "tuple of Observation"),
    "only erasures": (lambda: A(**SEEN, observations=(ERASE,)), "without a target"),
    "no repeats": (lambda: A(repeats=0), "repeats=0"),
    "half a repeat": (lambda: A(repeats=1.5), "repeats=1.5"),
    "scale 0": (lambda: A(scale=0.0), "scale=0.0"),
    "scale NaN": (lambda: A(scale=float("nan")), "scale=nan"),
    "scale of another type": (lambda: A(scale="1"), "scale='1'"),
    "evidence with a precision": (lambda: A(precision="head"), "evidence carries its own strength"),
    "bonus after the update": (lambda: A(bonus=True), "read='before'"),
    "complement without a decay per key": (lambda: A(key="complement"), "forgetting='key'"),
    "tempered without a decay per key": (lambda: A(key="tempered", forgetting="none"), "forgetting='key'"),
    "a made key, repeated": (lambda: A(key="complement", forgetting="key", repeats=2), "one key a token"),
    "gain without a diagonal": (lambda: P(gain=True), "projection='diagonal'"),
    "squash to nothing": (lambda: Squash(base=0), "base and eps must be positive"),
    "squash of nothing": (lambda: Squash(eps=-1.0), "base and eps must be positive"),
    "diffusion without noise": (lambda: Prior(dynamics="diffusion"), "a diffusion needs a noise"),
    "noise without diffusion": (lambda: Prior(noise="head"), "a diffusion needs a noise"),
    "adaptive and given": (lambda: Prior(precision="head", adaptive=Squash()), "not also an argument"),
    "adaptive diffusion": (lambda: Prior(dynamics="diffusion", noise="head", adaptive=Squash()), "forgets by power"),
}

PAIRS = {
    "a leg of another type": (lambda: Triple("head"), "architecture='head'", "Architecture(...)"),
    "legs in another order": (lambda: Triple(P()), "architecture=Posterior", "Architecture(...)"),
    "curvatures for too many": (lambda: Triple(A(), P(curvature=("key", "key"))), "one curvature per observation"),
    "anchors for none": (lambda: Triple(A(), P(anchor=())), "one anchor per observation"),
    "two families": (
        lambda: Triple(A(observations=(Observation(), Observation("p"))), P(curvature=("key", "diagonal"))),
        "one family of posteriors",
    ),
    "key with importance per value": (
        lambda: Triple(A(importance="value"), P(curvature="key")),
        "curvature='diagonal'",
    ),
    "key with beta per value": (lambda: Triple(A(**SEEN, precision="value"), P(curvature="key")), "precision='value'"),
    "full with a decay per key": (lambda: Triple(A("key"), FULL), "no forgetting per channel"),
    "full diffusion": (lambda: Triple(A(), FULL, Prior(dynamics="diffusion", noise="head")), "no closed form"),
    "evidence away from the prior": (lambda: Triple(A(), P(anchor="predicted")), "the pair (v, beta) matters"),
    "full with an anchor": (lambda: Triple(A(**SEEN), replace(FULL, anchor="predicted")), "the anchor drops out"),
    "previous on a later one": (
        lambda: Triple(A(**SEEN, repeats=2), P(anchor="previous")),
        "only the first observation of a token stands next to the previous mean",
    ),
    "no anchor to weigh": (lambda: Triple(A(**SEEN), P(anchor_weight="head")), "no anchor to weigh"),
    "a read key that is not read": (
        lambda: Triple(A(**SEEN, observations=(Observation(read="p"),))),
        "the prior is not read",
    ),
    "an erasure at the prior": (
        lambda: Triple(A(**SEEN, observations=(Observation("b", target=False), Observation()))),
        "it would erase nothing",
    ),
    "diagonal twice": (
        lambda: Triple(A(importance="head"), P(curvature="key", projection="diagonal")),
        "diagonal already",
    ),
    "reset of nothing": (lambda: Triple(A(), P(projection="reset")), "never leaves the prior's"),
    "full with importance apart": (lambda: Triple(A(**SEEN, importance="head"), FULL), "every token needs a solve"),
    "importance unused": (lambda: Triple(A(importance="head")), "the importance would not be used"),
    "importance of an erasure": (
        lambda: Triple(
            A(**SEEN, importance="head", observations=(ERASE, Observation())),
            P(("key", "none"), ("previous", "predicted")),
        ),
        "the importance would not be used",
    ),
    "mix of nothing": (lambda: Triple(A(mix=True)), "solves nothing to mix with"),
    "a made key unused": (
        lambda: Triple(A("key", key="complement", observations=(Observation("p"),))),
        "the key would not be used",
    ),
    "ridge without full": (lambda: Triple(A(), P(), Prior(adaptive=Ridge())), "a full, kept precision"),
    "ridge per value": (lambda: Triple(A(importance="value"), FULL, Prior(adaptive=Ridge())), "one ridge per head"),
    "ridge before": (lambda: Triple(A(read="before"), FULL, Prior(adaptive=Ridge())), "nothing to measure a ridge on"),
    "ridge with a mean": (lambda: Triple(A(), FULL, Prior(mean="entry", adaptive=Ridge())), "use mean='zero'"),
    "squash with a curvature": (
        lambda: Triple(A(importance="head"), P(curvature="key"), Prior(adaptive=Squash())),
        "key-diagonal second moment",
    ),
    "squash without importance": (lambda: Triple(A(), P(), Prior(adaptive=Squash())), "importance='head'"),
}


@pytest.mark.parametrize("rule", LEGS)
def test_a_leg_checks_itself(rule):
    refused(*LEGS[rule])


@pytest.mark.parametrize("rule", PAIRS)
def test_a_triple_checks_its_legs_against_each_other(rule):
    refused(*PAIRS[rule])


def test_metaplastic_refusals():
    refused(lambda: get("palimpsa").triple.metaplastic(), "precision already moves")
    refused(lambda: get("kla").triple.metaplastic(), "precision already moves")
    refused(lambda: get("gla").triple.metaplastic("key"), "importance='key'", "'value' or 'head'")


def test_compile_refusals():
    refused(lambda: unify.compile("gla"), "compile(str)", "Triple")
    refused(lambda: unify.compile(get("gla")), "compile(Model)", ".triple")
    refused(lambda: unify.compile(get("gla").triple, "cuda"), "backend='cuda'", "torch")
    refused(lambda: unify.compile(get("gla").triple, None), "backend=None")


def test_an_unknown_model_names_its_neighbours():
    refused(lambda: get("palimsa"), "'palimsa'", "palimpsa")
    refused(lambda: get("zzz"), "one of", "mamba2")


# -- arguments ---------------------------------------------------------------------------------------------------------

MODEL = "meta_kda"  # g [B T H K], beta and importance [B T H], prior_precision [H], states S and Ibar


@pytest.fixture(params=["torch", "reference"])
def op(request):
    return unify.compile(get(MODEL).triple, request.param)


@pytest.fixture
def x(op):
    return random_inputs(op, 1, T=4, gates="moderate")


def unchanged(op, good, bad, *fragments, **options):
    """The bad call is refused, touches no tensor, and the op goes on working."""
    first = op(**good)
    tensors = [t for t in (*bad.values(), *options.get("initial_state", ())) if torch.is_tensor(t)]
    before = [(t.clone(), t._version) for t in tensors]
    refused(lambda: op(**bad, **options), *fragments)
    for t, (copy, version) in zip(tensors, before, strict=True):
        assert t._version == version
        assert torch.equal(t, copy) or (t.isnan() == copy.isnan()).all()
    assert torch.equal(op(**good), first)


def spoiled(x, name, value):
    """x with one entry of one argument set to a value."""
    y = x[name].clone()
    y.view(-1)[-1] = value
    return {**x, name: y}


NAMES = ("q", "k", "v", "g", "beta", "importance", "prior_precision")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_argument(op, x, name):
    bad = {**x, name: None}
    unchanged(op, x, bad, f"no argument {name!r}", "prior_precision [H]")


@pytest.mark.parametrize("name", ["b", "gk", "prior_mean", "noise"])
def test_an_unused_argument(op, x, name):
    unchanged(op, x, {**x, name: x["beta"]}, f"argument {name!r}", "not used", "it takes q [B, T, H, K]")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("wrong", "said"), [(1.0, "float"), ([0.0], "list"), ("x", "str"), (True, "bool")])
def test_an_argument_that_is_no_tensor(op, x, name, wrong, said):
    unchanged(op, x, {**x, name: wrong}, f"{name}: {said}", "floating-point tensor")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_wrong_dtype(op, x, name, dtype):
    unchanged(op, x, {**x, name: x[name].to(dtype)}, f"{name}: {dtype}", "float64, float32")


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_size_on_each_axis(op, x, name):
    for axis in range(x[name].ndim):
        if name in ("q", "v") and axis == (3 if name == "v" else -1):
            continue  # V is what v says
        bad = torch.cat([x[name], x[name].narrow(axis, 0, 1)], axis)
        unchanged(op, x, {**x, name: bad}, "does not fit q", str(list(x["k" if name == "q" else name].shape)[:1])[:-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_number_of_axes(op, x, name):
    for bad in (x[name][None], x[name][0]):
        unchanged(
            op,
            x,
            {**x, name: bad},
            f"{name} {list(bad.shape)}",
            "axes" if name not in ("q", "v") else "four dimensions",
        )


def test_an_axis_in_another_order(op, x):
    bad = {**x, "g": x["g"].movedim(1, 2)}  # head first
    unchanged(op, x, bad, "g [2, 2, 4, 3]", "axis 1", "g is [B, T, H, K] = [2, 4, 2, 3]")


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_an_empty_axis(op, x, axis):
    bad = {name: v.narrow(axis, 0, 0) if v.ndim > axis else v for name, v in x.items()}
    unchanged(op, x, bad, "an axis is empty")


@pytest.mark.parametrize("name", NAMES)
def test_nan(op, x, name):
    unchanged(op, x, spoiled(x, name, float("nan")), f"{name} holds NaN", "checked=False")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("g", 0.1, "log(alpha) <= 0"),
        ("beta", -1e-3, "pass beta >= 0"),
        ("importance", -1.0, "pass importance >= 0"),
        ("prior_precision", 0.0, "pass prior_precision > 0"),
        ("prior_precision", -1.0, "pass prior_precision > 0"),
    ],
)
def test_a_wrong_sign(op, x, name, value, said):
    unchanged(op, x, spoiled(x, name, value), f"{value:g}", said)


@pytest.mark.parametrize(
    ("model", "name", "value", "said"),
    [
        ("kla", "noise", -1.0, "pass noise >= 0"),
        ("kdn", "gain", -1.0, "pass gain >= 0"),
        ("gated_kalmanet", "ridge", -1.0, "pass ridge >= 0"),
        ("rodimus", "temperature", 0.0, "pass temperature > 0"),
        ("gated_deltanet2", "erase", -1.0, "pass erase >= 0"),
        ("preconditioned_gdn", "g_importance", 1.0, "log(alpha) <= 0"),
    ],
)
def test_a_wrong_sign_of_a_rarer_argument(model, name, value, said):
    op = unify.compile(get(model).triple)
    x = random_inputs(op, 1, T=2, gates="moderate")
    unchanged(op, x, spoiled(x, name, value), said)


def test_values_are_let_through_where_nothing_is_checked():
    op = unify.compile(get(MODEL).triple, checked=False)
    bad = spoiled(random_inputs(op, T=3), "q", float("nan"))
    assert op(**bad).isnan().any()


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), "1", True, torch.tensor(1.0), [1.0]])
def test_a_wrong_scale(op, x, scale):
    unchanged(op, x, x, "scale=", "positive number", scale=scale)


# -- packed sequences --------------------------------------------------------------------------------------------------

OFFSETS = {
    "a list": [0, 4],
    "floats": torch.tensor([0.0, 4.0]),
    "a matrix": torch.tensor([[0, 4]]),
    "one number": torch.tensor([0]),
    "nothing": torch.tensor([], dtype=torch.int64),
    "not from 0": torch.tensor([1, 4]),
    "not to T": torch.tensor([0, 3]),
    "beyond T": torch.tensor([0, 5]),
    "an empty sequence": torch.tensor([0, 2, 2, 4]),
    "backwards": torch.tensor([0, 3, 1, 4]),
    "negative": torch.tensor([0, -1, 4]),
}


@pytest.mark.parametrize("wrong", OFFSETS)
def test_wrong_offsets(op, wrong):
    x = random_inputs(op, 1, B=1, T=4, gates="moderate")
    unchanged(op, x, x, "cu_seqlens", "int64 tensor [0, ..., 4], strictly increasing", cu_seqlens=OFFSETS[wrong])


def test_packed_sequences_in_a_batch(op, x):
    unchanged(op, x, x, "cu_seqlens with B=2", "flatten to B = 1", cu_seqlens=torch.tensor([0, 4]))


def test_a_state_for_another_number_of_packed_sequences(op):
    x = random_inputs(op, 1, B=1, T=4, gates="moderate")
    start = random_state(op, x)
    unchanged(op, x, x, "initial_state.S", "[2, 2, 3, 2]", cu_seqlens=torch.tensor([0, 1, 4]), initial_state=start)


# -- the initial state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda s: s[0], "2 state(s)"),
        (lambda s: s[:1], "S [B, H, K, V], Ibar [B, H, K]"),
        (lambda s: (*s, s[0]), "2 state(s)"),
        (lambda s: (s[1], s[0]), "initial_state.S"),
        (lambda s: (s[0], None), "initial_state.Ibar: NoneType"),
        (lambda s: (s[0].long(), s[1]), "initial_state.S: torch.int64"),
        (lambda s: (s[0][:1], s[1]), "initial_state.S"),
        (lambda s: (s[0][:, :1], s[1]), "initial_state.S"),
        (lambda s: (s[0], s[1][..., :1]), "initial_state.Ibar"),
        (lambda s: (s[0].mT, s[1]), "state S is [B, H, K, V]"),
        (lambda s: {"S": s[0]}, "exactly S, Ibar"),
        (lambda s: {"S": s[0], "Ibar": s[1], "M": s[0]}, "exactly S, Ibar"),
        (lambda s: {"M": s[0], "Ibar": s[1]}, "exactly S, Ibar"),
        (lambda s: "zero", "initial_state of type str"),
        (lambda s: 0, "initial_state of type int"),
    ],
)
def test_a_wrong_initial_state(op, x, make, said):
    wrong = make(random_state(op, x))
    kept = [t.clone() for t in random_state(op, x)]
    first = op(**x)
    refused(lambda: op(**x, initial_state=wrong), said)
    assert torch.equal(op(**x), first)
    right = random_state(op, x)
    assert all(torch.equal(a, b) for a, b in zip(right, kept, strict=True))
    assert torch.equal(
        op(**x, initial_state=right), op(**x, initial_state=dict(zip(("Ibar", "S"), right[::-1], strict=True)))
    )


def test_one_missing_repeat(op):
    product = unify.compile(get("gated_deltaproduct").triple)
    x = random_inputs(product, T=4)
    unchanged(product, x, {**x, "k": x["k"][:, :4]}, "k is [B, n T, H, K] = [2, 8, 2, 3]")


def test_an_argument_that_the_key_replaces():
    op = unify.compile(get("hgrn2").triple)
    x = random_inputs(op)
    unchanged(op, x, {**x, "k": x["q"]}, "argument 'k'", "not used")
