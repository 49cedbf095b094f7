"""metaplastic(model): one call that gives other people's models an importance, in place, and takes it back.

The host keeps its class, its weights, its attention, MLPs and experts. Each gated-linear-attention mixer gains a branch
`importance` that starts at exactly zero, where its memory is the source's (theory: the curvature none becomes key or
diagonal, the prior precision is 1). What is saved is the host's own format and, beside it, two small files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import nn

from unify.errors import UnifyError
from unify.models.mixers import SHAPES, Importance, family, grafted, sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD, WEIGHTS, BRANCH = "unify_adapter.json", "unify_adapter.safetensors", "importance"
FORMAT = 1
TRAIN = ("importance", "all")


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; a model carries it as `model.metaplasticity`.

    mixers: name of each mixer -> "key" or "diagonal". rank: of the importance's low-rank projection. host: the model type.
    added, total: parameters of the branches and of the model with them. frozen: what stopped training.
    """

    mixers: dict[str, str]
    rank: int
    host: str
    added: int
    total: int
    frozen: tuple[str, ...] = field(default=(), repr=False)

    def __str__(self):
        kinds = {kind: list(self.mixers.values()).count(kind) for kind in SHAPES}
        made = " and ".join(f"{n} mixer{'s' * (n > 1)} with a {kind} importance" for kind, n in kinds.items() if n)
        trained = "the importance alone trains" if self.frozen else "everything trains"
        return f"{made}: {self.added:,} of {self.total:,} parameters added ({self.added / self.total:.2%}); {trained}"


def mixers(model: nn.Module) -> dict[str, nn.Module]:
    """The gated-linear-attention mixers of a model that have a family, by name."""
    return {name: m for name, m in model.named_modules() if family(m) is not None}


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every part of a layer that mixes tokens: it knows its layer's index, or has a family."""
    for name, m in model.named_modules():
        inner = (c for c in m.modules() if c is not m)
        if family(m) is not None or (hasattr(m, "layer_idx") and not any(hasattr(c, "layer_idx") for c in inner)):
            yield name, m


