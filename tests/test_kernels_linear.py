"""The linear family's kernels against a float64 loop, forward and every gradient: in the interpreter, or on a GPU."""

import os
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from unify.kernels import chunk
from unify.kernels.linear import linear

SCALE = 0.3
PACKED = [0, 1, 64, 128, 128, 193]  # lengths 1, 63, 64, 0 and 65
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def loop(q, k, v, g, s0, offsets, before=False):
    """The recurrence, token by token."""
    shape = v.shape
    q, k, v, g = (x.flatten(0, 1) for x in (q, k, v, g if g.ndim == 4 else g[..., None]))
    out, ends = [], []
    for n, (start, end) in enumerate(pairwise(offsets)):
        S = s0[n]
        for t in range(start, end):
            new = g[t].exp()[..., None] * S + k[t][..., None] * v[t][:, None]
            out.append(SCALE * ((S if before else new) * q[t][..., None]).sum(-2))
            S = new
        ends.append(S)
    return torch.stack(out).view(shape), torch.stack(ends)


def gates(shape, make, kind):
    """Log decays of one sequence: everything from none to total, or all weak."""
    if kind == "weak":
        return -1e-3 * torch.rand(shape, generator=make, dtype=torch.float64)
    levels = torch.tensor([0.0, -1e-6, -0.05, -1.0, -30.0, -800.0], dtype=torch.float64)
    shares = torch.tensor([0.25, 0.3, 0.3, 0.09, 0.04, 0.02], dtype=torch.float64)
    return levels[torch.multinomial(shares, shape.numel(), replacement=True, generator=make)].view(shape)


def case(offsets, B, H, K, V, dtype, channels, kind="mixed", seed=0):
    """q, k, v, g and s0 in `dtype` (s0 no narrower than float32)."""
    make = torch.Generator().manual_seed(seed)
    T = offsets[-1] // B
    randn = lambda *s: torch.randn(s, generator=make, dtype=torch.float64)  # noqa: E731
    g = gates(torch.Size((B, T, H, K) if channels else (B, T, H)), make, kind)
    x = [y.to(dtype) for y in (randn(B, T, H, K), randn(B, T, H, K), randn(B, T, H, V), g)]
    return [*x, randn(len(offsets) - 1, H, K, V).to(torch.promote_types(dtype, torch.float32))]


