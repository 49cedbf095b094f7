"""What the runs of a file show, with the spread over seeds: standings, tables, and sentences that follow from the numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean, stdev
from typing import Any

from unify.errors import UnifyError

from .run import ATTENTION, ATTENTIONS, CONTROL, CONVOLVED, MODELS, SOLVED, Run
from .task import Task

# which is compared with which: a memory with an importance and its source, then Palimpsa and the other memories
PAIRS = (
    ("palimpsa", CONTROL), ("palimpsa_key", CONTROL), ("metamamba2", "mamba2"), ("meta_gla", "gla"),
    ("meta_gdn", "gated_deltanet"), ("palimpsa", "palimpsa_key"), ("palimpsa", "mamba2"), ("palimpsa", "gated_deltanet"),
    ("palimpsa", "kda"), ("palimpsa", "mesanet"), ("palimpsa", ATTENTION), ("palimpsa", CONVOLVED),
    ("palimpsa_key", "mamba2"), ("palimpsa_key", "mesanet"), ("palimpsa_key", ATTENTION), ("palimpsa_key", CONVOLVED),
    ("meta_gdn", "mesanet"), ("meta_gdn", CONVOLVED),
)  # fmt: skip
SOURCES = PAIRS[:5]
# what is equal to Mamba-2's, as a title says it
TITLES = {"none": "Matched to nothing", "state": "At Mamba-2's state", "parameters": "At Mamba-2's parameters"}
ENOUGH = 3  # seeds
RISING = 0.01  # accuracy gained by the last look at it
ALIKE = 0.01  # of Mamba-2's state or parameters; what is matched comes as close
GUESSED = 2.0  # times the accuracy of a guess among a sequence's values: below it recall has not begun


@dataclass(frozen=True)
class Standing:
    """A model on a task at the learning rate that is best for it on average, over seeds.

    accuracies: one for each of seeds. parameters, state (bytes), flops (a token): of the model as it was trained. others: accuracies
    on tasks that were not trained on. curves: [(step, loss, accuracy)] a seed. sizes: everything else the runs share. rates: the
    accuracy of each seed at every rate; records: of all its runs, at other rates too.
    """

    model: str
    task: Task
    match: str
    sizes: tuple
    lr: float
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    parameters: int
    state: int
    flops: int
    others: dict[str, tuple[float, ...]]
    curves: tuple
    rates: dict[float, dict[int, float]]
    records: tuple

    @property
    def mean(self) -> float:
        """Mean accuracy over seeds."""
        return mean(self.accuracies)

    @property
    def steps(self) -> int:
        """Optimizer steps, at most."""
        return dict(self.sizes)["steps"]

    @property
    def matched(self) -> str:
        """What is equal to Mamba-2's, to stand behind a name or a place; "" where nothing is."""
        return "" if self.match == "none" else f", equal {self.match}"

    @property
    def label(self) -> str:
        """As people write it."""
        return name(self.model) + self.matched


def name(model: str) -> str:
    """A model's label."""
    from unify.models.zoo import ZOO

    labels = {
        ATTENTION: "Transformer",
        CONVOLVED: "Transformer with convolution",
        CONTROL: "Palimpsa without importance",
    }
    return labels.get(model) or ZOO[model].label


