"""What can be wrong with the columns of a frame, found for all rows at once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedcast.errors import FrameProblem

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

LARGEST = float(np.finfo(np.float32).max)
_UNREADABLE = {"text-target", "mixed-target", "complex-target", "non-numeric-target"}
_NUMBER_KINDS = {"floating", "integer", "mixed-integer-float", "decimal", "boolean", "empty"}


@dataclass
class Findings:
    """Problems of one frame, located by row and series.

    Attributes
    ----------
    rows
        0-based data row in the file for every row held in memory; ``None`` where they are the same.
    labels
        Name of the series for every row, ``None`` where there is no series column.
    problems
        What was found, in the order of finding.
    """

    rows: IntArray | None = None
    labels: npt.NDArray[np.object_] | None = None
    problems: list[FrameProblem] = field(default_factory=list)

    def add(
        self,
        kind: str,
        message: str,
        repair: str,
        *,
        column: str | None = None,
        mask: BoolArray | None = None,
        series: str | None = None,
        count: int | None = None,
    ) -> None:
        """Note one problem; ``mask`` marks the offending rows and gives row, series and count."""
        row = None
        if mask is not None:
            place = int(np.argmax(mask))
            if self.rows is not None:
                offending = np.flatnonzero(mask)
                place = int(offending[np.argmin(self.rows[offending])])
            row = place if self.rows is None else int(self.rows[place])
            count = int(mask.sum()) if count is None else count
            if series is None and self.labels is not None and isinstance(self.labels[place], str):
                series = self.labels[place]
        self.problems.append(FrameProblem(kind, message, repair, column=column, series=series, row=row, count=count))


@dataclass(frozen=True)
class Series:
    """Which series each row belongs to.

    Attributes
    ----------
    codes
        int64 [n], index into ``names``; -1 where the id is null.
    names
        Names in sorted order.
    """

    codes: IntArray
    names: list[str]


def _id_text(value: Hashable) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def read_ids(column: pd.Series[Any], name: str, findings: Findings) -> Series:
    """Turn an id column of any type into codes and names; null and empty ids are noted.

    Parameters
    ----------
    column
        The ids, [n].
    name
        The column's name, for the message.
    findings
        Where problems go; its ``labels`` are set, so that later problems can name their series.
    """
    try:
        raw, uniques = pd.factorize(column.astype(object))
    except TypeError:  # lists and the like have no hash
        raw, uniques = pd.factorize(column.astype(object).map(str, na_action="ignore"))
    texts = np.array([_id_text(value) for value in uniques], dtype=object)
    names, inverse = (
        np.unique(texts.astype(str), return_inverse=True) if len(texts) else (np.array([], dtype=str), np.array([], dtype=np.int64))
    )
    empty = bool(len(names)) and not names[0]
    lookup = np.append(inverse.astype(np.int64) - empty, -1)
    codes = lookup[raw]
    kept = [str(text) for text in (names[1:] if empty else names)]
    findings.labels = np.array([*kept, None], dtype=object)[codes]
    null = codes < 0
    if null.any():
        findings.add(
            "null-ids",
            f"{int(null.sum())} rows have no id in column {name!r}",
            f"frame = frame[frame[{name!r}].notna() & (frame[{name!r}] != '')]",
            column=name,
            mask=null,
        )
    return Series(codes, kept)


def read_target(column: pd.Series[Any], name: str, findings: Findings, *, series: str | None = None) -> FloatArray:
    """Turn a target column into float64 [n]; what is no real number is noted and becomes NaN.

    Booleans are valid and become 0 and 1; Python numbers, ``Decimal`` and ``None`` in an object column are valid as well. Numbers that
    are stored as text are refused, since a silent conversion would also swallow the cells that are no numbers.

    Parameters
    ----------
    column
        The values, [n].
    name
        The column's name, for the message.
    findings
        Where problems go.
    series
        Name of the series, where the column is one (wide frames).
    """
    if pd.api.types.is_complex_dtype(column.dtype):
        values = column.to_numpy()
        _note_complex(np.abs(values.imag) > 0, len(values), name, findings, series)
        return np.full(len(column), np.nan)
    if pd.api.types.is_bool_dtype(column.dtype) or pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    if pd.api.types.is_datetime64_any_dtype(column.dtype) or isinstance(column.dtype, pd.PeriodDtype) or column.dtype.kind == "m":
        findings.add(
            "non-numeric-target",
            f"column {name!r} holds {column.dtype}, not numbers",
            f"name the column of values: target=..., or drop this one: frame = frame.drop(columns={name!r})",
            column=name,
            mask=column.notna().to_numpy(dtype=bool),
            series=series,
        )
        return np.full(len(column), np.nan)
    return _read_objects(column.astype(object), name, findings, series)


def _note_complex(imaginary: BoolArray, size: int, name: str, findings: Findings, series: str | None) -> None:
    mask = imaginary if imaginary.any() else np.ones(size, dtype=bool)
    findings.add(
        "complex-target",
        f"column {name!r} holds complex numbers",
        f"frame[{name!r}] = frame[{name!r}].to_numpy().real",
        column=name,
        mask=mask,
        series=series,
    )


def _read_objects(column: pd.Series[Any], name: str, findings: Findings, series: str | None) -> FloatArray:
    kind = pd.api.types.infer_dtype(column, skipna=True)
    present = column.notna().to_numpy(dtype=bool)
    if kind in _NUMBER_KINDS:
        try:
            return np.asarray(column.where(column.notna(), np.nan), dtype=np.float64)
        except OverflowError:  # whole numbers over 1e308
            small = column.map(lambda value: value if abs(value) < 1e308 else np.inf, na_action="ignore")
            return np.asarray(small.where(column.notna(), np.nan), dtype=np.float64)
    if kind == "string":
        values = np.asarray(pd.to_numeric(column, errors="coerce"), dtype=np.float64)
        text = present & np.isnan(values)
        _note_text(column, present, text, name, findings, series)
        return values
    number = np.fromiter((isinstance(value, Real | Decimal) for value in column), dtype=bool, count=len(column))
    imaginary = np.fromiter((isinstance(value, complex) for value in column), dtype=bool, count=len(column))
    if imaginary.any():
        _note_complex(imaginary, len(column), name, findings, series)
    other = present & ~number & ~imaginary
    if other.any():
        kind = "mixed-target" if number[present].any() else "non-numeric-target"
        findings.add(
            kind,
            f"column {name!r} mixes numbers with other types, such as {_short(column.iloc[int(np.argmax(other))])}",
            f"frame[{name!r}] = pd.to_numeric(frame[{name!r}], errors='coerce')",
            column=name,
            mask=other,
            series=series,
        )
    return np.asarray(column.where(number & present, np.nan), dtype=np.float64)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _note_text(column: pd.Series[Any], present: BoolArray, text: BoolArray, name: str, findings: Findings, series: str | None) -> None:
    repair = f"frame[{name!r}] = pd.to_numeric(frame[{name!r}], errors='coerce')"
    if not text.any():
        findings.add(
            "text-target",
            f"column {name!r} holds numbers stored as text",
            f"frame[{name!r}] = pd.to_numeric(frame[{name!r}])",
            column=name,
            mask=present,
            series=series,
        )
        return
    example = str(column.iloc[int(np.argmax(text))])
    if series is not None and text[present].all():
        repair = f"drop the column, frame.drop(columns={name!r}), or, where it names the series, pass id={name!r} and target=..."
    if example.replace(",", "", 1).lstrip("+-").isdigit() and "," in example:
        repair = f"frame[{name!r}] = pd.to_numeric(frame[{name!r}].str.replace(',', '.'))"
    if text[present].all():
        findings.add("text-target", f"column {name!r} holds text, such as {_short(example)}", repair, column=name, mask=text, series=series)
    else:
        findings.add(
            "mixed-target",
            f"column {name!r} mixes numbers with text, such as {_short(example)}",
            repair,
            column=name,
            mask=text,
            series=series,
        )


def check_values(values: FloatArray, series: Series, name: str, id_name: str, findings: Findings) -> None:
    """Note infinite values, values over float32 and series without any value.

    Parameters
    ----------
    values
        float64 [n], NaN where missing.
    series
        The series of each row.
    name
        The target column's name.
    id_name
        The id column's name, for the repair.
    findings
        Where problems go.
    """
    note_magnitudes(values, name, findings)
    observed = np.bincount(series.codes[(series.codes >= 0) & ~np.isnan(values)], minlength=len(series.names))
    rows = np.bincount(series.codes[series.codes >= 0], minlength=len(series.names))
    void = (observed == 0) & (rows > 0)
    if void.any() and not any(problem.column == name and problem.kind in _UNREADABLE for problem in findings.problems):
        mask = np.append(void, False)[series.codes]
        whole = "every value" if void.all() else f"every value of {int(void.sum())} of {len(void)} series"
        label = series.names[int(np.argmax(void))]
        dropped = (
            f"frame = frame[frame.groupby({id_name!r})[{name!r}].transform('count') > 0]"
            if len(void) > 1
            else "name a column that holds values: target=..."
        )
        findings.add("all-missing-target", f"{whole} in column {name!r} is missing", dropped, column=name, mask=mask, series=label)


def note_magnitudes(values: FloatArray, name: str, findings: Findings, *, series: str | None = None) -> None:
    """Note infinite values and values whose magnitude is over float32's."""
    size = np.abs(values)
    infinite = np.isinf(size)
    if infinite.any():
        findings.add(
            "infinite-target",
            f"column {name!r} holds infinite values",
            f"frame[{name!r}] = frame[{name!r}].replace([np.inf, -np.inf], np.nan)",
            column=name,
            mask=infinite,
            series=series,
        )
    with np.errstate(invalid="ignore"):
        huge = (size > LARGEST) & ~infinite
    if huge.any():
        findings.add(
            "huge-target",
            f"column {name!r} holds values over {LARGEST:.3g}, which float32 cannot hold",
            f"frame[{name!r}] = frame[{name!r}].where(frame[{name!r}].abs() < {LARGEST:.3g})  # or divide by a unit",
            column=name,
            mask=huge,
            series=series,
        )
