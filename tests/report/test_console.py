"""What the terminal shows, with and without a terminal."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console, RenderableType

from fedcast.errors import FrameProblem
from fedcast.report.console import ProgressObserver, methods_table, problems_table, results_table


def text_of(renderable: RenderableType, width: int = 100) -> str:
    """What a plain file would hold."""
    written = io.StringIO()
    Console(file=written, width=width, no_color=True).print(renderable)
    return written.getvalue()


def results(domains: int, held_out: int = 2) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    names = [(f"domain{i}", i >= domains - held_out) for i in range(domains)]
    factors = {"seasonal_naive": 1.0, "fedtrl": 0.5}
    base = {name: rng.uniform(0.5, 2) for name, _ in names}
    return pd.DataFrame([{"model": m, "domain": d, "held_out": h, "mse": base[d] * f} for m, f in factors.items() for d, h in names])


def test_when_domains_are_few_then_models_are_rows() -> None:
    text = text_of(results_table(results(4)))
    assert "MSE relative to seasonal naive" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("FedTRL"))
    assert row.count("0.500*") == 6
    assert text.index("held-out") < text.index("training")


def test_when_a_domain_was_trained_on_under_another_name_then_a_line_says_so() -> None:
    rows = results(4).assign(exposure="unseen")
    assert "recordings" not in text_of(results_table(rows))
    rows.loc[rows.domain.isin(["domain1", "domain3"]) & (rows.model == "fedtrl"), "exposure"] = "seen"
    assert "trained on recordings of domain3\n" in "\n".join(line.rstrip() for line in text_of(results_table(rows)).splitlines()) + "\n"
    assert "trained on recordings of domain1, domain3" in text_of(results_table(rows.drop(columns="held_out")))


def test_when_several_horizons_are_averaged_then_a_line_names_them() -> None:
    rows = pd.concat([results(4).assign(horizon=horizon, reconstruction_mse=score) for horizon, score in ((192, float("nan")), (96, 0.25))])
    assert "means over the horizons 96, 192" in text_of(results_table(rows))
    assert "horizons" not in text_of(results_table(rows[rows.horizon == 96]))
    reconstructed = text_of(results_table(rows, "reconstruction_mse"))
    assert "Reconstruction MSE, lower is better" in reconstructed
    assert "0.25*" in reconstructed
    assert "horizons" not in reconstructed


def test_when_domains_are_many_then_they_are_rows_and_fit_the_width() -> None:
    text = text_of(results_table(results(14)))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "domain13" in text
    assert next(line for line in text.splitlines() if "held-out mean" in line).split() == ["held-out", "mean", "0.500*", "1.000"]


def test_when_there_are_no_results_then_the_table_says_so() -> None:
    assert "no results" in text_of(results_table(pd.DataFrame()))


def test_when_a_frame_has_problems_then_place_and_repair_are_shown_as_written() -> None:
    problem = FrameProblem(
        "duplicate-stamps", "two rows for one time", "df.drop_duplicates(['id', 'ds'])", column="ds", series="T[1]", row=7, count=12
    )
    text = text_of(problems_table([problem], "[data].csv"), width=140)
    for part in (
        "[data].csv: 1 problem",
        "duplicate-stamps",
        "column 'ds', series 'T[1]', row 7",
        "(12 rows)",
        "df.drop_duplicates(['id', 'ds'])",
    ):
        assert part in text


def test_when_a_frame_is_sound_then_one_line_says_so() -> None:
    assert text_of(problems_table([], "a.csv")).strip() == "a.csv: usable as it is"


def test_when_methods_are_listed_then_each_parameter_has_its_default() -> None:
    text = text_of(
        methods_table(
            [
                {
                    "name": "fedtrl",
                    "summary": "Aligned domains.",
                    "parameters": [
                        {"name": "tau", "type": "float | None", "default": None, "description": "temperature [auto]"},
                        {"name": "share", "type": "float", "default": 2 / 3, "description": ""},
                        {"name": "keep", "type": "bool", "default": True, "description": ""},
                    ],
                }
            ]
        )
    )
    for part in ("fedtrl", "Aligned domains.", "tau  (float | None)  temperature [auto]", "share = 0.6667  (float)", "keep = true"):
        assert part in text


def rows(rounds: int) -> list[dict[str, object]]:
    sites = {"a": {"loss": 1.0}, "[b]": {"loss": 3.0}}
    found: list[dict[str, object]] = []
    for number in range(1, rounds + 1):
        found.append({"kind": "round", "round": number, "seconds": 1.5, "bytes_up": 1000, "bytes_down": 500, "sites": sites})
        found.append({"kind": "validation", "round": number, "sites": sites, "mean": 2.25})
    return found


def watch(**options: Any) -> str:
    """Play a run of two rounds; return what was written."""
    written = io.StringIO()
    observer = ProgressObserver(Console(file=written, **options))
    observer.start(2, ["a", "[b]"])
    for row in rows(2):
        observer.phase("select", int(str(row["round"])))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda site, number=int(str(row["round"])): observer.site_done(number, site), ["a", "[b]"]))
        observer.row(row)
    observer.row({"kind": "result"})
    observer.finish()
    observer.finish()
    return written.getvalue()


def test_when_there_is_no_terminal_then_every_round_is_one_plain_line() -> None:
    lines = watch(width=40).splitlines()
    assert lines == [
        "round 1/2  loss 2.0000  2 sites  1.5 s  1.5 kB sent",
        "round 2/2  loss 2.0000  2 sites  1.5 s  1.5 kB sent",
        "validation 2.2500",
    ]


def test_when_there_is_a_terminal_then_bars_show_rounds_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = watch(width=120, force_terminal=True)
    assert "rounds" in text
    assert "2/2" in text
    assert "loss 2.0000  validation 2.2500" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_when_sites_are_missing_then_they_are_named_with_the_reason(terminal: bool) -> None:
    written = io.StringIO()
    observer = ProgressObserver(Console(file=written, width=120, force_terminal=terminal))
    observer.start(2, ["a", "[b]"])
    trained, validated = rows(1)
    observer.row({**trained, "dropped": {"[b]": "no reply before the deadline"}})
    observer.row({**validated, "missing": {"a": "it failed"}})
    observer.finish()
    assert "without [b] (no reply before the deadline)" in written.getvalue()
    assert "validation 1 without a (it failed)" in written.getvalue()


def test_when_a_run_resumes_then_the_bar_jumps_to_its_round() -> None:
    written = io.StringIO()
    observer = ProgressObserver(Console(file=written, width=120, force_terminal=True))
    observer.start(10, ["a"])
    observer.row(rows(7)[-2])
    observer.finish()
    assert "7/10" in written.getvalue()
