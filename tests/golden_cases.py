"""Golden vectors as test cases, and the comparison they are held to: shared by the published and the derived recurrences."""

from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5  # the golden numbers are float32
EXACT = 1e-10  # two float64 forms of one equation


def assert_agree(actual, expected, tolerance):
    """Every expected array is there, has its shape, is finite and within tolerance * (1 + |expected|)."""
    for name, want in expected.items():
        assert name in actual, f"{name} is missing; there are {sorted(actual)}"
        got = actual[name]
        assert got.shape == want.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        assert got.isfinite().all(), f"{name} is not finite"
        excess = ((got - want).abs() / (1 + want.abs())).max().item()
        assert excess <= tolerance, f"{name} is off by {excess:.2e}, allowed {tolerance:.0e}"


def load(file):
    """A golden file's arrays, in float64."""
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]).double() for name in arrays.files}


def plain(file, model, *, scale=None, **renamed):
    """A file whose only state is S: arrays are the arguments, after renaming; `final_state` is S."""
    arrays = load(file)
    expected = {"o": arrays.pop("o")}
    if "final_state" in arrays:
        expected["S"] = arrays.pop("final_state")
    if "initial_state" in arrays:
        arrays["initial_state"] = {"S": arrays["initial_state"]}
    inputs = {renamed.get(name, name): value for name, value in arrays.items()}
    inputs["scale"] = inputs["q"].shape[-1] ** -0.5 if scale is None else scale
    return model, inputs, expected


def retnet_case():
    model, inputs, expected = plain("retnet", "retnet")
    inputs["g"] = torch.log1p(-(2.0 ** (-5 - torch.arange(inputs["q"].shape[2]))))
    return model, inputs, expected


def mesanet_case():
    model, inputs, expected = plain("mesanet_scale1_V_eq_K", "mesanet", scale=1.0)
    return model, inputs, {**expected, "P": inputs.pop("final_kk"), "M": inputs.pop("final_kv")}


def preconditioned_case():
    names = {"beta_atk": "importance", "g_atk": "g_importance"}
    model, inputs, expected = plain("preconditioned_gated_deltanet", "preconditioned_gdn", **names)
    return model, inputs, {**expected, "A": inputs.pop("final_A")}


def kla_case():
    """The file has no head axis, and keeps what depends on key and value channel value first."""
    arrays = load("kla_scale1_single_head")
    inputs = {name: arrays[name][:, :, None] for name in ("q", "k", "v")}
    inputs["beta"] = arrays["precision"][:, :, None]
    inputs["g"] = arrays["a"].mT[None].log()
    inputs["noise"] = arrays["process_noise"].mT[None]
    expected = {name: arrays[name][:, :, None] for name in ("o", "variance")}
    expected["Lambda"] = arrays["final_precision"].mT[:, None]
    expected["M"] = arrays["final_natural_mean"].mT[:, None]
    return "kla", {**inputs, "scale": 1.0}, expected


def palimpsa_case(file):
    """The file keeps the mean and the importance; the states are the natural mean and the importance less its prior."""
    arrays = load(file)
    prior = arrays["prior_precision"][:, None, None]

    def state(when):
        importance = arrays.pop(f"{when}_importance")
        return {"M": arrays.pop(f"{when}_mean") * importance, "Ibar": importance - prior}

    expected = {"o": arrays.pop("o"), "variance": arrays.pop("variance"), **state("final")}
    if "initial_mean" in arrays:
        arrays["initial_state"] = state("initial")
    return "palimpsa", {**arrays, "scale": arrays["q"].shape[-1] ** -0.5}, expected


CASES = {
    "linear_attention": lambda: plain("linear_attention", "linear_attention"),
    "retnet": retnet_case,
    "mamba2": lambda: plain("mamba2", "mamba2"),
    "gla": lambda: plain("gla", "gla"),
    "rwkv6": lambda: plain("rwkv6", "rwkv6", u="bonus"),
    "deltanet": lambda: plain("deltanet", "deltanet"),
    "gated_deltanet": lambda: plain("gated_deltanet", "gated_deltanet"),
    "kda": lambda: plain("kda", "kda"),
    "gated_deltanet2": lambda: plain("gated_deltanet2", "gated_deltanet2"),
    "comba": lambda: plain("comba", "comba"),
    "comba_decayed_read": lambda: plain("comba_decayed_read", "comba_decayed"),
    "gated_deltaproduct_scale1": lambda: plain("gated_deltaproduct_scale1", "gated_deltaproduct", scale=1.0),
    "rwkv7_dplr": lambda: plain("rwkv7_dplr", "rwkv7"),
    "preconditioned_gated_deltanet": preconditioned_case,
    "mesanet_scale1_V_eq_K": mesanet_case,
    "kla_scale1_single_head": kla_case,
    "palimpsa": lambda: palimpsa_case("palimpsa"),
    "palimpsa_initial_state": lambda: palimpsa_case("palimpsa_initial_state"),
}
