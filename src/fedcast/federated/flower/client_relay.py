"""The ClientApp: hands a task's bytes to the site's worker and its reply's bytes back. Flower starts a process of it for every message.

It knows neither torch nor what the bytes mean.
"""

from __future__ import annotations

import os

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedcast.federated.flower.frames import SOCKET, knock, receive, send

_SPARE_S = 60.0
PAYLOAD, ABOUT = "payload", "about"

app = ClientApp()


@app.query()  # type: ignore[untyped-decorator]
def carry(message: Message, context: Context) -> Message:
    """Carry one task to the worker and its reply back; an exception becomes Flower's own error reply, and the task is sent again."""
    # Longer than the answer is of use, since the clocks of site and coordinator may differ; a worker that ends is noticed at once.
    with knock(os.environ[SOCKET], message.metadata.ttl + _SPARE_S) as link:
        send(link, {"run": str(message.content[ABOUT]["run"])}, payload_of(message.content))
        _, reply = receive(link)
    return Message(record_of(reply, str(message.content[ABOUT]["run"])), reply_to=message)


def record_of(payload: bytes, run: str) -> RecordDict:
    """Return a payload as Flower carries it: one array of bytes, which it cuts into pieces, and the run it belongs to."""
    return RecordDict({PAYLOAD: ArrayRecord({PAYLOAD: Array(np.frombuffer(payload, np.uint8))}), ABOUT: ConfigRecord({"run": run})})


def payload_of(content: RecordDict) -> bytes:
    """Return the payload of such a record."""
    return bytes(content[PAYLOAD][PAYLOAD].numpy().tobytes())
