"""The tour: the map, every proof, a model nobody has published, and recall on real text; leaves a readable report.

tour("tour").good      # tour/report.md, with its pictures beside it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

from .errors import UnifyError

if TYPE_CHECKING:
    from .models.zoo import Model
    from .recall import RecallReport
    from .triple import Triple

NEW = """
from unify import Architecture, Posterior, Prior, Triple

homing_delta = Triple(
    Architecture(forgetting="key",                       # each key channel at its own pace
                 value="observation", precision="head",  # beta weighs an observation
                 importance="head"),                     # a well-known key is rewritten less
    Posterior(curvature="key", anchor="predicted"),      # a delta rule, over the importance
    Prior(precision="key", mean="entry"),                # what is forgotten becomes mu_0 again
)
""".strip()
"""Ten lines: the declaration that the tour runs, as the report shows it."""

Tick = Callable[..., None]
Say = Callable[[str], None]


@dataclass
class Tour:
    """What the tour found, section by section; `good` is whether every proof and check held."""

    folder: Path
    quick: bool
    tick: Tick
    say: Say
    good: bool = True
    found: dict = field(default_factory=dict)
    seconds: float = 0.0
    sections: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def add(self, title: str, headline: str, *body: str, good: bool = True) -> None:
        """A finished section, told at once in one line and kept for the report."""
        self.good &= good
        short = headline.partition(": ")[2]
        self.sections.append("\n\n".join([f"## {title}", short[:1].upper() + short[1:], *body]))
        self.say(f"[{'green' if good else 'bold red'}]{'✓' if good else '✗'}[/] {headline}")

    def file(self, name: str) -> Path:
        """A file of the tour's folder."""
        self.files.append(name)
        return self.folder / name


def _nothing(*_: object) -> None:
    pass


def tour(folder: str | Path = "tour", *, quick: bool = False, tick: Tick = _nothing, say: Say = _nothing) -> Tour:
    """Run every part and write folder/report.md with its pictures.

    quick: every part on less (a dozen proofs, 4 kB of text). tick(text, done, total): progress; say(line): one line of
    rich markup as each part ends. Raises UnifyError where the folder cannot be made.
    """
    start, run = time.perf_counter(), Tour(Path(folder), quick, tick, say)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnifyError(f"-o {folder}", f"the folder cannot be made ({error.strerror})", "name another one") from error
    for part in (_map, _proofs, _new_model, _recall):
        part(run)
    run.seconds = time.perf_counter() - start
    _report(run)
    return run


# --- the map and its proofs -------------------------------------------------------------------------------------------


def _map(run: Tour) -> None:
    from .derivations import map_nodes_and_edges
    from .draw import draw_map
    from .models.zoo import OUTSIDE

    run.tick("drawing the map")
    nodes, edges = map_nodes_and_edges()
    for name in ("map.svg", "map.png"):
        draw_map(nodes, edges, run.file(name))
    families = list(dict.fromkeys(node.family for node in nodes))
    run.found["models"] = len(nodes)
    headline = f"The map: {len(nodes)} models in {len(families)} families, {len(edges)} edges."
    outside = [f"- {name}: {why}" for name, why in OUTSIDE.items()]
    run.add(
        "The map",
        headline,
        "An arrow runs from a model to its special case (solid) or its limit (dashed, marked with the order).",
        "![the map of models](map.svg)",
        "Not on it, because they are no single filter with a linear memory:",
        "\n".join(outside),
    )


