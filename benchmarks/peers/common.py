"""What all contestants share: the model, the loss, the windows; and the gate through which rounds are let in one by one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedcast.models.base import ModelConfig, Output
from fedcast.models.patch import PatchTransformer
from fedcast.spec import ModelSpec
from fedcast.tasks.forecast import ForecastTask

PARTS = ("train", "test")


@dataclass(frozen=True)
class Setting:
    """One row of the comparison.

    Attributes
    ----------
    folder
        Where the series and the windows lie, see :func:`write_data`.
    size
        Name of the model's size.
    batch, steps, clients, context, horizon
        Windows a step, local steps a client and round, clients, context and horizon in time steps.
    rounds
        Rounds that will be asked for at most, the warm-up among them.
    rate
        Learning rate of AdamW.
    patch
        Time steps a patch.
    """

    folder: str
    size: str
    batch: int
    steps: int
    clients: int
    context: int
    horizon: int
    rounds: int
    rate: float = 1e-3
    patch: int = 16

    @property
    def series(self) -> Path:
        """Folder of the series, one file a client: a domain each."""
        return Path(self.folder) / "series"

    def windows(self, client: int, part: str) -> Path:
        """File of a client's windows of a part, contexts and targets."""
        return Path(self.folder) / f"{part}-{client:03d}.npz"

    def config(self) -> ModelConfig:
        """Return the model's configuration."""
        return ModelConfig.of(ModelSpec(size=self.size, context=self.context, horizon=self.horizon, patch=self.patch))

    def to_json(self) -> str:
        """Return the setting as JSON."""
        return json.dumps(asdict(self))


class Targets(NamedTuple):
    """The part of a batch that the loss reads."""

    target: Tensor
    target_mask: Tensor


class Network(nn.Module):
    """The model as any PyTorch program would use it: contexts [B, L] in (NaN where missing), output out.

    ``loss`` and ``metrics`` are what pfl-research asks of a module.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.model = PatchTransformer(setting.config(), seed=0)
        self.horizon = setting.horizon

    def forward(self, contexts: Tensor) -> Output:
        """Forecast in normalised units."""
        return self.model.normalised(contexts, contexts.isfinite(), self.horizon)

    def loss(self, contexts: Tensor, targets: Tensor) -> Tensor:
        """Return the training loss of a batch."""
        return forecast_loss(self(contexts), targets)

    def metrics(self, contexts: Tensor, targets: Tensor) -> dict[str, float]:
        """Return the training loss as a number."""
        return {"loss": self.loss(contexts, targets).item()}


def forecast_loss(output: Output, targets: Tensor) -> Tensor:
    """Return fedcast's own training loss; targets [B, H] in data units."""
    return ForecastTask().loss(output, Targets(targets, targets.isfinite()))


def load_windows(setting: Setting, client: int, part: str = "train") -> tuple[Tensor, Tensor]:
    """Return a client's contexts [W, L] and targets [W, H] of a part."""
    with np.load(setting.windows(client, part)) as arrays:
        return torch.from_numpy(arrays["contexts"]), torch.from_numpy(arrays["targets"])


def heldout_loss(model: PatchTransformer, setting: Setting) -> float:
    """Return a model's mean loss over all clients' test windows, computed in float32: do all contestants learn alike?"""
    model = model.float().eval()
    losses = []
    with torch.no_grad():
        for client in range(setting.clients):
            contexts, targets = (windows[:32] for windows in load_windows(setting, client, "test"))
            output = model.normalised(contexts, contexts.isfinite(), setting.horizon)
            losses.append(forecast_loss(output, targets).item())
    return sum(losses) / len(losses)


class Gate:
    """A contestant's end of two pipes: it waits for the word to run a round, and says how long the round took."""

    def __init__(self, reading: int, writing: int) -> None:
        for descriptor in (reading, writing):
            os.set_inheritable(descriptor, False)
        self._in, self._out = os.fdopen(reading, "r"), os.fdopen(writing, "w")
        self._start: float | None = None

    def lap(self, **about: Any) -> bool:
        """Report the round that just ended (or, at first, that all is ready), and wait; False when no further round is wanted."""
        end = time.perf_counter()
        self.send({"seconds": end - self._start, **about} if self._start is not None else {"ready": True})
        go = self._in.readline().strip() == "round"
        self._start = time.perf_counter()
        return go

    def send(self, document: dict[str, Any]) -> None:
        """Send a JSON document."""
        self._out.write(json.dumps(document) + "\n")
        self._out.flush()

    def close(self) -> None:
        """Close both ends."""
        self._in.close()
        self._out.close()


def run_rounds(gate: Gate, one_round: Callable[[], None]) -> None:
    """Run rounds for as long as they are asked for."""
    while gate.lap():
        one_round()
