"""A sequence over 2 and 4 processes is the sequence in one: outputs, variances, states, every gradient; layers too."""

import json
import multiprocessing

import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing import ProcessRaisedException

import unify
from unify.carry import carries
from unify.distributed import Bench, _apart, compose, effect, main
from unify.errors import UnifyError
from unify.models.layer import Layer
from unify.models.zoo import ZOO, get
from unify.testing import assert_close, random_inputs, triples
from unify.verify import tokens

REFUSED = """deltanet gated_deltanet kda gated_deltanet2 comba comba_decayed gated_deltaproduct rwkv7 preconditioned_gdn
    preconditioned_kda longhorn kla kdn mean_field_delta meta_deltanet meta_gdn meta_kda""".split()
ALLOWED = [name for name in ZOO if name not in REFUSED]
GATES = {"rodimus": "weak"}  # its key is a power of -g, whose gradient is infinite at g = 0
CASES = {
    2: [
        *((name, GATES.get(name, "mixed")) for name in (*ALLOWED, *ranks.OTHERS)),
        *((name, "closed") for name in ("palimpsa", "gla")),
    ],
    4: [("palimpsa", "weak"), ("palimpsa", "closed"), ("meta_gla", "closed"), ("mesanet", "weak"), ("rwkv6", "weak")]
    + [(name, "mixed") for name in ranks.OTHERS],
}


def joined(parts, statics):
    """The pieces' results as one: rows one after the other, shares added up, and what all ranks know once."""
    out = {}
    for name in parts[0]:
        found = [part[name] for part in parts]
        if name in statics:
            out[name] = sum(found)
        elif name in ("o", "variance", "y", "d x") or (name.startswith("d ") and not name.startswith("d start.")):
            out[name] = torch.cat(found, 1)
        elif name.startswith("d start."):
            assert all(x is None for x in found[1:])
            out[name] = found[0]
        else:
            assert all(torch.equal(x, found[0]) for x in found), f"ranks differ in {name}"
            out[name] = found[0]
    return out


def compare(parts, whole, statics):
    for name, x in joined(parts, statics).items():
        assert_close(x, whole[name], 1e-10, name)


def compare_op(parts, case):
    op = unify.compile(ranks.triple(case[0]))
    x, start = ranks.arguments(op, case[1])
    whole = ranks.outcome(op, op, x, start, slice(None), True)
    compare(parts, whole, {f"d {a.name}" for a in op.recurrence.inputs if a.per == "static"})


def compare_layer(parts, name):
    layer = ranks.layer(name)
    whole = ranks.layer_outcome(layer, ranks.rows(), slice(None), True)
    compare(parts, whole, {f"d {n}" for n, _ in layer.named_parameters()})


