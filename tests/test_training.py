"""`unify train`: packed rows in a fixed order, a loss that falls, resuming, several processes, what is left behind."""

import itertools
import json
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hosts
import pytest
import ranks
import torch
from apart import apart
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

import unify
from unify import training
from unify.errors import UnifyError
from unify.training import Rows, Source, encoder, train

SOURCES = {"path": sysconfig.get_paths()["stdlib"], "pattern": "*.py"}
MODEL = {
    "layers": "palimpsa_key",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer": {"num_heads": 2},
    "intermediate_size": 64,
}
STEPS = 6


def configured(folder, **changes):
    """A small run on Python's own sources, saved in the middle."""
    trainer = {"max_steps": STEPS, "save_steps": STEPS // 2, "learning_rate": 5e-3, "lr_scheduler_type": "constant"}
    trainer |= {"output_dir": str(folder), "logging_steps": 1, "use_cpu": True} | changes.pop("trainer", {})
    return {"model": MODEL, "data": SOURCES, "length": 128, "batch": 4, "trainer": trainer, **changes}


def resumed(config):
    """The losses of the same run, interrupted at its first checkpoint and gone on with."""
    folder = Path(config["trainer"]["output_dir"])
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    return train(config, resume=True)["history"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's configuration and what it returned."""
    config = configured(tmp_path_factory.mktemp("run") / "out")
    return config, train(config)


# --- the stream -------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    for name, text in {"a.txt": "abcdef", "b.txt": "", "c.txt": "xy\nz\n", "d.md": "no"}.items():
        (tmp_path / name).write_text(text)
    return Source(str(tmp_path), "*.txt", shuffle=False)


def first(rows, n):
    return list(itertools.islice(rows, n))


def test_rows_are_documents_packed_one_after_the_other(texts):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    rows = first(Rows(texts, encoder(tokenizer), 5), 3)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["abcde", "f</s></s>xy", "\nz\n</s>a"]
    assert [row["position_ids"].tolist() for row in rows] == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 1], [0, 1, 2, 3, 0]]
    assert (rows[1]["labels"] == -100).tolist() == [True, False, True, True, False]
    assert torch.equal(rows[1]["labels"][1::3], rows[1]["input_ids"][1::3])


def test_a_text_that_names_a_special_token_is_text(texts):
    assert encoder(ByT5Tokenizer(extra_ids=0))("</s>") == [63, 50, 118, 65, 1]


def test_lines_and_passes_and_their_order(texts, monkeypatch):
    assert first(replace(texts, lines=True), 5) == ["abcdef", "xy\n", "z\n", "abcdef", "xy\n"]
    shuffled = [first(replace(texts, shuffle=True, seed=seed), 30) for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    passes = [tuple(shuffled[0][n : n + 3]) for n in range(0, 30, 3)]
    assert all(sorted(one) == ["", "abcdef", "xy\nz\n"] for one in passes)
    assert len(set(passes)) > 1


def test_workers_share_the_rows(texts):
    rows = Rows(texts, encoder(ByT5Tokenizer(extra_ids=0)), 5)
    loader = torch.utils.data.DataLoader(rows, batch_size=1, num_workers=2)
    for found, want in zip(first(loader, 6), first(rows, 6), strict=True):
        assert torch.equal(found["input_ids"][0], want["input_ids"])


def test_tables_are_read_by_datasets(tmp_path, monkeypatch):
    (tmp_path / "t.jsonl").write_text(json.dumps({"body": "abc"}) + "\n")
    source = Source(str(tmp_path), column="body")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UnifyError, match="tables are read by the datasets library; pip install datasets"):
        next(iter(source))


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_falls(trained):
    losses = [loss for _, loss in trained[1]["history"]]
    assert losses[0] == pytest.approx(5.56, abs=0.1)  # log(259)
    assert losses[-1] < 0.9 * losses[0]


def test_an_interrupted_run_has_the_same_losses(trained):
    config, found = trained
    assert resumed(config) == found["history"]


def test_a_compiled_run_has_the_same_losses(tmp_path):
    """In a process of its own, where signatures are not checked; rows of short documents, as many as there happen to be."""
    (tmp_path / "lines.txt").write_text("".join("word " * (n % 13) + "end\n" for n in range(400)))
    config = configured(
        "plain", data={"path": "lines.txt", "lines": True}, trainer={"max_steps": 3, "save_strategy": "no"}
    )
    code = (
        f"from unify.training import train\nconfig = {config}\nplain = train(config)['history']\n"
        "config['trainer'] |= {'output_dir': 'compiled', 'torch_compile': True, 'torch_compile_backend': 'aot_eager'}\n"
        "import torch\ngraphs = torch._dynamo.utils.counters['stats']\nbefore = graphs['unique_graphs']\n"
        "compiled = train(config)['history']\n"
        "print(before, graphs['unique_graphs'] > 0, [abs(a - b) < 1e-4 for (_, a), (_, b) in zip(plain, compiled, strict=True)])"
    )
    assert apart(code, tmp_path)[-1] == "0 True [True, True, True]"


