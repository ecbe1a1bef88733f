"""What this machine can do at most, measured: matrix products in float32 and bfloat16, and memory bandwidth, on one core and on two.

Two cores are tried both ways that a program can use them: two Python threads with a product each, and one product split by torch.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

from benchmarks.tables import markdown, write_json

# Rows are the tokens of a batch of 64 windows; the rest are the products of the models "tiny", "mini" and "base".
SHAPES = ((2048, 256, 1024), (2048, 384, 1536), (2048, 1536, 384), (2048, 768, 3072))
MEGABYTES = 256  # several times the largest cache
_SCALING = 1.6  # below it, two threads did not have a core each
BACK_ENDS = {"float32": ("float32", "highest"), "float32, oneDNN": ("float32", "medium"), "bfloat16": ("bfloat16", "highest")}


@dataclass(frozen=True)
class Ceilings:
    """The machine and its ceilings.

    Attributes
    ----------
    processor, cores, torch, load
        Name, cores at hand, version of torch, load average over one minute before the measurement.
    flops
        Operations a second by (``"float32"``: torch's default, ``"float32, oneDNN"``, ``"bfloat16"``) and by (``"1"``, ``"2 threads"``,
        ``"2 intra-op"``).
    bandwidth
        Bytes a second by (``"copy"``: read plus written, ``"read"``) and by the same.
    """

    processor: str
    cores: int
    torch: str
    load: float
    flops: dict[str, dict[str, float]] = field(default_factory=dict)
    bandwidth: dict[str, dict[str, float]] = field(default_factory=dict)

    def products(self, number_format: str) -> float:
        """Return the most operations a second in ``"float32"`` (whichever back end is faster) or ``"bfloat16"``, on all cores tried."""
        return max(rate for name, rates in self.flops.items() if name.startswith(number_format) for rate in rates.values())

    @property
    def copy(self) -> float:
        """Return the most bytes a second that a copy reads and writes."""
        return max(self.bandwidth["copy"].values())

    def sentence(self) -> str:
        """Return the machine in words."""
        peaks = ", ".join(f"{self.products(name) / 1e9:.0f} GFLOP/s {name}" for name in ("float32", "bfloat16"))
        return (
            f"Machine: {self.processor}, {self.cores} cores, torch {self.torch}, load average before the run {self.load:.2f}. "
            f"Its ceilings in the same run: {peaks}, {self.copy / 1e9:.0f} GB/s copied.{self._doubt()}"
        )

    def _doubt(self) -> str:
        rates = self.flops["bfloat16"]
        scaling = max(rates.values()) / rates["1"]
        if len(rates) == 1 or scaling > _SCALING:
            return ""
        return f" **Two threads reached only {scaling:.1f} times one: another program was running, or the two cores are one. Do not use.**"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)

    def best(self, other: Ceilings) -> Ceilings:
        """Return the higher of two measurements, rate by rate: a ceiling is the most that was ever seen."""

        def higher(mine: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
            return {name: {way: max(rate, theirs[name][way]) for way, rate in rates.items()} for name, rates in mine.items()}

        flops, bandwidth = higher(self.flops, other.flops), higher(self.bandwidth, other.bandwidth)
        return Ceilings(self.processor, self.cores, self.torch, self.load, flops, bandwidth)


def processor_name() -> str:
    """Return the processor's name, from torch or else from Linux."""
    name = torch.cpu.get_capabilities().get("cpu_name")
    if not name and (info := Path("/proc/cpuinfo")).is_file():
        lines = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else None
    return str(name or platform.processor() or platform.machine())


def cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def settings(threads: int, precision: str) -> Iterator[None]:
    """Set torch's threads and float32 back end for a while."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def _rate(make: Callable[[], tuple[Callable[[], object], float]], way: str, seconds: float) -> float:
    """Return units a second of the work that ``make`` prepares (what to do, units of it), done in one of the three ways."""
    workers = 2 if way == "2 threads" else 1
    ready = Barrier(workers)

    def work() -> tuple[int, float, float, float]:
        torch.set_num_threads(2 if way == "2 intra-op" else 1)  # of this thread
        do, units = make()
        do()
        ready.wait()
        start, count = time.perf_counter(), 0
        while (now := time.perf_counter()) - start < seconds or count < 3:
            do()
            count += 1
        return count, units, start, now

    with ThreadPoolExecutor(workers) as pool:
        done = [future.result() for future in [pool.submit(work) for _ in range(workers)]]
    # Each thread at its own rate: whoever ends first does not count the other's last turn as idle time.
    return sum(count * units / (end - start) for count, units, start, end in done)


def _product(shape: tuple[int, int, int], number_format: str) -> tuple[Callable[[], object], float]:
    rows, inner, columns = shape
    dtype = torch.bfloat16 if number_format == "bfloat16" else torch.float32
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    return lambda: torch.mm(a, b, out=out), 2.0 * rows * inner * columns


def _copy(megabytes: int) -> tuple[Callable[[], object], float]:
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.nbytes


def _read(megabytes: int) -> tuple[Callable[[], object], float]:
    source = torch.ones(megabytes * 2**18)
    return source.sum, float(source.nbytes)


def measure(*, quick: bool = False) -> Ceilings:
    """Measure the ceilings: about ten seconds, or one with ``quick``."""
    load = os.getloadavg()[0]
    seconds, megabytes = (0.01, 8) if quick else (0.15, MEGABYTES)
    ways = ["1", "2 threads", "2 intra-op"] if cores() > 1 else ["1"]
    shapes = SHAPES[:1] if quick else SHAPES
    flops: dict[str, dict[str, float]] = {}
    for name, (number_format, precision) in BACK_ENDS.items():
        with settings(1, precision):
            flops[name] = {way: max(_rate(partial(_product, shape, number_format), way, seconds) for shape in shapes) for way in ways}
    with settings(1, "highest"):
        makers = {"copy": _copy, "read": _read}
        bandwidth = {name: {way: _rate(partial(make, megabytes), way, 4 * seconds) for way in ways} for name, make in makers.items()}
    return Ceilings(processor_name(), cores(), torch.__version__, load, flops, bandwidth)


def main() -> None:
    """Print the ceilings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="measure for a moment only")
    parser.add_argument("--output", type=Path, help="write the ceilings as JSON")
    arguments = parser.parse_args()
    found = measure(quick=arguments.quick)
    ways = list(found.flops["float32"])
    rows = [[f"matrix product, {name}, GFLOP/s", *(f"{rates[way] / 1e9:.0f}" for way in ways)] for name, rates in found.flops.items()]
    rows += [[f"{name}, GB/s", *(f"{rates[way] / 1e9:.0f}" for way in ways)] for name, rates in found.bandwidth.items()]
    print(markdown(["", *({"1": "1 thread"}.get(way, way) for way in ways)], rows))
    print(f"\n{found.sentence()}")
    write_json(arguments.output, {"machine": found.to_dict()})


if __name__ == "__main__":
    main()
