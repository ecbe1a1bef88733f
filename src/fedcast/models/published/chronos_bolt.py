"""Chronos-Bolt: a T5 encoder-decoder over patches that gives nine quantiles of 64 steps in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.models.base import QUANTILES, Forecast
from fedcast.models.published.base import Encoding, Library, PublishedConfig, missing_as_nan
from fedcast.models.published.chronos import CHRONOS, LONGER, at_quantiles, check_levels, is_chronos, patch_mask, t5_config
from fedcast.models.published.pretrained import TransformersModel, outputs_of, silence


class ChronosBolt(TransformersModel):
    """Chronos-Bolt behind fedcast's contract.

    Sources: Ansari et al., *Chronos: Learning the Language of Time Series*, TMLR 2024, and the library's ``chronos_bolt``. The loss is
    the library's: twice the pinball loss of every learnt level on the standardised scale, summed over steps. A horizon of more than
    a pass is rolled as the library does: each quantile is appended to the context, and the quantiles of what follows are pooled.
    Where a checkpoint learnt other levels than fedcast's nine, these are interpolated.
    """

    family: ClassVar[str] = "chronos-bolt"
    summary: ClassVar[str] = "T5 encoder-decoder over patches of 16 steps; nine quantiles of 64 steps in one pass"
    library: ClassVar[Library] = CHRONOS
    hub: ClassVar[tuple[str, ...]] = (
        "amazon/chronos-bolt-tiny",
        "amazon/chronos-bolt-mini",
        "amazon/chronos-bolt-small",
        "amazon/chronos-bolt-base",
    )
    licence: ClassVar[str] = "code Apache-2.0, weights Apache-2.0"
    heads: ClassVar[tuple[str, ...]] = ("output_patch_embedding.",)
    decoders: ClassVar[tuple[str, ...]] = ("decoder.",)
    lora_targets: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o")

    def __init__(self, network: nn.Module, config: PublishedConfig, settings: Any) -> None:
        super().__init__(network, config, settings)
        # peft asks for the embedding; the library's class does not say where it is.
        self.network._input_embed_layer = "shared"

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` names the library's class."""
        return is_chronos(config, "ChronosBoltModelForForecasting")

    @classmethod
    def network_class(cls) -> Any:
        """Return ``ChronosBoltModelForForecasting``."""
        from chronos.chronos_bolt import ChronosBoltModelForForecasting

        return ChronosBoltModelForForecasting

    @classmethod
    def tiny_settings(cls) -> Any:
        """Return the configuration of a model of 26,000 parameters: context 64, 64 steps a pass."""
        return bolt_config(context=64, horizon=64, d_ff=16)

    @classmethod
    def around(cls, network: Any) -> Self:
        """Return the model that a ``ChronosBoltModelForForecasting`` computes."""
        settings = network.chronos_config
        check_levels(settings.quantiles)
        shape = PublishedConfig(
            cls.family, settings.context_length, settings.prediction_length, settings.input_patch_size, network.config.d_model
        )
        return cls(network, shape, network.config)

    def step(self, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Encoding]:
        """Return the library's loss and one feature a patch; nothing is drawn."""
        self.check_target(batch)
        context = missing_as_nan(batch.context, batch.mask)
        with outputs_of(self.network.encoder) as encoded:
            loss = self.network(context=context, target=batch.target, target_mask=batch.target_mask).loss
        mask = patch_mask(self.network, context)
        return loss, Encoding(encoded[0].last_hidden_state[:, : mask.shape[1]].float(), mask)

    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return one feature a patch; the summary token after them is left out."""
        values = missing_as_nan(context, mask)
        features: Tensor = self.network.encode(values)[0]
        return features[:, : patch_mask(self.network, values).shape[1]].float()

    def forecast(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast as ``ChronosBoltPipeline`` does; the point is the median."""
        from chronos import ChronosBoltPipeline

        silence(LONGER)
        values = ChronosBoltPipeline(self.network).predict(missing_as_nan(context, mask), prediction_length=horizon)
        return at_quantiles(values.to(context.device), self.network.chronos_config.quantiles)


def bolt_config(*, context: int, horizon: int, **keys: Any) -> Any:
    """Return the configuration of a small Chronos-Bolt with patches of 16 steps; ``keys`` as in :func:`t5_config`."""
    return t5_config(
        "ChronosBoltModelForForecasting",
        "ChronosBoltPipeline",
        vocab_size=2,
        reg_token_id=1,
        chronos_config={
            "context_length": context,
            "prediction_length": horizon,
            "input_patch_size": 16,
            "input_patch_stride": 16,
            "quantiles": list(QUANTILES),
            "use_reg_token": True,
        },
        **keys,
    )
