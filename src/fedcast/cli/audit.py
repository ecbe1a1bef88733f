"""The verbs of ``fedcast audit``: whether an audit log is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcast.cli.options import Json
from fedcast.cli.output import emit


def verify(
    file: Annotated[Path, typer.Argument(help="The audit.jsonl of a run folder or of a site", metavar="FILE")],
    head: Annotated[
        str | None, typer.Option("--head", help="A head that was written down: the log must hold it still", metavar="HASH")
    ] = None,
    json: Json = False,
) -> None:
    """Check that no line of an audit log was altered, removed or moved, and print its head.

    Write the head down elsewhere: without it, nobody can tell that lines at the end are gone, or that all of the log was written anew.
    """
    from fedcast.federated.audit import verify as check

    found = check(file, head)
    if json:
        emit({"lines": found.lines, "head": found.head, "head_found_in_line": found.found, "events": found.events})
        return
    typer.echo(f"{found.lines} lines hold together")
    if head is not None:
        typer.echo(f"the head that was written down is line {found.found}")
    typer.echo(f"head {found.head}")
