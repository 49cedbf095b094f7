"""Commands over checkpoint folders: `unify convert`, `unify inspect` and `unify eval`."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli import Json, _console, _dump, _progress, _usage, app

Importance = Annotated[
    str | None,
    typer.Option("--importance", metavar="key|diagonal", help="Default: key for delta rules, else diagonal."),
]
Rank = Annotated[int | None, typer.Option("--rank", metavar="R", min=1, help="Rank of the importance's projection.")]
DTYPES = ("float32", "bfloat16", "float16")


def _quiet() -> None:
    """transformers' own bars and hints off: this command has its own, and a hint is no mistake."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A folder that does not exist yet.")],
    importance: Importance = None,
    rank: Rank = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="T", help=f"Write as {', '.join(DTYPES)}.")] = None,
    check: Annotated[bool, typer.Option(help="Compare logits before and after, on random tokens and text.")] = True,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Write what is added, not the host.")] = False,
    as_json: Json = False,
) -> None:
    """Make a checkpoint metaplastic: the same model, with an importance that starts at zero."""
    if dtype not in (None, *DTYPES):
        raise _usage(f"--dtype {dtype}", "no checkpoint is written so", f"use one of {', '.join(DTYPES)}")
    import torch

    from .models.checkpoint import convert_folder

    _quiet()
    with _progress(f"converting {source.name}:") as tick:
        model, result = convert_folder(
            source, target, importance=importance, rank=rank, dtype=dtype and getattr(torch, dtype),
            verify=check, adapter_only=adapter_only, say=tick,
        )  # fmt: skip
    done = model.metaplasticity
    if as_json:
        errors = None if result is None else result.errors
        _dump({"target": str(target), "mixers": done.mixers, "rank": done.rank, "added": done.added,
               "total": done.total, "errors": errors, "bound": result and result.bound})  # fmt: skip
        return
    console = _console()
    console.print(str(done), markup=False)
    same = "Not compared with its host." if result is None else f"Logits differ from the host's by: {result}."
    console.print(same, markup=False)
    base = ", base=SRC" if adapter_only else ""
    console.print(f"{target}: unify.load({str(target)!r}{base})", style="dim", markup=False)


@app.command("inspect")
def inspect_checkpoint(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint folder; its weights are not read.")],
    importance: Importance = None,
    rank: Rank = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint's layers: which triple each is, and what conversion would add."""
    from .models.checkpoint import inspect_folder

    _quiet()
    kind, total, parts = inspect_folder(path, importance, rank)
    added = sum(part.adds for part in parts)
    if as_json:
        rows = [{"name": p.name, "class": p.kind, "triple": p.source and str(p.source), "adds": p.adds} for p in parts]
        _dump({"model_type": kind, "parameters": total, "adds": added, "parts": rows})
        return
    console = _console()
    console.print(_parts_table(parts))
    for source in dict.fromkeys(part.source for part in parts if part.source is not None):
        console.print(f"\n{_called(source)}\n{source}", style="dim", markup=False)
    known = sum(part.source is not None for part in parts)
    if (path / "unify_adapter.json").exists():
        console.print("\nIt holds an adapter: it is metaplastic already.", markup=False)
    console.print(f"\n{kind}, {total:,} parameters. Conversion would change {known} of {len(parts)} mixers and add "
                  f"{added:,} parameters ({added / total:.2%}).", markup=False)  # fmt: skip


def _called(triple: Any) -> str:
    """A triple's label in the zoo, or what it forgets by."""
    from .models.zoo import ZOO, name_of

    name = name_of(triple)
    return ZOO[name].label if name else f"forgetting {triple.architecture.forgetting}"


def _parts_table(parts: list) -> Any:
    """One row for each run of equal parts."""
    from itertools import groupby

    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (("mixers", "left"), ("class", "left"), ("is", "left"), ("gains", "left"), ("adds", "right")):
        table.add_column(title, justify=justify)
    for (kind, source, target, adds), run in groupby(parts, key=lambda p: (p.kind, p.source, p.target, p.adds)):
        names = [part.name for part in run]
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        if source is None:
            table.add_row(where, kind, "left as it is", "", "", style="dim")
        else:
            table.add_row(where, kind, _called(source), f"importance, {target.posterior.curvature}", f"{adds:,} each")
    return table


@app.command("eval")
def evaluate_checkpoint(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint folder: native, converted, or a host.")],
    tasks: Annotated[
        str, typer.Option("--tasks", "-t", metavar="A,B,C", help="commonsense, needles, or the harness's task names.")
    ],
    include: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="A folder with tasks of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Examples a task.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Examples at once.")] = 1,
    device: Annotated[str, typer.Option("--device", metavar="D", help="cpu, cuda, or auto: what there is.")] = "auto",
    to: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the scores into FILE.")] = None,
) -> None:
    """Score a checkpoint on standard benchmarks, with lm-evaluation-harness (the extra `eval`)."""
    from .evaluate import evaluate, need_harness, table

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise _usage("--tasks", "it names none", "use commonsense, needles, or names of lm-evaluation-harness")
    need_harness()
    _quiet()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what every evaluation here does
    rows = evaluate(path, names, include=include, limit=limit, batch_size=batch_size, device=device)
    if to is not None:
        versions = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
        record = {"model": str(path), "limit": limit, "versions": versions, "scores": [asdict(row) for row in rows]}
        to.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _console().print(table(rows))
