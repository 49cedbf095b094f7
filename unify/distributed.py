"""One sequence over several processes: ranks exchange what their pieces do to the states, and nothing else.

    far = unify.context_parallel(unify.compile(triple))   # under torchrun, after torch.distributed.init_process_group
    o = far(q, k, v, g=g, ...)                            # this rank's piece of the sequence, in the order of the ranks

A state that only decays and is added to is known after a piece of the sequence before it is known ahead of it:
X' = exp(G) X + W, with G the piece's summed log decay and W what it adds from zero. So every rank computes its (G, W) by
matrix products, one all-gather brings them together, each rank composes its own start, and the ordinary op runs from
there. Backwards the same happens to the adjoints, in the other order. Nothing is ever divided by a decay.

    python -m unify.distributed --bench --world 2 --model palimpsa,mamba2 --json benchmarks/scale.jsonl   # 1 against 2 processes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from math import gcd
from pathlib import Path
from typing import Any

import sympy as sp
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .carry import Carry, carries
from .errors import UnifyError
from .lower import chunked, parallel
from .op import Op, compile, uncast
from .symbols import name_of


@dataclass(frozen=True)
class ContextParallel:
    """An op over a sequence that lies in pieces, one on each rank of a group; made by `context_parallel`."""

    op: Op
    group: Any = None
    carries: tuple[Carry, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "carries", carries(self.op.recurrence, self.op.structure))

    def __call__(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        scale: float | None = None,
        initial_state: tuple[Tensor, ...] | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        return_variance: bool = False,
        **gates: Tensor,
    ):
        """Run this rank's piece of the sequence: what `Op.__call__` returns for its tokens, had it seen all of them.

        q, k, v, gates: as `Op.__call__`, [B, T of this piece, H, ...]; pieces lie in the order of the ranks and may differ
            in length. Static arguments are the same on every rank, and so are the options.
        initial_state: before the first token of all; only the first rank's is read.
        Returns o, the variance if asked for, and the state after the last token of all, the same on every rank.
        Gradients: every rank must call backward, as it must call this. Those of tokens are whole; that of a static
        argument is this rank's share, and the sum over ranks is whole (data-parallel training adds it up); that of
        initial_state is on the first rank. A loss that uses the final state must use it on one rank only.
        Raises UnifyError as the op does, without a process group, and for cu_seqlens.
        """
        check_group(cu_seqlens)
        inputs = {name: x for name, x in {"q": q, "k": k, "v": v, **gates}.items() if x is not None}
        start = self._start(inputs, initial_state, output_final_state)
        shown = {"return_variance": return_variance, "scale": scale}
        out = self.op(**inputs, **shown, initial_state=start[: len(self.carries)])
        if not output_final_state:
            return out
        return (*(out if return_variance else (out,)), self.op.state_type(*start[len(self.carries) :]))

    def _start(self, inputs: dict[str, Tensor], initial: Any, final: bool) -> tuple[Tensor, ...]:
        """The states this piece starts from; then, if wanted, those after the last piece."""
        sizes, q = self.op._check(inputs), inputs["q"]
        start: tuple = (None,) * len(self.carries)
        with uncast(q.device.type):
            if dist.get_rank(self.group) == 0:
                start = self.op._initial(initial, inputs, sizes["B"], sizes, _wide(self.op, q))
            return _Exchange.apply(self.group, final, *effect(self.op, self.carries, inputs), *start)

    def before(self, x: Tensor, count: int, start: Tensor) -> tuple[Tensor, Tensor]:
        """The `count` rows of x [B, T, C] before this piece (`start` [B, count, C] before the first), and the very last.

        Raises UnifyError where a piece is shorter than that.
        """
        if x.shape[1] < count:
            given, fails = f"a piece of {x.shape[1]} tokens", f"the next one needs its last {count}"
            raise UnifyError(given, fails, "use longer pieces, or fewer of them")
        previous, last = _Tails.apply(self.group, x[:, x.shape[1] - count :])
        return (previous if dist.get_rank(self.group) else previous + start), last

    def lengths(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens lie in the pieces before this one, and in all; beside x, whose device need not wait for them."""
        here = torch.full((), x.shape[1], dtype=torch.int64, device=x.device)
        found = torch.stack([n for (n,) in gather([here], self.group)])
        return found[: dist.get_rank(self.group)].sum(), found.sum()


