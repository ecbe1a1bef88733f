"""What the adapters of the three Chronos families share; one library computes them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedcast.errors import CheckpointError
from fedcast.models.base import QUANTILES, Forecast
from fedcast.models.published.base import Library

CHRONOS = Library("chronos-forecasting", "chronos", "pip install 'chronos-forecasting>=2.3'")
LONGER = "We recommend keeping prediction length"
"""How the library's warning begins when a horizon is longer than a pass."""


def is_chronos(config: Mapping[str, Any], architecture: str) -> bool:
    """Return whether a ``config.json`` is one of the chronos library's with a model of this class."""
    return config.get("architectures") == [architecture] and isinstance(config.get("chronos_config"), dict)


def t5_config(architecture: str, pipeline: str, **keys: Any) -> Any:
    """Return the configuration of a tiny T5, as the library's checkpoints write it; ``keys`` replace and add to its own."""
    from transformers import T5Config

    tiny = {
        "architectures": [architecture],
        "chronos_pipeline_class": pipeline,
        "d_model": 16,
        "d_ff": 32,
        "d_kv": 8,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.1,
        "initializer_factor": 0.05,
        "feed_forward_proj": "relu",
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return T5Config(**{**tiny, **keys})


def check_levels(levels: Sequence[float]) -> None:
    """Refuse a checkpoint whose learnt quantiles do not reach from 0.1 to 0.9, by :class:`CheckpointError`."""
    if min(levels) > QUANTILES[0] or max(levels) < QUANTILES[-1]:
        raise CheckpointError(
            f"the checkpoint learnt quantiles from {min(levels):g} to {max(levels):g} only",
            hint=f"use one whose levels reach from {QUANTILES[0]} to {QUANTILES[-1]}",
        )


def patch_mask(network: Any, values: Tensor) -> Tensor:
    """Return which patches of values [B, L], NaN where missing, have an observed point: [B, N], as the network cuts them."""
    last = values[:, -network.chronos_config.context_length :]
    return torch.nan_to_num(network.patch(last.isfinite().float())).sum(dim=-1) > 0


def at_quantiles(values: Tensor, levels: Sequence[float]) -> Forecast:
    """Return a forecast from quantiles [B, Q, H] at ``levels``: fedcast's are picked or, where they were not learnt, interpolated linearly.

    The library does so too; that the levels are then sorted is fedcast's.
    """
    from chronos.utils import interpolate_quantiles

    learnt = values.transpose(1, 2)
    if set(QUANTILES) <= set(levels):
        chosen = learnt[..., [list(levels).index(level) for level in QUANTILES]]
    else:
        chosen = interpolate_quantiles(list(QUANTILES), list(levels), learnt)
    ordered = chosen.sort(dim=-1).values
    return Forecast(ordered[..., QUANTILES.index(0.5)], ordered)
