"""One process against several: records that can be repeated, and a section that follows from them alone."""

import json

import pytest

from unify.errors import UnifyError
from unify.evidence import write
from unify.scale import command, rows, section

ON = {"device": "a GPU", "versions": {"torch": "2"}, "date": "2026-11-25"}


def trained(processes, pace, sharding="none", tokens=1000, **more):
    return {"kind": "training", "model": "palimpsa_key", "parameters": 5_000, "length": 100, "precision": "bfloat16",
            "checkpointing": False, "processes": processes, "sharding": sharding, "tokens_a_step": tokens, "rows": 2,
            "warm_up": 10, "timed": 30, "tokens_per_second": pace, "halves": [pace, pace], "loss": 2.5, "peak": 8_000_000_000,
            "steps": 40, "command": f"{processes} {sharding}", **ON, **more}  # fmt: skip


def split(processes, seconds, T=512, **more):
    size = {"B": 1, "T": T, "H": 2, "K": 16, "V": 32}
    return {"kind": "context parallel", "model": "mamba2", "size": size, "dtype": "bfloat16", "processes": processes,
            "error": 2e-3, "seconds": seconds, "range": [seconds, seconds], "repeats": 5, "tokens_per_second": T / seconds,
            "peak": 4_000_000_000, "command": "split", **ON, **more}  # fmt: skip


def test_each_sentence_follows_from_the_records():
    text = section([trained(1, 100.0), trained(2, 190.0, "DDP"), trained(2, 180.0, "FSDP2", peak=6_000_000_000), split(1, 4.0),
                    split(2, 2.5, peak=2_000_000_000)])  # fmt: skip
    start = "- Palimpsa-key, 5,000 parameters, 1,000 tokens a step, 2 processes, "
    end = " times the tokens a second of one with as many tokens a step, of 2 at best; in each "
    assert text.startswith("## On several GPUs\n")
    assert f"{start}DDP: 1.90{end}1.00 times the memory." in text
    assert f"{start}FSDP2: 1.80{end}0.75 times the memory." in text
    assert (
        "- Mamba-2, 512 tokens, 2 processes: 1.60 times the tokens a second of one with as many tokens, of 2 at best; in each 0.50"
        in text
    )
    assert "| Palimpsa-key | 5,000 | 2 | DDP | 1,000 | 2 | bfloat16 | 190 | 1.90 | 8.0 | 1 | 2.500 |" in text
    assert "| Mamba-2 | 1, 512, 2, 16, 32 | bfloat16 | 2 | 2.5 | 2.5 to 2.5 | 205 | 1.60 | 2.0 | 1 | 2.0e-03 |" in text
    assert "30 steps are timed, from when the device has done the 10 before" in text
    assert (
        "- Rows of a single run, without a spread between runs: 5 of 5.\n- More than 2 processes were not tried."
        in text
    )
    assert text.endswith("On a GPU (torch 2), 2026-11-25. By:\n\n    1 none\n    2 DDP\n    2 FSDP2\n    split")
    assert "DDP: 1.40 times" in section(
        [trained(1, 100.0), trained(2, 140.0, "DDP")]
    )  # another number, another sentence


def test_only_what_can_be_compared_is():
    one = trained(1, 100.0)
    weak = section([one, trained(2, 190.0, "DDP", 2000)])
    assert "1.90 times the tokens a second of one with as many tokens a step and process, of 2 at best" in weak
    for other in (
        {"tokens": 3000},
        {"device": "another GPU"},
        {"precision": "float32"},
        {"parameters": 6_000},
        {"checkpointing": True},
    ):
        text = section([one, trained(2, 190.0, "DDP", **other)])
        assert "one process was not timed at this work" in text
        assert "times the tokens" not in text
    assert "times the tokens" not in section([split(1, 4.0), split(2, 2.5, T=768)])


def test_runs_of_the_same_thing_are_one_row():
    found = rows(
        [*(trained(1, x) for x in (80.0, 100.0, 130.0)), trained(2, 150.0, "DDP"), trained(1, 120.0, rows=8)],
        "training",
    )
    assert [(r["tokens_per_second"], r["runs"]) for r in found] == [(100.0, 3), (120.0, 1), (150.0, 1)]
    assert [r["ratio"] for r in found] == pytest.approx(
        [100 / 120, 1.0, 150 / 120]
    )  # the faster of one process is the base
    (row,) = rows([split(2, 2.0, error=1e-2), split(2, 3.0)], "context parallel")
    assert (row["seconds"], row["range"], row["error"], row["runs"]) == (2.5, [2.0, 3.0], 1e-2, 2)


def test_a_pace_that_was_not_steady_is_said():
    assert "1 process: the second half of the steps ran 0.50 times as fast as the first." in section(
        [trained(1, 100.0, halves=[2.0, 1.0])]
    )
    assert "half of the steps" not in section([trained(1, 100.0, halves=[1.0, 1.02])])


def test_the_page_has_the_section_and_refuses_other_lines(tmp_path):
    lines = [trained(1, 100.0, peak=None), trained(2, 150.0, "DDP", peak=None)]
    (tmp_path / "scale.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = write(tmp_path, tmp_path / "page").read_text()
    assert "## In several processes" in text  # no GPU was in it
    assert "DDP: 1.50 times the tokens a second of one with as many tokens a step, of 2 at best.\n" in text
    (tmp_path / "scale.jsonl").write_text('{"kind": "training"}\n')
    with pytest.raises(UnifyError, match="it holds a line that is no record"):
        write(tmp_path, tmp_path / "page")
    with pytest.raises(UnifyError, match="a record of kind 'sums': no such thing is shown here"):
        section([trained(1, 100.0) | {"kind": "sums"}])


def test_a_command_can_be_repeated_elsewhere(tmp_path, monkeypatch):
    assert (
        command("unify", "train", tmp_path / "a.json", "--record", "b/c.jsonl")
        == "python -m unify train a.json --record b/c.jsonl"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command("unify", "train", "a.json") == "torchrun --nproc-per-node 2 -m unify train a.json"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    assert command("unify", "train", "a.json") == "torchrun --nnodes 3 --nproc-per-node 2 -m unify train a.json"
