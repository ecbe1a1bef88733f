"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout")]
TimeColumn = Annotated[str | None, typer.Option("--time", help="Name of the time column; known dialects are recognised", metavar="COLUMN")]
IdColumn = Annotated[str | None, typer.Option("--id", help="Name of the series column", metavar="COLUMN")]
TargetColumn = Annotated[str | None, typer.Option("--target", help="Name of the target column", metavar="COLUMN")]
Freq = Annotated[str | None, typer.Option("--freq", help="Pandas frequency such as h or 15min; inferred when absent", metavar="FREQ")]
Model = Annotated[
    Path,
    typer.Option(
        "--model", "-m", help="A run folder (its final model), a model folder, or a published model (folder or hub name)", metavar="DIR"
    ),
]
Metric = Annotated[
    str, typer.Option("--metric", help="Score to show: mse, mae, mase, smape, wql, coverage80 or reconstruction_mse", metavar="NAME")
]
