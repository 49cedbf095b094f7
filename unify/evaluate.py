"""Standard benchmarks: lm-evaluation-harness's own model class over a checkpoint, native, converted or a plain host.

The harness (extra `eval`) is imported when something is evaluated. It fetches a task's data from the Hugging Face hub;
a task of one's own is a YAML file in a folder named by `include`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UnifyError

if TYPE_CHECKING:
    from rich.table import Table

PRESETS = {
    "commonsense": (
        "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "boolq", "sciq",
    ),
    "needles": (
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
        "niah_multiquery", "niah_multivalue",
    ),
}  # fmt: skip
NEEDLE_TOKENS = 4096 + 128  # a haystack, and what is generated after it


@dataclass(frozen=True)
class Score:
    """One number of one task. metric: as the harness names it; stderr: None where it gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None


def need_harness() -> None:
    """Raise UnifyError where lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise UnifyError("eval", "lm-evaluation-harness is not installed", "pip install 'unify-attention[eval]'")


def evaluate(
    path: str | Path,
    tasks: Iterable[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
) -> list[Score]:
    """Scores of a checkpoint folder on tasks of lm-evaluation-harness.

    tasks: names of tasks, groups or presets (`commonsense`, `needles`). include: a folder with tasks of one's own.
    limit: examples a task, for a first look. device: "auto" is a GPU where there is one. Raises UnifyError where the
    harness is not installed, a task is not known or its data cannot be fetched, or the checkpoint cannot be opened.
    """
    need_harness()
    path = Path(path)
    if not path.is_dir():
        raise UnifyError(str(path), "there is no such folder", "name the folder of a checkpoint")
    wanted = list(dict.fromkeys(name for task in tasks for name in PRESETS.get(task, (task,))))
    manager = _manager(wanted, path, include)
    model, tokenizer = _open(path, device)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    length = getattr(model.config, "max_position_embeddings", None) or 0
    reach = {"max_length": max(length, NEEDLE_TOKENS)} if set(wanted) & set(PRESETS["needles"]) else {}
    harness = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, **reach)
    try:
        found = simple_evaluate(harness, tasks=wanted, task_manager=manager, limit=limit, log_samples=False)
    except RuntimeError as error:  # memory that ran out, or kernels that want another device
        reason = " ".join(str(error).split())[:200]
        raise UnifyError(str(path), f"it does not run here ({reason})", "a smaller batch, or another device") from error
    return scores(found["results"])


def _manager(wanted: list[str], path: Path, include: str | Path | None) -> Any:
    """The harness's index of tasks, after every wanted task's data is at hand."""
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        raise UnifyError(str(include), "there is no such folder", "name the folder of a task's YAML file")
    manager = TaskManager(include_path=include and str(include), metadata={"tokenizer": str(path)})
    for name in wanted:
        if not manager.match_tasks([name]):
            near = get_close_matches(name, [*PRESETS, *manager.all_tasks]) or list(PRESETS)
            raise UnifyError(f"task {name!r}", "lm-evaluation-harness has none of that name", f"use {', '.join(near)}")
    try:
        manager.load(wanted)
    except Exception as error:  # the hub, the reader of a format, a task's own code: each has its own errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        works = "a network that reaches the Hugging Face hub, or tasks over local files (--include-path)"
        raise UnifyError(", ".join(wanted), f"their data cannot be had ({reason})", works) from error
    return manager


def _open(path: Path, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint folder."""
    import torch
    from transformers import AutoTokenizer

    from .models.checkpoint import open_host
    from .models.convert import RECORD, load

    import_module("unify.models.modeling")  # tells transformers of our own models
    model = (load if (path / RECORD).exists() else open_host)(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise UnifyError(str(path), "its tokenizer cannot be loaded", "a checkpoint with its tokenizer") from error
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(place), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise UnifyError(f"device {device}", "torch cannot put a model there", "use cpu, cuda or auto") from error


def scores(results: dict[str, dict[str, Any]]) -> list[Score]:
    """The harness's results, one number a row: {task: {"acc,none": value, "acc_stderr,none": ...}}."""
    rows = []
    for task, found in results.items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = found.get(f"{metric}_stderr,{kind}")
                name = metric if kind == "none" else f"{metric} ({kind})"
                rows.append(Score(task, name, float(value), error if isinstance(error, int | float) else None))
    return rows


def table(rows: list[Score]) -> Table:
    """Scores for a terminal."""
    from rich.table import Table

    shown = Table("task", "metric", box=None, pad_edge=False, header_style="bold")
    for name in ("value", "±"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(row.task, row.metric, f"{row.value:.4f}", "" if row.stderr is None else f"{row.stderr:.4f}")
    return shown
