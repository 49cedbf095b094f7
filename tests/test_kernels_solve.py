"""The solve family's kernels against dense solves in float64, forward and every gradient: in the interpreter, or on a GPU."""

import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from test_kernels_linear import agree, gates, graded, in_pieces
from test_kernels_recurrent import compare as compare_op
from test_kernels_recurrent import results, worst

from unify.kernels import chunk
from unify.kernels import solve as kernels
from unify.kernels.solve import solve
from unify.lower import launch
from unify.models.zoo import get
from unify.op import compile
from unify.testing import random_inputs

PACKED = [0, 1, 64, 128, 128, 193]  # lengths 1, 63, 64, 0 and 65
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
NAMES = ["x", "P_T", "dq", "dk", "d_gain", "dg", "d_prior", "dp0"]


def dense(q, k, gain, g, prior, p0, offsets, before=False):
    """The recurrence, token by token, with a dense solve at each."""
    shape, diagonal = q.shape, torch.diag_embed(prior.expand(q.shape)).flatten(0, 1)
    q, k, gain, g = (x.flatten(0, 1) for x in (q, k, gain, g))
    out, ends = [], []
    for n, (start, end) in enumerate(pairwise(offsets)):
        P = p0[n]
        for t in range(start, end):
            new = g[t].exp()[:, None, None] * P + (gain[t, :, None] * k[t])[..., None] * k[t][:, None]
            out.append(torch.linalg.solve((P if before else new) + diagonal[t], q[t]))
            P = new
        ends.append(P)
    return torch.stack(out).view(shape), torch.stack(ends)


def case(offsets, B, H, K, dtype, token=False, kind="mixed", seed=0):
    """q, k, gain, g, prior and p0 in `dtype` (gain, prior and p0 no narrower than float32); a gain is 0 now and then. In float16
    they are what bfloat16 holds too: kernels multiply either half precision as bfloat16."""
    make = torch.Generator().manual_seed(seed)
    T, N, wide = offsets[-1] // B, len(offsets) - 1, torch.promote_types(dtype, torch.float32)
    randn = lambda *s: torch.randn(s, generator=make, dtype=torch.float64)  # noqa: E731
    gain = (torch.rand(B, T, H, generator=make, dtype=torch.float64) - 0.1).clamp_min(0)
    prior = torch.rand(*((B, T, H, 1) if token else (H, K)), generator=make, dtype=torch.float64) + 0.1
    root = randn(N, H, K, K)
    k = torch.nn.functional.normalize(randn(B, T, H, K), dim=-1) * 2
    half = torch.bfloat16 if dtype == torch.float16 else dtype
    narrow = [x.to(half).to(dtype) for x in (randn(B, T, H, K), k, gates(torch.Size((B, T, H)), make, kind))]
    p0 = (root @ root.mT / K).to(wide)
    return [*narrow[:2], gain.to(wide), narrow[2], prior.to(wide), (p0 + p0.mT) / 2]


def key_slopes(x, y, given, offsets, before):
    """dk [tokens, H, K] of a functional of x alone, of x and its adjoint y = (P + Lambda)^-1 dx, [tokens, H, K], float64."""
    _, k, gain, g, *_ = (z.double().flatten(0, 1) if z.ndim > 2 else z for z in given)
    out = torch.zeros_like(k)
    for start, end in pairwise(offsets):
        D = torch.zeros(*k.shape[1:], k.shape[2], dtype=torch.float64)  # adjoint of P behind the token
        for t in reversed(range(start, end)):
            seen = -y[t][..., None] * x[t][:, None]
            D = D if before else D + seen
            out[t] = gain[t, :, None] * ((D + D.mT) @ k[t][..., None])[..., 0]
            D = g[t].exp()[:, None, None] * D
            D = D + seen if before else D
    return out


def rounded_solutions(given, want, offsets, before, dtype=torch.bfloat16):
    """Relative error of dk if x and y were right but for their rounding to `dtype`: what is left to a kernel that multiplies in
    it. Ours does so in bfloat16 for either half precision, as an adjoint may be anything float16 has no room for.

    want: `graded` of the recurrence in float64.
    """
    x, y = (want[NAMES.index(name)].flatten(0, 1) for name in ("x", "dq"))
    coarse = (z.to(dtype).double() for z in (x, y))
    change = key_slopes(*coarse, given, offsets, before) - key_slopes(x, y, given, offsets, before)
    return (change.norm() / want[NAMES.index("dk")].norm()).item()


