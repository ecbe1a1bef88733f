"""The studies behind the page on fine-tuning: every row can be run, every table has its place and can be written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from benchmarks.finetuning import importance, tables
from benchmarks.finetuning.__main__ import PAGE
from benchmarks.finetuning.studies import STUDIES
from tests.federations import small_spec, train_small

from fedcast.methods.base import build_method
from fedcast.run.finetune import finetune
from fedcast.spec import RunSpec
from fedcast.tuning.base import build_tuning


@pytest.mark.parametrize("name", list(STUDIES))
def test_when_a_study_is_planned_then_its_rows_are_runs_of_their_own_and_its_tables_have_a_place(name: str) -> None:
    study = STUDIES[name]
    fingerprints = set()
    for row in study.rows.values():
        spec = study.spec(Path("model"), row, 0)
        build_method(spec.method)
        assert build_tuning(spec.tuning).candidates()
        fingerprints.add(spec.fingerprint())
    assert len(fingerprints) == len(study.rows)
    page = PAGE.read_text(encoding="utf-8")
    for part in ("", "-differences", "-costs", *(["-sharpness"] if name in tables.SHARPNESS else [])):
        assert f"<!-- {name}{part} -->" in page
        assert f"<!-- /{name}{part} -->" in page
    assert f"<!-- set-up-{name} -->" in page


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tables.Runs:
    folder = tmp_path_factory.mktemp("runs")
    base = train_small(small_spec("fedavg", rounds=1, local_steps=1), folder)
    found = {}
    for seed in (0, 1):
        for label, tuning in (("full", "full"), ("head", "head")):
            document = {**small_spec("fedavg", rounds=1, local_steps=2).to_dict(), "seed": seed, "tuning": {"name": tuning}}
            document["model"]["checkpoint"] = str(base.final)
            found[label, seed] = finetune(RunSpec.model_validate(document), output=folder / label / str(seed))
    return found


def test_when_runs_are_tabled_then_each_row_says_what_it_trained_and_sent(runs: tables.Runs) -> None:
    lines = tables.costs(runs, ["full", "head"]).splitlines()
    full, head = ([cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in lines[2:])
    assert full[1] == full[2] == full[3]
    assert int(head[1]) == int(head[3]) < int(head[2])
    assert float(head[4]) < float(full[4])


def test_when_a_row_is_compared_then_the_ratio_is_that_of_its_errors(runs: tables.Runs) -> None:
    rows = tables.collect(runs)
    table = tables.differences(rows, "full", ["head"], "mse")
    means = rows.groupby("model").mse.apply(lambda values: np.exp(np.log(values.astype(float)).mean()))
    assert f"| {means['head'] / means['full']:.3f} |" in table


def test_when_scores_of_modules_are_tabled_then_wins_are_counted_against_the_naive_one() -> None:
    rows = pd.DataFrame(
        {"set": ["a", "a", "b", "b"], "seed": 0, "score": ["naive", "DSIC", "naive", "DSIC"], "loss after pruning": [1.0, 0.5, 1.0, 0.5]}
    ).assign(**{"over choices": [0.1, 0.3, 0.4, 0.2], "after pruning": [0.0, 0.1, 0.0, 0.1]})
    assert importance.table(rows).splitlines()[3] == "| DSIC | 0.250 ± 0.071 | 1 of 2 | 0.100 ± 0.000 | 2 of 2 | 0.5000 |"
