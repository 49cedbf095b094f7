"""Checkpoint folders: converted on disk, looked into, refused; as the command line's user sees it."""

import json
import shutil

import pytest
import torch
from hosts import host
from test_cli import complaint, flat, terminal, too_wide, unify  # noqa: F401
from test_convert import DAMAGE, awake, edit, logits, off, tokens

import unify as library
from unify.errors import UnifyError
from unify.models import checkpoint
from unify.models.checkpoint import convert_folder, inspect_folder, open_host


@pytest.fixture
def source(tmp_path):
    """A host's folder with something beside its weights."""
    host("mamba2").save_pretrained(tmp_path / "host")
    (tmp_path / "host" / "README.md").write_text("a model\n")
    return tmp_path / "host"


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def alone(folder):
    """What stands beside a folder, itself included: an interrupted conversion must leave nothing."""
    return sorted(p.name for p in folder.parent.iterdir())


# -- convert -----------------------------------------------------------------------------------------------------------


def test_convert_keeps_the_host_s_files_and_says_how_close_the_logits_are(source, tmp_path):
    page = unify("convert", source, tmp_path / "meta", "--importance", "key", "--rank", "5")
    assert too_wide(page) == []
    assert "2 mixers with a key importance" in flat(page)
    assert "Logits differ from the host's by: random tokens" in flat(page)
    assert "(allowed 1e-05)" in flat(page)
    before, after = files(source), files(tmp_path / "meta")
    assert after.keys() - before.keys() == {"unify_adapter.json", "unify_adapter.safetensors"}
    assert all(after[name] == data for name, data in before.items())
    model, ids = library.load(tmp_path / "meta"), tokens(2, 9)
    assert off(logits(model, ids), logits(host("mamba2"), ids)) < 1e-5
    assert off(logits(awake(model), ids), logits(host("mamba2"), ids)) > 1e-3
    assert model.metaplasticity.rank == 5


def test_convert_takes_shards(tmp_path):
    host("qwen3_next").save_pretrained(tmp_path / "host", max_shard_size="40KB")
    shards = list((tmp_path / "host").glob("model-*.safetensors"))
    assert len(shards) > 2
    record = json.loads(unify("convert", tmp_path / "host", tmp_path / "meta", "--json"))
    assert record["errors"].keys() == {"random tokens", "text", "decoding"}
    assert max(record["errors"].values()) < record["bound"] == 1e-5
    assert len(list((tmp_path / "meta").glob("model-*.safetensors"))) == len(shards)
    assert record["mixers"] == {"model.layers.0.linear_attn": "key"}
    ids = tokens(2, 9)
    assert off(logits(library.load(tmp_path / "meta"), ids), logits(host("qwen3_next"), ids)) < 1e-5


def test_convert_writes_another_dtype(source, tmp_path):
    unify("convert", source, tmp_path / "meta", "--dtype", "bfloat16")
    assert (tmp_path / "meta" / "README.md").read_text() == "a model\n"
    model, ids = library.load(tmp_path / "meta", dtype="auto"), tokens(2, 9)
    assert model.dtype == torch.bfloat16
    expected = logits(host("mamba2").bfloat16(), ids)
    assert off(logits(model, ids), expected) < 1e-2


def test_convert_writes_the_adapter_alone(source, tmp_path):
    page = unify("convert", source, tmp_path / "meta", "--adapter-only", "--no-check")
    assert "Not compared with its host." in page
    assert sorted(files(tmp_path / "meta")) == ["unify_adapter.json", "unify_adapter.safetensors"]
    ids = tokens(2, 9)
    assert off(logits(library.load(tmp_path / "meta", base=source), ids), logits(host("mamba2"), ids)) < 1e-5


def test_convert_reads_the_checkpoint_s_own_tokens(source, tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "import": 7, "def": 8}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(source)
    seen, whole = [], checkpoint.check
    monkeypatch.setattr(checkpoint, "check", lambda m, f, text: seen.append(text) or whole(m, f, text))
    convert_folder(source, tmp_path / "meta")
    assert {7, 8} <= set(seen[0].flatten().tolist())
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(UnifyError, match="its tokenizer cannot be loaded"):
        convert_folder(source, tmp_path / "more")


