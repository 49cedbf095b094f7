"""The page of results: every figure, table and sentence follows from lines of JSON that are committed beside the code.

    unify evidence benchmarks -o evidence       # benchmarks/*.jsonl -> evidence/README.md and its figures

A section is a function of records and the folder for its figures that returns Markdown. A new kind of run is a new line in
`SECTIONS`: the files it is made from, and the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .errors import UnifyError

Records = list[dict[str, Any]]
HEAD = """# What was measured

Every figure, table and sentence below is written by `unify evidence {records} -o {folder}` from the lines of JSON in
`{records}`, one for each run; none of it is typed by hand. A ± is the standard deviation over seeds, a bar or an
error bar goes from the least to the largest seed. "Above in 2 of 3 seeds" counts seeds, which share data and order, one by one.
Minutes are those in which one of the runs shown was under way, kernels compiled on the way included; the start of processes and
runs that were ended before they had a result are not in them.
"""


# how models are matched
HOW = {
    "none": "Every memory has heads of as many key and value channels.",
    "state": "A memory has values as wide as make its state as large, a Transformer attends to as many of the last tokens. What is as "
    "large by itself is as it is.",
    "parameters": "A memory has values, a Transformer has heads, as wide as make it as large. What is as large by itself is as it is.",
}
FOUND = """A sentence counts runs that are equal but for the model, learning rate and seed included, of which at least one had begun to
recall. A table has, by task, each model's best rate (where something is matched its rate for both): in how many of the seeds that
both have the first is above, the accuracy of the first, that of the other."""
FAR = "As in the tables above, of the same models, read at longer sequences and at keys bound twice."


def recall(records: Records, folder: Path) -> str:
    """Models beside each other on multi-query associative recall."""
    from .mqar.figures import draw
    from .mqar.report import (
        TITLES,
        by_rate,
        comparisons,
        crossed,
        markdown,
        matching,
        minutes,
        open_questions,
        readings,
        repeated,
        standings,
        totals,
    )

    found = standings(records)
    captions = {
        "mqar": "Accuracy, as log odds, against the length trained on.",
        "mqar_cost": "Accuracy, as log odds, against the state, the parameters and the flops of a token, a row a task.",
        "mqar_curves": "Accuracy while training, at each model's best rate; a thin line a seed.",
        "mqar_longer": "Accuracy on sequences longer than those trained on, a row for each way of matching.",
        "mqar_overwritten": "Accuracy where keys are bound a second time, and the later value is asked for.",
    }
    pictures = [
        f"![{captions[title]}]({files[0].name})\n\n{captions[title]} {minutes(_of(title, found))}"
        for title, files in draw(found, folder, ("png",)).items()
    ]
    said, rates, far = comparisons(found), by_rate(found), readings(found)
    results, others = [], []
    for match, title in TITLES.items():
        if mine := [c for c in said if c.match == match]:
            about = f"{HOW[match]} {matching(found, match)}".rstrip()
            results += [f"#### {title}", about, _bullets(totals(found, match)), crossed(mine)]
        if mine := [c for c in far if c.match == match]:
            others += [f"{title}:", crossed(mine)]
    return "\n\n".join([
        "## Multi-query associative recall", _set_up(found), *pictures, "### In numbers", markdown(found),
        *(["Each seed's accuracy at every learning rate that was tried:", rates] if rates else []),
        *(["### What was found", FOUND, *results] if results else []),
        *(["### On what was not trained", FAR, *others] if others else []),
        "### What was not", _bullets(open_questions(found, said) + repeated(records)),
    ])  # fmt: skip


def _of(title: str, found: list) -> Records:
    """The records of the runs that a figure shows."""
    from .mqar.figures import shows

    return [r for s in found if shows(title, found, s) for r in s.records]


def _set_up(found: list) -> str:
    """The sizes that the runs share or do not, and which of them are not the paper's."""
    from dataclasses import asdict

    from .mqar.run import CONVOLUTION, CONVOLVED, Run

    sizes = [dict(s.sizes) for s in found]
    each = lambda key: " or ".join(f"{x:,}" for x in sorted({s[key] for s in sizes}))  # noqa: E731
    used = [{**s, "vocab": f.task.vocab, "power": f.task.power} for s, f in zip(sizes, found, strict=True)]
    paper = asdict(Run("mamba2"))
    paper |= paper.pop("task")
    other = [x.replace("_", " ") for x in used[0] if {u[x] for u in used} != {paper[x]}]
    vocab = " or ".join(f"{x:,}" for x in sorted({s.task.vocab for s in found}))
    also = " and in the Transformer with convolution" if any(s.model == CONVOLVED for s in found) else ""
    return (
        f"A vocabulary of {vocab}; {each('layers')} layers without an MLP, width {each('d_model')}, {each('heads')} heads with "
        f"{each('head_dim')} key and (where nothing is matched) {each('expand_v')} times as many value channels, a convolution of "
        f"{CONVOLUTION} tokens in every memory's layer (GLA's published one has none){also}; "
        f"{each('steps')} steps of {each('batch')} sequences from {each('sequences')}, a cosine to 0, accuracy on "
        f"{each('tests')} others. The learning rate is the best of those tried by the mean of this accuracy. The numbers of "
        f"Palimpsa's authors (arXiv 2602.09075) are others for: {', '.join(other) or 'none of these'}."
    )


