"""The record of the benchmark on a GPU as verdicts, a Markdown table and pictures; nothing here measures.

record = json.loads(Path("benchmarks/h200.json").read_text())
print(markdown(record))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path

from .contest import CONTESTANTS, MODELS, RIVAL, SIZES, Size
from .errors import UnifyError
from .race import BATCHES, LAYER, LENGTHS, LONG, MEASURES, PREFILL

FIRST = 20.0  # seconds that a first call may take, forward and backward


@dataclass(frozen=True)
class Target:
    """What a model's times may be at most.

    against, factor: a multiple of another contestant's time. fixed: milliseconds by measure and peak MiB, at one size.
    """

    against: str = ""
    factor: float = 1.0
    fixed: Mapping[str, float] | None = None
    size: Size | None = None

    def __str__(self):
        if self.fixed is not None:
            return "≤ {forward:g} / {both:g} ms, {peak_mib:g} MiB".format(**self.fixed)
        return f"≤ {'' if self.factor == 1 else f'{self.factor:g} × '}{label(self.against)}"


TARGETS = {
    "palimpsa": Target(fixed={"forward": 1.3, "both": 8.0, "peak_mib": 1536.0}, size=SIZES[0]),
    "palimpsa_key": Target("mamba2", 1.25),
    **{model: Target(rival) for model, rival in RIVAL.items()},
}


def label(name: str) -> str:
    """How people write a contestant's name."""
    from .models import zoo

    contestant = CONTESTANTS[name]
    return zoo.get(contestant.model).label if contestant.ours else f"fla {name}"


def result(record: Mapping, *path: object) -> dict:
    """An entry of the record, or an empty one."""
    return record["results"].get("/".join(map(str, path)), {})


def judge(found: Mapping[str, float | None], allowed: Mapping[str, float | None]) -> str:
    """met or missed, "not measured" where a figure lacks and none is missed, "" where nothing is asked."""
    pairs = [(found.get(key), most) for key, most in allowed.items()]
    known = [(x, most) for x, most in pairs if x is not None and most is not None]
    if any(x > most for x, most in known):
        return "missed"
    return "" if not pairs else "met" if len(known) == len(pairs) else "not measured"


@dataclass(frozen=True)
class Row:
    """One model at one size. own, other: entries by measure, of ours and of its counterpart's (empty where there is none)."""

    model: str
    size: Size
    own: Mapping[str, dict]
    other: Mapping[str, dict]
    verdict: str
    together: bool


def rows(record: Mapping) -> Iterator[Row]:
    """Every model at every size, size by size."""
    for n in range(len(SIZES)):
        for model in MODELS:
            size, rival = CONTESTANTS[model].sizes[n], RIVAL.get(model)
            own = {m: result(record, "table", model, size, m) for m in MEASURES}
            other = {m: result(record, "table", rival, size, m) for m in MEASURES}
            target = TARGETS[model]
            against = {m: result(record, "table", target.against, size, m) for m in MEASURES}
            which = {m: _which(own[m], against[m]) for m in MEASURES}
            found = {**{m: own[m].get(which[m]) for m in MEASURES}, "peak_mib": own["both"].get("peak_mib")}
            allowed = _allowed(target, size, {m: against[m].get(which[m]) for m in MEASURES})
            yield Row(model, size, own, other, judge(found, allowed), _same(record, own, against))


def _which(*entries: dict) -> str:
    """What is compared: graphs where all have one, as a busy host slows calls and not graphs."""
    return "graph_ms" if all("graph_ms" in x for x in entries) else "ms"


def _allowed(target: Target, size: Size, times: Mapping[str, float | None]) -> dict[str, float | None]:
    if target.fixed is not None:
        return dict(target.fixed) if size == target.size else {}
    return {m: None if ms is None else target.factor * ms for m, ms in times.items()}


def _same(record: Mapping, *entries: Mapping[str, dict]) -> bool:
    """Whether what is compared was measured in one session."""
    at = [x["run"] for e in entries for x in e.values() if x.get("run") is not None]
    return len({record["runs"][n]["date"] for n in at}) <= 1


