"""The atlas: its pages are whole, say what the library says, and work in a browser where Chromium is installed.

Each checker returns a list of complaints. The site must have none, and every checker is also shown a page with a fault.
"""

import itertools
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

import pytest
from filelock import FileLock
from latex2mathml.converter import convert

from unify import UnifyError
from unify.atlas import write
from unify.atlas.edge import sentence, slug
from unify.atlas.mathml import Formula, inner, number, words
from unify.atlas.model import Page, choices
from unify.atlas.plot import plot
from unify.derivations import all_edges, map_nodes_and_edges, prove_edge
from unify.measured import measure
from unify.models.zoo import OUTSIDE, ZOO
from unify.notation import static_names
from unify.show import Stages, facts, printed_source

EDGES = all_edges()
PAIRS = {(e.parent_name, e.child_name): [] for e in EDGES}
for _edge in EDGES:
    PAIRS[_edge.parent_name, _edge.child_name].append(_edge)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The whole atlas, written once for all test processes."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if folder.name.startswith("popen-") else folder
    with FileLock(shared / "atlas.lock"):
        if not (shared / "atlas").exists():
            write(shared / "half")
            (shared / "half").rename(shared / "atlas")
    return shared / "atlas"


def edge_page(parent: str, child: str) -> str:
    return f"edges/{slug(parent)}--{slug(child)}.html"


