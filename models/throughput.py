"""A host beside its metaplastic self: is it the same, how fast does it read, how fast does it decode, in how much memory?

python -m unify.models.throughput --json benchmarks/convert.json             # a random Mamba-2 of 1.3 billion parameters
python -m unify.models.throughput --config FOLDER --device cpu --prompt 256   # any host's config.json, with random weights
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from unify.models.checkpoint import open_config
from unify.models.convert import metaplastic, unmetaplastic

MAMBA2_1B3 = {"hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64, "head_dim": 64, "state_size": 128,
              "n_groups": 1, "vocab_size": 50288, "chunk_size": 256, "tie_word_embeddings": True, "initializer_range": 0.02}  # fmt: skip
# transformers' own range, 0.1, is so wide at this width that bfloat16 alone moves the logits by 83 % of their norm
VARIANTS = ("host", "key", "diagonal")


def _seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    found = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


@torch.no_grad()
def _figures(model, prompt: torch.Tensor, steps: int, device: str, repeats: int) -> dict[str, float]:
    """Tokens a second of prefill and of decoding after it (batch 1), and peak bytes of both."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first: dict = {}
    name = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"

    def prefill():
        first[name] = model(prompt, use_cache=True, logits_to_keep=1)[name]

    def decode():
        for n in range(steps):
            model(prompt[:, n : n + 1], use_cache=True, **first)

    read, step = _seconds(prefill, device, repeats), _seconds(decode, device, repeats)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"prefill": prompt.numel() / read, "decode": steps / step, "peak": peak}


def _variants(model) -> Iterator[str]:
    """The host's name, then that of each metaplastic form while the model has it."""
    for variant in VARIANTS:
        if variant != "host":
            metaplastic(model, variant, quiet=True)
        yield variant
        if variant != "host":
            unmetaplastic(model)


@torch.no_grad()
def measure(
    config, *, device: str, dtype: torch.dtype, prompt: int, steps: int = 64, repeats: int = 3, say=lambda text: None
) -> dict:
    """Figures of a host with random weights and of both its metaplastic forms, which start at importance zero.

    On 2048 tokens (or the prompt, if that is shorter), as ||difference|| / ||logits||: exact, converted against host, both in
    float32; error, against the host, both in dtype; rounding, against the float32 host in dtype: for the host itself, what
    error is to be judged by. prefill, decode: tokens a second in dtype, batch 1; peak: bytes.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    logits = lambda: model(ids[:, :2048], use_cache=False).logits.float()  # noqa: E731
    off = lambda x, y: ((x - y).norm() / y.norm()).item()  # noqa: E731
    true, found = logits(), {}
    for variant in _variants(model):
        found[variant] = {"exact": off(logits(), true)}
    model.to(dtype)
    expected = logits()
    for variant in _variants(model):
        here = logits()
        found[variant] |= {"error": off(here, expected), "rounding": off(here, true)}
        del here
        found[variant] |= _figures(model, ids, steps, device, repeats)
        say(f"{variant:9} " + ", ".join(f"{name} {x:.4g}" for name, x in found[variant].items()))
    parameters = sum(p.numel() for p in model.parameters())
    return {"model_type": config.model_type, "parameters": parameters, "dtype": str(dtype).removeprefix("torch."),
            "prompt": prompt, "steps": steps, "variants": found}  # fmt: skip


def in_words(record: dict) -> str:
    """A record as the README says it."""
    host, key, diagonal = (record["variants"][v] for v in VARIANTS)
    speeds = lambda what: ", ".join(f"{x[what]:,.{0 if what == 'prefill' else 1}f}" for x in (host, key, diagonal))  # noqa: E731
    on, count = f"{record['on']}, transformers {record['transformers']}", record["parameters"] / 1e9
    return (
        f"A random {record['model_type']} of {count:.2f} billion parameters ({on}): converted with key and diagonal importance, "
        f"its logits differ by {key['exact']:.1e} and {diagonal['exact']:.1e} of their norm in float32, and in {record['dtype']} "
        f"by {key['error']:.3f} and {diagonal['error']:.3f}, where that rounding moves the host's own by {host['rounding']:.3f}. "
        f"Host, key, diagonal: {speeds('prefill')} tokens a second of a prompt of {record['prompt']:,}, {speeds('decode')} of "
        "decoding, batch 1."
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    import transformers

    from unify.device import versions

    parser = argparse.ArgumentParser(prog="python -m unify.models.throughput", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, help="folder of a config.json; default: Mamba-2, 1.3 billion parameters")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    config = open_config(given.config) if given.config else transformers.Mamba2Config(**MAMBA2_1B3)
    sizes = {"device": given.device, "dtype": getattr(torch, given.dtype), "prompt": given.prompt, "steps": given.steps}
    record = {
        **measure(config, **sizes, say=print),
        "on": versions(given.device),
        "transformers": transformers.__version__,
    }
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
