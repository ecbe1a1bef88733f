"""TimesFM 2.5: a decoder over patches of 32 steps that gives a point and nine quantiles of 128 steps in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fedcast.models.base import QUANTILES, Forecast, Output
from fedcast.models.published.base import Library, PublishedConfig
from fedcast.models.published.patches import MEDIAN, QuantileModel, check_nine, interpolated, pinball
from fedcast.models.published.pretrained import TransformersModel

_OTHERS = [index for index in range(len(QUANTILES)) if index != MEDIAN]


class TimesFM(QuantileModel, TransformersModel):
    """TimesFM 2.5 behind fedcast's contract.

    Sources: Das et al., *A decoder-only foundation model for time-series forecasting*, ICML 2024, and transformers' ``timesfm2_5``.

    The loss is the library's: the squared error of the point, which is the median, plus the mean pinball loss of the other quantiles.
    Two things differ from the library's code (transformers 5.23). There the outputs of 0.1 to 0.4 are trained towards 0.2 to 0.5,
    as the list of outputs begins with the mean, which has no level; here each output has its own level. There a batch without any
    negative value is forecast without negative values; here this is decided for each series, as in Google's ``timesfm``.

    Gaps are filled linearly, and steps before the first observed one are padding, as in ``timesfm``. TimesFM 1 and 2.0 are other
    architectures, which this adapter does not read. It was never run on the published weights here, as they could not be had.
    """

    family: ClassVar[str] = "timesfm-2.5"
    summary: ClassVar[str] = "decoder over patches of 32 steps; point and nine quantiles of 128 steps in one pass"
    library: ClassVar[Library] = Library("transformers", "transformers", "pip install 'transformers>=5.23'")
    hub: ClassVar[tuple[str, ...]] = ("google/timesfm-2.5-200m-transformers",)
    licence: ClassVar[str] = "code Apache-2.0, weights Apache-2.0"
    heads: ClassVar[tuple[str, ...]] = ("output_projection_point.", "output_projection_quantiles.")
    lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "v_proj")

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` is of TimesFM 2.5 in transformers."""
        return config.get("model_type") == "timesfm2_5"

    @classmethod
    def network_class(cls) -> Any:
        """Return ``TimesFm2_5ModelForPrediction``."""
        from transformers import TimesFm2_5ModelForPrediction

        return TimesFm2_5ModelForPrediction

    @classmethod
    def tiny_settings(cls) -> Any:
        """Return the configuration of a model of 15,000 parameters: context 64, 16 steps a pass."""
        from transformers import TimesFm2_5Config

        return TimesFm2_5Config(
            patch_length=8,
            context_length=64,
            horizon_length=16,
            output_quantile_len=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )

    @classmethod
    def around(cls, network: Any) -> Self:
        """Return the model that a ``TimesFm2_5ModelForPrediction`` computes."""
        config = network.config
        check_nine(config.quantiles)
        for layer in network.model.layers:
            layer.self_attn.attention_dropout = 0.0
        shape = PublishedConfig(cls.family, config.context_length, config.horizon_length, config.patch_length, config.hidden_size)
        return cls(network, shape, config)

    def one_pass(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nine quantiles of a pass, and one feature a patch."""
        # A row without any observed step counts as one of zeros: the library has no padding for it.
        first = torch.where(mask.any(dim=1), mask.int().argmax(dim=1), 0)
        series = [row[start:] for row, start in zip(interpolated(values, mask), first.tolist(), strict=True)]
        output = self.network(past_values=series, forecast_context_len=values.shape[1], truncate_negative=False)
        return output.full_predictions[..., 1:], output.last_hidden_state

    def error(self, output: Output, target: Tensor) -> Tensor:
        """Return the squared error of the median plus the mean pinball loss of the other quantiles, for each step."""
        others = pinball(output.quantiles[..., _OTHERS], target, [QUANTILES[index] for index in _OTHERS])
        return (output.quantiles[..., MEDIAN] - target).square() + others

    def forecast(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast in data units; the point is the median, and a series without negative values gets no forecast below 0."""
        point, quantiles = super().forecast(context, mask, horizon)
        if not self.network.config.infer_is_positive:
            return Forecast(point, quantiles)
        lowest = torch.where((torch.where(mask, context, 0.0) >= 0).all(dim=1, keepdim=True), 0.0, -torch.inf)
        return Forecast(point.maximum(lowest), quantiles.maximum(lowest[..., None]))
