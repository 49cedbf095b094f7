"""The command line as its user sees it: pages that fit, JSON that parses, mistakes in one sentence."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from unify import __version__, bench
from unify.cli import app
from unify.derivations import all_edges
from unify.derive import derive
from unify.models.zoo import OUTSIDE, ZOO

WIDTH = 100


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """A terminal of 100 cells without colours."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")


def unify(*arguments: str, code: int = 0) -> str:
    """Run a command; what it prints on stdout."""
    result = CliRunner().invoke(app, [str(x) for x in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def complaint(*arguments: str) -> str:
    """Run a command that must be refused; its sentence."""
    result = CliRunner().invoke(app, [str(x) for x in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("unify: ")
    return line


def too_wide(text: str) -> list[str]:
    return [line for line in text.splitlines() if cell_len(line.rstrip()) > WIDTH]


def flat(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


def test_too_wide_sees_a_wide_line():
    assert too_wide("x" * WIDTH + "\n" + "S̃" * WIDTH) == []
    assert too_wide("ok\n" + "x" * (WIDTH + 1)) == ["x" * (WIDTH + 1)]


# --- help, list, show -------------------------------------------------------------------------------------------------


def test_help_and_version():
    page = unify()
    assert page == unify("--help")
    assert all(name in page for name in "list show prove verify map atlas recall bench tour".split())
    assert too_wide(page) == []
    assert unify("--version") == f"unify {__version__}\n"


def test_help_loads_nothing_heavy():
    code = "import sys, unify.cli; print([x for x in ('torch', 'sympy', 'numpy', 'matplotlib') if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_list():
    page = unify("list")
    assert too_wide(page) == []
    for model in ZOO.values():
        assert f"\n{model.name} " in page
        assert f"{model.label}: {model.citation}" in page
    assert all(name in page and why in flat(page) for name, why in OUTSIDE.items())
    assert "recurrent" in page


def test_list_of_a_family():
    page = unify("list", "--family", "Metaplastic")
    assert "meta_kda" in page
    assert "\ngla " not in page
    assert "outside" not in page


def test_list_as_json():
    found = json.loads(unify("list", "--json"))
    assert [x["name"] for x in found["models"]] == list(ZOO)
    palimpsa = next(x for x in found["models"] if x["name"] == "palimpsa")
    assert (palimpsa["plan"], palimpsa["state_floats"]) == ("elementwise", "2*K*V")
    assert palimpsa["triple"]["posterior"]["curvature"] == "diagonal"
    assert found["outside"] == OUTSIDE


@pytest.mark.parametrize("name", ZOO)
def test_show_fits_and_says_where_it_is_from(name):
    page = unify("show", name)
    assert too_wide(page) == []
    assert ZOO[name].citation in flat(page)
    assert ZOO[name].note in flat(page)
    for word in ("Triple", "Free energy", "Recurrence", "Structure and plan", "forgetting", "because", "multiply-adds"):
        assert word in page
    assert "oᵢ  =" in page
    for program_name in ("_new", "_p[", "sum_"):
        assert program_name not in page


@pytest.mark.parametrize("name", ["palimpsa", "rwkv7", "gated_deltanet2", "kdn", "preconditioned_gdn"])
def test_every_symbol_of_the_equations_is_explained(name):
    from unify.show import equations, legend, made

    recurrence = derive(ZOO[name].triple)
    said = made(recurrence) + "".join(symbol for symbol, *_ in legend(recurrence)) + "scale δ"
    for _, left, right in equations(recurrence):
        for letter in left + right:
            plain = {"Ĩ": "Ī", "Ã": "A"}.get(letter, letter)
            assert not plain.isalpha() or plain in said + "explogdiagId" + "ₗ", (letter, left, right)


def test_show_palimpsa():
    page = unify("show", "palimpsa", "--source")
    for row in ("Ī′ⱼᵢ  =  Ĩⱼᵢ + bᵢ kⱼ²", "M̃ⱼᵢ  =  α Mⱼᵢ", "oᵢ  =  scale ∑ⱼ qⱼ M′ⱼᵢ / (Λ₀ + Ī′ⱼᵢ)", "2KV floats"):
        assert row in page
    assert "def step(q, k, v, g, importance, prior_precision, M, Ibar" in page
    assert "def step" not in unify("show", "palimpsa")
    page = unify("show", "palimpsa", "--kernel")
    assert "def step_adjoint(" in page
    assert "M_new = M_p + k[:, None] * v[None, :]" in page


@pytest.mark.parametrize("name", ["palimpsa", "mesanet", "gated_deltaproduct", "kla"])
def test_show_as_latex(name):
    page = unify("show", name, "--latex")
    assert page.count("{") == page.count("}")
    for environment in ("aligned", "description"):
        assert page.count(rf"\begin{{{environment}}}") == page.count(rf"\end{{{environment}}}") > 0
    assert page.isascii()
    assert ZOO[name].citation in page


@pytest.mark.parametrize("name", ZOO)
def test_no_latex_page_has_a_letter_latex_lacks(name):
    from unify.show import document

    assert [x for x in document(ZOO[name]) if not x.isascii()] == []


def test_show_as_json():
    found = json.loads(unify("show", "meta_gdn", "--json"))
    assert found["recurrence"]["steps"][-2]["unicode"] == "oᵢ = scale ∑ⱼ qⱼ S′ⱼᵢ"
    assert "def step" in found["source"]
    assert found["plan"] == "rank one"


# --- prove, verify, map -----------------------------------------------------------------------------------------------


def test_prove_lists_the_map():
    page = unify("prove")
    assert too_wide(page) == []
    assert f"{len(all_edges())} edges" in page
    found = json.loads(unify("prove", "--json"))
    assert {(x["parent"], x["child"]) for x in found} == {(e.parent_name, e.child_name) for e in all_edges()}


def test_prove_a_path():
    page = unify("prove", "meta_kda", "linear_attention")
    assert too_wide(page) == []
    assert "meta_kda → meta_gdn" in page
    assert "each reduced to 0, for all K and V" in page
    assert "β   =  ε Λ₀" in page
    found = json.loads(unify("prove", "gla", "mamba2", "--json"))
    assert [x["verdict"] for x in found["edges"]] == ["proved"]
    tex = unify("prove", "gla", "mamba2", "--latex")
    assert tex.count("{") == tex.count("}")
    assert tex.isascii()


def test_prove_tells_the_other_ways_and_the_theorem():
    page = unify("prove", "palimpsa", "mamba2")
    assert too_wide(page) == []
    assert "a strong prior" in page
    assert "Theorem: forgetting dominates" in page


def test_prove_all_and_a_planted_failure(monkeypatch):
    some = all_edges()[:3]
    monkeypatch.setattr("unify.derivations.all_edges", lambda: some)
    page = unify("prove", "--all")
    assert too_wide(page) == []
    assert "3 of 3 edges proved" in page
    wrong = replace(some[0], substitution={"v": 2 * some[0].arguments()["v"]})
    monkeypatch.setattr("unify.derivations.all_edges", lambda: (*some, wrong))
    page = unify("prove", "--all", code=1)
    assert "3 of 4 edges proved" in page
    assert f"✗ {wrong.parent_name} → {wrong.child_name}" in page
    found = json.loads(unify("prove", "--all", "--json", code=1))
    assert [x["verdict"] for x in found] == ["proved"] * 3 + ["failed"]
    assert "difference" in found[-1]["error"]


def test_verify_and_a_planted_failure(monkeypatch):
    page = unify("verify", "linear_attention", "kla")
    assert too_wide(page) == []
    assert "Every check passed" in page
    found = json.loads(unify("verify", "linear_attention", "--json"))
    assert found[0]["passed"]
    assert {row["name"] for row in found[0]["rows"]} >= {"derivation", "published", "chunked"}

    def broken(*_):
        raise AssertionError("off by a mile")

    monkeypatch.setattr("unify.verify._published", broken)
    page = unify("verify", "linear_attention", code=1)
    assert "✗ linear_attention, published: off by a mile" in page
    assert not json.loads(unify("verify", "linear_attention", "--json", code=1))[0]["passed"]


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_map(tmp_path, suffix, monkeypatch):
    from unify.draw import MapEdge, MapNode

    small = [MapNode("a", "A", "f"), MapNode("b", "B", "f")], [MapEdge("a", "b", "exact")]
    monkeypatch.setattr("unify.derivations.map_nodes_and_edges", lambda: small)
    path = tmp_path / f"map{suffix}"
    assert "2 models, 1 edges" in unify("map", "-o", path)
    assert path.stat().st_size > 1000


# --- recall and bench -------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat, and the rat sat on the cat. " * 12)
    return path


def test_recall(text, tmp_path):
    picture = tmp_path / "plot.png"
    page = unify("recall", text, "--models", "mamba2, palimpsa", "-o", picture)
    assert too_wide(page) == []
    assert all(word in page for word in ("mamba2", "palimpsa", "accuracy %", "text.txt", str(picture.name)))
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(unify("recall", text, "-m", "mamba2", "--bytes", "300", "--seed", "3", "--json"))
    assert (found["seed"], [m["name"] for m in found["models"]]) == (3, ["mamba2"])
    assert found["bytes_fitted"] + found["bytes_scored"] <= 300


def test_recall_walks_folders(text, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "a.md").write_text("again and again and " * 9)
    (inner / "b.bin").write_text("not a text " * 9)
    (inner / ".hidden.txt").write_text("nor this " * 9)
    found = json.loads(unify("recall", tmp_path, "-m", "mamba2", "--json"))
    assert found["files"] == ["a.md", "text.txt"]


@pytest.fixture
def short(monkeypatch):
    """A bench that takes no time: its numbers mean nothing."""
    monkeypatch.setattr(bench, "SHAPE", {"B": 1, "H": 1, "K": 4, "V": 4})
    for name, value in {"SHORT": 32, "LONG": 48, "CHECKED": 24}.items():
        monkeypatch.setattr(bench, name, value)


def test_bench(short, monkeypatch):
    page = unify("bench", "--device", "cpu", "--models", "mamba2,palimpsa,mesanet")
    assert too_wide(page) == []
    assert all(word in page for word in ("chunked ms", "loop ms", "ratio", "torch", "processor", "10×", "3×"))
    page = unify("bench", "--device", "cpu", "--quick", "--models", "mamba2,palimpsa")
    assert "T = 32" in page
    monkeypatch.setattr(bench, "machine", lambda: {"load": "9.9", "cores": "2"})
    assert "busy with other work" in unify("bench", "--device", "cpu", "--quick", "-m", "mamba2")
    monkeypatch.setattr(bench, "machine", lambda: {"load": "0.1", "cores": "2"})
    assert "busy" not in unify("bench", "--device", "cpu", "--quick", "-m", "mamba2")
    assert "10×" not in page
    found = json.loads(unify("bench", "-m", "mamba2", "--device", "cpu", "--json"))
    assert [row["dtype"] for row in found["rows"]] == ["float64", "float32"]
    assert all(row["verdict"] in ("met", "missed") and row["ratio"] > 0 for row in found["rows"])
    assert found["sizes"]["T"] == 48


@pytest.fixture
def record(tmp_path):
    """A record with one figure in it, which nobody measured."""
    path = tmp_path / "record.json"
    run = {"gpu": "NVIDIA T1", "torch": "9.1", "date": "2026-01-02T03:04", "command": "unify bench"}
    found = {f"table/mamba2/2x4096x16x96x192/{m}": {"ms": 1.5, "run": 0, "error": 0.001} for m in ("forward", "both")}
    path.write_text(json.dumps({"runs": [run], "results": found}))
    return path


def test_bench_shows_a_record(record, tmp_path):
    assert "| Mamba-2 | 2x4096x16x96x192 | 1.50 |" in unify("bench", "--table", record)
    from unify.standings import BEGIN, END

    page = tmp_path / "page.md"
    page.write_text(f"# A page\n{BEGIN}\n{END}\n")
    assert "written from" in unify("bench", "--table", record, "-o", page)
    assert page.read_text().startswith(f"# A page\n{BEGIN}\nNVIDIA T1, torch 9.1; bfloat16")
    assert unify("bench", "--plot", record, "-o", tmp_path / "pictures").split("/")[-1].strip() == "speed.png"
    assert (tmp_path / "pictures" / "speed.svg").exists()


def test_bench_measures_on_a_gpu(record, monkeypatch):
    from unify import race

    seen = []

    def measured(path, only, parts, *, say, **options):
        seen.append((path, only, parts, options))
        say("[1/1] mamba2")
        return race.load(record)

    monkeypatch.setattr(race, "race", measured)
    monkeypatch.setattr(race, "default_path", lambda: record)
    page = unify("bench", "--device", "cuda", "--only", "mamba2, kda", "--parts", "table,first", "--json", "a/b.json")
    assert "[1/1] mamba2" in page
    assert "| Mamba-2 |" in page
    assert "record: a/b.json" in page
    assert seen.pop() == (Path("a/b.json"), ["mamba2", "kda"], ["table", "first"], {"rivals": True, "beside": None})
    found = unify("bench", "--device", "cuda", "--json", "--no-rivals", "--limit", "9")
    assert json.loads(found)["runs"][0]["gpu"] == "NVIDIA T1"
    assert seen.pop() == (record, (), race.PARTS, {"rivals": False, "beside": None, "limit": 9.0})
    unify("bench", "--device", "cuda")
    assert seen.pop()[0] == record


def test_bench_refuses_to_time_a_wrong_result(short, monkeypatch):
    from unify.op import Op

    right = Op.__call__

    def wrong(self, *arguments, **gates):
        return right(self, *arguments, **gates) * (1.01 if self.plan.chunked else 1)

    monkeypatch.setattr(Op, "__call__", wrong)
    assert "so nothing was timed" in complaint("bench", "--device", "cpu", "--quick", "-m", "mamba2")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "palimsa"], "try palimpsa"),
        (["show"], "it shows one thing"),
        (["show", "kda", "--bogus"], "No such option: --bogus"),
        (["show", "kda", "gla"], "unexpected extra argument"),
        (["show", "kda", "--latex", "--json"], "choose one"),
        (["sing"], "No such command 'sing'"),
        (["--bogus"], "--help says what it takes"),
        (["list", "--family", "birds"], "use one of fixed plasticity"),
        (["prove", "kda"], "a proof has two ends"),
        (["prove", "kda", "gla", "mamba2"], "a proof has two ends"),
        (["prove", "kda", "nobody"], "the zoo has no such model"),
        (["prove", "linear_attention", "palimpsa"], "no path of edges"),
        (["prove", "--latex"], "name a parent and a child"),
        (["prove", "kda", "gla", "--all"], "name a parent and a child, or say --all"),
        (["verify"], "say --all"),
        (["verify", "--all", "kda"], "name models or say --all"),
        (["verify", "nobody"], "the zoo has no such model"),
        (["verify", "gla", "--device", "tpu"], "use cuda or cpu"),
        (["map", "-o", "map.gif"], "use .svg, .png or .pdf"),
        (["map", "-o", "no/such/folder/map.svg"], "name a place that you may write to"),
        (["recall", "no-such-file.txt"], "cannot be read"),
        (["recall", "-m", "nobody"], "the zoo has no such model"),
        (["recall", "-m", ""], "there is nothing to compare"),
        (["recall", "-m", "kla"], "recall has no untrained value"),
        (["recall", "-o", "plot.doc"], "use .png, .svg or .pdf"),
        (["recall", "--bytes", "3"], "--bytes"),
        (["recall", "--bytes", "many"], "--bytes"),
        (["bench", "--device", "cpu", "-m", "kla"], "it has no chunked form"),
        (["bench", "--device", "cpu", "--json", "-m", "nobody"], "the zoo has no such model"),
        (["bench", "--device", "cpu", "--parts", "table"], "use --json alone, or --device cuda"),
        (["bench", "--device", "cpu", "--json", "file.json"], "use --json alone, or --device cuda"),
        (["bench", "--device", "cuda", "--quick"], "choose --parts, or --device cpu"),
        (["bench", "--device", "cuda", "--only", "nobody", "--json", "x.json"], "use some of palimpsa"),
        (["bench", "--device", "tpu"], "use cpu, cuda or auto"),
        (["bench", "--limit", "0"], "--limit"),
        (["bench", "--plot", "no-such.json"], "there is no such record"),
        (["bench", "--plot", "a.json", "--table", "a.json"], "run one after the other"),
        (["bench", "--table", __file__], "no record of the benchmark"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, monkeypatch):
    monkeypatch.setattr(
        "unify.draw.layout", lambda nodes, edges: pytest.fail("drew before it looked at the file's name")
    )
    if "no/such/folder/map.svg" in arguments:
        monkeypatch.undo()
        monkeypatch.setattr("unify.derivations.map_nodes_and_edges", lambda: ([_node()], []))
    assert words in complaint(*arguments)


def _node():
    from unify.draw import MapNode

    return MapNode("a", "A", "f")


def test_an_empty_folder_is_a_mistake(tmp_path):
    assert "holds no .py, .txt or .md file" in complaint("recall", tmp_path)


def test_a_folder_that_cannot_be_made(text):
    assert "the folder cannot be made" in complaint("tour", "-o", text)


def test_the_console_script_exits_with_the_same_codes():
    done = subprocess.run([sys.executable, "-m", "unify.cli", "show", "nobody"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
