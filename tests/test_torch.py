"""Ops as torch's other machinery sees them: torch.compile, torch.library, autocast, CUDA graphs.

Every comparison is of a call with the plain call of the same op: what the plain call computes is tested elsewhere.
"""

import functools
import importlib
import pkgutil

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

pytest.importorskip("triton")

import unify.kernels
from unify.errors import UnifyError
from unify.lower import graph, launch
from unify.models.zoo import ZOO, get
from unify.op import compile
from unify.testing import assert_close, random_inputs, random_state

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["torch", "triton"]


def everything(op, x, state=None, **options):
    o, variance, final = op(**x, initial_state=state, return_variance=True, output_final_state=True, **options)
    return [o, variance, *final]


def graded(run, x, state):
    """Outputs, then gradients of a fixed weighting of all of them by arguments and state, zeros where there is none."""
    x = {n: y.detach().clone().requires_grad_() for n, y in x.items()}
    state = [y.detach().clone().requires_grad_() for y in state]
    out = run(x, tuple(state))
    weights = [torch.linspace(-1, 1, y.numel(), device=y.device).bfloat16().to(y.dtype).view_as(y) for y in out]
    loss = sum((y * w).sum() for y, w in zip(out, weights, strict=True))
    return [*out, *torch.autograd.grad(loss, [*x.values(), *state], materialize_grads=True)]


def same(found, expected, rtol=1e-10):
    assert len(found) == len(expected)
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        assert_close(a.detach(), b.detach(), rtol, f"result {n}")


def case(name, backend, T, device="cpu", dtype=torch.float64, **sizes):
    op = compile(get(name).triple, backend)
    sizes = {"B": 1, "T": T, "H": 1, "K": 3, "V": 2} | sizes
    x = random_inputs(compile(op.triple, "reference"), **sizes, gates="moderate")
    state = random_state(compile(op.triple, "reference"), x)
    return op, {n: y.to(device, dtype) for n, y in x.items()}, [y.to(device, dtype) for y in state]


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ZOO)
def test_every_model_is_one_graph_forward_and_backward(name, backend, monkeypatch):
    """AOT autograd alone: it is what traces the op, and Inductor only sees what it found."""
    monkeypatch.setattr(launch, "SHORT", 1)  # the parallel families, for a length that is quickly interpreted
    op, x, state = case(name, backend, 2)
    run = lambda x, state: everything(op, x, state)  # noqa: E731
    same(graded(torch.compile(run, fullgraph=True, backend="aot_eager"), x, state), graded(run, x, state))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["palimpsa_key", "gated_deltanet"])
def test_inductor(name, backend, device, monkeypatch):
    monkeypatch.setattr(launch, "SHORT", 1)
    dtype, rtol = (torch.float64, 1e-10) if device == "cpu" else (torch.float32, 1e-5)
    op, x, state = case(name, backend, 17, device, dtype)
    run = lambda x, state: everything(op, {n: y * 1 for n, y in x.items()}, state)  # noqa: E731
    same(graded(torch.compile(run, fullgraph=True), x, state), graded(run, x, state), rtol)


@pytest.mark.slow
def test_inductor_where_a_scan_is_as_long_as_a_chunk():
    """Three tokens: tensors of one size, whose memory Inductor hands on; traced, the scan's torch.cat made the variance inf."""
    op, x, state = case("palimpsa_key", "torch", 3)
    run = lambda x, state: everything(op, {n: y * 1 for n, y in x.items()}, state)  # noqa: E731
    same(graded(torch.compile(run, fullgraph=True), x, state), graded(run, x, state))


def test_a_wrong_result_is_seen():
    op, x, state = case("mamba2", "torch", 3)
    run = lambda x, state: everything(op, x, state)  # noqa: E731
    wrong = lambda x, state: [y * (1 + 1e-6) for y in run(x, state)]  # noqa: E731
    with pytest.raises(AssertionError, match="result 0 is off"):
        same(graded(torch.compile(wrong, fullgraph=True, backend="aot_eager"), x, state), graded(run, x, state))


def counting():
    """A compiler that runs the graph as it is, and the graphs it was given."""
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    return aot_autograd(fw_compiler=compiler), graphs


@pytest.mark.parametrize(
    ("backend", "names"), [("torch", {"unify.called.default"}), ("triton", {"unify.coefficients.default", "unify.rank_one.default"})]
)  # fmt: skip
def test_custom_ops_are_in_the_graph_and_its_length_is_free(backend, names):
    """One graph for every T: kernels take the length at run time, and the torch backend is one operator."""
    compiler, graphs = counting()
    op, *_ = case("gated_deltanet", backend, 70)
    run = torch.compile(lambda x, state: everything(op, x, state), fullgraph=True, dynamic=True, backend=compiler)
    for T in (70, 100, 133):
        _, x, state = case("gated_deltanet", backend, T)
        with torch.no_grad():
            same(run(x, tuple(state)), everything(op, x, tuple(state)))
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert len(graphs) == 1
    assert names <= called


