"""Whether settings of glibc's allocator speed up a training step.

torch allocates and frees every activation; glibc hands large ones, and the free end of its heap, back to the kernel, which then has to
clear the pages again. Compared are the defaults, ``keep`` (M_MMAP_THRESHOLD at its maximum of 32 MiB, nothing trimmed) and ``never``
(M_MMAP_MAX 0, nothing trimmed). Each setting is a process of its own, which sleeps while the others take a block of steps in turn; ratios
are medians over blocks. With two threads, each trains a model of its own, as two clients side by side do.

Measured on an AMD EPYC at the sizes micro and mini: 0.96 to 1.05 times as fast with two threads, the default, and 1.05 with one thread at
micro, batch 64, bfloat16. fedcast therefore leaves the allocator of a process alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import processor_name
from benchmarks.tables import markdown, write_json
from benchmarks.workbench import Workbench
from fedcast.training.backend import Backend, probe

# From malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
SETTINGS: dict[str, dict[int, int]] = {
    "default": {},
    "keep": {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**31 - 1},
    "never": {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1},
}


def serve(setting: str, size: str, batch: int, precision: str, threads: int, context: int) -> None:
    """Take blocks of steps: each line of standard input says how many; answer with seconds and page faults a step."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    for name, value in SETTINGS[setting].items():
        if libc.mallopt(name, value) != 1:
            raise OSError(f"mallopt({name}, {value}) failed")
    backend = Backend("bfloat16" if precision == "bfloat16" else "float32", "onednn" if precision.endswith("oneDNN") else "default")
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool, backend.in_use():
        # Built in the threads: glibc gives each an arena of its own.
        benches = list(pool.map(lambda _: Workbench(size, batch, backend, context=context), range(threads)))
        for line in sys.stdin:
            count = int(line)
            faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            list(pool.map(lambda bench, n=count: bench.steps(n), benches))  # type: ignore[misc]
            seconds = (time.perf_counter() - start) / count
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            print(json.dumps({"seconds": seconds, "faults": faults / count / threads}), flush=True)


class Child:
    """A process that takes steps under one setting."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.allocator", "--serve", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def steps(self, count: int) -> dict[str, float]:
        """Take a block of steps."""
        pipes = self._process
        if pipes.stdin is None or pipes.stdout is None:
            raise OSError("the process has no pipes")
        pipes.stdin.write(f"{count}\n")
        pipes.stdin.flush()
        answer: dict[str, float] = json.loads(pipes.stdout.readline())
        return answer

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()


def compare(size: str, batch: int, precision: str, threads: int, context: int, repeats: int, seconds: float) -> dict[str, Any]:
    """Measure one case under every setting."""
    children = {name: Child(name, size, str(batch), precision, str(threads), str(context)) for name in SETTINGS}
    for child in children.values():
        child.steps(3)
    steps = max(2, round(seconds / children["default"].steps(3)["seconds"]))
    blocks = [{name: child.steps(steps) for name, child in children.items()} for _ in range(repeats)]
    for child in children.values():
        child.close()
    row: dict[str, Any] = {"size": size, "batch": batch, "precision": precision, "threads": threads}
    for name in SETTINGS:
        row[name] = {
            "seconds": statistics.median(block[name]["seconds"] for block in blocks),
            "faults": statistics.median(block[name]["faults"] for block in blocks),
            "speedup": statistics.median(block["default"]["seconds"] / block[name]["seconds"] for block in blocks),
        }
    return row


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["micro", "mini"])
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--precisions", nargs="+", help="default: bfloat16, and the faster float32")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a block")
    parser.add_argument("--quick", action="store_true", help="one case with the smallest model, a moment each")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    parser.add_argument("--serve", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.serve:
        setting, size, batch, precision, threads, context = arguments.serve
        serve(setting, size, int(batch), precision, int(threads), int(context))
        return
    if arguments.quick:
        arguments.sizes, arguments.batches, arguments.precisions, arguments.threads = ["nano"], [2], ["float32"], [1]
        arguments.context, arguments.repeats, arguments.seconds = 64, 2, 0.01
    precisions = arguments.precisions or ["bfloat16", "float32, oneDNN" if probe().products == "onednn" else "float32"]
    cases = product(arguments.sizes, arguments.batches, precisions, arguments.threads)
    rows = [compare(*case, arguments.context, arguments.repeats, arguments.seconds) for case in cases]
    lines = []
    for row in rows:
        line = [row["size"], str(row["batch"]), row["precision"], str(row["threads"]), f"{1e3 * row['default']['seconds']:.1f}"]
        line += [f"{row[name]['speedup']:.3f}" for name in SETTINGS if name != "default"]
        lines.append(line + [f"{row[name]['faults']:.0f}" for name in SETTINGS])
    print(f"{processor_name()}, torch {torch.__version__}, context {arguments.context}\n")
    columns = ["size", "batch", "precision", "threads", "ms a step", *(f"times faster, {name}" for name in SETTINGS if name != "default")]
    print(markdown([*columns, *(f"page faults a step, {name}" for name in SETTINGS)], lines))
    write_json(arguments.output, {"processor": processor_name(), "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
