"""How time and memory grow: with clients, parameters, context, and series in the store.

Each point is a process of its own; times are CPU time where not said otherwise, medians within it; memory is how far its resident set
peaks above what it was before. An exponent is the slope of a least-squares line through the logarithms, beside it the slope between the
two largest points, where fixed costs weigh least. Above 1.1 either is called above linear.

Clients, whole rounds: real sites (nano, one step on one window, moments not kept) on two worker threads through the real round loop,
checkpoint and log included; memory is that of sites and server. Clients, server alone: a fleet that answers at once with copies of ready
replies (their copying is in the figures), for FedAvg, whose server averages as replies arrive, and for FedTRL, whose server needs all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedcast.methods  # noqa: F401 - registers the methods
from benchmarks import floor
from benchmarks.machine import processor_name, settings
from benchmarks.step import VARIANTS, Trainee, full_batch
from benchmarks.tables import markdown, write_json
from benchmarks.workbench import random_walks
from fedcast.data.splits import split_by_time
from fedcast.data.store import SeriesStore
from fedcast.data.windows import WindowSampler
from fedcast.federated.checkpoint import Checkpoints, Progress
from fedcast.federated.fleet import Fleet, ThreadFleet
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.rounds import RoundLoop, Silent
from fedcast.federated.site import Site, SiteRole
from fedcast.methods.base import Server, build_method, empty
from fedcast.models.base import SIZES
from fedcast.models.precision import native_bfloat16
from fedcast.run.folder import RunFolder
from fedcast.spec import RunSpec, parse_spec

LINEAR = 1.1
ROUNDS = 5
SAMPLES = 1000
Quantities = dict[str, float]


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak_growth(work: Callable[[], object]) -> int:
    """Return how many bytes the resident set peaks above its size before the work (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median CPU seconds of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


class ReadyFleet:
    """Sites that answer at once: copies of the tensors they were sent, as if they had come over a wire."""

    simulated = True

    def __init__(self, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], private: int) -> None:
        self._names = list(names)
        generator = torch.Generator().manual_seed(0)
        self._ready = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self._private = torch.zeros(private)

    def sites(self) -> list[str]:
        """Return the names of the sites."""
        return self._names

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Answer every task, keeping no reply while the next is made."""
        for name, task in tasks.items():
            yield name, self._answer(task)

    def _answer(self, task: Task) -> Reply:
        meta = {"samples": SAMPLES, "steps": 1, "loss": 1.0, "seconds": 0.0, "compute_seconds": 0.0, "metrics": {}}
        tensors = {"shared": task.tensors["shared"].clone(), **{key: value.clone() for key, value in self._ready.items()}}
        if task.meta["export"]:
            tensors["private"] = self._private.clone()
        return Reply(tensors, meta, task=task.id)

    def close(self) -> None:
        """Do nothing."""


class Stopwatch(Silent):
    """Notes time and CPU time when each round begins."""

    def __init__(self) -> None:
        self.starts: list[tuple[float, float]] = []

    def phase(self, name: str, round: int) -> None:  # noqa: A002 - the observer's own name
        """Note the time of the first phase of a round."""
        if name == "select":
            self.starts.append((time.perf_counter(), time.process_time()))


def clients_point(clients: int, method_name: str, real: bool) -> Quantities:
    """Return CPU and wall seconds a round, peak memory, bytes of its messages and of its row in the log."""
    spec = parse_spec(
        {
            "model": {"size": "nano", "context": 64, "horizon": 16},
            "method": {"name": method_name},
            "training": {"batch_size": 1, "device": "cpu", "moments": "reset"},
            "federation": {"rounds": ROUNDS, "local_steps": 1, "workers": 2},
            "evaluation": {"every": ROUNDS},
        }
    )
    # One thread, as in a run.
    with tempfile.TemporaryDirectory() as name, settings(1, "highest"):
        folder, watch = RunFolder(name), Stopwatch()
        memory = peak_growth(lambda: _rounds(spec, clients, real, folder, watch))
        rows = folder.rows("round")[1:-1]
    wall, cpu = np.median(np.diff(watch.starts, axis=0)[1:], axis=0).tolist()
    return {
        "CPU seconds a round": cpu,
        "wall seconds a round": wall,
        "peak memory": memory,
        "bytes of messages": rows[0]["bytes_up"] + rows[0]["bytes_down"],
        "bytes logged a round": statistics.median(len(json.dumps(row)) for row in rows),
    }


def _rounds(spec: RunSpec, clients: int, real: bool, folder: RunFolder, watch: Stopwatch) -> None:
    """Run the rounds of a federation; the last one, which exports private weights, ends after the stopwatch's last note."""
    loop = federation(spec, clients, folder, watch, real=real)
    loop.run(Progress())
    loop.fleet.close()


