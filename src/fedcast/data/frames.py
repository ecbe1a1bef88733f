"""Long frames: one shape for every file and frame that comes in.

A person's table is read in its own dialect and columns, checked as a whole, and laid on the regular grid of its frequency, gaps open
as NaN rows. Everything that is wrong is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fedcast.data.arrange import arrange
from fedcast.data.layout import Layout, find_layout, flatten
from fedcast.data.problems import BoolArray, Findings, FloatArray, Series, check_values, note_magnitudes, read_ids, read_target
from fedcast.data.readers import Table, data_suffix, not_a_frame, read_table, stem
from fedcast.data.times import read_times
from fedcast.errors import FrameError, FrameProblem, SourceError


@dataclass(frozen=True)
class Columns:
    """Names of the columns in the person's own file, given back on output."""

    id: str
    time: str
    target: str


@dataclass(frozen=True)
class LongFrame:
    """Series on the regular grid of one frequency.

    Attributes
    ----------
    frame
        Columns ``unique_id`` (str), ``ds`` (datetime64[ns], with its time zone where it has one, or int64) and ``y`` (float64, NaN =
        missing), sorted by ``unique_id`` and ``ds``; every series reaches from its first to its last stamp without a gap.
    freq
        pandas offset alias, or the whole-number step of int64 stamps.
    columns
        Names in the person's own file.
    source
        File name, or ``"frame"``.
    """

    frame: pd.DataFrame
    freq: str | int
    columns: Columns
    source: str


def read_frame(
    source: str | Path | pd.DataFrame,
    *,
    time: str | None = None,
    id: str | None = None,
    target: str | None = None,
    freq: str | int | None = None,
) -> LongFrame:
    """Read a file or a frame in memory, check it and lay it on its grid.

    Long tables are known by their column names (``unique_id, ds, y``; ``item_id, timestamp, target``; ``id, timestamp, target``) or by
    the names given. A time and a target without an id are one series. A time alone makes a wide table: every other column is a series.

    Parameters
    ----------
    source
        CSV, TSV or ``.tsf`` (also ``.gz``, ``.xz``, ``.bz2``), parquet, or a pandas frame.
    time, id, target
        Column names, where they are not recognised.
    freq
        pandas frequency, or a whole number where times are whole numbers; inferred when absent.

    Returns
    -------
    LongFrame
        The series.

    Raises
    ------
    FrameError
        If the frame is malformed; every problem found is listed.
    SourceError
        If the file is missing or cannot be read.
    """
    result, problems = examine(source, time=time, id=id, target=target, freq=freq)
    if result is None or problems:
        raise FrameError(source_name(source), problems)
    return result


def source_name(source: object) -> str:
    """Return the name of a source for messages."""
    return str(source) if isinstance(source, str | Path) else "frame"


def examine(
    source: object,
    *,
    time: str | None = None,
    id: str | None = None,
    target: str | None = None,
    freq: str | int | None = None,
) -> tuple[LongFrame | None, list[FrameProblem]]:
    """Read and check a source without raising for what is wrong in the frame.

    Parameters
    ----------
    source, time, id, target, freq
        As for :func:`read_frame`.

    Returns
    -------
    tuple
        The long frame, ``None`` where it is unusable, and all problems; no problems means that the frame is usable.

    Raises
    ------
    SourceError
        If the file is missing or cannot be read.
    """
    name = source_name(source)
    try:
        table = _open(source, name, time, id, target)
    except FrameError as error:
        return None, list(error.problems)
    findings = Findings(rows=table.rows)
    if table.declared is not None:
        id, time, target = table.declared
    frame = flatten(table.frame, time)
    layout = find_layout(frame, time, id, target, findings)
    if layout is None:
        return None, findings.problems
    single = stem(Path(source)) if isinstance(source, str | Path) else layout.targets[0]
    given = freq if freq is not None else table.freq
    built = _build_wide(frame, layout, given, findings) if layout.wide else _build_long(frame, layout, single, given, findings)
    if built is None or findings.problems:
        return None, findings.problems
    columns = Columns(layout.id or "unique_id", layout.time, "y" if layout.wide else layout.targets[0])
    return LongFrame(built[0], built[1], columns, name), []


def _open(source: object, name: str, time: str | None, id: str | None, target: str | None) -> Table:
    if isinstance(source, pd.DataFrame):
        return Table(source)
    if isinstance(source, str | Path):
        return read_table(Path(source), name, time=time, id=id, target=target)
    kind = type(source).__name__
    repair = "pass a pandas DataFrame or a path: pd.DataFrame(data)"
    if isinstance(source, pd.Series):
        repair = "turn the series into a frame: series.rename('y').rename_axis('ds').reset_index()"
    elif hasattr(source, "to_pandas"):
        repair = "turn it into a pandas frame: frame.to_pandas()"
    raise not_a_frame(name, f"a {kind} is no frame", repair)


