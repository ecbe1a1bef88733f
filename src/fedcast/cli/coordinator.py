"""The verb ``coordinator start``: a consortium's coordinator, in the foreground."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedcast.cli.output import note


def start(
    kit: Annotated[Path, typer.Option("--kit", help="The coordinator's kit", metavar="DIR")] = Path("coordinator"),
    proxy: Annotated[bool, typer.Option("--proxy", help="Start nginx too, with the kit's configuration: the one door for sites")] = False,
) -> None:
    """Run a consortium's coordinator until it is stopped: its SuperLink on loopback, with the sites' keys registered.

    Writes a line to stderr for each site that joins, leaves or is refused. SIGTERM and Ctrl-C end it with all its processes.
    """
    import os
    import signal

    from fedcast.consortium.coordinator import Coordinator
    from fedcast.consortium.kits import CoordinatorKit

    def end(*_: object) -> None:
        raise typer.Exit

    os.umask(0o077)  # what Flower writes, models among it, is for this account alone
    opened = CoordinatorKit.open(kit)
    before = signal.signal(signal.SIGTERM, end)
    try:
        with Coordinator(opened, proxy=proxy, say=_say) as coordinator:
            coordinator.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    note(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}")
