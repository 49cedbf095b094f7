"""The task: bindings of keys to values, then keys again, whose values are asked for.

A sequence of T tokens begins with `pairs` bindings k v. After them stand queries, keys bound before, two places apart with
gaps drawn from a power law (close to the bindings more often than far), and the token 0 elsewhere. At a query the target is
the value of its key; everywhere else there is no target (-100). Keys come from the lower half of the vocabulary, values from
the upper, 0 from neither. With `overwrites`, so many keys are bound twice, and the later value counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from unify.errors import UnifyError

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
CHUNK = 512  # sequences drawn from one random stream: how many are asked for changes none of them


@dataclass(frozen=True)
class Task:
    """length: tokens T. pairs: bindings. vocab: tokens. power: of the law of the gaps. overwrites: keys bound a second time,
    among the pairs. Raises UnifyError for sizes that do not fit."""

    length: int = 512
    pairs: int = 128
    vocab: int = 8192
    power: float = 0.01
    overwrites: int = 0

    def __post_init__(self):
        if self.pairs < 1 or 4 * self.pairs > self.length or self.length % 2:
            given = f"Task(length={self.length}, pairs={self.pairs})"
            raise UnifyError(given, "bindings and queries do not fit", "an even length of at least 4 * pairs")
        if not 0 <= self.overwrites <= self.pairs // 2:
            given = f"Task(pairs={self.pairs}, overwrites={self.overwrites})"
            raise UnifyError(given, "a key is bound twice at most", "overwrites from 0 to pairs / 2")
        if self.vocab // 2 - 1 < self.pairs or self.vocab > 32767:
            given = f"Task(vocab={self.vocab}, pairs={self.pairs})"
            raise UnifyError(given, "keys and values are distinct tokens", "a vocab above 2 * pairs + 2, up to 32767")

    @property
    def keys(self) -> int:
        """Distinct keys of a sequence, each asked for once."""
        return self.pairs - self.overwrites

    def __str__(self):
        return f"{self.length}x{self.pairs}" + (f"-{self.overwrites}" if self.overwrites else "")

    @classmethod
    def parse(cls, text: str, **more) -> Task:
        """From "512x128", or "512x128-32" with 32 overwrites. Raises UnifyError."""
        try:
            length, rest = text.split("x")
            pairs, _, again = rest.partition("-")
            return cls(int(length), int(pairs), overwrites=int(again or 0), **more)
        except ValueError as error:
            if isinstance(error, UnifyError):
                raise
            raise UnifyError(f"task {text!r}", "it is no length and number of pairs", "write 512x128") from None

    def make(self, count: int, seed: int, split: int = 0) -> tuple[Tensor, Tensor]:
        """inputs, targets: [count, T], int16; a function of seed and split (0 training, 1 test, ...) alone."""
        import torch

        chunks = [self._chunk(seed, split, n) for n in range(-(-count // CHUNK))]
        inputs, targets = (np.concatenate(column)[:count] for column in zip(*chunks, strict=True))
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    @cached_property
    def _law(self) -> np.ndarray:
        """Log probability of each place where a query may stand, in pairs of tokens after the bindings."""
        places = np.arange(1, (self.length - 2 * self.pairs) // 2 + 1)
        weight = self.power * places ** (self.power - 1.0)
        return np.log(weight / weight.sum())

    def _chunk(self, seed: int, split: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, split, n])
        half, rows = self.vocab // 2, np.arange(CHUNK)[:, None]
        keys = 1 + _distinct(rng, half - 1, self.keys)
        values = half + _distinct(rng, self.vocab - half, self.pairs)
        # who is bound at each place: every key once, the first `overwrites` once more, in any order
        order = np.concatenate([np.arange(self.keys), np.arange(self.overwrites)])
        order = rng.permuted(np.broadcast_to(order, (CHUNK, self.pairs)), axis=1)
        answer = np.zeros((CHUNK, self.keys), np.int16)
        for place in range(self.pairs):  # later bindings overwrite earlier ones
            answer[rows[:, 0], order[:, place]] = values[:, place]
        inputs = np.zeros((CHUNK, self.length), np.int16)
        inputs[:, 0 : 2 * self.pairs : 2], inputs[:, 1 : 2 * self.pairs : 2] = keys[rows, order], values
        # places without replacement by their law: the largest of log p + Gumbel noise
        noisy = self._law + rng.gumbel(size=(CHUNK, len(self._law)))
        at = 2 * self.pairs + 2 * np.argsort(-noisy, axis=1)[:, : self.keys]
        targets = np.full((CHUNK, self.length), IGNORED, np.int16)
        inputs[rows, at], targets[rows, at] = keys, answer
        return inputs, targets


def _distinct(rng: np.random.Generator, among: int, count: int) -> np.ndarray:
    """[CHUNK, count] of range(among), without repetition in a row, in any order: the start of Fisher and Yates's shuffle."""
    pool = np.tile(np.arange(among, dtype=np.int16), CHUNK)
    first, n = among * np.arange(CHUNK), np.arange(count)[:, None]
    partner = first + n + (rng.random((count, CHUNK)) * (among - n)).astype(np.int64)
    drawn = np.empty((count, CHUNK), np.int16)
    for place in range(count):
        drawn[place] = pool[partner[place]]
        pool[partner[place]] = pool[first + place]
    return drawn.T
