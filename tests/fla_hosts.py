"""Models of flash-linear-attention before and after conversion, compared in a process of their own.

    python tests/fla_hosts.py [--device cuda]

prints JSON: errors of the doubles, of every host, and of planted faults. Importing fla takes transformers' model types
mamba and mamba2 for itself, which is why no test does it. On a CPU fla_doubles stands in for fla's kernels, in float32.
On a GPU the hosts run fla's own kernels in bfloat16, and what is measured is the distance from the doubles in float32; converted
hosts also run in float32 there.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList
from transformers.models.mamba2 import Mamba2Config, Mamba2ForCausalLM
from transformers.utils import logging

from unify.errors import UnifyError
from unify.models.checkpoint import convert_folder, inspect_folder, open_config
from unify.models.convert import load, metaplastic, unmetaplastic
from unify.models.mixers import Adapter, family

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MLP = {"intermediate_size": 48, "num_heads": 4, "fuse_cross_entropy": False}
MAMBA = {"num_heads": 8, "head_dim": 16, "state_size": 16, "chunk_size": 16, "n_groups": 1}

# name -> model type, what its config needs beside SMALL
HOSTS = {
    "gla": ("gla", MLP | {"expand_k": 1.0}),
    "gla, shared keys, convolutions": ("gla", MLP | {"expand_k": 1.0, "num_kv_heads": 2, "use_short_conv": True}),
    "gla, no output gate, clamped": ("gla", MLP | {"expand_k": 1.0, "use_output_gate": False, "clamp_min": -0.03}),
    "simple_gla": ("gla", MLP | {"expand_k": 1.0}),  # a layer without a model: it takes the place of GLA's
    "retnet": ("retnet", MLP),
    "retnet, shared keys, convolutions": ("retnet", MLP | {"num_kv_heads": 2, "use_short_conv": True}),
    "delta_net": ("delta_net", MLP),
    "delta_net, gate, negative eigenvalues": (
        "delta_net",
        MLP | {"use_gate": True, "use_short_conv": False, "allow_neg_eigval": True, "qk_norm": "sum",
               "qk_activation": "relu"},
    ),
    "gated_deltanet": ("gated_deltanet", MLP | {"head_dim": 16}),
    "gated_deltanet, value groups, negative eigenvalues": (
        "gated_deltanet",
        MLP | {"head_dim": 16, "num_heads": 2, "num_v_heads": 4, "use_short_conv": False, "allow_neg_eigval": True,
               "use_gate": False},
    ),
    "kda": ("kda", MLP | {"head_dim": 16}),
    "kda, value groups, bounded gate": (
        "kda",
        MLP | {"head_dim": 16, "num_heads": 2, "num_v_heads": 4, "use_short_conv": False, "allow_neg_eigval": True,
               "safe_gate": True, "lower_bound": -4.0},
    ),
    "mamba2": ("mamba2", MAMBA),
    "mamba2, D for each channel, bias, limits": (
        "mamba2",
        MAMBA | {"D_has_hdim": True, "use_bias": True, "norm_before_gate": True, "dt_limit": (0.01, 0.5)},
    ),
    "mamba2, no norm": ("mamba2", MAMBA | {"rmsnorm": False}),
    "mamba2, 2 groups": ("mamba2", MAMBA | {"n_groups": 2}),
    "mamba2, 4 groups": ("mamba2", MAMBA | {"n_groups": 4, "norm_eps": 1e-3}),
}  # fmt: skip
IMPORTANCE = ("key", "diagonal")
FAULTS = ("an importance that is not zero", "a state whose halves are exchanged", "sequences that begin a token late")
STEEP = "a gradient of keys a fifth too large"


def build(name: str, device: str):
    """A small random host, its parameters far enough from their initial values to tell every one apart."""
    kind, needs = HOSTS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | needs)))
    if name == "simple_gla":
        for i, layer in enumerate(model.model.layers):
            layer.attn = importlib.import_module("fla.layers.simple_gla").SimpleGatedLinearAttention(
                hidden_size=64, layer_idx=i
            )
    model = model.float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_((0.3 if kind == "mamba2" else 0.1) * torch.randn_like(p))
    return model.to(device)


def oracle(model):
    """The host itself; but fla's torch path of Mamba-2 pairs heads with the wrong groups, so there transformers' model."""
    if getattr(model.config, "n_groups", 1) == 1:
        return model
    shared = ("num_heads", "head_dim", "state_size", "chunk_size", "n_groups", "use_bias", "residual_in_fp32", "expand")
    own = model.config
    options = {name: getattr(own, name) for name in (*SMALL, *shared)}
    other = Mamba2ForCausalLM(Mamba2Config(**options, layer_norm_epsilon=own.norm_eps, time_step_limit=own.dt_limit))
    other.load_state_dict(model.state_dict())
    return other.to(model.device).eval()


def inputs(device):
    """Token ids [3, T] and two masks, both with a row padded on the left, the second also with one padded on the right."""
    ids = torch.randint(3, 97, (3, 70), generator=torch.Generator().manual_seed(1)).to(device)
    left = torch.ones_like(ids)
    left[1, :5] = 0
    both = left.clone()
    both[2, -4:] = 0
    return ids, left, both


def decode(model, mask, **options):
    """Logits of five generated tokens after twelve, which are given where there is one beam. mask: [3, 12]."""
    ids, *_ = inputs(model.device)

    def given(said, scores):
        return scores.scatter(1, ids[:, said.shape[1]][:, None], torch.inf)

    options |= {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    if "num_beams" not in options:
        options["logits_processor"] = LogitsProcessorList([given])
    out = model.generate(ids[:, :12], attention_mask=mask, return_dict_in_generate=True, **options)
    return torch.stack(out.logits, 1)


def run(model, train: bool = True) -> dict:
    """What a model says: logits of every kind of input and, in training, the gradient of its embedding."""
    ids, left, both = inputs(model.device)
    said = {}
    with torch.no_grad():
        for name, T in (("short", 21), ("long", 70)):
            mask = torch.cat([both[:, :10], both[:, 10 - T :]], 1)
            said[name] = model(ids[:, :T], use_cache=False).logits
            said[f"{name}, padded"] = model(ids[:, :T], attention_mask=mask, use_cache=False).logits[mask.bool()]
        said["decoding"] = decode(model, left[:, :12])
        said["decoding, padded on the right"] = decode(model, torch.cat([both[:, :6], both[:, -6:]], 1))
        if not ids.is_cuda:  # where rounding is small enough for beams to stay together
            said["beams"] = decode(model, left[:, :12], num_beams=3)
    if train:
        model.train()
        logits = model(ids, attention_mask=both, use_cache=False).logits[both.bool()]
        (gradient,) = torch.autograd.grad(logits.float().square().mean(), [model.get_input_embeddings().weight])
        said |= {"training": logits.detach(), "gradient": gradient}
        model.eval()
    return said


def error(found, expected) -> float:
    """Largest difference, as a part of the largest number expected."""
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def typical(found, expected) -> float:
    """What errors of rows, each as a part of the largest number expected of it, stay below in three rows of four.

    The largest error of a gradient in half precision says little of kernels: RetNet's on plain torch is 0.02 to 1.3 in ten draws
    of weights a thousandth apart, because few rows are badly conditioned; three rows of four stay below 0.040 to 0.051.
    """
    found, expected = found.float(), expected.float()
    largest = expected.abs().amax(1)
    return ((found - expected).abs().amax(1) / largest)[largest > 0].quantile(0.75).item()


def compare(found: dict, expected: dict, gradient=error) -> dict[str, float]:
    """The error of everything said."""
    return {name: (gradient if name == "gradient" else error)(found[name], expected[name]) for name in found}


def scales(model) -> list:
    """The scale of every importance."""
    return [p for name, p in model.named_parameters() if name.endswith("importance.scale")]


def slope(model) -> float:
    """The smallest over the mixers of the largest gradient of an importance's scale."""
    ids, _, both = inputs(model.device)
    model.zero_grad()
    model(ids, attention_mask=both, use_cache=False).logits.float().square().mean().backward()
    return min(p.grad.abs().max().item() for p in scales(model))


