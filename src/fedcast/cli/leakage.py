"""The verb ``leakage``: which benchmark sets stand in which training corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fedcast.cli.options import Json
from fedcast.cli.output import console, emit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from fedcast.data.leakage import Corpus, Recording

_CELLS = {"seen": "seen", "unseen": "·", "unknown": "?"}
_MATRIX_WIDTH = 120


def leakage(
    corpus: Annotated[str | None, typer.Option("--corpus", help="Show this training corpus only, with sources", metavar="NAME")] = None,
    benchmark: Annotated[
        str | None, typer.Option("--benchmark", help="Show this benchmark set only, with sources, such as ETTh1", metavar="NAME")
    ] = None,
    json: Json = False,
) -> None:
    """List which benchmark sets stand in which training corpus.

    A set counts as the recording it is cut from: ETTh1 and ETTm1 are one. With --json every entry names where it was read.
    """
    from fedcast.data import leakage as data

    shown = list(data.corpora().values()) if corpus is None else [data.corpus(corpus)]
    one = None if benchmark is None else data.recording(benchmark)
    rows = list(data.recordings().values()) if one is None else [one]
    out = console()
    if json:
        emit(_entries(shown, rows))
    elif corpus is not None or benchmark is not None:
        out.print(_with_sources(shown, rows))
    else:
        out.print(_matrix(shown, rows) if out.width >= _MATRIX_WIDTH else _in_words(shown, rows))


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


def _matrix(shown: Sequence[Corpus], rows: Sequence[Recording]) -> Table:
    from rich.text import Text

    table = _table(("benchmark set", *(each.label for each in shown)), padding=(0, 1, 0, 0))
    for row in rows:
        cells = [each.findings[row.key].exposure for each in shown]
        table.add_row(Text(row.title), *(Text(_CELLS[cell], style="bold" if cell == "seen" else "") for cell in cells))
    table.caption = "seen: the corpus holds it; ·: it does not; ?: not known"
    return table


def _in_words(shown: Sequence[Corpus], rows: Sequence[Recording]) -> Table:
    from rich.text import Text

    table = _table(("benchmark set", "seen in", "not known of"))
    for row in rows:
        named = [", ".join(each.title for each in shown if each.findings[row.key].exposure == what) for what in ("seen", "unknown")]
        table.add_row(Text(row.title), *(Text(names) for names in named), end_section=True)
    table.caption = "unseen in every other corpus"
    return table


def _with_sources(shown: Sequence[Corpus], rows: Sequence[Recording]) -> Table:
    from rich.text import Text

    table = _table(("benchmark set" if len(shown) == 1 else "corpus", "exposure", "source"))
    for row in rows:
        for each in shown:
            found = each.findings[row.key]
            table.add_row(Text(row.title if len(shown) == 1 else each.title), found.exposure, Text(found.source))
    return table


def _table(heads: Sequence[str], padding: tuple[int, int, int, int] = (0, 2, 0, 0)) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, caption_justify="left", caption_style="")
    for head in heads:
        table.add_column(Text(head), overflow="fold")
    return table
