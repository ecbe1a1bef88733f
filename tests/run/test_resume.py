"""A run killed by SIGKILL at any point and started again ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tests.federations import small_spec, train_small

import fedcast.run.pretrain as pretraining
from fedcast.errors import CheckpointError, ResumeError, RunError
from fedcast.federated import checkpoint
from fedcast.federated.messages import Reply, Task
from fedcast.federated.once import Once
from fedcast.federated.rounds import Silent
from fedcast.federated.state import SiteStates
from fedcast.run.folder import RunFolder
from fedcast.run.pretrain import Run, pretrain
from fedcast.spec import RunSpec

PHASES = ("select", "client", "site", "aggregate", "evaluate", "checkpoint", "checkpoint-rename", "log", "row", "test", "result-row")
"""What an observer hears of, where a run can be killed."""


def _strike(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _tear(path: Path) -> None:
    """Leave half of a file, as a process that dies while it writes, and die."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    _strike()


def _tear_model(_: object, folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        _tear(path)


def _half_row(self: RunFolder, row: dict[str, Any]) -> None:
    with self.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row)[:99])


def _half_gone(path: Path, *_: object, **__: object) -> None:
    (path / "manifest.json").unlink()


def _named(name: str) -> Callable[..., bool]:
    return lambda *arguments: any(isinstance(argument, Path) and argument.name == name for argument in arguments)


POINTS: dict[str, tuple[object, str, Callable[..., bool], Callable[..., None], Callable[..., Any] | None]] = {
    # Where the process dies: the function after which it does, which call of it, how, and what does the function's work before.
    "site-state": (SiteStates, "save", lambda _, round_, *__: round_ == 2, _strike, None),
    "checkpoint-bytes": (checkpoint, "write_file", lambda path, *_: path.parent.name == "aside", _tear, None),
    "checkpoint-manifest": (checkpoint, "_write", _named("manifest.json"), _tear, None),
    "checkpoint-synced": (checkpoint, "_sync", lambda *_: True, _strike, None),
    "checkpoint-removal": (
        checkpoint.shutil,
        "rmtree",
        lambda path, **__: path.name == "round-000001" and path.is_dir(),
        _strike,
        _half_gone,
    ),
    "half-row": (RunFolder, "append", lambda _, row: row["kind"] == "round" and row["round"] == 2, _strike, _half_row),
    "best": (pretraining._Training, "_save_unseen", _named("best"), _tear_model, None),
    "final": (pretraining._Training, "_save_unseen", _named("final"), _tear_model, None),
    "scored": (pretraining, "write_text", _named("samples.json"), _strike, None),
    "results": (pd.DataFrame, "to_parquet", lambda *_: True, lambda _, path: _tear(path), None),
    "results-rename": (pretraining.os, "replace", _named("results.parquet"), _strike, lambda *_: None),
}
"""Places inside a step, where a run can be killed."""
SECOND = {"checkpoint-bytes", "checkpoint-manifest", "checkpoint-synced"}
"""They strike at the second round's call."""
QUICK = {"client", "aggregate", "checkpoint-rename", "site-state", "checkpoint-bytes"}


