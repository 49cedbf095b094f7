"""Printed leaves as files in golden_kernels/, to be read: a change of the printer shows as a change of them.

After a change that is meant:  python tests/test_kernels_printed.py  writes them again; look at the difference, then commit it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unify.errors import UnifyError
from unify.models.zoo import get
from unify.op import compile
from unify.triple import Architecture, Posterior, Triple

GOLDEN = Path(__file__).parent / "golden_kernels"
NAMES = ("mamba2", "palimpsa", "gated_deltanet", "meta_gdn", "mesanet")
FULL = Triple(Architecture("head", value="observation", precision="value"), Posterior("full"))


def printed(name: str) -> str:
    return compile(get(name).triple, "triton").source


def difference(name: str, text: str) -> str:
    """Nothing, or what to do."""
    if (GOLDEN / f"{name}.py.txt").read_text() == text:
        return ""
    return f"{name}'s leaves are printed differently; if that is meant: python tests/test_kernels_printed.py"


@pytest.mark.parametrize("name", NAMES)
def test_leaves_are_printed_as_kept(name):
    assert not difference(name, printed(name))


def test_a_changed_leaf_is_seen():
    assert "python tests/" in difference("mamba2", printed("mamba2").replace("S_p + k", "S_p - k"))


def test_every_process_prints_the_same_text():
    """Files are named by content: another order in another process would compile every kernel again."""
    code = "from unify.op import compile; from unify.models.zoo import get; from unify.lower.triton import module\n"
    code += "print(*(module(compile(get(n).triple).recurrence).key for n in ('palimpsa', 'rodimus', 'kla')))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


@pytest.mark.parametrize("name", NAMES)
def test_lines_fit_a_screen(name):
    assert max(map(len, printed(name).splitlines())) <= 120


def test_an_ops_source_is_what_its_backend_runs():
    triple = get("mamba2").triple
    torch, triton, both = (compile(triple, backend).source for backend in ("torch", "triton", "auto"))
    assert "@triton.jit" not in torch
    assert "def step_adjoint" in triton
    assert both == f"{torch}\n\n{triton}"
    assert compile(triple, "reference").source == torch


def test_a_kernel_that_cannot_be_printed_says_so():
    assert "# no Triton: " in compile(FULL).source
    with pytest.raises(UnifyError, match="backend='torch'"):
        _ = compile(FULL, "triton").source


if __name__ == "__main__":
    for name in NAMES:
        (GOLDEN / f"{name}.py.txt").write_text(printed(name))
