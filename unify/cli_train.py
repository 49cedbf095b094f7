"""`unify train`: a language model, by a configuration file; the same file for one process and for many nodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .cli import Json, _console, _dump, app


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="JSON or YAML: model, data, length, trainer ...")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the output folder's last checkpoint, if any.")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(help="Add the throughput, without compilation, as a line of JSON to this file (unify evidence)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a language model on local text, by transformers' Trainer; torchrun -m unify train CONFIG on several GPUs."""
    import torch

    from .cli_models import _quiet
    from .mqar.sweep import add
    from .scale import training
    from .training import read
    from .training import train as run

    _quiet()
    found = run(read(config), config.stem, resume, lambda text: typer.echo(text, err=True), timed=record is not None)
    if torch.distributed.is_initialized():  # or its threads end some exits with an abort
        torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", 0)):
        return
    if record:
        add(record, training(found, "train", config, "--record", record))
    if as_json:
        _dump(found)
        return
    held = "" if found["held_out"] is None else f"held out {found['held_out']:.4f}, "
    _console().print(
        f"{found['steps']} steps, {found['parameters']:,} parameters: loss {found['loss']:.4f}, {held}"
        f"{found['tokens_per_second']:,.0f} tokens/s.\n{found['folder']}: AutoModelForCausalLM.from_pretrained loads it.",
        markup=False,
    )
