"""Verbs before a run: ``check``, ``init``, ``methods``, ``tunings``, ``guards`` and ``version``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcast.cli.options import Freq, IdColumn, Json, TargetColumn, TimeColumn
from fedcast.cli.output import console, emit, note
from fedcast.errors import FrameError, SpecError, UnknownNameError

Name = Annotated[str | None, typer.Argument(help="Show this one only", metavar="[NAME]", show_default=False)]


def check(
    data: Annotated[Path, typer.Argument(help="A file, or a folder of files and sub-folders", metavar="DATA", show_default=False)],
    time: TimeColumn = None,
    id: IdColumn = None,
    target: TargetColumn = None,
    freq: Freq = None,
    json: Json = False,
) -> None:
    """Check data: every problem with its file, column, series, row and repair.

    Exits with 21 when a file has a problem.
    """
    from fedcast.cli.frames import check_files
    from fedcast.report.console import problems_table

    reports = check_files(data, time=time, id=id, target=target, freq=freq)
    usable = all(not report.problems for report in reports)
    if json:
        emit({"usable": usable, "files": [report.to_json() for report in reports]})
    else:
        out = console()
        for report in reports:
            if report.problems:
                out.print(problems_table(report.problems, report.source))
            else:
                out.print(report.summary_line(), soft_wrap=True, markup=False)
    if not usable:
        raise typer.Exit(FrameError.exit_code)


def init(
    spec: Annotated[Path | None, typer.Argument(help="The file to write", metavar="[SPEC.toml]", show_default=False)] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Folder of your data; its domains are filled in", metavar="FOLDER")] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Write a spec that fine-tunes this model: a folder or a hub name", metavar="MODEL")
    ] = None,
    time: TimeColumn = None,
    id: IdColumn = None,
    target: TargetColumn = None,
    freq: Freq = None,
    keys: Annotated[bool, typer.Option("--keys", help="Print every key with type, default and description, and leave")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file when it is there")] = False,
    json: Json = False,
) -> None:
    """Write a commented spec to start from, or list every key."""
    from fedcast.cli.flags import keys_table, spec_keys

    if keys:
        if json:
            emit(spec_keys())
        else:
            console().print(keys_table(spec_keys()))
        return
    if spec is None:
        raise SpecError("no file to write the spec to", hint="fedcast init SPEC.toml, or fedcast init --keys for every key")
    if spec.exists() and not force:
        raise SpecError(f"{spec} is there already", hint="choose another name, or replace it with --force")
    from fedcast.cli.starter import starter

    text = starter(spec.stem, data, {"time": time, "id": id, "target": target, "freq": freq}, checkpoint)
    try:
        spec.parent.mkdir(parents=True, exist_ok=True)
        spec.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot write {spec}: {error.strerror}", hint="choose another file") from error
    if json:
        emit({"spec": spec})
    else:
        typer.echo(f"wrote {spec}")
        note("next: read it, then train", hint=f"fedcast {'pretrain' if checkpoint is None else 'finetune'} {spec}")


def methods(name: Name = None, json: Json = False) -> None:
    """List the methods and their hyper-parameters."""
    from fedcast.methods.base import METHODS

    _list("method", METHODS, name, json)


def tunings(name: Name = None, json: Json = False) -> None:
    """List the tunings, which say what a fine-tuning trains, and their hyper-parameters."""
    from fedcast.tuning.base import TUNINGS

    _list("tuning", TUNINGS, name, json)


def guards(name: Name = None, json: Json = False) -> None:
    """List the guards, the steps around any method that a spec lists, and their options."""
    import fedcast.federated.guards  # noqa: F401 - registers the guards
    from fedcast.federated.guards.base import GUARDS

    _list("guard", GUARDS, name, json)


def _list(kind: str, known: Mapping[str, Any], name: str | None, json: bool) -> None:
    """Print what a registry holds, or one entry of it, with hyper-parameters."""
    from fedcast.cli.flags import readable_type
    from fedcast.registry import describe
    from fedcast.report.console import methods_table

    if name is not None and name not in known:
        raise UnknownNameError.of(kind, name, known)
    described = describe(known if name is None else {name: known[name]})
    for each in described:
        each["parameters"] = [{**row, "type": readable_type(row["type"])} for row in each["parameters"]]
    if json:
        emit(described)
    else:
        console().print(methods_table(described, kind))


def version(json: Json = False) -> None:
    """Print the version and the commit it runs from."""
    from fedcast.version import __version__, code_version

    code = code_version()
    if json:
        emit({"version": __version__, "code": code})
    else:
        typer.echo(f"fedcast {__version__}" + (f" ({code})" if code != __version__ else ""))
