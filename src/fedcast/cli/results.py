"""Verbs after a run: ``compare`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcast.cli.options import Json, Metric
from fedcast.cli.output import check_ending, check_metric, console, emit, print_results, records, save_frame
from fedcast.errors import SpecError


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders", metavar="RUN...", show_default=False)],
    metric: Metric = "mse",
    over: Annotated[
        str | None,
        typer.Option("--over", help="Fit a scaling curve over this numeric key, such as data.share or data.clients", metavar="KEY"),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="With --over: write the curves to this page", metavar="FILE")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the rows to this parquet or CSV file", metavar="FILE")
    ] = None,
    json: Json = False,
) -> None:
    """Compare runs: scores of every model on every domain."""
    check_ending(output)
    check_ending(html, ".html")
    check_metric(metric)
    if over is not None:
        _print_scaling(runs, over, metric, html, output, json)
        return
    if html is not None:
        raise SpecError(
            "--html draws scaling curves, and there is no key to draw them over", hint="add --over KEY, such as --over data.share"
        )
    from fedcast.run.compare import compare as compare_runs

    rows = compare_runs(runs)
    if output is not None:
        save_frame(rows, output)
    if json:
        emit(records(rows))
    else:
        print_results(rows, metric)


def _print_scaling(runs: list[Path], over: str, metric: str, html: Path | None, output: Path | None, json: bool) -> None:
    from fedcast.run.scaling import scaling

    curve = scaling(runs, over, metric=metric)
    if output is not None:
        save_frame(curve.rows, output)
    if html is not None:
        from fedcast.report.scaling import write_scaling

        write_scaling([curve], html, title=f"Scaling over {over}")
    if json:
        fits = [{"held_out": held_out, **fit.to_dict()} for held_out, fit in curve.fits.items() if fit is not None]
        names = {"over": over, "axis": curve.axis, "metric": metric, "method": curve.method}
        emit({**names, "rows": records(curve.points), "fit": fits, "notes": list(curve.notes)})
        return
    from fedcast.report.console import scaling_tables

    out = console()
    for table in scaling_tables(curve):
        out.print(table)
    if html is not None:
        typer.echo(f"wrote {html}")


def report(
    run: Annotated[Path, typer.Argument(help="A run folder", metavar="RUN", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page to write; RUN/report.html when absent", metavar="FILE")
    ] = None,
    json: Json = False,
) -> None:
    """Write a run's report: one self-contained HTML page."""
    from fedcast.report.page import write_report

    page = write_report(run, output)
    if json:
        emit({"report": page})
    else:
        typer.echo(f"wrote {page}")
