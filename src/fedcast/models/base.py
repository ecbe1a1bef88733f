"""What every model gives back, and the configuration of the native one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from fedcast.errors import ModelError
from fedcast.spec import ModelSpec

QUANTILES: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The quantile levels that are learnt: those that GIFT-Eval scores."""


class Output(NamedTuple):
    """What one pass gives, in normalised units (``data = normalised * scale + loc``), all but ``feature_mask`` float32.

    Attributes
    ----------
    point
        Point forecast, [B, H].
    quantiles
        Quantiles at :data:`QUANTILES`, unsorted, [B, H, 9].
    features
        Encoder features, one a patch, [B, N, d]; what stands where ``feature_mask`` is False has no meaning.
    feature_mask
        True where the patch has an observed point, [B, N]. A row is False throughout when its context is missing altogether.
    loc, scale
        Mean and standard deviation of the context over observed points, [B, 1].
    """

    point: Tensor
    quantiles: Tensor
    features: Tensor
    feature_mask: Tensor
    loc: Tensor
    scale: Tensor


class Forecast(NamedTuple):
    """A forecast in data units.

    Attributes
    ----------
    point
        Point forecast, [B, H].
    quantiles
        Quantiles at :data:`QUANTILES`, [B, H, 9], never falling along the last axis.
    """

    point: Tensor
    quantiles: Tensor


class ForecastArrays(NamedTuple):
    """A :class:`Forecast` in numpy: ``point`` [W, H] and ``quantiles`` [W, H, 9], float64."""

    point: npt.NDArray[np.float64]
    quantiles: npt.NDArray[np.float64]


class _Shape(NamedTuple):
    d_model: int
    n_heads: int
    encoder_layers: int
    decoder_layers: int


SIZES: dict[str, _Shape] = {
    "nano": _Shape(128, 4, 2, 1),
    "micro": _Shape(128, 4, 4, 1),
    "tiny": _Shape(256, 4, 3, 1),
    "mini": _Shape(384, 6, 4, 1),
    "small": _Shape(512, 8, 5, 2),
    "base": _Shape(768, 12, 9, 3),
}
"""Width, heads and depth by size name: about 0.5M, 1M, 3M, 8M, 20M and 80M parameters."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a patch transformer.

    Attributes
    ----------
    d_model, n_heads
        Width and attention heads; the width of a head must be even.
    encoder_layers, decoder_layers
        Self-attention blocks of the encoder, cross-attention blocks of the decoder.
    context, horizon
        Longest context, and the steps forecast in one pass.
    patch
        Time steps a patch.
    position
        ``"rope"`` or ``"learned"``.
    size
        Name of the size, for people.
    architecture
        Which class computes it; see :mod:`fedcast.models.architectures`.
    settings
        Names and values that only this architecture knows.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    _LARGEST: ClassVar[dict[str, int]] = {
        "d_model": 16384,
        "n_heads": 1024,
        "encoder_layers": 256,
        "decoder_layers": 256,
        "context": 2**20,
        "horizon": 2**20,
        "patch": 4096,
    }

    d_model: int
    n_heads: int
    encoder_layers: int
    decoder_layers: int
    context: int
    horizon: int
    patch: int
    position: Literal["rope", "learned"] = "rope"
    size: str = "custom"
    architecture: str = "patch"
    settings: tuple[tuple[str, int | float | str], ...] = ()

    def __post_init__(self) -> None:
        for name, largest in self._LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise ModelError(f"{name} = {getattr(self, name)} is refused", hint=f"give {name} between 1 and {largest}")
        if self.d_model % (2 * self.n_heads):
            raise ModelError(
                f"width {self.d_model} does not split into {self.n_heads} heads of even width",
                hint="make d_model a multiple of 2 * n_heads",
            )

    @property
    def context_patches(self) -> int:
        """Patches of the longest context."""
        return math.ceil(self.context / self.patch)

    @property
    def horizon_patches(self) -> int:
        """Patches of the horizon forecast in one pass."""
        return math.ceil(self.horizon / self.patch)

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelConfig:
        """Build the configuration that a spec's ``[model]`` section names."""
        return cls(
            **SIZES[spec.size]._asdict(),
            context=spec.context,
            horizon=spec.horizon,
            patch=spec.patch,
            position=spec.position,
            size=spec.size,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Any) -> ModelConfig:
        """Build the configuration from a JSON-ready dict; unknown keys and wrong types are refused.

        Raises
        ------
        ModelError
            When a key is unknown, missing, of the wrong type or out of range.
        """
        try:
            return TypeAdapter(cls).validate_json(json.dumps(document))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ModelError(
                f"the model configuration is refused at {where or 'its root'}: {first['msg']}",
                hint="use the file that save_pretrained wrote",
            ) from error
