"""The README's Python runs as it stands, top to bottom in one session."""

import json
import re
from pathlib import Path

import pytest

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
