"""Any model's encoder under a new forecasting head: MOMENT's linear one, or TRACE's smaller one (arXiv 2503.16991).

The head reads the features of a fixed context, N tokens of width d, and gives the H steps in units of that context, whose mean and
deviation are then put back (RevIN without weights of its own). Found of TRACE's head (trace.md B2.1): depth-wise separable
convolutions, and more than 90 % fewer parameters. Reconstructed: its layers. Left out: dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.errors import CheckpointError, ModelError
from fedcast.models.base import QUANTILES, Forecast, Output
from fedcast.models.contract import Encoding, Model, OwnLossModel
from fedcast.models.files import Document, check_tensors, read_model, write_model
from fedcast.models.layers import InstanceNorm, observed_mean, scaled_target
from fedcast.models.patch import roll
from fedcast.models.seeding import seeded

FORMAT = "fedcast.reheaded"
BASE = "base"
"""Folder, within a saved model's, of the model under the head."""

HeadKind = Literal["flatten", "depthwise"]

_KERNEL = 3
_Count = Annotated[int, Field(ge=1, le=2**20)]


class _Head(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    kind: HeadKind
    width: _Count
    context: _Count
    horizon: _Count
    patch: _Count
    d_model: _Count
    tokens: _Count


class _Document(Document):
    format: Literal["fedcast.reheaded"]
    head: _Head


@dataclass(frozen=True)
class ReheadedConfig:
    """Shape of a model under a new head.

    Attributes
    ----------
    kind, width
        Which head, and the width d' to which ``"depthwise"`` narrows the features.
    context, horizon
        The fixed context, and the steps forecast in one pass.
    patch
        Time steps a patch of the model under the head.
    d_model, tokens
        Width d and number N of the features.
    """

    kind: HeadKind
    width: int
    context: int
    horizon: int
    patch: int
    d_model: int
    tokens: int

    @property
    def architecture(self) -> str:
        """What :class:`~fedcast.models.base.ModelConfig` calls its architecture."""
        return "reheaded"

    @property
    def size(self) -> str:
        """What stands in result rows where a native model has the name of its size."""
        return "reheaded"


class FlattenHead(nn.Module):
    """All features of a window to all steps at once, ``Linear(N d -> H)``: MOMENT's long-horizon head."""

    def __init__(self, config: ReheadedConfig) -> None:
        super().__init__()
        self.out = nn.Linear(config.tokens * config.d_model, config.horizon)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, N, d] to [B, H]."""
        return cast(Tensor, self.out(features.flatten(1)))


class DepthwiseHead(nn.Module):
    """A filter of 3 tokens a feature, a map d -> d' a token, and ``Linear(N d' -> H)``: TRACE's head, reconstructed."""

    def __init__(self, config: ReheadedConfig) -> None:
        super().__init__()
        width = config.d_model
        self.tokens = nn.Conv1d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.narrow = nn.Linear(width, config.width)
        self.out = nn.Linear(config.tokens * config.width, config.horizon)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, N, d] to [B, H]."""
        mixed = self.tokens(features.transpose(1, 2)).transpose(1, 2)
        return cast(Tensor, self.out(self.narrow(mixed).flatten(1)))


_HEADS: dict[str, type[FlattenHead | DepthwiseHead]] = {"flatten": FlattenHead, "depthwise": DepthwiseHead}


def build_head(config: ReheadedConfig) -> nn.Module:
    """Return a head, drawn as torch draws its layers: from the global random stream."""
    return _HEADS[config.kind](config)


class Reheaded(OwnLossModel):
    """A model's encoder under a new forecasting head, which gives points alone and repeats them at every quantile level.

    Attributes
    ----------
    base
        The model under the head; its own head, and a decoder, are not used.
    network
        The new head.
    """

    quantiles: ClassVar[str] = "none"
    splits: ClassVar[bool] = True
    config: ReheadedConfig

    def __init__(self, base: Model, config: ReheadedConfig, network: nn.Module) -> None:
        super().__init__()
        self.base, self.config, self.network = base, config, network

    @classmethod
    def on(cls, base: Model, kind: HeadKind, *, width: int = 64, context: int = 0, horizon: int = 0, seed: int = 0) -> Self:
        """Put a newly drawn head on a model.

        Parameters
        ----------
        base
            Any model; of one that has a new head already, the model under that.
        kind, width
            As in :class:`ReheadedConfig`.
        context, horizon
            The fixed context and the steps a pass; 0: those of the model.
        seed
            Seed of the head's weights.
        """
        base = base.base if isinstance(base, Reheaded) else base
        context, horizon = context or base.config.context, horizon or base.config.horizon
        if context > base.config.context:
            raise ModelError(
                f"a context of {context} steps is more than the {base.config.context} that the model reads", hint="give a shorter context"
            )
        with torch.no_grad():
            values = torch.zeros(1, context, device=base.device)
            _, tokens, width_of_features = base.embed(values, torch.ones_like(values, dtype=torch.bool)).shape
        config = ReheadedConfig(kind, width, context, horizon, base.config.patch, width_of_features, tokens)
        with seeded(seed):
            network = build_head(config)
        return cls(base, config, network.to(base.device, base.dtype))

    @property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the model under the head."""
        return self.base.lora_targets

    def part(self, name: str) -> str:
        """Return the name with ``heads.`` in front where it is the new head's; the old one's, unused, count as a decoder's."""
        if name.startswith("network."):
            return f"heads.{name.removeprefix('network.')}"
        part = self.base.part(name.removeprefix("base."))
        return f"decoder.{part}" if part.startswith("heads.") else part

    def use_native(self, on: bool) -> None:
        """Compute the model under the head with the native kernels where it has some, or stop doing so."""
        self.base.use_native(on)

    def fresh(self, seed: int) -> Self:
        """Return a model of the same shape with newly drawn weights, on the CPU."""
        with seeded(seed):
            return type(self)(self.base.fresh(seed), self.config, build_head(self.config))

    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return the features [B, N, d] of the fixed context, float32; see :class:`~fedcast.models.contract.Model`."""
        return self._features(*self._window(context, mask))

    def step(self, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Encoding]:
        """Return the mean squared error in units of the context, over observed targets, and the features.

        Errors of targets further than 50 deviations from the context's mean are measured to that distance. The features' mask is
        that of the patches, where there is one token a patch; else all tokens count as observed.

        Raises
        ------
        ModelError
            When the targets are longer than one pass.
        """
        steps = batch.target.shape[1]
        if steps > self.config.horizon:
            raise ModelError(
                f"the new head forecasts {self.config.horizon} steps a pass and cannot be trained on {steps}",
                hint="set tuning.horizon to at least as many, or model.horizon to at most those",
            )
        output = self._one_pass(batch.context, batch.mask, steps)
        error = F.mse_loss(output.point, scaled_target(batch.target, output.loc, output.scale), reduction="none")
        return observed_mean(error, batch.target_mask), Encoding(output.features, output.feature_mask)

    def forward(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast in data units, for any horizon; longer ones are rolled. See :class:`~fedcast.models.contract.Model`."""
        return roll(self._one_pass, self.config, context, mask, horizon)

    def _one_pass(self, context: Tensor, mask: Tensor, horizon: int) -> Output:
        """Forecast in normalised units; ``horizon`` is at most the head's."""
        values, seen = self._window(context, mask)
        _, loc, scale = InstanceNorm.forward(values, seen)
        features = self._features(values, seen)
        point = self.network(features.to(next(self.network.parameters()).dtype)).float()[:, :horizon]
        quantiles = point.unsqueeze(-1).expand(-1, -1, len(QUANTILES))
        return Output(point, quantiles, features, self._token_mask(seen), loc, scale)

    def _window(self, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return values, 0 where missing, and mask of the fixed context; shorter windows are missing before their start."""
        if context.dim() != 2 or context.shape != mask.shape:
            raise ModelError(
                f"context {tuple(context.shape)} and mask {tuple(mask.shape)} do not fit",
                hint="give both as [windows, steps], of the same shape",
            )
        context, mask = context[:, -self.config.context :], mask[:, -self.config.context :]
        mask = mask.bool() & context.isfinite()
        values = torch.where(mask, context if context.dtype == torch.float64 else context.float(), 0.0)
        short = self.config.context - context.shape[1]
        return (F.pad(values, (short, 0)), F.pad(mask, (short, 0))) if short else (values, mask)

    def _features(self, values: Tensor, mask: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.base.parameters())
        with torch.set_grad_enabled(trains):
            features = self.base.embed(values, mask)
        if features.shape[1:] != (self.config.tokens, self.config.d_model):
            raise ModelError(
                f"the model under the head gives features {tuple(features.shape[1:])}, and the head reads"
                f" {(self.config.tokens, self.config.d_model)}",
                hint="use the head with the model that it was made for",
            )
        if trains and not features.requires_grad:
            raise ModelError(
                f"the features of {type(self.base).__name__} carry no gradient, and weights before them are to train",
                hint="choose a tuning that trains the head alone, such as new_head",
            )
        return features

    def _token_mask(self, mask: Tensor) -> Tensor:
        patch, tokens = self.config.patch, self.config.tokens
        short = -self.config.context % patch
        if (self.config.context + short) // patch != tokens:
            return torch.ones(len(mask), tokens, dtype=torch.bool, device=mask.device)
        return F.pad(mask, (short, 0)).view(len(mask), tokens, patch).any(dim=-1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head's ``model.safetensors`` and ``config.json``, and the model under it in the subfolder ``base``."""
        path = Path(folder)
        self.base.save_pretrained(path / BASE)
        write_model(path, FORMAT, {"head": asdict(self.config)}, self.network.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path, read: Callable[[Path], nn.Module]) -> Self:
        """Read what :meth:`save_pretrained` wrote.

        Parameters
        ----------
        folder
            The folder.
        read
            Reads the model under the head from its own folder.

        Raises
        ------
        CheckpointError
            When something is missing, damaged or of another shape.
        """
        path = Path(folder)
        document, state = read_model(path, _Document)
        config = ReheadedConfig(**document.head.model_dump())
        with torch.device("meta"):
            network = build_head(config)
        check_tensors(path, network.state_dict(), state)
        network.load_state_dict(state, assign=True)
        below = path / BASE
        base = read(below) if below.is_dir() else None
        if not isinstance(base, Model) or isinstance(base, cls):
            raise CheckpointError(
                f"{below} holds no model that a head can be put on", hint="copy the model folder again, with its subfolder"
            )
        return cls(base, config, network.requires_grad_(True))
