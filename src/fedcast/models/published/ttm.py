"""Tiny Time Mixers (IBM; Ekambaram et al., arXiv 2401.03955), computed by granite-tsfm."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcast.errors import CheckpointError
from fedcast.models.base import Output
from fedcast.models.files import CONFIG
from fedcast.models.published.base import Library, PublishedConfig, read_json
from fedcast.models.published.patches import PointModel
from fedcast.models.published.pretrained import load_weights, save_weights, without_dropout
from fedcast.models.seeding import seeded

_ARCHITECTURE = "TinyTimeMixerForPrediction"
_LOSSES = ("mse", "mae", "huber", "pinball")
# One channel's forecast depends on others, or on what fedcast does not have: their weights have no place for a channel alone.
_NEEDS_MORE = {
    "mode": ("common_channel", "its encoder mixes channels"),
    "decoder_mode": ("common_channel", "its decoder mixes channels"),
    "enable_forecast_channel_mixing": (False, "its head mixes channels or reads covariates"),
    "categorical_vocab_size_list": (None, "it reads static categories"),
    "norm_mlp": ("LayerNorm", "its batch norms keep statistics, which no training of fedcast's updates"),
    "multi_quantile_head": (False, "it has a head of quantiles"),
    "multi_scale": (False, "it has tokens of several scales"),
    "register_tokens": (0, "it has register tokens"),
    "fft_length": (0, "it has tokens of frequencies"),
}


class TTM(PointModel):
    """Tiny Time Mixers r1 and r2: MLP-Mixers over patches, of one million parameters and less.

    The context is of fixed length. A shorter one is padded at its start and what is missing is 0 after standardisation, both
    marked as not observed, as ``tsfm_public`` does.

    Notes
    -----
    Every weight of a checkpoint whose modes are ``common_channel`` is shared by all channels, however many it was trained on, so it
    is run with one. Where channels are mixed (``decoder_mode="mix_channel"``, exogenous channels, static categories) there are
    weights between channels, and reading is refused. A model with a frequency prefix is given the token of unknown frequencies.
    The loss is the one in the checkpoint's configuration.
    """

    family: ClassVar[str] = "ttm"
    summary: ClassVar[str] = "Tiny Time Mixers r1 and r2 (IBM): MLP-Mixers of one million parameters; points only"
    # Its pins would replace torch and scikit-learn; what it needs beside transformers is deprecated, datasets, einops and scikit-learn.
    library: ClassVar[Library] = Library(
        "granite-tsfm",
        "tsfm_public",
        "pip install --no-deps granite-tsfm==0.3.11 && pip install 'transformers>=4.57.6,<6' datasets deprecated einops scikit-learn",
    )
    hub: ClassVar[tuple[str, ...]] = ("ibm-granite/granite-timeseries-ttm-r2", "ibm-granite/granite-timeseries-ttm-r1")
    licence: ClassVar[str] = "code and weights Apache-2.0"
    heads: ClassVar[tuple[str, ...]] = ("head.",)
    lora_targets: ClassVar[tuple[str, ...]] = ("fc1", "fc2", "attn_layer")
    fixed: ClassVar[bool] = True

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether the architecture is ``TinyTimeMixerForPrediction``."""
        return config.get("architectures") == [_ARCHITECTURE]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read ``config.json`` and ``model.safetensors``, as ``tsfm_public`` writes them.

        Raises
        ------
        CheckpointError
            When a file is damaged, or the model cannot forecast one series alone.
        """
        keys = read_json(folder / CONFIG)
        for name, (plain, reason) in _NEEDS_MORE.items():
            if keys.get(name, plain) != plain:
                raise CheckpointError(
                    f"{folder} cannot forecast a single series: {reason} ({name} = {keys[name]!r})",
                    hint="use a checkpoint whose mode and decoder_mode are common_channel, such as ibm-granite/granite-timeseries-ttm-r2",
                )
        if keys.get("loss", "mse") not in _LOSSES:
            raise CheckpointError(f"{folder} has the loss {keys['loss']!r}", hint=f"set loss in {CONFIG} to one of {', '.join(_LOSSES)}")
        alone = {"num_input_channels": 1, "prediction_channel_indices": None, "exogenous_channel_indices": None, "light_mode": False}
        model = cls.drawn({**keys, **alone}, 0)
        load_weights(model.network, folder)
        return model

    @classmethod
    def drawn(cls, settings: Mapping[str, Any], seed: int) -> Self:
        """Return a model with the keys of a ``config.json``."""
        network = _build(settings, seed)
        keys = network.config
        horizon = keys.prediction_filter_length or keys.prediction_length
        return cls(network, PublishedConfig(cls.family, keys.context_length, horizon, keys.patch_length, keys.d_model), settings)

    @classmethod
    def tiny_settings(cls) -> Any:
        """Return those of a model of 4 patches of 8 steps and 3,000 weights."""
        sizes = {"context_length": 32, "prediction_length": 8, "patch_length": 8, "patch_stride": 8, "d_model": 16, "num_layers": 1}
        decoder = {"decoder_num_layers": 1, "decoder_d_model": 8, "expansion_factor": 2, "loss": "mse", "scaling": "std"}
        return {**sizes, **decoder, "num_input_channels": 1}

    def write(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, which ``from_pretrained`` of the library reads."""
        keys = self.network.config
        keys.architectures = [_ARCHITECTURE]
        keys.save_pretrained(folder)
        save_weights(self.network.state_dict(), folder)

    def one_pass(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the library's model; see :meth:`~fedcast.models.published.patches.PatchModel.one_pass`."""
        keys = self.network.config
        unknown = values.new_zeros(len(values), dtype=torch.long) if keys.resolution_prefix_tuning else None
        output = self.network(
            past_values=values.unsqueeze(-1),
            past_observed_mask=mask.unsqueeze(-1).to(values.dtype),
            freq_token=unknown,
            return_loss=False,
            return_dict=True,
        )
        patches = self.config.context // self.config.patch  # a frequency's token stands before them
        return output.prediction_outputs.squeeze(-1), output.backbone_hidden_state.squeeze(1)[:, -patches:]

    def error(self, output: Output, target: Tensor) -> Tensor:
        """Return the loss that the configuration names, step by step."""
        keys, point = self.network.config, output.point
        if keys.loss == "mae":
            return F.l1_loss(point, target, reduction="none")
        if keys.loss == "huber":
            return F.huber_loss(point, target, reduction="none", delta=keys.huber_delta)
        if keys.loss == "pinball":
            difference = target - point
            return torch.maximum(keys.quantile * difference, (keys.quantile - 1) * difference)
        return super().error(output, target)


def _build(keys: Mapping[str, Any], seed: int) -> Any:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from tsfm_public.models.tinytimemixer import TinyTimeMixerConfig, TinyTimeMixerForPrediction
    finally:  # the library sets up logging for the whole program when it is imported
        root.handlers[:] = handlers
        root.setLevel(level)
    with seeded(seed):
        network = TinyTimeMixerForPrediction(TinyTimeMixerConfig(**copy.deepcopy(dict(keys))))
    return without_dropout(network)