def graded(f, inputs):
    """Outputs, then gradients of a random functional of all of them with respect to every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*inputs)
    make = torch.Generator().manual_seed(7)
    draw = lambda x: torch.randn(x.shape, generator=make).bfloat16().double().to(x.device)  # noqa: E731
    loss = sum(
        (x.double() * draw(x)).sum() for x in out
    )  # weights that every type holds: gradients come in the outputs' types
    return [*out, *torch.autograd.grad(loss, inputs)]


def agree(got, want, names, tolerance):
    for name, x, y in zip(names, got, want, strict=True):
        assert x.shape == y.shape, name
        error = ((x.detach().double().cpu() - y).norm() / y.norm().clamp_min(1e-30)).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"  # NaN is in no order


@pytest.fixture(autouse=True)
def _interpreted(request):
    """Where there is a GPU nothing is interpreted, and kernels take no CPU tensors."""
    if torch.cuda.is_available() and not request.node.get_closest_marker("gpu"):
        pytest.skip("runs in the interpreter; test_on_the_gpu is for this machine")


def in_pieces(monkeypatch, pieces):
    """Walks in so many pieces, whatever the sizes; starts are found for two of them at once."""
    monkeypatch.setattr(chunk, "cut", lambda at, programs: pieces)
    monkeypatch.setattr(chunk, "PASS", (2, 16))


@pytest.fixture(params=[1, 5], ids=["whole", "in pieces"])
def schedule(request, monkeypatch):
    """Both ways from chunk to chunk; pieces of a chunk, and more of them than most sequences have chunks."""
    in_pieces(monkeypatch, request.param)


NAMES = ["o", "s_T", "dq", "dk", "dv", "dg", "ds0"]
LAYOUT = chunk.Layout(torch.tensor([0]), 0, 0, 1, 128, 128, 1, torch.bfloat16, torch.float32)


def compare(offsets, B, H, K, V, dtype, channels, before, kind="mixed", device="cpu"):
    x = case(offsets, B, H, K, V, dtype, channels, kind)
    want = graded(lambda *a: loop(*a, offsets, before), [y.double() for y in x])
    at = torch.tensor(offsets, device=device)
    got = graded(lambda *a: linear(*a, at, scale=SCALE, before=before), [y.to(device) for y in x])
    assert got[0].dtype == dtype
    agree(got, want, NAMES, TOLERANCE[dtype])


@pytest.mark.parametrize("K", [17, 72], ids=["keys at once", "keys in blocks"])
@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
def test_a_program_may_read_all_value_channels(poisoned, monkeypatch, channels, K):
    assert (chunk._tile("read", K, 75, torch.float32, torch.float32)[0] < K) == (K == 72)
    monkeypatch.setattr(chunk, "width", lambda at, BV: at.V)
    compare([0, 1, 67], 1, 1, K, 75, torch.float32, channels, False)
    monkeypatch.setattr(chunk, "width", lambda at, BV: 2 * BV)  # two blocks, then one
    compare([0, 1, 67], 1, 1, K, 75, torch.float32, channels, True)


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_sequences_with_all_gates_match_the_loop(poisoned, schedule, dtype, channels, before):
    compare([*PACKED, 193 + 300], 1, 1, 5, 3, dtype, channels, before)


@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
def test_half_precision_inputs_and_weak_gates(poisoned, channels):
    compare([0, 66, 132], 2, 2, 17, 33, torch.float16 if channels else torch.bfloat16, channels, False, "weak")


@pytest.mark.parametrize("K, V", [(72, 72), (1, 1)])
def test_several_blocks_of_channels_and_a_single_one(poisoned, K, V):
    compare([0, 5], 1, 1, K, V, torch.float32, True, False)


def test_total_decay_of_minus_infinity_forgets_and_stays_finite(poisoned):
    q, k, v, g, s0 = case([0, 70], 1, 1, 4, 4, torch.float64, False)
    g[:, 66] = -torch.inf
    at = torch.tensor([0, 70])
    cut, _ = linear(*(x[:, 66:] for x in (q, k, v, g)), torch.zeros_like(s0), torch.tensor([0, 4]), scale=SCALE)
    got = graded(lambda *a: linear(*a, at, scale=SCALE), (q, k, v, g, s0))
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got[0][:, 66:], cut)


def test_gradients_arrive_through_one_output_alone():
    x = [y.requires_grad_() for y in case([0, 9], 1, 1, 4, 4, torch.float64, False)]
    at = torch.tensor([0, 9])
    for which in (0, 1):
        got = torch.autograd.grad(linear(*x, at, scale=SCALE)[which].sum(), x)
        want = torch.autograd.grad(loop(*x, [0, 9])[which].sum(), x, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_planted_error_is_seen(monkeypatch):
    """A border one token late in the scores is enough for the comparison to fail."""
    body = chunk._read

    class Late:
        def __getitem__(self, grid):
            return lambda key, S, *rest, **options: body[grid](key, S.roll(1, 0), *rest, **options)

    compare([0, 65], 1, 1, 3, 2, torch.float64, False, False)
    monkeypatch.setattr(chunk, "_read", Late())
    with pytest.raises(AssertionError, match="o: relative error"):
        compare([0, 65], 1, 1, 3, 2, torch.float64, False, False)


@pytest.mark.parametrize("kind", ["mixed", "weak"])
@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
def test_pieces_of_several_chunks_match_the_loop(poisoned, monkeypatch, channels, kind):
    """7 and 5 chunks in 3 pieces, packed beside an empty sequence and one of a chunk."""
    in_pieces(monkeypatch, 3)
    compare([0, 7 * 64 - 1, 7 * 64 - 1, 7 * 64, 11 * 64 + 1], 1, 1, 3, 2, torch.float64, channels, False, kind)


def test_a_piece_that_forgets_is_seen(monkeypatch):
    """Each starts with what the piece before it leaves, but not with what lies before that."""

    class Forgets:
        def __getitem__(self, grid):
            return lambda *a, **k: None

    sizes = [0, 3 * 64], 1, 1, 3, 2, torch.float32, False, False, "weak"
    in_pieces(monkeypatch, 3)
    compare(*sizes)
    monkeypatch.setattr(chunk, "_pass", Forgets())
    with pytest.raises(AssertionError, match="o: relative error"):
        compare(*sizes)


def borders(offsets, K, seed=0):
    """Log decays [T, K]: nearly none, but some channels forget all at the tokens where blocks of 16 meet, others beside them."""
    make = torch.Generator().manual_seed(seed)
    at = torch.cat([torch.arange(b - a) for a, b in pairwise(offsets)])[:, None]
    rare = torch.rand(len(at), K, generator=make)
    g = torch.where(rare < 0.02, -800.0, torch.where(rare < 0.3, -0.3, -1e-6))
    channel = torch.arange(K)
    forgets = (
        ((channel % 4 == 0) & (at % 32 == 0))
        | ((channel % 4 == 1) & (at % 16 == 15))
        | ((channel % 4 == 2) & (at % 16 == 1))
    )
    return torch.where(forgets, -800.0, g).double()


def pairs_by_formula(x, y, g, before):
    """Scores [T, 64], reads decayed from the chunk's start and writes to its end, of the tokens of one chunk, gate by gate."""
    T = len(x)
    scores, near, far = x.new_zeros(T, 64), x.clone(), y.clone()
    for t in range(T):
        seen = g[: t if before else t + 1]
        near[t] *= seen.sum(0).exp()
        far[t] *= g[t + 1 :].sum(0).exp()
        for s in range(t if before else t + 1):
            scores[t, s] = (x[t] * y[s] * seen[s + 1 :].sum(0).exp()).sum()
    return scores, near, far


