"""The server's side: means, robust rules and memory, beside the loops that other frameworks run.

One thread throughout, all methods of a table in turn in one process, medians of repeats. Vectors are those of a real model; the loops of
the peers, written out below, go over the model's named tensors as theirs do. Reading all vectors once, at the bandwidth measured in
the same run, is the floor of a mean.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial, reduce
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import floor
from benchmarks.growth import peak_growth
from benchmarks.machine import cores, processor_name
from benchmarks.tables import markdown, write_json
from fedcast.federated.messages import Reply, screen
from fedcast.models.patch import PatchTransformer
from fedcast.training.aggregate import Sketch, Spool, StreamingMean, Vectors, median, pairwise_cosines, trimmed_mean, weighted_mean
from fedcast.training.flat import Layout

SHARE = 0.1
Contest = Mapping[str, Callable[[], object]]


class Replies:
    """Vectors of a model's length from several sites, and each also as the model's named tensors."""

    def __init__(self, size: str, count: int) -> None:
        named = dict(PatchTransformer(floor.configuration(size)).named_parameters())
        self.layout = Layout.of(named, lambda name: True)
        generator = torch.Generator().manual_seed(0)
        base = 0.05 * torch.randn(self.layout.size, generator=generator)
        self.matrix = torch.empty(count, self.layout.size)
        for row in self.matrix:
            torch.randn(self.layout.size, generator=generator, out=row)
            row.mul_(0.01).add_(base)
        self.vectors = list(self.matrix)
        self.samples = [1000 + 37 * index for index in range(count)]
        self.named = [self.layout.views(vector) for vector in self.vectors]

    @property
    def weights(self) -> list[float]:
        """Return each site's share of the training points."""
        return [samples / sum(self.samples) for samples in self.samples]


def streamed(replies: Replies) -> Tensor:
    """Return fedcast's mean of vectors as they arrive: exact, hence the same in any order."""
    mean = StreamingMean({"shared": replies.layout.size}, sum(replies.samples))
    for vector, samples in zip(replies.vectors, replies.samples, strict=True):
        mean.add({"shared": vector}, samples)
    return mean.means()["shared"]


def flower(replies: Replies) -> list[np.ndarray]:
    """Return the mean as ``flwr.server.strategy.aggregate.aggregate`` has it."""
    results = [([t.numpy() for t in named.values()], n) for named, n in zip(replies.named, replies.samples, strict=True)]
    total = sum(samples for _, samples in results)
    weighted = [[layer * samples for layer in weights] for weights, samples in results]
    return [reduce(np.add, layers) / total for layers in zip(*weighted, strict=True)]


def pfllib(replies: Replies) -> dict[str, Tensor]:
    """Return the mean as PFLlib's ``Server.aggregate_parameters`` has it."""
    mean = deepcopy(replies.named[0])
    for value in mean.values():
        value.zero_()
    for weight, named in zip(replies.weights, replies.named, strict=True):
        for ours, theirs in zip(mean.values(), named.values(), strict=True):
            ours += theirs.clone() * weight
    return mean


def fedml(replies: Replies) -> dict[str, Tensor]:
    """Return the mean as FedML's ``FedAVGAggregator`` has it."""
    mean: dict[str, Tensor] = {}
    for name in replies.layout.names:
        for index, (named, weight) in enumerate(zip(replies.named, replies.weights, strict=True)):
            if index == 0:
                mean[name] = named[name] * weight
            else:
                mean[name] += named[name] * weight
    return mean


def foreach(replies: Replies) -> list[Tensor]:
    """Return the mean by one fused call a site, in float32."""
    mean = [torch.zeros(shape) for shape in replies.layout.shapes]
    for weight, named in zip(replies.weights, replies.named, strict=True):
        torch._foreach_add_(mean, list(named.values()), alpha=weight)
    return mean


def plain_stream(replies: Replies) -> Tensor:
    """Return the mean by one float32 pass a vector: the bytes depend on the order."""
    mean = torch.zeros(replies.layout.size)
    for weight, vector in zip(replies.weights, replies.vectors, strict=True):
        mean.add_(vector, alpha=weight)
    return mean


