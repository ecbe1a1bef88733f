"""fedcast itself: ``pretrain`` as a user calls it, FedAvg over one domain a client, let through its rounds by an observer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.common import Gate, Setting
from fedcast.federated.rounds import Silent
from fedcast.models.patch import PatchTransformer
from fedcast.run.pretrain import pretrain
from fedcast.spec import RunSpec, parse_spec

WORKERS = 2


def spec_of(setting: Setting, overrides: Sequence[str] = ()) -> RunSpec:
    """Return the spec whose rounds are those of the setting: AdamW as peers have it, fresh moments each round, no validation."""
    document = {
        "name": "round-time",
        "data": {"source": str(setting.series)},
        "model": {"size": setting.size, "context": setting.context, "horizon": setting.horizon, "patch": setting.patch},
        "method": {"name": "fedavg"},
        # The gradient's norm is computed and compared as always, only never found too large: peers do not clip.
        "training": {
            "batch_size": setting.batch,
            "learning_rate": setting.rate,
            "beta2": 0.999,
            "warmup": 0.0,
            "schedule": "constant",
            "moments": "reset",
            "clip_norm": 1e6,
        },
        "federation": {"rounds": setting.rounds, "local_steps": setting.steps, "workers": WORKERS},
        "evaluation": {"every": setting.rounds, "windows": 1, "validation_windows": 1, "baselines": []},
    }
    return parse_spec(document, overrides)


class Laps(Silent):
    """An observer that stops before the first round and after every round."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def start(self, rounds: int, sites: Sequence[str]) -> None:
        """Wait for the word to begin."""
        self._gate.lap()

    def row(self, row: dict[str, Any]) -> None:
        """Report a round with fedcast's own account of it: ``seconds`` without validation and checkpoint."""
        if row["kind"] == "round":
            about = {name: row[name] for name in ("overhead_seconds", "checkpoint_seconds", "bytes_up", "bytes_down")}
            self._gate.lap(own_seconds=row["seconds"], **about)


def run(setting: Setting, gate: Gate, *, overrides: Sequence[str] = ()) -> PatchTransformer:
    """Run all rounds; return the global model."""
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        finished = pretrain(spec_of(setting, overrides), output=Path(folder) / "run", observer=Laps(gate))
        return PatchTransformer.from_pretrained(finished.final)