@pytest.mark.parametrize("dtype, K", [(torch.float64, 5), (torch.float32, 20), (torch.float16, 48)])
@pytest.mark.parametrize("before, two", [(False, True), (True, True), (False, False), (True, False)])
def test_scores_of_chunks_that_end_anywhere(poisoned, dtype, K, before, two):
    """Where blocks of 16 and of 32 tokens meet, gates of -800 next to gates of -1e-6; all that is read later is written."""
    lengths = [1, 15, 16, 17, 31, 0, 32, 33, 48, 63, 65]
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    make = torch.Generator().manual_seed(1)
    x, x2, y = (torch.randn(offsets[-1], K, generator=make, dtype=torch.float64).to(dtype) for _ in range(3))
    g = borders(offsets, K).to(dtype)
    as_op = lambda z: z[None, :, None].contiguous()  # noqa: E731
    at = chunk.layout(as_op(x), as_op(x), as_op(g), torch.tensor(offsets))
    G = chunk.cumulate(at, as_op(g))
    got = chunk.pairs(at, as_op(x), as_op(x2) if two else None, as_op(y), G, before)
    x, x2, y, g = (z.double() for z in (x, x2, y, g))
    want = [[], [], [], [], []]
    for a, b in pairwise(offsets):
        for i in range(a, b, 64):
            j = slice(i, min(i + 64, b))
            A, near, far = pairs_by_formula(x[j], y[j], g[j], before)
            A2, near2, _ = pairs_by_formula(x2[j], y[j], g[j], True)
            for row, value in zip(want, (A, A2, near, near2, far), strict=True):
                row.append(value)
    for name, found, value in zip(chunk.Pairs._fields, got, map(torch.cat, want), strict=True):
        if two or name not in ("second", "near2"):
            agree([found.view(value.shape)], [value], [name], TOLERANCE[dtype])


