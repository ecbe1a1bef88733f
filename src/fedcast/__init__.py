"""fedcast: time series foundation models trained over data that cannot be pooled.

Everything public is listed in ``__all__`` and imported when it is first used, so that ``import fedcast`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedcast.version import __version__

if TYPE_CHECKING:
    from fedcast.data.check import check_frame
    from fedcast.data.frames import read_frame
    from fedcast.errors import FedcastError
    from fedcast.models.forecaster import Forecaster
    from fedcast.run.compare import compare
    from fedcast.run.evaluate import evaluate as evaluate_model
    from fedcast.run.finetune import finetune
    from fedcast.run.pretrain import pretrain
    from fedcast.spec import RunSpec, load_spec

__all__ = [
    "FedcastError",
    "Forecaster",
    "RunSpec",
    "__version__",
    "check_frame",
    "compare",
    "evaluate_model",
    "finetune",
    "load_spec",
    "pretrain",
    "read_frame",
]

# ``evaluate`` is a folder of this package, so the verb is exported under a name of its own.
_HOMES = {
    "FedcastError": "errors:FedcastError",
    "Forecaster": "models.forecaster:Forecaster",
    "RunSpec": "spec:RunSpec",
    "check_frame": "data.check:check_frame",
    "compare": "run.compare:compare",
    "evaluate_model": "run.evaluate:evaluate",
    "finetune": "run.finetune:finetune",
    "load_spec": "spec:load_spec",
    "pretrain": "run.pretrain:pretrain",
    "read_frame": "data.frames:read_frame",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fedcast' has no attribute {name!r}")
    module, _, attribute = home.partition(":")
    value = getattr(import_module(f"fedcast.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
