"""The studies behind the evidence page: every row can be trained, every table has its place."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from benchmarks.evidence import tables
from benchmarks.evidence.__main__ import PAGE, SERVED, WRITERS, spec_of
from benchmarks.evidence.studies import STUDIES

from fedcast.methods.base import build_method

LABELS = ("fedtrl", "fedavg", "fedpm, oracle", tables.REFERENCE)


@pytest.fixture
def rows() -> pd.DataFrame:
    """Result rows of two models and the reference: fedtrl has half the error of fedavg."""
    rng = np.random.default_rng(0)
    errors = {"fedtrl": 0.4, "fedavg": 0.8, "fedpm, oracle": 0.1, tables.REFERENCE: 1.0}
    return pd.DataFrame(
        {
            "model": model,
            "seed": seed,
            "domain": domain,
            "held_out": domain == "d2",
            "horizon": horizon,
            "coverage80": 0.3 if model == "fedpm, oracle" else 0.8,
            **dict.fromkeys(
                ("mse", "mae", "mase", "wql", "reconstruction_mse", "reconstruction_nmse", "reconstruction_mse_15"), error * scale
            ),
        }
        for seed in range(2)
        for domain, scale in zip(("d0", "d1", "d2"), rng.uniform(1, 9, 3), strict=True)
        for horizon in (96, 192)
        for model, error in errors.items()
    )


@pytest.mark.parametrize("name", list(STUDIES))
def test_when_a_study_is_planned_then_each_row_is_a_method_and_a_spec_that_exist(name: str) -> None:
    study = STUDIES[name]
    fingerprints = set()
    for label, row in study.rows.items():
        spec = spec_of(study, row, seed=0, workers=1)
        method = build_method(spec.method)
        method.model_config(spec.model)
        assert spec.method.name == row.method["name"], label
        fingerprints.add(spec.fingerprint())

    assert len(fingerprints) == len(study.rows)
    assert name in WRITERS


def test_when_studies_share_a_folder_then_a_label_means_one_run() -> None:
    seen: dict[tuple[str, str], str] = {}
    for study in STUDIES.values():
        for label, row in study.rows.items():
            print_ = spec_of(study, row, seed=0, workers=1).fingerprint()
            assert seen.setdefault((study.folder or study.spec, label), print_) == print_


def test_when_tables_are_written_then_the_page_has_their_places_and_nothing_else_changes(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    names = re.findall(r"<!-- ([a-z-]+) -->", text)
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")

    tables.write({"costs": "| a |"}, page)

    assert "<!-- costs -->\n| a |\n<!-- /costs -->" in page.read_text(encoding="utf-8")
    assert len(names) == len(set(names))
    assert {f"set-up-{name}" for name in STUDIES} <= set(names)
    with pytest.raises(SystemExit, match="no markers"):
        tables.write({"nowhere": ""}, page)


def test_when_one_row_has_half_the_error_then_tables_and_ratios_say_so(rows: pd.DataFrame) -> None:
    one = rows[rows.horizon == 96]

    relative = tables.relative_scores(one, LABELS).splitlines()
    assert relative[2].startswith("| fedtrl | **0.400 ± 0.000** |")
    assert relative[2].endswith("| 0.800 |")  # the best coverage is 0.8, not the smallest
    assert "**" not in relative[4]  # nobody could know it beforehand
    ratio = tables.differences(rows, ["fedavg"], ("mse",)).splitlines()[-1].split("|")
    assert ratio[1].strip() == "fedavg"
    assert ratio[2].strip() == "0.500"
    assert ratio[-2].strip() == "6 of 6"
    long = tables.long_horizons(rows, LABELS, "mse")
    assert long.splitlines()[2].count("**") == 8
    assert "±" not in long.splitlines()[-1]
    assert "| d0 | 96 |" in tables.by_horizon(rows, LABELS, "mse")
    assert "| d2 (held out) | **0.400** | 0.800 |" in tables.by_domain(one, ["fedtrl", "fedavg"], "mse")
    assert "15 %" in tables.reconstruction(one, ["fedtrl", "fedavg"])


def test_when_a_model_is_served_otherwise_then_its_row_was_trained() -> None:
    assert {of for of, _ in SERVED.values()} <= set(STUDIES["many-domains"].rows)
