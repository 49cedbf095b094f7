"""Text of any folders as bytes: a training stream and windows of held-out files.

Which files are held out, and the order of all, follow from a hash of their paths below the folder that was named, so that they
are the same on every machine and for every model. A file that holds a NUL is no text; so the byte 0 is free to end a document.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unify.errors import UnifyError

END = 0
NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")
LARGEST = 1 << 18  # bytes that are read of one file: generated tables would crowd out all else
EACH = 4  # windows of one held-out file, at most


def place(path: str) -> float:
    """Where a path falls in [0, 1), evenly over paths and the same everywhere."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:6], "big") / 2**48


def held_out(path: str, share: float) -> bool:
    """Whether the file of that path is kept from training, for a share of all files."""
    return place(path) < share


def python_sources() -> list[str]:
    """The folders of this Python's installed packages and of its standard library."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(paths[x] for x in ("purelib", "platlib", "stdlib")))


def check(folders: Sequence[str | Path]) -> None:
    """Raises UnifyError where one of them is missing."""
    for folder in folders:
        if not Path(folder).exists():
            raise UnifyError(str(folder), "there is no such file or folder", "name one that holds text")


def _files(folders: Sequence[str | Path], pattern: str) -> list[tuple[str, Path]]:
    """(path below its folder, file), each file once, in the order of the hash. Raises UnifyError where there is none."""
    found: dict[Path, str] = {}
    for folder in map(Path, folders):
        for path in [folder] if folder.is_file() else folder.glob(pattern):
            if path.is_file():
                found.setdefault(path.resolve(), path.name if folder.is_file() else path.relative_to(folder).as_posix())
    if not found:
        where = ", ".join(map(str, folders))
        raise UnifyError(where, f"no file there matches {pattern!r}", "name another folder or pattern")
    return sorted(((name, path) for path, name in found.items()), key=lambda x: (place(x[0]), x[0]))


def _documents(files: list[tuple[str, Path]], seen: set[bytes]) -> Iterator[bytes]:
    """What each file holds, without files that are no text and copies of one that came before."""
    for _, path in files:
        try:
            with path.open("rb") as file:
                text = file.read(LARGEST)
        except OSError:  # a link to nowhere, a file of somebody else's
            continue
        digest = hashlib.sha256(text).digest()
        if text and 0 not in text and digest not in seen:
            seen.add(digest)
            yield text


@dataclass(frozen=True)
class Corpus:
    """stream: uint8 [n], documents that each end in a byte 0. windows: uint8 [count, length], each inside one held-out file.

    files: that the stream is made of. names: every identifier of the stream. digest: of stream and windows.
    """

    stream: np.ndarray
    windows: np.ndarray
    files: int = 0
    names: frozenset[bytes] = field(default=frozenset(), repr=False)
    digest: str = ""

    @classmethod
    def read(
        cls,
        folders: Sequence[str | Path],
        *,
        pattern: str = "**/*.py",
        length: int = 2048,
        size: int = 40_000_000,
        windows: int = 512,
        share: float = 0.05,
    ) -> Corpus:
        """Read until the stream has `size` bytes and `windows` held-out windows are found, or the files are over.

        Raises UnifyError where a folder is missing or too little is in it.
        """
        check(folders)
        files, seen = _files(folders, pattern), set()
        apart = [x for x in files if held_out(x[0], share)]
        kept = list(_windows(_documents(apart, seen), length, windows))
        if not kept:
            given = f"{len(files)} files, {len(apart)} of them held out"
            raise UnifyError(given, f"none held out has {length} bytes", "more or longer files, or a shorter --length")
        parts, total = [], 0
        for text in _documents(files[len(apart) :], seen):
            if total >= size:
                break
            parts.append(text + bytes([END]))
            total += len(parts[-1])
        if total < length:
            raise UnifyError(f"{total} bytes of text", f"they do not fill one row of {length}", "name more files")
        stream, held = b"".join(parts)[:size], np.random.default_rng(0).permutation(np.stack(kept))
        digest = hashlib.sha256(stream + held.tobytes()).hexdigest()[:12]
        names = frozenset(NAME.findall(stream))
        return cls(np.frombuffer(stream, np.uint8), held, len(parts), names, digest)


def _windows(documents: Iterator[bytes], length: int, count: int) -> Iterator[np.ndarray]:
    """The first `count` windows: from every document, spread over it, at most `EACH` that do not overlap."""
    for text in documents:
        there = len(text) // length
        for n in np.linspace(0, there - 1, min(there, EACH)).astype(int) if there else ():
            if count == 0:
                return
            count -= 1
            yield np.frombuffer(text, np.uint8)[n * length : (n + 1) * length]