def federation(spec: RunSpec, clients: int, folder: RunFolder, watch: Silent, *, real: bool) -> RoundLoop:
    """Return the round loop of a federation of real sites, or of sites that answer at once."""
    method = build_method(spec.method)
    plan = Plan(spec, method)
    layout, initial = plan.layout, plan.initial
    names = [f"site{i:05d}" for i in range(clients)]
    roles = {name: SiteRole(name, evaluates=False) for name in names}
    samples = dict.fromkeys(names, SAMPLES)
    fleet: Fleet
    if real:
        sites = {name: Site(role, random_walks(4, 256), plan, folder.sites / name) for name, role in roles.items()}
        samples = {name: site.samples for name, site in sites.items()}
        fleet = ThreadFleet(sites, spec.federation.workers)
    else:
        fleet = ReadyFleet(names, method.reply_shapes(plan.shape), layout.private_size)
    return RoundLoop(
        plan=plan,
        fleet=fleet,
        roles=roles,
        samples=samples,
        server=Server(layout, initial[: layout.shared_size].clone(), empty(), {}, 0, spec.federation.rounds),
        checkpoints=Checkpoints(folder.checkpoints),
        log=folder.append,
        keep_best=lambda server: None,
        observer=watch,
    )


def step_point(size: str, context: int, repeats: int) -> Quantities:
    """Return seconds of a training step at batch 8, its peak memory, its products, and the bytes of a message with its weights."""
    config = floor.configuration(size, context)
    variant = next(v for v in VARIANTS if v.format == ("bfloat16" if native_bfloat16(torch.device("cpu")) else "float32") and v.flat)
    batch = full_batch(8, context, config.horizon)
    found: Quantities = {}

    def work() -> None:
        step = Trainee(variant, config, batch)
        found["CPU seconds a step"] = seconds(step, repeats)

    with settings(1, "highest"):
        small = floor.configuration("nano", 64)
        Trainee(variant, small, full_batch(8, 64, small.horizon))()  # loads what torch loads late
        found["peak memory"] = peak_growth(work)
    weights = torch.zeros(floor.parameters(config))
    found["bytes of a message"] = len(Task("train", 1, {"shared": weights}, {"export": False}).encode())
    found["operations of products"] = floor.step(config, 8).products
    return found


def series_point(count: int, repeats: int) -> Quantities:
    """Return seconds and peak memory of making a window sampler over ``count`` series of 64 points, and seconds of drawing 32 windows."""
    length, horizon = 64, 8
    store = SeriesStore(
        values=np.random.default_rng(0).standard_normal(count * length, dtype=np.float32),
        offsets=np.arange(count + 1, dtype=np.int64) * length,
        ids=[str(i) for i in range(count)],
        starts=["0"] * count,
        dataset=np.zeros(count, dtype=np.int32),
        domain=np.zeros(count, dtype=np.int32),
        dataset_names=["noise"],
        domain_names=["noise"],
        freqs=["h"],
        season_lengths=np.array([24], dtype=np.int32),
    )
    made: list[WindowSampler] = []

    def make() -> None:
        splits = split_by_time(store, horizon=horizon, validation=0.1, test=0.2)
        made[:] = [WindowSampler(store, splits, context=32, horizon=horizon, balance="dataset")]

    memory = peak_growth(make)
    rng = np.random.default_rng(0)
    construction = seconds(make, min(repeats, 3))
    draw = seconds(lambda: made[0].gather(made[0].draw(32, rng)), 40 * repeats)
    return {"CPU seconds to make a sampler": construction, "peak memory": memory, "CPU seconds a batch of 32": draw}


@dataclass(frozen=True)
class Study:
    """One thing that grows.

    Attributes
    ----------
    name
        What is measured against what.
    values
        Arguments of the points, in rising order.
    quick
        How many of them ``--quick`` takes, from the start.
    point
        What measures a point, from its argument and the number of repeats.
    size
        The number that the argument stands for.
    """

    name: str
    values: tuple[Any, ...]
    quick: int
    point: Callable[[Any, int], Quantities]
    size: Callable[[Any], int] = int


