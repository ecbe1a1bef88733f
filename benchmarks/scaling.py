"""How the error of a federation falls with data, clients, participation and balance: ``python -m benchmarks.scaling``.

Trains a grid of runs (hours; a run that is complete is not repeated, a killed one is resumed), fits ``E = E_inf + a x^-p`` along each
axis, and writes the tables of ``docs/scaling.md`` between their markers and ``scaling.html`` beside the runs. All runs of an axis take
equally many gradient steps in total.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.evidence.tables import write
from benchmarks.tables import markdown
from fedcast.data.catalogue import split_domains
from fedcast.report.scaling import write_scaling
from fedcast.report.tables import FIT_COLUMNS, PARTS, fit_cells, metric_of, value_cells
from fedcast.run.folder import RunFolder
from fedcast.run.pretrain import pretrain
from fedcast.run.scaling import Scaling, scaling
from fedcast.spec import RunSpec, load_spec

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "scaling.md"
SPEC = HERE / "evidence" / "many_domains.toml"
CLIENTS = 16
Document = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Axis:
    """One axis: its values, and how a run at one of them differs from the base spec.

    Attributes
    ----------
    values
        Values of the key.
    change
        Gives the keys of a run from the base spec, the value, all values and the budget of gradient steps.
    """

    values: tuple[float, ...]
    change: Callable[[RunSpec, float, Sequence[float], int], Mapping[str, Any]]


def _share(base: RunSpec, value: float, values: Sequence[float], steps: int) -> Mapping[str, Any]:
    sites = base.federation.selected(len(split_domains(base.data)[0]))
    return {
        "data.partition": "domain",
        "data.share": value,
        "federation.rounds": _at_least_one(steps / (sites * base.federation.local_steps)),
    }


def _clients(base: RunSpec, value: float, values: Sequence[float], steps: int) -> Mapping[str, Any]:
    # As many rounds for all; the steps of the largest federation are whole, the others' are multiples of them.
    most = int(max(values))
    rounds = _at_least_one(steps / (CLIENTS * base.federation.local_steps))
    local_steps = _at_least_one(_at_least_one(steps / (rounds * most)) * most / value)
    return _spread("dirichlet", int(value)) | {"federation.rounds": rounds, "federation.local_steps": local_steps}


def _participation(base: RunSpec, value: float, values: Sequence[float], steps: int) -> Mapping[str, Any]:
    selected = base.federation.model_copy(update={"participation": value}).selected(CLIENTS)
    rounds = _at_least_one(_at_least_one(steps / (CLIENTS * base.federation.local_steps)) * CLIENTS / selected)
    return _spread("dirichlet", CLIENTS) | {"federation.participation": value, "federation.rounds": rounds}


def _imbalance(base: RunSpec, value: float, values: Sequence[float], steps: int) -> Mapping[str, Any]:
    rounds = _at_least_one(steps / (CLIENTS * base.federation.local_steps))
    return _spread("long_tail", CLIENTS) | {"data.imbalance": value, "federation.rounds": rounds}


def _spread(partition: str, clients: int) -> dict[str, Any]:
    return {"data.partition": partition, "data.clients": clients, "data.concentration": 0.5, "federation.participation": 1.0}


def _at_least_one(number: float) -> int:
    return max(1, round(number))


AXES = {
    "data.share": Axis((0.05, 0.1, 0.25, 0.5, 1.0), _share),
    "data.clients": Axis((4, 8, 16, 32), _clients),
    "federation.participation": Axis((0.1, 0.25, 0.5, 1.0), _participation),
    "data.imbalance": Axis((0.1, 0.3, 1.0), _imbalance),
}


def spec_of(base: RunSpec, axis: str, value: float, values: Sequence[float], method: str, seed: int, steps: int) -> RunSpec:
    """Return the spec of one run of the grid."""
    document: Document = base.to_dict()
    for key, setting in AXES[axis].change(base, value, values, steps).items():
        section, _, name = key.partition(".")
        document[section][name] = setting
    # Scored at the end only: validations would cost most where there are many rounds.
    document["evaluation"]["every"] = document["federation"]["rounds"]
    return RunSpec.model_validate({**document, "name": "scaling", "seed": seed, "method": {"name": method}})


def train(base: RunSpec, axis: str, values: Sequence[float], method: str, seeds: int, steps: int, output: Path) -> list[Path]:
    """Train the runs of one axis and method, and return their folders; what is complete is not trained again."""
    folders = []
    for seed in range(seeds):
        for value in values:
            start = time.perf_counter()
            folder = output / axis / method / f"{value:g}" / f"seed-{seed}"
            pretrain(spec_of(base, axis, value, values, method, seed, steps), output=folder)
            print(f"{axis} = {value:g}, {method}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            folders.append(folder)
    return folders


def tables(curves: Sequence[Scaling]) -> str:
    """Return the tables of the page: for each axis and method the scores, then all fits."""
    pieces = []
    fits = []
    for curve in curves:
        columns, rows = value_cells(curve.points, curve.over, curve.axis)
        pieces += [f"### {curve.over}, {curve.method}", "", markdown(columns, rows), ""]
        pieces += [f"{note[:1].upper()}{note[1:]}.\n" for note in curve.notes]
        fits += [[curve.over, curve.method, PARTS[held_out], *fit_cells(fit)] for held_out, fit in curve.fits.items()]
    columns = ["x", "method", "domains", *FIT_COLUMNS]
    return "\n".join([*pieces, "### Fits", "", markdown(columns, fits)])


def _axes(words: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Read ``AXIS`` or ``AXIS=VALUE,VALUE``."""
    chosen = {}
    for word in words:
        name, _, values = word.partition("=")
        if name not in AXES:
            raise SystemExit(f"unknown axis {name!r}: {', '.join(AXES)}")
        chosen[name] = tuple(float(value) for value in values.split(",")) if values else AXES[name].values
    return chosen


def main(words: Sequence[str] | None = None) -> None:
    """Train what is missing, fit the curves and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["fedavg", "fedtrl"])
    parser.add_argument("--axes", nargs="+", default=list(AXES), metavar="AXIS[=VALUE,...]", help=", ".join(AXES))
    parser.add_argument("--steps", type=int, default=3000, help="gradient steps of a run, all sites together")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--metric", default="mse")
    parser.add_argument("--spec", type=Path, default=SPEC)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose tables are written")
    arguments = parser.parse_args(words)
    base = load_spec(arguments.spec, arguments.overrides)
    curves = []
    for axis, values in _axes(arguments.axes).items():
        for method in arguments.methods:
            folders = train(base, axis, values, method, arguments.seeds, arguments.steps, arguments.output)
            curves.append(scaling(folders, axis, metric=arguments.metric))
    pd.concat([curve.points.assign(over=curve.over, method=curve.method) for curve in curves]).to_parquet(
        arguments.output / "points.parquet"
    )
    write_scaling(curves, arguments.output / "scaling.html")
    about = RunFolder(curves[0].rows["run"].iloc[0]).about()
    codes = ", ".join(sorted({str(code)[:12] for curve in curves for code in curve.rows["code"]}))
    setup = (
        f"{metric_of(arguments.metric).label}, seeds 0 to {arguments.seeds - 1}, {arguments.steps} gradient steps a run (rounded to whole "
        f"rounds). Machine: {about['processor']}, torch {about['torch']}, precision {about['precision']}. Code: {codes}."
    )
    write({"scaling": f"{setup}\n\n{tables(curves)}"}, arguments.page)


if __name__ == "__main__":
    main()
