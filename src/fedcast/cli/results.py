"""Verbs after a run: ``compare`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcast.cli.options import Json, Metric
from fedcast.cli.output import check_ending, check_metric, emit, print_results, records, save_frame


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders", metavar="RUN...", show_default=False)],
    metric: Metric = "mse",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the rows to this parquet or CSV file", metavar="FILE")
    ] = None,
    json: Json = False,
) -> None:
    """Compare runs: scores of every model on every domain."""
    check_ending(output)
    check_metric(metric)
    from fedcast.run.compare import compare as compare_runs

    rows = compare_runs(runs)
    if output is not None:
        save_frame(rows, output)
    if json:
        emit(records(rows))
    else:
        print_results(rows, metric)


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
