"""What ``fedcast check`` finds in each file of a person's data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcast.data.check import describe
from fedcast.data.frames import domain_files, examine
from fedcast.errors import FrameProblem


@dataclass(frozen=True)
class FileReport:
    """What is wrong with a file, or what it holds.

    Attributes
    ----------
    source
        The file.
    problems
        What is wrong; empty when the file is usable.
    summary
        What a usable file holds: see :func:`fedcast.data.check.describe`.
    """

    source: str
    problems: list[FrameProblem]
    summary: dict[str, Any] = field(default_factory=dict)

    def summary_line(self) -> str:
        """Return what a usable file holds, in one line."""
        facts = self.summary
        rows = f"{facts['shortest']}" if facts["shortest"] == facts["longest"] else f"{facts['shortest']} to {facts['longest']}"
        missing = f", {facts['missing']:.1%} missing" if facts["missing"] else ""
        held = f"{facts['series']} series of {rows} rows, freq {facts['freq']}, {facts['start']} to {facts['end']}"
        return f"{self.source}: usable, {held}{missing}"

    def to_json(self) -> dict[str, object]:
        """Return the report as a JSON-ready dict."""
        return {"source": self.source, "problems": [vars(problem) for problem in self.problems], "summary": self.summary}


def check_files(data: Path, **columns: str | None) -> list[FileReport]:
    """Check a file, or every file of a folder and its sub-folders.

    Parameters
    ----------
    data
        A file or folder.
    columns
        ``time``, ``id``, ``target`` and ``freq``; ``None`` where they are to be recognised.

    Raises
    ------
    SourceError
        When there is nothing to check.
    """
    files = [file for domain in domain_files(data).values() for file in domain.values()] if data.is_dir() else [data]
    return [_check(file, columns) for file in files]


def _check(file: Path, columns: dict[str, str | None]) -> FileReport:
    frame, problems = examine(file, **columns)
    return FileReport(str(file), problems, {} if frame is None else describe(frame))
