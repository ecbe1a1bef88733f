"""Bytes that a reader must refuse, made in code: attacks on safetensors, on the JSON of messages, and on folders."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from fedcast.errors import CheckpointError, FedcastError, WireError
from fedcast.federated.checkpoint import Checkpoints, Progress, _seal
from fedcast.federated.messages import Reply, Task
from fedcast.federated.state import SiteStates
from fedcast.methods.base import Server
from fedcast.models.base import ModelConfig
from fedcast.models.forecaster import Forecaster
from fedcast.models.patch import PatchTransformer
from fedcast.models.published.heartgpt import HeartGPT
from fedcast.training.flat import Layout

META = {"samples": 10, "steps": 4, "loss": 0.5, "seconds": 1.0, "compute_seconds": 0.9, "metrics": {"task_loss": 0.4}}
MEBI = 1 << 20
Header = dict[str, Any]


def pack(header: Header | bytes, body: bytes) -> bytes:
    """Put a header before tensors' bytes, as safetensors does."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def unpack(payload: bytes) -> tuple[Header, bytes]:
    """Return header and body of good safetensors."""
    length = int.from_bytes(payload[:8], "little")
    return json.loads(payload[8 : 8 + length]), payload[8 + length :]


def _first(header: Header) -> str:
    return next(name for name in header if name != "__metadata__")


def entry(**changes: Any) -> Callable[[bytes], bytes]:
    """Change keys of the first tensor's entry."""

    def attack(good: bytes) -> bytes:
        header, body = unpack(good)
        header[_first(header)] |= changes
        return pack(header, body)

    return attack


def added(name: Any, *, shape: Any = (), dtype: Any = "F32", offsets: Any = None, body: bytes = b"") -> Callable[[bytes], bytes]:
    """Add a tensor behind the others; ``offsets`` are counted from their end."""

    def attack(good: bytes) -> bytes:
        header, whole = unpack(good)
        begin, end = offsets or (0, len(body))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(whole) + begin, len(whole) + end]}
        return pack(header, whole + body)

    return attack


def text(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Change the header's text."""

    def attack(good: bytes) -> bytes:
        header, body = unpack(good)
        return pack(change(json.dumps(header).encode()), body)

    return attack


def metadata(value: Any) -> Callable[[bytes], bytes]:
    """Put something in the place of the metadata."""

    def attack(good: bytes) -> bytes:
        header, body = unpack(good)
        return pack({**header, "__metadata__": value}, body)

    return attack


def _many(good: bytes) -> bytes:
    header, body = unpack(good)
    return pack(json.dumps(header).encode()[:-1] + b"," + _names() + b"}", body)


@cache
def _names() -> bytes:
    return b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(10**6))


def _overlap(good: bytes) -> bytes:
    header, body = unpack(good)
    header["second"] = dict(header[_first(header)])
    return pack(header, body)


def _torch(good: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"shared": torch.zeros(4)}, file)
    return file.getvalue()


@cache
def _zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(64 * MEBI))
    return file.getvalue()


def _numpy(good: bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(4, dtype=np.float32))
    return file.getvalue()


_NESTED = b"[" * 200_000 + b"]" * 200_000


@cache
def _bomb(compress: Callable[..., bytes], size: int, *options: int) -> bytes:
    return compress(bytes(size), *options)


