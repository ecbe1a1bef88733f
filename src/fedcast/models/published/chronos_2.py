"""Chronos-2: an encoder over patches that gives 21 quantiles of up to 1,024 steps in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.models.base import Forecast
from fedcast.models.published.base import Encoding, Library, PublishedConfig, missing_as_nan
from fedcast.models.published.chronos import CHRONOS, LONGER, at_quantiles, check_levels, is_chronos, patch_mask
from fedcast.models.published.pretrained import TransformersModel, outputs_of, silence
from fedcast.models.seeding import seeded


class Chronos2(TransformersModel):
    """Chronos-2 behind fedcast's contract, for one series at a time: each is its own group, and there are no covariates.

    Sources: Ansari et al., *Chronos-2: From Univariate to Universal Forecasting*, 2025, and the library's ``chronos2``. The loss is
    the library's: twice the pinball loss of every learnt level on the standardised arcsinh scale, averaged over steps and summed over
    levels. fedcast's nine levels are taken from the 21 learnt ones. Horizons of more than a pass are rolled by the library's
    ``Chronos2Pipeline``, one thread at a time.

    Where each series is its own group, the queries and keys of the group attention get no gradient.
    """

    family: ClassVar[str] = "chronos-2"
    summary: ClassVar[str] = "encoder over patches of 16 steps; 21 quantiles of up to 1,024 steps in one pass"
    library: ClassVar[Library] = CHRONOS
    hub: ClassVar[tuple[str, ...]] = ("autogluon/chronos-2-small", "amazon/chronos-2", "autogluon/chronos-2-synth")
    licence: ClassVar[str] = "code Apache-2.0, weights Apache-2.0"
    heads: ClassVar[tuple[str, ...]] = ("output_patch_embedding.",)
    lora_targets: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o")

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` names the library's class."""
        return is_chronos(config, "Chronos2Model")

    @classmethod
    def network_class(cls) -> Any:
        """Return ``Chronos2Model``."""
        from chronos.chronos2 import Chronos2Model

        return Chronos2Model

    @classmethod
    def tiny_settings(cls) -> Any:
        """Return the configuration of a model of 16,000 parameters: context 64, 32 steps a pass."""
        from chronos.chronos2.config import Chronos2CoreConfig

        return Chronos2CoreConfig(
            architectures=["Chronos2Model"],
            chronos_pipeline_class="Chronos2Pipeline",
            d_model=16,
            d_ff=16,
            d_kv=8,
            num_layers=1,
            num_heads=2,
            reg_token_id=1,
            chronos_config={
                "context_length": 64,
                "input_patch_size": 16,
                "input_patch_stride": 16,
                "output_patch_size": 16,
                "max_output_patches": 2,
                "quantiles": [0.01, *(level / 20 for level in range(1, 20)), 0.99],
                "use_reg_token": True,
                "use_arcsinh": True,
            },
        )

    @classmethod
    def around(cls, network: Any) -> Self:
        """Return the model that a ``Chronos2Model`` computes."""
        settings = network.chronos_config
        check_levels(settings.quantiles)
        steps = settings.max_output_patches * settings.output_patch_size
        shape = PublishedConfig(cls.family, settings.context_length, steps, settings.input_patch_size, network.config.d_model)
        return cls(network, shape, network.config)

    def step(self, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Encoding]:
        """Return the library's loss and one feature a patch of the context; nothing is drawn."""
        self.check_target(batch)
        context = missing_as_nan(batch.context, batch.mask)
        with outputs_of(self.network.encoder) as encoded:
            loss = self.network(
                context=context,
                future_target=batch.target,
                future_target_mask=batch.target_mask,
                num_output_patches=self._patches(batch.target.shape[1]),
            ).loss
        mask = patch_mask(self.network, context)
        return loss, Encoding(encoded[0].last_hidden_state[:, : mask.shape[1]].float(), mask)

    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return one feature a patch of the context, with one patch ahead; summary and future tokens are left out."""
        values = missing_as_nan(context, mask)
        features: Tensor = self.network.encode(values)[0].last_hidden_state
        return features[:, : patch_mask(self.network, values).shape[1]].float()

    def forecast(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast as ``Chronos2Pipeline`` does; the point is the median."""
        values = missing_as_nan(context, mask)
        if horizon <= self.config.horizon:
            quantiles = self.network(context=values, num_output_patches=self._patches(horizon)).quantile_preds[..., :horizon]
        else:
            quantiles = self._rolled(values, horizon)
        return at_quantiles(quantiles, self.network.chronos_config.quantiles)

    def _rolled(self, values: Tensor, horizon: int) -> Tensor:
        """Return quantiles [B, Q, H] for horizons of more than a pass."""
        from chronos import Chronos2Pipeline

        silence(LONGER)
        with seeded(0):  # its data loader draws a seed that it does not use
            rolled = Chronos2Pipeline(self.network).predict(values[:, None].cpu(), prediction_length=horizon, batch_size=len(values))
        return torch.cat(rolled).to(values.device)

    def _patches(self, steps: int) -> int:
        return -(-steps // int(self.network.chronos_config.output_patch_size))
