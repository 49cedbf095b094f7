"""`unify bytes`: what is held out, what is measured, equal parameters, runs that repeat, sweeps that go on, the page."""

import json
import math
import random
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from apart import apart
from test_cli import complaint, too_wide
from test_cli import unify as command

from unify.bytes import run as running
from unify.bytes import sweep as sweeping
from unify.bytes.corpus import Corpus, held_out
from unify.bytes.measure import CUE, buckets, by_position, measure, recall, repeats
from unify.bytes.report import section, standings
from unify.bytes.run import MODELS, POINTS, Run, Trainee, config, cost, order, train
from unify.bytes.sweep import affordable, begun, grid, load, paces, seconds, sweep
from unify.errors import UnifyError

SMALL = {"steps": 3, "batch": 2, "length": 32, "d_model": 16, "layers": 1, "head_dim": 8, "windows": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty files, among them a copy, one that is no text and an empty one."""
    root, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    for n in range(60):
        (root / f"sub{n % 3}").mkdir(exist_ok=True)
        words = " ".join(draw.choice(["alpha", "beta_gamma", "delta", "value"]) + str(n) for _ in range(30))
        (root / f"sub{n % 3}" / f"{n}.py").write_text(words)
    (root / "copy.py").write_text((root / "sub0" / "0.py").read_text())
    (root / "nul.py").write_bytes(b"binary\0file" * 50)
    (root / "empty.py").touch()
    return root


@pytest.fixture(scope="module")
def corpus(folder):
    return Corpus.read([folder], length=32, size=4000, windows=8, share=0.2)


# -- the text ----------------------------------------------------------------------------------------------------------


def documents(corpus):
    return corpus.stream.tobytes().split(b"\0")


def test_held_out_files_are_kept_from_training(folder):
    whole = Corpus.read([folder], length=32, size=10**6, windows=10**6, share=0.2)
    apart = [p.read_bytes() for p in folder.rglob("*.py") if held_out(p.relative_to(folder).as_posix(), 0.2)]
    assert 5 < len(apart) < 20
    trained = documents(whole)[:-1]
    assert not set(trained) & set(apart)
    assert all(any(window.tobytes() in text for text in apart) for window in whole.windows)
    assert len({w.tobytes() for w in whole.windows}) == len(whole.windows)
    texts = {p.read_bytes() for p in folder.rglob("*.py")} - {b"", b"binary\0file" * 50}
    assert sorted([*trained, *(set(apart) & texts)]) == sorted(texts)  # each text once, copies too, but what is no text
    assert whole.files == len(trained)
    assert whole.names == {word for text in trained for word in text.split()}


def test_the_text_is_the_same_wherever_it_lies(folder, corpus, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "elsewhere")
    again = Corpus.read([tmp_path / "elsewhere"], length=32, size=4000, windows=8, share=0.2)
    assert (again.digest, again.names) == (corpus.digest, corpus.names)
    assert len(again.stream) == 4000
    next((tmp_path / "elsewhere").rglob("5.py")).write_text("changed " * 40)
    (changed,) = [Corpus.read([tmp_path / "elsewhere"], length=32, size=10**6, windows=8, share=0.2)]
    assert changed.digest != Corpus.read([folder], length=32, size=10**6, windows=8, share=0.2).digest


def test_what_holds_no_text_is_refused(folder, tmp_path):
    for more, sentence in (
        ({"folders": [tmp_path / "no"]}, "no such file or folder"),
        ({"pattern": "*.rs"}, "matches"),
        ({"length": 4000}, "none held out has 4000 bytes"),
        ({"share": 1.0}, "do not fill one row"),
    ):
        with pytest.raises(UnifyError, match=sentence):
            Corpus.read(**{"folders": [folder], "length": 32, **more})


# -- what is measured --------------------------------------------------------------------------------------------------


def window(text, length=160):
    return np.frombuffer(text.ljust(length, b"."), np.uint8)[None]


def test_repeats_are_found_where_they_stand():
    text = b"cut_off = 1; quaternion + short + quaternion - 7quaternion; knownname knownname quaternion quaternions"
    found = repeats(window(text, len(text)), {b"knownname"})
    at = [text.index(b"quaternion"), text.index(b"quaternion -"), text.index(b"quaternion quaternions")]
    assert found.start.tolist() == at[1:]  # what follows a digit, is short, known or longer is another thing
    assert found.first.tolist() == [at[0], at[0]]
    assert found.distance.tolist() == [at[1] - at[0], at[2] - at[1]]
    assert found.length.tolist() == [10, 10]
    twice = repeats(np.concatenate([window(b" zephyrine "), window(b" zephyrine ")]), set())
    assert len(twice.row) == 0  # another window is no context
    edge = b"zephyrine zephyrine zephyrine"
    assert repeats(window(edge, len(edge)), set()).start.tolist() == []  # both ends may be parts of longer names


def copies(windows):
    """Bits and hits of a model that repeats what followed the last three bytes when they last stood there, and else guesses."""
    bits, hits = np.full(windows.shape, 8.0, np.float32), np.zeros(windows.shape, bool)
    for row, text in enumerate(w.tobytes() for w in windows):
        for t in range(1, len(text)):
            before = text[:t].rfind(text[t - 3 : t], 0, t - 1) if t > 3 else -1
            if before >= 0:
                hits[row, t] = text[before + 3] == text[t]
                bits[row, t] = 0.0 if hits[row, t] else 16.0
    return bits, hits


def test_one_that_copies_recalls_everything_and_one_that_guesses_nothing():
    names = [b"quaternion", b"zephyrine", b"logarithm", b"xylophone"]
    windows = window(b" ".join([b"(", *names, b"+", *names[::-1], b";", *names, b")"]), 256)
    found = repeats(windows, set())
    assert len(found.row) == 8
    bits, hits = copies(windows)
    every = recall(bits, hits, found)[-1]
    assert (every["accuracy"], every["bits"]) == (1.0, 0.0)
    assert (every["first_accuracy"], every["first_bits"]) == (0.0, 8.0)
    assert (every["repeats"], every["bytes"]) == (8, 2 * sum(len(n) - CUE for n in names))
    guess = recall(np.full_like(bits, 8.0), np.zeros_like(hits), found)
    assert all((x["accuracy"], x["bits"] - x["first_bits"]) == (0.0, 0.0) for x in guess)
    assert sum(x["repeats"] for x in guess[:-1]) == 8
    near, far = (found.distance < 64), (found.distance >= 64)
    forgets = bits.copy()  # and one that forgets after 64 bytes is seen to
    for start in found.start[far]:
        forgets[0, start : start + 11] = 8.0
    by = {x["from"]: x for x in recall(forgets, hits, found)[:-1]}
    assert near.any()
    assert far.any()
    assert by[1]["bits"] == 0.0
    assert by[64]["bits"] > 6


def test_the_cue_is_not_scored():
    windows = window(b" quaternion quaternion ")
    found, bits = repeats(windows, set()), np.zeros(windows.shape, np.float32)
    bits[0, 12 : 12 + CUE], bits[0, 22:] = 100, 100  # the cue, and what follows the name
    bits[0, 12 + CUE] = 7
    assert recall(bits, bits < 0, found)[-1]["bits"] == 7 / (10 - CUE)


def test_position_buckets_cover_every_byte_after_the_first():
    assert buckets(2048) == [(1, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048)]
    assert buckets(100) == [(1, 64), (64, 100)]
    assert buckets(32) == [(1, 32)]
    bits = np.broadcast_to(np.arange(128.0), (3, 128))
    assert [x["bits"] for x in by_position(bits)] == [32.0, 95.5]
    assert measure(bits, bits > 63, repeats(window(b"", 128), set()))["bits"] == 64.0
    assert measure(bits, bits > 63, repeats(window(b"", 128), set()))["accuracy"] == 64 / 127


# -- a run -------------------------------------------------------------------------------------------------------------


def test_models_of_a_comparison_have_equal_parameters():
    wanted = cost(config(Run("transformer")))["parameters"]
    plain = {m: cost(running._config(Run(m)))["parameters"] for m in MODELS}
    for model in MODELS:
        assert abs(cost(config(Run(model)))["parameters"] / wanted - 1) < 0.003
    assert max(plain.values()) / min(plain.values()) > 1.05  # which they would not have by themselves


@pytest.mark.parametrize("model", MODELS)
def test_every_model_of_the_comparison_trains(model, corpus):
    record = train(Run(model, **SMALL), corpus)
    assert np.isfinite(record["curve"]).all()
    assert record["parameters"] == sum(p.numel() for p in Trainee(Run(model, **SMALL), "cpu").parameters)
    assert json.loads(json.dumps(record))["run"] == asdict(Run(model, **SMALL))
    assert record["read"] == 6 * 32


def test_bits_are_transformers_own_loss_and_see_no_later_byte(corpus):
    trainee = Trainee(Run("palimpsa_key", **SMALL), "cpu")
    windows = torch.from_numpy(corpus.windows.copy())
    bits, hits = trainee.read(windows, 3)
    with torch.no_grad():
        out = trainee.model(windows.long(), labels=windows.long())
    assert bits[:, 1:].mean() == pytest.approx(out.loss.item() / math.log(2), rel=1e-5)
    assert (hits[:, 1:] == (out.logits[:, :-1].argmax(-1) == windows[:, 1:]).numpy()).all()
    assert not bits[:, 0].any()
    changed = windows.clone()
    changed[:, 20] += 1
    again, _ = trainee.read(changed, 3)
    assert np.allclose(again[:, :20], bits[:, :20], atol=1e-5)
    assert not np.allclose(again[:, 20:], bits[:, 20:], atol=1e-2)


def test_a_run_learns_and_repeats(corpus):
    run, said = Run("transformer", lr=1e-2, **{**SMALL, "steps": 40}), []
    record = train(run, corpus, progress=lambda *a: said.append(a))
    assert len(record["curve"]) == len(said) == POINTS
    assert record["curve"][-1][0] == run.tokens == 40 * 2 * 32
    assert record["curve"][-1][1] < record["curve"][0][1] - 1.5
    assert record["curve"][-1][2] == pytest.approx(record["bits"], abs=1e-6)  # the rate is 0 in the end
    assert train(run, corpus)["curve"] == record["curve"]
    assert train(replace(run, seed=2), corpus)["curve"] != record["curve"]


def test_a_compiled_run_is_the_run(tmp_path):
    """In a process of its own, where signatures are not checked; and the last of many is compiled too."""
    (tmp_path / "a.py").write_text("".join(f"name_{n % 7} = {n}\n" for n in range(400)))
    (tmp_path / "b.py").write_text("".join(f"other_{n % 5} = {n}\n" for n in range(400)))
    code = (
        "import torch\nfrom pathlib import Path\nfrom unify.bytes.corpus import Corpus\nfrom unify.bytes.run import Run\n"
        "from unify.bytes.sweep import sweep\n"
        "corpus = Corpus.read(['.'], length=32, size=4000, windows=8, share=0.5)\n"
        "torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 1, True\n"
        f"runs = [Run('palimpsa_key', seed=n, **{SMALL}) for n in (1, 2)]\n"
        "made, whole = [], torch.compile\n"
        "torch.compile = lambda f, **_: made.append(1) or whole(f, backend='eager', dynamic=False)\n"
        "plain, compiled = (sweep(runs, corpus, Path(f'{x}.jsonl'), compiled=x) for x in (False, True))\n"
        "same = [abs(a['bits'] - b['bits']) < 1e-4 for a, b in zip(plain, compiled, strict=True)]\n"
        "print(len(made), same, [x['on'].endswith('torch.compile') for x in (*plain, *compiled)])"
    )
    assert apart(code, tmp_path) == ["2 [True, True] [False, False, True, True]"]


def test_models_see_the_same_rows_and_every_row_before_one_again():
    run = Run("transformer", **{**SMALL, "steps": 10})
    rows = order(8, run).flatten()
    assert torch.equal(rows, order(8, replace(run, model="mamba2", lr=1.0)).flatten())
    assert not torch.equal(rows, order(8, replace(run, seed=2)).flatten())
    assert sorted(rows[:8].tolist()) == sorted(rows[8:16].tolist()) == list(range(8))
    assert len(rows) == 20


def test_sizes_that_do_not_fit_are_refused():
    for more, sentence in (({"model": "mamba3x"}, "no such model"), ({"steps": 0}, "size is empty"),
                           ({"head_dim": 5}, "whole number of heads")):  # fmt: skip
        with pytest.raises(UnifyError, match=sentence):
            Run(**{"model": "mamba2", **more})


# -- a sweep -----------------------------------------------------------------------------------------------------------


def test_a_sweep_keeps_what_is_finished_and_goes_on(corpus, tmp_path):
    path, said = tmp_path / "runs.jsonl", []
    runs = grid(["mamba2", "transformer"], [1e-2], [1, 2], **SMALL)
    assert [(r.model, r.seed) for r in runs] == [
        ("mamba2", 1), ("transformer", 1), ("mamba2", 2), ("transformer", 2)
    ]  # fmt: skip
    first = sweep(runs[:2], corpus, path)
    path.write_text(path.read_text() + '{"key": "cut o')  # a kill in the middle of a line
    bad = replace(runs[0], lr="fast")
    again = sweep([*runs[:3], bad], corpus, path, say=lambda key, news: said.append((key, news["phase"])))
    assert again[:2] == first
    text = {"text": corpus.digest}
    assert {key for key, phase in said if phase == "running"} == {replace(runs[2], **text).key}
    assert {key for key, phase in said if phase == "failed"} == {replace(bad, **text).key}
    assert len(load(path)) == 3
    assert begun(runs, path) == 3
    assert begun([replace(runs[0], d_model=32)], path) is None
    path.write_text('{"key": 1, "accuracy": 1}\n')
    with pytest.raises(UnifyError, match="runs of another kind"):
        load(path)


def test_minutes_are_spent_and_not_overspent(corpus, tmp_path, monkeypatch):
    runs = grid(["mamba2", "transformer"], [1e-3], [1, 2], batch=16, windows=512)
    takes = {"mamba2": (0.05, 0.02), "transformer": (0.03, 0.01)}
    steps = affordable(runs, takes, 300.0)
    spent = lambda n: sum(seconds(replace(r, steps=n), takes) for r in runs) + sweeping.STARTING  # noqa: E731
    assert spent(steps) <= 300 * sweeping.SPARE < spent(steps + 10)
    # half of it for half of the models
    assert affordable([r for r in runs if r.model == "mamba2"], takes, 300.0) > steps
    with pytest.raises(UnifyError, match="fewer models, or more minutes"):
        affordable(runs, takes, 20.0)
    with pytest.raises(UnifyError, match="none of them runs here"):
        affordable(runs, {}, 300.0)
    said = []
    late = sweep(grid(["transformer"], [1e-3], [1], **SMALL), corpus, tmp_path / "r.jsonl", takes=takes,
                 until=time.monotonic() + 1, say=lambda key, news: said.append(news["phase"]))  # fmt: skip
    assert (late, said) == ([], ["left"])


def test_a_model_that_does_not_run_is_left_out_of_the_plan(monkeypatch):
    def fails(run, device, compiled):
        if run.model == "mamba2":
            raise RuntimeError("no kernel")
        return 0.1, 0.1

    monkeypatch.setattr(sweeping, "pace", fails)
    said = {}
    runs = grid(["mamba2", "transformer"], [1e-3], [1, 2], **SMALL)
    assert paces(runs, "cpu", lambda key, news: said.setdefault(news["phase"], []).append(key)) == {
        "transformer": (0.1, 0.1)
    }
    assert (len(said["failed"]), len(said["timed"])) == (1, 1)
    assert affordable(runs, {"transformer": (0.1, 0.1)}, 100.0) > 10


def test_steps_are_timed():
    step, reading = running.pace(Run("transformer", **SMALL), "cpu", repeats=1)
    assert 0 < reading < 10
    assert 0 < step < 10


# -- what they show ----------------------------------------------------------------------------------------------------


def made(model, bits, lr=1e-3, seed=1, **more):
    """A record as `train` makes it, with given bits."""
    run = Run(model, lr, seed, **{**SMALL, "length": 128, **more})
    positions = [{"from": a, "to": b, "bits": bits - a / 1000} for a, b in buckets(128)]
    found = {"repeats": 5, "bytes": 20, "bits": bits / 2, "first_bits": bits, "accuracy": 0.75, "first_accuracy": 0.25}
    recalled = [{"from": a, "to": b, **found} for a, b in [*buckets(128), (1, 128)]]
    return {"run": asdict(run), "key": run.key, "parameters": 100, "state": 10, "flops": 7, "bits": bits, "accuracy": 0.5,
            "positions": positions, "recall": recalled, "width": 8, "curve": [[100, 3.0, 3.0], [200, bits, bits]], "files": 2,
            "text": 300, "read": 768, "pace": 1000.0, "seconds": 1.0, "on": "a test"}  # fmt: skip


RECORDS = [made("palimpsa", 2.0), made("palimpsa", 2.4, seed=2), made("palimpsa", 2.1, lr=1e-2), made("palimpsa", 2.9, lr=1e-2, seed=2),
           made("transformer", 2.5)]  # fmt: skip


def test_the_rate_is_chosen_by_the_mean_and_the_spread_is_shown(tmp_path):
    found = standings(RECORDS)
    assert [(s.run.model, s.run.lr, s.bits, s.lrs) for s in found] == [
        ("transformer", 1e-3, (2.5,), 1), ("palimpsa", 1e-3, (2.0, 2.4), 2)
    ]  # fmt: skip
    page = section([*RECORDS, made("mamba2", 1.0, steps=2)], tmp_path)
    row = "| Palimpsa | 2.200 | 2.000 to 2.400 | 2 | 0.001, best of 2 | 2.136 | 75.0% | 25.0% | 1.10 | 100 | 10 | 7 | 1,000 |"
    assert row in page
    tables = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert len(set(tables)) == 1
    assert page.index("| Palimpsa |") < page.index("2 steps") < page.index("| Mamba-2 |")  # what saw less stands apart
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bytes-2.png", "bytes-2.svg", "bytes.png", "bytes.svg"]
    assert all(f.stat().st_size > 1000 for f in tmp_path.iterdir())
    with pytest.raises(UnifyError, match="nothing to show"):
        section([], tmp_path)


def test_sentences_follow_from_the_numbers(tmp_path):
    page = section([*RECORDS, made("transformer", 2.2, seed=2)], tmp_path)
    assert "- Bits per byte: Palimpsa below Transformer in 1 of 2 seeds: 2.200 ± 0.283 against 2.350 ± 0.212.\n" in page
    assert "- Bits a byte saved where a name comes again: Transformer 1.18, Palimpsa 1.10.\n" in page
    assert "- Fewer than 3 seeds: 2 of the 2 rows.\n" in page
    assert (
        f"- Training was short: {Run('palimpsa', **{**SMALL, 'length': 128}).tokens / 100:.1f} bytes a parameter.\n"
        in page
    )
    assert "names. 4 runs one after the other, 0.1 minutes in all." in page


def test_a_text_without_repeats_is_shown(tmp_path):
    assert "| Transformer | 2.500 |" in section([{**made("transformer", 2.5), "recall": []}], tmp_path)


@pytest.mark.slow
def test_the_command_line(folder, tmp_path):
    small = [
        "--toy",
        "-m",
        "transformer,palimpsa_key",
        "--length",
        "64",
        "--batch",
        "2",
        "--windows",
        "8",
        "--device",
        "cpu",
    ]
    where = ["-o", tmp_path / "r.jsonl", "--report", tmp_path / "page"]
    page = command("bytes", folder, *small, *where, "--tokens", "1280")
    assert too_wide(page) == []
    assert "Palimpsa-key" in page
    assert "| Transformer |" in (tmp_path / "page" / "bytes.md").read_text()
    again = json.loads(command("bytes", folder, *small, *where, "--minutes", "1", "--json"))
    assert [r["run"]["steps"] for r in again] == [10, 10]  # nothing was trained again


def test_mistakes_on_the_command_line(tmp_path):
    assert "no such model" in complaint("bytes", "--models", "palimpso")
    assert "no list of numbers" in complaint("bytes", "--seeds", "one")
    assert "nothing is trained there" in complaint("bytes", "--device", "tpu")
    assert "no such file or folder" in complaint(
        "bytes", str(tmp_path / "no"), "--toy", "-o", str(tmp_path / "r.jsonl")
    )
