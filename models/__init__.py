"""Models: the zoo of declarations, the published recurrences, one layer for any triple and a language model of them.

`Layer` needs torch, all else transformers; each is imported when it is asked for.
"""

from importlib import import_module

from unify.errors import UnifyError

_WHERE = {
    "Layer": "layer",
    "UnifyConfig": "configuration",
    "preset": "configuration",
    "read": "configuration",
    "budget": "cost",
    "UnifyModel": "modeling",
    "UnifyForCausalLM": "modeling",
}


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'unify.models' has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        works = "pip install 'unify-attention[hf]'"
        raise UnifyError(f"unify.models.{name}", "it is made for transformers, which is not installed", works) from None