@pytest.fixture(scope="module", params=(2, 4))
def spawned(request, tmp_path_factory):
    """World size and what each rank found; processes are started once for all cases."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(
        ["unify.testing", "unify.distributed", "unify.models.layer"]
    )  # imported once
    torch.multiprocessing.start_processes(
        ranks.run, (world, str(folder), CASES[world], list(ranks.LAYERS)), world, start_method="forkserver"
    )
    return world, [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def test_every_op_that_is_allowed_over_several_processes(spawned):
    world, found = spawned
    for case in CASES[world]:
        compare_op([one[case] for one in found], case)


def test_layers_over_several_processes(spawned):
    _, found = spawned
    for name in ranks.LAYERS:
        compare_layer([one[name] for one in found], name)


def test_a_piece_left_out_is_seen(spawned):
    _, found = spawned
    with pytest.raises(AssertionError, match="o is off by"):
        compare_op([one["planted"] for one in found], ranks.PLANTED)


def test_a_time_has_a_right_answer(spawned):
    world, found = spawned
    timed = found[0]["timed"]
    assert (
        timed.items()
        >= {
            "kind": "context parallel",
            "model": "palimpsa",
            "processes": world,
            "repeats": 3,
            "dtype": "float32",
        }.items()
    )
    assert 0 < timed["error"] < 1e-5  # rounding in float32
    assert 0 < timed["range"][0] <= timed["seconds"] <= timed["range"][1]
    assert timed["tokens_per_second"] == pytest.approx(2 * 48 / timed["seconds"])
    planted = [one["timed, planted"] for one in found]
    assert all("seconds" not in x for x in planted)
    assert all(x["error"] == planted[0]["error"] > 2e-2 for x in planted)  # the first rank's own piece is right


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_process_is_the_op_in_half_precision_too(alone):
    op = unify.compile(get("palimpsa").triple)
    x = random_inputs(op, dtype=torch.float32)
    x |= {name: x[name].bfloat16() for name in "qkv"}
    o, state = unify.context_parallel(op)(**x, output_final_state=True)
    want, last = op(**x, output_final_state=True)
    assert o.dtype == want.dtype
    assert torch.equal(o, want)
    for name, y in last._asdict().items():
        assert_close(getattr(state, name), y, 1e-6, name)


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_that_must_be_known_is_refused(name):
    with pytest.raises(
        UnifyError, match=r"what a piece does to \w+ is not known before .*; use states that only decay"
    ):
        unify.context_parallel(unify.compile(get(name).triple))


def test_what_cannot_be_split_is_refused(alone):
    op = unify.compile(get("mamba2").triple)
    x, far = random_inputs(op, B=1), unify.context_parallel(op)
    with pytest.raises(UnifyError, match=r"packed or padded .* give each rank whole sequences"):
        far(**x, cu_seqlens=torch.tensor([0, 5, 12]))
    with pytest.raises(UnifyError, match=r"it takes an op; pass unify\.compile"):
        unify.context_parallel(get("mamba2").triple)
    layer = Layer(op.triple, 12, 2, 4).context_parallel()
    with pytest.raises(UnifyError, match="the next one needs its last 3; use longer pieces"):
        layer(torch.zeros(1, 2, 12))
    with pytest.raises(UnifyError, match="packed or padded"):
        layer(torch.zeros(1, 5, 12), attention_mask=torch.ones(1, 5, dtype=torch.int64))


SMALL = ["--bench", "--world", "1", "--device", "cpu", "--size", "1,40,2,4,4", "--repeats", "1"]


def test_the_command_keeps_the_figures_of_every_model(tmp_path, capsys):
    main([*SMALL, "--model", "palimpsa_key,mamba2", "--json", str(tmp_path / "scale.jsonl")])
    key, mamba = map(json.loads, (tmp_path / "scale.jsonl").read_text().splitlines())
    assert (key["model"], mamba["model"]) == ("palimpsa_key", "mamba2")
    assert key["size"] == {"B": 1, "T": 40, "H": 2, "K": 4, "V": 4}
    assert (
        key["command"]
        == f"python -m unify.distributed {' '.join(SMALL)} --model palimpsa_key,mamba2 --json scale.jsonl"
    )
    assert key["device"].startswith("a CPU")
    assert key["versions"]["torch"] == torch.__version__
    assert "mamba2, 1 process: " in capsys.readouterr().out


def test_one_process_is_timed_against_two(tmp_path, capsys):
    two = [*SMALL[:2], "2", *SMALL[3:], "--model", "mamba2", "--json", str(tmp_path / "scale.jsonl")]
    main(two)
    lines = [json.loads(line) for line in (tmp_path / "scale.jsonl").read_text().splitlines()]
    assert [(x["model"], x["processes"]) for x in lines] == [("mamba2", 1), ("mamba2", 2)]
    assert all(x["error"] < 1e-5 and x["seconds"] > 0 for x in lines)
    assert "mamba2, 2 processes: " in capsys.readouterr().out
    with pytest.raises(ProcessRaisedException, match="no such device"):  # planted: the processes end in an error
        _apart(2, (2, str(tmp_path / "meet"), Bench(("mamba2",), (1, 40, 2, 4, 4), "no such device")), print)


def test_a_model_that_is_wrong_has_no_time_and_others_keep_theirs(tmp_path, monkeypatch):
    def spoilt(op, q, *rest, call=unify.Op.__call__, **more):
        wrong = op.triple == get("mamba2").triple and q.dtype == torch.float32  # what it is judged by is right
        return call(op, q, *rest, **more) * (1.1 if wrong else 1.0)

    monkeypatch.setattr(unify.Op, "__call__", spoilt)
    with pytest.raises(SystemExit, match="not timed: mamba2, 1 process"):
        main([*SMALL, "--model", "palimpsa_key,mamba2", "--json", str(tmp_path / "scale.jsonl")])
    (line,) = (tmp_path / "scale.jsonl").read_text().splitlines()
    assert json.loads(line)["model"] == "palimpsa_key"


def test_one_process_without_a_group_is_refused():
    op = unify.compile(get("mamba2").triple)
    with pytest.raises(UnifyError, match=r"there is no process group; call torch\.distributed"):
        unify.context_parallel(op)(**random_inputs(op))


@given(st.data())
def test_pieces_of_random_triples_compose(data):
    op = unify.compile(data.draw(triples()))
    try:
        carried = carries(op.recurrence, op.structure)
    except UnifyError:
        return
    x = random_inputs(op, data.draw(st.integers(0, 99)), T=12)
    cuts = sorted(data.draw(st.sets(st.integers(1, 11), min_size=1, max_size=3)))
    first, *rest = (tokens(op, x, a, b) for a, b in zip((0, *cuts), (*cuts, 12), strict=True))
    n, start = len(carried), op(**first, output_final_state=True)[-1]
    effects = [(*(torch.zeros_like(y) for y in start), *start), *(effect(op, carried, piece) for piece in rest)]
    for found, want, name in zip(
        compose(effects, n)[-1], op(**x, output_final_state=True)[-1], start._fields, strict=True
    ):
        assert_close(found, want, 1e-10, name)
