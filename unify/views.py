"""Tables and pages for the command line: the map's edges, a proof, checks, times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .notation import fold, pretty
from .symbols import array

if TYPE_CHECKING:
    from .bench import Bench
    from .derivations import Chain, Edge, Obligation, Proof, Theorem
    from .recall import RecallReport
    from .verify import Check, Verification

GOOD, BAD = Text("✓", style="green"), Text("✗", style="bold red")
_UP = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def table(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """An open table: a dim header line, no frame; columns named in `right` hold numbers."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False, title=title, title_justify="left")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def claim(edge: Edge) -> str:
    """exact, or the order of the limit: ε, ε²."""
    if edge.kind == "exact":
        return "exact"
    return "ε" if edge.order == 1 else "ε" + str(edge.order).translate(_UP)


# --- a configuration --------------------------------------------------------------------------------------------------


def budget_table(budget: dict) -> tuple[Table, Text]:
    """What a configuration costs (`unify.models.budget`), a row for each kind of layer, and what the columns count."""
    numbers = ("layers", "parameters", "state", "flops a token")
    made = table("layer", *numbers, right=numbers)
    for row in budget["rows"]:
        each = (row[name] * row["layers"] for name in ("parameters", "state", "flops"))
        made.add_row(row["layer"], str(row["layers"]), *(f"{x:,}" for x in each))
    total = (f"{budget[name]:,}" for name in ("parameters", "state", "flops"))
    made.add_row("together", "", *total, style="bold")
    note = (
        "\nEach row counts all its layers. State: numbers a sequence carries, "
        f"{budget['bytes'] / 2**20:.1f} MiB (memories in float32, keys and values in bfloat16). "
        f"Flops: one token forward; state and flops of attention after {budget['context']:,} tokens."
    )
    return made, Text(note, style="dim")


# --- the map ----------------------------------------------------------------------------------------------------------


def edges_table(edges: Iterable[Edge]) -> Table:
    """Each edge with the sentence that says why."""
    made = table("parent", "child", "claim", "why")
    for n in (0, 1, 2):
        made.columns[n].no_wrap = True
    last = None
    for e in edges:
        name = "" if e.parent_name == last else e.parent_name
        made.add_row(Text(name, style="bold"), e.child_name, Text(claim(e), style=_style(e)), Text(e.why, style="dim"))
        last = e.parent_name
    return made


def _style(edge: Edge) -> str:
    return "green" if edge.kind == "exact" else "yellow"


def edge_record(edge: Edge) -> dict:
    """An edge for JSON."""
    return {
        "parent": edge.parent_name,
        "child": edge.child_name,
        "kind": edge.kind,
        "order": edge.order,
        "why": edge.why,
        "conditions": edge.conditions(),
        "new": edge.new,
    }


def proofs_table(rows: Sequence[tuple[Edge, Proof | None, float, str]]) -> Table:
    """(edge, proof, seconds, error) of every edge."""
    made = table("", "parent", "child", "claim", "obligations", "scope", "s", right=("obligations", "s"))
    for edge, proof, seconds, error in rows:
        found = (
            ("", "", f"{seconds:.2f}")
            if proof is None
            else (str(len(proof.obligations)), proof.scope, f"{seconds:.2f}")
        )
        kind = Text(claim(edge), style=_style(edge))
        made.add_row(BAD if error else GOOD, edge.parent_name, edge.child_name, kind, *found)
    return made


def proof_record(edge: Edge, proof: Proof | None, seconds: float | None = None, error: str = "") -> dict:
    """A proof for JSON."""
    found = edge_record(edge) | {"verdict": "failed" if error else "proved"}
    if seconds is not None:
        found["seconds"] = round(seconds, 3)
    if proof is None:
        return found | {"error": error}
    return found | {"scope": proof.scope, "obligations": [str(x) for x in proof.obligations], "run": proof.run}


# --- one proof --------------------------------------------------------------------------------------------------------


