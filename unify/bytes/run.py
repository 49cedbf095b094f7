"""One training run: a byte-level language model of one kind of layer, of the same parameters as a Transformer.

The loop is plain, as in `unify.mqar`, not transformers' Trainer: what a comparison adds (steps timed to plan it, windows read in
between, the text on the device, many runs in one process) is more than the loop, and leaves no folders behind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unify.errors import UnifyError
from unify.steps import Steps

from .corpus import Corpus
from .measure import Repeats, measure, repeats

ATTENTION = "transformer"
MODELS = (ATTENTION, "mamba2", "gated_deltanet", "palimpsa_key", "palimpsa")
BYTES = 256
POINTS = 16  # of the learning curve
WATCHED = 64  # windows that the curve is measured on


@dataclass(frozen=True)
class Run:
    """What a run is a function of.

    model: a name of the zoo, or "transformer". steps of batch x length bytes; lr: the highest rate; text: the corpus's digest.
    d_model, layers: of every model. head_dim: K = V of a head, of which there are d_model / head_dim. windows: that are read
    at the end. The SwiGLU after every layer has 8/3 d_model channels in the Transformer, and as many in any other model as
    give it the Transformer's parameters. Raises UnifyError for a model or sizes that do not fit.
    """

    model: str
    lr: float = 2e-3
    seed: int = 1
    steps: int = 1200
    batch: int = 16
    length: int = 2048
    d_model: int = 384
    layers: int = 8
    head_dim: int = 64
    windows: int = 512
    text: str = ""

    def __post_init__(self):
        if self.model != ATTENTION:
            from unify.models import zoo

            zoo.get(self.model)
        if min(self.steps, self.batch, self.d_model, self.layers, self.head_dim, self.windows) < 1 or self.length < 2:
            raise UnifyError(repr(self), "a size is empty", "use 1 or more, and a length of 2 or more")
        if self.d_model % self.head_dim:
            given = f"d_model={self.d_model} with head_dim={self.head_dim}"
            raise UnifyError(given, "a model has a whole number of heads", "use a multiple of head_dim")

    @property
    def key(self) -> str:
        """Names the run in a record: equal runs have equal keys."""
        return repr(self)

    @property
    def tokens(self) -> int:
        """Bytes that are trained on."""
        return self.steps * self.batch * self.length


def config(run: Run):
    """The `UnifyConfig` of a run, its MLPs as wide as equal parameters ask for."""
    made = _config(run)
    if run.model == ATTENTION:
        return made
    step = 8  # channels: what tensor cores like
    per = 3 * run.d_model * run.layers * step
    spare = cost(_config(Run(**{**asdict(run), "model": ATTENTION})))["parameters"] - cost(made)["parameters"]
    return _config(run, made.intermediate_size + step * round(spare / per))


def _config(run: Run, width: int | None = None):
    from unify.models import UnifyConfig

    sizes = {"vocab_size": BYTES, "hidden_size": run.d_model, "num_hidden_layers": run.layers}
    sizes |= {"intermediate_size": width, "max_position_embeddings": run.length}
    sizes |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    heads = run.d_model // run.head_dim
    if run.model == ATTENTION:
        return UnifyConfig(**sizes, layers="full_attention", num_attention_heads=heads, head_dim=run.head_dim)
    return UnifyConfig(**sizes, layers=run.model, layer={"num_heads": heads, "head_dim": run.head_dim})


def cost(config) -> dict[str, int]:
    """Parameters, state bytes at the end of a row, and flops per token of a configuration."""
    from unify.models import budget

    found = budget(config)
    return {"parameters": found["parameters"], "state": found["bytes"], "flops": found["flops"]}


# --- a model and its steps --------------------------------------------------------------------------------------------


class Trainee:
    """A model with its optimizer: AdamW (0.9, 0.95; weight decay 0.1 on matrices), gradients clipped at norm 1; the rate rises
    over the first twentieth and falls on a cosine to 0. Weights in float32; on a GPU all but the head in bfloat16. compiled: what
    is trained on goes through torch.compile; what is only read does not."""

    def __init__(self, run: Run, device: str, compiled: bool = False):
        from transformers import get_cosine_schedule_with_warmup

        from unify.models import UnifyForCausalLM

        torch.manual_seed(run.seed)
        self.model = UnifyForCausalLM(config(run)).to(device)
        self.cast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
        decayed = lambda p: p.ndim >= 2 and not getattr(p, "_no_weight_decay", False)  # noqa: E731
        self.parameters = list(self.model.parameters())
        groups = [{"params": [p for p in self.parameters if decayed(p)]}]
        groups += [{"params": [p for p in self.parameters if not decayed(p)], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=run.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
        )
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, run.steps // 20, run.steps)
        missed = torch.compile(self.loss, dynamic=False) if compiled else self.loss
        self.steps = Steps(missed, self.optimizer, device == "cuda", clip=1.0)

    def logits(self, rows: Tensor) -> Tensor:
        """[B, T - 1, 256], float32: of the bytes after the first, from rows [B, T] uint8."""
        with self.cast:
            hidden = self.model.model(rows.long(), use_cache=False).last_hidden_state[:, :-1]
        return F.linear(hidden.float(), self.model.lm_head.weight)

    def loss(self, rows: Tensor) -> Tensor:
        """Mean nats of a byte of rows [B, T]."""
        return F.cross_entropy(self.logits(rows).flatten(0, 1), rows[:, 1:].flatten().long())

    def step(self, rows: Tensor) -> Tensor:
        """One step on rows [B, T]; the loss, still on the device."""
        loss = self.steps(rows)
        self.schedule.step()
        return loss

    @torch.no_grad()
    def read(self, windows: Tensor, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Bits of each byte and whether it was the most probable, both [count, T]; 0 and False for the first of a window."""
        bits, hits = [], []
        for rows in windows.split(batch):
            logits, wanted = self.logits(rows), rows[:, 1:].long()
            nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
            bits.append(nats / math.log(2))
            hits.append(logits.argmax(-1) == wanted)
        return tuple(F.pad(torch.cat(x), (1, 0)).cpu().numpy() for x in (bits, hits))


