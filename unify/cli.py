"""The command line: `unify list, show, prove, verify, map, atlas, recall, bench, tour`, and from `cli_...` `convert, inspect,
eval`, `mqar`, `bytes` and `train`.

Heavy modules are imported inside the commands, so that `unify --help` answers at once. A mistake of the user's is one
sentence on stderr and exit code 2; a proof or a check that fails is exit code 1.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from . import __version__
from .errors import UnifyError

USAGE = typer.BadParameter.__mro__[2]  # the class of every usage error, wherever this version of typer keeps it


class _Commands(TyperGroup):
    """Runs a command and turns what went wrong into one sentence and an exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except UnifyError as error:
            code = _complain(str(error))
        except USAGE as error:
            where = getattr(error.ctx, "command_path", None) or "unify"
            code = _complain(f"{error.format_message().rstrip('.')}; {where} --help says what it takes")
        except BrokenPipeError:  # the reader of a pipe went away, as `head` does
            sys.stderr.close()
            code = 0
        except OSError as error:
            code = _complain(
                f"{error.filename or 'a file'}: {error.strerror or error}; name a place that you may write to"
            )
        except (typer.Abort, KeyboardInterrupt):
            code = _complain("interrupted", 130)
        if standalone_mode:
            sys.exit(code or 0)
        return code


def _complain(sentence: str, code: int = 2) -> int:
    typer.echo("unify: " + " ".join(sentence.split()), err=True)
    return code


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Gated linear attention as one Bayesian filter: a triple gives a recurrence, its proofs and its speed.",
    epilog="Start with: unify list, unify show palimpsa, unify tour.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for another program.")]
Latex = Annotated[bool, typer.Option("--latex", help="Print LaTeX.")]
All = Annotated[bool, typer.Option("--all", help="Everything there is.")]


def main() -> None:
    """The console script."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make a busy machine ten times slower
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unify {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# --- what every command needs -----------------------------------------------------------------------------------------


def _width() -> int:
    from shutil import get_terminal_size

    return max(60, min(get_terminal_size((100, 40)).columns, 110))


def _console(stderr: bool = False):
    from rich.console import Console

    return Console(width=_width(), stderr=stderr, highlight=False)


def _dump(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@contextmanager
def _progress(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar on stderr, gone when the work is done: tick(text, done, total) moves it; nothing is drawn into a pipe."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    console = _console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def tick(text: str | None = None, done: float | None = None, total: float | None = None) -> None:
            bar.update(task, description=title if text is None else f"{title} {text}", completed=done, total=total)

        yield tick


def _usage(given: str, fails: str, works: str) -> UnifyError:
    return UnifyError(given, fails, works)


def _names(models: list[str] | None, everything: bool) -> list[str]:
    """Names in the zoo, checked, or all of them."""
    from .models import zoo

    if everything and models:
        raise _usage(f"--all with {', '.join(models)}", "both say which models", "name models or say --all")
    if not everything and not models:
        raise _usage("no model", "nothing says which models", "name some (unify list), or say --all")
    return list(zoo.ZOO) if everything else [zoo.get(name).name for name in models or ()]


# --- the commands -----------------------------------------------------------------------------------------------------


@app.command("list")
def list_models(
    family: Annotated[
        str | None, typer.Option("--family", "-f", metavar="F", help="One family only, such as 'delta rules'.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the models, and what is outside the framework and why."""
    from . import show
    from .models import zoo

    models = [m for m in zoo.ZOO.values() if family is None or m.family.lower().startswith(family.lower())]
    if not models:
        raise _usage(
            f"family {family!r}",
            "there is no such family",
            f"use one of {', '.join(dict.fromkeys(m.family for m in zoo.ZOO.values()))}",
        )
    if as_json:
        _dump({"models": [show.zoo_record(m) for m in models], "outside": zoo.OUTSIDE})
        return
    console = _console()
    with _progress("deriving", len(models)) as tick:
        lines = []
        for line in show.zoo_lines(models):
            lines.append(line)
            tick(done=sum("\n" not in x.plain for x in lines) / 2)
    console.print(*lines, sep="\n")
    if family is None:
        console.print(show.outside(zoo.OUTSIDE))
    more = f"One in full: unify show {models[0].name}. How they hang together: unify prove, unify map."
    console.print(f"\n{len(models)} models. {more}", style="dim")


