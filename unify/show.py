"""A model on a screen: every stage from the triple to the plan, in words and mathematics.

console.print(view(zoo.get("palimpsa")))      # rich, for a terminal
document(zoo.get("palimpsa"))                 # a LaTeX fragment
record(zoo.get("palimpsa"))                   # a dict for JSON
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from .derive import derive
from .energy import FreeEnergy, free_energy
from .notation import MEANING, energy_parts, fold, latex, polynomial, pretty, static_names
from .plan import Plan, plan
from .recurrence import PHASES, Recurrence
from .structure import Structure, structure
from .symbols import SIZE, K, V, array, arrays, i, j, name_of
from .triple import Ridge, Triple

if TYPE_CHECKING:
    import sympy as sp

    from .models.zoo import Model

WIDTH = 100
AT = 64  # K = V, where a count is also given as a number


@dataclass(frozen=True)
class Stages:
    """A model with every stage that is derived from its triple."""

    model: Model

    @cached_property
    def energy(self) -> FreeEnergy:
        """F_t."""
        return free_energy(self.triple)

    @cached_property
    def recurrence(self) -> Recurrence:
        """Predict, observe, project, read."""
        return derive(self.triple)

    @cached_property
    def structure(self) -> Structure:
        """The facts that decide a schedule."""
        return structure(self.recurrence)

    @cached_property
    def plan(self) -> Plan:
        """The schedule."""
        return plan(self.structure)

    @property
    def triple(self) -> Triple:
        """The declaration."""
        return self.model.triple


# --- the triple in words ----------------------------------------------------------------------------------------------

_PER = {
    "one": "1",
    "head": "per head",
    "key": "per key channel",
    "value": "per value channel",
    "entry": "per memory entry",
}
_FORGETTING = {
    "none": "nothing is forgotten: α = 1",
    "fixed": "one constant α a head",
    "head": "α per token and head",
    "key": "α per token, head and key channel",
    "entry": "a constant α per memory entry",
}
_CURVATURE = {
    "none": "none: the precision never leaves the prior's",
    "isotropic": "isotropic: one importance a head",
    "key": "diagonal, shared by the value channels: one importance a key channel",
    "diagonal": "diagonal: one importance a memory entry",
    "full": "full: the exact Bayes update",
}
_ANCHOR = {
    "prior": "the prior mean μ₀",
    "predicted": "the predicted mean, after forgetting",
    "previous": "the previous mean, before forgetting",
}
_PROJECTION = {
    "keep": "the precision is carried on as it is",
    "diagonal": "only its diagonal is carried on",
    "reset": "the precision goes back to the prior's after every token",
}
_KEYS = {"complement": "k = 1 − α", "tempered": "k is scaled by (−g / τ)^τ"}


def words(triple: Triple) -> list[tuple[str, list[tuple[str, str]]]]:
    """The three legs as (leg, [(choice, what it means)]), leaving out what the model does not use."""
    return [("architecture", _architecture(triple)), ("posterior", _posterior(triple)), ("prior", _prior(triple))]


def _architecture(t: Triple) -> list[tuple[str, str]]:
    a = t.architecture
    seen = "is observed with precision " + ("1" if a.precision == "one" else f"β, {_PER[a.precision]}")
    rows = [
        ("forgetting", _FORGETTING[a.forgetting]),
        ("value", "v is evidence: r = β v" if a.value == "evidence" else f"v {seen}"),
    ]
    if a.importance != "tied":
        rows.append(("importance", f"b, {_PER[a.importance]}, a gate apart from the writing"))
    if a.write_gate:
        rows.append(("write gate", "ω on the value, per value channel"))
    if a.key != "free":
        rows.append(("key", _KEYS[a.key]))
    if len(a.stages) > 1 or not a.stages[0].plain:
        each = "; ".join(
            f"write along {o.key.replace('-', '−')}, read by {o.read or o.key}{'' if o.target else ', target 0'}"
            for o in a.observations
        )
        rows.append(("observations", each + (f"; {a.repeats} times a token" if a.repeats > 1 else "")))
    read = "after the token is written" if a.read == "after" else "before the token is written"
    rows.append(
        (
            "read",
            read
            + (", with a bonus u for it" if a.bonus else "")
            + (", mixed with the plain query by γ" if a.mix else ""),
        )
    )
    if a.scale is not None or a.maps:
        rows.append(
            (
                "layer",
                ", ".join(
                    [*([f"scale {a.scale:g}"] if a.scale is not None else []), *(f"{x} on q and k" for x in a.maps)]
                ),
            )
        )
    return rows


def _each(value, words_of: dict[str, str]) -> str:
    return words_of[value] if isinstance(value, str) else "; then ".join(words_of[x] for x in value)


def _posterior(t: Triple) -> list[tuple[str, str]]:
    p = t.posterior
    rows = [("curvature", _each(p.curvature, _CURVATURE))]
    rows.append(("anchor", "drops out" if set(t.curvatures) == {"full"} else _each(p.anchor, _ANCHOR)))
    if p.anchor_weight != "one":
        rows[-1] = ("anchor", f"{rows[-1][1]}, weighed by η {_PER[p.anchor_weight]}")
    if t.curvature != "none":
        rows.append(("projection", _PROJECTION[p.projection] + (", the information times κ" if p.gain else "")))
    return rows


def _prior(t: Triple) -> list[tuple[str, str]]:
    p = t.prior
    if p.adaptive is not None:
        precision = "Λ₀ follows the data: " + (
            "ρ times the size of P" if isinstance(p.adaptive, Ridge) else "a squashed second moment of the keys"
        )
    else:
        precision = "Λ₀ = 1" if p.precision == "one" else f"Λ₀ {_PER[p.precision]}"
    rows = [("precision", precision), ("mean", "μ₀ = 0" if p.mean == "zero" else "μ₀ per memory entry")]
    if p.dynamics == "diffusion":
        rows.append(
            ("dynamics", f"diffusion: s = α s + noise of variance w, {_PER.get(p.noise, 'a constant per head')}")
        )
    elif t.architecture.forgetting != "none":
        rows.append(("dynamics", "power: what is forgotten is handed back to the prior"))
    return rows


def brief(triple: Triple) -> tuple[str, str, str]:
    """The triple in three cells: (forgetting, curvature / anchor / projection, prior)."""
    p = triple.posterior
    slash = lambda x: x if isinstance(x, str) else ", ".join(dict.fromkeys(x))  # noqa: E731
    parts = [slash(p.curvature), "–" if set(triple.curvatures) == {"full"} else slash(p.anchor)]
    if p.projection != "keep":
        parts.append(p.projection)
    prior = (
        "diffusion"
        if triple.prior.dynamics == "diffusion"
        else "adaptive"
        if triple.prior.adaptive
        else triple.prior.precision
    )
    return triple.architecture.forgetting, "/".join(parts), {"one": "1"}.get(prior, prior)


# --- equations --------------------------------------------------------------------------------------------------------

_KL = {"old": "q‖qₜ₋₁", "prior": "q‖p₀", "predicted": "q‖q̃ₜ"}


def energy_rows(stages: Stages, n: int) -> list[tuple[str, str]]:
    """F_t of the n-th observation, term by term: (what it is, Unicode)."""
    gate = {"none": "", "key": "αⱼ ", "entry": "αⱼᵢ "}.get(stages.triple.architecture.forgetting, "α ")
    lead = {
        "loss": "E_q[loss]",
        "old": f"{gate}KL({_KL['old']})",
        "prior": f"(1 − {gate.strip()}) KL({_KL['prior']})",
        "predicted": f"KL({_KL['predicted']})",
    }
    return [(lead[kind], pretty(expr)) for kind, expr in energy_parts(stages.energy, n)]


def belief(stages: Stages) -> list[tuple[sp.Expr, sp.Expr]]:
    """The moments of q_{t-1} that stand in F_t, in terms of the states: (moment, expression)."""
    e, (mean, precision) = stages.energy, stages.recurrence.moments[0]
    parts = [expr for n in range(len(e.losses)) for _, expr in energy_parts(e, n)]
    used = {name_of(x): x for expr in parts for x in arrays(expr)}
    rows = []
    if "mu" in used:
        whole = array("Lambda") * array("mu"), array("M")
        rows.append(whole if e.carried_full else (array("mu", (j, i)), mean))
    if "Lambda" in used:
        rows.append((used["Lambda"], precision))
    return rows


def equations(recurrence: Recurrence) -> list[tuple[str, str, str]]:
    """The program as (phase, left, right) in Unicode; the phase stands at its first equation only."""
    rows = []
    for phase in PHASES:
        rows += [(phase if n == 0 else "", *step.pretty()) for n, step in enumerate(recurrence.phase(phase))]
    return rows


def legend(recurrence: Recurrence) -> list[tuple[str, str, str, str]]:
    """Inputs, then states: (symbol, name in the op, shape, meaning)."""
    t = recurrence.triple
    rows = []
    for x in recurrence.inputs:
        name = "k_raw" if x.name == "k" and t.architecture.key == "tempered" else x.name
        meaning = MEANING.get(x.name, "an input")
        if x.name == "v":
            meaning = "value: evidence r = βv" if t.architecture.value == "evidence" else "value that is observed"
        rows.append((pretty(array(name, x.dims)), x.name, x.shape, meaning))
    starts = {s.name: f"{MEANING[s.name]}; starts at {pretty(s.initial)}" for s in recurrence.states}
    return rows + [(pretty(array(s.name, s.dims)), s.name, s.shape, starts[s.name]) for s in recurrence.states]


_MADE = {
    "alpha": "what is kept of the past",
    "alpha_importance": "what is kept of A",
    "k": "key that is written along",
    "prior_precision": "prior precision, set from the data",
    "e": "innovation: what the anchor does not predict of v",
    "c": "a contraction that is used again",
    "x": "solved query Λ⁻¹ q",
    "o": "read-out",
    "variance": "predictive variance of the read-out",
}


def made(recurrence: Recurrence) -> str:
    """The names that the program makes, in one line."""
    found: dict[str, str] = {}
    for s in recurrence.steps:
        stem = (
            "c"
            if s.name[:1] == "c" and s.name[1:].isdigit()
            else s.name.split("_")[0]
            if s.name[:2] in ("e", "e_")
            else s.name
        )
        if stem in _MADE:
            found.setdefault(_MADE[stem], s.pretty()[0])
    return "; ".join(f"{symbol} {meaning}" for meaning, symbol in found.items())


MARKS = "X before the token, X̃ after forgetting, X′ after the token; i value channel, j and l key channels"
BELIEF = "q is Normal(m, Ψ) for each value channel i, p₀ is Normal(μ₀, 1 / Λ₀); constants are left out"


# --- the terminal -----------------------------------------------------------------------------------------------------


def view(model: Model, *, source: bool = False, kernel: bool = False, width: int = WIDTH) -> Group:
    """All stages of a model, for a terminal of `width` cells; source: with the step in torch; kernel: with that in Triton."""
    s = Stages(model)
    parts = [_title(model), *_section("Triple", _triple_table(s.triple)), *_section("Free energy", *_energy(s, width))]
    parts += _section("Recurrence", *_recurrence(s.recurrence, width))
    parts += _section("Structure and plan", _facts(s))
    wanted = (
        ("Source of one token's step", "torch", source),
        ("Triton kernel of one token, and back", "triton", kernel),
    )
    for title, backend, shown in wanted:
        if shown:
            text = printed_source(s.triple, backend)
            parts += _section(
                title, Syntax(text, "python", theme="ansi_dark", background_color="default", word_wrap=True)
            )
    return Group(*parts)


def printed_source(triple: Triple, backend: str) -> str:
    """The source of one token's step that an op prints for a backend: "torch" or "triton"."""
    from .op import compile

    return compile(triple, backend).source.rstrip()


