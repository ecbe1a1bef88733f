"""Checkpoints of the server: written aside, synced, renamed; a SHA-256 in the manifest; the last two are kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fedcast.errors import CheckpointError
from fedcast.methods.base import Server
from fedcast.safe import UnsafeError, read_json_file
from fedcast.tensors import read_file, write_file

_NAME = re.compile(r"round-(\d{6})")
_TENSORS = "server.safetensors"
_MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 1 << 26
_KEPT = 2
_GROUPS = {"method.": "tensors", "own.": "own", "expert.": "experts"}


@dataclass
class Progress:
    """What the loop itself must remember beside the server's state.

    Attributes
    ----------
    best_loss, best_round
        Smallest mean validation loss so far, and its round.
    bytes_up, bytes_down, seconds
        Sums over all rounds so far.
    peak_memory
        The most bytes the coordinating process held at once.
    best_missing
        How many sites were missing in the validation of the best round.
    counted
        The last round of each site that counted.
    history
        Digest of which sites counted in which round.
    rows
        The rows of the checkpoint's own round: they are appended to the log after the checkpoint, and again after a kill between
        the two.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    best_loss: float = float("inf")
    best_round: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    best_missing: int = sys.maxsize
    counted: dict[str, int] = field(default_factory=dict)
    history: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    round: int
    layout: str
    size: int | None = None  # later than the others
    sha256: str
    progress: Progress


class Checkpoints:
    """The checkpoints of a run folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self._folder

    def save(self, server: Server, progress: Progress, *, before_rename: Callable[[], None] = lambda: None) -> str:
        """Write the checkpoint of the server's round; return the SHA-256 of its tensors."""
        groups = {"method": server.tensors, "own": server.own, "expert": server.experts}
        named = {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
        aside = self._folder / "aside"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        size, sha256 = write_file(aside / _TENSORS, {"shared": server.shared, "private": server.private, **named}, {})
        manifest = {
            "round": server.round,
            "layout": server.layout.digest,
            "size": size,
            "sha256": sha256,
            "progress": {**vars(progress), "best_loss": progress.best_loss if isfinite(progress.best_loss) else None},
        }
        manifest["manifest_sha256"] = _seal(manifest)
        _write(aside / _MANIFEST, json.dumps(manifest).encode())
        before_rename()
        final = self._folder / f"round-{server.round:06d}"
        # A checkpoint of this round can only be left over from a history that was given up as damaged.
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _sync(self._folder)
        for number in self._rounds()[:-_KEPT]:
            shutil.rmtree(self._folder / f"round-{number:06d}")
        return sha256

    def load(self, server: Server) -> Progress | None:
        """Set the server to the newest undamaged checkpoint; ``None`` when there is no checkpoint at all.

        Raises
        ------
        CheckpointError
            When there are checkpoints but none is whole.
        """
        rounds = self._rounds()
        for number in reversed(rounds):
            progress = self._load(number, server)
            if progress is not None:
                return progress
        if rounds:
            raise CheckpointError(f"every checkpoint in {self._folder} is damaged", hint="remove the run folder and start again")
        return None

    def _load(self, number: int, server: Server) -> Progress | None:
        folder = self._folder / f"round-{number:06d}"
        try:
            manifest = _read_manifest(folder)
            if manifest.round != number:
                return None
            if manifest.layout != server.layout.digest:
                raise CheckpointError(f"the checkpoint {folder} holds another model", hint="start the run in a new folder")
            tensors, _, sha256 = read_file(folder / _TENSORS, digest=True, size=manifest.size)
        except (OSError, UnsafeError, ValidationError):
            return None
        if sha256 != manifest.sha256 or not _fits(tensors, server):
            return None
        server.shared, server.private = tensors.pop("shared"), tensors.pop("private")
        for prefix, group in _GROUPS.items():
            setattr(server, group, {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
        server.round = number
        return manifest.progress

    def _rounds(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(match[1]) for entry in self._folder.iterdir() if (match := _NAME.fullmatch(entry.name)))


def _read_manifest(folder: Path) -> _Manifest:
    if folder.is_symlink():
        raise UnsafeError("it is a symbolic link")
    content = read_json_file(folder / _MANIFEST, _MANIFEST_LIMIT)
    if not isinstance(content, dict) or content.pop("manifest_sha256", None) != _seal(content):
        raise UnsafeError("its manifest is not the one that was written")
    progress = content.get("progress")
    if isinstance(progress, dict) and "counted" not in progress:
        raise CheckpointError(f"the checkpoint {folder} is of an older version of fedcast", hint="start the run in a new folder")
    if isinstance(progress, dict) and progress.get("best_loss", 0) is None:
        # JSON has no infinity.
        del progress["best_loss"]
    # From text, since a strict check of objects takes no dict for a dataclass.
    return _Manifest.model_validate_json(json.dumps(content))


def _fits(tensors: Mapping[str, Tensor], server: Server) -> bool:
    """Whether these are the tensors of a server: the seal of a manifest says that they are whole, not who wrote them."""
    layout = server.layout
    sizes = {"shared": (layout.shared_size,), "private": (0, layout.private_size)}
    return (
        all(
            tensor.dtype == torch.float32 and tensor.dim() == 1 and len(tensor) in sizes[name]
            if name in sizes
            else name.startswith(tuple(_GROUPS))
            for name, tensor in tensors.items()
        )
        and sizes.keys() <= tensors.keys()
    )


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _write(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(server: Server) -> str:
    """Return the SHA-256 of the server's weights: two runs ended alike when their digests agree."""
    hasher = hashlib.sha256()
    of_sites = (group[name] for group in (server.own, server.experts) for name in sorted(group))
    for tensor in (server.shared, server.private, *of_sites):
        hasher.update(tensor.to(torch.float32).numpy().tobytes())
    return hasher.hexdigest()
