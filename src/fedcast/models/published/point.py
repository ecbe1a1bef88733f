"""What the adapters of point models with a fixed context share: standardised windows, a masked loss, rolled passes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.models.base import QUANTILES, Forecast, Output
from fedcast.models.contract import Encoding
from fedcast.models.files import WEIGHTS, check_tensors, read_weights
from fedcast.models.layers import InstanceNorm
from fedcast.models.patch import roll
from fedcast.models.published.base import Published

_LIMIT = 50.0


class PointModel(Published):
    """A published model that maps a context of fixed length to a point forecast of fixed length.

    Contexts that are shorter are padded at their start, where the model is told that nothing was observed. Longer horizons are
    rolled: the point forecast is read as if it had been observed.

    Notes
    -----
    The authors standardise each dataset before anything else, and train on the squared error in these units. Here every window is
    standardised by its observed context (:class:`~fedcast.models.layers.InstanceNorm`): a federation has no common scale, and
    single precision no room for raw data. The loss is in these units, with targets clamped to 50 standard deviations of the
    context, as in :class:`~fedcast.tasks.forecast.ForecastTask`.
    """

    quantiles: ClassVar[str] = "none"

    @abstractmethod
    def one_pass(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return points [B, horizon] and features [B, N, d], one for each of the last N patches.

        Parameters
        ----------
        values
            [B, context], standardised, 0 where missing, in the parameters' type.
        mask
            [B, context], True where observed.
        """

    def error(self, point: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each step, of the arguments' shape; the squared error unless the model's authors chose another."""
        return F.mse_loss(point, target, reduction="none")

    def normalised(self, context: Tensor, mask: Tensor, horizon: int) -> Output:
        """Forecast ``horizon`` steps, at most one pass, in standardised units; ``context`` and ``mask`` are [B, L]."""
        length = self.config.context
        short = max(0, length - context.shape[1])
        values, mask = (F.pad(part[:, -length:], (short, 0)) for part in (context, mask.bool()))
        normal, loc, scale = InstanceNorm.forward(torch.where(mask, values, 0.0).float(), mask)
        point, features = self.one_pass(normal.to(self.dtype), mask)
        point = point[:, :horizon].float()
        seen = mask[:, -features.shape[1] * self.config.patch :].reshape(len(mask), -1, self.config.patch).any(dim=-1)
        return Output(point, point.unsqueeze(-1).expand(-1, -1, len(QUANTILES)), features.float(), seen, loc, scale)

    def step(self, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Encoding]:
        """Return the mean loss over observed targets, in standardised units; see the class. Nothing is drawn."""
        self.check_target(batch)
        output = self.normalised(batch.context, batch.mask, batch.target.shape[1])
        observed = batch.target_mask.float()
        target = torch.where(batch.target_mask, (batch.target - output.loc) / output.scale, 0.0).clamp(-_LIMIT, _LIMIT)
        loss = (self.error(output.point, target) * observed).sum() / observed.sum().clamp_min(1.0)
        return loss, Encoding(output.features, output.feature_mask)

    def forecast(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast in data units; every quantile is the point."""
        return roll(self.normalised, self.config, context, mask, horizon)

    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return the encoder's features [B, N, d], float32."""
        return self.normalised(context, mask & context.isfinite(), 1).features


def fill_gaps(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolate missing values linearly, and hold the last one to the end.

    Parameters
    ----------
    values
        [B, L], 0 where missing.
    mask
        [B, L], True where observed.

    Returns
    -------
    filled
        [B, L]; 0 before the first observed value, and throughout where there is none.
    known
        [B, L], False only there.
    """
    length = values.shape[1]
    steps = torch.arange(length, device=values.device).expand_as(values)
    before = torch.where(mask, steps, -1).cummax(dim=1).values
    after = torch.where(mask, steps, length).flip(1).cummin(dim=1).values.flip(1)
    known = before >= 0
    before = before.clamp_min(0)
    after = torch.where(after < length, after, before)
    first, second = values.gather(1, before), values.gather(1, after)
    share = (steps - before) / (after - before).clamp_min(1)
    return torch.where(known, torch.lerp(first, second, share.to(values.dtype)), 0.0), known


def load_weights(network: nn.Module, folder: Path, own: tuple[str, ...] = (), unused: tuple[str, ...] = ()) -> None:
    """Fill a module with the weights of a checkpoint's folder.

    Parameters
    ----------
    network
        The module.
    folder
        Holds ``model.safetensors``.
    own
        Prefixes of tensors that the module keeps as it built them, whatever the file holds.
    unused
        Prefixes of tensors that the file may hold and the module does not have.

    Raises
    ------
    CheckpointError
        When the file is missing or damaged, or a tensor is missing, surplus, of another shape or not finite.
    """
    state = {name: tensor for name, tensor in read_weights(folder / WEIGHTS).items() if not name.startswith((*own, *unused))}
    built = network.state_dict()
    state |= {name: tensor for name, tensor in built.items() if name.startswith(own)}
    check_tensors(folder, built, state)
    network.load_state_dict(state)


def save_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors to the ``model.safetensors`` of a folder that exists."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
