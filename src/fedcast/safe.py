"""Reading what others wrote: JSON, names that become paths, and files; every length is checked before anything of its size is read."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite, isinf
from pathlib import Path
from typing import Any, BinaryIO

JSON_DEPTH = 32
CONFIG_SIZE = 1 << 20
"""Bytes of a JSON file beside weights, at most."""
_LARGEST = 2**63 - 1


class UnsafeError(ValueError):
    """Bytes that are refused, and why; whoever reads them raises an error of :mod:`fedcast.errors` in its place."""


def check_name(name: object) -> str:
    """Return a name that can stand as one part of a path.

    Raises
    ------
    UnsafeError
        When it is no printable text of 1 to 200 bytes, starts with a full stop, or holds a slash.
    """
    if isinstance(name, str) and name.isprintable() and 1 <= len(name.encode()) <= 200 and not re.search(r"^\.|[/\\]", name):
        return name
    raise UnsafeError(f"{shown(name)} is no name: it takes 1 to 200 bytes, all printable, with no slash and no full stop at the start")


def shown(value: object) -> str:
    """Return a value of unknown origin for a message: in ASCII, cut to 60 characters."""
    text = ascii(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def printable(text: str) -> str:
    """Return a text with a question mark for each character that could steer a terminal; line feeds stay."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def finite(value: Any) -> Any:
    """Return JSON values with null where a number is NaN or infinite: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def read_json(content: bytes, limit: int) -> Any:
    """Read JSON as RFC 8259 has it, in UTF-8 without a mark at the start.

    Parameters
    ----------
    content
        The bytes.
    limit
        How many there are at most.

    Raises
    ------
    UnsafeError
        When they are no JSON, are more, nest deeper than 32, name a key twice, or hold a half of a surrogate pair, a whole number
        beyond 64 bits, NaN or an infinity.
    """
    if len(content) > limit:
        raise UnsafeError(f"{len(content)} bytes of JSON, at most {limit} are read")
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_float, parse_int=_int
        )
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()
    except UnsafeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnsafeError("it is no JSON") from error
    _check_depth(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UnsafeError("a key stands twice in one JSON object")
    return found


def _no_number(text: str) -> float:
    raise UnsafeError(f"{text} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    return _no_number(text[:20]) if isinf(value) else value


def _int(text: str) -> int:
    # Longer ones overflow where they meet a float, in whatever code is the first to compare them.
    return int(text) if len(text) <= 20 and -_LARGEST - 1 <= int(text) <= _LARGEST else int(_no_number(text[:20]))


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(JSON_DEPTH + 1):
        level = [
            inner for outer in level if isinstance(outer, dict | list) for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise UnsafeError(f"the JSON nests deeper than {JSON_DEPTH}")


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading and give it with its size; a link, and whatever could block such as a pipe, is refused.

    Raises
    ------
    UnsafeError
        When it is no regular file.
    OSError
        When it cannot be opened.
    """
    if path.is_symlink():
        raise UnsafeError("it is a symbolic link")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeError("it is no regular file")
        yield file, status.st_size


def read_json_file(path: Path, limit: int = CONFIG_SIZE) -> Any:
    """Read a JSON file; see :func:`read_json` and :func:`opened`."""
    with opened(path) as (file, size):
        if size > limit:
            raise UnsafeError(f"{size} bytes of JSON, at most {limit} are read")
        return read_json(file.read(limit + 1), limit)
