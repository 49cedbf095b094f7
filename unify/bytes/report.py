"""What the runs of a file show: a table and one picture for each set of runs that can be compared, the spread over seeds with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from unify.errors import UnifyError
from unify.mqar.figures import styles
from unify.mqar.report import ENOUGH, PAIRS, compare, name

from .measure import CUE, LETTERS
from .run import MODELS, Run


@dataclass(frozen=True)
class Standing:
    """A model at the learning rate that is best for it on average over seeds; records: one a seed, as `train` made them."""

    run: Run
    records: tuple[dict[str, Any], ...]
    lrs: int

    @property
    def label(self) -> str:
        """As people write it."""
        return name(self.run.model)

    @property
    def bits(self) -> tuple[float, ...]:
        """Held-out bits per byte, one a seed."""
        return tuple(r["bits"] for r in self.records)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return mean(self.bits)

    def recall(self, what: str) -> float | None:
        """A measure of all repeats, the mean over seeds; None where there was no repeat."""
        found = [r["recall"][-1][what] for r in self.records if r["recall"]]
        return mean(found) if found else None


def standings(records: Iterable[dict[str, Any]]) -> list[Standing]:
    """One for each model and set of sizes, in the order of `MODELS`. Raises UnifyError where there is no record."""
    groups: dict[tuple, dict[float, list]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        run = Run(**record["run"])
        groups[run.model, _shared(run)][run.lr].append(record)
    if not groups:
        raise UnifyError("no run", "there is nothing to show", "train some first: unify bytes --toy")
    found = []
    for by_lr in groups.values():
        _, best = min(by_lr.items(), key=lambda item: mean(r["bits"] for r in item[1]))
        found.append(Standing(Run(**best[0]["run"]), tuple(best), len(by_lr)))
    rank = {x: n for n, x in enumerate(MODELS)}
    return sorted(found, key=lambda s: (-s.run.tokens, _shared(s.run), rank.get(s.run.model, 99)))


def _shared(run: Run) -> tuple:
    """What runs that can be compared have in common."""
    return tuple(
        getattr(run, x) for x in ("d_model", "layers", "head_dim", "length", "steps", "batch", "windows", "text")
    )


def section(
    records: Iterable[dict[str, Any]], directory: str | Path, suffixes: tuple[str, ...] = ("svg", "png")
) -> str:
    """A part of a page in Markdown, its pictures (bytes.png; bytes-2 ... where there are more) in directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple, list[Standing]] = defaultdict(list)
    for s in standings(records):
        groups[_shared(s.run)].append(s)
    parts = ["## Language models over bytes", "", _explained()]
    for n, found in enumerate(groups.values(), 1):
        title = "bytes" if n == 1 else f"bytes-{n}"
        for suffix in suffixes:
            _draw(found).savefig(directory / f"{title}.{suffix}", dpi=150)
        parts += [
            "",
            _sizes(found),
            "",
            markdown(found),
            "",
            f"![bits against bytes, position and distance]({title}.png)",
            "",
            "### What was found",
            "",
            *(f"- {line}" for line in _found(found)),
            "",
            "### What was not",
            "",
            *(f"- {line}" for line in _left(found)),
        ]
    return "\n".join(parts) + "\n"


def write(records: Iterable[dict[str, Any]], directory: str | Path) -> Path:
    """The section as a page of its own, bytes.md in directory."""
    text, path = section(records, directory), Path(directory) / "bytes.md"
    path.write_text(text, encoding="utf-8")
    return path


def _explained() -> str:
    return (
        "Each model is trained on the same bytes in the same order; its MLPs are as wide as it takes to have the Transformer's\n"
        "parameters. *Bits per byte* are measured on windows inside files that were kept from training, after the first byte.\n"
        f"*Names* are identifiers of {LETTERS} letters and more that the training text does not hold. Of a name, the bytes after its\n"
        f"first {CUE} are scored, where it occurs *again* in the same window and where the same name came *first*: what again is\n"
        "better than first is recall from the context (with what a longer context before it is worth). Distance is from the\n"
        "occurrence before, start to start, in bytes. Early bytes of a window are easier by themselves, as many windows begin where\n"
        "their file does: compare models at a position, not positions."
    )


def _sizes(found: list[Standing]) -> str:
    run, record = found[0].run, found[0].records[0]
    machines = "; ".join(sorted({r["on"] for s in found for r in s.records}))
    repeats = record["recall"][-1]["repeats"] if record["recall"] else 0
    took = [r["seconds"] for s in found for r in s.records]
    return (
        f"{run.layers} layers, d_model {run.d_model}, heads of {run.head_dim}; {run.tokens:,} bytes in {run.steps} steps of "
        f"{run.batch} x {run.length} from {record['files']:,} files; {record['read']:,} held-out bytes, {repeats:,} repeats of "
        f"names. {len(took)} runs one after the other, {sum(took) / 60:.1f} minutes in all. On {machines}."
    )


