"""What drawing and gathering a batch of windows costs beside a training step, and beside torch's DataLoader.

Everything is taken in turn on one thread: eight batches drawn as a site draws them, eight steps, and eight batches of a DataLoader over
the same series (a map-style dataset of every window, shuffled, in the same process). Making the DataLoader's iterator, which a client
does once a round, is shown apart. Goal: at most 1 % of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import processor_name
from benchmarks.tables import markdown, write_json
from benchmarks.workbench import AHEAD, Workbench
from fedcast.data.windows import WindowSampler
from fedcast.training.backend import Backend, probe


class EveryWindow(Dataset[tuple[Tensor, Tensor]]):
    """All windows of equally long series without gaps, as a plain PyTorch program serves them."""

    def __init__(self, sampler: WindowSampler) -> None:
        self._width = sampler.context + sampler.horizon
        self._context = sampler.context
        self._series = [torch.from_numpy(np.array(sampler.store.series(i))) for i in range(len(sampler.store.ids))]
        self._each = len(self._series[0]) - self._width + 1

    def __len__(self) -> int:
        """Return the number of windows."""
        return self._each * len(self._series)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return context and target of a window."""
        series, start = divmod(index, self._each)
        window = self._series[series][start : start + self._width]
        return window[: self._context], window[self._context :]


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(size: str, batch: int, context: int, repeats: int) -> dict[str, float]:
    """Return median seconds a batch, or a step."""
    products = probe().products
    times: dict[str, list[float]] = {"draw": [], "step": [], "loader": [], "iterator": []}
    backend = Backend(probe().precision(products), products)
    with backend.in_use():
        bench = Workbench(size, batch, backend, context=context)
        loader = DataLoader(EveryWindow(bench.sampler), batch, shuffle=True, drop_last=True)
        bench.steps(2)
        for _ in range(repeats):
            times["draw"].append(seconds(lambda: list(bench.draw())) / AHEAD)
            times["step"].append(bench.steps(AHEAD))
            batches = iter(loader)
            times["iterator"].append(seconds(lambda b=batches: next(b)))  # type: ignore[misc]
            times["loader"].append(seconds(lambda b=batches: [next(b) for _ in range(AHEAD)]) / AHEAD)  # type: ignore[misc]
    return {name: statistics.median(values) for name, values in times.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["nano", "micro", "mini"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="the smallest model and a short context, two repeats")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.sizes, arguments.batch, arguments.context, arguments.repeats = ["nano"], 4, 64, 2
    torch.set_num_threads(1)
    rows = [{"size": s, **measure(s, arguments.batch, arguments.context, arguments.repeats)} for s in arguments.sizes]
    lines = []
    for row in rows:
        shares = [[f"{1e6 * row[name]:.0f}", f"{100 * row[name] / row['step']:.2f} %"] for name in ("draw", "loader")]
        lines.append([row["size"], f"{1e3 * row['step']:.2f}", *shares[0], *shares[1], f"{1e3 * row['iterator']:.1f}"])
    print(f"{processor_name()}, torch {torch.__version__}, one thread, batch {arguments.batch}, context {arguments.context}\n")
    columns = ["size", "ms a step", "us a batch, fedcast", "of a step", "us a batch, DataLoader", "of a step", "ms to its first batch"]
    print(markdown(columns, lines))
    write_json(arguments.output, {"processor": processor_name(), "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
