"""unify: a unified-theory toolkit for gated linear attention.

Declare a model as a triple (architecture, posterior, prior); the engine derives its recurrence from one free energy,
proves how models are limits of one another, and runs it. Nothing heavy is imported until it is used.
"""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_WHERE = {
    "triple": ("Architecture", "Observation", "Posterior", "Prior", "Ridge", "Squash", "Triple"),
    "errors": ("UnifyError",),
    "energy": ("FreeEnergy", "free_energy"),
    "recurrence": ("Recurrence",),
    "derive": ("derive",),
    "confirm": ("confirm",),
    "structure": ("Structure", "structure"),
    "plan": ("Plan", "plan"),
    "op": ("Op", "compile"),
    "distributed": ("context_parallel",),
    "models.convert": ("load", "metaplastic", "unmetaplastic"),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}
__all__ = [*_HOME, "__version__"]


class _Package(ModuleType):
    """Where a function is named as its module (derive, plan ...), the package's attribute is the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if _HOME.get(name) == name and isinstance(value, ModuleType):  # the import system binds a submodule
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'unify' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
