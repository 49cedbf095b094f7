"""One training run: a small language model of one kind of layer, on one task, until it recalls or its steps are over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from unify.errors import UnifyError

from .task import IGNORED, Task

ATTENTION = "transformer"
MODELS = (
    "palimpsa", "palimpsa_key", "mamba2", "metamamba2", "gla", "meta_gla", "gated_deltanet", "meta_gdn", "kda", "mesanet",
    ATTENTION,
)  # fmt: skip
MATCHES = ("none", "state", "parameters")
SOLVED = 0.99


@dataclass(frozen=True)
class Run:
    """What a run is a function of. Set-up of the Palimpsa paper: two layers, no MLP, tied embeddings, AdamW with a cosine.

    model: a name of the zoo, or "transformer". match: "state" or "parameters" widens or narrows the values until the
    model has the state or the parameters of Mamba-2 at these sizes. sequences: of the training set; epochs: over it, at
    most. head_dim: K; expand_v: V / K.
    """

    model: str
    task: Task = field(default_factory=Task)
    lr: float = 2.154e-3
    seed: int = 1
    match: str = "none"
    sequences: int = 100_000
    epochs: int = 60
    batch: int = 128
    d_model: int = 128
    layers: int = 2
    heads: int = 8
    head_dim: int = 16
    expand_v: float = 2.0
    tests: int = 3000

    def __post_init__(self):
        if self.model not in MODELS:
            from unify.models import zoo

            zoo.get(self.model)
        if self.match not in MATCHES:
            raise UnifyError(
                f"match={self.match!r}", "models are matched by no such number", f"use {', '.join(MATCHES)}"
            )
        if self.match != "none" and self.model == ATTENTION:
            raise UnifyError("a matched transformer", "its state grows with the sequence", "use match='none'")

    @property
    def key(self) -> str:
        """Names the run in a record: equal runs have equal keys."""
        return repr(self)

    @property
    def steps(self) -> int:
        """Optimizer steps, if it is not solved before."""
        return self.epochs * (self.sequences // self.batch)


def config(run: Run):
    """The `UnifyConfig` of a run; a matched one has the values' width that comes closest."""
    return _plain(run) if run.match == "none" else _matched(replace(run, lr=0.0, seed=0))


@cache  # a search, the same for every rate and seed
def _matched(run: Run):
    wanted = cost(_plain(replace(run, model="mamba2")))[run.match]
    size = lambda v: cost(_plain(replace(run, expand_v=v / run.head_dim)))[run.match]  # noqa: E731
    low, high = 1, 16 * run.head_dim  # a size grows with the width
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= wanted else (low, middle)
    nearest = min((low, high), key=lambda v: abs(size(v) - wanted))
    return _plain(replace(run, expand_v=nearest / run.head_dim))


def _plain(run: Run):
    from unify.models import UnifyConfig

    sizes = {"vocab_size": run.task.vocab, "hidden_size": run.d_model, "num_hidden_layers": run.layers}
    more = {
        "intermediate_size": 0,
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "initializer_range": run.d_model**-0.5,
    }
    more |= {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": run.task.length}
    if run.model == ATTENTION:
        return UnifyConfig(**sizes, **more, layers="full_attention", num_attention_heads=run.heads)
    layer = {"num_heads": run.heads, "head_dim": run.head_dim, "expand_v": run.expand_v, "rank": 8}
    return UnifyConfig(**sizes, **more, layers=run.model, layer=layer)


def cost(config) -> dict[str, int]:
    """Parameters, state bytes and flops per token of a configuration."""
    from unify.models import budget

    found = budget(config)
    return {"parameters": found["parameters"], "state": found["bytes"], "flops": found["flops"]}


def small_decays(model) -> None:
    """The paper's start for short memories: A from 0.01 to 0.16 over the heads, dt from 0.1 to 0.001."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "A_log") and hasattr(module, "dt_bias"):
                heads = module.A_log.numel()
                dt = torch.logspace(-1, -3, heads, device=module.dt_bias.device)
                module.A_log.copy_(torch.linspace(0.01, 0.16, heads).log())
                module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def accuracy(model, inputs: Tensor, targets: Tensor, batch: int) -> float:
    """Share of queries answered right: the most probable token is the value."""
    right = asked = 0
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        wanted = y != IGNORED
        answer = _logits(model, x, wanted).argmax(-1)
        right += (answer == y[wanted]).sum().item()
        asked += wanted.sum().item()
    return right / asked


def _logits(model, inputs: Tensor, where: Tensor) -> Tensor:
    """[n, vocab] at the queries alone."""
    hidden = model.model(inputs.long(), use_cache=False).last_hidden_state
    return model.lm_head(hidden[where]).float()


def _groups(model) -> list[dict[str, Any]]:
    """Parameters that decay, and rates, scales and biases that do not."""
    free = [p for p in model.parameters() if getattr(p, "_no_weight_decay", False)]
    rest = [p for p in model.parameters() if not getattr(p, "_no_weight_decay", False)]
    return [{"params": rest}, {"params": free, "weight_decay": 0.0}]


def train(
    run: Run,
    device: str = "cpu",
    *,
    compiled: bool = False,
    also: tuple[Task, ...] = (),
    progress: Callable[[int, float, float], None] = lambda step, loss, accuracy: None,
) -> dict[str, Any]:
    """Train once and measure; the record of a run, ready for JSON.

    AdamW (weight decay 0.1), cosine to 0 over all epochs, one step of it an epoch; bfloat16 on a GPU, weights in float32.
    Stops after an epoch with an accuracy above 0.99. also: tasks that are measured afterwards, without training on them.
    Returns the run, its cost, its accuracy after the last epoch, {task: accuracy} of `also`, the curve, seconds.
    """
    from unify.models import UnifyForCausalLM

    torch.manual_seed(run.seed)
    model = UnifyForCausalLM(config(run)).to(device)
    small_decays(model)
    inputs, targets = (x.to(device) for x in run.task.make(run.sequences, run.seed))
    tests = [x.to(device) for x in run.task.make(run.tests, run.seed, split=1)]
    optimizer = torch.optim.AdamW(_groups(model), lr=run.lr, weight_decay=0.1, fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs)
    forward = torch.compile(_logits) if compiled else _logits
    cast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    order, curve, start = torch.Generator().manual_seed(run.seed), [], time.perf_counter()
    for epoch in range(run.epochs):
        total = torch.zeros((), device=device)
        shuffled = torch.randperm(run.sequences, generator=order).to(device)
        batches = shuffled[: run.sequences // run.batch * run.batch].split(run.batch)
        for rows in batches:
            x, y = inputs[rows], targets[rows].long()
            where = y != IGNORED
            with cast:
                logits = forward(model, x, where)
            loss = torch.nn.functional.cross_entropy(logits, y[where])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        schedule.step()
        with cast:
            curve.append([(epoch + 1) * len(batches), total.item() / len(batches), accuracy(model, *tests, run.batch)])
        progress(*curve[-1])
        if curve[-1][2] > SOLVED:
            break
    seconds = time.perf_counter() - start
    with cast:
        others = {
            str(t): accuracy(model, *(x.to(device) for x in t.make(run.tests, run.seed, 1)), run.batch) for t in also
        }
    return {"run": asdict(run), "key": run.key, **cost(config(run)), "accuracy": curve[-1][2], "others": others,
            "curve": curve, "seconds": seconds, "on": _machine(device)}  # fmt: skip


def _machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    return f"{name}, torch {torch.__version__}"
