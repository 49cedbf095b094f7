"""Decoding on the Triton backend: prefill, then a call for each token, and no work but the kernel's."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from unify.models.zoo import get
from unify.op import compile
from unify.testing import assert_close, random_inputs, random_state
from unify.verify import everything, tokens

FAMILIES = "mamba2 gla rwkv6 palimpsa_key gated_deltanet gated_deltaproduct meta_gdn palimpsa mesanet longhorn".split()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def start(op, x):
    """What some tokens left behind, on the arguments' device."""
    return tuple(
        s.to(x["q"]) for s in random_state(compile(op.triple, "reference"), {n: y.cpu() for n, y in x.items()})
    )


def decoded(op, x, prefill, hand_on=lambda state: state):
    """The results of a prefill and of single tokens, put together."""
    T = x["q"].shape[1]
    parts, state = [], start(op, x)
    for ends in [(0, prefill), *((t, t + 1) for t in range(prefill, T))]:
        parts.append(everything(op, tokens(op, x, *ends), initial_state=hand_on(state)))
        state = tuple(parts[-1][name] for name in op.state_type._fields)
    joined = {name: torch.cat([p[name] for p in parts], 1) for name in ("o", "variance")}
    return {**parts[-1], **joined}


def case(name, device="cpu"):
    op = compile(get(name).triple, "triton", checked=False)
    x = random_inputs(op, B=2, T=37, H=1, K=3, V=2, dtype=torch.float64 if device == "cpu" else torch.float32)
    return op, {n: y.to(device) for n, y in x.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_one_by_one_equal_the_whole(name, device):
    op, x = case(name, device)
    whole = everything(op, x, initial_state=start(op, x))
    for key, found in decoded(op, x, 34).items():
        assert_close(found, whole[key], 1e-9 if device == "cpu" else 1e-5, key)


def test_a_state_that_is_lost_is_seen():
    op, x = case("mamba2")
    whole = everything(op, x, initial_state=start(op, x))
    found = decoded(op, x, 34, hand_on=lambda state: tuple(s * 0.99 for s in state))
    with pytest.raises(AssertionError, match="o is off"):
        assert_close(found["o"], whole["o"], 1e-9, "o")


class Launched(TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_is_one_kernel_and_its_offsets(name, device):
    """In bfloat16 with float32 states and gates, the same at every token: nothing is converted, copied or filled."""
    op, x = case(name, device)
    x = {n: y.to(torch.bfloat16 if n in "qkv" else torch.float32) for n, y in x.items()}
    state = op(**tokens(op, x, 0, 1), output_final_state=True)[-1]
    for t in range(1, 4):
        now = {name: y.contiguous() for name, y in tokens(op, x, t, t + 1).items()}
        with Launched() as seen, torch.no_grad():
            _, state = op(**now, initial_state=state, output_final_state=True)
        assert seen.names == ["aten::arange.start_step", "unify::recurrent"]


def test_what_is_launched_is_seen():
    with Launched() as seen:
        torch.ones(2).to(torch.bfloat16)
    assert seen.names == ["aten::ones", "aten::_to_copy"]
