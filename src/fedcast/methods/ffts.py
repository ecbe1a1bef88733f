"""FFTS: federated foundation model with heterogeneous knowledge alignment (AAAI 2025, arXiv 2412.08906).

Found in the paper's released code (ffts.md B2 to B4): an encoder with an adaptive trend-awareness module (ATM), geometric masks, the
squared error at masked points, a pull of the ATM to the server's copy, and a moving average of the ATM at the server. Its defects are
not copied (B7): masked points enter the model masked, the gate picks among experts, lambda counts once. The server's copy of the ATM is
sent as part of the weights, not a second time beside them: it has overwritten their ATM.

Reconstructed: how the pretrained model forecasts. The horizon is one more masked stretch of the window
(:mod:`fedcast.models.architectures.trend`), and a step trains both: ``L = rho L_rec + phi L_task + lambda L_atm``. ``L_rec`` is the mean
of ``(xhat_t - x_t)^2`` over the masked points of context and target together, in standard deviations of the window's visible points, to
ten of which ``x_t`` is clamped (the released code standardises whole series beforehand, which bounds it there). ``L_task`` is the
forecasting loss that all methods have here, on the same windows with their target hidden. With ``phi = 0`` it is the released
pretraining alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.errors import SpecError
from fedcast.methods.base import Client, Method, Server, Update, hyper
from fedcast.models.architectures.trend import TrendTransformer
from fedcast.models.base import ModelConfig
from fedcast.spec import ModelSpec
from fedcast.tasks.forecast import ForecastTask
from fedcast.tasks.reconstruct import whole_windows
from fedcast.training.flat import Layout

_LIMIT = 10.0
_TASK = ForecastTask()


@dataclass(frozen=True)
class FFTS(Method):
    """Masked reconstruction at sites; the trend-awareness module is aligned at sites and averaged slowly at the server."""

    name: ClassVar[str] = "ffts"
    summary: ClassVar[str] = "masked reconstruction; a trend-awareness module is aligned at sites and averaged slowly at the server"
    architecture: ClassVar[str] = "trend"

    experts: Literal["linear", "mlp", "none"] = hyper("linear", "ATM's experts: one layer, two (mlp), or no ATM (ablation)")
    scales: Literal["auto", "on", "off"] = hyper("auto", "learnable scales of the experts; auto: with mlp, as released")
    top_k: Annotated[int, Field(ge=1, le=4)] = hyper(1, "experts a token uses")
    kernel: Annotated[int, Field(ge=1)] = hyper(25, "tokens in the gate's moving average; odd")
    head: Literal["window", "patch"] = hyper("window", "from all tokens to all points, as released, or from a token to its patch")
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = hyper(0.15, "share of a window that is masked; 0: no reconstruction")
    mask_run: Annotated[float, Field(gt=1)] = hyper(6.0, "mean length of a masked run, in steps")
    reconstruction: Annotated[float, Field(ge=0)] = hyper(1.0, "weight of the reconstruction (rho)")
    forecasting: Annotated[float, Field(ge=0)] = hyper(1.0, "weight of the forecast (phi); 0: the released pretraining alone")
    alignment: Annotated[float, Field(ge=0)] = hyper(0.01, "lambda; the released code multiplies it twice, so 0.0001; 0: no alignment")
    server_rate: Annotated[float, Field(gt=0, le=1)] = hyper(0.5, "step of the ATM's moving average (a); 1: FedAvg")

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise SpecError(f"method.kernel = {self.kernel} has no middle", hint="make it odd")
        if self.mask_run < 1 / (1 - self.mask_ratio):
            raise SpecError(
                f"runs of {self.mask_run:g} masked steps are too short for {self.mask_ratio:.0%} of them",
                hint=f"make mask_run at least {1 / (1 - self.mask_ratio):.3g}, the mean run of independent masks",
            )

    def model_config(self, model: ModelSpec) -> ModelConfig:
        """Add the method's settings of the model."""
        scaled = self.experts == "mlp" if self.scales == "auto" else self.scales == "on"
        settings: dict[str, int | float | str] = {
            "experts": self.experts,
            "scaled": int(scaled),
            "top_k": self.top_k,
            "kernel": self.kernel,
            "head": self.head,
        }
        return replace(super().model_config(model), settings=tuple(settings.items()))

    def local_loss(self, client: Client, batch: Batch) -> Tensor:
        """Return ``rho L_rec + phi L_task``: every window is reconstructed under a geometric mask, and its horizon is forecast."""
        model = cast(TrendTransformer, client.model)
        loss = torch.zeros((), device=batch.context.device)
        if self.forecasting > 0:
            forecast, _ = _TASK.step(model, batch, client.generator)
            client.record("task_loss", forecast)
            loss = loss + self.forecasting * forecast
        if self.reconstruction > 0 and self.mask_ratio > 0:
            values, mask = whole_windows(batch, model.config.patch)
            hidden = self._hide(mask, client.rng)
            encoded = model.represent(values, mask & ~hidden)
            truth = (values - encoded.tokens.loc) / encoded.tokens.scale
            error = masked_error(model.restore(encoded, values.shape[1]), truth, hidden)
            client.record("reconstruction", error)
            loss = loss + self.reconstruction * error
        return loss

    def _hide(self, mask: Tensor, rng: np.random.Generator) -> Tensor:
        """Return which observed points are hidden, bool [B, T]; a window of which nothing would be left keeps all of its points."""
        drawn = torch.from_numpy(geometric_mask(rng, mask.shape[0], mask.shape[1], self.mask_ratio, self.mask_run))
        hidden = drawn.to(mask.device) & mask
        return hidden & (mask & ~hidden).any(dim=1, keepdim=True)

    def correction(self, client: Client) -> Tensor | None:
        """Return the gradient of ``lambda sum_j MSE(phi_j, sg(phi_server_j))`` over the ATM's tensors j; 0 elsewhere."""
        places = list(trend_places(client.parameters.layout))
        if self.alignment == 0 or not places:
            return None
        vector, server = client.parameters.vector, client.received["shared"]
        pull: Tensor = client.scratch.setdefault("pull", torch.zeros_like(vector))
        distance = torch.zeros((), device=vector.device)
        for place in places:
            gap = vector[place] - server[place]
            distance = distance + gap.square().mean()
            pull[place] = (2 * self.alignment / gap.numel()) * gap
        client.record("alignment", distance)
        return pull

    def aggregate(self, server: Server, updates: Sequence[Update]) -> None:
        """Average; the ATM moves only the share ``a`` of the way: ``phi <- (1 - a) phi + a sum_k w_k phi_k``, ``w_k`` as in FedAvg."""
        before = server.shared
        self.combine(server, updates, [float(update.samples) for update in updates])
        for place in trend_places(server.layout):
            server.shared[place] = torch.lerp(before[place], server.shared[place], self.server_rate)


