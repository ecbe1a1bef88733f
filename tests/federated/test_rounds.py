"""The round loop over real sites: order of arrival, fleets, participation, bad replies, deadlines."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tests.federations import DOMAINS, small_spec, train_small

import fedcast.run.pretrain as pretraining
from fedcast.errors import QuorumError
from fedcast.federated.fleet import Fleet, ThreadFleet
from fedcast.federated.messages import Reply, Task
from fedcast.federated.site import Site
from fedcast.federated.workspace import Workspaces, model_layout
from fedcast.methods.base import build_method
from fedcast.run.folder import RunFolder
from fedcast.run.prepare import prepare, start_fleet
from fedcast.run.pretrain import Run, pretrain
from fedcast.spec import RunSpec


class Meddling:
    """A real fleet with something in the way of its training replies: another order, a delay, a spoilt reply."""

    def __init__(self, fleet: Fleet, *, reverse: bool = False, spoil: Mapping[str, Reply | None] | None = None, round_: int = 2) -> None:
        self._fleet, self._reverse, self._spoil, self._round = fleet, reverse, dict(spoil or {}), round_

    def sites(self) -> list[str]:
        """Return the names of the sites."""
        return self._fleet.sites()

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run the tasks and meddle with the replies."""
        replies = sorted(self._fleet.run(tasks, deadline_s), reverse=self._reverse, key=lambda pair: pair[0])
        for site, reply in replies:
            first = next(iter(tasks.values()))
            if first.kind == "train" and first.round == self._round and site in self._spoil:
                spoilt = self._spoil[site]
                if spoilt is not None:
                    yield site, spoilt
            else:
                yield site, reply

    def close(self) -> None:
        """Close the fleet."""
        self._fleet.close()


def train_meddled(monkeypatch: pytest.MonkeyPatch, spec: RunSpec, folder: Path, **meddling: object) -> Run:
    start = pretraining.start_fleet
    monkeypatch.setattr(pretraining, "start_fleet", lambda *a: Meddling(start(*a), **meddling))  # type: ignore[arg-type]
    return train_small(spec, folder)


def digest(run: Run) -> str:
    return str(run.results().weights_sha256.iloc[0])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_small(small_spec(), tmp_path_factory.mktemp("plain"))