class Killer(Silent):
    """Kills its own process at a phase of the second round (of the last one, for the final test)."""

    def __init__(self, at: str, round_: int) -> None:
        self._at, self._round = at, round_

    def phase(self, name: str, round: int) -> None:
        """Kill the process when the phase has come."""
        if name == self._at and round == self._round:
            os.kill(os.getpid(), signal.SIGKILL)

    def site_done(self, round: int, site: str) -> None:
        """Kill the process between two sites' replies."""
        self.phase("site", round)

    def row(self, row: dict[str, Any]) -> None:
        """Kill the process between two rows of the log."""
        if row["kind"] == "round":
            self.phase("row", row["round"])
        elif row["kind"] == "result":
            self.phase("result-row", row["rounds"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_small(small_spec(), tmp_path_factory.mktemp("undisturbed"))


def weights(run: Run) -> bytes:
    return (run.final / "model.safetensors").read_bytes()


@pytest.mark.parametrize("phase", [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in (*PHASES, *POINTS)])
def test_when_killed_in_a_phase_then_the_resumed_run_ends_with_the_same_bytes(phase: str, undisturbed: Run, tmp_path: Path) -> None:
    round_ = 3 if phase in ("test", "result-row") else 2
    script = "import sys; from tests.run.test_resume import die; die(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
    dead = subprocess.run([sys.executable, "-c", script, phase, str(round_), str(tmp_path / "run")], cwd=Path(__file__).parents[2])
    assert dead.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "results.parquet").exists()
    resumed = pretrain(small_spec(), output=tmp_path / "run")
    assert weights(resumed) == weights(undisturbed)
    assert resumed.results().weights_sha256.iloc[0] == undisturbed.results().weights_sha256.iloc[0]
    for kind in ("round", "validation"):
        ours, theirs = resumed.rows(kind), undisturbed.rows(kind)
        assert [row["round"] for row in ours] == [row["round"] for row in theirs]
        loss = [[site["loss"] for site in row["sites"].values()] for row in ours]
        assert loss == [[site["loss"] for site in row["sites"].values()] for row in theirs]


def die(phase: str, round_: int, folder: str) -> None:
    """Train until the killer strikes; run by the tests in a process of its own."""
    if phase in POINTS:
        _arm(phase)
    pretrain(small_spec(), output=folder, observer=Killer(phase, round_))


def guarded_spec() -> RunSpec:
    """A federation whose sites agree on masks before they train."""
    return RunSpec.model_validate({**small_spec("fedavg").model_dump(), "guards": [{"name": "secure_sum"}]})


def die_in_an_exchange(folder: str) -> None:
    """As :func:`die`, when the first site has answered what a guard asks in the second round."""
    real = Once.ask

    def armed(self: Once, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        first = next(iter(tasks.values()))
        for pair in real(self, tasks, deadline_s):
            if first.kind == "guard" and first.round == 2:
                _strike()
            yield pair

    Once.ask = armed  # type: ignore[method-assign]
    pretrain(guarded_spec(), output=folder)


@pytest.mark.slow
def test_when_killed_in_a_guards_exchange_then_the_resumed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    script = "import sys; from tests.run.test_resume import die_in_an_exchange; die_in_an_exchange(sys.argv[1])"
    dead = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], cwd=Path(__file__).parents[2])
    assert dead.returncode == -signal.SIGKILL
    whole = train_small(guarded_spec(), tmp_path / "whole")
    assert weights(pretrain(guarded_spec(), output=tmp_path / "run")) == weights(whole)


