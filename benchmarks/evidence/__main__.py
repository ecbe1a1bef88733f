"""Train every row of every study and write the tables of ``docs/evidence.md``.

Run it with ``make evidence`` (hours on two cores). A run that is complete is not repeated, a killed one is resumed. The tables are
written between their markers; the sentences around them are written by people who read the tables.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks.evidence import tables
from benchmarks.evidence.studies import HERE, STUDIES, Row, Study
from fedcast.run.folder import RunFolder
from fedcast.run.pretrain import Run, pretrain
from fedcast.run.serving import serve_otherwise
from fedcast.spec import RunSpec, load_spec

PAGE = HERE.parents[1] / "docs" / "evidence.md"
RESULTS = HERE / "results"

# The same training as a row, other models for unseen domains.
SERVED = {
    "fedtrl, mean decoder": ("fedtrl", "shadow"),
    "local, one by one": ("local", "each"),
    "fedpm, mixture": ("fedpm", "mixture"),
    "fedpm, plain error": ("fedpm", "quantisation"),
    "fedpm, one by one": ("fedpm", "each"),
    "fedpm, oracle": ("fedpm", "oracle"),
}


def spec_of(study: Study, row: Row, seed: int, workers: int) -> RunSpec:
    """Return the spec of one row with one seed."""
    spec = load_spec(study.path(), [*study.overrides, *row.overrides, f"seed={seed}", f"federation.workers={workers}"])
    return RunSpec.model_validate({**spec.to_dict(), "method": dict(row.method)})


def train(study: Study, label: str, row: Row, seed: int, output: Path, workers: int) -> Run:
    """Train one row with one seed, or return it where it is complete."""
    spec = spec_of(study, row, seed, workers)
    start = time.perf_counter()
    folder = output / (study.folder or study.spec) / re.sub(r"[^\w.]+", "-", label) / f"seed-{seed}"
    run = pretrain(spec, output=folder)
    print(f"{folder}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return run


def collect(runs: tables.Runs) -> pd.DataFrame:
    """Return the test scores of all runs, the trained model's rows named by their label."""
    frames = []
    for (label, _), run in runs.items():
        rows = run.results()
        trained = rows.model == rows.method
        frames.append(rows.assign(model=rows.model.where(~trained, label)))
        for name, (of, serving) in SERVED.items():
            if of == label and rows.held_out.any():
                frames.append(serve_otherwise(RunFolder(run.folder), serving).assign(model=name))
    return pd.concat(frames, ignore_index=True)


def many_domains(rows: pd.DataFrame, runs: tables.Runs) -> dict[str, str]:
    """Return the tables of protocol P2."""
    labels = list(STUDIES["many-domains"].rows)
    others = [label for label in labels if label != tables.MAIN]
    held, own = rows[rows.held_out], rows[~rows.held_out]
    return {
        "many-domains": tables.relative_scores(rows, [*labels, *SERVED, tables.REFERENCE]),
        "held-out-differences": tables.differences(held, [*others, tables.REFERENCE], ("mse", "wql")),
        "in-domain-differences": tables.differences(own, [*others, tables.REFERENCE], ("mse", "wql")),
        "domains-mse": tables.by_domain(rows, labels, "mse"),
        "costs": tables.costs(runs, labels),
        "conflict": tables.conflict(runs, ["central", "fedavg", "fedtrl"]),
    }


def reconstruction(rows: pd.DataFrame, runs: tables.Runs) -> dict[str, str]:
    """Return the tables of masked reconstruction."""
    labels = list(STUDIES["reconstruction"].rows)
    others = [label for label in labels if label != "fedal"]
    part = rows[rows.model.isin(labels)]
    return {
        "reconstruction": tables.reconstruction(rows, labels),
        "reconstruction-differences": tables.differences(
            part[~part.held_out], others, ("reconstruction_mse", "reconstruction_nmse"), main="fedal"
        ),
        "reconstruction-costs": tables.costs(runs, labels),
        "coresets": tables.coresets(runs, "fedal"),
    }


def in_domain(rows: pd.DataFrame, runs: tables.Runs) -> dict[str, str]:
    """Return the tables of protocol P1."""
    labels = list(STUDIES["in-domain"].rows)
    return {
        "ltsf-mse": tables.long_horizons(rows, [*labels, tables.REFERENCE], "mse"),
        "ltsf-mae": tables.long_horizons(rows, [*labels, tables.REFERENCE], "mae"),
        "ltsf-differences": tables.differences(rows, [label for label in labels if label != tables.MAIN], ("mse", "mae")),
        "ltsf-horizons": tables.by_horizon(rows, [*labels, tables.REFERENCE], "mse"),
        "ltsf-costs": tables.costs(runs, labels),
    }


def ablation(name: str, rows: pd.DataFrame, runs: tables.Runs) -> dict[str, str]:
    """Return the tables of one method's ablations."""
    labels = list(STUDIES[name].rows)
    if STUDIES[name].spec == "in_domain":
        return {f"ablation-{name}": tables.long_horizons(rows, labels, "mse")}
    found = {f"ablation-{name}": tables.relative_scores(rows, labels, ("mse", "wql"))}
    if name == "fedal":
        found["ablation-fedal-reconstruction"] = tables.reconstruction(rows, labels)
    return found


WRITERS = {
    "many-domains": many_domains,
    "reconstruction": reconstruction,
    "in-domain": in_domain,
    **{name: partial(ablation, name) for name in ("fedal", "ffts", "fedpm")},
}


def main() -> None:
    """Train what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", nargs="*", default=list(STUDIES), choices=list(STUDIES), help="which tables")
    parser.add_argument("--rows", nargs="*", help="train only these rows and write no page")
    parser.add_argument("--seeds", type=int, help="seeds a row, instead of each study's own")
    parser.add_argument("--workers", type=int, default=2, help="sites that work at the same time; changes no byte")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose tables are written")
    arguments = parser.parse_args()
    unknown = set(arguments.rows or ()) - {label for name in arguments.studies for label in STUDIES[name].rows}
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))} in {', '.join(arguments.studies)}")
    for name in arguments.studies:
        study = STUDIES[name]
        seeds = arguments.seeds or study.seeds
        chosen = {label: row for label, row in study.rows.items() if not arguments.rows or label in arguments.rows}
        runs = {
            (label, seed): train(study, label, row, seed, arguments.output, arguments.workers)
            for seed in range(seeds)
            for label, row in chosen.items()
        }
        if arguments.rows:
            continue
        rows = collect(runs)
        RESULTS.mkdir(exist_ok=True)
        rows.to_parquet(RESULTS / f"{name}.parquet")
        found = WRITERS[name](rows, runs)
        tables.write({**found, f"set-up-{name}": tables.set_up(runs.values(), rows.code, seeds)}, arguments.page)


if __name__ == "__main__":
    main()
