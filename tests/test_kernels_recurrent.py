"""Printed kernels of the recurrent family against the float64 token loop: every zoo model, forward and every gradient.

On a CPU they run in Triton's interpreter on small odd shapes; with the marker gpu, on the device at real sizes.
"""

import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")
import triton
import triton.language as tl

from unify.errors import UnifyError
from unify.kernels import recurrent
from unify.kernels.tile import solve
from unify.lower.triton import leaves
from unify.models.zoo import ZOO, get
from unify.op import compile
from unify.testing import random_inputs
from unify.triple import Architecture, Posterior, Prior, Squash, Triple


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Blocks so small that every loop over blocks and segments goes round more than once."""
    monkeypatch.setattr(recurrent, "TILE", 16)
    monkeypatch.setattr(recurrent, "EVERY", 4)
    monkeypatch.setenv("UNIFY_CACHE", str(tmp_path))


def symmetric(name, x):
    return (x + x.mT) / 2 if name == "P" else x


def results(op, inputs, state, weights, **options):
    """Outputs and gradients of a random functional of all of them."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    start = [x.detach().clone().requires_grad_() for x in state]
    o, variance, end = op(
        **leaves, initial_state=tuple(start), output_final_state=True, return_variance=True, **options
    )
    out = {"o": o, "variance": variance, **end._asdict()}
    loss = sum((x.to(torch.float64) * weights[n].to(x.device)).sum() for n, x in out.items())
    names = [*leaves, *(f"initial {n}" for n in end._fields)]
    grads = torch.autograd.grad(loss, [*leaves.values(), *start], allow_unused=True)
    zero = [torch.zeros_like(x) if g is None else g for x, g in zip([*leaves.values(), *start], grads, strict=True)]
    return out, {n: symmetric(n.split()[-1], g) for n, g in zip(names, zero, strict=True)}


def start_of(op, count, heads, keys, values, make):
    """A random legal state: positive where it is a precision, symmetric where it is a matrix."""
    out = []
    for s in op.recurrence.states:
        shape = [count, heads, *({"j": keys, "l": keys, "i": values}[str(d)] for d in s.dims)]
        x = torch.randn(shape, generator=make, dtype=torch.float64)
        out.append(x if s.name in "SM" else x @ x.mT if s.name == "P" else x.abs() + 0.5)
    return out


def compare(triple, lengths, H, K, V, device="cpu", dtype=torch.float64, seed=0):
    """Worst relative error of outputs and of gradients, kernels against the float64 loop, on packed sequences."""
    op, oracle = compile(triple, "triton"), compile(triple, "reference")
    make = torch.Generator().manual_seed(seed)
    inputs = random_inputs(oracle, seed=seed, B=1, T=sum(lengths), H=H, K=K, V=V)
    if "temperature" in inputs:  # (-g / tau) ** tau has no derivative where nothing is forgotten
        inputs["g"] = inputs["g"].clamp(max=-1e-3)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    state = start_of(oracle, len(lengths), H, K, V, make)
    # numbers that dtype holds: the cotangents of o and of the variance have it, and rounding them would be no error of a kernel
    drawn = lambda: torch.randn(1, sum(lengths), H, V, generator=make, dtype=torch.float64).to(dtype).double()  # noqa: E731
    weights = {"o": drawn(), "variance": drawn()}
    weights |= {
        s.name: symmetric(s.name, torch.randn(x.shape, generator=make, dtype=torch.float64))
        for s, x in zip(oracle.recurrence.states, state, strict=True)
    }
    cast = {n: x.to(dtype) for n, x in inputs.items()}
    exact = results(oracle, {n: x.double() for n, x in cast.items()}, state, weights, cu_seqlens=offsets)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = {n: x.to(device) for n, x in cast.items()}
    found = results(op, given, [x.to(device=device, dtype=wide) for x in state], weights, cu_seqlens=offsets.to(device))
    return [worst(e, f) for e, f in zip(exact, found, strict=True)]


def worst(exact: dict, found: dict) -> dict[str, float]:
    assert exact.keys() == found.keys()
    return {
        n: ((found[n].double().cpu() - x.cpu()).norm() / x.norm().clamp(min=1e-30)).nan_to_num(nan=torch.inf).item()
        for n, x in exact.items()
    }


@pytest.mark.parametrize("name", ZOO)
def test_kernels_equal_the_loop_forward_and_backward(name, small, poisoned):
    for errors in compare(get(name).triple, (1, 6), H=1, K=3, V=5):
        bad = {n: e for n, e in errors.items() if not e <= 1e-10}
        assert not bad


def test_what_is_never_written_is_nan(poisoned):
    x = torch.ones(2, dtype=torch.float32)
    assert torch.isnan(torch.empty_like(x)).all()
    assert torch.isnan(x.new_empty([3], dtype=torch.float64)).all()


