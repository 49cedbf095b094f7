"""The decayed-sum kernel against a float64 loop, forward and every gradient, in the interpreter (or on a GPU)."""

import os
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from unify.kernels.scan import decayed_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loop(g, x, x0, offsets):
    out, ends = [], []
    for n, (a, b) in enumerate(pairwise(offsets)):
        y = x0[n]
        for t in range(a, b):
            y = g[0, t].exp() * y + x[0, t]
            out.append(y)
        ends.append(y)
    return torch.stack(out)[None], torch.stack(ends)


def case(lengths, H, D, channels, seed=0):
    make = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    g = -torch.rand((1, T, H, D if channels else 1), generator=make, dtype=torch.float64)
    g = torch.where(torch.rand(g.shape, generator=make) < 0.2, g * 30, g * 1e-5)
    x = torch.randn((1, T, H, D), generator=make, dtype=torch.float64)
    x0 = torch.randn((len(lengths), H, D), generator=make, dtype=torch.float64)
    return g, x, x0, torch.tensor([0, *lengths]).cumsum(0)


def both(function, g, x, x0, offsets, seed=1):
    leaves = [y.detach().clone().requires_grad_() for y in (g, x, x0)]
    out = function(*leaves, offsets)
    make = torch.Generator().manual_seed(seed)
    loss = sum((y * torch.randn(y.shape, generator=make, dtype=torch.float64).to(y.device)).sum() for y in out)
    return [*out, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (64,), (65, 1, 3), (130,)])
def test_equals_the_loop(lengths, channels):
    g, x, x0, offsets = case(lengths, 2, 3, channels)
    got = both(decayed_sum, *(y.to(DEVICE) for y in (g, x, x0, offsets)))
    for a, b in zip(got, both(lambda *z: loop(*z[:3], z[3].tolist()), g, x, x0, offsets), strict=True):
        assert (a.cpu() - b).abs().max() <= 1e-11 * (1 + b.abs().max())


def test_two_channel_blocks():
    g, x, x0, offsets = case((5,), 1, 40, True)
    got = decayed_sum(*(y.to(DEVICE) for y in (g, x, x0, offsets)))
    assert (got[0].cpu() - loop(g, x, x0, [0, 5])[0]).abs().max() < 1e-12


def test_a_wrong_decay_is_seen():
    g, x, x0, offsets = case((9,), 1, 3, True)
    wrong = decayed_sum(*(y.to(DEVICE) for y in (g - 0.01, x, x0, offsets)))
    assert (wrong[0].cpu() - loop(g, x, x0, [0, 9])[0]).abs().max() > 1e-4