def parsed(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def said(element: ElementTree.Element) -> str:
    """The text of an element, its spaces evened out."""
    return " ".join("".join(element.itertext()).split())


# ---- pages are whole -------------------------------------------------------------------------------------------------

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
CITED = "https://arxiv.org/abs/"


def references(root: ElementTree.Element) -> Iterator[tuple[str, bool]]:
    """Every address on a page, and whether a browser loads it without a click."""
    for x in root.iter():
        tag = x.tag.rpartition("}")[2]
        if LOADED.get(tag) in x.attrib:
            yield x.attrib[LOADED[tag]], True
        for name in ("href", "action"):
            if name in x.attrib and LOADED.get(tag) != name:
                yield x.attrib[name], False


def reference_faults(path: Path, root: ElementTree.Element, ids: dict[Path, set[str]]) -> Iterator[str]:
    for address, loaded in references(root):
        url = urlparse(address)
        if url.scheme in ("http", "https") or address.startswith("//"):
            if loaded or not address.startswith(CITED):
                yield f"{'loads' if loaded else 'links to'} {address}"
        elif url.scheme != "data":
            target = (path.parent / unquote(url.path)).resolve() if url.path else path.resolve()
            if not target.is_file():
                yield f"{address} is not there"
            elif url.fragment and url.fragment not in ids.get(target, ()):
                yield f"{address} has no such place"


def outline_faults(root: ElementTree.Element) -> Iterator[str]:
    levels = [int(x.tag[1]) for x in root.iter() if re.fullmatch("h[1-6]", x.tag)]
    if levels[:1] != [1] or levels.count(1) != 1:
        yield "has not one h1, first"
    if any(after > before + 1 for before, after in itertools.pairwise(levels)):
        yield "skips a level of headings"
    for landmark in ("header", "main", "footer"):
        if root.find(f".//{landmark}") is None:
            yield f"has no {landmark}"
    if not root.get("lang") or not root.findtext("head/title"):
        yield "has no language or no title"


def page_faults(folder: Path) -> list[str]:
    """What is wrong with the pages of a folder, read without a browser."""
    roots, faults = {}, []
    for path in sorted(folder.rglob("*.html")):
        try:
            roots[path.resolve()] = parsed(path)
        except ElementTree.ParseError as error:
            faults.append(f"{path.relative_to(folder)} is not well formed: {error}")
    named = {path: [x.attrib["id"] for x in root.iter() if "id" in x.attrib] for path, root in roots.items()}
    for path, root in roots.items():
        found = [f"has {x!r} {n} times" for x, n in Counter(named[path]).items() if n > 1]
        found += [*reference_faults(path, root, {p: set(x) for p, x in named.items()}), *outline_faults(root)]
        faults += [f"{path.relative_to(folder.resolve())} {x}" for x in found]
    for path in [*folder.glob("*.css"), *folder.glob("*.js")]:
        for found in re.findall(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(|WebSocket", path.read_text()):
            faults.append(f"{path.name} holds {found}")
    return faults


def test_pages_are_whole(site):
    assert page_faults(site) == []


WHOLE = (
    '<!DOCTYPE html>\n<html lang="en"><head><title>t</title><link rel="icon" href="data:,"/></head><body><header/>'
    '<main><h1 id="a">x</h1><h2 id="b">y</h2></main><footer/></body></html>'
)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("<h2", '<a href="gone.html">x</a><h2', "gone.html is not there"),
        ("<h2", '<a href="#gone">x</a><h2', "#gone has no such place"),
        ("<h2", '<form action="gone.html"/><h2', "gone.html is not there"),
        ("<h2", '<a href="https://example.org">x</a><h2', "links to https://example.org"),
        ("<title", '<script src="https://example.org/x.js"/><title', "loads https://example.org/x.js"),
        ("<title", '<link rel="stylesheet" href="//example.org/x"/><title', "loads //example.org/x"),
        ('id="b"', 'id="a"', "has 'a' 2 times"),
        ("h2", "h3", "skips a level"),
        ("h1", "h2", "has not one h1"),
        ("<main", "<div", "not well formed"),
        ("<footer/>", "", "has no footer"),
        (' lang="en"', "", "has no language"),
    ],
)
def test_a_faulty_page_is_seen(tmp_path, old, new, fault):
    (tmp_path / "index.html").write_text(WHOLE)
    assert page_faults(tmp_path) == []
    (tmp_path / "index.html").write_text(WHOLE.replace(old, new))
    assert any(fault in x for x in page_faults(tmp_path)), page_faults(tmp_path)


@pytest.mark.parametrize("text", ["@import 'x.css';", "a { background: url(x.png) }", "fetch('models.json')"])
def test_a_sheet_or_script_that_loads_something_is_seen(tmp_path, text):
    (tmp_path / "style.css").write_text(text)
    assert len(page_faults(tmp_path)) == 1


# ---- pages say what the library says ---------------------------------------------------------------------------------


def missing(page: str, wanted: list[str]) -> list[str]:
    return [x for x in wanted if " ".join(x.split()) not in page]


PRINTED = ("palimpsa", "mesanet", "gated_deltaproduct")  # whose source is printed again for a test


def model_faults(root: ElementTree.Element, name: str) -> list[str]:
    """What a model's page does not show, or shows otherwise than the library."""
    model, page = ZOO[name], said(root)
    stages, static = Stages(model), static_names(model.triple)
    wanted = [model.label, model.citation, str(words(model.note)) if "<" not in words(model.note) else ""]
    wanted += [text for _, text in facts(stages)]
    wanted += [f"{x.name}{x.shape}" for x in (*stages.recurrence.inputs, *stages.recurrence.states)]
    faults = missing(page, wanted)
    shown = [said(x) for x in root.iter("math")]
    for step in stages.recurrence.steps:
        text = "".join(ElementTree.fromstring(convert(step.latex(static))).itertext())
        if " ".join(text.split()) not in shown:
            faults.append(step.latex(static))
    sources = ["".join(x.itertext()).rstrip() for x in root.iter("pre")]
    if len(sources) != 2 or name in PRINTED:
        faults += [f"the {b} source" for b in ("triton", "torch") if printed_source(model.triple, b) not in sources]
    return faults


@pytest.mark.parametrize("name", ZOO)
def test_a_model_has_its_page(site, name):
    assert model_faults(parsed(site / "models" / f"{name}.html"), name) == []


def test_a_page_that_drifted_is_seen(site):
    text = (site / "models" / "palimpsa.html").read_text(encoding="utf-8")
    for old, new in (("8,192 at", "8,193 at"), ("2602.09075", "2602.09076"), ("[B, T, H, V]", "[B, T, H, K]")):
        assert old in text
        assert model_faults(ElementTree.fromstring(text.replace(old, new)), "palimpsa")
    shorter = re.sub(r"<mo>\+</mo><mrow data-term=[^>]*>(?:(?!</math>).)*</math>", "</math>", text, flags=re.S)
    assert any("k_{t,j} v_{t,i}" in x for x in model_faults(ElementTree.fromstring(shorter), "palimpsa"))
    code = re.sub(r"(?s)(<pre.*?)exp", r"\1exq", text, count=1)
    assert model_faults(ElementTree.fromstring(code), "palimpsa") == ["the triton source"]


def plain(html: str) -> str:
    return unescape(re.sub("<[^>]*>", "", html))


def edge_faults(root: ElementTree.Element, edges: list) -> list[str]:
    """What the page of the edges between two models does not say of them."""
    articles = list(root.iter("article"))
    if len(articles) != len(edges):
        return [f"{len(articles)} edges for {len(edges)}"]
    faults = []
    for article, edge in zip(articles, edges, strict=True):
        wanted = [plain(words(x)) for x in (sentence(edge.why), *edge.conditions())]
        title = article.find("h2/span")
        if title.get("class") != f"claim {edge.kind}":
            faults.append("the claim")
        faults += missing(said(article), wanted)
    return faults


def evidence_faults(root: ElementTree.Element, edges: list) -> list[str]:
    """What the page shows otherwise than the proofs and the measurements, made once more."""
    faults = []
    for article, edge in zip(root.iter("article"), edges, strict=True):
        proof, found = prove_edge(edge), measure(edge)
        rows = next(x for x in article.iter("table") if "proof" in x.get("class", "")).findall("tbody/tr")
        shown = [(x.findtext("th"), x.findtext("td")) for x in rows]
        if shown != [(x.phase, x.about) for x in proof.obligations]:
            faults.append("the obligations")
        errors = [number(x) for x in found.errors] if edge.kind == "limit" else [number(found.worst)]
        wanted = [*map(plain, errors), *([f"to the power {found.slope:.3f}"] if edge.kind == "limit" else [])]
        faults += missing(said(article), wanted)
    return faults


@pytest.mark.parametrize("ends", PAIRS, ids=lambda ends: edge_page(*ends)[6:-5])
def test_an_edge_has_its_page(site, ends):
    assert edge_faults(parsed(site / edge_page(*ends)), PAIRS[ends]) == []


@pytest.mark.parametrize("ends", [("palimpsa", "mamba2"), ("mesanet", "mamba2"), ("gla", "rodimus"), ("kdn", "kda")])
def test_an_edge_shows_its_proof_and_error(site, ends):
    assert evidence_faults(parsed(site / edge_page(*ends)), PAIRS[ends]) == []


def test_an_edge_that_drifted_is_seen(site):
    ends = ("gated_deltanet", "mamba2")
    text = (site / edge_page(*ends)).read_text(encoding="utf-8")
    error = number(measure(PAIRS[ends][0]).errors[0])
    for old, new, faults, fault in (
        (error, number(1.0), evidence_faults, "× 10"),
        ("to the power 1.", "to the power 2.", evidence_faults, "to the power"),
        ('<th scope="row">read</th>', '<th scope="row">step</th>', evidence_faults, "the obligations"),
        ("A weak write", "A strong write", edge_faults, "A weak write"),
        ("claim limit", "claim exact", edge_faults, "the claim"),
    ):
        assert old in text
        changed = ElementTree.fromstring(text.replace(old, new))
        assert any(fault in x for x in faults(changed, PAIRS[ends]))
    assert edge_faults(ElementTree.fromstring(text), PAIRS["palimpsa", "mamba2"]) == ["1 edges for 4"]


def test_the_map_holds_every_model_and_drawn_edge(site):
    root = parsed(site / "index.html")
    nodes, edges = map_nodes_and_edges()
    links = [x for x in root.iter("a") if x.get("class", "").startswith(("node", "edge"))]
    assert sorted(x.get("data-model") for x in links if x.get("data-model")) == sorted(n.name for n in nodes)
    drawn = {(x.get("data-parent"), x.get("data-child")): x for x in links if x.get("data-parent")}
    assert drawn.keys() == {(e.parent, e.child) for e in edges}
    for ends, link in drawn.items():
        assert link.get("href") == edge_page(*ends)
        exact = any(e.kind == "exact" for e in PAIRS[ends])
        assert ("exact" if exact else "limit") in link.get("class").split()
    listed = {(x.get("data-parent"), x.get("data-child")): x for x in root.iter("tr") if x.get("data-parent")}
    assert {ends: int(x.get("data-count")) for ends, x in listed.items()} == {e: len(x) for e, x in PAIRS.items()}
    assert f"{len(ZOO)} models" in said(root)
    assert f"{len(EDGES)} proved edges" in said(root)
    assert missing(said(root), [*OUTSIDE, *OUTSIDE.values()]) == []


def test_filters_are_the_fields_of_the_triple(site):
    root = parsed(site / "index.html")
    rows = {x.get("data-model"): x.get("data-choices").split() for x in root.iter("tr") if x.get("data-model")}
    for name, model in ZOO.items():
        for leg in ("architecture", "posterior", "prior"):
            chosen = getattr(model.triple, leg)
            for field in fields(chosen):
                value = getattr(chosen, field.name)
                if isinstance(value, str) and field.name != "scale":
                    assert f"{leg}.{field.name}={value}" in rows[name]
    for select in root.iter("select"):
        values = [x.text for x in select.findall("option")][1:]
        assert len(values) > 1
        assert set(values) == {v for m in ZOO.values() for v in choices(m.triple)[select.get("name")]}


# ---- its parts -------------------------------------------------------------------------------------------------------


def test_a_formula_is_its_terms():
    formula = Formula("x_{t}", ((True, "a_{j}"), (False, r"\mathrm{scale} b")))
    assert formula.latex == r"x_{t} = -a_{j} + \mathrm{scale} b"
    assert "<mi>scale</mi>" in formula.mathml()
    assert re.findall('data-term="([^"]*)"', formula.mathml(str.upper)) == ["- A_{J}", r"+ \MATHRM{SCALE} B"]
    assert inner(r"\mathrm{var}_{t}") == "<msub><mrow><mi>var</mi></mrow><mrow><mi>t</mi></mrow></msub>"


@pytest.mark.parametrize("name", ZOO)
def test_the_terms_of_a_step_are_its_latex(name):
    page = Page(ZOO[name])
    rows = [row for _, rows in page.recurrence for row in rows]
    assert [r.value.latex for r in rows] == [s.latex(page.write.static) for s in page.stages.recurrence.steps]
    assert len({r.key for r in page.rows}) == len(page.rows)


def test_the_mean_has_one_letter_in_a_comparison():
    ours, theirs = ({r.key: r for r in Page(ZOO[x]).rows} for x in ("palimpsa", "mamba2"))
    for key in ("recurrence predict mean_p", "recurrence observe mean_new"):
        assert ours[key].value != theirs[key].value
        assert ours[key].same == theirs[key].same
    assert ours["recurrence read o"].same != theirs["recurrence read o"].same


@pytest.mark.parametrize(
    ("plain", "shown"),
    [
        ("b k^2 <= eps I_p", "b k<sup>2</sup> ≤ ε I<sub>p</sub>"),
        ("o'_ti and alpha_s", "o’<sub>ti</sub> and α<sub>s</sub>"),
        ("scale sum_j |q_tj|", "scale ∑<sub>j</sub> |q<sub>tj</sub>|"),
        ("begins with eps^1", "begins with ε"),
        ("prior_precision & <b>", "prior_precision &amp; &lt;b&gt;"),
        ("alphabet", "alphabet"),
    ],
)
def test_words(plain, shown):
    assert words(plain) == shown


def test_sentences_and_numbers():
    assert sentence("b shared by the rows") == "b shared by the rows."
    assert sentence("a strong prior") == "A strong prior."
    assert number(0.00123) == "1.23 × 10<sup>−3</sup>"
    assert number(0.0) == "0"


def test_a_plot_is_to_scale():
    made = plot((1e-1, 1e-2, 1e-3), (1e-2, 1e-4, 1e-6), 2)
    (x0, y0), (x1, y1), (x2, y2) = made.points
    assert x0 - x1 == pytest.approx(x1 - x2, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert made.line == (made.points[2], made.points[0])
    assert [n for _, n in made.xs] == [-3, -2, -1]


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UnifyError, match=r"holds thesis\.tex, which no atlas wrote"):
        write(tmp_path)
    (tmp_path / "thesis.tex").rename(tmp_path / "index.html")
    with pytest.raises(UnifyError, match=r"holds index\.html"):
        write(tmp_path)
    with pytest.raises(UnifyError, match="it is a file"):
        write(tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text() == "mine"


def test_an_older_atlas_is_written_over(tmp_path, site, monkeypatch):
    from unify.atlas import site as module

    old = tmp_path / "atlas"
    shutil.copytree(site, old)
    gone = old / "models" / "gone.html"
    shutil.copy(old / "models" / "gla.html", gone)
    (old / "models" / "gla.html").write_text((old / "models" / "gla.html").read_text().replace("GLA", "ALG"))
    pages = [(str(x.relative_to(site)), x.read_text(encoding="utf-8")) for x in site.rglob("*") if x.is_file()]
    made = SimpleNamespace(models=(), pairs=(), pages=lambda: iter(pages))
    monkeypatch.setattr(module, "gather", lambda tick: made)
    write(old)
    assert not gone.exists()
    assert (old / "models" / "gla.html").read_text() == (site / "models" / "gla.html").read_text()
    assert page_faults(old) == []


def test_the_command_says_what_it_wrote(site, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    import unify.atlas
    from unify.cli import app

    made = SimpleNamespace(models=range(35), edges=100)
    monkeypatch.setattr(unify.atlas, "write", lambda folder, tick: made)
    done = CliRunner().invoke(app, ["atlas", "-o", str(tmp_path / "a b")])
    assert (
        done.stdout
        == f"{tmp_path}/a b: 35 models and 100 edges; open file://{tmp_path}/a%20b/index.html in a browser\n"
    )
