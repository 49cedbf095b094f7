"""The short convolution's kernels against windows written out in float64, forward and every gradient, in the interpreter (or on a GPU)."""

import copy
import os
from itertools import pairwise

import pytest
import torch
from apart import apart

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from unify.kernels import convolution as kernels
from unify.kernels.convolution import convolution
from unify.models import layer
from unify.models.zoo import get
from unify.testing import assert_close

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["y", "dx", "dweight", "dbias", "dstart"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def windows(x, weight, bias, start, offsets):
    """Every window by itself: what is ahead of a sequence, then the sequence."""
    W, flat, out = weight.shape[1], x.flatten(0, 1), []
    for n, (a, b) in enumerate(pairwise(offsets.tolist())):
        line = torch.cat([start[n], flat[a:b]])
        seen = torch.stack([line[t : t + W] for t in range(b - a)])
        y = torch.einsum("twd,dw->td", seen, weight)
        out.append(y if bias is None else y + bias)
    y = torch.cat(out).view_as(x)
    return y * torch.sigmoid(y)


def case(lengths, D, W, bias, dtype, B=1, seed=0):
    """x, weight, bias, start and offsets; half-precision x and start, weights in float32 beside them."""
    make = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=make, dtype=torch.float64)  # noqa: E731
    offsets = torch.tensor([0, *(lengths if B == 1 else lengths * B)]).cumsum(0)
    x, start = draw(B, sum(lengths), D).to(dtype), draw(len(offsets) - 1, W - 1, D).to(dtype)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    return x, draw(D, W).to(wide), draw(D).to(wide) if bias else None, start, offsets


def graded(function, x, weight, bias, start, offsets):
    leaves = [y if y is None else y.detach().clone().requires_grad_() for y in (x, weight, bias, start)]
    y = function(*leaves, offsets)
    make = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, generator=make, dtype=torch.float64).to(y)).sum()
    some = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(loss, some))
    return [y, *(None if leaf is None else next(found) for leaf in leaves)]


def agree(got, want, rtol):
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.numel():
            assert_close(a.detach().cpu().double(), b.detach(), rtol, name)


def compare(lengths, D, W, bias, dtype, B=1, device=DEVICE):
    given = case(lengths, D, W, bias, dtype, B)
    wide = [None if x is None else x.double() for x in given[:4]]
    got = graded(convolution, *(None if x is None else x.to(device) for x in given))
    assert [x if x is None else x.dtype for x in got] == [dtype, *(x if x is None else x.dtype for x in given[:4])]
    agree(got, graded(windows, *wide, given[4]), TOLERANCE[dtype])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small blocks, so that a small case has several."""
    monkeypatch.setattr(kernels, "C", 16)
    monkeypatch.setattr(kernels, "CHANNELS", 16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("W", "bias"), [(1, True), (2, False), (4, False), (4, True), (6, True)])
@pytest.mark.parametrize("lengths", [(1,), (15, 1, 17, 2), (16,), (40,)], ids=str)
def test_equals_windows_written_out(lengths, W, bias, dtype):
    compare(lengths, 5, W, bias, dtype)


def test_a_batch_of_rows_and_two_channel_blocks():
    compare((19,), 21, 4, True, torch.float64, B=3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_with_the_kernel_is_the_layer_without(packed, monkeypatch):
    """The branch that is taken on a GPU, in the interpreter."""
    torch.manual_seed(0)
    made = layer.Layer(get("palimpsa_key").triple, hidden_size=12, num_heads=2, head_dim=4, conv_bias=True).double()
    x, offsets = torch.randn(1, 20, 12, dtype=torch.float64), torch.tensor([0, 1, 3, 20]) if packed else None
    plain, state = made(x, cu_seqlens=offsets, output_state=True)
    called, whole = [], torch.ops.unify.convolution
    monkeypatch.setattr(layer, "on_kernels", lambda x: True)
    monkeypatch.setattr(torch.ops.unify, "convolution", lambda *a: called.append(1) or whole(*a))
    y, end = made(x, cu_seqlens=offsets, output_state=True)
    assert called == [1]
    assert_close(y.detach(), plain.detach(), 1e-12)
    assert torch.equal(end.conv, state.conv)
    later = torch.randn(len(end.conv), 1, 12, dtype=torch.float64)
    assert_close(*(made(later, state=z, output_state=True)[0].detach() for z in (end, state)), 1e-12)


def test_a_layer_with_the_kernel_is_one_graph():
    code = (
        "import torch\nfrom unify.models import Layer, layer\nfrom unify.models.zoo import get\n"
        "made, x = Layer(get('gla').triple, 8, 2, 4), torch.randn(2, 9, 8)\n"
        "plain, layer.on_kernels = made(x), lambda x: True\n"
        "found = torch.compile(made, backend='aot_eager', fullgraph=True)(x)\n"
        "found.sum().backward()\nprint('unify::convolution' in torch._C._dispatch_get_all_op_names())\n"
        "print((found - plain).abs().max().item() < 1e-5)"
    )
    assert apart(code) == ["True", "True"]


def test_a_wrong_tap_is_seen():
    x, weight, bias, start, offsets = case((9,), 3, 4, True, torch.float64)
    good = graded(windows, x, weight, bias, start, offsets)
    for n, name in enumerate(NAMES):
        wrong = [y.clone() if y is not None else y for y in good]
        wrong[n].view(-1)[-1] *= 1.001
        with pytest.raises(AssertionError, match=f"^{name} is off"):
            agree(wrong, good, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(4096,), (1, 2000, 63, 64, 65, 1903)], ids=["one", "packed"])
def test_at_the_sizes_of_a_model(lengths, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "C", 64)
    monkeypatch.setattr(kernels, "CHANNELS", 64)
    compare(lengths, 1000, 4, True, dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_is_on_a_gpu_what_it_is_on_a_cpu(packed):
    torch.manual_seed(0)
    here = layer.Layer(get("palimpsa_key").triple, hidden_size=64, num_heads=2, head_dim=16)
    there = copy.deepcopy(here).cuda()
    x, offsets = torch.randn(1, 300, 64), torch.tensor([0, 1, 100, 300]) if packed else None
    at = None if offsets is None else offsets.cuda()
    y, z = here(x, cu_seqlens=offsets), there(x.cuda(), cu_seqlens=at)
    assert_close(z.detach().cpu(), y.detach(), 1e-4)
    y.square().mean().backward()
    z.square().mean().backward()
    for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
        assert_close(q.grad.cpu(), p.grad, 1e-3, name)
