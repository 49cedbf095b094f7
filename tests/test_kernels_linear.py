"""The linear family's kernels against a float64 loop, forward and every gradient: in the interpreter, or on a GPU."""

import os
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from unify.kernels import chunk
from unify.kernels.linear import linear

SCALE = 0.3
PACKED = [0, 1, 64, 128, 128, 193]  # lengths 1, 63, 64, 0 and 65
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def loop(q, k, v, g, s0, offsets, before=False):
    """The recurrence, token by token."""
    shape = v.shape
    q, k, v, g = (x.flatten(0, 1) for x in (q, k, v, g if g.ndim == 4 else g[..., None]))
    out, ends = [], []
    for n, (start, end) in enumerate(pairwise(offsets)):
        S = s0[n]
        for t in range(start, end):
            new = g[t].exp()[..., None] * S + k[t][..., None] * v[t][:, None]
            out.append(SCALE * ((S if before else new) * q[t][..., None]).sum(-2))
            S = new
        ends.append(S)
    return torch.stack(out).view(shape), torch.stack(ends)


def gates(shape, make, kind):
    """Log decays of one sequence: everything from none to total, or all weak."""
    if kind == "weak":
        return -1e-3 * torch.rand(shape, generator=make, dtype=torch.float64)
    levels = torch.tensor([0.0, -1e-6, -0.05, -1.0, -30.0, -800.0], dtype=torch.float64)
    shares = torch.tensor([0.25, 0.3, 0.3, 0.09, 0.04, 0.02], dtype=torch.float64)
    return levels[torch.multinomial(shares, shape.numel(), replacement=True, generator=make)].view(shape)


def case(offsets, B, H, K, V, dtype, channels, kind="mixed", seed=0):
    """q, k, v, g and s0 in `dtype` (s0 no narrower than float32)."""
    make = torch.Generator().manual_seed(seed)
    T = offsets[-1] // B
    randn = lambda *s: torch.randn(s, generator=make, dtype=torch.float64)  # noqa: E731
    g = gates(torch.Size((B, T, H, K) if channels else (B, T, H)), make, kind)
    x = [y.to(dtype) for y in (randn(B, T, H, K), randn(B, T, H, K), randn(B, T, H, V), g)]
    return [*x, randn(len(offsets) - 1, H, K, V).to(torch.promote_types(dtype, torch.float32))]


def graded(f, inputs):
    """Outputs, then gradients of a random functional of all of them with respect to every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*inputs)
    make = torch.Generator().manual_seed(7)
    draw = lambda x: torch.randn(x.shape, generator=make).bfloat16().double().to(x.device)  # noqa: E731
    loss = sum(
        (x.double() * draw(x)).sum() for x in out
    )  # weights that every type holds: gradients come in the outputs' types
    return [*out, *torch.autograd.grad(loss, inputs)]


def agree(got, want, names, tolerance):
    for name, x, y in zip(names, got, want, strict=True):
        assert x.shape == y.shape, name
        error = ((x.detach().double().cpu() - y).norm() / y.norm().clamp_min(1e-30)).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"  # NaN is in no order


@pytest.fixture(autouse=True)
def _interpreted(request):
    """Where there is a GPU nothing is interpreted, and kernels take no CPU tensors."""
    if torch.cuda.is_available() and not request.node.get_closest_marker("gpu"):
        pytest.skip("runs in the interpreter; test_on_the_gpu is for this machine")


@pytest.fixture(params=["walked", "passed on"])
def schedule(request, monkeypatch):
    """Both ways from chunk to chunk, whatever the sizes; the second in steps of two chunks."""
    monkeypatch.setattr(chunk, "BUSY", 0 if request.param == "walked" else 10**9)
    monkeypatch.setattr(chunk, "PASS", (2, 16))


NAMES = ["o", "s_T", "dq", "dk", "dv", "dg", "ds0"]


def compare(offsets, B, H, K, V, dtype, channels, before, kind="mixed", device="cpu"):
    x = case(offsets, B, H, K, V, dtype, channels, kind)
    want = graded(lambda *a: loop(*a, offsets, before), [y.double() for y in x])
    at = torch.tensor(offsets, device=device)
    got = graded(lambda *a: linear(*a, at, scale=SCALE, before=before), [y.to(device) for y in x])
    assert got[0].dtype == dtype
    agree(got, want, NAMES, TOLERANCE[dtype])


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_sequences_with_all_gates_match_the_loop(poisoned, schedule, dtype, channels, before):
    compare([*PACKED, 193 + 300], 1, 1, 5, 3, dtype, channels, before)


@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
def test_half_precision_inputs_and_weak_gates(poisoned, channels):
    compare([0, 66, 132], 2, 2, 17, 33, torch.float16 if channels else torch.bfloat16, channels, False, "weak")


@pytest.mark.parametrize("K, V", [(40, 72), (1, 1)])
def test_several_blocks_of_channels_and_a_single_one(poisoned, K, V):
    compare([0, 5], 1, 1, K, V, torch.float32, True, False)


def test_total_decay_of_minus_infinity_forgets_and_stays_finite(poisoned):
    q, k, v, g, s0 = case([0, 70], 1, 1, 4, 4, torch.float64, False)
    g[:, 66] = -torch.inf
    at = torch.tensor([0, 70])
    cut, _ = linear(*(x[:, 66:] for x in (q, k, v, g)), torch.zeros_like(s0), torch.tensor([0, 4]), scale=SCALE)
    got = graded(lambda *a: linear(*a, at, scale=SCALE), (q, k, v, g, s0))
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got[0][:, 66:], cut)


def test_gradients_arrive_through_one_output_alone():
    x = [y.requires_grad_() for y in case([0, 9], 1, 1, 4, 4, torch.float64, False)]
    at = torch.tensor([0, 9])
    for which in (0, 1):
        got = torch.autograd.grad(linear(*x, at, scale=SCALE)[which].sum(), x)
        want = torch.autograd.grad(loop(*x, [0, 9])[which].sum(), x, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_planted_error_is_seen(monkeypatch):
    """A border one token late in the scores is enough for the comparison to fail."""
    body = chunk._read

    class Late:
        def __getitem__(self, grid):
            return lambda key, S, *rest, **options: body[grid](key, S.roll(1, 0), *rest, **options)

    compare([0, 65], 1, 1, 3, 2, torch.float64, False, False)
    monkeypatch.setattr(chunk, "_read", Late())
    with pytest.raises(AssertionError, match="o: relative error"):
        compare([0, 65], 1, 1, 3, 2, torch.float64, False, False)


def test_slots_hold_the_chunks_of_any_packing():
    make = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(0, 200, (int(torch.randint(1, 9, (), generator=make)),), generator=make)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        first = offsets // chunk.C + torch.arange(len(offsets))
        assert (first[:-1] + -(-lengths // chunk.C) <= first[1:]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mixed", "weak"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu(poisoned, schedule, dtype, channels, before, kind):
    compare(PACKED, 1, 2, 5, 3, dtype, channels, before, kind, "cuda")
    compare([0, 131, 262], 2, 3, 96, 192, dtype, channels, before, kind, "cuda")
