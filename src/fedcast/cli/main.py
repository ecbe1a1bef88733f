"""The ``fedcast`` command: its verbs, its error messages and its exit codes.

Nothing here imports more than typer and rich; each verb imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer
from click.exceptions import ClickException

from fedcast.cli import (
    audit,
    benchmark,
    consortium,
    coordinator,
    landscape,
    leakage,
    machine,
    models,
    predict,
    prepare,
    results,
    site,
    train,
)
from fedcast.cli.flags import SpecCommand
from fedcast.cli.output import emit, fail, note
from fedcast.cli.run import run as run_spec
from fedcast.errors import FedcastError

INTERRUPTED = 130
RESUMABLE = ("pretrain", "finetune", "run", "benchmark")
"""Verbs that go on where they were when they are started again."""

app = typer.Typer(
    name="fedcast",
    help="Train and fine-tune time series foundation models over data that cannot be pooled, and forecast with them",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
)


def _add(verb: Callable[..., None], panel: str | None, cls: type[SpecCommand] | None = None, to: typer.Typer = app) -> None:
    """Register a verb; its help is the first sentence of its docstring, without the final period."""
    summary = (verb.__doc__ or "").strip().split("\n\n")[0].rstrip(".")
    to.command(verb.__name__, help=" ".join(summary.split()), rich_help_panel=panel, cls=cls)(verb)


def _add_group(name: str, summary: str, panel: str, *verbs: Callable[..., None]) -> None:
    """Register verbs that stand behind a common word, such as ``fedcast consortium init``."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    for verb in verbs:
        _add(verb, None, to=group)
    app.add_typer(group, name=name, help=summary, rich_help_panel=panel)


_add(prepare.check, "Data and specs")
_add(prepare.init, "Data and specs")
_add(prepare.methods, "Data and specs")
_add(prepare.tunings, "Data and specs")
_add(prepare.guards, "Data and specs")
_add(models.models, "Data and specs")
_add(train.pretrain, "Training and forecasting", SpecCommand)
_add(train.finetune, "Training and forecasting", SpecCommand)
_add(run_spec, "Training and forecasting", SpecCommand)
_add(predict.forecast, "Training and forecasting")
_add(predict.evaluate, "Training and forecasting")
_add(benchmark.benchmark, "Training and forecasting")
_add(results.compare, "Results")
_add(results.report, "Results")
_add(landscape.landscape, "Results")
_add(leakage.leakage, "Results")
_add_group(
    "consortium",
    "Make the kits of many machines, and see how they are",
    "Many machines",
    consortium.init,
    consortium.add,
    consortium.remove,
    consortium.renew,
    consortium.status,
)
_add_group("coordinator", "Run a consortium's coordinator", "Many machines", coordinator.start)
_add_group("site", "Take part in a consortium as a site", "Many machines", site.start)
_add_group("audit", "Check the audit log of a run or a site", "Many machines", audit.verify)
_add(machine.machine, "This installation")
_add(prepare.version, "This installation")


def _print_version(value: bool) -> None:
    if value:
        prepare.version()
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave")] = False,
) -> None:
    """Hold the options that stand before a verb."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    Parameters
    ----------
    arguments
        What stands after ``fedcast``.

    Returns
    -------
    int
        0; 2 for a command line that cannot be read; 130 after Ctrl-C; an error's own number otherwise (see :mod:`fedcast.errors`).
        Exceptions that are not a :class:`~fedcast.errors.FedcastError` are bugs and pass through.
    """
    words = list(arguments) or ["--help"]
    as_json = "--json" in words
    try:
        code = app(args=words, prog_name="fedcast", standalone_mode=False)
    except FedcastError as error:
        return fail(error.to_json(), as_json)
    except ClickException as error:
        context = getattr(error, "ctx", None)
        message = error.format_message().strip().rstrip(".")
        if not message:
            return error.exit_code  # the verbs behind a common word were listed
        command = "fedcast" if context is None else context.command_path
        return fail({"error": "usage", "exit_code": 2, "message": message, "hint": f"{command} --help"}, as_json)
    if code == INTERRUPTED:
        hint = f"{'resume' if words[0] in RESUMABLE else 'start again'} with the same command"
        if as_json:
            emit({"error": "interrupted", "exit_code": INTERRUPTED, "message": "interrupted", "hint": hint})
        note("interrupted", hint=hint)
    return int(code or 0)


def main() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    sys.exit(run(sys.argv[1:]))
