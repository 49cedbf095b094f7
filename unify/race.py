"""The benchmark on a GPU: our ops beside flash-linear-attention's, right before fast.

    python -m unify.race --parts table,first --json benchmarks/h200.json

Needs torch, triton and what `unify.compile` needs, and no more. Each contestant runs in a process of its own under a time
limit, because a first call may autotune for minutes; what it has measured until then is kept. Four parts:

    table   median milliseconds at three sizes, forward and forward + backward, called and replayed as a CUDA graph; peak memory
    first   seconds of the first call in a fresh process with empty caches
    length  milliseconds against T, one sequence of 1k to 512k tokens
    decode  milliseconds of one token's step, against the bytes of state it reads and writes

Results go into a JSON file, part by part; a later run adds to it or replaces what it measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from typing import NamedTuple

import torch

from .contest import CONTESTANTS, Call, Contestant, Size, WrongResultError, accept, check, draw, errors, lineup
from .errors import UnifyError
from .steps import uncollected

PARTS = ("table", "first", "length", "decode")
MEASURES = ("forward", "both")
LONG = "palimpsa palimpsa_key mamba2 gated_deltanet".split()
LAYER = Size(1, 1, 16, 96, 192)  # of the parts length and decode
LENGTHS = tuple(1024 * 2**n for n in range(10))
BATCHES = (1, 32, 256)
PREFILL = 64  # tokens that lead to the state of the part decode
COPIED = 2**31  # bytes of the copy that measures the memory's bandwidth
LIMIT = 300  # seconds a contestant
MARK = "unify.race "  # begins a line of results among all else that a process prints

Say = Callable[[str], object]


class Entry(NamedTuple):
    """One figure: a part, a contestant, where (a size, a length or a batch) and what (`MEASURES`, or "step")."""

    part: str
    name: str
    at: str
    measure: str

    def __str__(self):
        return "/".join(self)


def entries(name: str, parts: Sequence[str]) -> list[Entry]:
    """What is measured of a contestant, in order: forward before backward, which may fail where forward does not."""
    contestant, out = CONTESTANTS[name], []
    for n, size in enumerate(contestant.sizes):
        for measure in MEASURES:
            at = [part for part in ("first", "table") if part in parts and (part == "table" or n == 0)]
            out += [Entry(part, name, str(size), measure) for part in at]
    if "length" in parts and name in LONG:
        out += [Entry("length", name, str(T), measure) for T in LENGTHS for measure in MEASURES]
    if "decode" in parts and contestant.ours:
        out += [Entry("decode", name, str(batch), "step") for batch in BATCHES]
    return out


# --- in a contestant's process ----------------------------------------------------------------------------------------


class Lane:
    """One contestant on one device: measures entries, each after a check at its size."""

    def __init__(self, contestant: Contestant, device: str = "cuda"):
        self.contestant, self.device = contestant, device
        self.checked: dict[tuple, dict[str, float]] = {}
        self.waited = 0.0  # seconds the first calls took up to now

    @cached_property
    def call(self) -> Call:
        """The function; its import and its derivation are a part of the first call."""
        start = time.perf_counter()
        made = self.contestant.prepare()
        self.waited += time.perf_counter() - start
        return made

    def attempt(self, entry: Entry) -> dict:
        """The entry's figures, or {"failed": why}."""
        try:
            return getattr(self, entry.part)(entry)
        except Exception as error:  # whatever fails in one entry costs no other
            return {"failed": reason(error)}
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def error(self, size: Size, measure: str) -> float:
        """Largest relative error of what the entry computes. Raises WrongResultError where it is too large."""
        key = (size._replace(T=0), measure)
        if key not in self.checked:
            self.checked[key] = check(self.contestant, self.call, size, measure, self.device)
        return accept(self.checked[key], "against the float64 token loop")

    def timed(self, size: Size, measure: str) -> Callable[[], object]:
        """What is timed: forward without autograd, or forward and the gradient of every argument."""
        call, given = self.call, draw(self.contestant.op(), size, self.device)
        if measure == "forward":
            return torch.no_grad()(lambda: call(given))
        leaves = {name: x.requires_grad_() for name, x in given.items()}
        weights = torch.randn_like(given["v"])
        return lambda: torch.autograd.grad(call(leaves), list(leaves.values()), weights)

    def first(self, entry: Entry) -> dict:
        """Seconds until the first result: of the forward, then of everything up to the first gradients."""
        size = parse(entry.at)
        self.call  # noqa: B018 its time is counted in `waited`, that of the arguments is not
        run = self.timed(size, entry.measure)
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        self.waited += time.perf_counter() - start
        return {"seconds": self.waited, "error": self.error(size, entry.measure)}

    def table(self, entry: Entry) -> dict:
        """Median milliseconds, of calls and of graph replays; peak memory beyond the arguments."""
        size = parse(entry.at)
        found = {"error": self.error(size, entry.measure)}
        run = self.timed(size, entry.measure)
        run()  # what is compiled or tuned at this length is no part of the peak
        if entry.measure == "both":
            found["peak_mib"] = peak(run) / 2**20
        found["ms"] = milliseconds(run)
        try:
            found["graph_ms"] = milliseconds(captured(run))
        except Exception as error:
            found["graph_failed"] = reason(error)
        return found

    def length(self, entry: Entry) -> dict:
        """Median milliseconds of one sequence."""
        size = LAYER._replace(T=int(entry.at))
        return {"error": self.error(size, entry.measure), "ms": milliseconds(self.timed(size, entry.measure))}

    def decode(self, entry: Entry) -> dict:
        """Median milliseconds of a graph replay of one token, the bytes of its state, the bandwidth of a copy."""
        call, start, error = self.step(int(entry.at))
        moved = 2 * sum(x.numel() * x.element_size() for x in start)
        return {
            "error": error,
            "ms": milliseconds(captured(call)),
            "state_bytes": moved,
            "bandwidth": bandwidth(self.device),
        }

    def step(self, batch: int) -> tuple[Callable[[], object], tuple, float]:
        """One token after `PREFILL` others: the call, the state it starts from, its error against the loop."""
        op, loop = self.contestant.op(), self.contestant.op("reference")
        given = draw(op, LAYER._replace(B=batch, T=PREFILL + 1), self.device)
        static = {x.name: given[x.name] for x in op.recurrence.inputs if x.per == "static"}
        tokens = {name: x for name, x in given.items() if name not in static}
        token = {**static, **{name: x[:, PREFILL:].contiguous() for name, x in tokens.items()}}
        with torch.no_grad():
            before = {**static, **{name: x[:, :PREFILL].contiguous() for name, x in tokens.items()}}
            start = op(**before, output_final_state=True)[-1]
            wide = {name: x.double() for name, x in token.items()}
            exact = loop(**wide, initial_state=[x.double() for x in start], output_final_state=True)
            found = op(**token, initial_state=start, output_final_state=True)
        named = [{"o": o, **end._asdict()} for o, end in (found, exact)]
        error = accept(errors(*named), "after one token, against the float64 token loop")
        call = torch.no_grad()(lambda: op(**token, initial_state=start, output_final_state=True))
        return call, start, error


