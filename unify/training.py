"""Language models trained by transformers' Trainer: what is ours is the configuration file and a stream of packed rows.

    {"model": {"layers": "palimpsa_key", "hidden_size": 256, "num_hidden_layers": 4}, "data": "texts/", "length": 1024,
     "batch": 32, "trainer": {"max_steps": 1000, "learning_rate": 1e-3, "bf16": true}}

model: fields of `UnifyConfig` ("preset" among them changes one), the name of a preset, or a checkpoint folder, a
    metaplastic one included.
data: a file or a folder of text, Arrow, Parquet or JSON lines; or {"path": ..., "pattern": "**/*.py", "lines": true for a
    document a line, "column": "text", "shuffle": false, "seed": 0}.
tokenizer: a folder; default: bytes. length: tokens of a row. batch: rows of a step over all processes, whatever their
    number. trainer: any field of `transformers.TrainingArguments`.

A `UnifyForCausalLM` keeps the documents of a row apart; a host that knows no position_ids sees them one after the other.
Every process reads the same endless stream and keeps its share of each batch, so neither the number of processes nor an
interruption changes which rows a step sees.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .errors import UnifyError

try:
    import accelerate  # noqa: F401 - transformers' Trainer runs on it
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        ByT5Tokenizer,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainerState,
        TrainingArguments,
    )
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise UnifyError(
        "training", f"it runs on transformers and accelerate ({error})", "pip install unify-attention[hf]"
    ) from None

KEYS = ("model", "data", "tokenizer", "length", "batch", "trainer")
TABLES = {".arrow": "arrow", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
OURS = {"logging_steps": 10, "report_to": "none", "disable_tqdm": True,
        "ddp_find_unused_parameters": False}  # fmt: skip


# --- the stream -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Documents in files, in an endless order that a seed fixes.

    path: a file or a folder; pattern: which files of it; lines: whether a line of a text file is a document; column: of a
    table's text; shuffle: the files, anew for every pass.
    """

    path: str
    pattern: str = "**/*"
    lines: bool = False
    column: str = "text"
    shuffle: bool = True
    seed: int = 0

    def files(self) -> list[Path]:
        """The files, sorted. Raises UnifyError where there is none."""
        path = Path(self.path)
        found = [path] if path.is_file() else sorted(x for x in path.glob(self.pattern) if x.is_file())
        if not found:
            fails = "there is no such file" if not path.exists() else f"no file in it matches {self.pattern!r}"
            raise UnifyError(f"data {self.path}", fails, "name a file, or a folder and a pattern")
        return found

    def __iter__(self) -> Iterator[str]:
        """Documents without an end, one pass over the files after another. Raises UnifyError where all are empty."""
        files, turn = self.files(), 0
        while True:
            order = random.Random(self.seed + turn).sample(files, len(files)) if self.shuffle else files
            some = False
            for file in order:
                for text in self.documents(file):
                    some = some or bool(text)
                    yield text
            if not some:
                raise UnifyError(f"data {self.path}", "there is no text in it", "name files that hold some")
            turn += 1

    def documents(self, file: Path) -> Iterator[str]:
        """The documents of one file, read as they are asked for."""
        if file.suffix in TABLES:
            yield from (row[self.column] for row in _table(file))
            return
        with file.open(encoding="utf-8", errors="replace") as text:
            yield from text if self.lines else [text.read()]


def _table(file: Path):
    try:
        import datasets
    except ImportError:
        raise UnifyError(str(file), "tables are read by the datasets library", "pip install datasets") from None
    return datasets.load_dataset(TABLES[file.suffix], data_files=[str(file)], split="train", streaming=True)


