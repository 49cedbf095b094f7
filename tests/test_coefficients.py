"""Printed coefficient kernels against the same expressions on torch, evaluated for each sequence by itself."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from test_kernels_recurrent import start_of

from unify.kernels import coefficients as kernels
from unify.lower import coefficients, launch, parallel
from unify.models.zoo import ZOO, get
from unify.op import compile
from unify.testing import random_inputs, triples
from unify.triple import Architecture, Posterior, Prior, Triple

CHUNKED = [name for name in ZOO if compile(get(name).triple).plan.chunked]
EXTRA = {
    "one number": Triple(
        Architecture("fixed", value="observation"), Posterior("isotropic", "predicted"), Prior("head")
    ),
    "one number, two observations": Triple(
        Architecture("head", importance="head", precision="value", value="observation", repeats=2),
        Posterior("isotropic"),
        Prior("key"),
    ),
    "by value": Triple(
        Architecture("head", importance="value", precision="value", value="observation"),
        Posterior("isotropic"),
        Prior(),
    ),
    "by value, divided at the read": Triple(
        Architecture("head", importance="value", repeats=2), Posterior("isotropic"), Prior("key")
    ),
    "two observations": Triple(
        Architecture("key", importance="head", value="observation", repeats=2),
        Posterior("key", "predicted"),
        Prior("key"),
    ),
}
LENGTHS = (1, 7, 8, 9, 41)  # of blocks of 8 tokens; the last is longer than the scan over blocks takes at a time


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Blocks so small that every loop goes round more than once."""
    for name, value in {"STATEFUL": 8, "STATELESS": 4, "BLOCKS": 4, "CHANNELS": 2}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setenv("UNIFY_CACHE", str(tmp_path))


def case(triple, lengths, H, K, V, seed=0):
    """Random arguments with gates near 0, of -1e-6 and of -30, and random legal initial states."""
    op, make = compile(triple), torch.Generator().manual_seed(seed)
    inputs = random_inputs(op, seed=seed, B=1, T=sum(lengths), H=H, K=K, V=V)
    for name in {"g", "g_importance"} & inputs.keys():
        kind = torch.rand(inputs[name].shape, generator=make)
        inputs[name] = torch.where(kind < 0.2, -30.0, torch.where(kind < 0.4, -1e-6, inputs[name]))
        if "temperature" in inputs:  # (-g / tau) ** tau has no derivative where nothing is forgotten
            inputs[name] = inputs[name].clamp(max=-1e-3)
    return op, inputs, tuple(start_of(op, len(lengths), H, K, V, make))


def fused(op, inputs, state, offsets):
    """What the kernels compute, by name: coefficients and last small states."""
    schedule = launch.Kernels(offsets, op.plan.micro)
    seq = parallel.Sequence(request(op), inputs, state, 0.7, schedule)
    return {name: seq.lay(name) for name in seq.ready} | seq.final


def request(op, variance=True):
    return parallel.request(op.recurrence, op.structure, op.plan.family, variance)


def apart(op, inputs, state, offsets, names):
    """The same on torch, each sequence by itself."""
    per, n, parts = {x.name: x.per for x in op.recurrence.inputs}, op.triple.architecture.repeats, []
    for at, (a, b) in enumerate(pairwise(offsets.tolist())):
        times = {"token": 1, "observation": n}
        cut = {k: x if per[k] == "static" else x[:, a * times[per[k]] : b * times[per[k]]] for k, x in inputs.items()}
        start = tuple(x[at : at + 1] for x in state)
        seq = parallel.Sequence(request(op), cut, start, 0.7, parallel.Chunked())
        for name in seq.small:
            seq[name]
        parts.append({name: seq.lay(name) if seq.asks(name) else seq.final[name] for name in names})
    states = {x.name for x in op.recurrence.states}
    return {name: torch.cat([x[name] for x in parts], 0 if name in states else 1) for name in names}


