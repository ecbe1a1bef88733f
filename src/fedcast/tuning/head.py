"""Linear probing: the forecasting head trains, everything before it stays as it was pre-trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedcast.errors import ModelError
from fedcast.models.contract import Model
from fedcast.registry import hyper
from fedcast.tuning.base import Tuning


@dataclass(frozen=True)
class Head(Tuning):
    """Only the forecasting head trains, from its pre-trained weights or from newly drawn ones."""

    name: ClassVar[str] = "head"
    summary: ClassVar[str] = "only the forecasting head trains (linear probing)"

    fresh: bool = hyper(False, "draw the head's weights anew, as SFF's linear probing does, instead of starting from the pre-trained ones")

    def prepare(self, model: Model, seed: int) -> Model:
        """Freeze all but the head.

        Raises
        ------
        ModelError
            When none of the model's parameters belongs to a head.
        """
        head = {name: parameter for name, parameter in model.named_parameters() if model.head(name)}
        if not head:
            raise ModelError(f"{type(model).__name__} has no forecasting head of its own", hint="choose another tuning, such as full")
        model.requires_grad_(False)
        drawn = dict(model.fresh(seed).named_parameters()) if self.fresh else {}
        for name, parameter in head.items():
            parameter.requires_grad_(True)
            if self.fresh:
                with torch.no_grad():
                    parameter.copy_(drawn[name])
        return model
