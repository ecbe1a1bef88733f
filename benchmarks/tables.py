"""Markdown tables, and putting a script's output into README.md: ``python -m benchmarks.NAME | python -m benchmarks.tables NAME``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_table(document: str, name: str, text: str) -> str:
    """Return the document with ``text`` between ``<!-- table:name -->`` and ``<!-- /table:name -->``.

    Raises
    ------
    ValueError
        When the document has no such pair of markers.
    """
    opening, closing = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    pattern = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"no markers {opening} and {closing}")
    return pattern.sub(lambda _: f"{opening}\n{text.strip()}\n{closing}", document, count=1)


def write_json(path: Path | None, document: Mapping[str, Any]) -> None:
    """Write a result to ``path``, where one was asked for."""
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Put what comes in on standard input between the markers, and pass it on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="the table's name in README.md")
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args()
    text = sys.stdin.read()
    print(text, end="")
    if not text.strip():
        parser.error("standard input is empty: README.md stays as it is")
    arguments.readme.write_text(replace_table(arguments.readme.read_text(encoding="utf-8"), arguments.name, text), encoding="utf-8")


if __name__ == "__main__":
    main()
