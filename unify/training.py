"""Language models trained by transformers' Trainer: what is ours is the configuration file and a stream of packed rows.

    {"model": {"layers": "palimpsa_key", "hidden_size": 256, "num_hidden_layers": 4}, "data": "texts/", "length": 1024,
     "batch": 32, "trainer": {"max_steps": 1000, "learning_rate": 1e-3, "bf16": true}}

model: fields of `UnifyConfig` ("preset" among them changes one), the name of a preset, or a checkpoint folder, a
    metaplastic one included.
data: a file or a folder of text, Arrow, Parquet or JSON lines; or {"path": ..., "pattern": "**/*.py", "lines": true for a
    document a line, "column": "text", "shuffle": false, "seed": 0}. The path "stdlib" is the sources of Python's own library.
validation: a share of the data's files, such as 0.02, that is kept from training by a hash of their paths; or a source of
    its own, as data; or {"share" or "path" ..., "rows": 64}, so many rows of it. Read every `eval_steps` of the trainer (100).
tokenizer: a folder; default: bytes. length: tokens of a row. batch: rows of a step over all processes, whatever their
    number. trainer: any field of `transformers.TrainingArguments`.

A `UnifyForCausalLM` keeps the documents of a row apart; a host that knows no position_ids sees them one after the other.
Every process reads the same endless stream and keeps its share of each batch, so neither the number of processes nor an
interruption changes which rows a step sees. What is logged lies in curve.jsonl of the output folder, a line an entry:
{"step", "tokens", "loss" or "held_out", "bits_per_byte" of the latter where tokens are bytes}.
"""

from __future__ import annotations

import json
import math
import os
import random
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset, get_worker_info

from .bytes.corpus import place
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
        default_data_collator,
    )
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise UnifyError(
        "training", f"it runs on transformers and accelerate ({error})", "pip install unify-attention[hf]"
    ) from None

