"""Every notebook runs from a clean kernel, ends in assertions that hold, and is committed without what a run leaves."""

import importlib.util
import json
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
    assert "".join(path.name[0] for path in run.committed()) in ("12346", "123456")  # the fifth is being written


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


@pytest.mark.slow
@pytest.mark.parametrize("path", run.committed(), ids=lambda path: path.stem)
def test_runs_and_its_claims_hold(path):
    notebook, seconds = run.execute(path)
    assert seconds < run.SECONDS
    assert set(run.shown(notebook)) <= run.pictures(notebook).keys()
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
