"""The verb ``models``: published model families, what each needs, and a tiny random model of one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcast.cli.options import Json
from fedcast.cli.output import console, emit
from fedcast.errors import SpecError, UnknownNameError

if TYPE_CHECKING:
    from rich.table import Table

    from fedcast.models.published.base import Published

_SEED = 2**31  # no run has this seed, with which a tuning such as sff would draw the same weights again


def models(
    name: Annotated[str | None, typer.Argument(help="Show this family in full", metavar="[NAME]", show_default=False)] = None,
    random: Annotated[
        Path | None,
        typer.Option("--random", help="Write a tiny model of the family with random weights here, to try a run with", metavar="DIR"),
    ] = None,
    json: Json = False,
) -> None:
    """List the published model families that can be fine-tuned, with library, checkpoints and licence."""
    from fedcast.models.published.absent import ABSENT
    from fedcast.models.published.base import FAMILIES

    if name is not None and name not in FAMILIES and name not in ABSENT:
        raise UnknownNameError.of("model family", name, [*FAMILIES, *ABSENT])
    if random is not None:
        if name not in FAMILIES:
            reason = "no family is named" if name is None else f"fedcast has no adapter for {name}"
            raise SpecError(f"no random model can be written: {reason}", hint=f"fedcast models {min(FAMILIES)} --random {random}")
        _write_random(FAMILIES[name], random)
        if json:
            emit({"family": name, "folder": random})
        else:
            typer.echo(f"wrote {random}: a tiny {name} with random weights")
        return
    rows = [_described(family) for _, family in sorted(FAMILIES.items())]
    rows += [{**asdict(absent), "trains": False} for _, absent in sorted(ABSENT.items())]
    shown = [row for row in rows if name in (None, row["family"])]
    if json:
        emit(shown)
    else:
        console().print(_table(shown, full=name is not None))


def _write_random(family: type[Published], folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"{folder} is there already", hint="choose a folder that does not exist yet")
    model = family.tiny(_SEED)
    try:
        model.save_pretrained(folder)
    except OSError as error:
        raise SpecError(f"cannot write {folder}: {error.strerror}", hint="choose another folder") from error


def _described(family: type[Published]) -> dict[str, Any]:
    library = family.library
    return {
        "family": family.family,
        "summary": family.summary,
        "trains": True,
        "library": library.package,
        "installed": library.installed,
        "install": library.install,
        "checkpoints": family.hub,
        "licence": family.licence,
        "quantiles": family.quantiles,
        "head": family.heads,
        "lora_targets": family.lora_targets,
        "notes": _notes(family),
    }


def _notes(family: type[Published]) -> list[str]:
    """Return what an adapter says of itself beyond its first line, a paragraph an entry, without mark-up."""
    text = inspect.cleandoc(family.__doc__ or "").partition("\n\n")[2].partition("Attributes\n---")[0]
    text = re.sub(r"^\w+\n-+\n", "", text, flags=re.MULTILINE)
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "").replace("*", "")
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def _table(rows: Iterable[Mapping[str, Any]], *, full: bool) -> Table:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Published models", title_justify="left", title_style="bold")
    table.add_column("family", style="bold", no_wrap=True)
    table.add_column("what it is, and what it needs", ratio=1)
    for row in rows:
        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_column(no_wrap=True)
        facts.add_column(overflow="fold", ratio=1)
        for label, value in _facts(row, full=full):
            facts.add_row(Text(label, style="bold"), Text(value))
        notes = [Text(f"\n{paragraph}") for paragraph in row["notes"]] if full and row["trains"] else []
        table.add_row(Text(row["family"]), Group(Text(row["summary"]), facts, *notes), end_section=True)
    return table


def _facts(row: Mapping[str, Any], *, full: bool) -> Iterable[tuple[str, str]]:
    """Yield what is known of a family, label and words."""
    if not row["trains"]:
        yield "no adapter", row["reason"]
        yield "weights", row["weights"]
        yield "licence", row["licence"]
        return
    yield "library", f"{row['library']} {row['installed']}" if row["installed"] else f"{row['library']}, not installed: {row['install']}"
    yield "checkpoints", ", ".join(row["checkpoints"]) or "none on the Hugging Face hub"
    yield "licence", row["licence"]
    yield "quantiles", row["quantiles"]
    if full:
        yield "head", ", ".join(name.rstrip(".") for name in row["head"]) or "none of its own"
        yield "LoRA adapts", ", ".join(row["lora_targets"])
