"""The verb ``run``: any spec on any fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcast.cli.options import Json
from fedcast.cli.output import note
from fedcast.cli.train import Assignments, Output, Spec, read_spec, show_run

Fleet = Annotated[
    str | None, typer.Option("--fleet", help="threads, processes or flower; the spec's when absent", metavar="FLEET", show_default=False)
]
Kit = Annotated[Path, typer.Option("--kit", help="The coordinator's kit, for --fleet flower", metavar="DIR")]
Wait = Annotated[float, typer.Option("--wait", help="Seconds to wait until all sites of the run are online", metavar="SECONDS", min=0)]


def run(
    spec: Spec,
    fleet: Fleet = None,
    kit: Kit = Path("coordinator"),
    wait: Wait = 120.0,
    set: Assignments = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Run a spec on any fleet: threads, processes, or the sites of a consortium; a run that was stopped goes on where it was.

    Trains from scratch, or fine-tunes where ``model.checkpoint`` is set. On a consortium ``data.domains`` and ``data.held_out`` name
    sites, and each site reads its own data. Every key of the spec is a flag too.
    """
    described = read_spec(spec, [*(set or ()), *([f"federation.fleet={fleet}"] if fleet else ())], output)
    from fedcast.report.console import ProgressObserver
    from fedcast.run.finetune import finetune
    from fedcast.run.pretrain import pretrain
    from fedcast.run.remote import Consortium

    train = pretrain if described.model.checkpoint is None else finetune
    consortium = Consortium(kit, wait, note)
    show_run(train(described, output=output, observer=None if json else ProgressObserver(), consortium=consortium), json)
