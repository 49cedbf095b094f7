"""Every notebook runs from a clean kernel, ends in assertions that hold, and is committed without what a run leaves."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def load():
    spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load()


def plant(folder: Path, *code: str, **fields) -> Path:
    """A notebook of these cells."""
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [new_code_cell(text, id=f"cell-{n}") for n, text in enumerate(code)]
    made = run.stripped(new_notebook(cells=cells))
    for name, value in fields.items():
        made.cells[0][name] = run.nbformat.from_dict(value)
    path = folder / "1_planted.ipynb"
    path.write_text(run.written(made))
    return path


def test_they_are_numbered():
    assert "".join(path.name[0] for path in run.committed()) == "123456"


@pytest.mark.parametrize("path", run.committed(), ids=lambda path: path.stem)
def test_committed_as_a_person_wrote_it(path):
    assert run.faults(path) == []


def test_what_a_run_leaves_is_seen(tmp_path):
    assert run.faults(plant(tmp_path, "assert True")) == []
    assert run.faults(plant(tmp_path, "assert True", execution_count=3)) == [
        "1_planted.ipynb is not stripped: make format"
    ]
    assert run.faults(plant(tmp_path, "assert True", metadata={"scrolled": True})) != []
    output = {"output_type": "stream", "name": "stdout", "text": "hello"}
    assert run.faults(plant(tmp_path, "assert True", outputs=[output])) != []
    assert run.faults(plant(tmp_path, "assert 1", "x = 2")) == ["1_planted.ipynb does not end in an assertion"]


def test_stripping_keeps_what_a_person_wrote(tmp_path):
    path = plant(tmp_path, "x = 1", "assert x == 1", execution_count=3)
    notebook = run.stripped(run.nbformat.read(path, as_version=4))
    assert [(cell.id, cell.source) for cell in notebook.cells] == [("cell-0", "x = 1"), ("cell-1", "assert x == 1")]
    assert json.loads(run.written(notebook))["cells"][0]["execution_count"] is None
    assert run.written(run.stripped(notebook)) == run.written(notebook)


SYMBOL = re.compile(r"\\(?:mathrm|check|bar|hat)\s*\{[^}]*\}|\\(?:bar|hat)\s*\w|\\[A-Za-z]+|[A-Za-z]")
WORDS = (
    r"\displaystyle \begin \end \frac \sum \left \right \quad \log \partial \text \Rightarrow \ge \tilde \mathrm{diag} "
    r"\mathrm{Id} \mathrm{KL} \mathcal \mathbb"
).split()


def symbols(latex: str) -> set[str]:
    """The letters of a formula, with their marks; a tilde does not make another symbol."""
    bare = re.sub(r"\\text\{[^}]*\}|\\(?:begin|end)\{\w+\}|\\\\\[\w+\]", " ", latex)
    found = {re.sub(r"\\(bar|hat)\s*\{?(\w+)\}?", r"\\\1{\2}", x) for x in SYMBOL.findall(bare)}
    return found - set(WORDS)


def undefined(notebook) -> list[str]:
    """Symbols in displayed formulas that no text before them mentions: "cell: symbol"."""
    said, faults = set(), []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            said |= {
                x
                for part in re.findall(r"\$(.+?)\$", cell.source.replace("$$", "$"), flags=re.S)
                for x in symbols(part)
            }
            said |= {rf"\mathrm{{{word}}}" for word in re.findall(r"\w+", cell.source)}
        for data in (out.get("data", {}) for out in cell.get("outputs", ())):
            if "text/markdown" in data:
                said |= {x for part in re.findall(r"\| \$(.+?)\$ \|", data["text/markdown"]) for x in symbols(part)}
            elif data.get("text/latex", "").startswith("$"):
                faults += [f"{cell.id}: {x}" for x in sorted(symbols(data["text/latex"]) - said)]
    return faults


def test_a_symbol_that_nobody_introduced_is_seen():
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    def found(text):
        formula = new_output(
            "display_data", {"text/latex": r"$\displaystyle \frac{\tilde{S}_{j}}{\Lambda_{0} + \bar{I}}$"}
        )
        cells = [new_markdown_cell(text, id="said"), new_code_cell("1", id="shown", outputs=[formula])]
        return undefined(new_notebook(cells=cells))

    assert found(r"$S_j$ is the memory, $\Lambda_0$ its precision, $\bar I$ what was gathered") == []
    assert found(r"$S_j$ is the memory, $\bar I$ what was gathered") == [r"shown: \Lambda"]
    assert found(r"$S$ is the memory, $\Lambda_0$ its precision, $I$ another") == [r"shown: \bar{I}", "shown: j"]


@pytest.mark.slow
@pytest.mark.parametrize("path", run.committed(), ids=lambda path: path.stem)
def test_runs_and_its_claims_hold(path):
    notebook, seconds = run.execute(path)
    assert seconds < run.SECONDS
    assert set(run.shown(notebook)) <= run.pictures(notebook).keys()
    assert undefined(notebook) == []
    with_sliders = [
        cell.id for cell in notebook.cells if cell.cell_type == "code" and "\nsliders(" in "\n" + cell.source
    ]
    shown = {cell.id for cell in notebook.cells for out in cell.get("outputs", ()) if len(out.get("data", {})) > 1}
    assert set(with_sliders) <= shown  # a plain output stands above the controls


@pytest.mark.parametrize("path", run.committed(), ids=lambda path: path.stem)
def test_who_has_no_kernel_sees_a_picture_too(path):
    names = run.shown(run.nbformat.read(path, as_version=4))
    assert names
    assert [name for name in names if not (FOLDER / "pictures" / f"{name}.png").exists()] == []


def test_pictures_are_found_by_their_cell():
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    png = new_output("display_data", {"image/png": "aGVsbG8=", "text/plain": "a picture"})
    cells = [new_markdown_cell("![what it shows](pictures/second.png) and [no picture](other.png)", id="prose")]
    cells += [new_code_cell("1", id="first"), new_code_cell("2", id="second", outputs=[png])]
    assert run.shown(new_notebook(cells=cells)) == ["second"]
    assert run.pictures(new_notebook(cells=cells)) == {"second": b"hello"}


@pytest.mark.slow
def test_a_false_claim_is_seen_and_the_kernel_is_this_interpreter(tmp_path):
    from nbclient.exceptions import CellExecutionError

    notebook, _ = run.execute(plant(tmp_path, "import sys; print(sys.executable)", "assert True"))
    assert notebook.cells[0].outputs[0].text.strip() == sys.executable
    with pytest.raises(CellExecutionError, match="AssertionError"):
        run.execute(plant(tmp_path, "assert 1 == 2"))


@pytest.mark.slow
def test_a_slider_redraws_its_picture_in_a_kernel(tmp_path):
    draw = "def draw(x):\n    figure, axes = canvas()\n    axes.plot([0, x])\n    return figure\n"
    show = f"from unify.plots import Slider, canvas, sliders\n\n{draw}\ncontrol = sliders(draw, x=Slider(1.0, 0.0, 3.0))\ncontrol"
    still, _ = run.execute(plant(tmp_path, show, "assert True"))
    moved, _ = run.execute(plant(tmp_path, show, "control.widgets['x'].value = 2.0", "assert True"))
    for notebook, text in ((still, "x = 1.0"), (moved, "x = 2.0")):
        assert notebook.cells[0].outputs[0].data["text/plain"] == text
    assert run.pictures(still)["cell-0"] != run.pictures(moved)["cell-0"]
