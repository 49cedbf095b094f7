"""The project itself: what is packaged, who may import whom, how fast, and what must not stand in a file.

Each checker is a function from a folder to a list of complaints. The house must have none, and every checker is
also shown a house with a fault in it.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGE_DIR = SETUPTOOLS["package-dir"]


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Every Python file of the distribution, with the folder it is below: ("unify", <root>/unify/lower/torch.py)."""
    for folder in PACKAGE_DIR.values():
        for path in sorted((root / folder).rglob("*.py")):
            yield folder, path


def dotted(root: Path, folder: str, path: Path) -> str:
    """The name under which a file is imported: models/zoo.py -> unify.models.zoo; a package ends in its folder."""
    prefix = next(name for name, place in PACKAGE_DIR.items() if place == folder)
    inner = path.relative_to(root / folder).with_suffix("").parts
    return ".".join([prefix, *inner]).removesuffix(".__init__")


def plant(root: Path, **files: str) -> Path:
    """Write files given as models__zoo="text", so that a checker can be shown a fault."""
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# ---- packages ----------------------------------------------------------------------------------------------------


def packaging_faults(root: Path, declared: list[str]) -> list[str]:
    """Folders with Python files in them that are not declared as packages, not packages at all, or gone."""
    homes = {path.parent: folder for folder, path in sources(root)}
    names = {dotted(root, folder, home / "__init__.py"): home for home, folder in homes.items()}
    faults = [f"{name} is not in pyproject's packages" for name in names if name not in declared]
    faults += [f"{name} has no __init__.py" for name, home in names.items() if not (home / "__init__.py").exists()]
    return faults + [f"{name} is declared and has no folder" for name in declared if name not in names]


def test_packages_are_the_folders():
    assert packaging_faults(ROOT, SETUPTOOLS["packages"]) == []


def test_packaging_faults_are_seen(tmp_path):
    (tmp_path / "models" / "new").mkdir(parents=True)
    (tmp_path / "models" / "new" / "__init__.py").touch()
    (tmp_path / "models" / "zoo.py").touch()
    assert packaging_faults(tmp_path, ["unify.kernels"]) == [
        "unify.models.new is not in pyproject's packages",
        "unify.models is not in pyproject's packages",
        "unify.models has no __init__.py",
        "unify.kernels is declared and has no folder",
    ]


@pytest.mark.slow
def test_wheel_is_complete_and_imports_from_elsewhere(tmp_path):
    # From a copy, because setuptools builds inside the tree and would also pack what an earlier build left there.
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in PACKAGE_DIR.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        wheel.extractall(site)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"unify", "unify_attention"}
    pages = {
        f"unify/atlas/{name}" for name in ("style.css", "script.js", "templates/base.html", "templates/model.html")
    }
    assert {"unify/py.typed"} | pages <= set(names)

    packages = SETUPTOOLS["packages"]
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    code += "".join(f"import {name}; print({name}.__file__)\n" for name in packages)
    files = python(code, cwd=tmp_path).splitlines()
    assert len(files) == len(packages)
    assert all(Path(file).is_relative_to(site) for file in files), files


# ---- imports -----------------------------------------------------------------------------------------------------

BEFORE_PLAN = {f"unify/{stage}.py" for stage in ("triple", "energy", "recurrence", "derive", "structure", "plan")}
# What `import unify` must do without: the layers above it, what only a GPU has, and what only an extra brings.
LAZY_IN_UNIFY = ("unify.kernels", "unify.models", "unify.derivations", "triton", "hypothesis", "pytest")


