"""pytest --outcomes FILE: one line of JSON for each test as soon as it has ended, and a run that goes on where one was cut off.

A rented GPU is gone in the middle of a run, and what pytest says at the end with it. Tests that the file says passed are
left out the next time; those that failed or were not reached are run. With xdist the first process alone writes.
"""

import json
import re
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--outcomes", metavar="FILE", help="write each test's outcome here at once; what passed in it is not run again"
    )


def outcomes(path: Path) -> dict[str, dict]:
    """test -> its last line; a line that was cut off is none."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["test"]] = record
    return found


def name(nodeid: str) -> str:
    """A test's name without the group that xdist appends."""
    return re.sub(r"@\w+$", "", nodeid)


def pytest_collection_modifyitems(config, items):
    if path := config.getoption("outcomes"):
        known = outcomes(Path(path))
        passed = lambda x: known.get(name(x.nodeid), {}).get("outcome") == "passed"  # noqa: E731
        config.hook.pytest_deselected(items=[x for x in items if passed(x)])
        items[:] = [x for x in items if not passed(x)]


def pytest_configure(config):
    path = config.getoption("outcomes")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(Path(path)), "outcomes-writer")


class Writer:
    """Appends what each test came to."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # what was cut off stays a line of its own
            self.write("")

    def write(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:  # a process that died has no "when"
            why = [] if report.passed else str(report.longrepr).strip().splitlines()
            errors = [x for x in why if x.startswith("E ")] or why
            self.write(json.dumps({
                "test": name(report.nodeid), "outcome": report.outcome, "seconds": round(report.duration, 2), "why": "\n".join(errors[:20]),
            }))  # fmt: skip
