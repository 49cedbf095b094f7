"""`unify bytes`: byte-level language models of equal parameters, side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli import Json, _console, _dump, app
from .cli_mqar import Compiled, _device, _list, _numbers

TOY = {"steps": 60, "batch": 8, "length": 256, "d_model": 32, "layers": 2, "head_dim": 16, "windows": 64}
TOY_MODELS = "transformer,gated_deltanet,palimpsa_key"


@app.command("bytes")
def compare_bytes(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="[FOLDER]...", help="Text; default: this Python's own sources.")
    ] = None,
    toy: Annotated[bool, typer.Option("--toy", help="Small enough for two minutes on two cores.")] = False,
    models: Annotated[
        str | None, typer.Option("--models", "-m", metavar="A,B", help="Models; also transformer.")
    ] = None,
    pattern: Annotated[str, typer.Option("--pattern", help="Which files of a folder.")] = "**/*.py",
    tokens: Annotated[float | None, typer.Option("--tokens", help="Bytes that each model is trained on.")] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="For all runs: timed steps say how many bytes each gets.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="A,B", help="Seeds.")] = "1",
    rates: Annotated[str, typer.Option("--lr", metavar="A,B", help="Highest learning rates.")] = "2e-3",
    length: Annotated[int | None, typer.Option("--length", min=2, help="Bytes of a row.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Rows of a step.")] = None,
    d_model: Annotated[int | None, typer.Option("--d-model", min=1, help="Channels of every model.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Layers of every model.")] = None,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Held-out windows to read.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or auto: what there is.")] = "auto",
    compiled: Compiled = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="One line of JSON a run; runs in it are not done again.")
    ] = Path("bytes.jsonl"),
    report: Annotated[Path | None, typer.Option("--report", metavar="DIR", help="A page and its plots.")] = None,
    as_json: Json = False,
) -> None:
    """Train byte-level language models of equal parameters on the same text, and see what each makes of its context."""
    begin = time.monotonic()
    from .bytes.corpus import check, python_sources
    from .bytes.run import MODELS
    from .bytes.sweep import grid, load, sweep
    from .cli_models import _quiet

    _quiet()
    folders = folders or python_sources()
    check(folders)
    given = {"length": length, "batch": batch, "d_model": d_model, "layers": layers, "windows": windows}
    sizes: dict[str, Any] = (dict(TOY) if toy else {}) | {k: v for k, v in given.items() if v is not None}
    names = _list(models or (TOY_MODELS if toy else ",".join(MODELS)))
    runs = grid(names, _numbers(rates, "--lr", float), _numbers(seeds, "--seeds", int), **sizes)
    device, say = _device(device), _Says(len(runs))
    until = None if minutes is None else begin + 60 * minutes
    say.sizes(runs)
    runs, takes = _planned(runs, tokens, until, device, compiled, output, say)
    corpus = _corpus(folders, pattern, runs[0], say)
    sweep(runs, corpus, output, device=device, compiled=compiled, takes=takes, until=until, say=say)
    found = load(output)
    if report is not None and found:
        from .bytes.report import write

        say.line(f"{write(found, report)}: written")
    if as_json:
        _dump(found)
    elif found:
        _table(found)
        _console().print(f"runs: {output}", style="dim", markup=False)


def _planned(
    runs: list, tokens: float | None, until: float | None, device: str, compiled: bool, output: Path, say: _Says
) -> tuple:
    """(runs with the steps that they make, what each model takes or None)."""
    from dataclasses import replace

    from .bytes.sweep import affordable, begun, load, paces

    if tokens is not None:
        steps = max(round(tokens / (runs[0].batch * runs[0].length)), 1)
        runs = [replace(run, steps=steps) for run in runs]
    if until is None:
        return runs, None
    steps = runs[0].steps if tokens is not None else begun(runs, output)
    done = {(r["run"]["model"], r["run"]["lr"], r["run"]["seed"]) for r in load(output) if r["run"]["steps"] == steps}
    takes = paces([run for run in runs if (run.model, run.lr, run.seed) not in done], device, say, compiled=compiled)
    if steps is None:
        steps = affordable(runs, takes, until - time.monotonic(), compiled)
    runs = [replace(run, steps=steps) for run in runs]
    say.line(f"each model sees {runs[0].tokens:,} bytes in {steps} steps")
    return [run for run in runs if run.model in takes or (run.model, run.lr, run.seed) in done], takes


def _corpus(folders: list[str], pattern: str, run: Any, say: _Says) -> Any:
    """The text, as much of it as a run reads."""
    from .bytes.corpus import Corpus

    start = time.monotonic()
    corpus = Corpus.read(folders, pattern=pattern, length=run.length, size=run.tokens, windows=run.windows)
    say.line(
        f"text: {len(corpus.stream):,} bytes of {corpus.files} files, {len(corpus.windows)} held-out windows of "
        f"{run.length} bytes; read in {time.monotonic() - start:.1f} s"
    )
    return corpus


class _Says:
    """What happens, as lines on stderr."""

    def __init__(self, total: int):
        self.total, self.start = total, time.monotonic()

    def line(self, text: str, style: str | None = None) -> None:
        """One line, after the seconds since the start."""
        where = _console(stderr=True)
        where.print(f"{time.monotonic() - self.start:6.1f} s  {text}", style=style, markup=False, highlight=False)

    def sizes(self, runs: list) -> None:
        """How the models were matched."""
        from .bytes.run import config, cost

        for run in {run.model: run for run in runs}.values():
            made = config(run)
            found = cost(made)
            self.line(
                f"{run.model}: {found['parameters']:,} parameters (MLP {made.intermediate_size}), state {found['state']:,} "
                f"bytes, {found['flops']:,} flops a byte"
            )

    def __call__(self, key: str, news: dict[str, Any]) -> None:
        """What is new of a run."""
        name = " ".join(part.split("=")[1].strip("',") for part in key.split("(")[1].split(", ")[:3:2])
        if news["phase"] == "failed":
            self.line(f"✗ {name}: {news['why']}", "red")
        elif news["phase"] == "timed":
            self.line(f"{name}: {1000 * news['seconds']:.1f} ms a step")
        elif news["phase"] == "left":
            self.line(f"{name}: no time left; the same command goes on with it")
        elif news["phase"] == "running":
            self.line(f"{name}: step {news['step']}, {news['loss']:.3f} bits a byte, held out {news['bits']:.3f}")
        else:
            self.line(f"{name}: {news['bits']:.3f} bits a byte held out, {news['seconds']:.1f} s in all")


def _table(records: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from .bytes.report import standings

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("model", "bits/byte", "range", "bytes", "recalled", "first", "parameters"):
        table.add_column(title, justify="left" if title == "model" else "right", no_wrap=True)
    for s in standings(records):  # of its scored bytes, where a name comes again and where it came first
        recalled, first = ("" if x is None else f"{x:.1%}" for x in (s.recall("accuracy"), s.recall("first_accuracy")))
        spread, size = f"{min(s.bits):.3f} … {max(s.bits):.3f}", f"{s.records[0]['parameters']:,}"
        table.add_row(s.label, f"{s.mean:.3f}", spread, f"{s.run.tokens:,}", recalled, first, size)
    _console().print(table)