def by_key(replies: Replies, rule: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return what a rule makes of the stacked tensors, key by key."""
    return {name: rule(torch.stack([named[name] for named in replies.named])) for name in replies.layout.names}


def trim_sorted(stacked: Tensor) -> Tensor:
    """Return the trimmed mean by a full sort."""
    cut = int(SHARE * len(stacked))
    return stacked.sort(dim=0).values[cut : len(stacked) - cut].mean(0)


def trim_topk(stacked: Tensor) -> Tensor:
    """Return the trimmed mean as FederatedScope's ``TrimmedmeanAggregator`` has it."""
    cut = int(SHARE * len(stacked))
    largest, smallest = torch.topk(stacked, cut, dim=0).values, torch.topk(-stacked, cut, dim=0).values
    return torch.cat([stacked, -largest, smallest]).sum(0) / (len(stacked) - 2 * cut)


def pair_loop(replies: Replies) -> list[float]:
    """Return the cosine of every pair, a pair at a time."""
    units = [(vector, float(vector.norm())) for vector in replies.vectors]
    return [float(a @ b) / (x * y) for (a, x), (b, y) in combinations(units, 2)]


def sketched(replies: Replies) -> Tensor:
    """Return about the cosine of every pair."""
    sketch = Sketch(replies.layout.size)
    return pairwise_cosines(Vectors([sketch(vector) for vector in replies.vectors]))


def screened(replies: Replies) -> None:
    """Check every reply, as a round does before it averages."""
    meta: dict[str, Any] = {"samples": 1, "steps": 1, "loss": 1.0, "seconds": 1.0, "compute_seconds": 1.0, "metrics": {}}
    for vector in replies.vectors:
        screen(Reply({"shared": vector}, meta), {"shared": (replies.layout.size,)}, largest_samples=1)


def means(replies: Replies) -> Contest:
    """Return the contestants of the mean."""
    weights = torch.tensor(replies.weights)
    return {
        "floor: read once": lambda: replies.matrix.sum(),
        "fedcast, as vectors arrive (exact, float64)": lambda: streamed(replies),
        "fedcast, all at once (float64)": lambda: weighted_mean(Vectors(replies.vectors), replies.weights),
        "float32 pass a vector": lambda: plain_stream(replies),
        "one product `weights @ matrix`": lambda: weights @ replies.matrix,
        "`torch._foreach_add_`": lambda: foreach(replies),
        "FedML's loop": lambda: fedml(replies),
        "PFLlib's loop": lambda: pfllib(replies),
        "Flower's `aggregate`": lambda: flower(replies),
        "beside it: the screen of all replies": lambda: screened(replies),
    }


def rules(replies: Replies) -> dict[str, Contest]:
    """Return the contestants of each robust rule, the reference first."""
    rows = Vectors(replies.vectors)
    return {
        "trimmed mean": {
            "stack and sort, key by key": lambda: by_key(replies, trim_sorted),
            "stack and topk, key by key (FederatedScope)": lambda: by_key(replies, trim_topk),
            "fedcast": lambda: trimmed_mean(rows, SHARE),
        },
        "median": {
            "stack and sort, key by key": lambda: by_key(replies, lambda stacked: stacked.sort(dim=0).values[len(stacked) // 2]),
            "stack and `torch.median`, key by key": lambda: by_key(replies, lambda stacked: stacked.median(dim=0).values),
            "fedcast": lambda: median(rows),
        },
        "cosines": {
            "a pair at a time": lambda: pair_loop(replies),
            "one product `matrix @ matrix.T`": lambda: replies.matrix @ replies.matrix.T,
            "fedcast": lambda: pairwise_cosines(rows),
            "fedcast, by sketches": lambda: sketched(replies),
        },
    }


def race(contest: Contest, repeats: int) -> dict[str, float]:
    """Return median seconds of each contestant, all taken in turn, after one round that does not count when there are several."""
    seconds: dict[str, list[float]] = {name: [] for name in contest}
    for _ in range(repeats + (repeats > 1)):
        for name, run in contest.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[repeats > 1 :]) for name, taken in seconds.items()}


def peak_models(kind: str, count: int, size: int, folder: Path) -> float:
    """Return how far memory peaks above where it was, in float32 models, while a rule takes vectors that appear one at a time."""
    vector = torch.randn(size)  # the one buffer in which replies appear

    def mean() -> None:
        running = StreamingMean({"shared": size}, count)
        for _ in range(count):
            running.add({"shared": vector}, 1)
        running.means()

    def spooled() -> None:
        with Spool(folder, size) as spool:
            for index in range(count):
                spool.append(f"{index:06d}", vector)
            trimmed_mean(spool, SHARE)

    def kept() -> None:
        weighted_mean(Vectors([vector.clone() for _ in range(count)]), [1.0] * count)

    return peak_growth({"mean": mean, "trimmed mean, from disk": spooled}.get(kind, kept)) / (4 * size)


def _in_a_process(kind: str, count: int, size: int, folder: Path) -> dict[str, Any]:
    arguments = ["--memory-of", kind, "--count", str(count), "--length", str(size), "--folder", str(folder)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "benchmarks.aggregation", *arguments], check=True, capture_output=True, text=True)
    return {"rule": kind, "vectors": count, "models": float(done.stdout), "seconds": time.perf_counter() - start}


