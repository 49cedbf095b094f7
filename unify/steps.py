"""Training steps on batches of one shape; on a GPU a step becomes a CUDA graph, as its many kernels take less time than their launches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection: it may destroy an earlier run's graph, which no capture survives; torch itself collects no more."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Steps:
    """Optimizer steps; each takes the loss's arguments, tensors of the same shapes every time, and returns the loss, detached.

    loss: a number from tensors. clip: the norm above which gradients are scaled down to it. captured: after `WARM` steps, a step is a
    graph that replays on the arguments' values; a new one is captured when other parameters train. Needs parameters on a GPU and
    an optimizer that can be captured (AdamW); its rates become tensors there, which a schedule writes to. Steps before the capture
    run on its stream: what autograd keeps of them (a parameter's accumulator lives as long as a graph of its gradient) remembers
    the stream it was made on, and a capture does not survive that another one is waited for.
    """

    WARM = 3

    def __init__(
        self, loss: Callable[..., Tensor], optimizer: torch.optim.Optimizer, captured: bool, clip: float | None = None
    ):
        self.loss, self.optimizer, self.captured, self.clip = loss, optimizer, captured, clip
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.seen, self.trained = 0, None
        self.stream = torch.cuda.Stream(self.parameters[0].device) if captured else None
        for group in optimizer.param_groups if captured else ():
            group.update(capturable=True, lr=torch.tensor(group["lr"], device=self.parameters[0].device))

    def __call__(self, *given: Tensor) -> Tensor:
        """One step."""
        trained = [p.requires_grad for p in self.parameters]
        if trained != self.trained:
            self.trained, self.seen, self.graph = trained, 0, None
        self.seen += 1
        if not self.captured:
            return self._step(*given)
        if self.seen <= self.WARM:
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                missed = self._step(*given)
            here.wait_stream(self.stream)
            return missed
        if self.graph is None:
            self.graph, self.given = torch.cuda.CUDAGraph(), [x.clone() for x in given]
            with uncollected(), torch.cuda.graph(self.graph, stream=self.stream):
                self.missed = self._step(*self.given)
        for kept, x in zip(self.given, given, strict=True):
            kept.copy_(x)
        self.graph.replay()
        return self.missed.clone()

    def _step(self, *given: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        missed = self.loss(*given)
        missed.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return missed.detach()
