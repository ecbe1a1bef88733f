"""A coordinator with nginx before it and real SuperNodes: what passes, what is refused, and what a person is told."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedcast.consortium.coordinator import Coordinator, _nginx
from fedcast.consortium.diagnosis import diagnose
from fedcast.consortium.kits import CoordinatorKit, SiteKit, write_connection
from fedcast.consortium.provision import Consortium, add_site, create, remove_site
from fedcast.errors import CertificateError, FedcastError, IdentityError, MissingExtraError
from fedcast.federated.flower.processes import Child, environment, free_port, program, wait_until_listening

pytest.importorskip("flwr", reason="flwr is not installed")
try:
    NGINX = _nginx()
except MissingExtraError:
    pytest.skip("nginx is not installed", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE_S = 240.0
FLEET = [
    f"/v1/fleet/{call}"
    for call in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages"),
        *("get-run", "get-fab", "push-object", "pull-object", "confirm-message-received"),
    )
]
SPEC = """
[data]
source = "bundled"
domains = ["energy", "medical"]
[model]
size = "tiny"
context = 64
horizon = 16
[training]
batch_size = 4
[federation]
rounds = 1
local_steps = 1
[evaluation]
windows = 4
validation_windows = 4
baselines = []
"""


def fedcast(*words: str | Path, **more: str) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-m", "fedcast", *map(str, words)], {**os.environ, "OMP_NUM_THREADS": "1", **more}


def wait_for(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    folder = tmp_path_factory.mktemp("deployment") / "consortium"
    return create(folder, name="demo", host="localhost", sites=["energy", "medical"], port=free_port(), proxy_port=free_port())


@pytest.fixture(scope="module")
def coordinator(made: Consortium) -> Iterator[Child]:
    """``fedcast coordinator start --proxy``, once its proxy listens."""
    command, env = fedcast("coordinator", "start", "--kit", made.coordinator.folder, "--proxy")
    child = Child(command, env, made.folder / "coordinator.log")
    try:
        wait_for(lambda: "sites may join" in child.output() or child.code() is not None, "the coordinator")
        assert child.code() is None, child.output()
        yield child
    finally:
        child.stop(60)


def ask(kit: CoordinatorKit, port: int, path: str, method: str = "POST", host: str = "localhost") -> int:
    context = ssl.create_default_context(cafile=str(kit.authority))
    connection = http.client.HTTPSConnection(host, port, timeout=30, context=context)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("Content-Type", "application/protobuf")
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        with connection.getresponse() as answer:
            return answer.status
    finally:
        connection.close()


def test_when_a_run_goes_through_the_proxy_then_sites_join_and_a_whole_round_comes_back(
    made: Consortium, coordinator: Child, tmp_path: Path
) -> None:
    from tests.federated.flower.deployment import write_data

    data = write_data(tmp_path / "data", ("energy", "medical"))
    with ExitStack() as held:
        for site in ("energy", "medical"):
            command, env = fedcast("site", "start", "--kit", made.folder / "sites" / site, "--data", data / site)
            held.callback(Child(command, env, tmp_path / f"{site}.log").stop, 60)
        wait_for(lambda: all(f"{site} joined" in coordinator.output() for site in ("energy", "medical")), "both sites")
        command, env = fedcast("consortium", "status", "--kit", made.coordinator.folder, "--json")
        status = json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
        assert status["proxy"] is True
        assert [site["state"] for site in status["sites"]] == ["online", "online"]
        (tmp_path / "spec.toml").write_text(SPEC)
        run = [
            "run",
            tmp_path / "spec.toml",
            "--fleet",
            "flower",
            "--kit",
            made.coordinator.folder,
            "-o",
            tmp_path / "out",
            "--wait",
            "240",
        ]
        command, env = fedcast(*run)
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
    weights = sum(path.stat().st_size for path in (tmp_path / "out" / "final").glob("*.safetensors"))
    assert weights > 2 * 5 * 2**20, "the model must be larger than Flower's objects of 5 MiB"
    assert "refused" not in coordinator.output()


def test_when_every_call_that_the_superlink_knows_is_made_through_the_proxy_then_ten_are_answered(
    made: Consortium, coordinator: Child
) -> None:
    kit = made.coordinator
    context = ssl.create_default_context(cafile=str(kit.authority))
    with urllib.request.urlopen(f"https://localhost:{kit.port}/openapi.json", context=context, timeout=30) as answer:
        known = {path: sorted(calls) for path, calls in json.load(answer)["paths"].items()}
    assert {path.split("/")[2] for path in known if path.startswith("/v1/")} >= {"control", "fleet", "runtime"}
    assert known["/v1/control/start-run"] == ["post"]
    answered = {path: ask(kit, kit.proxy_port, path, method.upper()) for path, methods in known.items() for method in methods}
    assert {path: status for path, status in answered.items() if path not in FLEET and status != 404} == {}
    assert {path: status for path, status in answered.items() if path in FLEET} == dict.fromkeys(FLEET, 401)
    others = ["/v1/fleet/", "/v1/fleet", "/docs", "/openapi.json", "/"]
    assert {path: ask(kit, kit.proxy_port, path, "GET") for path in others} == dict.fromkeys(others, 404)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/pull-messages/../../control/list-nodes",
        "/v1/fleet/..%2fcontrol%2flist-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2flist-nodes",
        "/v1/control/list-nodes?/v1/fleet/pull-messages",
        "/v1/control/list-nodes#/v1/fleet/pull-messages",
        "/v1/control/list-nodes;/v1/fleet/pull-messages",
        "/V1/CONTROL/list-nodes",
        "//v1/control/list-nodes",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messagesx",
        "https://127.0.0.1/v1/control/list-nodes",
    ],
)  # fmt: skip
def test_when_a_path_is_spelt_otherwise_then_the_proxy_lets_nothing_but_the_fleet_api_through(
    made: Consortium, coordinator: Child, path: str
) -> None:
    kit = made.coordinator
    before = (kit.flower / "superlink.log").read_text().count("/v1/control/list-nodes")
    assert ask(kit, kit.proxy_port, path) in (400, 404)
    assert (kit.flower / "superlink.log").read_text().count("/v1/control/list-nodes") == before


def test_when_a_method_is_not_post_then_the_proxy_refuses_it(made: Consortium, coordinator: Child) -> None:
    kit = made.coordinator
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
        assert ask(kit, kit.proxy_port, "/v1/fleet/pull-messages", method) in (404, 405), method
    assert ask(kit, kit.proxy_port, "/v1/fleet/pull-messages") in (401, 415)


@pytest.mark.parametrize("words", [["list"], ["supernode", "list"], ["stop", "1"], ["supernode", "unregister", "1"]])
def test_when_flower_s_own_commands_are_pointed_at_the_proxy_then_they_fail_and_on_loopback_they_are_heard(
    made: Consortium, coordinator: Child, tmp_path: Path, words: list[str]
) -> None:
    kit, said = made.coordinator, {}
    for port in (kit.port, kit.proxy_port):
        write_connection(tmp_path / str(port), f"127.0.0.1:{port}", kit.authority)
        command = [program("flwr"), *words, "consortium", "--format", "json"]
        done = subprocess.run(command, env=environment(tmp_path / str(port)), capture_output=True, text=True, check=False, timeout=120)
        said[port] = json.loads(done.stdout)
    assert said[kit.proxy_port]["success"] is False
    assert "404" in said[kit.proxy_port]["error-message"]
    assert said[kit.port].get("success") is True or "404" not in said[kit.port]["error-message"]


def test_when_plain_text_is_spoken_to_proxy_or_superlink_then_neither_answers_the_question(made: Consortium, coordinator: Child) -> None:
    for port in (made.coordinator.proxy_port, made.coordinator.port):
        connection = http.client.HTTPConnection("localhost", port, timeout=30)
        try:
            connection.request("POST", "/v1/fleet/activate-node", b"")
            assert connection.getresponse().status == 400
        except (http.client.HTTPException, OSError):
            pass  # the SuperLink hangs up
        finally:
            connection.close()


def test_when_the_superlink_listens_then_it_does_so_on_loopback_alone(made: Consortium, coordinator: Child) -> None:
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert f"0100007F:{made.coordinator.port:04X}" in listening
    assert f"00000000:{made.coordinator.port:04X}" not in listening
    six = [line.split()[1] for line in Path("/proc/net/tcp6").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert not any(address.endswith(f":{made.coordinator.port:04X}") for address in six)


def supernode(kit: SiteKit, address: str | None = None) -> str:
    """Let a real SuperNode try to join, and return what it wrote when it gave up."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [program("flower-supernode"), "--root-certificates", str(kit.authority), "--superlink", address or kit.address]
    command += ["--auth-supernode-private-key", str(kit.key), "--host", "127.0.0.1", "--port", str(port), "--max-retries", "0"]
    child = Child(command, environment(kit.flower), kit.flower / "supernode.log")
    try:
        code = child.wait(PATIENCE_S)
    finally:
        child.stop()  # its SuperExec would outlive it
    assert code not in (0, None), child.output()
    assert "Exit Code: 305" in child.output()
    return child.output()


