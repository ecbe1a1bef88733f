"""Runs a coordinator: the SuperLink on loopback, the sites' keys in it, and nginx before it where that is asked for."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

from fedcast.consortium.certificates import check_server
from fedcast.consortium.kits import CoordinatorKit
from fedcast.consortium.network import contact
from fedcast.consortium.registry import register_sites
from fedcast.errors import ConsortiumError, MissingExtraError, UnreachableError
from fedcast.federated.flower.processes import Child, environment, program, shorten

_START_S: Final = 90.0
_POLL_S: Final = 0.2

_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_SEEN: Final = (
    (re.compile(r"\[Fleet\.ActivateNode\] Activated node_id=(?P<node>\d+)"), "{site} joined"),
    (re.compile(r"\[Fleet\.DeactivateNode\] Deactivated node_id=(?P<node>\d+)"), "{site} left"),
    (
        re.compile(r"node ID (?P<node>\d+) could not be activated"),
        "{site} was refused: its last connection counts for up to a minute",
    ),
    (re.compile(r"No SuperNode found with the given public key"), "a site was refused: its key is not registered"),
    (re.compile(r"ControlServicer\.StartRun"), "a run is to start"),
    (re.compile(r"ControlServicer\.StopRun"), "a run is to stop, if it has not"),
)
# A probe that has no key (fedcast consortium status, a site's diagnosis) ends here.
_PROBE: Final = "Unsupported Content-Type"
_TROUBLE: Final = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b\s*:?\s*(?P<what>.*)|\[(?:emerg|alert|crit|error|warn)\] (?P<proxy>.*)")
_REFUSED: Final = re.compile(r"^\S+ (?P<what>refused .*)")


class Coordinator:
    """A coordinator while a ``with`` block lasts; all its processes end with the block.

    Parameters
    ----------
    kit
        The coordinator's kit.
    proxy
        Whether nginx is started too, with the kit's configuration.
    say
        Called with every line that is worth a person's attention.
    """

    def __init__(self, kit: CoordinatorKit, *, proxy: bool = False, say: Callable[[str], None]) -> None:
        self.kit = kit
        self._with_proxy = proxy
        self._say = say
        self._children: dict[str, Child] = {}
        self._sites: dict[int, str] = {}
        self._over = threading.Event()
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Self:
        """Start everything and register the sites.

        Raises
        ------
        ConsortiumError
            When a port is taken, a program does not start or the kit is damaged.
        CertificateError
            When sites would refuse the certificate.
        MissingExtraError
            When Flower is not installed.
        """
        kit = self.kit
        certificate = check_server(kit.authority, kit.certificate, kit.key, kit.host)
        superlink, nginx = program("flower-superlink"), _nginx() if self._with_proxy else ""
        _check_free("127.0.0.1", kit.port, "the SuperLink")
        if nginx:
            _check_free("", kit.proxy_port, "the proxy")
        kit.write_connection()
        try:
            self._start("superlink", [superlink, *self._options()])
            self._await("superlink", kit.port)
            self._sites = {number: name for name, number in register_sites(kit, self._say).items()}
            if nginx:
                self._start("proxy", [nginx, "-p", f"{kit.folder}/", "-c", str(kit.proxy)])
                self._await("proxy", kit.proxy_port)
        except BaseException:
            self._stop()
            raise
        self._say(f"the SuperLink of {kit.name} listens on {kit.address}, for this machine alone")
        if nginx:
            self._say(f"the proxy listens on port {kit.proxy_port}, for sites")
        self._say(f"{len(kit.sites)} sites may join; the certificate holds until {certificate.ends:%Y-%m-%d}")
        return self

    def __exit__(self, *_: object) -> None:
        """Stop everything."""
        self._stop()

    def wait(self) -> None:
        """Wait for ever.

        Raises
        ------
        ConsortiumError
            When the SuperLink or the proxy ends.
        """
        while True:
            for name, child in self._children.items():
                if (code := child.code()) is not None:
                    message = f"the {name} ended by itself ({code}): {child.last_lines()}"
                    raise ConsortiumError(message, hint=f"its log is {child.log}; start the coordinator again")
            time.sleep(_POLL_S)

    def _options(self) -> list[str]:
        kit = self.kit
        tls = ["--ssl-ca-certfile", str(kit.authority), "--ssl-certfile", str(kit.certificate), "--ssl-keyfile", str(kit.key)]
        where = ["--host", "127.0.0.1", "--port", str(kit.port), "--database", str(kit.database)]
        return [*tls, *where, "--enable-supernode-auth", "--disable-runtime-dependency-installation"]

    def _start(self, name: str, command: list[str]) -> None:
        log = self.kit.flower / f"{name}.log"
        shorten(log)
        begins = log.stat().st_size if log.exists() else 0
        self._children[name] = Child(command, environment(self.kit.flower), log)
        reader = threading.Thread(target=self._report, args=(log, begins), name=f"{name}-log", daemon=True)
        reader.start()
        self._readers.append(reader)

    def _await(self, name: str, port: int) -> None:
        """Wait until a child answers over TLS, as a site would see it."""
        child, end = self._children[name], time.monotonic() + _START_S
        while True:
            try:
                contact("127.0.0.1", port, self.kit.authority)
                return
            except UnreachableError as error:
                if (code := child.code()) is not None:
                    message = f"the {name} did not start ({code}): {child.last_lines()}"
                    raise ConsortiumError(message, hint=f"its log is {child.log}") from error
                if time.monotonic() > end:
                    raise
                time.sleep(_POLL_S)

    def _stop(self) -> None:
        self._over.set()  # what they say on their way out is of no interest
        for child in reversed(self._children.values()):
            child.stop()
        for reader in self._readers:
            reader.join()

    def _report(self, log: Path, begins: int) -> None:
        for line in _followed(log, begins, self._over):
            if (told := readable(line, self._sites)) is not None:
                self._say(told)


def readable(line: str, sites: dict[int, str]) -> str | None:
    """Return what a line of Flower's or nginx's log means, in words; ``None`` where it is not worth a line.

    Parameters
    ----------
    line
        The line.
    sites
        Name of each site, by Flower's number.
    """
    line = _plain(line)
    for pattern, words in _SEEN:
        if found := pattern.search(line):
            node = found.groupdict().get("node")
            return words.format(site=sites.get(int(node), f"node {node}") if node else "")
    if _PROBE in line:
        return None
    if found := _REFUSED.match(line):
        return None if '" 415' in line else f"proxy: {found['what']}"
    if found := _TROUBLE.search(line):
        return f"flower: {found['what'].strip()}" if found["what"] is not None else f"proxy: {found['proxy'].strip()}"
    return None


def _followed(log: Path, begins: int, over: threading.Event) -> Iterator[str]:
    """Yield the lines that a file gets from a position on, until it is over and the last one was read."""
    with log.open("rb") as file:
        file.seek(begins)
        rest = b""
        while True:
            last = over.is_set()
            *lines, rest = (rest + file.read()).split(b"\n")
            yield from (line.decode("utf-8", "replace") for line in lines)
            if last:
                return
            over.wait(_POLL_S)


def _plain(text: str) -> str:
    return _ANSI.sub("", text).strip()


def _check_free(host: str, port: int, what: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose last connections are still being closed is free
        try:
            probe.bind((host, port))
        except PermissionError as error:
            raise ConsortiumError(f"{what} may not use port {port}", hint="choose a port above 1023, or see the service file") from error
        except OSError as error:
            hint = f"is a coordinator running already? `ss -ltnp 'sport = :{port}'` names the process; or change the port in the kit"
            raise ConsortiumError(f"port {port} of {what} is in use", hint=hint) from error


def _nginx() -> str:
    # Distributions put it where an ordinary user's PATH does not lead.
    found = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"]))
    if found is None:
        raise MissingExtraError("nginx is not installed", hint="install it (apt install nginx-core), or start without --proxy")
    return found
