"""Checkpoint folders: opening a host, converting it on disk, looking into it. Nothing is downloaded."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unify.errors import UnifyError
from unify.models.convert import RECORD, metaplastic, mixers, parts, save_adapter
from unify.models.mixers import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unify.triple import Triple

ROUNDING = 1e-5  # relative error allowed between host and converted logits, in float32
MAMBA_SSM = {"d_model", "n_layer", "vocab_size"}  # what a state-spaces config has and a transformers config has not


# -- opening -----------------------------------------------------------------------------------------------------------


def open_config(folder: str | Path):
    """The transformers config of a checkpoint folder, a state-spaces one translated. Raises UnifyError."""
    import transformers

    folder = Path(folder)
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UnifyError(str(folder), f"its config.json cannot be read ({error})", "a checkpoint folder") from error
    if "model_type" not in raw and raw.keys() >= MAMBA_SSM:
        return _mamba_ssm_config(raw, folder)
    _register(raw)
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        given = f"{folder} of model_type {raw.get('model_type')!r}"
        works = "transformers 5.23 or later; flash-linear-attention where it is one of its models"
        raise UnifyError(given, "transformers does not know this config", works) from error


def _register(raw: dict) -> None:
    """Make transformers know a config of flash-linear-attention's, and whose `mamba2` this one is.

    Importing fla, which transformers also does for its own Qwen3-Next, gives the type mamba2 to fla's class, which knows
    no `layer_norm_epsilon`; fla's configs say `norm_eps`.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = raw.get("model_type")
    theirs = "norm_eps" in raw if kind == "mamba2" else kind not in CONFIG_MAPPING
    home = import_module("fla.models") if theirs and find_spec("fla") else transformers
    mamba2 = (home if kind == "mamba2" else transformers).Mamba2Config
    transformers.AutoConfig.register("mamba2", mamba2, exist_ok=True)


def open_host(folder: str | Path, **options) -> PreTrainedModel:
    """Load a causal language model from a local folder, strictly: every tensor there, none too many, each of its shape.

    options: go to transformers' from_pretrained (dtype, device_map ...). state-spaces checkpoints (pytorch_model.bin with
    `backbone.embedding`) are opened as transformers' Mamba2. Raises UnifyError naming what is missing, extra or damaged.
    """
    import transformers

    folder = Path(folder)
    config = open_config(folder)
    if not (folder / "config.json").read_text().count('"model_type"'):
        return _mamba_ssm_model(config, folder, **options)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # a damaged file, a wrong shape, an unknown architecture: each library has its own error
        reason = " ".join(str(error).split())[:300]
        raise UnifyError(str(folder), f"its weights cannot be loaded ({reason})", "a whole checkpoint") from error
    _strict(folder, missing=info["missing_keys"], extra=info["unexpected_keys"], mismatched=info["mismatched_keys"])
    return model


def _strict(folder: Path, **faults) -> None:
    for kind, names in faults.items():
        if names:
            first = ", ".join(sorted(map(str, names))[:3])
            raise UnifyError(
                str(folder), f"{len(names)} tensors are {kind}: {first}", "the checkpoint its config describes"
            )


