"""The README's Python runs as it stands, top to bottom in one session."""

import json
import re
from pathlib import Path

import pytest

from unify.notation import MEANING

README = Path(__file__).parent.parent / "README.md"


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def test_readme_code_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves a model
    space: dict = {}
    code = blocks(README.read_text())
    assert len(code) >= 5
    for block in code:
        exec(compile(block, "README.md", "exec"), space)
    printed = capsys.readouterr().out
    assert "M_new[j, i] = M_p[j, i] + k[j]*v[i]" in printed
    assert "exactly 0" in printed
    assert "torch.Size([1, 256, 2, 32])" in printed
    assert "2 mixers with a diagonal importance" in printed


def test_readme_commands_exist():
    from typer.main import get_command

    from unify.cli import app

    named = set(re.findall(r"^    unify (\w+)", README.read_text(), flags=re.M))
    assert named == set(get_command(app).commands)


RECORD = README.parent / "benchmarks" / "h200.json"


def up_to_date(page: str, record: Path) -> None:
    """Fail unless the page's section on speed is what `unify bench --table` makes of the record."""
    from unify.race import load
    from unify.standings import written

    assert written(page, load(record)) == page, "unify bench --table benchmarks/h200.json -o README.md"


def test_readme_speed_is_the_committed_record():
    up_to_date(README.read_text(), RECORD)


def test_a_speed_that_nobody_measured_is_seen(tmp_path):
    from unify.standings import END

    with pytest.raises(AssertionError, match="unify bench --table"):
        up_to_date(README.read_text().replace(END, f"Palimpsa 0.1 ms\n{END}"), RECORD)
    other = tmp_path / "record.json"
    run = {"gpu": "G", "torch": "0", "date": "2026-01-01", "command": "unify bench"}
    other.write_text(json.dumps({"runs": [run], "results": {"table/gla/1/both": {"run": 0, "ms": 1.0}}}))
    with pytest.raises(AssertionError, match="unify bench --table"):
        up_to_date(README.read_text(), other)


def test_functions_win_over_the_modules_they_are_named_after():
    import unify
    import unify.confirm  # imports unify.derive on the way

    assert callable(unify.derive)
    assert callable(unify.confirm)
    from unify import plan, structure

    assert all(map(callable, (plan, structure)))


def symbols(page: str) -> dict[str, str]:
    """The rows of the section Symbols: what is defined -> the names of arguments and states beside it."""
    section = page.partition("\n## Symbols\n")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:3] for row in re.findall(r"^\|.*\|$", section, flags=re.M)][2:]
    return {symbol.strip(): names for symbol, names in rows}


def glossary_faults(page: str) -> list[str]:
    """Arguments and states of the library that the page does not define, symbols defined twice, and use before definition."""
    from unify.notation import glossary

    rows = symbols(page)
    defined = [x for row in rows for x in re.split(r", ", row)]
    named = " ".join(rows.values())
    faults = [f"{x} is not defined" for _, x, _ in glossary() if x not in defined]
    faults += [f"{x} is defined twice" for x in set(defined) if defined.count(x) > 1]
    faults += [f"`{x}` stands beside no symbol" for x in MEANING if f"`{x}`" not in named]
    return faults + (["code comes before the symbols"] if page.find("```python") < page.find("## Symbols") else [])


def test_every_symbol_is_defined_once_before_the_first_code():
    assert glossary_faults(README.read_text()) == []


def test_a_symbol_without_a_definition_is_seen():
    page = README.read_text()
    row = next(x for x in page.splitlines() if x.startswith("| κ |"))
    assert glossary_faults(page.replace(row + "\n", "")) == ["κ is not defined", "`gain` stands beside no symbol"]
    assert glossary_faults(page.replace(row, f"{row}\n{row.replace('| κ', '| κ, κ')}"))[0] == "κ is defined twice"
    assert glossary_faults("```python\n```\n" + page) == ["code comes before the symbols"]


def test_the_notebooks_are_linked():
    linked = re.findall(r"\]\((notebooks/[0-9][^)]+)\)", README.read_text())
    assert sorted(linked) == sorted(
        f"notebooks/{path.name}" for path in (README.parent / "notebooks").glob("[0-9]*.ipynb")
    )
