"""Many runs: several at once on one device, each kept as one line of JSON when it is finished, none done twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from unify.errors import UnifyError

from .run import Run, train
from .task import Task

Say = Callable[[str, dict[str, Any]], None]  # a run's key, and what is new of it: phase, step, loss, accuracy, why


def load(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without a last line that was cut off. Raises UnifyError where a whole line is no record."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[
        :-1
    ]  # after the last line's end stands nothing, or what a kill cut off
    try:
        records = [json.loads(line) for line in lines if line]
        return records if all("key" in r and "accuracy" in r for r in records) else _refuse(path)
    except (ValueError, TypeError):
        return _refuse(path)


def _refuse(path: Path) -> list:
    raise UnifyError(str(path), "it holds a line that is no record of a run", "name a file that `unify mqar` wrote")


def add(path: Path, record: dict[str, Any]) -> None:
    """Append a record so that a kill in between costs this one at most, and never one before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    with path.open("a", encoding="utf-8") as file:
        if text and not text.endswith("\n"):  # what a kill cut off
            file.truncate(len(text[: text.rfind("\n") + 1].encode()))
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _work(run: Run, device: str, compiled: bool, also: tuple[Task, ...], tell: Say) -> dict[str, Any]:
    """Train, telling of every epoch."""

    def progress(step: int, loss: float, accuracy: float) -> None:
        tell(run.key, {"phase": "running", "step": step, "loss": loss, "accuracy": accuracy})

    tell(run.key, {"phase": "running"})
    return train(run, device, compiled=compiled, also=also, progress=progress)


def _work_apart(run: Run, device: str, compiled: bool, also: tuple[Task, ...], queue) -> dict[str, Any]:
    """`_work` in a process of its own, which shares the cores with others."""
    import torch

    torch.set_num_threads(1)
    return _work(run, device, compiled, also, lambda key, news: queue.put((key, news)))


def sweep(
    runs: Iterable[Run],
    path: Path,
    *,
    device: str = "cpu",
    jobs: int = 1,
    compiled: bool = False,
    also: tuple[Task, ...] = (),
    say: Say = lambda key, news: None,
) -> list[dict[str, Any]]:
    """Train what the file at path does not hold yet, `jobs` at a time on one device; returns the records of all runs.

    Each finished run is appended at once, so that an interrupted sweep goes on where it was. A run that fails is said
    (phase "failed") and costs no other; it is tried again the next time.
    """
    runs = list(dict.fromkeys(runs))
    done = {record["key"]: record for record in load(path)}
    waiting = [run for run in runs if run.key not in done]
    jobs = min(jobs, len(waiting))
    for run in runs:
        say(run.key, {"phase": "done", **done[run.key]} if run.key in done else {"phase": "waiting"})
    for run, record in _finished(waiting, device, jobs, compiled, also, say):
        add(path, record)
        done[run.key] = record
        say(run.key, {"phase": "done", **record})
    return [done[run.key] for run in runs if run.key in done]


def _finished(waiting: list[Run], device: str, jobs: int, compiled: bool, also: tuple, say: Say) -> Iterator[tuple]:
    """Runs with their records, as they finish; one job stays in this process."""
    if jobs > 1:
        yield from _finished_apart(waiting, device, jobs, compiled, also, say)
        return
    for run in waiting:
        try:
            record = _work(run, device, compiled, also, say)
        except Exception as error:
            say(run.key, _failed(error))
        else:
            yield run, record


def _failed(error: BaseException) -> dict[str, str]:
    return {"phase": "failed", "why": f"{type(error).__name__}: {error}"}


def _finished_apart(
    waiting: list[Run], device: str, jobs: int, compiled: bool, also: tuple, say: Say
) -> Iterator[tuple]:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(jobs, context) as pool:
        queue = manager.Queue()
        work: dict[Future, Run] = {pool.submit(_work_apart, r, device, compiled, also, queue): r for r in waiting}
        try:
            while work:
                finished, _ = wait(work, timeout=0.2, return_when=FIRST_COMPLETED)
                while not queue.empty():
                    say(*queue.get())
                for future in finished:
                    run = work.pop(future)
                    if future.exception() is None:
                        yield run, future.result()
                    else:
                        say(run.key, _failed(future.exception()))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def grid(
    models: Iterable[str], tasks: Iterable[Task], lrs: Iterable[float], seeds: Iterable[int], **more: Any
) -> list[Run]:
    """Every combination, a seed of every model before the next seed."""
    tasks, lrs, models = list(tasks), list(lrs), list(models)
    return [Run(m, t, lr, seed, **more) for seed in seeds for t in tasks for lr in lrs for m in models]


def elapsed(start: float) -> str:
    """Minutes and seconds since."""
    seconds = int(time.monotonic() - start)
    return f"{seconds // 60}:{seconds % 60:02}"