def state_spaces(folder, **config):
    """A folder as state-spaces publishes them: its own JSON, one pytorch_model.bin, backbone.embedding in the singular."""
    model = host(
        "mamba2", n_groups=1, tie_word_embeddings=True, hidden_size=64, num_heads=2, head_dim=64, state_size=128
    )
    folder.mkdir()
    layer = {"layer": "Mamba2"}
    raw = {"d_model": 64, "n_layer": 2, "vocab_size": 90, "pad_vocab_size_multiple": 97, "ssm_cfg": layer, "rms_norm": True,
           "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": True, **config}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    state = {n.replace("backbone.embeddings.", "backbone.embedding."): x for n, x in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    return model, state


def test_convert_opens_state_spaces_checkpoints(tmp_path):
    model, state = state_spaces(tmp_path / "ssm")
    assert "backbone.embedding.weight" in state
    ids = tokens(2, 9)
    assert off(logits(open_host(tmp_path / "ssm"), ids), logits(model, ids)) < 1e-6  # its chunks have another length
    unify("convert", tmp_path / "ssm", tmp_path / "meta")
    assert off(logits(library.load(tmp_path / "meta"), ids), logits(model, ids)) < 1e-5
    state.pop("backbone.norm_f.weight")
    torch.save(state, tmp_path / "ssm" / "pytorch_model.bin")
    with pytest.raises(UnifyError, match=r"1 tensors are missing: backbone\.norm_f\.weight"):
        open_host(tmp_path / "ssm")
    (tmp_path / "ssm" / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(UnifyError, match=r"pytorch_model\.bin cannot be read"):
        open_host(tmp_path / "ssm")


@pytest.mark.parametrize("config", [{"ssm_cfg": {}}, {"attn_layer_idx": [1]}])
def test_other_state_spaces_checkpoints_are_refused(tmp_path, config):
    state_spaces(tmp_path / "ssm", **config)
    with pytest.raises(UnifyError, match="only state-spaces checkpoints of plain Mamba-2 are known"):
        open_host(tmp_path / "ssm")


# -- nothing half-written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["reading", "comparing logits", "copying model.safetensors"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(source, tmp_path, moment, error):
    def say(text):
        if text == moment:
            raise error

    before = files(source), alone(source)
    with pytest.raises(error):
        convert_folder(source, tmp_path / "meta", say=say)
    assert (files(source), alone(source)) == before


def test_a_model_that_is_not_its_host_is_not_written(source, tmp_path, monkeypatch):
    whole = checkpoint.metaplastic
    monkeypatch.setattr(checkpoint, "metaplastic", lambda *a, **o: awake(whole(*a, **o)))
    line = complaint("convert", source, tmp_path / "meta")
    assert "the converted model is not its host: random tokens" in line
    assert alone(source) == ["host"]


@pytest.mark.parametrize("fault", [name for name in DAMAGE if "host" in name])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(source, tmp_path, fault):
    name, change, _ = DAMAGE[fault]
    edit(source / name, change)
    line = complaint("convert", source, tmp_path / "meta")
    assert str(source) in line
    assert alone(source) == ["host"]


def test_a_truncated_checkpoint_is_refused(source, tmp_path):
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "its weights cannot be loaded" in complaint("convert", source, tmp_path / "meta")
    (source / "model.safetensors").unlink()
    assert "its weights cannot be loaded" in complaint("convert", source, tmp_path / "meta")
    assert alone(source) == ["host"]


def test_what_cannot_be_converted_is_refused(source, tmp_path):
    assert "it exists already" in complaint("convert", source, source)
    assert "no checkpoint is written so" in complaint("convert", source, tmp_path / "meta", "--dtype", "int8")
    assert "its config.json cannot be read" in complaint("convert", tmp_path / "nowhere", tmp_path / "meta")
    unify("convert", source, tmp_path / "meta", "--no-check")
    assert "it is metaplastic already" in complaint("convert", tmp_path / "meta", tmp_path / "more")
    (source / "config.json").write_text('{"model_type": "odd"}')
    assert "transformers does not know this config" in complaint("convert", source, tmp_path / "more")


def test_an_unknown_mixer_is_named(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=31, state_size=4))
    model.save_pretrained(tmp_path / "host")
    line = complaint("convert", tmp_path / "host", tmp_path / "meta")
    assert "MambaForCausalLM of MambaMixer: no mixer that can be made metaplastic exactly" in line
    assert alone(tmp_path / "host") == ["host"]


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_says_what_each_layer_is_and_what_would_be_added(tmp_path):
    host("qwen3_next").save_pretrained(tmp_path / "host")
    (tmp_path / "host" / "model.safetensors").unlink()  # it looks at the config alone
    page = unify("inspect", tmp_path / "host")
    assert too_wide(page) == []
    words = flat(page)
    assert "model.layers.0.linear_attn Qwen3NextGatedDeltaNet Gated DeltaNet importance, key 148 each" in words
    assert "model.layers.1.self_attn Qwen3NextAttention left as it is" in words
    assert "posterior curvature none, anchor predicted" in words
    assert "Conversion would change 1 of 2 mixers and add 148 parameters" in words
    assert "metaplastic already" not in words


def test_inspect_counts_what_conversion_adds(source, tmp_path):
    record = json.loads(unify("inspect", source, "--importance", "key", "--rank", "3", "--json"))
    assert record["parameters"] == sum(p.numel() for p in host("mamba2").parameters())
    assert record["adds"] == 2 * (3 * 32 + 3 * 8 + 8)
    unify("convert", source, tmp_path / "meta", "--importance", "key", "--rank", "3", "--no-check")
    assert library.load(tmp_path / "meta").metaplasticity.added == record["adds"]
    assert "It holds an adapter: it is metaplastic already." in unify("inspect", tmp_path / "meta")


def test_inspect_knows_what_it_cannot_convert(tmp_path):
    from transformers import MambaConfig

    MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=31).save_pretrained(tmp_path)
    kind, total, parts = inspect_folder(tmp_path)
    assert (kind, [p.kind for p in parts]) == ("mamba", ["MambaMixer"] * 2)
    assert all(p.source is None and p.adds == 0 for p in parts)
    shutil.rmtree(tmp_path)
    with pytest.raises(UnifyError, match=r"its config\.json cannot be read"):
        inspect_folder(tmp_path)