def firsts(record: Mapping) -> dict[str, tuple[float, str]]:
    """Seconds of each first call, forward and backward, with the verdict on ours ("" for a counterpart's)."""
    out = {}
    for name, contestant in CONTESTANTS.items():
        seconds = result(record, "first", name, contestant.sizes[0], "both").get("seconds")
        if seconds is not None:
            out[name] = (seconds, judge({"s": seconds}, {"s": FIRST}) if contestant.ours else "")
    return out


def lengths(record: Mapping, name: str, measure: str) -> dict[int, float]:
    """Milliseconds by T."""
    found = {T: result(record, "length", name, T, measure).get("ms") for T in LENGTHS}
    return {T: ms for T, ms in found.items() if ms is not None}


def decoded(record: Mapping) -> dict[str, dict[int, dict]]:
    """Entries of one token's step by model and batch."""
    found = {m: {b: result(record, "decode", m, b, "step") for b in BATCHES} for m in MODELS}
    return {
        m: {b: x for b, x in by.items() if "ms" in x} for m, by in found.items() if any("ms" in x for x in by.values())
    }


def share(entry: Mapping) -> float:
    """Of the bandwidth of a copy: state bytes per second of a step."""
    return entry["state_bytes"] / (1e-3 * entry["ms"]) / entry["bandwidth"]


# --- as Markdown ------------------------------------------------------------------------------------------------------

EMPTY = "No figures of this version have been committed yet; `unify bench --device cuda` measures them on your GPU."
BEGIN, END = "<!-- speed: written by unify bench --table -->", "<!-- end of speed -->"


def markdown(record: Mapping) -> str:
    """The whole record as the README shows it: table, first calls, decoding, what is missing, and how it was measured."""
    if not record["runs"]:  # nothing, or only processes that never began
        return EMPTY
    parts = [_machine(record), _table(record), _first_line(record), _decode_line(record), _gaps(record), _again(record)]
    return "\n\n".join(filter(None, parts))


def written(text: str, record: Mapping) -> str:
    """A page with the record's Markdown between the marks `BEGIN` and `END`. Raises UnifyError for a page without them."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise UnifyError("the page", "it has no place for the table", f"put the lines {BEGIN} and {END} into it")
    return f"{head}{BEGIN}\n{markdown(record)}\n{END}{tail}"


def _machine(record: Mapping) -> str:
    versions = {key: [] for key in ("gpu", "torch", "triton", "fla-core")}
    for run in record["runs"]:
        for key, seen in versions.items():
            seen += [run[key]] if key in run and run[key] not in seen else []
    said = [f"{'' if key == 'gpu' else key + ' '}{' and '.join(seen)}" for key, seen in versions.items() if seen]
    return (
        f"{', '.join(said)}; bfloat16, sums in float32. Medians in milliseconds, in brackets as a CUDA graph; every "
        "result agreed with the float64 token loop, gradients included, before it was timed. Targets that are another op's time "
        "are compared as graphs, which a busy host does not slow. Sizes are B x T x H x K x V."
    )


def _table(record: Mapping) -> str:
    head = ("op", "size", "forward", "fla", "forward + backward", "fla", "peak MiB", "target", "verdict")
    lines = [head, ["---"] * len(head)]
    for row in rows(record):
        if not any((*row.own.values(), *row.other.values())):
            continue
        times = [_cell(x[m]) for m in MEASURES for x in (row.own, row.other)]
        size = row.own["both"].get("peak_mib")
        target = str(TARGETS[row.model]) if row.verdict else ""
        verdict = row.verdict if row.together or not row.verdict else f"{row.verdict}, in two sessions"
        lines.append((label(row.model), str(row.size), *times, "" if size is None else f"{size:.0f}", target, verdict))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""


def _cell(entry: Mapping) -> str:
    if "ms" not in entry:
        return "wrong" if entry.get("failed", "").startswith("wrong") else "–"
    graph = f" ({_digits(entry['graph_ms'])})" if "graph_ms" in entry else ""
    return _digits(entry["ms"]) + graph


def _digits(x: float) -> str:
    """Three digits that count, never an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def _first_line(record: Mapping) -> str:
    found = firsts(record)
    said = [f"{label(n)} {s:.1f} s{f' ({verdict})' if verdict else ''}" for n, (s, verdict) in found.items()]
    intro = f"First call in a fresh process with empty caches, forward and backward (target: {FIRST:g} s): "
    return intro + ", ".join(said) + "." if found else ""