def test_another_op_is_another_graph():
    run = torch.compile(lambda op, x: op(**x), fullgraph=True, backend="aot_eager")
    for name in ("gated_deltanet", "comba_decayed", "gated_deltanet"):
        op, x, _ = case(name, "torch", 3)
        same([run(op, x)], [op(**x)])


def test_a_mistake_inside_a_graph_is_said_and_raised():
    op, x, _ = case("gla", "torch", 3)
    run = torch.compile(lambda x: op(**x), fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="axis 3 does not fit"), pytest.raises(torch._dynamo.exc.Unsupported):
        run({**x, "k": x["k"][..., :1]})


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_in_a_graph(backend):
    op, x, _ = case("gla", backend, 70)
    offsets = torch.tensor([0, 1, 64, 70])
    run = lambda x, offsets: everything(op, x, cu_seqlens=offsets)  # noqa: E731
    same(torch.compile(run, fullgraph=True, backend="aot_eager")(x, offsets), run(x, offsets))


def test_wrong_offsets_in_a_graph_are_refused_when_it_runs():
    op, x, _ = case("gla", "torch", 3)
    run = torch.compile(lambda x, offsets: op(**x, cu_seqlens=offsets), fullgraph=True, backend="aot_eager")
    same([run(x, torch.tensor([0, 1, 3]))], [op(**x, cu_seqlens=torch.tensor([0, 1, 3]))])
    with pytest.raises(UnifyError, match="do not cut T = 3"):
        run(x, torch.tensor([0, 2, 2]))