@app.command("show")
def show_model(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A model's name (unify list).")] = None,
    latex: Latex = False,
    as_json: Json = False,
    source: Annotated[bool, typer.Option("--source", help="Also the Python source of one token's step.")] = False,
    kernel: Annotated[bool, typer.Option("--kernel", help="Also its Triton source, forward and backward.")] = False,
    config: Annotated[
        str | None, typer.Option("--config", metavar="C", help="Instead: what a preset or a config.json costs.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", metavar="N", min=1, help="--config: tokens that attention has seen.")
    ] = None,
) -> None:
    """Show every stage of a model: triple, free energy, equations, structure, plan, cost.

    With --config the parameters, state and flops per token of a language model.
    """
    from . import show
    from .models import zoo

    if (model is None) == (config is None):
        raise _usage("show", "it shows one thing", "name a model (unify list), or --config and a preset or config.json")
    if config is not None:
        if latex or source or kernel:
            raise _usage("--config", "a configuration is shown as a table", "leave out --latex, --source and --kernel")
        _show_config(config, context, as_json)
        return
    if context is not None:
        raise _usage("--context", "only attention has one", "say which --config")
    found = zoo.get(model)
    if latex and as_json:
        raise _usage("--latex with --json", "they are two forms of one output", "choose one; the JSON holds the LaTeX")
    if as_json:
        _dump(show.record(found))
    elif latex:
        typer.echo(show.document(found))
    else:
        _console().print(show.view(found, source=source, kernel=kernel, width=_width()))


def _show_config(source: str, context: int | None, as_json: bool) -> None:
    from .models import budget, read
    from .views import budget_table

    found = budget(read(source), context)
    if as_json:
        _dump(found)
    else:
        _console().print(*budget_table(found), sep="\n")


@app.command()
def prove(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="PARENT CHILD", help="Two models, general first.")
    ] = None,
    everything: All = False,
    as_json: Json = False,
    latex: Latex = False,
) -> None:
    """Prove that one model is a special case or a limit of another; alone, list the map's edges."""
    from .derivations import all_edges

    if everything and models:
        raise _usage(
            f"--all with {', '.join(models)}", "both say what to prove", "name a parent and a child, or say --all"
        )
    if models and len(models) != 2:
        raise _usage(" ".join(models), "a proof has two ends", "name a parent and a child: unify prove palimpsa mamba2")
    if latex and (as_json or not models):
        raise _usage("--latex", "it is the form of one proof", "name a parent and a child, without --json")
    if models:
        _prove_path(*models, as_json, latex)
    elif everything:
        _prove_all(as_json)
    elif as_json:
        from .views import edge_record

        _dump([edge_record(e) for e in all_edges()])
    else:
        _print_map(all_edges())


def _print_map(edges: tuple) -> None:
    from .views import edges_table

    console = _console()
    console.print(edges_table(edges))
    count = sum(e.kind == "exact" for e in edges)
    console.print(
        f"\n{len(edges)} edges: {count} exact, {len(edges) - count} limits (ε: the order of the error).", style="dim"
    )
    console.print(
        "A proof: unify prove PARENT CHILD, over several edges too. All of them: unify prove --all.", style="dim"
    )


def _prove_path(parent: str, child: str, as_json: bool, latex: bool) -> None:
    from .derivations import prove as find
    from .views import beside_view, chain_view, proof_record

    with _progress(f"proving {parent} → {child}"):
        chain = find(parent, child)
        others, theorems = _beside(parent, child, chain)
    if as_json:
        edges = [proof_record(x.edge, x) for x in chain.proofs]
        also = [proof_record(x.edge, x) for x in others]
        _dump({"claim": chain.claim, "edges": edges, "also": also, "theorems": [str(x) for x in theorems]})
    elif latex:
        typer.echo(_chain_latex(chain))
    else:
        console = _console()
        console.print(chain_view(chain, _width()))
        if others or theorems:
            console.print("", beside_view(others, theorems), sep="\n")