def _arm(point: str) -> None:
    owner, name, when, strike, instead = POINTS[point]
    real = getattr(owner, name)
    calls = 0

    def armed(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        hit = when(*arguments)
        calls += hit
        hit = hit and calls == (2 if point in SECOND else 1)
        result = (real if instead is None or not hit else instead)(*arguments, **keywords)
        if hit:
            strike(*arguments[:2] if point in ("best", "final", "results") else arguments[:1])
        return result

    setattr(owner, name, armed)


def sparse_spec(workers: int, rounds: int, fleet: str = "processes") -> RunSpec:
    """A federation in worker processes of which two of three sites take part in a round."""
    spec = small_spec("fedtrl", workers=workers, fleet=fleet, rounds=rounds)
    return spec.model_copy(update={"federation": spec.federation.model_copy(update={"participation": 0.5})})


def die_sparsely(workers: str, rounds: str, folder: str) -> None:
    """As :func:`die`, in worker processes and with few sites a round."""
    pretrain(sparse_spec(int(workers), int(rounds)), output=folder, observer=Killer("site", 3))


@pytest.mark.parametrize(("workers", "rounds"), [(1, 3), pytest.param(2, 5, marks=pytest.mark.slow)])
def test_when_worker_processes_and_few_sites_are_killed_then_the_resumed_run_ends_with_the_same_bytes(
    workers: int, rounds: int, tmp_path: Path
) -> None:
    whole = pretrain(sparse_spec(2, rounds, fleet="threads"), output=tmp_path / "whole")
    script = "import sys; from tests.run.test_resume import die_sparsely\nif __name__ == '__main__': die_sparsely(*sys.argv[1:])"
    runner = tmp_path / "die.py"
    runner.write_text(script)
    root = Path(__file__).parents[2]
    dead = subprocess.run(
        [sys.executable, str(runner), str(workers), str(rounds), str(tmp_path / "run")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert dead.returncode == -signal.SIGKILL
    resumed = pretrain(sparse_spec(workers, rounds), output=tmp_path / "run")
    assert weights(resumed) == weights(whole)
    assert resumed.results().weights_sha256.iloc[0] == whole.results().weights_sha256.iloc[0]


def test_when_a_manifest_is_altered_then_its_checkpoint_is_not_believed(tmp_path: Path) -> None:
    run = train_small(small_spec("fedavg", rounds=2), tmp_path)
    (run.folder / "results.parquet").unlink()
    manifest = sorted((run.folder / "checkpoints").glob("round-*/manifest.json"))[-1]
    manifest.write_text(manifest.read_text().replace('"best_round": 2', '"best_round": 1'))
    kept = weights(run)
    train_small(small_spec("fedavg", rounds=2), tmp_path)
    assert weights(run) == kept
    assert '"best_round": 2' in manifest.read_text()


def test_when_the_run_is_complete_then_starting_it_again_changes_nothing(tmp_path: Path) -> None:
    spec = small_spec("fedavg", rounds=1)
    first = train_small(spec, tmp_path)
    stamp = first.folder.joinpath("metrics.jsonl").read_bytes()
    assert train_small(spec, tmp_path).folder.joinpath("metrics.jsonl").read_bytes() == stamp


def test_when_the_folder_holds_another_run_then_it_is_refused_and_kept(tmp_path: Path) -> None:
    first = train_small(small_spec("fedavg", rounds=1), tmp_path)
    kept = weights(first)
    with pytest.raises(ResumeError, match="another spec"):
        train_small(small_spec("fedavg", rounds=2), tmp_path)
    assert weights(first) == kept


def test_when_workers_or_fleet_change_then_the_folder_is_still_the_same_run() -> None:
    assert small_spec(workers=1).fingerprint() == small_spec(workers=2, fleet="processes").fingerprint()
    assert small_spec(rounds=1).fingerprint() != small_spec(rounds=2).fingerprint()


def test_when_the_last_checkpoint_is_damaged_then_the_one_before_is_used(undisturbed: Run, tmp_path: Path) -> None:
    script = "from tests.run.test_resume import die; import sys; die('select', 3, sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], cwd=Path(__file__).parents[2], check=False)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("round-*"))
    assert [path.name for path in checkpoints] == ["round-000001", "round-000002"]
    damaged = checkpoints[-1] / "server.safetensors"
    payload = bytearray(damaged.read_bytes())
    payload[len(payload) // 2] ^= 1
    damaged.write_bytes(payload)
    assert weights(pretrain(small_spec(), output=tmp_path / "run")) == weights(undisturbed)


def test_when_every_checkpoint_is_damaged_then_the_error_says_so(tmp_path: Path) -> None:
    run = train_small(small_spec("fedavg", rounds=1), tmp_path)
    (run.folder / "results.parquet").unlink()
    for path in (run.folder / "checkpoints").glob("round-*/manifest.json"):
        path.write_text("{}")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        train_small(small_spec("fedavg", rounds=1), tmp_path)


def test_when_another_process_holds_the_folder_then_it_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(RunError, match="in use"):
        train_small(small_spec("fedavg", rounds=1), tmp_path)


def test_when_the_log_ends_in_half_a_row_then_it_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append({"kind": "round", "round": 1})
    with folder.metrics.open("a") as file:
        file.write(json.dumps({"kind": "round", "round": 2})[:9])
    assert [row["round"] for row in folder.rows()] == [1]