class Rows(IterableDataset):
    """Documents as tokens, one after the other in rows of a fixed length, without an end.

    A row is {"input_ids", "position_ids", "labels"}, each [length]: positions start again with every document, and a
    document's first token is nobody's label.
    """

    def __init__(self, source: Source, encode: Callable[[str], list[int]], length: int):
        self.source, self.encode, self.length = source, encode, length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        every, mine = (1, 0) if worker is None else (worker.num_workers, worker.id)
        for n, (ids, positions) in enumerate(self._packed()):
            if n % every == mine:
                ids, positions = torch.tensor(ids), torch.tensor(positions)
                yield {"input_ids": ids, "position_ids": positions, "labels": ids.where(positions > 0, -100)}

    def _packed(self) -> Iterator[tuple[list[int], list[int]]]:
        ids, positions = [], []
        for document in map(self.encode, self.source):
            start = 0
            while start < len(document):
                part = document[start : start + self.length - len(ids)]
                start += len(part)
                ids += part
                positions += range(len(part))
                if len(ids) == self.length:
                    yield ids, positions
                    ids, positions = [], []


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text -> tokens, the last of which ends the document."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(tokenizer, ByT5Tokenizer):  # in one go, and "</s>" in a text is four bytes
        return lambda text: [x + tokenizer.offset for x in text.encode()] + end

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, verbose=False)["input_ids"]
        return ids if ids[-1:] == end else ids + end

    return encode


# --- the configuration ------------------------------------------------------------------------------------------------


