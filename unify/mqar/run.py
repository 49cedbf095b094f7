"""One training run: a small language model of one kind of layer, on one task, until it recalls or its steps are over."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unify.errors import UnifyError
from unify.steps import Steps

from .task import IGNORED, Task

ATTENTION = "transformer"
CONVOLVED = "transformer_conv"  # with the convolution of every memory's layer: without one recall did not begin
ATTENTIONS = (ATTENTION, CONVOLVED)
CONTROL = "not_palimpsa"  # as the paper's authors call Palimpsa's layer without importance: around Mamba-2's memory
MODELS = (
    "palimpsa", "palimpsa_key", CONTROL, "mamba2", "metamamba2", "gla", "meta_gla", "gated_deltanet", "meta_gdn", "kda",
    "mesanet", *ATTENTIONS,
)  # fmt: skip
MATCHES = ("none", "state", "parameters")
CONVOLUTION = 4  # in every memory's layer; GLA's published one has none, and no run of it had begun to recall
SOLVED = 0.99


@dataclass(frozen=True)
class Run:
    """What a run is a function of. Set-up of the Palimpsa paper: two layers, no MLP, tied embeddings, AdamW with a cosine.

    model: a name of the zoo, "transformer", "transformer_conv" (its queries, keys and values convolved as a memory's are), or
    "not_palimpsa", Palimpsa's layer without importance. match: "state" or "parameters" changes one size until the model has the
    state or the parameters of Mamba-2 at these sizes: the channels of a memory's values; of a Transformer the channels of a
    head, or, as its state grows with the sequence, how many of the last tokens it attends to.
    sequences: of the training set; steps: of the optimizer, at most, the length of the cosine; the paper's is 60 epochs.
    evaluate_every: steps between two looks at the test set, an epoch in the paper. head_dim: K; expand_v: V / K.
    Raises UnifyError for a model or a size that there is not.
    """

    model: str
    task: Task = field(default_factory=Task)
    lr: float = 2.154e-3
    seed: int = 1
    match: str = "none"
    sequences: int = 100_000
    steps: int = 60 * 781
    evaluate_every: int = 781
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
        check_steps(self)

    @property
    def key(self) -> str:
        """Names the run in a record: equal runs have equal keys."""
        return repr(self)

    def __str__(self):
        match = "" if self.match == "none" else f", equal {self.match}"
        return f"{self.model} {self.task} lr {self.lr:g} seed {self.seed}{match}"


def check_steps(run: Any) -> None:
    """Raise UnifyError where the numbers of steps and sequences make no training."""
    if not 1 <= run.batch <= run.sequences or run.steps < 1 or run.evaluate_every < 1:
        given = f"batch={run.batch}, sequences={run.sequences}, steps={run.steps}, evaluate_every={run.evaluate_every}"
        raise UnifyError(given, "they make no training", "at least one step, and a batch within the sequences")


def config(run: Run):
    """The `UnifyConfig` of a run; a matched one has the size that comes closest."""
    return _plain(run) if run.match == "none" else _matched(replace(run, lr=0.0, seed=0))


def build(run: Run):
    """The model of a run, a `UnifyForCausalLM`."""
    from unify.models import UnifyForCausalLM

    model = UnifyForCausalLM(config(run))
    if run.model == CONVOLVED:
        for block in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(block.mixer, name, Convolved(getattr(block.mixer, name)))
    return model


class Convolved(torch.nn.Module):
    """A projection and the short convolution behind it, silu and all, of `unify.models.Layer`. It keeps no state: for training."""

    def __init__(self, projection: torch.nn.Linear):
        super().__init__()
        bound = CONVOLUTION**-0.5
        self.projection = projection
        self.weight = torch.nn.Parameter(torch.empty(projection.out_features, CONVOLUTION).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, out]."""
        from unify.models.layer import short_convolution

        y = self.projection(x)
        before = y.new_zeros(len(y), CONVOLUTION - 1, y.shape[-1])
        return short_convolution(y, self.weight, None, before)[0]


@cache  # a search, the same for every rate and seed
def _matched(run: Run):
    wanted = cost(replace(run, model="mamba2", match="none"))[run.match]
    size = lambda width: _cost(run, _sized(run, width))[run.match]  # noqa: E731
    low, high = 1, 16 * run.head_dim  # a size grows with the width
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= wanted else (low, middle)
    return _sized(run, min((low, high), key=lambda width: abs(size(width) - wanted)))


def _sized(run: Run, width: int):
    """The configuration with values of so many channels; of attention so many pairs of channels a head, or so many tokens seen."""
    if run.model not in ATTENTIONS:
        return _plain(replace(run, expand_v=width / run.head_dim))
    if run.match == "state":
        return _plain(run, layers="sliding_attention", sliding_window=width)
    return _plain(run, head_dim=2 * width)


def _plain(run: Run, **attention: Any):
    from unify.models import UnifyConfig
    from unify.models.choices import PUBLISHED

    sizes = {"vocab_size": run.task.vocab, "hidden_size": run.d_model, "num_hidden_layers": run.layers}
    more = {
        "intermediate_size": 0,
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "initializer_range": run.d_model**-0.5,
    }
    more |= {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": run.task.length}
    if run.model in ATTENTIONS:
        return UnifyConfig(
            **sizes, **more, **{"layers": "full_attention", "num_attention_heads": run.heads, **attention}
        )
    layer = {
        "num_heads": run.heads,
        "head_dim": run.head_dim,
        "expand_v": run.expand_v,
        "rank": 8,
        "conv_size": CONVOLUTION,
    }
    if run.model == CONTROL:  # a layer's own defaults in place of what Mamba-2's chooses otherwise
        plain = {"conv_bias": False, "norm": "head", "norm_eps": 1e-6}
        return UnifyConfig(**sizes, **more, layers="mamba2", layer={**layer, **plain, **PUBLISHED["palimpsa"]})
    return UnifyConfig(**sizes, **more, layers=run.model, layer=layer)


def cost(run: Run) -> dict[str, int]:
    """Parameters, state bytes and flops per token of a run's model."""
    return _cost(run, config(run))


def _cost(run: Run, made) -> dict[str, int]:
    from unify.models import budget

    found = budget(made)
    width = made.num_attention_heads * made.head_dim
    taps = 3 * CONVOLUTION * width * made.num_hidden_layers if run.model == CONVOLVED else 0
    return {"parameters": found["parameters"] + taps, "state": found["bytes"], "flops": found["flops"] + 2 * taps}


def small_decays(model) -> None:
    """The paper's start for short memories: A from 0.01 to 0.16 over the heads, dt from 0.1 to 0.001."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "A_log") and hasattr(module, "dt_bias"):
                heads = module.A_log.numel()
                dt = torch.logspace(-1, -3, heads, device=module.dt_bias.device)
                module.A_log.copy_(torch.linspace(0.01, 0.16, heads).log())
                module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class Data(NamedTuple):
    """Sequences with what is asked of them: inputs [n, T]; places of the queries and their answers, [n, keys]; all int16."""

    inputs: Tensor
    places: Tensor
    answers: Tensor

    def take(self, rows: Tensor | slice) -> Data:
        """Some of the sequences, as int64. Every row has as many queries, so that no GPU is waited for."""
        return Data(*(x[rows].long() for x in self))


def asked(inputs: Tensor, targets: Tensor) -> Data:
    """The queries of what `Task.make` returns."""
    places = (targets != IGNORED).nonzero()[:, 1].view(len(targets), -1)
    return Data(inputs, places.to(inputs.dtype), targets.gather(1, places))


@lru_cache(2)  # runs of one seed follow each other in a sweep
def data(task: Task, count: int, seed: int, split: int, device: str) -> Data:
    """Sequences of a task on a device."""
    return Data(*(x.to(device) for x in asked(*task.make(count, seed, split))))


Answer = Callable[[Tensor, Tensor], Tensor]  # inputs [b, T], places [b, keys] -> logits [b, keys, vocab]


def answering(model) -> Answer:
    """Logits of a causal language model at the queries alone."""

    def answer(inputs: Tensor, places: Tensor) -> Tensor:
        hidden = model.base_model(inputs, use_cache=False).last_hidden_state
        return model.lm_head(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])))

    return answer


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # inputs, places, answers -> a number


def loss_of(answer: Answer) -> Loss:
    """Mean cross-entropy of the answers, in float32."""

    def loss(inputs: Tensor, places: Tensor, answers: Tensor) -> Tensor:
        logits = answer(inputs, places)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), answers.flatten())

    return loss


@torch.no_grad()
def accuracy(answer: Answer, tests: Data, batch: int) -> float:
    """Share of queries answered right: the most probable token is the value."""
    right = torch.zeros((), dtype=torch.int64, device=tests.inputs.device)
    for start in range(0, len(tests.inputs), batch):
        some = tests.take(slice(start, start + batch))
        right += (answer(some.inputs, some.places).argmax(-1) == some.answers).sum()
    return right.item() / tests.answers.numel()


def batches(sequences: int, batch: int, seed: int, device: str) -> Iterator[Tensor]:
    """Rows of one batch after another, without end, in a new order each epoch; a rest that fills no batch is left out."""
    order = torch.Generator().manual_seed(seed)
    while True:
        shuffled = torch.randperm(sequences, generator=order).to(device)
        yield from shuffled[: sequences // batch * batch].split(batch)


def _groups(model) -> list[dict[str, Any]]:
    """Parameters that decay, and rates, scales and biases that do not."""
    free = [p for p in model.parameters() if getattr(p, "_no_weight_decay", False)]
    rest = [p for p in model.parameters() if not getattr(p, "_no_weight_decay", False)]
    return [{"params": rest}, {"params": free, "weight_decay": 0.0}]


def fit(
    answer: Answer,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    train: Data,
    tests: Data,
    run: Any,
    progress: Callable[[int, float, float], None],
    *,
    prepare: Callable[[int], None] = lambda step: None,
    solved: float = SOLVED,
    loss: Loss | None = None,
    captured: bool = True,
) -> list[list[float]]:
    """Optimize run.steps steps, or until the accuracy is above `solved`; [[step, mean loss since the last, accuracy], ...].

    answer: see `Answer`. loss: its loss where that is not `loss_of(answer)`, such as the same compiled (evaluations are not: they would
    be compiled again for the last, smaller batch and without gradients). run: its batch, seed, steps and evaluate_every are used.
    prepare: called before each step, from 1. bfloat16 on a GPU, weights in float32; the host waits for the GPU at evaluations alone.
    captured: whether steps on a GPU are CUDA graphs.
    """
    device, curve = train.inputs.device.type, []
    rows = batches(len(train.inputs), run.batch, run.seed, device)
    cast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    steps = Steps(cast(loss or loss_of(answer)), optimizer, captured and device == "cuda")
    total, since = torch.zeros((), device=device), 0
    for step in range(1, run.steps + 1):
        prepare(step)
        total, since = total + steps(*train.take(next(rows))), since + 1
        schedule.step()
        if step % run.evaluate_every and step < run.steps:
            continue
        with cast:
            curve.append([step, total.item() / since, accuracy(answer, tests, run.batch)])
        progress(*curve[-1])
        if curve[-1][2] > solved:
            break
        total, since = torch.zeros((), device=device), 0
    return curve


def train(
    run: Run,
    device: str = "cpu",
    *,
    compiled: bool = False,
    also: tuple[Task, ...] = (),
    progress: Callable[[int, float, float], None] = lambda step, loss, accuracy: None,
) -> dict[str, Any]:
    """Train once and measure; the record of a run, ready for JSON.

    AdamW (weight decay 0.1), cosine to 0 over run.steps, one step of it a step (the paper's authors take one an epoch, 60 in
    all, which is nearly the same). Stops after an evaluation with an accuracy above 0.99. also: tasks that are measured
    afterwards, without training on them. Returns the run, its cost, its last accuracy, {task: accuracy} of `also`, the
    curve, and how long it took where.
    """
    began = time.time()
    torch.manual_seed(run.seed)
    model = build(run).to(device)
    small_decays(model)
    sets = [data(run.task, n, run.seed, split, device) for split, n in enumerate((run.sequences, run.tests))]
    optimizer = torch.optim.AdamW(_groups(model), lr=run.lr, weight_decay=0.1, fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    answer = answering(model)
    loss = torch.compile(loss_of(answer), dynamic=False) if compiled else None
    curve = fit(answer, optimizer, schedule, *sets, run, progress, loss=loss)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        others = {str(t): read(answer, run, t, device) for t in also}
    return {"run": asdict(run), "key": run.key, **cost(run), "accuracy": curve[-1][2], "others": others,
            "curve": curve, **spent(began, device)}  # fmt: skip


def read(answer: Answer, run: Run, task: Task, device: str) -> float:
    """Accuracy on the test sequences of a task that was not trained on, as many tokens at a time as in training."""
    tests = data.__wrapped__(task, run.tests, run.seed, 1, device)
    return accuracy(answer, tests, max(1, run.batch * run.task.length // task.length))


def spent(began: float, device: str) -> dict[str, Any]:
    """When a run began and ended (seconds since 1970), how long it took, on what, on which of several such, with which versions."""
    ended = time.time()
    which = {"card": str(torch.cuda.get_device_properties(0).uuid)[:8]} if device == "cuda" else {}
    return {"seconds": ended - began, "began": began, "ended": ended, **machine(device), **which}


def machine(device: str) -> dict[str, Any]:
    """The device's name and the versions of what ran on it."""
    from importlib.metadata import version

    name = torch.cuda.get_device_name() if device == "cuda" else f"a CPU ({platform.machine()})"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    if device == "cuda":
        versions["triton"] = version("triton")
    return {"device": name, "versions": versions}
