"""The benchmark on a GPU, without one: who runs on what, the check before the start, processes, the record."""

import json
import subprocess
import sys
from ast import literal_eval
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch
from apart import apart

from unify import contest, race
from unify.contest import CONTESTANTS, MODELS, RIVAL, Size, WrongResultError
from unify.errors import UnifyError
from unify.op import Op
from unify.race import Entry, Lane, entries

SMALL = Size(2, 100, 2, 6, 10)


def planted(change):
    """Mamba-2's contestant with something done to its function."""

    class Planted(contest.Contestant):
        def prepare(self):
            right = self.op("torch")
            return lambda given: change(right(**given), given)

    return Planted("mamba2", "mamba2")


def right(o, given):
    return o


class Halved(torch.autograd.Function):
    """The identity with half its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope / 2


# ---- what is measured --------------------------------------------------------------------------------------------


def test_forward_comes_first_and_nothing_twice():
    work = [str(e) for e in entries("palimpsa", race.PARTS)]
    assert work[:4] == [f"{part}/palimpsa/2x4096x16x96x192/{m}" for m in race.MEASURES for part in ("first", "table")]
    assert len(set(work)) == len(work) == 2 + 6 + 20 + 3
    assert "length/palimpsa/524288/both" in work
    assert "decode/palimpsa/256/step" in work


def test_parts_are_independent():
    whole = {e for name in CONTESTANTS for e in entries(name, race.PARTS)}
    assert whole == {e for name in CONTESTANTS for part in race.PARTS for e in entries(name, [part])}
    assert entries("chunk_kda", ["length", "decode"]) == []
    assert {e.at for e in entries("kda", ["first"])} == {"2x4096x16x96x192"}


def test_mesanet_runs_where_v_is_k():
    for name in ("mesanet", "chunk_mesa_net"):
        sizes = [race.parse(e.at) for e in entries(name, ["table"])]
        assert sizes
        assert all(s.K == s.V for s in sizes)
    assert Size(2, 4096, 16, 96, 96) in CONTESTANTS["mesanet"].sizes


def test_rivals_run_beside_ours():
    everything = contest.lineup([], rivals=True)
    assert set(everything) == set(CONTESTANTS)
    assert len(everything) == len(CONTESTANTS)
    assert contest.lineup(["meta_gdn", "kda"], rivals=True) == ["meta_gdn", "chunk_kda", "kda"]
    assert contest.lineup([], rivals=False) == MODELS
    assert contest.lineup(["chunk_gla"], rivals=False) == ["chunk_gla"]
    with pytest.raises(UnifyError, match="use some of palimpsa"):
        contest.lineup(["nobody"], rivals=True)


@pytest.mark.parametrize("name", MODELS)
def test_arguments_are_what_the_op_takes(name):
    op = CONTESTANTS[name].op()
    given = contest.draw(op, SMALL, "cpu")
    assert given["q"].dtype == given["g"].dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for n, x in given.items() if n == "prior_precision")
    assert torch.allclose(given["k"].float().norm(dim=-1), torch.ones(2, 100, 2), atol=1e-2)
    assert given["g"].max() < 0
    o = replace(op, backend="torch", checked=True)(**given)
    assert o.shape == (2, 100, 2, 10)


# ---- the check before the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_op_of_ours_passes(name):
    contestant = CONTESTANTS[name]
    op = contestant.op("torch")
    found = contest.check(contestant, lambda given: op(**given), SMALL, "both", "cpu")
    assert set(found) == {"o", *(f"d{x.name}" for x in op.recurrence.inputs)}
    assert contest.accept(found, "") <= 3e-3


def test_forward_compares_the_output_alone():
    assert set(contest.check(planted(right), planted(right).prepare(), SMALL, "forward", "cpu")) == {"o"}


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda o, given: 1.02 * o, "o is off by 2.0e-02"),
        (lambda o, given: torch.cat([o[:, :-1], o[:, -1:] * torch.nan], 1), "o is off by inf"),
        (lambda o, given: o.roll(1, 1), "o is off"),
    ],
)
@pytest.mark.parametrize("measure", race.MEASURES)
def test_a_wrong_output_is_refused(change, fault, measure):
    made = planted(change)
    found = contest.check(made, made.prepare(), SMALL, measure, "cpu")
    if measure == "both":
        found = {"o": found["o"]}
    with pytest.raises(WrongResultError, match=fault):
        contest.accept(found, "")


def test_a_wrong_gradient_is_refused_and_a_right_forward_is_not():
    made = planted(right)
    op = made.op("torch")
    call = lambda given: op(**{**given, "g": Halved.apply(given["g"])})  # noqa: E731
    contest.accept(contest.check(made, call, SMALL, "forward", "cpu"), "")
    found = contest.check(made, call, SMALL, "both", "cpu")
    assert found["dg"] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(WrongResultError, match=r"dg is off by 5\.0e-01"):
        contest.accept(found, "")


# ---- the others' functions ---------------------------------------------------------------------------------------


def reference(model: str, **given):
    """What the function of that model would return: its output and no state."""
    return CONTESTANTS[model].op("reference")(**given), None


# The signatures of fla-core 0.6.0, as far as they are used: all sequence first; scale None is K^-1/2.
def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
    return reference("mamba2", q=q, k=k, v=v, g=g, scale=scale or q.shape[-1] ** -0.5)


def chunk_gla(q, k, v, g, scale=None):
    return reference("gla", q=q, k=k, v=v, g=g, scale=scale)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, use_qk_l2norm_in_kernel=False):
    assert not use_qk_l2norm_in_kernel
    return reference("gated_deltanet", q=q, k=k, v=v, g=g, beta=beta, scale=scale)


def chunk_kda(q, k, v, g, beta, scale=None, use_qk_l2norm_in_kernel=False):
    assert not use_qk_l2norm_in_kernel
    return reference("kda", q=q, k=k, v=v, g=g, beta=beta, scale=scale)


def chunk_mesa_net(q, k, v, g, beta, lamb, max_CG_iteration=30):
    o, state = reference("mesanet", q=q, k=k, v=v, g=g, beta=beta, prior_precision=lamb)
    return o, state, state


@pytest.mark.parametrize(
    "function",
    [chunk_simple_gla, chunk_gla, chunk_gated_delta_rule, chunk_kda, chunk_mesa_net],
    ids=lambda f: f.__name__,
)
def test_rivals_get_the_arguments_they_take(function, monkeypatch):
    rival = CONTESTANTS[function.__name__]
    stand_in = ModuleType(rival.module)
    setattr(stand_in, rival.name, function)
    monkeypatch.setitem(sys.modules, rival.module, stand_in)
    found = contest.check(rival, rival.prepare(), SMALL, "both", "cpu")
    assert contest.accept(found, "") <= 3e-3
    assert rival.name in RIVAL.values()


# ---- one contestant's process ------------------------------------------------------------------------------------


@pytest.fixture
def untimed(monkeypatch):
    """Figures that mean nothing in place of the GPU's clocks; the checks are real. A list of what was timed."""
    calls = []
    monkeypatch.setattr(race, "milliseconds", lambda call: calls.append(call) or 0.5)
    monkeypatch.setattr(race, "captured", lambda call: call)
    monkeypatch.setattr(race, "peak", lambda call: 3 * 2**20)
    monkeypatch.setattr(race, "bandwidth", lambda device: 4e12)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(race, "LAYER", Size(1, 1, 2, 6, 10))
    return calls