def test_the_comparison_sees_a_wrong_number_and_a_nan():
    exact = {"o": torch.ones(3)}
    assert worst(exact, {"o": torch.ones(3) * (1 + 1e-6)})["o"] > 1e-7
    assert worst(exact, {"o": torch.tensor([1.0, torch.nan, 1.0])})["o"] == torch.inf


def test_a_wrong_kernel_is_seen(small, monkeypatch):
    """The same comparison with a leaf altered in the printed source."""
    from unify.lower import launch, triton

    printed = triton.module(compile(get("mamba2").triple).recurrence)
    wrong = replace(
        printed, source=printed.source.replace("S_p = alpha * S", "S_p = alpha * S * 1.001"), key=printed.key[::-1]
    )
    assert wrong.source != printed.source
    monkeypatch.setattr(launch, "module", lambda _: wrong)
    forward, backward = compare(get("mamba2").triple, (3,), H=1, K=2, V=2)
    assert min(max(forward.values()), max(backward.values())) > 1e-5


def test_long_enough_for_real_segments(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIFY_CACHE", str(tmp_path))
    for errors in compare(get("palimpsa").triple, (65,), H=1, K=2, V=3):
        assert max(errors.values()) <= 1e-10


@triton.jit
def _solved(matrix, right, out, K, BK: tl.constexpr):
    j = tl.arange(0, BK)
    inside = (j < K)[:, None] & (j < K)[None, :]
    square = tl.load(matrix + j[:, None] * K + j[None, :], mask=inside, other=0.0)
    square += tl.where((j[:, None] == j[None, :]) & ~inside, 1.0, 0.0)  # as a prior beside padding
    tl.store(out + j, solve(square, tl.load(right + j, mask=j < K, other=0.0), BK), mask=j < K)


@pytest.mark.parametrize("dtype, spread, tolerance", [(torch.float64, 3, 1e-9), (torch.float32, 1, 1e-5)])
def test_a_square_is_solved_as_closely_as_its_condition_allows(dtype, spread, tolerance):
    """Condition numbers of about 1e6 (in float32 100) that no diagonal takes away, channels of very different size besides."""
    make = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(21, 21, generator=make, dtype=torch.float64))
    even = turn * torch.logspace(-spread, spread, 21, dtype=torch.float64) @ turn.T
    sizes = torch.logspace(-1, 1, 21, dtype=torch.float64)
    matrix = (sizes[:, None] * even * sizes).to(dtype)
    for right in (torch.randn(21, generator=make, dtype=torch.float64), torch.full([21], 1e-30), torch.zeros(21)):
        _solved[(1,)](matrix, right.to(dtype), x := torch.full([21], torch.nan, dtype=dtype), 21, BK=32)
        want = torch.linalg.solve(matrix.double(), right.to(dtype).double())
        assert (x.double() - want).norm() <= tolerance * want.norm()
    _solved[(1,)](matrix, torch.full([21], torch.nan, dtype=dtype), x, 21, BK=32)
    assert x.isnan().all()


def test_a_new_architecture_needs_no_kernel(small):
    """A triple nobody has published: it gets a forward and a backward all the same."""
    triple = Triple(
        Architecture("key", value="observation", precision="value", importance="value", write_gate=True),
        Posterior("diagonal", "predicted", anchor_weight="key"),
        Prior("key", mean="entry"),
    )
    for errors in compare(triple, (5,), H=1, K=3, V=2):
        assert max(errors.values()) <= 1e-10


def test_a_constant_where_a_vector_is_expected(small):
    """Squash(base=1) makes the prior precision the constant 1."""
    triple = replace(get("preconditioned_gdn").triple, prior=Prior(adaptive=Squash(base=1.0)))
    forward, _ = compare(triple, (3,), H=1, K=3, V=2)
    assert max(forward.values()) <= 1e-10


def test_leaves_read_like_the_equations():
    text = leaves(compile(get("palimpsa").triple).recurrence)
    assert "# observe: M_new[j, i] = M_p[j, i] + k[j]*v[i]\n    M_new = M_p + k[:, None] * v[None, :]" in text


def test_a_full_precision_per_row_is_refused_with_a_way_out():
    triple = Triple(Architecture("head", value="observation", precision="value"), Posterior("full"))
    op = compile(triple, "triton")
    inputs = random_inputs(op, seed=0, B=1, T=2, H=1, K=2, V=2)
    with pytest.raises(UnifyError, match="backend='torch'"):
        op(**inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", ZOO)
def test_on_the_device(name, dtype, tolerance):
    for errors in compare(get(name).triple, (1, 63, 64, 65), H=2, K=24, V=40, device="cuda", dtype=dtype):
        assert max(errors.values()) <= tolerance, errors
