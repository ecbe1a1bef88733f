"""The fleet of a consortium on a real SuperLink: three SuperNodes over TLS with node authentication, on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tests.federated.flower.deployment import SITES, SLOW_MACHINE_S, Deployment, wait_for
from torch import Tensor

from fedcast.data.store import SeriesStore
from fedcast.errors import QuorumError, SiteError, SpecError, UnknownNameError
from fedcast.federated.audit import verify
from fedcast.federated.flower import link
from fedcast.federated.flower.processes import environment, program
from fedcast.federated.flower.worker import load_site
from fedcast.federated.plan import Plan
from fedcast.methods.base import build_method
from fedcast.run.finetune import finetune
from fedcast.run.pretrain import Run, pretrain
from fedcast.run.remote import Consortium
from fedcast.spec import RunSpec, parse_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
WINDOW = 64


def federation(data: Path, method: str = "fedavg", *, fleet: str = "flower", rounds: int = 2, **more: Mapping[str, object]) -> RunSpec:
    """Return the spec of a run over the three sites' data."""
    document: dict[str, dict[str, object]] = {
        "data": {"source": str(data), "domains": list(SITES)},
        "model": {"size": "nano", "context": 64, "horizon": 16},
        "method": {"name": method},
        "training": {"batch_size": 8, "learning_rate": 2e-3, "precision": "float32", "products": "default", "device": "cpu"},
        "federation": {"rounds": rounds, "local_steps": 4, "fleet": fleet},
        "evaluation": {"windows": 4, "validation_windows": 4, "every": rounds},
    }
    for section, keys in more.items():
        document[section] = {**document.get(section, {}), **keys}
    return parse_spec({"name": method, "seed": 1, **document})


def weights(run: Run | Path) -> str:
    """Return the digest of a run's last weights, private ones included."""
    folder = run.folder if isinstance(run, Run) else run
    rows = Run(folder).rows("result")
    return str({row["weights_sha256"] for row in rows})


def rounds_done(folder: Path) -> int:
    """Return how many rounds a run has logged."""
    return len(Run(folder).rows("round")) if folder.is_dir() else 0


