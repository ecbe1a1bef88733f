"""The verb ``machine``: what fedcast computes with here, and compiling the native kernels."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcast.cli.options import Json
from fedcast.cli.output import console, emit, note


def machine(
    build: Annotated[
        bool, typer.Option("--build", help="Compile the native kernels, which takes seconds and needs a C++ compiler")
    ] = False,
    json: Json = False,
) -> None:
    """Show what a run computes with on this machine, and compile the native kernels.

    Everything that a spec leaves at 'auto' is chosen as shown.
    """
    if build:
        from fedcast.kernels.library import build as build_kernels

        path = build_kernels()
        if not json:
            note(f"native kernels: {path}")
    found = describe_machine()
    if json:
        emit(found)
        return
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in found.items():
        table.add_row(name.replace("_", " "), _in_words(value))
    console().print(table)


def describe_machine() -> dict[str, Any]:
    """Return processor, versions, what is chosen where a spec says ``"auto"``, and the probe's milliseconds, JSON-ready."""
    from dataclasses import asdict

    import torch

    from fedcast.kernels import library
    from fedcast.spec import TrainingSpec
    from fedcast.training.backend import Backend, probe
    from fedcast.version import __version__

    if library.built():
        kernels = "compiled"
    elif not library.supported():
        kernels = "not for this processor"
    else:
        kernels = "not compiled" if library.compiler() else "not compiled, and there is no C++ compiler"
    return {
        "fedcast": __version__,
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        **Backend.resolve(TrainingSpec()).record(),
        "native_kernels": kernels,
        "probe": {name: None if value is None else float(f"{value:.3g}") for name, value in asdict(probe()).items()},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {inner:g}" for name, inner in value.items() if inner is not None)
    return str(value)