def _title(model: Model) -> Group:
    head = Text.assemble((model.label, "bold"), "   ", (f"{model.name} · {model.family}", "dim"))
    lines = [head, Text(model.citation)]
    return Group(*lines, *([Text(f"Note: {model.note}.", style="italic")] if model.note else []))


def _section(title: str, *body) -> list:
    return [
        Text(),
        Rule(Text(f" {title} ", style="bold cyan"), align="left", style="cyan", characters="─"),
        *(Padding(x, (0, 0, 0, 2), expand=False) for x in body),
    ]


def _grid(*columns: dict) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for options in columns:
        table.add_column(**options)
    return table


def _triple_table(triple: Triple) -> Table:
    table = _grid({"style": "bold", "min_width": 12}, {"style": "dim", "min_width": 12}, {})
    for leg, rows in words(triple):
        for n, (choice, meaning) in enumerate(rows):
            table.add_row(leg if n == 0 else "", choice, Text(meaning))
    return table


def _formulas(rows: Sequence[tuple[str, str, str]], width: int) -> Table:
    """(label, left, right) with the signs one below the other; long right sides are folded at a plus or minus."""
    label = max((len(x[0]) for x in rows), default=0)
    left = max((Text(x[1]).cell_len for x in rows), default=0)
    table = _grid(
        {"style": "dim", "min_width": 12 if label else 0, "no_wrap": True},
        {"justify": "right", "no_wrap": True},
        {"no_wrap": True},
        {"no_wrap": True},
    )
    for name, lhs, rhs in rows:
        lines = fold(rhs, width - max(label, 12 if label else 0) - left - 12)
        table.add_row(name, _state(lhs), "=", _state("\n".join(lines)))
    return table