@pytest.fixture(scope="module")
def four_rounds(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of four rounds of FedAvg that nothing disturbs, on threads."""
    return weights(pretrain(federation(deployment.data, fleet="threads", rounds=4), output=tmp_path_factory.mktemp("calm") / "run"))


def test_when_one_spec_runs_on_three_fleets_then_the_final_weights_are_bit_identical(
    deployment: Deployment, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    digests = {}
    for fleet in ("threads", "processes", "flower"):
        run = pretrain(federation(deployment.data, fleet=fleet), output=tmp_path / fleet, consortium=deployment.consortium)
        digests[fleet] = (weights(run), (run.final / "model.safetensors").read_bytes())
    seconds = [row["seconds"] for row in run.rows("round")]
    record_property("seconds a round on Flower", [round(each, 1) for each in seconds])
    record_property("load of the machine", os.getloadavg()[0])

    assert digests["threads"] == digests["processes"] == digests["flower"]
    for site in SITES:
        events = verify(deployment.state(site) / "audit.jsonl").events
        assert events["task-answered"] >= 4


def test_when_fedtrl_runs_then_nothing_but_declared_tensors_is_on_the_wire(deployment: Deployment, tmp_path: Path) -> None:
    recorder = deployment.recorder
    begin_up, begin_down = len(recorder.up), len(recorder.down)
    spec = federation(deployment.data, "fedtrl")
    flower = pretrain(spec, output=tmp_path / "flower", consortium=deployment.consortium)
    up, down = bytes(recorder.up[begin_up:]), bytes(recorder.down[begin_down:])
    threads = pretrain(federation(deployment.data, "fedtrl", fleet="threads"), output=tmp_path / "threads")
    assert weights(flower) == weights(threads)

    # That the recorder reads what travels: the server's shared weights went down, and a site's decoder of the scored round came up.
    plan = Plan(spec, build_method(spec.method))
    shared = plan.layout.shared_size
    assert windows_of(plan.initial[:shared]) & set_of(down)
    for site in SITES:
        folder = deployment.state(site) / "runs" / spec.fingerprint() / "site"
        first, last = (load_file(folder / f"state-{number:06d}.safetensors") for number in (1, 2))
        decoder = plan.layout.size - shared
        assert last["private"].numel() > decoder > 0, "FedTRL has a discriminator, which is private too"
        assert windows_of(last["private"][:decoder]) <= set_of(up)
        # What must not travel: the discriminator ever, the decoder before the scored round, moments, the method's own state, the data.
        secret = {"discriminator": last["private"][decoder:], "early discriminator": first["private"][decoder:]}
        secret |= {"early decoder": first["private"][:decoder]}
        secret |= {name: value for name, value in last.items() if name.startswith(("moments.", "method."))}
        for name, tensor in secret.items():
            assert not windows_of(tensor) & (set_of(up) | set_of(down)), f"{name} of {site} was on the wire"
        for values in series_of(load_site(site, deployment.data / site)):
            assert not windows_of_bytes(values.tobytes()) & set_of(up), f"a series of {site} was on the wire"


def set_of(captured: bytes) -> _Bytes:
    """Return captured bytes as something to look for windows in."""
    return _Bytes((captured,))


class _Bytes:
    """Captured bytes: ``windows & bytes`` are the windows that occur in them, ``windows <= bytes`` is whether all do."""

    def __init__(self, parts: tuple[bytes, ...]) -> None:
        self._parts = parts

    def __or__(self, other: _Bytes) -> _Bytes:
        return _Bytes(self._parts + other._parts)

    def __rand__(self, windows: set[bytes]) -> set[bytes]:
        return {window for window in windows if any(window in part for part in self._parts)}

    def __ge__(self, windows: set[bytes]) -> bool:
        return (windows & self) == windows


def windows_of(tensor: Tensor) -> set[bytes]:
    """Return windows of a tensor's bytes, from its start, middle and end, that are no constant."""
    return windows_of_bytes(tensor.contiguous().numpy().tobytes())


def windows_of_bytes(content: bytes) -> set[bytes]:
    """Return windows of 64 bytes from up to 16 places that have more than a few distinct bytes."""
    places = np.linspace(0, max(0, len(content) - WINDOW), 16).astype(int) // 4 * 4
    cut = {content[place : place + WINDOW] for place in places}
    return {window for window in cut if len(window) == WINDOW and len(set(window)) > 16}


def series_of(store: SeriesStore) -> Iterator[np.ndarray]:
    """Yield a few series of a store as float32 and as float64."""
    for index in range(0, len(store.ids), max(1, len(store.ids) // 8)):
        values = np.asarray(store.series(index))
        yield values.astype(np.float32)
        yield values.astype(np.float64)


def test_when_the_run_is_interrupted_then_flower_ends_too_and_the_folder_resumes(
    deployment: Deployment, four_rounds: str, tmp_path: Path
) -> None:
    spec, output = federation(deployment.data, rounds=4), tmp_path / "run"
    first = deployment.run_process(spec, output)
    assert wait_for(lambda: rounds_done(output) >= 1 or first.code() is not None, SLOW_MACHINE_S), first.last_lines(10)
    os.kill(first.pid, signal.SIGINT)
    assert first.wait(60) == 130, first.last_lines(10)
    assert wait_for(lambda: not running(deployment), 60), "the Flower run goes on"
    assert 1 <= rounds_done(output) < 4

    resumed = deployment.run_process(spec, output)
    assert resumed.wait(SLOW_MACHINE_S) == 0, resumed.last_lines(10)
    assert weights(output) == four_rounds


def running(deployment: Deployment) -> list[str]:
    """Return the Flower runs that have not finished."""
    command = [program("flwr"), "list", "--format", "json"]
    done = subprocess.run(command, env=environment(deployment.kit.flower), capture_output=True, timeout=60, check=False)
    return [run["run-id"] for run in json.loads(done.stdout)["runs"] if not run["status"].startswith("finished")]


def test_when_run_relay_superlink_and_a_site_are_killed_in_turn_then_the_weights_are_as_if_nothing_had_been(
    deployment: Deployment, four_rounds: str, tmp_path: Path
) -> None:
    spec, output = federation(deployment.data, rounds=4), tmp_path / "run"
    killed = deployment.run_process(spec, output)
    assert wait_for(lambda: rounds_done(output) >= 1 or killed.code() is not None, SLOW_MACHINE_S), killed.last_lines(10)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(10)

    resumed = deployment.run_process(spec, output)
    assert wait_for(lambda: relays(deployment) and rounds_done(output) >= 2, SLOW_MACHINE_S), resumed.last_lines(10)
    for pid in relays(deployment):
        os.kill(pid, signal.SIGKILL)
    victim = deployment.processes["health"]
    os.kill(victim.pid, signal.SIGKILL)
    assert wait_for(lambda: not alive_in_session(victim.pid), 30), "a killed site leaves processes behind"
    victim.wait(10)
    deployment.start_site("health")
    assert wait_for(lambda: rounds_done(output) >= 3 or resumed.code() is not None, SLOW_MACHINE_S), resumed.last_lines(10)
    deployment.coordinator.__exit__(None, None, None)
    time.sleep(1.0)
    deployment.coordinator.__enter__()
    assert resumed.wait(2 * SLOW_MACHINE_S) == 0, resumed.last_lines(10)
    assert weights(output) == four_rounds


def relays(deployment: Deployment) -> list[int]:
    """Return the server relays that run for this deployment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line, env = ((entry / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            except OSError:
                continue
            if b"fedcast.federated.flower.locked" in line and f"FLWR_HOME={deployment.kit.flower}".encode() in env:
                found.append(int(entry.name))
    return found


def alive_in_session(session: int) -> list[int]:
    """Return the processes that belong to a session or were started in one below it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_when_a_site_is_asked_for_what_it_does_not_allow_then_it_refuses_by_name(deployment: Deployment, tmp_path: Path) -> None:
    consortium = deployment.consortium
    with pytest.raises(SiteError, match=r"does not allow evaluation.samples = 1"):
        pretrain(federation(deployment.data, evaluation={"samples": 1}), output=tmp_path / "samples", consortium=consortium)
    with pytest.raises(SpecError, match="pools the data"):
        pretrain(federation(deployment.data, "central"), output=tmp_path / "central", consortium=consortium)
    with pytest.raises(SpecError, match="deals series out"):
        pretrain(with_data(deployment, partition="iid"), output=tmp_path / "iid", consortium=consortium)
    with pytest.raises(UnknownNameError, match="elsewhere"):
        pretrain(with_data(deployment, domains=("elsewhere",)), output=tmp_path / "unknown", consortium=consortium)
    with pytest.raises(SpecError, match="--kit"):
        pretrain(federation(deployment.data), output=tmp_path / "nowhere")


def with_data(deployment: Deployment, **keys: object) -> RunSpec:
    """Return the spec of a run with other keys in its data section."""
    spec = federation(deployment.data)
    return spec.model_copy(update={"data": spec.data.model_copy(update=keys)})


def test_when_a_checkpoint_lies_at_all_sites_then_finetuning_is_the_same_on_flower(deployment: Deployment, tmp_path: Path) -> None:
    base = pretrain(federation(deployment.data, fleet="threads", rounds=1), output=tmp_path / "base")
    more = {"model": {"checkpoint": str(base.final)}, "tuning": {"name": "head"}}
    digests = [
        weights(
            finetune(federation(deployment.data, fleet=fleet, rounds=1, **more), output=tmp_path / fleet, consortium=deployment.consortium)
        )
        for fleet in ("threads", "flower")
    ]
    assert digests[0] == digests[1]


def test_when_a_site_is_away_then_the_run_says_who_is_missing_after_a_bounded_wait(deployment: Deployment, tmp_path: Path) -> None:
    deployment.processes["medical"].stop(60)
    consortium = Consortium(deployment.kit.folder, wait_s=10.0)
    begin = time.monotonic()
    with pytest.raises(QuorumError, match="not online after 10 s: medical"):
        pretrain(federation(deployment.data), output=tmp_path / "run", consortium=consortium)
    assert time.monotonic() - begin < 150
    deployment.start_site("medical")


def test_when_a_site_is_told_to_end_then_it_and_all_its_processes_do(deployment: Deployment) -> None:
    site = deployment.processes["energy"]
    assert wait_for(lambda: "as site energy" in site.output(), SLOW_MACHINE_S), site.last_lines()
    os.kill(site.pid, signal.SIGTERM)
    assert site.wait(60) == 0
    assert not alive_in_session(site.pid)
    deployment.start_site("energy")


def test_when_a_shipped_app_brings_code_then_neither_sites_nor_coordinator_run_it(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    hostile = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\napp = None\n"
    subprocess.run([sys.executable, "-c", hostile], check=True, timeout=60)
    assert mark.exists(), "the code does what it is to be caught at"
    mark.unlink()
    relay = deployment.kit.flower / "relay"
    relay.mkdir(exist_ok=True)
    (relay / "hostile.py").write_text(hostile)
    monkeypatch.setitem(link._APP["tool"]["flwr"]["app"], "components", {"serverapp": "hostile:app", "clientapp": "hostile:app"})
    try:
        run = pretrain(federation(deployment.data, rounds=1), output=tmp_path / "run", consortium=deployment.consortium)
    finally:
        (relay / "hostile.py").unlink()
    assert rounds_done(run.folder) == 1
    assert any((deployment.kit.flower / "apps").rglob("hostile.py")), "Flower took the code in"
    assert not [path for site in SITES for path in (deployment.sites[site] / "flower").rglob("hostile.py")], "a site unpacked it"
    assert not mark.exists()
