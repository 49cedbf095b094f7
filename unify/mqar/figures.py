"""Pictures of the standings: accuracy against each cost, learning curves, longer sequences, overwritten keys, transformations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean

from unify.draw import PALETTE

from .report import TITLES, Change, Standing, equal, name, together
from .run import MODELS
from .task import Task

SEEN = (0.004, 0.996)  # accuracies that a figure of log odds shows


def draw(found: list[Standing], folder: Path, suffixes: tuple[str, ...] = ("svg", "png")) -> dict[str, list[Path]]:
    """Every plot that there is something for; its title -> its files.

    mqar: accuracy against length. mqar_cost: against state, parameters and flops. mqar_curves: learning curves. mqar_longer:
    accuracy at lengths that were not trained on. mqar_overwritten: accuracy where keys are bound twice.
    """
    made = {"mqar": _by_length(found), "mqar_cost": _by_cost(found), "mqar_curves": _curves(found)}
    if any(_longer(s) for s in together(found)):
        made["mqar_longer"] = _extrapolation(found)
    if any(_overwritten(found, s) for s in _unmatched(found)):
        made["mqar_overwritten"] = _overwrites(found)
    return {title: save(figure, folder, title, suffixes) for title, figure in made.items()}


def shows(title: str, found: list[Standing], standing: Standing) -> bool:
    """Whether a plot of `draw` has something of a standing."""
    if title in ("mqar", "mqar_cost"):
        return standing in (_once(found) if title == "mqar" else together(found))
    if title == "mqar_longer":
        return standing in together(found) and bool(_longer(standing))
    if standing not in _unmatched(found):
        return False
    if title == "mqar_overwritten":
        key = lambda s: (s.model, s.match, s.steps, s.task.length, s.task.pairs)  # noqa: E731
        return any(_overwritten(found, s) for s in found if key(s) == key(standing))
    return True


def save(figure, folder: Path, title: str, suffixes: tuple[str, ...] = ("png",)) -> list[Path]:
    """Write a figure; returns its files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{title}.{suffix}" for suffix in suffixes]
    for file in files:
        figure.savefig(file, dpi=110)
    return files


def styles(models: Iterable[str]) -> dict[str, dict]:
    """Colour and line of each model, the same in every figure."""
    first, again = {"ls": "-"}, {"ls": "--", "markerfacecolor": "white"}
    order = list(dict.fromkeys([*MODELS, *models]))
    return {
        model: {"color": PALETTE[n % len(PALETTE)], **(first if n < len(PALETTE) else again)}
        for n, model in enumerate(order)
    }


def _styles(found: list[Standing]) -> dict[tuple[str, str], dict]:
    """A colour for each model, a marker for each way of matching."""
    markers, of = {"none": "o", "state": "s", "parameters": "^"}, styles(s.model for s in found)
    return {(s.model, s.match): {**of[s.model], "marker": markers[s.match]} for s in found}