def context_parallel(op: Op, group: Any = None) -> ContextParallel:
    """The op for sequences that are longer than one device: each rank of a process group holds one piece.

        X_r+1 = exp(G_r) X_r + W_r        X_r: a state before rank r's piece, G_r, W_r: what the piece does to it

    op: whose states all decay and are added to without a look at any state; that is read off its equations.
    group: of torch.distributed; None is all processes. Cost: one all-gather of the states' size, forward and backward.
    Returns a callable with the op's signature, see `ContextParallel`. Raises UnifyError for any other op.
    """
    if not isinstance(op, Op):
        raise UnifyError(f"context_parallel({type(op).__name__})", "it takes an op", "pass unify.compile(triple)")
    return ContextParallel(op, group)


def check_group(places: Any) -> None:
    """Raises UnifyError for offsets or a mask, and where there is only one process."""
    if places is not None:
        given, fails = "packed or padded sequences over several ranks", "a piece is one stretch of one sequence a row"
        raise UnifyError(given, fails, "give each rank whole sequences, and the op itself")
    if not dist.is_initialized():
        given, fails = "a sequence over several ranks, in one process", "there is no process group"
        raise UnifyError(given, fails, "call torch.distributed.init_process_group first, or use the op itself")


# --- what a piece does ------------------------------------------------------------------------------------------------


