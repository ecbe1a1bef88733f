"""Reading of files into tables: CSV in its dialects, parquet and the Monash ``.tsf`` format."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from fedcast.data.grid import MONTH_NAMES, Grid, Rule, parse_freq
from fedcast.data.layout import ID_NAMES, long_columns
from fedcast.data.plain import read_plain_csv
from fedcast.data.problems import IntArray
from fedcast.errors import FrameError, FrameProblem, SourceError

_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_TEXT = (".csv", ".tsv")
_PARQUET = (".parquet", ".pq")
# "." is FRED's mark and "?" that of UCI and Monash. "NA" is a region, a ticker and a surname: in id columns only an empty cell is missing.
_MISSING = ["", ".", "?", "NA", "N/A", "n/a", "NaN", "nan", "-NaN", "-nan", "NULL", "null", "None", "<NA>", "#N/A", "#NA"]
_TSF_UNITS = {
    "secondly": "s",
    "minutely": "min",
    "half_hourly": "30min",
    "hourly": "h",
    "daily": "D",
    "weekly": "W",
    "monthly": "MS",
    "quarterly": "QS",
    "yearly": "YS",
}
_TSF_PLURALS = {"seconds": "s", "minutes": "min", "hours": "h", "days": "D", "weeks": "W", "months": "MS", "quarters": "QS", "years": "YS"}
_LAST_YEAR = 2262


@dataclass(frozen=True)
class Table:
    """A file as it was read.

    Attributes
    ----------
    frame
        The table, with the file's own column names.
    rows
        0-based data row in the file of every row of ``frame``; ``None`` where they are the same.
    freq
        Frequency that the file declares.
    declared
        Names of id, time and target that the format fixes (``.tsf``); they go before names given by hand.
    """

    frame: pd.DataFrame
    rows: IntArray | None = None
    freq: str | int | None = None
    declared: tuple[str, str, str] | None = None


def data_suffix(path: Path) -> str | None:
    """Return the suffix that decides how a file is read, such as ``".csv"``, or ``None`` for a file of another kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in (*_TEXT, *_PARQUET, ".tsf") else None


def stem(path: Path) -> str:
    """Return a file's name without its data suffixes."""
    name = path.name
    for suffix in reversed(path.suffixes):
        if suffix.lower() not in (*_TEXT, *_PARQUET, *_OPENERS, ".tsf"):
            break
        name = name[: -len(suffix)]
    return name


def not_a_frame(source: str, message: str, repair: str) -> FrameError:
    """Build the error for something that is no frame at all."""
    return FrameError(source, [FrameProblem("not-a-frame", message, repair)])


def read_table(path: Path, source: str, *, time: str | None = None, id: str | None = None, target: str | None = None) -> Table:
    """Read one data file.

    Parameters
    ----------
    path
        CSV (``,``, ``;``, tab or ``|``), TSV or ``.tsf``, plain or compressed (``.gz``, ``.xz``, ``.bz2``), or parquet.
    source
        The file's name for messages.
    time, id, target
        Columns that were named by hand. Cells of the id column are kept as text; of a long CSV, only these columns are read.

    Raises
    ------
    SourceError
        If the file is missing, is a folder or cannot be read.
    FrameError
        If the file holds no table.
    """
    if not path.exists():
        raise SourceError(f"{source} does not exist", hint="check the path")
    if path.is_dir():
        raise SourceError(f"{source} is a folder", hint="name one of the files in it")
    suffix = data_suffix(path)
    if suffix is None:
        raise not_a_frame(
            source, f"{path.name} is not a CSV, parquet or .tsf file", f"convert it: frame.to_parquet({stem(path) + '.parquet'!r})"
        )
    if suffix in _PARQUET:
        return Table(_read_parquet(path, source))
    text = _read_text(path, source)
    if suffix == ".tsf":
        return _read_tsf(text, source)
    return Table(_read_csv(text, source, time, id, target))