TENSORS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "seven bytes": lambda good: good[:7],
    "length alone": lambda good: good[:8],
    "header of 2^64 - 1 bytes": lambda good: b"\xff" * 8 + good[8:],
    "header of 2^63 bytes": lambda good: struct.pack("<Q", 1 << 63) + good[8:],
    "header of 100 MB that is not there": lambda good: struct.pack("<Q", 100_000_000) + good[8:],
    "header of 50 MB of spaces": text(lambda header: header + b" " * (50 * MEBI)),
    "header one byte short": lambda good: struct.pack("<Q", int.from_bytes(good[:8], "little") - 1) + good[8:],
    "header one byte long": lambda good: struct.pack("<Q", int.from_bytes(good[:8], "little") + 1) + good[8:],
    "trailing byte": lambda good: good + b"\0",
    "trailing megabytes": lambda good: good + bytes(8 * MEBI),
    "header is a list": lambda good: pack(b"[]", b""),
    "header is null": lambda good: pack(b"null", b""),
    "header is a number": lambda good: pack(b"1" * 5000, b""),
    "two objects": text(lambda header: header + b"{}"),
    "byte order mark": text(lambda header: b"\xef\xbb\xbf" + header),
    "UTF-16": text(lambda header: header.decode().encode("utf-16")),
    "no UTF-8": text(lambda header: header[:-1] + b',"\xff":1}'),
    "deep JSON": text(lambda header: header[:-1] + b',"x":' + _NESTED + b"}"),
    "deep objects": text(lambda header: header[:-1] + b',"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"),
    "NaN literal": text(lambda header: header[:-1] + b',"x":NaN}'),
    "number of 10^5 digits": text(lambda header: header[:-1] + b',"x":' + b"1" * 100_000 + b"}"),
    "infinite number": text(lambda header: header[:-1] + b',"x":1e999}'),
    "duplicate tensor": text(lambda header: header[:-1] + b"," + header[1:]),
    "10^6 tensors": _many,
    "overlapping offsets": _overlap,
    "gap": added("second", shape=(1,), offsets=(4, 8), body=bytes(8)),
    "offsets beyond the end": added("second", shape=(1024,), offsets=(0, 4096)),
    "offsets backwards": added("second", shape=(1,), offsets=(4, 0), body=bytes(4)),
    "negative offsets": entry(data_offsets=[-4, 0]),
    "offsets of floats": entry(data_offsets=[0.0, 4.0]),
    "three offsets": entry(data_offsets=[0, 4, 8]),
    "offsets of 2^70": entry(data_offsets=[2**70, 2**70 + 4]),
    "negative shape": entry(shape=[-1]),
    "float shape": entry(shape=[4.0]),
    "truth value as shape": entry(shape=[True]),
    "text as shape": entry(shape="4"),
    "shape that overflows": entry(shape=[2**62, 4]),
    "shape of 2^40": entry(shape=[2**40]),
    "no elements, absurd lengths": added("second", shape=(0, 2**60)),
    "no elements, strides that overflow": added("second", shape=(0, 2**62, 2**62)),
    "100 dimensions": added("second", shape=(1,) * 100, body=bytes(4)),
    "10^5 dimensions": added("second", shape=(1,) * 100_000, body=bytes(4)),
    "other type of the same width": entry(dtype="I7"),
    "type that is no text": entry(dtype=["F32"]),
    "four-bit type": added("second", shape=(8,), dtype="F4", body=bytes(4)),
    "eight-bit float": added("second", shape=(4,), dtype="F8_E4M3", body=bytes(4)),
    "complex": added("second", shape=(1,), dtype="C64", body=bytes(8)),
    "truth value of 2": added("second", shape=(1,), dtype="BOOL", body=b"\2"),
    "entry with another key": entry(device="cuda"),
    "entry that is a list": text(lambda header: header[:-1] + b',"x":[]}'),
    "entry without a shape": text(lambda header: header[:-1] + b',"x":{"dtype":"F32","data_offsets":[0,4]}}'),
    "name with NUL": added("a\0b"),
    "name with a line feed": added("a\nb"),
    "name with half a surrogate pair": text(lambda header: header[:-1] + b',"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "name that turns the writing round": added("a\u202eb"),
    "no name": added(""),
    "long name": added("a" * 100_000),
    "name that leads up": added("../../x", body=bytes(4)),
    "name that leads to the root": added("/etc/passwd", body=bytes(4)),
    "name with a folder up in it": added("a/../b", body=bytes(4)),
    "name with backslashes": added("..\\..\\x", body=bytes(4)),
    "metadata that are no dict": metadata(["x"]),
    "metadata that are no texts": metadata({"fedcast": {"kind": "train"}}),
    "metadata of 50 MB": metadata({"fedcast": "x" * (50 * MEBI)}),
    "metadata twice": text(
        lambda header: b'{"__metadata__":{},' + header[1:].replace(b'"__metadata__"', b'"__metadata__"', 1)[:-1] + b',"__metadata__":{}}'
    ),
    "pickle": lambda good: pickle.dumps({"shared": [0.0] * 4}),
    "pickle of a call": lambda good: b"cos\nsystem\n(S'true'\ntR.",
    "torch zip": _torch,
    "zip bomb": lambda good: _zip_bomb(),
    "gzip bomb": lambda good: _bomb(gzip.compress, 64 * MEBI, 1),
    "zstd bomb": lambda good: _bomb(zstandard.compress, 64 * MEBI),
    "bzip2 bomb": lambda good: _bomb(bz2.compress, 8 * MEBI, 1),
    "xz bomb": lambda good: _bomb(lzma.compress, 8 * MEBI),
    "compressed message": lambda good: zstandard.compress(good),
    "npy": _numpy,
    "HDF5": lambda good: b"\x89HDF\r\n\x1a\n" + bytes(64),
    "web page": lambda good: b"<!doctype html><html></html>",
    "program": lambda good: b"\x7fELF" + bytes(64),
    "zeros": lambda good: bytes(len(good)),
}
"""What is done to good safetensors, by name."""


def message(**changes: Any) -> Callable[[Header], bytes]:
    """Change keys of a message's own header."""
    return lambda header: json.dumps({**header, **changes}).encode()


def without(key: str) -> Callable[[Header], bytes]:
    """Take a key out of a message's own header."""
    return lambda header: json.dumps({name: value for name, value in header.items() if name != key}).encode()


def meta(value: bytes) -> Callable[[Header], bytes]:
    """Put text in the place of a message's JSON values."""
    return lambda header: json.dumps({**header, "meta": "HERE"}).encode().replace(b'"HERE"', value)


MESSAGES: dict[str, Callable[[Header], bytes]] = {
    "no JSON": lambda header: b"kind=train",
    "a list": lambda header: b"[]",
    "null": lambda header: b"null",
    "another key": message(code="import os"),
    "no values": without("meta"),
    "values that are a list": message(meta=[]),
    "values that are null": message(meta=None),
    "values of 2 MB": meta(b'{"x":"' + b"x" * (2 * MEBI) + b'"}'),
    "values of 50 MB": meta(b'{"x":"' + b"x" * (50 * MEBI) + b'"}'),
    "values 33 deep": meta(b'{"x":' + b"[" * 33 + b"]" * 33 + b"}"),
    "values 10^5 deep": meta(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a value twice": meta(b'{"samples":1,"samples":10}'),
    "NaN": meta(b'{"loss":NaN}'),
    "infinity": meta(b'{"loss":-Infinity}'),
    "a number that is infinite": meta(b'{"loss":1e999}'),
    "a whole number beyond 64 bits": meta(b'{"samples":1' + b"0" * 300 + b"}"),
    "a whole number of 10^5 digits": meta(b'{"samples":' + b"1" * 100_000 + b"}"),
    "half a surrogate pair": meta(b'{"x":"\\udfff"}'),
}
TASKS = MESSAGES | {
    "kind unknown": message(kind="shell"),
    "kind that is a list": message(kind=["train"]),
    "kind that is null": message(kind=None),
    "no kind": without("kind"),
    "round that is a text": message(round="1"),
    "round that is true": message(round=True),
    "round that is a float": message(round=1.0),
    "round below 0": message(round=-1),
    "round of 2^62": message(round=2**62),
    "id that is a number": message(id=1),
    "id of 10^5 characters": message(id="x" * 100_000),
    "id with NUL": message(id="a\0"),
}
REPLIES = MESSAGES | {
    "error that is a dict": message(error={}),
    "error of 10^5 characters": message(error="x" * 100_000),
    "names no task": without("task"),
    "task that is a list": message(task=[]),
}


def in_message(good: bytes, change: Callable[[Header], bytes]) -> bytes:
    """Change the JSON of a good message."""
    header, body = unpack(good)
    own = change(json.loads(header["__metadata__"]["fedcast"])).decode()
    return pack({**header, "__metadata__": {"fedcast": own}}, body)


LAYOUT = Layout.of({"a": torch.zeros(4), "b": torch.zeros(2)}, lambda name: name == "a")


def server() -> Server:
    """Return a server of six parameters."""
    return Server(LAYOUT, torch.arange(4.0), torch.ones(2), {"x": torch.ones(1)}, round=1, rounds=3)


def good_checkpoint(folder: Path) -> bytes:
    """Write a checkpoint of round 1 and return the bytes of its tensors."""
    Checkpoints(folder).save(server(), Progress())
    return (folder / "round-000001" / "server.safetensors").read_bytes()


def reseal(folder: Path, payload: bytes | None = None, **changes: Any) -> None:
    """Put other tensors or other values into a checkpoint, under a seal that is right."""
    path = folder / "round-000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    if payload is not None:
        (folder / "round-000001" / "server.safetensors").write_bytes(payload)
        manifest |= {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    manifest |= changes
    path.write_text(json.dumps({**manifest, "manifest_sha256": _seal(manifest)}))


def good_model(folder: Path) -> bytes:
    """Write a small model folder and return the bytes of its weights."""
    config = ModelConfig(d_model=8, n_heads=2, encoder_layers=1, decoder_layers=1, context=16, horizon=8, patch=8)
    PatchTransformer(config).save_pretrained(folder)
    return (folder / "model.safetensors").read_bytes()


class Reader:
    """A way into fedcast for safetensors: how good ones are made, and how they are read."""

    def __init__(self, error: type[FedcastError], good: Callable[[Path], bytes], read: Callable[[Path, bytes], Any]) -> None:
        self.error, self.good, self.read = error, good, read


def _read_checkpoint(folder: Path, payload: bytes) -> Any:
    reseal(folder, payload)
    return Checkpoints(folder).load(server())


def _good_state(folder: Path) -> bytes:
    SiteStates(folder).save(1, {"private": torch.ones(3), "moments.step": torch.tensor(2)}, 0)
    return (folder / "state-000001.safetensors").read_bytes()


def _read_state(folder: Path, payload: bytes) -> Any:
    (folder / "state-000001.safetensors").write_bytes(payload)
    return SiteStates(folder).newest()


def _read_model(folder: Path, payload: bytes) -> Any:
    (folder / "model.safetensors").write_bytes(payload)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "weights_sha256": hashlib.sha256(payload).hexdigest()}))
    return Forecaster.from_pretrained(folder)