def effect(op: Op, carried: tuple[Carry, ...], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What a piece does to each state: (*G, *W), X' = exp(G) X + W. For the gradient the arguments alone are kept.

    G: broadcastable to the state [B, H, ...], summed log decay; W: [B, H, ...], the state after the piece from zero.
    Both in at least float32.
    """
    if not all(x.writes for x in carried):
        return checkpoint(_from_zero, op, carried, inputs, use_reentrant=False, preserve_rng_state=False)
    found = _Effect.apply(partial(_terms, op, carried, tuple(inputs)), *inputs.values())
    found = [y.flatten(1 + len(x.dims)) for x, y in zip((*carried, *carried), found, strict=True)]
    for n, (x, g) in enumerate(zip(carried, found, strict=False), len(carried)):
        if x.rest != 0:
            found[n] = found[n] - torch.expm1(g) * _sequence(op, inputs).value(x.rest, x.dims)
    return tuple(found)


def _wide(op: Op, q: Tensor) -> torch.dtype:
    return torch.float64 if op.backend == "reference" or q.dtype == torch.float64 else torch.float32


def _sequence(op: Op, inputs: dict[str, Tensor]) -> parallel.Sequence:
    """What expressions of a piece's arguments are evaluated by, in `_wide`."""
    if _wide(op, inputs["q"]) == torch.float64:
        inputs = {name: x.double() for name, x in inputs.items()}
    request = parallel.Request(op.recurrence, op.structure, {}, {}, False, None, None)
    return parallel.Sequence(request, inputs, (None,) * len(op.recurrence.states), 1.0, parallel.Chunked())


def _from_zero(op: Op, carried: tuple[Carry, ...], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """`effect` where only a run tells."""
    inputs = {name: x.to(_wide(op, inputs["q"])) for name, x in inputs.items()}
    seq, (B, _, H, _) = _sequence(op, inputs), inputs["q"].shape
    zero = tuple(inputs["q"].new_zeros(B, H, *seq.sizes(x.dims)) for x in carried)
    return (*(_total(seq, x) for x in carried), *op(**inputs, initial_state=zero, output_final_state=True)[-1])


def _total(seq: parallel.Sequence, x: Carry) -> Tensor:
    """The piece's log decay, with an axis for each channel of the state (of length 1 where all decay alike)."""
    total = seq.raw["q"].new_zeros((1,) * (2 + len(x.dims)))
    for where, g in x.decays:
        g = seq.full(g, where).sum(1)
        total = total + g.reshape(*g.shape[:2], *(seq.sizes((d,))[0] if d in where else 1 for d in x.dims))
    return total.expand(seq.shape[0], seq.shape[2], *total.shape[2:])


def _terms(op: Op, carried: tuple[Carry, ...], names: tuple[str, ...], *given: Tensor) -> tuple[list, list]:
    """Every state's log decay [B, H, 1 or K, 1]; and what is written to each, as the (w, x, y) of several `_outer`."""
    seq = _sequence(op, dict(zip(names, given, strict=True)))
    decays = {g: _decay(seq, g) for g in dict.fromkeys(x.decays for x in carried)}

    def rows(expr: Any, where: Any) -> Tensor:
        alone = isinstance(expr, sp.Indexed) and name_of(expr) in seq.raw  # an argument, in its own type
        return seq.raw[name_of(expr)].expand(*seq.shape[:3], -1) if alone else seq.full(expr, (where,))

    def term(state: Carry, factor: Any, *sides: Any) -> tuple[Tensor, Tensor, Tensor]:
        kept, _ = decays[state.decays]
        w = kept if factor == 1 else kept * seq.full(factor, ())[..., None]
        found = map(rows, sides, state.dims)
        ones = [w.new_ones(1).expand(*seq.shape[:3], 1)] * (2 - len(sides))
        x, y = (*ones, *found) if w.shape[3] == 1 else (*found, *ones)
        return w, x, y

    return [decays[x.decays][1] for x in carried], [[term(x, *write) for write in x.writes] for x in carried]


def _decay(seq: parallel.Sequence, decays: tuple) -> tuple[Tensor, Tensor]:
    """What is left at the piece's end of a token's writes [B, T, H, 1 or K], and the piece's log decay [B, H, 1 or K, 1]."""
    g = reduce(torch.add, [seq.full(g, where) if where else seq.full(g, ())[..., None] for where, g in decays])
    after, total = chunked.later(g.flatten(2).clamp(min=-1e3))  # exp of that is 0, as of -inf, and 0 times it too
    return after.view_as(g).exp(), total.view(*g.shape[:1], *g.shape[2:], 1)


class _Effect(torch.autograd.Function):
    """The arguments -> log decays, and sums of `_outer`, of `_terms`; the arguments alone are kept for the gradient."""

    @staticmethod
    def forward(ctx, terms: Callable, *given: Tensor):
        ctx.terms = terms
        ctx.save_for_backward(*given)
        total, written = terms(*given)
        return (*total, *(reduce(torch.add, [_outer(*term) for term in state]) for state in written))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        needed = ctx.needs_input_grad[1:]
        given = [x.detach().requires_grad_(n) for x, n in zip(ctx.saved_tensors, needed, strict=True)]
        with uncast(given[0].device.type):
            with torch.enable_grad():
                total, written = ctx.terms(*given)
            pairs = list(zip(total, grads, strict=False))
            for state, dW in zip(written, grads[len(total) :], strict=True):
                for term in state:
                    pairs += zip(term, _outer_backward(dW, *term), strict=True)
            pairs = [(x, d) for x, d in pairs if x.requires_grad]
            wanted = [x for x in given if x.requires_grad]
            found = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True))
        return None, *(next(found) if n else None for n in needed)


def _narrow(w: Tensor, y: Tensor) -> bool:
    """Whether products take y as it is: a GPU sums those of bfloat16 in float32."""
    return y.is_cuda and (y.dtype, w.dtype) == (torch.bfloat16, torch.float32)