def _beside(parent: str, child: str, chain: Any) -> tuple[list, list]:
    """The other edges from one model to the other, proved, and the theorems that go with any of them."""
    from .derivations import THEOREMS, all_edges, prove_edge

    direct = [e for e in all_edges() if (e.parent_name, e.child_name) == (parent, child)]
    theorems = [THEOREMS[e.theorem]().prove() for e in direct if e.theorem in THEOREMS]
    return [prove_edge(e) for e in direct if e not in chain.edges], theorems


def _chain_latex(chain: Any) -> str:
    parts = [
        f"% {chain.edges[0].parent_name} -> {chain.edges[-1].child_name}: {chain.claim}",
        r"\[",
        chain.latex(),
        r"\]",
    ]
    for proof in chain.proofs:
        parts += [
            f"% {proof.edge.parent_name} -> {proof.edge.child_name}: {proof.edge.why}",
            r"\[",
            proof.latex(),
            r"\]",
        ]
    return "\n".join(parts)


def _prove_all(as_json: bool) -> None:
    from .derivations import all_edges
    from .views import proof_record, proofs_table

    edges = all_edges()
    with _progress("proving", len(edges)) as tick:
        rows = proofs(edges, lambda name, n: tick(name, n))
    failed = [row for row in rows if row[3]]
    if as_json:
        _dump([proof_record(*row) for row in rows])
    else:
        console = _console()
        console.print(proofs_table(rows))
        for edge, _, _, error in failed:
            console.print(f"✗ {edge.parent_name} → {edge.child_name}: {error}", style="red", markup=False)
        seconds = sum(row[2] for row in rows)
        console.print(
            f"\n{len(rows) - len(failed)} of {len(rows)} edges proved, for all K and V, in {seconds:.0f} s.",
            style="bold",
        )
    if failed:
        raise typer.Exit(1)


def proofs(edges: tuple, progress: Callable[[str, int], None]) -> list[tuple[Any, Any, float, str]]:
    """Prove every edge: (edge, proof or None, seconds, what failed or nothing)."""
    from .derivations import prove_edge

    rows = []
    for n, edge in enumerate(edges):
        progress(f"{edge.parent_name} → {edge.child_name}", n)
        start, proof, error = time.perf_counter(), None, ""
        try:
            proof = prove_edge(edge)
        except UnifyError as failure:
            error = str(failure)
        rows.append((edge, proof, time.perf_counter() - start, error))
    return rows


