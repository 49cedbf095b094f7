"""Write the site: gather models and edges, fill the templates, put the files in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from unify import __version__
from unify.errors import UnifyError

from .edge import Pair, pairs
from .graph import Graph, graph
from .highlight import highlighted
from .mathml import math, number, prose, words
from .model import LEGS, Page

Tick = Callable[[str, int, int], None]
GENERATOR = '<meta name="generator" content="unify '
"""What every page of an atlas holds: by it an old atlas is known, and may be written over."""
ASSETS = ("style.css", "script.js")


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Filter:
    """A question that the index can be filtered by: a field of a leg, and what the models choose there."""

    leg: str
    field: str
    values: tuple[str, ...]

    @property
    def key(self) -> str:
        """leg.field."""
        return f"{self.leg}.{self.field}"


@dataclass(frozen=True)
class Atlas:
    """Everything on the site. models, pairs: a page each; several edges between two models share one."""

    models: tuple[Page, ...]
    pairs: tuple[Pair, ...]
    graph: Graph

    @property
    def edges(self) -> int:
        """How many edges there are."""
        return sum(len(p.links) for p in self.pairs)

    @cached_property
    def by_name(self) -> dict[str, Page]:
        """The models' pages."""
        return {p.model.name: p for p in self.models}

    @cached_property
    def families(self) -> list[str]:
        """The families, in the zoo's order."""
        return list(dict.fromkeys(p.model.family for p in self.models))

    @cached_property
    def filters(self) -> list[tuple[str, list[Filter]]]:
        """(leg, the fields in which its models differ)."""
        out = []
        for leg in LEGS:
            fields = [key for key in self.models[0].choices if key.startswith(f"{leg}.")]
            found = [Filter(leg, key.partition(".")[2], self._values(key)) for key in fields]
            out.append((leg, [f for f in found if len(f.values) > 1]))
        return out

    def _values(self, key: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value for p in self.models for value in p.choices[key]))

    def below(self, name: str) -> list[Pair]:
        """What a model becomes."""
        return [p for p in self.pairs if p.parent == name]

    def above(self, name: str) -> list[Pair]:
        """What becomes it."""
        return [p for p in self.pairs if p.child == name]

    def pair(self, parent: str, child: str) -> Pair:
        """The page of the edges between two models."""
        return next(p for p in self.pairs if (p.parent, p.child) == (parent, child))

    def pages(self) -> Iterator[tuple[str, str]]:
        """(path below the folder, text) of every file."""
        look = _environment(self)
        yield "index.html", look("index.html", "")
        yield "compare.html", look("compare.html", "", links=json.dumps(self._links()))
        for n, page in enumerate(self.models):
            near = self.models[n - 1] if n else None, self.models[n + 1] if n + 1 < len(self.models) else None
            yield page.href, look("model.html", "../", page=page, near=near)
        for pair in self.pairs:
            yield pair.href, look("edge.html", "../", pair=pair)
        for name in ASSETS:
            yield name, files(__package__).joinpath(name).read_text(encoding="utf-8")

    def _links(self) -> dict[str, list[str]]:
        """The names of two models -> [the edge's name, its page], for the comparison."""
        return {f"{p.parent} {p.child}": [p.name, p.href] for p in self.pairs}


def _environment(atlas: Atlas) -> Callable[..., str]:
    """A template's text: (template, the way up to the top of the site, what it is filled with)."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from unify.models.zoo import OUTSIDE
    from unify.show import BELIEF, NOTATION, made

    made_of = Environment(
        loader=PackageLoader("unify.atlas"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made_of.globals |= {
        "atlas": atlas,
        "outside": OUTSIDE,
        "version": __version__,
        "belief_note": BELIEF,
        "notation": prose(NOTATION),
        "made": made,
        "math": math,
        "number": number,
        "words": words,
        "highlighted": highlighted,
    }
    return lambda name, top, **values: made_of.get_template(name).render(top=top, **values)


def gather(tick: Tick = _nothing) -> Atlas:
    """Derive every model, prove and measure every edge, lay out the map. tick(text, done, total): progress."""
    from unify.derivations import all_edges, map_nodes_and_edges
    from unify.models.zoo import ZOO

    models = tuple(map(Page, ZOO.values()))
    found = pairs(all_edges(), lambda text, done, total: tick(f"proving and measuring {text}", done, total))
    return Atlas(models, tuple(found), graph(*map_nodes_and_edges()))


def write(folder: str | Path, tick: Tick = _nothing) -> Atlas:
    """Write the site into a folder, which is made, empty, or holds an older atlas.

    tick(text, done, total): progress. Raises UnifyError where the folder holds anything else, or cannot be made.
    """
    folder = Path(folder)
    old = _own_files(folder)
    atlas = gather(tick)
    total = len(atlas.models) + len(atlas.pairs) + 2 + len(ASSETS)
    for n, (name, text) in enumerate(atlas.pages()):
        tick(f"writing {name}", n, total)
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnifyError(f"-o {folder}", f"it cannot be made ({error.strerror})", "name another folder") from error
        path.write_text(text, encoding="utf-8")
        old.discard(path)
    for path in old:  # pages of what is no longer in the zoo
        path.unlink()
    return atlas


def _own_files(folder: Path) -> set[Path]:
    """The files of an older atlas in the folder. Raises UnifyError where there is anything else."""
    works = "name an empty folder, a new one, or one with an older atlas"
    if folder.exists() and not folder.is_dir():
        raise UnifyError(f"-o {folder}", "it is a file", works)
    found = {path for path in folder.rglob("*") if not path.is_dir()} if folder.exists() else set()
    for path in sorted(found):
        mine = path.parent == folder and path.name in ASSETS and (folder / "index.html") in found
        if not mine and not (path.suffix == ".html" and GENERATOR in path.read_text("utf-8", errors="replace")[:2000]):
            raise UnifyError(f"-o {folder}", f"it holds {path.relative_to(folder)}, which no atlas wrote", works)
    return found
