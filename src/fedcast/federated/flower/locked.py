"""What Flower starts in place of its own ``flwr-clientapp`` and ``flwr-serverapp``: the same, but no code other than the relays runs.

Flower lets whoever reaches a SuperLink's Control API ship an app, which every site then imports. Here the app that is shipped is never
imported, and a site does not even unpack it: the relays are fedcast's own, as installed. This stands on names of Flower 1.41 that are
not public; where one is missing, nothing starts.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def client() -> None:
    """Run the client relay for one message."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    from fedcast.federated.flower.client_relay import app

    run_clientapp = import_module("flwr.supernode.runtime.run_clientapp")
    _put(run_clientapp, "install_from_fab", lambda *_args, **_kwargs: None)
    _put(run_clientapp, "install_app_dependencies", lambda *_args, **_kwargs: None)
    _put(run_clientapp, "get_load_client_app_fn", lambda **_kwargs: lambda *_args: app)
    flwr_clientapp()


def server() -> None:
    """Run the server relay for one run."""
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    from fedcast.federated.flower.server_relay import app

    run_serverapp = import_module("flwr.superlink.runtime.run_serverapp")
    start: Any = getattr(run_serverapp, "run_", None)

    def run(grid: Any, context: Any, **_ignored: Any) -> Any:
        return start(grid=grid, context=context, server_app_dir="", loaded_server_app=app)

    _put(run_serverapp, "install_app_dependencies", lambda *_args, **_kwargs: None)
    _put(run_serverapp, "run_", run)
    flwr_serverapp()


def _put(module: Any, name: str, value: Any) -> None:
    if not hasattr(module, name):
        sys.exit(f"Flower's {module.__name__} has no {name}: fedcast is made for flwr 1.41, pip install 'fedcast[flower]'")
    setattr(module, name, value)


if __name__ == "__main__":
    # Flower names its own exit by what the process is called.
    which = sys.argv.pop(1)
    sys.argv[0] = f"flwr-{which}app"
    {"client": client, "server": server}[which]()