def _mamba_ssm_config(raw: dict, folder: Path):
    """state-spaces' JSON as a Mamba2Config. Only Mamba-2 layers without attention between them."""
    from transformers import Mamba2Config

    layer = {"layer": "Mamba1", **raw.get("ssm_cfg", {})}
    if layer["layer"] != "Mamba2" or raw.get("attn_layer_idx"):
        given = f"{folder} with layers {layer['layer']}{' and attention' if raw.get('attn_layer_idx') else ''}"
        raise UnifyError(given, "only state-spaces checkpoints of plain Mamba-2 are known", "a mamba2-* checkpoint")
    multiple, vocab = raw.get("pad_vocab_size_multiple", 1), raw["vocab_size"]
    hidden, expand, head = raw["d_model"], layer.get("expand", 2), layer.get("headdim", 64)
    return Mamba2Config(
        hidden_size=hidden,
        num_hidden_layers=raw["n_layer"],
        vocab_size=-(-vocab // multiple) * multiple,
        state_size=layer.get("d_state", 128),
        n_groups=layer.get("ngroups", 1),
        expand=expand,
        head_dim=head,
        num_heads=expand * hidden // head,
        conv_kernel=layer.get("d_conv", 4),
        chunk_size=layer.get("chunk_size", 256),
        residual_in_fp32=raw.get("residual_in_fp32", True),
        tie_word_embeddings=raw.get("tie_embeddings", True),
        rms_norm=raw.get("rms_norm", True),
    )


def _mamba_ssm_model(config, folder: Path, dtype: torch.dtype | str | None = None, **options):
    from transformers import Mamba2ForCausalLM

    try:
        state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UnifyError(
            str(folder), f"its pytorch_model.bin cannot be read ({error})", "a whole checkpoint"
        ) from error
    state = {name.replace("backbone.embedding.", "backbone.embeddings."): x for name, x in state.items()}
    with torch.device("meta"):
        model = Mamba2ForCausalLM(config)
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state.get("backbone.embeddings.weight"))
    wanted = model.state_dict()
    both = wanted.keys() & state.keys()
    _strict(
        folder,
        missing=wanted.keys() - state.keys(),
        extra=state.keys() - wanted.keys(),
        mismatched=[name for name in both if wanted[name].shape != state[name].shape],
    )
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return (model.to(dtype) if isinstance(dtype, torch.dtype) else model).eval()


# -- is it the same? ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Relative error of the converted model's logits, ||converted - host|| / ||host||, by kind of input; bound: allowed."""

    errors: dict[str, float]
    bound: float

    @property
    def ok(self) -> bool:
        """Whether every error is a number and within the bound."""
        return all(error <= self.bound for error in self.errors.values())

    def __str__(self):
        each = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return f"{each} (allowed {self.bound:.0e})"


def check(model: PreTrainedModel, convert: Callable[[PreTrainedModel], object], text: Tensor | None = None) -> Check:
    """Logits of a host before `convert(model)` against those after: random tokens with left padding, text, decoding.

    text: token ids [1, T]; None uses bytes of Python's own sources, modulo the vocabulary. Raises UnifyError for a model
    in half precision: hosts round their sums there, so nothing could be told from a difference.
    """
    if model.dtype not in (torch.float32, torch.float64):
        raise UnifyError(f"a model in {model.dtype}", "half precision hides a difference", "compare it in float32")
    runs = _inputs(model, text)
    training = model.training
    model.eval()
    try:
        before = _outputs(model, runs)
        convert(model)
        errors = {name: _error(run(model), before[name]) for name, run in runs.items()}
    finally:
        model.train(training)
    return Check(errors, ROUNDING)


