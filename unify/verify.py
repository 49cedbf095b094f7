"""Verify a model: its free energy, its published recurrence, its chunked form, its state and its gradients.

    print(verify("palimpsa"))

Every check compares two computations that share no code beyond the declaration, in float64, on random inputs whose
gates run from -30 to -1e-6 and exactly 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor

from .confirm import confirm
from .errors import UnifyError
from .op import Op, compile
from .testing import assert_close, check_gradients, random_inputs, random_state
from .triple import Triple


@dataclass(frozen=True)
class Check:
    """One check: its worst relative error (None where there is none), whether it passed, and what to know about it."""

    name: str
    worst_error: float | None
    passed: bool
    seconds: float
    note: str = ""

    def __str__(self):
        error = "" if self.worst_error is None else f"{self.worst_error:.1e}"
        return f"{'ok' if self.passed else 'FAILED':<8}{self.name:<12}{error:<9}{self.seconds:5.2f} s  {self.note}"


@dataclass(frozen=True)
class Verification:
    """All checks of one model."""

    model: str
    rows: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> str:
        """The rows as JSON."""
        return json.dumps({**asdict(self), "passed": self.passed}, indent=2)

    def __str__(self):
        return "\n".join([self.model, *(f"  {row}" for row in self.rows)])


def verify(
    model: str | Triple, *, seed: int = 0, device: str | None = None, progress: Callable[[str], None] | None = None
) -> Verification:
    """Check one model, or a triple of your own.

    derivation  the update makes the free energy stationary, in exact arithmetic, and its Hessian positive definite
    published   the derived token loop computes what the model's paper says (for models in the zoo)
    chunked     the chunk-parallel form computes what the token loop computes: o, variance and final state
    split       prefilling in two parts and going on token by token changes nothing, nor does packing sequences together
    gradients   autograd of both forms against finite differences: every argument, initial state and the variance

    seed: of the random inputs. progress: called with each check's name before it starts.
    device: "cuda", or "cpu" for Triton's interpreter and tiny sizes: adds the rows of `device.checks`, fp32, bf16,
        parts and repeat, for the Triton backend there.
    Returns the checks; a failed one is a row, not an exception. Raises UnifyError if the zoo has no such model, the
    triple has no recurrence, or the device is not there.
    """
    from .models import zoo

    triple = model if isinstance(model, Triple) else zoo.get(model).triple
    name = model if isinstance(model, str) else zoo.name_of(model) or "a triple"
    loop, fast = compile(triple, "reference"), compile(triple, "torch")
    checks = {
        "derivation": lambda: _derivation(triple, seed),
        "published": lambda: _published(name, loop, seed),
        "chunked": lambda: _chunked(loop, fast, seed),
        "split": lambda: _split(fast, seed),
        "gradients": lambda: _gradients(loop, fast, seed),
    }
    if device is not None:
        from .device import checks as on_device

        checks |= on_device(loop, compile(triple, "triton"), device, seed)
    rows = []
    for title, check in checks.items():
        if progress is not None:
            progress(title)
        rows.append(_timed(title, check))
    return Verification(name, tuple(rows))


def verify_all(
    models: Iterable[str] | None = None,
    *,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Verification, ...]:
    """Verify several models, the whole zoo by default, as `verify` does. progress: called with "model: check"."""
    from .models import zoo

    say = progress or (lambda _: None)
    return tuple(
        verify(m, seed=seed, device=device, progress=lambda check, m=m: say(f"{m}: {check}")) for m in models or zoo.ZOO
    )


def _timed(name: str, check: Callable[[], tuple[float | None, str]]) -> Check:
    start = perf_counter()
    try:
        (error, note), passed = check(), True
    except (AssertionError, UnifyError) as failure:
        error, note, passed = None, str(failure), False
    except (
        Exception
    ) as failure:  # a kernel that does not compile or launch is a row too: the others still say something
        error, note, passed = None, f"{type(failure).__name__}: {failure}", False
    return Check(name, error, passed, perf_counter() - start, note)


def _derivation(triple: Triple, seed: int) -> tuple[float, str]:
    return 0.0, str(confirm(triple, seed=seed))


def _published(name: str, loop: Op, seed: int) -> tuple[float | None, str]:
    from .models.published import PUBLISHED

    if name not in PUBLISHED:
        return None, "no published recurrence: not a model of the zoo"
    x = random_inputs(loop, seed, T=16, K=4, V=3)
    o, var, final = loop(**x, return_variance=True, output_final_state=True)
    got = {"o": o, "variance": var, **final._asdict()}
    expected = PUBLISHED[name](**x)
    return max(assert_close(got[key], want, 1e-10, key) for key, want in expected.items()), ", ".join(expected)


def _chunked(loop: Op, fast: Op, seed: int) -> tuple[float | None, str]:
    if not fast.plan.chunked:
        return None, f"no chunked form: {fast.plan.why}"
    errors = []
    for gates, length in (("mixed", 70), ("weak", 33), ("strong", 9)):
        x = random_inputs(loop, seed, B=1, T=length, H=2, K=4, V=3, gates=gates)
        start = random_state(loop, x, seed)
        slow, quick = (everything(op, x, initial_state=start) for op in (loop, fast))
        errors += [assert_close(quick[key], slow[key], 1e-9, f"{key} ({gates} gates)") for key in slow]
    return max(errors), fast.plan.family


def everything(op: Op, x: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """All that a call returns, by name."""
    o, var, final = op(**x, return_variance=True, output_final_state=True, **options)
    return {"o": o, "variance": var, **final._asdict()}


def tokens(op: Op, x: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """The arguments of some tokens of a call: all that is given per token or per observation, cut to [start, stop)."""
    n = op.triple.architecture.repeats
    every = {"token": 1, "observation": n}
    per = {a.name: a.per for a in op.recurrence.inputs}
    return {k: v if per[k] == "static" else v[:, start * every[per[k]] : stop * every[per[k]]] for k, v in x.items()}


def _split(op: Op, seed: int, length: int = 20, first: int = 7, prefill: int = 13) -> tuple[float, str]:
    x = random_inputs(op, seed, B=1, T=length, K=4, V=3)
    whole, state, parts = everything(op, x), None, []
    for start, stop in pairwise((0, first, *range(prefill, length + 1))):  # one token runs no chunk, even where many do
        parts.append(everything(op, tokens(op, x, start, stop), initial_state=state))
        state = tuple(parts[-1][name] for name in op.state_type._fields)
    errors = [
        assert_close(torch.cat([p[key] for p in parts], 1), whole[key], 1e-9, f"{key} in parts")
        for key in ("o", "variance")
    ]
    errors += [assert_close(parts[-1][key], whole[key], 1e-9, f"{key} in parts") for key in op.state_type._fields]

    packed = everything(op, x, cu_seqlens=torch.tensor([0, 1, prefill, length]))
    alone = [everything(op, tokens(op, x, *ends)) for ends in ((0, 1), (1, prefill), (prefill, length))]
    for key, found in packed.items():
        want = torch.cat([part[key] for part in alone], 1 if key in ("o", "variance") else 0)
        errors.append(assert_close(found, want, 1e-9, f"{key} packed"))
    parts = f"{first} + {prefill - first} tokens, then one by one; packed as 1 + {prefill - 1} + {length - prefill}"
    return max(errors), parts


def _gradients(loop: Op, fast: Op, seed: int) -> tuple[float, str]:
    errors = [check_gradients(loop, random_inputs(loop, seed, T=5, gates="moderate"), seed=seed)]
    if fast.plan.chunked:
        x = random_inputs(fast, seed, B=1, T=70, gates="moderate")
        errors.append(check_gradients(fast, x, directions=1, seed=seed))
    return max(errors), "both forms" if fast.plan.chunked else "the token loop"


__all__ = ["Check", "Verification", "tokens", "verify", "verify_all"]
