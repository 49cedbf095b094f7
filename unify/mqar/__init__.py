"""Multi-query associative recall (MQAR): the task, one training run, a sweep of runs, and what they show.

    from unify.mqar import Task, Run
    inputs, targets = Task(length=64, pairs=8, vocab=256).make(1000, seed=0)

Source of the task: Arora et al., Zoology, 2023, arXiv 2312.04927; of the set-up: Bonnet et al., Palimpsa, 2026, arXiv 2602.09075.
"""

from importlib import import_module

_WHERE = {"Task": "task", "Run": "run", "train": "run", "sweep": "sweep"}


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'unify.mqar' has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
