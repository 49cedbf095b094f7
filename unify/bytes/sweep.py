"""Many runs on one device, one after the other: each kept as a line of JSON when it is finished, none done twice.

With a limit of minutes, a few timed steps of each model say how many steps all can make, the same number for each.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from unify.errors import UnifyError
from unify.mqar.sweep import add
from unify.mqar.sweep import load as _lines

from .corpus import Corpus
from .measure import repeats
from .run import POINTS, WATCHED, Run, pace, train

Say = Callable[[str, dict[str, Any]], None]  # a run's key, and what is new of it: phase, step, loss, bits, why
Paces = dict[str, tuple[float, float]]  # of a model: seconds of a step, and of reading a batch

STARTING = 10.0  # seconds that reading the text takes, about
BETWEEN = 3.0  # seconds that a run takes beside its steps and readings
COMPILING = 20.0  # and more through torch.compile, which finds most of it in its cache
SPARE = 0.92  # of the time is planned


def load(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without a last line that was cut off. Raises UnifyError where it holds something else."""
    records = _lines(path)
    if not all({"curve", "positions", "recall"} <= r.keys() for r in records):
        raise UnifyError(str(path), "it holds runs of another kind", "name a file that `unify bytes` wrote")
    return records


def grid(models: Iterable[str], lrs: Iterable[float], seeds: Iterable[int], **more: Any) -> list[Run]:
    """Every combination, a seed of every model before the next seed."""
    models, lrs = list(models), list(lrs)
    return list(dict.fromkeys(Run(m, lr, seed, **more) for seed in seeds for lr in lrs for m in models))


def _shape(run: Run) -> dict[str, Any]:
    """What runs that are compared have in common, the number of steps and the text aside."""
    return {k: v for k, v in asdict(run).items() if k not in ("model", "lr", "seed", "steps", "text")}


def begun(runs: Sequence[Run], path: Path) -> int | None:
    """The steps that runs of these sizes made in the file, so that the rest make as many."""
    there = [Run(**r["run"]) for r in load(path)]
    return next((run.steps for run in reversed(there) if _shape(run) == _shape(runs[0])), None)


def paces(runs: Sequence[Run], device: str, say: Say = lambda key, news: None, *, compiled: bool = False) -> Paces:
    """What each model takes; one that fails is said and left out."""
    found, tried = {}, set()
    for run in runs:
        if run.model in tried:
            continue
        tried.add(run.model)
        try:
            found[run.model] = pace(run, device, compiled)
        except Exception as error:
            say(run.key, _failed(error))
        else:
            say(run.key, {"phase": "timed", "seconds": found[run.model][0]})
        _tidy(device, compiled)
    return found


def seconds(run: Run, takes: Paces, compiled: bool = False) -> float:
    """What a run takes in all."""
    step, reading = takes[run.model]
    watched = min(WATCHED, run.windows)
    batches = -(-run.windows // run.batch) + min(POINTS, run.steps) * -(-watched // run.batch)
    return run.steps * step + batches * reading + BETWEEN + COMPILING * compiled


def affordable(runs: Sequence[Run], takes: Paces, left: float, compiled: bool = False) -> int:
    """The most steps, in tens, that all runs can make in `left` seconds. Raises UnifyError for less than ten."""
    able = [run for run in runs if run.model in takes]
    if not able:
        raise UnifyError("models", "none of them runs here", "see what was said of each above")
    fixed = STARTING
    fixed += sum(seconds(replace(run, steps=POINTS), takes, compiled) - POINTS * takes[run.model][0] for run in able)
    steps = (left * SPARE - fixed) / sum(takes[run.model][0] for run in able)
    if steps < 10:
        needed = (fixed + 10 * sum(takes[run.model][0] for run in able)) / SPARE
        raise UnifyError(
            f"{left:.0f} s for {len(able)} runs", f"they need {needed:.0f} s", "fewer models, or more minutes"
        )
    return int(steps) // 10 * 10


def sweep(
    runs: Sequence[Run],
    corpus: Corpus,
    path: Path,
    *,
    device: str = "cpu",
    compiled: bool = False,
    takes: Paces | None = None,
    until: float | None = None,
    say: Say = lambda key, news: None,
) -> list[dict[str, Any]]:
    """Train what the file at path does not hold yet; returns the records of all runs that are done.

    takes, until: start no run that would end after that `time.monotonic()`. A run that fails is said and costs no other.
    """
    runs = [replace(run, text=corpus.digest) for run in runs]
    done = {record["key"]: record for record in load(path)}
    found = repeats(corpus.windows[: runs[0].windows], corpus.names) if runs else None
    for run in runs:
        if run.key in done:
            say(run.key, {"phase": "done", **done[run.key]})
        elif until is not None and takes and time.monotonic() + seconds(run, takes, compiled) > until:
            say(run.key, {"phase": "left"})
        elif record := _one(run, corpus, device, compiled, found, say):
            add(path, record)
            done[run.key] = record
            say(run.key, {"phase": "done", **record})
    return [done[run.key] for run in runs if run.key in done]


def _one(run: Run, corpus: Corpus, device: str, compiled: bool, found: Any, say: Say) -> dict[str, Any] | None:
    """A run's record, or None where it failed."""

    def progress(step: int, loss: float, bits: float) -> None:
        say(run.key, {"phase": "running", "step": step, "loss": loss, "bits": bits})

    try:
        return train(run, corpus, device, compiled=compiled, found=found, progress=progress)
    except Exception as error:
        say(run.key, _failed(error))
        return None
    finally:
        _tidy(device, compiled)


def _tidy(device: str, compiled: bool) -> None:
    """Give back what a model that is gone held, its graphs too: a function may have eight, and is not compiled after that."""
    import torch

    if compiled:
        torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _failed(error: BaseException) -> dict[str, str]:
    return {"phase": "failed", "why": f"{type(error).__name__}: {error}"}
