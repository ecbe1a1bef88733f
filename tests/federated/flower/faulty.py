"""Networks that fail: a proxy that cuts connections at random bytes, and a link between network namespaces that loses packets."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

HOST, INSIDE = "10.213.7.1", "10.213.7.2"
TUN = Path("/dev/net/tun")
_TUNSETIFF, _TUN, _NO_HEADER = 0x400454CA, 0x0001, 0x1000


class Cutting:
    """Stands between sites and SuperLink, passes bytes on, and cuts connections when it is told to.

    A connection ends in the middle of a chunk after an exponentially distributed number of bytes, half of them by a reset and half by an
    end, as if the other side had said all. The numbers are drawn from a seed.
    """

    def __init__(self, port: int, to: int, seed: int = 0) -> None:
        self._port, self._to = port, to
        self._draws = np.random.default_rng(seed)
        self.mean: float | None = None
        self.resets = self.truncations = self.passed = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, self._port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        both = writer, inner_writer
        await asyncio.gather(self._pass(reader, inner_writer, both), self._pass(inner_reader, writer, both))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, both: tuple[asyncio.StreamWriter, ...]) -> None:
        left = None if self.mean is None else int(self._draws.exponential(self.mean))
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(1 << 16):
                    if left is None and self.mean is not None:
                        left = int(self._draws.exponential(self.mean))
                    if left is not None and self.mean is not None and len(data) > left:
                        writer.write(data[:left])
                        self._cut(both)
                        return
                    left = None if left is None or self.mean is None else left - len(data)
                    self.passed += len(data)
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    def _cut(self, both: tuple[asyncio.StreamWriter, ...]) -> None:
        reset = bool(self._draws.random() < 0.5)
        self.resets += reset
        self.truncations += not reset
        for writer in both:
            if reset:
                # Closing with this option set sends a reset, and no end.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                writer.close()

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


class Link:
    """Carries packets between this machine (``HOST``) and a network namespace (``INSIDE``), and loses a share of them."""

    def __init__(self, space: str, seed: int = 0) -> None:
        self.space = space
        self._far = f"{space}b"
        self._ends = (_tun(f"{space}a"), _tun(self._far))
        self._draws = np.random.default_rng(seed)
        self.loss = 0.0
        self.carried = self.lost = 0
        self._over = False
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def partition(self, down: bool) -> None:
        """Take the link down, or up again."""
        _ip("netns", "exec", self.space, "ip", "link", "set", self._far, "down" if down else "up")

    def _carry(self) -> None:
        first, second = self._ends
        while not self._over:
            for end in select.select(self._ends, [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # an end is down
                    packet = os.read(end, 1 << 16)
                    self.carried += 1
                    if self._draws.random() < self.loss:
                        self.lost += 1
                    else:
                        os.write(second if end == first else first, packet)

    def close(self) -> None:
        """Stop."""
        self._over = True
        self._thread.join(10)
        for end in self._ends:
            os.close(end)


@contextmanager
def linked(space: str) -> Iterator[Link]:
    """Make a network namespace and the link to it; root only."""
    _ip("netns", "add", space)
    try:
        link = Link(space)
        try:
            _ip("addr", "add", f"{HOST}/30", "dev", f"{space}a")
            _ip("link", "set", f"{space}a", "up")
            _ip("link", "set", f"{space}b", "netns", space)
            _ip("netns", "exec", space, "ip", "addr", "add", f"{INSIDE}/30", "dev", f"{space}b")
            for name in (f"{space}b", "lo"):
                _ip("netns", "exec", space, "ip", "link", "set", name, "up")
            yield link
        finally:
            link.close()
    finally:
        _ip("netns", "del", space)


def possible() -> bool:
    """Whether this machine lets us make namespaces and links."""
    return os.name == "posix" and os.geteuid() == 0 and TUN.exists() and bool(_which_ip())


def _which_ip() -> str | None:
    return next((path for path in ("/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip") if Path(path).is_file()), None)


def _ip(*words: str) -> None:
    subprocess.run([str(_which_ip()), *words], check=True, capture_output=True)


def _tun(name: str) -> int:
    end = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN | _NO_HEADER))
    return end
