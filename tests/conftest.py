"""Shared by all tests: shapes and types of public signatures are checked at run time, and hypothesis repeats itself.

HYPOTHESIS_PROFILE=thorough draws many more examples, at random; the default draws the same few every time.
"""

import importlib.util
import os
import sys
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook
from outcomes import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401 - pytest finds them here

# Where transformers finds fla it imports it beside its own Qwen3-Next, calls kernels that want a GPU, and loses its type
# mamba2 to fla's. No test but those of tests/fla_hosts.py, in a process of its own, is about that.
sys.modules["fla"] = None

if not torch.cuda.is_available():  # kernels then run in Triton's interpreter; it asks once, when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

with suppress(
    ImportError
):  # of Triton, or of what is replaced in it: then its own does, and test_interpreter is skipped
    importlib.import_module("interpreter")

# The modules that see tensors, but for unify.op, which checks its arguments itself and says more. Those that see sympy
# are left out: a sympy Tuple is no tuple, and they are called a lot.
CHECKED = (
    "unify.lower.chunked",
    "unify.lower.parallel",
    "unify.lower.torch",
    "unify.models",
    "unify.testing",
    "unify.verify",
)

if early := [name for name in CHECKED if name in sys.modules]:
    raise RuntimeError(f"{', '.join(early)} was imported before its signatures could be checked")
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture
def poisoned(monkeypatch):
    """Every buffer that a kernel is given to write starts as NaN, so that an entry never written is seen."""
    empty, like = torch.Tensor.new_empty, torch.empty_like
    spoil = lambda x: x.fill_(torch.nan) if x.is_floating_point() else x  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: spoil(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: spoil(like(*a, **k)))


def pytest_report_header():
    """What the numbers of this run are numbers of."""
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, kernels interpreted"
    return f"torch {torch.__version__}, Triton {triton}, {gpu}"


SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
settings.register_profile(
    "ci", derandomize=True, max_examples=10, deadline=None, database=None, suppress_health_check=SLOW
)
settings.register_profile("thorough", max_examples=200, deadline=None, database=None, suppress_health_check=SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