def mean_table(size: str, count: int, repeats: int) -> list[dict[str, Any]]:
    """Print and return the table of means."""
    replies = Replies(size, count)
    seconds = race(means(replies), repeats)
    floor_ = seconds["floor: read once"]
    bandwidth = 4 * replies.matrix.numel() / floor_
    print(f"\nMean of {count} x {replies.layout.size / 1e6:.2f} M; reading runs at {bandwidth / 1e9:.0f} GB/s.\n")
    best = seconds["fedcast, as vectors arrive (exact, float64)"]
    rows = [{"what": name, "seconds": taken, "bandwidth": floor_ / taken, "times_fedcast": taken / best} for name, taken in seconds.items()]
    columns = ["", "ms", "ms a vector", "share of the read bandwidth", "time / fedcast's as they arrive"]
    cells = [
        [name, f"{1e3 * taken:.1f}", f"{1e3 * taken / count:.2f}", f"{100 * floor_ / taken:.0f} %", f"{taken / best:.2f}"]
        for name, taken in seconds.items()
    ]
    print(markdown(columns, cells))
    return rows


def rule_table(size: str, counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Print and return the table of robust rules."""
    rows: list[dict[str, Any]] = []
    for count in counts:
        for rule, contest in rules(Replies(size, count)).items():
            seconds = race(contest, repeats)
            reference = next(iter(seconds.values()))
            rows += [{"rule": rule, "vectors": count, "what": name, "seconds": s, "speedup": reference / s} for name, s in seconds.items()]
    print(f"\nRobust rules on vectors of size {size}; trimmed at {SHARE:.0%} on each side.\n")
    cells = [[r["rule"], str(r["vectors"]), r["what"], f"{r['seconds']:.3f}", f"{r['speedup']:.1f}"] for r in rows]
    print(markdown(["rule", "vectors", "", "seconds", "times the first"], cells))
    return rows


def memory_table(folder: Path, size: int, streamed_count: int, spooled_count: int, kept_count: int) -> list[dict[str, Any]]:
    """Print and return the table of peak memory."""
    counts = {"mean": streamed_count, "trimmed mean, from disk": spooled_count, "for comparison: a mean that keeps all": kept_count}
    rows = [_in_a_process(kind, count, size, folder) for kind, count in counts.items()]
    print(f"\nPeak memory while vectors of {size / 1e6:.1f} M float32 appear one at a time, above what the process had with one of them.\n")
    cells = [[row["rule"], str(row["vectors"]), f"{row['models']:.2f}", f"{row['seconds']:.1f}"] for row in rows]
    print(markdown(["rule", "vectors", "peak, in models", "seconds, with the process's start"], cells))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=("means", "rules", "memory"), default=["means", "rules", "memory"])
    parser.add_argument("--size", default="mini", help="size of the model whose vectors are combined")
    parser.add_argument("--clients", type=int, default=20, help="vectors of the mean")
    parser.add_argument("--counts", type=int, nargs="+", default=[20, 64], help="vectors of the robust rules")
    parser.add_argument("--repeats", type=int, default=9, help="repeats of the means; robust rules take a third of them")
    parser.add_argument("--spooled", type=int, default=200, help="vectors written to disk; 1,000 would be 32 GB")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where those go (the system's temporary folder)")
    parser.add_argument("--quick", action="store_true", help="small vectors, few of them")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.memory_of:
        print(peak_models(given.memory_of, given.count, given.length, given.folder))
        return
    size = "nano" if given.quick else given.size
    repeats = 1 if given.quick else given.repeats
    tables: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "means": partial(mean_table, size, given.clients, repeats),
        "rules": partial(rule_table, size, [5] if given.quick else given.counts, max(1, repeats // 3)),
        "memory": partial(memory_table, given.folder, *((100_000, 20, 10, 10) if given.quick else (8_000_000, 1000, given.spooled, 50))),
    }
    machine = f"{processor_name()}, one thread of {cores()} cores, torch {torch.__version__}, numpy {np.__version__}"
    print(f"Machine: {machine}.")
    found = {part: tables[part]() for part in given.parts}
    write_json(given.output, {"machine": machine, **found})


if __name__ == "__main__":
    main()