def _state(text: str) -> Text:
    """A formula with the memory's own letters set off."""
    found = Text(text)
    found.highlight_regex("[SMPAΛĪĨ](?!₀)[\u0303′]?(?:⁽.⁾)?", "green")
    return found


def _energy(s: Stages, width: int) -> Iterable:
    yield Text("Each token minimises F over q, the loss expanded to second order at the anchor:", style="dim")
    many = len(s.energy.losses) > 1
    rows = []
    for n in range(len(s.energy.losses)):
        parts = energy_rows(s, n)
        rows.append((f"observation {n + 1}" if many else "", "F", " + ".join(lead for lead, _ in parts)))
        rows += [("", lead, text) for lead, text in parts]
    held = belief(s)
    yield _formulas(rows, width)
    if held:
        yield Text("where " + ",  ".join(f"{pretty(x)} = {pretty(y)}" for x, y in held))
    yield Text(
        BELIEF + ("; m̃ and Λ̃ are q's moments before the observation" if any("̃" in x[2] for x in rows) else ""),
        style="dim",
    )


def _recurrence(r: Recurrence, width: int) -> Iterable:
    yield _formulas(equations(r), width)
    yield Text(" ")
    table = _grid({"no_wrap": True}, {"no_wrap": True}, {"no_wrap": True}, {})
    for row in legend(r):
        table.add_row(*(Text(x, style=style) for x, style in zip(row, ("", "cyan", "dim", ""), strict=True)))
    yield table
    yield Text(made(r), style="dim")
    yield Text(MARKS, style="dim")