def imports(tree: ast.Module, package: str) -> Iterator[tuple[str, bool, int]]:
    """Each import as (full name, inside a function?, line); `from a import b` is a.b, and dots are resolved."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                base = ".".join([*above, *filter(None, [child.module])])
                yield from ((f"{base}.{alias.name}", inside, child.lineno) for alias in child.names)
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("import_module", "__import__")):
                name = child.args[0] if child.args else None
                if isinstance(name, ast.Constant):
                    yield name.value, inside, child.lineno
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            later |= isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"  # never runs
            yield from visit(child, inside or later)

    return visit(tree, False)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def broken_rule(place: str, module: str, inside: bool) -> str | None:
    """The rule that file `place` breaks by importing `module`, or None."""
    folder = place.split("/")[0]
    top = module.split(".")[0]
    if within(module, "tests", "notebooks"):
        return "nothing imports tests or notebooks"
    if within(module, "models", "kernels", "derivations"):
        return f"say unify.{module}"
    if folder == "kernels" and top not in {*sys.stdlib_module_names, "torch", "triton"}:
        return None if within(module, "unify.kernels") else "kernels import the standard library, torch and triton only"
    if folder == "derivations" and within(module, "torch", "triton"):
        return "derivations never import torch"
    if place in BEFORE_PLAN and within(module, "torch", "triton"):
        return "nothing up to Plan knows torch"
    if folder == "unify" and not inside and within(module, *LAZY_IN_UNIFY):
        return "unify imports this only inside a function"
    return None


def import_faults(root: Path) -> list[str]:
    faults = []
    for folder, path in sources(root):
        place = path.relative_to(root).as_posix()
        name = dotted(root, folder, path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for module, inside, line in imports(ast.parse(path.read_text()), package):
            if rule := broken_rule(place, module, inside):
                faults.append(f"{place}:{line} imports {module}: {rule}")
    return faults


def test_imports_go_one_way():
    assert import_faults(ROOT) == []


@pytest.mark.parametrize(
    ("place", "text", "rule"),
    [
        ("kernels/scan", "from unify.plan import Plan", "kernels import"),
        ("kernels/scan", "def f():\n    import sympy", "kernels import"),
        ("kernels/scan", "from ..plan import Plan", "kernels import"),
        ("unify/op", "from unify import kernels", "only inside a function"),
        ("unify/op", "from .models.zoo import PALIMPSA", "only inside a function"),
        ("unify/lower/torch", "from ..derivations import edges", "only inside a function"),
        ("unify/cli", "if True:\n    import unify.derivations.edges", "only inside a function"),
        ("unify/plan", "def f():\n    from torch import nn", "knows torch"),
        ("unify/triple", "def f():\n    __import__('torch')", "knows torch"),
        ("derivations/edges", "def f():\n    import torch.nn", "derivations never"),
        ("derivations/edges", "import importlib\nimportlib.import_module('torch')", "derivations never"),
        ("models/zoo", "def f():\n    from tests import conftest", "nothing imports tests"),
        ("models/zoo", "import notebooks.tour", "nothing imports tests"),
        ("unify/op", "def f():\n    from models import zoo", "say unify.models"),
    ],
)
def test_import_faults_are_seen(tmp_path, place, text, rule):
    (fault,) = import_faults(plant(tmp_path, **{place.replace("/", "__"): text}))
    assert rule in fault


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("kernels/scan", "from __future__ import annotations\nimport math\nimport torch\nimport triton.language as tl"),
        ("kernels/scan", "from unify.kernels.launch import run\nfrom .launch import run\nfrom . import launch"),
        ("unify/op", "import torch\ndef f():\n    from unify.kernels import scan\n    from unify.models import zoo"),
        ("derivations/edges", "import sympy\nfrom unify.models.zoo import PALIMPSA"),
        ("unify/show", "if TYPE_CHECKING:\n    from .models.zoo import Model"),
        ("models/layer", "import torch\nfrom unify.op import compile\nfrom . import zoo"),
        ("unify/triple", "import torchless\nfrom testsuite import x"),
    ],
)
def test_allowed_imports_are_allowed(tmp_path, place, text):
    assert import_faults(plant(tmp_path, **{place.replace("/", "__"): text})) == []


def python(code: str, cwd: Path) -> str:
    """Run code in a fresh isolated interpreter, away from the repository and its folders."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_unify_is_quick_and_light(tmp_path):
    code = (
        "import sys, time; start = time.perf_counter(); import unify; print(time.perf_counter() - start);"
        "print([name for name in ('torch', 'triton', 'sympy') if name in sys.modules])"
    )
    runs = [python(code, tmp_path).split(maxsplit=1) for _ in range(3)]
    assert {heavy.strip() for _, heavy in runs} == {"[]"}
    assert min(float(seconds) for seconds, _ in runs) < 0.5


