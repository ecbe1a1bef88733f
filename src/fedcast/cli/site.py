"""The verbs of a site in a consortium: ``fedcast site start``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from fedcast.cli.output import note

Data = Annotated[Path, typer.Option("--data", help="The site's file of series, or its folder of files", metavar="PATH", show_default=False)]
Kit = Annotated[Path, typer.Option("--kit", help="The site's kit, as it came from the coordinator", metavar="DIR")]
State = Annotated[
    Path | None,
    typer.Option("--state", help="Private folder for what the site keeps; KIT/state when absent", metavar="DIR", show_default=False),
]


def start(data: Data, kit: Kit = Path("."), state: State = None) -> None:
    """Serve a consortium's runs with this site's data until it is stopped; the data never leave."""
    from fedcast.consortium.kits import SiteKit
    from fedcast.consortium.station import serve

    signal.signal(signal.SIGTERM, _stop)
    opened = SiteKit.open(kit)
    serve(opened, data.absolute(), (state or kit / "state").absolute(), note)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    # Once is enough: a second one must not cut short how the children are ended.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)