def standings(records: Iterable[dict[str, Any]]) -> list[Standing]:
    """One for each model, task, match and sizes, in the order of `MODELS`; of a run that was done again, the first time counts.

    Raises UnifyError where there is no record.
    """
    groups: dict[tuple, dict[float, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        run = dict(record["run"])
        task = Task(**run.pop("task"))
        model, match, lr, seed = (run.pop(x) for x in ("model", "match", "lr", "seed"))
        groups[model, task, match, tuple(sorted(run.items()))][lr].setdefault(seed, record)
    if not groups:
        raise UnifyError("no run", "there is nothing to show", "train some first: unify mqar --toy")
    found = []
    for (model, task, match, sizes), by_lr in groups.items():
        lr = _best(by_lr)
        seeds, best = zip(*sorted(by_lr[lr].items()), strict=True)
        cost = {x: best[0][x] for x in ("parameters", "state", "flops")}
        names = dict.fromkeys(t for r in best for t in r["others"])
        others = {t: tuple(r["others"][t] for r in best if t in r["others"]) for t in names}
        accuracies, curves = tuple(r["accuracy"] for r in best), tuple(r["curve"] for r in best)
        used = tuple(r for runs in by_lr.values() for r in runs.values())
        rates = {rate: {n: r["accuracy"] for n, r in sorted(runs.items())} for rate, runs in sorted(by_lr.items())}
        found.append(
            Standing(model, task, match, sizes, lr, seeds, accuracies, **cost, others=others, curves=curves,
                     rates=rates, records=used)
        )  # fmt: skip
    rank = {x: n for n, x in enumerate(MODELS)}
    order = lambda s: (s.task.length, s.task.pairs, s.task.overwrites, s.steps, s.match, rank.get(s.model, 99))  # noqa: E731
    return sorted(found, key=order)


def _best(by_lr: dict[float, dict[int, dict]]) -> float:
    """The rate above most others by the mean over the seeds that both have; of several such the one with most seeds."""

    def above(one: float, other: float) -> bool:
        seeds = set(by_lr[one]) & set(by_lr[other])
        means = (mean(by_lr[lr][seed]["accuracy"] for seed in seeds) for lr in (one, other)) if seeds else (0, 0)
        return next(means) > next(means)

    return max(by_lr, key=lambda lr: (sum(above(lr, x) for x in by_lr), len(by_lr[lr])))


def markdown(found: list[Standing]) -> str:
    """A table a task: accuracy as the mean over seeds, and of each; cost beside it; then each other task that was read."""
    return "\n\n".join(
        _table([s for s in found if (s.task, s.steps) == group])
        for group in dict.fromkeys((s.task, s.steps) for s in found)
    )


def _table(found: list[Standing]) -> str:
    others = list(dict.fromkeys(t for s in found for t in s.others))
    titles = ["task", "steps", "model", "accuracy", "of each seed", "learning rate", "state, bytes", "parameters",
              "flops a token", *(f"read at {t}" for t in others)]  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for s in found:
        each = " ".join(f"{x:.3f}" for x in s.accuracies)
        rate = f"{s.lr:.2g}, best of {len(s.rates)}" if len(s.rates) > 1 else f"{s.lr:.2g}"
        cells = [s.task, f"{s.steps:,}", s.label, f"{s.mean:.3f}", each, rate, f"{s.state:,}", f"{s.parameters:,}",
                 f"{s.flops:,}", *(f"{mean(s.others[t]):.3f}" if t in s.others else "" for t in others)]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def by_rate(found: list[Standing]) -> str:
    """A table of each seed's accuracy at every learning rate, where several were tried; empty where not."""
    several = [s for s in found if len(s.rates) > 1]
    if not several:
        return ""
    rates = sorted({rate for s in several for rate in s.rates})
    lines = [
        "| task | steps | model | " + " | ".join(f"at {x:.2g}" for x in rates) + " |",
        "|" + "---|" * (3 + len(rates)),
    ]
    for s in several:
        cells = (" ".join(f"{x:.3f}" for x in s.rates.get(rate, {}).values()) for rate in rates)
        lines.append(f"| {s.task} | {s.steps:,} | {s.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Iterable[float], sign: str = "") -> str:
    """Mean and standard deviation over seeds; the one number where there is one."""
    values = tuple(values)
    shown = f"{mean(values):{sign}.3f}"
    return shown + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def compare(
    one: str, other: str, a: dict[int, float], b: dict[int, float], sign: str = "", less: bool = False
) -> tuple[str, int, int]:
    """A sentence on two things measured over the seeds they share; (it, how often the first is above, how many seeds).

    less: count how often it is below.
    """
    seeds = sorted(set(a) & set(b))
    count = sum(a[s] < b[s] if less else a[s] > b[s] for s in seeds)
    values = f"{spread((a[s] for s in seeds), sign)} against {spread((b[s] for s in seeds), sign)}"
    of = f"{count} of {len(seeds)} seed{'s' * (len(seeds) != 1)}"
    return f"{one} {'below' if less else 'above'} {other} in {of}: {values}.", count, len(seeds)


@dataclass(frozen=True)
class Comparison:
    """Accuracies of two models by seed, at the same `where` and match, each at its best rate or both at that of what is matched.

    both: (accuracy of the first, of the other) of all runs that differ in nothing else, where there are other rates than the best.
    """

    where: str
    one: str
    other: str
    mine: dict[int, float]
    theirs: dict[int, float]
    match: str = "none"
    both: tuple[tuple[float, float], ...] = ()

    @property
    def seeds(self) -> list[int]:
        """Those of both."""
        return sorted(set(self.mine) & set(self.theirs))

    @property
    def above(self) -> int:
        """In how many of them the first is above."""
        return sum(self.mine[s] > self.theirs[s] for s in self.seeds)

    @property
    def cell(self) -> str:
        """What a table says of it."""
        one, other = (spread(x[s] for s in self.seeds) for x in (self.mine, self.theirs))
        more = f"<br>{sum(x > y for x, y in self.both)} of {len(self.both)} at equal rates" if self.both else ""
        return f"**{self.above} of {len(self.seeds)}**: {one}, {other}{more}"


@dataclass(frozen=True)
class Beside:
    """Two models of `PAIRS` at equal task, match and sizes; one that is not matched is as large by itself."""

    one: Standing
    other: Standing
    match: str

    @property
    def rates(self) -> tuple[float, float]:
        """Each model's best; where one is as large by itself, that of the other for both."""
        a, b = self.one, self.other
        return (a.lr, b.lr) if a.match == b.match else ((a if a.match == self.match else b).lr,) * 2

    @property
    def runs(self) -> tuple[tuple[float, float], ...]:
        """The accuracies of both over all runs that differ in nothing else."""
        a, b = self.one.rates, self.other.rates
        return tuple((x, b[rate][n]) for rate in a if rate in b for n, x in a[rate].items() if n in b[rate])

    def compared(self, task: str = "") -> Comparison:
        """At the task trained on, or as read at another."""
        mine, theirs = (_read(s, lr, task) for s, lr in zip((self.one, self.other), self.rates, strict=True))
        several = self.match == "none" and not task and max(len(self.one.rates), len(self.other.rates)) > 1
        where = _where(self.one) + (f", read at {task}" if task else "")
        names = name(self.one.model), name(self.other.model)
        return Comparison(where, *names, mine, theirs, self.match, self.runs if several else ())


def equal(found: list[Standing], match: str) -> list[Standing]:
    """Those matched so, and on the same tasks those that have as much of what is matched as Mamba-2 by themselves, within `ALIKE`."""
    at = {(s.model, s.task, s.match, s.sizes): s for s in found}

    def fits(s: Standing) -> bool:
        source = at.get(("mamba2", s.task, "none", s.sizes))
        if s.match == match:
            return True
        if s.match != "none" or not source or (s.model, s.task, match, s.sizes) in at:
            return False
        return abs(getattr(s, match) / getattr(source, match) - 1) < ALIKE

    matched = {(s.task, s.sizes) for s in found if s.match == match}
    return [s for s in found if (s.task, s.sizes) in matched and fits(s)]


def _beside(found: list[Standing]) -> list[Beside]:
    """Each two of `PAIRS` that can be compared: of the same size by themselves or not, but where something is matched one of them is."""
    out = []
    for match in dict.fromkeys(s.match for s in found):
        at = {(s.model, s.task, s.sizes): s for s in equal(found, match)}
        for group in dict.fromkeys((s.task, s.sizes) for s in at.values()):
            for one, other in ((at.get((m, *group)) for m in pair) for pair in PAIRS):
                if one and other and match in (one.match, other.match):
                    out.append(Beside(one, other, match))
    return out


def _read(standing: Standing, lr: float, task: str = "") -> dict[int, float]:
    """The accuracy of each seed at a rate: at the task trained on, or as read at another where it was."""
    if not task:
        return standing.rates.get(lr, {})
    runs = (r for r in standing.records if r["run"]["lr"] == lr and task in r["others"])
    return {r["run"]["seed"]: r["others"][task] for r in runs}


def _told(comparison: Comparison, task: Task) -> bool:
    """Whether there is a seed that both have, and one in which recall has begun."""
    values = (*comparison.mine.values(), *comparison.theirs.values())
    return bool(comparison.seeds) and any(_begun(x, task) for x in values)


def comparisons(found: list[Standing]) -> list[Comparison]:
    """Each two of `_beside` on the task that they were trained on, where one has begun to recall."""
    said = [(beside.compared(), beside.one.task) for beside in _beside(found)]
    return [c for c, task in said if _told(c, task)]


def readings(found: list[Standing]) -> list[Comparison]:
    """The same of `SOURCES` on the tasks that they were not trained on: longer sequences, keys bound twice."""
    out = []
    for beside in _beside(found):
        if (beside.one.model, beside.other.model) in SOURCES and _told(beside.compared(), beside.one.task):
            out += [c for c in map(beside.compared, beside.one.others) if c.seeds]
    return out


def crossed(said: list[Comparison]) -> str:
    """A table of comparisons: two models a row, where they were compared a column."""
    places = list(dict.fromkeys(c.where for c in said))
    lines = ["| | " + " | ".join(places) + " |", "|" + "---|" * (1 + len(places))]
    for one, other in dict.fromkeys((c.one, c.other) for c in said):
        cells = (
            "<br>".join(c.cell for c in said if (c.one, c.other, c.where) == (one, other, place)) for place in places
        )
        lines.append(f"| {one} above {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def totals(found: list[Standing], match: str = "none") -> list[str]:
    """For each of `PAIRS` a sentence on all runs of that match that are equal but for the model."""
    runs: dict[tuple[str, str], list[tuple[float, float, Task]]] = {pair: [] for pair in PAIRS}
    for beside in _beside(found):
        if beside.match == match:
            runs[beside.one.model, beside.other.model] += [(x, y, beside.one.task) for x, y in beside.runs]
    out = []
    for (one, other), pairs in runs.items():
        told = [x > y for x, y, task in pairs if _begun(max(x, y), task)]
        rest = len(pairs) - len(told)
        more = f"; in {rest} more neither had begun to recall" if rest else ""
        out += [f"{name(one)} above {name(other)} in {sum(told)} of {len(told)} runs{more}."] if told else []
    return out


def matching(found: list[Standing], match: str) -> str:
    """How far from Mamba-2's the sizes that count as matched are at most, or the parameters of what is matched to nothing."""
    plain = {(s.task, s.sizes): s for s in found if (s.model, s.match) == ("mamba2", "none")}
    of = [s for s in equal(found, match) if (s.task, s.sizes) in plain]
    size = "parameters" if match == "none" else match
    off = [(s.model, abs(getattr(s, size) / getattr(plain[s.task, s.sizes], size) - 1)) for s in of]
    if len({model for model, _ in off}) < 2:
        return ""
    if match != "none":
        return f"Off Mamba-2's by {max(x for _, x in off):.1%} at most."
    kinds = {
        "Parameters": [x for model, x in off if model not in ATTENTIONS],
        "A Transformer's": [x for model, x in off if model in ATTENTIONS],
    }
    return " ".join(f"{who} are off Mamba-2's by {max(xs):.1%} at most." for who, xs in kinds.items() if xs)


def repeated(records: Iterable[dict[str, Any]]) -> list[str]:
    """A sentence on the runs that were done again: how far apart equal seeds are."""
    values: dict[str, list[float]] = defaultdict(list)
    labels = {}
    for record in records:
        run, key = record["run"], record["key"]
        values[key].append(record["accuracy"])
        labels[key] = f"{name(run['model'])}, {Task(**run['task'])} at {run['lr']:.2g}, seed {run['seed']}"
    twice = (f"{labels[key]}: " + ", then ".join(f"{x:.3f}" for x in of) for key, of in values.items() if len(of) > 1)
    each = "; ".join(twice)
    return [f"The same run, seed and all, done again: {each}."] if each else []


def _where(standing: Standing) -> str:
    return f"{standing.task}, {standing.steps:,} steps"


def _begun(accuracy: float, task: Task) -> bool:
    """Whether it is `GUESSED` times that of a guess among the sequence's values, or halfway from it to 1 where that is less."""
    return accuracy >= min(GUESSED / task.pairs, (1 + 1 / task.pairs) / 2)


def together(found: list[Standing]) -> list[Standing]:
    """Without trainings that are longer or shorter than the one that most models had on their task."""
    models = defaultdict(set)
    for s in found:
        models[s.task, s.steps].add(s.model)
    return [
        s for s in found if len(models[s.task, s.steps]) == max(len(m) for (t, _), m in models.items() if t == s.task)
    ]


def open_questions(found: list[Standing], said: list[Comparison]) -> list[str]:
    """What the numbers do not decide: seeds that disagree, too few of them, models not run on a task, runs that were still rising."""
    torn = sum(0 < c.above < len(c.seeds) for c in said)
    out = [f"Seeds disagree in {torn} of {len(said)} comparisons."] if torn else []
    few = [s for s in found if len(s.seeds) < ENOUGH]
    if few:
        out.append(f"Fewer than {ENOUGH} seeds: {len(few)} of the {len(found)} rows of the tables.")
    ran: dict[str, set[str]] = defaultdict(set)
    for s in together(found):
        if s.match == "none":
            ran[_where(s)].add(s.label)
    for where, models in ran.items():
        if absent := [x for x in dict.fromkeys(s.label for s in found if s.match == "none") if x not in models]:
            out.append(f"{where}: not run, of the models on this page: {', '.join(absent)}.")
    stuck: dict[str, list[str]] = defaultdict(list)
    for s in found:
        if n := sum(not _begun(x, s.task) for x in s.accuracies):
            stuck[_where(s)].append(f"{s.label} {n} of {len(s.seeds)}")
    for where, who in stuck.items():
        out.append(
            f"{where}: recall had not begun (an accuracy below twice that of a guess among the sequence's values) in {', '.join(who)} "
            "runs. These say how fast a model learns, and nothing of what it holds."
        )
    ends = [c for s in found for c in s.curves]
    rising = sum(len(c) > 1 and c[-1][2] - c[-2][2] > RISING and c[-1][2] <= SOLVED for c in ends)
    if rising:
        out.append(
            f"Still rising by more than {RISING} from the last evaluation but one to the last: {rising} of {len(ends)} runs."
        )
    short, full = sorted({s.steps for s in found}), Run("mamba2").steps
    if short[0] < full:
        *most, last = (f"{n:,}" for n in short if n < full)
        steps = f"{', '.join(most)} and {last}" if most else last
        out.append(f"Training was short: {steps} steps, where the paper's is {full:,} at most.")
    return out


def minutes(records: Iterable[dict[str, Any]]) -> str:
    """How long runs kept their machines: minutes in which at least one was under way, so that runs side by side on a GPU count once.

    Two GPUs at work for a minute are two minutes; records without "card", from before it was kept, count as of one.
    """
    by_device: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_device[record["device"]][record.get("card", "")].append(record)
    parts = []
    for device, cards in sorted(by_device.items()):
        runs = [record for found in cards.values() for record in found]
        busy = sum(_busy(found) for found in cards.values())
        versions = sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in runs})
        side = max([r["jobs"] for r in runs] + [_at_once(found) for card, found in cards.items() if card])
        what = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
        parts.append(
            f"{what}, {busy / 60:.1f} minutes of one {device.removeprefix('a ')}, at most {side} side by side ({'; '.join(versions)})"
        )
    return "; ".join(parts) + "."


def _busy(runs: list[dict[str, Any]]) -> float:
    """Seconds in which at least one of the runs was under way."""
    busy, end = 0.0, 0.0
    for began, ended in sorted((r["began"], r["ended"]) for r in runs):
        busy, end = busy + max(0.0, ended - max(began, end)), max(end, ended)
    return busy


def _at_once(runs: list[dict[str, Any]]) -> int:
    """How many of the runs were under way at a time, at most."""
    turns = sorted([(r["began"], 1) for r in runs] + [(r["ended"], -1) for r in runs])
    return max(accumulate(turn for _, turn in turns))


# -- made metaplastic --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A host after `steps` and after each branch: an accuracy for each of `seeds`. sizes: the rest of its `Transformation`."""

    host: str
    task: Task
    sizes: tuple
    seeds: tuple[int, ...]
    before: tuple[float, ...]
    after: dict[str, tuple[float, ...]]
    records: tuple

    @property
    def label(self) -> str:
        """As people write it."""
        return name(self.host)

    @property
    def steps(self) -> int:
        """Optimizer steps before converting."""
        return dict(self.sizes)["plateau"]

    def gained(self, branch: str) -> dict[int, float]:
        """Accuracy after a branch less the accuracy before, by seed."""
        return {s: a - b for s, a, b in zip(self.seeds, self.after[branch], self.before, strict=True)}


def changes(records: Iterable[dict[str, Any]]) -> list[Change]:
    """One for each host, task and sizes. Raises UnifyError where there is no record."""
    groups: dict[tuple, dict[int, dict]] = defaultdict(dict)
    for record in records:
        run = dict(record["transformation"])
        task = Task(**run.pop("task"))
        host, seed = run.pop("host"), run.pop("seed")
        groups[host, task, tuple(sorted(run.items(), key=lambda item: item[0]))][seed] = record
    if not groups:
        raise UnifyError("no transformation", "there is nothing to show", "train some first: unify transform --toy")
    found = []
    for key, by_seed in groups.items():
        seeds, runs = zip(*sorted(by_seed.items()), strict=True)
        after = {b: tuple(r["branches"][b]["accuracy"] for r in runs) for b in runs[0]["branches"]}
        found.append(Change(*key, seeds, tuple(r["accuracy"] for r in runs), after, runs))
    return found


def changed(found: list[Change]) -> tuple[str, list[str], list[str]]:
    """Of what `changes` returns: a table, what it says, and what it leaves open."""
    lines = [
        "| host | task | steps before | branch | trained parameters | before | after | change | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    said, left = [], []
    for c in found:
        for branch, after in c.after.items():
            trained = c.records[0]["branches"][branch]["trained"]
            cells = (
                c.label,
                c.task,
                f"{c.steps:,}",
                branch,
                f"{trained:,}",
                spread(c.before),
                spread(after),
                spread(c.gained(branch).values(), "+"),
            )
            lines.append("| " + " | ".join(map(str, cells)) + f" | {len(c.seeds)} |")
        rise = [r["curve"][-1][2] - r["curve"][-1 - len(r["curve"]) // 4][2] for r in c.records]
        where = f"{c.label}, {c.task}, {c.steps:,} steps"
        said.append(
            f"{where}: in the last quarter of the evaluations before converting the accuracy rose by {spread(rise)}."
        )
        for branch in c.after:
            if branch != "unconverted":
                text, above, seeds = compare(branch, "unconverted", c.gained(branch), c.gained("unconverted"), "+")
                said.append(f"{where}, accuracy gained: {text}")
                left += [f"Seeds disagree: {said[-1]}"] if 0 < above < seeds else []
        going_on = c.gained("unconverted").values()
        if mean(going_on) > RISING:
            left.append(f"{where}: the host was at no plateau, going on unconverted gained {spread(going_on, '+')}.")
        if mean(going_on) < 0:
            lost = f"going on unconverted, at {dict(c.sizes)['again']:g} of the rate, gained {spread(going_on, '+')}"
            left.append(f"{where}: {lost}, so that a branch above it need not be above the host.")
        if max(c.before) > SOLVED - 0.05:
            left.append(f"{where}: the host held its load nearly ({spread(c.before)} before converting).")
        left += [f"{where}: {len(c.seeds)} seed{'s' * (len(c.seeds) != 1)}."] if len(c.seeds) < ENOUGH else []
    return "\n".join(lines), said, left
