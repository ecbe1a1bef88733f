"""``fedcast site start``: the site's worker, and beside it Flower's SuperNode, which is kept running."""

from __future__ import annotations

import fcntl
import queue
import socket
import threading
import time
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from fedcast.consortium.certificates import issue_server, new_authority
from fedcast.consortium.diagnosis import diagnose
from fedcast.consortium.kits import SITE_FILE, SiteKit, write_private
from fedcast.data.frames import domain_files
from fedcast.errors import ConsortiumError, FedcastError, IdentityError, SourceError, UnreachableError
from fedcast.federated.flower.frames import SOCKET, Door, LinkError, receive, send
from fedcast.federated.flower.policy import Policy
from fedcast.federated.flower.processes import Child, environment, free_port, program, shorten
from fedcast.federated.flower.worker import Worker

REFUSED_S = 180.0
"""How long a refused key is tried again: Flower refuses a site that was killed for about a minute, too."""
_SLOWEST_S = 30.0
_SILENT_S = 10.0
_CONNECTED = "SuperNode ID:"
_BROKEN = ("SSL/TLS handshake error", "SuperNode terminated")
"""Where a handshake fails once, as when a coordinator is restarted, a SuperNode gives up for good, and its process stays."""
_CERTIFICATE_DAYS = 3650

Note = Callable[[str], None]
"""Tells a person at the site something."""


def serve(kit: SiteKit, data: Path, state: Path, note: Note, *, refused_s: float = REFUSED_S) -> None:
    """Take part in a consortium until the process is told to end.

    Parameters
    ----------
    kit
        The site's kit.
    data
        Its data: a file, or a folder of files.
    state
        Its private folder: what it keeps between rounds, its log of tasks, and the SuperNode's log.
    note
        Tells a person something.
    refused_s
        How long to go on where the coordinator refuses the site's key.

    Raises
    ------
    SourceError
        When there are no data in it.
    ConsortiumError
        When the kit does not fit, or another process serves this site.
    CertificateError, IdentityError
        When the site cannot join: see :func:`~fedcast.consortium.diagnosis.diagnose`. A refused key only after ``refused_s``; a site
        that joined once is not given up.
    """
    if not data.exists():
        raise SourceError(f"{data} does not exist", hint="name the site's file, or its folder of files, with --data")
    policy = tomllib.loads((kit.folder / SITE_FILE).read_text(encoding="utf-8")).get("policy", {})
    worker = Worker(kit.site, data, state, Policy.read(policy))
    if data.is_dir():
        domain_files(data)  # a folder without data is named now, not in the first round
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ExitStack() as held:
        _lock(state, held)
        held.callback(worker.close)
        door = Door()
        held.callback(door.close)
        node = _SuperNode(kit, state, door.path, note, refused_s)
        held.callback(node.stop)
        jobs: queue.Queue[_Job] = queue.Queue()
        threading.Thread(target=_admit, args=(door, jobs, worker), daemon=True).start()
        node.start()
        # The main thread works, so that a signal ends it; whoever waits for an answer then hears that the link is gone.
        while True:
            try:
                job = jobs.get(timeout=0.5)
            except queue.Empty:
                if node.failure is not None:
                    raise node.failure from None
                continue
            job.answer(worker)


