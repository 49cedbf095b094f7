"""The tour runs every part and leaves a report whose every link leads somewhere."""

import json
import re

import pytest

from unify.tour import NEW, spoken, tour


def links(report: str) -> list[str]:
    """The files a Markdown text points to."""
    return re.findall(r"\]\(([^)#]+)\)", report)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    said = []
    found = tour(tmp_path_factory.mktemp("tour") / "deep" / "inside", quick=True, say=said.append)
    return found, said, (found.folder / "report.md").read_text()


@pytest.mark.slow
def test_every_part_ran_and_held(run):
    found, said, report = run
    assert found.good
    for title in ("The map", "The proofs", "A new model", "Recall on real text", "How this was made"):
        assert f"\n## {title}\n" in report
    assert sum(line.startswith("[green]✓") for line in said) == 4
    assert found.found["models"] > 30
    assert found.found["proved"] == found.found["edges"] >= 12


@pytest.mark.slow
def test_the_report_hangs_together(run):
    found, _, report = run
    targets = links(report)
    assert {"map.svg", "map.png", "recall.png", "recall.json", "homing_delta.tex"} <= set(targets)
    assert [name for name in targets if not (found.folder / name).is_file()] == []
    assert sorted(x.name for x in found.folder.iterdir()) == sorted(set(found.files))
    assert json.loads((found.folder / "recall.json").read_text())["models"]
    assert all(sentence in report for sentence in spoken(found))
    assert NEW in report
    assert "S̃ⱼᵢ  =  (αⱼ (Λ₀ⱼ + Īⱼ) Sⱼᵢ + (1 − αⱼ) Λ₀ⱼ μ₀ⱼᵢ) / (Λ₀ⱼ + Ĩⱼ)" in report
    assert "proved for all K and V" in report


@pytest.mark.slow
def test_tables_have_as_many_cells_in_every_row(run):
    for block in re.findall(r"(?:^\|.*\|\n?)+", run[2], flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.strip().splitlines()}) == 1


def test_links_are_found():
    assert links("![a](b.svg) and [c](d/e.md), not (this)") == ["b.svg", "d/e.md"]


def test_the_declaration_is_ten_lines_that_fit():
    assert len(NEW.splitlines()) <= 10
    assert max(map(len, NEW.splitlines())) <= 98


@pytest.mark.slow
def test_a_failed_proof_is_told(tmp_path, monkeypatch):
    from unify import tour as module
    from unify.errors import UnifyError

    def fails(edge):
        raise UnifyError("an edge", "does not hold", "mend it")

    monkeypatch.setattr("unify.derivations.prove_edge", fails)
    found = module.Tour(tmp_path, True, module._nothing, module._nothing)
    module._proofs(found)
    assert not found.good
    assert "**failed**" in found.sections[0]
    assert "an edge: does not hold; mend it" in found.sections[0]
