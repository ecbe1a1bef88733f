"""What the adapters of patch decoders share: standardised windows in whole patches, a masked loss, rolled passes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.errors import CheckpointError
from fedcast.models.base import QUANTILES, Forecast, Output
from fedcast.models.contract import Encoding
from fedcast.models.layers import InstanceNorm
from fedcast.models.patch import roll
from fedcast.models.published.base import Published

MEDIAN = QUANTILES.index(0.5)
_LIMIT = 50.0


class PatchDecoder(Published):
    """A published model that reads a context of any length in patches, and gives nine quantiles of a horizon of fixed length.

    Contexts are padded at their start to whole patches. A longer horizon is rolled: the median is read as if it had been observed.

    Notes
    -----
    Every window is standardised by its observed context (:class:`~fedcast.models.layers.InstanceNorm`) before the model, which has a
    normalisation of its own, sees it: single precision has no room for raw data. The loss is in these units, with targets clamped to
    50 standard deviations of the context, as in :class:`~fedcast.tasks.forecast.ForecastTask`; it is that of the forecast of the
    target, not of the patches within the context, which decoders forecast too.
    """

    @abstractmethod
    def one_pass(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantiles [B, horizon, 9], in any order, and features [B, N, d], one for each patch.

        Parameters
        ----------
        values
            [B, N * patch], standardised, 0 where missing, in the parameters' type.
        mask
            [B, N * patch], True where observed.
        """

    def error(self, quantiles: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each step [B, H], from standardised quantiles [B, H, 9] and targets: the mean pinball loss."""
        return pinball(quantiles, target, QUANTILES)

    def patched(self, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a context [B, L] standardised in whole patches, at least one, its mask, and loc and scale [B, 1]."""
        context, mask = context[:, -self.config.context :].float(), mask[:, -self.config.context :].bool()
        short = max(-(-context.shape[1] // self.config.patch), 1) * self.config.patch - context.shape[1]
        context, mask = F.pad(context, (short, 0)), F.pad(mask, (short, 0))
        normal, loc, scale = InstanceNorm.forward(torch.where(mask, context, 0.0), mask)
        return normal.to(self.dtype), mask, loc, scale

    def normalised(self, context: Tensor, mask: Tensor, horizon: int) -> Output:
        """Forecast ``horizon`` steps, at most one pass, in standardised units; ``context`` and ``mask`` are [B, L]."""
        values, mask, loc, scale = self.patched(context, mask)
        quantiles, features = self.one_pass(values, mask)
        quantiles = quantiles[:, :horizon].float()
        point = quantiles.sort(dim=-1).values[..., MEDIAN]
        return Output(point, quantiles, features.float(), self.observed(mask), loc, scale)

    def observed(self, mask: Tensor) -> Tensor:
        """Return [B, N], which patches of a mask [B, N * patch] have an observed step."""
        return in_patches(mask, self.config.patch).any(dim=2)

    def step(self, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Encoding]:
        """Return the mean loss over observed targets, in standardised units; nothing is drawn."""
        self.check_target(batch)
        output = self.normalised(batch.context, batch.mask, batch.target.shape[1])
        loss = observed_mean(self.error(output.quantiles, scaled_target(batch, output.loc, output.scale)), batch.target_mask)
        return loss, Encoding(output.features, output.feature_mask)

    def forecast(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast in data units; the point is the median."""
        return roll(self.normalised, self.config, context, mask, horizon)

    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return one feature a patch [B, N, d], float32."""
        return self.normalised(torch.where(context.isfinite(), context, 0.0), mask & context.isfinite(), 1).features


def in_patches(values: Tensor, patch: int) -> Tensor:
    """Return values [B, N * patch] as [B, N, patch]."""
    return values.reshape(len(values), values.shape[1] // patch, patch)


def scaled_target(batch: Batch, loc: Tensor, scale: Tensor) -> Tensor:
    """Return targets [B, H] in standardised units, 0 where missing."""
    return torch.where(batch.target_mask, (batch.target - loc) / scale, 0.0).clamp(-_LIMIT, _LIMIT)


def observed_mean(losses: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of losses [B, H] over observed steps; 0 where there is none."""
    observed = mask.float()
    return (losses * observed).sum() / observed.sum().clamp_min(1.0)


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
