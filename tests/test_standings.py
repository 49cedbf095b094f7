"""Verdicts, tables and pictures of a record of the benchmark; the records here are made up and stay in the test."""

import json

import pytest

from unify import race, standings
from unify.contest import CONTESTANTS, SIZES
from unify.errors import UnifyError
from unify.race import Entry, entries
from unify.standings import BEGIN, END, TARGETS, judge, markdown, rows, written

BIG = SIZES[0]


def made_up(names=CONTESTANTS, parts=race.PARTS) -> dict:
    """A record in which every figure is there: ours take a millisecond forward and three in all, the others two and six."""
    record = {
        "runs": [{"gpu": "NVIDIA T1", "torch": "9.1", "date": "2026-01-02T03:04", "command": "unify bench"}],
        "results": {},
    }
    for entry in (e for name in names for e in entries(name, parts)):
        ms = (1.0 if CONTESTANTS[entry.name].ours else 2.0) * (3 if entry.measure == "both" else 1)
        found = {
            "table": {"ms": ms, "graph_ms": 0.9 * ms, **({"peak_mib": 900.0} if entry.measure == "both" else {})},
            "first": {"seconds": 5 * ms},
            "length": {"ms": ms * int(entry.at) / 1024 if entry.part == "length" else 0},
            "decode": {"ms": 0.01, "state_bytes": 8e6, "bandwidth": 4e12},
        }[entry.part]
        record["results"][str(entry)] = {"error": 1e-3, "run": 0, **found}
    return record


def change(record, path, **figures):
    record["results"][path] = {**record["results"][path], **figures}


def verdicts(record, model):
    return [row.verdict for row in rows(record) if row.model == model]


@pytest.mark.parametrize(
    "found, allowed, verdict",
    [
        ({"ms": 1.0}, {"ms": 1.0}, "met"),
        ({"ms": 1.1}, {"ms": 1.0}, "missed"),
        ({"ms": None}, {"ms": 1.0}, "not measured"),
        ({}, {"ms": 1.0}, "not measured"),
        ({"ms": 1.0}, {"ms": None}, "not measured"),
        ({"ms": 1.0, "s": 2.0}, {"ms": None, "s": 1.0}, "missed"),
        ({"ms": 1.0}, {}, ""),
    ],
)
def test_verdicts(found, allowed, verdict):
    assert judge(found, allowed) == verdict


def test_every_model_has_a_target():
    assert set(TARGETS) == {name for name, c in CONTESTANTS.items() if c.ours}
    assert str(TARGETS["palimpsa"]) == "≤ 1.3 / 8 ms, 1536 MiB"
    assert str(TARGETS["palimpsa_key"]) == "≤ 1.25 × Mamba-2"
    assert str(TARGETS["meta_gdn"]) == "≤ fla chunk_kda"


@pytest.mark.parametrize("figures", [{"ms": 8.1}, {"peak_mib": 1537.0}])
def test_palimpsa_has_figures_of_its_own_at_one_size(figures):
    record = made_up()
    assert verdicts(record, "palimpsa") == ["met", "", ""]
    change(record, f"table/palimpsa/{BIG}/both", **figures)
    assert verdicts(record, "palimpsa") == ["missed", "", ""]


def test_palimpsa_key_is_held_against_our_mamba2():
    record = made_up()
    change(record, f"table/palimpsa_key/{BIG}/forward", graph_ms=1.12, ms=9.0)  # a busy host slows calls alone
    assert verdicts(record, "palimpsa_key")[0] == "met"
    change(record, f"table/palimpsa_key/{BIG}/forward", graph_ms=1.13, ms=1.0)
    assert verdicts(record, "palimpsa_key") == ["missed", "met", "met"]


def test_calls_are_compared_where_one_side_has_no_graph():
    record = made_up()
    del record["results"][f"table/mamba2/{BIG}/forward"]["graph_ms"]
    change(record, f"table/palimpsa_key/{BIG}/forward", graph_ms=9.0, ms=1.25)
    assert verdicts(record, "palimpsa_key")[0] == "met"
    change(record, f"table/palimpsa_key/{BIG}/forward", graph_ms=0.1, ms=1.26)
    assert verdicts(record, "palimpsa_key")[0] == "missed"


def test_the_rest_is_held_against_its_counterpart():
    record = made_up()
    assert {v for name in "mamba2 gla gated_deltanet kda meta_gdn mesanet".split() for v in verdicts(record, name)} == {
        "met"
    }
    change(record, f"table/chunk_kda/{BIG}/both", graph_ms=2.6)
    assert verdicts(record, "kda")[0] == verdicts(record, "meta_gdn")[0] == "missed"
    record["results"][f"table/chunk_kda/{BIG}/both"] = {"failed": "not measured: no answer within 3 s", "run": 0}
    assert verdicts(record, "kda")[0] == "not measured"
    record["results"][f"table/kda/{BIG}/forward"] = {"failed": "wrong: o is off by 1.0e-01", "run": 0}
    assert verdicts(record, "kda") == ["not measured", "met", "met"]


