"""Faults on a real SuperLink: sites that are killed or cut off and come back, networks that lose packets and cut connections.

The figures in docs/reliability.md are the properties that these tests record; root only, since they make a network namespace.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.federated.flower.deployment import SITES, SLOW_MACHINE_S, Deployment, wait_for, write_data
from tests.federated.flower.faulty import HOST, Cutting, Link, linked, possible
from tests.federated.flower.test_deployment import alive_in_session, federation, rounds_done, weights
from tests.federated.standins import Losing

import fedcast.run.pretrain as pretraining
from fedcast.consortium.coordinator import Coordinator
from fedcast.consortium.provision import create
from fedcast.federated.flower.processes import Child, free_port
from fedcast.run.pretrain import Run, pretrain
from fedcast.spec import RunSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not possible(), reason="network namespaces and /dev/net/tun need root"),
]
AWAY = "medical"
"""The site that is reached through the link."""
Measured = Callable[[str, object], None]


@dataclass
class Faulty:
    """A consortium behind networks that fail."""

    deployment: Deployment
    proxy: Cutting
    link: Link

    def start(self, name: str) -> None:
        """Start a site where it is: in the namespace, or on this machine."""
        ours = self.deployment
        command = [sys.executable, "-m", "fedcast", "site", "start", "--kit", str(ours.sites[name]), "--data", str(ours.data / name)]
        where = ["ip", "netns", "exec", self.link.space] if name == AWAY else []
        ours.processes[name] = Child([*where, *command], {**os.environ, "OMP_NUM_THREADS": "1"}, ours.folder / f"site-{name}.log")

    def calm(self) -> None:
        """Let the networks work."""
        self.proxy.mean, self.link.loss = None, 0.0


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faulty")
    with ExitStack() as held:
        link = held.enter_context(linked(f"fc{os.getpid()}"))
        made = create(folder / "consortium", name="test", host=HOST, sites=SITES, port=free_port(), proxy_port=free_port())
        coordinator = held.enter_context(Coordinator(made.coordinator, say=lambda _: None))
        proxy = Cutting(made.coordinator.proxy_port, made.coordinator.port)
        held.callback(proxy.close)
        sites = {name: folder / "consortium" / "sites" / name for name in SITES}
        deployment = Deployment(folder, made.coordinator, sites, write_data(folder / "data", SITES), None, coordinator)  # type: ignore[arg-type]
        held.callback(lambda: [child.stop(60) for child in deployment.processes.values()])
        ours = Faulty(deployment, proxy, link)
        for name in SITES:
            ours.start(name)
        yield ours


def spec_of(faulty: Faulty, rounds: int = 3, **federation_keys: object) -> RunSpec:
    return federation(faulty.deployment.data, "fedtrl", rounds=rounds, federation=federation_keys)


@pytest.fixture(scope="module")
def undisturbed(faulty: Faulty, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of three rounds of FedTRL, private weights included, that nothing disturbs, on threads."""
    return weights(on_threads(spec_of(faulty), tmp_path_factory.mktemp("calm") / "run"))


def on_threads(spec: RunSpec, output: Path) -> Run:
    return pretrain(spec.model_copy(update={"federation": spec.federation.model_copy(update={"fleet": "threads"})}), output=output)


def started(faulty: Faulty, spec: RunSpec, output: Path, after: int = 1) -> Child:
    """Start a run and wait for its first rounds."""
    child = faulty.deployment.run_process(spec, output)
    assert wait_for(lambda: rounds_done(output) >= after or child.code() is not None, 2 * SLOW_MACHINE_S), child.last_lines(10)
    assert child.code() is None, child.last_lines(10)
    return child


def ended(child: Child, seconds: float = 4 * SLOW_MACHINE_S) -> None:
    assert child.wait(seconds) == 0, child.last_lines(20)


def test_when_connections_are_cut_at_random_bytes_then_no_round_is_corrupted(
    faulty: Faulty, undisturbed: str, tmp_path: Path, record_property: Measured
) -> None:
    output = tmp_path / "run"
    child = started(faulty, spec_of(faulty), output)
    begin = time.monotonic()
    faulty.proxy.mean = 2e6
    try:
        ended(child)
    finally:
        faulty.calm()
    cuts = faulty.proxy.resets, faulty.proxy.truncations
    record_property("measured", f"{cuts[0]} resets, {cuts[1]} truncations in 2 rounds and {time.monotonic() - begin:.0f} s")
    assert min(cuts) > 0
    assert weights(output) == undisturbed


