"""``fedcast run`` and ``fedcast site start`` where they can be answered without a running consortium."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcast.consortium.kits import CoordinatorKit
from fedcast.consortium.provision import create

Call = Callable[..., Any]
SPEC = """
name = "small"
[data]
domains = ["health"]
[model]
context = 32
horizon = 8
[method]
name = "fedavg"
[training]
batch_size = 4
[federation]
rounds = 1
local_steps = 1
[evaluation]
windows = 2
validation_windows = 2
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A spec as small as can be."""
    path = tmp_path / "small.toml"
    path.write_text(SPEC, encoding="utf-8")
    return path


@pytest.fixture
def coordinator(tmp_path: Path) -> CoordinatorKit:
    """A coordinator's kit of one site that has not joined."""
    return create(tmp_path / "consortium", name="test", host="localhost", sites=["health"]).coordinator


def test_when_a_spec_is_run_on_threads_then_it_is_trained_and_the_report_written(fedcast: Call, spec: Path, tmp_path: Path) -> None:
    answer = fedcast("run", spec, "--fleet", "threads", "-o", tmp_path / "run", "--json")
    assert answer.code == 0, answer.err
    assert Path(answer.json()["report"]).is_file()


def test_when_a_fleet_is_unknown_then_it_is_refused(fedcast: Call, spec: Path) -> None:
    assert fedcast("run", spec, "--fleet", "rockets").code == 10


def test_when_a_consortium_is_not_there_or_has_no_site_yet_then_the_next_step_is_named(
    fedcast: Call, spec: Path, coordinator: CoordinatorKit, tmp_path: Path
) -> None:
    nowhere = fedcast("run", spec, "--fleet", "flower", "--kit", tmp_path / "nowhere", "-o", tmp_path / "run")
    assert nowhere.code == 45
    empty = fedcast("run", spec, "--fleet", "flower", "--kit", coordinator.folder, "-o", tmp_path / "run")
    assert empty.code == 45
    assert "fedcast coordinator start" in empty.err
    assert fedcast("pretrain", spec, "--federation.fleet", "flower", "-o", tmp_path / "run").code == 10
    assert not (tmp_path / "run").exists()


def test_when_no_superlink_runs_then_the_run_ends_by_itself_and_says_so(
    fedcast: Call, spec: Path, coordinator: CoordinatorKit, tmp_path: Path
) -> None:
    coordinator.write_nodes({"health": 7})
    answer = fedcast("run", spec, "--fleet", "flower", "--kit", coordinator.folder, "-o", tmp_path / "run", "--wait", "1", "--json")
    assert answer.code == 46
    assert "fedcast coordinator start" in answer.json()["hint"]


def test_when_a_site_has_no_kit_or_no_data_then_it_does_not_start(fedcast: Call, coordinator: CoordinatorKit, tmp_path: Path) -> None:
    kit = coordinator.folder.parent / "sites" / "health"
    assert fedcast("site", "start", "--kit", tmp_path, "--data", tmp_path).code == 45
    assert fedcast("site", "start", "--kit", kit, "--data", tmp_path / "nowhere").code == 22
    (kit / "site.toml").write_text((kit / "site.toml").read_text() + '[policy]\nsecrets = "all"\n')
    refused = fedcast("site", "start", "--kit", kit, "--data", tmp_path)
    assert refused.code == 45
    assert "policy.secrets" in refused.err
