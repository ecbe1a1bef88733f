"""Safetensors that others wrote, and our own: messages, checkpoints and model folders, with one implementation for all of them.

The library's own parser bounds the header to 100 MB and checks offsets, and lets the rest pass (safetensors 0.8): a header of 60 MB
that names 10^6 empty tensors takes it 10 s and 1.6 GB, names may hold NUL or stand twice, and a shape such as [0, 2^62, 2^62] leaves it
as an exception of torch. Here every length, count, name, type and shape is checked against a limit before anything of its size is
allocated, and a tensor is read straight into its own memory, so that a message of n bytes and its tensors never take more than 2 n.
Its writer copies every tensor twice; this one writes them from where they lie, and makes one copy of a message.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from fedcast.safe import UnsafeError, opened, read_json, shown

NAME_LENGTH = 512
DIMS = 8
_METADATA = "__metadata__"
_ENTRY = {"dtype", "shape", "data_offsets"}
_NOT_IN_NAMES = re.compile(r"(^|/)(\.{0,2})(/|$)|\\")
_DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES.values())}
"""Wide types come first in a file, so that each tensor begins at a multiple of its width."""


@dataclass(frozen=True)
class Limits:
    """What is read at most.

    Attributes
    ----------
    size
        Bytes in all.
    header
        Bytes of the header, which names the tensors and holds the metadata.
    tensors
        How many tensors.
    """

    size: int
    header: int
    tensors: int


FILES = Limits(size=1 << 36, header=1 << 24, tensors=100_000)
"""For files on this machine's disk: checkpoints, site states, model folders."""


class Content(NamedTuple):
    """What was read: the tensors, on the CPU, by name; the metadata; the SHA-256 of all bytes where it was asked for, else empty."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Give safetensors piece by piece, the same bytes as the library's ``save``, without a copy of tensors that lie on the CPU in order.

    Parameters
    ----------
    tensors
        Named tensors of the types that are read.
    metadata
        Texts for the header.
    """
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    place = 0
    for name in names:
        tensor = tensors[name]
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield _memory(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8))


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return safetensors as bytes; see :func:`pieces`."""
    return b"".join(pieces(tensors, metadata))


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write a safetensors file, down to the disk, and return its size in bytes and its SHA-256."""
    hasher, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces(tensors, metadata):
            file.write(piece)
            hasher.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return size, hasher.hexdigest()


def _memory(raw: Tensor) -> memoryview:
    return memoryview(cast(Any, raw.numpy()))


def read_bytes(payload: bytes, limits: Limits) -> Content:
    """Read safetensors from memory; the tensors are copies.

    Raises
    ------
    UnsafeError
        When anything in them is not as the format and the limits have it.
    """
    return _read(io.BytesIO(payload), len(payload), limits, digest=False)


def read_file(path: Path, *, digest: bool = False, size: int | None = None) -> Content:
    """Read a safetensors file within :data:`FILES`.

    Parameters
    ----------
    path
        The file.
    digest
        Whether its SHA-256 is wanted.
    size
        The bytes it must have, where that is known: another size is refused before anything is read.

    Raises
    ------
    UnsafeError
        As :func:`read_bytes`, and for what is no regular file or has another size.
    OSError
        When it cannot be read.
    """
    with opened(path) as (file, found):
        if size is not None and found != size:
            raise UnsafeError(f"it has {found} bytes, not {size}")
        return _read(file, found, FILES, digest=digest)


def check_file(path: Path) -> set[str]:
    """Return the names in a safetensors file that a library is about to read, its header checked; raises as :func:`read_file`."""
    with opened(path) as (file, size):
        return {entry.name for entry in _header(file, size, FILES)[0]}


def _read(file: BinaryIO, size: int, limits: Limits, *, digest: bool) -> Content:
    entries, metadata, head = _header(file, size, limits)
    hasher = hashlib.sha256(head) if digest else None
    tensors = {}
    for name, dtype, shape, begin, end in entries:
        # Memory of torch's own, not a view of the bytes: products can round differently at another alignment.
        raw = torch.empty(end - begin, dtype=torch.uint8)
        memory = _memory(raw)
        done = 0
        while done < len(memory):
            # 1 GiB at a time: one system call reads less than 2 GiB.
            got = file.readinto(memory[done : done + (1 << 30)])  # type: ignore[attr-defined]
            if not got:
                raise UnsafeError("it ends before its last tensor")
            done += got
        if hasher is not None:
            hasher.update(memory)
        if dtype == torch.bool and len(memory) and int(raw.max()) > 1:
            raise UnsafeError(f"tensor {shown(name)} holds truth values other than 0 and 1")
        tensors[name] = raw.view(dtype).reshape(shape)
    return Content(tensors, metadata, hasher.hexdigest() if hasher is not None else "")


def _header(file: BinaryIO, size: int, limits: Limits) -> tuple[list[_Entry], dict[str, str], bytes]:
    """Return the tensors in the order of their bytes, the metadata, and the bytes that were read."""
    if not 8 <= size <= limits.size:
        raise UnsafeError(f"it has {size} bytes, and 8 to {limits.size} are read")
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if length > limits.header or length > size - 8:
        raise UnsafeError(f"a header of {length} bytes, and at most {min(limits.header, size - 8)} are read")
    content = file.read(length)
    if len(prefix) + len(content) != 8 + length or not content.startswith(b"{"):
        raise UnsafeError("its header is no JSON object")
    header = read_json(content, limits.header)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise UnsafeError("its metadata are not named texts")
    if len(header) > limits.tensors:
        raise UnsafeError(f"it holds {len(header)} tensors, at most {limits.tensors} are read")
    entries = sorted((_entry(name, value, limits) for name, value in header.items()), key=lambda entry: entry[3:])
    place = 0
    for entry in entries:
        if entry.begin != place:
            raise UnsafeError(f"tensor {shown(entry.name)} begins at byte {entry.begin}, not where the one before ends")
        place = entry.end
    if 8 + length + place != size:
        raise UnsafeError(f"its tensors take {place} bytes, and {size - 8 - length} are there")
    return entries, metadata, prefix + content


def _entry(name: str, value: Any, limits: Limits) -> _Entry:
    if not 1 <= len(name) <= NAME_LENGTH or not name.isprintable() or _NOT_IN_NAMES.search(name):
        raise UnsafeError(f"{shown(name)} is no name of a tensor")
    if not isinstance(value, dict) or value.keys() != _ENTRY:
        raise UnsafeError(f"tensor {shown(name)} has no dtype, shape and data_offsets, or more than those")
    dtype, shape, offsets = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None, value["shape"], value["data_offsets"]
    if dtype is None:
        raise UnsafeError(f"tensor {shown(name)} has the type {shown(value['dtype'])}, which is not read")
    if not _counts(shape, DIMS) or not _counts(offsets, 2) or len(offsets) != 2:
        raise UnsafeError(f"tensor {shown(name)} has a shape or offsets that are no whole numbers, or more than {DIMS} dimensions")
    # Without its zeros: torch computes strides from all lengths, also where there is not one element.
    if prod(max(length, 1) for length in shape) * dtype.itemsize > limits.size:
        raise UnsafeError(f"tensor {shown(name)} has a shape that no message can hold")
    if offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise UnsafeError(f"tensor {shown(name)} has {offsets[1] - offsets[0]} bytes, its shape and type say otherwise")
    return _Entry(name, dtype, shape, offsets[0], offsets[1])


def _counts(values: object, most: int) -> bool:
    return isinstance(values, list) and len(values) <= most and all(type(value) is int and value >= 0 for value in values)