def with_gradients(run, inputs, state, seed=0):
    """Named results and gradients of a random functional of them."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    start = [x.detach().clone().requires_grad_() for x in state]
    out = run(leaves, tuple(start))
    make, loss = torch.Generator().manual_seed(seed), 0.0
    for n in sorted(out):
        weight = torch.randn(out[n].shape, generator=make).bfloat16().to(out[n].device)  # the same in every type
        loss = loss + (out[n].double() * weight).sum()
    every = {**leaves, **{f"initial {s}": x for s, x in enumerate(start)}}
    grads = torch.autograd.grad(loss, list(every.values()), allow_unused=True)
    zeros = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(every.items(), grads, strict=True)}
    return out, zeros


def worst(triple, lengths=LENGTHS, H=1, K=3, V=5, dtype=torch.float64, device="cpu", seed=0):
    """Worst relative error of what the kernels compute, and of gradients, and what they computed."""
    op, inputs, state = case(triple, lengths, H, K, V, seed)
    inputs = {n: x.to(dtype) for n, x in inputs.items()}
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    there, wide = offsets.to(device), torch.promote_types(dtype, torch.float32)
    given = {n: x.to(device) for n, x in inputs.items()}, tuple(x.to(device, wide) for x in state)
    names = fused(op, *given, there).keys()
    if not names:
        return 0.0, set()
    found = with_gradients(lambda x, s: fused(op, x, s, there), *given)
    for x in request(op).asked.values():
        assert x.name not in names or found[0][x.name].dtype == (dtype if x.factor else wide)
    double = {n: x.double() for n, x in inputs.items()}
    exact = with_gradients(lambda x, s: apart(op, x, s, offsets, names), double, state)
    errors = [0.0]
    for want, got in zip(exact, found, strict=True):
        for n, x in want.items():
            error = (got[n].double().cpu() - x).norm() / x.norm().clamp(min=1e-30)
            errors.append(error.nan_to_num(nan=torch.inf).item())
    return max(errors), set(names)


@pytest.mark.parametrize("name", [*CHUNKED, *EXTRA])
def test_coefficients_and_gradients_equal_torch(name, small, poisoned):
    error, _ = worst(EXTRA[name] if name in EXTRA else get(name).triple)
    assert error <= 1e-12


@pytest.mark.parametrize("name", ["palimpsa_key", "meta_kda", "gated_deltaproduct", "rwkv6"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_narrow_types(name, dtype, tolerance, small):
    """Arguments and factors in the caller's type, sums in float32."""
    error, _ = worst(get(name).triple, (1, 20), dtype=dtype)
    assert 1e-9 < error <= tolerance


@given(triples(), st.integers(0, 2**31))
@settings(max_examples=10)
def test_any_triple(triple, seed):
    assume(triple.architecture.key != "tempered" and compile(triple).plan.chunked)
    assert worst(triple, (1, 9), seed=seed)[0] <= 1e-11


def test_what_is_computed_together_and_what_is_left(small):
    done = lambda name: worst(get(name).triple, (2,))[1]  # noqa: E731
    assert done("palimpsa_key") == {"query", "variance", "Ibar"}
    assert done("meta_gdn") == {"g", "key", "read", "variance", "Ibar"}
    assert done("kdn") == {"read"}  # a nonlinear state is torch's
    plain = compile(get("mamba2").triple)
    assert coefficients.module(request(plain, False)) is None


