"""Offsets past 2^31: long sequences and large batches, where the kernels must give what their parts give.

The tail of a sequence, run by itself from the state that the head left, must equal the tail of the whole; a head of a
wide batch, run alone, must equal its share. Inputs repeat a short random stretch, so that they cost no time to draw.
"""

import pytest
import torch

pytest.importorskip("triton")

from unify.models.zoo import get
from unify.op import compile
from unify.testing import random_inputs
from unify.verify import everything, tokens

pytestmark = pytest.mark.xdist_group("memory")  # one at a time: the largest fill a GPU
NAMES = ["mamba2", "gla", "gated_deltanet", "kda", "palimpsa"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def stretched(op, T, device, **sizes):
    """bfloat16 arguments (gates float32) whose tokens repeat; the gates are weak, so that a state is long remembered."""
    short = random_inputs(op, B=1, T=64, **sizes, gates="weak", dtype=torch.float32)
    per = {x.name: x.per for x in op.recurrence.inputs}
    out = {}
    for name, x in short.items():
        x = x.to(device, torch.bfloat16 if name in "qkv" else torch.float32)
        if per[name] != "static":  # every repetition differs: an offset gone wrong must not land on the same numbers
            copies = -(-T // 64)
            x = x.repeat(1, copies, *([1] * (x.ndim - 2)))[:, :T]
            ramp = torch.linspace(0.5, 1, T, device=device).view(1, T, *([1] * (x.ndim - 2)))
            x = (x * ramp).to(x.dtype)
        out[name] = x
    return out


def close(found, exact, what):
    error = ((found.double() - exact.double()).norm() / exact.double().norm()).item()
    assert error <= 1e-2, f"{what} is off by {error:.1e}"


def tail_equals(op, x, cut, length):
    """The last tokens from the state after `cut`, against the same tokens of the whole."""
    T = x["q"].shape[1]
    with torch.no_grad():
        state = op(**tokens(op, x, 0, cut), output_final_state=True)[-1]
        tail = everything(op, tokens(op, x, cut, T), initial_state=state)
        whole = op(**x, output_final_state=True)
    close(whole[0][:, cut:][:, :length], tail["o"][:, :length], "o after the cut")
    close(whole[0][:, -length:], tail["o"][:, -length:], "o at the end")
    for name in op.state_type._fields:
        close(getattr(whole[-1], name), tail[name], name)


def gradients(op, x, cut):
    """The gradients of the tail's tokens, with the loss on the tail alone: of the whole, and of the tail by itself."""
    T, out = x["q"].shape[1], []
    with torch.no_grad():
        state = op(**tokens(op, x, 0, cut), output_final_state=True)[-1]
    for given, start in ((x, None), (tokens(op, x, cut, T), state)):
        leaves = {n: y.detach().requires_grad_() for n, y in given.items()}
        o = op(**leaves, initial_state=start)[:, -(T - cut) :]
        out.append(dict(zip(leaves, torch.autograd.grad(o.float().square().sum(), leaves.values()), strict=True)))
    return out


def gradients_agree(op, x, cut):
    whole, tail = gradients(op, x, cut)
    for name in ("q", "k", "v"):
        close(whole[name][:, cut:], tail[name], f"the gradient by {name}")


@pytest.mark.parametrize("name", ["mamba2", "palimpsa"])
def test_the_comparison_on_short_sequences(name):
    op = compile(get(name).triple, "torch")
    x = stretched(op, 130, "cpu", H=1, K=4, V=3)
    tail_equals(op, x, 70, 20)
    gradients_agree(op, x, 70)


def test_an_offset_gone_wrong_is_seen(monkeypatch):
    op = compile(get("mamba2").triple, "torch")
    x = stretched(op, 130, "cpu", H=1, K=4, V=3)
    right = type(op).__call__

    def wrapped(self, q, k, v, **rest):  # what a 32-bit offset does: tokens far away are read from elsewhere
        far = torch.arange(q.shape[1]) % 100
        return right(self, q, k[:, far], v[:, far], **rest)

    monkeypatch.setattr(type(op), "__call__", wrapped)
    with pytest.raises(AssertionError, match="o at the end is off"):
        tail_equals(op, x, 70, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_one_long_sequence(name):
    """T = 131072: nearly no parallelism but along time."""
    op = compile(get(name).triple, "triton")
    x = stretched(op, 131072, "cuda", H=2, K=64, V=64)
    cut = 131072 - 4096  # where chunks begin, so that both runs round alike
    tail_equals(op, x, cut, 4096)
    gradients_agree(op, x, cut)


@pytest.mark.gpu
@pytest.mark.parametrize("K, V", [(128, 32), (32, 128)])
@pytest.mark.parametrize("name", NAMES)
def test_more_elements_than_32_bits_address(name, K, V):
    """B T H K or B T H V beyond 2^31, in one sequence; one at a time fits 80 GB. Forward only, for the same reason."""
    op = compile(get(name).triple, "triton")
    H = 32
    T = 2**31 // (H * max(K, V)) + 1024 + 5
    x = stretched(op, T, "cuda", H=H, K=K, V=V)
    assert x["k" if K > V else "v"].numel() > 2**31
    torch.cuda.empty_cache()
    tail_equals(op, x, (T - 512) // 128 * 128, 512)