@torch.no_grad()
def far(model) -> dict[str, float]:
    """With an importance far from zero: what it changes, and one or several tokens after a cache against reading it all."""
    ids, left, _ = inputs(model.device)
    before = model(ids, use_cache=False).logits
    for p in scales(model):
        p.fill_(0.5)
    after = model(ids, use_cache=False).logits
    whole = model(ids[:, :17], attention_mask=left[:, :17], use_cache=False).logits[:, 11:-1]
    cache = model(ids[:, :12], attention_mask=left[:, :12], use_cache=True).past_key_values
    rest = model(ids[:, 12:16], attention_mask=left[:, :16], past_key_values=cache, use_cache=True).logits
    apart = {"one": error(decode(model, left[:, :12]), whole), "several": error(rest, whole[:, 1:])}
    return {"effect": error(after, before), "cache": apart}


def examine(name: str, device: str) -> dict:
    """Everything about one host: errors right after conversion, gradient of the scale, decoding at an importance."""
    model = build(name, device)
    ids, *_ = inputs(device)
    host, report = oracle(model), {kind: {} for kind in IMPORTANCE}
    with doubles().installed():
        expected = run(host)
    if device != "cpu":
        for kind in IMPORTANCE:
            metaplastic(model, kind, train="all", quiet=True)
            report[kind]["float32"] = compare(run(model), expected)
            unmetaplastic(model)
        host, model = host.bfloat16(), model.bfloat16()
        report["rounding"] = compare(run(host), expected, typical)
    with torch.no_grad():
        own = model(ids, use_cache=False).logits
    gradient = error if device == "cpu" else typical
    for kind in IMPORTANCE:
        metaplastic(model, kind, train="all", quiet=True)
        report[kind] |= {"errors": compare(run(model), expected, gradient), "slope": slope(model), **far(model)}
        unmetaplastic(model)
    with torch.no_grad():
        report["taken back"] = error(model(ids, use_cache=False).logits, own)
    return report | {"host": error(own, expected["long"])}


