"""A run of tests that is cut off says what it came to, and is not begun again from its start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from apart import apart
from outcomes import outcomes

TESTS = """
import os, pathlib, pytest

def test_passes():
    with pathlib.Path("ran").open("a") as file:
        file.write("passes ")

def test_fails():
    assert 1 == 2, "planted"

@pytest.fixture
def broken():
    raise ValueError("planted in a fixture")

def test_is_never_set_up(broken):
    pass

@pytest.mark.xdist_group("large")
def test_is_cut_off():
    if "CUT" in os.environ:
        os._exit(9)
"""


def run(folder, *arguments, **environment):
    paths = os.pathsep.join(map(str, [Path(__file__).parent, *sys.path]))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "outcomes",
        "--outcomes",
        "out.jsonl",
    ]
    more = {"PYTHONPATH": paths, **environment}
    return subprocess.run(
        [*command, *arguments, "test_some.py"], cwd=folder, env=os.environ | more, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "workers", [[], ["-n", "1", "--dist", "loadgroup", "--max-worker-restart", "0"]], ids=["alone", "xdist"]
)
def test_a_run_that_is_cut_off_goes_on(tmp_path, workers):
    (tmp_path / "test_some.py").write_text(TESTS)
    run(tmp_path, *workers, CUT="1")
    found = outcomes(tmp_path / "out.jsonl")
    said = {name.removeprefix("test_some.py::"): x["outcome"] for name, x in found.items()}
    before = {"test_passes": "passed", "test_fails": "failed", "test_is_never_set_up": "failed"}
    assert said == before | ({"test_is_cut_off": "failed"} if workers else {})  # xdist sees that a worker is gone
    assert "planted" in found["test_some.py::test_fails"]["why"]
    assert "planted in a fixture" in found["test_some.py::test_is_never_set_up"]["why"]
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"test": "test_some.py::test_fails", "outc')  # cut off while it was written
    again = run(tmp_path, *workers)
    assert f"1 failed, 1 passed, {'' if workers else '1 deselected, '}1 error" in again.stdout
    assert (tmp_path / "ran").read_text() == "passes "
    assert outcomes(tmp_path / "out.jsonl")["test_some.py::test_is_cut_off"]["outcome"] == "passed"


def test_an_error_in_a_process_apart_is_seen():
    assert apart("print('a'); print('b c')") == ["a", "b c"]
    with pytest.raises(AssertionError, match="planted"):
        apart("print('a'); raise ValueError('planted')")