def _facts(s: Stages) -> Table:
    table = _grid({"style": "dim", "min_width": 12, "no_wrap": True}, {})
    for name, text in facts(s):
        recurrent = name == "plan" and not s.plan.chunked
        table.add_row(name, Text(text, style="yellow" if recurrent else "bold" if name == "plan" else ""))
    return table


_TRANSITION = {
    "scalar": "one decay a head",
    "diagonal": "a decay a key channel",
    "entry": "a decay a memory entry",
    "rank one": "diagonal plus rank one",
    "row-coupled": "a transition of its own for every value channel",
    "dense": "not affine in the state",
}


def facts(s: Stages) -> list[tuple[str, str]]:
    """Structure, plan and cost as (name, sentence)."""
    kind = _TRANSITION[s.structure.transition]
    mean = pretty(array(s.structure.mean))
    rows = [("transition", f"of {mean}: {kind}")]
    for x in s.structure.autonomous:
        how = "a decayed sum" if x.decay is not None else "nonlinear"
        rows.append(("on its own", f"{pretty(array(x.name))} evolves without {mean}: {how}, {_floats(x.dims)} floats"))
    rows.append(("read", s.structure.read + (", before the update" if s.structure.before else "")))
    rows.append(
        (
            "plan",
            s.plan.family
            + (f", {s.plan.micro} steps a token" if s.plan.micro > 1 else "")
            + ("" if s.plan.chunked else " only"),
        )
    )
    rows.append(("because", s.plan.why))
    cost = s.recurrence.cost()
    for name, key, unit in (("state", "state", "floats a head"), ("work", "flops", "multiply-adds a token and head")):
        rows.append((name, f"{polynomial(cost[key])} {unit}; {rounded(cost[key])} at K = V = {AT}"))
    return rows


