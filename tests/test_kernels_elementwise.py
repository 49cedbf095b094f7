"""The elementwise-read kernels against a float64 loop, forward and every gradient: in the interpreter, or on a GPU."""

import os
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from triton import language as tl

from unify.kernels import elementwise as kernels
from unify.kernels.elementwise import Tile, elementwise

pytestmark = pytest.mark.usefixtures("poisoned")
NAMES = "q k v b g prior M0 I0 spread bonus".split()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDEST, ROUNDING = (torch.float32, 1e-5) if DEVICE == "cuda" else (torch.float64, 1e-10)


def loop(q, k, v, b, g, prior, M0, I0, offsets, *, scale, spread=None, before=False, bonus=None, variance=False):
    """The recurrence, token by token."""
    spread = k * k if spread is None else spread
    q, k, v, b, spread = (x.flatten(0, 1) for x in (q, k, v, b, spread))
    g = (g if g.ndim == 4 else g[..., None]).flatten(0, 1)
    prior = prior.reshape(*prior.shape, *[1] * (3 - prior.ndim))
    out, var, ends = [], [], []
    for n, (start, end) in enumerate(pairwise(offsets)):
        M, I = M0[n], I0[n]
        for t in range(start, end):
            a = g[t].exp()[..., None]
            M_new, I_new = a * M + k[t, ..., None] * v[t, :, None], a * I + spread[t, ..., None] * b[t, :, None]
            R, S = (1 / (prior + I), M) if before else (1 / (prior + I_new), M_new)
            if bonus is not None:
                S = S + (bonus * k[t])[..., None] * v[t, :, None]
            out.append(scale * torch.einsum("hk,hkv->hv", q[t], S * R))
            var.append(scale**2 * torch.einsum("hk,hkv->hv", q[t] ** 2, R))
            M, I = M_new, I_new
        ends.append((M, I))
    shape = (-1, len(out), *v.shape[1:])
    var = torch.stack(var).view(shape) if variance else None
    return torch.stack(out).view(shape), var, torch.stack([x for x, _ in ends]), torch.stack([x for _, x in ends])


def case(lengths, H, K, V, *, dtype=WIDEST, prior=1, channels=False, spread=False, bonus=False, seed=0, device=DEVICE):
    """Inputs with gates from -30 to -1e-6 in one sequence."""
    make = torch.Generator(device).manual_seed(seed)
    T, N = sum(lengths), len(lengths)
    rand = lambda *s: torch.rand(s, generator=make, dtype=torch.float64, device=device)  # noqa: E731
    randn = lambda *s: torch.randn(s, generator=make, dtype=torch.float64, device=device)  # noqa: E731
    shape = (1, T, H, K) if channels else (1, T, H)
    exponent = torch.where(rand(*shape) < 0.1, 1.48, 4 * rand(*shape) - 6)  # the first is 30
    x = {"q": randn(1, T, H, K), "k": randn(1, T, H, K), "v": randn(1, T, H, V), "b": rand(1, T, H, V)}
    x = {name: y.to(dtype) for name, y in x.items()}
    x |= {"g": (-(10**exponent)).to(torch.float64 if dtype == torch.float64 else torch.float32)}
    x |= {
        "prior": 0.5 + rand(H, K, V)[(slice(None), *[0] * (3 - prior))],
        "M0": randn(N, H, K, V),
        "I0": rand(N, H, K, V),
    }
    if prior == 2:
        x["prior"] = 0.5 + rand(H, K)
    if spread:
        x["spread"] = rand(1, T, H, K).to(dtype)
    if bonus:
        x["bonus"] = randn(H, K)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {name: y.to(wide) if name in ("prior", "M0", "I0", "bonus") else y for name, y in x.items()}
    return x, torch.tensor([0, *lengths], device=device).cumsum(0)


def gradients(function, x, offsets, seed=1, **options):
    """Outputs and gradients of a random loss, by name."""
    leaves = {name: y.detach().clone().requires_grad_() for name, y in x.items()}
    bound = {name: y for name, y in leaves.items() if name in ("spread", "bonus")}
    out = function(*(leaves[name] for name in NAMES[:8]), offsets, scale=0.7, **bound, **options)
    out = dict(zip(("o", "variance", "M_T", "I_T"), out, strict=True))
    out = {name: y for name, y in out.items() if y is not None}
    make = torch.Generator(x["q"].device).manual_seed(seed)
    noise = lambda y: torch.randn(y.shape, generator=make, device=y.device).bfloat16().double()  # noqa: E731
    loss = sum((y.double() * noise(y)).sum() for y in out.values())
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {
        **{name: y.detach() for name, y in out.items()},
        **{f"d{name}": y for name, y in zip(leaves, found, strict=True)},
    }


def errors(got, want):
    return {name: ((got[name].double() - y).norm() / (y.norm() + 1e-30)).item() for name, y in want.items()}