def order(rows: int, run: Run) -> Tensor:
    """[steps, batch]: which rows of the text a step sees; a pass over all before any is seen again. A function of the seed."""
    generator, needed = torch.Generator().manual_seed(run.seed), run.steps * run.batch
    passes = [torch.randperm(rows, generator=generator) for _ in range(-(-needed // rows))]
    return torch.cat(passes)[:needed].view(run.steps, run.batch)


def _wait(device: str) -> float:
    """The time, when the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def pace(run: Run, device: str, compiled: bool = False, repeats: int = 5) -> tuple[float, float]:
    """Seconds of a training step and of reading a batch, both of which ran before; on random bytes."""
    trainee = Trainee(run, device, compiled)
    rows = torch.randint(BYTES, (run.batch, run.length), dtype=torch.uint8).to(device)

    def timed(work: Callable[[], object]) -> float:
        for _ in range(Steps.WARM + 1):
            work()
        start = _wait(device)
        for _ in range(repeats):
            work()
        return (_wait(device) - start) / repeats

    return timed(lambda: trainee.step(rows)), timed(lambda: trainee.read(rows, run.batch))


def train(
    run: Run,
    corpus: Corpus,
    device: str = "cpu",
    *,
    compiled: bool = False,
    found: Repeats | None = None,
    progress: Callable[[int, float, float], None] = lambda step, loss, bits: None,
) -> dict[str, Any]:
    """Train once and measure; the record of a run, ready for JSON.

    compiled: through torch.compile. found: the repeats in the corpus's windows, if they are known. progress: is told step, training
    and held-out bits per byte.
    Returns the run, its cost, the curve [[bytes seen, training bits, held-out bits]] on `WATCHED` windows, what `measure` finds
    on all, bytes a second of training (first step and measurements aside, a graph's capture not), seconds in all, device and versions.
    """
    begin = time.perf_counter()
    trainee = Trainee(run, device, compiled)
    text = torch.from_numpy(corpus.stream.copy()).to(device)
    text = text[: len(text) // run.length * run.length].view(-1, run.length)
    windows = torch.from_numpy(corpus.windows[: run.windows].copy()).to(device)
    rows = order(len(text), run).to(device)
    stops = {round(run.steps * (n + 1) / POINTS) for n in range(POINTS)}
    curve, busy, total, since = [], 0.0, torch.zeros((), device=device), 0
    for n in range(run.steps):
        if n == 1 or n in stops:  # the first step compiles
            start = _wait(device)
        total += trainee.step(text[rows[n]])
        done = n + 1
        if done in stops:
            busy += _wait(device) - start if n else 0.0
            bits, _ = trainee.read(windows[:WATCHED], run.batch)
            seen, since = total.item() / (done - since) / math.log(2), done
            curve.append([done * run.batch * run.length, seen, float(bits[:, 1:].mean(dtype=np.float64))])
            total.zero_()
            progress(done, *curve[-1][1:])
    bits, hits = trainee.read(windows, run.batch)
    found = repeats(corpus.windows[: run.windows], corpus.names) if found is None else found
    record = {"run": asdict(run), "key": run.key, **cost(trainee.model.config), **measure(bits, hits, found)}
    record |= {"width": trainee.model.config.intermediate_size, "curve": curve}
    record |= {"files": corpus.files, "text": len(corpus.stream), "read": int(windows.numel())}
    pace = (run.steps - 1) * run.batch * run.length / busy if busy else None
    return record | {
        "pace": pace,
        "seconds": time.perf_counter() - begin,
        "on": _machine(device) + ", torch.compile" * compiled,
    }


def _machine(device: str) -> str:
    if device != "cuda":
        return f"a CPU, torch {torch.__version__}"
    from unify.device import versions

    return versions(device)