def _proofs(run: Tour) -> None:
    from .derivations import THEOREMS, all_edges, prove_edge
    from .views import claim

    edges = all_edges()[:: len(all_edges()) // 12] if run.quick else all_edges()
    rows, failed, count = [], [], 0
    for n, edge in enumerate(edges):
        run.tick(f"proving {edge.parent_name} → {edge.child_name}", n, len(edges))
        try:
            count += len(prove_edge(edge).obligations)
            verdict = "proved"
        except UnifyError as error:
            failed.append(str(error))
            verdict = "**failed**"
        rows.append((edge.parent_name, edge.child_name, claim(edge), edge.why, verdict))
    run.found |= {"proved": len(rows) - len(failed), "edges": len(rows)}
    headline = (
        f"The proofs: {len(rows) - len(failed)} of {len(rows)} edges proved, for all K and V ({count} obligations)."
    )
    story = (
        "Each edge is a simulation relation: the parent, its arguments substituted, stays in step with the child at "
        "every token. Its start, step and read are identities that sympy reduces to 0; ε marks a limit, ε its order."
    )
    table = _markdown(("parent", "child", "claim", "why", ""), rows)
    theorems = [f"```text\n{theorem().prove()}\n```" for theorem in THEOREMS.values()]
    run.add("The proofs", headline, story, *(f"- {x}" for x in failed), table, *theorems, good=not failed)


# --- a new model ------------------------------------------------------------------------------------------------------


def _new_model(run: Tour) -> None:
    """Declare, derive, confirm, relate and run a model that is in no zoo."""
    from .confirm import confirm
    from .derive import derive
    from .models.zoo import Model, name_of
    from .plan import plan
    from .structure import structure

    run.tick("deriving a new model")
    space: dict = {}
    exec(NEW, space)
    triple = space["homing_delta"]
    known = name_of(triple)
    model = Model("homing_delta", "Homing delta", "new", triple, "declared in this tour")
    done = confirm(triple)
    found = plan(structure(derive(triple)))
    error, gain = _side_by_side(triple, run.quick)
    edge, proof = _to_kda(triple)
    good = known is None and error < 1e-9 and proof is not None
    headline = f"A new model in ten lines: derived, confirmed, KDA proved a case of it, chunked = loop to {error:.0e}."
    run.say(_escape(f"\n{indent(NEW, '  ')}\n\n{indent(_equations(model), '  ')}\n"))
    story = (
        "Forgetting pulls a memory towards its prior. In the delta rules we know that prior is 0: what is forgotten "
        "is gone. Here it is a learned memory μ₀, so that forgetting leads home; and each key channel's importance "
        "divides the write. No update was typed: the engine solves for it."
    )
    checks = [
        f"- in the zoo: {'no, it is new' if known is None else known}",
        f"- {done}",
        f"- {edge}: {'proved for all K and V, ' + str(proof) + ' obligations' if proof else 'not proved'}",
        f"- schedule: {found.family}, because {found.why}",
        f"- chunked against the token loop: relative error {error:.1e}, {gain:.0f} times faster at this size",
    ]
    run.add(
        "A new model",
        headline,
        story,
        f"```python\n{NEW}\n```",
        "What follows (X before the token, X̃ after forgetting, X′ after it; i value channel, j and l key channels):",
        f"```text\n{_equations(model)}\n```",
        "\n".join(checks),
        good=good,
    )
    _write_latex(run, model)


def _equations(model: Model) -> str:
    from .derive import derive
    from .show import equations

    rows = equations(derive(model.triple))
    left = max(_cells(x[1]) for x in rows)
    return "\n".join(f"{phase:<9}{' ' * (left - _cells(lhs))}{lhs}  =  {rhs}" for phase, lhs, rhs in rows)


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _write_latex(run: Tour, model: Model) -> None:
    from .show import document

    run.file("homing_delta.tex").write_text(document(model), encoding="utf-8")


def _to_kda(triple: Triple) -> tuple[str, int | None]:
    """The edge from the new model to KDA, and how many obligations its proof has; None where it fails."""
    from .derivations import Edge, prove_edge

    rest = {"importance": 0, "prior_mean": 0, "prior_precision": 1}
    words = "with importance 0, μ₀ = 0 and Λ₀ = 1 it is KDA, exactly"
    try:
        edge = Edge(triple, "kda", "exact", words, substitution=rest, relation={"Ibar": 0}, title="Homing delta -> KDA")
        return words, len(prove_edge(edge).obligations)
    except UnifyError:
        return words, None


def _side_by_side(triple: Triple, quick: bool) -> tuple[float, float]:
    """Relative error of the chunked form, and how many times faster than the loop it is."""
    import torch

    from .bench import pair, side_by_side
    from .op import compile
    from .testing import random_inputs, relative_error

    chunked, loop = pair(compile(triple), "homing_delta")
    given = random_inputs(chunked, T=128 if quick else 512, K=32, V=32, dtype=torch.float64)
    error = relative_error(chunked(**given), loop(**given))
    fast, slow = side_by_side([lambda: chunked(**given), lambda: loop(**given)], 1)
    return error, slow / fast


# --- recall -----------------------------------------------------------------------------------------------------------


def _recall(run: Tour) -> None:
    from .recall import MODELS, recall

    size = 4096 if run.quick else 16384
    report = recall(models=MODELS, limit_bytes=size, progress=lambda name, *counts: run.tick(f"{name} reads", *counts))
    report.plot(run.file("recall.png"))
    run.file("recall.json").write_text(report.to_json(), encoding="utf-8")
    accuracy = {m.name: 100 * m.accuracy for m in report.models}
    best = max(accuracy, key=accuracy.__getitem__)
    plain, weighed = accuracy["mamba2"], accuracy["palimpsa"]
    run.found |= {"plain": plain, "importance": weighed, "best": accuracy[best], "winner": best}
    headline = (
        f"Recall on real text, untrained: of the next bytes mamba2 names {plain:.0f} %, palimpsa {weighed:.0f} %, "
        f"{best} {accuracy[best]:.0f} %."
    )
    story = (
        f"Each model reads {report.bytes_scored:,} bytes of {', '.join(report.files)} once, with fixed random keys and "
        "nothing trained, and names the next byte from its memory. z²: squared error over predicted variance, 1 is "
        "calibrated. ranking: the chance that a hit had a smaller variance than a miss, 0.50 knows nothing."
    )
    run.add("Recall on real text", headline, story, _recall_table(report), "![recall by position](recall.png)")


def _recall_table(report: RecallReport) -> str:
    rows = []
    for m in report.models:
        c = m.calibration
        figures = (
            f"{100 * m.accuracy:.1f}",
            f"{c.z2:.2f}",
            f"{c.ranking:.2f}",
            f"{m.state_floats:,}",
            f"{m.seconds:.1f}",
        )
        rows.append((m.name, *figures))
    rows += [(f"*{r.name}*", f"{100 * r.accuracy:.1f}", "", "", "", "") for r in report.references]
    return _markdown(("model", "accuracy %", "z²", "ranking", "state floats", "s"), rows)


# --- the report -------------------------------------------------------------------------------------------------------


_FILES = {
    "map.png": "the map as pixels",
    "homing_delta.tex": "the new model in LaTeX",
    "recall.json": "every figure of the recall",
}


def _report(run: Tour) -> None:
    from . import __version__
    from .bench import machine

    here = ", ".join(f"{name} {value}" for name, value in machine().items() if name != "threads")
    foot = [
        "## How this was made",
        f"unify {__version__}, {run.seconds:.0f} s on {here}.",
        "Again: `unify tour`. A part alone: `unify map`, `unify prove --all`, `unify show MODEL`, `unify recall FILE`.",
        "Beside this file: " + ", ".join(f"[{name}]({name}) ({what})" for name, what in _FILES.items()) + ".",
    ]
    text = "\n\n".join(["# unify: the tour", " ".join(spoken(run)), *run.sections, *foot])
    run.file("report.md").write_text(text + "\n", encoding="utf-8")


def spoken(run: Tour) -> list[str]:
    """What was found, as one would say it."""
    f = run.found
    said = [
        f"{f['models']} published and derived models are one Bayesian filter with different choices.",
        f"{f['proved']} of {f['edges']} relations between them are proved, for every size.",
        "A new model, in no paper we know, took ten lines; everything else about it was derived and checked.",
        f"On real text and without training, the same memory names {f['plain']:.0f} % of the next bytes when it only "
        f"adds, {f['importance']:.0f} % with importances, {f['best']:.0f} % at best ({f['winner']}).",
    ]
    return said if run.good else [*said, "Something failed: see the lines marked ✗."]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    line = lambda cells: "| " + " | ".join(str(x).replace("|", r"\|") for x in cells) + " |"  # noqa: E731
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


__all__ = ["NEW", "Tour", "tour"]