def chain_view(chain: Chain, width: int) -> Group:
    """A path on the map: what is substituted on the whole, then each edge with its obligations."""
    names = [chain.edges[0].parent_name, *(e.child_name for e in chain.edges)]
    parts = []
    if len(chain.edges) > 1:
        parts += [
            Text.assemble((" → ".join(names), "bold"), f"   {chain.claim}"),
            Text(),
            Text("On the whole", style="bold cyan"),
            _indent(_arguments(chain.edges[0], chain.substitution, width)),
        ]
        if chain.output != 1:
            parts.append(_indent(Text(f"the output times {pretty(chain.output)}")))
    for proof in chain.proofs:
        parts += [*([Text()] if parts else []), proof_view(proof, width)]
    count = sum(len(x.obligations) for x in chain.proofs)
    parts += [Text(), Text.assemble(GOOD, f" proved: {count} obligations, each reduced to 0, for all K and V")]
    return Group(*parts)


def proof_view(proof: Proof, width: int) -> Group:
    """An edge: why, the substitution, the relation of the states, and every obligation."""
    e = proof.edge
    head = Text.assemble(
        (f"{e.parent_name} → {e.child_name}", "bold cyan"), "   ", (claim(e), _style(e)), "   new" if e.new else ""
    )
    parts = [head, _indent(Text(e.why[:1].upper() + e.why[1:] + ".", style="italic"))]
    parts += [_indent(Text(f"where {x}", style="yellow")) for x in e.conditions()]
    parts.append(_indent(_arguments(e, e.arguments(), width)))
    if e.output != 1:
        parts.append(_indent(Text(f"the output times {pretty(e.output)}")))
    parts.append(_indent(_obligations(proof.obligations, width)))
    parts.append(_indent(Text(f"run: {proof.run}", style="dim")))
    return Group(*parts)


def beside_view(proofs: Sequence[Proof], theorems: Sequence[Theorem]) -> Group:
    """Other edges between the same two models, proved as well, and the theorems that go with them."""
    parts: list = [Text("Also between the two", style="bold cyan")]
    lines = [Text.assemble(GOOD, " ", (f"{claim(x.edge):<6}", _style(x.edge)), x.edge.why) for x in proofs]
    parts += map(_indent, lines)
    for theorem in theorems:
        parts += [Text(), Text(f"Theorem: {theorem.name}", style="bold cyan")]
        lines = [("given", x) for x in theorem.hypotheses] + [("then", theorem.statement), ("hence", theorem.corollary)]
        made = Table.grid(padding=(0, 2, 0, 0))
        for word, sentence in lines:
            made.add_row(Text(word, style="dim"), Text(sentence))
        parts.append(_indent(made))
        steps = f" proved in {len(theorem.steps)} steps, each an identity or a sign that sympy checks"
        parts.append(_indent(Text.assemble(GOOD, steps)))
    return Group(*parts)


def _indent(body) -> Padding:
    return Padding(body, (0, 0, 0, 2), expand=False)


def _arguments(edge: Edge, values: dict, width: int) -> Table | Text:
    """The parent's arguments and states in the child's, leaving out what is only handed on."""
    from .derivations.limit import signature
    from .derive import derive

    dims = {name: d for name, (d, _) in signature(edge.parent_triple).items()}
    rows = [("argument", array(name, dims[name]), value) for name, value in values.items()]
    if values.keys() == edge.arguments().keys() and values == edge.arguments():
        states = zip(derive(edge.parent_triple).states, edge.states().values(), strict=True)
        rows += [("state", array(s.name, s.dims), value) for s, value in states]
    rows = [(kind, pretty(left), pretty(value)) for kind, left, value in rows if left != value]
    if not rows:
        return Text("arguments and states are handed on as they are", style="dim")
    made = Table.grid(padding=(0, 2, 0, 0))
    room = width - 24 - max(Text(left).cell_len for _, left, _ in rows)
    for kind, left, right in rows:
        made.add_row(Text(kind, style="dim"), Text(left), Text("=", style="dim"), Text("\n".join(fold(right, room))))
    return made


