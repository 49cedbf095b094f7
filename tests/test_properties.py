"""What holds for every triple, on random ones from the whole space: engine, chunked form, state, variance, metaplasticity."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import unify
from unify.confirm import confirm
from unify.derive import derive
from unify.errors import UnifyError
from unify.models.zoo import get
from unify.recurrence import Assign
from unify.symbols import array, i, j
from unify.testing import (
    assert_close,
    check_gradients,
    gates,
    inputs,
    random_inputs,
    random_state,
    triples,
)
from unify.triple import Architecture, Posterior, Triple
from unify.verify import tokens

KEYS = ("k", "p", "a", "b")
seeds = st.integers(0, 999)
few, many = (settings(max_examples=int(x * settings.default.max_examples)) for x in (0.7, 2))


def both(t):
    """The token loop and the chunk-parallel form."""
    return unify.compile(t, "reference"), unify.compile(t, "torch")


def everything(op, x, **options):
    """o, the variance and the final states, by name."""
    o, var, final = op(**x, return_variance=True, output_final_state=True, **options)
    return {"o": o, "variance": var, **final._asdict()}


def assert_same(actual, expected, rtol=1e-9):
    for name, want in expected.items():
        assert_close(actual[name], want, rtol, name)


def permuted(op, x, axis, order):
    """Arguments with their batch rows or heads in another order."""
    per = {a.name: a.per for a in op.recurrence.inputs}
    where = {"batch": {"token": 0, "observation": 0}, "head": {"token": 2, "observation": 2, "static": 0}}[axis]
    return {name: v.index_select(where[per[name]], order) if per[name] in where else v for name, v in x.items()}


# -- the engine --------------------------------------------------------------------------------------------------------


@given(triples(), seeds)
def test_the_derivation_is_stationary(t, seed):
    found = confirm(t, sizes=((2, 2),), seed=seed)
    assert found.gradients > 0
    assert found.smallest_minor > 0


def planted(t, name, change):
    """The derived recurrence with one assignment changed."""
    right = derive(t)
    assert any(s.name == name for s in right.steps)
    steps = (replace(s, expr=change(s.expr)) if s.name == name else s for s in right.steps)
    return replace(right, steps=tuple(steps))


WRONG = [
    ("palimpsa", "M_new", lambda e: e + array("M", (j, i)) / 100, "not stationary"),
    ("palimpsa", "M_new", lambda e: -e, "not stationary"),
    ("palimpsa", "Ibar_new", lambda e: 2 * e, "not stationary|not the projection"),
    ("palimpsa", "Ibar_p", lambda e: e / 2, "not stationary|not the projection"),
    ("gated_deltanet", "S_new", lambda e: e.subs(array("beta"), 2 * array("beta")), "not stationary"),
    ("gated_deltanet", "e", lambda e: -e, "not stationary"),
    ("kda", "S_p", lambda e: array("S", (j, i)), "not stationary"),
    ("mesanet", "P_new", lambda e: e / 3, "not stationary|not the"),
    ("longhorn", "c1", lambda e: 2 * e, "not stationary"),
    ("kdn", "Lambda_new", lambda e: 2 * e, "not the projection"),
]


@pytest.mark.parametrize(("model", "name", "change", "message"), WRONG)
def test_confirm_finds_a_wrong_recurrence(model, name, change, message):
    t = get(model).triple
    with pytest.raises(UnifyError, match=message):
        confirm(t, sizes=((2, 2),), recurrence=planted(t, name, change))


def test_confirm_finds_a_step_left_out():
    t = get("gated_deltanet").triple
    right = derive(t)
    kept = tuple(s if s.name != "S_new" else Assign(s.phase, s.name, s.dims, array("S_p", (j, i))) for s in right.steps)
    with pytest.raises(UnifyError, match="not stationary"):
        confirm(t, sizes=((2, 2),), recurrence=replace(right, steps=kept))


# -- the chunk-parallel form -------------------------------------------------------------------------------------------


@given(st.data())
@many
def test_chunked_is_the_loop(data):
    t = data.draw(triples())
    loop, fast = both(t)
    assume(fast.plan.chunked)
    x = data.draw(inputs(loop, longest=80))
    start = random_state(loop, x, 1)
    assert_same(everything(fast, x, initial_state=start), everything(loop, x, initial_state=start))


@pytest.mark.parametrize(
    "name", ["mamba2", "gla", "kda", "palimpsa", "palimpsa_key", "meta_gla", "meta_kda", "mesanet", "rwkv6"]
)
@given(st.lists(gates("mixed"), min_size=1, max_size=70), seeds)
def test_gates_of_both_extremes_side_by_side(name, g, seed):
    loop, fast = both(get(name).triple)
    x = random_inputs(loop, seed, B=1, T=len(g), H=1)
    x["g"] = torch.tensor(g, dtype=torch.float64).reshape(1, -1, 1, *[1] * (x["g"].ndim - 3)).expand_as(x["g"])
    assert_same(everything(fast, x), everything(loop, x))


@given(st.data())
@few
def test_gradients_are_those_of_finite_differences(data):
    loop, fast = both(data.draw(triples()))
    x = random_inputs(fast, data.draw(seeds), B=1, T=data.draw(st.integers(1, 6)), gates="moderate")
    assert check_gradients(fast, x, directions=1) < 1e-6


def gradients(op, x, start):
    """Gradients of a weighted sum of all that the op returns, by argument and by initial state."""
    point = {name: v.clone().requires_grad_() for name, v in {**x, **start}.items()}
    given = {name: point[name] for name in x}
    found = everything(op, given, initial_state=tuple(point[name] for name in start))
    total = sum((torch.linspace(-1, 2, v.numel(), dtype=v.dtype).view_as(v) * v).sum() for v in found.values())
    slopes = torch.autograd.grad(total, list(point.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(point, slopes, strict=True))


@given(st.data())
@few
def test_gradients_are_the_loop_s_at_every_gate(data):
    loop, fast = both(data.draw(triples(key=("free", "complement"))))  # a tempered key has a kink at g = 0
    assume(fast.plan.chunked)
    x = random_inputs(loop, data.draw(seeds), B=1, T=70)
    start = dict(zip(loop.state_type._fields, random_state(loop, x), strict=True))
    want, found = gradients(loop, x, start), gradients(fast, x, start)
    for name, slope in want.items():
        if slope.abs().max() > 1e-9:
            assert_close(found[name], slope, 1e-8, f"the gradient by {name}")
        else:  # rounding: nothing depends on it
            assert found[name].abs().max() < 1e-8


@given(st.data())
@few
def test_float32_follows_float64(data):
    _, fast = both(data.draw(triples()))
    x = random_inputs(fast, data.draw(seeds), gates="moderate")
    single = fast(**{name: v.float() for name, v in x.items()})
    assert single.dtype == torch.float32
    assert_close(single.double(), fast(**{name: v.float().double() for name, v in x.items()}), 1e-3, "o")


# -- state, batch and heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(st.data())
@few
def test_a_sequence_may_be_split_anywhere(backend, data):
    op = unify.compile(data.draw(triples()), backend)
    x = data.draw(inputs(op, longest=9))
    T = x["q"].shape[1]
    cut = data.draw(st.integers(1, T))
    state, parts = random_state(op, x, 2), []
    whole = everything(op, x, initial_state=state)
    for ends in [(0, cut), *((t, t + 1) for t in range(cut, T))]:
        parts.append(everything(op, tokens(op, x, *ends), initial_state=state))
        state = tuple(parts[-1][name] for name in op.state_type._fields)
    joined = {name: torch.cat([p[name] for p in parts], 1) for name in ("o", "variance")}
    assert_same({**parts[-1], **joined}, whole)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@given(st.data())
@few
def test_packed_sequences_are_each_alone(backend, data):
    op = unify.compile(data.draw(triples()), backend)
    x = data.draw(inputs(op, packed=True, longest=9))
    offsets = x.pop("cu_seqlens")
    start = random_state(op, x, 3, count=len(offsets) - 1)
    packed = everything(op, x, cu_seqlens=offsets, initial_state=start)
    for n, ends in enumerate(zip(offsets.tolist(), offsets[1:].tolist(), strict=False)):
        alone = everything(op, tokens(op, x, *ends), initial_state=tuple(s[n : n + 1] for s in start))
        cut = {name: v[:, slice(*ends)] if name in ("o", "variance") else v[n : n + 1] for name, v in packed.items()}
        assert_same(cut, alone)


@given(st.data())
@few
def test_batch_rows_and_heads_do_not_see_each_other(data):
    op = unify.compile(data.draw(triples()))
    x = random_inputs(op, data.draw(seeds), B=3, T=4, H=3)
    start = random_state(op, x)
    order = torch.tensor([2, 0, 1])
    found = everything(op, x, initial_state=start)
    for axis, dim in (("batch", 0), ("head", 2)):
        turned = tuple(s.index_select(min(dim, 1), order) for s in start)
        want = {
            name: v.index_select(dim if name in ("o", "variance") else min(dim, 1), order) for name, v in found.items()
        }
        assert_same(everything(op, permuted(op, x, axis, order), initial_state=turned), want, 1e-12)


@given(st.data())
@few
def test_a_call_changes_none_of_its_arguments(data):
    op = unify.compile(data.draw(triples()))
    x = random_inputs(op, data.draw(seeds), T=3)
    start = random_state(op, x)
    before = {name: v.clone() for name, v in x.items()}, [s.clone() for s in start]
    op(**x, initial_state=start, output_final_state=True, return_variance=True)
    assert all(torch.equal(x[name], v) for name, v in before[0].items())
    assert all(torch.equal(s, v) for s, v in zip(start, before[1], strict=True))


# -- precision, importance and variance --------------------------------------------------------------------------------

MOVING = {"curvature": ("key", "diagonal", "isotropic", "full"), "projection": ("keep", "diagonal"), "key": ("free",)}


@given(triples(**MOVING, dynamics=("power",)), seeds)
def test_importance_never_falls_below_the_prior(t, seed):
    op = unify.compile(t, "reference")
    x = random_inputs(op, seed, T=6)
    start = None
    for at in range(6):
        *_, start = op(**tokens(op, x, at, at + 1), initial_state=start, output_final_state=True)
        excess = getattr(start, "P" if "P" in start._fields else "Ibar")
        if "P" in start._fields:  # a matrix [..., K, K] or [..., K, K, V]
            matrix = excess if excess.ndim == 4 else excess.movedim(-1, 2)
            excess = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
        assert (excess >= -1e-12 * excess.abs().max()).all()


def last_variance(op, x, **options):
    return op(**x, return_variance=True, **options)[1][:, -1]


@given(triples(**MOVING), seeds, st.booleans())
def test_an_observation_never_raises_the_variance(t, seed, along):
    op = unify.compile(t, "reference")
    x = random_inputs(op, seed, T=2)
    start = random_state(op, x, seed)
    if along:  # read along what was written first
        x["q"] = x["k"][:, :: t.architecture.repeats]
    blind = {name: v * 0 if name in KEYS else v for name, v in x.items()}
    seen, unseen = (last_variance(op, y, initial_state=start) for y in (x, blind))
    assert (seen <= unseen * (1 + 1e-9)).all()


@given(triples(**MOVING, adaptive=(None,), forgetting=("fixed", "head", "key", "entry"), noise=("fixed",)), seeds)
def test_forgetting_returns_the_variance_to_the_prior(t, seed):
    op = unify.compile(t, "reference")
    x = random_inputs(op, seed, T=3)
    start = random_state(op, x, seed)
    x = {name: torch.full_like(v, -30.0) if name == "g" else v * 0 if name in KEYS else v for name, v in x.items()}
    spread = 1 / x.get("prior_precision", torch.ones(2, dtype=torch.float64))
    if t.prior.dynamics == "diffusion":  # nothing is left but the noise of one step
        spread = x["noise"]
    scale = t.architecture.scale or x["q"].shape[-1] ** -0.5
    want = scale**2 * (x["q"][:, -1] ** 2 * spread.reshape(2, -1)).sum(-1)
    found = last_variance(op, x, initial_state=start)
    assert_close(found, want[..., None].expand_as(found), 1e-9, "the variance")


PLAIN = {"curvature": ("none",), "adaptive": (None,), "dynamics": ("power",)}


@given(triples(**PLAIN), st.sampled_from((None, "value", "head")), seeds)
def test_metaplastic_without_importance_is_its_source(t, importance, seed):
    source, meta = unify.compile(t), unify.compile(t.metaplastic(importance))
    x = random_inputs(source, seed)
    zero = torch.zeros_like(random_inputs(meta)["importance"])
    assert_close(meta(**x, importance=zero), source(**x), 1e-12, "o")


def test_metaplastic_is_refused_where_the_precision_already_moves():
    moving = Triple(Architecture(value="observation", precision="head"), Posterior(curvature="key"))
    with pytest.raises(UnifyError, match="precision already moves"):
        moving.metaplastic()
