"""A federation of three real domains and a held-out one, small enough to train in a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedcast.run.pretrain import Run, pretrain
from fedcast.spec import RunSpec, parse_spec

DOMAINS = ("energy", "health", "medical")
HELD_OUT = ("transport",)


def small_spec(method: str = "fedtrl", *, workers: int = 2, fleet: str = "threads", rounds: int = 3, **options: Any) -> RunSpec:
    """Return the spec of a small federation over bundled data."""
    return parse_spec(
        {
            "name": method,
            "seed": 1,
            "data": {"source": "bundled", "domains": list(DOMAINS), "held_out": list(HELD_OUT)},
            "model": {"size": "nano", "context": 64, "horizon": 16},
            "method": {"name": method, **options},
            "training": {"batch_size": 8, "learning_rate": 2e-3, "precision": "float32"},
            "federation": {"rounds": rounds, "local_steps": 4, "workers": workers, "fleet": fleet},
            "evaluation": {"windows": 8, "validation_windows": 8, "every": 2, "samples": 1},
        }
    )


def train_small(spec: RunSpec, folder: Path) -> Run:
    """Train a spec into a folder of its own."""
    return pretrain(spec, output=folder / "run")