def milliseconds(call: Callable[[], object]) -> float:
    """Median by CUDA events, the second-level cache flushed before each repeat."""
    from triton.testing import do_bench

    return do_bench(call, warmup=25, rep=100, return_mode="median")


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: what replays it. Raises what torch raises where it cannot be captured."""
    main, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    main.wait_stream(side)
    with (
        uncollected(),
        torch.cuda.stream(main),
        torch.cuda.graph(graph),
    ):  # a failed capture leaves its stream behind as the current one
        call()
    return graph.replay


def peak(call: Callable[[], object]) -> int:
    """Bytes allocated at most during the call, beyond those allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@cache
def bandwidth(device: str) -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.randint(256, (COPIED,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / (1e-3 * milliseconds(lambda: target.copy_(source)))


def parse(text: str) -> Size:
    """A size from its text, such as 2x4096x16x96x192."""
    return Size(*map(int, text.split("x")))


def reason(error: Exception) -> str:
    """Why there is no figure, in a line."""
    lines = str(error).strip().splitlines() or [""]
    kind = "wrong" if isinstance(error, WrongResultError) else f"not measured: {type(error).__name__}"
    return anywhere(f"{kind}: {lines[0][:200]}")


def anywhere(text: str) -> str:
    """The text without the folders of this machine: files by their names alone."""
    return re.sub(r"(?<!\w)(?:/[\w.+-]+)+/", "", text)


def facts() -> dict[str, str]:
    """The GPU and the versions in this process."""
    import triton

    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    with suppress(metadata.PackageNotFoundError):
        found["fla-core"] = metadata.version("fla-core")
    return found


def work(name: str, parts: Sequence[str]) -> None:
    """Measure one contestant in this process, a line of results for each entry."""
    tell = lambda x: print(f"\n{MARK}{json.dumps(x)}", flush=True)  # noqa: E731
    tell({"facts": facts()})
    lane = Lane(CONTESTANTS[name])
    for entry in entries(name, parts):
        tell({"entry": entry, "found": lane.attempt(entry)})


# --- around the processes ---------------------------------------------------------------------------------------------


def follow(command: Sequence[str], limit: float, environment: Mapping[str, str]) -> Iterator[dict]:
    """The lines of results of a process as they come; last {"ended": how}, how empty where all went well.

    After `limit` seconds the process and its children are killed; so they are if this process is told to terminate.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        process_group=0,
    )
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    late: list[str] = []

    def stop(how: str) -> None:
        late.append(how)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = Timer(limit, stop, [f"no answer within {limit:g} s"])
    timer.start()
    last = ""
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
            elif line.strip():
                last = line.strip()[:200]
        code = process.wait()
        yield {"ended": late[0] if late else f"exit code {code}, {last}" if code else ""}
    finally:
        timer.cancel()
        if process.poll() is None:
            stop("left early")
        process.wait()
        process.stdout.close()
        signal.signal(signal.SIGTERM, former)


def load(path: Path) -> dict:
    """A record, or an empty one where there is no file yet. Raises UnifyError for a file that holds something else."""
    if not path.exists():
        return {"runs": [], "results": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or set(record) != {"runs", "results"}:
        works = "name another file, or one that unify bench has written"
        raise UnifyError(str(path), "this is no record of the benchmark", works)
    return record


def save(record: dict, path: Path) -> None:
    """Write the record, or leave the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    fresh.replace(path)


def place(record: dict, run: dict) -> int:
    """The run's index in the record. Raises UnifyError where the record is of another GPU."""
    other = next((x["gpu"] for x in record["runs"] if x["gpu"] != run["gpu"]), None)
    if other is not None:
        fails = f"the record holds figures of {other}, which do not compare with this one's"
        raise UnifyError(run["gpu"], fails, "name another file with --json")
    if run not in record["runs"]:
        record["runs"].append(run)
    return record["runs"].index(run)


def collect(record: dict, events: Iterator[dict], wanted: Sequence[Entry], session: dict, say: Say) -> Iterator[None]:
    """Enter results as they come, and why the rest is missing; yields after each change of the record."""
    missing, at = [str(e) for e in wanted], None
    for event in events:
        if "facts" in event:
            at = place(record, {**session, **event["facts"]})
        elif "entry" in event:
            path = "/".join(event["entry"])
            missing.remove(path)
            record["results"][path] = {**event["found"], "run": at}
            say(f"  {path}: {brief(event['found'])}")
            yield
        elif missing:
            why = {"failed": f"not measured: {anywhere(event['ended']) or 'it said nothing'}", "run": at}
            record["results"] |= dict.fromkeys(missing, why)
            say(f"  {len(missing)} entries: {why['failed']}")
            yield


def brief(found: Mapping) -> str:
    """An entry in a few words."""
    if "failed" in found:
        return found["failed"]
    units = {"ms": "ms", "graph_ms": "ms as a graph", "seconds": "s", "peak_mib": "MiB"}
    return ", ".join(f"{found[key]:.4g} {unit}" for key, unit in units.items() if key in found)


def race(
    path: Path,
    only: Sequence[str] = (),
    parts: Sequence[str] = PARTS,
    *,
    limit: float = LIMIT,
    rivals: bool = True,
    beside: Path | None = None,
    say: Say = lambda text: print(text, flush=True),
) -> dict:
    """Measure into the record at `path`, and return it.

    only: names of contestants, all of ours by default; each is followed by its counterpart where `rivals` holds and
    flash-linear-attention is installed. parts: of `PARTS`. limit: seconds a contestant. beside: a folder of packages
    that only the counterparts' processes see, such as another Triton.
    Raises UnifyError without a GPU, for an unknown name or part, and for a file with figures of another GPU.
    """
    names = lineup(list(only), rivals)
    for part in parts:
        if part not in PARTS:
            raise UnifyError(f"--parts {part}", "the benchmark has no such part", f"use some of {', '.join(PARTS)}")
    demand_gpu()
    if rivals and find_spec("fla") is None and not (beside and (beside / "fla").is_dir()):
        say("flash-linear-attention is not installed: ours alone")
        names = [name for name in names if CONTESTANTS[name].ours]
    record, session = load(path), {"date": datetime.now(UTC).isoformat(timespec="minutes")}
    session["command"] = command_line(path, only, parts, limit, rivals, beside)
    for n, name in enumerate(names, 1):
        wanted = entries(name, parts)
        say(f"[{n}/{len(names)}] {name}: {len(wanted)} entries")
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as empty:
            started = time.perf_counter()
            code = f"from unify.race import work; work({name!r}, {list(parts)!r})"
            environment = surroundings(CONTESTANTS[name], "first" in parts, empty, beside)
            with closing(follow([sys.executable, "-c", code], limit, environment)) as events:
                for _ in collect(record, events, wanted, session, say):
                    save(record, path)
            say(f"  {time.perf_counter() - started:.0f} s")
    return record


def demand_gpu() -> None:
    """Raises UnifyError where torch sees no CUDA GPU."""
    if not torch.cuda.is_available():
        works = "take --device cpu, or a CUDA build of torch on a machine with a GPU"
        raise UnifyError("--device cuda", "torch sees no CUDA GPU here", works)


def default_path() -> Path:
    """Where this GPU's record goes: benchmarks/h200.json for an NVIDIA H200. Raises UnifyError without a GPU."""
    demand_gpu()
    return Path("benchmarks") / f"{torch.cuda.get_device_name().split()[-1].lower()}.json"


def command_line(
    path: Path, only: Sequence[str], parts: Sequence[str], limit: float, rivals: bool, beside: Path | None
) -> str:
    """How to measure this again."""
    words = ["unify", "bench", "--device", "cuda", *(["--only", ",".join(only)] if only else [])]
    words += ["--parts", ",".join(parts), *(["--limit", f"{limit:g}"] if limit != LIMIT else [])]
    words += [*([] if rivals else ["--no-rivals"]), *(["--beside", beside.name] if beside else [])]
    return shlex.join([*words, "--json", path.name])


def surroundings(contestant: Contestant, cold: bool, empty: str, beside: Path | None) -> dict[str, str]:
    """Environment variables of a contestant's process: empty caches where its first call is timed."""
    out = {"TRITON_CACHE_DIR": f"{empty}/triton", "UNIFY_CACHE": f"{empty}/unify"} if cold else {}
    if beside and not contestant.ours:
        paths = [str(beside.resolve()), os.environ.get("PYTHONPATH", "")]
        out["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module; `unify bench --device cuda` is the same with more comfort."""
    from .standings import markdown

    listed = lambda text: [x.strip() for x in text.split(",") if x.strip()]  # noqa: E731
    parser = argparse.ArgumentParser(prog="python -m unify.race", description=race.__doc__.splitlines()[0])
    parser.add_argument("--only", type=listed, default=[], metavar="A,B,C")
    parser.add_argument("--parts", type=listed, default=list(PARTS), metavar="A,B,C", help=", ".join(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="the record; benchmarks/GPU.json by default")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="a contestant")
    parser.add_argument("--no-rivals", dest="rivals", action="store_false")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="packages that only counterparts see")
    given = parser.parse_args(arguments)
    try:
        options = {"limit": given.limit, "rivals": given.rivals, "beside": given.beside}
        record = race(given.json or default_path(), given.only, given.parts, **options)
    except UnifyError as error:
        parser.exit(2, f"unify: {error}\n")
    print(markdown(record))


if __name__ == "__main__":
    main()
