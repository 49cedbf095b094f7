"""Chunked forward against the token loop, side by side: no time without a right answer.

Both run the same op on the same tensors: once as planned, once with the plan set to the token loop. Before anything is
timed the two are compared at a shorter length, against the loop in float64. The repeats are interleaved, so that what
else the machine does falls on both alike, and the median is kept.

    report = bench(quick=True)
    print(report.rows[0].ratio, report.machine)
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch

from .errors import UnifyError
from .op import Op, compile

MODELS = "mamba2 gla palimpsa_key gated_deltanet kda meta_gdn longhorn palimpsa meta_gla mesanet".split()
"""One or more models for each structure that has a chunked form."""

SHAPE = {"B": 1, "H": 4, "K": 64, "V": 64}
LONG, SHORT, CHECKED = 4096, 512, 256  # tokens: timed, timed in a hurry, compared first
REPEATS = 5
THREADS = 2
TARGET = {"linear": 10.0, "rank one": 10.0, "elementwise": 3.0}
"""Least ratio of loop to chunked time: matmul structures, and the elementwise family."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One model in one precision. chunked, loop: median seconds of a forward pass; error: relative, against float64."""

    model: str
    plan: str
    dtype: str
    chunked: float
    loop: float
    error: float
    target: float | None

    @property
    def ratio(self) -> float:
        """How many times faster the chunked form is."""
        return self.loop / self.chunked

    @property
    def verdict(self) -> str:
        """met, missed, or nothing where no target is set."""
        return "" if self.target is None else "met" if self.ratio >= self.target else "missed"


@dataclass(frozen=True)
class Bench:
    """All rows, the sizes, and on what they were measured."""

    rows: tuple[Row, ...]
    sizes: dict[str, int]
    repeats: int
    machine: dict[str, str]

    @property
    def busy(self) -> bool:
        """Whether the machine had other work than this when the timing began: then the times say little."""
        load = self.machine["load"]
        return load != "unknown" and float(load) > 0.75 * int(self.machine["cores"])

    def record(self) -> dict:
        """For JSON."""
        rows = [{**asdict(row), "ratio": row.ratio, "verdict": row.verdict} for row in self.rows]
        return {"machine": self.machine, "busy": self.busy, "sizes": self.sizes, "repeats": self.repeats, "rows": rows}


def machine() -> dict[str, str]:
    """Processor, cores, load and versions: what a time means nothing without."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    versions = {"torch": torch.__version__, "python": platform.python_version(), "system": platform.system()}
    return {"processor": name, "cores": str(os.cpu_count()), "threads": str(THREADS), "load": load, **versions}


def bench(models: Sequence[str] = MODELS, *, quick: bool = False, progress: Progress | None = None) -> Bench:
    """Time the chunked forward and the token loop of each model, in float64 and float32.

    quick: an eighth of the tokens and fewer repeats. progress: called as progress(model, done, in all).
    Raises UnifyError for a model that has no chunked form, and where the two forms disagree: then nothing is timed.
    """
    length, repeats = (SHORT, 3) if quick else (LONG, REPEATS)
    work = [(name, dtype) for name in models for dtype in (torch.float64, torch.float32)]
    threads, rows, here = torch.get_num_threads(), [], machine()
    torch.set_num_threads(THREADS)
    try:
        for n, (name, dtype) in enumerate(work):
            if progress is not None:
                progress(name, n, len(work))
            rows.append(_row(name, dtype, length, repeats))
    finally:
        torch.set_num_threads(threads)
    return Bench(tuple(rows), {**SHAPE, "T": length}, repeats, here)


def _row(name: str, dtype: torch.dtype, length: int, repeats: int) -> Row:
    from .models import zoo

    chunked, loop = pair(compile(zoo.get(name).triple), name)
    error = compare(name, chunked, loop, dtype)
    given = draw(chunked, length, dtype)
    with torch.no_grad():
        chunked(**given)  # warms up what depends on the length; the comparison has warmed up the rest
    fast, slow = side_by_side([lambda: chunked(**given), lambda: loop(**given)], repeats)
    family = chunked.plan.family
    return Row(name, family, str(dtype).removeprefix("torch."), fast, slow, error, _target(family, length))


def _target(family: str, length: int) -> float | None:
    """Targets are set for the full length: a short text leaves little to do in parallel."""
    return TARGET.get(family) if length == LONG else None


def pair(op: Op, name: str) -> tuple[Op, Op]:
    """The op as planned, and the same op run token by token. Raises UnifyError where that is the same thing."""
    if not op.plan.chunked:
        raise UnifyError(name, f"it has no chunked form to time ({op.plan.why})", f"try {', '.join(MODELS)}")
    return op, replace(op, plan=replace(op.plan, family="recurrent"))


def draw(op: Op, length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random arguments of that length: keys of length at most 1, gates that forget slowly."""
    from .testing import random_inputs

    return random_inputs(op, seed=0, T=length, gates="weak", dtype=dtype, **SHAPE)


def compare(name: str, chunked: Op, loop: Op, dtype: torch.dtype) -> float:
    """Relative error of the chunked form in `dtype` against the loop in float64. Raises UnifyError if it is large."""
    from .testing import relative_error

    given = draw(chunked, CHECKED, torch.float64)
    with torch.no_grad():
        expected = loop(**given)
        found = chunked(**{key: x.to(dtype) for key, x in given.items()}).double()
    error = relative_error(found, expected)
    if not error <= TOLERANCE[dtype]:
        what = f"the chunked form is off by {error:.1e} of the largest output at T = {CHECKED}"
        raise UnifyError(
            f"{name} in {dtype}", f"{what}, so nothing was timed", f"mend it: {TOLERANCE[dtype]:.0e} is allowed"
        )
    return error


def side_by_side(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call: all of them in turn, `repeats` times. Call each once before."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for _ in range(repeats):
            for call, mine in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                mine.append(time.perf_counter() - start)
    return [median(mine) for mine in times]
