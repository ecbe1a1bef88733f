"""Frames as CSV text: what ``DataFrame.to_csv`` writes, several times faster for long frames of few names and stamps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

_ROWS = 1 << 18  # a piece of text stays far below the 2 GiB that arrow's offsets reach


def csv_pieces(frame: pd.DataFrame) -> Iterator[bytes]:
    """Yield a frame as CSV, header first and without its index, in pieces of whole lines.

    Parameters
    ----------
    frame
        Any frame.
    """
    columns = [_texts(frame.iloc[:, place]) for place in range(frame.shape[1])]
    known = [column for column in columns if column is not None]
    if len(known) < max(2, len(columns)):  # a lone empty cell has rules of its own
        yield frame.to_csv(index=False, lineterminator="\n").encode()
        return
    yield frame.iloc[:0].to_csv(index=False, lineterminator="\n").encode()
    for start in range(0, len(frame), _ROWS):
        *cells, last = (column.slice(start, _ROWS) for column in known)
        ends = pc.binary_join_element_wise(last, "", "\n")
        lines = pc.binary_join_element_wise(*cells, ends, ",")
        size = pc.sum(pc.binary_length(lines)).as_py()
        yield memoryview(lines.buffers()[2])[:size].tobytes()


def _texts(column: pd.Series) -> pa.StringArray | None:
    """Return the text of every cell; ``None`` for a column of a kind that pandas had better write."""
    if column.dtype == np.float64:
        return _numbers(column.to_numpy())
    if column.dtype == np.int64:
        return pa.array(column.to_numpy()).cast(pa.string())
    dated = pd.api.types.is_datetime64_any_dtype(column.dtype)
    if not dated and column.dtype != object:
        return None
    codes, distinct = pd.factorize(column)
    if (codes < 0).any() or not (dated or all(isinstance(value, str) for value in distinct)):
        return None
    names = pd.Index(distinct).astype(str) if dated else [_quoted(name) for name in distinct]
    return pa.array(names, type=pa.string()).take(pa.array(codes))


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\r\n') else text


def _numbers(values: npt.NDArray[np.float64]) -> pa.StringArray:
    """Return the shortest text that reads back as each number, in Python's notation; empty for NaN."""
    texts = pa.array(values, from_pandas=True).cast(pa.string()).fill_null("")
    size = np.abs(values)
    # arrow writes these otherwise than Python: 1 for 1.0, 0.00001 for 1e-05, 1.00000000005e+10 for 10000000000.5
    other = ~np.isnan(values) & ((size < 1e-4) | (size >= 1e10) | (values == np.trunc(values)))
    if not other.any():
        return texts
    return pc.replace_with_mask(texts, pa.array(other), pa.array([repr(value) for value in values[other].tolist()]))
