"""MOMENT (Auton Lab; Goswami et al., arXiv 2402.03885), computed by momentfm."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fedcast.errors import CheckpointError
from fedcast.models.files import CONFIG
from fedcast.models.published.base import Library, PublishedConfig, read_json, write_json
from fedcast.models.published.patches import PointModel, interpolated
from fedcast.models.published.pretrained import load_weights, save_weights, silence, without_dropout
from fedcast.models.seeding import seeded

_HEAD = "head."
_POSITIONS = "patch_embedding.position_embedding.pe"  # sines and cosines that the library computes when it builds a model
_WORDS = "encoder.embed_tokens."
_PATCH = 8


class Moment(PointModel):
    """MOMENT's T5 encoder over 64 patches of 8 steps, with its forecasting head.

    The head maps all 64 features at once to the horizon, so a pass gives exactly as many steps as it was made for.

    Notes
    -----
    Published checkpoints carry a head for reconstruction; the forecasting head is drawn anew when one is read, from a fixed seed:
    such a model forecasts nothing sensible before it is trained. The head forecasts :attr:`horizon` steps, or as many as
    ``forecast_horizon`` in ``config.json`` says; what fedcast writes has that key, and its own head.

    Gaps are interpolated linearly, as in the authors' data sets, and held at the end of the context. What lies before the first
    observed step is 0 after standardisation and marked as not observed, as is the padding of shorter contexts.
    """

    family: ClassVar[str] = "moment"
    summary: ClassVar[str] = "MOMENT (Auton Lab): a T5 encoder with a linear forecasting head, which has to be trained; points only"
    # Plain pip would bring transformers 4.33 and numpy 1.25 along.
    library: ClassVar[Library] = Library(
        "momentfm", "momentfm", "pip install --no-deps momentfm==0.1.4 && pip install 'transformers>=5,<6' huggingface-hub"
    )
    hub: ClassVar[tuple[str, ...]] = ("AutonLab/MOMENT-1-small", "AutonLab/MOMENT-1-base", "AutonLab/MOMENT-1-large")
    licence: ClassVar[str] = "code and weights MIT"
    heads: ClassVar[tuple[str, ...]] = ("head.",)
    lora_targets: ClassVar[tuple[str, ...]] = ("q", "v")
    fixed: ClassVar[bool] = True
    horizon: ClassVar[int] = 96
    """Steps of a head that is drawn anew."""

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether the model's name is MOMENT."""
        return config.get("model_name") == "MOMENT"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read ``config.json`` and ``model.safetensors`` of a pre-trained checkpoint, or of one that fedcast wrote.

        Raises
        ------
        CheckpointError
            When a file is damaged, or the model normalises with weights of its own.
        """
        keys = read_json(folder / CONFIG)
        if keys.get("revin_affine"):
            raise CheckpointError(f"{folder} normalises with weights of its own (revin_affine)", hint="use a checkpoint as published")
        model = cls.drawn(keys, 0)
        trained = keys.get("task_name") == "forecasting"
        load_weights(model.network, folder, own=(_POSITIONS,) if trained else (_POSITIONS, _HEAD), unused=(_WORDS,))
        return model

    @classmethod
    def drawn(cls, settings: Mapping[str, Any], seed: int) -> Self:
        """Return a model with the keys of a ``config.json``, and a head for forecasting."""
        horizon = settings.get("forecast_horizon", cls.horizon)
        settings = {**settings, "task_name": "forecasting", "forecast_horizon": horizon}
        network = _build(settings, seed)
        return cls(
            network, PublishedConfig(cls.family, settings["seq_len"], horizon, settings["patch_len"], network.config.d_model), settings
        )

    @classmethod
    def tiny_settings(cls) -> Any:
        """Return those of a model of 8 patches and 4,000 weights."""
        t5 = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 2, "feed_forward_proj": "gated-gelu"}
        return {
            "model_name": "MOMENT",
            "task_name": "forecasting",
            "transformer_type": "encoder_only",
            "transformer_backbone": "google/flan-t5-small",  # a name only: the encoder is built from t5_config
            "t5_config": t5,
            "d_model": 16,
            "seq_len": 8 * _PATCH,
            "patch_len": _PATCH,
            "patch_stride_len": _PATCH,
            "forecast_horizon": 16,
        }

    def write(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``.

        ``MOMENTPipeline.from_pretrained(folder, model_kwargs={"task_name": "forecasting", "forecast_horizon": horizon})`` reads them;
        ``init()``, which draws a new head, must not be called then.
        """
        write_json(folder / CONFIG, self.settings)
        save_weights({name: tensor for name, tensor in self.network.state_dict().items() if name != _POSITIONS}, folder)

    def one_pass(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the library's modules; see :meth:`~fedcast.models.published.patches.PatchModel.one_pass`.

        As ``MOMENT.forecast`` does, but for its normalisation, whose place the standardisation takes, and which keeps each batch's
        mean in the module.
        """
        network, known = self.network, mask.cummax(dim=1).values
        filled = torch.where(known, interpolated(values, mask), 0.0)
        # a window without a whole patch of known steps would leave attention nothing to read
        known = torch.where(known[:, -self.config.patch :].all(dim=1, keepdim=True), known, True)
        patches = network.tokenizer(x=filled.unsqueeze(1))
        tokens = network.patch_embedding(patches, mask=torch.ones_like(known)).squeeze(1)
        keys = known.view(len(known), -1, self.config.patch).all(dim=2)
        features = network.encoder(inputs_embeds=tokens, attention_mask=keys.long()).last_hidden_state
        return network.head(features.unsqueeze(1)).squeeze(1), features


def _build(keys: Mapping[str, Any], seed: int) -> Any:
    from momentfm.models.moment import MOMENT

    silence("Only reconstruction head is pre-trained")
    with seeded(seed):
        network = MOMENT({**copy.deepcopy(dict(keys)), "enable_gradient_checkpointing": False}, model_kwargs={})
    # An embedding of words, of up to a third of all weights, which no time series reads.
    network.encoder.embed_tokens = None
    return without_dropout(network)