KEYS = ("model", "data", "validation", "tokenizer", "length", "batch", "trainer")
TABLES = {".arrow": "arrow", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
ROWS = 64  # of a validation set, unless it says otherwise
WARM_UP = 10  # steps that are left out of a throughput: kernels are compiled in them
OURS = {"logging_steps": 10, "report_to": "none", "disable_tqdm": True,
        "ddp_find_unused_parameters": False}  # fmt: skip


# --- the stream -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Documents in files, in an endless order that a seed fixes.

    path: a file or a folder; pattern: which files of it; lines: whether a line of a text file is a document; column: of a
    table's text; shuffle: the files, anew for every pass. part: only files whose paths a hash puts there, a share of all.
    """

    path: str
    pattern: str = "**/*"
    lines: bool = False
    column: str = "text"
    shuffle: bool = True
    seed: int = 0
    part: tuple[float, float] = (0.0, 1.0)

    def files(self) -> list[Path]:
        """The files, sorted. Raises UnifyError where there is none."""
        path = Path(self.path)
        found = [path] if path.is_file() else sorted(x for x in path.glob(self.pattern) if x.is_file())
        if not found:
            fails = "there is no such file" if not path.exists() else f"no file in it matches {self.pattern!r}"
            raise UnifyError(f"data {self.path}", fails, "name a file, or a folder and a pattern")
        low, high = self.part
        mine = [x for x in found if low <= place(x.relative_to(path).as_posix() if x != path else x.name) < high]
        if not mine:
            given = f"data {self.path}, of which files from {low:g} to {high:g} of all are asked for"
            raise UnifyError(given, f"none of {len(found)} falls there", "another share, or more files")
        return mine

    def __iter__(self) -> Iterator[str]:
        """Documents without an end, one pass over the files after another. Raises UnifyError where all are empty."""
        turn = 0
        while True:
            some = False
            for text in self.once(turn):
                some = some or bool(text)
                yield text
            if not some:
                raise UnifyError(f"data {self.path}", "there is no text in it", "name files that hold some")
            turn += 1

    def once(self, turn: int = 0) -> Iterator[str]:
        """The documents of one pass over the files."""
        files = self.files()
        for file in random.Random(self.seed + turn).sample(files, len(files)) if self.shuffle else files:
            yield from self.documents(file)

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
    """Documents as tokens, one after the other in rows of a fixed length, for as long as there are documents.

    A row is {"input_ids", "position_ids", "labels"}, each [length]: positions start again with every document, and a
    document's first token is nobody's label.
    """

    def __init__(self, source: Iterable[str], encode: Callable[[str], list[int]], length: int):
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
    if given.get("path") == "stdlib" and not Path("stdlib").exists():
        given = {"pattern": "**/*.py", **given, "path": sysconfig.get_paths()["stdlib"]}
    try:
        return Source(**given)
    except TypeError as error:
        works = f"use {', '.join(Source.__dataclass_fields__)}"
        raise UnifyError(f"data {given}", f"it is not a source of text ({error})", works) from None


def split(config: Mapping[str, Any]) -> tuple[Source, Source | None, int]:
    """(what is trained on, what is kept from it or None, rows that are read of the latter). Raises UnifyError."""
    data, given = source(config["data"]), config.get("validation")
    if not given:
        return data, None, 0
    given = {"share": given} if isinstance(given, float) else {"path": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping) or ("share" in given) == ("path" in given):
        works = "a share such as 0.02, or a source as in data"
        raise UnifyError(f"validation {given}", "it says no share and no path, or both", works)
    rows, given = given.get("rows", ROWS), {k: v for k, v in given.items() if k != "rows"}
    if "path" in given:
        return data, source(given), rows
    share = given.pop("share")
    if given or not 0 < share < 1:
        raise UnifyError(f"validation {config['validation']}", "no share of the files is that", "use 0.02, say")
    return replace(data, part=(share, 1.0)), replace(data, part=(0.0, share)), rows


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
    if config.get("validation"):
        read = {"eval_strategy": "steps", "eval_steps": 100, "prediction_loss_only": True}
        given = {"per_device_eval_batch_size": given.get("per_device_train_batch_size", 8), **read, **given}
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
    """What is logged, on the first process: as one line, and all of it so far as the learning curve.

    say: is told the line. tokens: of a step. bits: whether tokens are bytes.
    """

    def __init__(self, say: Callable[[str], object], tokens: int, bits: bool):
        self.say, self.tokens, self.bits = say, tokens, bits

    def on_log(self, args, state, control, logs=None, **kwargs):
        """A step's loss and rate, or the loss on the validation set; other logs are left out."""
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & (logs or {}).keys():
            return
        if "loss" in logs:
            text = f"loss {float(logs['loss']):.4f}  rate {float(logs['learning_rate']):.3g}"
        else:
            text = f"held out: loss {logs['eval_loss']:.4f}"
            text += f", {logs['eval_loss'] / math.log(2):.4f} bits a byte" if self.bits else ""
        self.say(f"step {state.global_step}  {text}")
        lines = [json.dumps(entry) + "\n" for entry in self.curve(state.log_history)]
        path = (
            Path(args.output_dir) / "curve.jsonl"
        )  # whole each time: after an interruption nothing stands there twice
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")

    def curve(self, history: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The learning curve, of the trainer's history."""
        for entry in history:
            at = {"step": entry["step"], "tokens": entry["step"] * self.tokens}
            if "loss" in entry:
                yield {**at, "loss": entry["loss"]}
            elif "eval_loss" in entry:
                bits = {"bits_per_byte": entry["eval_loss"] / math.log(2)} if self.bits else {}
                yield {**at, "held_out": entry["eval_loss"], **bits}


class _Clock(TrainerCallback):
    """Times at which the device had done the warm-up, half of the steps after it, and the last."""

    def on_train_begin(self, args, state, control, **kwargs):
        """The warm-up is `WARM_UP` steps of those that this process makes, and at most half of them."""
        self.cuda, first, last = args.device.type == "cuda", state.global_step, state.max_steps
        self.warm_up = min(WARM_UP, (last - first) // 2)
        warm = first + self.warm_up
        self.stops, self.at = {warm, (warm + last) // 2, last}, {first: self.now()}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        """A stop, when the device has come to it."""
        if state.global_step in self.stops:
            self.at[state.global_step] = self.now()

    def now(self) -> float:
        """Seconds, once the device has done what it was told."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def found(self, tokens: int) -> dict[str, Any]:
        """Steps that are timed, their tokens a second, and those of each half; tokens: of a step."""
        steps = sorted(self.stops & self.at.keys())
        pace = lambda a, b: (b - a) * tokens / (self.at[b] - self.at[a])  # noqa: E731
        whole = {"warm_up": self.warm_up, "timed": steps[-1] - steps[0], "tokens_per_second": pace(steps[0], steps[-1])}
        return {**whole, "halves": [pace(a, b) for a, b in pairwise(steps)]}


def train(
    config: Mapping[str, Any],
    name: str = "trained",
    resume: bool = False,
    say: Callable[[str], object] | None = None,
    timed: bool = False,
) -> dict[str, Any]:
    """Train a language model and leave it in the trainer's output_dir, in safetensors, its tokenizer beside it.

    config: see this module. name: the output_dir where the trainer's arguments say none. resume: go on from the last
        checkpoint there, if there is one. say: is told the loss, on the first process. One process, or as many as a launcher started.
        timed: refuse what would be in the throughput beside training.
    Returns {"folder", "parameters", "steps", "loss", "held_out" (the last, or None), "history": [(step, loss) ...], and what
    `cost` says of tokens a second and memory}. Raises UnifyError for a configuration that does not fit.
    """
    check(config)
    given = arguments(config, name)
    if timed and (given.eval_strategy != "no" or given.save_strategy != "no"):
        fails, works = (
            "evaluations and checkpoints would be in it",
            'leave "validation" out, and set "save_strategy": "no"',
        )
        raise UnifyError("a throughput to record", fails, works)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    if config.get("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(config["tokenizer"], local_files_only=True)
    data, kept, count = split(config)
    data.files()
    rows, held = Rows(data, encoder(tokenizer), config["length"]), None
    if kept is not None:
        held = list(islice(Rows(kept.once(), rows.encode, rows.length), count))
        if not held:
            raise UnifyError(f"validation {config['validation']}", "it fills no row", "more text, or a shorter length")
    torch.manual_seed(given.seed)
    made = model(config["model"], tokenizer)
    parameters = sum(p.numel() for p in made.parameters())
    shown = {"args": given, "train_dataset": rows, "eval_dataset": held, "processing_class": tokenizer}
    shown["data_collator"] = default_data_collator  # a tokenizer's own adds a mask, beside which positions mean nothing
    trainer = UnifyTrainer(model=made, **shown)
    trainer.remove_callback(PrinterCallback)
    tokens = given.train_batch_size * given.gradient_accumulation_steps * given.world_size * rows.length
    trainer.add_callback(_Says(say or (lambda text: None), tokens, isinstance(tokenizer, ByT5Tokenizer)))
    trainer.add_callback(clock := _Clock())
    result = trainer.train(resume_from_checkpoint=_last(given) if resume else given.resume_from_checkpoint)
    spent = {**clock.found(tokens), **cost(trainer, tokens, rows.length)}
    if trainer.is_fsdp_enabled:  # shards are for checkpoints; what is left is whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    made.config.use_cache = True
    trainer.save_model()
    trainer.save_state()
    history = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {
        "folder": given.output_dir,
        "parameters": parameters,
        "steps": result.global_step,
        "loss": history[-1][1] if history else result.training_loss,
        "held_out": next((x["eval_loss"] for x in reversed(trainer.state.log_history) if "eval_loss" in x), None),
        "history": history,
        **spent,
    }


def cost(trainer: Trainer, tokens: int, length: int) -> dict[str, Any]:
    """How the model lay on processes, what a step was, and what it took.

    {"model": its layers, "processes", "sharding": "FSDP2", "DDP" or "none", "tokens_a_step", "length", "rows" of a process at
    a time, "precision", "checkpointing", "peak": bytes that torch held at most in one process of a GPU, or None}. Beside them
    `_Clock` says "warm_up": steps before the clock, "timed": steps after it, "tokens_per_second" of these, from the end of the
    warm-up to that of the last on the device (reading rows, both passes, exchange, optimizer and logging are in it; evaluations
    and checkpoints where there are some), and "halves": of each half of them.
    """
    from .distributed import peak

    given, config = trainer.args, trainer.model.config
    sharding = "DDP" if isinstance(trainer.model_wrapped, DistributedDataParallel) else "none"
    if trainer.is_fsdp_enabled:
        sharding = f"FSDP{trainer.accelerator.state.fsdp_plugin.fsdp_version}"
    layers = [x if isinstance(x, str) else "a triple" for x in getattr(config, "layers", [config.model_type])]
    checkpointing = given.gradient_checkpointing or bool((given.fsdp_config or {}).get("activation_checkpointing"))
    return {
        "model": ", ".join(dict.fromkeys(layers)),
        "processes": given.world_size,
        "sharding": sharding,
        "tokens_a_step": tokens,
        "length": length,
        "rows": given.train_batch_size,
        "precision": "bfloat16" if given.bf16 else "float16" if given.fp16 else "float32",
        "checkpointing": checkpointing,
        "peak": peak(given.device),
    }
