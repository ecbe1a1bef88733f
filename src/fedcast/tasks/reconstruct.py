"""Masked reconstruction as a training task, and as a score: the error over five mask ratios (FeDaL's table 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcast.errors import ModelError
from fedcast.models.architectures.causal import CausalTransformer
from fedcast.models.base import QUANTILES, ModelConfig, Output
from fedcast.models.contract import Model
from fedcast.models.layers import InstanceNorm
from fedcast.models.masking import observed_patches, patch_mask, spread
from fedcast.tasks.forecast import pinball

if TYPE_CHECKING:
    from fedcast.data.windows import Batch

RATIOS: tuple[float, ...] = (0.15, 0.30, 0.45, 0.60, 0.75)
"""Mask ratios of the score; that there are five is found, which ones is reconstructed (fedal.md A.6)."""


@runtime_checkable
class Reconstructor(Protocol):
    """A model that reconstructs hidden patches."""

    config: ModelConfig

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        ...

    def fill(self, values: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        """Reconstruct windows [B, T] (bool [B, T]: observed) of whole patches from those not hidden (bool [B, N]), in their own unit."""
        ...


@dataclass(frozen=True)
class ReconstructTask:
    """Mean squared error of hidden points, plus the pinball loss of their quantiles.

    The squared error is the paper's, over hidden patches only (reconstructed: the convention of masked autoencoders), in units of
    the standard deviation of the whole window, or of its visible points where that is larger: a few visible patches may be nearly constant,
    and in their own unit such windows would drown all others in a squared error. The pinball loss trains the quantile head
    and nothing else.

    Attributes
    ----------
    eta
        Weight of the pinball loss.
    limit
        Truth is clamped to this many standard deviations of the visible points, so that nothing overflows.
    ratio
        Share of a window's patches that a training step hides; 75 % in FeDaL (fedal.md A.2).
    """

    eta: float = 1.0
    limit: float = 50.0
    ratio: float = 0.75

    def step(self, model: Model, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Output]:
        """Hide patches of a batch; return the loss of their reconstruction and the model's output.

        Raises
        ------
        ModelError
            When the model is none that reconstructs hidden patches as a task of its own.
        """
        if not isinstance(model, CausalTransformer):
            raise ModelError(
                f"the architecture {model.config.architecture!r} does not train masked reconstruction as a task",
                hint="set model.objective = 'forecast', or choose another method",
            )
        values, mask = whole_windows(batch, model.config.patch)
        hidden = patch_mask(observed_patches(mask, model.config.patch), self.ratio, generator())
        output = model.output(model.represent(values, mask, hidden))
        error, quantile = self.loss(output, values, mask, hidden)
        return error + quantile, output

    def validate(self, model: Model, batch: Batch, since: Tensor) -> float:
        """Return the mean squared error over five mask ratios, in standard deviations of each window; see :func:`reconstruction_mse`."""
        if not isinstance(model, Reconstructor):
            name = model.config.architecture
            raise ModelError(f"the architecture {name!r} reconstructs nothing", hint="set model.objective = 'forecast'")
        return reconstruction_mse(model, batch, window_deviation(batch), since)["mse"]

    def loss(self, output: Output, values: Tensor, mask: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return squared error and weighted pinball loss, a scalar each; 0 where no observed point is hidden.

        Parameters
        ----------
        output
            The model's, for all T points of the windows.
        values
            Truth [B, T] in the unit of the data.
        mask
            bool [B, T], True where observed.
        hidden
            bool [B, N], True where a patch was hidden.
        """
        counted = (mask & spread(hidden, mask.shape[1] // hidden.shape[1])).float()
        _, _, whole = InstanceNorm.forward(torch.where(mask, values, 0.0), mask)
        weight = counted * (output.scale / whole).clamp(max=1.0)  # from the unit of the output to that of the loss
        truth = ((values - output.loc) / output.scale).clamp(-self.limit, self.limit)
        points = counted.sum().clamp_min(1.0)
        error = ((truth - output.point) * weight).square().sum() / points
        return error, self.eta / len(QUANTILES) * (pinball(truth, output.quantiles) * weight).sum() / points


def whole_windows(batch: Batch, patch: int) -> tuple[Tensor, Tensor]:
    """Return context and target as one window [B, T] of whole patches, and where it is observed, bool [B, T].

    What the patches have too much is missing: at the start of the context, and at the end of the target.
    """
    before, after = -batch.context.shape[1] % patch, -batch.target.shape[1] % patch
    values = F.pad(torch.cat((batch.context, batch.target), dim=1), (before, after))
    return values, F.pad(torch.cat((batch.mask, batch.target_mask), dim=1), (before, after))


def window_deviation(batch: Batch) -> Tensor:
    """Return the standard deviation of each window's observed points, context and target together, [B]."""
    values, mask = whole_windows(batch, 1)
    _, _, scale = InstanceNorm.forward(torch.where(mask, values, 0.0), mask)
    return scale.squeeze(1)


def reconstruction_mse(
    model: Reconstructor,
    batch: Batch,
    scale: Tensor,
    since: Tensor | None = None,
    *,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
) -> dict[str, float]:
    """Return the mean squared error of hidden observed points at each mask ratio, and its mean over the ratios.

    The same seed hides the same patches, whatever the model.

    Parameters
    ----------
    model
        The model.
    batch
        Windows; context and target are reconstructed as one.
    scale
        [B]: what the windows' series are standardised by; errors are in this unit.
    since
        int64 [B]: the first step whose error counts, from the first target step on; negative: in the context. What lies before it the
        model may have been trained to reconstruct. All steps where absent.
    ratios
        Mask ratios.
    seed
        Seed of the masks.

    Returns
    -------
    dict
        ``"mse_15"`` for a ratio of 0.15, and so on, and ``"mse"``, the mean of those that exist; NaN where no hidden point counts.
    """
    patch = model.config.patch
    values, mask = whole_windows(batch, patch)
    usable = observed_patches(mask, patch)
    context = batch.context.shape[1]
    steps = torch.arange(values.shape[1], device=mask.device) - (context + -context % patch)  # 0: the first target
    judged = mask if since is None else mask & (steps >= since.to(mask.device).unsqueeze(1))
    scores: dict[str, float] = {}
    with torch.inference_mode():
        for number, ratio in enumerate(ratios):
            hidden = patch_mask(usable, ratio, torch.Generator().manual_seed(1000 * seed + number))
            counted = judged & spread(hidden, patch)
            error = (model.fill(values, mask, hidden).double() - values) / scale.unsqueeze(1)
            scores[f"mse_{round(100 * ratio)}"] = float(error[counted].square().mean())
    found = [value for value in scores.values() if isfinite(value)]
    scores["mse"] = sum(found) / len(found) if found else float("nan")
    return scores
