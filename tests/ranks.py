"""What each process of tests/test_distributed.py runs: its pieces of sequences, under one file a rank."""

import itertools
import os

import torch
import torch.distributed as dist

import unify
from unify import distributed
from unify.models.layer import Layer
from unify.models.zoo import get
from unify.testing import random_inputs, random_state
from unify.triple import Architecture, Observation, Posterior, Prior, Triple
from unify.verify import tokens

LENGTH = 23
CUTS = {1: (0, LENGTH), 2: (0, 9, LENGTH), 4: (0, 5, 6, 16, LENGTH)}  # of different lengths, one of a single token
LAYER_CUTS = CUTS | {4: (0, 5, 9, 16, LENGTH)}  # none shorter than a convolution reaches back
OTHERS = {
    "a decay for each entry, a prior mean": Triple(
        Architecture(forgetting="entry", value="observation", precision="head"), Posterior(), Prior(mean="entry")
    ),
    "a prior mean that is returned to": Triple(
        Architecture(forgetting="key", value="observation", precision="head"), Posterior(), Prior(mean="entry")
    ),
    "two observations, read before": Triple(
        Architecture(forgetting="head", importance="value", observations=(Observation(), Observation("p")), read="before"),
        Posterior(curvature="diagonal"),
        Prior(precision="key"),
    ),
    "two of each, a precision of each channel": Triple(
        Architecture(forgetting="none", value="observation", precision="value", repeats=2), Posterior(curvature="full")
    ),
}  # fmt: skip
PLANTED = ("palimpsa", "weak")
LAYERS = {"palimpsa": {"conv_bias": True, "skip": True}, "retnet": {}, "meta_gla": {"conv_size": 0}}


def triple(name):
    return OTHERS[name] if name in OTHERS else get(name).triple


def arguments(op, gates):
    """A whole sequence, what it starts from and the weights of a loss, the same in every process."""
    x = random_inputs(op, 5, B=2, T=LENGTH, gates="mixed" if gates == "closed" else gates)
    if gates == "closed" and "g" in x:
        x["g"] = torch.where(torch.arange(x["g"].numel()).view_as(x["g"]) % 7 == 0, -800.0, x["g"])
    return x, random_state(op, x)


def weights(like, seed):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def outcome(run, op, x, start, cut, last):
    """Everything a call returns and every gradient; the final state counts in the loss of one process only."""
    x = {name: y.clone().requires_grad_() for name, y in x.items()}
    start = tuple(y.clone().requires_grad_() for y in start)
    o, variance, final = run(**x, initial_state=start, return_variance=True, output_final_state=True)
    whole = (*o.shape[:1], LENGTH, *o.shape[2:])
    loss = sum((y * weights(y.new_empty(whole), n)[:, cut]).sum() for n, y in enumerate((o, variance)))
    if last:
        loss = loss + sum((y * weights(y, n)).sum() for n, y in enumerate(final))
    loss.backward()
    grads = {f"d {name}": y.grad for name, y in x.items()}
    starts = {f"d start.{name}": y.grad for name, y in zip(op.state_type._fields, start, strict=True)}
    return (
        {"o": o.detach(), "variance": variance.detach(), **{n: y.detach() for n, y in final._asdict().items()}}
        | grads
        | starts
    )


def layer(name):
    torch.manual_seed(3)
    return Layer(get(name).triple, 12, 2, 4, rank=3, **LAYERS[name]).double()


def layer_outcome(made, x, cut, last):
    """The layer's rows, its state, and the gradients of rows and parameters."""
    x = x.clone().requires_grad_()
    y, state = made(x, output_state=True)
    loss = (y * weights(y.new_empty(len(y), LENGTH, y.shape[2]), 1)[:, cut]).sum()
    if last:
        loss = loss + sum((z * weights(z, n)).sum() for n, z in enumerate((state.conv, *state.memory)))
    loss.backward()
    states = {"conv": state.conv, "length": state.length.double(), **state.memory._asdict()}
    grads = {f"d {n}": p.grad for n, p in made.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **{n: z.detach() for n, z in states.items()}, "d x": x.grad} | grads


def forget_the_first(effects, n, compose=distributed.compose):
    """A planted error: what the first piece wrote is left out."""
    return compose([[*effects[0][:n], *(torch.zeros_like(w) for w in effects[0][n:])], *effects[1:]], n)


def pieces(cuts, world):
    """(first, stop) of each rank."""
    return list(itertools.pairwise(cuts[world]))


def rows(n=2):
    """What goes into a layer, [n, LENGTH, 12]."""
    return weights(torch.empty(n, LENGTH, 12, dtype=torch.float64), 9)


def run(rank, world, folder, cases, layers):
    """All cases on this rank's pieces; results go to one file a rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    first, stop = pieces(CUTS, world)[rank]
    last, found = rank == world - 1, {}

    def piece(name, gates):
        op = unify.compile(triple(name))
        x, start = arguments(op, gates)
        far = unify.context_parallel(op)
        return outcome(far, op, tokens(op, x, first, stop), start, slice(first, stop), last)

    found = {case: piece(*case) for case in cases}
    for name in layers:
        cut = slice(*pieces(LAYER_CUTS, world)[rank])
        found[name] = layer_outcome(layer(name).context_parallel(), rows()[:, cut], cut, last)
    timing = distributed.Bench(("palimpsa",), (2, 48, 2, 4, 6), "cpu", repeats=3)
    found["timed"] = distributed.measure("palimpsa", timing)
    distributed.compose = forget_the_first
    found["timed, planted"] = distributed.measure("palimpsa", timing)
    found["planted"] = piece(*PLANTED)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def sharded(world):
    """The loss of a hybrid as it is, and under FSDP2 with half-precision parameters and checkpointed blocks."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from unify.models import UnifyConfig, UnifyForCausalLM

    layers = ["palimpsa", "sliding_attention", "gated_deltanet"]
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 64,
        "vocab_size": 50,
        "layer": {"num_heads": 2},
    }
    torch.manual_seed(0)
    model = UnifyForCausalLM(UnifyConfig(layers=layers, **sizes)).train()
    ids = torch.randint(50, (2, 20))
    row = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(20).remainder(13).expand(2, 20)}
    plain = model(**row).loss.item()
    policy, mesh = MixedPrecisionPolicy(torch.bfloat16, torch.float32), dist.init_device_mesh("cpu", (world,))
    model.gradient_checkpointing_enable()
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    loss = model(**row).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    return plain, loss.item()


def train(rank, world, folder, config):
    """One process of a training run, as a launcher would start it; the first leaves its losses."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, not used: the group is there
    from unify import training

    found = training.train(config)
    if rank == 0:
        torch.save((found, sharded(world)), f"{folder}/found.pt")
    else:
        sharded(world)
    dist.destroy_process_group()
