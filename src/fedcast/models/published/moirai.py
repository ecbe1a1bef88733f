"""Moirai-2: a decoder over patches of 16 steps that gives nine quantiles of the next patches in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fedcast.models.base import Forecast
from fedcast.models.files import CONFIG
from fedcast.models.layers import InstanceNorm
from fedcast.models.published.base import Library, PublishedConfig, read_json
from fedcast.models.published.patches import MEDIAN, QuantileModel, check_nine, in_patches
from fedcast.models.published.pretrained import load_weights, outputs_of, without_dropout
from fedcast.models.seeding import seeded

_OWN = {"d_ff", "max_seq_len", "num_predict_token", "patch_size", "quantile_levels"}


class Moirai2(QuantileModel):
    """Moirai-2 behind fedcast's contract.

    Sources: Liu et al., *Moirai 2.0: When Less Is More for Time Series Forecasting*, arXiv 2511.11698, and ``uni2ts.model.moirai2``.
    ``uni2ts`` has no code that trains it; the paper trains on the pinball loss of the nine quantiles, which is taken here, without the
    paper's masking of random patches. A horizon of more than a pass is forecast as the library does: every quantile is continued by
    itself, and the quantiles of what follows are pooled.

    One variate, without covariates. Moirai-1 is left out: its code imports jax. It was never run on the published weights here, as
    they could not be had.
    """

    family: ClassVar[str] = "moirai-2"
    summary: ClassVar[str] = "decoder over patches of 16 steps; nine quantiles of 64 steps in one pass"
    library: ClassVar[Library] = Library(
        "uni2ts",
        "uni2ts",
        "pip install einops gluonts huggingface-hub jaxtyping lightning orjson && pip install --no-deps uni2ts==2.0.0",
    )
    hub: ClassVar[tuple[str, ...]] = ("Salesforce/moirai-2.0-R-small",)
    licence: ClassVar[str] = "code Apache-2.0, weights CC-BY-NC-4.0 (sources disagree: see the model card)"
    heads: ClassVar[tuple[str, ...]] = ("out_proj.",)
    lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "v_proj")

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` has the settings of ``Moirai2Module``."""
        return config.keys() >= _OWN

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a checkpoint of uni2ts."""
        model = cls.drawn(read_json(folder / CONFIG), 0)
        load_weights(model.network, folder)
        return model

    @classmethod
    def tiny_settings(cls) -> Any:
        """Return those of a model of 32,000 parameters, as the library has no heads narrower than 64: context 76, 4 steps a pass."""
        return {
            "d_model": 64,
            "d_ff": 8,
            "num_layers": 1,
            "patch_size": 2,
            "max_seq_len": 40,
            "attn_dropout_p": 0.0,
            "dropout_p": 0.0,
            "scaling": True,
            "num_predict_token": 2,
            "quantile_levels": [level / 10 for level in range(1, 10)],
        }

    @classmethod
    def drawn(cls, settings: Mapping[str, Any], seed: int) -> Self:
        """Return a model with the keys of a ``config.json``."""
        from uni2ts.model.moirai2 import Moirai2Module

        with seeded(seed):
            network: Any = without_dropout(Moirai2Module(**settings))
        check_nine(network.quantile_levels)
        patch, ahead = network.patch_size, network.num_predict_token
        shape = PublishedConfig(cls.family, (network.max_seq_len - ahead) * patch, ahead * patch, patch, network.d_model)
        return cls(network, shape, settings)

    def write(self, folder: Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` as ``Moirai2Module.from_pretrained`` reads them."""
        self.network.save_pretrained(folder)

    def one_pass(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nine quantiles of a pass, and one feature a patch."""
        patches, observed = (in_patches(part, self.config.patch) for part in (values, mask))
        begun = observed.any(dim=2).cummax(dim=1).values
        with outputs_of(self.network.encoder) as encoded:
            output = self.network(
                patches,
                observed,
                sample_id=begun.long(),
                time_id=(begun.cumsum(dim=1) - 1).clamp(min=0),
                variate_id=torch.zeros_like(begun, dtype=torch.long),
                prediction_mask=torch.zeros_like(begun),
                training_mode=False,
            )
        ahead = output[:, -1].reshape(len(values), self.network.num_predict_token, self.network.num_quantiles, self.config.patch)
        return ahead.transpose(2, 3).flatten(1, 2), encoded[0]

    def forecast(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast as the library does; the point is the median."""
        from uni2ts.model.moirai2 import Moirai2Forecast

        values, mask, loc, scale = self.patched(context, mask)
        runner = Moirai2Forecast(
            prediction_length=horizon,
            target_dim=1,
            feat_dynamic_real_dim=0,
            past_feat_dynamic_real_dim=0,
            context_length=values.shape[1],
            module=self.network,
        )
        quantiles = runner(past_target=values[..., None], past_observed_target=mask[..., None], past_is_pad=~mask.cummax(dim=1).values)
        quantiles = InstanceNorm.inverse(quantiles.transpose(1, 2).sort(dim=-1).values, loc, scale)
        return Forecast(quantiles[..., MEDIAN], quantiles)