def _lock(state: Path, held: ExitStack) -> None:
    lock = held.enter_context((state / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConsortiumError(f"{state} is in use by another process", hint="a site is started once; see --state") from error


class _Job:
    """A task that the SuperNode brought, and the link on which its answer is awaited."""

    def __init__(self, run: str, payload: bytes, link: socket.socket) -> None:
        self.run, self.payload, self._link = run, payload, link

    def answer(self, worker: Worker) -> None:
        reply = worker.answer(self.run, self.payload)
        # Sent aside: a relay that does not read must not keep the next task waiting.
        threading.Thread(target=self._send, args=(reply,), daemon=True).start()

    def _send(self, reply: bytes) -> None:
        try:
            send(self._link, {}, reply)
        except LinkError:
            pass  # the relay is gone; the task comes again, and its answer is kept
        finally:
            self._link.close()


def _admit(door: Door, jobs: queue.Queue[_Job], worker: Worker) -> None:
    while True:
        try:
            link = door.accept(3600.0)
        except OSError:
            return  # closed
        if link is not None:
            threading.Thread(target=_read, args=(link, jobs, worker), daemon=True).start()


def _read(link: socket.socket, jobs: queue.Queue[_Job], worker: Worker) -> None:
    link.settimeout(60.0)
    try:
        header, payload = receive(link)
    except LinkError:
        link.close()
        return
    run = str(header.get("run", ""))
    worker.overtaken(run, payload)
    jobs.put(_Job(run, payload, link))


class _SuperNode:
    """Flower's SuperNode, started again whenever it ends; each time after a longer pause, until it has run for a while."""

    def __init__(self, kit: SiteKit, state: Path, door: Path, note: Note, refused_s: float) -> None:
        self._kit, self._state, self._door, self._note, self._refused_s = kit, state, door, note, refused_s
        self._ending = threading.Event()
        # One thread for all of them: on Linux they end with it.
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._connected_once = False
        self.failure: FedcastError | None = None

    def start(self) -> None:
        """Start it; :class:`MissingExtraError` where Flower is not installed."""
        program("flower-supernode")
        _runtime_certificate(self._state)
        self._thread.start()

    def stop(self) -> None:
        """End it and everything it started."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join(30.0)

    def _keep(self) -> None:
        pause, refused_since = 1.0, None
        try:
            if why := self._judge("", None):
                self._note(f"{why}; trying on")
            while not self._ending.is_set():
                begin = time.monotonic()
                code, output = self._run_once()
                if self._ending.is_set():
                    return
                if time.monotonic() - begin > 2 * _SLOWEST_S:
                    pause, refused_since = 1.0, None
                refused_since = refused_since or begin
                why = (
                    self._judge(output, refused_since)
                    or f"it {'gave up' if code is None else f'ended by itself (code {code})'}: {_last_line(output)}"
                )
                self._note(f"the SuperNode is started again in {pause:.0f} s: {why}")
                self._ending.wait(pause)
                pause = min(2 * pause, _SLOWEST_S)
        except FedcastError as error:
            self.failure = error

    def _judge(self, output: str, refused_since: float | None) -> str | None:
        """Return why the site cannot join; raise it where trying again does not help: the site never joined, and will not."""
        found = diagnose(self._kit, output)
        if found is None:
            return None
        since = time.monotonic() if refused_since is None else refused_since
        # A coordinator may be started later than its sites, and it refuses a site that was killed for about a minute.
        passes = isinstance(found, UnreachableError) or (isinstance(found, IdentityError) and time.monotonic() - since < self._refused_s)
        if not (passes or self._connected_once):
            raise found
        return found.message

    def _run_once(self) -> tuple[int | None, str]:
        log = self._state / "supernode.log"
        shorten(log)
        child = Child(self._command(), environment(self._kit.flower, **{SOCKET: str(self._door)}), log)
        begin, joined, told = time.monotonic(), False, False
        try:
            while (code := child.wait(0.5)) is None and not self._ending.is_set():
                if any(words in child.tail() for words in _BROKEN):
                    break
                if not joined and _CONNECTED in child.output():
                    joined = self._connected_once = True
                    self._note(f"connected to {self._kit.address} as site {self._kit.site}")
                elif not joined and not told and time.monotonic() - begin > _SILENT_S:
                    told = True
                    self._note(f"not connected to {self._kit.address} yet; trying on (see {log})")
        finally:
            child.stop()
        return code, child.output()

    def _command(self) -> list[str]:
        runtime = self._state / "runtime"
        return [
            program("flower-supernode"),
            *("--superlink", self._kit.address),
            *("--root-certificates", str(self._kit.authority)),
            *("--auth-supernode-private-key", str(self._kit.key)),
            *("--host", "127.0.0.1", "--port", str(free_port())),
            *("--ssl-ca-certfile", str(runtime / "ca.crt")),
            *("--ssl-certfile", str(runtime / "server.crt")),
            *("--ssl-keyfile", str(runtime / "server.key")),
        ]


def _runtime_certificate(state: Path) -> None:
    """Make the certificate by which the SuperNode's own processes know it on loopback; it leaves the machine no more than they do."""
    folder = state / "runtime"
    folder.mkdir(exist_ok=True, mode=0o700)
    authority, key = new_authority("fedcast site", _CERTIFICATE_DAYS)
    certificate, server_key = issue_server(authority, key, "localhost", _CERTIFICATE_DAYS)
    for name, content in (("ca.crt", authority), ("server.crt", certificate), ("server.key", server_key)):
        write_private(folder / name, content)


def _last_line(output: str) -> str:
    """Return the line that says why a SuperNode ended."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "failed" in line.lower() or "SSL" in line]
    return (telling or lines or ["it wrote nothing"])[-1]