@contextlib.contextmanager
def planted(model, fault: str):
    """A converted model with something wrong in it."""
    memory = Adapter._memory

    def wrong(self, *args, cu_seqlens=None, **options):
        if fault == STEEP:
            seen, q, k, *args = args
            args = seen, q, k + 0.2 * (k - k.detach()), *args
        if fault == FAULTS[2] and cu_seqlens is not None and cu_seqlens.diff().max() > 1:
            cu_seqlens = torch.cat([cu_seqlens[:1], cu_seqlens[1:-1] + 1, cu_seqlens[-1:]])
        o, state = memory(self, *args, cu_seqlens=cu_seqlens, **options)
        return o, state.roll(state.shape[-1] // 2, -1) if fault == FAULTS[1] else state

    for p in scales(model):
        p.data.fill_(1e-3 if fault == FAULTS[0] else 0.0)
    Adapter._memory = wrong
    try:
        yield
    finally:
        Adapter._memory = memory


def faults(name: str) -> dict[str, dict[str, float]]:
    """Errors of a host converted wrongly."""
    model = build(name, "cpu")
    expected, report = run(model, train=False), {}
    metaplastic(model, "diagonal", quiet=True)
    for fault in FAULTS:
        with planted(model, fault):
            report[fault] = compare(run(model, train=False), expected)
    return report


def halves(name: str) -> dict[str, float]:
    """The gradient of a host in bfloat16: its own error, converted, and converted with a fault."""
    model = build(name, "cpu")
    expected, report = run(model)["gradient"], {}
    model = model.bfloat16()
    report["host"] = typical(run(model)["gradient"], expected)
    metaplastic(model, "diagonal", train="all", quiet=True)
    report["converted"] = typical(run(model)["gradient"], expected)
    with planted(model, STEEP):
        report["wrong"] = typical(run(model)["gradient"], expected)
    return report


def folders(home: Path) -> dict:
    """A checkpoint folder opened, converted and loaded by a process that has not imported fla; its doubles come last."""
    report = {"imported": "fla" in sys.modules}
    configs = {
        "gla": HOSTS["gla"][1],
        "mamba2": MAMBA,
        "mamba2 of fla": MAMBA | {"norm_eps": 1e-4},
        "mamba2 again": MAMBA,
    }
    for kind, needs in configs.items():
        (home / "config.json").write_text(json.dumps({"model_type": kind.split()[0], **SMALL, **needs}))
        configs[kind] = open_config(home)
    report["mamba2"] = [type(config).__module__ for kind, config in configs.items() if kind != "gla"]
    build("gla", "cpu").save_pretrained(home / "host")
    report["kind"], _, parts = inspect_folder(home / "host")
    report["mixers"] = [part.kind for part in parts]
    convert_folder(home / "host", home / "unchecked", verify=False)
    try:
        convert_folder(home / "host", home / "nothing")
    except UnifyError as error:
        report["without kernels"] = str(error)
    with doubles().installed():
        model, checked = convert_folder(home / "host", home / "converted")
        report["checked"] = checked.errors
        for p in scales(model):
            p.data.fill_(0.5)
        model.save_pretrained(home / "trained")
        report["loaded"] = compare(run(load(home / "trained"), train=False), run(model, train=False))
        report["unchecked"] = compare(
            run(load(home / "unchecked"), train=False), run(unmetaplastic(model), train=False)
        )
    AutoConfig.register("mamba2", importlib.import_module("fla.models").Mamba2Config, exist_ok=True)
    return report


def doubles():
    """The module that imports fla."""
    return importlib.import_module("fla_doubles")


def untuned() -> None:
    """From here on an autotuner takes the first of its choices that runs: rounding is measured here, not time, and fla's
    kernels have so many choices that to compile them all takes longer than to do everything else."""
    from triton.runtime.autotuner import Autotuner

    choices, time = Autotuner.prune_configs, Autotuner._bench

    def bench(self, *args, **options):
        self.took = time(self, *args, **options)
        return self.took

    def until_one_runs(self, kwargs):
        for config in choices(self, kwargs):
            yield config
            if self.took[0] < math.inf:  # which it is where a choice asks for more than there is
                return

    Autotuner.prune_configs, Autotuner._bench = until_one_runs, bench


def strangers() -> list[str]:
    """Mixers of fla's that call a known operator in a way of their own, and yet have a family: there should be none."""
    layers = importlib.import_module("fla.layers")
    odd = (layers.GatedDeltaProduct, layers.HGRN2Attention, layers.MomAttention, layers.RodimusAttention)
    return [cls.__name__ for cls in odd if family(cls.__new__(cls)) is not None]


def main() -> None:
    """Examine every host and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    report, hosts = {}, HOSTS
    if device == "cpu":
        with tempfile.TemporaryDirectory() as home:
            report["folders"] = folders(Path(home))
    else:  # one host of each kind, as kernels compile for long
        os.environ["FLA_CACHE_RESULTS"] = "0"  # before fla is imported: a choice that was not timed is nobody else's
        untuned()
        hosts = {kind: name for name, (kind, _) in reversed(HOSTS.items())}.values()
    report |= {"doubles": doubles().errors(), "doubles, another epsilon": doubles().errors(eps=1e-3)}
    report["strangers"] = strangers()
    with doubles().installed() if device == "cpu" else contextlib.nullcontext():
        if device == "cpu":
            report |= {"faults": faults("gla"), "halves": {name: halves(name) for name in ("gla", "retnet")}}
        report["hosts"] = {name: examine(name, device) for name in hosts}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