def explained(kit: SiteKit, output: str) -> FedcastError:
    found = diagnose(kit, output)
    assert found is not None, output
    return found


@contextmanager
def proxy(kit: CoordinatorKit) -> Iterator[None]:
    """Nginx alone with a kit's configuration."""
    child = Child([NGINX, "-p", f"{kit.folder}/", "-c", str(kit.proxy)], dict(os.environ), kit.folder / "proxy.log")
    try:
        assert wait_until_listening("127.0.0.1", kit.proxy_port, child, PATIENCE_S), child.output()
        yield
    finally:
        child.stop()


def test_when_the_key_is_not_registered_then_the_supernode_is_refused_and_the_key_is_named(
    made: Consortium, coordinator: Child, tmp_path: Path
) -> None:
    add_site(made.coordinator, "stranger", tmp_path)
    kit = SiteKit.open(tmp_path / "stranger")
    error = explained(kit, supernode(kit))
    assert isinstance(error, IdentityError)
    assert "'stranger'" in error.message
    wait_for(lambda: "a site was refused: its key is not registered" in coordinator.output(), "the coordinator's line")


def test_when_the_authority_is_another_then_the_supernode_is_refused_and_the_authority_is_named(
    made: Consortium, coordinator: Child, tmp_path: Path, consortium: Callable[..., Consortium]
) -> None:
    folder = shutil.copytree(made.folder / "sites" / "energy", tmp_path / "energy", ignore=shutil.ignore_patterns("state", "bin"))
    shutil.copy(consortium("other").coordinator.authority, folder / "ca.crt")
    kit = SiteKit.open(folder)
    error = explained(kit, supernode(kit))
    assert isinstance(error, CertificateError)
    assert "was not signed by this consortium's authority" in error.message


