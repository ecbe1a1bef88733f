"""Frames on a Unix socket."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading

import pytest

from fedcast.federated.flower.frames import Door, LinkError, knock, receive, send


def test_when_a_frame_is_sent_then_the_same_is_received() -> None:
    payload = os.urandom(3_000_000)
    door = Door()
    try:
        assert stat.S_IMODE(door.path.parent.stat().st_mode) == 0o700
        with knock(door.path, 10.0) as near:
            far = door.accept(10.0)
            assert far is not None
            with far:
                sender = threading.Thread(target=send, args=(near, {"do": "push", "node": 2**64 - 1}, payload))
                sender.start()
                assert receive(far) == ({"do": "push", "node": 2**64 - 1}, payload)
                sender.join()
                near.close()
                with pytest.raises(LinkError, match="gone"):
                    receive(far)
    finally:
        door.close()
    assert not door.path.parent.exists()
    with pytest.raises(LinkError, match="nobody listens"):
        knock(door.path, 1.0)


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack(">IQ", 1 << 31, 0),
        struct.pack(">IQ", 2, 1 << 62) + b"{}",
        struct.pack(">IQ", 2, 0) + b"[]",
        struct.pack(">IQ", 4, 0) + b"\xff{}}",
        struct.pack(">IQ", 40, 0) + b"{}",
        b"\0\0",
    ],
)
def test_when_bytes_are_no_frame_then_the_link_fails_at_once(sent: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        near.sendall(sent)
        near.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkError):
            receive(far)


def test_when_the_other_side_is_silent_then_waiting_is_bounded() -> None:
    near, far = socket.socketpair()
    with near, far:
        far.settimeout(0.05)
        with pytest.raises(LinkError, match="does not answer"):
            receive(far)
    door = Door()
    assert door.accept(0.05) is None
    door.close()
