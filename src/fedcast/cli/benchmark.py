"""The verb ``benchmark``: a named protocol over several methods and seeds, as one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedcast.cli.options import Json
from fedcast.cli.output import as_json, console, emit, records
from fedcast.errors import SpecError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

BENCHMARKS = ("medical",)


def benchmark(
    name: Annotated[str, typer.Argument(help="medical: ECG and impedance cardiograms of 20 clients (docs/medical.md)", metavar="NAME")],
    checkpoint: Annotated[
        str, typer.Option(help="What is fine-tuned: a folder, or a name on the hub; the default is the paper's")
    ] = "amazon/chronos-t5-tiny",
    strategy: Annotated[str, typer.Option(help="Partition: subjects, sites, modality, or real (real people alone)")] = "subjects",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas")] = "zero_shot,local,fedavg,fedprox,fedla",
    tuning: Annotated[str, typer.Option(help="Which weights train; see `fedcast tunings`")] = "full",
    setting: Annotated[Literal["paper", "small"], typer.Option(help="paper: as there, for a GPU; small: minutes on two cores")] = "paper",
    seeds: Annotated[int, typer.Option(min=1, help="Runs a method")] = 3,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs", metavar="DIR")] = Path("runs/benchmark-medical"),
    json: Json = False,
) -> None:
    """Run a named benchmark: several methods, several seeds, one table; what was done before is not done again."""
    if name not in BENCHMARKS:
        raise UnknownNameError.of("benchmark", name, BENCHMARKS)
    chosen = [method.strip() for method in methods.split(",") if method.strip()]
    if not chosen:
        raise SpecError("no method is named", hint="give --methods, such as zero_shot,fedavg")
    from fedcast.report.console import ProgressObserver
    from fedcast.run.medical import SETTINGS, run_medical

    rows = run_medical(
        checkpoint,
        output,
        strategy=strategy,
        methods=chosen,
        tuning={"name": tuning},
        setting=SETTINGS[setting],
        seeds=seeds,
        observer=lambda label: None if json else ProgressObserver(label=label),
    )
    (output / f"{strategy}-{tuning}.json").write_text(as_json(records(rows)) + "\n", encoding="utf-8")
    if json:
        emit(records(rows))
        return
    console().print(_table(rows, f"medical, {strategy}, {tuning}, {seeds} seed{'s' if seeds > 1 else ''}"))


def _table(rows: pd.DataFrame, title: str) -> Table:
    from rich import box
    from rich.table import Table

    from fedcast.report.tables import BASELINES, pretty_name

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column("model", no_wrap=True)
    table.add_column("clients")
    for column in ("RMSE", "MAE", "sMAPE %", "MB sent", "weights trained", "seconds"):
        table.add_column(column, justify="right")
    ordered = rows.sort_values("model", key=lambda models: models.isin(BASELINES), kind="stable")
    for (model, group), part in ordered.groupby(["model", "group"], sort=False):
        first = part.iloc[0]
        costs = (
            ["", "", ""]
            if model in BASELINES or group != "all"
            else [f"{first.bytes_total / 1e6:,.1f}", f"{int(first.parameters_trained):,}", f"{part.wall_seconds.mean():.0f}"]
        )
        cells = [_spread(part[name], digits) for name, digits in (("rmse", 4), ("mae", 4), ("smape", 2))]
        table.add_row(pretty_name(str(model)) if group == "all" else "", f"{group} ({first.clients})", *cells, *costs)
    return table


def _spread(values: pd.Series[float], digits: int) -> str:
    text = f"{values.mean():.{digits}f}"
    return f"{text} ± {values.std():.{digits}f}" if len(values) > 1 and values.std() > 0 else text
