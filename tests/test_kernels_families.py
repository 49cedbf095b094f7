"""Ops on the parallel kernel families: derived coefficients and kernels together, against the float64 token loop."""

import pytest
import torch

pytest.importorskip("triton")

from test_kernels_recurrent import compare

from unify.lower import launch
from unify.models.zoo import ZOO, get
from unify.op import compile

PARALLEL = [name for name in ZOO if compile(get(name).triple).plan.family in launch.FAMILIES]
SAMPLE = "mamba2 rwkv6 gla palimpsa_key gated_deltanet kda gated_deltaproduct rwkv7 meta_gdn palimpsa meta_gla".split()
SAMPLE += ["mesanet", "gated_kalmanet"]


@pytest.fixture
def spied(monkeypatch):
    """Names of the schedules that were really called."""
    seen = []
    for name in ("linear", "rank_one", "elementwise", "solve", "decayed_sum"):
        whole = getattr(launch.Kernels, name)
        monkeypatch.setattr(
            launch.Kernels, name, lambda self, *a, _n=name, _f=whole, **k: seen.append(_n) or _f(self, *a, **k)
        )
    return seen


@pytest.mark.parametrize("name", SAMPLE)
def test_families_equal_the_loop_forward_and_backward(name, spied):
    op = compile(get(name).triple)
    # seed 0 opens both sequences with a gate near -30: the initial state's gradient is then nothing but rounding
    for errors in compare(op.triple, (40, 33), H=1, K=3, V=5, seed=1):
        assert max(errors.values()) <= 1e-10, errors
    assert op.plan.family.replace(" ", "_") in spied


def test_short_sequences_decode_recurrently(spied):
    compare(get("mamba2").triple, (3,), H=1, K=2, V=2)
    assert not spied


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", PARALLEL)
def test_on_the_device(name, dtype, tolerance):
    for errors in compare(get(name).triple, (130, 63, 65), H=2, K=24, V=40, device="cuda", dtype=dtype):
        bad = {name: e for name, e in errors.items() if not e <= tolerance}
        assert not bad