def test_blocks_of_real_size(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIFY_CACHE", str(tmp_path))
    R = kernels.STATEFUL
    assert worst(get("palimpsa_key").triple, (1, 2, 3, R - 1, R, R + 1, 2 * R + 1), H=2)[0] <= 1e-12


@pytest.mark.parametrize("name", ["palimpsa_key", "meta_gdn", "meta_kda", "gated_deltanet", "kda", "two observations"])
def test_nothing_is_read_from_another_sequence(name, small):
    """Rows are asked for several tokens at a time: every other sequence is NaN, at all of its tokens and in its states."""
    lengths = (2, 1, 1, 2, 9, 3, 1, 7, 1, 8, 2, 9, 1, 15, 1, 17, 3)
    op, inputs, state = case(EXTRA[name] if name in EXTRA else get(name).triple, lengths, 1, 3, 5)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    fixed = {x.name for x in op.recurrence.inputs if x.per == "static"}
    clean = torch.arange(len(lengths)) % 2 == 1
    tokens = clean.repeat_interleave(torch.tensor(lengths))

    def part(x):
        """What belongs to the clean sequences: of a row for each sequence, or of one or more for each token."""
        return x[clean] if x.shape[0] > 1 else x[:, tokens.repeat_interleave(x.shape[1] // len(tokens))]

    def spoilt(x):
        of = clean if x.shape[0] > 1 else tokens.repeat_interleave(x.shape[1] // len(tokens))[None]
        return torch.where(of.reshape(*of.shape, *[1] * (x.ndim - of.ndim)), x, torch.nan)

    around = {k: x if k in fixed else spoilt(x) for k, x in inputs.items()}
    want = with_gradients(lambda x, s: fused(op, x, s, offsets), inputs, state)
    got = with_gradients(lambda x, s: fused(op, x, s, offsets), around, [spoilt(x) for x in state])
    for a, b in zip(want, got, strict=True):
        assert all(torch.equal(part(a[k]), part(b[k])) for k in a.keys() - fixed)


def test_results_repeat(small):
    op, inputs, state = case(get("meta_kda").triple, (9, 20), 2, 3, 5)
    offsets = torch.tensor([0, 9, 29])
    one, two = (with_gradients(lambda x, s: fused(op, x, s, offsets), inputs, state) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("wrong", ["evaluate", "backward"])
def test_a_wrong_kernel_is_seen(wrong, small, monkeypatch):
    """The same comparison with one line altered in the printed source."""
    before, after = {
        "evaluate": ("Ibar = tl.exp(Ibar_log) * Ibar +", "Ibar = 1.0001 * tl.exp(Ibar_log) * Ibar +"),
        "backward": ("d_Ibar_drive = tl.exp(Ibar_log) *", "d_Ibar_drive = 1.0001 * tl.exp(Ibar_log) *"),
    }[wrong]
    whole = coefficients.module

    def altered(request):
        printed = whole(request)
        assert before in printed.source
        return replace(printed, source=printed.source.replace(before, after), key=f"{wrong}{printed.key}")

    monkeypatch.setattr(coefficients, "module", altered)
    assert worst(get("palimpsa_key").triple)[0] > 1e-6


def test_the_comparison_sees_a_nan(small, monkeypatch):
    whole = launch.Kernels.coefficients

    def spoiled(self, seq):
        ready, final = whole(self, seq)
        return {n: x * torch.nan for n, x in ready.items()}, final

    monkeypatch.setattr(launch.Kernels, "coefficients", spoiled)
    assert worst(get("palimpsa_key").triple, (3,))[0] == torch.inf


def test_kernels_read_like_the_equations():
    op = compile(get("palimpsa_key").triple)
    printed = coefficients.module(request(op))
    lines = [x.strip() for x in printed.source.splitlines()]
    for equation, code in (
        ("# observe: Ibar_new[j] = Ibar_p[j] + importance*k[j]**2", "Ibar_new = Ibar_p + importance * square(k)"),
        (
            "# inverse: inverse_1[j] = 1/(prior_precision + Ibar_new[j])",
            "inverse_1 = 1 / (prior_precision + Ibar_new)",
        ),
        ("# coefficient: c_query[j] = inverse_1[j]*q[j]", "c_query = inverse_1 * q"),
    ):
        assert lines[lines.index(equation) + 1] == code


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", [*CHUNKED, *EXTRA])
def test_on_the_device(name, dtype, tolerance):
    triple = EXTRA[name] if name in EXTRA else get(name).triple
    error, _ = worst(triple, (1, 31, 32, 33, 700, 2051), H=4, K=96, V=192, dtype=dtype, device="cuda")
    assert error <= tolerance
