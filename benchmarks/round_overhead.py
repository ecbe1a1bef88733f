"""How much of a round is not forward, backward or optimiser.

The floor of a round is the busiest worker's time inside those three (with the method's terms, such as FedTRL's labels); everything else
(choosing sites, drawing windows, copying weights, writing state and checkpoints, screening, averaging, waiting for the last worker) is
overhead. Goal: at most 3 % of a round. Validation is timed apart: it is forward passes too, and how often it runs is the user's choice.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from fedcast.run.pretrain import pretrain
from fedcast.spec import parse_spec

DOMAINS = ["activity", "cloud", "economics", "energy", "medical", "nature", "traffic", "wind"]


def measure(method: str, workers: int, rounds: int, steps: int, size: str) -> dict[str, float]:
    """Run rounds over bundled domains; return medians over all but the first two rounds."""
    spec = parse_spec(
        {
            "name": "overhead",
            "data": {"domains": DOMAINS},
            "model": {"size": size},
            "method": {"name": method},
            "federation": {"rounds": rounds, "local_steps": steps, "workers": workers},
            "evaluation": {"every": rounds, "windows": 1, "samples": 0},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = pretrain(spec, output=Path(folder) / "run").rows("round")[2:]
    seconds = [row["seconds"] + row["checkpoint_seconds"] for row in rows]
    overhead = [row["overhead_seconds"] + row["checkpoint_seconds"] for row in rows]
    return {
        "round": statistics.median(seconds),
        "overhead": statistics.median(overhead),
        "share": statistics.median(o / s for o, s in zip(overhead, seconds, strict=True)),
        "checkpoint": statistics.median(row["checkpoint_seconds"] for row in rows),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", default="nano")
    arguments = parser.parse_args()
    print(
        f"{len(DOMAINS)} sites, {arguments.steps} steps of batch 32, size {arguments.size}, {torch.cpu.get_capabilities().get('cpu_name')}"
    )
    print("| method | workers | seconds a round | overhead, seconds | overhead, share | of it the checkpoint, seconds |")
    print("|---|---|---|---|---|---|")
    for method in ("fedavg", "fedtrl"):
        for workers in (1, 2):
            m = measure(method, workers, arguments.rounds, arguments.steps, arguments.size)
            print(f"| {method} | {workers} | {m['round']:.2f} | {m['overhead']:.3f} | {100 * m['share']:.1f} % | {m['checkpoint']:.3f} |")


if __name__ == "__main__":
    main()
