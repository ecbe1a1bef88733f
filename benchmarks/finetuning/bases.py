"""The starting models: published weights where they are at hand, else models that fedcast pre-trained itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedcast.models.published.chronos_bolt import ChronosBolt, bolt_config
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
        sizes = {"d_model": 128, "d_ff": 512, "d_kv": 32, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        ChronosBolt.drawn(bolt_config(context=512, horizon=64, **sizes), 0).save_pretrained(start)
    model = {"checkpoint": str(start), "context": 512, "horizon": 64}
    return finetune(parse_spec({**_document("base-bolt"), "model": model}), output=output / "base-bolt").final


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
