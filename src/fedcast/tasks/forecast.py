"""Forecasting as a training task: a point and nine quantiles a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcast.models.base import QUANTILES, Output
from fedcast.models.contract import Encoding, Model, OwnLossModel
from fedcast.models.layers import TARGET_LIMIT, observed_mean, scaled_target

if TYPE_CHECKING:
    from fedcast.data.windows import Batch
    from fedcast.models.patch import PatchTransformer


@dataclass(frozen=True)
class ForecastTask:
    """Huber loss of the point plus pinball loss of the quantiles, in normalised units, over observed targets.

    Per observed target, with u the error: ``Huber_delta(u) + eta * 2 / |Q| * sum_q max(q u_q, (q - 1) u_q)``; the mean over all
    observed targets of the batch. Pinball as in GIFT-Eval's weighted quantile loss, Huber as in Time-MoE (arXiv 2409.16040).

    Attributes
    ----------
    eta
        Weight of the quantile part.
    delta
        Where the Huber loss turns from quadratic to linear, in standard deviations of the context.
    limit
        Targets are clamped to this many standard deviations of the context. Both losses are linear that far out, so gradients stay
        the same, while a series that leaves a near-constant context cannot drown the others in the reported loss.
    """

    eta: float = 1.0
    delta: float = 1.0
    limit: float = TARGET_LIMIT

    def step(self, model: Model, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Output | Encoding]:
        """Return the loss of a training batch and the model's output; a model with a loss of its own is trained with that."""
        if isinstance(model, OwnLossModel):
            return model.step(batch, generator)
        output = cast("PatchTransformer", model).normalised(batch.context, batch.mask, batch.target.shape[1])
        return self.loss(output, batch), output

    def validate(self, model: Model, batch: Batch, since: Tensor) -> float:
        """Return the loss of validation windows; their targets lie in the validation part as a whole, so ``since`` has no effect."""
        with torch.inference_mode():
            return self.step(model, batch, torch.Generator)[0].item()

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return the scalar loss.

        Parameters
        ----------
        output
            A model's normalised output for ``batch.context``, horizon H.
        batch
            ``target`` [B, H] in data units (0 where missing) and ``target_mask`` [B, H]. Without any observed target the loss is 0,
            with zero gradients.
        """
        target = scaled_target(batch.target, output.loc, output.scale, self.limit)
        point = F.huber_loss(output.point, target, reduction="none", delta=self.delta)
        per_step = point + (self.eta / len(QUANTILES)) * pinball(target, output.quantiles)  # [B, H]
        return observed_mean(per_step, batch.target_mask)


def pinball(target: Tensor, quantiles: Tensor) -> Tensor:
    """Return twice the pinball loss of quantiles [..., 9], added up over the levels, [...], for a target [...]."""
    error = target.unsqueeze(-1) - quantiles  # [..., 9]
    # 2 * max(q u, (q - 1) u) = |u| + (2 q - 1) u
    return error.abs().sum(dim=-1) + error @ _slopes(error.device)


@lru_cache(maxsize=8)
def _slopes(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([2 * level - 1 for level in QUANTILES], dtype=torch.float32, device=device)
