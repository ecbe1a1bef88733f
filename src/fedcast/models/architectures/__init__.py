"""Model architectures beside the patch transformer, one file each; importing this package registers all of them."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from fedcast.errors import UnknownNameError
from fedcast.models.base import ModelConfig
from fedcast.models.patch import ARCHITECTURES, PatchTransformer

# The folder is the registry: only fedcast's own files are imported here, never a name from a spec, message or checkpoint.
for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def build_model(config: ModelConfig, seed: int = 0) -> PatchTransformer:
    """Build the model that a configuration describes, with initial weights drawn from ``seed``.

    Raises
    ------
    UnknownNameError
        When no architecture has that name.
    """
    if config.architecture not in ARCHITECTURES:
        raise UnknownNameError.of("architecture", config.architecture, ARCHITECTURES)
    return ARCHITECTURES[config.architecture](config, seed)
