"""What the compiled kernels look like on a Hopper GPU: Triton compiles for one without having one.

The interpreter runs a kernel as it is written; three things that only the compiler decides have gone wrong on real hardware.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

MODELS = "mamba2:96:192 gla:96:192 gated_deltanet:96:192 meta_gdn:128:128 mesanet:128:128 palimpsa:96:192".split()
MODELS += ["mesanet:20:24:float32", "meta_gla:24:40"]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Facts about every kernel of the models, and of the planted one."""
    cache = tmp_path_factory.mktemp("hopper")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache / "triton"), "UNIFY_CACHE": str(cache / "unify")}
    return alone("hopper.py", environment, "planted", "uneven", *MODELS)


def alone(script, environment, *arguments):
    """What a script of this folder prints last, as a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_no_buffer_is_refilled_while_a_product_reads_it(kernels):
    ours = [x for x in kernels if x["of"] in MODELS]
    assert {x["kernel"] for x in ours} >= {
        "_scores",
        "_channel_scores",
        "_walk",
        "_pass",
        "_read",
        "_grads",
        "_solve",
        "read",
        "adjoint",
        "gradient",
    }
    assert not [x for x in ours if x["early"]]


@pytest.mark.slow
def test_the_check_sees_a_load_with_two_uses(kernels):
    (early,) = (x["early"] for x in kernels if x["of"] == "planted")
    assert [name.rstrip("_0123456789") for name in early] == ["%second"]


@pytest.mark.slow
def test_what_random_triples_launch_compiles(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "triton"), "UNIFY_CACHE": str(tmp_path / "unify")}
    assert len(alone("hopper.py", environment, "random:6")) > 6
    with pytest.raises(AssertionError, match="CompilationError"):
        alone("hopper.py", environment, "refused")


@pytest.mark.slow
def test_elementwise_tiles_never_leave_their_registers(kernels):
    """No shared memory: every load has the layout of the arithmetic."""
    walks = {x["kernel"]: x["shared"] for x in kernels if x["kernel"] in ("read", "adjoint", "gradient")}
    assert walks == {"read": 0, "adjoint": 0, "gradient": 0}


@pytest.mark.slow
def test_sums_that_steps_are_made_of_are_equal_in_every_lane(kernels):
    """Not in half precision alone: there products come from tensor cores, several a lane, and were never uneven."""
    solves = [x for x in kernels if x["kernel"] == "_solve"]
    assert {x["of"] for x in solves} == {"mesanet:128:128", "mesanet:20:24:float32"}
    assert not [x for x in solves if x["uneven"]]
    (seen,) = (x["uneven"] for x in kernels if x["of"] == "uneven")
    assert seen


def test_squares_are_solved_and_inverted_as_compiled(tmp_path):
    """Lane by lane: lanes whose copies of a sum differ by its rounding made the steps of 8 to 32 channels grow until they were NaN."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    errors = alone("lanes.py", environment)
    assert len(errors["solve"]) == 4
    assert all(error < 1e-6 for error in errors["solve"].values()), errors
    assert len(errors["inverse"]) == 2
    assert all(error < 1e-4 for error in errors["inverse"].values()), errors  # bfloat16 alone: 1e-2
