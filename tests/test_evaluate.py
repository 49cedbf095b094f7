"""`unify eval`: lm-evaluation-harness over small checkpoints and a task made here, without a network."""

import json
from dataclasses import asdict
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from hosts import host
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import unify
from unify.cli import app
from unify.errors import UnifyError
from unify.evaluate import PRESETS, Score, evaluate, scores

WORDS = [f"w{i}" for i in range(94)]
CHOICES = 3
TASK = """
task: words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
NEEDLE = """
task: needle
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{max_gen_toks: 3, do_sample: false, until: ["."]}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def harness(monkeypatch):
    """The harness, which must not reach for the network."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra eval, 620 MB) is not part of [dev]")
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    local = partial(TaskManager, include_defaults=False)  # reading the harness's own index takes seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", local)


@pytest.fixture
def documents():
    """Contexts of several words, endings of one to three, and an answer."""
    draw = torch.Generator().manual_seed(0)
    words = lambda n: " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=draw))  # noqa: E731
    return [
        {"text": words(4 + i % 5), "choices": [words(1 + j) for j in range(CHOICES)], "answer": i * i % CHOICES}
        for i in range(24)
    ]


@pytest.fixture
def task(tmp_path, documents):
    """A folder with the task's YAML."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "words.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents))
    (folder / "words.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    return folder


@pytest.fixture
def checkpoints(tmp_path):
    """A host's folder, a converted one with an importance far from zero, and the two models."""
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{word: 3 + i for i, word in enumerate(WORDS)}}
    split = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", eos_token="<s>", unk_token="<unk>")
    plain, changed = host("mamba2"), unify.metaplastic(host("mamba2"), quiet=True)
    for name, p in changed.named_parameters():
        if name.endswith("importance.scale"):
            p.data.fill_(50.0)
    found = {tmp_path / "host": plain, tmp_path / "converted": changed}
    for folder, model in found.items():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return found


@torch.no_grad()
def by_hand(model, documents, normed=False):
    """The part of documents whose likeliest ending is the answer; normed: likelihood a character of the ending."""
    index = {word: 3 + i for i, word in enumerate(WORDS)}
    right = 0
    for d in documents:
        sums = []
        for choice in d["choices"]:
            before, after = ([index[w] for w in text.split()] for text in (d["text"], choice))
            logp = model(torch.tensor([before + after]), use_cache=False).logits[0].log_softmax(-1)
            total = sum(logp[len(before) + i - 1, token].item() for i, token in enumerate(after))
            sums.append(total / len(choice) if normed else total)
        right += max(range(CHOICES), key=sums.__getitem__) == d["answer"]
    return right / len(documents)


def test_accuracy_is_the_one_computed_by_hand(harness, task, checkpoints, documents):
    accuracies = []
    for folder, model in checkpoints.items():
        rows = {row.metric: row for row in evaluate(folder, ["words"], include=task, batch_size=3, device="cpu")}
        acc = by_hand(model, documents)
        assert rows["acc"].value == acc
        assert rows["acc_norm"].value == by_hand(model, documents, normed=True)
        assert rows["acc"].stderr == pytest.approx((acc * (1 - acc) / (len(documents) - 1)) ** 0.5)
        shifted = [d | {"answer": (d["answer"] + 1) % CHOICES} for d in documents]
        assert rows["acc"].value != by_hand(model, shifted)
        accuracies.append((acc, rows["acc_norm"].value))
    assert accuracies[0] != accuracies[1]


