"""The verb ``landscape``: how sharply the loss bends around what runs ended with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedcast.cli.options import Json
from fedcast.cli.output import check_ending, console, emit, progress_bar


def landscape(
    runs: Annotated[list[Path], typer.Argument(help="Run folders over the same data", metavar="RUN...", show_default=False)],
    domain: Annotated[
        str | None, typer.Option("--domain", help="Whose windows; the first training domain when absent", metavar="NAME")
    ] = None,
    part: Annotated[Literal["validation", "test"], typer.Option("--part", help="Which part of its series")] = "test",
    windows: Annotated[int, typer.Option("--windows", min=1, help="The most windows", metavar="COUNT")] = 64,
    html: Annotated[
        Path | None, typer.Option("--html", help="Compute the loss on a plane too, and draw it on this page", metavar="FILE")
    ] = None,
    grid: Annotated[int, typer.Option("--grid", min=2, help="With --html: points along each direction", metavar="COUNT")] = 11,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the directions and estimates", metavar="SEED")] = 0,
    json: Json = False,
) -> None:
    """Show how sharply the loss bends around the final models of runs, on the same windows."""
    check_ending(html, ".html")
    from fedcast.run.landscape import surroundings

    total = len(runs) * (grid**2 + 2)
    with progress_bar("loss landscape", show=html is not None and not json) as bar:
        found = surroundings(
            runs,
            domain=domain,
            part=part,
            windows=windows,
            grid=grid if html is not None else None,
            seed=seed,
            progress=None if bar is None else lambda done: bar(done, total),
        )
    if html is not None:
        from fedcast.report.landscape import write_landscapes

        write_landscapes(found, html)
    if json:
        sharp = [{**vars(each.sharpness), "ratio": each.sharpness.ratio} for each in found]
        rows = [{"run": each.run, "domain": each.domain, "loss": each.loss, **row} for each, row in zip(found, sharp, strict=True)]
        emit({"runs": rows, "html": html})
        return
    from rich import box
    from rich.table import Table

    from fedcast.report.landscape import SHARPNESS_COLUMNS, sharpness_rows

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, title in enumerate(SHARPNESS_COLUMNS):
        table.add_column(title, justify="right" if place else "left", overflow="fold")
    for row in sharpness_rows(found):
        table.add_row(*row)
    console().print(table)
    if html is not None:
        typer.echo(f"wrote {html}")