def metaplastic(
    model: PreTrainedModel,
    importance: str | None = None,
    *,
    rank: int | None = None,
    train: str = "importance",
    quiet: bool = False,
) -> PreTrainedModel:
    """Give every gated-linear-attention mixer of a causal language model an importance, in place; returns the model.

    importance: "diagonal" (each memory entry has its own), "key" (shared by a row's value channels: matrix-multiply
        speed), or None: diagonal for additive memories, key for delta rules, which have no parallel form with a diagonal.
    rank: of the low-rank projection; None is hidden_size / 32, at least 4.
    train: "importance" freezes the rest, "all" freezes nothing; torch.compile (2.11) does not see it when this changes later, and
        wants a torch.compiler.reset() then. quiet: do not print the line with the counts.
    Logits are the host's to rounding until the branch's scale is trained away from 0. Raises UnifyError where no mixer is
    known, naming those that are there, and where one is known that this version of its library does not let in.
    Source: Palimpsa, arXiv 2602.09075; the zero start is ours.
    """
    if isinstance(getattr(model, "metaplasticity", None), Conversion):
        raise UnifyError(type(model).__name__, "it is metaplastic already", "unmetaplastic(model) first")
    if importance not in (None, *SHAPES) or train not in TRAIN or (rank is not None and rank < 1):
        raise UnifyError(
            f"metaplastic(importance={importance!r}, rank={rank!r}, train={train!r})",
            "an importance is shared by value channels or has one for each, a rank is at least 1",
            "importance 'key', 'diagonal' or None; rank None or 1 and more; train 'importance' or 'all'",
        )
    found = mixers(model)
    if not found:
        strangers = ", ".join(sorted({type(m).__name__ for _, m in parts(model)}))
        raise UnifyError(
            f"{type(model).__name__} of {strangers or 'layers without a mixer'}",
            "no mixer that can be made metaplastic exactly",
            "a model whose mixers call a known operator: Mamba-2, Gated DeltaNet, KDA, GLA, RetNet, DeltaNet, lightning",
        )
    kinds = {name: importance or _default(m) for name, m in found.items()}
    _install(model, found, kinds, rank or max(4, sizes(next(iter(found.values())))[0] // 32), train)
    if not quiet:
        print(model.metaplasticity)
    return model


def _install(model: nn.Module, found: dict[str, nn.Module], kinds: dict[str, str], rank: int, train: str) -> None:
    classes = {name: grafted(type(m), family(m), kinds[name]) for name, m in found.items()}  # all or nothing
    for name, mixer in found.items():
        hidden, heads, channels, weight = sizes(mixer)
        mixer.importance = Importance(hidden, heads, channels if kinds[name] == "diagonal" else 1, rank, weight)
        _become(mixer, classes[name])
    frozen = tuple(n for n, p in model.named_parameters() if p.requires_grad and not _ours(n, kinds))
    model.metaplasticity = Conversion(
        kinds,
        rank,
        getattr(getattr(model, "config", None), "model_type", ""),
        sum(p.numel() for m in found.values() for p in m.importance.parameters()),
        sum(p.numel() for p in model.parameters()),
        frozen if train == "importance" else (),
    )
    for name in model.metaplasticity.frozen:
        model.get_parameter(name).requires_grad_(False)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = MethodType(_save_pretrained, model)


def unmetaplastic(model: PreTrainedModel) -> PreTrainedModel:
    """Take the importance out again, in place: classes, weights and what trains are the host's, bit for bit."""
    done = _conversion(model)
    for name in done.mixers:
        mixer = model.get_submodule(name)
        del mixer.importance
        _become(mixer, type(mixer).__bases__[1])
    for name in done.frozen:
        model.get_parameter(name).requires_grad_(True)
    del model.metaplasticity
    model.__dict__.pop("save_pretrained", None)
    return model


def _default(mixer: nn.Module) -> str:
    source = family(mixer).source
    return {shape: kind for kind, shape in SHAPES.items()}[source.metaplastic().importance]


def _become(mixer: nn.Module, cls: type) -> None:
    mixer.__class__ = cls
    if "_old_forward" in vars(mixer):  # accelerate's hooks keep the forward they wrap
        mixer._old_forward = cls.forward.__get__(mixer)


def _conversion(model: nn.Module) -> Conversion:
    done = getattr(model, "metaplasticity", None)
    if not isinstance(done, Conversion):
        raise UnifyError(type(model).__name__, "it is not metaplastic", "metaplastic(model) first")
    return done


def _ours(parameter: str, names) -> bool:
    """Whether a parameter belongs to the branch of one of the mixers."""
    mixer, found, _ = parameter.rpartition(f".{BRANCH}.")
    return bool(found) and mixer in names


def branches(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters that conversion added, by name, as they are in the state dict."""
    names = _conversion(model).mixers
    return {name: x for name, x in model.state_dict().items() if _ours(name, names)}


# -- saving and loading ------------------------------------------------------------------------------------------------


def save_adapter(model: PreTrainedModel, folder: str | Path, state: dict | None = None) -> None:
    """Write what conversion added, and nothing of the host: unify_adapter.json and unify_adapter.safetensors."""
    from safetensors.torch import save_file

    done = _conversion(model)
    state = state or branches(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.detach().contiguous() for name, x in state.items()}, folder / WEIGHTS, {"format": "pt"})
    record = {"format": FORMAT, **{k: v for k, v in asdict(done).items() if k not in ("added", "total", "frozen")}}
    (folder / RECORD).write_text(json.dumps({**record, "train": TRAIN[not done.frozen]}, indent=2) + "\n")


def _save_pretrained(
    model, save_directory, *args, state_dict: dict | None = None, is_main_process: bool = True, **options
):
    """The host's save_pretrained without the branches, then the adapter beside it."""
    state = model.state_dict() if state_dict is None else state_dict
    names = _conversion(model).mixers
    host = {name: x for name, x in state.items() if not _ours(name, names)}
    ours = {name: x for name, x in state.items() if name not in host}
    save = type(model).save_pretrained
    done = save(model, save_directory, *args, state_dict=host, is_main_process=is_main_process, **options)
    if is_main_process:
        save_adapter(model, save_directory, ours)
    return done


def load(path: str | Path, base: str | Path | PreTrainedModel | None = None, **options) -> PreTrainedModel:
    """Bring a metaplastic model back.

    path: a folder that `model.save_pretrained` or `unify convert` wrote, or one that `save_adapter` wrote.
    base: the host, a model (changed in place) or its folder; None where path holds the host too.
    options: go to transformers' from_pretrained (dtype, device_map ...). Raises UnifyError where a file is missing,
    damaged, or belongs to another host; then a model given as base is as it was.
    """
    from unify.models.checkpoint import open_host

    record = _read_record(Path(path))
    if isinstance(base, nn.Module):
        model = base
    else:
        home = Path(path if base is None else base)
        if not (home / "config.json").exists():
            raise UnifyError(
                str(home), "it holds an adapter and no host", "name the host's folder: load(path, base=...)"
            )
        model = open_host(home, **options)
    kinds = record["mixers"]
    there = mixers(model)
    if set(there) != set(kinds):
        odd = sorted(set(there) ^ set(kinds))
        raise UnifyError(
            f"the adapter in {path}", f"its host has other mixers ({', '.join(odd[:3])})", "load it onto its own host"
        )
    _install(model, there, kinds, record["rank"], record["train"])
    try:
        fill(model, path)
    except UnifyError:
        unmetaplastic(model)
        raise
    return model


def fill(model: PreTrainedModel, path: str | Path) -> None:
    """Read a metaplastic model's branches from the folder it was saved in. Raises UnifyError where they do not fit."""
    weights, wanted = _read_weights(Path(path)), branches(model)
    for name in wanted.keys() ^ weights.keys():
        fault = "is missing" if name in wanted else "is not wanted"
        raise UnifyError(f"{Path(path) / WEIGHTS}", f"{name} {fault}", "save the adapter again")
    for name, x in weights.items():
        if x.shape != wanted[name].shape:
            found = f"{name} is {list(x.shape)}, the host needs {list(wanted[name].shape)}"
            raise UnifyError(f"{Path(path) / WEIGHTS}", found, "load it onto its own host")
    with torch.no_grad():
        for name, x in weights.items():
            model.get_parameter(name).copy_(x)


def _read_record(folder: Path) -> dict:
    try:
        record = json.loads((folder / RECORD).read_text())
        ok = record["format"] == FORMAT and set(record["mixers"].values()) <= set(SHAPES) and record["train"] in TRAIN
        ok = ok and isinstance(record["rank"], int)
    except FileNotFoundError as error:
        raise UnifyError(
            str(folder), f"there is no {RECORD} in it", "a folder written by a metaplastic model"
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError):
        ok = False
    if not ok:
        raise UnifyError(str(folder / RECORD), "it is damaged, or of another version", f"a record of format {FORMAT}")
    return record


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UnifyError(str(folder / WEIGHTS), f"it cannot be read ({error})", "save the adapter again") from error