def compare(x, offsets, tolerance, **options):
    got = gradients(elementwise, x, offsets, **options)
    want = gradients(
        lambda *a, **o: loop(*a[:8], a[8].tolist(), **o), {n: y.double() for n, y in x.items()}, offsets, **options
    )
    found = errors(got, want)
    assert all(e < tolerance for e in found.values()), found


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 4)
    monkeypatch.setattr(kernels, "CHUNK_BACK", 8)
    monkeypatch.setattr(kernels, "MARK", 4)
    monkeypatch.setattr(kernels, "SCAN", (2, 16))
    monkeypatch.setattr(kernels, "WALK", 0)
    for name in ("READ", "ADJOINT", "GRADIENT"):
        monkeypatch.setattr(kernels, name, Tile(1, 1, 1, 2))


VARIANTS = {
    "plain": {},
    "a decay per channel": {"channels": True},
    "a prior per key": {"prior": 2},
    "a prior per element, variance": {"prior": 3, "variance": True},
    "before, bonus, variance": {"before": True, "bonus": True, "variance": True},
    "its own spread, variance": {"spread": True, "variance": True},
    "everything": {"channels": True, "prior": 3, "before": True, "bonus": True, "variance": True, "spread": True},
}


def split(variant):
    """Options of the inputs, options of the operator."""
    options = {name: variant[name] for name in ("before", "variance") if name in variant}
    return {name: y for name, y in variant.items() if name not in options}, options


@pytest.mark.parametrize("variant, walk", [*((name, 0) for name in VARIANTS), ("plain", 999), ("everything", 999)])
def test_equals_the_loop(variant, walk, small, monkeypatch):
    monkeypatch.setattr(kernels, "WALK", walk)  # one walk through the chunks' starts, or deposits and a scan
    inputs, options = split(VARIANTS[variant])
    compare(*case((1, 9, 2), 1, 5, 10, **inputs), ROUNDING, **options)


def test_sees_a_planted_error(small, monkeypatch):
    monkeypatch.setattr(kernels._Launch, "groups", lambda self, size: [(0, 1)])  # the last head is left out
    x, offsets = case((3, 2), 2, 3, 4)
    with pytest.raises(AssertionError):
        compare(x, offsets, ROUNDING)


def test_heads_in_groups(small, monkeypatch):
    monkeypatch.setattr(kernels, "SLAB", 1)
    compare(*case((3, 2), 2, 3, 4), ROUNDING)


def test_a_start_that_all_share(small):
    x, offsets = case((5, 3), 2, 3, 4)
    x |= {name: x[name][:1, :1].expand_as(x[name]) for name in ("M0", "I0")}
    arguments = [x[name] for name in NAMES[:8]]
    got = dict(enumerate(elementwise(*arguments, offsets, scale=0.7)))
    want = dict(enumerate(loop(*arguments, offsets.tolist(), scale=0.7)))
    assert max(errors(got, {n: y for n, y in want.items() if y is not None}).values()) < ROUNDING


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_narrow_inputs_in_full_tiles(dtype, tolerance):
    compare(*case((6,), 1, 20, 12, dtype=dtype), tolerance)


@pytest.mark.parametrize("walk", [0, 999])
def test_keys_split_in_two_halves_keep_their_precision(walk, monkeypatch):
    """As for bfloat16 on a GPU; with float16, whose products the interpreter can do. One half alone would be off by 2e-4."""
    monkeypatch.setattr(kernels, "WALK", walk)
    monkeypatch.setattr(kernels._Launch, "_products", lambda self: {"DT": tl.float16, "PRECISION": "ieee"})
    x, offsets = case((40,), 1, 20, 12, dtype=torch.float16)
    *_, M, I = elementwise(*(x[name] for name in NAMES[:8]), offsets, scale=0.7)
    *_, M_want, I_want = loop(*(x[name].double() for name in NAMES[:8]), offsets.tolist(), scale=0.7)
    assert max(errors({"M": M, "I": I}, {"M": M_want, "I": I_want}).values()) < 1e-6


def test_bonus_needs_a_read_before():
    x, offsets = case((2,), 1, 2, 2, bonus=True)
    with pytest.raises(ValueError, match="before"):
        elementwise(*(x[name] for name in NAMES[:8]), offsets, scale=1.0, bonus=x["bonus"])


REAL = {
    "lengths of 1, 63, 64, 65 and a model's sizes": ((1, 63, 64, 65), 2, 96, 192, {}),
    "many chunks": ((700,), 1, 48, 48, {}),
    "odd sizes, a decay per channel, a prior per key": ((65, 3, 130), 3, 33, 70, {"channels": True, "prior": 2}),
    "before, bonus, variance": ((65, 3), 2, 40, 17, {"before": True, "bonus": True, "variance": True}),
    "the widest key, a prior per element": ((129,), 1, 256, 48, {"prior": 3, "variance": True, "spread": True}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("sizes", REAL)
def test_at_real_sizes(sizes, dtype, tolerance):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    lengths, H, K, V, variant = REAL[sizes]
    inputs, options = split(variant)
    x, offsets = case(lengths, H, K, V, dtype=dtype, **inputs)
    compare(x, offsets, tolerance, **options)
    first, again = gradients(elementwise, x, offsets, **options), gradients(elementwise, x, offsets, **options)
    assert all(torch.equal(first[name], again[name]) for name in first)
