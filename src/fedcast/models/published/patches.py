"""What the adapters of models that read standardised windows in patches share: padding, loss, rolled passes, gaps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.errors import CheckpointError
from fedcast.models.base import QUANTILES, Forecast, Output
from fedcast.models.contract import Encoding
from fedcast.models.layers import InstanceNorm, observed_mean, scaled_target
from fedcast.models.patch import roll
from fedcast.models.published.base import Published

MEDIAN = QUANTILES.index(0.5)


class PatchModel(Published):
    """A published model that maps a standardised context in patches to a forecast of fixed length.

    Contexts are padded at their start, where the model is told that nothing was observed. Longer horizons are rolled: the point
    forecast is read as if it had been observed.

    Class attributes
    ----------------
    fixed
        Whether every context is padded to the longest one, else to whole patches.

    Notes
    -----
    Every window is standardised by its observed context (:class:`~fedcast.models.layers.InstanceNorm`) before the model, which may
    have a normalisation of its own, sees it: a federation has no common scale, and single precision no room for raw data. The loss is
    in these units, with targets clamped to 50 standard deviations of the context, as in
    :class:`~fedcast.tasks.forecast.ForecastTask`; it is that of the forecast of the target, not of the patches within the context,
    which decoders forecast too.
    """

    fixed: ClassVar[bool] = False
    splits: ClassVar[bool] = True

    @abstractmethod
    def one_pass(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the forecast, [B, horizon] or [B, horizon, 9], and features [B, N, d], one for each of the last N patches.

        Parameters
        ----------
        values
            [B, L], standardised, 0 where missing, in the parameters' type; L is the context where it is fixed, else whole patches.
        mask
            [B, L], True where observed.
        """

    @abstractmethod
    def levels(self, forecast: Tensor) -> tuple[Tensor, Tensor]:
        """Return points [B, H] and quantiles [B, H, 9], in any order, from what :meth:`one_pass` gives of H steps."""

    @abstractmethod
    def error(self, output: Output, target: Tensor) -> Tensor:
        """Return the loss of each step [B, H], for a standardised target [B, H]."""

    def patched(self, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a padded and standardised context [B, L], its mask, and loc and scale [B, 1]; what is not finite is missing."""
        context, mask = context[:, -self.config.context :].float(), mask[:, -self.config.context :].bool()
        mask = mask & context.isfinite()
        steps, patch = context.shape[1], self.config.patch
        length = self.config.context if self.fixed else max(-(-steps // patch), 1) * patch
        context, mask = (F.pad(part, (length - steps, 0)) for part in (context, mask))
        normal, loc, scale = InstanceNorm.forward(torch.where(mask, context, 0.0), mask)
        return normal.to(self.dtype), mask, loc, scale

    def observed(self, mask: Tensor) -> Tensor:
        """Return [B, N], which patches of a mask [B, N * patch] have an observed step."""
        return in_patches(mask, self.config.patch).any(dim=2)

    def normalised(self, context: Tensor, mask: Tensor, horizon: int) -> Output:
        """Forecast ``horizon`` steps, at most one pass, in standardised units; ``context`` and ``mask`` are [B, L]."""
        values, mask, loc, scale = self.patched(context, mask)
        forecast, features = self.one_pass(values, mask)
        read = mask[:, -features.shape[1] * self.config.patch :]
        return Output(*self.levels(forecast[:, :horizon].float()), features.float(), self.observed(read), loc, scale)

    def step(self, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Encoding]:
        """Return the mean loss over observed targets, in standardised units; nothing is drawn."""
        self.check_target(batch)
        output = self.normalised(batch.context, batch.mask, batch.target.shape[1])
        loss = observed_mean(self.error(output, scaled_target(batch.target, output.loc, output.scale)), batch.target_mask)
        return loss, Encoding(output.features, output.feature_mask)

    def forecast(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast in data units; the point is the median, where there are quantiles."""
        return roll(self.normalised, self.config, context, mask, horizon)

    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return one feature a patch [B, N, d], float32."""
        return self.normalised(context, mask, 1).features


class QuantileModel(PatchModel):
    """A patch model that gives fedcast's nine quantiles; :meth:`one_pass` returns them, [B, horizon, 9]."""

    def levels(self, forecast: Tensor) -> tuple[Tensor, Tensor]:
        """Return the median and the quantiles."""
        return forecast.sort(dim=-1).values[..., MEDIAN], forecast

    def error(self, output: Output, target: Tensor) -> Tensor:
        """Return the mean pinball loss of each step, unless the model's authors chose another."""
        return pinball(output.quantiles, target, QUANTILES)


class PointModel(PatchModel):
    """A patch model that gives points, [B, horizon], which are repeated at every level."""

    quantiles: ClassVar[str] = "none"

    def levels(self, forecast: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points, and the points at every level."""
        return forecast, forecast.unsqueeze(-1).expand(-1, -1, len(QUANTILES))

    def error(self, output: Output, target: Tensor) -> Tensor:
        """Return the squared error of each step, unless the model's authors chose another."""
        return F.mse_loss(output.point, target, reduction="none")


def in_patches(values: Tensor, patch: int) -> Tensor:
    """Return values [B, N * patch] as [B, N, patch]."""
    return values.reshape(len(values), values.shape[1] // patch, patch)


def pinball(quantiles: Tensor, target: Tensor, levels: Sequence[float]) -> Tensor:
    """Return the pinball loss of quantiles [B, H, Q] at ``levels`` for a target [B, H], as the mean over levels: [B, H]."""
    level = quantiles.new_tensor(levels)
    error = target[..., None] - quantiles
    return torch.maximum(level * error, (level - 1) * error).mean(dim=-1)


def check_nine(levels: Sequence[float]) -> None:
    """Refuse a checkpoint that learnt other quantiles than fedcast's nine, by :class:`CheckpointError`."""
    if [round(level, 6) for level in levels] != list(QUANTILES):
        raise CheckpointError(
            f"the checkpoint learnt the quantiles {', '.join(f'{level:g}' for level in levels)}",
            hint="use one that learnt 0.1, 0.2, ... 0.9",
        )


def interpolated(values: Tensor, mask: Tensor) -> Tensor:
    """Fill gaps linearly, for models that read complete series; see below for the ends.

    Before the first and after the last observed value that value stands; a row without any is 0.

    Parameters
    ----------
    values, mask
        [B, L]; ``mask`` is True where observed.
    """
    length = values.shape[1]
    steps = torch.arange(length, device=values.device).expand_as(mask)
    before = torch.where(mask, steps, -1).cummax(dim=1).values
    after = torch.where(mask, steps, length).flip(1).cummin(dim=1).values.flip(1)
    start = torch.where(before < 0, after, before).clamp(max=length - 1)
    stop = torch.where(after == length, before, after).clamp(min=0)
    low, high = values.gather(1, start), values.gather(1, stop)
    share = ((steps - start) / (stop - start).clamp(min=1)).to(values.dtype)
    filled = torch.where(mask, values, low + (high - low) * share)
    return torch.where(mask.any(dim=1, keepdim=True), filled, 0.0)
