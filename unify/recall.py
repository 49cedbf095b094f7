"""What an untrained memory recalls of a text: the update rules alone, on real bytes.

Nothing here is trained. A token's key is a fixed random code of the last few bytes, its value the byte that came next;
each model writes (key, value), then reads with the key of the next context and names a byte. All models have the same
K x V memory, the same keys, and the same two numbers to choose from the same grid.

    keys        A count sketch (Charikar, Chen and Farach-Colton 2002): the last m bytes, for every m up to `context`,
                add +-1 to `spread` of the K channels, picked by a hash; the sum is normalised. Contexts that end alike
                are similar. spread = 1 is nearly a table, spread = K a dense random code: every channel is shared.
    values      One-hot over 256 bytes: channel v of the memory estimates how probable byte v is after a context.
    forgetting  alpha = 1 - 1/horizon, in every model that forgets.
    precision   beta, relative to a prior precision of 1. A delta rule that carries no precision takes the step
                beta / (1 + beta), the gain of one exact Bayes step from the prior at a unit key.
    importance  beta, where the value channels share it; where each has its own, beta (1/16 + [byte v occurred]): that
                a byte occurred says more than that it did not. Evidence is importance times observation.

spread, context and the 1/16 were settled on other files of the standard library than the default text.

horizon and beta are chosen for each model from HORIZONS x PRECISIONS, by accuracy on the first slice of the text, which
is not scored; `horizon=` fixes the first for all. (One horizon for all would decide the race: an exact filter with a
long memory grows stiff where the text changes, a delta rule without a precision does not.)

The read is o = S^T q, with q the key of the context that ends at the byte just written: a prediction of a byte never
sees that byte. The named byte is the largest channel, b. Its hit h in {0, 1} is predicted as Normal(gain * o_b,
size * (variance_b + 1 / beta)): 1 / beta is the noise of an observation, and gain and size are two numbers a model,
fitted on the first slice. They are needed because nothing fixes a linear read's units, and they are all that a model
with a constant variance can use. After the first slice the memory is emptied and the scored text starts.

Each default model stands for one idea: `mamba2` adds; `palimpsa_key` divides by an importance that the value channels
share, `palimpsa` by one for each entry (with equal importances the two are one model); `gated_deltanet` corrects what
it already predicts; `meta_gdn` does that with an importance; `mesanet` solves the regression exactly. Any other model
may be named whose inputs have a value above.

    recall().table()                          # the standard library's own sources
    recall([Path("notes.txt")]).plot("recall.png")
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .errors import UnifyError

if TYPE_CHECKING:
    from rich.table import Table

    from .triple import Triple

__all__ = ["MODELS", "ModelRecall", "RecallReport", "recall"]

MODELS = ("mamba2", "palimpsa_key", "palimpsa", "gated_deltanet", "meta_gdn", "mesanet")
PRECISIONS = (1 / 4, 1.0, 4.0)
HORIZONS = (256, 1024, 4096)  # tokens
SILENCE = 1 / 16  # importance of a byte that did not occur, against one that did
BYTES = 256
FIRST_SLICE = 4096  # bytes; at most a quarter of the text
SHORTEST = 64  # bytes
WINDOWS = 16  # of the scored text

Progress = Callable[[str, int, int], None]


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """How well the predictive variance fits the errors, over the scored text.

    z2: mean squared error over predicted variance; 1 is calibrated, above 1 the model is too sure.
    within1, within2: share of errors inside one and two predicted standard deviations (a Gaussian: 0.683, 0.954).
    nll: mean negative log density, nats per prediction.
    ranking: probability that a hit had a smaller variance than a miss; 0.5 says the variance knows nothing.
    """

    z2: float
    within1: float
    within2: float
    nll: float
    ranking: float


@dataclass(frozen=True)
class ModelRecall:
    """One model on one text.

    accuracy: share of scored bytes named; accuracy_by_window and z2_by_window: over the report's windows;
    accuracy_by_certainty: over tenths of the predictions, smallest predicted variance first.
    horizon (tokens; 0 where the model never forgets), beta, gain, size: what the first slice chose. memory_floats:
    K x V, the same for every model; state_floats: with the precision it carries. seconds: wall time, with the
    first slice and without compiling.
    """

    name: str
    accuracy: float
    accuracy_by_window: tuple[float, ...]
    z2_by_window: tuple[float, ...]
    accuracy_by_certainty: tuple[float, ...]
    calibration: Calibration
    horizon: int
    beta: float
    gain: float
    size: float
    memory_floats: int
    state_floats: int
    seconds: float


@dataclass(frozen=True)
class Reference:
    """A predictor without a memory matrix: the most frequent byte so far after the longest known context."""

    name: str
    accuracy: float
    accuracy_by_window: tuple[float, ...]


@dataclass(frozen=True)
class RecallReport:
    """What `recall` measured. windows: end of each window, bytes from the start of the scored text."""

    files: tuple[str, ...]
    bytes_fitted: int
    bytes_scored: int
    key_dim: int
    context: int
    spread: int
    seed: int
    windows: tuple[int, ...]
    models: tuple[ModelRecall, ...]
    references: tuple[Reference, ...]

    def to_json(self) -> str:
        """The whole report as JSON."""
        return json.dumps(asdict(self), indent=2)

    def table(self) -> Table:
        """The report as a rich table."""
        from rich.table import Table

        error = 100 * math.sqrt(0.25 / self.bytes_scored)
        table = Table(
            title=f"Next byte, untrained: {self.bytes_scored:,} bytes, memory {self.key_dim} x {BYTES} in every model",
            caption=f"horizon, beta, gain and size chosen on {self.bytes_fitted:,} bytes before the scored ones. "
            f"One standard error of an accuracy is about {error:.1f} points.\nz²: squared error over predicted "
            "variance, 1 is calibrated. 1σ, 2σ: errors inside, of a Gaussian 68 and 95 %.\nranking: chance that a hit "
            "had a smaller variance than a miss; 0.50 knows nothing.",
            caption_justify="left",
        )
        names = "model;accuracy %;z²;1σ %;2σ %;nats;ranking;horizon;beta;state floats;s"
        for name in names.split(";"):
            table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
        for m in self.models:
            c = m.calibration
            figures = (f"{c.z2:.2f}", f"{100 * c.within1:.0f}", f"{100 * c.within2:.0f}", f"{c.nll:.2f}")
            cost = (str(m.horizon or "-"), f"{m.beta:.4g}", f"{m.state_floats:,}", f"{m.seconds:.1f}")
            table.add_row(m.name, f"{100 * m.accuracy:.1f}", *figures, f"{c.ranking:.2f}", *cost)
        table.add_section()
        for r in self.references:
            table.add_row(r.name, f"{100 * r.accuracy:.1f}", style="dim")
        return table

    def plot(self, path: str | Path) -> Path:
        """Accuracy and calibration by position, and accuracy by certainty; the suffix of `path` is the format."""
        return _plot(self, Path(path))


# --- text to keys -----------------------------------------------------------------------------------------------------


def default_files() -> tuple[Path, ...]:
    """The Python sources at the top of the standard library, in alphabetical order."""
    return tuple(sorted(Path(os.__file__).parent.glob("*.py")))


def read_text(files: Sequence[str | Path], limit: int) -> tuple[bytes, tuple[str, ...]]:
    """The first `limit` bytes of the files one after the other, and the names of the files they came from."""
    text, names = b"", []
    for path in map(Path, files):
        if len(text) >= limit:
            break
        try:
            text += path.read_bytes()[: limit - len(text)]
        except OSError as error:
            why = f"the file cannot be read ({error.strerror or error})"
            raise UnifyError(str(path), why, "name files that exist and that you may read") from error
        names.append(path.name)
    if len(text) < SHORTEST:
        given = f"{', '.join(names) or 'no file'} ({len(text)} bytes)"
        raise UnifyError(given, "files: too little text to recall anything", f"pass at least {SHORTEST} bytes of text")
    return text, tuple(names)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): uint64 to well-mixed uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def context_keys(text: bytes, key_dim: int = 64, context: int = 2, spread: int = 4, seed: int = 0) -> torch.Tensor:
    """The key of the context before each byte: a count sketch of its last 1, 2, .. `context` bytes, of unit length.

    Returns [len(text) + 1, key_dim]; row t depends on text[t - context : t] alone. Before the text lie bytes of a
    257th kind. Each of the `spread` equal segments of the channels receives one +-1 from each of the `context` codes.
    """
    if context < 1 or spread < 1 or key_dim < 1 or key_dim % spread:
        given = f"key_dim={key_dim}, context={context}, spread={spread}"
        raise UnifyError(given, "keys: spread must divide key_dim, and all be positive", "try 64, 2 and 4")
    rows, segment = len(text) + 1, key_dim // spread
    past = np.concatenate([np.full(context, BYTES), np.frombuffer(text, np.uint8)]).astype(np.uint64)
    keys = np.zeros((rows, key_dim), np.float32)
    code = np.full(rows, _mix(np.array([seed], np.uint64))[0])
    for m in range(1, context + 1):
        code = _mix(code * np.uint64(BYTES + 1) + past[context - m : context - m + rows] + np.uint64(1))
        for part in range(spread):
            draw = _mix(code + np.uint64(part))
            channel = part * segment + (draw >> np.uint64(1)) % np.uint64(segment)
            keys[np.arange(rows), channel.astype(np.int64)] += 1 - 2 * (draw & np.uint64(1)).astype(np.float32)
    length = np.linalg.norm(keys, axis=1, keepdims=True)
    return torch.from_numpy(keys / np.maximum(length, 1e-6))  # opposite codes may cancel to a key of zero


# --- one model along one text -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """horizon: tokens the memory is worth; beta: precision of an observation, of which the prior's is the unit."""

    horizon: int
    beta: float


