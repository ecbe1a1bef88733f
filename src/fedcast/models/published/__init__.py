"""Adapters of published models, one file each; importing this package registers all of them, and imports none of their libraries."""

import pkgutil
from importlib import import_module

# The folder is the registry: only fedcast's own files are imported here, never a name from a spec, message or checkpoint.
for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
