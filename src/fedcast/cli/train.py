"""``fedcast pretrain``: one spec, one run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcast.cli.options import Json
from fedcast.cli.output import emit, print_results, records


def pretrain(
    spec: Annotated[Path, typer.Argument(help="A spec; write one with `fedcast init`", metavar="SPEC.toml", show_default=False)],
    set: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the spec, such as federation.rounds=5", metavar="KEY=VALUE")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder; runs/<name of the spec> when absent", metavar="DIR")
    ] = None,
    json: Json = False,
) -> None:
    """Train a model from scratch over separate domains; a run that was stopped goes on where it was.

    Every key of the spec is a flag too, such as ``--federation.rounds 5``.
    """
    from fedcast.spec import load_spec

    described = load_spec(spec, set or ())  # before torch is imported, so that a wrong key is named at once
    from fedcast.report.console import ProgressObserver
    from fedcast.report.page import write_report
    from fedcast.run.pretrain import pretrain as train

    run = train(described, output=output, observer=None if json else ProgressObserver())
    page = write_report(run.folder)
    results = run.results()
    if json:
        emit({"run": run.folder, "final": run.final, "best": run.best, "report": page, "results": records(results)})
        return
    print_results(results)
    for label, path in (("model", run.best), ("report", page)):
        typer.echo(f"{label:7} {path}")
