"""Frames on a Unix socket: a little JSON and a payload, between a relay that Flower starts and the process it belongs to."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any

SOCKET = "FEDCAST_SITE_SOCKET"
"""Environment variable that names the worker's socket; ``fedcast site start`` sets it for the SuperNode it starts."""
_LENGTHS = struct.Struct(">IQ")
_HEADER_LIMIT = 1 << 20
PAYLOAD_LIMIT = 1 << 33
"""Most bytes of a payload: 8 GiB."""


class LinkError(ConnectionError):
    """The other side is gone, or what it says is no frame."""


def send(link: socket.socket, header: dict[str, Any], payload: bytes = b"") -> None:
    """Send a frame: lengths of header and payload as big-endian uint32 and uint64, the header as JSON, the payload.

    Raises
    ------
    LinkError
        When the other side is gone or does not take it within the socket's timeout.
    """
    head = json.dumps(header).encode()
    try:
        link.sendall(_LENGTHS.pack(len(head), len(payload)) + head)
        link.sendall(payload)
    except OSError as error:
        raise LinkError(f"the other side does not take a frame: {error}") from error


def receive(link: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Read a frame and return its header and payload.

    Raises
    ------
    LinkError
        When the other side is gone, is silent for longer than the socket's timeout, or sends no frame.
    """
    head_length, length = _LENGTHS.unpack(_read(link, _LENGTHS.size))
    if head_length > _HEADER_LIMIT or length > PAYLOAD_LIMIT:
        raise LinkError("the frame is too long")
    try:
        header = json.loads(_read(link, head_length))
    except ValueError as error:
        raise LinkError("the frame has no header") from error
    if not isinstance(header, dict):
        raise LinkError("the frame has no header")
    return header, _read(link, length)


def _read(link: socket.socket, length: int) -> bytes:
    buffer = bytearray(length)
    view, done = memoryview(buffer), 0
    try:
        while done < length:
            got = link.recv_into(view[done:], length - done)
            if not got:
                raise LinkError("the other side is gone")
            done += got
    except LinkError:
        raise
    except OSError as error:
        raise LinkError(f"the other side does not answer: {error}") from error
    return bytes(buffer)


class Door:
    """A Unix socket that listens in a folder which this user alone can enter.

    The folder is a new one below the system's for temporary files: a socket's path has 107 bytes at most, which a kit's folder may exceed.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fedcast-"))
        self.path = self._folder / "door"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(os.fspath(self.path))
        self._socket.listen(64)

    def accept(self, timeout_s: float) -> socket.socket | None:
        """Return a link to whoever knocks, without a timeout of its own; ``None`` where nobody does in time."""
        self._socket.settimeout(timeout_s)
        try:
            link, _ = self._socket.accept()
        except TimeoutError:
            return None
        link.settimeout(None)
        return link

    def close(self) -> None:
        """Close it and remove its folder."""
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def knock(path: str | Path, timeout_s: float) -> socket.socket:
    """Return a link to the process that listens at a path, whose sends and reads then have that timeout.

    Raises
    ------
    LinkError
        When nobody listens there.
    """
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(timeout_s)
    try:
        link.connect(os.fspath(path))
    except OSError as error:
        link.close()
        raise LinkError(f"nobody listens: {error}") from error
    return link
