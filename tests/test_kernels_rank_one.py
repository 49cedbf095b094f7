"""The rank-one family's kernels against a float64 loop, forward and every gradient: in the interpreter, or on a GPU."""

import os
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

import triton.language as tl

from unify.kernels import rank_one as kernels
from unify.kernels.rank_one import rank_one

SCALE = 0.3
PACKED = [0, 1, 64, 128, 193]  # lengths 1, 63, 64 and 65
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}
NAMES = "q r w k v g s0".split()


def loop(q, r, w, k, v, g, s0, offsets, before=False):
    """The recurrence, token by token."""
    shape = v.shape
    q, r, w, k, v, g = (x.flatten(0, 1) for x in (q, r, w, k, v, g if g.ndim == 4 else g[..., None]))
    out, ends = [], []
    for n, (start, end) in enumerate(pairwise(offsets)):
        S = s0[n]
        for t in range(start, end):
            y = (S * r[t][..., None]).sum(-2, keepdim=True)
            new = g[t].exp()[..., None] * S + k[t][..., None] * v[t][:, None] - w[t][..., None] * y
            out.append(SCALE * ((S if before else new) * q[t][..., None]).sum(-2))
            S = new
        ends.append(S)
    return torch.stack(out).view(shape), torch.stack(ends)


def case(offsets, B, H, K, V, dtype, channels, kind="mixed", seed=0):
    """Inputs by name; gates are everything from none to total in one sequence, or all weak. Keys have length 1 or less."""
    make = torch.Generator().manual_seed(seed)
    T = offsets[-1] // B
    randn = lambda *s: torch.randn(s, generator=make, dtype=torch.float64)  # noqa: E731
    unit = lambda: torch.nn.functional.normalize(randn(B, T, H, K), dim=-1)  # noqa: E731
    shape = torch.Size((B, T, H, K) if channels else (B, T, H))
    levels = torch.tensor([0.0, -1e-6, -0.05, -1.0, -30.0, -800.0], dtype=torch.float64)
    shares = torch.tensor([0.25, 0.3, 0.3, 0.09, 0.04, 0.02], dtype=torch.float64)
    mixed = levels[torch.multinomial(shares, shape.numel(), replacement=True, generator=make)].view(shape)
    g = mixed if kind == "mixed" else -1e-3 * torch.rand(shape, generator=make, dtype=torch.float64)
    x = {"q": randn(B, T, H, K), "r": unit(), "w": unit(), "k": unit(), "v": randn(B, T, H, V), "g": g}
    x = {name: y.to(dtype) for name, y in x.items()}
    return x | {"s0": randn(len(offsets) - 1, H, K, V).to(torch.promote_types(dtype, torch.float32))}