@app.command()
def verify(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL", help="Names (unify list).")] = None,
    everything: All = False,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="D", help="Also the Triton kernels on cuda, or interpreted on cpu."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check models against everything known about them; the worst error of each check."""
    names = _names(models, everything)
    if device is not None:
        from .device import usable, versions

        usable(device)
    from .verify import verify as check
    from .views import verification_table

    results = []
    with _progress("verifying", len(names)) as tick:
        for n, name in enumerate(names):
            say = lambda part, name=name, n=n: tick(f"{name}: {part}", n)  # noqa: E731
            results.append(check(name, device=device, progress=say))
    failed = [(result.model, row) for result in results for row in result.rows if not row.passed]
    if as_json:
        _dump([{**asdict(result), "passed": result.passed} for result in results])
    else:
        console = _console()
        console.print(verification_table(results))
        for model, row in failed:
            console.print(f"✗ {model}, {row.name}: {row.note}", style="red", markup=False)
        where = "" if device is None else f" but for the Triton backend's ({versions(device)})"
        outcome = "A check failed." if failed else "Every check passed."
        console.print(f"\nWorst relative errors, in float64{where}. {outcome}")
    if failed:
        raise typer.Exit(1)


@app.command("map")
def draw(
    output: Annotated[Path, typer.Option("--output", "-o", help="An .svg, .png or .pdf file.")] = Path("map.svg"),
) -> None:
    """Draw the map of models."""
    from .derivations import map_nodes_and_edges
    from .draw import draw_map

    nodes, edges = map_nodes_and_edges()
    with _progress(f"drawing {len(nodes)} models and {len(edges)} edges"):
        draw_map(nodes, edges, output)
    typer.echo(f"{output}: {len(nodes)} models, {len(edges)} edges")


@app.command()
def atlas(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder, or an older atlas.")
    ] = Path("atlas"),
) -> None:
    """Write a web site of the map: every model, every edge with its proof and error, any two models side by side."""
    from .atlas import write

    with _progress("atlas:") as tick:
        made = write(output, tick)
    index = (output / "index.html").resolve()
    typer.echo(f"{output}: {len(made.models)} models and {made.edges} edges; open {index.as_uri()} in a browser")


TEXTS = (".py", ".txt", ".md")


@app.command()
def recall(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Texts, or folders of .py, .txt and .md files.")
    ] = None,
    models: Annotated[str | None, typer.Option("--models", "-m", metavar="A,B,C", help="Models to compare.")] = None,
    size: Annotated[int, typer.Option("--bytes", "-n", metavar="N", min=64, help="Read this many bytes.")] = 32768,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random keys.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Draw the result into this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what untrained memories recall of a text: what importance, delta rules and exact solves buy."""
    from . import recall as measure
    from .views import recall_table

    if output is not None and output.suffix not in (".png", ".svg", ".pdf"):
        raise _usage(f"-o {output}", "its suffix names no picture", "use .png, .svg or .pdf")
    names = [name.strip() for name in models.split(",") if name.strip()] if models is not None else measure.MODELS
    texts = _texts(files) if files else None
    with _progress("reading") as tick:
        report = measure.recall(texts, names, limit_bytes=size, seed=seed, progress=tick)
    if output is not None:
        report.plot(output)
    if as_json:
        typer.echo(report.to_json())
        return
    console = _console()
    console.print(recall_table(report))
    console.print(f"text: {', '.join(report.files)}", style="dim", markup=False)
    if output is not None:
        console.print(f"picture: {output}", markup=False)


def _texts(paths: list[Path]) -> list[Path]:
    """Files as they are, folders walked for texts in alphabetical order."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(
            x
            for x in path.rglob("*")
            if x.suffix in TEXTS and not any(y.startswith(".") for y in x.relative_to(path).parts)
        )
        if path.is_dir() and not inside:
            raise _usage(
                str(path),
                f"the folder holds no {', '.join(TEXTS[:-1])} or {TEXTS[-1]} file",
                "name the files themselves",
            )
        found += inside if path.is_dir() else [path]
    return found


class _Bench(TyperCommand):
    """`--json` alone prints, `--json FILE` names the record: typer knows no option whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        out: list[str] = []
        for word, after in zip(args, [*args[1:], "--"], strict=True):
            out += [word, "-"] if word == "--json" and after.startswith("-") and after != "-" else [word]
        return super().parse_args(ctx, out)


@app.command(cls=_Bench)
def bench(
    device: Annotated[str, typer.Option("--device", metavar="D", help="cpu, cuda, or auto: what there is.")] = "auto",
    only: Annotated[
        str | None, typer.Option("--only", "--models", "-m", metavar="A,B,C", help="Models to time.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="cpu: an eighth of the tokens, fewer repeats.")] = False,
    parts: Annotated[
        str | None, typer.Option("--parts", metavar="A,B,C", help="cuda: some of table, first, length, decode.")
    ] = None,
    rivals: Annotated[bool, typer.Option(help="cuda: also flash-linear-attention, where it is installed.")] = True,
    beside: Annotated[
        Path | None, typer.Option("--beside", metavar="DIR", help="cuda: packages that only the rivals see.")
    ] = None,
    limit: Annotated[float | None, typer.Option("--limit", metavar="S", min=1, help="cuda: seconds a model.")] = None,
    to: Annotated[
        str | None, typer.Option("--json", metavar="[FILE]", help="Print JSON; cuda: add to this record.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw a record, into -o.")] = None,
    table: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="A record as Markdown, printed or into a page -o.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="PLACE", help="See --plot, --table.")] = None,
) -> None:
    """Time what is fast against what is plain, after checking that both say the same.

    On a CPU the chunked forward against the token loop. On a GPU the kernels beside flash-linear-attention's.
    """
    if plot or table:
        _bench_report(plot, table, output)
        return
    from torch.cuda import is_available

    if device not in ("auto", "cpu", "cuda"):
        raise _usage(f"--device {device}", "nothing is timed there", "use cpu, cuda or auto")
    names = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    gpu = device == "cuda" or (device == "auto" and is_available())
    if gpu and quick:
        raise _usage("--quick on a GPU", "it shortens the benchmark on a CPU", "choose --parts, or --device cpu")
    if not gpu and (parts or (to is not None and to != "-")):
        raise _usage("--parts or a record", "the benchmark on a CPU has neither", "use --json alone, or --device cuda")
    if gpu:
        _bench_gpu(names, parts, to, {"rivals": rivals, "beside": beside, **({"limit": limit} if limit else {})})
    else:
        _bench_cpu(names, quick, to is not None)


def _bench_report(plot: Path | None, table: Path | None, output: Path | None) -> None:
    """Pictures or Markdown of a record; nothing is timed."""
    from .race import load
    from .standings import draw, markdown, written

    if plot and table:
        raise _usage("--plot with --table", "both say where to write", "run one after the other")
    path = plot or table
    if not path.exists():
        raise _usage(
            str(path), "there is no such record", "measure one on a GPU: unify bench --device cuda --json FILE"
        )
    record = load(path)
    if plot:
        files = draw(record, output or path.parent)
        typer.echo("\n".join(map(str, files)) or f"{plot}: nothing in it to draw yet")
    elif output is None:
        typer.echo(markdown(record))
    else:
        output.write_text(written(output.read_text(encoding="utf-8"), record), encoding="utf-8")
        typer.echo(f"{output}: written from {table}")


def _bench_gpu(names: list[str] | None, parts: str | None, to: str | None, options: dict[str, Any]) -> None:
    """Measure into a record and print it."""
    from .race import PARTS, default_path, race
    from .standings import markdown

    path = default_path() if to in (None, "-") else Path(to)
    chosen = PARTS if parts is None else [part.strip() for part in parts.split(",") if part.strip()]
    record = race(path, names or (), chosen, say=lambda text: typer.echo(text, err=to == "-"), **options)
    if to == "-":
        _dump(record)
    else:
        typer.echo(f"\n{markdown(record)}\n\nrecord: {path}")


def _bench_cpu(models: list[str] | None, quick: bool, as_json: bool) -> None:
    """The chunked forward beside the token loop."""
    from . import bench as timing
    from .models import zoo
    from .views import bench_table

    names = timing.MODELS if models is None else [zoo.get(name).name for name in models]
    with _progress("timing") as tick:
        report = timing.bench(names, quick=quick, progress=tick)
    if as_json:
        _dump(report.record())
        return
    console = _console()
    console.print(bench_table(report))
    console.print(
        "\n" + ", ".join(f"{name} {value}" for name, value in report.machine.items()), style="dim", markup=False
    )
    if report.busy:
        console.print("The machine was busy with other work: time it again when it is not.", style="yellow")


@app.command()
def tour(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report and its pictures.")] = Path(
        "tour"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Every part, on less: a few proofs, less text.")] = False,
) -> None:
    """See what unify does: map, proofs, a new model, recall on real text; leaves a report."""
    from .tour import spoken
    from .tour import tour as run

    console = _console()
    with _progress("") as tick:
        result = run(output, quick=quick, tick=tick, say=lambda text: console.print(text))
    console.print("\n" + " ".join(spoken(result)))
    console.print(f"\n{result.seconds:.0f} s. The report, with pictures: [bold]{output / 'report.md'}[/]")
    if not result.good:
        raise typer.Exit(1)


from . import cli_bytes, cli_models, cli_mqar, cli_train  # noqa: E402, F401 - add bytes; convert, inspect, eval; mqar; train

if __name__ == "__main__":
    main()