CLIENTS = (10, 30, 100, 300, 1000)
STUDIES = {
    "rounds": Study("clients, whole rounds (fedavg)", CLIENTS, 1, lambda n, _: clients_point(n, "fedavg", real=True)),
    "server": Study("clients, server alone (fedavg)", CLIENTS, 3, lambda n, _: clients_point(n, "fedavg", real=False)),
    "server-fedtrl": Study("clients, server alone (fedtrl)", CLIENTS, 3, lambda n, _: clients_point(n, "fedtrl", real=False)),
    "parameters": Study(
        "parameters (batch 8, context 512)",
        tuple(SIZES),
        2,
        lambda size, repeats: step_point(size, 512, repeats),
        lambda size: floor.parameters(floor.configuration(size)),
    ),
    "context": Study("context (micro, batch 8)", (128, 256, 512, 1024, 2048, 4096), 2, lambda n, repeats: step_point("micro", n, repeats)),
    "series": Study("series in the store (64 points each)", (10**2, 10**3, 10**4, 10**5, 10**6), 3, series_point),
}


def fit(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float | None]:
    """Return the exponent of ``values`` against ``sizes``, its R squared, and the slope between the last two points.

    All are ``None`` where a value is 0, or there is one point only.
    """
    if len(sizes) < 2 or min(values) <= 0:
        return {"exponent": None, "r_squared": None, "last_slope": None}
    x, y = np.log(np.asarray(sizes, dtype=np.float64)), np.log(np.asarray(values, dtype=np.float64))
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - slope * x - intercept) ** 2).sum())
    return {
        "exponent": float(slope),
        "r_squared": 1 - left / spread if spread > 0 else 1.0,
        "last_slope": float((y[-1] - y[-2]) / (x[-1] - x[-2])),
    }


def measured(study: str, value: Any, repeats: int, *, apart: bool) -> Quantities:
    """Return a point's quantities, measured in a process of its own or in this one."""
    if not apart:
        return STUDIES[study].point(value, repeats)
    command = [sys.executable, "-m", "benchmarks.growth", "--point", study, json.dumps(value), "--repeats", str(repeats)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def attention_share(context: int) -> float:
    """Return the share of a step's products that grows with the square of the context: micro's self-attention."""
    config = floor.configuration("micro", context)
    return config.encoder_layers * 4 * config.context_patches**2 * config.d_model / floor.forward_products(config, 1)


def _words(quantity: str, value: float) -> str:
    if "seconds" in quantity:
        return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} us"
    scale, unit = (1e9, "G") if value >= 1e9 else (1e6, "M") if value >= 1e6 else (1e3, "k")
    return f"{value / scale:.1f} {unit}{'FLOP' if quantity.startswith('operations') else 'B'}"


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few small points in this process: memory means little")
    parser.add_argument("--point", nargs=2, metavar=("STUDY", "VALUE"), help="measure one point and print it as JSON")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args(words)
    if arguments.point:
        print(json.dumps(measured(arguments.point[0], json.loads(arguments.point[1]), arguments.repeats, apart=False)))
        return
    rows: list[dict[str, Any]] = []
    for key in arguments.studies:
        study = STUDIES[key]
        values = study.values[: study.quick] if arguments.quick else study.values
        points = [measured(key, value, 1 if arguments.quick else arguments.repeats, apart=not arguments.quick) for value in values]
        sizes = [study.size(value) for value in values]
        for quantity in points[0]:
            found = [point[quantity] for point in points]
            rows.append({"study": key, "against": study.name, "quantity": quantity, "sizes": sizes, "values": found, **fit(sizes, found)})
    print(f"{processor_name()}, torch {torch.__version__}\n\n{table(rows)}\n")
    if "context" in arguments.studies:
        least, most = (100 * attention_share(context) for context in (128, 4096))
        print(f"Self-attention, which is quadratic, is {least:.1f} % of a step's products at a context of 128, {most:.1f} % at 4096.")
    above = [f"{row['quantity']} against {row['against']}" for row in rows if row["exponent"] is not None and is_above(row)]
    print(f"Above linear: {'; '.join(above) or 'nothing'}.")
    write_json(arguments.output, {"processor": processor_name(), "torch": torch.__version__, "rows": rows})


def is_above(row: Mapping[str, Any]) -> bool:
    """Say whether something grows faster than linearly, all in all or at the end."""
    return bool(max(row["exponent"], row["last_slope"]) > LINEAR)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the markdown table."""
    lines = []
    for row in rows:
        slopes = [row["exponent"], row["r_squared"], row["last_slope"]]
        ends = [_words(row["quantity"], row["values"][at]) for at in (0, -1)]
        said = "" if row["exponent"] is None else "above linear" if is_above(row) else "at most linear"
        cells = ["" if value is None or math.isnan(value) else f"{value:.2f}" for value in slopes]
        lines.append([row["against"], f"{row['sizes'][0]} to {row['sizes'][-1]}", row["quantity"], *ends, *cells, said])
    return markdown(["against", "from, to", "quantity", "first", "last", "exponent", "R²", "slope at the end", ""], lines)


if __name__ == "__main__":
    main()
