"""The comparison of a host and its metaplastic self, at toy size: its figures are there and its error can be large."""

import json
from pathlib import Path

import pytest
from hosts import host
from test_convert import awake

from unify.models import throughput


def test_a_record_of_host_and_converted(tmp_path, capsys):
    host("mamba2").config.save_pretrained(tmp_path)
    where = ["--config", str(tmp_path), "--json", str(tmp_path / "record.json")]
    throughput.main([*where, "--device", "cpu", "--dtype", "float32", "--prompt", "40", "--steps", "3"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert list(record["variants"]) == ["host", "key", "diagonal"]
    assert record["variants"]["host"]["error"] == 0 == record["variants"]["host"]["exact"]
    assert all(0 < record["variants"][v][x] < 1e-5 for v in ("key", "diagonal") for x in ("exact", "error", "rounding"))
    assert all(v["prefill"] > 0 and v["decode"] > 0 for v in record["variants"].values())
    assert record["parameters"] == sum(p.numel() for p in host("mamba2").parameters())
    assert "torch" in record["on"]
    assert capsys.readouterr().out.count("\n") == 3


def test_the_readme_says_what_was_recorded():
    root = Path(__file__).parents[1]
    record = json.loads((root / "benchmarks" / "convert.json").read_text())
    assert throughput.in_words(record) in " ".join((root / "README.md").read_text().split())
    assert throughput.in_words(record | {"prompt": 7}) not in " ".join((root / "README.md").read_text().split())


def test_the_error_sees_an_importance(tmp_path, monkeypatch):
    import torch

    whole = throughput.metaplastic
    monkeypatch.setattr(throughput, "metaplastic", lambda *a, **o: awake(whole(*a, **o)))
    sizes = {"device": "cpu", "dtype": torch.float32, "prompt": 40, "steps": 1, "repeats": 1}
    record = throughput.measure(host("qwen3_next").config, **sizes)
    assert record["variants"]["key"]["error"] > 1e-5


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16():
    import torch

    config = host("mamba2").config
    record = throughput.measure(config, device="cuda", dtype=torch.bfloat16, prompt=300, steps=2, repeats=1)
    assert all(v["error"] < 2e-2 and v["peak"] > 0 for v in record["variants"].values())
