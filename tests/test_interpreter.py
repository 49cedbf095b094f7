"""The interpreter that the tests of kernels run in replaces what Triton's own does."""

from types import SimpleNamespace

import pytest

tl = pytest.importorskip("triton.language")
pytest.importorskip("interpreter", exc_type=ImportError)  # another Triton may have nothing of these names

from interpreter import builtins, known, listed, remembered, searched, types  # noqa: E402
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


@pytest.mark.parametrize("name", "int1 int32 int64 float16 bfloat16 float32 float64 float8e5".split())
def test_a_type_is_the_same_alone_and_in_blocks_and_behind_pointers(name):
    assert interpreter._get_np_dtype is known
    plain = getattr(tl, name)
    pointer = tl.pointer_type(plain)
    for dtype in (plain, pointer, tl.block_type(plain, [2, 4]), tl.block_type(pointer, [2, 4])):
        assert known(dtype) == known(dtype) == listed(dtype)


def test_a_type_that_is_remembered_wrongly_is_seen(monkeypatch):
    monkeypatch.setitem(types, tl.int32.name, known(tl.float64))
    assert known(tl.int32) != listed(tl.int32)
