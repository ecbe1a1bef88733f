"""A run folder as the report reads it: tolerant of what is not there yet, strict about what is damaged."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedcast.errors import RunError
from fedcast.report.tables import is_number

Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says, read once.

    Attributes
    ----------
    name
        The run's name in its spec, or the folder's.
    spec
        The spec as a dict; empty where it is missing or unreadable.
    spec_text
        The spec as it stands in the folder.
    rounds, validations, conflicts
        Rows of these kinds, one a round, ascending; of a round that was repeated after a resume, the last.
    results
        All result rows.
    samples
        Entries of ``samples.json``.
    """

    name: str
    spec: Mapping[str, Any]
    spec_text: str
    rounds: Sequence[Row]
    validations: Sequence[Row]
    conflicts: Sequence[Row]
    results: pd.DataFrame
    samples: Sequence[Row]


def read_record(folder: Path) -> RunRecord:
    """Read a run folder; see :class:`RunRecord`.

    Raises
    ------
    RunError
        When the folder is no run folder or its record is damaged.
    """
    record = folder / "metrics.jsonl"
    if not record.is_file():
        raise RunError(
            f"{folder} is no run folder: it has no metrics.jsonl",
            hint="give the folder that `fedcast pretrain` or `fedcast finetune` wrote",
        )
    rows = _read_rows(record)
    spec_file = folder / "spec.toml"
    spec_text = spec_file.read_text(encoding="utf-8", errors="replace") if spec_file.is_file() else ""
    try:
        spec = tomllib.loads(spec_text)
    except tomllib.TOMLDecodeError:
        spec = {}
    results = pd.DataFrame([row for row in rows if row.get("kind") == "result"])
    table = folder / "results.parquet"
    if results.empty and table.is_file():
        results = pd.read_parquet(table)
    return RunRecord(
        name=str(spec.get("name") or folder.resolve().name),
        spec=spec,
        spec_text=spec_text.strip(),
        rounds=_last_of_each_round(rows, "round"),
        validations=_last_of_each_round(rows, "validation"),
        conflicts=_last_of_each_round(rows, "conflict"),
        results=results,
        samples=_read_samples(folder / "samples.json"),
    )


def _read_rows(file: Path) -> list[Row]:
    lines = file.read_bytes().split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # the run was killed while it wrote this line
            raise RunError(
                f"{file}, line {number} is not JSON: {error}", hint="resume the run, which rewrites its record, or delete that line"
            ) from error
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_samples(file: Path) -> list[Row]:
    if not file.is_file():
        return []
    try:
        samples = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is not JSON: {error}", hint="evaluate the run again, or delete that file") from error
    return [sample for sample in samples if isinstance(sample, dict)]


def _last_of_each_round(rows: Sequence[Row], kind: str) -> list[Row]:
    by_round = {int(row["round"]): row for row in rows if row.get("kind") == kind and is_number(row.get("round"))}
    return [by_round[number] for number in sorted(by_round)]


def sites_of(row: Row) -> dict[str, Row]:
    """Return what a row says of each site."""
    sites = row.get("sites")
    return {str(name): values for name, values in sites.items() if isinstance(values, dict)} if isinstance(sites, dict) else {}


def by_site(rows: Sequence[Row], key: str) -> dict[str, list[tuple[int, float]]]:
    """Return the points (round, value) of one measure for each site that has it."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, values in sorted(sites_of(row).items()):
            if is_number(values.get(key)):
                series.setdefault(name, []).append((int(row["round"]), float(values[key])))
    return dict(sorted(series.items()))


def similarity_of(row: Row) -> tuple[list[list[float]], list[str]] | None:
    """Return the cosine matrix [sites, sites] of a round row and the sites' names, or ``None`` where it has none."""
    server = row.get("server")
    return _square(server.get("similarity"), server.get("sites")) if isinstance(server, dict) else None


def conflict_of(row: Row) -> tuple[list[list[float]], list[str]] | None:
    """Return the cosine matrix [domains, domains] of a conflict row and the domains' names, or ``None`` where it has no pair."""
    found = _square(row.get("cosines"), row.get("sites"))
    return found if found is not None and len(found[1]) > 1 else None


def _square(matrix: object, names: object) -> tuple[list[list[float]], list[str]] | None:
    if not isinstance(matrix, list) or not isinstance(names, list) or not names or any(len(line) != len(names) for line in matrix):
        return None
    cleaned = [[float(v) if is_number(v) else math.nan for v in line] for line in matrix]
    return (cleaned, [str(name) for name in names]) if len(matrix) == len(names) else None
