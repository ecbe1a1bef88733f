"""Fine-tune every row of every study and write the tables of ``docs/finetuning-evidence.md``.

Run it with ``make finetuning-evidence`` (hours on two cores). A run that is complete is not repeated, a killed one is resumed.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from benchmarks.evidence.tables import set_up, write
from benchmarks.finetuning import tables
from benchmarks.finetuning.studies import STUDIES, Row, Study
from fedcast.run.finetune import finetune
from fedcast.run.pretrain import Run
from fedcast.spec import RunSpec

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "finetuning-evidence.md"


def train(study: Study, base: Path, name: str, label: str, row: Row, seed: int, output: Path, workers: int) -> Run:
    """Fine-tune one row with one seed, or return it where it is complete."""
    spec = study.spec(base, row, seed)
    spec = RunSpec.model_validate({**spec.to_dict(), "federation": {**spec.to_dict()["federation"], "workers": workers}})
    start = time.perf_counter()
    folder = output / name / re.sub(r"[^\w.]+", "-", label) / f"seed-{seed}"
    run = finetune(spec, output=folder)
    print(f"{folder}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return run


def main() -> None:
    """Train what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", nargs="*", default=list(STUDIES), choices=list(STUDIES), help="which tables")
    parser.add_argument("--rows", nargs="*", help="train only these rows and write no page")
    parser.add_argument("--seeds", type=int, nargs="*", help="seeds, instead of each study's own")
    parser.add_argument("--workers", type=int, default=2, help="sites that work at the same time; changes no byte")
    parser.add_argument("--output", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose tables are written")
    arguments = parser.parse_args()
    for name in arguments.studies:
        study = STUDIES[name]
        seeds = arguments.seeds or range(study.seeds)
        base = study.base(arguments.output)
        chosen = {label: row for label, row in study.rows.items() if not arguments.rows or label in arguments.rows}
        runs = {
            (label, seed): train(study, base, name, label, row, seed, arguments.output, arguments.workers)
            for seed in seeds
            for label, row in chosen.items()
        }
        if arguments.rows:
            continue
        rows = tables.collect(runs)
        RESULTS.mkdir(exist_ok=True)
        rows.to_parquet(RESULTS / f"{name}.parquet")
        found = tables.of_study(name, rows, runs)
        write({**found, f"set-up-{name}": set_up(runs.values(), rows.code, len(list(seeds)))}, arguments.page)


if __name__ == "__main__":
    main()