def test_a_run_that_is_done_does_not_go_on(trained):
    with pytest.raises(UnifyError, match=f"its {STEPS} steps are done; raise max_steps"):
        train(trained[0], resume=True)


def test_a_stream_that_starts_again_is_seen(trained, monkeypatch):
    config, found = trained
    other = json.loads(json.dumps(config))
    other["trainer"]["ignore_data_skip"] = True
    assert resumed(other) != found["history"]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes found: the losses of the same run, and a sharded model's beside the plain one's."""
    folder = tmp_path_factory.mktemp("two")
    told = (2, str(folder), configured(folder / "out"))
    torch.multiprocessing.start_processes(ranks.train, told, 2, start_method="forkserver")
    return torch.load(folder / "found.pt")


def test_several_processes_have_the_losses_of_one(trained, together):
    alone, many = trained[1]["history"], together[0]["history"]
    assert [step for step, _ in many] == list(range(1, STEPS + 1))
    torch.testing.assert_close([loss for _, loss in many], [loss for _, loss in alone], rtol=1e-5, atol=0)


def test_what_ran_is_said_beside_the_throughput(trained, together):
    one, two = trained[1], together[0]
    assert [x["processes"] for x in (one, two)] == [1, 2]
    assert [x["sharding"] for x in (one, two)] == ["none", "DDP"]
    assert [x["rows"] for x in (one, two)] == [4, 2]
    for x in (one, two):
        shared = {"model": "palimpsa_key", "tokens_a_step": 512, "length": 128, "precision": "float32", "peak": None}
        assert x.items() >= (shared | {"warm_up": 3, "timed": 3, "checkpointing": False}).items()
        assert min(x["halves"]) <= x["tokens_per_second"] <= max(x["halves"])
    assert one["parameters"] == two["parameters"]


def clocked(seconds, first=0):
    """What a clock finds of steps that take so long each, 100 tokens a step, after `first` that were done before."""
    clock, args, passed = training._Clock(), SimpleNamespace(device=torch.device("cpu")), [0.0]
    clock.now = lambda: passed[0]
    clock.on_train_begin(args, SimpleNamespace(global_step=first, max_steps=first + len(seconds)), None)
    for n, x in enumerate(seconds, first + 1):
        passed[0] += x
        clock.on_step_end(args, SimpleNamespace(global_step=n), None)
    return clock.found(100)


def test_steps_that_compile_are_not_in_the_throughput():
    found = clocked([60.0, *[9.0] * 9, *[1.0] * 10, *[4.0] * 10])  # 20 steps in 50 s after the first ten
    assert found == {"warm_up": 10, "timed": 20, "tokens_per_second": 40.0, "halves": [100.0, 25.0]}
    assert clocked([9.0, 9.0, 2.0, 2.0], first=7)["tokens_per_second"] == 50.0
    assert clocked([8.0]) == {"warm_up": 0, "timed": 1, "tokens_per_second": 12.5, "halves": [12.5]}
    late = clocked([*[1.0] * 10, 60.0, *[1.0] * 19])  # a kernel compiled too late is seen
    assert late["halves"][0] < late["halves"][1] / 5


def test_a_throughput_to_record_is_of_training_alone(tmp_path):
    with pytest.raises(UnifyError, match='evaluations and checkpoints would be in it; leave "validation" out'):
        train(configured(tmp_path), timed=True)


def test_python_s_own_sources_go_by_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = training.source({"path": "stdlib", "pattern": "*.py"})
    assert found == Source(sysconfig.get_paths()["stdlib"], "*.py")
    assert "json/decoder.py" in [x.relative_to(found.path).as_posix() for x in training.source("stdlib").files()]
    (tmp_path / "stdlib").mkdir()
    assert training.source("stdlib") == Source("stdlib")  # a folder that is there comes first


def test_what_is_timed_on_gpus_is_one_run():
    plain, sharded = (
        training.read(Path(__file__).parents[1] / "benchmarks" / f"train_{x}.json") for x in ("ddp", "fsdp")
    )
    training.check(sharded)
    assert len(training.split(sharded)[0].files()) > 50
    given = training.arguments(sharded, "out")
    assert not given.fsdp  # in one process both are the same
    assert given.max_steps - training.WARM_UP == 30
    assert given.gradient_accumulation_steps == 4  # and 2 in each of two processes, whose forward is as large
    assert sharded["trainer"].pop("fsdp") is True
    assert sharded == plain


def test_a_sharded_model_is_the_model(together):
    plain, sharded = together[1]
    assert sharded == pytest.approx(plain, rel=1e-3)  # its parameters are in half precision
    assert sharded != plain


# --- a validation set -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """The same run, a tenth of the files kept from it and read every two steps."""
    folder = tmp_path_factory.mktemp("validated") / "out"
    config = configured(folder, validation={"share": 0.1, "rows": 6}, trainer={"eval_steps": 2})
    return config, train(config)


def curve(folder):
    return [json.loads(line) for line in (Path(folder) / "curve.jsonl").read_text().splitlines()]


def test_a_share_of_the_files_is_kept_from_training(tmp_path):
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text("text")
    data, kept, rows = training.split({"data": {"path": str(tmp_path)}, "validation": 0.25})
    assert not set(data.files()) & set(kept.files())
    assert len(data.files()) + len(kept.files()) == 40
    assert 4 < len(kept.files()) < 16
    assert rows == 64
    (moved := tmp_path / "moved").mkdir()
    for file in kept.files():
        (moved / file.name).touch()
    assert replace(kept, path=str(moved)).files() == sorted(moved.iterdir())  # by the path below the folder alone
    assert training.split({"data": "a", "validation": {"path": "b", "rows": 3}}) == (Source("a"), Source("b"), 3)
    assert training.split({"data": "a"}) == (Source("a"), None, 0)
    assert list(replace(kept, path=str(moved)).once()) == [""] * len(list(moved.iterdir()))  # one pass, then an end


def test_the_curve_holds_both_losses(validated):
    config, found = validated
    lines = curve(found["folder"])
    assert [(x["step"], x["loss"]) for x in lines if "loss" in x] == found["history"]
    held = [x for x in lines if "held_out" in x]
    assert [x["step"] for x in held] == [2, 4, 6]
    assert [x["tokens"] for x in held] == [n * 4 * 128 for n in (2, 4, 6)]
    assert held[-1]["held_out"] == found["held_out"] < held[0]["held_out"]
    for x in held:
        assert x["bits_per_byte"] == pytest.approx(x["held_out"] / 0.6931, rel=1e-3)


def test_the_validation_loss_is_the_model_s_on_the_rows_that_were_kept(validated):
    config, found = validated
    _, kept, _ = training.split(config)
    rows = first(Rows(kept.once(), encoder(ByT5Tokenizer(extra_ids=0)), 128), 6)
    model = AutoModelForCausalLM.from_pretrained(found["folder"])
    with torch.no_grad():
        losses = [model(**{k: v[None] for k, v in row.items()}).loss.item() for row in rows]
    assert found["held_out"] == pytest.approx(sum(losses) / 6, rel=1e-2)  # rows of a batch count by their labels


def test_documents_of_a_row_are_kept_apart(tmp_path):
    """The loss that the trainer found is that of every document alone; of the row as one text it would be another."""
    (file := tmp_path / "lines.txt").write_text("".join(f"{n} {n + 1} {n + 2} is a line\n" for n in range(100, 160)))
    data = {"path": str(file), "lines": True}
    found = train(configured(tmp_path / "out", data=data, validation=data | {"rows": 2}, trainer={"eval_steps": STEPS}))
    rows = first(Rows(Source(**data).once(), encoder(ByT5Tokenizer(extra_ids=0)), 128), 2)
    model = AutoModelForCausalLM.from_pretrained(found["folder"])

    def loss(pieces):
        """Mean over all labels of (ids, labels), each read alone."""
        counts = torch.tensor([(labels[1:] >= 0).sum() for _, labels in pieces])
        with torch.no_grad():
            means = torch.stack([model(x[None], labels=labels[None]).loss for x, labels in pieces])
        return ((means * counts)[counts > 0].sum() / counts.sum()).item()

    starts = [(row["position_ids"] == 0).nonzero().flatten().tolist() for row in rows]
    ends = [[*s[1:], 128] for s in starts]
    apart = [
        (row["input_ids"][a:b], row["labels"][a:b])
        for row, s, e in zip(rows, starts, ends, strict=True)
        for a, b in zip(s, e, strict=True)
    ]
    assert len(apart) > 10
    assert found["held_out"] == pytest.approx(loss(apart), rel=1e-4)
    assert abs(loss([(row["input_ids"], row["labels"]) for row in rows]) - found["held_out"]) > 1e-3


def test_an_interrupted_run_has_the_same_curve(validated):
    config, found = validated
    before = curve(found["folder"])
    resumed(config)
    assert curve(found["folder"]) == before


def test_what_is_left_loads(trained):
    config, found = trained
    folder = Path(found["folder"])
    assert (folder / "model.safetensors").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("def ", return_tensors="pt", add_special_tokens=False)
    assert model.generate(**prompt, max_new_tokens=3).shape == (1, 7)
    again = train(configured(folder.parent / "again", model=str(folder), trainer={"max_steps": 1}))
    assert again["loss"] < 0.9 * found["history"][0][1]  # it goes on where the other stopped


def test_a_metaplastic_checkpoint_trains_and_resumes(tmp_path):
    unify.metaplastic(hosts.host("mamba2", vocab_size=259), rank=2, quiet=True).save_pretrained(tmp_path / "host")
    config = configured(tmp_path / "out", model=str(tmp_path / "host"), trainer={"bf16": True})
    found = train(config, resume=True)  # from the beginning: there is nothing yet to go on from
    assert resumed(config) == found["history"]
    start, end = (unify.load(folder).state_dict() for folder in (tmp_path / "host", found["folder"]))
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved
    assert all(".importance." in name for name in moved)


def test_one_file_serves_one_process_and_many(tmp_path, monkeypatch):
    config = configured(tmp_path, batch=12, trainer={"max_steps": 1, "fsdp": True, "per_device_train_batch_size": 3})
    alone = training.arguments(config, "out")
    assert not alone.fsdp
    assert alone.gradient_accumulation_steps == 4
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UnifyError, match="batch 14 over 4 processes, 3 rows at a time: they do not divide it"):
        training.arguments({**config, "batch": 14}, "out")


def test_weight_decay_spares_what_layers_flag(tmp_path):
    config = configured(tmp_path)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    model = training.model(MODEL, tokenizer)
    trainer = training.UnifyTrainer(model=model, args=training.arguments(config, "out"), processing_class=tokenizer)
    decayed = trainer.get_decay_parameter_names(model)
    assert "model.layers.0.mixer.out_proj.weight" in decayed
    assert not any(name.endswith(("A_log", "dt_bias", "importance_scale", "norm.weight")) for name in decayed)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 3}, "a training configuration has no such key; use model, data"),
        ({"length": 0}, "a training configuration must say it"),
        ({"trainer": {"max_steps": 3, "steps": 3}}, "transformers refuses it"),
        ({"trainer": {}}, "the stream of rows has no end; say how many steps"),
        ({"batch": 4, "trainer": {"max_steps": 3, "per_device_train_batch_size": 3}}, "they do not divide it"),
        ({"data": {"path": "a", "files": 3}}, "it is not a source of text"),
        ({"data": "nowhere"}, "there is no such file; name a file"),
        ({"validation": {"rows": 3}}, "it says no share and no path, or both; a share such as 0.02"),
        ({"validation": 1.5}, "no share of the files is that; use 0.02"),
        ({"validation": 1e-9}, "falls there; another share, or more files"),
        ({"validation": {"path": "nowhere"}}, "there is no such file; name a file"),
        ({"model": {"vocab_size": 100}}, "the model has no row for some tokens"),
        ({"model": "no-such"}, "there is no such preset"),
    ],
)
def test_mistakes_are_said_in_a_sentence(tmp_path, changes, message):
    with pytest.raises(UnifyError, match=message):
        train({**configured(tmp_path), **changes})


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(UnifyError, match="there is no text in it"):
        next(iter(Rows(Source(str(tmp_path)), encoder(ByT5Tokenizer(extra_ids=0)), 4)))


def test_the_command_reads_json_and_yaml(tmp_path, monkeypatch):
    from test_cli import complaint
    from test_cli import unify as command

    monkeypatch.chdir(tmp_path)
    config = configured(tmp_path / "out", trainer={"max_steps": 1, "save_strategy": "no"})
    (tmp_path / "small.json").write_text(json.dumps(config))
    found = json.loads(command("train", tmp_path / "small.json", "--record", "scale.jsonl", "--json"))
    assert found["steps"] == 1
    (record,) = map(json.loads, (tmp_path / "scale.jsonl").read_text().splitlines())
    assert record["tokens_per_second"] == found["tokens_per_second"] > 0
    assert record["kind"] == "training"
    assert record["command"] == "python -m unify train small.json --record scale.jsonl"
    assert str(tmp_path) not in json.dumps(record)
    del config["trainer"]["output_dir"]
    (tmp_path / "small.yaml").write_text(json.dumps(config))  # JSON is YAML
    assert "small: AutoModelForCausalLM.from_pretrained loads it." in command("train", "small.yaml")
    (tmp_path / "broken.json").write_text("{")
    assert "it cannot be read" in complaint("train", "broken.json")
    (tmp_path / "list.json").write_text("[]")
    assert "it is no table of keys" in complaint("train", "list.json")