def _floats(dims: tuple) -> str:
    import sympy as sp

    return polynomial(sp.Mul(*(SIZE[d] for d in dims)))


def rounded(count) -> str:
    """A count at K = V = 64."""
    return f"{round(float(count.subs({K: AT, V: AT}))):,}"


# --- the zoo ----------------------------------------------------------------------------------------------------------


_COLUMNS = (
    ("model", 22),
    ("forgets", 8),
    ("curvature/anchor", 22),
    ("prior", 10),
    ("transition", 12),
    ("plan", 13),
    ("state floats", 12),
)


def zoo_lines(models: Sequence[Model]) -> Iterable[Text]:
    """All models by family: the triple in brief, plan and state on one line, label and citation on the next."""
    head = "".join(f"{name:<{width}}" for name, width in _COLUMNS[:-1]) + f"{_COLUMNS[-1][0]:>12}"
    yield Text(head, style="dim")
    family = None
    for m in models:
        if m.family != family:
            family = m.family
            yield Text.assemble("\n", (family, "bold cyan"))
        s = Stages(m)
        cells = (*brief(m.triple), s.structure.transition)
        line = Text.assemble(
            (f"{m.name:<22}", "bold"), *(f"{x:<{w}}" for x, (_, w) in zip(cells, _COLUMNS[1:], strict=False))
        )
        line.append(f"{s.plan.family:<13}", "" if s.plan.chunked else "yellow")
        line.append(f"{polynomial(s.recurrence.cost()['state']):>12}")
        yield line
        yield Text(f"  {m.label}: {m.citation}", style="dim")


def outside(reasons: dict[str, str]) -> Group:
    """What is not a triple, and why."""
    table = _grid({"style": "bold", "no_wrap": True}, {})
    for name, why in reasons.items():
        table.add_row(name, Text(why))
    return Group(Text.assemble("\n", ("outside the framework", "bold cyan")), table)


def zoo_record(model: Model) -> dict:
    """A model's row of the list, for JSON."""
    s = Stages(model)
    return {
        "name": model.name,
        "label": model.label,
        "family": model.family,
        "citation": model.citation,
        "note": model.note,
        "triple": triple_record(model.triple),
        "transition": s.structure.transition,
        "read": s.structure.read,
        "plan": s.plan.family,
        "state_floats": str(s.recurrence.cost()["state"]),
    }


def triple_record(triple: Triple) -> dict:
    """The triple's fields, for JSON."""
    return {leg: asdict(getattr(triple, leg)) for leg in ("architecture", "posterior", "prior")}


# --- other forms ------------------------------------------------------------------------------------------------------


