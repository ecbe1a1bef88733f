"""Guards: steps around any method, a list in the spec. Importing the package registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

from fedcast.federated.guards.base import Guards as Guards

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
