"""What a call costs beside its kernels: which compiled kernel a launch gets, how many launches and operators there are."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

from unify.kernels import chunk, direct
from unify.models.zoo import get
from unify.op import compile
from unify.testing import random_inputs


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Launches of one kernel through Triton, directly, and by a launcher with a fault."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("launches"))}
    command = [sys.executable, str(Path(__file__).with_name("launches.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_direct_launch_is_what_triton_launches(found):
    launches = found["launches"]
    assert all(len(x["triton"]) == 1 for x in launches)
    assert [x["direct"] for x in launches] == [x["triton"] for x in launches]
    assert len({x["triton"][0][0] for x in launches}) > 30, "the arguments are too much alike to tell kernels apart"
    assert found["known"] < len(launches) / 2, "in the second round every launch is known"


@pytest.mark.slow
def test_a_launcher_that_forgets_the_alignment_is_seen(found):
    compiled = lambda way: [x[way][0][0] for x in found["launches"]]  # noqa: E731
    assert compiled("careless") != compiled("triton")


def test_interpreted_kernels_stay_as_they_are():
    assert direct.direct(len) is len
    assert isinstance(chunk._walk, direct.Direct) == torch.cuda.is_available()


# -- counts ------------------------------------------------------------------------------------------------------------

# launches and operators, forward without a gradient, then forward and backward; other operations of torch, at most
COUNTS = {
    "mamba2": ((3, 1, 3), (6, 2, 8)),
    "gla": ((4, 1, 3), (7, 2, 8)),
    "palimpsa_key": ((6, 2, 5), (12, 4, 12)),
    "gated_deltanet": ((7, 2, 3), (12, 4, 9)),
    "kda": ((7, 2, 3), (11, 4, 9)),
    "palimpsa": ((5, 1, 10), (13, 2, 20)),
    "mesanet": ((7, 3, 7), (16, 6, 20)),
}


class Counter(TorchDispatchMode):
    """Counts what torch is asked for: our operators, and others."""

    def __init__(self):
        super().__init__()
        self.ours = self.others = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "unify":
            self.ours += 1
        else:
            self.others += 1
        return function(*arguments, **(options or {}))


def counts(name, monkeypatch, gradient):
    """Launches, operators and other operations of a call of at least a chunk; nothing is computed."""
    launches = collections.Counter()
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *a, **o: launches.update([self.fn.__name__]))
    monkeypatch.setattr(chunk, "BUSY", 0)  # walks, as on a chip that is full
    op = compile(get(name).triple, "triton", checked=False)
    given = random_inputs(op, B=2, T=64, H=2, K=16, V=16, dtype=torch.float32)
    given = {n: x.requires_grad_(gradient) for n, x in given.items()}
    with torch.set_grad_enabled(gradient), Counter() as counter:
        o = op(**given)
        if gradient:
            torch.autograd.grad(o, list(given.values()), torch.ones(o.shape))
    return launches.total(), counter.ours, counter.others


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts interpreted launches")
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", COUNTS)
def test_a_call_has_no_more_launches_and_operators_than_it_had(name, gradient, monkeypatch):
    """On a GPU each costs 5 to 20 us of the host, more than many a kernel takes. Where there are fewer now, write that down."""
    launches, ours, others = counts(name, monkeypatch, gradient)
    expected = COUNTS[name][gradient]
    assert (launches, ours) == expected[:2]
    assert others <= expected[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts interpreted launches")
def test_one_launch_more_is_seen(monkeypatch):
    cumulate = chunk.cumulate
    monkeypatch.setattr(chunk, "cumulate", lambda *a: cumulate(*a) if cumulate(*a) is not None else None)
    assert counts("mamba2", monkeypatch, False)[:2] == (4, 1)
