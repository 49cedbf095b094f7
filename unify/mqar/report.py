"""What the runs of a file show: a table, the plots, with the spread over seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from unify.errors import UnifyError

from .run import ATTENTION, MODELS
from .task import Task


@dataclass(frozen=True)
class Standing:
    """A model on a task at the learning rate that is best for it on average, over seeds.

    accuracies: one a seed. parameters, state (bytes), flops (a token): of the model as it was trained. others: accuracies
    on tasks that were not trained on. curves: [(step, loss, accuracy)] a seed. sizes: everything else the runs share.
    """

    model: str
    task: Task
    match: str
    sizes: tuple
    lr: float
    accuracies: tuple[float, ...]
    parameters: int
    state: int
    flops: int
    others: dict[str, tuple[float, ...]]
    curves: tuple
    lrs: int

    @property
    def mean(self) -> float:
        """Mean accuracy over seeds."""
        return mean(self.accuracies)

    @property
    def label(self) -> str:
        """As people write it."""
        return name(self.model) + ("" if self.match == "none" else f", equal {self.match}")


def name(model: str) -> str:
    """A model's label."""
    from unify.models.zoo import ZOO

    return "Transformer" if model == ATTENTION else ZOO[model].label


def standings(records: Iterable[dict[str, Any]]) -> list[Standing]:
    """One for each model, task and match, in the order of `MODELS`. Raises UnifyError where there is no record."""
    groups: dict[tuple, dict[float, list]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        run = dict(record["run"])
        task = Task(**run.pop("task"))
        model, match, lr, _ = (run.pop(x) for x in ("model", "match", "lr", "seed"))
        groups[model, task, match, tuple(sorted(run.items()))][lr].append(record)
    if not groups:
        raise UnifyError("no run", "there is nothing to show", "train some first: unify mqar --toy")
    found = []
    for (model, task, match, sizes), by_lr in groups.items():
        lr, best = max(by_lr.items(), key=lambda item: mean(r["accuracy"] for r in item[1]))
        cost = {x: best[0][x] for x in ("parameters", "state", "flops")}
        others = {t: tuple(r["others"][t] for r in best) for t in best[0]["others"]}
        accuracies, curves = tuple(r["accuracy"] for r in best), tuple(r["curve"] for r in best)
        found.append(
            Standing(model, task, match, sizes, lr, accuracies, **cost, others=others, curves=curves, lrs=len(by_lr))
        )
    rank = {x: n for n, x in enumerate(MODELS)}
    return sorted(found, key=lambda s: (s.task.length, s.task.pairs, s.task.overwrites, s.match, rank.get(s.model, 99)))


def markdown(found: list[Standing]) -> str:
    """A table: accuracy as the mean over seeds, the least and the largest; cost beside it."""
    head = "| task | model | accuracy | least to largest | seeds | learning rate | state, bytes | parameters | flops a token |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for s in found:
        spread = f"{min(s.accuracies):.3f} to {max(s.accuracies):.3f}"
        rate = f"{s.lr:.2g}, best of {s.lrs}" if s.lrs > 1 else f"{s.lr:.2g}"
        lines.append(
            f"| {s.task} | {s.label} | {s.mean:.3f} | {spread} | {len(s.accuracies)} | {rate} | {s.state:,} | "
            f"{s.parameters:,} | {s.flops:,} |"
        )
        lines += [f"| {s.task}, read at {t} | {s.label} | {mean(a):.3f} | {min(a):.3f} to {max(a):.3f} | {len(a)} | | | | |"
                  for t, a in s.others.items()]  # fmt: skip
    return "\n".join(lines)


def draw(found: list[Standing], folder: Path) -> list[Path]:
    """Plots as SVG and PNG: accuracy against length, state, parameters and flops, and the learning curves. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for title, make in (("mqar", _against), ("mqar_curves", _curves)):
        for suffix in ("svg", "png"):
            out.append(folder / f"{title}.{suffix}")
            make(found).savefig(out[-1], dpi=150)
    return out


def _styles(found: list[Standing]) -> dict[tuple[str, str], dict]:
    """A colour for each model, a marker for each way of matching."""
    from unify.draw import PALETTE

    models = list(dict.fromkeys(s.model for s in found))
    markers = {"none": "o", "state": "s", "parameters": "^"}
    colour = lambda n: {"color": PALETTE[n % len(PALETTE)], "ls": "-" if n < len(PALETTE) else "--"}  # noqa: E731
    return {(s.model, s.match): {**colour(models.index(s.model)), "marker": markers[s.match]} for s in found}


def _figure(columns: int, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 4.8), layout="constrained")
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("accuracy")
    return figure, axes


def _against(found: list[Standing]):
    """Accuracy against length and against each cost."""
    what = {"length": "tokens", "state": "state, bytes", "parameters": "parameters", "flops": "flops a token"}
    figure, axes = _figure(len(what), "Multi-query associative recall")
    styles = _styles(found)
    for axis, (x, title) in zip(axes, what.items(), strict=True):
        for (model, match), style in styles.items():
            mine = sorted((s for s in found if (s.model, s.match) == (model, match)), key=lambda s: _at(s, x))
            at, means = [_at(s, x) for s in mine], [s.mean for s in mine]
            low, high = ([abs(s.mean - end(s.accuracies)) for s in mine] for end in (min, max))
            line = style if x == "length" else {**style, "ls": ""}  # only one task after another makes a line
            axis.errorbar(at, means, [low, high], label=mine[0].label, capsize=3, **line)
        axis.set_xlabel(title)
        _ticks(axis, sorted({_at(s, x) for s in found}))
    axes[0].set_ylabel("accuracy (mean, least to largest over seeds)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _ticks(axis, at: list[int]) -> None:
    """Few ticks, in thousands and millions; logarithmic where the numbers are far apart."""
    from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator

    if at[-1] > 4 * at[0]:
        axis.set_xscale("log")
        few = at[:1]
        for x in at:
            few += [x] if x >= 2 * few[-1] else []
        axis.xaxis.set_major_locator(FixedLocator(few))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _at(standing: Standing, x: str) -> int:
    return standing.task.length if x == "length" else getattr(standing, x)


def _curves(found: list[Standing]):
    """Accuracy against steps, a panel a task, a thin line a seed."""
    tasks = list(dict.fromkeys(s.task for s in found))
    figure, axes = _figure(len(tasks), "Learning curves at each model's best rate")
    styles = _styles(found)
    for axis, task in zip(axes, tasks, strict=True):
        for s in (s for s in found if s.task == task):
            style = {**styles[s.model, s.match], "marker": None}
            for n, curve in enumerate(s.curves):
                steps, _, accuracies = zip(*curve, strict=True)
                axis.plot(steps, accuracies, lw=1.2, alpha=0.8, label=None if n else s.label, **style)
        over = f", {task.overwrites} overwritten" if task.overwrites else ""
        axis.set(title=f"{task.length} tokens, {task.pairs} pairs{over}", xlabel="steps")
    handles = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