def inputs(triple: Triple, seen: torch.Tensor, settings: Sequence[Setting], key_dim: int) -> dict:
    """v and the gates that `triple` takes, a priori, as the module's first lines say: one head for each setting.

    seen: [T, V], one-hot bytes. Returns keyword arguments of the op: v [1, T, H, V], and of g, beta, importance and
    prior_precision those it has. Raises UnifyError where the triple has an input that no rule above gives a value.
    """
    _check_supported(triple)
    a, T, H = triple.architecture, len(seen), len(settings)
    beta = torch.tensor([s.beta for s in settings])
    g = torch.tensor([math.log1p(-1 / s.horizon) for s in settings])
    shared = beta.expand(1, T, H)
    each = shared[..., None] * (SILENCE + seen)[None, :, None, :]
    uncorrected = triple.curvature == "none" and "prior" not in triple.anchors
    found = {"v": seen[None, :, None, :].expand(1, T, H, -1)}
    if a.value == "evidence":
        found["v"] = found["v"] * (each if triple.importance == "value" else shared[..., None])
    if a.forgetting != "none":
        shapes = {"fixed": g, "head": g.expand(1, T, H), "key": g[:, None].expand(1, T, H, key_dim)}
        found["g"] = shapes[a.forgetting]
    if a.precision != "one":
        found["beta"] = each if a.precision == "value" else shared / (1 + shared) if uncorrected else shared
    if a.importance != "tied":
        found["importance"] = each if a.importance == "value" else shared
    if triple.prior.precision != "one":
        found["prior_precision"] = torch.ones((H,) if triple.prior.precision == "head" else (H, key_dim))
    return found


