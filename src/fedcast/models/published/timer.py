"""Timer: a decoder over patches of 96 steps that gives a point forecast of the next patch; and what it shares with Sundial."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fedcast.models.files import CONFIG
from fedcast.models.published.base import Library, Published, PublishedConfig, read_json
from fedcast.models.published.patches import PointModel, in_patches, interpolated
from fedcast.models.published.pretrained import draw_network, load_weights, write_network

SKTIME = Library("sktime", "sktime", "pip install 'sktime>=1.2' 'transformers>=5.23'", needs=("transformers",))
CONTEXT = 2880
"""Steps of context that both models were trained with; their configuration does not say it."""


class AuthorsDecoder(Published):
    """What Timer and Sundial have in common: networks of the same authors, which sktime carries."""

    library: ClassVar[Library] = SKTIME
    licence: ClassVar[str] = "code Apache-2.0 (sktime: BSD-3-Clause), weights Apache-2.0"
    lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "v_proj")

    @classmethod
    @abstractmethod
    def classes(cls) -> tuple[Any, Any]:
        """Return the authors' classes of network and configuration."""

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` names the family as its model type."""
        return config.get("model_type") == cls.family

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a checkpoint of the authors."""
        model = cls.drawn(read_json(folder / CONFIG), 0)
        load_weights(model.network, folder)
        return model

    @classmethod
    def drawn(cls, settings: Mapping[str, Any], seed: int) -> Self:
        """Return a model with the keys of a ``config.json``."""
        kind, configuration = cls.classes()
        network: Any = draw_network(kind, configuration.from_dict(dict(settings)), seed)
        return cls(network, shape_of(network, cls.family), settings)

    def write(self, folder: Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` as the authors' class reads them."""
        write_network(self.network, folder)


class Timer(AuthorsDecoder, PointModel):
    """Timer behind fedcast's contract: the univariate checkpoint of Timer-XL.

    Sources: Liu et al., *Timer: Generative Pre-trained Transformers Are Large Time Series Models*, ICML 2024, and *Timer-XL*, ICLR
    2025; the authors' network as it lies in ``sktime.libs.timer``, of which layers and heads are used. No code of a checkpoint is
    executed. It was never run on the published weights here, as they could not be had.

    The loss is the authors', the squared error, of the target only, as where Timer is fine-tuned for forecasting. The library cuts
    a context to whole patches; here the oldest patch may be partly padding. Gaps are filled linearly, and patches before the
    first observed step are hidden.

    The weights of the ICML paper, ``Timer_forecast_1.0.ckpt``, are pickled and of another network; they are not read.
    """

    family: ClassVar[str] = "timer"
    summary: ClassVar[str] = "decoder over patches of 96 steps; a point forecast of 96 steps in one pass"
    hub: ClassVar[tuple[str, ...]] = ("thuml/timer-base-84m",)
    heads: ClassVar[tuple[str, ...]] = ("lm_heads.",)

    @classmethod
    def tiny_settings(cls) -> Any:
        """Return those of a model of 6,000 parameters: 8 steps a patch and a pass."""
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return {**shape, "input_token_len": 8, "output_token_lens": [8], "max_position_embeddings": CONTEXT}

    @classmethod
    def classes(cls) -> tuple[Any, Any]:
        """Return the authors' classes of network and configuration."""
        from sktime.libs.timer import TimerConfig, TimerForPrediction

        return TimerForPrediction, TimerConfig

    def one_pass(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points of a pass, and one feature a patch."""
        tokens = in_patches(interpolated(values, mask), self.config.patch)
        features = decoded(self.network.model, self.network.model.embed_layer.emb(tokens), self.observed(mask))
        return self.network.lm_heads[-1](features[:, -1]), features


def shape_of(network: Any, family: str) -> PublishedConfig:
    """Return the shape of a network of Timer's or Sundial's authors, and switch off the dropout that its attention keeps for itself."""
    config = network.config
    for layer in network.model.layers:
        layer.self_attn.attention_dropout = 0.0
    patch = config.input_token_len
    return PublishedConfig(family, CONTEXT // patch * patch, config.output_token_lens[-1], patch, config.hidden_size)


def decoded(decoder: Any, embeddings: Tensor, observed: Tensor) -> Tensor:
    """Return the features [B, N, d] that a decoder of Timer's or Sundial's authors gives for embedded patches.

    Its own forward pass calls functions that transformers has declared outdated; this one calls its layers.

    Parameters
    ----------
    decoder
        Has ``layers`` and ``norm``.
    embeddings
        [B, N, d].
    observed
        [B, N]; patches before a row's first observed one are hidden from all but themselves.
    """
    count = embeddings.shape[1]
    begun = observed.cummax(dim=1).values
    itself = torch.eye(count, dtype=torch.bool, device=observed.device)
    seen = (begun[:, None, :] & itself.new_ones(count, count).tril()) | itself
    positions = torch.arange(count, device=observed.device)[None]
    features = embeddings
    for layer in decoder.layers:
        features = layer(features, attention_mask=seen[:, None], position_ids=positions)[0]
    normed: Tensor = decoder.norm(features)
    return normed