def read(path: str | Path) -> dict[str, Any]:
    """A configuration file, JSON or YAML. Raises UnifyError where it cannot be read or has other keys."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix in (".yaml", ".yml"):
            import yaml  # transformers brings it

            config = yaml.safe_load(text)
        else:
            config = json.loads(text)
    except Exception as error:  # each parser has errors of its own
        raise UnifyError(str(path), f"it cannot be read ({error})", "a JSON or YAML file") from None
    if not isinstance(config, dict):
        raise UnifyError(str(path), "it is no table of keys", f"give it the keys {', '.join(KEYS)}")
    return config


def check(config: Mapping[str, Any]) -> None:
    """Raises UnifyError for a key that there is not, or one that is missing."""
    for key in config:
        if key not in KEYS:
            raise UnifyError(f"key {key!r}", "a training configuration has no such key", f"use {', '.join(KEYS)}")
    for key in ("model", "data", "length"):
        if not config.get(key):
            raise UnifyError(f"no {key!r}", "a training configuration must say it", "see unify.training")
    if "max_steps" not in config.get("trainer", {}):
        raise UnifyError("no 'max_steps' in 'trainer'", "the stream of rows has no end", "say how many steps to take")


def source(data: str | Mapping[str, Any]) -> Source:
    """Where the documents are. Raises UnifyError for an unknown option."""
    given = {"path": data} if isinstance(data, str) else dict(data)
    try:
        return Source(**given)
    except TypeError as error:
        works = f"use {', '.join(Source.__dataclass_fields__)}"
        raise UnifyError(f"data {given}", f"it is not a source of text ({error})", works) from None


def model(given: str | Mapping[str, Any], tokenizer: Any):
    """The model to train: made, or loaded from a folder; in float32. Raises UnifyError where it has too few tokens."""
    import unify.models.modeling  # noqa: F401 - makes our own known to transformers

    from .models import checkpoint, configuration, convert

    if isinstance(given, str) and (Path(given) / convert.RECORD).exists():
        made = convert.load(given, dtype=torch.float32)
    elif isinstance(given, str) and any(Path(given).glob("*.safetensors")):
        made = checkpoint.open_host(given, dtype=torch.float32)
    else:
        if isinstance(given, str):
            config = configuration.read(given)
        else:
            special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
            fields = {"vocab_size": len(tokenizer), **special, **given}
            preset = fields.pop("preset", None)
            config = configuration.preset(preset, **fields) if preset else configuration.UnifyConfig(**fields)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if made.config.vocab_size < len(tokenizer):
        given = f"a model of {made.config.vocab_size} tokens and a tokenizer of {len(tokenizer)}"
        raise UnifyError(given, "the model has no row for some tokens", "say the model's own tokenizer folder")
    made.config.use_cache = False
    return made


def arguments(config: Mapping[str, Any], name: str) -> TrainingArguments:
    """transformers' arguments: what the file says, and what the batch means for this number of processes."""
    given = {"output_dir": name, **OURS, **config.get("trainer", {})}
    given["accelerator_config"] = {"dispatch_batches": False, **(given.get("accelerator_config") or {})}
    given.setdefault("use_cpu", not torch.accelerator.is_available())
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        given.pop("fsdp", None)  # one process has nothing to shard, and the same file serves many
    if batch := config.get("batch"):
        whole = world * given.get("gradient_accumulation_steps", 1)
        each = given.setdefault("per_device_train_batch_size", max(batch // whole, 1))
        accumulate = given.setdefault("gradient_accumulation_steps", max(batch // (world * each), 1))
        if world * each * accumulate != batch:
            what = f"batch {batch} over {world} processes, {each} rows at a time"
            raise UnifyError(what, "they do not divide it", "use a multiple of processes x per_device_train_batch_size")
    try:
        made = TrainingArguments(**given)
    except (TypeError, ValueError) as error:
        raise UnifyError("'trainer'", f"transformers refuses it ({error})", "use its TrainingArguments") from None
    made._n_gpu = min(made.n_gpu, 1)  # one process drives one GPU; several GPUs are several processes
    return made


# --- training ---------------------------------------------------------------------------------------------------------


class UnifyTrainer(Trainer):
    """transformers' Trainer, which also knows a metaplastic model's own file, and what weight decay must leave alone."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.spared = {n for n, p in self.model.named_parameters() if getattr(p, "_no_weight_decay", False)}

    def get_decay_parameter_names(self, model) -> list[str]:
        """All but norms, biases and what layers flag."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self.spared]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        from .models import convert

        if not self.is_fsdp_enabled and (Path(resume_from_checkpoint) / convert.RECORD).exists():
            convert.fill(self.model, resume_from_checkpoint)


def _last(given: TrainingArguments) -> str | None:
    """The checkpoint to go on from, if there is one. Raises UnifyError where nothing is left to do."""
    there = get_last_checkpoint(given.output_dir) if Path(given.output_dir).is_dir() else None
    if there and TrainerState.load_from_json(str(Path(there) / "trainer_state.json")).global_step >= given.max_steps:
        raise UnifyError(f"resuming {there}", f"its {given.max_steps} steps are done", "raise max_steps")
    return there


class _Says(TrainerCallback):
    """What is logged, as one line, on the first process."""

    def __init__(self, say: Callable[[str], object]):
        self.say = say

    def on_log(self, args, state, control, logs=None, **kwargs):
        """A step's loss and rate; other logs are left out."""
        if state.is_world_process_zero and "loss" in (logs or {}):
            self.say(
                f"step {state.global_step}  loss {float(logs['loss']):.4f}  rate {float(logs['learning_rate']):.3g}"
            )


def train(
    config: Mapping[str, Any], name: str = "trained", resume: bool = False, say: Callable[[str], object] | None = None
) -> dict[str, Any]:
    """Train a language model and leave it in the trainer's output_dir, in safetensors, its tokenizer beside it.

    config: see this module. name: the output_dir where the trainer's arguments say none. resume: go on from the last
        checkpoint there, if there is one. say: is told the loss, on the first process. One process, or as many as a launcher started.
    Returns {"folder", "parameters", "steps", "loss", "tokens_per_second", "history": [(step, loss) ...]}.
    Raises UnifyError for a configuration that does not fit.
    """
    check(config)
    given = arguments(config, name)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    if config.get("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(config["tokenizer"], local_files_only=True)
    rows = Rows(source(config["data"]), encoder(tokenizer), config["length"])
    rows.source.files()
    torch.manual_seed(given.seed)
    made = model(config["model"], tokenizer)
    trainer = UnifyTrainer(model=made, args=given, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Says(say or (lambda text: None)))
    result = trainer.train(resume_from_checkpoint=_last(given) if resume else given.resume_from_checkpoint)
    if trainer.is_fsdp_enabled:  # shards are for checkpoints; what is left is whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    made.config.use_cache = True
    trainer.save_model()
    trainer.save_state()
    history = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {
        "folder": given.output_dir,
        "parameters": sum(p.numel() for p in made.parameters()),
        "steps": result.global_step,
        "loss": history[-1][1] if history else result.training_loss,
        "tokens_per_second": result.metrics.get("train_samples_per_second", 0) * config["length"],
        "history": history,
    }
