"""The round loop's end of the link to Flower: a Flower run that carries frames, started anew when it dies."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedcast.errors import UnreachableError
from fedcast.federated.flower.frames import Door, LinkError, receive, send
from fedcast.federated.flower.processes import RELAY_LOG, environment, last_lines, program

_APP = {
    "project": {"name": "fedcast-relay", "version": "1.0.0", "description": "hands bytes on", "license": "Apache-2.0", "dependencies": []},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "fedcast",
                "components": {
                    "serverapp": "fedcast.federated.flower.server_relay:app",
                    "clientapp": "fedcast.federated.flower.client_relay:app",
                },
                "config": {"socket": ""},
            }
        }
    },
}
"""The Flower app is this description alone: it names modules that are installed with fedcast, and no code travels."""
_COMMAND_S = 60.0
_START_S = 90.0
_ANSWER_S = 120.0
_STOP_S = 15.0


@dataclass(frozen=True)
class Arrived:
    """A message that came back.

    Attributes
    ----------
    message
        The message that it answers.
    node
        The node that sent it, as Flower authenticated it.
    payload
        Its bytes.
    error
        What went wrong on the way, if anything did: then there are no bytes.
    """

    message: str
    node: int
    payload: bytes
    error: str | None


class Link:
    """A running Flower run whose ServerApp carries frames for this process.

    Every method raises :class:`~fedcast.federated.flower.frames.LinkError` when the relay, or the SuperLink behind it, is gone, or silent
    for ``within_s`` seconds.

    Parameters
    ----------
    home
        ``FLWR_HOME`` of the coordinator, with a connection to its SuperLink.
    timeout_s
        Longest time to wait for Flower to start the relay.
    """

    def __init__(self, home: Path, timeout_s: float = _START_S) -> None:
        self._home, self._environment = home, environment(home)
        self._run: str | None = None
        self._door = Door()
        self._link: socket.socket | None = None
        end = time.monotonic() + timeout_s
        try:
            self._run = self._submit(min(timeout_s, _COMMAND_S))
            self._link = self._door.accept(max(0.1, end - time.monotonic()))
            if self._link is None:
                raise LinkError(f"Flower did not start the relay of run {self._run} in time: {self._log()}")
        except BaseException:
            self.close(stop=False)  # a relay that comes later finds nobody listening, and ends
            raise

    def nodes(self, within_s: float) -> set[int]:
        """Return the nodes that are online."""
        return set(self._ask({"do": "nodes"}, within_s)[0]["nodes"])

    def push(self, node: int, run: str, payload: bytes, ttl_s: float, within_s: float) -> str | None:
        """Send a payload to a node and return the message's name; ``None`` where Flower does not take it."""
        answer, _ = self._ask({"do": "push", "node": node, "run": run, "ttl": ttl_s}, within_s, payload)
        return answer["message"]  # type: ignore[no-any-return]

    def pull(self, messages: Sequence[str], within_s: float) -> Arrived | None:
        """Return one answer to one of these messages that has arrived, if any has."""
        answer, payload = self._ask({"do": "pull", "messages": list(messages)}, within_s)
        if "message" not in answer:
            return None
        return Arrived(str(answer["message"]), int(answer["node"]), payload, answer.get("error"))

    def close(self, *, stop: bool = True) -> None:
        """Let the relay end, which it does when the link closes, and stop its Flower run in case it cannot hear that."""
        self._door.close()
        if self._link is not None:
            self._link.close()
        if self._run is not None and stop:
            run, self._run = self._run, None
            with suppress(LinkError):  # it has ended, or its SuperLink has
                self._flwr("stop", run, timeout_s=_STOP_S)

    def _ask(self, request: dict[str, Any], within_s: float, payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        if self._link is None:
            raise LinkError("the link is closed")
        self._link.settimeout(max(0.1, min(within_s, _ANSWER_S)))
        send(self._link, request, payload)
        return receive(self._link)

    def _submit(self, timeout_s: float) -> str:
        app = self._home / "relay"
        app.mkdir(exist_ok=True)
        (app / "pyproject.toml").write_text(tomli_w.dumps(_APP), encoding="utf-8")
        answer = self._flwr("run", str(app), "--run-config", f'socket="{self._door.path}"', timeout_s=timeout_s)
        return str(answer["run-id"])

    def _flwr(self, *arguments: str, timeout_s: float) -> Mapping[str, Any]:
        """Run a command of Flower's and return what it says."""
        try:
            done = self._call(*arguments, "--format", "json", timeout_s=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise LinkError(f"`flwr {arguments[0]}` did not end within {timeout_s:.0f} s") from error
        text = done.stdout.decode(errors="replace")
        try:
            answer: dict[str, Any] = json.loads(text[text.index("{") :])
        except ValueError:
            answer = {"error-message": done.stderr.decode(errors="replace") or text}
        # The exit code is 0 where it fails, too.
        if not answer.get("success"):
            raise LinkError(" ".join(str(answer.get("error-message", "no reason given")).split()))
        return answer

    def _call(self, *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([program("flwr"), *arguments], env=self._environment, capture_output=True, timeout=timeout_s, check=False)

    def _log(self) -> str:
        """Return the end of the relays' log, for a message."""
        try:
            return last_lines((self._home / RELAY_LOG).read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return "it has no log"


def unreachable(error: LinkError, tried_s: float) -> UnreachableError:
    """Return the error for a person, when no link could be had for some time."""
    return UnreachableError(
        f"the coordinator's Flower could not be reached for {tried_s:.0f} s: {error}",
        hint="start it with `fedcast coordinator start`, then run the same command again: it resumes",
    )