def _decode_line(record: Mapping) -> str:
    found = decoded(record)
    intro = (
        f"One token's step as a CUDA graph ({LAYER.H} heads, {LAYER.K} x {LAYER.V}), and the bytes of state it reads and "
        "writes per second as a share of a copy's bandwidth: "
    )
    said = [
        f"{label(m)} " + ", ".join(f"{1e3 * x['ms']:.0f} µs ({share(x):.0%}) at batch {b}" for b, x in by.items())
        for m, by in found.items()
    ]
    return intro + "; ".join(said) + "." if found else ""


def _gaps(record: Mapping) -> str:
    """Each reason for a missing figure, with the entries it holds for."""
    why: dict[str, list[str]] = {}
    for path, entry in record["results"].items():
        for key, what in (("failed", path), ("graph_failed", f"{path} as a graph")):
            if key in entry:
                why.setdefault(entry[key], []).append(what)
    return "\n".join(f"- {text}: {', '.join(paths)}" for text, paths in why.items())


def _again(record: Mapping) -> str:
    commands = dict.fromkeys(f"`{run['command']}` ({run['date'][:10]})" for run in record["runs"])
    return f"Measured by {', '.join(commands)}."


# --- as pictures ------------------------------------------------------------------------------------------------------


def draw(record: Mapping, folder: Path) -> list[Path]:
    """Draw what the record holds as SVG and PNG: speed, length, decode. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[bool, Callable]] = {
        "speed": (any(x.own[m].get("ms") for x in rows(record) for m in MEASURES), _speed),
        "length": (any(lengths(record, n, m) for n in LONG for m in MEASURES), _length),
        "decode": (bool(decoded(record)), _decode),
    }
    out = []
    for name, (known, make) in pictures.items():
        for suffix in ("svg", "png") if known else ():
            out.append(folder / f"{name}.{suffix}")
            make(record).savefig(out[-1], dpi=150)
    return out


def _figure(columns: int, title: str, record: Mapping, lines: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 0.8 + 3.6 * lines), layout="constrained")
    figure.suptitle(f"{title}, {record['runs'][-1]['gpu']}, bfloat16", fontsize=13)
    axes = figure.subplots(lines, columns, squeeze=False)
    for x in axes.flat:
        x.grid(color="0.92")
        x.set_axisbelow(True)
        x.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _speed(record: Mapping):
    """Bars, ours beside the counterpart's: a column for each size, a row for each measure."""
    figure, axes = _figure(len(SIZES), "Time of a layer's memory", record, len(MEASURES))
    for n, size in enumerate(SIZES):
        found = [row for row in rows(record) if row.size.T == size.T]
        for axis, measure in zip(axes[:, n], MEASURES, strict=True):
            _bars(axis, [[_graph(entries[measure]) for entries in (r.own, r.other)] for r in found])
            axis.set_xticks(range(len(found)), [label(r.model) for r in found], rotation=40, ha="right", fontsize=8)
            axis.set_title(f"{_title(measure)}, {size}", fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms, as a CUDA graph where there is one")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _graph(entry: Mapping) -> float | None:
    """Milliseconds without the host's, where they were measured."""
    return entry.get("graph_ms", entry.get("ms"))


def _bars(axis, pairs: list[list[float | None]]) -> None:
    """Two bars at each place, with their figures, on a logarithmic axis that starts at a power of ten."""
    from .draw import PALETTE

    known = [ms for pair in pairs for ms in pair if ms is not None]
    for side, name in enumerate(("unify", "flash-linear-attention")):
        bars = [(at + 0.4 * side - 0.2, pair[side]) for at, pair in enumerate(pairs) if pair[side] is not None]
        drawn = axis.bar([at for at, _ in bars], [ms for _, ms in bars], 0.4, color=PALETTE[side], label=name)
        axis.bar_label(drawn, [_digits(ms) for _, ms in bars], rotation=90, padding=2, fontsize=7)
    axis.grid(visible=False, axis="x")
    if known:
        axis.set_yscale("log")
        axis.set_ylim(10 ** floor(log10(min(known))), 2.5 * max(known))
        _plain(axis.yaxis)


def _plain(axis) -> None:
    """Numbers without powers of ten on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _title(measure: str) -> str:
    return {"forward": "forward", "both": "forward + backward"}[measure]


def _length(record: Mapping):
    """Milliseconds against T, both logarithmic, with a line of slope 1."""
    measures = [m for m in MEASURES if any(lengths(record, name, m) for name in LONG)]
    figure, axes = _figure(len(measures), f"Cost against length, {LAYER.H} heads, {LAYER.K} x {LAYER.V}", record)
    for axis, measure in zip(axes[0], measures, strict=True):
        found = {name: times for name in LONG if (times := lengths(record, name, measure))}
        for (name, times), style in zip(found.items(), _styles(), strict=False):
            axis.plot(list(times), list(times.values()), label=label(name), **style)
        top = max(times[max(times)] / max(times) for times in found.values())
        axis.plot(LENGTHS, [1.6 * top * T for T in LENGTHS], color="0.45", ls="--", lw=1.2, label="slope 1")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(LENGTHS, [f"{T // 1024}k" for T in LENGTHS], fontsize=8)
        _plain(axis.yaxis)
        axis.set(title=_title(measure), xlabel="tokens", ylabel="ms")
        axis.legend(frameon=False, fontsize=8)
    return figure


def _decode(record: Mapping):
    """A step's time against the bytes of state, with the time a copy of them takes; and their ratio by batch."""
    figure, ((time, ratio),) = _figure(2, f"One token after {PREFILL}, {LAYER.H} heads, {LAYER.K} x {LAYER.V}", record)
    found = decoded(record)
    for (name, by), style in zip(found.items(), _styles(), strict=False):
        size = [x["state_bytes"] / 1e6 for x in by.values()]
        time.plot(size, [1e3 * x["ms"] for x in by.values()], label=label(name), **style)
        ratio.plot(list(by), [100 * share(x) for x in by.values()], label=label(name), **style)
    every = [x for by in found.values() for x in by.values()]
    ends = [f(x["state_bytes"] for x in every) for f in (min, max)]
    copy = [1e6 * n / every[-1]["bandwidth"] for n in ends]
    time.plot([n / 1e6 for n in ends], copy, color="0.45", ls="--", lw=1.2, label="a copy of as many bytes")
    time.set(title="time", xlabel="state read and written (MB)", ylabel="µs", xscale="log", yscale="log")
    ratio.set(title="share of a copy's bandwidth", xlabel="batch", ylabel="%", xscale="log", ylim=(0, None))
    for axis in (time.xaxis, time.yaxis):
        _plain(axis)
    ratio.minorticks_off()
    ratio.set_xticks(BATCHES, [str(b) for b in BATCHES])
    handles = time.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def _styles() -> Iterator[dict]:
    """A colour and a marker for each line; dashed where the colours begin again."""
    from .draw import PALETTE

    for n, marker in enumerate("osD^vP*X"):
        dash = "-" if n < len(PALETTE) else "--"
        yield {"color": PALETTE[n % len(PALETTE)], "marker": marker, "ls": dash, "ms": 4.5, "lw": 1.8}


__all__ = ["TARGETS", "Row", "Target", "draw", "judge", "markdown", "rows", "written"]