def record(model: Model) -> dict:
    """Every stage of a model, for JSON."""
    s, r = Stages(model), derive(model.triple)
    static = static_names(model.triple)
    steps = [
        {"phase": x.phase, "name": x.name, "text": str(x), "unicode": " = ".join(x.pretty()), "latex": x.latex(static)}
        for x in r.steps
    ]
    return {
        **zoo_record(model),
        "free_energy": {"text": str(s.energy), "latex": s.energy.latex()},
        "recurrence": {
            "carries": r.carries,
            "steps": steps,
            "latex": r.latex(),
            "inputs": [{"name": x.name, "shape": x.shape, "per": x.per} for x in r.inputs],
            "states": [{"name": x.name, "shape": x.shape, "starts_at": str(x.initial)} for x in r.states],
        },
        "structure": dict(facts(s)),
        "why": s.plan.why,
        "micro_steps": s.plan.micro,
        "flops": str(r.cost()["flops"]),
        "source": printed_source(model.triple, "torch"),
    }


NOTATION = (
    r"A state $X$ is $X_{t-1}$ before the token, $\tilde{X}_{t}$ after forgetting and $X_{t}$ after the token; "
    r"$\mu_{t-1}$ and $\Lambda_{t-1}$ are mean and precision of the belief before the token; $i$ runs over value "
    r"channels, $j$ and $l$ over key channels; $\mathrm{scale}$ is a factor on the query."
)


def document(model: Model) -> str:
    """A LaTeX fragment of all stages (needs amsmath and graphicx)."""
    s, static = Stages(model), static_names(model.triple)
    legs = [(leg, "; ".join(_tex(f"{name}: {text}") for name, text in rows)) for leg, rows in words(model.triple)]
    names = (*s.recurrence.inputs, *s.recurrence.states)
    symbols = [(f"${latex(symbol_of(x, model.triple), static)}$", _tex(_meaning(x.name, model.triple))) for x in names]
    body = [
        f"% {model.name}, every stage; needs amsmath and graphicx",
        rf"\subsection*{{{_tex(model.label)}}}",
        f"{_tex(model.citation)}.\n",
        r"\paragraph{Triple}",
        *_description(legs),
        rf"\[ \resizebox{{\linewidth}}{{!}}{{${model.triple.latex()}$}} \]",
        r"\paragraph{Free energy} of the belief $q = \mathcal{N}(m, \Psi)$ of value channel $i$, up to constants",
        *(r"\[", s.energy.latex(), r"\]"),
        r"\paragraph{Recurrence}",
        *(r"\[", s.recurrence.latex(), r"\]"),
        r"\paragraph{Symbols}",
        *_description(symbols),
        NOTATION + "\n",
        rf"Plan: {_tex(str(s.plan))}. State: ${polynomial_latex(s.recurrence.cost()['state'])}$ floats a head.",
    ]
    return "\n".join(body)


def _description(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [r"\begin{description}", *(rf"  \item[{name}] {text}" for name, text in rows), r"\end{description}"]


def polynomial_latex(expr) -> str:
    """A polynomial in K and V."""
    import sympy as sp

    return sp.latex(expr)


def symbol_of(x, triple: Triple) -> sp.Expr:
    """An input or a state as the equations write it."""
    return array("k_raw" if x.name == "k" and triple.architecture.key == "tempered" else x.name, x.dims)


def _meaning(name: str, triple: Triple) -> str:
    if name == "v":
        return "value: evidence" if triple.architecture.value == "evidence" else "value that is observed"
    return MEANING.get(name, "an input")


_TEX = {
    **{"α": r"$\alpha$", "β": r"$\beta$", "η": r"$\eta$", "ω": r"$\omega$", "γ": r"$\gamma$", "κ": r"$\kappa$"},
    **{"ρ": r"$\rho$", "τ": r"$\tau$", "Λ₀": r"$\Lambda_0$", "Λ": r"$\Lambda$", "μ₀": r"$\mu_0$", "μ": r"$\mu$"},
    **{"−": "$-$", "_": r"\_", "&": r"\&", "%": r"\%", "#": r"\#", "^": r"\^{}"},
}


def _tex(text: str) -> str:
    """Words as LaTeX: Greek letters into mathematics, special characters escaped."""
    return re.sub("|".join(map(re.escape, _TEX)), lambda found: _TEX[found[0]], text)
