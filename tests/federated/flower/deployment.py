"""A consortium on loopback, as people run it: SuperLink, keys, TLS, and a process of ``fedcast site start`` for each site."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedcast.consortium.coordinator import Coordinator
from fedcast.consortium.kits import CoordinatorKit, SiteKit
from fedcast.consortium.provision import create
from fedcast.data.catalogue import bundled_frames
from fedcast.federated.flower.processes import Child, free_port
from fedcast.run.remote import Consortium
from fedcast.spec import RunSpec

SITES = ("energy", "health", "medical")
SLOW_MACHINE_S = 240.0
"""How long a site may take to join on a machine that does much else."""


class Recorder:
    """Stands between sites and SuperLink, ends TLS with the coordinator's certificate, and keeps every byte that passes."""

    def __init__(self, kit: CoordinatorKit, port: int) -> None:
        self._kit, self._port = kit, port
        self.up, self.down = bytearray(), bytearray()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)

    async def _listen(self) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._kit.certificate, self._kit.key)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, ssl=context)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        trusted = ssl.create_default_context(cafile=self._kit.authority)
        with contextlib.suppress(OSError):
            inner_reader, inner_writer = await asyncio.open_connection(
                "127.0.0.1", self._kit.port, ssl=trusted, server_hostname="localhost"
            )
            await asyncio.gather(self._pass(reader, inner_writer, self.up), self._pass(inner_reader, writer, self.down))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(1 << 16):
                    kept += data
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def close(self) -> None:
        """Stop."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


@dataclass
class Deployment:
    """A running consortium."""

    folder: Path
    kit: CoordinatorKit
    sites: dict[str, Path]
    data: Path
    recorder: Recorder
    coordinator: Coordinator
    processes: dict[str, Child] = field(default_factory=dict)

    @property
    def consortium(self) -> Consortium:
        """What a run is given."""
        return Consortium(self.kit.folder, wait_s=SLOW_MACHINE_S)

    def start_site(self, name: str) -> None:
        """Start a site."""
        command = [sys.executable, "-m", "fedcast", "site", "start", "--kit", str(self.sites[name]), "--data", str(self.data / name)]
        self.processes[name] = Child(command, {**os.environ, "OMP_NUM_THREADS": "1"}, self.folder / f"site-{name}.log")

    def state(self, name: str) -> Path:
        """Return a site's private folder."""
        return self.sites[name] / "state"

    def run_process(self, spec: RunSpec, output: Path) -> Child:
        """Start ``fedcast run`` as a process of its own."""
        path = self.folder / f"{output.name}.toml"
        path.write_text(spec.to_toml(), encoding="utf-8")
        command = [sys.executable, "-m", "fedcast", "run", str(path), "--fleet", "flower", "--kit", str(self.kit.folder), "-o", str(output)]
        wait = ["--wait", str(SLOW_MACHINE_S)]
        return Child([*command, *wait], {**os.environ, "OMP_NUM_THREADS": "1"}, self.folder / f"{output.name}.log")


def write_data(folder: Path, names: tuple[str, ...]) -> Path:
    """Write shipped domains as a person's folder: a folder a domain, a file a dataset."""
    for name in names:
        for dataset, frame in bundled_frames(name).items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            frame.frame.to_parquet(folder / name / f"{dataset}.parquet")
    return folder


@contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    """Make a consortium, start all of it, and end it."""
    made = create(folder / "consortium", name="test", host="localhost", sites=SITES, port=free_port(), proxy_port=free_port())
    kit = made.coordinator
    sites = {name: folder / "consortium" / "sites" / name for name in SITES}
    said: list[str] = []
    with ExitStack() as held:
        coordinator = held.enter_context(Coordinator(kit, say=said.append))
        recorder = Recorder(kit, SiteKit.open(sites[SITES[0]]).port)
        held.callback(recorder.close)
        deployment = Deployment(folder, kit, sites, write_data(folder / "data", SITES), recorder, coordinator)
        held.callback(lambda: [child.stop(60) for child in deployment.processes.values()])
        for name in SITES:
            deployment.start_site(name)
        yield deployment


def wait_for(condition: object, seconds: float) -> bool:
    """Wait until something holds, and say whether it came to hold."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False
