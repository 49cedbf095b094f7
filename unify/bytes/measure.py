"""What a model's losses on held-out windows say: by position, and on names that stood in the window before.

losses: [count, length], bits that the model needs for each byte given those before it in its window; column 0 is nobody's.
hits: [count, length], whether the byte was the most probable one.

A *name* is an identifier of at least `LETTERS` bytes that the training text does not hold, so that nothing but the window can
tell it, whole inside the window. Its first `CUE` bytes say which name it is; the bytes after them are scored. A *repeat* is
any occurrence after the first in its window; its *distance* is from the start of the occurrence before it to its own start.
Each repeat is set beside the first occurrence of the same name in the same window: the same bytes, not yet seen.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .corpus import NAME

LETTERS = 6
CUE = 3


@dataclass(frozen=True)
class Repeats:
    """Where repeats are, each [n]: row of the window, start of the repeat, start of the name's first occurrence there,
    length of the name, distance; in bytes."""

    row: np.ndarray
    start: np.ndarray
    first: np.ndarray
    length: np.ndarray
    distance: np.ndarray


def repeats(windows: np.ndarray, known: Collection[bytes]) -> Repeats:
    """The repeats of windows [count, length], of names that are not in `known`."""
    found = []
    for row, window in enumerate(windows):
        text, seen = window.tobytes(), {}
        for match in NAME.finditer(text):
            start, end, name = match.start(), match.end(), match.group()
            if len(name) < LETTERS or name in known or _cut(text, start, end):
                continue
            first, last = seen.get(name, (start, start))
            if name in seen:
                found.append((row, start, first, len(name), start - last))
            seen[name] = first, start
    return Repeats(*np.array(found, np.int64).reshape(-1, 5).T)


def _cut(text: bytes, start: int, end: int) -> bool:
    """Whether the window's edge, or a digit before it, makes this the part of something longer."""
    return start == 0 or end == len(text) or text[start - 1 : start].isdigit()


def buckets(length: int, first: int = 64) -> list[tuple[int, int]]:
    """[(1, 64), (64, 128), (128, 256), ...) up to length."""
    edges = [1]
    while edges[-1] < length:
        edges.append(min(max(2 * edges[-1], first), length))
    return list(pairwise(edges))


def by_position(losses: np.ndarray) -> list[dict[str, float]]:
    """Bits per byte where so many bytes of context came before: [{"from", "to" (not included), "bits"}]."""
    return [
        {"from": a, "to": b, "bits": float(losses[:, a:b].mean(dtype=np.float64))} for a, b in buckets(losses.shape[1])
    ]


def recall(losses: np.ndarray, hits: np.ndarray, found: Repeats) -> list[dict[str, float]]:
    """By distance: bits and accuracy of the scored bytes of repeats, and of the same names' first occurrences.

    Returns [{"from", "to", "repeats", "bytes", "bits", "first_bits", "accuracy", "first_accuracy"}], per scored byte, without
    buckets that hold no repeat; the last entry, from 1 to the length, is of all.
    """
    length = losses.shape[1]
    sums = [_sums(losses, found, found.start), _sums(losses, found, found.first)]
    sums += [_sums(hits, found, found.start), _sums(hits, found, found.first)]
    out = []
    for a, b in [*buckets(length), (1, length)]:
        mine = (found.distance >= a) & (found.distance < b)
        count = int((found.length[mine] - CUE).sum())
        if count:
            bits, first, right, before = (float(x[mine].sum() / count) for x in sums)
            out.append({"from": a, "to": b, "repeats": int(mine.sum()), "bytes": count, "bits": bits, "first_bits": first,
                        "accuracy": right, "first_accuracy": before})  # fmt: skip
    return out


def _sums(values: np.ndarray, found: Repeats, start: np.ndarray) -> np.ndarray:
    """[n], the sum over the scored bytes of the occurrences that begin at start."""
    total = np.pad(np.cumsum(values, 1, dtype=np.float64), ((0, 0), (1, 0)))
    return total[found.row, start + found.length] - total[found.row, start + CUE]


def measure(losses: np.ndarray, hits: np.ndarray, found: Repeats) -> dict[str, Any]:
    """Everything: bits per byte and accuracy after the first byte of each window, by position, and recall by distance."""
    return {
        "bits": float(losses[:, 1:].mean(dtype=np.float64)),
        "accuracy": float(hits[:, 1:].mean()),
        "positions": by_position(losses),
        "recall": recall(losses, hits, found),
    }
