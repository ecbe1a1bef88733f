"""What the verbs print: results on stdout, everything else on stderr, JSON alone on stdout under ``--json``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import typer

from fedcast.errors import SourceError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

PLAIN_WIDTH = 120


def console(*, stderr: bool = False) -> Console:
    """Return a console; where the output is no terminal, tables are 120 characters wide unless ``COLUMNS`` says otherwise."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PLAIN_WIDTH
    return made


@contextmanager
def progress_bar(what: str, *, show: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on stderr while the block runs, and give what it is told by: how much is done, and how much there is.

    Parameters
    ----------
    what
        What is being done.
    show
        ``False`` for no bar; there is none either, and ``None`` is given, where stderr is no terminal.
    """
    out = console(stderr=True)
    if not show or not out.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(compact=True))
    with Progress(TextColumn("{task.description}"), *columns, console=out, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def note(message: str, *, hint: str | None = None) -> None:
    """Print a line for the person to stderr, and a hint on its own line."""
    typer.echo(message, err=True)
    if hint is not None:
        typer.echo(f"hint: {hint}", err=True)


def fail(error: Mapping[str, object], as_json: bool) -> int:
    """Print an error and return its exit code.

    Parameters
    ----------
    error
        ``error`` (the code), ``exit_code``, ``message`` and ``hint``, as :meth:`fedcast.errors.FedcastError.to_json` gives them.
    as_json
        Whether it goes to stdout as JSON, or to stderr in words.
    """
    if as_json:
        emit(error)
    else:
        label = (
            typer.style(f"error[{error['error']}]", fg=typer.colors.RED, bold=True)
            if console(stderr=True).color_system
            else f"error[{error['error']}]"
        )
        typer.echo(f"{label}: {error['message']}", err=True)
        typer.echo(f"hint: {error['hint']}", err=True)
    return int(str(error["exit_code"]))


def emit(document: object) -> None:
    """Print a document as JSON to stdout; see :func:`as_json`."""
    typer.echo(as_json(document))


def as_json(document: object) -> str:
    """Return a document as JSON; numbers that are not finite become ``null``."""
    return json.dumps(_plain(document), indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def check_metric(metric: str) -> None:
    """Refuse a metric that does not exist, before any work is done.

    Raises
    ------
    UnknownNameError
        When no metric has that name.
    """
    from fedcast.report.tables import METRICS

    known = [known.key for known in METRICS]
    if metric not in known:
        raise UnknownNameError.of("metric", metric, known)


def print_results(rows: pd.DataFrame, metric: str = "mse") -> None:
    """Print result rows as one table of a metric, as wide as the terminal allows."""
    from fedcast.report.console import results_table

    out = console()
    out.print(results_table(rows, metric, width=out.width))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a frame's rows as dicts, for :func:`emit`."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def check_ending(path: Path | None, *endings: str) -> None:
    """Refuse an output file whose ending names no format, before any work is done.

    Parameters
    ----------
    path
        The file to be written, if any.
    endings
        Endings that are known; ``.parquet`` and ``.csv`` when none is named.

    Raises
    ------
    SourceError
        When the ending is another one.
    """
    known = endings or (".parquet", ".csv")
    if path is not None and path.suffix not in known:
        raise SourceError(f"cannot write {path}: the ending {path.suffix!r} is not known", hint=f"use {' or '.join(known)}")


def save_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame as parquet or CSV, by the file's ending.

    Raises
    ------
    SourceError
        When the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            frame.to_parquet(path, index=False)
        else:
            with path.open("wb") as file:
                write_csv(frame, file)
    except OSError as error:
        raise SourceError(f"cannot write {path}: {error.strerror}", hint="choose another file with -o") from error


def write_csv(frame: pd.DataFrame, file: BinaryIO) -> None:
    """Write a frame as CSV in UTF-8, without its index."""
    from fedcast.cli.text import csv_pieces

    for piece in csv_pieces(frame):
        file.write(piece)
    file.flush()
