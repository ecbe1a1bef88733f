"""A federation of three real domains and a held-out one, small enough to train in a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fedcast.federated.messages import Task
from fedcast.federated.plan import Plan
from fedcast.methods.base import Method, build_method
from fedcast.models.architectures import build_model
from fedcast.models.base import ModelConfig
from fedcast.run.folder import RunFolder
from fedcast.run.prepare import prepare, start_fleet
from fedcast.run.pretrain import Run, pretrain
from fedcast.spec import RunSpec, parse_spec
from fedcast.training.flat import Layout

DOMAINS = ("energy", "health", "medical")
HELD_OUT = ("transport",)


def small_spec(
    method: str = "fedtrl", *, workers: int = 2, fleet: str = "threads", rounds: int = 3, local_steps: int = 4, **options: Any
) -> RunSpec:
    """Return the spec of a small federation over bundled data."""
    return parse_spec(
        {
            "name": method,
            "seed": 1,
            "data": {"source": "bundled", "domains": list(DOMAINS), "held_out": list(HELD_OUT)},
            "model": {"size": "nano", "context": 64, "horizon": 16},
            "method": {"name": method, **options},
            "training": {"batch_size": 8, "learning_rate": 2e-3, "precision": "float32", "products": "default"},
            "federation": {"rounds": rounds, "local_steps": local_steps, "workers": workers, "fleet": fleet},
            "evaluation": {"windows": 8, "validation_windows": 8, "every": 2, "samples": 1},
        }
    )


def train_small(spec: RunSpec, folder: Path) -> Run:
    """Train a spec into a folder of its own."""
    return pretrain(spec, output=folder / "run")


def untrained_loss(spec: RunSpec, folder: Path) -> float:
    """Return the mean validation loss of the spec's model before any training."""
    method = build_method(spec.method)
    prepared = prepare(spec, method)
    layout, initial = model_layout(spec, method)
    fleet = start_fleet(Plan(spec, method), prepared, RunFolder(folder))
    task = Task("evaluate", 0, {"shared": initial[: layout.shared_size]}, {"part": "validation"})
    replies = dict(fleet.run(dict.fromkeys(DOMAINS, task), None))
    fleet.close()
    return sum(float(reply.meta["loss"]) for reply in replies.values()) / len(DOMAINS)


def shared_size(method: Method, config: ModelConfig) -> int:
    """Return how many of a model's weights travel."""
    return sum(parameter.numel() for name, parameter in build_model(config).named_parameters() if method.shares(name))


def model_layout(spec: RunSpec, method: Method) -> tuple[Layout, Tensor]:
    """Return the layout of the trained parameters and their initial values ``[size]``."""
    plan = Plan(spec, method)
    return plan.layout, plan.initial
