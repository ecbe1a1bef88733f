"""Contestants seen from outside: started as processes, let through rounds one at a time, their processor time and memory read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.common import Setting
from benchmarks.peers.serve import SETTING

ROOT = Path(__file__).resolve().parents[2]
# Each contestant gets the threads it would choose itself, whatever the caller's shell says.
UNSET = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GLIBC_TUNABLES", "LD_PRELOAD")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


class ContestantError(Exception):
    """A contestant's process ended before its work was done."""


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Attributes
    ----------
    name
        Name in the table.
    kind, options
        What :mod:`benchmarks.peers.serve` runs.
    python
        The interpreter of its environment.
    apart
        Its idle processes would disturb others: it runs all its rounds in a block, alone.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    apart: bool = False


class Running:
    """A contestant's process, started for a setting; its own output goes to a log beside the data."""

    def __init__(self, contestant: Contestant, setting: Setting) -> None:
        self.contestant = contestant
        self.log = Path(setting.folder) / f"{contestant.name.replace(' ', '-')}.log"
        to_child, from_parent = os.pipe()
        to_parent, from_child = os.pipe()
        environment = {name: value for name, value in os.environ.items() if name not in UNSET}
        environment |= QUIET | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", SETTING: setting.to_json(), "FLWR_HOME": setting.folder}
        command = [contestant.python, "-m", "benchmarks.peers.serve", contestant.kind, json.dumps(contestant.options)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(to_child), str(from_child)],
                cwd=setting.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(to_child, from_child),
            )
        os.close(to_child)
        os.close(from_child)
        self._out, self._in = os.fdopen(from_parent, "w"), os.fdopen(to_parent, "r")

    def wait(self) -> dict[str, Any]:
        """Return the next thing the contestant says.

        Raises
        ------
        ContestantError
            When it says nothing more, with the end of its log.
        """
        line = self._in.readline()
        if not line:
            end = self.log.read_text(encoding="utf-8", errors="replace")[-1500:]
            raise ContestantError(f"{self.contestant.name} ended early:\n{end}")
        document: dict[str, Any] = json.loads(line)
        return document

    def round(self) -> dict[str, Any]:
        """Let it run one round; return its report with processor seconds and memory of its whole tree of processes added."""
        before = cpu_seconds(self._process.pid)
        self._say("round")
        report = self.wait()
        report["cpu_seconds"] = cpu_seconds(self._process.pid) - before
        report["memory_bytes"] = memory_bytes(self._process.pid)
        return report

    def stop(self) -> dict[str, Any]:
        """Tell it that no further round is wanted; return its last word."""
        self._say("stop")
        last = self.wait()
        self._process.wait()
        return last

    def close(self) -> None:
        """End it and everything it started, whatever state it is in."""
        for pid in reversed(tree(self._process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._in.close()
        with suppress(BrokenPipeError):
            self._out.close()

    def _say(self, word: str) -> None:
        self._out.write(word + "\n")
        self._out.flush()


def _stat(pid: int) -> list[str]:
    # The name may hold spaces and brackets: what follows the last bracket is plain.
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def tree(root: int) -> list[int]:
    """Return a process and all its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_seconds(root: int) -> float:
    """Return the processor seconds of a process, its descendants, and those of them that have ended."""
    ticks = 0
    for pid in tree(root):
        try:
            ticks += sum(int(field) for field in _stat(pid)[11:15])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_bytes(root: int) -> int:
    """Return the memory of a process and its descendants, shared pages counted once (PSS)."""
    total = 0
    for pid in tree(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total