@pytest.fixture(autouse=True)
def _interpreted(request):
    """Where there is a GPU nothing is interpreted, and kernels take no CPU tensors."""
    if torch.cuda.is_available() and not request.node.get_closest_marker("gpu"):
        pytest.skip("runs in the interpreter; the tests marked gpu are for this machine")


def compare(x, offsets, before=False, device="cpu", tolerance=None):
    """Against the float64 recurrence. dk in half precision: within twice what rounding x and y costs, where that is more."""
    want = graded(lambda *a: dense(*a, offsets, before), [y.double() for y in x])
    at = torch.tensor(offsets, device=device)
    got = graded(lambda *a: solve(*a, at, before=before), [y.to(device) for y in x])
    assert got[0].dtype == x[0].dtype
    tolerance = tolerance or TOLERANCE[x[0].dtype]
    if x[0].element_size() == 2:
        n, limit = NAMES.index("dk"), max(tolerance, 2 * rounded_solutions(x, want, offsets, before))
        agree(got[n : n + 1], want[n : n + 1], ["dk"], limit)
        got, want = ([*z[:n], *z[n + 1 :]] for z in (got, want))
        agree(got, want, [*NAMES[:n], *NAMES[n + 1 :]], tolerance)
    else:
        agree(got, want, NAMES, tolerance)


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("token", [False, True], ids=["channels", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_sequences_with_all_gates_match_dense_solves(poisoned, dtype, token, before):
    compare(case(PACKED, 1, 1, 5, dtype, token), PACKED, before)


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_memories_carried_in_pieces(poisoned, monkeypatch, before):
    in_pieces(monkeypatch, 5)
    offsets = [*PACKED, 193 + 130]
    compare(case(offsets, 1, 2, 5, torch.float64), offsets, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_and_weak_gates(poisoned, dtype):
    offsets = [0, 66, 132]
    compare(case(offsets, 2, 2, 17, dtype, kind="weak"), offsets)


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_what_rounding_the_solutions_costs(before):
    """The formula is autograd's gradient where nothing is rounded, three bits less cost more than 4 times as much, float64 nothing."""
    given = [y.double() for y in case(PACKED, 1, 2, 8, torch.bfloat16, True)]
    leaves = [y.clone().requires_grad_() for y in given]
    x, _ = dense(*leaves, PACKED, before)
    dq, dk = torch.autograd.grad((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum(), leaves[:2])
    torch.testing.assert_close(key_slopes(x.detach()[0], dq[0], given, PACKED, before), dk[0])
    want = [x.detach(), None, dq, dk]
    costs = [rounded_solutions(given, want, PACKED, before, d) for d in (torch.bfloat16, torch.float16, torch.float64)]
    assert costs[0] > 4 * costs[1] > costs[2] == 0


@pytest.mark.parametrize("K", [40, 1])
def test_several_blocks_of_channels_and_a_single_one(poisoned, K):
    compare(case([0, 5], 1, 1, K, torch.float32), [0, 5])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_weak_priors_and_strong_keys(poisoned, dtype, tolerance):
    """Condition numbers from 1e3 to 3e6 (in float32 70 to 1e3), which magnify rounding by as much."""
    q, k, gain, g, prior, p0 = case([0, 70], 1, 1, 9, torch.float64, kind="weak")
    strong, weak = (30, 1e-6) if dtype == torch.float64 else (3, 1e-2)
    k = strong * k * torch.logspace(0, -1.5, 9, dtype=torch.float64)
    compare([y.to(dtype) for y in (q, k, gain, g, weak * prior, p0)], [0, 70], tolerance=tolerance)


def test_a_memory_wider_than_the_operands_keeps_its_digits(monkeypatch):
    """Half-precision operands, float16 because the interpreter multiplies it, and a memory too stiff to be held so."""
    x, at = case([0, 90], 1, 1, 6, torch.float16, kind="weak"), torch.tensor([0, 90])
    x = [y.float() for y in (*x[:5], x[5] + 100)]
    want = graded(lambda *a: dense(*a, [0, 90]), [y.double() for y in x])
    layout, walk = chunk.layout, chunk.walk
    monkeypatch.setattr(chunk, "layout", lambda *a: layout(*a)._replace(work=torch.float16))
    monkeypatch.setitem(chunk.TYPES, torch.float16, kernels.tl.float16)
    monkeypatch.setitem(kernels.TOLERANCE, torch.float16, 1e-5)
    agree(graded(lambda *a: solve(*a, at), x), want, NAMES, 1e-3)
    monkeypatch.setattr(chunk, "walk", lambda *a, keep, **k: walk(*a, **k))
    with pytest.raises(AssertionError, match="x: relative error"):
        agree(graded(lambda *a: solve(*a, at), x), want, NAMES, 1e-2)


def test_channels_of_different_size_cost_no_more_steps():
    """The diagonal preconditioner: a diagonal system takes one step, and scaling the channels takes none."""
    q, k, gain, g, prior, p0 = case([0, 40], 1, 1, 6, torch.float64, kind="weak")
    size = torch.logspace(0, -3, 6, dtype=torch.float64)
    onehot = torch.nn.functional.one_hot(torch.arange(40) % 6, 6).double()[None, :, None] * size
    x = [q, onehot, gain, g, prior, torch.diag_embed(p0.diagonal(dim1=-2, dim2=-1))]
    at = torch.tensor([0, 40])
    torch.testing.assert_close(solve(*x, at, steps=1)[0], dense(*x, [0, 40])[0])

    even = solve(q, k, gain, g, prior, p0, at, steps=4)[0]
    scaled = (q * size, k * size, gain, g, prior * size**2, p0 * size[:, None] * size)
    torch.testing.assert_close(solve(*scaled, at, steps=4)[0] * size, even)
    assert not torch.allclose(even, dense(q, k, gain, g, prior, p0, [0, 40])[0], rtol=1e-4)  # four steps are too few


def test_queries_of_any_size_and_of_none(poisoned):
    """Their squares leave float32's range; a query of 0 has the solution 0, and a gradient all the same."""
    q, *system = case([0, 20], 1, 1, 5, torch.float32, kind="weak")
    at = torch.tensor([0, 20])
    whole = solve(q, *system, at)[0]
    for size in (1e-30, 1e30):
        torch.testing.assert_close(solve(q * size, *system, at)[0] / size, whole)
    q[:, 7] = 0
    compare([q, *system], [0, 20])


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's word on inf / inf, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_queries_stay_bad_and_alone(bad):
    q, *system = case([0, 20], 1, 1, 5, torch.float64, kind="weak")
    good = solve(q, *system, torch.tensor([0, 20]))[0]
    q[:, 7, :, 2] = bad
    x = solve(q, *system, torch.tensor([0, 20]))[0]
    assert not x[:, 7].isfinite().any()
    torch.testing.assert_close(x[:, 8:], good[:, 8:])
    torch.testing.assert_close(x[:, :7], good[:, :7])


def test_total_decay_of_minus_infinity_forgets_and_stays_finite(poisoned):
    q, k, gain, g, prior, p0 = case([0, 70], 1, 1, 4, torch.float64, kind="weak")
    g[:, 66] = -torch.inf
    at = torch.tensor([0, 70])
    cut, _ = dense(*(x[:, 66:] for x in (q, k, gain, g)), prior, torch.zeros_like(p0), [0, 4])
    got = graded(lambda *a: solve(*a, at), (q, k, gain, g, prior, p0))
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got[0][:, 66:], cut)


def test_gradients_arrive_through_one_output_alone():
    x = [y.requires_grad_() for y in case([0, 9], 1, 1, 4, torch.float64)]
    at = torch.tensor([0, 9])
    for which in (0, 1):
        got = torch.autograd.grad(solve(*x, at)[which].sum(), x)
        want = torch.autograd.grad(dense(*x, [0, 9])[which].sum(), x, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_planted_error_is_seen(monkeypatch):
    """Gates one token late in the solve are enough for the comparison to fail."""
    body, x = kernels._solve, case([0, 65], 1, 1, 3, torch.float64)

    class Late:
        def __getitem__(self, grid):
            return lambda *a, **options: body[grid](*a[:5], a[5].roll(1, 0), *a[6:], **options)

    compare(x, [0, 65])
    monkeypatch.setattr(kernels, "_solve", Late())
    with pytest.raises(AssertionError, match="x: relative error"):
        compare(x, [0, 65])


@pytest.mark.parametrize("token", [False, True], ids=["channels", "tokens"])
def test_operators_are_registered_soundly(token):
    x = [y.requires_grad_() for y in case([0, 3, 8], 1, 1, 4, torch.float32, token)]
    torch.library.opcheck(torch.ops.unify.solve.default, (*x, torch.tensor([0, 3, 8]), False, kernels.STEPS))


def variant(read, repeats=1, mix=False):
    """MesaNet's triple with another read-out."""
    triple = get("mesanet").triple
    return replace(triple, architecture=replace(triple.architecture, read=read, repeats=repeats, mix=mix))


@pytest.mark.parametrize("read, repeats, mix", [("before", 1, False), ("after", 2, True), ("before", 2, False)])
def test_every_read_that_structure_allows(read, repeats, mix, monkeypatch):
    called, whole = [], launch.Kernels.solve
    monkeypatch.setattr(launch.Kernels, "solve", lambda self, *a, **k: called.append(k) or whole(self, *a, **k))
    for errors in compare_op(variant(read, repeats, mix), (40, 33), H=1, K=3, V=5, seed=1):
        assert max(errors.values()) <= 1e-10, errors
    assert called[0]["before"] == (read == "before")
    assert (called[0]["mix"] is not None) == mix


def test_a_ridge_of_nothing_seen_yet():
    """Where P = 0 both backends solve with 1 instead, and every gradient is finite."""
    triple = get("gated_kalmanet").triple
    inputs = random_inputs(compile(triple, "torch"), B=1, T=40, H=1, K=3, V=2, gates="moderate")
    inputs["beta"][:, :9] = 0
    state = [torch.zeros(1, 1, 3, 2 if s.name == "M" else 3).double() for s in compile(triple).recurrence.states]
    weights = {"o": torch.ones(1), "variance": torch.ones(1), "M": torch.ones(1), "P": torch.eye(3)}
    both = [results(compile(triple, backend), inputs, state, weights) for backend in ("torch", "triton")]
    for want, found in zip(*both, strict=True):
        for name, x in want.items():
            torch.testing.assert_close(found[name], x, msg=name)


def test_keys_too_wide_for_a_program_run_recurrently(monkeypatch):
    at = lambda K, dtype: kernels.fits(torch.empty(1, K, dtype=dtype, device="meta"))  # noqa: E731
    assert [at(128, torch.bfloat16), at(128, torch.float32), at(64, torch.float64)] == [True] * 3
    assert [at(129, torch.bfloat16), at(129, torch.float32), at(65, torch.float64)] == [False] * 3
    monkeypatch.setattr(kernels, "WIDEST", 16)
    monkeypatch.setattr(launch.Kernels, "solve", None)
    for errors in compare_op(get("mesanet").triple, (40,), H=1, K=3, V=2):
        assert max(errors.values()) <= 1e-10, errors


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mixed", "weak"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("token", [False, True], ids=["channels", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu(poisoned, dtype, token, before, kind):
    compare(case(PACKED, 1, 2, 5 if dtype == torch.float32 else 64, dtype, token, kind), PACKED, before, "cuda")
    compare(case([0, 131, 262], 2, 3, 96, dtype, token, kind), [0, 131, 262], before, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes_on_the_gpu(dtype):
    """MesaNet whole, against float64 elimination on the same device (the torch backend, tested against the token loop)."""
    B, T, H, K, V = 2, 4096, 16, 128, 128
    make = torch.Generator("cuda").manual_seed(0)
    rand = lambda *s: torch.rand(s, generator=make, device="cuda", dtype=torch.float64)  # noqa: E731
    randn = lambda *s: torch.randn(s, generator=make, device="cuda", dtype=torch.float64)  # noqa: E731
    unit = lambda: torch.nn.functional.normalize(randn(B, T, H, K), dim=-1)  # noqa: E731
    inputs = {"q": unit(), "k": unit(), "v": randn(B, T, H, V), "g": -0.05 * rand(B, T, H), "beta": rand(B, T, H)}
    inputs = {n: x.to(dtype) for n, x in (inputs | {"prior_precision": rand(H, K) + 0.25}).items()}
    root, M = randn(B, H, K, K), randn(B, H, K, V)
    narrow = lambda *s: randn(*s).bfloat16().double()  # noqa: E731
    weights = {"o": narrow(B, T, H, V), "variance": narrow(B, T, H, V), "M": randn(B, H, K, V)}
    weights["P"] = torch.eye(K, device="cuda", dtype=torch.float64).expand(B, H, K, K)
    op = compile(get("mesanet").triple, "triton")
    state = [{"M": M, "P": root @ root.mT / K}[s.name] for s in op.recurrence.states]
    exact = results(
        compile(op.triple, "torch"),
        {n: x.double() for n, x in inputs.items()},
        [x.float().double() for x in state],
        weights,
    )
    found = results(op, inputs, [x.float() for x in state], weights)
    for e, f in zip(exact, found, strict=True):
        errors = worst(e, f)
        assert max(errors.values()) <= TOLERANCE[dtype], errors
