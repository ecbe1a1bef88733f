"""Verbs that use a trained model: ``forecast`` and ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedcast.cli.options import Freq, IdColumn, Json, Metric, Model, TargetColumn, TimeColumn
from fedcast.cli.output import check_ending, check_metric, emit, note, print_results, progress_bar, records, save_frame, write_csv
from fedcast.errors import QuantileError


def forecast(
    model: Model,
    data: Annotated[Path, typer.Option("--data", "-d", help="File with the history of the series", metavar="FILE")],
    horizon: Annotated[int, typer.Option("--horizon", min=1, help="Steps to forecast", metavar="STEPS")],
    quantiles: Annotated[
        str, typer.Option("--quantiles", help="Quantile levels, separated by commas", metavar="LEVELS", show_default=True)
    ] = "0.1,0.5,0.9",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this parquet or CSV file instead of stdout", metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw the forecasts on this self-contained page", metavar="FILE.html")
    ] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option("--precision", help="Number format to compute in; 'auto' is bfloat16 where the processor multiplies it by itself"),
    ] = "float32",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Series a batch", metavar="COUNT")] = 64,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Threads, each on a core; one a core when absent", metavar="COUNT"),
    ] = None,
    time: TimeColumn = None,
    id: IdColumn = None,
    target: TargetColumn = None,
    freq: Freq = None,
    json: Json = False,
) -> None:
    """Forecast every series of a file; CSV on stdout unless -o names a file."""
    levels = parse_levels(quantiles)
    check_ending(output)
    check_ending(plot, ".html")
    from fedcast.data.frames import read_frame
    from fedcast.models.forecaster import Forecaster

    history = read_frame(data, time=time, id=id, target=target, freq=freq)
    forecaster = Forecaster.from_pretrained(model)
    with progress_bar("forecasting", show=not json) as progress:
        frame = forecaster.predict(history, horizon, levels, batch_size=batch_size, precision=precision, workers=workers, progress=progress)
    if output is not None:
        save_frame(frame, output)
    if plot is not None:
        from fedcast.cli.plot import write_plot

        write_plot(history, frame, levels, plot)
    if json:
        emit({"rows": len(frame), "output": output, "plot": plot} if output is not None else records(frame))
    elif output is None:
        write_csv(frame, typer.get_binary_stream("stdout"))
    else:
        typer.echo(f"wrote {len(frame)} rows to {output}")
    if plot is not None and not json:
        note(f"wrote {plot}")


def parse_levels(text: str) -> tuple[float, ...]:
    """Read quantile levels separated by commas.

    Raises
    ------
    QuantileError
        When one is not a number between 0 and 1.
    """
    levels = []
    for part in text.split(","):
        try:
            level = float(part)
        except ValueError:
            level = -1.0
        if not 0 < level < 1:
            raise QuantileError(
                f"{part.strip()!r} is no quantile level", hint="write numbers between 0 and 1, such as --quantiles 0.1,0.5,0.9"
            )
        levels.append(level)
    return tuple(levels)


def evaluate(
    model: Model,
    data: Annotated[str, typer.Option("--data", "-d", help="'bundled', 'catalogue', a folder of domains, or a file", metavar="SOURCE")],
    domain: Annotated[list[str] | None, typer.Option("--domain", help="Score this domain only; may be repeated", metavar="NAME")] = None,
    horizon: Annotated[
        int | None, typer.Option("--horizon", min=1, help="Steps to forecast; the model's own when absent", metavar="STEPS")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline", help="Score this too: seasonal_naive (the default), auto_ets, auto_theta; may be repeated", metavar="NAME"
        ),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Test windows a domain", metavar="COUNT")] = 64,
    metric: Metric = "mse",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the rows to this parquet or CSV file", metavar="FILE")
    ] = None,
    time: TimeColumn = None,
    id: IdColumn = None,
    target: TargetColumn = None,
    freq: Freq = None,
    json: Json = False,
) -> None:
    """Score a model on the test part of each domain, beside the seasonal naive forecast."""
    check_ending(output)
    check_metric(metric)
    from fedcast.run.evaluate import evaluate as score

    rows = score(
        model,
        data,
        horizon=horizon,
        windows=windows,
        baselines=baseline or ("seasonal_naive",),
        domains=domain or (),
        time=time,
        id=id,
        target=target,
        freq=freq,
    )
    if output is not None:
        save_frame(rows, output)
    if json:
        emit(records(rows))
    else:
        print_results(rows.drop(columns="held_out", errors="ignore"), metric)  # a model folder does not say what it was trained on
