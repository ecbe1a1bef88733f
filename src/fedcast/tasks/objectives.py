"""What a model is trained for: ``model.objective`` in a spec."""

from __future__ import annotations

from typing import Literal

from fedcast.tasks.forecast import ForecastTask
from fedcast.tasks.reconstruct import ReconstructTask

Objective = ForecastTask | ReconstructTask


def build_task(objective: Literal["forecast", "reconstruct"]) -> Objective:
    """Return the task of an objective."""
    return ForecastTask() if objective == "forecast" else ReconstructTask()