def _outer(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """sum_t w_t x_t y_t^T [B, H, K, V] by matrix products; w: [B, T, H, 1 or K]; x: [B, T, H, K]; y: [B, T, H, V].

    Beside a narrow y, w x is rounded to its type, and the error is subtracted in the same product. A product of a batch takes
    tokens n, n + N, n + 2 N, ... of a head, some two thousand: many keep a GPU busy, and with B = 1 nothing is copied for them.
    """
    (B, T, H, K), narrow = x.shape, _narrow(w, y)
    y = y if narrow else y.to(w.dtype)
    wx = y.new_empty(B, T, H, 1 + narrow, K)
    torch.mul(x, w, out=wx[..., 0, :])
    if narrow:
        torch.addcmul(wx[..., 0, :], x, w, value=-1, out=wx[..., 1, :])
    N = gcd(T, 1 << (T // 2048 or 1).bit_length() - 1)
    left, right = (z.unflatten(1, (-1, N)).permute(0, 2, 3, 1, 4) for z in (wx.flatten(3), y))
    out = _matmul(left.mT, right, w.dtype).sum(1).unflatten(2, (-1, K))
    return out[:, :, 0] - out[:, :, 1] if narrow else out[:, :, 0]


def _outer_backward(dW: Tensor, w: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w, x and y."""
    rows, dtype = partial(torch.empty, x.shape, device=x.device), y.dtype if _narrow(w, y) else w.dtype
    dW, wx = dW.to(dtype), torch.mul(x, w, out=rows(dtype=dtype))
    dy = (wx.transpose(1, 2) @ dW).transpose(1, 2).to(y.dtype)
    dwx = _matmul(y.to(dtype).transpose(1, 2), dW.mT, w.dtype).transpose(1, 2)
    dw, dx = torch.mul(dwx, x, out=rows(dtype=w.dtype)), torch.mul(dwx, w, out=rows(dtype=x.dtype))
    return dw.sum_to_size(w.shape), dx, dy


def _matmul(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ y in a type that may be wider than theirs."""
    wider = {} if x.dtype == dtype else {"out_dtype": dtype}
    return torch.bmm(x.flatten(0, -3), y.flatten(0, -3), **wider).view(*x.shape[:-1], -1)


# --- what ranks exchange ----------------------------------------------------------------------------------------------


def gather(xs: Sequence[Tensor], group: Any) -> list[list[Tensor]]:
    """The tensors of every rank, in the order of the ranks, by one all-gather; shapes are the same on all."""
    flat = torch.cat([x.flatten() for x in xs])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, flat, group)
    sizes = [x.numel() for x in xs]
    return [[part.view_as(x) for part, x in zip(one.split(sizes), xs, strict=True)] for one in found]


def compose(effects: Sequence[Sequence[Tensor]], n: int) -> list[list[Tensor]]:
    """The n states before each piece and after the last, from zero; effects: (*G, *W) of each piece."""
    states = [[torch.zeros_like(w) for w in effects[0][n:]]]
    for found in effects:
        states.append([g.exp() * x + w for g, w, x in zip(found[:n], found[n:], states[-1], strict=True)])
    return states


class _Exchange(torch.autograd.Function):
    """(G, W) of each rank's piece -> the states X that this rank's starts from, and those after the last if `final`.

    X_0 = start, X_r+1 = exp(G_r) X_r + W_r. With D_r the gradient of X_r+1, D_r-1 = dX_r + exp(G_r) D_r: the same sum
    from the other end, for which ranks exchange dX. start: the first rank's; None on the others.
    """

    @staticmethod
    def forward(ctx, group, final: bool, *given):
        n = len(given) // 3
        total, written, start = given[:n], given[n : 2 * n], given[2 * n :]
        rank = dist.get_rank(group)
        if rank == 0:
            written = [g.exp() * x + w for g, w, x in zip(total, written, start, strict=True)]
        effects = gather([*total, *written], group)
        states = compose(effects, n)
        mine = states[rank] if rank else [x.clone() for x in start]
        ctx.group, ctx.final, ctx.n = group, final, n
        ctx.save_for_backward(*mine, *(g for found in effects[rank:] for g in found[:n]))
        return (*mine, *(states[-1] if final else ()))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        n, rank = ctx.n, dist.get_rank(ctx.group)
        mine, *later = zip(*[iter(ctx.saved_tensors)] * n, strict=True)
        found = gather(grads, ctx.group)
        D = [sum(x) for x in zip(*(dx[n:] for dx in found), strict=True)] if ctx.final else map(torch.zeros_like, mine)
        for dx, total in reversed(list(zip(found[rank + 1 :], later[1:], strict=True))):
            D = [d + g.exp() * D for d, g, D in zip(dx[:n], total, D, strict=True)]
        D = list(D)
        passed = [g.exp() * d for g, d in zip(later[0], D, strict=True)]
        d_total = [(x * d).sum_to_size(g.shape) for x, d, g in zip(mine, passed, later[0], strict=True)]
        d_start = [dx + d for dx, d in zip(found[0], passed, strict=False)] if rank == 0 else [None] * n
        return None, None, *d_total, *D, *d_start


class _Tails(torch.autograd.Function):
    """The last rows of each rank's piece -> those of the rank before (zeros on the first) and of the last rank."""

    @staticmethod
    def forward(ctx, group, tail):
        ctx.group, rank = group, dist.get_rank(group)
        found = [x for (x,) in gather([tail], group)]
        return found[rank - 1] if rank else torch.zeros_like(tail), found[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        found, rank = gather(grads, ctx.group), dist.get_rank(ctx.group)
        return None, found[rank + 1][0] if rank + 1 < len(found) else sum(last for _, last in found)


# --- how much faster --------------------------------------------------------------------------------------------------


CHECKED = 1024  # tokens


@dataclass(frozen=True)
class Bench:
    """What is timed: models of the zoo at a size, (B, T, H, K, V) of the whole sequence; no time where o is off by more than
    `tolerance` of its largest entry.
    """

    models: tuple[str, ...]
    size: tuple[int, ...]
    device: str
    repeats: int = 5
    tolerance: float = 2e-2


def bench(rank: int, world: int, meet: str, given: Bench, tell: Callable[[dict[str, Any]], object]) -> None:
    """One process of a group; the first tells the figures of each model when it has them."""
    cuda = torch.device("cuda", rank) if given.device == "cuda" else None
    if cuda:
        torch.cuda.set_device(cuda)
    dist.init_process_group("nccl" if cuda else "gloo", f"file://{meet}", rank=rank, world_size=world, device_id=cuda)
    try:
        for model in given.models:
            found = measure(model, given)
            if rank == 0:
                tell(found)
    finally:
        dist.destroy_process_group()


def measure(model: str, given: Bench) -> dict[str, Any]:
    """A forward and backward over this rank's piece of a sequence: checked, then timed.

    In bfloat16 on a GPU, float32 elsewhere; gates in float32. One process runs the op itself. error: of o on at most `CHECKED`
    tokens, the largest over ranks, as a share of its largest entry, against the float64 token loop over all of them.
    Returns {"kind", "model", "size", "dtype", "processes", "error"} and, unless that is too large, {"seconds": median,
    "range": [least, largest], "repeats", "tokens_per_second", "peak": bytes that torch held at most in one process, or None}.
    """
    from statistics import median

    from .models.zoo import get
    from .testing import random_inputs, relative_error
    from .verify import tokens

    op, loop = (compile(get(model).triple, backend) for backend in ("auto", "reference"))
    rank, world = dist.get_rank(), dist.get_world_size()
    far = context_parallel(op) if world > 1 else op
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    B, T, *sizes = given.size

    def draw(seed: int, T: int) -> dict[str, Tensor]:
        """`CHECKED` tokens at most, over and over: a host takes long to draw more."""
        x = random_inputs(op, seed, B, min(T, CHECKED), *sizes, gates="weak", dtype=torch.float32)
        x = {name: y.to(given.device, dtype if name in "qkv" else torch.float32) for name, y in x.items()}
        again = torch.arange(T, device=given.device) % CHECKED
        return {**x, **{y.name: x[y.name][:, again] for y in op.recurrence.inputs if y.per != "static"}}

    ends = lambda T: (T * rank // world, T * (rank + 1) // world)  # noqa: E731
    start, stop = ends(min(T, CHECKED))
    whole = draw(0, min(T, CHECKED))
    with torch.no_grad():
        wanted = loop(**{name: x.double() for name, x in whole.items()})[:, start:stop]
        off = relative_error(far(**tokens(op, whole, start, stop)).double(), wanted)
    off = torch.tensor(off, device=given.device).nan_to_num(nan=torch.inf)
    dist.all_reduce(off, dist.ReduceOp.MAX)
    found = {"kind": "context parallel", "model": model, "size": dict(zip("BTHKV", given.size, strict=True)),
             "dtype": str(dtype).removeprefix("torch."), "processes": world, "error": off.item()}  # fmt: skip
    if found["error"] > given.tolerance:
        return found
    del whole, wanted
    start, stop = ends(T)
    piece = {name: y.requires_grad_() for name, y in draw(rank, stop - start).items()}
    seconds, most = _timed(lambda: far(**piece).float().square().sum().backward(), given)
    middle = median(seconds)
    return {**found, "seconds": middle, "range": [min(seconds), max(seconds)], "repeats": given.repeats,
            "tokens_per_second": B * T / middle, "peak": most}  # fmt: skip


def _timed(work: Callable[[], object], given: Bench) -> tuple[list[float], int | None]:
    """Seconds from when all processes are ready until all have done it, after two times that do not count; and `peak`."""
    import time

    cuda, seconds = given.device == "cuda", []
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(given.repeats + 2):
        dist.barrier()
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return seconds[2:], peak(given.device)


def peak(device: str | torch.device) -> int | None:
    """Bytes that torch held at most on a GPU since it was told to count, the largest over processes; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    most = torch.tensor(torch.cuda.max_memory_allocated(), device=device)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def groups(given: Bench, worlds: Sequence[int], tell: Callable[[dict[str, Any]], object]) -> None:
    """Start a group of each size (one process is this one) and tell what it found, also where it fails later on."""
    import tempfile

    for world in dict.fromkeys(worlds):
        with tempfile.TemporaryDirectory() as folder:
            told = (world, f"{folder}/meet", given)
            if world == 1:
                bench(0, *told, tell)
            else:
                _apart(world, told, tell)
        if given.device == "cuda":
            torch.cuda.empty_cache()  # for the first of the next group


def _apart(world: int, told: tuple, tell: Callable[[dict[str, Any]], object]) -> None:
    """`bench` in processes of their own; what the first finds is told at once."""
    out = torch.multiprocessing.get_context("spawn").SimpleQueue()
    processes, ended = torch.multiprocessing.spawn(bench, (*told, out.put), world, join=False), False
    while not ended:
        try:
            ended = processes.join(timeout=0.2)
        finally:
            while not out.empty():
                tell(out.get())


def main(arguments: list[str] | None = None) -> None:
    """The command line: a line for every model and number of processes."""
    import argparse
    import sys

    from .device import versions
    from .models.zoo import get
    from .mqar.sweep import add
    from .scale import stamp

    parser = argparse.ArgumentParser(prog="python -m unify.distributed", description=__doc__.split("\n")[0])
    parser.add_argument("--bench", action="store_true", required=True, help="time 1 against --world processes")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="palimpsa", help="names of the zoo, commas between them")
    parser.add_argument("--size", default="1,65536,16,96,192", help="B,T,H,K,V of the whole sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=2e-2, help="of the largest entry of o: more has no time")
    parser.add_argument("--json", type=Path, help="add the figures as lines of JSON to this file (unify evidence)")
    arguments = sys.argv[1:] if arguments is None else arguments
    told = parser.parse_args(arguments)
    models, size = tuple(told.model.split(",")), tuple(map(int, told.size.split(",")))
    for model in models:
        context_parallel(compile(get(model).triple))  # refuses here what it would refuse in every process
    print(f"B, T, H, K, V = {size}, forward + backward, {versions(told.device)}")
    alone, wrong = {}, []

    def tell(found: dict[str, Any]) -> None:
        what = f"{found['model']}, {found['processes']} process{'es' * (found['processes'] > 1)}"
        if "seconds" not in found:
            wrong.append(what)
            print(f"{what}: o off by {found['error']:.1e}, its time is worth nothing")
            return
        one = alone.setdefault(found["model"], found["seconds"])
        print(f"{what}: {found['seconds']:.4g} s, {found['tokens_per_second']:.4g} tokens/s, "
              f"{one / found['seconds']:.2f} x, o off by {found['error']:.1e}", flush=True)  # fmt: skip
        if told.json:
            add(told.json, found | stamp(told.device, "unify.distributed", *arguments))

    groups(Bench(models, size, told.device, told.repeats, told.tolerance), (1, told.world), tell)
    if wrong:
        raise SystemExit(f"not timed: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