def lane(change=right):
    return Lane(planted(change), "cpu")


def entry(part, measure="forward", at=str(SMALL)):
    return Entry(part, "mamba2", at, measure)


def test_each_part_measures(untimed):
    found = {p: lane().attempt(entry(p, "both")) for p in ("table", "first")}
    assert found["table"] == {"ms": 0.5, "graph_ms": 0.5, "peak_mib": 3.0, "error": found["table"]["error"]}
    assert found["first"]["seconds"] > 0
    assert lane().attempt(entry("length", at="64"))["ms"] == 0.5
    step = lane().attempt(entry("decode", "step", "3"))
    assert step["state_bytes"] == 2 * 3 * 2 * 6 * 10 * 4  # S, float32, read and written
    assert all(0 < x["error"] < contest.TOLERANCE for x in (*found.values(), step))


def test_nothing_wrong_is_timed(untimed):
    wrong = lane(lambda o, given: 1.02 * o)
    for part, at in (("table", str(SMALL)), ("length", "64")):
        for measure in race.MEASURES:
            failed = wrong.attempt(entry(part, measure, at))["failed"]
            assert failed.startswith("wrong: ")
            assert failed.endswith("against the float64 token loop, 1e-02 is allowed")
    assert wrong.attempt(entry("first"))["failed"].startswith("wrong: o is off by 2.0e-02")
    assert untimed == []


