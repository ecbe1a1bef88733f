"""The audit log: what was sent, received, dropped and kept, a line each, every line sealed with the one before it.

A line is a JSON object in one spelling (sorted keys, no spaces). Its ``hash`` is the SHA-256 of the line without it, and ``prev`` is the
hash of the line before, so a line that is altered, taken out, put in or moved no longer fits. A chain cannot show that lines at its end
are gone, or that somebody who may write the file wrote all of it anew: for that its head, the last hash, is kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from fedcast.errors import AuditError
from fedcast.safe import UnsafeError, finite, read_json

if TYPE_CHECKING:
    from fedcast.federated.messages import Reply, Task

NAME: Final = "audit.jsonl"
START: Final = "0" * 64
"""What stands for the hash before the first line."""
LINE_LIMIT: Final = 1 << 20
_RECOVERED = "recovered"
_KEYS = {"seq", "time", "event", "fields", "prev", "hash"}


@dataclass(frozen=True)
class Verified:
    """What a log that holds together says.

    Attributes
    ----------
    lines
        How many lines it has.
    head
        Hash of the last one.
    found
        Line of the head that was asked for; the last one where none was.
    events
        How often each event occurs.
    """

    lines: int
    head: str
    found: int
    events: dict[str, int]


def unrecorded(event: str, **fields: Any) -> None:
    """Keep no log of what happened: what stands in for :meth:`AuditLog.append`."""


def record_answer(log: AuditLog, task: Task, reply: Reply) -> None:
    """Append what a site was asked and what left it, and close the log: a process may hold many sites.

    Parameters
    ----------
    log
        The site's own log.
    task, reply
        What came and what is sent.
    """
    asked: dict[str, Any] = {
        "task": task.id,
        "round": task.round,
        "kind": task.kind,
        "tensors": sorted(task.tensors),
        "tensor_bytes": task.nbytes,
    }
    if reply.error is not None:
        log.append("task-refused", **asked, reason=reply.error)
    else:
        log.append("task-accepted", **asked)
        sent: dict[str, Any] = {"tensors": sorted(reply.tensors), "tensor_bytes": reply.nbytes, "values": sorted(reply.meta)}
        log.append("reply-sent", task=task.id, **sent)
    log.close()


class AuditLog:
    """Appends to an audit log; several threads may share one, several processes may not.

    Parameters
    ----------
    path
        The file; made with its folder at the first line. A last line that a crash cut short stays as it is, and the next line,
        ``recovered``, says how long it is and what its SHA-256 is.

    Raises
    ------
    AuditError
        At the first line, or by :meth:`open`, when the file's last line is damaged in another way.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._seq, self._head = 0, START

    @property
    def head(self) -> str:
        """Hash of the last line; 64 zeros before the first."""
        return self._head

    def open(self) -> None:
        """Open the file where it is not open; :class:`AuditError` where nothing can be appended to it."""
        with self._lock:
            if self._file is None:
                self._open()

    def append(self, event: str, *, durable: bool = False, **fields: Any) -> None:
        """Append a line.

        Parameters
        ----------
        event
            What happened.
        durable
            Whether to wait until the line, and those before it, are on the disk.
        fields
            JSON values that say more.
        """
        with self._lock:
            file = self._open() if self._file is None else self._file
            self._write(file, event, fields)
            if durable:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _write(self, file: BinaryIO, event: str, fields: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"seq": self._seq + 1, "time": now, "event": event, "fields": finite(fields), "prev": self._head}
        seal = _hash(record)
        file.write(_spelt({**record, "hash": seal}) + b"\n")
        self._seq, self._head = self._seq + 1, seal

    def _open(self) -> BinaryIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._resume() if self._path.exists() and not self._seq else None
        # Unbuffered: a line is one write, and outlives a process that is killed after it.
        file = self._path.open("ab", buffering=0)
        if torn is not None:
            file.write(b"\n")
            if torn:
                self._write(file, _RECOVERED, {"torn_bytes": len(torn), "torn_sha256": hashlib.sha256(torn).hexdigest()})
        self._file = file
        return file

    def _resume(self) -> bytes | None:
        """Read the end of the file; return what follows its last whole line, ``b""`` where only a line feed is missing, or ``None``."""
        with self._path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 * LINE_LIMIT))
            lines = file.read().split(b"\n")
        rest = lines.pop()
        if rest and (record := _record(rest)) is not None:
            return self._stand(record, b"")
        torn = rest or None
        # A file that was cut within its first line has none.
        last = next((line for line in reversed(lines) if line), None)
        if last is None:
            return torn
        record = _record(last)
        if record is None:
            raise AuditError(
                f"the last line of {self._path} is damaged", hint=f"see `fedcast audit verify {self._path}`; move it away to go on"
            )
        return self._stand(record, torn)

    def _stand(self, last: dict[str, Any], torn: bytes | None) -> bytes | None:
        self._seq, self._head = last["seq"], last["hash"]
        return torn