def _obligations(obligations: Sequence[Obligation], width: int) -> Table:
    made = Table.grid(padding=(0, 2, 0, 0))
    for x in obligations:
        left, right = (fold(pretty(side), width - 26) for side in (x.left, x.right))
        room = "" if x.upto is None else " + O(ε)" if x.upto == 1 else f" + O(ε{str(x.upto).translate(_UP)})"
        room = ", up to anything bounded" if x.upto == 0 else room
        same = (
            [f"  {line}" for line in left]
            if left == right
            else [*(f"  {line}" for line in left), f"= {right[0]}", *(f"  {line}" for line in right[1:])]
        )
        made.add_row(Text(x.phase, style="dim"), Text(x.about), Text("\n".join(same) + room), GOOD)
    return made


# --- checks and times -------------------------------------------------------------------------------------------------


def verification_table(results: Sequence[Verification]) -> Table:
    """The worst error of each check, a line a model."""
    names = list(dict.fromkeys(row.name for result in results for row in result.rows))
    made = table("", "model", *names, "s", right=(*names, "s"))
    for result in results:
        rows = {row.name: row for row in result.rows}
        cells = [_error(rows.get(name)) for name in names]
        made.add_row(
            GOOD if result.passed else BAD, result.model, *cells, f"{sum(row.seconds for row in result.rows):.1f}"
        )
    return made


def _error(check: Check | None) -> Text:
    if check is None or (check.passed and check.worst_error is None):
        return Text("–", style="dim")
    if check.worst_error is None:
        return Text("failed", style="bold red")
    text = "exact" if check.worst_error == 0 else f"{check.worst_error:.0e}"
    return Text(text, style="" if check.passed else "bold red")


def bench_table(report: Bench) -> Table:
    """Chunked form and token loop side by side."""
    s = report.sizes
    title = f"Forward pass, B = {s['B']}, T = {s['T']}, H = {s['H']}, K = V = {s['K']}: median of {report.repeats}"
    columns = ("model", "plan", "dtype", "chunked ms", "loop ms", "ratio", "target", "", "error")
    made = table(*columns, right=("chunked ms", "loop ms", "ratio", "target", "error"), title=title)
    for row in report.rows:
        style = {"met": "green", "missed": "bold red"}.get(row.verdict, "")
        target = "" if row.target is None else f"{row.target:g}×"
        times = (f"{1e3 * row.chunked:.1f}", f"{1e3 * row.loop:.1f}", Text(f"{row.ratio:.1f}×", style="bold"))
        made.add_row(row.model, row.plan, row.dtype, *times, target, Text(row.verdict, style=style), f"{row.error:.0e}")
    return made


def recall_table(report: RecallReport) -> Group:
    """What each memory recalled; below it what the columns mean."""
    columns = ("accuracy %", "z²", "nats", "ranking", "horizon", "beta", "state floats", "s")
    size = f"{report.bytes_scored:,} bytes, memory {report.key_dim} × 256 in every model"
    made = table("model", *columns, right=columns, title=f"Next byte, untrained: {size}")
    made.columns[0].max_width = 22
    best = max(m.accuracy for m in report.models)
    for m in report.models:
        c = m.calibration
        figures = (f"{c.z2:.2f}", f"{c.nll:.2f}", f"{c.ranking:.2f}", str(m.horizon or "–"), f"{m.beta:g}")
        accuracy = Text(f"{100 * m.accuracy:.1f}", style="bold green" if m.accuracy == best else "bold")
        made.add_row(m.name, accuracy, *figures, f"{m.state_floats:,}", f"{m.seconds:.1f}")
    for r in report.references:
        made.add_row(Text(r.name, style="dim"), Text(f"{100 * r.accuracy:.1f}", style="dim"))
    deviation = 100 * (0.25 / report.bytes_scored) ** 0.5
    legend = [
        f"accuracy: one standard error is about {deviation:.1f} points. nats: negative log density.",
        "z²: squared error over predicted variance, 1 is calibrated.",
        "ranking: chance that a hit had a smaller variance than a miss, 0.50 knows nothing.",
        f"horizon (tokens) and beta: chosen on {report.bytes_fitted:,} bytes before the scored ones.",
    ]
    return Group(made, Text(), *(Text(line, style="dim") for line in legend))