def transformation(records: Records, folder: Path) -> str:
    """Hosts made metaplastic at a load they cannot hold."""
    from .mqar.figures import changes_figure, save
    from .mqar.report import changed, changes, minutes

    found = changes(records)
    table, said, left = changed(found)
    (file,) = save(changes_figure(found), folder, "transformation")
    caption = "Accuracy before converting (grey) and in each branch; right, what each branch gained."
    about = (
        "transformers' own models, trained on associative recall, made metaplastic by `unify.metaplastic`, trained on. All "
        "branches part from the same weights and have the same tokens in the same order and the same schedule; the unconverted "
        "one is the converted model with its importance held at zero, where it is the host."
    )
    return "\n\n".join([
        "## Made metaplastic", about, f"![{caption}]({file.name})\n\n{caption} {minutes(records)}", "### In numbers", table,
        "### What was found", _bullets(said), "### What was not", _bullets(left),
    ])  # fmt: skip


def language(records: Records, folder: Path) -> str:
    """Language models over bytes."""
    from .bytes.report import section

    return section(records, folder, ("png",)).rstrip()


def several(records: Records, folder: Path) -> str:
    """One GPU against several."""
    from .scale import section

    return section(records)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "Nothing to list."


RUN = ("key", "accuracy")
# the files of a section's records, what writes it, and what each record holds at least
SECTIONS: tuple[tuple[str, Callable[[Records, Path], str], tuple[str, ...]], ...] = (
    ("mqar*.jsonl", recall, RUN),
    ("transform*.jsonl", transformation, RUN),
    ("bytes*.jsonl", language, RUN),
    ("scale*.jsonl", several, ("kind", "processes", "tokens_per_second")),
)


def write(records: Path, folder: Path) -> Path:
    """Write the page of what the folder `records` holds; returns it. Raises UnifyError where that is nothing."""
    from .mqar.sweep import load

    parts = []
    folder.mkdir(parents=True, exist_ok=True)
    for pattern, section, needs in SECTIONS:
        found = [record for file in sorted(records.glob(pattern)) for record in load(file, needs)]
        if found:
            parts.append(section(found, folder))
    if not parts:
        names = ", ".join(pattern for pattern, *_ in SECTIONS)
        raise UnifyError(str(records), "it holds no records of runs", f"a folder with one of {names}")
    page = folder / "README.md"
    head = HEAD.format(records=records.name, folder=folder.name)
    page.write_text("\n\n".join([head.rstrip(), *parts]) + "\n", encoding="utf-8")
    return page
