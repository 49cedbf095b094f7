"""The README's Python runs as it stands, top to bottom in one session."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def test_readme_code_runs(capsys):
    space: dict = {}
    code = blocks(README.read_text())
    assert len(code) >= 5
    for block in code:
        exec(compile(block, "README.md", "exec"), space)
    printed = capsys.readouterr().out
    assert "M_new[j, i] = M_p[j, i] + k[j]*v[i]" in printed
    assert "exactly 0" in printed
    assert "torch.Size([1, 256, 2, 32])" in printed


def test_readme_commands_exist():
    from typer.main import get_command

    from unify.cli import app

    named = set(re.findall(r"^    unify (\w+)", README.read_text(), flags=re.M))
    assert named == set(get_command(app).commands)


def test_functions_win_over_the_modules_they_are_named_after():
    import unify
    import unify.confirm  # imports unify.derive on the way

    assert callable(unify.derive)
    assert callable(unify.confirm)
    from unify import plan, structure

    assert all(map(callable, (plan, structure)))
