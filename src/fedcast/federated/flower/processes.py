"""Flower's processes as children of ours: their environment, their logs, and their end with ours."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedcast.errors import MissingExtraError

_SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Without them Flower phones home, and installs an app's dependencies from the network."""
_LOCKED = {"flwr-clientapp": "client", "flwr-serverapp": "server"}
_REFUSED = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-simulation")
RELAY_LOG = "relay.log"
"""Name of the relays' log in ``FLWR_HOME``."""
_LOG_LIMIT = 10_000_000
_STOP_S = 10.0
_PR_SET_PDEATHSIG = 1
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a Flower process: the four switches, and a ``PATH`` on which apps that are shipped do not run.

    Flower starts its app processes by name. ``home/bin`` stands first on the ``PATH`` and holds programs of these names that run
    fedcast's relays only (:mod:`fedcast.federated.flower.locked`), or nothing.

    Parameters
    ----------
    home
        ``FLWR_HOME``: what Flower keeps. It is made, with mode 0700.
    more
        Further variables.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    programs = home / "bin"
    programs.mkdir(exist_ok=True)
    python = shlex.quote(sys.executable)
    for name, which in _LOCKED.items():
        # Flower throws away what they write.
        _script(programs / name, f'exec {python} -P -m fedcast.federated.flower.locked {which} "$@" >>"$FLWR_HOME/{RELAY_LOG}" 2>&1')
    shorten(home / RELAY_LOG)
    for name in _REFUSED:
        _script(programs / name, "exit 1")
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    return {**kept, **_SWITCHES, "FLWR_HOME": str(home), "PATH": path, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **more}


def _script(path: Path, line: str) -> None:
    text = f"#!/bin/sh\n{line}\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.chmod(0o700)
    os.replace(aside, path)


def shorten(log: Path) -> None:
    """Put a log aside that has become long; the one that lay aside before is dropped."""
    with suppress(FileNotFoundError):
        if log.stat().st_size > _LOG_LIMIT:
            log.replace(log.with_suffix(".log.1"))


def last_lines(text: str, count: int = 3) -> str:
    """Return the end of a log in one line, for a message."""
    lines = [line.strip() for line in _COLOUR.sub("", text).splitlines() if line.strip()]
    return " | ".join(lines[-count:]) or "nothing was written"


def program(name: str) -> str:
    """Return the path of one of Flower's programs.

    Raises
    ------
    MissingExtraError
        When Flower is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise MissingExtraError.of("flwr", "flower")
    return found


class Child:
    """A process that ends with ours, even where ours is killed, and whose output goes to a file.

    Its own children are Flower's, which end when their parent does. On Linux the kernel ends it with the *thread* that started it: start
    it from one that lives as long as the process is wanted. Elsewhere only :meth:`stop` does.

    Parameters
    ----------
    command
        Program and arguments.
    env
        Its environment.
    log
        File that its output is appended to.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._began = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            # A session of its own: Ctrl-C in a terminal is ours to hear, and the whole group can be ended.
            self._process = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self.pid = self._process.pid

    def code(self) -> int | None:
        """Return the exit code; ``None`` while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end and return the exit code; ``None`` where it still runs after that time."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def output(self) -> str:
        """Return what it wrote."""
        with self.log.open("rb") as file:
            file.seek(self._began)
            return file.read().decode(errors="replace")

    def tail(self, size: int = 8192) -> str:
        """Return the last bytes of what it wrote."""
        with self.log.open("rb") as file:
            file.seek(max(self._began, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace")

    def last_lines(self, count: int = 3) -> str:
        """Return the end of what it wrote in one line, for a message."""
        return last_lines(self.output(), count)

    def stop(self, timeout_s: float = _STOP_S) -> None:
        """Ask it to end, and end its whole group where it does not."""
        if self._process.poll() is None:
            self._process.terminate()
            self.wait(timeout_s)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # whatever is left of its group
        self.wait(timeout_s)


def _end_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def wait_until_listening(host: str, port: int, child: Child, timeout_s: float) -> bool:
    """Wait until somebody listens on a port; ``False`` where the child ends before, or the time is over."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and child.code() is None:
        try:
            with socket.create_connection((host, port), timeout=1.0):
                return True
        except OSError:
            time.sleep(0.1)
    return False