def _outputs(model: PreTrainedModel, runs: dict[str, Callable[[PreTrainedModel], Tensor]]) -> dict[str, Tensor]:
    """What a host makes of each kind of input. Raises UnifyError where it does not run."""
    try:
        return {name: run(model) for name, run in runs.items()}
    except Exception as error:  # kernels that want a GPU, above all
        reason = " ".join(str(error).split())[:200]
        works = "compare where its kernels run, or convert without comparing (--no-check)"
        raise UnifyError(type(model).__name__, f"it does not run here ({reason})", works) from error


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def _inputs(model: PreTrainedModel, text: Tensor | None) -> dict[str, Callable[[PreTrainedModel], Tensor]]:
    """Kinds of input as functions of the model: logits at the positions that are not padding."""
    vocab, device = model.get_input_embeddings().num_embeddings, model.get_input_embeddings().weight.device
    random = torch.randint(0, vocab, (2, 45), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(random)
    mask[1, :7] = 0
    if text is None:
        text = torch.tensor([list(inspect.getsource(json.decoder).encode()[:256])]) % vocab
    text = text[:, :256].to(device)

    @torch.no_grad()
    def padded(model):
        return model(random, attention_mask=mask, use_cache=False).logits[mask.bool()]

    @torch.no_grad()
    def reading(model):
        return model(text, use_cache=False).logits

    @torch.no_grad()
    def decoding(model):
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(random, attention_mask=mask, min_new_tokens=4, **options)
        return torch.stack(out.logits)

    return {"random tokens": padded, "text": reading, "decoding": decoding}


# -- on disk -----------------------------------------------------------------------------------------------------------


def convert_folder(
    source: str | Path,
    target: str | Path,
    *,
    importance: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    adapter_only: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[PreTrainedModel, Check | None]:
    """Convert a checkpoint folder into another one: the host's files and the adapter, or the adapter alone.

    The host's weights are copied byte for byte where they are safetensors and keep their dtype, and written by transformers
    otherwise; one copy is in memory at a time. The target appears under its name when all of it is written and, with
    verify, the converted model's logits, in float32, agreed with the host's on random tokens, text and decoding. Raises
    UnifyError and leaves no target otherwise. say: told what is being done.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise UnifyError(str(target), "it exists already", "name a folder that does not exist")
    if (source / RECORD).exists():
        raise UnifyError(str(source), "it is metaplastic already", "name the host's folder")
    give = lambda model: metaplastic(model, importance, rank=rank, quiet=True)  # noqa: E731
    say("reading")
    if verify:
        model = open_host(source, dtype=torch.float32)
        say("comparing logits")
        result = check(model, give, _tokens(source))
        if not result.ok:
            raise UnifyError(str(source), f"the converted model is not its host: {result}", "report this host's mixer")
    else:
        model, result = give(open_host(source, dtype=dtype or "auto")), None
    copied = adapter_only or (dtype is None and _safetensors(source))
    if verify and not copied:
        del model
        model = give(open_host(source, dtype=dtype or "auto"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".partial") as scratch:
        made = Path(scratch) / target.name
        if adapter_only:
            save_adapter(model, made)
        elif copied:
            _copy(source, made, say)
            save_adapter(model, made)
        else:
            say("writing")
            model.save_pretrained(made)
            _copy(source, made, say, missing_only=True)
        made.rename(target)
    return model, result


def _safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin"))


def _copy(source: Path, target: Path, say: Callable[[str], None], missing_only: bool = False) -> None:
    """Files of a checkpoint; with missing_only those that are not weights and were not written by transformers."""
    target.mkdir(exist_ok=True)
    for path in sorted(p for p in source.iterdir() if p.is_file()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth") or path.name.endswith(".index.json")
        if not (missing_only and (weights or (target / path.name).exists())):
            say(f"copying {path.name}")
            shutil.copy2(path, target / path.name)


def _tokens(folder: Path) -> Tensor | None:
    """Real text in the checkpoint's own tokens, or None where it ships no tokenizer."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer(inspect.getsource(json.decoder)[:1024], return_tensors="pt").input_ids
    except Exception as error:
        raise UnifyError(str(folder), f"its tokenizer cannot be loaded ({error})", "a whole checkpoint") from error


# -- looking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a layer that mixes tokens. name: in the model; kind: its class; source: the triple it is, or None where it
    stays as it is; target: the triple it would become; adds: parameters that would be added."""

    name: str
    kind: str
    source: Triple | None
    target: Triple | None = None
    adds: int = 0


def inspect_folder(
    folder: str | Path, importance: str | None = None, rank: int | None = None
) -> tuple[str, int, list[Part]]:
    """Model type, parameters of the host and every part that mixes tokens, from the config alone: no weight is read."""
    import transformers

    config = open_config(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    if mixers(model):
        metaplastic(model, importance, rank=rank, quiet=True)
    return config.model_type, total, [_part(name, m) for name, m in parts(model)]


def _part(name: str, mixer: nn.Module) -> Part:
    if not isinstance(mixer, Adapter):
        return Part(name, type(mixer).__name__, None)
    adds = sum(p.numel() for p in mixer.importance.parameters())
    return Part(name, type(mixer).__bases__[1].__name__, mixer.source, mixer.op.triple, adds)