def _check_supported(triple: Triple) -> None:
    a, p, prior = triple.architecture, triple.posterior, triple.prior
    extra = {
        "forgetting per entry": a.forgetting == "entry",
        "a write gate": a.write_gate,
        "a read before the write": a.read == "before",
        "a mixed read": a.mix,
        "several observations a token": len(a.stages) > 1 or not a.stages[0].plain,
        "a key made from the decay": a.key != "free",
        "an anchor weight": p.anchor_weight != "one",
        "a gain": p.gain,
        "a prior mean": prior.mean != "zero",
        "a diffusion": prior.dynamics == "diffusion",
        "an adaptive prior": prior.adaptive is not None,
    }
    if found := [name for name, there in extra.items() if there]:
        works = "choose models whose gates are a decay, beta, an importance and a prior precision"
        raise UnifyError(f"a triple with {' and '.join(found)}", "models: recall has no untrained value for it", works)


@dataclass(frozen=True)
class Trace:
    """What a model said before each byte but the first: [H, T - 1] each. mean and variance are the named byte's."""

    named: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    memory_floats: int
    state_floats: int


def follow(
    triple: Triple,
    text: bytes,
    keys: torch.Tensor,
    settings: Sequence[Setting],
    block: int = 4096,
    tick: Callable[[int], None] = lambda done: None,
) -> Trace:
    """Write and read along a text, block after block, each setting in a head of its own; keys: [len(text) + 1, K]."""
    from .op import compile

    op, K, H = compile(triple), keys.shape[1], len(settings)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    one_hot, state, parts = torch.eye(BYTES), None, []
    for start in range(0, len(text), block):
        stop = min(start + block, len(text))
        given = inputs(triple, one_hot[data[start:stop]], settings, K)
        k, q = (keys[None, start + ahead : stop + ahead, None].expand(1, -1, H, K) for ahead in (0, 1))
        v = given.pop("v")
        given |= {"scale": 1.0, "initial_state": state, "output_final_state": True, "return_variance": True}
        with torch.no_grad():
            o, variance, state = op(q, k, v, **given)
        mean, named = torch.nan_to_num(o[0]).max(-1)
        at_named = variance[0].expand(-1, H, BYTES).gather(-1, named[..., None])[..., 0]
        parts.append((named, mean.double(), at_named.double()))
        tick(stop)
    said = [torch.cat(part)[:-1].T for part in zip(*parts, strict=True)]  # the last is about a byte beyond the text
    fields = [field for field in state if field is not None]
    memory = next(field for field in fields if field.shape[-2:] == (K, BYTES))
    return Trace(*said, memory.numel() // H, sum(field.numel() for field in fields) // H)


# --- scores -----------------------------------------------------------------------------------------------------------


def fit_scales(hit: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> tuple[float, float]:
    """gain and size of Normal(gain * mean, size * variance), by least squares and by mean z² = 1. All [T]."""
    gain = float((hit * mean).sum() / (mean * mean).sum().clamp(min=1e-30))
    size = float(((hit - gain * mean).square() / variance).mean())
    return gain, max(size, 1e-12)  # a first slice without an error would promise certainty


def calibration(error: torch.Tensor, variance: torch.Tensor, hit: torch.Tensor) -> Calibration:
    """Figures for errors [T] whose variances [T] were predicted; hit [T] says which predictions came true."""
    z2 = error.square() / variance
    return Calibration(
        z2=float(z2.mean()),
        within1=float((z2 <= 1).double().mean()),
        within2=float((z2 <= 4).double().mean()),
        nll=float((0.5 * torch.log(2 * math.pi * variance) + 0.5 * z2).mean()),
        ranking=ranking(-variance, hit),
    )


def _groups(score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which group of equal scores, in ascending order, each entry of score [T] is in, and the groups' sizes.

    Equal means to 1e-5 of the largest: a constant variance is constant to rounding only.
    """
    step = 1e-5 * float(score.abs().max().clamp(min=1e-30))
    _, group, count = torch.unique((score / step).round(), return_inverse=True, return_counts=True)
    return group, count


def ranking(score: torch.Tensor, hit: torch.Tensor) -> float:
    """Probability that a hit scores above a miss (Mann and Whitney 1947); equal scores count half."""
    group, count = _groups(score)
    rank = (count.cumsum(0) - (count - 1) / 2).double()[group]
    hits, misses = int(hit.sum()), int((1 - hit).sum())
    if not hits or not misses:
        return 0.5
    return float((rank[hit > 0].sum() - hits * (hits + 1) / 2) / (hits * misses))


def by_certainty(hit: torch.Tensor, variance: torch.Tensor, parts: int = 10) -> tuple[float, ...]:
    """Mean hit [T] of equal parts, smallest variance first; predictions of equal variance share their mean."""
    group, count = _groups(variance)
    mean = torch.zeros(len(count), dtype=hit.dtype).index_add_(0, group, hit) / count
    return tuple(float(part.mean()) for part in mean[group.sort().values].tensor_split(parts) if len(part))


def by_window(x: torch.Tensor, windows: Sequence[int]) -> tuple[float, ...]:
    """Means of x [T] between consecutive window ends."""
    return tuple(float(x[a:b].mean()) for a, b in zip((0, *windows[:-1]), windows, strict=True))


def table_hits(text: bytes, context: int) -> torch.Tensor:
    """Hits of an unbounded table: the most frequent byte so far after the longest context seen before. [T - 1]."""
    counts: list[dict[bytes, Counter]] = [defaultdict(Counter) for _ in range(context + 1)]
    best: list[dict[bytes, int]] = [{} for _ in counts]
    hits = []
    for t, byte in enumerate(text):
        orders = [(m, text[t - m : t]) for m in range(min(context, t) + 1)]
        named = next((best[m][past] for m, past in reversed(orders) if past in best[m]), 0)
        hits.append(float(named == byte))
        for m, past in orders:
            seen = counts[m][past]
            seen[byte] += 1
            if seen[byte] > seen[best[m].get(past, byte)] or past not in best[m]:
                best[m][past] = byte
    return torch.tensor(hits[1:], dtype=torch.float64)


# --- all models -------------------------------------------------------------------------------------------------------


def recall(
    files: Sequence[str | Path] | None = None,
    models: Sequence[str] | Mapping[str, Triple] = MODELS,
    *,
    key_dim: int = 64,
    context: int = 2,
    spread: int = 4,
    horizon: int | None = None,
    limit_bytes: int = 32768,
    block: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
) -> RecallReport:
    """Let each model read a text once and measure what it recalls.

    files: read as bytes, one after the other, up to limit_bytes; None takes the standard library's sources.
    models: names in the zoo, or triples by name. key_dim: K. context: bytes in a key. spread: channels of each code in
    a key. horizon: tokens the memory is worth, None lets the first slice choose. block: tokens an op is given at once;
    results do not depend on it.
    progress: called as progress(model, bytes done, bytes in all).
    Raises UnifyError where a file cannot be read, the text is too short, or an input has no a-priori value.
    """
    if (horizon is not None and horizon < 2) or block < 1:
        raise UnifyError(f"horizon={horizon}, block={block}", "both count tokens", "use horizon >= 2 and block >= 1")
    grid = [Setting(h, beta) for h in ([horizon] if horizon else HORIZONS) for beta in PRECISIONS]
    triples = _triples(models)
    text, names = read_text(default_files() if files is None else files, limit_bytes)
    first = min(FIRST_SLICE, len(text) // 4)
    slices = text[:first], text[first:]
    keys = [context_keys(part, key_dim, context, spread, seed) for part in slices]
    scored = len(slices[1]) - 1  # nothing is said before the first byte
    count = max(1, min(WINDOWS, scored // 24))
    windows = tuple(round(scored * (i + 1) / count) for i in range(count))
    found = [_measure(name, t, slices, keys, windows, grid, block, progress) for name, t in triples.items()]
    references = []
    for order, name in ((0, "most frequent byte"), (context, f"table of {context}-byte contexts, unbounded")):
        hits = table_hits(slices[1], order)
        references.append(Reference(name, float(hits.mean()), by_window(hits, windows)))
    shape = {"key_dim": key_dim, "context": context, "spread": spread, "seed": seed}
    return RecallReport(
        names, first, scored, **shape, windows=windows, models=tuple(found), references=tuple(references)
    )


def _triples(models: Sequence[str] | Mapping[str, Triple]) -> dict[str, Triple]:
    if isinstance(models, Mapping):
        triples = dict(models)
    else:
        from .models import zoo

        triples = {name: zoo.get(name).triple for name in models}
    if not triples:
        raise UnifyError("no model", "models: there is nothing to compare", f"name some, such as {', '.join(MODELS)}")
    for triple in triples.values():
        _check_supported(triple)
    return triples


def _measure(name, triple, slices, keys, windows, grid, block, progress) -> ModelRecall:
    """Choose horizon, beta, gain and size on the first slice, then follow the scored one with an empty memory."""
    first, total = len(slices[0]), len(slices[0]) + len(slices[1])
    tick = (lambda done: None) if progress is None else (lambda done: progress(name, done, total))
    if triple.architecture.forgetting == "none":
        grid = [s for s in grid if s.horizon == grid[0].horizon]
    follow(triple, slices[0][:2], keys[0][:3], grid[:1])  # compiles
    start = time.perf_counter()
    fit = follow(triple, slices[0], keys[0], grid, max(1, block // len(grid)), tick)
    hits = _hits(fit, slices[0])
    best = int(hits.mean(1).argmax())  # the first of equals: the shorter memory, then the weaker precision
    chosen = grid[best]
    gain, size = fit_scales(hits[best], fit.mean[best], fit.variance[best] + 1 / chosen.beta)

    run = follow(triple, slices[1], keys[1], [chosen], block, lambda done: tick(first + done))
    (hit,), variance = _hits(run, slices[1]), size * (run.variance[0] + 1 / chosen.beta)
    error = hit - gain * run.mean[0]
    return ModelRecall(
        name=name,
        accuracy=float(hit.mean()),
        accuracy_by_window=by_window(hit, windows),
        z2_by_window=by_window(error.square() / variance, windows),
        accuracy_by_certainty=by_certainty(hit, variance),
        calibration=calibration(error, variance, hit),
        horizon=0 if triple.architecture.forgetting == "none" else chosen.horizon,
        beta=chosen.beta,
        gain=gain,
        size=size,
        memory_floats=run.memory_floats,
        state_floats=run.state_floats,
        seconds=time.perf_counter() - start,
    )


def _hits(trace: Trace, text: bytes) -> torch.Tensor:
    """1 where the named byte came, [H, T - 1]."""
    return (trace.named == torch.frombuffer(bytearray(text[1:]), dtype=torch.uint8)).double()


# --- the figure -------------------------------------------------------------------------------------------------------


def _plot(report: RecallReport, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.9), layout="constrained")
    accuracy, errors, certainty = figure.subplots(1, 3)
    ends = np.array((0, *report.windows))
    middle = (ends[1:] + ends[:-1]) / 2000
    errors.axhline(1, color="0.45", lw=1.3, ls="--")
    for m, style in zip(report.models, _styles(), strict=False):
        label = f"{m.name}  {100 * m.accuracy:.1f} %"
        accuracy.plot(middle, [100 * a for a in m.accuracy_by_window], label=label, **style)
        errors.plot(middle, m.z2_by_window, **style)
        tenths = len(m.accuracy_by_certainty)
        share = [100 * (i + 0.5) / tenths for i in range(tenths)]
        certainty.plot(share, [100 * a for a in m.accuracy_by_certainty], **style)
    for r, dash in zip(report.references, (":", "--"), strict=True):
        style = {"color": "0.45", "lw": 1.3, "ls": dash, "label": f"{r.name}  {100 * r.accuracy:.1f} %"}
        accuracy.plot(middle, [100 * a for a in r.accuracy_by_window], **style)
    position = {"xlabel": "position in the text (thousand bytes)", "xlim": (0, ends[-1] / 1000)}
    percent = {"ylabel": "next byte named right (%)", "ylim": (0, None)}
    accuracy.set(title="Accuracy", **position, **percent)
    errors.set(title="Calibration: 1 is right, above 1 too sure", **position)
    errors.set_ylabel("squared error / predicted variance")
    certainty.set(title="Does the variance know? (flat: no)", xlim=(0, 100), **percent)
    certainty.set_xlabel("predictions, most certain first (%)")
    _doubling_axis(errors, [z for m in report.models for z in m.z2_by_window])
    for axes in (accuracy, errors, certainty):
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Recall without training: memory {report.key_dim} x {BYTES} in every model", fontsize=13)
    figure.savefig(path, dpi=150)
    return path


def _styles():
    from itertools import cycle

    from .draw import PALETTE

    for color, marker in zip(cycle(PALETTE), cycle("osD^vP*X"), strict=False):
        yield {"color": color, "marker": marker, "ms": 4.5, "lw": 1.8}


def _doubling_axis(axes, values: Sequence[float]) -> None:
    """A logarithmic y axis with ticks at powers of two, from 1/2 to 2 at least."""
    low, high = (round(math.log2(min(max(z, 1e-4), 1e4))) for z in (min(values), max(values)))
    low, high = min(low, 0) - 1, max(high, 0) + 1
    axes.set_yscale("log", base=2)
    axes.set_ylim(2.0**low, 2.0**high)
    ticks = range(low, high + 1, 1 + (high - low) // 10)
    axes.set_yticks([2.0**e for e in ticks], [f"{2.0**e:.3g}" for e in ticks])
