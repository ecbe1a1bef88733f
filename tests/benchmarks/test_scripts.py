from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.tables import README, markdown, replace_table

from benchmarks import floor, machine, round_time


def test_when_ceilings_are_measured_then_every_rate_is_positive_and_names_the_machine() -> None:
    found = machine.measure(quick=True)

    rates = [rate for rates in [*found.flops.values(), *found.bandwidth.values()] for rate in rates.values()]
    assert min(rates) > 0
    assert found.products("float32") == max(rate for name in ("float32", "float32, oneDNN") for rate in found.flops[name].values())
    assert found.processor in found.sentence()
    assert found.best(found) == found


def test_when_two_threads_are_no_faster_than_one_then_the_table_says_not_to_use_it() -> None:
    rates = {"float32": {"1": 1e11, "2 threads": 2e11}, "bfloat16": {"1": 4e11, "2 threads": 8e11}}
    bandwidth = {"copy": {"1": 4e10, "2 threads": 4e10}}
    quiet = machine.Ceilings("chip", 2, "2", 0.0, rates, bandwidth)
    busy = machine.Ceilings("chip", 2, "2", 2.0, rates | {"bfloat16": {"1": 4e11, "2 threads": 4.1e11}}, bandwidth)

    assert "Do not use" not in quiet.sentence()
    assert "only 1.0 times" in busy.sentence()


@pytest.mark.parametrize("script", [machine, floor])
def test_when_a_script_runs_quickly_then_it_prints_a_table_and_writes_json(script, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["script", "--quick", "--output", str(path)])

    script.main()

    assert "| --- |" in capsys.readouterr().out
    assert json.loads(path.read_text())["machine"]["flops"]


@pytest.mark.slow
def test_when_rounds_are_timed_quickly_then_all_contestants_learn_and_missing_ones_are_named(tmp_path: Path, capsys) -> None:
    path = tmp_path / "out.json"

    round_time.main(["--quick", "--peers", "pfllib", "pfllib-shipped", "plain", "flower", "--flower-python", "", "--output", str(path)])

    table = json.loads(path.read_text())["tables"][0]
    missing = [row for row in table["rows"] if "missing" in row]
    ran = [row for row in table["rows"] if "missing" not in row]
    assert [row["name"] for row in missing] == [round_time.PEERS["flower"].name]
    assert "--flower-python" in missing[0]["missing"]
    assert len(ran) == 5
    assert ran[0]["times_fedcast"] == 1
    assert all(row["seconds"] > 0 and row["cpu_seconds"] >= 0 and row["message_bytes"] > 0 for row in ran)
    assert all(row["heldout_loss"] < 2 for row in ran)
    assert "not run" in capsys.readouterr().out


def test_when_a_contestant_fails_then_the_error_ends_with_its_own_words(tmp_path: Path) -> None:
    setting = round_time.Setting(str(tmp_path), size="nano", batch=1, steps=1, clients=1, context=64, horizon=16, rounds=1)

    process = round_time.Running(round_time.Contestant("nobody", "nobody"), setting)

    with pytest.raises(round_time.ContestantError, match="no contestant of the kind 'nobody'"):
        process.wait()
    process.close()


def test_when_a_table_is_replaced_then_nothing_else_changes() -> None:
    document = "a\n<!-- table:x -->\nold\n<!-- /table:x -->\nb\n<!-- table:y -->\n<!-- /table:y -->\n"

    changed = replace_table(document, "x", markdown(["n"], [["\\1"]]))

    assert changed == "a\n<!-- table:x -->\n| n |\n| --- |\n| \\1 |\n<!-- /table:x -->\nb\n<!-- table:y -->\n<!-- /table:y -->\n"
    with pytest.raises(ValueError, match="no markers"):
        replace_table(document, "z", "")


SCRIPTS = sorted(path.stem for path in README.parent.glob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("tables", "scaling")])
def test_when_a_script_prints_a_table_then_the_readme_has_its_command_and_its_markers(name: str) -> None:
    document = README.read_text(encoding="utf-8")

    assert replace_table(document, name, "text") != document
    assert f"python -m benchmarks.{name}" in document
