"""Linear probing with a new head: MOMENT's recipe, and TRACE's smaller head alone (arXiv 2503.16991)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedcast.models.contract import Model
from fedcast.models.reheaded import Reheaded
from fedcast.registry import hyper
from fedcast.tuning.base import Tuning


@dataclass(frozen=True)
class NewHead(Tuning):
    """A new forecasting head trains on the features of a fixed context; the model under it is frozen."""

    name: ClassVar[str] = "new_head"
    summary: ClassVar[str] = "a newly drawn forecasting head trains on the frozen model's features (linear probing with a new head)"
    rewires: ClassVar[bool] = True

    kind: Literal["flatten", "depthwise"] = hyper("flatten", "one linear map of all features (MOMENT), or TRACE's of a tenth of the size")
    width: Annotated[int, Field(ge=1)] = hyper(64, "width to which the head 'depthwise' narrows the features (d')")
    context: Annotated[int, Field(ge=0)] = hyper(0, "steps of the fixed context that the head reads; 0: the longest of the model")
    horizon: Annotated[int, Field(ge=0)] = hyper(0, "steps that the head forecasts in one pass; 0: as many as the model")

    def prepare(self, model: Model, seed: int) -> Model:
        """Freeze the model and put the head on it."""
        model.requires_grad_(False)
        return Reheaded.on(model, self.kind, width=self.width, context=self.context, horizon=self.horizon, seed=seed)