def test_what_is_generated_is_what_the_model_generates(harness, checkpoints, documents, tmp_path, monkeypatch):
    """A preset of needles is a task that generates; a third of the targets are what the model says, the rest are not."""
    monkeypatch.setitem(PRESETS, "needles", ("needle",))
    folder, model = list(checkpoints.items())[1]
    lines = []
    for n, d in enumerate(documents):
        ids = torch.tensor([[3 + WORDS.index(word) for word in d["text"].split()]])
        said = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist()
        target = " ".join(WORDS[token - 3] for token in said if token > 2) if n % 3 == 0 else "w0"
        lines.append(json.dumps({"text": d["text"], "target": target}))
    (tmp_path / "needle.jsonl").write_text("\n".join(lines))
    (tmp_path / "needle.yaml").write_text(NEEDLE.format(data=tmp_path / "needle.jsonl", cache=tmp_path / "cache"))
    (row,) = evaluate(folder, ["needles"], include=tmp_path, batch_size=4, device="cpu")
    assert (row.task, row.metric) == ("needle", "exact_match")
    assert row.value == pytest.approx(1 / 3)


def test_the_command_prints_and_writes(harness, task, checkpoints, documents, tmp_path):
    folder, model = next(iter(checkpoints.items()))
    out = tmp_path / "scores.json"
    options = ["--tasks", "words", "--include-path", str(task), "--limit", "6", "--device", "cpu", "--json", str(out)]
    done = CliRunner().invoke(app, ["eval", str(folder), *options])
    assert done.exit_code == 0, done.output
    acc = by_hand(model, documents[:6])
    assert f"{acc:.4f}" in done.stdout
    assert "acc_norm" in done.stdout
    record = json.loads(out.read_text())
    assert record["limit"] == 6
    assert record["versions"]["torch"] == torch.__version__
    assert Score(**record["scores"][0]).value == acc


def test_mistakes_are_one_sentence(harness, task, checkpoints, tmp_path, monkeypatch):
    folder, model = next(iter(checkpoints.items()))
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", Mock(side_effect=RuntimeError("no memory")))
        with pytest.raises(UnifyError, match=r"it does not run here \(no memory\)"):
            evaluate(folder, ["words"], include=task, device="cpu")
    with pytest.raises(UnifyError, match="task 'word': lm-evaluation-harness has none of that name; use words"):
        evaluate(folder, ["word"], include=task)
    with pytest.raises(UnifyError, match="nowhere: there is no such folder"):
        evaluate(folder, ["words"], include=tmp_path / "nowhere")
    with pytest.raises(UnifyError, match="nowhere: there is no such folder"):
        evaluate(tmp_path / "nowhere", ["words"], include=task)
    with pytest.raises(UnifyError, match="device moon: torch cannot put a model there"):
        evaluate(folder, ["words"], include=task, device="moon")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnifyError, match="its tokenizer cannot be loaded"):
        evaluate(folder, ["words"], include=task)
    (task / "words.jsonl").unlink()
    with pytest.raises(UnifyError, match="words: their data cannot be had"):
        evaluate(folder, ["words"], include=task)


def test_presets_are_names_of_the_harness_and_want_the_network(harness, monkeypatch, tmp_path):
    from lm_eval.tasks import TaskManager

    whole = TaskManager(include_defaults=True, metadata={"tokenizer": str(tmp_path)})
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: whole)
    known = set(whole.all_tasks)
    assert [name for names in PRESETS.values() for name in names if name not in known] == []
    for name in PRESETS:
        with pytest.raises(UnifyError, match=f"{PRESETS[name][0]}, .*: their data cannot be had"):
            evaluate(tmp_path, [name])


def test_without_the_harness_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("unify.evaluate.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["eval", str(tmp_path), "-t", "piqa"])
    assert done.exit_code == 2
    assert done.stderr == ("unify: eval: lm-evaluation-harness is not installed; pip install 'unify-attention[eval]'\n")


def test_scores_are_read_off_the_harness_results():
    found = {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "4096,none": -1.0, "4096_stderr,none": "N/A"}}
    rows = [{"task": "a", "metric": "acc", "value": 0.5, "stderr": 0.1}]
    rows.append({"task": "a", "metric": "4096", "value": -1.0, "stderr": None})
    assert [asdict(row) for row in scores(found)] == rows
