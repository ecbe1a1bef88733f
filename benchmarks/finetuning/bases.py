"""The starting models: published weights where they are at hand, else models that fedcast pre-trained itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from fedcast.models.base import QUANTILES
from fedcast.models.published.pretrained import drawn, write_network
from fedcast.run.finetune import finetune
from fedcast.run.pretrain import pretrain
from fedcast.spec import parse_spec

WEIGHTS = "FEDCAST_WEIGHTS"
"""The environment variable that names the folder of published weights."""

# Neither what the medical benchmark has, nor what the sets of the long-term forecasting benchmark are from.
_DOMAINS = ["wind", "traffic", "retail", "health", "cloud", "nature", "economics", "activity", "spacecraft", "transport", "web"]


def published(name: str) -> Path:
    """Return a folder or file of published weights; say what is missing otherwise."""
    root = os.environ.get(WEIGHTS)
    if not root or not (Path(root) / name).exists():
        sys.exit(f"{WEIGHTS} does not name a folder with {name}")
    return Path(root) / name


def native(output: Path) -> Path:
    """Return fedcast's own model (0.6 M parameters, context 512, horizon 96), trained on pooled data of eleven domains."""
    spec = parse_spec({**_document("base-native"), "model": {"size": "nano", "context": 512, "horizon": 96}})
    return pretrain(spec, output=output / "base-native").final


def bolt(output: Path) -> Path:
    """Return a model of Chronos-Bolt's architecture (0.9 M parameters, context 512, horizon 64), trained by fedcast like :func:`native`."""
    start = output / "base-bolt-start"
    if not start.exists():
        start.mkdir(parents=True)
        write_network(_small_bolt(), start)
    model = {"checkpoint": str(start), "context": 512, "horizon": 64}
    return finetune(parse_spec({**_document("base-bolt"), "model": model}), output=output / "base-bolt").final


def _small_bolt() -> Any:
    """Return Chronos-Bolt's network with random weights."""
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    settings = {
        "context_length": 512,
        "prediction_length": 64,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "quantiles": list(QUANTILES),
        "use_reg_token": True,
    }
    config = T5Config(
        architectures=["ChronosBoltModelForForecasting"],
        chronos_pipeline_class="ChronosBoltPipeline",
        d_model=128,
        d_ff=512,
        d_kv=32,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        vocab_size=2,
        reg_token_id=1,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        initializer_factor=0.05,
        is_encoder_decoder=True,
        chronos_config=settings,
    )
    return drawn(ChronosBoltModelForForecasting, config, 0)


def _document(name: str) -> dict[str, object]:
    return {
        "name": name,
        "data": {"source": "catalogue", "domains": _DOMAINS},
        "method": {"name": "central_balanced"},
        "training": {"batch_size": 32, "learning_rate": 1e-3},
        # eleven sites of 25 steps each are 275 steps a round of the pooled client
        "federation": {"rounds": 10, "local_steps": 25},
        "evaluation": {"every": 5, "windows": 64},
    }
