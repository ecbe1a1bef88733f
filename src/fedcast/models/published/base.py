"""The contract of a published model: a thin adapter on the model's own library.

An adapter is one file: a subclass of :class:`Published` that says how its library builds, runs, trains and saves the model. The
library is imported when a model is built, never before.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.errors import MissingExtraError, ModelError
from fedcast.models.base import Forecast
from fedcast.models.contract import Encoding, OwnLossModel
from fedcast.safe import UnsafeError, read_json_file

__all__ = ["FAMILIES", "Encoding", "Library", "Published", "PublishedConfig", "missing_as_nan", "read_json"]

FAMILIES: dict[str, type[Published]] = {}
"""Adapters by the name of their model family."""

_LARGEST = 1 << 24  # bytes: an index of many files of weights is longer than any configuration


@dataclass(frozen=True)
class Library:
    """The library that computes a published model.

    Attributes
    ----------
    package, module
        Its name on PyPI and the module it installs.
    install
        The command that installs it beside fedcast, or apart.
    needs
        Further modules without which it does not compute the model.
    """

    package: str
    module: str
    install: str
    needs: tuple[str, ...] = ()

    @property
    def installed(self) -> str | None:
        """The installed version; ``None`` where there is none, or where a module that it needs is not there."""
        if any(find_spec(module) is None for module in (self.module, *self.needs)):
            return None
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def require(self, family: str) -> None:
        """Raise :class:`MissingExtraError`, naming the command, unless the library is installed."""
        if self.installed is None:
            raise MissingExtraError(f"the models of {family} need the library {self.package}", hint=self.install)


@dataclass(frozen=True)
class PublishedConfig:
    """Shape of a published model.

    Attributes
    ----------
    family
        Name of its adapter.
    context, horizon
        Longest context that is read, and the steps forecast in one pass.
    patch
        Time steps a token stands for.
    d_model
        Width of the features.
    """

    family: str
    context: int
    horizon: int
    patch: int
    d_model: int

    @property
    def architecture(self) -> str:
        """The family: what :class:`~fedcast.models.base.ModelConfig` calls its architecture."""
        return self.family

    @property
    def size(self) -> str:
        """What stands in result rows where a native model has the name of its size."""
        return self.family


class Published(OwnLossModel):
    """A published model behind fedcast's contract.

    Class attributes
    ----------------
    family
        Its name in ``fedcast models``.
    summary
        One line: what it is.
    library
        What computes it.
    hub
        Names of its published checkpoints on the Hugging Face hub, the smallest first.
    licence
        Licences of code and weights.
    heads
        Prefixes of the names, within :attr:`network`, of the parameters of its forecasting head.
    decoders
        Prefixes of the names of the parameters of its decoder, where it has one.
    lora_targets
        Names of the linear maps that LoRA adapts where nothing else is asked for (as peft's ``target_modules``).
    quantiles
        ``"learnt"``, ``"sampled"`` or ``"none"``: a point model repeats its point at every level.

    Attributes
    ----------
    network
        The library's own module; all parameters are its.
    settings
        What :meth:`drawn` makes a model of the same shape from: the library's configuration.

    Notes
    -----
    Dropout is off in training too, as in the native models: the same batch gives the same gradient, whatever the number of threads.
    """

    family: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    library: ClassVar[Library]
    hub: ClassVar[tuple[str, ...]] = ()
    licence: ClassVar[str] = ""
    heads: ClassVar[tuple[str, ...]] = ()
    decoders: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[tuple[str, ...]] = ()
    quantiles: ClassVar[str] = "learnt"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the adapter under its family's name; what several adapters share has none."""
        super().__init_subclass__(**kwargs)
        if cls.family:
            FAMILIES[cls.family] = cls

    network: Any

    def __init__(self, network: nn.Module, config: PublishedConfig, settings: Any) -> None:
        super().__init__()
        self.network = network.requires_grad_(True)
        self.config = config
        self.settings = settings

    def part(self, name: str) -> str:
        """Return the name with ``heads.`` or ``decoder.`` in front where it is one of theirs, else ``encoder.``."""
        inner = name.removeprefix("network.")
        part = "heads" if inner.startswith(self.heads) else "decoder" if inner.startswith(self.decoders) else "encoder"
        return f"{part}.{inner}"

    @classmethod
    @abstractmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint's ``config.json`` describes a model of this family."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path) -> Self:
        """Read a checkpoint in the library's own format; the library is installed. Weights only: nothing in the folder is executed."""

    @classmethod
    @abstractmethod
    def drawn(cls, settings: Any, seed: int) -> Self:
        """Return a model of the shape that the library's configuration says, with weights drawn from ``seed`` as the library draws them."""

    @classmethod
    @abstractmethod
    def tiny_settings(cls) -> Any:
        """Return the configuration of a tiny model (150 kB or less on disk); the library is installed."""

    @classmethod
    def tiny(cls, seed: int) -> Self:
        """Return a tiny model with random weights: for tests and for trying a run without a network.

        Raises
        ------
        MissingExtraError
            When the library is not installed.
        """
        cls.library.require(cls.family)
        return cls.drawn(cls.tiny_settings(), seed)

    def fresh(self, seed: int) -> Self:
        """Return a model of the same shape with newly drawn weights."""
        return self.drawn(self.settings, seed)

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the checkpoint in the library's own format into an existing folder; :meth:`read` then gives the same bits."""

    @abstractmethod
    def forecast(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast ``horizon`` steps in data units; quantiles sorted; as :meth:`forward`, which has checked the arguments."""

    def forward(self, context: Tensor, mask: Tensor, horizon: int) -> Forecast:
        """Forecast in data units, for any horizon; see :class:`~fedcast.models.contract.Model`."""
        if context.dim() != 2 or context.shape != mask.shape:
            raise ModelError(
                f"context {tuple(context.shape)} and mask {tuple(mask.shape)} do not fit",
                hint="give both as [windows, steps], of the same shape",
            )
        if horizon < 1:
            raise ModelError(f"a horizon of {horizon} steps is none", hint="ask for at least 1 step")
        if context.shape[1] == 0:  # no library takes an empty series
            context, mask = context.new_zeros(len(context), 1), mask.new_zeros(len(mask), 1)
        mask = mask.bool() & context.isfinite()
        return self.forecast(torch.where(mask, context, 0.0)[:, -self.config.context :], mask[:, -self.config.context :], horizon)

    def check_target(self, batch: Batch) -> None:
        """Refuse targets that are longer than one pass, by :class:`ModelError`."""
        steps = batch.target.shape[1]
        if steps > self.config.horizon:
            raise ModelError(
                f"{self.family} forecasts {self.config.horizon} steps a pass and cannot be trained on {steps}",
                hint=f"set model.horizon to at most {self.config.horizon}; longer horizons can be forecast",
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the checkpoint in the library's own format, which the library reads too."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.write(path)


def missing_as_nan(values: Tensor, mask: Tensor) -> Tensor:
    """Return values [B, L] in float32 with NaN where ``mask`` is False, as most libraries mark what is missing."""
    return torch.where(mask, values.float(), torch.nan)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; an empty one where the file is missing or holds something else."""
    try:
        content = read_json_file(path.resolve(), _LARGEST)
    except (OSError, RuntimeError, UnsafeError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object to a file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
