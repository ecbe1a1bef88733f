"""What every forecaster does: the native models and the published ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.models.base import Forecast


class Config(Protocol):
    """What every model's configuration says; :class:`~fedcast.models.base.ModelConfig` is that of the native ones."""

    @property
    def context(self) -> int:
        """Longest context that is read."""

    @property
    def horizon(self) -> int:
        """Steps forecast in one pass."""

    @property
    def patch(self) -> int:
        """Time steps a token stands for."""

    @property
    def d_model(self) -> int:
        """Width of the features."""

    @property
    def architecture(self) -> str:
        """Which class computes it."""

    @property
    def size(self) -> str:
        """What stands in result rows as the name of its size."""


@dataclass(frozen=True)
class ModelShape:
    """What a method may know of the model it trains.

    Attributes
    ----------
    context, horizon
        Longest context, and the steps forecast in one pass.
    patch
        Time steps a patch; 1 for models that read single steps.
    d_model
        Width of the features.
    shared_size
        How many weights travel: the length of ``"shared"``.
    """

    context: int
    horizon: int
    patch: int
    d_model: int
    shared_size: int = 0

    @property
    def context_patches(self) -> int:
        """Patches of the longest context."""
        return -(-self.context // self.patch)

    @property
    def horizon_patches(self) -> int:
        """Patches of the horizon forecast in one pass."""
        return -(-self.horizon // self.patch)


class Model(nn.Module, ABC):
    """A forecaster: windows in, points and quantiles out.

    Class attributes
    ----------------
    lora_targets
        Names of the linear maps that LoRA adapts where nothing else is asked for (as peft's ``target_modules``).

    Attributes
    ----------
    config
        The shape.
    """

    lora_targets: ClassVar[tuple[str, ...]] = ()
    config: Config

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    def shape(self, shared_size: int = 0) -> ModelShape:
        """Return what a method may know of the model."""
        config = self.config
        return ModelShape(config.context, config.horizon, config.patch, config.d_model, shared_size)

    def part(self, name: str) -> str:
        """Return a parameter's name with its part in front: ``encoder.``, ``decoder.`` or ``heads.``; methods choose by it what travels."""
        return name

    def head(self, name: str) -> bool:
        """Return whether a parameter belongs to the forecasting head."""
        return self.part(name).startswith("heads.")

    def use_native(self, on: bool) -> None:
        """Compute with the native kernels (:mod:`fedcast.kernels`) where the model has some, or stop doing so."""
        return

    @abstractmethod
    def fresh(self, seed: int) -> Self:
        """Return a model of the same shape with newly drawn weights, as its library draws them; on the CPU."""

    @abstractmethod
    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return the encoder's features [B, N, d], float32; ``context`` and ``mask`` are [B, L]."""

    @abstractmethod
    def forward(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast in data units, for any horizon.

        Parameters
        ----------
        context
            Values [B, L], any L; what is not finite counts as missing.
        mask
            [B, L], True where observed.
        horizon
            Steps H, at least 1.
        """

    def __call__(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """See :meth:`forward`."""
        return cast(Forecast, super().__call__(context, mask, horizon))

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model to a folder that :func:`fedcast.models.checkpoints.load_checkpoint` reads."""


class Encoding(NamedTuple):
    """What a training step gives beside its loss.

    Attributes
    ----------
    features
        [B, N, d], float32.
    feature_mask
        [B, N], False where a token has no data.
    """

    features: Tensor
    feature_mask: Tensor


class OwnLossModel(Model):
    """A model that is trained with the loss of its authors, in place of the task's.

    Class attributes
    ----------------
    splits
        Whether the loss is a mean over the observed targets of a batch and nothing is drawn: several ranks can then share a batch.
    """

    splits: ClassVar[bool] = False

    @abstractmethod
    def step(self, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Encoding]:
        """Return the loss over observed targets, and the features of that pass.

        Parameters
        ----------
        batch
            ``context``, ``mask`` [B, L] and ``target``, ``target_mask`` [B, H] in data units, missing values 0 and False.
        generator
            Gives the generator of whatever is drawn.

        Raises
        ------
        ModelError
            When H is more than one pass gives.
        """
