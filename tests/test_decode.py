"""Decoding: prefill, then a call for each token, and no work but the kernel's or, on torch, the step's."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from unify.lower import parallel
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


# -- torch ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_on_torch_is_one_step_and_what_the_schedule_makes_of_it(name, monkeypatch):
    """The schedule of chunks is another computation of the same token; the op does not use it."""
    op = compile(get(name).triple, "torch")
    x = random_inputs(op, B=2, T=1, H=2, K=3, V=2)
    state = random_state(op, x)
    o, variance, final = parallel.run(op.recurrence, op.structure, op.plan, x, state, 0.5, True)
    monkeypatch.setattr(parallel, "run", None)
    found = everything(op, x, initial_state=state, scale=0.5)
    for key, expected in {"o": o, "variance": variance, **dict(zip(op.state_type._fields, final, strict=True))}.items():
        assert_close(found[key], expected, 1e-9, key)


def test_two_tokens_are_a_schedule_s(monkeypatch):
    op = compile(get("gla").triple, "torch")
    monkeypatch.setattr(parallel, "run", None)
    with pytest.raises(TypeError, match="NoneType"):
        op(**random_inputs(op, T=2))


# -- a converted mixer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["key", "diagonal"])
@pytest.mark.parametrize("B", [1, 2])
def test_a_token_is_written_into_the_state_of_a_mamba2_mixer(B, kind):
    from test_convert import converted

    mixer = converted("mamba2", kind).backbone.layers[0].mixer
    x, dt, seen = torch.randn(B, 2, 8, 8), torch.rand(B, 2, 8), torch.randn(B, 2, 32)
    k, q, A = torch.randn(B, 2, 2, 8), torch.randn(B, 2, 2, 8), -torch.rand(8)

    def scan(T):
        return mixer.mamba2_chunk_scan(
            x[:, :T], dt[:, :T], A, k[:, :T], q[:, :T], D=mixer.D, return_final_states=True, seen=seen[:, :T]
        )

    with torch.no_grad():
        (whole, end), (_, state) = scan(2), scan(1)
        D, one, tall = (
            mixer.D[:, None].expand(8, 8),
            dt[:, 1, :, None].expand(B, 8, 8),
            A[:, None, None].expand(8, 8, 8),
        )
        assert all(part.is_contiguous() for part in mixer._unpacked(state[:1], 8, 8, 8))
        with Launched() as seen_ops:
            o = mixer.mamba2_selective_state_update(state, x[:, 1], one, tall, k[:, 1], q[:, 1], D, seen=seen[:, 1:])
    assert_close(o, whole[:, 1], 1e-5, "o")
    assert_close(state, end, 1e-5, "state")
    assert seen_ops.names.count("aten::copy_") == 2
    assert "aten::cat" not in seen_ops.names
