from __future__ import annotations

import shutil
import socket
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedcast.cli.main import run
from fedcast.consortium import coordinator as module
from fedcast.consortium.coordinator import Coordinator, readable
from fedcast.consortium.kits import CoordinatorKit
from fedcast.consortium.provision import Consortium
from fedcast.consortium.registry import known_nodes
from fedcast.errors import CertificateError, ConsortiumError, MissingExtraError

Make = Callable[..., Consortium]
SITES = {7: "hospital-a"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("\x1b[92mINFO \x1b[0m:      [Fleet.ActivateNode] Activated node_id=7", "hospital-a joined"),
        ("INFO :      [Fleet.DeactivateNode] Deactivated node_id=7", "hospital-a left"),
        ("INFO :      [Fleet.ActivateNode] Activated node_id=8", "node 8 joined"),
        (
            "ERROR : [/v1/fleet/activate-node][ApiError:2004] key: b'-', exception: SuperNode with node ID 7 could not be activated.",
            "hospital-a was refused: its last connection counts for up to a minute",
        ),
        ("ERROR : exception: No SuperNode found with the given public key.", "a site was refused: its key is not registered"),
        ("2026-11-20T19:55:24+00:00 refused 192.0.2.1 \"POST /docs\" 404", "proxy: refused 192.0.2.1 \"POST /docs\" 404"),
        ("2026-11-20T19:55:24+00:00 refused 192.0.2.1 \"POST /v1/fleet/activate-node\" 415", None),
        ("2026/11/20 19:55:24 [error] 7#7: *1 connect() failed (111)", "proxy: 7#7: *1 connect() failed (111)"),
        ("ERROR : [/v1/fleet/activate-node][ApiError:1002] Unsupported Content-Type: 'x'", None),
        ("WARNING :   Connection attempt failed", "flower: Connection attempt failed"),
        ("2026-11-20T19:55:10.416Z INFO [uvicorn.error] Started server process [12797]", None),
        ("INFO :      Starting Flower SuperLink", None),
        ("", None),
    ],
)  # fmt: skip
def test_when_flower_or_nginx_writes_a_line_then_a_person_reads_what_it_means(line: str, told: str | None) -> None:
    assert readable(line, SITES) == told


@pytest.mark.parametrize("which", ["port", "proxy_port"])
def test_when_a_port_is_taken_then_it_is_named_and_nothing_is_started(
    consortium: Make, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = consortium().coordinator
    monkeypatch.setattr(module, "program", lambda name: name)
    monkeypatch.setattr(module, "_nginx", lambda: "nginx")
    port = getattr(kit, which)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConsortiumError, match=f"port {port} of .* is in use"):
        Coordinator(kit, proxy=True, say=str).__enter__()
    assert not (kit.flower / "superlink.log").exists()


@pytest.mark.parametrize(("days", "words"), [(-800, "expired on"), (800, "is not valid before")])
def test_when_sites_would_refuse_the_certificate_then_the_coordinator_does_not_start(consortium: Make, days: int, words: str) -> None:
    kit = consortium(now=datetime.now(UTC) + timedelta(days=days)).coordinator
    with pytest.raises(CertificateError, match=words):
        Coordinator(kit, say=str).__enter__()


def test_when_the_private_key_is_another_s_then_the_coordinator_does_not_start(consortium: Make) -> None:
    kit = consortium().coordinator
    shutil.copy(consortium("other").coordinator.key, kit.key)
    with pytest.raises(CertificateError, match=r"server\.key is not the private key of"):
        Coordinator(kit, say=str).__enter__()


def test_when_nginx_is_not_installed_then_that_is_said(consortium: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "program", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    with pytest.raises(MissingExtraError, match="nginx is not installed"):
        Coordinator(consortium().coordinator, proxy=True, say=str).__enter__()


def test_when_a_database_is_another_version_s_then_it_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE node (node_id BIGINT, name VARCHAR)")
    connection.close()
    with pytest.raises(ConsortiumError, match=r"state\.db cannot be read: no such column"):
        known_nodes(path)
    with pytest.raises(ConsortiumError, match="cannot be read"):
        known_nodes(tmp_path / "absent.db")
    assert not (tmp_path / "absent.db").exists()


def test_when_nodes_are_damaged_then_the_file_is_named(consortium: Make) -> None:
    kit = consortium().coordinator
    assert kit.nodes() == {}
    kit.write_nodes({"hospital-a": 2**64 - 1})
    assert CoordinatorKit.open(kit.folder).nodes() == {"hospital-a": 2**64 - 1}
    (kit.folder / "nodes.json").write_text('{"hospital-a": "7"}')
    with pytest.raises(ConsortiumError, match=r"nodes\.json cannot be read"):
        kit.nodes()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["consortium", "status", "--kit", "."], 45),
        (["coordinator", "start", "--kit", "."], 45),
        (["consortium", "add", "x", "--kit", "."], 45),
        (["consortium", "init", "c", "--host", "h", "--site", "../x"], 45),
        (["consortium", "init", "c", "--host", "h"], 2),
        (["consortium"], 2),
    ],
)
def test_when_a_command_cannot_be_done_then_it_ends_with_the_error_s_number(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(words) == code
    assert list(tmp_path.iterdir()) == []


def test_when_the_superlink_does_not_run_then_status_ends_with_46(consortium: Make, capfd: pytest.CaptureFixture[str]) -> None:
    kit = consortium().coordinator
    assert run(["consortium", "status", "--kit", str(kit.folder)]) == 46
    assert "the SuperLink of demo does not run" in capfd.readouterr().err
