"""A model at a load that it cannot hold, made metaplastic: what the importance gains beside training on without it.

    record = transform(Transformation("mamba2", Task(512, 128), seed=1), "cuda")

Hosts are transformers' own models, converted by `unify.metaplastic` before they are trained. Their importance is held at its
zero, where the metaplastic memory is the host's, until they have stopped rising; then every branch goes on from the same
weights with the same tokens in the same order and the same schedule. So all of them, the unconverted one too, run on the
same kernels and take as long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from unify.errors import UnifyError

from .run import answering, check_steps, data, fit, loss_of, small_decays, spent
from .task import Task

HOSTS = ("mamba2", "gated_deltanet")
# what trains: (importance, host) in the first half of the steps, and in the second
BRANCHES = {
    "unconverted": ((False, True), (False, True)),
    "importance alone": ((True, False), (True, False)),
    "importance, then everything": ((True, False), (True, True)),
    "everything": ((True, True), (True, True)),
}


@dataclass(frozen=True)
class Transformation:
    """What it is a function of; sizes as in `Run`.

    host: "mamba2" or "gated_deltanet". lr: highest rate until the plateau; again: of the branches, relative to it. scales: rate
    of the importance's scale, one number a head, relative to that. plateau, steps: optimizer steps before converting, and of
    each branch; either has a cosine to 0 of its own, the branches' after a start of 20 steps. importance: "key", "diagonal" or
    None, the family's own. sequences: at most, before and once more after. Raises UnifyError for a host that there is not.
    """

    host: str
    task: Task = field(default_factory=Task)
    lr: float = 4.642e-3
    seed: int = 1
    again: float = 0.5
    scales: float = 3.0
    plateau: int = 3000
    steps: int = 1000
    evaluate_every: int = 250
    importance: str | None = None
    sequences: int = 100_000
    batch: int = 128
    d_model: int = 128
    layers: int = 2
    heads: int = 8
    head_dim: int = 16
    expand_v: float = 2.0
    tests: int = 3000

    def __post_init__(self):
        if self.host not in HOSTS:
            raise UnifyError(f"host {self.host!r}", "there is no such host", f"use {' or '.join(HOSTS)}")
        if self.heads * round(self.head_dim * self.expand_v) % self.d_model:
            given = f"heads={self.heads}, head_dim={self.head_dim}, expand_v={self.expand_v}, d_model={self.d_model}"
            raise UnifyError(
                given, "a Mamba-2 is wider than its model by a whole factor", "heads * head_dim * expand_v = 2 d_model"
            )
        for steps in (self.steps, self.plateau):
            check_steps(phase(self, steps))

    @property
    def key(self) -> str:
        """Names it in a record: equal ones have equal keys."""
        return repr(self)

    def __str__(self):
        return f"{self.host} {self.task} lr {self.lr:g} seed {self.seed}"


@dataclass(frozen=True)
class Phase:
    """What `fit` reads of a run."""

    batch: int
    sequences: int
    seed: int
    steps: int
    evaluate_every: int


def phase(run: Transformation, steps: int) -> Phase:
    """One phase of a transformation: so many steps."""
    return Phase(run.batch, run.sequences, run.seed, steps, run.evaluate_every)


def host(run: Transformation):
    """A small random host, made metaplastic and held at zero: everything but its importance trains."""
    from unify.models.convert import branches, metaplastic

    model = _mamba2(run) if run.host == "mamba2" else _gated_deltanet(run)
    small_decays(model)
    metaplastic(model, run.importance, quiet=True)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in branches(model))
    return model


def _shared(run: Transformation) -> dict[str, Any]:
    return {
        "vocab_size": run.task.vocab, "hidden_size": run.d_model, "num_hidden_layers": run.layers, "tie_word_embeddings": True,
        "initializer_range": run.d_model**-0.5, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def _mamba2(run: Transformation):
    from transformers import Mamba2Config, Mamba2ForCausalLM

    width = round(run.head_dim * run.expand_v)
    config = Mamba2Config(
        **_shared(run), num_heads=run.heads, head_dim=width, state_size=run.head_dim, n_groups=run.heads,
        expand=run.heads * width // run.d_model,
    )  # fmt: skip
    return Mamba2ForCausalLM(config)


def _gated_deltanet(run: Transformation):
    """Qwen3.5's layers without its attention, their MLPs as narrow as they can be of use: a quarter of the model's width."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        **_shared(run), layer_types=["linear_attention"] * run.layers, intermediate_size=run.d_model // 4,
        linear_num_key_heads=run.heads, linear_num_value_heads=run.heads, linear_key_head_dim=run.head_dim,
        linear_value_head_dim=round(run.head_dim * run.expand_v), num_attention_heads=1, num_key_value_heads=1,
        head_dim=run.head_dim,
    )  # fmt: skip
    return Qwen3_5ForCausalLM(config)


