"""The verb ``leakage``: which benchmark sets each training corpus contains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fedcast.cli.options import Json
from fedcast.cli.output import console, emit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from fedcast.data.leakage import Corpus, Recording

_NO_LIMIT = 10_000  # columns: as wide as a table would like to be
_CELLS = {"seen": "seen", "unseen": "·", "unknown": "?"}


def leakage(
    corpus: Annotated[str | None, typer.Option("--corpus", help="Show this training corpus only, with sources", metavar="NAME")] = None,
    benchmark: Annotated[
        str | None, typer.Option("--benchmark", help="Show this benchmark set only, with sources, such as ETTh1", metavar="NAME")
    ] = None,
    json: Json = False,
) -> None:
    """List which benchmark sets each training corpus contains.

    A set counts as the recording it is cut from: ETTh1 and ETTm1 are one. With --json every entry names where it was read.
    """
    from fedcast.data.leakage import corpora, recording, recordings
    from fedcast.data.leakage import corpus as corpus_of

    shown = list(corpora().values()) if corpus is None else [corpus_of(corpus)]
    rows = list(recordings().values()) if benchmark is None else [recording(benchmark)]
    out = console()
    if json:
        emit(_entries(shown, rows))
    elif corpus is not None or benchmark is not None:
        matched = [*(_corpus_title(each) for each in shown if corpus is not None), *(row.title for row in rows if benchmark is not None)]
        out.print(_with_sources(shown, rows, "\n".join(matched)))
    else:
        for part in _parts(shown, rows, out):
            out.print(part)
        out.print("seen: the corpus holds it; ·: it does not; ?: not known")


def _entries(shown: Sequence[Corpus], rows: Sequence[Recording]) -> list[dict[str, object]]:
    return [
        {
            "benchmark": row.key,
            "title": row.title,
            "aliases": row.aliases,
            "corpus": each.key,
            "models": each.models,
            "exposure": each.findings[row.key].exposure,
            "source": each.findings[row.key].source,
        }
        for row in rows
        for each in shown
    ]


def _corpus_title(each: Corpus) -> str:
    return f"{each.title}; models: {', '.join(each.models)}" if each.models else each.title


def _parts(shown: Sequence[Corpus], rows: Sequence[Recording], out: Console) -> list[Table]:
    """Split the corpora in halves until the matrix of each is as narrow as the console."""
    table = _matrix(shown, rows)
    if len(shown) == 1 or out.measure(table, options=out.options.update(width=_NO_LIMIT)).maximum <= out.width:
        return [table]
    half = len(shown) // 2
    return [*_parts(shown[:half], rows, out), *_parts(shown[half:], rows, out)]


def _matrix(shown: Sequence[Corpus], rows: Sequence[Recording]) -> Table:
    from rich.text import Text

    table = _table(("benchmark set", *(each.label for each in shown)), padding=(0, 0, 0, 0))
    for row in rows:
        cells = [each.findings[row.key].exposure for each in shown]
        table.add_row(Text(row.title), *(Text(_CELLS[cell], style="bold" if cell == "seen" else "") for cell in cells))
    return table


def _with_sources(shown: Sequence[Corpus], rows: Sequence[Recording], title: str) -> Table:
    from rich.text import Text

    table = _table(("benchmark set" if len(shown) == 1 else "corpus", "exposure", "source"))
    table.title, table.title_justify, table.title_style = Text(title), "left", "bold"
    for row in rows:
        for each in shown:
            found = each.findings[row.key]
            table.add_row(Text(row.title if len(shown) == 1 else each.title), found.exposure, Text(found.source))
    return table


def _table(heads: Sequence[str], padding: tuple[int, int, int, int] = (0, 2, 0, 0)) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False)
    for head in heads:
        table.add_column(Text(head), overflow="fold")
    return table