def test_when_replies_arrive_in_another_order_then_the_bytes_are_the_same(
    plain: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert digest(train_meddled(monkeypatch, small_spec(), tmp_path, reverse=True)) == digest(plain)


def test_when_worker_processes_carry_the_tasks_then_the_bytes_are_the_same(plain: Run, tmp_path: Path) -> None:
    assert digest(train_small(small_spec(fleet="processes"), tmp_path)) == digest(plain)


def test_when_a_site_sends_a_bad_reply_then_it_is_dropped_named_and_the_round_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = Reply({"shared": torch.full((3,), float("nan"))}, {"samples": 1})
    run = train_meddled(monkeypatch, small_spec(), tmp_path, spoil={"energy": bad})
    rows = run.rows("round")
    assert list(rows[1]["dropped"]) == ["energy"]
    assert set(rows[1]["sites"]) == {"health", "medical"}
    assert rows[2]["dropped"] == {}
    assert run.results().mse.notna().all()


def test_when_a_site_never_answers_then_the_row_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = train_meddled(monkeypatch, small_spec(), tmp_path, spoil={"energy": None})
    assert run.rows("round")[1]["dropped"] == {"energy": "no reply before the deadline"}


def test_when_too_few_sites_answer_then_quorum_fails_and_the_run_resumes_to_the_same_bytes(
    plain: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch, pytest.raises(QuorumError, match="1 usable replies and needs 2"):
        train_meddled(patch, small_spec(), tmp_path, spoil=dict.fromkeys(DOMAINS[:2]))
    assert digest(train_small(small_spec(), tmp_path)) == digest(plain)


def test_when_half_of_the_sites_take_part_then_each_round_selects_that_many(tmp_path: Path) -> None:
    spec = small_spec("fedavg", rounds=4)
    spec = spec.model_copy(update={"federation": spec.federation.model_copy(update={"participation": 0.5})})
    run = pretrain(spec, output=tmp_path / "run")
    chosen = [frozenset(row["sites"]) for row in run.rows("round")]
    assert {len(sites) for sites in chosen} == {2}
    assert len(set(chosen)) > 1


def test_when_local_epochs_are_asked_for_then_steps_follow_the_site_size(tmp_path: Path) -> None:
    spec = small_spec("fedavg", rounds=1)
    spec = spec.model_copy(update={"federation": spec.federation.model_copy(update={"local_epochs": 0.01})})
    sites = pretrain(spec, output=tmp_path / "run").rows("round")[0]["sites"]
    for site in sites.values():
        assert site["steps"] == -(-0.01 * site["samples"] // (8 * 16))


class Slow:
    """A site that takes its time."""

    samples = 1

    class role:  # noqa: N801 - stands for an attribute
        step_multiplier = 1

    def run(self, task: Task, workspaces: object) -> Reply:
        """Answer after a second."""
        time.sleep(1.0)
        return Reply(meta={"samples": 1})


def test_when_the_deadline_passes_then_the_fleet_returns_without_the_late_reply() -> None:
    fleet = ThreadFleet({"slow": Slow()}, workers=1)  # type: ignore[dict-item]
    start = time.monotonic()
    assert list(fleet.run({"slow": Task("train", 1)}, deadline_s=0.1)) == []
    assert time.monotonic() - start < 0.9
    fleet.close()


def test_when_an_idle_worker_process_dies_then_a_new_one_takes_its_place(tmp_path: Path) -> None:
    spec = small_spec("fedavg", fleet="processes", workers=1)
    method = build_method(spec.method)
    prepared = prepare(spec, method)
    fleet = start_fleet(spec, method, prepared, RunFolder(tmp_path))
    layout, initial = model_layout(spec, method)
    task = Task("evaluate", 0, {"shared": initial[: layout.shared_size]}, {"part": "validation"})
    try:
        first = dict(fleet.run({"energy": task}, None))
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        again = dict(fleet.run({"energy": task}, None))
    finally:
        fleet.close()
    assert first["energy"].error is None
    assert again["energy"].meta["loss"] == first["energy"].meta["loss"]


def test_when_a_site_fails_then_its_traceback_stays_with_it(tmp_path: Path) -> None:
    spec = small_spec("fedavg")
    method = build_method(spec.method)
    prepared = prepare(spec, method)
    site = Site(prepared.roles["energy"], prepared.stores["energy"], spec, method, tmp_path)
    layout, initial = model_layout(spec, method)
    good = Task("train", 1, {"shared": initial[: layout.shared_size]})
    assert site.run(Task("train", 1, {"shared": torch.zeros(1)}), Workspaces()).error == "screen: the task's shared is not as declared"
    site._method = None  # type: ignore[assignment]
    reply = site.run(good, Workspaces())
    assert reply.error is not None
    assert "Traceback" not in reply.error
    assert "Traceback" in (tmp_path / "error.log").read_text()


def test_when_weights_diverge_then_the_site_says_so_and_keeps_its_last_state(tmp_path: Path) -> None:
    spec = small_spec("fedavg")
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"learning_rate": 1e38, "clip_norm": 1e30})})
    method = build_method(spec.method)
    prepared = prepare(spec, method)
    site = Site(prepared.roles["energy"], prepared.stores["energy"], spec, method, tmp_path)
    layout, initial = model_layout(spec, method)
    reply = site.run(Task("train", 1, {"shared": initial[: layout.shared_size]}), Workspaces())
    assert reply.error is not None
    assert "diverged" in reply.error
    assert not list(tmp_path.glob("state-*"))
