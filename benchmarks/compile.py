"""Whether ``training.compile`` pays: seconds a step without and with it, seconds of compiling, and the steps until they are won back.

Blocks of steps of both are taken in turn, in one process, on one thread; the ratio is the median over pairs of blocks. The compiler's
cache is empty at the start, as in a first run. Measured on an AMD EPYC: 2 to 4 % in bfloat16, nothing in float32, so that it takes some
25,000 steps to win the compiling back; ``training.compile`` is therefore off unless asked for.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import processor_name
from benchmarks.tables import markdown, write_json
from benchmarks.workbench import Workbench
from fedcast.training.backend import Backend, Precision, probe

PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")


def compare(size: str, batch: int, context: int, backend: Backend, repeats: int, steps: int) -> dict[str, Any]:
    """Measure one setting."""
    torch.compiler.reset()
    with backend.in_use(), tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        eager, compiled = (Workbench(size, batch, backend, context=context) for _ in range(2))
        seconds = compiled.compile()
        for bench in (eager, compiled):
            bench.steps(2)
        pairs = [(eager.steps(steps), compiled.steps(steps)) for _ in range(repeats)]
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "size": size,
        "batch": batch,
        "precision": backend.precision,
        "products": backend.products,
        "eager_seconds": before,
        "compiled_seconds": after,
        "speedup": statistics.median(a / b for a, b in pairs),
        "compile_seconds": seconds,
        "steps_to_pay": seconds / (before - after) if after < before else None,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["micro", "mini"])
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=10, help="steps a block")
    parser.add_argument("--quick", action="store_true", help="the smallest model and a short context, two pairs of two steps")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.sizes, arguments.precisions, arguments.batch, arguments.context = ["nano"], ["float32"], 2, 64
        arguments.repeats, arguments.steps = 2, 2
    torch.set_num_threads(1)
    rows = [
        compare(size, arguments.batch, arguments.context, Backend(precision, probe().products), arguments.repeats, arguments.steps)
        for size in arguments.sizes
        for precision in arguments.precisions
    ]
    lines = []
    for row in rows:
        name = row["precision"] + (", oneDNN" if row["precision"] == "float32" and row["products"] == "onednn" else "")
        pays = "never" if row["steps_to_pay"] is None else f"{row['steps_to_pay']:.0f}"
        line = [row["size"], name, f"{1e3 * row['eager_seconds']:.1f}", f"{1e3 * row['compiled_seconds']:.1f}", f"{row['speedup']:.2f}"]
        lines.append([*line, f"{row['compile_seconds']:.0f}", pays])
    print(f"{processor_name()}, torch {torch.__version__}, one thread, batch {arguments.batch}, context {arguments.context}\n")
    columns = ["size", "precision", "ms a step", "compiled", "times faster", "seconds of compiling", "steps until it pays"]
    print(markdown(columns, lines))
    write_json(arguments.output, {"processor": processor_name(), "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
