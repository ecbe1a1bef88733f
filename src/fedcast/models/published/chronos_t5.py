"""Chronos-T5: a T5 language model over quantised values, which forecasts by sampling paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.models.base import QUANTILES, Forecast
from fedcast.models.published.base import Encoding, Library, PublishedConfig, missing_as_nan
from fedcast.models.published.chronos import CHRONOS, is_chronos, t5_config
from fedcast.models.published.pretrained import TransformersModel
from fedcast.models.seeding import seeded


class _Tokens(NamedTuple):
    ids: Tensor
    mask: Tensor
    scale: Tensor


class ChronosT5(TransformersModel):
    """Chronos-T5 behind fedcast's contract.

    Sources: Ansari et al., *Chronos: Learning the Language of Time Series*, TMLR 2024, and the library's ``chronos``. A context is
    divided by its mean absolute value and cut into uniform bins, one token a step. The loss is the cross-entropy of the target's
    tokens and of the end-of-series token; missing targets have no part in it, and of a target that is shorter than a pass the rest
    counts as missing. In training, points of context and target are dropped at random as the authors do (:attr:`dropped`).

    Forecasts are quantiles of sampled paths, as many and as warm as the checkpoint says (the published ones: 20 paths,
    temperature 1, the 50 likeliest tokens); the point is the median. Horizons of more than a pass are rolled as the library does: the
    median path is appended to the context.

    Notes
    -----
    Sampling starts anew from :attr:`seed` at every call: the same batch gives the same forecast, and neither reads nor moves the
    global random stream of the CPU. Rows of a batch share the draws, so a series forecast in another batch, or in another place of
    it, gets other paths. Only one thread samples at a time.

    Attributes
    ----------
    dropped
        Each training window loses points at a rate that is uniform from 0 to this, as in the authors' training script.
    seed
        Seed of the sampled paths.
    """

    family: ClassVar[str] = "chronos-t5"
    summary: ClassVar[str] = "T5 language model over quantised values; samples paths of 64 steps"
    library: ClassVar[Library] = CHRONOS
    hub: ClassVar[tuple[str, ...]] = (
        "amazon/chronos-t5-tiny",
        "amazon/chronos-t5-mini",
        "amazon/chronos-t5-small",
        "amazon/chronos-t5-base",
        "amazon/chronos-t5-large",
    )
    licence: ClassVar[str] = "code Apache-2.0, weights Apache-2.0"
    # T5 ties its output map to the embedding of tokens: they are one parameter, which is called shared.
    heads: ClassVar[tuple[str, ...]] = ("shared.", "lm_head.")
    decoders: ClassVar[tuple[str, ...]] = ("decoder.",)
    lora_targets: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o")
    quantiles: ClassVar[str] = "sampled"
    dropped: ClassVar[float] = 0.2
    seed: ClassVar[int] = 0

    def __init__(self, network: nn.Module, config: PublishedConfig, settings: Any) -> None:
        super().__init__(network, config, settings)
        from chronos import ChronosConfig, MeanScaleUniformBins

        self._settings = ChronosConfig(**self.network.config.chronos_config)
        self._tokenizer = MeanScaleUniformBins(**self._settings.tokenizer_kwargs, config=self._settings)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` is one of the library's with a T5 and its uniform bins."""
        return (
            is_chronos(config, "T5ForConditionalGeneration") and config["chronos_config"].get("tokenizer_class") == "MeanScaleUniformBins"
        )

    @classmethod
    def network_class(cls) -> Any:
        """Return ``T5ForConditionalGeneration``."""
        from transformers import T5ForConditionalGeneration

        return T5ForConditionalGeneration

    @classmethod
    def tiny_settings(cls) -> Any:
        """Return the configuration of a model of 6,000 parameters: 64 tokens, context 64, 64 steps a pass."""
        return t5_config(
            "T5ForConditionalGeneration",
            "ChronosPipeline",
            vocab_size=64,
            chronos_config={
                "tokenizer_class": "MeanScaleUniformBins",
                "tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0},
                "context_length": 64,
                "prediction_length": 64,
                "n_tokens": 64,
                "n_special_tokens": 2,
                "pad_token_id": 0,
                "eos_token_id": 1,
                "use_eos_token": True,
                "model_type": "seq2seq",
                "num_samples": 20,
                "temperature": 1.0,
                "top_k": 50,
                "top_p": 1.0,
            },
        )

    @classmethod
    def around(cls, network: Any) -> Self:
        """Return the model that a ``T5ForConditionalGeneration`` computes."""
        settings = network.config.chronos_config
        shape = PublishedConfig(
            cls.family, settings["context_length"], settings["prediction_length"], patch=1, d_model=network.config.d_model
        )
        return cls(network, shape, network.config)

    def step(self, batch: Batch, generator: Callable[[], torch.Generator]) -> tuple[Tensor, Encoding]:
        """Return the cross-entropy over tokens and one feature a step; which points are dropped comes from the generator."""
        self.check_target(batch)
        kept = self._kept(batch, generator()).to(batch.mask.device)
        length = batch.context.shape[1]
        tokens = self._tokens(missing_as_nan(batch.context, batch.mask & kept[:, :length]))
        labels = self._labels(missing_as_nan(batch.target, batch.target_mask & kept[:, length:]), tokens.scale)
        output = self.network(input_ids=tokens.ids, attention_mask=tokens.mask, labels=labels, use_cache=False)
        steps = min(length, self.config.context)
        return output.loss, Encoding(output.encoder_last_hidden_state[:, :steps].float(), tokens.mask[:, :steps])

    def embed(self, context: Tensor, mask: Tensor) -> Tensor:
        """Return one feature a step; the end-of-series token after them is left out."""
        tokens = self._tokens(missing_as_nan(context, mask))
        features: Tensor = self.network.encoder(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state
        return features[:, : min(context.shape[1], self.config.context)].float()

    def forecast(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast as ``ChronosPipeline`` does, from a fixed seed; the point is the median of the paths."""
        import chronos.chronos

        # Longer horizons than a pass are what was asked for: the library would log at every batch that it recommends none.
        chronos.chronos.logger.disabled = True
        pipeline = chronos.ChronosPipeline(self._tokenizer, chronos.chronos.ChronosModel(self._settings, self.network))
        with seeded(self.seed):
            paths = pipeline.predict(missing_as_nan(context, mask).cpu(), prediction_length=horizon).to(context.device)
        levels = torch.quantile(paths, torch.tensor(QUANTILES, device=paths.device), dim=1).permute(1, 2, 0).sort(dim=-1).values
        return Forecast(levels[..., QUANTILES.index(0.5)], levels)

    def _kept(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return which points of context and target stay, [B, L + H]."""
        rows, steps = len(batch.context), batch.context.shape[1] + batch.target.shape[1]
        rate = self.dropped * torch.rand(rows, 1, generator=generator, device=generator.device)
        return torch.rand(rows, steps, generator=generator, device=generator.device) >= rate

    def _tokens(self, values: Tensor) -> _Tokens:
        """Return the tokens of a context [B, L], NaN where missing; the library's bins lie on the CPU."""
        ids, mask, scale = self._tokenizer.context_input_transform(values.cpu())
        return _Tokens(ids.to(self.device), mask.to(self.device), scale)

    def _labels(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the labels of a target [B, H], NaN where missing; -100 is what the loss leaves out."""
        rest = values.new_full((len(values), self.config.horizon - values.shape[1]), torch.nan)
        ids, mask = self._tokenizer.label_input_transform(torch.cat([values, rest], dim=1).cpu(), scale)
        return torch.where(mask, ids, -100).to(self.device)