@pytest.mark.parametrize("X", [1, 5], ids=["head", "channel"])
@pytest.mark.parametrize(
    "reverse, before, gained, keep",
    [(False, False, True, None), (False, False, False, torch.float32), (True, False, True, None), (True, True, False, None)],
)  # fmt: skip
def test_a_walk_in_pieces_is_the_walk(poisoned, monkeypatch, X, reverse, before, gained, keep):
    """States at all borders and at the end, of sequences with more and with fewer chunks than pieces; all share one start."""
    offsets = [*PACKED, 193 + 7 * 64, 193 + 7 * 64 + 1]
    q, k, v, g, s0 = case(offsets, 1, 1, 5, 3, torch.float64, X > 1)
    at = chunk.layout(q, v, g, torch.tensor(offsets))
    G, start = chunk.cumulate(at, g), s0[0, 0].expand(s0.shape)
    gain = v[..., 0].exp() if gained else None
    found = []
    for pieces in (1, 4, 9):
        in_pieces(monkeypatch, pieces)
        *states, _ = chunk.walk(at, G, start, None, (k, v), 0.7, reverse, before, gain, keep)
        found.append(states)
    chunks = sum(-(-(b - a) // 64) for a, b in pairwise(offsets))
    assert found[0][0].isfinite().sum() == chunks * 5 * 3
    for states in found[1:]:
        torch.testing.assert_close(states, found[0], equal_nan=True)


def test_few_long_sequences_are_walked_in_pieces(poisoned, monkeypatch):
    """And give what a walk gives that is not cut."""
    q, k, v, g, s0 = case([0, 3 * 512], 1, 1, 4, 4, torch.float64, False, "weak")
    run = lambda: linear(q, k, v, g, s0, torch.tensor([0, 3 * 512]), scale=SCALE)  # noqa: E731
    cut, seen = chunk.cut, []
    monkeypatch.setattr(chunk, "cut", lambda *a: seen.append(cut(*a)) or seen[-1])
    found = run()
    monkeypatch.setattr(chunk, "BUSY", 0)
    torch.testing.assert_close(found, run())
    assert seen == [3, 1]


def test_gates_that_end_all_and_gates_of_nothing(poisoned, monkeypatch):
    """Of sums of strong logs exp is 0 and stays so; without gates the last state is the sum of all that was written."""
    in_pieces(monkeypatch, 4)
    q, k, v, g, s0 = case([0, 9 * 64], 1, 1, 4, 4, torch.float32, True)
    at = torch.tensor([0, 9 * 64])
    for level in (-30.0, -800.0, -torch.inf):
        last = linear(q, k, v, torch.full_like(g, level), s0, at, scale=SCALE)[1]
        own = k[0, -1, 0][:, None] * v[0, -1, 0]
        torch.testing.assert_close(last[0, 0], own, rtol=1e-6, atol=1e-12)
    last = linear(q, k, v, torch.zeros_like(g), s0, at, scale=SCALE)[1]
    torch.testing.assert_close(last[0, 0], s0[0, 0] + k[0, :, 0].T @ v[0, :, 0], rtol=1e-5, atol=1e-5)


def test_pieces_fill_the_chip_and_are_no_shorter_than_they_may():
    cut = lambda tokens, N, programs: chunk.cut(LAYOUT._replace(tokens=tokens, N=N), programs)  # noqa: E731
    assert cut(32768, 1, 64) == 10
    assert cut(32768, 1, 1) == 64  # of 8 chunks each
    assert cut(32768, 8, 8) == 8
    assert cut(32768, 1, chunk.BUSY) == cut(2 * 512, 1, 8) == cut(0, 1, 8) == cut(0, 0, 0) == 1
    assert cut(3 * 512, 1, 8) == 3


def test_slots_hold_the_chunks_of_any_packing():
    make = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(0, 200, (int(torch.randint(1, 9, (), generator=make)),), generator=make)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        first = offsets // chunk.C + torch.arange(len(offsets))
        assert (first[:-1] + -(-lengths // chunk.C) <= first[1:]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mixed", "weak"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("channels", [False, True], ids=["head", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu(poisoned, schedule, dtype, channels, before, kind):
    compare(PACKED, 1, 2, 5, 3, dtype, channels, before, kind, "cuda")
    compare([0, 131, 262], 2, 3, 96, 192, dtype, channels, before, kind, "cuda")