def markdown(found: list[Standing]) -> str:
    """A table: the mean over seeds, the least and the largest; cost beside it."""
    a, b = (found[0].records[0]["positions"][-1][x] for x in ("from", "to"))
    head = (
        f"| model | bits per byte | least to largest | seeds | learning rate | bits at {a} to {b - 1} | names again, accuracy | "
        "names first, accuracy | bits saved | parameters | state, bytes | flops a byte | bytes/s |"
    )
    lines = [head, "|---" * head.count(" | ") + "|---|"]
    for s in found:
        first = s.records[0]
        rate = f"{s.run.lr:.2g}" + (f", best of {s.lrs}" if s.lrs > 1 else "")
        last = mean(r["positions"][-1]["bits"] for r in s.records)
        again, before = (s.recall(x) for x in ("accuracy", "first_accuracy"))
        saved = "" if again is None else f"{s.recall('first_bits') - s.recall('bits'):.2f}"
        names = ("", "") if again is None else (f"{again:.1%}", f"{before:.1%}")
        paces = [r["pace"] for r in s.records if r["pace"]]
        pace = f"{mean(paces):,.0f}" if paces else ""
        lines.append(
            f"| {s.label} | {s.mean:.3f} | {min(s.bits):.3f} to {max(s.bits):.3f} | {len(s.bits)} | {rate} | {last:.3f} | {names[0]} | "
            f"{names[1]} | {saved} | {first['parameters']:,} | {first['state']:,} | {first['flops']:,} | {pace} |"
        )
    return "\n".join(lines)


def _found(found: list[Standing]) -> list[str]:
    """Bits per byte of each of `PAIRS`, and what a name seen before is worth."""
    at = {s.run.model: s for s in found}
    seeds = lambda s: {r["run"]["seed"]: r["bits"] for r in s.records}  # noqa: E731
    said = [
        f"Bits per byte: {compare(name(a), name(b), seeds(at[a]), seeds(at[b]), less=True)[0]}"
        for a, b in PAIRS
        if a in at and b in at and set(seeds(at[a])) & set(seeds(at[b]))
    ]
    saved = {s.label: s.recall("first_bits") - s.recall("bits") for s in found if s.recall("bits") is not None}
    if saved:
        order = sorted(saved, key=lambda label: -saved[label])
        said.append(
            "Bits a byte saved where a name comes again: " + ", ".join(f"{x} {saved[x]:.2f}" for x in order) + "."
        )
    return said


def _left(found: list[Standing]) -> list[str]:
    """Few seeds, short training."""
    few = sum(len(s.records) < ENOUGH for s in found)
    out = [f"Fewer than {ENOUGH} seeds: {few} of the {len(found)} rows."] if few else []
    run, record = found[0].run, found[0].records[0]
    out.append(f"Training was short: {run.tokens / record['parameters']:.1f} bytes a parameter.")
    return out


# --- pictures ---------------------------------------------------------------------------------------------------------


def _draw(found: list[Standing]):
    """Held-out bits against bytes seen and against position, and recall by distance; a band from the least to the largest seed."""
    from matplotlib.figure import Figure

    look = {m: {x: s[x] for x in ("color", "ls")} for m, s in styles(s.run.model for s in found).items()}
    figure = Figure(figsize=(14.0, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (("bytes seen", "held-out bits per byte", _curve), ("bytes of context", "held-out bits per byte", _position),
              ("distance to the occurrence before, bytes", "bits per byte saved on a name seen before", _distance))  # fmt: skip
    for axis, (x, y, points) in zip(axes, panels, strict=True):
        for s in found:
            _band(axis, [points(r) for r in s.records], label=s.label, **look[s.run.model])
        axis.set(xlabel=x, ylabel=y)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    _ticks(axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _curve(record: dict[str, Any]) -> list[tuple[float, float]]:
    return [(seen, held) for seen, _, held in record["curve"]]


def _position(record: dict[str, Any]) -> list[tuple[float, float]]:
    return [((p["from"] * p["to"]) ** 0.5, p["bits"]) for p in record["positions"]]


def _distance(record: dict[str, Any]) -> list[tuple[float, float]]:
    return [((p["from"] * p["to"]) ** 0.5, p["first_bits"] - p["bits"]) for p in record["recall"][:-1]]


def _band(axis, seeds: list[list[tuple[float, float]]], **style: Any) -> None:
    """The mean of several curves, and the area between the lowest and the highest."""
    at: dict[float, list[float]] = defaultdict(list)
    for x, y in (point for points in seeds for point in points):
        at[x].append(y)
    xs = sorted(at)
    axis.plot(xs, [mean(at[x]) for x in xs], marker="o", ms=3.5, lw=1.6, **style)
    if len(seeds) > 1:
        axis.fill_between(
            xs, [min(at[x]) for x in xs], [max(at[x]) for x in xs], color=style["color"], alpha=0.15, lw=0
        )


def _ticks(axes) -> None:
    """Bytes in thousands and millions; positions and distances on a scale of doublings."""
    from matplotlib.ticker import EngFormatter, ScalarFormatter

    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in axes[1:]:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
    axes[2].axhline(0, color="0.6", lw=0.8)