def trend_places(layout: Layout) -> Iterator[slice]:
    """Yield where each shared tensor of the ATM lies in the flat vector."""
    for number, name in enumerate(layout.names[: layout.shared]):
        if ".trend." in name:
            yield slice(layout.offsets[number], layout.offsets[number + 1])


def masked_error(filled: Tensor, truth: Tensor, hidden: Tensor) -> Tensor:
    """Return ``sum_{t in M} (xhat_t - x_t)^2 / |M|`` over the masked points of the batch; 0, with zero gradients, where there are none.

    Parameters
    ----------
    filled, truth
        Reconstruction and data in standard deviations of the window, [B, T]; the data are clamped to ten.
    hidden
        bool [B, T]: what was masked (M).
    """
    error = (filled - truth.clamp(-_LIMIT, _LIMIT)).square() * hidden
    return error.sum() / hidden.sum().clamp_min(1)


def geometric_mask(rng: np.random.Generator, rows: int, steps: int, ratio: float, run: float) -> NDArray[np.bool_]:
    """Return masks of a two-state Markov chain a row, bool [rows, steps], True where masked.

    A masked step is followed by a visible one with probability ``p = 1 / run``, a visible one by a masked one with
    ``q = p ratio / (1 - ratio)``; the first is masked with probability ``ratio``. So masked runs are geometric with mean ``run``, and
    the share of masked steps is ``ratio``.

    Drawn without a loop: with probability ``p + q`` a step is drawn anew, masked with probability ``ratio``, else it is as the one before.
    A masked step is then followed by a visible one with ``(p + q) (1 - ratio) = p``, a visible one by a masked one with
    ``(p + q) ratio = q``.

    Parameters
    ----------
    rng
        Source of randomness.
    rows, steps
        Shape.
    ratio
        Share of masked steps, from 0 to below 1.
    run
        Mean masked run, at least ``1 / (1 - ratio)``.
    """
    anew = rng.random((rows, steps), dtype=np.float32) < 1 / (run * (1 - ratio))
    anew[:, 0] = True
    masked = rng.random((rows, steps), dtype=np.float32) < ratio
    newest = np.maximum.accumulate(np.where(anew, np.arange(steps), 0), axis=1)
    return np.take_along_axis(masked, newest, axis=1)