def test_when_the_certificate_is_expired_then_the_supernode_is_refused_and_the_day_is_named(consortium: Callable[..., Consortium]) -> None:
    ended = datetime.now(UTC) - timedelta(days=10)
    old = consortium(now=ended - timedelta(days=30), days=30)
    kit = SiteKit.open(old.folder / "sites" / "hospital-a")
    with proxy(old.coordinator):
        error = explained(kit, supernode(kit))
    assert isinstance(error, CertificateError)
    assert f"expired on {ended:%Y-%m-%d}" in error.message


def test_when_the_host_name_is_another_then_the_supernode_is_refused_and_both_names_are_given(
    consortium: Callable[..., Consortium],
) -> None:
    made = consortium(host="coordinator.example.org")
    kit = replace(SiteKit.open(made.folder / "sites" / "hospital-a"), host="127.0.0.2")
    with proxy(made.coordinator):
        error = explained(kit, supernode(kit))
    assert isinstance(error, CertificateError)
    assert re.search(r"holds for coordinator\.example\.org.* not for 127\.0\.0\.2", error.message)


def test_when_the_coordinator_speaks_plain_text_then_the_supernode_is_refused_and_that_is_said(
    consortium: Callable[..., Consortium],
) -> None:
    made = consortium()
    kit = SiteKit.open(made.folder / "sites" / "hospital-a")
    with http.server.ThreadingHTTPServer(("127.0.0.1", kit.port), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        error = explained(kit, supernode(kit))
        server.shutdown()
        thread.join()
    assert isinstance(error, CertificateError)
    assert "does not speak TLS" in error.message


def command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended while we looked
            yield path.read_bytes()


def test_when_the_coordinator_is_told_to_end_then_it_ends_with_all_its_processes(consortium: Callable[..., Consortium]) -> None:
    kit = consortium().coordinator
    command, env = fedcast("coordinator", "start", "--kit", kit.folder, "--proxy")
    child = Child(command, env, kit.folder.parent / "coordinator.log")
    try:
        wait_for(lambda: "sites may join" in child.output() or child.code() is not None, "the coordinator")
        nodes = kit.nodes()
        assert set(nodes) == {"hospital-a", "hospital-b"}
        again, _ = fedcast("coordinator", "start", "--kit", kit.folder)
        second = subprocess.run(again, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        assert second.returncode == 45
        assert f"port {kit.port} of the SuperLink is in use" in second.stderr
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(60) == 0
    finally:
        child.stop()
    # Flower's SuperExec sees within a second or two that its SuperLink is gone.
    wait_for(lambda: not any(str(kit.folder).encode() in line for line in command_lines()), "the end of every process")
    assert child.output().count("Traceback") == 0


def test_when_a_site_is_removed_or_gets_a_new_key_then_the_next_start_brings_flower_to_the_kit(
    consortium: Callable[..., Consortium], tmp_path: Path
) -> None:
    kit, said = consortium().coordinator, []
    with Coordinator(kit, say=said.append):
        first = kit.nodes()
    kit, _ = add_site(remove_site(kit, "hospital-a"), "hospital-b", tmp_path, replaces=True)
    kit, _ = add_site(kit, "hospital-c", tmp_path)
    (kit.folder / "nodes.json").unlink()
    with Coordinator(kit, say=said.append):
        second = kit.nodes()
    with Coordinator(kit, say=said.append):
        assert kit.nodes() == second
    assert set(second) == {"hospital-b", "hospital-c"}
    assert not set(first.values()) & set(second.values())
    line = (kit.folder.parent / "sites" / "hospital-a" / "node.pub").read_text()
    kit, _ = add_site(kit, "hospital-a", tmp_path, public_key=line)
    with pytest.raises(IdentityError, match="was taken out before"), Coordinator(kit, say=said.append):
        pass