def _build_long(
    frame: pd.DataFrame, layout: Layout, single: str, freq: str | int | None, findings: Findings
) -> tuple[pd.DataFrame, str | int] | None:
    target = layout.targets[0]
    if layout.id is None:
        series = Series(np.zeros(len(frame), dtype=np.int64), [single])
    else:
        series = read_ids(frame[layout.id], layout.id, findings)
    stamps = read_times(frame[layout.time], layout.time, findings)
    values = read_target(frame[target], target, findings)
    check_values(values, series, target, layout.id or "unique_id", findings)
    laid = arrange(series, stamps, lambda a, b: _same(values[a], values[b]), layout, freq, findings)
    if laid is None or findings.problems:
        return None
    ids = np.array(series.names, dtype=object)[laid.codes]
    return pd.DataFrame({"unique_id": ids, "ds": laid.times, "y": np.append(values, np.nan)[laid.take]}), laid.freq


def _same(left: FloatArray, right: FloatArray) -> BoolArray:
    same: BoolArray = (left == right) | (np.isnan(left) & np.isnan(right))
    return same


def _build_wide(frame: pd.DataFrame, layout: Layout, freq: str | int | None, findings: Findings) -> tuple[pd.DataFrame, str | int] | None:
    """Lay the one time axis on its grid and take every column along."""
    stamps = read_times(frame[layout.time], layout.time, findings)
    columns: list[FloatArray] = []
    for name in layout.targets:
        before = len(findings.problems)
        column = read_target(frame[name], name, findings, series=name)
        note_magnitudes(column, name, findings, series=name)
        if len(findings.problems) == before and np.isnan(column).all():
            findings.add(
                "all-missing-target",
                f"every value in column {name!r} is missing",
                f"frame = frame.drop(columns={name!r})",
                column=name,
                mask=np.ones(len(column), dtype=bool),
                series=name,
            )
        columns.append(column)
    laid = arrange(
        Series(np.zeros(len(frame), dtype=np.int64), [""]),
        stamps,
        lambda a, b: np.logical_and.reduce([_same(column[a], column[b]) for column in columns]),
        layout,
        freq,
        findings,
    )
    if laid is None or findings.problems:
        return None
    by_name = dict(sorted(zip(layout.targets, columns, strict=True)))
    y = np.concatenate([np.append(column, np.nan)[laid.take] for column in by_name.values()])
    ids = np.repeat(np.array(list(by_name), dtype=object), len(laid.take))
    places = np.tile(np.arange(len(laid.take)), len(by_name))
    return pd.DataFrame({"unique_id": ids, "ds": laid.times[places], "y": y}), laid.freq


def domain_files(folder: str | Path) -> dict[str, dict[str, Path]]:
    """Find the data files of a folder: each file in it is a domain of one dataset, each sub-folder a domain with one dataset a file.

    Hidden files and files that are no data (by their suffix) are passed over; no file is opened.

    Parameters
    ----------
    folder
        The folder.

    Returns
    -------
    dict
        Domain to dataset to file, in the order of names.

    Raises
    ------
    SourceError
        If the folder is missing or holds no data, or two files would have the same name.
    """
    root = Path(folder)
    if not root.exists():
        raise SourceError(f"{folder} does not exist", hint="check the path: a folder of data files, seen from where you are")
    if not root.is_dir():
        raise SourceError(f"{folder} is a file, not a folder", hint="name the folder that holds it: each file in it is a domain")
    domains: dict[str, dict[str, Path]] = {}
    for entry in sorted(root.iterdir()):
        files = sorted(entry.iterdir()) if entry.is_dir() and not entry.name.startswith(".") else [entry]
        for file in files:
            if not file.is_file() or file.name.startswith(".") or data_suffix(file) is None:
                continue
            domain = entry.name if entry.is_dir() else stem(file)
            datasets = domains.setdefault(domain, {})
            if stem(file) in datasets or (entry.is_file() and datasets):
                raise SourceError(
                    f"{file} would be dataset {stem(file)!r} of domain {domain!r} a second time",
                    hint="rename one of the two files or folders",
                )
            datasets[stem(file)] = file
    if not domains:
        raise SourceError(f"{folder} holds no CSV, parquet or .tsf file", hint="put one file a domain, or one sub-folder a domain, into it")
    return domains