def verify(path: Path, head: str | None = None) -> Verified:
    """Check an audit log from its first line to its last.

    Parameters
    ----------
    path
        The log.
    head
        A head that was written down: it must be the hash of one of the lines.

    Raises
    ------
    AuditError
        Naming the first line that was altered, that is missing or that stands in another place; when the log has no line, cannot be
        read, or does not have that head.
    """
    count, previous, place, events = 0, START, 0, dict[str, int]()
    torn: bytes | None = None
    for number, line in _lines(path):
        record = _record(line)
        if torn is not None and (record is None or not _recovers(record, torn)):
            raise _damaged(path, number - 1, "was altered: it is not what an audit log writes")
        if record is None:
            torn = line
            continue
        torn = None
        if record["seq"] != count + 1:
            what = "lines before it are missing" if record["seq"] > count + 1 else "it stands in another place or twice"
            raise _damaged(path, number, f"is number {record['seq']} where {count + 1} is due: {what}")
        if record["prev"] != previous:
            raise _damaged(
                path,
                max(number - 1, 1),
                "was altered: the line after it was written after another one" if count else "is not the first that was written",
            )
        count, previous = count + 1, record["hash"]
        events[record["event"]] = events.get(record["event"], 0) + 1
        if previous == head:
            place = number
    if torn is not None:
        raise _damaged(path, number, "is cut short or was altered: it is the last, and is not what an audit log writes")
    if not count:
        raise AuditError(f"{path} has no line", hint="name the audit.jsonl of a run folder or of a site")
    if head is not None and not place:
        raise AuditError(
            f"no line of {path} has the hash {head[:64]}",
            hint="lines at its end were removed, or all of it was written anew; ask who wrote the head down",
        )
    return Verified(count, previous, place or count, events)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise _damaged(path, number, f"has more than {LINE_LIMIT} bytes")
                yield number, line.removesuffix(b"\n")
    except OSError as error:
        raise AuditError(f"{path} cannot be read: {error.strerror}", hint="name the audit.jsonl of a run folder or of a site") from error


def _damaged(path: Path, number: int, what: str) -> AuditError:
    held = "what stands before that line holds together; compare the rest with a copy"
    return AuditError(
        f"line {number} of {path} {what}",
        hint=held if number > 1 else "compare it with a copy, or name another file if this is no audit log",
    )


def _recovers(record: dict[str, Any], torn: bytes) -> bool:
    return bool(record["event"] == _RECOVERED) and record["fields"] == {
        "torn_bytes": len(torn),
        "torn_sha256": hashlib.sha256(torn).hexdigest(),
    }


def _record(line: bytes) -> dict[str, Any] | None:
    """Return a line's record where it is one, spelt as this module spells it and with a hash that is its own."""
    try:
        record = read_json(line, LINE_LIMIT)
    except UnsafeError:
        return None
    if not isinstance(record, dict) or record.keys() != _KEYS or type(record["seq"]) is not int or not isinstance(record["event"], str):
        return None
    rest = {key: value for key, value in record.items() if key != "hash"}
    return record if record["hash"] == _hash(rest) and _spelt(record) == line else None


def _spelt(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(errors="replace")


def _hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(_spelt(record)).hexdigest()
