"""The ServerApp: moves frames between the round loop, which listens on a Unix socket, and Flower's grid.

It keeps nothing but replies that the round loop has not fetched yet: whatever fails here ends it, and the round loop starts another.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Any

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from fedcast.federated.flower.client_relay import payload_of, record_of
from fedcast.federated.flower.frames import LinkError, knock, receive, send

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Serve the round loop until it closes the link."""
    relay = _Relay(grid)
    with knock(str(context.run_config["socket"]), 30.0) as link:
        # The round loop may be busy for long between two requests; when its process ends, so does the link.
        link.settimeout(None)
        while relay.serve(link):
            pass


class _Relay:
    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._arrived: deque[Message] = deque()

    def serve(self, link: socket.socket) -> bool:
        """Answer one request; ``False`` when the other side has gone."""
        try:
            request, payload = receive(link)
        except LinkError:
            return False
        if request["do"] == "nodes":
            send(link, {"nodes": [int(node) for node in self._grid.get_node_ids()]})
        elif request["do"] == "push":
            send(link, {"message": self._push(request, payload)})
        else:
            self._pull(link, request["messages"])
        return True

    def _push(self, request: dict[str, Any], payload: bytes) -> str | None:
        message = Message(
            record_of(payload, str(request["run"])),
            dst_node_id=int(request["node"]),
            message_type=MessageType.QUERY,
            ttl=float(request["ttl"]),
        )
        return next(iter(self._grid.push_messages([message])), None)

    def _pull(self, link: socket.socket, messages: list[str]) -> None:
        if not self._arrived and messages:
            self._arrived.extend(self._grid.pull_messages(messages))
        if not self._arrived:
            send(link, {})
            return
        message = self._arrived.popleft()
        about: dict[str, Any] = {"message": message.metadata.reply_to_message_id, "node": int(message.metadata.src_node_id)}
        if message.has_error():
            send(link, {**about, "error": f"{message.error.reason} (Flower's code {message.error.code})"})
        else:
            send(link, about, payload_of(message.content))