class Doubled(Op):
    """An op whose outputs are twice what they should be, its states right."""

    def __call__(self, *arguments, **gates):
        o, *rest = super().__call__(*arguments, **gates)
        return 2 * o, *rest


class OneWrong(contest.Contestant):
    def op(self, backend="auto"):
        made = super().op(backend)
        return Doubled(**{f.name: getattr(made, f.name) for f in fields(made) if f.init}) if backend == "auto" else made


def test_a_wrong_step_is_not_timed(untimed):
    failed = Lane(OneWrong("mamba2", "mamba2"), "cpu").attempt(entry("decode", "step", "1"))["failed"]
    assert failed.startswith("wrong: o is off by 1.0e+00 after one token")
    assert untimed == []


def test_the_gradient_of_every_argument_is_timed(untimed):
    run = lane().timed(SMALL, "both")
    assert len(run()) == 4
    assert not lane().timed(SMALL, "forward")().requires_grad


def test_what_fails_costs_one_entry(untimed, monkeypatch):
    def broken(o, given):
        if given["g"].requires_grad:
            raise RuntimeError("Triton in /some/where/else.py\nand more")
        return o

    here = lane(broken)
    assert here.attempt(entry("table", "both")) == {"failed": "not measured: RuntimeError: Triton in else.py"}
    assert "ms" in here.attempt(entry("table", "forward"))
    monkeypatch.setattr(race, "captured", lambda call: 1 / 0)
    found = here.attempt(entry("table"))
    assert found["graph_failed"] == "not measured: ZeroDivisionError: division by zero"
    assert found["ms"] == 0.5


def test_a_first_call_counts_the_preparation_and_adds_up(untimed, monkeypatch):
    monkeypatch.setattr(race.time, "perf_counter", count().__next__)  # a second passes at each look
    here = lane()
    assert here.attempt(entry("first"))["seconds"] == 2  # the preparation and the call
    assert here.attempt(entry("first", "both"))["seconds"] == 3


def test_work_tells_every_entry(untimed, monkeypatch, capsys):
    monkeypatch.setattr(race, "facts", lambda: {"gpu": "none"})
    monkeypatch.setattr(race, "Lane", lambda contestant: Lane(planted(right), "cpu"))
    monkeypatch.setattr(contest, "SIZES", (SMALL,))
    race.work("mamba2", ["table"])
    told = [
        json.loads(x.removeprefix(race.MARK)) for x in capsys.readouterr().out.splitlines() if x.startswith(race.MARK)
    ]
    assert told[0] == {"facts": {"gpu": "none"}}
    assert [x["entry"] for x in told[1:]] == [list(e) for e in entries("mamba2", ["table"])]
    assert all(x["found"]["ms"] == 0.5 for x in told[1:])


# ---- around the processes ----------------------------------------------------------------------------------------


def events(code: str, limit: float = 60) -> list[dict]:
    return list(race.follow([sys.executable, "-c", f"import time\n{code}"], limit, {"HELLO": "there"}))


def tell(value: str) -> str:
    return f"print({race.MARK!r} + {value!r}, flush=True)\n"


def test_results_are_found_among_noise():
    code = "import os\nprint('noise')\n" + tell('{"facts": {}}') + "print(os.environ['HELLO'])\n" + tell('{"entry": 1}')
    assert events(code) == [{"facts": {}}, {"entry": 1}, {"ended": ""}]


def test_a_process_that_breaks_off_says_how():
    (end,) = events("raise SystemExit('no such kernel')")
    assert end == {"ended": "exit code 1, no such kernel"}


def test_a_stall_loses_what_is_missing_and_no_more():
    found = events(tell('{"entry": 1}') + "import subprocess\nsubprocess.run(['sleep', '60'])", limit=3)
    assert found == [{"entry": 1}, {"ended": "no answer within 3 s"}]


