"""Verbs that train: ``pretrain`` and ``finetune``; one spec, one run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcast.cli.options import Json
from fedcast.cli.output import emit, note, print_results, records
from fedcast.errors import RunError

if TYPE_CHECKING:
    from fedcast.run.pretrain import Run
    from fedcast.spec import RunSpec

# What a run that was stopped before its first round, or before the best of its candidates was known, leaves behind.
_BEGUN = {".lock", "spec.toml", "spec.toml.aside", "run.json.aside", "candidates"}

Spec = Annotated[Path, typer.Argument(help="A spec; write one with `fedcast init`", metavar="SPEC.toml", show_default=False)]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the spec, such as federation.rounds=5", metavar="KEY=VALUE")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run folder; runs/<name of the spec> when absent", metavar="DIR")]


def pretrain(spec: Spec, set: Assignments = None, output: Output = None, json: Json = False) -> None:
    """Train a model from scratch over separate domains; a run that was stopped goes on where it was.

    Every key of the spec is a flag too, such as ``--federation.rounds 5``.
    """
    described = read_spec(spec, set, output)
    from fedcast.report.console import ProgressObserver
    from fedcast.run.pretrain import pretrain as train

    show_run(train(described, output=output, observer=None if json else ProgressObserver()), json)


def finetune(spec: Spec, set: Assignments = None, output: Output = None, json: Json = False) -> None:
    """Fine-tune a model over separate domains, published or your own; a run that was stopped goes on where it was.

    ``model.checkpoint`` names it. Every key of the spec is a flag too, such as ``--tuning.name lora``.
    """
    described = read_spec(spec, set, output)
    from fedcast.report.console import ProgressObserver
    from fedcast.run.finetune import finetune as train

    show_run(train(described, output=output, observer=None if json else ProgressObserver()), json)


def read_spec(spec: Path, assignments: list[str] | None, output: Path | None) -> RunSpec:
    """Read the spec and check the run folder, before torch is imported, so that a wrong key is named at once."""
    from fedcast.spec import load_spec

    described = load_spec(spec, assignments or ())
    check_run_folder(output or Path("runs") / described.name)
    return described


def show_run(run: Run, json: bool) -> None:
    """Write a finished run's report and print what came out."""
    from fedcast.report.page import write_report
    from fedcast.run.folder import RunFolder

    page = write_report(run.folder)
    results = run.results()
    left_out = RunFolder(run.folder).about()["series_left_out"]
    if left_out:
        counts = ", ".join(f"{site} {count}" for site, count in left_out.items())
        note(f"series too short to train, validate and test on were left out: {counts}", hint="lower model.horizon to keep them")
    if json:
        emit({"run": run.folder, "final": run.final, "best": run.best, "report": page, "results": records(results)})
        return
    print_results(results)
    if chosen := _chosen(run.folder):
        typer.echo(f"tuning  {chosen}")
    for label, path in (("model", run.final), ("report", page)):
        typer.echo(f"{label:7} {path}")


def _chosen(folder: Path) -> str | None:
    """Return which candidate of a search a run is; ``None`` where nothing was searched."""
    import json

    from fedcast.run.finetune import CANDIDATES
    from fedcast.run.folder import RunFolder

    tried = folder / f"{CANDIDATES}.json"
    if not tried.is_file():
        return None
    tuning = RunFolder(folder).spec().tuning
    count = len(json.loads(tried.read_text(encoding="utf-8")))
    options = ", ".join(f"{name} = {value}" for name, value in tuning.options.items())
    return f"{tuning.name} with {options}, which has the smallest validation loss of {count} candidates ({tried})"


def check_run_folder(folder: Path) -> None:
    """Refuse to train into a place that holds something else than a run.

    Raises
    ------
    RunError
        When it is a file, or a folder with files of another kind.
    """
    hint = "choose another --output, such as a folder that does not exist yet"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file, not a run folder", hint=hint)
    if not folder.is_dir() or (folder / "run.json").is_file():
        return
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in _BEGUN)
    if foreign:
        raise RunError(f"{folder} is not empty and no run folder: it holds {foreign[0]}", hint=hint)
