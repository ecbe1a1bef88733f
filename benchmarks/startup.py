"""Start-up: wall time of whole ``fedcast`` processes, from the shell's point of view.

The floor beside them is a process that imports what the verb cannot do without: nothing for ``--help``, torch for a forecast. The
forecast is that of five series by a model of half a million parameters: what a person waits for the first result.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import machine
from benchmarks.forecast_throughput import CONTEXT, fedcast_model
from benchmarks.tables import markdown, write_json


def commands(folder: Path) -> dict[str, tuple[list[str], float | None]]:
    """Return each command line and its goal in seconds; writes the model and the data it needs."""
    fedcast_model("nano").save_pretrained(folder / "model")
    stamps = pd.date_range("2024-01-01", periods=CONTEXT, freq="h")
    parts = [pd.DataFrame({"unique_id": f"s{i}", "ds": stamps, "y": np.sin(np.arange(CONTEXT) / 4 + i)}) for i in range(5)]
    pd.concat(parts).to_csv(folder / "data.csv", index=False)
    fedcast = [sys.executable, "-m", "fedcast"]
    words = ["--model", str(folder / "model"), "--data", str(folder / "data.csv"), "--horizon", "24"]
    return {
        "python -c pass": ([sys.executable, "-c", "pass"], None),
        "fedcast --help": ([*fedcast, "--help"], 0.3),
        "fedcast methods": ([*fedcast, "methods"], None),
        "python -c 'import torch'": ([sys.executable, "-c", "import torch"], None),
        "python -c 'import torch, pandas, pyarrow.parquet'": ([sys.executable, "-c", "import torch, pandas, pyarrow.parquet"], None),
        "fedcast forecast": ([*fedcast, "forecast", *words], 3.0),
    }


def measure(repeats: int) -> list[dict[str, Any]]:
    """Run all commands in turns, and return the median of each."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lines = commands(Path(folder))
        for repeat in range(repeats + 1):
            for name, (line, _) in lines.items():
                start = time.perf_counter()
                subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
                if repeat:  # the first one fills the file cache
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
    return [{"command": name, "seconds": statistics.median(seconds[name]), "goal": goal} for name, (_, goal) in lines.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="once each")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    rows = measure(1 if options.quick else options.repeats)
    print(f"{machine.processor_name()}, {machine.cores()} cores, load average before the run {load:.2f}.\n")
    cells = [[f"`{row['command']}`", f"{row['seconds']:.2f}", f"under {row['goal']}" if row["goal"] else ""] for row in rows]
    print(markdown(["command", "seconds", "goal"], cells))
    write_json(options.output, {"processor": machine.processor_name(), "load": load, "rows": rows})


if __name__ == "__main__":
    main()
