"""The commented spec that ``fedcast init`` writes, fitted to the length of the person's series."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedcast.cli.flags import spec_keys, toml_value
from fedcast.data.catalogue import DEFAULT_HELD_OUT, load_domains
from fedcast.spec import DataSpec, ModelSpec

_SHOWN = (
    "data.source",
    "data.domains",
    "data.held_out",
    "data.time",
    "data.id",
    "data.target",
    "data.freq",
    "model.checkpoint",
    "model.size",
    "model.context",
    "model.horizon",
    "method.name",
    "tuning.name",
    "training.batch_size",
    "training.learning_rate",
    "federation.rounds",
    "federation.local_steps",
    "evaluation.baselines",
    "evaluation.samples",
)
# Where a checkpoint is fine-tuned: its size is its own, and far smaller steps than from scratch keep what it has learnt.
_FINE_TUNING = {"method.name": "fedavg", "training.learning_rate": 1e-4}


@dataclass(frozen=True)
class Lengths:
    """Forecast lengths that a person's series allow.

    Attributes
    ----------
    context, horizon
        Time steps.
    """

    context: int
    horizon: int


DEFAULT = Lengths(context=ModelSpec().context, horizon=ModelSpec().horizon)


def fit_lengths(typical: int, patch: int = 16, largest: Lengths = DEFAULT) -> Lengths:
    """Choose a context and a horizon for series of a typical length.

    Parameters
    ----------
    typical
        Points in a typical series of the domain with the shortest ones.
    patch
        Steps a patch; the context is a multiple of it.
    largest
        The most of each; the defaults of :class:`~fedcast.spec.ModelSpec` when absent.

    Returns
    -------
    Lengths
        The test part takes a fifth of a series and validation a tenth, each at least a horizon, so the horizon is at most a tenth of the
        typical length; the context is at most half of it.
    """
    horizon = int(np.clip(typical // 10, 1, largest.horizon))
    context = int(np.clip(typical // 2 // patch * patch, patch, largest.context))
    return Lengths(context=context, horizon=horizon)


def starter(name: str, folder: Path | None, columns: Mapping[str, str | None], checkpoint: str | None = None) -> str:
    """Return a commented spec as TOML.

    Parameters
    ----------
    name
        Name of the run.
    folder
        Folder of the person's data, or ``None`` for the bundled data, whose default held-out domains are filled in.
    columns
        ``time``, ``id``, ``target`` and ``freq`` as the person gave them.
    checkpoint
        What is fine-tuned, read for the lengths it can take; ``None`` to train from scratch.

    Raises
    ------
    SourceError, FrameError
        When the folder cannot be read.
    CheckpointError, MissingExtraError
        When the checkpoint cannot be read.
    """
    source = "bundled" if folder is None else str(folder)
    values: dict[str, object] = {f"data.{key}": value for key, value in columns.items()}
    largest, comments = DEFAULT, {row["key"]: row["description"] for row in spec_keys()}
    if checkpoint is not None:
        model = _read(checkpoint)
        comments |= _limits(model)
        largest = Lengths(context=min(DEFAULT.context, model.context), horizon=min(DEFAULT.horizon, model.horizon))
        values |= {"model.checkpoint": checkpoint, "model.context": largest.context, "model.horizon": largest.horizon, **_FINE_TUNING}
    if source in DEFAULT_HELD_OUT:
        values |= {"data.source": source, "data.held_out": list(DEFAULT_HELD_OUT[source])}
    else:
        data = DataSpec.model_validate({"source": source, **columns})
        stores = load_domains(data)
        lengths = fit_lengths(min(int(np.median(store.lengths)) for store in stores.values()), largest=largest)
        values |= {
            "data.source": source,
            "data.domains": list(stores),
            "model.context": lengths.context,
            "model.horizon": lengths.horizon,
        }
    left_out = {"model.checkpoint", "tuning.name"} if checkpoint is None else {"model.size"}
    lines = [
        "# One run of fedcast. Every key, its type and default: fedcast init --keys",
        f"name = {toml_value(_run_name(name))}",
        "seed = 0",
    ]
    section = ""
    for key in spec_keys():
        if key["key"] not in _SHOWN or key["key"] in left_out:
            continue
        here, leaf = key["key"].split(".")
        if here != section:
            section = here
            lines += ["", f"[{section}]"]
        value = values.get(key["key"])
        text = toml_value(value) if value is not None else key["default"]
        lines += [f"# {comments[key['key']]}", f"# {leaf} = ..." if not text else f"{leaf} = {text}"]
    return "\n".join(lines) + "\n"


def _read(checkpoint: str) -> Lengths:
    """Return what a model reads and gives in one pass."""
    from fedcast.models.checkpoints import load_checkpoint

    model = load_checkpoint(checkpoint).config
    return Lengths(context=model.context, horizon=model.horizon)


def _limits(model: Lengths) -> dict[str, str]:
    """Return comments that say what a model sets to its lengths."""
    return {
        "model.context": f"longest context, in time steps; of more than {model.context} the model reads the last {model.context} alone",
        "model.horizon": f"steps trained on, at most {model.horizon}: one pass of the model; evaluation.horizons may be longer",
    }


def _run_name(name: str) -> str:
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name).lstrip("._-")
    return kept or "run"