def test_the_page_says_everything():
    record = made_up()
    record["results"][f"table/chunk_gla/{BIG}/both"] = {"failed": "not measured: no answer within 300 s", "run": 0}
    record["results"][f"table/gla/{BIG}/forward"] = {"failed": "wrong: dg is off by 1.0e-01", "run": 0}
    change(record, f"table/kda/{BIG}/both", graph_failed="not measured: RuntimeError: no capture")
    change(record, f"first/palimpsa/{BIG}/both", seconds=21.0)
    page = markdown(record)
    assert page.startswith("NVIDIA T1, torch 9.1; bfloat16")
    line = next(x for x in page.splitlines() if x.startswith(f"| Palimpsa | {BIG}"))
    assert line == f"| Palimpsa | {BIG} | 1.00 (0.900) | – | 3.00 (2.70) | – | 900 | ≤ 1.3 / 8 ms, 1536 MiB | met |"
    line = next(x for x in page.splitlines() if x.startswith(f"| GLA | {BIG}"))
    assert line == f"| GLA | {BIG} | wrong | 2.00 (1.80) | 3.00 (2.70) | – | 900 | ≤ fla chunk_gla | not measured |"
    assert "Palimpsa 21.0 s (missed)" in page
    assert "Mamba-2 15.0 s (met)" in page
    assert "fla chunk_kda 30.0 s," in page
    assert "Gated DeltaNet 10 µs (20%) at batch 1" in page
    assert f"- not measured: no answer within 300 s: table/chunk_gla/{BIG}/both" in page
    assert f"- not measured: RuntimeError: no capture: table/kda/{BIG}/both as a graph" in page
    assert page.endswith("Measured by `unify bench` (2026-01-02).")


def test_a_comparison_across_sessions_says_so():
    record = made_up()
    record["runs"].append({**record["runs"][0], "date": "2026-01-05T00:00", "triton": "9"})
    change(record, f"table/chunk_gla/{BIG}/both", run=1)
    lines = [x for x in markdown(record).splitlines() if x.endswith("met, in two sessions |")]
    assert [x[:6] for x in lines] == ["| GLA "]
    record["runs"][1]["date"] = record["runs"][0]["date"]
    assert "two sessions" not in markdown(record)


def test_parts_of_a_record_make_parts_of_a_page():
    assert markdown({"runs": [], "results": {}}) == standings.EMPTY
    page = markdown(made_up(["mamba2"], ["table"]))
    assert page.count("| Mamba-2 |") == 3
    assert "not measured" in page
    assert "First call" not in page
    assert "One token" not in page
    assert "| op |" not in markdown(made_up(["mamba2"], ["decode"]))


def test_a_page_is_rewritten_between_its_marks():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    fresh = written(page, {"runs": [], "results": {}})
    assert fresh == f"before\n{BEGIN}\n{standings.EMPTY}\n{END}\nafter\n"
    assert written(fresh, made_up()) == fresh.replace(standings.EMPTY, markdown(made_up()))
    for text in ("no marks", BEGIN, END):
        with pytest.raises(UnifyError, match="it has no place for the table"):
            written(text, made_up())


def test_pictures(tmp_path):
    files = standings.draw(made_up(), tmp_path / "new")
    assert [f.name for f in files] == [f"{x}.{y}" for x in ("speed", "length", "decode") for y in ("svg", "png")]
    assert all(f.stat().st_size > 5000 for f in files)
    text = (tmp_path / "new" / "length.svg").read_text()
    assert text.startswith("<?xml")


def test_pictures_of_what_there_is(tmp_path):
    assert standings.draw({"runs": [], "results": {}}, tmp_path) == []
    files = standings.draw(made_up(["mamba2", "chunk_kda"], ["table"]), tmp_path)
    assert {f.stem for f in files} == {"speed"}
    record = made_up(["mamba2"], ["table"])
    record["results"] = {k: x for k, x in record["results"].items() if k.endswith("forward")}
    assert len(standings.draw(record, tmp_path)) == 2
    record = made_up(["palimpsa", "gla"], ["length", "decode"])
    record["results"] = {
        k: x for k, x in record["results"].items() if not k.endswith("both") and "palimpsa/32" not in k
    }
    assert {f.stem for f in standings.draw(record, tmp_path)} == {"length", "decode"}


def test_lines_have_the_slope_of_their_figures():
    figure = standings._length(made_up())
    for axis in figure.axes:
        *lines, guide = axis.lines
        assert len(lines) == len(race.LONG)
        for line in (*lines, guide):
            x, y = line.get_data()
            assert y[-1] / y[0] == pytest.approx(x[-1] / x[0])
    record = made_up()
    change(record, str(Entry("length", "mamba2", "524288", "forward")), ms=1e6)
    x, y = standings._length(record).axes[0].lines[race.LONG.index("mamba2")].get_data()
    assert y[-1] == 1e6


def test_a_record_survives_its_file(tmp_path):
    path = tmp_path / "x.json"
    race.save(made_up(), path)
    assert markdown(race.load(path)) == markdown(json.loads(json.dumps(made_up())))
