"""One process against several: the records of timings, and the section of the page that is written from them.

    torchrun --nproc-per-node 2 -m unify train benchmarks/train_ddp.json --record benchmarks/scale.jsonl
    python -m unify.distributed --bench --world 2 --json benchmarks/scale.jsonl
    unify evidence benchmarks

A record is {"kind": "training" or "context parallel", "processes", "tokens_per_second", ...}: what `training.train` or
`distributed.measure` returns, and where it ran.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from .errors import UnifyError

Record = dict[str, Any]
STEADY = 0.03  # what the halves of a run may differ by without a word
TRAINING, CONTEXT = "training", "context parallel"
# what has to be equal in runs that are compared, the number of processes and what a step is aside
SAME = {
    TRAINING: ("model", "parameters", "length", "precision", "checkpointing", "device"),
    CONTEXT: ("model", "dtype", "device"),
}


# --- records ----------------------------------------------------------------------------------------------------------


def stamp(device: str, module: str, *arguments: Any) -> Record:
    """Where and when it ran, with which versions, by which command."""
    from importlib.metadata import version

    from .mqar.run import machine

    found = machine(device)
    found["versions"]["accelerate"] = version("accelerate")
    if device == "cuda":
        import torch

        found["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {**found, "command": command(module, *arguments), "date": datetime.now(UTC).date().isoformat()}


def command(module: str, *arguments: Any) -> str:
    """The command line as anyone can repeat it: of an absolute path only the name, torchrun where a launcher ran."""
    start = "python"
    if "LOCAL_WORLD_SIZE" in os.environ:
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        start = "torchrun" + f" --nnodes {nodes}" * (nodes > 1) + f" --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
    told = [Path(x).name if Path(str(x)).is_absolute() else str(x) for x in arguments]
    return " ".join([start, "-m", module, *told])


def training(found: Mapping[str, Any], *arguments: Any) -> Record:
    """The record of what `training.train` returned, run by `unify` with those arguments."""
    left_out = ("folder", "history", "held_out")
    device = "cpu" if found["peak"] is None else "cuda"
    return {
        "kind": TRAINING,
        **{k: v for k, v in found.items() if k not in left_out},
        **stamp(device, "unify", *arguments),
    }


# --- the section ------------------------------------------------------------------------------------------------------


def rows(records: Iterable[Record], kind: str) -> list[Record]:
    """One for each thing that was timed: the median over its runs and how many they were; beside it what one process did.

    "one": the row of one process, the fastest where there are several; "how": with "as many tokens a step" (strong scaling) or
    "as many tokens a step and process" (weak); both None where one process did neither; "ratio": tokens a second over its.
    Errors and memory are the largest. Sorted by what is compared, then by processes.
    """
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for r in records:
        if r["kind"] == kind:
            groups[_same(r), r["processes"], _work(r), r.get("sharding"), r.get("rows")].append(r)
    found = []
    for runs in groups.values():
        middle = {x: median(r[x] for r in runs) for x in ("tokens_per_second", "seconds") if x in runs[0]}
        most = {x: max(r[x] for r in runs) for x in ("error", "peak") if None not in [r.get(x) for r in runs]}
        if "range" in runs[0]:
            most["range"] = [min(r["range"][0] for r in runs), max(r["range"][1] for r in runs)]
        found.append({**runs[-1], **middle, **most, "runs": len(runs)})
    for r in found:
        r["one"], r["how"] = _one(r, [x for x in found if x["processes"] == 1 and _same(x) == _same(r)])
        r["ratio"] = r["one"] and r["tokens_per_second"] / r["one"]["tokens_per_second"]
    return sorted(found, key=lambda r: (*map(str, _same(r)), r["processes"], _work(r), str(r.get("sharding"))))


def _same(r: Record) -> tuple:
    channels = tuple(r["size"][x] for x in "HKV") if "size" in r else ()
    return (*(r[x] for x in SAME[r["kind"]]), *channels)


def _work(r: Record) -> int:
    """Tokens of a step, or of the whole sequences."""
    return r["size"]["B"] * r["size"]["T"] if "size" in r else r["tokens_a_step"]


def _one(r: Record, alone: list[Record]) -> tuple[Record | None, str | None]:
    """What a row is compared with, and how."""
    what = "tokens" if r["kind"] == CONTEXT else "tokens a step"
    for how, work in ((f"as many {what}", _work(r)), (f"as many {what} and process", _work(r) / r["processes"])):
        if same := [x for x in alone if _work(x) == work]:
            return max(same, key=lambda x: x["tokens_per_second"]), how
    return None, None


def section(records: Iterable[Record]) -> str:
    """A part of the page in Markdown. Raises UnifyError for a record of another kind."""
    records = list(records)
    if other := {r["kind"] for r in records} - set(SAME):
        raise UnifyError(f"a record of kind {min(other)!r}", "no such thing is shown here", f"use {' or '.join(SAME)}")
    train, context = (rows(records, kind) for kind in (TRAINING, CONTEXT))
    gpus = any(r.get("peak") is not None for r in records)
    parts = ["## On several GPUs" if gpus else "## In several processes", _explained(train, context)]
    parts += ["### Training", _table(train, TRAINING)] if train else []
    parts += ["### One sequence over several processes", _table(context, CONTEXT)] if context else []
    parts += [
        "### What was found",
        _bullets(_said(train + context)),
        "### What was not",
        _bullets(_open(train + context)),
    ]
    return "\n\n".join([*parts, _where(records)])


def _explained(train: list[Record], context: list[Record]) -> str:
    out = [
        "*Ratio* is tokens a second over those of one process on the same device (the fastest, where there are several); *memory* "
        "what torch held at most in one process."
    ]
    if train:
        warm, timed = (" or ".join(map(str, sorted({r[x] for r in train}))) for x in ("warm_up", "timed"))
        out.append(
            f"Training is `unify train`: {timed} steps are timed, from when the device has done the {warm} before "
            "them, in which kernels are compiled, to when it has done the last; reading rows, both passes, the exchange between "
            "processes, the optimizer and logging are in it."
        )
    if context:
        from .distributed import CHECKED

        repeats = " or ".join(map(str, sorted({r["repeats"] for r in context})))
        out.append(
            "A context-parallel op has a piece of the sequence in each process; forward and backward are timed from when all "
            f"processes are ready until all have done it, the median of {repeats} times after two that do not count. *Error* is "
            f"of the output's largest entry, on at most {CHECKED:,} tokens, against the float64 token loop over all of them."
        )
    return "\n".join(out)


def _table(found: list[Record], kind: str) -> str:
    shared = {"tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}", "ratio": lambda r: _number(r["ratio"], ".2f"),
              "memory, GB": lambda r: _number(r.get("peak") and r["peak"] / 1e9, ".1f"), "runs": lambda r: r["runs"]}  # fmt: skip
    train = {"model": _name, "parameters": lambda r: f"{r['parameters']:,}", "processes": lambda r: r["processes"],
             "sharding": lambda r: r["sharding"], "tokens a step": lambda r: f"{r['tokens_a_step']:,}",
             "rows a process at a time": lambda r: r["rows"], "precision": lambda r: r["precision"],
             **shared, "last loss": lambda r: f"{r['loss']:.3f}"}  # fmt: skip
    context = {"model": _name, "B, T, H, K, V": lambda r: ", ".join(f"{x:,}" for x in r["size"].values()),
               "precision": lambda r: r["dtype"], "processes": lambda r: r["processes"],
               "seconds": lambda r: f"{r['seconds']:.4g}", "least to largest": lambda r: " to ".join(f"{x:.4g}" for x in r["range"]),
               **shared, "error": lambda r: f"{r['error']:.1e}"}  # fmt: skip
    columns = train if kind == TRAINING else context
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(f(r)) for f in columns.values()) + " |" for r in found])


def _number(x: float | None, form: str) -> str:
    return "" if x is None else format(x, form)


def _name(r: Record) -> str:
    from .models.zoo import ZOO
    from .mqar.report import name

    return ", ".join(name(x) if x in ZOO else x.replace("_", " ") for x in r["model"].split(", "))


def _what(r: Record) -> str:
    """A row in words."""
    n = f"{r['processes']} process{'es' * (r['processes'] > 1)}"
    if r["kind"] == TRAINING:
        sharding = "" if r["sharding"] == "none" else f", {r['sharding']}"
        return f"{_name(r)}, {r['parameters']:,} parameters, {r['tokens_a_step']:,} tokens a step, {n}{sharding}"
    return f"{_name(r)}, {_work(r):,} tokens, {n}"


def _said(found: list[Record]) -> list[str]:
    """What several processes gained, and what each of them held."""
    out = []
    for r in found:
        n, one = r["processes"], r["one"]
        if n == 1 or not one:
            continue
        text = f"{_what(r)}: {r['ratio']:.2f} times the tokens a second of one with {r['how']}, of {n} at best"
        if r["peak"] and one["peak"]:
            text += f"; in each {r['peak'] / one['peak']:.2f} times the memory"
        out.append(text + ".")
    return out


def _open(found: list[Record]) -> list[str]:
    """What the records do not say."""
    out = []
    if once := sum(r["runs"] == 1 for r in found):
        out.append(f"Rows of a single run, without a spread between runs: {once} of {len(found)}.")
    for r in found:
        halves = r.get("halves", ())
        if len(halves) == 2 and abs(halves[1] / halves[0] - 1) > STEADY:
            out.append(
                f"{_what(r)}: the second half of the steps ran {halves[1] / halves[0]:.2f} times as fast as the first."
            )
        if r["processes"] > 1 and r["ratio"] is None:
            out.append(f"{_what(r)}: one process was not timed at this work.")
    out.append(f"More than {max(r['processes'] for r in found)} processes were not tried.")
    return out


def _where(records: list[Record]) -> str:
    """Device, versions and date, and the commands that wrote the records."""
    on = dict.fromkeys(
        f"{r['device']} ({', '.join(f'{k} {v}' for k, v in r['versions'].items())}), {r['date']}" for r in records
    )
    commands = dict.fromkeys(r["command"] for r in records)
    return f"On {'; '.join(on)}. By:\n\n" + "\n".join(f"    {x}" for x in commands)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "Nothing to list."
