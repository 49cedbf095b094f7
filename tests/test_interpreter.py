"""The interpreter that the tests of kernels run in replaces what Triton's own does."""

from types import SimpleNamespace

import pytest

tl = pytest.importorskip("triton.language")

from interpreter import builtins, remembered, searched  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


def replaced(patch, package):
    seen = []
    patch(package, None, SimpleNamespace(set_attr=lambda at, name, new: seen.append((at, name))))
    return seen


@pytest.mark.parametrize("package", [tl, tl.tensor, tl.math, tl.core.tensor_descriptor_base], ids=str)
def test_the_same_is_replaced(package):
    assert interpreter._patch_builtin is remembered
    found = replaced(remembered, package)
    assert found == replaced(searched, package) != []


def test_a_name_that_is_not_remembered_is_missed(monkeypatch):
    builtins(tl)
    monkeypatch.setattr(tl, "planted", tl.load, raising=False)
    assert set(replaced(searched, tl)) - set(replaced(remembered, tl)) == {(tl, "planted")}