def _read_parquet(path: Path, source: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except OSError as error:
        raise SourceError(f"{source} cannot be read: {error}", hint="check the file, or write it again") from error
    except (pa.ArrowException, ValueError) as error:
        raise not_a_frame(source, f"{path.name} is not a readable parquet file", "write it again: frame.to_parquet(path)") from error


def _read_text(path: Path, source: str) -> str:
    opener = _OPENERS.get(path.suffix.lower())
    try:
        with opener(path) if opener is not None else path.open("rb") as file:
            content: bytes = file.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        damaged = opener is not None and not isinstance(error, PermissionError)
        what = "is damaged or not compressed as its name says" if damaged else f"cannot be read: {error}"
        raise SourceError(
            f"{source} {what}", hint="download or compress the file again" if damaged else "check the file's permissions"
        ) from error
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace")
    if b"\x00" in content[:65536]:
        raise not_a_frame(source, f"{path.name} holds binary data, not text", "export the table as text: frame.to_csv(path, index=False)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _separator(header: str) -> str:
    counts = {mark: header.count(mark) for mark in (",", ";", "\t", "|")}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else ","


def _read_csv(text: str, source: str, time: str | None, id: str | None, target: str | None) -> pd.DataFrame:
    text = text.lstrip("\r\n")
    header = text.split("\n", 1)[0].rstrip("\r")
    if not header.strip():
        return pd.DataFrame()
    separator = _separator(header)
    try:
        names = [name.strip() for name in next(csv.reader([header], delimiter=separator))]
    except csv.Error as error:
        raise not_a_frame(source, f"the header is no line of a table: {error}", "end every line with a line feed") from error
    used = long_columns(names, time, id, target)
    ids = {name for name in names if name == id or name.lower() in ID_NAMES}
    content = text.encode()
    plain = None if used is None else read_plain_csv(content, separator, names, used, ids, _MISSING)
    if plain is not None:
        return plain
    _refuse_ragged(text, separator, len(names), source)
    keys = [f"column {place}" for place in range(len(names))]  # names may repeat, keys do not
    labelled = list(zip(keys, names, strict=True))
    try:
        frame = pd.read_csv(
            io.BytesIO(content),
            sep=separator,
            header=0,
            names=keys,
            usecols=[key for key, name in labelled if used is None or name in used],
            index_col=False,
            keep_default_na=False,
            na_values={key: [""] if name in ids else _MISSING for key, name in labelled},
            dtype={key: object for key, name in labelled if name in ids},
            float_precision="round_trip",
            low_memory=False,
        )
    except (pd.errors.ParserError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise not_a_frame(source, f"the rows are no table: {reason}", "give every row as many cells as the header has columns") from error
    frame.columns = pd.Index(names if used is None else used)
    return frame


def _refuse_ragged(text: str, separator: str, width: int, source: str) -> None:
    """Raise for rows with more cells than the header has columns, which pandas would cut off in silence."""
    bare = re.sub(r'"[^"]*"', "q", text) if '"' in text else text
    content = np.frombuffer(bare.encode(), dtype=np.uint8)
    ends = np.append(np.flatnonzero(content == ord("\n")), len(content))
    marks = np.flatnonzero(content == ord(separator))
    cells = np.diff(np.searchsorted(marks, ends), prepend=0) + 1
    blank = np.diff(ends, prepend=-1) <= 1 + (content[np.maximum(ends - 1, 0)] == ord("\r"))
    cells = cells[~blank][1:]
    long = np.flatnonzero(cells > width)
    if len(long):
        problem = FrameProblem(
            "ragged-rows",
            f"{len(long)} rows have more cells than the header's {width} columns, such as {int(cells[long[0]])}",
            "put cells that hold the separator in quotes, or write decimals with a point",
            row=int(long[0]),
            count=len(long),
        )
        raise FrameError(source, [problem])


def _tsf_freq(text: str) -> str | None:
    name = text.strip().lower()
    if name in _TSF_UNITS:
        return _TSF_UNITS[name]
    match = re.fullmatch(r"(\d+)_([a-z]+?)s?", name)
    if match is None or f"{match[2]}s" not in _TSF_PLURALS:
        return None
    return f"{match[1]}{_TSF_PLURALS[match[2] + 's']}"


@dataclass
class _Header:
    """Header of a ``.tsf`` file."""

    attributes: list[str]
    freq: str | None
    first: int  # index of the first line of data


def _tsf_header(lines: list[str], source: str) -> _Header:
    attributes: list[str] = []
    freq: str | None = None
    for place, line in enumerate(lines):
        words = line.split()
        if not line.startswith("@") or not words:
            continue
        tag = words[0].lower()
        if tag == "@attribute" and len(words) >= 3:
            attributes.append(words[1])
        elif tag == "@frequency" and len(words) >= 2:
            freq = _tsf_freq(words[1])
            if freq is None:
                problem = FrameProblem(
                    "unknown-frequency",
                    f"@frequency {words[1]} is not known",
                    f"write one of {', '.join(_TSF_UNITS)}, or a number as in 10_minutes",
                )
                raise FrameError(source, [problem])
        elif tag == "@data":
            return _Header(attributes, freq, place + 1)
    raise not_a_frame(
        source, "the file has no @data line, so it is not in the .tsf format", "write @data on a line of its own before the series"
    )


def _read_tsf(text: str, source: str) -> Table:
    lines = text.splitlines()
    header = _tsf_header(lines, source)
    body = [line for line in lines[header.first :] if line.strip() and not line.startswith("#")]
    values: list[np.ndarray[Any, Any]] = []
    parts: list[list[str]] = []
    for row, line in enumerate(body):
        pieces = line.split(":")
        # A start such as 2020-01-01 00:00:00 holds colons as well; values never do.
        if len(pieces) < len(header.attributes) + 1:
            problem = FrameProblem(
                "missing-columns",
                f"the line has {len(pieces) - 1} attributes, the header {len(header.attributes)}",
                "complete the line",
                row=row,
            )
            raise FrameError(source, [problem])
        values.append(_tsf_values(pieces[-1], source, row))
        split = len(header.attributes)
        parts.append([*pieces[: split - 1], ":".join(pieces[split - 1 : -1])] if split else [])
    lengths = np.array([len(value) for value in values], dtype=np.int64)
    rows = np.repeat(np.arange(len(body), dtype=np.int64), lengths)
    frame = pd.DataFrame({"unique_id": np.repeat(_tsf_names(header.attributes, parts), lengths)})
    stamps, freq = _tsf_stamps(header, parts, lengths, source)
    frame["ds"] = stamps
    frame["y"] = np.concatenate(values) if values else np.zeros(0)
    return Table(frame, rows, freq, ("unique_id", "ds", "y"))


def _tsf_values(text: str, source: str, row: int) -> np.ndarray[Any, Any]:
    cells = text.replace("?", "nan").split(",")
    try:
        return np.array(cells, dtype=np.float64)
    except ValueError as error:
        parsed = pd.to_numeric(pd.Series(cells), errors="coerce")
        bad = [cell for cell, number in zip(cells, parsed, strict=True) if number != number and cell.strip().lower() != "nan"]
        problem = FrameProblem(
            "mixed-target",
            f"{len(bad)} values are no numbers, such as {bad[0][:40]!r}",
            "write numbers, and ? where a value is missing",
            column="y",
            row=row,
            count=len(bad),
        )
        raise FrameError(source, [problem]) from error


def _tsf_names(attributes: list[str], parts: list[list[str]]) -> np.ndarray[Any, Any]:
    table = pd.DataFrame(parts, columns=attributes, dtype=object) if attributes else pd.DataFrame(index=range(len(parts)))
    texts = table.drop(columns=[name for name in attributes if name == "start_timestamp"])
    if "series_name" in texts and not texts["series_name"].duplicated().any():
        return texts["series_name"].to_numpy(dtype=object)
    joined = (
        texts.agg("/".join, axis=1)
        if len(texts.columns) and len(texts)
        else pd.Series([f"T{place + 1}" for place in range(len(parts))], dtype=object)
    )
    return joined.to_numpy(dtype=object)


def _tsf_stamps(
    header: _Header, parts: list[list[str]], lengths: IntArray, source: str
) -> tuple[pd.Series[Any] | IntArray, str | int | None]:
    """Return the stamp of every value and the frequency; whole numbers where there are no starts, or where they leave the calendar."""
    local = np.arange(lengths.sum(), dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if "start_timestamp" not in header.attributes or header.freq is None:
        return local, 1
    texts = pd.Series([part[header.attributes.index("start_timestamp")].strip() for part in parts], dtype=object)
    dashed = texts.str.replace(r"(\d{1,2})-(\d{2})-(\d{2})$", r"\1:\2:\3", regex=True).where(texts.str.contains(" "), texts)
    starts = pd.to_datetime(dashed, format="ISO8601", errors="coerce")
    if starts.isna().any():
        row = int(np.argmax(starts.isna()))
        problem = FrameProblem(
            "unparsable-times",
            f"the start {texts[row]!r} is no time",
            "write it as 2020-01-31 00-00-00",
            column="start_timestamp",
            row=row,
            count=int(starts.isna().sum()),
        )
        raise FrameError(source, [problem])
    rule = parse_freq(header.freq)
    index = pd.DatetimeIndex(starts).as_unit("ns")
    years = (rule.step / 12 if rule.unit == "month" else rule.step / (365.25 * 86_400e9)) * lengths
    if (index.year + years >= _LAST_YEAR).any():
        return local, 1
    return _tsf_ahead(index, rule, lengths, local), header.freq


def _tsf_ahead(starts: pd.DatetimeIndex, rule: Rule, lengths: IntArray, local: IntArray) -> pd.Series[Any]:
    nanoseconds = starts.asi8
    if rule.unit == "tick":
        return pd.Series(pd.DatetimeIndex(np.repeat(nanoseconds, lengths) + rule.step * local))
    # Starts of monthly and longer series are counted from the first of their month; pandas knows no other monthly step.
    months = starts.year.to_numpy().astype(np.int64) * len(MONTH_NAMES) + starts.month.to_numpy() - 1
    units = np.repeat(months, lengths) + rule.step * local
    return pd.Series(pd.DatetimeIndex(Grid(rule, None).stamps(units, np.repeat(nanoseconds % 86_400_000_000_000, lengths))))
