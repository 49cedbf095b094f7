"""Recurrence -> a readable torch token loop: the oracle. It ignores Structure on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch

from unify.recurrence import Assign, Recurrence

from .printer import assignment


def source(recurrence: Recurrence) -> str:
    """Python source of `step`: one token of every head, printed from the recurrence with its equations as comments."""
    arguments = [*argument_names(recurrence), *(s.name for s in recurrence.states)]
    lines = [f"def step({', '.join(arguments)}, scale, return_variance=False):", "    K = q.shape[-1]"]
    if any(s.solve is not None for s in recurrence.steps):
        lines.append("    eye = torch.eye(K, dtype=q.dtype, device=q.device)")
    for step in recurrence.steps:
        lines.append(f"    # {step.phase}: {step}")
        lines += [f"    {line}" for line in _guarded(step)]
    new = ", ".join(name for _, name in recurrence.updates)
    lines.append(f"    return o, variance, ({new},)")
    return "\n".join(lines) + "\n"


def _guarded(step: Assign) -> list[str]:
    if step.name == "variance":
        text = assignment(step).removeprefix("variance = ")
        return [f"variance = {text} if return_variance else None"]
    if step.name == "k" and str(step.expr).find("k_raw") >= 0:
        return ["k_raw = k", assignment(step)]
    return assignment(step).split("\n")


def argument_names(recurrence: Recurrence) -> list[str]:
    """Names of the step's inputs: an argument given per observation appears once for each of a token's repeats."""
    out = []
    for x in recurrence.inputs:
        out.append(x.name)
        if x.per == "observation":
            out += [f"{x.name}_{n}" for n in range(2, recurrence.triple.architecture.repeats + 1)]
    return out


@lru_cache(maxsize=512)
def step_function(recurrence: Recurrence) -> Callable:
    """The compiled `step` of `source`."""
    space = {"torch": torch}
    exec(compile(source(recurrence), f"<step of {recurrence.carries} recurrence>", "exec"), space)
    return space["step"]


def per_token(recurrence: Recurrence, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Arguments under the program's names, each [B, T, H, ...] or static [H, ...]."""
    repeats, out = recurrence.triple.architecture.repeats, {}
    for x in recurrence.inputs:
        value = inputs[x.name]
        if x.per != "observation":
            out[x.name] = value
            continue
        for n in range(repeats):
            out[x.name if n == 0 else f"{x.name}_{n + 1}"] = value[:, n::repeats]
    return out


def loop(
    recurrence: Recurrence,
    inputs: Mapping[str, torch.Tensor],
    state: tuple[torch.Tensor, ...],
    scale: float,
    variance: bool = False,
):
    """Run the recurrence token by token.

    inputs: the op's arguments, [B, T, H, ...] (or [H, ...]); state: one tensor [B, H, ...] each.
    Returns o [B, T, H, V], the variance [B, T, H, V] or None, and the final state.
    """
    step, given = step_function(recurrence), per_token(recurrence, inputs)
    static = {x.name for x in recurrence.inputs if x.per == "static"}
    width = inputs["v"].shape[-1]
    outs, variances = [], []
    for t in range(inputs["q"].shape[1]):
        now = [x if name in static else x[:, t] for name, x in given.items()]
        o, var, state = step(*now, *state, scale=scale, return_variance=variance)
        outs.append(o)
        if variance:
            variances.append(var.expand(*o.shape[:-1], width))
    return torch.stack(outs, 1), torch.stack(variances, 1) if variance else None, state