def graded(f, inputs, shared):
    """Outputs, then gradients of a random functional of all of them with respect to every input."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if not (shared and name == "k")}
    out = f(**inputs, **({"k": inputs["w"]} if shared else {}))
    make = torch.Generator().manual_seed(7)
    draw = lambda x: torch.randn(x.shape, generator=make).bfloat16().double().to(x.device)  # noqa: E731
    loss = sum(
        (x.double() * draw(x)).sum() for x in out
    )  # weights that every type holds: gradients come in the outputs' types
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return {"o": out[0], "s_T": out[1]} | {f"d{name}": x for name, x in zip(inputs, grads, strict=True)}


def compare(offsets, B, H, K, V, dtype, channels, before=False, shared=False, kind="mixed", device="cpu"):
    x = case(offsets, B, H, K, V, dtype, channels, kind)
    want = graded(lambda **a: loop(**a, offsets=offsets, before=before), {n: y.double() for n, y in x.items()}, shared)
    at = torch.tensor(offsets, device=device)
    moved = {n: y.to(device) for n, y in x.items()}
    got = graded(lambda **a: rank_one(**a, offsets=at, scale=SCALE, before=before), moved, shared)
    assert got["o"].dtype == dtype
    for name, y in want.items():
        assert got[name].shape == y.shape, name
        error = ((got[name].detach().double().cpu() - y).norm() / y.norm().clamp_min(1e-30)).item()
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}"  # NaN is in no order


@pytest.fixture(autouse=True)
def _interpreted(request):
    """Where there is a GPU nothing is interpreted, and kernels take no CPU tensors."""
    if torch.cuda.is_available() and not request.node.get_closest_marker("gpu"):
        pytest.skip("runs in the interpreter; test_on_the_gpu is for this machine")


@pytest.mark.parametrize("shared", [False, True], ids=["own keys", "one key"])
@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
def test_packed_sequences_with_all_gates_match_the_loop(poisoned, channels, shared):
    compare(PACKED, 1, 1, 5, 3, torch.float64 if shared else torch.float32, channels, before=False, shared=shared)


@pytest.mark.parametrize("shared", [False, True], ids=["own keys", "one key"])
def test_reads_before_the_update(poisoned, shared):
    compare([0, 2, 67], 1, 1, 4, 3, torch.float64, not shared, before=True, shared=shared)


@pytest.mark.parametrize("K", [17, 72], ids=["keys at once", "keys in blocks"])
@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
def test_several_blocks_of_channels(poisoned, channels, K):
    compare([0, 5], 1, 1, K, 40, torch.float32, channels)


def test_half_precision_inputs_and_weak_gates(poisoned):
    compare([0, 66, 132], 2, 1, 17, 33, torch.bfloat16, False, shared=True, kind="weak")


def test_nothing_erased_is_the_linear_family():
    """With w = 0 the transition has no rank-one part."""
    from unify.kernels.linear import linear

    x = case([0, 70], 1, 1, 4, 3, torch.float64, True)
    x["w"] = torch.zeros_like(x["w"])
    at = torch.tensor([0, 70])
    got = rank_one(**x, offsets=at, scale=SCALE)
    want = linear(x["q"], x["k"], x["v"], x["g"], x["s0"], at, scale=SCALE)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("split", [True, False])
def test_scores_in_half_precision_are_inverted_as_sums_of_two(split):
    """In float16, as the interpreter multiplies no bfloat16; that the rests matter is shown by leaving out what they add."""
    H, lengths = 2, (64, 37)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    keys = torch.nn.functional.normalize(
        torch.randn(sum(lengths), H, 8, generator=torch.Generator().manual_seed(3)), dim=-1
    )
    A, found = torch.zeros(sum(lengths), H, 64, dtype=torch.float16), torch.full((sum(lengths), H, 64), torch.nan)
    for start, end in pairwise(offsets.tolist()):
        k = keys[start:end].transpose(0, 1)
        A[start:end, :, : end - start] = (1.8 * k @ k.mT).tril(-1).half().transpose(0, 1)
    types = (tl.float16, tl.float32) if split else (tl.float16, tl.float16)
    kernels._invert[2, H](A, found, offsets, 2, H, 64, *types, num_warps=1)
    worst = 0.0
    for start, end in pairwise(offsets.tolist()):
        one = A[start:end, :, : end - start].double().transpose(0, 1)
        wanted = torch.linalg.inv(torch.eye(end - start) + one)
        mine = found[start:end, :, : end - start].double().transpose(0, 1)
        worst = max(worst, ((mine - wanted).abs().max() / wanted.abs().max()).item())
    assert worst < 2e-6 if split else worst > 2e-4


def test_inverse_of_scores_with_large_entries():
    """Block substitution, not a power series: entries of 1 and more without decay stay accurate."""
    x = case([0, 64], 1, 1, 3, 2, torch.float64, False)
    x["g"].zero_()
    x["r"], x["w"] = x["r"].abs() * 2, x["w"].abs() * 0.5
    got = rank_one(**x, offsets=torch.tensor([0, 64]), scale=SCALE)
    for a, b in zip(got, loop(**x, offsets=[0, 64]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_planted_error_is_seen(monkeypatch):
    """The last corner of the inverse left out is enough for the comparison to fail."""
    body = kernels._invert

    class Short:
        def __getitem__(self, grid):
            def run(A, inverse, *rest, **options):
                body[grid](A, inverse, *rest, **options)
                inverse[32:64, :, :32] = 0

            return run

    compare([0, 65], 1, 1, 3, 2, torch.float64, False)
    monkeypatch.setattr(kernels, "_invert", Short())
    with pytest.raises(AssertionError, match="o: relative error"):
        compare([0, 65], 1, 1, 3, 2, torch.float64, False)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True], ids=["own keys", "one key"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_gpu(poisoned, dtype, channels, before, shared):
    for kind in ("mixed", "weak"):
        if (
            dtype == torch.float32
        ):  # among 5 channels a random erasure is nearly degenerate: half precision says little there
            compare(PACKED, 1, 2, 5, 3, dtype, channels, before, shared, kind, "cuda")
        compare(PACKED, 1, 2, 64, 48, dtype, channels, before, shared, kind, "cuda")
        compare([0, 131, 262], 2, 3, 96, 192, dtype, channels, before, shared, kind, "cuda")