def test_leaving_early_ends_the_process():
    told = race.follow([sys.executable, "-c", tell('{"entry": 1}') + "import time; time.sleep(60)"], 60, {})
    next(told)
    told.close()  # waits for it: within the test's patience, not within a minute


@pytest.mark.skipif(sys.platform != "linux", reason="children are listed in /proc")
def test_a_terminated_benchmark_leaves_no_process_behind():
    """`timeout` sends SIGTERM to the benchmark alone; a contestant that lived on would share the GPU with what comes next."""
    child = [sys.executable, "-c", tell('{"entry": 1}') + "import time; time.sleep(60)"]
    code = f"from unify import race\nfor e in race.follow({child!r}, 60, {{}}): print(e, flush=True)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert literal_eval(parent.stdout.readline()) == {"entry": 1}
    (worker,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.terminate()
    assert parent.wait(20) == 143
    assert not Path(f"/proc/{worker}").exists()


WANTED = [Entry("table", "mamba2", "1x2x3x4x5", m) for m in race.MEASURES]
FACTS = {"facts": {"gpu": "G", "torch": "2"}}
SESSION = {"date": "today", "command": "unify bench"}


def gather(record, *told, session=SESSION):
    said = []
    list(race.collect(record, iter(told), WANTED, session, said.append))
    return said


def test_missing_entries_say_why():
    record = {"runs": [], "results": {}}
    said = gather(record, FACTS, {"entry": WANTED[0], "found": {"ms": 1.0}}, {"ended": "no answer within 3 s"})
    assert record["runs"] == [{**SESSION, **FACTS["facts"]}]
    assert record["results"] == {
        "table/mamba2/1x2x3x4x5/forward": {"ms": 1.0, "run": 0},
        "table/mamba2/1x2x3x4x5/both": {"failed": "not measured: no answer within 3 s", "run": 0},
    }
    assert said == ["  table/mamba2/1x2x3x4x5/forward: 1 ms", "  1 entries: not measured: no answer within 3 s"]


def test_a_process_without_a_word_is_recorded():
    record = {"runs": [], "results": {}}
    gather(record, {"ended": "exit code 1, No such file: /usr/lib/here/cuda.so"})
    assert {x["failed"] for x in record["results"].values()} == {"not measured: exit code 1, No such file: cuda.so"}
    assert {x["run"] for x in record["results"].values()} == {None}


def test_a_later_session_adds_and_replaces():
    record = {"runs": [], "results": {"decode/gla/1/step": {"ms": 9.0, "run": 0}}}
    both = [{"entry": e, "found": {"ms": 1.0}} for e in WANTED]
    gather(record, FACTS, *both, {"ended": ""})
    gather(record, FACTS, {"entry": WANTED[0], "found": {"ms": 2.0}}, session={**SESSION, "date": "tomorrow"})
    found = {path: (x["ms"], record["runs"][x["run"]]["date"]) for path, x in record["results"].items()}
    assert found == {
        "decode/gla/1/step": (9.0, "today"),
        "table/mamba2/1x2x3x4x5/forward": (2.0, "tomorrow"),
        "table/mamba2/1x2x3x4x5/both": (1.0, "today"),
    }
    gather(record, FACTS, {"ended": "exit code 1, "})
    assert len(record["runs"]) == 2


def test_figures_of_another_gpu_do_not_mix():
    record = {"runs": [{"gpu": "A"}], "results": {}}
    with pytest.raises(UnifyError, match=r"G: the record holds figures of A.*name another file"):
        gather(record, FACTS)


def test_records_are_kept(tmp_path):
    path = tmp_path / "new" / "record.json"
    assert race.load(path) == {"runs": [], "results": {}}
    race.save({"runs": [], "results": {"a": {}}}, path)
    assert race.load(path)["results"] == {"a": {}}
    assert list(path.parent.iterdir()) == [path]
    for text in ("not JSON", "[]", "{}", '{"runs": []}'):
        path.write_text(text)
        with pytest.raises(UnifyError, match="no record of the benchmark"):
            race.load(path)


@pytest.fixture
def pretended(monkeypatch):
    """A GPU whose processes answer at once. A list of their environments."""
    seen = []

    def follow(command, limit, environment):
        seen.append(environment)
        name, parts = literal_eval(command[-1].partition("; work")[2])
        yield FACTS
        yield from ({"entry": e, "found": {"ms": 1.0}} for e in entries(name, parts))
        yield {"ended": ""}

    monkeypatch.setattr(race, "follow", follow)
    monkeypatch.setattr(race, "demand_gpu", lambda: None)
    return seen


def test_a_record_grows_part_by_part(pretended, tmp_path):
    path, said = tmp_path / "record.json", []
    race.race(path, ["mamba2"], ["table"], rivals=False, say=said.append)
    race.race(path, ["mamba2", "kda"], ["first", "length"], rivals=False, say=said.append)
    record = race.load(path)
    wanted = [("mamba2", ["table", "first", "length"]), ("kda", ["first"])]
    assert set(record["results"]) == {str(e) for name, parts in wanted for e in entries(name, parts)}
    assert said[0] == "[1/1] mamba2: 6 entries"
    assert [sorted(x) for x in pretended] == [[], *[["TRITON_CACHE_DIR", "UNIFY_CACHE"]] * 2]
    commands = {x["command"] for x in record["runs"]}
    assert "unify bench --device cuda --only mamba2 --parts table --no-rivals --json record.json" in commands


def test_rivals_run_where_they_are(pretended, tmp_path):
    said = []
    race.race(tmp_path / "record.json", ["gla"], ["table"], say=said.append)
    assert said[0] == "flash-linear-attention is not installed: ours alone"
    (tmp_path / "fla").mkdir()
    race.race(tmp_path / "record.json", ["gla"], ["table"], beside=tmp_path, say=said.append)
    assert [x.get("PYTHONPATH", "").partition(":")[0] for x in pretended] == ["", "", str(tmp_path)]
    assert "[2/2] chunk_gla: 6 entries" in said


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for attempt in (lambda: race.race(tmp_path / "x.json"), race.default_path):
        with pytest.raises(UnifyError, match="sees no CUDA GPU here; take --device cpu"):
            attempt()
    with pytest.raises(UnifyError, match="use some of table, first"):
        race.race(tmp_path / "x.json", parts=["tables"])


def test_this_module_alone_is_a_command(pretended, tmp_path, capsys):
    path = tmp_path / "record.json"
    race.main(["--only", "mamba2, gla", "--parts", "table", "--no-rivals", "--json", str(path)])
    page = capsys.readouterr().out
    assert "[2/2] gla" in page
    assert "| Mamba-2 | 8x2048x16x48x48 | 1.00 |" in page
    with pytest.raises(SystemExit) as end:
        race.main(["--only", "nobody", "--json", str(path)])
    assert end.value.code == 2
    assert "unify: --only nobody" in capsys.readouterr().err


def test_it_needs_little(tmp_path):
    """What a GPU image may lack stays unimported: the check of an op runs without it."""
    code = (
        "import sys\n"
        "for name in ('rich', 'typer', 'matplotlib', 'beartype', 'hypothesis', 'transformers', 'fla'):\n"
        "    sys.modules[name] = None\n"
        "from unify import contest, race, standings\n"
        "made = contest.CONTESTANTS['mamba2']\n"
        "print(contest.check(made, made.prepare(), contest.Size(1, 1, 1, 4, 4), 'forward', 'cpu'))\n"
        "print(standings.markdown(race.load(race.Path('none.json'))))\n"
    )
    assert apart(code, tmp_path)


# ---- on the device -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_the_device(tmp_path):
    """Every part of one contestant, in processes as a user's: figures, none of them failed."""
    path = tmp_path / "record.json"
    record = race.race(path, ["mamba2"], ["table", "first", "decode"], rivals=False)
    assert {str(e) for e in entries("mamba2", ["table", "first", "decode"])} == set(record["results"])
    assert [x for x in record["results"].values() if "failed" in x] == []
    assert all(0 < x["error"] < contest.TOLERANCE for x in record["results"].values())
    assert all(x["ms"] > 0 for path, x in record["results"].items() if not path.startswith("first"))
    wrong = Lane(planted(lambda o, given: 1.02 * o))
    assert wrong.attempt(entry("table"))["failed"].startswith("wrong: o is off by 2.0e-02")