def test_when_one_percent_of_the_packets_are_lost_then_no_round_is_corrupted(
    faulty: Faulty, undisturbed: str, tmp_path: Path, record_property: Measured
) -> None:
    carried, lost = faulty.link.carried, faulty.link.lost
    begin = time.monotonic()
    faulty.link.loss = 0.01
    try:
        ended(started(faulty, spec_of(faulty), tmp_path / "run"))
    finally:
        faulty.calm()
    carried, lost = faulty.link.carried - carried, faulty.link.lost - lost
    record_property("measured", f"{lost} of {carried} packets lost, 3 rounds in {time.monotonic() - begin:.0f} s")
    assert lost > 20
    assert weights(tmp_path / "run") == undisturbed


def test_when_a_site_is_cut_off_and_another_is_killed_then_rounds_close_by_the_deadline_and_they_come_back(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record_property: Measured
) -> None:
    deadline, output = 60.0, tmp_path / "run"
    spec = spec_of(faulty, rounds=8, deadline_s=deadline)
    child = started(faulty, spec, output)

    def without(site: str) -> bool:
        return any(site in row["dropped"] for row in Run(output).rows("round"))

    def back(site: str) -> bool:
        rows = Run(output).rows("round")
        last = max(row["round"] for row in rows if site in row["dropped"])
        return any(row["round"] > last for row in rows)

    faulty.link.partition(True)
    try:
        assert wait_for(lambda: without(AWAY) or child.code() is not None, 4 * SLOW_MACHINE_S), child.last_lines(10)
    finally:
        faulty.link.partition(False)
    healed = time.monotonic()
    assert wait_for(lambda: back(AWAY) or child.code() is not None, 4 * SLOW_MACHINE_S), child.last_lines(10)
    record_property("measured", f"cut off: the round with it again closed {time.monotonic() - healed:.0f} s after the link was up")
    victim = faulty.deployment.processes["health"]
    os.kill(victim.pid, signal.SIGKILL)
    assert wait_for(lambda: not alive_in_session(victim.pid), 30), "a killed site leaves processes behind"
    assert wait_for(lambda: without("health") or child.code() is not None, 4 * SLOW_MACHINE_S), child.last_lines(10)
    victim.wait(10)
    faulty.start("health")
    restarted = time.monotonic()
    assert wait_for(lambda: back("health") or child.code() is not None, 4 * SLOW_MACHINE_S), child.last_lines(10)
    record_property("measured", f"killed: the round with it again closed {time.monotonic() - restarted:.0f} s after the restart")
    ended(child, 8 * SLOW_MACHINE_S)

    rows = Run(output).rows("round")
    dropped = {(row["round"], site) for row in rows for site in row["dropped"]}
    assert {site for _, site in dropped} == {AWAY, "health"}
    late = [row["seconds"] - deadline for row in rows if row["dropped"]]
    closed = f"{max(late):.1f} s after the deadline of {deadline:.0f} s at most"
    record_property("measured", f"{len(late)} rounds without a site closed {closed}")
    assert max(late) < 5
    start = pretraining.start_fleet
    monkeypatch.setattr(pretraining, "start_fleet", lambda *a: Losing(start(*a), dropped))
    assert weights(output) == weights(on_threads(spec, tmp_path / "others"))


def test_when_the_superlink_is_killed_then_the_run_goes_on_when_it_is_back(
    faulty: Faulty, undisturbed: str, tmp_path: Path, record_property: Measured
) -> None:
    output, coordinator = tmp_path / "run", faulty.deployment.coordinator
    child = started(faulty, spec_of(faulty), output)
    os.kill(coordinator._children["superlink"].pid, signal.SIGKILL)
    begin = time.monotonic()
    coordinator.__exit__(None, None, None)
    time.sleep(5.0)
    coordinator.__enter__()
    assert wait_for(lambda: rounds_done(output) >= 2 or child.code() is not None, 4 * SLOW_MACHINE_S), child.last_lines(10)
    record_property("measured", f"the next round closed {time.monotonic() - begin:.0f} s after the SuperLink was killed, 5 s of them off")
    ended(child)
    assert weights(output) == undisturbed
