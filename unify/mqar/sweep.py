"""Many runs: several at once on each GPU, each kept as one line of JSON when it is finished, none done twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from torch.cuda import device_count

from unify.errors import UnifyError

from .run import Run, train
from .task import Task

Say = Callable[
    [str, dict[str, Any]], None
]  # a run's key, and what is new of it: phase, step, loss, accuracy, why, trace
Train = Callable[..., dict[str, Any]]
Work = Callable[[Run, Say], dict[str, Any]]


def load(path: Path, needs: tuple[str, ...] = ("key", "accuracy")) -> list[dict[str, Any]]:
    """The records of a file, without a last line that was cut off. Raises UnifyError where a whole line is no record.

    needs: what a record holds at least.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[
        :-1
    ]  # after the last line's end stands nothing, or what a kill cut off
    try:
        records = [json.loads(line) for line in lines if line]
        return records if all(set(needs) <= r.keys() for r in records) else _refuse(path)
    except (ValueError, TypeError, AttributeError):
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


@dataclass(frozen=True)
class Limits:
    """Minutes from the start of a sweep: no run begins after `begin`, and what still runs after `end` is ended and lost."""

    begin: float = inf
    end: float = inf
    start: float = field(default_factory=time.monotonic)

    def over(self, which: str) -> bool:
        """Whether "begin" or "end" is past."""
        return time.monotonic() - self.start >= 60 * getattr(self, which)


def sweep(
    runs: Iterable[Run],
    path: Path,
    *,
    train: Train = train,
    device: str = "cpu",
    jobs: int = 1,
    limits: Limits | None = None,
    say: Say = lambda key, news: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Train what the file at path does not hold yet, `jobs` at a time on each GPU, or on the CPU; returns the records of all runs.

    Runs begin in the order given, each finished one is appended at once, so that an interrupted sweep goes on where it was
    and what is there is balanced. A run that fails is said (phase "failed") and costs no other; it is tried again the next
    time. train: makes the record of a run, `run.train` or `transform.transform`; options: of it.
    """
    runs, limits = list(dict.fromkeys(runs)), limits or Limits()
    done = {record["key"]: record for record in load(path)}
    waiting = [run for run in runs if run.key not in done]
    lanes = [card for _ in range(jobs) for card in cards(device)][: len(waiting)]
    for run in runs:
        say(run.key, {"phase": "done", **done[run.key]} if run.key in done else {"phase": "waiting"})
    work = partial(_work, train, device, options)
    apart = len(lanes) > 1 or limits.end < inf
    finished = _finished_apart(waiting, work, lanes, limits, say) if apart else _finished(waiting, work, limits, say)
    for run, record in finished:
        record["jobs"] = lanes.count(lanes[0])
        add(path, record)
        done[run.key] = record
        say(run.key, {"phase": "done", **record})
    return [done[run.key] for run in runs if run.key in done]


def cards(device: str) -> list[str]:
    """The GPUs this process sees, as CUDA_VISIBLE_DEVICES names them; where the device is a CPU it is all there is, as ""."""
    if device != "cuda":
        return [""]
    given = [x.strip() for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.strip()]
    return given or [str(n) for n in range(max(1, device_count()))]


def _work(train: Train, device: str, options: dict[str, Any], run: Run, say: Say) -> dict[str, Any]:
    """Train, telling of every evaluation."""

    def progress(step: int, loss: float, accuracy: float) -> None:
        say(run.key, {"phase": "running", "step": step, "loss": loss, "accuracy": accuracy})

    say(run.key, {"phase": "running"})
    return train(run, device, progress=progress, **options)


def _finished(waiting: list[Run], work: Work, limits: Limits, say: Say) -> Iterator[tuple[Run, dict]]:
    """Runs with their records, one after the other in this process."""
    for run in waiting:
        if limits.over("begin"):
            return
        try:
            record = work(run, say)
        except Exception as error:
            say(run.key, _failed(error))
        else:
            yield run, record


def _failed(error: BaseException) -> dict[str, str]:
    trace = "".join(traceback.format_exception(error))
    return {"phase": "failed", "why": f"{type(error).__name__}: {error}", "trace": trace}


_news: Any = None  # in a process of its own: where what it says goes


def _begin(news: Any, card: str) -> None:
    """A process that sees one GPU, shares the cores with others, and keeps torch and its kernels from one run to the next."""
    import torch

    global _news
    _news = news
    if card:
        os.environ["CUDA_VISIBLE_DEVICES"] = card  # read when the GPU is first used
    torch.set_num_threads(1)


def _work_apart(work: Work, run: Run) -> dict[str, Any]:
    return work(run, lambda *said: _news.put(said))


def _finished_apart(
    waiting: list[Run], work: Work, lanes: list[str], limits: Limits, say: Say
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """As `_finished`, in lanes, each on a GPU: pools of one process, so that one whose run fails (a GPU's errors stay) is made anew."""
    context = multiprocessing.get_context("spawn")
    news, queue, working = context.SimpleQueue(), deque(waiting), {}

    def lane(card: str) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, context, _begin, (news, card))

    def begin(pool: ProcessPoolExecutor, card: str) -> None:
        if queue and not limits.over("begin"):
            run = queue.popleft()
            working[pool.submit(_work_apart, work, run)] = run, pool, card
        else:
            pool.shutdown(wait=False)

    try:
        for card in lanes:
            begin(lane(card), card)
        while working:
            finished, _ = wait(working, timeout=0.2, return_when=FIRST_COMPLETED)
            while not news.empty():
                say(*news.get())
            for future in finished:
                run, pool, card = working.pop(future)
                if future.exception() is None:
                    begin(pool, card)
                    yield run, future.result()
                else:
                    pool.shutdown(wait=False)
                    say(run.key, _failed(future.exception()))
                    begin(lane(card), card)
            if limits.over("end"):
                for run, *_ in working.values():
                    say(run.key, {"phase": "failed", "why": f"not finished after {limits.end:g} minutes"})
                return
    finally:
        for process in multiprocessing.active_children() if working else ():
            process.terminate()


def grid(
    models: Iterable[str],
    tasks: Iterable[Task],
    lrs: Iterable[float],
    seeds: Iterable[int],
    matches: Iterable[str] = ("none",),
    **more: Any,
) -> list[Run]:
    """Every combination, a seed of every model before the next seed."""
    tasks, lrs, models, matches = list(tasks), list(lrs), list(models), list(matches)
    return [
        Run(m, t, lr, seed, match, **more)
        for seed in seeds for t in tasks for match in matches for lr in lrs for m in models
    ]  # fmt: skip


def elapsed(start: float) -> str:
    """Minutes and seconds since."""
    seconds = int(time.monotonic() - start)
    return f"{seconds // 60}:{seconds % 60:02}"
