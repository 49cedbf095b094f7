"""Run the notebooks, or take out of them what a run leaves behind.

python notebooks/run.py              execute each into notebooks/executed/, pictures and all (make notebooks)
python notebooks/run.py 2            the second one only
python notebooks/run.py --pictures   execute each, and renew the committed pictures: pictures/NAME.png is what cell NAME shows
python notebooks/run.py --strip      outputs, counts and this machine's metadata go; cells keep their ids (make format)
"""

import os
import re
import sys
import time
from base64 import b64decode
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).resolve().parent
SECONDS = 120  # one notebook on two cores
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def committed(folder: Path = HERE) -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted(folder.glob("[0-9]*.ipynb"))


def stripped(notebook: NotebookNode) -> NotebookNode:
    """A copy that says only what a person wrote: no outputs, no counts, metadata that is the same on every machine."""
    cells = []
    for cell in notebook.cells:
        new = new_code_cell if cell.cell_type == "code" else new_markdown_cell
        cells.append(new(cell.source, id=cell.id))
    return new_notebook(cells=cells, metadata={"kernelspec": KERNEL, "language_info": {"name": "python"}})


def written(notebook: NotebookNode) -> str:
    """The file's text: one line of source a line, one space of indent."""
    return nbformat.writes(notebook, indent=1).rstrip() + "\n"


def faults(path: Path) -> list[str]:
    """What is wrong with a committed notebook: left outputs, or an end without an assertion."""
    text = path.read_text()
    notebook = nbformat.reads(text, as_version=4)
    found = [] if written(stripped(notebook)) == text else [f"{path.name} is not stripped: make format"]
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    if not code or "assert" not in code[-1]:
        found.append(f"{path.name} does not end in an assertion")
    return found


def shown(notebook: NotebookNode) -> list[str]:
    """The cells whose pictures stand, committed, in the text: NAME of each pictures/NAME.png."""
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return re.findall(r"\]\(pictures/([\w-]+)\.png\)", "\n".join(prose))


def pictures(notebook: NotebookNode) -> dict[str, bytes]:
    """The first PNG that each cell of an executed notebook shows as an output of its own, by the cell's id."""
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                found.setdefault(cell.id, b64decode(output.data["image/png"]))
    return found


def execute(path: Path) -> tuple[NotebookNode, float]:
    """The notebook with its outputs, and the seconds that took. Raises nbclient's CellExecutionError.

    The kernel is the interpreter that runs this, whatever kernels are installed on the machine.
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class Here(AsyncKernelManager):
        def __init__(self, **options):
            super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **options)

    notebook = nbformat.read(path, as_version=4)
    options = {"kernel_manager_class": Here, "kernel_name": "python3", "timeout": SECONDS}
    client = NotebookClient(
        notebook,
        **options,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    start = time.perf_counter()
    client.execute()
    return notebook, time.perf_counter() - start


def main(arguments: list[str]) -> None:
    """Strip in place, or execute into a folder that git ignores; renew the committed pictures where asked to."""
    paths = [
        path for path in committed() if not (names := [x for x in arguments if x[0] != "-"]) or path.name[0] in names
    ]
    for path in paths:
        if "--strip" in arguments:
            path.write_text(written(stripped(nbformat.read(path, as_version=4))))
            continue
        notebook, seconds = execute(path)
        out = HERE / "executed" / path.name
        out.parent.mkdir(exist_ok=True)
        out.write_text(written(notebook))
        print(f"{seconds:5.1f} s  {out.relative_to(HERE.parent)}")
        for name in shown(notebook) if "--pictures" in arguments else ():
            (HERE / "pictures").mkdir(exist_ok=True)
            (HERE / "pictures" / f"{name}.png").write_bytes(pictures(notebook)[name])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main(sys.argv[1:])