# -- autocast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mamba2", "gla", "gated_deltanet", "palimpsa", "mesanet"])
def test_autocast_changes_nothing_and_the_output_is_as_wide_as_q(name, backend, device):
    """bfloat16 q, k, v from autocast matmuls, gates in float32; inside, no sum is narrowed."""
    op, x, state = case(name, backend, 40, device, torch.float32, K=5, V=6)
    x = {n: y.bfloat16() if n in "qkv" else y for n, y in x.items()}
    run = lambda x, state: everything(op, x, state)  # noqa: E731
    plain = graded(run, x, state)

    def cast(x, state):
        with torch.autocast(device, torch.bfloat16):
            assert torch.mm(*(torch.ones(2, 2, device=device),) * 2).dtype == torch.bfloat16
            return run(x, state)

    same(graded(cast, x, state), plain, 0.0)
    assert [y.dtype for y in plain[:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_shapes_come_out_of_the_meta_device():
    op, x, _ = case("gated_deltanet", "torch", 3, "meta")
    o, state = op(**x, output_final_state=True)
    assert (o.shape, state.S.shape) == ((1, 3, 1, 2), (1, 1, 3, 2))


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_under_autocast_and_compile(device):
    """Projections run in bfloat16, the op takes what they give."""
    op = compile(get("gated_deltanet").triple, "triton")
    project = torch.nn.Linear(6, 12, device=device)

    def layer(x):
        with torch.autocast(device, torch.bfloat16):
            q, k, v = project(x).view(1, -1, 1, 12).split(4, -1)
            return op(
                q, torch.nn.functional.normalize(k, dim=-1), v, g=-x[..., :1].float().abs(), beta=x[..., 1:2].abs()
            )

    x = torch.rand(1, 40, 6, device=device)
    found, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("T", [1, 130])
@pytest.mark.parametrize("name", ZOO)
def test_cuda_graphs_capture_and_replay(name, T, packed):
    """Nothing waits for the device and nothing depends on values: forward and backward are captured, then replayed on others."""
    op, x, state = case(name, "triton", T, "cuda", torch.float32, H=2, K=16, V=24)
    options = {"cu_seqlens": torch.tensor([0, T], device="cuda")} if packed else {}
    x, state = {n: y.requires_grad_() for n, y in x.items()}, [y.requires_grad_() for y in state]

    def step():
        out = everything(op, x, tuple(state), **options)
        return [*out, *torch.autograd.grad(sum(y.sum() for y in out), [*x.values(), *state], materialize_grads=True)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x["v"].mul_(-2)
        x["q"].copy_(x["q"].flip(1))
    graph.replay()
    same(captured, step(), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mamba2", "palimpsa", "gated_deltanet", "mesanet"])
def test_nothing_waits_for_the_device(name):
    op, x, state = case(name, "triton", 130, "cuda", torch.bfloat16, H=2, K=16, V=24)
    run = lambda x, state: everything(op, x, state)  # noqa: E731
    graded(run, x, state)  # the first call compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        graded(run, x, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_reduce_overhead_captures_the_op():
    op, x, state = case("palimpsa", "triton", 130, "cuda", torch.float32, K=16, V=24)
    run = lambda x, state: everything(op, {n: y * 1 for n, y in x.items()}, state)  # noqa: E731
    plain = graded(run, x, state)
    fast = torch.compile(run, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        same([y.clone() for y in graded(fast, x, state)], plain, 1e-6)


# -- torch.library -----------------------------------------------------------------------------------------------------

OFFSETS = torch.tensor([0, 2, 5])


def normal(*shape):
    return torch.randn(shape).requires_grad_()


def positive(*shape):
    return (torch.rand(shape) + 0.5).requires_grad_()


def log_decay(*shape):
    return (-torch.rand(shape)).requires_grad_()


@functools.cache
def library_cases():
    """Every operator of the library with arguments it may get: name, operator, arguments."""
    return list(_library_cases())


def _library_cases():
    for module in pkgutil.iter_modules(unify.kernels.__path__):
        importlib.import_module(f"unify.kernels.{module.name}")
    torch.manual_seed(0)
    ops, keys, values, states = torch.ops.unify, (1, 5, 1, 3), (1, 5, 1, 2), (2, 1, 3, 2)
    q, k, w, v, s0 = normal(*keys), normal(*keys), normal(*keys), normal(*values), normal(*states)
    g, wide = log_decay(1, 5, 1), log_decay(*keys)
    for name, gate in (("head", g), ("channel", wide)):
        yield f"linear {name}", ops.linear, (q, k, v, gate, s0, OFFSETS, 0.5, False)
    for name, gate, key in (("shared", wide, w), ("apart", g, normal(*keys))):
        yield f"rank one {name}", ops.rank_one, (q, k, w, key, v, gate, s0, OFFSETS, 0.5, False, key is w)
    b, prior, I0 = positive(*values), positive(1), positive(*states)
    yield "elementwise", ops.elementwise, (q, k, v, b, g, prior, None, None, s0, I0, OFFSETS, 0.5, False, True)
    extra = normal(1, 3), positive(*keys)
    yield "elementwise bonus", ops.elementwise, (q, k, v, b, g, prior, *extra, s0, I0, OFFSETS, 0.5, True, True)
    square = torch.eye(3).expand(2, 1, 3, 3).clone().requires_grad_()
    yield "solve", ops.solve, (q, k, positive(1, 5, 1), g, positive(1, 3), square, OFFSETS, False, 8)
    yield "decayed sum", ops.decayed_sum, (log_decay(1, 5, 1, 1), k, normal(2, 1, 3), OFFSETS)
    taps = normal(3, 4), normal(3)
    for name, bias in (("", None), (" bias", taps[1])):
        yield f"convolution{name}", ops.convolution, (normal(1, 5, 3), taps[0], bias, normal(2, 3, 3), OFFSETS)
    op, on_torch = (compile(get("meta_gdn").triple, backend) for backend in ("triton", "torch"))
    given = random_inputs(op, B=1, T=5, H=1, K=3, V=2, dtype=torch.float32)
    arguments = [y.requires_grad_() for y in given.values()], [s0, positive(2, 1, 3)]
    yield "recurrent", ops.recurrent, (launch.prepared(op.recurrence).key, *arguments, OFFSETS, 0.5, True, True)
    key, names = graph.prepared(on_torch)
    in_order = [given[name].requires_grad_() for name in names]
    yield "called", ops.called, (key, in_order, arguments[1], OFFSETS, True, 0.5, 2)
    for model in ("palimpsa_key", "gated_deltaproduct"):  # with a small state, with several steps a token
        yield f"coefficients {model}", ops.coefficients, coefficients_call(model)


def coefficients_call(model):
    """What a model's op hands to the operator of its coefficients, as leaves; so long that no block of what it keeps is left empty."""
    op, calls, whole = compile(get(model).triple, "triton"), [], torch.ops.unify.coefficients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.unify, "coefficients", lambda *a: calls.append(a) or whole(*a))
        op(**random_inputs(op, B=1, T=launch.SHORT + 8, H=1, K=3, V=2, dtype=torch.float32))
    key, *groups, offsets, scale, sizes, dtype = calls[0]
    leaves = [[x.detach().clone().requires_grad_() for x in group] for group in groups]
    return key, *leaves, offsets, scale, sizes, dtype


@pytest.mark.parametrize("which", range(14))
def test_operators_are_registered_soundly(which):
    """Schema, fake tensors, autograd and dynamic shapes under AOT autograd."""
    name, op, arguments = library_cases()[which]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet", "palimpsa", "mesanet", "kla"])
def test_a_gradient_of_a_gradient_is_refused(name):
    """Without an error it would lack, silently, all that goes through the operators."""
    op, x, _ = case(name, "triton", 40)
    leaves = {n: y.requires_grad_() for n, y in x.items()}
    slopes = torch.autograd.grad(op(**leaves).sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.autograd.grad(sum(y.sum() for y in slopes), list(leaves.values()), allow_unused=True)


def test_no_operator_is_left_out():
    named = {op.default.name() for _, op, _ in library_cases()}
    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("unify::")}
    assert {name for name in known if not name.endswith("_backward")} == named