@pytest.mark.slow
def test_derivations_and_early_stages_leave_torch_alone(tmp_path):
    # The checker above reads each file alone; this follows the imports they cause.
    names = [
        dotted(ROOT, folder, path)
        for folder, path in sources(ROOT)
        if folder == "derivations" or path.relative_to(ROOT).as_posix() in BEFORE_PLAN
    ]
    names = [name for name in names if not name.endswith("__main__")]
    code = "import sys\n" + "".join(f"import {name}\nprint({name!r}, 'torch' in sys.modules)\n" for name in names)
    assert [line for line in python(code, tmp_path).splitlines() if line.endswith("True")] == []


# ---- what must not stand in a file -------------------------------------------------------------------------------

# Put together from pieces, so that this file does not match itself.
PLACES = re.compile(
    "|".join(
        [
            r"(?<![\w.>-])/(?:" + "|".join(["wo" + "rk", "ro" + "ot", "op" + "t", "Us" + "ers", "ho" + "me"]) + r")/\w",
            r"\b[A-Z]:" + r"\\Us" + r"ers\\",
            r"\.\./sha" + "red",
            r"\b(?:[\w-]+\.)*(?:py" + r"pi\.org|python" + r"hosted\.org|py" + r"torch\.org/whl|npm" + r"js\.org)",
            r"\b(?:[\w-]+\.)*(?:ana" + r"conda\.org|deb" + r"ian\.org|crates\." + r"io|proxy\.gol" + r"ang\.org)",
        ]
    )
)


def written_files(root: Path) -> list[Path]:
    """The files git tracks or would track; outside a checkout, those of the folders and the top that are ours."""
    listing = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, capture_output=True, text=True) if shutil.which("git") else None
    if done is not None and done.returncode == 0:
        paths = [root / name for name in done.stdout.split("\0") if name]
    else:
        below = [root / folder for folder in (*PACKAGE_DIR.values(), "tests", "notebooks", ".ci")]
        paths = [*root.glob("*"), *(path for folder in below for path in folder.rglob("*"))]
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


def place_faults(root: Path) -> list[str]:
    faults = []
    for path in written_files(root):
        data = path.read_bytes()
        if b"\0" in data:  # binary
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if found := PLACES.search(line):
                faults.append(f"{path.relative_to(root)}:{number} names {found[0]}")
    return faults


def test_no_file_names_a_machine():
    assert place_faults(ROOT) == []


@pytest.mark.parametrize(
    "text",
    [
        'x = "/ho' + 'me/ada/unify"',
        "see /wo" + "rk/main",
        "file:///op" + "t/wheels",
        "../sha" + "red/theory.md",
        "pip install --index-url https://test.py" + "pi.org/simple",
        "https://files.python" + "hosted.org/packages",
    ],
)
def test_place_faults_are_seen(tmp_path, text):
    (fault,) = place_faults(plant(tmp_path, notebooks__tour=f"fine\n{text}\n"))
    assert "tour.py:2" in fault


@pytest.mark.parametrize(
    "text",
    ["a/wo" + "rk/b", "https://example.org/ho" + "me/page", "q/ro" + "ot/n", "models/ho" + "me/x", "1/op" + "t/2"],
)
def test_ordinary_text_is_no_place(text):
    assert not PLACES.search(text)


# ---- a function fits a screen ------------------------------------------------------------------------------------

SCREEN = 60


KERNEL = 2 * SCREEN  # a kernel is one launch: its tiles live in one scope, so it may fill two screens


def is_kernel(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)


def long_functions(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root).as_posix()}:{node.lineno} {node.name} has {length} lines"
        for _, path in sources(root)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > (KERNEL if is_kernel(node) else SCREEN)
    ]


def test_functions_fit_a_screen():
    assert long_functions(ROOT) == []


def test_long_functions_are_seen(tmp_path):
    fits = "def fits():\n" + "    x = 1\n" * (SCREEN - 1)
    long = "class C:\n    @property\n    def long(self):\n" + "        x = 1\n" * SCREEN
    assert long_functions(plant(tmp_path, unify__lower__torch=fits + long)) == [
        f"unify/lower/torch.py:{SCREEN + 3} long has {SCREEN + 1} lines"
    ]
