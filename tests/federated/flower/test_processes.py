"""Flower's processes as children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedcast.errors import MissingExtraError
from fedcast.federated.flower.processes import Child, environment, free_port, last_lines, program, wait_until_listening

PARENT = """
import sys, time
from pathlib import Path
from fedcast.federated.flower.processes import Child
child = Child([sys.executable, "-c", "import time; time.sleep(600)"], {}, Path(sys.argv[1]) / "log")
print(child.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_when_a_parent_is_killed_then_its_child_ends(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.kill()
    end = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_alive(child)


def test_when_a_child_does_not_hear_then_it_and_its_own_children_are_ended(tmp_path: Path) -> None:
    deaf = 'trap "" TERM; sleep 600 & echo $!; wait; sleep 600'
    child = Child(["sh", "-c", deaf], dict(os.environ), tmp_path / "log")
    while not child.output().strip():
        time.sleep(0.02)
    grandchild = int(child.output())
    child.stop(0.3)
    assert child.code() == -signal.SIGKILL
    end = time.monotonic() + 10
    while is_alive(grandchild) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_alive(grandchild)


def test_when_a_child_has_ended_then_its_own_lines_are_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("an older one\n")
    child = Child(["sh", "-c", "echo one; echo; printf '\\033[91mtwo\\033[0m\\n'; exit 3"], dict(os.environ), log)
    assert child.wait(10) == 3
    assert child.last_lines() == "one | two"
    assert last_lines("") == "nothing was written"
    assert not wait_until_listening("127.0.0.1", free_port(), child, 10)


def test_when_flower_is_started_then_it_phones_nobody_and_runs_only_the_relays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", "elsewhere")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    home = tmp_path / "flower"
    made = environment(home, MORE="1")
    assert {name: value for name, value in made.items() if name.startswith("FLWR_")} == {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(home),
    }
    assert made["MORE"] == "1"
    assert home.stat().st_mode & 0o077 == 0
    found = {
        name: subprocess.run(["sh", "-c", f"command -v {name}"], env=made, capture_output=True, text=True, check=True) for name in APPS
    }
    assert {name: Path(done.stdout.strip()).parent for name, done in found.items()} == dict.fromkeys(APPS, home / "bin")
    refused = subprocess.run(["flwr-agentapp"], env=made, check=False, executable=str(home / "bin" / "flwr-agentapp"))
    assert refused.returncode == 1


APPS = ("flwr-clientapp", "flwr-serverapp", "flwr-agentapp", "flwr-connector", "flwr-model", "flwr-simulation")


def test_when_the_relay_at_a_site_is_imported_then_torch_is_not() -> None:
    code = "import sys, fedcast.federated.flower.client_relay; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_when_flower_is_not_installed_then_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match="flwr is not installed"):
        program("flwr")