def _good_published(folder: Path) -> bytes:
    HeartGPT.tiny(0).save_pretrained(folder)
    return (folder / "model.safetensors").read_bytes()


def _read_published(folder: Path, payload: bytes) -> Any:
    (folder / "model.safetensors").write_bytes(payload)
    return Forecaster.from_pretrained(folder)


READERS = {
    "Task.decode": Reader(
        WireError,
        lambda folder: Task("train", 3, {"shared": torch.arange(4.0)}, {"export": True}, id="a").encode(),
        lambda folder, payload: Task.decode(payload),
    ),
    "Reply.decode": Reader(
        WireError,
        lambda folder: Reply({"shared": torch.arange(4.0)}, META, task="a").encode(),
        lambda folder, payload: Reply.decode(payload),
    ),
    "Reply.decode of scores": Reader(
        WireError, lambda folder: Reply(meta={"loss": 0.5}, task="a").encode(), lambda folder, payload: Reply.decode(payload, "evaluate")
    ),
    "Checkpoints.load": Reader(CheckpointError, good_checkpoint, _read_checkpoint),
    "SiteStates": Reader(CheckpointError, _good_state, _read_state),
    "Forecaster.from_pretrained": Reader(CheckpointError, good_model, _read_model),
    "a published model": Reader(CheckpointError, _good_published, _read_published),
}
