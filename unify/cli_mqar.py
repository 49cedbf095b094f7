"""`unify mqar` and `unify transform`: models on multi-query associative recall, side by side, and made metaplastic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from .cli import Json, _console, _dump, _usage, app

TOY = {
    "sequences": 4096,
    "steps": 1024,
    "evaluate_every": 64,
    "batch": 64,
    "d_model": 32,
    "heads": 2,
    "head_dim": 16,
    "expand_v": 1.0,
    "tests": 512,
}
TOY_TRANSFORM = {"sequences": 12_800, "batch": 64, "plateau": 600, "steps": 200, "evaluate_every": 50, "d_model": 32,
                 "heads": 2, "head_dim": 8, "expand_v": 4.0, "layers": 1, "tests": 512}  # fmt: skip
TOY_MODELS, TOY_TASK, TOY_RATE = "mamba2,palimpsa_key,gated_deltanet", "32x8", "5e-3"


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, name: str, kind: type) -> list:
    try:
        return [kind(part) for part in _list(text)]
    except ValueError:
        raise _usage(f"{name} {text}", "it is no list of numbers", f"write {name} 1,2") from None


Vocab = Annotated[int | None, typer.Option("--vocab", min=4, help="Tokens there are, 8192 in the paper.")]
Minutes = Annotated[float | None, typer.Option("--minutes", help="No run begins after so many.")]
Stop = Annotated[float | None, typer.Option("--stop", help="What still runs after so many minutes is ended, and lost.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Through torch.compile.")]
Tasks = Annotated[
    str | None, typer.Option("--tasks", "-t", metavar="TxP", help="Tokens x pairs; TxP-O overwrites O keys.")
]
Names = Annotated[
    str | None,
    typer.Option("--models", "-m", metavar="A,B", help="Models; also transformer, transformer_conv, not_palimpsa."),
]
Width = Annotated[int | None, typer.Option("--d-model", min=1, help="Channels of every model, 128 in the paper.")]
Layers = Annotated[int | None, typer.Option("--layers", min=1, help="Layers of every model, 2 in the paper.")]
Heads = Annotated[int | None, typer.Option("--heads", min=1, help="Heads of every layer, 8 in the paper.")]
HeadDim = Annotated[int | None, typer.Option("--head-dim", min=1, help="Key channels of a head, 16 in the paper.")]
OUTPUT = "One line of JSON a run; runs in it are not done again."


@app.command()
def mqar(
    toy: Annotated[bool, typer.Option("--toy", help="Small enough for two minutes on two cores.")] = False,
    models: Names = None,
    tasks: Tasks = None,
    also: Annotated[str, typer.Option("--also", metavar="TxP", help="Tasks to read at, without training.")] = "",
    rates: Annotated[str | None, typer.Option("--lr", metavar="A,B", help="Learning rates.")] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="A,B", help="Seeds.")] = "1",
    match: Annotated[
        str, typer.Option("--match", metavar="A,B", help="none, state, parameters: equal to Mamba-2's.")
    ] = "none",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps, at most.")] = None,
    every: Annotated[int | None, typer.Option("--every", min=1, help="Steps between two evaluations.")] = None,
    sequences: Annotated[int | None, typer.Option("--sequences", min=1, help="Of the training set.")] = None,
    vocab: Vocab = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Sequences a step.")] = None,
    d_model: Width = None,
    layers: Layers = None,
    heads: Heads = None,
    head_dim: HeadDim = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or auto: what there is.")] = "auto",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at a time, on each GPU or on the CPU.")] = 2,
    compiled: Compiled = False,
    minutes: Minutes = None,
    stop: Stop = None,
    output: Annotated[Path, typer.Option("--output", "-o", help=OUTPUT)] = Path("mqar.jsonl"),
    plot: Annotated[Path | None, typer.Option("--plot", metavar="DIR", help="Draw what the file holds.")] = None,
    as_json: Json = False,
) -> None:
    """Train models on multi-query associative recall; an interrupted sweep goes on where it was."""
    from .models import zoo
    from .mqar.figures import draw
    from .mqar.report import standings
    from .mqar.run import MODELS
    from .mqar.sweep import grid, load, sweep
    from .mqar.task import Task

    names = _list(models or (TOY_MODELS if toy else ",".join(MODELS)))
    names = [name if name in MODELS else zoo.get(name).name for name in names]
    more: dict[str, Any] = dict(TOY) if toy else {}
    sizes = {"steps": steps, "evaluate_every": every, "sequences": sequences, "batch": batch}
    sizes |= {"d_model": d_model, "layers": layers, "heads": heads, "head_dim": head_dim}
    more |= {k: v for k, v in sizes.items() if v is not None}
    given = _vocab(vocab, toy)
    learned = [Task.parse(text, **given) for text in _list(tasks or (TOY_TASK if toy else "512x128"))]
    read = tuple(Task.parse(text, **given) for text in _list(also))
    lrs = _numbers(rates or (TOY_RATE if toy else "1e-3,2.154e-3,4.642e-3,1e-2"), "--lr", float)
    runs = grid(names, learned, lrs, _numbers(seeds, "--seeds", int), _list(match), **more)
    how = {"device": _device(device), "jobs": jobs, "limits": _limits(minutes, stop)}
    with _live(runs) as say:
        sweep(runs, output, **how, compiled=compiled, also=read, say=say)
    found = standings(load(output))
    if plot is not None:
        draw(found, plot)
    if as_json:
        _dump([{"model": s.model, "task": str(s.task), "match": s.match, "accuracies": s.accuracies, "lr": s.lr,
                "state": s.state, "parameters": s.parameters, "flops": s.flops, "others": s.others} for s in found])  # fmt: skip
        return
    console = _console()
    console.print(_table(found))
    console.print(f"runs: {output}" + ("" if plot is None else f", plots: {plot}"), style="dim", markup=False)


@app.command()
def transform(
    toy: Annotated[bool, typer.Option("--toy", help="Small enough for three minutes on two cores.")] = False,
    hosts: Annotated[
        str, typer.Option("--hosts", metavar="A,B", help="mamba2, gated_deltanet.")
    ] = "mamba2,gated_deltanet",
    tasks: Tasks = None,
    rates: Annotated[str | None, typer.Option("--lr", metavar="A,B", help="Learning rates until the plateau.")] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="A,B", help="Seeds.")] = "1",
    plateau: Annotated[int | None, typer.Option("--plateau", min=1, help="Optimizer steps before converting.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=2, help="Optimizer steps of each branch.")] = None,
    every: Annotated[int | None, typer.Option("--every", min=1, help="Steps between two evaluations.")] = None,
    sequences: Annotated[int | None, typer.Option("--sequences", min=1, help="Of the training set.")] = None,
    vocab: Vocab = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Sequences a step.")] = None,
    d_model: Width = None,
    layers: Layers = None,
    heads: Heads = None,
    head_dim: HeadDim = None,
    importance: Annotated[
        str | None, typer.Option("--importance", help="key or diagonal, else the family's own.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or auto: what there is.")] = "auto",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at a time, on each GPU or on the CPU.")] = 2,
    compiled: Compiled = False,
    minutes: Minutes = None,
    stop: Stop = None,
    output: Annotated[Path, typer.Option("--output", "-o", help=OUTPUT)] = Path("transform.jsonl"),
    as_json: Json = False,
) -> None:
    """Train models to a plateau at a load they cannot hold, make them metaplastic, go on; beside going on unconverted."""
    from .mqar.report import changes
    from .mqar.sweep import load, sweep
    from .mqar.task import Task
    from .mqar.transform import Transformation
    from .mqar.transform import transform as train

    more: dict[str, Any] = dict(TOY_TRANSFORM) if toy else {}
    sizes = {"plateau": plateau, "steps": steps, "evaluate_every": every, "sequences": sequences, "batch": batch}
    sizes |= {"d_model": d_model, "layers": layers, "heads": heads, "head_dim": head_dim, "importance": importance}
    more |= {k: v for k, v in sizes.items() if v is not None}
    read = [Task.parse(text, **_vocab(vocab, toy)) for text in _list(tasks or ("48x12" if toy else "512x128"))]
    rates = _numbers(rates or ("1e-2" if toy else "4.642e-3"), "--lr", float)
    seeds = _numbers(seeds, "--seeds", int)
    runs = [Transformation(h, t, r, s, **more) for s in seeds for t in read for r in rates for h in _list(hosts)]
    how: dict[str, Any] = {"device": _device(device), "jobs": jobs, "limits": _limits(minutes, stop)}
    with _live(runs) as say:
        sweep(runs, output, train=train, **how, compiled=compiled, say=say)
    records = load(output)
    if as_json:
        _dump(records)
        return
    console = _console()
    console.print(_changes(changes(records)))
    console.print(f"runs: {output}", style="dim", markup=False)


@app.command()
def evidence(
    records: Annotated[Path, typer.Argument(help="Folder with mqar*, transform*, bytes* and scale*.jsonl.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page and its figures.")] = Path(
        "evidence"
    ),
) -> None:
    """Write the page of results, figures, tables and sentences, from the records of runs."""
    from .evidence import write

    _console().print(str(write(records, output)), markup=False)


def _changes(found: list) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("task", "host", "branch", "steps before", "before", "after", "change", "seeds"):
        table.add_column(title, justify="left" if title in ("task", "host", "branch") else "right")
    for c in found:
        for branch, after in c.after.items():
            gain = f"{mean(after) - mean(c.before):+.3f}"
            numbers = f"{c.steps:,}", f"{mean(c.before):.3f}", f"{mean(after):.3f}", gain, str(len(after))
            table.add_row(str(c.task), c.host, branch, *numbers)
    return table


def _limits(minutes: float | None, stop: float | None) -> Any:
    from math import inf

    from .mqar.sweep import Limits

    return Limits(inf if minutes is None else minutes, inf if stop is None else stop)


def _vocab(given: int | None, toy: bool) -> dict[str, int]:
    return {"vocab": given} if given is not None else {"vocab": 64} if toy else {}


def _device(name: str) -> str:
    from torch.cuda import is_available

    if name not in ("auto", "cpu", "cuda"):
        raise _usage(f"--device {name}", "nothing is trained there", "use cpu, cuda or auto")
    return ("cuda" if is_available() else "cpu") if name == "auto" else name


def _table(found: list) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("task", "model", "accuracy", "least … largest", "lr", "state, bytes", "parameters"):
        table.add_column(title, justify="left" if title in ("task", "model") else "right")
    for s in found:
        spread = f"{min(s.accuracies):.3f} … {max(s.accuracies):.3f}"
        table.add_row(str(s.task), s.label, f"{s.mean:.3f}", spread, f"{s.lr:.2g}", f"{s.state:,}", f"{s.parameters:,}")
        for task, accuracies in s.others.items():
            spread = f"{min(accuracies):.3f} … {max(accuracies):.3f}"
            table.add_row(f"  at {task}", s.label, f"{sum(accuracies) / len(accuracies):.3f}", spread, "", "", "")
    return table


@contextmanager
def _live(runs: list) -> Iterator[Callable[[str, dict], None]]:
    """A table on stderr of what runs, what is done and what failed; lines instead where stderr is no terminal."""
    from rich.live import Live
    from rich.table import Table

    from .mqar.sweep import elapsed

    console, start, state, names = _console(stderr=True), time.monotonic(), {}, {run.key: str(run) for run in runs}

    def view() -> Table:
        done = sum(x["phase"] == "done" for x in state.values())
        table = Table(
            title=f"{done} of {len(names)} runs, {elapsed(start)}", box=None, pad_edge=False, title_justify="left"
        )
        for title in ("run", "step", "loss", "accuracy"):
            table.add_column(title, justify="left" if title == "run" else "right")
        for key, x in state.items():
            if x["phase"] == "running":
                table.add_row(
                    names[key],
                    str(x.get("step", "")),
                    *(f"{x[n]:.3f}" if n in x else "" for n in ("loss", "accuracy")),
                )
        return table

    live = Live(view(), console=console, transient=True, refresh_per_second=4) if console.is_terminal else None

    def say(key: str, news: dict) -> None:
        first = all(x["phase"] != "failed" for x in state.values())
        state[key] = {**state.get(key, {}), **news}
        if news["phase"] == "failed":
            console.print(f"✗ {names[key]}: {news['why']}", style="red", markup=False)
            if first and "trace" in news:  # where; the next ones are most often the same
                console.print("\n".join(news["trace"].splitlines()[-16:]), style="dim", markup=False)
        elif news["phase"] == "done" and live is None:
            console.print(f"{elapsed(start)} {names[key]}: accuracy {news['accuracy']:.3f}", markup=False)
        elif "step" in news and live is None:
            seen = f"step {news['step']}, loss {news['loss']:.3f}, accuracy {news['accuracy']:.3f}"
            console.print(f"{elapsed(start)} {names[key]}: {seen}", style="dim", markup=False)
        if live is not None:
            live.update(view())

    if live is None:
        yield say
    else:
        with live:
            yield say