def _optimizer(model, lr: float, scales: float, device: str) -> torch.optim.AdamW:
    """AdamW as in `run.train`: matrices decay. The importance's scales have a rate of their own."""
    named = list(model.named_parameters())
    kinds = [
        {"params": [p for _, p in named if p.ndim > 1]},
        {"params": [p for n, p in named if p.ndim < 2 and not n.endswith("importance.scale")], "weight_decay": 0.0},
        {"params": [p for n, p in named if n.endswith("importance.scale")], "weight_decay": 0.0, "lr": lr * scales},
    ]
    return torch.optim.AdamW(kinds, lr=lr, weight_decay=0.1, fused=device == "cuda")


def _cosine(optimizer: torch.optim.Optimizer, steps: int, start: int) -> torch.optim.lr_scheduler.LambdaLR:
    """From the rate to 0, after `start` steps in which it rises to it."""
    factor = lambda n: min(1.0, (n + 1) / start) * (1 + math.cos(math.pi * n / steps)) / 2  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def transform(
    run: Transformation,
    device: str = "cpu",
    *,
    compiled: bool = False,
    progress: Callable[[int, float, float], None] = lambda step, loss, accuracy: None,
) -> dict[str, Any]:
    """Train to the plateau, go on in every branch; the record of all, ready for JSON. compiled: through torch.compile.

    A parameter that does not train has no gradient, so that the optimizer leaves it as it is. Returns the transformation, the
    accuracy before, its curve, for each branch the accuracy, the curve and how many parameters trained, and how long it took.
    """
    from unify.models.convert import branches

    began = time.time()
    torch.manual_seed(run.seed)
    model = host(run).to(device)
    ours, named, answer = set(branches(model)), list(model.named_parameters()), answering(model)
    loss = torch.compile(loss_of(answer), dynamic=False) if compiled else None
    tests = data(run.task, run.tests, run.seed, 1, device)

    def train(split: int, rate: float, steps: int, start: int, parts: tuple, said: int) -> dict[str, Any]:
        def prepare(step: int) -> None:
            for (importance, rest), first in zip(parts, (1, steps // 2 + 1), strict=True):
                wanted = {p: importance if n in ours else rest for n, p in named} if step == first else {}
                if any(p.requires_grad != trains for p, trains in wanted.items()):
                    for p, trains in wanted.items():
                        p.requires_grad_(trains)
                    if compiled:  # torch 2.11 would take the graph of what trained before
                        torch.compiler.reset()

        sequences = data(run.task, min(run.sequences, max(run.batch, steps * run.batch)), run.seed, split, device)
        optimizer = _optimizer(model, rate, run.scales, device)
        curve = fit(
            answer, optimizer, _cosine(optimizer, steps, start), sequences, tests, phase(run, steps),
            lambda step, *seen: progress(said + step, *seen), prepare=prepare, solved=1.0, loss=loss,
        )  # fmt: skip
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {"accuracy": curve[-1][2], "curve": curve, "trained": trained}

    before = train(0, run.lr, run.plateau, 1, BRANCHES["unconverted"], 0)
    start, found = {name: x.clone() for name, x in model.state_dict().items()}, {}
    for n, (name, parts) in enumerate(BRANCHES.items()):
        model.load_state_dict(start)
        found[name] = train(2, run.lr * run.again, run.steps, 20, parts, run.plateau + n * run.steps)
    counts = {"added": model.metaplasticity.added, "total": model.metaplasticity.total}
    return {"transformation": asdict(run), "key": run.key, **before, "branches": found, **counts,
            **spent(began, device)}  # fmt: skip