def _figure(panels: int, title: str, across: int = 4):
    """A figure and its panels, `across` of them in a row."""
    from matplotlib.figure import Figure

    columns, rows = min(panels, across), -(-panels // across)
    figure = Figure(figsize=(max(7.5, 4.2 * columns), 0.6 + 4.2 * rows), layout="constrained")
    figure.suptitle(title, fontsize=13)
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for spare in every[panels:]:
        spare.remove()
    axes = every[:panels]
    for axis in axes:
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("accuracy")
    return figure, axes


def _by_length(found: list[Standing]):
    """Accuracy against length, models a little apart, a panel for each way of matching; see `report.equal`."""
    shown = _once(found)
    panels = [(title, equal(shown, m)) for m, title in TITLES.items() if any(s.match == m for s in shown)]
    figure, axes = _figure(len(panels), "Multi-query associative recall")
    look, models = _styles(found), list(dict.fromkeys(s.model for s in found))
    for axis, (title, of) in zip(axes, panels, strict=True):
        for model in dict.fromkeys(s.model for s in of):
            mine = sorted((s for s in of if s.model == model), key=lambda s: s.task.length)
            apart = 1.012 ** (models.index(model) - len(models) / 2)
            _odds(axis, [apart * s.task.length for s in mine], mine, look[model, "none"])
        axis.set(xlabel="tokens", title=title)
        _lengths(axis, sorted({s.task.length for s in of}))
    _odds_scale(axes)
    _legend(figure, axes)
    return figure


def _by_cost(found: list[Standing]):
    """Accuracy against each cost, a row for each task."""
    what = {"state": "state, bytes", "parameters": "parameters", "flops": "flops a token"}
    shown = together(found)
    tasks = list(dict.fromkeys((s.task, s.steps) for s in shown))
    title = "Accuracy for its cost"
    if {s.match for s in shown} - {"none"}:
        title += "; square: equal state, triangle: equal parameters"
    figure, axes = _figure(len(what) * len(tasks), title, across=len(what))
    look = _styles(found)
    for n, (task, steps) in enumerate(tasks):
        of = [s for s in shown if (s.task, s.steps) == (task, steps)]
        row = axes[len(what) * n : len(what) * (n + 1)]
        for axis, (x, label) in zip(row, what.items(), strict=True):
            for s in of:
                _odds(axis, [getattr(s, x)], [s], look[s.model, s.match])
            axis.set(xlabel=label, title=_titled(task, steps))
            axis.title.set_fontsize(10)
            _ticks(axis, sorted({getattr(s, x) for s in of}))
    _odds_scale(axes)
    _legend(figure, axes)
    return figure


def _spans(values: Sequence[tuple[float, ...]], drawn: Callable[[float], float] = float) -> tuple[list, list]:
    """Of each tuple the mean, and how far below and above it the least and the largest are, as they are drawn."""
    means = [drawn(mean(v)) for v in values]
    return means, [[abs(m - drawn(end(v))) for m, v in zip(means, values, strict=True)] for end in (min, max)]


def _odds(axis, at: list[float], standings: list[Standing], style: dict) -> None:
    """A model's accuracies, mean and ends, where they can be drawn as log odds."""
    spans = _spans([s.accuracies for s in standings], _within)
    axis.errorbar(at, *spans, label=name(standings[0].model), capsize=3, **style)


def _odds_scale(axes) -> None:
    """Accuracies as their log odds, which tells 0.95 from 0.99."""
    for axis in axes:
        axis.set_yscale("logit")
        axis.set(
            ylim=(0.7 * SEEN[0], 1 - 0.7 * (1 - SEEN[1])),
            yticks=(ticks := (0.01, 0.1, 0.5, 0.9, 0.99)),
            yticklabels=map(str, ticks),
        )
        axis.minorticks_off()
    axes[0].set_ylabel("accuracy (mean, least to largest over seeds)", fontsize=9)


def _within(accuracy: float) -> float:
    """An accuracy that can be drawn as log odds."""
    return min(max(accuracy, SEEN[0]), SEEN[1])


def _unmatched(found: list[Standing]) -> list[Standing]:
    """Those that are matched to nothing, or all where every one is; without other numbers of steps that few models had."""
    return together([s for s in found if s.match == "none"] or found)


def _once(found: list[Standing]) -> list[Standing]:
    """Those that were trained on keys bound once, or all where none was; without other numbers of steps that few models had."""
    shown = together(found)
    return [s for s in shown if not s.task.overwrites] or shown


def _titled(task: Task, steps: int) -> str:
    over = f", {task.overwrites} bound twice" if task.overwrites else ""
    return f"{task.length} tokens, {task.pairs} pairs{over}, {steps:,} steps"


def _lengths(axis, at: list[int]) -> None:
    """A tick at each length, where they lie apart as their logarithms."""
    axis.set_xscale("log")
    axis.set_xticks(at, [f"{n:,}" for n in at])
    axis.minorticks_off()
    axis.set_xlim(at[0] / 1.15, at[-1] * 1.15)


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
    axis.xaxis.set_major_formatter(EngFormatter(places=None if at[-1] < 4 * at[0] else 0, sep=""))


def _curves(found: list[Standing]):
    """Accuracy against steps, a panel a task, a thin line a seed."""
    shown = _unmatched(found)
    groups = list(dict.fromkeys((s.task, s.steps) for s in shown))
    figure, axes = _figure(len(groups), "Learning curves at each model's best rate")
    look = _styles(found)
    for axis, group in zip(axes, groups, strict=True):
        for s in (s for s in shown if (s.task, s.steps) == group):
            style = {**look[s.model, s.match], "marker": None}
            for curve in s.curves:
                steps, _, accuracies = zip(*curve, strict=True)
                axis.plot(steps, accuracies, lw=1.2, alpha=0.8, label=name(s.model), **style)
        axis.set_xlabel("steps")
        axis.set_title(_titled(*group), fontsize=10)
    _legend(figure, axes)
    return figure


def _longer(standing: Standing) -> dict[int, tuple[float, ...]]:
    """Length -> accuracies, of tasks without overwrites that are longer than the one trained on; it with them."""
    read = {Task.parse(t): a for t, a in standing.others.items()}
    found = {t.length: a for t, a in read.items() if t.length > standing.task.length and not t.overwrites}
    return {standing.task.length: standing.accuracies, **found} if found and not standing.task.overwrites else {}


def _extrapolation(found: list[Standing]):
    """Accuracy against the length of the sequences read, a column for each task trained on, a row for each way of matching."""
    shown = [s for s in together(found) if _longer(s)]
    groups = list(dict.fromkeys((s.task, s.steps) for s in shown))
    rows = {m: [(g, [s for s in equal(shown, m) if (s.task, s.steps) == g]) for g in groups] for m in TITLES}
    panels = [(m, group, of) for m, row in rows.items() for group, of in row if of]
    figure, axes = _figure(len(panels), "Longer than in training", across=len(groups))
    look = _styles(found)
    for axis, (match, group, of) in zip(axes, panels, strict=True):
        for s in of:
            lengths, values = zip(*sorted(_longer(s).items()), strict=True)
            style = look[s.model, s.match] | {"marker": "o"}
            axis.errorbar(lengths, *_spans(values), label=name(s.model), capsize=3, **style)
        axis.set_xlabel("tokens read")
        how = f"\n{TITLES[match]}" if {m for m, *_ in panels} != {"none"} else ""
        axis.set_title(f"trained on {_titled(*group)}{how}", fontsize=10)
        _lengths(axis, sorted({n for s in of for n in _longer(s)}))
    _legend(figure, axes)
    return figure


def _overwritten(found: list[Standing], standing: Standing) -> dict[str, tuple[float, ...]]:
    """What is said of keys bound twice -> accuracies: read after training on keys bound once, and trained on."""
    if standing.task.overwrites:
        return {}
    same = lambda t: (t.length, t.pairs) == (standing.task.length, standing.task.pairs) and t.overwrites  # noqa: E731
    out = {
        f"trained with none, read with {Task.parse(t).overwrites}": a
        for t, a in standing.others.items()
        if same(Task.parse(t))
    }
    key = (standing.model, standing.match, standing.steps)
    trained = [s for s in found if same(s.task) and (s.model, s.match, s.steps) == key]
    out |= {f"trained and read with {s.task.overwrites}": s.accuracies for s in trained}
    return {"trained and read with none": standing.accuracies, **out} if out else {}


def _overwrites(found: list[Standing]):
    """Bars for each model: keys bound once and twice, as trained and as read."""
    shown = [(s, _overwritten(found, s)) for s in _unmatched(found) if _overwritten(found, s)]
    groups = list(dict.fromkeys((s.task, s.steps) for s, _ in shown))
    figure, axes = _figure(len(groups), "Keys bound twice: the later value counts")
    figure.set_size_inches(max(9.0, 7.0 * len(groups)), 5.2)
    colours = dict(zip(dict.fromkeys(x for _, said in shown for x in said), cycle(PALETTE), strict=False))
    for axis, group in zip(axes, groups, strict=True):
        bars = [(s, said) for s, said in shown if (s.task, s.steps) == group]
        names = list(dict.fromkeys(x for _, said in bars for x in said))
        for n, title in enumerate(names):
            at = [m + 0.27 * (n - (len(names) - 1) / 2) for m, (_, said) in enumerate(bars) if title in said]
            values = [said[title] for _, said in bars if title in said]
            means, ends = _spans(values)
            axis.bar(at, means, width=0.25, yerr=ends, capsize=2, label=title, color=colours[title])
        axis.set_title(_titled(*group), fontsize=10)
        axis.set_xticks(range(len(bars)), [name(s.model) for s, _ in bars], rotation=40, ha="right")
    _legend(figure, axes)
    return figure


def changes_figure(found: list[Change]):
    """For each host its accuracy while training, before and in every branch, a thin line a seed; and what each branch gained.

    Of a long training before converting the last part alone, three times as long as a branch.
    """
    figure, axes = _figure(2 * len(found), "Made metaplastic")
    for (rise, gain), c in zip(zip(axes[::2], axes[1::2], strict=True), found, strict=True):
        colours = dict(zip(c.after, PALETTE, strict=False))
        for n, record in enumerate(c.records):
            steps, _, accuracies = zip(*record["curve"], strict=True)
            rise.plot(steps, accuracies, color="0.45", lw=1.2)
            for branch, colour in colours.items():
                then = record["branches"][branch]["curve"]
                x, y = [steps[-1], *(steps[-1] + s for s, _, _ in then)], [record["accuracy"], *(a for _, _, a in then)]
                rise.plot(x, y, color=colour, lw=1.2, label=None if n else branch)
        rise.axvline(c.steps, color="0.45", lw=1, ls=":")
        begin = max(0, c.steps - 3 * dict(c.sizes)["steps"])
        if begin:
            seen = [y for line in rise.lines[:-1] for x, y in zip(*line.get_data(), strict=True) if x >= begin]
            rise.locator_params(axis="x", nbins=5)
            rise.set(xlim=(begin, None), ylim=(min(seen) - 0.01, max(seen) + 0.01))
        title = f"{c.label}, {c.task.length} tokens, {c.task.pairs} pairs, {c.steps:,} steps"
        rise.set(title=title, xlabel="steps", ylabel="accuracy")
        for n, (branch, colour) in enumerate(colours.items()):
            values = tuple(c.gained(branch).values())
            gain.bar([n], [mean(values)], 0.7, color=colour)
            gain.plot([n] * len(values), values, ls="", marker="o", ms=4, color="0.2")
        gain.axhline(0, color="0.45", lw=1)
        gain.set(ylim=(None, None), xticks=[], title="after less before; a dot a seed", ylabel="accuracy gained")
        gain.autoscale(axis="y")
    _legend(figure, axes)
    return figure


def _legend(figure, axes) -> None:
    """One for all panels, below them."""
    handles = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
