"""Conversion of flash-linear-attention's models. They run in a process of their own (tests/fla_hosts.py says why)."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from apart import apart
from fla_hosts import FAULTS, HOSTS, IMPORTANCE
from torch import nn

from unify.models.mixers import family

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="flash-linear-attention is for Linux")
SCRIPT = Path(__file__).with_name("fla_hosts.py")
BOUND = 1e-5  # of logits, as parts of the largest
SHARP = 1e-3  # of the embedding's gradient: a sum over everything after it


def report(*arguments: str) -> dict:
    """What the script found. Triton's interpreter, which this process may have asked for, is none of fla's business."""
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory, worker_id):
    """The report on the CPU, made once however many processes run the tests."""
    import fcntl

    base = tmp_path_factory.getbasetemp()
    path = (base if worker_id == "master" else base.parent) / "fla.json"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_text(json.dumps(report()))
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", IMPORTANCE)
@pytest.mark.parametrize("name", HOSTS)
def test_a_converted_host_is_its_host(found, name, kind):
    host = found["hosts"][name]
    errors = host[kind]["errors"]
    assert len(errors) == 9
    assert errors.pop("gradient") < SHARP
    assert max(errors.values()) < BOUND, errors
    assert host["taken back"] == 0


@pytest.mark.parametrize("kind", IMPORTANCE)
@pytest.mark.parametrize("name", HOSTS)
def test_an_importance_has_a_slope_an_effect_and_a_place_in_the_cache(found, name, kind):
    here = found["hosts"][name][kind]
    assert here["slope"] > 1e-5
    assert here["effect"] > 1e-2
    assert max(here["cache"].values()) < BOUND


def test_doubles_are_what_they_stand_for(found):
    assert max(found["doubles"].values()) < 1e-5
    wrong = found["doubles, another epsilon"]
    assert all(error > 1e-3 for name, error in wrong.items() if "norm" in name)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_host_converted_wrongly_is_seen(found, fault):
    errors = found["faults"][fault]
    seen = {name for name, error in errors.items() if error > 100 * BOUND}
    decoding = {"decoding", "decoding, padded on the right", "beams"}
    padded = {"short, padded", "long, padded"}
    assert seen == dict(zip(FAULTS, (set(errors), decoding, decoding | padded), strict=True))[fault]


def allowed(what: str, rounding: float) -> float:
    """How far from the host in float32 a converted host may be in half precision, where the host itself is `rounding` from it."""
    return 1.5 * rounding if what == "gradient" else 2 * rounding + 1e-2


@pytest.mark.parametrize("name", ["gla", "retnet"])
def test_a_wrong_gradient_is_told_from_rounding(found, name):
    here = found["halves"][name]
    assert here["converted"] < allowed("gradient", here["host"]) < here["wrong"]


def test_wrong_groups_are_seen(found):
    """fla's torch path pairs heads with other groups than its kernels and transformers do, which is why it is no oracle."""
    assert {name for name, host in found["hosts"].items() if host["host"] > 1e-2} == {
        "mamba2, 2 groups",
        "mamba2, 4 groups",
    }


def test_folders_of_fla_models_are_opened_converted_and_loaded(found):
    here = found["folders"]
    assert not here["imported"]
    assert (here["kind"], here["mixers"]) == ("gla", ["GatedLinearAttention"] * 2)
    assert [name.split(".")[0] for name in here["mamba2"]] == ["transformers", "fla", "transformers"]
    assert "GLAForCausalLM: it does not run here" in here["without kernels"]
    assert max(here["checked"].values()) < BOUND
    assert max(here["loaded"].values()) == 0
    assert max(here["unchecked"].values()) < BOUND


def test_mixers_that_use_a_known_operator_otherwise_are_left_alone(found):
    assert found["strangers"] == []


@pytest.mark.parametrize("name", ["Mamba2", "MiniMaxLightningAttention"])
def test_a_class_of_the_same_name_elsewhere_is_not_taken_for_a_mixer(name):
    assert family(type(name, (nn.Module,), {"__module__": "mamba_ssm.modules.mamba2"})()) is None


def test_the_first_choice_that_runs_is_taken(tmp_path):
    (tmp_path / "choices.py").write_text(CHOICES)  # triton.jit reads a function's file
    code = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, '.']; import choices"
    assert apart(code, tmp_path) == ["tried 3", "chosen 2.0, tried 2"]


CHOICES = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton
import triton.language as tl
from triton.runtime.autotuner import OutOfResources
from fla_hosts import untuned

@triton.jit
def kernel(out, N: tl.constexpr):
    tl.store(out, N)

def chosen():
    tried = []
    def timed(call, quantiles):
        tried.append(call)
        if len(tried) == 1:
            raise OutOfResources(2, 1, "shared memory")
        call()
        return [0.1 / len(tried)] * 3
    tuned = triton.autotune([triton.Config({"N": n}) for n in (1, 2, 3)], key=["out"], do_bench=timed)(kernel)
    tuned[(1,)](out := torch.zeros(1))
    return out.item(), len(tried)

print("tried", chosen()[1])
untuned()
print("chosen {}, tried {}".format(*chosen()))
"""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not list(metadata.distributions(name="fla-core")), reason="needs flash-linear-attention")
def test_converted_hosts_round_as_their_hosts_on_a_gpu():
    wrong = []
    for name, host in report("--device", "cuda")["hosts"].items():
        for kind in IMPORTANCE:
            here = host[kind]
            pairs = [(x, what, allowed(what, host["rounding"][what])) for what, x in here["errors"].items()]
            pairs += [
                (x, f"float32 {what}", SHARP if what == "gradient" else 1e-4) for what, x in here["float32"].items()
            ]
            pairs += [(x, f"cache {what}", 5e-2) for what, x in here["cache"].items()]
            wrong += [(name, kind, what, found, bound) for found, what, bound in pairs if not found < bound]
            wrong += [(name, kind, "slope", here["slope"], 1e-5)] if not here["slope"] > 1e-5 else []
    assert not wrong, json.dumps(wrong)
